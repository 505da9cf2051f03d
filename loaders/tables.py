"""Any file or folder of files as one table: CSV and its relatives, JSON, Python literals, Parquet.

Arrow reads them, on all cores. What it cannot read is read by Python, a line at a time: JSON with a
bad line, arrays, columns of several types, literals, and tables with stray quotes."""

import ast
import codecs
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

from loaders.files import UTF16, decode, name_of, open_bytes, read_head, read_lines, read_text
from loaders.values import ABSENT_TEXTS, Column

MAX_BAD_SHARE = 0.01  # of the rows; with more of them the file is not what it was taken for
BETWEEN = "\x1f"  # the fields of a text that was divided here
BLOCK = 1 << 24  # bytes that are read together
csv.field_size_limit(1 << 30)


@dataclass
class Table:
    """Columns by field, and the lines that could not be read."""

    labels: dict[str, str] = field(default_factory=dict)  # field -> name of its column
    # times that are numbers or moments stay an array
    columns: dict[str, Column | np.ndarray] = field(default_factory=dict)
    num_rows: int = 0
    num_bad: int = 0
    first_bad: list[str] = field(default_factory=list)
    first_row: int = 1  # number of the first row: behind a header it is 2
    delimiter: str = ","

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
            f"{source}: {table.num_bad:,} of {total:,} rows cannot be used (1% may be): "
            f"{'; '.join(map(repr, table.first_bad))}: these are no rows with "
            f"{', '.join(table.labels.values())}"
        )
    return table


def read_table(files: list[Path], kind: str, find, root: Path | None = None) -> Table:
    """The parts of one export (csv, plain, recbole, jsonl, literal, parquet) as one table.

    `find` (ownlog.Finder) says which column holds which field; quotes of `plain` are characters."""
    table, reader = Table(), {"parquet": parquet_parts, "jsonl": json_parts, "literal": json_parts}
    parts = [*reader.get(kind, csv_parts)(files, kind, find, root, table)]
    if not table.labels:
        raise ValueError(f"{name_of(files)}: the file is empty")
    parts = [part for part in parts if any(map(len, part.values()))]
    for name, label in table.labels.items():
        columns = [part[name] for part in parts]
        kinds = {c.dtype.kind if isinstance(c, np.ndarray) else "text" for c in columns}
        if len(kinds) > 1 and not kinds <= {"i", "f"}:
            what = f"column {label} holds times of another kind in another part; write them alike"
            raise ValueError(f"{name_of(files)}: {what}")
        texts = not kinds or "text" in kinds
        table.columns[name] = Column.joined(columns) if texts else np.concatenate(columns)
        table.num_rows = len(table.columns[name])
    pa.default_memory_pool().release_unused()
    return table


# ---------------------------------------------------------------------------------- Arrow's columns
def coded(found: pa.Table, labels: dict[str, str]) -> dict[str, Column | np.ndarray]:
    """The columns of Arrow's table, whose names are the fields."""
    out, types = {}, pa.types
    for name, column in zip(found.column_names, found.columns):
        kind, label = column.type, labels[name]
        if isinstance(kind, pa.BaseExtensionType):
            column = pa.chunked_array([c.storage for c in column.chunks], kind.storage_type)
        elif types.is_nested(kind):
            raise ValueError(f"column {label}: {kind} is neither a text nor a number; cast it")
        elif types.is_float16(kind) or types.is_string_view(kind):
            column = column.cast(pa.float32() if types.is_float16(kind) else pa.string())
        if name == "timestamp":
            moments = types.is_date(kind) or types.is_timestamp(kind)
            if types.is_time(kind) or types.is_duration(kind):
                raise ValueError(f"column {label}: {kind} is no moment in time; cast it")
            if moments:
                zone = kind.tz if types.is_timestamp(kind) else None
                column = column.cast(pa.timestamp("us", zone), safe=False).cast(pa.int64())
            elif types.is_decimal(kind) or types.is_integer(kind):
                column = column.cast(pa.float64() if types.is_decimal(kind) else pa.int64())
            if types.is_integer(column.type) or types.is_floating(column.type):
                ticks = column.fill_null(-1).to_numpy()
                out[name] = ticks.view("M8[us]") if moments else ticks
                continue
        if not types.is_dictionary(column.type):
            column = column.dictionary_encode()
        whole = column.unify_dictionaries().combine_chunks()
        codes = whole.indices.fill_null(-1).cast(pa.int32()).to_numpy()
        out[name] = Column(codes, whole.dictionary.to_pylist())
    return out


