"""Which ids begin and end a text: range, agreement of the files that name them, and what the embedding holds."""

import json
from pathlib import Path

import pytest
from conftest import write_json
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from common import note_once
from hub.tokenizer import Tokenizer

SPECIAL = ["<s>", "</s>", "<|turn|>"]  # ids 0, 1, 2


@pytest.fixture(autouse=True)
def forget_notes():
    note_once.cache_clear()


def write_tokenizer(path: Path, template: str | None = None, added: str | None = None) -> Path:
    """A byte-level tokenizer; `template` in the post-processor's language, `added` a token more."""
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["Answer: Alien"], trainer)
    if template:
        used = [(token, i) for i, token in enumerate(SPECIAL) if token in template]
        inner.post_processor = processors.TemplateProcessing(template, special_tokens=used)
    if added:
        inner.add_tokens([added])
    path.mkdir(parents=True, exist_ok=True)
    inner.save(str(path / "tokenizer.json"))
    return path


def write_ends(path: Path, config=None, generation=None, tokenizer=None, vocab_size=400) -> Path:
    write_json(path / "config.json", {"vocab_size": vocab_size, "eos_token_id": config})
    write_json(path / "generation_config.json", {"eos_token_id": generation})
    write_json(path / "tokenizer_config.json", {"eos_token": tokenizer})
    return path


@pytest.mark.parametrize(
    "template, bos_ids",
    [
        (None, []),
        ("<s> $A", [0]),
        ("$A </s>", []),
        ("<s> $A </s>", [0]),
        ("<s> <s> $A", [0]),
        ("</s> $A", []),
        ("</s> $A </s>", []),
    ],
)
def test_bos_is_what_stands_first_and_ends_nothing(template, bos_ids, tmp_path):
    """A token that the post-processor appends is no BOS, nor is one that ends a text; two are one."""
    path = write_ends(write_tokenizer(tmp_path, template), config=1)
    assert Tokenizer(path).bos_ids == bos_ids


@pytest.mark.parametrize(
    "ends, eos_id, stop_ids, said",
    [
        ({"config": 5, "generation": 1, "tokenizer": "</s>"}, 1, {1}, "config.json says 5"),
        ({"config": 5, "tokenizer": "</s>"}, 1, {1}, "config.json says 5"),
        ({"config": 2, "generation": 1}, 1, {1, 2}, "config.json says 2"),
        ({"config": 1, "generation": [2, 1], "tokenizer": "</s>"}, 1, {1, 2}, ""),
        ({"config": [1, 2], "generation": [1, 2], "tokenizer": "<|turn|>"}, 2, {1, 2}, ""),
        ({"config": 1, "generation": 1, "tokenizer": "</s>"}, 1, {1}, ""),
        ({"config": 5}, 5, {5}, ""),
        ({"config": 1, "tokenizer": "<gone>"}, 1, {1}, "'<gone>' is not in tokenizer.json"),
    ],
)
def test_sources_of_the_end_token_agree_or_are_said(ends, eos_id, stop_ids, said, tmp_path, capsys):
    """What all files hold is trained on, else generation_config and tokenizer go before config; a note names who differs."""
    tokenizer = Tokenizer(write_ends(write_tokenizer(tmp_path), **ends))
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (eos_id, stop_ids)
    out = capsys.readouterr().out
    assert said in out and ("note:" in out) == bool(said)


@pytest.mark.parametrize(
    "eos", [-1, 400, 10**30, "1", 1.0, True, [1, -1], [[1]], {"id": 1}, [None]]
)
@pytest.mark.parametrize("source", ["config", "generation"])
def test_an_end_token_outside_the_vocabulary_is_refused(eos, source, tmp_path):
    """Whichever file names it: one message with the file and the value."""
    others = {"config": 1, "generation": 1} | {source: eos}
    path = write_ends(write_tokenizer(tmp_path), **others)
    with pytest.raises(ValueError, match=r"config\.json: (end token|eos_token_id)"):
        Tokenizer(path)


def test_an_end_token_without_an_embedding_is_refused(tmp_path):
    """A tokenizer that was extended beyond the model's embedding is one message before training."""
    path = write_tokenizer(tmp_path, added="<|done|>")
    size = HFTokenizer.from_file(str(path / "tokenizer.json")).get_vocab_size()
    write_ends(path, tokenizer="<|done|>", vocab_size=size - 1)
    with pytest.raises(ValueError, match=f"end token {size - 1} is outside the vocabulary"):
        Tokenizer(path)


def test_a_text_with_a_token_that_the_embedding_lacks_is_refused(tmp_path):
    """Only a text that needs the token is refused, by token and text, when it is encoded."""
    path = write_tokenizer(tmp_path, added="Solaris")
    size = HFTokenizer.from_file(str(path / "tokenizer.json")).get_vocab_size()
    tokenizer = Tokenizer(write_ends(path, config=1, vocab_size=size - 1))
    assert tokenizer.encode_completions(["Alien"])
    with pytest.raises(ValueError, match=rf"token {size - 1} 'Solaris'.*vocab_size {size - 1}"):
        tokenizer.encode_completions(["Solaris"])
    assert Tokenizer(write_ends(path, config=1)).encode_completions(["Solaris"])


def test_an_unreadable_optional_file_is_said(tmp_path, capsys):
    """generation_config.json has been shipped as invalid JSON: it is left out, with a note."""
    path = write_ends(write_tokenizer(tmp_path), config=1)
    (path / "generation_config.json").write_text('{"eos_token_id": 2,}')
    assert Tokenizer(path).eos_id == 1
    assert "generation_config.json: not valid JSON" in capsys.readouterr().out


def test_files_with_a_byte_order_mark_are_read(tmp_path):
    """Windows editors put one in front of JSON."""
    path = write_ends(write_tokenizer(tmp_path), config=2)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        text = (path / name).read_text()
        (path / name).write_text(text, encoding="utf-8-sig")
    assert Tokenizer(path).eos_id == 2


def test_an_odd_eos_token_is_named(tmp_path):
    """eos_token is a text or an object with one."""
    path = write_ends(write_tokenizer(tmp_path), config=1)
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": 1}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: eos_token must be a text"):
        Tokenizer(path)
