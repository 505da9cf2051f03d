"""Frozen examples: from data options to interactions and splits on disk.

A hash of every array and title identifies them, so that compared models see the same examples."""

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

import data
from common import arg, changed_options, read_json, writing
from data import SPLITS, Encoded, ExampleConfig, Examples, Interactions
from hub.tokenizer import Tokenizer
from loaders import foreign, ownlog, planted, published
from loaders.counting import markov_top
from loaders.readers import file_stamps

PROMPT_WORDS = {"planted": planted.WORDS} | published.WORDS  # by data set
# name -> what has its load(config), and files(config), all that is read
LOADERS = {"planted": planted, "prepared": foreign} | dict.fromkeys(published.PATTERNS, published)
LOADERS |= dict.fromkeys(("csv", "jsonl", "recbole", "parquet"), ownlog)


@dataclass(frozen=True)
class DataConfig(ExampleConfig):
    """Turn a raw interaction log into frozen examples."""

    dataset: str = arg("planted", "what is read", group="data", choices=tuple(LOADERS))
    data_dir: str = arg("", "the raw file, or the folder (MovieLens: or zip) with the raw files")
    columns: str = arg("", "own logs: user=,item=,rating=,timestamp=,title=NAME or its place")
    item_file: str = arg("", "a second file with title= and id= (the item) of --columns")
    scale: str = arg("", "map to 1 to 5: LOW,HIGH or binary; amounts: rank:item, :user or :all")
    planted_users: int = arg(4000, "users of the planted world", at_least=1)
    num_users: int = arg(0, "draw so many users of the log, before --core; 0 = all", at_least=0)
    core: int = arg(0, "k-core: drop users and items with fewer interactions", at_least=0)
    split_date: str = arg("", "test the first liked item from this date on; 10%: the last tenth")
    prepared_dir: str = arg("prepared", "where prepared examples are kept", free=True)

    def __post_init__(self):
        super().__post_init__()
        name, is_own = self.dataset, LOADERS[self.dataset] is ownlog
        unread = set() if is_own else {"columns", "item_file"}
        if not is_own and (not self.ranks or name in ("planted", "movielens", "prepared")):
            unread.add("scale")
        if name == "prepared":
            unread |= {"num_users", "core", "split_date", "negatives", "ratings", "history_items"}
        if wrong := sorted(unread & changed_options(self)):
            raise ValueError(f"--{wrong[0]} does not go with --dataset {name}; leave one out")
        if self.split_date and (self.core or self.ranks or name in ("steam", "lastfm")):
            raise ValueError("give --split_date, or --core or ranks, which count later rows")

    @property
    def ranks(self) -> str:
        """Inside which group --scale rank:... ranks amounts: item, user, all; or ""."""
        return {f"rank:{group}": group for group in ("item", "user", "all")}.get(self.scale, "")


def data_defaults(given: dict) -> dict:
    """Defaults that suit a data set: equal options give equal examples in every program."""
    return planted.DEFAULTS if given.get("dataset", planted.NAME) == planted.NAME else {}


@dataclass
class Prepared:
    """A log and its three splits, as frozen on disk."""

    interactions: Interactions
    splits: dict[str, Examples]
    hash: str  # of every array, title and the history shown
    folder: Path


def load_interactions(config: DataConfig) -> Interactions:
    """The log as it is read; prepared examples come with it."""
    return LOADERS[config.dataset].load(config)


