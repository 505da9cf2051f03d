"""Which ids begin and end a text:
range, agreement of the files that name them, and what the embedding holds."""

import json
from pathlib import Path

import pytest
from conftest import write_json
from families import END_OF_TEXT, NASTY
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from data import Example, render_prompt
from hub.files import note_once
from hub.tokenizer import Tokenizer
from loaders.movielens import WORDS as MOVIES

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
    """A token that the post-processor appends is no BOS, nor is one that ends a text;
    two are one."""
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
    """What all files hold is trained on, else generation_config and tokenizer go before config;
    a note names who differs."""
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


# ------------------------------------------------------------------------ three families
def plain(folder: Path) -> HFTokenizer:
    """The file itself, with none of our policy around it."""
    return HFTokenizer.from_file(str(folder / "tokenizer.json"))


def test_bos_is_the_tokenizers_own(family, tokenizer, folders):
    """Llama prompts begin with one BOS, Qwen's with none:
    the same ids as the tokenizer's default for harmless text."""
    inner = plain(folders[family])
    bos = {"llama3": "<|begin_of_text|>", "qwen": None, "llama2": "<s>"}[family]
    assert tokenizer.bos_ids == ([inner.token_to_id(bos)] if bos else [])
    prompt = "A user watched Alien 3 | Rating: 4\nAnswer:"
    (ids,) = tokenizer.encode_prompts([prompt])
    assert ids == inner.encode(prompt).ids
    # ids 0 to 2 are the special tokens
    assert sum(ids.count(i) for i in range(3)) == (1 if bos else 0)


@pytest.mark.parametrize("title", NASTY)
def test_prompt_and_completion_make_the_joint_encoding(title, tokenizer):
    """Prompt ids + completion ids are what the tokenizer makes of the whole text,
    and the completion ends in EOS."""
    prompt = render_prompt(Example(MOVIES, "u", [(title, 4.0)], [title, "Alien 3"], 0, [], 0))
    (prompt_ids,), (joint,) = (
        tokenizer.encode_prompts([prompt]),
        tokenizer.encode_prompts([f"{prompt} {title}"]),
    )
    (completion,) = tokenizer.encode_completions([title])
    assert prompt_ids + completion[:-1] == joint
    assert (
        completion[-1] == tokenizer.eos_id and tokenizer.eos_id not in prompt_ids + completion[:-1]
    )


def test_joint_encoding_is_that_of_the_file(family, tokenizer, folders):
    """For titles without special tokens,
    prompt ids + completion ids equal the plain tokenizer's default encoding."""
    inner = plain(folders[family])
    for title in NASTY:
        if "<" not in title:
            (prompt,), (completion,) = (
                tokenizer.encode_prompts(["Alien\nAnswer:"]),
                tokenizer.encode_completions([title]),
            )
            assert prompt + completion[:-1] == inner.encode(f"Alien\nAnswer: {title}").ids, title


def test_special_tokens_in_titles_stay_text(family, tokenizer, folders):
    """A title that spells a control token is spelled out,
    so that it neither ends an answer nor starts a text."""
    inner = plain(folders[family])
    specials = [token["content"] for token in json.loads(inner.to_str())["added_tokens"]]
    assert END_OF_TEXT[family] in specials
    for special in specials:
        title = f"Say {special} twice"
        ids = (
            tokenizer.encode_completions([title])[0][:-1]
            + tokenizer.encode_prompts([title])[0][len(tokenizer.bos_ids) :]
        )
        assert not {inner.token_to_id(s) for s in specials} & set(ids)
        assert tokenizer.answer(tokenizer.encode_completions([title])[0]) == title


def test_answers_read_back_as_titles(tokenizer):
    """What a completion's ids spell, up to EOS, is the title."""
    for title, ids in zip(NASTY, tokenizer.encode_completions(NASTY), strict=True):
        assert tokenizer.answer(ids) == title


def test_saved_truncation_and_padding_are_ignored(family, folders, tokenizer, tmp_path):
    """A tokenizer.json saved with truncation and padding switched on encodes as without."""
    inner = plain(folders[family])
    inner.enable_truncation(8)
    inner.enable_padding(length=64)
    inner.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "config.json", {"eos_token_id": 2})
    texts = ["Alien", "a long text " * 30]
    assert Tokenizer(tmp_path).encode_prompts(texts) == tokenizer.encode_prompts(texts)
    assert Tokenizer(tmp_path).bos_ids == tokenizer.bos_ids


