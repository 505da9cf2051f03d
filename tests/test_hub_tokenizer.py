"""Which ids begin and end a text, what follows a prompt, and what an answer is."""

import re
from pathlib import Path

import pytest
from conftest import write_json
from families import NASTY, prompt_of, spelling_bpe
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import processors

from hub.tokenizer import Tokenizer

SPECIAL = ["<s>", "</s>", "<|turn|>"]  # ids 0, 1, 2


def write_tokenizer(path: Path, template: str | None = None, added: str | None = None) -> Path:
    """A byte-level tokenizer; `template` in the post-processor's language, `added` a token more."""
    inner = spelling_bpe(SPECIAL)
    if template:
        used = [(token, i) for i, token in enumerate(SPECIAL) if token in template]
        inner.post_processor = processors.TemplateProcessing(template, special_tokens=used)
    if added:
        inner.add_tokens([added])
    path.mkdir(parents=True, exist_ok=True)
    inner.save(str(path / "tokenizer.json"))
    return path


def write_ends(path: Path, config=None, generation=None, tokenizer=None, **sizes) -> Path:
    write_json(path / "config.json", {"vocab_size": 400, "eos_token_id": config} | sizes)
    write_json(path / "generation_config.json", {"eos_token_id": generation})
    write_json(path / "tokenizer_config.json", {"eos_token": tokenizer})
    return path


def test_bos_is_what_stands_first_and_ends_nothing(tmp_path):
    """A token that is appended is no BOS, nor is one that ends a text; two are one."""
    begun = ("<s> $A", "<s> $A </s>", "<s> <s> $A")
    for template in (*begun, None, "$A </s>", "</s> $A", "</s> $A </s>"):
        path = write_ends(write_tokenizer(tmp_path, template), config=1)
        assert Tokenizer(path).bos_ids == ([0] if template in begun else [])


@pytest.mark.parametrize(
    "ends, eos_id, stop_ids, said",
    [
        ({"config": 5, "generation": 1, "tokenizer": "</s>"}, 1, {1}, r"'config.json': \[5\]"),
        ({"config": 2, "generation": 1}, 1, {1, 2}, r"'config.json': \[2\]"),
        ({"config": 1, "generation": [2, 1], "tokenizer": "</s>"}, 1, {1, 2}, ""),
        ({"config": [1, 2], "generation": [1, 2], "tokenizer": "<|turn|>"}, 2, {1, 2}, ""),
        ({"config": 1, "generation": 1, "tokenizer": {"content": "</s>"}}, 1, {1}, ""),
        ({"config": 5}, 5, {5}, ""),
        ({"generation": 2}, 2, {2}, ""),
        ({"tokenizer": "</s>"}, 1, {1}, ""),
        ({"config": 1, "tokenizer": "<gone>"}, 1, {1}, "'<gone>' is not in tokenizer.json"),
    ],
)
def test_files_that_name_the_end_agree_or_are_said(ends, eos_id, stop_ids, said, tmp_path, capsys):
    """What all hold is trained on, else generation_config's, the tokenizer's, then config's."""
    tokenizer = Tokenizer(write_ends(write_tokenizer(tmp_path), **ends))
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (eos_id, stop_ids)
    out = capsys.readouterr().out
    assert ("note:" in out) == bool(said) and re.search(said, out)


def test_what_cannot_be_used_is_named(tmp_path):
    """No EOS; an end that is no id or has no row; a token without a row; no file."""
    file = write_tokenizer(tmp_path, added="Solaris") / "tokenizer.json"
    size = HFTokenizer.from_file(str(file)).get_vocab_size()

    def refused(culprit: str, **ends) -> None:
        with pytest.raises(ValueError, match=culprit):
            Tokenizer(write_ends(tmp_path, **ends))

    refused("no end token")
    for eos in (-1, 400, "1", True, [1, -1]):
        refused(r"/config\.json: end token", config=eos)
        refused(r"generation_config\.json: end token", config=1, generation=eos)
    refused(f"end token {size - 1} is not one of", tokenizer="Solaris", vocab_size=size - 1)
    tokenizer = Tokenizer(write_ends(tmp_path, config=1, vocab_size=size - 1))
    assert tokenizer.encode_completions(["Alien"])
    with pytest.raises(ValueError, match=rf"token {size - 1} 'Solaris'.*vocab_size {size - 1}"):
        tokenizer.encode_completions(["Solaris"])
    file.write_text('{"version": "1.0"}')
    refused(r"tokenizer\.json: not a readable", config=1)
    file.unlink()
    refused(r"tokenizer\.json: not a readable", config=1)


# ------------------------------------------------------------------------ three families
def test_prompt_and_completion_make_the_joint_encoding_of_the_file(family, tokenizer, folders):
    """Prompts begin as the tokenizer's default (Llama's BOS once, Qwen's none)."""
    inner = HFTokenizer.from_file(str(folders[family] / "tokenizer.json"))
    bos = {"llama3": "<|begin_of_text|>", "qwen": None, "llama2": "<s>"}[family]
    assert tokenizer.bos_ids == ([inner.token_to_id(bos)] if bos else [])
    for title, completion in zip(NASTY, tokenizer.encode_completions(NASTY), strict=True):
        prompt = prompt_of([title, "Alien 3"])
        prompt_ids, joint = tokenizer.encode_prompts([prompt, f"{prompt} {title}"])
        assert prompt_ids + completion[:-1] == joint, title
        assert completion[-1] == tokenizer.eos_id not in joint
        assert tokenizer.answer(completion) == title
        assert sum(joint.count(i) for i in range(3)) == (1 if bos else 0)  # the special tokens
        assert not set(completion[:-1]) & set(range(3)), title  # a control token is spelled out
        if "<" not in title:  # to the file itself a special token is one in a title, too
            assert prompt_ids == inner.encode(prompt).ids
            assert joint == inner.encode(f"{prompt} {title}").ids, title


def test_an_answer_ends_at_the_first_stop_or_line_break(tokenizer):
    """newline_ids are the tokens of optional spaces and a line break."""
    newlines = tokenizer.newline_ids()
    (a,) = tokenizer.encode(["a"])
    spelled = {i: tokenizer.inner.decode([*a, i])[1:] for i in range(900)}
    assert newlines == {i for i, t in spelled.items() if t.lstrip(" ")[:1] in ("\n", "\r")}
    assert newlines and not newlines & tokenizer.stop_ids
    ids, more = tokenizer.encode_completions(["Alien 3", "M"])
    for end in sorted(tokenizer.stop_ids | newlines):
        assert tokenizer.answer(ids[:-1] + [end]) == "Alien 3", end
        assert tokenizer.answer(ids[:-1] + [end] + more) == "Alien 3", end
        assert tokenizer.answer([end] + more) == "", end
    assert tokenizer.answer(ids[:-1]) == "Alien 3" and tokenizer.answer([]) == ""
