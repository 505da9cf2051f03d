"""config.json: both layouts that transformers writes, and what is refused, by file and key."""

import json

import pytest
from conftest import FAMILIES, LLAMA3_ROPE, tiny_config, write_checkpoint, write_json

from model import ModelConfig


def version_5_layout(raw: dict) -> dict:
    """config.json as transformers 5 writes it: one rope_parameters for theta and scaling."""
    scaling = raw.get("rope_scaling") or {"rope_type": "default"}
    theta = {"rope_theta": raw.get("rope_theta", 1e4)}
    raw = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling")}
    layers = ["full_attention"] * raw["num_hidden_layers"]
    return raw | {"rope_parameters": theta | scaling, "layer_types": layers}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layouts_mean_the_same(family, tmp_path):
    """transformers 4's, its legacy `type`, transformers 5's, and ours with either left out."""
    raw = FAMILIES[family]
    write_checkpoint(tmp_path, family)
    ours = json.loads((tmp_path / "config.json").read_text())
    layouts = [raw, version_5_layout(raw), ours]
    for left_out in (["rope_parameters"], ["rope_theta", "rope_scaling"]):
        layouts.append({k: v for k, v in ours.items() if k not in left_out})
    if scaling := raw.get("rope_scaling"):
        legacy = {"type" if k == "rope_type" else k: v for k, v in scaling.items()}
        layouts.append(raw | {"rope_scaling": legacy})
    for layout in layouts:
        write_json(tmp_path / "config.json", layout)
        assert ModelConfig.from_pretrained(tmp_path) == tiny_config(family)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
THETA = {"rope_theta": 5e5, "rope_type": "default"}
PART = {key: value for key, value in LLAMA3_ROPE.items() if key != "low_freq_factor"}
# transformers takes rope_scaling and theta 10,000 of these
WITHOUT_THETA = {"rope_theta": None, "rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}}
REFUSED = [  # (what is changed in Llama-3.1's, culprit)
    ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "mistral"),
    ({"rope_scaling": YARN}, "yarn"),
    ({"rope_scaling": YARN, "rope_parameters": THETA}, "yarn"),
    ({"rope_parameters": THETA}, "rope_scaling and rope_parameters disagree"),
    (WITHOUT_THETA, "rope_scaling and rope_parameters disagree"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_parameters": {"full_attention": THETA}}, "full_attention"),
    ({"rope_scaling": PART}, "low_freq_factor"),
    ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "high_freq_factor"),
    ({"rope_scaling": THETA | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_size": 32.5}, "hidden_size must be a whole number"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number up to 2,000"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ({"head_dim": 7}, "head_dim 7"),
    ({"rms_norm_eps": None, "rope_theta": "5e5"}, "rope_theta must be"),
]
REFUSED += [(text, "config.json") for text in (None, "", '{"model_type": ', "[1]", "[" * 99_999)]


@pytest.mark.parametrize("change, culprit", REFUSED)
def test_what_is_not_computed_is_refused_by_key(change, culprit, tmp_path):
    """One message with the file, which may be absent, empty or cut off, and the culprit."""
    file = tmp_path / "config.json"
    if isinstance(change, dict):
        write_json(file, FAMILIES["llama3.1"] | change)
    elif change is not None:
        file.write_text(change)
    with pytest.raises(ValueError, match=culprit) as error:
        ModelConfig.from_pretrained(tmp_path)
    assert str(file) in str(error.value)
