"""SFT, then preference training, of a LLaMA or Qwen model for sequential recommendation.

    torchrun --nproc_per_node 2 train.py                          the demo: planted world, a tiny model, 2 processes
    python train.py                                               the same in one process
    torchrun --nproc_per_node 8 train.py --config configs/paper.json --model meta-llama/Llama-3.1-8B \\
        --dataset movielens --data_dir ml-1m.zip --output_dir runs/ml1m

`--stages sft,recpo,sdpo` runs SFT once and every preference loss behind it from the same SFT result. Each stage writes
`<output_dir>/<stage>/`: PEFT adapter or Hugging Face model, metrics.jsonl, eval/metrics.json, eval/predictions.jsonl.

One stage is one pass through `run_stage`:  load the starting weights -> (reference log-probs) -> the loop -> save -> test.
The reference policy is the policy before its first step, so its log-probs are computed once and kept in a file; there
is no second model. Every rank draws the same global batch from (seed, epoch, step) and takes its share, so that any
number of processes and micro-batches gives the same update.

`--save_steps` leaves checkpoints inside a stage (checkpoint.py), SIGTERM one at the next step; `--resume auto` goes on.

Left out: quantised weights, torch.compile (see NOTES.md).
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from baselines import counting_baselines, ranking_metrics
from checkpoint import checkpoints, damage, load_checkpoint, newest_checkpoint, save_checkpoint
from common import Stopped, any_rank, arg, first, is_main, parse_config, print0, read_json, run_cli, setup_distributed
from data import (
    BOUNDARY_CHECKS,
    DataConfig,
    Encoded,
    Tokenizer,
    encode_split,
    micro_batches,
    prefetch,
    prepare,
    to_device,
    tree_widths,
)
from estimate import replica_note, report
from eval import check_choice, load_stage, predict, results_table, save_predictions, summarise
from lora import TARGET_MODULES, apply_lora, base_fingerprint, read_adapter, read_adapter_config, save_adapter
from losses import MARGINS
from model import ModelConfig, Transformer, empty_model, resolve_path, save_pretrained
from objectives import PREFERENCE_LOSSES, SFT, MicroBatch, Preference
from planted import World, bayes_scores
from sharding import (
    fill_adapter,
    gathered,
    init_adapter,
    local,
    materialize,
    merged_on_reading,
    read_weights,
    shard,
)
from tiny import CopyTask, make_base_model

DEMO = Path(__file__).parent / "configs" / "demo.json"


@dataclass(frozen=True)
class TrainConfig(DataConfig):
    """SFT, then preference training, from a Hugging Face checkpoint; without --model and --config, the demo."""

    model: str = arg(
        "tiny", "Hugging Face directory or hub name; tiny = a small random model, or the base of --adapter", group="model"
    )
    adapter: str = arg("", "PEFT adapter to start from: the policy and, without an sft stage, the reference")
    dtype: str = arg("auto", "float32 or bfloat16; auto = bfloat16 on a GPU, float32 on CPU (adapters are float32)")
    lora_r: int = arg(8, "LoRA rank; 0 = train all parameters")
    sft_lora_r: int = arg(-1, "LoRA rank of the sft stage; -1 = lora_r, 0 = all parameters")
    lora_alpha: float = arg(32.0, "LoRA alpha; scaling = alpha / r")
    lora_dropout: float = arg(0.1, "dropout on the adapter's input, in the sft stage only")
    lora_target_modules: str = arg(",".join(TARGET_MODULES), "comma-separated linear layers that get an adapter")
    use_rslora: bool = arg(False, "scaling = alpha / sqrt(r)")
    tiny_hidden_size: int = arg(128, "tiny model: width, a multiple of 64")
    tiny_layers: int = arg(4, "tiny model: blocks")
    tiny_vocab_size: int = arg(1024, "tiny model: tokens of its tokenizer")
    stages: str = arg(
        "sft,recpo",
        f"comma-separated: sft and any of {', '.join(PREFERENCE_LOSSES)}, each from the sft result",
        group="objective",
    )
    beta: float = arg(1.0, "strength of the KL anchor: reward = beta * log-ratio")
    margin_lambda: float = arg(2.0, "weight of the target margin in recpo; 0 is S-DPO")
    margin: str = arg("ratio", f"target margin of recpo: {', '.join(MARGINS)}")
    num_negatives: int = arg(3, "rejected titles per prompt (dpo always takes 1)")
    negative_source: str = arg("both", "rejected titles are both, only random, or only follow(-ups)")
    label_smoothing: float = arg(0.0, "dpo: probability that a preference is the wrong way round")
    sft_weight: float = arg(0.0, "weight of the chosen title's mean NLL added to a preference loss")
    copy_steps: int = arg(
        0, "tiny models: at most so many steps of copying practice before SFT (see tiny.py); real models need none"
    )
    copy_weight: float = arg(0.0, "tiny models: weight of copying practice on the listed titles during SFT (see tiny.py)")
    sft_epochs: float = arg(5.0, "epochs of the sft stage; a fraction is fine", group="optimisation")
    epochs: float = arg(3.0, "epochs of a preference stage; a fraction is fine")
    max_steps: int = arg(0, "stop every stage after so many steps; 0 = off")
    batch_size: int = arg(128, "prompts per optimizer step, over all processes")
    micro_batch_tokens: int = arg(8192, "padded tokens of one forward pass per process; more only costs memory")
    sft_learning_rate: float = arg(1e-5, "peak learning rate of the sft stage")
    learning_rate: float = arg(1e-5, "peak learning rate of a preference stage")
    warmup_ratio: float = arg(0.05, "share of the steps with rising learning rate; a cosine to 0 follows")
    weight_decay: float = arg(0.0, "AdamW weight decay")
    adam_beta2: float = arg(0.999, "AdamW second-moment decay")
    max_grad_norm: float = arg(0.3, "clip the gradient's norm; 0 = off")
    shard: str = arg(
        "full", "full: split all weights over the processes; none: a replica each, faster where it fits; hybrid: see next"
    )
    shard_group_size: int = arg(0, "hybrid: processes that share one copy; 0 = those of a machine (LOCAL_WORLD_SIZE)")
    gradient_checkpointing: bool = arg(False, "recompute each block in backward: less memory, about a third slower")
    max_length: int = arg(1024, "tokens of prompt and longest candidate; longer prompts lose their oldest history")
    seed: int = arg(0, "seed of initial weights, batch order and dropout")
    decode: str = arg("greedy", "how test answers are found: greedy (one pass), generate, trie", group="evaluation and output")
    decode_rest: bool = arg(True, "generate an answer where no candidate verifies; off: count it invalid")
    dry_run: bool = arg(
        False, "train nothing: show an example, first losses, memory of a rank and time of a step; needs no weights"
    )
    gpu_memory: float = arg(0.0, "dry run: GB of a device, for the largest micro-batch that fits; 0 = not asked")
    tflops: float = arg(395.0, "dry run: achieved TFLOP/s of a device (395 is half of an H200's matrix rate)")
    output_dir: str = arg("", "run folder; empty = the first unused of runs/<dataset>-1, -2, ...")
    save_steps: int = arg(100, "steps between checkpoints of a stage; 0 = only when a scheduler stops the run (SIGTERM)")
    save_total_limit: int = arg(2, "checkpoints kept per stage")
    resume: str = arg(
        "", "auto: go on with the first unfinished stage of output_dir, from its newest whole checkpoint; or a checkpoint"
    )
    max_skipped_steps: int = arg(
        0, "steps with a loss or gradient that is not finite which may be left out; one more stops the run"
    )
    logging_steps: int = arg(10, "steps between printed lines; metrics.jsonl has every step")

    def __post_init__(self):
        super().__post_init__()
        stages = self.stage_list
        if not stages or len(set(stages)) < len(stages) or set(stages) - {"sft", *PREFERENCE_LOSSES} or "sft" in stages[1:]:
            allowed = ", ".join(PREFERENCE_LOSSES)
            raise ValueError(f"--stages: sft first (or not at all), then any of {allowed}, each once; got {self.stages!r}")
        check_choice(self, "dtype", ("auto", "float32", "bfloat16"))
        check_choice(self, "margin", MARGINS)
        check_choice(self, "negative_source", ("both", "random", "follow"))
        check_choice(self, "decode", ("greedy", "generate", "trie"))
        check_choice(self, "shard", ("full", "none", "hybrid"))
        if self.resume not in ("", "auto") and not Path(self.resume).is_dir():
            raise ValueError(f"--resume is auto or the folder of a checkpoint, got {self.resume!r}")
        if self.resume and not self.output_dir:
            raise ValueError("--resume needs --output_dir, the run folder to go on with")
        limits = {
            1: "num_negatives batch_size micro_batch_tokens logging_steps tiny_layers save_total_limit",
            0: "lora_r margin_lambda sft_weight max_steps copy_steps copy_weight max_grad_norm weight_decay save_steps "
            "max_skipped_steps shard_group_size",
        }
        for least, names in limits.items():
            for name in names.split():
                if getattr(self, name) < least:
                    raise ValueError(f"--{name} must be >= {least}, got {getattr(self, name)}")
        for name in ("beta", "sft_epochs", "epochs", "sft_learning_rate", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be > 0, got {getattr(self, name)}")
        if self.num_negatives > 19:
            raise ValueError(f"--num_negatives must be <= 19, got {self.num_negatives}: a list has 20 candidates")
        if self.label_smoothing and set(stages) - {"sft", "dpo"}:
            raise ValueError("--label_smoothing belongs to dpo; the multi-negative losses have none")
        if self.tiny_hidden_size % 64:
            raise ValueError(f"--tiny_hidden_size must be a multiple of 64, got {self.tiny_hidden_size}")

    @property
    def stage_list(self) -> list[str]:
        return [s.strip() for s in self.stages.split(",") if s.strip()]


# ------------------------------------------------------------------------------------------------ the model
def load_policy(config: TrainConfig, stage: str, base: Path, adapter: Path | None, device) -> tuple[Transformer, int]:
    """The stage's starting weights, sharded, and the number of replicas: base, plus the adapter it goes on from or a fresh one."""
    r = config.sft_lora_r if stage == "sft" and config.sft_lora_r >= 0 else config.lora_r
    stored = stored_dtype(config, device)
    full_bf16 = r == 0 and stored == torch.bfloat16  # full training keeps fp32 weights and computes in bf16
    model = empty_model(base, torch.float32 if full_bf16 else stored)
    dropout = config.lora_dropout if stage == "sft" else 0.0
    merge, tensors = {}, {}
    if adapter:
        settings, tensors = read_adapter(model, adapter)
        if r > 0:
            apply_lora(model, **settings | {"lora_dropout": dropout})
            print0(f"going on with the adapter {adapter}: its own r, alpha and target modules hold, not the options'")
        else:
            merge = merged_on_reading(settings, tensors)
    elif r > 0:
        targets = [t.strip() for t in config.lora_target_modules.split(",")]
        apply_lora(model, r, config.lora_alpha, dropout, targets, config.use_rslora)
    for block in model.model.layers:
        block.checkpointing = config.gradient_checkpointing
    replicas = shard(model, config.shard, config.shard_group_size, device, torch.bfloat16 if full_bf16 else None)
    materialize(model, device)
    read_weights(model, model.source, merge)
    if r > 0:
        fill_adapter(model, tensors) if adapter else init_adapter(model, config.seed)
    return model, replicas


