"""Finding files: what stands in a folder beside the log, layouts of known data sets,
parts of one export, JSON arrays."""

import csv
import io
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_datasets import OWN, OWN_ROWS, foreign_entry, json_lines, load, own_csv, put, rows_of

from loaders.foreign import split_files
from loaders.frozen import DataConfig, prepare, words_of


# ------------------------------------------------------------------------ one file among others
@pytest.mark.parametrize(
    "name", ["log.csv", "LOG.CSV", "log.tsv", "Log.Txt", "log.csv.gz", "LOG.CSV.GZ"]
)
def test_a_log_is_found_whatever_its_case_and_beside_hidden_files(name, tmp_path):
    """macOS leaves ._log.csv, Spark .part.crc, an editor .log.csv.swp: none of them is a log."""
    packed = name.lower().endswith("gz")
    made = put(tmp_path / ("made.gz" if packed else "made.csv"), own_csv())
    made.rename(tmp_path / name)
    for hidden in (f"._{name}", f".{name}", ".DS_Store", f".{name}.crc"):
        put(tmp_path / hidden, b"\x00\x05\x16\x07")
    assert rows_of(load("csv", tmp_path)) == OWN_ROWS


def test_two_logs_are_refused_by_name(tmp_path):
    for name in ("train.csv", "products.csv"):
        put(tmp_path / name, own_csv())
    with pytest.raises(
        ValueError, match=r"several files could be a CSV file: \['products.csv', 'train.csv'\]"
    ):
        load("csv", tmp_path)
    put(tmp_path / "empty" / "notes.doc", "x")
    with pytest.raises(ValueError, match=r"no a CSV file|no .*CSV file.*notes\.doc"):
        load("csv", tmp_path / "empty")


# ------------------------------------------------------------------------------ parts
PART_NAMES = {
    "spark": "part-{0:05d}-1f0a7f2e-9c55-4f3c-8e0b-{0:012d}-c000.csv",
    "bigquery": "export-{0:012d}.csv",
    "split": "log_{0}.csv",
    "gzipped": "part-{0:05d}.csv.gz",
}


@pytest.mark.parametrize("headers", [True, False], ids=["a header each", "the first's header"])
@pytest.mark.parametrize("names", PART_NAMES.values(), ids=PART_NAMES.keys())
def test_parts_of_one_export_are_one_log(names, headers, tmp_path):
    """Twelve parts, 10 and 11 behind 9; a last line without its end; an empty part."""
    rows = [(f"u{n % 4}", f"{n}", 1 + n % 5, 1600000000, f"T{n}") for n in range(60)]
    whole = rows_of(load("csv", put(tmp_path / "whole.csv", own_csv(rows=rows))))
    for n in range(13):
        text = own_csv(rows=rows[5 * n : 5 * n + 5])
        text = text if headers or n == 0 else text.split("\n", 1)[1]
        put(tmp_path / "parts" / names.format(n), text.rstrip("\r\n") if n % 2 else text)
    put(tmp_path / "parts/_SUCCESS", "")
    assert rows_of(load("csv", tmp_path / "parts")) == whole


def test_parts_of_json_lines_keep_equal_first_lines(tmp_path):
    """Only tables have headers: a first line that two parts share is a row in both."""
    records = [
        dict(zip(("user", "item", "rating", "timestamp", "title"), row, strict=True)) for row in OWN
    ]
    for n in range(2):
        put(tmp_path / f"part-{n}.jsonl", json_lines(records))
    interactions = load("jsonl", tmp_path, percentile="all")
    assert interactions.notes["repeats, added up"] == 3


def test_parts_without_timestamps_go_on_in_the_order_of_their_numbers(tmp_path):
    names, order = ("user", "item", "rating"), (0, 1, 2)
    for n in (9, 10):
        rows = [("a", f"i{n}{k}", 4 + k) for k in range(2)]
        put(tmp_path / f"log-{n}.csv", own_csv(names, order, rows=rows))
    interactions = load("csv", tmp_path)
    assert [item for _, item, *_ in rows_of(interactions)] == ["i90", "i91", "i100", "i101"]


def test_a_bad_line_of_a_part_is_named_with_all_parts(tmp_path):
    for n in range(2):
        put(tmp_path / f"p{n}.csv", own_csv())
    put(tmp_path / "p2.csv", "nothing\nof a table\n")
    with pytest.raises(ValueError, match=r"p\*\.csv: 2 of 8 rows"):
        load("csv", tmp_path)


