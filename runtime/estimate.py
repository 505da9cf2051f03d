"""What a run needs, before anything is paid for: memory of a rank, and hours of training.

`train.py --dry_run` needs config.json and tokenizer.json, no weights. A step as training takes it
is run on fake tensors (shapes and dtypes without memory), while a dispatch hook adds up the bytes
of all tensors alive. With sharding a rank keeps 1 / G of what is persistent, and beside it whole
copies of what is being computed with: embedding and head, and two blocks (one in use, one
prefetched). Not counted: the allocator's fragmentation (some per cent), CUDA's context (about
0.5 GB), NCCL's buffers. Hours are floating-point operations by a rate: that of a real step, if the
CPU can run it in some seconds, else GPU_FLOPS.

Legend: B prompts of a micro-batch, G ranks that share a copy.
"""

import contextlib
import time
import weakref
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from common import hours, print0, table
from data import NUM_CANDIDATES, PromptTree, build_tree, tree_widths
from hub.quantized import to_4bit
from lora import apply_lora
from model import ModelConfig, Transformer
from runtime.policy import adapter_rank
from runtime.runs import Run

GB = 10**9  # bytes
GPUS = (24, 48, 80, 141)  # GB of memory
GPU_FLOPS = 395e12  # a second and rank: half of an H200's dense bf16 rate
CPU_LIMIT = 3e11  # floating-point operations of a step that a CPU is asked to run


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors that operations have returned and that live; `peak` is the most."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.live -= nbytes


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

    @property
    def width(self) -> int:
        """Tokens of a row of the tree."""
        return self.prompt + sum(n - 1 for n in self.completions)

    def tree(self, B: int) -> PromptTree:
        tree = build_tree([[0] * self.prompt] * B, [[[0] * n for n in self.completions]] * B)
        return tree.with_prompt_labels(np.array([[1, 1 + self.history]] * B))

    def learner(self, checkpointing: bool) -> tuple[Transformer, torch.optim.Optimizer]:
        """Model and optimizer, of whatever numbers."""
        torch.set_default_dtype(self.dtype)
        try:
            model = Transformer(self.config)
        finally:
            torch.set_default_dtype(torch.float32)
        if self.load_in_4bit:
            to_4bit(model)
        if self.r:
            apply_lora(model, self.r, 2 * self.r, self.dropout)
        for block in model.model.layers:
            block.checkpointing = checkpointing
        trained = [p for p in model.parameters() if p.requires_grad]
        return model.train(), torch.optim.AdamW(trained, foreach=True)


@dataclass
class Step:
    """One micro-batch in one process: bytes, and floating-point operations."""

    weights: int  # as stored
    trained: int  # adapters (all weights, in full training), gradients and both moments, in fp32
    gathered: int  # what a sharded rank holds whole while it computes
    passing: int  # all else at the peak: activations, the head's scratch, temporaries
    flops: int  # forward and backward


def fake_step(work: Workload, B: int, checkpointing: bool = False, gpu: bool = True) -> Step:
    """Run two steps on fake tensors (the second finds moments in place), add up what is alive."""
    tree = work.tree(B)
    imitation = imitate_gpu() if gpu else contextlib.nullcontext()
    with FakeTensorMode(), LiveBytes() as alive, imitation:
        model, optimizer = work.learner(checkpointing)
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

    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    base = {name: size for name, size in sizes.items() if ".lora_" not in name}
    root = sum(size for name, size in base.items() if ".layers." not in name)
    block = sum(size for name, size in base.items() if ".layers.0." in name)
    trained = [p for p in model.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    held, moving = sum(sizes.values()), sum(p.numel() * p.element_size() for p in trained)
    return Step(
        weights=held - moving if work.r else 4 * numbers,
        trained=(16 if work.r else 12) * numbers,
        gathered=root + 2 * block,
        passing=peak - held - 3 * moving,
        flops=counter.get_total_flops(),
    )


@contextlib.contextmanager
def imitate_gpu():
    """Do what the CPU's kernels do otherwise: K and V are repeated for their heads, say."""

    def attend(q, k, v, **kwargs):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **kwargs)

    def mm_fp32(a, b):
        return torch.mm(a.to(b.dtype), b).to(torch.float32)

    def dequantize_nf4(codes, absmax, shape, dtype):  # the kernel has no temporaries
        return torch.empty(shape, dtype=dtype)

    with (
        patch("model.attend", attend),
        patch("kernels.nf4.dequantize_nf4", dequantize_nf4),
        patch("kernels.logps.mm_fp32", mm_fp32),
        patch("kernels.lora.mm_fp32", mm_fp32),
    ):
        yield


def memory_table(work: Workload, B: int, one: list[Step], run: Run) -> str:
    """Memory of a rank, on 1 to 8 ranks, sharded or not, with B prompts of a micro-batch.

    `one` has a step of one prompt without checkpointing, and with it."""
    two = [fake_step(work, 2, checkpointing) for checkpointing in (False, True)]
    columns = ["ranks", "--shard", "weights", "trained", "gathered", "activations", "total"]
    columns += ["checkpointed", "total", *(f"tokens in {gpu} GB" for gpu in GPUS)]
    rows = []
    cases = [(n, mode) for n in sorted({1, 2, 4, 8, run.world_size}) for mode in ("none", "full")]
    for ranks, mode in cases:
        if mode == "full" and ranks == 1:
            continue
        G = ranks if mode == "full" else 1
        trained = one[0].trained / G
        if work.r and run.config.batch_size > ranks * B:
            # gradients of adapters are reduced once a step: whole between its micro-batches
            trained += (1 - 1 / G) * one[0].trained / 4
        sizes = [one[0].weights / G, trained, one[0].gathered if G > 1 else 0]
        kept, rooms = sum(sizes), []
        for first, second in zip(one, two, strict=True):
            further = second.passing - first.passing  # of each further prompt
            activations = first.passing + (B - 1) * further
            sizes += [activations, kept + activations]
            prompts = [int(1 + (gpu * GB - kept - first.passing) / further) for gpu in GPUS]
            rooms.append([f"{max(0, n) * work.width:,}" for n in prompts])
        rows.append([str(ranks), mode, *(f"{size / GB:.2f}" for size in sizes)])
        rows[-1] += [" / ".join(both) for both in zip(*rooms, strict=True)]
    return table(columns, rows)


