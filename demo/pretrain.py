"""A small base for titles of its own: pretrained to read lists, or fresh, to rank without them.

    python -m demo.pretrain --output_dir demo/base                demo/base again (49 minutes)
    python -m demo.pretrain --dataset csv --data_dir log.csv --title_tokens
    python train.py --model titles --dataset csv ...              a token per title, then SFT, RecPO

What real language models bring along is practised on made-up prompts (prompts.py): to find the list
in a prompt of this project, and to write a title that stands in it. All listed titles hang on one
PromptTree by their first token, which is the hard one, and a few of them whole, which is how a
title goes on and ends. Lists start short, with short histories and few different titles, and grow
as the answers get right. Then, where kinds of titles are known, questions about kinds are practised
too. In the last steps (--settle_steps) any listed title answers a recommender's prompt. A
checkpoint every few minutes lies beside the directory ("base.part"); the same command goes on.

Without a list in the prompt there is nothing to practise: `--model titles` then starts from random
weights, with titles that are chosen close together near each other. What was tried: NOTES.md.
Left out: several processes, GPUs, bf16 in training.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from common import arg, hours, parse_config, print0, run_cli, writing
from data import NUM_CANDIDATES, Interactions, PromptTree, Words
from demo.prompts import Practice, made_up_prompt
from hub.config import write_config
from hub.tokenizer import Tokenizer
from loaders import planted
from loaders.frozen import DataConfig, data_defaults, prepare
from losses import sft_loss
from model import ModelConfig, Transformer, init_weights, save_pretrained
from runtime.processes import progress

BASE = Path(__file__).parent / "base"
TITLES = "titles"  # train.py --model titles
EOS = "<|end_of_text|>"
# Llama-3's pre-tokenizer (a word with its leading space, up to three digits, punctuation, line
# breaks), but for the first alternative: a rating behind a title is one token, not four.
SPLIT = (
    r" \| Rating: \d(?:\.\d)?|(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_DIRECTIONS = 32  # of items, in which titles that are chosen together are near
FORMAT = 3  # raised when the same titles and options give another base than before


@dataclass(frozen=True)
class PretrainConfig(DataConfig):
    """Make a small base that reads lists of the titles of a log, as a Hugging Face directory."""

    output_dir: str = arg("", "where it goes (default: runs/<dataset>-base)", group="base")
    vocab_size: int = arg(1024, "tokens of the tokenizer, at most", at_least=300)
    title_tokens: bool = arg(
        False, "beside them a token for each title: prompts a third as long, nothing to spell"
    )
    hidden_size: int = arg(128, "width", at_least=1)
    num_layers: int = arg(4, "blocks", at_least=1)
    num_heads: int = arg(2, "attention heads, each with keys and values of its own", at_least=1)
    head_dim: int = arg(64, "width of a head; 32 are too few to bind words", at_least=2)
    steps: int = arg(6000, "optimizer steps", at_least=0)
    settle_steps: int = arg(450, "steps behind them, which prefer no kind", at_least=0)
    batch_tokens: int = arg(
        4096, "prompt tokens of a step, about; twice with questions", at_least=1
    )
    learning_rate: float = arg(2e-3, "peak; warm-up, then a cosine to a hundredth of it", above=0)
    seed: int = arg(0, "seed of weights and prompts")
    save_minutes: float = arg(3.0, "minutes between checkpoints", at_least=0)


# ------------------------------------------------------------------------ tokenizer and model
def known_titles(interactions: Interactions) -> list[str]:
    """All titles of the log; with a split in time those of the items that training sees."""
    items = interactions.item
    if interactions.train_end is not None:
        rows = np.arange(len(items))
        items = items[rows < interactions.training_end()[interactions.user]]
    return sorted({interactions.titles[item] for item in np.unique(items)})


def train_tokenizer(texts: list[str], vocab_size: int) -> HFTokenizer:
    """A byte-level BPE of these texts, which encodes any text.

    A space goes behind every line break, so that a title has the same tokens in a list and behind
    "Answer:"."""
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace("\n", "\n ")
    cut = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[EOS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(path: Path, kinds: list[list[str]], words: Words, config) -> None:
    """The tokenizer of titles and made-up prompts, of a PretrainConfig, in a folder.

    A title's own token takes the white space before it along; a title whose token would not be
    decoded to its text goes on being spelled."""
    titles, rng = [title for kind in kinds for title in kind], np.random.default_rng(0)
    prompts = [made_up_prompt(titles, 20, 10, words, rng) for _ in range(1000)]
    texts = [" " + title for title in titles] + [prompt.text for prompt in prompts]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    if config.title_tokens:
        whole = [AddedToken(t, lstrip=True, single_word=True, normalized=False) for t in titles]
        trial = HFTokenizer.from_str(tokenizer.to_str())
        trial.add_tokens(whole)
        spelled = {t for t in titles if trial.decode([trial.token_to_id(t)]) != t}
        tokenizer.add_tokens([token for token in whole if token.content not in spelled])
    save_tokenizer(tokenizer, path)


def save_tokenizer(tokenizer: HFTokenizer, path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": EOS, "model_max_length": 4096}
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


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


def new_optimizer(model: Transformer) -> torch.optim.AdamW:
    matrices, norms = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


# ------------------------------------------------------------------------ the loop
def learning_rate(step: int, config: PretrainConfig) -> float:
    if step >= config.steps:
        return 0.25 * config.learning_rate * (1 - (step - config.steps) / config.settle_steps)
    decay = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.learning_rate * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * decay)


def score(model: Transformer, tree: PromptTree) -> tuple[torch.Tensor, float, float]:
    """Mean NLL, the share of later tokens that are right,
    the probability of listed first tokens."""
    token_logps, greedy_ids = model(tree)
    first = torch.ones_like(tree.sequence_ids, dtype=torch.bool)
    first[1:] = tree.sequence_ids[1:] != tree.sequence_ids[:-1]
    right = (greedy_ids == tree.labels)[~first].float().mean().item()
    # titles that begin alike share a first token: count its probability once
    pairs = torch.stack([tree.sequence_ids[first] // tree.num_completions, tree.labels[first]]).T
    _, index = np.unique(pairs.numpy(), axis=0, return_index=True)
    listed = token_logps.detach()[first][torch.from_numpy(index)].exp().sum().item()
    return sft_loss(token_logps, len(token_logps)), right, listed / len(tree.input_ids)


def practise(model, optimizer, practice: Practice, step: int) -> np.ndarray:
    """One step; (mean NLL, share that continues rightly, probability on listed first tokens) of
    each micro-batch."""
    config = practice.config
    rng = np.random.default_rng([config.seed, 2, step])
    results, batches = [], practice.draw(step)
    for prompts in batches:
        loss, *shares = score(model, practice.tree(prompts, rng))
        (loss / len(batches)).backward()
        results.append((loss.item(), *shares))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.step()
    optimizer.zero_grad()
    lists, mixed_lists = results[:2]
    practice.update(continues=mixed_lists[1], begins=lists[2])  # mixed: not known by heart
    return np.array(results)


def made_from(config, kinds: list[list[str]], words: Words, log: Interactions | None = None) -> str:
    """Hash of all that decides a base."""
    free = {"output_dir", "save_minutes", *(f.name for f in fields(DataConfig))}
    options = {name: value for name, value in asdict(config).items() if name not in free}
    digest = hashlib.sha256(json.dumps([FORMAT, options, kinds, words], sort_keys=True).encode())
    for array in (log.item, log.start, log.training_end()) if log else ():
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def begin(
    config, kinds: list[list[str]], words: Words, folder: Path, log: Interactions | None = None
) -> tuple[Transformer, Practice]:
    """A base of random weights and its practice; the tokenizer is written to the folder.

    With a log, titles that are chosen close together are near each other."""
    if (count := sum(map(len, kinds))) < 2 * NUM_CANDIDATES:
        raise ValueError(
            f"{count} different titles are too few for a base: a history and a list of "
            f"{NUM_CANDIDATES} each need {2 * NUM_CANDIDATES}"
        )
    write_tokenizer(folder, kinds, words, config)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 0}))  # the tokenizer asks
    tokenizer = Tokenizer(folder)
    model = new_model(config, tokenizer)
    if log is not None:
        place_titles(model, tokenizer, log, config.seed)
    print0(f"a base of {sum(p.numel() for p in model.parameters()):,} parameters, {count:,} titles")
    return model, Practice(config, kinds, words, tokenizer)


def pretrain(
    config: PretrainConfig,
    kinds: list[list[str]],
    words: Words,
    path: Path,
    log: Interactions | None = None,
) -> None:
    """Make the base in `path`, or go on with one that was begun there."""
    part = Path(f"{path.resolve()}.part")  # a base that is there stays whole until the end
    checkpoint, source, start = part / "pretraining.pt", made_from(config, kinds, words, log), 0
    model, practice = begin(config, kinds, words, part, log)
    optimizer = new_optimizer(model)
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        if kept["source"] != source:
            raise ValueError(f"{checkpoint}: made with other titles or options; delete {part}")
        start, practice.list_size, practice.continues, practice.begins = kept["state"]
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
    saved, num_steps = time.monotonic(), config.steps + config.settle_steps
    bar = progress(range(start, num_steps), "base", num_steps - start)
    for step in bar:
        if step == config.steps:
            optimizer = new_optimizer(model)
        loss, continues, begins = practise(model, optimizer, practice, step).mean(axis=0)
        shown = f"lists of {practice.list_size}, loss {loss:.2f}, continues {continues:.2f}"
        bar.set_postfix_str(f"{shown}, begins {begins:.2f}", refresh=False)
        if time.monotonic() - saved > 60 * config.save_minutes:
            kept = {"source": source, "model": model.state_dict()}
            kept["optimizer"] = optimizer.state_dict()
            kept["state"] = [step + 1, practice.list_size, practice.continues, practice.begins]
            with writing(checkpoint):
                torch.save(kept, f"{checkpoint}.new")
                os.replace(f"{checkpoint}.new", checkpoint)
            saved = time.monotonic()
    path.mkdir(parents=True, exist_ok=True)
    save_pretrained(model.half(), part)
    for file in [f for f in part.iterdir() if f.stem != "pretraining"]:
        file.replace(path / file.name)
    shutil.rmtree(part)
    print0(f"base written to {path}")


# ------------------------------------------------------------------------ for a log
PRACTISED = {"hidden_size": 256, "num_layers": 3, "num_heads": 4, "steps": 1600}
FRESH = {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "steps": 0, "settle_steps": 0}


def directions(log: Interactions, size: int) -> np.ndarray:
    """(num_items, size) unit vectors; items that the same users choose close together are near.

    The leading directions of the positive pointwise mutual information of two items at most three
    interactions apart (Levy and Goldberg 2014), before what training may not see; 0 for an item
    that has none."""
    row, inside, n = np.arange(len(log.user)), log.training_end(), log.num_items
    cells, counts = [], []
    for distance in (1, 2, 3):
        first, then = row[:-distance], row[distance:]
        pair = (log.user[first] == log.user[then]) & (then < inside[log.user[then]])
        a, b = log.item[first[pair]].astype(np.int64), log.item[then[pair]].astype(np.int64)
        cells += [a * n + b, b * n + a]
        counts += [np.full(2 * len(a), 1 / distance)]
    cells, place = np.unique(np.concatenate(cells), return_inverse=True)
    together = np.bincount(place, np.concatenate(counts))
    a, b = cells // n, cells % n
    share = np.bincount(a, together, n)
    information = np.log(together * share.sum() / (share[a] * share[b])).clip(0)
    cells, values = torch.from_numpy(np.stack([a, b])), torch.from_numpy(information)
    matrix = torch.sparse_coo_tensor(cells, values, (n, n), check_invariants=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vectors, strengths, _ = torch.svd_lowrank(matrix, q=min(2 * size, n), niter=8)
    points = (vectors * strengths**0.5)[:, :size].numpy()
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-6)


def place_titles(model: Transformer, tokenizer: Tokenizer, log: Interactions, seed: int) -> None:
    """Titles that are chosen close together begin with similar embeddings: half of a row's square
    is its item's direction, turned at random, the other half stays noise."""
    points = directions(log, NUM_DIRECTIONS)
    rng, rows = np.random.default_rng(seed), model.model.embed_tokens.weight
    turn, _ = np.linalg.qr(rng.normal(size=(rows.shape[1], points.shape[1])))
    completions = tokenizer.encode_completions(log.titles)
    with torch.no_grad():
        for ids, point in zip(completions, torch.from_numpy(points @ turn.T).float(), strict=True):
            if len(ids) == 2 and point.norm() > 0.5:  # its own token, and the end
                rows[ids[0]] = (rows[ids[0]] + rows[ids[0]].norm() * point) / 2**0.5


