"""Speed and memory of reading your own logs, compared with pandas on the same files.

    python -m bench.data       20 million rows, 1 million JSON lines (--rows: another number)

Rows hold user, item, rating, time and title, users and items drawn unevenly, as people choose.
`prepared` is all that a run waits for: read, examples drawn, hashed, written, mapped. pandas reads
the same file, sorts it by user and time and drops repeated pairs. Each row is measured in its own
process, with two Arrow threads. MovieLens-1M is read if --movielens names it."""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from loaders.frozen import DataConfig, prepare

ROOT = Path(__file__).parents[1]
PART = 1_000_000  # rows made at a time


def make_rows(rng, n: int) -> pa.Table:
    user = pa.array((rng.random(n) ** 1.5 * 200_000).astype(np.int32))
    item = pa.array((rng.random(n) ** 2 * 50_000).astype(np.int32))
    users = pa.array([f"u{u:07d}" for u in range(200_000)])
    titles = pa.array([f"Item number {i}" for i in range(50_000)])
    columns = {"user": users.take(user), "item": item, "rating": rng.integers(1, 6, n)}
    columns |= {"timestamp": 10**9 + rng.integers(0, 5 * 10**8, n), "title": titles.take(item)}
    return pa.table(columns)


def write_files(folder: Path, rows: int, lines: int) -> dict[str, Path]:
    """Write files of made-up rows; returns kind -> file."""
    rng = np.random.default_rng(0)
    files = {kind: folder / f"log.{kind}" for kind in ("csv", "parquet", "jsonl")}
    with open(files["csv"], "wb") as f:
        for first in range(0, rows, PART):
            part = make_rows(rng, min(PART, rows - first))
            options = pa.csv.WriteOptions(include_header=first == 0, quoting_style="none")
            pa.csv.write_csv(part, f, options)
            if first == 0:
                writer = pq.ParquetWriter(files["parquet"], part.schema)
            writer.write_table(part)
    writer.close()
    records = make_rows(rng, lines).to_pylist()
    files["jsonl"].write_text("".join(json.dumps(record) + "\n" for record in records))
    return files


def child(kind: str, file: Path, kept: str) -> None:
    """Prepare, or let pandas read, in this process; print seconds, CPU seconds, peak MiB, rows."""
    pa.set_cpu_count(2)
    started = time.perf_counter()
    if kind == "pandas":
        import pandas as pd

        log = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file)
        log = log.sort_values(["user", "timestamp"], kind="stable")
        rows = len(log.drop_duplicates(["user", "item"], keep="last"))
    else:
        config = DataConfig(dataset=kind, data_dir=str(file), prepared_dir=kept)
        rows = len(prepare(config).interactions.user)
    wall = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps([wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, rows]))


def measure(kind: str, file: Path, folder: Path) -> None:
    """Measure and print a row of the table."""
    module, place = [sys.executable, "-m", "bench.data"], str(folder / f"p-{kind}")
    command = [*module, "--child", kind, str(file), place]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    wall, cpu, peak, rows = json.loads(done.stdout.splitlines()[-1])
    size = file.stat().st_size / 1e6
    row = f"| {file.name} ({size:,.0f} MB): {'pandas' if kind == 'pandas' else 'prepared'} "
    print(f"{row}| {wall:.1f} | {cpu:.1f} | {peak:,.0f} | {rows:,} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--movielens", default="", help="ml-1m.zip")
    parser.add_argument("--child", nargs=3, help="kind, file and folder; print and stop")
    args = parser.parse_args()
    if args.child:
        child(args.child[0], Path(args.child[1]), args.child[2])
        return
    print("| what | seconds | CPU seconds | peak of the process, MiB | interactions |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for kind, file in write_files(folder, args.rows, args.lines).items():
            measure(kind, file, folder)
            if kind != "jsonl":
                measure("pandas", file, folder)
        if args.movielens:
            measure("movielens", Path(args.movielens), folder)


if __name__ == "__main__":
    main()
