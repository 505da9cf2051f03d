"""Your own interaction log: CSV, JSON lines, RecBole's atomic files, or Parquet,
with the columns under any names and in any order.

    python train.py --dataset csv --data_dir log.csv \\
        --columns user=uid,item=sku,rating=stars,timestamp=when,title=name
    python train.py --dataset csv --data_dir u.data --columns user=1,item=2,rating=3,timestamp=4 \\
        --item_file u.item --item_columns item=1,title=2
    python train.py --dataset csv --data_dir likes.csv --scale binary

Ratings are above 0 and up to 5; --scale maps another scale to 1 to 5, and --percentile makes
ratings of hours, plays or prices. Without a rating column the number of repeats is taken; without
a timestamp column, the order of the file; without titles, the ids. Columns that --columns does not
name are looked up under their usual names; numbers are positions, counted from 1."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import print0
from data import Interactions
from loaders.files import SPLIT_NAMES, find_files, matching_files, name_of, visible_files
from loaders.table import Rows, clean_title, finish, rating_doubt, usable_rows
from loaders.tables import Table, brief, check_bad, read_table, shorten
from loaders.values import ABSENT_TEXTS, ABSENT_TITLES, Column, id_text, read_ids

FIELDS = ("user", "item", "rating", "timestamp", "title")
USUAL = {  # names without case, blanks, dashes and underscores; the surer ones first
    "user": "userid uid username reviewerid customerid visitorid user customer",
    "item": "itemid iid movieid productid parentasin asin sku bookid trackid artistid item product",
    "rating": "rating stars score overall hours plays playcount count amount",
    "title": "title itemtitle movietitle booktitle producttitle itemname productname moviename "
    "name",
}
TIMES = (  # patterns of plain names; of the first that fits, one column must
    r"timestamp\w*|ts|(unix\w*|event|utc)?time(_?stamp)?(s|ms|us|ns)|unix\w*time|epoch\w*|datetime",
    r"\w*time|\w+(?<=_)at|\w*(played|ordered|created|rated|clicked|watched|bought|viewed)at",
    r"date|\w+date|day",
)
AMOUNTS = ("hours", "plays", "playcount", "count", "amount")  # no ratings, whatever their size


def parse_columns(
    text: str, option: str = "--columns", allowed: Sequence[str] = FIELDS
) -> dict[str, str]:
    """ "user=uid,item=sku" -> {"user": "uid", "item": "sku"};
    ValueError names what is not understood."""
    columns = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        field, equals, name = (p.strip() for p in part.partition("="))
        if not equals or field not in allowed or not name:
            forms = ", ".join(f"{f}=NAME" for f in allowed)
            raise ValueError(f"{option}: {part!r} is not one of {forms}")
        if name in columns.values():
            raise ValueError(f"{option}: {name} is named twice")
        columns[field] = name
    return columns


def parse_item_columns(text: str) -> dict[str, str]:
    return parse_columns(text, "--item_columns", ("item", "title"))


def plain_name(name: str) -> str:
    return re.sub(r"[\s_\-.]", "", name).lower()


# ------------------------------------------------------------------------------------------ columns
@dataclass
class Finder:
    """Which column holds which field: the given ones, the others under their usual names."""

    given: dict[str, str]  # by `option`; all digits are positions, counted from 1
    required: tuple[str, ...]
    only: tuple[str, ...]  # the fields that are looked for
    option: str = "--columns"
    usual: bool = True  # look for usual names, too
    strict: bool = True  # a given name must be there

    def by_name(self, names: list[str], source) -> dict[str, str]:
        """Field -> name; ValueError lists what there is."""
        found = {}
        for field in self.only:
            if field in self.given and (self.strict or self.given[field] in names):
                if self.given[field] not in names:
                    raise ValueError(
                        f"{source}: {self.option} {field}={self.given[field]}: no such column; "
                        f"there are {brief(names)}"
                    )
                found[field] = self.given[field]
            elif self.usual and (name := self.usual_name(field, names, source)):
                found[field] = name
        self.check_required(found, names, source)
        for field, name in found.items():
            if names.count(name) > 1:
                places = ",".join(f"{f}={names.index(n) + 1}" for f, n in found.items())
                raise ValueError(
                    f"{source}: {names.count(name)} columns are named {name}, which was to be the "
                    f"{field}; rename one, or count the columns: {self.option} {places}"
                )
        return found

    def usual_name(self, field: str, names: list[str], source) -> str:
        free = {plain_name(n): n for n in reversed(names) if n not in self.given.values()}
        if field == "timestamp":
            for pattern in TIMES:
                fits = [n for n in free.values() if re.fullmatch(pattern, n.lower())]
                fits += [n for p, n in free.items() if re.fullmatch(pattern, p) and n not in fits]
                if len(fits) > 1:
                    raise ValueError(
                        f"{source}: which column is the time? Say {self.option} timestamp=NAME; "
                        f"it could be {' or '.join(brief(sorted(fits)))}; there are {brief(names)}"
                    )
                if fits:
                    return fits[0]
            return ""
        usual = USUAL[field].split() + (["id"] if "user" not in self.only else [])
        found = next((free[name] for name in usual if name in free), "")
        if field == "title" and not found:
            return next((name for name in names if "title" in name.lower()), "")
        return found

    def check_required(self, found: dict, names: list[str], source) -> None:
        missing = [field for field in self.required if field not in found]
        if not missing:
            return
        if len(names) == 1 and re.fullmatch(r"\d+:", names[0]):
            raise ValueError(
                f"{source}: Netflix's form, each movie's number on a line of its own; make a table "
                "of it: awk -F: '/:$/ {m = $1; next} {print m \",\" $0}' FILE > log.csv, and give "
                "--columns item=1,user=2,rating=3,timestamp=4"
            )
        there = f"; there are {brief(names)}" if names else ""
        ways = ",".join(f"{field}=NAME" for field in missing)
        count = min(len(names), 4) if "user" in self.only else len(self.only)
        example = ",".join(f"{f}={n}" for n, f in enumerate(self.only[: max(2, count)], 1))
        raise ValueError(
            f"{source}: which column is the {missing[0]}? Say {self.option} {ways}{there}. "
            f"If the file has no header line, count its columns: {self.option} {example}"
        )

    def in_rows(self, rows: list[list[str]], source) -> tuple[dict[str, str], dict[str, int], bool]:
        """Of a table's first rows: field -> name, field -> place, whether the first names them."""
        first = rows[0]
        if not (self.given and all(name.isdigit() for name in self.given.values())):
            labels = self.by_name(first, source)
            return labels, {field: first.index(name) for field, name in labels.items()}, True
        places = {field: int(name) - 1 for field, name in self.given.items()}
        if outside := [place for place in places.values() if not 0 <= place < len(first)]:
            raise ValueError(
                f"{source}: {self.option} asks for column {outside[0] + 1}, the first line has "
                f"{len(first)}, counted from 1"
            )
        self.check_required(self.given, [], source)
        named = is_header(first, rows[1:], places)
        labels = {f: first[place] if named else self.given[f] for f, place in places.items()}
        return labels, places, named

    def place(self, name: str, names: list[str], source) -> int:
        """The place of a column in another part of the file."""
        if name not in names:
            raise ValueError(f"{source}: no column {name}; there are {brief(names)}")
        return names.index(name)


