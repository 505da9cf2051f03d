"""Asking a model: requests, runs, lists for many users, the same answers in other programs."""

import json
import shutil
from dataclasses import replace
from itertools import islice
from math import nan
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import write_json
from launch import ROOT, TRAIN, run_script
from test_loaders import make_interactions

import eval as evaluation
import recommend
from data import Example, build_tree, render_prompt
from hub.tokenizer import Tokenizer
from loaders.counting import Retriever
from loaders.frozen import DataConfig, find_prepared, prepare
from loaders.planted import World, planted_world
from loaders.users import Catalogue, read_user
from lora import load_adapter
from model import load_pretrained, save_pretrained
from recommend import Ranker, RecommendConfig, job_key, recommend_users, shown_order
from runtime.sources import export_merged, sources_of, with_run_options
from runtime.stages import write_base
from studies import sequential
from train import TrainConfig

BASE = ROOT / "demo" / "base"
WORDS = ("items", "chose", "choose")  # of a log that has none of its own
LOG = make_interactions(
    *([0] * 6, range(6), [4] * 6, range(1, 7)),
    dict(enumerate(["The Last Station", "Red Sea", "Blue & Door", "Été", "7", "Owl"])),
    "csv",
)


# ----------------------------------------------------------------------------------------- requests
def asked(rows, candidates=("X", "Y"), log=None, **options):
    given = list(candidates) if isinstance(candidates, tuple) else candidates
    entry, config = {"history": rows, "candidates": given}, DataConfig(dataset="csv", **options)
    return read_user(entry, "my.json", Catalogue(log), config, fewest=2)


def test_a_request_is_cleaned_as_training_cleans():
    """NFC, entities, line breaks; shown as the model was trained."""
    history = [{"title": "e\u0301te\u0301", "rating": 4}, {"title": "A\nB ", "rating": 2.5}]
    user = asked(history, ["Blue &amp; Door", " Iron\tDoor"])
    assert user.history == [("\u00e9t\u00e9", 4.0), ("A B", 2.5)]
    assert user.candidates == [(None, "Blue & Door"), (None, "Iron Door")]
    assert asked(history, history_items="positive").history == [("\u00e9t\u00e9", 4.0)]
    assert asked(history, history=1, min_history=1).history == [("A B", 2.5)]
    ((title, rating),) = asked([{"title": "A", "rating": None}], ratings=False).history
    assert title == "A" and np.isnan(rating)


@pytest.mark.parametrize(("scale", "rating", "shown", "refused"), [
    ("", 4.5, 4.5, (9.5, 0, nan, True, "4", None)),
    ("0,100", 80, 4.2, (-7, 101, 1e9)),
    ("binary", 1, 5, (-7, 1.5)),
    ("binary", 0, 1, ()),
])  # fmt: skip
def test_ratings_are_mapped_and_filtered_as_the_logs(scale, rating, shown, refused):
    options = {"scale": scale, "min_rating": shown, "history_items": "positive"}
    user = asked([{"title": "A", "rating": rating}], **options)
    assert user.history == [("A", np.float32(shown))]
    for wrong in refused:
        with pytest.raises(ValueError, match=f"my.json: .*'rating': {wrong!r}.: expected"):
            asked([{"title": "A", "rating": wrong}], **options)


def test_ids_and_titles_name_items_of_the_log(capsys):
    """In a history and among candidates; a title comes before an id of the same spelling."""
    history = [{"item": "1", "rating": 4}, {"item": 2, "rating": 4}, {"title": "Owl", "rating": 3}]
    user = asked(history, ["0", "7", "Blue &amp; Door", {"item": 3}], LOG)
    assert [title for title, _ in user.history] == ["Red Sea", "Blue & Door", "Owl"]
    assert user.items.tolist() == [1, 2, 5]
    named = [("0", "The Last Station"), ("4", "7"), ("2", "Blue & Door"), ("3", "Été")]
    assert user.candidates == named and not capsys.readouterr().out


