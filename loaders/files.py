"""Raw files: found in a folder, opened gzipped or not, read as lines, records or rows of a table.

The loaders of this room turn what is read here into one table (loaders/table.py), but for
movielens.py and parquet.py, which have readers of their own.

Files may be gzipped. They are read line by line, as UTF-8 with latin-1 for stray bytes. A line that
cannot be understood is counted and named; more than 1 % of them is an error. What is understood but
holds no usable interaction (no play time, no user name, a rating of 0, an item without title) is
left out and counted by reason. Python literals are parsed by a grammar of their own, with
`ast.literal_eval` for what it does not cover; nothing is ever evaluated."""

import ast
import codecs
import contextlib
import csv
import fnmatch
import gzip
import io
import itertools
import json
import os
import re
import tarfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from loaders.table import LineCount, LogBuilder, shorten

CHUNK = 1 << 13  # lines that are converted together


MAX_LINE = 1 << 20  # bytes; longer lines are passed over as bad ones


codecs.register_error(
    "latin-1", lambda error: (error.object[error.start : error.end].decode("latin-1"), error.end)
)


csv.field_size_limit(MAX_LINE)


def open_bytes(path: Path) -> io.BufferedReader:
    """A file's bytes, unpacked if it is gzipped; parts of one export as one file."""
    if isinstance(path, Parts):
        tables = not re.search(r"\.jsonl?\b", path.name.lower())
        return io.BufferedReader(_Joined(_joined_blocks(path.files, tables)), 1 << 20)
    try:
        with open(path, "rb") as f:
            gzipped = f.read(2) == b"\x1f\x8b"
        if gzipped:
            return io.BufferedReader(gzip.open(path), 1 << 20)
        return open(path, "rb", buffering=1 << 20)
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened ({error.strerror or error})") from None


def read_lines(path: Path, source=None) -> Iterator[str]:
    """Lines without their ends. ValueError if the file is damaged;
    a line above MAX_LINE comes cut off, with a NUL behind it."""
    with source or open_bytes(path) as f:
        try:
            start = f.peek(2)[:2]
            if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                yield from (
                    line.rstrip("\r\n") for line in io.TextIOWrapper(f, "utf-16", errors="replace")
                )
                return
            if b"\r" in (begin := f.peek(1)) and b"\n" not in begin:
                yield from _old_mac_lines(f)
                return
            if f.peek(3).startswith(codecs.BOM_UTF8):
                f.read(len(codecs.BOM_UTF8))
            for block in _whole_lines(f):
                text = block.decode("utf-8", "latin-1")
                lines = text.removesuffix("\n").split("\n")
                yield from (line.rstrip("\r") for line in lines) if "\r" in text else lines
        except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
            raise ValueError(
                f"{path}: the compressed file is damaged or cut off ({error}); fetch it again"
            ) from None


def _whole_lines(f: io.BufferedReader) -> Iterator[bytes]:
    """Blocks of bytes that end where a line does; at most MAX_LINE of a line is held."""
    while block := f.read(MAX_LINE):
        if block[-1:] != b"\n":
            block += f.readline(MAX_LINE)
        last = block.rfind(b"\n", 0, -1) + 1
        if len(block) - last > MAX_LINE:
            end, block = block[-1:], block[: last + 100] + b"\0\n"
            while end not in (b"\n", b""):
                end = f.readline(MAX_LINE)[-1:]
        yield block


def _old_mac_lines(f: io.BufferedReader) -> Iterator[str]:
    """Lines that end in a carriage return alone."""
    for line in io.TextIOWrapper(f, "utf-8-sig", errors="latin-1", newline="\r"):
        yield line.rstrip("\r\n")


def brief(names: list[str]) -> list[str]:
    """Column names for a message."""
    return [shorten(name, 100) for name in names[:50]]


SPLIT_NAMES = ("train", "valid", "val", "dev", "test")  # parts that a benchmark was cut into


class Parts(type(Path())):
    """The parts of one export, opened as one file; its name is a pattern of theirs."""

    files: tuple[Path, ...] = ()

    @classmethod
    def of(cls, files: list[Path]) -> "Parts":
        start = os.path.commonprefix([f.name for f in files])
        end = os.path.commonprefix([f.name[len(start) :][::-1] for f in files])[::-1]
        parts = cls(files[0].parent / f"{start}*{end}")
        parts.files = tuple(files)
        return parts


