"""Two evaluations of the same users, paired: what a change of precision does to a model.

    python eval.py --model demo/base --adapter A ... --output_dir runs/full
    python eval.py --model demo/base --adapter A ... --load_in_4bit --output_dir runs/four
    python -m studies.agreement runs/full/sft runs/four/sft

Arguments are folders with eval.py's or train.py's predictions.jsonl, one example a user. All is
second minus first; intervals are 95 %, by resampling users. Left out: several seeds, many
questions at once (studies.report). Legend: E users, N = 20 titles each."""

import argparse
from pathlib import Path

import numpy as np

from common import run_cli
from studies.results import digest_of, read_records, tested_values
from studies.statistics import bootstrap

NAMES = {
    "hit_ratio@1": "HR@1 written",
    "valid_ratio": "valid answers",
    "ranking/hit_ratio@1": "HR@1 ranked first",
}


def logprob_changes(first: np.ndarray, second: np.ndarray) -> dict[str, tuple]:
    """(mean, low, high) of the change of a title's log-prob, in nats, and of the share of users
    whose best title stays the same; `first` and `second` are log-probs (E, N)."""
    change = second - first
    squares = (change**2).mean(1)  # a user's titles are drawn together, (E,)
    same = (first.argmax(1) == second.argmax(1)).astype(float)
    per_user = {"mean": change.mean(1), "rms": squares, "same first": same}
    found = {name: (values.mean(), *bootstrap(values)) for name, values in per_user.items()}
    found["rms"] = tuple(np.sqrt(found["rms"]))  # quantiles keep their order under a root
    return found


def agreement_text(first: list[dict], second: list[dict]) -> str:
    """Markdown of two lists of records; ValueError if they are of other users or titles."""
    if digest_of(first) != digest_of(second):
        raise ValueError("the two evaluations are of different users, titles or targets")
    lines = ["| | first | second | difference, paired |", "|---|---|---|---|"]
    before, after = tested_values(first), tested_values(second)
    for measure, name in NAMES.items():
        a, b = before[measure], after[measure]
        low, high = bootstrap(b - a)
        difference = f"{(b - a).mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append(f"| {name} | {a.mean():.3f} | {b.mean():.3f} | {difference} |")

    logps = [np.array([r["logps"] for r in records]) for records in (first, second)]
    changes = logprob_changes(*logps)
    lines += [
        "",
        f"{len(first)} users. A title's log-probability changes by (nats):",
        "root mean square {:.3f} [{:.3f}, {:.3f}]".format(*changes["rms"]),
        "mean {:+.3f} [{:+.3f}, {:+.3f}]".format(*changes["mean"]),
        "same title first in {:.3f} [{:.3f}, {:.3f}] of the lists".format(*changes["same first"]),
    ]
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("first", type=Path, help="folder with predictions.jsonl")
    parser.add_argument("second", type=Path, help="the same users, evaluated another way")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    records = [read_records(folder / "predictions.jsonl") for folder in (args.first, args.second)]
    print(agreement_text(*records))


if __name__ == "__main__":
    run_cli(main)
