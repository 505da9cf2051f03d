"""Popularity, item-kNN and Markov against dict loops, for candidates and for the whole catalogue,
and against known figures on MovieLens-1M."""

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from conftest import examples_at
from test_loaders import MOVIELENS, log_of, movielens, needs_movielens

from data import Examples, Interactions, build_examples, k_core
from eval import ranking_metrics
from loaders.counting import BASELINES, best_items, counting_baselines, fit, training_rows
from loaders.frozen import DataConfig


def log_in_order(sequences: list[list[int]], num_items: int) -> Interactions:
    """User u touches the items sequences[u] in this order; one more user makes all items known."""
    sequences = [*sequences, list(range(num_items))]
    return log_of([(u, i, 5, t) for u, items in enumerate(sequences) for t, i in enumerate(items)])


@pytest.fixture
def examples() -> Examples:
    """70 users with 1 to 18 of 31 items; the last position of those with more than 3."""
    rng = np.random.default_rng(0)
    sequences = [rng.permutation(31)[: rng.integers(1, 19)].tolist() for _ in range(70)]
    interactions = log_in_order(sequences, 31)
    last = (interactions.start[1:] - 1)[np.diff(interactions.start) > 3].tolist()
    candidates = np.array([rng.permutation(31)[:20] for _ in last])
    return examples_at(interactions, last, candidates, history=6)


def values_by_loop(interactions: Interactions) -> dict:
    """Name -> what an item says of a candidate, counted in dictionaries."""
    users, count, follows = defaultdict(set), defaultdict(int), defaultdict(float)
    for user in range(interactions.num_users):
        start, end = interactions.start[user : user + 2]
        items = interactions.item[start : max(start, end - 2)].tolist()
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
    """Of the 20 candidates and, by a retriever, of the whole catalogue: what the shown items say,
    the newest counts in full, each one before it 0.8 times as much."""
    interactions = examples.interactions
    value, found = values_by_loop(interactions)[name], counting_baselines(examples)[name]
    retriever = fit(BASELINES[name], interactions, training_rows(interactions), shown=6)
    for e in range(len(examples)):
        shown = interactions.item[list(examples.history_rows(e))].tolist()[::-1]
        shown = shown[:1] if name == "popularity" else shown
        expected = [
            sum(0.8**age * value(item, c) for age, item in enumerate(shown)) for c in range(31)
        ]
        start = interactions.start[interactions.user[examples.position[e]]]
        whole = retriever.scores(interactions.item[start : examples.position[e]])
        np.testing.assert_allclose(whole, expected, rtol=1e-12)
        assert (found[e] == whole[examples.candidates[e]]).all()
    assert found.any()


def test_popularity_leaves_each_users_last_two_out():
    interactions = log_in_order([[0, 1, 2, 3], [1, 0, 3], [2, 1], [3]], 5)
    assert (
        training_rows(interactions).tolist()[:10]
        == [True, True, False, False] + [True] + [False] * 5
    )
    examples = examples_at(interactions, [3], np.array([[0, 1, 2, 3, 4]]))
    assert counting_baselines(examples)["popularity"].tolist() == [[2, 3, 1, 0, 0]]


def test_scores_do_not_depend_on_the_last_two(examples):
    """Other last two items of every user change no score of an example that predicts the first of
    them."""
    interactions = examples.interactions
    before = replace(examples, position=examples.position - 1)
    item = interactions.item.copy()
    for start, end in zip(interactions.start[:-1], interactions.start[1:], strict=True):
        if end - start >= 2:
            item[end - 2 : end] = (item[end - 2 : end] + 1) % interactions.num_items
    after = replace(before, interactions=replace(interactions, item=item))
    for name, scores in counting_baselines(before).items():
        assert (scores == counting_baselines(after)[name]).all(), name


def test_short_history_is_not_filled_from_the_user_before():
    interactions = log_in_order([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]], 10)
    second_user = examples_at(interactions, [7], np.array([[1, 2, 7, 9]]))  # shows item 6 alone
    alone = counting_baselines(replace(second_user, history=1))
    for name, scores in counting_baselines(second_user).items():
        assert (scores == alone[name]).all()


def test_best_items_by_score_then_code():
    """Equal scores in the order of their codes, also across the end of the list."""
    scores = np.array([1.0, 3.0, 2.0, 2.0, 0.0, 2.0, 3.0])
    for exclude, n, expected in (
        ([], 3, [1, 6, 2]),
        ([1, 2], 3, [6, 3, 5]),
        ([1, 2], 99, [6, 3, 5, 0, 4]),
        (range(7), 3, []),
    ):
        assert best_items(scores, np.array(exclude, int), n).tolist() == expected
    assert scores.max() == 3.0  # the caller's array is left alone


def test_an_item_without_interactions_scores_nothing(examples):
    interactions = examples.interactions
    for name in BASELINES.values():
        retriever = fit(name, interactions, interactions.item != 5)
        assert retriever.scores(np.array([1, 2]))[5] == 0
        assert np.isfinite(retriever.scores(np.array([5]))).all()


@needs_movielens
@pytest.mark.parametrize("core, num_examples, hits", [(0, 3563, (0.326, 0.498, 0.587)), (20, 3548, (0.294, 0.468, 0.560))])  # noqa: E501  # fmt: skip
def test_movielens_reference_points(core, num_examples, hits):
    """The known hit_ratio@1 of counting on MovieLens-1M, 1 + 19 uniform candidates;
    data_seed moves it by about .01."""
    config = DataConfig(dataset="movielens", data_dir=str(MOVIELENS), core=core)
    test = build_examples(k_core(movielens(), core), config)["test"]
    assert len(test) == num_examples
    for scores, hit, tolerance in zip(
        counting_baselines(test).values(), hits, (0.012, 0.02, 0.015)
    ):
        found = ranking_metrics(scores, test.target)["hit_ratio@1"].mean()
        assert found == pytest.approx(hit, abs=tolerance)
