"""The planted world: a made-up reading log whose best possible recommender can be computed exactly.

Stories belong to genres, which the two words of a title give away. A user's taste is a hidden genre
that stays, moves on to the genre's successor, or jumps anywhere. At each step the user reads a
story of the tasted genre or, out of curiosity, of any other; a story within the taste is rated
high, others mostly low. Nobody reads a story twice.

    taste z_1 ──► z_2 ──► z_3 ...        stay | successor | jump
           │       │       │
         story   story   story           genre = taste, or another one out of curiosity
         rating  rating  rating          depends on whether the genre is the taste

Given the whole history, the forward algorithm yields the posterior of the taste, and from it
P(next story = c and its rating >= 4), which the best policy maximises over the candidates.

    python -m loaders.planted log.csv    the world as an ordinary CSV, to try an own log with

Legend: U users, L steps, G genres, E examples."""

import itertools
import sys
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv

from common import arg, parse_config, print0, run_cli, writing
from data import Examples, Interactions, select_rows

NAME, WORDS = "planted", ("stories", "read", "read")
# what suits this data set, unless other values are given: its readers have 13 to 17 interactions
DEFAULTS = {"followers": 3, "min_history": 4, "train_size": 18000, "test_size": 500}

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeio"]


@dataclass(frozen=True)
class World:
    """The parameters of the planted world: the rule that a model has to find out."""

    num_users: int = 4000
    num_genres: int = 20
    stories_per_genre: int = 16
    words_per_genre: int = 6  # first words and second words each; their pairs are the titles
    # interactions per user, drawn uniformly; the longest history must fit a prompt whole
    min_length: int = 13
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
        """(G, G) probability of the next taste; successors are neighbours on a circle."""
        G = self.num_genres
        jump = 1 - self.stay - self.successor
        return self.stay * np.eye(G) + self.successor * np.roll(np.eye(G), 1, axis=1) + jump / G

    def genre_given_taste(self) -> np.ndarray:
        """(G, G): row z, column g, the probability that a taste z picks a story of genre g."""
        G = self.num_genres
        return (1 - self.curiosity) * np.eye(G) + self.curiosity / (G - 1) * (1 - np.eye(G))

    def rating_given(self, in_taste) -> np.ndarray:
        return np.where(in_taste[..., None], self.ratings_in_taste, self.ratings_off_taste)

    def titles(self) -> list[str]:
        """Every genre has first and second words of its own; a story is one pair of them."""
        rng = np.random.default_rng(self.seed)
        count = 2 * self.num_genres * self.words_per_genre
        pairs = rng.permutation(len(SYLLABLES) ** 2)[:count]
        syllables = (divmod(pair, len(SYLLABLES)) for pair in pairs)
        words = [(SYLLABLES[first] + SYLLABLES[second]).capitalize() for first, second in syllables]
        W = self.words_per_genre
        firsts, seconds = np.array(words).reshape(2, self.num_genres, W)
        stories = itertools.product(range(self.num_genres), range(self.stories_per_genre))
        return [f"{firsts[g, j % W]} {seconds[g, (j // W + j) % W]}" for g, j in stories]


def planted_world(world: World) -> Interactions:
    """Draw the log of the planted world; a user is a row of arrays, nobody repeats a story."""
    rng = np.random.default_rng([world.seed, 1])
    U, G, L = world.num_users, world.num_genres, world.max_length
    per_genre = world.stories_per_genre
    users = np.arange(U)
    transition = world.transition().cumsum(1)
    genre_given_taste = world.genre_given_taste().cumsum(1)
    lengths = rng.integers(world.min_length, L + 1, size=U)
    taste = rng.integers(G, size=U)
    read = np.zeros((U, G * per_genre), bool)
    items, ratings = np.zeros((U, L), np.int64), np.zeros((U, L))
    for t in range(L):
        if t > 0:
            taste = draw(rng, transition[taste])
        genre = draw(rng, genre_given_taste[taste])

        # a uniform unread story of the genre: give every story a random key, read ones the worst
        stories = genre[:, None] * per_genre + np.arange(per_genre)
        keys = rng.random(stories.shape) + read[users[:, None], stories]
        items[:, t] = stories[users, keys.argmin(1)]
        read_out = read[users, items[:, t]]  # nothing of the genre is left: the log ends
        lengths = np.where(read_out, np.minimum(lengths, t), lengths)
        read[users, items[:, t]] = True
        ratings[:, t] = 1 + draw(rng, world.rating_given(genre == taste).cumsum(1))

    shown = np.arange(L) < lengths[:, None]
    user, step = np.nonzero(shown)
    interactions = Interactions(
        user,
        items[shown],
        ratings[shown].astype(np.float32),
        timestamp=1_000_000_000 + 86_400 * step,
        start=np.concatenate([[0], np.cumsum(shown.sum(1))]),
        titles=world.titles(),
        user_ids=[str(u) for u in users],
        item_ids=[str(i) for i in range(G * per_genre)],
        name=NAME,
        words=WORDS,
    )
    return select_rows(interactions, np.ones(len(user), bool))  # stories that nobody read are none


