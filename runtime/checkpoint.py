"""Checkpoints inside a stage: whole or not there,
readable by any number of processes, free of pickle.

    <stage>.unfinished/checkpoint-40/
        rank-00000.safetensors   rows [start, stop) of every trained tensor and of its two AdamW
                                 moments, and this rank's random state; as many files as there are
                                 ranks that hold different rows
        state.json               step, process count; hashes of the data, the starting weights and
                                 what the reference log-probs were made from
        manifest.json            size and SHA-256 of every other file; written last

A checkpoint is written beside (`.part`), flushed to disk, and renamed into place; older ones go
only afterwards. Reading checks the manifest first, on all ranks, each a part of the files; what
is half-written or damaged is named and passed over. Rows are cut anew for the ranks that read
them, so a run may go on with another number of processes.
"""

import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from common import print0, read_json, writing
from hub.files import open_safetensors, save_tensors
from runtime.sharding import fill, local, own_rows, trained

WRONG_CONTENT = (KeyError, IndexError, TypeError, AttributeError)
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(
    folder: Path, step: int, model, optimizer, state: dict, replicas: int, keep: int
) -> Path:
    """Write checkpoint-<step> under `folder`; every rank must call it. `keep` newest ones stay."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    final = folder / f"checkpoint-{step}"
    beside = folder / f"checkpoint-{step}.part"
    if rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        with writing(beside):
            beside.mkdir()
    dist.barrier()
    tensors = {f"random.{kind}": value for kind, value in random_state().items()}
    rows = {}
    if rank < world_size // replicas:  # the other replicas hold the same rows
        for name, p in trained(model).items():
            rows[name] = own_rows(p)
            tensors[name] = local(p.detach())
            for moment in MOMENTS:
                if p in optimizer.state:  # empty before the first step
                    tensors[f"{name}.{moment}"] = local(optimizer.state[p][moment])
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    file = beside / f"rank-{rank:05d}.safetensors"
    with writing(file):
        save_tensors(tensors, file, metadata={"rows": json.dumps(rows)})
        flush(file)
    dist.barrier()
    if rank == 0:
        with writing(beside):
            write_json(beside / "state.json", state | {"step": step, "world_size": world_size})
            files = sorted(beside.iterdir())
            manifest = {f.name: [f.stat().st_size, sha256(f)] for f in files}
            write_json(beside / "manifest.json", manifest)
            flush(beside)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
            beside.rename(final)
            flush(folder)
        for old in checkpoints(folder)[keep:]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def random_state() -> dict[str, Tensor]:
    """Generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
    flush(file)


def flush(path: Path) -> None:
    """Onto the disk, a file's bytes or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    with open(file, "rb") as f:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(f, "sha256").hexdigest()
        return _sha256(f)


def _sha256(f) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while chunk := f.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """Finished ones, newest first."""
    found = [f for f in folder.glob("checkpoint-*") if f.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda f: -int(f.name.removeprefix("checkpoint-")))


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, the files divided over the ranks; empty if it is whole.

    Every rank must call it."""
    problem = ""
    try:
        manifest = read_json(folder / "manifest.json")
        listed = sorted(manifest)
        if extra := {f.name for f in folder.iterdir()} - {*listed, "manifest.json"}:
            problem = f"{sorted(extra)[0]} is not in the manifest"
        for name in listed[dist.get_rank() :: dist.get_world_size()]:
            size, digest = manifest[name]
            if not (folder / name).is_file():
                problem = f"{name} is missing"
            elif (folder / name).stat().st_size != size:
                problem = f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
            elif sha256(folder / name) != digest:
                problem = f"{name} has another SHA-256"
    except (ValueError, OSError, TypeError) as error:
        problem = str(error)
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    return next((p for p in found if p), "")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; damaged ones are named and passed over.

    Every rank must call it."""
    shared = [checkpoints(folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    for candidate in shared[0]:
        problem = damage(candidate)
        if not problem:
            return candidate
        print0(f"note: {candidate} is damaged ({problem}); trying the one before")
    return None


def read_parameter(p: Tensor, name: str, optimizer, steps: float, handles, held) -> None:
    """This rank's rows of one parameter and, after the first step, of its moments.

    `held` says of every file's handle which rows of which parameter it has."""

    def rows(key: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, put together from the files that hold some of them."""
        parts = []
        for handle, spans in zip(handles, held, strict=True):
            low, high = spans.get(name, (0, 0))
            first, last = max(start, low), min(stop, high)
            if first < last:
                parts.append(handle.get_slice(key)[first - low : last - low])
        return torch.cat(parts)

    fill(p, partial(rows, name))
    if steps:
        moments = {moment: torch.zeros_like(p) for moment in MOMENTS}
        for moment, tensor in moments.items():
            fill(tensor, partial(rows, f"{name}.{moment}"))
        counter = torch.tensor(float(steps), device=local(p).device)
        optimizer.state[p] = {"step": counter, **moments}


def restore_random_state(handle) -> None:
    """That of the rank whose file this is; the GPU's where both runs have one."""
    torch.set_rng_state(handle.get_tensor("random.cpu"))
    if torch.cuda.is_available() and "random.cuda" in handle.keys():
        torch.cuda.set_rng_state(handle.get_tensor("random.cuda"))


def load_checkpoint(folder: Path, model, optimizer, expected: dict) -> dict:
    """Fill in trained weights, moments and random state; returns state.json.

    `expected` must agree with it, by key. The optimizer must hold the model's own parameters."""
    state = read_json(folder / "state.json")
    for key, value in expected.items():
        if state.get(key) != value:
            raise ValueError(
                f"{folder}: made with another {key} "
                f"({str(state.get(key))[:40]} instead of {str(value)[:40]})"
            )
    parameters = trained(model)
    stepped = {p for group in optimizer.param_groups for p in group["params"]}
    assert stepped == set(parameters.values()), "moments would go where no step reads them"
    try:
        handles = [open_safetensors(f) for f in sorted(folder.glob("rank-*.safetensors"))]
        held = [json.loads(handle.metadata()["rows"]) for handle in handles]
        for name, p in parameters.items():
            read_parameter(p, name, optimizer, state["optimizer_steps"], handles, held)
        if state["world_size"] == dist.get_world_size():
            restore_random_state(handles[dist.get_rank()])
    except (SafetensorError, OSError, ValueError, RuntimeError, *WRONG_CONTENT) as error:
        raise ValueError(f"{folder}: cannot be read into this model ({error})") from None
    return state
