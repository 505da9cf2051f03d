"""A Llama, Qwen2 or Qwen3 GGUF becomes a Hugging Face directory: python -m hub.gguf FILE DIR

Weights are dequantised by the `gguf` package (extra `gguf`); q and k of *llama* files, which
llama.cpp stores in the interleaved rotary layout, are permuted back. The tokenizer becomes
tokenizer.json, the chat template goes into tokenizer_config.json. A GGUF is a stranger's file:
every count, length and offset is checked, and nothing in it is run.

Left out: other architectures, files in parts, big-endian files, i-quants.
Format: github.com/ggml-org/ggml, docs/gguf.md; names and pre-tokenizers as llama.cpp's
converter writes them.
"""

import argparse
import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

from common import run_cli
from hub.config import write_config
from hub.files import divide_weights, write_weights

ARCHITECTURES = ("llama", "qwen2", "qwen3")
TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K")


# ------------------------------------------------------------------------ the file
SCALARS = "BbHhIifB__Qqd"  # value type -> struct's letter; 7 bool, 8 text, 9 array, 12 double
TEXT, ARRAY = 8, 9


@dataclass
class StoredTensor:
    shape: tuple[int, ...]  # as in torch: rows first
    type_name: str
    start: int  # bytes from the beginning of the file
    row_bytes: int


