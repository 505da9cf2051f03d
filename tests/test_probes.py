"""Probes: which users they take, what stands among the candidates, and what each figure counts."""

import numpy as np
import pytest

from data import build_examples, render_prompt
from loaders.counting import markov_top
from loaders.frozen import DataConfig
from loaders.planted import World, planted_world
from loaders.table import make_interactions
from studies.probes import (
    KINDS,
    LAST_TWO,
    ProbeConfig,
    by_length,
    choice_of_scores,
    measured,
    other_list,
    outcomes,
    probe_examples,
    probe_table,
    references,
)
from studies.statistics import spread_of_bins

CONFIG = DataConfig(dataset="csv", min_history=3)


@pytest.fixture(scope="module")
def log():
    """60 users with 4 to 19 random items each."""
    rng = np.random.default_rng(0)
    rows = [
        (u, int(i), int(rng.integers(1, 6)), t)
        for u in range(60)
        for t, i in enumerate(rng.permutation(80)[: rng.integers(4, 20)])
    ]
    return make_interactions(*zip(*rows, strict=True), {i: f"item {i}" for i in range(80)})


@pytest.mark.parametrize("probe", LAST_TWO)
def test_probes_take_all_users_that_fit(log, probe):
    """Users, targets and the other future item against a plain loop over the log; the rest is
    random and never touched; chance is 1 in 20, for avoidance 19 in 20."""
    examples, expected = probe_examples(log, CONFIG, probe), {}
    for u in range(log.num_users):
        rows = list(range(log.start[u], log.start[u + 1]))
        before, last = log.rating[rows[-2:]]
        count = 2 if probe in ("adherence", "temptation") else 1
        fits = {"adherence": before >= 4 and last >= 4, "temptation": before >= 4 and last <= 2}
        if fits.get(probe, last <= 2) and len(rows) - count >= 3:
            expected[u] = rows[-count:]
    users = log.user[examples.position].tolist()
    assert sorted(users) == sorted(expected) and len(users) > 3
    for e, u in enumerate(users):
        rows, candidates = expected[u], examples.candidates[e]
        assert examples.position[e] == rows[0]
        assert candidates[examples.target[e]] == log.item[rows[0]] and len(set(candidates)) == 20
        follows = candidates[~examples.is_random[e]]
        assert sorted(follows) == sorted(log.item[rows])
        touched = set(log.item[log.start[u] : log.start[u + 1]])
        assert not touched & (set(candidates) - set(follows))
        assert ("lowest?" in render_prompt(examples[e])) == (probe == "aversion")
    figures = references(probe, examples, CONFIG)["chance"]
    mean = np.mean(next(iter(figures.values())))
    assert mean == pytest.approx(0.95 if probe == "avoidance" else 0.05)


def test_figures_count_what_their_names_say(log):
    """Hits, the later item, and for avoidance listed answers that are another title, of the same
    lists as aversion's; ties share."""
    examples = probe_examples(log, CONFIG, "adherence")
    later = ~examples.is_random
    later[np.arange(len(later)), examples.target] = False
    found = outcomes("adherence", examples, later.astype(float))
    assert sum(found["hit_ratio@1"]) == 0 and all(found["takes the later one"])
    avoid, averse = (probe_examples(log, CONFIG, probe) for probe in ("avoidance", "aversion"))
    assert (avoid.candidates == averse.candidates).all() and (avoid.target == averse.target).all()
    assert sum(outcomes("avoidance", avoid, np.zeros((len(avoid), 20)))["avoidance"]) == 0
    ties = choice_of_scores(np.array([[1.0, 2.0, 2.0, *[0.0] * 17]]))
    assert ties[0, :3].tolist() == [0, 0.5, 0.5]


def test_the_optimum_beats_counting_in_the_planted_world():
    """Bayes-optimal is the best row of each probe that asks for a liked or disliked item."""
    config, world = DataConfig(planted_users=800), planted_world(World(num_users=800))
    for probe in ("adherence", "temptation", "aversion"):
        rows = references(probe, probe_examples(world, config, probe), config)
        best = max(rows, key=lambda name: np.mean(rows[name]["hit_ratio@1"]))
        assert best == "Bayes-optimal", (probe, rows)


@pytest.fixture(scope="module")
def split():
    """(configuration, test split) of a small planted world."""
    config = DataConfig(followers=3, min_history=4, train_size=50)
    return config, build_examples(planted_world(World(num_users=150)), config)["test"]


