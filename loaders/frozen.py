"""Frozen examples: from the data options to interactions, splits and token ids on disk.

What a data set's options give is made once, written under a hash of every array and title, and read
back mapped into memory: all models that are compared see the same candidates, negatives and
templates. What examples are, data.py says."""

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, fields, replace
from math import isnan, nan
from pathlib import Path

import numpy as np

from common import arg, changed_options, read_json, reading, writing
from data import (
    ALL_TEMPLATES,
    ITEMS,
    Encoded,
    ExampleConfig,
    Examples,
    Interactions,
    Ragged,
    Words,
    build_examples,
    encode_examples,
    k_core,
    render_prompt,
)
from hub.tokenizer import Tokenizer
from loaders import foreign, movielens, ownlog, planted, published
from loaders.counting import BASELINES, counting_baselines, markov_top
from loaders.dated import build_dated_examples, parse_date
from loaders.files import facts
from loaders.foreign import read_foreign_examples
from loaders.ownlog import parse_columns, parse_item_columns
from loaders.planted import bayes_scores, world_of
from loaders.values import parse_scale

OWN_LOGS = ("csv", "jsonl", "recbole", "parquet")
OWN = ", ".join(OWN_LOGS)


LOADERS = {
    "planted": published.Loader(planted.load, words=planted.WORDS),
    "movielens": published.Loader(movielens.load, movielens.files, movielens.WORDS),
    **published.LOADERS,
    **dict.fromkeys(OWN_LOGS, published.Loader(ownlog.load, ownlog.files)),
    "prepared": published.Loader(read_foreign_examples, foreign.files),
}
DATASETS = tuple(LOADERS)


@dataclass(frozen=True)
class DataConfig(ExampleConfig):
    """Turn a raw interaction log into frozen examples;
    print its statistics and one rendered example."""

    dataset: str = arg(
        "planted", f"one of {', '.join(DATASETS)} (loaders/)", group="data", choices=DATASETS
    )
    data_dir: str = arg("", "the raw file, or the folder (MovieLens: or zip) with the raw files")
    columns: str = arg(
        "", f"{OWN}: names or positions of columns, user=..,item=..,rating=..,timestamp=..,title=.."
    )
    item_file: str = arg("", f"{OWN}: a second file, with item and title")
    item_columns: str = arg("", "names or positions of --item_file's columns, item=...,title=...")
    scale: str = arg(
        "", f"{OWN}: lowest and highest rating, such as 0,100, or binary; mapped to 1 to 5"
    )
    percentile: str = arg(
        "",
        "ratings are ranks of amounts (hours, plays) among those of the same item, user, or all; "
        "empty: steam, lastfm by item",
        choices=("", "item", "user", "all"),
    )
    repeats: str = arg(
        "last",
        f"{OWN}: of a repeated user-item pair the last counts, or the sum of its amounts",
        choices=("last", "sum"),
    )
    download: bool = arg(False, "fetch MovieLens-1M to data_dir first, and check its checksum")
    planted_users: int = arg(4000, "users of the planted world", at_least=1)
    core: int = arg(
        0, "keep users and items with at least so many interactions (k-core); 0 = all", at_least=0
    )
    split_by: str = arg(
        "last",
        "tests: each user's last interaction, or the first liked one after a date (time)",
        choices=("last", "time"),
    )
    split_date: str = arg(
        "", "--split_by time: the date, such as 2000-12-01; empty: 10 % of all lies after it"
    )
    prepared_dir: str = arg("prepared", "where prepared examples are kept", free=True)

    def __post_init__(self):
        super().__post_init__()
        changed, with_data = changed_options(self), f"with --dataset {self.dataset}"
        fixed, dated = self.dataset == "prepared", self.split_by == "time"
        whole = "counts what comes after the date, too"
        ranks = self.percentile or self.dataset in ("steam", "lastfm")
        rated = self.dataset in ("planted", "movielens", "prepared")
        wrong = [
            (f"--{name} has no effect {with_data}", name in changed)
            for name in ("columns", "item_file", "item_columns", "scale", "repeats")
            if self.dataset not in OWN_LOGS
        ]
        wrong += [
            (
                f"--percentile has no effect {with_data}, which has ratings",
                self.percentile and rated,
            ),
            ("--core has no effect: the candidates are fixed", fixed and self.core),
            ("--split_by has no effect: the splits are fixed", fixed and dated),
            ("--negatives: its candidates are fixed", fixed and self.negatives == "retrieved"),
            (
                "--item_columns names columns of --item_file",
                self.item_columns and not self.item_file,
            ),
            ("--scale maps ratings, --percentile ranks: give one", self.scale and self.percentile),
            ("--split_date has no effect without --split_by time", self.split_date and not dated),
            (f"--core {whole}: with --split_by time filter the file", dated and self.core),
            (f"--split_by time needs ratings: a rank (--percentile) {whole}", dated and ranks),
        ]
        for message, holds in wrong:
            if holds:
                raise ValueError(message)
        if self.split_date:
            parse_date(self.split_date)
        parse_columns(self.columns)
        parse_item_columns(self.item_columns)
        parse_scale(self.scale)


