"""How the time of a RecPO step grows: with prompts, their length, negatives, and over ranks.

    python -m bench.scaling
    torchrun --nproc_per_node 8 -m bench.scaling      a step of each shard mode

One size changes at a time; each time comes with its distance from the straight line through
(tree tokens, time). Attention grows faster with the length of prompts, all else is linear.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from bench.harness import Sizes, Step, make_batch, make_model, medians, run
from common import parse_config, print0
from runtime.processes import setup_distributed
from runtime.sharding import shard


def growth(sizes: Sizes, what: str, values: tuple[int, ...]) -> str:
    """Milliseconds for each value, and their distances from the line."""
    model, two = make_model(sizes), replace(sizes, prompts=2)
    steps = {n: Step(model, make_batch(replace(two, **{what: n}))) for n in values}
    times = list(medians(steps, sizes.seconds).values())
    tokens = [step.tokens for step in steps.values()]
    line = np.polyval(np.polyfit(tokens, times, 1), tokens)
    rows = zip(values, times, line, strict=True)
    return "; ".join(f"{n}: {1000 * s:.0f} ms ({s / f - 1:+.0%})" for n, s, f in rows)


def figures(sizes: Sizes) -> dict[str, Callable[[], str]]:
    lengths = tuple(sizes.prompt * n // 4 for n in (1, 2, 4, 8, 16))
    grid = {"prompts": (1, 2, 4, 8), "prompt": lengths, "negatives": (1, 3, 7, 15)}
    return {f"by {what}": partial(growth, sizes, what, values) for what, values in grid.items()}


def compare_ranks(sizes: Sizes) -> None:
    """Time a step of each shard mode on the slowest rank, and a rank that sends nothing."""
    _, world_size, device = setup_distributed()
    alone = 0.0
    for mode in ("none", "full"):
        model = make_model.__wrapped__(sizes)  # each is sharded in its own way
        replicas = shard(model, mode, world_size, device)
        step = Step(model, make_batch(sizes), replicas=replicas)
        if mode == "none":
            alone = slowest(lambda step=step: step.compute(step.tree)[0].backward())
            print0(f"forward and backward of a rank alone: {1000 * alone:.0f} ms")
        seconds = slowest(step)
        print0(
            f"--shard {mode}: {1000 * seconds:.0f} ms a step, {alone / seconds:.0%} of the speed"
        )
        del model, step


def slowest(way: Callable) -> float:
    """Median seconds of the slowest rank; all ranks make the same number of calls."""
    times = [medians({"way": way}, 0, rounds=1)["way"] for _ in range(3)]
    longest = torch.tensor(np.median(times))
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return longest.item()


if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        compare_ranks(parse_config(Sizes))
    else:
        run(figures, "How a RecPO step grows", parse_config(Sizes))