class _Joined(io.RawIOBase):
    """Blocks of bytes as a file."""

    def __init__(self, blocks: Iterator[bytes]):
        self.blocks, self.left = blocks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        while not self.left:
            self.left = next(self.blocks, None)
            if self.left is None:
                self.left = b""
                return 0
        count = min(len(target), len(self.left))
        target[:count] = self.left[:count]
        self.left = self.left[count:]
        return count


def _joined_blocks(files: tuple[Path, ...], headers: bool) -> Iterator[bytes]:
    """The bytes of the files, one after the other;
    the first line of the first is dropped where others repeat it."""
    header = None
    for file in files:
        with open_bytes(file) as f:
            line = last = f.readline(MAX_LINE)
            plain = line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")
            if header is None:
                yield line
                header = plain
            elif not headers or plain != header:
                yield line.removeprefix(codecs.BOM_UTF8)
            while block := f.read(1 << 20):
                yield block
                last = block
            if last and not last.endswith(b"\n"):
                yield b"\n"


def matching_files(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder by a pattern without case;
    what begins with a dot, as `._` of macOS, is none."""
    return sorted(
        f
        for f in Path(folder).iterdir()  # of Parts, too, the members are plain paths
        if fnmatch.fnmatch(f.name.lower(), pattern.lower())
        and not f.name.startswith(".")
        and f.is_file()
    )


def find_file(
    path, patterns: Iterable[str], what: str, without: str = "", joined: Sequence[str] = ()
) -> Path:
    """`path` itself if it is a file, else the one file in that folder that fits a pattern;
    earlier patterns win.

    Parts of one export, alike but for a number, are one file (Parts); so are those alike but for
    one of the words `joined`, in their order. Files that fit `without` are passed over."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; expected {what}")
    for pattern in patterns:
        found = matching_files(path, pattern)
        found = [f for f in found if not without or not fnmatch.fnmatch(f.name.lower(), without)]
        if len(found) > 1:
            found = [_as_parts(found, joined)]
        if found and found[0] is None:
            names = [f.name for f in matching_files(path, pattern)]
            raise ValueError(
                f"{path}: several files could be {what}: {names}; give one of them as --data_dir"
            )
        if found:
            return found[0]
    inside = [f.name for f in sorted(path.iterdir())][:8]
    raise ValueError(f"{path}: no {what} (looked for {', '.join(patterns)}; there are {inside})")


NUMBERED = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d+")  # a UUID, or a number


def _as_parts(files: list[Path], joined: Sequence[str]) -> Parts | None:
    """The files as parts of one; None if their names differ by more."""
    if len({NUMBERED.sub("#", f.name.lower()) for f in files}) == 1:
        return Parts.of(sorted(files, key=lambda f: natural_key(f.name)))
    words = [re.split(r"([^a-z]+)", f.name.lower()) for f in files]
    places = [next((w for w in joined if w in parts), None) for parts in words]
    rest = {
        tuple("#" if w == place else w for w in parts)
        for place, parts in zip(places, words, strict=True)
    }
    if None in places or len(set(places)) < len(files) or len(rest) > 1:
        return None
    order = sorted(range(len(files)), key=lambda n: joined.index(places[n]))
    return Parts.of([files[n] for n in order])


def natural_key(name: str) -> list:
    """A key by which part 10 comes after part 9."""
    return [int(text) if text.isdigit() else text for text in re.split(r"(\d+)", name)]


class Rows:
    """Collects (user, item, amount, time) line by line and hands them to a builder in chunks."""

    def __init__(self, builder: LogBuilder):
        self.builder, self.numbers, self.rows = builder, [], []

    def add(self, number: int, *row) -> None:
        self.numbers.append(number)
        self.rows.append(row)
        if len(self.rows) == CHUNK:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            self.builder.add(self.numbers, *zip(*self.rows, strict=True))
        self.numbers, self.rows = [], []


# ------------------------------------------------------------------------------------------ records


_TEXT = r"""u?(?:'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")"""


_PLAIN = r"-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|True|False|None"


_FLAT_DICT = rf"\{{(?:[^{{}}'\"u]|u(?!['\"])|{_TEXT})*\}}"


_FLAT_LIST = rf"\[(?:[^\[\]'\"u]|u(?!['\"])|{_TEXT})*\]"


