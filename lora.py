"""LoRA: a frozen linear layer plus a trainable low-rank correction (arXiv:2106.09685).

    y = W x + b + scaling * B A dropout(x)          x ──┬── W (frozen) ────────────┬── y
                                                        └── dropout ── A ── B ── * ┘ scaling
    A (r, in) starts uniform, B (out, r) starts at zero: the adapted model starts as the base model;
    scaling = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA (arXiv:2312.03732).

Projections of one input are computed together, as one autograd function (kernels/lora.py). A and
B stay fp32 over a bf16 base and are cast per use. Files are PEFT's two; settings beyond plain LoRA
are refused. Left out: DoRA, rank or alpha patterns, trained biases, adapters of embeddings or head.
"""

import hashlib
import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from common import is_main, read_json
from hub.files import (
    Weights,
    base_fingerprint,
    check_tensors,
    note_once,
    open_safetensors,
    save_tensors,
)
from hub.quantized import base_weight, unquantized
from kernels.lora import adapted_projections
from kernels.nf4 import outside_graphs
from model import Transformer

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


class LoRALinear(nn.Linear):
    """A linear layer with an adapter, under the parameter names of the layer it replaces."""

    def __init__(self, linear: nn.Linear, r: int, scaling: float, dropout: float = 0.0):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.absmax = getattr(linear, "absmax", None)  # if set, `weight` holds 4-bit codes
        compiled = self.absmax is None
        self.projections = adapted_projections if compiled else outside_graphs(adapted_projections)
        like = {"bias": False, "device": linear.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(linear.in_features, r, **like)
        self.lora_B = nn.Linear(r, linear.out_features, **like)
        self.scaling, self.dropout = scaling, dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x, [self])[0]

    @staticmethod
    def project(x: Tensor, layers: list[nn.Linear]) -> tuple[Tensor, ...]:
        """Compute several projections of one input together; at least one has an adapter."""
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
        """Draw the whole A ~ U(-1/sqrt(in), 1/sqrt(in)) from (seed, name): equal on all ranks."""
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        bound = 1 / math.sqrt(self.in_features)
        A = torch.empty(self.lora_A.weight.shape, device="cpu")
        return A.uniform_(-bound, bound, generator=generator)

    @torch.no_grad()
    def reset_parameters(self, name: str, seed: int) -> None:
        self.lora_A.weight.copy_(self.draw_A(name, seed))
        self.lora_B.weight.zero_()


# ------------------------------------------------------------------------ which layers
def linear_names(model: Transformer) -> list[str]:
    """Module paths of the layers that can carry an adapter."""
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [name for name in linears if name != "lm_head"]


def find_targets(linears: list[str], targets, strict: bool = True) -> list[str]:
    """Layers selected by a regular expression, PEFT's "all-linear" or a list of path endings."""
    if targets == "all-linear":
        return linears
    is_one = isinstance(targets, str)
    patterns = [targets] if is_one else [rf"(.*\.)?{re.escape(t)}" for t in targets]
    try:
        matches = [{n for n in linears if re.fullmatch(p, n)} for p in patterns]
    except re.error as error:
        raise ValueError(f"target_modules {targets!r}: {error}") from None
    found = set().union(*matches)
    if not found or (strict and not all(matches)):
        raise ValueError(f"target_modules {targets!r}: one matches no layer; use {TARGET_MODULES}")
    return [name for name in linears if name in found]


