"""Reference log-probs: those of the policy before its first step, kept in the run folder.

There is no second model. The file is named by what it was made from: weights, token ids, dtype; not
by how the work was divided, so that a run goes on with any number of processes. Where it is missing
or damaged, it is computed again from the stage's starting weights, before a checkpoint is read.

Legend: E training examples, N completions per example.
"""

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from common import is_main, print0, writing
from data import to_device
from hub.files import save_tensors
from runtime.checkpoint import add_hash, is_whole
from runtime.passes import prefetch, progress
from runtime.policy import stored_dtype
from runtime.processes import from_rank_0
from runtime.runs import Run
from runtime.sharding import reshard


def prepare_reference(run: Run, made_from: dict, objective, schedule) -> str:
    """Fill in the log-probs of the starting weights, which the model still has; returns their key.

    `made_from` names the weights that the stage starts from and the token ids that it trains on."""
    facts = f"{made_from['weights']} {made_from['token ids']}"
    facts += f" {stored_dtype(run.config, run.device)} {run.config.load_in_4bit}"
    key = hashlib.sha256(facts.encode()).hexdigest()
    file = run.folder / f"reference-{key[:12]}.safetensors"
    logps = from_rank_0(lambda: stored_logps(file))
    if logps is None:
        objective.model.eval()
        logps = reference_pass(objective, schedule, run.rank)
        if is_main():
            with writing(file):
                save_tensors({"logps": logps}, file)
                add_hash(file)
        dist.barrier()
    objective.reference_logps = logps
    return key


def stored_logps(file: Path) -> Tensor | None:
    """What the file holds, if it is there and whole."""
    if is_whole(file):
        return load_file(file)["logps"].clone()
    if file.exists():
        print0(f"note: {file} is damaged; computing it again")
    return None


@torch.no_grad()
def reference_pass(objective, schedule, rank: int) -> Tensor:
    """Log-probs (E, N) of the model as it is now; NaN for examples that the stage never sees.

    It runs the very micro-batches of the first epoch, so the first rewards are exactly zero."""
    steps = range(min(schedule.num_steps, schedule.steps_per_epoch))
    planned = [(b, schedule.examples(s)) for s in steps for b in schedule.micro_batches(s, rank)]
    prepared = prefetch(lambda plan: objective.prepare(*plan), planned)
    logps = torch.zeros(objective.slots.shape, device=objective.device)
    for batch, _ in progress(planned, "reference", len(planned)):
        tree = next(prepared).tree
        sums = tree.sum_logps(objective.model(tree)[0])
        if batch:
            logps[to_device(torch.tensor(batch), objective.device)] = sums
    reshard(objective.model)
    dist.all_reduce(logps)  # each example was scored on one rank
    logps, seen = logps.cpu(), torch.zeros(len(logps), dtype=torch.bool)
    for step in steps:
        seen[schedule.examples(step)] = True
    logps[~seen] = torch.nan
    return logps


def check_first_rewards(objective, exact: bool) -> None:
    """Raise unless the policy is its reference before the first update, in bf16 nearly so."""
    rewards = torch.cat([r.flatten() for r in objective.first_rewards]).double()
    rewards, objective.first_rewards = rewards / objective.config.beta, None
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
    """Print the first example with its margins, what usually surprises, settings to think over."""
    titles, slots = objective.encoded.examples[0].candidates, objective.slots[0]
    _, margins = objective.at_the_start()
    pairs = zip(slots[1 : 1 + objective.K], margins[0].tolist(), strict=True)
    print0(
        f"first example: chosen {titles[slots[0]]!r}, rejected (and target margin in nats): "
        f"{', '.join(f'{titles[s]!r} ({m:.2f})' for s, m in pairs)}\n"
        "logps/chosen usually falls from here on: the loss asks for a gap, and a gap opens too "
        "when every listed title\nloses. Watch rewards/margins and valid_ratio; --sft_weight "
        "holds the chosen title up."
    )
    loss, ratio = objective.loss, config.margin_lambda / config.beta
    if loss in ("ipo", "simpo"):
        print0(f"rewards/* and margins/* of {loss} are per token, logps/* are sums")
    if loss == "simpo" and not 0.25 <= ratio <= 1:
        print0(f"note: SimPO's gamma / beta is {ratio:g}; its authors advise 0.25 to 1")
    if loss in ("ipo", "kto", "cpo") and config.beta > 0.5:
        print0(f"note: {loss} is usually run at beta 0.1, here it is {config.beta:g}")
