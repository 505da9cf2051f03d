"""What a base in 4 bits saves and costs: memory while it is loaded and trained, time of a step.

    python bench/four_bit.py

Writes a model of about 2.4 GB (bf16, random, several files) to a temporary folder; for 16 and
for 4 bits a fresh process loads it and trains a step of RecPO. Its anonymous memory (RssAnon:
mapped files do not count) is sampled every 2 ms; figures are peaks above what was held after the
imports. On a CPU dequantised weights pass through fp32, a GPU's kernel has no such temporaries.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread

import torch
from harness import ROOT, SHAPES, header, table
from loading import anonymous

from data import build_tree
from losses import recpo_loss
from model import ModelConfig, Transformer, save_pretrained
from runtime.processes import setup_distributed
from train import TrainConfig, load_policy, train_step

CONFIG = ModelConfig("llama", 32000, 2048, 5632, 23, 16, 8, 128)
PROMPT, COMPLETIONS = 4, [1, 1, 1, 1]  # few tokens: a CPU is slow in bf16, memory is the point


class Peak:
    """Largest anonymous memory while it is watched, in bytes above what was held before."""

    def __init__(self):
        self.before, self.peak, self.watching = anonymous(), 0, True
        self.thread = Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        while self.watching:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.002)

    def read(self) -> int:
        peak, self.peak = self.peak, 0
        return peak - self.before


def worker(folder: Path, four_bit: bool) -> None:
    _, _, device = setup_distributed()
    memory = Peak()
    config = TrainConfig(dtype="bfloat16", shard="none", load_in_4bit=four_bit)
    started = time.time()
    model, replicas = load_policy(config, "recpo", folder, None, device)
    seconds, loading = time.time() - started, memory.read()
    stored = sum(p.numel() * p.element_size() for p in model.parameters())

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    tree = build_tree([[1] * PROMPT], [[[2 + i] * n for i, n in enumerate(COMPLETIONS)]])

    def compute(tree):
        logps = tree.sum_logps(model(tree)[0])
        loss = recpo_loss(logps, logps.detach(), torch.ones(1, 3), 1.0)[0].mean()
        return loss, {"loss": (loss.detach(), 1.0)}

    started = time.time()
    train_step(model, optimizer, [tree], compute, 1e-4, config, replicas).read()
    step = time.time() - started
    print("RESULT", stored, loading, seconds, memory.read(), step, flush=True)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--bits", type=int, default=16, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(Path(args.worker), args.bits == 4)
        return
    args.device, args.shape = "cpu", next(iter(SHAPES))
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        torch.set_default_dtype(torch.bfloat16)
        model = Transformer(CONFIG)
        torch.set_default_dtype(torch.float32)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        save_pretrained(model, folder, shard_bytes=500 * 10**6)
        del model
        note = f"A model of {size / 1e9:.2f} GB in bf16, LoRA r = 8 in fp32, 1 process."
        header("A base in 4 bits", args, note)
        rows = []
        for bits in (16, 4):
            command = [sys.executable, __file__, "--worker", folder, "--bits", str(bits)]
            done = subprocess.run(command, capture_output=True, text=True)
            found = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
            if not found:
                sys.exit(done.stderr[-3000:])
            stored, loading, seconds, training, step = map(float, found[0].split()[1:])
            sizes = [f"{n / 1e6:,.0f}" for n in (stored, loading, loading - stored, training)]
            rows.append([bits, *sizes, f"{seconds:.1f}", f"{step:.1f}"])
    columns = ["bits", "stored, MB", "peak of loading, MB", "above stored, MB"]
    table([*columns, "peak of training, MB", "seconds to load", "seconds a step"], rows)


if __name__ == "__main__":
    main()
