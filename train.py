"""SFT, then preference training, of a LLaMA or Qwen model for sequential recommendation.

    torchrun --nproc_per_node 2 train.py    the demo: planted world, a tiny model, 2 processes
    torchrun --nproc_per_node 8 train.py --config configs/paper.json --dataset movielens \
        --data_dir ml-1m.zip --model meta-llama/Llama-3.1-8B --output_dir runs/ml1m

`--stages sft,recpo,sdpo` runs SFT once and every preference loss from its result. A stage writes
`<output_dir>/<stage>/`: PEFT adapter or Hugging Face model, metrics.jsonl, eval/metrics.json,
eval/predictions.jsonl. The reference policy is the policy before its first step: its log-probs are
computed once and kept in a file. Every rank draws the same global batch from (seed, epoch, step)
and takes its share, so any number of processes and micro-batches gives the same update.

From top to bottom: options; the model; the objective (what a micro-batch adds to a step; the losses
are in losses.py); one step; one stage with its loop; the run. Checkpoints, validation, the
reference's log-probs and `--dry_run` are in runtime/. Legend: E examples, B of them in a
micro-batch, K rejected titles, N completions (1 + K; KTO: one more), M scored tokens.
"""

import math
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common import arg, changed_options, is_main, parse_config, print0, read_json, run_cli, writing
from data import NUM_CANDIDATES, Encoded, Examples, PromptTree, to_device, tree_widths
from demo.pretrain import BASE, TITLES, titles_base
from eval import predict, ranking_metrics, results_table, summarise
from hub.files import resolve_path
from hub.tokenizer import Tokenizer
from loaders.counting import counting_baselines
from loaders.frozen import data_defaults, encode_split, prepare
from loaders.planted import bayes_scores, world_of
from lora import base_of
from losses import LOSSES, MARGINS, LossInputs, sft_loss
from model import ModelConfig, Transformer
from runtime import policy, processes, sharding, stages
from runtime.estimate import dry_run
from runtime.policy import ModelOptions, load_policy
from runtime.processes import Logger, Run, Schedule, StepMetrics, any_rank, prefetch
from runtime.sharding import local, reduce_metrics, reshard, save_checkpoint
from runtime.sources import SourceConfig, kept_prompt

CONFIGS = Path(__file__).parent / "configs"
SMALL = 50_000_000  # parameters; smaller models have other defaults

# ------------------------------------------------------------------------ options
SFT, RECPO, ANY_LOSS = ("sft",), ("recpo",), tuple(LOSSES)  # who reads an option
LISTWISE = tuple(name for name, loss in LOSSES.items() if not loss.pairwise)