def load(config) -> Interactions:
    """The log of the world with --planted_users and --data_seed."""
    return planted_world(World(num_users=config.planted_users, seed=config.data_seed))


def draw(rng, cumulated: np.ndarray) -> np.ndarray:
    """(U,) one index per row of cumulated probabilities (U, n)."""
    beyond = rng.random(len(cumulated))[:, None] > cumulated
    return beyond.sum(1).clip(max=cumulated.shape[1] - 1)


def world_of(options: dict) -> World | None:
    """The planted world of these data options, if they show histories whole; else None."""
    if options["dataset"] != "planted" or options["history"] < World.max_length - 1:
        return None
    return World(num_users=options["planted_users"], seed=options["data_seed"])


def bayes_scores(
    world: World, examples: Examples, min_rating: float = 4.0, max_rating: float = 5.0
) -> np.ndarray:
    """(E, 20) log P(next story = candidate, min_rating <= rating <= max_rating | whole history)."""
    interactions = examples.interactions
    titles = {title: i for i, title in enumerate(world.titles())}
    story = np.array([titles[t] for t in interactions.titles])  # item code -> story
    genre_given_taste = world.genre_given_taste()
    liked = (np.arange(1, 6) >= min_rating) & (np.arange(1, 6) <= max_rating)
    own_genre = world.rating_given(np.eye(world.num_genres, dtype=bool))  # (G, G, 5)
    # P(a certain unread story of genre g, rated high | taste), but for 1 / unread stories
    high = genre_given_taste * (own_genre * liked).sum(-1)
    scores = np.zeros(examples.candidates.shape)
    starts = interactions.start[interactions.user[examples.position]]
    if (longest := int((examples.position - starts).max())) > examples.history:
        shown = f"--history {examples.history}"
        raise ValueError(f"a history of {longest} stories is not shown whole ({shown})")
    for e, rows in enumerate(map(slice, starts.tolist(), examples.position.tolist())):
        genres = world.genre(story[interactions.item[rows]])
        taste = forward(world, genres, interactions.rating[rows].astype(int))
        read = np.bincount(genres, minlength=world.num_genres)
        unread = (world.stories_per_genre - read).astype(float)
        candidates = world.genre(story[examples.candidates[e]])
        scores[e] = np.log((taste @ high) / unread)[candidates]
    return scores


def forward(world: World, genres: np.ndarray, ratings: np.ndarray) -> np.ndarray:
    """(G,) posterior of the taste after a history, by the forward algorithm."""
    transition, genre_given_taste = world.transition(), world.genre_given_taste()
    taste = np.full(world.num_genres, 1 / world.num_genres)
    for genre, rating in zip(genres, ratings, strict=True):
        # P(this genre, this story of it, this rating | taste); the 1 / unread is the same for all
        rating_given = world.rating_given(np.arange(world.num_genres) == genre)[:, rating - 1]
        taste = taste * genre_given_taste[:, genre] * rating_given
        taste = taste @ transition / taste.sum()
    return taste


# ------------------------------------------------------------------------ as a file
@dataclass(frozen=True)
class FileConfig:
    """Write the planted world as a CSV file."""

    file: str = arg("log.csv", "the file; the first argument without a name is taken for it")
    planted_users: int = arg(4000, "users", at_least=1)
    data_seed: int = arg(0, "seed of the world")


def main(argv: list[str]) -> None:
    named = [f"--file={a}" if n == 0 and not a.startswith("-") else a for n, a in enumerate(argv)]
    config = parse_config(FileConfig, named)
    log = load(config)
    columns = {  # an own log has other names than ours
        "reader": [f"reader-{log.user_ids[user]}" for user in log.user],
        "story": [f"story-{log.item_ids[item]}" for item in log.item],
        "stars": log.rating.astype(int),
        "read_at": log.timestamp,
        "name": [log.titles[item] for item in log.item],
    }
    with writing(config.file):
        pa.csv.write_csv(pa.table(columns), config.file)
    fields = ("user", "item", "rating", "timestamp", "title")
    names = ",".join(f"{field}={name}" for field, name in zip(fields, columns))
    flags = " ".join(f"--{name} {value}" for name, value in DEFAULTS.items())
    print0(
        f"{config.file}: {len(log.user):,} interactions of {log.num_users:,} readers with "
        f"{log.num_items} stories; read it with\n--dataset csv --data_dir {config.file} "
        f"--columns {names} {flags}"
    )


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
