"""Published data sets, read by shared code; MovieLens stands in movielens.py.

    Amazon 2014    reviews_Books.json.gz, or ratings_Books.csv (user,item,rating,timestamp)
    Amazon 2018    Books.json.gz, Books_5.json.gz, or Books.csv (item,user,rating,timestamp)
    Amazon 2023    Books.jsonl.gz, Books.csv with a header, or its train, valid and test parts
    Steam          steam_reviews.json.gz, steam_games.json.gz: Python literals; hours of play
    BeerAdvocate   beeradvocate.json (Python literals), beeradvocate.txt (blocks), beer_reviews.csv
    LastFM-1K      userid-timestamp-....tsv, or lastfm-dataset-1K.tar.gz: plays of artists

Amazon's titles come from meta_<category>.json or .jsonl beside the reviews."""

import html
import itertools
import json
import re
import tarfile
import tempfile
from pathlib import Path

from data import Interactions
from loaders.files import SPLIT_NAMES, find_files, matching_files, name_of, read_head, read_lines
from loaders.ownlog import FIELDS, Finder
from loaders.table import clean_title, finish, usable_rows
from loaders.tables import Table, check_bad, read_table
from loaders.values import read_ids

NO_TEXT = frozenset([""])  # a user may be called NULL
WORDS = {
    "amazon": ("products", "bought", "buy"),
    "amazon_books": ("books", "read", "read"),
    "steam": ("games", "played", "play"),
    "beeradvocate": ("beers", "drank", "drink"),
    "lastfm": ("artists", "listened to", "listen to"),
}
# of the files of a log, and of those of its titles; the first pattern that fits one is taken
PATTERNS = {
    "amazon": (("*_5.json*", "*.json*", "*.csv*"), ("meta_{}.json*", "meta_*.json*")),
    "steam": (("steam_reviews*", "*reviews*"), ("steam_games*", "*games*")),
    "beeradvocate": (("*beeradvocate*.json*", "*beeradvocate*.txt*", "*beer*.csv*", "*beer*"), ()),
    "lastfm": (("userid-timestamp*", "lastfm-dataset-1K*"), ()),
}
# what the head of a file holds -> names or places of the columns of its log, and of its titles
AMAZON = "user=reviewerID item=asin rating=overall timestamp=unixReviewTime"
BEER = "user=user/profileName item=beer/beerId rating=review/overall timestamp=review/timeUnix"
BEER += " title=beer/name abv=beer/ABV style=beer/style"
COLUMNS = {
    "amazon": {
        "parent_asin": "user=user_id item=parent_asin rating=rating timestamp=timestamp",
        r"^\w+,\w+,\d": "user=1 item=2 rating=3 timestamp=4",
        "": AMAZON,
    },
    "steam": {"": "user=username item=product_id rating=hours timestamp=date"},
    "beeradvocate": {
        "user/profileName": BEER,
        "review/profileName": BEER.replace("user/", "review/").replace("timeUnix", "time"),
        "": "user=review_profilename item=beer_beerid rating=review_overall timestamp=review_time"
        " title=beer_name abv=beer_abv style=beer_style",
    },
    "lastfm": {"": "user=1 item=3 timestamp=2 title=4"},
}


def find(config) -> tuple[str, list[Path], dict[str, str], list[Path]]:
    """The log's name, its files, which column holds what, and the file of titles, if there is one.

    Ratings of Amazon without a header begin with the user in 2014, in 2018 with the item, whose id
    has 10 characters."""
    name, (patterns, beside) = config.dataset, PATTERNS[config.dataset]
    logs = find_files(config.data_dir, patterns, f"file of {name}", "meta_*", SPLIT_NAMES)
    head = read_head(logs[0]).decode(errors="replace")
    columns = next(columns for mark, columns in COLUMNS[name].items() if re.search(mark, head))
    columns = dict(column.split("=") for column in columns.split())
    ids = [len(re.findall(rf"(?m)^{first}\w{{10}},", head)) for first in ("", r"\w+,")]
    if columns["user"] == "1" and name == "amazon" and ids[0] >= ids[1]:
        columns |= {"user": "2", "item": "1"}
    # Books_5.json.gz, ratings_Books.csv, reviews_Books_5.json.gz, Books.train.csv
    category = re.sub(r"^(ratings|reviews)_|_5$", "", logs[0].name.split(".")[0])
    name += "_books" * (name == "amazon" and category.startswith("Books"))
    beside = [pattern.format(category) for pattern in beside]
    titled = (matching_files(logs[0].parent, pattern) for pattern in beside)
    titled = next(filter(None, titled), [])
    if beside and len(titled) != 1:
        names, log = [file.name for file in titled], logs[0]
        raise ValueError(f"{log.parent}: titles need {beside[0]} beside {log.name}; found {names}")
    return name, logs, columns, titled


