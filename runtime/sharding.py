"""Shard weights over ranks with FSDP2, gather them, and write and read checkpoints.

A model is built on `meta`, gets its adapters, is sharded, and only then receives memory: a rank
reads its own rows. A checkpoint has model.safetensors (or several and an index): trained tensors,
AdamW's moments, random states, best weights; state.json; and a hash beside each file."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from common import is_main, print0, read_json, writing
from data import to_device
from hub.files import Weights, write_weights
from model import Transformer

MOMENTS = ("exp_avg", "exp_avg_sq")


def shard(
    model: Transformer, mode: str, group_size: int, device, compute_dtype: torch.dtype | None = None
) -> int:
    """Shard blocks and root in place; returns the number of copies of the model.
    It is 1 (full), one per group of ranks, such as a machine (hybrid), or one per rank (none)."""
    world_size = dist.get_world_size()
    machine = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    G = {"full": world_size, "hybrid": group_size or machine, "none": 1}[mode]  # ranks of a copy
    if world_size % G:
        raise ValueError(f"--shard_group_size {G} must divide the {world_size} processes")
    if G == 1 and compute_dtype is None:
        return world_size
    shape, names = (world_size // G, G), ("replicate", "shard")
    mesh = init_device_mesh(torch.device(device).type, shape, mesh_dim_names=names)
    policy = fsdp.MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    options = {"mesh": mesh["shard"] if world_size == G else mesh, "mp_policy": policy}
    blocks = list(model.model.layers)
    for block in blocks:
        # backward starts with the last block, so its weights would be needed again at once
        fsdp.fully_shard(block, **options, reshard_after_forward=block is not blocks[-1])
    fsdp.fully_shard(model, **options)
    for block, following in zip(blocks, blocks[1:], strict=False):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])
    for method in ("logits", "decode_step"):
        fsdp.register_fsdp_forward_method(model, method)
    return world_size // G


def reshard(model: Transformer) -> None:
    """Free the weights that a pass without backward leaves gathered: root and last block."""
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def stored_parameters(model: Transformer) -> dict[str, Tensor]:
    """Parameters by name; RuntimeError if they are gathered: resharding would drop any writes."""
    for name, p in model.named_parameters():
        if isinstance(model, fsdp.FSDPModule) and not isinstance(p, DTensor):
            raise RuntimeError(f"{name} is gathered, not sharded: call reshard(model) first")
    return dict(model.named_parameters())


def trained(model: Transformer) -> dict[str, Tensor]:
    """The stored parameters that the optimizer trains."""
    return {name: p for name, p in stored_parameters(model).items() if p.requires_grad}


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> tuple[int, int]:
    """Rows [start, stop) of the whole tensor that this rank holds, as torch.chunk divides them."""
    start, n = 0, local(tensor).shape[0]
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        each = math.ceil(tensor.shape[0] / mesh.size(mesh.ndim - 1))
        start = min(each * mesh.get_local_rank(mesh.ndim - 1), tensor.shape[0])
    return start, start + n


@torch.no_grad()
def fill(tensors: dict[str, Tensor], whole: Callable) -> None:
    """Copy this rank's rows of whole(name) into each tensor; slicing whole(name) may read them."""
    for name, tensor in tensors.items():
        start, stop = own_rows(tensor)
        local(tensor).copy_(whole(name)[start:stop])


def gathered(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole tensor on the CPU; empty on all ranks but 0); all ranks must call it."""
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield name, whole.detach().cpu() if dist.get_rank() == 0 else torch.empty(0)


def average_gradients(optimizer) -> None:
    """Average gradients for --shard none, by one all_reduce of a flat tensor."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients)])


def reduce_metrics(sums: dict[str, Tensor], counts: dict) -> tuple[dict[str, Tensor], Tensor]:
    """Means over all ranks, and a flag per rank: its loss is not finite. The host reads nothing."""
    totals, world_size = torch.stack(list(sums.values())), dist.get_world_size()
    known = torch.tensor(list(counts.values()), dtype=torch.double)
    own = torch.eye(world_size, dtype=torch.double)[dist.get_rank()]
    flags = to_device(own, totals.device) * ~sums["loss"].isfinite()
    reduced = torch.cat([totals, to_device(known, totals.device), flags])
    dist.all_reduce(reduced)
    totals, known, flags = reduced.split([len(sums), len(sums), world_size])
    return dict(zip(sums, totals / known, strict=True)), flags


