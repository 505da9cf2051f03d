"""Run all that a table needs, one command each: training runs, baselines, probes. Then the report.

    python -m studies.tables configs/tables/planted.json --model demo/base \\
        --output_dir runs/planted-table

A table is a JSON file: "common" options of every run, "training" options of train.py, and "runs".
Each run has a name, its method (its row of the report; "{stage}" in it stands for the stage; runs
that differ in their seed alone share one), its own options, perhaps "after": "run/stage", whose
result it starts from, and perhaps a "script" instead of train.py. "probes" are measured for the
runs listed in "probed". Finished runs are skipped and interrupted ones go on, so the command may be
killed and given again at any time. Every run leaves its log beside its folder, the table its copy
in table.json for the report."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from common import read_json, run_cli
from runtime.stages import load_stage
from studies.probes import LAST_TWO, PROBES

ROOT = Path(__file__).parents[1]
MEASURED = (*PROBES, "two_stage")


def flags_of(options: dict) -> list[str]:
    """{"a": 1, "b": true, "c": false} -> --a=1 --b --no_c"""
    switches = {True: "--{}", False: "--no_{}"}
    flags = [(k, v, type(v) is bool) for k, v in options.items()]
    return [switches[v].format(k) if switch else f"--{k}={v}" for k, v, switch in flags]


def execute(what: str, command: list[str], log: Path) -> None:
    """Run it, its output in `log`; ValueError names the log if it fails."""
    started = time.time()
    with open(log, "a") as out:
        out.write(f"\n$ {' '.join(command[1:])}\n")
        out.flush()
        begin = out.tell()
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode
    if code:
        lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
        why = next((f": {line}" for line in lines if "error" in line.lower()), "")
        raise ValueError(f"{log}: the run failed (exit code {code}){why}; the same command goes on")
    print(f"{what}: {time.time() - started:.0f} s", flush=True)


def command_of(table: dict, run: dict, folder: Path, processes: int) -> list[str]:
    """The command of one run."""
    place = {"output_dir": folder / run["name"]}
    if "script" in run:
        own = {k: v for k, v in run.items() if k not in ("name", "script")}
        return [sys.executable, "-m", run["script"], *flags_of(table["common"] | own | place)]
    own = {k: v for k, v in run.items() if k not in ("name", "method", "after")}
    options = table["common"] | table["training"] | own | place
    options |= {"shared": True, "resume": "auto"}
    if "after" in run:
        base, adapter = load_stage(folder / run["after"])
        options |= {"model": base} | ({"adapter": adapter} if adapter else {})
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / "train.py"), *flags_of(options)]


def read_table(args: argparse.Namespace) -> dict:
    """The table, completed by the command line; ValueError if it leaves something open."""
    table = read_json(args.table)
    given = {"dataset": args.dataset, "data_dir": args.data_dir, "prepared_dir": args.prepared_dir}
    table["common"] |= {name: value for name, value in given.items() if value}
    table["training"] = table.get("training", {}) | ({"model": args.model} if args.model else {})
    trains = any("script" not in run for run in table["runs"])
    for what, is_open in (
        ("data set open: --dataset", "dataset" not in table["common"]),
        ("model open: --model", trains and "model" not in table["training"]),
    ):
        if is_open:
            raise ValueError(f"{args.table} leaves the {what}")
    names = {run.get("name") for run in table["runs"] if "method" in run} - {None}
    if len(names) < len(table["runs"]):
        raise ValueError(f"{args.table}: every run needs a name of its own and a method")
    return table


def measure(run: Path, wanted: list[str]) -> None:
    """These measurements of a run, as far as its data allow them and they are missing, or are of
    other data than the run; ValueError if one fails."""
    config, missing = read_json(run / "config.json"), []
    tested = {f.parents[1].name: read_json(f) for f in sorted(run.glob("*/eval/metrics.json"))}
    has_log, in_time = config["dataset"] != "prepared", bool(config.get("split_date"))
    left_out = {config.get("negatives", "uniform"), *(LAST_TWO if in_time else ())}
    for name in [n for n in wanted if n not in left_out and (has_log or n == "length")]:
        options = {"run": run, "prepared_dir": config.get("prepared_dir", "prepared")}
        script, place = "studies.two_stage", "two_stage/{}/markov.json"
        if name != "two_stage":
            options |= {"probe": name, "output_dir": run / "probes"}
            script, place = "studies.probes", f"probes/{{}}/{name}/metrics.json"
        for stage, metrics in tested.items():
            file = run / place.format(stage)
            if not file.exists() or read_json(file).get("data_hash") != metrics["data_hash"]:
                missing.append((name, [sys.executable, "-m", script, *flags_of(options)]))
                break
    for name, command in missing:
        execute(f"{run.name}, {name}", command, run.parent / f"{run.name}.log")


def measure_missing(folder: Path, wanted: str) -> None:
    """For all training runs below the folder; what fails is named and left out."""
    names = MEASURED if wanted == "all" else [name.strip() for name in wanted.split(",")]
    if unknown := sorted(set(names) - set(MEASURED)):
        raise ValueError(f"--measure {', '.join(unknown)}: all, or some of {', '.join(MEASURED)}")
    for file in sorted(folder.glob("**/config.json")):
        for name in names if "stages" in read_json(file) else ():
            try:
                measure(file.parent, [name])
            except ValueError as error:
                print(f"{file.parent.name}, {name}: not measured: {error}", flush=True)


def parse_args() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("table", type=Path, help="JSON file of the table's runs")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--nproc_per_node", type=int, default=1, help="processes of a training run")
    parser.add_argument("--dataset", default="", help="data set, where the table leaves it open")
    parser.add_argument("--data_dir", default="", help="raw data, if the data set needs it")
    parser.add_argument("--model", default="", help="model, where the table leaves it open")
    parser.add_argument("--prepared_dir", default="prepared")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    table, folder = read_table(args), args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.json").write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n")
    for number, run in enumerate(table["runs"], 1):
        what = f"{number}/{len(table['runs'])} {run['name']}"
        ends = [folder / run["name"] / file for file in ("results.md", "eval/metrics.json")]
        if any(file.exists() for file in ends):
            print(f"{what}: finished before", flush=True)
        else:
            command = command_of(table, run, folder, args.nproc_per_node)
            execute(what, command, folder / f"{run['name']}.log")
    for name in table.get("probed", []):
        measure(folder / name, table["probes"])
    print(f"all runs are in {folder}; python -m studies.report {folder} makes the tables")
    print("(--measure all also measures all probes, other lists and the whole catalogue)")


if __name__ == "__main__":
    run_cli(main)
