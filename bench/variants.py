"""What --gradient_checkpointing and --compile cost and save: one RecPO step, its four combinations on the same micro-batch.

    python bench/variants.py                     the small shape on a CPU, Llama-3.1-8B's on a GPU
    python bench/variants.py --prompt 512 --data_dir ""      prompts of 512 tokens, completions of 12

Times are medians of interleaved steps in one process, after compilation. Tokens are those of the tree: the prompt once.
FLOP/s are those of the model's forward and backward, without what checkpointing runs again.
"""

import sys
import time

import torch
from harness import (
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

from bench.estimate import fake_step
from lora import TARGET_MODULES

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
    compiled = [torch.compile(block.compute, dynamic=True) for block in blocks]

    def run(way: str) -> None:
        for block, fast in zip(blocks, compiled, strict=True):
            block.checkpointing, block.compiled = WAYS[way][0], fast if WAYS[way][1] else None
        here.step()

    if args.peak_of:
        print(peak_mib(lambda: run(args.peak_of)))
        return
    lengths = [len(p) for p in prompts]
    tokens = sum(lengths) + sum(len(c) for group in completions for c in group)
    note = f"Shape {args.shape}, {args.batch} prompts of {min(lengths)} to {max(lengths)} tokens, {tokens:,} tree tokens a step"
    header("Checkpointing and torch.compile", args, note + ".")
    compiling = {}
    for way in ("compiled", "both"):
        start = time.perf_counter()
        run(way)
        compiling[way] = time.perf_counter() - start
    seconds = interleaved({way: lambda way=way: run(way) for way in WAYS}, args.repeats)
    if args.device == "cuda":
        peak = {way: peak_mib(lambda way=way: run(way)) for way in WAYS}
    else:
        peak = {
            way: in_fresh_process([*sys.argv, "--peak_of", way])
            for way in ("eager", "checkpointing")
        }  # the compiler's own
        # memory would hide that of compiled steps, which the high-water mark of a process cannot tell apart
    widest = max(completions, key=lambda group: sum(map(len, group)))
    shape = (args.batch, max(lengths), [len(ids) for ids in widest])
    flops = fake_step(
        model.config, dtype_of(args), 8, TARGET_MODULES, 0.0, False, *shape, args.device == "cuda"
    ).flops
    rate = matrix_rate(args, tokens)
    rows = [
        [way, f"{1000 * s:.0f}", f"{seconds['eager'] / s:.2f}", f"{tokens / s:,.0f}", f"{flops / s / rate:.0%}", f"{peak[way]:.0f}" if way in peak else "",
         f"{compiling[way]:.0f}" if way in compiling else ""]
        for way, s in seconds.items()
    ]  # fmt: skip
    columns = [
        "RecPO step",
        "median ms",
        "eager / this",
        "tokens/s",
        "of the GEMM's FLOP/s",
        "peak memory added, MiB",
    ]
    table([*columns, "first step, s"], rows)


if __name__ == "__main__":
    main()