def test_unknown_titles_are_ranked_with_a_note(capsys):
    user = asked([{"title": "The Last Staton", "rating": 4}], ["Owl", "Xyzzy"], LOG)
    assert user.history == [("The Last Staton", 4.0)] and (None, "Xyzzy") in user.candidates
    first, second = capsys.readouterr().out.splitlines()
    assert '"The Last Staton"' in first and '"Xyzzy"' in second


ONE = [{"title": "A", "rating": 4}]


@pytest.mark.parametrize(("history", "candidates", "culprit"), [
    ([{"title": "", "rating": 4}], ["A", "B"], "history entry 1"),
    ([{"item": "1", "rating": 4}], ["A", "B"], "history entry 1 .*ids need --prepared_dir"),
    (ONE, ["A", "&nbsp;"], "candidate 2"),
    (ONE, ["\u00e9t\u00e9", "B", "e\u0301te\u0301"], "candidate '\u00e9t\u00e9' stands"),
    (ONE, ["A"], "1 candidates, give at least 2"),
    ([], ["A", "B"], "no history .*give one"),
    (ONE, None, "expected {"),
])  # fmt: skip
def test_requests_that_training_never_saw_are_refused(history, candidates, culprit):
    with pytest.raises(ValueError, match=f"my.json: {culprit}"):
        asked(history, candidates)


@pytest.mark.parametrize("longest", [1024, 150])
def test_a_long_request_loses_its_oldest_history(longest):
    """As training prompts do; and what does not fit with one item of it is an error."""
    user = asked([{"title": f"Red Sea {n}", "rating": 4} for n in range(20)])
    config = SimpleNamespace(max_length=longest, list_in_prompt=True)
    ranker = SimpleNamespace(config=config, words=WORDS, tokenizer=Tokenizer(BASE))
    ids, completions = Ranker.encode(ranker, user, ["Owl", "Moon Fox"])
    assert len(ids) + max(map(len, completions)) <= longest
    prompt = ranker.tokenizer.inner.decode(ids)
    assert "Red Sea 19" in prompt and ("Red Sea 0 " in prompt) == (longest == 1024)
    config.max_length = 20
    with pytest.raises(ValueError, match="raise --max_length 20"):
        Ranker.encode(ranker, user, ["Owl", "Moon Fox"])


# ------------------------------------------------------------------------------------------- a run
WORLD, RATED = planted_world(World(num_users=40)), {}  # user -> history, as a request names it
TITLES, TITLE_OF = WORLD.titles, {f"s{i}": title for i, title in enumerate(WORLD.titles)}
for u, i, r in zip(WORLD.user, WORLD.item, WORLD.rating):
    RATED.setdefault(f"u{u}", []).append({"item": f"s{i}", "rating": int(2 * r)})
DATA = ["--dataset=csv", "--scale=0,10", "--history=6", "--followers=3", "--min_rating=3.4"]
DATA += ["--train_size=32", "--test_size=20", "--dtype=float32"]


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A few steps of SFT on a log of its own, whose prompts have little of the defaults."""
    folder = tmp_path_factory.mktemp("asked")
    lines = ["user,item,title,rating,timestamp"]
    for user, history in RATED.items():
        for time, e in enumerate(history, 1):
            lines.append(f"{user},{e['item']},{TITLE_OF[e['item']]},{e['rating']},{time}")
    (folder / "log.csv").write_text("\n".join(lines))
    flags = [*DATA, f"--data_dir={folder / 'log.csv'}", "--max_length=700", "--stages=raw,sft"]
    flags += ["--val_size=0", "--max_steps=4", "--batch_size=8", "--sft_learning_rate=1e-3"]
    flags += [f"--model={BASE}", f"--output_dir={folder / 'run'}"]
    done = run_script(TRAIN, *flags, f"--prepared_dir={folder / 'prepared'}", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    history = [{"item": "s0", "rating": 1}, *({"title": t, "rating": 5} for t in TITLES[1:5])]
    request = {"history": history, "candidates": ["s20", {"item": "s21"}, *TITLES[22:40]]}
    write_json(folder / "my.json", request)
    return folder / "run"


@pytest.fixture
def ask(run, in_process, capsys):
    """ask(*flags): the lines that recommend.py prints for the request of the run's folder."""
    places = f"--request={run.parent / 'my.json'}", f"--prepared_dir={run.parent / 'prepared'}"

    def call(*flags) -> list[str]:
        in_process(recommend.main, *places, *flags)
        return capsys.readouterr().out.splitlines()

    return call


