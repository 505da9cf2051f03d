"""--prompt_format chat: the model's own chat template around every prompt.

It is rendered once, as in transformers: made-up texts show what it writes around a user's text and
after an answer. Prompt + title + end token equal its own dialogue [user, assistant]. The date is
fixed, so that prompts never change. An endless template is not stopped."""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from jinja2 import Template
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox

from common import read_json, reading
from hub.files import note_once

TODAY = datetime(2024, 7, 26)  # the date in Llama 3's own template if there is no clock
# Like a real prompt to a template: lines, quotes, markup, no space at the ends.
PROBE = 'Alien: "Rock & Roll\'s" <3> {{ 7 * 7 }} | Rating: 5\n\nÉlite (1999)\nAnswer:'
OTHER_PROBE = "Heat\nAnswer:"
ANSWER_PROBE = "Solaris: A Film (1972)"


@dataclass(frozen=True)
class PromptFrame:
    """The text around a prompt and around a title; the defaults are those of plain prompts."""

    before: str = ""
    after: str = ""
    lead: str = " "  # in front of the title
    tail: str = ""  # between title and end
    end_id: int | None = None  # None = the model's EOS

    def around(self, text: str, *titles: str) -> str:
        """A prompt in its frame, followed by a title if one is given."""
        return self.before + text + self.after + "".join(self.lead + t + self.tail for t in titles)


def chat_frame(path: Path, inner) -> PromptFrame:
    """The frame that the template of a model folder makes; `inner` is its tokenizer."""
    file, template, tokens = read_template(path)

    def written(*texts: str) -> str:
        messages = [{"role": r, "content": t} for r, t in zip(("user", "assistant"), texts)]
        variables = {"messages": messages, "add_generation_prompt": len(texts) == 1, **tokens}
        variables |= {"enable_thinking": False, "tools": None, "documents": None}
        return compiled(template).render(variables)

    try:
        if not template or not isinstance(template, str):
            raise ValueError("there is no chat template")
        prompt, other, dialogue = written(PROBE), written(OTHER_PROBE), written(PROBE, ANSWER_PROBE)
        before, _, after = prompt.partition(PROBE)
        between, found, rest = dialogue.removeprefix(before + PROBE).rpartition(ANSWER_PROBE)
        tail = rest[: len(rest) - len(rest.lstrip(" "))]
        controls = inner.get_added_tokens_decoder().items()
        ends = {t.content: i for i, t in controls if found and rest.startswith(tail + t.content)}
        as_is = other == before + OTHER_PROBE + after and dialogue.startswith(before + PROBE)
        if not as_is or not ends:
            raise ValueError(
                "it must write a user's text once and unchanged, and a control token of "
                f"tokenizer.json after an answer, not {rest[:40]!r}"
            )
    except Exception as error:  # a template is an unknown program
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
        what = f"its chat template cannot be used ({kind}{str(error)[:200]})"
        raise ValueError(f"{file}: {what}; correct it, or use --prompt_format plain") from None
    # Llama 2's template writes a space before an answer that is not in its prompt
    lead = between.removeprefix(after)
    if not between.startswith(after) or lead.strip(" "):
        said = f"generation prompt {after[-40:]!r} differs from its own dialogues"
        note_once(f"{file}: its {said}; prompts end as those do, in {between[-40:]!r}")
        after, lead = between, ""
    return PromptFrame(before, after, lead, tail, ends[max(ends, key=len)])


def read_template(path: Path) -> tuple[Path, object, dict[str, str]]:
    """Read (file, template, special tokens) of a folder; chat_template.jinja has priority."""
    file, settings = path / "tokenizer_config.json", {}
    for source in (path / "special_tokens_map.json", file):
        settings |= read_json(source) if source.exists() else {}
    template = settings.get("chat_template")
    if isinstance(template, list):  # named ones
        with reading(file):
            template = {str(t["name"]): t["template"] for t in template}.get("default")
    if (path / "chat_template.jinja").exists():
        file = path / "chat_template.jinja"
        template = file.read_text(encoding="utf-8")
    tokens = {name: token for name, token in settings.items() if name.endswith("_token")}
    texts = {n: t.get("content") if isinstance(t, dict) else t for n, t in tokens.items()}
    return file, template, {name: text for name, text in texts.items() if isinstance(text, str)}


def compiled(template: str) -> Template:
    """The template in jinja2's immutable sandbox, with the filters and globals of transformers."""

    def raise_exception(message: str):
        raise ValueError(message)

    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    # jinja2's own tojson escapes <, >, & and ' for web pages
    env.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    env.globals |= {"raise_exception": raise_exception, "strftime_now": TODAY.strftime}
    # {% generation %} marks what a model is to write: a scope that changes nothing in the text
    scope = r"({%[-+]?\s*(?:end)?)generation(?=\s*[-+]?%})"
    return env.from_string(re.sub(scope, r"\1with", template))


def add_end_of_turn(path: Path, end_id: int) -> None:
    """Add the end of a turn to generation_config.json, where other programs look for it."""
    file = path / "generation_config.json"
    config = read_json(file) if file.exists() else {}
    known = config.get("eos_token_id", read_json(path / "config.json").get("eos_token_id"))
    known = known if isinstance(known, list) else [known]
    ends = [end_id, *(i for i in known if i not in (None, end_id))]
    file.write_text(json.dumps(config | {"eos_token_id": ends}, indent=2) + "\n")
