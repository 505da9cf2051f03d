"""What a micro-batch adds to a step, and the step itself: every loss is given its own numbers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_model

from data import Encoded, Examples
from losses import LOSSES, LossInputs, preference_score
from train import Objective, Schedule, TrainConfig, get_lr, train_step

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


def total(made, division, step=(0, 1)):
    """Loss and metrics of a step of these examples that is divided so."""
    parts = [made(made.prepare(batch, [*step])) for batch in division]
    names = parts[0][1]
    metrics = {n: sum(s[n][0] for _, s in parts) / sum(s[n][1] for _, s in parts) for n in names}
    return sum(loss for loss, _ in parts), {n: float(value) for n, value in metrics.items()}


FIRST, ALL_FOUR = ((0,), (3,)), ((0, 2, 3, 4), (3, 1, 4, 2))
CASES = [  # loss, options, rejected slots of each example
    ("recpo", {}, THREE),
    ("recpo", {"margin_lambda": 0.5, "beta": 0.1}, THREE),
    ("recpo", {"num_negatives": 1}, FIRST),
    ("recpo", {"num_negatives": 4, "margin": "log_diff"}, ALL_FOUR),
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
    by_hand = LOSSES[loss](LossInputs(*numbers, torch.tensor(KL)), SimpleNamespace(**given))
    made = objective(loss, **options)
    found, metrics = total(made, [[e]], [e])
    assert made.slots[e, 1 : 1 + made.K].tolist() == list(rejected[e])
    assert found.item() == pytest.approx(by_hand[0].item(), rel=1e-5)
    assert metrics["preference_loss"] == pytest.approx(found.item(), rel=1e-5)
    assert metrics["margins/target"] == pytest.approx(by_hand[2].mean().item(), rel=1e-5)
    assert {name for name, *_ in CASES} == set(LOSSES)


@pytest.mark.parametrize("e", [0, 1])
def test_metrics_by_hand(e):
    """TRL's names, on the log-ratios above, at λ = 0.5, where one margin of example 1 is met."""
    loss, metrics = total(objective("recpo", margin_lambda=0.5, beta=2.0), [[e]], [e])
    w, three = CHOSEN[e], list(THREE[e])
    gaps, margins = 2 * (DELTA[e, w] - DELTA[e, three]), 0.5 * PHI[e, w] / PHI[e, three]
    expected = {
        "preference_loss": math.log(1 + np.exp(margins - gaps).sum()), "loss": loss.item(),
        "rewards/chosen": 2 * DELTA[e, w], "rewards/rejected": 2 * DELTA[e, three].mean(),
        "rewards/margins": gaps.mean(), "rewards/accuracies": float((gaps > 0).all()),
        "rewards/pair_accuracies": (gaps > 0).mean(), "margins/target": margins.mean(),
        "margins/satisfied": (gaps > margins).mean(), "logps/chosen": POLICY[e, w],
        "logps/rejected": POLICY[e, three].mean(), "nll_loss": -POLICY[e, w] / LENGTHS[e, w],
    }  # fmt: skip
    assert metrics == pytest.approx(expected, rel=1e-5)
    for gamma, satisfied in ((0.1, 1.0), (2.0, 0.0)):  # SimPO's target, of rewards per token
        _, metrics = total(objective("simpo", margin_lambda=gamma), [[0]], [0])
        assert metrics["rewards/margins"] == pytest.approx(-4 / 2 + 9 / 3)
        assert metrics["margins/satisfied"] == satisfied and metrics["logps/chosen"] == -4.0


# ------------------------------------------------------------------------ micro-batches
@pytest.mark.parametrize("loss", ["sft", *LOSSES])
def test_a_batch_may_be_divided_anyhow(loss):
    """Micro-batches add up to the whole batch, gradients too."""
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
    assert results[0][1].get("mean_token_accuracy", 1.0) == 1.0
    empty = objective(loss)
    value, sums = empty(empty.prepare([], [0, 1]))
    assert value.item() == 0 and all(s.item() == 0 and n == 0 for s, n in sums.values())
    assert not any(rewards.any() for rewards in empty.first_rewards or [])


def test_sft_weight_adds_the_chosen_titles_nll():
    """A mean over target tokens: 7 nats in 3 tokens. -1 is the loss's own weight."""
    rows = [("recpo", -1.0, 0.0), ("recpo", 0.5, 0.5), ("cpo", -1.0, 1.0), ("cpo", 0.0, 0.0)]
    for loss, option, weight in rows:
        value, metrics = total(objective(loss, sft_weight=option), [[0, 1]])
        assert value.item() == pytest.approx(metrics["preference_loss"] + weight * 7 / 3, rel=1e-6)
        assert metrics["nll_loss"] == pytest.approx(7 / 3)


