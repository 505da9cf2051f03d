"""LoRA against its formula, against PEFT in both directions, and strict about its files."""

import json
import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    change_tensors,
    max_diff,
    tiny_model,
    transformers_model,
    write_checkpoint,
    write_json,
)
from families import randomize_adapter
from safetensors.torch import load_file
from torch import nn

import lora
from data import build_tree
from kernels.lora import adapted_projections, adapted_projections_reference
from lora import apply_lora, load_adapter, lora_layers, merge_lora, save_adapter
from model import Transformer, load_pretrained, save_pretrained

INPUT_IDS = torch.arange(3, 17).view(2, 7)
TREE = build_tree([[5, 6, 7, 9], [8, 4]], [[[8, 9, 2], [2]], [[7, 7, 2], [11, 2]]])
FP32, ALL_SEVEN = {torch.float32}, list(lora.TARGET_MODULES)


def adapted(path=None, family: str = "llama3.1", dtype=torch.float32, **kwargs):
    """A tiny model, loaded from `path` if there is one, with an adapter that changes something."""
    model = load_pretrained(path, dtype) if path else tiny_model(family)
    return randomize_adapter(apply_lora(model, **{"r": 4, "lora_alpha": 8} | kwargs))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Logits of fixed ids in evaluation mode; ours or transformers'."""
    ours = isinstance(model.eval(), Transformer)
    return model.logits(INPUT_IDS) if ours else model(INPUT_IDS).logits


# ------------------------------------------------------------------------ the formula
def test_lora_is_identity_at_init():
    """A fresh adapter changes nothing, bit for bit, even in training mode with dropout."""
    model = tiny_model()
    before = model(TREE)[0]
    apply_lora(model, r=4, lora_alpha=8, lora_dropout=0.5)
    for each in (model.eval(), model.train()):
        assert torch.equal(each(TREE)[0], before)


@pytest.mark.parametrize("use_rslora, scaling", [(False, 16 / 4), (True, 16 / 2)])
def test_adapted_layer_computes_its_formula(use_rslora, scaling):
    """alpha / r, or alpha / sqrt(r) for rsLoRA; dropout acts before A alone, and in training."""
    options = {"r": 4, "lora_alpha": 16, "use_rslora": use_rslora, "lora_dropout": 0.5}
    layer = adapted(family="qwen2.5", **options).model.layers[1].self_attn.q_proj
    x, A, B = torch.randn(64, 32), layer.lora_A.weight, layer.lora_B.weight
    assert A.shape == (4, 32) and B.shape == (32, 4)
    torch.manual_seed(7)
    actual = layer.train()(x)
    torch.manual_seed(7)
    for y, seen in ((actual, F.dropout(x, 0.5)), (layer.eval()(x), x)):
        expected = F.linear(x, layer.weight, layer.bias) + scaling * seen @ A.T @ B.T
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama3.1", "llama3.2", "qwen2.5", "qwen3"])
def test_only_adapter_parameters_are_trained(family):
    """All else is frozen; the training loss reaches every A and B."""
    model = adapted(family=family)
    model(TREE)[0].sum().backward()
    assert len(lora_layers(model)) == 2 * len(ALL_SEVEN)
    for name, p in model.named_parameters():
        trained = ".lora_" in name
        assert p.requires_grad == (p.grad is not None and bool(p.grad.any())) == trained, name


def test_every_construction_draws_the_same_a():
    """A depends on the seed and the layer's name alone; B is zero."""

    def drawn(seed: int, model_seed: int = 0, **targets) -> dict:
        model = apply_lora(tiny_model(seed=model_seed), 4, 8, seed=seed, **targets)
        assert not any(layer.lora_B.weight.any() for layer in lora_layers(model).values())
        return {name: layer.lora_A.weight for name, layer in lora_layers(model).items()}

    first, again, other = drawn(5), drawn(5, model_seed=1), drawn(6)
    partial = drawn(5, target_modules=["v_proj"])
    for name, A in first.items():
        assert torch.equal(A, again[name]) and not torch.equal(A, other[name])
        assert torch.equal(A, partial.get(name, A))
        assert 0.5 < A.abs().max() * math.sqrt(A.shape[1]) <= 1
    assert len({tuple(A[0, :32].tolist()) for A in first.values()}) == len(first)