@dataclass(frozen=True)
class TrainConfig(ModelOptions):
    """SFT, then preference training, from a Hugging Face checkpoint.

    Without --config, models below 50 million parameters take their defaults from
    configs/small.json, and --model titles from configs/titles.json."""

    lora_r: int = arg(8, "rank of a new adapter; 0 = train all parameters", at_least=0)
    sft_lora_r: int = arg(-1, "LoRA rank in sft; -1 = lora_r", at_least=-1, read_by=SFT)
    lora_alpha: float = arg(32.0, "of a new adapter; scaling = alpha / r", above=0)
    lora_dropout: float = arg(0.1, "adapter dropout, sft only", at_least=0, below=1, read_by=SFT)
    stages: str = arg(
        "sft,recpo",
        f"raw (test the model as it is), sft, and any of {', '.join(LOSSES)}, from the sft result",
        group="objective",
        free=True,
    )
    beta: float = arg(1.0, "reward = beta * log-ratio", above=0, read_by=ANY_LOSS)
    margin_lambda: float = arg(2.0, "recpo's λ; simpo's γ", at_least=0, read_by=("recpo", "simpo"))
    margin: str = arg("ratio", "form of recpo's margin", choices=MARGINS, read_by=RECPO)
    num_negatives: int = arg(
        3, "rejected titles per prompt", at_least=1, at_most=NUM_CANDIDATES - 1, read_by=LISTWISE
    )
    negative_source: str = arg(
        "both", "which titles are rejected", choices=("both", "random", "follow"), read_by=ANY_LOSS
    )
    history_weight: float = arg(0.0, "sft: loss weight of a history token", at_least=0, read_by=SFT)
    sft_weight: float = arg(-1.0, "NLL's weight; -1: cpo 1, else 0", at_least=-1, read_by=ANY_LOSS)
    sft_epochs: float = arg(5.0, "may be a fraction", group="optimisation", above=0, read_by=SFT)
    epochs: float = arg(3.0, "epochs of a preference stage", above=0, read_by=ANY_LOSS)
    max_steps: int = arg(0, "stop every stage after this many steps; 0 = off", at_least=0)
    batch_size: int = arg(128, "prompts per optimizer step, over all processes", at_least=1)
    micro_batch_tokens: int = arg(8192, "padded tokens per forward pass", at_least=1, free=True)
    sft_learning_rate: float = arg(1e-5, "peak rate of sft", above=0, read_by=SFT)
    learning_rate: float = arg(1e-5, "peak in preference stages", above=0, read_by=ANY_LOSS)
    warmup_ratio: float = arg(0.05, "share of steps with a rising rate", at_least=0, at_most=1)
    adam_beta2: float = arg(0.999, "AdamW second-moment decay", at_least=0, below=1)
    max_grad_norm: float = arg(0.3, "clip the gradient's norm; 0 = off", at_least=0)
    shard: str = arg(
        "full", "split weights, copy them, or both", choices=("full", "none", "hybrid"), free=True
    )
    shard_group_size: int = arg(
        0, "ranks per copy; 0: a machine's", at_least=0, read_by=("--shard hybrid",), free=True
    )
    gradient_checkpointing: bool = arg(False, "recompute blocks: less memory, slower", free=True)
    compile: bool = arg(False, "torch.compile the blocks: a slow start, then faster", free=True)
    seed: int = arg(0, "seed of initial weights, batch order and dropout", at_least=0)
    decode_rest: bool = arg(True, "generate if no candidate fits; off: invalid", group="output")
    val_size: int = arg(200, "validation users; 0 = none", at_least=0)
    eval_steps: int = arg(0, "also validate every N steps", at_least=0, read_by=("--val_size",))
    keep: str = arg("last", "last weights, or best by validation", choices=("last", "best"))
    dry_run: bool = arg(False, "no training: print first losses, memory and hours", free=True)
    output_dir: str = arg("", "run folder; empty: the next runs/<dataset>-1, -2, ...", free=True)
    save_steps: int = arg(100, "save every N steps, and at the end", at_least=0, free=True)
    save_total_limit: int = arg(2, "checkpoints kept per stage", at_least=1, free=True)
    resume: str = arg("", "auto: from the newest whole checkpoint", choices=("", "auto"), free=True)
    logging_steps: int = arg(10, "steps between printed lines", at_least=1, free=True)

    def __post_init__(self):
        super().__post_init__()
        given = self.stage_list
        losses = [stage for stage in given if stage in LOSSES]
        first = [stage for stage in ("raw", "sft") if stage in given]
        if not given or given != first + losses or len(set(losses)) < len(losses):
            names = f"raw and sft first (or not at all), then any of {', '.join(LOSSES)}, each once"
            raise ValueError(f"--stages: {names}; got {self.stages!r}")
        if self.dataset != "planted" and not (self.model or self.adapter):
            raise ValueError(f"--dataset {self.dataset} needs a --model. {policy.THREE_WAYS}")
        if self.model == TITLES and (self.adapter or self.prompt_format != "plain"):
            raise ValueError(f"--model {TITLES} makes a new base: no --adapter, no chat prompts")
        if self.load_in_4bit and 0 in (self.lora_r, self.sft_lora_r):
            raise ValueError("--load_in_4bit trains adapters: no --lora_r 0, no --sft_lora_r 0")
        if self.resume and not self.output_dir:
            raise ValueError("--resume needs --output_dir, the run folder to resume")
        if -1 < self.sft_weight < 0:
            raise ValueError(f"--sft_weight must be >= 0 or -1 (default), got {self.sft_weight}")
        if self.keep == "best" and not (self.eval_steps and self.val_size):
            raise ValueError("--keep best needs --eval_steps and --val_size to find the best step")
        idle = self.margin == "none" and "simpo" not in given
        if idle and "margin_lambda" in changed_options(self):
            raise ValueError("--margin_lambda has no effect with --margin none: leave one out")

    @property
    def stage_list(self) -> list[str]:
        return [s.strip() for s in self.stages.split(",") if s.strip()]

    @property
    def present(self) -> set[str]:
        """The stages and options of this run that `read_by` may name."""
        return {*self.stage_list, f"--shard {self.shard}", "--val_size" if self.val_size else ""}


