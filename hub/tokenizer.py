"""tokenizer.json of a Hugging Face directory, and the decisions around it:
BOS, EOS, stop ids, the prompt's boundary.

Prompts end in "Answer:", completions begin with a space: ids("Answer: Toy Story") begin with
ids("Answer:") in every supported tokenizer, which is checked for every title. Masks and labels
come from lengths, never from searching ids.

With prompt_format "chat" the model's chat template stands around the prompt, and the title right
behind it (hub/chat.py): its control tokens are parsed, and a title that holds one is refused.
"""

import contextlib
import hashlib
import re
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer

from common import read_json
from hub.chat import PromptFrame, chat_frame
from hub.files import note_once


class Tokenizer:
    """tokenizer.json plus what is needed around it:
    BOS policy, the EOS to train on, the ids that end an answer."""

    def __init__(self, path, prompt_format: str = "plain"):
        path = Path(path)
        self.file = path / "tokenizer.json"
        if not self.file.exists():
            raise ValueError(f"{self.file}: no such file; a Hugging Face tokenizer.json is needed")
        with self._library("not a readable tokenizer"):
            self.inner = HFTokenizer.from_file(str(self.file))
            self.inner.no_truncation()  # a saved state would apply silently
            self.inner.no_padding()
            first = _first_ids(self.inner)
        # "<|eot_id|>" inside a title is text, not a control token
        self.inner.encode_special_tokens = True
        self.num_embeddings = _num_embeddings(path)
        self.eos_id, self.stop_ids = _end_ids(path, self.inner, self.num_embeddings)
        self.bos_ids = [i for i in first if i not in self.stop_ids]  # [bos], or [] for Qwen
        if first != self.bos_ids:
            note_once(f"{self.file}: begins a text with a token that ends one; it is left out")
        self._check_range(self.bos_ids, "")
        self.frame, self.controls = PromptFrame(), None
        if prompt_format == "chat":
            self._speak_chat(path)
        # of all that decides the ids of a text
        decisions = f"{self.eos_id} {self.bos_ids}"
        decisions += f" {self.frame}" if prompt_format == "chat" else ""
        self.fingerprint = hashlib.sha256(self.file.read_bytes() + decisions.encode()).hexdigest()

    def _speak_chat(self, path: Path) -> None:
        """Take on the folder's chat template: its frame, and the token that ends a turn as EOS."""
        self.frame = chat_frame(path, self.inner)
        self._check_range([self.frame.end_id], "the chat template")
        self.eos_id = self.frame.end_id
        self.stop_ids |= {self.eos_id}
        self.bos_ids = []  # a template writes its own
        self.inner.encode_special_tokens = False
        tokens = self.inner.get_added_tokens_decoder().items()
        names = {t.content for i, t in tokens if t.special or i == self.eos_id}
        self.controls = re.compile("|".join(map(re.escape, sorted(names))))

    def _check_controls(self, texts: list[str]) -> None:
        """ValueError if a text would act as a control token of a chat: end the turn, say."""
        for text in texts if self.controls else ():
            if found := self.controls.search(text):
                around = text[max(0, found.start() - 30) : found.end() + 30]
                raise ValueError(
                    f"{around!r} holds {found[0]!r}, a control token of {self.file}, which a chat "
                    "would obey: rename that title, or use --prompt_format plain"
                )

    def encode(self, texts: list[str]) -> list[list[int]]:
        encoded = []
        for i in range(0, len(texts), 500):  # the library's records of a text are large
            with self._library("cannot encode a text"):
                batch = self.inner.encode_batch(texts[i : i + 500], add_special_tokens=False)
            encoded += [record.ids for record in batch]
        for text, ids in zip(texts, encoded, strict=True):
            self._check_range(ids, text)
        return encoded

    @contextlib.contextmanager
    def _library(self, what: str):
        """The library raises plain Exception, or panics, which is a BaseException of its own."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise ValueError(f"{self.file}: {what} ({error})") from None

    def _check_range(self, ids: list[int], text: str) -> None:
        """ValueError if the model has no embedding for a token."""
        if ids and self.num_embeddings and max(ids) >= self.num_embeddings:
            token = self.inner.id_to_token(max(ids))
            raise ValueError(
                f"{self.file}: token {max(ids)} {token!r} (in {text[:60]!r}) is outside "
                f"the model's vocab_size {self.num_embeddings}: the tokenizer was extended "
                "and the embedding was not, or they belong to different models"
            )

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        self._check_controls(texts)
        prompts = [self.frame.prompt(text) for text in texts]
        return [self.bos_ids + ids for ids in self.encode(prompts)]

    def encode_answered(self, texts: list[str], titles: list[str]) -> list[list[int]]:
        """Ids of each prompt and its title as one text, without what ends the answer."""
        self._check_controls(texts)
        self._check_controls(titles)
        pairs = zip(texts, titles, strict=True)
        answered = [self.frame.answered(text, title) for text, title in pairs]
        return [self.bos_ids + ids for ids in self.encode(answered)]

    def encode_completions(self, titles: list[str]) -> list[list[int]]:
        """Ids of a title and the end token as they follow a prompt, in plain " " + title + EOS.

        ValueError names a title whose boundary would merge."""
        (prefix,) = self.encode_prompts(["Answer:"])
        answered = self.encode_answered(["Answer:"] * len(titles), titles)
        out = []
        for title, ids in zip(titles, answered, strict=True):
            if ids[: len(prefix)] != prefix or len(ids) == len(prefix):
                end = repr(self.frame.prompt("Answer:")[-30:]) if self.controls else '"Answer:"'
                raise ValueError(
                    f"title {title!r}: this tokenizer merges it with the prompt's final {end}"
                )
            out.append(ids[len(prefix) :] + [self.eos_id])
        return out

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=True)

    def answer(self, ids: list[int]) -> str:
        """The answer that generated ids spell: up to the first stop id or line break, stripped."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return re.split(r"[\n\r]", self.decode(ids[:end]).lstrip(" "), maxsplit=1)[0].strip()

    def newline_ids(self) -> frozenset[int]:
        """Tokens whose text is optional spaces, then a line break:
        they end an answer as EOS does."""
        vocab = range(self.inner.get_vocab_size())
        return frozenset(i for i in vocab if re.match(r" *[\n\r]", self.inner.decode([i]) or ""))


