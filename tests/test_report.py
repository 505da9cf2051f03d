"""The report and the runner: what is compared with what, when it refuses, and what is skipped."""

import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from data import DataConfig, prepare
from options import TrainConfig
from report import (
    Method,
    Result,
    bootstrap,
    check_candidates,
    collect,
    compare,
    data_table,
    grouped,
    mcnemar,
    method_name,
    sweep,
)
from sequential import BaselineConfig
from tables import command_of, flags_of, is_finished

ROOT = Path(__file__).parents[1]


def write_stage(
    folder: Path,
    stage: str,
    hits: list[int],
    valid: float = 1.0,
    users: str = "u",
    probe_gain: int | None = None,
    **config,
):
    """A finished stage whose predictions hit where `hits` says so."""
    run = folder / f"{stage}-{config.get('name', '')}{config.get('seed', 0)}"
    settings = {
        "dataset": "planted",
        "stages": stage,
        "seed": 0,
        "margin": "ratio",
        "margin_lambda": 2.0,
        "num_negatives": 3,
        "decay": 0.5,
    } | config
    (run / stage / "eval").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(settings))
    records = []
    for n, hit in enumerate(hits):
        logps = [0.0] * 20
        logps[3 if hit else 4] = 1.0
        records.append({"user": f"{users}{n}", "candidates": [f"c{i}" for i in range(20)], "target": "c3", "target_slot": 3, "hit": bool(hit),
                        "valid": n < valid * len(hits), "answer": "c3", "logps": logps})  # fmt: skip
    metrics = {"n": len(hits), "data_hash": "abc", "baselines": {"chance": 0.05, "Markov": 0.3}}
    (run / stage / "eval/metrics.json").write_text(json.dumps(metrics))
    (run / stage / "eval/predictions.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in records)
    )
    steps = [{"phase": stage, "step": s, "loss": 1 / s, "rewards/margins": s, "rewards/accuracies": 0.5, "logps/chosen": -s,
              "logps/rejected": -2 * s, "margins/satisfied": 0.1} for s in range(1, 30)]  # fmt: skip
    (run / stage / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in steps))
    if probe_gain is not None:
        for probe in ("adherence", "avoidance"):
            out = run / "probes" / stage / probe
            out.mkdir(parents=True)
            rows = {
                "chance": {"hit_ratio@1": 0.05, "hit_ratio@1_ci95": [0, 0.1]},
                f"{stage}, written": {"hit_ratio@1": 0.2, "hit_ratio@1_ci95": [0.1, 0.3]},
            }
            (out / "metrics.json").write_text(
                json.dumps({"probe": probe, "n": len(hits), "rows": rows})
            )
            probed = [r | {"hit": n < probe_gain} for n, r in enumerate(records)]
            (out / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in probed))


