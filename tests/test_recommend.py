"""Recommendations for many users: the file's items, their order, restarts, ranks, bad input."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import recommend
from data import Example, render_prompt
from hub.tokenizer import Tokenizer
from loaders.counting import DECAY, MAX_DISTANCE
from loaders.frozen import prepare
from lora import apply_lora, load_adapter, save_adapter
from model import load_pretrained
from recommend import RecommendConfig, recommend_users, shown_order
from studies import sequential

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
    given = {name: str(folder / name) for name in ("adapter", "prepared_dir")}
    given |= {"data_dir": str(folder / "log.csv"), "users": "all", "micro_batch_tokens": 3000}
    changes = {k: str(v) if isinstance(v, Path) else v for k, v in changes.items()}
    return RecommendConfig(**OPTIONS | given | changes)


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
    newest, scores = list(reversed(history))[:shown], {}
    for c, n in counts.items():
        scores[c] = sum(DECAY**age * pairs.get((i, c), 0) for age, i in enumerate(newest)) / n**0.5
    return scores


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
        end = interactions.start[list(interactions.user_ids).index(record["user"]) + 1]
        rows = range(end - 6, end)  # the newest six, the last two too
        titles = [interactions.titles[interactions.item[r]] for r in rows]
        history = list(zip(titles, interactions.rating[rows].tolist(), strict=True))
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
    """Killed in the middle of a line, with parts of two ranks: only what is missing is ranked."""
    output, names = folder / "cut.jsonl", []
    config = options(folder, output=output, top_k=20)
    encode = recommend.Ranker.encode

    def counts(self, user, titles):
        names.append(user.name)
        return encode(self, user, titles)

    def dies(*args):
        for number, scored in enumerate(score(*args)):
            if number == 9:
                raise KeyboardInterrupt
            yield scored

    score = recommend.Ranker.score
    monkeypatch.setattr(recommend.Ranker, "score", dies)
    with pytest.raises(KeyboardInterrupt):
        recommend_users(config)
    part = folder / "cut.jsonl.part-0"
    key, *kept = part.read_bytes().splitlines(keepends=True)
    assert len(kept) == 9 and not output.exists()
    (folder / "cut.jsonl.part-1").write_bytes(key + b"".join(kept[:5]))  # of another rank
    part.write_bytes(key + b"".join(kept[5:-1]) + kept[-1][:30])  # the last line was cut
    monkeypatch.setattr(recommend.Ranker, "score", score)
    monkeypatch.setattr(recommend.Ranker, "encode", counts)
    recommend_users(config)
    assert len(names) == len(set(names)) == USERS - 8
    same(read(output), whole)
    assert not list(folder.glob("cut.jsonl.*"))


def test_a_job_of_other_options_data_or_weights_is_another(folder, tmp_path):
    """Whatever decides the lines is part of the key, and parts with another key are refused."""
    users = tmp_path / "some.txt"
    users.write_text("u1")
    source = (BASE, folder / "adapter")
    config = options(folder, users=users, output="a")
    key = recommend.job_key(config, source, "data")
    changes = {"retriever": "item-knn", "top_k": 3, "history": 7, "ratings": False, "stage": "sft"}
    changes |= {"prompt_format": "chat", "max_length": 99, "dtype": "bfloat16", "min_rating": 3.0}
    changes |= {"load_in_4bit": True, "history_items": "positive", "scale": "0,5"}
    configs = [replace(config, **{name: value}) for name, value in changes.items()]
    keys = [recommend.job_key(changed, source, "data") for changed in configs]
    keys.append(recommend.job_key(config, source, "other"))
    keys.append(recommend.job_key(config, (BASE, None), ""))
    users.write_text("u2")
    keys.append(recommend.job_key(config, source, "data"))
    assert len({key, *keys}) == len(changes) + 4
    users.write_text("u1")
    same_lines = replace(config, output="b", micro_batch_tokens=9, prepared_dir="c")
    assert recommend.job_key(same_lines, source, "data") == key
    (folder / "other.jsonl.part-0").write_text("key of another job\n")
    with pytest.raises(ValueError, match="part-0 was begun with another model"):
        recommend_users(options(folder, output=folder / "other.jsonl"))


def test_two_ranks_write_what_one_does(folder, whole):
    """torchrun with 2 processes, from the command line: same file, no part left."""
    config = options(folder, output=folder / "two.jsonl", top_k=20)
    names = [*OPTIONS, "adapter", "data_dir", "prepared_dir", "users", "output", "top_k"]
    flags = [f"--{name}={getattr(config, name)}" for name in names]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command, env = [*launcher, str(ROOT / "recommend.py"), *flags], {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"two.jsonl: {USERS} users") == 1
    same(read(folder / "two.jsonl"), whole)
    assert not list(folder.glob("two.jsonl.*"))


# ----------------------------------------------------------------------------------- kinds of users
def recommended(folder: Path, users: str | list[dict], **changes) -> list[dict]:
    """The lines for these users, ids or records."""
    file = folder / ("asked.txt" if isinstance(users, str) else "asked.jsonl")
    file.write_text(users if isinstance(users, str) else "\n".join(map(json.dumps, users)))
    output = folder / "recommended.jsonl"
    output.unlink(missing_ok=True)
    recommend_users(options(folder, users=file, output=output, **changes))
    return read(output)


def test_named_users(folder, whole):
    """A file of ids: these users, in its order."""
    by_user = {r["user"]: r for r in whole}
    same(recommended(folder, "u7\n\nu3\n", top_k=20), [by_user["u7"], by_user["u3"]])


def test_new_users(folder, whole):
    """A copy of a user of the log gets that user's list; given candidates may be new items."""
    interactions = prepare(options(folder, output="x")).interactions
    ids = [interactions.item_ids[i] for i in interactions.item[: interactions.start[1]]]
    ratings = interactions.rating[: interactions.start[1]].tolist()
    copied = [{"item": i, "rating": rating} for i, rating in zip(ids, ratings, strict=True)]
    titled = [{"title": "A story never seen", "rating": 5}, {"title": "Story of 3", "rating": 4}]
    given = ["Story of 4", "s5", {"title": "Fresh"}, {"item": "new-1", "title": "Fresher"}]
    entries = [
        {"user": interactions.user_ids[0], "history": copied},
        {"user": "visitor", "history": titled},
        {"user": "cold", "history": titled[:1], "candidates": given},
    ]
    copy, visitor, cold = recommended(folder, entries, top_k=4)
    first = next(r for r in whole if r["user"] == interactions.user_ids[0])
    same([copy], [first | {"items": first["items"][:4]}])
    assert len(visitor["items"]) == 4 and "s3" not in {i["item"] for i in visitor["items"]}
    listed = {("s4", "Story of 4"), ("s5", "Story of 5"), (None, "Fresh"), ("new-1", "Fresher")}
    assert {(i["item"], i["title"]) for i in cold["items"]} == listed
    assert all(i["retrieved"] is None for i in cold["items"])


