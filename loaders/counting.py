"""Counting recommenders: what a model has to beat, and what retrieves candidates for it.

    popularity   n_c, how often the candidate c occurs
    item-knn     sum over the history of DECAY^age * cosine(i, c) of the two items' sets of users
    markov       sum over the history of DECAY^age * C[i, c] / sqrt(n_c), where C adds 1/d for every
                 user in whose log c comes d <= MAX_DISTANCE interactions after i

They are fitted on training interactions, whatever their rating. Legend: E examples, I items."""

from functools import lru_cache

import numpy as np

from data import Examples, Interactions

DECAY, MAX_DISTANCE = 0.8, 10
BASELINES = {"popularity": "popularity", "item-kNN": "item-knn", "Markov": "markov"}  # in tables


def training_rows(interactions: Interactions) -> np.ndarray:
    """(n,) bool: all but each user's last two, or what a split in time leaves."""
    return np.arange(len(interactions.user)) < interactions.training_end()[interactions.user]


class Retriever:
    """Scores the catalogue for the `shown` newest items of a history; fitted on `rows` of a log."""

    def __init__(self, name: str, log: Interactions, rows=None, shown: int = 20):
        user, item = (log.user, log.item) if rows is None else (log.user[rows], log.item[rows])
        self.name, self.weights = name, DECAY ** np.arange(shown)
        self.counts = np.bincount(item, minlength=log.num_items)
        self.rows_of = np.split(np.argsort(item, kind="stable"), np.cumsum(self.counts)[:-1])
        self.user_start = np.searchsorted(user, np.arange(log.num_users + 1))
        self.user = np.pad(user, (0, MAX_DISTANCE), constant_values=-1)  # behind the last: nobody
        self.item = np.pad(item, (0, MAX_DISTANCE))
        self.row = lru_cache(max(16, (1 << 24) // log.num_items))(self.count_row)  # to 256 MiB

    def scores(self, history: np.ndarray) -> np.ndarray:
        """(I,) float64: sums over the history; an item counts DECAY times as much as the next."""
        if self.name == "popularity":
            return self.counts.astype(float)
        total = np.zeros(len(self.counts))
        for weight, shown in zip(self.weights, history[::-1].tolist()):
            candidates, values = self.row(shown)
            total[candidates] += weight * values
        return total

    def count_row(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """The candidates that an item supports, and their values."""
        rows = self.rows_of[item]
        if self.name == "item-knn":
            users, start = self.user[rows], self.user_start
            parts = map(slice, start[users].tolist(), start[users + 1].tolist())
            touched = np.concatenate([users[:0], *(self.item[part] for part in parts)])
            sums, norms = np.bincount(touched), self.counts[item] * self.counts
        else:
            distance = np.arange(1, MAX_DISTANCE + 1)[:, None]
            later = rows + distance  # (MAX_DISTANCE, rows)
            same = self.user[later] == self.user[rows]
            weights = np.broadcast_to(1 / distance, later.shape)[same]
            sums, norms = np.bincount(self.item[later[same]], weights), self.counts
        candidates = np.flatnonzero(sums)
        return candidates, sums[candidates] / np.sqrt(norms[candidates])


def best_items(scores: np.ndarray, exclude: np.ndarray, n: int, order=None) -> np.ndarray:
    """Up to n item codes by falling score (I,), without `exclude`; of equal scores the one that
    comes first in `order` (I,), or if None the lower code."""
    order = np.arange(len(scores)) if order is None else order
    left = order[~np.isin(order, exclude)]
    return left[np.argsort(-scores[left], kind="stable")[:n]]


def counting_baselines(examples: Examples) -> dict[str, np.ndarray]:
    """Scores (E, 20) of the examples' candidates, by a recommender's name in result tables."""
    log, rows, found = examples.interactions, examples.position, {}
    histories = [log.item[start:row] for start, row in zip(log.start[log.user[rows]], rows)]
    for name, key in BASELINES.items():
        retriever = Retriever(key, log, training_rows(log), examples.history)
        pairs = zip(histories, examples.candidates)
        found[name] = np.array([retriever.scores(history)[items] for history, items in pairs])
    return found


def markov_top(log: Interactions, rows: np.ndarray, shown: int, count: int, exclude=None):
    """(E, count) items that Markov puts highest before each row (E,), the more popular one first if
    two are equal; -1: none. Left out: `exclude` (E, n), or if None all that the user touched."""
    retriever = Retriever("markov", log, training_rows(log), shown)
    by_popularity = np.argsort(-retriever.counts, kind="stable")
    found = np.full((len(rows), count), -1)
    for e, row in enumerate(rows.tolist()):
        start, end = log.start[log.user[row] + np.arange(2)]
        left_out = log.item[start:end] if exclude is None else exclude[e]
        best = best_items(retriever.scores(log.item[start:row]), left_out, count, by_popularity)
        found[e, : len(best)] = best
    return found
