"""Frozen examples: options, splits, candidates, preference scores, and the prompt's text.

Every prefix of a user's log is a possible example: the history is what lies before a position, the candidates are
what follows it plus random items the user never touched. A user's last interaction is the test case, the one before it
validation, all earlier ones training. Candidates, negatives and templates are drawn once and shared by every model that
is compared.

Legend: E examples, F followers among the candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isnan, nan

import numpy as np

from common import arg, changed_options, check_options
from interactions import Interactions
from losses import preference_score
from ownlog import parse_columns

NUM_CANDIDATES = 20
DATASETS = (
    "planted",
    "movielens",
    "amazon",
    "steam",
    "beeradvocate",
    "lastfm",
    "csv",
    "jsonl",
    "recbole",
    "prepared",
)

NUM_TEMPLATES = 5  # as many as TEMPLATES has, below


@dataclass(frozen=True)
class DataConfig:
    """Turn a raw interaction log into frozen examples; print its statistics and one rendered example."""

    dataset: str = arg(
        "planted",
        f"one of {', '.join(DATASETS)} (loaders.py, ownlog.py)",
        group="data",
        choices=DATASETS,
    )
    data_dir: str = arg("", "the raw file, or the folder (MovieLens: or zip) with the raw files")
    columns: str = arg(
        "",
        "csv, jsonl, recbole: names of your columns, user=...,item=...,rating=...,timestamp=...,title=...",
    )
    item_file: str = arg("", "csv, jsonl, recbole: a second file, with item and title")
    percentile: str = arg(
        "",
        "ratings are ranks of amounts (hours, plays) among those of the same item, user, or all; empty: steam, lastfm by item",
        choices=("", "item", "user", "all"),
    )
    repeats: str = arg(
        "last",
        "csv, jsonl, recbole: of a repeated user-item pair the last counts, or the sum of its amounts",
        choices=("last", "sum"),
    )
    beer_title: str = arg(
        "full", "beeradvocate: full (name, strength, style) or name", choices=("full", "name")
    )
    download: bool = arg(False, "fetch MovieLens-1M to data_dir first, and check its checksum")
    planted_users: int = arg(4000, "users of the planted world", at_least=1)
    core: int = arg(
        0,
        "keep users and items with at least this many interactions (iterated k-core); 0 = all",
        at_least=0,
    )
    train_size: int = arg(10000, "training examples, drawn from all prefixes; 0 = all", at_least=0)
    test_size: int = arg(0, "validation and test users each, drawn from all; 0 = all", at_least=0)
    history: int = arg(20, "most recent interactions shown in a prompt", at_least=1)
    history_items: str = arg(
        "all", "items of a history: all, or positive (only liked ones)", choices=("all", "positive")
    )
    ratings: bool = arg(True, "show the ratings of a history; off: titles alone")
    min_history: int = arg(5, "interactions that must lie before an example", at_least=1)
    followers: int = arg(
        10,
        "later interactions among the training candidates; random items fill up to 20",
        at_least=1,
        at_most=NUM_CANDIDATES - 1,
    )
    positive: str = arg(
        "argmax",
        "chosen training item: argmax of the preference score, or the first one liked",
        choices=("argmax", "first"),
    )
    min_rating: float = arg(4.0, "lowest rating of a liked item", at_least=0)
    decay: float = arg(0.5, "preference score = rating / (1 + steps)^decay", at_least=0)
    neg_rating: float = arg(3.0, "rating given to random candidates", above=0)
    neg_step: int = arg(10, "steps given to random candidates", at_least=0)
    exclude: str = arg(
        "all",
        "random candidates exclude all items of the user, or only those seen in the prompt",
        choices=("all", "seen"),
    )
    negatives: str = arg(
        "uniform",
        "random candidates are drawn uniform or by popularity",
        choices=("uniform", "popularity"),
    )
    num_templates: int = arg(
        0, "prompt templates in use; 0 = all", at_least=0, at_most=NUM_TEMPLATES
    )
    data_seed: int = arg(0, "seed of candidates, negatives, order and templates")
    prepared_dir: str = arg("prepared", "where prepared examples are kept")

    def __post_init__(self):
        check_options(self)
        own = self.dataset in ("csv", "jsonl", "recbole")
        changed = changed_options(self)
        for name, fits in (
            ("columns", own),
            ("item_file", own),
            ("repeats", own),
            ("beer_title", self.dataset == "beeradvocate"),
        ):
            if name in changed and not fits:
                raise ValueError(f"--{name} has no effect with --dataset {self.dataset}")
        if self.percentile and self.dataset in ("planted", "movielens", "prepared"):
            raise ValueError(
                f"--percentile has no effect with --dataset {self.dataset}, which has ratings"
            )
        if self.core and self.dataset == "prepared":
            raise ValueError(
                "--core has no effect with --dataset prepared: its candidates are fixed"
            )
        parse_columns(self.columns)
        if not 1 <= self.min_history <= self.history:
            raise ValueError(
                f"--min_history must be between 1 and --history {self.history}, got {self.min_history}"
            )


# ------------------------------------------------------------------------------------------------ examples
@dataclass
class Example:
    """One example, readable: what the prompt shows, and what is known about its candidates."""

    dataset: str  # chooses the words of the prompt
    user: str
    history: list[tuple[str, float]]  # (title, rating), oldest first
    candidates: list[str]
    target: int  # index of the chosen candidate
    scores: list[float]  # preference score of each candidate
    template: int


@dataclass
class Examples:
    """A split with frozen candidates. Example e predicts what follows row position[e] - 1 of the log."""

    log: Interactions
    split: str
    history: int  # interactions shown
    position: np.ndarray  # (E,) int64
    candidates: np.ndarray  # (E, 20) int32 item codes
    target: np.ndarray  # (E,) int32 slot of the chosen item
    scores: np.ndarray  # (E, 20) float32
    is_random: np.ndarray  # (E, 20) bool
    others: np.ndarray  # (E, 19) int32: the other slots in random order; negatives are its first K
    template: np.ndarray  # (E,) int32
    min_shown_rating: float = 0.0  # history items with a lower one are not shown
    ratings: bool = True  # of the history are shown

    ARRAYS = ("position", "candidates", "target", "scores", "is_random", "others", "template")

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, e: int) -> Example:
        log, rows = self.log, self.history_rows(e)
        return Example(
            dataset=log.name,
            user=log.user_ids[log.user[self.position[e]]],
            history=[
                (log.titles[log.item[r]], float(log.rating[r]) if self.ratings else nan)
                for r in rows
            ],
            candidates=[log.titles[c] for c in self.candidates[e]],
            target=int(self.target[e]),
            scores=self.scores[e].tolist(),
            template=int(self.template[e]),
        )

    def history_rows(self, e: int) -> Sequence[int]:
        """Rows of the log that the prompt shows, oldest first."""
        p = int(self.position[e])
        start = int(self.log.start[self.log.user[p]])
        if self.min_shown_rating:
            return (start + np.flatnonzero(self.log.rating[start:p] >= self.min_shown_rating))[
                -self.history :
            ].tolist()
        return range(max(start, p - self.history), p)

    def select(self, indices) -> "Examples":
        arrays = {name: getattr(self, name)[indices] for name in self.ARRAYS}
        return replace(self, **arrays)

    def negatives(self, num_negatives: int, source: str = "both") -> np.ndarray:
        """(E, K) slots of the rejected items: the first K others, or the first K that are random / that follow."""
        if source not in ("both", "random", "follow"):
            raise ValueError(f"negatives come from both, random or follow, not {source!r}")
        if source == "both":
            allowed = np.ones_like(self.others, bool)
        else:
            allowed = np.take_along_axis(self.is_random, self.others, 1) == (source == "random")
        if allowed.sum(1).min(initial=num_negatives) < num_negatives:
            raise ValueError(
                f"--num_negatives {num_negatives}: an example has only {allowed.sum(1).min()} ({source})"
            )
        first = np.argsort(~allowed, axis=1, kind="stable")[:, :num_negatives]
        return np.take_along_axis(self.others, first, 1)


def build_examples(log: Interactions, config: DataConfig | None = None) -> dict[str, Examples]:
    """All three splits, {"train", "val", "test"} -> Examples, from one seeded generator per split.

    Raises ValueError if a split is empty or a user has touched so much that random candidates run out."""
    config = config or DataConfig()
    first, last = log.start[:-1], log.start[1:]
    position = np.arange(len(log.user))
    age = position - first[log.user]  # interactions before this one
    room = last[log.user] - position  # interactions from this one on
    candidates = {
        # followers must end before the user's last two interactions, which belong to validation and test
        "train": position[(age >= config.min_history) & (room >= config.followers + 2)],
        "val": position[
            (age >= config.min_history) & (room == 2) & (log.rating >= config.min_rating)
        ],
        "test": position[
            (age >= config.min_history) & (room == 1) & (log.rating >= config.min_rating)
        ],
    }
    keys = np.sort(log.user.astype(np.int64) * log.num_items + log.item)
    splits = {}
    for number, (split, rows) in enumerate(candidates.items()):
        rng = np.random.default_rng([config.data_seed, number])
        if split == "train":
            steps, size, places = np.arange(config.followers), config.train_size, len(rows)
            parts = np.array_split(
                rows, len(rows) // 2**20 + 1
            )  # all prefixes at once would take 200 bytes each
            rows = np.concatenate([part[_chosen_follower(log, part, config)[1]] for part in parts])
        else:
            steps, size = np.arange(1), config.test_size
            places = int(
                ((age >= config.min_history) & (room == (2 if split == "val" else 1))).sum()
            )
        rows = rng.permutation(rows)
        rows = rows[:size] if size else rows
        if len(rows) == 0 and places:
            raise ValueError(
                f"no {split} example: in none of {places:,} places is the chosen item liked: ratings go from {log.rating.min():g} to "
                f"{log.rating.max():g}, --min_rating is {config.min_rating:g}"
            )
        if len(rows) == 0:
            after = f" and {config.followers + 2} after" if split == "train" else ""
            which = "--min_history or --followers" if split == "train" else "--min_history"
            raise ValueError(
                f"no {split} example: no user has {config.min_history} interactions before{after} a point (the longest log has "
                f"{np.diff(log.start).max()}); lower {which}"
            )
        splits[split] = freeze(log, split, rows, steps, keys, config, rng)
    return splits


def _chosen_follower(
    log: Interactions, rows: np.ndarray, config: DataConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Which follower is chosen (E,), and whether the example counts (E,): its chosen item must be a liked one."""
    ratings = log.rating[rows[:, None] + np.arange(config.followers)]
    if config.positive == "first":
        liked = ratings >= config.min_rating
        return liked.argmax(1), liked.any(1)
    scores = preference_score(ratings, np.arange(config.followers), config.decay)
    chosen = scores.argmax(1)  # the first of equal ones: the sooner
    best = np.take_along_axis(scores, chosen[:, None], 1)[:, 0]
    beats_random = best > preference_score(config.neg_rating, config.neg_step, config.decay)
    return chosen, beats_random & (
        np.take_along_axis(ratings, chosen[:, None], 1)[:, 0] >= config.min_rating
    )


