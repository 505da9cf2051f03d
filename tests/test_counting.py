"""Counting recommenders against dict loops on tiny logs,
and against known figures on MovieLens-1M."""

import math
import os
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import examples_at

from data import Examples, Interactions, build_examples, k_core
from eval import ranking_metrics
from loaders.counting import counting_baselines, item_knn, markov, popularity
from loaders.frozen import DataConfig, load_interactions
from loaders.table import make_interactions

DATA = Path(os.environ.get("RECPO_DATA") or Path(__file__).parents[2] / "shared/data")
MOVIELENS = DATA / "ml-1m.zip"


def log_of(sequences: list[list[int]], num_items: int) -> Interactions:
    """A log in which user u touches the items sequences[u] in this order;
    one more user makes every item known."""
    sequences = [*sequences, list(range(num_items))]
    rows = [(u, i, 5, t) for u, items in enumerate(sequences) for t, i in enumerate(items)]
    return make_interactions(*zip(*rows, strict=True), {i: f"item {i}" for i in range(num_items)})


@pytest.fixture
def random_examples() -> Examples:
    """70 users (more than one word of bits) with 1 to 18 of 31 items;
    the last position of those with more than 3."""
    rng = np.random.default_rng(0)
    interactions = log_of(
        [rng.permutation(31)[: rng.integers(1, 19)].tolist() for _ in range(70)], 31
    )
    last = [
        end - 1
        for start, end in zip(interactions.start[:-1], interactions.start[1:], strict=True)
        if end - start > 3
    ]
    return examples_at(
        interactions, last, np.array([rng.permutation(31)[:20] for _ in last]), history=6
    )


def training_sequences(interactions: Interactions) -> list[list[int]]:
    bounds = zip(interactions.start[:-1], interactions.start[1:], strict=True)
    return [interactions.item[start : max(start, end - 2)].tolist() for start, end in bounds]


def scores_by_loop(examples: Examples, pair_value) -> list[list[float]]:
    return [
        [
            sum(
                0.8**age * pair_value(int(examples.interactions.item[row]), int(c))
                for age, row in enumerate(reversed(rows))
            )
            for c in examples.candidates[e]
        ]
        for e, rows in enumerate(map(examples.history_rows, range(len(examples))))
    ]


def test_popularity_excludes_the_last_two():
    """A candidate counts only where it lies before a user's last two interactions,
    however short the log is."""
    interactions = log_of(
        [[0, 1, 2, 3], [1, 0, 3], [2, 1], [3]], 5
    )  # and 0 1 2 3 4 by the last user
    examples = examples_at(interactions, [3], np.array([[0, 1, 2, 3, 4]]))
    assert popularity(examples).tolist() == [[2, 3, 1, 0, 0]]


def test_item_knn_matches_a_dict_loop(random_examples):
    """The packed bits give the cosine between sets of users,
    summed over the shown history with decay."""
    users = defaultdict(set)
    for user, items in enumerate(training_sequences(random_examples.interactions)):
        for item in items:
            users[item].add(user)

    def cosine(a, b):
        return len(users[a] & users[b]) / math.sqrt(len(users[a]) * len(users[b]) or 1)

    np.testing.assert_allclose(
        item_knn(random_examples), scores_by_loop(random_examples, cosine), rtol=1e-12
    )


def test_markov_matches_a_dict_loop(random_examples):
    """Transitions are counted forwards, within a user,
    up to ten steps apart and weighted by 1 / distance."""
    transitions, count = defaultdict(float), defaultdict(int)
    for items in training_sequences(random_examples.interactions):
        for at, item in enumerate(items):
            count[item] += 1
            for distance, later in enumerate(items[at + 1 : at + 11], 1):
                transitions[item, later] += 1 / distance

    def value(a, b):
        return transitions[a, b] / math.sqrt(count[b] or 1)

    np.testing.assert_allclose(
        markov(random_examples), scores_by_loop(random_examples, value), rtol=1e-12
    )


def test_scores_do_not_depend_on_the_last_two(random_examples):
    """Exchanging every user's last two items changes no score of an example that predicts the first
    of them."""
    interactions = random_examples.interactions
    before = replace(random_examples, position=random_examples.position - 1)
    item = interactions.item.copy()
    for start, end in zip(interactions.start[:-1], interactions.start[1:], strict=True):
        if end - start >= 2:
            item[end - 2 : end] = (item[end - 2 : end] + 1) % interactions.num_items
    after = replace(before, interactions=replace(interactions, item=item))
    for name, scores in counting_baselines(before).items():
        assert (scores == counting_baselines(after)[name]).all(), name


def test_short_history_is_not_filled_from_the_user_before():
    """A history shorter than the window ends at the user's own first row."""
    interactions = log_of([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]], 10)
    candidates = np.array([[1, 2, 7, 9]])
    second_user = examples_at(interactions, [7], candidates)  # shows item 6 alone
    assert (markov(second_user) == markov(replace(second_user, history=1))).all()
    assert (item_knn(second_user) == item_knn(replace(second_user, history=1))).all()


@cache
def movielens() -> Interactions:
    return load_interactions(DataConfig(dataset="movielens", data_dir=str(MOVIELENS)))


@pytest.mark.skipif(
    not MOVIELENS.exists(),
    reason=f"{MOVIELENS} is absent; RECPO_DATA names the folder of ml-1m.zip",
)
@pytest.mark.parametrize(
    "core, num_examples, expected",
    [
        (
            0,
            3563,
            {"popularity": (0.326, 0.012), "item-kNN": (0.498, 0.02), "Markov": (0.587, 0.015)},
        ),
        (
            20,
            3548,
            {"popularity": (0.294, 0.012), "item-kNN": (0.468, 0.02), "Markov": (0.560, 0.015)},
        ),
    ],
)
def test_movielens_reference_points(core, num_examples, expected):
    """The known hit_ratio@1 of counting on MovieLens-1M, 1 + 19 uniform candidates;
    data_seed moves it by about .01."""
    config = DataConfig(dataset="movielens", data_dir=str(DATA), core=core)
    test = build_examples(k_core(movielens(), core), config)["test"]
    assert len(test) == num_examples
    for name, scores in counting_baselines(test).items():
        figure, tolerance = expected[name]
        assert ranking_metrics(scores, test.target)["hit_ratio@1"].mean() == pytest.approx(
            figure, abs=tolerance
        ), name
