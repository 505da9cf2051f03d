"""Published data sets as short layouts that are read in one way: MovieLens (folder or zip), Amazon
2014, 2018 and 2023, Steam, BeerAdvocate (Python literals, blocks of lines, CSV), LastFM-1K."""

import contextlib
import hashlib
import html
import http.client
import itertools
import json
import re
import tempfile
import urllib.request
import zipfile
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from common import writing
from data import Interactions
from loaders.files import SPLIT_NAMES, find_files, matching_files, name_of, read_head, read_lines
from loaders.ownlog import Finder
from loaders.table import Rows, clean_title, finish, usable_rows
from loaders.tables import Table, check_bad, read_table
from loaders.values import read_ids

MOVIELENS_URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
MOVIELENS_MD5 = "c4d9eecfca2ab87c1945afe126590906"
NO_TEXT = frozenset([""])  # a user may be called NULL
MOVIES = ("movies", "watched", "watch")
WORDS = {
    "movielens": MOVIES,
    "amazon": ("products", "bought", "buy"),
    "amazon_books": ("books", "read", "read"),
    "steam": ("games", "played", "play"),
    "beeradvocate": ("beers", "drank", "drink"),
    "lastfm": ("artists", "listened to", "listen to"),
}
PATTERNS = {  # of a log; the first one that fits a file is taken
    "movielens": ("ratings.dat", "ratings.csv", "u.data"),  # 1M and 10M; 20M and later; 100K
    "amazon": ("*_5.json*", "*.json*", "*.csv*"),
    "steam": ("steam_reviews*", "*reviews*"),
    "beeradvocate": ("*beeradvocate*.json*", "*beeradvocate*.txt*", "*beer*.csv*", "*beer*"),
    "lastfm": ("userid-timestamp*",),
}
FIELDS = ("user", "item", "rating", "timestamp", "title", "more", "style")
COLUMNS = {  # what the head of a file holds -> names or places of these, - for none
    "movielens": {"movieId": "userId movieId rating timestamp", r"^\d+(::|\t|,)": "1 2 3 4"},
    "amazon": {
        "parent_asin": "user_id parent_asin rating timestamp",  # 2023
        r"^\w{10},(?!\w{10},)\w+,\d": "2 1 3 4",  # 2018: an item's id has 10 characters
        r"^\w+,\w+,\d": "1 2 3 4",  # 2014
        "reviewerID": "reviewerID asin overall unixReviewTime",
    },
    "steam": {"": "username product_id hours date"},
    "beeradvocate": {
        "user/profileName": "user/profileName beer/beerId review/overall review/timeUnix "
        "beer/name beer/ABV beer/style",
        "review/profileName": "review/profileName beer/beerId review/overall review/time "
        "beer/name beer/ABV beer/style",
        "review_profilename": "review_profilename beer_beerid review_overall review_time "
        "beer_name beer_abv beer_style",
    },
    "lastfm": {"": "1 3 - 2 4"},
    "amazon titles": {"parent_asin": "- parent_asin - - title", "": "- asin - - title"},
    "steam titles": {"": "- id - - app_name title"},
}


def files(config) -> list[Path]:
    """The files of the log, and last the one of its titles, if it has one; or a MovieLens zip."""
    name = config.dataset
    if name == "movielens" and Path(config.data_dir).name == "ml-1m.zip":
        download_movielens(Path(config.data_dir))
    logs = find_files(config.data_dir, PATTERNS[name], f"file of {name}", "meta_*", SPLIT_NAMES)
    log, folder = logs[0].name, logs[0].parent
    # Books of Books_5.json.gz, ratings_Books.csv, reviews_Books_5.json.gz, Books.train.csv
    category = re.sub(r"^(ratings|reviews)_|_5$", "", log.split(".")[0])
    movies = {"u.data": "u.item"}.get(log, log.replace("ratings", "movies"))
    patterns = {"movielens": movies, "amazon": f"meta_{category}.json*", "steam": "steam_games*"}
    if name not in patterns or (name == "movielens" and zipfile.is_zipfile(logs[0])):
        return logs
    titled = matching_files(folder, patterns[name])
    if len(titled) != 1 or titled == logs:
        found = [file.name for file in titled]
        raise ValueError(f"{folder}: titles need {patterns[name]} beside {log}; found {found}")
    return logs + titled