def stored_dtype(config: TrainConfig, device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.dtype)


# ------------------------------------------------------------------------------------------------ one optimizer step
class NotFinite(ValueError):
    """Loss or gradient of a step was not finite; its update was left out. `ranks` are those whose own loss was not."""

    def __init__(self, message: str, ranks: list[int]):
        super().__init__(message)
        self.ranks = ranks


class StepMetrics:
    """Metrics of one step on their way to the host. Reading them one step later never waits for a busy GPU."""

    def __init__(self, names: list[str], values: Tensor, lr: float):
        self.names, self.lr = names, lr
        self.values = values.to("cpu", non_blocking=True)  # into pinned memory
        self.arrived = None
        if values.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> dict[str, float]:
        """NotFinite if loss or gradient was not: that step's update was left out."""
        if self.arrived:
            self.arrived.synchronize()
        values = self.values.tolist()  # the metrics, then a flag for each rank
        metrics = dict(zip(self.names, values, strict=False)) | {"learning_rate": self.lr}
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise NotFinite(
                f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']} is not finite; this update was left out. "
                "A smaller learning rate or --dtype float32 usually helps",
                [rank for rank, flag in enumerate(values[len(self.names) :]) if flag],
            )
        return metrics


def train_step(
    model, optimizer, batches: list, compute: Callable, lr: float, config: TrainConfig, replicas: int | None = None
) -> StepMetrics:
    """Accumulate gradients over this rank's micro-batches, clip, step. Returns the metrics of the whole global batch.

    `compute(batch) -> (loss, sums)`: the loss is already divided by global counts, so micro-batches and ranks add up
    to one big batch; `sums` maps metric names to (sum, count). Every rank brings equally many batches. `replicas` ranks hold
    the same rows of a gradient; None: all do. Nothing here waits for the GPU."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    world_size, sharded = dist.get_world_size(), hasattr(model, "set_requires_gradient_sync")
    # ------------------------- training step begins -------------------------
    for group in optimizer.param_groups:
        group["lr"] = lr
    for number, batch in enumerate(batches):
        if sharded:
            model.set_requires_gradient_sync(number == len(batches) - 1)  # reduce gradients once per step
        loss, sums = compute(batch)
        # Sharded gradients are averaged over ranks, but losses are divided by global counts already: undo the average.
        (loss * world_size).backward()
        for name, (total, count) in sums.items():
            totals[name] = totals.get(name, 0) + total.double()
            counts[name] = counts.get(name, 0) + count
    if not sharded and world_size > 1:
        average_gradients(optimizer)
    # One all_reduce for the squared gradient norm and all metrics. Plain local tensors: DTensor's own clip_grad_norm_
    # costs more than the whole step of a small model.
    gradients = [local(p.grad) for group in optimizer.param_groups for p in group["params"]]
    squared_norm = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    squared_norm /= replicas or world_size  # so many ranks count the same rows
    own = [float(rank == dist.get_rank()) for rank in range(world_size)]
    known = torch.tensor([1.0 / world_size, *counts.values(), *own], dtype=torch.double)
    known = to_device(known, squared_norm.device)
    not_finite = (~totals["loss"].isfinite()).double() * known[-world_size:]  # one flag per rank, its own set
    reduced = torch.cat([torch.stack([squared_norm, *totals.values()]), known[:-world_size], not_finite])
    dist.all_reduce(reduced)
    sums, device_counts, not_finite = reduced.split([1 + len(totals), 1 + len(totals), world_size])
    means = sums / device_counts
    means[0].sqrt_()
    grad_norm = means[0]
    if config.max_grad_norm:
        torch._foreach_mul_(gradients, (config.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0).float())
    finite = (grad_norm + means[1 + list(totals).index("loss")]).isfinite()
    optimizer.found_inf = (~finite).float()  # fused AdamW leaves the whole update out where this is 1
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    # ------------------------- training step ends ---------------------------
    return StepMetrics(["grad_norm", *totals], torch.cat([means, not_finite]), lr)


def average_gradients(optimizer) -> None:
    """--shard none: one all_reduce over all gradients as one flat tensor."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def get_lr(step: int, num_steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


