"""python -m loaders: show a data set's sizes, what was left out, and one example."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import arg, parse_config
from data import render_prompt
from hub.files import resolve_path
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, Prepared, data_defaults, prepare
from losses import target_margins

DEMO_BASE = str(Path(__file__).parents[1] / "demo/base")


@dataclass(frozen=True)
class ShowConfig(DataConfig):
    """Show a data set: sizes, what was left out, one example with its margins and boundary."""

    tokenizer: str = arg(DEMO_BASE, "folder of the model whose tokenizer cuts", group="show")
    show: int = arg(0, "index of the training example that is shown", at_least=0)


def statistics(prepared: Prepared) -> list[str]:
    """Lines: the sizes of the log and its splits, and what was left out."""
    log = prepared.interactions
    out = [f"{log.num_users:,} users, {log.num_items:,} items, {len(log.user):,} interactions"]
    out += [f"left out or changed: {count:,} {why}" for why, count in log.notes.items()]
    for split, examples in prepared.splits.items():
        users = len(np.unique(log.user[examples.position]))
        out.append(f"{split}: {len(examples):,} examples of {users:,} users")
    return out


def show() -> None:
    config = parse_config(ShowConfig, beneath=data_defaults)
    prepared = prepare(config)
    print(f"{config.dataset}: prepared in {prepared.folder}, hash {prepared.hash[:16]}\n")
    print(*statistics(prepared), sep="\n")

    train, tokenizer = prepared.splits["train"], Tokenizer(resolve_path(config.tokenizer))
    if config.show >= len(train):
        raise ValueError(f"--show must be between 0 and {len(train) - 1}, got {config.show}")
    example, slots = train[config.show], train.negatives(3)[config.show]
    kinds = np.where(train.is_random[config.show], "random", "follows")
    text, chosen, scores = render_prompt(example), example.target, torch.tensor(example.scores)
    scored = [f"{t!r}, score {s:.3f}" for t, s in zip(example.candidates, example.scores)]
    print(f"\n---- training example {config.show}:\n\n{text}\n\nchosen:   {scored[chosen]}")
    margins = target_margins(scores[[chosen]], scores[slots][None], "ratio")[0]
    for n, margin in zip(slots, margins):
        print(f"rejected: {scored[n]} ({kinds[n]}), score ratio {margin:.2f}")
    (prompt,) = tokenizer.encode_prompts([text])
    (answer,) = tokenizer.encode_completions([example.candidates[chosen]])
    ids = [*prompt[-3:], *answer]
    tokens = [repr(tokenizer.inner.decode([i], skip_special_tokens=False)) for i in ids]
    print("boundary: ...", *tokens[:3], "||", *tokens[3:], "  (|| ends the prompt)")
