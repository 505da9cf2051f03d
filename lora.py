"""LoRA: a frozen linear layer plus a trainable low-rank correction (arXiv:2106.09685),
in PEFT's file format.

    y = W x + b + scaling * B A dropout(x)          x ──┬── W (frozen) ────────────┬── y
                                                        └── dropout ── A ── B ── * ┘ scaling
    A (r, in) starts uniform, B (out, r) starts at zero: the adapted model starts as the base model;
    scaling = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA (arXiv:2312.03732).

Projections of one input are computed together, as one autograd function (kernels/lora.py). A and
B stay fp32 over a bf16 base and are cast per use. Files are PEFT's (hub/adapter.py).
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from hub.adapter import (
    PEFT_PREFIX,
    adapter_settings,
    check_adapter_tensors,
    read_adapter_config,
    read_adapter_tensors,
    write_adapter,
)
from hub.quantized import base_weight, unquantized
from hub.targets import TARGET_MODULES, find_targets, used_targets
from kernels.lora import adapted_projections
from kernels.nf4 import outside_graphs
from model import Transformer


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


class LoRALinear(nn.Linear):
    """A linear layer with an adapter. Keeps the parameter names of the layer it replaces."""

    def __init__(self, linear: nn.Linear, r: int, scaling: float, dropout: float = 0.0):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.absmax = getattr(linear, "absmax", None)  # with it, `weight` is 4-bit codes
        self.projections = adapted_projections
        if self.absmax is not None:
            self.projections = outside_graphs(adapted_projections)
        like = {"bias": False, "device": linear.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(linear.in_features, r, **like)
        self.lora_B = nn.Linear(r, linear.out_features, **like)
        self.scaling, self.dropout = scaling, dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x, [self])[0]

    @staticmethod
    def project(x: Tensor, layers: list[nn.Linear]) -> tuple[Tensor, ...]:
        """Several projections of one input, at least one of them adapted,
        in one autograd function."""
        lora = [layer for layer in layers if isinstance(layer, LoRALinear)]
        As = [layer.lora_A.weight if layer in lora else None for layer in layers]
        Bs = [layer.lora_B.weight if layer in lora else None for layer in layers]
        weights = [layer.weight for layer in layers]
        biases = [layer.bias for layer in layers]
        absmaxes = [getattr(layer, "absmax", None) for layer in layers]  # of all layers, or of none
        first = lora[0]  # all adapters of a model share scaling and dropout
        dropout = first.dropout if first.training else 0.0
        return first.projections(x, weights, biases, As, Bs, first.scaling, dropout, absmaxes)

    def draw_A(self, name: str, seed: int) -> Tensor:
        """A ~ U(-1/sqrt(in), 1/sqrt(in)), drawn whole from (seed, name)
        so that every rank starts with the same."""
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        bound = 1 / math.sqrt(self.in_features)
        A = torch.empty(self.lora_A.weight.shape, device="cpu")
        return A.uniform_(-bound, bound, generator=generator)

    @torch.no_grad()
    def reset_parameters(self, name: str, seed: int) -> None:
        self.lora_A.weight.copy_(self.draw_A(name, seed))
        self.lora_B.weight.zero_()


def linear_names(model: Transformer) -> list[str]:
    """Module paths of the layers that can carry an adapter."""
    modules = model.named_modules()
    return [name for name, m in modules if isinstance(m, nn.Linear) and name != "lm_head"]


def apply_lora(
    model: Transformer,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    # names, PEFT's "all-linear", or a regular expression over module paths
    target_modules=TARGET_MODULES,
    use_rslora: bool = False,
    seed: int = 0,
) -> Transformer:
    """Freeze the model and put an adapter on every targeted linear layer, in place;
    returns the model."""
    if r < 1:
        raise ValueError(f"LoRA rank r must be >= 1, got {r}")
    if getattr(model, "lora_config", None):
        raise ValueError("the model already carries LoRA adapters: merge_lora them first")
    linears = linear_names(model)
    targets = find_targets(linears, target_modules)
    short = sorted({name.rpartition(".")[2] for name in targets})
    # whole paths only where the short names would select more
    named = short if find_targets(linears, short) == targets else targets
    model.requires_grad_(False)
    scaling = lora_scaling(r, lora_alpha, use_rslora)
    for name in targets:
        parent = model.get_submodule(name.rpartition(".")[0])
        layer = LoRALinear(model.get_submodule(name), r, scaling, lora_dropout)
        if not layer.weight.is_meta:
            layer.reset_parameters(name, seed)
        setattr(parent, name.rpartition(".")[2], layer)
    model.lora_config = {
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "target_modules": named,
        "use_rslora": use_rslora,
    }
    return model


def lora_layers(model: Transformer) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def save_adapter(model: Transformer, path, state: dict[str, Tensor] | None = None) -> None:
    """Write PEFT's two files.

    `state` overrides the weights (gathered ones, when the model is sharded)."""
    if not getattr(model, "lora_config", None):
        raise ValueError(
            "the model carries no LoRA adapter: "
            "call apply_lora first, or save_pretrained for full weights"
        )
    state = model.state_dict() if state is None else state
    tensors = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    write_adapter(path, tensors, model.lora_config, model.source, model.name_or_path)


def load_adapter(model: Transformer, path, lora_dropout: float | None = None) -> Transformer:
    """Put a PEFT adapter on the base model it was trained for, in place; returns the model.

    ValueError if it needs something unsupported, was trained on another base, or any
    key or shape does not match."""
    settings, tensors = read_adapter(model, path)
    if lora_dropout is not None:
        settings["lora_dropout"] = lora_dropout
    apply_lora(model, **settings)
    state = model.state_dict()
    for name, tensor in tensors.items():
        state[name.removeprefix(PEFT_PREFIX)].copy_(tensor)
    return model


def read_adapter(model: Transformer, path) -> tuple[dict, dict[str, Tensor]]:
    """(arguments of apply_lora, tensors by PEFT's names) of an adapter, checked against the model,
    which may be on meta."""
    config = read_adapter_config(path)
    held = {} if model.source else model.state_dict()
    tensors = read_adapter_tensors(path, config, model.source, model.name_or_path, held)
    settings = adapter_settings(path, config)
    linears, named = linear_names(model), settings["target_modules"]
    settings["target_modules"] = used = used_targets(linears, named)
    ignored = [] if isinstance(named, str) else sorted(set(named) - set(used))

    r, expected = settings["r"], {}
    for name in find_targets(linears, used):
        linear = model.get_submodule(name)
        expected[f"{PEFT_PREFIX}{name}.lora_A.weight"] = (r, linear.in_features)
        expected[f"{PEFT_PREFIX}{name}.lora_B.weight"] = (linear.out_features, r)
    check_adapter_tensors(path, tensors, expected, ignored)
    return settings, tensors


@torch.no_grad()
def merge_lora(model: Transformer) -> Transformer:
    """Fold every adapter into its weight, W += scaling * B A, and take it off, in place.

    A 4-bit base becomes one of its compute dtype, from the original weights where they are at hand.
    Returns the model."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model carries no LoRA adapter to merge")
    for name, layer in layers.items():
        delta = layer.scaling * layer.lora_B.weight.float() @ layer.lora_A.weight.float()
        if layer.absmax is None:
            weight = layer.weight
        else:
            weight = nn.Parameter(base_weight(model, name, layer, model.model.norm.weight.dtype))
            weight.requires_grad_(False)
        weight.copy_(weight.float() + delta)
        bias = layer.bias is not None
        linear = nn.Linear(layer.in_features, layer.out_features, bias=bias, device="meta")
        linear.weight, linear.bias = weight, layer.bias
        parent, _, short = name.rpartition(".")
        setattr(model.get_submodule(parent), short, linear)
    unquantized(model)
    model.lora_config = None
    model.source, model.name_or_path = None, ""  # no longer the weights in that folder
    return model
