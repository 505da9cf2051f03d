"""Amazon's reviews as McAuley's group published them in 2014, 2018 and 2023:
JSON lines, or ratings only as CSV.

    2018   Books_5.json.gz (reviewerID, asin, overall, unixReviewTime)
           or Books.csv (item,user,rating,timestamp, no header)
    2014   ratings_Books.csv (user,item,rating,timestamp, no header)
    2023   Books.jsonl.gz or Books.csv (user_id, parent_asin, rating, timestamp in milliseconds,
           with a header), or the Books.train.csv, Books.valid.csv, Books.test.csv of its benchmark,
           read together

Titles come from meta_<category>.json or .jsonl beside them. References: Ni et al.
2019 (nijianmo.github.io/amazon), Hou et al. 2024 (amazon-reviews-2023.github.io)."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

from data import Interactions, Words
from loaders.files import (
    SPLIT_NAMES,
    Rows,
    brief,
    find_file,
    json_record,
    matching_files,
    put_back,
    read_records,
    read_table,
    read_titles,
    table_chunks,
)
from loaders.table import LogBuilder

NAME = "amazon"


WORDS, BOOK_WORDS = ("products", "bought", "buy"), ("books", "read", "read")


KEYS = {  # of a review: user, item, rating, time; the second is the key of the metadata, too
    "2018": ("reviewerID", "asin", "overall", "unixReviewTime"),
    "2023": ("user_id", "parent_asin", "rating", "timestamp"),
}


FILES = ("*_5.json*", "*.json*", "*.csv*")


WHAT = "reviews (Books.json.gz, Books_5.json.gz, Books.jsonl.gz) or ratings (Books.csv)"


def load(config) -> Interactions:
    """Reviews, or ratings only, and the metadata file beside them for the titles."""
    file = find_file(config.data_dir, FILES, WHAT, without="meta_*", joined=SPLIT_NAMES)
    category = category_of(file)
    meta = metadata_of(file, category)
    is_csv = ".csv" in file.name.lower()
    if is_csv:
        expected = "item,user,rating,timestamp"
    else:
        expected = "JSON with reviewerID, asin, overall, unixReviewTime, or of 2023"
    builder = LogBuilder(file, expected, amounts=bool(config.percentile))
    if is_csv:
        _add_table(file, builder)
    else:
        _add_records(file, builder)
    titles, ids = {}, builder.items
    for item, title in read_titles(meta, json_record, _key_of(meta), ("title",)):
        if item in ids and title and "<span" not in title:  # pieces of a page instead of a title
            titles.setdefault(item, title)
    books = category.startswith("Books")
    interactions = builder.finish(titles, "amazon_books" if books else NAME, config.percentile)
    return replace(interactions, words=BOOK_WORDS if books else WORDS)


def words(data_dir: Path) -> Words:
    """The words of the prompts, from the names of the files alone;
    those of products if they are gone."""
    try:
        file = find_file(data_dir, FILES, WHAT, without="meta_*", joined=SPLIT_NAMES)
    except ValueError:
        return WORDS
    return BOOK_WORDS if category_of(file).startswith("Books") else WORDS


def category_of(file: Path) -> str:
    """ "Books" of Books_5.json.gz, ratings_Books.csv, reviews_Books_5.json.gz, Books.train.csv."""
    return re.sub(r"^(ratings|reviews)_|_5$", "", file.name.split(".")[0])


def metadata_of(file: Path, category: str) -> Path:
    found = matching_files(file.parent, "meta_*.json*")
    same = [f for f in found if f.name.split(".")[0].lower() == f"meta_{category}".lower()]
    found = same or found
    if len(found) != 1:
        ending = "jsonl" if ".jsonl" in file.name.lower() else "json"
        raise ValueError(
            f"{file.parent}: titles need meta_{category}.{ending}.gz beside "
            f"{file.name}; found {[f.name for f in found]}"
        )
    return found[0]


def _key_of(meta: Path) -> str:
    """parent_asin where the metadata has it (2023), else asin."""
    records = read_records(meta, json_record, (), lambda number, line: None)
    first = next((record for _, record in records), {})
    return "parent_asin" if "parent_asin" in first else "asin"


def _add_records(file: Path, builder: LogBuilder) -> None:
    every = {key for keys in KEYS.values() for key in keys}
    records = read_records(file, json_record, every, builder.bad)
    head = list(itertools.islice(records, 100))
    modern = sum("parent_asin" in record for _, record in head) > len(head) / 2
    keys, rows = KEYS["2023" if modern else "2018"], Rows(builder)
    for number, record in itertools.chain(head, records):
        rows.add(number, *map(record.get, keys))
    rows.flush()


def _add_table(file: Path, builder: LogBuilder) -> None:
    rows = read_table(file)
    head = list(itertools.islice(rows, 1000))
    names = [name.strip() for name in head[0]] if head else []
    header = next((keys for keys in KEYS.values() if set(keys) <= set(names)), None)
    if header:
        positions = dict(zip(("user", "item", "rating", "time"), map(names.index, header)))
        head, width, first_line = head[1:], len(names), 2
    elif names and not any(character.isdigit() for character in "".join(names)):
        wanted = " or ".join(",".join(keys) for keys in KEYS.values())
        raise ValueError(
            f"{file}: line 1 looks like a header, but has not all of {wanted}: {brief(names)}"
        )
    else:
        positions, width, first_line = _positions(head), 4, 1
    rows = put_back(head, rows)
    for numbers, table, bad in table_chunks(rows, positions, width, first_line):
        for number, why in bad:
            builder.bad(number, why)
        if numbers:
            builder.add(numbers, *(table[field] for field in ("user", "item", "rating", "time")))


def _positions(head: list[list[str]]) -> dict[str, int]:
    """Columns of a table without header. 2018: item first; 2014: user first.

    An item has 10 characters, a reviewer A and 9 to 20 more."""
    full = [row for row in head if len(row) == 4]
    first, second = (sum(len(row[at]) == 10 for row in full) for at in (0, 1))
    item_first = first >= second
    return {"user": int(item_first), "item": int(not item_first), "rating": 2, "time": 3}