def test_adapter_stays_fp32_over_a_bf16_base(tmp_path):
    """The layer's output keeps the base's dtype."""
    half = adapted(write_checkpoint(tmp_path), dtype=torch.bfloat16)
    layer = half.model.layers[0].mlp.gate_proj
    assert {layer.lora_A.weight.dtype, layer.lora_B.weight.dtype} == FP32
    assert layer(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert max_diff(logits(half), logits(adapted(tmp_path))) < 0.3  # the same model


def test_target_modules_choose_the_layers():
    """Names, "all-linear" or a regular expression over paths, never the head."""
    chosen = {"all-linear": 14, r".*layers\.1\.mlp\..*": 3, r".*\.(q|o)_proj": 4}
    for targets, count in (*chosen.items(), (["q_proj", "v_proj"], 4)):
        model = apply_lora(tiny_model(), 4, 8, target_modules=targets)
        assert len(lora_layers(model)) == count and not isinstance(model.lm_head, lora.LoRALinear)
    for targets in (["q_proj", "w_q"], "w_q", ["lm_head"], []):
        model = tiny_model()
        with pytest.raises(ValueError, match=re.escape(str(targets))):
            apply_lora(model, 4, 8, target_modules=targets)
        assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_adapters_are_not_stacked_nor_empty():
    refused = {
        "rank": lambda: apply_lora(tiny_model(), 0, 8),
        "already": lambda: apply_lora(adapted(), 4, 8),
        "no LoRA adapter": lambda: merge_lora(tiny_model()),
        "apply_lora": lambda: save_adapter(tiny_model(), "unused"),
        "merge_lora": lambda: save_pretrained(adapted(), "unused"),
    }
    for culprit, call in refused.items():
        with pytest.raises(ValueError, match=culprit):
            call()


@pytest.mark.parametrize("family", ["llama3.1", "llama3.2", "qwen2.5", "qwen3"])
def test_merging_keeps_the_logits_here_and_in_transformers(family, tmp_path):
    """W += scaling B A is the same function in plain linear layers, ready for another adapter."""
    model = adapted(family=family)
    before = logits(model)
    assert max_diff(before, logits(tiny_model(family))) > 0.1
    save_pretrained(merge_lora(model), tmp_path)
    assert max_diff(logits(model), before) < 1e-5
    assert model.state_dict().keys() == tiny_model(family).state_dict().keys()
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    assert max_diff(logits(apply_lora(model, 2, 4)), before) < 1e-5
    auto = pytest.importorskip("transformers").AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path, dtype=torch.float32)
    assert max_diff(logits(theirs), before) < 1e-5


# ------------------------------------------------------------------------ one function per group
def group(adapters=(1, 1, 1), dtype=torch.float32, bias=True, x_grad=True):
    """x (2, 5, in), and weights, biases, As, Bs of projections, those with a 0 without adapter."""
    x, widths = torch.randn(2, 5, 32, dtype=dtype, requires_grad=x_grad), (48, 16, 16)
    weights = [torch.randn(out, 32).mul(32**-0.5).to(dtype) for out in widths]
    biases = [torch.randn(out).to(dtype) if bias else None for out in widths]
    As = [torch.randn(4, 32).mul(32**-0.5).requires_grad_() if has else None for has in adapters]
    Bs = [torch.randn(o, 4).requires_grad_() if has else None for o, has in zip(widths, adapters)]
    return x, weights, biases, As, Bs


def outputs_and_gradients(function, x, weights, biases, As, Bs, **kwargs):
    """Outputs, and gradients of x, As and Bs where there are any, under fixed upstream ones."""
    torch.manual_seed(3)  # of dropout
    inputs = [t for t in (x, *As, *Bs) if t is not None and t.requires_grad]
    outputs = function(x, weights, biases, As, Bs, 2.0, **kwargs)
    reached = [y for y, A in zip(outputs, As) if x.requires_grad or A is not None]
    upstream = [torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype) for y in reached]
    return [*outputs, *torch.autograd.grad(reached, inputs, upstream)]


