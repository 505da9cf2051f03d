"""Finding and checking weights: the precedence of transformers,
or a message that names cause and way out."""

import json
import os
import stat
from types import SimpleNamespace

import pytest
import torch
from conftest import max_diff, tiny_model, write_checkpoint, write_json
from safetensors.torch import load_file, save_file

from common import read_json
from demo.pretrain import BASE
from hub.files import note_once, resolve_path
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, encode_split, prepare
from lora import apply_lora, save_adapter
from model import load_pretrained, save_pretrained

INPUT_IDS = torch.arange(3, 17).view(2, 7)
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def forget_notes():
    note_once.cache_clear()


def change_weights(path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def transformers_logits(path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(path)(INPUT_IDS).logits


def test_a_whole_file_goes_before_an_index(tmp_path, capsys):
    """As in transformers; the index beside it is said to be left out, once."""
    path = write_checkpoint(tmp_path, seed=1, shard_bytes=20_000)
    shards = {f.name: f.read_bytes() for f in path.glob("model-*")}
    index = (path / INDEX).read_text()
    write_checkpoint(path, seed=2)
    for name, content in shards.items():
        (path / name).write_bytes(content)
    (path / INDEX).write_text(index)

    logits = load_pretrained(path).logits(INPUT_IDS)
    load_pretrained(path)
    assert torch.equal(logits, tiny_model(seed=2).logits(INPUT_IDS))
    assert max_diff(logits, transformers_logits(path)) < 1e-4
    assert capsys.readouterr().out.count(f"{INDEX} beside it is not") == 1


def test_shards_without_an_index_are_named(tmp_path):
    """Their number and the way out, instead of 'not found'."""
    path = write_checkpoint(tmp_path, shard_bytes=20_000)
    count = len(list(path.glob("model-*")))
    (path / INDEX).unlink()
    with pytest.raises(ValueError, match=rf"{count} other safetensors.*download the index"):
        load_pretrained(path)


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        [],
        {},
        "x",
        {"a": 1},
        {"a": None},
        {"a": "../x.safetensors"},
        {"a": "/etc/passwd"},
        {"a": ""},
    ],
)
def test_an_index_without_a_sound_weight_map_is_named(weight_map, tmp_path):
    """Not there, of another kind, or pointing out of the folder: one message with the file."""
    path = write_checkpoint(tmp_path, shard_bytes=20_000)
    write_json(path / INDEX, {} if weight_map is None else {"weight_map": weight_map})
    with pytest.raises(ValueError, match=rf"{INDEX}: (no )?weight_map"):
        load_pretrained(path)


@pytest.mark.parametrize(
    "prefix, cause",
    [
        ("_orig_mod.", "torch.compile"),
        ("module.", "DistributedDataParallel"),
        ("base_model.model.", "merge_and_unload"),
    ],
)
def test_a_prefix_of_all_keys_is_refused_by_its_cause(prefix, cause, tmp_path):
    """Names from inside a wrapper say which wrapper it was."""
    path = write_checkpoint(tmp_path)

    def wrap(tensors):
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    change_weights(path, wrap)
    with pytest.raises(ValueError, match=f"keys begin with '{prefix}', .*{cause}"):
        load_pretrained(path)


def test_weights_of_a_bare_decoder_are_refused_by_their_cause(tmp_path):
    """Keys without `model.` come from a model saved without its head."""
    path = write_checkpoint(tmp_path)

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    change_weights(path, strip)
    with pytest.raises(ValueError, match="lack the prefix 'model.'"):
        load_pretrained(path)


def test_weights_that_are_no_floats_are_refused(tmp_path):
    """Integers are codes of a quantisation, never cast as they are."""
    path = write_checkpoint(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(path, lambda t: t.update({name: t[name].to(torch.int8)}))
    with pytest.raises(ValueError, match=f"{name} is stored as I8"):
        load_pretrained(path)


@pytest.mark.parametrize("family", ["llama3.2", "qwen2.5-tied"])
def test_a_stored_head_beside_a_tied_config_is_used_and_said(family, tmp_path, capsys):
    """Another lm_head than the embedding: logits equal transformers' 5, and saving again unties."""
    path = write_checkpoint(tmp_path, family)
    embedding = "model.embed_tokens.weight"
    change_weights(path, lambda t: t.update({"lm_head.weight": 2 * t[embedding]}))
    model = load_pretrained(path)
    assert "another lm_head.weight: it is used" in capsys.readouterr().out
    assert max_diff(model.logits(INPUT_IDS), 2 * tiny_model(family).logits(INPUT_IDS)) < 1e-4
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) >= 5:
        assert max_diff(model.logits(INPUT_IDS), transformers_logits(path)) < 1e-4