def test_changed_parts_are_prepared_anew(tmp_path):
    rows = [(f"u{n % 6}", f"{n % 41}", 4, 1600000000 + n, f"T{n % 41}") for n in range(90)]
    hashes = []
    for count in (80, 90):
        put(tmp_path / "log/p-0.csv", own_csv(rows=rows[:40]))
        put(tmp_path / "log/p-1.csv", own_csv(rows=rows[40:count]))
        config = DataConfig(
            dataset="csv", data_dir=str(tmp_path / "log"), prepared_dir=str(tmp_path / "p"),
            followers=2, min_history=1,
        )  # fmt: skip
        hashes.append(prepare(config).hash)
    assert hashes[0] != hashes[1]


def test_parts_may_name_their_columns_in_another_order_and_the_first_may_be_empty(tmp_path):
    whole = rows_of(load("csv", put(tmp_path / "whole.csv", own_csv())))
    put(tmp_path / "log/p-0.csv", "")
    put(tmp_path / "log/p-1.csv", own_csv(rows=OWN[:1]))
    put(tmp_path / "log/p-2.csv", own_csv(order=(4, 2, 0, 3, 1), rows=OWN[1:]))
    assert rows_of(load("csv", tmp_path / "log")) == whole


@pytest.mark.parametrize("kind", ["parquet", "items", "recbole", "many"])
def test_whatever_is_read_is_part_of_the_key(kind, tmp_path):
    """A folder of .pq files, an item file that is a folder, a gzipped .item beside a .inter that
    was given by name, the last of 1,003 parts: replaced, examples are prepared anew."""
    rows = [(f"u{n % 6}", f"{n % 41}", 3 + n % 3, 1600000000 + n, f"T{n % 41}") for n in range(120)]
    names, options, hashes = ("user", "item", "rating", "timestamp", "title"), {}, []
    for title in ("Title", "Other"):
        retitled = [(*row[:4], f"{title} {row[1]}") for row in rows]
        columns = dict(zip(names, map(list, zip(*retitled))))
        path = tmp_path / "log"
        if kind == "parquet":
            path.mkdir(exist_ok=True)
            pq.write_table(pa.table(columns), path / "p.pq")
        elif kind == "items":
            (tmp_path / "items").mkdir(exist_ok=True)
            items = {"item": list(range(41)), "title": [f"{title} {n}" for n in range(41)]}
            pq.write_table(pa.table(items), tmp_path / "items/p.pq")
            path = put(tmp_path / "log.csv", own_csv(rows=rows))
            options = {"item_file": str(tmp_path / "items")}
        elif kind == "recbole":
            header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
            text = header + "".join("\t".join(map(str, row[:4])) + "\n" for row in rows)
            path = put(tmp_path / "x.inter", text)
            items = "".join(f"{n}\t{title} {n}\n" for n in range(41))
            put(tmp_path / "x.item.gz", "item_id:token\ttitle:token_seq\n" + items)
        else:
            for n in range(1003) if title == "Title" else (1002,):
                part = retitled[n : n + 1] if n < 119 else retitled[119:] if n == 1002 else []
                put(path / f"part-{n}.csv", own_csv(rows=part))
        dataset = {"items": "csv", "many": "csv"}.get(kind, kind)
        config = DataConfig(
            dataset=dataset, data_dir=str(path), prepared_dir=str(tmp_path / "p"),
            followers=2, min_history=1, **options,
        )  # fmt: skip
        hashes.append(prepare(config).hash)
    assert hashes[0] != hashes[1]


# ------------------------------------------------------------------------------ MovieLens
RATINGS = [(7, 10, 4.5, 978301968), (7, 20, 1, 978300760), (2, 30, 3, 978298413)]
MOVIES = [(10, "Léon, The (1994)", "Crime"), (20, 'Say "A, B" (1999)', "Drama"), (30, "Babylon 5", "(no genres)")]  # noqa: E501  # fmt: skip
TITLES = ["The Léon", 'Say "A, B"', "Babylon 5"]


def movielens_files(edition: str, encoding: str) -> dict[str, bytes]:
    """Name -> content of the two files."""
    if edition == "csv":
        out = io.StringIO()
        csv.writer(out).writerows([("movieId", "title", "genres"), *MOVIES])
        rows = [("userId", "movieId", "rating", "timestamp"), *RATINGS]
        ratings = "\n".join(",".join(map(str, row)) for row in rows)
        files = {"ratings.csv": ratings, "movies.csv": out.getvalue()}
    elif edition == "dat":
        files = {
            "ratings.dat": "\n".join("::".join(map(str, row)) for row in RATINGS),
            "movies.dat": "\n".join("::".join(map(str, row)) for row in MOVIES),
        }
    else:
        more = "|01-Jan-1994||http://us.imdb.com/M/?Leon|0|1"
        files = {
            "u.data": "\n".join("\t".join(map(str, row)) for row in RATINGS),
            "u.item": "\n".join(f"{n}|{title}{more}" for n, title, _ in MOVIES),
        }
    return {name: f"{text.rstrip()}\n".encode(encoding) for name, text in files.items()}


