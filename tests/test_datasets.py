"""Loaders of Amazon, Steam, BeerAdvocate, LastFM, RecBole and prepared JSON:
files of ours, real samples, fuzz of logs."""

import ast
import csv
import gzip
import io
import json
import random
import re
import shutil
import tarfile
from collections import Counter
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_loaders import DATA, check_table

from data import build_examples, render_prompt
from loaders.frozen import DataConfig, load_interactions, prepare
from loaders.ownlog import parse_columns
from loaders.published import beer_title, mend_encoding
from loaders.table import clean_title, percentile_ratings


def load(dataset: str, path, **options):
    return load_interactions(DataConfig(dataset=dataset, data_dir=str(path), **options))


load_amazon, load_steam = partial(load, "amazon"), partial(load, "steam")
load_beeradvocate, load_lastfm = partial(load, "beeradvocate"), partial(load, "lastfm")


def needs(name: str):
    return pytest.mark.skipif(
        not (DATA / name).exists(), reason=f"{DATA / name} is absent; RECPO_DATA names its folder"
    )


def put(file: Path, text: str | bytes) -> Path:
    """Write a file, gzipped if its name says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode() if isinstance(text, str) else text
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def rows_of(interactions) -> list[tuple]:
    columns = zip(
        interactions.user.tolist(),
        interactions.item.tolist(),
        interactions.rating.tolist(),
        interactions.timestamp.tolist(),
        strict=True,
    )
    return [(interactions.user_ids[u], interactions.item_ids[i], r, t) for u, i, r, t in columns]


# -------------------------------------------------------------------------------------- percentiles
def test_percentile_ratings_are_mid_ranks_of_the_group():
    """ceil(5 * mid-rank / size): equal amounts tie, the top fifth gets 5, a group of one gets 3."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = int(rng.integers(1, 60))
        amount, group = (
            rng.integers(0, 12, n).astype(np.float32),
            rng.integers(0, 5, n).astype(np.int32),
        )
        found = percentile_ratings(amount, group)
        for i in range(n):
            inside = amount[group == group[i]]
            share = ((inside < amount[i]).sum() + 0.5 * (inside == amount[i]).sum()) / len(inside)
            assert found[i] == np.ceil(5 * share), (amount[i], inside)
    assert percentile_ratings(np.array([7.0]), np.array([0])).tolist() == [3]
    ranks = np.bincount(percentile_ratings(np.arange(100.0), np.zeros(100)).astype(int))
    assert ranks.tolist() == [0, 20, 20, 20, 20, 20]


# ------------------------------------------------------------------------------------ files of ours
AMAZON = [
    {
        "overall": 5.0,
        "reviewerID": "A1",
        "asin": "B000000001",
        "unixReviewTime": 864000,
        "reviewText": 'quotes " and \n',
    },
    {
        "overall": 2.0,
        "reviewerID": "A1",
        "asin": "B000000002",
        "unixReviewTime": 86400,
        "vote": "1,234",
    },
    {
        "overall": 4.0,
        "reviewerID": "A2",
        "asin": "B000000001",
        "unixReviewTime": 86400,
        "style": {"Format:": " Kindle"},
    },
    {"overall": 3.0, "reviewerID": "A2", "asin": "B000000001", "unixReviewTime": 172800},
    {"overall": 1.0, "reviewerID": "A2", "asin": "B000000003", "unixReviewTime": 172800},
]
AMAZON_META = [
    {"asin": "B000000001", "title": "Tom &amp; Jerry"},
    {"asin": "B000000001", "title": "again"},
    {"asin": "B000000002", "title": "Go", "details": {}, "price": "$1"},
    {"asin": "B000000003", "title": '<span class="a-size-medium">'},
    {"asin": "B000000009", "title": "unseen"},
]
STEAM = [
    {
        "username": "Chaos Syren",
        "hours": 0.1,
        "product_id": "10",
        "date": "2017-12-17",
        "text": "it's {'hours': 5.0}",
    },
    {
        "username": "Chaos Syren",
        "hours": 8,
        "product_id": "20",
        "date": "2017-12-16",
        "early_access": False,
    },
    {
        "username": "Bob",
        "hours": 3.5,
        "product_id": "10",
        "date": "2017-12-18",
        "compensation": "Product received for free",
    },
    {"username": "Bob", "product_id": "20", "date": "2017-12-18"},
    {"username": "Bob", "hours": 4.5, "product_id": "10", "date": "2017-12-19"},
]
STEAM_GAMES = [
    {"id": "10", "app_name": "Sam &amp; Max", "title": "other"},
    {"id": "20", "title": "Portal™", "tags": ["a", "b"]},
    {"app_name": "no id"},
]
BEER = [
    {"review/overall": 1.5, "beer/name": "Sausa 5% Weizen", "beer/ABV": 5.0,
     "beer/style": "Hefeweizen", "beer/beerId": "4", "user/profileName": "stcules",
     "review/timeUnix": 1234817823, "review/timeStruct": {"hour": 20}},
    {"review/overall": 4.0, "beer/name": "Pale Ale", "beer/ABV": None,
     "beer/style": "", "beer/beerId": "5", "user/profileName": "stcules",
     "review/timeUnix": 1234817800},
    {"review/overall": 0.0, "beer/name": "Pale Ale", "beer/style": "", "beer/beerId": "5",
     "user/profileName": "ann", "review/timeUnix": 9},
    {"review/overall": 5.0, "beer/name": "Pale Ale", "beer/style": "", "beer/beerId": "5",
     "user/profileName": "", "review/timeUnix": 9},
]  # fmt: skip
BEER_ROWS = [("stcules", "5", 4.0, 1234817800), ("stcules", "4", 1.5, 1234817823)]
LASTFM = """\
user_000001\t2009-05-04T23:08:57Z\tmb-1\tDeep "Dish\t\tFuck Me
user_000001\t2009-05-03T23:08:57Z\tmb-2\t坂本龍一\tt\tComposition
user_000001\t2009-05-01T00:00:00Z\tmb-1\tDeep "Dish\t\tOther
user_000001\t2009-05-01T00:00:00Z\t\tNobody\t\tOther
user_000002\t2009-05-02T00:00:00Z\tmb-1\tDeep "Dish\t\tOther
"""
INTER = """\
user_id:token\titem_id:token\trating:float\ttimestamp:float
u1\t10\t4.0\t100
u1\t20\t2.5\t50
u2\t10\t5\t70
"""
ITEM = 'item_id:token\tmovie_title:token_seq\tgenre:token_seq\n10\tThe "M"\tDrama\n20\tGo\tComedy\n'


