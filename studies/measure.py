"""Measure what is missing of the probes, the other lists and the whole catalogue of a run.

    python -m studies.report runs/planted-1 --measure all
    python -m studies.report runs/planted-table --measure lists,two_stage

    probes      every probe of studies.probes that the run's data allow
    lists       studies.lists
    two_stage   studies.two_stage, retriever Markov, its usual list sizes, all test users

Each is a process of its own with its output in RUN.log, beside the run's folder as studies.tables
leaves it. What is there is skipped, so the command may be killed and given again."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from loaders.lists import KINDS
from studies.probes import PROBE_NAMES
from studies.results import Result

MEASURED = ("probes", "lists", "two_stage")


@dataclass
class Job:
    """A measurement of all stages of a run: its command, and a file of each that it leaves."""

    name: str
    script: str
    options: dict
    files: list[Path]

    @property
    def done(self) -> bool:
        return all(file.exists() for file in self.files)


def wanted_kinds(text: str) -> list[str]:
    """ "all", "lists,two_stage" or "" -> those of MEASURED; ValueError names what is none."""
    if text == "all":
        return list(MEASURED)
    kinds = [kind.strip() for kind in text.split(",") if kind.strip()]
    if unknown := sorted(set(kinds) - set(MEASURED)):
        raise ValueError(
            f"--measure: all, or some of {', '.join(MEASURED)}; got {', '.join(unknown)}"
        )
    return kinds


def flags_of(options: dict) -> list[str]:
    """{"a": 1, "b": true, "c": false} -> --a=1 --b --no_c"""
    flags = []
    for name, value in options.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        else:
            flags.append(f"--{name}={value}")
    return flags


def execute(command: list[str], log: Path) -> None:
    """Run it, its output in `log`; ValueError names the log if it fails."""
    with open(log, "a") as out:
        out.write(f"\n$ {' '.join(command[1:])}\n")
        out.flush()
        begin = out.tell()
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode
    if code:
        lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
        errors = [line for line in lines if "error" in line.lower()]
        why = f": {errors[0]}" if errors else ""
        raise ValueError(f"{log}: the run failed (exit code {code}){why}; the same command goes on")


def probe_jobs(run: Path, stages: list[str], probes: list[str], prepared_dir: str) -> list[Job]:
    jobs, out = [], run / "probes"
    for probe in probes:
        options = {"run": run, "probe": probe, "output_dir": out, "prepared_dir": prepared_dir}
        files = [out / stage / probe / "metrics.json" for stage in stages]
        jobs.append(Job(probe, "studies.probes", options, files))
    return jobs


def jobs_of(run: Path, stages: list[str], config: dict, wanted: list[str]) -> list[Job]:
    """All measurements of these kinds that the run's data allow, done or not."""
    jobs, where = [], config.get("prepared_dir", "prepared")
    has_log = config["dataset"] != "prepared"
    options = {"run": run, "prepared_dir": where}
    if "probes" in wanted:
        last_two = has_log and config.get("split_by", "last") == "last"
        jobs += probe_jobs(run, stages, list(PROBE_NAMES) if last_two else ["length"], where)
    if "lists" in wanted and has_log:
        kinds = [kind for kind in KINDS if kind != config.get("negatives", "uniform")]
        files = [run / "lists" / s / kind / "metrics.json" for s in stages for kind in kinds]
        jobs.append(Job("lists", "studies.lists", options, files))
    if "two_stage" in wanted and has_log:
        files = [run / "two_stage" / stage / "markov.json" for stage in stages]
        jobs.append(Job("two_stage", "studies.two_stage", options, files))
    return jobs


def measure(run: Path, job: Job) -> None:
    """Do a job that is not done; ValueError if it fails."""
    if job.done:
        return
    started = time.time()
    log = run.parent / f"{run.name}.log"
    execute([sys.executable, "-m", job.script, *flags_of(job.options)], log)
    print(f"{run.name}, {job.name}: {time.time() - started:.0f} s", flush=True)


def measure_missing(results: list[Result], wanted: list[str]) -> None:
    """For the trained stages among the results; what cannot be measured is said and left out."""
    runs: dict[Path, list[Result]] = {}
    for result in results:
        if "method" not in result.config:
            runs.setdefault(result.run, []).append(result)
    for run, tested in runs.items():
        for job in jobs_of(run, [r.stage for r in tested], tested[0].config, wanted):
            try:
                measure(run, job)
            except ValueError as error:
                print(f"{run.name}, {job.name}: not measured: {error}", flush=True)