class Schedule:
    """Which examples every step takes, and how ranks and micro-batches divide them: a function of (seed, epoch, step)."""

    def __init__(self, config: TrainConfig, epochs: float, widths: np.ndarray, world_size: int):
        self.config, self.widths, self.world_size = config, widths, world_size
        self.steps_per_epoch = math.ceil(len(widths) / config.batch_size)
        self.num_steps = math.ceil(epochs * self.steps_per_epoch)
        if config.max_steps:
            self.num_steps = min(self.num_steps, config.max_steps)
        self.epoch, self.order = -1, np.empty(0)

    def examples(self, step: int) -> np.ndarray:
        epoch, t = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.config.seed, epoch]).permutation(len(self.widths))
        return self.order[t * self.config.batch_size : (t + 1) * self.config.batch_size]

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        plan = micro_batches(self.widths, self.examples(step), self.world_size, self.config.micro_batch_tokens)
        return plan[rank]


# ------------------------------------------------------------------------------------------------ before the loop
@torch.no_grad()
def reference_pass(objective: Preference, schedule: Schedule, rank: int, file: Path, key: str) -> None:
    """Fill in the reference log-probs (E, 1 + K): those of the policy before its first step, computed once per run.

    The pass runs the very micro-batches of the first epoch, so that the rewards of the first step are exactly zero."""
    if any_rank(is_main() and file.exists()):  # rank 0 decides and reads: others may have another disk
        if is_main():
            objective.reference_logps = load_file(file)["logps"]
        dist.broadcast(objective.reference_logps, 0)
        return
    device = objective.device
    logps = torch.zeros(objective.reference_logps.shape, device=device)
    steps, bar = range(min(schedule.num_steps, schedule.steps_per_epoch)), is_main() and sys.stderr.isatty()
    planned = [(b, schedule.examples(step)) for step in steps for b in schedule.micro_batches(step, rank)]
    prepared = prefetch(lambda plan: objective.prepare(*plan), planned)
    for (batch, _), micro_batch in zip(tqdm(planned, "reference", disable=not bar), prepared, strict=True):
        sums = micro_batch.tree.sum_logps(objective.model(micro_batch.tree)[0])
        if batch:
            logps[to_device(torch.tensor(batch), device)] = sums
    dist.all_reduce(logps)
    objective.reference_logps = logps.cpu()
    if is_main():
        beside = file.with_suffix(".part")
        save_file({"logps": objective.reference_logps}, beside, metadata={"key": key})
        beside.rename(file)
    dist.barrier()


