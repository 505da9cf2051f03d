"""Mutated files of strangers are read, or refused by one ValueError: never a traceback."""

import json
import random
import shutil
import struct
from pathlib import Path

import pytest
from conftest import tiny_model, write_checkpoint, write_json
from test_hub_gguf import padded_model, write_gguf
from test_hub_tokenizer import write_ends, write_tokenizer

from hub.gguf import convert
from hub.tokenizer import Tokenizer
from lora import apply_lora, base_of, load_adapter, save_adapter
from model import load_pretrained

ODD = [
    None, True, 0, -1, 7, 1.5, 1e308, 10**30, float("nan"), float("inf"), "", "x", "é\ud83d",
    "../..", "a\0b", "(", [], [None], [[]], ["x"], {}, {"a": 1},
]  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"


def read_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    tokenizer.encode_prompts(["Alien é 7"])
    tokenizer.answer(tokenizer.encode_completions(["Alien more"])[0])


def read_adapter(folder: Path) -> None:
    base_of(folder)
    load_adapter(tiny_model(), folder)


KINDS = {  # file that is mutated -> who reads its folder
    "config.json": load_pretrained,
    "model.safetensors": load_pretrained,
    "model.safetensors.index.json": load_pretrained,
    "tokenizer.json": read_tokenizer,
    "generation_config.json": read_tokenizer,
    "tokenizer_config.json": lambda folder: Tokenizer(folder, "chat").encode_completions(["Alien"]),
    "adapter_config.json": read_adapter,
    "adapter_model.safetensors": read_adapter,
    "m.gguf": lambda folder: convert(folder / "m.gguf", folder / "hf"),
}


def write_sound(folder: Path, name: str) -> None:
    """A folder that its reader reads, with the file to be mutated in it."""
    if name == "m.gguf":
        folder.mkdir()
        write_gguf(folder / name, padded_model("llama2"))
    elif name.startswith("adapter"):
        model = apply_lora(tiny_model(), 2, 4, target_modules=["q_proj", "up_proj"])
        model.name_or_path = "x"
        save_adapter(model, folder)
    elif "token" in name or name.startswith("generation"):
        write_ends(write_tokenizer(folder, "<s> $A </s>", "more"), 1, [1, 2])
        tokens = {"eos_token": "</s>", "bos_token": {"content": "<s>"}, "chat_template": TEMPLATE}
        write_json(folder / "tokenizer_config.json", tokens)
    else:
        write_checkpoint(folder, shard_bytes=20_000 if "index" in name else 10**9)


def mutated_json(content, rng: random.Random) -> str:
    """A value somewhere replaced or removed."""
    node = content
    while True:
        key = rng.choice(list(node if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.2:
            break
        node = node[key]
    if rng.random() < 0.8:
        node[key] = rng.choice(ODD)
    else:
        del node[key]
    return json.dumps(content)


def mutated(content: bytes, name: str, rng: random.Random) -> bytes:
    """JSON, and the header of safetensors, which is JSON, mostly stay readable."""
    if name.endswith(".json") and rng.random() < 0.8:
        return mutated_json(json.loads(content), rng).encode()
    if name.endswith(".safetensors") and rng.random() < 0.6:
        (size,) = struct.unpack("<Q", content[:8])
        header = mutated_json(json.loads(content[8 : 8 + size]), rng).encode()
        return struct.pack("<Q", len(header)) + header + content[8 + size :]
    at = rng.randrange(min(len(content), 9000))
    rest = content[at + 1 :] if rng.random() < 0.5 else b""
    return content[:at] + rng.randbytes(rng.randrange(20)) + rest


@pytest.mark.parametrize("name", KINDS)
def test_mutated_files_are_read_or_refused(name, tmp_path):
    sound, refused = tmp_path / "sound", 0
    write_sound(sound, name)
    KINDS[name](shutil.copytree(sound, tmp_path / "read"))
    for n in range(20):
        tried = shutil.copytree(sound, tmp_path / f"{n}")
        content = mutated((sound / name).read_bytes(), name, random.Random(f"{name} {n}"))
        (tried / name).write_bytes(content)
        try:
            KINDS[name](tried)
        except ValueError as error:
            assert 0 < len(str(error)) < 1500, (n, error)
            refused += 1
    assert refused > 4
