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
    PROBES,
    ProbeConfig,
    by_length,
    choice_of_answers,
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
    figures = references(probe, examples, CONFIG)["chance"]
    mean = np.mean(next(iter(figures.values())))
    assert mean == pytest.approx(0.95 if probe == "avoidance" else 0.05)


def test_aversion_and_avoidance_share_their_sets(log):
    """The same users and candidates; only the question differs, and no split ever asks it."""
    avoid, averse = (probe_examples(log, CONFIG, probe) for probe in ("avoidance", "aversion"))
    assert (avoid.candidates == averse.candidates).all() and (avoid.target == averse.target).all()
    assert all("rate lowest?" in render_prompt(averse[e]) for e in range(len(averse)))
    assert not any("lowest" in render_prompt(avoid[e]) for e in range(len(avoid)))


def test_figures_count_what_their_names_say(log):
    """Hits, the later item, and for avoidance listed answers that are another title; ties share."""
    examples = probe_examples(log, CONFIG, "adherence")
    later = ~examples.is_random
    later[np.arange(len(later)), examples.target] = False
    found = outcomes("adherence", examples, later.astype(float))
    assert sum(found["hit_ratio@1"]) == 0 and all(found["takes the later one"])
    avoid = probe_examples(log, CONFIG, "avoidance")
    assert sum(outcomes("avoidance", avoid, np.zeros((len(avoid), 20)))["avoidance"]) == 0
    ties = choice_of_scores(np.array([[1.0, 2.0, 2.0, *[0.0] * 17]]))
    assert ties[0, :3].tolist() == [0, 0.5, 0.5]
    records = [
        {"valid": True, "answer": "b", "candidates": ["a", "b"]},
        {"valid": False, "answer": "x", "candidates": ["a", "b"]},
    ]
    assert choice_of_answers(records).tolist() == [[0, 1], [0, 0]]


def test_the_optimum_beats_counting_in_the_planted_world():
    """Bayes-optimal is the best row of each probe that asks for a liked or disliked item."""
    config, world = DataConfig(planted_users=1500), planted_world(World(num_users=1500, seed=0))
    for probe in ("adherence", "temptation", "aversion"):
        rows = references(probe, probe_examples(world, config, probe), config)
        best = max(rows, key=lambda name: np.mean(rows[name]["hit_ratio@1"]))
        assert best == "Bayes-optimal", (probe, rows)


def test_other_lists_keep_users_histories_and_targets():
    """The same draw every time; retrieved ones are Markov's best that the user never touched."""
    config = DataConfig(followers=3, min_history=4, train_size=50)
    interactions = planted_world(World(num_users=150))
    test = build_examples(interactions, config)["test"]
    rows = np.arange(len(test))
    for kind in KINDS[1:]:
        other = other_list(test, config, kind)
        assert (other.position == test.position).all()
        targets = other.candidates[rows, other.target], test.candidates[rows, test.target]
        assert (targets[0] == targets[1]).all() and (other.candidates != test.candidates).any()
        assert (other_list(test, config, kind).candidates == other.candidates).all()
    found = np.sort(other.candidates[other.is_random].reshape(-1, 19), 1)
    assert (found == np.sort(markov_top(interactions, test.position, 20, 19), 1)).all()


def test_a_model_is_measured_as_written_and_as_ranked_first():
    """Two of three are ranked first, one of them is written; the table has both with intervals."""
    config = DataConfig(planted_users=100)
    test = build_examples(planted_world(World(num_users=100)), config)["test"].select(slice(3))
    records = []
    for e in range(3):
        titles, target = test[e].candidates, int(test.target[e])
        logps = [float(slot == (target + (e == 2)) % 20) for slot in range(20)]
        answer = titles[target] if e == 0 else "none of them"
        record = {"user": test[e].user, "candidates": titles, "target": titles[target]}
        records.append(record | {"logps": logps, "answer": answer, "valid": e == 0})
    content = measured("length", test, records, references("length", test, config), "hash")
    assert content["written"] == {"hit_ratio@1": [1, 0, 0]} and content["data_hash"] == "hash"
    assert content["ranked"] == {"hit_ratio@1": [1, 1, 0]} and len(content["lengths"]) == 3
    content |= {"lengths": []}  # another probe's table
    text = probe_table(content, {"sft; written": [content["written"], content["ranked"]]})
    assert "| sft; written (mean of 2 runs) | 0.5000 [" in text