def is_header(first: list[str], below: list[list[str]], places: dict[str, int]) -> bool:
    """Whether a first row names the columns: it holds a usual name, or text above numbers."""
    for field, place in places.items():
        if plain_name(first[place]) in USUAL.get(field, "").split():
            return True
        values = [row[place] for row in below if len(row) > place]
        text = not NUMBER.fullmatch(first[place]) and first[place] not in ABSENT_TEXTS
        if text and values and sum(map(bool, map(NUMBER.fullmatch, values))) > len(values) / 2:
            return True
    return False


NUMBER = re.compile(r"[-+]?\d[\d.,:/TZ\s-]*")  # or a time


def number_in(name: str) -> str:
    """The digits of an id that is a whole number, without leading zeros and ".0";
    "" if it is none."""
    match = re.fullmatch(r"0*(\d+)(?:\.0*)?", name)
    return match[1] if match else ""


# ------------------------------------------------------------------------------------------- titles
SEVERAL_SHARE = 0.2  # of the items with more than one title: then a column holds something else


def titles_of(codes: np.ndarray, num_items: int, column: Column) -> tuple[list[str], dict]:
    """The title of each item, "" for none, of several the first in the alphabet;
    and two titles of those that have several. Codes (n,) below 0 are no items."""
    texts = [value if isinstance(value, str) else id_text(value) or "" for value in column.values]
    texts = ["" if text.strip() in ABSENT_TITLES else text for text in texts]
    order = sorted(set(texts) - {""})
    rank = {text: n for n, text in enumerate(order)}
    place = np.array([*(rank.get(text, -1) for text in texts), -1])[column.codes]
    used = (codes >= 0) & (place >= 0)
    low, high = np.full(num_items, len(order)), np.full(num_items, -1)
    np.minimum.at(low, codes[used], place[used])
    np.maximum.at(high, codes[used], place[used])
    several = {i: (order[low[i]], order[high[i]]) for i in np.flatnonzero(low < high).tolist()}
    return [*map([*order, ""].__getitem__, low.tolist())], several