def change(file: Path, **changes) -> None:
    write_json(file, json.loads(file.read_text()) | changes)


def test_an_adapter_alone_is_asked_as_its_run_asks(run, ask, tmp_path):
    """prompt.json beside it has words, template and options; without it, others; a note where most
    of its test answers were invalid; ids need the examples of its run."""
    expected = ask(f"--run={run}", "--stage=sft")
    assert expected[0] == "sft:"
    assert {line.split("  ")[-1] for line in expected[1:]} == set(TITLES[20:40])
    shares = [float(line.split()[1].rstrip("%")) for line in expected[1:]]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=1)
    assert ask(f"--model={BASE}", f"--adapter={run / 'sft'}") == expected
    kept = json.loads((run / "sft/prompt.json").read_text())
    assert kept["words"] == list(WORDS) and "{history}" in kept["template"]
    copy = shutil.copytree(run, tmp_path / "run")
    change(copy / "sft/eval/metrics.json", valid_ratio=0.031)
    for source in (f"--run={copy}", f"--adapter={copy / 'sft'}"):
        note, *lines = ask(source)
        assert "only 3% of this model's test answers" in note and lines == expected
    (copy / "sft/prompt.json").unlink()
    assert ask(f"--adapter={copy / 'sft'}")[1:] != expected
    with pytest.raises(ValueError, match="my.json: history entry 1 .*s0.*ids need --prepared_dir"):
        ask(f"--run={run}", f"--prepared_dir={tmp_path}")


def test_an_option_that_says_otherwise_is_refused(run):
    options = {"adapter": str(run / "sft"), "request": "my.json"}
    taken = with_run_options(RecommendConfig(**options, history=6))
    assert (taken.history, taken.max_length, taken.scale) == (6, 700, "0,10")
    with pytest.raises(ValueError, match="leave out --history 7.* 6 .*prompt.json"):
        with_run_options(RecommendConfig(**options, history=7))


def cases(run: Path) -> list[tuple]:
    """(prompt, record) of the run's test examples."""
    metrics = json.loads((run / "sft/eval/metrics.json").read_text())
    examples = find_prepared(run.parent / "prepared", metrics["data_hash"]).splits["test"]
    records = read(run / "sft/eval/predictions.jsonl")
    return [(render_prompt(examples[r["example"]]), r) for r in records]


def test_prompts_are_shown_as_the_model_reads_them(run, in_process, capsys):
    """eval.py --show_prompts: text whose ids are the prompt's, and the answer with its end."""
    flags = (f"--run={run}", f"--prepared_dir={run.parent / 'prepared'}", "--show_prompts=2")
    in_process(evaluation.main, *flags)
    out = capsys.readouterr().out
    for prompt, record in cases(run)[:2]:
        shown = prompt.replace("\n", "\n ")  # the tokenizer's own rule
        assert f"{shown}\n--- answer\n {record['target']}<|end_of_text|>\n" in out
    assert out.count("--- user") == 2


# --------------------------------------------------------------------------------------- many users
def options(run: Path, **changes) -> RecommendConfig:
    given = {"run": run, "prepared_dir": run.parent / "prepared", "users": "all", "top_k": 20}
    given |= {"micro_batch_tokens": 6000} | changes
    given = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
    return with_run_options(RecommendConfig(**given))


@pytest.fixture(scope="module")
def whole(run) -> list[dict]:
    recommend_users(options(run, output=run.parent / "whole.jsonl"))
    return read(run.parent / "whole.jsonl")


def same(one: list[dict], other: list[dict]) -> None:
    """Equal lists; probabilities as near as two ways of dividing the batches make them."""
    assert [r["user"] for r in one] == [r["user"] for r in other]
    for a, b in zip(one, other, strict=True):
        for i, j in zip(a["items"], b["items"], strict=True):
            assert i | {"probability": 0} == j | {"probability": 0}
            assert abs(i["probability"] - j["probability"]) < 2e-5


