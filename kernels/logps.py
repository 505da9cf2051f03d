"""Log-probability and argmax of a language-model head, without ever holding all of its logits.

    logits = hidden @ weight.T                      (M, V), never materialised
    logp_n = logits[n, label_n] - logsumexp(logits[n])
    best_n = argmax(logits[n])

At M = 4,096 rows and V = 128,256 the logits alone would be 2.1 GB in fp32, their softmax and gradient as much again.
Here the vocabulary is walked in slabs; per slab a running maximum, a running sum, the label's logit and the best
index are kept, as in FlashAttention with keys = values = the head. Everything is fp32 inside, whatever the inputs:
logits rounded to bf16 would cost 1e-2 nats per token, more than many preferences are worth.

Frozen head (LoRA): row n of the gradient, d logp_n / d hidden_n = W[label_n] - softmax_n W, depends on nothing that
comes later, so the forward pass keeps it (M, D) and backward is one multiplication, whatever loss sits on top.
Trainable head: backward walks the slabs once more and also accumulates d weight.

`impl="reference"` is three lines of plain PyTorch, the definition of correct; `impl="slabs"` is the loop above, in
PyTorch, for CPU and GPU. `impl="auto"` picks the slabs.

Legend: M scored rows, D hidden_size, V vocab_size, S rows of the head in one slab.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SLAB_BYTES = 256 * 2**20  # fp32 logits of one slab; small enough to stay out of the way, large enough for a GEMM
MIN_SLAB = 1024  # head rows; below this the GEMM is bound by reading `hidden` again


def label_logps(
    hidden: Tensor,  # (M, D) float
    weight: Tensor,  # (V, D) float
    labels: Tensor,  # (M,) int64 in [0, V)
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's label (M,) fp32, differentiable, and each row's argmax (M,) int64, lowest id first."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden (M, D) and weight (V, D), got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"expected labels of shape ({hidden.shape[0]},), got {tuple(labels.shape)}")
    if impl == "reference":
        return label_logps_reference(hidden, weight, labels)
    if impl not in ("auto", "slabs"):
        raise ValueError(f"unknown impl {impl!r}: use auto, slabs or reference")
    return _LabelLogps.apply(hidden, weight, labels)


def label_logps_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: full fp32 logits, logsumexp, gather, argmax."""
    logits = hidden.float() @ weight.float().T  # (M, V)
    label_logits = logits.gather(1, labels[:, None]).squeeze(1)
    return label_logits - logits.logsumexp(dim=1), logits.argmax(dim=1)


def fp32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T with fp32 output, never rounded to the input's dtype; (M, D), (S, D) -> (M, S)."""
    if hidden.is_cuda and hidden.dtype == weight.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)  # bf16 products are exact in fp32
    return hidden.float() @ weight.float().T  # on CPU an fp32 GEMM is 5-7 times faster than a bf16 one


def _slabs(num_rows: int, vocab_size: int) -> list[tuple[int, int]]:
    """Cut the vocabulary so that one slab's fp32 logits stay below SLAB_BYTES (but no slab below MIN_SLAB)."""
    size = max(MIN_SLAB, SLAB_BYTES // (4 * max(1, num_rows)))
    return [(start, min(start + size, vocab_size)) for start in range(0, vocab_size, size)]


class _LabelLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor):
        M, D = hidden.shape
        grad_in_forward = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        running_max = hidden.new_full((M,), -torch.inf, dtype=torch.float32)
        # The label's own column stays out of both sums: where p(label) is near 1, what matters is what is left beside it.
        others_sum = hidden.new_zeros((M,), dtype=torch.float32)
        label_logits = hidden.new_zeros((M,), dtype=torch.float32)
        best = labels.new_zeros((M,))
        # sum of p_v W_v over v != label, relative to the running maximum
        others = hidden.new_zeros((M, D), dtype=torch.float32) if grad_in_forward else None

        for start, stop in _slabs(M, weight.shape[0]):
            slab = weight[start:stop]
            logits = fp32_logits(hidden, slab)  # (M, S)
            slab_max, slab_best = logits.max(dim=1)
            best = torch.where(slab_max > running_max, slab_best + start, best)  # strict: the lowest id wins a tie
            new_max = torch.maximum(running_max, slab_max)
            rescale = torch.exp(running_max - new_max)
            in_slab = (labels >= start) & (labels < stop)
            index = torch.where(in_slab, labels - start, 0)[:, None]
            label_logits = torch.where(in_slab, logits.gather(1, index).squeeze(1), label_logits)
            probs = logits.sub_(new_max[:, None]).exp_()  # (M, S), relative to the running maximum
            kept = torch.where(in_slab, 0.0, probs.gather(1, index).squeeze(1))
            probs.scatter_(1, index, kept[:, None])
            others_sum = others_sum * rescale + probs.sum(dim=1)
            if grad_in_forward:
                others = others.mul_(rescale[:, None]).addmm_(probs, slab.float())
            running_max = new_max

        # log p = -log(1 + others / label): no digit is lost at p near 1, nor at logits of 1e4
        logps = -F.softplus(others_sum.log() + (running_max - label_logits))
        total = others_sum + (label_logits - running_max).exp()
        rest = others_sum / total  # 1 - p(label)
        if grad_in_forward:
            row_grads = rest[:, None] * weight[labels].float() - others / total[:, None]
            ctx.save_for_backward(row_grads.to(hidden.dtype))
        else:
            ctx.save_for_backward(hidden, weight, labels, running_max, total, rest)
        ctx.grad_in_forward = grad_in_forward
        ctx.mark_non_differentiable(best)
        return logps, best

    @staticmethod
    def backward(ctx, grad_logps: Tensor, _):
        if ctx.grad_in_forward:
            (row_grads,) = ctx.saved_tensors
            return (grad_logps[:, None] * row_grads).to(row_grads.dtype), None, None
        # d logp_n / d logits_n = onehot(label_n) - softmax_n, slab by slab
        hidden, weight, labels, running_max, total, rest = ctx.saved_tensors
        M, D = hidden.shape
        rows = torch.arange(M, device=hidden.device)
        grad_hidden = hidden.new_zeros((M, D), dtype=torch.float32)
        grad_weight = torch.empty_like(weight)
        for start, stop in _slabs(M, weight.shape[0]):
            slab = weight[start:stop]
            dlogits = fp32_logits(hidden, slab).sub_(running_max[:, None]).exp_().div_(-total[:, None])  # (M, S)
            in_slab = (labels >= start) & (labels < stop)
            index = torch.where(in_slab, labels - start, 0)
            dlogits[rows, index] = torch.where(in_slab, rest, dlogits[rows, index])
            dlogits *= grad_logps[:, None]
            grad_hidden.addmm_(dlogits, slab.float())
            grad_weight[start:stop] = dlogits.T @ hidden.float()
        return grad_hidden.to(hidden.dtype), grad_weight, None
