"""Speed and memory of the loaders, on files made on the spot.

    python bench/loaders.py                     20 million rows of CSV, and 200 MB of each other format
    python bench/loaders.py --rows 1000000 --mb 20

CSV rows hold user, item, rating, time, title, as an own log would. JSON lines and Python literals have the fields and the
text of Amazon's, Steam's and BeerAdvocate's published lines; LastFM's lines come again and again for the same pairs, and once
more with three times the lines, which must not take more memory. Each load runs in a process of its own.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import header, parser, table

from data import build_examples
from loaders.frozen import DataConfig, load_log, prepare

TEXT = (
    'A lot of foam. But a lot.\tIn the smell some banana, and then lactic and tart. It\'s "not" a good start. '
    * 4
)


def csv_rows(rng, n: int) -> str:
    user, item = (
        (rng.random(n) ** 1.5 * 200_000).astype(int),
        (rng.random(n) ** 2 * 50_000).astype(int),
    )
    columns = (user, item, rng.integers(1, 6, n), 10**9 + rng.integers(0, 5 * 10**8, n))
    return "".join(
        f"u{u:07d},{i},{r},{t},Item number {i}\n"
        for u, i, r, t in zip(*(c.tolist() for c in columns), strict=True)
    )


def amazon_lines(rng, n: int) -> str:
    lines = []
    for u, i, r in zip(
        *(rng.integers(0, m, n).tolist() for m in (100_000, 20_000, 5)), strict=True
    ):
        record = {"overall": r + 1.0, "verified": True, "reviewTime": "09 4, 2015", "reviewerID": f"A{u:012d}", "asin": f"B{i:09d}",
                  "style": {"Format:": " Paperback"}, "reviewText": TEXT, "summary": "Five Stars", "unixReviewTime": 1441324800}  # fmt: skip
        lines.append(json.dumps(record))
    return "\n".join(lines) + "\n"


def steam_lines(rng, n: int) -> str:
    lines = []
    for u, i, h in zip(
        *(rng.integers(0, m, n).tolist() for m in (100_000, 10_000, 900)), strict=True
    ):
        record = {"username": f"Chaos {u}", "hours": h / 10, "products": 41, "product_id": str(i), "page_order": 0,
                  "date": "2017-12-17", "text": TEXT, "early_access": False, "page": 1}  # fmt: skip
        lines.append(repr(record))
    return "\n".join(lines) + "\n"


def beer_lines(rng, n: int) -> str:
    lines = []
    for u, i, r in zip(*(rng.integers(0, m, n).tolist() for m in (30_000, 60_000, 9)), strict=True):
        record = {"review/appearance": 2.5, "beer/style": "Hefeweizen", "beer/name": f"Weizen {i}", "review/timeUnix": 1234817823,
                  "beer/ABV": 5.0, "beer/beerId": str(i), "beer/brewerId": "10325", "review/timeStruct": {"hour": 20, "min": 57},
                  "review/overall": 1 + r / 2, "review/text": TEXT, "user/profileName": f"user {u}"}  # fmt: skip
        lines.append(repr(record))
    return "\n".join(lines) + "\n"


def lastfm_lines(rng, n: int) -> str:
    columns = zip(*(rng.integers(0, m, n).tolist() for m in (990, 300, 28)), strict=True)
    return "".join(
        f"user_{u:06d}\t2009-05-{d + 1:02d}T23:08:57Z\tmbid-{a:032d}\tArtist {a}\t\tSome track\n"
        for u, a, d in columns
    )


def write(file: Path, make, size: int, unit: int, rows: int = 0, head: str = "") -> Path:
    """A file of `size` bytes, or of so many rows, made `unit` rows at a time."""
    rng, written = np.random.default_rng(0), 0
    with open(file, "w", encoding="utf-8") as f:
        f.write(head)
        while written < rows if rows else f.tell() < size:
            count = min(unit, rows - written) if rows else unit
            f.write(make(rng, count))
            written += count
    return file


def child(dataset: str, path: str, step: str) -> None:
    """Load (and prepare) in this process, then print seconds, peak MiB and rows kept."""
    config = DataConfig(
        dataset=dataset, data_dir=path, prepared_dir=str(Path(path).parent / "prepared")
    )
    started, parts = time.perf_counter(), []
    if step == "prepare":
        log = prepare(config).log
    else:
        log = load_log(config)
        parts.append(time.perf_counter() - started)
        if step == "examples":
            build_examples(log, config)
    parts.append(time.perf_counter() - started)
    print(parts[-1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, len(log.user))


def main() -> None:
    options = parser(__doc__, rows=20_000_000, mb=200)
    options.add_argument("--child", nargs=3, help="dataset, path and step; print and stop")
    args = options.parse_args()
    if args.child:
        child(*args.child)
        return
    header(
        "Loading",
        args,
        "Files of made-up rows in the published formats, read from a warm page cache.",
    )
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = args.mb * 10**6

        def measure(what: str, dataset: str, file: Path, step: str = "load") -> None:
            command = [sys.executable, __file__, "--child", dataset, str(file), step]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            seconds, peak, kept = map(float, done.stdout.split()[-3:])
            mb = file.stat().st_size / 1e6
            rows.append(
                [
                    what,
                    f"{mb:,.0f}",
                    f"{seconds:.0f}",
                    f"{mb / seconds:.0f}",
                    f"{kept:,.0f}",
                    f"{peak:,.0f}",
                ]
            )

        file = write(
            folder / "log.csv",
            csv_rows,
            0,
            500_000,
            args.rows,
            "user,item,rating,timestamp,title\n",
        )
        measure(f"own CSV, {args.rows:,} rows: read", "csv", file)
        measure("the same: read, examples drawn, hashed, written, mapped", "csv", file, "prepare")
        file.unlink()
        (folder / "amazon").mkdir()
        titles = "".join(
            json.dumps({"asin": f"B{i:09d}", "title": f"Book {i}"}) + "\n" for i in range(20_000)
        )
        (folder / "amazon/meta_Books.json").write_text(titles)
        measure(
            "Amazon, JSON lines",
            "amazon",
            write(folder / "amazon/Books.json", amazon_lines, size, 10_000),
        )
        (folder / "steam").mkdir()
        games = "".join(repr({"app_name": f"Game {i}", "id": str(i)}) + "\n" for i in range(10_000))
        (folder / "steam/steam_games.json").write_text(games)
        measure(
            "Steam, Python literals",
            "steam",
            write(folder / "steam/steam_reviews.json", steam_lines, size, 10_000),
        )
        measure(
            "BeerAdvocate, Python literals",
            "beeradvocate",
            write(folder / "beeradvocate.json", beer_lines, size, 10_000),
        )
        name = "userid-timestamp-artid-artname-traid-traname.tsv"
        for factor in (1, 3):
            (folder / str(factor)).mkdir()
            file = write(folder / str(factor) / name, lastfm_lines, factor * size, 100_000)
            measure(
                f"LastFM, {'the' if factor == 1 else 'three times as many'} lines over the same pairs",
                "lastfm",
                file,
            )
    table(
        ["what", "file, MB", "seconds", "MB/s", "interactions kept", "peak of the process, MiB"],
        rows,
    )


if __name__ == "__main__":
    main()