def retrieved_order(record: dict) -> list[str]:
    return [i["item"] for i in sorted(record["items"], key=lambda i: i["retrieved"])]


@pytest.mark.parametrize("name", ["markov", "sasrec"])
def test_every_user_gets_what_the_retriever_finds_untouched(name, run, tmp_path, monkeypatch):
    """The 20 items of a line are the untouched ones that score best, by a retriever that has seen
    the whole log; SASRec is trained once and then read."""
    config = options(run, output=tmp_path / "r.jsonl", retriever=name)
    recommend_users(config)
    prepared, records = prepare(config), read(tmp_path / "r.jsonl")
    monkeypatch.setattr(sequential, "train", None)
    log, retriever = prepared.interactions, sequential.fit_retriever(name, prepared, config)
    retriever = Retriever("markov", log, None, 6) if name == "markov" else retriever
    assert sorted(r["user"] for r in records) == sorted(RATED)
    for record in records:
        history = [log.item_ids.index(entry["item"]) for entry in RATED[record["user"]]]
        scores = retriever.scores(np.array(history))
        left = sorted(set(range(log.num_items)) - set(history), key=lambda c: (-scores[c], c))
        assert retrieved_order(record) == [log.item_ids[c] for c in left[:20]]
        assert sorted(i["retrieved"] for i in record["items"]) == list(range(1, 21))
        assert all(i["title"] == TITLE_OF[i["item"]] for i in record["items"])
        assert abs(sum(i["probability"] for i in record["items"]) - 1) < 1e-4


def test_order_is_that_of_the_titles_behind_the_prompt(run, whole):
    """The newest six, rated as the log is read; candidates in the order that the user draws."""
    tokenizer, model = Tokenizer(BASE), load_pretrained(BASE)
    load_adapter(model, run / "sft")
    for record in whole[:3]:
        newest = ((e["item"], 1 + 0.4 * e["rating"]) for e in RATED[record["user"]][-6:])
        history = [(TITLE_OF[item], float(np.float32(r))) for item, r in newest]
        by_rank = [TITLE_OF[item] for item in retrieved_order(record)]
        titles = [by_rank[i] for i in shown_order(record["user"], 20)]
        text = render_prompt(Example(WORDS, record["user"], history, titles, 0, [], 0))
        prompts = tokenizer.encode_prompts([text])
        tree = build_tree(prompts, [tokenizer.encode_completions(titles)])
        with torch.no_grad():
            shares = tree.sum_logps(model(tree)[0])[0].softmax(0)
        order = shares.argsort(descending=True).tolist()
        assert [i["title"] for i in record["items"]] == [titles[n] for n in order]
        found = [i["probability"] for i in record["items"]]
        np.testing.assert_allclose(found, shares[order], atol=1e-5)
        assert shares.max() > 0.06  # the model has an opinion


def test_a_cut_file_goes_on_without_repeating(run, whole, tmp_path, monkeypatch):
    """Killed in the middle of a line, with parts of two ranks: only what is missing is ranked; with
    other options the parts are refused."""
    output, score = tmp_path / "cut.jsonl", Ranker.score
    config, part = options(run, output=output), tmp_path / "cut.jsonl.part-0"

    def dies(*args):
        yield from islice(score(*args), 9)
        raise KeyboardInterrupt

    monkeypatch.setattr(Ranker, "score", dies)
    with pytest.raises(KeyboardInterrupt):
        recommend_users(config)
    key, *kept = part.read_bytes().splitlines(keepends=True)
    assert len(kept) == 9 and not output.exists()
    (tmp_path / "cut.jsonl.part-1").write_bytes(key + b"".join(kept[:5]))  # of another rank
    part.write_bytes(key + b"".join(kept[5:-1]) + kept[-1][:30])  # the last line was cut
    monkeypatch.setattr(Ranker, "score", score)
    with pytest.raises(ValueError, match="part-. was started with another model"):
        recommend_users(replace(config, top_k=3))
    others = ((BASE, run / "sft"), "b"), ((BASE, run / "sft"), "c"), ((BASE, None), "b")
    assert len({job_key(config, weights, data) for weights, data in others}) == 3
    encode = Mock(side_effect=Ranker.encode)
    monkeypatch.setattr(Ranker, "encode", lambda *args: encode(*args))
    recommend_users(config)
    names = [call.args[1].name for call in encode.call_args_list]
    assert len(names) == len(set(names)) == len(RATED) - 8
    same(read(output), whole)
    assert not list(tmp_path.glob("cut.jsonl.*"))


