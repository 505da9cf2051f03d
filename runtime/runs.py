"""What surrounds training: the run folder and its lock, the wish to stop, the log."""

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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import Stopped, hours, is_main, print0, read_json, writing
from data import Encoded
from hub.tokenizer import Tokenizer
from runtime.checkpoint import newest
from runtime.processes import from_rank_0


# ------------------------------------------------------------------------ the run folder
@contextlib.contextmanager
def open_run_folder(config) -> Iterator[Path]:
    """Open the run folder on rank 0, and name it to all ranks; a dry run writes into none."""
    folder = contextlib.nullcontext(os.devnull) if config.dry_run else run_folder(config)
    with contextlib.ExitStack() as held:
        yield Path(from_rank_0(lambda: held.enter_context(folder)))


@contextlib.contextmanager
def run_folder(config) -> Iterator[Path]:
    """Create or re-enter the run folder, and hold it while this process lives.

    One that this start made goes again if it ends before anything is in it."""
    numbered = (Path(f"runs/{config.dataset}-{n}") for n in itertools.count(1))
    folder = Path(config.output_dir or next(f for f in numbered if not f.exists()))
    made = not folder.exists()
    if holds_a_run(folder):
        check_same_run(folder, config)
    with writing(f"--output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # the system unlocks it, however this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is running in this folder") from None
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    with lock:
        try:
            yield folder
        except BaseException:
            if made and not holds_a_run(folder):
                shutil.rmtree(folder)
            raise


def holds_a_run(folder: Path) -> bool:
    """Whether anything is in it but what every start writes: a failed one leaves no more."""
    files = (f for f in folder.rglob("*") if f.is_file() and f.stat().st_size)
    return any(f.name not in ("config.json", "lock") for f in files)


def check_same_run(folder: Path, config) -> None:
    """Raise unless --resume is given, and no option that must stay is another one now."""
    if not config.resume:
        raise ValueError(
            f"{folder} holds a run already; --resume auto goes on with it, "
            "or choose another --output_dir"
        )
    file, changed = folder / "config.json", []
    started = asdict(type(config)()) | read_json(file)
    for f in fields(config):
        before, now = started[f.name], getattr(config, f.name)
        # one file may go by several paths
        same = os.path.realpath(str(before)) == os.path.realpath(str(now))
        if f.name == "stages":  # may be added
            same = set(before.replace(" ", "").split(",")) <= set(config.stage_list)
        if not (same or f.metadata["free"]):
            changed.append(f"{f.name} ({before!r}, now {now!r})")
    if changed:
        raise ValueError(
            f"{file}: the run was started with other values of {', '.join(changed)}; "
            "give those, or choose another --output_dir"
        )


# ------------------------------------------------------------------------ the wish to stop
class StopRequest:
    """Ctrl-C, or a scheduler's SIGTERM: noted while steps run, else obeyed at once.

    So all ranks can save and leave together. A second Ctrl-C ends the process as it is."""

    def __init__(self, folder: Path):
        self.folder, self.asked, self.in_loop = folder, 0, False
        signal.signal(signal.SIGTERM, self.note)
        signal.signal(signal.SIGINT, self.note)

    def note(self, number, frame) -> None:
        if self.asked and number == signal.SIGINT:
            os._exit(128 + number)
        self.asked = number
        if not self.in_loop:
            self.stop("before a step: nothing is to be saved")
        elif number == signal.SIGINT:
            print0("\nCtrl-C: this step is finished and saved; a second Ctrl-C ends at once")

    def stop(self, where: str) -> None:
        """Leave; the last line is the command that goes on."""
        code = 130 if self.asked == signal.SIGINT else 0
        raise Stopped(f"stopped {where}. This goes on:\n{going_on(self.folder)}", code)


