"""The losses against numbers computed elsewhere, against each other, and where fp32 would overflow."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid, softplus

from losses import MARGINS, dpo_loss, preference_score, recpo_loss, sdpo_loss, sft_loss, target_margins

# Two examples, three negatives; columns: chosen, then the rejected.
POLICY = torch.tensor([[-12, -14.75, -9, -13], [-3.5, -4.25, -2.5, -8]], dtype=torch.float64)
REFERENCE = torch.tensor([[-11, -13, -10, -12.5], [-4, -5.5, -3, -6]], dtype=torch.float64)
CHOSEN_SCORES = torch.tensor([5, 4], dtype=torch.float64)
REJECTED_SCORES = torch.tensor([[0.9045, 2.8868, 0.7071], [0.9045, 1.5811, 2]], dtype=torch.float64)


def recpo(kind: str, margin_lambda: float, beta: float, num_negatives: int = 3) -> torch.Tensor:
    N = 1 + num_negatives
    margins = target_margins(CHOSEN_SCORES, REJECTED_SCORES[:, :num_negatives], kind)
    return recpo_loss(POLICY[:, :N], REFERENCE[:, :N], margin_lambda * margins, beta)[0]


@pytest.mark.parametrize("beta, golden", [(0.1, [0.6563501408, 0.7313501408]), (1.0, [0.3868710061, 1.1368710061])])
def test_dpo_equals_stored_numbers(beta, golden):
    """DPO against the first rejected item alone."""
    losses, _ = dpo_loss(POLICY[:, :2], REFERENCE[:, :2], beta)
    assert losses.tolist() == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize("beta, golden", [(1.0, [2.3523408786, 1.4348666480]), (0.1, [1.4351838872, 1.3498079891])])
def test_sdpo_equals_stored_numbers(beta, golden):
    """S-DPO against three rejected items."""
    assert sdpo_loss(POLICY, REFERENCE, beta)[0].tolist() == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize(
    "kind, beta, golden",
    [
        ("ratio", 1.0, [14.6553717917, 9.6057056596]),
        ("log_diff", 1.0, [4.8757162706, 3.8905202298]),
        ("ratio", 0.5, [14.4164677950, 9.2367763142]),
    ],
)
def test_recpo_equals_stored_numbers(kind, beta, golden):
    """RecPO with lambda = 2; the margin is not scaled by beta."""
    assert recpo(kind, margin_lambda=2.0, beta=beta).tolist() == pytest.approx(golden, abs=1e-6)


def test_recpo_with_one_negative_and_log_ratio_is_odpo():
    """ODPO's offset log(s_w / s_l) is RecPO's log_ratio margin with lambda = 1."""
    losses = recpo("log_ratio", margin_lambda=1.0, beta=1.0, num_negatives=1)
    assert losses.tolist() == pytest.approx([1.2840408507, 2.3381528509], abs=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_recpo_without_margin_is_sdpo(beta):
    """lambda = 0, or the margin `none`, leaves S-DPO."""
    expected, expected_rewards = sdpo_loss(POLICY, REFERENCE, beta)
    for margins in (0.0 * REJECTED_SCORES, 2.0 * target_margins(CHOSEN_SCORES, REJECTED_SCORES, "none")):
        losses, rewards = recpo_loss(POLICY, REFERENCE, margins, beta)
        assert torch.equal(losses, expected) and torch.equal(rewards, expected_rewards)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_recpo_with_one_negative_and_no_margin_is_dpo(beta):
    """One rejected item and lambda = 0 leave DPO, gradients included."""
    policy = POLICY[:, :2].clone().requires_grad_()
    ours = recpo_loss(policy, REFERENCE[:, :2], torch.zeros(2, 1, dtype=torch.float64), beta)[0]
    dpo = dpo_loss(policy, REFERENCE[:, :2], beta)[0]
    assert ours.tolist() == pytest.approx(dpo.tolist(), abs=1e-12)
    (grad_ours,), (grad_dpo,) = torch.autograd.grad(ours.sum(), policy), torch.autograd.grad(dpo.sum(), policy)
    torch.testing.assert_close(grad_ours, grad_dpo, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", MARGINS)
def test_loss_at_the_reference_depends_on_margins_alone(kind):
    """Where policy = reference, the loss is softplus(logsumexp(lambda m)) and every reward is 0; log 4 for S-DPO."""
    margins = 2.0 * target_margins(CHOSEN_SCORES, REJECTED_SCORES, kind)
    losses, rewards = recpo_loss(POLICY, POLICY, margins, beta=0.7)
    assert losses.tolist() == pytest.approx(softplus(margins.logsumexp(1)).tolist(), abs=1e-12)
    assert not rewards.any()
    if kind == "none":
        assert losses.tolist() == pytest.approx([math.log(4)] * 2, abs=1e-9)


def test_recpo_equals_the_published_form():
    """softplus(logsumexp) is -log sigmoid(-log sum exp), and the chosen item's cross-entropy, where those are safe."""
    margins = 2.0 * target_margins(CHOSEN_SCORES, REJECTED_SCORES, "ratio")
    losses, _ = recpo_loss(POLICY, REFERENCE, margins, beta=1.0)
    ratios = POLICY - REFERENCE
    published = -logsigmoid(-(ratios[:, 1:] - ratios[:, :1] + margins).exp().sum(1).log())
    assert losses.tolist() == pytest.approx(published.tolist(), rel=1e-9)
    logits = torch.cat([ratios[:, :1], ratios[:, 1:] + margins], dim=1)
    assert losses.tolist() == pytest.approx((-logits.log_softmax(1)[:, 0]).tolist(), rel=1e-9)


