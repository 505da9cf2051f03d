"""SFT, then preference training, of a LLaMA or Qwen model for sequential recommendation.

    torchrun --nproc_per_node 2 train.py    the demo: planted world, a tiny model, 2 processes
    python train.py                         the same in one process
    torchrun --nproc_per_node 8 train.py --config configs/paper.json \
        --model meta-llama/Llama-3.1-8B --dataset movielens --data_dir ml-1m.zip \
        --output_dir runs/ml1m

`--stages sft,recpo,sdpo` runs SFT once and every preference loss behind it from the same SFT
result. Each stage writes `<output_dir>/<stage>/`: PEFT adapter or Hugging Face model,
metrics.jsonl, eval/metrics.json, eval/predictions.jsonl.

One stage is one pass through `run_stage`: load the starting weights -> (reference log-probs) ->
the loop -> save -> test. The reference policy is the policy before its first step, so its
log-probs are computed once and kept in a file; there is no second model. Every rank draws the
same global batch from (seed, epoch, step) and takes its share, so that any number of processes
and micro-batches gives the same update.

`--save_steps` leaves checkpoints inside a stage (runtime/checkpoint.py), Ctrl-C and SIGTERM one
at the next step; `--resume auto` goes on. `--eval_steps` answers validation users on the way, and
`--keep best` keeps the weights of the best step (runtime/validation.py). `--dry_run` trains nothing
and tells what a run needs (runtime/estimate.py).

In this file: the options, where the model is, one optimizer step, evaluation over ranks, one stage
with the loop (`train`), the run. The losses are in losses.py, what a micro-batch adds to a
step in objectives.py, the model in model.py; what surrounds training is in runtime/.

Left out: training of quantised weights themselves; --load_in_4bit keeps a frozen base in 4 bits.
"""

import contextlib
import math
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common import (
    arg,
    changed_options,
    hours,
    is_main,
    parse_config,
    print0,
    rank_zero_first,
    read_json,
    run_cli,
    setup_distributed,
    writing,
)
from data import NUM_CANDIDATES, Encoded, Examples, encode_examples, to_device, tree_widths
from demo.pretrain import BASE as DEMO_BASE
from demo.pretrain import TITLES, titles_base
from eval import predict, ranking_metrics, results_table, summarise
from hub.files import resolve_path
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, data_defaults, encode_split, prepare
from lora import TARGET_MODULES, base_of
from losses import MARGINS
from model import ModelConfig, Transformer
from objectives import PAIRWISE, PREFERENCE_LOSSES, MicroBatch, Objective, Schedule
from runtime.checkpoint import Best, checkpoints, save_checkpoint
from runtime.estimate import dry_run
from runtime.passes import any_rank, prefetch
from runtime.policy import free_memory, load_policy, say_what_4_bits_cost, stored_dtype
from runtime.reference import check_first_rewards, prepare_reference, print_preference_notes
from runtime.runs import (
    Logger,
    NotFinite,
    Run,
    StepMetrics,
    StopRequest,
    describe_data,
    describe_stage,
    run_folder,
    where_not_finite,
)
from runtime.sharding import average_gradients, local, reshard
from runtime.stages import (
    check_data,
    check_start,
    load_stage,
    resume_stage,
    save_predictions,
    save_stage,
    starting_weights,
    tokens_key,
    weights_key,
    write_base,
)
from runtime.validation import load_best, validate

CONFIGS = Path(__file__).parent / "configs"
SMALL = 50_000_000  # parameters; a model of fewer has other defaults

# ------------------------------------------------------------------------ options
PREFERENCE = frozenset(PREFERENCE_LOSSES)
READ_BY = {  # option of a loss -> the stages that read it
    "margin_lambda": {"recpo"},
    "margin": {"recpo"},
    "num_negatives": PREFERENCE - set(PAIRWISE),
    "negative_source": PREFERENCE,
    "simpo_gamma": {"simpo"},
}


