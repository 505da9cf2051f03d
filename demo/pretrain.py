"""A small pretrained base: it reads a list of titles, answers with one of them, and knows no taste.

    python -m demo.pretrain --output_dir demo/base                demo/base again
    python -m demo.pretrain --dataset csv --data_dir log.csv      a base for the titles of a log
    python train.py --model titles --dataset csv ...              the same, then SFT and RecPO

Real language models bring along what this practises: in a prompt of this project they find the list
and write a title that stands in it. Here prompts are made up: titles drawn at random, whatever
their genre, into histories with random ratings and into lists. Every listed title is right, so the
best the model can do is to spread its answer evenly over the list: reading, without a preference.
All listed titles hang on one PromptTree by their first token, which is the hard one (20 titles have
to be told from the history's), and a few of them whole, which is how a title goes on and ends.

Half of a step, later the lists of every other one, are of *mixed* titles, whose words changed
partners. Real ones are soon known by heart, and a model that knows them writes the first word of
one listed title and the second of another; of mixed ones only the list tells what belongs
together. All of them are written whole.

Lists start short and grow with success, and histories and the titles in play with them: a copying
circuit is found where it is easy, then stretched. With --title_tokens all titles are in play at
once, and none is mixed: what is learnt is to copy any token, not these.

Once lists are of 20, and where kinds of titles are known, lists are crowded with titles of few
kinds, and other prompts practise telling kinds apart: which listed title is like these, like the
latest, like the latest one liked? There a recommender's prompt is answered by a listed title like
the latest *disliked* one, by any title where none is: time, ratings and kinds are looked up and
compared, but for the wrong item, for what comes next depends on the latest liked (planted world:
going by the latest disliked ranks .07 first, chance .05; by the latest liked, .43). So fine-tuning
has to turn to another item, and need not invent how titles are compared. In the last steps
(--settle_steps) any listed title answers a recommender's prompt. A trace is left (ranked first:
.066): the kind of the latest item leads by a tenth of a nat. Why it stays: NOTES.md.

It is made in a folder beside the directory ("base.part"), which it fills at the end; a checkpoint
every few minutes, and the same command goes on from it.

demo/base is what the first command makes, in 49 minutes of 2 cores (x86-64, torch 2.13, 2 threads:
other machines round differently). What it knows by which step: NOTES.md. tests/test_pretrain.py
checks that it writes listed titles and ranks at chance within the noise of 150 users.

Left out: several processes, GPUs, bf16 in training.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer
from tqdm import tqdm

from common import Stopped, arg, hours, parse_config, print0, run_cli, writing
from data import (
    NUM_CANDIDATES,
    TEMPLATES,
    Example,
    Interactions,
    PromptTree,
    Words,
    build_tree,
    history_text,
    render_prompt,
)
from demo.tiny import known_titles, train_tokenizer
from hub.config import write_config
from hub.files import open_safetensors, save_tensors
from hub.tokenizer import Tokenizer
from loaders import planted
from loaders.frozen import DataConfig, data_defaults, prepare
from losses import sft_loss
from model import ModelConfig, Transformer, init_weights, save_pretrained

BASE = Path(__file__).parent / "base"
# Llama-3's pre-tokenizer (a word with its leading space, up to three digits, punctuation, line
# breaks), but for the first alternative: a rating behind a title is one token, not four.
SPLIT = (
    r" \| Rating: \d(?:\.\d)?|(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MOMENTS = ("exp_avg", "exp_avg_sq")
LONGEST_REAL = 20  # interactions of a real history
HISTORY_WEIGHT = 0.5  # of a history's mean NLL beside the answers'
FORMAT = 1  # raised when the same titles and options give another base than before
SPREADS = (2, 4, 10)  # kinds among the titles of a history, or of a crowded list


TITLES = "titles"  # train.py --model titles


@dataclass(frozen=True)
class PretrainConfig(DataConfig):
    """Make a small base that reads lists of the titles of a log, as a Hugging Face directory."""

    output_dir: str = arg(
        "",
        "where the base goes, by default runs/<dataset>-base; while it is made, OUTPUT_DIR.part",
        group="base",
    )
    vocab_size: int = arg(1024, "tokens of the tokenizer, at most", at_least=300)
    title_tokens: bool = arg(
        False,
        "beside them one token for each title, line break included: prompts a third as long, "
        "and nothing to spell",
    )
    hidden_size: int = arg(128, "width", at_least=1)
    num_layers: int = arg(4, "blocks", at_least=1)
    num_heads: int = arg(2, "attention heads, each with keys and values of its own", at_least=1)
    head_dim: int = arg(64, "width of a head; 32 are too few to bind words", at_least=2)
    steps: int = arg(6000, "optimizer steps", at_least=1)
    settle_steps: int = arg(
        450, "steps behind them, in which a recommender's prompt prefers no kind", at_least=0
    )
    batch_tokens: int = arg(
        4096,
        "prompt tokens of two of a step's micro-batches, about (it has two, later four); "
        "lists of few titles take fewer",
        at_least=1,
    )
    learning_rate: float = arg(2e-3, "peak; warm-up, then a cosine to a hundredth of it", above=0)
    seed: int = arg(0, "seed of weights and prompts")
    save_minutes: float = arg(3.0, "minutes between checkpoints", at_least=0)
    logging_steps: int = arg(20, "steps between printed lines", at_least=1)


# ------------------------------------------------------------------------ made-up prompts
@dataclass
class Prompt:
    """A text, and the listed titles that answer it: all of them equally right."""

    text: str
    answers: list[str]
    whole: int = 4  # answers that are scored to their end, the others by their first token
    history: str = ""  # a real one, part of the text, whose tokens are targets, too


def shuffled(items, rng) -> list:
    return [items[i] for i in rng.permutation(len(items))]


def made_up_prompt(titles: list[str], list_size: int, shown: int, words: Words, rng) -> Prompt:
    """Different titles, drawn evenly: a history of `shown`, rated at random, and a list."""
    drawn = rng.choice(len(titles), size=list_size + shown, replace=False)
    chosen = [titles[i] for i in drawn]
    listed, history = chosen[:list_size], chosen[list_size:]
    rated = [(title, float(rng.integers(1, 6))) for title in history]
    return Prompt(recommender_text(rated, listed, words, rng), listed)


def real_prompt(log: Interactions, rows: np.ndarray, list_size: int, words: Words, rng) -> Prompt:
    """A real history, up to one of the rows (n,), before a list of other titles, drawn evenly."""
    end = int(rows[rng.integers(len(rows))]) + 1
    start = max(int(log.start[log.user[end - 1]]), end - int(rng.integers(2, LONGEST_REAL + 1)))
    read = log.item[start:end]
    drawn = rng.choice(log.num_items, size=min(log.num_items, list_size + len(read)), replace=False)
    listed = [log.titles[i] for i in drawn[~np.isin(drawn, read)][:list_size]]
    rated = [(log.titles[i], float(r)) for i, r in zip(read, log.rating[start:end], strict=True)]
    text = recommender_text(rated, listed, words, rng)
    return Prompt(text, listed, history=history_text(rated))


def recommender_text(rated: list[tuple[str, float]], listed: list[str], words: Words, rng) -> str:
    template = int(rng.integers(len(TEMPLATES)))
    return render_prompt(Example(words, "", rated, listed, 0, [], template))


QUESTIONS = {
    "alike": "These {things} are like each other:\n{history}\n"
    "Which of the following {things} is like them?\n{candidates}\nAnswer:",
    "last": "Some {things} with ratings, the latest last:\n{history}\n"
    "Which of the following {things} is like the latest?\n{candidates}\nAnswer:",
    "liked": "Some {things} with ratings, the latest last:\n{history}\n"
    "Which of the following {things} is like the latest rated 4 or 5?\n{candidates}\nAnswer:",
}
KEPT = 3  # titles of each kind that are in no history, so that a list may have them
LONGEST = 16  # titles of a history before a question


def kinds_to_ask_for(kinds: list[list[str]]) -> list[list[str]]:
    """Those with titles enough for a history and a list; none if the others cannot fill a list."""
    kinds = [kind for kind in kinds if len(kind) >= 2 * KEPT]
    others = sum(map(len, kinds)) - max(map(len, kinds), default=0)
    return kinds if others >= LONGEST + NUM_CANDIDATES else []


def kind_prompt(
    kinds: list[list[str]], question: str, list_size: int, right: int, words: Words, rng
) -> Prompt:
    """A list with `right` titles of the kind asked for; with none of them any title answers.

    Up to six others are of the history's other kinds. `question` is one of QUESTIONS, or a
    recommender's prompt: "disliked" is answered by titles like the latest one rated 1 or 2, "any"
    by all that are listed."""
    order = [shuffled(kind, rng) for kind in kinds]
    few = rng.permutation(len(kinds))[: 1 if question == "alike" else int(rng.choice(SPREADS))]
    history = shuffled([title for k in few for title in order[k][:-KEPT]], rng)
    lengths = (1, 6) if question == "alike" else (4, LONGEST)
    history = history[: int(rng.integers(*lengths, endpoint=True))]
    ratings = rng.integers(1, 6, size=len(history)).tolist()
    low, high = {"liked": (4, 5), "disliked": (1, 2)}.get(question, (1, 5))
    meant = len(history) - 1
    meant = max((n for n, rating in enumerate(ratings) if low <= rating <= high), default=meant)
    ratings[meant] = min(max(low, ratings[meant]), high)

    kind = next(k for k in few if history[meant] in kinds[k])
    answers = order[kind][-KEPT:][:right]
    near = shuffled([title for k in few if k != kind for title in order[k][-KEPT:]], rng)
    near = near[: int(rng.integers(7))]
    read = {*history, *near}
    other = [t for k, kind_order in enumerate(order) if k != kind for t in kind_order]
    other = near + shuffled([title for title in other if title not in read], rng)
    listed = shuffled(answers + other[: list_size - right], rng)
    rated = list(zip(history, map(float, ratings), strict=True))
    if question in ("disliked", "any"):
        right_ones = listed if question == "any" else answers or listed
        return Prompt(recommender_text(rated, listed, words, rng), right_ones)
    lines = [t if question == "alike" else f"{t} | Rating: {rating:g}" for t, rating in rated]
    things = words[0]
    parts = {"history": "\n".join(lines), "candidates": "\n".join(listed)}
    return Prompt(QUESTIONS[question].format(things=things, **parts), answers or listed)


def mixed(titles: list[str], rng) -> list[str]:
    """Titles that changed the words behind their first: which belong together stands in the list
    alone, and cannot be known by heart."""
    parts = [title.partition(" ") for title in titles]
    ends = shuffled([gap + tail for _, gap, tail in parts], rng)
    return sorted({first + end for (first, _, _), end in zip(parts, ends, strict=True)})


def crowded(kinds: list[list[str]], least: int, rng) -> list[str]:
    """Titles of few kinds, more than `least` if there are so many."""
    titles, few = [], int(rng.choice(SPREADS))
    for n, k in enumerate(rng.permutation(len(kinds))):
        if n >= few and len(titles) > least:
            break
        titles += kinds[k]
    return titles


def write_tokenizer(
    path: Path, kinds: list[list[str]], words: Words, config: PretrainConfig
) -> None:
    """Of titles and made-up prompts; byte-level, so that any text can be encoded.

    A title's own token takes the white space before it along, so that a list is nothing but titles.
    A title whose token would not be decoded to its text goes on being spelled."""
    titles = [title for kind in kinds for title in kind]
    rng = np.random.default_rng(0)
    prompts = [made_up_prompt(titles, 20, 10, words, rng) for _ in range(1000)]
    texts = [" " + title for title in titles] + [prompt.text for prompt in prompts]
    tokenizer = train_tokenizer(path, texts, SPLIT, config.vocab_size)
    if config.title_tokens:
        whole = [AddedToken(t, lstrip=True, single_word=True, normalized=False) for t in titles]
        trial = HFTokenizer.from_str(tokenizer.to_str())
        trial.add_tokens(whole)
        spelled = {t for t in titles if trial.decode([trial.token_to_id(t)]) != t}
        tokenizer.add_tokens([token for token in whole if token.content not in spelled])
        tokenizer.save(str(path / "tokenizer.json"))


def history_tokens(prompts: list[Prompt], tokenizer: Tokenizer) -> np.ndarray:
    """(B, 2) the first token of each prompt's history, and the one behind its last."""
    spans = []
    for prompt, encoding in zip(
        prompts, tokenizer.inner.encode_batch([p.text for p in prompts]), strict=True
    ):
        if not prompt.history:
            spans.append([1, 1])  # none of its tokens is a target
            continue
        start = prompt.text.index(prompt.history)
        ends = np.array([end for _, end in encoding.offsets])
        first, behind = np.searchsorted(ends, [start + 1, start + len(prompt.history)])
        spans.append([first, behind + 1])
    return np.array(spans)