# Lengths of 1,500 histories, as skewed as MovieLens's: 18 to some 1,500.
LENGTHS = (18 + np.random.default_rng(0).lognormal(4, 1.2, 1500)).astype(int)


def bins_of(hits, lengths=LENGTHS) -> dict:
    return by_length(lengths, [{"hit_ratio@1": hits}])


def test_bins_are_fifths_and_cover_every_user():
    """Bins add up to the mean and hold about as many users each; of two runs they are the mean."""
    hits, other = np.random.default_rng(0).integers(0, 2, (2, 1500)).astype(float)
    bins = bins_of(hits)
    assert len(bins) == 5 and sum(b["n"] * b["mean"] for b in bins.values()) == hits.sum()
    both = by_length(LENGTHS, [{"hit_ratio@1": run} for run in (hits, other)])
    for name, entry in bins.items():
        low, high = map(int, name.split("-"))
        inside = (low <= LENGTHS) & (high >= LENGTHS)
        assert entry["n"] == inside.sum() and 250 < entry["n"] < 350
        assert entry["mean"] == pytest.approx(hits[inside].mean())
        for key in ("mean", "variance"):
            expected = (entry[key] + bins_of(other)[name][key]) / 2
            assert both[name][key] == pytest.approx(expected)


@pytest.mark.parametrize("hit_ratio", [0.05, 0.3])
def test_equal_recommenders_have_no_spread(hit_ratio):
    """HR equal in all bins: the interval of the spread begins at 0 in 95 % of 400 simulations or
    more; a score without sampling error, such as chance, keeps its spread of 0."""
    rng = np.random.default_rng(1)
    found = [spread_of_bins(bins_of(rng.random(1500) < hit_ratio)) for _ in range(400)]
    assert np.mean([f["spread_ci95"][0] > 0 for f in found]) < 0.05
    assert np.median([f["cv"] for f in found]) < 0.12  # bins of equal width: .46 at HR .05
    found = spread_of_bins(bins_of(np.full(1500, hit_ratio)))
    assert found["spread"] == pytest.approx(0) and found["cv_ci95"] == pytest.approx([0, 0])


@pytest.mark.parametrize("low, high", [(0.02, 0.14), (0.2, 0.6)])
def test_unequal_recommenders_are_found(low, high):
    """HR that rises over the fifths: the interval leaves 0 out and covers the true spread as often
    as it says."""
    rng = np.random.default_rng(2)
    edges = [int(name.split("-")[0]) for name in bins_of(np.ones(1500))]
    rates = np.linspace(low, high, 5)
    hits = rates[np.searchsorted(edges, LENGTHS, "right") - 1]
    found = [spread_of_bins(bins_of(rng.random(1500) < hits)) for _ in range(100)]
    true = rates.std(ddof=1)
    assert np.mean([f["spread_ci95"][0] > 0 for f in found]) > 0.95
    assert np.mean([f["spread_ci95"][0] < true < f["spread_ci95"][1] for f in found]) > 0.9
    assert np.mean([f["spread"] for f in found]) == pytest.approx(true, rel=0.1)


def test_unknown_probes_and_options_without_effect_are_refused():
    assert set(PROBES) == {*LAST_TWO, "length", *KINDS}
    for probe, options, culprit in (
        ("tempt", {}, "--probe must be one of adherence"),
        ("", {}, "--probe must be one of adherence"),
        ("length", {"split": "val"}, "belongs to eval.py"),
        ("avoidance", {"dataset": "prepared"}, "prepared examples have their candidates"),
    ):
        with pytest.raises(ValueError, match=culprit):
            ProbeConfig(run="x", probe=probe, **options)