# ------------------------------------------------------------------------ the model
def find_base(model: str, adapter: str, weights: bool) -> Path:
    """The directory of the model: --model, or the one that --adapter names, or the demo's."""
    name = model or (base_of(adapter) if adapter else "")
    return resolve_path(name, weights=weights) if name else BASE


def defaults(given: dict) -> dict:
    """Defaults for this data set and model if no --config is given."""
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
    kept = kept_prompt(Path(adapter or model or os.devnull))  # a stage keeps its prompts
    kept = {name: value for name, value in kept.items() if name in SourceConfig.KEPT}
    return data_defaults(given) | (read_json(chosen) if chosen else {}) | kept


# ------------------------------------------------------------------------ the objective
def completion_slots(examples: Examples, loss: str, K: int, source: str) -> np.ndarray:
    """(E, N) slots of the candidates to score: chosen, K rejected, for KTO also a neutral one."""
    slots = [examples.target[:, None], examples.negatives(K, source)]
    if loss == "kto":
        first, second = examples.negative_order[:, :1], examples.negative_order[:, 1:2]
        slots.append(np.where(first == slots[1], second, first))
    return np.concatenate(slots, axis=1)


def preference_metrics(t: LossInputs, losses: Tensor, rewards: Tensor, margins: Tensor) -> dict:
    """Metrics of each prompt (B,) by name, with TRL's names where they exist.
    Rewards and margins of ipo and simpo are per token; logps are sums."""
    gaps = rewards[:, :1] - rewards[:, 1:]  # (B, K)
    return {
        "preference_loss": losses,
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1:].mean(1),
        "rewards/margins": gaps.mean(1),
        "rewards/accuracies": (gaps > 0).all(1).float(),  # chosen beats all K
        "rewards/pair_accuracies": (gaps > 0).float().mean(1),  # TRL's meaning
        "margins/target": margins.mean(1),
        "margins/satisfied": (gaps > margins).float().mean(1),
        "logps/chosen": t.policy_logps[:, 0],
        "logps/rejected": t.policy_logps[:, 1:].mean(1),
    }


@dataclass
class MicroBatch:
    """What one forward pass needs, on its device; all counts are plain numbers."""

    tree: PromptTree
    weight: float  # 0: a filler example, so that all ranks make the same number of passes
    chosen: Tensor  # indices of the chosen titles' tokens among the M scored ones
    num_examples: int  # of the global batch
    num_tokens: float  # target tokens of the global batch; history tokens count by their weight
    reference_logps: Tensor  # (B, N), zeros without a reference
    phi: Tensor  # (B, N) preference scores of the titles
    lengths: Tensor  # (B, N) tokens of the titles, EOS included


