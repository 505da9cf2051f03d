"""What a run needs, before anything is paid for:
memory of each rank, and floating-point operations of a step.

    python train.py --dry_run --config configs/paper.json --model DIR ...

needs config.json and tokenizer.json, no weights.

The very step that training runs, forward, loss, backward and AdamW, is run on fake tensors
(shapes and dtypes without memory), while a dispatch hook adds up the bytes of all tensors
alive. So the figure follows the code, not a formula about it. What fake tensors of one
process do not show is added by formula: with sharding a rank keeps 1 / G of what is
persistent, and beside it whole copies of what is being computed with: embedding and head, and
two blocks (one in use, one prefetched).

For a GPU, what the CPU's kernels do otherwise is imitated: K and V repeated for their heads,
logits of a half-precision GEMM. Not counted: the allocator's rounding and fragmentation (some per
cent), CUDA's context (about 0.5 GB), NCCL's buffers.

Legend: B prompts of a micro-batch, P prompt tokens, C tokens of all completions, M scored
tokens, G ranks that share a copy.
"""

import contextlib
import weakref
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from common import print0
from data import BOUNDARY_CHECKS, build_tree, tree_widths
from hub.quantized import to_4bit
from lora import apply_lora
from model import ModelConfig, Transformer
from runtime.runs import Run
from runtime.sharding import GB

TFLOPS = 395.0  # achieved by a rank: half of an H200's dense bf16 rate


class LiveBytes(TorchDispatchMode):
    """Adds up the storages of all tensors that operations return, until they are freed;
    `peak` is the most at one time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = 0, 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return out

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        self.seen.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.free, key, storage.nbytes())

    def free(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.live -= nbytes


@dataclass
class Step:
    """One micro-batch in one process."""

    weights: int  # bytes of all weights as stored
    # bytes of adapters (all weights, in full training), their gradients and both moments, in fp32
    trained: int
    passing: int  # bytes of all else at the peak: activations, the head's scratch, temporaries
    flops: int  # forward and backward


def fake_step(
    config: ModelConfig,
    dtype: torch.dtype,  # of the computation
    r: int,  # LoRA rank; 0: full training, with fp32 weights
    targets: list[str],
    dropout: float,
    checkpointing: bool,
    B: int,
    P: int,
    completions: list[int],  # tokens of each completion, EOS included
    gpu: bool = False,
    load_in_4bit: bool = False,
    history: int = 0,  # prompt tokens that are targets, too
) -> Step:
    """Run two steps on fake tensors (the second one finds the moments in place)
    and add up what is alive."""
    tree = build_tree([[0] * P] * B, [[[0] * n for n in completions]] * B)
    if history:
        tree = tree.with_prompt_labels(np.array([[1, 1 + history]] * B))
    imitation = contextlib.nullcontext()
    if gpu:
        imitation = _imitate_gpu()
    with FakeTensorMode(), LiveBytes() as alive, imitation:
        torch.set_default_dtype(dtype)
        try:
            model = Transformer(config)
        finally:
            torch.set_default_dtype(torch.float32)
        if load_in_4bit:
            to_4bit(model)
        if r:
            with patch("lora.LoRALinear.reset_parameters"):
                apply_lora(model, r, 2 * r, dropout, targets)
        for block in model.model.layers:
            block.checkpointing = checkpointing
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, foreach=True)
        for name in ("input_ids", "position_ids", "branch_ids", "rows", "labels", "sequence_ids"):
            setattr(tree, name, torch.empty(getattr(tree, name).shape, dtype=torch.long))
        inplace = {torch.ops.aten.addmm_: lambda c, a, b, *rest, **kwargs: 2 * a[0] * a[1] * b[1]}
        counter = FlopCounterMode(display=False, custom_mapping=inplace)
        # the counter keeps tensors alive, so it goes first and alone
        for counted in (counter, contextlib.nullcontext()):
            alive.peak = alive.live
            with counted:
                logps = tree.sum_logps(model.train()(tree)[0])
                logps.sum().backward()
            del logps
            peak = alive.peak  # training's fused AdamW works in place, this one does not
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        moving = sum(p.numel() * p.element_size() for p in parameters)
        numbers = sum(p.numel() for p in parameters)
    adapters = 4 * numbers if r else 0
    weights = held - moving if r else 4 * numbers
    trained = adapters + 3 * 4 * numbers  # gradient, exp_avg, exp_avg_sq
    return Step(weights, trained, peak - held - 3 * moving, counter.get_total_flops())


@contextlib.contextmanager
def _imitate_gpu():
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


def gathered_bytes(config: ModelConfig, dtype: torch.dtype, load_in_4bit: bool = False) -> int:
    """What a rank holds whole while it computes: embedding, head and norm, and two blocks."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    if load_in_4bit:
        to_4bit(model)
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    root = sum(size for name, size in sizes.items() if ".layers." not in name)
    block = sum(size for name, size in sizes.items() if ".layers.0." in name)
    return root + 2 * block


