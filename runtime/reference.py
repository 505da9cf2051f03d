"""Reference log-probs: those of the policy before its first step, kept in the run folder.

There is no second model. The file is an input of the stage, known by what it was made from:
weights, token ids, dtype. How the work was divided is no part of that: a run that goes on reads it
with any number of processes and micro-batches of any size. Where it is missing, it is computed
again from the stage's starting weights, before any checkpoint is read.

Legend: E training examples, N completions per example.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from common import is_main, print0, writing
from data import Encoded, to_device
from hub.files import open_safetensors, save_tensors
from runtime.passes import any_rank, prefetch, progress
from runtime.policy import stored_dtype
from runtime.runs import Run
from runtime.sharding import reshard


def reference_key(weights: str, encoded: Encoded, slots: np.ndarray, precision: str) -> str:
    """Hash of all that the log-probs depend on: no computed number, no division of the work."""
    digest = hashlib.sha256(f"{weights} {precision}".encode())
    for e, prompt in enumerate(encoded.prompts):
        completions = encoded.slots(e, slots[e])  # ids of N titles
        digest.update(f"{len(prompt)} {completions}".encode() + prompt.tobytes())
    return digest.hexdigest()


def write_reference(file: Path, key: str, logps: Tensor) -> None:
    """The file appears whole or not at all. Its checksum tells of damage; it identifies nothing."""
    beside = file.with_suffix(".part")
    with writing(file):
        save_tensors({"logps": logps}, beside, metadata={"key": key, "sha256": checksum(logps)})
        beside.rename(file)


def read_reference(file: Path, key: str, needed: Tensor, num_completions: int) -> Tensor | None:
    """Stored log-probs (E, N), or None, with a note if a file is there; `needed` is (E,) bool."""
    if not file.exists():
        return None
    try:
        with open_safetensors(file) as f:
            metadata = f.metadata() or {}
            logps = f.get_tensor("logps").clone()  # not a view of the file, which may change
    except (SafetensorError, OSError, ValueError) as error:
        print0(f"note: {file} cannot be read ({error}); computing it again")
        return None

    problem = ""
    if metadata.get("key") != key:
        problem = "was made from other weights or examples"
    elif logps.shape != (len(needed), num_completions) or logps.dtype != torch.float32:
        problem = f"holds {tuple(logps.shape)} {logps.dtype} instead of log-probs per title"
    elif metadata.get("sha256") != checksum(logps):
        problem = "is damaged"
    elif logps[needed].isnan().any():
        problem = "lacks examples of this run"
    if problem:
        print0(f"note: {file} {problem}; computing it again")
        return None
    return logps


def checksum(logps: Tensor) -> str:
    return hashlib.sha256(logps.numpy().tobytes()).hexdigest()


def first_epoch(schedule) -> range:
    """The steps in which each example that the stage ever sees comes once."""
    return range(min(schedule.num_steps, schedule.steps_per_epoch))


def needed_examples(schedule) -> Tensor:
    """(E,) True for the examples that the stage sees."""
    needed = torch.zeros(len(schedule.widths), dtype=torch.bool)
    for step in first_epoch(schedule):
        needed[schedule.examples(step)] = True
    return needed


@torch.no_grad()
def reference_pass(objective, schedule, rank: int) -> Tensor:
    """Log-probs (E, N) of the model as it is now; NaN for examples that the stage never sees.

    It runs the very micro-batches of the first epoch, so that the first rewards are exactly
    zero."""
    planned = [
        (batch, schedule.examples(step))
        for step in first_epoch(schedule)
        for batch in schedule.micro_batches(step, rank)
    ]
    prepared = prefetch(lambda plan: objective.prepare(*plan), planned)
    passes = progress(zip(planned, prepared, strict=True), "reference", len(planned))

    logps = torch.zeros(objective.slots.shape, device=objective.device)
    for (batch, _), micro_batch in passes:
        sums = micro_batch.tree.sum_logps(objective.model(micro_batch.tree)[0])
        if batch:
            logps[to_device(torch.tensor(batch), objective.device)] = sums
    reshard(objective.model)

    dist.all_reduce(logps)  # each example was scored on one rank
    logps = logps.cpu()
    logps[~needed_examples(schedule)] = torch.nan
    return logps


def prepare_reference(run: Run, weights: str, objective, schedule) -> str:
    """Fill in the log-probs of the starting weights, which the model still has;
    returns their key."""
    precision = f"{stored_dtype(run.config, run.device)}"
    if run.config.load_in_4bit:
        precision += " nf4"
    key = reference_key(weights, run.train, objective.slots, precision)
    file = run.folder / f"reference-{key[:12]}.safetensors"

    stored = None
    if is_main():  # rank 0 decides and reads: others may have another disk
        needed = needed_examples(schedule)
        stored = read_reference(file, key, needed, objective.slots.shape[1])
    if any_rank(stored is not None):
        logps = torch.empty(objective.slots.shape) if stored is None else stored
        dist.broadcast(logps, 0)
    else:
        objective.model.eval()
        logps = reference_pass(objective, schedule, run.rank)
        if is_main():
            write_reference(file, key, logps)
        dist.barrier()

    objective.reference_logps = logps
    return key


def check_first_rewards(objective, exact: bool) -> None:
    """Before the first update the policy is the reference: rewards are zero, in bf16 nearly so."""
    rewards = torch.cat([r.flatten() for r in objective.first_rewards]).double()
    rewards /= objective.config.beta
    objective.first_rewards = None
    worst = torch.stack([rewards.abs().max(), rewards.square().mean().sqrt()])
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    largest, rms = worst.tolist()
    print0(
        f"log-ratios before the first step: at most {largest:.1e} nats per title, rms {rms:.1e} "
        "(0: the policy is its reference)"
    )
    if not (largest < 1e-3 if exact else rms <= 0.5):
        raise ValueError(
            f"policy and reference differ before training: max {largest:.2e}, rms {rms:.2e} nats "
            "per title"
        )


def print_preference_notes(config, objective) -> None:
    """The first example with its margins, what usually surprises,
    and settings outside a method's advised range."""
    titles, slots = objective.encoded.examples[0].candidates, objective.slots[0]
    _, margins = objective.at_the_start()
    pairs = zip(slots[1 : 1 + objective.K], margins[0].tolist(), strict=True)
    rejected = ", ".join(f"{titles[s]!r} ({m:.2f})" for s, m in pairs)
    print0(
        f"first example: chosen {titles[slots[0]]!r}, "
        f"rejected (and target margin in nats): {rejected}"
    )
    print0(
        "logps/chosen usually falls from here on: the loss asks for a gap, "
        "and a gap opens too when every listed title\n"
        "loses. Watch rewards/margins and valid_ratio; --sft_weight holds the chosen title up."
    )
    if objective.loss in ("ipo", "simpo"):
        print0(f"rewards/* and margins/* of {objective.loss} are per token, logps/* are sums")
    ratio = config.simpo_gamma / config.beta
    if objective.loss == "simpo" and not 0.25 <= ratio <= 1:
        print0(
            f"note: SimPO's gamma / beta is {ratio:g}; "
            "its authors advise 0.25 to 1 (and beta 2 to 10)"
        )
    if objective.loss in ("ipo", "kto", "cpo") and config.beta > 0.5:
        print0(f"note: {objective.loss} is usually run at beta 0.1, here it is {config.beta:g}")
