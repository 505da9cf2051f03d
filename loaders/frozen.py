"""Frozen examples: from data options to interactions and splits on disk, and to token ids.

A hash of every array and title says which they are: models that are compared see the same ones."""

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

import data
from common import arg, changed_options, read_json, writing
from data import ITEMS, SPLITS, Encoded, ExampleConfig, Examples, Interactions, Words
from hub.tokenizer import Tokenizer
from loaders import foreign, ownlog, planted, published
from loaders.counting import counting_baselines, markov_top
from loaders.dated import build_dated_examples
from loaders.files import facts

OWN_LOGS = ("csv", "jsonl", "recbole", "parquet")
OWN = ", ".join(OWN_LOGS)
RANKS = {f"rank:{group}": group for group in ("item", "user", "all")}  # of --scale
# name -> what has its load(config), and files(config), all that is read
LOADERS = {"planted": planted, "prepared": foreign} | dict.fromkeys(published.PATTERNS, published)
NOT_OWN = tuple(LOADERS)
LOADERS |= dict.fromkeys(OWN_LOGS, ownlog)


@dataclass(frozen=True)
class DataConfig(ExampleConfig):
    """Turn a raw interaction log into frozen examples."""

    dataset: str = arg("planted", "what is read", group="data", choices=tuple(LOADERS))
    data_dir: str = arg("", "the raw file, or the folder (MovieLens: or zip) with the raw files")
    columns: str = arg("", f"{OWN}: user=,item=,rating=,timestamp=,title=NAME or its place")
    item_file: str = arg("", "a second file with title= and id= (the item) of --columns")
    scale: str = arg("", "map to 1 to 5: LOW,HIGH or binary; amounts: rank:item, :user or :all")
    planted_users: int = arg(4000, "users of the planted world", at_least=1)
    num_users: int = arg(0, "draw so many users of the log, before --core; 0 = all", at_least=0)
    core: int = arg(0, "k-core: drop users and items with fewer interactions", at_least=0)
    split_date: str = arg("", "test the first liked item from this date on; 10%: the last tenth")
    prepared_dir: str = arg("prepared", "where prepared examples are kept", free=True)

    def __post_init__(self):
        super().__post_init__()
        named, ranks = f"--dataset {self.dataset}", "ranks, which count what comes after the date"
        unscaled = ("planted", "movielens", "prepared") if self.ranks else NOT_OWN
        unread = {  # options -> what they do not go with
            "columns item_file": named * (self.dataset in NOT_OWN),
            "scale": named * (self.dataset in unscaled),
            "num_users core split_date negatives": named * (self.dataset == "prepared"),
            "core": "--split_date: it counts what comes after the date" * bool(self.split_date),
            "split_date": ranks * bool(self.ranks or self.dataset in ("steam", "lastfm")),
        }
        for names, reason in unread.items():
            if reason and (wrong := sorted({*names.split()} & changed_options(self))):
                raise ValueError(f"--{wrong[0]} does not go with {reason}; leave one out")

    @property
    def ranks(self) -> str:
        """Inside which group --scale rank:... ranks amounts: item, user, all; or ""."""
        return RANKS.get(self.scale, "")


def data_defaults(given: dict) -> dict:
    """Defaults that suit a data set: every program makes the same examples of the same options."""
    return planted.DEFAULTS if given.get("dataset", planted.NAME) == planted.NAME else {}


def words_of(dataset: str) -> Words:
    """The words of a data set's prompts, for what is asked without its log."""
    return ({"planted": planted.WORDS} | published.WORDS).get(dataset, ITEMS)


@dataclass
class Prepared:
    """A log and its three splits, as frozen on disk."""

    interactions: Interactions
    splits: dict[str, Examples]
    hash: str  # of every array, title and the history shown
    folder: Path
    raw_counts: dict[str, int]  # users, items, interactions as read
    options: dict  # of the DataConfig that it was made with
    counted: dict = field(default_factory=dict)  # split -> baselines

    def baselines(self, split: str) -> dict[str, np.ndarray]:
        """Name -> scores (E, 20) of popularity, item-kNN and Markov; counted once."""
        if split not in self.counted:
            self.counted[split] = counting_baselines(self.splits[split])
        return self.counted[split]

    def optimum(self, split: str) -> np.ndarray | None:
        """Log-probabilities (E, 20) by which the best possible order ranks; None where unknown."""
        world, min_rating = planted.world_of(self.options), self.options["min_rating"]
        return world and planted.bayes_scores(world, self.splits[split], min_rating)