class GGUF:
    """Metadata and tensor places of a GGUF; its bytes are mapped, not read."""

    def __init__(self, path):
        self.path, self.at = Path(path), 0
        self.quants = _gguf_package()
        try:
            with open(self.path, "rb") as f:
                self.bytes = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path}: cannot be read ({error})") from None
        if self.bytes[:4] != b"GGUF":
            raise ValueError(f"{self.path}: not a GGUF file (it begins with {self.bytes[:4]!r})")
        self.at = 4
        if (version := self._scalar("I")) not in (2, 3):
            raise ValueError(f"{self.path}: GGUF version {version} is not supported; 2 and 3 are")
        num_tensors, num_fields = self._scalar("Q"), self._scalar("Q")
        self.fields = {}
        for _ in range(num_fields):
            key = self._text()
            self.fields[key] = self._value(self._scalar("I"))
        self.tensors = self._tensor_places(num_tensors)

    def get(self, key: str, kind: type, default=None):
        """A field of one kind; without a default it must be there."""
        value = self.fields.get(key, default)
        if kind is float and type(value) is int:
            value = float(value)
        if value is not None and type(value) is not kind:
            raise ValueError(f"{self.path}: {key} must be {kind.__name__}, got {str(value)[:60]!r}")
        if value is None and default is None:
            raise ValueError(f"{self.path}: {key} is missing")
        return value

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor, dequantised a few rows at a time."""
        place = self.tensors[name]
        rows, columns = math.prod(place.shape[:-1]), place.shape[-1]
        out = torch.empty(rows, columns, dtype=dtype)
        step = max(1, 2**22 // columns)
        kind = self.quants.GGMLQuantizationType[place.type_name]
        for row in range(0, rows, step):
            count = min(step, rows - row)
            start, size = place.start + row * place.row_bytes, count * place.row_bytes
            stored = np.frombuffer(self.bytes, np.uint8, size, start)
            values = self.quants.quants.dequantize(stored.reshape(count, -1), kind)
            out[row : row + count] = torch.tensor(values).view(count, columns)
        return out.view(place.shape)

    def _take(self, size: int) -> int:
        """Position of the next `size` bytes, which are there."""
        start = self.at
        if size > len(self.bytes) - start:
            raise ValueError(
                f"{self.path}: ends at byte {len(self.bytes)}, in the middle of a field"
            )
        self.at += size
        return start

    def _scalar(self, letter: str):
        return struct.unpack_from(f"<{letter}", self.bytes, self._take(struct.calcsize(letter)))[0]

    def _text(self) -> str:
        size = self._scalar("Q")
        start = self._take(size)
        try:
            return self.bytes[start : start + size].decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path}: a text at byte {start} is not UTF-8 ({error})"
            ) from None

    def _value(self, kind: int):
        if kind == TEXT:
            return self._text()
        if kind != ARRAY:
            value = self._scalar(self._letter(kind))
            return bool(value) if kind == 7 else value
        item, count = self._scalar("I"), self._scalar("Q")
        if item == TEXT:
            return [self._text() for _ in range(count)]  # each takes 8 bytes at least
        letter = self._letter(item)
        start = self._take(count * struct.calcsize(letter))
        return list(struct.unpack_from(f"<{count}{letter}", self.bytes, start))

    def _letter(self, kind: int) -> str:
        if kind >= len(SCALARS) or SCALARS[kind] == "_":
            raise ValueError(f"{self.path}: value type {kind} at byte {self.at} is not known")
        return SCALARS[kind]

    def _tensor_places(self, count: int) -> dict[str, StoredTensor]:
        found = {}
        for _ in range(count):
            name, num_dims = self._text(), self._scalar("I")
            if not 1 <= num_dims <= 4:
                raise ValueError(f"{self.path}: {name} has {num_dims} dimensions")
            dims = [self._scalar("Q") for _ in range(num_dims)]  # the fastest first
            found[name] = (dims, self._scalar("I"), self._scalar("Q"))
        alignment = self.get("general.alignment", int, 32)
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{self.path}: general.alignment {alignment} is no power of two")
        data = -(-self.at // alignment) * alignment
        return {name: self._place(name, data, *facts) for name, facts in found.items()}

    def _place(self, name: str, data: int, dims: list[int], kind: int, offset: int) -> StoredTensor:
        known = {int(t): t.name for t in self.quants.GGMLQuantizationType}
        type_name = known.get(kind, str(kind))
        if type_name not in TYPES:
            raise ValueError(
                f"{self.path}: {name} is stored as {type_name}; supported are {', '.join(TYPES)}"
            )
        block, size = self.quants.GGML_QUANT_SIZES[self.quants.GGMLQuantizationType[type_name]]
        if 0 in dims or dims[0] % block:
            raise ValueError(
                f"{self.path}: {name} has shape {dims[::-1]}, rows of whole blocks are needed"
            )
        row_bytes = dims[0] // block * size
        if offset + row_bytes * math.prod(dims[1:]) > len(self.bytes) - data:
            raise ValueError(f"{self.path}: {name} goes beyond the end: download the file again")
        return StoredTensor(tuple(dims[::-1]), type_name, data + offset, row_bytes)


def _gguf_package():
    try:
        import gguf
    except ImportError:
        raise ValueError("the package gguf is needed to read GGUF: pip install gguf") from None
    return gguf


# ------------------------------------------------------------------------ configuration
def model_fields(file: GGUF) -> dict:
    """Fields of `model.ModelConfig` from the metadata; ValueError names what is not supported."""
    architecture = file.get("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: architecture {architecture!r} is not supported; "
            f"{', '.join(ARCHITECTURES)} are"
        )

    def read(key: str, kind: type, default=None):
        return file.get(f"{architecture}.{key}", kind, default)

    refuse_unsupported(file, read)
    hidden_size, heads = read("embedding_length", int), read("attention.head_count", int)
    if heads < 1 or "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: no attention heads, or no token_embd.weight")
    head_dim = read("attention.key_length", int, hidden_size // heads)
    if read("rope.dimension_count", int, head_dim) != head_dim:
        raise ValueError(f"{file.path}: rotation of a part of each head is not supported")
    rope_theta = read("rope.freq_base", float, 10000.0)
    return {
        "model_type": architecture,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": read("feed_forward_length", int),
        "num_hidden_layers": read("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": read("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "rms_norm_eps": shortest(read("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": shortest(rope_theta),
        "rope_scaling": _llama3_scaling(file, rope_theta, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": architecture == "qwen2" or "blk.0.attn_q.bias" in file.tensors,
        "max_position_embeddings": read("context_length", int, 4096),
        "bos_token_id": file.fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id", int),
    }


def refuse_unsupported(file: GGUF, read) -> None:
    scaling = read("rope.scaling.type", str, "none")
    if file.get("split.count", int, 1) > 1:
        what = "a file in parts (join them with llama-gguf-split --merge)"
    elif scaling != "none":
        what = f"rope scaling {scaling!r}"
    elif read("expert_count", int, 0):
        what = "a mixture of experts"
    elif read("attention.sliding_window", int, 0):
        what = "a sliding window"
    else:
        return
    raise ValueError(f"{file.path}: {what} is not supported")


def shortest(value: float) -> float:
    """The decimal number that was meant: metadata are fp32, and 1e-5 has become 9.99999975e-6."""
    return float(str(np.float32(value)))


def _llama3_scaling(file: GGUF, rope_theta: float, head_dim: int) -> dict | None:
    """Llama-3.1's rope scaling, which a GGUF holds as divisors of the frequencies,
    not as parameters."""
    if "rope_freqs.weight" not in file.tensors:
        return None
    stored = file.read("rope_freqs.weight", torch.float32).double().flatten()
    factor = shortest(stored.max().item())
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    periods = 8192 / (2 * torch.pi * rope_theta**exponents)  # in the original context
    keep = ((periods - 1) / 3).clamp(0, 1)
    expected = 1 / ((1 - keep) / factor + keep)
    if stored.shape != expected.shape or not torch.allclose(stored, expected, rtol=1e-3):
        raise ValueError(
            f"{file.path}: rope_freqs.weight is not Llama-3.1's scaling; not supported"
        )
    return scaling


# ------------------------------------------------------------------------ weights
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def weight_shapes(fields: dict) -> dict[str, tuple[int, ...]]:
    """Shape of every weight by its name in a GGUF."""
    D, Dh, hidden = fields["hidden_size"], fields["head_dim"], fields["intermediate_size"]
    q, kv = fields["num_attention_heads"] * Dh, fields["num_key_value_heads"] * Dh
    block = {"attn_norm": (D,), "ffn_norm": (D,), "attn_output": (D, q)}
    block |= {"attn_q": (q, D), "attn_k": (kv, D), "attn_v": (kv, D)}
    block |= {"ffn_gate": (hidden, D), "ffn_up": (hidden, D), "ffn_down": (D, hidden)}
    if fields["model_type"] == "qwen3":
        block |= {"attn_q_norm": (Dh,), "attn_k_norm": (Dh,)}
    shapes = {f"{name}.weight": shape for name, shape in block.items()}
    if fields["attention_bias"]:
        shapes |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        if fields["model_type"] != "qwen2":
            shapes["attn_output.bias"] = (D,)
    V = fields["vocab_size"]
    whole = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    if not fields["tie_word_embeddings"]:
        whole["output.weight"] = (V, D)
    for layer in range(fields["num_hidden_layers"]):
        whole |= {f"blk.{layer}.{name}": shape for name, shape in shapes.items()}
    return whole


def check_tensors(file: GGUF, shapes: dict[str, tuple[int, ...]]) -> None:
    """ValueError unless the file holds these tensors, in these shapes, and no other."""
    found = file.tensors.keys() - {"rope_freqs.weight"}
    if missing := sorted(shapes.keys() - found):
        raise ValueError(f"{file.path}: {len(missing)} weights are missing, first {missing[:3]}")
    if unexpected := sorted(found - shapes.keys()):
        raise ValueError(
            f"{file.path}: {len(unexpected)} weights do not belong to this architecture, "
            f"first {unexpected[:3]}"
        )
    for name, shape in shapes.items():
        if file.tensors[name].shape != shape:
            raise ValueError(
                f"{file.path}: {name} has shape {file.tensors[name].shape}, "
                f"the metadata ask for {shape}"
            )


def hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    if name in OUTER:
        return OUTER[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{INNER[part]}.{kind}"


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k from llama.cpp's interleaved pairs (2i, 2i + 1) to pairs (i, i + Dh/2)."""
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def read_weight(file: GGUF, name: str, fields: dict, dtype: torch.dtype) -> Tensor:
    weight = file.read(name, dtype)
    if fields["model_type"] == "llama" and ".attn_q." in name:
        return halves(weight, fields["num_attention_heads"])
    if fields["model_type"] == "llama" and ".attn_k." in name:
        return halves(weight, fields["num_key_value_heads"])
    return weight


