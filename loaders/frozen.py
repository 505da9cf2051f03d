"""Frozen examples: from the data options to interactions, splits and token ids on disk.

Examples are made once and kept under a hash of every array and title, then mapped into memory: all
models that are compared see the same candidates, negatives and templates."""

import contextlib
import hashlib
import json
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
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
    Words,
    build_examples,
    encode_examples,
    k_core,
    render_prompt,
)
from hub.tokenizer import Tokenizer
from loaders import foreign, movielens, ownlog, planted, published
from loaders.counting import BASELINES, counting_baselines, markov_top
from loaders.dated import LAST_TENTH, build_dated_examples, parse_date
from loaders.files import facts
from loaders.values import parse_scale

OWN_LOGS = ("csv", "jsonl", "recbole", "parquet")
OWN = ", ".join(OWN_LOGS)
# name -> its loader, all files that it reads (both of a DataConfig), the words of its prompts
LOADERS = {
    "planted": (planted.load, lambda config: [], planted.WORDS),
    "movielens": (movielens.load, movielens.files, movielens.WORDS),
    **published.LOADERS,
    **dict.fromkeys(OWN_LOGS, (ownlog.load, ownlog.files, ITEMS)),
    "prepared": (foreign.read_foreign_examples, foreign.files, ITEMS),
}


@dataclass(frozen=True)
class DataConfig(ExampleConfig):
    """Turn a raw interaction log into frozen examples."""

    dataset: str = arg(
        "planted", f"one of {', '.join(LOADERS)} (loaders/)", group="data", choices=tuple(LOADERS)
    )
    data_dir: str = arg("", "the raw file, or the folder (MovieLens: or zip) with the raw files")
    columns: str = arg(
        "", f"{OWN}: names or positions of columns, user=..,item=..,rating=..,timestamp=..,title=.."
    )
    item_file: str = arg("", f"{OWN}: a second file, with item and title")
    item_columns: str = arg("", "names or positions of --item_file's columns, item=...,title=...")
    scale: str = arg("", f"{OWN}: lowest and highest rating, or binary; mapped to 1 to 5")
    percentile: str = arg(
        "",
        "rank amounts among those of one item, user, or all",
        choices=("", "item", "user", "all"),
    )
    planted_users: int = arg(4000, "users of the planted world", at_least=1)
    core: int = arg(
        0, "drop users and items with fewer interactions (k-core); 0 = none", at_least=0
    )
    split_date: str = arg(
        "", "test the first liked item from this date on (10%: the last tenth), not the last one"
    )
    prepared_dir: str = arg("prepared", "where prepared examples are kept", free=True)

    def __post_init__(self):
        super().__post_init__()
        of_own_logs = ("columns", "item_file", "item_columns", "scale")
        inert = dict.fromkeys(of_own_logs, self.dataset not in OWN_LOGS)
        inert["percentile"] = self.dataset in ("planted", "movielens", "prepared")
        inert |= dict.fromkeys(("core", "split_date", "negatives"), self.dataset == "prepared")
        changed, dated = changed_options(self), bool(self.split_date)
        ranks = self.percentile or self.dataset in ("steam", "lastfm")
        if wrong := [name for name in inert if inert[name] and name in changed]:
            raise ValueError(f"--{wrong[0]} has no effect with --dataset {self.dataset}")
        if self.item_columns and not self.item_file:
            raise ValueError("--item_columns names columns of --item_file: give it, too")
        if self.scale and self.percentile:
            raise ValueError("--scale maps ratings, --percentile ranks: give one")
        if dated and (self.core or ranks):
            raise ValueError(
                "--split_date: --core and ranks (--percentile, steam, lastfm) count what comes "
                "after the date, too; filter the file, and take data with ratings"
            )
        if self.split_date not in ("", LAST_TENTH):
            parse_date(self.split_date)
        ownlog.parse_columns(self.columns)
        ownlog.parse_item_columns(self.item_columns)
        parse_scale(self.scale)


def data_defaults(given: dict) -> dict:
    """Defaults that suit a data set: every program makes the same examples of the same options."""
    return planted.DEFAULTS if given.get("dataset", planted.NAME) == planted.NAME else {}


