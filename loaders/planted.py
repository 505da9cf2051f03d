"""The planted world: a made-up reading log whose best possible recommender can be computed exactly.

Stories belong to genres, which the two words of a title give away. A user's taste is a hidden genre
that stays, moves on to its successor, or jumps anywhere. At each step the user reads a story of the
tasted genre, rated high, or, out of curiosity, of any other, mostly rated low. `python -m
loaders.planted log.csv` writes it as a CSV. Legend: U users, L steps, G genres, E examples."""

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import run_cli
from data import Examples, Interactions
from loaders.table import Rows, finish

NAME, WORDS = "planted", ("stories", "read", "read")
DEFAULTS = {"followers": 3, "min_history": 4, "train_size": 18000, "test_size": 500}  # of options

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeio"]
NAMES = np.array([(a + b).capitalize() for a, b in itertools.product(SYLLABLES, repeat=2)])


@dataclass(frozen=True)
class World:
    """The parameters of the planted world: the rule that a model has to find out."""

    num_users: int = 4000
    num_genres: int = 20
    stories_per_genre: int = 16
    words_per_genre: int = 6  # first words and second words each; their pairs are the titles
    min_length: int = 13  # interactions per user, drawn uniformly
    max_length: int = 17
    stay: float = 0.65
    successor: float = 0.3
    curiosity: float = 0.15
    ratings_in_taste: tuple[float, ...] = (0.0, 0.02, 0.08, 0.4, 0.5)  # P(rating = 1..5)
    ratings_off_taste: tuple[float, ...] = (0.35, 0.35, 0.2, 0.07, 0.03)
    seed: int = 0

    def transition(self) -> np.ndarray:
        """(G, G) probability of the next taste; successors are neighbours on a circle."""
        G, jump = self.num_genres, 1 - self.stay - self.successor
        return self.stay * np.eye(G) + self.successor * np.roll(np.eye(G), 1, axis=1) + jump / G

    def genre_given_taste(self) -> np.ndarray:
        """(G, G): row z, column g, the probability that a taste z picks a story of genre g."""
        G = self.num_genres
        return (1 - self.curiosity) * np.eye(G) + self.curiosity / (G - 1) * (1 - np.eye(G))

    def rating_given(self, in_taste) -> np.ndarray:
        return np.where(in_taste[..., None], self.ratings_in_taste, self.ratings_off_taste)

    def titles(self) -> list[str]:
        """Every genre has first and second words of its own; a story is one pair of them."""
        G, W = self.num_genres, self.words_per_genre
        drawn = np.random.default_rng(self.seed).permutation(len(NAMES))[: 2 * G * W]
        firsts, seconds = NAMES[drawn].reshape(2, G, W)
        stories = itertools.product(range(G), range(self.stories_per_genre))
        return [f"{firsts[g, j % W]} {seconds[g, (j // W + j) % W]}" for g, j in stories]


def planted_world(world: World) -> Interactions:
    """Draw the log of the planted world; a user is a row of arrays, nobody repeats a story."""
    rng, users = np.random.default_rng([world.seed, 1]), np.arange(world.num_users)
    U, G, L, per_genre = len(users), world.num_genres, world.max_length, world.stories_per_genre
    lengths = rng.integers(world.min_length, L + 1, size=U)
    taste = rng.integers(G, size=U)
    read = np.zeros((U, G * per_genre), bool)
    items, ratings = np.zeros((2, U, L), np.int64)
    for t in range(L):
        taste = draw(rng, world.transition()[taste]) if t else taste
        genre = draw(rng, world.genre_given_taste()[taste])
        # a uniform unread story of the genre: give every story a random key, read ones the worst
        stories = genre[:, None] * per_genre + np.arange(per_genre)
        keys = rng.random(stories.shape) + read[users[:, None], stories]
        items[:, t] = stories[users, keys.argmin(1)]
        lengths = np.minimum(lengths, np.where(keys.min(1) < 1, L, t))  # all are read: the end
        read[users, items[:, t]] = True
        ratings[:, t] = 1 + draw(rng, world.rating_given(genre == taste))
    user, step = np.nonzero(np.arange(L) < lengths[:, None])
    item, rating = items[user, step].astype(np.int32), ratings[user, step].astype(np.float32)
    times, ids = 1_000_000_000 + 86_400 * step, [*map(str, range(max(U, G * per_genre)))]
    rows = Rows(user.astype(np.int32), item, rating, times, 1, ids[:U], ids[: G * per_genre])
    return finish(rows, world.titles(), NAME, WORDS, key=int)


def draw(rng, shares: np.ndarray) -> np.ndarray:
    """(U,) one index per row of probabilities (U, n)."""
    beyond = rng.random(len(shares))[:, None] > shares.cumsum(1)
    return beyond.sum(1).clip(max=shares.shape[1] - 1)


def load(config) -> Interactions:
    """The log of the world with --planted_users and --data_seed."""
    return planted_world(World(num_users=config.planted_users, seed=config.data_seed))


def world_of(options: dict) -> World | None:
    """The planted world of these data options, if they show histories whole; else None."""
    whole = options["dataset"] == NAME and options["history"] >= World.max_length - 1
    whole = whole and options["ratings"] and options["history_items"] == "all"
    return World(num_users=options["planted_users"], seed=options["data_seed"]) if whole else None


def bayes_scores(world: World, examples: Examples, low: float = 4.0, high: float = 5.0):
    """(E, 20) log P(next story = candidate, low <= its rating <= high | history), by the forward
    algorithm, which yields the posterior of the taste (G,), from histories that are shown whole."""
    log, G, stars = examples.interactions, world.num_genres, np.arange(1, 6)
    genre = np.array(log.item_ids, int) // world.stories_per_genre  # of each item
    picked, transition = world.genre_given_taste(), world.transition()
    rated = world.rating_given(np.eye(G, dtype=bool))  # (G, G, 5) of a taste and a story's genre
    wanted = picked * (rated * ((stars >= low) & (stars <= high))).sum(-1)
    scores = np.zeros(examples.candidates.shape)
    for e, row in enumerate(examples.position.tolist()):
        start, taste = log.start[log.user[row]], np.full(G, 1 / G)
        genres, ratings = genre[log.item[start:row]], log.rating[start:row].astype(int)
        for g, rating in zip(genres, ratings):
            # but for 1 / unread stories of the genre, which is the same for all tastes
            taste = taste * picked[:, g] * rated[:, g, rating - 1]
            taste = taste @ transition / taste.sum()
        unread = world.stories_per_genre - np.bincount(genres, minlength=G)
        scores[e] = np.log((taste @ wanted) / unread)[genre[examples.candidates[e]]]
    return scores


def main(argv: list[str] | None = None) -> None:
    """Write the planted world as a CSV, whose columns have other names than ours."""
    parser = argparse.ArgumentParser(prog="python -m loaders.planted", description=main.__doc__)
    parser.add_argument("file")
    file, log = parser.parse_args(argv).file, planted_world(World())
    rows = zip(log.user, log.item, log.rating, log.timestamp)
    lines = [f"reader-{u},story-{i},{r:.0f},{t},{log.titles[i]}\n" for u, i, r, t in rows]
    Path(file).write_text("reader,story,stars,read_at,name\n" + "".join(lines))
    names = "user=reader,item=story,rating=stars,timestamp=read_at,title=name"
    print(f"read it with\n--dataset csv --data_dir {file} --columns {names}")


if __name__ == "__main__":
    run_cli(main)
