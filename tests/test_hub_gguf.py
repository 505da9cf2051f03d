"""GGUF in: a model written by gguf's own writer is the model; what is not understood is refused."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, randomize, tiny_config
from families import byte_level, spell, spelling_bpe
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import pre_tokenizers

from hub.gguf import NAMES, convert, open_gguf, read_tensor
from hub.tokenizer import Tokenizer
from model import Transformer, inverse_frequencies, load_pretrained

gguf = pytest.importorskip("gguf")
INPUT_IDS = torch.arange(3, 17).view(2, 7)
TEXTS = ["Alien 3 (1992)", "12 Monkeys, 101", "Amélie naïve Žižek", "日本 🎬👩‍🚀", " a  b\n\n c\t"]
CHAT = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"
GGUF_NAMES = {name: short for short, name in NAMES.items()}


def padded_model(family: str) -> Transformer:
    """Enough rows in the embedding for a byte-level vocabulary."""
    return randomize(Transformer(replace(tiny_config(family), vocab_size=300)))


SPECIAL, WORDS = ["<s>", "</s>"], ("ĠAl", "Al", "19", "ien", "Ġ1", "12")


def write_gguf(file: Path, model: Transformer, pre="gpt-2", kind="F32", fields=None) -> Path:
    """A model as llama.cpp's converter writes it; `fields`: more calls of the writer's add_*."""
    config, (tokens, pairs) = model.config, spell(SPECIAL, WORDS)
    writer = gguf.GGUFWriter(file, config.model_type)
    calls = {
        "block_count": config.num_hidden_layers, "context_length": 4096,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
        "key_length": config.head_dim, "rope_freq_base": config.rope_theta,
        "layer_norm_rms_eps": config.rms_norm_eps, "tokenizer_model": "gpt2", "tokenizer_pre": pre,
        "token_list": tokens, "token_types": [3, 3] + [1] * (len(tokens) - 2),
        "token_merges": [*map(" ".join, pairs)], "chat_template": CHAT,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    for add, value in (calls | (fields or {})).items():
        if isinstance(value, tuple):  # a key of its own
            writer.add_key_value(*value)
        elif value is not None:
            getattr(writer, f"add_{add}")(value)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.named_parameters():
        module, _, part = name.rpartition(".")
        block = module.split(".")[2] if ".layers." in module else None
        short, weight = GGUF_NAMES[module.split(".", 3)[3] if block else module], weight.detach()
        if config.model_type == "llama" and short in heads:  # the rows of a head are interleaved
            pairs = weight.view(heads[short], 2, -1, *weight.shape[1:])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        blocks = weight.ndim == 2 and weight.shape[1] % 32 == 0
        stored = gguf.GGMLQuantizationType[kind if blocks else "F32"]
        values = gguf.quants.quantize(weight.numpy(), stored)
        name = f"blk.{block}.{short}.{part}" if block else f"{short}.{part}"
        writer.add_tensor(name, values, raw_dtype=stored)
    if config.rope_scaling:  # llama.cpp stores the divisors of the frequencies
        plain = inverse_frequencies(replace(config, rope_scaling=None))
        writer.add_tensor("rope_freqs.weight", (plain / inverse_frequencies(config)).numpy())
    return finish(writer, file)


def finish(writer, file: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


# ------------------------------------------------------------------------------ weights
@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_is_the_model(family, tmp_path):
    """Written as llama.cpp would, read back."""
    model = padded_model(family)
    convert(write_gguf(tmp_path / "m.gguf", model), tmp_path / "hf", torch.float32)
    read = load_pretrained(tmp_path / "hf")
    assert torch.equal(read.logits(INPUT_IDS), model.logits(INPUT_IDS))
    for name in ("rope_scaling", "rope_theta", "tie_word_embeddings", "head_dim", "rms_norm_eps"):
        assert getattr(read.config, name) == getattr(model.config, name), name


STEPS = {"Q4_0": 1 / 7, "Q4_1": 2 / 15, "Q5_0": 1 / 15, "Q5_1": 2 / 31, "Q8_0": 1 / 127}
STEPS |= {"F32": 0, "F16": 2**-10, "BF16": 2**-7}


@pytest.mark.parametrize("kind", STEPS)
def test_stored_types_come_back_within_their_own_error(kind, tmp_path):
    """Half a quantisation step of the block's largest value, and the scale's own rounding."""
    model = padded_model("qwen3")
    _, tensors = open_gguf(write_gguf(tmp_path / "m.gguf", model, kind=kind))
    weight, read = model.model.embed_tokens.weight, read_tensor(tensors["token_embd.weight"], {})
    largest = weight.abs().amax(-1, keepdim=True)  # a row is a block of 32
    assert ((read - weight).abs() <= 1.1 * STEPS[kind] * largest).all()
    assert (kind == "F32") == torch.equal(read, weight)


# ------------------------------------------------------------------------------ tokenizers
def expected_tokenizer(pre: str) -> HFTokenizer:
    """The published pipeline of a family around the same vocabulary."""
    inner = spelling_bpe(SPECIAL, WORDS, ignore_merges=pre == "llama-bpe")
    if pre in ("llama-bpe", "qwen2"):
        family = byte_level("llama3" if pre == "llama-bpe" else "qwen")
        inner.pre_tokenizer, inner.normalizer = family.pre_tokenizer, family.normalizer
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        last = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([*digits, last])
    return inner


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_texts_become_the_ids_of_their_family_and_come_back(pre, tmp_path):
    """Digits, accents and emoji; BOS where it is the family's; template and every end written."""
    model, ends = padded_model("qwen3"), {"eot_token_id": 5}
    convert(write_gguf(tmp_path / "m.gguf", model, pre, fields=ends), tmp_path / "hf")
    tokenizer = Tokenizer(tmp_path / "hf")
    assert tokenizer.bos_ids == ([0] if pre == "llama-bpe" else [])
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (1, {1, 5})
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert ids == expected_tokenizer(pre).encode(text).ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode(["<s>"])[0] != [0] and tokenizer.inner.token_to_id("<s>") == 0
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHAT and config["eos_token"] == "</s>"
    begins = {"add_bos_token": pre != "llama-bpe"}  # the file's own rule goes before the family's
    convert(write_gguf(tmp_path / "m.gguf", model, pre, fields=begins), tmp_path / "own")
    assert Tokenizer(tmp_path / "own").bos_ids == ([] if pre == "llama-bpe" else [0])


