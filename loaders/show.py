"""Show a data set: statistics, what was left out, one example with its margins and boundaries.

python -m loaders --dataset movielens --data_dir ml-1m.zip"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import arg, parse_config
from data import Encoded, encode_examples, render_prompt
from hub.files import resolve_path
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, Prepared, data_defaults, prepare
from losses import target_margins

DEMO_BASE = Path(__file__).parents[1] / "demo" / "base"
TABLE_3 = {  # the paper's users, items, interactions, and how to read them: none is a 20-core
    "movielens": ((6040, 3952, 994169), "unfiltered, less one interaction per user"),
    "amazon_books": ((5103, 38203, 62290), "a sample of users, each less one interaction"),
    "steam": ((3171, 4251, 82072), "less one interaction per user (with it 20.05 per item)"),
    "beeradvocate": ((4724, 6105, 91207), "a sample of users (14.9 per item)"),
    "lastfm": ((982, 107296, 307829), "items are artists with a MusicBrainz id (2.9 per item)"),
}


@dataclass(frozen=True)
class ShowConfig(DataConfig):
    """Prepare examples; print statistics, what was left out, and one example with its margins."""

    tokenizer: str = arg(
        str(DEMO_BASE), "directory of the model whose tokenizer cuts the example", group="show"
    )
    max_length: int = arg(1024, "tokens of prompt and longest candidate")
    show: int = arg(0, "index of the training example that is shown", at_least=0)


def show() -> None:
    config = parse_config(ShowConfig, beneath=data_defaults)
    prepared = prepare(config)
    train = prepared.splits["train"]
    if config.show >= len(train):
        raise ValueError(f"--show must be between 0 and {len(train) - 1}, got {config.show}")
    print(f"{config.dataset}: prepared in {prepared.folder}, hash {prepared.hash[:16]}\n")
    print(statistics(config, prepared))
    tokenizer = Tokenizer(resolve_path(config.tokenizer))
    encoded = encode_examples(train, tokenizer, config.max_length)
    lengths = percentiles([len(ids) for ids in encoded.prompts], (0, 5, 50, 95, 100))
    print(f"prompt tokens ({config.tokenizer}): {lengths}")
    print(f"prompts shortened to --max_length {config.max_length}: {encoded.num_shortened}")
    print(example_text(encoded, config.show, tokenizer))


def statistics(config: DataConfig, prepared: Prepared) -> str:
    """Markdown: sizes before and after the filter and in the paper, then one line per property."""
    log = prepared.interactions
    sizes = {"read": tuple(prepared.raw_counts.values())}
    sizes[f"after --core {config.core}"] = log.num_users, log.num_items, len(log.user)
    if log.name in TABLE_3:
        paper, reading = TABLE_3[log.name]
        sizes[f"paper, Table 3: {reading}"] = paper
    out = ["|  | users | items | interactions |", "|---|---|---|---|"]
    out += [f"| {name} | {u:,} | {i:,} | {n:,} |" for name, (u, i, n) in sizes.items()]
    out += ["", "left out or changed while reading:"] if log.notes else []
    out += [f"  {count:>10,}  {why}" for why, count in log.notes.items()]

    rated = np.rint(log.rating[~np.isnan(log.rating)] * 2) / 2
    values, counts = np.unique(rated, return_counts=True)
    shares = (f"{v:g}: {n / len(rated):.1%}" for v, n in zip(values, counts))
    out += ["", f"ratings {', '.join(shares) or 'none'}"]
    for name, counts in (("user", np.diff(log.start)), ("item", np.bincount(log.item))):
        out.append(f"interactions per {name}: {percentiles(counts, (0, 25, 50, 75, 100))}")
    same = log.user[1:] == log.user[:-1]
    tied = same & (log.timestamp[1:] == log.timestamp[:-1])
    share = tied.sum() / max(1, same.sum())
    out.append(f"neighbours in a user's log with the same time, in the file's order: {share:.1%}")
    out.append(f"titles: {log.num_items:,}, the longest of {max(map(len, log.titles))} characters")
    for split, examples in prepared.splits.items():
        users = len(np.unique(log.user[examples.position]))
        few = split == "train" and len(examples) < config.train_size
        everything = f" (all there are; --train_size {config.train_size})" if few else ""
        out.append(f"{split}: {len(examples):,} examples of {users:,} users{everything}")
    return "\n".join(out)


def percentiles(counts, wanted: tuple[int, ...]) -> str:
    return ", ".join(f"{q}% {np.percentile(counts, q):.0f}" for q in wanted)


def example_text(encoded: Encoded, e: int, tokenizer: Tokenizer) -> str:
    """The prompt, the chosen and three rejected titles with scores and margins, the boundary."""
    example, slots = encoded.examples[e], encoded.examples.negatives(3)[e].tolist()
    scores = torch.tensor(example.scores)
    margins = target_margins(scores[[example.target]], scores[slots][None], "ratio")[0].tolist()
    out = [f"\n---- training example {e}, user {example.user}:\n", render_prompt(example), ""]
    title = example.candidates[example.target]
    out.append(f"chosen:   {title!r}, score {example.scores[example.target]:.3f}")
    for slot, margin in zip(slots, margins):
        kind = "random" if encoded.examples.is_random[e, slot] else "follows"
        name, score = example.candidates[slot], example.scores[slot]
        out.append(f"rejected: {name!r}, score {score:.3f} ({kind}), target margin {margin:.2f}")
    (completion,) = encoded.slots(e, [example.target])
    parts = []
    for ids in (encoded.prompts[e].tolist()[-3:], completion):
        tokens = [tokenizer.inner.decode([i], skip_special_tokens=False) for i in ids]
        parts.append(" ".join(map(repr, tokens)))
    ends = "(|| ends the prompt; all behind it is scored)"
    return "\n".join([*out, f"boundary: ... {' || '.join(parts)}   {ends}"])
