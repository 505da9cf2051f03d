"""A split in time: training ends before a date, tests come after it.

    python -m loaders --dataset movielens --data_dir ml-1m.zip --split_date 10%

Of every user, in order of time:

    training | validation: last liked before the date | date | test: first liked after it

Training and validation are built from a log that ends at the date, so that neither a random
candidate nor what is left out tells of later; followers end before the validation item. A test
shows all that came before it, from after the date, too, and its candidates come from the whole
catalogue. Left out: --core and ranks of amounts, which read the whole log; of a repeated pair the
last one counts, whenever it was."""

from dataclasses import replace
from datetime import datetime, timezone

import numpy as np

from data import Examples, Interactions, Retrieve, build_examples, select_rows

LAST_TENTH = "10%"  # for --split_date: of all interactions lie after the date


def parse_date(text: str) -> int:
    """Seconds since 1970 of an ISO date, or date and time; UTC if it names no zone."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"--split_date {text}: expected a date such as 2000-12-01 or 2000-12-01T18:00, or 10%"
        ) from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp())


def date_text(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def date_of(interactions: Interactions, split_date: str) -> int:
    """Seconds of the date; ValueError if no interaction lies before it, or none after it."""
    first, last = int(interactions.timestamp.min()), int(interactions.timestamp.max())
    if split_date == LAST_TENTH:
        date = int(np.sort(interactions.timestamp)[int(0.9 * len(interactions.timestamp))])
    else:
        date = parse_date(split_date)
    if not first < date <= last:
        raise ValueError(
            f"--split_date: {date_text(date)} does not divide the log, whose times go from "
            f"{date_text(first)} to {date_text(last)}; give another --split_date"
        )
    return date


def build_dated_examples(
    interactions: Interactions, config, retrieve: Retrieve | None = None
) -> tuple[Interactions, dict[str, Examples]]:
    """The log, which now knows where training ends, and its three splits."""
    date = date_of(interactions, config.split_date)
    before = interactions.timestamp < date
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

    liked = np.flatnonzero(~before & (interactions.rating >= config.min_rating))
    test = liked[np.unique(interactions.user[liked], return_index=True)[1]]  # each user's first
    age = test - interactions.start[interactions.user[test]]
    places = {"train": train, "val": val[has_val], "test": test[age >= config.min_history]}
    for split, rows in places.items():
        if len(rows) == 0:
            raise ValueError(
                f"no {split} example: --split_date divides at {date_text(date)}, and no user "
                f"has a place for one; give another --split_date, or lower --min_history "
                f"{config.min_history} or --followers {config.followers}"
            )

    train_end = interactions.start[:-1].copy()
    train_end[np.unique(interactions.user[before])] += past.train_end - past.start[:-1]
    note = f"interactions from {date_text(date)} (UTC) on, which training does not see"
    notes = interactions.notes | {note: int((~before).sum())}
    interactions = replace(interactions, train_end=train_end, notes=notes)
    tests = build_examples(interactions, config, retrieve, {"test": places.pop("test")})
    rows, items = np.flatnonzero(before), np.unique(interactions.item[before])
    splits = {}
    for split, examples in build_examples(past, config, retrieve, places).items():
        splits[split] = replace(  # with the codes of the whole log
            examples,
            interactions=interactions,
            position=rows[examples.position],
            candidates=items[examples.candidates].astype(np.int32),
        )
    return interactions, splits | tests
