"""What surrounds training: the run folder and its lock, the log, the wish to stop,
and what all stages share."""

import contextlib
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from common import Stopped, hours, is_main, print0, read_json, reading, writing
from data import Encoded
from hub.tokenizer import Tokenizer
from runtime.sharding import device_memory, replica_note

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
    """metrics.jsonl has every step; the screen an aligned line now and then,
    and a bar when it is a terminal."""

    def __init__(self, file: Path, every: int):
        self.file = open(file, "a") if is_main() else None
        self.every, self.bar = every, None
        self.start, self.first, self.seconds = 0.0, 0, 0.0  # of a step, once two have ended

    def __call__(self, step: int, num_steps: int, metrics: dict, phase: str, ended: float) -> None:
        """`ended`: when this step did, in seconds of any clock."""
        if not self.file:
            return
        if self.bar is None:
            self.start, self.first = ended, step  # the first one warms up: only its end is known
            hidden = not sys.stderr.isatty()
            self.bar = tqdm(total=num_steps, desc=phase, disable=hidden, leave=False)
        with writing(self.file.name):
            self.file.write(json.dumps({"phase": phase, "step": step + 1, **metrics}) + "\n")
            self.file.flush()
        self.bar.update()
        self.seconds = (ended - self.start) / max(1, step - self.first)
        if (step + 1) % self.every and step + 1 != num_steps:
            return
        parts = [f"{phase:5} {step + 1:5}/{num_steps}"]
        parts += [
            f"{name} {metrics[name]:{form}}" for name, form in SHOWN.items() if name in metrics
        ]
        if step > self.first:
            left = hours(self.seconds * (num_steps - step - 1))
            parts += [f"{1000 * self.seconds:5.0f} ms/step", f"left {left}"]
        self.bar.write(" | ".join(parts), file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.file:
            self.file.close()


class StopRequest:
    """Ctrl-C, or a scheduler's SIGTERM: noted while steps run, so that all ranks can save and leave
    together; else obeyed at once. A second Ctrl-C ends the process as it is."""

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


def line_step(line: str) -> int:
    """Step of a line of metrics.jsonl; sys.maxsize if the line is broken."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return sys.maxsize


# options that may differ when a run goes on
FREE_TO_CHANGE = (
    "stages output_dir prepared_dir resume logging_steps save_steps save_total_limit "
    "dry_run micro_batch_tokens shard shard_group_size "
    "gradient_checkpointing compile"
)


@contextlib.contextmanager
def run_folder(config) -> Iterator[Path]:
    """Create or re-enter the run folder, on rank 0, and hold it while this process lives;
    one that this start made goes again if it ends before anything is in it."""
    numbered = (Path(f"runs/{config.dataset}-{n}") for n in range(1, 10**6))
    folder = Path(config.output_dir or next(f for f in numbered if not f.exists()))
    made, settings = not folder.exists(), asdict(config)
    check_folder(folder, config)
    with writing(f"--output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # the system unlocks it, however this process ends
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another process is running in this folder; "
                "wait for it, or choose another"
            ) from None
        with writing(f"--output_dir {folder}"):
            kept = {k: v for k, v in settings.items() if k not in ("resume", "logging_steps")}
            (folder / "config.json").write_text(json.dumps(kept, indent=2) + "\n")
        try:
            yield folder
        except BaseException:
            if made and not holds_a_run(folder):
                shutil.rmtree(folder)
            raise


@contextlib.contextmanager
def agreed_folder(config) -> Iterator[Path]:
    """The run folder, which rank 0 opens; a dry run gets one that is thrown away."""
    with contextlib.ExitStack() as open_folders:
        shared = [None]
        if is_main():
            folder = tempfile.TemporaryDirectory() if config.dry_run else run_folder(config)
            shared = [Path(open_folders.enter_context(folder))]
        dist.broadcast_object_list(shared)
        yield shared[0]


def holds_a_run(folder: Path) -> bool:
    """Whether anything is in it but what every start writes: a failed one leaves no more."""
    files = (f for f in folder.rglob("*") if f.is_file() and f.stat().st_size)
    return any(f.name not in ("config.json", "lock") for f in files)


def check_folder(folder: Path, config) -> None:
    """Raise unless the folder is new, or holds this run and --resume is given."""
    file = folder / "config.json"
    if not holds_a_run(folder):
        return
    if not file.exists():
        raise ValueError(f"{folder} is not empty and holds no run; choose another --output_dir")
    if not config.resume:
        raise ValueError(
            f"{folder} holds a run already; --resume auto goes on with it, "
            "or choose another --output_dir"
        )
    with reading(file):
        before, now = asdict(type(config)()) | read_json(file), asdict(config)
        stages = before["stages"].split(",")
    changed = [
        f"{name} ({before[name]!r}, now {now[name]!r})"
        for name in sorted(now.keys() - set(FREE_TO_CHANGE.split()))
        if before[name] != now[name] and not same_place(before[name], now[name])
    ]
    if changed:
        raise ValueError(
            f"{file}: the run was started with other values of {', '.join(changed)}; "
            "give those, or choose another --output_dir"
        )
    if dropped := [s for s in stages if s.strip() not in config.stage_list]:
        raise ValueError(f"{file}: --stages may add stages but must keep {', '.join(dropped)}")


def same_place(a, b) -> bool:
    """Whether two options name one file: by a link, by `..` or by its whole path."""
    paths = [Path(name) for name in (a, b) if isinstance(name, str) and name]
    return len(paths) == 2 and all(p.exists() for p in paths) and paths[0].samefile(paths[1])


class NotFinite(ValueError):
    """Loss or gradient of a step was not finite; its update was left out.

    `ranks` are those whose own loss was not."""

    def __init__(self, message: str, ranks: list[int]):
        super().__init__(message)
        self.ranks = ranks


class StepMetrics:
    """Metrics of one step on their way to the host.

    Reading them one step later never waits for a busy GPU."""

    def __init__(self, means: dict[str, Tensor], not_finite: Tensor, lr: float):
        self.on_device, self.lr = means, lr
        values = torch.cat([torch.stack(list(means.values())), not_finite])
        self.values = values.to("cpu", non_blocking=True)  # into pinned memory
        self.ended, self.arrived = time.monotonic(), None  # on a GPU the end is not known yet
        if values.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> dict[str, float]:
        """NotFinite if loss or gradient was not: that step's update was left out."""
        if self.arrived:
            self.arrived.synchronize()
            self.ended = time.monotonic()
        values = self.values.tolist()  # the metrics, then a flag for each rank
        flags = values[len(self.on_device) :]
        metrics = dict(zip(self.on_device, values, strict=False)) | {"learning_rate": self.lr}
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise NotFinite(
                f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']} is not finite; "
                "this update was left out. "
                "A smaller learning rate or --dtype float32 usually helps",
                [rank for rank, flag in enumerate(flags) if flag],
            )
        return metrics


def where_not_finite(run: Run, schedule, step: int, ranks: list[int]) -> str:
    """The ranks whose own loss was not finite, and their examples."""
    who = f"rank {', '.join(map(str, ranks))}" if ranks else "the gradient only"
    batches = (schedule.micro_batches(step, r) for r in ranks or range(run.world_size))
    examples = [e for micro_batches in batches for batch in micro_batches for e in batch]
    interactions, position = run.train.examples.interactions, run.train.examples.position
    users = [interactions.user_ids[interactions.user[position[e]]] for e in examples[:8]]
    named = ", ".join(f"{e} (user {user})" for e, user in zip(examples, users, strict=False))
    return f"{who}, examples {named}{' ...' if len(examples) > 8 else ''}"


def describe_data(run: Run) -> None:
    """Sizes, and the first training prompt as the model reads it."""
    train, test = run.train, run.test
    lengths = [len(p) for p in train.prompts]
    shortened = train.num_shortened + test.num_shortened
    dropped = train.num_dropped + test.num_dropped
    print0(
        f"{run.config.dataset}: {len(train.prompts):,} training, "
        f"{len(run.val.prompts) if run.val else 0:,} validation and "
        f"{len(test.prompts):,} test examples, data hash {run.data_hash[:12]}; "
        f"prompts of {np.mean(lengths):.0f} tokens (longest {max(lengths)}), "
        f"{shortened} shortened by {dropped} history items to fit {run.config.max_length}"
    )
    example, decode = train.examples[0], run.tokenizer.inner.decode
    prompt = decode(train.prompts[0].tolist(), skip_special_tokens=False)
    print0(f"\nfirst training prompt:\n{prompt}")
    title, ids = example.candidates[example.target], train.slots(0, [example.target])[0]
    print0(f"chosen: {title!r}, tokens {ids}")


def source(base: Path, adapter: Path | None) -> str:
    """The weights that a stage starts from, in words."""
    return f"{base} + {adapter}" if adapter else f"{base}"


def describe_stage(run: Run, name: str, model, schedule, peak: float, source: str) -> None:
    """How much is trained on how much; `source`: the weights that it starts from."""
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    print0(
        f"\n== {name}: {len(schedule.widths):,} prompts, {schedule.num_steps} steps of "
        f"{run.config.batch_size}, peak learning rate {peak:g}; "
        f"validated on {len(run.val.prompts) if run.val else 0} users; "
        f"{trainable:,} of {total:,} parameters trained, from {source}"
    )
    if run.config.shard == "full" and run.world_size > 1:
        stored = sum(p.numel() * p.element_size() for p in parameters)
        memory = device_memory(run.device)
        print0(replica_note(stored, 12 * trainable, run.world_size, memory), end="")
