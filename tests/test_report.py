"""The report, its figures and the runner of tables."""

import json
import re
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from launch import ROOT, run_script
from test_loaders import log_of

from studies import report
from studies.agreement import agreement_text
from studies.methods import Method, Result, collect, difference_of, same_seeds, sweep
from studies.popularity import beyond_accuracy, catalogue_of
from studies.report import report_text
from studies.statistics import Difference, holm, mcnemar
from train import TrainConfig

STEP = "rewards/accuracies", "logps/chosen", "logps/rejected", "margins/satisfied", "loss"
HITS = "hit_ratio@1/written"


def predictions(cases, hits, valid, logps) -> str:
    """Lines of predictions.jsonl; cases: (user, candidates, target's slot)."""
    lines = []
    for (user, titles, slot), hit, ok, row in zip(cases, hits, valid, logps, strict=True):
        record = {"user": user, "candidates": titles, "target": titles[slot], "target_slot": slot}
        record |= {"hit": bool(hit), "valid": bool(ok), "logps": row, "answer": "x"}
        lines.append(json.dumps(record))
    return "\n".join(lines)


def write(file: Path, text: str | dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text if isinstance(text, str) else json.dumps(text))


def write_stage(folder: Path, stage: str, hits: list, name="", valid=1.0, users="u", **config):
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
        steps = [dict.fromkeys(STEP, 0.5) | {"rewards/margins": s} for s in range(1, 30)]
        write(run / stage / "metrics.jsonl", "".join(json.dumps(s) + "\n" for s in steps))
    return run


def write_probe(run: Path, stage: str, probe: str, figure: str, values: list, **content) -> None:
    """What studies.probes leaves; written and ranked alike."""
    facts = {"probe": probe, "n": len(values), "cases": probe, "data_hash": "abc", "lengths": []}
    facts |= {"references": {"chance": {figure: [0.05] * len(values)}}}
    facts |= {how: {figure: values} for how in ("written", "ranked")}
    write(run / "probes" / stage / probe / "metrics.json", facts | content)


def test_every_figure_of_the_recorded_report_is_found_again(tmp_path):
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


# ------------------------------------------------------------------------------------------ figures
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


def test_holm_steps_down():
    """The k-th clearest of m at 5 % / (m - k + 1); those behind a failure at its level."""
    draws, unclear = np.random.default_rng(0).standard_normal((4, 200_000)), "not distinguishable"
    # two-sided p: 6e-5, .009, .036, .040
    family = [Difference(z, z + draws[n]) for n, z in enumerate((4.0, 2.6, 2.1, 2.05))]
    holm(family[::-1])
    assert [d.verdict for d in family] == ["higher", "higher", unclear, unclear]
    # quantiles of the normal at 5 % / 4, / 3, / 2, / 2
    for difference, z in zip(family, (2.498, 2.394, 2.241, 2.241), strict=True):
        low, high = difference.interval
        assert (high - low) / 2 == pytest.approx(z, abs=0.04)


def made(name: str, values, seeds=None, **config) -> Method:
    results = []
    for seed, v in zip(seeds or range(len(values)), values, strict=True):
        hits = {HITS: np.array(v, float)}
        results.append(Result(name, name, seed, Path(), config, {}, [], [], hits, {}))
    return Method(name, name, config, results)


def test_differences_are_paired_over_users_and_seeds():
    """One that every user shares is seen although both intervals overlap, noise is not; a seed that
    one method lacks is left out."""
    base = np.random.default_rng(2).integers(0, 2, 400)
    better, other = (
        np.maximum(base, np.arange(400) < 20),
        np.random.default_rng(3).permutation(base),
    )
    for a, b, verdict in (
        (better, base, "higher"), (base, better, "lower"), (base, other, "not distinguishable"),
    ):  # fmt: skip
        difference = difference_of(made("a", [a]), made("b", [b]), HITS)
        holm([difference])
        assert difference.verdict == verdict
    found = difference_of(made("a", [base, better, better]), made("b", [base]), HITS)
    assert found.mean == 0 and found.runs == (1, 1)


def catalogue(counts: list[int]) -> dict:
    """Item i has counts[i] training interactions: each user's last two are of two more items."""
    rows = [(user, item, 5, item) for item, n in enumerate(counts) for user in range(n)]
    rows += [(user, 1000 + n, 5, 10**6 + n) for user in range(max(counts)) for n in range(2)]
    log = log_of(rows)
    return catalogue_of(SimpleNamespace(interactions=log))


