"""What one micro-batch contributes to a step: SFT, or a preference loss over chosen and rejected.

An objective makes micro-batches, `prepare(examples, step_examples) -> MicroBatch`, which needs no
GPU and runs ahead in the background, and is called with them: `objective(micro_batch) -> (loss,
sums)`. The loss is already divided by the counts of the *global* batch (target tokens for SFT,
examples for preferences), so micro-batches and ranks just add up to one big batch. `sums` maps
metric names to (sum, count): a tensor and a number, so that nothing in here waits for the GPU.

Legend: E examples, B examples of the micro-batch, K rejected titles, N completions (1 + K; for KTO
one more), M scored tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data import Encoded, Examples, PromptTree, micro_batches, to_device
from losses import LOSSES, Titles, sft_loss

PREFERENCE_LOSSES = tuple(LOSSES)
PAIRWISE = tuple(name for name, loss in LOSSES.items() if loss.pairwise)


def completion_slots(examples: Examples, loss: str, K: int, source: str) -> np.ndarray:
    """(E, N) the candidates that become completions: chosen, K rejected, for KTO one of neither."""
    slots = [examples.target[:, None], examples.negatives(K, source)]
    if loss == "kto":
        first, second = examples.negative_order[:, :1], examples.negative_order[:, 1:2]
        slots.append(np.where(first == slots[1], second, first))
    return np.concatenate(slots, axis=1)


def preference_metrics(t: Titles, losses: Tensor, rewards: Tensor, margins: Tensor) -> dict:
    """Name -> (B,), TRL's names where they exist. Rewards of ipo and simpo are per token, and so
    are the margins beside them; logps are sums."""
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
    """What one forward pass needs, on its device; all counts are known beforehand, as numbers."""

    tree: PromptTree
    weight: float  # 0: one example that only evens out the ranks' numbers of passes
    chosen: Tensor  # indices of the chosen titles' tokens among the M scored ones
    num_examples: int  # of the global batch
    num_tokens: float  # target tokens of the global batch; those of histories by their weight
    reference_logps: Tensor  # (B, N), zeros without a reference
    phi: Tensor  # (B, N) preference scores of the titles
    lengths: Tensor  # (B, N) tokens of the titles, EOS included


class Objective:
    """What a stage learns: SFT (eq. 1), a mean over target tokens, or a preference loss, a mean
    over examples.

    With --history_weight W the history's tokens are targets of SFT, too, and each counts W times:
    every item tells what the user chose next. Reference log-probs are filled in before the first
    step. KTO's baseline z, the mean log-ratio of completions that belong to other prompts, is that
    of a listed title which is neither chosen nor rejected; the global mean of one step serves the
    next (at the first it is 0, exactly), so that any division into micro-batches gives the same
    update."""

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
        # of the first step, where they must be zero; None once they were checked
        self.first_rewards: list[Tensor] | None = [] if self.has_reference else None
        self.kl = torch.zeros((), device=device)  # of the step before

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
        lengths = torch.bincount(tree.sequence_ids).view(len(batch), tree.num_completions)
        chosen = torch.nonzero(tree.sequence_ids % tree.num_completions == 0).squeeze(1)
        if self.history_weight:
            tree = tree.with_prompt_labels(self.encoded.histories[batch])
        return MicroBatch(
            tree=tree.to(self.device),
            weight=weight,
            chosen=to_device(chosen, self.device),
            num_examples=len(step_examples),
            num_tokens=self.num_tokens(step_examples),
            reference_logps=to_device(self.reference_logps[batch], self.device),
            phi=to_device(self.phi[batch], self.device),
            lengths=to_device(lengths, self.device),
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
        sums = {
            "nll_loss": (-chosen_logps.detach().sum(), count),
            "mean_token_accuracy": (right.sum(), count),
        }
        if self.history_weight:
            history_logps = token_logps[len(batch.tree.sequence_ids) :]
            loss = loss + self.history_weight * sft_loss(history_logps, batch.num_tokens)
            sums["history_nll"] = (-history_logps.detach().sum(), len(history_logps))
            count += self.history_weight * len(history_logps)
        return loss, sums | {"loss": (loss.detach(), count / batch.num_tokens)}

    def preference(self, batch: MicroBatch, token_logps: Tensor):
        B, n = len(batch.phi), 1 + self.K
        logps = batch.tree.sum_logps(token_logps)  # (B, N)
        reference_logps, phi, lengths = batch.reference_logps, batch.phi, batch.lengths
        titles = Titles(logps[:, :n], reference_logps[:, :n], phi[:, :n], lengths[:, :n], self.kl)
        losses, rewards, margins = self.method(titles, self.config)
        loss, chosen_logps = losses.sum() / batch.num_examples, token_logps[batch.chosen]
        if self.sft_weight:
            loss = loss + self.sft_weight * sft_loss(chosen_logps, batch.num_tokens)
        if self.first_rewards is not None:
            self.first_rewards.append(batch.weight * rewards)

        per_example = preference_metrics(titles, losses, rewards, margins)
        if self.loss == "kto":
            per_example["kl"] = logps[:, -1] - reference_logps[:, -1]
        sums = {name: (values.detach().sum(), B) for name, values in per_example.items()}
        sums["loss"] = (loss.detach(), B / batch.num_examples)
        sums["nll_loss"] = (-titles.policy_logps[:, 0].detach().sum(), len(batch.chosen))
        return loss, sums

    def at_the_start(self) -> tuple[Tensor, Tensor]:
        """Losses (E,) where the policy is its reference, and target margins (E, K)."""
        zeros, phi = torch.zeros(len(self.slots), 1 + self.K), self.phi[:, : 1 + self.K]
        titles = Titles(zeros, zeros, phi, torch.ones_like(zeros), torch.zeros(()))
        losses, _, margins = self.method(titles, self.config)
        return losses, margins

    def first_loss(self) -> float:
        """What the mean loss must be before the first step; NaN without a reference."""
        return self.at_the_start()[0].mean().item() if self.has_reference else math.nan

    def after_step(self, metrics: Callable[[str], Tensor]) -> None:
        """What the next step must know of this one; metrics(name) stays on its device."""
        if self.loss == "kto":
            self.kl = metrics("kl").nan_to_num(0.0).float()

    def state(self) -> dict:
        """What a checkpoint must keep of it, and load_state reads."""
        return {"kl": self.kl.item()} if self.loss == "kto" else {}

    def load_state(self, state: dict) -> None:
        self.first_rewards = None  # those of the first step, which is over
        self.kl = torch.tensor(state.get("kl", 0.0), device=self.device)


class Schedule:
    """Which examples every step takes, and how ranks and micro-batches divide them:
    a function of (seed, epoch, step)."""

    def __init__(self, config, epochs: float, widths: np.ndarray, world_size: int):
        self.config, self.widths, self.world_size = config, widths, world_size
        self.steps_per_epoch = math.ceil(len(widths) / config.batch_size)
        # 1.1 * 100 is 110.00000000000001
        self.num_steps = math.ceil(round(epochs * self.steps_per_epoch, 6))
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
