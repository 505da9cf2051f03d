"""python -m loaders: show a data set's sizes, what was left out, and one example."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import arg, parse_config, table
from data import encode_examples, render_prompt
from hub.files import resolve_path
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, Prepared, data_defaults, prepare
from losses import target_margins

TABLE_3 = {  # the paper's users, items and interactions (docs/deviations.md: none is a 20-core)
    "movielens": (6040, 3952, 994169),
    "amazon_books": (5103, 38203, 62290),
    "steam": (3171, 4251, 82072),
    "beeradvocate": (4724, 6105, 91207),
    "lastfm": (982, 107296, 307829),
}
DEMO_BASE = str(Path(__file__).parents[1] / "demo/base")


@dataclass(frozen=True)
class ShowConfig(DataConfig):
    """Show a data set: sizes, what was left out, one example with its margins and boundary."""

    tokenizer: str = arg(DEMO_BASE, "folder of the model whose tokenizer cuts", group="show")
    max_length: int = arg(1024, "tokens of prompt and longest candidate")
    show: int = arg(0, "index of the training example that is shown", at_least=0)


def statistics(config: DataConfig, prepared: Prepared) -> str:
    """Markdown: sizes as read, after the filter and in the paper, then one line per property."""
    log = prepared.interactions
    sizes = {"read": prepared.raw_counts.values()}
    sizes[f"after --core {config.core}"] = log.num_users, log.num_items, len(log.user)
    if log.name in TABLE_3:
        sizes["the paper's Table 3"] = TABLE_3[log.name]
    rows = [[name, *(f"{count:,}" for count in counts)] for name, counts in sizes.items()]
    out = [table(["", "users", "items", "interactions"], rows), ""]
    out += [f"left out or changed: {count:,} {why}" for why, count in log.notes.items()]
    liked = (log.rating >= config.min_rating).mean()
    out.append(f"rated {config.min_rating:g} or more: {liked:.1%}")
    for name, counts in (("user", np.diff(log.start)), ("item", np.bincount(log.item))):
        quartiles = ", ".join(f"{q}% {np.percentile(counts, q):.0f}" for q in (0, 25, 50, 75, 100))
        out.append(f"interactions per {name}: {quartiles}")
    for split, examples in prepared.splits.items():
        users = len(np.unique(log.user[examples.position]))
        out.append(f"{split}: {len(examples):,} examples of {users:,} users")
    return "\n".join(out)


def show() -> None:
    config = parse_config(ShowConfig, beneath=data_defaults)
    prepared = prepare(config)
    print(f"{config.dataset}: prepared in {prepared.folder}, hash {prepared.hash[:16]}\n")
    print(statistics(config, prepared))

    train, tokenizer = prepared.splits["train"], Tokenizer(resolve_path(config.tokenizer))
    if config.show >= len(train):
        raise ValueError(f"--show must be between 0 and {len(train) - 1}, got {config.show}")
    encoded = encode_examples(train.select([config.show]), tokenizer, config.max_length)
    example, (slots,) = encoded.examples[0], encoded.examples.negatives(3)
    print(f"\n---- training example {config.show}:\n\n{render_prompt(example)}\n")
    target, scores = example.target, torch.tensor(example.scores)
    print(f"chosen:   {example.candidates[target]!r}, score {scores[target]:.3f}")
    margins = target_margins(scores[[target]], scores[slots][None], "ratio")[0].tolist()
    for slot, margin in zip(slots.tolist(), margins):
        kind = "random" if encoded.examples.is_random[0, slot] else "follows"
        name, score = example.candidates[slot], example.scores[slot]
        print(f"rejected: {name!r}, score {score:.3f} ({kind}), target margin {margin:.2f}")
    (completion,), parts = encoded.slots(0, [target]), []
    for ids in (encoded.prompts[0].tolist()[-3:], completion):
        tokens = [tokenizer.inner.decode([i], skip_special_tokens=False) for i in ids]
        parts.append(" ".join(map(repr, tokens)))
    ends = "(|| ends the prompt; all behind it is scored)"
    print(f"boundary: ... {' || '.join(parts)}   {ends}")
