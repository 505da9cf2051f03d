"""What a model is asked with: requests as training reads its log, prompt.json beside the weights,
a base that moved, and the same answers in other programs."""

import csv
import json
import shutil
from dataclasses import replace
from math import nan
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launch import ROOT, TRAIN, run_script

import eval as evaluation
import recommend
from data import ExampleConfig, render_prompt
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, find_prepared
from loaders.planted import World, planted_world
from loaders.table import make_interactions
from loaders.users import Catalogue, read_user
from model import load_pretrained, save_pretrained
from recommend import RecommendConfig
from runtime.sources import export_merged, sources_of, with_run_options
from runtime.stages import load_stage, write_base

BASE = ROOT / "demo" / "base"
LOG = make_interactions(
    *([0] * 6, range(6), [4] * 6, range(1, 7)),
    dict(enumerate(["The Last Station", "Red Sea", "Blue & Door", "Été", "7", "Owl"])),
    "csv",
)


# ----------------------------------------------------------------------------------------- requests
def asked(rows, candidates=("X", "Y"), log=None, **options):
    """read_user of a request; options of DataConfig."""
    config = DataConfig(**{"dataset": "csv", **options})
    if isinstance(candidates, tuple):
        candidates = list(candidates)
    entry = {"history": rows, "candidates": candidates}
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


@pytest.mark.parametrize("one_of_many", [False, True])
def test_ratings_are_mapped_and_filtered_as_the_logs(one_of_many):
    """--scale, for one user and for many; in the log's precision."""
    for scale, rating, shown in (("0,100", 80, 4.2), ("binary", 1, 5), ("binary", 0, 1)):
        options = {"dataset": "csv", "scale": scale, "min_rating": shown}
        config = DataConfig(**options, history_items="positive")
        entry = {
            "user": "u",
            "history": [{"title": "A", "rating": rating}],
            "candidates": ["B", "C"],
        }
        user = read_user(entry, "f", Catalogue(None), config, 2, one_of_many)
        assert user.history == [("A", np.float32(shown))]
        for wrong in (-7, 1e9, 0.5 if scale == "binary" else 101):
            entry["history"][0]["rating"] = wrong
            with pytest.raises(ValueError, match=f"f: history entry 1 .* --scale {scale}"):
                read_user(entry, "f", Catalogue(None), config, 2, one_of_many)


def test_ids_and_titles_name_items_of_the_log(capsys):
    """In a history and among candidates; a title comes before an id of the same spelling."""
    history = [{"item": "1", "rating": 4}, {"item": 2, "rating": 4}, {"title": "Owl", "rating": 3}]
    user = asked(history, ["0", "7", "Blue &amp; Door", {"item": 3}], LOG)
    assert [title for title, _ in user.history] == ["Red Sea", "Blue & Door", "Owl"]
    assert user.items.tolist() == [1, 2, 5]
    assert user.candidates == [
        ("0", "The Last Station"), ("4", "7"), ("2", "Blue & Door"), ("3", "Été")
    ]  # fmt: skip
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match="history entry 1 .* item id .* none is at hand"):
        asked(history)
    with pytest.raises(ValueError, match="my.json: candidate 1 .*9.* item id of the log"):
        asked(history, [{"item": 9}, "Owl"], LOG)


def test_an_unknown_title_is_ranked_with_a_note_of_the_nearest(capsys):
    user = asked([{"title": "The Last Staton", "rating": 4}], ["Owl", "Xyzzy"], LOG)
    assert user.history == [("The Last Staton", 4.0)] and (None, "Xyzzy") in user.candidates
    near, far = capsys.readouterr().out.splitlines()
    assert 'history entry 1: the log has no "The Last Staton"' in near
    assert 'did you mean "The Last Station"?' in near
    assert "candidate 2" in far and "Xyzzy" in far and "did you mean" not in far


def test_many_unknown_titles_are_noted_shortly(capsys):
    asked([{"title": "Owl", "rating": 4}], [f"Film {n}" for n in range(30)], LOG)
    assert len(capsys.readouterr().out.splitlines()) == 6


