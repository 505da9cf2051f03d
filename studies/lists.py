"""HR@1 of a run's stages on other candidate lists of the same test users: popular, or retrieved.

    python -m studies.lists --run runs/planted-1
    python -m studies.report runs/planted-1             its table shows all lists side by side

Trained as they were, the stages are tested again where the 19 others are drawn by popularity, and
where they are Markov's best for the history (--negatives retrieved), beside the lists of the run.
The results go to RUN/lists/STAGE/KIND. Histories and targets are those of
the run's own test split. The baselines of studies.sequential keep
no weights; with --lists they write the same when they are trained."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import arg, parse_config, run_cli
from eval import evaluate, ranking_metrics
from loaders.counting import counting_baselines
from loaders.frozen import prepare
from loaders.lists import KINDS, other_lists
from runtime.policy import free_memory
from runtime.processes import setup_distributed
from runtime.sources import (
    SourceConfig,
    check_run_data,
    load_source,
    sources_of,
    with_run_options,
)
from runtime.stages import save_predictions
from studies.methods import Method
from studies.results import Result, read_records
from studies.statistics import bootstrap


@dataclass(frozen=True)
class ListsConfig(SourceConfig):
    """Test the stages of a run on other candidate lists of its test users."""

    decode: str = arg(
        "greedy",
        "how answers are written, as eval.py does it",
        group="how",
        choices=("greedy", "generate", "trie"),
    )
    decode_rest: bool = arg(
        True, "generate an answer where no candidate verifies; off: count it invalid"
    )
    micro_batch_tokens: int = arg(8192, "padded tokens of one forward pass", at_least=1)

    def __post_init__(self):
        if not self.run:
            raise ValueError("studies.lists tests the stages of a run on other lists: give --run")
        super().__post_init__()
        if self.dataset == "prepared":
            raise ValueError("prepared examples have no log to draw other lists from")


def list_values(result: Result, kind: str) -> np.ndarray | None:
    """(n,) HR@1 ranked first of every test user on lists of this kind, if it was measured."""
    if result.config.get("negatives", "uniform") == kind:
        return result.values["ranking/hit_ratio@1"]
    folder = result.run / "lists" / result.stage / kind
    if not (folder / "predictions.jsonl").exists():
        return None
    records = read_records(folder / "predictions.jsonl")
    scores = np.array([r["logps"] for r in records])
    targets = np.array([r["target_slot"] for r in records])
    return ranking_metrics(scores, targets)["hit_ratio@1"]


def list_rows(methods: dict[str, Method]) -> list[list[str]]:
    """HR@1 of every method on every kind of list; none if only one kind was measured."""
    rows, measured = [], set()
    for name, method in methods.items():
        cells = []
        for kind in KINDS:
            values = [v for r in method.results if (v := list_values(r, kind)) is not None]
            if values:
                measured.add(kind)
                mean = np.mean(values, axis=0)
                low, high = bootstrap(mean)
                cells.append(f"{mean.mean():.4f} [{low:.3f}, {high:.3f}]")
            else:
                cells.append("")
        rows.append([name, *cells])
    return [*counting_rows(methods), *rows] if len(measured) > 1 else []


def counting_rows(methods: dict[str, Method]) -> list[list[str]]:
    """HR@1 of the counting recommenders, as measured beside the stages."""
    found: dict[str, dict[str, float]] = {}
    for method in methods.values():
        for r in method.results:
            own = r.config.get("negatives", "uniform")
            files = {own: r.folder / "eval" / "metrics.json"}
            for kind in KINDS:
                files.setdefault(kind, r.run / "lists" / r.stage / kind / "metrics.json")
            for kind, file in files.items():
                if file.exists():
                    for name, value in json.loads(file.read_text())["baselines"].items():
                        found.setdefault(name, {})[kind] = value
    return [
        [name, *(f"{values[kind]:.4f}" if kind in values else "" for kind in KINDS)]
        for name, values in found.items()
    ]


def main() -> None:
    config = with_run_options(parse_config(ListsConfig))
    _, _, device = setup_distributed()
    prepared, sources = prepare(config), sources_of(config)
    check_run_data(config, sources, prepared.hash)
    lists = other_lists(prepared.splits["test"], config)
    baselines = {kind: counting_baselines(examples) for kind, examples in lists.items()}
    options = (config.decode, config.decode_rest, config.max_length, config.micro_batch_tokens)
    for name, source in sources.items():
        model, tokenizer = load_source(config, source, device)
        for kind, examples in lists.items():
            metrics, records = evaluate(
                model, tokenizer, examples, *options, baselines=baselines[kind]
            )
            metrics |= {"data_hash": prepared.hash, "negatives": kind}
            save_predictions(Path(config.run) / "lists" / name / kind, metrics, records)
            print(f"{name}, {kind}: HR@1 ranked first {metrics['ranking/hit_ratio@1']:.4f}")
        del model
        free_memory()  # before the next one is loaded


if __name__ == "__main__":
    run_cli(main)
