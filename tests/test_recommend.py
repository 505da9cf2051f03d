"""Recommendations for many users: the file's items, their order, restarts, ranks, bad input."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import recommend
import studies.retrievers as retrievers
from data import Example, render_prompt
from hub.tokenizer import Tokenizer
from loaders.counting import DECAY, MAX_DISTANCE
from loaders.frozen import prepare
from lora import apply_lora, load_adapter, save_adapter
from model import load_pretrained
from recommend import RecommendConfig, recommend_users
from studies.ranking import shown_order
from studies.sequential import candidate_scores

ROOT = Path(__file__).parents[1]
BASE = ROOT / "demo" / "base"
USERS, ITEMS, LENGTH = 24, 40, 11


def write_log(file: Path, greedy_user: bool = False) -> Path:
    """A log of random readers; with `greedy_user`, u0 has read everything."""
    rng = np.random.default_rng(0)
    with open(file, "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["user", "item", "title", "rating", "timestamp"])
        for u in range(USERS):
            length = ITEMS if greedy_user and u == 0 else LENGTH
            for time, i in enumerate(rng.permutation(ITEMS)[:length].tolist()):
                out.writerow([f"u{u}", f"s{i}", f"Story of {i}", rng.integers(4, 6), time + 1])
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A log, and a random adapter on the demo's base."""
    folder = tmp_path_factory.mktemp("recommend")
    write_log(folder / "log.csv")
    model = load_pretrained(BASE)
    torch.manual_seed(0)
    apply_lora(model, r=4, lora_alpha=8.0, lora_dropout=0.0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    save_adapter(model, folder / "adapter")
    return folder


OPTIONS = {"dataset": "csv", "followers": 3, "history": 6, "exclude": "seen"}


def options(folder: Path, **changes) -> RecommendConfig:
    given = OPTIONS | {
        "adapter": str(folder / "adapter"),
        "data_dir": str(folder / "log.csv"),
        "prepared_dir": str(folder / "prepared"),
        "users": "all",
        "micro_batch_tokens": 3000,
    }
    return RecommendConfig(
        **given | {k: str(v) if isinstance(v, Path) else v for k, v in changes.items()}
    )


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(folder) -> list[dict]:
    recommend_users(options(folder, output=folder / "whole.jsonl", top_k=20))
    return read(folder / "whole.jsonl")


def same(one: list[dict], other: list[dict]) -> None:
    """Equal lists; probabilities as near as two ways of dividing the batches make them."""
    assert [r["user"] for r in one] == [r["user"] for r in other]
    for a, b in zip(one, other, strict=True):
        assert [i["item"] for i in a["items"]] == [i["item"] for i in b["items"]]
        for i, j in zip(a["items"], b["items"], strict=True):
            assert i | {"probability": 0} == j | {"probability": 0}
            assert abs(i["probability"] - j["probability"]) < 2e-5


def markov_by_loops(rows: list[list[str]], history: list[str], shown: int) -> dict[str, float]:
    """Few lines, no arrays: every pair of each user's list."""
    pairs, counts = {}, {}
    for items in rows:
        for a, first in enumerate(items):
            counts[first] = counts.get(first, 0) + 1
            for d in range(1, min(MAX_DISTANCE, len(items) - 1 - a) + 1):
                key = first, items[a + d]
                pairs[key] = pairs.get(key, 0) + 1 / d
    newest = list(reversed(history))[:shown]
    return {
        c: sum(DECAY**age * pairs.get((i, c), 0) for age, i in enumerate(newest)) / n**0.5
        for c, n in counts.items()
    }


def test_every_user_gets_what_the_retriever_finds_untouched(folder, whole):
    """The 20 items of a line are the untouched ones that plain loops over the CSV score best."""
    rows = {}
    for row in csv.DictReader(open(folder / "log.csv")):
        rows.setdefault(row["user"], []).append(row["item"])
    assert sorted(r["user"] for r in whole) == sorted(rows) and len(whole) == USERS
    for record in whole:
        history = rows[record["user"]]
        scores = markov_by_loops(list(rows.values()), history, shown=6)
        left = sorted(set(scores) - set(history), key=lambda c: (-round(scores[c], 9), c))
        found = sorted(record["items"], key=lambda i: i["retrieved"])
        assert [i["retrieved"] for i in found] == list(range(1, 21))
        assert [i["item"] for i in found] == left[:20]
        assert all(i["title"] == f"Story of {i['item'][1:]}" for i in found)
        assert abs(sum(i["probability"] for i in record["items"]) - 1) < 1e-4


def test_order_is_that_of_plain_full_sequences(folder, whole):
    """Each title behind its prompt as one causal text, without a tree: same order, same shares."""
    interactions = prepare(options(folder, output="x")).interactions
    tokenizer, model = Tokenizer(BASE), load_pretrained(BASE)
    load_adapter(model, folder / "adapter")
    for record in whole[:4]:
        u = list(interactions.user_ids).index(record["user"])
        rows = range(
            interactions.start[u + 1] - 6, interactions.start[u + 1]
        )  # the newest six, the last two too
        history = [
            (interactions.titles[interactions.item[r]], float(interactions.rating[r])) for r in rows
        ]
        by_rank = sorted(record["items"], key=lambda i: i["retrieved"])
        titles = [by_rank[i]["title"] for i in shown_order(record["user"], 20)]
        text = render_prompt(Example(interactions.words, record["user"], history, titles, 0, [], 0))
        (prompt,) = tokenizer.encode_prompts([text])
        logps = []
        for ids in tokenizer.encode_completions(titles):
            with torch.no_grad():
                logits = model.logits(torch.tensor([prompt + ids]))[0]
            rows = logits[len(prompt) - 1 : -1].log_softmax(1)
            logps.append(rows.gather(1, torch.tensor(ids)[:, None]).sum().item())
        shares = torch.tensor(logps).softmax(0)
        order = shares.argsort(descending=True).tolist()
        assert [i["title"] for i in record["items"]] == [titles[n] for n in order]
        found = [i["probability"] for i in record["items"]]
        np.testing.assert_allclose(found, shares[order], atol=1e-5)
        assert shares.max() > 0.06  # the adapter has an opinion


def test_a_cut_file_goes_on_without_repeating(folder, whole, monkeypatch):
    """Killed after three batches, in the middle of a line: only what is missing is ranked."""
    output = folder / "cut.jsonl"
    config = options(folder, output=output, top_k=20)
    score, calls = recommend.ListRanker.score, []

    def dies(self, tree):
        calls.append(len(tree.input_ids))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(self, tree)

    monkeypatch.setattr(recommend.ListRanker, "score", dies)
    with pytest.raises(KeyboardInterrupt):
        recommend_users(config)
    part = folder / "cut.jsonl.part-0"
    kept = part.read_bytes().splitlines(keepends=True)
    assert len(kept) == 1 + sum(calls[:3]) and not output.exists()
    part.write_bytes(b"".join(kept[:-1]) + kept[-1][:30])  # the last line was cut
    calls.clear()

    def counts(self, tree):
        calls.append(len(tree.input_ids))
        return score(self, tree)

    monkeypatch.setattr(recommend.ListRanker, "score", counts)
    recommend_users(config)
    assert sum(calls) == USERS - (len(kept) - 2)
    same(read(output), whole)
    assert not part.exists()


def test_parts_of_another_job_are_refused(folder):
    output = folder / "other.jsonl"
    (folder / "other.jsonl.part-0").write_text("key of another job\n")
    with pytest.raises(ValueError, match="part-0 was begun with another model"):
        recommend_users(options(folder, output=output))


def test_two_ranks_write_what_one_does(folder, whole):
    """torchrun with 2 processes, from the command line: same file, no part left."""
    config = options(folder, output=folder / "two.jsonl", top_k=20)
    names = [*OPTIONS, "adapter", "data_dir", "prepared_dir", "users", "output", "top_k"]
    flags = [f"--{name}={getattr(config, name)}" for name in names]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "recommend.py"), *flags],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{USERS} users in" in done.stdout and "a second" in done.stdout
    same(read(folder / "two.jsonl"), whole)
    assert not list(folder.glob("two.jsonl.*"))


