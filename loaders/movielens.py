"""MovieLens in the layouts that GroupLens publishes:
what people have is one of these folders, or its zip.

    ratings.dat, movies.dat    1M and 10M: `::` between the fields, 10M with half stars
    ratings.csv, movies.csv    latest, latest-small, 20M, 25M, 32M: CSV with a header
    u.data, u.item             100K: tabs; movies between `|`

Movies are UTF-8, or latin-1 where they are not.
MovieLens may not be redistributed (grouplens.org/datasets/movielens)."""

import csv
import hashlib
import http.client
import io
import re
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from tqdm import tqdm

from data import Interactions
from loaders.table import clean_title, make_interactions
from loaders.tables import BETWEEN

NAME, WORDS = "movielens", ("movies", "watched", "watch")
MOVIELENS_URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
MOVIELENS_MD5 = "c4d9eecfca2ab87c1945afe126590906"


@dataclass(frozen=True)
class Layout:
    """Names and separators of the two files of one edition."""

    name: str  # of the log: the paper's figures stand beside "movielens", which is 1M
    ratings: str
    movies: str
    separator: str  # of ratings
    rating_fields: str
    movie_separator: str
    movie_fields: str


IDS = ("UserID", "MovieID", "Rating", "Timestamp")
LAYOUTS = (
    Layout(NAME, "ratings.dat", "movies.dat", "::", "::".join(IDS), "::", "MovieID::Title::Genres"),
    Layout(
        f"{NAME}-csv",
        "ratings.csv",
        "movies.csv",
        ",",
        "userId,movieId,rating,timestamp",
        ",",
        "movieId,title,genres",
    ),
    Layout(f"{NAME}-100k", "u.data", "u.item", "\t", "\t".join(IDS), "|", "MovieID|Title|..."),
)


def files(config) -> list[Path]:
    """All that is read."""
    layout, place = find(Path(config.data_dir))
    if isinstance(place, Path):
        return [place / layout.ratings, place / layout.movies]
    return [Path(place.root.filename)]


def load(config) -> Interactions:
    """The log in a folder or zip, of whichever layout. ValueError names the file and line."""
    layout, place = find(Path(config.data_dir))
    names = dict(read_movies(*read(place, layout.movies), layout))
    user, item, rating, timestamp = read_ratings(*read(place, layout.ratings), layout)
    ten_million = layout.separator == "::" and (rating % 1).any()
    name = f"{NAME}-10m" if ten_million else layout.name
    try:
        log = make_interactions(user, item, rating, timestamp, movielens_titles(names), name)
    except ValueError as error:
        raise ValueError(f"{place / layout.movies}: {error}") from None
    return replace(log, words=WORDS)


# ------------------------------------------------------------------------------------ the two files
def read_ratings(content: bytes, file: str, layout: Layout) -> list[np.ndarray]:
    """User, movie, rating, time (n,) each, checked."""
    separator, first_line = layout.separator.encode(), 1
    start, _, rest = content.partition(b"\n")
    start = start.removeprefix(b"\xef\xbb\xbf").strip().replace(b'"', b"").lower()
    if start == layout.rating_fields.lower().encode():
        content, first_line = rest, 2
    if content.strip() and not content.endswith(b"\n"):
        number = content.count(b"\n") + first_line
        raise ValueError(f"{file}: ends in the middle of line {number}: truncated? Fetch it again")
    table = content.replace(separator, BETWEEN.encode())
    kinds = {"user": pa.int64(), "item": pa.int64(), "rating": pa.float64(), "time": pa.int64()}
    try:
        found = pa.csv.read_csv(
            io.BytesIO(table),
            pa.csv.ReadOptions(column_names=list(kinds)),
            pa.csv.ParseOptions(delimiter=BETWEEN, quote_char=False, ignore_empty_lines=False),
            pa.csv.ConvertOptions(column_types=kinds, null_values=[]),
        )
    except pa.ArrowInvalid:
        record = re.compile(rb"\d+%b\d+%b\d+(\.\d+)?%b\d+\s*" % ((re.escape(separator),) * 3))
        lines = enumerate(content.splitlines() or [b""], first_line)
        number, line = next((n, line) for n, line in lines if not record.fullmatch(line))
        expected = layout.rating_fields
        raise ValueError(f"{file}: line {number} is not {expected}: {line[:80]!r}") from None
    user, item, rating, time = (column.to_numpy() for column in found.columns)
    wrong = ~((rating >= 0.5) & (rating <= 5) & (user > 0) & (item > 0) & (time > 0))
    if wrong.any():
        line = int(np.flatnonzero(wrong)[0]) + first_line
        raise ValueError(f"{file}: line {line}: expected ids > 0, rating 0.5 to 5, time > 0")
    return [user, item, rating, time]


