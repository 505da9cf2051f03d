"""config.json of a Hugging Face directory, in the layouts of transformers 4 and 5.

Families: Llama 2, 3, 3.1, 3.2; Qwen2, Qwen2.5; Qwen3. Anything else is refused by name before a weight is read: other
architectures, other rope types, sliding windows, quantised weights.
"""

import json
from pathlib import Path

import torch

from common import read_json

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def is_nf4(quantization: dict) -> bool:
    """Whether a config.json's quantization_config says bitsandbytes' 4-bit NormalFloat."""
    kind = (quantization.get("quant_method"), quantization.get("bnb_4bit_quant_type"))
    return kind == ("bitsandbytes", "nf4")


def read_config(path) -> dict:
    """Fields of `model.ModelConfig` from `path/config.json`; ValueError names what is not supported."""
    file = Path(path) / "config.json"
    raw = read_json(file)

    def refuse(what: str):
        raise ValueError(
            f"{file}: {what} is not supported; this project runs Llama 2/3, Qwen2/2.5 and Qwen3"
        )

    kind = raw.get("model_type")
    architectures = raw.get("architectures") or [ARCHITECTURES.get(kind)]
    if kind not in ARCHITECTURES or architectures != [ARCHITECTURES[kind]]:
        refuse(f"model_type {kind!r}, architectures {architectures}")
    if (quantised := raw.get("quantization_config")) and not is_nf4(quantised):
        refuse("quantization_config (quantised weights, other than bitsandbytes' nf4)")
    if raw.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {raw['hidden_act']!r}")
    if raw.get("mlp_bias"):
        refuse("mlp_bias")
    if raw.get("use_sliding_window") or set(raw.get("layer_types") or []) - {"full_attention"}:
        refuse("a sliding window (use_sliding_window, layer_types)")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        refuse(f"rope_type {rope_type!r}")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        refuse("partial_rotary_factor")
    required = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    missing = [key for key in required if raw.get(key) is None]
    if missing:
        raise ValueError(f"{file}: missing {', '.join(missing)}")
    llama3 = (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    )
    if rope_type == "llama3" and any(key not in rope for key in llama3):
        raise ValueError(
            f"{file}: rope_type llama3 needs {', '.join(llama3)}; found {sorted(rope)}"
        )

    heads = raw["num_attention_heads"]
    default_head_dim = 128 if kind == "qwen3" else raw["hidden_size"] // heads
    return dict(
        model_type=kind,
        **{key: raw[key] for key in required},
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or default_head_dim,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        rope_scaling={"rope_type": "llama3"} | {key: rope[key] for key in llama3}
        if rope_type == "llama3"
        else None,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        attention_bias=kind == "qwen2" or bool(raw.get("attention_bias")),
        max_position_embeddings=raw.get("max_position_embeddings", 4096),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=raw.get("eos_token_id"),
    )


def hf_config(fields: dict) -> dict:
    """A config.json that transformers 4 and 5 both read: rope parameters stand in both layouts."""
    same = {
        key: value for key, value in fields.items() if key not in ("rope_scaling", "attention_bias")
    }
    rope = {"rope_theta": fields["rope_theta"]} | (
        fields["rope_scaling"] or {"rope_type": "default"}
    )
    out = {
        "architectures": [ARCHITECTURES[fields["model_type"]]],
        "hidden_act": "silu",
        "initializer_range": 0.02,
    }
    out |= same | {"rope_scaling": fields["rope_scaling"], "rope_parameters": rope}
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
