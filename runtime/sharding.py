"""Weights divided over ranks: FSDP2, whose rows a rank holds, whole tensors gathered one by one.

A model is built on `meta`, gets its adapters, is sharded, and only then receives memory: each rank
reads its rows out of the files, so none ever holds more than its share and one slice. Row r of a
tensor of n rows over G ranks belongs to rank r // ceil(n / G), as `torch.chunk` divides it.

    full     every block, then the root, is split over all ranks
    hybrid   split inside groups of --shard_group_size ranks (a machine), replicated between them
    none     a replica on each rank; only gradients are reduced, in one bucket

Legend: G ranks that share one copy, R = world_size / G replicas of it.
"""

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from data import to_device
from model import Transformer


def shard(
    model: Transformer, mode: str, group_size: int, device, compute_dtype: torch.dtype | None = None
) -> int:
    """Split blocks and root in place; returns R, the number of replicas.

    Full training in bf16 keeps fp32 weights and computes in `compute_dtype`; gradients are reduced
    in fp32. Nothing is done where a rank keeps a replica, unless FSDP must convert its weights."""
    world_size = dist.get_world_size()
    machine = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    G = {"full": world_size, "hybrid": group_size or machine, "none": 1}[mode]
    if world_size % G:
        raise ValueError(f"--shard_group_size {G} must divide the {world_size} processes")
    if G == 1 and compute_dtype is None:
        return world_size
    kind, shape = torch.device(device).type, (world_size // G, G)
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    options = {"mesh": mesh["shard"] if world_size == G else mesh, "mp_policy": policy}
    blocks = list(model.model.layers)
    try:
        for block in blocks:
            # backward begins with the last block: what it would free is needed again at once
            fully_shard(block, **options, reshard_after_forward=block is not blocks[-1])
        fully_shard(model, **options)
    except RuntimeError as error:
        if "floating point dtype" not in str(error):
            raise
        raise ValueError(
            f"--load_in_4bit: torch {torch.__version__} cannot divide 4-bit weights over ranks; "
            "choose --shard none, or install torch 2.13 or newer"
        ) from None
    for block, following in zip(blocks, blocks[1:], strict=False):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])
    for method in ("logits", "decode_step"):
        register_fsdp_forward_method(model, method)
    return world_size // G


def reshard(model: Transformer) -> None:
    """Free what a pass without backward leaves gathered: weights of the root, of the last block."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# ------------------------------------------------------------------------ a rank's rows
def stored_parameters(model: Transformer) -> dict[str, Tensor]:
    """Parameters by name, as model and optimizer keep them.

    RuntimeError if a sharded model stands gathered: whatever is written into gathered weights is
    thrown away at the next reshard."""
    parameters = dict(model.named_parameters())
    for name, p in parameters.items() if isinstance(model, FSDPModule) else ():
        if not isinstance(p, DTensor):
            raise RuntimeError(f"{name} is gathered, not sharded: call reshard(model) first")
    return parameters


def trained(model: Transformer) -> dict[str, Tensor]:
    """Those of stored_parameters that the optimizer changes."""
    return {name: p for name, p in stored_parameters(model).items() if p.requires_grad}


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> tuple[int, int]:
    """Rows [start, stop) of the whole tensor that this rank holds."""
    n = tensor.shape[0]
    if not isinstance(tensor, DTensor):
        return 0, n
    mesh = tensor.device_mesh
    size, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    each = math.ceil(n / size)
    start, stop = min(rank * each, n), min((rank + 1) * each, n)
    assert stop - start == local(tensor).shape[0], (tensor.shape, start, stop)
    return start, stop


@torch.no_grad()
def fill(tensors: dict[str, Tensor], whole: Callable[[str], Any]) -> None:
    """Write into each tensor this rank's rows of whole(name), which may be read where it is cut."""
    for name, tensor in tensors.items():
        start, stop = own_rows(tensor)
        local(tensor).copy_(whole(name)[start:stop])


def gathered(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the CPU), one after the other; all ranks must go through them.

    On ranks but 0 it is empty: eight copies of an 8B model would fill the machine."""
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield name, whole.detach().cpu() if dist.get_rank() == 0 else torch.empty(0)


# ------------------------------------------------------------------------ sums over ranks
def average_gradients(optimizer) -> None:
    """--shard none: one all_reduce over all gradients as one flat tensor."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([g.numel() for g in gradients])
    averaged = [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
    torch._foreach_copy_(gradients, averaged)


def reduce_metrics(
    sums: dict[str, Tensor],  # this rank's, on its device, float64
    counts: dict[str, float],
) -> tuple[dict[str, Tensor], Tensor]:
    """Means over all ranks by name, and a flag per rank (R,): its own loss was not finite.

    One all_reduce, and nothing is read."""
    totals = torch.stack(list(sums.values()))
    known = torch.tensor(list(counts.values()), dtype=torch.double)
    own = torch.eye(dist.get_world_size(), dtype=torch.double)[dist.get_rank()]
    flags = to_device(own, totals.device) * ~sums["loss"].isfinite()
    reduced = torch.cat([totals, to_device(known, totals.device), flags])
    dist.all_reduce(reduced)

    totals, known, flags = reduced.split([len(sums), len(sums), len(own)])
    return dict(zip(sums, totals / known, strict=True)), flags