def practise_copying(
    config: TrainConfig, task: CopyTask, optimizer, rank: int, world_size: int, replicas: int, log: Callable
) -> None:
    """Warm-up of a random model (see tiny.py): until it copies out of lists of 20 titles, or --copy_steps are over."""
    for step in range(config.copy_steps):
        widths = task.draw(step)
        batches = micro_batches(widths, range(len(widths)), world_size, config.micro_batch_tokens)[rank]
        lr = config.sft_learning_rate * min(1.0, (step + 1) / 30)
        metrics = train_step(task.model, optimizer, batches, task, lr, config, replicas).read()
        mastered = task.update(metrics)
        log(step, config.copy_steps, metrics | {"list_size": task.list_size}, "copy")
        if mastered:
            break
    print0(
        f"copying practice: {step + 1} steps, lists of {task.list_size}, begins with a listed title {task.listed:.2f}, goes on with it {task.accuracy:.2f}"
    )


def check_first_rewards(objective: Preference, exact: bool) -> None:
    """At the first step the policy is the reference, so every reward must be zero (up to noise in bf16)."""
    rewards = torch.cat([r.flatten() for r in objective.first_rewards]).double() / objective.config.beta
    objective.first_rewards = None
    worst = torch.stack([rewards.abs().max(), rewards.square().mean().sqrt()])
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    largest, rms = worst.tolist()
    print0(f"log-ratios before the first step: at most {largest:.1e} nats per title (0: the policy is its reference)")
    if largest >= 1e-3 if exact else rms > 0.5:
        raise ValueError(f"policy and reference differ before training: max {largest:.2e}, rms {rms:.2e} nats per title")