def judge_titles(titles: list[str], several: dict, find: Finder, table: Table, source: str) -> None:
    """Say where the titles are hardly the items'; ValueError if nobody named the column and it
    looks like another thing."""
    option, column = find.option, table.labels["title"]
    known = [title for title in titles if title]
    if several:
        pairs = "; ".join(f"{a!r} and {b!r}" for a, b in list(several.values())[:2])
        what = (
            f"{len(several):,} of {len(known):,} items have more than one title in column "
            f"{column}, such as {pairs}"
        )
        many = len(several) >= 5 and len(several) > SEVERAL_SHARE * len(known)
        if many and "title" not in find.given:
            raise ValueError(
                f"{source}: {what}: reviews' or customers' names? Name the items' titles with "
                f"{option} title=NAME, or a second file with --item_file; to use the column "
                f"all the same: {option} title={column}"
            )
        print0(f"note: {what}; the first in the alphabet is shown")
    different = len(set(known))
    if len(known) >= 10 and different <= len(known) / 2:
        shared, times = Counter(known).most_common(1)[0]
        print0(
            f"note: {len(known):,} items have only {different:,} different titles in column "
            f"{column}; {times:,} are called {shorten(shared)!r}"
        )


# ---------------------------------------------------------------------------------------- item file
def titles_beside(config, rows: Rows) -> list[str]:
    """The titles of the log's items in the second file, "" where it has none."""
    files, kind, root = item_files(config)
    source, given = name_of(files), parse_item_columns(config.item_columns)
    if not given:  # names of --columns that the second file has, too
        names = parse_columns(config.columns)
        given = {f: names[f] for f in ("item", "title") if f in names and not names[f].isdigit()}
    find = Finder(given, ("item", "title"), ("item", "title"), "--item_columns")
    find.strict = bool(config.item_columns)
    table = read_table(files, kind, find, root)
    check_bad(table, source)
    codes, ids = read_ids(table.columns["item"])
    known = {text: code for code, text in enumerate(rows.item_ids)}
    counts = Counter(filter(None, map(number_in, rows.item_ids)))
    by_number = {n: code for t, code in known.items() if counts[n := number_in(t)] == 1}
    near = {t: by_number[number_in(t)] for t in ids if t not in known and number_in(t) in by_number}
    places = np.array([*(known.get(t, near.get(t, -1)) for t in ids), -1, -1])[codes]
    titles, several = titles_of(places, len(rows.item_ids), table.columns["title"])
    judge_titles(titles, several, find, table, source)

    have = sum(map(bool, titles))
    ours = " and ".join([repr(i) for i, title in zip(rows.item_ids, titles) if not title][:2])
    others = [repr(t) for t in ids if t not in known and t not in near][:2]
    theirs = " and ".join(others) or "none but those"
    if not have:
        raise ValueError(
            f"{source}: none of the {len(titles):,} items of {rows.source} has a title in it; the "
            f"log has {ours}, the file has {theirs}: write the ids alike, or name the right "
            "columns with --columns item=NAME and --item_columns item=NAME,title=NAME"
        )
    if rewritten := [(text, code) for text, code in near.items() if titles[code]]:
        text, code = rewritten[0]
        print0(
            f"note: {len(rewritten):,} item ids of {Path(source).name} were matched as numbers: "
            f"the log has {rows.item_ids[code]}, the file has {text}"
        )
    if have < len(titles) / 2:
        print0(
            f"note: only {have:,} of {len(titles):,} items are in {Path(source).name}: the log has "
            f"{ours}, the file has {theirs}"
        )
    return titles


