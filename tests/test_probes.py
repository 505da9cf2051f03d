"""Probes: which users they take, what stands among the candidates, and what each figure counts."""

from types import SimpleNamespace

import numpy as np
import pytest

from data import build_examples, render_prompt
from eval import wilson
from loaders.frozen import DataConfig
from loaders.planted import World, planted_world
from loaders.table import make_interactions
from studies.probes import (
    PROBE_NAMES,
    PROBES,
    ProbeConfig,
    by_length,
    choice_of_answers,
    choice_of_scores,
    history_lengths,
    measure,
    outcomes,
    probe_examples,
    reference_choices,
)
from studies.statistics import chi2_quantile


def random_log(seed: int = 0, num_users: int = 60):
    rng = np.random.default_rng(seed)
    rows = [
        (u, int(i), int(rng.integers(1, 6)), t)
        for u in range(num_users)
        for t, i in enumerate(rng.permutation(80)[: rng.integers(4, 20)])
    ]
    return make_interactions(*zip(*rows, strict=True), {i: f"item {i}" for i in range(80)})


@pytest.mark.parametrize("probe", PROBES)
def test_probes_take_all_users_that_fit(probe):
    """Users, targets and the other future item against a plain loop over the log;
    the rest is random and never touched."""
    interactions = random_log()
    examples = probe_examples(interactions, DataConfig(min_history=3), probe)
    expected = {}
    for u in range(interactions.num_users):
        rows = list(range(interactions.start[u], interactions.start[u + 1]))
        before, last = interactions.rating[rows[-2]], interactions.rating[rows[-1]]
        count = 2 if probe in ("adherence", "temptation") else 1
        fits = {
            "adherence": before >= 4 and last >= 4,
            "temptation": before >= 4 and last <= 2,
        }.get(probe, last <= 2)
        if fits and len(rows) - count >= 3:
            expected[u] = rows[-count:]
    users = interactions.user[examples.position].tolist()
    assert sorted(users) == sorted(expected) and len(users) > 3
    for e, u in enumerate(users):
        rows = expected[u]
        assert examples.position[e] == rows[0]
        candidates = examples.candidates[e].tolist()
        assert (
            candidates[examples.target[e]] == interactions.item[rows[0]]
            and len(set(candidates)) == 20
        )
        follows = [
            c
            for c, is_random in zip(candidates, examples.is_random[e], strict=True)
            if not is_random
        ]
        assert sorted(follows) == sorted(interactions.item[rows].tolist())
        touched = set(interactions.item[interactions.start[u] : interactions.start[u + 1]].tolist())
        assert not touched & {c for c in candidates if c not in follows}


def test_aversion_and_avoidance_share_their_sets():
    """The same users and candidates; only the question differs, and no split ever asks it."""
    interactions, config = random_log(), DataConfig(min_history=3)
    avoid, averse = (
        probe_examples(interactions, config, probe) for probe in ("avoidance", "aversion")
    )
    assert (avoid.candidates == averse.candidates).all() and (avoid.target == averse.target).all()
    assert all("rate lowest?" in render_prompt(averse[e]) for e in range(len(averse)))
    assert not any("lowest" in render_prompt(avoid[e]) for e in range(len(avoid)))


def test_figures_count_what_their_names_say():
    """Hits, the later item, the disliked one,
    and for avoidance listed answers that are another title; ties share."""
    interactions = random_log()
    config = DataConfig(min_history=3)
    examples = probe_examples(interactions, config, "adherence")
    E, rows = len(examples), np.arange(len(examples))
    later = [
        int(np.flatnonzero(~examples.is_random[e] & (np.arange(20) != examples.target[e]))[0])
        for e in rows
    ]
    always_later = np.zeros((E, 20))
    always_later[rows, later] = 1
    found = outcomes("adherence", examples, always_later)
    assert found["hit_ratio@1"].sum() == 0 and found["takes the later one"].all()
    invalid = np.zeros((E, 20))
    assert (
        measure(
            "avoidance",
            probe_examples(interactions, config, "avoidance"),
            np.zeros((len(probe_examples(interactions, config, "avoidance")), 20)),
        )["avoidance"]
        == 0
    )
    assert measure("adherence", examples, invalid)["hit_ratio@1"] == 0
    ties = choice_of_scores(np.array([[1.0, 2.0, 2.0, *[0.0] * 17]]))
    assert ties[0, :3].tolist() == [0, 0.5, 0.5]
    records = [
        {"valid": True, "answer": "b", "candidates": ["a", "b"]},
        {"valid": False, "answer": "x", "candidates": ["a", "b"]},
    ]
    assert choice_of_answers(records)[:, :2].tolist() == [[0, 1], [0, 0]]


def test_chance_is_what_it_must_be():
    """1 in 20 everywhere, 19 in 20 for avoidance."""
    interactions, config = random_log(), DataConfig(dataset="csv", min_history=3)
    for probe in PROBES:
        examples = probe_examples(interactions, config, probe)
        figures = measure(probe, examples, reference_choices(probe, examples, config)["chance"])
        assert next(iter(figures.values())) == pytest.approx(0.95 if probe == "avoidance" else 0.05)


