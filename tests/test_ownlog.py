"""Own logs as people have them: dialects, scales, marks of absence, times, joins that go wrong.

Every file is made here, in the shapes that spreadsheets, warehouses and older data sets write."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from test_datasets import put, rows_of

from data import build_examples
from loaders.frozen import DataConfig, load_interactions, prepare
from loaders.table import clean_title
from loaders.values import Column, parse_scale, read_numbers, read_times

NAMES = ["user_id", "item_id", "rating", "timestamp", "title"]
ROWS = [
    (str(u), str(i), str(1 + (u * i) % 5), str(1_500_000_000 + 1000 * u + i), f"Film, {i}")
    for u in range(1, 9)
    for i in range(1, 41)
    if (u + i) % 3
]


def table(rows=ROWS, names=NAMES, delimiter=",", end="\n", **quoting) -> str:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end, **quoting)
    writer.writerows([names, *rows] if names else rows)
    return out.getvalue()


def changed(column: int, change) -> list[tuple]:
    """ROWS with one column rewritten."""
    return [row[:column] + (change(row[column]),) + row[column + 1 :] for row in ROWS]


def load(file, **options):
    return load_interactions(DataConfig(**({"dataset": "csv", "data_dir": str(file)} | options)))


def refusal(file, **options) -> str:
    with pytest.raises(ValueError) as error:
        load(file, **options)
    return str(error.value)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return load(put(tmp_path_factory.mktemp("sound") / "sound.csv", table()))


def same(interactions, other) -> bool:
    return rows_of(interactions) == rows_of(other) and interactions.titles == other.titles


# ------------------------------------------------------------------------ dialects
REVIEWS = ["ok, fine", "Nice.\nAgain, and, again, and\nBye", "line\n" * 70, "a\r\nb"]
REVIEWED = [(*row, REVIEWS[n % 4]) for n, row in enumerate(ROWS)]
SPARK = table(changed(4, lambda t: f'"{t}"')).replace('""', '\\"').replace('"\\"', '"\\"')
DIALECTS = {  # each holds ROWS
    **{f"delimiter {d!r}": table(delimiter=d) for d in ",;\t|\x01"},
    **{f"ends {e!r}": table(end=e) for e in ("\r", "\r\n")},
    "utf-8-sig": table().encode("utf-8-sig"),
    "utf-16": table(end="\r\n").encode("utf-16"),
    "all quoted": table(quoting=csv.QUOTE_ALL),
    "no last line break": table().rstrip("\n"),
    "Excel's sep=": "sep=;\n" + table(delimiter=";"),
    "line breaks in quotes": table(REVIEWED, [*NAMES, "text"]),
    "line breaks, reversed": table([r[::-1] for r in REVIEWED], [*NAMES, "text"][::-1]),
    "blank lines": table().replace("\n", "\n\n", 30),
    "::": "\n".join("::".join(row) for row in [NAMES, *ROWS]),
    "gzip": gzip.compress(table().encode()),
    "bzip2": bz2.compress(table().encode()),
    "xz": lzma.compress(table().encode()),
    "zstd": pa.compress(table().encode(), "zstd", asbytes=True),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_dialects_of_one_log(name, sound, tmp_path):
    assert same(load(put(tmp_path / "a.csv", DIALECTS[name])), sound)


def test_the_single_file_of_a_zip_is_read_and_several_are_refused(sound, tmp_path):
    for names in (["log.csv"], ["log.csv", "other.csv"]):
        with zipfile.ZipFile(tmp_path / "a.csv.zip", "w") as z:
            for name in names:
                z.writestr(name, table())
        if len(names) == 1:
            assert same(load(tmp_path / "a.csv.zip"), sound)
    assert "zip or Excel file of 2 parts" in refusal(tmp_path / "a.csv.zip")


@pytest.mark.parametrize("title", ['Film "uncut", 1', '"1', '1"', '"a", "b"', "C:\\1", '5" disk'])
@pytest.mark.parametrize("escape", ["doubled", "backslash"])
def test_quotes_escaped_by_a_backslash_or_doubled(title, escape, tmp_path):
    """Spark and MySQL write \\", the others write two quotes; the file does not say which."""
    rows = changed(4, lambda t: f"{title} {t}")
    if escape == "backslash" and '"' in title:
        rows = [row[:4] + (row[4].replace('"', "\0"),) for row in rows]
    text = table(rows, quoting=csv.QUOTE_ALL).replace("\0", '\\"')
    found = load(put(tmp_path / "a.csv", text)).titles
    assert set(found) == {f"{title} Film, {i}" for i in range(1, 41)}


