"""Finding and checking weights: the precedence of transformers, or one message with the culprit."""

import json
import os
import stat

import pytest
import torch
from conftest import change_tensors, max_diff, tiny_model, write_checkpoint, write_json
from safetensors.torch import save_file

from demo.pretrain import BASE
from hub.files import INDEX, base_fingerprint, resolve_path
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, encode_split, prepare
from lora import apply_lora, save_adapter
from model import load_pretrained, save_pretrained

INPUT_IDS = torch.arange(3, 17).view(2, 7)
EMBEDDING, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"


def change_weights(path, change) -> None:
    change_tensors(path / "model.safetensors", change)


def transformers_logits(path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(path)(INPUT_IDS).logits


def test_a_whole_file_goes_before_an_index(tmp_path):
    """As in transformers, whatever the shards hold that the index names."""
    path = write_checkpoint(tmp_path, seed=1, shard_bytes=20_000)
    shards = {file: file.read_bytes() for file in path.glob("model[-.]*")}
    write_checkpoint(path, seed=2)
    for file, content in shards.items():
        file.write_bytes(content)
    logits = load_pretrained(path).logits(INPUT_IDS)
    assert torch.equal(logits, tiny_model(seed=2).logits(INPUT_IDS))
    assert max_diff(logits, transformers_logits(path)) < 1e-4


def wrapped(prefix):
    return lambda t: [t.update({prefix + name: t.pop(name)}) for name in list(t)]


REFUSED = [
    (lambda t: t.pop(UP), rf"{UP} \(there: None"),
    (lambda t: t.update({UP + "s": torch.ones(1)}), rf"{UP}s \(there: \(1,\), needed: None"),
    (lambda t: t.update({UP: torch.ones(47, 32)}), rf"{UP} \(there: \(47, 32\).*\(48, 32\)"),
    (lambda t: t.update({UP: t[UP].to(torch.int8)}), rf"{UP} \(there: stored as I8"),
    (wrapped("_orig_mod."), r"_orig_mod\.lm_head.*torch.compile"),
    (wrapped("base_model.model."), r"base_model\.model\.lm_head.*PEFT"),
]


@pytest.mark.parametrize("change, culprit", REFUSED)
def test_tensors_that_do_not_fit_are_named(change, culprit, tmp_path):
    """Every key, shape and type must fit, both ways."""
    change_weights(write_checkpoint(tmp_path), change)
    with pytest.raises(ValueError, match=culprit) as error:
        load_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("weight_map", [None, [], "x", {}, {"a": 1}, {"a": "../x"}, {"a": ""}])
def test_an_index_without_a_sound_weight_map_is_named(weight_map, tmp_path):
    """Not there, of another kind, or pointing to no file of the folder."""
    write_checkpoint(tmp_path, shard_bytes=20_000)
    write_json(tmp_path / INDEX, {} if weight_map is None else {"weight_map": weight_map})
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_pretrained(tmp_path)


def test_files_that_are_not_there_or_cut_off_are_named(tmp_path):
    """Shards without an index, a shard that is missing or lacks its tensor, half a file."""
    path = write_checkpoint(tmp_path / "sharded", shard_bytes=20_000)
    shard = path / json.loads((path / INDEX).read_text())["weight_map"]["lm_head.weight"]
    save_file({"other": torch.ones(1)}, shard)
    with pytest.raises(ValueError, match=rf"{path}: .*lm_head.weight \(there: None"):
        load_pretrained(path)
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        load_pretrained(path)
    (path / INDEX).unlink()
    with pytest.raises(ValueError, match=f"neither model.safetensors nor {INDEX}"):
        load_pretrained(path)
    file = write_checkpoint(tmp_path / "whole") / "model.safetensors"
    content = file.read_bytes()
    for size in (len(content) - 100, 20, 0):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match=str(file)):
            load_pretrained(file.parent)


@pytest.mark.parametrize("family", ["llama3.2", "qwen2.5-tied"])
def test_a_stored_head_beside_a_tied_config(family, tmp_path, capsys):
    """A copy of the embedding stays tied; another head is used and said, as in transformers 5."""
    path = write_checkpoint(tmp_path, family)
    change_weights(path, lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    model = load_pretrained(path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "note" not in capsys.readouterr().out
    change_weights(path, lambda t: t.update({"lm_head.weight": 2 * t[EMBEDDING]}))
    model = load_pretrained(path)
    assert "another lm_head.weight is stored" in capsys.readouterr().out
    assert max_diff(model.logits(INPUT_IDS), 2 * tiny_model(family).logits(INPUT_IDS)) < 1e-4
    if int(pytest.importorskip("transformers").__version__.split(".")[0]) >= 5:
        assert max_diff(model.logits(INPUT_IDS), transformers_logits(path)) < 1e-4


def test_the_fingerprint_is_of_every_byte_and_of_no_division(tmp_path):
    """Other rows in the middle, another type or name change it; other files do not."""
    path = write_checkpoint(tmp_path / "one")
    first = base_fingerprint(path)
    assert base_fingerprint(write_checkpoint(tmp_path / "many", shard_bytes=20_000)) == first
    changes = [
        lambda t: t.update({n: torch.cat([p[:1], p[1:].flip(0)]) for n, p in t.items()}),
        lambda t: t[UP].view(-1)[700:701].add_(1),
        lambda t: t.update({UP: t[UP].to(torch.bfloat16)}),
        lambda t: t.update({UP + "x": t.pop(UP)}),
    ]
    seen = {first}
    for change in changes:
        change_weights(path, change)
        seen.add(base_fingerprint(path))
    assert len(seen) == 1 + len(changes)


def test_a_hub_name_downloads_what_is_needed(monkeypatch, tmp_path):
    """Configuration, tokenizer, template; weights only where asked for; never a pickle."""
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_path("org/model") == resolve_path("org/model", weights=False) == tmp_path
    texts = ["*.json", "*.jinja"]
    assert asked == [("org/model", [*texts, "*.safetensors"]), ("org/model", texts)]


@pytest.mark.parametrize("kind", ["GatedRepoError", "HfHubHTTPError", "LocalEntryNotFoundError"])
def test_a_hub_that_refuses_or_is_not_there_is_one_message(kind, monkeypatch):
    """It names what was asked for, and hands on the library's sentence of what to do."""
    from huggingface_hub import errors

    def refuse(*args, **kwargs):
        error = getattr(errors, kind).__new__(getattr(errors, kind))
        Exception.__init__(error, "ask on its page, log in")
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ValueError, match="org/model: no such directory.*log in"):
        resolve_path("org/model")
    with pytest.raises(ValueError, match="no such directory"):
        resolve_path("./org/model")


def test_written_files_have_the_permissions_of_any_other(tmp_path):
    """As the umask says: a service of another user may load what was trained."""
    config = DataConfig(planted_users=60, train_size=30, prepared_dir=str(tmp_path / "prepared"))
    mask = os.umask(0o027)
    try:
        save_pretrained(load_pretrained(BASE), tmp_path / "model")
        save_adapter(apply_lora(load_pretrained(BASE), 2, 4), tmp_path / "adapter")
        encode_split(prepare(config), "train", Tokenizer(BASE), 1024)
    finally:
        os.umask(mask)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.rglob("*")}
    assert {name for name in modes if name.endswith(".safetensors")} > {"model.safetensors"}
    assert {oct(mode) for name, mode in modes.items() if "." in name} == {"0o640"}, modes
    assert {oct(mode) for name, mode in modes.items() if "." not in name} == {"0o750"}, modes
