"""Convert a Llama, Qwen2 or Qwen3 GGUF to a Hugging Face directory: python -m hub.gguf FILE DIR

The `gguf` package (extra `gguf`) reads the file and dequantises its weights. Unknown keys or values
are refused, and so are files in parts and tokenizers other than byte-level BPE."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

from common import run_cli
from hub.config import ARCHITECTURES, write_config
from hub.files import write_weights

NAMES = {  # of modules, without the block's prefix
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def open_gguf(path) -> tuple[dict, dict]:
    """Open a file as (metadata by key, tensors by name); weights are mapped, not read."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError("the package gguf is needed: pip install gguf") from None

    class Reader(GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            values = super()._get(offset, dtype, count, override_order)
            if len(values) < count:
                raise ValueError("the file ends in the middle of a value: download it again")
            return values

    reader = Reader(path)
    if reader.byte_order == "S":
        raise ValueError("a big-endian file is not supported")
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def model_fields(metadata: dict, tensors: dict) -> dict:
    """The fields of `model.ModelConfig`; other keys of the architecture must be empty."""
    architecture = metadata["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is not supported, {[*ARCHITECTURES]} are")
    start = f"{architecture}."
    own = {key.removeprefix(start): v for key, v in metadata.items() if key.startswith(start)}
    heads, hidden_size = own.pop("attention.head_count"), own.pop("embedding_length")
    head_dim = own.get("attention.key_length", hidden_size // heads)
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if own.get(key) == head_dim:  # other values stay, and are refused
            del own[key]
    own.pop("vocab_size", None)  # the embedding's shape gives it
    rope_theta, divisors = own.pop("rope.freq_base", 10000.0), tensors.get("rope_freqs.weight")
    scaling = divisors and llama3_scaling(read_tensor(divisors, {}), rope_theta, head_dim)
    fields = {
        "model_type": architecture,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden_size,
        "intermediate_size": own.pop("feed_forward_length"),
        "num_hidden_layers": own.pop("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own.pop("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": shortest(own.pop("attention.layer_norm_rms_epsilon")),
        "rope_theta": shortest(rope_theta),
        "rope_scaling": scaling,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": architecture == "qwen2" or "blk.0.attn_q.bias" in tensors,
        "max_position_embeddings": own.pop("context_length", 4096),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
    }
    for key, value in (own | {"split.count": metadata.get("split.count", 1)}).items():
        if value not in (0, "none") and (key, value) != ("split.count", 1):
            raise ValueError(f"{key} {value} is not supported")
    return fields


def shortest(value: float) -> float:
    """The decimal number that was meant: metadata is fp32, and 1e-5 has become 9.99999975e-6."""
    return float(str(np.float32(value)))


def llama3_scaling(stored: Tensor, rope_theta: float, head_dim: int) -> dict:
    """Llama-3.1's rope scaling, found from the frequency divisors that a GGUF stores."""
    factor = shortest(stored.max().item())
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    keep = ((8192 / (2 * torch.pi * rope_theta**exponents) - 1) / 3).clamp(0, 1)  # periods in 8192
    if not torch.allclose(stored.double(), 1 / ((1 - keep) / factor + keep), rtol=1e-3):
        raise ValueError("rope_freqs.weight is not Llama-3.1's scaling, and no other is supported")
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
    return scaling | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def hf_name(name: str) -> str:
    """Translate a name: blk.3.attn_q.weight becomes model.layers.3.self_attn.q_proj.weight."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not found or found[2] not in NAMES:
        raise ValueError(f"the weight {name} does not belong to these architectures")
    return f"{f'model.layers.{found[1]}.' if found[1] else ''}{NAMES[found[2]]}.{found[3]}"


def read_tensor(tensor, fields: dict) -> Tensor:
    """Read a tensor as fp32, whatever its type."""
    from gguf.quants import dequantize

    weight, part = torch.tensor(dequantize(tensor.data, tensor.tensor_type)), tensor.name.split(".")
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(part[-2])
    if not heads or fields["model_type"] != "llama":
        return weight
    # llama.cpp interleaves the rows of llama's q and k: from pairs (2i, 2i + 1) to (i, i + Dh/2)
    pairs = weight.view(fields[heads], -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # kinds of tokens
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3, QWEN2 = {"llama-bpe", "llama3", "llama-v3"}, {"qwen2", "deepseek-r1-qwen"}
GPT2 = {"gpt-2", "smollm"}


def build_tokenizer(metadata: dict) -> HFTokenizer:
    """Byte-level BPE with the pre-tokenizer that the file names."""
    kind, pre = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2" or pre not in LLAMA3 | QWEN2 | GPT2:
        given = f"tokenizer.ggml.model {kind!r} with tokenizer.ggml.pre {pre!r}"
        known = f"gpt2 (byte-level) is, with one of {sorted(LLAMA3 | QWEN2 | GPT2)}"
        raise ValueError(f"{given} is not supported: {known}")
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    ids = {t: i for i, (t, k) in enumerate(zip(tokens, kinds, strict=True)) if k != UNUSED}
    merges = [tuple(pair.split(" ", 1)) for pair in metadata["tokenizer.ggml.merges"]]
    inner = HFTokenizer(models.BPE(ids, merges, ignore_merges=pre in LLAMA3))
    if pre in GPT2:
        steps = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    else:
        words = Regex(WORDS % (r"\p{N}{1,3}" if pre in LLAMA3 else r"\p{N}"))
        steps = [pre_tokenizers.Split(words, "isolated")]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in GPT2))
    inner.normalizer = normalizers.NFC() if pre in QWEN2 else None
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    added = [(t, k) for t, k in zip(tokens, kinds) if t and k in (CONTROL, USER_DEFINED)]
    inner.add_tokens([AddedToken(t, normalized=False, special=k == CONTROL) for t, k in added])
    bos = token_of(metadata, "bos")  # Llama 3's files omit the key below, and mean yes
    if bos and metadata.get("tokenizer.ggml.add_bos_token", pre in LLAMA3):
        special = [(bos, ids[bos])]
        inner.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=special)
    return inner


def token_of(metadata: dict, role: str) -> str | None:
    """The text of the token that the file names as bos, eos or unknown."""
    index = metadata.get(f"tokenizer.ggml.{role}_token_id")
    return None if index is None else metadata["tokenizer.ggml.tokens"][index]


def convert(source, target, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config, weights, tokenizer, chat template and generation_config of a GGUF."""
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists already and is not empty; choose another folder")
    try:
        write_directory(*open_gguf(source), target, dtype)
    except Exception as error:  # the libraries may raise anything on a broken file
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
        raise ValueError(f"{source}: cannot be converted: {kind}{error}") from None


def write_directory(metadata: dict, tensors: dict, target: Path, dtype: torch.dtype) -> None:
    fields, tokenizer = model_fields(metadata, tensors), build_tokenizer(metadata)
    named = {hf_name(n): t for n, t in tensors.items() if n != "rope_freqs.weight"}
    roles = {"unk_token": "unknown", "bos_token": "bos", "eos_token": "eos"}
    settings = {name: token_of(metadata, role) for name, role in roles.items()}
    settings["chat_template"] = metadata.get("tokenizer.chat_template")
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["clean_up_tokenization_spaces"] = False
    ends = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(i for i in ends if i is not None))
    generation = {"bos_token_id": fields["bos_token_id"], "eos_token_id": ends}

    write_config(target, fields, dtype)
    tokenizer.save(str(target / "tokenizer.json"))
    for name, content in (("tokenizer", settings), ("generation", generation)):
        (target / f"{name}_config.json").write_text(json.dumps(content, indent=2) + "\n")
    shapes = {name: tensor.shape.tolist()[::-1] for name, tensor in named.items()}
    empty = {n: torch.empty(shape, dtype=dtype, device="meta") for n, shape in shapes.items()}
    weights = ((name, read_tensor(tensor, fields).to(dtype)) for name, tensor in named.items())
    write_weights(target, empty, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="a Llama, Qwen2 or Qwen3 GGUF")
    parser.add_argument("dir", help="the folder to write: new or empty")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    args = parser.parse_args()
    convert(args.file, args.dir, getattr(torch, args.dtype))
    print(f"{args.dir}: written; give it as --model")


if __name__ == "__main__":
    run_cli(main)
