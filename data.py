"""From an interaction log to batches: splits, frozen candidates, prompts, token ids, and the PromptTree.

One real prompt (MovieLens-1M, shortened), and one of its completions:

    A user watched these movies, oldest first, and rated each from 1 to 5:
    Girl, Interrupted | Rating: 4
    Titanic (1997) | Rating: 5
    Which of the following movies will the user watch next and like?
    The Matrix
    Back to the Future
    Answer:                                 the completion is " Back to the Future" + EOS

Every prefix of a user's log is a possible example: the history is what lies before a position, the candidates are
what follows it plus random items the user never touched. A user's last interaction is the test case, the one before it
validation, all earlier ones training. Candidates, negatives and templates are drawn once, hashed, and shared by every
model that is compared. A prompt that is too long loses its oldest history items, never tokens.

    python data.py --dataset movielens --data_dir ml-1m.zip       statistics and one example with its token boundaries

Left out: rating prediction, cold-start items, side features. Legend: E examples, B examples of a batch, N completions
per example, P prompt width, C completion width, T = P + C, M scored tokens.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor

from common import arg, parse_config, read_json, run_cli
from loaders import Interactions, download_movielens, k_core, load_movielens
from planted import World, planted_world
from tokenizer import Tokenizer

NUM_CANDIDATES = 20


@dataclass(frozen=True)
class DataConfig:
    """Turn a raw interaction log into frozen examples; print its statistics and one rendered example."""

    dataset: str = arg("planted", "planted (made on the spot, its optimum known) or movielens (MovieLens-1M)", group="data")
    data_dir: str = arg("", "folder or zip with the raw files")
    download: bool = arg(False, "fetch MovieLens-1M to data_dir first, and check its checksum")
    planted_users: int = arg(4000, "users of the planted world")
    core: int = arg(0, "keep users and items with at least this many interactions (iterated k-core); 0 = all")
    train_size: int = arg(10000, "training examples, drawn from all prefixes; 0 = all")
    test_size: int = arg(0, "validation and test users each, drawn from all; 0 = all")
    history: int = arg(20, "most recent interactions shown in a prompt")
    min_history: int = arg(5, "interactions that must lie before an example")
    followers: int = arg(10, "later interactions among the training candidates; random items fill up to 20")
    positive: str = arg("argmax", "chosen training item: argmax of the preference score, or the first one liked")
    min_rating: float = arg(4.0, "lowest rating of a liked item")
    decay: float = arg(0.5, "preference score = rating / (1 + steps)^decay")
    neg_rating: float = arg(3.0, "rating given to random candidates")
    neg_step: int = arg(10, "steps given to random candidates")
    exclude: str = arg("all", "random candidates exclude all items of the user, or only those seen in the prompt")
    negatives: str = arg("uniform", "random candidates are drawn uniform or by popularity")
    num_templates: int = arg(0, "prompt templates in use; 0 = all")
    data_seed: int = arg(0, "seed of candidates, negatives, order and templates")
    prepared_dir: str = arg("prepared", "where prepared examples are kept")

    def __post_init__(self):
        choices = {
            "dataset": ("planted", "movielens"),
            "positive": ("argmax", "first"),
            "exclude": ("all", "seen"),
            "negatives": ("uniform", "popularity"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not 1 <= self.followers < NUM_CANDIDATES:
            raise ValueError(f"--followers must be between 1 and {NUM_CANDIDATES - 1}, got {self.followers}")
        if not 1 <= self.min_history <= self.history:
            raise ValueError(f"--min_history must be between 1 and --history {self.history}, got {self.min_history}")
        for name in ("core", "train_size", "test_size", "num_templates", "neg_step"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must be >= 0, got {getattr(self, name)}")
        if self.num_templates > len(TEMPLATES):
            raise ValueError(f"--num_templates must be at most {len(TEMPLATES)}, got {self.num_templates}")


# ------------------------------------------------------------------------------------------------ examples
@dataclass
class Example:
    """One example, readable: what the prompt shows, and what is known about its candidates."""

    dataset: str  # chooses the words of the prompt
    user: str
    history: list[tuple[str, float]]  # (title, rating), oldest first
    candidates: list[str]
    target: int  # index of the chosen candidate
    scores: list[float]  # preference score of each candidate
    template: int


@dataclass
class Examples:
    """A split with frozen candidates. Example e predicts what follows row position[e] - 1 of the log."""

    log: Interactions
    split: str
    history: int  # interactions shown
    position: np.ndarray  # (E,) int64
    candidates: np.ndarray  # (E, 20) int32 item codes
    target: np.ndarray  # (E,) int32 slot of the chosen item
    scores: np.ndarray  # (E, 20) float32
    is_random: np.ndarray  # (E, 20) bool
    others: np.ndarray  # (E, 19) int32: the other slots in random order; negatives are its first K
    template: np.ndarray  # (E,) int32

    ARRAYS = ("position", "candidates", "target", "scores", "is_random", "others", "template")

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, e: int) -> Example:
        log, rows = self.log, self.history_rows(e)
        return Example(
            dataset=log.name,
            user=log.user_ids[log.user[self.position[e]]],
            history=[(log.titles[log.item[r]], float(log.rating[r])) for r in rows],
            candidates=[log.titles[c] for c in self.candidates[e]],
            target=int(self.target[e]),
            scores=self.scores[e].tolist(),
            template=int(self.template[e]),
        )

    def history_rows(self, e: int) -> range:
        p = int(self.position[e])
        return range(max(int(self.log.start[self.log.user[p]]), p - self.history), p)

    def select(self, indices) -> "Examples":
        arrays = {name: getattr(self, name)[indices] for name in self.ARRAYS}
        return Examples(self.log, self.split, self.history, **arrays)

    def negatives(self, num_negatives: int, source: str = "both") -> np.ndarray:
        """(E, K) slots of the rejected items: the first K others, or the first K that are random / that follow."""
        if source not in ("both", "random", "follow"):
            raise ValueError(f"negatives come from both, random or follow, not {source!r}")
        if source == "both":
            allowed = np.ones_like(self.others, bool)
        else:
            allowed = np.take_along_axis(self.is_random, self.others, 1) == (source == "random")
        if allowed.sum(1).min(initial=num_negatives) < num_negatives:
            raise ValueError(f"--num_negatives {num_negatives}: an example has only {allowed.sum(1).min()} ({source})")
        first = np.argsort(~allowed, axis=1, kind="stable")[:, :num_negatives]
        return np.take_along_axis(self.others, first, 1)


def build_examples(log: Interactions, config: DataConfig | None = None) -> dict[str, Examples]:
    """All three splits, {"train", "val", "test"} -> Examples, from one seeded generator per split.

    Raises ValueError if a split is empty or a user has touched so much that random candidates run out."""
    config = config or DataConfig()
    first, last = log.start[:-1], log.start[1:]
    position = np.arange(len(log.user))
    age = position - first[log.user]  # interactions before this one
    room = last[log.user] - position  # interactions from this one on
    candidates = {
        # followers must end before the user's last two interactions, which belong to validation and test
        "train": position[(age >= config.min_history) & (room >= config.followers + 2)],
        "val": position[(age >= config.min_history) & (room == 2) & (log.rating >= config.min_rating)],
        "test": position[(age >= config.min_history) & (room == 1) & (log.rating >= config.min_rating)],
    }
    keys = np.sort(log.user.astype(np.int64) * log.num_items + log.item)
    splits = {}
    for number, (split, rows) in enumerate(candidates.items()):
        rng = np.random.default_rng([config.data_seed, number])
        if split == "train":
            steps = np.arange(config.followers)
            rows = rows[_chosen_follower(log, rows, config)[1]]
            size = config.train_size
        else:
            steps = np.arange(1)
            size = config.test_size
        rows = rng.permutation(rows)
        rows = rows[:size] if size else rows
        if len(rows) == 0:
            raise ValueError(
                f"no {split} example: needs users with {config.min_history} interactions before and "
                f"{config.followers + 2} after a point, and a liked item; lower --min_history or --followers"
            )
        splits[split] = _freeze(log, split, rows, steps, keys, config, rng)
    return splits


def _chosen_follower(log: Interactions, rows: np.ndarray, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Which follower is chosen (E,), and whether the example counts (E,): its chosen item must be a liked one."""
    ratings = log.rating[rows[:, None] + np.arange(config.followers)]
    if config.positive == "first":
        liked = ratings >= config.min_rating
        return liked.argmax(1), liked.any(1)
    scores = ratings / (1 + np.arange(config.followers)) ** config.decay
    chosen = scores.argmax(1)  # the first of equal ones: the sooner
    best = np.take_along_axis(scores, chosen[:, None], 1)[:, 0]
    beats_random = best > config.neg_rating / (1 + config.neg_step) ** config.decay
    return chosen, beats_random & (np.take_along_axis(ratings, chosen[:, None], 1)[:, 0] >= config.min_rating)


