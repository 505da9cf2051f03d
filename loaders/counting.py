"""Counting recommenders: what a model has to beat, on the same frozen candidates.

    popularity   how often the candidate occurs
    item-kNN     sum over the history of DECAY^age * cosine(item, candidate)
                 between the two sets of users
    Markov       sum over the history of DECAY^age * C[item, candidate] / sqrt(popularity
                 of the candidate), where C adds 1/d for every user in whose log the candidate comes
                 d <= MAX_DISTANCE interactions after the item

All are fitted on everything before each user's last two interactions (with a split in time: before
the date and the validation item), and read the same history as a prompt shows. So validation and
test are unseen; scores on the training split are not, because the fit has counted its answers. On
MovieLens-1M (1 + 19 uniform candidates, no filter) they put the target first in 33 %, 50 % and 59 %
of the test cases.

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


def training_interactions(interactions: Interactions) -> tuple[np.ndarray, np.ndarray]:
    """User and item codes (int64, in the order of the log) of what may be trained on.

    All but each user's last two interactions, or what a split in time leaves."""
    inside = np.arange(len(interactions.user)) < interactions.training_end()[interactions.user]
    return interactions.user[inside].astype(np.int64), interactions.item[inside].astype(np.int64)


def item_counts(interactions: Interactions) -> np.ndarray:
    """(items,) training interactions of each item."""
    return np.bincount(training_interactions(interactions)[1], minlength=interactions.num_items)


def popularity(examples: Examples) -> np.ndarray:
    """(E, n) number of training interactions of the candidate."""
    return item_counts(examples.interactions)[examples.candidates].astype(float)


