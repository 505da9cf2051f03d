"""The losses against numbers computed elsewhere, against each other,
and where fp32 would overflow."""

import math
from collections import defaultdict
from unittest.mock import MagicMock

import pytest
import torch
from torch.nn.functional import logsigmoid, softplus

from losses import (
    MARGINS,
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    odpo_loss,
    preference_score,
    recpo_loss,
    sdpo_loss,
    sft_loss,
    simpo_loss,
    target_margins,
)

# Two examples, three negatives; columns: chosen, then the rejected.
POLICY = torch.tensor([[-12, -14.75, -9, -13], [-3.5, -4.25, -2.5, -8]], dtype=torch.float64)
REFERENCE = torch.tensor([[-11, -13, -10, -12.5], [-4, -5.5, -3, -6]], dtype=torch.float64)
CHOSEN_SCORES = torch.tensor([5, 4], dtype=torch.float64)
REJECTED_SCORES = torch.tensor([[0.9045, 2.8868, 0.7071], [0.9045, 1.5811, 2]], dtype=torch.float64)


def recpo(kind: str, margin_lambda: float, beta: float, num_negatives: int = 3) -> torch.Tensor:
    N = 1 + num_negatives
    margins = target_margins(CHOSEN_SCORES, REJECTED_SCORES[:, :num_negatives], kind)
    return recpo_loss(POLICY[:, :N], REFERENCE[:, :N], margin_lambda * margins, beta)[0]


@pytest.mark.parametrize(
    "beta, golden", [(0.1, [0.6563501408, 0.7313501408]), (1.0, [0.3868710061, 1.1368710061])]
)
def test_dpo_equals_stored_numbers(beta, golden):
    """DPO against the first rejected item alone."""
    losses, _ = dpo_loss(POLICY[:, :2], REFERENCE[:, :2], beta)
    assert losses.tolist() == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize(
    "beta, golden", [(1.0, [2.3523408786, 1.4348666480]), (0.1, [1.4351838872, 1.3498079891])]
)
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


PAIR, PAIR_REFERENCE = POLICY[:, :2], REFERENCE[:, :2]
LENGTHS = torch.tensor([[4, 5], [2, 2]], dtype=torch.float64)


@pytest.mark.parametrize(
    "name, compute, golden",
    [
        ("IPO sum", lambda: ipo_loss(PAIR, PAIR_REFERENCE, 0.1), [18.0625, 33.0625]),
        ("IPO mean", lambda: ipo_loss(PAIR / LENGTHS, PAIR_REFERENCE / LENGTHS, 0.1), [24.01, 28.890625]),  # noqa: E501
        ("ODPO", lambda: odpo_loss(PAIR, PAIR_REFERENCE, offsets("log_gap"), 1.0), [1.0765633941, 2.0219678129]),  # noqa: E501
        ("ODPO ratio", lambda: odpo_loss(PAIR, PAIR_REFERENCE, offsets("log_ratio"), 1.0), [1.2840408507, 2.3381528509]),  # noqa: E501
        ("SimPO", lambda: simpo_loss(PAIR, LENGTHS, 2.0, 1.0), [1.3873353251, 0.8259394199]),
        ("SimPO of the paper", lambda: simpo_loss(PAIR, LENGTHS, 1.0, 2.0), [2.1710974512, 1.8047446354]),  # noqa: E501
        ("CPO", lambda: cpo_loss(PAIR, 0.1), [0.5650706677, 0.6563501408]),
        ("KTO chosen", lambda: kto_loss(PAIR, PAIR_REFERENCE, torch.tensor(0.25), 0.1, 2, 0), [0.5312093734, 0.4937503255]),  # noqa: E501
        ("KTO rejected", lambda: kto_loss(PAIR, PAIR_REFERENCE, torch.tensor(0.25), 0.1, 0, 2), [0.4501660027, 0.5249791875]),  # noqa: E501
    ],
)  # fmt: skip
def test_pairwise_losses_equal_stored_numbers(name, compute, golden):
    """FACTS: computed in float64 from the published formulas;
    lengths 4, 2 (chosen) and 5, 2 (rejected)."""
    losses, rewards = compute()
    assert losses.tolist() == pytest.approx(golden, abs=1e-6) and rewards.shape == (2, 2)


def offsets(kind: str) -> torch.Tensor:
    return target_margins(CHOSEN_SCORES, REJECTED_SCORES[:, :1], kind)


