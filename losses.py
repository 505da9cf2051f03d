"""The losses: SFT, RecPO, and what it is compared with, as pure functions of log-probabilities.

    Δ_n = log π(y_n | x) - log π_ref(y_n | x)   log-ratio of completion n, summed over its tokens
    φ   = rating / (1 + steps)^decay            preference score of an item (steps 0: the next one)
    m_l = φ_w / φ_l                             target margin against rejected item l (eq. 4)

    RecPO (eq. 7)  -log σ(-log Σ_l exp(β (Δ_l - Δ_w) + λ m_l))
                   = softplus(logsumexp_l(β (Δ_l - Δ_w) + λ m_l))
    S-DPO   the same with λ = 0                         arXiv:2406.09215, eq. 9
    DPO     the same with λ = 0 and one rejected item   arXiv:2305.18290, eq. 7
    ODPO    DPO with an offset α m:                     arXiv:2402.10571, eq. 5
            -log σ(β (Δ_w - Δ_l) - α m)
    IPO     regression to a fixed gap:                  arXiv:2310.12036, eq. 17
            (Δ_w - Δ_l - 1 / (2 β))^2
    KTO     each completion against a baseline z        arXiv:2402.01306, eq. 8
    CPO     DPO without a reference, plus NLL           arXiv:2401.08417, eq. 5
    SimPO   means over tokens instead of sums:          arXiv:2405.14734, eq. 6
            -log σ(β (mean_w - mean_l) - γ)

Without a reference (CPO, SimPO) Δ is log π alone: zeros stand for log π_ref.

The second form of RecPO is the one computed: exp() overflows at 89 in fp32, and one bad negative
can exceed that. λ m is added outside β (...), as in the authors' code: it is the reward gap, in
nats, that the chosen item must exceed.

Legend: B examples, K = num_negatives rejected items per example, N = 1 + K completions (chosen
first), M tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MARGINS = ("ratio", "log_diff", "log_ratio", "none")


def preference_score(rating, steps, decay: float = 0.5):
    """φ = rating / (1 + steps)^decay; tensors or arrays.

    steps counts interactions until this one, 0 for the very next."""
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
    # the authors' log(1 + φ_w - φ_l); the clamp keeps it finite where the rejected scores higher
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
    # of the whole global batch, so that micro-batches and ranks add up to one mean
    num_target_tokens: float,
) -> Tensor:
    """Negative log-likelihood of target tokens; an answer's include its EOS (eq. 1)."""
    return -token_logps.sum() / num_target_tokens


def recpo_loss(
    policy_logps: Tensor,  # (B, 1 + K), chosen first
    reference_logps: Tensor,  # (B, 1 + K)
    target_margins: Tensor,  # (B, K), already times λ
    beta: float,
) -> tuple[Tensor, Tensor]:  # losses (B,), rewards (B, 1 + K) detached
    """RecPO (eq. 7): the chosen item must beat all K negatives at once, each by its own margin."""
    logratios = policy_logps - reference_logps  # (B, 1 + K), chosen first
    # One number per negative; > 0 means it sits closer to the chosen item than its margin allows.
    violations = beta * (logratios[:, 1:] - logratios[:, :1]) + target_margins  # (B, K)
    losses = F.softplus(violations.logsumexp(dim=1))  # (B,)
    return losses, beta * logratios.detach()


def sdpo_loss(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """S-DPO: RecPO without margins. Shapes as in recpo_loss."""
    no_margins = torch.zeros_like(policy_logps[:, 1:])
    return recpo_loss(policy_logps, reference_logps, no_margins, beta)


def _gap(policy_logps: Tensor, reference_logps: Tensor, name: str) -> Tensor:
    """(B,) Δ_w - Δ_l of methods that compare two completions."""
    if policy_logps.shape[1] != 2:
        raise ValueError(
            f"{name} compares two completions, got {policy_logps.shape[1]}: "
            "set num_negatives to 1, or use sdpo"
        )
    logratios = policy_logps - reference_logps  # (B, 2)
    return logratios[:, 0] - logratios[:, 1]


def dpo_loss(
    policy_logps: Tensor,  # (B, 2): chosen, rejected
    reference_logps: Tensor,  # (B, 2)
    beta: float,
    label_smoothing: float = 0.0,  # probability that the preference is the other way round
) -> tuple[Tensor, Tensor]:
    """DPO: -log σ(β (Δ_w - Δ_l)), with conservative label smoothing as in the DPO authors' code."""
    gap = beta * _gap(policy_logps, reference_logps, "DPO")
    losses = -(1 - label_smoothing) * F.logsigmoid(gap) - label_smoothing * F.logsigmoid(-gap)
    return losses, beta * (policy_logps - reference_logps).detach()


def odpo_loss(
    policy_logps: Tensor,  # (B, 2)
    reference_logps: Tensor,  # (B, 2)
    offsets: Tensor,  # (B, 1), already times α
    beta: float,
) -> tuple[Tensor, Tensor]:
    """ODPO: the gap must exceed an offset, log(φ_w - φ_l) or log(φ_w / φ_l).

    RecPO with one rejected item."""
    gap = beta * _gap(policy_logps, reference_logps, "ODPO") - offsets[:, 0]
    return F.softplus(-gap), beta * (policy_logps - reference_logps).detach()


def ipo_loss(
    policy_logps: Tensor,  # (B, 2), sums; or means over tokens, as IPO's authors intend
    reference_logps: Tensor,  # (B, 2), likewise
    beta: float,  # τ of the paper
) -> tuple[Tensor, Tensor]:
    """IPO: (Δ_w - Δ_l - 1 / (2 β))^2: the gap shall be this, not larger."""
    gap = _gap(policy_logps, reference_logps, "IPO")
    return (gap - 1 / (2 * beta)) ** 2, beta * (policy_logps - reference_logps).detach()


def cpo_loss(policy_logps: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """CPO's preference part: DPO without a reference, (B, 2).

    Its NLL part is --sft_weight, by default 1 for it."""
    return dpo_loss(policy_logps, torch.zeros_like(policy_logps), beta)


def simpo_loss(
    policy_logps: Tensor,  # (B, 2), sums over tokens
    lengths: Tensor,  # (B, 2) tokens of each completion, EOS included
    beta: float,
    gamma: float,  # the target margin, not divided by β
) -> tuple[Tensor, Tensor]:
    """SimPO: -log σ(β (mean_w - mean_l) - γ), without a reference."""
    means = policy_logps / lengths
    gap = beta * _gap(means, torch.zeros_like(means), "SimPO") - gamma
    return F.softplus(-gap), beta * means.detach()


def kto_loss(
    policy_logps: Tensor,  # (B, 2)
    reference_logps: Tensor,  # (B, 2)
    kl: Tensor,  # scalar, the batch's mean log-ratio of mismatched completions, before clamping
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """KTO: w_d (1 - σ(β (Δ_w - z))) + w_u (1 - σ(β (z - Δ_l))), z = max(kl, 0);
    the mean of a pair's two losses."""
    _gap(policy_logps, reference_logps, "KTO")
    logratios = policy_logps - reference_logps
    z = kl.detach().clamp(min=0)
    good = desirable_weight * torch.sigmoid(-beta * (logratios[:, 0] - z))
    bad = undesirable_weight * torch.sigmoid(-beta * (z - logratios[:, 1]))
    return (good + bad) / 2, beta * logratios.detach()
