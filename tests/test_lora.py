"""LoRA against its formula, against PEFT in both directions, and strict about its files."""

import json
import math
import re
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    change_tensors,
    max_diff,
    tiny_config,
    tiny_model,
    transformers_model,
    write_checkpoint,
    write_json,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from data import build_tree
from kernels.lora import adapted_projections, adapted_projections_reference
from lora import (
    PEFT_PREFIX,
    TARGET_MODULES,
    LoRALinear,
    apply_lora,
    base_of,
    load_adapter,
    lora_layers,
    merge_lora,
    save_adapter,
)
from model import Transformer, load_pretrained, save_pretrained

INPUT_IDS = torch.arange(3, 17).view(2, 7)
TREE = build_tree([[5, 6, 7, 9], [8, 4]], [[[8, 9, 2], [2]], [[7, 7, 2], [11, 2]]])


def randomize_adapter(model, seed: int = 1):
    """Give every lora_B (zero at first) random values, here or in PEFT's model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def adapted(path=None, family: str = "llama3.1", **kwargs):
    """A tiny model, loaded from `path` if there is one, with an adapter that changes something."""
    model = load_pretrained(path) if path else tiny_model(family)
    return randomize_adapter(apply_lora(model, **{"r": 4, "lora_alpha": 8} | kwargs))


def logits(model) -> torch.Tensor:
    """Logits of fixed ids in evaluation mode; ours or transformers'."""
    ours = isinstance(model.eval(), Transformer)
    with torch.no_grad():
        return model.logits(INPUT_IDS) if ours else model(INPUT_IDS).logits


# ------------------------------------------------------------------------ the formula
def test_lora_is_identity_at_init():
    """A fresh adapter changes nothing, bit for bit, even in training mode with dropout."""
    model = tiny_model()
    before, scores = logits(model), model(TREE)[0]
    apply_lora(model, r=4, lora_alpha=8, lora_dropout=0.5)
    assert torch.equal(logits(model), before)
    assert torch.equal(model.train()(TREE)[0], scores)
    assert len(lora_layers(model)) == 2 * 7


@pytest.mark.parametrize("use_rslora, scaling", [(False, 16 / 4), (True, 16 / 2)])
@pytest.mark.parametrize("family", ["llama3.1", "qwen2.5"])
def test_adapted_layer_computes_its_formula(use_rslora, scaling, family):
    """y = W x + b + scaling B A x, with scaling alpha / r, or alpha / sqrt(r) for rsLoRA."""
    model = adapted(family=family, r=4, lora_alpha=16, use_rslora=use_rslora)
    layer, x = model.model.layers[1].self_attn.q_proj, torch.randn(3, 5, 32)
    A, B = layer.lora_A.weight, layer.lora_B.weight
    assert A.shape == (4, 32) and B.shape == (32, 4)
    assert (layer.bias is not None) == (family == "qwen2.5")
    expected = F.linear(x, layer.weight + scaling * B @ A, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_dropout_touches_only_the_adapter_input():
    """In training mode dropout acts before A and nowhere else; in evaluation mode it is off."""
    layer, x = adapted(lora_dropout=0.5).model.layers[0].mlp.up_proj, torch.randn(64, 32)
    torch.manual_seed(7)
    actual = layer.train()(x)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5)
    for y, seen in ((actual, dropped), (layer.eval()(x), x)):
        low_rank = seen @ layer.lora_A.weight.T @ layer.lora_B.weight.T
        expected = x @ layer.weight.T + layer.scaling * low_rank
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x), layer(x)) and not torch.equal(layer.train()(x), layer(x))


@pytest.mark.parametrize("family", ["llama3.1", "llama3.2", "qwen2.5", "qwen3"])
def test_only_adapter_parameters_are_trained(family):
    """All else is frozen; the training loss reaches every A and B."""
    model = adapted(family=family)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(trainable) == 2 * 2 * 7
    model(TREE)[0].sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.any()) == (name in trainable), name


def test_parameter_count_of_llama_8b():
    """r = 8 on the seven linear layers of Llama-3.1-8B trains 20,971,520 parameters."""
    config = tiny_config("llama3.1")
    config.hidden_size, config.intermediate_size, config.vocab_size = 4096, 14336, 128256
    config.num_hidden_layers, config.num_attention_heads = 32, 32
    config.num_key_value_heads, config.head_dim = 8, 128
    with torch.device("meta"):
        model = apply_lora(Transformer(config), r=8, lora_alpha=32)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 20_971_520