class Practice:
    """Batches of made-up prompts, and how long their lists are by now."""

    CONTINUES, BEGINS = 0.8, 0.6  # running shares at which the list grows: see `update`

    def __init__(
        self,
        config: PretrainConfig,
        kinds: list[list[str]],
        words: Words,
        tokenizer: Tokenizer,
        log: Interactions | None = None,
    ):
        self.config, self.words, self.tokenizer = config, words, tokenizer
        self.kinds = kinds_to_ask_for(kinds)
        self.list_size, self.continues, self.begins = 3, 0.0, 0.0
        titles = [title for kind in kinds for title in kind]
        self.titles = shuffled(titles, np.random.default_rng(config.seed))
        self.log = log
        if log is not None:  # rows with an earlier one that training may see
            row, end = np.arange(len(log.user)), log.training_end()
            self.rows = np.flatnonzero((row > log.start[log.user]) & (row < end[log.user]))

    def draw(self, step: int) -> list[list[Prompt]]:
        """The micro-batches of a step: a function of (seed, step, list size).

        Real and mixed lists; once they are long, either of them and three that ask for kinds."""
        config, longest = self.config, self.list_size
        rng = np.random.default_rng([config.seed, 1, step, longest])
        if not self.kinds or longest < NUM_CANDIDATES:
            size = int(rng.integers(2, longest + 1)) if config.title_tokens else longest
            return [self.draw_lists(longest, rng), self.draw_lists(size, rng, mix=True)]
        parts = [["disliked"], [*QUESTIONS, "disliked"], list(QUESTIONS)]
        if step >= config.steps:
            parts = [["any"], ["any"], list(QUESTIONS)]
        lists = self.draw_lists(longest, rng, mix=step % 2 == 0, crowd=True)
        return [lists, *(self.draw_questions(questions, rng) for questions in parts)]

    def draw_lists(self, size: int, rng, mix=False, crowd=False) -> list[Prompt]:
        """Prompts that any listed title answers; `mix`: of mixed titles, all written whole, but
        with --title_tokens, where there are no words to mix."""
        title_tokens = self.config.title_tokens
        mix = mix and not title_tokens
        playing = self.titles if title_tokens else self.titles[: 60 * self.list_size]
        shown = int(rng.integers(1, self.list_size + 1))
        if self.log is not None:
            shown = LONGEST_REAL // 2  # on average
        prompts = []
        for _ in range(self.num_prompts(size, shown, full=mix)):
            if self.log is not None:
                prompts.append(real_prompt(self.log, self.rows, size, self.words, rng))
                continue
            titles = crowded(self.kinds, size + shown, rng) if crowd else playing
            if mix:
                titles = mixed(titles, rng)
            listed = min(size, len(titles) - 1)  # mixing may have made two of them one
            prompt = made_up_prompt(
                titles, listed, min(shown, len(titles) - listed), self.words, rng
            )
            prompts.append(replace(prompt, whole=listed) if mix else prompt)
        return prompts

    def draw_questions(self, questions: list[str], rng) -> list[Prompt]:
        """Prompts that ask for a kind, with up to KEPT right answers each."""
        size = int(rng.integers(2 * KEPT, NUM_CANDIDATES + 1))
        right = int(rng.integers(KEPT + 1))
        return [
            kind_prompt(self.kinds, str(rng.choice(questions)), size, right, self.words, rng)
            for _ in range(self.num_prompts(size, shown=10))
        ]

    def num_prompts(self, size: int, shown: int, full: bool = False) -> int:
        """Prompts of a micro-batch with so many titles in list and history; fewer for short lists,
        which are learnt in small steps, unless `full`."""
        title = 1 if self.config.title_tokens else 4  # tokens; a rating is one more
        tokens = 30 + title * size + (title + 1) * shown
        share = 1 if self.config.title_tokens or full else self.list_size / NUM_CANDIDATES
        return max(4, int(self.config.batch_tokens * share / 2 / tokens))

    def tree(self, prompts: list[Prompt], rng) -> PromptTree:
        """One PromptTree: every answer by its first token, some of them to the end."""
        answers = [title for prompt in prompts for title in prompt.answers]
        completions = iter(self.tokenizer.encode_completions(answers))
        groups = []
        for prompt in prompts:
            ids = [next(completions) for _ in prompt.answers]
            whole = set(rng.permutation(len(ids))[: prompt.whole].tolist())
            groups.append([c if n in whole else c[:1] for n, c in enumerate(ids)])
        tree = build_tree(self.tokenizer.encode_prompts([p.text for p in prompts]), groups)
        if self.log is not None:
            tree = tree.with_prompt_labels(history_tokens(prompts, self.tokenizer))
        return tree

    def state(self) -> list:
        return [self.list_size, self.continues, self.begins]

    def load_state(self, state: list) -> None:
        self.list_size, self.continues, self.begins = state

    def update(self, continues: float, begins: float) -> None:
        """A step's shares: of later tokens that are right, of probability on listed firsts."""
        self.continues += 0.1 * (continues - self.continues)
        self.begins += 0.1 * (begins - self.begins)
        enough = 0.5 if self.log is not None and self.list_size >= 5 else self.BEGINS
        mastered = self.continues > self.CONTINUES and self.begins > enough
        if mastered and self.list_size < NUM_CANDIDATES:
            self.list_size += 1
            self.begins -= 0.05  # a few steps on the new size at least


