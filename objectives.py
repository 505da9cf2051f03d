"""What one micro-batch contributes to a step: SFT on the chosen title, or a preference loss over chosen and rejected.

An objective makes micro-batches, `prepare(examples, step_examples) -> MicroBatch`, which needs no GPU and runs ahead in the
background, and is called with them: `objective(micro_batch) -> (loss, sums)`. The loss is already divided by the counts
of the *global* batch (target tokens for SFT, examples for preferences), so micro-batches and ranks just add up to one big
batch. `sums` maps metric names, TRL's where they exist, to (sum, count) pairs: a tensor and a number, so that nothing in
here waits for the GPU. An empty micro-batch evens out ranks: it runs one example with weight 0.

Legend: E examples, B examples of the micro-batch, K rejected titles, N = 1 + K completions, M scored tokens.
"""

import math
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

PREFERENCE_LOSSES = ("dpo", "ipo", "simpo", "cpo", "odpo", "kto", "sdpo", "recpo")
PAIRWISE = (
    "dpo",
    "ipo",
    "simpo",
    "cpo",
    "odpo",
    "kto",
)  # one rejected title, whatever --num_negatives says
WITHOUT_REFERENCE = ("simpo", "cpo")
COPY_TITLES = 5  # other titles on the tree of an SFT example with --copy_weight


def after_first(sequence_ids: Tensor) -> Tensor:
    """(M,) True for every scored token but the first of its completion."""
    mask = torch.zeros_like(sequence_ids, dtype=torch.bool)
    mask[1:] = sequence_ids[1:] == sequence_ids[:-1]
    return mask


@dataclass
class MicroBatch:
    """What one forward pass needs, on its device; all counts are known beforehand, as plain numbers."""

    tree: PromptTree
    weight: float  # 0: it only evens out ranks
    chosen: Tensor  # indices of the chosen titles' tokens among the M scored ones
    others: Tensor  # those of the other titles' second and later tokens (SFT with --copy_weight)
    num_examples: int  # of the global batch
    num_tokens: int  # target tokens of the global batch
    num_others: int  # as `others`, of the global batch
    reference_logps: Tensor | None = None  # (B, N), zeros without a reference
    margins: Tensor | None = None  # (B, K), already times λ
    lengths: Tensor | None = None  # (B, N) tokens of each completion


class SFT:
    """Negative log-likelihood of the chosen title (eq. 1), a mean over target tokens."""

    def __init__(self, config, model, encoded: Encoded, device):
        self.config, self.model, self.encoded, self.device = config, model, encoded, device
        self.slots = encoded.examples.target[
            :, None
        ]  # (E, N) candidates that become completions, chosen first
        if config.copy_weight:
            self.slots = np.concatenate([self.slots, encoded.examples.others[:, :COPY_TITLES]], 1)

    def num_tokens(self, examples, columns=slice(0, 1)) -> int:
        """Target tokens of these columns of `slots`; by default those of the chosen titles."""
        return sum(
            len(ids) for e in examples for ids in self.encoded.slots(int(e), self.slots[e][columns])
        )

    def prepare(self, batch: list[int], step_examples) -> MicroBatch:
        weight, batch = float(bool(batch)), batch or [int(step_examples[0])]
        tree = self.encoded.tree(batch, self.slots)
        chosen = tree.sequence_ids % tree.num_completions == 0
        indices = [
            torch.nonzero(mask).squeeze(1)
            for mask in (chosen, ~chosen & after_first(tree.sequence_ids))
        ]
        rest = slice(1, None)
        num_others = self.num_tokens(step_examples, rest) - len(step_examples) * (
            self.slots.shape[1] - 1
        )
        return MicroBatch(
            tree.to(self.device),
            weight,
            *(to_device(t, self.device) for t in indices),
            len(step_examples),
            self.num_tokens(step_examples),
            num_others,
        )

    def __call__(self, batch: MicroBatch) -> tuple[Tensor, dict]:
        tree, weight = batch.tree, batch.weight
        token_logps, greedy_ids = self.model(tree)
        chosen_logps = token_logps[batch.chosen]
        loss = sft_loss(chosen_logps, batch.num_tokens)
        if (
            self.config.copy_weight
        ):  # how the other listed titles go on once begun: nothing about which to choose
            loss = loss + self.config.copy_weight * sft_loss(
                token_logps[batch.others], batch.num_others
            )
        right = (greedy_ids == tree.labels)[batch.chosen]
        count = weight * len(batch.chosen)
        sums = {
            "loss": (-weight * chosen_logps.detach().sum(), count),
            "mean_token_accuracy": (weight * right.sum(), count),
        }
        return weight * loss, sums


