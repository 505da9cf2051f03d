"""The report and the runner: what is compared with what, when it refuses, and what is skipped."""

import argparse
import json
import math
import re
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, run_script

from loaders.frozen import DataConfig, prepare
from studies.methods import Method, Result, collect, difference_of, same_seeds, sweep
from studies.report import data_section, paper_figures, report_text
from studies.sequential import BaselineConfig
from studies.statistics import Difference, holm, interval_of, mcnemar, resampled_means
from studies.tables import MEASURED, command_of, flags_of, measure, measure_missing, read_table
from train import TrainConfig

STEP = dict.fromkeys(
    ("rewards/accuracies", "logps/chosen", "logps/rejected", "margins/satisfied", "loss"), 0.5
)
HITS = "hit_ratio@1/written"


def predictions(cases, hits, valid, logps) -> str:
    """Lines of predictions.jsonl; cases: (user, candidates, target's slot)."""
    lines = []
    for (user, titles, slot), hit, ok, row in zip(cases, hits, valid, logps, strict=True):
        record = {"user": user, "candidates": titles, "target": titles[slot], "target_slot": slot}
        record |= {"hit": bool(hit), "valid": bool(ok), "logps": row, "answer": "x"}
        lines.append(json.dumps(record) + "\n")
    return "".join(lines)


def write(file: Path, text: str | dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text if isinstance(text, str) else json.dumps(text))


def write_stage(
    folder: Path, stage: str, hits: list[int], name="", valid=1.0, users="u", **config
) -> Path:
    """A finished stage that hits where `hits` says so, in a run of its own."""
    run = folder / f"{stage}-{name}{config.get('seed', 0)}"
    settings = {"dataset": "planted", "stages": stage, "seed": 0, "num_negatives": 3}
    settings |= {"margin_lambda": 2.0, "margin": "ratio", "decay": 0.5, "learning_rate": 1e-5}
    write(run / "config.json", settings | {"history_items": "all", "ratings": True} | config)
    cases = [[f"{users}{n}", [f"c{i}" for i in range(20)], 3] for n in range(len(hits))]
    logps = [[float(i == (3 if hit else 4)) for i in range(20)] for hit in hits]
    listed = [n < valid * len(hits) for n in range(len(hits))]
    write(run / stage / "eval/predictions.jsonl", predictions(cases, hits, listed, logps))
    metrics = {"data_hash": "abc", "baselines": {"chance": 0.05, "Markov": 0.3}}
    write(run / stage / "eval/metrics.json", metrics)
    if stage not in ("raw", "sft"):
        steps = [STEP | {"rewards/margins": s} for s in range(1, 30)]
        write(run / stage / "metrics.jsonl", "".join(json.dumps(s) + "\n" for s in steps))
    return run


def write_probe(run: Path, stage: str, probe: str, figure: str, values: list, **content) -> None:
    """What studies.probes leaves; written and ranked alike."""
    facts = {"probe": probe, "n": len(values), "cases": probe, "data_hash": "abc", "lengths": []}
    facts |= {"references": {"chance": {figure: [0.05] * len(values)}}}
    facts |= {how: {figure: values} for how in ("written", "ranked")}
    write(run / "probes" / stage / probe / "metrics.json", facts | content)


def methods_of(folder: Path, **described: str) -> dict[str, Method]:
    """described: run's folder with _ for - -> its method."""
    runs = [{"name": k.replace("_", "-"), "method": v} for k, v in described.items()]
    return collect(folder, {"runs": runs})


