"""The report and the runner: what is compared with what, when it refuses, and what is skipped."""

import json
import math
import subprocess
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, run_script

from loaders.frozen import DataConfig, prepare
from studies.measure import flags_of, jobs_of, measure_missing, wanted_kinds
from studies.methods import Method, compare, grouped, option_text, sweep
from studies.probes import PROBE_NAMES
from studies.report import data_table, main_table, rate_lines
from studies.results import NOT_THE_METHOD, Result, check_candidates, collect, settings_of
from studies.sequential import BaselineConfig
from studies.statistics import Difference, bootstrap, judge, mcnemar
from studies.tables import command_of, is_finished
from train import TrainConfig


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
    run = folder / f"{stage}-{config.pop('name', '')}{config.get('seed', 0)}"
    settings = {"dataset": "planted", "stages": stage, "seed": 0} | config
    (run / stage / "eval").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(settings))
    records = []
    for n, hit in enumerate(hits):
        logps = [0.0] * 20
        logps[3 if hit else 4] = 1.0
        records.append({
            "user": f"{users}{n}", "candidates": [f"c{i}" for i in range(20)],
            "target": "c3", "target_slot": 3, "answer": "c3", "logps": logps,
            "hit": bool(hit), "valid": n < valid * len(hits),
        })  # fmt: skip
    metrics = {"n": len(hits), "data_hash": "abc", "baselines": {"chance": 0.05, "Markov": 0.3}}
    (run / stage / "eval/metrics.json").write_text(json.dumps(metrics))
    (run / stage / "eval/predictions.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in records)
    )
    steps = [
        {
            "phase": stage, "step": s, "loss": 1 / s,
            "rewards/margins": s, "rewards/accuracies": 0.5,
            "logps/chosen": -s, "logps/rejected": -2 * s, "margins/satisfied": 0.1,
        }
        for s in range(1, 30)
    ]  # fmt: skip
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
    return run_script("studies.report", folder, "--output_dir", folder / "out", *flags)


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


def made(name: str, values, seeds=None) -> Method:
    """A method whose runs have these values per user."""
    results = []
    for seed, v in zip(seeds or range(len(values)), values, strict=True):
        hits = {"hit_ratio@1": np.array(v, float)}
        results.append(Result(name, Path(), {"seed": seed}, Path(), {}, hits, {}, {}))
    return Method(name, results)


def test_differences_are_paired_and_named():
    """A difference that every user shares is seen although both intervals overlap;
    noise is not distinguishable."""
    base = np.random.default_rng(2).integers(0, 2, 400)
    better = base.copy()
    better[np.flatnonzero(base == 0)[:20]] = 1
    other = np.random.default_rng(3).permutation(base)
    for a, b, expected in (
        (better, base, "higher"),
        (base, better, "lower"),
        (base, other, "not distinguishable"),
    ):
        assert compare(made("a", [a]), made("b", [b]), "hit_ratio@1").verdict == expected


def test_runs_are_paired_by_seed():
    """A seed that one method lacks is left out of the comparison,
    and the runs behind it are counted."""
    base = np.random.default_rng(2).integers(0, 2, 400)
    better = np.maximum(base, np.arange(400) < 20)
    found = compare(made("a", [base, better, better]), made("b", [base]), "hit_ratio@1")
    assert found.mean == 0 and found.runs == (1, 1)
    found = compare(
        made("a", [better] * 2, [1, 2]), made("b", [base] * 3, [0, 1, 2]), "hit_ratio@1"
    )
    assert found.mean > 0 and found.runs == (2, 2)
    seeds = made("a", [base, better])
    assert seeds.per_user("hit_ratio@1").tolist() == ((base + better) / 2).tolist()


