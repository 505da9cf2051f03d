"""A run: its processes and how they divide the work, its folder, stopping, and its log."""

import contextlib
import fcntl
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from common import Stopped, clock, is_main, print0, read_json, writing
from data import micro_batches

Run = SimpleNamespace  # what all stages share; built by train.main


def setup_distributed(divides: bool = True) -> tuple[int, int, torch.device]:
    """Join torchrun's group, or form one of this process only: (rank, world_size, device)."""
    if not divides and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("this program does not divide its work: start it without torchrun")
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.device_count() >= local_world:  # NCCL wants a GPU per process
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        group = {} if "RANK" in os.environ else alone
        dist.init_process_group(backend, timeout=timedelta(hours=2), **group)
    cores, given = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")
    if local_world > 1 and given == "1":  # torchrun's default
        torch.set_num_threads(max(1, cores // local_world))
    elif device.type == "cpu" and not given:
        # A thread on a core that another process keeps busy makes all the others wait for it.
        running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1
        busy = round(min(running, os.getloadavg()[0]))  # now, and over the last minute
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - busy)))
    return dist.get_rank(), dist.get_world_size(), device


@contextlib.contextmanager
def rank_zero_first(rank_variable: str = "RANK"):
    """Run the block first on rank 0 ("LOCAL_RANK": of each machine), then on the other ranks."""
    leads = int(os.environ.get(rank_variable, 0)) == 0
    if leads:
        yield
    dist.barrier()
    if not leads:
        yield


def from_rank_0(make: Callable):
    """Call `make` on rank 0 only and send the result to all: others may not share its disk."""
    shared = [make() if is_main() else None]
    dist.broadcast_object_list(shared)
    return shared[0]


def any_rank(flag: bool) -> bool:
    """True on every rank if it is true on one."""
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


class Schedule:
    """The examples of every step, a function of (seed, epoch, step), and how ranks divide them."""

    def __init__(self, config, epochs: float, widths: np.ndarray, world_size: int):
        self.config, self.widths, self.world_size = config, widths, world_size
        self.steps_per_epoch = math.ceil(len(widths) / config.batch_size)
        self.num_steps = math.ceil(round(epochs * self.steps_per_epoch, 6))  # 1.1 * 100 > 110
        self.num_steps = min(self.num_steps, config.max_steps or self.num_steps)
        self.step_tokens = float(widths.sum(1).mean()) * config.batch_size
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
        """Whether something done every `every` steps, and at the end, is due after `steps`."""
        return steps == self.num_steps or (every > 0 and steps % every == 0)


def planned(widths: np.ndarray, indices, budget: int) -> list[list[int]]:
    """Divide this rank's examples into micro-batches, narrow ones first."""
    return [batch for batch in micro_batches(widths, indices, 1, budget)[0][::-1] if batch]


def prefetch(make: Callable, items: Iterable) -> Iterator:
    """Yield make(item) for each item in order, while the next is made in the background."""
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for item in items:
            made, ahead = ahead, pool.submit(make, item)
            if made:
                yield made.result()
        if ahead:
            yield ahead.result()


def rounds(batches: list[list[int]], any_rank: Callable[[bool], bool]) -> Iterator[list[int]]:
    """Yield the batches, then [] until all ranks are done: a sharded model needs equal passes."""
    n = 0
    while any_rank(n < len(batches)):
        yield batches[n] if n < len(batches) else []
        n += 1


def progress(items: Iterable, what: str, total: int) -> Iterable:
    """Show a progress bar on rank 0; without a terminal, print one line per minute."""
    after, off = 0.1 if sys.stderr.isatty() else 60, not is_main()  # seconds
    return tqdm(items, what, total, leave=False, mininterval=after, delay=after, disable=off)


