"""Published data sets as layouts over one reader: Amazon, Steam, BeerAdvocate, LastFM-1K.

    Amazon 2018    Books.json.gz, Books_5.json.gz, or Books.csv (item,user,rating,timestamp)
    Amazon 2014    reviews_Books.json.gz, or ratings_Books.csv (user,item,rating,timestamp)
    Amazon 2023    Books.jsonl.gz, or Books.csv with a header, or the Books.train.csv,
                   Books.valid.csv and Books.test.csv of its benchmark
    Steam          steam_reviews.json.gz, steam_games.json.gz: Python literals; hours of play
    BeerAdvocate   beeradvocate.json (Python literals), beeradvocate.txt (blocks), beer_reviews.csv
    LastFM-1K      userid-timestamp-....tsv, or lastfm-dataset-1K.tar.gz: plays of artists

Amazon's titles come from meta_<category>.json or .jsonl beside the reviews. References: Ni et al.
2019, Hou et al. 2024 (Amazon); Kang and McAuley 2018 (Steam); McAuley and Leskovec 2013
(BeerAdvocate); Celma 2010 (LastFM)."""

import html
import json
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data import ITEMS, Interactions, Words
from loaders.files import (
    SPLIT_NAMES,
    decode,
    find_files,
    matching_files,
    name_of,
    read_head,
    read_lines,
)
from loaders.ownlog import Finder
from loaders.table import Rows, clean_title, finish, usable_rows
from loaders.tables import check_bad, read_table
from loaders.values import Column, read_ids

STEAM_WORDS = ("games", "played", "play")
BEER_WORDS = ("beers", "drank", "drink")
LASTFM_WORDS = ("artists", "listened to", "listen to")
ROW = ("user", "item", "rating", "timestamp")
NO_TEXT = frozenset([""])  # a user may be called NULL


def finder(**given: str) -> Finder:
    """Columns under these names, all of them needed."""
    return Finder(given, tuple(given), tuple(given), option="expected", usual=False)


def first_titles(rows: Rows, ids: Column, *titles: Column) -> list[str]:
    """The first title of each item: of a row the first column that holds a text."""
    codes, texts = read_ids(ids, NO_TEXT)
    known = {text: code for code, text in enumerate(rows.item_ids)}
    places = [known.get(text, -1) for text in texts] + [-1, -1]
    out = [""] * len(rows.item_ids)
    for column in titles:
        column.values = [v if isinstance(v, str) and v.strip() else "" for v in column.values]
        column.values.append("")  # of null
    for row, code in enumerate(codes.tolist()):
        if (place := places[code]) >= 0 and not out[place]:
            found = (column.values[column.codes[row]] for column in titles)
            out[place] = next((clean_title(title) for title in found if title), "")
    return out


# ------------------------------------------------------------------------------------------- Amazon
WORDS, BOOK_WORDS = ("products", "bought", "buy"), ("books", "read", "read")
REVIEWS = {  # keys of a review by edition; the second is the key of the metadata, too
    2018: ("reviewerID", "asin", "overall", "unixReviewTime"),
    2023: ("user_id", "parent_asin", "rating", "timestamp"),
}


def amazon_columns(file: Path) -> Finder:
    """The columns of either edition; without a header by the length of the ids: 2018 has the item
    first, of 10 characters, 2014 the user, of more."""
    head = decode(read_head(file), file, quiet=True).split("\n")[:1000]
    if ".csv" in file.name.lower() and any(character.isdigit() for character in head[0]):
        rows = [row for row in (line.split(",") for line in head) if len(row) == 4]
        first, second = (sum(len(row[at]) == 10 for row in rows) for at in (0, 1))
        user, item = ("2", "1") if first >= second else ("1", "2")
        return finder(user=user, item=item, rating="3", timestamp="4")
    modern = "parent_asin" in head[0] or sum("parent_asin" in row for row in head) > len(head) / 3
    return finder(**dict(zip(ROW, REVIEWS[2023 if modern else 2018])))


def amazon_reviews(data_dir) -> list[Path]:
    what = "reviews (Books.json.gz, Books_5.json.gz, Books.jsonl.gz) or ratings (Books.csv)"
    patterns = ("*_5.json*", "*.json*", "*.csv*")
    return find_files(data_dir, patterns, what, without="meta_*", joined=SPLIT_NAMES)