def test_every_figure_of_the_recorded_report_is_found_again(tmp_path):
    """tests/recorded: a few runs of six steps, and the report that was made of them."""
    recorded = json.loads((ROOT / "tests/recorded/runs.json").read_text())
    for name, run in recorded["runs"].items():
        write(tmp_path / name / "config.json", run["config"])
        for stage, found in run["stages"].items():
            place = tmp_path / name if stage == "sasrec" else tmp_path / name / stage
            facts = {"data_hash": "abc", "baselines": recorded["baselines"]}
            write(place / "eval/metrics.json", facts)
            tested = found["hits"], found["valid"], found["logps"]
            write(place / "eval/predictions.jsonl", predictions(recorded["cases"], *tested))
            steps = "".join(json.dumps(step) + "\n" for step in found["steps"])
            write(place / "metrics.jsonl", steps)
            for file, content in found["measured"].items():
                write(tmp_path / name / file, content)
    runs = [{"name": name, "method": run["method"]} for name, run in recorded["runs"].items()]
    now = report_text(collect(tmp_path, {"runs": runs}))
    expected = (ROOT / "tests/recorded/report.md").read_text()
    tables = [re.findall(r"^\|.*", text, re.MULTILINE) for text in (now, expected)]
    assert tables[0] == tables[1] and len(tables[1]) > 90


