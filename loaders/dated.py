"""A split in time: training ends before a date, tests come after it.

    python -m loaders --dataset movielens --data_dir ml-1m.zip --split_date 10%

Of every user, in order of time:

    training | validation: last liked before the date | date | test: first liked after it

Training and validation are built from a log that ends at the date, so that neither a random
candidate nor what is left out tells of later; followers end before the validation item. A test
shows all that came before it, and its candidates come from the whole catalogue. Left out: --core
and ranks of amounts, which read the whole log."""

from dataclasses import replace
from datetime import datetime, timezone

import numpy as np

from data import Examples, Interactions, Retrieve, build_examples, select_rows

LAST_TENTH = "10%"  # for --split_date: of all interactions lie after the date


def date_of(interactions: Interactions, split_date: str) -> np.datetime64:
    """The date, UTC if it names no zone; ValueError if it does not divide the log."""
    time = np.sort(interactions.timestamp).view("M8[s]")
    try:
        if split_date == LAST_TENTH:
            date = time[int(0.9 * len(time))]
        else:
            given = datetime.fromisoformat(split_date)
            given = given if given.tzinfo else given.replace(tzinfo=timezone.utc)
            date = np.datetime64(int(given.timestamp()), "s")
    except ValueError:
        date = None
    if date is None or not time[0] < date <= time[-1]:
        raise ValueError(
            f"--split_date {split_date}: expected 10%, or a date such as 2000-12-01 or "
            f"2000-12-01T18:00 between the log's first and last time, {time[0]} and {time[-1]}"
        )
    return date


def build_dated_examples(
    interactions: Interactions, config, retrieve: Retrieve | None = None
) -> tuple[Interactions, dict[str, Examples]]:
    """The log, which now knows where training ends, and its three splits."""
    date = date_of(interactions, config.split_date)
    before = interactions.timestamp.view("M8[s]") < date
    past = select_rows(interactions, before)
    row = np.arange(len(past.user))
    age = row - past.start[past.user]
    liked = np.flatnonzero(past.rating >= config.min_rating)
    val = np.full(past.num_users, -1)  # the last liked row of each user
    val[past.user[liked]] = liked
    has_val = (val >= 0) & (age[val] >= config.min_history)
    past.train_end = np.where(has_val, val, past.start[1:])
    has_followers = row + config.followers <= past.train_end[past.user]
    train = np.flatnonzero((age >= config.min_history) & has_followers)
    splits = build_examples(past, config, retrieve, {"train": train, "val": val[has_val]})

    train_end = interactions.start[:-1].copy()
    train_end[np.unique(interactions.user[before])] += past.train_end - past.start[:-1]
    notes = {
        f"interactions from {date} (UTC) on, which training does not see": int((~before).sum())
    }
    log = replace(interactions, train_end=train_end, notes=interactions.notes | notes)
    rows, items = np.flatnonzero(before), np.unique(log.item[before])
    for split, examples in splits.items():  # with the codes of the whole log
        position, candidates = rows[examples.position], items[examples.candidates]
        splits[split] = replace(
            examples, interactions=log, position=position, candidates=candidates.astype(np.int32)
        )
    liked = np.flatnonzero(~before & (log.rating >= config.min_rating))
    test = liked[np.unique(log.user[liked], return_index=True)[1]]  # each user's first
    test = test[test - log.start[log.user[test]] >= config.min_history]
    return log, splits | build_examples(log, config, retrieve, {"test": test})
