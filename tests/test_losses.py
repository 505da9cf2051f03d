"""The losses against stored numbers, each other and TRL, and where fp32 would overflow."""

import math
from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from losses import LOSSES, LossInputs, dpo_loss, sdpo_loss, target_margins

# Two examples, three negatives; columns: chosen, then the rejected.
POLICY = torch.tensor([[-12, -14.75, -9, -13], [-3.5, -4.25, -2.5, -8]], dtype=torch.float64)
REFERENCE = torch.tensor([[-11, -13, -10, -12.5], [-4, -5.5, -3, -6]], dtype=torch.float64)
PHI = torch.tensor([[5, 0.9045, 2.8868, 0.7071], [4, 0.9045, 1.5811, 2]], dtype=torch.float64)
LENGTHS = torch.tensor([[4, 5, 3, 6], [2, 2, 4, 1]])
KL = torch.tensor(0.25, dtype=torch.float64)
DELTA = POLICY - REFERENCE


def call(loss: str, K: int = 1, policy=POLICY, reference=REFERENCE, kl=KL, **options):
    """Losses, rewards and target margins of the loss with this name, against K negatives."""
    usual = {"beta": 1.0, "margin": "ratio", "margin_lambda": 2.0}
    columns = [values[:, : 1 + K] for values in (policy, reference, PHI, LENGTHS)]
    return LOSSES[loss](LossInputs(*columns, kl), SimpleNamespace(**usual | options))


# In float64 from the published formulas, outside this project; IPO and SimPO on means over tokens.
STORED = [
    ("dpo", {"beta": 0.1}, [0.6563501408, 0.7313501408]),
    ("dpo", {"beta": 1.0}, [0.3868710061, 1.1368710061]),
    ("sdpo", {"K": 3, "beta": 1.0}, [2.3523408786, 1.4348666480]),
    ("sdpo", {"K": 3, "beta": 0.1}, [1.4351838872, 1.3498079891]),
    ("recpo", {"K": 3}, [14.6553717917, 9.6057056596]),
    ("recpo", {"K": 3, "beta": 0.5}, [14.4164677950, 9.2367763142]),
    ("recpo", {"K": 3, "margin": "log_diff"}, [4.8757162706, 3.8905202298]),
    # ODPO's other offset, log(φ_w / φ_l)
    ("recpo", {"margin": "log_ratio", "margin_lambda": 1.0}, [1.2840408507, 2.3381528509]),
    ("odpo", {}, [1.0765633941, 2.0219678129]),
    ("ipo", {"beta": 0.1}, [24.01, 28.890625]),
    ("simpo", {"beta": 2.0, "margin_lambda": 1.0}, [1.3873353251, 0.8259394199]),
    ("simpo", {"beta": 1.0, "margin_lambda": 2.0}, [2.1710974512, 1.8047446354]),
    ("cpo", {"beta": 0.1}, [0.5650706677, 0.6563501408]),
    ("kto", {"beta": 0.1}, [(0.5312093734 + 0.4501660027) / 2, (0.4937503255 + 0.5249791875) / 2]),
]
REWARDS = {  # at beta 0.5; IPO's and SimPO's are per token
    **dict.fromkeys(("recpo", "sdpo", "dpo", "odpo", "kto"), DELTA / 2),
    "ipo": DELTA / LENGTHS / 2,
    "cpo": POLICY / 2,
    "simpo": POLICY / LENGTHS / 2,
}
DEMANDS = {  # gaps of rewards that a loss asks for
    "recpo": [2 * 5 / 0.9045, 2 * 4 / 0.9045],
    "odpo": [math.log(5 - 0.9045), math.log(4 - 0.9045)],
    "simpo": [2.0, 2.0],
}


@pytest.mark.parametrize("loss, options, stored", STORED)
def test_losses_equal_stored_numbers(loss, options, stored):
    assert call(loss, **options)[0].tolist() == pytest.approx(stored, abs=1e-6)
    assert {name for name, *_ in STORED} == set(LOSSES)


@pytest.mark.parametrize("loss", LOSSES)
def test_rewards_margins_and_gradients(loss):
    """Rewards are β times what the loss compares, and carry no gradient."""
    K = 1 if LOSSES[loss].pairwise else 3
    policy = POLICY[:, : 1 + K].clone().requires_grad_()
    _, rewards, margins = call(loss, K, policy=policy, beta=0.5)
    assert not rewards.requires_grad and margins.shape == (2, K)
    torch.testing.assert_close(rewards, REWARDS[loss][:, : 1 + K])
    assert margins[:, 0].tolist() == pytest.approx(DEMANDS.get(loss, [0, 0]))
    assert torch.autograd.gradcheck(lambda p: call(loss, K, policy=p, beta=0.5)[0], policy)


@pytest.mark.parametrize("loss", [name for name, loss in LOSSES.items() if loss.pairwise])
def test_pairwise_losses_refuse_more_than_two(loss):
    for compare in (lambda: call(loss, K=3), lambda: dpo_loss(POLICY, REFERENCE, 1.0)):
        with pytest.raises(ValueError, match="got 4.*num_negatives.*sdpo"):
            compare()


def test_ktos_baseline_is_clamped_and_has_no_gradient():
    kl = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    losses, *_ = call("kto", kl=kl)
    assert not losses.requires_grad and torch.equal(losses, call("kto", kl=0 * KL)[0])


def test_recpo_without_margin_is_sdpo_and_with_one_negative_dpo():
    expected = sdpo_loss(POLICY, REFERENCE, 0.3)
    for options in ({"margin_lambda": 0.0}, {"margin": "none"}):
        losses, rewards, _ = call("recpo", K=3, beta=0.3, **options)
        assert torch.equal(losses, expected[0]) and torch.equal(rewards, expected[1])
    pair = POLICY[:, :2], REFERENCE[:, :2]
    torch.testing.assert_close(sdpo_loss(*pair, 0.3), dpo_loss(*pair, 0.3))