# --------------------------------------------------------------------------------------- statistics
def test_mcnemar_is_the_exact_binomial_test():
    """Against a sum over all outcomes of the users on whom the two differ."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 2, (2, 14))
        differ = np.flatnonzero(a != b)
        found = min(a[differ].sum(), len(differ) - a[differ].sum())
        draws = product((0, 1), repeat=len(differ))
        expected = np.mean([min(sum(o), len(o) - sum(o)) <= found for o in draws])
        assert mcnemar(a, b) == pytest.approx(expected, abs=1e-9)
    assert mcnemar(np.ones(40), np.zeros(40)) == pytest.approx(2 * 0.5**40)


def test_bootstrap_interval_is_that_of_the_mean():
    """About 1.96 standard errors on both sides for many users; the same numbers every time."""
    values = np.random.default_rng(1).normal(0.3, 1, 4000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    expected = values.mean() - half, values.mean() + half
    found = interval_of(resampled_means(values))
    assert found == pytest.approx(expected, abs=0.1 * half)
    assert found == interval_of(resampled_means(values))


def made(name: str, values, seeds=None, **config) -> Method:
    """A method whose runs have these values per user."""
    results = []
    for seed, v in zip(seeds or range(len(values)), values, strict=True):
        hits = {HITS: np.array(v, float)}
        results.append(Result(name, name, seed, Path(), config, {}, [], [], hits, {}))
    return Method(name, name, config, results)


def test_differences_are_paired_over_users_and_seeds():
    """A difference that every user shares is seen although both intervals overlap, noise is not;
    a seed that one method lacks is left out, and the runs behind each side are counted."""
    base = np.random.default_rng(2).integers(0, 2, 400)
    better = np.maximum(base, np.arange(400) < 20)
    other = np.random.default_rng(3).permutation(base)
    for a, b, expected in (
        (better, base, "higher"), (base, better, "lower"), (base, other, "not distinguishable")
    ):  # fmt: skip
        difference = difference_of(made("a", [a]), made("b", [b]), HITS)
        holm([difference])
        assert difference.verdict == expected
    found = difference_of(made("a", [base, better, better]), made("b", [base]), HITS)
    assert found.mean == 0 and found.runs == (1, 1)
    found = difference_of(made("a", [better] * 2, [1, 2]), made("b", [base] * 3), HITS)
    assert found.mean > 0 and found.runs == (2, 2)
    seeds = made("a", [base, better]).per_user(HITS)
    assert seeds.tolist() == ((base + better) / 2).tolist()


def test_holm_steps_down():
    """The k-th clearest of m is judged at 5 % / (m - k + 1); what lies behind the first failure
    fails at its level. Of 300 tables of 8 comparisons of noise at most about 5 % name one."""
    rng, unclear = np.random.default_rng(0), "not distinguishable"

    def normal(z: float, draws: int = 200_000) -> Difference:
        return Difference(z, z + rng.standard_normal(draws))

    family = [normal(z) for z in (4.0, 2.6, 2.1, 2.05)]  # two-sided p: 6e-5, .009, .036, .040
    holm(family[::-1])
    assert [d.verdict for d in family] == ["higher", "higher", unclear, unclear]
    # quantiles of the normal at 5 % / 4, / 3, / 2, / 2
    for difference, z in zip(family, (2.498, 2.394, 2.241, 2.241), strict=True):
        low, high = difference.interval
        assert (high - low) / 2 == pytest.approx(z, abs=0.04)
    wrong = 0
    for _ in range(300):
        family = [normal(z, 4000) for z in rng.normal(size=8)]
        holm(family)
        wrong += any(d.verdict != unclear for d in family)
    assert wrong / 300 < 0.09


# ------------------------------------------------------------------------------------------ methods
def test_a_table_names_methods_and_seeds_group_by_them(tmp_path):
    """{stage} is the stage; what no table describes is named by its folder; one name for two
    methods, or one seed twice, is refused."""
    for seed in range(3):
        write_stage(tmp_path, "recpo", [1, 0, seed % 2], seed=seed)
    write_stage(tmp_path, "recpo", [1, 1, 1], name="l4", margin_lambda=4.0)
    write_stage(tmp_path, "sft", [0, 1, 1])
    described = {f"recpo_{seed}": "{stage}" for seed in range(3)}
    methods = methods_of(tmp_path, recpo_l40="recpo λ=4", **described)
    found = {name: [r.seed for r in m.results] for name, m in methods.items()}
    assert found == {"sft-0/sft": [0], "recpo": [0, 1, 2], "recpo λ=4": [0]}
    assert methods["recpo"].per_user(HITS).mean() == pytest.approx((1 + 0 + 1 / 3) / 3)
    with pytest.raises(ValueError, match="recpo-0 and .*recpo-l40 .*'a' and differ in margin_lam"):
        methods_of(tmp_path, recpo_0="a", recpo_l40="a")
    write_stage(tmp_path, "recpo", [1, 1, 1], name="again")
    with pytest.raises(ValueError, match="have seed 0; give one of them another method"):
        methods_of(tmp_path, recpo_0="a", recpo_again0="a")


def test_other_users_or_other_data_are_refused(tmp_path):
    """Of the test split, of a probe; a measurement of other data than its run."""
    first = write_stage(tmp_path, "sft", [1, 0, 1])
    other = write_stage(tmp_path, "sdpo", [1, 0, 1], users="v")
    done = run_script("studies.report", tmp_path)
    assert done.returncode == 2 and "sdpo-0 sdpo" in done.stderr and "sft-0 sft" in done.stderr
    assert "candidates (test) and cannot stand in one table" in done.stderr
    (other / "config.json").unlink()
    third = write_stage(tmp_path, "recpo", [1, 0, 1])
    write_probe(first, "sft", "adherence", "hit_ratio@1", [1, 0], cases="a")
    for facts, culprit in (
        ({"cases": "b"}, r"candidates \(adherence\)"),
        ({"data_hash": "other"}, "recpo/adherence/metrics.json was measured on data other"),
    ):
        write_probe(third, "recpo", "adherence", "hit_ratio@1", [1, 0], **facts)
        with pytest.raises(ValueError, match=culprit):
            collect(tmp_path, {})
    with pytest.raises(ValueError, match="no finished stage"):
        collect(tmp_path / "nothing", {})


def test_a_sweep_changes_one_option():
    """λ = 0 is S-DPO if it was trained alike; other margins, losses and inputs stay outside; a
    curve is drawn by the seeds that all its points have."""
    changes = {
        "recpo": {}, "recpo λ=4": {"margin_lambda": 4.0}, "recpo K=1": {"num_negatives": 1},
        "recpo decay=1": {"decay": 1.0}, "recpo log_diff": {"margin": "log_diff"},
        "recpo both": {"margin_lambda": 1.0, "num_negatives": 5}, "sdpo": {}, "sft": {},
        "sft, no ratings": {"ratings": False},
    }  # fmt: skip
    methods = {}
    for name, options in changes.items():
        config, seeds = asdict(TrainConfig()) | options, [1, 0] if name == "recpo" else [0]
        methods[name] = made(re.split("[ ,]", name)[0], [[1.0]] * len(seeds), seeds, **config)
        methods[name].name = name
    ladder = [(value, m.name) for value, m in sweep(methods, "margin_lambda")]
    assert ladder == [(0.0, "sdpo"), (2.0, "recpo"), (4.0, "recpo λ=4")]
    assert [value for value, _ in sweep(methods, "num_negatives")] == [1, 3]
    assert [value for value, _ in sweep(methods, "margin")] == ["log_diff", "ratio"]
    inputs = sweep(methods, "history_items", "ratings", stage="sft")
    assert [value for value, _ in inputs] == [("all", False), ("all", True)]
    points = same_seeds([m for _, m in sweep(methods, "num_negatives")])
    assert [[r.seed for r in m.results] for m in points] == [[0], [0]]
    methods["sdpo"].config["learning_rate"] = 5e-4
    assert [value for value, _ in sweep(methods, "margin_lambda")] == [2.0, 4.0]


# --------------------------------------------------------------------------------------- the report
@pytest.fixture
def compared(tmp_path) -> Path:
    """RecPO better than S-DPO in hits and adherence, worse in valid answers and aversion."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, 200)
    good = np.maximum(base, rng.integers(0, 2, 200)).tolist()
    lengths = np.repeat([10, 20, 30, 40, 50], 40)
    uneven, even = (lengths == 10).astype(float).tolist(), ([0.0, 1.0] * 100)
    runs = []
    for stage, hits, method, options in (
        ("raw", base, "raw", {"valid": 0.5}), ("sft", base, "sft", {}), ("sdpo", base, "sdpo", {}),
        ("dpo", base, "dpo", {}), ("simpo", base, "simpo", {"valid": 0.6}),
        ("recpo", good, "recpo", {"valid": 0.9}),
        ("recpo", good, "λ=4", {"valid": 0.5, "margin_lambda": 4.0, "name": "l4"}),
        ("recpo", good, "recpo log_diff", {"margin": "log_diff", "name": "diff"}),
        ("sft", 1 - base, "liked only", {"history_items": "positive", "name": "liked"}),
    ):  # fmt: skip
        run = write_stage(tmp_path, stage, list(map(int, hits)), **options)
        runs.append({"name": run.name, "method": method})
        if method in ("sft", "sdpo", "recpo"):
            best, worst = (good, base.tolist()) if stage == "recpo" else (base.tolist(), good)
            write_probe(run, stage, "adherence", "hit_ratio@1", best)
            write_probe(run, stage, "aversion", "hit_ratio@1", worst)
            write_probe(run, stage, "temptation", "takes the disliked one", worst)
            spread = even if stage == "recpo" else uneven
            write_probe(run, stage, "length", "hit_ratio@1", spread, lengths=lengths.tolist())
    write(tmp_path / "table.json", {"runs": runs})
    return tmp_path


