"""Estimate what a run needs, before you pay for it: memory of a rank, and hours of training.

A step runs on fake tensors (shapes without memory), while a dispatch hook adds up the bytes of live
tensors. Not counted: fragmentation (some per cent), CUDA's context (0.5 GB), NCCL's buffers."""

import contextlib
import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from common import clock, print0, table
from data import build_tree
from hub.quantized import to_4bit
from lora import apply_lora
from model import ModelConfig, Transformer
from runtime.policy import adapter_rank
from runtime.processes import Run

GB, GPUS = 10**9, (24, 48, 80, 141)  # bytes; GB of memory
GPU_FLOPS, CPU_FLOPS = 395e12, 25e9  # per second: half an H200's dense bf16 rate; per thread
ON_GPU = {  # where the CPU's code differs: name -> a function that acts as on a GPU
    "model.attend": lambda q, k, v, **options: torch.nn.functional.scaled_dot_product_attention(
        q, *(t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v)), **options
    ),
    "kernels.nf4.dequantize_nf4": lambda codes, _, shape, dtype: torch.empty(shape, dtype=dtype),
    "kernels.logps.mm_fp32": lambda a, b: torch.mm(a.to(b.dtype), b).to(torch.float32),
    "kernels.lora.mm_fp32": lambda a, b: torch.mm(a.to(b.dtype), b).to(torch.float32),
}


class LiveBytes(TorchDispatchMode):
    """Bytes of all live tensors that operations have returned; `peak` is their maximum."""

    def __init__(self):
        super().__init__()
        self.sizes, self.live, self.peak = {}, 0, 0  # of storages, by their addresses

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, storage._cdata)
        return out

    def free(self, address: int) -> None:
        self.live -= self.sizes.pop(address)


@dataclass(frozen=True)
class Workload:
    """What a stage trains, and its widest prompt."""

    config: ModelConfig
    dtype: torch.dtype  # of the computation
    r: int  # LoRA rank; 0: full training, with fp32 weights
    prompt: int  # tokens
    completions: list[int]  # tokens of each completion, EOS included
    history: int = 0  # prompt tokens that are targets, too
    dropout: float = 0.0
    load_in_4bit: bool = False


def fake_step(work: Workload, B: int, checkpointing: bool = False, gpu: bool = True):
    """Run two steps on fake tensors (the second has AdamW's moments): bytes and FLOPs."""
    tree = build_tree([[0] * work.prompt] * B, [[[0] * n for n in work.completions]] * B)
    tree = tree.with_prompt_labels(np.array([[1, 1 + work.history]] * B))
    with FakeTensorMode(), LiveBytes() as alive, contextlib.ExitStack() as patches:
        for name, way in ON_GPU.items() if gpu else ():
            patches.enter_context(patch(name, way))
        torch.set_default_dtype(work.dtype)
        model = Transformer(work.config).train()
        torch.set_default_dtype(torch.float32)
        if work.load_in_4bit:
            to_4bit(model)
        if work.r:
            apply_lora(model, work.r, 2 * work.r, work.dropout)
        for block in model.model.layers:
            block.checkpointing = checkpointing
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, foreach=True)
        for name in ("input_ids", "position_ids", "branch_ids", "rows", "labels", "sequence_ids"):
            setattr(tree, name, torch.empty(getattr(tree, name).shape, dtype=torch.long))
        inplace = {torch.ops.aten.addmm_: lambda c, a, b, *rest, **kwargs: 2 * a[0] * a[1] * b[1]}
        counter = FlopCounterMode(display=False, custom_mapping=inplace)
        # the counter keeps tensors alive, so it goes first and alone
        for counted in (counter, contextlib.nullcontext()):
            alive.peak = alive.live
            with counted:
                logps = tree.sum_logps(model(tree)[0])
                logps.sum().backward()
            del logps
            peak = alive.peak  # training's fused AdamW works in place, this one does not
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    base = {name: p.nbytes for name, p in model.named_parameters() if ".lora_" not in name}
    root = sum(nbytes for name, nbytes in base.items() if ".layers." not in name)
    block = sum(nbytes for name, nbytes in base.items() if ".layers.0." in name)
    numbers, moving = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
    held = sum(p.nbytes for p in model.parameters())
    return SimpleNamespace(
        weights=held - moving if work.r else 4 * numbers,  # as stored
        trained=(16 if work.r else 12) * numbers,  # adapters, gradients, moments in fp32
        gathered=root + 2 * block,  # what a sharded rank holds whole while it computes
        passing=peak - held - 3 * moving,  # all else: activations, the head's scratch, temporaries
        flops=counter.get_total_flops(),  # forward and backward
    )


