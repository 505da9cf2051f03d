"""The three Triton kernels of the head (see logps.py): statistics, exponentials, a fused GEMM.

    _statistics_kernel    a tile of logits -> max, argmax, label's logit, Σ exp(z - max) of the rest
    _exponentials_kernel  a tile of logits -> exp(z - running max), 0 in the label's column
    _fused_kernel         a tile of hidden @ weight.T, kept in registers -> the same statistics

One program owns one tile of ROWS x COLS and writes its own slots: no locks, no atomics, the same
bits every time. There are as many programs as tiles, so that few rows of a wide vocabulary still
fill the GPU. With TRITON_INTERPRET=1, set before this file is imported, the same kernels run on
a CPU, for the tests; there a program costs milliseconds whatever its size, so tiles are large.
tests/test_compiled.py compiles each launch for real GPUs.

Legend: M rows, D hidden_size, V vocab_size, S columns of a slab, T tiles per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction


# ------------------------------------------------------------------------ kernels
@triton.jit
def _write_statistics(
    z, first, cols, end, label,  # logits (ROWS, COLS), the ids of their columns, where ids end
    rows, in_rows, at,
    tile_max, tile_sum, tile_best, label_logits,
):  # fmt: skip
    """Statistics of one tile, each row's at its slot `at`. Columns from id `end` on hold -inf."""
    best_logit, best = tl.max(z, axis=1, return_indices=True)  # the lowest column wins a tie
    # padded columns carry ids of the next slab: a label among those belongs to another program
    is_label = cols[None, :] == tl.where(label < end, label, -1)[:, None]
    exps = tl.where(is_label, 0.0, tl.exp(z - best_logit[:, None]))
    tl.store(tile_max + at, best_logit, mask=in_rows)
    tl.store(tile_sum + at, tl.sum(exps, axis=1), mask=in_rows)
    tl.store(tile_best + at, best.to(tl.int64) + first, mask=in_rows)
    # one tile of the vocabulary holds the label: only its program writes
    found = tl.sum(is_label.to(tl.int32), axis=1) > 0
    tl.store(label_logits + rows, tl.sum(tl.where(is_label, z, 0.0), axis=1), mask=in_rows & found)


# Sizes that no address depends on are not specialised: one kernel serves every M and vocabulary.
@triton.jit(do_not_specialize=["M", "start", "T"])
def _statistics_kernel(
    logits, labels, tile_max, tile_sum, tile_best, label_logits,  # pointers
    M, S, start, T,  # sizes; start: vocabulary id of column 0
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: M * S can pass 2**31
    first = tl.program_id(1) * COLS
    cols = first + tl.arange(0, COLS)
    in_rows, in_cols = rows < M, cols < S
    inside = in_rows[:, None] & in_cols[None, :]
    z = tl.load(logits + rows[:, None] * S + cols[None, :], mask=inside, other=0.0)
    z = tl.where(in_cols[None, :], z, -float("inf"))
    label = tl.load(labels + rows, mask=in_rows, other=-1)
    at = rows * T + tl.program_id(1)
    _write_statistics(
        z, first + start, cols + start, S + start, label, rows, in_rows, at,
        tile_max, tile_sum, tile_best, label_logits,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "start"])
def _exponentials_kernel(
    logits, labels, running_max, probs,  # pointers
    M, S, start,  # sizes
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < M)[:, None] & (cols < S)[None, :]
    at = rows[:, None] * S + cols[None, :]
    label = tl.load(labels + rows, mask=rows < M, other=-1)
    highest = tl.load(running_max + rows, mask=rows < M, other=0.0)
    exps = tl.exp(tl.load(logits + at, mask=inside, other=0.0) - highest[:, None])
    exps = tl.where((cols + start)[None, :] == label[:, None], 0.0, exps)
    tl.store(probs + at, exps.to(probs.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "V", "T"])
