"""The tokenizer of a Hugging Face directory, and the choice of BOS, EOS and prompt boundary.

ids("Answer: Toy Story") must begin with ids("Answer:"), which is checked for every title. With
prompt_format "chat" the model's template goes around both (hub/chat.py)."""

import contextlib
import hashlib
import math
import re
from itertools import takewhile
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer

from common import read_json
from hub.chat import PromptFrame, chat_frame
from hub.files import note_once


class Tokenizer:
    """tokenizer.json, with the BOS, the EOS to train on and the ids that end an answer."""

    def __init__(self, path, prompt_format: str = "plain"):
        path = Path(path)
        self.file = path / "tokenizer.json"
        with self._library("not a readable tokenizer.json"):
            self.inner = HFTokenizer.from_file(str(self.file))
            self.inner.no_truncation()  # a saved state would apply silently
            self.inner.no_padding()
            record = self.inner.encode("Answer")
        self.inner.encode_special_tokens = True  # "<|eot_id|>" inside a title is text
        config = read_json(path / "config.json") if (path / "config.json").exists() else {}
        sizes = [config.get(key) for key in ("vocab_size", "max_position_embeddings")]
        self.num_embeddings, self.max_positions = (n if type(n) is int else None for n in sizes)
        self.eos_id, self.stop_ids = _end_ids(path, self.inner, self.num_embeddings)
        added = takewhile(lambda n: record.special_tokens_mask[n], range(len(record.ids)))
        first = dict.fromkeys(record.ids[n] for n in added)  # a repeated BOS counts once
        self.bos_ids = [i for i in first if i not in self.stop_ids]  # [bos], or [] for Qwen
        self._check_range(self.bos_ids, "")
        self.frame, self.controls = PromptFrame(), None
        if prompt_format == "chat":
            self.frame = chat_frame(path, self.inner)
            self._check_range([self.frame.end_id], "the chat template")
            # the token that ends a turn is the EOS, and a template writes its own BOS
            self.eos_id, self.bos_ids = self.frame.end_id, []
            self.stop_ids |= {self.eos_id}
            self.inner.encode_special_tokens = False
            tokens = self.inner.get_added_tokens_decoder().items()
            names = {t.content for i, t in tokens if t.special or i == self.eos_id}
            self.controls = re.compile("|".join(map(re.escape, sorted(names))))
        decisions = f"{self.eos_id} {self.bos_ids}" + f" {self.frame}" * (prompt_format == "chat")
        self.fingerprint = hashlib.sha256(self.file.read_bytes() + decisions.encode()).hexdigest()

    @contextlib.contextmanager
    def _library(self, what: str):
        """Turn what the library raises (its panics are BaseExceptions) into a ValueError."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise ValueError(f"{self.file}: {what} ({error})") from None

    def _check_range(self, ids: list[int], text: str) -> None:
        """ValueError if the model has no embedding for a token."""
        size, last = self.num_embeddings, max(ids, default=0)
        if size and last >= size:
            token = f"token {last} {self.inner.id_to_token(last)!r} (in {text[:60]!r})"
            raise ValueError(f"{self.file}: {token} is outside the model's vocab_size {size}")

    def _check_controls(self, texts: list[str]) -> None:
        """ValueError if a text holds a control token of a chat, such as the end of a turn."""
        for text in texts if self.controls else ():
            if found := self.controls.search(text):
                token = f"{found[0]!r}, a control token of {self.file}"
                way_out = "rename that title, or use --prompt_format plain"
                raise ValueError(f"{text[-200:]!r} holds {token}: {way_out}")

    def note_long(self, prompts: list) -> None:
        """Print how many prompts are longer than the model's max_position_embeddings."""
        if long := sum(len(ids) > (self.max_positions or math.inf) for ids in prompts):
            limit = f"max_position_embeddings, {self.max_positions:,} tokens: lower --max_length"
            note_once(f"{long:,} of {len(prompts):,} prompts are longer than the model's {limit}")

    def encode(self, texts: list[str]) -> list[list[int]]:
        encoded = []
        for i in range(0, len(texts), 500):  # the library's records of a text are large
            with self._library("cannot encode a text"):
                batch = self.inner.encode_batch(texts[i : i + 500], add_special_tokens=False)
            encoded += [record.ids for record in batch]
        for text, ids in zip(texts, encoded, strict=True):
            self._check_range(ids, text)
        return encoded

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        self._check_controls(texts)
        return [self.bos_ids + ids for ids in self.encode([self.frame.around(t) for t in texts])]

    def encode_answered(self, texts: list[str], titles: list[str]) -> list[list[int]]:
        """Ids of each prompt and its title as one text, without the end token."""
        self._check_controls([*texts, *titles])
        answered = [self.frame.around(*pair) for pair in zip(texts, titles, strict=True)]
        return [self.bos_ids + ids for ids in self.encode(answered)]

    def encode_completions(self, titles: list[str]) -> list[list[int]]:
        """Ids of each title as it follows a prompt, with the end (plain: " " + title + EOS)."""
        (prefix,), end = self.encode_prompts(["Answer:"]), self.frame.around("Answer:")[-30:]
        answered = self.encode_answered(["Answer:"] * len(titles), titles)
        for title, ids in zip(titles, answered, strict=True):
            if ids[: len(prefix)] != prefix or len(ids) == len(prefix):
                raise ValueError(f"title {title!r}: it merges with the prompt's final {end!r}")
        return [ids[len(prefix) :] + [self.eos_id] for ids in answered]

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=True)

    def answer(self, ids: list[int]) -> str:
        """Decode generated ids up to the first stop id or line break; spaces are stripped."""
        answer = self.decode(list(takewhile(lambda i: i not in self.stop_ids, ids)))
        return re.split(r"[\n\r]", answer.lstrip(" "), maxsplit=1)[0].strip()

    def newline_ids(self) -> frozenset[int]:
        """Tokens whose text is optional spaces, then a line break: they end an answer, too."""
        vocab = range(self.inner.get_vocab_size())
        return frozenset(i for i in vocab if re.match(r" *[\n\r]", self.inner.decode([i]) or ""))


