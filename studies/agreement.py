"""Compare two evaluations of the same users, for example in two precisions.

    python eval.py --model demo/base --adapter A ... --output_dir runs/full
    python eval.py --model demo/base --adapter A ... --load_in_4bit --output_dir runs/four
    python -m studies.agreement runs/full/sft runs/four/sft

Differences are second minus first; 95 % intervals resample users. Legend: E users, 20 titles."""

import argparse
from pathlib import Path

import numpy as np

from common import run_cli, table
from studies.methods import TESTED, read_lines, tested_values
from studies.probes import digest_of
from studies.statistics import holm, paired, with_interval


def agreement_text(first: list[dict], second: list[dict]) -> str:
    """Compare two lists of records in Markdown; ValueError if their users or titles differ."""
    if digest_of(first) != digest_of(second):
        raise ValueError("the two evaluations are of different users, titles or targets")
    before, after, rows = tested_values(first), tested_values(second), []
    for measure, name in TESTED.items():
        a, b = before[measure], after[measure]
        holm([difference := paired(b, a)])
        rows.append([name, f"{a.mean():.3f}", f"{b.mean():.3f}", str(difference)])
    before, after = (np.array([r["logps"] for r in part]) for part in (first, second))
    same = (before.argmax(1) == after.argmax(1)).astype(float)
    return (
        f"{table(['', 'first', 'second', 'difference, paired'], rows)}\n\n{len(first)} users. "
        "A title's log-probability changes by (nats):\n"
        f"root mean square {((after - before) ** 2).mean() ** 0.5:.4f}\n"
        f"mean {with_interval((after - before).mean(1))}\n"
        f"same title first in {with_interval(same)} of the lists"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folders", type=Path, nargs=2, help="two folders with predictions.jsonl")
    folders = parser.parse_args().folders
    print(agreement_text(*(read_lines(folder / "predictions.jsonl") for folder in folders)))


if __name__ == "__main__":
    run_cli(main)