class Objective:
    """A stage's objective: SFT (eq. 1) or a preference loss.
    SFT is a mean over target tokens, a preference loss a mean over examples.

    With --history_weight W, SFT also predicts the history's tokens, each with weight W, because
    every item shows what the user chose next. Reference log-probs are filled in before the first
    step. KTO's baseline z is the mean log-ratio of a listed title that is neither chosen nor
    rejected; a step uses the global mean of the step before (the first: 0)."""

    def __init__(self, config, loss: str, model, encoded: Encoded, device):
        self.config, self.loss, self.model, self.encoded = config, loss, model, encoded
        self.device, self.method = device, LOSSES.get(loss)  # None: sft
        self.K = self.sft_weight = 0
        self.history_weight = config.history_weight
        if self.method:
            self.K = 1 if self.method.pairwise else config.num_negatives
            self.history_weight, self.sft_weight = 0.0, config.sft_weight
            if config.sft_weight < 0:
                self.sft_weight = self.method.sft_weight
        examples = encoded.examples
        self.slots = completion_slots(examples, loss, self.K, config.negative_source)
        self.phi = torch.from_numpy(np.take_along_axis(examples.scores, self.slots, 1))  # (E, N)
        self.reference_logps = torch.zeros(self.slots.shape)  # (E, N)
        self.has_reference = bool(self.method and self.method.has_reference)
        # rewards of the first step, which must be zero; None after the check
        self.first_rewards: list[Tensor] | None = [] if self.has_reference else None
        self.kl = torch.zeros((), device=device)  # of the step before

    def num_tokens(self, examples) -> float:
        """Target tokens: those of the chosen titles, plus history tokens times their weight."""
        chosen = (self.encoded.title_ids(int(e), self.slots[e][:1]) for e in examples)
        count = sum(len(ids) for (ids,) in chosen)
        if self.history_weight:
            count += self.history_weight * int(np.diff(self.encoded.histories[examples]).sum())
        return count

    def prepare(self, batch: list[int], step_examples) -> MicroBatch:
        """The micro-batch of these examples, in a step of `step_examples` over all ranks."""
        weight, batch, device = float(bool(batch)), batch or [int(step_examples[0])], self.device
        tree = self.encoded.tree(batch, self.slots)
        lengths = torch.bincount(tree.sequence_ids).view(len(batch), tree.num_completions)
        chosen = torch.nonzero(tree.sequence_ids % tree.num_completions == 0).squeeze(1)
        if self.history_weight:
            tree = tree.with_prompt_labels(self.encoded.histories[batch])
        return MicroBatch(
            tree=tree.to(device),
            weight=weight,
            chosen=to_device(chosen, device),
            num_examples=len(step_examples),
            num_tokens=self.num_tokens(step_examples),
            reference_logps=to_device(self.reference_logps[batch], device),
            phi=to_device(self.phi[batch], device),
            lengths=to_device(lengths, device),
        )

    def __call__(self, batch: MicroBatch) -> tuple[Tensor, dict]:
        """The micro-batch's part of the step's loss, and of its metrics."""
        token_logps, greedy_ids = self.model(batch.tree)  # (M,)
        if self.method:
            loss, sums = self.preference(batch, token_logps)
        else:
            loss, sums = self.sft(batch, token_logps, greedy_ids)
        weight = batch.weight
        return weight * loss, {name: (weight * s, weight * n) for name, (s, n) in sums.items()}

    def sft(self, batch: MicroBatch, token_logps: Tensor, greedy_ids: Tensor):
        chosen_logps, count = token_logps[batch.chosen], len(batch.chosen)
        right = (greedy_ids == batch.tree.labels)[batch.chosen]
        loss = sft_loss(chosen_logps, batch.num_tokens)
        sums = {"nll_loss": (-chosen_logps.detach().sum(), count)}
        sums["mean_token_accuracy"] = (right.sum(), count)
        if self.history_weight:
            history_logps = token_logps[len(batch.tree.sequence_ids) :]
            loss = loss + self.history_weight * sft_loss(history_logps, batch.num_tokens)
            sums["history_nll"] = (-history_logps.detach().sum(), len(history_logps))
            count += self.history_weight * len(history_logps)
        return loss, sums | {"loss": (loss.detach(), count / batch.num_tokens)}

    def preference(self, batch: MicroBatch, token_logps: Tensor):
        B, n = len(batch.phi), 1 + self.K
        logps = batch.tree.sum_logps(token_logps)  # (B, N)
        reference, phi, lengths = batch.reference_logps, batch.phi, batch.lengths
        inputs = LossInputs(logps[:, :n], reference[:, :n], phi[:, :n], lengths[:, :n], self.kl)
        losses, rewards, margins = self.method(inputs, self.config)
        loss, chosen_logps = losses.sum() / batch.num_examples, token_logps[batch.chosen]
        if self.sft_weight:
            loss = loss + self.sft_weight * sft_loss(chosen_logps, batch.num_tokens)
        if self.first_rewards is not None:
            self.first_rewards.append(batch.weight * rewards)

        per_example = preference_metrics(inputs, losses, rewards, margins)
        if self.loss == "kto":
            per_example["kl"] = logps[:, -1] - reference[:, -1]
        sums = {name: (values.detach().sum(), B) for name, values in per_example.items()}
        sums["loss"] = (loss.detach(), B / batch.num_examples)
        sums["nll_loss"] = (-inputs.policy_logps[:, 0].detach().sum(), len(batch.chosen))
        return loss, sums

    def at_the_start(self) -> tuple[Tensor, Tensor]:
        """Losses (E,) if policy and reference are equal, and target margins (E, K)."""
        zeros, phi = torch.zeros(len(self.slots), 1 + self.K), self.phi[:, : 1 + self.K]
        inputs = LossInputs(zeros, zeros, phi, torch.ones_like(zeros), torch.zeros(()))
        losses, _, margins = self.method(inputs, self.config)
        return losses, margins

    def after_step(self, metrics: dict[str, Tensor]) -> None:
        """Keep what the next step needs from this step's metrics, on their device."""
        if self.loss == "kto":
            self.kl = metrics["kl"].nan_to_num(0.0).float()

    def state(self) -> dict:
        """The state that a checkpoint keeps and load_state reads."""
        return {"kl": self.kl.item()} if self.loss == "kto" else {}

    def load_state(self, state: dict) -> None:
        self.first_rewards = None  # the first step is over
        self.kl = torch.tensor(state.get("kl", 0.0), device=self.device)


