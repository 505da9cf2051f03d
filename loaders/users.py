"""Users who are asked about: of the log, or with a history of their own (recommend.py).

Titles are cleaned and ratings mapped as training does it; an item id needs the log."""

from dataclasses import dataclass
from math import nan
from pathlib import Path

import numpy as np

from data import Interactions
from hub.files import note_once
from loaders.frozen import DataConfig
from loaders.readers import Table, read_lines, read_records
from loaders.table import clean_title
from loaders.values import parse_scale


@dataclass
class User:
    name: str
    history: list[tuple[str, float]]  # (title, rating) as prompts show them; NaN: not shown
    items: np.ndarray  # codes of all items of the history that the log holds, newest last
    candidates: list[tuple[str | None, str]]  # (item id, title); none: they are retrieved


class Catalogue:
    """Titles and item ids of the log, where one is at hand."""

    def __init__(self, log: Interactions | None):
        self.titles, self.ids = (log.titles, log.item_ids) if log else ([], [])
        self.by_title = {title: code for code, title in enumerate(self.titles)}
        self.by_id = {item: code for code, item in enumerate(self.ids)}

    def find(self, entry, where: str) -> tuple[int | None, str | None, str]:
        """(code, item id, title) of a title, an id or an object; None: the log does not hold it."""
        named = entry if isinstance(entry, dict) else {"title": entry}
        item = None if named.get("item") is None else str(named["item"])
        title = clean_title(named["title"]) if isinstance(named.get("title"), str) else ""
        code = self.by_id.get(item, self.by_title.get(title, self.by_id.get(str(entry))))
        if code is not None:
            return code, self.ids[code], self.titles[code]
        if not title:
            raise ValueError(f"{where} is {entry!r:.80}: give a title (ids need --prepared_dir)")
        if self.titles:
            note_once(f'the log has no "{title}", which is ranked all the same')
        return None, item, title


def read_user(entry, where: str, catalogue: Catalogue, config, fewest: int, retrieve=False) -> User:
    """One user, with at least `fewest` candidates, or none if they may be retrieved."""
    name, history, given = entry.get("user", ""), entry.get("history"), entry.get("candidates", [])
    if type(name) not in (str, int) or [type(history), type(given)] != [list, list]:
        form = '{"user": "u", "history": [{"title": "T", "rating": 4}, ...], "candidates": [...]}'
        raise ValueError(f"{where}: expected {form}")
    found = [catalogue.find(e, f"{where}: history entry {n}") for n, e in enumerate(history, 1)]
    items = [code for code, _, _ in found if code is not None]
    rated = [(title, read_rating(e, where, config)) for (_, _, title), e in zip(found, history)]
    listed = [catalogue.find(e, f"{where}: candidate {n}")[1:] for n, e in enumerate(given, 1)]
    titles = [title for _, title in listed]
    if repeated := [title for title in titles if titles.count(title) > 1]:
        raise ValueError(f"{where}: candidate {repeated[0]!r} stands there twice")
    if not (shown := shown_history(rated, config)):
        raise ValueError(f"{where}: no history (--history_items {config.history_items}); give one")
    if len(given) < fewest and not (retrieve and items and not given):
        raise ValueError(f"{where}: {len(given)} candidates, give at least {fewest}")
    return User(str(name), shown, np.array(items, np.int64), listed)


def read_rating(entry, where: str, config: DataConfig) -> float:
    """A rating mapped from --scale, in the log's precision; NaN, if none is given or needed."""
    rating = entry.get("rating") if isinstance(entry, dict) else None
    optional = not config.ratings or config.dataset == "prepared"
    if rating is None and optional and config.history_items == "all":
        return nan
    asked = "" if config.ranks else config.scale
    low, high = parse_scale(asked) if asked else (1e-9, 5.0)
    if type(rating) not in (int, float) or not low <= rating <= high:
        scale = f"of --scale {asked}" if asked else "above 0 and up to 5"
        raise ValueError(f"{where}: {entry!r:.80}: expected a rating {scale}, as in the log")
    return float(np.float32(1 + 4 * (rating - low) / (high - low) if asked else rating))


def shown_history(rows: list[tuple[str, float]], config: DataConfig) -> list[tuple[str, float]]:
    """The newest --history of (title, rating), as the model was trained on them."""
    least = np.float32(config.min_rating) if config.history_items == "positive" else -np.inf
    rows = [(title, rating) for title, rating in rows if not rating < least]
    return [(title, rating if config.ratings else nan) for title, rating in rows[-config.history :]]


def user_of_log(log: Interactions, code: int, config: DataConfig) -> User:
    """A user of the log, for whom candidates are retrieved."""
    rows = slice(log.start[code], log.start[code + 1])
    items, ratings = log.item[rows].astype(np.int64), log.rating[rows].tolist()
    history = [(log.titles[item], rating) for item, rating in zip(items, ratings)]
    return User(log.user_ids[code], shown_history(history, config), items, [])


def listed_users(file: Path, log: Interactions, config: DataConfig, fewest: int) -> list:
    """Users of a .jsonl file, or the codes of those whose ids stand in a text file; one a line."""
    catalogue, table, found = Catalogue(log), Table(), {}
    codes = {user: code for code, user in enumerate(log.user_ids)}
    lines = filter(None, map(str.strip, read_lines(file)))
    entries = read_records(file, table) if file.suffix == ".jsonl" else lines
    for number, entry in enumerate(entries, 1):
        where = f"{file}: user {number}"
        if isinstance(entry, dict):
            user = read_user(entry, where, catalogue, config, fewest, retrieve=True)
            if not user.name or found.setdefault(user.name, user) is not user:
                raise ValueError(f'{where}: expected a "user" of its own, not {user.name!r}')
        elif entry not in codes:
            raise ValueError(f"{where}: the log has no user {entry!r}; it has {log.user_ids[:3]}")
        else:
            found[entry] = codes[entry]
    if table.num_bad or not found:
        where = str(table.first_bad or "the file")[:400]
        raise ValueError(f"{file}: no user in {where}, expected one a line")
    return list(found.values())
