"""Two-stage figures: the retriever against few lines, long lists against the known optimum."""

import math

import numpy as np
import pytest

from data import NUM_CANDIDATES, build_examples
from demo.planted import World, planted_world
from eval import ranking_metrics
from loaders.counting import markov
from loaders.frozen import DataConfig, Prepared
from loaders.retrieval import fit, training_rows
from studies.ranking import ANCHORS, groups_of, on_one_scale, rank_long
from studies.two_stage import (
    TwoStageConfig,
    evaluate_lists,
    figures,
    gains,
    optimum_scores,
    retrieved,
    tables,
    targets,
    touched_before,
)

USERS = 300


@pytest.fixture(scope="module")
def planted():
    """A small planted world as prepared examples, and the optimum's scores of all items."""
    config = DataConfig(planted_users=USERS, followers=4)
    interactions = planted_world(World(num_users=USERS))
    options = {"dataset": "planted", "history": 20, "planted_users": USERS, "data_seed": 0}
    options |= {"min_rating": 4.0}
    prepared = Prepared(interactions, build_examples(interactions, config), "", None, {}, options)
    test = prepared.splits["test"].select(slice(120))
    return test, optimum_scores(prepared, test)


@pytest.fixture(scope="module")
def retriever(planted):
    interactions = planted[0].interactions
    return fit("markov", interactions, training_rows(interactions))


class Scorer:
    """Stands for the model: log-probs of a list of at most 20, normalised over that list."""

    def __init__(self, values: np.ndarray, noise: float = 0.0, seed: int = 0):
        self.values, self.noise, self.asked = values, noise, 0
        self.rng = np.random.default_rng(seed)

    def __call__(self, asked):
        rows = []
        for e, items in asked:
            assert 2 <= len(items) <= NUM_CANDIDATES and len(set(items.tolist())) == len(items)
            row = self.values[e, items] + self.noise * self.rng.standard_normal(len(items))
            rows.append(row - np.log(np.exp(row).sum()))
            self.asked += 1
        return rows


class ListRankerOf:
    """A ranker that looks its lists up by title: evaluate_lists with any values."""

    def __init__(self, values: np.ndarray, examples):
        self.score = Scorer(values)
        self.code = {title: c for c, title in enumerate(examples.interactions.titles)}
        self.row = {examples[e].user: e for e in range(len(examples))}

    def logps(self, lists):
        codes = [np.array([self.code[t] for t in shown.candidates]) for shown in lists]
        users = [self.row[shown.user] for shown in lists]
        return self.score(list(zip(users, codes, strict=True)))


# ----------------------------------------------------------------------------------- the retriever
def test_the_retriever_alone_by_few_independent_lines(planted, retriever):
    """Every place by sorting (score, code) of counting.py's Markov over all items."""
    test, optimum = planted
    interactions, places = test.interactions, []
    every = test.select(slice(None))
    every.candidates = np.tile(np.arange(interactions.num_items), (len(test), 1))
    for e, scores in enumerate(markov(every)):
        seen = set(touched_before(test, e).tolist())
        order = sorted(
            set(range(interactions.num_items)) - seen, key=lambda c: (-round(scores[c], 9), c)
        )
        places.append(1 + order.index(test.candidates[e, test.target[e]]))
    found = retrieved(retriever, test, interactions.num_items)
    rows = evaluate_lists(test, found, ListRankerOf(optimum, test), [20], optimum)
    assert rows["retriever"].tolist() == places
    shown = figures(rows)["retriever"]
    assert shown["HR@5"]["mean"] == np.mean([p <= 5 for p in places]) > 0
    ndcg = np.mean([1 / math.log2(1 + p) if p <= 10 else 0 for p in places])
    assert shown["NDCG@10"]["mean"] == pytest.approx(ndcg)
    assert shown["MRR"]["mean"] == pytest.approx(np.mean([1 / p for p in places]))


def test_gains_are_those_of_ranking_metrics():
    """Places of lists without ties: one definition of each measure."""
    scores = np.random.default_rng(0).permuted(np.tile(np.arange(30.0), (50, 1)), axis=1)
    target = np.arange(50) % 30
    known = ranking_metrics(scores, target)
    places = 1 + (scores > scores[np.arange(50), target][:, None]).sum(1)
    found = gains(places)
    assert (found["HR@1"] == known["hit_ratio@1"]).all()
    assert (found["HR@5"] == known["hit_ratio@5"]).all()
    assert (found["MRR"] == known["mrr"]).all()
    within = places <= 5
    assert (found["NDCG@10"][within] == known["ndcg@5"][within]).all()


