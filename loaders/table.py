"""From coded columns to the table that everything starts from: interactions as flat arrays.

`usable_rows` says what the values mean, leaves out what cannot be used, and counts it; `finish`
merges repeated pairs of user and item, makes ratings of amounts, sorts and names the items. After
it no step knows where the data came from."""

import html
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from data import ITEMS, Interactions, Words, select_rows
from loaders.tables import MAX_BAD_SHARE, Table, check_bad, shorten
from loaders.values import (
    ABSENT,
    ABSENT_IDS,
    BAD_ID,
    NO_ID,
    TIME_ADVICE,
    fitting_scale,
    parse_scale,
    read_ids,
    read_numbers,
    read_times,
)

# ------------------------------------------------------------------------------------------- titles
MAX_TITLE = 200  # characters; longer ones (some books have thousands) are cut
_CONTROL = dict.fromkeys([*range(32), *range(127, 160), 0xFEFF], " ")
_ENTITY = re.compile(r"&(#\d+|#[xX][0-9a-fA-F]+|\w+);")  # "Q&notation" holds none


def clean_title(title: str) -> str:
    """HTML entities become text, white space and control characters single blanks:
    a title is one line of a prompt."""
    text = _ENTITY.sub(lambda match: html.unescape(match[0]), title) if "&" in title else title
    title = " ".join(unicodedata.normalize("NFC", text).translate(_CONTROL).split())
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
    kept: np.ndarray  # (rows of the table,) bool
    notes: dict[str, int]
    marks: dict[str, int]  # "0", "-1" -> how often it stood for no rating
    values: np.ndarray  # distinct ratings as read


def usable_rows(
    table: Table,
    source: str,
    amounts: bool = False,  # any numbers from 0 on; otherwise ratings above 0 and up to 5
    scale: str = "",  # which is mapped to 1 to 5
    absent: frozenset = ABSENT_IDS,  # texts that are no id
) -> Rows:
    """What can be used of a table; ValueError if more than 1 % is neither usable nor absent."""
    n, columns, notes = table.num_rows, table.columns, {}
    user, user_ids = read_ids(columns["user"], absent)
    item, item_ids = read_ids(columns["item"], absent)
    codes, distinct = np.zeros(n, np.int32), np.array([1.0, ABSENT])  # of ratings
    if "rating" in columns:
        codes = columns["rating"].codes
        distinct = read_numbers(columns["rating"], table.delimiter)
    counts = np.bincount(codes + 1, minlength=len(distinct))
    counts = np.append(counts[1:], counts[0])  # null stands behind the others
    low, high = parse_scale(scale) or ((0.0, 3e38) if amounts else (1e-9, 5.0))
    values = np.unique(distinct[np.isfinite(distinct) & (counts > 0)])
    inside = (distinct >= low) & (distinct <= high)
    if scale == "binary":
        inside &= (distinct == 0) | (distinct == 1)
    marks = {}
    for mark in (0.0, -1.0):  # outside of the scale they mean none
        if not low <= mark <= high and (times := int(counts[distinct == mark].sum())):
            marks[f"{mark:g}"] = times
            distinct[distinct == mark] = ABSENT
    if "timestamp" in columns and table.moments:
        time, per_second = columns["timestamp"], 1_000_000
    elif "timestamp" in columns:
        time, per_second = read_times(columns["timestamp"])
    else:
        time, per_second = table.first_row + np.arange(n), 1

    none = {"user": user == NO_ID, "item": item == NO_ID, "rating": (distinct == ABSENT)[codes]}
    none["timestamp"] = time == NO_ID
    left_out = np.zeros(n, bool)
    for name, rows in none.items():
        if count := int((rows & ~left_out).sum()):
            shown = ", ".join(f"{mark} {times:,} times" for mark, times in marks.items())
            why = f" ({shown})" if name == "rating" and marks else ""
            notes[f"rows without {name}{why}"] = count
            left_out |= rows
    wrong = {"user": user == BAD_ID, "item": item == BAD_ID, "timestamp": time <= BAD_ID}
    wrong["rating"] = (~inside & (distinct != ABSENT))[codes]
    wrong = {name: rows & ~left_out for name, rows in wrong.items()}
    bad = np.logical_or.reduce([*wrong.values()])
    check_share(table, source, wrong, int(bad.sum()), (values, scale, amounts))
    if count := int(bad.sum()) + table.num_bad:
        lines = [*table.first_bad, *first_of(table, wrong)][:3]
        notes[f"rows that could not be read ({'; '.join(lines)})"] = count
    if scale:
        why = f"ratings of {low:g} to {high:g} mapped to 1 to 5 (--scale)"
        notes[why] = int(counts[inside].sum())
        distinct = 1 + 4 * (distinct - low) / (high - low)
    kept = ~(left_out | bad)
    if not kept.any():
        reasons = "; ".join(f"{count:,} {why}" for why, count in notes.items())
        raise ValueError(f"{source}: no interaction found in {n:,} rows ({reasons})")
    amount = distinct.astype(np.float32)[codes]
    columns = [c if kept.all() else c[kept] for c in (user, item, amount, time)]
    return Rows(source, *columns, per_second, user_ids, item_ids, kept, notes, marks, values)


