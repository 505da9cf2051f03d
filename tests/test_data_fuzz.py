"""Mutated files that strangers send are read, or refused by one message: never a traceback.

`python -m pytest -m slow tests/test_data_fuzz.py` tries 5,000 of each kind."""

import gzip
import json
import random
import shutil
import tempfile
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_datasets as made
from test_datasets import FORMS, json_lines, literal_lines, own_csv, put
from test_loaders import check_table, make_interactions

from common import read_json
from data import build_examples, render_prompt
from loaders.frozen import DataConfig, load_interactions
from loaders.table import clean_title
from loaders.users import Catalogue, listed_users, read_user

ROWS = [(f"u{n % 5}", n % 40, 1 + n % 5, 1600000000 + n, f'T{n % 40} "é"') for n in range(200)]
COLUMNS = dict(zip(made.NAMES, map(list, zip(*ROWS))))
RECORDS = [json.dumps(dict(zip(made.NAMES, row))) for row in ROWS]
HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\ttitle:token_seq\n"
ATOMIC = "".join("\t".join(map(str, row)) + "\n" for row in ROWS)
MOVIES = "movieId,title,genres\n" + "".join(f"{i},T{i} (1999),-\n" for i in range(1, 41))
RATINGS = "".join(f"{1 + n % 5},{1 + n % 40},{1 + n % 5},{10**9 + n}\n" for n in range(99))
ENTRIES = json.dumps([made.foreign_entry(n, True) for n in range(12)])
REQUEST = {"user": "a", "history": [{"title": "Owl", "rating": 4}], "candidates": ["A", "B", "C d"]}
REVIEWS = [r | {"reviewerID": f"{r['reviewerID']}{n}"} for n in range(12) for r in made.AMAZON]
PLAYED = [r | {"username": f"u{n}"} for n in range(12) for r in made.STEAM]
BEERS = made.beer_csv().decode("latin-1")
FILES = {  # kind -> data set, and the content of a sound folder, of which one file is mutated
    "csv": ("csv", {"log.csv": own_csv(rows=ROWS)}),
    "jsonl": ("jsonl", {"log.jsonl": "\n".join(RECORDS)}),
    "array": ("jsonl", {"log.json": f"[{','.join(RECORDS)}]"}),
    "recbole": ("recbole", {"x.inter": HEADER + ATOMIC}),
    "items": ("csv", {"items.csv": "item,title\n" + "".join(f"{n},T{n}\n" for n in range(40)), "log.csv": own_csv(made.NAMES[:4], range(4), rows=ROWS)}),  # noqa: E501
    "parquet": ("parquet", {"log.parquet": ""}),
    "prepared": ("prepared", dict.fromkeys(("train.json", "test.json", "val.json"), ENTRIES)),
    "request": ("csv", {"my.json": json.dumps(REQUEST)}),
    "requests": ("csv", {"my.jsonl": json.dumps(REQUEST) + "\n"}),
    "amazon": ("amazon", FORMS["amazon 2018"][1] | {"Books_5.json.gz": json_lines(REVIEWS)}),
    "steam": ("steam", FORMS["steam"][1] | {"steam_reviews.json.gz": literal_lines(PLAYED)}),
    "beer lines": ("beeradvocate", {"beeradvocate.json": literal_lines(made.BEER) * 15}),
    "beer blocks": ("beeradvocate", {"beeradvocate.txt": made.beer_blocks() * 15}),
    "beer csv": ("beeradvocate", {"beer_reviews.csv": BEERS + BEERS.split("\n", 1)[1] * 15}),
    "lastfm": ("lastfm", {"userid-timestamp-x.tsv": made.LASTFM * 30}),
    "movielens": ("movielens", {"ratings.csv": RATINGS, "movies.csv": MOVIES}),
}  # fmt: skip
POISON = [
    "NaN", "-1", "inf", "1e999", "", "null", "0", "9" * 23, "true", "[]", "{}", "\x00", '"', "'",
    "\\", "\n", "\r", "\\ud800", "|", ",", "\t", "::", ": ", "\u2028", "\\n", "<|end_of_text|>",
    "Answer:", "x" * 5000, "[" * 5000,
]  # fmt: skip