def test_the_report_judges_the_findings_of_the_paper(compared):
    """Held, not held or not distinguishable, each by hand; where RecPO is worse, that stands there,
    too; every picture that is named is there."""
    done = run_script("studies.report", compared, "--note", "made up")
    assert done.returncode == 0, done.stderr
    text = (compared / "report/report.md").read_text()
    for part in (
        "made up", "| Markov |  |  |  | 0.3000 |  |", "to recpo: lower",
        "HR@1 of recpo above sdpo | 1 against 1 | held",
        "HR@1 of sdpo above sft | 1 against 1 | not distinguishable",
        "ValidRatio of λ = 0 above λ = 4 | 1 against 1 | held",
        "adherence (HR@1) of recpo above sft | 1 against 1 | held",
        "HR@1 of sdpo above dpo | 1 against 1 | not distinguishable",
        "HR@1 of dpo above sft |", "HR@1 of simpo above sft |", "HR@1 of sft above liked only |",
        "HR@1 of recpo log_diff above sft | 1 against 1 | held",
        "ValidRatio of sft above raw | 1 against 1 | held",
        "ValidRatio of dpo above simpo | 1 against 1 | held",
        "aversion (naming the disliked title) of recpo above sdpo | 1 against 1 | not held",
        "taking the tempting disliked title of sdpo above recpo | 1 against 1 | held",
        "HR@1 of recpo varies less with history length than that of sdpo | held: 0.0",
        "**adherence**", "| recpo; written |",
    ):  # fmt: skip
        assert part in text, part
    assert " of recpo above λ" not in text and "gru4rec" not in text  # nothing to answer by
    assert json.loads((compared / "report/table.json").read_text())["runs"]
    pytest.importorskip("matplotlib")
    pictures = set(re.findall(r"\]\((.*png)\)", text))
    expected = {"methods", "curves", "margin_lambda", "inputs", "probes", "length"}
    assert {f"{name}.png" for name in expected} == pictures
    assert all((compared / "report" / p).stat().st_size > 10_000 for p in pictures)