# ---------------------------------------------------------------------------------------------- CSV
def csv_parts(files: list[Path], kind: str, find, root, table: Table) -> Iterator[dict]:
    """The first part with a line names the columns; others repeat them, in any order, or not."""
    places, width, named = {}, 0, False
    for file in files:
        head = read_head(file)
        if b"\0" in head[:4096] and head[:2] not in UTF16:
            raise ValueError(f"{file}: not text in UTF-8, or in UTF-16 with a byte-order mark")
        lines = re.split("\r\n|\r|\n", decode(head, file, quiet=True))
        skip = next((n for n, line in enumerate(lines) if line.strip()), None)
        if skip is None:
            continue
        delimiter = find_delimiter(lines[skip], kind)
        if re.fullmatch(r"sep=.", lines[skip], re.IGNORECASE):  # Excel's way to name the delimiter
            delimiter, skip = lines[skip][-1], skip + 1
        rows = [line for line in lines[skip : skip + 100] if line.strip()]
        if delimiter in ("::", " "):
            rows = [line.split(delimiter.strip() or None) for line in rows]
        else:
            rows = [next(csv.reader([line], delimiter=delimiter), [""]) for line in rows]
        first = [name.strip() for name in rows[0]]
        if kind == "recbole":
            first = [name.partition(":")[0] for name in first]
        if not table.labels:
            table.labels, places, named = find.in_rows([first, *rows[1:]], file)
            header, table.first_row, table.delimiter = named, 1 + named, delimiter
        else:
            names = set(table.labels.values())
            header = named and len(names & set(first)) > len(names) / 2
            if header and (missing := names - set(first)):
                raise ValueError(f"{file}: no column {missing.pop()}; there are {brief(first)}")
            places = {f: first.index(n) for f, n in table.labels.items()} if header else places
        width = len(first) if header or not width else width
        plain = kind == "plain" or (kind == "recbole" and delimiter.isspace())
        yield read_csv(file, table, places, width, skip + header, delimiter, plain)


def find_delimiter(line: str, kind: str) -> str:
    """What divides the fields of a table's first line."""
    if kind == "recbole":  # what stands between the typed names
        typed = re.match(r"\s*[^\s,;|:]+:(?:token|float)(?:_seq)?(\s*[,;|]\s*|\s+)", line)
        between = typed[1] if typed else "\t"
        return between.strip() or ("\t" if "\t" in between else " ")
    bare = re.sub(r'"[^"]*"', "", line)
    best = max((",", ";", "\t", "|", "\x01"), key=bare.count)  # \x01: Hive
    return best if best in bare else next((d for d in ("::", " ") if d in bare.strip()), ",")


