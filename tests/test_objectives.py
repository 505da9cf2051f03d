"""The wiring between options and losses: which titles, margins and numbers a step is made of.

Expected numbers are written out here with math.log and math.exp, apart from losses.py.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import tiny_model

from data import Encoded
from losses import preference_score
from objectives import (
    LOSSES,
    SFT,
    MicroBatch,
    Preference,
    PreferenceTable,
    Rows,
    Schedule,
    preference_metrics,
)
from train import TrainConfig, get_lr, reduce_metrics, train_step

# Two examples of five candidates. Ratings and steps until the interaction, by slot:
RATINGS = np.array([[3.0, 5.0, 2.5, 4.0, 3.0], [4.0, 3.0, 3.0, 5.0, 1.0]])
STEPS = np.array([[10, 0, 3, 1, 10], [0, 10, 10, 2, 4]])
TARGET = np.array([1, 0])
IS_RANDOM = np.array([[True, False, False, False, True], [False, True, True, False, False]])
OTHERS = np.array([[0, 2, 3, 4], [3, 1, 4, 2]])  # the order in which negatives are taken
PHI = [[r / math.sqrt(1 + s) for r, s in zip(*rows)] for rows in zip(RATINGS, STEPS)]
POLICY = np.array([[-9.0, -4.0, -6.0, -7.5, -5.0], [-3.0, -2.5, -8.0, -6.0, -4.5]])  # by slot
REFERENCE = np.array([[-8.0, -5.0, -6.5, -7.0, -6.0], [-4.0, -3.0, -7.0, -5.0, -5.5]])
LENGTHS = np.array([[3, 2, 4, 5, 2], [1, 2, 3, 4, 5]])
DELTA = POLICY - REFERENCE


class Candidates:
    """Stands in for data.Examples."""

    target, others = TARGET, OTHERS
    scores = preference_score(RATINGS, STEPS, 0.5).astype(np.float32)

    def negatives(self, K, source="both"):
        kept = [
            [s for s in row if source == "both" or random[s] == (source == "random")]
            for row, random in zip(OTHERS, IS_RANDOM)
        ]
        return np.array([row[:K] for row in kept])


def first_losses(loss, **options):
    """Losses, rewards and metrics of both examples, at the log-probs above."""
    config = TrainConfig(stages=f"sft,{loss}", **options)
    table = PreferenceTable.of(config, loss, Candidates())
    pair = table.slots[:, : 1 + table.num_negatives]

    def of(by_slot):
        return torch.tensor(np.take_along_axis(by_slot, pair, 1), dtype=torch.float32)

    reference = REFERENCE
    if not LOSSES[loss].has_reference:
        reference = np.zeros_like(REFERENCE)
    rows = Rows(of(POLICY), of(reference), table.margins, of(LENGTHS), torch.tensor(0.25))
    losses, rewards = LOSSES[loss].compute(config, rows)
    return losses.tolist(), rewards, preference_metrics(rows, losses, rewards), table


def softplus(x):
    return math.log(1 + math.exp(x))


def listwise(e, chosen, rejected, margins, beta=1.0, delta=DELTA):
    """-log σ(-log Σ exp(β (Δ_l - Δ_w) + margin)) of example e, as published."""
    terms = [
        math.exp(beta * (delta[e][n] - delta[e][chosen]) + m) for n, m in zip(rejected, margins)
    ]
    return -math.log(1 / (1 + sum(terms)))


def ratios(e, chosen, rejected, weight):
    return [weight * PHI[e][chosen] / PHI[e][n] for n in rejected]


CHOSEN, THREE = (1, 0), ((0, 2, 3), (3, 1, 4))


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_recpo_uses_lambda_times_the_ratio_of_its_own_slots(weight):
    """Chosen first, then the first three others; each against its own φ."""
    losses, *_, table = first_losses("recpo", margin_lambda=weight)
    assert table.slots.tolist() == [[1, 0, 2, 3], [0, 3, 1, 4]]
    expected = [
        listwise(e, CHOSEN[e], THREE[e], ratios(e, CHOSEN[e], THREE[e], weight)) for e in range(2)
    ]
    assert losses == pytest.approx(expected, rel=1e-5)


MARGIN_KINDS = {
    "ratio": lambda w, n: w / n,
    "log_ratio": lambda w, n: math.log(w / n),
    "log_diff": lambda w, n: math.log(max(1 + w - n, 1e-3)),
    "none": lambda w, n: 0.0,
}


@pytest.mark.parametrize("kind", MARGIN_KINDS)
def test_every_kind_of_margin_is_its_own(kind):
    """φ_w / φ_l, log(φ_w / φ_l), log(1 + φ_w - φ_l) or nothing, times λ."""
    losses, *_, table = first_losses("recpo", margin=kind)
    for e in range(2):
        own = [2 * MARGIN_KINDS[kind](PHI[e][CHOSEN[e]], PHI[e][n]) for n in THREE[e]]
        assert table.margins[e].tolist() == pytest.approx(own, rel=1e-5)
        assert losses[e] == pytest.approx(listwise(e, CHOSEN[e], THREE[e], own), rel=1e-5)


def test_margins_of_the_examples_differ_so_that_a_swap_shows():
    """No two kinds, and no two slots, have margins that a test could confuse."""
    values = [
        f(PHI[e][CHOSEN[e]], PHI[e][n])
        for f in MARGIN_KINDS.values()
        for e in range(2)
        for n in THREE[e]
    ]
    values = [v for v in values if v]
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 5e-4


def test_sdpo_has_no_margin():
    losses, *_, table = first_losses("sdpo")
    assert not table.margins.any()
    expected = [listwise(e, CHOSEN[e], THREE[e], [0, 0, 0]) for e in range(2)]
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_num_negatives_is_their_number(K):
    losses, *_, table = first_losses("recpo", num_negatives=K)
    assert table.slots.shape == (2, 1 + K)
    for e in range(2):
        rejected = OTHERS[e][:K]
        margins = ratios(e, CHOSEN[e], rejected, 2.0)
        assert losses[e] == pytest.approx(listwise(e, CHOSEN[e], rejected, margins), rel=1e-5)


@pytest.mark.parametrize(
    ("source", "rejected"), [("random", [[0, 4], [1, 2]]), ("follow", [[2, 3], [3, 4]])]
)
def test_negative_source_chooses_among_the_others(source, rejected):
    losses, *_, table = first_losses("recpo", negative_source=source, num_negatives=2)
    assert table.slots[:, 1:].tolist() == rejected
    expected = [
        listwise(e, CHOSEN[e], rejected[e], ratios(e, CHOSEN[e], rejected[e], 2.0))
        for e in range(2)
    ]
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_beta_scales_log_ratios_and_not_margins(beta):
    losses, rewards, *_ = first_losses("recpo", beta=beta)
    for e in range(2):
        margins = ratios(e, CHOSEN[e], THREE[e], 2.0)
        expected = listwise(e, CHOSEN[e], THREE[e], margins, beta)
        assert losses[e] == pytest.approx(expected, rel=1e-5)
        assert rewards[e][0].item() == pytest.approx(beta * DELTA[e][CHOSEN[e]])


GAPS = [DELTA[e][CHOSEN[e]] - DELTA[e][OTHERS[e][0]] for e in range(2)]  # (2.0, 2.0) by hand


def mean_gap(e):
    w, n = CHOSEN[e], OTHERS[e][0]
    return POLICY[e][w] / LENGTHS[e][w] - POLICY[e][n] / LENGTHS[e][n]


def phi_gap(e):
    return PHI[e][CHOSEN[e]] - PHI[e][OTHERS[e][0]]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def kto(e):
    w, n = DELTA[e][CHOSEN[e]], DELTA[e][OTHERS[e][0]]
    return (1 - sigmoid(0.5 * (w - 0.25)) + 1 - sigmoid(0.5 * (0.25 - n))) / 2


PAIRWISE_CASES = {
    "dpo": ("dpo", {"beta": 0.5}, lambda e: softplus(-0.5 * GAPS[e])),
    "ipo": ("ipo", {"beta": 0.2}, lambda e: (GAPS[e] - 2.5) ** 2),
    "simpo": ("simpo", {"beta": 2.0}, lambda e: softplus(2.0 - 2.0 * mean_gap(e))),
    "simpo, gamma": (
        "simpo",
        {"beta": 2.0, "simpo_gamma": 0.7},
        lambda e: softplus(0.7 - 2.0 * mean_gap(e)),
    ),
    "cpo": (
        "cpo",
        {"beta": 0.5},
        lambda e: softplus(-0.5 * (POLICY[e][CHOSEN[e]] - POLICY[e][OTHERS[e][0]])),
    ),
    "odpo": (
        "odpo",
        {"beta": 0.5},
        lambda e: softplus(math.log(max(phi_gap(e), 1e-3)) - 0.5 * GAPS[e]),
    ),
    "kto": ("kto", {"beta": 0.5}, kto),
}


@pytest.mark.parametrize("case", PAIRWISE_CASES)
def test_pairwise_losses_by_hand(case):
    """Every method that compares two titles, with each option of its own."""
    loss, options, expected = PAIRWISE_CASES[case]
    losses, *_, table = first_losses(loss, **options)
    assert table.num_negatives == 1 and table.slots[:, :2].tolist() == [[1, 0], [0, 3]]
    assert losses == pytest.approx([expected(0), expected(1)], rel=1e-5)


def test_every_loss_is_tested_by_hand():
    assert {case[0] for case in PAIRWISE_CASES.values()} | {"sdpo", "recpo"} == set(LOSSES)


def test_ktos_baseline_is_neither_chosen_nor_rejected():
    """A third branch: the first other title, or the second where the first is rejected."""
    *_, table = first_losses("kto")
    assert table.slots.tolist() == [[1, 0, 2], [0, 3, 1]]
    *_, table = first_losses("kto", negative_source="random")
    assert table.slots.tolist() == [[1, 0, 2], [0, 1, 3]]


def test_metrics_by_hand():
    """TRL's names, on the log-ratios above."""
    losses, rewards, metrics, table = first_losses("recpo")
    gaps = [[DELTA[e][CHOSEN[e]] - DELTA[e][n] for n in THREE[e]] for e in range(2)]
    assert metrics["preference_loss"].tolist() == losses
    assert metrics["rewards/margins"].tolist() == pytest.approx([np.mean(g) for g in gaps])
    beaten = [np.mean([g > 0 for g in row]) for row in gaps]
    assert metrics["rewards/pair_accuracies"].tolist() == pytest.approx(beaten)
    assert metrics["rewards/accuracies"].tolist() == [float(b == 1) for b in beaten]
    satisfied = [
        np.mean([g > m for g, m in zip(gaps[e], table.margins[e].tolist())]) for e in range(2)
    ]
    assert metrics["margins/satisfied"].tolist() == pytest.approx(satisfied)
    assert metrics["logps/chosen"].tolist() == [POLICY[0][1], POLICY[1][0]]


