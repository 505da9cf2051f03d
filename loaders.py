"""Raw files of five data sets, of a user's own log, and of other projects, into one table (interactions.py).

    movielens      ratings.dat, movies.dat of MovieLens-1M, or its zip
    amazon         2018 reviews as JSON lines, or ratings only as CSV, with the metadata file beside them
    steam          steam_reviews.json, steam_games.json: Python literals, one a line; hours become ratings
    beeradvocate   Python literals, text blocks, or CSV
    lastfm         LastFM-1K's listening events; an interaction is a user's first play of an artist, its amount all plays
    csv, jsonl     your own log (--columns)
    recbole        RecBole's .inter and .item

Files may be gzipped. They are read line by line, as UTF-8 with latin-1 for stray bytes. A line that cannot be understood is
counted and named; more than 1 % of them is an error. What is understood but holds no usable interaction (no play time, no
user name, a rating of 0, an item without title) is left out and counted by reason. Python literals are parsed by a
grammar of their own, with `ast.literal_eval` for what it does not cover; nothing is ever evaluated.

References: MovieLens-1M (grouplens.org/datasets/movielens/1m, may not be redistributed), Amazon 2018 (Ni et al. 2019,
nijianmo.github.io/amazon), Steam (Kang and McAuley 2018, github.com/kang205/SASRec), BeerAdvocate (McAuley and Leskovec
2013), LastFM-1K (Celma 2010), RecBole's atomic files.
"""

import ast
import codecs
import csv
import gzip
import hashlib
import html
import http.client
import io
import itertools
import json
import re
import tarfile
import urllib.request
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from interactions import Interactions, LineCount, LogBuilder, clean_title, make_interactions

MOVIELENS_URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
MOVIELENS_MD5 = "c4d9eecfca2ab87c1945afe126590906"
CHUNK = 1 << 13  # lines that are converted together
MAX_LINE = 1 << 20  # bytes; longer lines are passed over as bad ones
MAX_RECORD_LINES = 50  # of one row of CSV with line breaks inside quotes

codecs.register_error(
    "latin-1", lambda error: (error.object[error.start : error.end].decode("latin-1"), error.end)
)
csv.field_size_limit(MAX_LINE)


# ------------------------------------------------------------------------------------------------ reading files
def open_bytes(path: Path) -> io.BufferedReader:
    """A file's bytes, unpacked if it is gzipped."""
    try:
        with open(path, "rb") as f:
            gzipped = f.read(2) == b"\x1f\x8b"
        return (
            io.BufferedReader(gzip.open(path), 1 << 20)
            if gzipped
            else open(path, "rb", buffering=1 << 20)
        )
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened ({error.strerror or error})") from None


def read_lines(path: Path, source=None) -> Iterator[str]:
    """Lines without their ends. ValueError if the file is damaged; a line above MAX_LINE comes cut off, with a NUL behind it."""
    with source or open_bytes(path) as f:
        try:
            start = f.peek(2)[:2]
            if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                yield from (
                    line.rstrip("\r\n") for line in io.TextIOWrapper(f, "utf-16", errors="replace")
                )
                return
            first = True
            while line := f.readline(MAX_LINE):
                if first and line.startswith(codecs.BOM_UTF8):
                    line = line[3:]
                first = False
                if len(line) == MAX_LINE and line[-1:] != b"\n":
                    line = line[:100] + b"\0"
                    while (rest := f.readline(MAX_LINE)) and rest[-1:] != b"\n":
                        pass
                yield line.decode("utf-8", "latin-1").rstrip("\r\n")
        except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
            raise ValueError(
                f"{path}: the compressed file is damaged or cut off ({error}); fetch it again"
            ) from None


def brief(names: list[str]) -> list[str]:
    """Column names for a message."""
    return [name[:40] for name in names[:20]]