def test_lists_stand_side_by_side_and_training_ends_in_means(tmp_path):
    """Uniform from the run itself, retrieved where it was measured; the last tenth of the steps (27
    to 29 of 29), mean and range of the seeds."""
    for seed, hits in enumerate(([1, 0, 0, 0], [1, 1, 0, 0])):
        run = write_stage(tmp_path, "recpo", hits, seed=seed)
    write_probe(run, "recpo", "retrieved", "hit_ratio@1", [1, 0, 0, 0])
    text = report_text(methods_of(tmp_path, recpo_0="recpo", recpo_1="recpo"))
    assert "| chance | 0.0500 |  | 0.0500 |" in text
    assert re.search(r"\| recpo \| 0.3750 \[.*?\] \|  \| 0.2500 \[.*?\] \|\n", text)
    assert "| recpo | 2 | 0.500 (0.500 to 0.500) | 28.000 (28.000 to 28.000) |" in text
    assert "(seeds 0.250, 0.500)" in text


def test_table_3_needs_the_prepared_examples(tmp_path):
    config = DataConfig(planted_users=100, followers=3, train_size=12, prepared_dir=str(tmp_path))
    (text,) = data_section(vars(config), prepare(config))
    assert "| after --core 0 | 100 |" in text and "train: 12 examples" in text
    assert "not at hand" in data_section(vars(config), None)[0]


@pytest.mark.parametrize(
    "dataset, place, model, method, expected",
    [
        ("movielens", "ml-1m.zip", "meta-llama/Llama-3.1-8B", "recpo", [0.3451, 0.9969]),
        ("movielens", "ml-1m.zip", "runs/smollm2", "sasrec", [0.2671, 1]),
        ("movielens", "ml-1m.zip", "runs/smollm2", "recpo", None),
        ("movielens", "ml-20m.zip", "meta-llama/Llama-3.1-8B", "recpo", None),
        ("amazon", "Books_5.json.gz", "Qwen2.5-7B", "sdpo", [0.4623, 0.9910]),
        ("amazon", "Video_Games.csv", "Qwen2.5-7B", "sdpo", None),
        ("steam", "steam", "Llama-3.1-8B", "recpo log_diff", [0.4284]),
        ("csv", "ml-1m.csv", "Llama-3.1-8B", "recpo", None),
    ],
)
def test_the_paper_stands_beside_its_own_data_and_models(dataset, place, model, method, expected):
    assert paper_figures({"dataset": dataset, "data_dir": place}, {model}).get(method) == expected


# --------------------------------------------------------------------------------------- the runner
def test_commands_carry_common_and_own_options(tmp_path):
    """Flags of every kind; a run that goes on from another one's stage gets its model;
    baselines get no training options."""
    assert flags_of({"a": 1, "b": True, "c": False}) == ["--a=1", "--b", "--no_c"]
    stage = tmp_path / "first/sft"
    write(stage / "base.json", {"base": "../base"})
    write(stage / "config.json", {})
    table = {"common": {"dataset": "planted"}, "training": {"lora_r": 4}}
    run = {"name": "second", "method": "sdpo", "after": "first/sft", "stages": "sdpo"}
    command = command_of(table, run, tmp_path, 2)
    wanted = {"--nproc_per_node=2", f"--model={stage}", "--lora_r=4", "--resume=auto"}
    assert wanted <= set(command) and "--method=sdpo" not in command
    run = {"name": "b", "script": "studies.sequential", "method": "caser"}
    flags = ["--dataset=planted", "--method=caser", f"--output_dir={tmp_path / 'b'}"]
    assert command_of(table, run, tmp_path, 2)[1:] == ["-m", "studies.sequential", *flags]


