"""config.json of a Hugging Face directory, in the layouts of transformers 4 and 5.

Families: Llama 2, 3, 3.1, 3.2; Qwen2, Qwen2.5; Qwen3. Whatever asks for another computation is
refused by key and value, before a weight is read."""

import json
from pathlib import Path

import torch

from common import read_json, reading

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
NF4 = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(path) -> dict:
    """Read the fields of `model.ModelConfig` from `path/config.json`."""
    file = Path(path) / "config.json"
    if not file.exists():
        raise ValueError(f"{file}: no such file (adapters go to --adapter, their base to --model)")
    raw = read_json(file)
    with reading(file):
        model_type, quantization = raw["model_type"], raw.get("quantization_config") or NF4
        layer_types = raw.get("layer_types") or []
        computed = {  # keys that change the result, and their values that are computed here
            "model_type": [*ARCHITECTURES],
            "architectures": [[ARCHITECTURES.get(str(model_type))]],
            "hidden_act": ["silu", "swish"],
            "mlp_bias": [False],
            "use_sliding_window": [False],
            "layer_types": [layer_types] * (set(layer_types) <= {"full_attention"}),
            "partial_rotary_factor": [1.0],
            "is_causal": [True],
            "quantization_config": [quantization] * (NF4.items() <= quantization.items()),
        }
        for key, values in computed.items():
            if raw.get(key) is not None and raw[key] not in values:
                value = str(raw[key])[:100]
                raise ValueError(
                    f"{file}: {key} {value} is not supported; give a Llama or Qwen 2/3"
                )
        heads, hidden_size = (
            whole(file, raw, "num_attention_heads"),
            whole(file, raw, "hidden_size"),
        )
        head_dim = 128 if model_type == "qwen3" else max(1, hidden_size // heads)
        head_dim = whole(file, raw, "head_dim", head_dim, 2**14)
        kv_heads = whole(file, raw, "num_key_value_heads", heads)
        if heads % kv_heads or head_dim % 2:
            given = f"num_key_value_heads {kv_heads}, head_dim {head_dim}"
            raise ValueError(f"{file}: {given}: a divisor of {heads} and an even number are needed")
        # transformers takes rope_scaling, its older layout, first
        ropes = [raw[key] for key in ("rope_scaling", "rope_parameters") if raw.get(key)]
        found = [read_rope(file, raw, rope) for rope in ropes or [{}]]
        if found[0] != found[-1]:
            raise ValueError(f"{file}: rope_scaling and rope_parameters disagree ({ropes})")
        return found[0] | {
            "model_type": model_type,
            "vocab_size": whole(file, raw, "vocab_size"),
            "hidden_size": hidden_size,
            "intermediate_size": whole(file, raw, "intermediate_size"),
            "num_hidden_layers": whole(file, raw, "num_hidden_layers", most=2000),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "rms_norm_eps": above_0(file, raw, "rms_norm_eps", 1e-6),
            "tie_word_embeddings": bool(raw.get("tie_word_embeddings")),
            "attention_bias": model_type == "qwen2" or bool(raw.get("attention_bias")),
            "max_position_embeddings": whole(file, raw, "max_position_embeddings", 4096, 2**40),
            "bos_token_id": raw.get("bos_token_id"),
            "eos_token_id": raw.get("eos_token_id"),
        }


def read_rope(file: Path, raw: dict, rope: dict) -> dict:
    """rope_theta and rope_scaling as one layout gives them."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    used = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    used |= set(LLAMA3_ROPE) if kind == "llama3" else set()
    partial = rope.get("partial_rotary_factor", 1.0) != 1.0
    if kind not in ("default", "llama3") or rope.keys() - used or partial:
        raise ValueError(f"{file}: rope {rope} is not supported; types default and llama3 are")
    theta = above_0(file, rope if "rope_theta" in rope else raw, "rope_theta", 1e4)
    if kind == "default":
        return {"rope_theta": float(theta), "rope_scaling": None}
    scaling = {key: above_0(file, rope, key) for key in LLAMA3_ROPE}
    if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError(f"{file}: high_freq_factor must be above low_freq_factor, got {rope}")
    return {"rope_theta": float(theta), "rope_scaling": {"rope_type": "llama3"} | scaling}


def above_0(file: Path, raw: dict, key: str, default=None):
    value = default if raw.get(key) is None else raw[key]
    if type(value) not in (int, float) or not 0 < value < 1e300:
        raise ValueError(f"{file}: {key} must be a number above 0, got {value!r}")
    return value


def whole(file: Path, raw: dict, key: str, default=None, most: int = 2**20) -> int:
    """A whole number; its bound keeps a damaged file from asking for all memory or time."""
    value = above_0(file, raw, key, default)
    if value != int(value) or value > most:
        raise ValueError(f"{file}: {key} must be a whole number up to {most:,}, got {value!r}")
    return int(value)


def hf_config(fields: dict) -> dict:
    """A config.json that transformers 4 and 5 both read: rope parameters stand in both layouts."""
    rope = fields["rope_scaling"] or {"rope_type": "default"}
    out = {
        "architectures": [ARCHITECTURES[fields["model_type"]]],
        "hidden_act": "silu",
        **fields,
        "rope_parameters": {"rope_theta": fields["rope_theta"]} | rope,
    }
    if fields["model_type"] == "qwen2":
        del out["attention_bias"]  # its biases are a matter of course
    return out


def write_config(path, fields: dict, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    out = hf_config(fields) | {"torch_dtype": name, "dtype": name}
    Path(path).mkdir(parents=True, exist_ok=True)
    (Path(path) / "config.json").write_text(json.dumps(out, indent=2) + "\n")
