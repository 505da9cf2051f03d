"""Rank the candidates of one user, or write recommendations for many users.

    python recommend.py --run DIR --request my.json                       one user, printed
    python recommend.py --model M --adapter A --request my.json           with the prompts of A
    python recommend.py --run DIR --users all --output recs.jsonl         all users of the run's log
    python recommend.py --run DIR --users users.txt --output recs.jsonl   ids of users, one a line
    python recommend.py --run DIR --users new.jsonl --output recs.jsonl   new users, one a line:

    {"user": "u1", "history": [{"title": "...", "rating": 4}, {"item": "7", "rating": 5}],
     "candidates": ["title or item id", {"title": "A new item"}]}

my.json holds one such object; it needs no "user". Histories are oldest first. If candidates are
missing, --retriever (fitted on the whole log; SASRec on all but each user's last two) finds the 20
best items that the user has not touched; they are shown in an order drawn from the user's id. One
pass of the model ranks a list. Probabilities are shares of this list; "retrieved" is the
retriever's rank, or null. Each rank appends its users' lines to `<output>.part-<rank>`; the same
command continues after them, and rank 0 merges them at the end (docs/serve.md).

Left out: rules across users (diversity, stock), and all templates but the first.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import arg, changed_options, is_main, print0, read_json, run_cli, writing
from data import NUM_CANDIDATES, Example, Interactions, build_tree, micro_batches, shortened
from loaders.counting import best_items
from loaders.frozen import find_prepared, prepare
from loaders.users import Catalogue, User, listed_users, read_user, user_of_log
from runtime.processes import prefetch, progress, rank_zero_first, setup_distributed
from runtime.sources import (
    SourceConfig,
    check_run_data,
    folder_of,
    load_source,
    parse_source,
    prompt_words,
    sources_of,
)
from runtime.stages import PROMPT_OPTIONS, write_whole
from studies.sequential import fit_retriever
from studies.two_stage import title_scores

RETRIEVERS = ("markov", "item-knn", "popularity", "sasrec", "model")
CHUNK = 256  # users retrieved and tokenised at a time, while others are ranked


@dataclass(frozen=True)
class RecommendConfig(SourceConfig):
    """Rank the candidates of one user, or write recommendations for many."""

    request: str = arg("", "JSON file of one user, with candidates", group="request")
    users: str = arg("", "all of the log, a .txt file of their ids, or a .jsonl file of new users")
    retriever: str = arg(
        "markov", "finds candidates; model: the model itself (title tokens)", choices=RETRIEVERS
    )
    top_k: int = arg(10, "items per user of --users", at_least=1, at_most=NUM_CANDIDATES)
    output: str = arg("", "the .jsonl file to write for --users; a restart continues it")
    micro_batch_tokens: int = arg(8192, "padded tokens of one forward pass", at_least=1)

    KEPT = PROMPT_OPTIONS

    def __post_init__(self):
        super().__post_init__()
        if bool(self.request) == bool(self.users):
            raise ValueError("give either --request, or --users")
        if self.request and (given := changed_options(self) & {"retriever", "top_k", "output"}):
            raise ValueError(f"--{', --'.join(sorted(given))}: for --users only")
        if self.users and not self.output:
            raise ValueError("--users needs --output, a .jsonl file to write")
        if self.users and self.dataset == "prepared":
            raise ValueError("--users needs a log, and prepared examples have none; use --request")


class Ranker:
    """The last of the named stages, with the prompts of its training."""

    def __init__(self, config: RecommendConfig, log: Interactions | None, device):
        self.config, self.device = config, device
        self.stage, self.source = list(sources_of(config).items())[-1]
        self.words = prompt_words(config, folder_of(config, self.stage), log)
        self.model, self.tokenizer = load_source(config, self.source, device)
        own = log.titles if config.retriever == "model" else []  # which the model retrieves
        self.completions = self.tokenizer.encode_completions(own)

    def encode(self, user: User, titles: list[str]) -> tuple[list[int], list[list[int]]]:
        """Ids of the prompt and of each title; a prompt that is too long loses its oldest items."""
        with_list = self.config.list_in_prompt
        example = Example(self.words, user.name, user.history, titles, 0, [], 0, with_list)
        completions = self.tokenizer.encode_completions(titles)
        prompt, _ = shortened(
            example, max(map(len, completions)), self.tokenizer, self.config.max_length
        )
        return prompt, completions

    def catalogue_scores(self, user: User) -> np.ndarray:
        """Log-probs (I,) that the model itself gives the titles of the log."""
        example = Example(self.words, user.name, user.history, [], 0, [], 0, list_in_prompt=False)
        prompt, _ = shortened(example, 1, self.tokenizer, self.config.max_length)
        return next(title_scores(self.model, self.completions, [prompt]))

    @torch.no_grad()
    def score(self, encoded: list[tuple[list, list]]) -> Iterator[tuple[int, np.ndarray, list]]:
        """(index, log-probs (N,), shares) of every encoded list, in micro-batches of equal N."""
        widths = [(len(p), sum(len(ids) - 1 for ids in titles)) for p, titles in encoded]
        for length in sorted({len(titles) for _, titles in encoded}):
            same = [i for i, (_, titles) in enumerate(encoded) if len(titles) == length]
            for batch in micro_batches(widths, same, 1, self.config.micro_batch_tokens)[0]:
                prompts, titles = zip(*(encoded[i] for i in batch), strict=True)
                tree = build_tree(list(prompts), list(titles)).to(self.device)
                logps = tree.sum_logps(self.model(tree)[0]).double().cpu()
                yield from zip(batch, logps.numpy(), logps.softmax(1).tolist(), strict=True)


def log_at_hand(config: RecommendConfig, stage: str) -> Interactions | None:
    """The log that is given, or the one that the run prepared, if it still exists."""
    if config.data_dir and not config.run:
        return prepare(config).interactions
    file = folder_of(config, stage) / "eval" / "metrics.json"
    found = file.exists() and find_prepared(config.prepared_dir, read_json(file)["data_hash"])
    return found.interactions if found else None


def answer_request(config: RecommendConfig) -> None:
    """Print the candidates of one user, best first, with their probabilities."""
    _, _, device = setup_distributed()
    log = log_at_hand(config, list(sources_of(config))[-1])
    user = read_user(read_json(config.request), config.request, Catalogue(log), config, fewest=2)
    ranker, titles = Ranker(config, log, device), [title for _, title in user.candidates]
    ((_, logps, shares),) = ranker.score([ranker.encode(user, titles)])
    print0(f"{ranker.stage}:")
    for rank, n in enumerate(np.argsort(-logps, kind="stable"), 1):
        print0(f"{rank:3}. {shares[n]:6.1%}  log-prob {logps[n]:8.2f}  {titles[n]}")


# ------------------------------------------------------------------------------------- many users
def shown_order(name: str, count: int) -> np.ndarray:
    """A permutation that depends only on the user, so that a prompt does not reveal the ranks."""
    digest = hashlib.sha256(f"{name}\0".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(count)


def candidates_of(ranker: Ranker, user: User, retriever, log: Interactions) -> list[dict]:
    """The user's given candidates, or the 20 best untouched items, in the order of the prompt.
    The retriever finds the best items; without one the model does."""
    rows = [(item, title, None) for item, title in user.candidates]
    if not rows:
        scores = retriever.scores(user.items) if retriever else ranker.catalogue_scores(user)
        codes = best_items(scores, user.items, NUM_CANDIDATES)
        rows = [(log.item_ids[c], log.titles[c], rank) for rank, c in enumerate(codes.tolist(), 1)]
    rows = [rows[i] for i in shown_order(user.name, len(rows))]
    return [{"item": i, "title": t, "probability": 0.0, "retrieved": rank} for i, t, rank in rows]


def ranked(ranker: Ranker, users: list[User | int], retriever, log: Interactions) -> Iterator[dict]:
    """Yield the output record of each user; the next chunk is encoded in the background."""

    def encode(at: int):
        asked = []
        for user in users[at : at + CHUNK]:
            user = user if isinstance(user, User) else user_of_log(log, user, ranker.config)
            rows = candidates_of(ranker, user, retriever, log) if user.history else []
            encoded = ranker.encode(user, [row["title"] for row in rows]) if rows else None
            asked.append((user, rows, encoded))
        return asked

    for asked in prefetch(encode, range(0, len(users), CHUNK)):
        yield from ({"user": user.name, "items": []} for user, rows, _ in asked if not rows)
        asked = [one for one in asked if one[1]]
        for i, logps, shares in ranker.score([encoded for _, _, encoded in asked]):
            user, rows, _ = asked[i]
            for row, share in zip(rows, shares, strict=True):
                row["probability"] = round(share, 6)
            order = np.argsort(-logps, kind="stable")[: ranker.config.top_k]
            yield {"user": user.name, "items": [rows[n] for n in order]}


def job_key(config: RecommendConfig, source: tuple, data_hash: str) -> str:
    """Hash of everything that the output depends on: weights, data, users and options."""
    files = [f for folder in source if folder for f in sorted(folder.glob("*")) if f.is_file()]
    facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    options = asdict(config) | dict.fromkeys(("output", "micro_batch_tokens", "prepared_dir"))
    asked = "" if config.users == "all" else Path(config.users).read_bytes().hex()
    return hashlib.sha256(json.dumps([facts, options, data_hash, asked]).encode()).hexdigest()


def finished_lines(output: Path, key: str) -> dict[str, str]:
    """Map users to their lines in all parts; a line without a line break was cut by a kill."""
    found = {}
    for part in parts_of(output):
        head, *lines = part.read_text("utf-8", "replace").split("\n")[:-1] or [key]
        if head != key:
            raise ValueError(
                f"{part} was started with another model, data, users or options; delete "
                f"{output.name}.part-* or choose another --output"
            )
        found |= {json.loads(line)["user"]: line for line in lines}
    return found


def parts_of(output: Path) -> list[Path]:
    return [f for f in output.parent.iterdir() if f.name.startswith(f"{output.name}.part-")]


def recommend_users(config: RecommendConfig) -> None:
    """Write the recommendations for all users that --users names to --output."""
    output = Path(config.output)
    if output.exists():
        raise ValueError(f"--output {output} exists already; delete it or name another")
    if config.retriever == "model" and config.list_in_prompt:
        raise ValueError("--retriever model needs a model trained with --no_list_in_prompt")
    rank, world_size, device = setup_distributed()
    with rank_zero_first():
        prepared, name = prepare(config), config.retriever
        retriever = None if name == "model" else fit_retriever(name, prepared, config)
    log = prepared.interactions
    users = list(range(log.num_users))
    if config.users != "all":
        users = listed_users(Path(config.users), log, config, config.top_k)
    ranker = Ranker(config, log, device)
    check_run_data(config, [ranker.stage], prepared.hash)
    key = job_key(config, ranker.source, prepared.hash)
    output.parent.mkdir(parents=True, exist_ok=True)
    done = finished_lines(output, key)
    dist.barrier()  # all have read the parts before one of them writes
    names = [user.name if isinstance(user, User) else log.user_ids[user] for user in users]
    left = [user for user, name in zip(users, names, strict=True) if name not in done]
    print0(f"{ranker.stage}, {config.retriever}: {len(left):,} of {len(users):,} users are left")
    own, mine = output.with_name(f"{output.name}.part-{rank}"), left[rank::world_size]
    with writing(own), open(own, "ab") as part:
        part.truncate(own.read_bytes().rfind(b"\n") + 1)  # a line that was cut
        part.write(b"" if own.stat().st_size else f"{key}\n".encode())
        for record in progress(ranked(ranker, mine, retriever, log), "recommend", len(mine)):
            part.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
            part.flush()
    dist.barrier()
    if is_main():
        lines = finished_lines(output, key)
        with writing(output):
            write_whole(output, "".join(f"{lines[name]}\n" for name in names))
            for part in parts_of(output):
                part.unlink()
        empty = sum(line.endswith('"items": []}') for line in lines.values())
        print0(f"{output}: {len(users):,} users" + f", {empty:,} with an empty list" * bool(empty))


def main() -> None:
    config = parse_source(RecommendConfig)
    recommend_users(config) if config.users else answer_request(config)


if __name__ == "__main__":
    run_cli(main)