def test_a_stored_copy_of_a_tied_head_stays_tied(tmp_path, capsys):
    """An lm_head that equals the embedding changes nothing and is not worth a word."""
    path = write_checkpoint(tmp_path, "llama3.2")
    embedding = "model.embed_tokens.weight"
    change_weights(path, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    model = load_pretrained(path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert capsys.readouterr().out == ""


def test_an_adapter_given_as_model_is_named(tmp_path):
    """A folder with an adapter alone says which option it belongs to."""
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(ValueError, match="give it as --adapter"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\ufeff[]", "\x00"])
def test_json_that_cannot_be_read_is_one_message(text, tmp_path):
    """Endless nesting and endless numbers included."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: (not valid JSON|expected a JSON object)"):
        read_json(tmp_path / "config.json")


def test_missing_unexpected_and_misshapen_weights_are_named(tmp_path):
    """Every key and shape must fit: the message names the directory or file and the tensor."""
    file = write_checkpoint(tmp_path) / "model.safetensors"
    whole = load_file(file)
    without = {name: t for name, t in whole.items() if name != "model.layers.1.mlp.up_proj.weight"}
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    narrow = {"model.layers.0.mlp.down_proj.weight": torch.zeros(32, 47)}
    for weights, culprit in (
        (without, "model.layers.1.mlp.up_proj.weight"),
        (whole | bias, "model.layers.0.self_attn.q_proj.bias"),
        (whole | narrow, r"model.layers.0.mlp.down_proj.weight.*\(32, 47\).*\(32, 48\)"),
    ):
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=culprit) as error:
            load_pretrained(tmp_path)
        assert str(tmp_path) in str(error.value)


def test_pickled_weights_are_refused_by_name(tmp_path):
    """A directory with pytorch_model.bin alone is refused, with the reason."""
    (write_checkpoint(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*safetensors") as error:
        load_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_truncated_weights_are_named(tmp_path):
    """A safetensors file cut off in its data or in its header is a ValueError that names it."""
    file = write_checkpoint(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    for size in (len(content) - 100, 20, 0):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError) as error:
            load_pretrained(tmp_path)
        assert str(file) in str(error.value)


def test_a_missing_or_incomplete_shard_is_named(tmp_path):
    """A shard that the index lists but that is absent, or lacks its tensor,
    is a ValueError that names it."""
    write_checkpoint(tmp_path, shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = tmp_path / index["weight_map"]["lm_head.weight"]
    weights = load_file(shard)
    save_file({"other": weights.pop("lm_head.weight")}, shard)
    with pytest.raises(ValueError, match="lm_head.weight") as error:
        load_pretrained(tmp_path)
    assert str(shard) in str(error.value)
    shard.unlink()
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path)
    assert str(shard) in str(error.value)


# ------------------------------------------------------------------------ hub names
def test_a_hub_name_downloads_what_is_needed(monkeypatch, tmp_path):
    """Configuration, tokenizer, chat template; weights only where asked for; never a pickle."""
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or tmp_path,
    )
    assert resolve_path("org/model") == resolve_path("org/model", weights=False) == tmp_path
    texts = ["*.json", "*.jinja"]
    assert asked == [("org/model", [*texts, "*.safetensors"]), ("org/model", texts)]


@pytest.mark.parametrize(
    "status, kind",
    [(403, "GatedRepoError"), (404, "RepositoryNotFoundError"), (401, "HfHubHTTPError")],
)
def test_a_refused_hub_name_says_how_to_log_in(status, kind, monkeypatch):
    """Gated, unknown, or an expired token: what to do, without a traceback of the client."""
    from huggingface_hub import errors

    def refuse(*args, **kwargs):
        error = getattr(errors, kind).__new__(getattr(errors, kind))
        Exception.__init__(error, "no")
        error.response = SimpleNamespace(status_code=status)
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ValueError, match="org/model: .*hf auth login.*HF_TOKEN"):
        resolve_path("org/model")


def test_written_files_have_the_permissions_of_any_other(tmp_path):
    """Models, adapters and prepared data, safetensors among them, as the umask says: a service of
    another user may load what was trained."""
    config = DataConfig(planted_users=60, train_size=30, prepared_dir=str(tmp_path / "prepared"))
    mask = os.umask(0o027)
    try:
        save_pretrained(load_pretrained(BASE), tmp_path / "model")
        save_adapter(apply_lora(load_pretrained(BASE), 2, 4), tmp_path / "adapter")
        prepared = prepare(config)
        encode_split(prepared, "train", Tokenizer(BASE), 1024)
    finally:
        os.umask(mask)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.rglob("*")}
    assert {name for name in modes if name.endswith(".safetensors")} > {"model.safetensors"}
    assert {oct(mode) for name, mode in modes.items() if "." in name} == {"0o640"}, modes
    assert {oct(mode) for name, mode in modes.items() if "." not in name} == {"0o750"}, modes
