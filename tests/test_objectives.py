"""What a micro-batch adds to a step: which titles, margins and numbers it is made of.

The losses themselves are tested in test_losses.py; here each must be given the right numbers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import tiny_model

from data import Encoded, Examples
from losses import LOSSES, Titles, preference_score
from train import Objective, Schedule, TrainConfig, get_lr, reduce_metrics, train_step

# Two examples of five candidates. Ratings and steps until the interaction, by slot:
RATINGS = np.array([[3.0, 5.0, 2.5, 4.0, 3.0], [4.0, 3.0, 3.0, 5.0, 1.0]])
STEPS = np.array([[10, 0, 3, 1, 10], [0, 10, 10, 2, 4]])
PHI = np.array([[r / math.sqrt(1 + s) for r, s in zip(*rows)] for rows in zip(RATINGS, STEPS)])
POLICY = np.array([[-9.0, -4.0, -6.0, -7.5, -5.0], [-3.0, -2.5, -8.0, -6.0, -4.5]])  # by slot
REFERENCE = np.array([[-8.0, -5.0, -6.5, -7.0, -6.0], [-4.0, -3.0, -7.0, -5.0, -5.5]])
LENGTHS = np.array([[3, 2, 4, 5, 2], [1, 2, 3, 4, 5]])
DELTA = POLICY - REFERENCE
CHOSEN, THREE = (1, 0), ((0, 2, 3), (3, 1, 4))
ITEMS = np.arange(10).reshape(2, 5)  # every slot its own
KL = 0.25

EXAMPLES = Examples(
    interactions=None,
    split="train",
    history=0,
    position=np.arange(2),
    candidates=ITEMS,
    target=np.array(CHOSEN),
    scores=preference_score(RATINGS, STEPS, 0.5).astype(np.float32),
    is_random=np.array([[True, False, False, False, True], [False, True, True, False, False]]),
    negative_order=np.array([[0, 2, 3, 4], [3, 1, 4, 2]]),  # in which negatives are taken
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
    made.kl = torch.tensor(KL)
    return made


def of_example(e, loss, **options):
    """Loss and metrics of one example, and its rejected slots."""
    made = objective(loss, **options)
    total, sums = made(made.prepare([e], [0, 1]))  # one half of the batch's mean
    metrics = {name: (s / n).item() for name, (s, n) in sums.items()}
    assert metrics["preference_loss"] == pytest.approx(2 * total.item(), rel=1e-6)
    return 2 * total.item(), metrics, made.slots[e, 1 : 1 + made.K].tolist()


FIRST, ALL_FOUR = ((0,), (3,)), ((0, 2, 3, 4), (3, 1, 4, 2))
CASES = [  # loss, options, rejected slots of each example
    ("recpo", {}, THREE),
    ("recpo", {"margin_lambda": 0.5}, THREE),
    ("recpo", {"beta": 0.1}, THREE),
    ("recpo", {"num_negatives": 1}, FIRST),
    ("recpo", {"num_negatives": 4}, ALL_FOUR),
    ("recpo", {"margin": "log_ratio"}, THREE),
    ("recpo", {"margin": "log_diff"}, THREE),
    ("recpo", {"negative_source": "random", "num_negatives": 2}, ((0, 4), (1, 2))),
    ("recpo", {"negative_source": "follow", "num_negatives": 2}, ((2, 3), (3, 4))),
    ("sdpo", {}, THREE),
    ("dpo", {"beta": 0.5}, FIRST),
    ("odpo", {"beta": 0.5}, FIRST),
    ("ipo", {"beta": 0.2}, FIRST),
    ("cpo", {"beta": 0.5, "sft_weight": 0.0}, FIRST),
    ("simpo", {"beta": 2.0, "margin_lambda": 0.7}, FIRST),
    ("kto", {"beta": 0.5}, FIRST),
]


@pytest.mark.parametrize("e", [0, 1])
@pytest.mark.parametrize(("loss", "options", "rejected"), CASES)
def test_a_loss_is_given_the_numbers_of_its_titles(loss, options, rejected, e):
    """Log-probs, reference, φ, lengths and options of the chosen title and of the rejected ones."""
    slots = [CHOSEN[e], *rejected[e]]
    numbers = [torch.tensor(a[e, slots])[None] for a in (POLICY, REFERENCE, PHI, LENGTHS)]
    given = {"beta": 1.0, "margin": "ratio", "margin_lambda": 2.0} | options
    by_hand = LOSSES[loss](Titles(*numbers, torch.tensor(KL)), SimpleNamespace(**given))
    found, metrics, taken = of_example(e, loss, **options)
    assert taken == list(rejected[e])
    assert found == pytest.approx(by_hand[0].item(), rel=1e-5)
    assert metrics["margins/target"] == pytest.approx(by_hand[2].mean().item(), rel=1e-5)
    assert {name for name, *_ in CASES} == set(LOSSES)


@pytest.mark.parametrize("e", [0, 1])
def test_metrics_by_hand(e):
    """TRL's names, on the log-ratios above, at λ = 0.5, where one margin of example 1 is met."""
    loss, metrics, _ = of_example(e, "recpo", margin_lambda=0.5, beta=2.0)
    w, three = CHOSEN[e], list(THREE[e])
    gaps, margins = 2 * (DELTA[e, w] - DELTA[e, three]), 0.5 * PHI[e, w] / PHI[e, three]
    expected = {
        "preference_loss": math.log(1 + np.exp(margins - gaps).sum()),
        "loss": loss,
        "rewards/chosen": 2 * DELTA[e, w],
        "rewards/rejected": 2 * DELTA[e, three].mean(),
        "rewards/margins": gaps.mean(),
        "rewards/accuracies": float((gaps > 0).all()),
        "rewards/pair_accuracies": (gaps > 0).mean(),
        "margins/target": margins.mean(),
        "margins/satisfied": (gaps > margins).mean(),
        "logps/chosen": POLICY[e, w],
        "logps/rejected": POLICY[e, three].mean(),
        "nll_loss": -POLICY[e, w] / LENGTHS[e, w],
    }
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_simpos_margin_is_gamma():
    """Its rewards are per token, and a gap of them is enough only above γ; logps stay sums."""
    for gamma, satisfied in ((0.1, 1.0), (2.0, 0.0)):
        _, metrics, _ = of_example(0, "simpo", margin_lambda=gamma, beta=1.0)
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
    options, results = {} if loss == "sft" else {"sft_weight": 0.3}, []
    for division in ([[0, 1]], [[1, 0]], [[0], [1]], [[0], [], [1]]):
        made = objective(loss, **options)
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


