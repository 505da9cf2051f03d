"""The language-model head, hidden states -> log-prob of each label, several ways.

Forward + backward, the head frozen.

    python bench/head.py

here (walk)    kernels/logps.py as training uses it: Triton slabs on a GPU, the same walk in PyTorch
               on a CPU
here (fused)   its single Triton kernel, GEMM included; backward recomputes the logits (GPU only)
eager          fp32 logits of all rows, log_softmax, gather: what is exact and simple
eager, bf16    logits in the dtype of the inputs, then log_softmax in fp32: what most trainers do
compiled       torch.compile of `eager`
torch          F.linear_cross_entropy(reduction="none"), where this torch has it
Liger, CCE     their fused linear cross entropies, where installed (they sum the rows: every row's
               weight is 1)

Errors are the largest difference of a log-prob from float64, on the very same inputs; random hidden
states and head, logits up to about 20. The head is frozen for all, as in LoRA training; rates count
the two GEMMs that are needed.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import (
    SHAPES,
    dtype_of,
    header,
    in_fresh_process,
    interleaved,
    matrix_rate,
    parser,
    peak_mib,
    table,
)

from kernels.logps import label_logps, mm_fp32


def eager(hidden, weight, labels):
    return mm_eager(hidden, weight).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


class Fp32Logits(torch.autograd.Function):
    """hidden @ weight.T with fp32 output.

    The gradient's GEMM takes the input's dtype, as a trainer's would."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(weight)
        ctx.dtype = hidden.dtype
        return mm_fp32(hidden, weight.T)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return mm_fp32(grad, weight).to(ctx.dtype), None


mm_eager = Fp32Logits.apply


def rounded(hidden, weight, labels):
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def library_way(hidden, weight, labels):
    return -F.linear_cross_entropy(hidden, weight, labels, reduction="none").float()


def peers() -> dict[str, Callable]:
    """Installed peers; each takes (hidden, weight, labels) and gives log-probs."""
    found = {}
    if hasattr(F, "linear_cross_entropy"):
        found["torch"] = library_way
    if torch.cuda.is_available():
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            found["Liger"] = lambda h, w, y: (
                -liger_fused_linear_cross_entropy(h, w, y, reduction="sum")[None]
            )
        except ImportError:
            pass
        try:
            from cut_cross_entropy import linear_cross_entropy

            found["CCE"] = lambda h, w, y: -linear_cross_entropy(h, w, y, reduction="none")
        except ImportError:
            pass
    return found


def exact_logps(hidden, weight, labels, rows: int = 256):
    """float64, a few rows at a time."""
    parts = []
    for h, y in zip(hidden.split(rows), labels.split(rows), strict=True):
        logits = h.double() @ weight.double().T
        parts.append(logits.gather(1, y[:, None]).squeeze(1) - logits.logsumexp(1))
    return torch.cat(parts)


def gradient_call(way, hidden, weight, labels, upstream) -> Callable:
    """Forward and backward of one way; gives its log-probs, or their sum if it has only that."""

    def call():
        h = hidden.detach().requires_grad_()
        result = way(h, weight, labels)
        torch.autograd.grad(result, h, upstream[: len(result)])
        return result.detach()

    return call


def all_ways(args) -> dict[str, Callable]:
    """Name -> function of (hidden, weight, labels), for this device and dtype."""
    ways = {"here (walk)": lambda h, w, y: label_logps(h, w, y)[0]}
    if args.device == "cuda":
        ways["here (fused)"] = lambda h, w, y: label_logps(h, w, y, impl="fused")[0]
    ways |= {"eager": eager, "compiled": torch.compile(eager, dynamic=True)}
    if dtype_of(args) != torch.float32:
        ways["eager, bf16"] = rounded
    return ways | peers()


def print_peak(args, ways: dict[str, Callable], weight, M: int) -> None:
    """MiB that --peak_of adds."""
    V, D = weight.shape
    hidden = torch.randn(M, D, device=args.device).to(dtype_of(args))
    labels = torch.randint(V, (M,), device=args.device)
    upstream = torch.randn(M, device=args.device)
    print(peak_mib(gradient_call(ways[args.peak_of], hidden, weight, labels, upstream)))


def measure(args, ways: dict[str, Callable], weight, M: int, rate: float) -> None:
    """One table: every way at M rows."""
    V, D = weight.shape
    hidden = (torch.randn(M, D, device=args.device) * 3.5).to(dtype_of(args))
    labels = torch.randint(V, (M,), device=args.device)
    exact = exact_logps(hidden, weight, labels)
    upstream = torch.randn(M, device=args.device)
    calls, errors, peaks = {}, {}, {}
    for name, way in ways.items():
        call = gradient_call(way, hidden, weight, labels, upstream)
        try:
            result = call()
        except Exception as error:  # a peer that cannot do this shape is reported, not hidden
            errors[name] = f"{type(error).__name__}"
            continue
        calls[name], errors[name] = call, "only a sum"
        if len(result) == M:
            errors[name] = f"{(result.double() - exact).abs().max():.1e}"
        if args.device == "cuda":
            peaks[name] = f"{peak_mib(call):.0f}"
        elif name != "compiled":  # a fresh process would show the compiler's memory
            argv = [sys.argv[0], *sys.argv[1:], "--rows", str(M), "--peak_of", name]
            peaks[name] = f"{in_fresh_process(argv):.0f}"
    seconds = interleaved(calls, args.repeats)
    first, floor = seconds["here (walk)"], 4 * M * D * V / rate
    rows = []
    for name in ways:
        cells = ["", "", "", ""]
        if name in seconds:
            s = seconds[name]
            cells = [f"{1000 * s:.2f}", f"{s / first:.2f}", f"{100 * floor / s:.0f} %"]
            cells.append(peaks.get(name, ""))
        rows.append([name, *cells, errors[name]])
    columns = [f"M = {M}", "median ms", "this / here", "of the floor's rate", "peak MiB"]
    table([*columns, "error of a log-prob"], rows)


def main() -> None:
    options = parser(__doc__, repeats=7)
    options.add_argument(
        "--rows",
        default="",
        help="comma-separated M; empty = 64 to 8,192 on a GPU, to 4,096 on a CPU",
    )
    options.add_argument(
        "--peak_of",
        default="",
        help="print the peak memory of one way at the first of --rows and stop",
    )
    args = options.parse_args()
    config, ways = SHAPES[args.shape], all_ways(args)
    D, V = config.hidden_size, config.vocab_size
    weight = (torch.randn(V, D, device=args.device) * D**-0.5).to(dtype_of(args))
    usual = "64,208,416,832,4096" + (",8192" if args.device == "cuda" else "")
    counts = [int(m) for m in (args.rows or usual).split(",") if m]
    if args.peak_of:
        print_peak(args, ways, weight, counts[0])
        return
    rate = matrix_rate(args, 4096)
    note = f"D = {D}, V = {V}, {dtype_of(args)}; one large GEMM: {rate / 1e12:.2f} TFLOP/s."
    header("The head, forward + backward, frozen", args, note)
    for M in counts:
        measure(args, ways, weight, M, rate)


if __name__ == "__main__":
    main()
