"""Frozen examples: from the data options to interactions, splits and token ids on disk.

What a data set's options give is made once, written under a hash of every array and title, and read
back mapped into memory: all models that are compared see the same candidates, negatives and
templates. What examples are, data.py says.
"""

import contextlib
import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import isnan, nan
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

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
from hub.files import usual_mode
from hub.tokenizer import Tokenizer
from loaders import amazon, beeradvocate, lastfm, movielens, ownlog, planted, steam
from loaders.counting import BASELINES, counting_baselines, markov_top
from loaders.dated import build_dated_examples, parse_date
from loaders.foreign import read_foreign_examples
from loaders.movielens import download_movielens
from loaders.ownlog import parse_columns, parse_item_columns
from loaders.planted import bayes_scores, world_of
from loaders.values import parse_scale

OWN_LOGS = ("csv", "jsonl", "recbole", "parquet")


LOADERS = {  # --dataset -> the module whose load(config) reads its log
    **{m.NAME: m for m in (planted, movielens, amazon, steam, beeradvocate, lastfm)},
    **dict.fromkeys(OWN_LOGS, ownlog),
}


DATASETS = (*LOADERS, "prepared")


@dataclass(frozen=True)
class DataConfig(ExampleConfig):
    """Turn a raw interaction log into frozen examples;
    print its statistics and one rendered example."""

    dataset: str = arg(
        "planted",
        f"one of {', '.join(DATASETS)} (loaders/)",
        group="data",
        choices=DATASETS,
    )
    data_dir: str = arg("", "the raw file, or the folder (MovieLens: or zip) with the raw files")
    columns: str = arg(
        "",
        "csv, jsonl, recbole, parquet: names or positions of your columns, "
        "user=...,item=...,rating=...,timestamp=...,title=...",
    )
    item_file: str = arg("", "csv, jsonl, recbole, parquet: a second file, with item and title")
    item_columns: str = arg(
        "",
        "names or positions of --item_file's columns, item=...,title=...",
    )
    scale: str = arg(
        "",
        "csv, jsonl, recbole, parquet: lowest and highest rating of another scale than 1 to 5, "
        "such as 0,100, or binary; mapped to 1 to 5",
    )
    percentile: str = arg(
        "",
        "ratings are ranks of amounts (hours, plays) among those of the same item, user, or all; "
        "empty: steam, lastfm by item",
        choices=("", "item", "user", "all"),
    )
    repeats: str = arg(
        "last",
        "csv, jsonl, recbole, parquet: of a repeated user-item pair the last counts, "
        "or the sum of its amounts",
        choices=("last", "sum"),
    )
    download: bool = arg(False, "fetch MovieLens-1M to data_dir first, and check its checksum")
    planted_users: int = arg(4000, "users of the planted world", at_least=1)
    core: int = arg(
        0,
        "keep users and items with at least this many interactions (iterated k-core); 0 = all",
        at_least=0,
    )
    split_by: str = arg(
        "last",
        "tests: each user's last interaction, or the first liked one after a date (time)",
        choices=("last", "time"),
    )
    split_date: str = arg(
        "", "--split_by time: the date, such as 2000-12-01; empty: 10 % of all lies after it"
    )
    prepared_dir: str = arg("prepared", "where prepared examples are kept")

    def __post_init__(self):
        super().__post_init__()
        own = self.dataset in OWN_LOGS
        changed = changed_options(self)
        for name, fits in (
            ("columns", own),
            ("item_file", own),
            ("item_columns", own),
            ("scale", own),
            ("repeats", own),
        ):
            if name in changed and not fits:
                raise ValueError(f"--{name} has no effect with --dataset {self.dataset}")
        if self.percentile and self.dataset in ("planted", "movielens", "prepared"):
            raise ValueError(
                f"--percentile has no effect with --dataset {self.dataset}, which has ratings"
            )
        if self.core and self.dataset == "prepared":
            raise ValueError(
                "--core has no effect with --dataset prepared: its candidates are fixed"
            )
        if self.item_columns and not self.item_file:
            raise ValueError("--item_columns names the columns of --item_file, which is not given")
        if self.scale and self.percentile:
            raise ValueError("--scale maps ratings, --percentile ranks amounts: give one of them")
        if self.split_date and self.split_by != "time":
            raise ValueError("--split_date has no effect without --split_by time")
        if self.split_date:
            parse_date(self.split_date)
        if self.split_by == "time":
            self.check_nothing_tells_of_later()
        if self.negatives == "retrieved" and self.dataset == "prepared":
            raise ValueError(
                "--negatives has no effect with --dataset prepared: its candidates are fixed"
            )
        parse_columns(self.columns)
        parse_item_columns(self.item_columns)
        parse_scale(self.scale)

    def check_nothing_tells_of_later(self) -> None:
        """ValueError for what would carry later interactions over the date of a split in time."""
        if self.dataset == "prepared":
            raise ValueError(
                "--split_by has no effect with --dataset prepared: its splits are fixed"
            )
        if self.core:
            raise ValueError(
                "--core counts the whole log, what comes after the date included: "
                "with --split_by time filter the file itself"
            )
        if self.percentile or self.dataset in ("steam", "lastfm"):
            raise ValueError(
                "--split_by time needs ratings: ranks of amounts (--percentile; steam, lastfm) "
                "are taken over the whole log, what comes after the date included"
            )


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
        file = self.folder / f"baselines-{split}.safetensors"
        if file.exists():
            kept = map_arrays(file)
            shape = self.splits[split].candidates.shape
            with reading(file):
                scores = {name: kept[name] for name in BASELINES}
                if any(s.shape != shape or not np.isfinite(s).all() for s in scores.values()):
                    raise TypeError(f"expected numbers of shape {shape}")
            return scores
        scores = counting_baselines(self.splits[split])
        _keep(file, {name: np.ascontiguousarray(values) for name, values in scores.items()})
        return scores

    def optimum(self, split: str) -> np.ndarray | None:
        """Log-probabilities (E, 20) by which the best possible order ranks; None where unknown."""
        world = world_of(self.options)
        if world is None:
            return None
        return bayes_scores(world, self.splits[split], self.options["min_rating"])


