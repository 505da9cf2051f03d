"""Own logs as people have them: dialects, scales, times, marks of absence, joins, refusals."""

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
from test_datasets import json_lines, put, rows_of

from loaders.frozen import DataConfig, load_interactions
from loaders.table import clean_title
from loaders.values import coded, parse_scale, parsed_times, read_numbers, read_times, scale_doubt

NAMES = ["user_id", "item_id", "rating", "timestamp", "title"]
ROWS = [
    (str(u), str(i), str(1 + (u * i) % 5), str(1_500_000_000 + 1000 * u + i), f"Film, {i}")
    for u in range(1, 9)
    for i in range(1, 41)
    if (u + i) % 3
]
BARE = [row[:4] for row in ROWS]  # without titles


def table(rows=ROWS, names=NAMES, delimiter=",", end="\n", **quoting) -> str:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end, **quoting)
    writer.writerows([names, *rows] if names else rows)
    return out.getvalue()


def changed(column: int, change) -> list[tuple]:
    return [row[:column] + (change(row[column]),) + row[column + 1 :] for row in ROWS]


def load(path, **options):
    return load_interactions(DataConfig(**({"dataset": "csv", "data_dir": str(path)} | options)))


def refusal(path, **options) -> str:
    return str(pytest.raises(ValueError, load, path, **options).value)


