"""Finding files: what stands beside the log, parts of one export, layouts of known data sets."""

import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_datasets import (
    NAMES,
    OWN,
    OWN_ROWS,
    foreign_entry,
    json_lines,
    load,
    own_csv,
    put,
    rows_of,
)

from loaders.foreign import files
from loaders.frozen import PROMPT_WORDS, DataConfig, prepare


def put_parquet(file, names, rows) -> None:
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows))))), file)


# ------------------------------------------------------------------------ one file, parts of one
@pytest.mark.parametrize("name", ["log.csv", "LOG.CSV", "log.tsv", "Log.Txt", "log.CSV.gz"])
def test_a_log_is_found_whatever_its_case_and_beside_hidden_files(name, tmp_path):
    put(tmp_path / name, own_csv())
    for hidden in (f"._{name}", f".{name}", ".DS_Store", f".{name}.crc"):
        put(tmp_path / hidden, b"\x00\x05\x16\x07")
    assert rows_of(load("csv", tmp_path)) == OWN_ROWS


@pytest.mark.parametrize("dataset, files, culprit", [
    ("csv", ["train.csv", "products.csv"], r"several files .*\['products.csv', 'train.csv'\]"),
    ("csv", ["notes.doc"], r"no csv file.*notes\.doc"),
    ("movielens", ["notes.doc"], r"ratings\.dat"),
    ("movielens", ["u.data"], r"titles need u\.item beside u\.data"),
    ("prepared", ["a-train.json", "b-train.json", "a-test.json"], r"one \.json file .*b-train"),
    ("csv", ["p0.csv", "p1.csv", "p2.csv"], r"p2\.csv: its first line, 'nothing', is one field"),
])  # fmt: skip
def test_folders_that_hold_no_log_or_several_are_refused_by_name(dataset, files, culprit, tmp_path):
    for file in files:
        put(tmp_path / file, "nothing\nof a table\n" if file == "p2.csv" else own_csv())
    with pytest.raises(ValueError, match=culprit):
        load(dataset, tmp_path)


@pytest.mark.parametrize("name", ["part-{0:05d}-1f0a-{0:012d}-c000.csv", "log_{0}.csv.gz"])
def test_parts_of_one_export_are_one_log(name, tmp_path):
    """Part 10 behind 9; a last line without its end; no times but the order; a header each."""
    rows = [(f"u{n % 4}", f"{n}", 1 + n % 5, f"T{n}") for n in range(60)]
    names = ("user", "item", "rating", "title")
    whole = load("csv", put(tmp_path / "whole.csv", own_csv(names, range(4), rows=rows)))
    for n in range(13):
        text = own_csv(names, range(4), rows=rows[5 * n : 5 * n + 5])
        put(tmp_path / "parts" / name.format(n), text.rstrip("\r\n") if n % 2 else text)
    put(tmp_path / "parts/_SUCCESS", "")
    found = load("csv", tmp_path / "parts")
    assert [row[:3] for row in rows_of(found)] == [row[:3] for row in rows_of(whole)]
    put(tmp_path / "parts" / name.format(13), "u1,9,1,T9\n")
    with pytest.raises(ValueError, match="no column user, .*each part must name its columns"):
        load("csv", tmp_path / "parts")


def test_parts_of_json_keep_equal_first_rows(tmp_path):
    """Only tables have headers: a first row that two parts share is a row in both."""
    for n, form in enumerate((json_lines, json.dumps)):
        put(tmp_path / f"part-{n}.json", form([dict(zip(NAMES, row)) for row in OWN]))
    assert load("jsonl", tmp_path, scale="rank:all").notes["repeats, added up"] == 3


def test_parts_may_name_their_columns_in_another_order_and_the_first_may_be_empty(tmp_path):
    put(tmp_path / "p-0.csv", "")
    put(tmp_path / "p-1.csv", own_csv(rows=OWN[:1]))
    put(tmp_path / "p-2.csv", own_csv(order=(4, 2, 0, 3, 1), rows=OWN[1:]))
    assert rows_of(load("csv", tmp_path)) == OWN_ROWS