# ------------------------------------------------------------------------ one optimizer step
def train_step(
    model, optimizer, batches: list, objective: Callable, lr: float, config, replicas: int = 0
) -> StepMetrics:
    """Accumulate gradients over micro-batches, clip and step; returns the global batch's metrics.

    `objective(batch) -> (loss, sums)`: the loss is already divided by global counts, so
    micro-batches and ranks add up to one big batch; `sums` maps metric names to (sum, count).
    All ranks must pass the same number of batches. `replicas` ranks hold the same rows of a
    gradient; 0: all do. Nothing here waits for the GPU."""
    sums, counts = defaultdict(float), defaultdict(float)
    sharded, world_size = hasattr(model, "set_requires_gradient_sync"), dist.get_world_size()
    # Adapters are small: their gradients are reduced once per step. Whole fp32 gradients of all
    # weights would take the memory that sharding saves, so each micro-batch reduces its own.
    each_reduces = not getattr(model, "lora_config", None)
    (group,) = optimizer.param_groups
    # ------------------------- training step begins -------------------------
    group["lr"] = lr
    for number, batch in enumerate(batches, 1):
        if sharded:  # until they are reduced, gradients are whole on every rank
            model.set_requires_gradient_sync(each_reduces or number == len(batches))
        loss, metrics = objective(batch)
        (loss * world_size).backward()  # undoes FSDP's average: counts are global already
        for name, (total, count) in metrics.items():
            sums[name] += total.double()
            counts[name] += count
    if not sharded and world_size > 1:
        sharding.average_gradients(optimizer)

    # Plain local tensors: DTensor's own clip_grad_norm_ costs more than a small model's whole step.
    gradients = [local(p.grad) for p in group["params"]]
    sums["grad_norm"] = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    counts["grad_norm"] = (replicas or world_size) / world_size  # sums to the copies of each row
    means, not_finite = reduce_metrics(sums, counts)
    means["grad_norm"] = grad_norm = means["grad_norm"].sqrt()
    if config.max_grad_norm:
        clip = (config.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, clip.float())
    # fused AdamW skips the update if this is 1
    optimizer.found_inf = (~(grad_norm + means["loss"]).isfinite()).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    # ------------------------- training step ends ---------------------------
    return StepMetrics(means, not_finite, lr)