# ------------------------------------------------------------------------ tokenizer
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # kinds of tokens; 1 normal, 2 unknown, 6 byte
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = {"llama-bpe", "llama3", "llama-v3"}
QWEN2 = {"qwen2", "deepseek-r1-qwen"}
GPT2 = {"gpt-2", "smollm"}


@dataclass
class Vocabulary:
    tokens: list[str]
    kinds: list[int]  # of each token
    bos: str | None
    eos: str
    unk: str | None
    add_bos: bool


def read_vocabulary(file: GGUF) -> Vocabulary:
    tokens = _texts(file, "tokenizer.ggml.tokens")
    kinds = file.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(kinds) != len(tokens):
        raise ValueError(f"{file.path}: {len(kinds)} token types for {len(tokens)} tokens")
    size = file.tensors["token_embd.weight"].shape[0]
    if len(tokens) > size:
        raise ValueError(f"{file.path}: {len(tokens)} tokens, but an embedding of {size} rows")

    def named(role: str) -> str | None:
        index = file.fields.get(f"tokenizer.ggml.{role}_token_id")
        if index is None:
            return None
        if type(index) is not int or not 0 <= index < len(tokens):
            raise ValueError(f"{file.path}: {role}_token_id {index} is outside the vocabulary")
        return tokens[index]

    if (eos := named("eos")) is None:
        raise ValueError(f"{file.path}: tokenizer.ggml.eos_token_id is missing")
    # Files of these two kinds leave the field out; llama.cpp then adds a BOS.
    pieces = file.get("tokenizer.ggml.model", str) == "llama"
    default = pieces or file.fields.get("tokenizer.ggml.pre") in LLAMA3
    add_bos = file.get("tokenizer.ggml.add_bos_token", bool, default) and named("bos") is not None
    return Vocabulary(tokens, kinds, named("bos"), eos, named("unknown"), add_bos)


