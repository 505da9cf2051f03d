"""What a micro-batch adds to a step: which titles, margins and numbers it is made of.

Expected numbers are written out here with math.log and math.exp, apart from losses.py.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import tiny_model

from data import Encoded, Examples
from losses import LOSSES, preference_score
from train import Objective, Schedule, TrainConfig, get_lr, reduce_metrics, train_step

# Two examples of five candidates. Ratings and steps until the interaction, by slot:
RATINGS = np.array([[3.0, 5.0, 2.5, 4.0, 3.0], [4.0, 3.0, 3.0, 5.0, 1.0]])
STEPS = np.array([[10, 0, 3, 1, 10], [0, 10, 10, 2, 4]])
ORDER = np.array([[0, 2, 3, 4], [3, 1, 4, 2]])  # in which negatives are taken
PHI = [[r / math.sqrt(1 + s) for r, s in zip(*rows)] for rows in zip(RATINGS, STEPS)]
POLICY = np.array([[-9.0, -4.0, -6.0, -7.5, -5.0], [-3.0, -2.5, -8.0, -6.0, -4.5]])  # by slot
REFERENCE = np.array([[-8.0, -5.0, -6.5, -7.0, -6.0], [-4.0, -3.0, -7.0, -5.0, -5.5]])
LENGTHS = np.array([[3, 2, 4, 5, 2], [1, 2, 3, 4, 5]])
DELTA = POLICY - REFERENCE
CHOSEN, THREE = (1, 0), ((0, 2, 3), (3, 1, 4))
ONES = np.ones_like(LENGTHS)
ITEMS = np.arange(10).reshape(2, 5)  # every slot its own

EXAMPLES = Examples(
    interactions=None,
    split="train",
    history=0,
    position=np.arange(2),
    candidates=ITEMS,
    target=np.array(CHOSEN),
    scores=preference_score(RATINGS, STEPS, 0.5).astype(np.float32),
    is_random=np.array([[True, False, False, False, True], [False, True, True, False, False]]),
    negative_order=ORDER,
    template=np.zeros(2, int),
)
# a title is its item's own token, as often as it is long
TITLES = {int(i): [int(i)] * n for i, n in zip(ITEMS.flat, LENGTHS.flat)}
ENCODED = Encoded(EXAMPLES, [np.array([20, 21]), np.array([22])], TITLES)


class Model:
    """Gives each title its log-prob of POLICY, in equal parts to its tokens."""

    def __init__(self):
        self.policy = torch.tensor(POLICY.flatten(), requires_grad=True)

    def __call__(self, tree):
        lengths = torch.tensor(LENGTHS.flatten())
        return (self.policy / lengths)[tree.labels], tree.labels


def objective(loss, **options):
    """An objective whose reference log-probs and KTO baseline are those above."""
    made = Objective(TrainConfig(stages=loss, **options), loss, Model(), ENCODED, "cpu")
    if made.has_reference:
        made.reference_logps = torch.tensor(np.take_along_axis(REFERENCE, made.slots, 1))
    made.kl = torch.tensor(0.25)
    return made


def of_example(e, loss, **options):
    """Loss and metrics of one example, and its rejected slots."""
    made = objective(loss, **options)
    total, sums = made(made.prepare([e], [0, 1]))  # one half of the batch's mean
    metrics = {name: (s / n).item() for name, (s, n) in sums.items()}
    assert metrics["preference_loss"] == pytest.approx(2 * total.item(), rel=1e-6)
    return 2 * total.item(), metrics, made.slots[e, 1 : 1 + made.K].tolist()


# ------------------------------------------------------------------------ losses by hand
def listwise(e, rejected, margins, beta=1.0):
    """-log σ(-log Σ exp(β (Δ_l - Δ_w) + margin)) of example e, as published."""
    gaps = [DELTA[e][n] - DELTA[e][CHOSEN[e]] for n in rejected]
    return -math.log(1 / (1 + sum(math.exp(beta * g + m) for g, m in zip(gaps, margins))))


def ratios(e, rejected, weight=2.0):
    return [weight * PHI[e][CHOSEN[e]] / PHI[e][n] for n in rejected]


def recpo(K=3, beta=1.0, kind=lambda w, n: w / n, weight=2.0, rejected=ORDER):
    """(e) -> loss, target margins, rejected slots of RecPO."""

    def of(e):
        slots = [int(n) for n in rejected[e][:K]]
        margins = [weight * kind(PHI[e][CHOSEN[e]], PHI[e][n]) for n in slots]
        return listwise(e, slots, margins, beta), margins, slots

    return of


def pair(loss, margin=0.0):
    """(e) -> the same of a loss (e, chosen slot, rejected slot) against the first other title."""

    def of(e):
        n = int(ORDER[e][0])
        demanded = margin(e, n) if callable(margin) else margin
        return loss(e, CHOSEN[e], n), [demanded], [n]

    return of


def softplus(x):
    return math.log(1 + math.exp(x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def gap(e, w, n, of=DELTA, by=ONES):
    return of[e][w] / by[e][w] - of[e][n] / by[e][n]


def log_gap(e, n):
    return math.log(max(PHI[e][CHOSEN[e]] - PHI[e][n], 1e-3))


def kto(e, w, n):
    return (sigmoid(-0.5 * (DELTA[e][w] - 0.25)) + sigmoid(-0.5 * (0.25 - DELTA[e][n]))) / 2


CASES = {
    "recpo": ("recpo", {}, recpo()),
    "recpo, λ 0": ("recpo", {"margin_lambda": 0.0}, recpo(weight=0.0)),
    "recpo, λ 0.5": ("recpo", {"margin_lambda": 0.5}, recpo(weight=0.5)),
    "recpo, β 0.1": ("recpo", {"beta": 0.1}, recpo(beta=0.1)),
    "recpo, K 1": ("recpo", {"num_negatives": 1}, recpo(K=1)),
    "recpo, K 4": ("recpo", {"num_negatives": 4}, recpo(K=4)),
    "log_ratio": ("recpo", {"margin": "log_ratio"}, recpo(kind=lambda w, n: math.log(w / n))),
    "log_diff": (
        "recpo",
        {"margin": "log_diff"},
        recpo(kind=lambda w, n: math.log(max(1 + w - n, 1e-3))),
    ),
    "no margin": ("recpo", {"margin": "none"}, recpo(kind=lambda w, n: 0.0)),
    "random": (
        "recpo",
        {"negative_source": "random", "num_negatives": 2},
        recpo(K=2, rejected=[[0, 4], [1, 2]]),
    ),
    "follow": (
        "recpo",
        {"negative_source": "follow", "num_negatives": 2},
        recpo(K=2, rejected=[[2, 3], [3, 4]]),
    ),
    "sdpo": ("sdpo", {}, recpo(weight=0.0)),
    "dpo": ("dpo", {"beta": 0.5}, pair(lambda e, w, n: softplus(-0.5 * gap(e, w, n)))),
    "odpo": (
        "odpo",
        {"beta": 0.5},
        pair(lambda e, w, n: softplus(log_gap(e, n) - 0.5 * gap(e, w, n)), log_gap),
    ),
    "ipo": (
        "ipo",
        {"beta": 0.2},
        pair(lambda e, w, n: (gap(e, w, n, by=LENGTHS) - 2.5) ** 2),
    ),
    "cpo": (
        "cpo",
        {"beta": 0.5, "sft_weight": 0.0},
        pair(lambda e, w, n: softplus(-0.5 * gap(e, w, n, of=POLICY))),
    ),
    "simpo": (
        "simpo",
        {"beta": 2.0, "simpo_gamma": 0.7},
        pair(lambda e, w, n: softplus(0.7 - 2.0 * gap(e, w, n, of=POLICY, by=LENGTHS)), 0.7),
    ),
    "kto": ("kto", {"beta": 0.5}, pair(kto)),
}


@pytest.mark.parametrize("e", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_losses_of_an_example_by_hand(case, e):
    """Its rejected titles, their target margins, and the loss, with each option that is read."""
    loss, options, by_hand = CASES[case]
    expected, margins, slots = by_hand(e)
    found, metrics, rejected = of_example(e, loss, **options)
    assert rejected == slots
    assert metrics["margins/target"] == pytest.approx(np.mean(margins), rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-5)


def test_every_loss_is_tested_by_hand():
    assert {loss for loss, *_ in CASES.values()} == set(LOSSES)


@pytest.mark.parametrize("e", [0, 1])
def test_metrics_by_hand(e):
    """TRL's names, on the log-ratios above, at λ = 0.5, where one margin of example 1 is met."""
    loss, metrics, _ = of_example(e, "recpo", margin_lambda=0.5, beta=2.0)
    w, three = CHOSEN[e], THREE[e]
    gaps = [2 * gap(e, w, n) for n in three]
    margins = ratios(e, three, 0.5)
    expected = {
        "preference_loss": loss,
        "loss": loss,
        "rewards/chosen": 2 * DELTA[e][w],
        "rewards/rejected": np.mean([2 * DELTA[e][n] for n in three]),
        "rewards/margins": np.mean(gaps),
        "rewards/accuracies": float(all(g > 0 for g in gaps)),
        "rewards/pair_accuracies": np.mean([g > 0 for g in gaps]),
        "margins/target": np.mean(margins),
        "margins/satisfied": np.mean([g > m for g, m in zip(gaps, margins)]),
        "logps/chosen": POLICY[e][w],
        "logps/rejected": np.mean([POLICY[e][n] for n in three]),
        "nll_loss": -POLICY[e][w] / LENGTHS[e][w],
    }
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_simpos_margin_is_gamma():
    """Its rewards are per token, and a gap of them is enough only above γ; logps stay sums."""
    for gamma, satisfied in ((0.1, 1.0), (2.0, 0.0)):
        _, metrics, _ = of_example(0, "simpo", simpo_gamma=gamma, beta=1.0)
        assert metrics["rewards/margins"] == pytest.approx(-4 / 2 + 9 / 3)
        assert metrics["margins/satisfied"] == satisfied and metrics["logps/chosen"] == -4.0