def freeze(log, split, rows, steps, keys, config: DataConfig, rng) -> Examples:
    """Draw the random candidates, score and shuffle all 20, and draw the order of negatives and the template."""
    E, F = len(rows), len(steps)
    follow = rows[:, None] + steps  # (E, F) rows of the log
    seen_rows = np.maximum(
        rows[:, None] - 1 - np.arange(config.history), log.start[log.user[rows]][:, None]
    )
    seen = (
        np.concatenate([log.item[seen_rows], log.item[follow]], 1)
        if config.exclude == "seen"
        else None
    )
    randoms = _draw_unseen(
        log, log.user[rows], NUM_CANDIDATES - F, keys, seen, config.negatives, rng
    )
    items = np.concatenate([log.item[follow], randoms], 1).astype(np.int32)
    ratings = np.concatenate([log.rating[follow], np.full(randoms.shape, config.neg_rating)], 1)
    delays = np.concatenate([np.tile(steps, (E, 1)), np.full(randoms.shape, config.neg_step)], 1)
    scores = preference_score(ratings, delays, config.decay).astype(np.float32)
    chosen = _chosen_follower(log, rows, config)[0] if split == "train" else np.zeros(E, np.int64)

    order = rng.permuted(
        np.tile(np.arange(NUM_CANDIDATES), (E, 1)), axis=1
    )  # shown slot -> drawn slot
    target = (order == chosen[:, None]).argmax(1)
    slots = np.tile(np.arange(NUM_CANDIDATES), (E, 1))
    others = rng.permuted(slots[slots != target[:, None]].reshape(E, -1), axis=1)
    return Examples(
        log,
        split,
        config.history,
        rows.astype(np.int64),
        np.take_along_axis(items, order, 1),
        target.astype(np.int32),
        np.take_along_axis(scores, order, 1),
        order >= F,
        others.astype(np.int32),
        rng.integers(config.num_templates or len(TEMPLATES), size=E).astype(np.int32),
        config.min_rating if config.history_items == "positive" else 0.0,
        config.ratings,
    )


