"""The timed figures of a GPU, the most important first; a stopped run resumes.

    python -m bench.gpu                   writes results/bench/gpu-<card>-<commit>.md
    python -m bench.gpu --page FILE       the page is that file

The page is written after every figure. Started again, a run measures what the page does not hold,
and what failed. `pytest -m gpu` (tests/test_gpu.py) tests whether the numbers that a GPU computes
are right. On a CPU the sizes are tiny.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from bench import evaluation, head, scaling, step
from bench.harness import CUDA, ROOT, Sizes, commit, medians, run
from common import parse_config
from kernels.nf4 import dequantize_nf4, quantize_nf4


def nf4(sizes: Sizes) -> str:
    """Time to dequantise a projection, and its memory rate as a share of a large copy's."""
    shape = (sizes.config.intermediate_size, sizes.config.hidden_size)
    weight = torch.randn(*shape, device=sizes.device, dtype=sizes.torch_dtype)
    codes, absmax = quantize_nf4(weight)
    source = torch.empty(2**30 if CUDA else 2**20, dtype=torch.uint8, device=weight.device)
    copy = partial(torch.empty_like(source).copy_, source)
    values = partial(dequantize_nf4, codes, absmax, shape, weight.dtype)
    s = medians({"copy": copy, "values": values}, sizes.seconds)
    moved = codes.numel() + 4 * absmax.numel() + weight.numel() * weight.element_size()
    rate = 2 * source.numel() / s["copy"]
    share = moved / s["values"] / rate
    return f"{1e6 * s['values']:.1f} µs, {share:.0%} of {rate / 1e9:,.0f} GB/s"


def figures(sizes: Sizes) -> dict[str, Callable[[], str]]:
    """The figures of all scripts, the most important first."""
    steps, heads = step.figures(sizes), head.figures(sizes)
    first = ["RecPO step", "the usual way", "the usual way, checkpointing"]
    found = {name: steps[name] for name in first} | {"head, 4096 rows": heads["head, 4096 rows"]}
    found |= {"NF4 -> values": partial(nf4, sizes)} | evaluation.figures(sizes)
    return found | steps | heads | scaling.figures(sizes)


def main() -> None:
    sizes = parse_config(Sizes)
    if not CUDA:
        sizes = replace(sizes, layers=2, prompts=2, prompt=32, seconds=0.0)
    if not sizes.page:
        card = torch.cuda.get_device_name() if CUDA else "toy cpu"
        name = f"gpu-{'-'.join(card.lower().split())}-{commit()}.md"
        sizes = replace(sizes, page=str(ROOT / "results" / "bench" / name))
    run(figures, "Timed figures of a GPU", sizes)


if __name__ == "__main__":
    main()
