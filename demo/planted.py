"""The planted world: a made-up reading log whose best possible recommender can be computed exactly.

Stories belong to genres, and the two words of a title give the genre away. A user's taste is a hidden genre that drifts
as a Markov chain: it stays, moves on to the genre's successor, or jumps anywhere. At each step the user reads a story of
the tasted genre or, out of curiosity, of any other genre; a story within the taste is rated high, others mostly low.
Nobody reads a story twice.

    taste z_1 ──► z_2 ──► z_3 ...        stay | successor | jump
           │       │       │
         story   story   story           genre = taste, or another one out of curiosity
         rating  rating  rating          depends on whether the genre is the taste

Given the whole history (sequences are short enough to be shown whole), the forward algorithm yields the posterior of
the taste, and from it P(next story = c and its rating >= 4), the quantity that the best policy maximises over the
candidates. The Bayes-optimal figure is printed beside every model's on the same candidate sets.
"""

from dataclasses import dataclass

import numpy as np

from data import Examples, Interactions, make_interactions

NAME = "planted"

WORDS = ("stories", "read", "read")

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeio"]


@dataclass(frozen=True)
class World:
    """The parameters of the planted world; the numbers are the rule that a model has to find out."""

    num_users: int = 4000
    num_genres: int = 20
    stories_per_genre: int = 16
    words_per_genre: int = 6  # first words and second words each; their pairs are the titles
    min_length: int = (
        13  # interactions per user, drawn uniformly; the longest history must fit a prompt whole
    )
    max_length: int = 17
    stay: float = 0.65
    successor: float = 0.3
    curiosity: float = 0.15
    ratings_in_taste: tuple[float, ...] = (0.0, 0.02, 0.08, 0.4, 0.5)  # P(rating = 1..5)
    ratings_off_taste: tuple[float, ...] = (0.35, 0.35, 0.2, 0.07, 0.03)
    seed: int = 0

    def genre(self, story):
        return story // self.stories_per_genre

    def transition(self) -> np.ndarray:
        """(G, G) probability of the next taste; the successor of a genre is the next one on a circle."""
        G = self.num_genres
        jump = 1 - self.stay - self.successor
        return self.stay * np.eye(G) + self.successor * np.roll(np.eye(G), 1, axis=1) + jump / G

    def genre_given_taste(self) -> np.ndarray:
        """(G, G): row z, column g, the probability that a user of taste z picks a story of genre g."""
        G = self.num_genres
        return (1 - self.curiosity) * np.eye(G) + self.curiosity / (G - 1) * (1 - np.eye(G))

    def rating_given(self, in_taste) -> np.ndarray:
        return np.where(in_taste[..., None], self.ratings_in_taste, self.ratings_off_taste)

    def titles(self) -> list[str]:
        """Every genre has first and second words of its own; a story is one pair of them."""
        rng = np.random.default_rng(self.seed)
        count = 2 * self.num_genres * self.words_per_genre
        pairs = rng.permutation(len(SYLLABLES) ** 2)[:count]
        words = [
            (SYLLABLES[p // len(SYLLABLES)] + SYLLABLES[p % len(SYLLABLES)]).capitalize()
            for p in pairs
        ]
        first, second = np.array(words).reshape(2, self.num_genres, self.words_per_genre)
        W, pairs = self.words_per_genre, range(self.stories_per_genre)
        return [
            f"{first[g, j % W]} {second[g, (j // W + j) % W]}"
            for g in range(self.num_genres)
            for j in pairs
        ]


def planted_world(world: World) -> Interactions:
    """Draw the log of the planted world; every user has a row of arrays, and nobody repeats a story."""
    rng = np.random.default_rng([world.seed, 1])
    U, G, L = world.num_users, world.num_genres, world.max_length
    per_genre = world.stories_per_genre
    transition, genre_given_taste = (
        world.transition().cumsum(1),
        world.genre_given_taste().cumsum(1),
    )
    lengths = rng.integers(world.min_length, L + 1, size=U)
    taste = rng.integers(G, size=U)
    read = np.zeros((U, G * per_genre), bool)
    items, ratings = np.zeros((U, L), np.int64), np.zeros((U, L))
    for t in range(L):
        if t > 0:
            taste = (rng.random(U)[:, None] > transition[taste]).sum(1).clip(max=G - 1)
        genre = (rng.random(U)[:, None] > genre_given_taste[taste]).sum(1).clip(max=G - 1)
        # a uniform unread story of the genre: give every story a random key, read ones the worst
        stories = genre[:, None] * per_genre + np.arange(per_genre)
        keys = rng.random(stories.shape) + read[np.arange(U)[:, None], stories]
        items[:, t] = stories[np.arange(U), keys.argmin(1)]
        lengths = np.where(
            read[np.arange(U), items[:, t]], np.minimum(lengths, t), lengths
        )  # genre read out: the log ends
        read[np.arange(U), items[:, t]] = True
        ratings[:, t] = 1 + (
            rng.random(U)[:, None] > world.rating_given(genre == taste).cumsum(1)
        ).sum(1).clip(max=4)
    shown = np.arange(L) < lengths[:, None]
    user, step = np.nonzero(shown)
    timestamp = 1_000_000_000 + 86_400 * step
    titles = dict(enumerate(world.titles()))
    log = make_interactions(user, items[shown], ratings[shown], timestamp, titles, NAME)
    log.words = WORDS
    return log


def load(config) -> Interactions:
    """The log of the world with --planted_users and --data_seed."""
    return planted_world(World(num_users=config.planted_users, seed=config.data_seed))


def bayes_scores(
    world: World, examples: Examples, min_rating: float = 4.0, max_rating: float = 5.0
) -> np.ndarray:
    """(E, 20) log P(next story = candidate, min_rating <= rating <= max_rating | the whole history), by the forward algorithm."""
    log = examples.log
    titles = {title: i for i, title in enumerate(world.titles())}
    story = np.array([titles[t] for t in log.titles])  # item code -> story
    transition, genre_given_taste = world.transition(), world.genre_given_taste()
    liked = (np.arange(1, 6) >= min_rating) & (np.arange(1, 6) <= max_rating)
    scores = np.zeros(examples.candidates.shape)
    for e in range(len(examples)):
        p = int(examples.position[e])
        rows = slice(int(log.start[log.user[p]]), p)
        if p - rows.start > examples.history:
            raise ValueError(
                f"a history of {p - rows.start} stories is not shown whole (--history {examples.history})"
            )
        taste = np.full(world.num_genres, 1 / world.num_genres)
        remaining = np.full(
            world.num_genres, world.stories_per_genre, float
        )  # unread stories per genre
        genres = world.genre(story[log.item[rows]])
        for genre, rating in zip(genres, log.rating[rows].astype(int), strict=True):
            in_taste = np.arange(world.num_genres) == genre
            # P(this genre, this story of it, this rating | taste); the 1 / remaining is the same for every taste
            taste = (
                taste * genre_given_taste[:, genre] * world.rating_given(in_taste)[:, rating - 1]
            )
            taste = taste @ transition / taste.sum()
            remaining[genre] -= 1
        # P(a certain unread story of genre g, rated high): sum over tastes
        high = genre_given_taste * (
            world.rating_given(np.eye(world.num_genres, dtype=bool)) * liked
        ).sum(-1)
        scores[e] = np.log((taste @ high) / remaining)[world.genre(story[examples.candidates[e]])]
    return scores
