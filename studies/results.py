"""What run folders hold: a Result per tested stage or baseline, with the settings behind it."""

import hashlib
import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from common import read_json, reading
from eval import ranking_metrics
from loaders.frozen import DataConfig
from runtime.runs import FREE_TO_CHANGE
from studies.sequential import BaselineConfig
from train import PREFERENCE_LOSSES, TrainConfig


@dataclass
class Result:
    """One tested model: its values per user, and where it comes from."""

    stage: str  # or the baseline's method
    run: Path  # folder of the run
    config: dict
    folder: Path  # with metrics.jsonl and eval/
    settings: dict  # every option but seed and paths, and those of the stage it starts from
    values: dict[str, np.ndarray]  # measure -> (n,) per user
    candidates: dict[str, str]  # "test" or a probe -> hash of users, candidates and targets
    metrics: dict
    probes: dict[str, dict] = field(default_factory=dict)  # probe -> its metrics.json

    @property
    def seed(self) -> int:
        return self.config.get("seed", 0)


# Not part of a method: the seed, paths, and what a run may change when it goes on.
NOT_THE_METHOD = {"seed", "lists", "data_dir", "item_file", "download", *FREE_TO_CHANGE.split()}

PREFERENCE_OPTIONS = [
    "beta",
    "margin",
    "margin_lambda",
    "num_negatives",
    "negative_source",
    "simpo_gamma",
    "sft_weight",
    "epochs",
    "learning_rate",
]

# What only the stage sees that a preference stage starts from.
START_OPTIONS = [
    "model",
    "adapter",
    "sft_lora_r",
    "sft_epochs",
    "sft_learning_rate",
    "history_weight",
    "lora_dropout",
]


def defaults_of(config: dict) -> dict:
    """Every option of the script that wrote this configuration, at its default."""
    script = BaselineConfig if "method" in config else TrainConfig
    return asdict(script())


def origin_of(run: Path, config: dict) -> Path | None:
    """The stage of another run that this run starts from, also where both were moved."""
    start = Path(config.get("adapter") or config.get("model", ""))
    for folder in (start, run.parent.joinpath(*start.parts[-2:])):
        file = folder.parent / "config.json"
        if folder.parent != run and file.is_file() and "stages" in read_json(file):
            return folder
    return None


def settings_of(stage: str, run: Path, config: dict) -> dict:
    """Every option but seed and paths; what only an earlier stage saw has its name in front."""
    complete = defaults_of(config) | config
    settings = {k: comparable(v) for k, v in complete.items() if k not in NOT_THE_METHOD}
    if stage not in PREFERENCE_LOSSES:
        return settings
    origin = origin_of(run, config)
    if origin:
        earlier = origin.name
        start = settings_of(earlier, origin.parent, read_config(origin.parent / "config.json"))
    else:
        earlier = "sft" if "sft" in _stages(config) else "raw"
        start = settings
    if earlier not in PREFERENCE_LOSSES:
        start = {k: v for k, v in start.items() if k not in PREFERENCE_OPTIONS}
    own = {k: v for k, v in settings.items() if k not in START_OPTIONS}
    return own | {f"{earlier} {k}": v for k, v in start.items()}


def comparable(value):
    """1 and 1.0 are one value."""
    return float(value) if type(value) is int else value


def _stages(config: dict) -> list[str]:
    return [s.strip() for s in config.get("stages", "").split(",")]


def collect(folder: Path) -> list[Result]:
    """Every stage and baseline below the folder that has been tested, with its probes."""
    results = []
    for file in sorted(folder.glob("**/eval/metrics.json")):
        stage = file.parent.parent
        run = stage if _is_baseline(stage) else stage.parent
        if not (run / "config.json").exists():
            continue
        config = read_config(run / "config.json")
        name = config["method"] if run == stage else stage.name
        results.append(read_result(name, run, config, stage))
    if not results:
        raise ValueError(f"{folder}: no finished stage of a run (eval/metrics.json) below it")
    check_figures(results)
    return results


def read_config(file: Path) -> dict:
    """The options of a run or baseline, of the types that they have today;
    ValueError names the file."""
    config = read_json(file)
    for name, value in config.items():  # options of older versions are options, too
        if not isinstance(value, str | int | float):
            raise ValueError(f"{file}: {name} must be a text or a number, got {value!r}")
    known = {f.name for f in fields(DataConfig)}
    try:
        DataConfig(**{k: v for k, v in config.items() if k in known})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return config


def _is_baseline(folder: Path) -> bool:
    file = folder / "config.json"
    return file.exists() and "method" in read_json(file)


def read_result(stage: str, run: Path, config: dict, folder: Path) -> Result:
    """A tested stage: test split and probes, each with the hash of what it was tested on."""
    records = read_records(folder / "eval" / "predictions.jsonl")
    values = tested_values(records)
    candidates = {"test": digest_of(records)}
    probes = {}
    for file in sorted((run / "probes" / stage).glob("*/metrics.json")):
        probe, probed = file.parent.name, read_records(file.parent / "predictions.jsonl")
        probes[probe] = read_probe(file)
        candidates[probe] = digest_of(probed)
        values |= probe_values(probe, probed)
    settings = settings_of(stage, run, config)
    metrics = read_metrics(folder / "eval" / "metrics.json")
    return Result(stage, run, config, folder, settings, values, candidates, metrics, probes)


