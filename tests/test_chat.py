"""Chat prompts: ids as transformers makes them, the template's own dialogue, and a whole run."""

import importlib.util
import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from conftest import write_json
from families import NASTY, byte_level, llama2_style, make_base_model, prompt_of
from launch import ROOT, run_train
from tokenizers import Tokenizer as HFTokenizer

import eval as evaluation
from hub import chat
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, prepare
from loaders.planted import DEFAULTS

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
    """Prompts are transformers', with generation prompt, thinking off."""
    tokenizer, end = Tokenizer(bases[family], "chat"), FAMILIES[family][1]
    said = "differs from its own dialogues" in capsys.readouterr().out
    assert said == (family in OWN_PROMPTS)
    assert tokenizer.inner.id_to_token(tokenizer.eos_id) == end
    assert tokenizer.stop_ids == Tokenizer(bases[family]).stop_ids | {tokenizer.eos_id}
    (prompt,) = tokenizer.encode_prompts(PROMPTS[:1])
    for text in () if family in OWN_PROMPTS else (*PROMPTS, "Alien\nAnswer:"):
        assert tokenizer.encode_prompts([text]) == [their_ids(family, text)]
    for title, ids in zip(TITLES, tokenizer.encode_completions(TITLES), strict=True):
        expected, ours = their_ids(family, PROMPTS[0], title), prompt + ids
        assert ours == expected[: len(ours)] and len(expected) - len(ours) <= 1  # a line break
        assert tokenizer.encode_answered(PROMPTS[:1], [title]) == [ours[:-1]]
        assert ids.count(tokenizer.eos_id) == 1 and ids[-1] == tokenizer.eos_id
        assert tokenizer.answer(ids) == title and tokenizer.answer(ids[:-1]) == title


def test_a_control_token_in_a_title_is_refused(bases):
    """In a chat it would end the user's turn; in plain prompts it is text."""
    tokenizer = Tokenizer(bases["qwen2.5"], "chat")
    for title in ("End <|im_end|>", "<|im_start|>system", "<|endoftext|>"):
        for encode in (tokenizer.encode_prompts, tokenizer.encode_completions):
            with pytest.raises(ValueError, match="control token of .*plain"):
                encode([title])
        assert Tokenizer(bases["qwen2.5"]).encode_completions([title])


def test_the_template_is_part_of_the_fingerprint(tmp_path):
    plain = Tokenizer(write_base(tmp_path, "qwen2.5"))
    assert plain.inner.decode(plain.encode_prompts(PROMPTS[:1])[0]) == PROMPTS[0]
    templates = (QWEN25, QWEN25.replace("help", "serve"), QWEN25)
    made = [Tokenizer(write_base(tmp_path, "qwen2.5", t), "chat") for t in templates]
    assert len({plain.fingerprint, *(t.fingerprint for t in made)}) == 3


# ------------------------------------------------------------------------ where it stands
def test_where_templates_and_their_variables_stand(tmp_path):
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
    ("{{ messages[0].content }}{{ messages[0].content }}<|im_end|>", "text once and unchanged"),
    ("{{ messages[0].content | escape }}<|im_end|>", "text once and unchanged"),
    ("{{ messages[0].content }}", "a control token"),
    ("{% if %}", "TemplateSyntaxError"),
    ("{{ nobody.content }}", "UndefinedError"),
    ("{{ raise_exception('only systems may speak') }}", "only systems may speak"),
    ("{{ messages.__class__.__mro__ }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{% include '/etc/passwd' %}", "TypeError"),
]


@pytest.mark.parametrize("template, culprit", REFUSED)
def test_a_template_that_will_not_do_is_refused(template, culprit, bases, tmp_path):
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((bases["qwen2.5"] / name).read_bytes())
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": template})
    with pytest.raises(ValueError, match=f"{culprit}.*--prompt_format plain"):
        Tokenizer(tmp_path, "chat")


def test_a_saved_model_names_the_end_of_a_turn(tmp_path):
    """First among the ends that were known."""
    write_json(tmp_path / "config.json", {"eos_token_id": 1})
    file = tmp_path / "generation_config.json"
    chat.add_end_of_turn(tmp_path, 2)
    assert json.loads(file.read_text()) == {"eos_token_id": [2, 1]}
    write_json(file, {"eos_token_id": [0, 2], "top_k": 5})
    chat.add_end_of_turn(tmp_path, 2)
    assert json.loads(file.read_text()) == {"eos_token_id": [2, 0], "top_k": 5}


# ---------------------------------------------------------------------- examples, training, answers
def test_a_run_speaks_chat_from_the_prompt_to_the_export(tmp_path, in_process):
    """The reference is exact, and the whole model takes the template along: without its
    prompt.json its log-probs are others."""
    data = {"planted_users": 150, "train_size": 20, "test_size": 8}
    flags = [f"--prepared_dir={tmp_path / 'prepared'}", "--dataset=planted"]
    flags += [f"--{name}={value}" for name, value in data.items()]
    prepared = prepare(DataConfig(**DEFAULTS | data, prepared_dir=str(tmp_path / "prepared")))
    base, sizes = tmp_path / "base", {"hidden_size": 64, "num_layers": 2, "vocab_size": 500}
    make_base_model(base, prepared.splits["train"], **sizes, seed=0)
    inner = HFTokenizer.from_file(str(base / "tokenizer.json"))
    inner.normalizer = None  # a space behind every line break would merge with the answer
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])  # the embedding has rows for them
    inner.save(str(base / "tokenizer.json"))
    (base / "chat_template.jinja").write_text(QWEN25)

    chatty = [f"--model={base}", "--prompt_format=chat", "--val_size=0", "--max_steps=2"]
    output, _ = run_train(tmp_path, "talk", *chatty, "--sft_lora_r=0", *flags)
    assert "<|im_start|>user\n" in output and "<|im_start|>assistant\n" in output
    assert "before the first step: at most 0.0e+00 nats" in output
    sft = tmp_path / "talk" / "sft"
    assert (sft / "chat_template.jinja").read_text() == QWEN25
    end, eos = Tokenizer(base, "chat").eos_id, Tokenizer(base).eos_id
    generation = json.loads((sft / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [end, eos] and end != eos  # other programs stop there
    assert Tokenizer(sft).eos_id == eos

    def logps(folder: Path, *source) -> np.ndarray:
        if source:
            in_process(evaluation.main, *source, f"--output_dir={folder.parent}")
        lines = (folder / "predictions.jsonl").read_text().splitlines()
        return np.array([json.loads(line)["logps"] for line in lines])

    expected = logps(sft / "eval")
    whole = logps(tmp_path / "all" / "sft", f"--run={tmp_path / 'talk'}", flags[0])
    alone = logps(tmp_path / "alone" / "sft", f"--model={sft}", *flags)
    np.testing.assert_allclose([whole, alone], [expected] * 2, atol=1e-4)
    (sft / "prompt.json").unlink()
    plain = logps(tmp_path / "plain" / "sft", f"--model={sft}", *flags)
    assert np.abs(plain - expected).max() > 1e-2
