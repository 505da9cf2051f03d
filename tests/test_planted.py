"""The planted world: its log against its own rules,
and its optimal policy against sums over all hidden paths."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from conftest import examples_at

from data import Interactions, build_examples, k_core
from eval import ranking_metrics
from loaders.counting import counting_baselines
from loaders.frozen import DataConfig
from loaders.planted import World, bayes_scores, planted_world, world_of
from loaders.table import make_interactions


def last_positions(interactions: Interactions) -> list[int]:
    return (interactions.start[1:] - 1).tolist()


# ------------------------------------------------------------------------ the log
@pytest.mark.parametrize("seed", [0, 3])
def test_nobody_reads_a_story_twice(seed):
    """Every user has one interaction a day from the first to the last,
    with as many different stories."""
    world = World(num_users=20000, seed=seed)
    interactions = planted_world(world)
    lengths = np.diff(interactions.start)
    assert len(
        np.unique(interactions.user.astype(np.int64) * interactions.num_items + interactions.item)
    ) == len(interactions.user)
    assert world.min_length <= lengths.min() and lengths.max() <= world.max_length
    day = (interactions.timestamp - interactions.timestamp.min()) // 86_400
    # a dropped repetition would leave a gap
    assert (day == np.arange(len(day)) - interactions.start[interactions.user]).all()


def test_the_world_is_a_function_of_its_seed():
    """Equal parameters give equal logs; another seed gives other titles and other readers."""
    one, again, other = (planted_world(World(num_users=300, seed=seed)) for seed in (1, 1, 2))
    for name in ("user", "item", "rating", "timestamp", "titles"):
        assert np.array_equal(getattr(one, name), getattr(again, name))
    assert not np.array_equal(one.rating[:500], other.rating[:500]) and one.titles != other.titles


def test_k_core_keeps_the_whole_world():
    """A 2-core of the default world is the world itself:
    every user and every story comes often enough."""
    interactions = planted_world(World())
    core = k_core(interactions, 2)
    assert len(core.user) == len(interactions.user) and (core.num_users, core.num_items) == (
        4000,
        20 * 16,
    )
    assert np.bincount(interactions.item).min() >= 20


@pytest.mark.parametrize(
    "world", [World(), World(seed=5), World(num_genres=40, stories_per_genre=36)]
)
def test_titles_are_unique_and_give_the_genre_away(world):
    """No title repeats, and each of its two words belongs to one genre and one place."""
    titles = world.titles()
    assert len(set(titles)) == len(titles) == world.num_genres * world.stories_per_genre
    genres: dict[tuple[int, str], set[int]] = {}
    for story, title in enumerate(titles):
        for place, word in enumerate(title.split(" ")):
            genres.setdefault((place, word), set()).add(int(world.genre(story)))
    assert all(len(found) == 1 for found in genres.values())
    assert len({word for _, word in genres}) == len(genres)  # no word is a first and a second one


def test_probabilities_sum_to_one():
    """Transitions, genres and ratings are distributions;
    a taste stays, moves to its successor or jumps anywhere."""
    world = World(num_genres=5)
    for rows in (
        world.transition(),
        world.genre_given_taste(),
        world.rating_given(np.array([True, False])),
    ):
        assert (rows >= 0).all() and np.allclose(rows.sum(1), 1)
    jump = (1 - world.stay - world.successor) / 5
    assert np.allclose(
        world.transition()[4], [world.successor + jump, jump, jump, jump, world.stay + jump]
    )
    assert np.allclose(
        world.genre_given_taste()[1],
        [world.curiosity / 4, 1 - world.curiosity] + 3 * [world.curiosity / 4],
    )


# ------------------------------------------------------------------------ the optimal policy
TINY = World(
    num_users=300,
    num_genres=2,
    stories_per_genre=6,
    words_per_genre=3,
    min_length=4,
    max_length=5,
    curiosity=0.25,
)


def brute_force(
    world: World, stories: list[int], ratings: list[int], unread: int, min_rating: float
) -> float:
    """P(next story = unread and rating >= min_rating | history),
    as a sum over every hidden path of tastes."""
    G, after = world.num_genres, len(stories)

    def p_step(taste: int, chosen: int, before: list[int]) -> float:
        genre = chosen // world.stories_per_genre
        left = world.stories_per_genre - sum(s // world.stories_per_genre == genre for s in before)
        return (1 - world.curiosity if genre == taste else world.curiosity / (G - 1)) / left

    def p_rating(taste: int, chosen: int, rating: int) -> float:
        in_taste = chosen // world.stories_per_genre == taste
        return (world.ratings_in_taste if in_taste else world.ratings_off_taste)[rating - 1]

    history, joint = 0.0, 0.0
    for path in product(range(G), repeat=after + 1):
        p = 1 / G
        for a, b in zip(path, path[1:], strict=False):
            p *= (
                world.stay * (a == b)
                + world.successor * (b == (a + 1) % G)
                + (1 - world.stay - world.successor) / G
            )
        for t in range(after):
            p *= p_step(path[t], stories[t], stories[:t]) * p_rating(
                path[t], stories[t], ratings[t]
            )
        history += p
        liked = sum(
            p_rating(path[-1], unread, rating) for rating in range(1, 6) if rating >= min_rating
        )
        joint += p * p_step(path[-1], unread, stories) * liked
    return joint / history


@pytest.mark.parametrize(
    "world", [TINY, replace(TINY, num_genres=3, min_length=3, max_length=4, stories_per_genre=4)]
)
@pytest.mark.parametrize("min_rating", [4.0, 3.0])
def test_bayes_scores_equal_the_sum_over_all_paths(world, min_rating):
    """The forward algorithm gives the log-probability that brute force gives,
    for every unread story and any history."""
    interactions = planted_world(world)
    titles = {title: story for story, title in enumerate(world.titles())}
    story = np.array([titles[title] for title in interactions.titles])
    positions, candidates = [], []
    for user in range(40):
        length = int(interactions.start[user + 1] - interactions.start[user])
        p = int(interactions.start[user]) + user % length  # histories of 0, 1, 2, ...
        read = interactions.item[interactions.start[user] : p].tolist()
        positions.append(p)
        candidates.append([item for item in range(interactions.num_items) if item not in read][:6])
    found = bayes_scores(
        world, examples_at(interactions, positions, np.array(candidates)), min_rating
    )
    for e, p in enumerate(positions):
        rows = slice(int(interactions.start[interactions.user[p]]), p)
        stories, ratings = (
            story[interactions.item[rows]].tolist(),
            interactions.rating[rows].astype(int).tolist(),
        )
        expected = [
            brute_force(world, stories, ratings, int(story[c]), min_rating) for c in candidates[e]
        ]
        np.testing.assert_allclose(np.exp(found[e]), expected, rtol=1e-9)


def test_bayes_scores_are_calibrated_on_the_log():
    """What the log does next agrees with the scores:
    the generator and the forward algorithm describe one world."""
    world = World(num_users=3000)
    interactions = planted_world(world)
    positions = last_positions(interactions)
    everything = np.tile(np.arange(interactions.num_items), (len(positions), 1))
    p = np.exp(bayes_scores(world, examples_at(interactions, positions, everything)))
    for row, position in zip(p, positions, strict=True):
        row[interactions.item[interactions.start[interactions.user[position]] : position]] = (
            0  # read before
        )
    liked, item = interactions.rating[positions] >= 4, interactions.item[positions]
    titles = world.titles()
    genre_of = np.array([world.genre(titles.index(title)) for title in interactions.titles])
    genre_p = np.stack([p[:, genre_of == g].sum(1) for g in range(world.num_genres)], 1)
    events = {"liked": (p.sum(1), liked)}  # probability and outcome per user
    for rank, best in enumerate(np.argsort(-genre_p, axis=1)[:, :3].T):
        events[f"liked, of genre {rank}"] = (
            genre_p[np.arange(len(p)), best],
            liked & (genre_of[item] == best),
        )
    for name, (probability, outcome) in events.items():
        error = (
            (outcome - probability).mean()
            / np.sqrt((probability * (1 - probability)).sum())
            * len(p)
        )
        assert abs(error) < 4, (name, probability.mean(), outcome.mean())


def test_bayes_scores_use_the_ratings():
    """A disliked story of a genre speaks against that genre, a liked one for it."""
    world = replace(TINY, num_genres=4)
    titles = dict(enumerate(world.titles()))
    stories = list(range(len(titles)))
    scores = []
    for rating in (1, 5):
        rows = [("a", 0, rating, 0), ("a", 23, 5, 1)] + [
            ("b", story, 5, story) for story in stories
        ]
        interactions = make_interactions(*zip(*rows, strict=True), titles, "planted")
        scores.append(
            bayes_scores(world, examples_at(interactions, [1], np.array([[1, 7, 13]])))[0]
        )
    assert scores[0][0] < scores[0][2] and scores[1][0] > scores[1][2]


def test_a_history_not_shown_whole_is_refused():
    """Bayes-optimal is a bound only if the prompt shows what the forward algorithm reads."""
    interactions = planted_world(World(num_users=300))
    config = DataConfig(planted_users=300, followers=4, min_history=3)
    longest = int(np.diff(interactions.start).max()) - 1
    bayes_scores(
        World(num_users=300), build_examples(interactions, replace(config, history=longest))["test"]
    )
    with pytest.raises(
        ValueError,
        match=f"history of {longest} stories is not shown whole .--history {longest - 1}",
    ):
        bayes_scores(
            World(num_users=300),
            build_examples(interactions, replace(config, history=longest - 1))["test"],
        )


def test_bayes_policy_beats_counting():
    """On the test candidates of the default world the optimum is far above popularity and Markov
    counts, and below 1."""
    world = World(num_users=1500)
    examples = build_examples(planted_world(world), DataConfig(planted_users=1500, followers=4))[
        "test"
    ]
    hits = {
        "Bayes": ranking_metrics(bayes_scores(world, examples), examples.target)[
            "hit_ratio@1"
        ].mean()
    }
    for name, scores in counting_baselines(examples).items():
        hits[name] = ranking_metrics(scores, examples.target)["hit_ratio@1"].mean()
    print(f"{len(examples)} users: " + ", ".join(f"{name} {hit:.3f}" for name, hit in hits.items()))
    assert hits["Bayes"] > hits["popularity"] + 0.4 and hits["Bayes"] > hits["Markov"] + 0.1
    assert hits["Bayes"] == max(hits.values()) < 0.95


def test_the_best_recommender_is_known_where_histories_are_shown_whole():
    """One interaction less in a prompt, or another data set, and nobody knows it."""
    whole = World.max_length - 1
    known = world_of(vars(DataConfig(planted_users=50, data_seed=3, history=whole)))
    assert known == World(num_users=50, seed=3)
    assert world_of(vars(DataConfig(history=whole - 1))) is None
    assert world_of(vars(DataConfig(dataset="movielens", data_dir="ml-1m"))) is None
