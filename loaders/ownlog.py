"""Your own interaction log: CSV, JSON lines, RecBole's atomic files, or Parquet,
with the columns under any names and in any order.

    python train.py --dataset csv --data_dir log.csv \\
        --columns user=uid,item=sku,rating=stars,timestamp=when,title=name
    python train.py --dataset csv --data_dir u.data --columns user=1,item=2,rating=3,timestamp=4 \\
        --item_file u.item --item_columns item=1,title=2
    python train.py --dataset csv --data_dir likes.csv --scale binary

Users and items are any ids. Ratings are above 0 and up to 5; --scale 0,100 maps another scale
linearly to 1 to 5, and --scale binary likes and dislikes; hours, plays or prices become ratings by
rank with --percentile. Without a rating column the number of repeats is taken; without a timestamp
column, the order of the file; without titles, the ids. Times are seconds (or milli-, micro-,
nanoseconds) or dates with the year first. --item_file names a second file with item and title.
Columns without --columns are looked up under their usual names; numbers are positions, counted from
1, with a header line or without.

What is empty, NULL, NA or the like is absent: such rows are left out and counted, such titles are
none. Left out: dates with the day or the month first, which nobody can tell apart. """

import itertools
import operator
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import print0
from data import Interactions
from loaders import parquet
from loaders.files import (
    CHUNK,
    SPLIT_NAMES,
    Chunk,
    brief,
    find_file,
    json_record,
    matching_files,
    open_rows,
    put_back,
    read_lines,
    read_records,
    table_chunks,
)
from loaders.table import FIELDS as ROW_FIELDS
from loaders.table import Codes, LineCount, LogBuilder, clean_title, shorten
from loaders.values import (
    ABSENT,
    ABSENT_IDS,
    ABSENT_TITLES,
    TIME_ADVICE,
    NumberStyle,
    Ratings,
    read_times,
)

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
        "parentasin",
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


def parse_columns(
    text: str, option: str = "--columns", allowed: tuple[str, ...] = FIELDS
) -> dict[str, str]:
    """ "user=uid,item=sku" -> {"user": "uid", "item": "sku"};
    ValueError names what is not understood."""
    columns = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        field, equals, name = part.partition("=")
        if not equals or field.strip() not in allowed or not name.strip():
            raise ValueError(
                f"{option}: {part!r} is not one of {', '.join(f'{f}=NAME' for f in allowed)}"
            )
        if name.strip() in columns.values():
            raise ValueError(f"{option}: {name.strip()} is named twice")
        columns[field.strip()] = name.strip()
    return columns


def parse_item_columns(text: str) -> dict[str, str]:
    return parse_columns(text, "--item_columns", ("item", "title"))


def load_own_log(
    path,
    kind: str,
    columns: str = "",
    item_file: str = "",
    percentile: str = "",
    repeats: str = "last",
    scale: str = "",
    item_columns: str = "",
) -> Interactions:
    """`kind` csv, jsonl, recbole or parquet; `columns` as in parse_columns; `repeats` of a pair:
    last, or sum of the amounts; `scale` as in parse_scale."""
    file = find_own_file(path, kind)
    if kind == "recbole" and not item_file:
        item_file = beside(file, "*.item*")
    given = parse_columns(columns)
    wanted = tuple(field for field in FIELDS if field != "title" or not item_file)
    table = open_table(
        file, kind, {f: n for f, n in given.items() if f in wanted}, ("user", "item"), wanted
    )
    print0(f"{file}: columns {', '.join(f'{f}={name}' for f, name in table.fields.items())}")
    notes: list[str] = []
    percentile, repeats = choose_rating(file, table.fields, percentile, repeats, scale, notes)

    ratings = Ratings(scale, bool(percentile), NumberStyle(table.delimiter))
    builder = OwnLogBuilder(file, table.fields, repeats, ratings)
    titles = read_log(table, builder)
    builder.check_ratings()
    if item_file:
        names = read_item_file(
            Path(item_file), kind, given, parse_item_columns(item_columns), builder, notes
        )
    else:
        titles.judge(file, "title" in given, table.fields.get("title", ""), "--columns", notes)
        names = {builder.items.ids[code]: title for code, title in titles.smallest.items()}
    interactions = builder.finish(show_ids(names, builder.items.ids, notes), kind, percentile)
    if "rating" not in table.fields and len(set(interactions.rating[:100_000].tolist())) == 1:
        notes.append(
            "nobody chose an item twice, so all ratings are 3 and none is liked: --min_rating 3"
        )
    for note in (*notes, *builder.remarks(interactions)):
        print0(f"note: {note}")
    return interactions


