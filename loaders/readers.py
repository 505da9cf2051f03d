"""Files as one table: CSV and its relatives, JSON, Python literals, Parquet.

They are found, unpacked (gzip, bzip2, zstd) and decoded (UTF-8, or Windows-1252 with a note). Arrow
reads them on all cores. Python reads, a line at a time, what Arrow cannot: JSON with a bad line,
arrays, columns of several types, literals."""

import ast
import contextlib
import csv
import fnmatch
import io
import itertools
import json
import mmap
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as ds
import pyarrow.json

from common import print0
from loaders.values import Column, as_texts, coded, parsed_times

PARTS = ("train", "valid", "val", "dev", "test")  # parts that a benchmark was cut into
PART = rf"(?<![a-z])({'|'.join(PARTS)})(?![a-z])"  # what differs between parts: such a word,
PART += r"|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d+"  # a UUID or a number
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}  # by first bytes
PACKED |= {b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}  # are refused
STRAY = re.compile("[\udc80-\udcff]+")  # bytes that are not UTF-8, by surrogateescape
WESTERN = {0xDC00 + b: bytes([b]).decode("cp1252", "replace") for b in range(128, 256)}
BLOCK = 1 << 25  # bytes that Arrow reads at a time; each block has a dictionary of its own
BETWEEN = "\x1f"  # stands for "::", as Arrow's fields are divided by one character
CODED = pa.dictionary(pa.int32(), pa.string())
DAMAGE = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)  # of a line
csv.field_size_limit(1 << 30)


# ------------------------------------------------------------------------------------------- files
def visible_files(folder: Path, pattern: str = "*", below: bool = False) -> list[Path]:
    """The files of a folder that match a pattern in any case; hidden files are skipped, and part 10
    comes after part 9. `below`: files in subfolders, too."""
    found = []
    for file in folder.rglob("*") if below else folder.iterdir():
        hidden = any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
        if not hidden and fnmatch.fnmatch(file.name.lower(), pattern.lower()) and file.is_file():
            found.append(file)
    return sorted(found, key=lambda file: re.sub(r"\d+", lambda n: n[0].zfill(20), str(file)))


def find_files(path, patterns: Iterable, what: str, without=(), below=False) -> list[Path]:
    """`path` itself if it is a file, else its files that match a pattern; earlier patterns win.

    Several files must be parts of one export: alike but for numbers and words such as train and
    test, which come in that order. Names that begin with `without` are passed over."""
    path = Path(path)
    if path.is_file():
        return [path]
    for pattern in patterns if path.is_dir() else ():
        found = [f for f in visible_files(path, pattern, below) if not f.name.startswith(without)]
        words = {f: re.split("[^a-z]+", f.name.lower()) for f in found}
        if len({re.sub(PART, "#", f.name.lower()) for f in found}) > 1:
            names = f"{[f.name for f in found[:20]]}; give one of them as --data_dir"
            raise ValueError(f"{path}: several files could be the {what}: {names}")
        if found:
            return sorted(found, key=lambda f: [PARTS.index(w) for w in words[f] if w in PARTS])
    inside = [f.name for f in sorted(path.iterdir())][:8] if path.is_dir() else "no such path"
    raise ValueError(f"{path}: no {what} (looked for {', '.join(patterns)}; found {inside})")


def name_of(files: list[Path]) -> str:
    """The file, or a pattern of the parts, for messages."""
    return str(files[0] if len(files) == 1 else files[0].parent / f"*{files[0].suffix}")


def file_stamps(files: Iterable[Path]) -> list:
    """Names, sizes and times of files: if one changes, examples are prepared again."""
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


@contextlib.contextmanager
def open_bytes(file: Path) -> Iterator:
    """A file's bytes, unpacked; ValueError names the file where they are damaged."""
    try:
        with open(file, "rb") as plain:
            codec = next((PACKED[p] for p in PACKED if plain.peek(6).startswith(p)), None)
            if codec in ("xz", "zip"):
                raise ValueError(f"{file}: {codec}, or a spreadsheet; unpack it, give it as CSV")
            yield pa.input_stream(plain, compression=codec) if codec else plain
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: cannot be read ({error}); if cut off, fetch it again") from None


def read_head(file: Path, size: int = 1 << 16) -> str:
    """The beginning of a file's text."""
    with open_bytes(file) as f:
        return f.read(size).decode("utf-8", "replace").lstrip("\ufeff \t\r\n")


def decode(content: bytes, file: Path) -> str:
    """Text of UTF-8, or of Windows-1252 with a note; else a ValueError."""
    text = content.decode("utf-8-sig", "surrogateescape")
    stray, has_nul = STRAY.findall(text), "\0" in text[:1000]
    if stray or has_nul:
        first, count = re.search("[\0\udc80-\udcff]", text).start(), len("".join(stray))
        text = text.translate(WESTERN)
        example = text[max(0, first - 20) : first + 20].strip()
        if has_nul or count - len(stray) > count / 4:  # western letters stand alone
            raise ValueError(f"{file}: not UTF-8 (near {example!r}); save it as UTF-8, as by iconv")
        what = f"{count:,} bytes are not UTF-8; read as Windows-1252, such as {example!r}"
        print0(f"note: {file.name}: {what}. If that is wrong, save it as UTF-8")
    return text


