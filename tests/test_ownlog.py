"""Own logs as people have them: headerless files, other scales, marks of absence, CSV dialects,
joins that go wrong.

Every file is made here, in the shapes that spreadsheets, warehouses and older data sets write."""

import csv
import json
import re
import time

import numpy as np
import pytest
from test_datasets import put, rows_of

from loaders.files import CsvRows, table_chunks
from loaders.frozen import DataConfig, load_interactions, prepare
from loaders.values import NumberStyle, parse_scale, parse_times, read_times

NAMES = ["user_id", "item_id", "rating", "timestamp", "title"]
ROWS = [
    (str(u), str(i), str(1 + (u * i) % 5), str(1_500_000_000 + 1000 * u + i), f"Film, {i}")
    for u in range(1, 9)
    for i in range(1, 41)
    if (u + i) % 3
]


def table(rows=ROWS, names=NAMES, delimiter=",", end="\n", **quoting) -> str:
    lines = []

    class Out:
        write = staticmethod(lines.append)

    csv.writer(Out, delimiter=delimiter, lineterminator=end, **quoting).writerows(
        [names, *rows] if names else rows
    )
    return "".join(lines)


def changed(column: int, change) -> list[tuple]:
    """ROWS with one column rewritten."""
    return [row[:column] + (change(row[column]),) + row[column + 1 :] for row in ROWS]


def load(file, **options):
    return load_interactions(DataConfig(**({"dataset": "csv", "data_dir": str(file)} | options)))


@pytest.fixture
def sound(tmp_path):
    return load(put(tmp_path / "sound.csv", table()))


def same(interactions, other) -> bool:
    return rows_of(interactions) == rows_of(other) and list(interactions.titles) == list(
        other.titles
    )


# ------------------------------------------------------------------------ positions
@pytest.mark.parametrize("first", [("2", "1", "3"), ("196", "242", "3"), ("1", "2", "3")])
def test_numbers_are_positions_whatever_the_first_row_holds(first, tmp_path):
    """A first row that holds the very numbers of the columns is a row."""
    rows = [first, *(row[:3] for row in ROWS if row[:2] != first[:2])]
    for delimiter in ",\t|;":
        file = put(tmp_path / "u.data", table(rows, None, delimiter))
        interactions = load(file, columns="user=1,item=2,rating=3")
        assert len(interactions.user) == len(rows)
        assert {(u, i) for u, i, *_ in rows_of(interactions)} == {row[:2] for row in rows}


@pytest.mark.parametrize(
    "names", [NAMES, ["c1", "c2", "c3", "c4", "c5"], ["a", "b", "c", "d", "e"]]
)
def test_a_header_under_positions_is_text_where_numbers_must_be(names, sound, tmp_path):
    file = put(tmp_path / "a.csv", table(names=names))
    assert same(load(file, columns="user=1,item=2,rating=3,timestamp=4,title=5"), sound)
    ids = load(file, columns="user=1,item=2")  # text above numbers
    assert len(ids.user) == len(ROWS)


def test_item_files_without_header_are_named_by_position(sound, tmp_path):
    """Pipes and latin-1, as MovieLens-100k has them;
    the error without --item_columns says the command."""
    log_file = put(tmp_path / "u.data", table([row[:4] for row in ROWS], None, "\t"))
    items = "".join(f"{i}|Caf\xe9 {i} (1995)|01-Jan-1995||http://x|0|1\n" for i in range(1, 41))
    options = {
        "columns": "user=1,item=2,rating=3,timestamp=4",
        "item_file": str(put(tmp_path / "u.item", items.encode("latin-1"))),
    }
    with pytest.raises(ValueError, match="--item_columns") as error:
        load(log_file, **options)
    found = load(
        log_file,
        **options,
        item_columns=re.findall(r"--item_columns (\S+)", str(error.value))[-1],
    )
    assert rows_of(found) == rows_of(sound)
    assert list(found.titles)[0] == "Caf\xe9 1 (1995)"
    with pytest.raises(ValueError, match="asks for column 9, the first line has 7"):
        load(log_file, **options, item_columns="item=1,title=9")
    with pytest.raises(ValueError, match="--item_columns names the columns of --item_file"):
        DataConfig(dataset="csv", item_columns="item=1")


# ------------------------------------------------------------------------ scales
def refusal(file, **options) -> str:
    with pytest.raises(ValueError) as error:
        load(file, **options)
    return str(error.value)