def test_the_first_step_is_that_of_margins_alone():
    """Its losses, RecPO's and KTO's, whose baseline may live on a GPU; its rewards are kept."""
    of = [math.log(1 + sum(np.exp(2 * PHI[e, CHOSEN[e]] / PHI[e, list(THREE[e])]))) for e in (0, 1)]
    assert objective("recpo").at_the_start()[0].tolist() == pytest.approx(of, rel=1e-5)
    kto, made = objective("kto"), objective("recpo")
    kto.kl = torch.zeros((), device="meta")
    assert kto.at_the_start()[0].tolist() == pytest.approx([0.5, 0.5])
    made(made.prepare([1, 0], [0, 1]))
    expected = np.take_along_axis(DELTA, made.slots, 1)[::-1]
    assert made.first_rewards[0].tolist() == pytest.approx(expected)


def test_ktos_baseline_is_the_mean_of_the_step_before():
    """Its title is the first other one, or the second where the first is rejected; a step that was
    not finite leaves 0, a checkpoint keeps it, and other losses ignore it."""
    made = objective("kto")
    assert made.slots.tolist() == [[1, 0, 2], [0, 3, 1]]
    assert objective("kto", negative_source="random").slots.tolist() == [[1, 0, 2], [0, 1, 3]]
    _, metrics = total(made, [[0, 1]])
    assert metrics["kl"] == pytest.approx((DELTA[0, 2] + DELTA[1, 1]) / 2)
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
    expected = {"loss": (answer_nll + 0.5 * history_nll) / (5 + 0.5 * 4)}
    expected |= {"nll_loss": answer_nll / 5, "history_nll": history_nll / 4}
    for division in ([[0, 1]], [[0], [1]], [[0, 1], []]):
        value, metrics = total(made, division)
        assert value.item() == pytest.approx(expected["loss"], rel=1e-5)
        assert {n: metrics[n] for n in expected} == pytest.approx(expected, rel=1e-5)
    assert objective("recpo", history_weight=0.5).history_weight == 0