@pytest.mark.parametrize("second", ["", 'T" oops'])
def test_a_quote_that_is_not_closed_costs_its_own_line_only(second, tmp_path):
    rows = [f"u{n % 9},i{n},{1 + n % 5},{n},T{n}" for n in range(2000)]
    rows[100] = 'u1,i100,3,100,"Unclosed'
    rows[110] = f"u2,i110,3,110,{second}" if second else rows[110]
    text = "\n".join(["user,item,rating,timestamp,title", *rows])
    interactions = load(put(tmp_path / "a.csv", text))
    (why,) = interactions.notes
    assert len(interactions.user) == 1999 and "Unclosed" in why


@pytest.mark.parametrize("title", ['"Heroes" (Bowie)', '"Weird Al', 'The 12" mix', 'say "hi"'])
def test_quotes_of_a_table_with_tabs_are_part_of_a_name(title, tmp_path):
    rows = [(*row[:4], f"{title} {row[1]}") for row in ROWS]
    text = "\n".join("\t".join(row) for row in [NAMES, *rows])
    assert set(load(put(tmp_path / "a.tsv", text)).titles) == {f"{title} {i}" for i in range(1, 41)}


@pytest.mark.parametrize("encoding, title", [("cp1252", "It’s Café – №".rstrip("№")), ("gbk", "金色沙漠"), ("shift-jis", "赤い川"), ("cp1251", "Красная река")])  # fmt: skip # noqa: E501
def test_text_that_is_not_utf8_is_decoded_with_a_note_or_refused(encoding, title, tmp_path, capsys):
    content = table(changed(4, lambda t: f"{title} {t[6:].strip()}")).encode(encoding)
    file = put(tmp_path / "a.csv", content)
    if encoding != "cp1252":
        message = refusal(file)
        assert "a.csv" in message and "UTF-8" in message
        return
    assert load(file).titles[0] == clean_title(f"{title} 1")
    assert "not UTF-8; read as Windows-1252" in capsys.readouterr().out


def test_bytes_that_are_no_table_are_refused(tmp_path):
    assert "not text" in refusal(put(tmp_path / "a.csv", table().encode("utf-16-le")))
    packed = gzip.compress(table().encode())
    assert "damaged or cut off" in refusal(put(tmp_path / "b.csv", packed[:-300]))
    netflix = "1:\n" + "7,5,2020-09-20\n" * 9
    assert "awk" in refusal(put(tmp_path / "c.txt", netflix))
    assert "which column is the user" in refusal(put(tmp_path / "d.csv", "a\n" * 9))
    assert "empty" in refusal(put(tmp_path / "e.csv", "\n"))


# ------------------------------------------------------------------------ columns
@pytest.mark.parametrize("first", [("2", "1", "3"), ("196", "242", "3"), ("1", "2", "3")])
@pytest.mark.parametrize("delimiter", list(",\t|;"))
def test_numbers_are_positions_whatever_the_first_row_holds(first, delimiter, tmp_path):
    """A first row that holds the very numbers of the columns is a row."""
    rows = [first, *(row[:3] for row in ROWS if row[:2] != first[:2])]
    file = put(tmp_path / "u.data", table(rows, None, delimiter))
    interactions = load(file, columns="user=1,item=2,rating=3")
    assert {(u, i) for u, i, *_ in rows_of(interactions)} == {row[:2] for row in rows}