def test_every_construction_draws_the_same_a():
    """A depends on the seed and the layer's name alone, not on the random state or the model."""

    def drawn(seed: int, model_seed: int = 0, **targets) -> dict:
        model = apply_lora(tiny_model(seed=model_seed), 4, 8, seed=seed, **targets)
        assert not any(layer.lora_B.weight.any() for layer in lora_layers(model).values())
        return {name: layer.lora_A.weight for name, layer in lora_layers(model).items()}

    first = drawn(5)
    torch.rand(100)
    again, other = drawn(5, model_seed=1), drawn(6)
    partial = drawn(5, target_modules=["v_proj"])
    for name, A in first.items():
        assert torch.equal(A, again[name]) and not torch.equal(A, other[name])
        assert torch.equal(A, partial.get(name, A))
        assert 0.5 < A.abs().max() * math.sqrt(A.shape[1]) <= 1
    same_shape = [A for A in first.values() if A.shape[1] == 32]
    assert len({tuple(A.flatten().tolist()) for A in same_shape}) == len(same_shape)


def test_adapter_stays_fp32_over_a_bf16_base(tmp_path):
    """A and B are kept and saved in fp32; the layer's output keeps the base's dtype."""
    model = adapted(write_checkpoint(tmp_path / "base"))
    half = apply_lora(load_pretrained(tmp_path / "base", dtype=torch.bfloat16), 4, 8)
    layer = half.model.layers[0].mlp.gate_proj
    assert layer.weight.dtype == torch.bfloat16
    assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == torch.float32
    assert layer(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    save_adapter(half, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32}
    # bf16, but the same model
    assert max_diff(logits(randomize_adapter(half)), logits(model)) < 0.3


TARGETS = [
    (["q_proj", "v_proj"], 4), ("all-linear", 14), (r".*layers\.1\.mlp\..*", 3),
    (r".*\.(q|o)_proj", 4),
]  # fmt: skip


@pytest.mark.parametrize("targets, count", TARGETS)
def test_target_modules_choose_the_layers(targets, count):
    """Names, "all-linear" or a regular expression over paths; the head is never adapted."""
    model = apply_lora(tiny_model(), 4, 8, target_modules=targets)
    assert len(lora_layers(model)) == count
    assert not isinstance(model.lm_head, LoRALinear)


@pytest.mark.parametrize("targets", [["q_proj", "w_q"], "w_q", ["lm_head"], ["q_proj", "wte"], []])
def test_targets_that_match_nothing_are_refused(targets):
    """The error names them, and no layer is adapted."""
    model = tiny_model()
    with pytest.raises(ValueError, match=re.escape(str(targets))):
        apply_lora(model, 4, 8, target_modules=targets)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_adapters_are_not_stacked_nor_empty():
    """Rank 0, an adapter on an adapter, and saving or merging none are ValueErrors."""
    refused = [
        (lambda: apply_lora(tiny_model(), 0, 8), "rank"),
        (lambda: apply_lora(adapted(), 4, 8), "already"),
        (lambda: merge_lora(tiny_model()), "no LoRA adapter"),
        (lambda: save_adapter(tiny_model(), "unused"), "apply_lora"),
        (lambda: save_pretrained(adapted(), "unused"), "merge_lora"),
    ]
    for call, culprit in refused:
        with pytest.raises(ValueError, match=culprit):
            call()


@pytest.mark.parametrize("family", ["llama3.1", "llama3.2", "qwen2.5", "qwen3"])
def test_merging_keeps_the_logits_here_and_in_transformers(family, tmp_path):
    """W += scaling B A is the same function in plain linear layers, ready for another adapter."""
    model = adapted(family=family)
    before, base = logits(model), logits(tiny_model(family))
    assert max_diff(before, base) > 0.1
    save_pretrained(merge_lora(model), tmp_path)
    assert max_diff(logits(model), before) < 1e-5
    assert not lora_layers(model)
    assert model.state_dict().keys() == tiny_model(family).state_dict().keys()
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    assert max_diff(logits(apply_lora(model, 2, 4)), before) < 1e-5
    assert max_diff(logits(load_pretrained(tmp_path)), before) < 1e-5
    auto = pytest.importorskip("transformers").AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path, dtype=torch.float32)
    assert max_diff(logits(theirs), before) < 1e-5


