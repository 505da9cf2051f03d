"""Your own interaction log: CSV, JSON lines, RecBole's atomic files, or Parquet.

    python train.py --dataset csv --data_dir log.csv --columns user=uid,item=sku,rating=stars
    python train.py --dataset csv --data_dir u.data --columns user=1,item=2,rating=3,timestamp=4 \\
        --item_file u.item      with id=1,title=2 of u.item among --columns

Columns that --columns does not name are looked up under their usual names; numbers are positions,
counted from 1. Without a rating column repeats are counted; without a timestamp column, the order
of the file is that in time; without titles, ids are shown."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import print0
from data import Interactions
from loaders.files import SPLIT_NAMES, find_files, matching_files, name_of, visible_files
from loaders.table import Rows, clean_title, finish, usable_rows
from loaders.tables import Table, brief, check_bad, read_table, shorten
from loaders.values import ABSENT_TEXTS, ABSENT_TITLES, id_text, read_ids, read_numbers, scale_doubt

FIELDS = ("user", "item", "rating", "timestamp", "title")
USUAL = {  # patterns of names without case, blanks, dashes and underscores; the surer ones first
    "user": "userid uid username reviewerid customerid visitorid user customer",
    "item": "itemid iid movieid productid parentasin asin sku bookid trackid artistid item product",
    "rating": "rating stars score overall hours plays playcount count amount",
    "timestamp": r"timestamp\w*|ts|(unix\w*|event|utc)?time(_?stamp)?(s|ms|us|ns)|unix\w*time"
    r"|epoch\w*|datetime "
    r"\w*time|\w+(?<=_)at|\w*(played|ordered|created|rated|clicked|watched|bought|viewed)at "
    r"date|\w+date|day",
    "title": "title itemtitle movietitle booktitle producttitle itemname productname moviename name"
    " .*title.*",
}
USUAL["id"] = f"{USUAL['item']} id"  # of --item_file
AMOUNTS = ("hours", "plays", "playcount", "count", "amount")  # no ratings, whatever their size


def parse_columns(text: str) -> dict[str, str]:
    """ "user=uid,item=sku" -> {"user": "uid", "item": "sku"};
    ValueError names what is not understood."""
    columns = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        field, _, name = map(str.strip, part.partition("="))
        once = [columns.get(f) for f in FIELDS[:4]] if field in FIELDS[:4] else []
        if field not in (*FIELDS, "id") or not name or name in once:
            forms = ", ".join(f"{f}=NAME" for f in (*FIELDS, "id"))
            raise ValueError(f"--columns: {part!r} is not one of {forms}, each name once")
        columns[field] = name
    return columns


def plain_name(name: str) -> str:
    return re.sub(r"[\s_\-.]", "", name).lower()


# ------------------------------------------------------------------------------------------ columns
NUMBER = re.compile(r"[-+]?\d[\d.,:/TZ\s-]*")  # or a time


@dataclass
class Finder:
    """Which column holds which field: the given ones, the others under their usual names."""

    given: dict[str, str]  # by `option`; all digits are positions, counted from 1
    required: tuple[str, ...]
    only: tuple[str, ...]  # the fields that are looked for
    option: str = "--columns"
    usual: bool = True  # look for usual names, too
    likely: dict[str, str] | None = None  # names that are tried before the usual ones

    def by_name(self, names: list[str], source) -> dict[str, str]:
        """Field -> name; ValueError lists what there is."""
        found, there = {}, f"there are {brief(names)}"
        for field in self.only:
            name = self.given.get(field, "")
            if name and name not in names:
                raise ValueError(f"{source}: {self.option} {field}={name}: no such column; {there}")
            name = name or (self.likely or {}).get(field, "")
            if name not in names:
                name = self.usual_name(field, names, source) if self.usual else ""
            if name:
                found[field] = name
        count = ",".join(f"{f}={n}" for n, f in enumerate(self.only[: len(names)], 1))
        count = f"or count the columns, such as {self.option} {count}"
        if missing := [field for field in self.required if field not in found]:
            which = f"which column is the {missing[0]}? Say {self.option} {missing[0]}=NAME"
            raise ValueError(f"{source}: {which}; {there}; {count}")
        if twice := [name for name in found.values() if names.count(name) > 1]:
            raise ValueError(f"{source}: several columns are named {twice[0]}: rename one, {count}")
        return found

    def usual_name(self, field: str, names: list[str], source) -> str:
        """The name of the column that is likely to hold a field; "" if there is none."""
        patterns = USUAL.get(field, "").split()
        free = [name for name in dict.fromkeys(names) if name not in self.given.values()]
        for pattern in patterns:
            fits = [n for n in free if re.fullmatch(f"({pattern})", n.lower())]
            fits = fits or [n for n in free if re.fullmatch(f"({pattern})", plain_name(n))]
            if len(fits) > 1 and field == "timestamp":
                raise ValueError(
                    f"{source}: which column is the time? Say {self.option} timestamp=NAME; it "
                    f"could be {' or '.join(brief(sorted(fits)))}; there are {brief(names)}"
                )
            if fits:
                return fits[0]
        return ""

    def in_rows(self, first: list[str], below: list[str] = (), source="") -> tuple:
        """Of a table's first two rows: field -> name, field -> place, and whether the first names
        the columns. Where they are counted, it does if it has a usual name, or text above a
        number."""
        counted = self.given and all(name.isdigit() for name in self.given.values())
        names = [str(n) for n in range(1, len(first) + 1)] if counted else first
        labels = self.by_name(names, source)
        places = {field: names.index(name) for field, name in labels.items()}
        named = not counted
        for field, place in places.items():
            name, value = first[place], below[place] if place < len(below) else ""
            text = not NUMBER.fullmatch(name) and name not in ABSENT_TEXTS
            named = named or plain_name(name) in USUAL.get(field, "").split()
            named = named or bool(text and NUMBER.fullmatch(value))
        labels = {f: first[place] for f, place in places.items()} if named else labels
        return labels, places, named


# ------------------------------------------------------------------------------------------- titles
def titles_of(items: np.ndarray, num_items: int, table: Table, find: Finder, source) -> list[str]:
    """The title of each item, "" for none; of several the first in the alphabet.

    `items` (n,) are codes, -1 for none. ValueError if nobody named the column and a fifth of the
    items has several titles."""
    column, label = table.columns["title"], table.labels["title"]
    texts = [id_text(value) or "" for value in column.values]
    order = sorted({*texts} - ABSENT_TITLES)
    rank, none = {text: n for n, text in enumerate(order)}, len(order)
    ranks = np.array([*(rank.get(text, none) for text in texts), none], np.int32)
    place = ranks[column.codes]
    lowest = np.full(num_items + 1, none, np.int32)  # the last is of codes that are no items
    np.minimum.at(lowest, items, place)
    other = np.flatnonzero((place > lowest[items]) & (place < none) & (items >= 0))
    titles = [*map([*order, ""].__getitem__, lowest[:-1].tolist())]
    if count := len(np.unique(items[other])):
        first, second = titles[items[other[0]]], order[place[other[0]]]
        such = f"{shorten(first, 80)!r} and {shorten(second, 80)!r}"
        many = f"{source}: {count:,} items have several titles in column {label}, such as {such}"
        if 5 <= count > sum(map(bool, titles)) / 5 and "title" not in find.given:
            use = f"{find.option} title={label}"
            raise ValueError(f"{many}: name another column, or --item_file; to use it: {use}")
        print0(f"note: {many}; the first in the alphabet is shown")
    return titles


def titles_beside(config, rows: Rows) -> list[str]:
    """The titles of the log's items in the second file, "" where it has none."""
    files, kind, root = item_files(config)
    source, both, names = name_of(files), ("id", "title"), parse_columns(config.columns)
    find = Finder({f: names[f] for f in both if f in names}, both, both)
    find.likely = {"id": names.get("item", "")}
    table = check_bad(read_table(files, kind, find, root), source)
    codes, ids = read_ids(table.columns["id"])
    known = {text: code for code, text in enumerate(rows.item_ids)}
    items = np.array([*(known.get(text, -1) for text in ids), -1, -1])[codes]
    titles = titles_of(items, len(rows.item_ids), table, find, source)
    have = sum(map(bool, titles))
    if have < len(titles) / 2:
        few = f"{source}: titles of {have:,} of {len(titles):,} items; the log has ids such as "
        few += f"{brief(rows.item_ids[:2])}, the file {brief(ids[:2])}"
        if not have:
            ways = "--columns item=NAME, or id=NAME,title=NAME of the second file"
            raise ValueError(f"{few}: write them alike, or name other columns: {ways}")
        print0(f"note: {few}")
    return titles


