"""The Triton kernel of nf4.py: 4-bit codes -> values, at the speed of memory.

One program owns BLOCKS blocks: it loads each absmax once and 16 bytes of codes a thread, looks the
two values of a byte up in a table of 64 bytes, which stays in the first-level cache, and stores
them side by side. Per value of bf16 it moves 0.5 + 0.06 + 2 bytes.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction


@triton.jit(do_not_specialize=["num_blocks"])
def _dequantize_kernel(
    codes, absmax, table, values,  # pointers
    num_blocks,
    BLOCKS: tl.constexpr, HALF: tl.constexpr,  # HALF: bytes of a block
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (block < num_blocks)[:, None]
    at = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    byte = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    scale = tl.load(absmax + block, mask=block < num_blocks, other=0.0)[:, None]
    even = tl.load(table + (byte >> 4)) * scale
    odd = tl.load(table + (byte & 15)) * scale
    out = tl.interleave(even, odd)  # (BLOCKS, 2 HALF)
    at = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(values + at, out.to(values.dtype.element_ty), mask=inside)


INTERPRETED = isinstance(_dequantize_kernel, InterpretedFunction)


def _tile(num_blocks: int) -> dict:
    """2,048 bytes of codes for 128 threads, 16 each; interpreted, programs are few and large."""
    if INTERPRETED:
        return {"BLOCKS": min(4096, triton.next_power_of_2(num_blocks)), "HALF": 32}
    return {"BLOCKS": 64, "HALF": 32, "num_warps": 4}


def dequantize(
    codes: Tensor,
    absmax: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    code: tuple[float, ...],  # the 16 values of nf4.CODE
) -> Tensor:
    """Same as nf4.dequantize_nf4_reference."""
    if codes.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            "Triton needs a GPU; on a CPU use impl='reference', "
            "or set TRITON_INTERPRET=1 before starting Python"
        )
    # the interpreter truncates to bf16 where a GPU rounds: then PyTorch rounds instead
    stored = torch.float32 if INTERPRETED else dtype
    values = torch.empty(shape, dtype=stored, device=codes.device)
    tile, table = _tile(absmax.numel()), _table(code, codes.device)
    grid = (triton.cdiv(absmax.numel(), tile["BLOCKS"]),)
    with torch.cuda.device_of(codes):  # Triton launches on the current GPU
        _dequantize_kernel[grid](
            codes.contiguous(), absmax.contiguous(), table, values, absmax.numel(), **tile
        )
    return values.to(dtype)


@lru_cache
def _table(code: tuple[float, ...], device: torch.device) -> Tensor:
    """The 16 values on that device; copied once, because a copy from the host waits for the GPU."""
    return torch.tensor(code, device=device)