def going_on(folder: Path) -> str:
    """The command that goes on with this run, as it was started."""
    command = ["python", *sys.argv]
    if "TORCHELASTIC_RUN_ID" in os.environ:  # then torchrun is what started this process
        line = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[1:-1]
        command = ["torchrun", *line[1:]] if Path(line[0]).name == "torchrun" else ["python", *line]
    for option, value in ("--output_dir", str(folder)), ("--resume", "auto"):
        if not any(word.split("=")[0] == option for word in command):
            command += [option, value]
    return shlex.join(command)


# ------------------------------------------------------------------------ what all stages share
@dataclass
class Run:
    """What all stages share."""

    config: Any  # the options, train.TrainConfig
    rank: int
    world_size: int
    device: torch.device
    folder: Path
    base: Path
    tokenizer: Tokenizer
    data_hash: str
    train: Encoded
    val: Encoded | None  # a sample of the validation users
    test: Encoded
    baselines: dict[str, np.ndarray]
    stop: StopRequest
    timed: bool = False  # how long it takes has been said


def describe_data(run: Run) -> None:
    """Print sizes, and the first training prompt as the model reads it."""
    train, test, val = run.train, run.test, run.val.prompts if run.val else ()
    lengths = [len(p) for p in train.prompts]
    example, (ids,) = train.examples[0], train.slots(0, [train.examples[0].target])
    prompt = run.tokenizer.inner.decode(train.prompts[0].tolist(), skip_special_tokens=False)
    print0(
        f"{run.config.dataset}: {len(lengths):,} training, {len(val):,} validation and "
        f"{len(test.prompts):,} test examples, data hash {run.data_hash[:12]}; "
        f"prompts of {np.mean(lengths):.0f} tokens (longest {max(lengths)}), "
        f"{train.num_shortened + test.num_shortened} shortened by "
        f"{train.num_dropped + test.num_dropped} history items to fit {run.config.max_length}\n\n"
        f"first training prompt:\n{prompt}\nchosen: {example.candidates[example.target]!r}, "
        f"tokens {ids}"
    )


def source(base: Path, adapter: Path | None) -> str:
    """The weights that a stage starts from, in words."""
    return f"{base} + {adapter}" if adapter else f"{base}"


def describe_stage(run: Run, name: str, model, schedule, peak: float, source: str) -> None:
    """Print how much is trained on how much, from which weights."""
    sizes = {p: p.numel() for p in model.parameters()}
    trained = sum(size for p, size in sizes.items() if p.requires_grad)
    print0(
        f"\n== {name}: {len(schedule.widths):,} prompts, {schedule.num_steps} steps of "
        f"{run.config.batch_size}, peak learning rate {peak:g}; validated on "
        f"{len(run.val.prompts) if run.val else 0} users; {trained:,} of {sum(sizes.values()):,} "
        f"parameters trained, from {source}"
    )


# ------------------------------------------------------------------------ metrics and the log
class NotFinite(ValueError):
    """Loss or gradient of a step was not finite: the message, and the ranks whose own loss was."""


class StepMetrics:
    """Metrics of one step on their way to the host: read one step later, they never wait."""

    def __init__(self, means: dict[str, Tensor], not_finite: Tensor, lr: float):
        self.on_device, self.lr = means, lr
        values = torch.cat([torch.stack(list(means.values())), not_finite])
        self.values = values.to("cpu", non_blocking=True)  # into pinned memory
        self.ended, self.arrived = time.monotonic(), None  # on a GPU the end is not known yet
        if values.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> dict[str, float]:
        """Wait for the values; NotFinite if loss or gradient was not."""
        if self.arrived:
            self.arrived.synchronize()
            self.ended = time.monotonic()
        values = self.values.tolist()  # the metrics, then a flag for each rank
        metrics = dict(zip(self.on_device, values, strict=False)) | {"learning_rate": self.lr}
        loss, norm = metrics["loss"], metrics["grad_norm"]
        if not math.isfinite(loss + norm):
            raise NotFinite(
                f"loss {loss}, gradient norm {norm} is not finite; this update was left out. "
                "A smaller learning rate or --dtype float32 usually helps",
                np.flatnonzero(values[len(self.on_device) :]).tolist(),
            )
        return metrics