def category_of(file: Path) -> str:
    """ "Books" of Books_5.json.gz, ratings_Books.csv, reviews_Books_5.json.gz, Books.train.csv."""
    return re.sub(r"^(ratings|reviews)_|_5$", "", file.name.split(".")[0])


def amazon_files(config) -> list[Path]:
    """The reviews, and the metadata as the last."""
    reviews = amazon_reviews(config.data_dir)
    file, category = reviews[0], category_of(reviews[0])
    found = matching_files(file.parent, "meta_*.json*")
    same = [f for f in found if f.name.split(".")[0].lower() == f"meta_{category}".lower()]
    found = same or found
    if len(found) != 1:
        ending = "jsonl" if ".jsonl" in file.name.lower() else "json"
        raise ValueError(
            f"{file.parent}: titles need meta_{category}.{ending}.gz beside "
            f"{file.name}; found {[f.name for f in found]}"
        )
    return [*reviews, *found]


def load_amazon(config) -> Interactions:
    """Reviews, or ratings only, and the metadata file beside them for the titles."""
    *reviews, meta = amazon_files(config)
    kind = "csv" if ".csv" in reviews[0].name.lower() else "literal"
    table = read_table(reviews, kind, amazon_columns(reviews[0]))
    rows = usable_rows(table, name_of(reviews), bool(config.percentile), absent=NO_TEXT)
    key = "parent_asin" if b'"parent_asin"' in read_head(meta).partition(b"\n")[0] else "asin"
    names = read_table([meta], "literal", finder(item=key, title="title"))
    titles = first_titles(rows, *check_bad(names, meta).columns.values())
    titles = ["" if "<span" in title else title for title in titles]  # pieces of a page
    books = category_of(reviews[0]).startswith("Books")
    name, words = ("amazon_books", BOOK_WORDS) if books else ("amazon", WORDS)
    return finish(rows, titles, name, words, config.percentile)


def amazon_words(data_dir) -> Words:
    """The words of the prompts, from the names of the files alone."""
    try:
        books = category_of(amazon_reviews(data_dir)[0]).startswith("Books")
    except ValueError:  # the files are gone
        return WORDS
    return BOOK_WORDS if books else WORDS


# -------------------------------------------------------------------------------------------- Steam
def steam_files(config) -> list[Path]:
    reviews = find_files(config.data_dir, ("steam_reviews*", "*reviews*"), "steam_reviews.json.gz")
    what = "steam_games.json.gz, for the titles"
    return reviews + find_files(reviews[0].parent, ("steam_games*", "*games*"), what)


def load_steam(config) -> Interactions:
    """The amount is hours of play; reviews without are left out."""
    reviews, games = steam_files(config)
    columns = finder(user="username", item="product_id", rating="hours", timestamp="date")
    rows = usable_rows(read_table([reviews], "literal", columns), str(reviews), True, "", NO_TEXT)
    names = read_table([games], "literal", finder(item="id", title="app_name", other="title"))
    titles = first_titles(rows, *check_bad(names, games).columns.values())
    return finish(rows, titles, "steam", STEAM_WORDS, config.percentile or "item")


# ------------------------------------------------------------------------------------- BeerAdvocate
BEER = ("user", "item", "rating", "timestamp", "title", "style", "abv")
BEER_CSV = "review_profilename beer_beerid review_overall review_time beer_name beer_style beer_abv"
BEER_KEYS = (
    "user/profileName beer/beerId review/overall review/timeUnix beer/name beer/style beer/ABV"
)
BLOCK_KEYS = {"review/profileName": "user/profileName", "review/time": "review/timeUnix"}


def beer_files(config) -> list[Path]:
    patterns = ("*beeradvocate*.json*", "*beeradvocate*.txt*", "*beer*.csv*", "*beer*")
    what = "beeradvocate.json, beeradvocate.txt or beer_reviews.csv"
    return find_files(config.data_dir, patterns, what)


