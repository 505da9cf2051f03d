"""Retrieved candidates: Markov over the whole catalogue, never touched,
fitted on training rows alone."""

from dataclasses import replace

import numpy as np
import pytest
from test_counting import values_by_loop
from test_loaders import log_of

from data import Interactions, build_examples
from eval import ranking_metrics
from loaders.counting import candidate_scores, markov_top
from loaders.frozen import DataConfig
from loaders.planted import World, planted_world

CONFIG = DataConfig(followers=3, min_history=4, train_size=50, negatives="retrieved")


@pytest.fixture(scope="module")
def interactions() -> Interactions:
    return planted_world(World(num_users=150))


def items_of(interactions: Interactions, row: int, shown: int | None = None) -> list[int]:
    """What the row's user touches; or the `shown` items before the row and its own."""
    start, end = interactions.start[interactions.user[row] + np.arange(2)]
    rows = slice(start, end) if shown is None else slice(max(start, row - shown), row + 1)
    return interactions.item[rows].tolist()


def test_retrieved_items_are_the_best_of_a_plain_loop(interactions):
    """Their scores are the highest of all never-touched items, and those of the baseline."""
    rows = interactions.start[1:4] - 1
    found = markov_top(interactions, rows, 20, 12)
    examples = build_examples(interactions, replace(CONFIG, negatives="uniform"))["test"]
    examples = replace(examples.select([0, 0, 0]), position=rows, candidates=found.astype(np.int32))
    scored, value = candidate_scores("markov", examples), values_by_loop(interactions)["Markov"]
    for e, row in enumerate(rows.tolist()):
        touched, history = items_of(interactions, row), items_of(interactions, row, 20)[-2::-1]
        assert not set(touched) & set(found[e].tolist()) and len(set(found[e].tolist())) == 12
        plain = [
            sum(0.8**age * value(item, c) for age, item in enumerate(history))
            for c in range(interactions.num_items)
        ]
        best = sorted((plain[c] for c in range(len(plain)) if c not in touched), reverse=True)[:12]
        assert [plain[c] for c in found[e].tolist()] == pytest.approx(best)
        assert scored[e] == pytest.approx(best)


def test_equal_scores_go_to_the_more_popular_item():
    """Nothing follows the history: all scores are 0, and popularity, then the code, decides."""
    sequences = [[0, 1, 2], [3, 4, 5, 6], [3, 5, 6, 7], [5, 3, 8, 9]]
    rows = [(u, i, 5, t) for u, items in enumerate(sequences) for t, i in enumerate(items)]
    found = markov_top(log_of(rows), np.array([2]), 20, 8)
    assert found.tolist() == [[3, 5, 4, 6, 7, 8, 9, -1]]  # 3 comes thrice, 5 twice, 4 once


def test_every_list_holds_the_target_and_retrieved_items(interactions):
    """Training lists hold followers beside them;
    what `seen` leaves in may have been touched elsewhere."""
    splits = build_examples(interactions, CONFIG, markov_top)
    for split, followers in (("train", 3), ("val", 1), ("test", 1)):
        examples = splits[split]
        assert (examples.is_random.sum(1) == 20 - followers).all()
        wanted = markov_top(interactions, examples.position, 20, 20 - followers)
        for candidates, is_random, items in zip(examples.candidates, examples.is_random, wanted):
            assert set(candidates[is_random].tolist()) == set(items.tolist())
            assert len(set(candidates.tolist())) == 20
    config = replace(CONFIG, exclude="seen", history=8)
    seen = build_examples(interactions, config, markov_top)["test"]
    touched = 0
    for e, row in enumerate(seen.position.tolist()):
        retrieved = set(seen.candidates[e][seen.is_random[e]].tolist())
        assert not retrieved & set(items_of(interactions, row, 8))
        touched += len(retrieved & set(items_of(interactions, row)))
    assert touched


def test_retrieved_lists_are_harder_and_have_the_same_users(interactions):
    """Test users and targets are those of uniform lists; Markov finds fewer of them."""
    uniform = build_examples(interactions, replace(CONFIG, negatives="uniform"))["test"]
    hard = build_examples(interactions, CONFIG, markov_top)["test"]
    assert (uniform.position == hard.position).all()
    ratios = [
        ranking_metrics(candidate_scores("markov", e), e.target)["hit_ratio@1"].mean()
        for e in (uniform, hard)
    ]
    assert ratios[1] < 0.5 * ratios[0]


def test_the_last_two_interactions_change_nothing(interactions):
    """Retrieval is fitted on training interactions: other last items retrieve the same."""
    rows, exclude = interactions.start[1:5] - 3, np.zeros((4, 1), int)
    item, last = interactions.item.copy(), interactions.start[1:] - 1
    item[last], item[last - 1] = item[last - 1], item[last]
    found = [
        markov_top(log, rows, 20, 9, exclude=exclude)
        for log in (interactions, replace(interactions, item=item))
    ]
    assert (found[0] == found[1]).all()


def test_a_user_who_touched_almost_everything_is_refused():
    items = [(0, i, 5, i) for i in range(12)] + [(1, i, 5, i) for i in range(25)]
    interactions = log_of(items)
    with pytest.raises(ValueError, match="user 1: fewer than 17 items"):
        build_examples(interactions, replace(CONFIG, min_history=3), markov_top)
    with pytest.raises(ValueError, match="needs a recommender"):
        build_examples(interactions, CONFIG)
    with pytest.raises(ValueError, match="--negatives has no effect with --dataset prepared"):
        DataConfig(dataset="prepared", data_dir="x", negatives="retrieved")
