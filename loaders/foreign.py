"""Examples that other projects have prepared: the RecPO authors' JSON and S-DPO's.
Their candidates are kept as they are.

    python train.py --dataset prepared --data_dir FOLDER

The folder has one *train*.json and one *test*.json, and perhaps *val*.

An entry has historyList (a list, or titles joined by "::"), itemList (20 candidates) and
trueSelection; the authors' also has historyRatingList, itemScoreList (preference scores of the
candidates) and randomNegative. Titles are all that is known of items, so equal titles are one item.
Every entry becomes a user of its own, whose last interaction is the target. Without scores (S-DPO)
all of them are 1: then RecPO's margins say nothing, and S-DPO is the method to run."""

import gzip
import json
import re
import zlib
from pathlib import Path

import numpy as np

from common import print0
from data import NUM_CANDIDATES, TEMPLATES, Examples, Interactions
from loaders.files import matching_files, open_bytes
from loaders.table import LineCount, clean_title


def read_foreign_examples(config) -> tuple[Interactions, dict[str, Examples]]:
    """(log, splits) of a folder of prepared JSON; config: a DataConfig.
    Validation falls back to the last tenth of the training entries."""
    path = Path(config.data_dir)
    entries = _entries_by_split(path)
    everything = [entry for part in entries.values() for entry in part]
    titles = sorted({t for e in everything for t in (*e["history"], *e["candidates"])})
    code = {title: i for i, title in enumerate(titles)}

    arrays, named, rows = {}, [], 0
    for number, split in enumerate(("train", "val", "test")):
        part = entries[split]
        if not part:
            raise ValueError(f"{path}: no {split} example")
        rng = np.random.default_rng([config.data_seed, number])
        size = config.train_size if split == "train" else config.test_size
        order = rng.permutation(len(part))
        part = [part[i] for i in (order[:size] if size else order)]
        arrays[split] = _example_arrays(part, code, rng)
        arrays[split]["position"] += rows
        named += [(f"{split} {entry['number']}", entry) for entry in part]
        rows += sum(len(entry["history"]) + 1 for entry in part)

    interactions = _log_of(named, titles, code)
    splits = {
        split: Examples(interactions, split, config.history, **arrays[split]) for split in arrays
    }
    return interactions, splits


