"""Finding and checking weights: the precedence of transformers, or one message with the culprit."""

import json
import shutil
from unittest.mock import Mock

import pytest
import torch
from conftest import change_tensors, max_diff, tiny_model, write_checkpoint, write_json
from safetensors.torch import save_file

from hub.files import INDEX, base_fingerprint, resolve_path
from model import load_pretrained

INPUT_IDS = torch.arange(3, 17).view(2, 7)
UP = "model.layers.1.mlp.up_proj.weight"


def transformers_logits(path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(path)(INPUT_IDS).logits


def test_a_whole_file_goes_before_an_index(tmp_path):
    """As in transformers."""
    path = write_checkpoint(tmp_path, seed=1, shard_bytes=20_000)
    shutil.copytree(path, tmp_path / "shards")
    shutil.copytree(tmp_path / "shards", write_checkpoint(path, seed=2), dirs_exist_ok=True)
    logits = load_pretrained(path).logits(INPUT_IDS)
    assert torch.equal(logits, tiny_model(seed=2).logits(INPUT_IDS))
    assert max_diff(logits, transformers_logits(path)) < 1e-4


def wrapped(prefix):
    return lambda t: [t.update({prefix + name: t.pop(name)}) for name in list(t)]


REFUSED = [
    (lambda t: t.pop(UP), rf"{UP} \(found: None"),
    (lambda t: t.update({UP + "s": torch.ones(1)}), rf"{UP}s \(found: \(1,\), needed: None"),
    (lambda t: t.update({UP: torch.ones(47, 32)}), rf"{UP} \(found: \(47, 32\).*\(48, 32\)"),
    (lambda t: t.update({UP: t[UP].to(torch.int8)}), rf"{UP} \(found: stored as I8"),
    (wrapped("_orig_mod."), r"_orig_mod\.lm_head.*torch.compile"),
    (wrapped("base_model.model."), r"base_model\.model\.lm_head.*PEFT"),
]


@pytest.mark.parametrize("change, culprit", REFUSED)
def test_tensors_that_do_not_fit_are_named(change, culprit, tmp_path):
    change_tensors(write_checkpoint(tmp_path) / "model.safetensors", change)
    with pytest.raises(ValueError, match=culprit) as error:
        load_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_files_that_are_not_there_or_cut_off_are_named(tmp_path):
    """An index without a sound map or without shards, shards without it, half a file."""
    path = write_checkpoint(tmp_path, shard_bytes=20_000)
    shard = path / json.loads((path / INDEX).read_text())["weight_map"]["lm_head.weight"]

    def refused(culprit: str, spoil, *args) -> None:
        spoil(*args)
        with pytest.raises(ValueError, match=f"{path}.*{culprit}"):
            load_pretrained(path)

    refused(r"lm_head.weight \(found: None", save_file, {"other": torch.ones(1)}, shard)
    refused(shard.name, shard.write_bytes, b"\x00" * 20)
    refused(shard.name, shard.unlink)
    refused("", write_json, path / INDEX, {"weight_map": {"a": "../x"}})
    refused(f"neither model.safetensors nor {INDEX}", (path / INDEX).unlink)


def test_another_head_beside_a_tied_config(tmp_path, capsys):
    """It is used and said, as in transformers 5."""
    path = write_checkpoint(tmp_path, family := "llama3.2")
    doubled = {"lm_head.weight": 2 * tiny_model(family).lm_head.weight.detach()}
    change_tensors(path / "model.safetensors", lambda t: t.update(doubled))
    model = load_pretrained(path)
    assert "another lm_head.weight is stored" in capsys.readouterr().out
    assert max_diff(model.logits(INPUT_IDS), 2 * tiny_model(family).logits(INPUT_IDS)) < 1e-4
    if int(pytest.importorskip("transformers").__version__.split(".")[0]) >= 5:
        assert max_diff(model.logits(INPUT_IDS), transformers_logits(path)) < 1e-4


def test_the_fingerprint_is_of_every_byte_and_of_no_division(tmp_path):
    """Other rows in the middle, another type or name change it; other files do not."""
    path = write_checkpoint(tmp_path / "one")
    seen = {base_fingerprint(path)}
    assert base_fingerprint(write_checkpoint(tmp_path / "many", shard_bytes=20_000)) in seen
    for change in (
        lambda t: t.update({n: torch.cat([p[:1], p[1:].flip(0)]) for n, p in t.items()}),
        lambda t: t[UP].view(-1)[700:701].add_(1),
        lambda t: t.update({UP: t[UP].to(torch.bfloat16)}),
        lambda t: t.update({UP + "x": t.pop(UP)}),
    ):
        change_tensors(path / "model.safetensors", change)
        assert base_fingerprint(path) not in seen
        seen.add(base_fingerprint(path))


def test_a_hub_name_downloads_what_is_needed_or_is_one_message(monkeypatch, tmp_path):
    """Weights only where asked for; never a pickle. A refusal hands on the library's sentence."""
    from huggingface_hub.errors import GatedRepoError

    download = Mock(return_value=tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_path("org/model") == resolve_path("org/model", weights=False) == tmp_path
    patterns = [call.kwargs["allow_patterns"] for call in download.call_args_list]
    assert patterns == [["*.json", "*.jinja", "*.safetensors"], ["*.json", "*.jinja"]]
    download.side_effect = GatedRepoError.__new__(GatedRepoError)
    Exception.__init__(download.side_effect, "ask on its page, log in")
    for name, culprit in (("org/model", ".*log in"), ("./org/model", "")):
        with pytest.raises(ValueError, match=f"org/model: no such directory{culprit}"):
            resolve_path(name)
