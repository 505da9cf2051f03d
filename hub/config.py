"""config.json of a Hugging Face directory, in the layouts of transformers 4 and 5.

Llama 2 and 3, Qwen2, Qwen2.5 and Qwen3 are read; keys that need another computation are refused."""

import json
from functools import partial
from pathlib import Path

import torch

from common import read_json, reading

ARCHITECTURES = {kind: f"{kind.title()}ForCausalLM" for kind in ("llama", "qwen2", "qwen3")}
NF4 = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(path) -> dict:
    """Read the fields of `model.ModelConfig` from `path/config.json`."""
    file = Path(path) / "config.json"
    raw = read_json(file)
    with reading(file):
        model_type, size = raw["model_type"], partial(positive, file, raw, kinds=(int,), most=2**20)
        architecture = ARCHITECTURES.get(model_type)
        understood = {  # keys that change the result, and whether their value is supported
            "model_type": architecture is not None,
            "architectures": raw.get("architectures") in (None, [architecture]),
            "hidden_act": raw.get("hidden_act") in (None, "silu", "swish"),
            "mlp_bias": not raw.get("mlp_bias"),
            "use_sliding_window": not raw.get("use_sliding_window"),
            "layer_types": set(raw.get("layer_types") or []) <= {"full_attention"},
            "partial_rotary_factor": raw.get("partial_rotary_factor") in (None, 1.0),
            "is_causal": raw.get("is_causal") in (None, True),
            "quantization_config": NF4.items() <= (raw.get("quantization_config") or NF4).items(),
        }
        for key in (key for key, good in understood.items() if not good):
            raise ValueError(f"{file}: {key} {raw[key]!s:.99} is not supported; give Llama or Qwen")
        heads, hidden_size = size("num_attention_heads"), size("hidden_size")
        kv_heads = size("num_key_value_heads", heads)
        head_dim = size("head_dim", 128 if model_type == "qwen3" else max(1, hidden_size // heads))
        if heads % kv_heads or head_dim % 2:
            given = f"num_key_value_heads {kv_heads}, head_dim {head_dim}"
            raise ValueError(f"{file}: {given}: must be a divisor of {heads}, and even")
        # transformers takes rope_scaling, its older layout, first
        ropes = [raw[key] for key in ("rope_scaling", "rope_parameters") if raw.get(key)]
        found = [read_rope(file, raw, rope) for rope in ropes or [{}]]
        if found[0] != found[-1]:
            raise ValueError(f"{file}: rope_scaling and rope_parameters disagree ({ropes})")
        return found[0] | {
            "model_type": model_type,
            "vocab_size": size("vocab_size"),
            "hidden_size": hidden_size,
            "intermediate_size": size("intermediate_size"),
            "num_hidden_layers": size("num_hidden_layers", most=2000),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "rms_norm_eps": positive(file, raw, "rms_norm_eps", 1e-6),
            "tie_word_embeddings": bool(raw.get("tie_word_embeddings")),
            "attention_bias": model_type == "qwen2" or bool(raw.get("attention_bias")),
            "max_position_embeddings": size("max_position_embeddings", 4096, most=2**40),
            "bos_token_id": raw.get("bos_token_id"),
            "eos_token_id": raw.get("eos_token_id"),
        }


def read_rope(file: Path, raw: dict, rope: dict) -> dict:
    """Read rope_theta and rope_scaling from one of the two layouts."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    used = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    used |= set(LLAMA3_ROPE) if kind == "llama3" else set()
    whole_heads = rope.get("partial_rotary_factor", 1.0) == 1.0
    if kind not in ("default", "llama3") or rope.keys() - used or not whole_heads:
        raise ValueError(f"{file}: rope {rope} is not supported; types default and llama3 are")
    theta = float(positive(file, rope if "rope_theta" in rope else raw, "rope_theta", 1e4))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    scaling = {key: positive(file, rope, key) for key in LLAMA3_ROPE}
    if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError(f"{file}: high_freq_factor must be above low_freq_factor, got {rope}")
    return {"rope_theta": theta, "rope_scaling": {"rope_type": "llama3"} | scaling}


def positive(file: Path, raw: dict, key: str, default=None, kinds=(int, float), most=1e300):
    """Read a positive number; it is bounded, or a damaged file could ask for all memory."""
    value = default if raw.get(key) is None else raw[key]
    if type(value) not in kinds or not 0 < value <= most:
        kind = "a number" if float in kinds else f"a whole number up to {most:,} and"
        raise ValueError(f"{file}: {key} must be {kind} above 0, got {value!r}")
    return value


def hf_config(fields: dict) -> dict:
    """A config.json that transformers 4 and 5 both read, with rope parameters in both layouts."""
    rope = fields["rope_scaling"] or {"rope_type": "default"}
    out = {"architectures": [ARCHITECTURES[fields["model_type"]]], "hidden_act": "silu", **fields}
    out["rope_parameters"] = {"rope_theta": fields["rope_theta"]} | rope
    if fields["model_type"] == "qwen2":
        del out["attention_bias"]  # it always has these biases
    return out


def write_config(path, fields: dict, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    out = hf_config(fields) | {"torch_dtype": name, "dtype": name}
    Path(path).mkdir(parents=True, exist_ok=True)
    (Path(path) / "config.json").write_text(json.dumps(out, indent=2) + "\n")