SHOWN = {  # metrics of a printed line -> how they are written
    "loss": "7.4f",
    "rewards/margins": "+.2f",
    "rewards/accuracies": ".3f",
    "logps/chosen": ".2f",
    "mean_token_accuracy": ".3f",
    "grad_norm": "6.2f",
    "learning_rate": ".1e",
}


class Logger:
    """A stage's log: metrics.jsonl has every step, the screen an aligned line now and then."""

    def __init__(self, run: Run, stage: str, folder: Path, schedule):
        self.run, self.stage, self.folder, self.schedule = run, stage, folder, schedule
        self.file = open(folder / "metrics.jsonl", "a") if is_main() else None
        hidden = not is_main() or not sys.stderr.isatty()
        self.bar = tqdm(total=schedule.num_steps, desc=stage, disable=hidden, leave=False)
        self.pending: tuple[int, StepMetrics] | None = None  # the last step, not written yet
        self.first: tuple[int, float] | None = None  # it warms up: only its end counts
        self.seconds = 0.0  # of a step, once two have ended

    def __call__(self, step: int, result: StepMetrics) -> None:
        """Write the step before: this one's metrics are read while the GPU works on the next."""
        self.flush()
        self.pending = step, result
        if step + 1 == self.schedule.num_steps:
            self.flush()

    def flush(self) -> None:
        """Wait for the last step's metrics and write them; what is not finite is an error."""
        if self.pending is None:
            return
        (step, result), self.pending = self.pending, None
        try:
            metrics = result.read()
        except NotFinite as error:
            problem, ranks = error.args
            raise ValueError(
                f"{self.stage}, step {step + 1}, {self.culprits(step, ranks)}: {problem}. "
                f"Last checkpoint: {next(iter(newest(self.folder, 'checkpoint')), 'none')}"
            ) from None
        if self.file:
            metrics["epoch"] = (step + 1) / self.schedule.steps_per_epoch
            self.write({"phase": self.stage, "step": step + 1, **metrics})
            self.show(step, metrics, result.ended)

    def culprits(self, step: int, ranks: list[int]) -> str:
        """The ranks whose own loss was not finite, and their examples."""
        who, run = f"rank {', '.join(map(str, ranks))}" if ranks else "the gradient only", self.run
        batches = [self.schedule.micro_batches(step, r) for r in ranks or range(run.world_size)]
        examples = [e for of_rank in batches for batch in of_rank for e in batch]
        users = [f"{e} (user {run.train.examples[e].user})" for e in examples[:8]]
        return f"{who}, examples {', '.join(users)}{' ...' if len(examples) > 8 else ''}"

    def write(self, line: dict) -> None:
        """Append a line to metrics.jsonl."""
        with writing(self.file.name):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def show(self, step: int, metrics: dict, ended: float) -> None:
        """Print a line every --logging_steps steps."""
        num_steps, (first, start) = self.schedule.num_steps, self.first or (step, ended)
        self.first = first, start
        self.seconds = (ended - start) / max(1, step - first)
        self.bar.update()
        parts = [f"{self.stage:5} {step + 1:5}/{num_steps}"]
        parts += [f"{m} {metrics[m]:{form}}" for m, form in SHOWN.items() if m in metrics]
        if step > first:
            left = hours(self.seconds * (num_steps - step - 1))
            parts += [f"{1000 * self.seconds:5.0f} ms/step", f"left {left}"]
        if self.schedule.due(self.run.config.logging_steps, step + 1):
            self.bar.write(" | ".join(parts), file=sys.stdout)
            sys.stdout.flush()

    def size(self) -> int:
        """Bytes of metrics.jsonl that are written, on rank 0."""
        return self.file.tell() if self.file else 0

    def close(self) -> None:
        self.bar.close()
        if self.file:
            self.file.close()
