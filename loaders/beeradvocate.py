"""BeerAdvocate's reviews in the three forms in which they went around:
Python literals, text blocks, CSV. Reference: McAuley and Leskovec 2013."""

import html
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data import Interactions
from loaders.files import (
    Rows,
    brief,
    find_file,
    literal_record,
    read_lines,
    read_records,
    read_table,
)
from loaders.table import LogBuilder

NAME, WORDS = "beeradvocate", ("beers", "drank", "drink")


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


def load(config) -> Interactions:
    """Dict lines, text blocks or CSV; titles with strength and style, as the paper's."""
    patterns = ("*beeradvocate*.json*", "*beeradvocate*.txt*", "*beer*.csv*", "*beer*")
    file = find_file(
        config.data_dir, patterns, "beeradvocate.json, beeradvocate.txt or beer_reviews.csv"
    )
    lines = read_lines(file)
    start = next((line for line in lines if line.strip()), "").lstrip()
    builder = LogBuilder(
        file, "a review with user, beer, overall rating and time", amounts=bool(config.percentile)
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
            titles[item] = beer_title(name, str(r.get("abv") or ""), style)
    rows.flush()
    interactions = builder.finish(titles, NAME, config.percentile)
    return replace(interactions, words=WORDS)


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
            f"{file}: line 1 is no header of beer reviews: no column {sorted(missing)}, "
            f"found {brief(header)}"
        )
    columns = {header.index(name): key for name, key in BEER_CSV.items()}
    for number, row in enumerate(rows, 2):
        if len(row) == len(header):
            yield number, {key: row[c] for c, key in columns.items()}
        elif row:
            bad(number, ",".join(row))


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