# ------------------------------------------------------------------------------------------ the log
PATTERNS = {  # of the files in a folder, and what they are called
    "csv": (("*.csv*", "*.tsv*", "*.txt*"), "CSV file"),
    "jsonl": (("*.jsonl*", "*.json*"), "file of JSON lines"),
    "recbole": (("*.inter*",), ".inter file"),
}
PARQUET = (".parquet", ".parq", ".pq")


def table_files(path: Path, kind: str) -> list[Path]:
    """The file, or the parts of one table in a folder; those of Parquet in its folders, too."""
    if kind != "parquet":
        return find_files(path, *PATTERNS[kind], joined=SPLIT_NAMES if kind == "recbole" else ())
    if path.is_file():
        return [path]
    inside = [*path.rglob("*")] if path.is_dir() else []
    if any("_delta_log" in f.parts or f.name.endswith(".metadata.json") for f in inside):
        raise ValueError(f"{path}: a folder of Delta Lake or Iceberg keeps removed rows: export it")
    parts = visible_files(path, below=True) if inside else []
    parts = [f for f in parts if f.name.lower().endswith(PARQUET)]
    if not parts:
        names = [f.name for f in inside[:8]]
        raise ValueError(f"{path}: no .parquet file or folder of such files; there are {names}")
    return parts