@pytest.mark.parametrize("names", [NAMES, ["c1", "c2", "c3", "c4", "c5"], list("abcde")])
def test_a_header_under_positions_is_text_where_numbers_must_be(names, sound, tmp_path):
    file = put(tmp_path / "a.csv", table(names=names))
    assert same(load(file, columns="user=1,item=2,rating=3,timestamp=4,title=5"), sound)
    assert len(load(file, columns="user=1,item=2").user) == len(ROWS)  # text above numbers


def test_messages_about_columns_hold_a_command_that_works(sound, tmp_path):
    file = put(tmp_path / "a.csv", table([row[:3] for row in ROWS], None))
    columns = re.search(r"count its columns: --columns (\S+)", refusal(file))[1]
    assert len(load(file, columns=columns).user) == len(ROWS)
    file = put(tmp_path / "b.csv", table(names=["user_id", "item_id", "rating", "rating", "title"]))
    message = refusal(file)
    assert "2 columns are named rating" in message
    columns = re.search(r"--columns (\S+)$", message)[1]
    assert len(load(file, columns=columns).user) == len(ROWS)
    items = "".join(f"{i}|Caf\xe9 {i} (1995)|01-Jan-1995||http://x|0|1\n" for i in range(1, 41))
    options = {
        "columns": "user=1,item=2,rating=3,timestamp=4",
        "item_file": str(put(tmp_path / "u.item", items.encode("latin-1"))),
    }
    file = put(tmp_path / "u.data", table([row[:4] for row in ROWS], None, "\t"))
    columns = re.findall(r"--item_columns (\S+)", refusal(file, **options))[-1]
    found = load(file, **options, item_columns=columns)
    assert rows_of(found) == rows_of(sound) and found.titles[0] == "Caf\xe9 1 (1995)"
    assert "asks for column 9" in refusal(file, **options, item_columns="item=1,title=9")


TIME_NAMES = ["played_at", "ordered_at", "event_time", "ts", "date", "Timestamp", "createdAt"]


@pytest.mark.parametrize("name", TIME_NAMES)
def test_time_columns_are_known_by_their_names(name, sound, tmp_path):
    file = put(tmp_path / "a.csv", table(names=[*NAMES[:3], name, NAMES[4]]))
    assert same(load(file), sound)


def test_of_two_time_columns_the_finer_is_taken_or_a_question_is_asked(tmp_path, capsys):
    """KuaiRand has a day, an hour and milliseconds; created and updated are a question."""
    rows = [(*row[:3], "20170714", "0156", f"{row[3]}123") for row in ROWS]
    file = put(tmp_path / "a.csv", table(rows, [*NAMES[:3], "date", "hourmin", "time_ms"]))
    times = {t for *_, t in rows_of(load(file))}
    assert times == {int(row[3]) for row in ROWS} and "timestamp=time_ms" in capsys.readouterr().out
    rows = [(*row[:4], row[3]) for row in ROWS]
    file = put(tmp_path / "b.csv", table(rows, [*NAMES[:3], "created_at", "updated_at"]))
    message = refusal(file)
    assert "created_at or updated_at" in message and "--columns timestamp=" in message
    assert len(load(file, columns="timestamp=created_at").user) == len(ROWS)


def test_a_time_that_is_an_hour_of_the_day_is_asked_about(tmp_path):
    file = put(tmp_path / "a.csv", table(changed(3, lambda t: str(int(t) % 24)), [*NAMES[:3], "time", "title"]))  # noqa: E501  # fmt: skip
    columns = re.search(r"all the same: --columns (\S+)", refusal(file))[1]
    assert len(load(file, columns=columns).user) == len(ROWS)


# ------------------------------------------------------------------------ scales
SCALES = [
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
]