def get_lr(step: int, num_steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = math.ceil(round(warmup_ratio * num_steps, 6))  # .07 * 100 is 7.000000000000001
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


# ------------------------------------------------------------------------ evaluation over ranks
def predict_on_all_ranks(run: Run, model, encoded: Encoded, decode_rest: bool) -> list[dict]:
    """Predict all examples, divided over ranks; rank 0 gets the records in order, others none.

    The model is left resharded, and in the mode it was in."""
    training = model.training
    records = predict(
        model.eval(),
        run.tokenizer,
        encoded,
        range(run.rank, len(encoded.prompts), run.world_size),
        decode_rest=decode_rest,
        micro_batch_tokens=run.config.micro_batch_tokens,
        any_rank=any_rank,
    )
    model.train(training)
    reshard(model)
    gathered = [None] * run.world_size if is_main() else None
    dist.gather_object(records, gathered)
    records = [record for part in gathered or [] for record in part]
    return sorted(records, key=lambda record: record["example"])


def validation_metrics(run: Run, model: Transformer) -> dict | None:
    """Metrics of the validation users on rank 0, from one pass: other answers are invalid."""
    records = predict_on_all_ranks(run, model, run.val, False)
    return summarise(records) if is_main() else None


# ------------------------------------------------------------------------ one stage
def plan(run: Run, name: str, model: Transformer | None) -> tuple[Objective, Schedule]:
    """The objective and the schedule of a stage."""
    objective = Objective(run.config, name, model, run.train, run.device)
    epochs = run.config.sft_epochs if name == "sft" else run.config.epochs
    widths = tree_widths(run.train, objective.slots)
    return objective, Schedule(run.config, epochs, widths, run.world_size)


def run_stage(run: Run, name: str, base: Path, adapter: Path | None) -> None:
    """Train and test one stage; its folder gets its final name when all is done.

    It resumes from the newest whole checkpoint that an earlier start left."""
    config, folder, stop = run.config, run.folder / f"{name}.unfinished", run.stop
    torch.manual_seed(config.seed + run.rank)  # dropout; all else draws from its own generator
    model, replicas = load_policy(config, name, base, adapter, run.device)
    objective, schedule = plan(run, name, model)
    peak = config.sft_learning_rate if name == "sft" else config.learning_rate
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=peak,
        betas=(0.9, config.adam_beta2),
        weight_decay=0.0,
        fused=True,
    )
    count = sum(p.numel() for p in sharding.trained(model).values())
    size = f"{schedule.num_steps} steps of {config.batch_size} prompts, {count:,} parameters"
    print0(f"\n== {name}: {size}, from {base}{f' + {adapter} and its r and alpha' * bool(adapter)}")
    weights = stages.weights_key(base, adapter)
    made_from = {"data": run.data_hash, "weights": weights}
    made_from["token ids"] = stages.tokens_key(run.train, objective.slots)
    dtype = policy.stored_dtype(config, run.device)
    if objective.has_reference:
        key = stages.prepare_reference(run, made_from, dtype, objective, schedule)
        made_from["reference"] = key
    model.train()
    start, best = stages.resume_stage(folder, model, optimizer, objective, made_from)
    later = [plan(run, s, None)[1] for s in config.stage_list[1 + config.stage_list.index(name) :]]
    log = Logger(run, name, folder, schedule, later)

    def batches_of(step: int) -> list[MicroBatch]:
        """This rank's part of a step, on its device."""
        examples, batches = schedule.examples(step), schedule.micro_batches(step, run.rank)
        return [objective.prepare(batch, examples) for batch in batches]

    def save(done: int) -> None:
        log.flush()
        state = made_from | objective.state() | {"logged": log.file.tell()}
        save_checkpoint(folder, done, model, optimizer, best, state, config.save_total_limit)

    stop.in_loop = True
    ahead = prefetch(batches_of, range(start, schedule.num_steps))
    for step, batches in enumerate(ahead, start):
        lr = get_lr(step, schedule.num_steps, peak, config.warmup_ratio)
        result = train_step(model, optimizer, batches, objective, lr, config, replicas)
        objective.after_step(result.on_device)
        if step == 0 and objective.has_reference:
            stages.check_first_rewards(objective, exact=dtype == torch.float32)
        log(step, result)
        done = step + 1
        if run.val is not None and schedule.due(config.eval_steps, done):
            log.flush()
            best = stages.validate(log, done, validation_metrics(run, model), model, best)
        saved = schedule.due(config.save_steps, done)
        if saved:  # with the validation of its step
            save(done)
        if any_rank(bool(stop.asked)):
            if not saved:
                save(done)
            stop.stop(f"after step {done}, which is saved")
    stop.in_loop = False
    log.flush()
    for parameter, tensor in best.items():  # with --keep best
        local(sharding.trained(model)[parameter].data).copy_(local(tensor))
    with writing(folder):
        stages.save_stage(run, model, base, folder, weights)
    finish_stage(run, name, model, folder)