def mutated(content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 5, 40))):
        at, kind = rng.randrange(len(content) + 1), rng.randrange(8)
        lines = content.split(b"\n")
        if kind == 0:
            content = content[:at] if rng.random() < 0.5 else content[at:]
        elif kind < 4:  # put in, or instead
            odd = rng.choice([rng.randbytes(2), *(text.encode() for text in POISON)])
            content = content[:at] + odd + content[at + rng.choice((0, 1, 4, 30)) :]
        elif kind == 4:
            content = b"\n".join(rng.sample(lines, len(lines)))
        elif kind == 5:
            content = b"\n".join(lines + rng.choices(lines, k=rng.randrange(1, 50)))
        elif kind == 6 and rng.random() < 0.3:
            encoding = rng.choice(("utf-16", "utf-16-le", "utf-8-sig", "cp037"))
            content = content.decode("utf-8", "replace").encode(encoding, "replace")
        elif kind == 7 and rng.random() < 0.3:
            content = gzip.compress(content, mtime=0)[: rng.randrange(1, len(content) + 2)]
        if not content or len(content) > 1_000_000:
            break
    return content


def read(kind: str, folder):
    """Read a folder as a user would; what is read keeps its promises."""
    options = {"dataset": FILES[kind][0], "data_dir": str(folder), "followers": 2, "min_rating": 1}
    if kind == "items":
        options |= {"item_file": str(folder / "items.csv"), "data_dir": str(folder / "log.csv")}
    config = DataConfig(**options, min_history=1)
    if kind == "request":
        file = folder / "my.json"
        return read_user(read_json(file), str(file), Catalogue(None), config, 2)
    if kind == "requests":
        rows = [COLUMNS[name] for name in made.NAMES[:4]]
        log = make_interactions(*rows, {n: f"T{n}" for n in range(40)})
        return listed_users(folder / "my.jsonl", log, config, 2)
    if kind == "prepared":
        log, splits = load_interactions(config)
    else:
        log = load_interactions(config)
        check_table(log)
        assert (log.timestamp >= 0).all() and ((log.rating > 0) & (log.rating <= 5)).all()
        splits = build_examples(log, config) if kind in ("csv", "jsonl", "parquet") else {}
    assert all(t and t == clean_title(t) and len(t) <= 250 for t in log.titles)
    if splits:
        render_prompt(splits["test"][0])


@pytest.mark.parametrize("count", [21, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", FILES)
def test_mutated_files_are_read_or_refused_by_name(kind, count, tmp_path, capfd):
    folder, outcomes = tmp_path / "tried", []
    folder.mkdir()
    files = dict(FILES[kind][1])
    if kind == "parquet":
        times = pa.array(COLUMNS["timestamp"]).cast(pa.timestamp("s", "UTC"))
        table = pa.table(COLUMNS | {"timestamp": times})
        pq.write_table(table, folder / "p", compression="none", use_dictionary=["user"])
        files["log.parquet"] = (folder / "p").read_bytes()
    files = {n: c.encode() if isinstance(c, str) else c for n, c in files.items()}
    for n in range(count):
        rng = random.Random(f"{kind} {n}")
        victim = rng.choice([*files])
        shutil.rmtree(folder)
        for name, content in files.items():
            # of Parquet mostly the footer, which names columns, types and places
            kept = len(content) - 500 if kind == "parquet" and rng.random() < 0.7 else 0
            changed = content[:kept] + mutated(content[kept:], rng) if n else content
            put(folder / name, changed if name == victim else content)
        try:
            with warnings.catch_warnings(action="error"):  # such as an ignored exception
                read(kind, folder)
            outcomes.append("read")
        except ValueError as error:
            starts = (str(folder), "--users", "no train", "no val", "no test", "user ", "title ")
            starts += (tempfile.gettempdir(),)  # lines that were made of blocks
            assert n and str(error).startswith(starts), (n, str(error))
            assert len(str(error)) < 1500, (n, str(error))
            outcomes.append("refused")
        except BaseException as error:
            raise AssertionError(f"mutation {n} of {kind}: {error!r}") from error
    assert {*outcomes} == {"read", "refused"}
    assert "Exception ignored" not in capfd.readouterr().err
