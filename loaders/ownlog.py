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
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common import print0
from data import Interactions
from loaders.files import SPLIT_NAMES, find_files, matching_files, name_of, visible_files
from loaders.table import Rows, clean_title, finish, usable_rows
from loaders.tables import brief, check_bad, read_table, shorten
from loaders.values import ABSENT_TEXTS, ABSENT_TITLES, Column, id_text, rating_doubt, read_ids

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
        found, there = {}, f"there are {brief(names)}"
        for field in self.only:
            name = self.given.get(field)
            if name is not None and name not in names and self.strict:
                raise ValueError(f"{source}: {self.option} {field}={name}: no such column; {there}")
            if name not in names:
                name = self.usual_name(field, names, source) if self.usual else ""
            if name:
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
        """The name of the column that is likely to hold a field; "" if there is none."""
        free = [(name, (name.lower(), plain_name(name))) for name in dict.fromkeys(names)]
        usual = USUAL.get(field, "").split() + ["id"] * (
            field == "item" and "user" not in self.only
        )
        for pattern in usual:
            fits = [n for n, texts in free if any(re.fullmatch(pattern, text) for text in texts)]
            fits = [name for name in fits if name not in self.given.values()]
            if len(fits) > 1 and field == "timestamp":
                raise ValueError(
                    f"{source}: which column is the time? Say {self.option} timestamp=NAME; it "
                    f"could be {' or '.join(brief(sorted(fits)))}; there are {brief(names)}"
                )
            if fits:
                return fits[0]
        return ""

    def check_required(self, found: dict, names: list[str], source) -> None:
        """ValueError where a field is missing, with options that say which column it is."""
        missing = [field for field in self.required if field not in found]
        if not missing:
            return
        if len(names) == 1 and re.fullmatch(r"\d+:", names[0]):
            raise ValueError(
                f"{source}: Netflix's form, each movie's number on a line of its own; make a table "
                "of it: awk -F: '/:$/ {m = $1; next} {print m \",\" $0}' FILE > log.csv, and give "
                "--columns item=1,user=2,rating=3,timestamp=4"
            )
        ways, there = ",".join(f"{field}=NAME" for field in missing), brief(names)
        count = min(len(names), 4) if "user" in self.only else len(self.only)
        example = ",".join(f"{f}={n}" for n, f in enumerate(self.only[: max(2, count)], 1))
        raise ValueError(
            f"{source}: which column is the {missing[0]}? Say {self.option} {ways}; there are "
            f"{there}. If the file has no header line, count its columns: {self.option} {example}"
        )

    def in_rows(self, rows: list[list[str]], source) -> tuple[dict[str, str], dict[str, int], bool]:
        """Of a table's first rows: field -> name, field -> place, whether the first names them: it
        holds a usual name, or text above numbers."""
        first, *below = rows
        if not self.given or not all(name.isdigit() for name in self.given.values()):
            labels = self.by_name(first, source)
            return labels, {field: first.index(name) for field, name in labels.items()}, True
        numbers, named = [str(n) for n in range(1, len(first) + 1)], False
        labels = replace(self, usual=False).by_name(numbers, source)
        places = {field: numbers.index(number) for field, number in labels.items()}
        for field, place in places.items():
            name, values = first[place], [row[place] for row in below if len(row) > place]
            text = not NUMBER.fullmatch(name) and name not in ABSENT_TEXTS
            above = sum(bool(NUMBER.fullmatch(value)) for value in values) > len(values) / 2
            named = named or (text and above) or plain_name(name) in USUAL[field].split()
        labels = {f: first[place] for f, place in places.items()} if named else labels
        return labels, places, named


NUMBER = re.compile(r"[-+]?\d[\d.,:/TZ\s-]*")  # or a time