def _freeze(log, split, rows, steps, keys, config: DataConfig, rng) -> Examples:
    """Draw the random candidates, score and shuffle all 20, and draw the order of negatives and the template."""
    E, F = len(rows), len(steps)
    follow = rows[:, None] + steps  # (E, F) rows of the log
    seen_rows = np.maximum(rows[:, None] - 1 - np.arange(config.history), log.start[log.user[rows]][:, None])
    seen = np.concatenate([log.item[seen_rows], log.item[follow]], 1) if config.exclude == "seen" else None
    randoms = _draw_unseen(log, log.user[rows], NUM_CANDIDATES - F, keys, seen, config.negatives, rng)
    items = np.concatenate([log.item[follow], randoms], 1).astype(np.int32)
    ratings = np.concatenate([log.rating[follow], np.full(randoms.shape, config.neg_rating)], 1)
    delays = np.concatenate([np.tile(steps, (E, 1)), np.full(randoms.shape, config.neg_step)], 1)
    scores = (ratings / (1 + delays) ** config.decay).astype(np.float32)
    chosen = _chosen_follower(log, rows, config)[0] if split == "train" else np.zeros(E, np.int64)

    order = rng.permuted(np.tile(np.arange(NUM_CANDIDATES), (E, 1)), axis=1)  # shown slot -> drawn slot
    target = (order == chosen[:, None]).argmax(1)
    slots = np.tile(np.arange(NUM_CANDIDATES), (E, 1))
    others = rng.permuted(slots[slots != target[:, None]].reshape(E, -1), axis=1)
    return Examples(
        log,
        split,
        config.history,
        rows.astype(np.int64),
        np.take_along_axis(items, order, 1),
        target.astype(np.int32),
        np.take_along_axis(scores, order, 1),
        order >= F,
        others.astype(np.int32),
        rng.integers(config.num_templates or len(TEMPLATES), size=E).astype(np.int32),
    )


