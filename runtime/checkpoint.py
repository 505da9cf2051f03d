"""Folders of whole tensors that any number of processes can write and read, without pickle.

    <stage>.unfinished/checkpoint-40/    trained tensors, AdamW's two moments of each, random states
    <stage>.unfinished/best-30/          with --keep best: the trained tensors of that step
        model.safetensors                or several such files with an index, as the hub has them
        state.json                       step, process count, hashes of what it was made from
        *.sha256                         the hash of the file beside it, as `sha256sum -c` reads it

A folder is written as `.part`, renamed and flushed to disk; older ones go only afterwards. Before
one is read its hashes are compared: a damaged checkpoint is named, renamed and passed over.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from common import is_main, print0, read_json, writing
from hub.files import Weights, write_weights
from runtime.sharding import fill, gathered, local, trained

MOMENTS = ("exp_avg", "exp_avg_sq")


def hash_of(file: Path) -> str:
    """A line of `sha256sum`."""
    with open(file, "rb") as content:
        return f"{hashlib.file_digest(content, 'sha256').hexdigest()}  {file.name}\n"


def add_hash(file: Path) -> None:
    """Write a file's hash beside it."""
    file.with_name(f"{file.name}.sha256").write_text(hash_of(file))


def is_whole(file: Path) -> bool:
    """Whether a file is there, with the hash that stands beside it."""
    try:
        return hash_of(file) == file.with_name(f"{file.name}.sha256").read_text()
    except (OSError, ValueError):
        return False


def damaged_files(folder: Path) -> list[str]:
    """Names of the files in it that are missing or not as they were written."""
    state = folder / "state.json"
    names = read_json(state)["files"] if is_whole(state) else []
    return [name for name in (state.name, *names) if not is_whole(folder / name)]


def newest(folder: Path, kind: str) -> list[Path]:
    """The finished folders of a kind, newest first; none that is known as damaged."""
    found = [f for f in folder.glob(f"{kind}-*") if not f.suffix]
    return sorted(found, key=lambda f: int(f.name.split("-")[1]), reverse=True)


def write_tensors(final: Path, tensors: dict[str, Tensor], state: dict, keep: int) -> None:
    """Write <kind>-<step> with whole tensors, keep the `keep` newest of its kind; on all ranks."""
    part, folder, kind = Path(f"{final}.part"), final.parent, final.name.split("-")[0]
    with writing(part):
        if is_main():
            shutil.rmtree(part, ignore_errors=True)
        write_weights(part, tensors, gathered(tensors), write=is_main())
        if is_main():
            state = state | {"files": [f.name for f in part.iterdir()]}
            (part / "state.json").write_text(json.dumps(state, indent=2) + "\n")
            for file in list(part.iterdir()):
                add_hash(file)
            shutil.rmtree(final, ignore_errors=True)  # of an earlier start
            part.rename(final)
            for path in (*final.iterdir(), final, folder):
                handle = os.open(path, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
            kept = newest(folder, kind)[:keep]
            for other in folder.glob(f"{kind}-*"):
                if other not in kept:
                    shutil.rmtree(other)
    dist.barrier()


def trained_state(model, optimizer) -> dict[str, Tensor]:
    """What training changes, by name: weights, and the optimizer's two moments of each."""
    tensors = {}
    for name, p in trained(model).items():
        tensors[name] = p.detach()
        tensors |= {f"{name}.{moment}": optimizer.state[p][moment] for moment in MOMENTS}
    return tensors


def save_checkpoint(folder: Path, step: int, model, optimizer, state: dict, keep: int) -> None:
    """Write checkpoint-<step> with `state` and keep the `keep` newest; all ranks must call it."""
    random, ranks = {"cpu": torch.get_rng_state()}, [None] * dist.get_world_size()
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    dist.all_gather_object(ranks, random)
    tensors = trained_state(model, optimizer)
    tensors |= {f"random.{rank}.{k}": t for rank, of in enumerate(ranks) for k, t in of.items()}
    taken = int(next(iter(optimizer.state.values()))["step"])  # less those that were left out
    state = state | {"step": step, "optimizer_steps": taken, "world_size": len(ranks)}
    write_tensors(folder / f"checkpoint-{step}", tensors, state, keep)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; damaged ones are named and put out of its way."""
    for checkpoint in newest(folder, "checkpoint"):
        damaged = damaged_files(checkpoint)
        if not damaged:
            return checkpoint
        names = f"{', '.join(damaged)}: missing, or of another SHA-256"
        print0(f"note: {checkpoint} is damaged ({names}); trying the one before")
        checkpoint.rename(f"{checkpoint}.damaged")  # removed as soon as the next one is saved
    return None


def load_checkpoint(checkpoint: Path, model, optimizer, made_from: dict) -> dict:
    """Fill in weights, moments and random state; ValueError if it was made from something else.

    Returns its state."""
    state = read_json(checkpoint / "state.json")
    for what, now in made_from.items():
        if state.get(what) != now:
            raise ValueError(
                f"{checkpoint}: made from other {what} ({str(state.get(what))[:40]}, now "
                f"{str(now)[:40]}); put the old ones back, or choose another --output_dir"
            )
    parameters = trained(model).values()
    stepped = {p for group in optimizer.param_groups for p in group["params"]}
    assert stepped == set(parameters), "moments would go where no step reads them"
    for p in parameters:
        taken = torch.tensor(float(state["optimizer_steps"]), device=local(p).device)
        optimizer.state[p] = {m: torch.zeros_like(p) for m in MOMENTS} | {"step": taken}
    weights, rank = Weights(checkpoint), dist.get_rank()
    fill(trained_state(model, optimizer), weights.rows)
    if state["world_size"] == dist.get_world_size():
        torch.set_rng_state(weights.tensor(f"random.{rank}.cpu"))
        if torch.cuda.is_available() and f"random.{rank}.cuda" in weights.files:
            torch.cuda.set_rng_state(weights.tensor(f"random.{rank}.cuda"))
    return state