def whole_gradients(step: Step, r: int, several: bool) -> int:
    """Bytes of gradients that a sharded rank holds whole between the micro-batches of a step.

    Those of adapters, where there are `several` micro-batches; full training reduces each one's."""
    return step.trained // 4 if r and several else 0  # adapter, gradient, two moments


@dataclass
class Steps:
    """A step with one prompt and with two, without and with checkpointing (False, True):
    what passes grows linearly with the prompts."""

    one: dict[bool, Step]
    two: dict[bool, Step]

    def slope(self, checkpointing: bool) -> int:
        """Bytes that each further prompt takes."""
        return self.two[checkpointing].passing - self.one[checkpointing].passing

    def passing(self, checkpointing: bool, prompts: float) -> float:
        return self.one[checkpointing].passing + (prompts - 1) * self.slope(checkpointing)

    def most_prompts(self, room: float, checkpointing: bool) -> int:
        """Prompts of the largest micro-batch that `room` bytes hold; 0 where none fits."""
        beyond_one = room - self.one[checkpointing].passing
        return int(1 + beyond_one / self.slope(checkpointing)) if beyond_one > 0 else 0


def report(
    config: ModelConfig,
    dtype: torch.dtype,
    r: int,
    targets: list[str],
    dropout: float,
    prompt: int,  # tokens of the longest prompt
    completions: list[int],  # tokens of the longest completions
    mean_tokens: float,  # of a row of the tree
    micro_batch_tokens: int,
    batch_size: int,
    gpu: bool,
    gpu_memory: float,  # GB; 0: no limit given
    world_size: int,
    load_in_4bit: bool = False,
    history: int = 0,  # prompt tokens that are targets, too
) -> str:
    """A Markdown table: memory of a rank for 1 to 8 ranks, sharded or not,
    with and without checkpointing; time of a step."""
    width = prompt + sum(n - 1 for n in completions)
    B = max(1, micro_batch_tokens // width)

    def steps_of(prompts: int) -> dict[bool, Step]:
        batch = (prompts, prompt, completions, gpu, load_in_4bit, history)
        return {
            checkpointing: fake_step(config, dtype, r, targets, dropout, checkpointing, *batch)
            for checkpointing in (False, True)
        }

    steps = Steps(steps_of(1), steps_of(2))
    whole = gathered_bytes(config, dtype, load_in_4bit)
    lines = table_head(r, gpu_memory)
    for ranks in sorted({1, 2, 4, 8, world_size}):
        several = batch_size > ranks * B
        for mode in ("none", "full") if ranks > 1 else ("none",):
            G = ranks if mode == "full" else 1
            persistent = persistent_bytes(steps.one[False], r, G, whole, several)
            cells = [ranks, mode, *memory_cells(steps, persistent, B)]
            if gpu_memory:
                room = gpu_memory * GB - sum(persistent)
                cells += largest_cells(steps, room, width)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", time_line(steps, B, width, batch_size, mean_tokens, world_size)])


def table_head(r: int, gpu_memory: float) -> list[str]:
    trained = "adapter, gradients, moments" if r else "gradients, moments"
    columns = ["ranks", "--shard", "weights", trained, "gathered"]
    columns += ["activations", "total GB", "activations, checkpointed", "total GB"]
    columns += ["largest --micro_batch_tokens", "checkpointed"] if gpu_memory else []
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]