def prepare(config: DataConfig) -> Prepared:
    """The frozen examples of these options, written once under --prepared_dir."""
    name = config.dataset
    if name != planted.NAME and not config.data_dir:
        raise ValueError(f"--dataset {name} needs --data_dir, where its raw files are")
    if name == planted.NAME and config.data_dir:
        raise ValueError("--data_dir needs --dataset, such as csv: the planted world has no files")
    options = {f.name: getattr(config, f.name) for f in fields(DataConfig)}
    del options["prepared_dir"], options["list_in_prompt"]
    source = file_stamps(LOADERS[name].files(config)) if name != planted.NAME else []
    key = hashlib.sha256(json.dumps([PREPARED_FORMAT, options, source]).encode()).hexdigest()[:12]
    folder = Path(config.prepared_dir) / f"{name}-{key}"
    if not folder.exists():
        read = load_interactions(config)
        whole, splits = read if name == "prepared" else (read, None)
        log, count = whole, config.num_users
        if count >= whole.num_users:
            raise ValueError(f"--num_users {count}: the log has {whole.num_users:,}; give fewer")
        if count:
            rng = np.random.default_rng([config.data_seed, len(SPLITS)])
            drawn = rng.choice(whole.num_users, count, replace=False)
            log = data.select_rows(whole, np.isin(whole.user, drawn))
        if config.split_date:
            log, splits = build_dated_examples(log, config)
        elif not splits:
            log = data.k_core(log, config.core)
            splits = data.build_examples(log, config, markov_top)
        if left_out := len(whole.user) - len(log.user):
            log.notes["interactions that --num_users and --core leave out"] = left_out
        write_prepared(folder, log, splits)
    return read_prepared(folder, config.list_in_prompt)


def find_prepared(prepared_dir, content_hash: str) -> Prepared | None:
    """Prepared examples with this hash (or its beginning) below the folder, without raw files."""
    files = sorted(Path(prepared_dir).glob("*/prepared.json"))
    found = (f.parent for f in files if read_json(f)["hash"].startswith(content_hash))
    return next(map(read_prepared, found), None)


# ------------------------------------------------------------------------------------ split in time
def date_of(interactions: Interactions, given: str) -> np.datetime64:
    """The date, UTC if it names no zone; ValueError if it does not divide the log."""
    time = np.sort(interactions.timestamp).view("M8[s]")
    with contextlib.suppress(ValueError):
        date = time[int(0.9 * len(time))] if given == "10%" else np.datetime64(given, "s")
        if time[0] < date <= time[-1]:
            return date
    raise ValueError(f"--split_date {given}: expected 10%, or a date from {time[0]} to {time[-1]}")


def build_dated_examples(log: Interactions, config) -> tuple[Interactions, dict[str, Examples]]:
    """The log, which now knows where training ends, and its splits: each user is validated on the
    last liked item before --split_date and tested on the first one from then on. train and val are
    built from a log that ends at the date: no random candidate reveals what came later."""
    date, row = date_of(log, config.split_date), np.arange(len(log.user))
    before, liked = log.timestamp.view("M8[s]") < date, log.rating >= config.min_rating
    is_late = row - log.start[log.user] >= config.min_history
    earlier, later = row[before & liked][::-1], row[~before & liked]
    val = earlier[np.unique(log.user[earlier], return_index=True)[1]]  # each user's last
    test = later[np.unique(log.user[later], return_index=True)[1]]  # each user's first
    val, test = val[is_late[val]], test[is_late[test]]
    end = log.start[:-1] + np.bincount(log.user[before], minlength=log.num_users)
    end[log.user[val]] = val
    why = f"interactions from {date} (UTC) on, which training does not see"
    log = replace(log, train_end=end, notes=log.notes | {why: int((~before).sum())})
    train = is_late & (row + config.followers <= end[log.user])

    past, new = data.select_rows(log, before), np.cumsum(before) - 1  # row -> row of the past
    past.train_end = new[end[np.unique(log.user[before])] - 1] + 1
    splits = data.build_examples(past, config, markov_top, {"train": new[train], "val": new[val]})
    items = np.unique(log.item[before])
    for examples in splits.values():
        examples.interactions, examples.position = log, row[before][examples.position]
        examples.candidates = items[examples.candidates].astype(np.int32)
    return log, splits | data.build_examples(log, config, markov_top, {"test": test})


# ------------------------------------------------------------------------------------------ on disk
PREPARED_FORMAT = 9  # raised when the same options give other examples, or other files, than before


