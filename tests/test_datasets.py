"""Amazon, Steam, BeerAdvocate, LastFM, RecBole, prepared JSON: files of ours, real samples."""

import ast
import csv
import gzip
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_loaders import DATA, check_table, rows_of

from data import render_prompt
from loaders.frozen import DataConfig, load_interactions, prepare
from loaders.table import percentile_ratings


def load(dataset: str, path, **options):
    return load_interactions(DataConfig(dataset=dataset, data_dir=str(path), **options))


def prepare_foreign(folder: Path):
    made = str(folder / "prepared")
    return prepare(DataConfig(dataset="prepared", data_dir=str(folder), prepared_dir=made))


def sample(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is absent; RECPO_DATA names its folder")
    return DATA / name


def put(file: Path, text: str | bytes) -> Path:
    """Write a file, gzipped if its name says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode() if isinstance(text, str) else text
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def test_percentile_ratings_are_mid_ranks_of_the_group():
    """ceil(5 * mid-rank / size): equal amounts tie, the top fifth gets 5."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = int(rng.integers(1, 60))
        amount, group = rng.integers(0, 12, n).astype(np.float32), rng.integers(0, 5, n)
        for i, rating in enumerate(percentile_ratings(amount, group)):
            inside = amount[group == group[i]]
            share = ((inside < amount[i]).sum() + 0.5 * (inside == amount[i]).sum()) / len(inside)
            assert rating == np.ceil(5 * share)


# ------------------------------------------------------------------------------ published data sets
def json_lines(records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def literal_lines(records) -> str:
    """As Python 2 wrote them."""
    lines = (re.sub(r"(?<=[{ ])'([\w/]+)':", r"u'\1':", repr(record)) for record in records)
    return "".join(f"{line}\n" for line in lines)


AMAZON = [
    {"reviewerID": user, "asin": f"B00000000{item}", "overall": stars, "unixReviewTime": time}
    | more
    for user, item, stars, time, more in (
        ("A1", 1, 5.0, 1500864000, {"reviewText": 'quotes " and \n'}),
        ("A1", 2, 2.0, 1500086400, {"vote": "1,234"}),
        ("A2", 1, 4.0, 1500086400, {"style": {"Format:": " Kindle"}}),
        ("A2", 1, 3.0, 1500172800, {}),
        ("A2", 3, 1.0, 1500172800, {}),
    )
]
AMAZON_META = [
    {"asin": "B000000001", "title": "Tom &amp; Jerry"},
    {"asin": "B000000001", "title": "again"},
    {"asin": "B000000002", "title": "Go", "details": {}, "price": "$1"},
    {"asin": "B000000003", "title": '<span class="a-size-medium">'},  # a piece of a page
    {"asin": "B000000009", "title": "unseen"},
]
AMAZON_ROWS = [("A1", "B000000002", 2, 1500086400), ("A1", "B000000001", 5, 1500864000), ("A2", "B000000001", 3, 1500172800)]  # noqa: E501  # fmt: skip
STEAM = [
    {"username": user, "product_id": item, "date": f"2017-12-{day}"} | more
    for user, item, day, more in (
        ("Chaos Syren", "10", 17, {"hours": 0.1, "text": "it's {'hours': 5.0}"}),
        ("Chaos Syren", "20", 16, {"hours": 8, "early_access": False}),
        ("Bob", "10", 18, {"hours": 3.5}),
        ("Bob", "20", 18, {}),
        ("Bob", "10", 19, {"hours": 4.5}),
    )
]
STEAM_GAMES = [{"id": "10", "app_name": "Sam &amp; Max", "title": "other"}, {"app_name": "no id"}]
STEAM_GAMES.append({"id": "20", "title": "Portal™", "tags": ["a", "b"]})
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
    names = (*ids, "overall", "unixReviewTime")
    return "\n".join(",".join(str(review[name]) for name in names) for review in AMAZON)


KEYS_2023 = ("user_id", "parent_asin", "rating", "timestamp")
AMAZON_2023 = [  # milliseconds; what a review is called is no title
    dict(zip(KEYS_2023, (*list(r.values())[:3], 1000 * r["unixReviewTime"]))) | {"title": "Great!"}
    for r in AMAZON
]


def amazon_csv(rows: list[dict], *more: str) -> str:
    """With or without the histories of the benchmark."""
    names = [*KEYS_2023, *more]
    lines = [names, *([str(r.get(name, "B0P9 B0P8")) for name in names] for r in rows)]
    return "\n".join(",".join(line) for line in lines) + "\n"


def beer_blocks() -> str:
    blocks = ("\n".join(f"{k}: {'' if v is None else v}" for k, v in r.items()) for r in BEER)
    text = "".join(f"{block}\n\n" for block in blocks)
    return text.replace("user/", "review/").replace("timeUnix", "time")


def beer_csv() -> bytes:
    out = io.StringIO()
    names = (
        ",review_overall,beer_name,beer_abv,beer_style,beer_beerid,review_profilename,review_time"
    )
    rows = [names.split(","), *([n, *record.values()] for n, record in enumerate(BEER))]
    csv.writer(out, quoting=csv.QUOTE_NONNUMERIC).writerows(rows)
    return out.getvalue().encode("latin-1")


META = {"meta_Books.json": json_lines(AMAZON_META)}
GAMES = {"steam_games.json.gz": literal_lines(STEAM_GAMES)}
NEW_META = {"meta_Books.jsonl": json_lines({"parent_asin": m["asin"], "title": m["title"]} for m in AMAZON_META)}  # noqa: E501  # fmt: skip
SPLITS = {"train": AMAZON_2023[:1], "valid": AMAZON_2023[1:3], "test": AMAZON_2023[3:]}
AMAZON_FORMS = {
    "lines": {"Books.jsonl.gz": json_lines(AMAZON_2023)},
    "array": {"Books.json": json.dumps(AMAZON_2023)},
    "ratings": {"Books.csv": amazon_csv(AMAZON_2023)},
    "history": {"Books.csv": amazon_csv(AMAZON_2023, "history")},
    "splits": {f"Books.{s}.csv": amazon_csv(rows, "history") for s, rows in SPLITS.items()},
}
FORMS = {  # form -> data set, its files
    "amazon 2018": ("amazon", {"Books_5.json.gz": json_lines(AMAZON)} | META),
    "amazon 2014": ("amazon", {"reviews_Books.json": json_lines(AMAZON), "meta_Books.json.gz": literal_lines(AMAZON_META)}),  # noqa: E501
    "ratings 2018": ("amazon", {"Books.csv": amazon_ratings("asin", "reviewerID")} | META),
    "ratings 2014": ("amazon", {"ratings_Books.csv": amazon_ratings("reviewerID", "asin")} | META),
    **{f"2023 {n}": ("amazon", NEW_META | files) for n, files in AMAZON_FORMS.items()},
    "steam": ("steam", {"steam_reviews.json.gz": literal_lines(STEAM)} | GAMES),
    "beer lines": ("beeradvocate", {"beeradvocate.json": literal_lines(BEER)}),
    "beer blocks": ("beeradvocate", {"beeradvocate.txt.gz": beer_blocks()}),
    "beer csv": ("beeradvocate", {"beer_reviews.csv": beer_csv()}),
    "lastfm": ("lastfm", {EVENTS: LASTFM}),
}  # fmt: skip
REPEATED = "repeated pairs of user and item, of which the last counts"
EXPECTED = {  # rows, titles, what is left out or changed
    "amazon": (AMAZON_ROWS, ["Tom & Jerry", "Go"],
               {REPEATED: 1, "interactions with an item that has no title": 1}),
    "steam": (STEAM_ROWS, ["Sam & Max", "Portal™"], {"rows without rating": 1, REPEATED: 1}),
    "beeradvocate": (BEER_ROWS, ["Sausa Weizen (5% ABV, Hefeweizen)", "Pale Ale"],
                     {"rows without user": 1, "rows without rating": 1}),
    "lastfm": (LASTFM_ROWS, ['Deep "Dish', "坂本龍一"],
               {"rows without item": 1, "repeats, added up": 1}),
}  # fmt: skip


def put_all(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        put(folder / name, content)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_published_forms(form, tmp_path):
    dataset, files = FORMS[form]
    interactions = load(dataset, put_all(tmp_path, files))
    rows, titles, notes = EXPECTED[dataset]
    assert rows_of(interactions) == rows and interactions.titles == titles
    assert {why.split(" (")[0]: count for why, count in interactions.notes.items()} == notes
    assert interactions.name == ("amazon_books" if dataset == "amazon" else dataset)
    check_table(interactions)


@pytest.mark.parametrize("dataset, files, culprit", [
    ("amazon", {"Books_5.json": json_lines(AMAZON)}, "titles need meta_Books.* beside Books_5"),
    ("amazon", {"Books.csv": "who,what,stars\na,b,c\n"} | META, r"Books\.csv.*reviewerID"),
    ("steam", {"steam_reviews.json": literal_lines(STEAM)}, "titles need steam_games. beside"),
    ("lastfm", {"lastfm-dataset-1K.tgz": b""}, r"no file of lastfm .*userid-timestamp.*1K\.tgz"),
    ("beeradvocate", {"beeradvocate.txt": beer_blocks().replace("4.0", "x")}, r"e\.txt.*'x'"),
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


@pytest.mark.parametrize("form", ["\t", ",", " \t", "train valid test", "part1 part2 part3"])
def test_recbole_atomic_files(form, tmp_path):
    """Quotes are characters; titles come from the .item file beside; what stands between the typed
    names divides the fields; a benchmark's files, each with a header, are one log."""
    if form.isspace() or form == ",":
        parts = {"m.inter": INTER.replace("\t", form)}
    else:
        header, *rows = INTER.splitlines()
        parts = {f"m.{n}.inter": f"{header}\n{r}" for n, r in zip(form.split(), rows, strict=True)}
    interactions = load("recbole", put_all(tmp_path, parts | {"m.item": ITEM}))
    assert rows_of(interactions) == INTER_ROWS and interactions.titles == ['The "M"', "Go"]


# ----------------------------------------------------------------------------------------- own logs
OWN = [
    ("ann", "7", 4.5, 1600000000, "Go"),
    ("ann", "8", 2, 1600000100, 'say "A, B"'),
    ("bob", "7", 5, 1600000050, "Go"),
]
OWN_ROWS = [row[:4] for row in OWN]
NAMES = ("user", "item", "rating", "timestamp", "title")


def own_csv(names=NAMES, order=range(5), delimiter=",", rows=OWN) -> str:
    out = io.StringIO()
    table = [[row[c] for c in order] for row in (names, *rows)]
    csv.writer(out, delimiter=delimiter).writerows(table)
    return out.getvalue()


def test_own_hours_and_missing_columns(tmp_path, capsys):
    """Hours are ranks, times are line numbers; a note says what is missing."""
    file = put(tmp_path / "hours.csv", own_csv(("user", "item", "hours", "date", "title")))
    assert load("csv", file).rating.tolist() == [2, 3, 4]
    clicks = put(tmp_path / "clicks.csv", "user,item\nb,1\na,1\nb,2\nb,1\nb,1\n")
    assert rows_of(load("csv", clicks)) == [("a", "1", 2, 3), ("b", "1", 4, 2), ("b", "2", 3, 4)]
    notes = capsys.readouterr().out
    assert all(f"no {name} column" in notes for name in ("rating", "timestamp"))


def test_columns_are_the_likely_ones(tmp_path):
    """A product's name is the title; keys that the first JSON line lacks are found."""
    rows = "".join(f"{u},Bob {u},{i},Thing {i},x,4\n" for u in range(3) for i in range(3))
    text = f"user_id,name,product_id,product_name,user,rating\n{rows}"
    interactions = load("csv", put(tmp_path / "a.csv", text))
    assert interactions.user_ids == ["0", "1", "2"] and interactions.titles[2] == "Thing 2"
    lines = [{"user": "a", "item": str(n), "rating": 4.5} for n in range(200)]
    text = '{"user": "a", "item": "1"}\n' + json_lines(lines)
    interactions = load("jsonl", put(tmp_path / "a.jsonl", text))
    assert set(interactions.rating.tolist()) == {4.5} and len(interactions.user) == 200


def test_order_within_a_second_and_titles_that_change(tmp_path):
    """Milliseconds order a log; of two titles of an item the same one is taken in any order."""
    start = 1600000000000
    rows = [("u", n, 4, start + 100 * (9 - n), "New" if n else "Old") for n in range(9)]
    rows.append(("v", 0, 4, start, "New"))
    for lines in (rows, rows[::-1]):
        interactions = load("csv", put(tmp_path / "a.csv", own_csv(rows=lines)))
        items = [item for user, item, *_ in rows_of(interactions) if user == "u"]
        assert items == list("876543210") and interactions.titles[0] == "New"


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
    for split, count in {"train": 40, "val": 4, "test": 15}.items():
        entries = [foreign_entry(n, scores) for n in range(count)]
        put(tmp_path / f"x-{split}.json", json.dumps(entries))
    splits = prepare_foreign(tmp_path).splits
    assert {split: len(e) for split, e in splits.items()} == {"train": 40, "val": 4, "test": 15}
    assert ("all scores are 1" in capsys.readouterr().out) == (not scores)
    test = splits["test"]
    for e, negatives in enumerate(test.negatives(3)):
        example = test[e]
        number = int(example.user.split()[-1]) - 1
        raw = foreign_entry(number, scores)
        assert example.candidates == raw["itemList"] and example.target not in negatives
        assert example.candidates[example.target] == raw["trueSelection"]
        assert example.scores == pytest.approx(raw["itemScoreList"] if scores else [1.0] * 20)
        line = f"H{number} | Rating: 4" if scores else f"H{number}"
        assert line in render_prompt(example).splitlines()


def test_prepared_json_that_does_not_fit_is_named(tmp_path):
    entries = [foreign_entry(n, True) for n in range(50)]
    entries[3]["itemList"].pop()
    for split in ("train", "val", "test"):
        put(tmp_path / f"{split}.json", json.dumps(entries))
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


def digest(log) -> str:
    return hashlib.sha256(json.dumps([rows_of(log), log.titles]).encode()).hexdigest()[:16]


@pytest.mark.parametrize("dataset, name", SAMPLES)
def test_real_samples_are_read_as_before(dataset, name):
    log = load(dataset, sample(name))
    check_table(log)
    found = digest(log), len(log.user), log.num_users
    assert (*found, log.num_items) == SAMPLES[dataset, name]


def test_real_steam_titles(tmp_path):
    """Every eighth game of the original file, reviewed once each: app_name, else title."""
    text = gzip.decompress(sample("steam/steam_games.json.gz").read_bytes()).decode()
    games = (ast.literal_eval(line) for line in text.split("\n")[:-1:8])
    review = {"username": "u", "hours": 1, "date": "2017-01-01"}
    reviews = [review | {"product_id": game["id"]} for game in games if "id" in game]
    put(tmp_path / "steam_reviews.json", literal_lines(reviews))
    put(tmp_path / "steam_games.json.gz", text)
    assert digest(load("steam", tmp_path)) == "d6ab02acc6621596"


def test_real_sdpo_sample(tmp_path):
    raw = json.loads(sample("sdpo/lastfm-test.json").read_text())
    for split, count in {"train": 300, "val": 9, "test": None}.items():
        put(tmp_path / f"lastfm-{split}.json", json.dumps(raw[:count]))
    test = prepare_foreign(tmp_path).splits["test"]
    prompts = "".join(render_prompt(test[e]) for e in range(len(test)))
    assert hashlib.md5(prompts.encode()).hexdigest() == "153b58f635086f1a67878405ca256d86"