class Preference(SFT):
    """RecPO or another preference loss, a mean over examples. Its reference log-probs are filled in before the first step.

    KTO's baseline z is the mean log-ratio of completions that belong to other prompts. Here it is a listed title that is
    neither chosen nor rejected, in a third branch; the global mean of one step serves the next (at the first step it is 0,
    exactly), so that no pass runs ahead and any division into micro-batches gives the same update."""

    def __init__(self, config, loss: str, model, encoded: Encoded, device):
        super().__init__(config, model, encoded, device)
        self.loss, examples = loss, encoded.examples
        self.K = 1 if loss in PAIRWISE else config.num_negatives
        self.sft_weight = config.sft_weight if config.sft_weight >= 0 else float(loss == "cpo")
        self.has_reference = not (config.reference_free or loss in WITHOUT_REFERENCE)
        rejected = examples.negatives(self.K, config.negative_source)
        self.slots = np.concatenate([examples.target[:, None], rejected], 1)  # (E, 1 + K)
        scores = torch.from_numpy(np.take_along_axis(examples.scores, self.slots, 1))
        kind = {"recpo": config.margin, "odpo": config.odpo_offset}.get(loss, "none")
        weight = config.odpo_alpha if loss == "odpo" else config.margin_lambda
        self.margins = weight * target_margins(scores[:, 0], scores[:, 1:], kind)  # (E, K)
        if loss == "kto":
            others = examples.others  # the first that is not the rejected one
            mismatched = np.where(others[:, :1] == rejected, others[:, 1:2], others[:, :1])
            self.slots = np.concatenate([self.slots, mismatched], 1)
        self.reference_logps = torch.zeros(self.slots.shape)  # (E, N)
        self.first_rewards: list[Tensor] | None = (
            [] if self.has_reference else None
        )  # of the first step: they must be zero
        self.kl = torch.zeros((), device=device)  # of the step before

    def prepare(self, batch: list[int], step_examples) -> MicroBatch:
        prepared = super().prepare(batch, step_examples)
        rows = batch or [int(step_examples[0])]
        prepared.reference_logps = to_device(self.reference_logps[rows], self.device)
        prepared.margins = to_device(self.margins[rows], self.device)
        lengths = [[len(ids) for ids in self.encoded.slots(e, self.slots[e])] for e in rows]
        prepared.lengths = to_device(torch.tensor(lengths), self.device)
        return prepared

    def losses(
        self, policy_logps: Tensor, reference_logps: Tensor, margins: Tensor, lengths: Tensor
    ):
        """losses (B,), rewards (B, 1 + K); arguments (B, 1 + K), margins (B, K)."""
        config, logps = self.config, (policy_logps, reference_logps)
        if self.loss == "dpo":
            return dpo_loss(*logps, config.beta, config.label_smoothing)
        if self.loss == "ipo":
            return ipo_loss(
                *((t / lengths for t in logps) if config.ipo_average else logps), config.beta
            )
        if self.loss == "simpo":
            return simpo_loss(policy_logps, lengths, config.beta, config.simpo_gamma)
        if self.loss == "cpo":
            return cpo_loss(policy_logps, config.beta)
        if self.loss == "odpo":
            return odpo_loss(*logps, margins, config.beta)
        if self.loss == "kto":
            return kto_loss(
                *logps, self.kl, config.beta, config.kto_desirable, config.kto_undesirable
            )
        if self.loss == "sdpo":
            return sdpo_loss(*logps, config.beta)
        return recpo_loss(*logps, margins, config.beta)

    def first_loss(self) -> float:
        """What the mean loss must be before the first step, where the policy is the reference; NaN without one."""
        if not self.has_reference:
            return float("nan")
        zeros = torch.zeros(len(self.slots), 1 + self.K)
        return self.losses(zeros, zeros, self.margins, torch.ones_like(zeros))[0].mean().item()

    def __call__(self, batch: MicroBatch) -> tuple[Tensor, dict]:
        tree, weight, margins = batch.tree, batch.weight, batch.margins
        token_logps, _ = self.model(tree)
        all_logps = tree.sum_logps(token_logps)  # (B, N)
        pair = slice(0, 1 + self.K)
        policy_logps, reference_logps = all_logps[:, pair], batch.reference_logps[:, pair]
        losses, rewards = self.losses(
            policy_logps, reference_logps, margins, batch.lengths[:, pair]
        )
        loss = losses.sum() / batch.num_examples
        if self.sft_weight:
            loss = loss + self.sft_weight * sft_loss(token_logps[batch.chosen], batch.num_tokens)
        if self.first_rewards is not None:
            self.first_rewards.append(weight * rewards)

        gaps = rewards[:, :1] - rewards[:, 1:]  # (B, K)
        per_example = {
            "loss": losses,
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1:].mean(1),
            "rewards/margins": gaps.mean(1),
            "rewards/accuracies": (gaps > 0).all(1).float(),  # chosen beats all K
            "rewards/pair_accuracies": (gaps > 0).float().mean(1),  # TRL's meaning
            "margins/target": margins.mean(1),
            "margins/satisfied": (gaps > margins).float().mean(1),
            "logps/chosen": policy_logps[:, 0],
            "logps/rejected": policy_logps[:, 1:].mean(1),
        }
        if self.loss == "kto":
            per_example["kl"] = all_logps[:, -1] - batch.reference_logps[:, -1]
        sums = {
            name: (weight * values.detach().sum(), weight * len(losses))
            for name, values in per_example.items()
        }
        sums["nll_loss"] = (-weight * policy_logps[:, 0].detach().sum(), weight * len(batch.chosen))
        return weight * loss, sums


class Schedule:
    """Which examples every step takes, and how ranks and micro-batches divide them: a function of (seed, epoch, step)."""

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
            self.epoch, self.order = (
                epoch,
                np.random.default_rng([self.config.seed, epoch]).permutation(len(self.widths)),
            )
        return self.order[t * self.config.batch_size : (t + 1) * self.config.batch_size]

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        plan = micro_batches(
            self.widths, self.examples(step), self.world_size, self.config.micro_batch_tokens
        )
        return plan[rank]