# ------------------------------------------------------------------------ on a tree
class FakeTree:
    """Token log-probs are given; sums are the table's."""

    def __init__(self, logps, num_completions):
        self.logps, self.num_completions = logps, num_completions

    def sum_logps(self, token_logps):
        return token_logps.sum() * 0 + self.logps


def objective_of(loss, **options):
    config = TrainConfig(stages=f"sft,{loss}", **options)
    encoded = SimpleNamespace(examples=Candidates(), tree=None)
    token_logps = torch.tensor([-1.0, -3.0, -0.5, -2.5], requires_grad=True)  # of chosen titles
    return Preference(config, loss, lambda tree: (token_logps, None), encoded, "cpu"), token_logps


def batch_of(objective, examples, reference=None):
    """A micro-batch of these examples as prepare makes it, its tree aside."""
    slots = objective.slots[examples]
    logps = torch.tensor(np.take_along_axis(POLICY[examples], slots, 1), dtype=torch.float32)
    reference = REFERENCE if reference is None else reference
    reference = torch.tensor(np.take_along_axis(reference[examples], slots, 1)).float()
    lengths = torch.tensor(np.take_along_axis(LENGTHS[examples], slots, 1))
    return MicroBatch(
        FakeTree(logps, slots.shape[1]),
        1.0,
        torch.arange(4),
        num_examples=4,
        num_tokens=8,
        reference_logps=reference,
        margins=objective.margins[examples],
        lengths=lengths,
    )