@pytest.mark.parametrize("dropout, bias", [(0.0, True), (0.4, False)])
@pytest.mark.parametrize("x_grad", [True, False], ids=["x", "no x"])
@pytest.mark.parametrize("adapters", [(1, 1, 1), (1, 0, 1), (0, 0, 1)], ids=str)
def test_group_equals_the_naive_form(bias, adapters, x_grad, dropout):
    """Outputs and all gradients, with the same dropout mask, too."""
    ways = adapted_projections, adapted_projections_reference
    arguments = group(adapters, bias=bias, x_grad=x_grad)
    results = [outputs_and_gradients(way, *arguments, dropout=dropout) for way in ways]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_base_errs_no_more_than_the_naive_form(dtype):
    """Outputs and gradients against float64; adapters get fp32."""
    x, weights, biases, As, Bs = group(dtype=dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, *As, *Bs)]
    frozen = [[t.double() for t in ts] for ts in (weights, biases)]
    ways = adapted_projections_reference, adapted_projections
    exact = outputs_and_gradients(ways[0], wide[0], *frozen, wide[1:4], wide[4:])
    plain, actual = (outputs_and_gradients(way, x, weights, biases, As, Bs) for way in ways)
    for a, n, e in zip(actual, plain, exact, strict=True):
        assert a.dtype == n.dtype and max_diff(a, e) <= 2 * max_diff(n, e) + 1e-6
    assert {g.dtype for g in actual[4:]} == FP32


