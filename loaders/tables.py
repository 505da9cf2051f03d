"""Columns of a table, whatever it is written in: CSV and its relatives, JSON, Python literals,
Parquet.

Arrow reads them, on all cores. What it cannot read is read by Python, a line at a time: JSON with a
bad line, arrays, columns of several types, literals, and tables with stray quotes. `read_table`
gives a Column for each field (times that are numbers stay an array), and counts the bad lines."""

import ast
import contextlib
import csv
import io
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

from loaders.files import BLOCK, decode, name_of, open_bytes, read_head, read_lines, read_text
from loaders.values import ABSENT_TEXTS, Column

MAX_BAD_SHARE = 0.01  # of the rows; with more of them the file is not what it was taken for
BETWEEN = "\x1f"  # the fields of a text that was divided here


@dataclass
class Table:
    """Columns by field, and the lines that could not be read."""

    labels: dict[str, str]  # field -> name of its column
    columns: dict[str, Column | np.ndarray] = field(default_factory=dict)
    num_rows: int = 0
    num_bad: int = 0
    first_bad: list[str] = field(default_factory=list)
    moments: bool = False  # times are microseconds since 1970
    first_row: int = 1  # number of the first row: behind a header it is 2
    delimiter: str = ","
    plain: bool = False  # quotes are characters

    def bad(self, line: str) -> None:
        self.num_bad += 1
        self.first_bad = [*self.first_bad, shorten(line)][:3]


def shorten(text: str, length: int = 200) -> str:
    """A text for a message."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def brief(names: Iterable[str]) -> list[str]:
    """Column names for a message."""
    return [shorten(str(name), 100) for name in list(names)[:50]]


def check_bad(table: Table, source) -> Table:
    """The table; ValueError if more than 1 % of its lines cannot be read."""
    total = table.num_rows + table.num_bad
    if table.num_bad > MAX_BAD_SHARE * total:
        raise ValueError(
            f"{source}: {table.num_bad:,} of {total:,} rows cannot be used (up to 1% would be "
            f"passed over): {'; '.join(map(repr, table.first_bad))}: these are no rows with "
            f"{', '.join(table.labels.values())}"
        )
    return table


def read_table(files: list[Path], kind: str, find, root: Path | None = None) -> Table:
    """The parts of one export (csv, recbole, jsonl, literal, parquet) as one table.

    `find` (ownlog.Finder) says which column holds which field."""
    reader = {"parquet": parquet_parts, "csv": csv_parts, "recbole": csv_parts, "plain": csv_parts}
    everything = list(reader.get(kind, json_parts)(files, kind, find, root))
    tables = [t for t in everything if t.num_rows] or everything[:1]
    whole = Table(tables[0].labels, delimiter=tables[0].delimiter) if tables else None
    if whole is None:
        raise ValueError(f"{name_of(files)}: the file is empty")
    whole.moments, whole.first_row = tables[0].moments, tables[0].first_row
    for name in tables[0].columns:
        parts = [t.columns[name] for t in tables]
        arrays = [isinstance(part, np.ndarray) for part in parts]
        if any(arrays) and (not all(arrays) or len({t.moments for t in tables}) > 1):
            raise ValueError(
                f"{name_of(files)}: column {whole.labels[name]} holds times of another kind in "
                "another part; write them alike"
            )
        whole.columns[name] = np.concatenate(parts) if any(arrays) else Column.joined(parts)
    for table in everything:
        whole.num_rows += table.num_rows
        whole.num_bad += table.num_bad
        whole.first_bad = [*whole.first_bad, *table.first_bad][:3]
    return whole


# ---------------------------------------------------------------------------------- Arrow's columns
def coded(column: pa.ChunkedArray, name: str) -> Column:
    """A column of any type that is not nested."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        column = pa.chunked_array([c.storage for c in column.chunks], kind.storage_type)
    if pa.types.is_nested(kind):
        raise ValueError(f"column {name}: {kind} is neither a text nor a number; cast it")
    if pa.types.is_string_view(kind) or pa.types.is_float16(kind):
        column = column.cast(pa.string() if pa.types.is_string_view(kind) else pa.float32())
    if not pa.types.is_dictionary(kind):
        column = column.dictionary_encode()
    whole = column.unify_dictionaries().combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        whole = whole.chunk(0) if whole.num_chunks else pa.array([], column.type)
    codes = whole.indices.fill_null(-1).cast(pa.int32()).to_numpy()
    return Column(codes, whole.dictionary.to_pylist())