def data_defaults(given: dict) -> dict:
    """Defaults that suit a data set: every program makes the same examples of the same options."""
    return planted.DEFAULTS if given.get("dataset", planted.NAME) == planted.NAME else {}


@dataclass
class Prepared:
    """A log and its three splits, as frozen on disk.
    `hash` covers every array, title and the history shown."""

    interactions: Interactions
    splits: dict[str, Examples]
    hash: str
    folder: Path
    raw_counts: dict[str, int]  # users, items, interactions before the k-core
    options: dict  # of the DataConfig that it was made with

    def baselines(self, split: str) -> dict[str, np.ndarray]:
        """Name -> scores (E, 20) of popularity, item-kNN and Markov; counted once, then read."""
        folder = self.folder / f"baselines-{split}"
        if not folder.exists():
            scores = counting_baselines(self.splits[split])
            write_arrays(folder, scores, needed=False)
            return scores
        kept = read_arrays(folder)
        return {name: kept[name] for name in BASELINES}

    def optimum(self, split: str) -> np.ndarray | None:
        """Log-probabilities (E, 20) by which the best possible order ranks; None where unknown."""
        world = world_of(self.options)
        if world is None:
            return None
        return bayes_scores(world, self.splits[split], self.options["min_rating"])


def load_interactions(config: DataConfig) -> Interactions:
    return LOADERS[config.dataset].load(config)


def words_of(dataset: str, data_dir: str = "") -> Words:
    """The words of a data set's prompts, for what is asked without its log."""
    words = LOADERS[dataset].words if dataset in LOADERS else ITEMS
    return words(data_dir) if callable(words) else words


def prepare(config: DataConfig, check: bool = True) -> Prepared:
    """The frozen examples of these options,
    written once under --prepared_dir and read from there ever after.

    Arrays are mapped into memory: processes share them, and touch only the rows they use.
    `check` compares them with their hash, which reads them all."""
    if config.dataset != "planted" and not config.data_dir:
        raise ValueError(
            f"--dataset {config.dataset} needs --data_dir, the folder or zip with its raw files"
        )
    if config.download and config.dataset == "movielens":
        movielens.download_movielens(Path(config.data_dir))
    apart = ("prepared_dir", "download")
    options = {f.name: getattr(config, f.name) for f in fields(DataConfig) if f.name not in apart}
    options |= {"format": PREPARED_FORMAT, "source": facts(LOADERS[config.dataset].files(config))}
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(config.prepared_dir) / f"{config.dataset}-{key}"
    if not (folder / "meta.json").exists():
        if config.dataset == "prepared":
            interactions, splits = read_foreign_examples(config)
        else:
            interactions = load_interactions(config)
        sizes = interactions.num_users, interactions.num_items, len(interactions.user)
        if config.split_by == "time":
            interactions, splits = build_dated_examples(interactions, config, markov_top)
        elif config.dataset != "prepared":
            interactions = k_core(interactions, config.core)
            splits = build_examples(interactions, config, markov_top)
        counts = dict(zip(("users", "items", "interactions"), sizes))
        write_prepared(folder, interactions, splits, {"options": options, "raw_counts": counts})
    return read_prepared(folder, check)