def _fused_kernel(
    hidden, weight, labels, tile_max, tile_sum, tile_best, label_logits,  # pointers
    M, D, V, T,  # sizes
    hidden_stride, weight_stride,  # elements from row to row
    ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies bf16 bit patterns
):  # fmt: skip
    # neighbours share columns: a slice of the head is read from memory once, then from the cache
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_col = tl.program_id(1).to(tl.int64) * COLS
    cols = first_col + tl.arange(0, COLS)
    in_rows, in_cols = rows < M, cols < V
    z = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for first in range(0, D, INNER):
        inner = first + tl.arange(0, INNER)
        h_at = rows[:, None] * hidden_stride + inner[None, :]  # (ROWS, INNER)
        w_at = cols[None, :] * weight_stride + inner[:, None]  # (INNER, COLS)
        h_mask = in_rows[:, None] & (inner < D)[None, :]
        w_mask = (inner < D)[:, None] & in_cols[None, :]
        h = tl.load(hidden + h_at, mask=h_mask, other=0.0)
        w = tl.load(weight + w_at, mask=w_mask, other=0.0)
        if UPCAST:
            h, w = h.to(tl.float32), w.to(tl.float32)
        z = tl.dot(h, w, acc=z, input_precision="ieee")  # fp32 inputs are not rounded to tf32
    z = tl.where(in_cols[None, :], z, -float("inf"))
    label = tl.load(labels + rows, mask=in_rows, other=-1)
    at = rows * T + tl.program_id(1)
    _write_statistics(
        z, first_col, cols, V, label, rows, in_rows, at,
        tile_max, tile_sum, tile_best, label_logits,
    )  # fmt: skip


# ------------------------------------------------------------------------ launching
INTERPRETED = isinstance(_fused_kernel, InterpretedFunction)


def _tile(M: int) -> dict:
    """Tile of the slab kernels: 16 logits for each of 256 threads."""
    if INTERPRETED:
        return {"ROWS": min(64, triton.next_power_of_2(M)), "COLS": 8192}
    return {"ROWS": 1, "COLS": 4096, "num_warps": 8}


def _fused_tile(M: int, element_size: int) -> dict:
    """Tile of the fused kernel: 8 warps, because 4 spill registers where rows are not aligned.

    Half precision has 32 fp32 sums for each of 256 threads, and three stages of 128 bytes of each
    row fit every GPU's shared memory. In fp32, without matrix units, half as many sums and bytes
    leave room for a second block beside the first; with 128 bytes Triton 3.9 spills on sm_89."""
    if INTERPRETED:
        return {"ROWS": min(32, triton.next_power_of_2(M)), "COLS": 4096, "INNER": 32}
    cols, inner = (128, 64) if element_size == 2 else (64, 16)
    return {"ROWS": 64, "COLS": cols, "INNER": inner, "num_warps": 8}


def _grid_and_tiles(M: int, width: int, tile: dict, device) -> tuple:
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            "Triton needs a GPU; on a CPU use impl='slabs', "
            "or set TRITON_INTERPRET=1 before starting Python"
        )
    T = triton.cdiv(width, tile["COLS"])
    dtypes = (torch.float32, torch.float32, torch.int64)
    return (triton.cdiv(M, tile["ROWS"]), T), tuple(
        torch.empty(M, T, device=device, dtype=dtype) for dtype in dtypes
    )


def slab_statistics(
    logits: Tensor,  # (M, S) fp32
    labels: Tensor,
    label_logits: Tensor,
    start: int,
    running_max: Tensor,
    probs_dtype: torch.dtype | None,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor | None]:
    """Like logps._slab_statistics, but with T tiles.

    The exponentials have the dtype of the second GEMM; they are None if it is None."""
    M, S = logits.shape
    tile = _tile(M)
    grid, tiles = _grid_and_tiles(M, S, tile, logits.device)
    labels = labels.contiguous()
    with torch.cuda.device_of(logits):  # Triton launches on the current GPU
        _statistics_kernel[grid](logits, labels, *tiles, label_logits, M, S, start, grid[1], **tile)
        new_max = torch.maximum(running_max, tiles[0].amax(dim=1))
        if probs_dtype is None:
            return tiles, new_max, None
        probs = torch.empty_like(logits, dtype=probs_dtype)
        _exponentials_kernel[grid](logits, labels, new_max, probs, M, S, start, **tile)
    return tiles, new_max, probs


def fused_statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, label_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of the whole vocabulary, (M, T) each, from hidden (M, D) and weight (V, D)."""
    hidden, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (hidden, weight))
    (M, D), V = hidden.shape, weight.shape[0]
    tile = _fused_tile(M, hidden.element_size())
    grid, tiles = _grid_and_tiles(M, V, tile, hidden.device)
    sizes = (M, D, V, grid[1], hidden.stride(0), weight.stride(0))
    with torch.cuda.device_of(hidden):
        _fused_kernel[grid](
            hidden,
            weight,
            labels.contiguous(),
            *tiles,
            label_logits,
            *sizes,
            UPCAST=INTERPRETED,
            **tile,
        )
    return tiles
