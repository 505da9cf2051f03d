"""What one micro-batch contributes to a step:
SFT on the chosen title, or a preference loss over chosen and rejected.

An objective makes micro-batches, `prepare(examples, step_examples) -> MicroBatch`, which needs no
GPU and runs ahead in the background, and is called with them: `objective(micro_batch) -> (loss,
sums)`. The loss is already divided by the counts of the *global* batch (target tokens for SFT,
examples for preferences), so micro-batches and ranks just add up to one big batch. `sums` maps
metric names, TRL's where they exist, to (sum, count) pairs: a tensor and a number, so that nothing
in here waits for the GPU. An empty micro-batch evens out ranks: it runs one example with weight 0.

What a preference loss knows of an example is one row of a PreferenceTable, frozen
before the first step. From rows and log-probs on, all is a pure function:
LOSSES[name].compute, then preference_metrics.

Legend: E examples, B examples of the micro-batch, K rejected titles, N = 1 + K completions,
M scored tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data import Encoded, PromptTree, micro_batches, to_device
from losses import (
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    odpo_loss,
    recpo_loss,
    sdpo_loss,
    sft_loss,
    simpo_loss,
    target_margins,
)


# ------------------------------------------------------------------------ preference losses
@dataclass
class Rows:
    """What a loss is a function of, for the B examples of a micro-batch; chosen first."""

    policy_logps: Tensor  # (B, 1 + K)
    reference_logps: Tensor  # (B, 1 + K), zeros without a reference
    margins: Tensor  # (B, K), already times λ (ODPO: α = 1)
    lengths: Tensor  # (B, 1 + K) tokens of each completion
    kl: Tensor  # scalar, KTO's baseline


@dataclass(frozen=True)
class PreferenceLoss:
    """A method: its loss, and what it asks of an example."""

    compute: Callable  # (options, Rows) -> losses (B,), rewards (B, 1 + K) detached
    pairwise: bool = True  # one rejected title, whatever --num_negatives says
    has_reference: bool = True
    sft_weight: float = 0.0  # where --sft_weight is left to the method


LOSSES: dict[str, PreferenceLoss] = {
    "dpo": PreferenceLoss(lambda o, r: dpo_loss(r.policy_logps, r.reference_logps, o.beta)),
    "ipo": PreferenceLoss(lambda o, r: ipo_loss(r.policy_logps, r.reference_logps, o.beta)),
    "simpo": PreferenceLoss(
        lambda o, r: simpo_loss(r.policy_logps, r.lengths, o.beta, o.simpo_gamma),
        has_reference=False,
    ),
    "cpo": PreferenceLoss(
        lambda o, r: cpo_loss(r.policy_logps, o.beta), has_reference=False, sft_weight=1.0
    ),
    "odpo": PreferenceLoss(
        lambda o, r: odpo_loss(r.policy_logps, r.reference_logps, r.margins, o.beta)
    ),
    "kto": PreferenceLoss(lambda o, r: kto_loss(r.policy_logps, r.reference_logps, r.kl, o.beta)),
    "sdpo": PreferenceLoss(
        lambda o, r: sdpo_loss(r.policy_logps, r.reference_logps, o.beta), pairwise=False
    ),
    "recpo": PreferenceLoss(
        lambda o, r: recpo_loss(r.policy_logps, r.reference_logps, r.margins, o.beta),
        pairwise=False,
    ),
}
PREFERENCE_LOSSES = tuple(LOSSES)
REFERENCE_FREE = tuple(name for name, loss in LOSSES.items() if not loss.has_reference)
PAIRWISE = tuple(name for name, loss in LOSSES.items() if loss.pairwise)


def preference_metrics(rows: Rows, losses: Tensor, rewards: Tensor) -> dict[str, Tensor]:
    """Per example (B,), by TRL's names where they exist."""
    gaps = rewards[:, :1] - rewards[:, 1:]  # (B, K)
    return {
        "preference_loss": losses,
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1:].mean(1),
        "rewards/margins": gaps.mean(1),
        "rewards/accuracies": (gaps > 0).all(1).float(),  # chosen beats all K
        "rewards/pair_accuracies": (gaps > 0).float().mean(1),  # TRL's meaning
        "margins/target": rows.margins.mean(1),
        "margins/satisfied": (gaps > rows.margins).float().mean(1),
        "logps/chosen": rows.policy_logps[:, 0],
        "logps/rejected": rows.policy_logps[:, 1:].mean(1),
    }


# ------------------------------------------------------------------------ the frozen table
def scaled_margins(options, loss: str, scores: Tensor) -> Tensor:
    """(E, K) target margins of a loss, times their weight; scores (E, 1 + K), chosen first."""
    chosen, rejected = scores[:, 0], scores[:, 1:]
    if loss == "recpo":
        return options.margin_lambda * target_margins(chosen, rejected, options.margin)
    if loss == "odpo":
        return target_margins(chosen, rejected, "log_gap")
    return target_margins(chosen, rejected, "none")


