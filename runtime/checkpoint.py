"""Checkpoints inside a stage, which any number of processes can read, without pickle.

    <stage>.unfinished/checkpoint-40/
        rank-00000.safetensors   this rank's rows of every trained tensor, of its two AdamW moments
                                 and, with --keep best, of the best weights; its random state
        state.json               step, process count, best step, hashes of what it was made from
        *.sha256                 the hash of the file beside it, as `sha256sum -c` reads it

A checkpoint is written as `.part`, renamed and flushed to disk; older ones go only afterwards.
Before one is read its hashes are compared: a damaged one is named and passed over.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common import print0, read_json, writing
from hub.files import open_safetensors, save_tensors
from runtime.sharding import fill, local, trained

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Best:
    """The best step so far, and its trained weights: this rank's rows, on the CPU."""

    step: int
    value: float
    weights: dict[str, Tensor]


def hash_of(file: Path) -> str:
    """A line of `sha256sum`."""
    return f"{hashlib.sha256(np.memmap(file, mode='r')).hexdigest()}  {file.name}\n"


def add_hash(file: Path) -> None:
    """Write a file's hash beside it."""
    file.with_name(f"{file.name}.sha256").write_text(hash_of(file))


def is_whole(file: Path) -> bool:
    """Whether a file is there, with the hash that stands beside it."""
    try:
        return hash_of(file) == file.with_name(f"{file.name}.sha256").read_text()
    except (OSError, ValueError):
        return False


def save_checkpoint(
    folder: Path,
    step: int,
    model,
    optimizer,
    state: dict,
    replicas: int,
    keep: int,
    best: Best | None = None,
) -> Path:
    """Write checkpoint-<step> under `folder` and keep the `keep` newest; all ranks must call it.

    `replicas` ranks hold the same rows."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    final, beside = folder / f"checkpoint-{step}", folder / f"checkpoint-{step}.part"
    if rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        with writing(beside):
            beside.mkdir()
    dist.barrier()

    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    shards = world_size // replicas
    for name, p in trained(model).items() if rank < shards else ():
        tensors[name] = local(p.detach())
        for moment in MOMENTS if p in optimizer.state else ():  # none before the first step
            tensors[f"{name}.{moment}"] = local(optimizer.state[p][moment])
        if best:
            tensors[f"{name}.best"] = best.weights[name]
    file = beside / f"rank-{rank:05d}.safetensors"
    with writing(file):
        save_tensors({name: t.cpu().contiguous() for name, t in tensors.items()}, file)
        add_hash(file)
    dist.barrier()

    if rank == 0:
        taken = next((int(moments.get("step", 0)) for moments in optimizer.state.values()), 0)
        state = state | {"step": step, "optimizer_steps": taken}
        state |= {"world_size": world_size, "shards": shards}
        if best:
            state["best"] = {"step": best.step, "value": best.value}
        with writing(beside):
            (beside / "state.json").write_text(json.dumps(state, indent=2) + "\n")
            add_hash(beside / "state.json")
            shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
            beside.rename(final)
            for path in (*final.iterdir(), final, folder):
                handle = os.open(path, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
        older = [f for f in checkpoints(folder) if step_of(f) < step]
        for other in checkpoints(folder):  # one of a later step is damaged: it was passed over
            if other not in (final, *older[: keep - 1]):
                shutil.rmtree(other)
    dist.barrier()
    return final


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a folder, newest first."""
    found = [f for f in folder.glob("checkpoint-*") if f.suffix != ".part"]
    return sorted(found, key=step_of, reverse=True)


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, if it is not whole; all ranks must call it."""
    state = checkpoint / "state.json"
    ranks = read_json(state)["world_size"] if is_whole(state) else 0
    files = [state, *(checkpoint / f"rank-{r:05d}.safetensors" for r in range(ranks))]
    mine = files[dist.get_rank() :: dist.get_world_size()]  # each rank reads a part of the files
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, [f.name for f in mine if not is_whole(f)])
    names = ", ".join(sum(found, []))
    return f"{names}: missing, or of another SHA-256" if names else ""


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; all ranks must call it."""
    shared = [checkpoints(folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    for checkpoint in shared[0]:
        problem = damage(checkpoint)
        if not problem:
            return checkpoint
        print0(f"note: {checkpoint} is damaged ({problem}); trying the one before")
    return None


def load_checkpoint(checkpoint: Path, model, optimizer, expected: dict) -> dict:
    """Fill in trained weights, moments and random state; returns its state, with `best` in it.

    ValueError unless the state agrees with `expected`."""
    state = read_json(checkpoint / "state.json")
    for key, value in expected.items():
        if state.get(key) != value:
            raise ValueError(
                f"{checkpoint}: made with another {key} ({str(state.get(key))[:40]} instead of "
                f"{str(value)[:40]}); put the old one back, or choose another --output_dir"
            )
    parameters = trained(model)
    stepped = {p for group in optimizer.param_groups for p in group["params"]}
    assert stepped == set(parameters.values()), "moments would go where no step reads them"
    files = [open_safetensors(f) for f in sorted(checkpoint.glob("rank-*.safetensors"))]

    def read(tensor: Tensor, key: str) -> Tensor:
        """Fill in this rank's rows; those of the whole stand in the files in the order of ranks."""

        def rows(start: int, stop: int) -> Tensor:
            parts, before = [], 0
            for view in [file.get_slice(key) for file in files[: state["shards"]]]:
                parts.append(view[max(0, start - before) : max(0, stop - before)])
                before += view.get_shape()[0]
            return torch.cat(parts)

        fill(tensor, rows)
        return tensor

    best = Best(**state["best"], weights={}) if "best" in state else None
    for name, p in parameters.items():
        read(p, name)
        if state["optimizer_steps"]:
            moments = {moment: read(torch.zeros_like(p), f"{name}.{moment}") for moment in MOMENTS}
            moments["step"] = torch.tensor(float(state["optimizer_steps"]), device=local(p).device)
            optimizer.state[p] = moments
        if best:
            best.weights[name] = local(read(torch.zeros_like(p), f"{name}.best")).cpu()
    if state["world_size"] == dist.get_world_size():
        random = files[dist.get_rank()]
        torch.set_rng_state(random.get_tensor("random.cpu"))
        if torch.cuda.is_available() and "random.cuda" in random.keys():
            torch.cuda.set_rng_state(random.get_tensor("random.cuda"))
    return state | {"best": best}
