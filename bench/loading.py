"""Memory of each rank while a sharded model is loaded: its share, one slice, and no more.

    python bench/loading.py

Writes a model of about 2.4 GB (bf16, random, several files) to a temporary folder, starts 2
processes that load it with --shard full and with none, and samples their anonymous memory (RssAnon:
the mapped files do not count) every 2 ms. The figure is the peak above what was held after the
imports and the meeting of the processes.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from harness import ROOT, SHAPES, header, table

from model import ModelConfig, Transformer, save_pretrained
from runtime.processes import setup_distributed
from runtime.sharding import local
from train import TrainConfig, load_policy

CONFIG = ModelConfig("llama", 64000, 2048, 5632, 20, 16, 8, 128)


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def worker(args) -> None:
    rank, world_size, device = setup_distributed()
    before, peak, loading = anonymous(), 0, True

    def sample():
        nonlocal peak
        while loading:
            peak = max(peak, anonymous())
            time.sleep(0.002)

    thread = threading.Thread(target=sample)
    thread.start()
    started = time.time()
    config = TrainConfig(dtype="bfloat16", shard=args.shard)
    model, _ = load_policy(config, "recpo", Path(args.worker), None, device)
    seconds = time.time() - started
    loading = False
    thread.join()
    own = sum(local(p).numel() * p.element_size() for p in model.parameters())
    largest = max(local(p).numel() * p.element_size() for p in model.parameters())
    print(f"RESULT {rank} {own} {largest} {peak - before} {seconds}", flush=True)
    os._exit(0)


def load_on_ranks(folder: str, mode: str) -> list[list[str]]:
    """Rank, bytes of its weights, of its largest slice and of its peak, and seconds, of 2 ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, __file__, "--worker", folder, "--shard", mode]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if len(lines) < 2:
        sys.exit(done.stderr[-3000:])
    return sorted(line.split()[1:] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--shard", default="full", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    args.device, args.shape = "cpu", next(iter(SHAPES))
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        torch.set_default_dtype(torch.bfloat16)
        model = Transformer(CONFIG)
        torch.set_default_dtype(torch.float32)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        save_pretrained(model, folder, shard_bytes=500 * 10**6)
        del model
        note = f"A model of {size / 1e9:.2f} GB in bf16, 2 processes."
        header("Loading a sharded model", args, note)
        rows = []
        for mode in ("full", "none"):
            for rank, own, largest, peak, seconds in load_on_ranks(folder, mode):
                mib = [f"{int(n) / 2**20:,.0f}" for n in (own, largest, peak)]
                ratio = int(peak) / (int(own) + int(largest))
                rows.append([mode, rank, *mib, f"{ratio:.2f}", f"{float(seconds):.1f}"])
    columns = ["--shard", "rank", "own weights, MiB", "largest slice, MiB"]
    columns += ["peak anonymous memory, MiB", "peak / (own + largest)", "seconds"]
    table(columns, rows)


if __name__ == "__main__":
    main()