def hash_of(file: Path) -> str:
    """The hash of a file, as a line of `sha256sum`."""
    with open(file, "rb") as content:
        return f"{hashlib.file_digest(content, 'sha256').hexdigest()}  {file.name}\n"


def is_whole(file: Path) -> bool:
    """Whether a file exists and has the hash in its .sha256 file."""
    try:
        return hash_of(file) == Path(f"{file}.sha256").read_text()
    except (OSError, ValueError):
        return False


def newest(folder: Path) -> list[Path]:
    """The finished checkpoints, newest first, without those known to be damaged."""
    found = [f for f in folder.glob("checkpoint-*") if not f.suffix]
    return sorted(found, key=lambda f: int(f.name.split("-")[1]), reverse=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; damaged ones are reported and renamed."""
    for checkpoint in newest(folder):
        state = checkpoint / "state.json"
        names = [state.name, *(read_json(state)["files"] if is_whole(state) else ())]
        damaged = [name for name in names if not is_whole(checkpoint / name)]
        if not damaged:
            return checkpoint
        print0(f"note: {checkpoint} is damaged ({', '.join(damaged)}); trying the one before")
        checkpoint.rename(f"{checkpoint}.damaged")  # removed as soon as the next one is saved
    return None


def trained_state(model, optimizer, best: dict[str, Tensor]) -> dict[str, Tensor]:
    """What training changes, by name: weights, the optimizer's moments of each, best weights."""
    tensors = {f"best.{name}": t for name, t in best.items()}
    for name, p in trained(model).items():
        tensors[name] = p.detach()
        tensors |= {f"{name}.{moment}": optimizer.state[p][moment] for moment in MOMENTS}
    return tensors


def save_checkpoint(folder: Path, step: int, model, optimizer, best: dict, state: dict, keep: int):
    """Write checkpoint-<step>, then remove all but the `keep` newest; all ranks must call it."""
    random, ranks = {"cpu": torch.get_rng_state()}, [None] * dist.get_world_size()
    random |= {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    dist.all_gather_object(ranks, random)
    tensors = trained_state(model, optimizer, best)
    tensors |= {f"random.{rank}.{k}": t for rank, of in enumerate(ranks) for k, t in of.items()}
    taken = int(next(iter(optimizer.state.values()))["step"])  # without skipped steps
    state = state | {"step": step, "optimizer_steps": taken, "world_size": len(ranks)}
    final, part = (folder / f"checkpoint-{step}{end}" for end in ("", ".part"))
    with writing(part):
        if is_main():
            shutil.rmtree(part, ignore_errors=True)
        write_weights(part, tensors, gathered(tensors), write=is_main())
        if is_main():
            state["files"] = [f.name for f in part.iterdir()]
            (part / "state.json").write_text(json.dumps(state, indent=2) + "\n")
            for file in list(part.iterdir()):
                Path(f"{file}.sha256").write_text(hash_of(file))
            shutil.rmtree(final, ignore_errors=True)  # of an earlier start
            part.rename(final)
            for other in set(folder.glob("checkpoint-*")) - set(newest(folder)[:keep]):
                shutil.rmtree(other)
    dist.barrier()


def load_checkpoint(checkpoint: Path, model, optimizer, made_from: dict) -> tuple[dict, dict]:
    """Restore weights, moments and random state; returns (state, best weights)."""
    state, weights = read_json(checkpoint / "state.json"), Weights(checkpoint)
    other = [what for what, now in made_from.items() if state.get(what) != now]
    if other:
        way_out = "put the old ones back, or choose another --output_dir"
        raise ValueError(f"{checkpoint}: made from other {', '.join(other)}; {way_out}")
    parameters = trained(model)
    assert {*optimizer.param_groups[0]["params"]} == {*parameters.values()}, "moments of other ones"
    for p in parameters.values():
        taken = torch.tensor(float(state["optimizer_steps"]), device=local(p).device)
        optimizer.state[p] = {m: torch.zeros_like(p) for m in MOMENTS} | {"step": taken}
    best = {n: torch.zeros_like(p) for n, p in parameters.items() if f"best.{n}" in weights.files}
    fill(trained_state(model, optimizer, best), weights.rows)
    if state["world_size"] == dist.get_world_size():
        random = f"random.{dist.get_rank()}"
        torch.set_rng_state(weights.tensor(f"{random}.cpu"))
        if torch.cuda.is_available() and f"{random}.cuda" in weights.files:
            torch.cuda.set_rng_state(weights.tensor(f"{random}.cuda"))
    return state, best
