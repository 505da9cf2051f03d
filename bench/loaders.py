"""Speed and memory of the loaders, on files made on the spot.

    python bench/loaders.py                  20 million rows of CSV, 200 MB of each other format
    python bench/loaders.py --rows 1000000 --mb 20

CSV rows hold user, item, rating, time, title, as an own log would. JSON lines and Python literals
have the fields and the text of Amazon's, Steam's and BeerAdvocate's published lines; LastFM's lines
come again and again for the same pairs, and once more with three times the lines, which must not
take more memory. Each load runs in a process of its own.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from harness import header, parser, table

from data import build_examples
from loaders.frozen import DataConfig, load_interactions, prepare

TEXT = (
    "A lot of foam. But a lot.\tIn the smell some banana, and then lactic and tart. "
    'It\'s "not" a good start. '
) * 4
LASTFM = "userid-timestamp-artid-artname-traid-traname.tsv"


def integers(rng, n: int, *limits: int) -> Iterable[tuple[int, ...]]:
    """n rows of random integers below the limits."""
    return zip(*(rng.integers(0, limit, n).tolist() for limit in limits), strict=True)


def csv_rows(rng, n: int) -> str:
    user = (rng.random(n) ** 1.5 * 200_000).astype(int)
    item = (rng.random(n) ** 2 * 50_000).astype(int)
    rating, timestamp = rng.integers(1, 6, n), 10**9 + rng.integers(0, 5 * 10**8, n)
    columns = [column.tolist() for column in (user, item, rating, timestamp)]
    rows = zip(*columns, strict=True)
    return "".join(f"u{u:07d},{i},{r},{t},Item number {i}\n" for u, i, r, t in rows)


def amazon_lines(rng, n: int) -> str:
    lines = []
    for u, i, r in integers(rng, n, 100_000, 20_000, 5):
        record = {
            "overall": r + 1.0,
            "verified": True,
            "reviewTime": "09 4, 2015",
            "reviewerID": f"A{u:012d}",
            "asin": f"B{i:09d}",
            "style": {"Format:": " Paperback"},
            "reviewText": TEXT,
            "summary": "Five Stars",
            "unixReviewTime": 1441324800,
        }
        lines.append(json.dumps(record))
    return "\n".join(lines) + "\n"


def steam_lines(rng, n: int) -> str:
    lines = []
    for u, i, h in integers(rng, n, 100_000, 10_000, 900):
        record = {
            "username": f"Chaos {u}",
            "hours": h / 10,
            "products": 41,
            "product_id": str(i),
            "page_order": 0,
            "date": "2017-12-17",
            "text": TEXT,
            "early_access": False,
            "page": 1,
        }
        lines.append(repr(record))
    return "\n".join(lines) + "\n"


def beer_lines(rng, n: int) -> str:
    lines = []
    for u, i, r in integers(rng, n, 30_000, 60_000, 9):
        record = {
            "review/appearance": 2.5,
            "beer/style": "Hefeweizen",
            "beer/name": f"Weizen {i}",
            "review/timeUnix": 1234817823,
            "beer/ABV": 5.0,
            "beer/beerId": str(i),
            "beer/brewerId": "10325",
            "review/timeStruct": {"hour": 20, "min": 57},
            "review/overall": 1 + r / 2,
            "review/text": TEXT,
            "user/profileName": f"user {u}",
        }
        lines.append(repr(record))
    return "\n".join(lines) + "\n"


def lastfm_lines(rng, n: int) -> str:
    return "".join(
        f"user_{u:06d}\t2009-05-{d + 1:02d}T23:08:57Z\tmbid-{a:032d}\tArtist {a}\t\tSome track\n"
        for u, a, d in integers(rng, n, 990, 300, 28)
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
    kept = str(Path(path).parent / "prepared")
    config = DataConfig(dataset=dataset, data_dir=path, prepared_dir=kept)
    started = time.perf_counter()
    if step == "prepare":
        interactions = prepare(config).interactions
    else:
        interactions = load_interactions(config)
        if step == "examples":
            build_examples(interactions, config)
    seconds = time.perf_counter() - started
    print(
        seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, len(interactions.user)
    )


def measure(what: str, dataset: str, file: Path, step: str = "load") -> list[str]:
    """A row of the table, from a process of its own."""
    command = [sys.executable, __file__, "--child", dataset, str(file), step]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    seconds, peak, kept = map(float, done.stdout.split()[-3:])
    mb = file.stat().st_size / 1e6
    return [
        what,
        f"{mb:,.0f}",
        f"{seconds:.0f}",
        f"{mb / seconds:.0f}",
        f"{kept:,.0f}",
        f"{peak:,.0f}",
    ]


def measure_csv(folder: Path, num_rows: int) -> list[list[str]]:
    head = "user,item,rating,timestamp,title\n"
    file = write(folder / "log.csv", csv_rows, 0, 500_000, num_rows, head)
    whole = "the same: read, examples drawn, hashed, written, mapped"
    rows = [measure(f"own CSV, {num_rows:,} rows: read", "csv", file)]
    rows.append(measure(whole, "csv", file, "prepare"))
    file.unlink()
    return rows


def measure_published(folder: Path, size: int) -> list[list[str]]:
    """The formats of the paper's other data sets, `size` bytes each."""
    for name in ("amazon", "steam", "1", "3"):
        (folder / name).mkdir()
    books = [json.dumps({"asin": f"B{i:09d}", "title": f"Book {i}"}) for i in range(20_000)]
    (folder / "amazon/meta_Books.json").write_text("\n".join(books) + "\n")
    file = write(folder / "amazon/Books.json", amazon_lines, size, 10_000)
    rows = [measure("Amazon, JSON lines", "amazon", file)]

    games = [repr({"app_name": f"Game {i}", "id": str(i)}) for i in range(10_000)]
    (folder / "steam/steam_games.json").write_text("\n".join(games) + "\n")
    file = write(folder / "steam/steam_reviews.json", steam_lines, size, 10_000)
    rows.append(measure("Steam, Python literals", "steam", file))

    file = write(folder / "beeradvocate.json", beer_lines, size, 10_000)
    rows.append(measure("BeerAdvocate, Python literals", "beeradvocate", file))

    for factor, many in ((1, "the"), (3, "three times as many")):
        file = write(folder / str(factor) / LASTFM, lastfm_lines, factor * size, 100_000)
        rows.append(measure(f"LastFM, {many} lines over the same pairs", "lastfm", file))
    return rows


def main() -> None:
    options = parser(__doc__, rows=20_000_000, mb=200)
    options.add_argument("--child", nargs=3, help="dataset, path and step; print and stop")
    args = options.parse_args()
    if args.child:
        child(*args.child)
        return
    note = "Files of made-up rows in the published formats, read from a warm page cache."
    header("Loading", args, note)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = measure_csv(folder, args.rows) + measure_published(folder, args.mb * 10**6)
    columns = ["what", "file, MB", "seconds", "MB/s", "interactions kept"]
    table([*columns, "peak of the process, MiB"], rows)


if __name__ == "__main__":
    main()
