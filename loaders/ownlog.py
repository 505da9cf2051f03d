"""Your own interaction log: CSV, JSON lines, or RecBole's atomic files, with the columns under any names and in any order.

    python train.py --dataset csv --data_dir log.csv --columns user=uid,item=sku,rating=stars,timestamp=when,title=name

Users and items are any ids. Ratings are above 0 and up to 5; hours, plays, prices or another scale become ratings by rank
with --percentile. Without a rating column the number of repeats is taken; without a timestamp column, the order of the file;
without titles, the ids. Times are seconds (or milli-, micro-, nanoseconds) or ISO dates. --item_file names a second file with
item and title. Columns without --columns are looked up under their usual names; in a CSV without header, count them from 1.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from common import print0
from data import Interactions, clean_title
from loaders import parquet
from loaders.files import (
    CHUNK,
    SPLIT_NAMES,
    Chunk,
    brief,
    find_file,
    json_record,
    matching_files,
    read_lines,
    read_records,
    read_table,
    table_chunks,
)
from loaders.table import LineCount, LogBuilder

FIELDS = ("user", "item", "rating", "timestamp", "title")


USUAL = {  # names without case, blanks and underscores; the surer ones first
    "user": (
        "userid",
        "uid",
        "username",
        "reviewerid",
        "customerid",
        "visitorid",
        "user",
        "customer",
    ),
    "item": (
        "itemid",
        "iid",
        "movieid",
        "productid",
        "asin",
        "sku",
        "bookid",
        "trackid",
        "artistid",
        "item",
        "product",
    ),
    "rating": (
        "rating",
        "stars",
        "score",
        "overall",
        "hours",
        "plays",
        "playcount",
        "count",
        "amount",
    ),
    "timestamp": ("timestamp", "time", "date", "datetime", "unixreviewtime", "ts"),
    "title": (
        "title",
        "itemtitle",
        "movietitle",
        "booktitle",
        "producttitle",
        "itemname",
        "productname",
        "moviename",
        "name",
    ),
}


AMOUNTS = ("hours", "plays", "playcount", "count", "amount")  # no ratings, whatever their size


def parse_columns(text: str) -> dict[str, str]:
    """ "user=uid,item=sku" -> {"user": "uid", "item": "sku"}; ValueError names what is not understood."""
    columns = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        field, equals, name = part.partition("=")
        if not equals or field.strip() not in FIELDS or not name.strip():
            raise ValueError(
                f"--columns: {part!r} is not one of {', '.join(f'{f}=NAME' for f in FIELDS)}"
            )
        if name.strip() in columns.values():
            raise ValueError(f"--columns: {name.strip()} is named twice")
        columns[field.strip()] = name.strip()
    return columns


def load_own_log(
    path,
    kind: str,
    columns: str = "",
    item_file: str = "",
    percentile: str = "",
    repeats: str = "last",
) -> Interactions:
    """`kind` csv, jsonl or recbole; `columns` as in parse_columns; `repeats` of a pair: last, or sum of the amounts."""
    patterns = {
        "csv": ("*.csv*", "*.tsv*", "*.txt*"),
        "jsonl": ("*.jsonl*", "*.json*"),
        "recbole": ("*.inter*",),
        "parquet": (),
    }[kind]
    file = (
        Path(path)
        if kind == "parquet"
        else find_file(
            path,
            patterns,
            {"csv": "a CSV file", "jsonl": "a file of JSON lines", "recbole": "a .inter file"}.get(
                kind, ""
            ),
            joined=SPLIT_NAMES if kind == "recbole" else (),
        )
    )
    if kind == "recbole" and not item_file:
        item_file = beside(file, "*.item*")
    given = parse_columns(columns)
    fields, chunks = open_table(
        file,
        kind,
        {f: n for f, n in given.items() if f != "title" or not item_file},
        ("user", "item"),
    )
    rated, timed = "rating" in fields, "timestamp" in fields
    print0(f"{file}: columns {', '.join(f'{field}={name}' for field, name in fields.items())}")
    if not rated:
        percentile, repeats = percentile or "item", "sum"
        print0(
            "note: no rating column; how often a user chose an item became its rating, by rank (--percentile)"
        )
    elif plain_name(fields["rating"]) in AMOUNTS and not percentile:
        percentile = "item"
        print0(
            f"note: {fields['rating']} are amounts: ranked among those of the same item they become ratings (--percentile)"
        )
    if not timed:
        print0("note: no timestamp column; the order of the file is taken as the order in time")
    meaning = {
        "rating": "rating (a number)",
        "timestamp": "timestamp (seconds, or an ISO date like 2024-12-31)",
    }
    builder = LogBuilder(
        file,
        f"rows with {', '.join(meaning.get(f, f) for f in fields)}",
        repeats,
        amounts=bool(percentile),
    )
    titles: dict[int, str] = {}
    for numbers, table, bad in chunks:
        for number, why in bad:
            builder.bad(number, why)
        if not numbers:
            continue
        ratings = table["rating"] if rated else [1.0] * len(numbers)
        codes = builder.add(
            numbers, table["user"], table["item"], ratings, table["timestamp"] if timed else numbers
        )
        if "title" in table:
            for code, title in zip(codes.tolist(), table["title"], strict=True):
                if titles.get(code) != title and title not in (
                    "",
                    None,
                ):  # of several the smallest: the order of lines is nothing
                    titles[code] = min(titles.get(code, str(title)), str(title))
    names: dict[str, str] | None = {
        builder.items.ids[code]: title for code, title in titles.items() if code >= 0
    }
    if item_file:
        names = read_item_file(Path(item_file), kind, given, builder)
    if not names:
        print0(
            "note: no titles; a language model sees item ids instead, which tell it nothing (--columns title=..., --item_file)"
        )
        names = {i: i for i in builder.items.ids}
    elif untitled := [i for i in builder.items.ids if not names.get(i, "").strip()]:
        print0(
            f"note: {len(untitled):,} of {len(builder.items.ids):,} items have no title; their ids are shown, first {clean_title(untitled[0])}"
        )
        names |= {i: i for i in untitled}
    log = builder.finish(names, kind, percentile)
    if not rated and len(set(log.rating[:100_000].tolist())) == 1:
        print0(
            "note: nobody chose an item twice, so all ratings are 3 and none is liked: --min_rating 3"
        )
    return log


def beside(file: Path, pattern: str) -> str:
    """The one file in the same folder that fits; of several the one of the same name; "" if there is none."""
    found = matching_files(file.parent, pattern)
    if len(found) > 1:
        name = file.name.split(".")[0]
        found = [f for f in found if f.name.split(".")[0] == name]
    return str(found[0]) if len(found) == 1 else ""


def atomic_rows(file: Path) -> Iterator[list[str]]:
    """Rows of RecBole's atomic files: between tabs, or whatever else stands between the typed names of the header."""
    header = next(read_lines(file), "").strip("\ufeff")
    between = next((mark for mark in "\t,;| " if _all_typed(header.split(mark))), "\t")
    # what stands between commas was written with quotes where they are needed
    return read_table(file, between if between.isspace() else "")


