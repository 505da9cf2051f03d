"""Adapters from the field: what PEFT loads loads here, and the rest is refused by its cause."""

import json

import pytest
import torch
from conftest import max_diff, tiny_model, write_checkpoint
from safetensors.torch import load_file, save_file

from hub.adapter import PEFT_PREFIX, base_of
from hub.files import note_once
from lora import apply_lora, load_adapter, merge_lora, save_adapter
from model import load_pretrained

INPUT_IDS = torch.arange(3, 17).view(2, 7)


@pytest.fixture(autouse=True)
def forget_notes():
    note_once.cache_clear()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def saved(base, tmp_path):
    """An adapter on q and v that does something, and its model."""
    model = apply_lora(load_pretrained(base), 4, 8, target_modules=["q_proj", "v_proj"])
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    save_adapter(model, tmp_path)
    return tmp_path, model.logits(INPUT_IDS)


def change(path, tensors=None, **settings) -> None:
    """Rewrite an adapter with its tensors changed in place and other settings."""
    file = path / "adapter_model.safetensors"
    held = load_file(file)
    if tensors:
        tensors(held)
    save_file(held, file, metadata={"format": "pt"})
    config = json.loads((path / "adapter_config.json").read_text()) | settings
    (path / "adapter_config.json").write_text(json.dumps(config))


def rename(rule):
    def all_keys(tensors):
        for name in list(tensors):
            tensors[rule(name)] = tensors.pop(name)

    return all_keys


def test_targets_that_match_nothing_are_ignored_beside_those_that_match(base, saved):
    """As in PEFT, when an adapter is read; a new adapter is refused such a target."""
    path, logits = saved
    change(path, target_modules=["q_proj", "wte", "v_proj", "fc_in"])
    assert torch.equal(load_adapter(load_pretrained(base), path).logits(INPUT_IDS), logits)
    with pytest.raises(ValueError, match="wte.*match no linear layer"):
        apply_lora(load_pretrained(base), 4, 8, target_modules=["q_proj", "wte"])


def test_keys_with_the_adapters_default_name_are_read(base, saved):
    """`lora_A.default.weight`, as a PEFT model has it in memory."""
    path, logits = saved
    change(path, rename(lambda name: name.replace(".weight", ".default.weight")))
    assert torch.equal(load_adapter(load_pretrained(base), path).logits(INPUT_IDS), logits)


@pytest.mark.parametrize(
    "rule, cause",
    [
        (lambda name: f"_orig_mod.{name}", "torch.compile"),
        (lambda name: name.replace("model.layers", "_orig_mod.model.layers"), "torch.compile"),
        (lambda name: f"module.{name}", "DistributedDataParallel"),
        (lambda name: PEFT_PREFIX + name, "PEFT on PEFT"),
        (lambda name: name.replace(".weight", ".mine.weight"), "adapter's name inside the keys"),
        (lambda name: name.removeprefix(PEFT_PREFIX), "PEFT's keys begin with 'base_model.model.'"),
    ],
)
def test_foreign_keys_are_refused_by_their_cause(rule, cause, base, saved):
    """The message says what put them there, not only that they do not match."""
    path, _ = saved
    change(path, rename(rule))
    with pytest.raises(ValueError, match=cause):
        load_adapter(load_pretrained(base), path)


