"""Finding files: what stands beside the log, parts of one export, layouts of known data sets."""

import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_datasets import OWN, OWN_ROWS, foreign_entry, json_lines, load, own_csv, put, rows_of

from loaders.foreign import split_files
from loaders.frozen import DataConfig, prepare, words_of

NAMES = ("user", "item", "rating", "timestamp", "title")


def put_parquet(file, names, rows) -> None:
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows))))), file)


# ------------------------------------------------------------------------ one file, parts of one
@pytest.mark.parametrize("name", ["log.csv", "LOG.CSV", "log.tsv", "Log.Txt", "LOG.CSV.GZ"])
def test_a_log_is_found_whatever_its_case_and_beside_hidden_files(name, tmp_path):
    """macOS leaves ._log.csv, Spark .part.crc, an editor .log.csv.swp: none of them is a log."""
    made = put(tmp_path / ("made.gz" if name.endswith("GZ") else "made.csv"), own_csv())
    made.rename(tmp_path / name)
    for hidden in (f"._{name}", f".{name}", ".DS_Store", f".{name}.crc"):
        put(tmp_path / hidden, b"\x00\x05\x16\x07")
    assert rows_of(load("csv", tmp_path)) == OWN_ROWS


@pytest.mark.parametrize("dataset, files, culprit", [
    ("csv", ["train.csv", "products.csv"], r"several files .*\['products.csv', 'train.csv'\]"),
    ("csv", ["notes.doc"], r"no .*CSV file.*notes\.doc"),
    ("movielens", ["ml-a/ratings.csv", "ml-b/u.data"], r"one edition .*ratings.*u\.data"),
    ("amazon", ["Beauty.csv", "meta_Beauty.jsonl"], r"Beauty\.csv.*reviewerID.*rating"),
    ("prepared", ["a-train.json", "b-train.json", "a-test.json"], r"one train file.*b-train"),
    ("prepared", ["a-train.json"], r"one test file.*a-train\.json"),
    ("csv", ["p0.csv", "p1.csv", "p2.csv"], r"\*\.csv: 2 of 8 rows"),
])  # fmt: skip
def test_folders_that_hold_no_log_or_several_are_refused_by_name(dataset, files, culprit, tmp_path):
    for file in files:
        put(tmp_path / file, "nothing\nof a table\n" if file == "p2.csv" else own_csv())
    with pytest.raises(ValueError, match=culprit):
        load(dataset, tmp_path)


@pytest.mark.parametrize("headers", [True, False], ids=["a header each", "the first's header"])
@pytest.mark.parametrize("name", [
    "part-{0:05d}-1f0a7f2e-9c55-4f3c-8e0b-{0:012d}-c000.csv", "log_{0}.csv", "part-{0:05d}.csv.gz",
])  # fmt: skip
def test_parts_of_one_export_are_one_log(name, headers, tmp_path):
    """Part 10 behind 9; a last line without its end; an empty part; no times but the order."""
    rows = [(f"u{n % 4}", f"{n}", 1 + n % 5, f"T{n}") for n in range(60)]
    names = ("user", "item", "rating", "title")
    whole = load("csv", put(tmp_path / "whole.csv", own_csv(names, range(4), rows=rows)))
    for n in range(13):
        text = own_csv(names, range(4), rows=rows[5 * n : 5 * n + 5])
        text = text if headers or n == 0 else text.split("\n", 1)[1]
        put(tmp_path / "parts" / name.format(n), text.rstrip("\r\n") if n % 2 else text)
    put(tmp_path / "parts/_SUCCESS", "")
    found = load("csv", tmp_path / "parts")
    assert [row[:3] for row in rows_of(found)] == [row[:3] for row in rows_of(whole)]