def item_files(config) -> tuple[list[Path], str, Path]:
    """The parts of --item_file, or of the .item beside a .inter; their kind; their folder."""
    path, kind = Path(config.item_file), config.dataset
    if not config.item_file:
        log = table_files(Path(config.data_dir), kind)[0] if kind == "recbole" else None
        found = matching_files(log.parent, "*.item*") if log else []
        if len(found) > 1:  # the one of the same name
            found = [f for f in found if f.name.split(".")[0] == log.name.split(".")[0]]
        return found[:1], kind, path
    inside = visible_files(path, below=True) if path.is_dir() else [path]
    if any(f.name.lower().endswith(PARQUET) for f in inside):
        kind = "parquet"
    elif kind != "recbole":
        kind = "jsonl" if re.search(r"\.jsonl?\b", path.name.lower()) else "csv"
    return table_files(path, kind), kind, path


def files(config) -> list[Path]:
    """All that is read."""
    return table_files(Path(config.data_dir), config.dataset) + item_files(config)[0]


def choose_percentile(config, source: str, table: Table) -> str:
    """--scale rank:... as the columns ask for it: repeats and amounts are ranked; ValueError where
    ratings are of another scale than 1 to 5."""
    name, percentile = table.labels.get("rating"), config.ranks
    scale = "" if percentile else config.scale
    if name is None and scale:
        what = "there is no rating column; name it with --columns rating=NAME"
        raise ValueError(f"{source}: --scale {scale}, but {what}")
    if name is None:
        print0(
            "note: no rating column: repeats are counted, and ranked as ratings (--scale rank:item)"
        )
        return percentile or "item"
    if plain_name(name) in AMOUNTS and not percentile and not scale:
        print0(f"note: {name} are amounts; their ranks within an item are ratings")
        return "item"
    numbers = read_numbers(table.columns["rating"], table.delimiter)
    if not percentile and not scale and (doubt := scale_doubt(numbers)):
        raise ValueError(f"{source}: column {name}: {doubt}")
    return percentile


def load(config) -> Interactions:
    """The log of --dataset csv, jsonl, recbole or parquet."""
    items = item_files(config)[0]
    parts = table_files(Path(config.data_dir), config.dataset)
    source = name_of(parts) if config.dataset != "parquet" else config.data_dir
    only = tuple(field for field in FIELDS if field != "title" or not items)
    given = {f: name for f, name in parse_columns(config.columns).items() if f in only}
    if "id" in parse_columns(config.columns) and not items:
        raise ValueError("--columns id= names a column of --item_file: give that, or leave id= out")
    find = Finder(given, ("user", "item"), only)
    table = read_table(parts, config.dataset, find, Path(config.data_dir))
    labels = table.labels
    print0(f"{source}: columns {', '.join(f'{f}={name}' for f, name in labels.items())}")
    percentile = choose_percentile(config, source, table)
    rows = usable_rows(table, source, bool(percentile), "" if config.ranks else config.scale)
    for why, count in rows.notes.items():
        print0(f"note: {count:,} {why}")
    label = labels.get("timestamp", "")
    known = "timestamp" in find.given or plain_name(label) == "timestamp"
    if label and not known and len(rows.time) > 100 and rows.time.max() <= 24:
        raise ValueError(
            f"{source}: column {label} holds no number above 24: hours of a day? Name the times by "
            f"--columns timestamp=NAME; to use it all the same: --columns timestamp={label}"
        )
    if not label or (rows.time == rows.time[0]).all():
        what = f"all {label} are equal" if label else "no timestamp column (--columns timestamp=)"
        print0(f"note: {what}: the order of the file is the one in time")
    titles = [""] * len(rows.item_ids)
    if items:
        titles = titles_beside(config, rows)
    elif "title" in labels:
        table.columns["title"].codes = table.columns["title"].codes[rows.kept]
        titles = titles_of(rows.item, len(titles), table, find, source)
    del table  # a log of 20 million rows takes 500 MB
    if few := titles.count(""):
        what = f"{few:,} of {len(titles):,} items have no title; their ids are shown, which tell a "
        print0(f"note: {what}model nothing (--columns title=NAME, --item_file)")
    titles = [clean_title(t) or clean_title(i) for t, i in zip(titles, rows.item_ids)]
    repeats = "sum" if percentile else "last"  # amounts add up
    return finish(rows, titles, config.dataset, percentile=percentile, repeats=repeats)
