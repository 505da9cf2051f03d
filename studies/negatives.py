"""More negatives side by side: what K rejected titles do to answers, rewards and log-probs.

A row for every K of recpo and of sdpo; all else must be equal. Training figures are means over the
last tenth of the steps in metrics.jsonl, then over the runs. Whether the loss may fall while
accuracy falls with it is read from one row to the next."""

import json

import numpy as np

from studies.methods import Method, base_method, differing
from studies.results import Result

LAST_SHARE = 0.1  # of the steps
TRAINING = {
    "loss": "loss",
    "rewards/margins": "reward gap, nats",
    "rewards/accuracies": "chosen beats all rejected",
    "logps/chosen": "log-prob of chosen",
    "logps/rejected": "log-prob of rejected",
}
TESTED = {
    "hit_ratio@1": "HR@1 written",
    "ranking/hit_ratio@1": "HR@1 ranked first",
    "valid_ratio": "ValidRatio",
}


def last_steps(result: Result) -> dict[str, float]:
    """Means over the last tenth of the steps (one at least); empty without metrics.jsonl."""
    file = result.folder / "metrics.jsonl"
    if not file.exists():
        return {}
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [entry for entry in entries if "rewards/margins" in entry]
    last = steps[-max(1, round(LAST_SHARE * len(steps))) :] if steps else []
    return {key: float(np.mean([e[key] for e in last])) for key in TRAINING} if last else {}


def ladder(methods: dict[str, Method], stage: str) -> list[tuple[int, Method]]:
    """(K, method) of the stage's methods that differ from its base in K alone, by K."""
    base = base_method(methods, stage)
    if base is None:
        return []
    found = []
    for method in methods.values():
        alike = differing(method.settings, base.settings) <= {"num_negatives"}
        if method.stage == stage and alike:
            found.append((int(method.settings["num_negatives"]), method))
    return sorted(found, key=lambda pair: pair[0])


def with_seeds(values: list[float]) -> str:
    """The mean, and the lowest and highest run where there are several."""
    if not values:
        return ""
    mean = f"{np.mean(values):.3f}"
    return f"{mean} ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else mean


def negative_rows(methods: dict[str, Method]) -> list[list[str]]:
    """Cells of every K; none where no method has two."""
    rows = []
    for stage in ("recpo", "sdpo"):
        points = ladder(methods, stage)
        if len(points) < 2:
            continue
        for k, method in points:
            trained = [steps for r in method.results if (steps := last_steps(r))]
            cells = [with_seeds([r.values[key].mean() for r in method.results]) for key in TESTED]
            cells += [with_seeds([steps[key] for steps in trained]) for key in TRAINING]
            rows.append([stage, str(k), str(len(method.results)), *cells])
    return rows


COLUMNS = ["method", "K", "runs", *TESTED.values(), *TRAINING.values()]
