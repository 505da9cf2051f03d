"""Parquet as warehouses write it: the log of a CSV of the same rows, whatever the types."""

import datetime as dt
import decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_datasets import NAMES, json_lines, load, own_csv, put, rows_of

ROWS = [(f"{n % 7}", f"{100 + n % 11}", 1 + n % 5, 1600000000 + 3600 * n, f"T {100 + n % 11}") for n in range(70)]  # noqa: E501  # fmt: skip
MOMENTS = [dt.datetime.fromtimestamp(row[3], dt.UTC) for row in ROWS]


def columns() -> dict[str, list]:
    return dict(zip(NAMES, map(list, zip(*ROWS, strict=True)), strict=True))


def write(file, table: dict, **kwargs):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), file, **kwargs)
    return file


def column(name: str, kind=None) -> pa.Array:
    values = columns()[name]
    return pa.array([*map(int, values)] if name in ("user", "item") else values).cast(kind)


CODES = {name: pa.array(values).dictionary_encode() for name, values in columns().items()}
TYPES = {
    "int64 and uint32 ids": {"user": column("user", pa.int64()), "item": column("item", pa.uint32())},  # noqa: E501
    "float ids": {"user": column("user", pa.float64()), "item": column("item", pa.float32())},
    "ids as large as times": {"user": pa.array([1e12 + int(r[0]) for r in ROWS])},
    "decimal ids": {"item": column("item", pa.decimal128(38, 0))},
    "binary": {"item": pa.array([r[1].encode() for r in ROWS], pa.binary())},
    "dictionaries": {name: CODES[name] for name in ("user", "item", "rating", "title")},
    "decimal ratings": {"rating": pa.array([decimal.Decimal(r[2]) for r in ROWS], pa.decimal128(9, 2))},  # noqa: E501
    "UTC": {"timestamp": pa.array(MOMENTS, pa.timestamp("us", "UTC"))},
    "a zone": {"timestamp": pa.array(MOMENTS, pa.timestamp("ms", "America/New_York"))},
    "no zone": {"timestamp": pa.array([m.replace(tzinfo=None) for m in MOMENTS], pa.timestamp("ns"))},  # noqa: E501
    "milliseconds as a number": {"timestamp": pa.array([r[3] * 1000 for r in ROWS])},
    "texts of times": {"timestamp": pa.array([m.isoformat() for m in MOMENTS])},
}  # fmt: skip


@pytest.mark.parametrize("kind", [*TYPES, "int96", "date32", "date64", "nulls"])
def test_types_of_columns(kind, tmp_path):
    """INT96 is old Spark's; dates are midnights; a null row is left out."""
    rows, table = ROWS, columns() | TYPES.get(kind, {})
    if kind == "int96":
        table["timestamp"] = pa.array(MOMENTS, pa.timestamp("ns"))
    elif kind == "ids as large as times":
        rows = [(str(10**12 + int(row[0])), *row[1:]) for row in ROWS]
    elif kind.startswith("date"):
        table["timestamp"] = pa.array([m.date() for m in MOMENTS], getattr(pa, kind)())
        rows = [(*row[:3], row[3] // 86400 * 86400, row[4]) for row in ROWS]
    elif kind == "nulls":
        table["title"] = [None if n % 3 else title for n, title in enumerate(table["title"])]
        table["rating"][0] = table["timestamp"][-1] = table["user"][1] = None
        rows = [row for n, row in enumerate(ROWS) if n not in (0, 1, 69)]
    old = {"use_deprecated_int96_timestamps": kind == "int96"}
    found = load("parquet", write(tmp_path / "log.parquet", table, **old))
    expected = load("csv", put(tmp_path / "same.csv", own_csv(rows=rows)))
    assert rows_of(found) == rows_of(expected)
    assert found.titles == [f"T {100 + n}" for n in range(11)]


@pytest.mark.parametrize("name, values, culprit", [
    ("user", pa.array([[1]] * 70), "column user: .*list<.*>.*must be text or numbers"),
    ("timestamp", pa.array([dt.time(1)] * 70), "column timestamp: .*time64.*must be"),
    ("rating", pa.nulls(70), "70 rows without rating"),
])  # fmt: skip
def test_columns_that_cannot_be_meant_are_named(name, values, culprit, tmp_path):
    file = write(tmp_path / "log.parquet", columns() | {name: values})
    with pytest.raises(ValueError, match=rf"log\.parquet: .*{culprit}"):
        load("parquet", file)


@pytest.mark.parametrize("content, culprit", [
    (b"", "empty"), (b"user,item\n", "no interaction found"), (b"PAR1" + b"\0" * 99, "as Parquet"),
])  # fmt: skip
def test_what_is_no_parquet_is_refused_by_name(content, culprit, tmp_path):
    with pytest.raises(ValueError, match=rf"log\.parquet: .*{culprit}"):
        load("parquet", put(tmp_path / "log.parquet", content))


@pytest.mark.parametrize("day", ["", "date=2020-01-{:02}/"])
def test_a_folder_of_parts_is_one_log(day, tmp_path):
    """Without times the order is that of the parts, 10 behind 9; a value in a folder's name is a
    column; what Spark leaves beside is none."""
    put(tmp_path / "log/_SUCCESS", "")
    put(tmp_path / "log/_temporary/0/part-9.parquet", "half written")
    names, rows = (*NAMES[:3], "title"), [(*row[:3], row[4]) for row in ROWS]
    for n in range(14):
        place = tmp_path / "log" / day.format(n + 1)
        part = zip(names, map(list, zip(*rows[5 * n : 5 * n + 5])))
        write(place / f"part-{n}-c000.snappy.parquet", dict(part))
        put(place / f".part-{n}-c000.snappy.parquet.crc", b"crc")
    found = rows_of(load("parquet", tmp_path / "log"))
    csv_rows = load("csv", put(tmp_path / "u.csv", own_csv(names, range(4), rows=rows)))
    assert [row[:3] for row in found] == [row[:3] for row in rows_of(csv_rows)]
    days = {1577836800 + 86400 * n for n in range(14)}
    assert not day or {row[3] for row in found} <= days


@pytest.mark.parametrize("files, culprit", [
    ({"notes.txt": None}, r"no parquet file.*notes\.txt"),
    ({"0.parquet": columns(), "_delta_log/0.json": None}, "Delta.*export the table"),
    ({"0.parquet": columns(), "1.parquet": {"who": ["a"], "item": ["b"]}},
     r"1\.parquet: no column user, .*there are \['who', 'item'\]"),
])  # fmt: skip
def test_a_folder_without_parts_or_of_another_kind_is_refused(files, culprit, tmp_path):
    for file, table in files.items():
        write(tmp_path / file, table) if table else put(tmp_path / file, "x")
    with pytest.raises(ValueError, match=culprit):
        load("parquet", tmp_path)


@pytest.mark.parametrize("item_file", ["items", "items/0.parquet", "items.jsonl"])
def test_titles_come_from_a_second_file_or_a_folder(item_file, tmp_path):
    items = [{"id": f"{100 + n}", "name": f"N {n}"} for n in range(11)]
    put(tmp_path / "items/0.parquet", "")
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "items/0.parquet")
    put(tmp_path / "items.jsonl", json_lines(items))
    write(tmp_path / "log.parquet", columns())
    put(tmp_path / "log.csv", own_csv(rows=ROWS))
    for dataset in ("parquet", "csv"):
        found = load(dataset, tmp_path / f"log.{dataset}", item_file=str(tmp_path / item_file))
        assert found.titles == [f"N {n}" for n in range(11)]