def _draw_unseen(log, users, count: int, keys, seen, kind: str, rng) -> np.ndarray:
    """(E, count) distinct items per row that the user never touched (or, with `seen`, that are not in that row of it)."""
    drawn = np.full((len(users), count), -1, np.int64)
    open_cells = np.ones(drawn.shape, bool)
    for _ in range(50):
        n = int(open_cells.sum())
        if n == 0:
            return drawn
        drawn[open_cells] = rng.integers(log.num_items, size=n) if kind == "uniform" else rng.choice(log.item, size=n)
        row, _ = np.nonzero(open_cells)
        if seen is None:
            key = users[row].astype(np.int64) * log.num_items + drawn[open_cells]
            at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            bad = keys[at] == key
        else:
            bad = (seen[row] == drawn[open_cells][:, None]).any(1)
        repeated = np.zeros(drawn.shape, bool)  # equal to an earlier cell of the same row
        by_value = np.argsort(drawn, axis=1, kind="stable")
        ordered = np.take_along_axis(drawn, by_value, 1)
        np.put_along_axis(repeated[:, :], by_value[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
        again = repeated.copy()
        again[open_cells] |= bad
        open_cells = again
    weights = np.ones(log.num_items) if kind == "uniform" else np.bincount(log.item, minlength=log.num_items).astype(float)
    for e in np.flatnonzero(open_cells.any(1)):  # chance finds the last few of them too slowly: take from what is left
        touched = log.item[log.start[users[e]] : log.start[users[e] + 1]] if seen is None else seen[e]
        left = np.setdiff1d(np.arange(log.num_items), touched)
        if len(left) < count:
            user, what = log.user_ids[users[e]], "this user never touched" if seen is None else "are not in the prompt"
            raise ValueError(f"user {user}: fewer than {count} items left that {what} ({log.num_items} in all)")
        drawn[e] = rng.choice(left, size=count, replace=False, p=weights[left] / weights[left].sum())
    return drawn


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
    if config.dataset == "planted":
        return planted_world(World(num_users=config.planted_users, seed=config.data_seed))
    return load_movielens(config.data_dir)


def prepare(config: DataConfig) -> Prepared:
    """The frozen examples of these options, written once under --prepared_dir and read from there ever after."""
    if config.dataset != "planted" and not config.data_dir:
        raise ValueError(f"--dataset {config.dataset} needs --data_dir, the folder or zip with its raw files")
    options = {f.name: getattr(config, f.name) for f in fields(DataConfig) if f.name not in ("prepared_dir", "download")}
    if config.download and config.dataset == "movielens":
        download_movielens(Path(config.data_dir))
    options |= {"format": PREPARED_FORMAT, "source": _file_facts(Path(config.data_dir)) if config.data_dir else []}
    folder = Path(config.prepared_dir) / f"{config.dataset}-{_sha256(json.dumps(options, sort_keys=True).encode())[:12]}"
    if not (folder / "meta.json").exists():
        log = load_log(config)
        counts = {"users": log.num_users, "items": log.num_items, "interactions": len(log.user)}
        log = k_core(log, config.core)
        _write_prepared(folder, log, build_examples(log, config), options, counts)
    return _read_prepared(folder)


PREPARED_FORMAT = 1  # raised when the same options give other examples than before
LOG_ARRAYS = ("user", "item", "rating", "timestamp", "start")


def _file_facts(path: Path) -> list:
    """Names, sizes and times of the raw files: other files are prepared anew."""
    files = sorted(path.rglob("*.*")) if path.is_dir() else [path]
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.suffix in (".dat", ".zip") and f.is_file()]


def _write_prepared(folder: Path, log: Interactions, splits, options: dict, counts: dict) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))  # renamed into place when it is whole
    beside.chmod(0o755)
    arrays = {f"log.{name}": getattr(log, name) for name in LOG_ARRAYS}
    arrays |= {f"{split}.{name}": getattr(ex, name) for split, ex in splits.items() for name in Examples.ARRAYS}
    arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    texts = {"titles": log.titles, "user_ids": log.user_ids, "item_ids": log.item_ids, "name": log.name}
    texts["history"] = splits["test"].history  # it shapes the prompts, too
    meta = {"options": options, "hash": _content_hash(arrays, texts), "raw_counts": counts, **texts}
    try:
        save_file(arrays, beside / "examples.safetensors")
        (beside / "meta.json").write_text(json.dumps(meta))
        with contextlib.suppress(OSError):  # another process was faster
            beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _read_prepared(folder: Path) -> Prepared:
    meta = read_json(folder / "meta.json")
    try:
        arrays = load_file(folder / "examples.safetensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: prepared examples are damaged ({error}); delete the folder") from None
    texts = {key: meta.get(key) for key in ("titles", "user_ids", "item_ids", "name", "history")}
    if _content_hash(arrays, texts) != meta.get("hash"):
        raise ValueError(f"{folder}: prepared examples do not match their hash; delete the folder")
    history = texts.pop("history")
    log = Interactions(**{name: arrays[f"log.{name}"] for name in LOG_ARRAYS}, **texts)
    splits = {
        split: Examples(log, split, history, **{name: arrays[f"{split}.{name}"] for name in Examples.ARRAYS})
        for split in ("train", "val", "test")
    }
    return Prepared(log, splits, meta["hash"], folder, meta["raw_counts"])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _content_hash(arrays: dict[str, np.ndarray], texts: dict) -> str:
    parts = [f"{name} {a.dtype} {a.shape} {_sha256(a.tobytes())}" for name, a in sorted(arrays.items())]
    return _sha256("\n".join([*parts, json.dumps(texts, sort_keys=True)]).encode())


