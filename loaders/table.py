"""From coded columns to the table that everything starts from: interactions as flat arrays.

`usable_rows` says what the values mean, leaves out what cannot be used, and counts it; `finish`
merges repeated pairs of user and item, makes ratings of amounts, sorts and names the items. After
it no step knows where the data came from."""

import html
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from data import ITEMS, Interactions, Words, select_rows
from loaders.tables import MAX_BAD_SHARE, Table, check_bad, shorten
from loaders.values import (
    ABSENT,
    ABSENT_IDS,
    BAD_ID,
    NO_ID,
    TIME_ADVICE,
    Column,
    parse_scale,
    rating_doubt,
    read_ids,
    read_numbers,
    read_times,
)

# ------------------------------------------------------------------------------------------- titles
MAX_TITLE = 200  # characters; longer ones (some books have thousands) are cut
CONTROL = dict.fromkeys([*range(32), *range(127, 160), 0xFEFF], " ")
ENTITY = re.compile(r"&(#\d+|#[xX][0-9a-fA-F]+|\w+);")  # "Q&notation" holds none


def clean_title(title: str) -> str:
    """HTML entities become text, white space and control characters single blanks:
    a title is one line of a prompt."""
    text = ENTITY.sub(lambda match: html.unescape(match[0]), title) if "&" in title else title
    title = " ".join(unicodedata.normalize("NFC", text).translate(CONTROL).split())
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


# --------------------------------------------------------------------------------------------- rows
@dataclass
class Rows:
    """The rows of a log that can be used."""

    source: str
    user: np.ndarray  # (n,) int32 code
    item: np.ndarray  # (n,) int32 code
    amount: np.ndarray  # (n,) float32 rating of 1 to 5, or hours, plays, ...
    time: np.ndarray  # (n,) int64
    per_second: int  # of time
    user_ids: list[str]
    item_ids: list[str]
    kept: np.ndarray | None = None  # (rows of the table,) bool
    notes: dict[str, int] = field(default_factory=dict)
    values: np.ndarray | None = None  # distinct ratings as read


def usable_rows(
    table: Table,
    source: str,
    amounts: bool = False,  # any numbers from 0 on; otherwise ratings above 0 and up to 5
    scale: str = "",  # which is mapped to 1 to 5
    absent: frozenset = ABSENT_IDS,  # texts that are no id
) -> Rows:
    """What can be used of a table; ValueError if more than 1 % is neither usable nor absent."""
    n, notes, such = table.num_rows, {}, []
    user, user_ids = read_ids(table.columns["user"], absent)
    item, item_ids = read_ids(table.columns["item"], absent)
    rating = table.columns.get("rating") or Column(np.zeros(n, np.int32), [1.0])
    numbers = read_numbers(rating, table.delimiter)
    counts = np.roll(np.bincount(rating.codes + 1, minlength=len(numbers)), -1)  # null is the last
    low, high = parse_scale(scale) or ((0.0, 3e38) if amounts else (1e-9, 5.0))
    values = np.unique(numbers[np.isfinite(numbers) & (counts > 0)])
    inside = (numbers >= low) & (numbers <= high)
    if scale == "binary":
        inside &= (numbers == 0) | (numbers == 1)
    for mark in (0.0, -1.0):  # outside of the scale they mean none
        if not low <= mark <= high and (times := int(counts[numbers == mark].sum())):
            such.append(f"{mark:g} {times:,} times")
            numbers[numbers == mark] = ABSENT
    state = np.where(numbers == ABSENT, NO_ID, np.where(inside, 0, BAD_ID)).astype(np.int8)
    time, per_second = table.first_row + np.arange(n), 1
    if "timestamp" in table.columns:
        time, per_second = read_times(table.columns["timestamp"])

    states = {"user": user, "item": item, "rating": state[rating.codes], "timestamp": time}
    states = {name: codes for name, codes in states.items() if n and codes.min() < 0}
    kept = np.ones(n, bool)
    for name, codes in states.items():
        rows = kept & (codes == NO_ID)
        if count := int(rows.sum()):
            marks = f" ({', '.join(such)})" * (name == "rating" and bool(such))
            notes[f"rows without {name}{marks}"] = count
            kept &= ~rows
    wrong = {}
    for name, codes in states.items():
        wrong[name] = np.flatnonzero(kept & (codes <= BAD_ID))
        kept[wrong[name]] = False
    if count := table.num_bad + sum(map(len, wrong.values())):
        check_share(table, source, wrong, count, rating_doubt(values, scale, amounts))
        first = [
            f"row {rows[0] + table.first_row}, {table.labels[name]} {shown(table, name, rows[0])}"
            for name, rows in wrong.items()
            if len(rows)
        ]
        lines = "; ".join([*table.first_bad, *first][:3])
        notes[f"rows that could not be read ({lines})"] = count
    if scale:
        mapped = f"ratings of {low:g} to {high:g} mapped to 1 to 5 (--scale)"
        notes[mapped] = int(counts[inside].sum())
        numbers = 1 + 4 * (numbers - low) / (high - low)
    if not kept.any():
        reasons = "; ".join(f"{count:,} {why}" for why, count in notes.items())
        raise ValueError(f"{source}: no interaction found in {n:,} rows ({reasons})")
    columns = user, item, numbers.astype(np.float32)[rating.codes], time
    columns = columns if kept.all() else (column[kept] for column in columns)
    return Rows(source, *columns, per_second, user_ids, item_ids, kept, notes, values)