# ------------------------------------------------------------------------ micro-batches
def total(made, division):
    """Loss and metrics of a step of both examples that is divided so."""
    parts = [made(made.prepare(batch, [0, 1])) for batch in division]
    metrics = {name: sum(s[name][0] for _, s in parts).item() / sum(s[name][1] for _, s in parts)
               for name in parts[0][1]}  # fmt: skip
    return sum(loss for loss, _ in parts), metrics


@pytest.mark.parametrize("loss", ["sft", *LOSSES])
def test_a_batch_may_be_divided_anyhow(loss):
    """Micro-batches add up to the whole batch, gradients too; an empty one, which only evens out
    ranks, adds nothing. Each example meets its own reference, φ and lengths."""
    results = []
    for division in ([[0, 1]], [[1, 0]], [[0], [1]], [[0], [], [1]]):
        made = objective(loss, sft_weight=0.3) if loss != "sft" else objective(loss)
        value, metrics = total(made, division)
        value.backward()
        results.append((value.item(), metrics, made.model.policy.grad))
    for value, metrics, gradient in results[1:]:
        assert value == pytest.approx(results[0][0]) and metrics == pytest.approx(results[0][1])
        torch.testing.assert_close(gradient, results[0][2])
    assert results[0][1]["loss"] == pytest.approx(results[0][0])  # what is logged is minimised
    empty = objective(loss)
    value, sums = empty(empty.prepare([], [0, 1]))
    assert value.item() == 0 and all(s.item() == 0 and n == 0 for s, n in sums.values())
    assert not any(rewards.any() for rewards in empty.first_rewards or [])


