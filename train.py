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

Left out: training of quantised weights themselves; --load_in_4bit keeps a frozen base in 4 bits.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from baselines import counting_baselines, ranking_metrics
from checkpoint import checkpoints, damage, load_checkpoint, newest_checkpoint, save_checkpoint
from common import (
    Stopped,
    any_rank,
    first,
    free_memory,
    is_main,
    parse_config,
    print0,
    read_json,
    run_cli,
    setup_distributed,
    writing,
)
from data import Tokenizer, encode_split, micro_batches, prefetch, prepare, to_device, tree_widths
from demo.planted import World, bayes_scores
from estimate import device_memory, dry_run, replica_note
from eval import check_data, load_stage, results_table, save_predictions, summarise
from hub.adapter import base_of
from hub.chat import add_end_of_turn
from hub.files import resolve_path
from lora import apply_lora, read_adapter, save_adapter
from model import Transformer, empty_model, save_pretrained
from objectives import SFT, MicroBatch, Preference, Schedule
from options import TrainConfig, stored_dtype
from quantized import give_back_freed_blocks, read_4bit, to_4bit
from reference import (
    check_first_rewards,
    prepare_reference,
    print_preference_notes,
    weights_key,
)
from runs import Logger, Run, StopRequest, line_step, open_run_folder
from sharding import (
    fill_adapter,
    gathered,
    init_adapter,
    local,
    materialize,
    merged_on_reading,
    own_rows,
    read_weights,
    shard,
)
from tiny import CopyTask, make_base_model
from validation import Validation, encode_sample, predict_on_all_ranks

DEMO = Path(__file__).parent / "configs" / "demo.json"


# ------------------------------------------------------------------------------------------------ the model
def load_policy(
    config: TrainConfig, stage: str, base: Path, adapter: Path | None, device
) -> tuple[Transformer, int]:
    """The stage's starting weights, sharded, and the number of replicas: base, plus the adapter it goes on from or a fresh one."""
    r = config.sft_lora_r if stage == "sft" and config.sft_lora_r >= 0 else config.lora_r
    stored = stored_dtype(config, device)
    full_bf16 = (
        r == 0 and stored == torch.bfloat16
    )  # full training keeps fp32 weights and computes in bf16
    model = empty_model(base, torch.float32 if full_bf16 else stored)
    if config.load_in_4bit:
        give_back_freed_blocks(device)
        to_4bit(model)
    torch.compiler.reset()  # what the stage before compiled
    dropout = config.lora_dropout if stage == "sft" else 0.0
    merge, tensors = {}, {}
    if adapter:
        settings, tensors = read_adapter(model, adapter)
        if r > 0:
            apply_lora(model, **settings | {"lora_dropout": dropout})
            print0(
                f"going on with the adapter {adapter}: its own r, alpha and target modules hold, not the options'"
            )
        else:
            merge = merged_on_reading(settings, tensors)
    elif r > 0:
        targets = [t.strip() for t in config.lora_target_modules.split(",")]
        apply_lora(model, r, config.lora_alpha, dropout, targets, config.use_rslora)
    for block in model.model.layers:
        block.checkpointing = config.gradient_checkpointing
        if config.compile:  # the arithmetic only: checkpointing and sharding stay outside; lengths differ from the start
            block.compiled = torch.compile(block.compute, dynamic=True)
    replicas = shard(
        model, config.shard, config.shard_group_size, device, torch.bfloat16 if full_bf16 else None
    )
    materialize(model, device)
    if config.load_in_4bit:
        read_4bit(model, model.source, stored, own_rows, local)
    else:
        read_weights(model, model.source, merge)
    if r > 0:
        fill_adapter(model, tensors) if adapter else init_adapter(model, config.seed)
    return model, replicas


# ------------------------------------------------------------------------------------------------ one optimizer step
class NotFinite(ValueError):
    """Loss or gradient of a step was not finite; its update was left out. `ranks` are those whose own loss was not."""

    def __init__(self, message: str, ranks: list[int]):
        super().__init__(message)
        self.ranks = ranks