def test_what_a_user_has_seen_by_title_is_not_recommended(folder, whole):
    """Also where its id is unknown; its spelling is cleaned first."""
    seen = whole[0]["items"][0]["title"]
    known, elsewhere = {"item": "s1", "rating": 4}, {"item": "elsewhere-9", "rating": 5}
    history = [known, elsewhere | {"title": seen}]
    spelt = [known, elsewhere | {"title": f" {seen} ".replace(" ", "  ")}]
    lines = [{"user": n, "history": h} for n, h in enumerate((history[:1], history, spelt))]
    records = recommended(folder, lines, top_k=20)
    without, *both = [{i["title"] for i in r["items"]} for r in records]
    assert len(without) == 20 and all(seen not in titles and len(titles) == 20 for titles in both)


@pytest.mark.parametrize("history_items", ["all", "positive"])
def test_ratings_of_new_users_are_mapped_as_the_logs(folder, tmp_path, history_items):
    """--scale binary: a copy of a user of the log, as likes, gets the same list."""
    rows = list(csv.DictReader(open(folder / "log.csv")))
    with open(tmp_path / "likes.csv", "w", newline="") as f:
        out = csv.DictWriter(f, rows[0])
        out.writeheader()
        out.writerows(row | {"rating": int(row["rating"]) - 4} for row in rows)
    own = [r for r in rows if r["user"] == "u3"]
    history = [{"item": r["item"], "rating": int(r["rating"]) - 4} for r in own]
    data = {"data_dir": tmp_path / "likes.csv", "prepared_dir": tmp_path / "prepared"}
    data |= {"scale": "binary", "history_items": history_items, "min_history": 1}
    records = recommended(folder, [{"user": "u3", "history": history}], **data)
    same(records, recommended(folder, "u3", **data))


