"""Published data sets, each a Layout that shared code reads; MovieLens stands in movielens.py.

    Amazon 2014    reviews_Books.json.gz, or ratings_Books.csv (user,item,rating,timestamp)
    Amazon 2018    Books.json.gz, Books_5.json.gz, or Books.csv (item,user,rating,timestamp)
    Amazon 2023    Books.jsonl.gz, Books.csv with a header, or its train, valid and test parts
    Steam          steam_reviews.json.gz, steam_games.json.gz: Python literals; hours of play
    BeerAdvocate   beeradvocate.json (Python literals), beeradvocate.txt (blocks), beer_reviews.csv
    LastFM-1K      userid-timestamp-....tsv, or lastfm-dataset-1K.tar.gz: plays of artists

Amazon's titles come from meta_<category>.json or .jsonl beside the reviews. References: Ni et al.
2019, Hou et al. 2024 (Amazon); Kang and McAuley 2018 (Steam); McAuley and Leskovec 2013
(BeerAdvocate); Celma 2010 (LastFM)."""

import html
import itertools
import json
import re
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from data import Interactions, Words
from loaders.files import (
    SPLIT_NAMES,
    find_files,
    matching_files,
    name_of,
    open_bytes,
    read_head,
    read_lines,
)
from loaders.ownlog import FIELDS, Finder, parse_columns
from loaders.table import clean_title, finish, usable_rows
from loaders.tables import Table, check_bad, read_table
from loaders.values import read_ids

NO_TEXT = frozenset([""])  # a user may be called NULL


def first_text(*values) -> str:
    """The first of the values that is a text and not blank."""
    return next((value for value in values if isinstance(value, str) and value.strip()), "")


@dataclass(frozen=True)
class Layout:
    """The files of a data set, and which columns hold what, as --columns says it."""

    name: str
    words: Words
    patterns: tuple[str, ...]
    what: str  # the files are
    columns: str = ""
    kind: str = "literal"  # of read_table
    title_patterns: tuple[str, ...] = ()  # of a second file
    title_columns: str = ""
    title: Callable[..., str] = first_text  # of the values of all but the four columns of a row
    detailed: Callable = lambda layout, file: layout  # what the first file says of the others
    convert: Callable[[Path, Path], Path] = lambda file, folder: file  # into one that can be read
    percentile: str = ""  # unless --percentile says otherwise
    repeats: str = "last"


def find(data_dir, layout: Layout) -> tuple[Layout, list[Path], list[Path]]:
    """The layout that the first file has, the files of the log, and those of the titles."""
    patterns, what = layout.patterns, layout.what
    logs = find_files(data_dir, patterns, what, without="meta_*", joined=SPLIT_NAMES)
    layout = layout.detailed(layout, logs[0])
    folder, beside = logs[0].parent, layout.title_patterns
    titled = next(filter(None, (matching_files(folder, pattern) for pattern in beside)), [])
    if beside and len(titled) != 1:
        found = [file.name for file in titled]
        raise ValueError(f"{folder}: titles need {beside[0]} beside {logs[0].name}; found {found}")
    return layout, logs, titled


def files(config, layout: Layout) -> list[Path]:
    """All that is read."""
    _, logs, titled = find(config.data_dir, layout)
    return logs + titled


def words(data_dir, layout: Layout) -> Words:
    """The words of the prompts; those of all products where the files are gone."""
    try:
        return find(data_dir, layout)[0].words
    except ValueError:
        return layout.words


def load(config, layout: Layout) -> Interactions:
    """The log; interactions with an item that has no title are dropped."""
    layout, logs, titled = find(config.data_dir, layout)
    percentile = config.percentile or layout.percentile
    with tempfile.TemporaryDirectory() as folder:
        parts = [layout.convert(file, Path(folder)) for file in logs]
        table = read_table(parts, layout.kind, finder(layout.columns))
    rows = usable_rows(table, name_of(logs), bool(percentile), absent=NO_TEXT)
    if titled:
        table = read_table(titled, "literal", finder(layout.title_columns))
        check_bad(table, name_of(titled))
    titles = first_titles(rows.item_ids, table, layout.title)
    return finish(rows, titles, layout.name, layout.words, percentile, layout.repeats)


def finder(columns: str) -> Finder:
    """Columns under these names or at these places, all of them needed."""
    given = parse_columns(columns, "expected", (*FIELDS, "other", "abv", "style"))
    return Finder(given, tuple(given), tuple(given), option="expected", usual=False)


def first_titles(item_ids: list[str], table: Table, title: Callable[..., str]) -> list[str]:
    """The title of each item, from the first row of the table that has one."""
    codes, ids = read_ids(table.columns["item"], NO_TEXT)
    known = {text: code for code, text in enumerate(item_ids)}
    items = np.array([*(known.get(text, -1) for text in ids), -1, -1])[codes]
    columns = [column for name, column in table.columns.items() if name not in FIELDS[:4]]
    titles = [""] * len(item_ids)
    for row, item in enumerate(items.tolist()):
        if item >= 0 and not titles[item]:
            values = (c.values[c.codes[row]] if c.codes[row] >= 0 else "" for c in columns)
            titles[item] = clean_title(title(*values))
    return ["" if "<span" in title else title for title in titles]  # pieces of a page


# ------------------------------------------------------------------------------------------- Amazon
AMAZON_2018 = "user=reviewerID,item=asin,rating=overall,timestamp=unixReviewTime"
AMAZON_2023 = "user=user_id,item=parent_asin,rating=rating,timestamp=timestamp"