THREE_WAYS = """Three ways:
  --model titles      a tiny base, made for the titles of this log and then trained: 2 CPU cores
                      and 2 GB; about 10 minutes for up to 1,000 titles, 25 for 4,000, and again
                      as long for the training
  --model NAME        a pretrained model, a directory or a hub name. HuggingFaceTB/SmolLM2-135M or
                      Qwen/Qwen3-0.6B: one GPU of 16 GB, minutes to an hour for 10,000 prompts
                      (on 2 cores 2 s a prompt). meta-llama/Llama-3.1-8B, the paper's: GPUs of
                      24 GB or more, hours; --dry_run says what it needs
  --model demo/base   to try the plumbing only, in minutes: it cannot read other titles than
                      the planted world's"""
INVALID = (
    "The figures of this stage say little about taste: the model does not read these lists. "
    "Look at its eval/predictions.jsonl. Usual causes: a base that cannot read these titles "
    "(demo/base reads the planted world's alone; --model titles makes one for yours), too few "
    "steps, or too high a learning rate."
)


@dataclass(frozen=True)
class TrainConfig(DataConfig):
    """SFT, then preference training, from a Hugging Face checkpoint.

    Without --config, other defaults than these hold for models below 50 million parameters
    (configs/small.json) and for --model titles (configs/titles.json)."""

    model: str = arg(
        "",
        "Hugging Face directory or hub name; titles = a tiny base made for the titles of this log; "
        "empty = the base of --adapter, or demo/base for the planted world",
        group="model",
    )
    adapter: str = arg(
        "", "PEFT adapter to start from: the policy and, without an sft stage, the reference"
    )
    prompt_format: str = arg(
        "plain",
        "plain text, or chat: the prompt is the user's turn of the model's own chat template",
        choices=("plain", "chat"),
    )
    dtype: str = arg(
        "auto",
        "float32 or bfloat16; auto = bfloat16 on a GPU, float32 on CPU (adapters are float32)",
        choices=("auto", "float32", "bfloat16"),
    )
    load_in_4bit: bool = arg(
        False, "frozen linear layers in 4 bits (NF4): a quarter of the memory, slower; LoRA only"
    )
    lora_r: int = arg(8, "LoRA rank; 0 = train all parameters", at_least=0)
    sft_lora_r: int = arg(
        -1, "LoRA rank of the sft stage; -1 = lora_r, 0 = all parameters", at_least=-1
    )
    lora_alpha: float = arg(32.0, "LoRA alpha; scaling = alpha / r", above=0)
    lora_dropout: float = arg(
        0.1, "dropout on the adapter's input, in the sft stage only", at_least=0, below=1
    )
    lora_target_modules: str = arg(
        ",".join(TARGET_MODULES), "comma-separated linear layers that get an adapter"
    )
    use_rslora: bool = arg(
        False, "scaling = alpha / sqrt(r); llama.cpp ignores it: merge before converting"
    )
    stages: str = arg(
        "sft,recpo",
        "comma-separated: raw (test the model as it is), sft, "
        f"and any of {', '.join(PREFERENCE_LOSSES)}, each from the sft result",
        group="objective",
    )
    beta: float = arg(1.0, "strength of the KL anchor: reward = beta * log-ratio", above=0)
    margin_lambda: float = arg(2.0, "weight of the target margin in recpo; 0 is S-DPO", at_least=0)
    margin: str = arg("ratio", f"target margin of recpo: {', '.join(MARGINS)}", choices=MARGINS)
    num_negatives: int = arg(
        3,
        "rejected titles per prompt (recpo, sdpo; the others take 1)",
        at_least=1,
        at_most=NUM_CANDIDATES - 1,
    )
    negative_source: str = arg(
        "both",
        "rejected titles are both, only random, or only follow(-ups)",
        choices=("both", "random", "follow"),
    )
    simpo_gamma: float = arg(
        2.0,
        "simpo: target margin; gamma / beta between 0.25 and 1 is advised, the paper has 2",
        at_least=0,
    )
    history_weight: float = arg(
        0.0,
        "sft: weight of a token of the history, as a target, beside one of the answer; "
        "0 = the answer alone",
        at_least=0,
    )
    sft_weight: float = arg(
        -1.0,
        "weight of the chosen title's mean NLL added to a preference loss; -1: 1 for cpo, else 0",
        at_least=-1,
    )
    sft_epochs: float = arg(
        5.0, "epochs of the sft stage; a fraction is fine", group="optimisation", above=0
    )
    epochs: float = arg(3.0, "epochs of a preference stage; a fraction is fine", above=0)
    max_steps: int = arg(0, "stop every stage after so many steps; 0 = off", at_least=0)
    batch_size: int = arg(128, "prompts per optimizer step, over all processes", at_least=1)
    micro_batch_tokens: int = arg(
        8192, "padded tokens of one forward pass per process; more only costs memory", at_least=1
    )
    sft_learning_rate: float = arg(1e-5, "peak learning rate of the sft stage", above=0)
    learning_rate: float = arg(1e-5, "peak learning rate of a preference stage", above=0)
    warmup_ratio: float = arg(
        0.05,
        "share of the steps with rising learning rate; a cosine to 0 follows",
        at_least=0,
        at_most=1,
    )
    adam_beta2: float = arg(0.999, "AdamW second-moment decay", at_least=0, below=1)
    max_grad_norm: float = arg(0.3, "clip the gradient's norm; 0 = off", at_least=0)
    shard: str = arg(
        "full",
        "full: split all weights over the processes; none: a replica each, faster where it fits; "
        "hybrid: see next",
        choices=("full", "none", "hybrid"),
    )
    shard_group_size: int = arg(
        0,
        "hybrid: processes that share one copy; 0 = those of a machine (LOCAL_WORLD_SIZE)",
        at_least=0,
    )
    gradient_checkpointing: bool = arg(
        False, "recompute each block in backward: less memory, about a third slower"
    )
    compile: bool = arg(
        False,
        "torch.compile the blocks: compilation first, seconds to minutes, "
        "then fewer passes over memory",
    )
    max_length: int = arg(
        1024,
        "tokens of prompt and longest candidate; longer prompts lose their oldest history",
        at_least=1,
    )
    seed: int = arg(0, "seed of initial weights, batch order and dropout")
    decode_rest: bool = arg(
        True,
        "generate an answer where no candidate verifies; off: count it invalid",
        group="evaluation and output",
    )
    val_size: int = arg(
        200,
        "validation users (a sample) of the curves; 0 = none. "
        "One pass: what it does not verify is invalid",
        at_least=0,
    )
    eval_steps: int = arg(
        0, "steps between validations; 0 = only at the end of each stage", at_least=0
    )
    keep: str = arg(
        "last",
        "weights that a stage saves and tests: its last, or the best by validation hit_ratio@1",
        choices=("last", "best"),
    )
    dry_run: bool = arg(
        False,
        "train nothing: show an example, first losses, memory of a rank and the run's hours; "
        "needs no weights",
    )
    output_dir: str = arg("", "run folder; empty = the first unused of runs/<dataset>-1, -2, ...")
    save_steps: int = arg(
        100,
        "steps between checkpoints of a stage; 0 = only when the run is stopped (Ctrl-C, SIGTERM)",
        at_least=0,
    )
    save_total_limit: int = arg(2, "checkpoints kept per stage", at_least=1)
    resume: str = arg(
        "",
        "auto: go on with the first unfinished stage of output_dir, "
        "from its newest whole checkpoint",
        choices=("", "auto"),
    )
    max_skipped_steps: int = arg(
        0,
        "steps with a loss or gradient that is not finite which may be left out; "
        "one more stops the run",
        at_least=0,
    )
    logging_steps: int = arg(
        10, "steps between printed lines; metrics.jsonl has every step", at_least=1
    )

    def __post_init__(self):
        super().__post_init__()
        stages = self.stage_list
        order = [s for s in ("raw", "sft") if s in stages]
        known = set(stages) <= {"raw", "sft", *PREFERENCE_LOSSES}
        once = len(set(stages)) == len(stages)
        if not (stages and known and once and stages[: len(order)] == order):
            raise ValueError(
                "--stages: raw and sft first (or not at all), then any of "
                f"{', '.join(PREFERENCE_LOSSES)}, each once; got {self.stages!r}"
            )
        if self.dataset != "planted" and not (self.model or self.adapter):
            raise ValueError(f"--dataset {self.dataset} needs a --model. {THREE_WAYS}")
        if self.model == TITLES and self.adapter:
            raise ValueError(f"--model {TITLES} is a new base, which no --adapter fits: give one")
        if self.load_in_4bit and (self.lora_r == 0 or self.sft_lora_r == 0):
            raise ValueError(
                "--load_in_4bit freezes the base: it needs adapters in every stage, "
                "so neither --lora_r nor --sft_lora_r may be 0"
            )
        if self.resume and not self.output_dir:
            raise ValueError("--resume needs --output_dir, the run folder to go on with")
        if -1 < self.sft_weight < 0:
            raise ValueError(
                f"--sft_weight must be >= 0, or -1 for the loss's own, got {self.sft_weight}"
            )
        if self.keep == "best" and not (self.eval_steps and self.val_size):
            raise ValueError("--keep best needs --eval_steps and --val_size, by which it is found")
        if self.margin == "none" and "margin_lambda" in changed_options(self):
            raise ValueError("--margin_lambda has no effect with --margin none: leave one out")
        self.refuse_inert()

    def refuse_inert(self) -> None:
        """ValueError for an option that no stage of this run reads."""
        for name in sorted(changed_options(self) & READ_BY.keys()):
            if not READ_BY[name] & set(self.stage_list):
                raise ValueError(
                    f"--{name} is read by {', '.join(sorted(READ_BY[name]))} alone, "
                    f"and none of them is among the stages {self.stages}: leave it out"
                )

    @property
    def stage_list(self) -> list[str]:
        return [s.strip() for s in self.stages.split(",") if s.strip()]


