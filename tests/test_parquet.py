"""Parquet as warehouses write it:
the same log as a CSV of the same rows, whatever the types of the columns."""

import datetime as dt
import decimal
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_datasets import load, own_csv, put, rows_of
from test_loaders import check_table

from loaders.frozen import DataConfig, prepare

ROWS = [(f"{n % 7}", f"{100 + n % 11}", 1 + n % 5, 1600000000 + 3600 * n, f"T {100 + n % 11}") for n in range(70)]  # noqa: E501  # fmt: skip
NAMES = ("user", "item", "rating", "timestamp", "title")


def columns(rows=ROWS) -> dict[str, list]:
    return dict(zip(NAMES, map(list, zip(*rows, strict=True)), strict=True))


def write(file, table: dict, **kwargs):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), file, **kwargs)
    return file


def expected(tmp_path, rows=ROWS) -> list[tuple]:
    return rows_of(load("csv", put(tmp_path / "same.csv", own_csv(rows=rows))))


# ------------------------------------------------------------------------------ types
def moments(rows=ROWS) -> list:
    return [dt.datetime.fromtimestamp(row[3], dt.timezone.utc) for row in rows]


def ids(kind, at: int):
    return pa.array([int(row[at]) for row in ROWS]).cast(kind)


TYPES = {
    "int64 ids": {"user": lambda: ids(pa.int64(), 0), "item": lambda: ids(pa.uint32(), 1)},
    "float ids": {"user": lambda: ids(pa.float64(), 0), "item": lambda: ids(pa.float32(), 1)},
    "decimal ids": {"item": lambda: ids(pa.decimal128(38, 0), 1)},
    "large strings": {"user": lambda: pa.array([r[0] for r in ROWS], pa.large_string())},
    "string views": {"user": lambda: pa.array([r[0] for r in ROWS], pa.string_view())},
    "binary": {"item": lambda: pa.array([r[1].encode() for r in ROWS], pa.binary())},
    "dictionaries": {
        "user": lambda: pa.array([r[0] for r in ROWS]).dictionary_encode(),
        "item": lambda: ids(pa.int64(), 1).dictionary_encode(),
        "rating": lambda: pa.array([r[2] for r in ROWS]).dictionary_encode(),
        "title": lambda: pa.array([r[4] for r in ROWS]).dictionary_encode(),
    },
    "decimal ratings": {"rating": lambda: pa.array([decimal.Decimal(r[2]) for r in ROWS], pa.decimal128(9, 2))},  # noqa: E501
    "half floats": {"rating": lambda: pa.array([r[2] for r in ROWS], pa.float32()).cast(pa.float16())},  # noqa: E501
    "texts of numbers": {"rating": lambda: pa.array([f"{r[2]}.0" for r in ROWS])},
    "UTC": {"timestamp": lambda: pa.array(moments(), pa.timestamp("us", "UTC"))},
    "a zone": {"timestamp": lambda: pa.array(moments(), pa.timestamp("ms", "America/New_York"))},
    "no zone": {"timestamp": lambda: pa.array([m.replace(tzinfo=None) for m in moments()], pa.timestamp("ns"))},  # noqa: E501
    "seconds": {"timestamp": lambda: pa.array(moments(), pa.timestamp("s"))},
    "milliseconds as a number": {"timestamp": lambda: pa.array([r[3] * 1000 for r in ROWS])},
    "texts of times": {"timestamp": lambda: pa.array([m.isoformat() for m in moments()])},
}  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_types_of_columns(kind, tmp_path):
    table = columns() | {name: make() for name, make in TYPES[kind].items()}
    interactions = load("parquet", write(tmp_path / "log.parquet", table))
    check_table(interactions)
    assert rows_of(interactions) == expected(tmp_path)
    assert interactions.titles == [f"T {100 + n}" for n in range(11)]