def test_label_smoothing_mixes_both_directions():
    pair = POLICY[:, :2], REFERENCE[:, :2]
    straight, swapped = dpo_loss(*pair, 1.0)[0], dpo_loss(*(p.flip(1) for p in pair), 1.0)[0]
    smoothed = dpo_loss(*pair, 1.0, label_smoothing=0.2)[0]
    torch.testing.assert_close(smoothed, 0.8 * straight + 0.2 * swapped)


@pytest.mark.parametrize("gap", [-500.0, 500.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_stay_finite_far_apart(loss, gap):
    K = 1 if LOSSES[loss].pairwise else 3
    policy = torch.tensor([[gap, 0.0, 0.0, 0.0]], requires_grad=True)
    ones = torch.ones(1, 1 + K)
    titles = LossInputs(
        policy[:, : 1 + K], 0 * ones, ones * (1 + torch.arange(K, -1, -1)), ones, KL
    )
    options = SimpleNamespace(beta=1.0, margin="ratio", margin_lambda=2.0)
    losses, rewards, _ = LOSSES[loss](titles, options)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.isfinite().all() and gradient.isfinite().all() and rewards.isfinite().all()
    if loss not in ("kto", "ipo"):
        near = pytest.approx(500, rel=0.05) if gap < 0 else pytest.approx(0, abs=1e-6)
        assert losses.item() == near
        assert gradient[0, 0].item() == pytest.approx(-1.0 if gap < 0 else 0.0, abs=1e-4)
        assert gradient.sum().item() == pytest.approx(0, abs=1e-4)


# ------------------------------------------------------------------------ TRL
def trl_loss(name: str) -> torch.Tensor:
    """Mean loss of the first pairs by trl's trainer around a model that returns these log-probs."""
    pytest.importorskip("trl", reason="the extra `peers` has trl")
    (chosen, rejected), (ref_chosen, ref_rejected) = POLICY[:, :2].T, REFERENCE[:, :2].T
    trainer = MagicMock(
        beta=0.7, label_smoothing=0.0, alpha=0.0, simpo_gamma=0.9, ld_alpha=None,
        loss_type="sigmoid" if name == "cpo" else name, loss_weights=[1.0],
        loss_types=["sigmoid" if name == "dpo" else "ipo"], f_divergence_type="reverse_kl",
        precompute_ref_logps=True, aux_loss_enabled=False, use_weighting=False, calculate_KL=True,
        desirable_weight=1.0, undesirable_weight=1.0,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    trainer.accelerator.device = "cpu"
    trainer.accelerator.gather_for_metrics = trainer.accelerator.gather = lambda x: x
    if name in ("cpo", "simpo"):
        from trl.experimental.cpo import CPOTrainer

        of_lengths = POLICY / LENGTHS if name == "simpo" else POLICY
        return CPOTrainer.cpo_loss(trainer, *of_lengths[:, :2].T)[0].mean()
    # log-probs of a sequence stand at its first scored token; masks count its tokens;
    # chosen ones come first
    mask = torch.arange(5) < LENGTHS[:, :2].T.flatten()[:, None]
    log_probs = torch.zeros(4, 5, dtype=torch.float64)
    log_probs[:, 0] = torch.cat([chosen, rejected])
    rest = {name: torch.zeros(4, 5) for name in ("entropy", "mean_logits")}
    outputs = MagicMock(log_probs=log_probs, aux_loss=None, is_top1=log_probs > 1, **rest)
    inputs = {
        "input_ids": torch.zeros(4, 6).long(),
        "attention_mask": torch.ones(4, 6),
        "completion_mask": torch.cat([torch.zeros(4, 1), mask.double()], 1),
    }
    if name == "kto":
        from trl import KTOTrainer

        trainer._compute_kl_logps = lambda *_: torch.tensor([-9.0, -1.0], dtype=torch.float64)
        inputs |= {
            "label": torch.tensor([True, True, False, False]),
            "ref_logps": torch.cat([ref_chosen, ref_rejected]),
            "ref_KL_logps": torch.tensor([-9.5, -1.25], dtype=torch.float64),  # z is 0.375
        }
        return KTOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    from trl import DPOTrainer

    inputs |= {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "cpo", "kto"])
def test_trl_agrees_on_the_same_log_probs(name):
    losses, *_ = call(name, beta=0.7, margin_lambda=0.9, kl=torch.tensor(0.375))
    assert losses.mean().item() == pytest.approx(trl_loss(name).item(), abs=1e-6)


# ------------------------------------------------------------------------ φ, margins, SFT
BY_HAND = {
    "ratio": [4, 2, 1, 0.5],
    "log_diff": [math.log(4), math.log(3), 0, math.log(1e-3)],
    "log_ratio": [math.log(4), math.log(2), 0, math.log(0.5)],
    "log_gap": [math.log(3), math.log(2), math.log(1e-3), math.log(1e-3)],
    "none": [0, 0, 0, 0],
}


def test_target_margins_by_hand():
    """Finite, too, where the rejected item scores as high or higher."""
    scores = torch.tensor([4.0]), torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    for kind, expected in BY_HAND.items():
        assert target_margins(*scores, kind)[0].tolist() == pytest.approx(expected), kind
    assert torch.equal(target_margins(*scores), target_margins(*scores, "ratio"))
    with pytest.raises(ValueError, match="'logratio'.*ratio, log_diff, log_ratio, none"):
        target_margins(*scores, "logratio")