@pytest.mark.parametrize(
    ("loss", "option", "weight"),
    [("recpo", -1.0, 0.0), ("recpo", 0.5, 0.5), ("cpo", -1.0, 1.0), ("cpo", 0.0, 0.0)],
)
def test_sft_weight_adds_the_chosen_titles_nll(loss, option, weight):
    """A mean over target tokens: 7 nats in 3 tokens. -1 is the loss's own weight."""
    value, metrics = total(objective(loss, sft_weight=option), [[0, 1]])
    assert value.item() == pytest.approx(metrics["preference_loss"] + weight * 7 / 3, rel=1e-6)
    assert metrics["nll_loss"] == pytest.approx(7 / 3)


@pytest.mark.parametrize("loss", LOSSES)
def test_who_has_a_reference(loss):
    """The others keep zeros, have no first rewards to check."""
    made = Objective(TrainConfig(stages=loss), loss, Model(), ENCODED, "cpu")
    assert made.has_reference == (loss not in ("cpo", "simpo")) and not made.reference_logps.any()
    assert (made.first_rewards == []) == made.has_reference
    made.load_state({})
    assert made.first_rewards is None


def test_first_rewards_are_kept():
    made = objective("recpo")
    made(made.prepare([1, 0], [0, 1]))
    expected = np.take_along_axis(DELTA, made.slots, 1)[::-1]
    assert made.first_rewards[0].tolist() == pytest.approx(expected)