@pytest.mark.parametrize("gap", [-500.0, 500.0])
def test_loss_and_gradient_stay_finite_far_apart(gap):
    """At 500 nats in fp32, where exp() overflows, the loss is the violation itself or 0, its slope -1 or 0."""
    for loss in (
        lambda p, r: recpo_loss(p, r, torch.full((1, 3), 11.0), 1.0),
        lambda p, r: sdpo_loss(p, r, 1.0),
        lambda p, r: dpo_loss(p[:, :2], r[:, :2], 1.0),
    ):
        policy = torch.tensor([[gap, 0.0, 0.0, 0.0]], requires_grad=True)
        losses, rewards = loss(policy, torch.zeros(1, 4))
        (gradient,) = torch.autograd.grad(losses.sum(), policy)
        assert losses.isfinite().all() and gradient.isfinite().all() and rewards.isfinite().all()
        assert losses.item() == pytest.approx(500, rel=0.05) if gap < 0 else 0 <= losses.item() < 1e-6
        assert gradient[0, 0].item() == pytest.approx(-1.0 if gap < 0 else 0.0, abs=1e-4)  # 500 is known to 3e-5
        assert gradient.sum().item() == pytest.approx(0, abs=1e-4)


def test_gradient_of_recpo_equals_finite_differences():
    """The loss is differentiable in the policy alone: reference and rewards carry no gradient."""
    policy, reference = POLICY.clone().requires_grad_(), REFERENCE.clone().requires_grad_()
    margins = 2.0 * target_margins(CHOSEN_SCORES, REJECTED_SCORES, "log_diff")
    assert torch.autograd.gradcheck(lambda p: recpo_loss(p, REFERENCE, margins, 0.5)[0], policy)
    assert torch.autograd.gradcheck(lambda p: dpo_loss(p[:, :2], REFERENCE[:, :2], 0.5, 0.1)[0], policy)
    assert not recpo_loss(policy, reference, margins, 0.5)[1].requires_grad
    assert not dpo_loss(policy[:, :2], reference[:, :2], 0.5)[1].requires_grad


def test_rewards_are_beta_times_log_ratios():
    """Rewards are what DPO calls implicit ones: beta (log policy - log reference), chosen first."""
    for _, rewards in (
        sdpo_loss(POLICY, REFERENCE, 0.5),
        recpo_loss(POLICY, REFERENCE, torch.ones(2, 3), 0.5),
    ):
        assert rewards.tolist() == [[-0.5, -0.875, 0.5, -0.25], [0.25, 0.625, 0.25, -1.0]]
    assert dpo_loss(POLICY[:, :2], REFERENCE[:, :2], 0.5)[1].tolist() == [[-0.5, -0.875], [0.25, 0.625]]


