"""config.json: both layouts that transformers writes, and what is refused, by file and field."""

import json

import pytest
from conftest import (
    FAMILIES,
    LLAMA3_ROPE,
    tiny_config,
    write_checkpoint,
    write_json,
)

from hub.config import read_config
from model import ModelConfig, load_pretrained


def version_5_layout(raw: dict) -> dict:
    """config.json as transformers 5 writes it:
    one rope_parameters instead of rope_theta and rope_scaling."""
    raw = dict(raw)
    scaling = raw.pop("rope_scaling", None) or {"rope_type": "default"}
    layers = ["full_attention"] * raw["num_hidden_layers"]
    return raw | {
        "rope_parameters": {"rope_theta": raw.pop("rope_theta", 1e4)} | scaling,
        "layer_types": layers,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_both_config_layouts_mean_the_same(family, tmp_path):
    """transformers 4's top-level rope keys, its legacy `type`,
    and transformers 5's rope_parameters read alike."""
    raw = FAMILIES[family]
    write_json(tmp_path / "4" / "config.json", raw)
    write_json(tmp_path / "5" / "config.json", version_5_layout(raw))
    assert ModelConfig.from_pretrained(tmp_path / "4") == tiny_config(family)
    assert ModelConfig.from_pretrained(tmp_path / "5") == tiny_config(family)
    if raw.get("rope_scaling"):
        scaling = {
            "type" if key == "rope_type" else key: value
            for key, value in raw["rope_scaling"].items()
        }
        write_json(tmp_path / "legacy" / "config.json", raw | {"rope_scaling": scaling})
        assert ModelConfig.from_pretrained(tmp_path / "legacy") == tiny_config(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_written_config_holds_both_layouts(family, tmp_path):
    """Our config.json read back is the same ModelConfig, with either layout's keys alone."""
    write_checkpoint(tmp_path / "both", family)
    raw = json.loads((tmp_path / "both" / "config.json").read_text())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"]
    only_4 = {key: value for key, value in raw.items() if key != "rope_parameters"}
    only_5 = {key: value for key, value in raw.items() if key not in ("rope_theta", "rope_scaling")}
    write_json(tmp_path / "4" / "config.json", only_4)
    write_json(tmp_path / "5" / "config.json", only_5)
    for layout in ("both", "4", "5"):
        assert ModelConfig.from_pretrained(tmp_path / layout) == tiny_config(family)


MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


INCOMPLETE_ROPE = {key: value for key, value in LLAMA3_ROPE.items() if key != "low_freq_factor"}


@pytest.mark.parametrize(
    "changes, culprit",
    [
        (MISTRAL, "mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"rope_scaling": YARN}, "yarn"),
        ({"rope_scaling": None, "rope_parameters": YARN | {"rope_theta": 1e6}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": INCOMPLETE_ROPE}, "low_freq_factor"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_unsupported_config_is_refused_by_name(changes, culprit, tmp_path):
    """A config.json that asks for what is not computed here is a ValueError with the file and the
    culprit."""
    file = write_json(tmp_path / "config.json", FAMILIES["llama3.1"] | changes)
    with pytest.raises(ValueError, match=culprit) as error:
        load_pretrained(tmp_path)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("text", [None, "", '{"model_type": "llama", ', "\x00\xff", "[1, 2]"])
def test_unreadable_config_is_named(text, tmp_path):
    """A config.json that is absent, empty, cut off,
    binary or no object is a ValueError that names it."""
    file = tmp_path / "config.json"
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as error:
        ModelConfig.from_pretrained(tmp_path)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    "changes, culprit",
    [
        ({"vocab_size": "131"}, "vocab_size must be a whole number"),
        ({"hidden_size": 32.5}, "hidden_size must be a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 2,000"),
        ({"num_attention_heads": 0}, "num_attention_heads must be"),
        ({"num_attention_heads": True}, "num_attention_heads must be"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rms_norm_eps": None, "rope_theta": "5e5"}, "rope_theta must be a number above 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"),
        ({"rope_scaling": ["llama3"]}, "rope_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "rope_type"),
        ({"layer_types": [[]]}, "config.json: its content"),
        ({"quantization_config": 4}, "config.json: its content"),
    ],
)
def test_a_config_of_the_wrong_kind_is_named(changes, culprit, tmp_path):
    """A field of the wrong type or size is one message with file and field,
    before memory is asked for."""
    path = write_checkpoint(tmp_path)
    config = json.loads((path / "config.json").read_text())
    config.pop("rope_parameters")
    write_json(path / "config.json", config | changes)
    with pytest.raises(ValueError, match=culprit):
        read_config(path)