def set_times(table: Table, column: pa.ChunkedArray) -> None:
    """Numbers as they are (-1 for null), moments in microseconds; all else coded."""
    kind, name = column.type, table.labels["timestamp"]
    if pa.types.is_time(kind) or pa.types.is_duration(kind):
        raise ValueError(f"column {name}: {kind} is no moment in time; cast it to a timestamp")
    table.moments = pa.types.is_date(kind) or pa.types.is_timestamp(kind)
    if table.moments:
        zone = kind.tz if pa.types.is_timestamp(kind) else None
        column = column.cast(pa.timestamp("us", zone), safe=False).cast(pa.int64())
    elif pa.types.is_decimal(kind) or pa.types.is_float16(kind):
        column = column.cast(pa.float32() if pa.types.is_float16(kind) else pa.float64())
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        table.columns["timestamp"] = column.fill_null(-1).to_numpy()
    else:
        table.columns["timestamp"] = coded(column, name)


def take_columns(table: Table, found: pa.Table, names: dict[str, str]) -> Table:
    """The columns of Arrow's table, by the field that each holds."""
    table.num_rows = found.num_rows
    for field_, name in names.items():
        if field_ == "timestamp":
            set_times(table, found[name])
        else:
            table.columns[field_] = coded(found[name], table.labels[field_])
    return table


# ---------------------------------------------------------------------------------------------- CSV
def csv_parts(files: list[Path], kind: str, find, root=None) -> Iterator[Table]:
    """The first part with a line names the columns; others repeat them, in any order, or not."""
    labels, positions, width, named = {}, {}, 0, False
    for file in files:
        head = read_head(file)
        if b"\0" in head[:4096] and head[:2] not in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{file}: not text in UTF-8, or in UTF-16 with a byte-order mark")
        lines = re.split("\r\n|\r|\n", decode(head, file, quiet=True))
        skip = next((n for n, line in enumerate(lines) if line.strip()), None)
        if skip is None:
            continue
        delimiter = find_delimiter(lines[skip], kind)
        if re.fullmatch(r"sep=.", lines[skip], re.IGNORECASE):  # Excel's way to name the delimiter
            delimiter, skip = lines[skip][-1], skip + 1
        rows = [split_line(line, delimiter) for line in lines[skip : skip + 100] if line.strip()]
        first = [name.strip().partition(":")[0] if kind == "recbole" else name for name in rows[0]]
        if not labels:
            labels, positions, named = find.in_rows([first, *rows[1:]], file)
            width, header = len(first), named
        else:
            header = named and len(set(labels.values()) & set(first)) > len(labels) / 2
            if header:
                positions = {f: find.place(name, first, file) for f, name in labels.items()}
                width = len(first)
        plain = kind == "plain" or (kind == "recbole" and delimiter.isspace())
        table = Table(labels, first_row=1 + header, delimiter=delimiter, plain=plain)
        yield read_csv(file, table, positions, width, skip + header)


def find_delimiter(line: str, kind: str) -> str:
    """What divides the fields of a table's first line."""
    if kind == "recbole":  # what stands between the typed names
        typed = re.compile(r"[^\s,;|:]+:(token|float)(_seq)?")
        for mark in "\t,;| ":
            names = line.split(mark)
            if len(names) > 1 and all(typed.fullmatch(name.strip()) for name in names):
                return mark
        return "\t"
    bare = re.sub(r'"[^"]*"', "", line)
    counts = {d: bare.count(d) for d in (",", ";", "\t", "|", "\x01")}  # \x01: Hive
    best = max(counts, key=counts.get)
    if counts[best]:
        return best
    return next((d for d in ("::", " ") if d in bare.strip()), ",")


