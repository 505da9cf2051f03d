"""Log-probability and argmax of a language-model head, without ever holding all of its logits.

    logits = hidden @ weight.T                      (M, V), never materialised
    logp_n = logits[n, label_n] - logsumexp(logits[n])
    best_n = argmax(logits[n])

At M = 4,096 rows and V = 128,256 the logits alone would be 2.1 GB in fp32, their softmax and
gradient as much again. Here the vocabulary is walked in slabs, as in FlashAttention with
keys = values = the head: a GEMM with fp32 output gives a slab's logits, one pass over them the
statistics of its tiles (maximum, sum of exponentials, argmax, label's logit), and the tiles are
combined at the end. Everything is fp32 inside, whatever the inputs: logits rounded to bf16 would
cost 1e-2 nats per token, more than many preferences are worth.

Frozen head (LoRA): row n of the gradient, d logp_n / d hidden_n = W[label_n] - softmax_n W,
depends on nothing that comes later, so the forward pass keeps it (M, D) and backward is one
multiplication, whatever loss sits on top: two GEMMs instead of three, and nothing of the head's
size. Trainable head: backward walks the slabs once more and also accumulates d weight.

Size of a slab: a logit takes 4 bytes, and its exponential, which the second GEMM reads, as many
as an element of `hidden`. A slab takes as many rows of the head as fit both, for M rows, into
SLAB_BYTES, in multiples of MIN_SLAB. So scratch memory never depends on the vocabulary, and up to
about 690 rows in bf16 an 8B model's head is a single slab. (On a CPU half-precision inputs are also
upcast: 4 D bytes more for each row of the slab.)

impl   "reference"  three lines of plain PyTorch, the definition of correct
       "slabs"      the walk in PyTorch, for the CPU
       "triton"     the walk with two kernels of logps_triton.py; on a CPU in Triton's interpreter
       "fused"      the third kernel there: logits stay on the chip, backward recomputes them
       "auto"       triton on a GPU, else slabs

Legend: M scored rows, D hidden_size, V vocab_size, S rows of the head in one slab,
T tiles of the vocabulary.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

SLAB_BYTES = 512 * 2**20  # of one slab's logits and their exponentials
MIN_SLAB = 1024  # rows of the head; below this the GEMM is bound by reading `hidden` again
IMPLS = ("auto", "triton", "fused", "slabs", "reference")
HAS_TRITON = importlib.util.find_spec("triton") is not None  # there is no wheel outside Linux


def label_logps(
    hidden: Tensor,  # (M, D) float
    weight: Tensor,  # (V, D) float
    labels: Tensor,  # (M,) int64 in [0, V)
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-prob of each row's label (M,) fp32, differentiable, and each row's argmax (M,) int64.
    The lowest id wins a tie."""
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}"
    assert hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1], shapes
    assert labels.shape == hidden.shape[:1], f"{shapes}, labels {tuple(labels.shape)}"
    assert hidden.dtype == weight.dtype, f"hidden {hidden.dtype}, weight {weight.dtype}"
    assert impl in IMPLS, f"unknown impl {impl!r}: use one of {', '.join(IMPLS)}"
    if impl == "reference":
        return label_logps_reference(hidden, weight, labels)
    if impl == "auto":
        impl = "triton" if hidden.is_cuda and HAS_TRITON else "slabs"
    # the gradient of a frozen head is formed in the forward pass;
    # "fused" never has the exponentials that this needs
    needs_grad = torch.is_grad_enabled() and hidden.requires_grad
    grad_in_forward = needs_grad and not weight.requires_grad and impl != "fused"
    return _LabelLogps.apply(hidden, weight, labels, impl, grad_in_forward)


def label_logps_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: full fp32 logits, logsumexp, gather, argmax."""
    logits = hidden.float() @ weight.float().T  # (M, V)
    label_logits = logits.gather(1, labels[:, None]).squeeze(1)
    return label_logits - logits.logsumexp(dim=1), logits.argmax(dim=1)


def mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with fp32 sums and fp32 output, never rounded to the dtype of the inputs."""
    if b.is_cuda and a.dtype == b.dtype != torch.float32:
        # products of two bf16 numbers are exact in fp32
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # on CPU an fp32 GEMM is 5-7 times faster than a bf16 one


def _gemm_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that the fp32 factor of a GEMM with the head is rounded to.
    On a GPU it is the head's, because an fp32 GEMM would be slow."""
    return hidden.dtype if hidden.is_cuda else torch.float32