@pytest.mark.parametrize(
    "key, cause",
    [
        ("lm_head.lora_A.weight", "adapter of lm_head"),
        ("model.embed_tokens.lora_embedding_A", "adapter of embeddings"),
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        ("model.layers.0.self_attn.q_proj.lora_B.bias", "bias of its own"),
    ],
)
def test_parts_that_are_not_supported_are_refused_by_name(key, cause, base, saved):
    """Adapters of the head and of embeddings, DoRA and biases, wherever else they are announced."""
    path, _ = saved
    change(path, lambda t: t.update({PEFT_PREFIX + key: torch.zeros(4, 32)}))
    with pytest.raises(ValueError, match=f"{cause}.*not supported"):
        load_adapter(load_pretrained(base), path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_memory", [False, True])
def test_saved_embeddings_that_equal_the_bases_are_ignored(dtype, in_memory, base, saved):
    """PEFT saves them beside; in a shorter type they are compared in that type."""
    path, logits = saved
    weights = {
        PEFT_PREFIX + name: load_pretrained(base).state_dict()[name].to(dtype)
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    change(path, lambda t: t.update(weights))
    model = tiny_model() if in_memory else load_pretrained(base)
    assert torch.equal(load_adapter(model, path).logits(INPUT_IDS), logits)


@pytest.mark.parametrize("rows", [131, 140])
def test_saved_embeddings_of_their_own_are_refused(rows, base, saved):
    """Trained or resized embeddings would be lost silently."""
    path, _ = saved
    name = f"{PEFT_PREFIX}model.embed_tokens.weight"
    change(path, lambda t: t.update({name: torch.ones(rows, 32)}))
    with pytest.raises(ValueError, match="embed_tokens.weight.*trained or resized"):
        load_adapter(load_pretrained(base), path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(value, base, saved):
    """By tensor and count, when it is read: not as a loss of NaN later."""
    path, _ = saved
    name = f"{PEFT_PREFIX}model.layers.1.self_attn.v_proj.lora_A.weight"
    change(path, lambda t: t[name].view(-1)[5:7].fill_(value))
    with pytest.raises(ValueError, match=rf"NaN or infinity: 2 of 128 values of {name}"):
        load_adapter(load_pretrained(base), path)


def test_a_dead_adapter_is_said(base, saved, capsys):
    """All lora_B zero: it loads, adds nothing, and a note says so;
    one live B is enough for silence."""
    path, _ = saved
    Bs = [name for name in load_file(path / "adapter_model.safetensors") if "lora_B" in name]
    change(path, lambda t: [t[name].zero_() for name in Bs[1:]])
    load_adapter(load_pretrained(base), path)
    assert "note" not in capsys.readouterr().out
    change(path, lambda t: t[Bs[0]].zero_())
    model = load_adapter(load_pretrained(base), path)
    assert "every lora_B is zero" in capsys.readouterr().out
    assert torch.equal(model.logits(INPUT_IDS), load_pretrained(base).logits(INPUT_IDS))


def test_empty_tensors_are_refused_by_their_cause(base, saved):
    """What ZeRO-3 leaves when nobody gathered the weights."""
    path, _ = saved
    change(path, lambda t: t.update({name: torch.zeros(0) for name in t}))
    with pytest.raises(ValueError, match="ZeRO-3"):
        load_adapter(load_pretrained(base), path)


@pytest.mark.parametrize("name", [None, "", 5, ["x"]])
def test_an_adapter_without_a_base_asks_for_one(name, saved):
    """base_model_name_or_path null, empty or of another kind: give --model."""
    path, _ = saved
    change(path, base_model_name_or_path=name)
    with pytest.raises(ValueError, match=r"adapter_config\.json.*give the base as --model"):
        base_of(path)
    config = json.loads((path / "adapter_config.json").read_text())
    del config["base_model_name_or_path"]
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="give the base as --model"):
        base_of(path)


@pytest.mark.parametrize(
    "settings, culprit",
    [
        ({"r": "8"}, r"expected r \(a whole number"),
        ({"r": 0}, r"expected r \("),
        ({"lora_alpha": "16"}, r"expected lora_alpha \("),
        ({"lora_dropout": 1.5}, r"expected lora_dropout \("),
        ({"target_modules": {"q_proj": 1}}, r"expected target_modules \("),
        ({"target_modules": [1]}, r"expected target_modules \("),
        ({"target_modules": "(q_proj"}, "target_modules"),
        ({"use_rslora": "yes"}, r"expected use_rslora \("),
    ],
)
def test_settings_of_the_wrong_kind_are_named(settings, culprit, base, saved):
    """One message with the field, never a TypeError."""
    path, _ = saved
    change(path, **settings)
    with pytest.raises(ValueError, match=culprit):
        load_adapter(load_pretrained(base), path)


def test_rslora_warns_of_llama_cpp(base, tmp_path, capsys):
    """llama.cpp scales by alpha / r whatever the adapter says; a merged model is safe from that."""
    save_adapter(apply_lora(load_pretrained(base), 4, 8, use_rslora=True), tmp_path)
    assert "llama.cpp ignores it" in capsys.readouterr().out
    model = merge_lora(load_adapter(load_pretrained(base), tmp_path))
    assert max_diff(model.logits(INPUT_IDS), load_pretrained(base).logits(INPUT_IDS)) < 1e-6