# ------------------------------------------------------------------------------------------------ one stage
class Logger:
    """metrics.jsonl has every step; the screen an aligned line now and then, and a bar when it is a terminal."""

    def __init__(self, file: Path, every: int):
        self.file = open(file, "a") if is_main() else None
        self.every, self.start, self.first, self.bar, self.phase = every, time.time(), 0, None, ""

    def __call__(self, step: int, num_steps: int, metrics: dict, phase: str) -> None:
        if not self.file:
            return
        if phase != self.phase:
            self.close_bar()
            self.phase, self.start, self.first = phase, time.time(), step
            self.bar = tqdm(total=num_steps, desc=phase, disable=not sys.stderr.isatty(), leave=False)
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
            "copy_accuracy": "acc {:.3f}",
            "listed": "listed {:.2f}",
            "list_size": "list {:2}",
        }
        parts += [form.format(metrics[name]) for name, form in shown.items() if name in metrics]
        parts += [f"norm {metrics['grad_norm']:6.2f}", f"lr {metrics['learning_rate']:.1e}"]
        parts += [f"{1000 * (time.time() - self.start) / max(1, step - self.first):5.0f} ms/step"]
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
    """SIGTERM, a scheduler's wish: noted while steps run, so that all ranks can save and leave together; else obeyed at once."""

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

    config: TrainConfig
    rank: int
    world_size: int
    device: torch.device
    folder: Path
    base: Path
    tokenizer: Tokenizer
    data_hash: str
    train: Encoded
    test: Encoded
    baselines: dict[str, np.ndarray]
    stop: StopRequest


def run_stage(run: Run, stage: str, base: Path, adapter: Path | None) -> None:
    """Train and test one stage, starting from base and adapter; its folder appears, whole, when it is done.

    With --resume it goes on from a checkpoint, by default the newest whole one that an earlier start left."""
    config, rank, world_size, device = run.config, run.rank, run.world_size, run.device
    final = run.folder / stage
    folder = run.folder / f"{stage}.unfinished"
    if is_main():
        if not config.resume:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
    dist.barrier()
    torch.manual_seed(config.seed + rank)  # dropout; everything else draws from its own generator
    model, replicas = load_policy(config, stage, base, adapter, device)
    if base == run.base and config.model != "tiny":
        model.name_or_path = config.model  # a hub name, if it is one, and not the folder of its files
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    if stage == "sft":
        objective, epochs, peak = SFT(config, model, run.train, device), config.sft_epochs, config.sft_learning_rate
    else:
        objective = Preference(config, stage, model, run.train, device)
        epochs, peak = config.epochs, config.learning_rate
    widths = tree_widths(run.train, objective.slots)
    schedule = Schedule(config, epochs, widths, world_size)
    print0(
        f"\n== {stage}: {len(widths):,} prompts, {schedule.num_steps} steps of {config.batch_size}, peak learning rate {peak:g}; "
        f"{trainable:,} of {total:,} parameters trained, from {base}{f' + {adapter}' if adapter else ''}"
    )
    if config.shard == "full" and world_size > 1:
        stored = sum(p.numel() * p.element_size() for p in model.parameters())
        print0(replica_note(stored, 12 * trainable, world_size, device_memory(device)), end="")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=peak, betas=(0.9, config.adam_beta2), weight_decay=config.weight_decay, fused=True
    )

    identity = {"stage": stage, "data": run.data_hash}  # what a checkpoint must agree with
    if stage != "sft":
        identity["reference"] = prepare_reference(run, base, adapter, objective, schedule)
    model.train()

    start = resume_stage(run, folder, model, optimizer, identity)
    logger = Logger(folder / "metrics.jsonl", config.logging_steps)

    def save(step: int) -> None:
        taken = next((int(state["step"]) for state in optimizer.state.values()), 0)  # fewer than `step` if some were skipped
        facts = identity | {"optimizer_steps": taken}
        save_checkpoint(folder, step, model, optimizer, facts, replicas, config.save_total_limit)

    if start is None:
        start = 0
        if stage == "sft" and config.copy_steps:
            task = CopyTask(model, run.train, run.tokenizer, config.seed, device)
            practise_copying(config, task, optimizer, rank, world_size, replicas, logger)
            if config.save_steps:
                save(0)

    def prepare(step: int) -> list[MicroBatch]:
        return [objective.prepare(batch, schedule.examples(step)) for batch in schedule.micro_batches(step, rank)]

    skipped = 0

    def log(step: int, result: StepMetrics) -> None:
        nonlocal skipped
        try:
            metrics = result.read() | {"epoch": (step + 1) / schedule.steps_per_epoch}
        except NotFinite as error:
            skipped += 1
            problem = f"{stage}, step {step + 1}, {where_not_finite(run, schedule, step, error.ranks)}: {error}"
            if skipped > config.max_skipped_steps:
                last = next(iter(checkpoints(folder)), None)
                raise ValueError(f"{problem}. Last checkpoint: {last or 'none'} (--max_skipped_steps goes on)") from None
            print0(f"note: {problem}")
            return
        logger(step, schedule.num_steps, metrics, stage)

    run.stop.in_loop = True
    pending = None  # the step before, read while the GPU works on this one
    for step, batches in enumerate(prefetch(prepare, range(start, schedule.num_steps)), start):
        lr = get_lr(step, schedule.num_steps, peak, config.warmup_ratio)
        result = train_step(model, optimizer, batches, objective, lr, config, replicas)
        if step == 0 and stage != "sft":
            check_first_rewards(objective, exact=stored_dtype(config, device) == torch.float32)
        if pending:
            log(step - 1, pending)
        pending, stopping = result, any_rank(run.stop.asked)
        last = step + 1 == schedule.num_steps
        if stopping or (config.save_steps and ((step + 1) % config.save_steps == 0 or last)):
            log(step, pending)
            pending = None
            save(step + 1)
        if stopping:
            logger.close()
            raise Stopped(f"stopped by SIGTERM after step {step + 1}, which is saved; --resume auto goes on from there")
    run.stop.in_loop = False
    if pending:
        log(step, pending)
    logger.close()

    save_stage(run, model, base, folder)
    metrics = test_stage(run, model, folder)
    if is_main():
        for done in checkpoints(folder):
            shutil.rmtree(done)
        folder.rename(final)
        print0(results_table({stage: metrics}))
    dist.barrier()


