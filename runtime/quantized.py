"""A frozen base in 4 bits: layers that hold codes, and checkpoints read into them slice by slice.

`to_4bit` turns every linear layer of the blocks into a `Linear4bit` while the model is on
`meta`; embedding, norms, biases and head stay as they are. Weights are quantised as they are
read, so a rank holds its codes and one slice.

A checkpoint may hold 16- or 32-bit weights, or be bitsandbytes' own, already quantised:

    X.weight             (out · in / 2, 1) uint8
    X.weight.absmax      fp32, or uint8 where it is quantised itself (double quantisation):
                         nested_quant_map[absmax] · nested_absmax[block of 256] + nested_offset
    X.weight.quant_state.bitsandbytes__nf4
                         JSON in bytes: shape, blocksize, quant_type, nested_offset
"""

import ctypes
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from hub.files import check_weights, open_safetensors, weight_files
from kernels.nf4 import (
    BLOCK,
    CODE,
    PIECE,
    dequantize_nf4,
    linear_4bit,
    outside_graphs,
    quantize_nf4,
)
from model import Transformer, empty_model, inverse_frequencies, weight_shapes

STATE = ".quant_state.bitsandbytes__nf4"


class Linear4bit(nn.Linear):
    """Frozen: `weight` is codes (out, in / 2) uint8, beside it `absmax` (out, in / 64) fp32.

    Rows are whole blocks, so that they can be divided over ranks."""

    def __init__(self, linear: nn.Linear, name: str):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if self.in_features % BLOCK:
            raise ValueError(
                f"--load_in_4bit: {name} has {self.in_features} inputs, "
                f"which are no multiple of {BLOCK}, the size of a block"
            )
        device, out = linear.weight.device, self.out_features
        codes = torch.empty(out, self.in_features // 2, dtype=torch.uint8, device=device)
        absmax = torch.empty(out, self.in_features // BLOCK, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.absmax = nn.Parameter(absmax, requires_grad=False)
        self.bias = linear.bias
        self.compute = outside_graphs(linear_4bit)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.absmax, self.bias)


def to_4bit(model: Transformer) -> Transformer:
    """A Linear4bit in place of each linear layer but the head; the model is on `meta`, or fake."""
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    for name in linears:
        parent, _, short = name.rpartition(".")
        layer = Linear4bit(model.get_submodule(name), name)
        setattr(model.get_submodule(parent), short, layer)
    return model.requires_grad_(False)


class Reader:
    """Rows of a checkpoint's tensors; those of a linear layer as codes and absmax."""

    def __init__(self, path: Path, model: Transformer, dtype: torch.dtype):
        self.files = check_weights(path, weight_shapes(model.config), four_bit=True)
        self.handles = {f: open_safetensors(f) for f in sorted(set(self.files.values()))}
        self.dtype = dtype  # weights are rounded to it before they are quantised, as elsewhere

    def tensor(self, name: str) -> Tensor:
        return self.handles[self.files[name]].get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.handles[self.files[name]].get_slice(name)[start:stop]

    def quantized_rows(self, name: str, inputs: int, start: int, stop: int, codes, absmax) -> None:
        """Fill codes and absmax of rows [start, stop); `inputs` are the elements of a row."""
        if name + STATE in self.files:
            codes.copy_(self.rows(name, start * inputs // 2, stop * inputs // 2).view_as(codes))
            scales = self.stored_absmax(name)
            codes_per_row = inputs // BLOCK
            absmax.copy_(scales[start * codes_per_row : stop * codes_per_row].view_as(absmax))
            return
        step = max(1, PIECE // inputs)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            piece = self.rows(name, first, last).to(codes.device, self.dtype)
            quantised, largest = quantize_nf4(piece, name=f"{self.files[name]}: {name}")
            at = slice(first - start, last - start)
            codes[at].copy_(quantised.view(last - first, -1))
            absmax[at].copy_(largest.view(last - first, -1))

    def stored_absmax(self, name: str) -> Tensor:
        """All absmax of a weight that bitsandbytes has quantised, in fp32."""
        file = self.files[name]
        state = read_state(file, self.tensor(name + STATE))
        absmax = self.tensor(f"{name}.absmax")
        check_state(file, name, state, self.tensor(f"{name}.quant_map"))
        if absmax.dtype == torch.float32:
            return absmax.view(-1)
        return nested_absmax(
            absmax.view(-1),
            self.tensor(f"{name}.nested_absmax"),
            self.tensor(f"{name}.nested_quant_map"),
            state,
        )


def read_state(file: Path, stored: Tensor) -> dict:
    """The JSON that bitsandbytes keeps as a tensor of bytes."""
    try:
        return json.loads(bytes(stored.tolist()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: quant_state is not JSON ({error})") from None


def check_state(file: Path, name: str, state: dict, quant_map: Tensor) -> None:
    """ValueError unless the weight is NF4 in blocks of 64 with the code that this project has."""
    kind = (state.get("quant_type"), state.get("blocksize"))
    same = quant_map.shape == (16,) and torch.equal(quant_map.float(), torch.tensor(CODE))
    if kind != ("nf4", BLOCK) or not same:
        raise ValueError(
            f"{file}: {name} is quantised as {kind[0]} in blocks of {kind[1]}; "
            f"only bitsandbytes' nf4 in blocks of {BLOCK} is read"
        )


def nested_absmax(index: Tensor, scales: Tensor, code: Tensor, state: dict) -> Tensor:
    """Absmax that were quantised to 8 bits themselves, less their mean."""
    size = state["nested_blocksize"]
    values = code[index.int()] * scales.repeat_interleave(size)[: len(index)]
    return values + state["nested_offset"]


def read_4bit(
    model: Transformer,
    path: Path,
    dtype: torch.dtype,
    own_rows: Callable[[Tensor], tuple[int, int]],
    local: Callable[[Tensor], Tensor],
) -> None:
    """Fill a model that to_4bit made and that has memory; each rank its own rows."""
    reader = Reader(path, model, dtype)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in weight_names(reader.files):
        p = parameters[name]
        start, stop = own_rows(p)
        if stop == start:
            continue
        with torch.no_grad():
            if p.dtype == torch.uint8:
                absmax = local(parameters[name.removesuffix("weight") + "absmax"])
                inputs = 2 * p.shape[1]
                reader.quantized_rows(name, inputs, start, stop, local(p), absmax)
            else:
                local(p).copy_(reader.rows(name, start, stop))


def weight_names(files: dict[str, Path]) -> list[str]:
    """The model's own names: without what bitsandbytes keeps beside a weight."""
    return [name for name in files if name.endswith((".weight", ".bias"))]


def give_back_freed_blocks(device) -> None:
    """On a CPU under glibc: blocks of 4 MB and more go back to the system when they are freed.

    Dequantised weights come and go; on the heap small activations settle in the holes they leave,
    and peak memory grows by half of the 16-bit model."""
    if torch.device(device).type == "cpu" and platform.libc_ver()[0] == "glibc":
        m_mmap_threshold = -3  # malloc.h
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 4 * 2**20)


def load_4bit(path, dtype: torch.dtype = torch.float32, device="cpu") -> Transformer:
    """As model.load_pretrained, with the linear layers in 4 bits."""
    give_back_freed_blocks(device)
    model = to_4bit(empty_model(path, dtype)).to_empty(device=device)
    model.inv_freq = inverse_frequencies(model.config).to(device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    read_4bit(model, model.source, dtype, lambda p: (0, p.shape[0]), lambda p: p)
    return model


def base_weight(model: Transformer, name: str, layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """A 4-bit layer's weight: the original one where its 16 bits are at hand, else its values."""
    if model.source:
        files = weight_files(model.source)
        if f"{name}.weight{STATE}" not in files:
            with open_safetensors(files[f"{name}.weight"]) as f:
                return f.get_tensor(f"{name}.weight").to(layer.weight.device, dtype)
    shape = (layer.out_features, layer.in_features)
    return dequantize_nf4(layer.weight, layer.absmax, shape, dtype)


def unquantized(model: Transformer) -> Transformer:
    """Every Linear4bit as an ordinary layer of the compute dtype, in place."""
    dtype = model.model.norm.weight.dtype
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    for name, layer in layers.items():
        bias = layer.bias is not None
        linear = nn.Linear(layer.in_features, layer.out_features, bias=bias, device="meta")
        weight = base_weight(model, name, layer, dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = layer.bias
        parent, _, short = name.rpartition(".")
        setattr(model.get_submodule(parent), short, linear)
    return model