def _texts(file: GGUF, key: str) -> list[str]:
    texts = file.get(key, list)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{file.path}: {key} must be a list of texts")
    return texts


def build_tokenizer(file: GGUF, vocabulary: Vocabulary) -> HFTokenizer:
    kind = file.get("tokenizer.ggml.model", str)
    ids = {token: i for i, token in enumerate(vocabulary.tokens) if vocabulary.kinds[i] != UNUSED}
    try:
        if kind == "gpt2":
            inner = _byte_level(file, ids)
        elif kind == "llama":
            inner = _sentence_pieces(file, ids, vocabulary)
        else:
            raise ValueError(f"tokenizer {kind!r} is not supported; gpt2 and llama are")
        special = {
            CONTROL: lambda t: inner.add_special_tokens([AddedToken(t, normalized=False)]),
            USER_DEFINED: lambda t: inner.add_tokens([AddedToken(t, normalized=False)]),
        }
        for token, token_kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True):
            if token_kind in special and token:
                special[token_kind](token)
        if vocabulary.add_bos:
            template = processors.TemplateProcessing(
                f"{vocabulary.bos} $A", special_tokens=[(vocabulary.bos, ids[vocabulary.bos])]
            )
            inner.post_processor = template
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{file.path}: its tokenizer cannot be built ({error})") from None
    return inner