def zipped(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name in names:
            z.writestr(name, table())
    return out.getvalue()


# ------------------------------------------------------------------------ dialects
REVIEWS = ["ok, fine", "Nice.\nAgain, and, again, and\nBye", "line\n" * 70, "a\r\nb"]
REVIEWED = [(*row, REVIEWS[n % 4]) for n, row in enumerate(ROWS)]
FIVE = {"columns": "user=1,item=2,rating=3,timestamp=4,title=5"}
TIMES = ["played_at", "ordered_at", "event_time", "ts", "date", "Timestamp", "createdAt"]
KUAIRAND = [(*r[:3], "20170714", "0156", f"{r[3]}123", r[4]) for r in ROWS]
CSV = {  # name -> content and options: each holds ROWS
    **{f"delimiter {d!r}": (table(delimiter=d), {}) for d in ",;\t|"},
    **{f"ends {e!r}": (table(end=e), {}) for e in ("\r", "\r\n")},
    "utf-8-sig": (table().encode("utf-8-sig"), {}),
    "no last line break": (table().rstrip("\n"), {}),
    "line breaks in quotes": (table(REVIEWED, [*NAMES, "text"]), {}),
    "reversed": (table([r[::-1] for r in REVIEWED], [*NAMES, "text"][::-1]), {}),
    "blank lines": (table().replace("\n", "\n\n", 30), {}),
    "::": ("\n".join("::".join(row) for row in [NAMES, *ROWS]), {}),
    "gzip": (gzip.compress(table().encode()), {}),
    "bzip2": (bz2.compress(table().encode()), {}),
    "zstd": (pa.compress(table().encode(), "zstd", asbytes=True), {}),
    **{f"time {t}": (table(names=[*NAMES[:3], t, NAMES[4]]), {}) for t in TIMES},
    **{f"header {n[0]}": (table(names=n), FIVE) for n in (NAMES, ["c1", "c2", "c3", "c4", "c5"])},
    "no header": (table(names=None), FIVE),
    "the finer time": (table(KUAIRAND, [*NAMES[:3], "date", "hourmin", "time_ms", "title"]), {}),
}
RECORDS = [dict(zip(NAMES, row, strict=True)) for row in ROWS]
NUMBERS = [r | {"rating": float(r["rating"]), "timestamp": int(r["timestamp"])} for r in RECORDS]
NESTED = [r | {"text": [{"a": n}], "style": {str(n): n}} for n, r in enumerate(RECORDS)]
JSON = {
    "lines": json_lines(RECORDS),
    "array": json.dumps(RECORDS),
    "indented array": "\ufeff" + json.dumps(RECORDS, indent=2),
    "one long line": json.dumps([r | {"text": "é" * 3000} for r in RECORDS], ensure_ascii=False),
    "numbers": json_lines(NUMBERS),
    "ids of two types": json_lines(RECORDS[:1] + [r | {"item_id": int(r["item_id"])} for r in RECORDS[1:]]),  # noqa: E501
    "other keys": json_lines(NESTED),
    "a bad line": json_lines(RECORDS) + "oops\n",
    "literals": "".join(f"{record}\n" for record in RECORDS),
}  # fmt: skip
DIALECTS = CSV | {f"json {name}": (text, {"dataset": "jsonl"}) for name, text in JSON.items()}


@pytest.mark.parametrize("name", DIALECTS)
def test_dialects_of_one_log(name, tmp_path):
    content, options = DIALECTS[name]
    found = load(put(tmp_path / "a.log", content), **options)
    assert rows_of(found) == [(u, i, int(r), int(t)) for u, i, r, t, _ in ROWS]
    assert found.titles == [f"Film, {i}" for i in found.item_ids]


def test_unusual_names_above_counted_columns_are_no_interaction(tmp_path):
    text = table([row[:2] for row in ROWS], ["c1", "c2"])
    log = load(put(tmp_path / "a.csv", text), columns="user=1,item=2")
    assert "c1" not in log.user_ids and "c2" not in log.item_ids


@pytest.mark.parametrize("title", ['Film "uncut", 1', '"1', '1"', '"a", "b"', "C:\\1"])
@pytest.mark.parametrize("form", ["doubled", "backslash", "tabs"])
def test_quotes_in_titles(title, form, tmp_path):
    """Doubled, or escaped by a backslash as Spark does; in tables with tabs, characters."""
    rows = [(*row[:4], f"{title} {row[1]}") for row in ROWS]
    text = table(rows, quoting=csv.QUOTE_ALL)
    if form == "tabs":
        text = "\n".join("\t".join(row) for row in [NAMES, *rows])
    elif form == "backslash" and '"' in title:
        text = table([(*r[:4], r[4].replace('"', "\0")) for r in rows], quoting=csv.QUOTE_ALL)
        text = text.replace("\0", '\\"')
    found = load(put(tmp_path / "a.csv", text)).titles
    assert set(found) == {clean_title(f"{title} {i}") for i in range(1, 41)}


@pytest.mark.parametrize("second", ["T110", "", 'T" oops'])
def test_a_quote_that_is_not_closed_swallows_no_line(second, tmp_path, capsys):
    rows = [f"u{n % 9},i{n},{1 + n % 5},{n},T{n}" for n in range(2000)]
    rows[100], rows[110] = 'u1,i100,3,100,"Unclosed', f"u2,i110,3,110,{second}"
    rows[120] = 'u3,i120,3,120,"A, B"'
    text = "\n".join(["user,item,rating,timestamp,title", *rows])
    found = load(put(tmp_path / "a.csv", text))
    assert len(found.user) == 1999 and '"Unclosed' in found.titles
    (why,) = found.notes
    assert "A, B" in why and "all are characters" in capsys.readouterr().out


def test_western_text_that_is_not_utf8_is_decoded_with_a_note(tmp_path, capsys):
    text = table(changed(4, lambda t: f"It’s Café {t[6:]}"))
    assert load(put(tmp_path / "a.csv", text.encode("cp1252"))).titles[0] == "It’s Café 1"
    assert "not UTF-8; read as Windows-1252" in capsys.readouterr().out


# ------------------------------------------------------------------------ refusals
GBK, SHIFT_JIS, CP1251 = ("金色沙漠", "gbk"), ("赤い川", "shift-jis"), ("Красная река", "cp1251")
CUSTOMERS = [(*row, f"Customer {row[0]}") for row in BARE]
HOURS = changed(3, lambda t: str(int(t) % 24))
TWO_TIMES = [(*row[:4], row[3]) for row in ROWS]
ITEMS = "item_id,title\n" + "".join(f"B{i},T{i}\n" for i in range(40))
U_ITEM = "".join(f"{i}|Caf\xe9 {i} (1995)|01-Jan-1995||http://x|0|1\n" for i in range(1, 41))
UNKNOWN = ["14/07/2017 20:09", "07/14/2017", "14.07.2017", "soon", "20:09", "2017/7/14"]
POSITIONS = {"columns": "user=1,item=2,rating=3,timestamp=4", "item_file": U_ITEM}
REFUSED = {  # content, options (an item file's content among them), culprits and way out
    **{name: (table(changed(4, lambda _, t=t: t)).encode(name), {}, ["a.csv", "UTF-8"]) for t, name in (GBK, SHIFT_JIS, CP1251)},  # noqa: E501
    "zip": (zipped("log.csv"), {}, ["a.csv: zip", "unpack it"]),
    "xz": (lzma.compress(table().encode()), {}, ["a.csv: xz", "unpack it"]),
    "a decimal comma": (table(changed(2, "{},5".format)), {}, ["rating: '2,5' is no number", "no commas"]),  # noqa: E501
    **{code: (table().encode(code), {}, ["not UTF-8"]) for code in ("utf-16", "utf-16-le")},
    "a delimiter of its own": (table(delimiter="\x01"), {}, ["one field", "tab"]),
    "Excel's sep=": ("sep=;\n" + table(delimiter=";"), {}, ["which column is the user", "sep="]),
    "cut gzip": (gzip.compress(table().encode())[:-300], {}, ["cut off"]),
    "Netflix": ("1:\n" + "7,5,2020-09-20\n" * 9, {}, ["'1:', is one field", "Netflix"]),
    "no header": (table([row[:3] for row in ROWS], None), {}, ["which column is the user", "--columns"]),  # noqa: E501
    "a name twice": (table(names=[*NAMES[:3], "rating", "title"]), {}, ["which column is the rating, rating or rating", "--columns"]),  # noqa: E501
    "ids that differ as written": (table(changed(1, "{}.0".format)[:9], NAMES[:4] + ["x"]), {"item_file": ITEMS.replace("B", "")}, ["items, such as ['1.0', '3.0']; its ids are such as ['0', '1']", "write them alike"]),  # noqa: E501
    "two times": (table(TWO_TIMES, [*NAMES[:3], "created_at", "updated_at"]), {}, ["created_at or updated_at", "timestamp=NAME"]),  # noqa: E501
    "an hour of the day": (table(HOURS, [*NAMES[:3], "time", "title"]), {}, ["column time", "--columns"]),  # noqa: E501
    "customers' names": (table(CUSTOMERS, [*NAMES[:4], "name"]), {}, ["40 items have several titles in column name", "--columns"]),  # noqa: E501
    "no columns of items": (table(BARE, None, "\t"), POSITIONS, ["which column is the id", "--columns"]),  # noqa: E501
    "other items": (table(BARE, NAMES[:4]), {"item_file": ITEMS}, ["no title of the log's items", "['B0', 'B1']", "id=NAME"]),  # noqa: E501
    "amounts and a date": (table(names=[*NAMES[:2], "plays", *NAMES[3:]]), {"split_date": "10%"}, ["plays are amounts", "--split_date"]),  # noqa: E501
    "outside the scale": (table(), {"scale": "0,1"}, ["column rating", "no number in --scale 0,1", "row 2"]),  # noqa: E501
    **{t: (table(changed(3, lambda _, t=t: t)), {}, ["row 2, column timestamp", repr(t), "written as 2024-12-31"]) for t in UNKNOWN},  # noqa: E501
    "json title lists": (json_lines(r | {"title": [r["title"]]} for r in RECORDS), {"dataset": "jsonl"}, ["a list or an object, ['Film, 1']", "write a text"]),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_the_culprit_and_the_way_out(name, tmp_path):
    """Where it ends in a command, that command reads every row."""
    content, options, culprits = REFUSED[name]
    if "item_file" in options:
        items = put(tmp_path / "u.item", options["item_file"].encode("latin-1"))
        options = options | {"item_file": str(items)}
    message = refusal(put(tmp_path / "a.csv", content), **options)
    assert all(culprit in message for culprit in culprits), message
    if culprits[-1] == "--columns":
        given = re.findall(r"--columns (\S+?)\.?(?:\s|$)", message)[-1]
        given = ",".join(filter(None, (options.get("columns"), given)))
        found = load(tmp_path / "a.csv", **options | {"columns": given})
        assert len(found.user) == len(ROWS)


# ------------------------------------------------------------------------ scales and numbers
SCALES = [  # ratings of 1 to 5 changed, the advice, the ends that it maps
    (lambda r: str(int(int(r) > 3)), "0,1", (0, 1)),
    (lambda r: "true" if int(r) > 3 else "false", "0,1", (0, 1)),
    (lambda r: str(int(r) * 2.5 - 2.5), "0,10", (0, 10)),
    (lambda r: str(int(r) * 20), "20,100", (20, 100)),
    (lambda r: str(1 if int(r) > 3 else -1), "-1,1", (-1, 1)),
]


@pytest.mark.parametrize("change, first, ends", SCALES)
def test_another_scale_is_refused_with_the_option_that_maps_it(change, first, ends, tmp_path):
    rows = changed(2, change)
    file = put(tmp_path / "a.csv", table(rows))
    message = refusal(file)
    assert f"--scale {first};" in message and "binary" in message and "rank:item" in message
    (low, high), number = ends, {"true": 1, "false": 0}
    expected = [1 + 4 * (float(number.get(row[2], row[2])) - low) / (high - low) for row in rows]
    interactions = load(file, scale=first)
    ratings = {(u, i): r for u, i, r, _ in rows_of(interactions)}
    np.testing.assert_allclose([ratings[row[:2]] for row in rows], expected, rtol=1e-6)
    assert f"ratings of {low} to {high} mapped to 1 to 5 (--scale)" in interactions.notes


@pytest.mark.parametrize("values, advice", [
    ([1, 5], ""), ([0, 5], ""), ([-1, 4.5], ""), ([0, 3.5, 4], ""), ([0, 2, 4], "0,4"),
    ([-1, 2, 10], "2,10"), ([-2, 0, 1], "-2,1"), ([7], "6,7"), ([0], "-1,0"), ([np.nan], ""),
])  # fmt: skip
def test_scales_that_look_like_one_to_five_and_others(values, advice):
    """-1 or 0 may mean none; the advice is a scale."""
    for text in ("1", "5,1", "0,x", "0,inf", "1,2,3"):
        with pytest.raises(ValueError, match="--scale"):
            parse_scale(text)
    doubt = scale_doubt(np.array(values, float))
    assert f"--scale {advice};" in doubt and parse_scale(advice) if advice else not doubt


def test_zero_is_a_rating_only_where_the_scale_has_it(tmp_path):
    rows = changed(2, lambda r: str(5 * (int(r) - 1) // 4))  # 0 to 5
    file, liked = put(tmp_path / "a.csv", table(rows)), sum(int(r[2]) > 1 for r in ROWS)
    found = load(file)
    assert len(found.user) == liked == len(rows) - sum(found.notes.values())
    for scale, count in (("0,5", len(rows)), ("1,5", liked)):
        assert len(load(file, scale=scale).user) == count


def test_numbers_hold_no_commas():
    texts = ["3.5", "1e3", " 7", "true", "", "NA", "1,234", "1,5", "1 234", "inf", "x"]
    found = read_numbers(coded(pa.chunked_array([texts]))).tolist()
    assert found[:6] == [3.5, 1000, 7, 1, -np.inf, -np.inf] and np.isnan(found[6:-1]).all()


# ------------------------------------------------------------------------ what is left out
@pytest.mark.parametrize("mark", ["", "\\N", "NA", "null", "NaN", "None", "-1", "#N/A"])
def test_absent_values_are_counted_and_never_ids_or_titles(mark, tmp_path, capsys):
    rows = [[*row[:4], mark if row[1] == "7" else row[4]] for row in ROWS]
    for column in range(4):
        rows[10 * column][column] = mark
    found = load(put(tmp_path / "a.csv", table(rows)))
    assert len(found.user) == len(ROWS) - 4 == len(ROWS) - sum(found.notes.values())
    reasons = {re.sub(r" \(.*", "", why) for why in found.notes}
    assert reasons == {f"rows without {n}" for n in ("user", "item", "rating", "timestamp")}
    assert found.titles[found.item_ids.index("7")] == "#7"  # no rating
    assert "1 of 40 items have no title" in capsys.readouterr().out


def test_few_bad_rows_are_counted_and_more_than_one_in_a_hundred_are_an_error(tmp_path):
    text = ["user,item,rating,timestamp,title"]
    text += [f"u{n % 7},i{n % 50},{1 + n % 5},{n},T{n % 50}" for n in range(400)]
    text[17], text[30] = "u1,i2,stars,9,T2", "u1,i2"
    found = load(put(tmp_path / "a.csv", "\n".join(text)))
    (note,) = (why for why in found.notes if "could not be read" in why)
    assert found.notes[note] == 2 and "row 18, column rating: 'stars'" in note and "u1,i2" in note
    text[40:60] = [f"u1,i2,bad{n % 2},9,T2" for n in range(20)]
    message = refusal(put(tmp_path / "b.csv", "\n".join(text)))
    for part in ("b.csv", "22 of 400 rows", "row 18, column rating: 'stars'", "'bad0'", "1234.5"):
        assert part in message


# ------------------------------------------------------------------------ times and order
@pytest.mark.parametrize("text", [
    "2017-07-14 20:09:44 UTC", "2017/07/14 20:09:44", "2017-07-14 20:09:44.000 UTC",
    "2017.07.14 20:09:44", "2017-07-14T20:09:44Z", "2017-07-14 20:09:44+00", "2017-07-14 20:09:44",
    "2017-07-14 22:09:44+02:00", "2017-07-14 14:39:44-05:30", "2017-07-14 20:09:44 +0000 UTC",
    "1500062984.0", "1.500062984E9", "1500062984000", "1500062984000000", "1500062984000000000",
    "20170714200944",
])  # fmt: skip
@pytest.mark.parametrize("beside", [[], ["NA"], ["soon"]])
def test_times_with_the_year_first_and_numbers_of_any_unit(text, beside):
    """Beside a time that is absent or bad, too."""

    def seconds(texts: list[str]) -> list[int]:
        ticks, per_second = read_times(parsed_times(pa.chunked_array([texts])))
        return np.where(ticks < 0, ticks, ticks // per_second).tolist()

    assert seconds([text, *beside]) == [1500062984, *({"NA": -1}.get(t, -2) for t in beside)]
    for last, first in (("20200930", 1598918400), ("20200931", 20200901)):  # dates, or not all
        assert seconds(["20200901", last])[0] == first


@pytest.mark.parametrize("unit", [1, 10**3, 10**6, 10**9])
def test_a_column_of_times_has_one_unit(unit, tmp_path):
    ticks = [(int(r[0]) * 7919 + int(r[1]) * 60013) % 3_000_000 * unit for r in ROWS]
    ticks[0] = min(253402300799 * unit, 8 * 10**18)
    rows = [(*r[:3], str(t), r[4]) for r, t in zip(ROWS, ticks)]
    found = load(put(tmp_path / "a.csv", table(rows)))
    order = sorted(rows, key=lambda r: (r[0], int(r[3])))
    assert [r[:2] for r in rows_of(found)] == [r[:2] for r in order]


def test_of_a_pair_the_later_rating_stays_whatever_the_size_of_the_keys(tmp_path):
    """60,000 users and items over five years, newest first."""
    rng = np.random.default_rng(0)
    rows = [f"u{n},i{n},3,{1_500_000_000 + 2600 * n}" for n in range(60_000)]
    pairs = {*rng.integers(60_000, size=300).tolist()}
    for n in pairs:
        t = 1_500_000_000 + int(rng.integers(157_000_000))
        rows += [f"u{n},x{n},5,{t + 5}", f"u{n},x{n},1,{t}"]
    text = "user,item,rating,timestamp\n" + "\n".join(rows[::-1])
    found = load(put(tmp_path / "a.csv", text))
    kept = [r for _, i, r, _ in rows_of(found) if i.startswith("x")]
    assert kept == [5] * len(pairs)


# ------------------------------------------------------------------------ joins and titles
def test_titles_are_one_line_of_a_prompt():
    assert clean_title(" A\nB\x0b\x85C\u2028D\x00E &lt;b&gt; \ud800 \ufeff") == "A B C D E <b> ?"
    text = "Q&notation &copy right &amp; Sam &#40;1&#41;"
    assert clean_title(text) == "Q&notation &copy right & Sam (1)"
    assert len(clean_title("x" * 1000)) == 200