def report(folder: Path, *flags) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        str(ROOT / "report.py"),
        str(folder),
        "--output_dir",
        str(folder / "out"),
        *flags,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_mcnemar_is_the_exact_binomial_test():
    """Against a sum over all outcomes of the users on whom the two differ."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 2, (2, 14))
        differ = np.flatnonzero(a != b)
        found = min(a[differ].sum(), len(differ) - a[differ].sum())
        outcomes = [
            min(sum(o), len(o) - sum(o)) <= found for o in product((0, 1), repeat=len(differ))
        ]
        assert mcnemar(a, b) == pytest.approx(np.mean(outcomes), abs=1e-9)
    assert mcnemar(np.ones(40), np.zeros(40)) == pytest.approx(2 * 0.5**40)
    assert math.isclose(mcnemar(np.ones(5), np.ones(5)), 1.0)


def test_bootstrap_interval_is_that_of_the_mean():
    """About 1.96 standard errors on both sides for many users; the same numbers every time."""
    values = np.random.default_rng(1).normal(0.3, 1, 4000)
    low, high = bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half) and high == pytest.approx(
        values.mean() + half, abs=0.1 * half
    )
    assert bootstrap(values) == (low, high)


def test_differences_are_paired_and_named():
    """A difference that every user shares is seen although both intervals overlap; noise is not distinguishable."""

    def method(name: str, values) -> Method:
        return Method(
            name,
            [
                Result(
                    name, Path(), {"seed": 0}, Path(), {"hit_ratio@1": np.array(v, float)}, "", {}
                )
                for v in values
            ],
        )

    base = np.random.default_rng(2).integers(0, 2, 400)
    better = base.copy()
    better[np.flatnonzero(base == 0)[:20]] = 1
    assert compare(method("a", [better]), method("b", [base]), "hit_ratio@1")[0] == "higher"
    assert compare(method("b", [base]), method("a", [better]), "hit_ratio@1")[0] == "lower"
    other = np.random.default_rng(3).permutation(base)
    assert (
        compare(method("a", [base]), method("b", [other]), "hit_ratio@1")[0]
        == "not distinguishable"
    )
    three, one = method("a", [base, better, better]), method("b", [base])
    for seed, result in enumerate(three.results):
        result.config["seed"] = seed
    assert compare(three, one, "hit_ratio@1")[1] == 0  # seed 0 against seed 0 alone
    seeds = method("a", [base, better])
    assert seeds.per_user("hit_ratio@1").tolist() == ((base + better) / 2).tolist()


def test_seeds_are_one_method_and_settings_are_named(tmp_path):
    """Runs that differ in the seed alone are averaged; margins, λ, K, decay and inputs make methods of their own."""
    for seed in range(3):
        write_stage(tmp_path, "recpo", [1, 0, seed % 2], seed=seed)
    write_stage(tmp_path, "recpo", [1, 1, 1], margin_lambda=4.0, name="l4")
    write_stage(tmp_path, "recpo", [0, 1, 1], margin="log_diff", name="diff")
    methods = grouped(collect(tmp_path))
    assert {name: len(m.results) for name, m in methods.items()} == {
        "recpo": 3,
        "recpo log_diff": 1,
        "recpo λ=4": 1,
    }
    assert methods["recpo"].mean("hit_ratio@1") == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert method_name("sdpo", {"num_negatives": 7, "margin_lambda": 1.0}) == "sdpo K=7"
    assert (
        method_name("sft", {"history_items": "positive", "ratings": False})
        == "sft, liked items only, no ratings"
    )


def test_other_candidates_are_refused(tmp_path):
    """Stages tested on other users or candidates cannot stand in one table; the folders are named."""
    write_stage(tmp_path, "sft", [1, 0, 1])
    write_stage(tmp_path, "sdpo", [1, 0, 1], users="v")
    with pytest.raises(ValueError, match="different users or candidates.*sdpo"):
        check_candidates(collect(tmp_path))
    done = report(tmp_path)
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and "cannot stand in one table" in done.stderr
    )
    assert report(tmp_path / "nothing").returncode == 2


def test_the_report_has_tables_claims_and_pictures(tmp_path):
    """Counting rows, intervals, paired verdicts, probes, the λ sweep; every picture named in it is there."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, 200)
    good = np.maximum(base, rng.integers(0, 2, 200)).tolist()
    write_stage(tmp_path, "sft", base.tolist(), probe_gain=40)
    write_stage(tmp_path, "sdpo", base.tolist(), probe_gain=40)
    write_stage(tmp_path, "recpo", good, valid=0.8, probe_gain=120)
    write_stage(tmp_path, "recpo", good, valid=0.5, margin_lambda=4.0, name="l4")
    done = report(tmp_path, "--note", "made up")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out/report.md").read_text()
    for part in ("made up", "| Markov | | | 0.3000 | |", "to recpo: lower", "HR@1 of recpo above sdpo | held", "HR@1 of sdpo above sft | not distinguishable",
                 "λ lowers ValidRatio (0 to 4) | held", "adherence (hit_ratio@1) of recpo above sft | held", "avoidance (avoidance) of recpo above sft | not held",
                 "**adherence**"):  # fmt: skip
        assert part in text, part
    pytest.importorskip("matplotlib")
    pictures = [
        line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")
    ]
    assert {"curves.png", "margin_lambda.png", "margins.png"} <= set(pictures)
    assert all((tmp_path / "out" / p).stat().st_size > 10_000 for p in pictures)


def test_table_3_stands_beside_the_paper_s(tmp_path):
    """The prepared examples are found by their hash; without them a line says how to get the statistics."""
    config = DataConfig(planted_users=100, followers=3, train_size=12, prepared_dir=str(tmp_path))
    made = prepare(config)
    text = data_table(vars(config), made.hash[:12])
    assert "| after --core 0 | 100 |" in text and "train: 12 examples" in text
    assert "not at hand" in data_table(vars(config), "0123456789ab")


