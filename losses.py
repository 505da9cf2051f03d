"""SFT, RecPO (arXiv:2506.02261) and the losses it is compared with, as functions of log-probs.

    Δ_n = log π(y_n | x) - log π_ref(y_n | x)   log-ratio of completion n, summed over its tokens
    φ   = rating / (1 + steps)^decay            preference score of an item (steps 0: the next one)
    m_l = λ φ_w / φ_l                           target margin against rejected item l (eq. 4)

    RecPO (eq. 7)  -log σ(-log Σ_l exp(β (Δ_l - Δ_w) + m_l))
                   = softplus(logsumexp_l(β (Δ_l - Δ_w) + m_l))
    S-DPO   the same with λ = 0                         arXiv:2406.09215, eq. 9
    DPO     the same with λ = 0 and one rejected item   arXiv:2305.18290, eq. 7
    ODPO    DPO with an offset, log(φ_w - φ_l)          arXiv:2402.10571, eq. 5
    IPO     (mean Δ_w - mean Δ_l - 1 / (2 β))^2, means  arXiv:2310.12036, eq. 17
            over tokens, as its authors and TRL compute it
    KTO     each completion against a baseline z        arXiv:2402.01306, eq. 8
    CPO     DPO with log π instead of Δ, plus NLL       arXiv:2401.08417, eq. 5
    SimPO   -log σ(β (mean_w - mean_l) - γ), where      arXiv:2405.14734, eq. 6
            mean is log π per token: no reference, target margin γ

The second form of RecPO is the one computed: exp() overflows at 89 in fp32, and one bad negative
can exceed that. m_l is added outside β (...), as in the authors' code: it is the reward gap, in
nats, that the chosen item must exceed.

LOSSES, at the end, lists them under the names of --stages; λ and φ enter eq. 7 in `recpo`.

Legend: B examples, K rejected items per example (in a row after the chosen one), M tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MARGINS = ("ratio", "log_diff", "log_ratio", "none")


def preference_score(rating, steps, decay: float = 0.5):
    """φ = rating / (1 + steps)^decay of tensors or arrays; steps is 0 for the very next item."""
    return rating / (1 + steps) ** decay


def target_margins(
    chosen_scores: Tensor,  # (B,)
    rejected_scores: Tensor,  # (B, K)
    kind: str = "ratio",
) -> Tensor:  # (B, K), not yet times λ
    """How much more the chosen item must win by, per rejected item. Scores must be positive."""
    chosen = chosen_scores[:, None]
    if kind == "ratio":  # the method, eq. 4
        return chosen / rejected_scores
    # the authors' log(1 + φ_w - φ_l); the clamp keeps it finite if the rejected item scores higher
    if kind == "log_diff":
        return torch.log((1 + chosen - rejected_scores).clamp(min=1e-3))
    if kind == "log_ratio":
        return torch.log(chosen / rejected_scores)
    if kind == "log_gap":  # ODPO's own
        return torch.log((chosen - rejected_scores).clamp(min=1e-3))
    if kind == "none":
        return torch.zeros_like(rejected_scores)
    raise ValueError(f"unknown margin {kind!r}: use one of {', '.join((*MARGINS, 'log_gap'))}")


def sft_loss(
    token_logps: Tensor,  # (M,)
    num_target_tokens: float,  # of the global batch, so that micro-batches add up to one mean
) -> Tensor:
    """Negative log-likelihood of the target tokens, an answer's EOS among them (eq. 1)."""
    return -token_logps.sum() / num_target_tokens


def recpo_loss(
    policy_logps: Tensor,  # (B, 1 + K), chosen first
    reference_logps: Tensor,  # (B, 1 + K)
    scaled_margins: Tensor,  # (B, K), λ times target_margins
    beta: float,
) -> tuple[Tensor, Tensor]:  # losses (B,), rewards (B, 1 + K) detached
    """RecPO (eq. 7): the chosen item must beat all K negatives at once, each by its own margin."""
    logratios = policy_logps - reference_logps  # (B, 1 + K), chosen first
    # One number per negative; > 0 means it sits closer to the chosen item than its margin allows.
    violations = beta * (logratios[:, 1:] - logratios[:, :1]) + scaled_margins  # (B, K)
    losses = F.softplus(violations.logsumexp(dim=1))  # (B,)
    return losses, beta * logratios.detach()