PATTERNS = {  # of the files in a folder, and what they are called
    "csv": (("*.csv*", "*.tsv*", "*.txt*"), "a CSV file"),
    "jsonl": (("*.jsonl*", "*.json*"), "a file of JSON lines"),
    "recbole": (("*.inter*",), "a .inter file"),
}


def find_own_file(path, kind: str) -> Path:
    if kind == "parquet":
        return Path(path)  # a folder is read whole
    return find_file(path, *PATTERNS[kind], joined=SPLIT_NAMES if kind == "recbole" else ())


def choose_rating(
    file: Path, fields: dict[str, str], percentile: str, repeats: str, scale: str, notes: list[str]
) -> tuple[str, str]:
    """--percentile and --repeats as the columns ask for them:
    without ratings, and with amounts instead, ranks are ratings."""
    if "rating" not in fields:
        if scale:
            raise ValueError(
                f"{file}: --scale {scale}, but there is no rating column; "
                "name it with --columns rating=NAME"
            )
        notes.append(
            "no rating column; how often a user chose an item became its rating, "
            "by rank (--percentile)"
        )
        percentile, repeats = percentile or "item", "sum"
    elif plain_name(fields["rating"]) in AMOUNTS and not percentile and not scale:
        percentile = "item"
        notes.append(
            f"{fields['rating']} are amounts: ranked among those of the same item "
            "they become ratings (--percentile)"
        )
    elif repeats == "sum" and not percentile:
        raise ValueError(
            f"{file}: --repeats sum adds amounts up, and {fields['rating']} are ratings; "
            "leave it out, or rank the sums with --percentile item"
        )
    if "timestamp" not in fields:
        notes.append("no timestamp column; the order of the file is taken as the order in time")
    return percentile, repeats


# --------------------------------------------------------------------------------------------- rows
MEANING = {
    "rating": "rating (a number)",
    "timestamp": "timestamp (seconds, or an ISO date like 2024-12-31)",
}


