"""Forward passes over micro-batches: which examples they hold, made ahead, with a bar."""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from common import is_main
from data import micro_batches


class Schedule:
    """The examples of every step, and how ranks and micro-batches divide them.

    They are a function of (seed, epoch, step), whatever the division."""

    def __init__(self, config, epochs: float, widths: np.ndarray, world_size: int):
        self.config, self.widths, self.world_size = config, widths, world_size
        self.steps_per_epoch = math.ceil(len(widths) / config.batch_size)
        # 1.1 * 100 is 110.00000000000001
        self.num_steps = math.ceil(round(epochs * self.steps_per_epoch, 6))
        if config.max_steps:
            self.num_steps = min(self.num_steps, config.max_steps)
        self.epoch, self.order = -1, np.empty(0)

    def examples(self, step: int) -> np.ndarray:
        epoch, t = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.config.seed, epoch])
            self.epoch, self.order = epoch, rng.permutation(len(self.widths))
        return self.order[t * self.config.batch_size : (t + 1) * self.config.batch_size]

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        budget = self.config.micro_batch_tokens
        return micro_batches(self.widths, self.examples(step), self.world_size, budget)[rank]

    def due(self, every: int, steps: int) -> bool:
        """Whether what happens every so many steps, and at the end, is due after this many."""
        return steps == self.num_steps or bool(every) and steps % every == 0


def planned(widths: np.ndarray, indices, budget: int) -> list[list[int]]:
    """Divide this rank's examples into micro-batches, narrow ones first."""
    batches = micro_batches(widths, indices, 1, budget)[0]
    return [batch for batch in reversed(batches) if batch]


def prefetch(make: Callable, items: Iterable) -> Iterator:
    """Yield make(item) for each item, in order; the next is made in the background meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for item in items:
            made, ahead = ahead, pool.submit(make, item)
            if made:
                yield made.result()
        if ahead:
            yield ahead.result()


def any_rank(flag: bool) -> bool:
    """True on every rank if it is true on one."""
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def rounds(batches: list[list[int]], any_rank: Callable[[bool], bool]) -> Iterator[list[int]]:
    """The batches, then [] while another rank has some left: a sharded model needs equally many."""
    left = deque(batches)
    while any_rank(bool(left)):
        yield left.popleft() if left else []


def progress(items: Iterable, what: str, total: int) -> Iterable:
    """The items, with a bar on rank 0; where there is no terminal, one line a minute."""
    seconds = 0.1 if sys.stderr.isatty() else 60
    bar = {"mininterval": seconds, "delay": seconds, "leave": False, "disable": not is_main()}
    return tqdm(items, what, total, **bar)
