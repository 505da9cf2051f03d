"""Retrieved candidates: Markov over the whole catalogue, never touched,
fitted on training rows alone."""

from dataclasses import replace

import numpy as np
import pytest

from data import Interactions, build_examples
from eval import ranking_metrics
from loaders.counting import DECAY, MAX_DISTANCE, markov, markov_top
from loaders.frozen import DataConfig
from loaders.planted import World, planted_world
from loaders.table import make_interactions

CONFIG = DataConfig(followers=3, min_history=4, train_size=50, negatives="retrieved")


@pytest.fixture(scope="module")
def interactions() -> Interactions:
    return planted_world(World(num_users=150))


def plain_scores(interactions: Interactions, row: int, history: int) -> dict[int, float]:
    """Item -> Markov's score for the history before a row, by loops over all users."""
    pairs, counts = {}, {}
    for user in range(interactions.num_users):
        items = interactions.item[
            interactions.start[user] : interactions.start[user + 1] - 2
        ].tolist()
        for i, first in enumerate(items):
            counts[first] = counts.get(first, 0) + 1
            for distance, second in enumerate(items[i + 1 : i + 1 + MAX_DISTANCE], 1):
                pairs[first, second] = pairs.get((first, second), 0) + 1 / distance
    begin = interactions.start[interactions.user[row]]
    shown = interactions.item[max(begin, row - history) : row].tolist()[::-1]
    scores = {}
    for item in range(interactions.num_items):
        total = sum(DECAY**age * pairs.get((h, item), 0) for age, h in enumerate(shown))
        scores[item] = total / counts.get(item, 1) ** 0.5
    return scores


def test_retrieved_items_are_the_best_of_a_plain_loop(interactions):
    """Their scores are the highest of all never-touched items,
    and those that markov() gives them."""
    rows = interactions.start[1:4] - 1
    found = markov_top(interactions, rows, 20, 12)
    examples = build_examples(interactions, replace(CONFIG, negatives="uniform"))["test"].select(
        [0, 0, 0]
    )
    scored = markov(replace(examples, position=rows, candidates=found.astype(np.int32)))
    for e, row in enumerate(rows.tolist()):
        user = interactions.user[row]
        touched = set(
            interactions.item[interactions.start[user] : interactions.start[user + 1]].tolist()
        )
        assert not touched & set(found[e].tolist()) and len(set(found[e].tolist())) == 12
        plain = plain_scores(interactions, row, 20)
        best = sorted((score for item, score in plain.items() if item not in touched), reverse=True)
        assert [plain[i] for i in found[e].tolist()] == pytest.approx(best[:12])
        assert scored[e] == pytest.approx(best[:12])


def test_equal_scores_go_to_the_more_popular_item():
    """Nothing follows the history: all scores are 0, and popularity, then the code, decides."""
    sequences = [[0, 1, 2], [3, 4, 5, 6], [3, 5, 6, 7], [5, 3, 8, 9]]
    rows = [(u, i, 5, t) for u, items in enumerate(sequences) for t, i in enumerate(items)]
    interactions = make_interactions(*zip(*rows, strict=True), {i: f"item {i}" for i in range(10)})
    found = markov_top(interactions, np.array([2]), 20, 8)
    assert found.tolist() == [[3, 5, 4, 6, 7, 8, 9, -1]]  # 3 comes thrice, 5 twice, 4 once


def test_every_list_holds_the_target_and_retrieved_items(interactions):
    """Training lists hold followers beside them;
    what `seen` leaves in may have been touched elsewhere."""
    splits = build_examples(interactions, CONFIG, markov_top)
    for split, followers in (("train", 3), ("val", 1), ("test", 1)):
        examples = splits[split]
        assert (examples.is_random.sum(1) == 20 - followers).all()
        wanted = markov_top(interactions, examples.position, 20, 20 - followers)
        for e in range(len(examples)):
            retrieved = examples.candidates[e][examples.is_random[e]]
            assert set(retrieved.tolist()) == set(wanted[e].tolist())
            assert len(set(examples.candidates[e].tolist())) == 20
    seen = build_examples(interactions, replace(CONFIG, exclude="seen", history=8), markov_top)[
        "test"
    ]
    touched = 0
    for e, row in enumerate(seen.position.tolist()):
        retrieved = set(seen.candidates[e][seen.is_random[e]].tolist())
        begin = interactions.start[interactions.user[row]]
        assert not retrieved & set(interactions.item[max(begin, row - 8) : row + 1].tolist())
        touched += len(retrieved & set(interactions.item[begin:row].tolist()))
    assert touched


def test_retrieved_lists_are_harder_and_have_the_same_users(interactions):
    """Test users and targets are those of uniform lists; Markov finds fewer of them."""
    uniform = build_examples(interactions, replace(CONFIG, negatives="uniform"))["test"]
    hard = build_examples(interactions, CONFIG, markov_top)["test"]
    assert (uniform.position == hard.position).all()
    ratio = {}
    for name, examples in (("uniform", uniform), ("hard", hard)):
        ratio[name] = ranking_metrics(markov(examples), examples.target)["hit_ratio@1"].mean()
    assert ratio["hard"] < 0.5 * ratio["uniform"]


def test_the_last_two_interactions_change_nothing(interactions):
    """Retrieval is fitted on training interactions: other last items retrieve the same."""
    rows = interactions.start[1:5] - 1
    before = markov_top(interactions, rows - 2, 20, 9, exclude=np.zeros((4, 1), int))
    item, last = interactions.item.copy(), interactions.start[1:] - 1
    item[last], item[last - 1] = item[last - 1], item[last]
    poisoned = replace(interactions, item=item)
    assert (markov_top(poisoned, rows - 2, 20, 9, exclude=np.zeros((4, 1), int)) == before).all()


def test_a_user_who_touched_almost_everything_is_refused():
    items = [(0, i, 5, i) for i in range(12)] + [(1, i, 5, i) for i in range(25)]
    interactions = make_interactions(*zip(*items, strict=True), {i: f"item {i}" for i in range(25)})
    with pytest.raises(ValueError, match="user 1: fewer than 17 items left that this user never"):
        build_examples(interactions, replace(CONFIG, min_history=3), markov_top)
    with pytest.raises(ValueError, match="needs a recommender"):
        build_examples(interactions, CONFIG)
    with pytest.raises(ValueError, match="its candidates are fixed"):
        DataConfig(dataset="prepared", data_dir="x", negatives="retrieved")
