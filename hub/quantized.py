"""A frozen base in 4 bits: layers that hold codes, and how a checkpoint's rows become codes.

Embedding, norms, biases and head stay as they are. A checkpoint may hold 16- or 32-bit weights,
quantised as they are read, or be bitsandbytes' own, already quantised:

    X.weight             (out · in / 2, 1) uint8
    X.weight.absmax      fp32, or uint8 where it is quantised itself (double quantisation):
                         nested_quant_map[absmax] · nested_absmax[block of 256] + nested_offset
    X.weight.quant_state.bitsandbytes__nf4      JSON in bytes: blocksize, quant_type, nested_offset
"""

import json

import torch
from torch import Tensor, nn

from common import reading
from hub.files import NF4_STATE, Weights
from kernels.nf4 import (
    BLOCK,
    CODE,
    PIECE,
    dequantize_nf4,
    linear_4bit,
    outside_graphs,
    quantize_nf4,
)


class Linear4bit(nn.Linear):
    """Frozen: `weight` is codes (out, in / 2) uint8, beside it `absmax` (out, in / 64) fp32.

    Rows are whole blocks, so that they can be divided over ranks."""

    def __init__(self, linear: nn.Linear, name: str):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if self.in_features % BLOCK:
            raise ValueError(
                f"--load_in_4bit: {name} has {self.in_features} inputs, no multiple of {BLOCK}"
            )
        device, out = linear.weight.device, self.out_features
        codes = torch.empty(out, self.in_features // 2, dtype=torch.uint8, device=device)
        absmax = torch.empty(out, self.in_features // BLOCK, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.absmax = nn.Parameter(absmax, requires_grad=False)
        self.bias = linear.bias
        self.project_4bit = outside_graphs(linear_4bit)

    def forward(self, x: Tensor) -> Tensor:
        return self.project_4bit(x, self.weight, self.absmax, self.bias)


def to_4bit(model: nn.Module) -> nn.Module:
    """Put a Linear4bit in place of each linear layer but the head, on `meta` or on fake tensors."""
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
    view, step = weights.rows(name), max(1, PIECE // (2 * codes.shape[1]))
    if name + NF4_STATE in weights.files:
        codes.copy_(view[start * codes.shape[1] : stop * codes.shape[1]].view_as(codes))
        scales = stored_absmax(weights, name).view(-1, absmax.shape[1])
        absmax.copy_(scales[start:stop])
        return
    for first in range(start, stop, step):
        piece = view[first : min(first + step, stop)].to(codes.device, dtype)
        quantised, largest = quantize_nf4(piece, name=f"{weights.files[name]}: {name}")
        at = slice(first - start, first - start + len(piece))
        codes[at] = quantised.view(len(piece), -1)
        absmax[at] = largest.view(len(piece), -1)


def stored_absmax(weights: Weights, name: str) -> Tensor:
    """All absmax of a weight that bitsandbytes has quantised, in fp32."""
    file = weights.files[name]
    with reading(file):
        state = json.loads(bytes(weights.tensor(name + NF4_STATE).tolist()))
        kind = (state["quant_type"], state["blocksize"])
        code = weights.tensor(f"{name}.quant_map").tolist()
        if kind != ("nf4", BLOCK) or code != torch.tensor(CODE).tolist():
            raise ValueError(
                f"{file}: {name} is quantised as {kind}, not as nf4 in 64s, of its code"
            )
        absmax = weights.tensor(f"{name}.absmax").view(-1)
        if absmax.dtype == torch.float32:
            return absmax
        values = weights.tensor(f"{name}.nested_quant_map")[absmax.int()]
        scales = weights.tensor(f"{name}.nested_absmax")
        scales = scales.repeat_interleave(state["nested_blocksize"])[: len(absmax)]
        return values * scales + state["nested_offset"]


def base_weight(model: nn.Module, name: str, layer: nn.Module) -> Tensor:
    """A 4-bit layer's weight: the original one where its 16 bits are at hand, else its values."""
    dtype = model.model.norm.weight.dtype
    if model.source:
        weights = Weights(model.source)
        if f"{name}.weight{NF4_STATE}" not in weights.files:
            return weights.tensor(f"{name}.weight").to(layer.weight.device, dtype)
    shape = (layer.out_features, layer.in_features)
    return dequantize_nf4(layer.weight, layer.absmax, shape, dtype)


def unquantized(model: nn.Module) -> nn.Module:
    """Turn every Linear4bit into an ordinary layer of the compute dtype, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
            linear.weight = nn.Parameter(base_weight(model, name, layer), requires_grad=False)
            linear.bias = layer.bias
            model.set_submodule(name, linear)
    return model