def titles_base(log: Interactions, folder: Path, practised: bool, dry_run: bool) -> Path:
    """The base for the titles of a log, below `folder` under a hash; made, if it is not there.

    `practised`: it reads lists, else it is fresh. A dry run makes none: it writes tokenizer and
    config, and says what the base would take."""
    config = PretrainConfig(title_tokens=True, **(PRACTISED if practised else FRESH))
    recipe = [known_titles(log)], log.words
    placed = None if practised else log
    path = folder / f"titles-{made_from(config, *recipe, placed)[:12]}"
    if (path / "model.safetensors").exists():
        print0(f"the base for these titles was made before: {path}")
    elif not dry_run:
        pretrain(config, *recipe, path, placed)
    else:
        path, started = Path(tempfile.mkdtemp()), time.monotonic()
        model, practice = begin(config, *recipe, path, placed)
        write_config(path, vars(model.config), torch.float16)
        if practised:
            practice.list_size, started = NUM_CANDIDATES, time.monotonic()
            practise(model, new_optimizer(model), practice, 0)
        seconds = (time.monotonic() - started) * max(1, config.steps)
        print0(f"making it would take about {hours(seconds)}")
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
        kinds, words = planted_kinds(), planted.WORDS
    else:
        log = prepare(config).interactions
        kinds, words = [known_titles(log)], log.words
    pretrain(config, kinds, words, path)


if __name__ == "__main__":
    run_cli(main)
