"""Any file or folder of files as one table: CSV and its relatives, JSON, Python literals, Parquet.

Arrow reads them, on all cores. Python reads, a line at a time, what Arrow cannot: JSON with a bad
line, arrays, columns of several types, literals."""

import ast
import contextlib
import csv
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as ds
import pyarrow.json

from common import print0
from loaders.files import decode, name_of, open_bytes, read_head, read_lines
from loaders.values import Column, as_texts, coded, parsed_times

MAX_BAD_SHARE = 0.01  # of the rows; with more of them the file is not what it was taken for
BLOCK = 1 << 25  # bytes that Arrow reads at a time; each block has a dictionary of its own
BETWEEN = "\x1f"  # stands for "::", as Arrow's fields are divided by one character
CODED = pa.dictionary(pa.int32(), pa.string())
DAMAGE = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)  # of a line
csv.field_size_limit(1 << 30)


@dataclass
class Table:
    """Columns by field, and the lines that could not be read."""

    labels: dict[str, str] = field(default_factory=dict)  # field -> name of its column
    columns: dict[str, Column | pa.ChunkedArray] = field(default_factory=dict)  # times: of Arrow
    num_rows: int = 0
    num_bad: int = 0  # beside them
    first_bad: list[str] = field(default_factory=list)
    first_row: int = 1  # number of the first row: behind a header it is 2

    def bad(self, line: str, count: int = 1) -> None:
        self.num_bad += count
        self.first_bad = [*self.first_bad, shorten(line)][:5]


def shorten(text, length: int = 200) -> str:
    """A text for a message."""
    return text if len(text := str(text)) <= length else f"{text[: length - 1]}…"


def check_bad(table: Table, source) -> Table:
    """The table; ValueError if more than 1 % of its rows are bad."""
    total = table.num_rows + table.num_bad
    if table.num_bad > MAX_BAD_SHARE * total:
        count = f"{table.num_bad:,} of {total:,} rows cannot be used (1% may be)"
        raise ValueError(f"{source}: {count}: {'; '.join(table.first_bad)}")
    return table


def read_table(files: list[Path], find, plain: bool = False) -> Table:
    """The parts of one export as one table, whose files show by their beginning what they are.

    `find` (ownlog.Finder) says which column holds which field. `plain`: between tabs, quotes are
    characters like others."""
    table, parts = Table(), []
    for file in files:
        head = read_head(file)
        if head.startswith("PAR1"):
            parts.append(read_parquet(file, find, table))
        elif re.match(r"[\[{]|(beer|review)/", head):
            parts.append(read_json(file, find, table))
        elif head:
            parts.append(read_csv(file, find, table, plain))
    if not parts:
        raise ValueError(f"{name_of(files)}: the file is empty")
    table.labels, table.num_rows = find.labels, sum(part.num_rows for part in parts)
    for name, label in table.labels.items():
        try:
            column = pa.chunked_array([chunk for part in parts for chunk in part[label].chunks])
            table.columns[name] = parsed_times(column) if name == "timestamp" else coded(column)
        except pa.ArrowException as error:
            what = f"column {label}: {error}; it must be text or numbers, alike in all files"
            raise ValueError(f"{name_of(files)}: {what}") from None
    del parts, column
    pa.default_memory_pool().release_unused()  # a third of a large log's memory
    return table


# ---------------------------------------------------------------------------------------------- CSV
def read_csv(file: Path, find, table: Table, plain: bool) -> pa.Table:
    """The fields of a file whose first line says which column holds which."""
    with open_bytes(file) as f:
        content = f.read()
    if not content.isascii() or b"\0" in content:
        content = decode(content, file).encode()
    content = content.lstrip(b"\r\n")
    bare = re.sub(b'"[^"]*"', b"", content[: 1 << 20].partition(b"\n")[0])
    mark = max((b",", b";", b"\t", b"|"), key=bare.count).decode()
    if b"::" in bare:
        mark, content = BETWEEN, content.replace(b"::", BETWEEN.encode())
    plain = mark == BETWEEN or (plain and mark == "\t")
    lines = [s.decode(errors="replace") for s in content[: 1 << 20].splitlines() if s.strip()][:2]
    quotes = "" if plain else quote_style(content, mark, file)
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    first, *below = csv.reader(lines, delimiter=mark, quoting=quoting)
    if len(first) == 1:
        raise ValueError(
            f"{file}: its first line, {shorten(lines[0], 80)!r}, is one field, not a row per "
            "interaction, such as user,item,rating,timestamp (, ; tab | or :: between them; "
            "Netflix: write the movie's number into each row)"
        )
    first = [re.sub(":(token|float)(_seq)?$", "", name.strip()) for name in first]  # RecBole's
    names, named = find.header(first, below[0] if below else [])
    labels = find.by_name(names, file)
    table.first_row = 1 + named

    def skipped(row) -> str:
        shown = row.text.replace(BETWEEN, "::")
        table.bad(f"{row.actual_columns} fields, not {row.expected_columns}: {shown}")
        return "skip"

    kinds = dict.fromkeys(labels.values(), CODED)
    kinds |= {label: pa.string() for name, label in labels.items() if name == "timestamp"}
    read = pa.csv.ReadOptions(column_names=names, skip_rows=int(named), block_size=BLOCK)
    parse = pa.csv.ParseOptions(
        delimiter=mark,
        quote_char='"' if quotes else False,
        escape_char="\\" if quotes == "escaped" else False,
        newlines_in_values=bool(quotes),
        invalid_row_handler=skipped,
    )
    convert = pa.csv.ConvertOptions(column_types=kinds, include_columns=[*kinds])
    try:
        return pa.csv.read_csv(pa.BufferReader(content), read, parse, convert)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: {shorten(error)}") from None