def _all_typed(names: list[str]) -> bool:
    typed = re.compile(r"[^\s,;|:]+:(token|float)(_seq)?")
    return len(names) > 1 and all(typed.fullmatch(name.strip()) for name in names)


def read_item_file(
    file: Path, kind: str, given: dict[str, str], builder: LogBuilder
) -> dict[str, str]:
    """Titles by item id of the items that the log has."""
    if not file.exists():
        raise ValueError(f"--item_file {file}: no such file")
    if parquet.is_parquet(file) or (kind == "parquet" and file.is_dir()):
        kind = "parquet"
    elif kind != "recbole":
        kind = "jsonl" if re.search(r"\.jsonl?(\.gz)?$", file.name) else "csv"
    wanted = {
        field: name
        for field, name in given.items()
        if field in ("item", "title") and not name.isdigit()
    }
    _, chunks = open_table(file, kind, wanted, ("item", "title"), only=("item", "title"))
    count, titles = LineCount(file, "rows with item, title"), {}
    for numbers, table, bad in chunks:
        for number, why in bad:
            count.bad(number, why)
        count.lines += len(numbers)
        for item, title in zip(table["item"], table["title"], strict=True) if numbers else ():
            item = str(item).strip()
            if item in builder.items and title not in ("", None):
                titles[item] = min(titles.get(item, str(title)), str(title))
    count.check()
    return titles


MAX_BAD_IN_A_ROW = 10_000  # bad JSON lines before a good one


