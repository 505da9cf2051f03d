"""Recommendations for every user of a log: a cheap recommender retrieves, the model ranks.

    python recommend.py --run DIR --request my.json                      one user, printed
    python recommend.py --run DIR --users all --output recs.jsonl         all users of the run's log
    python recommend.py --run DIR --users users.txt --output recs.jsonl   ids of users, one a line
    python recommend.py --run DIR --users new.jsonl --output recs.jsonl   histories of new users

A new user is a line {"user": "u1", "history": [{"title": "...", "rating": 4}, ...]}, oldest first;
"item" with an id of the log may stand for "title". With "candidates": ["title or item id", ...,
{"title": "A new item"}] these are ranked, and nothing is retrieved; a title that the log does not
hold is ranked like any other.

Per user: the newest --history interactions are shown, --retriever (fitted on all interactions;
SASRec on all but each user's last two) gives the NUM_CANDIDATES best items that the user has not
touched, in an order drawn from the user's id, and one pass of the model ranks them. A line of
--output: {"user": ..., "items": [{"item": ..., "title": ..., "probability": ..., "retrieved":
rank}]}. Probabilities are shares of this list; "retrieved" is null for given candidates.

Users are divided over the ranks of torchrun. A rank writes each finished micro-batch to its own
`<output>.part-<rank>`; the same command goes on where these parts end, and rank 0 at last merges
them in the order of the users.

Left out: what several users are told together (diversity, stock), and other templates than the
first. Legend: N candidates.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common import (
    arg,
    changed_options,
    first,
    hours,
    is_main,
    parse_config,
    print0,
    run_cli,
    setup_distributed,
    writing,
)
from data import NUM_CANDIDATES, Interactions
from loaders.counting import Retriever
from loaders.frozen import prepare
from loaders.table import clean_title
from runtime.passes import any_rank, prefetch, progress
from runtime.sources import SourceConfig, check_run_data, load_source, sources_of, with_run_options
from studies.ranking import ListRanker, ShownList, shown_order
from studies.request import ranked_request
from studies.retrievers import fit_retriever


@dataclass(frozen=True)
class RecommendConfig(SourceConfig):
    """Rank the candidates of one user, or write recommendations for many."""

    request: str = arg("", "JSON file of one user, with candidates", group="what is asked")
    users: str = arg(
        "", "all users of the log, a .txt file of their ids, or a .jsonl file of new users"
    )
    retriever: str = arg(
        "markov",
        "where the candidates of many users come from",
        choices=("markov", "item-knn", "popularity", "sasrec"),
    )
    top_k: int = arg(10, "items for each of many users", at_least=1)
    output: str = arg("", "the .jsonl file of many users; a restart goes on with it")
    micro_batch_tokens: int = arg(8192, "padded tokens of one forward pass", at_least=1)

    def __post_init__(self):
        super().__post_init__()
        if bool(self.request) == bool(self.users):
            raise ValueError("give either --request, or --users")
        given = changed_options(self) & {"retriever", "top_k", "output"}
        if given and self.request:
            names = ", ".join(f"--{name}" for name in sorted(given))
            raise ValueError(f"{names}: for --users only")


CHUNK = 256  # users that are retrieved and tokenised together, while others are ranked


@dataclass
class Candidate:
    item: str | None  # id; None: not given for an item that the log does not hold
    title: str
    retrieved: int | None = None  # the retriever's rank, from 1


@dataclass
class Profile:
    """What is known of one user."""

    user: str
    titles: list[str]  # oldest first; their newest are shown
    ratings: list[float]
    items: np.ndarray  # codes of those that the log holds, newest last
    candidates: list[Candidate] = field(default_factory=list)  # given ones


# -------------------------------------------------------------------------------------------- users
class LogUsers(Sequence):
    """Users of the log, all or those named in a file."""

    def __init__(self, interactions: Interactions, codes: np.ndarray):
        self.interactions, self.codes = interactions, codes

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, i: int) -> Profile:
        interactions, user = self.interactions, int(self.codes[i])
        rows = slice(int(interactions.start[user]), int(interactions.start[user + 1]))
        items = interactions.item[rows].astype(np.int64)
        titles = [interactions.titles[c] for c in items]
        return Profile(
            interactions.user_ids[user], titles, interactions.rating[rows].tolist(), items
        )


def named_users(file: Path, interactions: Interactions) -> LogUsers:
    """The users whose ids stand in a text file, one a line; blank lines do not count."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error})") from None
    wanted = {line.strip(): number for number, line in enumerate(lines, 1) if line.strip()}
    if not wanted:
        raise ValueError(f"{file}: expected ids of users, one a line; it has none")
    codes = {user: code for code, user in enumerate(interactions.user_ids) if user in wanted}
    for user, number in wanted.items():
        if user not in codes:
            some = ", ".join(
                str(interactions.user_ids[i]) for i in range(min(3, interactions.num_users))
            )
            raise ValueError(
                f"{file}:{number}: user {user!r} is not in the log (its ids look like {some}); "
                "a new user needs a .jsonl file with a history"
            )
    return LogUsers(interactions, np.array([codes[user] for user in wanted]))