_PAIR = re.compile(rf"({_TEXT}): ({_TEXT}|{_PLAIN}|{_FLAT_DICT}|{_FLAT_LIST})(, |\}}\s*$)")


def literal_record(line: str, wanted: Iterable[str]) -> dict:
    """The wanted keys of a line that is a Python dict literal; ValueError if it is not.

    Its pairs are walked by one regular expression; only a value with escapes, and a line that the
    expression does not cover from end to end, goes through `ast.literal_eval`, which takes ten
    times as long."""
    found, at, end = {}, 1, ""
    if line.startswith("{"):
        while match := _PAIR.match(line, at):
            key, value, end = match.groups()
            at = match.end()
            key = key.lstrip("u")[1:-1]
            if key in wanted:
                found[key] = value
    if end[:1] != "}":
        record = _literal(line)
        if not isinstance(record, dict):
            raise ValueError("not a dict")
        return {key: record[key] for key in wanted if key in record}
    return {key: _value(text) for key, text in found.items()}


def _value(text: str):
    """What the text of one value means; the usual cases without building a syntax tree."""
    if text[-1] in "'\"" and "\\" not in text:
        return text.lstrip("u")[1:-1]
    if text[-1].isdigit():
        if "." in text or "e" in text or "E" in text:
            return float(text)
        return int(text)
    return _literal(text)


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from None


def json_record(line: str, wanted: Iterable[str] = ()) -> dict:
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return record


def read_records(path: Path, parse, wanted: Iterable[str], bad) -> Iterator[tuple[int, dict]]:
    """(line number, record) of every line; blank ones are no lines, others go to bad(number, line).

    JSON that begins with [ is one array, and the numbers are those of its elements."""
    wanted = frozenset(wanted)
    if parse is json_record and first_character(path) == "[":
        yield from array_records(path, bad)
        return
    for number, line in enumerate(read_lines(path), 1):
        if not line or line.isspace():
            continue
        try:
            record = parse(line, wanted)
        except ValueError:
            bad(number, line)
            continue
        yield number, record


@contextlib.contextmanager
def unpacking(path: Path):
    """Reading of compressed bytes; whatever is wrong with them is one ValueError."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise ValueError(
            f"{path}: the compressed file is damaged or cut off ({error}); fetch it again"
        ) from None


def first_character(path: Path) -> str:
    """The first one that is no blank, within the first 4 KiB."""
    with open_bytes(path) as f, unpacking(path):
        return f.read(1 << 12).decode("utf-8-sig", "ignore").lstrip()[:1]


def array_records(path: Path, bad) -> Iterator[tuple[int, dict]]:
    """(number, record) of the elements of a JSON array, which is never held whole;
    others go to bad(number, text)."""
    decode = codecs.getincrementaldecoder("utf-8-sig")("latin-1").decode
    parse, text, number, opened = json.JSONDecoder().raw_decode, "", 0, False
    with open_bytes(path) as f, unpacking(path):
        blocks = itertools.chain(iter(lambda: f.read(1 << 20), b""), [b""])
        for block in blocks:
            text, at = text + decode(block, final=not block), 0
            while True:
                start = _BETWEEN.match(text, at).end()
                if text[start : start + 1] == "]":
                    if text[start + 1 :].strip() or f.read(1 << 20).strip():
                        raise ValueError(f"{path}: something follows the array")
                    return
                if start == len(text):
                    break
                if not opened:
                    opened, at = True, start + 1
                    continue
                try:
                    record, end = parse(text, start)
                except (ValueError, RecursionError):
                    if block and len(text) - start < MAX_LINE:
                        break  # it may go on in the next block
                    raise ValueError(
                        f"{path}: element {number + 1:,} of the array is not valid JSON: "
                        f"{text[start : start + 60]!r}"
                    ) from None
                if block and end == len(text):
                    break  # so may a number
                number, at = number + 1, end
                if isinstance(record, dict):
                    yield number, record
                else:
                    bad(number, json.dumps(record)[:80])
            text = text[at:]
    raise ValueError(f"{path}: the array ends in its middle, after element {number:,}")


_BETWEEN = re.compile(r"[\s,]*")  # the elements of an array


# ------------------------------------------------------------------------------------------- tables


def read_table(path: Path, delimiter: str = "") -> Iterator[list[str]]:
    """Rows of a CSV file, its delimiter taken from the first line;
    with one given, of a plain table: quotes are characters."""
    return open_rows(path, delimiter)[1]


def open_rows(path: Path, delimiter: str = "") -> tuple[str, Iterator[list[str]]]:
    """The delimiter of a table, and its rows. ValueError if it is no text."""
    lines = read_lines(path)
    first = next((line for line in lines if line.strip()), "")
    if first.startswith("PK\x03\x04"):
        raise ValueError(f"{path}: a zip or Excel file; save the table as CSV")
    if "\0" in first:
        raise ValueError(f"{path}: not text in UTF-8, or in UTF-16 with a byte-order mark")
    if re.fullmatch(r"sep=.", first, re.IGNORECASE):  # Excel's way to name the delimiter
        delimiter, first = first[-1], next(lines, "")
        return delimiter, CsvRows(itertools.chain([first], lines), delimiter)
    lines = itertools.chain([first], lines)
    if delimiter:
        return delimiter, (line.split(delimiter) for line in lines)
    delimiter = find_delimiter(first)
    if delimiter == " ":
        return delimiter, (line.split() for line in lines)
    if delimiter == "::":
        return delimiter, (line.split(delimiter) for line in lines)
    return delimiter, CsvRows(lines, delimiter)


def find_delimiter(line: str) -> str:
    """What divides the fields of a table's first line."""
    bare = re.sub(r'"[^"]*"', "", line)
    counts = {d: bare.count(d) for d in (",", ";", "\t", "|", "\x01")}  # \x01: Hive
    best = max(counts, key=counts.get)
    if counts[best]:
        return best
    return next((d for d in ("::", " ") if d in bare.strip()), ",")


