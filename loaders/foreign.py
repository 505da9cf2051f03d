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


def read_foreign_examples(config) -> tuple[Interactions, dict[str, Examples]]:
    """(log, splits) of a folder of prepared JSON; config: a DataConfig.
    Validation falls back to the last tenth of the training entries."""
    path = Path(config.data_dir)
    entries = {split: read_entries(file) for split, file in split_files(path).items()}
    if "val" not in entries:
        cut = max(1, len(entries["train"]) // 10)
        entries["val"], entries["train"] = entries["train"][-cut:], entries["train"][:-cut]
        print0(f"note: no *val*.json in {path}; the last {cut} training entries are its split")
    everything = [entry for part in entries.values() for entry in part]
    if not any(entry["scores"] for entry in everything):
        print0(
            "note: no itemScoreList: all preference scores are 1, and RecPO's margins say nothing"
        )
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
        arrays[split] = example_arrays(part, code, rng)
        arrays[split]["position"] += rows
        named += [(f"{split} {entry['number']}", entry) for entry in part]
        rows += sum(len(entry["history"]) + 1 for entry in part)
    log = log_of(named, titles, code)
    return log, {split: Examples(log, split, config.history, **arrays[split]) for split in arrays}


def example_arrays(part: list[dict], code: dict[str, int], rng) -> dict[str, np.ndarray]:
    """The arrays of a split; positions as if its entries were the first of the log."""
    lengths = [len(entry["history"]) + 1 for entry in part]
    target = np.array([entry["target"] for entry in part], np.int32)
    slots = np.tile(np.arange(NUM_CANDIDATES), (len(part), 1))
    others = slots[slots != target[:, None]].reshape(len(part), -1)
    others = rng.permuted(others, axis=1)
    template = rng.integers(len(TEMPLATES), size=len(part))
    return {
        "position": np.cumsum(lengths, dtype=np.int64) - 1,
        "candidates": np.array([[code[t] for t in e["candidates"]] for e in part], np.int32),
        "target": target,
        "scores": np.array([e["scores"] or [1.0] * NUM_CANDIDATES for e in part], np.float32),
        "is_random": np.array([entry["is_random"] for entry in part]),
        "negative_order": others.astype(np.int32),
        "template": template.astype(np.int32),
    }


def log_of(named: list[tuple[str, dict]], titles: list[str], code: dict[str, int]) -> Interactions:
    """One user per entry: its history, then its target; ratings are NaN where there are none."""
    item, rating, lengths = [], [], []
    for _, entry in named:
        history = entry["history"]
        item += [code[title] for title in (*history, entry["candidates"][entry["target"]])]
        rating += [*(entry["ratings"] or [np.nan] * len(history)), np.nan]
        lengths.append(len(history) + 1)
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    user = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return Interactions(
        user,
        np.array(item, np.int32),
        np.array(rating, np.float32),
        (np.arange(len(user)) - start[user]).astype(np.int64),  # only the order is known
        start,
        titles,
        [name for name, _ in named],
        titles,
        "prepared",
    )


def split_files(folder: Path) -> dict[str, Path]:
    """Split -> its file; "val" may be missing. Its name is a word of the file's ("latest" is no
    test file), or, where no file has it as a word, stands inside one (traindata.json)."""
    if not folder.is_dir():
        raise ValueError(
            f"--data_dir {folder}: a folder with *train*.json and *test*.json is needed"
        )
    files, out = matching_files(folder, "*.json*"), {}
    words = {f: set(re.split("[^a-z]+", f.name.lower())) for f in files}
    taken = {f for f in files if words[f] & set.union(*WORDS.values())}
    for split, names in WORDS.items():
        found = [f for f in files if words[f] & names]
        if not found:
            plain = {f: f.name.lower().replace("latest", "") for f in files if f not in taken}
            found = [f for f, name in plain.items() if split in name]
        if len(found) > 1 or (not found and split != "val"):
            raise ValueError(
                f"{folder}: one {split} file is needed (*{split}*.json*); there are "
                f"{[f.name for f in found or sorted(folder.iterdir())][:8]}"
            )
        out |= {split: found[0]} if found else {}
    return out


def read_entries(file: Path) -> list[dict]:
    """Checked entries of a JSON list, or of JSON lines;
    ValueError names the first bad one if they are more than 1 %."""
    text = read_text(file)
    try:
        if text.lstrip().startswith("["):
            raw = json.loads(text)
        else:
            raw = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a JSON list of examples ({error})") from None
    entries, bad = [], []
    for number, entry in enumerate(raw, 1):
        try:
            entries.append(read_entry(number, entry))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            bad.append(f"entry {number}: {error}: {shorten(json.dumps(entry))}")
    if len(bad) > MAX_BAD_SHARE * len(raw) or not entries:
        raise ValueError(
            f"{file}: {len(bad):,} of {len(raw):,} entries cannot be used (1% may be): "
            f"{'; '.join(bad[:3])}; each needs historyList, itemList and trueSelection"
        )
    return entries


def read_entry(number: int, entry: dict) -> dict:
    history = entry["historyList"]
    history = history.split("::") if isinstance(history, str) else history
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