def test_kto_without_a_positive_baseline_is_that_of_zero():
    """z is clamped at 0, and carries no gradient."""
    policy, kl = PAIR.clone().requires_grad_(), torch.tensor(-3.0, requires_grad=True)
    losses, _ = kto_loss(policy, PAIR_REFERENCE, kl, 0.1)
    assert torch.equal(losses, kto_loss(policy, PAIR_REFERENCE, torch.tensor(0.0), 0.1)[0])
    losses.sum().backward()
    assert kl.grad is None and policy.grad.isfinite().all()


@pytest.mark.parametrize("loss", [ipo_loss, odpo_loss, kto_loss, simpo_loss, dpo_loss])
def test_pairwise_losses_refuse_more_than_two(loss):
    arguments = {
        odpo_loss: (torch.zeros(2, 3), 1.0),
        simpo_loss: (1.0, 1.0),
        kto_loss: (torch.tensor(0.0), 1.0),
    }.get(loss, (1.0,))
    logps = (POLICY, torch.ones_like(POLICY)) if loss is simpo_loss else (POLICY, REFERENCE)
    with pytest.raises(ValueError, match="compares two completions, got 4"):
        loss(*logps, *arguments)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_recpo_without_margin_is_sdpo(beta):
    """lambda = 0, or the margin `none`, leaves S-DPO."""
    expected, expected_rewards = sdpo_loss(POLICY, REFERENCE, beta)
    for margins in (
        0.0 * REJECTED_SCORES,
        2.0 * target_margins(CHOSEN_SCORES, REJECTED_SCORES, "none"),
    ):
        losses, rewards = recpo_loss(POLICY, REFERENCE, margins, beta)
        assert torch.equal(losses, expected) and torch.equal(rewards, expected_rewards)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_recpo_with_one_negative_and_no_margin_is_dpo(beta):
    """One rejected item and lambda = 0 leave DPO, gradients included."""
    policy = POLICY[:, :2].clone().requires_grad_()
    ours = recpo_loss(policy, REFERENCE[:, :2], torch.zeros(2, 1, dtype=torch.float64), beta)[0]
    dpo = dpo_loss(policy, REFERENCE[:, :2], beta)[0]
    assert ours.tolist() == pytest.approx(dpo.tolist(), abs=1e-12)
    (grad_ours,), (grad_dpo,) = (
        torch.autograd.grad(ours.sum(), policy),
        torch.autograd.grad(dpo.sum(), policy),
    )
    torch.testing.assert_close(grad_ours, grad_dpo, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", MARGINS)
def test_loss_at_the_reference_depends_on_margins_alone(kind):
    """Where policy = reference, the loss is softplus(logsumexp(lambda m)) and every reward is 0;
    log 4 for S-DPO."""
    margins = 2.0 * target_margins(CHOSEN_SCORES, REJECTED_SCORES, kind)
    losses, rewards = recpo_loss(POLICY, POLICY, margins, beta=0.7)
    assert losses.tolist() == pytest.approx(softplus(margins.logsumexp(1)).tolist(), abs=1e-12)
    assert not rewards.any()
    if kind == "none":
        assert losses.tolist() == pytest.approx([math.log(4)] * 2, abs=1e-9)


def test_recpo_equals_the_published_form():
    """softplus(logsumexp) is -log sigmoid(-log sum exp), and the chosen item's cross-entropy,
    where those are safe."""
    margins = 2.0 * target_margins(CHOSEN_SCORES, REJECTED_SCORES, "ratio")
    losses, _ = recpo_loss(POLICY, REFERENCE, margins, beta=1.0)
    ratios = POLICY - REFERENCE
    published = -logsigmoid(-(ratios[:, 1:] - ratios[:, :1] + margins).exp().sum(1).log())
    assert losses.tolist() == pytest.approx(published.tolist(), rel=1e-9)
    logits = torch.cat([ratios[:, :1], ratios[:, 1:] + margins], dim=1)
    assert losses.tolist() == pytest.approx((-logits.log_softmax(1)[:, 0]).tolist(), rel=1e-9)


@pytest.mark.parametrize("gap", [-500.0, 500.0])
def test_loss_and_gradient_stay_finite_far_apart(gap):
    """At 500 nats in fp32, where exp() overflows, the loss is the violation itself or 0,
    its slope -1 or 0."""
    for loss in (
        lambda p, r: recpo_loss(p, r, torch.full((1, 3), 11.0), 1.0),
        lambda p, r: sdpo_loss(p, r, 1.0),
        lambda p, r: dpo_loss(p[:, :2], r[:, :2], 1.0),
        lambda p, r: odpo_loss(p[:, :2], r[:, :2], torch.full((1, 1), 2.0), 1.0),
        lambda p, r: cpo_loss(p[:, :2], 1.0),
        lambda p, r: simpo_loss(p[:, :2], torch.ones(1, 2), 1.0, 2.0),
    ):
        policy = torch.tensor([[gap, 0.0, 0.0, 0.0]], requires_grad=True)
        losses, rewards = loss(policy, torch.zeros(1, 4))
        (gradient,) = torch.autograd.grad(losses.sum(), policy)
        assert losses.isfinite().all() and gradient.isfinite().all() and rewards.isfinite().all()
        assert (
            losses.item() == pytest.approx(500, rel=0.05) if gap < 0 else 0 <= losses.item() < 1e-6
        )
        # 500 is known to 3e-5
        assert gradient[0, 0].item() == pytest.approx(-1.0 if gap < 0 else 0.0, abs=1e-4)
        assert gradient.sum().item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("gap", [-500.0, 500.0])
def test_bounded_and_quadratic_losses_stay_finite_far_apart(gap):
    """KTO saturates with slope 0; IPO's square grows."""
    for loss in (
        lambda p, r: kto_loss(p, r, torch.tensor(1.0), 1.0),
        lambda p, r: ipo_loss(p, r, 0.1),
    ):
        policy = torch.tensor([[gap, 0.0]], requires_grad=True)
        losses, _ = loss(policy, torch.zeros(1, 2))
        (gradient,) = torch.autograd.grad(losses.sum(), policy)
        assert losses.isfinite().all() and gradient.isfinite().all()


def trl_pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss of PAIR here, and by trl's trainer around a model that returns these log-probs."""
    pytest.importorskip("trl", reason="the extra `peers` has trl")
    (chosen, rejected), (ref_chosen, ref_rejected) = PAIR.T, PAIR_REFERENCE.T
    trainer = MagicMock(
        beta=0.7,
        label_smoothing=0.0,
        alpha=0.0,
        simpo_gamma=0.9,
        loss_type="sigmoid" if name == "cpo" else name,
    )
    trainer.accelerator.device = "cpu"
    trainer.accelerator.gather_for_metrics = trainer.accelerator.gather = lambda x: x
    if name in ("cpo", "simpo"):
        from trl.experimental.cpo import CPOTrainer

        of_lengths = PAIR / LENGTHS if name == "simpo" else PAIR
        theirs = CPOTrainer.cpo_loss(trainer, *of_lengths.T)[0].mean()
        return (cpo_loss(PAIR, 0.7) if name == "cpo" else simpo_loss(PAIR, LENGTHS, 0.7, 0.9))[
            0
        ].mean(), theirs
    # log-probs of a sequence stand at its first scored token; masks count its tokens;
    # chosen ones come first
    lengths = LENGTHS.T.flatten().long()
    mask = torch.cat([torch.zeros(4, 1), (torch.arange(5) < lengths[:, None]).double()], 1)
    log_probs = torch.zeros(4, 5, dtype=torch.float64)
    log_probs[:, 0] = torch.cat([chosen, rejected])
    rest = {
        "entropy": torch.zeros(4, 5),
        "mean_logits": torch.zeros(4, 5),
        "is_top1": torch.zeros(4, 5).bool(),
    }
    outputs = MagicMock(log_probs=log_probs, aux_loss=None, **rest)
    inputs = {
        "input_ids": torch.zeros(4, 6).long(),
        "attention_mask": torch.ones(4, 6),
        "completion_mask": mask,
    }
    trainer.configure_mock(
        ld_alpha=None, precompute_ref_logps=True, aux_loss_enabled=False,
        f_divergence_type="reverse_kl", use_weighting=False,
        loss_types=["sigmoid" if name == "dpo" else "ipo"], loss_weights=[1.0],
        desirable_weight=1.0, undesirable_weight=1.0,
        calculate_KL=True, _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    if name == "kto":
        from trl import KTOTrainer

        trainer._compute_kl_logps = lambda *_: torch.tensor([-9.0, -1.0], dtype=torch.float64)
        inputs |= {
            "label": torch.tensor([True, True, False, False]),
            "ref_logps": torch.cat([ref_chosen, ref_rejected]),
        }
        inputs |= {"ref_KL_logps": torch.tensor([-9.5, -1.25], dtype=torch.float64)}
        theirs = KTOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
        return kto_loss(PAIR, PAIR_REFERENCE, torch.tensor(0.375), 0.7)[0].mean(), theirs
    from trl import DPOTrainer

    inputs |= {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    if name == "ipo":
        return ipo_loss(PAIR / LENGTHS, PAIR_REFERENCE / LENGTHS, 0.7)[0].mean(), theirs
    return dpo_loss(PAIR, PAIR_REFERENCE, 0.7)[0].mean(), theirs


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "cpo", "kto"])
def test_trl_agrees_on_the_same_log_probs(name):
    """trl's own loss code, called on our log-probs, gives our losses (extra `peers`)."""
    ours, theirs = trl_pair(name)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


def test_gradient_of_recpo_equals_finite_differences():
    """The loss is differentiable in the policy alone: reference and rewards carry no gradient."""
    policy, reference = POLICY.clone().requires_grad_(), REFERENCE.clone().requires_grad_()
    margins = 2.0 * target_margins(CHOSEN_SCORES, REJECTED_SCORES, "log_diff")
    assert torch.autograd.gradcheck(lambda p: recpo_loss(p, REFERENCE, margins, 0.5)[0], policy)
    assert torch.autograd.gradcheck(
        lambda p: dpo_loss(p[:, :2], REFERENCE[:, :2], 0.5, 0.1)[0], policy
    )
    assert not recpo_loss(policy, reference, margins, 0.5)[1].requires_grad
    assert not dpo_loss(policy[:, :2], reference[:, :2], 0.5)[1].requires_grad


def test_rewards_are_beta_times_log_ratios():
    """Rewards are what DPO calls implicit ones: beta (log policy - log reference), chosen first."""
    for _, rewards in (
        sdpo_loss(POLICY, REFERENCE, 0.5),
        recpo_loss(POLICY, REFERENCE, torch.ones(2, 3), 0.5),
    ):
        assert rewards.tolist() == [[-0.5, -0.875, 0.5, -0.25], [0.25, 0.625, 0.25, -1.0]]
    assert dpo_loss(POLICY[:, :2], REFERENCE[:, :2], 0.5)[1].tolist() == [
        [-0.5, -0.875],
        [0.25, 0.625],
    ]


def test_label_smoothing_mixes_both_directions():
    """Conservative DPO: a share of the labels is taken to be the other way round;
    at one half order stops to count."""
    policy, reference = POLICY[:, :2], REFERENCE[:, :2]
    straight, swapped = (
        dpo_loss(policy, reference, 1.0)[0],
        dpo_loss(policy.flip(1), reference.flip(1), 1.0)[0],
    )
    smoothed = dpo_loss(policy, reference, 1.0, label_smoothing=0.2)[0]
    assert smoothed.tolist() == pytest.approx((0.8 * straight + 0.2 * swapped).tolist(), abs=1e-12)
    half = (
        dpo_loss(policy, reference, 1.0, 0.5)[0],
        dpo_loss(policy.flip(1), reference.flip(1), 1.0, 0.5)[0],
    )
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
    assert target_margins(chosen, rejected, "log_diff")[0].tolist() == pytest.approx(
        [log(4), log(3), 0]
    )
    assert target_margins(chosen, rejected, "log_ratio")[0].tolist() == pytest.approx(
        [log(4), log(2), 0]
    )
    assert target_margins(chosen, rejected, "none")[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", MARGINS)
def test_margins_stay_finite_where_a_rejected_item_scores_higher(kind):
    """The first liked item may score below a rejected one;
    no margin becomes NaN or infinite for that."""
    margins = target_margins(
        torch.tensor([0.5, 5.0]), torch.tensor([[1.5, 5.0, 0.5], [5.0, 0.3, 0.5]]), kind
    )
    assert margins.shape == (2, 3) and margins.isfinite().all()


def test_unknown_margin_is_refused_by_name():
    """The message holds the word given and the words known."""
    with pytest.raises(ValueError, match="'logratio'.*ratio, log_diff, log_ratio, none"):
        target_margins(CHOSEN_SCORES, REJECTED_SCORES, "logratio")


def test_preference_score_by_hand():
    """rating / (1 + steps)^decay: the next item keeps its rating;
    3 stars ten steps on are 3 / sqrt(11) = 0.9045."""
    assert preference_score(5, 0) == 5
    assert preference_score(3, 10) == pytest.approx(3 / math.sqrt(11))
    assert round(preference_score(3, 10), 4) == 0.9045
    assert preference_score(4.0, 3, decay=1.0) == 1
    assert preference_score(4.0, 7, decay=0.0) == 4
    ratings, steps = torch.tensor([5.0, 4.0]), torch.tensor([0, 3])
    assert preference_score(ratings, steps).tolist() == [5, 2]


def test_sft_loss_adds_up_over_micro_batches():
    """Sums over the global token count:
    parts of a batch add up to the whole mean, however it is cut."""
    token_logps = -torch.rand(10, dtype=torch.float64)
    whole = sft_loss(token_logps, 10)
    assert whole.item() == pytest.approx(-token_logps.mean().item(), abs=1e-12)
    parts = sft_loss(token_logps[:3], 10) + sft_loss(token_logps[3:], 10)
    assert parts.item() == pytest.approx(whole.item(), abs=1e-12)