# ----------------------------------------------------------------------------------- kinds of users
def test_named_users(folder, whole):
    """A file of ids: these users, in its order."""
    (folder / "some.txt").write_text("u7\n\nu3\n")
    config = options(folder, users=folder / "some.txt", output=folder / "some.jsonl", top_k=20)
    recommend_users(config)
    by_user = {r["user"]: r for r in whole}
    same(read(folder / "some.jsonl"), [by_user["u7"], by_user["u3"]])


def test_new_users(folder, whole):
    """A copy of a user of the log gets that user's list; given candidates may be new items."""
    interactions = prepare(options(folder, output="x")).interactions
    rows = range(interactions.start[0], interactions.start[1])
    copied = [
        {
            "item": interactions.item_ids[interactions.item[r]],
            "rating": float(interactions.rating[r]),
        }
        for r in rows
    ]
    titled = [{"title": "A story never seen", "rating": 5}, {"title": "Story of 3", "rating": 4}]
    given = ["Story of 4", "s5", {"title": "Fresh"}, {"item": "new-1", "title": "Fresher"}]
    entries = [
        {"user": interactions.user_ids[0], "history": copied},
        {"user": "visitor", "history": titled},
        {"user": "cold", "history": titled[:1], "candidates": given},
    ]
    (folder / "new.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    config = options(folder, users=folder / "new.jsonl", output=folder / "n.jsonl", top_k=4)
    recommend_users(config)
    copy, visitor, cold = read(folder / "n.jsonl")
    first = next(r for r in whole if r["user"] == interactions.user_ids[0])
    same([copy], [first | {"items": first["items"][:4]}])
    assert len(visitor["items"]) == 4 and "s3" not in {i["item"] for i in visitor["items"]}
    assert {(i["item"], i["title"]) for i in cold["items"]} == {
        ("s4", "Story of 4"),
        ("s5", "Story of 5"),
        (None, "Fresh"),
        ("new-1", "Fresher"),
    }
    assert all(i["retrieved"] is None for i in cold["items"])


def test_sasrec_retrieves_with_its_own_scores(folder, tmp_path, monkeypatch):
    """Trained once, then read; the same scores as studies/sequential.py's of the candidates."""
    config = options(folder, retriever="sasrec", output=tmp_path / "r.jsonl", top_k=20)
    recommend_users(config)
    prepared = prepare(config)
    monkeypatch.setattr(retrievers, "train", None)  # a second training would fail
    retriever = retrievers.fit_retriever("sasrec", prepared, config)
    test, interactions = prepared.splits["test"], prepared.interactions
    wanted = candidate_scores(retriever.model, test, retriever.num_shown)
    for e, p in enumerate(test.position):
        scores = retriever.scores(interactions.item[interactions.start[interactions.user[p]] : p])
        np.testing.assert_allclose(scores[test.candidates[e]], wanted[e], rtol=1e-4, atol=1e-5)
    for u, record in enumerate(read(tmp_path / "r.jsonl")):
        items = interactions.item[interactions.start[u] : interactions.start[u + 1]].astype(
            np.int64
        )
        best = [interactions.item_ids[c] for c in retriever.top(items, items, 20)]
        assert [i["item"] for i in sorted(record["items"], key=lambda i: i["retrieved"])] == best


def test_a_user_who_touched_everything_has_an_empty_line(folder, tmp_path, capsys):
    """The others get their lists, and one note counts those without."""
    log_file = write_log(tmp_path / "log.csv", greedy_user=True)
    recommend_users(options(folder, data_dir=log_file, output=tmp_path / "r.jsonl"))
    records = {r["user"]: r["items"] for r in read(tmp_path / "r.jsonl")}
    assert records.pop("u0") == [] and all(len(items) == 10 for items in records.values())
    assert "note: 1 users have an empty list: they touched every item" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- bad input
BAD_LINES = {
    "not json": "new.jsonl:2: expected",
    '{"user": "a"}': "new.jsonl:2: expected",
    '{"user": "a", "history": []}': "new.jsonl:2: user 'a' has an empty history",
    '{"user": "a", "history": [{"item": "s99", "rating": 4}]}': "the log has no item 's99'",
    '{"user": "a", "history": [{"title": "Story of 1"}]}': "'Story of 1' needs a number as rating",
    '{"user": "a", "history": [{"title": "New", "rating": 4}]}': "nothing can be retrieved",
    '{"user": "ok", "history": [{"item": "s1", "rating": 4}]}': "stands in line 1 already",
    '{"user": "a", "history": [{"item": "s1", "rating": 4}], "candidates": ["Nope"]}': (
        "'Nope' is neither a title nor an item id"
    ),
    '{"user": "a", "history": [{"item": "s1", "rating": 4}], "candidates": ["s2", "s3"]}': (
        "2 candidates are fewer than --top_k 10"
    ),
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_before_anything_is_ranked(folder, tmp_path, line):
    good = '{"user": "ok", "history": [{"item": "s1", "rating": 4}]}'
    file = tmp_path / "new.jsonl"
    file.write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError) as error:
        recommend_users(options(folder, users=file, output=tmp_path / "r.jsonl"))
    assert BAD_LINES[line] in str(error.value)
    assert not list(tmp_path.glob("r.jsonl*"))


def test_bad_requests(folder, tmp_path):
    """One message each, with the way out."""
    (tmp_path / "ids.txt").write_text("u1\nnobody\n")
    existing = tmp_path / "there.jsonl"
    existing.touch()
    new = tmp_path / "r.jsonl"
    cases = {
        "user 'nobody' is not in the log": {"users": tmp_path / "ids.txt", "output": new},
        "--top_k 30: the model ranks lists of 20": {"top_k": 30, "output": new},
        "needs --output": {},
        "exists already": {"output": existing},
        "no such file": {"users": tmp_path / "gone.txt", "output": new},
        "prepared examples have none": {"dataset": "prepared", "output": new},
    }
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=message):
            recommend_users(options(folder, **changes))
    with pytest.raises(ValueError, match="--output, --top_k: for --users only"):
        options(folder, users="", request="one.json", output=new, top_k=3)
