"""Run everything that a table needs, one command each: training runs, baselines, probes.

    python -m studies.tables configs/tables/planted.json --model demo/base \\
        --output_dir runs/planted-table

A table is a JSON file: "common" options of every run, "training" options of train.py, and "runs".
Each run has a name, a method (its row in the report; "{stage}" is replaced by the stage; seeds
share one), its own options, and optionally "after": "run/stage", where it starts, or a "script"
instead of train.py. "probes" are measured for the runs in "probed". Finished runs are skipped,
interrupted ones resume. A run's log is next to its folder; table.json is a copy of the table."""

import argparse
import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

from common import read_json, run_cli
from runtime.stages import load_stage
from studies.probes import LAST_TWO, PROBES

ROOT = Path(__file__).parents[1]
MEASURED = (*PROBES, "two_stage")


def flags_of(options: dict) -> list[str]:
    """Turn options into flags: {"a": 1, "b": true, "c": false} becomes --a=1 --b --no_c."""
    switches = {True: "--{}", False: "--no_{}"}
    return [
        switches[v].format(k) if isinstance(v, bool) else f"--{k}={v}" for k, v in options.items()
    ]


def execute(what: str, command: list[str], log: Path) -> None:
    """Run a command with its output in `log`; if it fails, ValueError names the log's last line."""
    started = time.time()
    with open(log, "a") as out:
        print(f"\n$ {' '.join(command[1:])}", file=out, flush=True)
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip("= ")]
    if code or any(line.startswith("stopped ") for line in lines[-2:]):  # by SIGTERM: exit code 0
        raise ValueError(f"{log}: exit code {code}: {lines[-1]}; the same command resumes")
    print(f"{what}: {time.time() - started:.0f} s", flush=True)


def command_of(table: dict, run: dict, folder: Path, processes: int) -> list[str]:
    """The command of one run."""
    own = {k: v for k, v in run.items() if k not in ("name", "script", "after")}
    options = table["common"] | own | {"output_dir": folder / run["name"]}
    if "script" in run:
        return [sys.executable, "-m", run["script"], *flags_of(options)]
    del options["method"]  # a script has its own --method
    options = table["training"] | options | {"shared": True, "resume": "auto"}
    if "after" in run:
        base, adapter = load_stage(folder / run["after"])
        options |= {"model": base} | ({"adapter": adapter} if adapter else {})
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / "train.py"), *flags_of(options)]


def read_table() -> tuple[argparse.Namespace, dict]:
    """The command line, and the table that it completes; ValueError if something is left open."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("table", type=Path, help="JSON file of the table's runs")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--nproc_per_node", type=int, default=1, help="processes of a training run")
    parser.add_argument("--dataset", default="", help="data set, if the table leaves it open")
    parser.add_argument("--data_dir", default="", help="raw data, if the data set needs it")
    parser.add_argument("--model", default="", help="model, if the table leaves it open")
    parser.add_argument("--prepared_dir", default="prepared")
    args = parser.parse_args()
    table = {"common": {}, "training": {}, "runs": []} | read_json(args.table)
    given = {"dataset": args.dataset, "data_dir": args.data_dir, "prepared_dir": args.prepared_dir}
    table["common"] |= {name: value for name, value in given.items() if value}
    table["training"] |= {"model": args.model} if args.model else {}
    if "dataset" not in table["common"]:
        raise ValueError(f"{args.table} leaves the data set open: --dataset")
    if "model" not in table["training"] and any("script" not in run for run in table["runs"]):
        raise ValueError(f"{args.table} leaves the model open: --model")
    names = {run.get("name") for run in table["runs"] if "method" in run} - {None}
    if not names or len(names) < len(table["runs"]):
        raise ValueError(f"{args.table} needs runs, each with a name of its own and a method")
    return args, table


def measure(run: Path, name: str) -> None:
    """Measure a probe or "two_stage" if the run's data allow it and it is missing or outdated."""
    config = read_json(run / "config.json")
    in_time, has_log = bool(config.get("split_date")), config["dataset"] != "prepared"
    left_out = {config.get("negatives", "uniform"), *(LAST_TWO if in_time else ())}
    if name in left_out or not (has_log or name == "length"):
        return
    options = {"run": run, "prepared_dir": config.get("prepared_dir", "prepared")}
    script, place = "studies.two_stage", "two_stage/{}/markov.json"
    if name != "two_stage":
        options |= {"probe": name, "output_dir": run / "probes"}
        script, place = "studies.probes", f"probes/{{}}/{name}/metrics.json"
    for tested in run.glob("*/eval/metrics.json"):
        file = run / place.format(tested.parents[1].name)
        data_hash = read_json(tested)["data_hash"]
        if not file.exists() or read_json(file).get("data_hash") != data_hash:
            command = [sys.executable, "-m", script, *flags_of(options)]
            return execute(f"{run.name}, {name}", command, run.parent / f"{run.name}.log")


def measure_missing(folder: Path, wanted: str) -> None:
    """Measure all training runs below the folder; failures are printed and skipped."""
    names = MEASURED if wanted == "all" else [name.strip() for name in wanted.split(",")]
    if unknown := sorted(set(names) - set(MEASURED)):
        raise ValueError(f"--measure {', '.join(unknown)}: all, or some of {', '.join(MEASURED)}")
    for file in sorted(folder.glob("**/config.json")):
        for name in names if "stages" in read_json(file) else ():
            try:
                measure(file.parent, name)
            except ValueError as error:
                print(f"{file.parent.name}, {name}: not measured: {error}", flush=True)


def main() -> None:
    args, table = read_table()
    folder = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.json").write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n")
    for number, run in enumerate(table["runs"], 1):
        what, place = f"{number}/{len(table['runs'])} {run['name']}", folder / run["name"]
        if "script" in run and (place / "eval/metrics.json").exists():  # train.py checks its own
            print(f"{what}: finished before", flush=True)
        else:
            command = command_of(table, run, folder, args.nproc_per_node)
            execute(what, command, folder / f"{run['name']}.log")
    for name, probe in product(table.get("probed", ()), table.get("probes", ())):
        measure(folder / name, probe)
    print(f"all runs are in {folder}; python -m studies.report {folder} compares them")


if __name__ == "__main__":
    run_cli(main)
