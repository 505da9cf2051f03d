"""How the time of a RecPO step grows.

With prompt length, negatives, micro-batch tokens, vocabulary and processes.

    python bench/scaling.py

Random ids of fixed lengths, so that one thing changes at a time. "linear fit" is the straight line
through (tree tokens, time) of its table; the last column says how far each point lies from it.
Attention makes the time of longer prompts grow faster than linearly, all else is linear. Processes
share the machine's cores.
"""

import statistics
import sys
import time
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from harness import (
    SHAPES,
    examples,
    header,
    in_fresh_process,
    interleaved,
    make_model,
    one_process,
    parser,
    synchronize,
    table,
    tree_of,
)

from losses import recpo_loss
from runtime.processes import setup_distributed
from runtime.sharding import shard
from train import TrainConfig, train_step


class Step:
    """One optimizer step of RecPO on `prompts` random prompts, `micro_batch` at a time."""

    def __init__(self, args, model, length: int, K: int, prompts: int, micro_batch: int = 0):
        args.prompt = length
        drawn = examples(args, prompts, 1 + K)
        size = micro_batch or prompts
        self.trees = [
            tree_of(args, *(part[i : i + size] for part in drawn)) for i in range(0, prompts, size)
        ]
        self.tokens = sum(tree.input_ids.numel() for tree in self.trees)
        self.model, self.prompts = model, prompts * dist.get_world_size()
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
        self.config = TrainConfig()

    def compute(self, tree):
        logps = tree.sum_logps(self.model(tree)[0])
        margins = torch.full((len(logps), logps.shape[1] - 1), 6.0, device=logps.device)
        loss = recpo_loss(logps, logps.detach(), margins, beta=1.0)[0].sum() / self.prompts
        return loss, {"loss": (loss.detach(), 1.0)}

    def __call__(self) -> None:
        train_step(self.model, self.optimizer, self.trees, self.compute, 1e-5, self.config).read()


def print_fit(column: str, steps: dict, seconds: dict, relative_to=None) -> None:
    """One table, with the straight line through its points."""
    tokens = np.array([steps[name].tokens for name in steps])
    times = np.array([seconds[name] for name in steps])
    slope, start = np.polyfit(tokens, times, 1)
    fitted = start + slope * tokens
    share = 1 - ((times - fitted) ** 2).sum() / ((times - times.mean()) ** 2).sum()
    base = seconds[relative_to if relative_to is not None else next(iter(steps))]
    rows = []
    for name, n, t, f in zip(steps, tokens, times, fitted, strict=True):
        cells = [f"{1000 * t:.0f}", f"{t / base:.2f}", f"{1e6 * t / n:.0f}"]
        rows.append([name, n, *cells, f"{100 * (t / f - 1):+.0f} %"])
    columns = [column, "tree tokens", "median ms", "relative", "µs per token"]
    table([*columns, "from the linear fit"], rows)
    line = f"{1000 * start:.0f} ms + {1e6 * slope:.0f} µs per tree token"
    print(f"linear fit: {line}, R² = {share:.4f}", end="")
    if len(steps) > 4:
        curved = np.polyval(np.polyfit(tokens, times, 2), tokens)
        share = 1 - ((times - curved) ** 2).sum() / ((times - times.mean()) ** 2).sum()
        print(f"; with a quadratic part R² = {share:.4f}", end="")
    print("\n", flush=True)


