"""NF4: frozen weights in 4 bits (QLoRA, arXiv:2305.14314), and the projection that uses them.

    block of 64 values w along a row:  absmax = max |w|,  index = nearest code of w / absmax
    value = CODE[index] · absmax

The 16 codes are quantiles of a normal distribution, stored as in bitsandbytes: two per byte,
the even element in the high half. A weight of 4,096 x 14,336 takes 29.4 MB of codes and
3.7 MB of absmax where bf16 takes 117 MB; a value errs by 9 % of its size (rms, normal weights).

Codes, absmax and values equal bitsandbytes' bit for bit. Blocks are whole: a row has a multiple of
64 elements. An all-zero block has absmax 0 and zeros. A weight that holds inf or NaN is refused,
because one such value would make its whole block NaN.

A projection dequantises into the dtype of its input and calls the library's GEMM: a fused scalar
GEMM over 4-bit weights is much slower. Backward dequantises again and keeps nothing.

impl   "reference"  plain PyTorch, the definition of correct, and what a CPU runs
       "triton"     the kernel of nf4_triton.py; on a CPU only in Triton's interpreter
       "auto"       triton on a GPU, else reference
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.logps import HAS_TRITON

BLOCK = 64  # values that share an absmax
IMPLS = ("auto", "triton", "reference")
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
PIECE = 2**20  # values at a time, so that temporaries stay below 20 MB


# ------------------------------------------------------------------------ weights
@torch.no_grad()
def quantize_nf4(
    weight: Tensor,  # any shape, float
    name: str = "weight",  # for the error
) -> tuple[Tensor, Tensor]:
    """Codes, two per byte, (n / 2,) uint8, and absmax (n / 64,) fp32, of n = weight.numel()."""
    assert weight.numel() % BLOCK == 0, f"{name}: {tuple(weight.shape)} is not whole blocks"
    pieces = [_quantize(piece.float()) for piece in weight.reshape(-1).split(PIECE)]
    codes, absmax = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    if not absmax.isfinite().all():
        raise ValueError(f"{name} holds inf or NaN and cannot be quantised to 4 bits")
    return codes, absmax


def _quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and absmax of (n,) fp32; scaled by 1 / absmax, as bitsandbytes does, not divided."""
    blocks = values.view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).view(-1)
    code = torch.tensor(CODE, device=values.device)
    index = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)
    return index[::2] << 4 | index[1::2], absmax


def dequantize_nf4(
    codes: Tensor,  # uint8, two values each, in row-major order
    absmax: Tensor,  # fp32, one per block
    shape: tuple[int, ...],
    dtype: torch.dtype,
    impl: str = "auto",
) -> Tensor:
    """Dequantise in fp32, rounded once to `dtype`."""
    given = (codes.dtype, 2 * codes.numel(), absmax.dtype, BLOCK * absmax.numel())
    n = math.prod(shape)
    assert given == (torch.uint8, n, torch.float32, n), f"{given} for shape {tuple(shape)}"
    assert impl in IMPLS, f"unknown impl {impl!r}: use one of {', '.join(IMPLS)}"
    if impl == "triton" or (impl == "auto" and codes.is_cuda and HAS_TRITON):
        from kernels import nf4_triton

        return nf4_triton.dequantize(codes, absmax, shape, dtype, CODE)
    return dequantize_nf4_reference(codes, absmax, shape, dtype)


def dequantize_nf4_reference(codes, absmax, shape, dtype) -> Tensor:
    """The definition: look up, multiply, round; in pieces, so that temporaries are small."""
    code = torch.tensor(CODE, device=codes.device)
    pairs = torch.cartesian_prod(code, code)  # (256, 2): the two values of each byte
    values = torch.empty(shape, dtype=dtype, device=codes.device)
    places = (codes.reshape(-1).split(PIECE // 2), absmax.reshape(-1).split(PIECE // BLOCK))
    for out, byte, scale in zip(values.view(-1).split(PIECE), *places, strict=True):
        piece = F.embedding(byte.int(), pairs).view(-1, BLOCK)
        out.copy_((piece * scale[:, None]).view(-1))
    return values


# ------------------------------------------------------------------------ projection
@lru_cache
def outside_graphs(function: Callable) -> Callable:
    """Keep the function out of torch.compile's graphs.
    They would hold the 16-bit weight from forward to backward. It is called when a 4-bit layer is
    made, not on import, because it loads the compiler, which takes a second."""
    return torch.compiler.disable(function)


def linear_4bit(
    x: Tensor,  # (..., in)
    codes: Tensor,  # (out, in / 2) uint8
    absmax: Tensor,  # (out, in / 64) fp32
    bias: Tensor | None = None,  # (out,)
) -> Tensor:  # (..., out)
    """x Ŵᵀ + b with Ŵ frozen. Gradients reach only x."""
    return _Linear4bit.apply(x, codes, absmax, bias)


def matrix(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Ŵ (out, in) from codes (out, in / 2)."""
    return dequantize_nf4(codes, absmax, (codes.shape[0], 2 * codes.shape[1]), dtype)


class _Linear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, absmax)
        return F.linear(x, matrix(codes, absmax, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        codes, absmax = ctx.saved_tensors
        return grad @ matrix(codes, absmax, grad.dtype), None, None, None


class Linear4bit(nn.Linear):
    """A frozen layer: `weight` holds codes (out, in / 2) uint8, `absmax` is (out, in / 64) fp32.

    Rows are whole blocks, so that they can be divided over ranks."""

    def __init__(self, linear: nn.Linear, name: str):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if self.in_features % BLOCK:
            width = f"{name} has {self.in_features} inputs, not a multiple of {BLOCK}"
            raise ValueError(f"--load_in_4bit: {width}")
        device, out = linear.weight.device, self.out_features
        codes = torch.empty(out, self.in_features // 2, dtype=torch.uint8, device=device)
        absmax = torch.empty(out, self.in_features // BLOCK, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.absmax = nn.Parameter(absmax, requires_grad=False)
        self.bias = linear.bias
        self.project_4bit = outside_graphs(linear_4bit)

    def forward(self, x: Tensor) -> Tensor:
        return self.project_4bit(x, self.weight, self.absmax, self.bias)
