"""tokenizer.json of a Hugging Face directory, and the decisions around it: BOS, EOS, stop ids, the prompt's boundary.

Prompts end in "Answer:", completions begin with a space: ids("Answer: Toy Story") begin with ids("Answer:") in every
supported tokenizer, which is checked for every title. Masks and labels come from lengths, never from searching ids.
"""

import hashlib
import re
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer

from common import read_json


class Tokenizer:
    """tokenizer.json plus what is needed around it: BOS policy, the EOS to train on, the ids that end an answer."""

    def __init__(self, path):
        path = Path(path)
        if not (path / "tokenizer.json").exists():
            raise ValueError(
                f"{path / 'tokenizer.json'}: no such file; a Hugging Face tokenizer.json is needed"
            )
        try:
            self.inner = HFTokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(
                f"{path / 'tokenizer.json'}: not a readable tokenizer ({error})"
            ) from None
        self.inner.no_truncation()  # a saved state would apply silently
        self.inner.no_padding()
        self.bos_ids = self.inner.encode("").ids[:1]  # [bos], or [] for Qwen
        self.inner.encode_special_tokens = (
            True  # "<|eot_id|>" inside a title is text, not a control token
        )
        eos = _special_ids(path, self.inner)
        self.eos_id, self.stop_ids = eos[0], frozenset(eos)
        # of all that decides the ids of a text
        self.fingerprint = hashlib.sha256(
            (path / "tokenizer.json").read_bytes() + bytes(str(eos[0]), "ascii")
        ).hexdigest()

    def encode(self, texts: list[str]) -> list[list[int]]:
        chunks = (
            texts[i : i + 500] for i in range(0, len(texts), 500)
        )  # the library's records of a text are large
        return [
            e.ids
            for chunk in chunks
            for e in self.inner.encode_batch(chunk, add_special_tokens=False)
        ]

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        return [self.bos_ids + ids for ids in self.encode(texts)]

    def encode_completions(self, titles: list[str]) -> list[list[int]]:
        """Ids of " " + title + EOS as they follow "Answer:"; ValueError names a title whose boundary would merge."""
        prefix = self.encode(["Answer:"])[0]
        out = []
        for title, ids in zip(
            titles, self.encode([f"Answer: {title}" for title in titles]), strict=True
        ):
            if ids[: len(prefix)] != prefix or len(ids) == len(prefix):
                raise ValueError(
                    f'title {title!r}: this tokenizer merges it with the prompt\'s final "Answer:"'
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
        """Tokens whose text is optional spaces, then a line break: they end an answer as EOS does."""
        vocab = range(self.inner.get_vocab_size())
        return frozenset(i for i in vocab if re.match(r" *[\n\r]", self.inner.decode([i]) or ""))


def _special_ids(path: Path, inner) -> list[int]:
    """Stop ids: the EOS to train on first, then every other one that config, generation_config and tokenizer name."""
    found: list[int] = []
    for name in ("config.json", "generation_config.json"):
        try:
            eos = read_json(path / name).get("eos_token_id")
        except ValueError:  # optional, and has been shipped as invalid JSON
            continue
        found += eos if isinstance(eos, list) else [eos]
    try:
        token = read_json(path / "tokenizer_config.json").get("eos_token")
        found.append(
            inner.token_to_id(token["content"] if isinstance(token, dict) else token or "")
        )
    except ValueError:
        pass
    found = list(dict.fromkeys(i for i in found if i is not None))
    if not found:
        raise ValueError(
            f"{path}: no eos_token_id in config.json or generation_config.json, no eos_token in tokenizer_config.json"
        )
    return found