# ------------------------------------------------------------------------------------------ the log
PATTERNS = {  # of the files in a folder, and what they are called
    "csv": (("*.csv*", "*.tsv*", "*.txt*"), "a CSV file"),
    "jsonl": (("*.jsonl*", "*.json*"), "a file of JSON lines"),
    "recbole": (("*.inter*",), "a .inter file"),
}
PARQUET = (".parquet", ".parq", ".pq")


def parquet_files(path: Path) -> list[Path]:
    """The file, or all of a folder and its folders."""
    if path.is_file():
        return [path]
    if (path / "_delta_log").is_dir() or list(path.glob("metadata/*.metadata.json")):
        raise ValueError(
            f"{path}: a table of Delta Lake or Iceberg, whose folder keeps removed rows, too: "
            "export it, with COPY ... TO 'log.parquet' in DuckDB or df.write.parquet in Spark"
        )
    found = visible_files(path, below=True) if path.is_dir() else []
    if parts := [f for f in found if f.name.lower().endswith(PARQUET)]:
        return parts
    inside = [f.name for f in sorted(path.iterdir())][:8] if path.is_dir() else "nothing"
    raise ValueError(f"{path}: no .parquet file or folder of such files; there is {inside}")


def log_files(config) -> list[Path]:
    if config.dataset == "parquet":
        return parquet_files(Path(config.data_dir))
    joined = SPLIT_NAMES if config.dataset == "recbole" else ()
    return find_files(config.data_dir, *PATTERNS[config.dataset], joined=joined)


def item_files(config) -> tuple[list[Path], str, Path]:
    """The parts of --item_file, or of the .item beside a .inter; their kind; their folder."""
    path, kind = Path(config.item_file), config.dataset
    if not config.item_file:
        log = log_files(config)[0] if kind == "recbole" else None
        found = matching_files(log.parent, "*.item*") if log else []
        if len(found) > 1:  # the one of the same name
            found = [f for f in found if f.name.split(".")[0] == log.name.split(".")[0]]
        return found[:1] if len(found) == 1 else [], kind, path
    if not path.exists():
        raise ValueError(f"--item_file {path}: no such file")
    inside = visible_files(path, below=True) if path.is_dir() else [path]
    if any(f.name.lower().endswith(PARQUET) for f in inside):
        return parquet_files(path), "parquet", path
    if kind != "recbole":
        kind = "jsonl" if re.search(r"\.jsonl?\b", path.name.lower()) else "csv"
    return find_files(path, *PATTERNS[kind]), kind, path


def files(config) -> list[Path]:
    """All that is read."""
    return log_files(config) + item_files(config)[0]


