"""Everything that only a GPU can show, in at most 10 minutes on one: run it, read the page.

    python -m bench.gpu                               one GPU; writes results/bench/gpu-<name>.md
    torchrun --nproc_per_node 8 -m bench.gpu          besides: shard modes and scaling over NCCL
    python -m bench.gpu --out /tmp                    without a GPU: all of it at toy sizes

Each row is pass, fail, figure or skipped (with the reason); the exit code is 1 if one failed.
Shapes are Llama-3.1-8B's with random weights, as many prompts and layers as fit the card; speed
does not depend on their values. Without a GPU the sizes are toys, Triton's kernels run in its
interpreter, collectives go over gloo, and speeds are figures without a goal.

Sections: bench/acceptance.py (one process) and bench/ranks.py (several)."""

import argparse
import os
import platform
import sys
import time
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported
sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks import one another by name

import acceptance  # noqa: E402
import ranks  # noqa: E402
import verdict  # noqa: E402
from harness import ROOT, commit, one_process, parser  # noqa: E402

from common import print0, run_cli  # noqa: E402
from runtime.processes import setup_distributed  # noqa: E402


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Those of every benchmark, and where the page goes."""
    out = parser(__doc__, minutes=10)
    out.add_argument("--toy", action="store_true", help="toy sizes; always without a GPU")
    out.add_argument("--out", default=str(ROOT / "results" / "bench"), help="folder of the page")
    args = out.parse_args(argv)
    args.toy = args.toy or args.device == "cpu"
    if args.toy:
        args.shape, args.layers = "tiny", args.layers or 2
        torch.set_num_threads(1)  # tensors this small cost more to divide than to compute
    args.data_dir = ""  # random ids of fixed lengths
    args.prompt = 48 if args.toy else args.prompt
    args.repeats = 1 if args.toy else 7
    return args


def card_name(args) -> str:
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    return f"toy sizes on a CPU, {platform.machine()}"


def file_name(args, world_size: int) -> str:
    """gpu-<name>.md, for several ranks gpu-<name>-x<ranks>.md."""
    name = "toy-cpu" if args.device == "cpu" else "-".join(card_name(args).lower().split())
    return f"gpu-{name}{f'-x{world_size}' if world_size > 1 else ''}.md"


def notes(args, world_size: int, started: float) -> list[str]:
    """The lines above the tables."""
    ranks_note = f", {world_size} processes" if world_size > 1 else ""
    layers = args.layers or "all"
    return [
        f"{card_name(args)}{ranks_note}; torch {torch.__version__}, commit {commit()}.",
        f"Shape {args.shape} ({layers} layers), {args.dtype}, random weights; "
        f"{time.monotonic() - started:.0f} s in all.",
    ]


def accept(args, sections: dict, world_size: int = 1, write: bool = True) -> int:
    """Run the sections (title -> function of args), write the page; 1 if a row failed."""
    started = time.monotonic()
    deadline = started + 60 * args.minutes
    file = Path(args.out) / file_name(args, world_size)
    found = {}
    for title, section in sections.items():
        if world_size > 1:  # an error on one rank must end all of them: torchrun sees to it
            found[title] = section(args)
        else:
            found[title] = verdict.run_section(title, lambda s=section: s(args), deadline)
        for row in found[title]:
            print0(f"{row.verdict:8} {title}: {row.name}: {row.figure} {row.goal}")
        if write:  # after every section: a run that is stopped keeps its page
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(verdict.page("GPU acceptance", notes(args, world_size, started), found))
    if write:
        print0(f"\nwritten to {file}")
    return min(1, verdict.failures(found))


def main() -> None:
    args = options()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        rank, world_size, device = setup_distributed()
        args.device = device.type
        code = accept(args, ranks.SECTIONS, world_size, write=rank == 0)
    else:
        one_process()
        code = accept(args, acceptance.SECTIONS)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_cli(main)