@pytest.mark.parametrize("form", [json_lines, json.dumps])
def test_parts_of_json_keep_equal_first_rows(form, tmp_path):
    """Only tables have headers: a first row that two parts share is a row in both."""
    for n in range(2):
        put(tmp_path / f"part-{n}.json", form([dict(zip(NAMES, row)) for row in OWN]))
    assert load("jsonl", tmp_path, percentile="all").notes["repeats, added up"] == 3


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
    dataset = {"items": "csv", "many": "csv"}.get(kind, kind)
    for title in ("Title", "Other"):
        titled = [(*row, f"{title} {row[1]}") for row in rows]
        items = [(n, f"{title} {n}", "") for n in range(1, 42)]
        if kind == "parquet":
            put_parquet(path / "p.pq", NAMES, titled)
        elif kind == "items":
            put_parquet(tmp_path / "items/p.pq", ("item", "title"), items)
            path = put(tmp_path / "log.csv", own_csv(rows=titled))
            options["item_file"] = str(tmp_path / "items")
        elif kind == "recbole":
            header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
            path = put(tmp_path / "x.inter", header + own_csv(rows[0], range(4), "\t", rows[1:]))
            header = "item_id:token\ttitle:token_seq\n"
            put(tmp_path / "x.item.gz", header + own_csv(items[0], range(2), "\t", items[1:]))
        elif kind == "movielens":
            header = ("userId", "movieId", "rating", "timestamp")
            path = put(tmp_path / "ratings.csv", own_csv(header, range(4), rows=rows))
            text = own_csv(("movieId", "title", "genres"), range(3), rows=items)
            put(tmp_path / "movies.csv", text)
        for n in (range(1003) if title == "Title" else (1002,)) if kind == "many" else ():
            part = titled[n : n + 1] if n < 119 else titled[119:] if n == 1002 else []
            put(path / f"part-{n}.csv", own_csv(rows=part))
        options |= {"data_dir": str(path), "prepared_dir": str(tmp_path / "prepared")}
        hashes.append(prepare(DataConfig(dataset=dataset, **options)).hash)
    assert hashes[0] != hashes[1]


# ------------------------------------------------------------------------------ MovieLens
RATINGS = [(7, 10, 4.5, 978301968), (7, 20, 1, 978300760), (2, 30, 3, 978298413)]
MOVIES = [(10, "Léon, The (1994)", "A"), (20, 'Say "A, B" (1999)', "B"), (30, "Babylon 5", "()")]
EDITIONS = {  # the two files, what divides their fields, and more fields
    "dat": ("ratings.dat", "movies.dat", "::", "::", "::A"),
    "csv": ("ratings.csv", "movies.csv", ",", ",", ""),
    "100k": ("u.data", "u.item", "\t", "|", "|01-Jan-1994||http://us.imdb.com/M/?Leon|0|1"),
}


def movielens_files(edition: str, encoding: str = "utf-8") -> dict[str, bytes]:
    """Name -> content of the two files."""
    ratings, movies, between, movie_between, more = EDITIONS[edition]
    texts = {
        ratings: "".join(between.join(map(str, row)) + "\n" for row in RATINGS),
        movies: "".join(f"{i}{movie_between}{name}{more}\n" for i, name, _ in MOVIES),
    }
    if edition == "csv":
        texts[ratings] = "userId,movieId,rating,timestamp\n" + texts[ratings]
        texts[movies] = own_csv(("movieId", "title", "genres"), range(3), rows=MOVIES)
    return {name: text.encode(encoding) for name, text in texts.items()}


@pytest.mark.parametrize("place", ["folder", "around", "ratings", "zip", "around the zip"])
@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_editions_of_movielens(edition, place, encoding, tmp_path):
    """10M, latest and 25M, 100K: one log; titles are UTF-8 where they can be."""
    folder, archive = tmp_path / "ml-some", tmp_path / "ml-some.zip"
    files = movielens_files(edition, encoding)
    with zipfile.ZipFile(archive, "w") as z:
        for name, content in files.items():
            z.writestr(f"ml-some/{name}", content)
            z.writestr(f"__MACOSX/ml-some/._{name}", b"\x00\x05")
    if "zip" not in place:
        archive.unlink()
        for name, content in files.items():
            put(folder / name, content)
    paths = {"folder": folder, "ratings": folder / EDITIONS[edition][0], "zip": archive}
    found = load("movielens", paths.get(place, tmp_path))
    by_time = sorted(RATINGS, key=lambda row: (row[0], row[3]))
    assert rows_of(found) == [(str(u), str(i), r, t) for u, i, r, t in by_time]
    assert found.titles == ["The Léon", 'Say "A, B"', "Babylon 5"]
    assert found.words == words_of("movielens")
    assert found.name != "movielens"  # the paper's table is of 1M


