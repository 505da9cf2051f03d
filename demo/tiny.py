"""A small model made from nothing: only for the demo and for machines without a GPU. Real language models skip this file.

`make_base_model` writes a normal Hugging Face directory: a tokenizer trained on the data's own titles and prompts, and
random Llama weights. Its tokenizer puts a space behind every line break, so that a title has the same tokens in the
candidate list and behind "Answer:".

`CopyTask` is the warm-up that a pretrained model does not need (--copy_steps). Answering with one of 20 listed titles
takes an induction circuit, "find where this began and go on as there", which every pretrained model brings along and a
random one does not. It appears within a few hundred steps if (a) the lists start short and grow with success, (b) tokens
recur often, and (c) every listed title is scored as a completion, which one PromptTree does at the price of one prompt.
(c) also goes on during SFT (--copy_weight): 5 of the other titles are scored from their second token on, which says how
a listed title continues and nothing about which one to choose.
"""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

from data import NUM_CANDIDATES, Encoded, Example, Examples, build_tree, render_prompt
from hub.tokenizer import Tokenizer
from losses import sft_loss
from model import ModelConfig, init_weights, save_pretrained
from objectives import after_first

EOS = "<|end_of_text|>"


# Llama-3's pre-tokenizer: a word with its leading space, up to three digits, punctuation, line breaks
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def make_base_model(
    path, examples: Examples, *, hidden_size: int, num_layers: int, vocab_size: int, seed: int
):
    """Write tokenizer and random weights to `path`; the tokenizer sees the titles and 1,000 training prompts."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace("\n", "\n ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[EOS], show_progress=False
    )
    texts = [" " + title for title in examples.log.titles]
    texts += [render_prompt(examples[e]) for e in range(min(1000, len(examples)))]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": EOS, "model_max_length": 4096}, indent=2) + "\n"
    )
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


class CopyTask:
    """Copying practice: prompts with made-up lists of real titles, in which every listed title is a completion.

    Lists start with 3 titles out of few, and no history. Whenever the model begins with a listed title and goes on with it well
    enough, the list grows by one, up to 20, and from 10 on a made-up history grows with it: copying is found where it
    is easy, then stretched."""

    PROMPT_TOKENS = 1024  # of a step: many small steps find the circuit sooner than few large ones
    POOL, GROWTH = (
        180,
        1.2,
    )  # titles in play at first, and their growth with every list size: few tokens recur sooner
    MASTERY = 0.7  # running accuracy of a title's second and later tokens, EOS apart, ...
    LISTED = (
        0.3  # ... and running probability of beginning with a listed title that make the list grow
    )
    LISTED_AT_LAST = 0.6  # the latter when lists of 20 end the practice

    def __init__(self, model, encoded: Encoded, tokenizer: Tokenizer, seed: int, device):
        self.model, self.device, self.tokenizer, self.seed = model, device, tokenizer, seed
        self.examples, self.completions = encoded.examples, encoded.completions
        self.items = np.random.default_rng(seed).permutation(sorted(self.completions))
        self.title_tokens = float(np.mean([len(ids) for ids in self.completions.values()]))
        self.list_size, self.accuracy, self.listed = 3, 0.0, 0.0

    def draw(self, step: int) -> list[tuple[int, int]]:
        """Draw the global batch of a step, a function of (seed, step, list size); returns its examples' widths."""
        rng = np.random.default_rng([self.seed, step])
        shown = min(max(0, 2 * (self.list_size - 10)), self.examples.history)
        tokens = 40 + self.list_size * self.title_tokens + shown * (self.title_tokens + 5)
        prompts, self.groups = [], []
        for _ in range(max(4, int(self.PROMPT_TOKENS / tokens))):
            pool = self.items[: int(self.POOL * self.GROWTH ** (self.list_size - 3))]
            drawn = rng.choice(pool, size=self.list_size + shown, replace=False).tolist()
            titles = [self.examples.log.titles[i] for i in drawn]
            history = [(title, float(rng.integers(1, 6))) for title in titles[self.list_size :]]
            template = int(rng.choice(self.examples.template))
            words = self.examples.log.words
            prompts.append(
                render_prompt(
                    Example(words, "", history, titles[: self.list_size], 0, [], template)
                )
            )
            self.groups.append([self.completions[i] for i in drawn[: self.list_size]])
        self.prompts = self.tokenizer.encode_prompts(prompts)
        self.num_tokens = sum(len(ids) for group in self.groups for ids in group)
        return [
            (len(p), sum(len(ids) - 1 for ids in g))
            for p, g in zip(self.prompts, self.groups, strict=True)
        ]

    def __call__(self, batch: list[int]) -> tuple[Tensor, dict]:
        """Loss and metrics of a micro-batch, as in objectives.py."""
        weight, batch = float(bool(batch)), batch or [0]
        tree = build_tree([self.prompts[i] for i in batch], [self.groups[i] for i in batch])
        first = ~after_first(tree.sequence_ids)
        later = torch.nonzero(~first & (tree.labels != self.tokenizer.eos_id)).squeeze(1)
        # titles that begin alike share one first token: count its probability once
        groups = [self.groups[i] for i in batch]
        begins = torch.tensor(
            [c[0] not in {o[0] for o in g[:n]} for g in groups for n, c in enumerate(g)]
        )
        begins = torch.nonzero(first).squeeze(1)[begins]
        tree, later, begins = (t.to(self.device) for t in (tree, later, begins))
        token_logps, greedy_ids = self.model(tree)
        right = weight * (greedy_ids == tree.labels)[later].sum()
        listed = weight * token_logps.detach()[begins].exp().sum()
        sums = {
            "loss": (-weight * token_logps.detach().sum(), weight * len(token_logps)),
            "copy_accuracy": (right, weight * len(later)),
            "listed": (listed, weight * len(batch)),
        }
        return weight * sft_loss(token_logps, self.num_tokens), sums

    def update(self, metrics: dict[str, float]) -> bool:
        """Take in a step's metrics; True once lists of 20 are mastered."""
        self.accuracy += 0.1 * (metrics["copy_accuracy"] - self.accuracy)
        self.listed += 0.1 * (metrics["listed"] - self.listed)
        last = self.list_size == NUM_CANDIDATES
        if self.accuracy < self.MASTERY or self.listed < (
            self.LISTED_AT_LAST if last else self.LISTED
        ):
            return False
        if last:
            return True
        self.list_size += 1
        self.accuracy, self.listed = (
            self.accuracy - 0.05,
            self.listed - 0.05,
        )  # a few steps on the new size at least
        return False