@pytest.mark.parametrize("file", sorted((ROOT / "configs/tables").glob("*.json")), ids=str)
def test_committed_tables_name_methods_and_hold_options_that_exist(file):
    """A method has one run a seed, no loss has the chosen title's NLL added, and baselines know
    their options (test_options.py: those of training); an open table asks for its data."""
    table = json.loads(file.read_text())
    assert "sft_weight" not in file.read_text()
    names = [run["name"] for run in table["runs"]]
    rows = [(run["method"], run.get("seed", 0)) for run in table["runs"]]
    assert len(set(names)) == len(names) and len(set(rows)) == len(rows)
    for run in table["runs"]:
        assert run.get("after", names[0]).split("/")[0] in names
        if "script" in run:
            own = {k: v for k, v in run.items() if k not in ("name", "script")}
            BaselineConfig(**table["common"] | own | {"dataset": "planted"})
    given = argparse.Namespace(table=file, dataset="", data_dir="", prepared_dir="", model="")
    if "dataset" not in table["common"]:
        with pytest.raises(ValueError, match="leaves the data set open: --dataset"):
            read_table(given)


def test_what_is_missing_or_of_other_data_is_measured(tmp_path, monkeypatch, capsys):
    """By one command a run, in its log; a failure is named, and the rest goes on; without a log, or
    with a split in time, less can be measured."""
    run = write_stage(tmp_path, "sft", [1, 0], prepared_dir="p")
    write_probe(run, "sft", "adherence", "hit_ratio@1", [1, 0])
    write_probe(run, "sft", "avoidance", "avoidance", [1, 0], data_hash="of another log")
    calls = []

    def fake(what, command, log):
        calls.append((command[2], log.name, [f.split("=")[1] for f in command if "--probe=" in f]))
        if "--probe=length" in command:
            raise ValueError("no such thing")

    monkeypatch.setattr("studies.tables.execute", fake)
    measure_missing(tmp_path, "all")
    probes = [name for script, _, names in calls for name in names]
    assert probes == ["temptation", "avoidance", "aversion", "length", "popularity", "retrieved"]
    assert calls[-1] == ("studies.two_stage", "sft-0.log", [])
    assert "sft-0, length: not measured: no such thing" in capsys.readouterr().out
    monkeypatch.setattr("studies.tables.execute", lambda *call: calls.append(call))
    for options, expected in (({"split_date": "10%"}, 4), ({"dataset": "prepared"}, 1)):
        calls.clear()
        other = write_stage(tmp_path / "o", "sft", [1], name=str(expected), **options)
        for name in MEASURED:
            measure(other, name)
        assert len(calls) == expected
    with pytest.raises(ValueError, match="speed: all, or some of adherence"):
        measure_missing(tmp_path, "length,speed")


@pytest.mark.slow
def test_a_small_table_runs_and_is_skipped_when_done(tmp_path):
    """Two runs, a baseline and a probe by one command; the second call does nothing;
    the report stands on them."""
    training = {"model": str(ROOT / "demo/base"), "batch_size": 8, "lora_r": 4, "max_steps": 2}
    common = {"dataset": "planted", "planted_users": 150, "train_size": 20, "test_size": 8}
    runs = [
        {"name": "a", "method": "{stage}", "stages": "sft,sdpo"},
        {"name": "b", "method": "recpo", "after": "a/sft", "stages": "recpo"},
        {"name": "m", "script": "studies.sequential", "method": "gru4rec", "epochs": 1},
    ]
    table = {"common": common, "training": training, "runs": runs}
    write(tmp_path / "t.json", table | {"probes": ["adherence"], "probed": ["a"]})
    flags = (f"--output_dir={tmp_path / 'runs'}", f"--prepared_dir={tmp_path / 'prepared'}")
    for again in (False, True):
        done = run_script("studies.tables", tmp_path / "t.json", *flags)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("finished before") == (3 if again else 0)
    for again in (False, True):
        made = run_script("studies.report", tmp_path / "runs", "--measure", "retrieved,two_stage")
        assert made.returncode == 0 and ("a, retrieved: " in made.stdout) == (not again)
        for text in ("| gru4rec |", "**adherence**", "## Harder lists", "| + sdpo |"):
            assert text in made.stdout, text