def load_beeradvocate(config) -> Interactions:
    """Dict lines, text blocks or CSV; titles with strength and style, as the paper's."""
    (file,) = beer_files(config)
    start = read_head(file, 1 << 12).lstrip(b"\xef\xbb\xbf \r\n")
    if start.startswith(b"{"):
        table = read_table([file], "literal", finder(**dict(zip(BEER, BEER_KEYS.split()))))
    elif start.startswith((b"beer/", b"review/")):
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "lines.json"
            lines.write_text("".join(f"{json.dumps(block)}\n" for block in beer_blocks(file)))
            table = read_table([lines], "jsonl", finder(**dict(zip(BEER, BEER_KEYS.split()))))
    else:
        table = read_table([file], "csv", finder(**dict(zip(BEER, BEER_CSV.split()))))
    rows = usable_rows(table, str(file), bool(config.percentile), absent=NO_TEXT)
    names = [table.columns[name] for name in ("title", "abv", "style")]
    titles: dict[str, str] = {}
    codes, ids = read_ids(table.columns["item"], NO_TEXT)
    for row, code in enumerate(codes.tolist()):
        if code >= 0 and ids[code] not in titles:
            name, abv, style = (
                str(c.values[c.codes[row]]) if c.codes[row] >= 0 else "" for c in names
            )
            if name := mend_encoding(name).strip():
                titles[ids[code]] = beer_title(name, abv, mend_encoding(style))
    titles = [clean_title(titles.get(i, "")) for i in rows.item_ids]
    return finish(rows, titles, "beeradvocate", BEER_WORDS, config.percentile)


def beer_blocks(file: Path) -> Iterator[dict]:
    """`key: value` lines, a review's ended by an empty one."""
    record = {}
    for line in read_lines(file):
        key, colon, value = line.partition(": ")
        if colon:
            record[BLOCK_KEYS.get(key, key)] = value
        elif not line.strip() and record:
            yield record
            record = {}
    if record:
        yield record


def mend_encoding(text: str) -> str:
    """ "KÃ¶lsch" -> "Kölsch": UTF-8 that somebody has read as latin-1.
    Other texts stay as they are."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def beer_title(name: str, abv: str, style: str) -> str:
    """Name, strength and style, as the paper's prompts have them:
    "Sausa Weizen (5% ABV, Hefeweizen)"."""
    # some names repeat the strength
    bare = re.sub(r"\d+(\.\d+)?\s*%", "", html.unescape(name))
    name = " ".join(bare.split()) or name
    try:
        strength = f"{float(abv):g}% ABV" if float(abv) > 0 else ""
    except ValueError:  # missing
        strength = ""
    about = ", ".join(part for part in (strength, style.strip()) if part)
    return f"{name} ({about})" if about else name


# ------------------------------------------------------------------------------------------- LastFM
EVENTS = "userid-timestamp-artid-artname-traid-traname.tsv"


PLAYS = finder(user="1", item="3", timestamp="2", title="4")


def lastfm_files(config) -> list[Path]:
    what = f"{EVENTS}, or lastfm-dataset-1K.tar.gz"
    return find_files(config.data_dir, ("userid-timestamp*", "lastfm-dataset-1K*"), what)


def load_lastfm(config) -> Interactions:
    """An interaction is a user's first play of an artist that has a MusicBrainz id;
    its amount is the number of all plays."""
    (file,) = lastfm_files(config)
    with tempfile.TemporaryDirectory() as folder:
        table = read_table([unpacked_events(file, Path(folder))], "plain", PLAYS)
    rows = usable_rows(table, str(file), True, absent=NO_TEXT)
    titles = first_titles(rows, table.columns["item"], table.columns["title"])
    return finish(rows, titles, "lastfm", LASTFM_WORDS, config.percentile or "item", "sum")


def unpacked_events(file: Path, folder: Path) -> Path:
    """The events, taken out of the published archive if it is one."""
    try:
        if not tarfile.is_tarfile(file):
            return file
        with tarfile.open(file) as archive:
            member = next((m for m in archive if m.isfile() and "userid-timestamp" in m.name), None)
            if member is None:
                raise ValueError(f"{file}: holds no {EVENTS}")
            member.name = EVENTS
            archive.extract(member, folder, filter="data")
            return folder / EVENTS
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(
            f"{file}: the archive is damaged or cut off ({error}); fetch it again"
        ) from None


@dataclass(frozen=True)
class Loader:
    """How a data set is read: its log, all files of it, and the words of its prompts."""

    load: Callable
    files: Callable = lambda config: []
    words: Words | Callable = ITEMS


LOADERS = {
    "amazon": Loader(load_amazon, amazon_files, amazon_words),
    "steam": Loader(load_steam, steam_files, STEAM_WORDS),
    "beeradvocate": Loader(load_beeradvocate, beer_files, BEER_WORDS),
    "lastfm": Loader(load_lastfm, lastfm_files, LASTFM_WORDS),
}
