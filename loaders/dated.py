"""A split in time, --split_date: training ends before a date, tests come after it.

    training | validation: last liked before the date | date | test: first liked after it

So it is for every user. Training and validation are built from a log that ends at the date, so that
no random candidate tells of later. A test shows all that came before it, and its candidates come
from the whole catalogue. --core and ranks of amounts read the whole log, and are refused."""

from dataclasses import replace

import numpy as np

from data import Examples, Interactions, Retrieve, build_examples, select_rows

LAST_TENTH = "10%"  # for --split_date: of all interactions lie after the date


def date_of(interactions: Interactions, split_date: str) -> np.datetime64:
    """The date, UTC if it names no zone; ValueError if it does not divide the log."""
    time = np.sort(interactions.timestamp).view("M8[s]")
    try:
        tenth = split_date == LAST_TENTH
        date = time[int(0.9 * len(time))] if tenth else np.datetime64(split_date, "s")
    except ValueError:
        date = time[0]
    if not time[0] < date <= time[-1]:
        there = f"between the log's first and last time, {time[0]} and {time[-1]}"
        form = "expected 10%, or a date such as 2000-12-01 or 2000-12-01T18:00"
        raise ValueError(f"--split_date {split_date}: {form} {there}")
    return date


def build_dated_examples(
    interactions: Interactions, config, retrieve: Retrieve | None = None
) -> tuple[Interactions, dict[str, Examples]]:
    """The log, which now knows where training ends, and its three splits."""
    date = date_of(interactions, config.split_date)
    before = interactions.timestamp.view("M8[s]") < date
    past = select_rows(interactions, before)
    row = np.arange(len(past.user))
    is_late = row - past.start[past.user] >= config.min_history
    liked = np.flatnonzero(past.rating >= config.min_rating)
    val = np.full(past.num_users, -1)  # the last liked row of each user
    val[past.user[liked]] = liked
    has_val = (val >= 0) & is_late[val]
    past.train_end = np.where(has_val, val, past.start[1:])
    train = is_late & (row + config.followers <= past.train_end[past.user])
    places = {"train": np.flatnonzero(train), "val": val[has_val]}
    splits = build_examples(past, config, retrieve, places)

    train_end = interactions.start[:-1].copy()
    train_end[np.unique(interactions.user[before])] += past.train_end - past.start[:-1]
    why = f"interactions from {date} (UTC) on, which training does not see"
    notes = interactions.notes | {why: int((~before).sum())}
    log = replace(interactions, train_end=train_end, notes=notes)
    rows, items = np.flatnonzero(before), np.unique(log.item[before])
    for split, examples in splits.items():  # with the codes of the whole log
        candidates, position = items[examples.candidates], rows[examples.position]
        part = replace(examples, interactions=log, position=position)
        splits[split] = replace(part, candidates=candidates.astype(np.int32))
    liked = np.flatnonzero(~before & (log.rating >= config.min_rating))
    test = liked[np.unique(log.user[liked], return_index=True)[1]]  # each user's first
    test = test[test - log.start[log.user[test]] >= config.min_history]
    return log, splits | build_examples(log, config, retrieve, {"test": test})
