"""A frozen base in 4 bits: how a checkpoint's rows become the codes of Linear4bit, and back.

Embedding, norms, biases and head stay as they are. A checkpoint holds 16- or 32-bit weights, which
are quantised as they are read, or bitsandbytes' codes, plain or double quantised."""

import json

import torch
from torch import Tensor, nn

from common import reading
from hub.files import NF4_STATE, Weights
from kernels.nf4 import BLOCK, CODE, Linear4bit, matrix, quantize_nf4


def to_4bit(model: nn.Module) -> nn.Module:
    """Replace each linear layer but the head by a Linear4bit, on `meta` or on fake tensors."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            model.set_submodule(name, Linear4bit(layer, name))
    return model.requires_grad_(False)


def read_codes(
    weights: Weights,
    name: str,
    start: int,
    stop: int,
    codes: Tensor,  # (stop - start, in / 2) uint8, filled here
    absmax: Tensor,  # (stop - start, in / 64) fp32, filled here
    dtype: torch.dtype,  # weights are rounded to it before they are quantised
) -> None:
    """Fill in the 4-bit form of a weight's rows [start, stop)."""
    if name + NF4_STATE in weights.files:
        stored = weights.rows(name)[start * codes.shape[1] : stop * codes.shape[1]]
        scales = stored_absmax(weights, name).view(-1, absmax.shape[1])[start:stop]
    else:
        rows = weights.rows(name)[start:stop].to(codes.device, dtype)
        stored, scales = quantize_nf4(rows, name=f"{weights.files[name]}: {name}")
    codes.copy_(stored.view_as(codes))
    absmax.copy_(scales.view_as(absmax))


def stored_absmax(weights: Weights, name: str) -> Tensor:
    """All absmax of a weight that bitsandbytes has quantised, in fp32."""
    file, part = weights.files[name], lambda key: weights.tensor(f"{name}.{key}")
    with reading(file):
        state = json.loads(bytes(weights.tensor(name + NF4_STATE).tolist()))
        kind, code = (state["quant_type"], state["blocksize"]), part("quant_map").tolist()
        if kind != ("nf4", BLOCK) or code != torch.tensor(CODE).tolist():
            raise ValueError(f"{file}: {name} is quantised as {kind}, not as nf4 in blocks of 64")
        absmax = part("absmax").view(-1)
        if absmax.dtype == torch.float32:
            return absmax
        scales = part("nested_absmax").repeat_interleave(state["nested_blocksize"])
        values = part("nested_quant_map")[absmax.int()] * scales[: len(absmax)]
        return values + state["nested_offset"]


def base_weight(model: nn.Module, name: str, layer: nn.Module) -> Tensor:
    """A 4-bit layer's weight: the original if the checkpoint has it, else dequantised values."""
    dtype = model.model.norm.weight.dtype
    weights = Weights(model.source) if model.source else None
    if weights and f"{name}.weight{NF4_STATE}" not in weights.files:
        return weights.tensor(f"{name}.weight").to(layer.weight.device, dtype)
    return matrix(layer.weight, layer.absmax, dtype)


def unquantized(model: nn.Module) -> nn.Module:
    """Turn every Linear4bit into an ordinary layer of the compute dtype, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
            linear.weight = nn.Parameter(base_weight(model, name, layer), requires_grad=False)
            linear.bias = layer.bias
            model.set_submodule(name, linear)
    return model