# ------------------------------------------------------------------------ the step
def one_step(gradient, **options):
    """One AdamW step of one weight from 1.0 with this gradient; (new weight, metrics, moments)."""
    config = TrainConfig(**options)
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    betas = (0.9, config.adam_beta2)
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=betas, weight_decay=0.0, fused=True)

    def compute(batch):
        loss = (weight * gradient).sum()
        return loss, {"loss": (loss.detach(), 1.0)}

    result = train_step(torch.nn.Linear(1, 1), optimizer, [None], compute, 0.1, config)
    return weight.item(), result.read(), optimizer.state[weight]


def test_clipping_scales_what_is_above_and_only_that(group):
    """A gradient of 4 becomes max_grad_norm; one below it stays as it is, to the bit. beta2 shapes
    the second moment, lr the step."""
    for limit, gradient, kept in ((1.0, 4.0, 1.0), (5.0, 4.0, 4.0), (0.0, 4.0, 4.0)):
        _, metrics, moments = one_step(gradient, max_grad_norm=limit)
        assert metrics["grad_norm"] == gradient  # as it was before clipping
        assert moments["exp_avg"].item() == pytest.approx(0.1 * kept, rel=1e-5)
    below, off = (one_step(4.0, max_grad_norm=limit)[2]["exp_avg"] for limit in (5.0, 0.0))
    assert below == off
    for beta2 in (0.95, 0.999):
        second = one_step(0.2, adam_beta2=beta2)[2]["exp_avg_sq"].item()
        assert second == pytest.approx((1 - beta2) * 0.04)
    assert one_step(0.2)[0] == pytest.approx(0.9, rel=1e-5)


@pytest.mark.parametrize("bad", [False, True])
def test_metrics_are_means_over_all_ranks_by_name(monkeypatch, bad):
    """Sums over sums of counts, not means of means; one all_reduce, the same on every rank. The
    mean tells that a loss is not finite, a flag which rank's."""
    sums = [{"loss": 2.0, "acc": 0.0}, {"loss": math.nan if bad else 7.0, "acc": 3.0}]
    counts, vectors = [{"loss": 1.0, "acc": 4.0}, {"loss": 2.0, "acc": 1.0}], []
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def call(rank, all_reduce):
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        own = {name: torch.tensor(v, dtype=torch.double) for name, v in sums[rank].items()}
        return reduce_metrics(own, counts[rank])

    for rank in (0, 1):
        call(rank, lambda vector: vectors.append(vector.clone()))
    assert len(vectors) == 2
    for rank in (0, 1):
        means, flags = call(rank, lambda vector: vector.copy_(sum(vectors)))
        assert means["acc"].item() == 0.6 and flags.tolist() == [0, int(bad)]
        assert math.isnan(means["loss"].item()) if bad else means["loss"].item() == 3.0


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.0, [1.0]), (0.5, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]), (0.15, [0.5, 1.0])]
)
def test_warm_up_is_a_share_of_the_steps(ratio, expected):
    """Of 10 steps; rounded up, it rises linearly and reaches the peak with its last step; then a
    cosine falls to zero."""
    rates = [get_lr(step, 10, 1.0, ratio) for step in range(11)]
    assert rates[: len(expected)] == pytest.approx(expected)
    rest = rates[math.ceil(10 * ratio) :]
    cosine = [(1 + math.cos(math.pi * i / (len(rest) - 1))) / 2 for i in range(len(rest))]
    assert rest == pytest.approx(cosine)


@pytest.mark.parametrize(
    ("options", "epochs", "examples", "steps"),
    [
        ({"batch_size": 4}, 1.0, 10, 3),
        ({"batch_size": 4}, 2.5, 10, 8),
        ({"batch_size": 10}, 3.0, 10, 3),
        ({"batch_size": 4, "max_steps": 2}, 2.5, 10, 2),
        ({"batch_size": 1}, 1.1, 100, 110),  # 1.1 * 100 is 110.00000000000001
    ],
)
def test_epochs_and_batch_size_give_the_steps(options, epochs, examples, steps):
    """ceil(examples / batch_size) steps an epoch, ceil(epochs * that) in all."""
    schedule = Schedule(TrainConfig(**options), epochs, np.ones((examples, 2), int), world_size=1)
    assert schedule.num_steps == steps
    taken = [len(schedule.examples(step)) for step in range(schedule.steps_per_epoch)]
    assert sum(taken) == examples and taken[0] == min(options["batch_size"], examples)