def load(config) -> Interactions:
    """The log; interactions with an item without a title are dropped. Hours are ranked within a
    game, and plays, added up at the first one, within an artist."""
    name, logs = config.dataset, files(config)
    zipped = name == "movielens" and len(logs) == 1
    if zipped or (name == "beeradvocate" and read_head(logs[0]).startswith((b"beer/", b"review/"))):
        return load_unpacked(config, logs[0])
    titled = [logs.pop()] if name in ("movielens", "amazon", "steam") else []
    percentile = config.ranks or "item" * (name in ("steam", "lastfm"))
    table = read_columns(logs, COLUMNS[name])
    rows = usable_rows(table, name_of(logs), bool(percentile), absent=NO_TEXT)
    if name == "movielens":
        return finish_movielens(rows, logs[0], titled[0])
    if titled:
        table = check_bad(read_columns(titled, COLUMNS[f"{name} titles"]), titled[0])
    titles = first_titles(rows.item_ids, table)
    if name == "amazon" and re.match("((ratings|reviews)_)?Books", logs[0].name):
        name = "amazon_books"
    repeats = "sum" if name == "lastfm" else "last"
    return finish(rows, titles, name, WORDS[name], percentile, repeats)


def load_unpacked(config, file: Path) -> Interactions:
    """The log in a zip; or in blocks of `key: value` lines, with empty lines between them."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            if config.dataset == "movielens":
                with zipfile.ZipFile(file) as archive:
                    for name in archive.namelist():
                        if re.fullmatch(r".*/(ratings|movies|u)\.\w+", f"/{name}"):
                            Path(folder, Path(name).name).write_bytes(archive.read(name))
            else:
                blocks = itertools.groupby(read_lines(file), lambda line: line.strip() != "")
                with open(Path(folder, "beeradvocate.json"), "w") as out:
                    for block in (lines for is_filled, lines in blocks if is_filled):
                        out.write(json.dumps(dict(s.partition(": ")[::2] for s in block)) + "\n")
            return load(replace(config, data_dir=folder))
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
            raise ValueError(f"{file}: damaged or cut off ({error}); fetch it again") from None
        except ValueError as error:
            raise ValueError(str(error).replace(folder, str(file))) from None


def read_columns(files: list[Path], forms: dict[str, str]) -> Table:
    """The columns that the head of the first file asks for, all of them needed."""
    head = read_head(files[0], 1 << 16).decode(errors="replace").lstrip("\ufeff \r\n")
    columns = [columns for mark, columns in forms.items() if re.search(mark, head)]
    if not columns:
        wanted = " or ".join(forms.values())
        raise ValueError(f"{files[0]}: expected columns {wanted}; it begins {head!r:.80}")
    given = {field: name for field, name in zip(FIELDS, columns[0].split()) if name != "-"}
    find = Finder(given, (*given,), (*given,), "expected", usual={})
    kind = "literal" if head[:1] in "[{" else "plain" if "\t" in head.partition("\n")[0] else "csv"
    return read_table(files, kind, find)


# ------------------------------------------------------------------------------------------- titles
def first_titles(item_ids: list[str], table: Table) -> list[str]:
    """The title of each item, from the first row of the table that has one."""
    codes, ids = read_ids(table.columns["item"], NO_TEXT)
    columns = [column for name, column in table.columns.items() if name not in FIELDS[:4]]
    titles = dict.fromkeys(item_ids, "")
    for row, code in enumerate(codes.tolist()):
        if code >= 0 and titles.get(ids[code], "unknown") == "":
            values = [c.values[c.codes[row]] if c.codes[row] >= 0 else "" for c in columns]
            texts = [value.strip() if isinstance(value, str) else "" for value in values]
            beer = "style" in table.columns and beer_title(texts[0], values[1], texts[2])
            titles[ids[code]] = clean_title(beer or next(filter(None, texts), ""))
    return ["" if "<span" in title else title for title in titles.values()]  # pieces of a page


def beer_title(name: str, abv, style: str) -> str:
    """Name, strength and style, as in the paper: "Sausa Weizen (5% ABV, Hefeweizen)"."""
    with contextlib.suppress(UnicodeError):  # "KÃ¶lsch" is UTF-8 that was read as latin-1
        name = name.encode("latin-1").decode()
    with contextlib.suppress(UnicodeError):
        style = style.encode("latin-1").decode()
    bare = re.sub(r"\d+(\.\d+)?\s*%", "", html.unescape(name))  # some names repeat the strength
    name = " ".join(bare.split()) or name
    try:
        strength = f"{float(abv):g}% ABV" if float(abv) > 0 else ""
    except ValueError:  # missing
        strength = ""
    about = ", ".join(filter(None, (strength, style)))
    return f"{name} ({about})" if name and about else name


# ---------------------------------------------------------------------------------------- MovieLens
def download_movielens(target: Path) -> None:
    """Download ml-1m.zip if it is not there; it is kept only if its checksum fits."""
    if target.exists():
        return
    try:
        with urllib.request.urlopen(MOVIELENS_URL, timeout=60) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        way_out = "download it by hand and give it as --data_dir"
        raise ValueError(f"{MOVIELENS_URL}: {error}; {way_out}") from None
    if (found := hashlib.md5(content).hexdigest()) != MOVIELENS_MD5:
        raise ValueError(f"{MOVIELENS_URL}: md5 {found}, published {MOVIELENS_MD5}: not used")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        part.write_bytes(content)
        part.rename(target)


def finish_movielens(rows: Rows, ratings: Path, movies: Path) -> Interactions:
    """The log, its ids in the order of numbers; every movie of it must have a title."""
    name = {".dat": "movielens", ".csv": "movielens-csv", ".data": "movielens-100k"}[ratings.suffix]
    name = "movielens-10m" if name == "movielens" and (rows.amount % 1).any() else name
    try:
        rows.user, rows.user_ids = by_number(rows.user, rows.user_ids)
        rows.item, rows.item_ids = by_number(rows.item, rows.item_ids)
        titles = movie_titles(movies)
        titles = [titles[item] for item in rows.item_ids]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{ratings}, {movies.name}: {error} is no movie; fetch them") from None
    return finish(rows, titles, name, MOVIES, by_text=False)


def by_number(codes: np.ndarray, ids: list[str]) -> tuple[np.ndarray, list[str]]:
    order = sorted(range(len(ids)), key=lambda code: int(ids[code]))
    return np.argsort(order).astype(np.int32)[codes], [ids[code] for code in order]


MOVIE = re.compile(r'^(\d+)(::|,|\|)("(?:[^"\n]|"")*"|.*?)\2', re.MULTILINE)  # id, title
ARTICLES = "The|An|A|Les|Le|La|L'|Il|Lo|El|Los|Las|Der|Die|Das|Det|Den|Un|Una"


def movie_titles(file: Path) -> dict[str, str]:
    """ "Matrix, The (1999)" -> "The Matrix"; a year stays where two movies share a name."""
    content, plain = file.read_bytes(), {}
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    names = {movie: name for movie, _, name in MOVIE.findall(text) if name.strip()}
    if file.suffix == ".csv":  # a quote inside of quotes is doubled
        names = {movie: re.sub('"("?)', r"\1", name) for movie, name in names.items()}
    names = {movie: clean_title(name) for movie, name in names.items()}
    for movie, name in names.items():
        title = re.sub(r"\s*\(\d{4}\)$", "", name)
        title = re.sub(rf"^(.+), ({ARTICLES})( \(.*\))?$", r"\2 \1\3", title)
        plain[movie] = re.sub("^L' ", "L'", title)
    shared = Counter(plain.values())
    years = {i: re.search(r"\(\d{4}\)$", names[i]) for i in plain if shared[plain[i]] > 1}
    return plain | {i: f"{plain[i]} {year[0]}" for i, year in years.items() if year}
