"""Tested models in run folders, grouped into methods by the names that a table gives them.

Each run of a table file has a "method"; "{stage}" in it is replaced by the stage, so that a run of
several stages fills several rows. Results of one method differ only in their seed. A folder that
no table describes is a method of its own, named by its path."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from common import read_json
from eval import ranking_metrics
from losses import LOSSES
from studies.probes import HOW, digest_of
from studies.statistics import Difference, paired
from studies.two_stage import gains
from train import TrainConfig

TESTED = {  # of the test split
    "hit_ratio@1/written": "HR@1 written",
    "valid_ratio/written": "ValidRatio",
    "hit_ratio@1/ranked": "HR@1 ranked first",
}
# Stages in the order of a table's rows.
ORDER = ["gru4rec", "caser", "sasrec", "raw", "sft", *LOSSES]
# Options that do not make another method: the seed, places of files, how work is divided.
NOT_THE_METHOD = {f.name for f in fields(TrainConfig) if f.metadata["free"]}
NOT_THE_METHOD |= {"seed", "model", "adapter", "data_dir", "item_file"}


@dataclass
class Result:
    """One tested model: a stage of a run, or a baseline."""

    method: str
    stage: str  # or the baseline's name
    seed: int
    run: Path
    config: dict
    metrics: dict
    records: list[dict]  # of the test split
    steps: list[dict]  # what preference training logged
    values: dict[str, np.ndarray]  # measure -> (n,) a value per user
    measured: dict[str, dict]  # probe or "two_stage/RETRIEVER" -> its JSON


@dataclass
class Method:
    """Results of the same settings under different seeds."""

    name: str
    stage: str
    config: dict  # of the first result
    results: list[Result]

    def of_seeds(self, seeds: set[int]) -> "Method":
        return replace(self, results=[r for r in self.results if r.seed in seeds])

    def has(self, measure: str) -> bool:
        return any(measure in r.values for r in self.results)

    def per_user(self, measure: str) -> np.ndarray:
        return np.mean([r.values[measure] for r in self.results if measure in r.values], axis=0)

    def probed(self, probe: str, how: str) -> list[dict]:
        """The outcomes of each run, `how`: written or ranked."""
        return [r.measured[probe][how] for r in self.results if probe in r.measured]


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def tested_values(records: list[dict]) -> dict[str, np.ndarray]:
    """Map each measure of TESTED to a value per user (n,)."""
    scores, slots = ([r[key] for r in records] for key in ("logps", "target_slot"))
    ranked = ranking_metrics(scores, slots)["hit_ratio@1"]
    written, valid = (np.array([r[key] for r in records], float) for key in ("hit", "valid"))
    return dict(zip(TESTED, (written, valid, ranked), strict=True))


def read_result(place: Path, folder: Path, described: dict[str, str]) -> Result | None:
    """Read a tested stage or baseline with its measurements; None if it belongs to no run."""
    own, log = place / "config.json", place / "metrics.jsonl"
    run = place if own.exists() and "method" in read_json(own) else place.parent  # a baseline's
    if not (run / "config.json").exists():
        return None
    config, metrics = read_json(run / "config.json"), read_json(place / "eval/metrics.json")
    stage, name = config.get("method", place.name), run.relative_to(folder).as_posix()
    method = described.get(name, place.relative_to(folder).as_posix()).replace("{stage}", stage)
    records = read_lines(place / "eval/predictions.jsonl")
    steps = [e for e in (read_lines(log) if log.exists() else ()) if "rewards/margins" in e]
    values, measured = tested_values(records), {}
    lists = config.get("negatives", "uniform")
    values[f"{lists}/hit_ratio@1/ranked"] = values["hit_ratio@1/ranked"]
    files = (run / "probes" / stage).glob("*/metrics.json")
    for file in [*sorted(files), *sorted((run / "two_stage" / stage).glob("*.json"))]:
        content = read_json(file)
        if content.get("data_hash") != metrics["data_hash"]:
            what = "was measured on other data than its run was tested on"
            raise ValueError(f"{file} {what}: --measure it again, or delete it")
        if "places" in content:
            name = f"two_stage/{file.stem}"
            found = gains(np.array(content["places"]["model"]))
        else:
            name, found = content["probe"], {}
            for how in HOW:
                found |= {f"{key}/{how}": np.array(v) for key, v in content[how].items()}
        measured[name] = content
        values |= {f"{name}/{key}": v for key, v in found.items()}
    seed = config.get("seed", 0)
    return Result(method, stage, seed, run, config, metrics, records, steps, values, measured)


def collect(folder: Path, table: dict) -> dict[str, Method]:
    """Collect the tested stages and baselines below a folder as methods by name.

    They are in the order of the paper's tables. ValueError if two methods have one name, or if the
    users, candidates or targets of the test split or of a measurement differ between results."""
    described = {run["name"]: run["method"] for run in table.get("runs", ())}
    files = sorted(folder.glob("**/eval/metrics.json"))
    results = [r for f in files if (r := read_result(f.parents[1], folder, described))]
    if not results:
        raise ValueError(f"{folder}: no finished stage of a run (eval/metrics.json) below it")
    first: dict[str, tuple] = {}
    methods: dict[str, Method] = {}
    for r in results:
        cases = {"test": digest_of(r.records)}
        for name, content in r.measured.items():
            cases[name] = content.get("cases") or content["places"]["retriever"]
        for name, found in cases.items():
            expected, where = first.setdefault(name, (found, f"{r.run} {r.stage}"))
            if found != expected:
                what = f"were tested on different users or candidates ({name})"
                raise ValueError(f"{where} and {r.run} {r.stage} {what}: not for one table")
        method = methods.setdefault(r.method, Method(r.method, r.stage, r.config, []))
        for other in method.results:
            differ = ", ".join(sorted(changed(r.config, other.config)))
            if differ or r.seed == other.seed:
                why = f"differ in {differ}" if differ else f"have seed {r.seed}"
                what = f"{other.run} and {r.run} are both called {r.method!r} and {why}"
                raise ValueError(f"{what}; give one of them another in the table")
        method.results.append(r)
    rank = {stage: i for i, stage in enumerate(ORDER)}
    order = sorted(methods.values(), key=lambda m: (rank.get(m.stage, 99), m.name != m.stage))
    return {m.name: m for m in order}


def changed(a: dict, b: dict) -> set[str]:
    """Options that differ between two configurations and make another method."""
    return {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)} - NOT_THE_METHOD


def base_method(methods: dict[str, Method], stage: str) -> Method | None:
    """The method that is named like its stage, or the only one of this stage."""
    found = [m for m in methods.values() if m.stage == stage]
    return methods.get(stage) or (found[0] if len(found) == 1 else None)


def sweep(methods: dict[str, Method], *options: str, stage: str = "recpo") -> list[tuple]:
    """(value, method) of the methods that differ from their stage's base in these options only.
    With several options the value is a tuple."""
    base, points = base_method(methods, stage), []
    for m in methods.values() if base else ():
        if m.stage == stage and changed(m.config, base.config) <= set(options):
            value = tuple(m.config.get(option) for option in options)
            points.append((value if len(options) > 1 else value[0], m))
    plain = base_method(methods, "sdpo") if options == ("margin_lambda",) else None
    if points and plain and changed(plain.config, base.config) <= {"margin", "margin_lambda"}:
        points.append((0.0, plain))  # S-DPO is λ = 0, if trained alike
    return sorted(points, key=lambda point: point[0])


def same_seeds(methods: list[Method], having: str = "") -> list[Method]:
    """Keep the runs whose seed all methods have, or all runs if no seed is shared.

    A stage starts from its seed's SFT result, so runs of one seed belong together. `having`: only
    seeds of runs with this measure count."""
    runs = [{r.seed for r in m.results if not having or having in r.values} for m in methods]
    shared = set.intersection(*runs)
    return [m.of_seeds(shared or seeds) for m, seeds in zip(methods, runs, strict=True)]


def difference_of(a: Method, b: Method, measure: str) -> Difference:
    """a - b over the same users, averaged over seeds; holm() fills in interval and verdict."""
    a, b = same_seeds([a, b], having=measure)
    return paired(a.per_user(measure), b.per_user(measure), (len(a.results), len(b.results)))