class OwnLogBuilder(LogBuilder):
    """A log whose values may be absent, and whose bad values are told by column."""

    def __init__(self, file: Path, fields: dict[str, str], repeats: str, ratings: Ratings):
        expected = f"rows with {', '.join(MEANING.get(f, f) for f in fields)}"
        super().__init__(file, expected, repeats, amounts=ratings.amounts)
        self.fields, self.ratings = fields, ratings
        self.users, self.items = (Codes((*ABSENT_IDS, None)) for _ in range(2))
        bad, nan = np.int32(-1), np.float32("nan")
        self.converters = (
            (self.users.encode, bad),
            (self.items.encode, bad),
            (ratings, nan),
            (read_times, np.nan),
        )
        self.wrong: Counter[str] = Counter()  # field -> values that are not what they should be
        self.examples: dict[str, list[str]] = {}

    def none(self, columns: tuple[np.ndarray, ...], good: np.ndarray) -> np.ndarray:
        none = np.zeros(len(good), bool)
        for name, column in zip(ROW_FIELDS, columns, strict=True):
            absent = column == (Codes.ABSENT if column.dtype.kind == "i" else ABSENT)
            if absent.any():
                self.notes[f"lines without {name}"] += int((absent & ~none).sum())
                none |= absent
        return none

    def bad_row(self, number: int, values: dict) -> None:
        for name, value in values.items():
            self.wrong[name] += 1
            examples = self.examples.setdefault(name, [])
            if len(examples) < 2 and repr(value) not in examples:
                examples.append(repr(value))
        super().bad_row(number, values)

    def bad(self, number: int, why: str) -> None:
        self.wrong["line"] += 1
        super().bad(number, why)

    def cause(self) -> str:
        name, count = self.wrong.most_common(1)[0]
        if name == "line":
            return f"{count:,} of them are not {self.expected}"
        field = {"time": "timestamp"}.get(name, name)
        column = self.fields.get(field, field)
        where = f"column {column}: {count:,} of {self.lines:,} values"
        such = f", such as {' and '.join(shorten(e) for e in self.examples[name])}"
        if name == "time":
            return f"{where} are no times whose order is known{such}; {TIME_ADVICE}"
        if name == "rating":
            return self._cause_of_ratings(where, such)
        return f"{where} are no {name} ids{such}"

    def _cause_of_ratings(self, where: str, such: str) -> str:
        if doubt := self.ratings.doubt(self.ratings.seen):
            return f"{where} cannot be ratings{such}: {doubt}"
        if any("," in example for example in self.examples["rating"]):
            return (
                f"{where} have commas that are neither decimal nor thousands alone{such}; write 3.5"
            )
        return f"{where} are no numbers{such}; write the number alone, such as 3.5"

    def check_ratings(self) -> None:
        """ValueError where lines are bad, or ratings are not those of a scale from 1 to 5."""
        self.check()
        ratings = self.ratings
        if marks := [f"{mark} {count:,} times" for mark, count in ratings.marks.items() if count]:
            count = self.notes.pop("lines without rating", 0)
            self.notes[f"lines without rating ({', '.join(marks)})"] = count
        if ratings.scale:
            low, high = ratings.scale
            self.notes[f"ratings of {low:g} to {high:g} mapped to 1 to 5 (--scale)"] = (
                ratings.mapped
            )
        elif "rating" in self.fields and (doubt := ratings.doubt(ratings.kept)):
            raise ValueError(f"{self.source}: column {self.fields['rating']}: {doubt}")

    def remarks(self, interactions: Interactions) -> Iterator[str]:
        """What a user should know about a log that was read."""
        for mark, count in self.ratings.marks.items():
            zero = f"; if 0 is a rating: --scale 0,{self.ratings.highest:g}" if mark == "0" else ""
            if count:
                yield f"{count:,} ratings of {mark} count as none{zero}"
        for field, ids in (("user", self.users.ids), ("item", self.items.ids)):
            rounded = [i for i in ids if "E+" in i and ROUNDED.fullmatch(i)]
            if rounded:
                yield (
                    f"{len(rounded):,} {field} ids look rounded by a spreadsheet, such as "
                    f"{' and '.join(rounded[:2])}: different {field}s may have become one"
                )
        if (
            "timestamp" in self.fields
            and len(interactions.user) > 1
            and np.ptp(interactions.timestamp) == 0
        ):
            yield (
                f"all times are {int(interactions.timestamp[0])}: were they rounded by a "
                "spreadsheet "
                "(1.5E+12)? The order of the file is taken as the order in time"
            )


ROUNDED = re.compile(r"\d([.,]\d+)?E\+\d+")  # 9.78014E+12


# ------------------------------------------------------------------------------------------- titles
SEVERAL_SHARE = 0.2  # of the items with more than one title: then a column holds something else


class Titles:
    """The title of each item by any key: of several the smallest,
    for the order of the lines is nothing."""

    def __init__(self):
        self.smallest: dict = {}
        self.several: dict = {}  # key -> two of its titles

    def add(self, keys: Sequence, titles: Sequence) -> None:
        """The titles (n,) of n keys, row by row."""
        smallest = self.smallest
        new = map(operator.ne, map(smallest.get, keys), titles)  # few are
        for key, title in list(itertools.compress(zip(keys, titles, strict=True), new)):
            text = "" if title is None else str(title)
            if text.strip() in ABSENT_TITLES:
                continue
            before = smallest.setdefault(key, text)
            if before != text:
                self.several.setdefault(key, (before, text))
                smallest[key] = min(before, text)

    def judge(self, file: Path, named: bool, column: str, option: str, notes: list[str]) -> None:
        """Say where the titles are hardly the items';
        ValueError if nobody named the column and it looks like another thing."""
        several, count = self.several, len(self.smallest)
        if several:
            pairs = [f"{a!r} and {b!r}" for a, b in itertools.islice(several.values(), 2)]
            what = (
                f"{len(several):,} of {count:,} items have more than one title in column {column}, "
                f"such as {'; '.join(pairs)}"
            )
            if len(several) >= 5 and len(several) > SEVERAL_SHARE * count and not named:
                raise ValueError(
                    f"{file}: {what}: reviews' or customers' names? Name the items' titles with "
                    f"{option} title=NAME, or a second file with --item_file; to use the column "
                    f"all the same: {option} title={column}"
                )
            notes.append(f"{what}; the first in the alphabet is shown")
        different = len(set(self.smallest.values()))
        if count >= 10 and different <= count / 2:
            shared, times = Counter(self.smallest.values()).most_common(1)[0]
            notes.append(
                f"{count:,} items have only {different:,} different titles in column {column}; "
                f"{times:,} are called {shorten(shared)!r}"
            )