@pytest.mark.parametrize(("option", "weight"), [(-1.0, 0.0), (0.0, 0.0), (0.5, 0.5)])
def test_sft_weight_adds_the_chosen_titles_nll(option, weight):
    """loss = mean over the global batch's 4 examples + weight * 7 nats / its 8 tokens;
    logged whole."""
    objective, _ = objective_of("recpo", sft_weight=option)
    loss, sums = objective(batch_of(objective, [0, 1]))
    losses, *_ = first_losses("recpo")
    assert loss.item() == pytest.approx(sum(losses) / 4 + weight * 7 / 8, rel=1e-5)
    total, count = sums["loss"]
    assert total.item() == pytest.approx(loss.item()) and count == pytest.approx(2 / 4)
    total, count = sums["preference_loss"]
    assert total.item() == pytest.approx(sum(losses), rel=1e-5) and count == 2


def test_cpo_brings_its_nll_along():
    """Its own weight is 1; --sft_weight overrides it."""
    losses, *_ = first_losses("cpo")
    for option, weight in ((-1.0, 1.0), (0.0, 0.0), (2.0, 2.0)):
        objective, _ = objective_of("cpo", sft_weight=option)
        loss, _ = objective(batch_of(objective, [0, 1]))
        assert loss.item() == pytest.approx(sum(losses) / 4 + weight * 7 / 8, rel=1e-5)