# ------------------------------------------------------------------------------------------- titles
def titles_of(codes: np.ndarray, num_items: int, column: Column) -> tuple[list[str], dict]:
    """The title of each item, "" for none, of several the first in the alphabet;
    and two titles of those that have several. Codes (n,) of -1 are no items."""
    texts = [value if isinstance(value, str) else id_text(value) or "" for value in column.values]
    order = sorted({text for text in texts if text.strip() not in ABSENT_TITLES})
    rank, none = {text: n for n, text in enumerate(order)}, len(order)
    place = np.array([*(rank.get(text, none) for text in texts), none])[column.codes]
    low = np.full(num_items + 1, none)
    low[codes] = place
    differ = np.flatnonzero(low[codes] != place)
    high = np.where(low < none, low, -1)
    np.minimum.at(low, codes[differ], place[differ])
    differ = differ[place[differ] < none]
    np.maximum.at(high, codes[differ], place[differ])
    several = np.flatnonzero(low[:-1] < high[:-1]).tolist()
    titles = [*map([*order, ""].__getitem__, low[:-1].tolist())]
    return titles, {i: (titles[i], order[high[i]]) for i in several}


def judge_titles(titles: list[str], several: dict, find: Finder, label: str, source: str) -> None:
    """Say where the titles are hardly the items'; ValueError if nobody named the column and a
    fifth of the items has several."""
    known = Counter(filter(None, titles))
    total = known.total()
    if several:
        such = "; ".join(f"{a!r} and {b!r}" for a, b in list(several.values())[:2])
        many = f"{len(several):,} of {total:,} items have more than one title in column {label}"
        if len(several) >= 5 and len(several) > total / 5 and "title" not in find.given:
            raise ValueError(
                f"{source}: {many}, such as {such}: reviews' or customers' names? Name another "
                f"with {find.option} title=NAME, or a second file with --item_file; to use it all "
                f"the same: {find.option} title={label}"
            )
        print0(f"note: {many}, such as {such}; the first in the alphabet is shown")
    if total >= 10 and len(known) <= total / 2:
        ((shared, times),) = known.most_common(1)
        few = f"{total:,} items have only {len(known):,} different titles in column {label}"
        print0(f"note: {few}; {times:,} are called {shorten(shared)!r}")


def titles_beside(config, rows: Rows) -> list[str]:
    """The titles of the log's items in the second file, "" where it has none."""
    files, kind, root = item_files(config)
    source, given = name_of(files), parse_item_columns(config.item_columns)
    if not given:  # names of --columns that the second file has, too
        names = parse_columns(config.columns)
        given = {f: names[f] for f in ("item", "title") if f in names and not names[f].isdigit()}
    find = Finder(given, ("item", "title"), ("item", "title"), "--item_columns")
    find.strict = bool(config.item_columns)
    table = check_bad(read_table(files, kind, find, root), source)
    codes, ids = read_ids(table.columns["item"])
    known = {text: code for code, text in enumerate(rows.item_ids)}
    numbers = [number_in(text) for text in rows.item_ids]
    counts, by_number = Counter(numbers), dict(zip(numbers, range(len(numbers))))
    by_number = {number: code for number, code in by_number.items() if counts[number] == 1}
    near = {t: by_number.get(number_in(t) or None, -1) for t in ids if t not in known}
    places = np.array([*((known | near)[text] for text in ids), -1, -1])[codes]
    titles, several = titles_of(places, len(rows.item_ids), table.columns["title"])
    judge_titles(titles, several, find, table.labels["title"], source)

    have, file = sum(map(bool, titles)), Path(source).name
    ours = " and ".join([repr(i) for i, title in zip(rows.item_ids, titles) if not title][:2])
    theirs = " and ".join([repr(text) for text, code in near.items() if code < 0][:2])
    what = f"the log has {ours}, the file has {theirs or 'none but those'}"
    if not have:
        raise ValueError(
            f"{source}: none of the {len(titles):,} items of {rows.source} has a title in it; "
            f"{what}: write the ids alike, or name the right columns with --columns item=NAME "
            "and --item_columns item=NAME,title=NAME"
        )
    if rewritten := [(rows.item_ids[c], text) for text, c in near.items() if c >= 0 and titles[c]]:
        how = "the log has {}, the file has {}".format(*rewritten[0])
        print0(f"note: {len(rewritten):,} item ids of {file} were matched as numbers: {how}")
    if have < len(titles) / 2:
        print0(f"note: only {have:,} of {len(titles):,} items are in {file}: {what}")
    return titles