def load_interactions(config: DataConfig) -> Interactions:
    usual = gc.get_threshold()
    # as usual it walks through short-lived rows again and again, and doubles the time
    gc.set_threshold(200_000, 20, 100)
    try:
        return LOADERS[config.dataset].load(config)
    finally:
        gc.set_threshold(*usual)


def words_of(dataset: str, data_dir: str = "") -> Words:
    """The words of a data set's prompts, for what is asked without its log."""
    module = LOADERS.get(dataset)
    if module is amazon:  # books are read
        return amazon.words(Path(data_dir))
    return getattr(module, "WORDS", ITEMS)


def prepare(config: DataConfig, check: bool = True) -> Prepared:
    """The frozen examples of these options,
    written once under --prepared_dir and read from there ever after.

    Arrays stay in the file and are mapped into memory: processes share them, and touch only the
    rows they use. `check` compares them with their hash, which reads them all."""
    if config.dataset != "planted" and not config.data_dir:
        raise ValueError(
            f"--dataset {config.dataset} needs --data_dir, the folder or zip with its raw files"
        )
    options = {
        f.name: getattr(config, f.name)
        for f in fields(DataConfig)
        if f.name not in ("prepared_dir", "download")
    }
    if config.split_by == "last":  # folders from before there was a choice keep their names
        del options["split_by"], options["split_date"]
    if config.download and config.dataset == "movielens":
        download_movielens(Path(config.data_dir))
    options |= {"format": PREPARED_FORMAT, "source": _file_facts(config) if config.data_dir else []}
    key = _sha256(json.dumps(options, sort_keys=True).encode())[:12]
    folder = Path(config.prepared_dir) / f"{config.dataset}-{key}"
    if not (folder / "meta.json").exists():
        if config.dataset == "prepared":
            interactions, splits = read_foreign_examples(config)
            counts = {
                "users": interactions.num_users,
                "items": interactions.num_items,
                "interactions": len(interactions.user),
            }
        else:
            interactions = load_interactions(config)
            counts = {
                "users": interactions.num_users,
                "items": interactions.num_items,
                "interactions": len(interactions.user),
            }
            interactions = k_core(interactions, config.core)
            if config.split_by == "time":
                interactions, splits = build_dated_examples(interactions, config, markov_top)
            else:
                splits = build_examples(interactions, config, markov_top)
        _write_prepared(folder, interactions, splits, options, counts)
    return _read_prepared(folder, check)


