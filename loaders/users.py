"""Users who are asked about: of the log, or with a history of their own.

    {"user": "u1", "history": [{"title": "...", "rating": 4}, {"item": "7", "rating": 5}],
     "candidates": ["title or item id", {"title": "A new item"}]}

Titles are cleaned and ratings mapped as training does it. An item id needs the log; a title that
the log does not hold is kept, with a note."""

import contextlib
import json
from dataclasses import dataclass
from math import nan
from pathlib import Path

import numpy as np

from common import print0
from data import Interactions
from loaders.files import read_lines
from loaders.frozen import DataConfig
from loaders.table import clean_title
from loaders.values import parse_scale

SHAPE = '{"history": [{"title": "...", "rating": 4}, ...], "candidates": ["...", ...]}'
NOTED = 6  # unknown titles that are named


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
        self.unknown: set[str] = set()

    def find(self, entry, where: str) -> tuple[int | None, str | None, str]:
        """(code, item id, title) of a title, an id or an object; None: the log does not hold it."""
        named = entry if isinstance(entry, dict) else {"title": entry}
        item = None if named.get("item") is None else str(named["item"])
        title = clean_title(named["title"]) if isinstance(named.get("title"), str) else ""
        code = self.by_id.get(item, self.by_title.get(title, self.by_id.get(str(entry))))
        if code is not None:
            return code, item or self.ids[code], self.titles[code]
        if not title:
            known = "of the log" if self.titles else "(which needs the log, and none is at hand)"
            raise ValueError(f"{where} is {entry!r:.80}: expected a title, or an item id {known}")
        if self.titles and title not in self.unknown and len(self.unknown) < NOTED:
            self.unknown.add(title)
            last = " (more such titles are not named)" * (len(self.unknown) == NOTED)
            print0(f'note: {where}: the log has no "{title}", which is ranked all the same{last}')
        return None, item, title


def read_user(
    entry,
    where: str,
    catalogue: Catalogue,
    config: DataConfig,
    fewest: int,  # candidates, if there are any
    one_of_many: bool = False,  # it needs a name, and its candidates may be retrieved
) -> User:
    """One user's history and candidates, as training shows them; ValueError says what is wrong."""
    entry = entry if isinstance(entry, dict) else {}
    history, given = entry.get("history"), entry.get("candidates", [] if one_of_many else None)
    name = entry.get("user", None if one_of_many else "")
    if type(name) not in (str, int) or not type(history) is type(given) is list:
        raise ValueError(f"{where}: expected {SHAPE}" + ', and a "user"' * one_of_many)
    rows, items, candidates = [], [], {}
    for number, rated in enumerate(history, 1):
        place, rated = f"{where}: history entry {number}", rated if type(rated) is dict else {}
        code, _, title = catalogue.find(rated, place)
        rows.append((title, read_rating(rated.get("rating"), place, config)))
        items += [code] if code is not None else []
    for number, candidate in enumerate(given, 1):
        _, item, title = catalogue.find(candidate, f"{where}: candidate {number}")
        if title in candidates:
            raise ValueError(f"{where}: candidate {number} stands there twice, {title!r}")
        candidates[title] = item, title
    shown = shown_history(rows, config)
    if not shown:
        liked = f" rated at least {config.min_rating:g}" * (config.history_items == "positive")
        raise ValueError(f"{where}: the history is empty; give one item{liked}")
    if len(given) < fewest and (given or not one_of_many):
        raise ValueError(f"{where}: {len(given)} candidates, at least {fewest} are expected")
    if not given and not items:
        raise ValueError(f"{where}: the log holds nothing of the history; give candidates, too")
    name = str(name).encode("utf-8", "replace").decode()  # half a surrogate pair
    return User(name, shown, np.array(items, np.int64), [*candidates.values()])


def read_rating(rating, where: str, config: DataConfig) -> float:
    """A rating mapped from --scale, in the log's precision; NaN, if none is given or needed."""
    optional = not config.ratings or config.dataset == "prepared"
    if rating is None and optional and config.history_items == "all":
        return nan
    asked = "" if config.ranks else config.scale
    low, high = parse_scale(asked) if asked else (1e-9, 5.0)
    if type(rating) not in (int, float) or not low <= rating <= high:
        scale = f"of --scale {asked}" if asked else "above 0 and up to 5"
        raise ValueError(f"{where} has rating {rating!r}; expected a number {scale}, as in the log")
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
    catalogue, found = Catalogue(log), {}
    codes = {user: code for code, user in enumerate(log.user_ids)}
    for number, line in enumerate(map(str.strip, read_lines(file)), 1):
        where, entry = f"{file}:{number}", None
        if file.suffix == ".jsonl" and line:
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(line)
            user = read_user(entry, where, catalogue, config, fewest, one_of_many=True)
            if found.setdefault(user.name, user) is not user:
                raise ValueError(f"{where}: user {user.name!r} stands in another line already")
        elif line and line not in codes:
            raise ValueError(f"{where}: the log has no user {line!r}; it has {log.user_ids[:3]}")
        elif line:
            found[line] = codes[line]
    if not found:
        raise ValueError(f"--users {file} names nobody")
    return list(found.values())
