"""Any file or folder of files as one table: CSV and its relatives, JSON, Python literals, Parquet.

Arrow reads them, on all cores. Python reads, a line at a time, what Arrow cannot: JSON with a bad
line, arrays, columns of several types, literals."""

import ast
import contextlib
import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from common import print0
from loaders.files import decode, name_of, open_bytes, read_head, read_lines
from loaders.values import ABSENT_TEXTS, Column, id_text

MAX_BAD_SHARE = 0.01  # of the rows; with more of them the file is not what it was taken for
BETWEEN = "\x1f"  # the fields of a text that was divided here
BLOCK = 1 << 24  # bytes that are read together
TEXTS = pa.dictionary(pa.int32(), pa.string())
csv.field_size_limit(1 << 30)


@dataclass
class Table:
    """Columns by field, and the lines that could not be read."""

    labels: dict[str, str] = field(default_factory=dict)  # field -> name of its column
    # times that are numbers or moments stay an array
    columns: dict[str, Column | np.ndarray] = field(default_factory=dict)
    num_rows: int = 0
    num_bad: int = 0  # beside them
    first_bad: list[str] = field(default_factory=list)
    first_row: int = 1  # number of the first row: behind a header it is 2
    delimiter: str = ","

    def bad(self, line: str, count: int = 1) -> None:
        self.num_bad += count
        self.first_bad = [*self.first_bad, shorten(line)][:5]