def find_prepared(prepared_dir, content_hash: str) -> Prepared | None:
    """Prepared examples with this hash (or its beginning) below the folder, if there are any;
    the raw files are not asked for."""
    for meta in sorted(Path(prepared_dir).glob("*/meta.json")):
        with reading(meta):
            same = read_json(meta)["hash"].startswith(content_hash)
        if same:
            return _read_prepared(meta.parent, check=False)
    return None


PREPARED_FORMAT = 3  # raised when the same options give other examples than before


# In the file these are log.user, ...: the names are part of the content hash.
INTERACTION_ARRAYS = ("user", "item", "rating", "timestamp", "start")


TRAIN_END = "log.train_end"  # of a split in time


INTERACTION_TEXTS = ("titles", "user_ids", "item_ids")


DATA_SUFFIXES = (
    ".dat",
    ".zip",
    ".gz",
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".txt",
    ".inter",
    ".item",
    ".data",
    ".parquet",
)


# beside a raw file that was given by name
COMPANIONS = ("meta_*", "steam_games*", "*.item", "movies.*")


def _file_facts(config: DataConfig) -> list:
    """Names, sizes and times of the raw files: other files are prepared anew."""
    path = Path(config.data_dir)
    given = {path, Path(config.item_file)}
    if path.is_dir():
        beside = path.rglob("*")
    else:
        beside = (f for pattern in COMPANIONS for f in path.parent.glob(pattern))
    data = {f for f in beside if f.suffix.lower() in DATA_SUFFIXES}
    files = sorted(f for f in given | data if f.is_file())
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files[:1000]]


def _write_prepared(
    folder: Path, interactions: Interactions, splits, options: dict, counts: dict
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # renamed into place when it is whole
    beside = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    usual_mode(beside)
    arrays = {f"log.{name}": getattr(interactions, name) for name in INTERACTION_ARRAYS}
    if interactions.train_end is not None:
        arrays[TRAIN_END] = interactions.train_end
    arrays |= {
        f"{split}.{stored}": getattr(ex, name)
        for split, ex in splits.items()
        for name, stored in Examples.ARRAYS.items()
    }
    arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    texts = {name: getattr(interactions, name) for name in INTERACTION_TEXTS}
    facts = _prompt_facts(interactions.name, splits["test"])
    meta = {
        "options": options,
        "hash": _content_hash(arrays, texts | facts),
        "raw_counts": counts,
        "notes": interactions.notes,
        "words": interactions.words,
        **facts,
    }
    for name, values in texts.items():
        arrays |= Texts.arrays(name, values)
    try:
        with writing(beside):
            save_file(arrays, beside / "examples.safetensors")
            usual_mode(beside / "examples.safetensors")
            (beside / "meta.json").write_text(json.dumps(meta, indent=1))
        with contextlib.suppress(OSError):  # another process was faster
            beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _read_prepared(folder: Path, check: bool) -> Prepared:
    meta = _read_meta(folder / "meta.json")
    file = folder / "examples.safetensors"
    arrays = map_arrays(file)
    facts = {name: meta[name] for name in ("name", "history", *USUALLY) if name in meta}
    try:
        with reading(file):
            texts = {
                name: Texts(arrays.pop(f"{name}.bytes"), arrays.pop(f"{name}.ends"))
                for name in INTERACTION_TEXTS
            }
            whole = {name: list(values) for name, values in texts.items()} if check else {}
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder}: prepared examples are damaged ({error}); delete it") from None
    if check and _content_hash(arrays, whole | facts) != meta["hash"]:
        raise ValueError(f"{folder}: prepared examples do not match their hash; delete the folder")
    with reading(file):
        interactions = Interactions(
            **{name: arrays[f"log.{name}"] for name in INTERACTION_ARRAYS},
            **texts,
            name=meta["name"],
            notes=meta["notes"],
            words=tuple(meta["words"]),
            train_end=arrays.get(TRAIN_END),
        )
        shown = {name: meta[name] for name in USUALLY if name in meta}
        splits = {
            split: Examples(
                interactions,
                split,
                meta["history"],
                **{n: arrays[f"{split}.{stored}"] for n, stored in Examples.ARRAYS.items()},
                **shown,
            )
            for split in ("train", "val", "test")
        }
    return Prepared(interactions, splits, meta["hash"], folder, meta["raw_counts"], meta["options"])