def shown(table: Table, name: str, row: int) -> str:
    """A value, for a message."""
    column = table.columns[name]
    texts = isinstance(column, Column)
    return shorten(repr(column.values[column.codes[row]] if texts else column[row].item()))


def check_share(table: Table, source, wrong: dict[str, np.ndarray], bad: int, doubt: str) -> None:
    """ValueError where more than 1 % of the rows are bad: column, count, examples, the way out."""
    total = table.num_rows + table.num_bad
    if bad <= MAX_BAD_SHARE * total:
        return
    name = max(wrong, key=lambda name: len(wrong[name]), default="")
    if not name or table.num_bad > len(wrong[name]):
        check_bad(table, source)
    what, way_out = {
        "timestamp": ("no times whose order is known", TIME_ADVICE),
        "rating": ("no ratings", doubt) if doubt else ("no numbers", "write it alone, such as 3.5"),
    }.get(name, (f"no {name} ids", "name another column, or write texts"))
    rows = wrong[name]
    examples = [*dict.fromkeys(shown(table, name, row) for row in rows[:1000].tolist())][:2]
    raise ValueError(
        f"{source}: {bad:,} of {total:,} rows cannot be used (1% may be): column "
        f"{table.labels[name]}: {len(rows):,} values are {what}, such as {' and '.join(examples)} "
        f"(row {rows[0] + table.first_row}): {way_out}"
    )


# --------------------------------------------------------------------------------------- the table
def stable_order(key: np.ndarray) -> np.ndarray:
    """np.argsort(key, kind="stable") of integers >= 0 (n,), in a fifth of its time where key and
    row fit into one number."""
    bits = len(key).bit_length()
    if len(key) and int(key.max()) >= 1 << 63 - bits:
        return np.argsort(key, kind="stable")
    packed = key.astype(np.int64)
    packed <<= bits
    packed |= np.arange(len(key))
    packed.sort()
    packed &= (1 << bits) - 1
    return packed


def sort_order(first: np.ndarray, then: np.ndarray) -> np.ndarray:
    """np.lexsort((then, first)) of integers (n,), `first` >= 0."""
    if not len(then) or int(then.max()) - int(then.min()) >= 1 << 63:
        return np.lexsort((then, first))
    order = stable_order(then - then.min())
    return order[stable_order(first[order])]