ONE = [{"title": "A", "rating": 4}]
REFUSED = [
    ([{"title": "", "rating": 4}], ["A", "B"], "history entry 1"),
    (ONE, ["A", "&nbsp;"], "candidate 2"),
    (ONE, ["\u00e9t\u00e9", "B", "e\u0301te\u0301"], "candidate 3 stands there twice"),
    (ONE, ["A &amp; B", "A & B"], "candidate 2 stands there twice"),
    ([{"title": "A", "rating": 9.5}], ["A", "B"], "rating 9.5; expected .* up to 5"),
    ([{"title": "A", "rating": 0}], ["A", "B"], "rating 0"),
    ([{"title": "A", "rating": nan}], ["A", "B"], "rating nan"),
    ([{"title": "A", "rating": True}], ["A", "B"], "rating True"),
    ([{"title": "A", "rating": "4"}], ["A", "B"], "rating '4'"),
    ([{"title": "A"}], ["A", "B"], "rating None"),
    ([{"rating": 4}], ["A", "B"], "history entry 1"),
    (["A"], ["A", "B"], "history entry 1"),
    (ONE, ["A", 7], "candidate 2"),
    (ONE, ["A"], "at least 2"),
    ([], ["A", "B"], "history is empty"),
    ({}, ["A", "B"], "expected"),
    (ONE, None, "expected"),
]


@pytest.mark.parametrize("history, candidates, culprit", REFUSED)
def test_requests_that_training_never_saw_are_refused(history, candidates, culprit):
    with pytest.raises(ValueError, match=f"my.json: .*{culprit}"):
        asked(history, candidates)


def test_a_request_is_read_with_a_byte_order_mark(tmp_path):
    (tmp_path / "my.json").write_text('\ufeff{"history": []}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"my\.json: expected \{"):
        config = RecommendConfig(model=str(tmp_path), request=str(tmp_path / "my.json"))
        recommend.answer_request(config)


def test_a_long_request_loses_its_oldest_history():
    """As training prompts do; and what does not fit with one item of it is an error."""
    user = asked([{"title": f"Red Sea {n}", "rating": 4} for n in range(20)], ["Owl", "Moon Fox"])
    tokenizer, titles = Tokenizer(BASE), ["Owl", "Moon Fox"]

    def prompt(max_length: int) -> str:
        ranker = SimpleNamespace(
            config=SimpleNamespace(max_length=max_length),
            words=("items", "chose", "choose"),
            tokenizer=tokenizer,
        )
        ids, completions = recommend.Ranker.encode(ranker, user, titles)
        assert len(ids) + max(map(len, completions)) <= max_length
        return tokenizer.inner.decode(ids)

    assert "Red Sea 0 " in prompt(1024)
    assert "Red Sea 19" in prompt(150) and "Red Sea 0 " not in prompt(150)
    with pytest.raises(ValueError, match="do not fit --max_length 20"):
        prompt(20)


# ---------------------------------------------------------------------------------------- a run
@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A few steps of SFT on a log of its own, whose prompts have little of the defaults."""
    folder = tmp_path_factory.mktemp("serve")
    log = planted_world(World(num_users=80))
    with open(folder / "log.csv", "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["user", "item", "title", "rating", "timestamp"])
        for row in range(len(log.user)):
            item, time = log.item[row], int(log.timestamp[row])
            out.writerow(
                [f"u{log.user[row]}", f"s{item}", log.titles[item], int(2 * log.rating[row]), time]
            )
    flags = ["--dataset=csv", f"--data_dir={folder / 'log.csv'}", "--scale=0,10", "--history=6"]
    flags += ["--max_length=700", "--followers=3", "--min_rating=3.4", "--dtype=float32"]
    flags += ["--stages=raw,sft", "--train_size=32", "--test_size=20", "--val_size=0"]
    flags += ["--max_steps=4", "--batch_size=8", "--sft_learning_rate=1e-3", f"--model={BASE}"]
    flags += [f"--output_dir={folder / 'run'}", f"--prepared_dir={folder / 'prepared'}"]
    done = run_script(TRAIN, *flags, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    history = [{"title": log.titles[i], "rating": i + 1} for i in range(5)]
    request = {"history": history, "candidates": [log.titles[i] for i in range(20, 40)]}
    (folder / "my.json").write_text(json.dumps(request))
    return folder / "run"


@pytest.fixture
def ask(run, in_process, capsys):
    """ask(*flags): the lines that recommend.py prints for the request of the run's folder."""

    def call(*flags, request=run.parent / "my.json") -> list[str]:
        places = (f"--request={request}", f"--prepared_dir={run.parent / 'prepared'}")
        in_process(recommend.main, *places, *flags)
        return capsys.readouterr().out.splitlines()

    return call


def test_an_adapter_alone_is_asked_as_its_run_asks(run, ask):
    """prompt.json beside it has words, template and options: equal log-probs; without, others."""
    expected = ask(f"--run={run}", "--stage=sft")
    assert len(expected) == 21 and expected[0] == "sft:"
    shares = [float(line.split()[1].rstrip("%")) for line in expected[1:]]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=1)
    assert ask(f"--model={BASE}", f"--adapter={run / 'sft'}") == expected
    assert ask(f"--adapter={run / 'sft'}") == expected
    kept = json.loads((run / "sft/prompt.json").read_text())
    assert kept["words"] == ["items", "chose", "choose"] and "{history}" in kept["template"]
    (run / "sft/prompt.json").rename(run / "kept.json")
    try:
        assert ask(f"--adapter={run / 'sft'}") != expected
    finally:
        (run / "kept.json").rename(run / "sft/prompt.json")