# -------------------------------------------------------------------------------------- long lists
@pytest.mark.parametrize("count", [2, 19, 20, 21, 36, 50, 100, 101])
def test_groups_hold_everything_once_and_the_anchors_always(count):
    groups = groups_of(count)
    assert set(np.concatenate(groups)) == set(range(count))
    for places in groups:
        assert len(set(places.tolist())) == len(places) == min(count, NUM_CANDIDATES)
        if count > NUM_CANDIDATES:
            assert places[:ANCHORS].tolist() == list(range(ANCHORS))
    assert len(groups) == max(1, math.ceil((count - ANCHORS) / (NUM_CANDIDATES - ANCHORS)))


def test_one_scale_undoes_every_shift_of_a_group():
    values, groups = np.random.default_rng(0).standard_normal(50), groups_of(50)
    rows = [values[places] + 7 * g for g, places in enumerate(groups)]
    found = on_one_scale(50, groups, rows)
    assert np.ptp(found - values) < 1e-12


@pytest.mark.parametrize("size", [20, 50, 100])
def test_the_optimum_in_lists_of_20_orders_long_lists_as_the_optimum(planted, retriever, size):
    """Its log-probs are known only up to a shift per list; the order of all N is still exact."""
    test, optimum = planted
    lists = [
        retriever.top(touched_before(test, e), touched_before(test, e), size)
        for e in range(len(test))
    ]
    score = Scorer(optimum)
    for e, order in enumerate(rank_long(lists, score)):
        assert sorted(order) == sorted(lists[e])
        assert (np.diff(optimum[e, order]) < 1e-9).all()
    per_user = 1 if size == 20 else len(groups_of(size)) + 1
    assert score.asked == per_user * len(test)


def test_a_noisy_scorer_does_as_well_in_groups_as_in_one_list(planted, retriever):
    """Noise of 0.5 nats per log-prob: HR@10 of N = 100, over three draws of the noise.

    Groups and a last list must not lose to one list of all 100 with the same noise, and must come
    near the optimum's order."""
    test, optimum = planted
    lists = [
        retriever.top(touched_before(test, e), touched_before(test, e), 100)
        for e in range(len(test))
    ]
    wanted, hits, direct, best = targets(test), [], [], []
    for seed in range(3):
        score = Scorer(optimum, noise=0.5, seed=seed)
        noise = 0.5 * np.random.default_rng(seed + 100).standard_normal(optimum.shape)
        for e, order in enumerate(rank_long(lists, score)):
            hits.append(wanted[e] in order[:10])
            no_ties = optimum[e] + 1e-6 * noise[e]  # stories of a genre: equal scores
            for values, found in ((optimum[e] + noise[e], direct), (no_ties, best)):
                found.append(wanted[e] in lists[e][np.argsort(-values[lists[e]])][:10])
    assert np.mean(hits) > np.mean(direct) - 0.01
    assert np.mean(best) > 0.5 and np.mean(hits) > np.mean(best) - 0.06


def test_figures_lie_between_retriever_and_ceiling(planted, retriever):
    """The optimum as the model: its rows are the optimum's, below the ceiling and all items'."""
    test, optimum = planted
    found = retrieved(retriever, test, test.interactions.num_items)
    rows = evaluate_lists(test, found, ListRankerOf(optimum, test), [20, 50], optimum)
    result = figures(rows)
    for size in (20, 50):
        model, best = result[f"+ model, N = {size}"], result[f"+ optimum, N = {size}"]
        ceiling = result[f"ceiling, N = {size}"]
        for measure in ("HR@1", "HR@5", "HR@10", "NDCG@10", "MRR"):
            assert model[measure]["mean"] <= ceiling[measure]["mean"]
            assert abs(model[measure]["mean"] - best[measure]["mean"]) < 0.04  # ties within a genre
    last = result["+ model, N = 50"]["HR@10"]
    assert last["mean"] > result["retriever"]["HR@10"]["mean"] and last["verdict"] == "higher"
    every = result["optimum of all items"]  # ties as in the lists, so a longer list is no worse
    assert every["HR@10"]["mean"] >= result["+ optimum, N = 50"]["HR@10"]["mean"] - 0.03
    text = tables(result)
    assert text.count("\n") == len(rows) + 6 and "+ model, N = 50" in text


def test_bad_options():
    with pytest.raises(ValueError, match="--run is needed"):
        TwoStageConfig()
    with pytest.raises(ValueError, match="--list_sizes: expected numbers >= 2, got '20,x'"):
        TwoStageConfig(run="r", list_sizes="20,x")
    assert TwoStageConfig(run="r", list_sizes=" 50,20, 50").sizes() == [20, 50]