class _Lines:
    """Lines with their ends, and a way back to the beginning of the record in hand."""

    def __init__(self, lines: Iterable[str]):
        self.lines, self.again, self.taken = iter(lines), deque(), []
        self.read = 0  # lines, not counting those read again

    def __iter__(self) -> Iterator[str]:
        again, taken, lines = self.again, self.taken, self.lines
        while True:
            if again:
                line = again.popleft()
            else:
                line = next(lines, None)
                if line is None:
                    return
                self.read += 1
            taken.append(line)
            yield f"{line}\n"

    def rewind(self) -> None:
        self.again.extendleft(reversed(self.taken))
        self.taken.clear()


class CsvRows:
    """Records as Python's csv module reads them, line breaks inside quotes included, however many;
    one by one, or the columns of lines together where these hold no quote."""

    def __init__(self, lines: Iterable[str], delimiter: str, block: int = CHUNK):
        self.lines, self.delimiter, self.block = iter(lines), delimiter, block
        self.waiting: Iterator[list[str]] = iter(())  # records that were read and not yet given
        self.width = 0  # fields of the first sound record

    def __iter__(self) -> "CsvRows":
        return self

    def __next__(self) -> list[str]:
        while (row := next(self.waiting, None)) is None:
            if not (together := self._next_lines()):
                raise StopIteration
            self._read(together)
        return row

    def _next_lines(self) -> list[str]:
        return list(itertools.islice(self.lines, self.block))

    def _read(self, together: list[str]) -> None:
        """Their records wait, where quotes ask for it with the lines behind them."""
        if not _plain(together):
            self.waiting = self._quoted_rows(together)
            return
        self.waiting = csv.reader(together, delimiter=self.delimiter, strict=True)
        widths = (line.count(self.delimiter) + 1 for line in together if line)
        self.width = self.width or next(widths, 0)

    def _quoted_rows(self, together: list[str]) -> Iterator[list[str]]:
        """Records that begin in these lines; the last may go on in those behind.

        A record that is none by the strict rules, or whose number of fields is not the first
        one's, is read again on its own: a stray quote must not swallow the rows behind it, and
        some write quotes inside quotes with a backslash."""
        source = _Lines(itertools.chain(together, self.lines))
        taken = source.taken
        while source.read < len(together) or source.again:
            try:
                for row in csv.reader(source, delimiter=self.delimiter, strict=True):
                    other = self.width and row and len(row) != self.width
                    if other and (len(taken) > 1 or '\\"' in taken[0]):
                        raise csv.Error
                    yield row
                    self.width = self.width or len(row)
                    taken.clear()
                    if source.read >= len(together) and not source.again:
                        return
            except csv.Error:
                yield from _recovered(source, self.delimiter, self.width)

    def columns_or_rows(self, width: int) -> tuple[list[list[str]], list[list[str]]]:
        """Columns of the next lines, if they are plain and have `width` fields each; or the rows
        that come next. One of the two is empty, at the end both are."""
        if rows := list(self.waiting):
            return [], rows
        together = self._next_lines()
        counts = {line.count(self.delimiter) for line in together}
        if width > 1 and counts == {width - 1} and _plain(together):
            self.width = self.width or width
            fields = self.delimiter.join(together).split(self.delimiter)
            return [fields[at::width] for at in range(width)], []
        if together:
            self._read(together)
        return [], list(self.waiting)


