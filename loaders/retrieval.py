"""Cheap recommenders over the whole catalogue: they retrieve the list that the model then ranks.

    popularity   how often an item occurs
    item-knn     sum over the history of DECAY^age * cosine between the users of both items
    markov       sum over the history of DECAY^age * C[item, candidate] / sqrt(popularity), C as in
                 loaders/counting.py, whose definitions these are: same DECAY, same distances

    retriever = fit("markov", log, training_rows(log), shown=20)
    retriever.top(history, exclude=history, n=20)       item codes, best first

A history is item codes, newest last; each retriever reads as much of its end as it was made for.
Markov keeps its pairs sparse, at most MAX_DISTANCE of them an interaction. Rows of item-kNN are
counted when they are asked for, and kept as long as they fit into CACHE_BYTES.

Left out: ratings, as in loaders/counting.py. Legend: I items, n interactions, P distinct pairs.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict

import numpy as np

from data import Interactions
from loaders.counting import DECAY, MAX_DISTANCE

CACHE_BYTES = 1 << 28  # rows of item-kNN that are kept


def training_rows(interactions: Interactions) -> np.ndarray:
    """(n,) bool: all but each user's last two interactions, or what a split in time leaves."""
    return np.arange(len(interactions.user)) < interactions.training_end()[interactions.user]


def best_items(scores: np.ndarray, exclude: np.ndarray, n: int) -> np.ndarray:
    """Up to n item codes by falling score (I,), equal scores by code; none of `exclude`."""
    scores = scores.astype(np.float64)
    scores[exclude] = -np.inf
    n = min(n, int((scores > -np.inf).sum()))
    if n == 0:
        return np.zeros(0, np.int64)
    lowest = np.partition(scores, len(scores) - n)[len(scores) - n]
    better = np.flatnonzero(scores > lowest)
    equal = np.flatnonzero(scores == lowest)[: n - len(better)]
    chosen = np.concatenate([better, equal])
    return chosen[np.lexsort((chosen, -scores[chosen]))]


class Retriever(ABC):
    """Scores every item of the catalogue for one history."""

    @abstractmethod
    def scores(self, history: np.ndarray) -> np.ndarray:
        """Item codes, newest last -> (I,) float64."""

    def top(self, history: np.ndarray, exclude: np.ndarray, n: int) -> np.ndarray:
        """The n best item codes that are not excluded, or as many as there are."""
        return best_items(self.scores(history), exclude, n)


class Popularity(Retriever):
    def __init__(self, user: np.ndarray, item: np.ndarray, num_items: int, shown: int):
        self.counts = np.bincount(item, minlength=num_items).astype(float)

    def scores(self, history: np.ndarray) -> np.ndarray:
        return self.counts


class SumOverHistory(Retriever):
    """Sum over the `shown` newest items of DECAY^age * a sparse row of values."""

    def __init__(self, user: np.ndarray, item: np.ndarray, num_items: int, shown: int):
        self.num_items, self.shown = num_items, shown
        self.counts = np.bincount(item, minlength=num_items)
        self.count_pairs(user, item)

    @abstractmethod
    def count_pairs(self, user: np.ndarray, item: np.ndarray) -> None:
        """Keep what rows are made of, from the pairs (n,), (n,) that may be used."""

    @abstractmethod
    def row(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Distinct candidates of an item, and their values."""

    def scores(self, history: np.ndarray) -> np.ndarray:
        total = np.zeros(self.num_items)
        for age, item in enumerate(history[::-1][: self.shown].tolist()):
            candidates, values = self.row(item)
            total[candidates] += DECAY**age * values
        return total


class Markov(SumOverHistory):
    def count_pairs(self, user: np.ndarray, item: np.ndarray) -> None:
        """C in rows: 1/d for every user in whose log the candidate comes d interactions later."""
        keys, weights = [], []
        for distance in range(1, MAX_DISTANCE + 1):
            pairs = item[:-distance] * self.num_items + item[distance:]
            pairs = pairs[user[:-distance] == user[distance:]]
            distinct, times = np.unique(pairs, return_counts=True)
            keys.append(distinct)
            weights.append(times / distance)
        keys, which = np.unique(np.concatenate(keys), return_inverse=True)
        first, second = np.divmod(keys, self.num_items)
        sums = np.bincount(which, np.concatenate(weights), minlength=len(keys))
        self.values = sums / np.sqrt(np.maximum(self.counts[second], 1))
        self.candidates = second.astype(np.int32)
        self.start = np.searchsorted(first, np.arange(self.num_items + 1))

    def row(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.start[item], self.start[item + 1])
        return self.candidates[part], self.values[part]


class ItemKNN(SumOverHistory):
    def count_pairs(self, user: np.ndarray, item: np.ndarray) -> None:
        """Both directions of the table: items of each user, users of each item; no pair yet."""
        self.user_items = item.astype(np.int32)  # user u has user_start[u] : user_start[u + 1]
        num_users = int(user[-1]) + 1 if len(user) else 0
        self.user_start = np.searchsorted(user, np.arange(num_users + 1))
        order = np.argsort(item, kind="stable")
        self.item_users = user[order].astype(np.int32)
        self.item_start = np.concatenate([[0], np.cumsum(self.counts)])
        self.cache: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self.cached_bytes = 0

    def row(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Newly counted, or kept from before; what was not asked for longest goes first."""
        if item in self.cache:
            self.cache.move_to_end(item)
            return self.cache[item]
        self.cache[item] = row = self.cosines(item)
        self.cached_bytes += sum(part.nbytes for part in row)
        while self.cached_bytes > CACHE_BYTES:
            _, oldest = self.cache.popitem(last=False)
            self.cached_bytes -= sum(part.nbytes for part in oldest)
        return row

    def cosines(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """|users of both| / sqrt(|users of the item| * |users of the candidate|) above 0."""
        users = self.item_users[self.item_start[item] : self.item_start[item + 1]]
        starts = self.user_start[users]
        lengths = self.user_start[users + 1] - starts
        shifts = np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
        touched = self.user_items[shifts + np.arange(len(shifts))]
        both = np.bincount(touched, minlength=self.num_items)
        candidates = np.flatnonzero(both)
        norms = np.sqrt(self.counts[item] * self.counts[candidates])
        return candidates.astype(np.int32), both[candidates] / norms


COUNTING_RETRIEVERS = {"popularity": Popularity, "item-knn": ItemKNN, "markov": Markov}


def fit(
    name: str, interactions: Interactions, rows: np.ndarray | None = None, shown: int = 20
) -> Retriever:
    """A counting retriever of these rows of the log (n,) bool, all without; reads `shown` items."""
    keep = slice(None) if rows is None else rows
    user, item = interactions.user[keep].astype(np.int64), interactions.item[keep].astype(np.int64)
    return COUNTING_RETRIEVERS[name](user, item, interactions.num_items, shown)
