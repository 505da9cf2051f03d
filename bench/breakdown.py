"""Where the time of one RecPO step goes: its operations by part, from PyTorch's profiler.

    python bench/breakdown.py

Every operation of a step (preparation of its micro-batch, forward, backward, update) is put into a
part by its name and the shapes of its inputs, and counted with its own time, without that of
operations it calls. FLOP/s are those of a part's GEMMs, computed from their shapes, against one
large GEMM of the same dtype in the same process: what the machine can do.
"""

from collections import defaultdict

import torch
from harness import (
    LORA_RANK,
    SHAPES,
    examples,
    header,
    interleaved,
    make_model,
    matrix_rate,
    one_process,
    parser,
    synchronize,
    table,
    tree_of,
)
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from losses import recpo_loss
from train import TrainConfig, train_step

NUM_NEGATIVES = 3
RANKS = {LORA_RANK, 2 * LORA_RANK, 3 * LORA_RANK}  # stacked for two or three projections
PARTS = (
    "projections",
    "adapters",
    "attention",
    "head",
    "norm",
    "rotary",
    "SwiGLU",
    "optimizer",
    "loader",
    "other",
)


def gemm_flops(name: str, shapes: list) -> int:
    """2 m k n of aten::mm(a, b) and aten::addmm(c, a, b)."""
    if name not in ("aten::mm", "aten::addmm", "aten::addmm_"):
        return 0
    a, b = [shape for shape in shapes if len(shape) == 2][-2:]
    return 2 * a[0] * a[1] * b[1]


def part_of(name: str, shapes: list, config, num_rows: int) -> str:
    """The part of the model that an operation of this name on inputs of these shapes belongs to."""
    shapes = [shape for shape in shapes if shape]
    dims = {d for shape in shapes for d in shape}
    of_adapter = any(RANKS & set(shape if len(shape) == 2 else shape[-1:]) for shape in shapes)
    if "loader" in name:
        return "loader"
    if "adam" in name.lower() or "norm" in name and "vector" in name:
        return "optimizer"
    if "scaled_dot_product" in name or "flash" in name or "efficient_attention" in name:
        return "attention"
    if config.vocab_size in dims or (num_rows in dims and config.hidden_size in dims):
        return "head"
    if gemm_flops(name, shapes):
        return "adapters" if of_adapter else "projections"
    if of_adapter:
        return "adapters"
    if config.intermediate_size in dims:
        return "SwiGLU"
    if any(len(shape) == 4 for shape in shapes):
        return "rotary"
    if config.hidden_size in dims and "add" not in name:  # additions are the residual stream
        return "norm"
    return "other"


def profile_step(step, args):
    """The profiler's averages over `repeats` steps."""
    activities = [ProfilerActivity.CPU]
    if args.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiled:
        for _ in range(args.repeats):
            step()
    return profiled.key_averages(group_by_input_shape=True)


def times_and_flops(events, args, num_rows: int) -> tuple[dict[str, float], dict[str, float]]:
    """Part -> seconds and GEMM FLOP of one step."""
    times, flops = defaultdict(float), defaultdict(float)
    for event in events:
        # kernels: their time stands at the operations that launched them, too
        if event.device_type != DeviceType.CPU:
            continue
        own = event.self_cpu_time_total
        if args.device == "cuda" and "loader" not in event.key:
            own = event.self_device_time_total
        shapes = event.input_shapes or []
        part = part_of(event.key, shapes, SHAPES[args.shape], num_rows)
        times[part] += own / 1e6 / args.repeats
        per_call = gemm_flops(event.key, [s for s in shapes if s])
        flops[part] += per_call * event.count / args.repeats
    return times, flops


def main() -> None:
    args = parser(__doc__, batch=8, repeats=5).parse_args()
    one_process()
    model = make_model(args).train()
    prompts, completions = examples(args, args.batch, 1 + NUM_NEGATIVES)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    options = TrainConfig()

    def compute(tree):
        logps = tree.sum_logps(model(tree)[0])
        margins = torch.full((len(logps), NUM_NEGATIVES), 6.0, device=args.device)
        loss = recpo_loss(logps, logps.detach(), margins, beta=1.0)[0].mean()
        return loss, {"loss": (loss.detach(), 1.0)}

    def step():
        with record_function("loader"):
            tree = tree_of(args, prompts, completions)
        train_step(model, optimizer, [tree], compute, 1e-5, options).read()
        synchronize()

    seconds = interleaved({"step": step}, args.repeats)["step"]
    events = profile_step(step, args)
    tree = tree_of(args, prompts, completions)
    times, flops = times_and_flops(events, args, len(tree.labels))
    rate = matrix_rate(args, tree.input_ids.numel())
    header(
        "Where the time of a step goes",
        args,
        f"Shape {args.shape}, a step of {args.batch} prompts: {tuple(tree.input_ids.shape)} tokens "
        f"with padding, {len(tree.labels)} scored rows; median {1000 * seconds:.0f} ms unprofiled. "
        f"One large GEMM: {rate / 1e9:.0f} GFLOP/s.",
    )
    print_parts(times, flops, seconds, rate, args)


def print_parts(times: dict, flops: dict, seconds: float, rate: float, args) -> None:
    """A row per part, then what the GPU waited, then the whole step."""
    total, total_flops = sum(times.values()), sum(flops.values())
    rows = []
    for part in PARTS:
        row = [part, f"{100 * times[part] / total:.1f} %", "", ""]
        if flops[part]:
            reached = flops[part] / times[part] if times[part] else 0
            row[2:] = [f"{flops[part] / 1e9:.1f}", f"{100 * reached / rate:.0f} %"]
        rows.append(row)
    if args.device == "cuda":
        rows.append(["GPU idle", f"{100 * (1 - total / seconds):.1f} % of the step", "", ""])
    share = f"{100 * total_flops / seconds / rate:.0f} %"
    rows.append(["whole step", "100 %", f"{total_flops / 1e9:.1f}", share])
    table(["part", "share of time", "GEMM GFLOP", "of the machine's matrix rate"], rows)


if __name__ == "__main__":
    main()