def read_csv(
    file: Path, table: Table, places: dict[str, int], width: int, skip: int, mark: str, plain: bool
) -> dict:
    """The columns at `places` of one part, behind its first `skip` lines; `mark` divides fields."""
    text, quotes = None, ""
    if mark in ("::", " ") or read_head(file)[:2] in UTF16:
        text = read_text(file)
    if mark in ("::", " "):
        text = text if mark == "::" else re.sub(r"(?m)^[ \t]+|[ \t]+$", "", text)
        text, mark = re.sub("::" if mark == "::" else "[ \t]+", BETWEEN, text), BETWEEN
    elif not plain:
        with open_bytes(file) if text is None else io.BytesIO(text.encode()) as f:
            quotes = quoting(f, mark)
        if quotes == "stray" and mark == "\t":
            quotes = ""
        elif quotes == "stray":
            lines = re.split("\r\n|\r|\n", text or read_text(file))[skip:]
            text = "\n".join(mended(lines, mark, width, table))
            mark, quotes, skip = BETWEEN, "", 0

    def skipped(row) -> str:
        shown = row.text.replace(BETWEEN, table.delimiter)
        table.bad(f"{row.actual_columns} fields, not {row.expected_columns}: {shown}")
        return "skip"

    texts = pa.dictionary(pa.int32(), pa.string())
    kinds = [pa.int64(), pa.float64(), pa.timestamp("us"), texts]  # of times, whichever fits
    names = {at: name for name, at in places.items()}
    parse = pa.csv.ParseOptions(
        delimiter=mark,
        quote_char='"' if quotes else False,
        escape_char="\\" if quotes == "escaped" else False,
        newlines_in_values=bool(quotes),
        invalid_row_handler=skipped,
    )
    read = pa.csv.ReadOptions(
        column_names=[names.get(at, str(at)) for at in range(width)],
        skip_rows=skip,
        block_size=BLOCK,
    )
    known_bad = table.num_bad, table.first_bad
    while True:
        convert = pa.csv.ConvertOptions(
            column_types=dict.fromkeys(places, texts) | {"timestamp": kinds[0]},
            include_columns=[*places],
            null_values=sorted(ABSENT_TEXTS),
        )
        try:
            with open_bytes(file) if text is None else io.BytesIO(text.encode()) as f:
                return coded(pa.csv.read_csv(f, read, parse, convert), table.labels)
        except pa.ArrowInvalid as error:
            message = " ".join(str(error).split())
            table.num_bad, table.first_bad = known_bad
            if "Empty CSV file" in message:
                return {}
            if "UTF8" in message and text is None:
                text = read_text(file)
            elif "conversion error" in message and len(kinds) > 1:
                del kinds[0]
            else:
                raise ValueError(f"{file}: {message[:300]}") from None


def quoting(stream, mark: str) -> str:
    """How quotes stand in a table: "" for none, "doubled" inside quotes, "escaped" by a backslash,
    or "stray": some neither begin nor end a field."""
    edges = np.isin(np.arange(256), [*b'\r\n"', ord(mark)])
    sound, inside, seen, before = [True, True], [0, 0], False, b"\n\n"
    while before:
        block = stream.read(BLOCK).removeprefix(codecs.BOM_UTF8)
        chunk = before + (block or b"\n")
        before = block and chunk[-3:]
        if b'"' not in chunk:
            continue
        data = np.frombuffer(chunk, np.uint8)
        at = np.flatnonzero(data[2:-1] == ord('"')) + 2  # the others, in the block before or behind
        seen = seen or len(at) > 0
        for escaped in (0, 1):
            quotes = at
            if escaped:
                quotes = at[(data[at - 1] != ord("\\")) | (data[at - 2] == ord("\\"))]
            opens = (inside[escaped] + np.arange(len(quotes))) % 2 == 0
            sound[escaped] &= bool(edges[data[np.where(opens, quotes - 1, quotes + 1)]].all())
            inside[escaped] += len(quotes)
    styles = {
        "doubled": sound[0] and inside[0] % 2 == 0,
        "escaped": sound[1] and inside[1] % 2 == 0,
    }
    return next((name for name in styles if styles[name]), "stray") if seen else ""


def mended(lines: Iterable[str], mark: str, width: int, table: Table) -> Iterator[str]:
    """Lines of a table with stray quotes, each divided on its own: by the rules of quotes, or at
    every mark; where neither gives so many fields, or a quote is not closed, it is bad."""
    for line in lines:
        fields = line.split(mark)
        if '"' in line:
            try:
                fields = next(csv.reader([line], delimiter=mark, strict=True))
            except csv.Error:
                fields = fields if line.count('"') % 2 == 0 else []
        if len(fields) == width:
            yield BETWEEN.join(fields)
        elif line.strip():
            table.bad(f"a quote is not closed, or not {width} fields: {line}")