def test_the_first_loss_is_that_of_margins_alone():
    """RecPO's and KTO's; KTO's baseline may live on a GPU, it is computed beside it."""
    expected = [math.log(1 + sum(map(math.exp, ratios(e, THREE[e])))) for e in range(2)]
    assert objective("recpo").at_the_start()[0].mean().item() == pytest.approx(
        np.mean(expected), rel=1e-5
    )
    kto = objective("kto")
    kto.kl = torch.zeros((), device="meta")
    assert kto.at_the_start()[0].mean().item() == pytest.approx(0.5)


def test_ktos_baseline_is_the_mean_of_the_step_before():
    """Its title is the first other one, or the second where the first is rejected; a step that was
    not finite leaves 0, a checkpoint keeps it, and other losses ignore it."""
    made = objective("kto")
    assert made.slots.tolist() == [[1, 0, 2], [0, 3, 1]]
    assert objective("kto", negative_source="random").slots.tolist() == [[1, 0, 2], [0, 1, 3]]
    _, metrics = total(made, [[0, 1]])
    assert metrics["kl"] == pytest.approx((DELTA[0][2] + DELTA[1][1]) / 2)
    made.after_step({"kl": torch.tensor(0.3, dtype=torch.double)})
    resumed = objective("kto")
    resumed.load_state(made.state())
    assert made.kl.item() == resumed.kl.item() == pytest.approx(0.3)
    made.after_step({"kl": torch.tensor(torch.nan)})
    assert made.kl.item() == 0
    other = objective("recpo")
    other.after_step({})
    assert other.state() == {}


# ------------------------------------------------------------------------ SFT
def test_sft_is_a_mean_over_the_chosen_titles_tokens():
    """Of the global batch, whatever this micro-batch holds; every token is the greedy one here."""
    made = objective("sft")
    value, sums = made(made.prepare([0], [0, 1, 1]))
    assert value.item() == pytest.approx(4 / (2 + 1 + 1))
    assert sums["loss"][0].item() == pytest.approx(1.0) and sums["loss"][1] == 2 / 4
    assert sums["nll_loss"][0].item() == pytest.approx(4) and sums["nll_loss"][1] == 2
    assert sums["mean_token_accuracy"][0].item() == 2


def test_histories_count_by_their_weight_however_a_batch_is_divided():
    """SFT's loss is a mean over the tokens of answers and, W times each, of histories; the answer's
    own NLL is logged apart. A preference stage has none of it."""
    prompts = [np.array([5, 6, 7, 8, 9]), np.array([10, 11, 12])]
    titles, histories = {0: [20, 2], 1: [21, 22, 2]}, np.array([[1, 4], [1, 2]])
    examples = SimpleNamespace(target=np.array([1, 0]), candidates=np.array([[0, 1], [0, 1]]))
    examples.scores, examples.negatives = np.ones((2, 2)), lambda K, _: np.empty((2, 0), int)
    encoded, model = Encoded(examples, prompts, titles, histories=histories), tiny_model()
    answer_nll, history_nll = 0.0, 0.0
    for prompt, item, (first, end) in zip(prompts, (1, 0), histories, strict=True):
        ids = torch.tensor([[*prompt.tolist(), *titles[item]]])
        logps = model.logits(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        answer_nll -= logps[len(prompt) - 1 :].sum().item()
        history_nll -= logps[first - 1 : end - 1].sum().item()

    options = TrainConfig(history_weight=0.5, stages="sft,recpo")
    made = Objective(options, "sft", model, encoded, "cpu")
    expected = (answer_nll + 0.5 * history_nll) / (5 + 0.5 * 4)
    for division in ([[0, 1]], [[0], [1]], [[0, 1], []]):
        value, metrics = total(made, division)
        assert value.item() == pytest.approx(expected, rel=1e-5)
        for name, wanted in (
            ("loss", expected),
            ("nll_loss", answer_nll / 5),
            ("history_nll", history_nll / 4),
        ):
            assert metrics[name] == pytest.approx(wanted, rel=1e-5), name
    assert objective("recpo", history_weight=0.5).history_weight == 0


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


def test_a_part_of_an_epoch_is_not_rounded_up_by_a_float():
    """1.1 * 100 is 110.00000000000001."""
    schedule = Schedule(TrainConfig(batch_size=1), 1.1, np.ones((100, 2), int), world_size=1)
    assert schedule.num_steps == 110