def load_interactions(config: DataConfig) -> Interactions:
    """The log as it is read; prepared examples come with it."""
    return LOADERS[config.dataset].load(config)


def draw_users(log: Interactions, config: DataConfig) -> Interactions:
    """The log of --num_users, drawn by --data_seed."""
    if config.num_users >= log.num_users:
        there = f"the log has {log.num_users:,} users; give fewer, or 0"
        raise ValueError(f"--num_users {config.num_users} has no effect: {there}")
    rng = np.random.default_rng([config.data_seed, len(SPLITS)])
    drawn = rng.choice(log.num_users, config.num_users, replace=False)
    notes = {"users that --num_users leaves out": log.num_users - config.num_users}
    return replace(data.select_rows(log, np.isin(log.user, drawn)), notes=log.notes | notes)


def prepare(config: DataConfig, check: bool = True) -> Prepared:
    """The frozen examples of these options, written once under --prepared_dir, then mapped into
    memory, which processes share. `check` compares them with their hash, which reads them all."""
    name = config.dataset
    if name != planted.NAME and not config.data_dir:
        raise ValueError(f"--dataset {name} needs --data_dir, where its raw files are")
    options = {f.name: getattr(config, f.name) for f in fields(DataConfig)}
    del options["prepared_dir"], options["list_in_prompt"]
    source = facts(LOADERS[name].files(config)) if name != planted.NAME else []
    former = {"percentile": "", "item_columns": ""}  # options that are part of old keys
    options |= former | {"format": PREPARED_FORMAT, "source": source}
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(config.prepared_dir) / f"{name}-{key}"
    if not (folder / "meta.json").exists():
        read = load_interactions(config)
        log, splits = read if name == "prepared" else (read, None)
        counts = {"users": log.num_users, "items": log.num_items, "interactions": len(log.user)}
        log = draw_users(log, config) if config.num_users else log
        if config.split_date:
            log, splits = build_dated_examples(log, config, markov_top)
        elif not splits:
            log = data.k_core(log, config.core)
            splits = data.build_examples(log, config, markov_top)
        write_prepared(folder, log, splits, {"options": options, "raw_counts": counts})
    prepared = read_prepared(folder, check)
    for examples in prepared.splits.values():
        examples.list_in_prompt = config.list_in_prompt
    return prepared


def find_prepared(prepared_dir, content_hash: str) -> Prepared | None:
    """Prepared examples with this hash (or its beginning) below the folder, without raw files."""
    for file in sorted(Path(prepared_dir).glob("*/meta.json")):
        if read_json(file).get("hash", "").startswith(content_hash):
            return read_prepared(file.parent, check=False)
    return None


# ------------------------------------------------------------------------------------------ on disk
PREPARED_FORMAT = 5  # raised when the same options give other examples, or other files, than before
ENCODED_FORMAT = 5  # raised when the same examples and tokenizer give other tokens than before
LOG_TEXTS = ("titles", "user_ids", "item_ids", "name")


def write_folder(folder: Path, arrays: dict[str, np.ndarray], meta: dict) -> None:
    """One file per array, and meta.json; put in place when the folder is whole."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}")
    part.mkdir(parents=True, exist_ok=True)
    try:
        for name, array in arrays.items():
            np.save(part / f"{name}.npy", array)
        (part / "meta.json").write_text(json.dumps(meta))
        with contextlib.suppress(OSError):  # another process was faster
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a folder by name, mapped into memory read-only."""
    files = sorted(folder.glob("*.npy"))
    return {file.stem: np.load(file, mmap_mode="r").view(np.ndarray) for file in files}


def content_hash(arrays: dict[str, np.ndarray], texts: dict) -> str:
    hashes = {n: hashlib.sha256(np.ascontiguousarray(a)).hexdigest() for n, a in arrays.items()}
    parts = [f"{n} {a.dtype} {a.shape} {hashes[n]}" for n, a in sorted(arrays.items())]
    whole = "\n".join([*parts, json.dumps(texts, sort_keys=True)])
    return hashlib.sha256(whole.encode()).hexdigest()


