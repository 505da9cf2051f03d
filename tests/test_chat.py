"""Chat prompts: ids as transformers makes them, the template's own dialogue, and a whole run."""

import importlib.util
import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_json
from families import NASTY, byte_level, llama2_style, make_base_model, prompt_of
from launch import ROOT, TINY, run_train
from tokenizers import Tokenizer as HFTokenizer

import eval as evaluation
import recommend
import train
from data import build_tree, encode_examples, render_prompt
from hub import chat
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, prepare
from loaders.planted import DEFAULTS
from model import load_pretrained

# The shapes of published templates: where they trim, where control tokens and line breaks stand.
TEMPLATES = {f.stem: f.read_text() for f in (ROOT / "tests/recorded/templates").glob("*.jinja")}
QWEN25, SMOLLM2 = TEMPLATES["qwen2.5"], TEMPLATES["smollm2"]
IM_END = {"bos_token": None, "eos_token": "<|im_end|>"}
END_OF_TEXT = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
SENTENCE = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA3_TOKENS = {"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|eot_id|>"}
FAMILIES = {  # template -> tokenizer, the token that ends a turn, variables
    "llama3": ("llama3", "<|eot_id|>", LLAMA3_TOKENS),
    "qwen2.5": ("qwen", "<|im_end|>", IM_END),
    "qwen3": ("qwen", "<|im_end|>", IM_END),
    "smollm2": ("qwen", "<|im_end|>", IM_END | {"bos_token": "<|im_start|>"}),
    "zephyr": ("zephyr", "</s>", SENTENCE),
    "llama2": ("llama2", "</s>", SENTENCE),  # the space before an answer belongs to the answer
    "r1": ("qwen", "<|endoftext|>", END_OF_TEXT),  # opens a block that its dialogues never have
    "thinking": ("qwen", "<|im_end|>", END_OF_TEXT),  # its dialogues close the block
    "no-header": ("qwen", "<|im_end|>", END_OF_TEXT),  # it knows no generation prompt at all
}
OWN_PROMPTS = ["r1", "thinking", "no-header"]  # those that end as their dialogues go on
CONTROLS = {"llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]}
CONTROLS |= {"zephyr": ["<s>", "</s>"]}
TITLES = [title for title in NASTY if "<" not in title and "  " not in title]
TITLES += ["M*A*S*H", "{{ messages }}", 'I\'m "here" <b>']
PROMPTS = [prompt_of(TITLES[n:], n) for n in range(5)]


def write_base(path: Path, family: str, template=None, **config) -> Path:
    """A tokenizer, its configuration with the template in it, and another EOS in config.json."""
    kind, _, tokens = FAMILIES[family]
    tokens = tokens | {"chat_template": template or TEMPLATES[family]} | config
    write_json(path / "tokenizer_config.json", tokens)
    write_json(path / "config.json", {"eos_token_id": 1, "vocab_size": 2000})
    inner = llama2_style() if kind == "llama2" else byte_level(kind.replace("zephyr", "qwen"))
    inner.add_special_tokens(CONTROLS.get(kind, []))
    inner.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return {name: write_base(tmp_path_factory.mktemp("base"), name) for name in FAMILIES}


@pytest.fixture(scope="module")
def tokenizers(bases) -> dict[str, Tokenizer]:
    return {name: Tokenizer(path, "chat") for name, path in bases.items()}


class Clock(datetime):
    """The day that templates are told, for transformers too."""

    @classmethod
    def now(cls, tz=None):
        return chat.TODAY


@pytest.fixture
def their_ids(bases, monkeypatch):
    """transformers' ids of a dialogue, by family."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)

    def ids(family: str, *texts: str, **options) -> list[int]:
        template, tokens = TEMPLATES[family], FAMILIES[family][2]
        plain = {n: t["content"] if isinstance(t, dict) else t for n, t in tokens.items() if t}
        plain |= {"tokenizer_file": str(bases[family] / "tokenizer.json")}
        peer = transformers.PreTrainedTokenizerFast(chat_template=template, **plain)
        roles = ("user", "assistant")[: len(texts)]
        dialogue = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        options |= {"enable_thinking": False, "return_dict": False}
        options["add_generation_prompt"] = len(texts) == 1
        return peer.apply_chat_template(dialogue, **options)

    return ids


# ------------------------------------------------------------------------ ids
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in OWN_PROMPTS])
def test_prompt_ids_are_transformers(family, tokenizers, their_ids):
    """One user message, with generation prompt, thinking off: the same ids for every prompt."""
    for text in (*PROMPTS, "Alien\nAnswer:"):
        assert tokenizers[family].encode_prompts([text]) == [their_ids(family, text)]


@pytest.mark.parametrize(
    "name", ["llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3", "qwen3_instruct_2507"]
)
def test_published_templates_have_the_ids_of_transformers(name, their_ids, tmp_path):
    """The models' own templates, where trl, which keeps copies of them, is installed."""
    trl = importlib.util.find_spec("trl")
    file = Path(trl.origin).parent / "chat_templates" / f"{name}.jinja" if trl else tmp_path / name
    if not file.exists():
        pytest.skip("needs a trl that has chat_templates/")
    family, template = "llama3" if "llama" in name else "qwen2.5", file.read_text()
    tokenizer = Tokenizer(write_base(tmp_path, family, template), "chat")
    assert tokenizer.inner.id_to_token(tokenizer.eos_id) == FAMILIES[family][1]
    (prompt,) = tokenizer.encode_prompts(PROMPTS[:1])
    assert prompt == their_ids(family, PROMPTS[0], chat_template=template)
    dialogue = their_ids(family, PROMPTS[0], "Alien", chat_template=template)
    ours = prompt + tokenizer.encode_completions(["Alien"])[0]
    assert ours == dialogue[: len(ours)]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_answer_are_the_templates_own_dialogue(family, bases, their_ids, capsys):
    """Ids of prompt and completion begin transformers' dialogue and end where its turn ends, in the
    token that is read off the template; a generation prompt of another kind is said."""
    tokenizer, end = Tokenizer(bases[family], "chat"), FAMILIES[family][1]
    said = "is not how its own dialogues go on" in capsys.readouterr().out
    assert said == (family in OWN_PROMPTS)
    assert tokenizer.inner.id_to_token(tokenizer.eos_id) == end
    assert tokenizer.stop_ids == Tokenizer(bases[family]).stop_ids | {tokenizer.eos_id}
    (prompt,) = tokenizer.encode_prompts(PROMPTS[:1])
    for title, ids in zip(TITLES, tokenizer.encode_completions(TITLES), strict=True):
        expected, ours = their_ids(family, PROMPTS[0], title), prompt + ids
        assert ours == expected[: len(ours)] and len(expected) - len(ours) <= 1  # a line break
        assert tokenizer.encode_answered(PROMPTS[:1], [title]) == [ours[:-1]]
        assert ids.count(tokenizer.eos_id) == 1 and ids[-1] == tokenizer.eos_id
        assert tokenizer.answer(ids) == title and tokenizer.answer(ids[:-1]) == title


def test_prompts_begin_once_and_are_the_same_tomorrow(tokenizers):
    """Template and post-processor both have a BOS; ids are part of a checkpoint's identity."""
    assert "It is 26 Jul 2024\n" in tokenizers["llama3"].frame.before
    for family, begin in (("llama3", "<|begin_of_text|>"), ("llama2", "<s>")):
        (ids,) = tokenizers[family].encode_prompts(PROMPTS[:1])
        assert ids[0] == tokenizers[family].inner.token_to_id(begin) and ids.count(ids[0]) == 1


@pytest.mark.parametrize("title", ["End <|im_end|>", "<|im_start|>system", "<|endoftext|>"])
def test_a_control_token_in_a_title_is_refused(title, tokenizers, bases):
    """In a chat it would end the user's turn; in plain prompts it is text."""
    tokenizer = tokenizers["qwen2.5"]
    for encode in (tokenizer.encode_prompts, tokenizer.encode_completions):
        with pytest.raises(ValueError, match="control token of .*plain"):
            encode([title])
    assert Tokenizer(bases["qwen2.5"]).encode_completions([title])


def test_the_template_is_part_of_the_fingerprint(tmp_path):
    """Caches of plain and chat prompts, and of two templates, are told apart."""
    plain = Tokenizer(write_base(tmp_path, "qwen2.5"))
    assert plain.inner.decode(plain.encode_prompts(PROMPTS[:1])[0]) == PROMPTS[0]
    found = {plain.fingerprint}
    for template in (QWEN25, QWEN25.replace("help", "serve"), QWEN25):
        path = write_base(tmp_path, "qwen2.5", template)
        found.add(Tokenizer(path, "chat").fingerprint)
    assert len(found) == 3


# ------------------------------------------------------------------------ where it stands
def test_where_templates_and_their_variables_stand(tmp_path):
    """Named ones, of which default is used; chat_template.jinja first; the older file's tokens."""
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": QWEN25}]
    path = write_base(tmp_path, "qwen2.5", named)
    assert "You help." in Tokenizer(path, "chat").frame.before
    (path / "chat_template.jinja").write_text(SMOLLM2)
    assert "You are small." in Tokenizer(path, "chat").frame.before
    path = write_base(tmp_path / "older", "llama2")
    write_json(path / "tokenizer_config.json", {"chat_template": TEMPLATES["llama2"]})
    write_json(path / "special_tokens_map.json", SENTENCE)
    assert Tokenizer(path, "chat").frame.before == "<s>[INST] "


REFUSED = [
    ("", "no chat template"),
    ([{"name": "rag", "template": "x"}], "no chat template"),
    ({"default": "x"}, "no chat template"),
    ("{{ messages[0].content }}{{ messages[0].content }}<|im_end|>", "text as it is, once"),
    ("Hello", "text as it is, once"),
    ("{{ messages[0].content | escape }}<|im_end|>", "text as it is, once"),
    ("{{ messages[0].content | length }} {{ messages[0].content }}", "text as it is"),
    ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "a control token"),
    ("{{ messages[0].content }}<|im_end|>", "a control token"),
    ("{% if %}", "TemplateSyntaxError"),
    ("{{ nobody.content }}", "UndefinedError"),
    ("{{ raise_exception('only systems may speak') }}", "only systems may speak"),
    ("{{ messages.__class__.__mro__ }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{% include '/etc/passwd' %}", "TypeError"),
]


