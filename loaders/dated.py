"""A split in time: training ends before a date, tests come after it.

    python -m loaders --dataset movielens --data_dir ml-1m.zip \\
        --split_date 2000-12-01

Of every user, in order of time:

    training | validation: last liked before the date | date | test: first liked after it

Training examples have all their followers before the user's validation item (or the date), and the
counting recommenders are fitted on the same rows. A test shows all that came before it, from after
the date, too. Each needs --min_history interactions before it. Training and validation are built
from a log that ends at the date, so that neither a random candidate nor what is left out tells of
later; the candidates of a test come from the whole catalogue. `--split_date 10%` is the date that
the last tenth of all interactions lie after.

Left out: --core and ratings that are ranks of amounts, which read the whole log. What a loader
does before is not divided: of a repeated pair the last one counts."""

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np

from data import ExampleConfig, Examples, Interactions, Retrieve, build_examples, select_rows

LAST_TENTH = "10%"  # for --split_date: of all interactions lie after the date


def parse_date(text: str) -> int:
    """Seconds since 1970 of an ISO date, or date and time; UTC if it names no zone."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"--split_date {text}: expected a date such as 2000-12-01 or 2000-12-01T18:00, or 10%"
        ) from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def date_text(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


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


def past_places(past: Interactions, config: ExampleConfig) -> dict[str, np.ndarray]:
    """Rows of training and validation of a log that ends at the date; sets its train_end."""
    position = np.arange(len(past.user))
    age = position - past.start[past.user]
    val = np.full(past.num_users, -1)  # the last liked row of each user
    liked = np.flatnonzero(past.rating >= config.min_rating)
    np.maximum.at(val, past.user[liked], liked)
    has_val = (val >= 0) & (age[val] >= config.min_history)
    past.train_end = np.where(has_val, val, past.start[1:])
    ends_before = position + config.followers <= past.train_end[past.user]
    train = np.flatnonzero((age >= config.min_history) & ends_before)
    return {"train": train, "val": val[has_val]}


def test_places(interactions: Interactions, date: int, config: ExampleConfig) -> np.ndarray:
    """(E,) each user's first liked row from the date on, if enough history lies before it."""
    liked = (interactions.timestamp >= date) & (interactions.rating >= config.min_rating)
    rows = np.flatnonzero(liked)
    rows = rows[np.unique(interactions.user[rows], return_index=True)[1]]
    return rows[rows - interactions.start[interactions.user[rows]] >= config.min_history]


def build_dated_examples(
    interactions: Interactions, config, retrieve: Retrieve | None = None
) -> tuple[Interactions, dict[str, Examples]]:
    """The log, which now knows where training ends, and its three splits."""
    date = date_of(interactions, config.split_date)
    before = interactions.timestamp < date
    past = select_rows(interactions, before)
    places = past_places(past, config)

    train_end = interactions.start[:-1].copy()
    train_end[np.unique(interactions.user[before])] += past.train_end - past.start[:-1]
    note = f"interactions from {date_text(date)} (UTC) on, which training does not see"
    notes = interactions.notes | {note: int((~before).sum())}
    interactions = replace(interactions, train_end=train_end, notes=notes)

    test = test_places(interactions, date, config)
    for split, found in (*places.items(), ("test", test)):
        if len(found) == 0:
            raise ValueError(
                f"no {split} example: --split_date divides at {date_text(date)}, and no user "
                f"has a place for one; give another --split_date, or lower --min_history "
                f"{config.min_history} or --followers {config.followers}"
            )
    splits = build_examples(past, config, retrieve, places)
    rows, items = np.flatnonzero(before), np.unique(interactions.item[before])
    splits = {  # with the whole log's codes
        split: replace(
            ex,
            interactions=interactions,
            position=rows[ex.position],
            candidates=items[ex.candidates].astype(np.int32),
        )
        for split, ex in splits.items()
    }
    return interactions, splits | build_examples(interactions, config, retrieve, {"test": test})
