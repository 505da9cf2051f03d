"""Amazon"""

import itertools
import re

from data import Interactions
from loaders.files import (
    Rows,
    find_file,
    json_record,
    read_records,
    read_table,
    read_titles,
    table_chunks,
)
from loaders.table import LogBuilder


def load_amazon(path, percentile: str = "") -> Interactions:
    """Amazon 2018 reviews (JSON lines) or ratings only (CSV), and meta_<category>.json beside them for the titles."""
    patterns = ("*_5.json*", "[!m]*.json*", "[!m]*.csv*")
    file = find_file(
        path, patterns, "reviews (Books.json.gz, Books_5.json.gz) or ratings (Books.csv)"
    )
    category = re.sub(
        r"^ratings_|(_5)?\.(json|csv)(\.gz)?$", "", file.name
    )  # ratings_Books.csv is the name of 2014
    meta = [
        f
        for f in sorted(file.parent.glob("meta_*.json*"))
        if f.name.split(".")[0] == f"meta_{category}"
    ]
    meta = meta or sorted(file.parent.glob("meta_*.json*"))
    if len(meta) != 1:
        raise ValueError(
            f"{file.parent}: titles need meta_{category}.json.gz beside {file.name}; found {[f.name for f in meta]}"
        )
    is_csv = ".csv" in file.suffixes
    expected = (
        "item,user,rating,timestamp"
        if is_csv
        else "JSON with reviewerID, asin, overall, unixReviewTime"
    )
    builder = LogBuilder(str(file), expected, amounts=bool(percentile))
    if is_csv:
        rows = read_table(file)
        head = list(itertools.islice(rows, 1000))
        full = [row for row in head if len(row) == 4]
        # 2018: item first; 2014: user first. An item has 10 characters, a reviewer A and 9 to 20 more
        item_first = sum(len(row[0]) == 10 for row in full) >= sum(
            len(row[1]) == 10 for row in full
        )
        positions = {"user": int(item_first), "item": int(not item_first), "rating": 2, "time": 3}
        for numbers, table, bad in table_chunks(itertools.chain(head, rows), positions, 4, 1):
            for number, why in bad:
                builder.bad(number, why)
            if numbers:
                builder.add(numbers, *table.values())
    else:
        keys = ("reviewerID", "asin", "overall", "unixReviewTime")
        collected = Rows(builder)
        for number, record in read_records(file, json_record, keys, builder.bad):
            collected.add(number, *(record.get(key) for key in keys))
        collected.flush()
    titles, ids = {}, builder.items
    for item, title in read_titles(meta[0], json_record, "asin", ("title",)):
        if item in ids and title and "<span" not in title:  # pieces of a page instead of a title
            titles.setdefault(item, title)
    return builder.finish(
        titles, "amazon_books" if category.startswith("Books") else "amazon", percentile
    )