def test_the_reference_is_that_of_the_same_example():
    """Rows of another example's reference log-probs give another loss: the numbers would tell."""
    objective, _ = objective_of("recpo")
    right, _ = objective(batch_of(objective, [0, 1]))
    wrong, _ = objective(batch_of(objective, [0, 1], REFERENCE[::-1]))
    losses, *_ = first_losses("recpo")
    assert right.item() == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert abs(wrong.item() - right.item()) > 0.1


@pytest.mark.parametrize(
    ("loss", "options", "has_reference"),
    [
        ("recpo", {}, True),
        ("kto", {}, True),
        ("simpo", {}, False),
        ("cpo", {}, False),
    ],
)
def test_who_has_a_reference(loss, options, has_reference):
    """The others keep the zeros that an objective begins with, and no first rewards to check."""
    objective, _ = objective_of(loss, **options)
    assert objective.has_reference == has_reference
    assert (objective.first_rewards is not None) == has_reference
    assert not objective.reference_logps.any() and objective.slots.shape[0] == 2
    if has_reference:
        return
    batch = replace(batch_of(objective, [0, 1]), reference_logps=objective.reference_logps)
    _, sums = objective(batch)
    losses, *_ = first_losses(loss, **options)
    assert sums["preference_loss"][0].item() == pytest.approx(sum(losses), rel=1e-5)
    assert math.isnan(objective.first_loss())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_micro_batch_that_evens_out_ranks_adds_nothing(loss):
    """Weight 0: no loss, no gradient, no reward, and 0 of 0 in every metric."""
    objective, token_logps = objective_of(loss, sft_weight=1.0)
    loss, sums = objective(replace(batch_of(objective, [0]), weight=0.0))
    loss.backward()
    assert loss.item() == 0 and not token_logps.grad.any()
    assert all(total.item() == 0 and count == 0 for total, count in sums.values())
    assert not any(rewards.any() for rewards in objective.first_rewards or [])


def test_prepare_takes_each_examples_own_row():
    """Reference log-probs, margins and lengths of a micro-batch are rows of its examples."""
    objective, _ = objective_of("recpo")
    ids = [[list(range(LENGTHS[e][n])) for n in range(5)] for e in range(2)]
    tree = SimpleNamespace(sequence_ids=torch.arange(4), num_completions=4, to=lambda device: None)
    objective.encoded.tree = lambda batch, slots: tree
    objective.encoded.slots = lambda e, slots: [ids[e][n] for n in slots]
    objective.reference_logps = torch.arange(8.0).view(2, 4)
    batch = objective.prepare([1, 0], [1, 0, 1])
    assert batch.reference_logps.tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert torch.equal(batch.margins, objective.margins[[1, 0]])
    assert batch.lengths.tolist() == [[1, 4, 2, 5], [2, 3, 4, 5]]
    assert batch.num_examples == 3 and batch.num_tokens == 1 + 2 + 1  # of the global batch


def test_ktos_baseline_is_the_mean_of_the_step_before():
    """after_step hands it on; a step that was not finite leaves 0, and other losses ignore it."""
    objective, _ = objective_of("kto")
    _, sums = objective(batch_of(objective, [0, 1]))
    total, count = sums["kl"]
    assert total.item() == pytest.approx(DELTA[0][2] + DELTA[1][1]) and count == 2
    objective.after_step({"kl": torch.tensor(0.3, dtype=torch.double)}.__getitem__)
    assert objective.kl.item() == pytest.approx(0.3) and objective.state()["kl"] == objective.kl
    objective.after_step({"kl": torch.tensor(torch.nan)}.__getitem__)
    assert objective.kl.item() == 0
    objective_of("recpo")[0].after_step({}.__getitem__)