@dataclass
class Prepared:
    """A log and its three splits, as frozen on disk."""

    interactions: Interactions
    splits: dict[str, Examples]
    hash: str  # of every array, title and the history shown
    folder: Path
    raw_counts: dict[str, int]  # users, items, interactions before the k-core
    options: dict  # of the DataConfig that it was made with

    def baselines(self, split: str) -> dict[str, np.ndarray]:
        """Name -> scores (E, 20) of popularity, item-kNN and Markov; counted once, then read."""
        count = partial(counting_baselines, self.splits[split])
        scores = kept_arrays(self.folder / f"baselines-{split}", count)
        return {name: scores[name] for name in BASELINES}

    def optimum(self, split: str) -> np.ndarray | None:
        """Log-probabilities (E, 20) by which the best possible order ranks; None where unknown."""
        world, min_rating = planted.world_of(self.options), self.options["min_rating"]
        return world and planted.bayes_scores(world, self.splits[split], min_rating)


@contextlib.contextmanager
def undamaged(path):
    """Files and archives that are gone, cut off or damaged: one message with the way out."""
    damage = (tarfile.TarError, zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError)
    try:
        yield
    except damage as error:
        what = "a file is missing, damaged or cut off"
        raise ValueError(f"{path}: {what} ({error}); fetch it again") from None


def load_interactions(config: DataConfig) -> Interactions:
    load, *_ = LOADERS[config.dataset]
    with undamaged(config.data_dir):
        return load(config)


def words_of(dataset: str, data_dir: str = "") -> Words:
    """The words of a data set's prompts, for what is asked without its log."""
    *_, words = LOADERS.get(dataset, [ITEMS])
    return words(data_dir) if callable(words) else words


def prepare(config: DataConfig, check: bool = True) -> Prepared:
    """The frozen examples of these options, written once under --prepared_dir, then read there.

    Arrays are mapped into memory: processes share them, and touch only the rows they use.
    `check` compares them with their hash, which reads them all."""
    if config.dataset != "planted" and not config.data_dir:
        raise ValueError(f"--dataset {config.dataset} needs --data_dir, where its raw files are")
    if config.dataset == "movielens" and Path(config.data_dir).name == "ml-1m.zip":
        movielens.download_movielens(Path(config.data_dir))  # unless it is there
    options = {f.name: getattr(config, f.name) for f in fields(DataConfig)}
    del options["prepared_dir"], options["list_in_prompt"]
    _, files, _ = LOADERS[config.dataset]
    with undamaged(config.data_dir):
        options |= {"format": PREPARED_FORMAT, "source": facts(files(config))}
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(config.prepared_dir) / f"{config.dataset}-{key}"
    if not (folder / "meta.json").exists():
        if config.dataset == "prepared":
            interactions, splits = foreign.read_foreign_examples(config)
        else:
            interactions = load_interactions(config)
        sizes = interactions.num_users, interactions.num_items, len(interactions.user)
        if config.split_date:
            interactions, splits = build_dated_examples(interactions, config, markov_top)
        elif config.dataset != "prepared":
            interactions = k_core(interactions, config.core)
            splits = build_examples(interactions, config, markov_top)
        counts = dict(zip(("users", "items", "interactions"), sizes))
        write_prepared(folder, interactions, splits, {"options": options, "raw_counts": counts})
    prepared = read_prepared(folder, check)
    for split in prepared.splits.values():
        split.list_in_prompt = config.list_in_prompt
    return prepared


def find_prepared(prepared_dir, content_hash: str) -> Prepared | None:
    """Prepared examples with this hash (or its beginning) below the folder, without raw files."""
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


def write_folder(folder: Path, arrays: dict, **texts: dict) -> None:
    """One file per array, and per JSON object of `texts`; put in place when the folder is whole."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}")
    part.mkdir(parents=True, exist_ok=True)
    try:
        for name, array in arrays.items():
            np.save(part / f"{name}.npy", np.ascontiguousarray(array))
        for name, content in texts.items():
            (part / f"{name}.json").write_text(json.dumps(content))
        with contextlib.suppress(OSError):  # another process was faster
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a folder by name, mapped into memory read-only."""
    try:
        files = sorted(folder.glob("*.npy"))
        return {file.stem: np.load(file, mmap_mode="r").view(np.ndarray) for file in files}
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{folder}: damaged ({error}); delete it, it is made again") from None


