"""Reference log-probs: those of the policy before its first step, kept in the run folder.

There is no second model. The file is an input of the stage, named by what it was made from:
weights, token ids, dtype. How the work was divided is no part of that: a run that goes on reads it
with any number of processes and micro-batches of any size. Where it is missing or damaged, it is
computed again from the stage's starting weights, before any checkpoint is read.

Legend: E training examples, N completions per example.
"""

import hashlib

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from common import is_main, print0, writing
from data import to_device
from hub.files import save_tensors
from runtime.checkpoint import add_hash, is_whole
from runtime.passes import any_rank, prefetch, progress
from runtime.policy import stored_dtype
from runtime.runs import Run
from runtime.sharding import reshard


def prepare_reference(run: Run, weights: str, tokens: str, objective, schedule) -> str:
    """Fill in the log-probs of the starting weights, which the model still has; returns their key.

    `weights` and `tokens` are the keys of what the stage starts from and trains on."""
    facts = f"{weights} {tokens} {stored_dtype(run.config, run.device)} {run.config.load_in_4bit}"
    key = hashlib.sha256(facts.encode()).hexdigest()
    file = run.folder / f"reference-{key[:12]}.safetensors"
    found = is_main() and file.exists()  # rank 0 decides and reads: others may have another disk
    if found and not is_whole(file):
        print0(f"note: {file} is damaged; computing it again")
        found = False

    if any_rank(found):
        logps = load_file(file)["logps"].clone() if found else torch.empty(objective.slots.shape)
        dist.broadcast(logps, 0)
    else:
        objective.model.eval()
        logps = reference_pass(objective, schedule, run.rank)
        if is_main():
            with writing(file):
                save_tensors({"logps": logps}, file)
                add_hash(file)
        dist.barrier()
    objective.reference_logps = logps
    return key


@torch.no_grad()
def reference_pass(objective, schedule, rank: int) -> Tensor:
    """Log-probs (E, N) of the model as it is now; NaN for examples that the stage never sees.

    It runs the very micro-batches of the first epoch, so the first rewards are exactly zero."""
    steps = range(min(schedule.num_steps, schedule.steps_per_epoch))
    planned = [
        (batch, schedule.examples(step))
        for step in steps
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

    unseen = torch.ones(len(logps), dtype=torch.bool)
    for step in steps:
        unseen[schedule.examples(step)] = False
    logps = logps.cpu()
    logps[unseen] = torch.nan
    return logps


def check_first_rewards(objective, exact: bool) -> None:
    """Before the first update the policy is the reference: rewards are zero, in bf16 nearly so."""
    rewards = torch.cat([r.flatten() for r in objective.first_rewards]).double()
    rewards /= objective.config.beta
    objective.first_rewards = None
    worst = torch.stack([rewards.abs().max(), rewards.square().mean().sqrt()])
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)  # so that all ranks stop, or none
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
    """The first example with its margins, what usually surprises, and settings to think over."""
    titles, slots = objective.encoded.examples[0].candidates, objective.slots[0]
    _, margins = objective.at_the_start()
    pairs = zip(slots[1 : 1 + objective.K], margins[0].tolist(), strict=True)
    rejected = ", ".join(f"{titles[s]!r} ({m:.2f})" for s, m in pairs)
    print0(
        f"first example: chosen {titles[slots[0]]!r}, rejected (and target margin in nats): "
        f"{rejected}\nlogps/chosen usually falls from here on: the loss asks for a gap, and a gap "
        "opens too when every listed title\nloses. Watch rewards/margins and valid_ratio; "
        "--sft_weight holds the chosen title up."
    )
    if objective.loss in ("ipo", "simpo"):
        print0(f"rewards/* and margins/* of {objective.loss} are per token, logps/* are sums")
    ratio = config.margin_lambda / config.beta
    if objective.loss == "simpo" and not 0.25 <= ratio <= 1:
        print0(f"note: SimPO's gamma / beta is {ratio:g}; its authors advise 0.25 to 1")
    if objective.loss in ("ipo", "kto", "cpo") and config.beta > 0.5:
        print0(f"note: {objective.loss} is usually run at beta 0.1, here it is {config.beta:g}")
