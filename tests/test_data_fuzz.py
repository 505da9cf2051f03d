"""Mutated files that strangers send: own logs of every kind, prepared JSON, requests.

They are read, or refused by one message with the name of the file: never a traceback.

`python -m pytest -m slow tests/test_data_fuzz.py` tries 5,000 of them."""

import gzip
import json
import random
import shutil
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_datasets import foreign_entry
from test_loaders import check_table

from common import read_json
from data import build_examples, render_prompt
from loaders.foreign import read_foreign_examples
from loaders.frozen import DataConfig, load_interactions
from loaders.table import clean_title, make_interactions
from loaders.users import Catalogue, listed_users, read_user

NAMES = ("user", "item", "rating", "timestamp", "title")
ROWS = [(f"u{n % 5}", n % 40, 1 + n % 5, 1600000000 + n, f'T{n % 40} "é"') for n in range(200)]
LINES = [",".join(map(str, (*row[:4], f"T{row[1]}"))) + "\n" for row in ROWS]
ATOMIC = ["\t".join(map(str, row)) + "\n" for row in ROWS]
RECORDS = [json.dumps(dict(zip(NAMES, row))) + "\n" for row in ROWS]
HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\ttitle:token_seq\n"
ENTRIES = json.dumps([foreign_entry(n, True) for n in range(12)])
REQUEST = {"user": "a", "history": [{"title": "Owl", "rating": 4}], "candidates": ["A", "B", "C d"]}
FILES = {  # name -> content of a sound folder, of which the first is mutated
    "csv": {"log.csv": ",".join(NAMES) + "\n" + "".join(LINES)},
    "jsonl": {"log.jsonl": "".join(RECORDS)},
    "array": {"log.json": f"[{','.join(RECORDS)}]"},
    "recbole": {"x.inter": HEADER + "".join(ATOMIC)},
    "items": {"items.csv": "item,title\n" + "".join(f"{n},T{n}\n" for n in range(40)), "log.csv": ",".join(NAMES[:4]) + "\n" + "".join(line.rpartition(",")[0] + "\n" for line in LINES)},  # noqa: E501
    "parquet": {"log.parquet": ""},
    "prepared": {"train.json": ENTRIES, "test.json": ENTRIES, "val.json": ENTRIES},
    "request": {"my.json": json.dumps(REQUEST)},
    "requests": {"my.jsonl": json.dumps(REQUEST) + "\n"},
}  # fmt: skip
POISON = [
    "NaN", "-1", "inf", "1e999", "", "null", "0", "9" * 23, "true", "[]", "{}", "\x00", '"', "'",
    "\\", "\n", "\r", "\\ud800", "|", ",", "\t", "::", "\u2028", "\\n", "x" * 5000, "[" * 5000,
]  # fmt: skip


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few cuts, repeats, odd values, swapped lines, another encoding."""
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


def read(kind: str, folder) -> None:
    """Read a folder as a user would; what is read keeps its promises."""
    dataset = {"array": "jsonl", "items": "csv", "request": "csv", "requests": "csv"}.get(
        kind, kind
    )
    path = folder / "log.csv" if kind == "items" else folder
    options = {"item_file": str(folder / "items.csv")} if kind == "items" else {}
    options |= {"dataset": dataset, "data_dir": str(path), "followers": 2, "min_rating": 1}
    config = DataConfig(**options, min_history=1)
    if kind == "request":
        read_user(
            read_json(folder / "my.json"), str(folder / "my.json"), Catalogue(None), config, 2
        )
        return
    if kind == "requests":
        rows = dict(zip(("user", "item", "rating", "timestamp"), zip(*ROWS)))
        log = make_interactions(*rows.values(), {n: f"T{n}" for n in range(40)})
        listed_users(folder / "my.jsonl", log, config, 2)
        return
    if kind == "prepared":
        log, splits = read_foreign_examples(config)
    else:
        log = load_interactions(config)
        check_table(log)
        assert (log.timestamp >= 0).all() and ((log.rating > 0) & (log.rating <= 5)).all()
        splits = build_examples(log, config)
    assert all(t and t == clean_title(t) and len(t) <= 250 for t in log.titles)
    render_prompt(splits["test"][0])


def try_mutations(root, count: int, seed: int) -> Counter:
    """How many of each kind were read and refused; every refusal names the file or what is short
    of examples."""
    outcomes, kinds = Counter(), sorted(FILES)
    columns = dict(zip(NAMES, map(list, zip(*ROWS))))
    columns["timestamp"] = pa.array(columns["timestamp"]).cast(pa.timestamp("s", "UTC"))
    pq.write_table(pa.table(columns), root / "p", compression="none", use_dictionary=["user"])
    for n in range(count):
        kind, rng, folder = kinds[n % len(kinds)], random.Random(f"{seed} {n}"), root / "tried"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for place, (name, text) in enumerate(FILES[kind].items()):
            content = (root / "p").read_bytes() if kind == "parquet" else text.encode()
            # of Parquet mostly the footer, which names columns, types and places
            kept = len(content) - 500 if kind == "parquet" and rng.random() < 0.7 else 0
            changed = content[:kept] + mutated(content[kept:], rng)
            (folder / name).write_bytes(content if place or n < len(kinds) else changed)
        try:
            read(kind, folder)
            outcomes[kind, "read"] += 1
        except ValueError as error:
            starts = (str(folder), "--users", "no train", "no val", "no test", "user ", "title ")
            assert n >= len(kinds) and str(error).startswith(starts), (n, kind, str(error))
            assert len(str(error)) < 3000
            outcomes[kind, "refused"] += 1
        except BaseException as error:
            raise AssertionError(f"mutation {n} of {kind}: {error!r}") from error
    return outcomes


def test_mutated_files_are_read_or_refused_by_name(tmp_path, capsys):
    """The sound ones, then 180: some of each kind are read, and some are refused."""
    outcomes = try_mutations(tmp_path, 10 * len(FILES) * 2, seed=1)
    assert {kind for kind, _ in outcomes} == FILES.keys() and len(outcomes) == 2 * len(FILES)


@pytest.mark.slow
def test_thousands_of_mutated_files_are_read_or_refused_by_name(tmp_path, capsys):
    """5,000 of them."""
    try_mutations(tmp_path, 5000, seed=2)
