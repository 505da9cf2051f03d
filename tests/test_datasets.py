"""Amazon, Steam, BeerAdvocate, LastFM, RecBole, prepared JSON: files of ours, real samples."""

import ast
import csv
import gzip
import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_loaders import DATA, check_table, rows_of

from data import render_prompt
from loaders.frozen import DataConfig, load_interactions, prepare
from loaders.ownlog import parse_columns
from loaders.table import clean_title, percentile_ratings


def load(dataset: str, path, **options):
    return load_interactions(DataConfig(dataset=dataset, data_dir=str(path), **options))


def prepare_foreign(folder: Path):
    made = str(folder / "prepared")
    return prepare(DataConfig(dataset="prepared", data_dir=str(folder), prepared_dir=made))


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


def test_percentile_ratings_are_mid_ranks_of_the_group():
    """ceil(5 * mid-rank / size): equal amounts tie, the top fifth gets 5, a group of one gets 3."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = int(rng.integers(1, 60))
        amount, group = rng.integers(0, 12, n).astype(np.float32), rng.integers(0, 5, n)
        for i, rating in enumerate(percentile_ratings(amount, group)):
            inside = amount[group == group[i]]
            share = ((inside < amount[i]).sum() + 0.5 * (inside == amount[i]).sum()) / len(inside)
            assert rating == np.ceil(5 * share), (amount[i], inside)
    assert percentile_ratings(np.array([7.0]), np.array([0])).tolist() == [3]
    ranks = np.bincount(percentile_ratings(np.arange(100.0), np.zeros(100)).astype(int))
    assert ranks.tolist() == [0, 20, 20, 20, 20, 20]


# ------------------------------------------------------------------------------ published data sets
def json_lines(records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def literal_lines(records) -> str:
    """As Python 2 wrote them."""
    lines = (re.sub(r"(?<=[{ ])'([\w/]+)':", r"u'\1':", repr(record)) for record in records)
    return "".join(f"{line}\n" for line in lines)


AMAZON = [
    {"overall": 5.0, "reviewerID": "A1", "asin": "B000000001", "unixReviewTime": 864000,
     "reviewText": 'quotes " and \n'},
    {"overall": 2.0, "reviewerID": "A1", "asin": "B000000002", "unixReviewTime": 86400,
     "vote": "1,234"},
    {"overall": 4.0, "reviewerID": "A2", "asin": "B000000001", "unixReviewTime": 86400,
     "style": {"Format:": " Kindle"}},
    {"overall": 3.0, "reviewerID": "A2", "asin": "B000000001", "unixReviewTime": 172800},
    {"overall": 1.0, "reviewerID": "A2", "asin": "B000000003", "unixReviewTime": 172800},
]  # fmt: skip
AMAZON_META = [
    {"asin": "B000000001", "title": "Tom &amp; Jerry"},
    {"asin": "B000000001", "title": "again"},
    {"asin": "B000000002", "title": "Go", "details": {}, "price": "$1"},
    {"asin": "B000000003", "title": '<span class="a-size-medium">'},
    {"asin": "B000000009", "title": "unseen"},
]
AMAZON_ROWS = [("A1", "B000000002", 2, 86400), ("A1", "B000000001", 5, 864000), ("A2", "B000000001", 3, 172800)]  # noqa: E501  # fmt: skip
STEAM = [
    {"username": "Chaos Syren", "hours": 0.1, "product_id": "10", "date": "2017-12-17",
     "text": "it's {'hours': 5.0}"},
    {"username": "Chaos Syren", "hours": 8, "product_id": "20", "date": "2017-12-16",
     "early_access": False},
    {"username": "Bob", "hours": 3.5, "product_id": "10", "date": "2017-12-18"},
    {"username": "Bob", "product_id": "20", "date": "2017-12-18"},
    {"username": "Bob", "hours": 4.5, "product_id": "10", "date": "2017-12-19"},
]  # fmt: skip
STEAM_GAMES = [
    {"id": "10", "app_name": "Sam &amp; Max", "title": "other"},
    {"id": "20", "title": "Portal™", "tags": ["a", "b"]},
    {"app_name": "no id"},
]
STEAM_ROWS = [("Bob", "10", 4, 1513641600), ("Chaos Syren", "20", 3, 1513382400), ("Chaos Syren", "10", 2, 1513468800)]  # noqa: E501  # fmt: skip
BEER = [
    {"review/overall": overall, "beer/name": name, "beer/ABV": abv, "beer/style": style,
     "beer/beerId": beer, "user/profileName": user, "review/timeUnix": time}
    for overall, name, abv, style, beer, user, time in (
        (1.5, "Sausa 5% Weizen", 5.0, "Hefeweizen", "4", "stcules", 1234817823),
        (4.0, "Pale Ale", None, "", "5", "stcules", 1234817800),
        (0.0, "Pale Ale", None, "", "5", "ann", 9),
        (5.0, "Pale Ale", None, "", "5", "", 9),
    )
]  # fmt: skip
BEER_ROWS = [("stcules", "5", 4.0, 1234817800), ("stcules", "4", 1.5, 1234817823)]
EVENTS = "userid-timestamp-artid-artname-traid-traname.tsv"
LASTFM = """\
user_000001\t2009-05-04T23:08:57Z\tmb-1\tDeep "Dish\t\tFuck Me
user_000001\t2009-05-03T23:08:57Z\tmb-2\t坂本龍一\tt\tComposition
user_000001\t2009-05-01T00:00:00Z\tmb-1\tDeep "Dish\t\tOther
user_000001\t2009-05-01T00:00:00Z\t\tNobody\t\tOther
user_000002\t2009-05-02T00:00:00Z\tmb-1\tDeep "Dish\t\tOther
"""
LASTFM_ROWS = [("user_000001", "mb-1", 4, 1241136000), ("user_000001", "mb-2", 3, 1241392137), ("user_000002", "mb-1", 2, 1241222400)]  # noqa: E501  # fmt: skip


def amazon_ratings(*ids: str) -> str:
    """Without a header."""
    names = (*ids, "overall", "unixReviewTime")
    return "\n".join(",".join(str(review[name]) for name in names) for review in AMAZON)


def beer_blocks() -> str:
    text = ""
    for record in BEER:
        lines = (f"{key}: {'' if value is None else value}\n" for key, value in record.items())
        text += "".join(lines) + "\n"
    return text.replace("user/", "review/").replace("timeUnix", "time")


def beer_csv() -> bytes:
    out = io.StringIO()
    names = ",review_overall,beer_name,beer_abv,beer_style,beer_beerid,review_profilename"
    rows = [[n, *record.values()] for n, record in enumerate(BEER)]
    names = [*names.split(","), "review_time"]
    csv.writer(out, quoting=csv.QUOTE_NONNUMERIC).writerows([names, *rows])
    return out.getvalue().encode("latin-1")


def archive() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, text in (("README.txt", "read me"), (EVENTS, LASTFM)):
            entry = tarfile.TarInfo(f"lastfm-dataset-1K/{name}")
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return out.getvalue()


META = {"meta_Books.json": json_lines(AMAZON_META)}
GAMES = {"steam_games.json.gz": literal_lines(STEAM_GAMES)}
FORMS = {  # form -> data set, its files
    "amazon 2018": ("amazon", {"Books_5.json.gz": json_lines(AMAZON)} | META),
    "amazon 2014": ("amazon", {"reviews_Books.json": json_lines(AMAZON), "meta_Books.json.gz": literal_lines(AMAZON_META)}),  # noqa: E501
    "ratings 2018": ("amazon", {"Books.csv": amazon_ratings("asin", "reviewerID")} | META),
    "ratings 2014": ("amazon", {"ratings_Books.csv": amazon_ratings("reviewerID", "asin")} | META),
    "steam": ("steam", {"steam_reviews.json.gz": literal_lines(STEAM)} | GAMES),
    "beer lines": ("beeradvocate", {"beeradvocate.json": literal_lines(BEER)}),
    "beer blocks": ("beeradvocate", {"beeradvocate.txt.gz": beer_blocks()}),
    "beer csv": ("beeradvocate", {"beer_reviews.csv": beer_csv()}),
    "lastfm": ("lastfm", {EVENTS: LASTFM}),
    "lastfm archive": ("lastfm", {"lastfm-dataset-1K.tar.gz": archive()}),
}  # fmt: skip
EXPECTED = {  # rows, titles, what is left out or changed
    "amazon": (AMAZON_ROWS, ["Tom & Jerry", "Go"], {
        "repeated pairs of user and item, of which the last counts": 1,
        "interactions with an item that has no title": 1}),  # a piece of a page
    "steam": (STEAM_ROWS, ["Sam & Max", "Portal™"], {
        "rows without rating": 1, "repeated pairs of user and item, of which the last counts": 1}),
    "beeradvocate": (BEER_ROWS, ["Sausa Weizen (5% ABV, Hefeweizen)", "Pale Ale"], {
        "rows without user": 1, "rows without rating": 1}),
    "lastfm": (LASTFM_ROWS, ['Deep "Dish', "坂本龍一"], {
        "rows without item": 1, "repeats, added up": 1}),
}  # fmt: skip


def put_all(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        put(folder / name, content)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_published_forms(form, tmp_path):
    """All forms of a data set give one log, whose hours or plays are ranks; what is left out is
    counted."""
    dataset, files = FORMS[form]
    interactions = load(dataset, put_all(tmp_path, files))
    rows, titles, notes = EXPECTED[dataset]
    assert rows_of(interactions) == rows and interactions.titles == titles
    assert {why.split(" (")[0]: count for why, count in interactions.notes.items()} == notes
    assert interactions.name == ("amazon_books" if dataset == "amazon" else dataset)
    check_table(interactions)


@pytest.mark.parametrize("dataset, files, culprit", [
    ("amazon", {"Books_5.json": json_lines(AMAZON)}, "titles need meta_Books.* beside Books_5"),
    ("amazon", {"B.json": json_lines(AMAZON), "meta_A.json": "", "meta_C.json": ""}, "meta_B.*meta_A.json', 'meta_C"),  # noqa: E501
    ("amazon", {"Books.csv": "who,what,stars\na,b,c\n"} | META, r"Books\.csv.*reviewerID"),
    ("steam", {"steam_reviews.json": literal_lines(STEAM)}, "titles need steam_games. beside"),
    ("lastfm", {"lastfm-dataset-1K.tgz": gzip.compress(archive())[:200]}, "cut off.*[Ff]etch"),
    ("lastfm", {"lastfm-dataset-1K.tar": archive().replace(b"userid-", b"useful-")}, "tar.*no"),
])  # fmt: skip
def test_what_is_missing_or_damaged_is_named(dataset, files, culprit, tmp_path):
    with pytest.raises(ValueError, match=culprit):
        load(dataset, put_all(tmp_path, files))


# ------------------------------------------------------------------------------------------ RecBole
INTER = """\
user_id:token\titem_id:token\trating:float\ttimestamp:float
u1\t10\t4.0\t100
u1\t20\t2.5\t50
u2\t10\t5\t70
"""
ITEM = 'item_id:token\tmovie_title:token_seq\tgenre:token_seq\n10\tThe "M"\tDrama\n20\tGo\tComedy\n'
INTER_ROWS = [("u1", "20", 2.5, 50), ("u1", "10", 4, 100), ("u2", "10", 5, 70)]


@pytest.mark.parametrize("between", ["\t", ",", " \t"])
def test_recbole_atomic_files(between, tmp_path):
    """Quotes are characters; titles come from the .item file beside; what stands between the typed
    names divides the fields."""
    interactions = load("recbole", put_all(tmp_path, {"m.inter": INTER.replace("\t", between), "m.item": ITEM}))  # noqa: E501  # fmt: skip
    assert rows_of(interactions) == INTER_ROWS and interactions.titles == ['The "M"', "Go"]


@pytest.mark.parametrize("names", ["ml.train.inter ml.valid.inter ml.test.inter", "ml.part1.inter ml.part2.inter ml.part3.inter"])  # noqa: E501  # fmt: skip
def test_recbole_splits_are_joined(names, tmp_path):
    """A benchmark's three files are the log that they were cut from; each has a header, and a last
    line without its end."""
    header, *rows = INTER.splitlines()
    parts = {name: f"{header}\n{row}" for name, row in zip(names.split(), rows, strict=True)}
    interactions = load("recbole", put_all(tmp_path, parts | {"ml.item": ITEM}))
    assert rows_of(interactions) == INTER_ROWS and interactions.titles == ['The "M"', "Go"]


# ----------------------------------------------------------------------------------------- own logs
OWN = [
    ("ann", "7", 4.5, 1600000000, "Go"),
    ("ann", "8", 2, 1600000100, 'say "A, B"'),
    ("bob", "7", 5, 1600000050, "Go"),
]
OWN_ROWS = [row[:4] for row in OWN]


def own_csv(
    names=("user", "item", "rating", "timestamp", "title"),
    order=(0, 1, 2, 3, 4),
    delimiter=",",
    rows=OWN,
) -> str:
    out = io.StringIO()
    table = [[row[c] for c in order] for row in (names, *rows)]
    csv.writer(out, delimiter=delimiter).writerows(table)
    return out.getvalue()


def test_own_json_lines_and_item_file(tmp_path):
    """Numbers as ids and times; titles from a second file, CSV or JSON lines;
    ids where an item has none."""
    records = [{"user": u, "item": int(i), "rating": r, "timestamp": t} for u, i, r, t, _ in OWN]
    file = put(tmp_path / "log.jsonl.gz", json_lines(records))
    lines = json_lines([{"item": 7, "title": "Go"}, {"item": "8", "title": "Stop"}])
    for name, text, titles in (
        ("items.csv", "item_id,name\n7,Go\n9,unseen\n", ["Go", "8"]),
        ("items.jsonl", lines, ["Go", "Stop"]),
    ):
        interactions = load("jsonl", file, item_file=str(put(tmp_path / name, text)))
        assert rows_of(interactions) == OWN_ROWS and interactions.titles == titles


def test_own_hours_and_missing_columns(tmp_path, capsys):
    """Another scale says what to do; no rating, no time, no title each have a meaning,
    and a note."""
    scores = [(u, i, 10 * r, t, n) for u, i, r, t, n in OWN]
    names = ("user", "item", "score", "date", "title")
    file = put(tmp_path / "scores.csv", own_csv(names, rows=scores))
    with pytest.raises(ValueError, match="from 20 to 50 .*--percentile item"):
        load("csv", file)
    assert load("csv", file, percentile="item").rating.tolist() == [2, 3, 4]
    # below 5, but hours all the same
    file = put(tmp_path / "hours.csv", own_csv(("user", "item", "hours", "date", "title")))
    assert load("csv", file).rating.tolist() == [2, 3, 4]
    clicks = put(tmp_path / "clicks.csv", "user,item\nb,1\na,1\nb,2\nb,1\nb,1\n")
    # times are line numbers
    expected = [("a", "1", 2, 3), ("b", "1", 4, 2), ("b", "2", 3, 4)]
    assert rows_of(load("csv", clicks)) == expected
    notes = capsys.readouterr().out
    assert all(
        text in notes for text in ("no rating column", "no timestamp column", "have no title")
    )


@pytest.mark.parametrize("text", ["user", "user=", "who=x", "user=a;item=b,x", "user=i,item=i"])
def test_columns_that_are_not_understood_are_named(text):
    with pytest.raises(ValueError, match="--columns"):
        parse_columns(text)


def test_columns_are_the_likely_ones(tmp_path):
    """Ids before names; a product's name is the title, not the user's;
    keys that the first JSON line lacks are found."""
    rows = "".join(f"{u},Bob {u},{i},Thing {i},x,4\n" for u in range(3) for i in range(3))
    text = f"user_id,name,product_id,product_name,user,rating\n{rows}"
    interactions = load("csv", put(tmp_path / "a.csv", text))
    assert interactions.user_ids == ["0", "1", "2"]
    assert interactions.titles == ["Thing 0", "Thing 1", "Thing 2"]
    lines = [{"user": "a", "item": str(n), "rating": 4.5} for n in range(200)]
    lines = [{"user": "a", "item": "1"}, *lines]
    interactions = load("jsonl", put(tmp_path / "a.jsonl", json_lines(lines)))
    assert set(interactions.rating.tolist()) == {4.5} and len(interactions.user) == 200


def test_an_item_file_may_name_the_item_otherwise(tmp_path):
    """--columns item=sku is the log's; the item file's is found under its usual name."""
    file = put(tmp_path / "log.csv", own_csv(("user", "sku2", "rating", "timestamp", "x")))
    items = put(tmp_path / "items.csv", "product_id,label\n7,Go\n8,Stop\n")
    interactions = load("csv", file, columns="item=sku2,title=label", item_file=str(items))
    assert interactions.titles == ["Go", "Stop"]


def test_order_within_a_second_and_titles_that_change(tmp_path):
    """Milliseconds order a log although seconds are kept;
    of two titles of an item the same one is taken in any order."""
    start = 1600000000000
    rows = [("u", n, 4, start + 100 * (9 - n), "New" if n else "Old") for n in range(9)]
    rows.append(("v", 0, 4, start, "New"))
    for lines in (rows, rows[::-1]):
        interactions = load("csv", put(tmp_path / "a.csv", own_csv(rows=lines)))
        items = [item for user, item, *_ in rows_of(interactions) if user == "u"]
        assert items == list("876543210") and interactions.titles[0] == "New"


def test_logs_without_a_liked_item_say_so(tmp_path):
    """Nothing repeated: the message names --min_rating, not the length of the logs."""
    rows = [(f"u{u}", f"i{(u * 7 + t) % 60}", t) for u in range(9) for t in range(20)]
    file = put(tmp_path / "a.csv", own_csv(("user", "item", "timestamp"), (0, 1, 2), rows=rows))
    config = DataConfig(dataset="csv", data_dir=str(file), prepared_dir=str(tmp_path / "p"))
    with pytest.raises(ValueError, match="no train example.*--min_rating"):
        prepare(config)


# ------------------------------------------------------------------------------------ prepared JSON
def foreign_entry(n: int, scores: bool) -> dict:
    items, seen = [f"T{(n + 3 * i) % 97}" for i in range(20)], [f"H{n}", f"T{n + 1}"]
    entry = {"itemList": items, "trueSelection": items[n % 20]}
    if not scores:
        return entry | {"historyList": "::".join(seen)}
    entry |= {"historyList": seen, "historyRatingList": [4, 3.5], "randomNegative": items[10:]}
    return entry | {"itemScoreList": [1 + 0.1 * i for i in range(20)]}


@pytest.mark.parametrize("scores", [False, True], ids=["S-DPO", "authors"])
def test_prepared_json_keeps_its_candidates(scores, tmp_path, capsys):
    """Lists, targets and scores are those of the files;
    without ratings a history line is the title alone."""
    for split, count in {"train": 40, "test": 15}.items():
        entries = [foreign_entry(n, scores) for n in range(count)]
        put(tmp_path / f"x-{split}.json", json.dumps(entries))
    splits = prepare_foreign(tmp_path).splits
    assert {split: len(e) for split, e in splits.items()} == {"train": 36, "val": 4, "test": 15}
    assert "last 4 training entries" in capsys.readouterr().out
    negatives = splits["test"].negatives(3)
    for e in range(15):
        example = splits["test"][e]
        number = int(example.user.split()[-1]) - 1
        raw = foreign_entry(number, scores)
        assert example.candidates == raw["itemList"]
        assert example.candidates[example.target] == raw["trueSelection"]
        assert example.scores == pytest.approx(raw["itemScoreList"] if scores else [1.0] * 20)
        lines = render_prompt(example).splitlines()
        assert (f"H{number} | Rating: 4" if scores else f"H{number}") in lines
        assert example.target not in negatives[e]


@pytest.mark.parametrize("count", [19, 21])
def test_prepared_json_that_does_not_fit_is_named(count, tmp_path):
    entries = [foreign_entry(n, True) for n in range(50)]
    entries[3]["itemList"] = [*entries[3]["itemList"], "T"][:count]
    put(tmp_path / "train.json", json.dumps(entries))
    put(tmp_path / "test.json", json.dumps(entries[10:]))
    with pytest.raises(ValueError, match=r"train\.json: 1 of 50 .*entry 4"):
        prepare_foreign(tmp_path)


# ------------------------------------------------------------------------------------- real samples
# rows and titles of each, as they were when they were compared with json, csv, ast.literal_eval
SAMPLES = {  # data set, file or folder -> hash, interactions, users, items
    ("amazon", "amazon/Gift_Cards_5.json.gz"): ("35ff77b3e91d277c", 2965, 458, 148),
    ("jsonl", "amazon/AMAZON_FASHION_5.json.gz"): ("eab63c8592ea0c2b", 3042, 406, 31),
    ("beeradvocate", "beeradvocate/beeradvocate.sample.json"): ("579acb9d37e30cbe", 2457, 1331, 287),  # noqa: E501
    ("beeradvocate", "beeradvocate/beer_reviews.sample.csv"): ("bc33fe63d84a2b19", 6521, 3860, 57),
    ("lastfm", "lastfm"): ("10d8dc62a2c822fd", 205, 2, 204),
}  # fmt: skip


@pytest.mark.parametrize("dataset, name", SAMPLES)
def test_real_samples_are_read_as_before(dataset, name):
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is absent; RECPO_DATA names its folder")
    log = load(dataset, DATA / name)
    check_table(log)
    text = json.dumps([rows_of(log), log.titles])
    found = hashlib.sha256(text.encode()).hexdigest()[:16], len(log.user), log.num_users
    assert (*found, log.num_items) == SAMPLES[dataset, name]


@needs("steam/steam_games.json.gz")
def test_real_steam_titles(tmp_path):
    """Every eighth game of the original file, reviewed once each: app_name, else title."""
    lines = gzip.open(DATA / "steam/steam_games.json.gz", "rt", encoding="utf-8").readlines()
    names = {}
    for game in map(ast.literal_eval, lines[::8]):
        if "id" in game and (title := game.get("app_name") or game.get("title")):
            names.setdefault(game["id"], clean_title(title))
    review = {"hours": 1, "date": "2017-01-01"}
    reviews = [{"username": f"u{n % 50}", "product_id": i} | review for n, i in enumerate(names)]
    put(tmp_path / "steam_reviews.json", literal_lines(reviews))
    put(tmp_path / "steam_games.json.gz", "".join(lines))
    log, repeated = load("steam", tmp_path), Counter(names.values())
    assert log.num_items == len(names) and len(lines) == 32135
    for item, title in zip(log.item_ids, log.titles, strict=True):
        numbered = title.startswith(f"{names[item]} (") and repeated[names[item]] > 1
        assert title == names[item] or numbered


@needs("sdpo/lastfm-test.json")
def test_real_sdpo_sample(tmp_path):
    """2,495 entries with their own candidates; a part of them serves as training file."""
    raw = json.loads((DATA / "sdpo/lastfm-test.json").read_text())
    put(tmp_path / "lastfm-train.json", json.dumps(raw[:300]))
    put(tmp_path / "lastfm-test.json", json.dumps(raw))
    test = prepare_foreign(tmp_path).splits["test"]
    assert len(raw) == len(test) == 2495
    for e in range(0, 2495, 50):
        example = test[e]
        entry = raw[int(example.user.split()[-1]) - 1]
        history = [clean_title(title) for title in entry["historyList"].split("::")]
        assert example.candidates == [clean_title(title) for title in entry["itemList"]]
        assert [title for title, _ in example.history] == history[-20:]
        assert example.candidates[example.target] == clean_title(entry["trueSelection"])