def first_of(table: Table, wrong: dict[str, np.ndarray]) -> list[str]:
    """The first wrong value of each column, with its row."""
    out = []
    for name, rows in wrong.items():
        for row in np.flatnonzero(rows)[:1].tolist():
            out.append(
                f"row {row + table.first_row}, {table.labels[name]} {shown(table, name, row)}"
            )
    return out


def shown(table: Table, name: str, row: int) -> str:
    column = table.columns[name]
    value = column[row] if isinstance(column, np.ndarray) else column.values[column.codes[row]]
    return shorten(repr(value.item() if isinstance(value, np.generic) else value))


def check_share(table: Table, source: str, wrong: dict, num_bad: int, ratings: tuple) -> None:
    """ValueError where more than 1 % of the rows are bad: column, count, examples, the way out."""
    total, num_bad = table.num_rows + table.num_bad, num_bad + table.num_bad
    if num_bad <= MAX_BAD_SHARE * total:
        return
    name = max(wrong, key=lambda name: int(wrong[name].sum()))
    rows = np.flatnonzero(wrong[name])
    if table.num_bad > len(rows):
        check_bad(table, source)
    start = f"{source}: {num_bad:,} of {total:,} rows cannot be used (1% may be)"
    examples = list(dict.fromkeys(shown(table, name, row) for row in rows[:1000].tolist()))[:2]
    where = f"{start}: column {table.labels[name]}: {len(rows):,} values"
    such = f", such as {' and '.join(examples)} (row {rows[0] + table.first_row})"
    if name == "timestamp":
        raise ValueError(f"{where} are no times whose order is known{such}; {TIME_ADVICE}")
    if name != "rating":
        raise ValueError(f"{where} are no {name} ids{such}; name another column, or write texts")
    if doubt := rating_doubt(*ratings):
        raise ValueError(f"{where} cannot be ratings{such}: {doubt}")
    raise ValueError(f"{where} are no numbers{such}; write the number alone, such as 3.5")


def rating_doubt(values: np.ndarray, scale: str, amounts: bool) -> str:
    """Why these do not look like ratings of a scale from 1 to 5, and the way out; "" if they do."""
    if amounts or not len(values):
        return ""
    found = f"ratings from {values.min():g} to {values.max():g}"
    if scale:
        low, high = parse_scale(scale)
        outside = values.min() < low or values.max() > high
        what = "values other than 0 and 1 of" if scale == "binary" else "ratings outside"
        return f"{what} --scale {low:g},{high:g}: {found}" if outside or scale == "binary" else ""
    advice = fitting_scale(values)
    return advice and (
        f"{found} are not those of a scale from 1 to 5; "
        f"say which scale it is, and they are mapped: {advice}"
    )