def test_holm_steps_down():
    """The k-th clearest of m is judged at 5 % / (m - k + 1);
    what lies behind the first failure fails at its level."""
    rng = np.random.default_rng(0)

    def normal(z: float) -> Difference:
        return Difference(z, z + rng.standard_normal(200_000), (1, 1))

    # two-sided p of z: 4.0 6e-5, 2.6 .009, 2.1 .036, 2.05 .040
    clear, second, third, fourth = family = [normal(z) for z in (4.0, 2.6, 2.1, 2.05)]
    judge(family[::-1])
    verdicts = [d.verdict for d in family]
    assert verdicts == ["higher", "higher", "not distinguishable", "not distinguishable"]
    # quantiles of the normal at 5 % / 4, / 3, / 2, / 2
    for difference, z in ((clear, 2.498), (second, 2.394), (third, 2.241), (fourth, 2.241)):
        low, high = difference.interval
        assert (high - low) / 2 == pytest.approx(z, abs=0.04)
    alone = normal(-2.1)
    judge([alone])
    assert alone.verdict == "lower"


def test_holm_keeps_noise_out_of_the_claims():
    """Of 300 tables of 8 comparisons without any difference at most about 5 % name one;
    uncorrected a third would."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        family = [Difference(z, z + rng.standard_normal(4000), (1, 1)) for z in rng.normal(size=8)]
        judge(family)
        wrong += any(d.verdict != "not distinguishable" for d in family)
    assert wrong / 300 < 0.09


def names_of(folder: Path) -> dict[str, list[int]]:
    return {name: sorted(m.seeds) for name, m in grouped(collect(folder)).items()}


def test_seeds_are_one_method_and_settings_are_named(tmp_path):
    """Runs that differ in the seed alone are averaged;
    margins, λ, K, decay and inputs make methods of their own."""
    for seed in range(3):
        write_stage(tmp_path, "recpo", [1, 0, seed % 2], seed=seed)
    write_stage(tmp_path, "recpo", [1, 1, 1], margin_lambda=4.0, name="l4")
    write_stage(tmp_path, "recpo", [0, 1, 1], margin="log_diff", name="diff")
    write_stage(tmp_path, "sdpo", [0, 1, 1], num_negatives=7, name="K")
    inputs = {"history_items": "positive", "ratings": False}
    write_stage(tmp_path, "sft", [0, 1, 1], **inputs)
    assert names_of(tmp_path) == {
        "sft, liked items only, no ratings": [0],
        "sdpo K=7": [0],
        "recpo": [0, 1, 2],
        "recpo log_diff": [0],
        "recpo λ=4": [0],
    }
    methods = grouped(collect(tmp_path))
    assert methods["recpo"].mean("hit_ratio@1") == pytest.approx((1 + 0 + 1 / 3) / 3)


@pytest.mark.parametrize(
    "option, value",
    [(f.name, f.default) for f in fields(TrainConfig) if f.name not in NOT_THE_METHOD],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_option_makes_a_method_of_its_own(option, value):
    """Two runs that differ in any option but seed and paths never become one row,
    and the name shows the option."""
    config = asdict(TrainConfig(stages="sft,recpo"))
    other = (
        not value if isinstance(value, bool) else value + 1 if not isinstance(value, str) else "x"
    )
    results = []
    for seed, changes in enumerate(({}, {}, {option: other})):
        own = config | changes | {"seed": seed, "output_dir": f"runs/{seed}"}
        settings = settings_of("recpo", Path(f"runs/{seed}"), own)
        results.append(Result("recpo", Path(), own, Path(), settings, {}, {}, {}))
    methods = grouped(results)
    assert [m.seeds for m in methods.values()] == [[0, 1], [2]]
    name = list(methods)[1]
    shown = option_text(option, float(other) if type(other) is int else other)
    assert shown in name or f"sft {option}=" in name


def test_beta_weight_and_rate_are_three_methods(tmp_path):
    """The three runs that once became one row of "seeds"."""
    for seed, changes in enumerate(({"beta": 0.1}, {"sft_weight": 1.0}, {"learning_rate": 1e-3})):
        write_stage(tmp_path, "recpo", [1, 0, 1], seed=seed, **changes)
    write_stage(tmp_path, "recpo", [1, 0, 1], seed=3)
    expected = {"recpo", "recpo β=0.1", "recpo + NLL", "recpo, learning_rate=0.001"}
    assert set(names_of(tmp_path)) == expected


def test_a_seed_counts_once(tmp_path):
    """The same settings and seed tested twice are one run;
    the report names the one that is left out."""
    write_stage(tmp_path, "recpo", [1, 0, 1], seed=0, name="a")
    write_stage(tmp_path, "recpo", [1, 1, 1], seed=0, name="b")
    write_stage(tmp_path, "recpo", [0, 0, 0], seed=1)
    methods = grouped(collect(tmp_path))
    assert names_of(tmp_path) == {"recpo": [0, 1]}
    assert methods["recpo"].mean("hit_ratio@1") == pytest.approx((2 / 3 + 0) / 2)
    assert "recpo-b0" in main_table(methods, "planted")


def test_a_stage_carries_the_settings_that_it_started_from(tmp_path):
    """Another SFT behind the same preference options is another method;
    the same one from another folder is not."""
    write_stage(tmp_path, "recpo", [1, 0, 1], stages="sft,recpo", seed=0)
    for folder, seed, epochs in (("same", 1, 5.0), ("longer", 2, 9.0)):
        (tmp_path / folder / "sft").mkdir(parents=True)
        started = {"stages": "sft", "dataset": "planted", "seed": seed, "sft_epochs": epochs}
        (tmp_path / folder / "config.json").write_text(json.dumps(started))
        model = str(tmp_path / folder / "sft")
        write_stage(tmp_path, "recpo", [1, 0, 1], seed=seed, model=model)
    assert names_of(tmp_path) == {"recpo": [0, 1], "recpo, sft sft_epochs=9": [2]}


def test_other_candidates_are_refused(tmp_path):
    """Stages tested on other users or candidates cannot stand in one table;
    the folders are named."""
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


def test_length_bins_without_intervals_are_refused(tmp_path):
    """A probe measured before bins had intervals is named, not guessed at."""
    write_stage(tmp_path, "sft", [1, 0, 1], probe_gain=1)
    file = tmp_path / "sft-0/probes/sft/adherence/metrics.json"
    old = {"bins": {"0-9": {"n": 3, "hit_ratio@1": 0.5}}, "std": 0.1, "cv": 0.2}
    file.write_text(json.dumps({"probe": "length", "n": 3, "rows": {"sft, written": old}}))
    with pytest.raises(ValueError, match="adherence/metrics.json: bins of an older version"):
        collect(tmp_path)


def test_the_report_has_tables_claims_and_pictures(tmp_path):
    """Counting rows, intervals, paired verdicts, probes, the λ sweep;
    every picture named in it is there."""
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
    for part in (
        "made up", "| Markov |  |  |  | 0.3000 |  |", "to recpo: lower",
        "HR@1 of recpo above sdpo | 1 against 1 | held",
        "HR@1 of sdpo above sft | 1 against 1 | not distinguishable",
        "λ lowers ValidRatio (0 to 4) | 1 against 1 | held",
        "adherence (hit_ratio@1) of recpo above sft | 1 against 1 | held",
        "avoidance (avoidance) of recpo above sft | 1 against 1 | not held",
        "**adherence**", "| recpo; written | 0.2000", "HR@1 of recpo above sft | 1 against 1 |",
        "for all 17 comparisons of this table together (Holm",
    ):  # fmt: skip
        assert part in text, part
    pytest.importorskip("matplotlib")
    pictures = [
        line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")
    ]
    assert {"methods.png", "curves.png", "margin_lambda.png", "margins.png"} <= set(pictures)
    assert all((tmp_path / "out" / p).stat().st_size > 10_000 for p in pictures)


def test_table_3_stands_beside_the_paper_s(tmp_path):
    """The prepared examples are found by their hash;
    without them a line says how to get the statistics."""
    config = DataConfig(planted_users=100, followers=3, train_size=12, prepared_dir=str(tmp_path))
    made = prepare(config)
    text = data_table(vars(config), made.hash[:12])
    assert "| after --core 0 | 100 |" in text and "train: 12 examples" in text
    assert "not at hand" in data_table(vars(config), "0123456789ab")


def test_a_sweep_changes_one_option():
    """λ = 0 is S-DPO; other margins, losses and inputs stay outside."""

    def result(stage, **changes):
        config = asdict(TrainConfig(stages="sft,sdpo,recpo")) | changes
        # the swept runs go on from one SFT result; here its options are those of the run
        settings = settings_of(stage, Path("r"), config)
        settings |= {
            k: v
            for k, v in settings_of(stage, Path("r"), asdict(TrainConfig())).items()
            if k.startswith("sft ")
        }
        return Result(stage, Path(), config, Path(), settings, {}, {}, {})

    results = [
        result("sdpo"),
        result("recpo"),
        result("recpo", margin_lambda=4.0),
        result("recpo", num_negatives=1),
        result("recpo", decay=1.0),
        result("recpo", margin="log_diff"),
        result("recpo", margin_lambda=1.0, num_negatives=5),
        result("recpo", margin_lambda=1.0, ratings=False),
        result("recpo", margin_lambda=3.0, seed=5),
        result("sft"),
    ]
    methods = grouped([r for r in results if r.seed == 0])
    ladder = [(value, m.name) for value, m in sweep(methods, "margin_lambda")]
    assert ladder == [(0.0, "sdpo"), (2.0, "recpo"), (4.0, "recpo λ=4")]
    assert [value for value, _ in sweep(methods, "num_negatives")] == [1, 3]
    assert [value for value, _ in sweep(methods, "decay")] == [0.5, 1.0]
    assert sweep(grouped(results), "margin_lambda") == []  # no seed has them all
    assert rate_lines(methods) == []

    results[0] = result("sdpo", learning_rate=5e-4)  # λ is not all that differs
    methods = grouped([r for r in results if r.seed == 0])
    assert [value for value, _ in sweep(methods, "margin_lambda")] == [2.0, 4.0]
    (line,) = rate_lines(methods)
    assert line.startswith("Learning rates: ") and "0.0005 for sdpo; 1e-05 for recpo, " in line


# --------------------------------------------------------------------------------------- the runner
def test_commands_carry_common_and_own_options(tmp_path):
    """Flags of every kind; a run that goes on from another one's stage gets its model;
    baselines get no training options."""
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
        table, {"name": "b", "script": "studies.sequential", "method": "caser"}, tmp_path, {}, 2
    )
    assert command[1:] == [
        "-m",
        "studies.sequential",
        "--dataset=planted",
        "--method=caser",
        f"--output_dir={tmp_path / 'b'}",
    ]
    assert not is_finished(tmp_path / "first", {}, "train.py")


def test_planted_tables_compare_the_losses_of_the_papers():
    """No table adds the chosen title's NLL to a loss that is published without it."""
    for file in (ROOT / "configs/tables").glob("*.json"):
        assert "sft_weight" not in file.read_text(), file


