"""Adapted projections of one input (q, k, v; gate, up; or one) as a single autograd function.

    y_i = x W_i^T + b_i + scaling · drop(x) A_i^T B_i^T

with W_i, b_i frozen; A_i (r, in), B_i (out, r) trained.

Written naively, each adapter reads and writes y_i three more times (its own output, the scaling,
the sum), runs a GEMM that is r wide, and keeps what it makes. Here the A_i are stacked, so that
one GEMM of all their rows serves the group; the low-rank part is added into y_i in place
(`addmm_`); backward keeps x, the (tokens, Σ r) product and dropout's mask, computes nothing for
the frozen weights, and skips d x where it is not needed. Gradients of A and B are summed and
stored in fp32 even over a bf16 base. Dropout draws one mask per group instead of one per
projection: every adapter still sees an input dropped out with the same probability.

`adapted_projections_reference` is the naive form, used where a W_i is trained too.

Legend: T tokens (all leading dimensions), r LoRA rank, R = Σ r over the group's adapters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.logps import mm_fp32
from kernels.nf4 import matrix


def adapted_projections(
    x: Tensor,  # (..., in)
    weights: list[Tensor],  # (out_i, in)
    biases: list[Tensor | None],
    As: list[Tensor | None],  # (r, in); None with its B: a projection without adapter
    Bs: list[Tensor | None],  # (out_i, r)
    scaling: float,
    dropout: float = 0.0,  # probability, 0 in evaluation
    absmaxes: list[Tensor | None] | None = None,  # if set, the weight is 4-bit codes (nf4.py)
) -> tuple[Tensor, ...]:  # (..., out_i)
    """Compute all projections of x.

    Gradients reach x, the As and the Bs; the weights and biases must be frozen."""
    absmaxes = absmaxes or [None] * len(weights)
    if any(t is not None and t.requires_grad for t in (*weights, *biases)):
        return adapted_projections_reference(x, weights, biases, As, Bs, scaling, dropout, absmaxes)
    flat = x.reshape(-1, x.shape[-1])
    tensors = (*weights, *biases, *As, *Bs, *absmaxes)
    outputs = _AdaptedProjections.apply(flat, scaling, dropout, len(weights), *tensors)
    return tuple(y.view(*x.shape[:-1], -1) for y in outputs)


def adapted_projections_reference(
    x, weights, biases, As, Bs, scaling, dropout=0.0, absmaxes=None
) -> tuple[Tensor, ...]:
    """The definition: one projection after the other."""
    dropped, outputs = F.dropout(x, dropout), []
    absmaxes = absmaxes or [None] * len(weights)
    for W, b, A, B, absmax in zip(weights, biases, As, Bs, absmaxes, strict=True):
        y = F.linear(x, _values(W, absmax, x.dtype), b)
        if A is not None:
            y = y + F.linear(scaling * F.linear(dropped, A.to(x.dtype)), B.to(x.dtype))
        outputs.append(y)
    return tuple(outputs)


def _values(weight: Tensor, absmax: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight itself, or dequantised from its 4-bit codes for one GEMM."""
    return weight if absmax is None else matrix(weight, absmax, dtype)


def _add_product(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + a b, in y's memory except in compiled code.
    There torch 2.11 loses the gradient of an output changed in place; memory is reused anyway."""
    return y.addmm(a, b) if torch.compiler.is_compiling() else y.addmm_(a, b)


class _AdaptedProjections(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scaling: float, dropout: float, n: int, *tensors):  # n projections
        weights, biases, As, Bs, absmaxes = (tensors[i * n : (i + 1) * n] for i in range(5))
        adapted = [i for i in range(n) if As[i] is not None]
        A = torch.cat([As[i] for i in adapted]).to(x.dtype)  # (R, in)
        Bs = [Bs[i].to(x.dtype) for i in adapted]
        ranks = [B.shape[1] for B in Bs]
        dropped, mask = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        low = (dropped @ A.T).mul_(scaling)  # (T, R)
        outputs = [
            F.linear(x, _values(W, absmax, x.dtype), b)
            for W, b, absmax in zip(weights, biases, absmaxes, strict=True)
        ]
        for i, B, part in zip(adapted, Bs, low.split(ranks, dim=1), strict=True):
            outputs[i] = _add_product(outputs[i], part, B.T)
        ctx.save_for_backward(x, mask, low, A, *Bs, *weights, *absmaxes)
        ctx.scaling, ctx.dropout = scaling, dropout
        ctx.n, ctx.adapted, ctx.ranks = n, adapted, ranks
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        x, mask, low, A, *rest = ctx.saved_tensors
        Bs, rest = rest[: len(ctx.adapted)], rest[len(ctx.adapted) :]
        weights, absmaxes = rest[: ctx.n], rest[ctx.n :]
        keep = 1 / (1 - ctx.dropout) if mask is not None else 1.0
        dropped = x if mask is None else x * mask * keep

        # y = ... + low B^T, low = scaling · dropped A^T
        low_grads = [grads[i] @ B for i, B in zip(ctx.adapted, Bs, strict=True)]
        grad_low = torch.cat(low_grads, dim=1).mul_(ctx.scaling)  # (T, R)
        grad_As, grad_Bs = [None] * ctx.n, [None] * ctx.n
        rows = mm_fp32(grad_low.T, dropped).split(ctx.ranks)
        for i, row, part in zip(ctx.adapted, rows, low.split(ctx.ranks, dim=1), strict=True):
            # (r, T) (T, out) and then transposed: the other way round takes a CPU 8 times as long
            grad_As[i], grad_Bs[i] = row, mm_fp32(part.T, grads[i]).T

        grad_x = None
        if ctx.needs_input_grad[0]:  # the first block's input is the frozen embedding
            grad_x = grads[0] @ _values(weights[0], absmaxes[0], x.dtype)
            for grad, W, absmax in zip(grads[1:], weights[1:], absmaxes[1:], strict=True):
                grad_x.addmm_(grad, _values(W, absmax, x.dtype))
            if mask is None:
                grad_x.addmm_(grad_low, A)
            else:
                grad_x.addcmul_(grad_low @ A, mask.to(x.dtype), value=keep)
        none = [None] * ctx.n
        return grad_x, None, None, None, *none, *none, *grad_As, *grad_Bs, *none