@pytest.mark.parametrize("edition, file, old, new, culprit", [
    ("csv", "ratings.csv", b"7,20,1,", b"7,20,x,", "expected user,movie.*Row #3"),
    ("csv", "movies.csv", b'""A, B"" (1999)"', b'""A, B"" (1999)', "expected movie,title"),
    ("100k", "u.item", b"20|", b"20;", r"expected movie\|title.*Row #2"),
    ("csv", "movies.csv", b"20,", b"21,", "1 items of the log have no title"),
])  # fmt: skip
def test_bad_lines_of_an_edition_are_named(edition, file, old, new, culprit, tmp_path):
    for name, content in movielens_files(edition).items():
        assert name != file or old in content
        put(tmp_path / name, content.replace(old, new) if name == file else content)
    with pytest.raises(ValueError, match=rf"{file.replace('.', '[.]')}: {culprit}"):
        load("movielens", tmp_path)


# ------------------------------------------------------------------------------ Amazon of 2023
REVIEWS = [
    {"rating": 4.0, "title": "Great!", "asin": "B0V0000001", "parent_asin": f"B0P000000{n}",
     "user_id": f"AE{n % 2}", "timestamp": 1500062984000 + n}
    for n in range(4)
]  # fmt: skip
META = [{"title": f"River {n}", "parent_asin": f"B0P000000{n}"} for n in range(4)]
AMAZON_ROWS = [(f"AE{n % 2}", f"B0P000000{n}", 4, 1500062984) for n in (0, 2, 1, 3)]


def amazon_csv(rows: list[dict], history: bool) -> str:
    names = ["user_id", "parent_asin", "rating", "timestamp"] + ["history"] * history
    lines = [names, *([str(r.get(name, "B0P9 B0P8")) for name in names] for r in rows)]
    return "\n".join(",".join(line) for line in lines) + "\n"


@pytest.mark.parametrize("form", ["lines", "array", "csv", "history", "splits"])
@pytest.mark.parametrize("category", ["Beauty", "Books"])
def test_amazon_of_2023(form, category, tmp_path):
    """Reviews, ratings with and without histories, the benchmark's three files; milliseconds;
    titles by parent_asin."""
    parts = {".train.csv": REVIEWS[:1], ".valid.csv": REVIEWS[1:2], ".test.csv": REVIEWS[2:]}
    files = {
        "lines": {".jsonl.gz": json_lines(REVIEWS)},
        "array": {".json": json.dumps(REVIEWS)},
        "csv": {".csv": amazon_csv(REVIEWS, False)},
        "history": {".csv": amazon_csv(REVIEWS, True)},
        "splits": {ending: amazon_csv(rows, True) for ending, rows in parts.items()},
    }
    for ending, text in files[form].items():
        put(tmp_path / f"{category}{ending}", text)
    put(tmp_path / f"meta_{category}.jsonl", json_lines(META))
    put(tmp_path / f"._meta_{category}.jsonl", b"\0")
    found = load("amazon", tmp_path)
    assert rows_of(found) == AMAZON_ROWS and found.titles == [f"River {n}" for n in range(4)]
    assert found.words[0] == ("books" if category == "Books" else "products")


# ------------------------------------------------------------------------------ prepared JSON
@pytest.mark.parametrize("names", [
    ("ml-latest-train.json", "ml-latest-val.json", "ml-latest-test.json"),
    ("latest_contest_train.json", "latest_contest_valid.json", "latest_contest_test.json"),
    ("carnival-train.json", "carnival-dev.json", "carnival-test.json"),
    ("Train.JSON", "Validation.JSON", "Test.JSON"),
    ("traindata.json", "valdata.json", "testdata.json"),
    ("ml-size10000-cans20-train.json", "ml-size2000-cans20-val.json", "ml-cans20-test.json"),
])  # fmt: skip
def test_splits_are_told_apart_by_words(names, tmp_path):
    """The "test" of "latest" or "contest" and the "val" of "carnival" are no splits."""
    for name in names:
        put(tmp_path / name, json.dumps([foreign_entry(n, True) for n in range(6)]))
        put(tmp_path / f"._{name}", b"\0")
    assert [split_files(tmp_path)[s].name for s in ("train", "val", "test")] == list(names)