@pytest.mark.parametrize("name", ["planted", "planted-sweeps", "movielens", "paper", "inputs"])
def test_committed_tables_hold_options_that_exist(name):
    """Every option of every run is one of its script;
    what a table leaves open is asked for by name."""
    table = json.loads((ROOT / f"configs/tables/{name}.json").read_text())
    for run in table["runs"]:
        own = {k: v for k, v in run.items() if k not in ("name", "script", "after")}
        if run.get("script") == "studies.sequential":
            assert own["lists"], "the report shows other lists for every method"
            BaselineConfig(**table["common"] | own | {"dataset": "planted", "output_dir": "r"})
        else:
            TrainConfig(**table["common"] | table["training"] | own | {"dataset": "planted"})
        assert (
            run.get("after", "first/sft").split("/")[0] in [r["name"] for r in table["runs"]]
            or "after" not in run
        )


def test_an_open_table_asks_for_model_and_data():
    table = ROOT / "configs/tables/paper.json"
    done = run_script("studies.tables", table, f"--output_dir={ROOT}")
    assert done.returncode == 2 and "leaves the data set open: --dataset" in done.stderr


def test_what_can_be_measured_of_a_run():
    """Every file that the report looks for; without a log, or with a split in time, less."""
    everything = ["probes", "lists", "two_stage"]
    for config, expected in (
        ({"dataset": "planted"}, [*PROBE_NAMES, "lists", "two_stage"]),
        ({"dataset": "movielens", "split_by": "time"}, ["length", "lists", "two_stage"]),
        ({"dataset": "prepared"}, ["length"]),
    ):
        jobs = jobs_of(Path("r"), ["sft", "recpo"], config, everything)
        assert [job.name for job in jobs] == expected
    lists, two_stage = jobs_of(Path("r"), ["sft"], {"dataset": "csv"}, everything[1:])
    kinds = ("popularity", "retrieved")
    assert lists.files == [Path("r/lists/sft") / kind / "metrics.json" for kind in kinds]
    assert two_stage.files == [Path("r/two_stage/sft/markov.json")]