def _entries_by_split(path: Path) -> dict[str, list[dict]]:
    if not path.is_dir():
        raise ValueError(
            f"--data_dir {path}: a folder with a *train*.json and a *test*.json is needed"
        )
    entries = {split: read_entries(file) for split, file in split_files(path).items()}
    if "val" not in entries:
        cut = max(1, len(entries["train"]) // 10)
        entries["val"], entries["train"] = entries["train"][-cut:], entries["train"][:-cut]
        print0(
            f"note: no *val*.json in {path}; "
            f"the last {cut} training entries are the validation split"
        )
    if not any(entry["scores"] for part in entries.values() for entry in part):
        print0(
            "note: no itemScoreList, so all preference scores are 1 "
            "and RecPO's margins say nothing; S-DPO needs none"
        )
    return entries


def _example_arrays(
    part: list[dict], code: dict[str, int], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """The arrays of a split; positions as if its entries were the first of the log."""
    lengths = [len(entry["history"]) + 1 for entry in part]
    candidates = [[code[title] for title in entry["candidates"]] for entry in part]
    scores = [entry["scores"] or [1.0] * NUM_CANDIDATES for entry in part]
    target = np.array([entry["target"] for entry in part], np.int32)
    slots = np.tile(np.arange(NUM_CANDIDATES), (len(part), 1))
    others = slots[slots != target[:, None]].reshape(len(part), -1)
    others = rng.permuted(others, axis=1)
    template = rng.integers(len(TEMPLATES), size=len(part))
    return {
        "position": np.cumsum(lengths, dtype=np.int64) - 1,
        "candidates": np.array(candidates, np.int32),
        "target": target,
        "scores": np.array(scores, np.float32),
        "is_random": np.array([entry["is_random"] for entry in part]),
        "negative_order": others.astype(np.int32),
        "template": template.astype(np.int32),
    }


def _log_of(named: list[tuple[str, dict]], titles: list[str], code: dict[str, int]) -> Interactions:
    """One user per entry: its history, then its target; ratings are NaN where there are none."""
    item, rating, lengths = [], [], []
    for _, entry in named:
        history = entry["history"]
        item += [code[title] for title in history]
        item.append(code[entry["candidates"][entry["target"]]])
        rating += entry["ratings"] or [np.nan] * len(history)
        rating.append(np.nan)
        lengths.append(len(history) + 1)
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    user = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    timestamp = (np.arange(len(user)) - start[user]).astype(np.int64)  # only the order is known
    return Interactions(
        user,
        np.array(item, np.int32),
        np.array(rating, np.float32),
        timestamp,
        start,
        titles,
        [name for name, _ in named],
        titles,
        "prepared",
    )


SPLIT_WORDS = {"train": ("train",), "test": ("test",), "val": ("val", "valid", "validation", "dev")}


def split_files(folder: Path) -> dict[str, Path]:
    """Split -> its file; "val" may be missing.
    The split's name is a word of the file's ("latest" is no test file).

    Only where no file has it as a word, it may stand inside one (traindata.json)."""
    files = matching_files(folder, "*.json*")
    by_word = {}
    for split, words in SPLIT_WORDS.items():
        by_word[split] = [f for f in files if set(words) & _words(f)]
    taken = {f for found in by_word.values() for f in found}
    out = {}
    for split, found in by_word.items():
        if not found:
            plain = {f: f.name.lower().replace("latest", "") for f in files if f not in taken}
            found = [f for f, name in plain.items() if split in name]
        if len(found) > 1:
            raise ValueError(
                f"{folder}: several {split} files: {[f.name for f in found]}; "
                "leave one of them there"
            )
        if not found and split != "val":
            inside = [f.name for f in sorted(folder.iterdir())][:8]
            raise ValueError(
                f"{folder}: no {split} file (looked for *{split}*.json*; there are {inside})"
            )
        if found:
            out[split] = found[0]
    return out


def _words(file: Path) -> set[str]:
    return set(re.split("[^a-z]+", file.name.lower()))


def read_entries(file: Path) -> list[dict]:
    """Checked entries of a JSON list, or of JSON lines;
    ValueError names the first bad ones if they are more than 1 %."""
    try:
        with open_bytes(file) as f:
            text = f.read().decode("utf-8-sig", "latin-1")
        if text.lstrip().startswith("["):
            raw = json.loads(text)
        else:
            raw = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}: not a JSON list of examples ({error})") from None
    expected = f"entries with historyList, itemList ({NUM_CANDIDATES} titles), trueSelection"
    count, entries = LineCount(file, expected), []
    for number, entry in enumerate(raw, 1):
        try:
            entries.append(_entry(number, entry))
            count.lines += 1
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            count.bad(number, f"{error}: {json.dumps(entry)}")
    count.check()
    if not entries:
        raise ValueError(f"{file}: holds no example")
    return entries


def _entry(number: int, entry: dict) -> dict:
    history = entry["historyList"]
    if isinstance(history, str):
        history = history.split("::")
    history = [clean_title(t) for t in history]
    candidates = [clean_title(t) for t in entry["itemList"]]
    target = clean_title(entry["trueSelection"])
    ratings = [float(r) for r in entry.get("historyRatingList") or []]
    scores = [float(s) for s in entry.get("itemScoreList") or []]
    random = {clean_title(t) for t in entry.get("randomNegative") or []}
    different = len(candidates) == len(set(candidates)) == NUM_CANDIDATES
    if not history or not all(history) or not all(candidates) or not different:
        raise ValueError(f"needs a history and {NUM_CANDIDATES} different candidates")
    if target not in candidates:
        raise ValueError("trueSelection is not in itemList")
    if ratings and (len(ratings) != len(history) or not all(0 < r <= 5 for r in ratings)):
        raise ValueError("historyRatingList does not fit")
    if scores and (len(scores) != NUM_CANDIDATES or not all(0 < s < np.inf for s in scores)):
        raise ValueError("itemScoreList does not fit")
    return {
        "number": number,
        "history": history,
        "candidates": candidates,
        "target": candidates.index(target),
        "ratings": ratings,
        "scores": scores,
        # without randomNegative all others count as random, as S-DPO draws them
        "is_random": [t in random if random else t != target for t in candidates],
    }