# ------------------------------------------------------------------------ the model
def find_base(model: str, adapter: str, weights: bool) -> Path:
    """The directory of the model: --model, or the one that --adapter names, or the demo's."""
    if not model and not adapter:
        return DEMO_BASE
    return resolve_path(model or base_of(adapter), weights=weights)


def defaults(given: dict) -> dict:
    """Defaults that suit the data set and the model, where no --config is given."""
    model, adapter = given.get("model", ""), given.get("adapter", "")
    if not model and not adapter and given.get("dataset", "planted") != "planted":
        return {}  # refused by TrainConfig
    if model == TITLES:
        chosen, why = CONFIGS / "titles.json", "for --model titles"
    else:
        with torch.device("meta"):
            shapes = Transformer(ModelConfig.from_pretrained(find_base(model, adapter, False)))
        count = sum(p.numel() for p in shapes.parameters())
        chosen = CONFIGS / "small.json" if count < SMALL else None
        why = f"for a model of {count / 1e6:,.1f} million parameters"
    name = f"configs/{chosen.name}" if chosen else "those of --help, the paper's,"
    print0(f"defaults: {name} {why}; flags override them, --config FILE replaces them")
    return data_defaults(given) | (read_json(chosen) if chosen else {})


# ------------------------------------------------------------------------ one optimizer step
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
    """Accumulate gradients over this rank's micro-batches, clip, step.

    Returns the metrics of the whole global batch.

    `compute(batch) -> (loss, sums)`: the loss is already divided by global counts, so
    micro-batches and ranks add up to one big batch; `sums` maps metric names to (sum, count).
    Every rank brings equally many batches. `replicas` ranks hold the same rows of a gradient;
    None: all do. Nothing here waits for the GPU."""
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


