"""--prompt_format chat: the model's own chat template around every prompt.

The template (chat_template.jinja, or chat_template in tokenizer_config.json) is rendered when a
tokenizer is opened, never again: with made-up texts, which show what it writes before and behind a
user's text, and which token it puts behind an answer. So a prompt is before + text + after, as
transformers' apply_chat_template renders one user message with add_generation_prompt=True and
enable_thinking=False, and an answer is title + end token, right behind it.

A template is a stranger's program. It runs in a process of its own (hub/render.py), bounded in
size, time, memory and length of its text, and what it writes must hold the user's text as it is.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from common import read_json

TEMPLATE_CHARS = 2**18  # published ones have up to 20,000
CPU_SECONDS = 2  # of rendering, which takes milliseconds
WALL_SECONDS = 60  # with the start of the process, on a busy machine
PASSED_ON = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")  # no tokens, no keys
SPECIAL_TOKENS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]

# A prompt's text in all that matters to a template: several lines, quotes, markup, no space around.
PROBE = 'Alien: "Rock & Roll\'s" <3> {{ 7 * 7 }} | Rating: 5\n\nÉlite (1999)\nAnswer:'
OTHER_PROBE = "Heat\nAnswer:"
ANSWER_PROBE = "Solaris: A Film (1972)"


@dataclass(frozen=True)
class PromptFrame:
    """What stands around a prompt's text, and before and behind a title. The default: plain."""

    before: str = ""
    after: str = ""
    lead: str = " "  # in front of the title
    end_id: int | None = None  # behind the title; None = the model's EOS

    def prompt(self, text: str) -> str:
        return self.before + text + self.after

    def answered(self, text: str, title: str) -> str:
        return self.prompt(text) + self.lead + title


def chat_frame(path: Path, inner) -> PromptFrame:
    """The frame that the template of a model folder makes; `inner` is its tokenizer.

    ValueError says why there is none, or why it will not do."""
    template, file = read_template(path)
    user, other = ([{"role": "user", "content": text}] for text in (PROBE, OTHER_PROBE))
    answered = [*user, {"role": "assistant", "content": ANSWER_PROBE}]
    shared = special_tokens(path) | {"tools": None, "documents": None, "enable_thinking": False}
    calls = [
        shared | {"messages": messages, "add_generation_prompt": messages is not answered}
        for messages in (user, other, answered)
    ]
    prompt, other_prompt, dialogue = render_safely(template, calls, file)

    before, _, after = prompt.partition(PROBE)
    if prompt.count(PROBE) != 1 or other_prompt != before + OTHER_PROBE + after:
        raise ValueError(
            f"{file}: its chat template does not write a user's text as it is, once: "
            "use --prompt_format plain"
        )
    answer_at = dialogue.rfind(ANSWER_PROBE)
    rest = dialogue[answer_at + len(ANSWER_PROBE) :].lstrip()
    tokens = inner.get_added_tokens_decoder()
    ends = {token.content: i for i, token in tokens.items() if rest.startswith(token.content)}
    if answer_at < 0 or not ends:
        raise ValueError(
            f"{file}: its chat template puts no control token of tokenizer.json behind an answer, "
            f"which would end it (it writes {rest[:40]!r}): use --prompt_format plain"
        )
    # Llama 2's template writes a space before an answer that is not in its prompt
    between = dialogue[len(prompt) : answer_at] if dialogue.startswith(prompt) else ""
    lead = "" if between.strip(" ") else between
    return PromptFrame(before, after, lead, ends[max(ends, key=len)])


# ------------------------------------------------------------------------ what a folder holds
def read_template(path: Path) -> tuple[str, Path]:
    """(template, the file that holds it). As in transformers, chat_template.jinja goes first."""
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: cannot be read ({error})") from None
    else:
        file = path / "tokenizer_config.json"
        template = default_template(file, read_json(file) if file.exists() else {})
    if not template:
        raise ValueError(
            f"{path}: no chat template, neither chat_template.jinja nor chat_template in "
            "tokenizer_config.json: use --prompt_format plain, or a model that was tuned to chat"
        )
    if len(template) > TEMPLATE_CHARS:
        raise ValueError(
            f"{file}: its chat template has {len(template):,} characters, "
            f"more than {TEMPLATE_CHARS:,}: use --prompt_format plain"
        )
    return template, file


def default_template(file: Path, config: dict) -> str:
    """chat_template of tokenizer_config.json: a text, or a list of named ones with a default."""
    found = config.get("chat_template")
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        named = {str(entry.get("name")): entry.get("template") for entry in found}
        if "default" not in named:
            raise ValueError(
                f"{file}: none of its chat templates ({', '.join(named)}) is called default: "
                "put the one to use into chat_template.jinja"
            )
        found = named["default"]
    if found is not None and not isinstance(found, str):
        raise ValueError(
            f"{file}: chat_template must be a text or a list of named ones, "
            f"got {type(found).__name__}"
        )
    return found or ""


def special_tokens(path: Path) -> dict[str, str]:
    """bos_token, eos_token, ...: the variables that templates write control tokens with."""
    found = {}
    for file in (path / "special_tokens_map.json", path / "tokenizer_config.json"):
        content = read_json(file) if file.exists() else {}
        found |= {name: content[name] for name in SPECIAL_TOKENS if name in content}
    texts = {
        name: token.get("content") if isinstance(token, dict) else token
        for name, token in found.items()
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def add_end_of_turn(path: Path, end_id: int) -> None:
    """Name it in a saved model's generation_config.json, where other programs look for ends."""
    file = path / "generation_config.json"
    config = read_json(file) if file.exists() else {}
    known = config.get("eos_token_id", read_json(path / "config.json").get("eos_token_id"))
    known = known if isinstance(known, list) else [known]
    ends = [end_id, *(i for i in known if i not in (None, end_id))]
    file.write_text(json.dumps(config | {"eos_token_id": ends}, indent=2) + "\n")


# ------------------------------------------------------------------------ the process
def render_safely(template: str, calls: list[dict], file: Path) -> list[str]:
    """The template's text for each call's variables; ValueError names the file and what it did."""
    job = {"template": template, "calls": calls, "cpu_seconds": CPU_SECONDS}
    way_out = "use --prompt_format plain, or mend the template"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "hub.render"],
            input=json.dumps(job).encode(),
            capture_output=True,
            timeout=WALL_SECONDS,
            cwd=Path(__file__).parents[1],
            env={name: os.environ[name] for name in PASSED_ON if name in os.environ},
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{file}: its chat template was not rendered in {WALL_SECONDS} s: {way_out}"
        ) from None
    if done.returncode < 0:  # killed by its bound, or by a fault
        raise ValueError(
            f"{file}: its chat template needs more than {CPU_SECONDS} s, or broke the process "
            f"that rendered it (signal {-done.returncode}): {way_out}"
        )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(
            f"{file}: its chat template cannot be rendered ({said[-1] if said else 'no answer'})"
        ) from None
    if "error" in answer:
        raise ValueError(
            f"{file}: its chat template cannot be rendered ({answer['error']}): {way_out}"
        )
    return answer["rendered"]