def write_prepared(folder: Path, log: Interactions, splits: dict[str, Examples]) -> None:
    """Write arrays (hashed with their names) and prepared.json: a whole folder, or none."""
    arrays = {f"log.{n}": value for n, value in vars(log).items() if isinstance(value, np.ndarray)}
    for split, examples in splits.items():
        arrays |= {f"{split}.{n}": getattr(examples, f) for f, n in Examples.ARRAYS.items()}
    texts = {n: getattr(log, n) for n in ("titles", "user_ids", "item_ids", "name")}
    shown = {n: getattr(splits["test"], n) for n in ("history", "min_shown_rating", "ratings")}
    shown = {n: value for n, value in shown.items() if value != getattr(Examples, n, None)}
    hashes = {n: hashlib.sha256(np.ascontiguousarray(a)).hexdigest() for n, a in arrays.items()}
    parts = [f"{n} {a.dtype} {a.shape} {hashes[n]}" for n, a in sorted(arrays.items())]
    whole = "\n".join([*parts, json.dumps(texts | shown, sort_keys=True)])
    meta = {"hash": hashlib.sha256(whole.encode()).hexdigest(), "shown": shown}
    meta["log"] = texts | {"notes": log.notes, "words": log.words}
    part = folder.with_name(f"{folder.name}.{os.getpid()}")
    with writing(folder):
        part.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            np.save(part / f"{name}.npy", array)
        (part / "prepared.json").write_text(json.dumps(meta))
        with contextlib.suppress(OSError):  # another process was faster
            part.rename(folder)
        shutil.rmtree(part, ignore_errors=True)


def read_prepared(folder: Path, list_in_prompt: bool = True) -> Prepared:
    """The arrays are mapped into memory, which processes share."""
    arrays = {f.stem: np.load(f, mmap_mode="r").view(np.ndarray) for f in folder.glob("*.npy")}
    meta, splits = read_json(folder / "prepared.json"), {}
    log = meta["log"] | {"words": tuple(meta["log"]["words"])}
    log |= {n.removeprefix("log."): array for n, array in arrays.items() if n.startswith("log.")}
    log = Interactions(**log)
    for split in SPLITS:
        part = {field: arrays[f"{split}.{name}"] for field, name in Examples.ARRAYS.items()}
        splits[split] = Examples(log, split, **meta["shown"], **part, list_in_prompt=list_in_prompt)
    return Prepared(log, splits, meta["hash"], folder)


def encode_split(
    prepared: Prepared, split: str, tokenizer: Tokenizer, max_length: int, histories: bool = False
) -> Encoded:
    """encode_examples, kept in the prepared folder for other ranks and later runs."""
    examples, words = prepared.splits[split], prepared.interactions.words
    made_of = [tokenizer.fingerprint, max_length, histories, examples.list_in_prompt, words]
    key = hashlib.sha256(json.dumps([made_of, data.ALL_TEMPLATES]).encode()).hexdigest()[:12]
    file = prepared.folder / f"tokens-{split}-{key}.npz"
    if file.exists():
        a = np.load(file)
        titles, prompts = (np.split(a[n], a[f"{n}_ends"][:-1]) for n in ("titles", "prompts"))
        completions = dict(zip(a["items"].tolist(), map(np.ndarray.tolist, titles)))
        encoded = Encoded(examples, prompts, completions, int(a["shortened"]), a.get("histories"))
    else:
        encoded = data.encode_examples(examples, tokenizer, max_length)
        arrays = {"items": [*encoded.completions], "shortened": encoded.num_shortened}
        for name, ids in ("titles", encoded.completions.values()), ("prompts", encoded.prompts):
            arrays |= {name: np.concatenate([*ids]), f"{name}_ends": np.cumsum([*map(len, ids)])}
        if histories:
            arrays["histories"] = encoded.histories = history_spans(encoded, tokenizer)
        with contextlib.suppress(OSError):  # a full disk; then the next start encodes again
            np.savez(part := file.with_name(f"{os.getpid()}.npz"), **arrays)
            part.rename(file)
    tokenizer.note_long(encoded.prompts)
    return encoded


def history_spans(encoded: Encoded, tokenizer: Tokenizer) -> np.ndarray:
    """(E, 2) first token and one past the last that another history, "~" rated 0, would change."""
    texts, spans = [], []
    for example in map(encoded.examples.__getitem__, range(len(encoded.examples))):
        other = [("~", 0 * rating) for _, rating in example.history[-1:]]
        texts.append(data.render_prompt(replace(example, history=other)))
    for prompt, other in zip(map(list, encoded.prompts), tokenizer.encode_prompts(texts)):
        first = len(os.path.commonprefix([prompt, other]))
        behind = os.path.commonprefix([prompt[first:][::-1], other[first:][::-1]])
        spans.append((first, len(prompt) - len(behind)))
    return np.array(spans, np.int32)