# ------------------------------------------------------------------------ the loop
def learning_rate(step: int, config: PretrainConfig) -> float:
    warmup = min(1.0, (step + 1) / 100)
    if step >= config.steps:
        return 0.25 * config.learning_rate * (1 - (step - config.steps) / config.settle_steps)
    decay = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.learning_rate * warmup * (0.01 + 0.99 * decay)


def score(model: Transformer, tree) -> tuple[torch.Tensor, float, float]:
    """Mean NLL, the share of later tokens that are right,
    the probability of listed first tokens."""
    scored, greedy_ids = model(tree)
    M = len(tree.sequence_ids)  # tokens of answers; those of histories stand behind them
    token_logps, greedy_ids, labels = scored[:M], greedy_ids[:M], tree.labels[:M]
    first = torch.ones_like(tree.sequence_ids, dtype=torch.bool)
    first[1:] = tree.sequence_ids[1:] != tree.sequence_ids[:-1]
    right = (greedy_ids == labels)[~first].float().mean().item()
    # titles that begin alike share a first token: count its probability once
    prompt = tree.sequence_ids[first] // tree.num_completions
    pairs = torch.stack([prompt, labels[first]]).T
    _, index = np.unique(pairs.numpy(), axis=0, return_index=True)
    listed = token_logps.detach()[first][torch.from_numpy(index)].exp().sum().item()
    loss = sft_loss(token_logps, M)
    if len(scored) > M:
        loss = loss + HISTORY_WEIGHT * sft_loss(scored[M:], len(scored) - M)
    return loss, right, listed / len(tree.input_ids)