def load(config) -> Interactions:
    """The log of --dataset csv, jsonl, recbole or parquet."""
    parts, items = log_files(config), item_files(config)[0]
    source = name_of(parts) if config.dataset != "parquet" else config.data_dir
    only = tuple(field for field in FIELDS if field != "title" or not items)
    given = parse_columns(config.columns)
    given = {field: name for field, name in given.items() if field in only}
    find = Finder(given, ("user", "item"), only)
    table = read_table(parts, config.dataset, find, Path(config.data_dir))
    labels = table.labels
    print0(f"{source}: columns {', '.join(f'{f}={name}' for f, name in labels.items())}")
    percentile = choose_rating(config, source, labels)
    rows = usable_rows(table, source, bool(percentile), config.scale)
    check_time(rows, source, find, labels)
    doubt = "" if config.scale else rating_doubt(rows.values, "", bool(percentile))
    if doubt and "rating" in labels:
        raise ValueError(f"{source}: column {labels['rating']}: {doubt}")
    say_what_was_read(rows, labels, config.scale)
    if items:
        titles = titles_beside(config, rows)
    elif "title" in labels:
        column = table.columns["title"]
        column = Column(column.codes[rows.kept], column.values)
        titles, several = titles_of(rows.item, len(rows.item_ids), column)
        judge_titles(titles, several, find, table, source)
    else:
        titles = [""] * len(rows.item_ids)
    del table  # a log of 20 million rows takes 500 MB
    pairs = zip(shown(titles, rows), rows.item_ids)
    titles = [clean_title(title) or clean_title(i) for title, i in pairs]
    repeats = "sum" if percentile else "last"  # amounts add up
    interactions = finish(rows, titles, config.dataset, percentile=percentile, repeats=repeats)
    if "rating" not in labels and len(np.unique(interactions.rating)) == 1:
        print0(
            "note: nobody chose an item twice, so all ratings are 3 and none is liked: "
            "--min_rating 3"
        )
    return interactions


def shown(titles: list[str], rows: Rows) -> list[str]:
    """The titles; a note where ids are shown instead."""
    untitled = [i for i, title in zip(rows.item_ids, titles) if not title.strip()]
    if len(untitled) == len(titles):
        print0(
            "note: no titles; a language model sees item ids instead, which tell it nothing "
            "(--columns title=..., --item_file)"
        )
    elif untitled:
        print0(
            f"note: {len(untitled):,} of {len(titles):,} items have no title; their ids are shown, "
            f"first {clean_title(untitled[0])}"
        )
    return titles


def choose_rating(config, source: str, labels: dict[str, str]) -> str:
    """--percentile as the columns ask for it:
    without ratings, and with amounts instead, ranks are ratings."""
    percentile, scale = config.percentile, config.scale
    if "rating" not in labels:
        if scale:
            raise ValueError(
                f"{source}: --scale {scale}, but there is no rating column; "
                "name it with --columns rating=NAME"
            )
        print0(
            "note: no rating column; how often a user chose an item became its rating, "
            "by rank (--percentile)"
        )
        percentile = percentile or "item"
    elif plain_name(labels["rating"]) in AMOUNTS and not percentile and not scale:
        percentile = "item"
        print0(
            f"note: {labels['rating']} are amounts: ranked among those of the same item "
            "they become ratings (--percentile)"
        )
    if "timestamp" not in labels:
        print0(
            "note: no timestamp column (--columns timestamp=NAME); the order of the file is taken "
            "as the order in time"
        )
    return percentile


def check_time(rows: Rows, source: str, find: Finder, labels: dict[str, str]) -> None:
    """ValueError where a column that nobody named holds hours of a day instead of times."""
    name = labels.get("timestamp", "")
    hours = len(rows.time) > 100 and rows.time.max() <= 24 and plain_name(name) != "timestamp"
    if name and "timestamp" not in find.given and hours:
        raise ValueError(
            f"{source}: column {name} holds numbers from {rows.time.min()} to {rows.time.max()}: "
            f"hours of a day? Say {find.option} timestamp=NAME; to use it all the same: "
            f"{find.option} timestamp={name}"
        )


def say_what_was_read(rows: Rows, labels: dict[str, str], scale: str) -> None:
    """What a user should know about a log that was read."""
    for why, count in rows.notes.items():
        print0(f"note: {count:,} {why}")
    highest = 5 if not len(rows.values) else rows.values.max()
    for mark, count in rows.marks.items():
        zero = f"; if 0 is a rating: --scale 0,{highest:g}" if mark == "0" and not scale else ""
        print0(f"note: {count:,} ratings of {mark} count as none{zero}")
    if "timestamp" in labels and len(rows.time) > 1 and np.ptp(rows.time) == 0:
        print0(
            f"note: all times are {rows.time[0] // rows.per_second}: were they rounded by a "
            "spreadsheet (1.5E+12)? The order of the file is taken as the order in time"
        )