def plain_name(name: str) -> str:
    return re.sub(r"[\s_\-]", "", name).lower()


def open_table(
    file: Path,
    kind: str,
    given: dict[str, str],
    required: tuple[str, ...],
    only: tuple[str, ...] = FIELDS,
) -> tuple[dict[str, str], Iterator[Chunk]]:
    """Names of the columns that hold each field, and the table's rows, CHUNK lines at a time."""
    if kind == "parquet":
        fields = find_columns(file, parquet.column_names(file), given, required, only)
        return fields, parquet.read_chunks(file, fields)
    if kind == "jsonl":
        bad: list[tuple[int, str]] = []

        def note(number: int, line: str) -> None:
            bad.append((number, line[:80]))
            if len(bad) > MAX_BAD_IN_A_ROW:
                raise ValueError(
                    f"{file}: {len(bad):,} lines together are no JSON objects, first line {bad[0][0]}: {bad[0][1]!r}"
                )

        parsed = read_records(file, json_record, (), note)
        first = list(itertools.islice(parsed, 1000))  # a key may be missing in some
        names = list(dict.fromkeys(name for _, record in first for name in record))
        if not first:
            raise ValueError(
                f"{file}: no line is a JSON object{f'; line {bad[0][0]}: {bad[0][1]!r}' if bad else ''}"
            )
        fields = find_columns(file, names, given, required, only)
        return fields, _json_chunks(itertools.chain(first, parsed), fields, bad)
    rows = atomic_rows(file) if kind == "recbole" else read_table(file)
    header = [name.strip() for name in next(rows, [])]
    if kind == "recbole":
        header = [name.partition(":")[0] for name in header]
    numbered = (
        bool(given)
        and all(name.isdigit() for name in given.values())
        and not set(given.values()) & set(header)
    )
    if numbered:  # no header: columns are counted from 1
        if outside := [name for name in given.values() if not 1 <= int(name) <= len(header)]:
            raise ValueError(
                f"{file}: --columns asks for column {outside[0]}, the first line has {len(header)}"
            )
        rows, header = itertools.chain([header], rows), [str(i) for i in range(1, len(header) + 1)]
        only = tuple(given)
    fields = find_columns(file, header, given, required, only)
    positions = {field: header.index(name) for field, name in fields.items()}
    return fields, table_chunks(rows, positions, len(header), 1 if numbered else 2)


def find_columns(
    file: Path, names: list[str], given: dict[str, str], required, only
) -> dict[str, str]:
    """Field -> column: the given ones, the others under their usual names; ValueError lists what there is."""
    fields = {}
    for field in only:
        if field in given and (
            given[field] in names or only == FIELDS
        ):  # an item file may name the item otherwise
            if given[field] not in names:
                raise ValueError(
                    f"{file}: --columns {field}={given[field]}: no such column; there are {brief(names)}"
                )
            fields[field] = given[field]
            continue
        plain = {plain_name(name): name for name in reversed(names)}
        usual_names = (*USUAL[field], "id") if field == "item" and only != FIELDS else USUAL[field]
        found = [
            plain[usual]
            for usual in usual_names
            if usual in plain and plain[usual] not in given.values()
        ]
        if field == "title" and not found:
            found = [name for name in names if "title" in name.lower()]
        if found:
            fields[field] = found[0]
    if missing := [field for field in required if field not in fields]:
        raise ValueError(
            f"{file}: which column is the {missing[0]}? Say --columns {','.join(f'{field}=NAME' for field in missing)}; "
            f"there are {brief(names)}. If the file has no header line, count its columns: --columns user=1,item=2"
        )
    return fields


def _json_chunks(records, fields: dict[str, str], bad: list[tuple[int, str]]) -> Iterator[Chunk]:
    while chunk := list(itertools.islice(records, CHUNK)):
        found, bad[:] = list(bad), []
        table = {field: [record.get(name) for _, record in chunk] for field, name in fields.items()}
        yield [number for number, _ in chunk], table, found
    yield [], {}, list(bad)


def load(config) -> Interactions:
    """The log of --dataset csv, jsonl, recbole or parquet, by its general options."""
    return load_own_log(
        config.data_dir,
        config.dataset,
        config.columns,
        config.item_file,
        config.percentile,
        config.repeats,
    )
