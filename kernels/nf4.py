"""NF4: frozen weights in 4 bits (QLoRA, arXiv:2305.14314), and what a projection does with them.

    block of 64 values w along a row:  absmax = max |w|,  index = nearest code of w / absmax
    value = CODE[index] · absmax

The 16 codes are quantiles of a normal distribution, stored as bitsandbytes stores them: two a
byte, the even element in the high half. A weight of 4,096 x 14,336 takes 29.4 MB of codes and
3.7 MB of absmax where bf16 takes 117 MB; a value errs by 9 % of its size (rms, normal weights).

Codes, absmax and values equal bitsandbytes' bit for bit. An all-zero block has absmax 0 and
zeros (in a last block that is shorter than the others, absmax 1e-38, as there). A weight that
holds inf or NaN is refused: one such value would make its whole block NaN.

A projection dequantises into the dtype of its input and calls the library's GEMM: a fused scalar
GEMM over 4-bit weights loses by far. Backward dequantises again and keeps nothing.

impl   "reference"  plain PyTorch, the definition of correct, and what a CPU runs
       "triton"     the kernel of nf4_triton.py; on a CPU only in Triton's interpreter
       "auto"       triton on a GPU, else reference
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.logps import HAS_TRITON

BLOCK = 64  # values that share an absmax
IMPLS = ("auto", "triton", "reference")
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
PIECE = 2**20  # values quantised at a time, so that temporaries stay below 20 MB


# ------------------------------------------------------------------------ weights
@torch.no_grad()
def quantize_nf4(
    weight: Tensor,  # any shape, float
    blocksize: int = BLOCK,
    name: str = "weight",  # for the error
) -> tuple[Tensor, Tensor]:
    """Codes, two per byte, (ceil(n / 2),) uint8, and absmax (ceil(n / blocksize),) fp32."""
    if blocksize < 2 or blocksize % 2:
        raise ValueError(f"blocksize must be even and positive, got {blocksize}")
    flat = weight.reshape(-1)
    size = max(1, PIECE // blocksize) * blocksize
    pieces = [_quantize(piece.float(), blocksize) for piece in flat.split(size)]
    codes, absmax = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    if not absmax.isfinite().all():
        raise ValueError(f"{name} holds inf or NaN and cannot be quantised to 4 bits")
    return codes, absmax


def _quantize(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Of (n,) fp32. A whole block is scaled by 1 / absmax, a shorter last one divided, as there."""
    whole = len(values) // blocksize * blocksize
    blocks = values[:whole].view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).view(-1)
    if whole < len(values):
        rest = values[whole:]
        largest = rest.abs().amax(dim=0, keepdim=True).clamp(min=1e-38)
        absmax, scaled = torch.cat([absmax, largest]), torch.cat([scaled, rest / largest])
    code = torch.tensor(CODE, device=values.device)
    index = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)
    if len(index) % 2:
        index = F.pad(index, (0, 1), value=CODE.index(0.0))
    return index[::2] << 4 | index[1::2], absmax


def dequantize_nf4(
    codes: Tensor,  # uint8, two values each, in row-major order
    absmax: Tensor,  # fp32, one per block
    shape: tuple[int, ...],
    dtype: torch.dtype,
    impl: str = "auto",
    blocksize: int = BLOCK,
) -> Tensor:
    """The values, computed in fp32 and rounded once to `dtype`."""
    n = math.prod(shape)
    if codes.dtype != torch.uint8 or codes.numel() != -(-n // 2):
        raise ValueError(
            f"expected {-(-n // 2)} bytes of codes for shape {tuple(shape)}, "
            f"got {codes.numel()} of {codes.dtype}"
        )
    if absmax.dtype != torch.float32 or absmax.numel() != -(-n // blocksize):
        raise ValueError(
            f"expected {-(-n // blocksize)} fp32 absmax for shape {tuple(shape)}, "
            f"got {absmax.numel()} of {absmax.dtype}"
        )
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}: use one of {', '.join(IMPLS)}")
    if impl == "auto":
        impl = "triton" if codes.is_cuda and HAS_TRITON else "reference"
    if impl == "reference":
        return dequantize_nf4_reference(codes, absmax, shape, dtype, blocksize)
    from kernels import nf4_triton

    return nf4_triton.dequantize(codes, absmax, shape, dtype, blocksize, CODE)


def dequantize_nf4_reference(codes, absmax, shape, dtype, blocksize: int = BLOCK) -> Tensor:
    """The definition: look up, multiply, round; in pieces, so that temporaries are small."""
    n, size = math.prod(shape), max(1, PIECE // (2 * blocksize)) * 2 * blocksize
    code = torch.tensor(CODE, device=codes.device)
    pairs = torch.cartesian_prod(code, code)  # (256, 2): the two values of each byte
    codes, absmax = codes.reshape(-1), absmax.reshape(-1)
    values = torch.empty(n, dtype=dtype, device=codes.device)
    for start in range(0, n, size):
        stop = min(start + size, n)
        piece = F.embedding(codes[start // 2 : (stop + 1) // 2].int(), pairs).view(-1)
        scale = absmax[start // blocksize : -(-stop // blocksize)]
        scale = scale.repeat_interleave(blocksize)[: stop - start]
        values[start:stop] = piece[: stop - start] * scale
    return values.view(shape)


# ------------------------------------------------------------------------ projection
@lru_cache
def outside_graphs(function: Callable) -> Callable:
    """The function, left out of torch.compile's graphs: they would keep a dequantised weight from
    forward to backward, 16 bits after all. Called where a 4-bit layer is made, not on import: it
    loads the compiler, which takes a second."""
    return torch.compiler.disable(function)


def linear_4bit(
    x: Tensor,  # (..., in)
    codes: Tensor,  # (out, in / 2) uint8
    absmax: Tensor,  # (out, in / 64) fp32
    bias: Tensor | None = None,  # (out,)
) -> Tensor:  # (..., out)
    """x Ŵᵀ + b with Ŵ frozen. Gradients reach x alone."""
    return _Linear4bit.apply(x, codes, absmax, bias)


def matrix(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Ŵ (out, in) of codes (out, in / 2)."""
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