# ------------------------------------------------------------------------------------------------ prompts
WORDS = {"movielens": ("movies", "watched", "watch"), "planted": ("stories", "read", "read")}
TEMPLATES = (
    "A user {did} these {things}, oldest first, and rated each from 1 to 5:\n{history}\n"
    "Which of the following {things} will the user {do} next and like?\n{candidates}\nAnswer:",
    "Ratings from 1 to 5 that one person gave to {things}, in order of time:\n{history}\n"
    "Choose the one this person will {do} next and rate highly:\n{candidates}\nAnswer:",
    "Recent {things} of a user, with ratings (5 is best):\n{history}\n"
    "From this list, recommend what the user should {do} next:\n{candidates}\nAnswer:",
    "Below is what someone {did} and how they rated it, the latest last.\n{history}\n"
    "One of these {things} comes next and will please them. Name it.\n{candidates}\nAnswer:",
    "History of a user ({things} and ratings, 1 = disliked, 5 = loved):\n{history}\n"
    "Predict the next one the user will {do} and enjoy, given these candidates:\n{candidates}\nAnswer:",
)


def render_prompt(example: Example, skip: int = 0) -> str:
    """The prompt text without its `skip` oldest history items. It ends in "Answer:", the completion begins with a space."""
    things, did, do = WORDS.get(example.dataset, ("items", "chose", "choose"))
    history = "\n".join(f"{title} | Rating: {rating:g}" for title, rating in example.history[skip:])
    candidates = "\n".join(example.candidates)
    return TEMPLATES[example.template].format(things=things, did=did, do=do, history=history, candidates=candidates)


