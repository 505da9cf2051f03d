"""From an interaction log to batches: splits, frozen candidates, prompts, token ids, and the PromptTree.

One real prompt (MovieLens-1M, shortened), and one of its completions:

    A user watched these movies, oldest first, and rated each from 1 to 5:
    Girl, Interrupted | Rating: 4
    Titanic (1997) | Rating: 5
    Which of the following movies will the user watch next and like?
    The Matrix
    Back to the Future
    Answer:                                 the completion is " Back to the Future" + EOS

raw files -> interactions.py (the table) -> examples.py (splits, candidates, prompts) -> here: kept on disk under a hash, and
encoded once per tokenizer -> batches.py (trees). A prompt that is too long loses its oldest history items, never tokens.

    python data.py --dataset movielens --data_dir ml-1m.zip       statistics and one example with its token boundaries

Left out: rating prediction, cold-start items, side features. Legend: E examples, B examples of a batch, N completions
per example, P prompt width, C completion width, T = P + C, M scored tokens.
"""

import contextlib
import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from batches import PromptTree, build_tree, micro_batches, prefetch, to_device
from common import read_json, run_cli, writing
from demo.planted import World, planted_world
from examples import (
    ALL_TEMPLATES,
    NUM_CANDIDATES,
    WITHOUT_RATINGS,
    WORDS,
    DataConfig,
    Example,
    Examples,
    build_examples,
    render_prompt,
)
from foreign import read_foreign_examples
from hub.tokenizer import Tokenizer
from interactions import Interactions, k_core
from loaders import (
    download_movielens,
    load_amazon,
    load_beeradvocate,
    load_lastfm,
    load_movielens,
    load_steam,
)
from ownlog import load_own_log

__all__ = [  # what other modules, tests and scripts find here
    "DataConfig", "Encoded", "Example", "Examples", "Interactions", "PromptTree", "Tokenizer", "build_examples", "build_tree",
    "encode_split", "k_core", "load_amazon", "load_beeradvocate", "load_lastfm", "load_movielens", "load_own_log", "load_steam",
    "micro_batches", "prefetch", "prepare", "render_prompt", "to_device",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------ prepared once
@dataclass
class Prepared:
    """A log and its three splits, as frozen on disk. `hash` covers every array, title and the history shown."""

    log: Interactions
    splits: dict[str, Examples]
    hash: str
    folder: Path
    raw_counts: dict[str, int]  # users, items, interactions before the k-core


def load_log(config: DataConfig) -> Interactions:
    path, percentile = config.data_dir, config.percentile
    usual = gc.get_threshold()
    gc.set_threshold(
        200_000, 20, 100
    )  # as usual it walks through short-lived rows again and again, and doubles the time
    try:
        if config.dataset == "planted":
            return planted_world(World(num_users=config.planted_users, seed=config.data_seed))
        if config.dataset == "movielens":
            return load_movielens(path)
        if config.dataset == "beeradvocate":
            return load_beeradvocate(path, percentile, config.beer_title)
        if config.dataset in ("csv", "jsonl", "recbole"):
            return load_own_log(
                path, config.dataset, config.columns, config.item_file, percentile, config.repeats
            )
        return {"amazon": load_amazon, "steam": load_steam, "lastfm": load_lastfm}[config.dataset](
            path, percentile
        )
    finally:
        gc.set_threshold(*usual)


def prepare(config: DataConfig, check: bool = True) -> Prepared:
    """The frozen examples of these options, written once under --prepared_dir and read from there ever after.

    Arrays stay in the file and are mapped into memory: processes share them, and touch only the rows they use. `check`
    compares them with their hash, which reads them all."""
    if config.dataset != "planted" and not config.data_dir:
        raise ValueError(
            f"--dataset {config.dataset} needs --data_dir, the folder or zip with its raw files"
        )
    options = {
        f.name: getattr(config, f.name)
        for f in fields(DataConfig)
        if f.name not in ("prepared_dir", "download")
    }
    if config.download and config.dataset == "movielens":
        download_movielens(Path(config.data_dir))
    options |= {"format": PREPARED_FORMAT, "source": _file_facts(config) if config.data_dir else []}
    folder = (
        Path(config.prepared_dir)
        / f"{config.dataset}-{_sha256(json.dumps(options, sort_keys=True).encode())[:12]}"
    )
    if not (folder / "meta.json").exists():
        if config.dataset == "prepared":
            log, splits = read_foreign_examples(config)
            counts = {"users": log.num_users, "items": log.num_items, "interactions": len(log.user)}
        else:
            log = load_log(config)
            counts = {"users": log.num_users, "items": log.num_items, "interactions": len(log.user)}
            log = k_core(log, config.core)
            splits = build_examples(log, config)
        _write_prepared(folder, log, splits, options, counts)
    return _read_prepared(folder, check)


def find_prepared(prepared_dir, content_hash: str) -> Prepared | None:
    """Prepared examples with this hash (or its beginning) below the folder, if there are any; the raw files are not asked for."""
    for meta in sorted(Path(prepared_dir).glob("*/meta.json")):
        if read_json(meta)["hash"].startswith(content_hash):
            return _read_prepared(meta.parent, check=False)
    return None


PREPARED_FORMAT = 2  # raised when the same options give other examples than before
LOG_ARRAYS = ("user", "item", "rating", "timestamp", "start")
LOG_TEXTS = ("titles", "user_ids", "item_ids")


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
)
COMPANIONS = ("meta_*", "steam_games*", "*.item")  # beside a raw file that was given by name