def test_only_what_is_missing_is_measured(tmp_path, monkeypatch, capsys):
    """By one command a run, in its log; baselines are left alone; a failure is said, and the rest
    goes on."""
    write_stage(tmp_path, "sft", [1, 0], probe_gain=1, prepared_dir="p")
    write_stage(tmp_path, "recpo", [1, 0])
    calls = []

    def fake(command, log):
        calls.append((command[2], log.name, command[3:]))
        if "--probe=length" in command:
            raise ValueError("no such thing")

    monkeypatch.setattr("studies.measure.execute", fake)
    results = collect(tmp_path)
    results.append(Result("markov", tmp_path / "m", {"method": "markov"}, tmp_path, {}, {}, {}, {}))
    measure_missing(results, ["probes", "two_stage"])
    of_sft = [(script, flags) for script, log, flags in calls if log == "sft-0.log"]
    run = f"--run={tmp_path / 'sft-0'}"
    measured = [flags[1] for script, flags in of_sft if script == "studies.probes"]
    assert measured == ["--probe=temptation", "--probe=aversion", "--probe=length"]
    assert of_sft[-1] == ("studies.two_stage", [run, "--prepared_dir=p"])
    assert {log for _, log, _ in calls} == {"sft-0.log", "recpo-0.log"}
    assert "sft-0, length: not measured: no such thing" in capsys.readouterr().out