def made_from(
    config: PretrainConfig, kinds: list[list[str]], words: Words, log: Interactions | None
) -> str:
    """Hash of all that decides a base."""
    free = {"output_dir", "save_minutes", "logging_steps", *(f.name for f in fields(DataConfig))}
    options = {name: value for name, value in asdict(config).items() if name not in free}
    digest = hashlib.sha256(json.dumps([FORMAT, options, kinds, words], sort_keys=True).encode())
    if log is not None:
        for array in (log.item, log.rating, log.start, log.training_end()):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def save_checkpoint(
    file: Path, step: int, model, optimizer, practice: Practice, source: str
) -> None:
    """Weights, moments, and where practice stands after `step` steps; whole or not there."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[name] = p.detach()
        for moment in MOMENTS:
            tensors[f"{name}.{moment}"] = optimizer.state[p][moment]
    state = {"step": step, "practice": practice.state(), "source": source}
    part = file.with_suffix(".part")
    with writing(file):
        save_tensors(tensors, part, metadata={"state": json.dumps(state)})
        part.rename(file)


def load_checkpoint(file: Path, model, optimizer, practice: Practice, source: str) -> int:
    """Steps that were made before; ValueError if they were made with other titles or options."""
    with open_safetensors(file) as f:
        state = json.loads(f.metadata()["state"])
        tensors = {name: f.get_tensor(name) for name in f.keys()}
    if state["source"] != source:
        raise ValueError(f"{file} was made with other titles or options; delete it to start anew")
    updates, steps = state["step"], practice.config.steps
    if updates > steps:  # the last steps have an optimizer of their own
        updates -= steps
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[name])
            moments = {moment: tensors[f"{name}.{moment}"] for moment in MOMENTS}
            optimizer.state[p] = {"step": torch.tensor(float(updates)), **moments}
    practice.load_state(state["practice"])
    return state["step"]


def new_model(config: PretrainConfig, tokenizer: Tokenizer) -> Transformer:
    d = config.hidden_size
    model_config = ModelConfig(
        model_type="llama",
        vocab_size=-(-tokenizer.inner.get_vocab_size() // 64) * 64,
        hidden_size=d,
        intermediate_size=-(-8 * d // 3 // 64) * 64,  # whole blocks of --load_in_4bit
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        head_dim=config.head_dim,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_id,
    )
    return init_weights(model_config, config.seed)


def new_optimizer(model: Transformer) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def practise(model, optimizer, practice: Practice, step: int) -> np.ndarray:
    """One step; (mean NLL, share that continues rightly, probability on listed first tokens)."""
    config = practice.config
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    rng = np.random.default_rng([config.seed, 2, step])
    results, batches = [], practice.draw(step)
    for prompts in batches:
        loss, *shares = score(model, practice.tree(prompts, rng))
        (loss / len(batches)).backward()
        results.append((loss.item(), *shares))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    practice.update(results[1][1], results[0][2])  # going on: of mixed titles, not known by heart
    return np.array(results)


def pretrain(
    config: PretrainConfig,
    kinds: list[list[str]],
    words: Words,
    path: Path,
    log: Interactions | None = None,  # whose histories are practised, too
) -> None:
    """Make the base in `path`, or go on with one that was begun there."""
    if (count := sum(map(len, kinds))) < 2 * NUM_CANDIDATES:
        raise ValueError(
            f"{count} different titles are too few for a base: a history and a list of "
            f"{NUM_CANDIDATES} each need {2 * NUM_CANDIDATES}"
        )
    path.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path.resolve()}.part")  # a base that is there stays whole until the end
    checkpoint, source = part / "pretraining.safetensors", made_from(config, kinds, words, log)
    model, optimizer, practice = begin(config, kinds, words, part, log)
    start = 0
    if checkpoint.exists():
        start = load_checkpoint(checkpoint, model, optimizer, practice, source)
    saved = started = time.monotonic()
    num_steps = config.steps + config.settle_steps
    bar = tqdm(total=num_steps, initial=start, desc="base", disable=not sys.stderr.isatty())
    with all_cores(), stop_signals() as asked, bar:
        for step in range(start, num_steps):
            if step == config.steps:
                optimizer = new_optimizer(model)
            results = practise(model, optimizer, practice, step)
            bar.update()
            loss, continues, begins = results.mean(axis=0)
            if (step + 1) % config.logging_steps == 0:
                elapsed = time.monotonic() - started
                left = hours(elapsed / (step + 1 - start) * (num_steps - step - 1))
                bar.write(
                    f"base {step + 1:5}/{num_steps} | list {practice.list_size:2} "
                    f"| loss {loss:.3f} | continues {continues:.3f} | begins {begins:.3f} "
                    f"| {' '.join(f'{x:.2f}' for x in results[:, 2])} | left {left}",
                    file=sys.stdout,
                )
                sys.stdout.flush()
            if asked or time.monotonic() - saved > 60 * config.save_minutes:
                save_checkpoint(checkpoint, step + 1, model, optimizer, practice, source)
                saved = time.monotonic()
            if asked:
                kept = f"the base is kept after step {step + 1}; the same command goes on"
                raise Stopped(kept, 130 if signal.SIGINT in asked else 0)

    save_pretrained(model.half(), part)
    for file in [f for f in part.iterdir() if f.stem != checkpoint.stem]:
        file.replace(path / file.name)
    shutil.rmtree(part)
    print0(f"base written to {path}")


def begin(
    config: PretrainConfig,
    kinds: list[list[str]],
    words: Words,
    folder: Path,
    log: Interactions | None,
) -> tuple[Transformer, torch.optim.Optimizer, Practice]:
    """A new base, whose tokenizer is written to a folder."""
    write_tokenizer(folder, kinds, words, config)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 0}))  # the tokenizer asks
    tokenizer = Tokenizer(folder)
    practice, model = Practice(config, kinds, words, tokenizer, log), new_model(config, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print0(f"a base of {parameters:,} parameters for {len(practice.titles):,} titles")
    return model, new_optimizer(model), practice


@contextlib.contextmanager
def all_cores():
    """Other ranks wait meanwhile."""
    threads = torch.get_num_threads()
    if "RANK" in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def stop_signals():
    """A list that is empty until Ctrl-C or SIGTERM comes."""
    asked: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(n, lambda number, frame: asked.append(number)) for n in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# ------------------------------------------------------------------------ for a log
# Up to 1,000 titles, with the log's histories; above. Measured: NOTES.md.
SMALL_BASE = {"steps": 1700, "settle_steps": 150, "batch_tokens": 3000, "learning_rate": 3e-3}
LARGE_BASE = {"steps": 1600, "hidden_size": 256, "num_layers": 3, "num_heads": 4}


def kinds_of(log: Interactions, num_kinds: int, rounds: int = 30) -> list[list[str]]:
    """Titles that are chosen close together by the same users, before what training may not see.

    k-means, by cosine, over the leading directions of the positive pointwise mutual information of
    two items at most three interactions apart."""
    rng, row, inside = np.random.default_rng(0), np.arange(len(log.user)), log.training_end()
    together = np.zeros((log.num_items, log.num_items))
    for distance in (1, 2, 3):
        first, then = row[:-distance], row[distance:]
        pair = (log.user[first] == log.user[then]) & (then < inside[log.user[then]])
        np.add.at(together, (log.item[first[pair]], log.item[then[pair]]), 1 / distance)
    together += together.T
    share = together.sum(1) + 1e-9
    information = np.log(together * share.sum() / np.outer(share, share) + 1e-9).clip(0)
    directions, strengths, _ = np.linalg.svd(information)
    points = (directions * strengths**0.5)[:, :32]
    points /= np.linalg.norm(points, axis=1, keepdims=True) + 1e-9
    found = []
    for _ in range(10):  # starts
        centres = points[rng.choice(len(points), num_kinds, replace=False)]
        for _ in range(rounds):
            kind = (points @ centres.T).argmax(1)
            sums = np.stack([points[kind == k].sum(0) for k in range(num_kinds)])
            centres = sums / (np.linalg.norm(sums, axis=1, keepdims=True) + 1e-9)
        found.append((float((points * centres[kind]).sum()), kind))
    best = max(found, key=lambda start: start[0])[1]
    known = set(known_titles(log))
    kinds = [[log.titles[i] for i in np.flatnonzero(best == k)] for k in range(num_kinds)]
    kinds = [[title for title in kind if title in known] for kind in kinds]
    return [kind for kind in kinds if kind]


def titles_base(interactions: Interactions, folder: Path, dry_run: bool) -> Path:
    """The base for the titles of a log, below `folder` under a hash; made, if it is not there.

    A dry run makes none: it writes tokenizer and config, and says what the base would take."""
    kinds, words = [sorted(set(known_titles(interactions)))], interactions.words
    small = 2 * NUM_CANDIDATES <= len(kinds[0]) <= 1000
    if small:
        kinds = kinds_of(interactions, len(interactions.titles) // 16)
    config = PretrainConfig(title_tokens=True, **(SMALL_BASE if small else LARGE_BASE))
    log = interactions if small else None
    path = folder / f"titles-{made_from(config, kinds, words, log)[:12]}"
    if (path / "model.safetensors").exists():
        print0(f"the base for these titles was made before: {path}")
    elif dry_run:
        path = Path(tempfile.mkdtemp())
        model, optimizer, practice = begin(config, kinds, words, path, log)
        write_config(path, vars(model.config), torch.float16)
        practice.list_size = NUM_CANDIDATES
        practise(model, optimizer, practice, 0)
        started = time.monotonic()
        practise(model, optimizer, practice, 1)
        steps = config.steps + config.settle_steps
        print0(f"making it would take about {hours(steps * (time.monotonic() - started))}")
    else:
        pretrain(config, kinds, words, path, log)
    return path


def planted_kinds() -> list[list[str]]:
    """The titles of the planted world by genre."""
    world, kinds = planted.World(), {}
    for story, title in enumerate(world.titles()):
        kinds.setdefault(world.genre(story), []).append(title)
    return list(kinds.values())


def main() -> None:
    config = parse_config(PretrainConfig, beneath=data_defaults)
    path = Path(config.output_dir or f"runs/{config.dataset}-base")
    if config.dataset == planted.NAME:
        pretrain(config, planted_kinds(), planted.WORDS, path)
        return
    log = prepare(config).interactions
    pretrain(config, [sorted(set(known_titles(log)))], log.words, path)


if __name__ == "__main__":
    run_cli(main)
