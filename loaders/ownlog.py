"""Your own interaction log: CSV, JSON lines, RecBole's atomic files, or Parquet.

    python train.py --dataset csv --data_dir log.csv --columns user=uid,item=sku,rating=stars
    python train.py --dataset csv --data_dir u.data --columns user=1,item=2,rating=3,timestamp=4 \\
        --item_file u.item      with id=1,title=2 of u.item among --columns

Columns that --columns does not name are looked up under their usual names; numbers are places.
Without ratings, repeats are counted; without times, rows are taken as in time order."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common import print0
from data import Interactions
from loaders.readers import Table, find_files, name_of, read_table, visible_files
from loaders.table import clean_title, finish, usable_rows
from loaders.values import ABSENT_TITLES, read_ids, read_number, read_numbers, scale_doubt

FIELDS = ("user", "item", "rating", "timestamp", "title", "id")
USUAL = {  # patterns of names without case, blanks, dashes and underscores; the surer ones first
    "user": "userid uid username reviewerid customerid visitorid user customer",
    "item": "itemid iid movieid productid parentasin asin sku bookid trackid artistid item product",
    "rating": "rating stars score overall hours plays playcount count amount",
    "timestamp": r"timestamp\w*|ts|(unix\w*|event|utc)?time(stamp)?(s|ms|us|ns)|unix\w*time"
    r"|epoch\w*|datetime \w*time|\w+(ed|ght|een|ent)at date|\w+date|day",
    "title": "title itemtitle movietitle booktitle producttitle itemname productname moviename name"
    " .*title.*",
}
AMOUNTS = ("hours", "plays", "playcount", "count", "amount")  # no ratings, whatever their size


def plain_name(name: str) -> str:
    return re.sub(r"[\s_\-.]", "", name).lower()


def parse_columns(text: str) -> dict[str, str]:
    """ "user=uid,item=sku" -> {"user": "uid", "item": "sku"}; ValueError if it is not such."""
    columns = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, _, name = map(str.strip, part.partition("="))
        twice = key in FIELDS[:4] and name in map(columns.get, FIELDS[:4])
        if key not in FIELDS or not name or twice:
            raise ValueError(f"--columns: {part!r} is no KEY=NAME of {FIELDS}, each name once")
        columns[key] = name
    return columns


# ------------------------------------------------------------------------------------------ columns
@dataclass
class Finder:
    """Which column holds which field: the given ones, the others under their usual names."""

    given: dict[str, str]  # by --columns; all digits are positions, counted from 1
    only: tuple[str, ...]  # the fields that are looked for; the first two must be there
    usual: dict[str, str] = field(default_factory=USUAL.copy)  # field -> patterns
    labels: dict[str, str] = field(default_factory=dict)  # field -> name, of the first part

    def by_name(self, names: list[str], source) -> dict[str, str]:
        """Field -> name, alike in all parts; ValueError lists what there is."""
        there = f"there are {names!s:.200}"
        for name in (self.labels or self.given).values():
            if names.count(name) != 1:
                what = f"no column {name}, or several of that name; {there}"
                raise ValueError(f"{source}: {what}; each part must name its columns, each once")
        free = [name for name in names if name not in self.given.values()]
        for key in self.only if not self.labels else ():
            patterns = self.usual.get(key, "").split()
            tiers = ([n for n in free if re.fullmatch(p, plain_name(n))] for p in patterns)
            fits = [self.given[key]] if key in self.given else next(filter(None, tiers), [])
            if len(fits) == 1:
                self.labels[key] = fits[0]
            elif fits or key in self.only[:2]:
                which = f"which column is the {key}, {' or '.join(fits) or 'by its name'}?"
                count = ",".join(f"{key}={n}" for n, key in enumerate(self.only[: len(names)], 1))
                ways = f"Say --columns {key}=NAME; {there}; or, in CSV, count: --columns {count}"
                raise ValueError(f"{source}: {which} {ways}")
        return self.labels

    def header(self, first: list[str], below: list[str]) -> tuple[list[str], bool]:
        """The names of the columns, and whether a table's first row holds them. Counted columns
        have a header if it holds a usual name of a user or an item, or text above a number."""
        if not self.given or not all(name.isdigit() for name in self.given.values()):
            return first, True
        usual = {*f"{USUAL['user']} {USUAL['item']}".split()}
        numbers = [str(place) for place in range(1, len(first) + 1)]
        pairs = zip(numbers, first, below)
        counted = [[*map(read_number, row)] for n, *row in pairs if n in self.given.values()]
        above = any(text != text and math.isfinite(value) for text, value in counted)  # NaN: text
        return numbers, above or not usual.isdisjoint(map(plain_name, first))


# ------------------------------------------------------------------------------------------- titles
def titles_of(item_ids: list[str], table: Table, find: Finder, source) -> list[str]:
    """The title of each item, "" for none; of several the first in alphabetical order.

    The table is the log, or a second file with a column `id`. ValueError if --columns has no
    title= and over a fifth of the items have several."""
    column, label, found = table.columns["title"], table.labels["title"], {i: [] for i in item_ids}
    codes, ids = read_ids(table.columns["id" if "id" in table.columns else "item"])
    known, count = (codes >= 0) & (column.codes >= 0), len(column.values)
    codes, shown = codes[known], column.codes[known]
    last = np.full(len(ids), -1, np.int64)  # title of each item: of most the only one
    last[codes] = shown
    titled, other = np.flatnonzero(last >= 0), last[codes] != shown
    more = codes[other].astype(np.int64) * count + shown[other]
    pairs = np.unique(np.append(titled * count + last[titled], more))
    for item, title in zip(*(part.tolist() for part in np.divmod(pairs, count))):
        if ids[item] in found and column.values[title] not in ABSENT_TITLES:
            found[ids[item]] += [column.values[title]]
    titles = [*map(sorted, found.values())]
    if several := [texts[:2] for texts in titles if len(texts) > 1]:
        such = f"{len(several):,} items have several titles in column {label}, such as"
        many = f"{source}: {such} {several[0]!s:.200}"
        if 5 <= len(several) > sum(map(bool, titles)) / 5 and "title" not in find.given:
            raise ValueError(f"{many}: name another column or file, or --columns title={label}")
        print0(f"note: {many}; the first in the alphabet is shown")
    if not any(titles) and "id" in table.columns:
        what = f"no title of the log's items, such as {item_ids[:2]}; its ids are such as {ids[:2]}"
        raise ValueError(f"{source}: {what}: write them alike, or --columns id=NAME,title=NAME")
    return [texts[0] if texts else "" for texts in titles]


# ------------------------------------------------------------------------------------------ the log
PATTERNS = {
    "csv": ["*.csv*", "*.tsv*", "*.txt*"],
    "jsonl": ["*.jsonl*", "*.json*"],
    "recbole": ["*.inter*"],
    "parquet": ["*.p*q*"],  # parquet, parq, pq
}


def parts_of(config) -> tuple[list[Path], list[Path]]:
    """The log, a file or the parts of one table in a folder (those of Parquet in its folders, too);
    and --item_file, or the .item of the same name beside a .inter."""
    path, kind = Path(config.data_dir), config.dataset
    if kind == "parquet" and [*path.rglob("_delta_log"), *path.rglob("*.metadata.json")]:
        raise ValueError(f"{path}: Delta Lake and Iceberg keep removed rows: export the table")
    log = find_files(path, PATTERNS[kind], f"{kind} file", below=kind == "parquet")
    beside = f"{log[0].name.split('.')[0]}.item*"
    if config.item_file:
        return log, find_files(config.item_file, ["*"], "file of titles")
    return log, visible_files(log[0].parent, beside) if kind == "recbole" else []


def files(config) -> list[Path]:
    """All that is read."""
    return sum(parts_of(config), [])


def choose_percentile(config, source: str, table: Table) -> str:
    """The group in which amounts or repeats are ranked; "" for ratings, which must be 1 to 5."""
    name = table.labels.get("rating")
    if config.scale and not (name or config.ranks):
        raise ValueError(f"{source}: --scale needs a rating column: --columns rating=NAME")
    if config.scale:
        return config.ranks
    if name is None or plain_name(name) in AMOUNTS:
        what = f"{name} are amounts" if name else "no rating column: repeats are counted"
        if config.split_date:
            raise ValueError(f"{source}: {what}: ranks would count what follows --split_date")
        print0(f"note: {what}; they are ranked as by --scale rank:item")
        return "item"
    if doubt := scale_doubt(read_numbers(table.columns["rating"])):
        raise ValueError(f"{source}: column {name}: {doubt}")
    return ""


def load(config) -> Interactions:
    """The log of --dataset csv, jsonl, recbole or parquet."""
    parts, items = parts_of(config)
    source = name_of(parts)
    known, only = parse_columns(config.columns), FIELDS[: 4 if items else 5]
    if "id" in known and not items:
        raise ValueError("--columns id= names a column of --item_file: give that, or leave id= out")
    find = Finder({key: name for key, name in known.items() if key in only}, only)
    table = read_table(parts, find, plain=config.dataset == "recbole")
    print0(f"{source}: columns {', '.join(f'{key}={name}' for key, name in table.labels.items())}")
    percentile = choose_percentile(config, source, table)
    rows = usable_rows(table, source, bool(percentile), "" if config.ranks else config.scale)
    for why, count in rows.notes.items():
        print0(f"note: {count:,} {why}")
    label = table.labels.get("timestamp", "")
    sure = "timestamp" in known or plain_name(label) == "timestamp"
    if label and not sure and len(rows.time) > 100 and rows.time.max() <= 24:
        what = f"column {label} holds no number above 24: hours of a day? Name another one, or this"
        raise ValueError(f"{source}: {what}: --columns timestamp={label}")
    if not label or (rows.time == rows.time[0]).all():
        what = f"all {label} are equal" if label else "no timestamp column (--columns timestamp=)"
        print0(f"note: {what}: the order of the file is the one in time")
    if items:
        usual = USUAL | {"id": f"{re.escape(plain_name(known.get('item', '')))} {USUAL['item']} id"}
        both, source = ("id", "title"), name_of(items)
        find = Finder({key: known[key] for key in both if key in known}, both, usual)
        table = read_table(items, find, plain=config.dataset == "recbole")
    ids, titles = rows.item_ids, [""] * len(rows.item_ids)
    if "title" in table.labels:
        titles = titles_of(ids, table, find, source)
    del table  # a log of 20 million rows takes 500 MB
    if few := titles.count(""):
        what = f"{few:,} of {len(titles):,} items have no title: ids are shown"
        print0(f"note: {what} (--columns title=NAME, --item_file)")
    titles = [clean_title(t) or clean_title("#" * i.isdecimal() + i) for t, i in zip(titles, ids)]
    return finish(rows, titles, config.dataset, percentile=percentile, summed=bool(percentile))