class StepMetrics:
    """Metrics of one step on their way to the host. Reading them one step later never waits for a busy GPU."""

    def __init__(self, means: dict[str, Tensor], not_finite: Tensor, lr: float):
        self.on_device, self.lr = means, lr
        values = torch.cat([torch.stack(list(means.values())), not_finite])
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
        flags = values[len(self.on_device) :]
        metrics = dict(zip(self.on_device, values, strict=False)) | {"learning_rate": self.lr}
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise NotFinite(
                f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']} is not finite; "
                "this update was left out. A smaller learning rate or --dtype float32 usually helps",
                [rank for rank, flag in enumerate(flags) if flag],
            )
        return metrics


def reduce_metrics(
    sums: dict[str, Tensor],  # this rank's, on its device, float64
    counts: dict[str, float],
) -> tuple[dict[str, Tensor], Tensor]:
    """Means over all ranks by name, and a flag per rank (R,): its own loss was not finite.

    One all_reduce, and nothing is read."""
    totals = torch.stack(list(sums.values()))
    known = torch.tensor(list(counts.values()), dtype=torch.double)
    own = torch.eye(dist.get_world_size(), dtype=torch.double)[dist.get_rank()]
    flags = to_device(own, totals.device) * ~sums["loss"].isfinite()
    reduced = torch.cat([totals, to_device(known, totals.device), flags])
    dist.all_reduce(reduced)

    totals, known, flags = reduced.split([len(sums), len(sums), len(own)])
    return dict(zip(sums, totals / known, strict=True)), flags


def train_step(
    model,
    optimizer,
    batches: list,
    compute: Callable,
    lr: float,
    config: TrainConfig,
    replicas: int | None = None,
) -> StepMetrics:
    """Accumulate gradients over this rank's micro-batches, clip, step. Returns the metrics of the whole global batch.

    `compute(batch) -> (loss, sums)`: the loss is already divided by global counts, so micro-batches and ranks add up
    to one big batch; `sums` maps metric names to (sum, count). Every rank brings equally many batches. `replicas` ranks hold
    the same rows of a gradient; None: all do. Nothing here waits for the GPU."""
    sums, counts = defaultdict(float), defaultdict(float)
    sharded, world_size = hasattr(model, "set_requires_gradient_sync"), dist.get_world_size()
    # Adapters are small: their gradients are reduced once per step. Those of all weights, whole in
    # fp32, are what sharding is there to avoid: each micro-batch reduces its own.
    only_adapters = bool(getattr(model, "lora_config", None))
    # ------------------------- training step begins -------------------------
    for group in optimizer.param_groups:
        group["lr"] = lr

    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        if sharded:  # until they are reduced, gradients are whole on every rank
            model.set_requires_gradient_sync(last or not only_adapters)
        loss, metrics = compute(batch)
        # Sharded gradients are averaged over ranks, but losses are divided by global counts
        # already: undo the average.
        (loss * world_size).backward()
        for name, (total, count) in metrics.items():
            sums[name] += total.double()
            counts[name] += count
    if not sharded and world_size > 1:
        average_gradients(optimizer)

    # Plain local tensors: DTensor's own clip_grad_norm_ costs more than a small model's whole step.
    gradients = [local(p.grad) for group in optimizer.param_groups for p in group["params"]]
    sums["grad_norm"] = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    counts["grad_norm"] = (replicas or world_size) / world_size  # so many ranks hold the same rows
    means, not_finite = reduce_metrics(sums, counts)
    means["grad_norm"] = grad_norm = means["grad_norm"].sqrt()

    if config.max_grad_norm:
        clip = (config.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, clip.float())
    # fused AdamW leaves the whole update out where this is 1
    optimizer.found_inf = (~(grad_norm + means["loss"]).isfinite()).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    # ------------------------- training step ends ---------------------------
    return StepMetrics(means, not_finite, lr)


