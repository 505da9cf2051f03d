"""MovieLens as GroupLens publishes it: one of these folders, or its zip.

    ratings.dat, movies.dat    1M and 10M: `::` between the fields, 10M with half stars
    ratings.csv, movies.csv    latest, 20M, 25M, 32M: CSV with a header
    u.data, u.item             100K: tabs between the fields, bars between those of a movie

MovieLens may not be redistributed (grouplens.org/datasets/movielens)."""

import hashlib
import http.client
import io
import re
import urllib.request
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from common import writing
from data import Interactions
from loaders.table import clean_title, make_interactions

WORDS = ("movies", "watched", "watch")
MOVIELENS_URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
MOVIELENS_MD5 = "c4d9eecfca2ab87c1945afe126590906"
# ratings -> movies, the separator of each, and the name of the log (the paper's is 1M)
LAYOUTS = {
    "ratings.dat": ("movies.dat", "::", "::", "movielens"),
    "ratings.csv": ("movies.csv", ",", ",", "movielens-csv"),
    "u.data": ("u.item", "\t", "|", "movielens-100k"),
}
Folder = Path | zipfile.Path


def files(config) -> list[Path]:
    """All that is read; a missing ml-1m.zip is fetched."""
    if Path(config.data_dir).name == "ml-1m.zip":
        download_movielens(Path(config.data_dir))
    folder, ratings = find(Path(config.data_dir))
    names = [ratings, LAYOUTS[ratings][0]]
    zipped = isinstance(folder, zipfile.Path)
    return [Path(folder.root.filename)] if zipped else [folder / name for name in names]


def find(path: Path) -> tuple[Folder, str]:
    """The folder that holds the files, perhaps in a zip, and the name of its ratings; `path` is
    that folder, its ratings, a zip, or what stands around one of them."""
    path = path.parent if path.name in LAYOUTS else path
    # a folder counts more than its zip
    around = {p.name.removesuffix(".zip"): p for p in sorted(path.glob("ml-*"), reverse=True)}
    for places in ([path], around.values()):
        folders = [Path(place) for place in places]
        for root in map(zipfile.Path, filter(zipfile.is_zipfile, folders[:])):
            folders += [root, *(folder for folder in root.iterdir() if folder.is_dir())]
        found = [(f, name) for f in folders for name in LAYOUTS if (f / name).is_file()]
        if found:
            break
    if len(found) != 1:
        there = sorted(str(folder / ratings) for folder, ratings in found) or "none"
        raise ValueError(
            f"{path}: expected one edition of MovieLens ({', '.join(LAYOUTS)}), found {there}; "
            "give its folder or zip as --data_dir (ml-1m.zip is fetched if it is missing)"
        )
    return found[0]


def load(config) -> Interactions:
    """The log in a folder or zip, of whichever layout; ValueError names the file and row."""
    folder, ratings = find(Path(config.data_dir))
    movies, separator, movie_separator, name = LAYOUTS[ratings]
    kinds = {"user": pa.int64(), "movie": pa.int64(), "rating": pa.float64(), "time": pa.int64()}
    user, movie, rating, time = columns = read_columns(folder / ratings, separator, kinds)
    wrong = (user < 1) | (movie < 1) | ~((rating >= 0.5) & (rating <= 5)) | (time < 1)
    if wrong.any():
        row = separator.join(str(column[wrong.argmax()]) for column in columns)
        raise ValueError(f"{folder / ratings}: {row}: ids and times are above 0, ratings 0.5 to 5")
    kinds = {"movie": pa.int64(), "title": pa.string()}
    ids, names = read_columns(folder / movies, movie_separator, kinds)
    known = {i: clean_title(name) for i, name in zip(ids.tolist(), names) if name.strip()}
    titles = movielens_titles(known)
    if separator == "::" and (rating % 1).any():
        name = "movielens-10m"
    try:
        log = make_interactions(user, movie, rating, time, titles, name)
    except ValueError as error:
        raise ValueError(f"{folder / movies}: {error}; fetch it again") from None
    return replace(log, words=WORDS)


def read_columns(file: Folder, separator: str, kinds: dict) -> list[np.ndarray]:
    """The first columns of a file of UTF-8 or latin-1, one for each of these types."""
    content = file.read_bytes()
    if "user" in kinds and not content.endswith(b"\n"):
        raise ValueError(f"{file}: ends in the middle of a line: truncated? Fetch it again")
    try:
        content.decode()
    except UnicodeDecodeError:
        content = content.decode("latin-1").encode()
    delimiter = separator.replace("::", "\x1f")
    content = content.replace(separator.encode(), delimiter.encode())
    header = int(b"movieid" in content[:40].lower())
    types = {f"f{n}": kind for n, kind in enumerate(kinds.values())}
    # with threads, an error does not say which row it is in
    read = pa.csv.ReadOptions(autogenerate_column_names=True, skip_rows=header, use_threads=False)
    quote = '"' if separator == "," else False
    parse = pa.csv.ParseOptions(delimiter=delimiter, quote_char=quote, ignore_empty_lines=False)
    convert = pa.csv.ConvertOptions(column_types=types, include_columns=[*types], null_values=[])
    try:
        table = pa.csv.read_csv(io.BytesIO(content), read, parse, convert)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        what = f"expected {separator.join(kinds)} in each line"
        found = str(error).replace(delimiter, separator)[:200]
        raise ValueError(f"{file}: {what}: {found}; fetch it again") from None
    return [column.to_numpy() for column in table.columns]


ARTICLES = "The|An|A|Les|Le|La|L'|Il|Lo|El|Los|Las|Der|Die|Das|Det|Den|Un|Una"


def movielens_titles(names: dict[int, str]) -> dict[int, str]:
    """ "Matrix, The (1999)" -> "The Matrix"; a year stays where two movies share a name."""
    plain = {}
    for movie, name in names.items():
        title = re.sub(r"\s*\(\d{4}\)$", "", name)
        title = re.sub(rf"^(.+), ({ARTICLES})( \(.*\))?$", r"\2 \1\3", title)
        plain[movie] = re.sub("^L' ", "L'", title)
    shared = Counter(plain.values())
    years = {i: re.search(r"\(\d{4}\)$", names[i]) for i in plain if shared[plain[i]] > 1}
    return plain | {i: f"{plain[i]} {year[0]}" for i, year in years.items() if year}


def download_movielens(path: Path) -> None:
    """Fetch the published zip, unless it is there; it is kept only if its checksum fits."""
    target = path if path.suffix == ".zip" else path / "ml-1m.zip"
    if target.exists():
        return
    try:
        with urllib.request.urlopen(MOVIELENS_URL, timeout=60) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        way_out = "fetch it by hand and give it as --data_dir"
        raise ValueError(f"{MOVIELENS_URL}: {error}; {way_out}") from None
    found = hashlib.md5(content).hexdigest()
    if found != MOVIELENS_MD5:
        raise ValueError(f"{MOVIELENS_URL}: md5 {found}, published {MOVIELENS_MD5}: not used")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        part.write_bytes(content)
        part.rename(target)