def quote_style(content: bytes, mark: str, file) -> str:
    """How quotes stand inside quotes, "doubled" or "escaped" by a backslash; "" where there are
    none, or some that neither begin nor end a field: then all are characters, which is noted."""
    if b'"' not in content:
        return ""
    content += b"\n" * (not content.endswith(b"\n"))  # it also stands in front of the first byte
    data = np.frombuffer(content, np.uint8)
    edges = np.isin(np.arange(256), [*b'\r\n"', ord(mark)])
    quotes = np.flatnonzero(data == ord('"'))
    escaped = (data[quotes - 1] == ord("\\")) & (data[quotes - 2] != ord("\\"))
    for style, at in (("doubled", quotes), ("escaped", quotes[~escaped])):
        sound = edges[data[at[::2] - 1]].all() and edges[data[at[1::2] + 1]].all()
        if sound and len(at) % 2 == 0:
            return style
    print0(f"note: {file}: some quotes neither begin nor end a field: all are characters")
    return ""


# --------------------------------------------------------------------------------------------- JSON
def read_json(file: Path, find, table: Table) -> pa.Table:
    """The fields, as texts, of JSON lines, Python literals or an array."""
    head = [*itertools.islice(read_records(file, Table()), 1000)]
    names = [*dict.fromkeys(name for record in head for name in record)]
    labels = [*find.by_name(names, file).values()]
    with contextlib.suppress(pa.ArrowException, ValueError, OverflowError), open_bytes(file) as f:
        kinds = pa.schema({label: pa.array([r.get(label) for r in head]).type for label in labels})
        parse = pa.json.ParseOptions(kinds, unexpected_field_behavior="ignore")
        found = pa.json.read_json(f, parse_options=parse)
        found.validate(full=True)  # it does not look whether texts are UTF-8
        return pa.table({label: as_texts(found[label]) for label in labels})
    texts = {label: [] for label in labels}
    for record in read_records(file, table):
        values = [record.get(label) for label in labels]
        if nested := [v for v in values if isinstance(v, (list, dict))]:
            shown = f"a list or an object, {shorten(repr(nested[0]), 80)}: write a text"
            table.bad(f"{shown} (pandas: to_json(orient='records', lines=True))")
            continue
        for label, value in zip(labels, values):
            whole = isinstance(value, float) and value.is_integer()
            text = str(int(value) if whole else value).encode("utf-8", "replace").decode()
            texts[label].append(None if value is None else text)
    return pa.table({label: pa.array(column, pa.string()) for label, column in texts.items()})


def read_records(file: Path, table: Table) -> Iterator[dict]:
    """The objects of an array, or of lines of JSON or Python literals (which are never evaluated);
    blank lines are no lines, others are bad. BeerAdvocate has blocks of `key: value` lines."""
    records, head = map(str.strip, read_lines(file)), read_head(file, 1 << 10)
    if head.startswith("["):
        try:
            records = json.loads("\n".join(records))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: not a JSON array of objects ({error})") from None
    elif head.startswith(("beer/", "review/")):
        blocks = itertools.groupby(records, bool)
        records = (dict(s.partition(": ")[::2] for s in lines) for full, lines in blocks if full)
    for number, record in enumerate(records, 1):
        for parse in (json.loads, ast.literal_eval):
            if isinstance(record, str) and record.startswith("{"):
                with contextlib.suppress(*DAMAGE):
                    record = parse(record)
        if isinstance(record, dict):
            yield record
        elif record != "":
            table.bad(f"line {number}: {record}")


# ------------------------------------------------------------------------------------------ Parquet
def read_parquet(file: Path, find, table: Table) -> pa.Table:
    """The fields of one file; `key=value` in the names of its folders are columns, too (Hive)."""
    try:
        schema = ds.dataset(str(file), partitioning="hive").schema
        labels = [*find.by_name(schema.names, file).values()]
        flat = [label for label in labels if not pa.types.is_nested(schema.field(label).type)]
        form = ds.ParquetFileFormat(dictionary_columns=flat, coerce_int96_timestamp_unit="us")
        parquet = ds.dataset(str(file), format=form, partitioning="hive")
        return parquet.to_table(labels, batch_size=1 << 20)
    except (pa.ArrowException, OSError, MemoryError, OverflowError) as error:
        raise ValueError(f"{file}: cannot be read as Parquet ({shorten(error)})") from None
