"""The losses: SFT, DPO, S-DPO and RecPO, as pure functions of log-probabilities.

    Δ_n = log π(y_n | x) - log π_ref(y_n | x)                     log-ratio of completion n, summed over its tokens
    φ   = rating / (1 + steps)^decay                              preference score of an item (steps 0: the next one)
    m_l = φ_w / φ_l                                               target margin against rejected item l (eq. 4)

    RecPO (eq. 7)  -log σ(-log Σ_l exp(β (Δ_l - Δ_w) + λ m_l))    = softplus(logsumexp_l(β (Δ_l - Δ_w) + λ m_l))
    S-DPO          the same with λ = 0                            arXiv:2406.09215, eq. 9
    DPO            the same with λ = 0 and one rejected item      arXiv:2305.18290, eq. 7

The right-hand form is the one computed: exp() overflows at 89 in fp32, and one bad negative can exceed that. λ m is
added outside β (...), as in the authors' code: it is the reward gap, in nats, that the chosen item must exceed.

Legend: B examples, K = num_negatives rejected items per example, N = 1 + K completions (chosen first), M tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MARGINS = ("ratio", "log_diff", "log_ratio", "none")


def preference_score(rating, steps, decay: float = 0.5):
    """φ = rating / (1 + steps)^decay; steps counts interactions until this one, 0 for the very next. Tensors or arrays."""
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
    if kind == "log_diff":  # the authors' log(1 + φ_w - φ_l); the clamp keeps it finite where the rejected scores higher
        return torch.log((1 + chosen - rejected_scores).clamp(min=1e-3))
    if kind == "log_ratio":
        return torch.log(chosen / rejected_scores)
    if kind == "none":
        return torch.zeros_like(rejected_scores)
    raise ValueError(f"unknown margin {kind!r}: use one of {', '.join(MARGINS)}")


def sft_loss(
    token_logps: Tensor,  # (M,)
    num_target_tokens: int,  # of the whole global batch, so that micro-batches and ranks add up to one mean
) -> Tensor:
    """Negative log-likelihood of the answer's tokens (eq. 1), EOS included."""
    return -token_logps.sum() / num_target_tokens


def recpo_loss(
    policy_logps: Tensor,  # (B, 1 + K), chosen first
    reference_logps: Tensor,  # (B, 1 + K)
    target_margins: Tensor,  # (B, K), already times λ
    beta: float,
) -> tuple[Tensor, Tensor]:  # losses (B,), rewards (B, 1 + K) detached
    """RecPO (eq. 7): the chosen item must beat all K negatives at once, each by its own margin."""
    logratios = policy_logps - reference_logps  # (B, 1 + K)
    # One number per negative; > 0 means it sits closer to the chosen item than its margin allows.
    violations = beta * (logratios[:, 1:] - logratios[:, :1]) + target_margins  # (B, K)
    losses = F.softplus(violations.logsumexp(dim=1))  # (B,)
    return losses, beta * logratios.detach()


def sdpo_loss(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """S-DPO: RecPO without margins. Shapes as in recpo_loss."""
    no_margins = torch.zeros_like(policy_logps[:, 1:])
    return recpo_loss(policy_logps, reference_logps, no_margins, beta)


def dpo_loss(
    policy_logps: Tensor,  # (B, 2): chosen, rejected
    reference_logps: Tensor,  # (B, 2)
    beta: float,
    label_smoothing: float = 0.0,  # probability that the preference is the other way round
) -> tuple[Tensor, Tensor]:
    """DPO: -log σ(β (Δ_w - Δ_l)), with conservative label smoothing as in the DPO authors' code."""
    if policy_logps.shape[1] != 2:
        raise ValueError(f"DPO compares two completions, got {policy_logps.shape[1]}: set num_negatives to 1, or use sdpo")
    logratios = policy_logps - reference_logps  # (B, 2)
    gap = beta * (logratios[:, 0] - logratios[:, 1])  # (B,)
    losses = -(1 - label_smoothing) * F.logsigmoid(gap) - label_smoothing * F.logsigmoid(-gap)
    return losses, beta * logratios.detach()