@contextlib.contextmanager
def open_run_folder(config) -> Iterator[Path]:
    """Create or reopen the run folder; remove a new one if the start fails. A dry run has none."""
    numbered = (f"runs/{config.dataset}-{n}" for n in itertools.count(1))
    named = os.devnull if config.dry_run else config.output_dir
    folder = Path(from_rank_0(lambda: named or next(f for f in numbered if not os.path.exists(f))))
    is_new, file = is_main() and not folder.exists(), folder / "config.json"

    def holds_a_run() -> bool:
        return any(file.stat().st_size for file in folder.glob("*/*"))

    if is_main() and not config.dry_run:
        if holds_a_run():
            started = {f.name: f.default for f in fields(config)} | read_json(file)
            free = {f.name for f in fields(config) if f.metadata["free"]}
            other = [n for n, v in asdict(config).items() if v != started[n] and n not in free]
            if other or not config.resume:
                others = f", with other {', '.join(other)}" * bool(other)
                way_out = "resume it by --resume auto and its options, or name another --output_dir"
                raise ValueError(f"{folder} already holds a run{others}: {way_out}")
        with writing(f"--output_dir {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / "lock", "w")  # held until this process ends
            with writing(f"{lock.name}: another process trains in this folder; it"):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write_text(json.dumps(asdict(config), indent=2) + "\n")
    try:
        yield folder
    except BaseException:
        if is_new and not holds_a_run():
            shutil.rmtree(folder)
        raise


class StopRequest:
    """Handle Ctrl-C and a scheduler's SIGTERM: during steps all ranks save and leave together."""

    def __init__(self, folder: Path):
        self.folder, self.asked, self.in_loop = folder, 0, False
        signal.signal(signal.SIGTERM, self.note)
        signal.signal(signal.SIGINT, self.note)

    def note(self, number, frame) -> None:
        if self.asked and number == signal.SIGINT:
            os._exit(128 + number)
        self.asked = number
        if not self.in_loop:
            self.stop("before a step: there is nothing to save")
        print0("\nfinishing this step and saving; a second Ctrl-C ends at once")

    def stop(self, where: str) -> None:
        """End the run; the last line printed is the command that resumes it."""
        command, code = ["python", *sys.argv], 130 if self.asked == signal.SIGINT else 0
        if "TORCHELASTIC_RUN_ID" in os.environ:  # then torchrun started this process
            command[1:] = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[1:-1]
        for option, value in ("--output_dir", str(self.folder)), ("--resume", "auto"):
            if not any(word.split("=")[0] == option for word in command):
                command += [option, value]
        raise Stopped(f"stopped {where}. To resume:\n{shlex.join(command)}", code)


class StepMetrics:
    """Metrics of one step, copied to the host without waiting and read one step later."""

    def __init__(self, means: dict[str, Tensor], not_finite: Tensor, lr: float):
        self.on_device, self.lr, self.arrived = means, lr, None
        values = torch.cat([torch.stack(list(means.values())), not_finite])
        self.values = values.to("cpu", non_blocking=True)  # into pinned memory
        if values.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> dict[str, float]:
        """Wait for the values; ValueError(message, ranks) if loss or gradient was not finite."""
        if self.arrived:
            self.arrived.synchronize()
        values = self.values.tolist()  # the metrics, then a flag for each rank
        metrics = dict(zip(self.on_device, values, strict=False)) | {"learning_rate": self.lr}
        ranks = [rank for rank, flag in enumerate(values[len(self.on_device) :]) if flag]
        if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
            what = f"the loss of ranks {ranks} is" if ranks else "the gradient alone is"
            raise ValueError(f"{what} not finite; this update was skipped: lower the rate", ranks)
        return metrics


PRINTED = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "mean_token_accuracy")
PRINTED += ("grad_norm", "learning_rate")  # metrics of a printed line


class Logger:
    """A stage's log: every step in metrics.jsonl, one line per --logging_steps on the screen."""

    def __init__(self, run: Run, stage: str, folder: Path, schedule, later: list):
        self.run, self.stage, self.schedule = run, stage, schedule
        self.later = sum(s.num_steps * s.step_tokens for s in later) / schedule.step_tokens
        self.file = open(folder / "metrics.jsonl" if is_main() else os.devnull, "a")
        self.pending: tuple[int, StepMetrics] | None = None  # the last step, not written yet
        self.stamps: list[float] = []  # of every step

    def __call__(self, step: int, result: StepMetrics) -> None:
        """Write the previous step: this one's metrics are read while the GPU runs the next."""
        self.flush()
        self.pending = step + 1, result
        self.stamps.append(time.monotonic())

    def flush(self) -> None:
        """Wait for the last step's metrics and write them; ValueError if they are not finite."""
        if self.pending is None:
            return
        (step, result), self.pending, plan = self.pending, None, self.schedule
        line = f"{self.stage:5} {step:5}/{plan.num_steps}"
        try:
            metrics = result.read()
        except ValueError as error:
            raise ValueError(f"{self.stage}, step {step}: {error.args[0]}") from None
        metrics["epoch"] = step / plan.steps_per_epoch
        self.write({"phase": self.stage, "step": step, **metrics})
        if plan.due(self.run.config.logging_steps, step):
            line += "".join(f" | {name} {metrics[name]:.4g}" for name in PRINTED if name in metrics)
            if len(self.stamps) > 2:  # the first two steps warm up
                seconds = (self.stamps[-1] - self.stamps[1]) / (len(self.stamps) - 2)
                left = clock(seconds * (plan.num_steps - step + self.later))
                line += f" | {1000 * seconds:.0f} ms/step | {left} to the end of the run"
            print0(line)

    def write(self, line: dict) -> None:
        with writing(self.file.name):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