def read_lines(file: Path) -> Iterator[str]:
    """Lines without their ends; the text is held as a whole only if it is not UTF-8."""
    number = 0
    try:
        with open_bytes(file) as f, io.TextIOWrapper(f, "utf-8-sig", newline="\n") as lines:
            for line in lines:
                number += 1
                yield line.rstrip("\r\n")
    except UnicodeDecodeError:
        with open_bytes(file) as f:
            text = decode(f.read(), file)
        yield from (line.rstrip("\r") for line in text.split("\n")[number:])


# ------------------------------------------------------------------------------------------- table
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
        self.first_bad = [*self.first_bad, f"{line:.200}"][:5]


def check_bad(table: Table, source) -> Table:
    """The table; ValueError if more than 1 % of its rows are bad."""
    total = table.num_rows + table.num_bad
    if table.num_bad > total / 100:  # the file is not what it was taken for
        count = f"{table.num_bad:,} of {total:,} rows cannot be used (1% may be)"
        raise ValueError(f"{source}: {count}: {'; '.join(table.first_bad)}")
    return table


def read_table(files: list[Path], find, plain: bool = False) -> Table:
    """The parts of one export as one table; a file's beginning shows what it is.

    `find` (ownlog.Finder) says which column holds which field. `plain`: between tabs, quotes are
    characters like others."""
    table, parts = Table(), []
    for file in files:
        head = read_head(file)
        if head.startswith("PAR1"):
            parts.append(read_parquet(file, find))
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
        except (pa.ArrowException, UnicodeDecodeError) as error:
            what = f"column {label}: {error}; it must be text or numbers, alike in all files"
            raise ValueError(f"{name_of(files)}: {what}") from None
    del parts, column
    pa.default_memory_pool().release_unused()  # a third of a large log's memory
    return check_bad(table, name_of(files))


# ---------------------------------------------------------------------------------------------- CSV
def read_csv(file: Path, find, table: Table, plain: bool) -> pa.Table:
    """The fields of a CSV file; its first line shows which column holds which field."""
    with open_bytes(file) as f:  # mapped, if it is not packed: no copy in memory
        mapped = isinstance(f, io.BufferedReader)
        content = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if mapped else f.read()
    if np.frombuffer(content, np.int8).min() <= 0:  # NUL, or no ASCII
        content = decode(content[:], file).encode()
    if content[:1] in (b"\r", b"\n"):
        content = content[:].lstrip(b"\r\n")
    lines = [s.decode(errors="replace") for s in re.split(b"[\r\n]+", content[: 1 << 20])[:2]]
    bare = re.sub('"[^"]*"', "", lines[0])
    mark = max(",;\t|", key=bare.count)
    if "::" in bare:
        mark, content = BETWEEN, content[:].replace(b"::", BETWEEN.encode())
        lines = [line.replace("::", BETWEEN) for line in lines]
    plain = mark == BETWEEN or (plain and mark == "\t")
    quotes = "" if plain else quote_style(content, mark, file)
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    first, *below = csv.reader(lines, delimiter=mark, quoting=quoting)
    if len(first) == 1:
        what = f"its first line, {lines[0]!r:.80}, is one field, not a row per interaction such as"
        form = "user,item,rating,timestamp (, ; tab | or :: between them)"
        raise ValueError(f"{file}: {what} {form}; Netflix: write the movie's number into each row")
    first = [re.sub(":(token|float)(_seq)?$", "", name.strip()) for name in first]  # RecBole's
    names, named = find.header(first, below[0] if below else [])
    labels = find.by_name(names, file)
    table.first_row = 1 + named

    def skipped(row) -> str:
        shown = row.text.replace(BETWEEN, "::")
        table.bad(f"{row.actual_columns} fields, not {row.expected_columns}: {shown}")
        return "skip"

    kinds = {n: pa.string() if key == "timestamp" else CODED for key, n in labels.items()}
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
        raise ValueError(f"{file}: {error!s:.200}") from None


def quote_style(content: bytes, mark: str, file) -> str:
    """How quotes stand inside quotes, "doubled" or "escaped" by a backslash; "" where there are
    none, or some that neither begin nor end a field: then all are characters, which is noted."""
    if content.find(b'"') < 0:
        return ""
    if content[-1:] != b"\n":  # it also stands in front of the first byte
        content = content[:] + b"\n"
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
            shown = f"a list or an object, {nested[0]!r:.80}: write a text"
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
def read_parquet(file: Path, find) -> pa.Table:
    """The fields of one file; `key=value` in the names of its folders are columns, too (Hive)."""
    try:
        schema = ds.dataset(str(file), partitioning="hive").schema
        labels = [*find.by_name(schema.names, file).values()]
        form = ds.ParquetFileFormat(dictionary_columns=labels, coerce_int96_timestamp_unit="us")
        parquet = ds.dataset(str(file), format=form, partitioning="hive")
        return parquet.to_table(labels, batch_size=1 << 20)
    except (pa.ArrowException, OSError, MemoryError, OverflowError) as error:
        raise ValueError(f"{file}: cannot be read as Parquet ({error!s:.200})") from None
