"""A split in time: training ends before a date, tests come after it.

    python -m loaders --dataset movielens --data_dir ml-1m.zip \\
        --split_by time --split_date 2000-12-01

Of every user, in order of time:

    training | validation: last liked before the date | date | test: first liked after it

    training     examples whose followers all lie before the user's validation item (before the
                 date, where there is none); the counting recommenders are fitted on the same rows
    validation   the last liked interaction before the date
    test         the first liked interaction from the date on; the history shown is all that came
                 before it, and may hold disliked interactions from after the date
    --min_history interactions must lie before each, else the user has none of that kind.

Training and validation are built from a log that ends at the date: its users, its items, its
candidates. So neither a random candidate of theirs nor what it leaves out tells of later. The
candidates of a test come from the whole catalogue, new items included.

Without --split_date the date is the time from which on the last 10 % of all interactions lie.

Left out, because they read the whole log and would tell of the future: --core and ratings that
are ranks of amounts (--percentile; Steam, Last.fm). What a loader does before a log exists is not
divided either: of a repeated pair the last one counts, and titles come from the item file.
"""

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np

from data import ExampleConfig, Examples, Interactions, Retrieve, build_examples, select_rows

LAST_SHARE = 0.1  # of all interactions lie after the date, if none is given


def parse_date(text: str) -> int:
    """Seconds since 1970 of an ISO date, or date and time; UTC if it names no zone."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"--split_date {text}: expected a date such as 2000-12-01 or 2000-12-01T18:00"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return int(moment.timestamp())


def date_text(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def date_of(interactions: Interactions, split_date: str) -> int:
    """Seconds of the date; ValueError if no interaction lies before it, or none after it."""
    first, last = int(interactions.timestamp.min()), int(interactions.timestamp.max())
    if split_date:
        date = parse_date(split_date)
    else:
        place = int((1 - LAST_SHARE) * len(interactions.timestamp))
        date = int(np.partition(interactions.timestamp, place)[place])
    if not first < date <= last:
        raise ValueError(
            f"--split_by time: {date_text(date)} does not divide the log, whose times go from "
            f"{date_text(first)} to {date_text(last)}; give another --split_date"
        )
    return date


def last_row_of_each(interactions: Interactions, rows: np.ndarray) -> np.ndarray:
    """(users,) the last of these rows that belongs to the user, or -1."""
    last = np.full(interactions.num_users, -1, np.int64)
    np.maximum.at(last, interactions.user[rows], rows)
    return last


def past_places(past: Interactions, config: ExampleConfig) -> dict[str, np.ndarray]:
    """Rows of training and validation of a log that ends at the date; sets its train_end."""
    position = np.arange(len(past.user))
    age = position - past.start[past.user]
    val = last_row_of_each(past, np.flatnonzero(past.rating >= config.min_rating))
    has_val = (val >= 0) & (age[val] >= config.min_history)
    past.train_end = np.where(has_val, val, past.start[1:])
    ends_before = position + config.followers <= past.train_end[past.user]
    train = np.flatnonzero((age >= config.min_history) & ends_before)
    return {"train": train, "val": val[has_val]}


def test_places(interactions: Interactions, date: int, config: ExampleConfig) -> np.ndarray:
    """(E,) each user's first liked row from the date on, if enough history lies before it."""
    rows = np.flatnonzero(
        (interactions.timestamp >= date) & (interactions.rating >= config.min_rating)
    )
    _, first = np.unique(interactions.user[rows], return_index=True)
    rows = rows[first]
    return rows[rows - interactions.start[interactions.user[rows]] >= config.min_history]


def in_whole_log(
    examples: Examples, interactions: Interactions, rows: np.ndarray, items
) -> Examples:
    """Examples of the past as examples of the whole log; rows and items: past code -> its code."""
    candidates = items[examples.candidates].astype(np.int32)
    return replace(
        examples, interactions=interactions, position=rows[examples.position], candidates=candidates
    )


def build_dated_examples(
    interactions: Interactions, config, retrieve: Retrieve | None = None
) -> tuple[Interactions, dict[str, Examples]]:
    """The log, which now knows where training ends, and its three splits."""
    date = date_of(interactions, config.split_date)
    before = interactions.timestamp < date
    past = select_rows(interactions, before)
    places = past_places(past, config)

    rows, items = np.flatnonzero(before), np.unique(interactions.item[before])
    users = np.unique(interactions.user[before])
    train_end = interactions.start[:-1].copy()
    train_end[users] += past.train_end - past.start[:-1]
    note = f"interactions from {date_text(date)} (UTC) on, which training does not see"
    interactions = replace(
        interactions, train_end=train_end, notes=interactions.notes | {note: int((~before).sum())}
    )

    test = test_places(interactions, date, config)
    for split, found in (*places.items(), ("test", test)):
        if len(found) == 0:
            raise ValueError(
                f"no {split} example: --split_by time divides at {date_text(date)}, and no user "
                f"has a place for one; give another --split_date, or lower --min_history "
                f"{config.min_history} or --followers {config.followers}"
            )
    splits = build_examples(past, config, retrieve, places)
    splits = {split: in_whole_log(ex, interactions, rows, items) for split, ex in splits.items()}
    return interactions, splits | build_examples(interactions, config, retrieve, {"test": test})