def rank_worker(args) -> None:
    """One of --of_ranks processes, each with its own prompts; rank 0 prints the median time."""
    rank, world_size, device = setup_distributed()
    torch.set_num_threads(args.threads)
    model = make_model(args).train()
    shard(model, args.shard, 0, device)
    step = Step(args, model, 512, 3, prompts=8 // world_size)
    times = []
    for _ in range(args.repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        step()
        synchronize()
        times.append(time.perf_counter() - start)
    if rank == 0:
        print(statistics.median(times[1:]), flush=True)


def main() -> None:
    options = parser(__doc__, repeats=5, of_ranks=0, threads=1)
    options.add_argument("--shard", choices=("none", "full"), default="none")
    args = options.parse_args()
    args.data_dir = ""  # fixed lengths
    if args.of_ranks:
        rank_worker(args)
        return
    one_process()
    config = SHAPES[args.shape]
    header(
        "How a RecPO step grows",
        args,
        f"Shape {args.shape} ({config.num_hidden_layers} layers of {config.hidden_size}, "
        f"V = {config.vocab_size}), completions of {args.completion} tokens. "
        "Each table is one interleaved run.",
    )
    model = make_model(args).train()
    steps = {n: Step(args, model, 512, 3, n) for n in (1, 2, 4, 6, 8)}
    print_fit("prompts of 512, K = 3", steps, interleaved(steps, args.repeats))
    steps = {length: Step(args, model, length, 3, 2) for length in (128, 256, 512, 1024, 2048)}
    print_fit("prompt tokens, 2 prompts, K = 3", steps, interleaved(steps, args.repeats))
    steps = {K: Step(args, model, 512, K, 2) for K in (1, 3, 7, 15)}
    print_fit("K, 2 prompts of 512", steps, interleaved(steps, args.repeats), relative_to=3)
    compare_micro_batches(args, model)
    if args.device == "cpu":
        compare_vocabularies(args)
    compare_processes(args)


def compare_micro_batches(args, model) -> None:
    """8 prompts a step, in 1 to 8 micro-batches."""
    steps = {f"{8 // n} × {n} prompts": Step(args, model, 512, 3, 8, n) for n in (1, 2, 4, 8)}
    seconds = interleaved(steps, args.repeats)
    base = seconds["1 × 8 prompts"]
    rows = []
    for name, step in steps.items():
        each = step.tokens // len(step.trees)
        rows.append([name, each, f"{1000 * seconds[name]:.0f}", f"{seconds[name] / base:.2f}"])
    table(["micro-batches of a step", "tokens each", "median ms", "relative"], rows)


def compare_vocabularies(args) -> None:
    """The same blocks with other heads."""
    hidden_size = SHAPES[args.shape].hidden_size
    vocabularies = (8000, 32000, 64000, 128256)
    models = {V: make_model_of(args, V).train() for V in vocabularies}
    steps = {V: Step(args, models[V], 512, 3, 2) for V in vocabularies}
    seconds = interleaved(steps, args.repeats)
    rows = []
    for V, step in steps.items():
        head_flops = 4 * len(step.trees[0].labels) * hidden_size * V / 1e9
        cells = [f"{1000 * seconds[V]:.0f}", f"{seconds[V] / seconds[8000]:.2f}"]
        rows.append([f"{V:,}", *cells, f"{head_flops:.1f}"])
    table(["vocabulary, 2 prompts of 512", "median ms", "relative", "GFLOP of the head"], rows)


def compare_processes(args) -> None:
    """The same 8 prompts by one and by two processes, started anew."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    rows = []
    for ranks, threads, mode in ((1, 1, "none"), (1, 2, "none"), (2, 1, "none"), (2, 1, "full")):
        if args.device == "cuda" and (ranks > torch.cuda.device_count() or threads > 1):
            continue
        own = ["--of_ranks", str(ranks), "--threads", str(threads), "--shard", mode]
        start = [*launcher, f"--nproc_per_node={ranks}"]
        seconds = in_fresh_process([*sys.argv, *own], start)
        rows.append([ranks, threads if args.device == "cpu" else "", mode, seconds])
    base = rows[0][3]
    rows = [[*row, f"{1000 * s:.0f}", f"{base / s:.2f}"] for *row, s in rows]
    columns = ["processes", "threads each", "--shard", "median ms, 8 prompts of 512"]
    table([*columns, "times faster"], rows)


def make_model_of(args, vocab_size: int):
    """The same blocks with another vocabulary."""
    SHAPES["other"] = replace(SHAPES[args.shape], vocab_size=vocab_size)
    shape, args.shape = args.shape, "other"
    model = make_model(args)
    args.shape = shape
    return model


if __name__ == "__main__":
    main()