def test_popularity_and_calibration_of_a_worked_example():
    """Counts 1, 3, 3, 0, 0: the last two items occur where training does not look. Bins .9 to 1
    (right once of twice) and .7 to .8: 2/4 |.5 - .95| + 2/4 |0 - .75|."""
    percentiles, top = zip(*catalogue([1, 3, 3]).values(), strict=True)
    assert percentiles == pytest.approx([0.5, 0.8, 0.8, 0.2, 0.2])  # equals count half
    assert top == (False, True, False, False, False)
    _, top = zip(*catalogue([1] * 148 + [2, 3, 4]).values(), strict=True)
    assert np.flatnonzero(top).tolist() == [150]  # 1 % of 153
    records = [
        {"candidates": [f"item {t}", ""], "target_slot": hit, "logps": [np.log(p), np.log(1 - p)]}
        for t, p, hit in ((1, 0.95, 0), (1, 0.95, 1), (0, 0.75, 1), (1, 0.75, 1))
    ]
    expected = {"coverage": 2 / 5, "top": 3 / 4, "percentile": (0.5 + 3 * 0.8) / 4}
    expected |= {"calibration": 0.5 * 0.45 + 0.5 * 0.75}
    result = SimpleNamespace(records=records)
    assert beyond_accuracy(result, catalogue([1, 3, 3])) == pytest.approx(expected)


def test_two_evaluations_are_compared_user_by_user():
    """One user as before, one whose log-probs all fall by .5, one whose order is reversed, one
    whose answer is no title."""
    facts = {"target": "a", "candidates": ["a", "b", "c"], "target_slot": 0}
    facts |= {"logps": [-1.0, -2.0, -3.0], "hit": True, "valid": True}
    before = [facts | {"user": str(u)} for u in range(4)]
    changes = {}, {"logps": [-1.5, -2.5, -3.5]}, {"logps": [-3.0, -2.0, -1.0], "hit": False}
    changes += ({"hit": False, "valid": False},)
    text = agreement_text(before, [r | c for r, c in zip(before, changes, strict=True)])
    for line in (
        "| HR@1 written | 1.000 | 0.500 | -0.5000 [-1.000, +0.000] |",
        "root mean square 0.8539",  # changes: 0; -.5 each; -2, 0, 2; 0
        "same title first in 0.7500 [0.250, 1.000] of the lists",
    ):
        assert line in text, line


# ------------------------------------------------------------------------------------------ methods
def test_one_name_stands_for_one_method_on_one_set_of_users(tmp_path):
    first = write_stage(tmp_path / "a", "recpo", [1, 0, 1])
    other = write_stage(tmp_path / "a", "recpo", [1, 1, 1], name="l4", margin_lambda=4.0)
    assert list(collect(tmp_path / "a", {})) == ["recpo-0/recpo", "recpo-l40/recpo"]
    twice = {"runs": [{"name": run.name, "method": "a"} for run in (first, other)]}
    with pytest.raises(ValueError, match="recpo-0 and .*recpo-l40 .*'a' and differ in margin_lam"):
        collect(tmp_path / "a", twice)
    write(other / "config.json", (first / "config.json").read_text())
    with pytest.raises(ValueError, match="recpo-l40 .* have seed 0; give one of them another"):
        collect(tmp_path / "a", twice)
    write_probe(first, "recpo", "adherence", "hit_ratio@1", [1, 0], cases="a")
    for facts, culprit in (
        ({"cases": "b"}, r"candidates \(adherence\)"),
        ({"data_hash": "other"}, "recpo/adherence/metrics.json was measured on other data"),
    ):
        write_probe(other, "recpo", "adherence", "hit_ratio@1", [1, 0], **facts)
        with pytest.raises(ValueError, match=culprit):
            collect(tmp_path / "a", {})
    write_stage(tmp_path / "b", "recpo", [1, 0, 1])
    write_stage(tmp_path / "b", "sdpo", [1, 0, 1], users="v")
    with pytest.raises(ValueError, match=r"recpo-0 .*sdpo-0 .*different users .*\(test\)"):
        report_text(collect(tmp_path / "b", {}))


