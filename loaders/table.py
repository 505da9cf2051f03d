"""From coded columns to the table that everything starts from: interactions as flat arrays.

`usable_rows` says what the values mean, leaves out what cannot be used, and counts it; `finish`
merges repeated pairs of user and item, turns amounts into ratings, sorts and names the items. After
it no step knows where the data came from."""

import html
import re
import unicodedata
from dataclasses import dataclass, field, replace

import numpy as np

from data import ITEMS, Interactions, Words, select_rows
from loaders import values
from loaders.readers import Table, check_bad

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
    taken, numbers, out = set(titles), dict.fromkeys(titles, 0), []
    for title in titles:
        name = title
        while numbers[title] and name in taken:  # not the first of its name
            numbers[title] += 1
            name = f"{title} ({numbers[title]})"
        numbers[title] = numbers[title] or 1
        taken.add(name)
        out.append(name)
    return out


# --------------------------------------------------------------------------------------------- rows
@dataclass
class Rows:
    """The rows of a log that can be used."""

    user: np.ndarray  # (n,) int32 code
    item: np.ndarray  # (n,) int32 code
    amount: np.ndarray  # (n,) float32 rating of 1 to 5, or hours, plays, ...
    time: np.ndarray  # (n,) int64
    per_second: int  # of time
    user_ids: list[str]
    item_ids: list[str]
    notes: dict[str, int] = field(default_factory=dict)  # what was left out -> how often


def usable_rows(
    table: Table,
    source: str,
    amounts: bool = False,  # any numbers from 0 on; otherwise ratings above 0 and up to 5
    scale: str = "",  # which is mapped to 1 to 5
    absent: frozenset = values.ABSENT_IDS,  # texts that are no id
) -> Rows:
    """What can be used of a table; ValueError if more than 1 % is neither usable nor absent."""
    n, columns, first = table.num_rows, table.columns, table.first_row
    user, user_ids = values.read_ids(columns["user"], absent)
    item, item_ids = values.read_ids(columns["item"], absent)
    rating = columns.get("rating") or values.Column(np.zeros(n, np.int32), ["1"])
    numbers = values.read_numbers(rating)
    low, high = values.parse_scale(scale) if scale else (0.0, 3e38) if amounts else (1e-9, 5.0)
    inside = (numbers >= low) & (numbers <= high)
    none = ~inside & np.isin(numbers, [values.ABSENT, 0, -1])
    state = np.where(inside, 0, np.where(none, values.NO_ID, values.BAD_ID)).astype(np.int8)
    time, per_second = first + np.arange(n), 1
    if "timestamp" in columns:
        time, per_second = values.read_times(columns["timestamp"])

    bounds = f"in --scale {scale}" if scale else "from 0 on" if amounts else "above 0 and up to 5"
    meant = {"user": "", "item": "", "rating": f"number {bounds}, written as 1234.5 (no commas)"}
    meant["timestamp"] = "time, written as 2024-12-31 23:59:59, or in seconds since 1970"
    kept, notes = np.ones(n, bool), {}
    for name, codes in zip(meant, (user, item, state[rating.codes], time)):
        if count := int((kept & (codes == values.NO_ID)).sum()):
            zeros = " (empty, or 0 or -1 outside of the scale)" * (name == "rating")
            notes[f"rows without {name}{zeros}"] = count
        bad_rows = np.flatnonzero(kept & (codes <= values.BAD_ID))
        for row in bad_rows[:2].tolist():
            column, where = columns[name], f"row {row + first}, column {table.labels[name]}"
            is_text = isinstance(column, values.Column)
            value = column.values[column.codes[row]] if is_text else column[row].as_py()
            table.bad(f"{where}: {value!r:.80} is no {meant[name]}", count=0)
        table.num_bad += len(bad_rows)
        table.num_rows -= len(bad_rows)
        kept &= codes >= 0
    check_bad(table, source)
    if table.num_bad:
        notes[f"rows that could not be read ({'; '.join(table.first_bad)})"] = table.num_bad
    if scale:
        numbers = 1 + 4 * (numbers - low) / (high - low)
        notes[f"ratings of {low:g} to {high:g} mapped to 1 to 5 (--scale)"] = int(kept.sum())
    if not kept.any():
        reasons = "; ".join(f"{count:,} {why}" for why, count in notes.items())
        raise ValueError(f"{source}: no interaction found in {n:,} rows ({reasons})")
    rows = user, item, numbers.astype(np.float32)[rating.codes], time
    rows = rows if kept.all() else [column[kept] for column in rows]
    return Rows(*rows, per_second, user_ids, item_ids, notes)