def read_log(table: "Table", builder: LogBuilder) -> Titles:
    """All rows into the builder, line numbers for times that there are none of;
    the titles by the items' codes."""
    titles = Titles()
    for numbers, columns, bad in table.chunks:
        for number, why in bad:
            builder.bad(number, why)
        if not numbers:
            continue
        ratings = columns.get("rating") or [1.0] * len(numbers)
        times = columns.get("timestamp") or numbers
        codes = builder.add(numbers, columns["user"], columns["item"], ratings, times)
        if "title" in columns:
            titles.add(codes.tolist(), columns["title"])
    titles.smallest.pop(-1, None)  # of rows that are left out
    titles.several.pop(-1, None)
    return titles


def beside(file: Path, pattern: str) -> str:
    """The one file in the same folder that fits; of several the one of the same name;
    "" if there is none."""
    found = matching_files(file.parent, pattern)
    if len(found) > 1:
        name = file.name.split(".")[0]
        found = [f for f in found if f.name.split(".")[0] == name]
    return str(found[0]) if len(found) == 1 else ""


def atomic_delimiter(file: Path) -> str:
    """What stands between the typed names in the header of RecBole's atomic files;
    "" where quotes are to be expected."""
    header = next(read_lines(file), "").strip("\ufeff")
    between = next((mark for mark in "\t,;| " if _all_typed(header.split(mark))), "\t")
    return between if between.isspace() else ""


def _all_typed(names: list[str]) -> bool:
    typed = re.compile(r"[^\s,;|:]+:(token|float)(_seq)?")
    return len(names) > 1 and all(typed.fullmatch(name.strip()) for name in names)


def read_item_file(
    file: Path,
    kind: str,
    given: dict[str, str],
    item_given: dict[str, str],
    builder: LogBuilder,
    notes: list[str],
) -> dict[str, str]:
    """Titles by item id of the items that the log has;
    ids that differ only as written numbers are matched, and said."""
    if not file.exists():
        raise ValueError(f"--item_file {file}: no such file")
    if parquet.is_parquet(file) or (kind == "parquet" and file.is_dir()):
        kind = "parquet"
    elif kind != "recbole":
        kind = "jsonl" if re.search(r"\.jsonl?(\.gz)?$", file.name.lower()) else "csv"
    names = item_given or {
        field: name
        for field, name in given.items()
        if field in ("item", "title") and not name.isdigit()
    }
    table = open_table(
        file, kind, names, ("item", "title"), ("item", "title"), "--item_columns", bool(item_given)
    )
    wanted, titles = NearIds(builder.items), Titles()
    count = LineCount(file, "rows with item, title")
    for numbers, columns, bad in table.chunks:
        for number, why in bad:
            count.bad(number, why)
        count.lines += len(numbers)
        if numbers:
            titles.add(wanted.find(columns["item"]), columns["title"])
    count.check()
    titles.smallest.pop(None, None)
    titles.several.pop(None, None)
    named = "title" in names
    titles.judge(file, named, table.fields["title"], "--item_columns", notes)
    wanted.judge(file, builder.source, titles.smallest, notes)
    return titles.smallest