# ------------------------------------------------------------------------------ what is refused
FLOAT32, UINT16 = gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.UINT16
REFUSED = [
    ({"rope_scaling_type": gguf.RopeScalingType.YARN}, "rope.scaling.type yarn"),
    ({"rope_scaling_factor": 4.0}, "rope.scaling.factor 4.0"),
    ({"own": ("llama.rope.scale_linear", 4.0, FLOAT32)}, "rope.scale_linear 4.0"),
    ({"expert_count": 8}, "expert_count 8"),
    ({"sliding_window": 512}, "sliding_window 512"),
    ({"rope_dimension_count": 4}, "rope.dimension_count 4"),
    ({"own": ("split.count", 2, UINT16)}, "split.count 2"),
    ({"unk_token_id": 999}, "index out of range"),
    ({"tokenizer_pre": "chatglm-bpe"}, "tokenizer.ggml.pre 'chatglm-bpe'"),
    ({"tokenizer_model": "llama"}, "tokenizer.ggml.model 'llama'"),
    ({"block_count": None}, "block_count"),
]


@pytest.mark.parametrize("fields, culprit", REFUSED)
def test_what_is_not_understood_is_refused_by_key(fields, culprit, tmp_path):
    """Before a file is written; a scaling's factor without its type means linear in llama.cpp."""
    file = write_gguf(tmp_path / "m.gguf", padded_model("llama2"), fields=fields)
    with pytest.raises(ValueError, match=rf"m\.gguf.*{culprit}"):
        convert(file, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_other_places_and_files_are_left_alone(monkeypatch, tmp_path):
    swapped = gguf.GGUFWriter(tmp_path / "b.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    other = gguf.GGUFWriter(tmp_path / "o.gguf", "gemma")
    for writer, culprit in ((swapped, "b.gguf.*big-endian"), (other, "o.gguf.*'gemma'")):
        file = finish(writer, writer.path)
        with pytest.raises(ValueError, match=culprit):
            convert(file, tmp_path / "hf")
    with pytest.raises(ValueError, match="not empty"):
        convert(file, tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        convert(file, tmp_path / "hf")
