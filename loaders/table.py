"""The table that everything starts from, interactions as flat arrays, and how a loader fills it.

A loader (loaders/) parses raw files and hands rows to a `LogBuilder`, piece by piece while the
file streams by. After `finish` no step knows where the data came from. Memory grows with the
interactions kept, not with the file: an id becomes an int32 code when it is read, and repeated
pairs of user and item are merged as they pile up. Nothing is kept per user but the text of its id;
a log of n interactions takes 20 bytes each, and some three times that while it is sorted."""

import html
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from data import Interactions
from loaders.values import parse_times

MAX_BAD_SHARE = 0.01  # of the lines; with more of them the file is not what it was taken for


MAX_TITLE = 200  # characters; longer ones (some books have thousands) are cut
_CONTROL = dict.fromkeys([*range(32), *range(127, 160), 0xFEFF], " ")


def clean_title(title: str) -> str:
    """HTML entities become text, white space and control characters single blanks:
    a title is one line of a prompt."""
    title = " ".join(unicodedata.normalize("NFC", html.unescape(title)).translate(_CONTROL).split())
    if len(title) > MAX_TITLE:
        title = title[: MAX_TITLE - 1].rstrip() + "…"
    return title.encode("utf-8", "replace").decode()  # a lone surrogate cannot be tokenised


def unique_titles(titles: list[str]) -> list[str]:
    """Append " (2)", " (3)", ... to repeated titles, so that a title names one item."""
    taken, out = set(titles), []
    first, next_number = set(), {}
    for title in titles:
        name, number = title, next_number.get(title, 1)
        while name in first or (number > 1 and name in taken):
            number += 1
            name = f"{title} ({number})"
        next_number[title] = number
        first.add(name)
        out.append(name)
    return out


def sort_order(first: np.ndarray, then: np.ndarray) -> np.ndarray:
    """(n,) the order by `first` (>= 0), of equal ones by `then`, of equal ones as they stand; ints.

    np.lexsort((then, first)), in a third of the time where both fit into one key."""
    if not len(first):
        return np.zeros(0, np.int64)
    low = int(then.min())
    span = int(then.max()) - low + 1
    if (int(first.max()) + 1) * span >= 1 << 63:
        return np.lexsort((then, first))
    return np.argsort(first.astype(np.int64) * span + (then - low), kind="stable")


def last_of_each_pair(user: np.ndarray, item: np.ndarray, timestamp: np.ndarray) -> np.ndarray:
    """(n,) bool: the latest row of every user-item pair; of equal times the one further down."""
    if not len(user):
        return np.zeros(0, bool)
    key = user.astype(np.int64) * (int(item.max()) + 1) + item
    order = sort_order(key, timestamp)
    key = key[order]
    keep = np.zeros(len(key), bool)
    keep[order[np.append(key[1:] != key[:-1], True)]] = True
    return keep


def _sorted(user, item, rating, timestamp, titles, user_ids, item_ids, name: str) -> Interactions:
    order = sort_order(user, timestamp)  # ties in time keep the order of the file
    counts = np.bincount(user, minlength=len(user_ids))
    return Interactions(
        user[order].astype(np.int32),
        item[order].astype(np.int32),
        rating[order].astype(np.float32),
        timestamp[order].astype(np.int64),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        titles,
        user_ids,
        item_ids,
        name,
    )


def make_interactions(user, item, rating, timestamp, titles: Mapping, name="") -> Interactions:
    """Code, deduplicate (last rating of a user-item pair wins) and sort raw columns.

    `titles` maps item id to title."""
    user_ids, user = np.unique(np.asarray(user), return_inverse=True)
    item_ids, item = np.unique(np.asarray(item), return_inverse=True)
    missing = [i for i in item_ids.tolist() if i not in titles]
    if missing:
        raise ValueError(f"{len(missing)} items of the log have no title, first {missing[:3]}")
    rating, timestamp = np.asarray(rating, np.float32), np.asarray(timestamp, np.int64)
    keep = last_of_each_pair(user, item, timestamp)
    names = unique_titles([titles[i] for i in item_ids.tolist()])
    ids = [str(u) for u in user_ids.tolist()], [str(i) for i in item_ids.tolist()]
    columns = [column[keep] for column in (user, item, rating, timestamp)]
    return _sorted(*columns, names, *ids, name)