class NearIds:
    """Finds the log's ids in an item file: as they are,
    or as numbers written otherwise (7.0 or 007 for 7)."""

    def __init__(self, items: Codes):
        self.items = items
        numbers = Counter(filter(None, map(number_in, items.ids)))
        self.by_number = {number: i for i in items.ids if numbers[number := number_in(i)] == 1}
        self.rewritten: dict[str, str] = {}  # the log's -> the file's
        self.others: list[str] = []  # of the file's ids two that the log does not have

    def find(self, ids: Iterable) -> list[str | None]:
        """The log's id for each of the file's, None where it has none."""
        found = []
        for value in ids:
            name = str(value).strip()
            if self.items.get(name, -1) < 0:
                near = self.by_number.get(number_in(name))
                if near is not None:
                    self.rewritten[near] = name
                elif len(self.others) < 2:
                    self.others.append(name)
                name = near
            found.append(name)
        return found

    def judge(self, file: Path, log_name: str, titles: dict, notes: list[str]) -> None:
        """Say what of the join looks wrong; ValueError if nothing was found."""
        ids = self.items.ids
        ours = [repr(i) for i in ids if i not in titles][:2]
        theirs = " and ".join(map(repr, self.others)) or "none but those"
        if not titles:
            raise ValueError(
                f"{file}: none of the {len(ids):,} items of {log_name} has a title in it; "
                "the log has "
                f"{' and '.join(ours)}, the file has {theirs}: write the ids alike, "
                "or name the right columns with "
                "--columns item=NAME and --item_columns item=NAME,title=NAME"
            )
        if rewritten := [(a, b) for a, b in self.rewritten.items() if a in titles]:
            a, b = rewritten[0]
            notes.append(
                f"{len(rewritten):,} item ids of {file.name} were matched as numbers: "
                f"the log has {a}, the file has {b}"
            )
        if len(titles) < len(ids) / 2:
            notes.append(
                f"only {len(titles):,} of {len(ids):,} items are in {file.name}: the log has "
                f"{' and '.join(ours)}, the file has {theirs}"
            )


def number_in(name: str) -> str:
    """The digits of an id that is a whole number, without leading zeros and ".0";
    "" if it is none."""
    match = re.fullmatch(r"0*(\d+)(?:\.0*)?", name)
    return match[1] if match else ""


def show_ids(names: Mapping[str, str], ids: list[str], notes: list[str]) -> dict[str, str]:
    """Titles of all items: their ids, where there are none."""
    if not names:
        notes.append(
            "no titles; a language model sees item ids instead, which tell it nothing "
            "(--columns title=..., --item_file)"
        )
        return {i: i for i in ids}
    untitled = [i for i in ids if not names.get(i, "").strip()]
    if untitled:
        notes.append(
            f"{len(untitled):,} of {len(ids):,} items have no title; their ids are shown, "
            f"first {clean_title(untitled[0])}"
        )
    return {**names, **{i: i for i in untitled}}


# ------------------------------------------------------------------------------------------ columns
MAX_BAD_IN_A_ROW = 10_000  # bad JSON lines before a good one


@dataclass
class Table:
    """A file whose columns are known."""

    fields: dict[str, str]  # field -> name of its column
    chunks: Iterator[Chunk]
    delimiter: str = ","


def plain_name(name: str) -> str:
    return re.sub(r"[\s_\-]", "", name).lower()


def open_table(
    file: Path,
    kind: str,
    given: dict[str, str],
    required: tuple[str, ...],
    only: tuple[str, ...],
    option: str = "--columns",
    strict: bool = True,
) -> Table:
    """Names of the columns that hold each field of `only`, and the rows, CHUNK lines at a time.

    `given` comes from `option`; all-digit columns of a table are positions. `strict`:
    a given name must exist."""
    find = ColumnFinder(file, given, required, only, option, strict)
    if kind == "jsonl":
        return open_json(file, find)
    if kind == "parquet":
        fields = find.by_name(parquet.column_names(file))
        return Table(fields, parquet.read_chunks(file, fields))
    delimiter, rows = open_rows(file, atomic_delimiter(file) if kind == "recbole" else "")
    header = [name.strip() for name in next(rows, [])]
    if kind == "recbole":
        header = [name.partition(":")[0] for name in header]
    if not (given and all(name.isdigit() for name in given.values())):
        fields = find.by_name(header)
        positions = {field: header.index(name) for field, name in fields.items()}
        return Table(fields, table_chunks(rows, positions, len(header), 2), delimiter)

    positions = find.by_position(len(header))
    following = list(itertools.islice(rows, 100))
    rows = put_back(following, rows)
    if kind == "recbole" or is_header(header, following, positions):
        fields, first_line = {field: header[at] for field, at in positions.items()}, 2
    else:
        fields, first_line = dict(given), 1
        rows = put_back([header], rows)
    return Table(fields, table_chunks(rows, positions, len(header), first_line), delimiter)


