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
from studies.statistics import chi2_quantile, spread_of_bins


def random_log(seed: int = 0, num_users: int = 60):
    rng = np.random.default_rng(seed)
    rows = [
        (u, int(i), int(rng.integers(1, 6)), t)
        for u in range(num_users)
        for t, i in enumerate(rng.permutation(80)[: rng.integers(4, 20)])
    ]
    return make_interactions(*zip(*rows, strict=True), {i: f"item {i}" for i in range(80)})


@pytest.mark.parametrize("probe", LAST_TWO)
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
    assert sum(found["hit_ratio@1"]) == 0 and all(found["takes the later one"])
    avoid = probe_examples(interactions, config, "avoidance")
    assert sum(outcomes("avoidance", avoid, np.zeros((len(avoid), 20)))["avoidance"]) == 0
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
    for probe in LAST_TWO:
        examples = probe_examples(interactions, config, probe)
        figures = references(probe, examples, config)["chance"]
        mean = np.mean(next(iter(figures.values())))
        assert mean == pytest.approx(0.95 if probe == "avoidance" else 0.05)


def test_the_optimum_beats_counting_in_the_planted_world():
    """Bayes-optimal is the best row of each probe that asks for a liked or disliked item."""
    config = DataConfig(planted_users=1500)
    interactions = planted_world(World(num_users=1500, seed=0))
    for probe in ("adherence", "temptation", "aversion"):
        examples = probe_examples(interactions, config, probe)
        rows = references(probe, examples, config)
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
    beside = references("length", test, config)
    content = measured("length", test, records, beside)
    assert content["written"] == {"hit_ratio@1": [1, 0, 0]}
    assert content["ranked"] == {"hit_ratio@1": [1, 1, 0]} and len(content["lengths"]) == 3
    content |= {"lengths": []}  # another probe's table
    text = probe_table(content, {"sft; written": [content["written"], content["ranked"]]})
    assert "| sft; written (mean of 2 runs) | 0.5000 [" in text


def skewed_lengths(num_users: int = 1500) -> np.ndarray:
    """Of histories, as skewed as MovieLens's: 18 to some 1,500."""
    return (18 + np.random.default_rng(0).lognormal(4, 1.2, num_users)).astype(int)


def test_bins_are_fifths_and_cover_every_user():
    """Bins add up to the mean and hold about as many users each."""
    lengths, hits = skewed_lengths(), np.random.default_rng(0).integers(0, 2, 1500).astype(float)
    bins = by_length(lengths, hits)
    assert len(bins) == 5 and all(250 < b["n"] < 350 for b in bins.values())
    total = sum(b["n"] * b["mean"] for b in bins.values())
    assert total / 1500 == pytest.approx(hits.mean())
    for name, entry in bins.items():
        low, high = map(int, name.split("-"))
        inside = (lengths >= low) & (lengths <= high)
        assert entry["n"] == inside.sum() and entry["mean"] == pytest.approx(hits[inside].mean())


@pytest.mark.parametrize("hit_ratio", [0.05, 0.3])
def test_equal_recommenders_have_no_spread(hit_ratio):
    """HR equal in all bins: the interval of the spread begins at 0 in 97 % of 400 simulations or
    more."""
    lengths, rng = skewed_lengths(), np.random.default_rng(1)
    draws = [rng.random(1500) < hit_ratio for _ in range(400)]
    found = [spread_of_bins(by_length(lengths, hits)) for hits in draws]
    assert np.mean([f["spread_ci95"][0] > 0 for f in found]) < 0.05
    assert np.median([f["cv"] for f in found]) < 0.12  # bins of equal width: .46 at HR .05


@pytest.mark.parametrize("low, high", [(0.02, 0.14), (0.2, 0.6)])
def test_unequal_recommenders_are_found(low, high):
    """HR that rises over the fifths:
    the interval leaves 0 out and covers the true spread as often as it says."""
    lengths, rng = skewed_lengths(), np.random.default_rng(2)
    edges = [int(name.split("-")[0]) for name in by_length(lengths, np.ones(1500))]
    which = np.searchsorted(edges, lengths, "right") - 1
    rates = np.linspace(low, high, 5)
    draws = [rng.random(1500) < rates[which] for _ in range(100)]
    found = [spread_of_bins(by_length(lengths, hits)) for hits in draws]
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
    found = spread_of_bins(by_length(skewed_lengths(200), np.full(200, 0.05)))
    assert found["spread"] == pytest.approx(0) and found["cv_ci95"] == pytest.approx([0, 0])


def test_unknown_probes_are_refused():
    """The error lists the probes; options that a probe has no use for are named."""
    assert set(PROBES) == {*LAST_TWO, "length", *KINDS}
    for probe in ("tempt", ""):
        with pytest.raises(ValueError, match="--probe must be one of adherence"):
            ProbeConfig(run="x", probe=probe)
    with pytest.raises(ValueError, match="belongs to eval.py"):
        ProbeConfig(run="x", probe="length", split="val")
    with pytest.raises(ValueError, match="prepared examples have their candidates already"):
        ProbeConfig(run="x", probe="avoidance", dataset="prepared")