def _slabs(num_rows: int, vocab_size: int, element_size: int) -> list[tuple[int, int]]:
    """Divide the vocabulary into slabs, as the module docstring says."""
    fitting = SLAB_BYTES // ((4 + element_size) * max(1, num_rows))
    size = max(1, fitting // MIN_SLAB) * MIN_SLAB
    return [(start, min(start + size, vocab_size)) for start in range(0, vocab_size, size)]


# Statistics of T vocabulary tiles: (max (M, T), sum (M, T), best (M, T)).
# `sum` is Σ exp(logit - max) over the tile without the label: where p(label) is near 1, the
# other tokens' small share is what matters. No tile waits for another.
Tiles = tuple[Tensor, Tensor, Tensor]


def _slab_statistics(
    logits: Tensor,  # (M, S) fp32, overwritten
    labels: Tensor,  # (M,)
    label_logits: Tensor,  # (M,) fp32, filled in where the label lies in this slab
    start: int,  # vocabulary id of the first column
    running_max: Tensor,  # (M,) over all slabs so far
    probs_dtype: torch.dtype | None,  # not used here: the exponentials come anyway, in fp32
) -> tuple[Tiles, Tensor, Tensor]:
    """Statistics of one slab as a single tile, the new running maximum (M,), and exponentials.
    The exponentials (M, S) are exp(logits - new maximum), 0 for the label.

    The tile's `max` is the running one; the first tile that has the final maximum holds the argmax.
    """
    slab_max, slab_best = logits.max(dim=1)
    new_max = torch.maximum(running_max, slab_max)
    in_slab = (labels >= start) & (labels < start + logits.shape[1])
    index = torch.where(in_slab, labels - start, 0)[:, None]
    label_logits.copy_(torch.where(in_slab, logits.gather(1, index).squeeze(1), label_logits))
    probs = logits.sub_(new_max[:, None]).exp_()
    kept = torch.where(in_slab, 0.0, probs.gather(1, index).squeeze(1))
    probs.scatter_(1, index, kept[:, None])
    tile = (new_max[:, None], probs.sum(dim=1, keepdim=True), slab_best[:, None] + start)
    return tile, new_max, probs


class _LabelLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, impl: str, grad_in_forward: bool
    ):
        M, D = hidden.shape
        statistics = _slab_statistics
        if impl in ("triton", "fused"):
            from kernels import logps_triton

            statistics = logps_triton.slab_statistics
        label_logits = hidden.new_zeros((M,), dtype=torch.float32)
        if impl == "fused":
            tiles = [logps_triton.fused_statistics(hidden, weight, labels, label_logits)]
        else:
            tiles = []
            running_max = hidden.new_full((M,), -torch.inf, dtype=torch.float32)
            # Σ p_v W_v over v != label, relative to the running maximum
            others = hidden.new_zeros((M, D), dtype=torch.float32) if grad_in_forward else None
            probs_dtype = hidden.dtype if grad_in_forward else None
            for start, stop in _slabs(M, weight.shape[0], hidden.element_size()):
                slab = weight[start:stop]
                logits = mm_fp32(hidden, slab.T)  # (M, S)
                tile, new_max, probs = statistics(
                    logits, labels, label_logits, start, running_max, probs_dtype
                )
                tiles.append(tile)
                if grad_in_forward:
                    others.mul_(torch.exp(running_max - new_max)[:, None])
                    others.add_(mm_fp32(probs.to(_gemm_dtype(hidden)), slab))
                running_max = new_max

        joined = [torch.cat(parts, dim=1) for parts in zip(*tiles, strict=True)]
        tile_max, tile_sum, tile_best = joined  # (M, T)
        # the first of equals: the lowest id wins a tie
        max_logit, first = tile_max.max(dim=1, keepdim=True)
        best = tile_best.gather(1, first).squeeze(1)
        others_sum = (tile_sum * torch.exp(tile_max - max_logit)).sum(dim=1)
        max_logit = max_logit.squeeze(1)
        # log p = -log(1 + others / label): no digit is lost at p near 1, nor at logits of 1e4
        logps = -F.softplus(others_sum.log() + (max_logit - label_logits))
        total = others_sum + (label_logits - max_logit).exp()
        rest = others_sum / total  # 1 - p(label)
        if grad_in_forward:
            row_grads = rest[:, None] * weight[labels].float() - others / total[:, None]
            ctx.save_for_backward(row_grads)  # fp32, or it would be rounded twice
            ctx.dtype = hidden.dtype
        else:
            ctx.save_for_backward(hidden, weight, labels, max_logit, total, rest)
        ctx.grad_in_forward = grad_in_forward
        ctx.mark_non_differentiable(best)
        return logps, best

    @staticmethod
    def backward(ctx, grad_logps: Tensor, _):
        if ctx.grad_in_forward:
            (row_grads,) = ctx.saved_tensors
            return (grad_logps[:, None] * row_grads).to(ctx.dtype), None, None, None, None
        # d logp_n / d logits_n = onehot(label_n) - softmax_n, slab by slab;
        # the upstream gradient scales whole rows
        hidden, weight, labels, max_logit, total, rest = ctx.saved_tensors
        rows, gemm_dtype = torch.arange(len(hidden), device=hidden.device), _gemm_dtype(hidden)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        scaled_hidden = (grad_logps[:, None] * hidden.float()).to(gemm_dtype)
        for start, stop in _slabs(len(hidden), weight.shape[0], hidden.element_size()):
            slab = weight[start:stop]
            dlogits = mm_fp32(hidden, slab.T)  # (M, S)
            dlogits.sub_(max_logit[:, None]).exp_().div_(-total[:, None])
            in_slab = (labels >= start) & (labels < stop)
            index = torch.where(in_slab, labels - start, 0)
            dlogits[rows, index] = torch.where(in_slab, rest, dlogits[rows, index])
            dlogits = dlogits.to(gemm_dtype)
            grad_hidden.add_(mm_fp32(dlogits, slab))
            if grad_weight is not None:
                grad_weight[start:stop] = mm_fp32(dlogits.T, scaled_hidden)
        return (grad_logps[:, None] * grad_hidden).to(hidden.dtype), grad_weight, None, None, None