OLD_EOS = '{"eos_token": {"content": "<|end_of_text|>", "lstrip": false}}'


@pytest.mark.parametrize(
    "files, eos_id, stop_ids",
    [
        ({"config.json": '{"eos_token_id": 1}'}, 1, {1}),
        ({"config.json": '{"eos_token_id": [1, 2]}'}, 1, {1, 2}),
        (
            {
                "config.json": '{"eos_token_id": 1}',
                "generation_config.json": '{"eos_token_id": [2, 1, 300]}',
            },
            1,
            {1, 2, 300},
        ),
        (
            {
                "config.json": '{"eos_token_id": 2}',
                "generation_config.json": '{"eos_token_id": 1,}',
            },
            2,
            {2},
        ),
        (
            {
                "config.json": '{"eos_token_id": null}',
                "generation_config.json": '{"eos_token_id": 2}',
            },
            2,
            {2},
        ),
        ({"config.json": "{}", "tokenizer_config.json": '{"eos_token": "<|eot_id|>"}'}, 2, {2}),
        ({"tokenizer_config.json": OLD_EOS}, 1, {1}),
        (
            {
                "config.json": '{"eos_token_id": 1}',
                "tokenizer_config.json": '{"eos_token": "<|eot_id|>"}',
            },
            2,
            {1, 2},
        ),
        ({"config.json": '{"eos_token_id": 0}'}, 0, {0}),
    ],
)
def test_eos_and_stop_ids_come_from_the_configs(files, eos_id, stop_ids, folders, tmp_path):
    """What all sources hold is trained on, else generation_config's, tokenizer's, config's;
    others stop."""
    (tmp_path / "tokenizer.json").write_bytes((folders["llama3"] / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (eos_id, stop_ids)
    assert all(type(i) is int for i in tokenizer.stop_ids)


@pytest.mark.parametrize(
    "files", [{}, {"tokenizer_config.json": '{"eos_token": "<nowhere>"}'}, {"config.json": "{}"}]
)
def test_no_eos_is_an_error(files, folders, tmp_path):
    """Without any EOS the folder is refused, and the message says where one was looked for."""
    (tmp_path / "tokenizer.json").write_bytes((folders["llama3"] / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="no eos_token_id in config.json.*tokenizer_config.json"):
        Tokenizer(tmp_path)


def test_unreadable_tokenizers_are_named(tmp_path):
    """A folder without tokenizer.json, and one that does not parse, are one message each."""
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable tokenizer"):
        Tokenizer(tmp_path)


def test_newline_ids_are_spaces_and_a_line_break(tokenizer):
    """Exactly the tokens that spell optional spaces and then a line break,
    the byte itself among them."""
    found = tokenizer.newline_ids()
    assert {tokenizer.encode(["a\nb"])[0][-2], tokenizer.encode(["a\rb"])[0][-2]} <= found
    texts = {
        i: tokenizer.inner.decode(tokenizer.encode(["a"])[0] + [i])[1:]
        for i in range(tokenizer.inner.get_vocab_size())
    }
    assert found == {i for i, text in texts.items() if text.lstrip(" ")[:1] in ("\n", "\r")}
    assert not found & tokenizer.stop_ids


def test_an_answer_ends_at_the_first_stop_or_line_break(tokenizer):
    """Nothing behind a stop id or a line-break token changes the answer, nor is it part of it."""
    (ids,) = tokenizer.encode_completions(["Alien 3"])
    (more,) = tokenizer.encode_completions(["Space: 1999"])
    for end in sorted(tokenizer.stop_ids | tokenizer.newline_ids()):
        assert tokenizer.answer(ids[:-1] + [end]) == "Alien 3", end
        assert tokenizer.answer(ids[:-1] + [end] + more) == "Alien 3", end
        assert tokenizer.answer([end] + more) == "", end
    assert tokenizer.answer(ids[:-1]) == "Alien 3" and tokenizer.answer([]) == ""