def item_knn(examples: Examples) -> np.ndarray:
    """(E, n) sum over the history of DECAY^age
    * |users of both| / sqrt(|users of the item| * |users of the candidate|)."""
    interactions = examples.interactions
    user, item = training_interactions(interactions)
    counts = item_counts(interactions)

    def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        known = np.full(interactions.num_items, -1)  # item -> row of the bits; -1: not asked for
        known[first] = known[second] = 0
        asked = np.flatnonzero(known == 0)
        known[asked] = np.arange(len(asked))
        first_row, second_row = known[first], known[second]
        both = np.zeros(len(first))
        words = max(1, min((interactions.num_users + 63) // 64, BITS_BYTES // (8 * len(asked))))
        # users in blocks: their bits must fit into memory
        for lowest in range(0, interactions.num_users, 64 * words):
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
    interactions = examples.interactions
    user, item = training_interactions(interactions)
    counts = item_counts(interactions)

    def transitions(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        wanted = first * interactions.num_items + second
        weights = np.zeros(len(wanted))
        for distance in range(1, MAX_DISTANCE + 1):
            pairs = item[:-distance] * interactions.num_items + item[distance:]
            pairs = np.sort(pairs[user[:-distance] == user[distance:]])
            count = np.searchsorted(pairs, wanted, "right") - np.searchsorted(pairs, wanted)
            weights += count / distance
        return weights / np.sqrt(np.maximum(counts[second], 1))

    return _sum_over_history(examples, transitions)


def shown_history(interactions: Interactions, rows: np.ndarray, history: int):
    """Items before each row, newest first, and their weights: (E, A) int64 and (E, A) float64.

    Weights are DECAY^age, 0 where the user's log has not begun."""
    age = np.arange(history)
    before = rows[:, None] - 1 - age
    first = interactions.start[interactions.user[rows]][:, None]
    weights = np.where(before >= first, DECAY**age, 0.0)
    # int64: products of two items pass 2**31
    return interactions.item[np.maximum(before, first)].astype(np.int64), weights


# item codes (P,), (P,) -> (P,), in order of the pair
PairValues = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _sum_over_history(examples: Examples, pair_values: PairValues) -> np.ndarray:
    """(E, n) sum over the shown history of DECAY^age * pair_values(item, candidate),
    each distinct pair valued once."""
    interactions = examples.interactions
    items, weights = shown_history(interactions, examples.position, examples.history)
    keys = items[:, :, None] * interactions.num_items + examples.candidates[:, None, :]  # (E, A, n)
    wanted, which = np.unique(keys, return_inverse=True)
    values = pair_values(*np.divmod(wanted, interactions.num_items))[which].reshape(keys.shape)
    return np.einsum("ea,ean->en", weights, values)


def counting_baselines(examples: Examples) -> dict[str, np.ndarray]:
    """Scores (E, n) of every counting recommender, by the name it has in a result table."""
    return {name: scores(examples) for name, scores in BASELINES.items()}


def transition_table(interactions: Interactions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """C[item, candidate] / sqrt(popularity of the candidate), all that is not 0.

    Row i is candidates[start[i] : start[i + 1]] with their values: (start, candidates, values)."""
    user, item = training_interactions(interactions)
    counts = np.maximum(np.bincount(item, minlength=interactions.num_items), 1)
    pairs, weights = [], []
    for distance in range(1, MAX_DISTANCE + 1):
        same = user[:-distance] == user[distance:]
        pairs.append((item[:-distance] * interactions.num_items + item[distance:])[same])
        weights.append(np.full(len(pairs[-1]), 1 / distance))
    keys, which = np.unique(np.concatenate(pairs), return_inverse=True)
    values = np.bincount(which, np.concatenate(weights), minlength=len(keys))
    first, second = np.divmod(keys, interactions.num_items)
    start = np.searchsorted(first, np.arange(interactions.num_items + 1))
    return start, second, values / np.sqrt(counts[second])


def runs_of(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """start[i], ..., end[i] - 1 for every i, one after the other, and the i of each."""
    lengths = end - start
    which = np.repeat(np.arange(len(start)), lengths)
    offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return start[which] + offsets, which


def markov_top(
    interactions: Interactions,
    rows: np.ndarray,  # (E,) rows of the log; the history is what lies before
    history: int,
    count: int,
    exclude: np.ndarray | None = None,  # (E, n) items left out; None: all that the user touched
) -> np.ndarray:
    """(E, count) the items of the whole catalogue that Markov puts highest, the best first.

    Equal scores (0 above all) go to the more popular item, then to the lower code. -1 where no
    item is left."""
    table = transition_table(interactions)
    order = np.argsort(-item_counts(interactions), kind="stable")  # the place of a column in a tie
    found = np.full((len(rows), count), -1, np.int64)
    step = max(1, BLOCK_CELLS // interactions.num_items)
    for at in range(0, len(rows), step):
        block = np.asarray(rows[at : at + step])
        scores = catalogue_scores(interactions, table, block, history)
        if exclude is None:
            user = interactions.user[block]
            touched, which = runs_of(interactions.start[user], interactions.start[user + 1])
            scores[which, interactions.item[touched]] = -np.inf
        else:
            np.put_along_axis(scores, exclude[at : at + step].astype(np.int64), -np.inf, 1)
        columns, kept = best_columns(scores[:, order], count)
        items = np.where(np.isfinite(kept), order[columns], -1)
        found[at : at + step, : items.shape[1]] = items
    return found


BLOCK_CELLS = 1 << 23  # scores of the whole catalogue at a time: 64 MiB


def catalogue_scores(
    interactions: Interactions, table, rows: np.ndarray, history: int
) -> np.ndarray:
    """(E, items) Markov's score of every item for the history before each row."""
    start, candidates, values = table
    items, weights = shown_history(interactions, rows, history)
    scores = np.zeros((len(rows), interactions.num_items))
    for age in range(history):  # within one age no cell occurs twice
        cells, which = runs_of(start[items[:, age]], start[items[:, age] + 1])
        scores[which, candidates[cells]] += weights[which, age] * values[cells]
    return scores


def best_columns(scores: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(E, count) columns of the highest scores of each row, the best first, and the scores.

    Equal ones from left to right."""
    E, n = scores.shape
    count = min(count, n)
    lowest = np.partition(scores, n - count, axis=1)[:, n - count, None]
    better, equal = scores > lowest, scores == lowest
    equal &= equal.cumsum(1) <= count - better.sum(1, keepdims=True)
    columns = np.nonzero(better | equal)[1].reshape(E, count)
    kept = np.take_along_axis(scores, columns, 1)
    by_score = np.argsort(-kept, axis=1, kind="stable")
    return np.take_along_axis(columns, by_score, 1), np.take_along_axis(kept, by_score, 1)


BASELINES = {"popularity": popularity, "item-kNN": item_knn, "Markov": markov}