def test_an_option_that_says_otherwise_is_refused(run, tmp_path):
    """Beside a run as beside a model that keeps its own; where nothing is kept it holds."""
    options = {"adapter": str(run / "sft"), "request": "my.json"}
    taken = with_run_options(RecommendConfig(**options, history=6))
    assert (taken.history, taken.max_length, taken.scale) == (6, 700, "0,10")
    with pytest.raises(ValueError, match="--history 7 has no effect .* 6 .*prompt.json.*leave"):
        with_run_options(RecommendConfig(**options, history=7))
    config = evaluation.EvalConfig(adapter=str(run / "sft"), history=7)
    assert with_run_options(config) == replace(config, max_length=700)  # of other examples
    config = RecommendConfig(adapter=str(tmp_path), request="my.json", history=7)
    assert with_run_options(config) == config


def test_the_log_of_a_run_is_used_where_its_examples_are_found(run, ask, tmp_path):
    """Ids stand for titles; once the examples are gone, an id is an error that says so."""
    request = json.loads((run.parent / "my.json").read_text())
    expected = ask(f"--run={run}", "--stage=sft")
    titles = planted_world(World(num_users=80)).titles
    request["history"][0] = {"item": "s0", "rating": 1}
    request["candidates"][:2] = ["s20", {"item": "s21"}]
    file = tmp_path / "ids.json"
    file.write_text(json.dumps(request))
    assert ask(f"--run={run}", "--stage=sft", request=file) == expected
    request["candidates"][2] = titles[22][:-1]
    file.write_text(json.dumps(request))
    assert f'did you mean "{titles[22]}"?' in ask(f"--run={run}", "--stage=sft", request=file)[0]
    with pytest.raises(ValueError, match="ids.json: history entry 1 .*s0.* none is at hand"):
        ask(f"--run={run}", f"--prepared_dir={tmp_path}", request=file)


def test_invalid_answers_are_a_caution_once(run, ask):
    file = run / "sft/eval/metrics.json"
    metrics = json.loads(file.read_text())
    assert metrics["valid_ratio"] > 0.5
    expected = ask(f"--run={run}", "--stage=sft")
    try:
        file.write_text(json.dumps(metrics | {"valid_ratio": 0.031}))
        for source in (f"--run={run}", f"--adapter={run / 'sft'}"):
            note, *lines = ask(source)
            assert "only 3% of this model's test answers were listed titles" in note
            assert lines == expected
    finally:
        file.write_text(json.dumps(metrics))


def test_prompts_are_shown_as_the_model_reads_them(run, in_process, capsys):
    """eval.py --show_prompts: text whose ids are the prompt's, and the answer with its end."""
    flags = (f"--run={run}", f"--prepared_dir={run.parent / 'prepared'}", "--show_prompts=2")
    in_process(evaluation.main, *flags)
    out = capsys.readouterr().out
    metrics = json.loads((run / "sft/eval/metrics.json").read_text())
    examples = find_prepared(run.parent / "prepared", metrics["data_hash"]).splits["test"]
    for e in range(2):
        example = examples[e]
        shown = render_prompt(example).replace("\n", "\n ")  # the tokenizer's own rule
        answer = f"--- answer\n {example.candidates[example.target]}<|end_of_text|>\n"
        assert f"{shown}\n{answer}" in out
    assert out.count("--- user") == 2