def write_prepared(folder: Path, log: Interactions, splits: dict, meta: dict) -> None:
    """Arrays such as log.user and train.target; these names are part of the hash."""
    arrays = {f"log.{n}": value for n, value in vars(log).items() if isinstance(value, np.ndarray)}
    for split, examples in splits.items():
        arrays |= {f"{split}.{n}": getattr(examples, f) for f, n in Examples.ARRAYS.items()}
    texts = {name: getattr(log, name) for name in LOG_TEXTS} | {"history": examples.history}
    shown = {name: getattr(examples, name) for name in ("min_shown_rating", "ratings")}
    texts |= {n: value for n, value in shown.items() if value != getattr(Examples, n)}
    meta |= {"texts": texts, "notes": log.notes, "words": log.words}
    with writing(folder):
        write_folder(folder, arrays, meta | {"hash": content_hash(arrays, texts)})


def read_prepared(folder: Path, check: bool) -> Prepared:
    meta, arrays, splits = read_json(folder / "meta.json"), read_arrays(folder), {}
    if check and content_hash(arrays, meta["texts"]) != meta["hash"]:
        raise ValueError(f"{folder}: prepared examples do not match their hash; delete it")
    shown = meta["texts"]
    log = {name: shown.pop(name) for name in LOG_TEXTS}  # what is left are fields of Examples
    log |= {n.removeprefix("log."): array for n, array in arrays.items() if n.startswith("log.")}
    log = Interactions(**log, notes=meta["notes"], words=tuple(meta["words"]))
    for split in SPLITS:
        part = {field: arrays[f"{split}.{name}"] for field, name in Examples.ARRAYS.items()}
        splits[split] = Examples(log, split, **shown, **part)
    return Prepared(log, splits, meta["hash"], folder, meta["raw_counts"], meta["options"])


# ------------------------------------------------------------------------------------------- tokens
def encode_split(
    prepared: Prepared, split: str, tokenizer: Tokenizer, max_length: int, histories: bool = False
) -> Encoded:
    """encode_examples, kept in the prepared folder for other ranks and later runs."""
    examples, words = prepared.splits[split], prepared.interactions.words
    made_of = [ENCODED_FORMAT, split, tokenizer.fingerprint, max_length, words, data.ALL_TEMPLATES]
    made_of += [histories, examples.list_in_prompt]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    folder = prepared.folder / f"tokens-{split}-{key}"
    if folder.exists():
        a, counts = read_arrays(folder), read_json(folder / "meta.json")["counts"]
        titles, prompts = (np.split(a[f"{n}s"], a[f"{n}_ends"][:-1]) for n in ("title", "prompt"))
        completions = {i: ids.tolist() for i, ids in zip(a["items"].tolist(), titles, strict=True)}
        encoded = Encoded(examples, prompts, completions, *counts, a.get("histories"))
    else:
        encoded = data.encode_examples(examples, tokenizer, max_length)
        arrays = {"items": np.array(list(encoded.completions), np.int32)}
        for name, ids in ("title", encoded.completions.values()), ("prompt", encoded.prompts):
            arrays |= {f"{name}s": np.concatenate([*ids]).astype(np.int32)}
            arrays |= {f"{name}_ends": np.cumsum([len(one) for one in ids])}
        if histories:
            arrays["histories"] = encoded.histories = history_spans(encoded, tokenizer)
        counts = {"counts": [encoded.num_shortened]}
        with contextlib.suppress(OSError):  # a full disk; then the next start encodes again
            write_folder(folder, arrays, counts)
    tokenizer.note_long(encoded.prompts)
    return encoded


def history_spans(encoded: Encoded, tokenizer: Tokenizer) -> np.ndarray:
    """(E, 2) where the history stands among a prompt's tokens, first and one behind the last: where
    it differs from a prompt with another history, "~" and 0, if ratings are shown."""
    texts, spans = [], []
    for example in map(encoded.examples.__getitem__, range(len(encoded.examples))):
        other = [("~", 0 * rating) for _, rating in example.history[-1:]]
        texts.append(data.render_prompt(replace(example, history=other)))
    for prompt, other in zip(encoded.prompts, tokenizer.encode_prompts(texts)):
        first = len(os.path.commonprefix([prompt.tolist(), other]))
        rest = prompt[first:].tolist()[::-1], other[first:][::-1]
        spans.append((first, len(prompt) - len(os.path.commonprefix(rest))))
    return np.array(spans, np.int32)
