"""Probes: which users they take, what stands among the candidates, and what each figure counts."""

import numpy as np
import pytest
from test_loaders import log_of

from data import build_examples, render_prompt
from loaders.counting import markov_top
from loaders.frozen import DataConfig
from loaders.planted import World, planted_world
from studies import probes
from studies.probes import by_length, outcomes, probe_examples, references
from studies.statistics import spread_of_bins

CONFIG = DataConfig(dataset="csv", min_history=3)


@pytest.fixture(scope="module")
def log():
    rng, rows = np.random.default_rng(0), []
    for u in range(60):
        items = enumerate(rng.permutation(80)[: rng.integers(4, 20)].tolist())
        rows += [(u, i, int(rng.integers(1, 6)), t) for t, i in items]
    return log_of(rows)


@pytest.mark.parametrize("probe", probes.LAST_TWO)
def test_probes_take_all_users_that_fit(log, probe):
    """Users, targets and the other future item against a plain loop over the log; the rest is
    random and never touched."""
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
        assert examples.position[e] == rows[0] and len(set(candidates)) == 20
        assert candidates[examples.target[e]] == log.item[rows[0]]
        assert sorted(candidates[~examples.is_random[e]]) == sorted(log.item[rows])
        touched = set(log.item[log.start[u] : log.start[u + 1]])
        assert not touched & set(candidates[examples.is_random[e]])
        assert ("lowest?" in render_prompt(examples[e])) == (probe == "aversion")
    figures = references(probe, examples, CONFIG)["chance"]
    mean = np.mean(next(iter(figures.values())))
    assert mean == pytest.approx(0.95 if probe == "avoidance" else 0.05)


def test_figures_count_what_their_names_say(log):
    """For avoidance listed answers that are another title, of aversion's lists; ties share."""
    examples = probe_examples(log, CONFIG, "adherence")
    later = ~examples.is_random
    later[np.arange(len(later)), examples.target] = False
    found = outcomes("adherence", examples, later.astype(float))
    assert sum(found["hit_ratio@1"]) == 0 and all(found["takes the later one"])
    avoid, averse = (probe_examples(log, CONFIG, probe) for probe in ("avoidance", "aversion"))
    assert (avoid.candidates == averse.candidates).all() and (avoid.target == averse.target).all()
    assert sum(outcomes("avoidance", avoid, np.zeros((len(avoid), 20)))["avoidance"]) == 0
    ties = probes.choice_of_scores(np.array([[1.0, 2.0, 2.0, *[0.0] * 17]]))
    assert ties[0, :3].tolist() == [0, 0.5, 0.5]


@pytest.fixture(scope="module")
def split():
    config = DataConfig(followers=3, min_history=4, train_size=50)
    return config, build_examples(planted_world(World(num_users=150)), config)["test"]


def test_other_lists_keep_users_histories_and_targets(split):
    """The same draw every time; retrieved ones are Markov's best that the user never touched."""
    config, test = split
    rows = np.arange(len(test))
    for kind in probes.KINDS[1:]:
        other = probes.other_list(test, config, kind)
        assert (other.position == test.position).all()
        targets = other.candidates[rows, other.target], test.candidates[rows, test.target]
        assert (targets[0] == targets[1]).all() and (other.candidates != test.candidates).any()
        assert (probes.other_list(test, config, kind).candidates == other.candidates).all()
    found = other.candidates[other.is_random].reshape(-1, 19)
    expected = markov_top(test.interactions, test.position, 20, 19)
    assert (np.sort(found, 1) == np.sort(expected, 1)).all()


def test_a_model_is_measured_as_written_and_as_ranked_first(split):
    config, test = split[0], split[1].select(slice(3))
    records = []
    for e, (ranked, written) in enumerate(((0, 0), (0, -1), (1, 0))):  # behind the target's slot
        titles, target = test[e].candidates, int(test.target[e])
        logps = [float(slot == (target + ranked) % 20) for slot in range(20)]
        record = {"user": test[e].user, "candidates": titles, "target": titles[target]}
        record |= {"logps": logps, "answer": titles[target + written], "valid": e < 2}
        records.append(record)
    content = probes.measured("length", test, records, references("length", test, config), "hash")
    assert content["written"] == {"hit_ratio@1": [1, 0, 0]} and content["data_hash"] == "hash"
    assert content["ranked"] == {"hit_ratio@1": [1, 1, 0]} and len(content["lengths"]) == 3
    both = {"sft": [content["written"], content["ranked"]]}
    text = probes.probe_table(content | {"lengths": []}, both)
    assert "| sft (mean of 2 runs) | 0.5000 [" in text


# Lengths of 1,500 histories, as skewed as MovieLens's: 18 to some 1,500.
LENGTHS = (18 + np.random.default_rng(0).lognormal(4, 1.2, 1500)).astype(int)


def bins_of(hits) -> dict:
    return by_length(LENGTHS, [{"hit_ratio@1": hits}])


@pytest.mark.parametrize("low, high", [(0.05, 0.05), (0.3, 0.3), (0.02, 0.14), (0.2, 0.6)])
def test_the_spread_of_bins_is_that_beyond_sampling(low, high):
    """The interval covers the true spread as often as it says, and begins at 0 where HR is equal in
    all bins. A score without sampling error, such as chance, has its own spread."""
    rng = np.random.default_rng(2)
    fifths = bins_of(np.ones(1500))
    assert len(fifths) == 5 and all(250 < b["n"] < 350 for b in fifths.values())
    edges = [int(name.split("-")[0]) for name in fifths]
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