@pytest.mark.parametrize("place", ["the folder", "around it", "ratings", "zip", "around the zip"])
@pytest.mark.parametrize("edition", ["dat", "csv", "100k"])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_editions_of_movielens(edition, place, encoding, tmp_path):
    """10M, latest and 25M, 100K: one log; titles are UTF-8 where they can be."""
    folder, files = tmp_path / "ml-some", movielens_files(edition, encoding)
    if "zip" in place:
        with zipfile.ZipFile(tmp_path / "ml-some.zip", "w") as z:
            for name, content in files.items():
                z.writestr(f"ml-some/{name}", content)
                z.writestr(f"__MACOSX/ml-some/._{name}", b"\x00\x05")
    for name, content in files.items() if "zip" not in place else ():
        put(folder / name, content)
    paths = {
        "the folder": folder,
        "around it": tmp_path,
        "ratings": folder / next(iter(files)),
        "zip": tmp_path / "ml-some.zip",
        "around the zip": tmp_path,
    }
    interactions = load("movielens", paths[place])
    assert rows_of(interactions) == [
        ("2", "30", 3, 978298413), ("7", "20", 1, 978300760), ("7", "10", 4.5, 978301968),
    ]  # fmt: skip
    assert interactions.titles == TITLES and interactions.words == words_of("movielens")
    assert interactions.name != "movielens"  # the paper's table is of 1M


def test_changed_movies_beside_given_ratings_are_prepared_anew(tmp_path):
    files = movielens_files("csv", "utf-8")
    rows = [
        (u, 10 + i, 4 + i % 2, 10**9 + i) for u in range(1, 9) for i in range(3 * u, 3 * u + 20)
    ]
    table = "userId,movieId,rating,timestamp\n" + "".join(
        f"{u},{i},{r},{t}\n" for u, i, r, t in rows
    )
    hashes = []
    for word in ("Movie", "Film"):
        movies = "".join(f"{10 + i},{word} {i} (1999),Drama\n" for i in range(60))
        put(tmp_path / "movies.csv", files["movies.csv"].split(b"\r\n")[0] + f"\n{movies}".encode())
        config = DataConfig(
            dataset="movielens", data_dir=str(put(tmp_path / "ratings.csv", table)),
            prepared_dir=str(tmp_path / "p"), followers=9, min_history=1,
        )  # fmt: skip
        hashes.append(prepare(config).hash)
    assert hashes[0] != hashes[1]


def test_two_editions_in_one_folder_are_refused(tmp_path):
    for edition in ("csv", "100k"):
        for name, content in movielens_files(edition, "utf-8").items():
            put(tmp_path / f"ml-{edition}" / name, content)
    with pytest.raises(ValueError, match=r"several editions of MovieLens.*u\.data.*ratings\.csv"):
        load("movielens", tmp_path)


@pytest.mark.parametrize(
    "edition, file, old, new, culprit",
    [
        ("csv", "ratings.csv", b"7,20,1,", b"7,20,x,", "line 3 is not userId,movieId,rating"),
        ("csv", "ratings.csv", b"7,20,1,", b"7,20,7,", "line 3: expected ids"),
        ("csv", "ratings.csv", b"userId,movieId,rating,timestamp\n", b"", None),
        ("csv", "movies.csv", b"20,", b"x,", "line 3 is not movieId,title,genres"),
        ("csv", "movies.csv", b'""A, B"" (1999)"', b'""A, B"" (1999)', "unexpected end|not movieId"),  # noqa: E501
        ("100k", "u.data", b"7\t20\t1\t", b"7\t20\t", "line 2 is not UserID\tMovieID"),
        ("100k", "u.item", b"20|", b"20;", r"line 2 is not MovieID\|Title"),
        ("csv", "movies.csv", b"20,", b"21,", "1 items of the log have no title"),
    ],
)  # fmt: skip
def test_bad_lines_of_an_edition_are_named(edition, file, old, new, culprit, tmp_path):
    for name, content in movielens_files(edition, "utf-8").items():
        assert name != file or old in content
        put(tmp_path / name, content.replace(old, new) if name == file else content)
    if culprit is None:
        assert len(load("movielens", tmp_path).user) == 3
        return
    with pytest.raises(ValueError, match=rf"{file.replace('.', '[.]')}: {culprit}"):
        load("movielens", tmp_path)


