"""The processes of a run: torchrun's group, their threads, and what rank 0 does for the others."""

import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common import is_main, print0


def setup_distributed() -> tuple[int, int, torch.device]:
    """Join torchrun's group, or make one of this process alone; (rank, world_size, device)."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.device_count() >= local_world:  # NCCL wants a GPU per process
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    elif torch.cuda.is_available():
        print0(f"note: fewer GPUs than the {local_world} processes: running on the CPU")
    if not dist.is_initialized():
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        group = {} if "RANK" in os.environ else alone
        dist.init_process_group(backend, timeout=timedelta(hours=2), **group)
    cores, given = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")
    if local_world > 1 and given == "1":  # torchrun's default
        torch.set_num_threads(max(1, cores // local_world))
    elif device.type == "cpu" and not given:
        # A thread on a core that another process keeps busy makes all the others wait for it.
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - busy_cores())))
    return dist.get_rank(), dist.get_world_size(), device


def busy_cores() -> int:
    """Count the cores that other processes keep busy now, and have over the last minute."""
    running = Path("/proc/loadavg").read_text().split()[3].split("/")[0]
    return round(min(int(running) - 1, os.getloadavg()[0]))


def say_processes(world_size: int, device: torch.device, dtype, folder: Path) -> None:
    """Print the first line of a run: what it runs on, and where it writes."""
    n = torch.get_num_threads()
    threads = f"{n} thread{'s' * (n > 1)} each (OMP_NUM_THREADS sets another number)"
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    print0(f"{processes}, {threads}, {device.type}, {dtype}, run folder {folder}")


@contextlib.contextmanager
def rank_zero_first(rank_variable: str = "RANK"):
    """Let rank 0 (with "LOCAL_RANK": of every machine) go through the block, then the others.

    These find its work done. An error ends the first one's process, and torchrun the others."""
    leads = int(os.environ.get(rank_variable, 0)) == 0
    if leads:
        yield
    dist.barrier()
    if not leads:
        yield


def from_rank_0(make: Callable[[], Any]) -> Any:
    """Call `make` on rank 0 alone and give its result to all: others may have another disk."""
    shared = [make() if is_main() else None]
    dist.broadcast_object_list(shared)
    return shared[0]