def test_two_ranks_write_what_one_does(run, whole, tmp_path):
    flags = [f"--run={run}", f"--prepared_dir={run.parent / 'prepared'}", "--users=all"]
    flags += ["--top_k=20", f"--output={tmp_path / 'two.jsonl'}"]
    done = run_script(ROOT / "recommend.py", *flags, processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"two.jsonl: {len(RATED)} users") == 1
    same(read(tmp_path / "two.jsonl"), whole)
    assert [f.name for f in tmp_path.iterdir()] == ["two.jsonl"]


def test_named_and_new_users(run, whole, tmp_path, capsys):
    """Ids keep the file's order; a copy of a user of the log gets that user's list, without what it
    has seen by title under another id; given candidates may be new; who has touched everything has
    an empty line."""

    def recommended(name: str, text: str, **changes) -> list[dict]:
        users, output = tmp_path / name, tmp_path / f"{name}.out"
        users.write_text(text)
        recommend_users(options(run, users=users, output=output, **changes))
        return read(output)

    by_user = {r["user"]: r for r in whole}
    named = recommended("ids.txt", "u7\n\nu3\n")
    same(named, [by_user["u7"], by_user["u3"]])
    best = by_user["u7"]["items"][0]["title"]
    seen = {"item": "elsewhere-9", "title": f" {best} ".replace(" ", "  "), "rating": 9}
    unread = [{"title": "A story never seen", "rating": 9}, {"title": TITLES[3], "rating": 8}]
    given = [TITLES[4], "s5", {"title": "Fresh"}, {"item": "new-1", "title": "Fresher"}]
    everything = [{"item": f"s{i}", "rating": 8} for i in range(len(TITLES))]
    entries = [
        {"user": "u7", "history": RATED["u7"]},
        {"user": "again", "history": [seen, *RATED["u7"]]},
        {"user": "cold", "history": unread, "candidates": given},
        {"user": "greedy", "history": everything},
    ]
    lines = "\n".join(map(json.dumps, entries))
    records = {r["user"]: r for r in recommended("new.jsonl", lines, top_k=4)}
    same([records["u7"]], [by_user["u7"] | {"items": by_user["u7"]["items"][:4]}])
    again, cold = records["again"]["items"], records["cold"]["items"]
    assert best not in {i["title"] for i in again} and len(again) == 4
    listed = {("s4", TITLES[4]), ("s5", TITLES[5]), (None, "Fresh"), ("new-1", "Fresher")}
    assert {(i["item"], i["title"]) for i in cold} == listed
    assert all(i["retrieved"] is None for i in cold) and records["greedy"]["items"] == []
    assert "4 users, 1 with an empty list" in capsys.readouterr().out


GOOD = '{"user": "ok", "history": [{"item": "s1", "rating": 4}]}'


