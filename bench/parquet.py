"""Time and memory of preparing a large Parquet log, made on the spot:
parts as a warehouse exports them, and a table of items.

    python bench/parquet.py                     100 million rows: about 3 GB of temporary files
    python bench/parquet.py --rows 10000000

The log holds a user (int64), an item (text), a rating (decimal), a time (microseconds, UTC), and a
review that nobody asked for; its rows stand in the order of time, so that a user's lie all over it.
Users and items are drawn unevenly, as people choose: half of the rows are of the 25 % most active
users. The load runs in a process of its own."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from harness import header, parser, table

from loaders.frozen import DataConfig, load_interactions, prepare

PART = 2_500_000  # rows of a file


def write_log(folder: Path, rows: int) -> int:
    """Parts and items; the bytes of the parts."""
    rng = np.random.default_rng(0)
    num_users, num_items = max(1000, rows // 50), max(1000, rows // 400)
    (folder / "log").mkdir()
    size = 0
    for part, first in enumerate(range(0, rows, PART)):
        n = min(PART, rows - first)
        users = (rng.random(n) ** 1.5 * num_users).astype(np.int64)
        items = (rng.random(n) ** 2 * num_items).astype(np.int32)
        names = pa.array([f"B{i:09d}" for i in range(num_items)])
        stars = pa.array(rng.integers(1, 6, n)).cast(pa.decimal128(19, 0))
        moments = 1_500_000_000_000_000 + (first + np.arange(n)) * 1_000_000
        columns = {
            "user_id": users,
            "item_id": pa.DictionaryArray.from_arrays(items, names).dictionary_decode(),
            "rating": stars.cast(pa.decimal128(4, 1)),
            "event_time": pa.array(moments, pa.timestamp("us", "UTC")),
            "review": pa.array([f"review number {k % 997}" for k in range(n)]),
        }
        file = folder / f"log/part-{part:05d}.snappy.parquet"
        pq.write_table(pa.table(columns), file, row_group_size=500_000)
        size += file.stat().st_size
    ids = [f"B{i:09d}" for i in range(num_items)]
    titles = [f"Item {i}" for i in range(num_items)]
    pq.write_table(pa.table({"item_id": ids, "title": titles}), folder / "items.parquet")
    return size


def child(folder: Path, step: str) -> None:
    """Read, or prepare, in this process; print seconds, processor seconds,
    peak MiB and rows kept."""
    config = DataConfig(
        dataset="parquet",
        data_dir=str(folder / "log"),
        item_file=str(folder / "items.parquet"),
        columns="timestamp=event_time",
        prepared_dir=str(folder / "prepared"),
    )
    started = time.perf_counter()
    if step == "read":
        interactions = load_interactions(config)
    else:
        interactions = prepare(config).interactions
    used = resource.getrusage(resource.RUSAGE_SELF)
    facts = [
        time.perf_counter() - started,
        used.ru_utime + used.ru_stime,
        used.ru_maxrss / 1024,
        len(interactions.user),
    ]
    print(json.dumps(facts))


def main() -> None:
    options = parser(__doc__, rows=100_000_000)
    options.add_argument("--child", nargs=2, help="folder and step; print and stop")
    args = options.parse_args()
    if args.child:
        child(Path(args.child[0]), args.child[1])
        return
    header("Parquet", args, "A made-up log in parts, read from a warm page cache where it fits.")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = write_log(folder, args.rows)
        for step in ("read", "prepare"):
            command = [sys.executable, __file__, "--child", str(folder), step]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            seconds, processor, peak, kept = json.loads(done.stdout.splitlines()[-1])
            what = "read" if step == "read" else "read, drawn, hashed, written, mapped"
            rows.append(
                [
                    what,
                    f"{size / 1e6:,.0f}",
                    f"{seconds:.0f}",
                    f"{processor:.0f}",
                    f"{args.rows / seconds / 1e3:,.0f}",
                    f"{kept:,.0f}",
                    f"{peak:,.0f}",
                ]
            )
    names = ["what", "files, MB", "seconds", "processor, s", "1,000 rows/s", "interactions kept"]
    table([*names, "peak of the process, MiB"], rows)


if __name__ == "__main__":
    main()