def get_lr(step: int, num_steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


# ------------------------------------------------------------------------ evaluation over ranks
def encode_sample(val: Examples, tokenizer, config) -> Encoded | None:
    """The validation users of a run: --val_size of the split, drawn by the seed of the data."""
    size = min(config.val_size, len(val))
    if size == 0:
        return None
    rows = np.random.default_rng([config.data_seed, 1]).permutation(len(val))[:size]
    return encode_examples(val.select(np.sort(rows)), tokenizer, config.max_length)


def predict_on_all_ranks(run, model, encoded: Encoded, decode: str, decode_rest: bool):
    """Records of all examples on rank 0, in their order, and None on the others.

    The model is left resharded, and in the mode it came in."""
    training = model.training
    model.eval()
    mine = range(run.rank, len(encoded.prompts), run.world_size)
    records = predict(
        model,
        run.tokenizer,
        encoded,
        mine,
        decode=decode,
        decode_rest=decode_rest,
        micro_batch_tokens=run.config.micro_batch_tokens,
        any_rank=any_rank,
    )
    model.train(training)
    reshard(model)
    gathered = [None] * run.world_size if is_main() else None
    dist.gather_object(records, gathered)
    if not is_main():
        return None
    records = [record for part in gathered for record in part]
    return sorted(records, key=lambda record: record["example"])


def validation_metrics(run: Run, model: Transformer) -> dict | None:
    """Of the validation users, on rank 0; one pass:
    what no candidate verifies counts as invalid."""
    records = predict_on_all_ranks(run, model, run.val, "greedy", False)
    return summarise(records) if is_main() else None


# ------------------------------------------------------------------------ one stage
@dataclass
class Stage:
    """One stage while it is trained:
    its model, and what a step, a line of the log and a checkpoint need."""

    run: Run
    name: str
    folder: Path  # <stage>.unfinished, until all is done
    start: tuple[Path, Path | None]  # base, and the adapter it goes on from
    weights: str  # hash of both
    model: Transformer
    replicas: int  # ranks that hold the same rows
    objective: Objective
    schedule: Schedule
    peak: float  # learning rate
    optimizer: torch.optim.Optimizer
    identity: dict  # what a checkpoint must have been made from
    best: Best | None = None  # with --keep best
    logger: Logger | None = None
    skipped: int = 0  # steps that were not finite

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's part of a step, on its device."""
        examples = self.schedule.examples(step)
        batches = self.schedule.micro_batches(step, self.run.rank)
        return [self.objective.prepare(batch, examples) for batch in batches]

    def log(self, step: int, result: StepMetrics) -> None:
        """Wait for a step's metrics and write them;
        too many steps that are not finite end the run."""
        config = self.run.config
        try:
            metrics = result.read()
        except NotFinite as error:
            self.skipped += 1
            where = where_not_finite(self.run, self.schedule, step, error.ranks)
            problem = f"{self.name}, step {step + 1}, {where}: {error}"
            if self.skipped > config.max_skipped_steps:
                last = next(iter(checkpoints(self.folder)), "none")
                raise ValueError(
                    f"{problem}. Last checkpoint: {last} (--max_skipped_steps goes on)"
                ) from None
            print0(f"note: {problem}")
            return
        metrics["epoch"] = (step + 1) / self.schedule.steps_per_epoch
        self.logger(step, self.schedule.num_steps, metrics, self.name, result.ended)

    def validates(self, step: int) -> bool:
        """Whether a validation is due after this many steps."""
        every = self.run.config.eval_steps
        at_times = bool(every) and step % every == 0
        return self.run.val is not None and (at_times or step == self.schedule.num_steps)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after this many steps."""
        every = self.run.config.save_steps
        return bool(every) and (step % every == 0 or step == self.schedule.num_steps)

    def save(self, step: int) -> None:
        save_checkpoint(
            self.folder,
            step,
            self.model,
            self.optimizer,
            state=self.identity | self.objective.state(),
            replicas=self.replicas,
            keep=self.run.config.save_total_limit,
            best=self.best,
        )


def run_stage(run: Run, name: str, base: Path, adapter: Path | None) -> None:
    """Train and test one stage, starting from base and adapter;
    its folder appears, whole, when it is done.

    With --resume auto it goes on from the newest whole checkpoint that an earlier start left."""
    stage = begin_stage(run, name, base, adapter)
    start = resume_stage(stage)
    stage.logger = Logger(stage.folder / "metrics.jsonl", run.config.logging_steps)
    train(stage, start)
    load_best(stage)
    with writing(stage.folder):
        save_stage(run, stage.model, base, stage.folder, stage.weights)
    finish_stage(run, name, stage.model, stage.folder)


def begin_stage(run: Run, name: str, base: Path, adapter: Path | None) -> Stage:
    """Load the weights, say what is trained, and fill in the reference's log-probs."""
    config, device = run.config, run.device
    folder = run.folder / f"{name}.unfinished"
    if is_main():
        if not config.resume:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
    dist.barrier()
    torch.manual_seed(config.seed + run.rank)  # dropout; all else draws from its own generator
    model, replicas = load_policy(config, name, base, adapter, device)
    if base == run.base and config.model:
        model.name_or_path = config.model  # a hub name, if it is one, and not its folder

    objective = objective_of(run, name, model)
    peak = config.sft_learning_rate if name == "sft" else config.learning_rate
    schedule = schedule_of(run, name, objective)
    trained = [p for p in model.parameters() if p.requires_grad]
    betas = (0.9, config.adam_beta2)
    optimizer = torch.optim.AdamW(trained, lr=peak, betas=betas, weight_decay=0.0, fused=True)

    weights, tokens = starting_weights(base, adapter), tokens_key(run.train, objective.slots)
    identity = {"stage": name, "data": run.data_hash, "base or adapter to start from": weights}
    identity["tokenizer or prompt"] = tokens
    start = {"start": (base, adapter), "weights": weights, "identity": identity}
    learner = {"model": model, "replicas": replicas, "objective": objective}
    plan = {"schedule": schedule, "peak": peak, "optimizer": optimizer}
    stage = Stage(run, name, folder, **start, **learner, **plan)
    describe_stage(stage)
    if objective.has_reference:
        identity["reference"] = prepare_reference(run, weights, tokens, objective, schedule)
    if name != "sft":
        print_preference_notes(config, objective)
    model.train()
    return stage


def objective_of(run: Run, name: str, model: Transformer | None) -> Objective:
    """What a stage trains on; a dry run has no model."""
    return Objective(run.config, name, model, run.train, run.device)


def schedule_of(run: Run, name: str, objective: Objective) -> Schedule:
    """The steps of a stage."""
    epochs = run.config.sft_epochs if name == "sft" else run.config.epochs
    return Schedule(run.config, epochs, tree_widths(run.train, objective.slots), run.world_size)


def say_duration(stage: Stage, done: int) -> None:
    """Print how long the rest of the run takes, if a token costs what it did until now: a step
    reads it forward and backward, the reference, a validation or a test forward alone, for half."""
    run, config, pace = stage.run, stage.run.config, stage.logger.seconds
    pace /= stage.schedule.widths.sum(1).mean() * config.batch_size
    read = {}  # tokens of a test, of a validation
    for name, encoded in ("test", run.test), ("val", run.val):
        slots = [np.arange(NUM_CANDIDATES)] * (len(encoded.prompts) if encoded else 0)
        read[name] = tree_widths(encoded, np.array(slots)).sum() if encoded else 0
    seconds, stages = 0.0, config.stage_list
    for name in stages[stages.index(stage.name) :]:
        objective = objective_of(run, name, None)
        schedule = schedule_of(run, name, objective)
        steps = schedule.num_steps - done
        trained = schedule.widths.sum(1).mean() * config.batch_size * steps
        validated = read["val"] * (1 + steps // (config.eval_steps or schedule.num_steps + 1))
        reference = schedule.widths.sum() if not done and objective.has_reference else 0
        seconds += pace * (trained + (validated + reference + read["test"]) / 2)
        done = 0
    print0(f"about {hours(seconds)} to the end of the run, by the time of its first steps")


def train(stage: Stage, start: int) -> None:
    """The loop, from step `start` on.

    Metrics are read one step late, while the GPU works on the next."""
    run, config, schedule, objective = stage.run, stage.run.config, stage.schedule, stage.objective
    run.stop.in_loop = True
    pending = None  # the step before, whose metrics are not read yet
    batches_ahead = prefetch(stage.micro_batches, range(start, schedule.num_steps))
    for step, batches in enumerate(batches_ahead, start):
        lr = get_lr(step, schedule.num_steps, stage.peak, config.warmup_ratio)
        options = (lr, config, stage.replicas)
        result = train_step(stage.model, stage.optimizer, batches, objective, *options)
        objective.after_step(result.on_device.__getitem__)
        if step == 0 and objective.has_reference:
            exact = stored_dtype(config, run.device) == torch.float32
            check_first_rewards(objective, exact)
        if pending:
            stage.log(step - 1, pending)
        if step == start + 10 and not run.timed:
            run.timed = True
            say_duration(stage, step)
        pending = result

        if stage.validates(step + 1):
            stage.log(step, pending)
            pending = None
            validate(stage, step + 1, validation_metrics(run, stage.model))
        stopping = any_rank(bool(run.stop.asked))  # a checkpoint holds the validation of its step
        if stopping or stage.saves(step + 1):
            if pending:
                stage.log(step, pending)
                pending = None
            stage.save(step + 1)
        if stopping:
            stage.logger.close()
            run.stop.stop(f"after step {step + 1}, which is saved")
    if pending:
        stage.log(step, pending)
    stage.logger.close()
    if any_rank(bool(run.stop.asked)):  # while the last step was saved or read
        if not stage.saves(schedule.num_steps):
            stage.save(schedule.num_steps)
        run.stop.stop("after the last step, which is saved")
    run.stop.in_loop = False


def finish_stage(run: Run, stage: str, model: Transformer, folder: Path) -> None:
    """Test it; then its folder gets its name."""
    metrics, final = test_stage(run, model, folder), run.folder / stage
    if is_main():
        with writing(final):
            for done in checkpoints(folder):
                shutil.rmtree(done)
            folder.rename(final)
        print0(results_table({stage: metrics}))
    dist.barrier()


def test_raw(run: Run, base: Path, adapter: Path | None) -> None:
    """The model that training starts from, tested as it is:
    the raw language model of the paper's Table 1."""
    folder = run.folder / "raw.unfinished"
    source = f"{base} + {adapter}" if adapter else f"{base}"
    print0(f"\n== raw: nothing is trained, {source} is tested as it is")
    model, _ = load_policy(run.config, "raw", base, adapter, run.device)
    if is_main():
        folder.mkdir(exist_ok=True)
        write_base(run, base, folder, weights_key(base, adapter), adapter)
    finish_stage(run, "raw", model, folder)


def test_stage(run: Run, model: Transformer, folder: Path) -> dict | None:
    """Evaluate on the test split, divided over ranks; metrics on rank 0, which also writes them."""
    config, started = run.config, time.time()
    records = predict_on_all_ranks(run, model, run.test, "greedy", config.decode_rest)
    if not is_main():
        return None
    metrics = summarise(records, run.baselines)
    metrics |= {"data_hash": run.data_hash, "seconds": round(time.time() - started, 1)}
    with writing(folder / "eval"):
        save_predictions(folder / "eval", metrics, records)
    return metrics


# ------------------------------------------------------------------------ the run
def results(run: Run, prepared) -> str:
    """The run's table: chance and counting baselines, every finished stage, and the optimum where
    it is known; then a warning for each trained stage that mostly wrote something else."""
    rows = {s: read_json(run.folder / s / "eval" / "metrics.json") for s in run.config.stage_list}
    bounds = {}
    optimum = prepared.optimum("test")
    if optimum is not None:
        hits = ranking_metrics(optimum, prepared.splits["test"].target)["hit_ratio@1"]
        bounds["Bayes-optimal"] = float(hits.mean())
    warnings = [
        f"\n\nWARNING: {stage}: only {rows[stage]['valid_ratio']:.1%} of the answers are one of "
        f"the 20 titles. {INVALID}"
        for stage in rows
        if stage != "raw" and rows[stage]["valid_ratio"] < 0.5
    ]
    return results_table(rows, bounds) + "".join(warnings)


def main() -> None:
    config = read_options(sys.argv[1:])
    rank, world_size, device = setup_distributed()
    with agreed_folder(config) as folder:
        run_all(config, rank, world_size, device, folder)


def run_all(config: TrainConfig, rank: int, world_size: int, device, folder: Path) -> None:
    """Data, base, and every stage; or the dry run."""
    stop = StopRequest(folder)
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    n = torch.get_num_threads()
    threads = f"{n} thread{'s' * (n > 1)} each (OMP_NUM_THREADS sets another number)"
    dtype = stored_dtype(config, device)
    print0(f"{processes}, {threads}, {device.type}, {dtype}, run folder {folder}")
    if config.load_in_4bit:
        say_what_4_bits_cost(device.type)

    with rank_zero_first():
        prepared = prepare(config, check=is_main())
    with rank_zero_first("LOCAL_RANK"):
        if config.model == TITLES:
            bases = Path(config.prepared_dir)
            base = titles_base(prepared.interactions, bases, config.dry_run)
        else:
            base = find_base(config.model, config.adapter, weights=not config.dry_run)
    tokenizer = Tokenizer(base, config.prompt_format)
    histories = config.history_weight > 0
    with rank_zero_first():
        train = encode_split(prepared, "train", tokenizer, config.max_length, histories)
        test = encode_split(prepared, "test", tokenizer, config.max_length)
    val = encode_sample(prepared.splits["val"], tokenizer, config)
    baselines = prepared.baselines("test") if is_main() else {}
    place, start = (rank, world_size, device, folder), (base, tokenizer)
    data = (prepared.hash, train, val, test, baselines)
    run = Run(config, *place, *start, *data, stop)
    describe_data(run)
    if config.dry_run:
        trained = [stage for stage in config.stage_list if stage != "raw"]
        objectives = {stage: objective_of(run, stage, None) for stage in trained}
        dry_run(run, {s: (o, schedule_of(run, s, o)) for s, o in objectives.items()})
        return

    run_stages(run)
    if is_main():
        table = results(run, prepared)
        title = f"# {config.dataset}, {config.model or base.name}, data {prepared.hash[:12]}"
        (folder / "results.md").write_text(f"{title}\n\n{table}\n")
        print0(f"\n{table}\n\nwritten to {folder / 'results.md'}")
    dist.barrier()


def read_options(argv: list[str]) -> TrainConfig:
    """The options; without --config those that suit data set and model are the defaults."""
    config = parse_config(TrainConfig, argv, beneath=defaults)
    restarts, restarted = (
        int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("MAX_RESTARTS", "RESTART_COUNT")
    )
    if restarts and not config.output_dir:
        raise ValueError("torchrun --max-restarts needs --output_dir, to go on in the same folder")
    if restarted and not config.resume:
        config = replace(config, resume="auto")
    return config


@contextlib.contextmanager
def agreed_folder(config: TrainConfig) -> Iterator[Path]:
    """The run folder, which rank 0 opens; a dry run gets one that is thrown away."""
    with contextlib.ExitStack() as open_folders:
        shared = [None]
        if is_main():
            folder = tempfile.TemporaryDirectory() if config.dry_run else run_folder(config)
            shared = [Path(open_folders.enter_context(folder))]
        dist.broadcast_object_list(shared)
        yield shared[0]


def run_stages(run: Run) -> None:
    """Every stage that is not finished yet; preference stages start from what sft left."""
    config, folder = run.config, run.folder
    start = (run.base, Path(config.adapter) if config.adapter else None)
    finished = [s for s in config.stage_list if (folder / s / "eval" / "metrics.json").exists()]
    for stage in finished:
        check_data(folder / stage, run.data_hash, "choose another --output_dir for the new data")
    for stage in config.stage_list:
        if stage in finished:
            check_start(folder / stage, *start)
            print0(f"\n== {stage}: finished before, in {folder / stage}")
        elif stage == "raw":
            test_raw(run, *start)
        else:
            run_stage(run, stage, *start)
        free_memory()  # of this stage's model and optimizer, before the next one's are made
        if stage == "sft":
            start = load_stage(folder / "sft")


if __name__ == "__main__":
    run_cli(main)
