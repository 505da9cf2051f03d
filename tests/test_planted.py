"""The planted world's log against its rules, its optimum against sums over all hidden paths."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from conftest import examples_at

from loaders.frozen import DataConfig, load_interactions
from loaders.planted import World, bayes_scores, main, planted_world, world_of


# ------------------------------------------------------------------------ the log
def test_nobody_reads_a_story_twice():
    """One interaction a day from the first to the last; the seed decides."""
    world = World(num_users=20000, seed=3)
    log, again, other = (planted_world(replace(world, seed=seed)) for seed in (3, 3, 2))
    lengths = np.diff(log.start)
    assert len(np.unique(log.user.astype(np.int64) * log.num_items + log.item)) == len(log.user)
    assert world.min_length <= lengths.min() and lengths.max() <= world.max_length
    day = (log.timestamp - log.timestamp.min()) // 86_400
    assert (day == np.arange(len(day)) - log.start[log.user]).all()
    for name in ("user", "item", "rating", "timestamp", "titles"):
        assert np.array_equal(getattr(log, name), getattr(again, name))
    assert not np.array_equal(log.rating[:500], other.rating[:500]) and log.titles != other.titles


@pytest.mark.parametrize("world", [World(seed=5), World(num_genres=40, stories_per_genre=36)])
def test_titles_are_unique_and_give_the_genre_away(world):
    """Each of the two words belongs to one genre and one place."""
    titles = world.titles()
    assert len(set(titles)) == len(titles) == world.num_genres * world.stories_per_genre
    meant: dict[str, tuple] = {}
    for story, title in enumerate(titles):
        for place, word in enumerate(title.split(" ")):
            genre = story // world.stories_per_genre
            assert meant.setdefault(word, (place, genre)) == (place, genre)


def test_the_world_as_a_file_is_read_as_an_own_log(tmp_path, capsys):
    file = tmp_path / "log.csv"
    main([str(file)])
    printed = capsys.readouterr().out.split()
    columns = printed[printed.index("--columns") + 1]
    read = load_interactions(DataConfig(dataset="csv", data_dir=str(file), columns=columns))
    log, order = planted_world(World()), {u: n for n, u in enumerate(read.user_ids)}
    rows = sorted(range(len(log.user)), key=lambda r: (order[f"reader-{log.user[r]}"], r))
    assert [read.titles[i] for i in read.item] == [log.titles[i] for i in log.item[rows]]
    assert (read.rating == log.rating[rows]).all()
    assert (read.timestamp == log.timestamp[rows]).all()


# ------------------------------------------------------------------------ the optimal policy
TINY = World(
    num_users=300, num_genres=2, stories_per_genre=6, words_per_genre=3, min_length=4, max_length=5,
    curiosity=0.25,
)  # fmt: skip


def brute_force(world: World, stories: list, ratings: list, unread: int, min_rating: float):
    """P(next story is unread and liked | history), summed over every hidden path of tastes."""
    G, size, after = world.num_genres, world.stories_per_genre, len(stories)

    def p_move(a: int, b: int) -> float:
        jump = (1 - world.stay - world.successor) / G
        return world.stay * (a == b) + world.successor * (b == (a + 1) % G) + jump

    def p_step(taste: int, chosen: int, before: list[int]) -> float:
        left = size - sum(s // size == chosen // size for s in before)
        return (
            1 - world.curiosity if chosen // size == taste else world.curiosity / (G - 1)
        ) / left

    def p_rating(taste: int, chosen: int, rating: int) -> float:
        liked = world.ratings_in_taste if chosen // size == taste else world.ratings_off_taste
        return liked[rating - 1]

    history, joint = 0.0, 0.0
    for path in product(range(G), repeat=after + 1):
        p = np.prod([1 / G, *(p_move(a, b) for a, b in zip(path[:-1], path[1:], strict=True))])
        for t in range(after):
            p *= p_step(path[t], stories[t], stories[:t])
            p *= p_rating(path[t], stories[t], ratings[t])
        history += p
        liked = sum(p_rating(path[-1], unread, r) for r in range(1, 6) if r >= min_rating)
        joint += p * p_step(path[-1], unread, stories) * liked
    return joint / history


THREE = replace(TINY, num_genres=3, min_length=3, max_length=4, stories_per_genre=4)


@pytest.mark.parametrize("world", [TINY, THREE])
@pytest.mark.parametrize("min_rating", [4.0, 3.0])
def test_bayes_scores_equal_the_sum_over_all_paths(world, min_rating):
    log, titles = planted_world(world), world.titles()
    story = np.array([titles.index(title) for title in log.titles])
    positions, candidates = [], []
    for user in range(40):
        start, end = log.start[user : user + 2].tolist()
        positions.append(start + user % (end - start))  # histories of 0, 1, 2, ...
        read = log.item[start : positions[-1]]
        candidates.append(np.setdiff1d(np.arange(log.num_items), read)[:6])
    found = bayes_scores(world, examples_at(log, positions, np.array(candidates)), min_rating)
    for e, p in enumerate(positions):
        rows = slice(log.start[log.user[p]], p)
        stories, ratings = story[log.item[rows]].tolist(), log.rating[rows].astype(int).tolist()
        unread = story[candidates[e]].tolist()
        expected = [brute_force(world, stories, ratings, s, min_rating) for s in unread]
        np.testing.assert_allclose(np.exp(found[e]), expected, rtol=1e-9)


def test_bayes_scores_are_calibrated_on_the_log():
    """The generator and the forward algorithm describe one world."""
    world = World(num_users=3000)
    log = planted_world(world)
    last = log.start[1:] - 1
    everything = np.tile(np.arange(log.num_items), (len(last), 1))
    p = np.exp(bayes_scores(world, examples_at(log, last.tolist(), everything)))
    for row, start, end in zip(p, log.start, last, strict=False):
        row[log.item[start:end]] = 0  # read before
    for count in (log.num_items, 40, 10):  # P(liked, and among the likeliest of these)
        best = np.argsort(-p, axis=1)[:, :count]
        chance = np.take_along_axis(p, best, 1).sum(1)
        outcome = (log.rating[last] >= 4) & (best == log.item[last][:, None]).any(1)
        assert abs((outcome - chance).sum()) < 4 * np.sqrt((chance * (1 - chance)).sum())


def test_a_history_not_shown_whole_has_no_known_optimum():
    assert np.diff(planted_world(World(num_users=300)).start).max() == World.max_length
    whole = {"planted_users": 50, "data_seed": 3, "history": World.max_length - 1}
    whole |= {"ratings": True, "history_items": "all"}
    assert world_of(whole | {"dataset": "planted"}) == World(num_users=50, seed=3)
    for other in ({"history": World.max_length - 2}, {"ratings": False}, {"dataset": "movielens"}):
        assert world_of(whole | {"dataset": "planted"} | other) is None