# --------------------------------------------------------------------------------------- the table
def stable_order(key: np.ndarray) -> np.ndarray:
    """np.argsort(key, kind="stable") of integers (n,), in a fifth of its time where key and row
    fit into one number."""
    n, bits = len(key), len(key).bit_length()
    if not n or int(key.max()) - int(key.min()) >= 1 << 63 - bits:
        return np.argsort(key, kind="stable")
    packed = np.subtract(key, key.min(), dtype=np.int64)
    packed <<= bits
    packed |= np.arange(n)
    packed.sort()
    packed &= (1 << bits) - 1
    return packed


def finish(
    rows: Rows,
    titles: list[str],  # of each item of rows.item_ids; items with "" are dropped
    name: str,
    words: Words = ITEMS,
    percentile: str = "",  # item, user or all: amounts become ratings by rank inside such a group
    summed: bool = False,  # repeats of a pair add up at the first time; else the last one counts
    key=str,  # codes stand in the order of the ids by it
) -> Interactions:
    """The sorted log, in which the order of the lines changes nothing but ties in time."""
    user, user_ids = recoded(rows.user, key, rows.user_ids)
    item, item_ids, titles = recoded(rows.item, key, rows.item_ids, titles)
    place = stable_order(rows.time)
    place = place[stable_order(user[place])]  # by user, then time
    user = np.repeat(np.arange(len(user_ids), dtype=np.int32), np.bincount(user))
    item, amount, time = (column[place] for column in (item, rows.amount, rows.time))

    pair = user.astype(np.int64) * len(item_ids) + item
    place = stable_order(pair)  # by pair, then time
    pair = pair[place]
    chosen = np.append(pair[1:] != pair[:-1], True)  # the last row of each pair
    del pair
    if merged := int((~chosen).sum()):
        if summed:
            chosen = np.roll(chosen, 1)  # the first row
            firsts = np.flatnonzero(chosen)
            amount[place[firsts]] = np.add.reduceat(amount[place], firsts, dtype=np.float64)
        keep = np.zeros(len(user), bool)
        keep[place[chosen]] = True
        user, item, amount, time = (c[keep] for c in (user, item, amount, time))
        last = "repeated pairs of user and item, of which the last counts"
        rows.notes["repeats, added up" if summed else last] = merged
    if percentile:
        group = {"item": item, "user": user, "all": np.zeros_like(item)}[percentile]
        amount = percentile_ratings(amount, group)
    start = np.concatenate([[0], np.cumsum(np.bincount(user))])
    ids = titles, user_ids, item_ids
    log = Interactions(user, item, amount, time // rows.per_second, start, *ids, name, words=words)
    titled = np.array([bool(title) for title in titles])
    if not titled.all():
        kept = titled[item]
        rows.notes["interactions with an item that has no title"] = int((~kept).sum())
        log = select_rows(log, kept)
    return replace(log, titles=unique_titles(log.titles), notes=rows.notes)


def recoded(codes: np.ndarray, key, ids: list[str], *others: list) -> tuple:
    """Codes in the order of the ids by a key, of those in use; `ids` and `others` in that order."""
    order = np.flatnonzero(np.bincount(codes, minlength=len(ids))).tolist()
    order.sort(key=lambda code: key(ids[code]))
    new = np.full(len(ids), -1, np.int32)
    new[order] = np.arange(len(order), dtype=np.int32)
    return new[codes], *([texts[i] for i in order] for texts in (ids, *others))


def percentile_ratings(amount: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Ratings 1 to 5 (float32) by rank inside each group: ceil(5 * mid-rank / size), so that the
    top fifth gets 5.

    amount (n,) float, group (n,) codes. Equal amounts get equal ratings, a group of one gets 3
    (appendix E.1)."""
    amounts, rank = np.unique(amount, return_inverse=True)
    group = group.astype(np.int64)
    key = group * len(amounts) + rank  # rows of an equal one are a tie
    keys, tie, length = np.unique(key, return_inverse=True, return_counts=True)
    size, of = np.bincount(group), keys // len(amounts)
    before = np.cumsum(length) - length - (np.cumsum(size) - size)[of]  # in the group, and lower
    share = (before + length / 2) / size[of]
    return np.ceil(5 * share).astype(np.float32)[tie]