@dataclass
class Encoded:
    """Tokenised examples: prompt ids, and completion ids per item of the log."""

    examples: Examples
    prompts: list[np.ndarray]  # int32 ids
    completions: dict[int, list[int]]  # item code -> ids with EOS
    num_shortened: int = 0  # prompts that lost history items to fit max_length
    num_dropped: int = 0  # history items lost in all

    def slots(self, e: int, slots) -> list[list[int]]:
        """Completion ids of these candidates of example e."""
        return [self.completions[int(self.examples.candidates[e, s])] for s in slots]

    def tree(self, batch: list[int], slots) -> "PromptTree":
        """One PromptTree of the examples in `batch`, each with its row of `slots` (E, N) as completions."""
        return build_tree([self.prompts[e] for e in batch], [self.slots(e, slots[e]) for e in batch])


def encode_split(prepared: Prepared, split: str, tokenizer: Tokenizer, max_length: int) -> Encoded:
    """encode_examples, kept in the prepared folder: a run, its other ranks and the next run with this tokenizer read it."""
    examples = prepared.splits[split]
    facts = [ENCODED_FORMAT, prepared.hash, split, tokenizer.fingerprint, max_length, TEMPLATES, WORDS]
    file = prepared.folder / f"tokens-{split}-{_sha256(json.dumps(facts).encode())[:12]}.safetensors"
    if file.exists():
        try:
            with safe_open(file, framework="numpy") as f:
                arrays, counts = {name: f.get_tensor(name) for name in f.keys()}, json.loads(f.metadata()["counts"])
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: cached tokens are damaged ({error}); delete the file") from None
        texts = zip(arrays["items"].tolist(), _cut(arrays["completions"], arrays["completion_lengths"]), strict=True)
        prompts = _cut(arrays["prompts"], arrays["prompt_lengths"])
        return Encoded(examples, prompts, {item: ids.tolist() for item, ids in texts}, *counts)

    encoded = encode_examples(examples, tokenizer, max_length)
    completions = list(encoded.completions.values())
    arrays = {
        "items": np.array(list(encoded.completions), np.int32),
        "completions": np.concatenate(completions).astype(np.int32),
        "completion_lengths": np.array([len(ids) for ids in completions]),
        "prompts": np.concatenate(encoded.prompts),
        "prompt_lengths": np.array([len(ids) for ids in encoded.prompts]),
    }
    beside = file.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError, SafetensorError):  # a read-only folder of prepared examples: go on without
        save_file(arrays, beside, {"counts": json.dumps([encoded.num_shortened, encoded.num_dropped])})
        beside.rename(file)
    return encoded