def average_gradients(optimizer) -> None:
    """--shard none: one all_reduce over all gradients as one flat tensor."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([g.numel() for g in gradients])
    torch._foreach_copy_(
        gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
    )


def get_lr(step: int, num_steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


# ------------------------------------------------------------------------------------------------ before the loop
def practise_copying(
    config: TrainConfig,
    task: CopyTask,
    optimizer,
    rank: int,
    world_size: int,
    replicas: int,
    log: Callable,
) -> None:
    """Warm-up of a random model (see tiny.py): until it copies out of lists of 20 titles, or --copy_steps are over."""
    for step in range(config.copy_steps):
        widths = task.draw(step)
        batches = micro_batches(widths, range(len(widths)), world_size, config.micro_batch_tokens)[
            rank
        ]
        lr = config.sft_learning_rate * min(1.0, (step + 1) / 30)
        metrics = train_step(task.model, optimizer, batches, task, lr, config, replicas).read()
        mastered = task.update(metrics)
        log(step, config.copy_steps, metrics | {"list_size": task.list_size}, "copy")
        if mastered:
            break
    print0(
        f"copying practice: {step + 1} steps, lists of {task.list_size}, begins with a listed title {task.listed:.2f}, goes on with it {task.accuracy:.2f}"
    )


# ------------------------------------------------------------------------------------------------ one stage
def starting_weights(base: Path, adapter: Path | None) -> str:
    """weights_key, for which rank 0 alone reads the files."""
    shared = [weights_key(base, adapter) if is_main() else None]
    dist.broadcast_object_list(shared)
    return shared[0]


def check_start(folder: Path, base: Path, adapter: Path | None) -> None:
    """A finished stage stands in one table with those to come, so it must have begun as they do."""
    before = read_json(folder / "base.json").get("starting_weights")  # older runs have none
    now = starting_weights(base, adapter)
    if before and before != now:
        raise ValueError(
            f"{folder.name} was finished from weights {before[:12]}, now they are {now[:12]}: "
            f"{base}{f' or {adapter}' if adapter else ''} has changed. Put it back, or choose "
            f"another --output_dir; without {folder} the stage runs again"
        )


def run_stage(run: Run, stage: str, base: Path, adapter: Path | None) -> None:
    """Train and test one stage, starting from base and adapter; its folder appears, whole, when it is done.

    With --resume it goes on from a checkpoint, by default the newest whole one that an earlier start left."""
    config, rank, world_size, device = run.config, run.rank, run.world_size, run.device
    folder = run.folder / f"{stage}.unfinished"
    if is_main():
        if not config.resume:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
    dist.barrier()
    torch.manual_seed(config.seed + rank)  # dropout; everything else draws from its own generator
    model, replicas = load_policy(config, stage, base, adapter, device)
    if base == run.base and config.model != "tiny":
        model.name_or_path = (
            config.model
        )  # a hub name, if it is one, and not the folder of its files
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    if stage == "sft":
        objective, epochs, peak = (
            SFT(config, model, run.train, device),
            config.sft_epochs,
            config.sft_learning_rate,
        )
    else:
        objective = Preference(config, stage, model, run.train, device)
        epochs, peak = config.epochs, config.learning_rate
    widths = tree_widths(run.train, objective.slots)
    schedule = Schedule(config, epochs, widths, world_size)
    print0(
        f"\n== {stage}: {len(widths):,} prompts, {schedule.num_steps} steps of {config.batch_size}, peak learning rate {peak:g}; "
        f"validated on {len(run.val.prompts) if run.val else 0} users; "
        f"{trainable:,} of {total:,} parameters trained, from {base}{f' + {adapter}' if adapter else ''}"
    )
    if config.shard == "full" and world_size > 1:
        stored = sum(p.numel() * p.element_size() for p in model.parameters())
        print0(replica_note(stored, 12 * trainable, world_size, device_memory(device)), end="")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=peak,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )

    weights = starting_weights(base, adapter)
    identity = {"stage": stage, "data": run.data_hash, "base or adapter to start from": weights}
    if stage != "sft":
        identity["reference"] = "none"
        if objective.has_reference:
            identity["reference"] = prepare_reference(run, weights, objective, schedule)
        print_preference_notes(config, objective)
    model.train()

    start = resume_stage(run, folder, model, optimizer, objective, identity)
    logger = Logger(folder / "metrics.jsonl", config.logging_steps)
    validation = Validation(run, stage, folder, model, optimizer, identity)
    validation.resume(start or 0)

    def save(step: int) -> None:
        taken = next(
            (int(state["step"]) for state in optimizer.state.values()), 0
        )  # fewer than `step` if some were skipped
        facts = identity | {"optimizer_steps": taken} | objective.state() | validation.state()
        save_checkpoint(folder, step, model, optimizer, facts, replicas, config.save_total_limit)
        validation.forget_worse()

    if start is None:
        start = 0
        if stage == "sft" and config.copy_steps:
            task = CopyTask(model, run.train, run.tokenizer, config.seed, device)
            practise_copying(config, task, optimizer, rank, world_size, replicas, logger)
            if config.save_steps:
                save(0)

    def prepare(step: int) -> list[MicroBatch]:
        return [
            objective.prepare(batch, schedule.examples(step))
            for batch in schedule.micro_batches(step, rank)
        ]

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
                raise ValueError(
                    f"{problem}. Last checkpoint: {last or 'none'} (--max_skipped_steps goes on)"
                ) from None
            print0(f"note: {problem}")
            return
        logger(step, schedule.num_steps, metrics, stage)

    run.stop.in_loop = True
    pending = None  # the step before, read while the GPU works on this one
    for step, batches in enumerate(prefetch(prepare, range(start, schedule.num_steps)), start):
        lr = get_lr(step, schedule.num_steps, peak, config.warmup_ratio)
        result = train_step(model, optimizer, batches, objective, lr, config, replicas)
        objective.after_step(result.on_device.__getitem__)
        if step == 0 and stage != "sft" and objective.has_reference:
            check_first_rewards(objective, exact=stored_dtype(config, device) == torch.float32)
        if pending:
            log(step - 1, pending)
        pending, stopping = result, any_rank(run.stop.asked)
        last = step + 1 == schedule.num_steps
        if not stopping and validation.due(step + 1, schedule.num_steps):  # else save and leave
            log(step, pending)
            pending = None
            validation(step + 1, replicas)
        if stopping or (config.save_steps and ((step + 1) % config.save_steps == 0 or last)):
            if pending:
                log(step, pending)
            pending = None
            save(step + 1)
        if stopping:
            logger.close()
            raise Stopped(
                f"stopped by SIGTERM after step {step + 1}, which is saved; --resume auto goes on from there"
            )
    run.stop.in_loop = False
    if pending:
        log(step, pending)
    logger.close()
    validation.load_best(schedule.num_steps)

    with writing(folder):
        save_stage(run, model, base, folder, weights)
    finish_stage(run, stage, model, folder)


def finish_stage(run: Run, stage: str, model: Transformer, folder: Path) -> None:
    """Test it; then its folder gets its name."""
    metrics, final = test_stage(run, model, folder), run.folder / stage
    if is_main():
        with writing(final):
            for done in checkpoints(folder):
                shutil.rmtree(done)
            shutil.rmtree(folder / "best", ignore_errors=True)
            folder.rename(final)
        print0(results_table({stage: metrics}))
    dist.barrier()


def test_raw(run: Run, base: Path, adapter: Path | None) -> None:
    """The model that training starts from, tested as it is: the raw language model of the paper's Table 1."""
    folder = run.folder / "raw.unfinished"
    print0(
        f"\n== raw: nothing is trained, {base}{f' + {adapter}' if adapter else ''} is tested as it is"
    )
    model, _ = load_policy(run.config, "raw", base, adapter, run.device)
    if is_main():
        folder.mkdir(exist_ok=True)
        write_base(run, base, folder, weights_key(base, adapter), adapter)
    finish_stage(run, "raw", model, folder)


