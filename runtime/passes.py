"""Forward passes over micro-batches: planned, made ahead of their turn, of the same number on
every rank, and with a bar."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from common import hours, is_main, print0
from data import micro_batches


def planned(widths: np.ndarray, indices, budget: int) -> list[list[int]]:
    """This rank's micro-batches, narrow ones first."""
    batches = micro_batches(widths, indices, 1, budget)[0]
    return [batch for batch in reversed(batches) if batch]


def prefetch(make: Callable, items: Iterable) -> Iterator:
    """make(item) for each item, in order; the next is made in the background meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        made = deque()
        for item in items:
            made.append(pool.submit(make, item))
            if len(made) > 1:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()


def any_rank(flag: bool) -> bool:
    """True on every rank if it is true on one; keeps ranks at the same number of forward passes."""
    if dist.get_world_size() == 1:
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def rounds(batches: list[list[int]], any_rank: Callable[[bool], bool]) -> Iterator[list[int]]:
    """The batches, then [] for as long as another rank has some left.

    So every rank makes the same number of forward passes, as a sharded model needs."""
    left = deque(batches)
    while any_rank(bool(left)):
        yield left.popleft() if left else []


def progress(items: Iterable, what: str, total: int, clock=time.monotonic) -> Iterator:
    """The items, on rank 0 with a bar on a terminal, and with a printed line a minute without one.

    What is over within a minute prints nothing; time left is that of rank 0's own items."""
    if not is_main() or not total:
        yield from items
        return
    if sys.stderr.isatty():
        yield from tqdm(items, what, total, leave=False)
        return
    started = printed = clock()
    for done, item in enumerate(items):
        now = clock()
        if done and now - printed >= 60:
            left = (now - started) / done * max(0, total - done)
            print0(f"{what} {done:5}/{total} | {hours(now - started)} | left {hours(left)}")
            printed = now
        yield item