def _file_facts(config: DataConfig) -> list:
    """Names, sizes and times of the raw files: other files are prepared anew."""
    path = Path(config.data_dir)
    given = {path, Path(config.item_file)}
    beside = (
        path.rglob("*")
        if path.is_dir()
        else (f for pattern in COMPANIONS for f in path.parent.glob(pattern))
    )
    files = sorted(
        f for f in given | {f for f in beside if f.suffix in DATA_SUFFIXES} if f.is_file()
    )
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files[:1000]]


def _write_prepared(folder: Path, log: Interactions, splits, options: dict, counts: dict) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(
        tempfile.mkdtemp(prefix=folder.name, dir=folder.parent)
    )  # renamed into place when it is whole
    beside.chmod(0o755)
    arrays = {f"log.{name}": getattr(log, name) for name in LOG_ARRAYS}
    arrays |= {
        f"{split}.{name}": getattr(ex, name)
        for split, ex in splits.items()
        for name in Examples.ARRAYS
    }
    arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    texts = {name: getattr(log, name) for name in LOG_TEXTS}
    facts = _prompt_facts(log.name, splits["test"])
    meta = {
        "options": options,
        "hash": _content_hash(arrays, texts | facts),
        "raw_counts": counts,
        "notes": log.notes,
        **facts,
    }
    for name, values in texts.items():
        arrays |= Texts.arrays(name, values)
    try:
        with writing(beside):
            save_file(arrays, beside / "examples.safetensors")
            (beside / "meta.json").write_text(json.dumps(meta, indent=1))
        with contextlib.suppress(OSError):  # another process was faster
            beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _read_prepared(folder: Path, check: bool) -> Prepared:
    meta = read_json(folder / "meta.json")
    arrays = map_arrays(folder / "examples.safetensors")
    try:
        texts = {
            name: Texts(arrays.pop(f"{name}.bytes"), arrays.pop(f"{name}.ends"))
            for name in LOG_TEXTS
        }
        facts = {
            name: meta[name]
            for name in ("name", "history", "min_shown_rating", "ratings")
            if name in meta
        }
        shown = {name: facts[name] for name in ("min_shown_rating", "ratings") if name in facts}
        if (
            check
            and _content_hash(arrays, {n: list(t) for n, t in texts.items()} | facts)
            != meta["hash"]
        ):
            raise ValueError(
                f"{folder}: prepared examples do not match their hash; delete the folder"
            )
        log = Interactions(
            **{name: arrays[f"log.{name}"] for name in LOG_ARRAYS},
            **texts,
            name=meta["name"],
            notes=meta["notes"],
        )
        splits = {
            split: Examples(
                log,
                split,
                meta["history"],
                **{name: arrays[f"{split}.{name}"] for name in Examples.ARRAYS},
                **shown,
            )
            for split in ("train", "val", "test")
        }
    except (KeyError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{folder}: prepared examples are damaged ({error}); delete the folder"
        ) from None
    return Prepared(log, splits, meta["hash"], folder, meta["raw_counts"])


def _prompt_facts(name: str, examples: Examples) -> dict:
    """What shapes the prompts besides the arrays; what is as usual is not named, and leaves the hash as it was."""
    facts = {"name": name, "history": examples.history}
    usual = {"min_shown_rating": 0.0, "ratings": True}
    return facts | {
        key: getattr(examples, key)
        for key, value in usual.items()
        if getattr(examples, key) != value
    }


class Texts(Sequence):
    """Strings as one array of UTF-8 bytes and their ends, read when they are asked for: ten million are no objects."""

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
    """The arrays of a safetensors file, mapped into memory read-only; ValueError if it is damaged."""
    kinds = {"I64": np.int64, "I32": np.int32, "F32": np.float32, "U8": np.uint8, "BOOL": np.bool_}
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


@dataclass
class Encoded:
    """Tokenised examples: prompt ids, and completion ids per item of the log."""

    examples: Examples
    prompts: Sequence[np.ndarray]  # int32 ids
    completions: dict[int, list[int]]  # item code -> ids with EOS
    num_shortened: int = 0  # prompts that lost history items to fit max_length
    num_dropped: int = 0  # history items lost in all

    def slots(self, e: int, slots) -> list[list[int]]:
        """Completion ids of these candidates of example e."""
        return [self.completions[int(self.examples.candidates[e, s])] for s in slots]

    def tree(self, batch: list[int], slots) -> "PromptTree":
        """One PromptTree of the examples in `batch`, each with its row of `slots` (E, N) as completions."""
        return build_tree(
            [self.prompts[e] for e in batch], [self.slots(e, slots[e]) for e in batch]
        )