def finish_stage(run: Run, name: str, model: Transformer, folder: Path) -> None:
    """Test the model, divided over ranks, then give its folder the final name."""
    started, final = time.time(), run.folder / name
    records = predict_on_all_ranks(run, model, run.test, run.config.decode_rest)
    if is_main():
        metrics = summarise(records, run.baselines)
        metrics |= {"data_hash": run.data_hash, "seconds": round(time.time() - started, 1)}
        with writing(folder / "eval"):
            stages.save_predictions(folder / "eval", metrics, records)
        with writing(final):
            folder.rename(final)  # first, so that a stop in between loses nothing
            for kept in final.glob("checkpoint-*"):
                shutil.rmtree(kept)
        print0(results_table({name: metrics}))
    dist.barrier()


def run_raw(run: Run, base: Path, adapter: Path | None) -> None:
    """Test the untrained model: the raw model of the paper's Table 1."""
    folder = run.folder / "raw.unfinished"
    print0(f"\n== raw: nothing is trained, {base}{f' + {adapter}' * bool(adapter)} is tested")
    model, _ = load_policy(run.config, "raw", base, adapter, run.device)
    if is_main():
        folder.mkdir(exist_ok=True)
        stages.write_base(run, base, folder, stages.weights_key(base, adapter), adapter)
    finish_stage(run, "raw", model, folder)


# ------------------------------------------------------------------------ the run
def read_options(argv: list[str]) -> TrainConfig:
    """Read the options; without --config the defaults depend on data set and model."""
    config = parse_config(TrainConfig, argv, beneath=defaults)
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not config.output_dir:
        raise ValueError("torchrun --max-restarts needs --output_dir: a restart resumes there")
    folder, given = Path(config.output_dir or os.devnull), config.stage_list
    if "sft" not in given and given[-1] in LOSSES and any(folder.glob("sft*")):
        raise ValueError(f"{folder} has an sft: add sft to --stages, or name another --output_dir")
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return replace(config, resume="auto") if restarted else config