def resume_stage(
    run: Run, folder: Path, model, optimizer, objective: SFT, identity: dict
) -> int | None:
    """Load the checkpoint to go on from; the number of steps it has seen, or None to start from the beginning."""
    config, checkpoint = run.config, None
    if config.resume == "auto":
        checkpoint = newest_checkpoint(folder)
    elif config.resume:
        checkpoint = Path(config.resume)
        if checkpoint.resolve().parent != folder.resolve():
            raise ValueError(
                f"--resume {checkpoint}: not a checkpoint of the stage that comes next, {folder}"
            )
        if problem := damage(checkpoint):
            raise ValueError(
                f"--resume {checkpoint}: damaged ({problem}); --resume auto takes the newest whole one"
            )
    metrics = folder / "metrics.jsonl"
    if checkpoint is None:
        if is_main():
            metrics.unlink(missing_ok=True)
        return None
    state = load_checkpoint(checkpoint, model, optimizer, identity)
    objective.load_state(state)
    if is_main():
        kept = [
            line for line in metrics.read_text().splitlines() if line_step(line) <= state["step"]
        ]
        beside = metrics.with_suffix(".part")
        beside.write_text("".join(f"{line}\n" for line in kept))
        beside.rename(metrics)
    print0(f"going on from {checkpoint}, after step {state['step']}")
    if state["world_size"] != run.world_size:
        torch.manual_seed(
            int.from_bytes(
                hashlib.sha256(f"{config.seed} {state['step']} {run.rank}".encode()).digest()[:6],
                "big",
            )
        )
        print0(
            f"note: it was made by {state['world_size']} processes; dropout is seeded anew from seed, step and rank"
        )
    return state["step"]