def memory_table(work: Workload, width: int, B: int, one: list, run: Run) -> str:
    """Table of a rank's memory with B such prompts; `one`: steps without, with checkpointing."""
    two = [fake_step(work, 2, checkpointing) for checkpointing in (False, True)]
    passing = [(a.passing, b.passing - a.passing) for a, b in zip(one, two)]  # first, each further
    columns = ["ranks", "--shard", "weights", "trained", "gathered", "activations", "total"]
    columns += ["checkpointed", "total", *(f"tokens in {gpu} GB" for gpu in GPUS)]
    rows = []
    for ranks, G in [(n, G) for n in sorted({1, 2, 4, 8, run.world_size}) for G in sorted({1, n})]:
        trained = one[0].trained / G
        if work.r and run.config.batch_size > ranks * B:
            # gradients of adapters are reduced once a step, and whole between micro-batches
            trained += (1 - 1 / G) * one[0].trained / 4
        sizes = [one[0].weights / G, trained, one[0].gathered * (G > 1)]  # whole, to compute with
        kept = sum(sizes)
        for first, further in passing:
            sizes += [first + (B - 1) * further, kept + first + (B - 1) * further]
        row = [str(ranks), "full" if G > 1 else "none", *(f"{size / GB:.2f}" for size in sizes)]
        for gpu in GPUS:
            left = [(gpu * GB - kept - first) / further for first, further in passing]
            row.append(" / ".join(f"{max(0, int(1 + n)) * width:,}" for n in left))
        rows.append(row)
    return table(columns, rows)


def dry_run(run: Run, stages: dict) -> None:
    """Print first losses, memory and hours; `stages`: name -> (objective, schedule)."""
    config, total, ranks = run.config, 0.0, f"{run.world_size} rank(s)"
    rate, on = CPU_FLOPS * torch.get_num_threads(), "a CPU's usual 25 GFLOP/s per thread"
    if run.device.type == "cuda":
        rate, on = GPU_FLOPS, "half of an H200's dense bf16 rate"
    for stage, (objective, schedule) in stages.items():
        longest = int(schedule.widths[:, 1].argmax())
        work = Workload(
            config=ModelConfig.from_pretrained(run.base),
            dtype=getattr(torch, config.dtype, torch.bfloat16),  # auto is bfloat16 on a GPU
            r=adapter_rank(config, stage),
            prompt=int(schedule.widths[:, 0].max()),
            completions=list(map(len, run.train.title_ids(longest, objective.slots[longest]))),
            history=int(np.diff(run.train.histories).max()) if objective.history_weight else 0,
            dropout=config.lora_dropout if stage == "sft" else 0.0,
            load_in_4bit=config.load_in_4bit,
        )
        width = work.prompt + sum(n - 1 for n in work.completions)
        B = max(1, config.micro_batch_tokens // width)
        one = [fake_step(work, 1, checkpointing) for checkpointing in (False, True)]
        flops = one[config.gradient_checkpointing].flops * schedule.step_tokens / width
        seconds = flops / rate / run.world_size
        total += seconds * schedule.num_steps
        if objective.has_reference:
            print0(f"\n{stage}: first preference loss: {objective.at_the_start()[0].mean():.4f}")
        print0(
            f"\n{stage}: memory of a rank in GB ({'LoRA' if work.r else 'full training'}, "
            f"{work.dtype}{', base in 4 bits' * work.load_in_4bit}), and the largest "
            "--micro_batch_tokens without / with --gradient_checkpointing (0: does not fit)\n\n"
            f"{memory_table(work, width, B, one, run)}\n\n{stage}: a step of {config.batch_size} "
            f"prompts takes {flops / 1e12:.3g} TFLOP, {seconds:.3g} s on {ranks} at "
            f"{rate / 1e12:.3g} TFLOP/s per rank, {on}, times {schedule.num_steps} steps"
        )
    hours_of = f"{total / 3600:.3g} h ({clock(total)}) of training on {ranks}"
    print0(f"\nthe whole run: {hours_of}, without references and tests. Nothing was trained")