def main() -> None:
    config = read_options(sys.argv[1:])
    rank, world_size, device = processes.setup_distributed()
    with processes.open_run_folder(config) as folder:
        stop = processes.StopRequest(folder)
        on = f"{device.type}, {torch.get_num_threads()} threads each (OMP_NUM_THREADS)"
        print0(f"processes: {world_size}, {on}, run folder {folder}")
        with processes.rank_zero_first():
            prepared = prepare(config)
        with processes.rank_zero_first("LOCAL_RANK"):
            if config.model == TITLES:
                base = titles_base(
                    prepared.interactions,
                    Path(config.prepared_dir),
                    practised=config.list_in_prompt,
                    dry_run=config.dry_run,
                )
            else:
                base = find_base(config.model, config.adapter, weights=not config.dry_run)
        tokenizer = Tokenizer(base, config.prompt_format)
        with processes.rank_zero_first():
            histories = config.history_weight > 0
            train = encode_split(prepared, "train", tokenizer, config.max_length, histories)
            test = encode_split(prepared, "test", tokenizer, config.max_length)
        run = Run(
            config=config,
            rank=rank,
            world_size=world_size,
            device=device,
            folder=folder,
            base=base,
            tokenizer=tokenizer,
            data_hash=prepared.hash,
            train=train,
            val=stages.encode_sample(prepared.splits["val"], tokenizer, config),
            test=test,
            baselines=counting_baselines(prepared.splits["test"]) if is_main() else {},
            stop=stop,
        )
        (answer,) = train.title_ids(0, train.examples.target[:1])
        text = tokenizer.inner.decode([*train.prompts[0], *answer], skip_special_tokens=False)
        lengths = [len(prompt) for prompt in train.prompts]
        print0(
            f"data {run.data_hash[:12]}: {len(lengths):,} training and {len(test.prompts):,} test "
            f"prompts of {np.mean(lengths):.0f} tokens (longest {max(lengths)}), "
            f"{train.num_shortened} shortened\n\nfirst training prompt:\n{text}"
        )
        if config.dry_run:
            dry_run(run, {s: plan(run, s, None) for s in config.stage_list if s != "raw"})
        else:
            run_stages(run)
            if is_main():
                write_results(run)
            dist.barrier()


def run_stages(run: Run) -> None:
    """Run every unfinished stage; preference stages start from the sft result."""
    config, folder = run.config, run.folder
    start = (run.base, Path(config.adapter) if config.adapter else None)
    finished = [s for s in config.stage_list if (folder / s / "eval" / "metrics.json").exists()]
    for stage in finished:
        stages.check_finished(folder / stage, "data", run.data_hash)
    for stage in config.stage_list:
        if stage in finished:
            stages.check_finished(folder / stage, "weights", stages.weights_key(*start))
            print0(f"\n== {stage}: finished before, in {folder / stage}")
        elif stage == "raw":
            run_raw(run, *start)
        else:
            run_stage(run, stage, *start)
        policy.free_memory()  # of this stage's model and optimizer, before the next one's are made
        if stage == "sft":
            start = stages.load_stage(folder / "sft")


def write_results(run: Run) -> None:
    """Write and print the run's table, with the optimum if it is known.
    Warn of every trained stage whose answers mostly were not listed titles."""
    config, file = run.config, run.folder / "results.md"
    rows = {s: read_json(run.folder / s / "eval" / "metrics.json") for s in config.stage_list}
    bounds, test = {}, run.test.examples
    if world := world_of(vars(config)):
        metrics = ranking_metrics(bayes_scores(world, test, config.min_rating), test.target)
        bounds["Bayes-optimal"] = float(metrics["hit_ratio@1"].mean())
    table = results_table(rows, bounds)
    for stage, row in rows.items():
        if stage != "raw" and row["valid_ratio"] < 0.5:
            valid = f"only {row['valid_ratio']:.1%} of the answers are one of the 20 titles"
            table += f"\n\nWARNING: {stage}: {valid}. {policy.INVALID}"
    title = f"# {config.dataset}, {config.model or run.base.name}, data {run.data_hash[:12]}"
    file.write_text(f"{title}\n\n{table}\n")
    print0(f"\n{table}\n\nwritten to {file}")


if __name__ == "__main__":
    run_cli(main)