ENCODED_FORMAT = 1  # raised when the same examples and tokenizer give other tokens than before


def _cut(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(ids, np.cumsum(lengths)[:-1])


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
            raise ValueError(f"user {examples[e].user}: two candidates have the same tokens, titles must differ: {names}")
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
            text = f"{render_prompt(examples[e], skip)} {examples[e].candidates[examples.target[e]]}"
            if prompt + candidates[examples.target[e]][:-1] != tokenizer.encode_prompts([text])[0]:
                raise ValueError(f"prompt and completion tokenise differently together: ...{text[-80:]!r}")
        prompts[e] = np.array(prompt, np.int32)  # lists of Python integers take ten times the memory
    return encoded


# ------------------------------------------------------------------------------------------------ the tree
@dataclass
class PromptTree:
    """A batch of prompts with N completions each: one row per prompt, its completions behind it, right-padded."""

    input_ids: Tensor  # (B, P + C) int64
    position_ids: Tensor  # (B, P + C) int64; completions go on from the prompt's true length
    branch_ids: Tensor  # (B, P + C) int64: 0 prompt, 1..N completion, -1 padding
    rows: Tensor  # (M,) flat index of the hidden state that predicts the token
    labels: Tensor  # (M,) the token
    sequence_ids: Tensor  # (M,) b * N + n
    prompt_width: int
    num_completions: int

    def to(self, device) -> "PromptTree":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return PromptTree(**{k: to_device(v, device) if isinstance(v, Tensor) else v for k, v in moved.items()})

    def sum_logps(self, token_logps: Tensor) -> Tensor:
        """(M,) token log-probs -> (B, N) sums per completion."""
        sums = token_logps.new_zeros(len(self.input_ids) * self.num_completions)
        return sums.index_add(0, self.sequence_ids, token_logps).view(-1, self.num_completions)


def build_tree(prompts: list, completions: list[list[list[int]]]) -> PromptTree:
    """B prompts (lists or arrays of ids) and, per prompt, N completions that each end in EOS.

    ValueError if N differs or anything is empty.
    All of a completion is scored, but its EOS is a label only: n ids occupy n - 1 positions. The last prompt token
    predicts the first token of every completion."""
    if not prompts or len(prompts) != len(completions):
        raise ValueError(f"expected one list of completions per prompt, got {len(completions)} for {len(prompts)} prompts")
    N = len(completions[0])
    if N == 0 or any(len(group) != N for group in completions):
        raise ValueError(f"every prompt needs the same number of completions, at least 1; got {[len(g) for g in completions]}")
    if any(len(p) == 0 for p in prompts) or any(len(c) == 0 for group in completions for c in group):
        raise ValueError("empty prompt or completion: a prompt needs a token, a completion at least its EOS")
    B, P = len(prompts), max(map(len, prompts))
    C = max(sum(len(c) - 1 for c in group) for group in completions)
    input_ids = np.zeros((B, P + C), np.int64)
    position_ids = np.zeros((B, P + C), np.int64)
    branch_ids = np.full((B, P + C), -1, np.int64)
    rows, labels, sequence_ids = [], [], []
    for b, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        length = len(prompt)
        input_ids[b, :length] = prompt
        position_ids[b, :length] = np.arange(length)
        branch_ids[b, :length] = 0
        at = P
        for n, completion in enumerate(group):
            inner = len(completion) - 1
            input_ids[b, at : at + inner] = completion[:-1]
            position_ids[b, at : at + inner] = np.arange(length, length + inner)
            branch_ids[b, at : at + inner] = n + 1
            rows += [b * (P + C) + length - 1, *range(b * (P + C) + at, b * (P + C) + at + inner)]
            labels += completion
            sequence_ids += [b * N + n] * len(completion)
            at += inner
    tensors = (input_ids, position_ids, branch_ids, np.array(rows), np.array(labels), np.array(sequence_ids))
    return PromptTree(*map(torch.from_numpy, tensors), prompt_width=P, num_completions=N)


def to_device(tensor: Tensor, device) -> Tensor:
    """Copy to the device without waiting for it: from pageable memory the host would wait until the GPU is idle."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def tree_widths(encoded: Encoded, slots: np.ndarray) -> np.ndarray:
    """(E, 2) tokens of each example's row with completions at `slots` (E, N): prompt, and all completions together."""
    inner = np.zeros(encoded.examples.log.num_items, np.int64)  # tokens that a title takes on the tree: EOS is no input
    inner[list(encoded.completions)] = [len(ids) - 1 for ids in encoded.completions.values()]
    items = np.take_along_axis(encoded.examples.candidates, np.asarray(slots), 1)
    return np.stack([[len(p) for p in encoded.prompts], inner[items].sum(1)], 1)


def micro_batches(widths, indices, num_ranks: int, budget: int) -> list[list[list[int]]]:
    """Divide one global batch: per rank a list of micro-batches of examples with similar widths; `widths` as tree_widths.

    Sorted by width and dealt out in turn, so that ranks carry equal loads. A micro-batch holds one example, or as many as
    stay within `budget` tokens, padding included. All ranks get the same number of micro-batches; the missing ones are
    empty lists."""
    ordered = sorted((int(i) for i in indices), key=lambda i: (-sum(widths[i]), i))
    ranks = []
    for rank in range(num_ranks):
        batches: list[list[int]] = []
        P = C = 0  # widths of the last batch's widest prompt and completions
        for i in ordered[rank::num_ranks]:
            p, c = widths[i]
            if not batches or (max(P, p) + max(C, c)) * (len(batches[-1]) + 1) > budget:
                batches.append([])
                P = C = 0
            batches[-1].append(i)
            P, C = max(P, p), max(C, c)
        ranks.append(batches)
    most = max(map(len, ranks))
    return [batches + [[] for _ in range(most - len(batches))] for batches in ranks]


def prefetch(make: Callable, items: Iterable) -> Iterator:
    """make(item) for each item, in order, the next one made in the background while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        made = deque()
        for item in items:
            made.append(pool.submit(make, item))
            if len(made) > 1:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()


# ------------------------------------------------------------------------------------------------ statistics
PAPER_TABLE_3 = {"movielens": (6040, 3952, 994169)}  # users, items, interactions


@dataclass(frozen=True)
class InspectConfig(DataConfig):
    """Prepare examples, print the data's statistics and one rendered example with its token boundaries."""

    tokenizer: str = arg("", "directory whose tokenizer cuts the shown example; empty = one made from this data", group="show")
    max_length: int = arg(1024, "tokens of prompt and longest candidate, for the count of shortened prompts")
    show: int = arg(0, "index of the training example that is shown")


def main() -> None:
    config = parse_config(InspectConfig)
    prepared = prepare(config)
    log, raw = prepared.log, prepared.raw_counts
    lengths, shares = np.diff(log.start), np.bincount(log.rating.astype(int), minlength=6)[1:] / len(log.rating)
    print(f"{config.dataset}: prepared in {prepared.folder}, hash {prepared.hash[:16]}\n")
    print("|  | users | items | interactions |\n|---|---|---|---|")
    print(f"| raw | {raw['users']:,} | {raw['items']:,} | {raw['interactions']:,} |")
    print(f"| after --core {config.core} | {log.num_users:,} | {log.num_items:,} | {len(log.user):,} |")
    if config.dataset in PAPER_TABLE_3:
        print("| paper, Table 3 | {:,} | {:,} | {:,} |".format(*PAPER_TABLE_3[config.dataset]))
        print("\nThe paper's row is the unfiltered data less one interaction per user (1,000,209 - 6,040 = 994,169), with")
        print("the largest movie id for items; a 20-core (--core 20) would leave 6,022 users and 995,154 interactions.")
    print("\nratings 1 to 5: " + ", ".join(f"{share:.1%}" for share in shares))
    print("interactions per user: " + ", ".join(f"{q}% {np.percentile(lengths, q):.0f}" for q in (0, 25, 50, 75, 100)))
    for split, examples in prepared.splits.items():
        users = len(np.unique(log.user[examples.position]))
        short = (
            f" (all there are; --train_size {config.train_size})"
            if split == "train" and len(examples) < config.train_size
            else ""
        )
        print(f"{split}: {len(examples):,} examples of {users:,} users{short}")
    examples = prepared.splits["train"]
    if not 0 <= config.show < len(examples):
        raise ValueError(f"--show must be between 0 and {len(examples) - 1}, got {config.show}")
    example = examples[config.show]
    print(f"\ntraining example {config.show}, user {example.user}:\n\n{render_prompt(example)}")
    print(f"\nchosen:   {example.candidates[example.target]!r}, score {example.scores[example.target]:.3f}")
    for slot in examples.negatives(3)[config.show]:
        margin = example.scores[example.target] / example.scores[slot]
        kind = "random" if examples.is_random[config.show, slot] else "follows"
        print(f"rejected: {example.candidates[slot]!r}, score {example.scores[slot]:.3f} ({kind}), target margin {margin:.2f}")
    with tempfile.TemporaryDirectory() as scratch:
        if not config.tokenizer:
            from tiny import make_base_model  # it builds on this module

            make_base_model(scratch, examples, hidden_size=64, num_layers=1, vocab_size=4096, seed=0)
        tokenizer = Tokenizer(config.tokenizer or scratch)
    encoded = encode_examples(examples, tokenizer, config.max_length)
    lengths = [len(ids) for ids in encoded.prompts]
    print("\nprompt tokens: " + ", ".join(f"{q}% {np.percentile(lengths, q):.0f}" for q in (0, 50, 99, 100)))
    print(
        f"prompts shortened to --max_length {config.max_length}: {encoded.num_shortened} ({encoded.num_dropped} history items)"
    )
    (completion,) = encoded.slots(config.show, [example.target])
    prompt = encoded.prompts[config.show].tolist()
    shown = [[repr(tokenizer.inner.decode([i], skip_special_tokens=False)) for i in ids] for ids in (prompt[-3:], completion)]
    print(f"boundary: ... {' '.join(shown[0])} || {' '.join(shown[1])}   (|| ends the prompt; all behind it is scored)")


if __name__ == "__main__":
    run_cli(main)