@pytest.mark.parametrize(("line", "changes", "culprit"), [
    ("not json", {}, "new.jsonl: no user in .*line 2: not json"),
    (GOOD.replace("s1", "s999"), {}, "user 2: history entry 1 .*'s999'.*ids need --prepared_dir"),
    (GOOD.replace("ok", "b").replace("item", "title"), {}, "0 candidates, give at least 20"),
    (GOOD, {}, "new.jsonl: user 2: expected a .user. of its own, not 'ok'"),
    (GOOD[:-1] + ', "candidates": ["s2", "s3"]}', {}, "2 candidates, give at least 20"),
    ("nobody", {"users": "ids.txt"}, "ids.txt: user 1: the log has no user 'nobody'"),
    ("", {"users": "ids.txt"}, "ids.txt: no user in the file"),
    ("", {"users": "gone.txt"}, "gone.txt: cannot be read"),
    ("", {"top_k": 30}, "--top_k must be >= 1, <= 20"),
    ("", {"output": ""}, "needs --output"),
    ("", {"output": "ids.txt"}, "exists already"),
    ("", {"dataset": "prepared"}, "prepared examples have none"),
    ("", {"users": "", "request": "a.json"}, "--output, --top_k: for --users only"),
])  # fmt: skip
def test_bad_users_and_jobs_are_refused(run, tmp_path, monkeypatch, line, changes, culprit):
    monkeypatch.chdir(tmp_path)
    Path("new.jsonl").write_text(f"{GOOD}\n{line}\n")
    Path("ids.txt").write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=culprit):
        recommend_users(options(run, **{"users": "new.jsonl", "output": "r.jsonl"} | changes))
    assert not list(tmp_path.glob("r.jsonl*"))


# ------------------------------------------------------------------------------ where the base lies
def test_a_base_that_moved_is_given_by_model(run, tmp_path, ask):
    """Its weights must be those that were trained on; the error without it names the option."""
    expected, moved = ask(f"--run={run}", "--stage=sft"), shutil.copytree(run, tmp_path / "moved")
    for stage in ("raw", "sft"):
        change(moved / stage / "base.json", base=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=f"{tmp_path / 'gone'} is missing; .* --model"):
        ask(f"--run={moved}")
    new = shutil.copytree(BASE, tmp_path / "new")
    assert ask(f"--run={moved}", f"--model={new}") == expected
    model = load_pretrained(new)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    save_pretrained(model, new)
    with pytest.raises(ValueError, match="new holds other weights than .*gone"):
        ask(f"--run={moved}", f"--model={new}")


def test_a_base_is_recorded_so_that_it_is_found_again(one_process, tmp_path):
    """Relative inside a run, which may move; else its hub name, if it was given so, or its path."""
    moved = shutil.copytree(one_process[0] / "one", tmp_path / "moved")
    config = RecommendConfig(adapter=str(moved / "recpo"), request="my.json")
    assert sources_of(config) == {"recpo": (moved / "sft", moved / "recpo")}
    for given in ("org/name", str(BASE)):
        run = Mock(base=BASE, folder=tmp_path / "run", config=TrainConfig(model=given))
        run.train.examples.interactions.words = WORDS
        assert write_base(run, BASE, tmp_path, "weights") == given
        assert json.loads((tmp_path / "base.json").read_text())["base"] == given


# -------------------------------------------------------------------------------- in other programs
def test_other_programs_give_our_answers(run, tmp_path):
    """A stage is a PEFT adapter, and exported a model of transformers: greedy decoding, as
    docs/serve.md does it, writes what eval.py recorded."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    export_merged(run / "sft", tmp_path)
    load, pairs = transformers.AutoModelForCausalLM.from_pretrained, cases(run)
    adapted = peft.PeftModel.from_pretrained(load(BASE, dtype=torch.float32), run / "sft")
    merged = load(tmp_path, dtype=torch.float32)
    assert len(pairs) == 20
    for model, folder, shown in ((adapted, BASE, pairs), (merged, tmp_path, pairs[:8])):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        how = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
        for prompt, record in shown:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            written = model.generate(input_ids=ids, **how)[0, ids.shape[1] :]
            text = tokenizer.decode(written, skip_special_tokens=True)
            assert text.strip().split("\n")[0] == record["answer"]


def test_a_merged_export_gives_our_answers(run, tmp_path, in_process):
    """In eval.py --model, which reads prompt.json there."""
    export_merged(run / "sft", tmp_path / "merged")
    places = [f"--prepared_dir={run.parent / 'prepared'}", f"--data_dir={run.parent / 'log.csv'}"]
    in_process(evaluation.main, f"--model={tmp_path / 'merged'}", *DATA, *places, "--output_dir=o")
    for found, (_, record) in zip(read(Path("o/merged/predictions.jsonl")), cases(run)):
        assert found["answer"] == record["answer"]
        np.testing.assert_allclose(found["logps"], record["logps"], atol=1e-3)