# --------------------------------------------------------------------------------------- the table
def sort_order(first: np.ndarray, then: np.ndarray) -> np.ndarray:
    """(n,) the order by `first` (>= 0), of equal ones by `then`, of equal ones as they stand; ints.

    np.lexsort((then, first)), in a third of the time where both fit into one key."""
    if not len(first):
        return np.zeros(0, np.int64)
    low = int(then.min())
    span = int(then.max()) - low + 1
    if (int(first.max()) + 1) * span >= 1 << 63:
        return np.lexsort((then, first))
    return np.argsort(first.astype(np.int64) * span + (then.astype(np.int64) - low), kind="stable")


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
    keep, amount, merged = merged_pairs(user, item, amount, time, len(item_ids), repeats)
    if merged:
        sums = "repeats, added up"
        last = "repeated pairs of user and item, of which the last counts"
        rows.notes[last if repeats == "last" else sums] = merged
        user, item, amount, time = (c[keep] for c in (user, item, amount, time))
    if percentile:
        group = {"item": item, "user": user, "all": np.zeros_like(item)}[percentile]
        amount = percentile_ratings(amount, group)
    start = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(user_ids)))])
    seconds = time // rows.per_second
    log = Interactions(
        user, item, amount, seconds, start, titles, user_ids, item_ids, name, words=words
    )
    titled = np.array([bool(title) for title in titles])[item]
    if not titled.all():
        why = "interactions with an item that has no title"
        rows.notes[why] = int(len(titled) - titled.sum())
        if not titled.any():
            first = item_ids[:3]
            raise ValueError(
                f"{rows.source}: not one of its {len(titles):,} items has a title; first {first}"
            )
        log = select_rows(log, titled)
    return replace(log, titles=unique_titles(log.titles), notes=rows.notes)


def recoded(codes: np.ndarray, by_text: bool, ids: list[str], *others: list) -> tuple:
    """Codes in the order of the ids, of those in use; `ids` and `others` in that order."""
    order = np.flatnonzero(np.bincount(codes, minlength=len(ids))).tolist()
    if by_text:
        order = sorted(order, key=ids.__getitem__)
    new = np.full(len(ids), -1, np.int32)
    new[order] = np.arange(len(order), dtype=np.int32)
    return new[codes], *([values[i] for i in order] for values in (ids, *others))


def merged_pairs(user, item, amount, time, num_items: int, repeats: str) -> tuple:
    """Of rows by user and time: (n,) bool those that stay, amounts, how many go."""
    key = user.astype(np.int64) * num_items + item
    order = np.argsort(key, kind="stable")  # of a pair in the order of time
    key = key[order]
    ends = np.append(key[1:] != key[:-1], True)
    merged = len(key) - int(ends.sum())
    if not merged:
        return ends, amount, 0
    chosen = ends
    if repeats == "sum":  # the first time; of equal times the row further down
        pair = np.append(0, np.cumsum(ends)[:-1])
        begin = np.append(0, np.flatnonzero(ends)[:-1] + 1)
        first = time[order] == time[order][begin][pair]
        chosen = first & (ends | ~np.append(first[1:], False))
        sums = np.bincount(pair, amount[order])[pair].astype(np.float32)
        amount = np.empty_like(sums)
        amount[order] = sums
    keep = np.zeros(len(key), bool)
    keep[order[chosen]] = True
    return keep, amount, merged


def make_interactions(user, item, rating, timestamp, titles: Mapping, name="") -> Interactions:
    """The log of raw columns; of a repeated user-item pair the last rating counts.

    `titles` maps item id to title."""
    user_ids, user = np.unique(np.asarray(user), return_inverse=True)
    item_ids, item = np.unique(np.asarray(item), return_inverse=True)
    missing = [i for i in item_ids.tolist() if i not in titles]
    if missing:
        raise ValueError(f"{len(missing)} items of the log have no title, first {missing[:3]}")
    rating, time = np.asarray(rating, np.float32), np.asarray(timestamp, np.int64)
    ids = [str(u) for u in user_ids.tolist()], [str(i) for i in item_ids.tolist()]
    codes = user.astype(np.int32), item.astype(np.int32)
    rows = Rows("", *codes, rating, time, 1, *ids, None, {}, {}, None)
    names = [titles[i] for i in item_ids.tolist()]
    return finish(rows, names, name, by_text=False)


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