def test_measurements_are_chosen_by_name():
    assert wanted_kinds("") == [] and wanted_kinds("all") == ["probes", "lists", "two_stage"]
    assert wanted_kinds("two_stage, lists") == ["two_stage", "lists"]
    with pytest.raises(ValueError, match="all, or some of probes, lists, two_stage; got speed"):
        wanted_kinds("lists,speed")


@pytest.mark.slow
def test_a_small_table_runs_and_is_skipped_when_done(tmp_path):
    """Two runs, a baseline and a probe by one command; the second call does nothing;
    the report stands on them."""
    training = {
        "model": str(ROOT / "demo/base"),
        "batch_size": 8,
        "lora_r": 4,
        "max_steps": 2,
    }
    common = {"dataset": "planted", "planted_users": 150, "train_size": 20, "test_size": 8}
    runs = [
        {"name": "a", "stages": "sft,sdpo"},
        {"name": "b", "after": "a/sft", "stages": "recpo"},
        {"name": "m", "script": "studies.sequential", "method": "markov"},
    ]
    table = {"common": common, "training": training, "runs": runs}
    table |= {"probes": ["adherence"], "probed": ["a"]}
    (tmp_path / "t.json").write_text(json.dumps(table))
    flags = (f"--output_dir={tmp_path / 'runs'}", f"--prepared_dir={tmp_path / 'prepared'}")
    for again in (False, True):
        done = run_script("studies.tables", tmp_path / "t.json", *flags)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("finished before") == (3 if again else 0)
    made = report(tmp_path / "runs", "--measure", "lists,two_stage")
    assert made.returncode == 0, made.stderr
    for text in ("| markov |", "**adherence**", "## Harder lists", "+ sdpo, N = 50"):
        assert text in made.stdout, text
    for text in ("a, lists: ", "b, lists: ", "a, two_stage: ", "b, two_stage: "):
        assert f"{text}not" not in made.stdout and text in made.stdout, made.stdout[:500]
    again = report(tmp_path / "runs", "--measure", "lists,two_stage")
    assert again.returncode == 0 and "lists: " not in again.stdout
