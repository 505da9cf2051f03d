"""Published data sets as short layouts that are read in one way: MovieLens (folder or zip), Amazon
2014, 2018 and 2023, Steam, BeerAdvocate (Python literals, blocks of lines, CSV), LastFM-1K."""

import contextlib
import html
import re
import tempfile
import zipfile
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

from data import Interactions
from loaders.ownlog import Finder
from loaders.readers import Table, find_files, name_of, read_head, read_table, visible_files
from loaders.table import clean_title, finish, usable_rows
from loaders.values import read_ids, read_number

NO_TEXT = frozenset([""])  # a user may be called NULL
WORDS = {
    "movielens": ("movies", "watched", "watch"),
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
BEER = "review/profileName beer/beerId review/overall review/time beer/name beer/ABV beer/style"
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
        "user/profileName": BEER.replace("review/p", "user/p").replace("time", "timeUnix"),
        "review/profileName": BEER,
        "review_profilename": BEER.replace("/", "_").lower(),
    },
    "lastfm": {"": "1 3 - 2 4"},
    "movielens titles": {"movieId": "- movieId - - title", r"^\d+(::|\|)": "- 1 - - 2"},
    "amazon titles": {"parent_asin": "- parent_asin - - title", "": "- asin - - title"},
    "steam titles": {"": "- id - - app_name title"},
}


def files(config) -> list[Path]:
    """The files of the log, and last the one of its titles, if it has one; or a MovieLens zip."""
    name = config.dataset
    logs = find_files(config.data_dir, PATTERNS[name], f"file of {name}", without=("meta_",))
    log, folder = logs[0].name, logs[0].parent
    # Books of Books_5.json.gz, ratings_Books.csv, reviews_Books_5.json.gz, Books.train.csv
    category = re.sub(r"^(ratings|reviews)_|_5$", "", log.split(".")[0])
    movies = {"u.data": "u.item"}.get(log, log.replace("ratings", "movies"))
    patterns = {"movielens": movies, "amazon": f"meta_{category}.json*", "steam": "steam_games*"}
    if name not in patterns or (name == "movielens" and zipfile.is_zipfile(logs[0])):
        return logs
    titled = visible_files(folder, patterns[name])
    if len(titled) != 1 or titled == logs:
        found = [file.name for file in titled]
        raise ValueError(f"{folder}: titles need {patterns[name]} beside {log}; found {found}")
    return logs + titled


def load(config) -> Interactions:
    """The log; interactions with an item without a title are dropped. Hours are ranked within a
    game, and plays, added up at the first one, within an artist."""
    name, logs = config.dataset, files(config)
    if name == "movielens" and len(logs) == 1:
        return load_zipped(config, logs[0])
    titled = [logs.pop()] if name in ("movielens", "amazon", "steam") else []
    percentile = config.ranks or "item" * (name in ("steam", "lastfm"))
    table = read_columns(logs, COLUMNS[name])
    rows = usable_rows(table, name_of(logs), bool(percentile), absent=NO_TEXT)
    if titled:
        table = read_columns(titled, COLUMNS[f"{name} titles"])
    if name == "movielens":
        titles = movie_titles(first_titles(read_ids(table.columns["item"])[1], table))
        if untitled := [movie for movie in rows.item_ids if not titles.get(movie)]:
            raise ValueError(f"{logs[0]}: {titled[0].name} has no title of {untitled[0]!r:.80}")
    else:
        titles = first_titles(rows.item_ids, table)
    titles = [titles[item] for item in rows.item_ids]
    if not any(titles):
        beside, such = name_of(titled or logs), f"{rows.item_ids[:3]!s:.99}"
        raise ValueError(f"{beside}: no title of the log's items, such as {such}")
    if name == "amazon" and re.match("((ratings|reviews)_)?Books", logs[0].name):
        name = "amazon_books"
    key = (lambda number: (len(number), number)) if name == "movielens" else str
    return finish(rows, titles, name, WORDS[name], percentile, summed=name == "lastfm", key=key)


def read_columns(files: list[Path], forms: dict[str, str]) -> Table:
    """The columns that the head of the first file asks for, all of them needed."""
    head = read_head(files[0])
    columns = [columns for mark, columns in forms.items() if re.search(mark, head)]
    if not columns:
        raise ValueError(f"{files[0]}: expected one of {[*forms.values()]}; it begins {head!r:.80}")
    given = {field: name for field, name in zip(FIELDS, columns[0].split()) if name != "-"}
    return read_table(files, Finder(given, (*given,)), plain=True)


# ------------------------------------------------------------------------------------------- titles
def first_titles(item_ids: list[str], table: Table) -> dict[str, str]:
    """The title of each item, from the first row of the table that has one."""
    codes, ids = read_ids(table.columns["item"], NO_TEXT)
    columns = [column for name, column in table.columns.items() if name not in FIELDS[:4]]
    titles = dict.fromkeys(item_ids, "")
    for row, code in enumerate(codes.tolist()):
        if code >= 0 and titles.get(ids[code], "unknown") == "":
            texts = [c.values[c.codes[row]].strip() if c.codes[row] >= 0 else "" for c in columns]
            beer = "style" in table.columns and beer_title(*texts)
            titles[ids[code]] = clean_title(beer or next(filter(None, texts), ""))
    return {i: "" if "<span" in title else title for i, title in titles.items()}  # of a page


def beer_title(name: str, abv: str, style: str) -> str:
    """Name, strength and style, as in the paper: "Sausa Weizen (5% ABV, Hefeweizen)"."""
    with contextlib.suppress(UnicodeError):  # "KÃ¶lsch" is UTF-8 that was read as latin-1
        name = name.encode("latin-1").decode()
    with contextlib.suppress(UnicodeError):
        style = style.encode("latin-1").decode()
    bare = re.sub(r"\d+(\.\d+)?\s*%", "", html.unescape(name))  # some names repeat the strength
    name, strength = " ".join(bare.split()) or name, read_number(abv)
    about = [f"{strength:g}% ABV"] * (strength > 0) + [style] * (style != "")
    return f"{name} ({', '.join(about)})" if name and about else name


# ---------------------------------------------------------------------------------------- MovieLens
ARTICLES = "The|An|A|Les|Le|La|L'|Il|Lo|El|Los|Las|Der|Die|Das|Det|Den|Un|Una"


def load_zipped(config, file: Path) -> Interactions:
    """MovieLens as its zip holds it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(file) as archive:
                for name in archive.namelist():
                    if re.fullmatch(r".*/(ratings|movies|u)\.\w+", f"/{name}"):
                        Path(folder, Path(name).name).write_bytes(archive.read(name))
            return load(replace(config, data_dir=folder))
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
            raise ValueError(f"{file}: damaged or cut off ({error}); fetch it again") from None
        except ValueError as error:
            raise ValueError(str(error).replace(folder, str(file))) from None


def movie_titles(names: dict[str, str]) -> dict[str, str]:
    """ "Matrix, The (1999)" -> "The Matrix"; a year stays where two movies share a name."""
    plain = {}
    for movie, name in names.items():
        title = re.sub(r"\s*\(\d{4}\)$", "", name)
        title = re.sub(rf"^(.+), ({ARTICLES})( \(.*\))?$", r"\2 \1\3", title)
        plain[movie] = re.sub("^L' ", "L'", title)
    shared = Counter(plain.values())
    years = {i: re.search(r"\(\d{4}\)$", names[i]) for i in plain if shared[plain[i]] > 1}
    return plain | {i: f"{plain[i]} {year[0]}" for i, year in years.items() if year}