def scores_and_gradients(model) -> tuple:
    token_logps, _ = model(TREE)
    token_logps.sum().backward()
    return token_logps, [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("setting", ["plain", "checkpointing", "compiled", "a trained weight"])
def test_model_gradients_equal_those_of_the_naive_form(setting):
    model, naive = adapted().train(), adapted().train()
    for each in (model, naive) if setting == "a trained weight" else ():
        each.model.layers[0].mlp.gate_proj.weight.requires_grad_()
    block = model.model.layers[1]
    block.checkpointing = setting == "checkpointing"
    if setting == "compiled":
        block.compiled = torch.compile(block.compute, backend="aot_eager", fullgraph=True)
    actual = scores_and_gradients(model)
    for layer in lora_layers(naive).values():
        layer.projections = adapted_projections_reference
    torch.testing.assert_close(actual, scores_and_gradients(naive), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------ our files
def test_an_adapter_knows_its_base(tmp_path):
    """One other value is refused, a copy is welcome, merged weights are another base."""
    model = adapted(write_checkpoint(tmp_path / "base"))
    save_adapter(model, tmp_path / "adapter")
    write_checkpoint(tmp_path / "copy", shard_bytes=20_000)
    load_adapter(load_pretrained(tmp_path / "copy"), tmp_path / "adapter")
    file = write_checkpoint(tmp_path / "other") / "model.safetensors"
    change_tensors(file, lambda t: t["model.layers.1.mlp.up_proj.weight"][40, 3].add_(1e-3))
    other = load_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"another base, {tmp_path / 'base'}, .*/other"):
        load_adapter(other, tmp_path / "adapter")
    assert not lora_layers(other)  # a refusal leaves the model alone
    save_adapter(apply_lora(merge_lora(model), 4, 8), tmp_path / "next")
    with pytest.raises(ValueError, match=r"adapter_config\.json.*give the base as --model"):
        lora.base_of(tmp_path / "next")


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
EMBEDDING, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head"


def put(name: str, *shape: int, value: float = 1.0):
    return lambda tensors: tensors.update({name: torch.full(shape, value)})


TENSORS = [
    (lambda t: t.pop(f"{LAYER}.lora_B.weight"), r"q_proj\.lora_B.*found: None"),
    (put(f"{LAYER}.lora_magnitude_vector", 32), "lora_magnitude_vector.*needed: None.*DoRA"),
    (put(f"{LAYER}.lora_A.weight", 3, 32), r"\(3, 32\).*\(4, 32\)"),
    (put(f"{LAYER}.lora_A.weight", 0), r"found: \(0,\)"),  # ZeRO-3
    (put(f"{LAYER}.lora_A.weight", 4, 32, value=torch.nan), "q_proj.*NaN"),
    (put(f"{LAYER}.lora_A.weight", 4, 32, value=torch.inf), "q_proj.*infinity"),
    (put(EMBEDDING, 131, 32), "embed_tokens.*were trained"),
    (lambda t: [t.update({f"module.{n}": t.pop(n)}) for n in list(t)], "56 tensors.*DDP"),
    (put(f"{HEAD}.lora_A.weight", 4, 32), "lm_head"),
    (put(f"{LAYER}.lora_A.default.weight", 4, 32), r"lora_A\.default"),
]


@pytest.mark.parametrize("tensors, culprit", TENSORS)
def test_tensors_that_are_not_plain_lora_are_refused(tensors, culprit, tmp_path):
    save_adapter(adapted(), tmp_path)
    change_tensors(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: .*{culprit}"):
        load_adapter(tiny_model(), tmp_path)


SETTINGS = {
    "peft_type": ("IA3", None), "bias": ("lora_only",),
    "init_lora_weights": ("pissa",),  # it changes the base
    "r": ("8", 0, True), "lora_alpha": ("16", float("inf")), "lora_dropout": (1.5,),
    "target_modules": ({"q_proj": 1}, [1], "(q_proj", ["wte"]), "modules_to_save": (["lm_head"],),
    "use_dora": (True,), "rank_pattern": ({"q_proj": 8},), "a_setting_of_tomorrow": (1,),
}  # fmt: skip


def test_settings_that_are_not_computed_are_refused_by_name(tmp_path):
    save_adapter(apply_lora(tiny_model(), 4, 8), tmp_path)
    sound = json.loads((tmp_path / "adapter_config.json").read_text())
    for key, value in ((key, value) for key, values in SETTINGS.items() for value in values):
        write_json(tmp_path / "adapter_config.json", sound | {key: value})
        with pytest.raises(ValueError, match=rf"{key} .*{re.escape(str(value).strip('[]'))}"):
            load_adapter(tiny_model(), tmp_path)


# ------------------------------------------------------------------------ PEFT
SAVED = [  # target_modules, rsLoRA
    (ALL_SEVEN, False), (["q_proj", "v_proj"], True),
    (r"model\.layers\.1\.mlp\.(up|down)_proj", False), ("all-linear", True),
]  # fmt: skip


@pytest.mark.parametrize("targets, use_rslora", SAVED)
@pytest.mark.parametrize("family", ["llama3.1", "qwen2.5", "qwen3"])
def test_saved_adapters_load_here_and_in_peft(family, targets, use_rslora, tmp_path):
    """Bitwise the same here; the same logits in PEFT, which finds its keys and no other."""
    library = pytest.importorskip("peft")
    base, path = transformers_model(family, tmp_path / "base"), tmp_path / "adapter"
    ours = adapted(tmp_path / "base", target_modules=targets, use_rslora=use_rslora)
    save_adapter(ours, path)
    assert max_diff(logits(ours), logits(load_pretrained(tmp_path / "base"))) > 0.1
    loaded = load_adapter(load_pretrained(tmp_path / "base"), path)
    assert torch.equal(logits(loaded), logits(ours))
    assert loaded.lora_config == ours.lora_config
    assert all(p.requires_grad == (".lora_" in name) for name, p in loaded.named_parameters())
    with warnings.catch_warnings():
        # PEFT only warns of keys that it misses or does not know
        warnings.filterwarnings("error", message=".*(adapter keys|unexpected keyword)")
        theirs = library.PeftModel.from_pretrained(base, path)
    assert max_diff(logits(ours), logits(theirs)) < 1e-5
    written = json.loads((path / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["inference_mode"]) == (4, 8, True)
    assert written["base_model_name_or_path"] == str(tmp_path / "base")
    assert {t.dtype for t in load_file(path / "adapter_model.safetensors").values()} == FP32


THEIRS = [
    {"target_modules": ALL_SEVEN, "use_rslora": True, "lora_dropout": 0.1},
    {"r": 3, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    {"target_modules": None},  # r = 8, alpha = 8, q_proj and v_proj
    {"r": 4, "target_modules": "all-linear"},
    {"r": 4, "target_modules": r".*self_attn\.(q|o)_proj"},
    {"r": 4, "target_modules": ["self_attn.q_proj", "layers.1.mlp.up_proj"]},  # ends of paths
]


@pytest.mark.parametrize("settings", THEIRS, ids=str)
def test_adapters_of_peft_load_here(settings, tmp_path):
    library = pytest.importorskip("peft")
    base = transformers_model("qwen2.5", tmp_path / "base")
    config = library.LoraConfig(task_type="CAUSAL_LM", **settings)
    theirs = randomize_adapter(library.get_peft_model(base, config))
    theirs.save_pretrained(tmp_path / "adapter")
    plain = load_pretrained(tmp_path / "base")
    before = logits(plain)
    ours = load_adapter(plain, tmp_path / "adapter")
    assert max_diff(logits(ours), before) > 0.1
    assert max_diff(logits(ours), logits(theirs)) < 1e-5