def shorten(text: str, length: int = 200) -> str:
    """A text for a message."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def brief(names: Iterable[str]) -> list[str]:
    """Column names for a message."""
    return [shorten(str(name), 40) for name in list(names)[:20]]


def check_bad(table: Table, source) -> Table:
    """The table; ValueError if more than 1 % of its rows are bad."""
    total = table.num_rows + table.num_bad
    if table.num_bad > MAX_BAD_SHARE * total:
        count = f"{table.num_bad:,} of {total:,} rows cannot be used (1% may be)"
        raise ValueError(f"{source}: {count}: {'; '.join(table.first_bad)}")
    return table


def read_table(files: list[Path], kind: str, find, root: Path | None = None) -> Table:
    """The parts of one export (csv, plain, recbole, jsonl, literal, parquet) as one table.

    `find` (ownlog.Finder) says which column holds which field; quotes of `plain` are characters."""
    table, readers = Table(), {"parquet": parquet_parts, "jsonl": json_parts, "literal": json_parts}
    parts = [*readers.get(kind, csv_parts)(files, kind, find, root, table)]
    if not table.labels:
        raise ValueError(f"{name_of(files)}: the file is empty")
    empty = pa.table({name: pa.nulls(0) for name in table.labels})
    try:
        found = pa.concat_tables([*parts] or [empty], promote_options="permissive")
        columns = {name: coded(found[name], name, label) for name, label in table.labels.items()}
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"{name_of(files)}: {error}") from None
    table.columns, table.num_rows = columns, found.num_rows
    del parts, found
    pa.default_memory_pool().release_unused()  # a third of a large log's memory
    return table


def coded(column: pa.ChunkedArray, name: str, label: str) -> Column | np.ndarray:
    """A column of Arrow, coded; times that are numbers or moments as an array."""
    kind, types = column.type, pa.types
    if isinstance(kind, pa.BaseExtensionType):  # UUID
        column = pa.chunked_array([c.storage for c in column.chunks], kind.storage_type)
    if types.is_nested(kind) or types.is_time(kind) or types.is_duration(kind):
        raise ValueError(f"column {label}: {kind} is no text, number or moment in time; cast it")
    if types.is_string_view(kind):
        column = column.cast(pa.string())
    is_moment = types.is_date(kind) or types.is_timestamp(kind)
    numeric = is_moment or types.is_integer(kind) or types.is_floating(kind)
    if is_time := name == "timestamp" and numeric:
        if is_moment:
            column = column.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False)
        numbers = column if types.is_floating(kind) else column.cast(pa.int64())
        numbers = numbers.combine_chunks()
    else:
        column = column if types.is_dictionary(column.type) else column.dictionary_encode()
        whole = column.unify_dictionaries().combine_chunks()
        numbers = whole.indices.cast(pa.int32())
    # to_numpy would import pandas, if it is installed
    array = np.from_dlpack(numbers.fill_null(-1) if numbers.null_count else numbers)
    if is_time:
        return array.view("M8[us]") if is_moment else array
    return Column(array, whole.dictionary.to_pylist())


# ---------------------------------------------------------------------------------------------- CSV
def csv_parts(files: list[Path], kind: str, find, root, table: Table) -> Iterator[pa.Table]:
    """The first part with a line names the columns; others repeat them, in any order, or not."""
    places, width, named = {}, 0, False
    for file in files:
        with open_bytes(file) as f:
            content = f.read()
        if not content.isascii():
            content = decode(content, file).encode()
        lines = re.split("\r\n|\r|\n", content[: 1 << 20].decode(errors="replace"))
        skip = next((n for n, line in enumerate(lines) if line.strip()), None)
        if skip is None:
            continue
        top = [line for line in lines[skip:] if line.strip()][:2]
        if "\0" in top[0]:
            raise ValueError(f"{file}: not text in UTF-8; save it as UTF-8")
        mark = max((",", ";", "\t", "|"), key=re.sub('"[^"]*"', "", top[0]).count)
        if mark not in top[0] and "::" in top[0]:
            mark, content = BETWEEN, content.replace(b"::", BETWEEN.encode())
            top = [line.replace("::", BETWEEN) for line in top]
        plain = kind == "plain" or mark == BETWEEN or (kind == "recbole" and mark == "\t")
        quotes = "" if plain else quote_style(content, mark, file)
        quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
        first, *below = [next(csv.reader([s], delimiter=mark, quoting=quoting)) for s in top]
        first = [re.sub(":(token|float)(_seq)?$", "", name.strip()) for name in first]  # RecBole's
        names = [*table.labels.values()]
        header = named and any(name in first for name in names)
        if not names:
            if len(first) == 1:
                raise ValueError(
                    f"{file}: its first line, {shorten(top[0], 80)!r}, is one field, not a row per "
                    "interaction, such as user,item,rating,timestamp (, ; tab | or :: between "
                    "them; Netflix: write the movie's number into each row)"
                )
            table.labels, places, named = find.in_rows(first, *below, source=file)
            table.first_row, table.delimiter, header = 1 + named, mark, named
        elif header and (missing := [name for name in names if name not in first]):
            raise ValueError(f"{file}: no column {missing[0]}; there are {brief(first)}")
        elif header:
            places = {f: first.index(n) for f, n in table.labels.items()}
        width = len(first) if header or not width else width
        fields = {place: name for name, place in places.items()}
        columns = [fields.get(n, str(n)) for n in range(width)]
        yield read_csv(content, file, table, columns, skip + header, mark, quotes)


def quote_style(content: bytes, mark: str, file) -> str:
    """How quotes stand inside quotes, "doubled" or "escaped" by a backslash; "" where there are
    none, or some that neither begin nor end a field: then all are characters, which is noted."""
    content += b"\n" * (not content.endswith(b"\n"))  # it also stands in front of the first byte
    data = np.frombuffer(content, np.uint8)
    edges = np.isin(np.arange(256), [*b'\r\n"', ord(mark)])
    quotes = np.flatnonzero(data == ord('"'))
    escaped = (data[quotes - 1] == ord("\\")) & (data[quotes - 2] != ord("\\"))
    for style, at in (("doubled", quotes), ("escaped", quotes[~escaped])):
        sound = edges[data[at[::2] - 1]].all() and edges[data[at[1::2] + 1]].all()
        if sound and len(at) % 2 == 0:
            return style if len(quotes) else ""
    print0(f"note: {file}: some quotes neither begin nor end a field: all are characters")
    return ""


def read_csv(
    content: bytes, file, table: Table, columns: list[str], skip: int, mark: str, quotes: str
) -> pa.Table:
    """The fields among the columns of one part, behind its first `skip` lines."""

    def skipped(row) -> str:
        shown = row.text.replace(BETWEEN, "::")
        table.bad(f"{row.actual_columns} fields, not {row.expected_columns}: {shown}")
        return "skip"

    read = pa.csv.ReadOptions(column_names=columns, skip_rows=skip, block_size=BLOCK)
    parse = pa.csv.ParseOptions(
        delimiter=mark,
        quote_char='"' if quotes else False,
        escape_char="\\" if quotes == "escaped" else False,
        newlines_in_values=bool(quotes),
        invalid_row_handler=skipped,
    )
    known_bad = table.num_bad, table.first_bad
    for times in (pa.int64(), pa.float64(), pa.timestamp("us"), TEXTS):  # whichever fits
        convert = pa.csv.ConvertOptions(
            column_types=dict.fromkeys(table.labels, TEXTS) | {"timestamp": times},
            include_columns=[*table.labels],
            null_values=sorted(ABSENT_TEXTS),
        )
        table.num_bad, table.first_bad = known_bad
        try:
            return pa.csv.read_csv(pa.BufferReader(content), read, parse, convert)
        except pa.ArrowInvalid as error:
            message = " ".join(str(error).split())
            if "Empty CSV file" in message:
                break
            if "conversion error" not in message or times == TEXTS:
                raise ValueError(f"{file}: {message[:300]}") from None
    return pa.table({name: pa.nulls(0) for name in table.labels})


# --------------------------------------------------------------------------------------------- JSON
def json_parts(files: list[Path], kind: str, find, root, table: Table) -> Iterable[pa.Table]:
    """Lines of JSON or of Python literals, and arrays of JSON."""
    tried = Table()
    head = [r for f in files for r in itertools.islice(read_records(f, tried), 1000)]
    names = list(dict.fromkeys(name for record in head for name in record))
    if not names:
        check_bad(tried, name_of(files))
        return []
    table.labels = find.by_name(names, name_of(files))
    found = [*itertools.takewhile(bool, (arrow_json(f, head, table.labels) for f in files))]
    return found if len(found) == len(files) else [read_texts(f, table) for f in files]


def arrow_json(file: Path, head: list[dict], labels: dict[str, str]) -> pa.Table | None:
    """The columns of JSON lines; None where Arrow cannot read them, or a column has two types."""
    known, schema = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}, []
    for field_, name in labels.items():
        kinds = {type(record[name]) for record in head if record.get(name) is not None}
        if kinds <= {int, float} and (float in kinds or field_ == "rating"):
            kinds = {float}
        if len(kinds) > 1 or not kinds <= known.keys():
            return None
        schema.append((name, known[kinds.pop()] if kinds else pa.string()))
    parse = pa.json.ParseOptions(pa.schema(schema), unexpected_field_behavior="ignore")
    try:
        with open_bytes(file) as f:
            found = pa.json.read_json(f, pa.json.ReadOptions(block_size=BLOCK), parse)
            found.validate(full=True)  # it does not look whether texts are UTF-8
            return found.rename_columns([*labels])
    except pa.ArrowInvalid:
        return None


def read_texts(file: Path, table: Table) -> pa.Table:
    """The columns of a file's records as texts."""
    rows = []
    for record in read_records(file, table):
        values = [record.get(name) for name in table.labels.values()]
        if nested := [v for v in values if isinstance(v, (list, dict))]:
            shown = f"a list or an object, {shorten(repr(nested[0]), 80)}: write a text"
            table.bad(f"{shown} (pandas: to_json(orient='records', lines=True))")
            continue
        texts = (v if v is None else id_text(v) or str(v) for v in values)
        rows.append([t if t is None else t.encode("utf-8", "replace").decode() for t in texts])
    columns = zip(*rows) if rows else itertools.repeat([])
    return pa.table({f: pa.array(c, pa.string()) for f, c in zip(table.labels, columns)})


