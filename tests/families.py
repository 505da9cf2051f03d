"""Tokenizers of three families, small, and the titles that they are tried with."""

import json

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer

from data import Example, render_prompt
from loaders.movielens import WORDS as MOVIES

# of each family, the EOS
END_OF_TEXT = {
    "llama3": "<|end_of_text|>",
    "qwen": "<|endoftext|>",
    "llama2": "</s>",
}

NASTY = [
    "...And Justice for All", "(500) Days of Summer", "Élite", "'burbs", "12 Monkeys",
    "Alien", "Alien 3", "1984", "M", "2001: A Space Odyssey", "Star Wars: Episode IV",
    "Airplane II:", "Mr. & Mrs.", "E.T.", "What?", "$9.99", "Title  two spaces",
    "日本", "<|end_of_text|>", "Say <|endoftext|> twice <|endoftext|>", "a </s> b", "<s>",
    "Answer: no", "| Rating: 5", "Ünïted 93 ½",
]  # fmt: skip

WORDS = [
    "the",
    "of",
    "and",
    "Alien",
    "Matrix",
    "Space",
    "Wars",
    "Rating",
    "Answer",
    "movies",
    "user",
    "watched",
    "these",
    "next",
    "following",
    "oldest",
    "first",
]

TEXTS = [
    render_prompt(Example(MOVIES, "u", [(t, 4.0) for t in NASTY], NASTY, 0, [], n))
    for n in range(5)
]
TEXTS += [f" {a} {b}: {a}\n\n{b} 19{n}\n  \n" for n, a in enumerate(WORDS) for b in WORDS]


def byte_level(family: str) -> HFTokenizer:
    """Llama-3's or Qwen's pipeline as published, with a vocabulary of 900."""
    numbers = r"\p{N}{1,3}" if family == "llama3" else r"\p{N}"
    pattern = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}"
    pattern += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = HFTokenizer(models.BPE(ignore_merges=family == "llama3"))
    tokenizer.normalizer = normalizers.NFC() if family == "qwen" else None
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    if family == "llama3":
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if family == "llama3":
        bos = processors.TemplateProcessing(
            "<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
        )
        tokenizer.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=False), bos]
        )
    return tokenizer


def llama2_style() -> HFTokenizer:
    """Llama-2's pipeline as published:
    "▁" in front and for spaces, merges without pre-tokenizer, bytes for the rest."""
    tokenizer = HFTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    words = Regex("▁+|[:|.\n]")  # in training only
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, "merged_with_next")
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    special = ["<unk>", "<s>", "</s>", *byte_tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, limit_alphabet=80, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    content = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] not in byte_tokens
    ]
    return HFTokenizer.from_str(json.dumps(content))