def test_a_sweep_changes_one_option():
    """λ = 0 is S-DPO if it was trained alike; a curve needs the seeds of all its points."""
    plain, methods = asdict(TrainConfig()), {}
    for stage, options in (
        ("recpo", {}), ("recpo", {"margin_lambda": 4.0}), ("recpo", {"num_negatives": 1}),
        ("recpo", {"margin": "log_diff"}), ("recpo", {"margin_lambda": 1.0, "decay": 1.0}),
        ("sdpo", {}), ("sft", {}), ("sft", {"ratings": False}),
    ):  # fmt: skip
        seeds = [0] if options else [1, 0]
        method = made(stage, [[1.0]] * len(seeds), seeds, **plain | options)
        methods[f"{stage}{options or ''}"] = method
    ladder = [(value, m is methods["sdpo"]) for value, m in sweep(methods, "margin_lambda")]
    assert ladder == [(0.0, True), (2.0, False), (4.0, False)]
    assert [value for value, _ in sweep(methods, "margin")] == ["log_diff", "ratio"]
    inputs = sweep(methods, "history_items", "ratings", stage="sft")
    assert [value for value, _ in inputs] == [("all", False), ("all", True)]
    values, points = zip(*sweep(methods, "num_negatives"), strict=True)
    assert values == (1, 3)
    assert [[r.seed for r in m.results] for m in same_seeds(points)] == [[0], [0]]
    methods["sdpo"].config["learning_rate"] = 5e-4
    assert [value for value, _ in sweep(methods, "margin_lambda")] == [2.0, 4.0]


# --------------------------------------------------------------------------------------- the report
def test_the_report_judges_the_findings_of_the_paper(tmp_path, monkeypatch):
    """tests/recorded/findings.json: runs (stage, method, hits, options) and verdicts by hand."""
    made_up = json.loads((ROOT / "tests/recorded/findings.json").read_text())
    base, more = np.random.default_rng(0).integers(0, 2, (2, 200))
    hits = {"base": base.tolist(), "other": (1 - base).tolist()}
    hits["good"] = np.maximum(base, more).tolist()
    lengths, runs = np.repeat([10, 20, 30, 40, 50], 40), []
    uneven, even = (lengths == 10).astype(float).tolist(), [0.0, 1.0] * 100
    for stage, method, kind, options in made_up["runs"]:
        run = write_stage(tmp_path, stage, hits[kind], **options)
        runs.append({"name": run.name, "method": method})
        if method in ("sft", "sdpo", "recpo"):
            best, worst, spread = hits["base"], hits["good"], uneven
            if stage == "recpo":
                best, worst, spread = hits["good"], hits["base"], even
            write_probe(run, stage, "adherence", "hit_ratio@1", best)
            write_probe(run, stage, "aversion", "hit_ratio@1", worst)
            write_probe(run, stage, "temptation", "takes the disliked one", worst)
            write_probe(run, stage, "length", "hit_ratio@1", spread, lengths=lengths.tolist())
    write(tmp_path / "table.json", {"runs": runs})
    monkeypatch.setattr("studies.statistics.RESAMPLES", 4000)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path), "--note", "made up"])
    report.main()
    text = (tmp_path / "report/report.md").read_text()
    judged = dict(re.findall(r"\| (.+?) \| 1 against 1 \| (.+?):", text))
    assert made_up["judged"].items() <= judged.items()
    assert "HR@1 of recpo varies less with history length than that of sdpo | held: 0.0" in text
    assert " of recpo above λ" not in text and "gru4rec" not in text  # nothing to answer by
    assert "| recpo | 1 | 0.500 | 28.000 |" in text  # training ends: the last tenth of 29 steps
    assert "made up" in text and json.loads((tmp_path / "report/table.json").read_text())["runs"]
    pytest.importorskip("matplotlib")
    pictures = set(re.findall(r"\]\((.*)\.png\)", text))
    assert pictures == {"methods", "curves", "margin_lambda", "inputs", "probes", "length"}
    assert all((tmp_path / f"report/{p}.png").stat().st_size > 10_000 for p in pictures)


@pytest.mark.slow
def test_a_small_table_runs_and_is_skipped_when_done(tmp_path):
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
        assert done.stdout.count("finished before") == again  # train.py says it in its log
    assert (tmp_path / "runs/a.log").read_text().count("finished before") == 2
    for again in (False, True):
        made = run_script("studies.report", tmp_path / "runs", "--measure", "retrieved,two_stage")
        assert made.returncode == 0 and ("a, retrieved: " in made.stdout) == (not again)
        for text in ("| gru4rec |", "**adherence**", "## Harder lists", "| + sdpo |"):
            assert text in made.stdout, text
