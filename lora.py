"""LoRA: a frozen linear layer plus a trainable low-rank correction (arXiv:2106.09685), in PEFT's file format.

    y = W x + b + scaling * B A dropout(x)          x ──┬── W (frozen) ────────────┬── y
                                                        └── dropout ── A ── B ── * ┘ scaling
    A (r, in) starts uniform, B (out, r) starts at zero, so the adapted model starts as the base model;
    scaling = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA (arXiv:2312.03732).

Projections of one input are computed together, as one autograd function (kernels/lora.py). A and B stay fp32 over a bf16 base and are cast per use. Files are `adapter_model.safetensors` and `adapter_config.json`
as PEFT writes and reads them. Both ways are strict: a key that does not match is an error, never a warning.

Left out, and refused by name when a foreign adapter needs it: DoRA, rank or alpha patterns, trained biases, saved
modules, layer selection, adapters of embeddings.
"""

import hashlib
import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common import read_json
from kernels.lora import adapted_4bit_projections, adapted_projections
from model import Transformer, open_safetensors, weight_files
from quantized import base_weight, unquantized

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEFT_PREFIX = "base_model.model."


class LoRALinear(nn.Linear):
    """A linear layer with an adapter. Keeps the parameter names of the layer it replaces."""

    def __init__(self, linear: nn.Linear, r: int, scaling: float, dropout: float = 0.0):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.absmax = getattr(linear, "absmax", None)  # with it, `weight` is 4-bit codes
        device = linear.weight.device
        self.lora_A = nn.Linear(
            linear.in_features, r, bias=False, device=device, dtype=torch.float32
        )
        self.lora_B = nn.Linear(
            r, linear.out_features, bias=False, device=device, dtype=torch.float32
        )
        self.scaling, self.dropout = scaling, dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x, [self])[0]

    @staticmethod
    def project(x: Tensor, layers: list[nn.Linear]) -> tuple[Tensor, ...]:
        """Several projections of one input, at least one of them adapted, in one autograd function."""
        lora = [layer for layer in layers if isinstance(layer, LoRALinear)]
        As = [layer.lora_A.weight if layer in lora else None for layer in layers]
        Bs = [layer.lora_B.weight if layer in lora else None for layer in layers]
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        dropout = (
            lora[0].dropout if lora[0].training else 0.0
        )  # all adapters of a model share it, and the scaling
        arguments = (x, weights, biases, As, Bs, lora[0].scaling, dropout)
        absmaxes = [getattr(layer, "absmax", None) for layer in layers]
        if any(absmax is not None for absmax in absmaxes):
            return adapted_4bit_projections(*arguments, absmaxes)
        return adapted_projections(*arguments)

    def draw_A(self, name: str, seed: int) -> Tensor:
        """A ~ U(-1/sqrt(in), 1/sqrt(in)), drawn whole from (seed, name) so that every rank starts with the same."""
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        bound = 1 / math.sqrt(self.in_features)
        return torch.empty(self.lora_A.weight.shape, device="cpu").uniform_(
            -bound, bound, generator=generator
        )

    @torch.no_grad()
    def reset_parameters(self, name: str, seed: int) -> None:
        self.lora_A.weight.copy_(self.draw_A(name, seed))
        self.lora_B.weight.zero_()


def apply_lora(
    model: Transformer,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    target_modules=TARGET_MODULES,  # names, PEFT's "all-linear", or a regular expression over module paths
    use_rslora: bool = False,
    seed: int = 0,
) -> Transformer:
    """Freeze the model and put an adapter on every targeted linear layer, in place; returns the model."""
    if r < 1:
        raise ValueError(f"LoRA rank r must be >= 1, got {r}")
    if getattr(model, "lora_config", None):
        raise ValueError("the model already carries LoRA adapters: merge_lora them first")
    targets = _find_targets(model, target_modules)
    short = sorted(
        {name.rpartition(".")[2] for name in targets}
    )  # whole paths only where these would select more
    model.requires_grad_(False)
    scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
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
        "target_modules": short if _find_targets(model, short) == targets else targets,
        "use_rslora": use_rslora,
    }
    return model


def _find_targets(model: Transformer, target_modules) -> list[str]:
    linears = [
        name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"
    ]
    if isinstance(target_modules, str):
        if target_modules == "all-linear":
            return linears
        found = [name for name in linears if re.fullmatch(target_modules, name)]
        unused = [] if found else [target_modules]
    else:
        found = [name for name in linears if any(_is_path_end(t, name) for t in target_modules)]
        unused = sorted(
            t for t in target_modules if not any(_is_path_end(t, name) for name in found)
        )
    if unused or not found:
        raise ValueError(
            f"target_modules {unused or list(target_modules)} match no linear layer; known: {TARGET_MODULES}"
        )
    return found


def _is_path_end(target: str, name: str) -> bool:
    """PEFT's rule for a list: "q_proj", "self_attn.q_proj" and the whole path all mean that layer."""
    return f".{name}".endswith(f".{target}")