def percentile_ratings(amount: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Ratings 1 to 5 (float32) by rank inside each group:
    ceil(5 * mid-rank / size), so that the top fifth gets 5.

    amount (n,) float, group (n,) int codes. Equal amounts get equal ratings,
    a group of one gets 3 (appendix E.1)."""
    order = np.lexsort((amount, group))
    g, a = group[order], amount[order]
    n = len(g)
    first = np.flatnonzero(np.append(True, g[1:] != g[:-1]))  # of each group
    size = np.diff(np.append(first, n))
    # first row of each set of equal ones
    tie = np.flatnonzero(np.append(True, (g[1:] != g[:-1]) | (a[1:] != a[:-1])))
    length = np.diff(np.append(tie, n))
    start = np.repeat(first, size)[tie]
    # rows before it in its group, and half of its own:
    # (r - 1/2) / n is the share of the group that lies below
    share = (tie - start + length / 2) / np.repeat(size, size)[tie]
    ratings = np.empty(n, np.float32)
    ratings[order] = np.repeat(np.ceil(5 * share), length)
    return ratings


class Codes(dict):
    """Id -> int code in order of appearance; an id that is no id (blank, None, True, 1.5) -> -1,
    and one of `absent`, which mean that there is none, -> -2. Spaces around it do not count."""

    ABSENT = -2

    def __init__(self, absent: Iterable = ()):
        super().__init__(dict.fromkeys(absent, Codes.ABSENT))
        self.ids: list[str] = []

    def __missing__(self, key) -> int:
        if isinstance(key, str):
            name = key.strip()
        elif isinstance(key, int) and not isinstance(key, bool):
            name = str(key)
        elif isinstance(key, float) and key.is_integer():
            name = str(int(key))
        else:
            return -1
        if name != key:
            code = self[name]
        elif not name or len(name) > 1000:
            return -1
        else:
            code = len(self.ids)
            self.ids.append(name.encode("utf-8", "replace").decode())
        self[key] = code
        return code

    def encode(self, values: Sequence) -> np.ndarray:
        return np.fromiter(map(self.__getitem__, values), np.int32, len(values))


def parse_amounts(values: Sequence) -> np.ndarray:
    return np.array(list(map(float, values)), np.float64).astype(np.float32)


FIELDS = ("user", "item", "rating", "time")  # of a row, for messages


def _convert(convert, missing, values: Sequence) -> np.ndarray:
    """convert(values), with `missing` for each value that it refuses:
    halves are tried until those stand alone."""
    try:
        return convert(values)
    except (ValueError, TypeError, OverflowError, AttributeError, OSError):
        if len(values) == 1:
            return np.array([missing])
        middle = len(values) // 2
        return np.concatenate(
            [_convert(convert, missing, part) for part in (values[:middle], values[middle:])]
        )


def shorten(text: str, length: int = 200) -> str:
    """A text for a message."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


class LineCount:
    """Counts the lines of a file, names the first bad ones,
    and stops where they are more than chance."""

    def __init__(self, source, expected: str):
        self.source = str(source)
        self.expected = expected  # what a line should be, for messages
        self.lines, self.num_bad = 0, 0
        self.first_bad: list[tuple[int, str]] = []

    def bad(self, number: int, why: str) -> None:
        """A line that cannot be understood. ValueError as soon as they are too many."""
        self.lines += 1
        self._bad(number, why)

    def _bad(self, number: int, why: str) -> None:
        self.num_bad += 1
        self.first_bad = sorted([*self.first_bad, (number, shorten(why))])[:3]
        # a bad beginning may yet be less than 1 % of the whole
        if self.num_bad > 1000 and self.lines >= 100_000:
            self.check()

    def bad_lines(self) -> str:
        return "; ".join(f"line {number}: {why!r}" for number, why in self.first_bad)

    def check(self) -> None:
        if self.num_bad > MAX_BAD_SHARE * max(1, self.lines):
            raise ValueError(
                f"{self.source}: {self.num_bad:,} of {self.lines:,} lines cannot be used (up to "
                f"{MAX_BAD_SHARE:.0%} would be passed over): {self.bad_lines()}: {self.cause()}"
            )

    def cause(self) -> str:
        """Why the lines are bad, and the way out, as far as it is known."""
        return f"these are not {self.expected}; this looks like another file or format"


class LogBuilder(LineCount):
    """Rows of a log while its file streams by: checked, coded, merged.
    `add`, `bad` and `skip` as they come, then `finish`."""

    COMPACT = 1 << 22  # rows that pile up before repeated pairs are merged

    def __init__(self, source, expected: str, repeats: str = "last", amounts: bool = False):
        """`repeats` of a user-item pair: the "last" rating wins, or amounts "sum" up at the first
        time. `amounts` may be any numbers >= 0; otherwise they are ratings, above 0 and up to 5."""
        super().__init__(source, expected)
        self.repeats, self.amounts = repeats, amounts
        self.users, self.items = Codes(), Codes()
        none, nan = np.int32(-1), np.float32("nan")
        self.converters = (
            (self.users.encode, none),
            (self.items.encode, none),
            (parse_amounts, nan),
            (parse_times, np.nan),
        )
        self.chunks: list[tuple[np.ndarray, ...]] = []  # (user, item, amount, time) each
        self.pending, self.kept, self.largest = 0, 0, 0.0
        self.notes: Counter[str] = Counter()

    def skip(self, why: str) -> None:
        """A line that is understood but holds no usable interaction."""
        self.lines += 1
        self.notes[why] += 1

    def add(
        self,
        numbers: Sequence[int],
        users: Sequence,
        items: Sequence,
        amounts: Sequence,
        times: Sequence,
    ) -> np.ndarray:
        """Add rows as read, line `numbers` beside them;
        returns their item codes, -1 where the row is bad."""
        self.lines += len(numbers)
        raw = (users, items, amounts, times)
        columns = tuple(
            _convert(*converter, values)
            for converter, values in zip(self.converters, raw, strict=True)
        )
        user, item, amount, time = columns
        top = np.finfo(np.float32).max if self.amounts else 5
        # NaN is none of it
        fine = (user >= 0, item >= 0, (amount >= 0) & (amount <= top), time >= 0)
        good = np.logical_and.reduce(fine)
        none = self.none(columns, good)
        for row in np.flatnonzero(~good & ~none):
            wrong = [name for name, ok in zip(FIELDS, fine, strict=True) if not ok[row]]
            self.bad_row(numbers[row], {n: raw[FIELDS.index(n)][row] for n in wrong})
        self.largest = max(self.largest, float(amount[np.isfinite(amount)].max(initial=0)))
        inside = good & ~none
        if inside.all():
            self.chunks.append(columns)
        else:
            self.chunks.append(tuple(column[inside] for column in columns))
            item = np.where(inside, item, -1)
        self.pending += int(inside.sum())
        if self.pending > max(self.COMPACT, self.kept):
            self.compact()
        return item

    def none(self, columns: tuple[np.ndarray, ...], good: np.ndarray) -> np.ndarray:
        """(rows,) bool: rows that are understood but hold no interaction;
        they are counted by reason."""
        zero = good & (columns[2] == 0) & (not self.amounts)  # BeerAdvocate has some
        self.notes["lines with rating 0, which means none"] += int(zero.sum())
        return zero

    def cause(self) -> str:
        if self.amounts or self.largest <= 5:
            return super().cause()
        return (
            f"ratings go up to {self.largest:g} instead of 5; --percentile item makes ratings of "
            "hours, plays or scores"
        )

    def bad_row(self, number: int, values: dict) -> None:
        """A row with values, by field, that are not what they should be."""
        self._bad(number, ", ".join(f"{name} {value!r}" for name, value in values.items()))

    def compact(self) -> None:
        """Merge repeated pairs; the rows that stay keep their order."""
        if not self.chunks:
            return
        user, item, amount, time = (
            np.concatenate(parts) for parts in zip(*self.chunks, strict=True)
        )
        self.chunks = []
        if self.repeats == "last":
            keep = last_of_each_pair(user, item, time)
        else:
            keep = last_of_each_pair(user, item, -time)  # of the first time
            key = user.astype(np.int64) << 32 | item.astype(np.int64)
            pairs, which = np.unique(key, return_inverse=True)
            sums = np.bincount(which, weights=amount, minlength=len(pairs))
            amount = sums[which].astype(np.float32)
        merged = "repeats, added up"
        if self.repeats == "last":
            merged = "repeated pairs of user and item, of which the last counts"
        self.notes[merged] += int(len(keep) - keep.sum())
        self.chunks = [tuple(column[keep] for column in (user, item, amount, time))]
        self.kept, self.pending = int(keep.sum()), 0

    def finish(
        self, titles: Mapping[str, str] | None, name: str, percentile: str = ""
    ) -> Interactions:
        """The sorted log. `titles` by item id; None: ids are titles; items without one are dropped,
        and counted. `percentile` item, user or all: amounts become ratings by rank inside such a
        group."""
        self.check()
        self.compact()
        if not self.kept:
            reasons = [f"{count:,} {why}" for why, count in self.notes.items() if count]
            left_out = f" ({'; '.join(reasons)})" if reasons else ""
            raise ValueError(
                f"{self.source}: no interaction found in {self.lines:,} lines{left_out}; expected "
                f"{self.expected}"
            )
        (columns,) = self.chunks
        user, item, amount, time = columns
        self.chunks = []
        if percentile:
            group = {"item": item, "user": user, "all": np.zeros_like(item)}[percentile]
            amount = percentile_ratings(amount, group)
        if titles is None:
            names = [clean_title(i) for i in self.items.ids]
        else:
            names = [clean_title(titles.get(i) or "") for i in self.items.ids]
        have = np.array([bool(n) for n in names])
        keep = have[item]
        if not keep.all():
            self.notes["interactions with an item that has no title"] = int(len(keep) - keep.sum())
            if not keep.any():
                raise ValueError(
                    f"{self.source}: not one of its {len(names):,} items has a title; "
                    f"first {self.items.ids[:3]}"
                )
            user, item, amount, time = (column[keep] for column in (user, item, amount, time))
        if self.num_bad:
            self.notes[f"lines that could not be read ({self.bad_lines()})"] = self.num_bad
        # codes in the order of the ids: the order of the lines changes nothing
        user, (user_ids,) = _recode(user, self.users.ids)
        item, (item_ids, names) = _recode(item, self.items.ids, names)
        interactions = _sorted(
            user, item, amount, time, unique_titles(names), user_ids, item_ids, name
        )
        interactions.notes = {why: count for why, count in self.notes.items() if count}
        return interactions


def _recode(codes: np.ndarray, ids: list[str], *others: list) -> tuple[np.ndarray, list[list]]:
    """Codes by sorted id, of the ids in use; `ids` and `others` of those, in that order."""
    used = np.flatnonzero(np.bincount(codes, minlength=len(ids))).tolist()
    order = sorted(used, key=ids.__getitem__)
    new = np.full(len(ids), -1, np.int32)
    new[order] = np.arange(len(order), dtype=np.int32)
    return new[codes], [[values[i] for i in order] for values in (ids, *others)]
