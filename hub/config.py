"""config.json of a Hugging Face directory, in the layouts of transformers 4 and 5.

Families: Llama 2, 3, 3.1, 3.2; Qwen2, Qwen2.5; Qwen3. Anything else is refused by name before a
weight is read: other architectures, other rope types, sliding windows, weights quantised
otherwise than as bitsandbytes' nf4.
"""

import json
import math
from pathlib import Path

import torch

from common import read_json, reading

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def is_nf4(quantization: dict) -> bool:
    """Whether a config.json's quantization_config says bitsandbytes' 4-bit NormalFloat."""
    kind = (quantization.get("quant_method"), quantization.get("bnb_4bit_quant_type"))
    return kind == ("bitsandbytes", "nf4")


SIZES = {  # bounds keep a damaged file from asking for all memory or time
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2000,
    "num_attention_heads": 2**16,
}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(path) -> dict:
    """Fields of `model.ModelConfig` from `path/config.json`;
    ValueError names what is not supported."""
    file = Path(path) / "config.json"
    if not file.exists() and (file.parent / "adapter_config.json").exists():
        raise ValueError(
            f"{file}: no such file, but an adapter lies there: give it as --adapter, and its base "
            "as --model"
        )
    raw = read_json(file)
    with reading(file):
        refuse_unsupported(file, raw)
        fields = _sizes(file, raw) | _rope(file, raw)
    return fields | {
        "model_type": raw["model_type"],
        "rms_norm_eps": _number(file, raw, "rms_norm_eps", 1e-6),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings")),
        "attention_bias": raw["model_type"] == "qwen2" or bool(raw.get("attention_bias")),
        "max_position_embeddings": _size(file, raw, "max_position_embeddings", 2**40, 4096),
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_id": raw.get("eos_token_id"),
    }


def refuse_unsupported(file: Path, raw: dict) -> None:
    """ValueError if a config.json asks for anything that this project does not compute."""
    kind = raw.get("model_type")
    known = ARCHITECTURES.get(kind if isinstance(kind, str) else "")
    architectures = raw.get("architectures") or [known]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if known is None or architectures != [known]:
        what = f"model_type {kind!r}, architectures {architectures}"
    elif raw.get("quantization_config") and not is_nf4(raw["quantization_config"]):
        what = "quantization_config (quantised weights, other than bitsandbytes' nf4)"
    elif (raw.get("hidden_act") or "silu") not in ("silu", "swish"):
        what = f"hidden_act {raw['hidden_act']!r}"
    elif raw.get("mlp_bias"):
        what = "mlp_bias"
    elif raw.get("use_sliding_window") or set(raw.get("layer_types") or []) - {"full_attention"}:
        what = "a sliding window (use_sliding_window, layer_types)"
    elif not isinstance(rope, dict) or _rope_type(rope) not in ("default", "llama3"):
        what = f"rope_type {_rope_type(rope) if isinstance(rope, dict) else rope!r}"
    elif rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        what = "partial_rotary_factor"
    else:
        return
    raise ValueError(
        f"{file}: {what} is not supported; this project runs Llama 2/3, Qwen2/2.5 and Qwen3"
    )


def _sizes(file: Path, raw: dict) -> dict:
    missing = [key for key in SIZES if raw.get(key) is None]
    if missing:
        raise ValueError(f"{file}: missing {', '.join(missing)}")
    fields = {key: _size(file, raw, key, most) for key, most in SIZES.items()}
    heads, hidden_size = fields["num_attention_heads"], fields["hidden_size"]
    default = 128 if raw["model_type"] == "qwen3" else max(1, hidden_size // heads)
    fields["num_key_value_heads"] = _size(file, raw, "num_key_value_heads", heads, heads)
    fields["head_dim"] = _size(file, raw, "head_dim", 2**14, default)
    if heads % fields["num_key_value_heads"]:
        raise ValueError(
            f"{file}: num_attention_heads {heads} is no multiple of num_key_value_heads "
            f"{fields['num_key_value_heads']}"
        )
    if fields["head_dim"] % 2:
        raise ValueError(f"{file}: head_dim {fields['head_dim']} is odd; rotation needs pairs")
    return fields


def _rope_type(rope: dict):
    return rope.get("rope_type", rope.get("type", "default"))


def _rope(file: Path, raw: dict) -> dict:
    """rope_theta and rope_scaling, from the layout of transformers 5 or of transformers 4."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    holder = rope if "rope_theta" in rope else raw
    fields = {
        "rope_theta": float(_number(file, holder, "rope_theta", 10000.0)),
        "rope_scaling": None,
    }
    if _rope_type(rope) == "llama3":
        if any(key not in rope for key in LLAMA3_ROPE):
            raise ValueError(
                f"{file}: rope_type llama3 needs {', '.join(LLAMA3_ROPE)}; found {sorted(rope)}"
            )
        scaling = {key: _number(file, rope, key) for key in LLAMA3_ROPE}
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise ValueError(f"{file}: high_freq_factor must be above low_freq_factor")
        fields["rope_scaling"] = {"rope_type": "llama3"} | scaling
    return fields


def _size(file: Path, raw: dict, key: str, most: int, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{file}: {key} must be a whole number from 1 to {most:,}, got {value!r}")
    return value


def _number(file: Path, raw: dict, key: str, default: float | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{file}: {key} must be a number above 0, got {value!r}")
    return value


def hf_config(fields: dict) -> dict:
    """A config.json that transformers 4 and 5 both read: rope parameters stand in both layouts."""
    rope = fields["rope_scaling"] or {"rope_type": "default"}
    other = ("rope_scaling", "attention_bias")  # written below, in HF's ways
    out = {
        "architectures": [ARCHITECTURES[fields["model_type"]]],
        "hidden_act": "silu",
        "initializer_range": 0.02,
    }
    out |= {key: value for key, value in fields.items() if key not in other}
    out["rope_scaling"] = fields["rope_scaling"]
    out["rope_parameters"] = {"rope_theta": fields["rope_theta"]} | rope
    if fields["model_type"] != "qwen2":
        out["attention_bias"] = fields["attention_bias"]
    if fields["model_type"] != "llama":
        out |= {"use_sliding_window": False, "sliding_window": None}
    return out


def write_config(path, fields: dict, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    out = hf_config(fields) | {"torch_dtype": name, "dtype": name}
    Path(path).mkdir(parents=True, exist_ok=True)
    (Path(path) / "config.json").write_text(json.dumps(out, indent=2) + "\n")
