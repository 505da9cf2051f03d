"""MovieLens in the layouts that GroupLens publishes:
what people have is one of these folders, or its zip.

    ratings.dat, movies.dat    1M and 10M: `::` between the fields, 10M with half stars
    ratings.csv, movies.csv    latest, latest-small, 20M, 25M, 32M: CSV with a header
    u.data, u.item             100K: tabs; movies between `|`

Movies are UTF-8, or latin-1 where they are not.
MovieLens may not be redistributed (grouplens.org/datasets/movielens)."""

import contextlib
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
from tqdm import tqdm

from data import Interactions
from loaders.table import clean_title, make_interactions

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
    movie_separator: str
    header: str = ""  # first line of ratings
    movie_fields: str = ""  # what a line of movies is, for messages

    @property
    def fields(self) -> str:
        """What a line of ratings is."""
        return self.header or self.separator.join(("UserID", "MovieID", "Rating", "Timestamp"))


LAYOUTS = (
    Layout(NAME, "ratings.dat", "movies.dat", "::", "::", movie_fields="MovieID::Title::Genres"),
    Layout(
        f"{NAME}-csv",
        "ratings.csv",
        "movies.csv",
        ",",
        ",",
        header="userId,movieId,rating,timestamp",
        movie_fields="movieId,title,genres",
    ),
    Layout(f"{NAME}-100k", "u.data", "u.item", "\t", "|", movie_fields="MovieID|Title|..."),
)


def load(config) -> Interactions:
    """The log in a folder or zip, of whichever layout. ValueError names the file and line."""
    layout, place = _find(Path(config.data_dir))
    ratings, ratings_name = _read(place, layout.ratings)
    movies, movies_name = _read(place, layout.movies)
    names = dict(_movies(movies, movies_name, layout))
    user, item, rating, timestamp = _ratings(ratings, ratings_name, layout).T
    name = layout.name
    if layout.separator == "::" and (rating % 1).any():
        name = f"{NAME}-10m"
    try:
        titles = movielens_titles(names)
        interactions = make_interactions(
            user.astype(np.int64), item.astype(np.int64), rating, timestamp, titles, name
        )
    except ValueError as error:
        raise ValueError(f"{movies_name}: {error}") from None
    return replace(interactions, words=WORDS)


# ------------------------------------------------------------------------------------ the two files
def _ratings(content: bytes, file: str, layout: Layout) -> np.ndarray:
    """(n, 4) float64: user, movie, rating, time, checked."""
    separator, first_line = layout.separator.encode(), 1
    start, _, rest = content.partition(b"\n")
    start = start.removeprefix(b"\xef\xbb\xbf").strip()
    if layout.header and start.replace(b'"', b"").lower() == layout.header.lower().encode():
        content, first_line = rest, 2
        start = content[:200].split(b"\n", 1)[0]
    if start.count(separator) != 3:
        raise ValueError(f"{file}: line {first_line} is not {layout.fields}: {_shown(start)}")
    if not content.endswith(b"\n"):
        number = content.count(b"\n") + first_line
        raise ValueError(f"{file}: ends in the middle of line {number}: truncated? Fetch it again")
    table = content.replace(separator, b"\t") if layout.separator != "\t" else content
    try:
        table = np.loadtxt(io.BytesIO(table), delimiter="\t", comments=None, ndmin=2)
    except ValueError:  # its message counts lines from 0 or 1 and recommends its own options
        sep = re.escape(separator)
        record = re.compile(rb"\d+%s\d+%s\d+(\.\d+)?%s\d+\s*" % (sep, sep, sep))
        number, line = next(
            (n, line)
            for n, line in enumerate(content.splitlines(), first_line)
            if not record.fullmatch(line)
        )
        raise ValueError(f"{file}: line {number} is not {layout.fields}: {_shown(line)}") from None
    user, item, rating, timestamp = table.T
    sensible = (rating >= 0.5) & (rating <= 5) & (user > 0) & (item > 0) & (timestamp > 0)
    if not sensible.all():
        bad = int(np.flatnonzero(~sensible)[0])
        raise ValueError(
            f"{file}: line {bad + first_line}: expected ids > 0, rating 0.5 to 5, time > 0: "
            f"{table[bad]}"
        )
    return table