def put_back(first: list[list[str]], rows: Iterator[list[str]]) -> Iterator[list[str]]:
    """The first rows and the others."""
    if not isinstance(rows, CsvRows):
        return itertools.chain(first, rows)
    rows.waiting = itertools.chain(first, rows.waiting)
    return rows


def _plain(lines: list[str]) -> bool:
    """Whether a delimiter is all that can be special in them."""
    text = "".join(lines)
    return not any(sign in text for sign in '"\r\n\0') and max(map(len, lines)) <= MAX_LINE


def _recovered(source: _Lines, delimiter: str, width: int) -> Iterator[list[str]]:
    """The record that begins here, read with backslash escapes or as one line; or a bad row.
    `width` 0 allows any."""
    if any('\\"' in line for line in source.taken):
        source.rewind()
        row = _one_record(map(_plain_escapes, source), delimiter, strict=True)
        if row and len(row) == (width or len(row)):
            source.taken.clear()
            yield row
            return
    source.rewind()
    line = next(iter(source)).rstrip("\n")
    source.taken.clear()
    if "\r" in line:  # a carriage return outside quotes ends a line
        source.again.extendleft(reversed(line.split("\r")))
        return
    row = _one_record([line], delimiter, strict=False)
    if row and len(row) == (width or len(row)) and line.count('"') % 2 == 0:
        yield row
    else:
        yield [f"a quote is not closed: {line}"]


def _plain_escapes(line: str) -> str:
    return re.sub(r'\\(["\\])', lambda match: '""' if match[1] == '"' else match[1], line)


def _one_record(lines: Iterable[str], delimiter: str, strict: bool) -> list[str]:
    """The first record of these lines; [] if they hold none."""
    try:
        return next(csv.reader(lines, delimiter=delimiter, strict=strict), [])
    except csv.Error:
        return []


def read_titles(file: Path, parse, key: str, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(item id, title) of a file of items; the first of `names` that holds a text is the title,
    "" if none does."""
    count = LineCount(file, f"records with {key}, {names[0]}")
    for _, record in read_records(file, parse, (key, *names), count.bad):
        count.lines += 1
        item = record.get(key)
        if isinstance(item, (str, int)):  # two lines of Steam's games have no id
            texts = (record[n] for n in names if isinstance(record.get(n), str))
            yield str(item), next((text for text in texts if text.strip()), "")
    count.check()


# line numbers, values by field, bad lines
Chunk = tuple[Sequence[int], dict[str, Sequence], list[tuple[int, str]]]


def table_chunks(
    rows: Iterator[list[str]], positions: dict[str, int], width: int, first_line: int
) -> Iterator[Chunk]:
    """The columns at `positions` of a table's rows, CHUNK rows at a time;
    rows of another width are bad."""
    while True:
        if isinstance(rows, CsvRows):
            columns, chunk = rows.columns_or_rows(width)
        else:
            columns, chunk = [], list(itertools.islice(rows, CHUNK))
        count = len(columns[0]) if columns else len(chunk)
        if not count:
            return
        numbers, bad = range(first_line, first_line + count), []
        first_line += count
        if chunk and set(map(len, chunk)) != {width}:
            pairs = list(zip(numbers, chunk, strict=True))
            bad = [
                (number, f"{len(row)} fields, not {width}: {','.join(row)}")
                for number, row in pairs
                if len(row) != width and row not in ([], [""])
            ]
            pairs = [(number, row) for number, row in pairs if len(row) == width]
            numbers = [number for number, _ in pairs]
            chunk = [row for _, row in pairs]
        columns = columns or list(zip(*chunk, strict=True))
        values = {field: columns[at] for field, at in positions.items()} if columns else {}
        yield numbers, values, bad
