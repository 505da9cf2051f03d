"""Mutated files that strangers send: prepared JSON, requests, options, Parquet (logs: see
test_datasets.py). Read, or one message with the file's name.

`python -m pytest -m slow tests/test_data_fuzz.py` tries 5,000 of them."""

import random
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_json
from test_datasets import foreign_entry
from test_hub_fuzz import mutated

from common import parse_config, read_json
from data import render_prompt
from loaders.foreign import read_foreign_examples
from loaders.frozen import DataConfig, load_interactions
from loaders.users import Catalogue, read_user
from train import TrainConfig


# ---------------------------------------------------------------- what is mutated, and who reads it
def make_files(root: Path) -> None:
    """One sound folder of each kind."""
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        write_json(root / f"foreign/{split}.json", [foreign_entry(n, True) for n in range(count)])
    history = [{"title": "Red River", "rating": 4}, {"title": "Owl", "rating": 2.5}]
    write_json(root / "request/my.json", {"history": history, "candidates": ["A", "B", "C d"]})
    write_json(
        root / "options/my.json", {"dataset": "csv", "data_dir": "x", "model": "m", "core": 3}
    )
    write_parquet(root / "parquet" / "log.parquet")


def write_parquet(file: Path) -> None:
    seconds = pa.array(range(1500000000, 1500000060), pa.int64())
    table = {
        "user": [f"u{n % 5}" for n in range(60)],
        "item": pa.array([n % 20 for n in range(60)]),
        "rating": pa.array([1.0 + n % 5 for n in range(60)]),
        "timestamp": seconds.cast(pa.timestamp("s", "UTC")),
        "title": [f"Title {n % 20}" for n in range(60)],
    }
    file.parent.mkdir(parents=True)
    pq.write_table(pa.table(table), file, compression="none", use_dictionary=["user"])


def read_foreign(root: Path) -> None:
    config = DataConfig(dataset="prepared", data_dir=str(root / "foreign"))
    _, splits = read_foreign_examples(config)
    for examples in splits.values():
        render_prompt(examples[len(examples) - 1])


READERS = {
    "foreign/train.json": read_foreign,
    "foreign/test.json": read_foreign,
    "request/my.json": lambda root: read_user(
        read_json(root / "request/my.json"),
        str(root / "request/my.json"),
        Catalogue(None),
        DataConfig(),
        fewest=2,
    ),
    "options/my.json": lambda root: parse_config(
        TrainConfig, ["--config", str(root / "options/my.json")]
    ),
    "parquet/log.parquet": lambda root: load_interactions(
        DataConfig(dataset="parquet", data_dir=str(root / "parquet"), min_rating=1)
    ),
}


# ------------------------------------------------------------------------------ how
def try_mutations(root: Path, count: int, seed: int) -> int:
    """How many of them were refused; every refusal names a file of the folder, or the option."""
    make_files(root / "sound")
    refused = 0
    for n in range(count):
        rng = random.Random(f"{seed} {n}")
        name, tried = rng.choice(sorted(READERS)), root / "tried"
        shutil.rmtree(tried, ignore_errors=True)
        shutil.copytree(root / "sound", tried)
        content = (tried / name).read_bytes()
        # of Parquet mostly the footer, which names columns, types and places
        kept = len(content) - 500 if name.endswith(".parquet") and rng.random() < 0.7 else 0
        (tried / name).write_bytes(content[:kept] + mutated(content[kept:], name, rng))
        try:
            READERS[name](tried)
        except ValueError as error:
            refused += 1
            assert re.search(rf"tried/{name.split('/')[0]}|^--", str(error)), (n, name, error)
            assert len(str(error)) < 3000
        except BaseException as error:
            raise AssertionError(f"mutation {n} of {name}: {error!r}") from error
    return refused


def test_the_sound_files_are_read(tmp_path, capsys):
    make_files(tmp_path / "sound")
    for read in READERS.values():
        shutil.rmtree(tmp_path / "tried", ignore_errors=True)
        shutil.copytree(tmp_path / "sound", tmp_path / "tried")
        read(tmp_path / "tried")


def test_mutated_files_are_read_or_refused_by_name(tmp_path, capsys):
    """200 of them: no traceback but a ValueError's, and that names the file."""
    torch.set_num_threads(1)
    refused = try_mutations(tmp_path, 200, seed=1)
    assert 40 < refused < 200


@pytest.mark.slow
def test_thousands_of_mutated_files_are_read_or_refused_by_name(tmp_path, capsys):
    """5,000 of them."""
    assert try_mutations(tmp_path, 5000, seed=2) > 1000