# ------------------------------------------------------------------------------ Amazon of 2023
REVIEWS = [
    {"rating": 4.0, "title": "Great!", "text": "x", "asin": "B0V0000001",
     "parent_asin": f"B0P000000{n}", "user_id": f"AE{n % 2}", "timestamp": 1500062984000 + n}
    for n in range(4)
]  # fmt: skip
META = [
    {"main_category": "All", "title": f"River {n}", "parent_asin": f"B0P000000{n}"}
    for n in range(4)
]
AMAZON_ROWS = [
    ("AE0", "B0P0000000", 4, 1500062984), ("AE0", "B0P0000002", 4, 1500062984),
    ("AE1", "B0P0000001", 4, 1500062984), ("AE1", "B0P0000003", 4, 1500062984),
]  # fmt: skip


def amazon_csv(rows: list[dict], history: bool) -> str:
    names = ["user_id", "parent_asin", "rating", "timestamp"] + ["history"] * history
    lines = [names, *([str(r.get(name, "B0P9 B0P8")) for name in names] for r in rows)]
    return "\n".join(",".join(line) for line in lines) + "\n"


@pytest.mark.parametrize("form", ["lines", "array", "csv", "history", "splits"])
@pytest.mark.parametrize("category", ["Beauty", "Books", "Movies_and_TV"])
def test_amazon_of_2023(form, category, tmp_path):
    """Reviews, ratings with and without histories, the benchmark's three files; milliseconds;
    titles by parent_asin."""
    if form == "lines":
        put(tmp_path / f"{category}.jsonl.gz", json_lines(REVIEWS))
    elif form == "array":
        put(tmp_path / f"{category}.json", json.dumps(REVIEWS))
    elif form == "splits":
        for n, split in enumerate(("train", "valid", "test")):
            part = REVIEWS[n : n + 1] if n < 2 else REVIEWS[2:]
            put(tmp_path / f"{category}.{split}.csv", amazon_csv(part, True))
    else:
        put(tmp_path / f"{category}.csv", amazon_csv(REVIEWS, form == "history"))
    put(tmp_path / f"meta_{category}.jsonl", json_lines(META))
    put(tmp_path / f"._meta_{category}.jsonl", b"\0")
    interactions = load("amazon", tmp_path)
    assert rows_of(interactions) == AMAZON_ROWS and interactions.titles == [
        f"River {n}" for n in range(4)
    ]
    books = category == "Books"
    assert interactions.words[0] == ("books" if books else "products")
    assert words_of("amazon", str(tmp_path)) == interactions.words


def test_amazon_with_an_unknown_header_is_refused(tmp_path):
    put(tmp_path / "Beauty.csv", "who,what,stars\n" + "a,b,1\n" * 3)
    put(tmp_path / "meta_Beauty.jsonl", json_lines(META))
    with pytest.raises(ValueError, match=r"Beauty\.csv.*reviewerID.*stars"):
        load("amazon", tmp_path)


# ------------------------------------------------------------------------------ prepared JSON
@pytest.mark.parametrize(
    "names",
    [
        ("ml-latest-train.json", "ml-latest-val.json", "ml-latest-test.json"),
        ("latest_contest_train.json", "latest_contest_valid.json", "latest_contest_test.json"),
        ("carnival-train.json", "carnival-dev.json", "carnival-test.json"),
        ("Train.JSON", "Validation.JSON", "Test.JSON"),
        ("traindata.json", "valdata.json", "testdata.json"),
        ("movielens-size10000-cans20-train.json", "movielens-size2000-cans20-val.json", "movielens-cans20-test.json"),  # noqa: E501
    ],
)  # fmt: skip
def test_splits_are_told_apart_by_words(names, tmp_path):
    """The "test" of "latest" or "contest" and the "val" of "carnival" are no splits."""
    for number, name in enumerate(names):
        put(tmp_path / name, json.dumps([foreign_entry(n, True) for n in range(6 + number)]))
        put(tmp_path / f"._{name}", b"\0")
    assert [split_files(tmp_path)[s].name for s in ("train", "val", "test")] == list(names)
    prepared = prepare(
        DataConfig(dataset="prepared", data_dir=str(tmp_path), prepared_dir=str(tmp_path / "p"))
    )
    assert [len(prepared.splits[s]) for s in ("train", "val", "test")] == [6, 7, 8]


def test_two_files_of_a_split_are_refused(tmp_path):
    for name in ("a-train.json", "b-train.json", "a-test.json"):
        put(tmp_path / name, json.dumps([foreign_entry(0, True)]))
    with pytest.raises(ValueError, match=r"one train file.*\['a-train.json', 'b-train.json'\]"):
        split_files(tmp_path)
    (tmp_path / "a-test.json").unlink()
    (tmp_path / "b-train.json").unlink()
    with pytest.raises(ValueError, match=r"one test file .*a-train\.json"):
        split_files(tmp_path)