def split_line(line: str, delimiter: str) -> list[str]:
    """The fields of one line."""
    if delimiter == " ":
        return line.split()
    if len(delimiter) > 1:
        return line.split(delimiter)
    return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]


def quoting(blocks: Iterable[bytes], delimiter: str) -> str:
    """How quotes stand in a table: "" for none, "doubled" inside quotes, "escaped" by a backslash,
    or "stray": some neither begin nor end a field."""
    edges = np.zeros(256, bool)
    edges[[ord(c) for c in '\r\n"' + delimiter[:1]]] = True
    sound, inside, seen, before = [True, True], [0, 0], False, b"\n\n"
    for block in itertools.chain(blocks, [b"\n"]):
        data = np.frombuffer(before + block, np.uint8)
        at = np.flatnonzero(data[2:-1] == ord('"')) + 2
        before = data[-3:].tobytes()
        seen = seen or len(at) > 0
        for escaped in (0, 1):
            quotes = at
            if escaped:
                quotes = at[(data[at - 1] != ord("\\")) | (data[at - 2] == ord("\\"))]
            opens = (inside[escaped] + np.arange(len(quotes))) % 2 == 0
            fits = np.where(opens, edges[data[quotes - 1]], edges[data[quotes + 1]])
            sound[escaped] = sound[escaped] and bool(fits.all())
            inside[escaped] = (inside[escaped] + len(quotes)) % 2
    if not seen:
        return ""
    doubled, escaped = (sound[n] and not inside[n] for n in (0, 1))
    return "doubled" if doubled else "escaped" if escaped else "stray"


def read_csv(file: Path, table: Table, positions: dict[str, int], width: int, skip: int) -> Table:
    """The columns at `positions` of one part, behind its first `skip` lines."""
    delimiter, quotes, text = table.delimiter, "", None
    marked = read_head(file, 3)[:2] in (b"\xff\xfe", b"\xfe\xff")
    if marked or delimiter in ("::", " "):
        text = read_text(file)
    if delimiter in ("::", " "):
        if delimiter == " ":
            text = re.sub(r"(?m)^[ \t]+|[ \t]+$", "", text)
        text = re.sub(delimiter if delimiter == "::" else "[ \t]+", BETWEEN, text)
        delimiter = BETWEEN
    elif not table.plain:
        quotes = quoting(read_blocks(file) if text is None else [text.encode()], delimiter)
        if quotes == "stray" and delimiter == "\t":
            quotes = ""
        elif quotes == "stray":
            lines = re.split("\r\n|\r|\n", read_text(file) if text is None else text)[skip:]
            text = "\n".join(mended(lines, delimiter, width, table))
            delimiter, quotes, skip = BETWEEN, "", 0

    def skipped(row) -> str:
        shown = row.text.replace(BETWEEN, table.delimiter)
        table.bad(f"{row.actual_columns} fields, not {row.expected_columns}: {shown}")
        return "skip"

    texts, names = pa.dictionary(pa.int32(), pa.string()), [str(n) for n in range(width)]
    wanted = {field_: str(place) for field_, place in positions.items()}
    kinds = {name: pa.int64() if f == "timestamp" else texts for f, name in wanted.items()}
    parse = pa.csv.ParseOptions(
        delimiter=delimiter,
        quote_char='"' if quotes else False,
        escape_char="\\" if quotes == "escaped" else False,
        newlines_in_values=bool(quotes),
        invalid_row_handler=skipped,
    )
    read = pa.csv.ReadOptions(column_names=names, skip_rows=skip, block_size=1 << 22)
    while True:
        known_bad = table.num_bad, table.first_bad
        convert = pa.csv.ConvertOptions(
            column_types=kinds, include_columns=sorted(kinds), null_values=sorted(ABSENT_TEXTS)
        )
        try:
            with open_bytes(file) if text is None else io.BytesIO(text.encode()) as f:
                return take_columns(table, pa.csv.read_csv(f, read, parse, convert), wanted)
        except pa.ArrowInvalid as error:
            message = " ".join(str(error).split())
            table.num_bad, table.first_bad = known_bad
            if "Empty CSV file" in message:
                return take_columns(
                    table, pa.table({n: pa.array([], k) for n, k in kinds.items()}), wanted
                )
            if "UTF8" in message and text is None:
                text = read_text(file)
            elif "int64" in message:
                kinds[wanted["timestamp"]] = texts
            else:
                raise ValueError(f"{file}: {message[:300]}") from None


