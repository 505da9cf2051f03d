"""A small base for titles of its own: pretrained to read lists, or fresh, to rank without them.

    python -m demo.pretrain --output_dir demo/base                demo/base again (49 minutes)
    python -m demo.pretrain --dataset csv --data_dir log.csv --title_tokens
    python train.py --model titles --dataset csv ...              a token per title, then SFT, RecPO

What real language models bring along is practised on made-up prompts (prompts.py): to find the list
and to write a title of it. A checkpoint lies beside the directory ("base.part"); the same command
goes on. Left out: several processes, GPUs, bf16 in training. What was tried: NOTES.md.
"""

import hashlib
import json
import math
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from common import arg, parse_config, print0, run_cli
from data import NUM_CANDIDATES, Interactions, PromptTree, Words, build_tree
from demo.prompts import Practice, Prompt, list_prompt
from hub.tokenizer import Tokenizer
from loaders import planted
from loaders.frozen import DataConfig, data_defaults, prepare
from losses import sft_loss
from model import ModelConfig, Transformer, init_weights, save_pretrained
from runtime.processes import progress

BASE = Path(__file__).parent / "base"
TITLES = "titles"  # train.py --model titles
PRACTISED = {"hidden_size": 256, "num_layers": 3, "num_heads": 4, "steps": 1600}
FRESH = {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "steps": 0, "settle_steps": 0}
EOS = "<|end_of_text|>"
# Llama-3's pre-tokenizer (a word with its leading space, up to three digits, punctuation, line
# breaks), but for the first alternative: a rating behind a title is one token, not four.
SPLIT = (
    r" \| Rating: \d(?:\.\d)?|(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCAB_SIZE, HEAD_DIM, PEAK_RATE = 1024, 64, 2e-3  # heads of 32 are too few to bind words
SAVE_STEPS = 200  # between checkpoints
FORMAT = 3  # raised when the same titles and options give another base than before


@dataclass(frozen=True)
class PretrainConfig(DataConfig):
    """Make a small base that reads lists of the titles of a log, as a Hugging Face directory."""

    output_dir: str = arg("", "where it goes (default: runs/<dataset>-base)", group="base")
    title_tokens: bool = arg(False, "a token of its own for each title: shorter prompts")
    hidden_size: int = arg(128, "width", at_least=1)
    num_layers: int = arg(4, "blocks", at_least=1)
    num_heads: int = arg(2, "attention heads, each with keys and values of its own", at_least=1)
    steps: int = arg(6000, "optimizer steps", at_least=0)
    settle_steps: int = arg(450, "steps after these, which prefer no kind", at_least=0)
    batch_tokens: int = arg(4096, "prompt tokens per step; doubled by questions", at_least=1)
    seed: int = arg(0, "seed of weights and prompts")


def known_titles(log: Interactions) -> list[str]:
    """All titles of the log; with a split in time those of the items that training sees."""
    end = log.start[1:] if log.train_end is None else log.train_end
    known = log.item[np.arange(len(log.item)) < end[log.user]]
    return sorted({log.titles[item] for item in np.unique(known)})


def write_tokenizer(path: Path, texts, titles=(), vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE of these texts, which encodes any text, and a token for each of `titles`.

    A space goes behind every line break: a title has the same tokens in a list and as an answer. A
    title's own token takes that space along; a title that it would not be decoded to is spelled."""
    inner = HFTokenizer(models.BPE())
    inner.normalizer = normalizers.Replace("\n", "\n ")
    cut = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([cut, letters])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOS], show_progress=False)
    trainer.initial_alphabet = letters.alphabet()
    inner.train_from_iterator(texts, trainer)
    own = [title for title in titles if inner.decoder.decode([title]) == title]
    inner.add_tokens([AddedToken(t, lstrip=True, single_word=True, normalized=False) for t in own])
    path.mkdir(parents=True, exist_ok=True)
    inner.save(str(path / "tokenizer.json"))
    settings = {"eos_token": EOS, "model_max_length": 4096}
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return Tokenizer(path)