# ------------------------------------------------------------------------ on a model
def apply_lora(
    model: Transformer,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    target_modules=TARGET_MODULES,  # names, "all-linear" or a regular expression over paths
    use_rslora: bool = False,
    seed: int = 0,
) -> Transformer:
    """Freeze the model and put an adapter on every targeted linear layer, in place."""
    if r < 1:
        raise ValueError(f"LoRA rank r must be >= 1, got {r}")
    if getattr(model, "lora_config", None):
        raise ValueError("the model already carries LoRA adapters: merge_lora them first")
    linears = linear_names(model)
    targets = find_targets(linears, target_modules)
    short = sorted({name.rpartition(".")[2] for name in targets})
    # full paths only if the short names would select more
    named = short if find_targets(linears, short) == targets else targets
    model.requires_grad_(False)
    scaling = lora_scaling(r, lora_alpha, use_rslora)
    for name in targets:
        layer = LoRALinear(model.get_submodule(name), r, scaling, lora_dropout)
        if not layer.weight.is_meta:
            layer.reset_parameters(name, seed)
        model.set_submodule(name, layer)
    model.lora_config = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    model.lora_config |= {"target_modules": named, "use_rslora": use_rslora}
    return model


def lora_layers(model: Transformer) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@torch.no_grad()
def merge_lora(model: Transformer) -> Transformer:
    """Fold every adapter into its weight, W += scaling * B A, and remove it, in place.

    A 4-bit base gets its original weights back if they are found, else its dequantised values."""
    if not lora_layers(model):
        raise ValueError("the model carries no LoRA adapter to merge")
    for name, layer in lora_layers(model).items():
        delta = layer.scaling * layer.lora_B.weight.float() @ layer.lora_A.weight.float()
        weight = layer.weight if layer.absmax is None else base_weight(model, name, layer)
        weight = weight.copy_(weight.float() + delta)
        linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        model.set_submodule(name, linear)
    unquantized(model)
    model.lora_config = None
    model.source, model.name_or_path = None, ""  # no longer the weights in that folder
    return model


def adapter_products(settings: dict, tensors: dict[str, Tensor]) -> dict:
    """Map each weight to (scaling * B, A) of an adapter; read_weights adds their product."""
    scaling = lora_scaling(settings["r"], settings["lora_alpha"], settings["use_rslora"])
    pairs = {}
    for name, A in tensors.items():
        if ".lora_A." in name:
            B = tensors[name.replace(".lora_A.", ".lora_B.")]
            pairs[name.replace(".lora_A.", ".")] = (scaling * B.float(), A.float())
    return pairs