def persistent_bytes(
    step: Step, r: int, G: int, whole: int, several: bool
) -> tuple[float, float, float]:
    """What stays on a rank: weights, all that training keeps of them, and what it gathers."""
    trained = step.trained / G + (1 - 1 / G) * whole_gradients(step, r, several)
    return step.weights / G, trained, whole if G > 1 else 0


def memory_cells(steps: Steps, persistent: tuple[float, float, float], B: int) -> list[str]:
    """GB: what stays, then activations and total without checkpointing and with it."""
    sizes = [*persistent]
    for checkpointing in (False, True):
        passing = steps.passing(checkpointing, B)
        sizes += [passing, sum(persistent) + passing]
    return [f"{size / GB:.2f}" for size in sizes]


def largest_cells(steps: Steps, room: float, width: int) -> list[str]:
    """Tokens of the largest micro-batch in `room` bytes, without checkpointing and with it."""
    most = [steps.most_prompts(room, checkpointing) for checkpointing in (False, True)]
    return [f"{prompts * width:,}" if prompts else "does not fit" for prompts in most]


def time_line(
    steps: Steps, B: int, width: int, batch_size: int, mean_tokens: float, world_size: int
) -> str:
    flops = steps.one[False].flops / width * mean_tokens * batch_size
    extra = steps.one[True].flops / steps.one[False].flops
    seconds = flops / TFLOPS / 1e12
    times = ", ".join(f"{seconds / n:.2f} s on {n}" for n in sorted({1, 8, world_size}))
    return (
        f"a micro-batch of {B} x {width} tokens; a step of {batch_size} prompts of "
        f"{mean_tokens:.0f} tokens: {flops / 1e12:,.1f} TFLOP, {extra:.2f} times that with "
        f"checkpointing; at {TFLOPS:g} TFLOP/s a rank: {times}"
    )


def dry_run(run: Run, objectives: dict) -> None:
    """What a careful user looks at before paying for GPUs;
    runs the step on fake tensors, reads no weights. `objectives`: stage -> what it trains on."""
    config, model_config = run.config, ModelConfig.from_pretrained(run.base)
    print0(
        "prompt and completion tokenise alike together and apart: "
        f"checked on {BOUNDARY_CHECKS} examples of each split"
    )
    gpu = run.device.type == "cuda" or config.gpu_memory > 0
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
    else:
        dtype = torch.bfloat16 if gpu else torch.float32
    for stage, objective in objectives.items():
        r = config.sft_lora_r if stage == "sft" and config.sft_lora_r >= 0 else config.lora_r
        if objective.has_reference:
            print0(
                f"\n{stage}: the first loss must be {objective.first_loss():.4f}: "
                "the policy is still its reference"
            )
        widths = tree_widths(run.train, objective.slots)
        longest = int(widths[:, 1].argmax())
        completions = list(map(len, run.train.slots(longest, objective.slots[longest])))
        targets = [t.strip() for t in config.lora_target_modules.split(",")]
        dropout = config.lora_dropout if stage == "sft" else 0.0
        print0(
            f"\n{stage}: memory of a rank in GB ({'LoRA' if r else 'full training'}, {dtype}"
            f"{', base in 4 bits' if config.load_in_4bit else ''}, step run on fake tensors)\n"
        )
        lengths = (int(widths[:, 0].max()), completions, float(widths.sum(1).mean()))
        batches = (config.micro_batch_tokens, config.batch_size)
        machine = (gpu, config.gpu_memory, run.world_size, config.load_in_4bit)
        history = int(np.diff(run.train.histories).max()) if objective.history_weight else 0
        sizes = (*lengths, *batches, *machine, history)
        print0(report(model_config, dtype, r, targets, dropout, *sizes))
    print0(
        f"\n--gradient_checkpointing is {'on' if config.gradient_checkpointing else 'off'}, "
        f"--shard {config.shard}; nothing was trained"
    )