# --------------------------------------------------------------------------------------------- JSON
def json_parts(files: list[Path], kind: str, find, root, table: Table) -> Iterator[dict]:
    """Lines of JSON or of Python literals, and arrays of JSON."""
    heads, arrays = {}, {}
    for file in files:
        head = decode(read_head(file), file, quiet=True)
        if head.lstrip().startswith("["):
            try:
                records = json.loads(read_text(file))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}: not a JSON array of objects ({error})") from None
            arrays[file] = [r if isinstance(r, dict) else {} for r in records]
        records = arrays.get(file) or map(record_of, head.split("\n"))
        heads[file] = [*itertools.islice((r for r in records if r is not None), 1000)]
    records = [record for head in heads.values() for record in head]
    names = list(dict.fromkeys(name for record in records for name in record))
    if not names:
        start = next(filter(None, (decode(read_head(f), f, quiet=True) for f in files)), "")
        raise ValueError(f"{name_of(files)}: no line is a JSON object; line 1: {start[:80]!r}")
    if all(isinstance(value, dict) for record in records for value in record.values()):
        raise ValueError(
            f"{name_of(files)}: an object of columns, as pandas writes it; write one object a "
            'line: df.to_json("log.jsonl", orient="records", lines=True)'
        )
    table.labels = labels = find.by_name(names, name_of(files))
    for field_, name in labels.items():
        values = (record.get(name) for record in records)
        nested = next((value for value in values if isinstance(value, (dict, list))), None)
        if nested is not None:
            raise ValueError(
                f"{name_of(files)}: column {name} holds lists or objects, such as "
                f"{shorten(repr(nested), 80)}, and cannot be the {field_}; write one text"
            )
    for file, head in heads.items():
        found = None if file in arrays else arrow_json(file, head, labels)
        if found is not None:
            yield coded(found.rename_columns([*labels]), labels)
            continue
        rows = []
        for record in arrays.pop(file) if file in arrays else read_records(file, table):
            values = map(record.get, labels.values())
            rows.append([None if isinstance(v, (list, dict)) else v for v in values])
        yield dict(zip(labels, map(Column.of, zip(*rows))))


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
    read = pa.json.ReadOptions(block_size=BLOCK)
    parse = pa.json.ParseOptions(pa.schema(schema), unexpected_field_behavior="ignore")
    try:
        with open_bytes(file) as f:
            found = pa.json.read_json(f, read, parse)
            found.validate(full=True)  # it does not look whether texts are UTF-8
            return found
    except pa.ArrowInvalid:
        return None


def record_of(line: str) -> dict | None:
    """The object of a line, of JSON or a Python literal (which is never evaluated); None: bad."""
    for parse in (json.loads, ast.literal_eval) if line.lstrip().startswith("{") else ():
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            if isinstance(record := parse(line.strip()), dict):
                return record
    return None


def read_records(file: Path, table: Table) -> Iterator[dict]:
    """The record of every line; blank ones are no lines, others are bad."""
    for number, line in enumerate(read_lines(file), 1):
        if (record := record_of(line)) is not None:
            yield record
        elif line.strip():
            table.bad(f"line {number}: {line}")


# ------------------------------------------------------------------------------------------ Parquet
PARQUET = {"pre_buffer": False, "coerce_int96_timestamp_unit": "us"}


def parquet_parts(files: list[Path], kind: str, find, root: Path, table: Table) -> Iterator[dict]:
    """Files of Parquet; `key=value` in the names of their folders are columns, too (Hive)."""
    schemas, constants = {}, {}
    for file in files:
        with reading(file):
            schemas[file] = pq.ParquetFile(file, **PARQUET).schema_arrow
        folders = file.relative_to(root).parts[:-1] if root.is_dir() else ()
        pairs = [folder.partition("=") for folder in folders if "=" in folder]
        null = "__HIVE_DEFAULT_PARTITION__"
        constants[file] = {k: None if value == null else unquote(value) for k, _, value in pairs}
    names = [[*schemas[file].names, *constants[file]] for file in files]
    common = set.intersection(*map(set, names))
    table.labels = find.by_name([name for name in names[0] if name in common], root)
    for file, fixed in constants.items():
        stored = {f: name for f, name in table.labels.items() if name not in fixed}
        texts = [
            n for n in stored.values() if schemas[file].field(n).type in (pa.string(), pa.binary())
        ]
        with reading(file):
            found = pq.ParquetFile(file, read_dictionary=texts, **PARQUET).read([*stored.values()])
            found = found.select([*stored.values()]).rename_columns([*stored])
            columns = coded(found, table.labels)
        for name in table.labels.keys() - stored.keys():
            columns[name] = Column.of([fixed[table.labels[name]]] * found.num_rows)
        yield columns


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