@pytest.mark.parametrize("change, ends, first", SCALES)
def test_another_scale_is_refused_with_the_option_that_maps_it(change, ends, first, tmp_path):
    """Every option that the message proposes works; the first maps linearly."""
    rows = changed(2, change)
    file = put(tmp_path / "a.csv", table(rows))
    advised = re.findall(r"--(scale|percentile) ([-\w.,]*\w)", refusal(file, min_rating=1))
    assert advised[0] == ("scale", first)
    for name, value in advised:
        load(file, **{name: value})
    low, high = ends
    number = {"true": 1, "false": 0}
    expected = [1 + 4 * (float(number.get(row[2], row[2])) - low) / (high - low) for row in rows]
    interactions = load(file, scale=first)
    by_pair = {(u, i): r for u, i, r, _ in rows_of(interactions)}
    np.testing.assert_allclose([by_pair[row[:2]] for row in rows], expected, rtol=1e-6)
    assert interactions.notes[f"ratings of {low} to {high} mapped to 1 to 5 (--scale)"] == len(rows)


@pytest.mark.parametrize("options, culprit", [
    ({"scale": "0,1"}, "ratings outside --scale 0,1: ratings from 1 to 5"),
    ({"scale": "binary"}, "values other than 0 and 1"),
])  # fmt: skip
def test_scales_that_do_not_fit_are_refused(options, culprit, tmp_path):
    assert culprit in refusal(put(tmp_path / "a.csv", table()), **options)


@pytest.mark.parametrize("text", ["1", "5,1", "0,x", "0,inf", "low,high", "1,2,3"])
def test_scales_that_are_none_are_named(text):
    with pytest.raises(ValueError, match="--scale"):
        parse_scale(text)