def sdpo_loss(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """S-DPO (RecPO's eq. 3): RecPO without margins. Shapes as in recpo_loss."""
    no_margins = torch.zeros_like(policy_logps[:, 1:])
    return recpo_loss(policy_logps, reference_logps, no_margins, beta)


def dpo_loss(
    policy_logps: Tensor,  # (B, 2): chosen, rejected
    reference_logps: Tensor,  # (B, 2)
    beta: float,
    label_smoothing: float = 0.0,  # probability that the preference is the other way round
) -> tuple[Tensor, Tensor]:
    """DPO: -log σ(β (Δ_w - Δ_l)), with conservative label smoothing as in the DPO authors' code."""
    check_pair(policy_logps)
    logratios = policy_logps - reference_logps
    gap = beta * (logratios[:, 0] - logratios[:, 1])
    losses = -(1 - label_smoothing) * F.logsigmoid(gap) - label_smoothing * F.logsigmoid(-gap)
    return losses, beta * logratios.detach()


def check_pair(logps: Tensor) -> None:
    """Raise ValueError unless there is exactly one rejected item."""
    if logps.shape[1] != 2:
        raise ValueError(
            f"this loss compares two completions, got {logps.shape[1]}: "
            "set num_negatives to 1, or use sdpo"
        )


# ---------------------------------------------------------- the losses under the names of --stages
@dataclass
class LossInputs:
    """The inputs of a preference loss, for B prompts."""

    policy_logps: Tensor  # (B, 1 + K) sums over tokens
    reference_logps: Tensor  # (B, 1 + K) the same before the first step; zeros without a reference
    phi: Tensor  # (B, 1 + K) preference scores
    lengths: Tensor  # (B, 1 + K) tokens, EOS included
    kl: Tensor  # scalar, KTO: the mean log-ratio of titles that are neither chosen nor rejected


# Each returns the same as Loss.__call__, except that the margins may be one number.
def recpo(t: LossInputs, options):
    """RecPO (eq. 7), with λ times the target margins of φ."""
    margins = options.margin_lambda * target_margins(t.phi[:, 0], t.phi[:, 1:], options.margin)
    return *recpo_loss(t.policy_logps, t.reference_logps, margins, options.beta), margins


def sdpo(t: LossInputs, options):
    return *sdpo_loss(t.policy_logps, t.reference_logps, options.beta), 0.0


def dpo(t: LossInputs, options):
    return *dpo_loss(t.policy_logps, t.reference_logps, options.beta), 0.0


def odpo(t: LossInputs, options):
    """ODPO is RecPO with one rejected item and a margin of its own; its weight α is 1."""
    offsets = target_margins(t.phi[:, 0], t.phi[:, 1:], "log_gap")
    return *recpo_loss(t.policy_logps, t.reference_logps, offsets, options.beta), offsets


def ipo(t: LossInputs, options):
    """IPO: log-ratios and rewards are means over tokens; β is the paper's τ."""
    logratios = (t.policy_logps - t.reference_logps) / t.lengths
    losses = (logratios[:, 0] - logratios[:, 1] - 1 / (2 * options.beta)) ** 2
    return losses, options.beta * logratios.detach(), 0.0


def kto(t: LossInputs, options):
    """KTO: the mean of 1 - σ(β (Δ_w - z)) and 1 - σ(β (z - Δ_l)), where z = max(kl, 0)."""
    logratios, z = t.policy_logps - t.reference_logps, t.kl.detach().clamp(min=0)
    good = torch.sigmoid(-options.beta * (logratios[:, 0] - z))
    bad = torch.sigmoid(-options.beta * (z - logratios[:, 1]))
    return (good + bad) / 2, options.beta * logratios.detach(), 0.0


def cpo(t: LossInputs, options):
    """The preference part of CPO; --sft_weight, by default 1 for CPO, weighs its NLL part."""
    return *dpo_loss(t.policy_logps, torch.zeros_like(t.policy_logps), options.beta), 0.0


def simpo(t: LossInputs, options):
    """SimPO: rewards are per token; γ (--margin_lambda) is the gap to exceed, not divided by β."""
    means, gamma = t.policy_logps / t.lengths, options.margin_lambda
    return *recpo_loss(means, torch.zeros_like(means), gamma, options.beta), gamma


@dataclass(frozen=True)
class Loss:
    """A preference loss and what it needs."""

    function: Callable
    pairwise: bool = True  # one rejected title, whatever --num_negatives says
    has_reference: bool = True
    sft_weight: float = 0.0  # used if --sft_weight is -1

    def __call__(self, inputs: LossInputs, options) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (B,), rewards (B, 1 + K) without gradient, target margins (B, K)."""
        if self.pairwise:
            check_pair(inputs.policy_logps)
        losses, rewards, margins = self.function(inputs, options)
        return losses, rewards, torch.zeros_like(rewards[:, 1:]) + margins


LOSSES = {
    "dpo": Loss(dpo),
    "ipo": Loss(ipo),
    "simpo": Loss(simpo, has_reference=False),
    "cpo": Loss(cpo, has_reference=False, sft_weight=1.0),
    "odpo": Loss(odpo),
    "kto": Loss(kto),
    "sdpo": Loss(sdpo, pairwise=False),
    "recpo": Loss(recpo, pairwise=False),
}