def prepare_reference(run: Run, base: Path, adapter: Path | None, objective: Preference, schedule: Schedule) -> str:
    """Fill in the reference log-probs from the starting weights, show the first example; returns the log-probs' SHA-256."""
    objective.model.eval()
    key = reference_key(run, base, adapter, objective)
    reference_pass(objective, schedule, run.rank, run.folder / f"reference-{key[:12]}.safetensors", key)
    titles, slots, margins = run.train.examples[0].candidates, objective.slots[0], objective.margins[0].tolist()
    rejected = ", ".join(f"{titles[s]!r} ({m:.2f})" for s, m in zip(slots[1:], margins, strict=True))
    print0(f"first example: chosen {titles[slots[0]]!r}, rejected (and target margin in nats): {rejected}")
    print0(
        "logps/chosen usually falls from here on: the loss asks for a gap, and a gap opens too when every listed title\n"
        "loses. Watch rewards/margins and valid_ratio; --sft_weight holds the chosen title up."
    )
    return hashlib.sha256(objective.reference_logps.numpy().tobytes()).hexdigest()


def resume_stage(run: Run, folder: Path, model, optimizer, identity: dict) -> int | None:
    """Load the checkpoint to go on from; the number of steps it has seen, or None to start from the beginning."""
    config, checkpoint = run.config, None
    if config.resume == "auto":
        checkpoint = newest_checkpoint(folder)
    elif config.resume:
        checkpoint = Path(config.resume)
        if checkpoint.resolve().parent != folder.resolve():
            raise ValueError(f"--resume {checkpoint}: not a checkpoint of the stage that comes next, {folder}")
        if problem := damage(checkpoint):
            raise ValueError(f"--resume {checkpoint}: damaged ({problem}); --resume auto takes the newest whole one")
    metrics = folder / "metrics.jsonl"
    if checkpoint is None:
        if is_main():
            metrics.unlink(missing_ok=True)
        return None
    state = load_checkpoint(checkpoint, model, optimizer, identity)
    if is_main():
        kept = [line for line in metrics.read_text().splitlines() if line_step(line) <= state["step"]]
        beside = metrics.with_suffix(".part")
        beside.write_text("".join(f"{line}\n" for line in kept))
        beside.rename(metrics)
    print0(f"going on from {checkpoint}, after step {state['step']}")
    if state["world_size"] != run.world_size:
        torch.manual_seed(
            int.from_bytes(hashlib.sha256(f"{config.seed} {state['step']} {run.rank}".encode()).digest()[:6], "big")
        )
        print0(f"note: it was made by {state['world_size']} processes; dropout is seeded anew from seed, step and rank")
    return state["step"]


def line_step(line: str) -> int:
    """Step of a line of metrics.jsonl; 0 for copying practice, which is over; a line cut off by a crash is dropped."""
    try:
        entry = json.loads(line)
        return 0 if entry["phase"] == "copy" else entry["step"]
    except (json.JSONDecodeError, KeyError):
        return sys.maxsize


def where_not_finite(run: Run, schedule: Schedule, step: int, ranks: list[int]) -> str:
    """The ranks whose own loss was not finite, and their examples."""
    who = f"rank {', '.join(map(str, ranks))}" if ranks else "the gradient only"
    examples = [e for r in ranks or range(run.world_size) for batch in schedule.micro_batches(step, r) for e in batch]
    log, position = run.train.examples.log, run.train.examples.position
    users = ", ".join(f"{e} (user {log.user_ids[log.user[position[e]]]})" for e in examples[:8])
    return f"{who}, examples {users}{' ...' if len(examples) > 8 else ''}"


def save_stage(run: Run, model: Transformer, base: Path, folder: Path) -> None:
    """Adapter in PEFT's format, or the whole model with its tokenizer, and which base it stands on."""
    if getattr(model, "lora_config", None):
        state = dict(gathered(model, only_adapter=True))
        if is_main():
            save_adapter(model, folder, state)
    else:
        save_pretrained(model, folder, gathered(model), write=is_main())
        if is_main():
            copy_tokenizer(base, folder)
    if is_main():
        inside = base.resolve().is_relative_to(run.folder.resolve())  # then the run folder may be moved
        stored = os.path.relpath(base, folder) if inside else str(base.resolve())
        (folder / "base.json").write_text(json.dumps({"base": stored}) + "\n")


