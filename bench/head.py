"""The head, hidden states -> log-prob of each label, in several ways: forward and backward.

    python -m bench.head

here            kernels/logps.py as training uses it: Triton slabs on a GPU, PyTorch's on a CPU
here, fused     its single Triton kernel, which recomputes the logits in backward (GPU only)
eager           inputs and logits of all rows in fp32, log_softmax, gather: exact and simple
eager, rounded  logits in the dtype of the inputs: what most trainers do; compiled: the same
torch           F.linear_cross_entropy(reduction="none"), if this torch has it

The head is frozen, as in LoRA training; rates count the two GEMMs that are needed. Errors are the
largest difference of a log-prob from float64 on the same random inputs.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import CUDA, Sizes, matrix_rate, medians, peak_gb, run
from common import parse_config
from kernels.logps import label_logps


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, impl: str = "auto") -> Tensor:
    return label_logps(hidden, weight, labels, impl)[0]


def rounded(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def torch_way(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -F.linear_cross_entropy(hidden, weight, labels, reduction="none").float()


def exact_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden.double() @ weight.double().T
    return logits.gather(1, labels[:, None]).squeeze(1) - logits.logsumexp(1)


def all_ways() -> dict[str, Callable]:
    """Name -> function of (hidden, weight, labels) that gives log-probs."""
    ways = {"here": ours, "eager": partial(ours, impl="reference"), "eager, rounded": rounded}
    if CUDA:
        ways["here, fused"] = partial(ours, impl="fused")
    if hasattr(F, "linear_cross_entropy"):
        ways["torch"] = torch_way
    return ways | {"compiled": torch.compile(rounded, dynamic=True)}


def measure(sizes: Sizes, M: int) -> str:
    """Milliseconds, share of the matrix rate, memory and error of a log-prob of each way."""
    D, V, device = sizes.config.hidden_size, sizes.config.vocab_size, sizes.device
    weight = (torch.randn(V, D, device=device) * D**-0.5).to(sizes.torch_dtype)
    hidden = (3.5 * torch.randn(M, D, device=device)).to(sizes.torch_dtype)  # |logit| up to 20
    labels, upstream = torch.randint(V, (M,), device=device), torch.randn(M, device=device)
    exact = exact_logps(hidden, weight, labels)
    hidden.requires_grad_()

    def call(way: Callable) -> Tensor:
        logps = way(hidden, weight, labels)
        torch.autograd.grad(logps, hidden, upstream)
        return logps.detach()

    calls, found = {name: partial(call, way) for name, way in all_ways().items()}, []
    for name, s in medians(calls, sizes.seconds).items():
        error = (calls[name]().double() - exact).abs().max()
        share = f"{4 * M * D * V / s / matrix_rate(sizes):.0%}"
        memory = peak_gb(calls[name])
        found.append(f"{name}: {1000 * s:.2f} ms ({share}, {memory}, error {error:.0e})")
    return "; ".join(found)


def figures(sizes: Sizes) -> dict[str, Callable[[], str]]:
    return {f"head, {M} rows": partial(measure, sizes, M) for M in (4096, 64, 416, 832)}


if __name__ == "__main__":
    run(figures, "The head, forward and backward, frozen", parse_config(Sizes))