def test_the_first_loss_needs_no_device_of_the_objective():
    """KTO's baseline may live on a GPU; the loss before the first step is computed beside it."""
    objective, _ = objective_of("kto")
    objective.kl = torch.zeros((), device="meta")
    assert objective.first_loss() == pytest.approx(0.5)
    objective, _ = objective_of("recpo")
    expected = [
        math.log(1 + sum(math.exp(m) for m in ratios(e, CHOSEN[e], THREE[e], 2.0)))
        for e in range(2)
    ]
    assert objective.first_loss() == pytest.approx(np.mean(expected), rel=1e-5)


# ------------------------------------------------------------------------ the step
@pytest.fixture(scope="module")
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def one_step(gradient, **options):
    """One AdamW step of one weight from 1.0 with this gradient; (new weight, metrics, moments)."""
    config = TrainConfig(**options)
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.AdamW(
        [weight],
        lr=0.1,
        betas=(0.9, config.adam_beta2),
        weight_decay=0.0,
        fused=True,
    )

    def compute(batch):
        loss = (weight * gradient).sum()
        return loss, {"loss": (loss.detach(), 1.0)}

    result = train_step(torch.nn.Linear(1, 1), optimizer, [None], compute, 0.1, config)
    return weight.item(), result.read(), optimizer.state[weight]


def reduced(rank_sums, rank_counts, monkeypatch):
    """What each rank gets of reduce_metrics, their vectors added here as all_reduce does it."""
    ranks, vectors = range(len(rank_sums)), []
    monkeypatch.setattr(dist, "get_world_size", lambda: len(ranks))

    def call(rank, all_reduce):
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        sums = {name: torch.tensor(v, dtype=torch.double) for name, v in rank_sums[rank].items()}
        return reduce_metrics(sums, rank_counts[rank])

    for rank in ranks:
        call(rank, lambda vector: vectors.append(vector.clone()))
    assert len(vectors) == len(ranks)  # one all_reduce each
    return [call(rank, lambda vector: vector.copy_(sum(vectors))) for rank in ranks]


def test_metrics_are_means_over_all_ranks_by_name(monkeypatch):
    """Sums over sums of counts, not means of means; the same on every rank."""
    sums = [{"loss": 2.0, "acc": 0.0}, {"loss": 7.0, "acc": 3.0}]
    counts = [{"loss": 1.0, "acc": 4.0}, {"loss": 2.0, "acc": 1.0}]
    for means, flags in reduced(sums, counts, monkeypatch):
        assert {name: mean.item() for name, mean in means.items()} == {"loss": 3.0, "acc": 0.6}
        assert flags.tolist() == [0, 0]


def test_a_rank_whose_loss_is_not_finite_is_flagged(monkeypatch):
    """The mean tells that there is one, its flag which."""
    sums = [{"loss": 2.0, "acc": 0.0}, {"loss": math.nan, "acc": 3.0}]
    counts = [{"loss": 1.0, "acc": 1.0}] * 2
    for means, flags in reduced(sums, counts, monkeypatch):
        assert math.isnan(means["loss"].item()) and means["acc"].item() == 1.5
        assert flags.tolist() == [0, 1]


def test_clipping_scales_what_is_above_and_only_that(alone):
    """A gradient of 4 becomes max_grad_norm; one below it stays as it is, to the bit."""
    for limit, gradient, kept in ((1.0, 4.0, 1.0), (5.0, 4.0, 4.0), (0.0, 4.0, 4.0)):
        _, metrics, moments = one_step(gradient, max_grad_norm=limit)
        assert metrics["grad_norm"] == gradient  # as it was before clipping
        assert moments["exp_avg"].item() == pytest.approx(0.1 * kept, rel=1e-5)
    assert (
        one_step(4.0, max_grad_norm=5.0)[2]["exp_avg"]
        == one_step(4.0, max_grad_norm=0.0)[2]["exp_avg"]
    )