class NewUsers(Sequence):
    """Users of a JSON-lines file, read again when they are asked for; all are checked first."""

    SHAPE = '{"user": "...", "history": [{"title": "...", "rating": 4}, ...]}'

    def __init__(self, file: Path, interactions: Interactions, config: RecommendConfig):
        self.file, self.interactions, self.config = file, interactions, config
        self.by_title = {title: code for code, title in enumerate(interactions.titles)}
        self.by_id = {item: code for code, item in enumerate(interactions.item_ids)}
        self.offsets, self.numbers = [], []
        seen, at = {}, 0
        with open(file, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    user = self.parse(line, number).user
                    if user in seen:
                        self.fail(number, f"user {user!r} stands in line {seen[user]} already")
                    seen[user] = number
                    self.offsets.append(at)
                    self.numbers.append(number)
                at += len(line)
        if not self.offsets:
            raise ValueError(f"{file}: no line with a user; expected {self.SHAPE}")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> Profile:
        with open(self.file, "rb") as f:
            f.seek(self.offsets[i])
            return self.parse(f.readline(), self.numbers[i])

    def fail(self, number: int, problem: str):
        raise ValueError(f"{self.file}:{number}: {problem}")

    def parse(self, line: bytes, number: int) -> Profile:
        try:
            entry = json.loads(line)
            user, history = entry["user"], entry["history"]
            candidates = entry.get("candidates", [])
            fits = isinstance(history, list) and isinstance(candidates, list)
            fits = fits and type(user) in (str, int)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            fits = False
        if not fits:
            self.fail(number, f"expected {self.SHAPE}")
        user = str(user).encode("utf-8", "replace").decode()  # half a surrogate pair
        read = [self.interaction(h, number) for h in history]
        known = [code for code, _, _ in read if code is not None]
        profile = Profile(
            user,
            [title for _, title, _ in read],
            [rating for _, _, rating in read],
            np.array(known, np.int64),
            [self.candidate(c, number) for c in candidates],
        )
        self.check(profile, number)
        return profile

    def check(self, profile: Profile, number: int) -> None:
        liked = f" with a rating of at least {self.config.min_rating:g}"
        liked = liked if self.config.history_items == "positive" else ""
        if not shown_history(profile, self.config):
            self.fail(number, f"user {profile.user!r} has an empty history: give one item{liked}")
        titles = [c.title for c in profile.candidates]
        if not titles and not len(profile.items):
            self.fail(
                number,
                f"the log holds no item of user {profile.user!r}'s history, so nothing can be "
                'retrieved for it; give "candidates"',
            )
        if titles and len(set(titles)) < len(titles):
            twice = next(title for title in titles if titles.count(title) > 1)
            self.fail(number, f"candidate {twice!r} stands there twice")
        if titles and self.config.top_k > len(titles):
            self.fail(
                number,
                f"{len(titles)} candidates are fewer than --top_k {self.config.top_k}; lower it",
            )

    def interaction(self, entry, number: int) -> tuple[int | None, str, float]:
        """(item code or None, title, rating) of an entry of a history."""
        entry = entry if isinstance(entry, dict) else {}
        code, title = self.item_of(entry, number)
        rating = entry.get("rating")
        if type(rating) in (int, float) and math.isfinite(rating):
            return code, title, float(rating)
        if self.config.ratings or self.config.history_items == "positive" or rating is not None:
            self.fail(number, f"{title!r} needs a number as rating, got {rating!r}")
        return code, title, math.nan

    def item_of(self, entry: dict, number: int) -> tuple[int | None, str]:
        """The log's item by its id, else by its title; else a new one by its title."""
        item, title = entry.get("item"), entry.get("title")
        code = self.by_id.get(str(item)) if item is not None else None
        if code is None and isinstance(title, str) and clean_title(title):
            title = clean_title(title)
            return self.by_title.get(title) if item is None else None, title
        if code is None:
            what = f"the log has no item {item!r}" if item is not None else "expected an item"
            self.fail(number, f'{what}; give {{"title": "..."}}, or "item" with an id of the log')
        return code, self.interactions.titles[code]

    def candidate(self, entry, number: int) -> Candidate:
        """A title or id of the log as text, or an object as in a history."""
        if isinstance(entry, dict):
            code, title = self.item_of(entry, number)
            new = None if entry.get("item") is None else str(entry["item"])
            return Candidate(new if code is None else self.interactions.item_ids[code], title)
        text = clean_title(str(entry))
        code = self.by_title.get(text, self.by_id.get(str(entry)))
        if code is None:
            self.fail(
                number,
                f"{entry!r} is neither a title nor an item id of the log; "
                'a new item is given as {"title": "..."}',
            )
        return Candidate(self.interactions.item_ids[code], self.interactions.titles[code])


def users_of(config: RecommendConfig, interactions: Interactions) -> LogUsers | NewUsers:
    if config.users == "all":
        return LogUsers(interactions, np.arange(interactions.num_users))
    file = Path(config.users)
    if not file.is_file():
        raise ValueError(f"--users {file}: no such file")
    return (
        NewUsers(file, interactions, config)
        if file.suffix == ".jsonl"
        else named_users(file, interactions)
    )


# -------------------------------------------------------------------------------------------- lists
def shown_history(profile: Profile, config: RecommendConfig) -> list[tuple[str, float]]:
    """(title, rating) as the run shows them in prompts: the newest --history, oldest first."""
    pairs = list(zip(profile.titles, profile.ratings, strict=True))
    if config.history_items == "positive":
        pairs = [(title, rating) for title, rating in pairs if rating >= config.min_rating]
    pairs = pairs[-config.history :]
    return pairs if config.ratings else [(title, math.nan) for title, _ in pairs]


def candidates_of(
    profile: Profile, retriever: Retriever, interactions: Interactions
) -> list[Candidate]:
    """Given ones, or the retriever's best that the user has not touched; shuffled by the user."""
    found = profile.candidates
    if not found:
        codes = retriever.top(profile.items, profile.items, NUM_CANDIDATES)
        found = [
            Candidate(interactions.item_ids[code], interactions.titles[code], rank)
            for rank, code in enumerate(codes.tolist(), 1)
        ]
    return [found[i] for i in shown_order(profile.user, len(found))]


def record_of(user: str, candidates: list[Candidate], logps: np.ndarray, top_k: int) -> dict:
    """The line of one user: the best top_k, equal log-probs in the retriever's order."""
    shares = np.exp(logps - logps.max())
    shares /= shares.sum()
    ranks = [c.retrieved or 0 for c in candidates]
    order = np.lexsort((ranks, -logps))[:top_k]
    items = [
        {
            "item": candidates[i].item,
            "title": candidates[i].title,
            "probability": round(float(shares[i]), 6),
            "retrieved": candidates[i].retrieved,
        }
        for i in order
    ]
    return {"user": user, "items": items}


def finished_batches(
    users: Sequence[Profile],
    todo: np.ndarray,
    retriever: Retriever,
    ranker: ListRanker,
    config,
    interactions,
) -> Iterator[list[tuple[int, dict]]]:
    """(place of the user, its line) of each micro-batch; users without a list come first."""

    def prepare_chunk(places: np.ndarray):
        members, empty = [], []
        for place in places.tolist():
            profile = users[place]
            history = shown_history(profile, config)
            candidates = candidates_of(profile, retriever, interactions)
            if history and candidates:
                members.append((place, profile.user, candidates, history))
            else:
                empty.append((place, {"user": profile.user, "items": []}))
        lists = [ShownList(u, h, [c.title for c in found]) for _, u, found, h in members]
        return members, empty, ranker.trees(lists)

    chunks = (todo[at : at + CHUNK] for at in range(0, len(todo), CHUNK))
    for members, empty, trees in prefetch(prepare_chunk, chunks):
        if empty:
            yield empty
        for batch, tree in trees:
            lines = []
            for i, logps in zip(batch, ranker.score(tree), strict=True):
                place, user, candidates, _ = members[i]
                lines.append((place, record_of(user, candidates, logps, config.top_k)))
            yield lines


# -------------------------------------------------------------------------------------------- parts
class Parts:
    """Finished lines of all ranks: a first line with the job's key, then `place<TAB>line` each.

    A line without its line break was cut by a kill and does not count."""

    def __init__(self, output: Path, key: str, rank: int):
        self.output, self.key = output, key
        self.own = self.path(rank)

    def path(self, rank: int) -> Path:
        return self.output.with_name(f"{self.output.name}.part-{rank}")

    def files(self) -> list[Path]:
        names = f"{self.output.name}.part-"
        return sorted(f for f in self.output.parent.iterdir() if f.name.startswith(names))

    def lines(self, file: Path) -> Iterator[tuple[int, int, bytes]]:
        """(offset, place, line) of each whole line behind the first."""
        with open(file, "rb") as f:
            head = f.readline()
            if head.endswith(b"\n") and head.strip().decode() != self.key:
                raise ValueError(
                    f"{file} was begun with another model, data, users or options; delete "
                    f"{self.output.name}.part-* or choose another --output"
                )
            at = len(head)
            for line in f:
                if line.endswith(b"\n"):
                    place, _, text = line.partition(b"\t")
                    yield at, int(place), text
                at += len(line)

    def finished(self, num_users: int) -> np.ndarray:
        """(users,) bool: those with a line in any part."""
        done = np.zeros(num_users, bool)
        for file in self.files():
            for _, place, _ in self.lines(file):
                done[place] = True
        return done

    def open(self):
        """The own part, ready to be written on: a cut line at its end is removed."""
        self.own.touch()
        with open(self.own, "rb+") as f:
            end = 0
            for line in f:
                end += len(line) if line.endswith(b"\n") else 0
            f.truncate(end)
        part = open(self.own, "ab")
        if end == 0:
            part.write(f"{self.key}\n".encode())
            part.flush()
        return part

    def merge(self, num_users: int) -> int:
        """Write the output in the order of the users and delete the parts; users without items."""
        where, files = np.zeros((num_users, 2), np.int64), self.files()
        for number, file in enumerate(files):
            for at, place, _ in self.lines(file):
                where[place] = number, at
        unfinished, without = self.output.with_name(f"{self.output.name}.merging"), 0
        handles = [open(file, "rb") for file in files]
        with open(unfinished, "wb") as f:
            for number, at in where.tolist():
                handles[number].seek(at)
                line = handles[number].readline().partition(b"\t")[2]
                without += b'"items": []' in line
                f.write(line)
        unfinished.rename(self.output)
        for handle, file in zip(handles, files, strict=True):
            handle.close()
            file.unlink()
        return without


def job_key(config: RecommendConfig, source: tuple, data_hash: str) -> str:
    """Of all that decides the lines: weights, data, users, options."""
    base, adapter = source
    weights = [f for d in (base, adapter) if d for f in sorted(Path(d).glob("*.safetensors"))]
    facts = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in weights]
    options = [config.retriever, config.top_k, config.prompt_format, config.max_length]
    options += [config.dtype, config.load_in_4bit]
    digest = hashlib.sha256(json.dumps([facts, options, data_hash]).encode())
    if config.users != "all":
        digest.update(Path(config.users).read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- run
def check_request(config: RecommendConfig) -> None:
    """ValueError for what no user can be given."""
    if config.dataset == "prepared":
        raise ValueError(
            "--users needs a log of interactions, and prepared examples have none; name one "
            "user and its candidates by --request"
        )
    if not config.output:
        raise ValueError("--users needs --output, a .jsonl file to write")
    if config.top_k > NUM_CANDIDATES:
        raise ValueError(
            f"--top_k {config.top_k}: the model ranks lists of {NUM_CANDIDATES} candidates, so no "
            "more can be recommended"
        )
    if Path(config.output).exists():
        raise ValueError(f"--output {config.output} exists already; delete it or name another")


def recommend_users(config: RecommendConfig) -> None:
    """Write --output for all users that --users names."""
    check_request(config)
    rank, world_size, device = setup_distributed()
    stage, source = list(sources_of(config).items())[-1]
    with first():
        prepared = prepare(config)
        retriever = fit_retriever(config.retriever, prepared, config)
    check_run_data(config, [stage], prepared.hash)
    interactions = prepared.interactions
    users = users_of(config, interactions)
    output = Path(config.output)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    parts = Parts(output, job_key(config, source, prepared.hash), rank)
    done = parts.finished(len(users))
    any_rank(False)  # all have read the parts before one of them writes
    open_places = np.flatnonzero(~done)
    if done.any():
        print0(f"going on: {done.sum():,} of {len(users):,} users are finished")
    todo = open_places[rank::world_size]
    model, tokenizer = load_source(config, source, device)
    ranker = ListRanker(
        model, tokenizer, interactions.words, config.max_length, config.micro_batch_tokens, device
    )
    batches = finished_batches(users, todo, retriever, ranker, config, interactions)
    started = time.monotonic()
    with writing(parts.own), parts.open() as part:
        for _ in progress(written(batches, part), "recommend", len(todo)):
            pass
    any_rank(False)  # all are done
    seconds = time.monotonic() - started
    if is_main():
        with writing(output):
            without = parts.merge(len(users))
        report(config, stage, len(users), len(open_places), seconds, without)


def written(batches: Iterator[list[tuple[int, dict]]], part) -> Iterator[int]:
    """Places of the users, each after its batch has been handed to the system."""
    for lines in batches:
        texts = [f"{place}\t{json.dumps(record, ensure_ascii=False)}\n" for place, record in lines]
        part.write("".join(texts).encode())
        part.flush()
        yield from (place for place, _ in lines)


def report(config, stage: str, total: int, ranked: int, seconds: float, without: int) -> None:
    rate = ranked / max(seconds, 1e-9)
    print0(
        f"{stage}, {config.retriever}: {ranked:,} users in {hours(seconds)}, {rate:.1f} a second; "
        f"{total:,} lines in {config.output}"
    )
    if without:
        print0(
            f"note: {without:,} users have an empty list: they touched every item of the log, or "
            "have no item that a prompt may show"
        )


def main() -> None:
    config = with_run_options(parse_config(RecommendConfig))
    if config.users:
        recommend_users(config)
        return
    _, _, device = setup_distributed()
    stage, source = list(sources_of(config).items())[-1]
    model, tokenizer = load_source(config, source, device)
    print(f"{stage}:\n{ranked_request(config, model, tokenizer, device)}")


if __name__ == "__main__":
    run_cli(main)