def test_int96_and_dates(tmp_path):
    """Old Spark's and Impala's timestamps; dates are midnights."""
    table = columns() | {"timestamp": pa.array(moments(), pa.timestamp("ns"))}
    file = write(tmp_path / "log.parquet", table, use_deprecated_int96_timestamps=True)
    assert rows_of(load("parquet", file)) == expected(tmp_path)
    for kind in (pa.date32(), pa.date64()):
        days = pa.array([m.date() for m in moments()], kind)
        file = write(tmp_path / "days.parquet", columns() | {"timestamp": days})
        times = {t for *_, t in rows_of(load("parquet", file))}
        assert times == {r[3] // 86400 * 86400 for r in ROWS}


def test_uuids_are_ids(tmp_path):
    made = [uuid.UUID(int=int(r[0]) + 1) for r in ROWS]
    table = columns() | {"user": pa.array([u.bytes for u in made], pa.binary(16))}
    interactions = load("parquet", write(tmp_path / "log.parquet", table))
    assert set(interactions.user_ids) == {str(u) for u in made}


def test_nulls(tmp_path):
    """A null title is none, and a few null rows are left out; a column of nulls is an error."""
    table = columns(ROWS * 5)
    table["title"] = [None if n % 3 else title for n, title in enumerate(table["title"])]
    table["rating"] = [None, *table["rating"][1:]]
    table["timestamp"] = [*table["timestamp"][:-1], None]
    interactions = load("parquet", write(tmp_path / "log.parquet", table))
    assert (
        interactions.titles == [f"T {100 + n}" for n in range(11)] and len(interactions.user) == 70
    )
    for name in ("user", "rating"):
        empty = columns() | {name: pa.nulls(len(ROWS))}
        with pytest.raises(ValueError, match=r"log\.parquet"):
            load("parquet", write(tmp_path / "log.parquet", empty))


@pytest.mark.parametrize(
    "name, values, culprit",
    [
        ("user", pa.array([[1]] * 70), "column user: list<.*> is neither a text nor a number"),  # noqa: E501
        ("item", pa.array([{"id": 1}] * 70), "column item: struct<.*> is neither"),
        ("rating", pa.array([dt.date(2020, 1, 1)] * 70), "column rating: 70 values are no numbers"),  # noqa: E501
        ("timestamp", pa.array([dt.time(1)] * 70), "column timestamp: time64.* is no moment"),
        ("item", pa.array([b"\xff\xfe"] * 70), "column item: 70 values are no item ids"),
        ("item", pa.array([1.5] * 70), "column item: .* 1.5"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_meant_are_named(name, values, culprit, tmp_path):
    file = write(tmp_path / "log.parquet", columns() | {name: values})
    with pytest.raises(ValueError, match=rf"log\.parquet: .*{culprit}"):
        load("parquet", file)


# ------------------------------------------------------------------------------ folders
def test_a_folder_of_parts_is_one_log(tmp_path):
    """Spark's names, its _SUCCESS and .crc files, a folder per day; 10 comes after 9."""
    for n in range(14):
        part = columns(ROWS[5 * n : 5 * n + 5])
        write(tmp_path / f"log/part-{n}-c000.snappy.parquet", part)
        put(tmp_path / f"log/.part-{n}-c000.snappy.parquet.crc", b"crc")
    put(tmp_path / "log/_SUCCESS", "")
    put(tmp_path / "log/_temporary/0/part-9.parquet", "half written")
    assert rows_of(load("parquet", tmp_path / "log")) == expected(tmp_path)
    no_times = [n for n in NAMES if n != "timestamp"]
    for n in range(14):
        part = columns(ROWS[5 * n : 5 * n + 5])
        write(tmp_path / f"untimed/{n}.parquet", {name: part[name] for name in no_times})
    kept = [(user, item, rating, title) for user, item, rating, _, title in ROWS]
    text = own_csv(("user", "item", "rating", "title"), (0, 1, 2, 3), rows=kept)
    same = load("csv", put(tmp_path / "u.csv", text))
    untimed = rows_of(load("parquet", tmp_path / "untimed"))
    assert [row[:3] for row in untimed] == [row[:3] for row in rows_of(same)]


def test_values_in_the_names_of_folders_are_columns(tmp_path):
    days = sorted({str(m.date()) for m in moments()})
    for day in days:
        rows = [r for r, m in zip(ROWS, moments(), strict=True) if str(m.date()) == day]
        part = columns(rows)
        del part["timestamp"]
        write(tmp_path / f"log/date={day}/part-0.parquet", part)
    interactions = load("parquet", tmp_path / "log")
    assert {t for *_, t in rows_of(interactions)} == {r[3] // 86400 * 86400 for r in ROWS}


def test_a_folder_without_parts_or_of_another_kind_is_refused(tmp_path):
    put(tmp_path / "empty/notes.txt", "x")
    with pytest.raises(ValueError, match=r"no \.parquet file.*notes\.txt"):
        load("parquet", tmp_path / "empty")
    with pytest.raises(ValueError, match=r"nowhere: no \.parquet file"):
        load("parquet", tmp_path / "nowhere")
    write(tmp_path / "delta/part-0.parquet", columns())
    put(tmp_path / "delta/_delta_log/0.json", "{}")
    with pytest.raises(ValueError, match="Delta Lake.*export it"):
        load("parquet", tmp_path / "delta")
    write(tmp_path / "two/0.parquet", columns())
    write(tmp_path / "two/1.parquet", {"who": ["a"], "item": ["b"]})
    with pytest.raises(ValueError, match=r"two: which column is the user\?.*\['item'\]"):
        load("parquet", tmp_path / "two")


# ------------------------------------------------------------------------------ reading
def test_titles_come_from_a_second_file(tmp_path):
    table = columns()
    del table["title"]
    items = {"id": [f"{100 + n}" for n in range(11)], "name": [f"N {n}" for n in range(11)]}
    log_file = write(tmp_path / "log.parquet", table)
    write(tmp_path / "items.parquet", items)
    write(tmp_path / "items/part-0.parquet", items)
    for item_file in ("items.parquet", "items"):
        read = load("parquet", log_file, item_file=str(tmp_path / item_file))
        assert read.titles == [f"N {n}" for n in range(11)]
    log_file = put(tmp_path / "log.csv", own_csv())
    (tmp_path / "items.parquet").unlink()
    write(tmp_path / "items.parquet", {"item": [7, 8], "title": ["seven", "eight"]})
    assert load("csv", log_file, item_file=str(tmp_path / "items.parquet")).titles == [
        "seven",
        "eight",
    ]


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"user,item\n1,2\n", b"PAR1" + b"\0" * 100 + b"PAR1"]
)
def test_what_is_no_parquet_is_refused_by_name(content, tmp_path):
    with pytest.raises(ValueError, match=r"log\.parquet: cannot be read as Parquet"):
        load("parquet", put(tmp_path / "log.parquet", content))


def test_parquet_and_csv_give_one_hash_but_for_the_name(tmp_path):
    """The same users, items, times and examples; a changed part is prepared anew."""
    rows = [(f"u{n % 6}", f"{n % 41}", 3 + n % 3, 1600000000 + n, f"T{n % 41}") for n in range(120)]
    prepared = []
    for count in (100, 120):
        write(tmp_path / "log/p-0.parquet", columns(rows[:count]))
        config = DataConfig(
            dataset="parquet", data_dir=str(tmp_path / "log"), prepared_dir=str(tmp_path / "p"),
            followers=2, min_history=1,
        )  # fmt: skip
        prepared.append(prepare(config))
    assert prepared[0].hash != prepared[1].hash
    file = put(tmp_path / "log.csv", own_csv(rows=rows))
    config = DataConfig(
        dataset="csv", data_dir=str(file), prepared_dir=str(tmp_path / "p"),
        followers=2, min_history=1,
    )  # fmt: skip
    same = prepare(config)
    assert rows_of(same.interactions) == rows_of(prepared[1].interactions)
    assert (same.splits["test"].candidates == prepared[1].splits["test"].candidates).all()