def where_not_finite(run: Run, schedule: Schedule, step: int, ranks: list[int]) -> str:
    """The ranks whose own loss was not finite, and their examples."""
    who = f"rank {', '.join(map(str, ranks))}" if ranks else "the gradient only"
    examples = [
        e
        for r in ranks or range(run.world_size)
        for batch in schedule.micro_batches(step, r)
        for e in batch
    ]
    log, position = run.train.examples.log, run.train.examples.position
    users = ", ".join(f"{e} (user {log.user_ids[log.user[position[e]]]})" for e in examples[:8])
    return f"{who}, examples {users}{' ...' if len(examples) > 8 else ''}"


def save_stage(run: Run, model: Transformer, base: Path, folder: Path, weights: str) -> None:
    """Adapter in PEFT's format, or the whole model with its tokenizer, and which base it stands on."""
    if getattr(model, "lora_config", None):
        state = dict(gathered(model, only_adapter=True))
        if is_main():
            save_adapter(model, folder, state)
    else:
        save_pretrained(model, folder, gathered(model), write=is_main())
        if is_main():
            copy_tokenizer(base, folder)
            if run.config.prompt_format == "chat":
                add_end_of_turn(folder, run.tokenizer.eos_id)
    if is_main():
        write_base(run, base, folder, weights)


def write_base(
    run: Run, base: Path, folder: Path, weights: str, adapter: Path | None = None
) -> None:
    """base.json: the model that a stage's adapter stands on, and what the stage started from.

    `adapter` is another stage's or run's, if that is what was tested."""
    inside = base.resolve().is_relative_to(run.folder.resolve())  # then the run folder may be moved
    facts = {"base": os.path.relpath(base, folder) if inside else str(base.resolve())}
    facts |= {"adapter": str(adapter.resolve())} if adapter else {}
    facts["starting_weights"] = weights
    (folder / "base.json").write_text(json.dumps(facts) + "\n")


def test_stage(run: Run, model: Transformer, folder: Path) -> dict | None:
    """Evaluate on the test split, divided over ranks; metrics on rank 0, which also writes them."""
    config, started = run.config, time.time()
    records = predict_on_all_ranks(
        run, model, run.test, config.decode, config.decode_rest, "evaluation"
    )
    if not is_main():
        return None
    metrics = summarise(records, run.baselines) | {
        "data_hash": run.data_hash,
        "seconds": round(time.time() - started, 1),
    }
    with writing(folder / "eval"):
        save_predictions(folder / "eval", metrics, records)
    return metrics


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        if (source / name).exists():
            shutil.copy(source / name, target / name)


# ------------------------------------------------------------------------------------------------ the run
def results(run: Run, prepared) -> str:
    """The run's table: chance and counting baselines, every finished stage, and the optimum where it is known."""
    rows = {s: read_json(run.folder / s / "eval" / "metrics.json") for s in run.config.stage_list}
    bounds = {}
    if (
        run.config.dataset == "planted" and run.config.history >= World.max_length - 1
    ):  # else it is not known
        world = World(num_users=run.config.planted_users, seed=run.config.data_seed)
        scores = bayes_scores(world, prepared.splits["test"], run.config.min_rating)
        bounds["Bayes-optimal"] = float(
            ranking_metrics(scores, prepared.splits["test"].target)["hit_ratio@1"].mean()
        )
    return results_table(rows, bounds)