def kept_arrays(folder: Path, make: Callable) -> dict[str, np.ndarray]:
    """The arrays of a folder, made where it is missing; one that cannot be written is no error."""
    if folder.exists():
        return read_arrays(folder)
    arrays = make()
    with contextlib.suppress(OSError):
        write_folder(folder, arrays)
    return arrays


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
        for name, on_disk in Examples.ARRAYS.items():
            arrays[f"{split}.{on_disk}"] = getattr(examples, name)
    arrays = {name: array for name, array in arrays.items() if array is not None}
    texts = {name: list(getattr(interactions, name)) for name in INTERACTION_TEXTS}
    prompts = {"name": interactions.name, "history": splits["test"].history}
    for name in ("min_shown_rating", "ratings"):  # defaults are omitted, also from the hash
        if (value := getattr(splits["test"], name)) != getattr(Examples, name):
            prompts[name] = value
    meta |= {"hash": content_hash(arrays, texts | prompts), "prompts": prompts}
    meta |= {"notes": interactions.notes, "words": interactions.words}
    with writing(folder):
        write_folder(folder, arrays, meta=meta, texts=texts)


def read_prepared(folder: Path, check: bool) -> Prepared:
    meta, texts = read_json(folder / "meta.json"), read_json(folder / "texts.json")
    with reading(folder / "meta.json"):
        arrays, prompts = read_arrays(folder), meta["prompts"]
        if check and content_hash(arrays, texts | prompts) != meta["hash"]:
            raise ValueError(f"{folder}: prepared examples do not match their hash; delete it")
        log = {name: arrays.get(f"log.{name}") for name in INTERACTION_ARRAYS} | texts
        log |= {"name": prompts.pop("name"), "notes": meta["notes"], "words": tuple(meta["words"])}
        interactions, splits = Interactions(**log), {}
        for split in ("train", "val", "test"):
            part = {n: arrays[f"{split}.{on_disk}"] for n, on_disk in Examples.ARRAYS.items()}
            splits[split] = Examples(interactions, split, **prompts, **part)
    return Prepared(interactions, splits, meta["hash"], folder, meta["raw_counts"], meta["options"])


# ------------------------------------------------------------------------------------------- tokens
def encode_split(
    prepared: Prepared, split: str, tokenizer: Tokenizer, max_length: int, histories: bool = False
) -> Encoded:
    """encode_examples, kept in the prepared folder for other ranks and later runs."""
    examples, words = prepared.splits[split], prepared.interactions.words
    made_of = [ENCODED_FORMAT, prepared.hash, split, tokenizer.fingerprint, max_length, words]
    made_of += [ALL_TEMPLATES, histories, examples.list_in_prompt]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    folder = prepared.folder / f"tokens-{split}-{key}"

    def encode() -> dict[str, np.ndarray]:
        encoded = encode_examples(examples, tokenizer, max_length)
        titles, prompts = list(encoded.completions.values()), encoded.prompts
        arrays = {
            "items": np.array(list(encoded.completions), np.int32),
            "completions": np.concatenate(titles).astype(np.int32),
            "completion_lengths": np.array([len(ids) for ids in titles]),
            "prompts": np.concatenate(prompts),
            "prompt_lengths": np.array([len(ids) for ids in prompts]),
            "counts": np.array([encoded.num_shortened, encoded.num_dropped]),
        }
        return arrays | ({"histories": history_spans(encoded, tokenizer)} if histories else {})

    a = kept_arrays(folder, encode)
    with reading(folder):
        prompts, titles = (
            np.split(a[f"{name}s"], np.cumsum(a[f"{name}_lengths"])[:-1])
            for name in ("prompt", "completion")
        )
        completions = {i: ids.tolist() for i, ids in zip(a["items"].tolist(), titles)}
        counts = a["counts"].tolist()
        encoded = Encoded(examples, prompts, completions, *counts, a.get("histories"))
    tokenizer.note_long(encoded.prompts)
    return encoded


def history_spans(encoded: Encoded, tokenizer: Tokenizer) -> np.ndarray:
    """(E, 2) where the history stands among a prompt's tokens: first, and one behind the last.

    It is where a prompt differs from the same one with another history, "~"."""
    texts = []
    for e in range(len(encoded.examples)):
        example = encoded.examples[e]
        if example.history:  # else nothing differs, and the span is empty
            unrated = all(isnan(rating) for _, rating in example.history)
            example = replace(example, history=[("~", nan if unrated else 0.0)])
        texts.append(render_prompt(example))
    spans = np.empty((len(texts), 2), np.int32)
    for e, other in enumerate(map(np.array, tokenizer.encode_prompts(texts))):
        prompt = encoded.prompts[e]
        head = shared_length(prompt, other)
        spans[e] = head, len(prompt) - shared_length(prompt[head:][::-1], other[head:][::-1])
    return spans


def shared_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids a and b begin with alike."""
    length = min(len(a), len(b))
    return int(np.append(a[:length] != b[:length], True).argmax())