@pytest.mark.parametrize("kind", ["parquet", "items", "recbole", "many", "movielens"])
def test_whatever_is_read_is_part_of_the_key(kind, tmp_path):
    """A folder of .pq files, an item file that is a folder, a gzipped .item beside a .inter that
    was given by name, the last of 1,003 parts, movies: replaced, examples are prepared anew."""
    rows = [(f"{1 + n % 6}", f"{1 + n % 41}", 3 + n % 3, 1600000000 + n) for n in range(120)]
    options, hashes, path = {"min_history": 1, "followers": 2}, [], tmp_path / "log"
    options |= {"prepared_dir": str(tmp_path / "p"), "dataset": kind}
    for title in ("Title", "Other"):
        titled = [(*row, f"{title} {row[1]}") for row in rows]
        items = [(n, f"{title} {n}", "") for n in range(1, 42)]
        if kind == "parquet":
            put_parquet(path / "p.pq", NAMES, titled)
        elif kind == "items":
            put_parquet(tmp_path / "items/p.pq", ("item", "title"), items)
            path = put(tmp_path / "log.csv", own_csv(rows=titled))
            options |= {"item_file": str(tmp_path / "items"), "dataset": "csv"}
        elif kind == "recbole":
            header = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
            path = put(tmp_path / "x.inter", own_csv(header, range(4), "\t", rows))
            text = own_csv(("item_id:token", "title:token_seq"), range(2), "\t", items)
            put(tmp_path / "x.item.gz", text)
        elif kind == "movielens":
            header = ("userId", "movieId", "rating", "timestamp")
            path = put(tmp_path / "ratings.csv", own_csv(header, range(4), rows=rows))
            header = ("movieId", "title", "genres")
            put(tmp_path / "movies.csv", own_csv(header, range(3), rows=items))
        else:
            options["dataset"] = "csv"
            for n in range(1003) if title == "Title" else (1002,):
                part = titled[n : n + 1] if n < 119 else titled[119:] if n == 1002 else []
                put(path / f"part-{n}.csv", own_csv(rows=part))
        hashes.append(prepare(DataConfig(data_dir=str(path), **options)).hash)
    assert hashes[0] != hashes[1]


# ------------------------------------------------------------------------------ MovieLens
RATINGS = "7::10::4.5::978301968\n7::20::1::978300760\n2::30::3::978298413\n"
RATED = [("2", "30", 3, 978298413), ("7", "20", 1, 978300760), ("7", "10", 4.5, 978301968)]
MOVIES = '10::Léon, The (1994)\n20::Say "A, B" (1999)\n30::Babylon 5\n'
QUOTED = '10,"Léon, The (1994)",A\n20,"Say ""A, B"" (1999)",B\n30,Babylon 5,()\n'
EDITIONS = {
    "dat": {"ratings.dat": RATINGS, "movies.dat": MOVIES.replace("\n", "::A\n")},
    "csv": {
        "ratings.csv": "userId,movieId,rating,timestamp\n" + RATINGS.replace("::", ","),
        "movies.csv": "movieId,title,genres\n" + QUOTED,
    },
    "100k": {
        "u.data": RATINGS.replace("::", "\t"),
        "u.item": MOVIES.replace("::", "|").replace("\n", "|01-Jan-1994||http://x/M/?Leon|0|1\n"),
    },
}


@pytest.mark.parametrize("place", ["folder", "ratings", "zip"])
@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_editions_of_movielens(edition, place, encoding, tmp_path):
    """10M, latest and 25M, 100K: one log; titles are UTF-8 where they can be."""
    folder, archive = tmp_path / "ml-some", tmp_path / "ml-some.zip"
    with zipfile.ZipFile(archive, "w") as z:
        for name, text in EDITIONS[edition].items():
            z.writestr(f"ml-some/{name}", text.encode(encoding))
            z.writestr(f"__MACOSX/ml-some/._{name}", b"\x00\x05")
            if "zip" not in place:
                put(folder / name, text.encode(encoding))
    if "zip" not in place:
        archive.unlink()
    paths = {"folder": folder, "ratings": folder / next(iter(EDITIONS[edition])), "zip": archive}
    found = load("movielens", paths[place])
    assert rows_of(found) == RATED and found.titles == ["The Léon", 'Say "A, B"', "Babylon 5"]
    assert found.words == PROMPT_WORDS["movielens"]


# ------------------------------------------------------------------------------ prepared JSON
@pytest.mark.parametrize("names", [
    ("latest_contest_train.json", "latest_contest_valid.json", "latest_contest_test.json"),
    ("carnival-train.json", "carnival-dev.json", "carnival-test.json"),
    ("Train.JSON", "Validation.JSON", "Test.JSON"),
    ("ml-size10000-cans20-train.json", "ml-size2000-cans20-val.json", "ml-cans20-test.json"),
])  # fmt: skip
def test_splits_are_told_apart_by_words(names, tmp_path):
    """The "test" of "latest" or "contest" and the "val" of "carnival" are no splits."""
    for name in names:
        put(tmp_path / name, json.dumps([foreign_entry(n, True) for n in range(6)]))
        put(tmp_path / f"._{name}", b"\0")
    config = DataConfig(dataset="prepared", data_dir=str(tmp_path))
    assert [file.name for file in files(config)] == list(names)
