"""Examples that other projects have prepared: the RecPO authors' JSON and S-DPO's.

The folder has one *train*.json and one *test*.json, and perhaps *val*. An entry has historyList (a
list, or titles joined by "::"), itemList (20 candidates) and trueSelection; the authors' also
historyRatingList, itemScoreList (preference scores of the candidates) and randomNegative. Equal
titles are one item, and every entry is a user of its own, whose last interaction is the target.
Without scores (S-DPO) all of them are 1: then RecPO's margins say nothing, and S-DPO needs none."""

import json
import re
from pathlib import Path

import numpy as np

from common import print0
from data import NUM_CANDIDATES, SPLITS, TEMPLATES, Examples, Interactions
from loaders.files import matching_files, read_text
from loaders.table import clean_title
from loaders.tables import MAX_BAD_SHARE, shorten


def files(config) -> list[Path]:
    """All that is read."""
    return list(split_files(Path(config.data_dir)).values())


def split_files(folder: Path) -> dict[str, Path]:
    """Split -> its file, in whose name a word starts so ("latest" is no test); "val" may miss."""
    found = {split: [] for split in SPLITS}
    for file in matching_files(folder, "*.json*") if folder.is_dir() else ():
        if word := re.search("(?<![a-z])(train|test|val|dev)", file.name.lower()):
            found[word[0].replace("dev", "val")].append(file)
    for split, files in found.items():
        if len(files) != 1 and (files or split != "val"):
            names = [file.name for file in files or folder.glob("*")]
            raise ValueError(f"{folder}: expected a folder with one {split} file, found {names}")
    return {split: files[0] for split, files in found.items() if files}


def read_entries(file: Path) -> list[dict]:
    """Entries of a JSON list, or of JSON lines; ValueError if more than 1 % cannot be used."""
    text, entries, bad = read_text(file), [], []
    try:
        lines = [] if text.lstrip().startswith("[") else text.split("\n")
        raw = [json.loads(line) for line in lines if line.strip()] if lines else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a JSON list of examples ({error})") from None
    for number, entry in enumerate(raw, 1):
        try:
            entries.append(read_entry(entry) | {"number": number})
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            bad.append(f"entry {number}: {error!r}: {shorten(json.dumps(entry))}")
    what = f"{len(bad):,} of {len(raw):,} entries cannot be used (1% may be): {'; '.join(bad[:3])}"
    if len(bad) > MAX_BAD_SHARE * len(raw) or not entries:
        raise ValueError(f"{file}: {what}")
    if bad:
        print0(f"note: {file}: {what}")
    return entries


def read_entry(entry: dict) -> dict:
    """An entry's cleaned titles and numbers."""
    history, target = entry["historyList"], clean_title(entry["trueSelection"])
    history = [*map(clean_title, history.split("::") if isinstance(history, str) else history)]
    candidates = [*map(clean_title, entry["itemList"])]
    ratings = [*map(float, entry.get("historyRatingList") or [np.nan] * len(history))]
    scores = [*map(float, entry.get("itemScoreList") or [1.0] * NUM_CANDIDATES)]
    random = {clean_title(title) for title in entry.get("randomNegative") or []}
    fits = len({*candidates}) == len(candidates) == len(scores) == NUM_CANDIDATES
    fits = fits and len(ratings) == len(history) > 0 and all(history + candidates)
    if not fits or not all(0 < s < np.inf for s in scores) or any(r <= 0 or r > 5 for r in ratings):
        raise ValueError(
            f"expected a history whose titles have ratings up to 5 or none, and {NUM_CANDIDATES} "
            "different candidates with scores above 0 or none"
        )
    return {
        "shown": [*history, target],
        "candidates": candidates,
        "target": candidates.index(target),
        "ratings": [*ratings, np.nan],
        "scores": scores,
        # without randomNegative all others count as random, as S-DPO draws them
        "is_random": [t in random if random else t != target for t in candidates],
    }


def read_foreign_examples(config) -> tuple[Interactions, dict[str, Examples]]:
    """(log, splits); without validation, the last tenth of the training entries are its split."""
    path = Path(config.data_dir)
    parts = {split: read_entries(file) for split, file in split_files(path).items()}
    if "val" not in parts:
        cut = max(1, len(parts["train"]) // 10)
        parts["val"], parts["train"] = parts["train"][-cut:], parts["train"][:-cut]
        print0(f"note: no *val*.json in {path}; the last {cut} training entries are its split")
    everything = [entry for part in parts.values() for entry in part]
    if all(score == 1 for entry in everything for score in entry["scores"]):
        print0("note: no itemScoreList: all scores are 1, and RecPO's margins say nothing")
    titles = sorted({t for e in everything for t in e["shown"] + e["candidates"]})
    code = {title: i for i, title in enumerate(titles)}
    rows, arrays, start = [], {}, [0]
    for number, split in enumerate(SPLITS):
        rng = np.random.default_rng([config.data_seed, number])
        size = config.train_size if split == "train" else config.test_size
        order = rng.permutation(len(parts[split]))[: size or None]
        part = [parts[split][i] for i in order]
        if not part:
            raise ValueError(f"{path}: no {split} example")
        rows += [(f"{split} {entry['number']}", entry) for entry in part]
        ends = start[-1] + np.cumsum([len(entry["shown"]) for entry in part])
        start += ends.tolist()
        target = np.array([entry["target"] for entry in part], np.int32)
        slots = np.tile(np.arange(NUM_CANDIDATES), (len(part), 1))
        others = slots[slots != target[:, None]].reshape(len(part), -1)
        arrays[split] = {
            "position": ends - 1,  # a user is its history, then its target
            "candidates": np.array([[code[t] for t in e["candidates"]] for e in part], np.int32),
            "target": target,
            "scores": np.array([entry["scores"] for entry in part], np.float32),
            "is_random": np.array([entry["is_random"] for entry in part]),
            "negative_order": rng.permuted(others, axis=1).astype(np.int32),
            "template": rng.integers(len(TEMPLATES), size=len(part)).astype(np.int32),
        }
    user = np.repeat(np.arange(len(rows), dtype=np.int32), np.diff(start))
    item = np.array([code[title] for _, entry in rows for title in entry["shown"]], np.int32)
    rating = np.array([rating for _, entry in rows for rating in entry["ratings"]], np.float32)
    time = np.arange(len(user)) - np.array(start)[user]  # only the order is known
    names = [name for name, _ in rows]
    log = Interactions(user, item, rating, time, np.array(start), titles, names, titles, "prepared")
    return log, {split: Examples(log, split, config.history, **a) for split, a in arrays.items()}
