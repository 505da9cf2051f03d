"""Run all that a table needs, one command each: training runs, baselines, probes. Then the report.

    python -m studies.tables configs/tables/planted.json --model demo/base \\
        --output_dir runs/planted-table
    python -m studies.tables configs/tables/paper.json --output_dir runs/paper-table \\
        --nproc_per_node 8 --dataset movielens --data_dir ml-1m.zip \\
        --model meta-llama/Llama-3.1-8B

A table is a JSON file: "common" options of every run, and "runs", each with a name, a script
(train.py unless it says so), its own options, and perhaps "after": "run/stage", whose result it
starts from. What is finished is skipped, what was interrupted goes on (train.py's --resume auto),
so the command may be killed and given again at any time. "probes" are measured for every stage of
the runs listed in "probed". Every run leaves its log beside its folder. The other lists and the
whole catalogue are measured by the report (--measure).
"""

import argparse
import sys
import time
from pathlib import Path

from common import read_json, run_cli
from runtime.stages import load_stage
from studies.measure import execute, flags_of, measure, probe_jobs

ROOT = Path(__file__).parents[1]


def start_options(folder: Path, after: str) -> dict:
    """Where a run begins that goes on from another run's stage."""
    base, adapter = load_stage(folder / after)
    return {"model": str(base)} | ({"adapter": str(adapter)} if adapter else {})


def is_finished(folder: Path, run: dict, script: str) -> bool:
    if script == "studies.sequential":
        return (folder / "eval" / "metrics.json").exists()
    return (folder / "results.md").exists()


def command_of(
    table: dict, run: dict, folder: Path, extra: dict, processes: int
) -> tuple[list[str], str]:
    """(command, script) of one run."""
    script = run.get("script", "train.py")
    own = {k: v for k, v in run.items() if k not in ("name", "script", "after")}
    training = table.get("training", {}) if script == "train.py" else {}
    options = table["common"] | training | own | extra | {"output_dir": str(folder / run["name"])}
    if script == "train.py":
        options |= {"shared": True, "resume": "auto"}
        if run.get("after"):
            options |= start_options(folder, run["after"])
    launcher = [sys.executable]
    if script == "train.py" and processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    where = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    return [*launcher, *where, *flags_of(options)], script


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("table", type=Path, help="JSON file of the table's runs")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--nproc_per_node", type=int, default=1, help="processes of a training run")
    parser.add_argument("--dataset", default="", help="data set, where the table leaves it open")
    parser.add_argument("--data_dir", default="", help="raw data, if the data set needs it")
    parser.add_argument(
        "--model",
        default="",
        help="model that training runs begin with, where the table leaves it open",
    )
    parser.add_argument("--prepared_dir", default="prepared")
    return parser.parse_args()


def given_options(args: argparse.Namespace) -> dict:
    """Data options of every run that the command line gives."""
    given = {"prepared_dir": args.prepared_dir}
    for option in ("dataset", "data_dir"):
        if value := getattr(args, option):
            given[option] = value
    return given


def read_table(args: argparse.Namespace) -> dict:
    """The table, completed by the command line; ValueError if it leaves something open."""
    table = read_json(args.table)
    if not (table["common"] | given_options(args)).get("dataset"):
        raise ValueError(f"{args.table} leaves the data set open: --dataset")
    if args.model:
        table["training"] = table.get("training", {}) | {"model": args.model}
    trains = any(run.get("script", "train.py") == "train.py" for run in table["runs"])
    if trains and "model" not in table.get("training", {}):
        raise ValueError(
            f"{args.table} leaves the model open: --model, a Hugging Face directory or hub name"
        )
    names = [run["name"] for run in table["runs"]]
    if len(set(names)) < len(names):
        raise ValueError(f"{args.table}: names of runs must differ: {names}")
    return table


def main() -> None:
    args = parse_args()
    table, extra = read_table(args), given_options(args)
    folder: Path = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(table["runs"], 1):
        where, started = f"{number}/{len(table['runs'])} {run['name']}", time.time()
        if is_finished(folder / run["name"], run, run.get("script", "train.py")):
            print(f"{where}: finished before", flush=True)
            continue
        command, _ = command_of(table, run, folder, extra, args.nproc_per_node)
        execute(command, folder / f"{run['name']}.log")
        print(f"{where}: {time.time() - started:.0f} s", flush=True)
    for name in table.get("probed", []):
        stages = read_json(folder / name / "config.json")["stages"].replace(" ", "").split(",")
        for job in probe_jobs(folder / name, stages, table.get("probes", []), args.prepared_dir):
            measure(folder / name, job)
    print(f"all runs are in {folder}; python -m studies.report {folder} makes the tables")
    print("(with --measure all also what is missing of probes, other lists, the whole catalogue)")


if __name__ == "__main__":
    run_cli(main)