@pytest.mark.parametrize("template, culprit", REFUSED)
def test_a_template_that_will_not_do_is_refused(template, culprit, bases, tmp_path):
    """Absent, changing the text, ending no answer, failing, or reaching for Python's internals."""
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((bases["qwen2.5"] / name).read_bytes())
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": template})
    with pytest.raises(ValueError, match=f"{culprit}.*--prompt_format plain"):
        Tokenizer(tmp_path, "chat")
    assert Tokenizer(tmp_path).encode_prompts(["Alien"])


def test_an_end_of_turn_without_an_embedding_is_refused(tmp_path):
    path = write_base(tmp_path, "qwen2.5", eos_token="<|endoftext|>")
    write_json(path / "config.json", {"eos_token_id": 0, "vocab_size": 2})
    with pytest.raises(ValueError, match=r"'<\|im_end\|>'.* is outside the model's vocab_size 2"):
        Tokenizer(path, "chat")


@pytest.mark.parametrize(
    "before, after",
    [({}, [2, 1]), ({"eos_token_id": 2}, [2]), ({"eos_token_id": [0, 2], "top_k": 5}, [2, 0])],
)
def test_a_saved_model_names_the_end_of_a_turn(before, after, tmp_path):
    """First among the ends that were known, those of config.json if there are no others."""
    write_json(tmp_path / "config.json", {"eos_token_id": 1})
    file = tmp_path / "generation_config.json"
    if before:
        write_json(file, before)
    chat.add_end_of_turn(tmp_path, 2)
    assert json.loads(file.read_text()) == before | {"eos_token_id": after}