def main() -> None:
    argv = sys.argv[1:]
    demo = not any(
        a.split("=")[0] in ("--config", "--model", "--adapter", "--help", "-h") for a in argv
    )
    config = parse_config(TrainConfig, ["--config", str(DEMO), *argv] if demo else argv)
    if (
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        and config.output_dir
        and not config.resume
    ):
        config = replace(config, resume="auto")  # torchrun --max-restarts started this again
    if demo:
        print0(
            "no --model, --adapter or --config: the demo's options, configs/demo.json, are the defaults"
        )
    rank, world_size, device = setup_distributed()
    shared = [
        (Path(tempfile.mkdtemp()) if config.dry_run else open_run_folder(config))
        if is_main()
        else None
    ]
    dist.broadcast_object_list(shared)
    (folder,) = shared
    print0(
        f"{world_size} process{'es' if world_size > 1 else ''}, {device.type}, {stored_dtype(config, device)}, run folder {folder}"
    )

    with first():
        prepared = prepare(config, check=is_main())
    base = folder / "base"
    with first():
        if config.model == "tiny" and not config.adapter and not base.exists():
            size = {"hidden_size": config.tiny_hidden_size, "num_layers": config.tiny_layers}
            beside = folder / "base.unfinished"
            make_base_model(
                beside,
                prepared.splits["train"],
                **size,
                vocab_size=config.tiny_vocab_size,
                seed=config.seed,
            )
            beside.rename(base)
    if config.model != "tiny" or config.adapter:
        name = config.model if config.model != "tiny" else base_of(config.adapter)
        with first("LOCAL_RANK"):
            base = resolve_path(name, weights=not config.dry_run)
    tokenizer = Tokenizer(base, config.prompt_format)
    splits = prepared.splits
    with first():
        train, test = (
            encode_split(prepared, split, tokenizer, config.max_length)
            for split in ("train", "test")
        )
    baselines = counting_baselines(splits["test"]) if is_main() else {}
    run = Run(
        config,
        rank,
        world_size,
        device,
        folder,
        base,
        tokenizer,
        prepared.hash,
        train,
        encode_sample(splits["val"], tokenizer, config),
        test,
        baselines,
        StopRequest(),
    )

    lengths = [len(p) for p in train.prompts]
    print0(
        f"{config.dataset}: {len(train.prompts):,} training, "
        f"{len(run.val.prompts) if run.val else 0:,} validation and {len(test.prompts):,} test examples, "
        f"data hash {prepared.hash[:12]}; "
        f"prompts of {np.mean(lengths):.0f} tokens (longest {max(lengths)}), {train.num_shortened + test.num_shortened} shortened "
        f"by {train.num_dropped + test.num_dropped} history items to fit {config.max_length}"
    )
    example = splits["train"][0]
    print0(
        "\nfirst training prompt:\n"
        + tokenizer.inner.decode(train.prompts[0].tolist(), skip_special_tokens=False)
    )
    print0(
        f"chosen: {example.candidates[example.target]!r}, tokens {train.slots(0, [example.target])[0]}"
    )

    if config.dry_run:
        dry_run(run)
        shutil.rmtree(folder, ignore_errors=True)  # the tiny model's, if there was one
        return
    start = (base, Path(config.adapter) if config.adapter else None)
    finished = [s for s in config.stage_list if (folder / s / "eval" / "metrics.json").exists()]
    for stage in finished:
        check_data(folder / stage, prepared.hash, "choose another --output_dir for the new data")
    for stage in config.stage_list:
        if stage in finished:
            check_start(folder / stage, *start)
            print0(f"\n== {stage}: finished before, in {folder / stage}")
        elif stage == "raw":
            test_raw(run, *start)
        else:
            run_stage(run, stage, *start)
            if config.resume:  # a named checkpoint is that of one stage; those behind it have none yet, or their newest
                run.config = replace(config, resume="auto")
        free_memory()  # of this stage's model and optimizer, before the next one's are made
        if stage == "sft":
            start = load_stage(folder / "sft")
    if is_main():
        table = results(run, prepared)
        (folder / "results.md").write_text(
            f"# {config.dataset}, {config.model}, data {prepared.hash[:12]}\n\n{table}\n"
        )
        print0(f"\n{table}\n\nwritten to {folder / 'results.md'}")
    dist.barrier()


if __name__ == "__main__":
    run_cli(main)