def test_other_lists_keep_users_histories_and_targets(split):
    """The same draw every time; retrieved ones are Markov's best that the user never touched."""
    config, test = split
    rows = np.arange(len(test))
    for kind in KINDS[1:]:
        other = other_list(test, config, kind)
        assert (other.position == test.position).all()
        targets = other.candidates[rows, other.target], test.candidates[rows, test.target]
        assert (targets[0] == targets[1]).all() and (other.candidates != test.candidates).any()
        assert (other_list(test, config, kind).candidates == other.candidates).all()
    found = np.sort(other.candidates[other.is_random].reshape(-1, 19), 1)
    assert (found == np.sort(markov_top(test.interactions, test.position, 20, 19), 1)).all()


def test_a_model_is_measured_as_written_and_as_ranked_first(split):
    """Two of three are ranked first, one of them is written, and an answer that is not valid counts
    for nothing; the table has means with intervals."""
    config, test = split[0], split[1].select(slice(3))
    records = []
    for e, (ranked, written) in enumerate(((0, 0), (0, -1), (1, 0))):  # behind the target's slot
        titles, target = test[e].candidates, int(test.target[e])
        logps = [float(slot == (target + ranked) % 20) for slot in range(20)]
        record = {"user": test[e].user, "candidates": titles, "target": titles[target]}
        record |= {"logps": logps, "answer": titles[target + written], "valid": e < 2}
        records.append(record)
    content = measured("length", test, records, references("length", test, config), "hash")
    assert content["written"] == {"hit_ratio@1": [1, 0, 0]} and content["data_hash"] == "hash"
    assert content["ranked"] == {"hit_ratio@1": [1, 1, 0]} and len(content["lengths"]) == 3
    text = probe_table(content | {"lengths": []}, {"sft": [content["written"], content["ranked"]]})
    assert "| sft (mean of 2 runs) | 0.5000 [" in text


# Lengths of 1,500 histories, as skewed as MovieLens's: 18 to some 1,500.
LENGTHS = (18 + np.random.default_rng(0).lognormal(4, 1.2, 1500)).astype(int)


def bins_of(hits) -> dict:
    return by_length(LENGTHS, [{"hit_ratio@1": hits}])


def test_bins_are_fifths_and_cover_every_user():
    """Bins add up to the mean and hold about as many users each; of two runs they are the mean."""
    hits, other = np.random.default_rng(0).integers(0, 2, (2, 1500)).astype(float)
    one, two = bins_of(hits), bins_of(other)
    assert len(one) == 5 and sum(b["n"] * b["mean"] for b in one.values()) == hits.sum()
    for name, both in by_length(LENGTHS, [{"hit_ratio@1": h} for h in (hits, other)]).items():
        low, high = map(int, name.split("-"))
        inside = (low <= LENGTHS) & (high >= LENGTHS)
        assert one[name]["n"] == inside.sum() and 250 < inside.sum() < 350
        assert one[name]["mean"] == pytest.approx(hits[inside].mean())
        for key in ("mean", "variance"):
            assert both[key] == pytest.approx((one[name][key] + two[name][key]) / 2)


@pytest.mark.parametrize("low, high", [(0.05, 0.05), (0.3, 0.3), (0.02, 0.14), (0.2, 0.6)])
def test_the_spread_of_bins_is_that_beyond_sampling(low, high):
    """HR that is equal in all bins, or rises over them: the interval of the spread begins at 0, or
    leaves it out, and covers the true spread as often as it says. A score without sampling error,
    such as chance, has its own spread."""
    rng = np.random.default_rng(2)
    edges = [int(name.split("-")[0]) for name in bins_of(np.ones(1500))]
    rates = np.linspace(low, high, 5)
    hits = rates[np.searchsorted(edges, LENGTHS, "right") - 1]
    found = [spread_of_bins(bins_of(rng.random(1500) < hits)) for _ in range(150)]
    true, (first, last) = rates.std(ddof=1), np.array([f["spread_ci95"] for f in found]).T
    assert ((first <= true) & (true <= last)).mean() > 0.9
    if low < high:
        assert (first > 0).mean() > 0.95
        assert np.mean([f["spread"] for f in found]) == pytest.approx(true, rel=0.1)
    else:
        assert (first > 0).mean() < 0.05 and np.median([f["cv"] for f in found]) < 0.12
        exact = spread_of_bins(bins_of(hits))
        assert exact["spread"] == pytest.approx(0) and exact["cv_ci95"] == pytest.approx([0, 0])


def test_options_without_effect_are_refused():
    with pytest.raises(ValueError, match="--split belongs to eval.py"):
        ProbeConfig(run="x", probe="length", split="val")
    with pytest.raises(ValueError, match="--probe needs a log"):
        ProbeConfig(run="x", probe="avoidance", dataset="prepared")