def test_label_smoothing_mixes_both_directions():
    """Conservative DPO: a share of the labels is taken to be the other way round; at one half order stops to count."""
    policy, reference = POLICY[:, :2], REFERENCE[:, :2]
    straight, swapped = dpo_loss(policy, reference, 1.0)[0], dpo_loss(policy.flip(1), reference.flip(1), 1.0)[0]
    smoothed = dpo_loss(policy, reference, 1.0, label_smoothing=0.2)[0]
    assert smoothed.tolist() == pytest.approx((0.8 * straight + 0.2 * swapped).tolist(), abs=1e-12)
    half = dpo_loss(policy, reference, 1.0, 0.5)[0], dpo_loss(policy.flip(1), reference.flip(1), 1.0, 0.5)[0]
    assert half[0].tolist() == pytest.approx(half[1].tolist(), abs=1e-12)


def test_dpo_refuses_several_negatives():
    """DPO compares two completions; more of them are an error that names the ways out."""
    with pytest.raises(ValueError, match="got 4.*num_negatives.*sdpo"):
        dpo_loss(POLICY, REFERENCE, 1.0)


def test_target_margins_by_hand():
    """ratio, log(1 + difference), log ratio and none, per rejected item."""
    chosen, rejected = torch.tensor([4.0]), torch.tensor([[1.0, 2.0, 4.0]])
    log = math.log
    assert target_margins(chosen, rejected)[0].tolist() == [4, 2, 1]  # ratio is the default
    assert target_margins(chosen, rejected, "ratio")[0].tolist() == [4, 2, 1]
    assert target_margins(chosen, rejected, "log_diff")[0].tolist() == pytest.approx([log(4), log(3), 0])
    assert target_margins(chosen, rejected, "log_ratio")[0].tolist() == pytest.approx([log(4), log(2), 0])
    assert target_margins(chosen, rejected, "none")[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", MARGINS)
def test_margins_stay_finite_where_a_rejected_item_scores_higher(kind):
    """The first liked item may score below a rejected one; no margin becomes NaN or infinite for that."""
    margins = target_margins(torch.tensor([0.5, 5.0]), torch.tensor([[1.5, 5.0, 0.5], [5.0, 0.3, 0.5]]), kind)
    assert margins.shape == (2, 3) and margins.isfinite().all()


def test_unknown_margin_is_refused_by_name():
    """The message holds the word given and the words known."""
    with pytest.raises(ValueError, match="'logratio'.*ratio, log_diff, log_ratio, none"):
        target_margins(CHOSEN_SCORES, REJECTED_SCORES, "logratio")


def test_preference_score_by_hand():
    """rating / (1 + steps)^decay: the next item keeps its rating; 3 stars ten steps on are 3 / sqrt(11) = 0.9045."""
    assert preference_score(5, 0) == 5
    assert preference_score(3, 10) == pytest.approx(3 / math.sqrt(11))
    assert round(preference_score(3, 10), 4) == 0.9045
    assert preference_score(4.0, 3, decay=1.0) == 1
    assert preference_score(4.0, 7, decay=0.0) == 4
    ratings, steps = torch.tensor([5.0, 4.0]), torch.tensor([0, 3])
    assert preference_score(ratings, steps).tolist() == [5, 2]


def test_sft_loss_adds_up_over_micro_batches():
    """Sums over the global token count: parts of a batch add up to the whole mean, however it is cut."""
    token_logps = -torch.rand(10, dtype=torch.float64)
    whole = sft_loss(token_logps, 10)
    assert whole.item() == pytest.approx(-token_logps.mean().item(), abs=1e-12)
    parts = sft_loss(token_logps[:3], 10) + sft_loss(token_logps[3:], 10)
    assert parts.item() == pytest.approx(whole.item(), abs=1e-12)