def test_zero_is_a_rating_only_where_the_scale_has_it(tmp_path, capsys):
    rows = changed(2, lambda r: str(5 * (int(r) - 1) // 4))  # 0 to 5
    file, zeros = put(tmp_path / "a.csv", table(rows)), sum(int(r[2]) == 1 for r in ROWS)
    interactions = load(file)
    assert (
        len(interactions.user) == len(rows) - zeros == len(rows) - sum(interactions.notes.values())
    )
    assert "if 0 is a rating: --scale 0,5" in capsys.readouterr().out
    assert len(load(file, scale="0,5").user) == len(rows)
    assert len(load(file, scale="1,5").user) == len(rows) - zeros


@pytest.mark.parametrize(
    "texts, delimiter, numbers",
    [
        (["3,5", "4"], ";", [3.5, 4]),
        (["3,500", "4"], ";", [3.5, 4]),
        (["3,5", "1,25"], ",", [3.5, 1.25]),
        (["2,800.0", "700.0"], ",", [2800, 700]),
        (["1,234,567", "12"], "\t", [1234567, 12]),
        (["1.234,5", "1.234", "2,5"], ";", [1234.5, 1.234, 2.5]),
        (["1 234,5", "1\u00a0234"], ";", [1234.5, 1234]),
        (["1'234.5", "5"], ",", [1234.5, 5]),
    ],
)
def test_numbers_with_commas_are_read_as_the_column_writes_them(texts, delimiter, numbers):
    found = read_numbers(Column.of(texts), delimiter)[:-1].tolist()
    if texts[0] == "1.234,5":
        numbers = [1234.5, 1234, 2.5]
    assert found == numbers


# ------------------------------------------------------------------------ absence
@pytest.mark.parametrize("mark", ["", "\\N", "NA", "null", "NaN", "None", "-1", "#N/A"])
def test_absent_values_are_counted_and_never_ids_or_titles(mark, tmp_path, capsys):
    rows = [list(row) for row in ROWS]
    for column in range(4):
        rows[10 * column][column] = mark
    for row in rows:
        row[4] = mark if row[1] == "7" else row[4]
    interactions = load(put(tmp_path / "a.csv", table(rows)))
    assert len(interactions.user) == len(ROWS) - 4 == len(ROWS) - sum(interactions.notes.values())
    reasons = {re.sub(r" \(.*", "", why) for why in interactions.notes}
    assert reasons == {f"rows without {n}" for n in ("user", "item", "rating", "timestamp")}
    assert mark not in interactions.user_ids + interactions.item_ids
    assert interactions.titles[interactions.item_ids.index("7")] == "7"
    assert "1 of 40 items have no title" in capsys.readouterr().out


def test_few_bad_rows_are_counted_and_more_than_one_in_a_hundred_are_an_error(tmp_path):
    """Column, count, two examples, the first row."""
    lines = ["user,item,rating,timestamp,title"]
    lines += [f"u{n % 7},i{n % 50},{1 + n % 5},{n},T{n % 50}" for n in range(400)]
    lines[17], lines[30] = "u1,i2,stars,9,T2", "u1,i2"
    interactions = load(put(tmp_path / "a.csv", "\n".join(lines)))
    (note,) = (why for why in interactions.notes if "could not be read" in why)
    assert interactions.notes[note] == 2 and "stars" in note and "u1,i2" in note
    lines[40:60] = [f"u1,i2,bad{n % 2},9,T2" for n in range(20)]
    message = refusal(put(tmp_path / "b.csv", "\n".join(lines)))
    for part in ("b.csv", "22 of 400 rows", "column rating", "'stars' and 'bad0'", "row 18", "3.5"):
        assert part in message, message
    absent = put(tmp_path / "c.csv", table(changed(0, lambda _: "NULL")))
    assert f"({len(ROWS)} rows without user)" in refusal(absent)


# ------------------------------------------------------------------------ times
SECONDS = 1500062984
TIMES = [
    "2017-07-14 20:09:44 UTC", "2017/07/14 20:09:44", "2017-07-14 20:09:44.000 UTC",
    "2017.07.14 20:09:44", "2017-07-14T20:09:44Z", "2017-07-14 20:09:44+00",
    "2017-07-14 22:09:44 +0200", "2017-07-14 20:09:44 +0000 UTC", "2017/7/14 20:09:44",
    "1,500,062,984", "1500062984.0", "1.500062984E9", "1500062984000", "1500062984000000",
    "1500062984000000000", "20170714200944",
]  # fmt: skip


@pytest.mark.parametrize("text", TIMES)
def test_times_with_the_year_first_and_numbers_of_any_unit(text, tmp_path):
    ticks, per_second = read_times(Column.of([text]))
    assert (ticks // per_second).tolist() == [SECONDS]
    found = load(put(tmp_path / "a.csv", table(changed(3, lambda _: text))))
    assert set(found.timestamp.tolist()) == {SECONDS}


@pytest.mark.parametrize("text", ["14/07/2017 20:09", "07/14/2017", "14.07.2017", "soon", "20:09"])
def test_times_of_unknown_order_are_named_with_the_way_out(text, tmp_path):
    message = refusal(put(tmp_path / "a.csv", table(changed(3, lambda _: text))))
    assert f"column timestamp: {len(ROWS)} values are no times" in message
    assert repr(text) in message and "write times as 2024-12-31" in message


@pytest.mark.parametrize("unit", [1, 10**3, 10**6, 10**9])
def test_a_column_of_times_has_one_unit(unit, tmp_path):
    """Relative times, too: users come in the same order whatever the unit, and one time far
    outside changes nothing."""
    rows = [(r[0], r[1], r[2], str((int(r[0]) * 7919 + int(r[1]) * 60013) % 3_000_000 * unit), r[4]) for r in ROWS]  # noqa: E501  # fmt: skip
    found = load(put(tmp_path / "a.csv", table(rows)))
    order = sorted(rows, key=lambda r: (r[0], int(r[3])))
    assert [r[:2] for r in rows_of(found)] == [r[:2] for r in order]
    far = [(*rows[0][:3], str(253402300799 * unit), rows[0][4]), *rows[1:]]
    assert [r[:2] for r in rows_of(load(put(tmp_path / "b.csv", table(far))))][5:] != []


def test_eight_digits_that_are_dates_throughout_are_dates(tmp_path):
    rows = changed(3, lambda t: f"202009{1 + int(t) % 28:02}")
    found = load(put(tmp_path / "a.csv", table(rows, [*NAMES[:3], "date", "title"])))
    assert found.timestamp.min() == 1598918400 and found.timestamp.max() == 1601251200


def test_of_a_pair_the_later_rating_stays_whatever_the_size_of_the_keys(tmp_path):
    """60,000 users and items over five years: pandas' sort_values and drop_duplicates agree."""
    rng = np.random.default_rng(0)
    lines = [f"u{n},i{n},3,{1_500_000_000 + 2600 * n}" for n in range(60_000)]
    pairs = rng.integers(60_000, size=300).tolist()
    for n in dict.fromkeys(pairs):
        t = 1_500_000_000 + int(rng.integers(157_000_000))
        lines += [f"u{n},x{n},5,{t + 5}", f"u{n},x{n},1,{t}"]
    text = "user,item,rating,timestamp\n" + "\n".join(lines[::-1])
    found = load(put(tmp_path / "a.csv", text))
    kept = [r for _, i, r, _ in rows_of(found) if i.startswith("x")]
    assert len(kept) == len(set(pairs)) and set(kept) == {5}


# ------------------------------------------------------------------------ joins and titles
LOG = NAMES[:4]
ITEMS = "item_id,title\n" + "".join(f"{i},T{i}\n" for i in range(41))


@pytest.mark.parametrize("write", ["{}.0", "{:08d}"])
def test_ids_that_differ_as_written_numbers_are_matched_and_said(write, tmp_path, capsys):
    rows = [(r[0], write.format(int(r[1])), *r[2:4]) for r in ROWS]
    items = str(put(tmp_path / "items.csv", ITEMS))
    interactions = load(put(tmp_path / "a.csv", table(rows, LOG)), item_file=items)
    found = dict(zip(interactions.item_ids, interactions.titles, strict=True))
    assert found == {write.format(i): f"T{i}" for i in range(1, 41)}
    assert "40 item ids of items.csv were matched as numbers" in capsys.readouterr().out


def test_an_item_file_of_other_items_is_an_error_with_examples(tmp_path, capsys):
    file = put(tmp_path / "a.csv", table([row[:4] for row in ROWS], LOG))
    items = "item_id,title\n" + "".join(f"B{i},T{i}\n" for i in range(40))
    message = refusal(file, item_file=str(put(tmp_path / "items.csv", items)))
    for part in ("none of the 40 items", "'B0' and 'B1'", "--item_columns"):
        assert part in message
    load(file, item_file=str(put(tmp_path / "few.csv", items + "1,One\n")))
    assert "only 1 of 40 items are in few.csv" in capsys.readouterr().out


def test_titles_that_vary_within_an_item_are_refused_unless_named(tmp_path, capsys):
    """Customers' names; the command of the message reads them all the same, with a note."""
    file = put(tmp_path / "a.csv", table([(*r[:4], f"Customer {r[0]}") for r in ROWS], [*LOG, "name"]))  # noqa: E501  # fmt: skip
    message = refusal(file)
    assert "40 of 40 items have more than one title in column name" in message
    load(file, columns=re.search(r"all the same: --columns (\S+)", message)[1])
    assert "40 of 40 items have more than one title" in capsys.readouterr().out
    interactions = load(file, item_file=str(put(tmp_path / "items.csv", ITEMS)))
    assert set(interactions.titles) == {f"T{i}" for i in range(1, 41)}
    load(put(tmp_path / "b.csv", table(changed(4, lambda _: "Drama"))))
    assert "40 items have only 1 different titles in column title" in capsys.readouterr().out


def test_titles_are_one_line_of_a_prompt():
    assert clean_title(" A\nB\x0b\x85C\u2028D\x00E &lt;b&gt; \ud800 \ufeff") == "A B C D E <b> ?"
    assert (
        clean_title("Q&notation &copy right &amp; Sam &#40;1&#41;")
        == "Q&notation &copy right & Sam (1)"
    )
    assert len(clean_title("x" * 1000)) == 200


# ------------------------------------------------------------------------ JSON
RECORDS = [dict(zip(NAMES, row, strict=True)) for row in ROWS]


def lines(records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


JSON = {  # each holds ROWS
    "lines": lines(RECORDS),
    "array": json.dumps(RECORDS),
    "indented array": "\ufeff" + json.dumps(RECORDS, indent=2),
    "numbers": lines(r | {"rating": float(r["rating"]), "timestamp": int(r["timestamp"])} for r in RECORDS),  # noqa: E501
    "ids of two types": lines(r | {"item_id": int(r["item_id"]) if n % 2 else r["item_id"]} for n, r in enumerate(RECORDS)),  # noqa: E501
    "other keys": lines(r | {"text": [{"a": n}], "style": {str(n): n}} for n, r in enumerate(RECORDS)),  # noqa: E501
    "no last line break": lines(RECORDS).rstrip(),
    "a bad line": lines(RECORDS) + "oops\n",
}  # fmt: skip


@pytest.mark.parametrize("name", JSON)
def test_json_of_one_log(name, sound, tmp_path):
    assert same(load(put(tmp_path / "a.json", JSON[name]), dataset="jsonl"), sound)


def test_json_arrays_in_parts_are_read_one_after_the_other(sound, tmp_path):
    for n in range(2):
        put(tmp_path / f"part-{n}.json", json.dumps(RECORDS[n::2]))
    assert same(load(tmp_path, dataset="jsonl"), sound)


@pytest.mark.parametrize("content, culprit", [
    (lines(r | {"title": [r["title"]]} for r in RECORDS), "column title holds lists"),
    (json.dumps({name: {"0": 1} for name in NAMES}), "lines=True"),
    (json.dumps(RECORDS)[:-9], "not a JSON array"),
    ("user,item\n" * 9, "no line is a JSON object"),
    (lines(RECORDS) + "oops\n" * 9, "9 of "),
    (b'{"user": "' + "金色沙漠".encode("gbk") + b'", "item": 1}\n', "UTF-8"),
])  # fmt: skip
def test_json_that_is_no_log_is_refused(content, culprit, tmp_path):
    assert culprit in refusal(put(tmp_path / "a.jsonl", content), dataset="jsonl")


# ------------------------------------------------------------------------ whatever is read
def test_the_scale_is_part_of_the_prepared_examples(tmp_path):
    file = put(tmp_path / "a.csv", table(changed(2, lambda r: str(int(r) * 20))))
    options = {"dataset": "csv", "data_dir": str(file), "followers": 3, "exclude": "seen"}
    options |= {"prepared_dir": str(tmp_path / "p"), "history": 5}
    hashes = {prepare(DataConfig(**options, scale=s)).hash for s in ("0,100", "20,100", "0,100")}
    assert len(hashes) == 2


def test_the_order_of_lines_changes_nothing(tmp_path):
    """But for ties in time: shuffled lines give the same log and examples."""
    rng, logs = np.random.default_rng(2), []
    rows = [(*r[:3], str(n), r[4]) for n, r in enumerate(ROWS)]
    for n in range(2):
        text = table([rows[i] for i in rng.permutation(len(rows))])
        logs.append(load(put(tmp_path / f"{n}.csv", text)))
    config = DataConfig(followers=3, min_history=2, exclude="seen", history=5)
    first, second = (build_examples(log, config)["test"] for log in logs)
    assert same(*logs) and (first.candidates == second.candidates).all()