def cpu_rate(work: Workload, B: int, checkpointing: bool, flops: float) -> float:
    """Floating-point operations a second of a real step on this CPU, with random weights."""
    model, optimizer = replace(work, dtype=torch.float32).learner(checkpointing)
    for p in model.parameters():
        p.data.normal_(std=0.02)
    for _ in range(2):  # the first warms up
        started, tree = time.perf_counter(), work.tree(B)
        tree.sum_logps(model(tree)[0]).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return flops / (time.perf_counter() - started)


def widest_step(run: Run, stage: str, objective, schedule) -> Workload:
    """What a stage trains, with the longest prompt and the longest completions."""
    config, longest = run.config, int(schedule.widths[:, 1].argmax())
    return Workload(
        config=ModelConfig.from_pretrained(run.base),
        dtype=getattr(torch, config.dtype, torch.bfloat16),  # auto is bfloat16 on a GPU
        r=adapter_rank(config, stage),
        prompt=int(schedule.widths[:, 0].max()),
        completions=list(map(len, run.train.slots(longest, objective.slots[longest]))),
        history=int(np.diff(run.train.histories).max()) if objective.history_weight else 0,
        dropout=config.lora_dropout if stage == "sft" else 0.0,
        load_in_4bit=config.load_in_4bit,
    )


def dry_run(run: Run, stages: dict) -> None:
    """Print what a careful user looks at first; `stages`: name -> (objective, schedule)."""
    config, total = run.config, 0.0
    for stage, (objective, schedule) in stages.items():
        if objective.has_reference:
            first = objective.at_the_start()[0].mean()
            print0(f"\n{stage}: the first loss must be {first:.4f}: policy and reference are one")
        work = widest_step(run, stage, objective, schedule)
        B = max(1, config.micro_batch_tokens // work.width)
        one = [fake_step(work, 1, checkpointing) for checkpointing in (False, True)]
        print0(
            f"\n{stage}: memory of a rank in GB ({'LoRA' if work.r else 'full training'}, "
            f"{work.dtype}{', base in 4 bits' if work.load_in_4bit else ''}), and the largest "
            "--micro_batch_tokens without / with --gradient_checkpointing (0: does not fit)\n\n"
            f"{memory_table(work, B, one, run)}"
        )
        flops = one[config.gradient_checkpointing].flops  # of one prompt of the widest
        rate, known = GPU_FLOPS, "assumed: half of an H200's dense bf16 rate"
        measured = min(B, int(CPU_LIMIT / flops))  # prompts
        if run.device.type == "cpu" and measured and not work.load_in_4bit:
            rate = cpu_rate(work, measured, config.gradient_checkpointing, measured * flops)
            known = "measured: a step on this CPU"
        tokens = float(schedule.widths.sum(1).mean())
        flops *= tokens / work.width * config.batch_size
        seconds = flops / rate / run.world_size
        total += seconds * schedule.num_steps
        print0(
            f"\n{stage}: a step of {config.batch_size} prompts of {tokens:.0f} tokens takes "
            f"{flops / 1e12:.3g} TFLOP, {seconds:.3g} s on {run.world_size} rank(s) at "
            f"{rate / 1e12:.3g} TFLOP/s a rank ({known}), times {schedule.num_steps} steps"
        )
    print0(
        f"\nthe whole run: {total / 3600:.3g} h ({hours(total)}) of training on {run.world_size} "
        "rank(s), less on more GPUs; reference, validation and tests come on top. Nothing trained"
    )


def say_duration(run: Run, pace: float, stages: dict, current: str, done: int) -> None:
    """Print how long the run still takes, by the seconds `pace` of its first steps.

    What is read forward alone (references, validations, tests) costs half a training step."""
    config, names, tokens = run.config, list(stages), 0.0
    candidates = np.tile(np.arange(NUM_CANDIDATES), (len(run.test.prompts), 1))
    answered = tree_widths(run.test, candidates).sum(1).mean()  # tokens of a user's 20 candidates
    for name in names[names.index(current) :]:
        objective, schedule = stages[name]
        steps = schedule.num_steps - (done if name == current else 0)
        validations = 1 + (steps // config.eval_steps if config.eval_steps else 0)
        users = len(run.test.prompts) + (validations * len(run.val.prompts) if run.val else 0)
        tokens += schedule.widths.sum(1).mean() * config.batch_size * steps + answered * users / 2
        if objective.has_reference and name != current:
            tokens += schedule.widths.sum() / 2
    seconds = tokens * pace / (stages[current][1].widths.sum(1).mean() * config.batch_size)
    print0(f"about {hours(seconds)} to the end of the run, by the time of its first steps")