def encode_split(prepared: Prepared, split: str, tokenizer: Tokenizer, max_length: int) -> Encoded:
    """encode_examples, kept in the prepared folder: a run, its other ranks and the next run with this tokenizer read it."""
    examples = prepared.splits[split]
    facts = [
        ENCODED_FORMAT,
        prepared.hash,
        split,
        tokenizer.fingerprint,
        max_length,
        ALL_TEMPLATES,
        WITHOUT_RATINGS,
        WORDS,
    ]
    file = (
        prepared.folder / f"tokens-{split}-{_sha256(json.dumps(facts).encode())[:12]}.safetensors"
    )
    if file.exists():
        arrays = map_arrays(file)
        texts = zip(
            arrays["items"].tolist(),
            Ragged(arrays["completions"], arrays["completion_lengths"]),
            strict=True,
        )
        prompts = Ragged(arrays["prompts"], arrays["prompt_lengths"])
        return Encoded(
            examples,
            prompts,
            {item: ids.tolist() for item, ids in texts},
            *arrays["counts"].tolist(),
        )

    encoded = encode_examples(examples, tokenizer, max_length)
    completions = list(encoded.completions.values())
    arrays = {
        "items": np.array(list(encoded.completions), np.int32),
        "completions": np.concatenate(completions).astype(np.int32),
        "completion_lengths": np.array([len(ids) for ids in completions]),
        "prompts": np.concatenate(encoded.prompts),
        "prompt_lengths": np.array([len(ids) for ids in encoded.prompts]),
        "counts": np.array([encoded.num_shortened, encoded.num_dropped]),
    }
    beside = file.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(
        OSError, SafetensorError
    ):  # a read-only folder of prepared examples: go on without
        save_file(arrays, beside)
        beside.rename(file)
    return encoded


ENCODED_FORMAT = 2  # raised when the same examples and tokenizer give other tokens than before


class Ragged(Sequence):
    """Rows of different lengths in one array, cut when they are asked for."""

    def __init__(self, values: np.ndarray, lengths: np.ndarray):
        self.values, self.lengths, self.ends = values, lengths, np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        end = int(self.ends[i])
        return self.values[end - int(self.lengths[i]) : end]


def tree_widths(encoded: Encoded, slots: np.ndarray) -> np.ndarray:
    """(E, 2) tokens of each example's row with completions at `slots` (E, N): prompt, and all completions together."""
    inner = np.zeros(
        encoded.examples.log.num_items, np.int64
    )  # tokens that a title takes on the tree: EOS is no input
    inner[list(encoded.completions)] = [len(ids) - 1 for ids in encoded.completions.values()]
    items = np.take_along_axis(encoded.examples.candidates, np.asarray(slots), 1)
    prompts = encoded.prompts
    lengths = prompts.lengths if isinstance(prompts, Ragged) else [len(p) for p in prompts]
    return np.stack([lengths, inner[items].sum(1)], 1)


BOUNDARY_CHECKS = 256  # examples whose prompt and completion are also encoded as one text


def encode_examples(examples: Examples, tokenizer: Tokenizer, max_length: int) -> Encoded:
    """Render and tokenise once. Prompt and its longest completion must fit max_length; the oldest history goes first.

    ValueError names the example whose prompt is too long even without history, whose candidates tokenise alike, or
    whose prompt and completion tokenise differently together."""
    items = np.unique(examples.candidates).tolist()
    titles = tokenizer.encode_completions([examples.log.titles[i] for i in items])
    completions = dict(zip(items, titles, strict=True))
    prompts = tokenizer.encode_prompts([render_prompt(examples[e]) for e in range(len(examples))])
    encoded = Encoded(examples, prompts, completions)
    for e, prompt in enumerate(prompts):
        candidates, skip = encoded.slots(e, range(NUM_CANDIDATES)), 0
        if len(set(map(tuple, candidates))) < NUM_CANDIDATES:
            names = examples[e].candidates
            raise ValueError(
                f"user {examples[e].user}: two candidates have the same tokens, titles must differ: {names}"
            )
        room = max_length - max(map(len, candidates))
        while len(prompt) > room:
            skip += 1
            if skip >= len(examples.history_rows(e)):
                raise ValueError(
                    f"user {examples[e].user}: {len(prompt)} prompt tokens do not fit --max_length {max_length} even with a "
                    "history of one item; raise --max_length"
                )
            (prompt,) = tokenizer.encode_prompts([render_prompt(examples[e], skip)])
        encoded.num_shortened += skip > 0
        encoded.num_dropped += skip
        if e < BOUNDARY_CHECKS:
            text = render_prompt(examples[e], skip)
            title = examples[e].candidates[examples.target[e]]
            together = tokenizer.encode_answered([text], [title])[0]
            if prompt + candidates[examples.target[e]][:-1] != together:
                raise ValueError(
                    "prompt and completion tokenise differently together: "
                    f"...{f'{text} {title}'[-80:]!r}"
                )
        prompts[e] = np.array(
            prompt, np.int32
        )  # lists of Python integers take ten times the memory
    return encoded


if __name__ == "__main__":
    from studies.inspection import (
        inspect,  # it builds on this module, and on plots that need more packages
    )

    run_cli(inspect)
