"""Examples that other projects have prepared: the RecPO authors' JSON and S-DPO's.

An entry has historyList (a list, or titles joined by "::"), itemList (20 candidates) and
trueSelection; the authors' also historyRatingList, itemScoreList (φ) and randomNegative."""

import re
from pathlib import Path

import numpy as np

from common import print0
from data import NUM_CANDIDATES, SPLITS, TEMPLATES, Examples, Interactions
from loaders.readers import Table, check_bad, read_records, visible_files
from loaders.table import clean_title


def files(config) -> list[Path]:
    """The files whose names have a word that begins with train, val or test ("latest" has none)."""
    folder, words = Path(config.data_dir), ("train", "val|dev", "test")
    inside = [f.name for f in visible_files(folder, "*.json*")] if folder.is_dir() else []
    found = {w: [f for f in inside if re.search(f"(?<![a-z])({w})", f.lower())] for w in words}
    if [*map(len, found.values())] != [1, 1, 1]:
        raise ValueError(f"{folder}: expected one .json file for each split, found {found}")
    return [folder / name for (name,) in found.values()]


def read_entries(file: Path) -> list[dict]:
    """Entries of a JSON list; ValueError if more than 1 % cannot be used."""
    entries, table = [], Table()
    for number, entry in enumerate(read_records(file, table), 1):
        try:
            entries.append(read_entry(entry) | {"number": number})
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            table.bad(f"entry {number}: {error!r}: {entry}")
    table.num_rows = len(entries)
    if check_bad(table, file).num_bad:
        print0(f"note: {file}: {table.num_bad:,} entries are left out: {table.first_bad}")
    if not entries:
        raise ValueError(f"{file}: no example")
    return entries


def read_entry(entry: dict) -> dict:
    """Check and clean an entry; if it marks no candidate as random, all but the target are."""
    history, target = entry["historyList"], clean_title(entry["trueSelection"])
    history = [*map(clean_title, history.split("::") if isinstance(history, str) else history)]
    candidates = [*map(clean_title, entry["itemList"])]
    ratings = [*map(float, entry.get("historyRatingList") or [np.nan] * len(history))]
    scores = [*map(float, entry.get("itemScoreList") or [1.0] * NUM_CANDIDATES)]
    random = {*map(clean_title, entry.get("randomNegative") or [])} or {*candidates} - {target}
    listed = len({*candidates}) == len(candidates) == len(scores) == NUM_CANDIDATES
    shown = len(ratings) == len(history) > 0 and not any(r <= 0 or r > 5 for r in ratings)
    if not (listed and shown and all(history + candidates) and all(0 < s < np.inf for s in scores)):
        raise ValueError("expected 20 different titles, scores above 0, a history, ratings up to 5")
    used = {"candidates": candidates, "target": candidates.index(target), "scores": scores}
    used["is_random"] = [title in random for title in candidates]
    return used | {"shown": [*history, target], "ratings": [*ratings, np.nan]}


def load(config) -> tuple[Interactions, dict[str, Examples]]:
    """(log, splits): each entry is a user, with its history and target; each title is an item."""
    parts = dict(zip(SPLITS, map(read_entries, files(config))))
    everything = sum(parts.values(), [])
    if all(score == 1 for entry in everything for score in entry["scores"]):
        print0("note: no itemScoreList: all scores are 1, and RecPO's margins say nothing")
    titles = sorted({title for e in everything for title in e["shown"] + e["candidates"]})
    code = {title: i for i, title in enumerate(titles)}
    users, names, start, arrays = [], [], [0], {}
    for number, (split, part) in enumerate(parts.items()):
        rng = np.random.default_rng([config.data_seed, number])
        size = config.train_size if split == "train" else config.test_size
        part = [part[i] for i in rng.permutation(len(part))[: size or None]]
        users += part
        names += [f"{split} {entry['number']}" for entry in part]
        ends = start[-1] + np.cumsum([len(entry["shown"]) for entry in part])
        start += ends.tolist()
        others = [np.delete(np.arange(NUM_CANDIDATES), entry["target"]) for entry in part]
        arrays[split] = {
            "position": ends - 1,
            "candidates": np.array([[code[t] for t in e["candidates"]] for e in part], np.int32),
            "target": np.array([entry["target"] for entry in part], np.int32),
            "scores": np.array([entry["scores"] for entry in part], np.float32),
            "is_random": np.array([entry["is_random"] for entry in part]),
            "negative_order": rng.permuted(others, axis=1).astype(np.int32),
            "template": rng.integers(len(TEMPLATES), size=len(part)).astype(np.int32),
        }
    item = np.array([code[title] for entry in users for title in entry["shown"]], np.int32)
    rating = np.array([rating for entry in users for rating in entry["ratings"]], np.float32)
    user = np.repeat(np.arange(len(names), dtype=np.int32), np.diff(start))
    time = np.arange(len(user)) - np.array(start)[user]  # only the order is known
    log = Interactions(user, item, rating, time, np.array(start), titles, names, titles, "prepared")
    return log, {split: Examples(log, split, config.history, **a) for split, a in arrays.items()}
