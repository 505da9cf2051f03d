"""What one micro-batch contributes to a step: SFT on the chosen title, or a preference loss over chosen and rejected.

An objective is called with a micro-batch (indices of examples) and all examples of the optimizer step, and returns
`(loss, sums)`. The loss is already divided by the counts of the *global* batch (target tokens for SFT, examples for
preferences), so micro-batches and ranks just add up to one big batch. `sums` maps metric names, TRL's where they exist,
to (sum, count) pairs. An empty micro-batch evens out ranks: it runs one example with weight 0.

Legend: E examples, B examples of the micro-batch, K rejected titles, N = 1 + K completions, M scored tokens.
"""

import numpy as np
import torch
from torch import Tensor

from data import Encoded, PromptTree
from losses import dpo_loss, recpo_loss, sdpo_loss, sft_loss, target_margins

PREFERENCE_LOSSES = ("dpo", "sdpo", "recpo")
COPY_TITLES = 5  # other titles on the tree of an SFT example with --copy_weight


def after_first(sequence_ids: Tensor) -> Tensor:
    """(M,) True for every scored token but the first of its completion."""
    mask = torch.zeros_like(sequence_ids, dtype=torch.bool)
    mask[1:] = sequence_ids[1:] == sequence_ids[:-1]
    return mask


class SFT:
    """Negative log-likelihood of the chosen title (eq. 1), a mean over target tokens."""

    def __init__(self, config, model, encoded: Encoded, device):
        self.config, self.model, self.encoded, self.device = config, model, encoded, device
        self.slots = encoded.examples.target[:, None]  # (E, N) candidates that become completions, chosen first
        if config.copy_weight:
            self.slots = np.concatenate([self.slots, encoded.examples.others[:, :COPY_TITLES]], 1)

    def tree(self, batch: list[int]) -> PromptTree:
        return self.encoded.tree(batch, self.slots).to(self.device)

    def num_tokens(self, examples, columns=slice(0, 1)) -> int:
        """Target tokens of these columns of `slots`; by default those of the chosen titles."""
        return sum(len(ids) for e in examples for ids in self.encoded.slots(int(e), self.slots[e][columns]))

    def __call__(self, batch: list[int], step_examples) -> tuple[Tensor, dict]:
        weight = float(bool(batch))
        tree = self.tree(batch or [int(step_examples[0])])
        token_logps, greedy_ids = self.model(tree)
        chosen = tree.sequence_ids % tree.num_completions == 0
        loss = sft_loss(token_logps[chosen], self.num_tokens(step_examples))
        if self.config.copy_weight:  # how the other listed titles go on once begun: nothing about which to choose
            others = ~chosen & after_first(tree.sequence_ids)
            count = self.num_tokens(step_examples, slice(1, None)) - sum(self.slots[e].size - 1 for e in step_examples)
            loss = loss + self.config.copy_weight * sft_loss(token_logps[others], count)
        count = weight * chosen.sum()
        sums = {
            "loss": (-weight * token_logps[chosen].detach().sum(), count),
            "mean_token_accuracy": (weight * (greedy_ids == tree.labels)[chosen].sum(), count),
        }
        return weight * loss, sums


class Preference(SFT):
    """DPO, S-DPO or RecPO, a mean over examples. Its reference log-probs are filled in before the first step."""

    def __init__(self, config, loss: str, model, encoded: Encoded, device):
        super().__init__(config, model, encoded, device)
        self.loss = loss
        examples = encoded.examples
        rejected = examples.negatives(1 if loss == "dpo" else config.num_negatives, config.negative_source)
        self.slots = np.concatenate([examples.target[:, None], rejected], 1)  # (E, 1 + K)
        scores = torch.from_numpy(np.take_along_axis(examples.scores, self.slots, 1))
        kind = config.margin if loss == "recpo" else "none"
        self.margins = config.margin_lambda * target_margins(scores[:, 0], scores[:, 1:], kind)  # (E, K)
        self.reference_logps = torch.zeros(self.slots.shape)  # (E, 1 + K)
        self.first_rewards: list[Tensor] | None = []  # those of the first step, which must be zero

    def losses(self, policy_logps: Tensor, batch: list[int]) -> tuple[Tensor, Tensor]:
        reference, margins = self.reference_logps[batch].to(self.device), self.margins[batch].to(self.device)
        if self.loss == "dpo":
            return dpo_loss(policy_logps, reference, self.config.beta, self.config.label_smoothing)
        if self.loss == "sdpo":
            return sdpo_loss(policy_logps, reference, self.config.beta)
        return recpo_loss(policy_logps, reference, margins, self.config.beta)

    def __call__(self, batch: list[int], step_examples) -> tuple[Tensor, dict]:
        weight, batch = float(bool(batch)), batch or [int(step_examples[0])]
        tree = self.tree(batch)
        token_logps, _ = self.model(tree)
        policy_logps = tree.sum_logps(token_logps)  # (B, 1 + K)
        losses, rewards = self.losses(policy_logps, batch)
        loss = losses.sum() / len(step_examples)
        if self.config.sft_weight:
            chosen = tree.sequence_ids % tree.num_completions == 0
            loss = loss + self.config.sft_weight * sft_loss(token_logps[chosen], self.num_tokens(step_examples))
        if self.first_rewards is not None:
            self.first_rewards.append(weight * rewards)

        gaps, margins = rewards[:, :1] - rewards[:, 1:], self.margins[batch].to(self.device)  # (B, K)
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
        count = losses.new_tensor(weight * len(batch))
        sums = {name: (weight * values.detach().sum(), count) for name, values in per_example.items()}
        tokens = losses.new_tensor(weight * self.num_tokens(batch))
        sums["nll_loss"] = (-weight * policy_logps[:, 0].detach().sum(), tokens)
        return weight * loss, sums
