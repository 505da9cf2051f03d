"""Weights divided over ranks: FSDP2, loading that reads only what a rank owns,
gathering tensor by tensor.

A model is built on the `meta` device, gets its adapters, is sharded, and only then receives
memory: each rank reads the rows it owns out of the safetensors files, so no rank ever holds more
than its share and one slice. Row r of a tensor of n rows over G ranks belongs to rank
r // ceil(n / G), as `torch.chunk` divides it.

    full     every block, then the root, is split over all ranks
    hybrid   split inside groups of --shard_group_size ranks (a machine),
             replicated between the groups
    none     a replica on each rank; only gradients are reduced, in one bucket

Legend: G ranks that share one copy, R = world_size / G replicas of it.
"""

import math
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from data import to_device
from lora import lora_layers
from model import Transformer

GB = 10**9  # bytes


def shard_group(mode: str, group_size: int, world_size: int) -> int:
    """Ranks that share one copy of the weights; ValueError if they do not divide the world."""
    if mode != "hybrid":
        return world_size if mode == "full" else 1
    size = group_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if world_size % size:
        fitting = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ValueError(
            f"--shard_group_size {size} does not divide the {world_size} processes; "
            f"try one of {fitting}"
        )
    return size


def shard(
    model: Transformer, mode: str, group_size: int, device, compute_dtype: torch.dtype | None = None
) -> int:
    """Split blocks and root in place; returns R, the number of replicas.

    Gradients are reduced in fp32.
    compute_dtype: full training in bf16 keeps fp32 weights and computes in this; None leaves
    frozen bf16 base and fp32 adapters as they are. Nothing is done where a rank keeps a whole
    replica, unless FSDP must convert its weights."""
    world_size = dist.get_world_size()
    G = shard_group(mode, group_size, world_size)
    if G == 1 and compute_dtype is None:
        return world_size
    kind = torch.device(device).type
    if world_size == G:
        mesh = init_device_mesh(kind, (world_size,))
    else:
        mesh = init_device_mesh(kind, (world_size // G, G), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    blocks = list(model.model.layers)
    for block in blocks:
        # backward begins with the last block: what it would free is needed again at once
        freed = block is not blocks[-1]
        split(block, mesh=mesh, mp_policy=policy, reshard_after_forward=freed)
    split(model, mesh=mesh, mp_policy=policy)
    for block, following in zip(blocks, blocks[1:], strict=False):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])
    for method in ("logits", "decode_step"):
        register_fsdp_forward_method(model, method)
    return world_size // G


def split(module: nn.Module, **options) -> None:
    """fully_shard; ValueError where it cannot hold a 4-bit base's bytes, as in torch 2.11."""
    try:
        fully_shard(module, **options)
    except RuntimeError as error:
        if "floating point dtype" not in str(error):
            raise
        raise ValueError(
            f"--load_in_4bit: torch {torch.__version__} cannot divide 4-bit weights over ranks; "
            "choose --shard none, or install torch 2.13 or newer"
        ) from None


def reshard(model: Transformer) -> None:
    """Free what a pass without backward leaves gathered:
    the root's weights and the last block's."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def stored_parameters(model: Transformer) -> dict[str, Tensor]:
    """Parameters by name, as model and optimizer keep them; a tied one under both of its names.

    RuntimeError if a sharded model stands gathered: whatever is written into gathered weights is
    thrown away at the next reshard."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if isinstance(model, FSDPModule):
        for name, p in parameters.items():
            if not isinstance(p, DTensor):
                raise RuntimeError(f"{name} is gathered, not sharded: call reshard(model) first")
    return parameters


def trained(model: Transformer) -> dict[str, Tensor]:
    """Those of stored_parameters that the optimizer changes, each once."""
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: p for name, p in stored_parameters(model).items() if name in names}


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
def fill(tensor: Tensor, rows: Callable[[int, int], Tensor]) -> None:
    """Write rows(start, stop) of the whole into this rank's part."""
    start, stop = own_rows(tensor)
    if stop > start:
        local(tensor).copy_(rows(start, stop))


def own_parts(model: Transformer) -> dict[str, tuple[Tensor, int, int]]:
    """Name -> this rank's part of a parameter, and which rows [start, stop) of the whole it is."""
    return {name: (local(p), *own_rows(p)) for name, p in stored_parameters(model).items()}


def init_adapter(model: Transformer, seed: int) -> None:
    """A fresh adapter: A drawn whole from (seed, name) on every rank and then cut, B zero."""
    parameters = stored_parameters(model)
    for name, layer in lora_layers(model).items():
        A = layer.draw_A(name, seed)
        fill(parameters[f"{name}.lora_A.weight"], lambda start, stop, A=A: A[start:stop])
        nn.init.zeros_(local(parameters[f"{name}.lora_B.weight"]))


def fill_adapter(model: Transformer, tensors: dict[str, Tensor]) -> None:
    """A trained adapter's tensors by name, each rank its rows."""
    parameters = stored_parameters(model)
    for name, tensor in tensors.items():
        fill(parameters[name], lambda start, stop, t=tensor: t[start:stop])


def gathered(model: Transformer, only_adapter: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the CPU) one after the other;
    every rank must go through all of them, rank 0 keeps them.

    On the other ranks the tensor is empty: eight copies of an 8B model would fill the machine."""
    for name, p in model.state_dict().items():
        if only_adapter and ".lora_" not in name:
            continue
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        if dist.get_rank() == 0:
            yield name, whole.detach().cpu()
        else:
            yield name, torch.empty(0)


def replica_note(weights: int, trained: int, world_size: int, memory: int) -> str:
    """What --shard none would save, if a replica with its adapter leaves more than
    half of a device's memory free."""
    if world_size == 1 or weights + trained > 0.5 * memory:
        return ""
    moved = 2 * weights * (world_size - 1) / world_size
    return (
        f"note: a whole replica ({(weights + trained) / GB:.1f} GB) fits on each device "
        f"({memory / GB:.0f} GB): --shard none would save gathering {moved / GB:.1f} GB for every "
        f"micro-batch, and reduce {trained / 4 / GB:.2f} GB of gradients a step instead\n"
    )


def device_memory(device) -> int:
    """Bytes of a GPU, or of this process's share of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


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