# ------------------------------------------------------------------------ one function per group
def group(adapters=(1, 1, 1), dtype=torch.float32, bias=True, scale=1, x_grad=True):
    """x (2, 5, in), and weights, biases, As, Bs of projections, those with a 0 without adapter."""
    width, widths = 32 * scale, [48 * scale, 16 * scale, 16 * scale]
    x = torch.randn(2, 5, width, dtype=dtype, requires_grad=x_grad)
    weights = [torch.randn(out, width).mul(width**-0.5).to(dtype) for out in widths]
    biases = [torch.randn(out).to(dtype) if bias else None for out in widths]
    As = [torch.randn(4, width).mul(width**-0.5).requires_grad_() for _ in widths]
    Bs = [torch.randn(out, 4).requires_grad_() for out in widths]
    As, Bs = ([t if has else None for t, has in zip(ts, adapters, strict=True)] for ts in (As, Bs))
    return x, weights, biases, As, Bs


def outputs_and_gradients(function, x, weights, biases, As, Bs, **kwargs):
    """Outputs, and gradients of x, As and Bs where there are any, under fixed upstream ones."""
    inputs = [t for t in (x, *As, *Bs) if t is not None and t.requires_grad]
    outputs = function(x, weights, biases, As, Bs, 2.0, **kwargs)
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    reached = [i for i in range(len(outputs)) if x.requires_grad or As[i] is not None]
    chosen = [[ts[i] for i in reached] for ts in (outputs, upstream)]
    return [*outputs, *torch.autograd.grad(chosen[0], inputs, chosen[1])]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("x_grad", [True, False], ids=["x", "no x"])
