"""Retrievers over the whole catalogue: the scores of loaders/counting.py, and their order."""

import numpy as np
import pytest

from data import Examples, build_examples
from loaders.counting import best_items, fit, item_knn, markov, popularity, training_rows
from loaders.frozen import DataConfig
from loaders.table import make_interactions

COUNTING = {"popularity": popularity, "item-knn": item_knn, "markov": markov}


def random_log(users: int = 40, items: int = 60, length: int = 14, seed: int = 0):
    rng = np.random.default_rng(seed)
    item = np.concatenate([rng.permutation(items)[:length] for _ in range(users)])
    user = np.repeat(np.arange(users), length)
    rating = rng.integers(3, 6, users * length)
    titles = {i: f"Title {i}" for i in range(items)}
    return make_interactions(user, item, rating, np.arange(len(user)), titles)


@pytest.fixture(scope="module")
def examples() -> Examples:
    return build_examples(random_log(), DataConfig(history=6, followers=3))["test"]


@pytest.mark.parametrize("name", COUNTING)
def test_scores_are_those_of_the_candidate_lists(examples, name):
    """What counting.py says of 20 candidates, the retriever says of the same among all items."""
    interactions = examples.interactions
    retriever = fit(name, interactions, training_rows(interactions), shown=6)
    wanted = COUNTING[name](examples)
    assert wanted.any() and len(examples) > 20
    for e, p in enumerate(examples.position):
        history = interactions.item[interactions.start[interactions.user[p]] : p]
        found = retriever.scores(history)
        assert found.shape == (interactions.num_items,)
        np.testing.assert_allclose(found[examples.candidates[e]], wanted[e], rtol=1e-12, atol=0)


def test_training_rows_leave_each_users_last_two_out():
    interactions = random_log(users=3, length=5)
    assert training_rows(interactions).tolist() == [True, True, True, False, False] * 3


def test_best_items_by_score_then_code():
    """Equal scores in the order of their codes, also across the end of the list."""
    scores = np.array([1.0, 3.0, 2.0, 2.0, 0.0, 2.0, 3.0])
    assert best_items(scores, np.array([], int), 3).tolist() == [1, 6, 2]
    assert best_items(scores, np.array([1, 2]), 3).tolist() == [6, 3, 5]
    assert best_items(scores, np.array([1, 2]), 99).tolist() == [6, 3, 5, 0, 4]
    assert best_items(scores, np.arange(7), 3).tolist() == []
    assert scores.max() == 3.0  # the caller's array is left alone


def test_an_item_without_interactions_scores_nothing():
    interactions = random_log()
    rows = interactions.item != 5
    for name in COUNTING:
        retriever = fit(name, interactions, rows)
        assert retriever.scores(np.array([1, 2]))[5] == 0
        assert np.isfinite(retriever.scores(np.array([5]))).all()
