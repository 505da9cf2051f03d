"""Counting recommenders: what a model has to beat, on the same frozen candidates.

    popularity   how often the candidate occurs
    item-kNN     sum over the history of DECAY^age * cosine(item, candidate)
                 between the two sets of users
    Markov       sum over the history of DECAY^age * C[item, candidate] / sqrt(popularity
                 of the candidate), where C adds 1/d for every user in whose log the candidate comes
                 d <= MAX_DISTANCE interactions after the item

All are fitted on everything before each user's last two interactions, and read the same history as
a prompt shows. So validation and test are unseen; scores on the training split are not, because the
fit has counted its answers. On MovieLens-1M (1 + 19 uniform candidates, no filter) they put the
target first in 33 %, 50 % and 59 % of the test cases.

    from eval import ranking_metrics
    from loaders.counting import counting_baselines

    for name, scores in counting_baselines(splits["test"]).items():
        print(name, ranking_metrics(scores, splits["test"].target)["hit_ratio@1"].mean())

Left out: chance, which needs no scores, and ratings: a low rating counts as an interaction. Only
the pairs of a history item and a candidate that the examples ask for are ever counted, so memory
does not grow with items squared. Legend: E examples, A age in the shown history (0 = newest), n
candidates, P distinct pairs."""

from collections.abc import Callable

import numpy as np

from data import Examples, Interactions

DECAY = 0.8  # weight of a history item relative to the one after it


MAX_DISTANCE = 10


CHUNK_WORDS = 1 << 18  # 2 MiB of user bits: stays in a core's cache


BITS_BYTES = 1 << 28  # bits of all items asked for, of one block of users


def training_interactions(log: Interactions) -> tuple[np.ndarray, np.ndarray]:
    """User and item codes (int64, in the order of the log)
    of all but each user's last two interactions."""
    room = log.start[log.user + 1] - np.arange(len(log.user))  # interactions from this one on
    return log.user[room > 2].astype(np.int64), log.item[room > 2].astype(np.int64)


def item_counts(log: Interactions) -> np.ndarray:
    """(items,) training interactions of each item."""
    return np.bincount(training_interactions(log)[1], minlength=log.num_items)


def popularity(examples: Examples) -> np.ndarray:
    """(E, n) number of training interactions of the candidate."""
    return item_counts(examples.log)[examples.candidates].astype(float)


def item_knn(examples: Examples) -> np.ndarray:
    """(E, n) sum over the history of DECAY^age
    * |users of both| / sqrt(|users of the item| * |users of the candidate|)."""
    log = examples.log
    user, item = training_interactions(log)
    counts = item_counts(log)

    def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        known = np.full(log.num_items, -1)  # item -> row of the bits; -1: not asked for
        known[first] = known[second] = 0
        asked = np.flatnonzero(known == 0)
        known[asked] = np.arange(len(asked))
        first_row, second_row = known[first], known[second]
        both = np.zeros(len(first))
        words = max(1, min((log.num_users + 63) // 64, BITS_BYTES // (8 * len(asked))))
        # users in blocks: their bits must fit into memory
        for lowest in range(0, log.num_users, 64 * words):
            inside = (user >= lowest) & (user < lowest + 64 * words) & (known[item] >= 0)
            u, rows = user[inside] - lowest, known[item[inside]]
            bits = np.zeros(len(asked) * words, np.uint64)  # one bit per item and user
            one_bit = np.uint64(1) << (u % 64).astype(np.uint64)
            np.bitwise_or.at(bits, rows * words + u // 64, one_bit)
            bits = bits.reshape(len(asked), words)
            step = max(1, CHUNK_WORDS // words)
            for at in range(0, len(first), step):
                shared = bits[first_row[at : at + step]] & bits[second_row[at : at + step]]
                both[at : at + step] += np.bitwise_count(shared).sum(1)
        # 0 for an item without users
        return both / np.sqrt(np.maximum(counts[first] * counts[second], 1))

    return _sum_over_history(examples, cosine)


def markov(examples: Examples) -> np.ndarray:
    """(E, n) sum over the history of DECAY^age * C[item, candidate] / sqrt(popularity);
    C weighs distance d by 1/d."""
    log = examples.log
    user, item = training_interactions(log)
    counts = item_counts(log)

    def transitions(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        wanted = first * log.num_items + second
        weights = np.zeros(len(wanted))
        for distance in range(1, MAX_DISTANCE + 1):
            pairs = item[:-distance] * log.num_items + item[distance:]
            pairs = np.sort(pairs[user[:-distance] == user[distance:]])
            count = np.searchsorted(pairs, wanted, "right") - np.searchsorted(pairs, wanted)
            weights += count / distance
        return weights / np.sqrt(np.maximum(counts[second], 1))

    return _sum_over_history(examples, transitions)


# item codes (P,), (P,) -> (P,), in order of the pair
PairValues = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _sum_over_history(examples: Examples, pair_values: PairValues) -> np.ndarray:
    """(E, n) sum over the shown history of DECAY^age * pair_values(item, candidate),
    each distinct pair valued once."""
    log = examples.log
    age = np.arange(examples.history)
    rows = examples.position[:, None] - 1 - age  # (E, A), newest first
    first_rows = log.start[log.user[examples.position]][:, None]
    weights = np.where(rows >= first_rows, DECAY**age, 0.0)
    # int64: the product passes 2**31
    items = log.item[np.maximum(rows, first_rows)].astype(np.int64)
    keys = items[:, :, None] * log.num_items + examples.candidates[:, None, :]  # (E, A, n)
    wanted, which = np.unique(keys, return_inverse=True)
    values = pair_values(*np.divmod(wanted, log.num_items))[which].reshape(keys.shape)
    return np.einsum("ea,ean->en", weights, values)


def counting_baselines(examples: Examples) -> dict[str, np.ndarray]:
    """Scores (E, n) of every counting recommender, by the name it has in a result table."""
    return {name: scores(examples) for name, scores in BASELINES.items()}


BASELINES = {"popularity": popularity, "item-kNN": item_knn, "Markov": markov}