# ------------------------------------------------------------------------- where the base lies
def test_a_base_that_moved_is_given_by_model(run, tmp_path, ask):
    """Its weights must be those that were trained on; the error without it names the option."""
    expected = ask(f"--run={run}", "--stage=sft")
    moved = shutil.copytree(run, tmp_path / "moved")
    for stage in ("raw", "sft"):
        file = moved / stage / "base.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match=f"{tmp_path / 'gone'} is not there; .* --model"):
        ask(f"--run={moved}")
    new = shutil.copytree(BASE, tmp_path / "new")
    assert ask(f"--run={moved}", f"--model={new}") == expected
    model = load_pretrained(new)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    save_pretrained(model, new)
    for stage in ("raw", "sft"):
        with pytest.raises(ValueError, match="new holds other weights than .*gone"):
            ask(f"--run={moved}", f"--stage={stage}", f"--model={new}")


def test_a_base_is_recorded_so_that_it_is_found_again(tmp_path, monkeypatch):
    """Relative inside the run, else its hub name if it was given so, else its whole path."""
    run = tmp_path / "run"
    stage, inside = run / "recpo", run / "sft"
    stage.mkdir(parents=True)
    shutil.copytree(BASE, inside)
    download = {"org/name": BASE}
    monkeypatch.setattr("runtime.stages.resolve_path", lambda name: download.get(name, Path(name)))
    examples = SimpleNamespace(interactions=SimpleNamespace(words=("a", "b", "c")))

    def recorded(base: Path, given: str) -> str:
        config = SimpleNamespace(
            model=given, adapter="", **vars(ExampleConfig()), dataset="csv", scale="",
            prompt_format="plain", max_length=9,
        )  # fmt: skip
        train = SimpleNamespace(examples=examples)
        write_base(
            SimpleNamespace(config=config, folder=run, base=base, train=train), base, stage, "k"
        )
        (stage / "adapter_config.json").touch()
        assert load_stage(stage) == (base, stage)
        return json.loads((stage / "base.json").read_text())["base"]

    assert recorded(inside, "") == "../sft"
    assert recorded(BASE, "org/name") == "org/name"
    assert recorded(BASE, str(BASE)) == str(BASE)
    run.rename(tmp_path / "elsewhere")  # an adapter finds the base inside of its run without --run
    (tmp_path / "elsewhere/recpo/base.json").write_text('{"base": "../sft"}')
    config = RecommendConfig(adapter=str(tmp_path / "elsewhere/recpo"), request="my.json")
    assert sources_of(config)["recpo"][0] == tmp_path / "elsewhere/sft"


# ------------------------------------------------------------------------- in other programs
def answers(run: Path) -> list[tuple[str, str]]:
    """(prompt as text, what eval.py answered) of the run's test examples."""
    metrics = json.loads((run / "sft/eval/metrics.json").read_text())
    examples = find_prepared(run.parent / "prepared", metrics["data_hash"]).splits["test"]
    lines = (run / "sft/eval/predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(render_prompt(examples[r["example"]]), r["answer"]) for r in records]


def written(model, tokenizer, text: str) -> str:
    """The answer by transformers' greedy decoding, as docs/serve.md does it."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    out = model.generate(
        ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip().split("\n")[0]


def test_peft_gives_our_answers(run):
    """A stage is a PEFT adapter: greedy decoding by transformers and PeftModel writes the same."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, run / "sft")
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    pairs = answers(run)
    assert len(pairs) >= 20
    assert [written(model, tokenizer, text) for text, _ in pairs] == [a for _, a in pairs]


def test_a_merged_export_gives_our_answers(run, tmp_path, in_process):
    """In transformers without PEFT, and in eval.py --model, which reads prompt.json there."""
    export_merged(run / "sft", tmp_path / "merged")
    flags = [f"--prepared_dir={run.parent / 'prepared'}", f"--data_dir={run.parent / 'log.csv'}"]
    flags += ["--dataset=csv", "--scale=0,10", "--history=6", "--followers=3", "--min_rating=3.4"]
    flags += ["--train_size=32", "--test_size=20", "--output_dir=out", "--dtype=float32"]
    in_process(evaluation.main, f"--model={tmp_path / 'merged'}", *flags)
    ours = [json.loads(line) for line in Path("out/merged/predictions.jsonl").open()]
    expected = [json.loads(line) for line in (run / "sft/eval/predictions.jsonl").open()]
    assert [r["answer"] for r in ours] == [r["answer"] for r in expected]
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a["logps"], b["logps"], atol=1e-3)
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    for text, answer in answers(run)[:8]:
        assert written(model, tokenizer, text) == answer