def json_lines(records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def literal_lines(records) -> str:
    """As Python 2 wrote them."""
    return "".join(
        re.sub(r"(?<=[{ ])'([\w/]+)':", r"u'\1':", repr(record)) + "\n" for record in records
    )


def beer_blocks() -> str:
    names = {"user/profileName": "review/profileName", "review/timeUnix": "review/time"}
    text = ""
    for record in BEER:
        for key, value in record.items():
            if key != "review/timeStruct":
                text += f"{names.get(key, key)}: {'' if value is None else value}\n"
        text += "\n"
    return text


def beer_csv() -> bytes:
    names = [
        "review_time",
        "beer_name",
        "review_overall",
        "beer_style",
        "beer_abv",
        "review_profilename",
        "beer_beerid",
    ]
    keys = [
        "review/timeUnix",
        "beer/name",
        "review/overall",
        "beer/style",
        "beer/ABV",
        "user/profileName",
        "beer/beerId",
    ]
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(["", *names])
    for n, record in enumerate(BEER):
        writer.writerow([n, *(record.get(key) for key in keys)])
    return out.getvalue().encode("latin-1")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_amazon_reviews_and_titles(suffix, tmp_path):
    """The last of a repeated pair counts; entities are text;
    an item whose title is a piece of a page is dropped."""
    put(tmp_path / f"Books_5.json{suffix}", json_lines(AMAZON))
    put(tmp_path / f"meta_Books.json{suffix}", json_lines(AMAZON_META))
    interactions = load_amazon(tmp_path)
    expected = [
        ("A1", "B000000002", 2, 86400),
        ("A1", "B000000001", 5, 864000),
        ("A2", "B000000001", 3, 172800),
    ]
    assert (
        rows_of(interactions) == expected
        and interactions.titles == ["Tom & Jerry", "Go"]
        and interactions.name == "amazon_books"
    )
    assert interactions.notes["interactions with an item that has no title"] == 1
    check_table(interactions)


@pytest.mark.parametrize("columns", [("asin", "reviewerID"), ("reviewerID", "asin")])
def test_amazon_ratings_only_come_in_two_orders(columns, tmp_path):
    """2018: item,user,rating,timestamp; 2014: user,item,...: told apart by the ids."""
    rows = [",".join(str(r[c]) for c in (*columns, "overall", "unixReviewTime")) for r in AMAZON]
    put(tmp_path / "Books.csv", "\n".join(rows))
    put(tmp_path / "meta_Books.json", json_lines(AMAZON_META))
    assert len(rows_of(load_amazon(tmp_path))) == 3 and load_amazon(tmp_path).user_ids == [
        "A1",
        "A2",
    ]


def test_amazon_without_titles_says_what_is_missing(tmp_path):
    put(tmp_path / "Books_5.json", json_lines(AMAZON))
    with pytest.raises(ValueError, match=r"titles need meta_Books\.json\.gz beside Books_5\.json"):
        load_amazon(tmp_path)


def test_steam_hours_become_ratings_within_the_game(tmp_path):
    """Python literals; hours rank among the game's players;
    without hours a review is counted and left out."""
    put(tmp_path / "steam_reviews.json.gz", literal_lines(STEAM))
    put(tmp_path / "steam_games.json.gz", literal_lines(STEAM_GAMES))
    interactions = load_steam(tmp_path)
    assert rows_of(interactions) == [
        ("Bob", "10", 4, 1513641600),
        ("Chaos Syren", "20", 3, 1513382400),
        ("Chaos Syren", "10", 2, 1513468800),
    ]
    assert (
        interactions.titles == ["Sam & Max", "Portal™"]
        and interactions.notes["rows without rating"] == 1
    )
    assert [r for *_, r, _ in rows_of(load_steam(tmp_path, percentile="all"))] == [3, 5, 1]


@pytest.mark.parametrize(
    "form, content",
    [
        ("beeradvocate.json", literal_lines(BEER)),
        ("beeradvocate.txt.gz", beer_blocks()),
        ("beer_reviews.csv", beer_csv()),
    ],
)
def test_beeradvocate_in_three_forms(form, content, tmp_path):
    """Dict lines, text blocks and CSV give the same log;
    zeros and empty names are counted and left out."""
    put(tmp_path / form, content)
    interactions = load_beeradvocate(tmp_path)
    assert rows_of(interactions) == BEER_ROWS and interactions.titles == [
        "Sausa Weizen (5% ABV, Hefeweizen)",
        "Pale Ale",
    ]
    assert interactions.notes == {"rows without user": 1, "rows without rating (0 1 times)": 1}


def test_twice_encoded_names_are_mended():
    """UTF-8 read as latin-1 is put right; what was right stays."""
    names = ["KÃ¶lsch", "Kölsch", "Pale", "日本", "FÃ¸dselsdags"]
    assert [mend_encoding(name) for name in names] == [
        "Kölsch",
        "Kölsch",
        "Pale",
        "日本",
        "Fødselsdags",
    ]


def test_beer_titles_hold_strength_and_style():
    assert beer_title("IPA", "6.50", "American IPA") == "IPA (6.5% ABV, American IPA)"
    assert beer_title("IPA", "nan", "") == beer_title("IPA", "", "") == "IPA"
    assert beer_title("100%", "", "Rye") == "100% (Rye)"


@pytest.mark.parametrize("form", ["plain", "gz", "tar"])
def test_lastfm_counts_plays_of_artists(form, tmp_path):
    """One row per user and artist at the first play,
    rated by the number of plays among the artist's listeners."""
    name = "userid-timestamp-artid-artname-traid-traname.tsv"
    if form == "tar":
        with tarfile.open(tmp_path / "lastfm-dataset-1K.tar.gz", "w:gz") as archive:
            entry = tarfile.TarInfo(f"lastfm-dataset-1K/{name}")
            entry.size = len(LASTFM.encode())
            archive.addfile(entry, io.BytesIO(LASTFM.encode()))
    else:
        put(tmp_path / (name + ".gz" if form == "gz" else name), LASTFM)
    interactions = load_lastfm(tmp_path)
    first, second, other = 1241136000, 1241392137, 1241222400
    assert rows_of(interactions) == [
        ("user_000001", "mb-1", 4, first),
        ("user_000001", "mb-2", 3, second),
        ("user_000002", "mb-1", 2, other),
    ]
    assert (
        interactions.titles == ['Deep "Dish', "坂本龍一"]
        and interactions.notes["rows without item"] == 1
    )


def test_recbole_atomic_files(tmp_path):
    """Typed headers; quotes are characters; titles come from the .item file beside."""
    put(tmp_path / "ml.inter", INTER)
    put(tmp_path / "ml.item", ITEM)
    interactions = load("recbole", tmp_path)
    assert rows_of(interactions) == [
        ("u1", "20", 2.5, 50),
        ("u1", "10", 4, 100),
        ("u2", "10", 5, 70),
    ] and interactions.titles == [
        'The "M"',
        "Go",
    ]


@pytest.mark.parametrize("between", [",", ";", "|", " ", " \t", "\t "])
def test_recbole_with_another_separator(between, tmp_path):
    """RecBole's field_separator is an option: what stands between the typed names tells it."""
    put(tmp_path / "ml.inter", INTER.replace("\t", between))
    put(tmp_path / "ml.item", ITEM)
    interactions = load("recbole", tmp_path)
    assert [row[:2] for row in rows_of(interactions)] == [("u1", "20"), ("u1", "10"), ("u2", "10")]
    assert interactions.titles == ['The "M"', "Go"]


@pytest.mark.parametrize(
    "names",
    [
        ("ml.train.inter", "ml.valid.inter", "ml.test.inter"),
        ("ml.part1.inter", "ml.part2.inter", "ml.part3.inter"),
    ],
)
def test_recbole_splits_are_joined(names, tmp_path):
    """A benchmark's three files are the log that they were cut from;
    the header of each but the first is none of its rows."""
    header, *rows = INTER.splitlines()
    for name, row in zip(names, rows, strict=True):
        put(tmp_path / name, f"{header}\n{row}")  # the last line without its end
    put(tmp_path / "ml.item", ITEM)
    joined = load("recbole", tmp_path)
    (tmp_path / "whole").mkdir()
    put(tmp_path / "whole/ml.inter", INTER)
    put(tmp_path / "whole/ml.item", ITEM)
    whole = load("recbole", tmp_path / "whole")
    assert rows_of(joined) == rows_of(whole) and joined.titles == whole.titles


# ----------------------------------------------------------------------------------------- own logs
OWN = [
    ("ann", "7", 4.5, 1600000000, "Go"),
    ("ann", "8", 2, 1600000100, 'say "A, B"'),
    ("bob", "7", 5, 1600000050, "Go"),
]
OWN_ROWS = [("ann", "7", 4.5, 1600000000), ("ann", "8", 2, 1600000100), ("bob", "7", 5, 1600000050)]


def own_csv(
    names=("user", "item", "rating", "timestamp", "title"),
    order=(0, 1, 2, 3, 4),
    delimiter=",",
    rows=OWN,
) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(
        [[row[c] for c in order] for row in (names, *rows)]
    )
    return out.getvalue()


def test_own_json_lines_and_item_file(tmp_path):
    """Numbers as ids and times; titles from a second file, CSV or JSON lines;
    ids where an item has none."""
    records = [{"user": u, "item": int(i), "rating": r, "timestamp": t} for u, i, r, t, _ in OWN]
    file = put(tmp_path / "log.jsonl.gz", json_lines(records))
    items = put(tmp_path / "items.csv", "item_id,name\n7,Go\n9,unseen\n")
    interactions = load("jsonl", file, item_file=str(items))
    assert rows_of(interactions) == OWN_ROWS and interactions.titles == ["Go", "8"]
    items = put(
        tmp_path / "items.jsonl",
        json_lines([{"item": 7, "title": "Go"}, {"item": "8", "title": "Stop"}]),
    )
    assert load("jsonl", file, item_file=str(items)).titles == ["Go", "Stop"]


def test_own_hours_and_missing_columns(tmp_path, capsys):
    """Another scale says what to do; no rating, no time, no title each have a meaning,
    and a note."""
    scores = [(u, i, 10 * r, t, n) for u, i, r, t, n in OWN]
    file = put(
        tmp_path / "scores.csv", own_csv(("user", "item", "score", "date", "title"), rows=scores)
    )
    with pytest.raises(ValueError, match="ratings from 20 to 50 are not .*--percentile item"):
        load("csv", file)
    assert [r for *_, r, _ in rows_of(load("csv", file, percentile="item"))] == [2, 3, 4]
    # below 5, but hours all the same
    file = put(tmp_path / "hours.csv", own_csv(("user", "item", "hours", "date", "title")))
    assert [r for *_, r, _ in rows_of(load("csv", file))] == [2, 3, 4]
    clicks = put(tmp_path / "clicks.csv", "user,item\nb,1\na,1\nb,2\nb,1\nb,1\n")
    interactions = load("csv", clicks)
    # times are line numbers
    assert rows_of(interactions) == [("a", "1", 2, 3), ("b", "1", 4, 2), ("b", "2", 3, 4)]
    notes = capsys.readouterr().out
    assert all(text in notes for text in ("no rating column", "no timestamp column", "no titles"))


@pytest.mark.parametrize("text", ["user", "user=", "who=x", "user=a;item=b,x"])
def test_columns_that_are_not_understood_are_named(text):
    with pytest.raises(ValueError, match="--columns"):
        parse_columns(text)


def test_columns_are_the_likely_ones(tmp_path):
    """Ids before names; a product's name is the title, not the user's;
    keys that the first JSON line lacks are found."""
    text = "user_id,name,product_id,product_name,user,rating\n" + "".join(
        f"{u},Bob {u},{i},Thing {i},x,4\n" for u in range(3) for i in range(3)
    )
    interactions = load("csv", put(tmp_path / "a.csv", text))
    assert interactions.user_ids == ["0", "1", "2"] and interactions.titles == [
        "Thing 0",
        "Thing 1",
        "Thing 2",
    ]
    lines = [{"user": "a", "item": "1"}] + [
        {"user": "a", "item": str(n), "rating": 4.5} for n in range(200)
    ]
    interactions = load("jsonl", put(tmp_path / "a.jsonl", json_lines(lines)))
    assert set(interactions.rating.tolist()) == {4.5} and len(interactions.user) == 200
    with pytest.raises(ValueError, match="item is named twice"):
        parse_columns("user=item,item=item")


def test_an_item_file_may_name_the_item_otherwise(tmp_path):
    """--columns item=sku is the log's; the item file's is found under its usual name."""
    log_file = put(tmp_path / "log.csv", own_csv(("user", "sku2", "rating", "timestamp", "x")))
    items = put(tmp_path / "items.csv", "product_id,label\n7,Go\n8,Stop\n")
    assert load("csv", log_file, columns="item=sku2,title=label", item_file=str(items)).titles == [
        "Go",
        "Stop",
    ]


def test_order_within_a_second_and_titles_that_change(tmp_path):
    """Milliseconds order a log although seconds are kept;
    of two titles of an item the same one is taken in any order."""
    rows = [
        f"u,{n},4,{1600000000000 + 100 * (9 - n)},{'New' if n else 'Old'}" for n in range(9)
    ] + ["v,0,4,1600000000000,New"]
    for lines in (rows, rows[::-1]):
        interactions = load(
            "csv", put(tmp_path / "a.csv", "\n".join(["user,item,rating,timestamp,title", *lines]))
        )
        assert [i for u, i, *_ in rows_of(interactions) if u == "u"] == [
            str(n) for n in range(8, -1, -1)
        ]
        assert interactions.titles[0] == "New"


def test_logs_without_a_liked_item_say_so(tmp_path):
    """Nothing repeated: the message names --min_rating, not the length of the logs."""
    rows = [(f"u{u}", f"i{(u * 7 + t) % 60}", t) for u in range(9) for t in range(20)]
    text = own_csv(("user", "item", "timestamp"), (0, 1, 2), rows=rows)
    config = DataConfig(
        dataset="csv",
        data_dir=str(put(tmp_path / "a.csv", text)),
        prepared_dir=str(tmp_path / "p"),
    )
    with pytest.raises(
        ValueError,
        match="no train example: in none of .* places is the chosen item liked.*--min_rating",
    ):
        prepare(config)


# ------------------------------------------------------------------------------------ prepared JSON
def foreign_entry(n: int, scores: bool) -> dict:
    items = [f"T{(n + 3 * i) % 97}" for i in range(20)]
    entry = {
        "historyList": [f"H{n}", f"T{n + 1}"],
        "itemList": items,
        "trueSelection": items[n % 20],
    }
    if scores:
        entry |= {
            "historyRatingList": [4, 3.5],
            "itemScoreList": [1 + 0.1 * i for i in range(20)],
            "randomNegative": items[10:],
        }
    return entry if scores else entry | {"historyList": "::".join(entry["historyList"])}


@pytest.mark.parametrize("scores", [False, True], ids=["S-DPO", "authors"])
def test_prepared_json_keeps_its_candidates(scores, tmp_path, capsys):
    """Lists, targets and scores are those of the files;
    without ratings a history line is the title alone."""
    parts = {"train": 40, "test": 15}
    for split, count in parts.items():
        put(
            tmp_path / f"x-{split}.json",
            json.dumps([foreign_entry(n, scores) for n in range(count)]),
        )
    prepared = prepare(
        DataConfig(dataset="prepared", data_dir=str(tmp_path), prepared_dir=str(tmp_path / "p"))
    )
    assert {split: len(e) for split, e in prepared.splits.items()} == {
        "train": 36,
        "val": 4,
        "test": 15,
    }
    assert "last 4 training entries" in capsys.readouterr().out
    test = prepared.splits["test"]
    for e in range(15):
        example = test[e]
        number = int(example.user.split()[-1]) - 1
        raw = foreign_entry(number, scores)
        assert (
            example.candidates == raw["itemList"]
            and example.candidates[example.target] == raw["trueSelection"]
        )
        assert example.scores == pytest.approx(raw["itemScoreList"] if scores else [1.0] * 20)
        lines = render_prompt(example).splitlines()
        assert (f"H{number} | Rating: 4" if scores else f"H{number}") in lines
        negatives = test.negatives(3)[e]
        assert example.target not in negatives


@pytest.mark.parametrize("short", [True, False])
def test_prepared_json_that_does_not_fit_is_named(short, tmp_path):
    entries = [foreign_entry(n, True) for n in range(50)]
    items = entries[3]["itemList"]
    entries[3]["itemList"] = items[:19] if short else [*items, items[0]]
    put(tmp_path / "train.json", json.dumps(entries))
    put(tmp_path / "test.json", json.dumps(entries[10:]))
    with pytest.raises(
        ValueError, match=r"train\.json: 1 of 50 .*entry 4.*20 different candidates"
    ):
        prepare(
            DataConfig(dataset="prepared", data_dir=str(tmp_path), prepared_dir=str(tmp_path / "p"))
        )


# ------------------------------------------------------------------------------------- real samples
@needs("amazon/Gift_Cards_5.json.gz")
def test_real_amazon_sample():
    """Gift Cards: distinct pairs whose item has a usable title, counted with json and sets."""
    reviews = [json.loads(line) for line in gzip.open(DATA / "amazon/Gift_Cards_5.json.gz")]
    meta = (json.loads(line) for line in gzip.open(DATA / "amazon/meta_Gift_Cards.json.gz"))
    titled = {m["asin"] for m in meta if m.get("title") and "<span" not in m["title"]}
    pairs = {(r["reviewerID"], r["asin"]) for r in reviews if r["asin"] in titled}
    interactions = load_amazon(DATA / "amazon/Gift_Cards_5.json.gz")
    check_table(interactions)
    assert (
        len(reviews),
        len(interactions.user),
        interactions.num_users,
        interactions.num_items,
    ) == (
        2972,
        len(pairs),
        458,
        148,
    )
    assert {
        (interactions.user_ids[u], interactions.item_ids[i])
        for u, i in zip(interactions.user, interactions.item, strict=True)
    } == pairs


@needs("amazon/AMAZON_FASHION_5.json.gz")
def test_real_repeats_keep_the_last(tmp_path):
    """Fashion repeats pairs in style variants;
    of each the latest rating stays, of one day the one further down."""
    file = DATA / "amazon/AMAZON_FASHION_5.json.gz"
    reviews = [json.loads(line) for line in gzip.open(file)]
    last = {}
    for r in sorted(reviews, key=lambda r: r["unixReviewTime"]):
        last[r["reviewerID"], r["asin"]] = (r["overall"], r["unixReviewTime"])
    interactions = load("jsonl", file)  # its metadata is not at hand
    assert (len(reviews), len(last), interactions.num_users, interactions.num_items) == (
        3176,
        len(interactions.user),
        406,
        31,
    )
    assert {(u, i): (r, t) for u, i, r, t in rows_of(interactions)} == last


@needs("steam/steam_games.json.gz")
def test_real_steam_titles(tmp_path):
    """Every game of the original file, reviewed once each:
    app_name, else title, as ast.literal_eval reads them."""
    lines = (
        gzip.open(DATA / "steam/steam_games.json.gz", "rt", encoding="utf-8").read().splitlines()
    )
    names = {}
    for line in lines[::8]:
        game = ast.literal_eval(line)
        if "id" in game and (game.get("app_name") or game.get("title")):
            names.setdefault(game["id"], clean_title(game.get("app_name") or game["title"]))
    reviews = [
        {"username": f"u{n % 50}", "product_id": i, "hours": n, "date": "2017-01-01"}
        for n, i in enumerate(names)
    ]
    put(tmp_path / "steam_reviews.json", literal_lines(reviews))
    put(tmp_path / "steam_games.json.gz", "\n".join(lines))
    interactions = load_steam(tmp_path)
    assert interactions.num_items == len(names) and len(lines) == 32135
    repeated = Counter(names.values())
    for item, title in zip(interactions.item_ids, interactions.titles, strict=True):
        assert title == names[item] or (
            title.startswith(f"{names[item]} (") and repeated[names[item]] > 1
        )


@needs("beeradvocate/beeradvocate.sample.json")
def test_real_beer_samples():
    """Dict lines and the CSV of an R export, counted with ast.literal_eval and the csv module."""
    reviews = [
        ast.literal_eval(line)
        for line in (DATA / "beeradvocate/beeradvocate.sample.json").open(encoding="utf-8")
    ]
    pairs = {
        (r["user/profileName"], r["beer/beerId"])
        for r in reviews
        if r["user/profileName"] and r["review/overall"]
    }
    interactions = load_beeradvocate(DATA / "beeradvocate/beeradvocate.sample.json")
    assert (
        len(reviews) == 2469
        and {(u, i) for u, i, *_ in rows_of(interactions)} == pairs
        and len(interactions.user) == len(pairs)
    )
    rows = list(
        csv.DictReader(
            (DATA / "beeradvocate/beer_reviews.sample.csv").open(encoding="latin-1", newline="")
        )
    )
    pairs = {(r["review_profilename"], r["beer_beerid"]) for r in rows if r["review_profilename"]}
    interactions = load_beeradvocate(DATA / "beeradvocate/beer_reviews.sample.csv")
    assert (
        len(rows) == 6627
        and {(u, i) for u, i, *_ in rows_of(interactions)} == pairs
        and len(interactions.user) == len(pairs)
    )
    assert any("Kölsch" in title for title in interactions.titles)


@needs("lastfm")
def test_real_lastfm_sample():
    """Pairs of user and artist with id, and the time of the first play,
    from a few lines over the same file."""
    (file,) = (DATA / "lastfm").glob("*.tsv")
    fields = [line.rstrip("\n").split("\t") for line in file.open(encoding="utf-8")]
    plays = Counter((f[0], f[2]) for f in fields if f[2])
    # newest first, so the last one met is the first play
    first = {(f[0], f[2]): f[1] for f in fields if f[2]}
    interactions = load_lastfm(DATA / "lastfm")
    assert (
        len(fields) == 5000
        and len(interactions.user) == len(plays)
        and interactions.notes["repeats, added up"] == sum(plays.values()) - len(plays)
    )
    assert {(u, i): t for u, i, _, t in rows_of(interactions)} == {
        pair: int(datetime.fromisoformat(time).timestamp()) for pair, time in first.items()
    }


@needs("sdpo/lastfm-test.json")
def test_real_sdpo_sample(tmp_path):
    """2,495 entries with their own candidates; a part of them serves as training file."""
    raw = json.loads((DATA / "sdpo/lastfm-test.json").read_text())
    put(tmp_path / "lastfm-train.json", json.dumps(raw[:300]))
    put(tmp_path / "lastfm-test.json", json.dumps(raw))
    prepared = prepare(
        DataConfig(dataset="prepared", data_dir=str(tmp_path), prepared_dir=str(tmp_path / "p"))
    )
    test = prepared.splits["test"]
    assert len(raw) == len(test) == 2495
    for e in range(0, 2495, 50):
        example = test[e]
        entry = raw[int(example.user.split()[-1]) - 1]
        assert example.candidates == [clean_title(t) for t in entry["itemList"]]
        assert [t for t, _ in example.history] == [
            clean_title(t) for t in entry["historyList"].split("::")
        ][-20:]
        assert example.candidates[example.target] == clean_title(entry["trueSelection"])


# --------------------------------------------------------------------------------------------- fuzz
SPECIAL = "<|end_of_text|>"


def many(records: list[dict], key: str, count: int = 60) -> list[dict]:
    """Enough users for splits: the records again and again, with other ids and times."""
    return [
        record | {key: f"{record[key]}{n % 6}"}
        for n in range(count // len(records))
        for record in records
    ]


def sources() -> dict[str, tuple[dict[str, bytes], dict]]:
    """Per loader: whole files, and the options that load them."""
    many_own = [
        (f"u{n % 5}", f"{n % 40}", 1 + n % 5, 1600000000 + n, f"T{n % 40} {SPECIAL}")
        for n in range(300)
    ]
    records = [
        dict(zip(("user", "item", "rating", "timestamp", "title"), row, strict=True))
        for row in many_own
    ]
    games = [game | {"tags": [f"tag {n}" for n in range(30)]} for game in STEAM_GAMES]
    lastfm = "".join(LASTFM.replace("mb-", f"mb-{n}") for n in range(30))
    entries = {
        split: json.dumps([foreign_entry(n, True) for n in range(20)])
        for split in ("train", "test")
    }
    amazon = {
        "Books.json": json_lines(many(AMAZON, "reviewerID")),
        "meta_Books.json": json_lines(AMAZON_META),
    }
    steam = {
        "steam_reviews.json": literal_lines(many(STEAM, "username")),
        "steam_games.json": literal_lines(games).replace("'tag ", "u'tag "),
    }
    beer_lines = literal_lines(many(BEER, "user/profileName"))
    beer_table = beer_csv() + beer_csv().split(b"\n", 1)[1] * 15
    recbole = {"x.inter": INTER + INTER.split("\n", 1)[1] * 40, "x.item": ITEM}
    prepared = {f"{split}.json": text for split, text in entries.items()}
    tables = (
        ("amazon", "amazon", amazon, {}),
        ("steam", "steam", steam, {}),
        ("beer lines", "beeradvocate", {"beeradvocate.json": beer_lines}, {}),
        ("beer blocks", "beeradvocate", {"beeradvocate.txt": beer_blocks() * 15}, {}),
        ("beer csv", "beeradvocate", {"beer_reviews.csv": beer_table}, {}),
        ("lastfm", "lastfm", {"userid-timestamp-x.tsv": lastfm}, {}),
        ("csv", "csv", {"log.csv": own_csv(rows=many_own)}, {}),
        ("hours", "csv", {"log.csv": own_csv(rows=many_own)}, {"percentile": "user"}),
        ("jsonl", "jsonl", {"log.jsonl": json_lines(records)}, {}),
        ("recbole", "recbole", recbole, {}),
        ("prepared", "prepared", prepared, {}),
    )
    out = {}
    for name, kind, files, options in tables:
        content = {f: t.encode() if isinstance(t, str) else t for f, t in files.items()}
        out[name] = content, options | {"dataset": kind}
    return out


NUMBER = re.compile(rb"-?\d+(\.\d+)?")
POISON = [
    b"NaN", b"-1", b"inf", b"1e999", b"", b"null", b"0", b"99999999999999999999999", b"true",
    b"[]", b"{}", b"\xff\xfe", b"\x00", b"\xed\xa0\x80", b'"', b"'", b"\\", b"\n", b"\r",
    b"\\ud800", b"|", b",", b"\t", b"::", b": ", SPECIAL.encode(), "\u2028".encode(), b"\\n",
    b"Answer:",
]  # fmt: skip


def mutate(content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 5, 40))):
        at = rng.randrange(len(content) + 1)
        kind = rng.randrange(9)
        if kind == 0:
            content = content[:at] if rng.random() < 0.5 else content[at:]
        elif kind == 1:
            content = content[:at] + rng.choice(POISON) + content[at:]
        elif kind == 2:
            content = content[:at] + content[at + rng.randrange(30) :]
        elif kind == 3:
            lines = content.split(b"\n")
            rng.shuffle(lines)
            content = b"\n".join(lines)
        elif kind == 4 and (found := list(NUMBER.finditer(content))):
            match = rng.choice(found)
            content = content[: match.start()] + rng.choice(POISON) + content[match.end() :]
        elif kind == 5:
            lines = content.split(b"\n")
            content = b"\n".join(lines + rng.choices(lines, k=rng.randrange(1, 50)))
        elif kind == 6 and rng.random() < 0.1:
            content = (
                content[:at]
                + rng.choice((b"x", b'"', b"[", b"{'a': ", b"\n"))
                * rng.choice((300, 5000, 1 << 20))
                + content[at:]
            )
        elif kind == 7 and rng.random() < 0.3:
            content = content.decode("utf-8", "replace").encode(
                rng.choice(("utf-16", "utf-16-le", "utf-8-sig", "cp037")), "replace"
            )
        elif kind == 8 and rng.random() < 0.3:
            content = gzip.compress(content)
            content = content[: rng.randrange(1, len(content) + 1)]
        if not content or len(content) > 4_000_000:
            break
    return content