def test_adams_beta2_reaches_it(alone):
    """beta2 shapes the second moment."""
    assert one_step(0.2, adam_beta2=0.95)[2]["exp_avg_sq"].item() == pytest.approx(0.05 * 0.04)
    assert one_step(0.2, adam_beta2=0.999)[2]["exp_avg_sq"].item() == pytest.approx(0.001 * 0.04)
    assert one_step(0.2)[0] == pytest.approx(0.9, rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.0, [1.0]), (0.5, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]), (0.15, [0.5, 1.0])]
)
def test_warm_up_is_a_share_of_the_steps(ratio, expected):
    """Of 10 steps; rounded up, it rises linearly and reaches the peak with its last step."""
    rates = [get_lr(step, 10, 1.0, ratio) for step in range(len(expected))]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "epochs", "steps"),
    [
        ({"batch_size": 4}, 1.0, 3),
        ({"batch_size": 4}, 2.5, 8),
        ({"batch_size": 10}, 3.0, 3),
        ({"batch_size": 4, "max_steps": 2}, 2.5, 2),
    ],
)
def test_epochs_and_batch_size_give_the_steps(options, epochs, steps):
    """10 examples: ceil(10 / batch_size) steps an epoch, ceil(epochs * that) in all."""
    schedule = Schedule(TrainConfig(**options), epochs, np.ones((10, 2), int), world_size=1)
    assert schedule.num_steps == steps
    size = options["batch_size"]
    taken = [len(schedule.examples(step)) for step in range(schedule.steps_per_epoch)]
    assert sum(taken) == 10 and taken[0] == min(size, 10)


def test_sft_logs_the_loss_that_it_minimises(alone):
    """The chosen titles' NLL over the global batch's tokens, whatever this micro-batch holds."""
    config = TrainConfig()
    encoded = SimpleNamespace(examples=Candidates())
    token_logps = torch.tensor([-1.0, -3.0, -0.5, -2.5])
    model = lambda tree: (token_logps, torch.tensor([1, 2, 3, 4]))  # noqa: E731
    objective = SFT(config, model, encoded, "cpu")
    tree = SimpleNamespace(labels=torch.tensor([1, 2, 0, 0]))
    batch = replace(batch_of(objective_of("recpo")[0], [0, 1]), tree=tree)
    loss, sums = objective(batch)
    assert loss.item() == pytest.approx(7 / 8)
    assert sums["loss"][0].item() == pytest.approx(7 / 8) and sums["loss"][1] == 4 / 8
    assert sums["nll_loss"][0].item() == 7 and sums["nll_loss"][1] == 4
    assert sums["mean_token_accuracy"][0].item() == 2


def test_histories_count_by_their_weight_however_a_batch_is_divided():
    """SFT's loss is a mean over the tokens of answers and, W times each, of histories; the answer's
    own NLL is logged apart. A preference stage has none of it."""
    prompts = [np.array([5, 6, 7, 8, 9]), np.array([10, 11, 12])]
    titles, histories = {0: [20, 2], 1: [21, 22, 2]}, np.array([[1, 4], [1, 2]])
    examples = SimpleNamespace(target=np.array([1, 0]), candidates=np.array([[0, 1], [0, 1]]))
    encoded, model = Encoded(examples, prompts, titles, histories=histories), tiny_model()
    answer_nll, history_nll = 0.0, 0.0
    for prompt, item, (first, end) in zip(prompts, (1, 0), histories, strict=True):
        ids = torch.tensor([[*prompt.tolist(), *titles[item]]])
        logps = model.logits(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        answer_nll -= logps[len(prompt) - 1 :].sum().item()
        history_nll -= logps[first - 1 : end - 1].sum().item()

    options = {"history_weight": 0.5, "stages": "sft,recpo"}
    objective = SFT(TrainConfig(**options), model, encoded, "cpu")
    expected = (answer_nll + 0.5 * history_nll) / (5 + 0.5 * 4)
    for division in ([[0, 1]], [[0], [1]], [[0, 1], []]):
        parts = [objective(objective.prepare(batch, [0, 1])) for batch in division]
        assert sum(loss.item() for loss, _ in parts) == pytest.approx(expected, rel=1e-5)
        for name, wanted in (
            ("loss", expected),
            ("nll_loss", answer_nll / 5),
            ("history_nll", history_nll / 4),
        ):
            total = sum(sums[name][0].item() for _, sums in parts)
            count = sum(sums[name][1] for _, sums in parts)
            assert total / count == pytest.approx(wanted, rel=1e-5), name
    assert objective_of("recpo", history_weight=0.5)[0].history_weight == 0
