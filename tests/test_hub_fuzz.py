"""Mutated files of models, tokenizers, adapters and run folders:
read, or one message with the file's name.

`python -m pytest -m slow tests/test_hub_fuzz.py` tries 5,000 of them."""

import copy
import json
import random
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import write_checkpoint, write_json
from test_hub_tokenizer import write_ends, write_tokenizer

from eval import EvalConfig
from hub.adapter import base_fingerprint, base_of
from hub.config import read_config
from hub.tokenizer import Tokenizer
from lora import apply_lora, load_adapter, save_adapter
from model import empty_model, load_pretrained
from runtime.sources import sources_of, with_run_options
from runtime.stages import check_data, load_stage

ODD = [
    None, True, False, 0, 1, -1, 2, 7, 1.5, -0.5, 1e308, 10**30, 2**31, float("nan"), float("inf"),
    "", "x", "0", "é\ud83d", "../..", "/", "a\0b", "(", "model.safetensors",
    [], [0], [None], [[]], ["x"], {}, {"a": 1},
]  # fmt: skip


# ---------------------------------------------------------------- what is mutated, and who reads it
def make_files(root: Path) -> None:
    """One sound folder of each kind."""
    write_checkpoint(root / "single")
    write_checkpoint(root / "sharded", shard_bytes=20_000)
    write_checkpoint(root / "tied", "llama3.2")
    write_ends(write_tokenizer(root / "tokenizer", "<s> $A </s>", "more"), 1, [1, 2], "</s>")
    model = load_pretrained(root / "single")
    save_adapter(apply_lora(model, 2, 4, target_modules=["q_proj", "up_proj"]), root / "adapter")
    run = root / "run"
    write_json(run / "config.json", {"stages": "raw,sft", "dataset": "csv", "max_length": 512})
    write_json(
        run / "sft" / "base.json", {"base": "../../single", "adapter": str(root / "adapter")}
    )
    write_json(run / "sft" / "eval" / "metrics.json", {"data_hash": "a" * 64})


def read_tokenizer(root: Path) -> None:
    tokenizer = Tokenizer(root / "tokenizer")
    tokenizer.encode_prompts(["Alien é 7"])
    (ids,) = tokenizer.encode_completions(["Alien more"])
    tokenizer.answer(ids)


def read_adapter(root: Path) -> None:
    base_of(root / "adapter")
    load_adapter(load_pretrained(root.parent / "sound" / "single"), root / "adapter")


def read_run(root: Path) -> None:
    config = with_run_options(EvalConfig(run=str(root / "run")))
    sources_of(config)
    load_stage(root / "run" / "sft")
    check_data(root / "run" / "sft", "a" * 64, "")


READERS = {
    "single/config.json": lambda root: (read_config(root / "single"), empty_model(root / "single")),
    "single/model.safetensors": lambda root: load_pretrained(root / "single"),
    "sharded/model.safetensors.index.json": lambda root: (
        load_pretrained(root / "sharded"),
        base_fingerprint(root / "sharded"),
    ),
    "tied/model.safetensors": lambda root: load_pretrained(root / "tied"),
    "tokenizer/tokenizer.json": read_tokenizer,
    "tokenizer/config.json": read_tokenizer,
    "tokenizer/generation_config.json": read_tokenizer,
    "tokenizer/tokenizer_config.json": read_tokenizer,
    "adapter/adapter_config.json": read_adapter,
    "adapter/adapter_model.safetensors": read_adapter,
    "run/config.json": read_run,
    "run/sft/base.json": read_run,
    "run/sft/eval/metrics.json": read_run,
}


# ------------------------------------------------------------------------------ how
def mutated_json(content, rng: random.Random):
    """A value somewhere replaced, removed, renamed or doubled."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        node = content
        while True:
            keys = list(node if isinstance(node, dict) else range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            inside = isinstance(node[key], dict | list) and node[key]
            if inside and rng.random() < 0.8:
                node = node[key]
                continue
            kind = rng.random()
            if kind < 0.7:
                node[key] = copy.deepcopy(rng.choice(ODD))
            elif kind < 0.85:
                del node[key]
            elif isinstance(node, dict):
                node[rng.choice(["", "x", "type", f"{key} "])] = node.pop(key)
            else:
                node.append(copy.deepcopy(node[key]))
            break
    return content


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    content = bytearray(content)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(content[: rng.randrange(len(content))])
    if kind == 1:
        return bytes(content) + rng.randbytes(rng.randrange(1, 50))
    for _ in range(rng.choice([1, 3, 20])):
        at = rng.randrange(min(len(content), 3000))
        content[at] = rng.randrange(256)
    return bytes(content)


def mutate(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    if file.suffix == ".json":
        if rng.random() < 0.8:
            text = json.dumps(mutated_json(json.loads(content), rng))
            file.write_text(text, errors="surrogatepass")
            return
    elif rng.random() < 0.6:  # the header of safetensors is JSON
        (size,) = struct.unpack("<Q", content[:8])
        header = mutated_json(json.loads(content[8 : 8 + size]), rng)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
        return
    file.write_bytes(mutated_bytes(content, rng))


def mutations(root: Path, readers: dict, mutate_file, count: int, seed: int):
    """(n, name, error) of every mutated file that its reader refused; root/sound holds sound ones.

    Anything but a ValueError or an OSError fails the test."""
    names = list(readers)
    for n in range(count):
        rng = random.Random(f"{seed} {n}")
        name = names[n % len(names)]
        shutil.rmtree(root / "tried", ignore_errors=True)
        shutil.copytree(root / "sound", root / "tried")
        mutate_file(root / "tried" / name, rng)
        try:
            readers[name](root / "tried")
        except (ValueError, OSError) as error:
            yield n, name, str(error)
        except BaseException as error:
            raise AssertionError(f"mutation {n} of {name}: {error!r}") from error


def try_mutations(root: Path, count: int, seed: int) -> int:
    """How many of them were refused; every refusal names a file of the folder."""
    make_files(root / "sound")
    refused = 0
    for n, name, error in mutations(root, READERS, mutate, count, seed):
        refused += 1
        folder = name.split("/")[0]
        assert re.search(rf"tried/{folder}|target_modules", error), (n, name, error)
    return refused


def test_mutated_files_are_read_or_refused_by_name(tmp_path):
    """200 of them: no traceback but a ValueError's, and that names the file."""
    torch.set_num_threads(1)
    refused = try_mutations(tmp_path, 200, seed=1)
    assert 100 < refused < 200  # most mutations do harm, and some do none


@pytest.mark.slow
def test_thousands_of_mutated_files_are_read_or_refused_by_name(tmp_path):
    """5,000 of them."""
    assert try_mutations(tmp_path, 5000, seed=2) > 2500
