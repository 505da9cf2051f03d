"""Validation users while a stage trains: a curve, and the weights of the best step.

Every --eval_steps steps, and at the end of a stage, --val_size users of the validation split (the
last interaction but one of each) are answered in one pass; an answer that no candidate verifies
counts as invalid, so this costs a prefill. The test split is not touched. Curves are lines of
phase "val" in metrics.jsonl.

With --keep best the trained weights of the step with the highest hit_ratio@1 (the earlier of equal
ones) are what is saved and tested. They are kept in memory, and in the stage's checkpoints.
"""

import json

import numpy as np
import torch
import torch.distributed as dist

from common import is_main, print0, writing
from data import Encoded, Examples, encode_examples
from runtime.checkpoint import Best
from runtime.sharding import local, trained

SHOWN = {  # metric -> what the screen calls it
    "hit_ratio@1": "written",
    "valid_ratio": "valid",
    "ranking/hit_ratio@1": "ranked first",
    "ranking/mrr": "mrr",
}
BEST_BY = "val/hit_ratio@1"


def encode_sample(val: Examples, tokenizer, config) -> Encoded | None:
    """The validation users of a run: --val_size of the split, drawn by the seed of the data."""
    size = min(config.val_size, len(val))
    if size == 0:
        return None
    rows = np.random.default_rng([config.data_seed, 1]).permutation(len(val))[:size]
    return encode_examples(val.select(np.sort(rows)), tokenizer, config.max_length)


def validate(stage, step: int, summary: dict | None) -> None:
    """Log a validation, and with --keep best remember the weights if none were better.

    `summary` is what the model has reached after `step` steps, on rank 0; all ranks must call."""
    shared = [None]
    if is_main():
        metrics = {f"val/{name}": summary[name] for name in ("n", *SHOWN)}
        file = stage.folder / "metrics.jsonl"
        with writing(file), open(file, "a") as f:
            f.write(json.dumps({"phase": "val", "step": step, **metrics}) + "\n")
        shown = " | ".join(f"{word} {metrics[f'val/{name}']:.4f}" for name, word in SHOWN.items())
        print0(f"{stage.name:5} {step:5} | val n {metrics['val/n']} | {shown}")
        shared = [metrics[BEST_BY]]
    dist.broadcast_object_list(shared)
    (value,) = shared
    if stage.run.config.keep == "best" and (stage.best is None or value > stage.best.value):
        weights = {
            name: local(p.detach()).to("cpu", copy=True) for name, p in trained(stage.model).items()
        }
        stage.best = Best(step, value, weights)


@torch.no_grad()
def load_best(stage) -> None:
    """With --keep best put the best step's weights into the model."""
    if stage.best is None:
        return
    print0(
        f"{stage.name}: keeping step {stage.best.step} of {stage.schedule.num_steps}, "
        f"{BEST_BY} {stage.best.value:.4f}"
    )
    for name, p in trained(stage.model).items():
        local(p).copy_(stage.best.weights[name])