def _end_ids(path: Path, inner, num_embeddings: int | None) -> tuple[int, frozenset[int]]:
    """Find (the EOS to train on: the first that all files name, else the first; all end tokens)."""
    names, found = ("generation_config.json", "tokenizer_config.json", "config.json"), {}
    for file in (path / name for name in names):
        try:
            content = read_json(file) if file.exists() else {}
            eos = content.get("eos_token_id")
            if file.name == "tokenizer_config.json":
                token = content.get("eos_token")
                token = token.get("content") if isinstance(token, dict) else token
                eos = inner.token_to_id(token) if isinstance(token, str) else None
                if token is not None and eos is None:
                    note_once(f"{file}: its eos_token {token!r} is not in tokenizer.json: left out")
        except ValueError as error:  # not JSON (one published model), or half a surrogate pair
            note_once(f"{file}: {error}; its end token is ignored")
            continue
        if eos not in (None, []):
            found[file.name] = eos if isinstance(eos, list) else [eos]
    if not found:
        raise ValueError(f"{path}: no end token known to tokenizer.json in {', '.join(names)}")
    size, every = num_embeddings or inner.get_vocab_size(), sum(found.values(), [])
    for name, ids in found.items():
        for i in ids:
            if type(i) is not int or not 0 <= i < size or inner.id_to_token(i) is None:
                raise ValueError(f"{path / name}: end token {i!r} is not one of the {size} tokens")
    eos_id = next((i for i in every if all(i in ids for ids in found.values())), every[0])
    agreeing = [ids for ids in found.values() if eos_id in ids]
    if len(agreeing) < len(found):
        token = f"{eos_id} {inner.id_to_token(eos_id)!r}"
        note_once(f"{path}: {token} ends a text, but {found} disagree: correct the wrong file")
    # A file that disagrees may name an ordinary token, which would cut answers short.
    controls = {i for i, token in inner.get_added_tokens_decoder().items() if token.special}
    return eos_id, frozenset(controls.intersection(every).union(*agreeing))