def test_a_sweep_changes_one_option():
    """λ = 0 is S-DPO; other margins, losses and inputs stay outside."""

    def method(stage, **config):
        config = {
            "margin": "ratio",
            "margin_lambda": 2.0,
            "num_negatives": 3,
            "decay": 0.5,
        } | config
        return Result(method_name(stage, config), Path(), config, Path(), {}, "", {})

    results = [method("sdpo"), method("recpo"), method("recpo", margin_lambda=4.0), method("recpo", num_negatives=1),
               method("recpo", decay=1.0), method("recpo", margin="log_diff"), method("recpo", margin_lambda=1.0, num_negatives=5),
               method("recpo", margin_lambda=1.0, ratings=False), method("sft")]  # fmt: skip
    methods = grouped(results)
    assert [(v, m.name) for v, m in sweep(methods, "margin_lambda")] == [
        (0.0, "sdpo"),
        (2.0, "recpo"),
        (4.0, "recpo λ=4"),
    ]
    assert [v for v, _ in sweep(methods, "num_negatives")] == [1, 3] and [
        v for v, _ in sweep(methods, "decay")
    ] == [0.5, 1.0]


# ------------------------------------------------------------------------------------------------ the runner
def test_commands_carry_common_and_own_options(tmp_path):
    """Flags of every kind; a run that goes on from another one's stage gets its model; baselines get no training options."""
    assert flags_of({"a": 1, "b": True, "c": False, "d": "x"}) == [
        "--a=1",
        "--b",
        "--no_c",
        "--d=x",
    ]
    stage = tmp_path / "first/sft"
    stage.mkdir(parents=True)
    (stage / "base.json").write_text('{"base": "../base"}')
    (stage / "config.json").write_text("{}")
    table = {"common": {"dataset": "planted"}, "training": {"lora_r": 4}}
    command, _ = command_of(
        table, {"name": "second", "after": "first/sft", "stages": "sdpo"}, tmp_path, {}, 2
    )
    assert (
        "--nproc_per_node=2" in command
        and f"--model={stage}" in command
        and "--lora_r=4" in command
        and "--resume=auto" in command
    )
    command, _ = command_of(
        table, {"name": "b", "script": "sequential.py", "method": "caser"}, tmp_path, {}, 2
    )
    assert command[1:] == [
        str(ROOT / "sequential.py"),
        "--dataset=planted",
        "--method=caser",
        f"--output_dir={tmp_path / 'b'}",
    ]
    assert not is_finished(tmp_path / "first", {}, "train.py")


@pytest.mark.parametrize("name", ["planted", "planted-sweeps", "movielens", "paper", "inputs"])
def test_committed_tables_hold_options_that_exist(name):
    """Every option of every run is one of its script; what a table leaves open is asked for by name."""
    table = json.loads((ROOT / f"configs/tables/{name}.json").read_text())
    for run in table["runs"]:
        own = {k: v for k, v in run.items() if k not in ("name", "script", "after")}
        if run.get("script") == "sequential.py":
            BaselineConfig(**table["common"] | own | {"dataset": "planted"})
        else:
            TrainConfig(**table["common"] | table["training"] | own | {"dataset": "planted"})
        assert (
            run.get("after", "first/sft").split("/")[0] in [r["name"] for r in table["runs"]]
            or "after" not in run
        )


def test_an_open_table_asks_for_model_and_data():
    command = [
        sys.executable,
        str(ROOT / "tables.py"),
        str(ROOT / "configs/tables/paper.json"),
        f"--output_dir={ROOT}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "leaves the data set open: --dataset" in done.stderr


@pytest.mark.slow
def test_a_small_table_runs_and_is_skipped_when_done(tmp_path):
    """Two runs, a baseline and a probe by one command; the second call does nothing; the report stands on them."""
    training = {
        "model": "tiny",
        "tiny_layers": 2,
        "tiny_vocab_size": 512,
        "batch_size": 8,
        "lora_r": 4,
        "copy_steps": 3,
        "max_steps": 2,
    }
    table = {"common": {"dataset": "planted", "planted_users": 150, "train_size": 20, "test_size": 8}, "training": training, "probes": ["adherence"], "probed": ["a"],
             "runs": [{"name": "a", "stages": "sft,sdpo"}, {"name": "b", "after": "a/sft", "stages": "recpo"},
                      {"name": "m", "script": "sequential.py", "method": "markov"}]}  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps(table))
    command = [sys.executable, str(ROOT / "tables.py"), "t.json", "--output_dir=runs"]
    for again in (False, True):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("finished before") == (3 if again else 0)
    made = report(tmp_path / "runs")
    assert made.returncode == 0 and "| markov |" in made.stdout and "**adherence**" in made.stdout