def finish(
    rows: Rows,
    titles: list[str],  # of each item of rows.item_ids; items with "" are dropped
    name: str,
    words: Words = ITEMS,
    percentile: str = "",  # item, user or all: amounts become ratings by rank inside such a group
    repeats: str = "last",  # of a pair: the last one counts, or amounts "sum" up at the first time
    by_text: bool = True,  # codes in the order of the ids as texts; off: as they stand
) -> Interactions:
    """The sorted log, in which the order of the lines changes nothing but ties in time."""
    user, user_ids = recoded(rows.user, by_text, rows.user_ids)
    item, item_ids, titles = recoded(rows.item, by_text, rows.item_ids, titles)
    order = sort_order(user, rows.time)
    user, item, amount, time = (c[order] for c in (user, item, rows.amount, rows.time))
    del order

    order = stable_order(user.astype(np.int64) * len(item_ids) + item)  # of a pair by time
    pair_ends = np.append((np.diff(user[order]) != 0) | (np.diff(item[order]) != 0), True)
    if merged := int((~pair_ends).sum()):
        chosen = pair_ends
        if repeats == "sum":  # the first time; of equal times the row further down
            pair = np.append(0, np.cumsum(pair_ends)[:-1])
            begin = np.append(0, np.flatnonzero(pair_ends)[:-1] + 1)
            first = time[order] == time[order][begin][pair]
            chosen = first & (pair_ends | ~np.append(first[1:], False))
            sums = np.bincount(pair, amount[order])[pair].astype(np.float32)
            amount[order] = sums
        keep = np.zeros(len(user), bool)
        keep[order[chosen]] = True
        user, item, amount, time = (c[keep] for c in (user, item, amount, time))
        last = "repeated pairs of user and item, of which the last counts"
        rows.notes[last if repeats == "last" else "repeats, added up"] = merged
    if percentile:
        group = {"item": item, "user": user, "all": np.zeros_like(item)}[percentile]
        amount = percentile_ratings(amount, group)
    start = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(user_ids)))])
    seconds = time // rows.per_second
    log = Interactions(
        user, item, amount, seconds, start, titles, user_ids, item_ids, name, words=words
    )
    titled = np.array([bool(title) for title in titles])
    if not titled.any():
        raise ValueError(
            f"{rows.source}: not one of its {len(titles):,} items has a title; first {item_ids[:3]}"
        )
    if not titled.all():
        kept = titled[item]
        rows.notes["interactions with an item that has no title"] = int((~kept).sum())
        log = select_rows(log, kept)
    return replace(log, titles=unique_titles(log.titles), notes=rows.notes)


def recoded(codes: np.ndarray, by_text: bool, ids: list[str], *others: list) -> tuple:
    """Codes in the order of the ids, of those in use; `ids` and `others` in that order."""
    order = np.flatnonzero(np.bincount(codes, minlength=len(ids))).tolist()
    if by_text:
        order.sort(key=ids.__getitem__)
    new = np.full(len(ids), -1, np.int32)
    new[order] = np.arange(len(order), dtype=np.int32)
    return new[codes], *([values[i] for i in order] for values in (ids, *others))


def make_interactions(user, item, rating, timestamp, titles: Mapping, name="") -> Interactions:
    """The log of raw columns; of a repeated user-item pair the last rating counts.

    `titles` maps item id to title."""
    user_ids, user = np.unique(np.asarray(user), return_inverse=True)
    item_ids, item = np.unique(np.asarray(item), return_inverse=True)
    missing = [i for i in item_ids.tolist() if i not in titles]
    if missing:
        raise ValueError(f"{len(missing)} items of the log have no title, first {missing[:3]}")
    rows = Rows(
        source="",
        user=user.astype(np.int32),
        item=item.astype(np.int32),
        amount=np.asarray(rating, np.float32),
        time=np.asarray(timestamp, np.int64),
        per_second=1,
        user_ids=[*map(str, user_ids.tolist())],
        item_ids=[*map(str, item_ids.tolist())],
    )
    return finish(rows, [titles[i] for i in item_ids.tolist()], name, by_text=False)


def percentile_ratings(amount: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Ratings 1 to 5 (float32) by rank inside each group: ceil(5 * mid-rank / size), so that the
    top fifth gets 5.

    amount (n,) float, group (n,) int codes. Equal amounts get equal ratings, a group of one gets 3
    (appendix E.1)."""
    order = np.lexsort((amount, group))
    g, a = group[order], amount[order]
    new_group = np.append(True, g[1:] != g[:-1])
    new_tie = new_group | np.append(True, a[1:] != a[:-1])
    first, tie = np.flatnonzero(new_group), np.flatnonzero(new_tie)  # rows where they begin
    size, length = np.diff(np.append(first, len(g))), np.diff(np.append(tie, len(g)))
    of = np.cumsum(new_group)[tie] - 1  # the group of each tie
    # (r - 1/2) / n is the share of the group that lies below: rows before it, and half of its own
    share = (tie - first[of] + length / 2) / size[of]
    ratings = np.empty(len(g), np.float32)
    ratings[order] = np.repeat(np.ceil(5 * share), length)
    return ratings
