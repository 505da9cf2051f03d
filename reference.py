"""Reference log-probs: those of the policy before its first step, computed once per run and kept in its folder.

There is no second model. The file's name carries a hash of all that the log-probs depend on, so a run that goes on finds
its own, and a deleted file is made again with the same bits.
"""

import hashlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from common import any_rank, is_main, print0, writing
from data import prefetch, to_device
from hub.adapter import base_fingerprint
from objectives import Preference, Schedule
from options import stored_dtype
from runs import Run


@torch.no_grad()
def reference_pass(
    objective: Preference, schedule: Schedule, rank: int, file: Path, key: str
) -> None:
    """Fill in the reference log-probs (E, 1 + K): those of the policy before its first step, computed once per run.

    The pass runs the very micro-batches of the first epoch, so that the rewards of the first step are exactly zero."""
    if any_rank(
        is_main() and file.exists()
    ):  # rank 0 decides and reads: others may have another disk
        if is_main():
            objective.reference_logps = load_file(file)["logps"]
        dist.broadcast(objective.reference_logps, 0)
        return
    device = objective.device
    logps = torch.zeros(objective.reference_logps.shape, device=device)
    steps, bar = (
        range(min(schedule.num_steps, schedule.steps_per_epoch)),
        is_main() and sys.stderr.isatty(),
    )
    planned = [
        (b, schedule.examples(step)) for step in steps for b in schedule.micro_batches(step, rank)
    ]
    prepared = prefetch(lambda plan: objective.prepare(*plan), planned)
    for (batch, _), micro_batch in zip(
        tqdm(planned, "reference", disable=not bar), prepared, strict=True
    ):
        sums = micro_batch.tree.sum_logps(objective.model(micro_batch.tree)[0])
        if batch:
            logps[to_device(torch.tensor(batch), device)] = sums
    dist.all_reduce(logps)
    objective.reference_logps = logps.cpu()
    if is_main():
        beside = file.with_suffix(".part")
        with writing(file):
            save_file({"logps": objective.reference_logps}, beside, metadata={"key": key})
            beside.rename(file)
    dist.barrier()


def check_first_rewards(objective: Preference, exact: bool) -> None:
    """At the first step the policy is the reference, so every reward must be zero (up to noise in bf16)."""
    rewards = (
        torch.cat([r.flatten() for r in objective.first_rewards]).double() / objective.config.beta
    )
    objective.first_rewards = None
    worst = torch.stack([rewards.abs().max(), rewards.square().mean().sqrt()])
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    largest, rms = worst.tolist()
    print0(
        f"log-ratios before the first step: at most {largest:.1e} nats per title (0: the policy is its reference)"
    )
    if largest >= 1e-3 if exact else rms > 0.5:
        raise ValueError(
            f"policy and reference differ before training: max {largest:.2e}, rms {rms:.2e} nats per title"
        )


def prepare_reference(
    run: Run, base: Path, adapter: Path | None, objective: Preference, schedule: Schedule
) -> str:
    """Fill in the reference log-probs from the starting weights, show the first example; returns the log-probs' SHA-256."""
    objective.model.eval()
    key = reference_key(run, base, adapter, objective)
    reference_pass(
        objective, schedule, run.rank, run.folder / f"reference-{key[:12]}.safetensors", key
    )
    return hashlib.sha256(objective.reference_logps.numpy().tobytes()).hexdigest()


def print_preference_notes(config, objective: Preference) -> None:
    """The first example with its margins, what usually surprises, and settings outside a method's advised range."""
    titles, slots, margins = (
        objective.encoded.examples[0].candidates,
        objective.slots[0],
        objective.margins[0].tolist(),
    )
    pairs = zip(slots[1 : 1 + objective.K], margins, strict=True)
    print0(
        f"first example: chosen {titles[slots[0]]!r}, rejected (and target margin in nats): "
        + ", ".join(f"{titles[s]!r} ({m:.2f})" for s, m in pairs)
    )
    print0(
        "logps/chosen usually falls from here on: the loss asks for a gap, and a gap opens too when every listed title\n"
        "loses. Watch rewards/margins and valid_ratio; --sft_weight holds the chosen title up."
    )
    ratio = config.simpo_gamma / config.beta
    if objective.loss == "simpo" and not 0.25 <= ratio <= 1:
        print0(
            f"note: SimPO's gamma / beta is {ratio:g}; its authors advise 0.25 to 1 (and beta 2 to 10)"
        )
    if objective.loss in ("ipo", "kto", "cpo") and config.beta > 0.5:
        print0(f"note: {objective.loss} is usually run at beta 0.1, here it is {config.beta:g}")


def reference_key(run: Run, base: Path, adapter: Path | None, objective: Preference) -> str:
    """Hash of all that the reference log-probs depend on, the division into micro-batches included."""
    config, train = run.config, run.train
    files = (
        [adapter / name for name in ("adapter_model.safetensors", "adapter_config.json")]
        if adapter
        else []
    )
    settings = (stored_dtype(config, run.device), run.device.type, config.negative_source)
    batches = (
        config.seed,
        config.batch_size,
        config.micro_batch_tokens,
        run.world_size,
        config.epochs,
        config.max_steps,
    )
    parts = [
        base_fingerprint(base).encode(),
        run.data_hash.encode(),
        *(file.read_bytes() for file in files),
    ]
    parts += [ids.tobytes() for ids in train.prompts] + [
        str(train.completions).encode(),
        objective.slots.tobytes(),
    ]
    digest = hashlib.sha256(str((settings, batches)).encode())
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()
