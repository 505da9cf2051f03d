"""What --gradient_checkpointing and --compile cost and save: one RecPO step in four combinations.

    python bench/variants.py                the small shape on a CPU, Llama-3.1-8B's on a GPU
    python bench/variants.py --prompt 512 --data_dir ""     prompts of 512 tokens, completions of 12

The micro-batch is the same for all. Times are medians of interleaved steps in one process, after
compilation. Tokens are those of the tree: the prompt once. FLOP/s are those of the model's forward
and backward, without what checkpointing runs again.
"""

import sys
import time

from harness import (
    LORA_RANK,
    dtype_of,
    examples,
    header,
    in_fresh_process,
    interleaved,
    make_model,
    matrix_rate,
    one_process,
    parser,
    peak_mib,
    table,
)
from step import NUM_NEGATIVES, Here

from lora import TARGET_MODULES
from runtime.estimate import Workload, fake_step

WAYS = {
    "eager": (False, False),
    "checkpointing": (True, False),
    "compiled": (False, True),
    "both": (True, True),
}


def main() -> None:
    options = parser(__doc__, batch=4, repeats=7, tree_batch=0)
    options.add_argument("--peak_of", choices=WAYS, help="print the peak of one way and stop")
    args = options.parse_args()
    one_process()
    prompts, completions = examples(args, args.batch, 1 + NUM_NEGATIVES)
    model = make_model(args)
    here = Here(model, "recpo", prompts, completions, args)
    blocks = list(model.model.layers)
    for block in blocks:
        block.use_compiler()
    compiled = [block.compiled for block in blocks]

    def run(way: str) -> None:
        for block, fast in zip(blocks, compiled, strict=True):
            block.checkpointing, block.compiled = WAYS[way][0], fast if WAYS[way][1] else None
        here.step()

    if args.peak_of:
        print(peak_mib(lambda: run(args.peak_of)))
        return
    lengths = [len(p) for p in prompts]
    tokens = sum(lengths) + sum(len(c) for group in completions for c in group)
    note = (
        f"Shape {args.shape}, {args.batch} prompts of {min(lengths)} to {max(lengths)} tokens, "
        f"{tokens:,} tree tokens a step."
    )
    header("Checkpointing and torch.compile", args, note)
    compiling = {}
    for way in ("compiled", "both"):
        start = time.perf_counter()
        run(way)
        compiling[way] = f"{time.perf_counter() - start:.0f}"
    seconds = interleaved({way: lambda way=way: run(way) for way in WAYS}, args.repeats)
    peak = peaks(run, args)
    flops, rate = step_flops(args, model, prompts, completions), matrix_rate(args, tokens)
    rows = []
    for way, s in seconds.items():
        cells = [f"{1000 * s:.0f}", f"{seconds['eager'] / s:.2f}", f"{tokens / s:,.0f}"]
        cells += [f"{flops / s / rate:.0%}", peak.get(way, ""), compiling.get(way, "")]
        rows.append([way, *cells])
    columns = ["RecPO step", "median ms", "eager / this", "tokens/s", "of the GEMM's FLOP/s"]
    table([*columns, "peak memory added, MiB", "first step, s"], rows)


def peaks(run, args) -> dict[str, str]:
    """MiB that a step of each way adds.

    On a CPU of eager ways alone: the compiler's own memory would hide that of compiled steps, which
    the high-water mark of a process cannot tell apart."""
    if args.device == "cuda":
        return {way: f"{peak_mib(lambda way=way: run(way)):.0f}" for way in WAYS}
    peak = {}
    for way in ("eager", "checkpointing"):
        peak[way] = f"{in_fresh_process([*sys.argv, '--peak_of', way]):.0f}"
    return peak


def step_flops(args, model, prompts, completions) -> float:
    """FLOP of the step's forward and backward, padding included."""
    widest = max(completions, key=lambda group: sum(map(len, group)))
    prompt, lengths = max(map(len, prompts)), [len(ids) for ids in widest]
    work = Workload(model.config, dtype_of(args), LORA_RANK, TARGET_MODULES, prompt, lengths)
    return fake_step(work, args.batch, gpu=args.device == "cuda").flops


if __name__ == "__main__":
    main()