def files(config) -> list[Path]:
    """All that is read."""
    _, logs, _, titled = find(config)
    return logs + titled


def load(config) -> Interactions:
    """The log; interactions with an item that has no title are dropped.

    Hours are ranked within a game, and plays, added up at the first one, within an artist."""
    name, logs, columns, titled = find(config)
    percentile = config.percentile or "item" * (name in ("steam", "lastfm"))
    with tempfile.TemporaryDirectory() as folder:
        parts = [unpacked(file, Path(folder)) for file in logs]
        table = read_columns(parts, columns, plain=name == "lastfm")
    rows = usable_rows(table, name_of(logs), bool(percentile), absent=NO_TEXT)
    if titled:
        columns = {"item": columns["item"], "title": "title"}
        if name == "steam":
            columns = {"item": "id", "title": "app_name", "other": "title"}
        elif "parent_asin" not in columns.values():
            columns["item"] = "asin"
        table = check_bad(read_columns(titled, columns), titled[0])
    titles = first_titles(rows.item_ids, table, beer_title if "beer" in name else first_text)
    repeats = "sum" if name == "lastfm" else "last"
    return finish(rows, titles, name, WORDS[name], percentile, repeats)


def read_columns(files: list[Path], columns: dict[str, str], plain: bool = False) -> Table:
    """The table of these columns, all of them needed; dict lines and JSON begin with a bracket."""
    lines = read_head(files[0], 1 << 12).lstrip(b"\xef\xbb\xbf \r\n").startswith((b"{", b"["))
    kind = "plain" if plain else "literal" if lines else "csv"
    return read_table(
        files, kind, Finder(columns, (*columns,), (*columns,), "expected", usual=False)
    )


def unpacked(file: Path, folder: Path) -> Path:
    """The file, or what is made of it: LastFM's events out of their archive; JSON lines of reviews
    that are blocks of `key: value` lines with empty lines between them."""
    if tarfile.is_tarfile(file):
        with tarfile.open(file) as archive:
            for member in archive:
                if member.isfile() and "userid-timestamp" in member.name:
                    archive.extract(member, folder, filter="data")
                    return folder / member.name
        raise ValueError(f"{file}: holds no userid-timestamp-....tsv")
    if not read_head(file, 1 << 12).startswith((b"beer/", b"review/")):
        return file
    with open(folder / f"{file.name}.json", "w") as out:
        for filled, lines in itertools.groupby(read_lines(file), lambda line: line.strip() != ""):
            if filled:
                out.write(json.dumps(dict(line.partition(": ")[::2] for line in lines)) + "\n")
    return Path(out.name)


# ------------------------------------------------------------------------------------------- titles
def first_titles(item_ids: list[str], table: Table, title) -> list[str]:
    """The title of each item, from the first row of the table that has one."""
    codes, ids = read_ids(table.columns["item"], NO_TEXT)
    columns = [column for name, column in table.columns.items() if name not in FIELDS[:4]]
    titles = dict.fromkeys(item_ids, "")
    for row, code in enumerate(codes.tolist()):
        if code >= 0 and titles.get(ids[code], "unknown") == "":
            values = (c.values[c.codes[row]] if c.codes[row] >= 0 else "" for c in columns)
            titles[ids[code]] = clean_title(title(*values))
    return ["" if "<span" in title else title for title in titles.values()]  # pieces of a page


def first_text(*values) -> str:
    """The first of the values that is a text and not blank."""
    return next((value for value in values if isinstance(value, str) and value.strip()), "")


def mend_encoding(text: str) -> str:
    """ "KÃ¶lsch" -> "Kölsch": UTF-8 that somebody has read as latin-1; others stay as they are."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def beer_title(name, abv, style) -> str:
    """Name, strength and style, as in the paper: "Sausa Weizen (5% ABV, Hefeweizen)"."""
    name, style = (mend_encoding(first_text(value)).strip() for value in (name, style))
    bare = re.sub(r"\d+(\.\d+)?\s*%", "", html.unescape(name))  # some names repeat the strength
    name = " ".join(bare.split()) or name
    try:
        strength = f"{float(abv):g}% ABV" if float(abv) > 0 else ""
    except ValueError:  # missing
        strength = ""
    about = ", ".join(filter(None, (strength, style)))
    return f"{name} ({about})" if name and about else name
