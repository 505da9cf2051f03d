"""Examples that other projects have prepared: the RecPO authors' JSON and S-DPO's.

    python train.py --dataset prepared --data_dir FOLDER

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
from data import NUM_CANDIDATES, TEMPLATES, Examples, Interactions
from loaders.files import matching_files, read_text
from loaders.table import clean_title
from loaders.tables import MAX_BAD_SHARE, shorten

WORDS = {"train": {"train"}, "test": {"test"}, "val": {"val", "valid", "validation", "dev"}}


def files(config) -> list[Path]:
    """All that is read."""
    return list(split_files(Path(config.data_dir)).values())


def split_files(folder: Path) -> dict[str, Path]:
    """Split -> its file; "val" may be missing. Its name is a word of the file's ("latest" is no
    test file), or, where no file has it as a word, stands inside one (traindata.json)."""
    if not folder.is_dir():
        raise ValueError(
            f"--data_dir {folder}: a folder with *train*.json and *test*.json is needed"
        )
    words, out = (
        {f: re.split("[^a-z]+", f.name.lower()) for f in matching_files(folder, "*.json*")},
        {},
    )
    plain = {f for f in words if not set.union(*WORDS.values()) & {*words[f]}}
    for split, names in WORDS.items():
        found = [f for f in words if names & {*words[f]}]
        found = found or [
            f for f in words if f in plain and split in f.name.lower().replace("latest", "")
        ]
        if len(found) > 1 or (not found and split != "val"):
            there = [f.name for f in found or sorted(folder.iterdir())][:8]
            raise ValueError(
                f"{folder}: one {split} file is needed (*{split}*.json*); there are {there}"
            )
        if found:
            out[split] = found[0]
    return out


def read_entries(file: Path) -> list[dict]:
    """Checked entries of a JSON list, or of JSON lines;
    ValueError names the first bad one if they are more than 1 %."""
    text, entries, bad = read_text(file), [], []
    try:
        lines = text.split("\n") if not text.lstrip().startswith("[") else []
        raw = [json.loads(line) for line in lines if line.strip()] if lines else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a JSON list of examples ({error})") from None
    for number, entry in enumerate(raw, 1):
        try:
            entries.append(read_entry(entry) | {"number": number})
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            bad.append(f"entry {number}: {error}: {shorten(json.dumps(entry))}")
    if len(bad) > MAX_BAD_SHARE * len(raw) or not entries:
        raise ValueError(
            f"{file}: {len(bad):,} of {len(raw):,} entries cannot be used (1% may be): "
            f"{'; '.join(bad[:3])}; each needs historyList, itemList and trueSelection"
        )
    return entries


def read_entry(entry: dict) -> dict:
    """An entry's cleaned titles and checked numbers."""
    history, target = entry["historyList"], clean_title(entry["trueSelection"])
    history = [*map(clean_title, history.split("::") if isinstance(history, str) else history)]
    candidates = [*map(clean_title, entry["itemList"])]
    ratings = [float(rating) for rating in entry.get("historyRatingList") or []]
    scores = [float(score) for score in entry.get("itemScoreList") or []]
    random = {clean_title(title) for title in entry.get("randomNegative") or []}
    different = len({*candidates}) == len(candidates) == NUM_CANDIDATES
    if not history or not all(history + candidates) or not different:
        raise ValueError(f"needs a history and {NUM_CANDIDATES} different candidates")
    if target not in candidates:
        raise ValueError("trueSelection is not in itemList")
    if ratings and (len(ratings) != len(history) or not all(0 < r <= 5 for r in ratings)):
        raise ValueError("historyRatingList does not fit")
    if scores and (len(scores) != NUM_CANDIDATES or not all(0 < s < np.inf for s in scores)):
        raise ValueError("itemScoreList does not fit")
    return {
        "history": history,
        "candidates": candidates,
        "target": candidates.index(target),
        "ratings": ratings or [np.nan] * len(history),
        "scores": scores,
        # without randomNegative all others count as random, as S-DPO draws them
        "is_random": [t in random if random else t != target for t in candidates],
    }


def read_foreign_examples(config) -> tuple[Interactions, dict[str, Examples]]:
    """(log, splits) of a folder of prepared JSON; config: a DataConfig.
    Validation falls back to the last tenth of the training entries."""
    path = Path(config.data_dir)
    parts = {split: read_entries(file) for split, file in split_files(path).items()}
    if "val" not in parts:
        cut = max(1, len(parts["train"]) // 10)
        parts["val"], parts["train"] = parts["train"][-cut:], parts["train"][:-cut]
        print0(f"note: no *val*.json in {path}; the last {cut} training entries are its split")
    everything = [entry for part in parts.values() for entry in part]
    if not any(entry["scores"] for entry in everything):
        print0(
            "note: no itemScoreList: all preference scores are 1, and RecPO's margins say nothing"
        )
    titles = sorted({t for e in everything for t in e["history"] + e["candidates"]})
    code = {title: i for i, title in enumerate(titles)}

    arrays, users, item, rating, start = {}, [], [], [], [0]
    for number, split in enumerate(("train", "val", "test")):
        if not parts[split]:
            raise ValueError(f"{path}: no {split} example")
        rng = np.random.default_rng([config.data_seed, number])
        size = config.train_size if split == "train" else config.test_size
        order = rng.permutation(len(parts[split]))
        part = [parts[split][i] for i in (order[:size] if size else order)]
        for entry in part:  # a user: its history, then its target
            users.append(f"{split} {entry['number']}")
            shown = [*entry["history"], entry["candidates"][entry["target"]]]
            item += map(code.__getitem__, shown)
            rating += [*entry["ratings"], np.nan]
            start.append(len(item))
        target = np.array([entry["target"] for entry in part], np.int32)
        slots = np.tile(np.arange(NUM_CANDIDATES), (len(part), 1))
        others = slots[slots != target[:, None]].reshape(len(part), -1)
        arrays[split] = {
            "position": np.array(start[-len(part) :]) - 1,
            "candidates": np.array([[code[t] for t in e["candidates"]] for e in part], np.int32),
            "target": target,
            "scores": np.array([e["scores"] or [1.0] * NUM_CANDIDATES for e in part], np.float32),
            "is_random": np.array([entry["is_random"] for entry in part]),
            "negative_order": rng.permuted(others, axis=1).astype(np.int32),
            "template": rng.integers(len(TEMPLATES), size=len(part)).astype(np.int32),
        }
    user = np.repeat(np.arange(len(users), dtype=np.int32), np.diff(start))
    log = Interactions(
        user=user,
        item=np.array(item, np.int32),
        rating=np.array(rating, np.float32),
        timestamp=np.arange(len(user)) - np.array(start)[user],  # only the order is known
        start=np.array(start),
        titles=titles,
        user_ids=users,
        item_ids=titles,
        name="prepared",
    )
    return log, {split: Examples(log, split, config.history, **a) for split, a in arrays.items()}