def number_in(name: str) -> str:
    """The digits of an id that is a whole number, without leading zeros and ".0"; else ""."""
    return re.sub(r"^0+(?=\d)|\.0*$", "", name) if re.fullmatch(r"\d+(\.0*)?", name) else ""


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
        return found if len(found) == 1 else [], kind, path
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
    given = {f: name for f, name in parse_columns(config.columns).items() if f in only}
    find = Finder(given, ("user", "item"), only)
    table = read_table(parts, config.dataset, find, Path(config.data_dir))
    labels, column = table.labels, table.columns.get("title")
    print0(f"{source}: columns {', '.join(f'{f}={name}' for f, name in labels.items())}")
    percentile = choose_rating(config, source, labels)
    repeats = "sum" if percentile else "last"  # amounts add up
    rows = usable_rows(table, source, bool(percentile), config.scale)
    del table  # a log of 20 million rows takes 500 MB
    for why, count in rows.notes.items():
        zeros = why.startswith("rows without rating (0 ") and not config.scale
        way_out = f"; if 0 is a rating: --scale 0,{max(rows.values, default=5):g}" * zeros
        print0(f"note: {count:,} {why}{way_out}")
    check_times(rows, source, find, labels.get("timestamp", ""))
    doubt = "" if config.scale else rating_doubt(rows.values, "", bool(percentile))
    if doubt and "rating" in labels:
        raise ValueError(f"{source}: column {labels['rating']}: {doubt}")
    titles = [""] * len(rows.item_ids)
    if items:
        titles = titles_beside(config, rows)
    elif column:
        codes = column.codes if rows.kept.all() else column.codes[rows.kept]
        titles, several = titles_of(rows.item, len(titles), Column(codes, column.values))
        judge_titles(titles, several, find, labels["title"], source)
    untitled = [i for i, title in zip(rows.item_ids, titles) if not title.strip()]
    if len(untitled) == len(titles):
        print0("note: no titles: ids tell a model nothing (--columns title=NAME, --item_file)")
    elif untitled:
        few, first = f"{len(untitled):,} of {len(titles):,} items", clean_title(untitled[0])
        print0(f"note: {few} have no title; their ids are shown, first {first}")
    titles = [clean_title(t) or clean_title(i) for t, i in zip(titles, rows.item_ids)]
    interactions = finish(rows, titles, config.dataset, percentile=percentile, repeats=repeats)
    if "rating" not in labels and np.ptp(interactions.rating) == 0:
        print0("note: nobody chose an item twice: all ratings are 3, none is liked: --min_rating 3")
    return interactions


def choose_rating(config, source: str, labels: dict[str, str]) -> str:
    """--percentile as the columns ask for it: without ratings, and with amounts
    instead, ranks are ratings."""
    percentile, scale = config.percentile, config.scale
    if "rating" not in labels and scale:
        what = "there is no rating column; name it with --columns rating=NAME"
        raise ValueError(f"{source}: --scale {scale}, but {what}")
    if "rating" not in labels:
        print0("note: no rating column: repeats are counted, and ranked as ratings (--percentile)")
        return percentile or "item"
    name = labels["rating"]
    if plain_name(name) in AMOUNTS and not percentile and not scale:
        print0(f"note: {name} are amounts; their ranks within an item are ratings (--percentile)")
        return "item"
    return percentile


def check_times(rows: Rows, source: str, find: Finder, label: str) -> None:
    """Say where the order in time is that of the file; ValueError where a column that nobody named
    holds hours of a day instead of times."""
    first, last, order = (
        rows.time.min(),
        rows.time.max(),
        "the order of the file is the one in time",
    )
    known = not label or "timestamp" in find.given or plain_name(label) == "timestamp"
    if len(rows.time) > 100 and last <= 24 and not known:
        raise ValueError(
            f"{source}: column {label} holds numbers from {first} to {last}: hours of a day? Say "
            f"{find.option} timestamp=NAME; to use it all the same: {find.option} timestamp={label}"
        )
    if not label:
        print0(f"note: no timestamp column (--columns timestamp=NAME); {order}")
    elif first == last and len(rows.time) > 1:
        rounded = "were they rounded by a spreadsheet (1.5E+12)?"
        print0(f"note: all times are {first // rows.per_second}: {rounded} Now {order}")