# ------------------------------------------------------------------------ begin and end of a text
# the first is believed
SOURCES = ("generation_config.json", "tokenizer_config.json", "config.json")


def _first_ids(inner) -> list[int]:
    """Ids that the post-processor puts before a text: [bos] or [];
    what it puts behind is not among them."""
    whole = inner.encode("Answer").ids
    bare = inner.encode("Answer", add_special_tokens=False).ids
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return list(dict.fromkeys(whole[:start]))  # two of them are one too many
    return []


def _num_embeddings(path: Path) -> int | None:
    """Rows of the model's embedding; None where the folder holds no model."""
    if not (path / "config.json").exists():
        return None
    size = read_json(path / "config.json").get("vocab_size")
    return size if type(size) is int else None


def _end_ids(path: Path, inner, num_embeddings: int | None) -> tuple[int, frozenset[int]]:
    """(EOS to train on, every id that ends an answer), from all files that name one.

    The EOS is the first that all of them hold, else the first; a note says who disagrees."""
    sources = {name: _eos_of(path / name, inner) for name in SOURCES}
    sources = {name: ids for name, ids in sources.items() if ids}
    for name, ids in sources.items():
        _check_end_ids(path / name, ids, inner, num_embeddings)
    if not sources:
        raise ValueError(
            f"{path}: no eos_token_id in config.json or generation_config.json, "
            "no eos_token in tokenizer_config.json that tokenizer.json knows"
        )
    found = list(dict.fromkeys(i for ids in sources.values() for i in ids))
    shared = set(found).intersection(*sources.values())
    eos_id = next((i for i in found if i in shared), found[0])
    others = {name: ids for name, ids in sources.items() if eos_id not in ids}
    if others:
        named = "; ".join(f"{name} says {_spelled(ids, inner)}" for name, ids in others.items())
        source = next(name for name, ids in sources.items() if eos_id in ids)
        note_once(
            f"{path}: {_spelled([eos_id], inner)} of {source} ends an answer; {named}. "
            "Mend the file that is wrong"
        )
    # What config.json alone says may be an ordinary token, which would cut answers.
    stops = [i for name, ids in sources.items() if name not in others for i in ids]
    controls = {i for i, token in inner.get_added_tokens_decoder().items() if token.special}
    stops += [i for ids in others.values() for i in ids if i in controls]
    return eos_id, frozenset(stops)


def _eos_of(file: Path, inner) -> list[int]:
    """The end tokens that a file names;
    the files are optional, and have been shipped as invalid JSON."""
    try:
        content = read_json(file)
    except ValueError as error:
        if file.exists():
            note_once(f"{error}; its end token is not known")
        return []
    if file.name != "tokenizer_config.json":
        eos = content.get("eos_token_id")
        if eos is None:
            return []
        return eos if isinstance(eos, list) else [eos]
    token = content.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is None:
        return []
    if not isinstance(token, str):
        raise ValueError(f"{file}: eos_token must be a text, got {token!r}")
    try:
        token_id = inner.token_to_id(token)
    except UnicodeEncodeError:  # half of a surrogate pair
        token_id = None
    if token_id is None:
        note_once(f"{file}: its eos_token {token!r} is not in tokenizer.json and is left out")
        return []
    return [token_id]


def _check_end_ids(file: Path, ids: list, inner, num_embeddings: int | None) -> None:
    size = num_embeddings or inner.get_vocab_size()
    for i in ids:
        if type(i) is not int:
            raise ValueError(
                f"{file}: eos_token_id must be a whole number or a list of them, got {i!r}"
            )
        if not 0 <= i < size or inner.id_to_token(i) is None:
            raise ValueError(
                f"{file}: end token {i} is outside the vocabulary (0 to {size - 1}); "
                "give the id of the token that ends a text"
            )


def _spelled(ids: list[int], inner) -> str:
    return ", ".join(f"{i} {inner.id_to_token(i)!r}" for i in ids)