def read_records(file: Path, table: Table) -> Iterator[dict]:
    """The objects of an array, or of lines of JSON or Python literals (which are never evaluated);
    blank lines are no lines, others are bad."""
    records: Iterable = map(str.strip, read_lines(file))
    if read_head(file, 1 << 10).removeprefix("\ufeff".encode()).lstrip().startswith(b"["):
        try:
            records = json.loads("\n".join(records))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: not a JSON array of objects ({error})") from None
    damage = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
    for number, record in enumerate(records, 1):
        for parse in (json.loads, ast.literal_eval):
            if isinstance(record, str) and record.startswith("{"):
                with contextlib.suppress(*damage):
                    record = parse(record)
        if isinstance(record, dict):
            yield record
        elif record != "":
            table.bad(f"line {number}: {record}")


# ------------------------------------------------------------------------------------------ Parquet
def parquet_parts(files: list[Path], kind: str, find, root: Path, table: Table) -> Iterator:
    """Files of Parquet; `key=value` in the names of their folders are columns, too (Hive)."""
    for file in files:
        folders = file.relative_to(root).parts[:-1] if root.is_dir() else ()
        fixed = dict(folder.split("=", 1) for folder in folders if "=" in folder)
        try:
            schema = pq.read_schema(file)
            names = [*schema.names, *fixed]
            table.labels = table.labels or find.by_name(names, file)
            if missing := [name for name in table.labels.values() if name not in names]:
                raise ValueError(f"{file}: no column {missing[0]}; there are {brief(names)}")
            stored = [name for name in table.labels.values() if name not in fixed]
            flat = [name for name in stored if not pa.types.is_nested(schema.field(name).type)]
            options = {"pre_buffer": False, "coerce_int96_timestamp_unit": "us"}
            part = pq.ParquetFile(file, read_dictionary=flat, **options).read(stored)
        except (pa.ArrowException, OSError, MemoryError, OverflowError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{file}: cannot be read as Parquet ({reason})") from None
        for name in {*table.labels.values()} - {*stored}:
            value = unquote(fixed[name])
            value = None if value == "__HIVE_DEFAULT_PARTITION__" else value
            part = part.append_column(name, pa.array([value] * part.num_rows, pa.string()))
        yield pa.table({f: part[name] for f, name in table.labels.items()})