def test_stage(run: Run, model: Transformer, folder: Path) -> dict | None:
    """Evaluate on the test split, divided over ranks; metrics on rank 0, which also writes them."""
    config, started = run.config, time.time()
    model.eval()
    count = len(run.test.prompts)
    mine = range(run.rank, count, run.world_size)
    records = predict(
        model, run.tokenizer, run.test, mine, config.decode, config.decode_rest, config.micro_batch_tokens, any_rank, run.device
    )
    gathered = [None] * run.world_size if is_main() else None
    dist.gather_object(records, gathered)
    if not is_main():
        return None
    records = sorted((r for part in gathered for r in part), key=lambda r: r["example"])
    metrics = summarise(records, run.baselines) | {"data_hash": run.data_hash, "seconds": round(time.time() - started, 1)}
    save_predictions(folder / "eval", metrics, records)
    return metrics


def reference_key(run: Run, base: Path, adapter: Path | None, objective: Preference) -> str:
    """Hash of all that the reference log-probs depend on, the division into micro-batches included."""
    config, train = run.config, run.train
    files = [adapter / name for name in ("adapter_model.safetensors", "adapter_config.json")] if adapter else []
    settings = (stored_dtype(config, run.device), run.device.type, config.negative_source)
    batches = (config.seed, config.batch_size, config.micro_batch_tokens, run.world_size, config.epochs, config.max_steps)
    parts = [base_fingerprint(base).encode(), run.data_hash.encode(), *(file.read_bytes() for file in files)]
    parts += [ids.tobytes() for ids in train.prompts] + [str(train.completions).encode(), objective.slots.tobytes()]
    digest = hashlib.sha256(str((settings, batches)).encode())
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        if (source / name).exists():
            shutil.copy(source / name, target / name)


# ------------------------------------------------------------------------------------------------ the run
FREE_TO_CHANGE = "stages output_dir prepared_dir resume logging_steps save_steps save_total_limit max_skipped_steps "
FREE_TO_CHANGE += "dry_run gpu_memory tflops micro_batch_tokens shard shard_group_size gradient_checkpointing"


