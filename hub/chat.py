"""--prompt_format chat: the model's own chat template around every prompt.

The template is rendered as transformers renders it, but once, when a tokenizer is opened: made-up
texts show what it writes before and behind a user's text, and behind an answer. Prompt + title +
end token are what it writes for the dialogue [user, assistant]. strftime_now tells a constant day,
so that a run that goes on tomorrow keeps its prompts. A template that never ends is not stopped.
"""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common import read_json, reading
from hub.files import note_once

TODAY = datetime(2024, 7, 26)  # what Llama 3's own template says where no clock is at hand
# A prompt's text in all that matters to a template: several lines, quotes, markup, no space around.
PROBE = 'Alien: "Rock & Roll\'s" <3> {{ 7 * 7 }} | Rating: 5\n\nÉlite (1999)\nAnswer:'
OTHER_PROBE = "Heat\nAnswer:"
ANSWER_PROBE = "Solaris: A Film (1972)"


@dataclass(frozen=True)
class PromptFrame:
    """What stands around a prompt's text, and around a title. The default: plain prompts."""

    before: str = ""
    after: str = ""
    lead: str = " "  # in front of the title
    tail: str = ""  # between title and end
    end_id: int | None = None  # None = the model's EOS

    def prompt(self, text: str) -> str:
        return self.before + text + self.after

    def answered(self, text: str, title: str) -> str:
        return self.prompt(text) + self.lead + title + self.tail


def chat_frame(path: Path, inner) -> PromptFrame:
    """The frame that the template of a model folder makes; `inner` is its tokenizer."""
    file, template, tokens = read_template(path)
    way_out = "mend the template, or use --prompt_format plain"
    if not template or not isinstance(template, str):
        raise ValueError(f"{file}: no chat template in it (was it tuned to chat?): {way_out}")

    def written(user: str, *answer: str) -> str:
        messages = [{"role": "user", "content": user}]
        messages += [{"role": "assistant", "content": text} for text in answer]
        variables = {"messages": messages, "add_generation_prompt": not answer, **tokens}
        variables |= {"enable_thinking": False, "tools": None, "documents": None}
        return compiled(template).render(variables)

    try:
        prompt, other = written(PROBE), written(OTHER_PROBE)
        dialogue = written(PROBE, ANSWER_PROBE)
    except Exception as error:  # whatever a stranger's program runs into
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{file}: its chat template fails ({what}): {way_out}") from None
    before, _, after = prompt.partition(PROBE)
    between, found, rest = dialogue.removeprefix(before + PROBE).rpartition(ANSWER_PROBE)
    tail = rest[: len(rest) - len(rest.lstrip(" "))]
    controls = inner.get_added_tokens_decoder().items()
    ends = {t.content: i for i, t in controls if found and rest.startswith(tail + t.content)}
    if other != before + OTHER_PROBE + after or not dialogue.startswith(before + PROBE) or not ends:
        raise ValueError(
            f"{file}: its chat template does not write a user's text as it is, once, and a control "
            f"token of tokenizer.json behind an answer (it writes {rest[:40]!r} there): {way_out}"
        )
    # Llama 2's template writes a space before an answer that is not in its prompt
    lead = between.removeprefix(after)
    if not between.startswith(after) or lead.strip(" "):
        note_once(
            f"{file}: its generation prompt {after[-40:]!r} is not how its own dialogues go on; "
            f"prompts end as those do, in {between[-40:]!r}"
        )
        after, lead = between, ""
    return PromptFrame(before, after, lead, tail, ends[max(ends, key=len)])


def read_template(path: Path) -> tuple[Path, object, dict[str, str]]:
    """(file, template, bos_token and the like) of a folder; chat_template.jinja goes first."""
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


def add_end_of_turn(path: Path, end_id: int) -> None:
    """Name it in a saved model's generation_config.json, where other programs look for ends."""
    file = path / "generation_config.json"
    config = read_json(file) if file.exists() else {}
    known = config.get("eos_token_id", read_json(path / "config.json").get("eos_token_id"))
    known = known if isinstance(known, list) else [known]
    ends = [end_id, *(i for i in known if i not in (None, end_id))]
    file.write_text(json.dumps(config | {"eos_token_id": ends}, indent=2) + "\n")


# ------------------------------------------------------------------------ rendering
def raise_exception(message):
    raise jinja2.TemplateError(message)


def tojson(value, **options) -> str:
    """Plain JSON: jinja2's own filter escapes <, >, & and ' for web pages."""
    return json.dumps(value, **{"ensure_ascii": False} | options)


def compiled(template: str) -> jinja2.Template:
    """The template in jinja2's immutable sandbox, with the filters and globals of transformers."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": raise_exception, "strftime_now": TODAY.strftime}
    # {% generation %} marks what a model is to write: a scope that changes nothing in the text
    return env.from_string(
        re.sub(r"({%[-+]?\s*(?:end)?)generation(?=\s*[-+]?%})", r"\1with", template)
    )
