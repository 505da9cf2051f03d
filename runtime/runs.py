"""What surrounds training: the run folder and its lock, the log, a scheduler's wish to stop,
and what all stages share."""

import fcntl
import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import Stopped, hours, is_main, print0, read_json, reading, writing
from data import Encoded
from hub.tokenizer import Tokenizer
from runtime.sharding import device_memory, replica_note


class Logger:
    """metrics.jsonl has every step; the screen an aligned line now and then,
    and a bar when it is a terminal."""

    def __init__(self, file: Path, every: int):
        self.file = open(file, "a") if is_main() else None
        self.every, self.bar, self.phase = every, None, ""
        self.start, self.first = 0.0, 0

    def __call__(self, step: int, num_steps: int, metrics: dict, phase: str, ended: float) -> None:
        """`ended`: when this step did, in seconds of any clock."""
        if not self.file:
            return
        if phase != self.phase:
            self.close_bar()
            self.phase, self.start, self.first = phase, ended, step
            hidden = not sys.stderr.isatty()
            self.bar = tqdm(total=num_steps, desc=phase, disable=hidden, leave=False)
        with writing(self.file.name):
            self.file.write(json.dumps({"phase": phase, "step": step + 1, **metrics}) + "\n")
            self.file.flush()
        self.bar.update()
        if (step + 1) % self.every and step + 1 != num_steps:
            return
        parts = [f"{phase:5} {step + 1:5}/{num_steps}", f"loss {metrics['loss']:7.4f}"]
        shown = {
            "rewards/margins": "margin {:+6.2f}",
            "rewards/accuracies": "acc {:.3f}",
            "logps/chosen": "logp {:7.2f}",
            "mean_token_accuracy": "acc {:.3f}",
        }
        parts += [form.format(metrics[name]) for name, form in shown.items() if name in metrics]
        parts += [f"norm {metrics['grad_norm']:6.2f}", f"lr {metrics['learning_rate']:.1e}"]
        if step > self.first:  # the first one warms up: only its end is known
            seconds = (ended - self.start) / (step - self.first)  # a step
            parts += [f"{1000 * seconds:5.0f} ms/step"]
            parts += [f"left {hours(seconds * (num_steps - step - 1))}"]
        self.bar.write(" | ".join(parts), file=sys.stdout)
        sys.stdout.flush()

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def close(self) -> None:
        self.close_bar()
        if self.file:
            self.file.close()


class StopRequest:
    """SIGTERM, a scheduler's wish: noted while steps run,
    so that all ranks can save and leave together; else obeyed at once."""

    def __init__(self):
        self.asked, self.in_loop = False, False
        signal.signal(signal.SIGTERM, self.note)

    def note(self, number, frame) -> None:
        self.asked = True
        if not self.in_loop:
            raise Stopped("SIGTERM between steps: nothing to save; --resume auto goes on from here")


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


def line_step(line: str) -> int:
    """Step of a line of metrics.jsonl; beyond all for one that a crash cut off: it is dropped."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return sys.maxsize


# options that may differ when a run goes on
FREE_TO_CHANGE = (
    "stages output_dir prepared_dir resume logging_steps save_steps save_total_limit "
    "max_skipped_steps dry_run gpu_memory micro_batch_tokens shard shard_group_size "
    "gradient_checkpointing compile"
)


def open_run_folder(config) -> Path:
    """Create or re-enter the run folder, on rank 0;
    a folder in use, or made with other options, is an error."""
    numbered = (Path(f"runs/{config.dataset}-{n}") for n in range(1, 10**6))
    folder = Path(config.output_dir or next(f for f in numbered if not f.exists()))
    file = folder / "config.json"
    settings = {k: v for k, v in asdict(config).items() if k not in ("resume", "logging_steps")}
    # a start that failed at once (wrong path, no access to the model) leaves its options alone:
    # no run yet
    content = [f.name for f in folder.iterdir()] if folder.is_dir() else []
    started = bool(set(content) - {"config.json", "lock"})
    if file.exists() and started:
        if not config.resume:
            raise ValueError(
                f"{folder} holds a run already; --resume auto goes on with it, "
                "or choose another --output_dir"
            )
        with reading(file):
            before = asdict(type(config)()) | read_json(file)  # older runs have fewer options
            stages = before["stages"].split(",")
        fixed = sorted(settings.keys() - set(FREE_TO_CHANGE.split()))
        changed = [
            f"{name} ({before[name]!r}, now {settings[name]!r})"
            for name in fixed
            if before[name] != settings[name] and not same_place(before[name], settings[name])
        ]
        if changed:
            raise ValueError(
                f"{file}: the run was started with other values of {', '.join(changed)}; "
                "give those, or choose another --output_dir"
            )
        if dropped := [s for s in stages if s.strip() not in config.stage_list]:
            raise ValueError(f"{file}: --stages may add stages but must keep {', '.join(dropped)}")
    elif started:
        raise ValueError(f"{folder} is not empty and holds no run; choose another --output_dir")
    with writing(f"--output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
        file.write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def same_place(a, b) -> bool:
    """Whether two options name one file: by a link, by `..` or by its whole path."""
    paths = [Path(name) for name in (a, b) if isinstance(name, str) and name]
    return len(paths) == 2 and all(p.exists() for p in paths) and paths[0].samefile(paths[1])


def lock_folder(folder: Path) -> None:
    """Hold the folder as long as this process lives:
    the system gives the lock back when it ends, however it ends."""
    global run_lock
    run_lock = open(folder / "lock", "w")
    try:
        fcntl.flock(run_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{folder}: another process is running in this folder; wait for it, or choose another"
        ) from None


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
    examples = [
        e
        for r in ranks or range(run.world_size)
        for batch in schedule.micro_batches(step, r)
        for e in batch
    ]
    interactions, position = run.train.examples.interactions, run.train.examples.position
    shown = examples[:8]
    users = [interactions.user_ids[interactions.user[position[e]]] for e in shown]
    named = ", ".join(f"{e} (user {user})" for e, user in zip(shown, users, strict=True))
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


def describe_stage(stage) -> None:
    run, schedule, (base, adapter) = stage.run, stage.schedule, stage.start
    parameters = list(stage.model.parameters())
    total = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    source = f"{base} + {adapter}" if adapter else f"{base}"
    print0(
        f"\n== {stage.name}: {len(schedule.widths):,} prompts, {schedule.num_steps} steps of "
        f"{run.config.batch_size}, peak learning rate {stage.peak:g}; "
        f"validated on {len(run.val.prompts) if run.val else 0} users; "
        f"{trainable:,} of {total:,} parameters trained, from {source}"
    )
    if run.config.shard == "full" and run.world_size > 1:
        stored = sum(p.numel() * p.element_size() for p in parameters)
        memory = device_memory(run.device)
        print0(replica_note(stored, 12 * trainable, run.world_size, memory), end="")
