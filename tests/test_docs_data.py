"""docs/data.md: its commands run on small files of the same shape."""

import csv
import io
import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_datasets import INTER, ITEM, amazon_csv, json_lines, put

from common import parse_config
from loaders.frozen import DataConfig, prepare

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
ITEMS = range(1, 61)
EVENTS = [
    (u, 1 + (7 * u + 3 * n) % 60, 1 + (u + n) % 5, 1600000000 + 86400 * n + u)
    for u in range(1, 11)
    for n in range(20)
]


def table(names: str, rows) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([names.split(","), *rows])
    return out.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    names, titled = [(i, f"Title {i}") for i in ITEMS], [(*e, f"Title {e[1]}") for e in EVENTS]
    keys = ("user_id", "parent_asin", "rating", "timestamp")
    rows = [(f"AE{u}", f"B{i:09d}", float(r), t * 1000) for u, i, r, t in EVENTS]
    reviews = amazon_csv([dict(zip(keys, row)) for row in rows])
    plays = [{"uid": u, "vid": i, "at": t} for u, i, _, t in EVENTS for _ in range(1 + u % 4)]
    hours = [(u, i, 10 * r + 0.1 * u, t, title) for u, i, r, t, title in titled]
    anime = [(u, i, -1 if (u + i) % 9 == 0 else 2 * r) for u, i, r, _ in EVENTS]
    products = ({"parent_asin": f"B{i:09d}", "title": t} for i, t in names)
    tabs = ["\t".join(map(str, event)) for event in EVENTS]
    for name, text in {
        "ml-25m/ratings.csv": table("userId,movieId,rating,timestamp", EVENTS),
        "ml-25m/movies.csv": table("movieId,title,genres", [(*n, "Drama") for n in names]),
        "amazon-2023/Beauty.csv": reviews,
        "amazon-2023/meta_Beauty.jsonl": json_lines(products),
        "log.csv": table("customer,sku,stars,ordered_at,product", titled),
        "events.json": json.dumps(plays),
        "videos.csv": table("id,name", names),
        "recbole/ml.inter": "\n".join([INTER.splitlines()[0], *tabs]),
        "recbole/ml.item": ITEM.splitlines()[0] + "".join(f"\n{i}\t{t}\tD" for i, t in names),
        "played.csv": table("user,item,hours,timestamp,title", hours),
        "anime/rating.csv": table("user_id,anime_id,rating", anime),
        "anime/anime.csv": table("anime_id,name,genre", [(*n, "Action, Drama") for n in names]),
    }.items():
        put(folder / name, text)
    names_of = ("user_id", "item_id", "rating", "event_time")
    whole = pa.table(dict(zip(names_of, map(list, zip(*EVENTS)))))
    times = whole["event_time"].cast(pa.timestamp("s", "UTC"))
    whole = whole.set_column(3, "event_time", times)
    for part in range(2):
        file = put(folder / f"exported/part-{part}.snappy.parquet", "")
        pq.write_table(whole.slice(100 * part, 100), file)
    titles = pa.table({"item_id": list(ITEMS), "title": [t for _, t in names]})
    pq.write_table(titles, folder / "items.parquet")
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c.split()[4:7]))
def test_commands_of_the_page(command, files, tmp_path, monkeypatch, capsys):
    assert len(COMMANDS) >= 8
    monkeypatch.chdir(files)
    flags = [*shlex.split(command)[3:], f"--prepared_dir={tmp_path}"]
    prepared = prepare(parse_config(DataConfig, flags))
    interactions = prepared.interactions
    assert (interactions.num_users, interactions.num_items) == (10, 60)
    assert all("Title" in title and '"";' not in title for title in interactions.titles)
    assert 4 < interactions.rating.max() <= 5
    assert len(prepared.splits["train"]) > 0 and "ids are shown" not in capsys.readouterr().out