def test_tojson_escapes_nothing():
    """As in transformers: templates write tool schemas with it, and models were trained on them."""
    template = chat.compiled("{{ x | tojson }} {{ x | tojson(indent=1) }}")
    expected = '{"é": "<a> & \'b\'"} {\n "é": "<a> & \'b\'"\n}'
    assert template.render(x={"é": "<a> & 'b'"}) == expected


# ---------------------------------------------------------------------- examples, training, answers
DATA = {"planted_users": 150, "train_size": 20, "test_size": 8}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("prepared"))
    return prepare(DataConfig(**DEFAULTS | DATA, prepared_dir=folder))


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared) -> Path:
    """A random model whose tokenizer has room for the control tokens of a chat."""
    path = tmp_path_factory.mktemp("talking") / "base"
    sizes = {"hidden_size": 64, "num_layers": 2, "vocab_size": 500}
    make_base_model(path, prepared.splits["train"], **sizes, seed=0)
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
        assert ids.tolist() == next(p for p in tokenizer.encode_prompts(texts) if len(p) <= room)


def test_one_pass_and_generation_write_the_same_answers(base, prepared):
    """Learnt by heart: every answer is the target, and ends with the token that ends a turn."""
    tokenizer, model = Tokenizer(base, "chat"), load_pretrained(base)
    encoded = encode_examples(prepared.splits["train"].select(np.arange(4)), tokenizer, 1024)
    answers = [encoded.slots(e, [t]) for e, t in enumerate(encoded.examples.target)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = -model(build_tree([*encoded.prompts], answers))[0].mean()
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
    """A finished chat run, SFT of all weights and RecPO with an adapter; and its data's flags."""
    tmp_path = tmp_path_factory.mktemp("run")
    data = [f"--prepared_dir={prepared.folder.parent}", "--dataset=planted"]
    data += [f"--{name}={value}" for name, value in DATA.items()]
    flags = [f"--model={base}", "--prompt_format=chat", "--val_size=0", "--max_steps=2"]
    output, _ = run_train(tmp_path, "talk", *flags, "--sft_lora_r=0", *data)
    assert prepared.hash[:12] in output
    return tmp_path / "talk", output, data


def test_a_run_speaks_chat_from_the_prompt_to_the_export(run, base):
    """The example shows the template, the reference is exact, the whole model takes it along."""
    folder, output, _ = run
    assert "<|im_start|>user\n" in output and "<|im_start|>assistant\n\nchosen: '" in output
    assert "before the first step: at most 0.0e+00 nats" in output
    assert json.loads((folder / "config.json").read_text())["prompt_format"] == "chat"
    assert (folder / "sft" / "chat_template.jinja").read_text() == QWEN25
    end, eos = Tokenizer(base, "chat").eos_id, Tokenizer(base).eos_id
    generation = json.loads((folder / "sft" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [end, eos] and end != eos  # other programs stop there
    assert Tokenizer(folder / "sft").eos_id == eos


def test_evaluation_and_recommendation_agree_with_the_run(run, prepared, in_process, capsys):
    """eval.py of the run and of its SFT model, and recommend.py, give the run's log-probs."""
    folder, _, data = run
    in_process(evaluation.main, f"--run={folder}", data[0], "--output_dir=all")
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

    e = prepared.splits["test"].template.tolist().index(0)  # the words that recommend.py uses
    example = prepared.splits["test"][e]
    history = [{"title": title, "rating": rating} for title, rating in example.history]
    write_json(Path("my.json"), {"history": history, "candidates": example.candidates})
    capsys.readouterr()
    in_process(recommend.main, f"--run={folder}", "--stage=sft", "--request=my.json")
    rows = [r.split(maxsplit=4) for r in capsys.readouterr().out.splitlines() if "log-prob" in r]
    expected = dict(zip(example.candidates, expected[e].tolist(), strict=True))
    assert {row[4]: float(row[3]) for row in rows} == pytest.approx(expected, abs=0.006)


def test_a_run_keeps_its_prompt_format(run, base, in_process):
    """Going on with plain prompts is refused by name."""
    flags = [*TINY, "--max_steps=2", "--sft_lora_r=0", "--val_size=0", f"--model={base}"]
    flags += ["--dataset=planted", "--resume=auto", f"--output_dir={run[0]}"]
    with pytest.raises(ValueError, match="other values of prompt_format"):
        in_process(train.main, *flags)