def test_the_first_step_is_that_of_margins_alone():
    """Its losses, and its rewards, which are kept to be checked where there is a reference."""
    margins = [2 * PHI[e, CHOSEN[e]] / PHI[e, list(THREE[e])] for e in (0, 1)]
    expected = [math.log(1 + np.exp(m).sum()) for m in margins]
    assert objective("recpo").at_the_start()[0].tolist() == pytest.approx(expected, rel=1e-5)
    kto, made = objective("kto"), objective("recpo")
    kto.kl = torch.zeros((), device="meta")  # it may live on a GPU
    assert kto.at_the_start()[0].tolist() == pytest.approx([0.5, 0.5])
    made(made.prepare([1, 0], [0, 1]))
    expected = np.take_along_axis(DELTA, made.slots, 1)[::-1]
    assert made.first_rewards[0].tolist() == pytest.approx(expected)
    made.load_state({})
    assert made.first_rewards is None
    for loss in LOSSES:
        made, expected = objective(loss), loss not in ("cpo", "simpo")
        assert made.has_reference == (made.first_rewards == []) == expected


def test_ktos_baseline_is_the_mean_of_the_step_before():
    """Its title is the first other one, or the second where the first is rejected."""
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


def test_histories_count_by_their_weight_however_a_batch_is_divided():
    """SFT's loss is a mean over the tokens of answers and, W times each, of histories."""
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
def test_clipping_scales_what_is_above_and_only_that(group):
    """A gradient of 4 becomes max_grad_norm; one below it stays as it is, to the bit."""
    moments = []
    for limit in (1.0, 5.0, 0.0):
        weight = torch.nn.Parameter(torch.tensor([1.0]))
        optimizer = torch.optim.AdamW([weight], weight_decay=0.0, fused=True)

        def compute(batch, weight=weight):
            loss = 4 * weight.sum()
            return loss, {"loss": (loss.detach(), 1.0)}

        config, model = TrainConfig(max_grad_norm=limit), torch.nn.Linear(1, 1)
        metrics = train_step(model, optimizer, [None], compute, 0.1, config).read()
        assert metrics["grad_norm"] == 4  # as it was before clipping
        assert weight.item() == pytest.approx(0.9, rel=1e-5)  # by the rate it was given
        moments.append(optimizer.state[weight]["exp_avg"].item())
    assert moments == pytest.approx([0.1, 0.4, 0.4], rel=1e-5) and moments[1] == moments[2]


def test_warm_up_is_a_share_of_the_steps():
    """Rounded up, it reaches the peak with its last step; then a cosine falls to zero."""
    rising = {0.0: [1.0], 0.5: [0.2, 0.4, 0.6, 0.8, 1.0, 1.0], 0.15: [0.5, 1.0]}
    for ratio, expected in rising.items():
        rates = [get_lr(step, 10, 1.0, ratio) for step in range(11)]
        assert rates[: len(expected)] == pytest.approx(expected)
        rest = rates[math.ceil(10 * ratio) :]
        cosine = [(1 + math.cos(math.pi * i / (len(rest) - 1))) / 2 for i in range(len(rest))]
        assert rest == pytest.approx(cosine)


def test_epochs_cover_each_example_once_whatever_the_ranks():
    """Batches are a function of (seed, epoch, step); 1.1 * 100 is 110.00000000000001."""
    rows = [(4, 0, 2.5, 10, 8), (4, 2, 2.5, 10, 2), (10, 0, 3.0, 10, 3), (1, 0, 1.1, 100, 110)]
    for size, limit, epochs, examples, steps in rows:
        config = TrainConfig(batch_size=size, max_steps=limit)
        assert Schedule(config, epochs, np.ones((examples, 2), int), 1).num_steps == steps
    config = TrainConfig(batch_size=8, micro_batch_tokens=100)
    widths = np.random.default_rng(0).integers(5, 30, size=(37, 2))
    one, three = Schedule(config, 2, widths, 1), Schedule(config, 2, widths, 3)
    for epoch in (range(5), range(5, 10)):
        assert sorted(np.concatenate([one.examples(s) for s in epoch])) == list(range(37))
        for s in epoch:
            taken = [i for rank in range(3) for b in three.micro_batches(s, rank) for i in b]
            assert sorted(taken) == sorted(one.examples(s))
    assert list(one.examples(0)) != list(one.examples(5))
