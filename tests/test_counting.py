"""Popularity, item-kNN and Markov against dict loops; known figures on MovieLens-1M."""

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from conftest import examples_at
from test_loaders import MOVIELENS, log_of, movielens, needs_movielens

from data import Examples, Interactions, build_examples, k_core
from eval import ranking_metrics
from loaders import counting
from loaders.counting import BASELINES, Retriever, counting_baselines, markov_top
from loaders.frozen import DataConfig
from loaders.planted import World, planted_world


def log_in_order(sequences: list[list[int]], num_items: int = 0) -> Interactions:
    """One more user touches `num_items`."""
    sequences = [*sequences, list(range(num_items))]
    return log_of([(u, i, 5, t) for u, items in enumerate(sequences) for t, i in enumerate(items)])


@pytest.fixture
def examples() -> Examples:
    """70 users with 1 to 18 of 31 items; the last position of those with more than 3."""
    rng = np.random.default_rng(0)
    sequences = [rng.permutation(31)[: rng.integers(1, 19)].tolist() for _ in range(70)]
    log = log_in_order(sequences, 31)
    last = (log.start[1:] - 1)[np.diff(log.start) > 3].tolist()
    return examples_at(log, last, np.array([rng.permutation(31)[:20] for _ in last]), history=6)


def values_by_loop(log: Interactions) -> dict:
    """Name -> what an item says of a candidate, counted in dictionaries."""
    users, count, follows = defaultdict(set), defaultdict(int), defaultdict(float)
    for user in range(log.num_users):
        start, end = log.start[user : user + 2]
        items = log.item[start : max(start, end - 2)].tolist()
        for place, item in enumerate(items):
            users[item].add(user)
            count[item] += 1
            for distance, later in enumerate(items[place + 1 : place + 11], 1):
                follows[item, later] += 1 / distance
    return {
        "popularity": lambda a, b: count[b],
        "item-kNN": lambda a, b: len(users[a] & users[b]) / math.sqrt(count[a] * count[b] or 1),
        "Markov": lambda a, b: follows[a, b] / math.sqrt(count[b] or 1),
    }


@pytest.mark.parametrize("name", BASELINES)
def test_scores_are_those_of_a_dict_loop(name, examples):
    """Of the 20 candidates and of the whole catalogue; a user's last two count for nothing, and
    short histories are not filled from the user before."""
    log = examples.interactions
    value, found = values_by_loop(log)[name], counting_baselines(examples)[name]
    retriever = Retriever(BASELINES[name], log, counting.training_rows(log), shown=6)
    for e in range(len(examples)):
        shown = log.item[list(examples.history_rows(e))].tolist()[::-1]
        shown = shown[:1] if name == "popularity" else shown
        expected = [
            sum(0.8**age * value(item, c) for age, item in enumerate(shown)) for c in range(31)
        ]
        start = log.start[log.user[examples.position[e]]]
        whole = retriever.scores(log.item[start : examples.position[e]])
        np.testing.assert_allclose(whole, expected, rtol=1e-12)
        assert (found[e] == whole[examples.candidates[e]]).all()
    assert found.any()
    fewer = Retriever(BASELINES[name], log, log.item != 5)  # an item without interactions
    assert fewer.scores(np.array([1, 2]))[5] == 0 and np.isfinite(fewer.scores(np.array([5]))).all()


# -------------------------------------------------------------------------------- retrieved lists
CONFIG = DataConfig(followers=3, min_history=4, train_size=50, negatives="retrieved")


@pytest.mark.parametrize("exclude", ["all", "seen"])
def test_lists_hold_the_best_of_a_plain_loop_beside_the_followers(exclude):
    """Of all that the user never touched, or that the prompt does not show; a user's last two
    interactions change nothing."""
    log = planted_world(World(num_users=150))
    config = replace(CONFIG, exclude=exclude, history=8)
    splits, value = build_examples(log, config, markov_top), values_by_loop(log)["Markov"]
    uniform = build_examples(log, replace(config, negatives="uniform"))["test"]
    assert (uniform.position == splits["test"].position).all()
    for split, followers in (("train", 3), ("val", 1), ("test", 1)):
        examples = splits[split]
        assert (examples.is_random.sum(1) == 20 - followers).all()
        for e, row in enumerate(examples.position[:12].tolist()):
            start, end = log.start[log.user[row] + np.arange(2)]
            left_out = set(log.item[start:end].tolist())
            if exclude == "seen":
                left_out = set(log.item[max(start, row - 8) : row + followers].tolist())
            history = log.item[max(start, row - 8) : row].tolist()[::-1]
            plain = [
                sum(0.8**age * value(item, c) for age, item in enumerate(history))
                for c in range(log.num_items)
            ]
            best = sorted((plain[c] for c in range(len(plain)) if c not in left_out), reverse=True)
            found = examples.candidates[e][examples.is_random[e]].tolist()
            assert not left_out & set(found) and len(set(found)) == 20 - followers
            found = sorted((plain[c] for c in found), reverse=True)
            assert found == pytest.approx(best[: len(found)])
    item, last, rows = log.item.copy(), log.start[1:] - 1, log.start[1:5] - 3
    item[last], item[last - 1] = item[last - 1], item[last]
    one, other = (markov_top(x, rows, 20, 9) for x in (log, replace(log, item=item)))
    assert (one == other).all()


def test_equal_scores_go_to_the_more_popular_item():
    log = log_in_order([[0, 1, 2], [3, 4, 5, 6], [3, 5, 6, 7], [5, 3, 8, 9]])
    found = markov_top(log, np.array([2]), 20, 8)
    assert found.tolist() == [[3, 5, 4, 6, 7, 8, 9, -1]]  # 3 comes thrice, 5 twice, 4 once


@needs_movielens
@pytest.mark.parametrize("core, num_examples, hits", [(0, 3563, (0.326, 0.498, 0.587)), (20, 3548, (0.294, 0.468, 0.560))])  # noqa: E501  # fmt: skip
def test_movielens_reference_points(core, num_examples, hits):
    config = DataConfig(dataset="movielens", data_dir=str(MOVIELENS), core=core)
    test = build_examples(k_core(movielens(), core), config)["test"]
    assert len(test) == num_examples
    for scores, hit in zip(counting_baselines(test).values(), hits):
        found = ranking_metrics(scores, test.target)["hit_ratio@1"].mean()
        assert found == pytest.approx(hit, abs=0.015)
