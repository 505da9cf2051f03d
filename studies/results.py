"""What run folders hold: a Result per tested stage or baseline, with the settings behind it."""

import hashlib
import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from common import read_json
from eval import ranking_metrics
from objectives import PREFERENCE_LOSSES
from runtime.runs import FREE_TO_CHANGE
from studies.sequential import BaselineConfig
from train import TrainConfig


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
NOT_THE_METHOD = {"seed", "data_dir", "item_file", "download", *FREE_TO_CHANGE.split()}

PREFERENCE_OPTIONS = [
    "beta",
    "margin",
    "margin_lambda",
    "num_negatives",
    "negative_source",
    "simpo_gamma",
    "odpo_alpha",
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
        if folder.parent != run and file.exists() and "stages" in read_json(file):
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
        start = settings_of(earlier, origin.parent, read_json(origin.parent / "config.json"))
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
        config = read_json(run / "config.json")
        name = config["method"] if run == stage else stage.name
        results.append(read_result(name, run, config, stage))
    if not results:
        raise ValueError(f"{folder}: no finished stage of a run (eval/metrics.json) below it")
    return results


def _is_baseline(folder: Path) -> bool:
    file = folder / "config.json"
    return file.exists() and "method" in read_json(file)


def read_result(stage: str, run: Path, config: dict, folder: Path) -> Result:
    """A tested stage: test split and probes, each with the hash of what it was tested on."""
    records = read_records(folder / "eval" / "predictions.jsonl")
    values = {
        "hit_ratio@1": np.array([r["hit"] for r in records], float),
        "valid_ratio": np.array([r["valid"] for r in records], float),
        "ranking/hit_ratio@1": ranked_first(records),
    }
    candidates = {"test": digest_of(records)}
    probes = {}
    for file in sorted((run / "probes" / stage).glob("*/metrics.json")):
        probe, probed = file.parent.name, read_records(file.parent / "predictions.jsonl")
        probes[probe] = read_probe(file)
        candidates[probe] = digest_of(probed)
        values |= probe_values(probe, probed)
    settings = settings_of(stage, run, config)
    metrics = read_json(folder / "eval" / "metrics.json")
    return Result(stage, run, config, folder, settings, values, candidates, metrics, probes)


def read_probe(file: Path) -> dict:
    content = read_json(file)
    if any("bins" in row and "spread" not in row for row in content["rows"].values()):
        raise ValueError(f"{file}: bins of an older version, without intervals; measure it again")
    return content


def read_records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def digest_of(records: list[dict]) -> str:
    facts = [[r["user"], r["candidates"], r["target"]] for r in records]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


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