def read_movies(content: bytes, file: str, layout: Layout) -> Iterator[tuple[int, str]]:
    """(number, name) of every movie."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    mark, width = layout.movie_separator, 2 if layout.movie_separator == "|" else 3
    lines = (line.split(mark) for line in text.splitlines())
    if mark == ",":
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for number, parts in enumerate(lines, 1):
            if number == 1 and parts[:2] == ["movieId", "title"]:
                continue
            fits = len(parts) == width or (len(parts) > width and mark == "|")
            if not fits or not parts[0].isdecimal() or not parts[1].strip():
                line = mark.join(parts)[:80]
                raise ValueError(f"line {number} is not {layout.movie_fields}: {line!r}")
            yield int(parts[0]), clean_title(parts[1])
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


# ----------------------------------------------------------------------------------- where they are
DAMAGE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError)


def find(path: Path) -> tuple[Layout, Path | zipfile.Path]:
    """The layout at `path` and the folder that holds it, perhaps in a zip: `path` is that folder,
    its ratings, a zip, or the folder around one of them."""
    if path.is_file() and path.name in {layout.ratings for layout in LAYOUTS}:
        path = path.parent
    places = [path]
    if path.is_dir():  # 1M before the others; then whichever is the only one
        places += [path / "ml-1m", path / "ml-1m.zip"]
        places += sorted(p for p in path.glob("ml-*") if p not in places)
    found = []
    for number, place in enumerate(places):
        found += layouts_in(place)
        if found and number < 3:
            break
    if len(found) > 1:
        names = sorted(f"{place}: {layout.ratings}" for layout, place in found)
        raise ValueError(f"{path}: several editions of MovieLens: {names}; give one as --data_dir")
    if not found:
        wanted = ", ".join(layout.ratings for layout in LAYOUTS)
        raise ValueError(
            f"{path}: no {wanted} and no ml-1m.zip there; give the folder or zip of MovieLens, "
            "or --data_dir ml-1m.zip, which is fetched if it is missing"
        )
    return found[0]


def layouts_in(place: Path) -> list[tuple[Layout, Path | zipfile.Path]]:
    """Layouts whose ratings lie in this folder or zip, each with its folder."""
    if place.is_dir():
        return [(layout, place) for layout in LAYOUTS if (place / layout.ratings).is_file()]
    if not place.is_file() or (place.suffix != ".zip" and not zipfile.is_zipfile(place)):
        return []
    try:
        names = [n for n in zipfile.ZipFile(place).namelist() if not n.startswith("__MACOSX")]
    except DAMAGE as error:
        raise ValueError(f"{place}: not a whole zip file ({error}); fetch it again") from None
    found = []
    for layout in LAYOUTS:
        inside = [n for n in names if n.rpartition("/")[2] == layout.ratings][:1]
        found += [(layout, zipfile.Path(place, n.removesuffix(layout.ratings))) for n in inside]
    if not found:
        raise ValueError(f"{place}: holds no ratings.dat; expected the MovieLens-1M zip")
    return found


def read(place: Path | zipfile.Path, name: str) -> tuple[bytes, str]:
    """The content of one of the files, and its name for messages."""
    file = place / name
    if not file.is_file():
        raise ValueError(f"{place}: no {name} there; it belongs beside the ratings")
    try:
        return file.read_bytes(), str(file)
    except DAMAGE as error:
        raise ValueError(f"{file}: not a whole file ({error}); fetch it again") from None


# ------------------------------------------------------------------------------------------- titles
ARTICLES = "The|An|A|Les|Le|La|L'|Il|Lo|El|Los|Las|Der|Die|Das|Det|Den|Un|Una"


def movielens_titles(names: dict[int, str]) -> dict[int, str]:
    """ "Matrix, The (1999)" -> "The Matrix";
    the year stays where two movies share a name ("Titanic (1997)")."""
    plain = {}
    for movie, name in names.items():
        title = re.sub(r"\s*\(\d{4}\)$", "", name)
        if article := re.fullmatch(rf"(.+), ({ARTICLES})( \(.*\))?", title):
            head, word, rest = article.groups(default="")
            title = f"{word}{'' if word.endswith(chr(39)) else ' '}{head}{rest}"
        plain[movie] = title
    shared = Counter(plain.values())
    out = {}
    for movie, title in plain.items():
        year = re.search(r"\(\d{4}\)$", names[movie])
        out[movie] = f"{title} {year[0]}" if shared[title] > 1 and year else title
    return out


def download_movielens(path: Path) -> None:
    """Fetch the published zip with a progress bar;
    it is put in place only after its checksum fits."""
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