def directions(log: Interactions, size: int) -> np.ndarray:
    """(num_items, size) unit vectors; items that the same users choose close together are near.

    The leading directions of the positive pointwise mutual information of two training items at
    most three interactions apart (Levy and Goldberg 2014); 0 for an item that has none."""
    known, n = np.arange(len(log.user)) < log.training_end()[log.user], log.num_items
    user, item = log.user[known], log.item[known].astype(np.int64)
    cells, counts = [], []
    for distance in (1, 2, 3):
        same = user[:-distance] == user[distance:]
        a, b = item[:-distance][same], item[distance:][same]
        cells += [a * n + b, b * n + a]
        counts += [np.full(2 * len(a), 1 / distance)]
    cells, place = np.unique(np.concatenate(cells), return_inverse=True)
    together = np.bincount(place, np.concatenate(counts))
    a, b = np.divmod(cells, n)
    share = np.bincount(a, together, n)
    information = np.log(together * share.sum() / (share[a] * share[b])).clip(0)
    matrix = torch.sparse_coo_tensor(np.stack([a, b]), information, (n, n), check_invariants=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vectors, strengths, _ = torch.svd_lowrank(matrix, q=min(2 * size, n), niter=8)
    points = (vectors * strengths**0.5)[:, :size].numpy()
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-6)


def place_titles(model: Transformer, tokenizer: Tokenizer, log: Interactions, seed: int) -> None:
    """Titles that are chosen close together begin with similar embeddings: half of a row's square
    is its item's direction, turned at random, the other half stays noise."""
    points, rows = directions(log, 32), model.model.embed_tokens.weight
    noise = np.random.default_rng(seed).normal(size=(rows.shape[1], points.shape[1]))
    turned = torch.from_numpy(points @ np.linalg.qr(noise)[0].T).float()
    with torch.no_grad():
        for ids, point in zip(tokenizer.encode_completions(log.titles), turned, strict=True):
            if len(ids) == 2 and point.norm() > 0.5:  # its own token, and the end
                rows[ids[0]] = (rows[ids[0]] + rows[ids[0]].norm() * point) / 2**0.5


def new_base(config, kinds, words: Words, path: Path, log=None) -> tuple[Transformer, Tokenizer]:
    """(Random weights, tokenizer, written to `path`); with a log, similar titles begin near."""
    titles, rng, d = sum(kinds, []), np.random.default_rng(0), config.hidden_size
    if (count := len(titles)) < 2 * NUM_CANDIDATES:  # a history and a list
        raise ValueError(f"{count} titles are too few for a base: it needs {2 * NUM_CANDIDATES}")
    texts = [f" {title}" for title in titles]
    texts += [list_prompt(titles, 20, 10, words, rng).text for _ in range(1000)]
    tokenizer = write_tokenizer(path, texts, titles if config.title_tokens else ())
    shape = ModelConfig(
        model_type="llama",
        vocab_size=math.ceil(tokenizer.inner.get_vocab_size() / 64) * 64,
        hidden_size=d,
        intermediate_size=math.ceil(8 * d / 3 / 64) * 64,  # whole blocks of --load_in_4bit
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_id,
    )
    model = init_weights(shape, config.seed)
    if log is not None:
        place_titles(model, tokenizer, log, config.seed)
    return model, tokenizer


def new_optimizer(model: Transformer) -> torch.optim.AdamW:
    matrices, norms = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, config: PretrainConfig) -> float:
    if step >= config.steps:
        return 0.25 * PEAK_RATE * (1 - (step - config.steps) / config.settle_steps)
    decay = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return PEAK_RATE * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * decay)


def answer_tree(prompts: list[Prompt], tokenizer: Tokenizer, rng) -> PromptTree:
    """A tree that scores every answer's first token, the hard one, and some answers to the end."""
    groups = []
    for prompt in prompts:
        answers = tokenizer.encode_completions(prompt.answers)
        whole = rng.permutation(len(answers))[: prompt.whole]
        groups.append([ids if n in whole else ids[:1] for n, ids in enumerate(answers)])
    return build_tree(tokenizer.encode_prompts([prompt.text for prompt in prompts]), groups)