def read_blocks(file: Path) -> Iterator[bytes]:
    with open_bytes(file) as f:
        while block := f.read(BLOCK):
            yield block


def mended(lines: Iterable[str], delimiter: str, width: int, table: Table) -> Iterator[str]:
    """Lines of a table with stray quotes, each divided on its own: by the rules of quotes, or at
    every delimiter; where neither gives so many fields, or a quote is not closed, it is bad."""
    for line in lines:
        fields = line.split(delimiter)
        if '"' in line:
            try:
                fields = next(csv.reader([line], delimiter=delimiter, strict=True))
            except csv.Error:
                fields = fields if line.count('"') % 2 == 0 else []
        if len(fields) == width:
            yield BETWEEN.join(fields)
        elif line.strip():
            table.bad(f"a quote is not closed, or not {width} fields: {line}")


# --------------------------------------------------------------------------------------------- JSON
def json_parts(files: list[Path], kind: str, find, root=None) -> Iterator[Table]:
    """Lines of JSON, arrays of it, or (`literal`) lines of Python literals."""
    parses, heads = {}, {}
    for file in files:
        head = decode(read_head(file), file, quiet=True)
        if head.lstrip().startswith("["):
            heads[file] = None
        else:
            lines = [line for line in head.split("\n")[:1000] if line.strip()]
            python = kind == "literal" and lines and parsed(json.loads)(lines[0]) is None
            parses[file] = parsed(literal if python else json.loads)
            heads[file] = [r for r in map(parses[file], lines) if r is not None]
    arrays = {file: read_array(file) for file, head in heads.items() if head is None}
    records = [r for file in files for r in (heads[file] or arrays.get(file, []))[:1000]]
    names = list(dict.fromkeys(name for record in records for name in record))
    if not names:
        start = next((h for h in (decode(read_head(f), f, quiet=True) for f in files) if h), "")
        raise ValueError(f"{name_of(files)}: no line is a JSON object; line 1: {start[:80]!r}")
    if all(isinstance(value, dict) for record in records for value in record.values()):
        raise ValueError(
            f"{name_of(files)}: an object of columns, as pandas writes it; write one object a "
            'line: df.to_json("log.jsonl", orient="records", lines=True)'
        )
    labels = find.by_name(names, name_of(files))
    for field_, name in labels.items():
        values = (record.get(name) for record in records)
        nested = next((value for value in values if isinstance(value, (dict, list))), None)
        if nested is not None:
            raise ValueError(
                f"{name_of(files)}: column {name} holds lists or objects, such as "
                f"{shorten(repr(nested), 80)}, and cannot be the {field_}; write one text"
            )
    for file in files:
        table = Table(labels)
        if heads[file] is None:
            yield python_columns(table, arrays.pop(file))
            continue
        schema = json_schema(heads[file], labels)
        found = schema and arrow_json(file, schema)
        if found:
            yield take_columns(table, found, labels)
        else:
            yield python_columns(table, read_records(file, parses[file], table))