def _byte_level(file: GGUF, ids: dict[str, int]) -> HFTokenizer:
    """Byte-level BPE with the pre-tokenizer that the file names."""
    pre = file.get("tokenizer.ggml.pre", str, "gpt-2")
    if pre not in LLAMA3 | QWEN2 | GPT2:
        raise ValueError(f"pre-tokenizer {pre!r} is not known; {sorted(LLAMA3 | QWEN2 | GPT2)} are")
    merges = [tuple(pair.split(" ", 1)) for pair in _texts(file, "tokenizer.ggml.merges")]
    if not all(len(pair) == 2 for pair in merges):
        raise ValueError("a merge is not two texts with a space between them")
    inner = HFTokenizer(models.BPE(ids, merges, ignore_merges=pre in LLAMA3))
    inner.decoder = decoders.ByteLevel()
    if pre in GPT2:
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        inner.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_])
        return inner
    numbers = r"\p{N}{1,3}" if pre in LLAMA3 else r"\p{N}"
    inner.normalizer = normalizers.NFC() if pre in QWEN2 else None
    words = pre_tokenizers.Split(Regex(_WORDS % numbers), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    return inner


def _sentence_pieces(file: GGUF, ids: dict[str, int], vocabulary: Vocabulary) -> HFTokenizer:
    """Llama-2's SentencePiece as BPE: pairs merge in the order of the scores of what they make."""
    scores = file.get("tokenizer.ggml.scores", list)
    if len(scores) != len(vocabulary.tokens):
        raise ValueError(f"{len(scores)} scores for {len(vocabulary.tokens)} tokens")
    merges = []
    for piece, i in ids.items():
        if vocabulary.kinds[i] not in (1, USER_DEFINED) or len(piece) > 256:
            continue
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        merges += [(-scores[i], ids[a], ids[b], a, b) for a, b in splits if a in ids and b in ids]
    pairs = [(a, b) for *_, a, b in sorted(merges)]
    unknown = {"unk_token": vocabulary.unk, "fuse_unk": True, "byte_fallback": True}
    inner = HFTokenizer(models.BPE(ids, pairs, **unknown))
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    before = [normalizers.Replace(" ", "▁")]
    behind = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        before.insert(0, normalizers.Prepend("▁"))
        behind.append(decoders.Strip(" ", 1, 0))
    inner.normalizer = normalizers.Sequence(before)
    inner.decoder = decoders.Sequence(behind)
    return inner


# ------------------------------------------------------------------------ a directory
def convert(source, target, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config, weights, tokenizer, chat template and generation_config of a GGUF."""
    file, target = GGUF(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: is there already and not empty; choose another folder")
    fields = model_fields(file)
    shapes = weight_shapes(fields)
    check_tensors(file, shapes)
    vocabulary = read_vocabulary(file)
    tokenizer = build_tokenizer(file, vocabulary)

    write_config(target, fields, dtype)
    tokenizer.save(str(target / "tokenizer.json"))
    _write_json(target / "tokenizer_config.json", tokenizer_config(file, vocabulary))
    _write_json(target / "generation_config.json", generation_config(file, fields))
    meta = {"dtype": dtype, "device": "meta"}
    empty = {hf_name(name): torch.empty(shape, **meta) for name, shape in shapes.items()}
    tensors = ((hf_name(name), read_weight(file, name, fields, dtype)) for name in shapes)
    write_weights(target, divide_weights(empty, 5 * 10**9), tensors)


def tokenizer_config(file: GGUF, vocabulary: Vocabulary) -> dict:
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "unk_token": vocabulary.unk,
        "clean_up_tokenization_spaces": False,
    }
    if template := file.get("tokenizer.chat_template", str, ""):
        content["chat_template"] = template
    return content


def generation_config(file: GGUF, fields: dict) -> dict:
    """Every id that ends an answer, the EOS first."""
    roles = ("eos", "eot", "eom")
    ends = [file.fields.get(f"tokenizer.ggml.{role}_token_id") for role in roles]
    ends = list(dict.fromkeys(i for i in ends if type(i) is int))
    return {
        "bos_token_id": fields["bos_token_id"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
    }


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="a Llama, Qwen2 or Qwen3 GGUF")
    parser.add_argument("dir", help="the folder to write, which must not exist or be empty")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
        help="of the stored weights (default: bfloat16)",
    )  # fmt: skip
    args = parser.parse_args()
    convert(args.file, args.dir, getattr(torch, args.dtype))
    print(f"{args.dir}: written; give it as --model")


if __name__ == "__main__":
    run_cli(main)