def test_the_optimum_beats_counting_in_the_planted_world():
    """Bayes-optimal is the best row of each probe that asks for a liked or disliked item;
    temptation takes few disliked ones."""
    config = DataConfig(planted_users=1500)
    interactions = planted_world(World(num_users=1500, seed=0))
    for probe in ("adherence", "temptation", "aversion"):
        examples = probe_examples(interactions, config, probe)
        rows = {
            name: measure(probe, examples, c)
            for name, c in reference_choices(probe, examples, config).items()
        }
        best = max(rows, key=lambda name: rows[name]["hit_ratio@1"])
        assert best == "Bayes-optimal", (probe, rows)


def test_length_bins_cover_every_user():
    """Bins add up to the mean, hold about as many users each, and carry n and an interval."""
    config = DataConfig(planted_users=400)
    examples = build_examples(planted_world(World(num_users=400, seed=0)), config)["test"]
    hits = np.random.default_rng(0).integers(0, 2, len(examples)).astype(float)
    bins = by_length(examples, hits)["bins"]
    assert sum(b["n"] for b in bins.values()) == len(examples) and 2 <= len(bins) <= 5
    total = sum(b["n"] * b["hit_ratio@1"] for b in bins.values())
    assert total / len(examples) == pytest.approx(hits.mean())
    lengths = history_lengths(examples)
    for name, entry in bins.items():
        low, high = map(int, name.split("-"))
        inside = (lengths >= low) & (lengths <= high)
        assert entry["n"] == inside.sum()
        assert entry["hit_ratio@1_ci95"] == wilson(hits[inside].mean(), inside.sum())


def skewed_examples(num_users: int) -> SimpleNamespace:
    """Users with one test case each whose history lengths are as skewed as MovieLens's:
    18 to some 1,500."""
    lengths = (18 + np.random.default_rng(0).lognormal(4, 1.2, num_users)).astype(int)
    start = np.append(0, np.cumsum(lengths + 1))
    interactions = SimpleNamespace(start=start, user=np.repeat(np.arange(num_users), lengths + 1))
    return SimpleNamespace(interactions=interactions, position=start[1:] - 1)


def test_bins_are_quantiles():
    """Skewed lengths fall into five bins of about a fifth of the users each."""
    bins = by_length(skewed_examples(1500), np.ones(1500))["bins"]
    assert len(bins) == 5 and all(250 < b["n"] < 350 for b in bins.values())


@pytest.mark.parametrize("hit_ratio", [0.05, 0.3])
def test_equal_recommenders_have_no_spread(hit_ratio):
    """HR equal in all bins: the interval of the spread begins at 0 in 97 % of 400 simulations or
    more."""
    examples, rng = skewed_examples(1500), np.random.default_rng(1)
    found = [by_length(examples, rng.random(1500) < hit_ratio) for _ in range(400)]
    assert np.mean([f["spread_ci95"][0] > 0 for f in found]) < 0.05
    assert np.median([f["cv"] for f in found]) < 0.12  # bins of equal width: .46 at HR .05


@pytest.mark.parametrize("low, high", [(0.02, 0.14), (0.2, 0.6)])
def test_unequal_recommenders_are_found(low, high):
    """HR that rises over the fifths:
    the interval leaves 0 out and covers the true spread as often as it says."""
    examples, rng = skewed_examples(1500), np.random.default_rng(2)
    edges = [int(name.split("-")[0]) for name in by_length(examples, np.ones(1500))["bins"]]
    which = np.searchsorted(edges, history_lengths(examples), "right") - 1
    rates = np.linspace(low, high, 5)
    found = [by_length(examples, rng.random(1500) < rates[which]) for _ in range(100)]
    true = rates.std(ddof=1)
    assert np.mean([f["spread_ci95"][0] > 0 for f in found]) > 0.95
    covers = [f["spread_ci95"][0] < true < f["spread_ci95"][1] for f in found]
    assert np.mean(covers) > 0.9
    assert np.mean([f["spread"] for f in found]) == pytest.approx(true, rel=0.1)


def test_chi_square_quantiles_are_the_published_ones():
    for p, degrees, value in ((0.975, 4, 11.143), (0.025, 4, 0.484), (0.95, 1, 3.841)):
        assert chi2_quantile(p, degrees) == pytest.approx(value, abs=1e-3)


def test_a_score_without_sampling_error_keeps_its_spread():
    """Chance has .05 for every user: spread 0, and no division by 0."""
    found = by_length(skewed_examples(200), np.full(200, 0.05))
    assert found["spread"] == pytest.approx(0) and found["cv_ci95"] == pytest.approx([0, 0])


def test_unknown_probes_are_refused():
    """The error lists the probes; options that a probe has no use for are named."""
    assert set(PROBE_NAMES) == {*PROBES, "length"}
    for probe in ("tempt", ""):
        with pytest.raises(ValueError, match="--probe must be one of adherence"):
            ProbeConfig(run="x", probe=probe)
    with pytest.raises(ValueError, match="belongs to eval.py"):
        ProbeConfig(run="x", probe="length", split="val")
    with pytest.raises(ValueError, match="prepared examples have their candidates already"):
        ProbeConfig(run="x", probe="avoidance", dataset="prepared")