def _draw_unseen(log, users, count: int, keys, seen, kind: str, rng) -> np.ndarray:
    """(E, count) distinct items per row that the user never touched (or, with `seen`, that are not in that row of it)."""
    drawn = np.full((len(users), count), -1, np.int64)
    open_cells = np.ones(drawn.shape, bool)
    for _ in range(50):
        n = int(open_cells.sum())
        if n == 0:
            return drawn
        drawn[open_cells] = (
            rng.integers(log.num_items, size=n)
            if kind == "uniform"
            else rng.choice(log.item, size=n)
        )
        row, _ = np.nonzero(open_cells)
        if seen is None:
            key = users[row].astype(np.int64) * log.num_items + drawn[open_cells]
            at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            bad = keys[at] == key
        else:
            bad = (seen[row] == drawn[open_cells][:, None]).any(1)
        repeated = np.zeros(drawn.shape, bool)  # equal to an earlier cell of the same row
        by_value = np.argsort(drawn, axis=1, kind="stable")
        ordered = np.take_along_axis(drawn, by_value, 1)
        np.put_along_axis(repeated[:, :], by_value[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
        again = repeated.copy()
        again[open_cells] |= bad
        open_cells = again
    weights = (
        np.ones(log.num_items)
        if kind == "uniform"
        else np.bincount(log.item, minlength=log.num_items).astype(float)
    )
    for e in np.flatnonzero(
        open_cells.any(1)
    ):  # chance finds the last few of them too slowly: take from what is left
        touched = (
            log.item[log.start[users[e]] : log.start[users[e] + 1]] if seen is None else seen[e]
        )
        left = np.setdiff1d(np.arange(log.num_items), touched)
        if len(left) < count:
            user, what = (
                log.user_ids[users[e]],
                "this user never touched" if seen is None else "are not in the prompt",
            )
            raise ValueError(
                f"user {user}: fewer than {count} items left that {what} ({log.num_items} in all); lower --core, or raise --followers"
            )
        drawn[e] = rng.choice(
            left, size=count, replace=False, p=weights[left] / weights[left].sum()
        )
    return drawn


# ------------------------------------------------------------------------------------------------ prompts
WORDS = {
    "movielens": ("movies", "watched", "watch"),
    "planted": ("stories", "read", "read"),
    "amazon_books": ("books", "read", "read"),
    "amazon": ("products", "bought", "buy"),
    "steam": ("games", "played", "play"),
    "beeradvocate": ("beers", "drank", "drink"),
    "lastfm": ("artists", "listened to", "listen to"),
}
TEMPLATES = (
    "A user {did} these {things}, oldest first, and rated each from 1 to 5:\n{history}\n"
    "Which of the following {things} will the user {do} next and like?\n{candidates}\nAnswer:",
    "Ratings from 1 to 5 that one person gave to {things}, in order of time:\n{history}\n"
    "Choose the one this person will {do} next and rate highly:\n{candidates}\nAnswer:",
    "Recent {things} of a user, with ratings (5 is best):\n{history}\n"
    "From this list, recommend what the user should {do} next:\n{candidates}\nAnswer:",
    "Below is what someone {did} and how they rated it, the latest last.\n{history}\n"
    "One of these {things} comes next and will please them. Name it.\n{candidates}\nAnswer:",
    "History of a user ({things} and ratings, 1 = disliked, 5 = loved):\n{history}\n"
    "Predict the next one the user will {do} and enjoy, given these candidates:\n{candidates}\nAnswer:",
)
assert len(TEMPLATES) == NUM_TEMPLATES


LOWEST = len(TEMPLATES)  # of the probe aversion; never drawn
ALL_TEMPLATES = (
    *TEMPLATES,
    "A user {did} these {things}, oldest first, and rated each from 1 to 5:\n{history}\n"
    "Which of the following {things} would the user rate lowest?\n{candidates}\nAnswer:",
)
WITHOUT_RATINGS = (  # the same questions, one for one
    "A user {did} these {things}, oldest first:\n{history}\n"
    "Which of the following {things} will the user {do} next and like?\n{candidates}\nAnswer:",
    "What one person {did}, in order of time:\n{history}\nChoose the one this person will {do} next and rate highly:\n{candidates}\nAnswer:",
    "Recent {things} of a user:\n{history}\nFrom this list, recommend what the user should {do} next:\n{candidates}\nAnswer:",
    "Below is what someone {did}, the latest last.\n{history}\n"
    "One of these {things} comes next and will please them. Name it.\n{candidates}\nAnswer:",
    "History of a user ({things}, oldest first):\n{history}\n"
    "Predict the next one the user will {do} and enjoy, given these candidates:\n{candidates}\nAnswer:",
    "A user {did} these {things}, oldest first:\n{history}\n"
    "Which of the following {things} would the user rate lowest?\n{candidates}\nAnswer:",
)


def render_prompt(example: Example, skip: int = 0) -> str:
    """The prompt text without its `skip` oldest history items. It ends in "Answer:", the completion begins with a space."""
    things, did, do = WORDS.get(example.dataset, ("items", "chose", "choose"))
    shown = example.history[skip:]
    history = "\n".join(
        title if isnan(rating) else f"{title} | Rating: {rating:g}" for title, rating in shown
    )
    candidates = "\n".join(example.candidates)
    templates = (
        WITHOUT_RATINGS
        if example.history and all(isnan(rating) for _, rating in example.history)
        else ALL_TEMPLATES
    )
    return templates[example.template].format(
        things=things, did=did, do=do, history=history, candidates=candidates
    )