def find_prepared(prepared_dir, content_hash: str) -> Prepared | None:
    """Prepared examples with this hash (or its beginning) below the folder, if there are any;
    the raw files are not asked for."""
    for meta in sorted(Path(prepared_dir).glob("*/meta.json")):
        known = read_json(meta)
        if known["options"]["format"] == PREPARED_FORMAT and known["hash"].startswith(content_hash):
            return read_prepared(meta.parent, check=False)
    return None


# ------------------------------------------------------------------------------------------ on disk
PREPARED_FORMAT = 4  # raised when the same options give other examples, or other files, than before
ENCODED_FORMAT = 3  # raised when the same examples and tokenizer give other tokens than before
# in the files these are log.user, ...: the names are part of the content hash
INTERACTION_ARRAYS = ("user", "item", "rating", "timestamp", "start", "train_end")
INTERACTION_TEXTS = ("titles", "user_ids", "item_ids")
USUALLY = {"min_shown_rating": 0.0, "ratings": True}  # defaults are omitted, also from the hash


def write_arrays(folder: Path, arrays: dict, needed: bool = True, **texts: dict) -> None:
    """A folder of one file per array, and one per JSON object of `texts`, put in place when it is
    whole. Where it cannot be written, go on without, unless it is needed."""
    try:
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            beside = folder.with_name(f"{folder.name}.{os.getpid()}")
            beside.mkdir(exist_ok=True)
            try:
                for name, array in arrays.items():
                    np.save(beside / f"{name}.npy", np.ascontiguousarray(array))
                for name, content in texts.items():
                    (beside / f"{name}.json").write_text(json.dumps(content))
                with contextlib.suppress(OSError):  # another process was faster
                    beside.rename(folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    except ValueError:
        if needed:
            raise


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a folder by name, mapped into memory read-only."""
    try:
        files = sorted(folder.glob("*.npy"))
        return {file.stem: np.load(file, mmap_mode="r").view(np.ndarray) for file in files}
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{folder}: damaged ({error}); delete it, it is made again") from None


def content_hash(arrays: dict[str, np.ndarray], texts: dict) -> str:
    parts = [
        f"{name} {a.dtype} {a.shape} {hashlib.sha256(np.ascontiguousarray(a)).hexdigest()}"
        for name, a in sorted(arrays.items())
    ]
    parts.append(json.dumps(texts, sort_keys=True))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def write_prepared(folder: Path, interactions: Interactions, splits: dict, meta: dict) -> None:
    arrays = {f"log.{name}": getattr(interactions, name) for name in INTERACTION_ARRAYS}
    for split, examples in splits.items():
        stored = Examples.ARRAYS.items()
        arrays |= {f"{split}.{on_disk}": getattr(examples, name) for name, on_disk in stored}
    arrays = {name: a for name, a in arrays.items() if a is not None}
    texts = {name: list(getattr(interactions, name)) for name in INTERACTION_TEXTS}
    test = splits["test"]
    shown = {name: getattr(test, name) for name, usual in USUALLY.items()}
    shown = {name: value for name, value in shown.items() if value != USUALLY[name]}
    prompts = {"name": interactions.name, "history": test.history} | shown
    meta |= {"hash": content_hash(arrays, texts | prompts), "prompts": prompts}
    meta |= {"notes": interactions.notes, "words": interactions.words}
    write_arrays(folder, arrays, meta=meta, texts=texts)


def read_prepared(folder: Path, check: bool) -> Prepared:
    meta, texts, arrays = read_json(folder / "meta.json"), read_json(folder / "texts.json"), {}
    with reading(folder / "meta.json"):
        arrays, prompts = read_arrays(folder), meta["prompts"]
        if check and content_hash(arrays, texts | prompts) != meta["hash"]:
            raise ValueError(f"{folder}: prepared examples do not match their hash; delete it")
        interactions = Interactions(
            **{name: arrays.get(f"log.{name}") for name in INTERACTION_ARRAYS},
            **texts,
            name=prompts["name"],
            notes=meta["notes"],
            words=tuple(meta["words"]),
        )
        splits = {}
        for split in ("train", "val", "test"):
            part = {n: arrays[f"{split}.{on_disk}"] for n, on_disk in Examples.ARRAYS.items()}
            shown = {name: prompts.get(name, usual) for name, usual in USUALLY.items()}
            splits[split] = Examples(interactions, split, prompts["history"], **part, **shown)
    return Prepared(interactions, splits, meta["hash"], folder, meta["raw_counts"], meta["options"])


# ------------------------------------------------------------------------------------------- tokens
def encode_split(
    prepared: Prepared, split: str, tokenizer: Tokenizer, max_length: int, histories: bool = False
) -> Encoded:
    """encode_examples, kept in the prepared folder:
    a run, its other ranks and the next run with this tokenizer read it."""
    examples, words = prepared.splits[split], prepared.interactions.words
    made_of = [ENCODED_FORMAT, prepared.hash, split, tokenizer.fingerprint, max_length, words]
    made_of += [ALL_TEMPLATES, histories]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    folder = prepared.folder / f"tokens-{split}-{key}"
    if folder.exists():
        a = read_arrays(folder)
        with reading(folder):
            spelt = Ragged(a["completions"], a["completion_lengths"])
            completions = {i: ids.tolist() for i, ids in zip(a["items"].tolist(), spelt)}
            prompts = Ragged(a["prompts"], a["prompt_lengths"])
            counts = a["counts"].tolist()
            encoded = Encoded(examples, prompts, completions, *counts, a.get("histories"))
        tokenizer.note_long(encoded.prompts)
        return encoded

    encoded = encode_examples(examples, tokenizer, max_length)
    tokenizer.note_long(encoded.prompts)
    completions = list(encoded.completions.values())
    arrays = {
        "items": np.array(list(encoded.completions), np.int32),
        "completions": np.concatenate(completions).astype(np.int32),
        "completion_lengths": np.array([len(ids) for ids in completions]),
        "prompts": np.concatenate(encoded.prompts),
        "prompt_lengths": np.array([len(ids) for ids in encoded.prompts]),
        "counts": np.array([encoded.num_shortened, encoded.num_dropped]),
    }
    if histories:
        encoded.histories = arrays["histories"] = history_spans(encoded, tokenizer)
    write_arrays(folder, arrays, needed=False)
    return encoded


def history_spans(encoded: Encoded, tokenizer: Tokenizer) -> np.ndarray:
    """(E, 2) where the history stands among a prompt's tokens: first, and one behind the last.

    It is where a prompt differs from the same one with another history, whatever stands around it
    (a "~" that begins or ends it is taken for shared)."""
    texts = []
    for e in range(len(encoded.examples)):
        example = encoded.examples[e]
        if example.history:  # else nothing differs, and the span is empty
            unrated = all(isnan(rating) for _, rating in example.history)
            example = replace(example, history=[("~", nan if unrated else 0.0)])
        texts.append(render_prompt(example))
    spans = np.empty((len(texts), 2), np.int32)
    for e, other_ids in enumerate(tokenizer.encode_prompts(texts)):
        prompt = encoded.prompts[e]
        head = shared_length(prompt, other_ids)
        tail = shared_length(prompt[head:][::-1], other_ids[head:][::-1])
        spans[e] = head, len(prompt) - tail
    return spans


def shared_length(a, b) -> int:
    """How many ids a and b begin with alike."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:length]) != np.asarray(b[:length]))
    return int(differ[0]) if len(differ) else length
