"""Examples that other projects have prepared: the RecPO authors' JSON and S-DPO's. Their candidates are kept as they are.

    python train.py --dataset prepared --data_dir FOLDER        with one *train*.json and one *test*.json, and perhaps *val*

An entry has historyList (a list, or titles joined by "::"), itemList (20 candidates) and trueSelection; the authors' also
has historyRatingList, itemScoreList (preference scores of the candidates) and randomNegative. Titles are all that is known
of items, so equal titles are one item. Every entry becomes a user of its own, whose last interaction is the target.
Without scores (S-DPO) all of them are 1: then RecPO's margins say nothing, and S-DPO is the method to run.
"""

import gzip
import json
import re
import zlib
from pathlib import Path

import numpy as np

from common import print0
from data import NUM_CANDIDATES, TEMPLATES, Examples, Interactions, clean_title
from loaders.files import matching_files, open_bytes
from loaders.table import LineCount


def read_foreign_examples(config) -> tuple[Interactions, dict[str, Examples]]:
    """(log, splits) of a folder of prepared JSON; config: a DataConfig. Validation falls back to the last tenth of the training entries."""
    path = Path(config.data_dir)
    if not path.is_dir():
        raise ValueError(
            f"--data_dir {path}: a folder with a *train*.json and a *test*.json is needed"
        )
    files = split_files(path)
    entries = {split: read_entries(file) for split, file in files.items()}
    if "val" not in entries:
        cut = max(1, len(entries["train"]) // 10)
        entries["val"], entries["train"] = entries["train"][-cut:], entries["train"][:-cut]
        print0(
            f"note: no *val*.json in {path}; the last {cut} training entries are the validation split"
        )
    rated = any(entry["ratings"] for part in entries.values() for entry in part)
    if not any(entry["scores"] for part in entries.values() for entry in part):
        print0(
            "note: no itemScoreList, so all preference scores are 1 and RecPO's margins say nothing; S-DPO needs none"
        )

    titles = sorted(
        {t for part in entries.values() for e in part for t in (*e["history"], *e["candidates"])}
    )
    code = {title: i for i, title in enumerate(titles)}
    item, rating, lengths, names = [], [], [], []
    splits, at = {}, 0
    for number, split in enumerate(("train", "val", "test")):
        part = entries[split]
        if not part:
            raise ValueError(f"{path}: no {split} example")
        rng = np.random.default_rng([config.data_seed, number])
        size = {"train": config.train_size}.get(split, config.test_size)
        rows = rng.permutation(len(part))
        part = [part[i] for i in (rows[:size] if size else rows)]
        position = []
        for entry in part:
            history = entry["history"]
            item += [code[t] for t in history] + [code[entry["candidates"][entry["target"]]]]
            rating += (entry["ratings"] or [np.nan] * len(history)) + [np.nan]
            lengths.append(len(history) + 1)
            names.append(f"{split} {entry['number']}")
            at += len(history) + 1
            position.append(at - 1)
        E, slots = len(part), np.tile(np.arange(NUM_CANDIDATES), (len(part), 1))
        target = np.array([entry["target"] for entry in part], np.int32)
        arrays = {
            "position": np.array(position, np.int64),
            "candidates": np.array(
                [[code[t] for t in entry["candidates"]] for entry in part], np.int32
            ),
            "target": target,
            "scores": np.array(
                [entry["scores"] or [1.0] * NUM_CANDIDATES for entry in part], np.float32
            ),
            "is_random": np.array([entry["is_random"] for entry in part]),
            "others": rng.permuted(slots[slots != target[:, None]].reshape(E, -1), axis=1).astype(
                np.int32
            ),
            "template": rng.integers(config.num_templates or len(TEMPLATES), size=E).astype(
                np.int32
            ),
        }
        splits[split] = arrays
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    user = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    timestamp = (np.arange(len(user)) - start[user]).astype(np.int64)  # only the order is known
    rating = np.array(rating, np.float32) if rated else np.full(len(user), np.nan, np.float32)
    log = Interactions(
        user, np.array(item, np.int32), rating, timestamp, start, titles, names, titles, "prepared"
    )
    return log, {
        split: Examples(log, split, config.history, **arrays) for split, arrays in splits.items()
    }


SPLIT_WORDS = {"train": ("train",), "test": ("test",), "val": ("val", "valid", "validation", "dev")}


def split_files(folder: Path) -> dict[str, Path]:
    """Split -> its file; "val" may be missing. The split's name is a word of the file's ("latest" is no test file).

    Only where no file has it as a word, it may stand inside one (traindata.json)."""
    files = matching_files(folder, "*.json*")
    by_word = {
        split: [f for f in files if set(re.split("[^a-z]+", f.name.lower())) & set(words)]
        for split, words in SPLIT_WORDS.items()
    }
    taken = {f for found in by_word.values() for f in found}
    out = {}
    for split, found in by_word.items():
        if not found:
            plain = {f: f.name.lower().replace("latest", "") for f in files if f not in taken}
            found = [f for f, name in plain.items() if split in name]
        if len(found) > 1:
            raise ValueError(
                f"{folder}: several {split} files: {[f.name for f in found]}; leave one of them there"
            )
        if not found and split != "val":
            inside = [f.name for f in sorted(folder.iterdir())][:8]
            raise ValueError(
                f"{folder}: no {split} file (looked for *{split}*.json*; there are {inside})"
            )
        if found:
            out[split] = found[0]
    return out


def read_entries(file: Path) -> list[dict]:
    """Checked entries of a JSON list, or of JSON lines; ValueError names the first bad ones if they are more than 1 %."""
    try:
        with open_bytes(file) as f:
            text = f.read().decode("utf-8-sig", "latin-1")
        raw = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}: not a JSON list of examples ({error})") from None
    count, entries = (
        LineCount(
            file, f"entries with historyList, itemList ({NUM_CANDIDATES} titles), trueSelection"
        ),
        [],
    )
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
    history = [
        clean_title(t) for t in (history.split("::") if isinstance(history, str) else history)
    ]
    candidates = [clean_title(t) for t in entry["itemList"]]
    target = clean_title(entry["trueSelection"])
    ratings = [float(r) for r in entry.get("historyRatingList") or []]
    scores = [float(s) for s in entry.get("itemScoreList") or []]
    random = {clean_title(t) for t in entry.get("randomNegative") or []}
    if (
        not history
        or not all(history)
        or not all(candidates)
        or len(candidates) != NUM_CANDIDATES
        or len(set(candidates)) < NUM_CANDIDATES
    ):
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