def fuzz(seeds: range, tmp_path: Path) -> Counter:
    """Load mutated files of every kind: a log that keeps its promises, or one ValueError.
    Counts both."""
    outcomes: Counter = Counter()
    everything = list(sources().items())
    for seed in seeds:
        rng = random.Random(seed)
        name, (files, options) = everything[seed % len(everything)]
        folder = tmp_path / "fuzz"
        folder.mkdir()
        victim = rng.choice(list(files))
        for file, content in files.items():
            (folder / file).write_bytes(mutate(content, rng) if file == victim else content)
        config = DataConfig(
            data_dir=str(folder), followers=2, min_history=1, min_rating=1, **options
        )
        try:
            if options["dataset"] == "prepared":
                config = DataConfig(
                    data_dir=str(folder), prepared_dir=str(folder / f"p{seed}"), **options
                )
                prepared = prepare(config)
                interactions, splits = prepared.interactions, prepared.splits
                outcomes[name, "loaded"] += 1
            else:
                interactions = load_interactions(config)
                outcomes[name, "loaded"] += 1
                check_table(interactions)
                assert (interactions.timestamp >= 0).all() and (
                    (interactions.rating > 0) & (interactions.rating <= 5)
                ).all(), (name, seed)
                splits = build_examples(interactions, config)
            titles = list(interactions.titles)
            assert all(t and t == clean_title(t) and len(t) <= 250 for t in titles), (name, seed)
            render_prompt(splits["test"][0])
        except ValueError as error:
            own = (
                str(folder),
                "no train",
                "no val",
                "no test",
                "user ",
                "title ",
                "two candidates",
            )
            assert str(error).startswith(own) and len(str(error)) < 3000, (name, seed, str(error))
            outcomes[name, "refused"] += 1
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {type(error).__name__}: {error}") from error
        finally:
            shutil.rmtree(folder)
    return outcomes


def test_mutated_logs_are_refused_or_counted(tmp_path, capsys):
    """220 files: every loader refuses some and loads some, without a traceback."""
    outcomes = fuzz(range(220), tmp_path)
    for how in ("loaded", "refused"):
        assert {name for name, outcome in outcomes if outcome == how} == sources().keys()


@pytest.mark.slow
def test_many_mutated_logs_are_refused_or_counted(tmp_path, capsys):
    """5,000 more."""
    fuzz(range(1000, 6000), tmp_path)