def mismatched_slots(others: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """(E, 1) for KTO's baseline: a listed title that is neither chosen nor rejected (E, 1)."""
    return np.where(others[:, :1] == rejected, others[:, 1:2], others[:, :1])


@dataclass
class PreferenceTable:
    """One row per training example, frozen before the first step.

    slots (E, N): the candidates that become completions: chosen, K rejected, and for KTO one
    more."""

    slots: np.ndarray
    margins: Tensor  # (E, K)
    num_negatives: int  # K

    @classmethod
    def of(cls, options, loss: str, examples) -> "PreferenceTable":
        K = 1 if LOSSES[loss].pairwise else options.num_negatives
        rejected = examples.negatives(K, options.negative_source)  # (E, K)
        slots = np.concatenate([examples.target[:, None], rejected], 1)
        scores = torch.from_numpy(np.take_along_axis(examples.scores, slots, 1))
        if loss == "kto":
            slots = np.concatenate([slots, mismatched_slots(examples.others, rejected)], 1)
        return cls(slots, scaled_margins(options, loss, scores), K)


# ------------------------------------------------------------------------ micro-batches
@dataclass
class MicroBatch:
    """What one forward pass needs, on its device;
    all counts are known beforehand, as plain numbers."""

    tree: PromptTree
    weight: float  # 0: it only evens out ranks
    chosen: Tensor  # indices of the chosen titles' tokens among the M scored ones
    num_examples: int  # of the global batch
    num_tokens: float  # target tokens of the global batch; those of histories by their weight
    reference_logps: Tensor | None = None  # (B, N), zeros without a reference
    margins: Tensor | None = None  # (B, K), already times λ
    lengths: Tensor | None = None  # (B, N) tokens of each completion


class SFT:
    """Negative log-likelihood of the chosen title (eq. 1), a mean over target tokens.

    With --history_weight W the history's own tokens are targets, too, and each counts W times (a
    prompt loss weight, of the history alone): every item tells what the user chose next."""

    has_reference = False

    def __init__(self, config, model, encoded: Encoded, device):
        self.config, self.model, self.encoded, self.device = config, model, encoded, device
        # (E, N) candidates that become completions, chosen first
        self.slots = encoded.examples.target[:, None]
        self.history_weight = config.history_weight

    def num_tokens(self, examples) -> float:
        """Target tokens of these examples: of chosen titles, and of histories by their weight."""
        chosen = (self.encoded.slots(int(e), self.slots[e][:1]) for e in examples)
        count = sum(len(ids) for (ids,) in chosen)
        if self.history_weight:
            count += self.history_weight * int(np.diff(self.encoded.histories[examples]).sum())
        return count

    def prepare(self, batch: list[int], step_examples) -> MicroBatch:
        """The micro-batch of these examples, in a step of `step_examples` over all ranks."""
        weight, batch = float(bool(batch)), batch or [int(step_examples[0])]
        tree = self.encoded.tree(batch, self.slots)
        chosen = tree.sequence_ids % tree.num_completions == 0
        if self.history_weight:
            tree = tree.with_prompt_labels(self.encoded.histories[batch])
        return MicroBatch(
            tree.to(self.device),
            weight,
            to_device(torch.nonzero(chosen).squeeze(1), self.device),
            num_examples=len(step_examples),
            num_tokens=self.num_tokens(step_examples),
        )

    def __call__(self, batch: MicroBatch) -> tuple[Tensor, dict]:
        tree, weight = batch.tree, batch.weight
        token_logps, greedy_ids = self.model(tree)
        chosen_logps = token_logps[batch.chosen]
        loss = sft_loss(chosen_logps, batch.num_tokens)

        right = (greedy_ids == tree.labels)[batch.chosen]
        count = weight * len(batch.chosen)
        sums = {
            "nll_loss": (-weight * chosen_logps.detach().sum(), count),
            "mean_token_accuracy": (weight * right.sum(), count),
        }
        num_scored = count  # those of the history by their weight
        if self.history_weight:
            history_logps = token_logps[len(tree.sequence_ids) :]
            loss = loss + self.history_weight * sft_loss(history_logps, batch.num_tokens)
            in_history = weight * len(history_logps)
            sums["history_nll"] = (-weight * history_logps.detach().sum(), in_history)
            num_scored += self.history_weight * in_history
        sums["loss"] = (weight * loss.detach(), num_scored / batch.num_tokens)
        return weight * loss, sums

    def after_step(self, metrics: Callable[[str], Tensor]) -> None:
        """What the next step must know of this one; metrics(name) stays on its device."""

    def state(self) -> dict:
        """What a checkpoint must keep of it, and load_state reads."""
        return {}

    def load_state(self, state: dict) -> None:
        pass


class Preference(SFT):
    """RecPO or another preference loss, a mean over examples.

    Its reference log-probs are filled in before the first step.

    KTO's baseline z is the mean log-ratio of completions that belong to other prompts. Here it is
    a listed title that is neither chosen nor rejected, in a third branch; the global mean of one
    step serves the next (at the first step it is 0, exactly), so that no pass runs ahead and any
    division into micro-batches gives the same update."""

    def __init__(self, config, loss: str, model, encoded: Encoded, device):
        super().__init__(config, model, encoded, device)
        table = PreferenceTable.of(config, loss, encoded.examples)
        self.loss, self.method = loss, LOSSES[loss]
        self.slots, self.margins, self.K = table.slots, table.margins, table.num_negatives
        self.history_weight = 0.0  # histories are sft's alone
        self.sft_weight = config.sft_weight
        if config.sft_weight < 0:
            self.sft_weight = self.method.sft_weight
        self.has_reference = self.method.has_reference
        self.reference_logps = torch.zeros(self.slots.shape)  # (E, N)
        # of the first step, where they must be zero; None once they were checked
        self.first_rewards: list[Tensor] | None = [] if self.has_reference else None
        self.kl = torch.zeros((), device=device)  # of the step before

    def prepare(self, batch: list[int], step_examples) -> MicroBatch:
        prepared = super().prepare(batch, step_examples)
        examples = batch or [int(step_examples[0])]
        completions = [self.encoded.slots(e, self.slots[e]) for e in examples]
        lengths = [list(map(len, titles)) for titles in completions]
        prepared.reference_logps = to_device(self.reference_logps[examples], self.device)
        prepared.margins = to_device(self.margins[examples], self.device)
        prepared.lengths = to_device(torch.tensor(lengths), self.device)
        return prepared

    def first_loss(self) -> float:
        """What the mean loss must be before the first step,
        where the policy is the reference; NaN without one."""
        if not self.has_reference:
            return float("nan")
        zeros = torch.zeros(len(self.slots), 1 + self.K)
        rows = Rows(zeros, zeros, self.margins, torch.ones_like(zeros), torch.zeros(()))
        losses, _ = self.method.compute(self.config, rows)
        return losses.mean().item()

    def __call__(self, batch: MicroBatch) -> tuple[Tensor, dict]:
        weight, B = batch.weight, len(batch.margins)
        token_logps, _ = self.model(batch.tree)
        logps = batch.tree.sum_logps(token_logps)  # (B, N)
        pair = slice(0, 1 + self.K)
        reference_logps, lengths = batch.reference_logps[:, pair], batch.lengths[:, pair]
        rows = Rows(logps[:, pair], reference_logps, batch.margins, lengths, self.kl)

        losses, rewards = self.method.compute(self.config, rows)
        loss = losses.sum() / batch.num_examples
        if self.sft_weight:
            loss = loss + self.sft_weight * sft_loss(token_logps[batch.chosen], batch.num_tokens)
        if self.first_rewards is not None:
            self.first_rewards.append(weight * rewards)

        per_example = preference_metrics(rows, losses, rewards)
        if self.loss == "kto":
            per_example["kl"] = logps[:, -1] - batch.reference_logps[:, -1]
        sums = {"loss": (weight * loss.detach(), weight * B / batch.num_examples)}
        for name, values in per_example.items():
            sums[name] = (weight * values.detach().sum(), weight * B)
        chosen_logps = rows.policy_logps[:, 0].detach()
        sums["nll_loss"] = (-weight * chosen_logps.sum(), weight * len(batch.chosen))
        return weight * loss, sums

    def after_step(self, metrics: Callable[[str], Tensor]) -> None:
        if self.loss == "kto":
            self.kl = metrics("kl").nan_to_num(0.0).float()

    def state(self) -> dict:
        return {"kl": self.kl.item()} if self.loss == "kto" else {}

    def load_state(self, state: dict) -> None:
        self.first_rewards = None  # those of the first step, which is over
        if "kl" in state:
            self.kl = torch.tensor(state["kl"], device=self.device)


class Schedule:
    """Which examples every step takes, and how ranks and micro-batches divide them:
    a function of (seed, epoch, step)."""

    def __init__(self, config, epochs: float, widths: np.ndarray, world_size: int):
        self.config, self.widths, self.world_size = config, widths, world_size
        self.steps_per_epoch = math.ceil(len(widths) / config.batch_size)
        self.num_steps = math.ceil(epochs * self.steps_per_epoch)
        if config.max_steps:
            self.num_steps = min(self.num_steps, config.max_steps)
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