def advised(message: str) -> list[tuple[str, str]]:
    """The options that a message proposes."""
    return re.findall(r"--(scale|percentile) ([-\w.,]*\w)", message)


@pytest.mark.parametrize(
    "change, ends, first",
    [
        (lambda r: str(int(int(r) > 3)), (0, 1), "binary"),
        (lambda r: "true" if int(r) > 3 else "false", (0, 1), "binary"),
        (lambda r: str(int(r) / 5), (0, 1), "0,1"),
        (lambda r: str(int(r) * 2), (1, 10), "1,10"),
        (lambda r: str(int(r) * 2.5 - 2.5), (0, 10), "0,10"),
        (lambda r: str(int(r) * 20), (0, 100), "0,100"),
        (lambda r: str((int(r) + 1) // 2), (1, 3), "1,3"),
        (lambda r: str(int(r) - 1), (0, 4), "0,4"),
        (lambda r: str(1 if int(r) > 3 else -1), (-1, 1), "-1,1"),
        (lambda r: str(5 * int(r) - 15), (-10, 10), "-10,10"),
    ],
)  # fmt: skip
def test_another_scale_is_refused_with_the_option_that_maps_it(change, ends, first, tmp_path):
    """Every option that the message proposes works;
    the first maps linearly, and the statistics name it."""
    rows = changed(2, change)
    file = put(tmp_path / "a.csv", table(rows))
    message = refusal(file, min_rating=1)
    assert "rating" in message and advised(message)[0] == ("scale", first), message
    for name, value in advised(message):
        assert load(file, **{name: value}).notes is not None
    low, high = ends
    number = {"true": 1, "false": 0}
    expected = [1 + 4 * (float(number.get(row[2], row[2])) - low) / (high - low) for row in rows]
    interactions = load(file, scale=first)
    by_pair = {(u, i): r for u, i, r, _ in rows_of(interactions)}
    found = [by_pair[row[:2]] for row in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert interactions.notes[f"ratings of {low} to {high} mapped to 1 to 5 (--scale)"] == len(rows)


def test_likes_as_json_booleans(tmp_path):
    lines = [{"user": r[0], "item": r[1], "rating": int(r[2]) > 3} for r in ROWS]
    file = put(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert advised(refusal(file, dataset="jsonl")) == [("scale", "binary")]
    ratings = load(file, dataset="jsonl", scale="binary").rating
    assert np.bincount(ratings.astype(int))[[1, 5]].sum() == len(ROWS)


def test_scales_that_do_not_fit_are_refused(tmp_path):
    for text in ("1", "5,1", "0,x", "0,inf", "low,high", "1,2,3"):
        with pytest.raises(ValueError, match="--scale"):
            parse_scale(text)
    with pytest.raises(ValueError, match="--scale maps ratings, --percentile ranks"):
        DataConfig(dataset="csv", scale="0,10", percentile="item")
    with pytest.raises(ValueError, match="--scale has no effect with --dataset movielens"):
        DataConfig(dataset="movielens", scale="0,10")
    file = put(tmp_path / "a.csv", table())
    assert "outside --scale 0,1: ratings from 1 to 5" in refusal(file, scale="0,1")
    assert "values other than 0 and 1" in refusal(file, scale="binary")
    clicks = put(tmp_path / "b.csv", table([row[:2] for row in ROWS], NAMES[:2]))
    assert "no rating column" in refusal(clicks, scale="0,10")


# ------------------------------------------------------------------------ absence
@pytest.mark.parametrize("mark", ["", "\\N", "NA", "null", "NULL", "NaN", "None", "-1", "#N/A"])
def test_absent_values_are_counted_and_never_ids_or_titles(mark, tmp_path, capsys):
    """A mark leaves its row out where user, item, rating or time is absent;
    a title is then none."""
    rows = [list(row) for row in ROWS]
    for column in range(4):
        rows[10 * column][column] = mark
    for row in rows:
        row[4] = mark if row[1] == "7" else row[4]
    interactions = load(put(tmp_path / "a.csv", table(rows)))
    assert len(interactions.user) == len(ROWS) - 4 == len(ROWS) - sum(interactions.notes.values())
    reasons = {re.sub(r" \(.*", "", why) for why in interactions.notes}
    assert reasons == {f"lines without {name}" for name in ("user", "item", "rating", "time")}
    assert mark not in interactions.user_ids + interactions.item_ids
    assert interactions.titles[interactions.item_ids.index("7")] == "7"
    assert "1 of 40 items have no title" in capsys.readouterr().out


def test_zero_is_a_rating_only_where_the_scale_has_it(tmp_path, capsys):
    rows = changed(2, lambda r: str(5 * (int(r) - 1) // 4))  # 0 to 5
    file = put(tmp_path / "a.csv", table(rows))
    zeros = sum(row[2] == "0" for row in rows)
    interactions = load(file)
    assert len(interactions.user) == len(rows) - zeros and sum(interactions.notes.values()) == zeros
    said = capsys.readouterr().out
    assert f"{zeros} ratings of 0 count as none; if 0 is a rating: --scale 0,5" in said
    assert len(load(file, scale="0,5").user) == len(rows)
    assert len(load(file, scale="1,5").user) == len(rows) - zeros


def test_a_log_of_nothing_but_absence_says_so(tmp_path):
    message = refusal(put(tmp_path / "a.csv", table(changed(0, lambda _: "NULL"))))
    assert f"no interaction found in {len(ROWS)} lines ({len(ROWS)} lines without user)" in message


# ------------------------------------------------------------------------ CSV
def test_line_breaks_inside_quotes(sound, tmp_path):
    """However many lines, whatever they hold: the same log as without the text."""
    texts = [
        "ok, fine",
        "Nice, really.\nAgain, and, again, and, again\nBye",
        "line\n" * 70,
        "a\r\nb",
    ]
    rows = [(*row, texts[n % 4]) for n, row in enumerate(ROWS)]
    for order in (slice(None), slice(None, None, -1)):
        text = table([row[order] for row in rows], [*NAMES, "text"][order])
        assert same(load(put(tmp_path / "a.csv", text)), sound)


@pytest.mark.parametrize("title", ['Film "uncut", 1', '"1', '1"', '"a", "b"', "C:\\1", '5" disk'])
@pytest.mark.parametrize("quoting", [csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
def test_quotes_escaped_by_a_backslash_or_doubled(title, quoting, tmp_path):
    """Spark and MySQL write \\", the others write two quotes; the file does not say which."""
    rows = changed(4, lambda t: f"{title} {t}")
    expected = {f"{title} Film, {i}" for i in range(1, 41)}
    doubled = put(tmp_path / "a.csv", table(rows, quoting=quoting))
    assert set(load(doubled).titles) == expected
    slashed = [row[:4] + (row[4].replace("\\", "\\\\").replace('"', "\0"),) for row in rows]
    text = table(slashed, quoting=quoting).replace("\0", '\\"')
    if quoting == csv.QUOTE_ALL:
        assert set(load(put(tmp_path / "b.csv", text)).titles) == (
            expected if '"' in title else {t.replace("\\", "\\\\") for t in expected}
        )


def test_records_are_those_of_the_csv_module():
    """Random tables, written by the csv module in every quoting: read back row by row."""
    rng = np.random.default_rng(0)
    pieces = ["", "a", "b c", ",", '"', '""', "\n", "\\", "é", "5", " "]
    for n in range(300):
        rows = [["x", "y", "z"]] + [
            ["".join(rng.choice(pieces, rng.integers(5))).rstrip() for _ in range(3)]
            for _ in range(rng.integers(1, 8))
        ]
        text = table(rows, None, quoting=(csv.QUOTE_ALL, csv.QUOTE_MINIMAL)[n % 2])
        assert list(CsvRows(text.split("\n")[:-1], ",")) == rows, text


def joined(chunks) -> dict:
    """Line numbers, bad lines and columns of all chunks one behind the other."""
    found: dict = {"numbers": [], "bad": []}
    for numbers, columns, bad in chunks:
        found["numbers"] += numbers
        found["bad"] += bad
        for name, values in columns.items():
            found[name] = found.get(name, []) + list(values)
    return found


def test_records_do_not_depend_on_the_lines_read_together():
    """Random lines, stray quotes among them: record by record, block by block, or column by column
    where a block holds no quote."""
    rng = np.random.default_rng(1)
    pieces = ["a", ",", ",", '"', "\\", "\r", "\0", "\n", "é", "x" * 9]
    positions = {"a": 0, "b": 1, "c": 2}
    for _ in range(300):
        odds = np.array([3, 3, 3, *rng.choice([0, 0, 1], 5), 1, 1], float)
        lines = [
            "".join(rng.choice(pieces, rng.integers(9), p=odds / odds.sum())) for _ in range(12)
        ]
        rows = list(CsvRows(lines, ",", block=10**6))
        columns = joined(table_chunks(iter(rows), positions, 3, 1))
        for block in (1, 2, 5):
            assert list(CsvRows(lines, ",", block)) == rows, lines
            assert joined(table_chunks(CsvRows(lines, ",", block), positions, 3, 1)) == columns


def test_a_first_record_that_is_none_has_no_width():
    """Records behind it may still have line breaks, however many lines are read together."""
    lines = ['"a"b"', 'd,"e', 'f"', "g,h"]
    for block in (1, 2, 3, 4):
        first, *others = CsvRows(lines, ",", block)
        assert first == ['a quote is not closed: "a"b"'] and others == [["d", "e\nf"], ["g", "h"]]


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_line_ends_and_marks_of_encoding(end, encoding, sound, tmp_path):
    assert same(load(put(tmp_path / "a.csv", table(end=end).encode(encoding))), sound)


def test_stray_quotes_do_not_take_time(tmp_path):
    """20,000 rows of which every tenth opens a quote for nothing are read through in a moment."""
    lines = [f"u{n % 9},i{n},3,{n},{chr(34) if n % 10 == 0 else ''}T{n}" for n in range(20_000)]
    started = time.process_time()
    rows = list(CsvRows(["a,b,c,d,e", *lines], ","))
    assert sum(len(row) == 5 for row in rows) == 18_001
    assert time.process_time() - started < 5


def test_two_columns_of_one_name_are_an_error(tmp_path):
    """Where the name is in use; the positions that the message proposes work."""
    file = put(tmp_path / "a.csv", table(names=["user_id", "item_id", "rating", "rating", "title"]))
    message = refusal(file)
    assert "2 columns are named rating" in message
    columns = re.search(r"--columns (\S+)$", message)[1]
    assert columns == "user=1,item=2,rating=3,title=5"
    assert len(load(file, columns=columns).user) == len(ROWS)


def test_a_missing_column_says_a_command_that_works(tmp_path):
    file = put(tmp_path / "a.csv", table([row[:3] for row in ROWS], None))
    columns = re.search(r"count its columns: --columns (\S+)", refusal(file))[1]
    assert len(load(file, columns=columns).user) == len(ROWS)


# ------------------------------------------------------------------------ numbers and times
@pytest.mark.parametrize(
    "texts, delimiter, numbers",
    [
        (["3,5", "4"], ";", [3.5, 4]),
        (["3,500", "4"], ";", [3.5, 4]),
        (["3,5", "1,25"], ",", [3.5, 1.25]),
        (["2,800.0", "700.0"], ",", [2800, 700]),
        (["1,234,567", "12"], "\t", [1234567, 12]),
        (["1.234,5", "1.234", "2,5"], ";", [1234.5, 1234, 2.5]),
        (["1 234,5", "1\u00a0234"], ";", [1234.5, 1234]),
        (["1'234.5", "5"], ",", [1234.5, 5]),
    ],
)
def test_numbers_with_commas_are_read_as_the_column_writes_them(texts, delimiter, numbers):
    assert NumberStyle(delimiter).numbers(texts).tolist() == numbers


def test_decimal_commas_in_a_file(tmp_path):
    rows = changed(2, lambda r: r.replace("1", "0,5").replace("3", "2,5"))
    interactions = load(put(tmp_path / "a.csv", table(rows, delimiter=";")))
    assert sorted(set(interactions.rating.tolist())) == [0.5, 2, 2.5, 4, 5]
    hours = changed(2, lambda r: f"{int(r) * 700:,}.0")
    ranked = load(put(tmp_path / "b.csv", table(hours, ["user", "item", "hours", "time", "title"])))
    plain = load(put(tmp_path / "c.csv", table()), percentile="item")
    assert rows_of(ranked) == rows_of(plain)


@pytest.mark.parametrize(
    "text",
    ["2017-07-14 20:09:44 UTC", "2017/07/14 20:09:44", "2017-07-14 20:09:44.000 UTC", "2017.07.14 20:09:44",  # noqa: E501
     "2017-07-14T20:09:44Z", "2017-07-14 20:09:44+00", "2017-07-14 22:09:44 +0200", "2017-07-14 20:09:44 +0000 UTC",  # noqa: E501
     "2017/7/14 20:09:44", "1,500,062,984", "1500062984.0", "1.500062984E9"],
)  # fmt: skip
def test_times_with_the_year_first_are_read(text):
    assert parse_times([text]).tolist() == [1500062984]


@pytest.mark.parametrize("text", ["14/07/2017 20:09", "07/14/2017", "14.07.2017", "soon"])
def test_times_of_unknown_order_are_named_with_the_way_out(text, tmp_path):
    assert np.isnan(read_times([text])[0])
    message = refusal(put(tmp_path / "a.csv", table(changed(3, lambda _: text))))
    count = f"column timestamp: {len(ROWS)} of {len(ROWS)} values are no times"
    assert count in message and repr(text) in message and "write times as 2024-12-31" in message
    assert "another file or format" not in message


def test_what_a_spreadsheet_rounded_is_said(tmp_path, capsys):
    load(put(tmp_path / "a.csv", table(changed(3, lambda _: "1.5E+12"))))
    assert "all times are 1500000000" in capsys.readouterr().out
    ids = changed(1, lambda i: f"9.7801{int(i) % 9}E+12")
    load(
        put(
            tmp_path / "b.csv",
            table(changed(1, lambda i: f"9.7801{int(i) % 9}E+12"), NAMES[:4] + ["x"]),
        )
    )
    assert "9 item ids look rounded" in capsys.readouterr().out and ids


# ------------------------------------------------------------------------ joins and titles
LOG = ["user_id", "item_id", "rating", "timestamp"]


@pytest.mark.parametrize("write", ["{}.0", "{:08d}"])
def test_ids_that_differ_as_written_numbers_are_matched_and_said(write, tmp_path, capsys):
    rows = [(r[0], write.format(int(r[1])), *r[2:4]) for r in ROWS]
    items = put(
        tmp_path / "items.csv", "item_id,title\n" + "".join(f"{i},T{i}\n" for i in range(41))
    )
    interactions = load(put(tmp_path / "a.csv", table(rows, LOG)), item_file=str(items))
    assert dict(zip(interactions.item_ids, interactions.titles, strict=True)) == {
        write.format(i): f"T{i}" for i in range(1, 41)
    }
    assert "40 item ids of items.csv were matched as numbers" in capsys.readouterr().out


def test_an_item_file_of_other_items_is_an_error_with_examples(tmp_path, capsys):
    file = put(tmp_path / "a.csv", table([row[:4] for row in ROWS], LOG))
    items = "item_id,title\n" + "".join(f"B{i},T{i}\n" for i in range(40))
    message = refusal(file, item_file=str(put(tmp_path / "items.csv", items)))
    assert (
        "none of the 40 items" in message
        and "'B0' and 'B1'" in message
        and "'1' and '3'" in message
    )
    capsys.readouterr()
    load(file, item_file=str(put(tmp_path / "few.csv", items + "1,One\n")))
    assert "only 1 of 40 items are in few.csv" in capsys.readouterr().out


def test_titles_that_vary_within_an_item_are_refused_unless_named(tmp_path, capsys):
    """Customers' names and headlines;
    the command of the message reads them all the same, with a note."""
    rows = [(*row[:4], f"Customer {row[0]}") for row in ROWS]
    file = put(tmp_path / "a.csv", table(rows, [*LOG, "name"]))
    message = refusal(file)
    assert "40 of 40 items have more than one title in column name" in message
    capsys.readouterr()
    load(file, columns=re.search(r"all the same: --columns (\S+)", message)[1])
    assert "40 of 40 items have more than one title" in capsys.readouterr().out
    items = "item_id,title\n" + "".join(f"{i},T{i}\n" for i in range(41))
    interactions = load(file, item_file=str(put(tmp_path / "items.csv", items)))
    assert set(interactions.titles) == {f"T{i}" for i in range(1, 41)}


def test_titles_that_many_items_share_are_said(tmp_path, capsys):
    load(put(tmp_path / "a.csv", table(changed(4, lambda _: "Drama"))))
    assert "40 items have only 1 different titles in column title" in capsys.readouterr().out


def test_the_scale_is_part_of_the_prepared_examples(tmp_path):
    file = put(tmp_path / "a.csv", table(changed(2, lambda r: str(int(r) * 20))))
    options = {"dataset": "csv", "data_dir": str(file), "followers": 3, "exclude": "seen"}
    options |= {"prepared_dir": str(tmp_path / "p"), "history": 5}
    hashes = {prepare(DataConfig(**options, scale=s)).hash for s in ("0,100", "20,100", "0,100")}
    assert len(hashes) == 2