def find_file(path, patterns: Iterable[str], what: str) -> Path:
    """`path` itself if it is a file, else the one file in that folder that fits a pattern; earlier patterns win."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; expected {what}")
    for pattern in patterns:
        found = sorted(f for f in path.glob(pattern) if f.is_file())
        if len(found) > 1:
            raise ValueError(
                f"{path}: several files could be {what}: {[f.name for f in found]}; give one of them as --data_dir"
            )
        if found:
            return found[0]
    inside = [f.name for f in sorted(path.iterdir())][:8]
    raise ValueError(f"{path}: no {what} (looked for {', '.join(patterns)}; there are {inside})")


class Rows:
    """Collects (user, item, amount, time) line by line and hands them to a builder in chunks."""

    def __init__(self, builder: LogBuilder):
        self.builder, self.numbers, self.rows = builder, [], []

    def add(self, number: int, *row) -> None:
        self.numbers.append(number)
        self.rows.append(row)
        if len(self.rows) == CHUNK:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            self.builder.add(self.numbers, *zip(*self.rows, strict=True))
        self.numbers, self.rows = [], []


# ------------------------------------------------------------------------------------------------ records
_TEXT = r"""u?(?:'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")"""
_PLAIN = r"-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|True|False|None"
_PAIR = re.compile(
    rf"({_TEXT}): ({_TEXT}|{_PLAIN}|\{{(?:[^{{}}'\"u]|u(?!['\"])|{_TEXT})*\}}|\[(?:[^\[\]'\"u]|u(?!['\"])|{_TEXT})*\])(, |\}}\s*$)"
)


def literal_record(line: str, wanted: Iterable[str]) -> dict:
    """The wanted keys of a line that is a Python dict literal; ValueError if it is not.

    Its pairs are walked by one regular expression; only a value with escapes, and a line that the expression does not
    cover from end to end, goes through `ast.literal_eval`, which takes ten times as long."""
    found, at, end = {}, 1, ""
    if line.startswith("{"):
        while match := _PAIR.match(line, at):
            key, value, end = match.groups()
            at = match.end()
            key = key.lstrip("u")[1:-1]
            if key in wanted:
                found[key] = value
    if end[:1] != "}":
        record = _literal(line)
        if not isinstance(record, dict):
            raise ValueError("not a dict")
        return {key: record[key] for key in wanted if key in record}
    return {key: _value(text) for key, text in found.items()}


def _value(text: str):
    """What the text of one value means; the usual cases without building a syntax tree."""
    if text[-1] in "'\"" and "\\" not in text:
        return text.lstrip("u")[1:-1]
    if text[-1].isdigit():
        return float(text) if "." in text or "e" in text or "E" in text else int(text)
    return _literal(text)


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from None


def json_record(line: str, wanted: Iterable[str] = ()) -> dict:
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return record


def read_records(path: Path, parse, wanted: Iterable[str], bad) -> Iterator[tuple[int, dict]]:
    """(line number, record) of every line; blank ones are no lines, others go to bad(number, line)."""
    wanted = frozenset(wanted)
    for number, line in enumerate(read_lines(path), 1):
        if not line or line.isspace():
            continue
        try:
            record = parse(line, wanted)
        except ValueError:
            bad(number, line)
            continue
        yield number, record


def read_table(path: Path, delimiter: str = "") -> Iterator[list[str]]:
    """Rows of a CSV file, its delimiter taken from the first line; with a tab given, of a plain table: quotes are characters.

    A quote that is never closed must not swallow the rows behind it: a record of many lines, or one whose later lines look like rows
    of their own, comes as a bad row, and reading goes on with the line after its first."""
    lines = read_lines(path)
    first = next((line for line in lines if line.strip()), "")
    if first.startswith("PK\x03\x04"):
        raise ValueError(f"{path}: a zip or Excel file; save the table as CSV")
    if "\0" in first:
        raise ValueError(f"{path}: not text in UTF-8, or in UTF-16 with a byte-order mark")
    if delimiter == "\t":
        yield from (line.split("\t") for line in itertools.chain([first], lines))
        return
    if re.fullmatch(r"sep=.", first, re.IGNORECASE):  # Excel's way to name the delimiter
        delimiter, first = first[-1], next(lines, "")
    else:
        counts = {d: first.count(d) for d in ",;\t|"}
        delimiter = max(counts, key=counts.get)
    separators, again, taken = first.count(delimiter), deque([first]), []

    def feed() -> Iterator[str]:
        while len(taken) <= MAX_RECORD_LINES:
            line = again.popleft() if again else next(lines, None)
            if line is None:
                return
            taken.append(line)
            yield f"{line}\n"

    while True:
        try:
            for row in csv.reader(feed(), delimiter=delimiter):
                if len(taken) > 1 and (
                    len(taken) > MAX_RECORD_LINES
                    or "".join(taken).count('"') % 2
                    or any(line.count(delimiter) >= max(1, separators) for line in taken[1:])
                ):
                    raise csv.Error("a quote is not closed")
                yield row
                taken.clear()
            return
        except csv.Error as error:
            again.extendleft(reversed(taken[1:]))
            yield [f"{error}: {taken[0][:60] if taken else ''}"]
            taken.clear()


# ------------------------------------------------------------------------------------------------ Amazon 2018
def load_amazon(path, percentile: str = "") -> Interactions:
    """Amazon 2018 reviews (JSON lines) or ratings only (CSV), and meta_<category>.json beside them for the titles."""
    patterns = ("*_5.json*", "[!m]*.json*", "[!m]*.csv*")
    file = find_file(
        path, patterns, "reviews (Books.json.gz, Books_5.json.gz) or ratings (Books.csv)"
    )
    category = re.sub(
        r"^ratings_|(_5)?\.(json|csv)(\.gz)?$", "", file.name
    )  # ratings_Books.csv is the name of 2014
    meta = [
        f
        for f in sorted(file.parent.glob("meta_*.json*"))
        if f.name.split(".")[0] == f"meta_{category}"
    ]
    meta = meta or sorted(file.parent.glob("meta_*.json*"))
    if len(meta) != 1:
        raise ValueError(
            f"{file.parent}: titles need meta_{category}.json.gz beside {file.name}; found {[f.name for f in meta]}"
        )
    is_csv = ".csv" in file.suffixes
    expected = (
        "item,user,rating,timestamp"
        if is_csv
        else "JSON with reviewerID, asin, overall, unixReviewTime"
    )
    builder = LogBuilder(str(file), expected, amounts=bool(percentile))
    if is_csv:
        rows = read_table(file)
        head = list(itertools.islice(rows, 1000))
        full = [row for row in head if len(row) == 4]
        # 2018: item first; 2014: user first. An item has 10 characters, a reviewer A and 9 to 20 more
        item_first = sum(len(row[0]) == 10 for row in full) >= sum(
            len(row[1]) == 10 for row in full
        )
        positions = {"user": int(item_first), "item": int(not item_first), "rating": 2, "time": 3}
        for numbers, table, bad in table_chunks(itertools.chain(head, rows), positions, 4, 1):
            for number, why in bad:
                builder.bad(number, why)
            if numbers:
                builder.add(numbers, *table.values())
    else:
        keys = ("reviewerID", "asin", "overall", "unixReviewTime")
        collected = Rows(builder)
        for number, record in read_records(file, json_record, keys, builder.bad):
            collected.add(number, *(record.get(key) for key in keys))
        collected.flush()
    titles, ids = {}, builder.items
    for item, title in read_titles(meta[0], json_record, "asin", ("title",)):
        if item in ids and title and "<span" not in title:  # pieces of a page instead of a title
            titles.setdefault(item, title)
    return builder.finish(
        titles, "amazon_books" if category.startswith("Books") else "amazon", percentile
    )


def read_titles(file: Path, parse, key: str, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(item id, title) of a file of items; the first of `names` that holds a text is the title, "" if none does."""
    count = LineCount(file, f"records with {key}, {names[0]}")
    for _, record in read_records(file, parse, (key, *names), count.bad):
        count.lines += 1
        item = record.get(key)
        if isinstance(item, (str, int)):  # two lines of Steam's games have no id
            yield (
                str(item),
                next(
                    (
                        record[n]
                        for n in names
                        if isinstance(record.get(n), str) and record[n].strip()
                    ),
                    "",
                ),
            )
    count.check()


Chunk = tuple[
    Sequence[int], dict[str, Sequence], list[tuple[int, str]]
]  # line numbers, values by field, bad lines


def table_chunks(
    rows: Iterator[list[str]], positions: dict[str, int], width: int, first_line: int
) -> Iterator[Chunk]:
    """The columns at `positions` of a table's rows, CHUNK rows at a time; rows of another width are bad."""
    while chunk := list(itertools.islice(rows, CHUNK)):
        numbers, bad = range(first_line, first_line + len(chunk)), []
        first_line += len(chunk)
        if set(map(len, chunk)) != {width}:
            pairs = list(zip(numbers, chunk, strict=True))
            bad = [
                (number, ",".join(row))
                for number, row in pairs
                if len(row) != width and row not in ([], [""])
            ]
            pairs = [(number, row) for number, row in pairs if len(row) == width]
            numbers, chunk = [number for number, _ in pairs], [row for _, row in pairs]
        columns = list(zip(*chunk, strict=True))
        yield (
            numbers,
            {field: columns[at] for field, at in positions.items()} if columns else {},
            bad,
        )


# ------------------------------------------------------------------------------------------------ Steam
def load_steam(path, percentile: str = "") -> Interactions:
    """steam_reviews.json and steam_games.json (Python literals, gzipped or not) of a folder. The amount is hours of play."""
    file = find_file(path, ("steam_reviews*", "*reviews*"), "steam_reviews.json.gz")
    games = find_file(
        file.parent, ("steam_games*", "*games*"), "steam_games.json.gz, for the titles"
    )
    builder = LogBuilder(file, "a Python dict with username, product_id, hours, date", amounts=True)
    rows, keys = Rows(builder), ("username", "product_id", "hours", "date")
    for number, record in read_records(file, literal_record, keys, builder.bad):
        if record.get("hours") is None:
            builder.skip("reviews without hours of play")
        else:
            rows.add(number, *(record.get(key) for key in keys))
    rows.flush()
    titles = {}
    for item, title in read_titles(games, literal_record, "id", ("app_name", "title")):
        if item in builder.items and title:
            titles.setdefault(item, title)
    return builder.finish(titles, "steam", percentile or "item")


# ------------------------------------------------------------------------------------------------ BeerAdvocate
BEER_CSV = {
    "review_profilename": "user",
    "beer_beerid": "item",
    "review_overall": "rating",
    "review_time": "time",
    "beer_name": "name",
    "beer_style": "style",
    "beer_abv": "abv",
}
BEER_KEYS = {
    "review/profileName": "user",
    "user/profileName": "user",
    "beer/beerId": "item",
    "review/overall": "rating",
    "review/time": "time",
    "review/timeUnix": "time",
    "beer/name": "name",
    "beer/style": "style",
    "beer/ABV": "abv",
}


def load_beeradvocate(path, percentile: str = "", title: str = "full") -> Interactions:
    """BeerAdvocate as Python dict lines, as text blocks, or as CSV. `title` full: with strength and style; name: without."""
    patterns = ("*beeradvocate*.json*", "*beeradvocate*.txt*", "*beer*.csv*", "*beer*")
    file = find_file(path, patterns, "beeradvocate.json, beeradvocate.txt or beer_reviews.csv")
    lines = read_lines(file)
    start = next((line for line in lines if line.strip()), "").lstrip()
    builder = LogBuilder(
        file, "a review with user, beer, overall rating and time", amounts=bool(percentile)
    )
    if start.startswith("{"):
        parsed = read_records(file, literal_record, BEER_KEYS, builder.bad)
        records = (
            (number, {BEER_KEYS[key]: value for key, value in record.items()})
            for number, record in parsed
        )
    elif start.startswith(("beer/", "review/")):
        records = _beer_blocks(file)
    else:
        records = _beer_rows(file, builder.bad)
    rows, titles = Rows(builder), {}
    for number, r in records:
        user, item = (str(r.get(key) or "").strip() for key in ("user", "item"))
        name, style = (mend_encoding(str(r.get(key) or "")).strip() for key in ("name", "style"))
        if not user and item:
            builder.skip("reviews without a user name")
            continue
        rows.add(number, user, item, r.get("rating"), r.get("time"))
        if item not in titles and name:
            titles[item] = (
                beer_title(name, str(r.get("abv") or ""), style) if title == "full" else name
            )
    rows.flush()
    return builder.finish(titles, "beeradvocate", percentile)


def _beer_blocks(file: Path) -> Iterator[tuple[int, dict]]:
    """`key: value` lines, a review's ended by an empty one."""
    record, number = {}, 1
    for number, line in enumerate(read_lines(file), 1):
        key, colon, value = line.partition(": ")
        if colon and key in BEER_KEYS:
            record[BEER_KEYS[key]] = value
        elif not line.strip() and record:
            yield number, record
            record = {}
    if record:
        yield number, record


def _beer_rows(file: Path, bad) -> Iterator[tuple[int, dict]]:
    rows = read_table(file)
    header = next(rows, [])
    if missing := BEER_CSV.keys() - set(header):
        raise ValueError(
            f"{file}: line 1 is no header of beer reviews: no column {sorted(missing)}, found {brief(header)}"
        )
    columns = {header.index(name): key for name, key in BEER_CSV.items()}
    for number, row in enumerate(rows, 2):
        if len(row) == len(header):
            yield number, {key: row[c] for c, key in columns.items()}
        elif row:
            bad(number, ",".join(row))


def mend_encoding(text: str) -> str:
    """ "KÃ¶lsch" -> "Kölsch": UTF-8 that somebody has read as latin-1. Other texts stay as they are."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def beer_title(name: str, abv: str, style: str) -> str:
    """Name, strength and style, as the paper's prompts have them: "Sausa Weizen (5% ABV, Hefeweizen)"."""
    name = (
        " ".join(re.sub(r"\d+(\.\d+)?\s*%", "", html.unescape(name)).split()) or name
    )  # some names repeat the strength
    try:
        strength = f"{float(abv):g}% ABV" if float(abv) > 0 else ""
    except ValueError:  # missing
        strength = ""
    about = ", ".join(part for part in (strength, style.strip()) if part)
    return f"{name} ({about})" if about else name


# ------------------------------------------------------------------------------------------------ LastFM-1K
def load_lastfm(path, percentile: str = "") -> Interactions:
    """userid-timestamp-artid-artname-traid-traname.tsv, plain, gzipped, or inside lastfm-dataset-1K.tar.gz.

    An interaction is a user's first play of an artist that has a MusicBrainz id; its amount is the number of all plays."""
    what = "userid-timestamp-artid-artname-traid-traname.tsv, or lastfm-dataset-1K.tar.gz"
    file = find_file(path, ("userid-timestamp*", "lastfm-dataset-1K*"), what)
    builder = LogBuilder(
        file, "user, time, artist id, artist, track id, track between tabs", "sum", amounts=True
    )
    rows, titles = Rows(builder), {}
    for number, line in enumerate(read_lines(file, _lastfm_member(file)), 1):
        fields = line.split("\t")
        if len(fields) != 6:
            builder.bad(number, line)
        elif not fields[2]:
            builder.skip("plays of an artist without MusicBrainz id")
        else:
            rows.add(number, fields[0], fields[2], 1.0, fields[1])
            titles.setdefault(fields[2], fields[3])
    rows.flush()
    return builder.finish(titles, "lastfm", percentile or "item")


def _lastfm_member(file: Path):
    """The events inside the published archive; None if the file is no archive."""
    try:
        if not tarfile.is_tarfile(file):
            return None
        archive = tarfile.open(file)
        member = next((m for m in archive if m.isfile() and "userid-timestamp" in m.name), None)
        if member is None:
            raise ValueError(f"{file}: holds no userid-timestamp-artid-artname-traid-traname.tsv")
        return archive.extractfile(member)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(
            f"{file}: the archive is damaged or cut off ({error}); fetch it again"
        ) from None


# ------------------------------------------------------------------------------------------------ MovieLens-1M
def load_movielens(path) -> Interactions:
    """MovieLens-1M from its folder or zip (`ratings.dat`, `movies.dat`). ValueError names the file and line."""
    ratings, ratings_name = _movielens_file(Path(path), "ratings.dat")
    movies, movies_name = _movielens_file(Path(path), "movies.dat")
    names = {}
    for number, line in enumerate(movies.decode("latin-1").splitlines(), 1):
        parts = line.split("::")
        if len(parts) != 3 or not parts[0].isdigit() or not parts[1].strip():
            raise ValueError(
                f"{movies_name}: line {number} is not MovieID::Title::Genres: {line[:80]!r}"
            )
        names[int(parts[0])] = clean_title(parts[1])

    first = ratings[:200].split(b"\n", 1)[0]
    if first.count(b"::") != 3:
        raise ValueError(
            f"{ratings_name}: line 1 is not UserID::MovieID::Rating::Timestamp: {first[:80]!r}"
        )
    if not ratings.endswith(b"\n"):
        raise ValueError(
            f"{ratings_name}: ends in the middle of line {ratings.count(10) + 1}: truncated? Fetch it again"
        )
    try:
        table = np.loadtxt(
            io.BytesIO(ratings.replace(b"::", b"\t")), delimiter="\t", comments=None, ndmin=2
        )
    except ValueError:  # its message counts lines from 0 or 1 and recommends its own options
        record = re.compile(rb"\d+::\d+::\d+(\.\d+)?::\d+")
        number, line = next(
            (n, line)
            for n, line in enumerate(ratings.splitlines(), 1)
            if not record.fullmatch(line)
        )
        raise ValueError(
            f"{ratings_name}: line {number} is not UserID::MovieID::Rating::Timestamp: {line[:80]!r}"
        ) from None
    user, item, rating, timestamp = table.T
    bad = np.flatnonzero(
        ~((rating >= 1) & (rating <= 5) & (user > 0) & (item > 0) & (timestamp > 0))
    )
    if len(bad):
        raise ValueError(
            f"{ratings_name}: line {bad[0] + 1}: expected ids > 0, rating 1 to 5, time > 0: {table[bad[0]]}"
        )
    try:
        titles = movielens_titles(names)
        return make_interactions(
            user.astype(np.int64), item.astype(np.int64), rating, timestamp, titles, "movielens"
        )
    except ValueError as error:
        raise ValueError(f"{movies_name}: {error}") from None


def _movielens_file(path: Path, name: str) -> tuple[bytes, str]:
    """Contents of one of the files, and its name for messages."""
    for folder in (path, path / "ml-1m"):
        if (folder / name).is_file():
            return (folder / name).read_bytes(), str(folder / name)
    archive = path / "ml-1m.zip" if path.is_dir() else path
    if not archive.is_file():
        raise ValueError(
            f"{path}: no {name} and no ml-1m.zip there; give the MovieLens-1M folder or zip, or --download"
        )
    try:
        with zipfile.ZipFile(archive) as z:
            inside = [n for n in z.namelist() if n.rpartition("/")[2] == name]
            if not inside:
                raise ValueError(f"{archive}: holds no {name}; expected the MovieLens-1M zip")
            return z.read(inside[0]), f"{archive}:{inside[0]}"
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise ValueError(f"{archive}: not a whole zip file ({error}); fetch it again") from None


def movielens_titles(names: dict[int, str]) -> dict[int, str]:
    """ "Matrix, The (1999)" -> "The Matrix"; the year stays where two movies share a name ("Titanic (1997)")."""
    plain = {}
    for movie, name in names.items():
        title = re.sub(r"\s*\(\d{4}\)$", "", name)
        article = re.fullmatch(
            r"(.+), (The|An|A|Les|Le|La|L'|Il|Lo|El|Los|Las|Der|Die|Das|Det|Den|Un|Una)( \(.*\))?",
            title,
        )
        if article:
            head, word, rest = article.groups(default="")
            title = f"{word}{'' if word.endswith(chr(39)) else ' '}{head}{rest}"
        plain[movie] = title
    shared = Counter(plain.values())
    return {m: t if shared[t] == 1 else f"{t} {names[m][-6:]}" for m, t in plain.items()}


def download_movielens(path: Path) -> None:
    """Fetch the published zip with a progress bar; it is put in place only after its checksum fits."""
    target = path if path.suffix == ".zip" else path / "ml-1m.zip"
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        with urllib.request.urlopen(MOVIELENS_URL, timeout=60) as response, open(part, "wb") as out:
            total = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=target.name) as bar:
                while block := response.read(1 << 16):
                    out.write(block)
                    bar.update(len(block))
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"{MOVIELENS_URL}: {error}; fetch it by hand and give it as --data_dir"
        ) from None
    found = hashlib.md5(part.read_bytes()).hexdigest()
    if found != MOVIELENS_MD5:
        raise ValueError(
            f"{part}: md5 {found}, published {MOVIELENS_MD5}: damaged or changed; not used"
        )
    part.rename(target)