def amazon_edition(layout: Layout, file: Path) -> Layout:
    """Columns and titles of the edition of this file of reviews or ratings.

    Ratings without a header: in 2018 the item comes first, whose id has 10 characters; in 2014 the
    user, whose id is longer."""
    head, kind = read_head(file), "csv" if ".csv" in file.name.lower() else "literal"
    modern, lines = b"parent_asin" in head, head.decode(errors="replace").split("\n")[:1000]
    key, columns = ("parent_asin", AMAZON_2023) if modern else ("asin", AMAZON_2018)
    if kind == "csv" and not modern and re.search(r"\d", lines[0]):
        ids = [line.split(",")[:2] for line in lines if line.count(",") == 3]
        first, second = (sum(len(row[place]) == 10 for row in ids) for place in (0, 1))
        order = "user=2,item=1" if first >= second else "user=1,item=2"
        columns = f"{order},rating=3,timestamp=4"
    # Books_5.json.gz, ratings_Books.csv, reviews_Books_5.json.gz, Books.train.csv
    category = re.sub(r"^(ratings|reviews)_|_5$", "", file.name.split(".")[0])
    layout = replace(
        layout,
        kind=kind,
        columns=columns,
        title_patterns=(f"meta_{category}.json*", "meta_*.json*"),
        title_columns=f"item={key},title=title",
    )
    if category.startswith("Books"):
        return replace(layout, name="amazon_books", words=("books", "read", "read"))
    return layout


AMAZON = Layout(
    name="amazon",
    words=("products", "bought", "buy"),
    patterns=("*_5.json*", "*.json*", "*.csv*"),
    what="reviews (Books.json.gz, Books_5.json.gz, Books.jsonl.gz) or ratings (Books.csv)",
    detailed=amazon_edition,
)


# -------------------------------------------------------------------------------------------- Steam
STEAM = Layout(  # reviews without hours of play are left out
    name="steam",
    words=("games", "played", "play"),
    patterns=("steam_reviews*", "*reviews*"),
    what="steam_reviews.json.gz",
    columns="user=username,item=product_id,rating=hours,timestamp=date",
    title_patterns=("steam_games*", "*games*"),
    title_columns="item=id,title=app_name,other=title",
    percentile="item",
)


# ------------------------------------------------------------------------------------- BeerAdvocate
def beer_form(layout: Layout, file: Path) -> Layout:
    """Dict lines, text blocks or CSV."""
    start = read_head(file, 1 << 12).lstrip(b"\xef\xbb\xbf \r\n")
    if start.startswith(b"{"):
        return layout
    if start.startswith((b"beer/", b"review/")):
        columns = layout.columns.replace("user/", "review/").replace("timeUnix", "time")
        return replace(layout, columns=columns, convert=blocks_to_lines)
    columns = "user=review_profilename,item=beer_beerid,rating=review_overall,timestamp=review_time"
    columns += ",title=beer_name,abv=beer_abv,style=beer_style"
    return replace(layout, columns=columns, kind="csv")


def blocks_to_lines(file: Path, folder: Path) -> Path:
    """JSON lines of reviews whose lines are `key: value`, with empty lines between the reviews."""
    with open(folder / "lines.json", "w") as out:
        for filled, lines in itertools.groupby(read_lines(file), lambda line: line.strip() != ""):
            if filled:
                out.write(json.dumps(dict(line.partition(": ")[::2] for line in lines)) + "\n")
    return folder / "lines.json"


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


BEERADVOCATE = Layout(
    name="beeradvocate",
    words=("beers", "drank", "drink"),
    patterns=("*beeradvocate*.json*", "*beeradvocate*.txt*", "*beer*.csv*", "*beer*"),
    what="beeradvocate.json, beeradvocate.txt or beer_reviews.csv",
    columns="user=user/profileName,item=beer/beerId,rating=review/overall,timestamp=review/timeUnix"
    ",title=beer/name,abv=beer/ABV,style=beer/style",
    title=beer_title,
    detailed=beer_form,
)


# ------------------------------------------------------------------------------------------- LastFM
def unpacked_events(file: Path, folder: Path) -> Path:
    """The events, taken out of the published archive if it is one."""
    if not tarfile.is_tarfile(file):
        return file
    with open_bytes(file) as f, tarfile.open(fileobj=f, mode="r|") as archive:
        for member in archive:
            if member.isfile() and "userid-timestamp" in member.name:
                archive.extract(member, folder, filter="data")
                return folder / member.name
    raise ValueError(f"{file}: holds no file of events, {LASTFM.what}")


LASTFM = Layout(  # a user's first play of an artist that has a MusicBrainz id; all plays are added
    name="lastfm",
    words=("artists", "listened to", "listen to"),
    patterns=("userid-timestamp*", "lastfm-dataset-1K*"),
    what="userid-timestamp-artid-artname-traid-traname.tsv, or lastfm-dataset-1K.tar.gz",
    columns="user=1,item=3,timestamp=2,title=4",
    kind="plain",
    convert=unpacked_events,
    percentile="item",
    repeats="sum",
)

# name -> loader, all files that it reads, words of the prompts
LOADERS = {
    layout.name: tuple(partial(function, layout=layout) for function in (load, files, words))
    for layout in (AMAZON, STEAM, BEERADVOCATE, LASTFM)
}