def is_header(first: list[str], following: list[list[str]], positions: dict[str, int]) -> bool:
    """Whether a table's first row names its columns: it holds text where the rows behind it hold
    numbers or times, or where they must be; of ids and titles, one of the usual names."""
    for field, at in positions.items():
        value, below = first[at], [row[at] for row in following if len(row) > at]
        if field in ("rating", "timestamp"):
            read = read_times if field == "timestamp" else NumberStyle(comma="decimal").numbers
            if np.isnan(read([value])[0]):
                return not re.search(r"\d", value) or not np.isnan(read(below)).all()
            return False
    for field, at in positions.items():
        value, below = first[at], [row[at] for row in following if len(row) > at]
        if plain_name(value) in USUAL[field]:
            return True
        if field != "title" and not number_in(value) and below and all(map(number_in, below)):
            return True
    return False


class ColumnFinder:
    """Which column holds which field: the given ones, the others under their usual names;
    ValueError lists what there is."""

    def __init__(
        self, file: Path, given: dict[str, str], required, only, option: str, strict: bool
    ):
        self.file, self.given, self.required, self.only = file, given, required, only
        self.option, self.strict = option, strict
        self.is_log = "user" in only

    def by_position(self, width: int) -> dict[str, int]:
        """Field -> index, of columns counted from 1."""
        outside = [name for name in self.given.values() if not 1 <= int(name) <= width]
        if outside:
            raise ValueError(
                f"{self.file}: {self.option} asks for column {outside[0]}, the first line has "
                f"{width}, counted from 1"
            )
        self._check_required(self.given, [])
        return {field: int(name) - 1 for field, name in self.given.items()}

    def by_name(self, names: list[str]) -> dict[str, str]:
        """Field -> name."""
        fields = {}
        for field in self.only:
            if field in self.given and (self.strict or self.given[field] in names):
                fields[field] = self._given(field, names)
            elif found := self._usual(field, names):
                fields[field] = found
        self._check_required(fields, names)
        for field, name in fields.items():
            if names.count(name) > 1:
                places = [f"{f}={names.index(n) + 1}" for f, n in fields.items()]
                raise ValueError(
                    f"{self.file}: {names.count(name)} columns are named {name}, "
                    f"which was to be the {field}; rename one, or count the columns: "
                    f"{self.option} {','.join(places)}"
                )
        return fields

    def _given(self, field: str, names: list[str]) -> str:
        name = self.given[field]
        if name in names:
            return name
        raise ValueError(
            f"{self.file}: {self.option} {field}={name}: no such column; there are {brief(names)}"
        )

    def _usual(self, field: str, names: list[str]) -> str:
        """The column under its surest usual name; "" if there is none."""
        plain = {plain_name(name): name for name in reversed(names)}
        usual = USUAL[field] if self.is_log or field != "item" else (*USUAL[field], "id")
        free = [name for name in usual if name in plain and plain[name] not in self.given.values()]
        if free:
            return plain[free[0]]
        if field == "title":
            return next((name for name in names if "title" in name.lower()), "")
        return ""

    def _check_required(self, fields: dict[str, str], names: list[str]) -> None:
        missing = [field for field in self.required if field not in fields]
        if not missing:
            return
        there = f"; there are {brief(names)}" if names else ""
        ways = f"Say {self.option} {','.join(f'{field}=NAME' for field in missing)}{there}"
        count = len(self.only)
        if self.is_log:
            count = min(len(names), len(FIELDS) - 1)
        example = ",".join(f"{f}={n}" for n, f in enumerate(self.only[: max(2, count)], 1))
        raise ValueError(
            f"{self.file}: which column is the {missing[0]}? {ways}. "
            f"If the file has no header line, count its columns: {self.option} {example}"
        )


def open_json(file: Path, find: ColumnFinder) -> Table:
    """JSON lines: the columns are the keys of the first records."""
    bad: list[tuple[int, str]] = []

    def note(number: int, line: str) -> None:
        bad.append((number, shorten(line)))
        if len(bad) > MAX_BAD_IN_A_ROW:
            raise ValueError(
                f"{file}: {len(bad):,} lines together are no JSON objects, "
                f"first line {bad[0][0]}: {bad[0][1]!r}"
            )

    parsed = read_records(file, json_record, (), note)
    first = list(itertools.islice(parsed, 1000))  # a key may be missing in some
    names = list(dict.fromkeys(name for _, record in first for name in record))
    if not first:
        raise ValueError(
            f"{file}: no line is a JSON object{f'; line {bad[0][0]}: {bad[0][1]!r}' if bad else ''}"
        )
    fields = find.by_name(names)
    return Table(fields, _json_chunks(itertools.chain(first, parsed), fields, bad))


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
        config.scale,
        config.item_columns,
    )