def _movies(content: bytes, file: str, layout: Layout) -> Iterator[tuple[int, str]]:
    """(number, name) of every movie."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    if layout.movie_separator == ",":
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        needed, exact = 3, True
    else:
        lines = (line.split(layout.movie_separator) for line in text.splitlines())
        needed, exact = (3, True) if layout.movie_separator == "::" else (2, False)
    try:
        for number, parts in enumerate(lines, 1):
            if number == 1 and layout.header and parts[:2] == ["movieId", "title"]:
                continue
            fits = len(parts) == needed or (len(parts) > needed and not exact)
            if not fits or not parts[0].isdecimal() or not parts[1].strip():
                line = layout.movie_separator.join(parts)
                raise ValueError(f"line {number} is not {layout.movie_fields}: {line[:80]!r}")
            yield int(parts[0]), clean_title(parts[1])
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


def _shown(line: bytes) -> str:
    return repr(line[:80])


# ----------------------------------------------------------------------------------- where they are
Place = tuple[Path, str]  # a folder and "", or a zip and the folder inside it


def _find(path: Path) -> tuple[Layout, Place]:
    """The layout at `path`: a folder, its ratings, a zip, or the folder around one of them."""
    if path.is_file() and path.name in {layout.ratings for layout in LAYOUTS}:
        path = path.parent
    places = [path]
    if path.is_dir():  # 1M before the others; then whichever is the only one
        places += [path / "ml-1m", path / "ml-1m.zip"]
        others = sorted(p for p in path.glob("ml-*") if p not in places)
        places += others
    found = []
    for place in places:
        layouts = _layouts_in(place)
        found += [(layout, (place, inside)) for layout, inside in layouts]
        if found and place not in places[3:]:
            break
    if len(found) > 1:
        names = sorted(f"{place[0]}: {layout.ratings}" for layout, place in found)
        raise ValueError(f"{path}: several editions of MovieLens: {names}; give one as --data_dir")
    if not found:
        if path.is_file():
            raise ValueError(f"{path}: holds no ratings.dat; expected the MovieLens-1M zip")
        wanted = ", ".join(layout.ratings for layout in LAYOUTS)
        raise ValueError(
            f"{path}: no {wanted} and no ml-1m.zip there; give the folder or zip of MovieLens, "
            "or --download for 1M"
        )
    return found[0]


def _layouts_in(place: Path) -> list[tuple[Layout, str]]:
    """Layouts whose ratings lie in this folder or zip, and the folder inside the zip."""
    if place.is_dir():
        return [(layout, "") for layout in LAYOUTS if (place / layout.ratings).is_file()]
    if not place.is_file() or (place.suffix != ".zip" and not zipfile.is_zipfile(place)):
        return []
    with _opened(place) as archive:
        names = [n for n in archive.namelist() if not n.startswith("__MACOSX")]
    out = []
    for layout in LAYOUTS:
        inside = [n for n in names if n.rpartition("/")[2] == layout.ratings]
        out += [(layout, inside[0].rpartition("/")[0])] if inside else []
    if not out:
        raise ValueError(f"{place}: holds no ratings.dat; expected the MovieLens-1M zip")
    return out


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip while it is read; whatever is wrong with it is one ValueError."""
    damage = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError)
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except damage as error:
        raise ValueError(f"{path}: not a whole zip file ({error}); fetch it again") from None


def _read(place: Place, name: str) -> tuple[bytes, str]:
    """Contents of one of the files, and its name for messages."""
    path, inside = place
    if path.is_dir():
        if not (path / name).is_file():
            raise ValueError(f"{path}: no {name} there; it belongs beside the ratings")
        return (path / name).read_bytes(), str(path / name)
    member = f"{inside}/{name}".lstrip("/")
    with _opened(path) as archive:
        if member not in archive.namelist():
            raise ValueError(f"{path}: holds no {name}; expected the MovieLens-1M zip")
        return archive.read(member), f"{path}:{member}"


# ------------------------------------------------------------------------------------------- titles
def movielens_titles(names: dict[int, str]) -> dict[int, str]:
    """ "Matrix, The (1999)" -> "The Matrix";
    the year stays where two movies share a name ("Titanic (1997)")."""
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
