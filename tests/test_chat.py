"""Chat prompts: ids as transformers makes them, the token that ends a turn, hostile templates,
and a whole run."""

import importlib.util
import json
import shutil
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_json
from launch import TINY, run_train
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer

import eval as evaluation
import recommend
import train
from data import Example, build_tree, encode_examples, render_prompt
from demo.tiny import make_base_model
from hub import chat, render
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, encode_split, prepare
from loaders.movielens import WORDS as MOVIES
from model import load_pretrained

# The shapes of published templates: where they trim, where control tokens and line breaks stand.
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "none" %}
{%- endif %}
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Knowledge ends in 2023\\nIt is " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" }}
    {{- message["content"] | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
QWEN25 = """\
{%- if tools %}
    {{- raise_exception("no tools here") }}
{%- elif messages[0].role != "system" %}
    {{- "<|im_start|>system\\nYou help.<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>" + "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""
QWEN3 = """\
{%- set ns = namespace(last=messages | length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.found and message.role == "user" %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
        {%- set ns.found = true %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set thought = message.content.split("</think>")[0] if "</think>" in message.content %}
        {%- generation %}
        {{- "<|im_start|>assistant\\n" }}
        {%- if loop.index0 > ns.last %}
            {{- "<think>\\n" + (thought or "") + "\\n</think>\\n\\n" }}
        {%- endif %}
        {{- message.content.split("</think>")[-1].lstrip("\\n") + "<|im_end|>\\n" }}
        {%- endgeneration %}
    {%- else %}
        {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- "<think>\\n\\n</think>\\n\\n" }}
    {%- endif %}
{%- endif %}
"""
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are small.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (  # no generation prompt: the space before an answer belongs to the answer
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = """\
{% for message in messages %}
    {% if message["role"] == "user" %}
{{ "<|user|>\n" + message["content"] + eos_token }}
    {% elif message["role"] == "assistant" %}
{{ "<|assistant|>\n" + message["content"] + eos_token }}
    {% endif %}
    {% if loop.last and add_generation_prompt %}
{{ "<|assistant|>" }}
    {% endif %}
{% endfor %}
"""
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
FAMILIES = {  # template, control tokens, the token that ends a turn, variables
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|end_of_text|>", *HEADERS],
        "<|eot_id|>",
        {"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|eot_id|>"},
    ),
    "qwen2.5": (QWEN25, CHATML, "<|im_end|>", {"bos_token": None, "eos_token": "<|im_end|>"}),
    "qwen3": (QWEN3, CHATML, "<|im_end|>", {"bos_token": None, "eos_token": "<|im_end|>"}),
    "smollm2": (
        SMOLLM2,
        CHATML,
        "<|im_end|>",
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    ),
    "zephyr": (ZEPHYR, ["<s>", "</s>"], "</s>", {"bos_token": "<s>", "eos_token": "</s>"}),
    "llama2": (LLAMA2, ["<unk>", "<s>", "</s>"], "</s>", {"bos_token": "<s>", "eos_token": "</s>"}),
}
TITLES = [
    "...And Justice for All", "(500) Days of Summer", "Élite", "'burbs", "12 Monkeys",
    "Alien", "Alien 3", "1984", "2001: A Space Odyssey", "Mr. & Mrs.", "E.T.", "What?",
    "$9.99", "日本", "Answer: no", "| Rating: 5", "M*A*S*H", "M",
    "{{ messages }}", "I'm \"here\" <b>",
]  # fmt: skip
PROMPTS = [
    render_prompt(
        Example(MOVIES, "u", [(t, 4.0) for t in TITLES[n:]], TITLES, 0, [], n)
    )
    for n in range(5)
]  # fmt: skip
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def family_tokenizer(family: str) -> HFTokenizer:
    """A small tokenizer with the family's way of cutting texts and its control tokens."""
    special = FAMILIES[family][1]
    if family == "llama2":
        inner = HFTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        inner.normalizer = normalizers.Sequence(spaces)
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        alphabet, tokens = [], [*special, *(f"<0x{i:02X}>" for i in range(256))]
        cut = pre_tokenizers.Split(Regex("▁+|[:|.\n]"), "merged_with_next")  # in training only
    else:
        inner = HFTokenizer(models.BPE())
        inner.decoder = decoders.ByteLevel()
        alphabet, tokens = pre_tokenizers.ByteLevel.alphabet(), special
        digits = [pre_tokenizers.Digits(individual_digits=True)]
        whole = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        words = [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        cut = pre_tokenizers.Sequence(digits + whole if family == "smollm2" else words)
    inner.pre_tokenizer = cut
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=tokens, show_progress=False
    )
    inner.train_from_iterator(PROMPTS, trainer)
    begin = "<s>" if family == "llama2" else "<|begin_of_text|>"
    if begin in special:
        inner.post_processor = processors.TemplateProcessing(
            f"{begin} $A", special_tokens=[(begin, inner.token_to_id(begin))]
        )
    content = json.loads(inner.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in special]
    if family == "llama2":
        content["pre_tokenizer"] = None
    return HFTokenizer.from_str(json.dumps(content))


def write_base(path: Path, family: str, template=None, **config) -> Path:
    """tokenizer.json, its configuration with the template in it,
    and the first control token as config.json's EOS."""
    path.mkdir(parents=True, exist_ok=True)
    family_tokenizer(family).save(str(path / "tokenizer.json"))
    facts = FAMILIES[family][3] | {"chat_template": template or FAMILIES[family][0]} | config
    write_json(path / "tokenizer_config.json", facts)
    write_json(path / "config.json", {"eos_token_id": 1, "vocab_size": 2000})
    return path


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return {name: write_base(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


@pytest.fixture(scope="module")
def tokenizers(bases) -> dict[str, Tokenizer]:
    return {name: Tokenizer(path, "chat") for name, path in bases.items()}


class Clock(datetime):
    """The day that templates are told, for transformers too."""

    @classmethod
    def now(cls, tz=None):
        return render.TODAY


@pytest.fixture
def peers(bases, monkeypatch):
    """family -> transformers' tokenizer of the same files."""
    transformers = pytest.importorskip("transformers")
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    found = {}
    for name, path in bases.items():
        config = json.loads((path / "tokenizer_config.json").read_text())
        tokens = {k: getattr(v, "get", {"content": v}.get)("content") for k, v in config.items()}
        template = tokens.pop("chat_template")
        found[name] = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(path / "tokenizer.json"), chat_template=template,
            **{k: v for k, v in tokens.items() if v},
        )  # fmt: skip
    return found


# ------------------------------------------------------------------------ ids
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_ids_are_transformers(family, tokenizers, peers):
    """One user message, with generation prompt, thinking off: the same ids for every prompt."""
    for text in (*PROMPTS, "Alien\nAnswer:"):
        expected = peers[family].apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True, enable_thinking=False, return_dict=False,
        )  # fmt: skip
        assert tokenizers[family].encode_prompts([text]) == [expected]


@pytest.mark.parametrize(
    "name", ["llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3", "qwen3_instruct_2507"]
)
def test_published_templates_have_the_ids_of_transformers(name, peers, tmp_path):
    """The models' own templates, where trl, which keeps copies of them, is installed."""
    trl = importlib.util.find_spec("trl")
    file = Path(trl.origin).parent / "chat_templates" / f"{name}.jinja" if trl else tmp_path / name
    if not file.exists():
        pytest.skip("needs a trl that has chat_templates/")
    family = "llama3" if "llama" in name else "qwen2.5"
    tokenizer = Tokenizer(write_base(tmp_path, family, file.read_text()), "chat")
    assert tokenizer.inner.id_to_token(tokenizer.eos_id) == FAMILIES[family][2]
    for text in PROMPTS:
        expected = peers[family].apply_chat_template(
            [{"role": "user", "content": text}], chat_template=file.read_text(),
            add_generation_prompt=True, enable_thinking=False, return_dict=False,
        )  # fmt: skip
        assert tokenizer.encode_prompts([text]) == [expected]


@pytest.mark.parametrize("family", ["llama3", "qwen2.5", "qwen3", "smollm2", "zephyr"])
def test_prompt_and_answer_are_the_dialogue(family, tokenizers, peers):
    """Prompt ids and completion ids in a row begin transformers' rendering of the whole
    dialogue."""
    completions = tokenizers[family].encode_completions(TITLES)
    for title, completion in zip(TITLES, completions, strict=True):
        dialogue = [
            {"role": "user", "content": PROMPTS[0]},
            {"role": "assistant", "content": title},
        ]
        expected = peers[family].apply_chat_template(
            dialogue, enable_thinking=False, return_dict=False
        )
        (prompt,) = tokenizers[family].encode_prompts(PROMPTS[:1])
        ours = prompt + completion
        assert ours == expected[: len(ours)] and len(expected) - len(ours) <= 1  # a line break
        assert tokenizers[family].encode_answered(PROMPTS[:1], [title]) == [ours[:-1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_token_that_ends_a_turn_ends_an_answer(family, tokenizers, bases):
    """It is read off the template, whatever config.json says;
    generated ids with it spell the title."""
    tokenizer, end = tokenizers[family], FAMILIES[family][2]
    assert tokenizer.inner.id_to_token(tokenizer.eos_id) == end
    assert tokenizer.stop_ids == Tokenizer(bases[family]).stop_ids | {tokenizer.eos_id}
    for title, ids in zip(TITLES, tokenizer.encode_completions(TITLES), strict=True):
        assert ids.count(tokenizer.eos_id) == 1 and ids[-1] == tokenizer.eos_id
        assert tokenizer.answer(ids) == title and tokenizer.answer(ids[:-1]) == title


def test_an_end_of_turn_that_no_other_file_names_stops(tmp_path):
    """Instruct models have been published with the base's EOS in all their files."""
    path = write_base(tmp_path, "qwen2.5", eos_token="<|endoftext|>")
    write_json(path / "config.json", {"eos_token_id": 0, "vocab_size": 2000})
    assert Tokenizer(path).stop_ids == {0}
    assert Tokenizer(path, "chat").stop_ids == {0, 2} and Tokenizer(path, "chat").eos_id == 2


def test_an_answer_follows_the_prompt_without_a_space(tokenizers):
    """But for templates that write one before an answer themselves, as Llama 2's does."""
    for family, tokenizer in tokenizers.items():
        (ids,) = tokenizer.encode_completions(["Alien"])
        assert tokenizer.frame.lead == (" " if family == "llama2" else "")
        text = "".join(tokenizer.inner.id_to_token(i) for i in ids[:-1])
        assert text == ("▁Alien" if family == "llama2" else "Alien")


@pytest.mark.parametrize("family, begin", [("llama3", "<|begin_of_text|>"), ("llama2", "<s>")])
def test_a_prompt_begins_once(family, begin, tokenizers):
    """Template and post-processor both have a BOS: one is left."""
    tokenizer = tokenizers[family]
    (ids,) = tokenizer.encode_prompts(PROMPTS[:1])
    assert ids[0] == tokenizer.inner.token_to_id(begin) and ids.count(ids[0]) == 1


def test_a_template_that_knows_the_day_has_the_same_prompts_tomorrow(tokenizers):
    """Ids are part of what a checkpoint is known by."""
    assert "It is 26 Jul 2024\n" in tokenizers["llama3"].frame.before


@pytest.mark.parametrize("title", ["End <|im_end|>", "<|im_start|>system", "<|endoftext|>"])
def test_a_control_token_in_a_title_is_refused(title, tokenizers, bases):
    """In a chat it would end the user's turn; in plain prompts it is text."""
    tokenizer = tokenizers["qwen2.5"]
    for encode in (tokenizer.encode_prompts, tokenizer.encode_completions):
        with pytest.raises(ValueError, match="control token of .*plain"):
            encode([title])
    assert Tokenizer(bases["qwen2.5"]).encode_completions([title])


def test_plain_prompts_know_no_template(bases):
    """A folder with a template gives plain prompts by default; caches of the two are told apart."""
    plain, talking = Tokenizer(bases["qwen2.5"]), Tokenizer(bases["qwen2.5"], "chat")
    assert plain.inner.decode(plain.encode_prompts(PROMPTS[:1])[0]) == PROMPTS[0]
    assert plain.fingerprint != talking.fingerprint


def test_the_template_is_part_of_the_fingerprint(tmp_path):
    other = QWEN25.replace("You help.", "You serve.")
    paths = [write_base(tmp_path / str(n), "qwen2.5", t) for n, t in enumerate((QWEN25, other))]
    one, two = (Tokenizer(path, "chat").fingerprint for path in paths)
    assert one != two
    assert one == Tokenizer(paths[0], "chat").fingerprint


# ------------------------------------------------------------------------ where it stands
def test_named_templates_and_the_file_beside(tmp_path):
    """The one called default is used; chat_template.jinja goes before tokenizer_config.json."""
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": QWEN25}]
    path = write_base(tmp_path, "qwen2.5", named)
    assert "You help." in Tokenizer(path, "chat").frame.before
    (path / "chat_template.jinja").write_text(SMOLLM2)
    assert "You are small." in Tokenizer(path, "chat").frame.before


def test_special_tokens_of_the_older_file(tmp_path):
    """special_tokens_map.json holds them in older folders."""
    path = write_base(tmp_path, "llama2")
    write_json(path / "tokenizer_config.json", {"chat_template": LLAMA2})
    write_json(path / "special_tokens_map.json", FAMILIES["llama2"][3])
    assert Tokenizer(path, "chat").frame.before == "<s>[INST] "


@pytest.mark.parametrize(
    "template, said",
    [
        (None, "no chat template, neither chat_template.jinja nor .* --prompt_format plain"),
        ("", "no chat template"),
        (
            [{"name": "rag", "template": "x"}],
            r"none of its chat templates \(rag\) is called default",
        ),
        ({"default": "x"}, "chat_template must be a text or a list of named ones, got dict"),
        ([{"name": "default", "template": 5}], "got int"),
        ("x" * (chat.TEMPLATE_CHARS + 1), "its chat template has 262,145 characters"),
    ],
)  # fmt: skip
def test_no_usable_template_is_said(template, said, tmp_path):
    path = write_base(tmp_path, "qwen2.5")
    write_json(path / "tokenizer_config.json", {"chat_template": template})
    with pytest.raises(ValueError, match=said):
        Tokenizer(path, "chat")
    assert Tokenizer(path).encode_prompts(["Alien"])


@pytest.mark.parametrize(
    "template, said",
    [
        ("{{ messages[0].content }}{{ messages[0].content }}", "a user's text as it is, once"),
        ("Hello", "a user's text as it is, once"),
        ("{{ messages[0].content | tojson }}", "a user's text as it is, once"),
        ("{{ messages[0].content | escape }}", "a user's text as it is, once"),
        ("{{ messages[0].content | length }} {{ messages[0].content }}", "a user's text as it is"),
        ("{{ messages[0].content }}", "no control token"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no control token"),
    ],
)
def test_a_template_that_changes_the_text_or_ends_no_answer_is_refused(template, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        Tokenizer(write_base(tmp_path, "qwen2.5", template), "chat")


def test_an_end_of_turn_without_an_embedding_is_refused(tmp_path):
    path = write_base(tmp_path, "qwen2.5", eos_token="<|endoftext|>")
    write_json(path / "config.json", {"eos_token_id": 0, "vocab_size": 2})
    with pytest.raises(ValueError, match=r"'<\|im_end\|>'.* is outside the model's vocab_size 2"):
        Tokenizer(path, "chat")


@pytest.mark.parametrize(
    "before, after",
    [(None, [2, 1]), ({"eos_token_id": 2}, [2]), ({"eos_token_id": [0, 2], "top_k": 5}, [2, 0])],
)
def test_a_saved_model_names_the_end_of_a_turn(before, after, tmp_path):
    """First among the ends that were known, those of config.json if there are no others."""
    path = write_base(tmp_path, "qwen2.5")
    if before:
        write_json(path / "generation_config.json", before)
    chat.add_end_of_turn(path, 2)
    written = json.loads((path / "generation_config.json").read_text())
    assert written == (before or {}) | {"eos_token_id": after}


# ------------------------------------------------------------------------ hostile templates
HOSTILE = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "range": "{% for a in range(10 ** 9) %}{% endfor %}",
    "memory": "{% set a = 'x' * (messages | length) * 15 * 10 ** 8 %}",
    "list": "{% set a = messages * 2 * 10 ** 8 %}",
    "padding": "{{ '%1000000000000d' % 1 }}",
    "output": "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "one long text": "{{ 'x' * 10 ** 8 }}",
    "attributes": "{{ messages.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__.items() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "attr filter": "{{ (messages | attr('__class__')).__subclasses__() }}",
    "frame": "{{ (messages | map('upper')).gi_frame.f_back }}",
    "namespace": "{% set ns = namespace() %}{% set ns.__call__ = 1 %}",
    "constructor": "{{ namespace(__html__=1) }}",
    "changes": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "own error": "{{ raise_exception('only systems may speak') }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "nesting": "{{ " + "(" * 30000 + "1" + ")" * 30000 + " }}",
    "syntax": "{% if %}",
    "undefined": "{{ nobody.content }}",
}
SAID = {
    "endless": "needs more than 1 s",
    "power": "needs more than 1 s|memory|OverflowError",
    "range": "OverflowError: Range too big",
    "memory": "more than 1,024 MiB of memory",
    "list": "more than 1,024 MiB of memory",
    "padding": "more than 1,024 MiB of memory|ValueError",
    "output": "writes more than 100,000 characters",
    "one long text": "writes more than 100,000 characters",
    "attributes": "SecurityError",
    "globals": "SecurityError",
    "format": "SecurityError",
    "attr filter": "SecurityError",
    "frame": "SecurityError",
    "namespace": "SecurityError: a namespace cannot hold '__call__'",
    "constructor": "SecurityError: a namespace cannot hold '__html__'",
    "changes": "SecurityError",
    "include": "TypeError: no loader",
    "import": "TypeError: no loader",
    "own error": "TemplateError: only systems may speak",
    "recursion": "RecursionError",
    "nesting": "RecursionError|signal|memory",
    "syntax": "TemplateSyntaxError",
    "undefined": "UndefinedError",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_message(name, tmp_path, monkeypatch):
    """Time, memory, length of the text, and everything outside of the template's variables."""
    slow = name in ("endless", "power")  # the others must not meet this bound on a busy machine
    monkeypatch.setattr(chat, "CPU_SECONDS", 1 if slow else 30)
    path = write_base(tmp_path, "qwen2.5", HOSTILE[name] + QWEN25)
    with pytest.raises(ValueError, match=SAID[name]) as raised:
        Tokenizer(path, "chat")
    assert str(path) in str(raised.value) and len(str(raised.value)) < 800


def test_a_process_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "WALL_SECONDS", 0.001)
    with pytest.raises(ValueError, match=r"was not rendered in 0\.001 s"):
        Tokenizer(write_base(tmp_path, "qwen2.5"), "chat")


def test_the_process_sees_no_secret_and_opens_no_file(monkeypatch, tmp_path):
    """Even outside of the sandbox: no environment, no files, no sockets."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    seen = []
    run = chat.subprocess.run

    def spied(*args, **kwargs):
        seen.append(kwargs["env"])
        return run(*args, **kwargs)

    monkeypatch.setattr(chat.subprocess, "run", spied)
    Tokenizer(write_base(tmp_path, "qwen2.5"), "chat")
    assert seen and all("HF_TOKEN" not in env for env in seen)
    code = (
        "import socket, hub.render as r; r.limit_resources(1)\n"
        "for do in (lambda: open('/etc/passwd'), lambda: open('x', 'w'), socket.socket):\n"
        "    try: do()\n"
        "    except OSError: print('refused')\n"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, cwd=train_root())
    assert done.stdout.split() == ["refused"] * 3, done.stderr


def train_root() -> Path:
    return Path(train.__file__).parent


def test_tojson_escapes_nothing():
    """As in transformers: templates write tool schemas with it, and models were trained on them."""
    template = render.environment().from_string("{{ x | tojson }} {{ x | tojson(indent=1) }}")
    x = {"é": "<a> & 'b'"}
    expected = '{"é": "<a> & \'b\'"} {\n "é": "<a> & \'b\'"\n}'
    assert render.render(template, {"x": x}) == expected


# ---------------------------------------------------------------------- examples, training, answers
DATA = ["--dataset=planted", "--planted_users=150", "--train_size=20", "--test_size=8"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    config = DataConfig(
        dataset="planted", planted_users=150, train_size=20, test_size=8,
        prepared_dir=str(tmp_path_factory.mktemp("prepared")),
    )  # fmt: skip
    return prepare(config)


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared) -> Path:
    """A random model whose tokenizer has room for the control tokens of a chat."""
    path = tmp_path_factory.mktemp("talking") / "base"
    make_base_model(
        path, prepared.splits["train"], hidden_size=64, num_layers=2, vocab_size=500, seed=0
    )
    inner = HFTokenizer.from_file(str(path / "tokenizer.json"))
    inner.normalizer = None  # a space behind every line break would merge with the answer
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    assert inner.get_vocab_size() <= 512  # rows of the embedding
    inner.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(QWEN25)
    return path


def test_prompts_that_are_too_long_lose_history(base, prepared):
    """The frame counts, control tokens stay, and what is left is the longest that fits."""
    tokenizer, examples = Tokenizer(base, "chat"), prepared.splits["test"]
    whole = encode_examples(examples, tokenizer, 4096)
    longest = max(map(len, whole.completions.values()))
    limit = int(np.median([len(p) for p in whole.prompts])) + longest - 15
    short = encode_examples(examples, tokenizer, limit)
    assert 0 < short.num_shortened < len(examples) or short.num_dropped > len(examples)
    for e, ids in enumerate(short.prompts):
        room = limit - max(map(len, short.slots(e, range(20))))
        texts = [render_prompt(examples[e], skip) for skip in range(len(examples[e].history))]
        fitting = [p for p in tokenizer.encode_prompts(texts) if len(p) <= room]
        assert ids.tolist() == fitting[0]


def test_a_boundary_that_merges_is_refused(base, prepared, monkeypatch):
    """The check of prompt and answer as one text has the template in it."""
    tokenizer, examples = Tokenizer(base, "chat"), prepared.splits["test"]
    answered = tokenizer.encode_answered
    monkeypatch.setattr(
        tokenizer, "encode_answered", lambda t, c: [ids[1:] + ids[:1] for ids in answered(t, c)]
    )
    with pytest.raises(ValueError, match=r"merges it with the prompt's final '.*assistant\\n'"):
        encode_examples(examples, tokenizer, 4096)


def test_cached_tokens_of_the_two_formats_are_told_apart(base, prepared):
    """Read back, each is its own."""
    for _ in range(2):  # made, then read
        plain = encode_split(prepared, "test", Tokenizer(base), 1024)
        talking = encode_split(prepared, "test", Tokenizer(base, "chat"), 1024)
        assert len(talking.prompts[0]) > len(plain.prompts[0])
        expected = encode_examples(prepared.splits["test"], Tokenizer(base, "chat"), 1024)
        assert talking.prompts[0].tolist() == expected.prompts[0].tolist()
        assert talking.completions == expected.completions


def test_one_pass_and_generation_write_the_same_answers(base, prepared):
    """Learnt by heart: every answer is the target, and ends with the token that ends a turn."""
    tokenizer, model = Tokenizer(base, "chat"), load_pretrained(base)
    examples = prepared.splits["train"].select(np.arange(4))
    encoded = encode_examples(examples, tokenizer, 1024)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        tree = build_tree(
            [encoded.prompts[e] for e in range(4)],
            [encoded.slots(e, [examples.target[e]]) for e in range(4)],
        )
        loss = -model(tree)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    metrics, records = evaluation.evaluate(model, tokenizer, encoded, "generate")
    assert metrics["hit_ratio@1"] == 1.0 and metrics["one_pass_differs"] == 0
    assert all(r["one_pass"] == r["answer"] and r["ids"][-1] == tokenizer.eos_id for r in records)


def predictions(folder: Path) -> np.ndarray:
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["logps"] for line in lines])


@pytest.fixture(scope="module")
def run(tmp_path_factory, base, prepared):
    """A finished chat run: SFT of all weights, RecPO with an adapter."""
    tmp_path = tmp_path_factory.mktemp("run")
    flags = (f"--model={base}", "--prompt_format=chat", "--val_size=0")
    flags += (*DATA, f"--prepared_dir={prepared.folder.parent}", "--max_steps=2", "--sft_lora_r=0")
    output, metrics = run_train(tmp_path, "talk", *flags)
    assert prepared.hash[:12] in output
    return tmp_path / "talk", output, metrics


def test_a_run_speaks_chat_from_the_prompt_to_the_export(run, base):
    """The printed example shows the template, the reference is exact,
    the whole model takes it along."""
    folder, output, metrics = run
    assert "<|im_start|>user\n" in output and "<|im_start|>assistant\n\nchosen: '" in output
    assert "before the first step: at most 0.0e+00 nats" in output
    assert json.loads((folder / "config.json").read_text())["prompt_format"] == "chat"
    assert (folder / "sft" / "chat_template.jinja").read_text() == QWEN25
    assert metrics.keys() == {"sft", "recpo"}
    end, eos = Tokenizer(base, "chat").eos_id, Tokenizer(base).eos_id
    generation = json.loads((folder / "sft" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [end, eos] and end != eos  # other programs stop there
    assert Tokenizer(folder / "sft").eos_id == eos


def test_evaluation_and_recommendation_agree_with_the_run(run, prepared, in_process, capsys):
    """eval.py --run, --model with --prompt_format chat,
    and recommend.py give the run's log-probs."""
    folder, data = run[0], [*DATA, f"--prepared_dir={prepared.folder.parent}"]
    in_process(evaluation.main, f"--run={folder}", data[-1], "--output_dir=all")
    for stage in ("sft", "recpo"):
        expected = predictions(folder / stage / "eval")
        np.testing.assert_allclose(predictions(Path("all") / stage), expected, atol=1e-4)

    alone = (f"--model={folder / 'sft'}", *data, "--output_dir=alone")
    in_process(evaluation.main, *alone)  # its prompt.json says chat
    expected = predictions(folder / "sft" / "eval")
    np.testing.assert_allclose(predictions(Path("alone/sft")), expected, atol=1e-4)
    (folder / "sft" / "prompt.json").rename("prompt.json")
    in_process(evaluation.main, *alone)
    Path("prompt.json").rename(folder / "sft" / "prompt.json")
    assert np.abs(predictions(Path("alone/sft")) - expected).max() > 1e-2  # plain is another prompt

    templates = prepared.splits["test"].template.tolist()
    e = templates.index(0)  # the words that recommend.py uses
    example = prepared.splits["test"][e]
    history = [{"title": title, "rating": rating} for title, rating in example.history]
    write_json(Path("my.json"), {"history": history, "candidates": example.candidates})
    capsys.readouterr()
    in_process(recommend.main, f"--run={folder}", "--stage=sft", "--request=my.json")
    lines = [line for line in capsys.readouterr().out.splitlines() if "log-prob" in line]
    shown = {line.split(maxsplit=4)[4]: float(line.split(maxsplit=4)[3]) for line in lines}
    expected = dict(zip(example.candidates, expected[e].tolist(), strict=True))
    assert shown == pytest.approx(expected, abs=0.006)


def test_a_run_keeps_its_prompt_format(run, base, in_process, monkeypatch):
    """Going on with plain prompts is refused by name."""
    folder = run[0]
    monkeypatch.setattr(sys, "argv", ["train.py"])
    flags = [*TINY, "--max_steps=2", "--sft_lora_r=0"]
    flags += ["--val_size=0", "--resume=auto", f"--output_dir={folder}", f"--model={base}"]
    with pytest.raises(ValueError, match="other values of prompt_format"):
        in_process(train.main, "--dataset=planted", *flags)


def test_a_base_without_a_template_is_refused(base, in_process, tmp_path):
    """Before anything is trained, with what to do instead."""
    shutil.copytree(base, tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    flags = [*TINY, "--dataset=planted", f"--model={tmp_path / 'mute'}"]
    with pytest.raises(ValueError, match=r"mute: no chat template.*--prompt_format plain"):
        in_process(train.main, *flags, "--prompt_format=chat", "--output_dir=refused")