@pytest.mark.parametrize("adapters", [(1, 1, 1), (1, 0, 1), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_group_equals_the_naive_form(bias, adapters, x_grad, dropout):
    """Outputs and all gradients are those of separate layers, with the same dropout mask, too."""
    arguments, results = group(adapters, bias=bias, x_grad=x_grad), []
    for function in (adapted_projections, adapted_projections_reference):
        torch.manual_seed(5)
        results.append(outputs_and_gradients(function, *arguments, dropout=dropout))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_base_errs_no_more_than_the_naive_form(dtype):
    """Outputs and gradients are as close to float64 as the naive form's; adapters get fp32."""
    x, weights, biases, As, Bs = group(dtype=dtype, scale=2)
    wide = [t.detach().double().requires_grad_() for t in (x, *As, *Bs)]
    frozen = [[t.double() for t in ts] for ts in (weights, biases)]
    naive = adapted_projections_reference
    exact = outputs_and_gradients(naive, wide[0], *frozen, wide[1:4], wide[4:])
    plain = outputs_and_gradients(naive, x, weights, biases, As, Bs)
    actual = outputs_and_gradients(adapted_projections, x, weights, biases, As, Bs)
    for a, n, e in zip(actual, plain, exact, strict=True):
        assert a.dtype == n.dtype
        assert max_diff(a, e) <= 2 * max_diff(n, e) + 1e-6
    assert all(g.dtype == torch.float32 for g in actual[4:])


def test_group_keeps_only_what_backward_needs():
    """x once, the low-rank product, A and B; no output, and no weight gradient is made."""
    x, weights, _, As, Bs = group()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = adapted_projections(x, weights, [None] * 3, As, Bs, 2.0)
    sizes = sorted(tuple(t.shape) for t in saved)
    weight_like = [(48, 32), (16, 32), (16, 32), (12, 32), (48, 4), (16, 4), (16, 4)]
    assert sizes == sorted([*weight_like, (10, 32), (10, 12)])
    assert all(y.requires_grad for y in outputs) and all(w.grad is None for w in weights)


def test_a_trained_weight_takes_the_naive_form():
    """Where a base weight is unfrozen beside its adapter, it gets its gradient."""
    layer = adapted().model.layers[0].mlp.gate_proj
    layer.weight.requires_grad_()
    layer(torch.randn(3, 32)).sum().backward()
    assert layer.weight.grad is not None and layer.lora_B.weight.grad is not None


def scores_and_gradients(model, tree) -> tuple:
    model.zero_grad()
    token_logps, _ = model(tree)
    token_logps.sum().backward()
    return token_logps.detach(), [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("setting", ["plain", "checkpointing", "compiled"])
def test_model_gradients_equal_those_of_the_naive_form(setting, monkeypatch):
    """Of a whole model, also with activation checkpointing and torch.compile."""
    model = adapted(lora_dropout=0.0)
    for block in model.model.layers:
        block.checkpointing = setting == "checkpointing"
        if setting == "compiled":
            block.compiled = torch.compile(block.compute, backend="aot_eager", fullgraph=True)
    actual = scores_and_gradients(model.train(), TREE)
    monkeypatch.setattr("lora.adapted_projections", adapted_projections_reference)
    expected = scores_and_gradients(adapted(lora_dropout=0.0).train(), TREE)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler on a CPU")
@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_blocks_follow_changing_lengths(checkpointing):
    """Inductor gives log-probs and gradients of eager blocks, at two batch sizes and lengths."""
    eager, compiled = adapted(lora_dropout=0.0).train(), adapted(lora_dropout=0.0).train()
    for block in compiled.model.layers:
        block.use_compiler()
        block.checkpointing = checkpointing
    for B, P in ((3, 7), (2, 12)):
        tree = build_tree([[5] * (P - i) for i in range(B)], [[[8, 9, 2], [2]]] * B)
        results = [scores_and_gradients(model, tree) for model in (eager, compiled)]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


# ------------------------------------------------------------------------ our files
RSLORA = pytest.mark.parametrize("use_rslora", [False, True])


@RSLORA
@pytest.mark.parametrize(
    "targets", [TARGET_MODULES, "all-linear", r"model\.layers\.1\.self_attn\.(q|v)_proj"]
)
def test_saved_adapter_loads_back(targets, use_rslora, tmp_path):
    """save_adapter, then load_adapter on a fresh base: bitwise the same logits, ready to train."""
    base = write_checkpoint(tmp_path / "base")
    model = adapted(base, target_modules=targets, use_rslora=use_rslora, lora_dropout=0.1)
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(load_pretrained(base), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lora_config == model.lora_config
    assert lora_layers(loaded).keys() == lora_layers(model).keys()
    assert all(p.requires_grad == (".lora_" in name) for name, p in loaded.named_parameters())
    silent = load_adapter(load_pretrained(base), tmp_path / "adapter", lora_dropout=0.0)
    assert {layer.dropout for layer in lora_layers(silent).values()} == {0.0}


def test_an_adapter_knows_its_base(tmp_path):
    """One other value is refused; a copy is welcome; merged weights are another base."""
    model = adapted(write_checkpoint(tmp_path / "base"))
    save_adapter(model, tmp_path / "adapter")
    write_checkpoint(tmp_path / "copy", shard_bytes=20_000)
    load_adapter(load_pretrained(tmp_path / "copy"), tmp_path / "adapter")
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    up = "model.layers.1.mlp.up_proj.weight"
    change_tensors(tmp_path / "other" / "model.safetensors", lambda t: t[up][40, 3].add_(1e-3))
    other = load_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"another base, {tmp_path / 'base'}, .*/other"):
        load_adapter(other, tmp_path / "adapter")
    assert not lora_layers(other)  # a refusal leaves the model alone
    save_adapter(apply_lora(merge_lora(model), 4, 8), tmp_path / "next")
    config = json.loads((tmp_path / "next" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] != str(tmp_path / "base")


LAYER = f"{PEFT_PREFIX}model.layers.0.self_attn.q_proj"
EMBEDDING, HEAD = f"{PEFT_PREFIX}model.embed_tokens.weight", f"{PEFT_PREFIX}lm_head"


def change(path, tensors=None, **settings) -> None:
    """Rewrite an adapter with its tensors changed in place and other settings."""
    if tensors:
        change_tensors(path / "adapter_model.safetensors", tensors)
    config = json.loads((path / "adapter_config.json").read_text())
    write_json(path / "adapter_config.json", config | settings)


def renamed(rule):
    return lambda tensors: [tensors.update({rule(n): tensors.pop(n)}) for n in list(tensors)]


def put(name: str, *shape: int):
    return lambda tensors: tensors.update({name: torch.ones(shape)})


def fill(value: float):
    return lambda tensors: tensors[f"{LAYER}.lora_A.weight"].view(-1)[5:7].fill_(value)


@pytest.mark.parametrize(
    "tensors, culprit",
    [
        (lambda t: t.pop(f"{LAYER}.lora_B.weight"), r"q_proj\.lora_B.*there: None"),
        (put(f"{LAYER}.lora_C.weight", 1), "lora_C.*needed: None"),
        (put(f"{LAYER}.lora_A.weight", 3, 32), r"\(3, 32\).*\(4, 32\)"),
        (lambda t: t.update({name: torch.zeros(0) for name in t}), r"there: \(0,\)"),  # ZeRO-3
        (fill(torch.nan), "q_proj.*NaN"),
        (fill(torch.inf), "q_proj.*infinity"),
        (put(EMBEDDING, 131, 32), "embed_tokens.*were trained"),
        (put(EMBEDDING, 140, 32), "embed_tokens.*were trained"),
        (renamed(lambda name: f"_orig_mod.{name}"), "_orig_mod.*torch.compile"),
        (renamed(lambda name: f"module.{name}"), "56 tensors.*DDP"),
        (renamed(lambda name: PEFT_PREFIX + name), "another PEFT"),
        (renamed(lambda name: name.removeprefix(PEFT_PREFIX)), "56 tensors"),
        (renamed(lambda name: name.replace(".weight", ".mine.weight")), r"\.mine\."),
        (put(f"{HEAD}.lora_A.weight", 4, 32), "lm_head"),
        (put(f"{LAYER}.lora_magnitude_vector", 32), "DoRA"),
        (put(f"{LAYER}.lora_A.default.weight", 4, 32), r"lora_A\.default"),
    ],
)
def test_tensors_that_are_not_plain_lora_are_refused(tensors, culprit, tmp_path):
    """Missing, additional, misnamed, misshapen, trained beside, not finite: by file and key."""
    save_adapter(adapted(), tmp_path)
    change(tmp_path, tensors)
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: .*{culprit}"):
        load_adapter(tiny_model(), tmp_path)


@pytest.mark.parametrize(
    "key, value",
    [
        *(("peft_type", value) for value in ("IA3", None)),
        *(("bias", value) for value in ("all", "lora_only")),
        *(("init_lora_weights", value) for value in ("pissa", "olora")),  # they change the base
        *(("r", value) for value in ("8", 0, True)),
        *(("lora_alpha", value) for value in ("16", float("inf"))),
        *(("target_modules", value) for value in ({"q_proj": 1}, [1], [], "(q_proj", ["wte"])),
        ("use_dora", True), ("rank_pattern", {"q_proj": 8}), ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", [0]), ("a_setting_of_tomorrow", 1), ("lora_dropout", 1.5),
        ("use_rslora", "yes"),
    ],
)  # fmt: skip
def test_settings_that_are_not_computed_are_refused_by_name(key, value, tmp_path):
    """What plain LoRA cannot express, and values of another kind: key and value."""
    save_adapter(adapted(), tmp_path)
    change(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=rf"{key} .*{re.escape(str(value).strip('[]'))}"):
        load_adapter(tiny_model(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # compared in the adapter's
def test_what_peft_reads_beside_an_adapter_is_read(dtype, tmp_path):
    """Targets that match nothing, keys with the adapter's name, embeddings that are the base's."""
    base, path = write_checkpoint(tmp_path / "base"), tmp_path / "adapter"
    model = adapted(base, target_modules=["q_proj", "v_proj"])
    save_adapter(model, path)
    change(path, renamed(lambda n: n.replace(".weight", ".default.weight")))
    own = {EMBEDDING: model.model.embed_tokens.weight, f"{HEAD}.weight": model.lm_head.weight}
    own = {name: p.detach().to(dtype) for name, p in own.items()}
    change(path, lambda t: t.update(own), target_modules=["q_proj", "wte", "v_proj", "lm_head"])
    for plain in (load_pretrained(base), tiny_model()):
        assert torch.equal(logits(load_adapter(plain, path)), logits(model))


def test_a_dead_adapter_is_said(tmp_path, capsys):
    """All lora_B zero: it loads, adds nothing, and a note says so; one live B is enough."""
    save_adapter(apply_lora(tiny_model(), 4, 8), tmp_path / "dead")
    model = load_adapter(tiny_model(), tmp_path / "dead")
    assert "every lora_B is zero" in capsys.readouterr().out
    assert torch.equal(logits(model), logits(tiny_model()))
    change(tmp_path / "dead", lambda t: t[f"{LAYER}.lora_B.weight"][0].fill_(1))
    load_adapter(tiny_model(), tmp_path / "dead")
    assert "note" not in capsys.readouterr().out


def test_unreadable_adapter_files_are_named(tmp_path):
    """Absent, cut off, pickled, no JSON, or without the name of a base that is asked for."""

    def refused(culprit: str, call=lambda path: load_adapter(tiny_model(), path)) -> None:
        with pytest.raises(ValueError, match=culprit):
            call(tmp_path)

    refused(r"adapter_config\.json")
    save_adapter(adapted(), tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    file.write_bytes(file.read_bytes()[:-100])
    refused(r"adapter_model\.safetensors")
    file.rename(tmp_path / "adapter_model.bin")
    refused(r"adapter_model\.safetensors")
    for name in (None, "", 5, ["x"]):
        write_json(config, {"peft_type": "LORA", "base_model_name_or_path": name})
        refused(r"adapter_config\.json.*give the base as --model", base_of)
    config.write_text('{"peft_type": "LO')
    refused(r"adapter_config\.json.*JSON")


def test_keys_and_config_are_those_of_peft(tmp_path):
    """The two files hold PEFT's names, fp32 tensors and what its older readers look for."""
    base = write_checkpoint(tmp_path / "base")
    save_adapter(adapted(base, target_modules=["q_proj"]), tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as f:
        assert f.metadata()["format"] == "pt"
        layers = [f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
        assert set(f.keys()) == {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    expected |= {"bias": "none", "use_rslora": False, "fan_in_fan_out": False}
    expected |= {"inference_mode": True, "modules_to_save": None}
    expected |= {"base_model_name_or_path": str(base), "target_modules": ["q_proj"]}
    assert expected.items() <= config.items()


# ------------------------------------------------------------------------ PEFT's files
@RSLORA
@pytest.mark.parametrize(
    "targets", [TARGET_MODULES, ["q_proj", "v_proj"], r"model\.layers\.1\.mlp\.(up|down)_proj"]
)
@pytest.mark.parametrize("family", ["llama3.1", "qwen2.5", "qwen3"])
def test_saved_adapter_loads_in_peft(family, targets, use_rslora, tmp_path):
    """The same logits in PEFT, which finds each of its keys and no other."""
    library = pytest.importorskip("peft")
    theirs = transformers_model(family, tmp_path / "base")
    ours = adapted(tmp_path / "base", target_modules=targets, use_rslora=use_rslora)
    save_adapter(ours, tmp_path / "adapter")
    with warnings.catch_warnings():
        # PEFT only warns of keys that it misses or does not know
        warnings.filterwarnings("error", message=".*(adapter keys|unexpected keyword)")
        theirs = library.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert max_diff(logits(ours), logits(load_pretrained(tmp_path / "base"))) > 0.1
    assert max_diff(logits(ours), logits(theirs)) < 1e-5


SEVEN = {"r": 4, "lora_alpha": 8, "target_modules": list(TARGET_MODULES)}
THEIRS = {
    "seven": SEVEN,
    "rslora": SEVEN | {"use_rslora": True, "lora_dropout": 0.1},
    "two": {"r": 3, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "defaults": {"target_modules": None},  # r = 8, alpha = 8, q_proj and v_proj
    "all-linear": {"r": 4, "target_modules": "all-linear"},
    "regex": {"r": 4, "target_modules": r".*self_attn\.(q|o)_proj"},
    "endings of paths": {"r": 4, "target_modules": ["self_attn.q_proj", "layers.1.mlp.up_proj"]},
}


@pytest.mark.parametrize("settings", THEIRS.values(), ids=THEIRS.keys())
@pytest.mark.parametrize("family", ["llama3.1", "qwen2.5"])
def test_adapter_of_peft_loads_here(family, settings, tmp_path):
    """An adapter that PEFT saved gives PEFT's logits here."""
    library = pytest.importorskip("peft")
    base = transformers_model(family, tmp_path / "base")
    config = library.LoraConfig(task_type="CAUSAL_LM", **settings)
    theirs = randomize_adapter(library.get_peft_model(base, config))
    theirs.save_pretrained(tmp_path / "adapter")
    plain = load_pretrained(tmp_path / "base")
    before = logits(plain)
    ours = load_adapter(plain, tmp_path / "adapter")
    assert max_diff(logits(ours), before) > 0.1
    assert max_diff(logits(ours), logits(theirs)) < 1e-5