def json_schema(records: list[dict], labels: dict[str, str]) -> pa.Schema | None:
    """The type of each column; None if one is of several that Arrow does not read together."""
    known = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    out = []
    for field_, name in labels.items():
        kinds = {type(record[name]) for record in records if record.get(name) is not None}
        if kinds <= {int, float} and (float in kinds or field_ == "rating"):
            kinds = {float}
        if len(kinds) > 1 or not kinds <= known.keys():
            return None
        out.append((name, known[kinds.pop()] if kinds else pa.string()))
    return pa.schema(out)


def arrow_json(file: Path, schema: pa.Schema) -> pa.Table | None:
    """The columns of JSON lines; None where Arrow cannot read them."""
    read = pa.json.ReadOptions(block_size=BLOCK)
    parse = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        with open_bytes(file) as f:
            found = pa.json.read_json(f, read, parse)
            found.validate(full=True)  # it does not look whether texts are UTF-8
            return found
    except pa.ArrowInvalid:
        return None


def literal(line: str):
    """A Python literal; nothing is ever evaluated."""
    return ast.literal_eval(line.strip())


def parsed(parse):
    """parse(line), or None where it is no object."""

    def one(line: str) -> dict | None:
        try:
            record = parse(line)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
        return record if isinstance(record, dict) else None

    return one


def read_records(file: Path, parse, table: Table) -> Iterator[dict]:
    """The record of every line; blank ones are no lines, others are bad."""
    for number, line in enumerate(read_lines(file), 1):
        record = parse(line) if line.strip() else None
        if record is not None:
            yield record
        elif line.strip():
            table.bad(f"line {number}: {line}")


def read_array(file: Path) -> list[dict]:
    try:
        return [
            record if isinstance(record, dict) else {} for record in json.loads(read_text(file))
        ]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a JSON array of objects ({error})") from None


def python_columns(table: Table, records: Iterable[dict]) -> Table:
    """The columns of records that Python has read; nested values are none."""
    names, nested = table.labels.values(), (list, dict)
    rows = [[None if isinstance(v, nested) else v for v in map(r.get, names)] for r in records]
    table.num_rows = len(rows)
    for field_, values in zip(table.labels, zip(*rows) if rows else [()] * len(table.labels)):
        table.columns[field_] = Column.of(values)
    return table


# ------------------------------------------------------------------------------------------ Parquet
def parquet_parts(files: list[Path], kind: str, find, root: Path) -> Iterator[Table]:
    """Files of Parquet; `key=value` in the names of their folders are columns, too (Hive)."""
    schemas, constants = {}, {}
    for file in files:
        with reading(file):
            schemas[file] = open_parquet(file).schema_arrow
        folders = file.relative_to(root).parts[:-1] if root.is_dir() else ()
        pairs = [folder.partition("=") for folder in folders if "=" in folder]
        null = "__HIVE_DEFAULT_PARTITION__"
        constants[file] = {k: None if value == null else unquote(value) for k, _, value in pairs}
    common = set.intersection(*({*schemas[f].names, *constants[f]} for f in files))
    first = [*schemas[files[0]].names, *constants[files[0]]]
    labels = find.by_name([name for name in first if name in common], root)
    for file in files:
        table, fixed = Table(labels), constants[file]
        names = {f: name for f, name in labels.items() if name not in fixed}
        types = {name: schemas[file].field(name).type for name in names.values()}
        texts = [name for name, kind in types.items() if kind in (pa.string(), pa.binary())]
        with reading(file):
            found = open_parquet(file, read_dictionary=texts).read([*types])
            take_columns(table, found, names)
        for field_ in labels.keys() - names.keys():
            table.columns[field_] = Column.of([fixed[labels[field_]]] * table.num_rows)
        yield table


def open_parquet(file: Path, **options) -> pq.ParquetFile:
    return pq.ParquetFile(file, pre_buffer=False, coerce_int96_timestamp_unit="us", **options)


@contextlib.contextmanager
def reading(file: Path):
    """Whatever Arrow finds wrong is one ValueError with the name of the file."""
    try:
        yield
    except (pa.ArrowException, OSError, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file}: cannot be read as Parquet ({reason})") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
