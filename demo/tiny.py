"""A small model made from nothing: for tests, benchmarks and the tokenizer of `python -m loaders`.

Real language models skip this file; demo/pretrain.py takes its way of training a tokenizer.
`make_base_model` writes a normal Hugging Face directory: a tokenizer trained on the data's own
titles and prompts, and random Llama weights. Its tokenizer puts a space behind every line break,
so that a title has the same tokens in the candidate list and behind "Answer:".
"""

import json
from pathlib import Path

import numpy as np
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from data import Examples, Interactions, render_prompt
from model import ModelConfig, init_weights, save_pretrained

EOS = "<|end_of_text|>"

# Llama-3's pre-tokenizer: a word with its leading space, up to three digits, punctuation, breaks
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def known_titles(interactions: Interactions) -> list[str]:
    """All titles of the log; with a split in time those of the items that training sees."""
    if interactions.train_end is None:
        return list(interactions.titles)
    inside = np.arange(len(interactions.user)) < interactions.training_end()[interactions.user]
    return [interactions.titles[item] for item in np.unique(interactions.item[inside])]


def train_tokenizer(path: Path, texts: list[str], split: str, vocab_size: int) -> HFTokenizer:
    """A byte-level BPE of these texts, at most `vocab_size` tokens, written to `path`.

    A space goes behind every line break, so that a title has the same tokens in a list and behind
    "Answer:"; `split` is the regular expression that cuts words."""
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace("\n", "\n ")
    words = pre_tokenizers.Split(Regex(split), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[EOS], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": EOS, "model_max_length": 4096}
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer


def make_base_model(
    path, examples: Examples, *, hidden_size: int, num_layers: int, vocab_size: int, seed: int
):
    """Write tokenizer and random weights to `path`.

    The tokenizer sees the titles and 1,000 training prompts."""
    path = Path(path)
    texts = [" " + title for title in known_titles(examples.interactions)]
    texts += [render_prompt(examples[e]) for e in range(min(1000, len(examples)))]
    tokenizer = train_tokenizer(path, texts, SPLIT, vocab_size)
    config = ModelConfig(
        model_type="llama",
        vocab_size=-(-tokenizer.get_vocab_size() // 64) * 64,  # rounded up to whole tiles
        hidden_size=hidden_size,
        intermediate_size=-(-8 * hidden_size // 3 // 32) * 32,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden_size // 32),
        num_key_value_heads=max(1, hidden_size // 64),
        head_dim=64,  # wide: matching thousands of tokens against each other is what copying needs
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.token_to_id(EOS),
    )
    save_pretrained(init_weights(config, seed), path)