def test_sasrec_retrieves_with_its_own_scores(folder, tmp_path, monkeypatch):
    """Trained once, then read; the same scores as studies/sequential.py's of the candidates."""
    config = options(folder, retriever="sasrec", output=tmp_path / "r.jsonl", top_k=20)
    recommend_users(config)
    prepared = prepare(config)
    monkeypatch.setattr(sequential, "train", None)  # a second training would fail
    retriever = sequential.fit_retriever("sasrec", prepared, config)
    test, interactions = prepared.splits["test"], prepared.interactions
    wanted = sequential.candidate_scores(retriever.model, test, retriever.num_shown)
    for e, p in enumerate(test.position):
        scores = retriever.scores(interactions.item[interactions.start[interactions.user[p]] : p])
        np.testing.assert_allclose(scores[test.candidates[e]], wanted[e], rtol=1e-4, atol=1e-5)
    for u, record in enumerate(read(tmp_path / "r.jsonl")):
        items = interactions.item[interactions.start[u] : interactions.start[u + 1]]
        items = items.astype(np.int64)
        best = [interactions.item_ids[c] for c in retriever.top(items, items, 20)]
        assert [i["item"] for i in sorted(record["items"], key=lambda i: i["retrieved"])] == best


def test_a_user_who_touched_everything_has_an_empty_line(folder, tmp_path, capsys):
    """The others get their lists, and the end counts those without."""
    log_file = write_log(tmp_path / "log.csv", greedy_user=True)
    recommend_users(options(folder, data_dir=log_file, output=tmp_path / "r.jsonl"))
    records = {r["user"]: r["items"] for r in read(tmp_path / "r.jsonl")}
    assert records.pop("u0") == [] and all(len(items) == 10 for items in records.values())
    assert f"{USERS} users, 1 with an empty list" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- bad input
GOOD = '{"user": "ok", "history": [{"item": "s1", "rating": 4}]}'
BAD_LINES = {
    "not json": "new.jsonl:2: expected",
    '{"user": "a"}': "new.jsonl:2: expected",
    '{"history": [{"item": "s1", "rating": 4}]}': 'new.jsonl:2: expected .* "user"',
    '{"user": "a", "history": []}': "new.jsonl:2: the history is empty",
    '{"user": "a", "history": [{"item": "s99", "rating": 4}]}': "entry 1 .*'s99'.* of the log",
    '{"user": "a", "history": [{"title": "Story of 1"}]}': "entry 1 has rating None",
    '{"user": "a", "history": [{"title": "Story of 1", "rating": -7}]}': "entry 1 has rating -7",
    '{"user": "a", "history": [{"title": "New", "rating": 4}]}': "give candidates",
    GOOD: "stands in another line",
    GOOD[:-1] + ', "candidates": ["s2", "s3"]}': "2 candidates, at least 10",
    GOOD[:-1] + ', "candidates": [{"item": "s99"}]}': "candidate 1 .*'s99'",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_before_anything_is_ranked(folder, tmp_path, line):
    file = tmp_path / "new.jsonl"
    file.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(ValueError, match=BAD_LINES[line]):
        recommend_users(options(folder, users=file, output=tmp_path / "r.jsonl"))
    assert not list(tmp_path.glob("r.jsonl*"))


def test_bad_jobs_are_refused(folder, tmp_path):
    """One message each, with the way out."""
    (tmp_path / "ids.txt").write_text("u1\nnobody\n")
    (tmp_path / "empty.txt").write_text("\n")
    existing = tmp_path / "there.jsonl"
    existing.touch()
    new = tmp_path / "r.jsonl"
    cases = {
        "ids.txt:2: the log has no user 'nobody'": {"users": tmp_path / "ids.txt", "output": new},
        "empty.txt names nobody": {"users": tmp_path / "empty.txt", "output": new},
        "--top_k must be >= 1, <= 20": {"top_k": 30, "output": new},
        "needs --output": {},
        "exists already": {"output": existing},
        "gone.txt: cannot be opened": {"users": tmp_path / "gone.txt", "output": new},
        "prepared examples have none": {"dataset": "prepared", "output": new},
        "--output, --top_k: for --users only": {
            "users": "", "request": "one.json", "output": new, "top_k": 3
        },
    }  # fmt: skip
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=message):
            recommend_users(options(folder, **changes))