# ------------------------------------------------------------------------ PEFT's two files
PEFT_PREFIX = "base_model.model."
# arguments of apply_lora, with PEFT's defaults
SETTINGS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}
SETTINGS |= {"target_modules": ["q_proj", "v_proj"]}
WITHOUT_EFFECT = {  # on what an adapter computes; PEFT's other settings must be empty
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode",
    "auto_mapping", "peft_version", "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip
HARMLESS = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva")}


def read_adapter_config(path) -> dict:
    """Read adapter_config.json and fill in PEFT's defaults; ValueError if it is not supported."""
    file = Path(path) / "adapter_config.json"
    config = {"peft_type": None} | read_json(file)
    config |= {key: value for key, value in SETTINGS.items() if config.get(key) is None}
    targets, alpha, dropout = (config[f] for f in ("target_modules", "lora_alpha", "lora_dropout"))
    names = [targets] if isinstance(targets, str) else targets
    good = {
        "peft_type": config["peft_type"] == "LORA",
        "r": type(config["r"]) is int and config["r"] > 0,
        "lora_alpha": type(alpha) in (int, float) and 0 < alpha < math.inf,
        "lora_dropout": type(dropout) in (int, float) and 0 <= dropout < 1,
        "target_modules": type(names) is list and {str} == set(map(type, names)),
        "use_rslora": type(config["use_rslora"]) is bool,
    }
    for key, value in config.items():
        unused = not value or key in WITHOUT_EFFECT or value in HARMLESS.get(key, ())
        if not good.get(key, unused):
            raise ValueError(f"{file}: {key} {str(value)[:60]!r} is not supported (plain LoRA is)")
    return config


def base_of(path) -> str:
    """The base model that an adapter names; ValueError if it names none."""
    name = read_adapter_config(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        file = Path(path) / "adapter_config.json"
        raise ValueError(f"{file}: base_model_name_or_path is {name!r}: give the base as --model")
    return name


def save_adapter(model: Transformer, path, state: dict[str, Tensor] | None = None) -> None:
    """Write PEFT's two files; `state` overrides the weights (gathered from a sharded model)."""
    if not getattr(model, "lora_config", None):
        raise ValueError("the model carries no LoRA adapter: apply_lora, or save_pretrained it")
    state, path = model.state_dict() if state is None else state, Path(path)
    tensors = {
        PEFT_PREFIX + name: tensor.detach().float().cpu().contiguous()
        for name, tensor in state.items()
        if ".lora_" in name
    }
    if model.lora_config["use_rslora"]:
        note_once(f"{path}: llama.cpp ignores use_rslora: merge the adapter before converting it")
    metadata = {"format": "pt"}
    if model.source:
        metadata["base_sha256"] = base_fingerprint(model.source)
    path.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path / "adapter_model.safetensors", metadata=metadata)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
    config |= {"base_model_name_or_path": model.name_or_path, **model.lora_config}
    config |= {"fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None}
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: Transformer, path) -> Transformer:
    """Put a PEFT adapter on the base model it was trained for, in place, or refuse it."""
    settings, tensors = read_adapter(model, path)
    apply_lora(model, **settings)
    for name, tensor in tensors.items():
        model.get_parameter(name).data.copy_(tensor)
    return model


def read_adapter(model: Transformer, path) -> tuple[dict, dict[str, Tensor]]:
    """Read (arguments of apply_lora, tensors by name) for a model, which may be on meta."""
    file, config = Path(path) / "adapter_model.safetensors", read_adapter_config(path)
    settings, needed = {key: config[key] for key in SETTINGS}, {}
    targets = find_targets(linear_names(model), settings["target_modules"], strict=False)
    if isinstance(settings["target_modules"], list):
        settings["target_modules"] = targets
    for name in targets:
        linear = model.get_submodule(name)
        needed[f"{PEFT_PREFIX}{name}.lora_A.weight"] = (settings["r"], linear.in_features)
        needed[f"{PEFT_PREFIX}{name}.lora_B.weight"] = (linear.out_features, settings["r"])
    handle = open_safetensors(file)
    tensors = {key: handle.get_tensor(key) for key in handle.keys()}
    for key in list(tensors):
        if equals_base(model, key.removeprefix(PEFT_PREFIX), tensors[key]):
            del tensors[key]  # PEFT's save_embedding_layers
        elif (plain := key.replace(".default.weight", ".weight")) not in tensors:
            tensors[plain] = tensors.pop(key)  # the name of an adapter in a PEFT model's memory
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    way_out = "plain LoRA on linear layers is read; adapters of head or embeddings, embeddings that"
    way_out += " were trained, DoRA, and models inside torch.compile, DDP or another PEFT are not"
    check_tensors(file, found, needed, way_out)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{file}: {key} holds NaN, infinity or no floats; use an earlier one")
    if not any(tensor.any() for key, tensor in tensors.items() if "lora_B" in key):
        note_once(f"{file}: every lora_B is zero, so the adapter adds nothing to the base")
    trained_on = (handle.metadata() or {}).get("base_sha256")
    if is_main() and trained_on and model.source and trained_on != base_fingerprint(model.source):
        before = config.get("base_model_name_or_path")
        raise ValueError(f"{path}: trained on another base, {before}, than {model.name_or_path}")
    return settings, {key.removeprefix(PEFT_PREFIX): t for key, t in tensors.items()}


def equals_base(model: Transformer, name: str, saved: Tensor) -> bool:
    """Whether a tensor stored with an adapter is the base's own embedding or head."""
    if name not in ("model.embed_tokens.weight", "lm_head.weight"):
        return False
    base, weights = model.get_parameter(name), Weights(model.source) if model.source else None
    if weights:
        base = weights.tensor(name if name in weights.files else "model.embed_tokens.weight")
    return base.shape == saved.shape and torch.equal(saved, base.cpu().to(saved.dtype))
