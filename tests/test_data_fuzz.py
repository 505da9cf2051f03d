"""Mutated files of the data half: prepared folders, prepared JSON, requests, options, Parquet.
Read, or one message with the file's name.

`python -m pytest -m slow tests/test_data_fuzz.py` tries 5,000 of them."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_json
from test_datasets import foreign_entry
from test_hub_fuzz import mutate, mutated_bytes, mutations

from common import parse_config, read_json
from data import render_prompt
from demo.tiny import make_base_model
from hub.tokenizer import Tokenizer
from loaders.foreign import read_foreign_examples
from loaders.frozen import (
    DataConfig,
    _read_prepared,
    encode_split,
    find_prepared,
    load_interactions,
)
from loaders.frozen import prepare as prepare_examples
from loaders.users import Catalogue, read_user
from train import TrainConfig


# ---------------------------------------------------------------- what is mutated, and who reads it
def make_files(root: Path) -> None:
    """One sound folder of each kind."""
    options = {"planted_users": 40, "train_size": 20, "test_size": 5, "followers": 3}
    prepared = prepare_examples(DataConfig(prepared_dir=str(root / "made"), **options))
    shape = {"hidden_size": 64, "num_layers": 1, "vocab_size": 400}
    make_base_model(root / "tokenizer", prepared.splits["train"], **shape, seed=0)
    prepared.baselines("test")
    encode_split(prepared, "test", Tokenizer(root / "tokenizer"), 1024)
    prepared.folder.rename(root / "prepared")
    (tokens,) = (root / "prepared").glob("tokens-*")
    tokens.rename(root / "prepared" / "tokens.safetensors")
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        write_json(root / f"foreign/{split}.json", [foreign_entry(n, True) for n in range(count)])
    history = [{"title": "Red River", "rating": 4}, {"title": "Owl", "rating": 2.5}]
    write_json(root / "request/my.json", {"history": history, "candidates": ["A", "B", "C d"]})
    write_json(
        root / "options/my.json", {"dataset": "csv", "data_dir": "x", "decay": 0.5, "core": 3}
    )
    if has_pyarrow():
        write_parquet(root / "parquet" / "log.parquet")


def has_pyarrow() -> bool:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        return False
    return True


def write_parquet(file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

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


def read_prepared(root: Path) -> None:
    folder = root / "prepared"
    content_hash = json.loads((root.parent / "sound/prepared/meta.json").read_text())["hash"]
    find_prepared(root, content_hash[:12])
    prepared = _read_prepared(folder, check=True)
    for examples in prepared.splits.values():
        render_prompt(examples[0])
    prepared.baselines("test")


def read_tokens(root: Path) -> None:
    prepared = _read_prepared(root / "prepared", check=False)
    tokenizer = Tokenizer(root / "tokenizer")
    name = encoded_name(root.parent / "named", tokenizer)
    shutil.copy(root / "prepared/tokens.safetensors", root / "prepared" / name)
    encoded = encode_split(prepared, "test", tokenizer, 1024)
    encoded.tree([0, 1], [[0, 1, 2]] * len(encoded.prompts))


def encoded_name(folder: Path, tokenizer: Tokenizer) -> str:
    """The name of the token file of these examples, whatever its content."""
    if not folder.exists():
        shutil.copytree(folder.parent / "sound/prepared", folder)
        encode_split(_read_prepared(folder, check=False), "test", tokenizer, 1024)
    (file,) = folder.glob("tokens-*")
    return file.name


def read_foreign(root: Path) -> None:
    config = DataConfig(dataset="prepared", data_dir=str(root / "foreign"))
    _, splits = read_foreign_examples(config)
    for examples in splits.values():
        render_prompt(examples[len(examples) - 1])


READERS = {
    "prepared/meta.json": read_prepared,
    "prepared/examples.safetensors": read_prepared,
    "prepared/baselines-test.safetensors": read_prepared,
    "prepared/tokens.safetensors": read_tokens,
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
}
if has_pyarrow():
    READERS["parquet/log.parquet"] = lambda root: load_interactions(
        DataConfig(dataset="parquet", data_dir=str(root / "parquet"), min_rating=1)
    )


# ------------------------------------------------------------------------------ how
def mutate_file(file: Path, rng: random.Random) -> None:
    if file.suffix == ".parquet":
        content = file.read_bytes()
        if rng.random() < 0.7:  # its footer, which names columns, types and places
            head, foot = content[:-500], content[-500:]
            content = head + mutated_bytes(foot, rng)
        else:
            content = mutated_bytes(content, rng)
        file.write_bytes(content)
    else:
        mutate(file, rng)


def try_mutations(root: Path, count: int, seed: int) -> int:
    """How many of them were refused; every refusal names a file of the folder."""
    make_files(root / "sound")
    refused = 0
    for n, name, error in mutations(root, READERS, mutate_file, count, seed):
        refused += 1
        folder = name.split("/")[0]
        # options that are understood and wrong name the option
        named = rf"tried/{folder}|^--|^these were tested on different.*tried/{folder}"
        assert re.search(named, error), (n, name, error)
        assert len(error) < 3000
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
    assert 60 < refused < 200


@pytest.mark.slow
def test_thousands_of_mutated_files_are_read_or_refused_by_name(tmp_path, capsys):
    """5,000 of them."""
    assert try_mutations(tmp_path, 5000, seed=2) > 1500