def _read_meta(file: Path) -> dict:
    """meta.json of a prepared folder, every entry of its type; ValueError names the file."""
    meta = read_json(file)
    with reading(file):
        kinds = {"options": dict, "hash": str, "raw_counts": dict, "notes": dict, "words": list}
        kinds |= {"name": str, "history": int}
        for name, kind in kinds.items():
            if not isinstance(meta[name], kind):
                raise TypeError(f"{name} must be {kind.__name__}")
        counts = [meta["raw_counts"][name] for name in ("users", "items", "interactions")]
        if not all(isinstance(n, int) for n in (*counts, *meta["notes"].values())):
            raise TypeError("counts are whole numbers")
        if len(meta["words"]) != 3 or not all(isinstance(word, str) for word in meta["words"]):
            raise TypeError("words are three texts")
        if not isinstance(meta.get("ratings", True), bool) or meta["history"] < 1:
            raise TypeError("history is above 0, ratings true or false")
        float(meta.get("min_shown_rating", 0.0))
    return meta


USUALLY = {"min_shown_rating": 0.0, "ratings": True}  # what is as usual is not named


def _prompt_facts(name: str, examples: Examples) -> dict:
    """What shapes the prompts besides the arrays;
    what is as usual is not named, and leaves the hash as it was."""
    facts = {"name": name, "history": examples.history}
    return facts | {
        key: getattr(examples, key)
        for key, value in USUALLY.items()
        if getattr(examples, key) != value
    }


class Texts(Sequence):
    """Strings as one array of UTF-8 bytes and their ends, read when they are asked for:
    ten million are no objects."""

    def __init__(self, data: np.ndarray, ends: np.ndarray):
        self.data, self.ends = data, ends

    @staticmethod
    def arrays(name: str, values: Sequence[str]) -> dict[str, np.ndarray]:
        encoded = [value.encode() for value in values]
        ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        return {f"{name}.bytes": np.frombuffer(b"".join(encoded), np.uint8), f"{name}.ends": ends}

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i) -> str:
        end = int(self.ends[i])
        i = i + len(self.ends) if i < 0 else i
        return bytes(self.data[int(self.ends[i - 1]) if i else 0 : end]).decode()

    def __iter__(self) -> Iterator[str]:
        data, start = bytes(self.data), 0
        for end in self.ends.tolist():
            yield data[start:end].decode()
            start = end