def read_metrics(file: Path) -> dict:
    """metrics.json of a tested stage; ValueError names the file."""
    content = read_json(file)
    with reading(file):
        if not all(is_number(value) for value in content["baselines"].values()):
            raise TypeError("baselines are numbers")
        if not isinstance(content.get("data_hash", ""), str):
            raise TypeError("data_hash is a text")
    return content


def read_probe(file: Path) -> dict:
    """metrics.json of a probe; ValueError names the file."""
    content = read_json(file)
    with reading(file):
        rows = content["rows"]
        if not is_number(content["n"]) or not rows:
            raise TypeError("n is a number, and rows are not empty")
        if any("bins" in row and "spread" not in row for row in rows.values()):
            raise ValueError(
                f"{file}: bins of an older version, without intervals; measure it again"
            )
        for row in rows.values():
            check_row(row)
    return content


def check_row(row: dict) -> None:
    """Figures with their intervals; TypeError or KeyError if they are none."""
    for name, entry in row.get("bins", {}).items():
        if not isinstance(name, str) or not is_number(entry["n"]):
            raise TypeError("bins have a size")
        if not is_number(entry["hit_ratio@1"]) or not is_number(entry["variance"]):
            raise TypeError("bins have a figure and its variance")
    for name, value in row.items():
        if name == "bins" or name.endswith("_ci95"):
            continue
        ends = row[f"{name}_ci95"]
        if len(ends) != 2 or not all(map(is_number, (value, *ends))):
            raise TypeError(f"{name} is a number with an interval")


def read_records(file: Path) -> list[dict]:
    """predictions.jsonl; ValueError names the file and the line."""
    records = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            records.append(checked_record(json.loads(line)))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file}: line {number} is no prediction ({type(error).__name__}: {error})"
            ) from None
    if len({len(r["logps"]) for r in records}) != 1:
        raise ValueError(f"{file}: no predictions, or lists of different lengths")
    return records


def checked_record(record: dict) -> dict:
    candidates, logps, slot = (record[key] for key in ("candidates", "logps", "target_slot"))
    texts = [record["user"], record["target"], *candidates]
    if not isinstance(candidates, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError("user, target and candidates are texts")
    if not isinstance(logps, list) or len(logps) != len(candidates):
        raise TypeError("a log-prob for each candidate")
    if not all(is_number(value) and math.isfinite(value) for value in logps):
        raise TypeError("logps are numbers")
    if type(slot) is not int or not 0 <= slot < len(candidates):
        raise TypeError("target_slot is the place of a candidate")
    if not all(isinstance(record[key], bool) for key in ("hit", "valid")):
        raise TypeError("hit and valid are true or false")
    return record


def is_number(value) -> bool:
    return type(value) in (int, float)


def digest_of(records: list[dict]) -> str:
    facts = [[r["user"], r["candidates"], r["target"]] for r in records]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def tested_values(records: list[dict]) -> dict[str, np.ndarray]:
    """Measure -> (n,) what each user counts for."""
    return {
        "hit_ratio@1": np.array([r["hit"] for r in records], float),
        "valid_ratio": np.array([r["valid"] for r in records], float),
        "ranking/hit_ratio@1": ranked_first(records),
    }


def ranked_first(records: list[dict]) -> np.ndarray:
    """(n,) 1 where the target has the best score; shared among equals."""
    scores = np.array([r["logps"] for r in records])
    targets = np.array([r["target_slot"] for r in records])
    return ranking_metrics(scores, targets)["hit_ratio@1"]


def probe_values(probe: str, records: list[dict]) -> dict[str, np.ndarray]:
    """What each user counts for in a probe, as written and as ranked first."""
    hits = np.array([r["hit"] for r in records], float)
    ranked = ranked_first(records)
    if probe == "avoidance":  # a listed answer that is another title
        hits = np.array([r["valid"] for r in records], float) - hits
        ranked = 1 - ranked
    return {f"{probe}/written": hits, f"{probe}/ranked": ranked}


def check_figures(results: list[Result]) -> None:
    """A probe's rows must hold the same figures everywhere, or they cannot stand in one table."""
    first: dict[str, tuple] = {}  # probe -> its figures, and where they were found first
    for result in results:
        for probe, content in result.probes.items():
            file = result.run / "probes" / result.stage / probe / "metrics.json"
            for row in content["rows"].values():
                figures = set(row), set(row.get("bins", ()))
                usual, where = first.setdefault(probe, (figures, file))
                if figures != usual:
                    raise ValueError(f"{file}: other figures than in {where}; measure both again")


def check_candidates(results: list[Result]) -> None:
    """The test split, and each probe, must be the same users and candidates everywhere."""
    for what in {name: None for r in results for name in r.candidates}:
        groups = defaultdict(list)
        for r in results:
            if what in r.candidates:
                groups[r.candidates[what]].append(str(r.folder))
        if len(groups) > 1:
            folders = "; ".join(f"{d[:12]}: {', '.join(f[:3])}" for d, f in groups.items())
            raise ValueError(
                f"these were tested on different users or candidates ({what}) "
                f"and cannot stand in one table: {folders}"
            )