def open_run_folder(config: TrainConfig) -> Path:
    """Create or re-enter the run folder, on rank 0; a folder in use, or made with other options, is an error."""
    numbered = (Path(f"runs/{config.dataset}-{n}") for n in range(1, 10**6))
    folder = Path(config.output_dir or next(f for f in numbered if not f.exists()))
    file = folder / "config.json"
    settings = {k: v for k, v in asdict(config).items() if k not in ("resume", "logging_steps")}
    # a start that failed at once (wrong path, no access to the model) leaves its options alone: no run yet
    started = folder.is_dir() and any(f.name not in ("config.json", "lock") for f in folder.iterdir())
    if file.exists() and started:
        if not config.resume:
            raise ValueError(f"{folder} holds a run already; --resume auto goes on with it, or choose another --output_dir")
        changed = sorted(k for k, v in settings.items() if k not in FREE_TO_CHANGE.split() and read_json(file).get(k) != v)
        if changed:
            raise ValueError(f"{file}: the run was started with other values of {', '.join(changed)}")
        if dropped := [s for s in read_json(file)["stages"].split(",") if s.strip() not in config.stage_list]:
            raise ValueError(f"{file}: --stages may add stages but must keep {', '.join(dropped)}")
    elif started:
        raise ValueError(f"{folder} is not empty and holds no run; choose another --output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
        file.write_text(json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written: {error}") from None
    return folder


def lock_folder(folder: Path) -> None:
    """Hold the folder as long as this process lives: the system gives the lock back when it ends, however it ends."""
    global run_lock
    run_lock = open(folder / "lock", "w")
    try:
        fcntl.flock(run_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another process is running in this folder; wait for it, or choose another") from None


def results(run: Run, prepared) -> str:
    """The run's table: chance and counting baselines, every finished stage, and the optimum where it is known."""
    rows = {s: read_json(run.folder / s / "eval" / "metrics.json") for s in run.config.stage_list}
    bounds = {}
    if run.config.dataset == "planted" and run.config.history >= World.max_length - 1:  # else it is not known
        world = World(num_users=run.config.planted_users, seed=run.config.data_seed)
        scores = bayes_scores(world, prepared.splits["test"], run.config.min_rating)
        bounds["Bayes-optimal"] = float(ranking_metrics(scores, prepared.splits["test"].target)["hit_ratio@1"].mean())
    return results_table(rows, bounds)


def device_memory(device) -> int:
    """Bytes of a GPU, or of this process's share of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def dry_run(run: Run) -> None:
    """What a careful user looks at before paying for GPUs; runs the step on fake tensors, reads no weights."""
    config, model_config = run.config, ModelConfig.from_pretrained(run.base)
    print0(f"prompt and completion tokenise alike together and apart: checked on {BOUNDARY_CHECKS} examples of each split")
    gpu = run.device.type == "cuda" or config.gpu_memory > 0
    for stage in config.stage_list:
        r = config.sft_lora_r if stage == "sft" and config.sft_lora_r >= 0 else config.lora_r
        objective = SFT(config, None, run.train, run.device)
        if stage != "sft":
            objective = Preference(config, stage, None, run.train, run.device)
            zeros = torch.zeros(objective.slots.shape)
            first = objective.losses(zeros, zeros, objective.margins)[0].mean()
            print0(f"\n{stage}: the first loss must be {first:.4f}: the policy is still its reference")
        widths = tree_widths(run.train, objective.slots)
        completions = [len(ids) for ids in run.train.slots(int(widths[:, 1].argmax()), objective.slots[widths[:, 1].argmax()])]
        dtype = (torch.bfloat16 if gpu else torch.float32) if config.dtype == "auto" else getattr(torch, config.dtype)
        targets = [t.strip() for t in config.lora_target_modules.split(",")]
        dropout = config.lora_dropout if stage == "sft" else 0.0
        print0(f"\n{stage}: memory of a rank in GB ({'LoRA' if r else 'full training'}, {dtype}, step run on fake tensors)\n")
        lengths = (int(widths[:, 0].max()), completions, float(widths.sum(1).mean()))
        limits = (config.micro_batch_tokens, config.batch_size, gpu, config.gpu_memory, config.tflops, run.world_size)
        print0(report(model_config, dtype, r, targets, dropout, *lengths, *limits))
    print0(
        f"\n--gradient_checkpointing is {'on' if config.gradient_checkpointing else 'off'}, --shard {config.shard}; nothing was trained"
    )


def main() -> None:
    argv = sys.argv[1:]
    demo = not any(a.split("=")[0] in ("--config", "--model", "--adapter", "--help", "-h") for a in argv)
    config = parse_config(TrainConfig, ["--config", str(DEMO), *argv] if demo else argv)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and config.output_dir and not config.resume:
        config = replace(config, resume="auto")  # torchrun --max-restarts started this again
    if demo:
        print0("no --model, --adapter or --config: the demo's options, configs/demo.json, are the defaults")
    rank, world_size, device = setup_distributed()
    shared = [(Path(tempfile.mkdtemp()) if config.dry_run else open_run_folder(config)) if is_main() else None]
    dist.broadcast_object_list(shared)
    (folder,) = shared
    print0(
        f"{world_size} process{'es' if world_size > 1 else ''}, {device.type}, {stored_dtype(config, device)}, run folder {folder}"
    )

    with first():
        prepared = prepare(config)
    base = folder / "base"
    with first():
        if config.model == "tiny" and not config.adapter and not base.exists():
            size = {"hidden_size": config.tiny_hidden_size, "num_layers": config.tiny_layers}
            beside = folder / "base.unfinished"
            make_base_model(beside, prepared.splits["train"], **size, vocab_size=config.tiny_vocab_size, seed=config.seed)
            beside.rename(base)
    if config.model != "tiny" or config.adapter:
        name = config.model if config.model != "tiny" else read_adapter_config(config.adapter)["base_model_name_or_path"]
        with first("LOCAL_RANK"):
            base = resolve_path(name)
    tokenizer = Tokenizer(base)
    splits = prepared.splits
    with first():
        train, test = (encode_split(prepared, split, tokenizer, config.max_length) for split in ("train", "test"))
    baselines = counting_baselines(splits["test"]) if is_main() else {}
    run = Run(config, rank, world_size, device, folder, base, tokenizer, prepared.hash, train, test, baselines, StopRequest())

    lengths = [len(p) for p in train.prompts]
    print0(
        f"{config.dataset}: {len(train.prompts):,} training and {len(test.prompts):,} test examples, data hash {prepared.hash[:12]}; "
        f"prompts of {np.mean(lengths):.0f} tokens (longest {max(lengths)}), {train.num_shortened + test.num_shortened} shortened "
        f"by {train.num_dropped + test.num_dropped} history items to fit {config.max_length}"
    )
    example = splits["train"][0]
    print0("\nfirst training prompt:\n" + tokenizer.inner.decode(train.prompts[0].tolist(), skip_special_tokens=False))
    print0(f"chosen: {example.candidates[example.target]!r}, tokens {train.slots(0, [example.target])[0]}")

    if config.dry_run:
        dry_run(run)
        shutil.rmtree(folder, ignore_errors=True)  # the tiny model's, if there was one
        return
    start = (base, Path(config.adapter) if config.adapter else None)
    for stage in config.stage_list:
        if (folder / stage / "eval" / "metrics.json").exists():
            print0(f"\n== {stage}: finished before, in {folder / stage}")
        else:
            run_stage(run, stage, *start)
            if config.resume:  # a named checkpoint is that of one stage; those behind it have none yet, or their newest
                run.config = replace(config, resume="auto")
        if stage == "sft":
            start = load_stage(folder / "sft")
    if is_main():
        table = results(run, prepared)
        (folder / "results.md").write_text(f"# {config.dataset}, {config.model}, data {prepared.hash[:12]}\n\n{table}\n")
        print0(f"\n{table}\n\nwritten to {folder / 'results.md'}")
    dist.barrier()


if __name__ == "__main__":
    run_cli(main)