def lora_layers(model: Transformer) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def base_fingerprint(path) -> str:
    """SHA-256 over config-independent facts of a checkpoint: each tensor's name, shape and first row. Cheap at any size."""
    digest = hashlib.sha256()
    for name, file in sorted(weight_files(path).items()):
        with open_safetensors(file) as f:
            view = f.get_slice(name)
            row = view[:1].float().contiguous().numpy().tobytes()
            digest.update(f"{name} {view.get_shape()}".encode() + row)
    return digest.hexdigest()


def save_adapter(model: Transformer, path, state: dict[str, Tensor] | None = None) -> None:
    """Write PEFT's two files. `state` overrides the weights (gathered ones, when the model is sharded)."""
    if not getattr(model, "lora_config", None):
        raise ValueError(
            "the model carries no LoRA adapter: call apply_lora first, or save_pretrained for full weights"
        )
    state = model.state_dict() if state is None else state
    tensors = {
        PEFT_PREFIX + n: t.detach().float().cpu().contiguous()
        for n, t in state.items()
        if ".lora_" in n
    }
    metadata = {"format": "pt"}
    if model.source:
        metadata["base_fingerprint"] = base_fingerprint(model.source)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors", metadata=metadata)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name_or_path,
        **model.lora_config,
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: Transformer, path, lora_dropout: float | None = None) -> Transformer:
    """Put a PEFT adapter on the base model it was trained for, in place; returns the model.

    ValueError if it needs something unsupported, was trained on another base, or any key or shape does not match."""
    settings, tensors = read_adapter(model, path)
    if lora_dropout is not None:
        settings["lora_dropout"] = lora_dropout
    apply_lora(model, **settings)
    state = model.state_dict()
    for name, tensor in tensors.items():
        state[name.removeprefix(PEFT_PREFIX)].copy_(tensor)
    return model


def read_adapter(model: Transformer, path) -> tuple[dict, dict[str, Tensor]]:
    """(arguments of apply_lora, tensors by PEFT's names) of an adapter, checked against the model, which may be on meta."""
    path = Path(path)
    config = read_adapter_config(path)
    file = path / "adapter_model.safetensors"
    if not file.exists():
        raise ValueError(f"{file}: no such file (pickled adapter_model.bin files are not read)")
    with open_safetensors(file) as f:
        fingerprint = (f.metadata() or {}).get("base_fingerprint")
        tensors = {name: f.get_tensor(name) for name in f.keys()}
    if fingerprint and model.source and fingerprint != base_fingerprint(model.source):
        trained_on = config.get("base_model_name_or_path")
        raise ValueError(
            f"{path}: this adapter was trained on another base ({trained_on}), not on {model.name_or_path}"
        )

    r, targets = config.get("r", 8), config.get("target_modules") or ("q_proj", "v_proj")
    expected = {}
    for name in _find_targets(model, targets):
        linear = model.get_submodule(name)
        expected[f"{PEFT_PREFIX}{name}.lora_A.weight"] = (r, linear.in_features)
        expected[f"{PEFT_PREFIX}{name}.lora_B.weight"] = (linear.out_features, r)
    if expected.keys() != tensors.keys():
        missing, unexpected = (
            sorted(expected.keys() - tensors.keys()),
            sorted(tensors.keys() - expected.keys()),
        )
        raise ValueError(
            f"{file}: adapter keys do not match the model: {len(missing)} missing (first {missing[:2]}), "
            f"{len(unexpected)} unexpected (first {unexpected[:2]})"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{file}: {name} has shape {tuple(tensor.shape)}, the model needs {expected[name]}"
            )
    settings = {
        "r": r,
        "lora_alpha": config.get("lora_alpha", 8),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "target_modules": targets,
        "use_rslora": config.get("use_rslora", False),
    }
    return settings, tensors


def read_adapter_config(path) -> dict:
    """adapter_config.json, checked for everything this project does not support."""
    file = Path(path) / "adapter_config.json"
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{file}: peft_type {config.get('peft_type')!r} is not supported, only LORA"
        )
    unsupported = [
        "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "layers_to_transform",
        "layers_pattern", "layer_replication", "fan_in_fan_out", "exclude_modules", "target_parameters",
        "trainable_token_indices", "use_qalora", "alora_invocation_tokens", "corda_config", "eva_config", "loftq_config",
        "lora_ga_config", "kasa_config", "velora_config", "monteclora_config", "arrow_config", "use_bdlora",
    ]  # fmt: skip
    needed = [key for key in unsupported if config.get(key)]
    if isinstance(init := config.get("init_lora_weights"), str) and init not in (
        "gaussian",
        "orthogonal",
        "eva",
    ):
        needed.append(
            f"init_lora_weights={init}"
        )  # PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA: they change the base too
    if config.get("bias", "none") != "none":
        needed.append(f"bias={config['bias']}")
    if needed:
        raise ValueError(
            f"{file}: {', '.join(needed)} not supported; only plain LoRA and rsLoRA adapters are"
        )
    return config


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
        linear = nn.Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
        )
        linear.weight, linear.bias = weight, layer.bias
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], linear)
    unquantized(model)
    model.lora_config = None
    model.source, model.name_or_path = None, ""  # no longer the weights in that folder
    return model