def map_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, mapped into memory read-only;
    ValueError if it is damaged."""
    kinds = {
        "I64": np.int64,
        "I32": np.int32,
        "F32": np.float32,
        "F64": np.float64,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }
    try:
        with open(file, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
        content = np.memmap(file, np.uint8, "r").view(np.ndarray)[8 + size :]
        header.pop("__metadata__", None)
        spans = {name: (entry, slice(*entry["data_offsets"])) for name, entry in header.items()}
        return {
            n: content[span].view(kinds[entry["dtype"]]).reshape(entry["shape"])
            for n, (entry, span) in spans.items()
        }
    except (ValueError, KeyError, TypeError, OSError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"{file}: damaged ({error}); delete its folder, it will be made again"
        ) from None


def _sha256(data) -> str:
    return hashlib.sha256(data).hexdigest()


def _content_hash(arrays: dict[str, np.ndarray], texts: dict) -> str:
    parts = [
        f"{name} {a.dtype} {a.shape} {_sha256(a.view(np.uint8).reshape(-1) if a.size else b'')}"
        for name, a in sorted(arrays.items())
    ]
    return _sha256("\n".join([*parts, json.dumps(texts, sort_keys=True)]).encode())


def encode_split(
    prepared: Prepared, split: str, tokenizer: Tokenizer, max_length: int, histories: bool = False
) -> Encoded:
    """encode_examples, kept in the prepared folder:
    a run, its other ranks and the next run with this tokenizer read it."""
    examples = prepared.splits[split]
    facts = [
        ENCODED_FORMAT,
        prepared.hash,
        split,
        tokenizer.fingerprint,
        max_length,
        ALL_TEMPLATES,
        prepared.interactions.words,
        *(["histories"] if histories else []),
    ]
    key = _sha256(json.dumps(facts).encode())[:12]
    file = prepared.folder / f"tokens-{split}-{key}.safetensors"
    if file.exists():
        encoded = _read_encoded(file, examples)
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
    _keep(file, arrays)
    return encoded


def history_spans(encoded: Encoded, tokenizer: Tokenizer) -> np.ndarray:
    """(E, 2) where the history stands among a prompt's tokens: first, and one behind the last.

    It is where a prompt differs from the same one with another history, whatever stands around it
    (a "~" that begins or ends it is taken for shared).
    """
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


def spans_fit(spans: np.ndarray, lengths: np.ndarray) -> bool:
    """Whether all spans (E, 2) lie in prompts of these lengths (E,), behind their first token."""
    if spans.shape != (len(lengths), 2):
        return False
    first, end = spans.T
    return bool(((first >= 1) & (first <= end) & (end <= lengths)).all())


def _read_encoded(file: Path, examples: Examples) -> Encoded:
    """What encode_split kept; ValueError names the file if its parts do not fit together."""
    arrays = map_arrays(file)
    with reading(file):
        lengths = arrays["prompt_lengths"], arrays["completion_lengths"]
        ids = arrays["prompts"], arrays["completions"]
        items, counts = arrays["items"].tolist(), arrays["counts"].tolist()
        fits = len(lengths[0]) == len(examples) and len(lengths[1]) == len(items)
        for values, parts in zip(ids, lengths, strict=True):
            whole = values.ndim == parts.ndim == 1 and parts.min(initial=1) > 0
            fits = fits and whole and parts.sum() == len(values) and values.min(initial=0) >= 0
            fits = fits and values.dtype == np.int32
        known = np.isin(examples.candidates, items).all()
        histories = arrays.get("histories")
        if histories is not None:
            fits = fits and spans_fit(histories, lengths[0])
        if not (fits and known and len(counts) == 2):
            raise TypeError("its parts do not fit together; delete it, it will be made again")
        completions = zip(items, Ragged(ids[1], lengths[1]), strict=True)
        spelt = {item: part.tolist() for item, part in completions}
        return Encoded(examples, Ragged(ids[0], lengths[0]), spelt, *counts, histories)


def _keep(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write what can be made again; where the folder is read-only, go on without."""
    beside = file.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError, SafetensorError):
        save_file(arrays, beside)
        usual_mode(beside)
        beside.rename(file)


ENCODED_FORMAT = 2  # raised when the same examples and tokenizer give other tokens than before