def practise(model, optimizer, tokenizer: Tokenizer, practice: Practice, step: int) -> list[tuple]:
    """Make one step; per part (mean NLL, share of right later tokens, probability on listed)."""
    config, batches, results = practice.config, practice.draw(step), []
    rng = np.random.default_rng([config.seed, 2, step])
    for prompts in batches:
        tree = answer_tree(prompts, tokenizer, rng)
        token_logps, greedy_ids = model(tree)
        loss = sft_loss(token_logps, len(token_logps))
        (loss / len(batches)).backward()
        first = tree.sequence_ids.diff(prepend=torch.tensor([-1])) > 0
        right = (greedy_ids == tree.labels)[~first].float().mean().item()
        # titles that begin alike share a first token: count its probability once
        pairs = torch.stack([tree.sequence_ids // tree.num_completions, tree.labels])[:, first]
        _, index = np.unique(pairs.numpy(), axis=1, return_index=True)
        listed = token_logps.detach()[first][index].exp().sum().item() / len(prompts)
        results.append((loss.item(), right, listed))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.step()
    optimizer.zero_grad()
    lists, mixed_lists = results[:2]
    practice.update(continues=mixed_lists[1], begins=lists[2])  # mixed: not known by heart
    return results


def made_from(config, kinds: list[list[str]], words: Words, log: Interactions | None = None) -> str:
    """Hash of all that decides a base."""
    options = {n: getattr(config, n) for n in PretrainConfig.__annotations__ if n != "output_dir"}
    options |= {"vocab_size": VOCAB_SIZE, "head_dim": HEAD_DIM, "learning_rate": PEAK_RATE}
    digest = hashlib.sha256(json.dumps([FORMAT, options, kinds, words], sort_keys=True).encode())
    for array in (log.item, log.start, log.training_end()) if log else ():
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def pretrain(config, kinds: list[list[str]], words: Words, path: Path, log=None) -> None:
    """Make the base in `path`, or go on with one that was begun there by the same options."""
    part = Path(f"{path.resolve()}.part")  # a base that is there stays whole until the end
    checkpoint = part / f"{made_from(config, kinds, words, log)[:12]}.pt"
    model, tokenizer = new_base(config, kinds, words, part, log)
    practice, optimizer = Practice(config, kinds, words), new_optimizer(model)
    start, stop = 0, config.steps + config.settle_steps
    if checkpoint.exists():
        state, weights, moments = torch.load(checkpoint, weights_only=True)
        start, practice.list_size, practice.continues, practice.begins = state
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    bar = progress(range(start, stop), "base", stop - start)
    for step in bar:
        if step == config.steps:
            optimizer = new_optimizer(model)
        loss, _, begins = np.mean(practise(model, optimizer, tokenizer, practice, step), 0)
        bar.set_postfix(lists=practice.list_size, loss=loss, begins=begins, refresh=False)
        if (step + 1) % SAVE_STEPS == 0:
            state = [step + 1, practice.list_size, practice.continues, practice.begins]
            torch.save((state, model.state_dict(), optimizer.state_dict()), part / "new.pt")
            (part / "new.pt").replace(checkpoint)
    save_pretrained(model.half(), part)
    path.mkdir(parents=True, exist_ok=True)
    for file in (*part.glob("*.json"), part / "model.safetensors"):
        file.replace(path / file.name)
    shutil.rmtree(part)
    print0(f"base written to {path}")


def titles_base(log: Interactions, folder: Path, practised: bool, dry_run: bool) -> Path:
    """The base for the titles of a log, below `folder` under a hash; a dry run takes no step."""
    config = PretrainConfig(title_tokens=True, **(PRACTISED if practised else FRESH))
    kinds, placed = [known_titles(log)], None if practised else log
    path = folder / f"titles-{made_from(config, kinds, log.words, placed)[:12]}"
    if not (path / "model.safetensors").exists():
        if practised:
            print0(f"{path} is made in {config.steps + config.settle_steps} steps of about 0.7 s")
        if dry_run:
            path, config = Path(tempfile.mkdtemp()), replace(config, steps=0, settle_steps=0)
        pretrain(config, kinds, log.words, path, placed)
    return path


def main() -> None:
    config = parse_config(PretrainConfig, beneath=data_defaults)
    log, world = prepare(config).interactions, planted.World()
    kinds = [known_titles(log)]
    if config.dataset == planted.NAME:  # by genre
        kinds = np.reshape(world.titles(), (world.num_genres, -1)).tolist()
    pretrain(config, kinds, log.words, Path(config.output_dir or f"runs/{config.dataset}-base"))


if __name__ == "__main__":
    run_cli(main)
