"""Tokenizers of three families, small, and the titles that they are tried with; a random model."""

import json
from pathlib import Path

import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer

from data import Example, Examples, render_prompt
from demo.pretrain import known_titles, write_tokenizer
from loaders import published
from loaders.frozen import Prepared, prepare
from model import ModelConfig, init_weights, save_pretrained
from train import TrainConfig

# of each family, the EOS
END_OF_TEXT = {"llama3": "<|end_of_text|>", "qwen": "<|endoftext|>", "llama2": "</s>"}
SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama2": ["<unk>", "<s>", "</s>"],
}

NASTY = [
    "...And Justice for All", "(500) Days of Summer", "Élite", "'burbs", "12 Monkeys",
    "Alien", "Alien 3", "1984", "M", "2001: A Space Odyssey", "Star Wars: Episode IV",
    "Airplane II:", "Mr. & Mrs.", "E.T.", "What?", "$9.99", "Title  two spaces",
    "日本", "<|end_of_text|>", "Say <|endoftext|> twice <|endoftext|>", "a </s> b", "<s>",
    "Answer: no", "| Rating: 5", "Ünïted 93 ½",
]  # fmt: skip
WORDS = [
    "the", "of", "and", "Alien", "Matrix", "Space", "Wars", "Rating", "Answer", "movies", "user",
    "watched", "these", "next", "following", "oldest", "first",
]  # fmt: skip


def prompt_of(titles: list[str], template: int = 0) -> str:
    """A prompt whose history and candidates are these titles."""
    rated = [(title, 4.0) for title in titles]
    return render_prompt(Example(published.WORDS["movielens"], "u", rated, titles, 0, [], template))


TEXTS = [prompt_of(NASTY, n) for n in range(5)]
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
    train(tokenizer, SPECIAL[family], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    steps = [processors.ByteLevel(trim_offsets=False)]
    if family == "llama3":
        bos = ("<|begin_of_text|>", 0)
        steps.append(processors.TemplateProcessing(f"{bos[0]} $A", special_tokens=[bos]))
    tokenizer.post_processor = processors.Sequence(steps)
    return tokenizer


def spell(special: list[str], words=()) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges of a byte-level BPE that spells these words from the left."""
    merges = dict.fromkeys((word[:n], word[n]) for word in words for n in range(1, len(word)))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*special, *alphabet, *map("".join, merges)], list(merges)


def spelling_bpe(special: list[str], words=(), **options) -> HFTokenizer:
    """A tokenizer of these tokens and merges, without pre-tokenizer."""
    tokens, merges = spell(special, words)
    inner = HFTokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, **options))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    return inner


def train(tokenizer: HFTokenizer, special: list[str], **options) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, show_progress=False, **options
    )
    tokenizer.train_from_iterator(TEXTS, trainer)


def llama2_style() -> HFTokenizer:
    """Llama-2's pipeline: "▁" in front and for spaces, no pre-tokenizer, bytes for the rest."""
    tokenizer = HFTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    words = Regex("▁+|[:|.\n]")  # in training only
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, "merged_with_next")
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    train(tokenizer, [*SPECIAL["llama2"], *byte_tokens], limit_alphabet=80)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    content = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    added = [token for token in content["added_tokens"] if token["content"] not in byte_tokens]
    return HFTokenizer.from_str(json.dumps(content | {"added_tokens": added}))


def small_world(folder: Path, **options) -> tuple[TrainConfig, Prepared, Path]:
    """Options and examples of a small planted world, and a base that fits into 4-bit blocks."""
    data = {"planted_users": 100, "followers": 3, "train_size": 12}
    config = TrainConfig(**data | options, prepared_dir=str(folder / "p"))
    prepared, sizes = prepare(config), {"hidden_size": 64, "num_layers": 2, "vocab_size": 400}
    make_base_model(folder / "base", prepared.splits["train"], **sizes, seed=0)
    return config, prepared, folder / "base"


def make_base_model(
    path, examples: Examples, *, hidden_size: int, num_layers: int, vocab_size: int, seed: int
) -> None:
    """A Hugging Face directory: a tokenizer of the titles and 1,000 prompts, random weights."""
    texts = [" " + title for title in known_titles(examples.interactions)]
    texts += [render_prompt(examples[e]) for e in range(min(1000, len(examples)))]
    tokenizer = write_tokenizer(Path(path), texts, vocab_size=vocab_size)
    config = ModelConfig(
        model_type="llama",
        vocab_size=-(-tokenizer.inner.get_vocab_size() // 64) * 64,
        hidden_size=hidden_size,
        intermediate_size=-(-8 * hidden_size // 3 // 32) * 32,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden_size // 32),
        num_key_value_heads=max(1, hidden_size // 64),
        head_dim=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_id,
    )
    save_pretrained(init_weights(config, seed), path)


def randomize_adapter(model, seed: int = 1):
    """Give every lora_B (zero at first) random values, here or in PEFT's model."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model
