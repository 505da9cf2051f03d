"""One RecPO step here against the same step written the usual way, on the same examples and weights.

    python bench/step.py                        one Markdown table; --help lists the sizes

usual   K + 1 padded full sequences per prompt through the policy and through a second model, the reference; logits of
        every position in fp32, log_softmax, gather (what the authors', TRL's and most DPO trainers do).
tree    this project: one PromptTree per prompt, log-probs of the scored rows only, reference log-probs computed once.

Times are medians of interleaved repetitions in one process; peak memory is the resident set of a process of its own.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import build_tree
from lora import apply_lora
from losses import recpo_loss
from model import ModelConfig, Transformer, init_weights

NUM_NEGATIVES = 3


def make_model(args) -> Transformer:
    heads = args.hidden_size // 64
    config = ModelConfig(
        "llama",
        args.vocab_size,
        args.hidden_size,
        8 * args.hidden_size // 3 // 32 * 32,
        args.layers,
        heads,
        max(1, heads // 3),
        64,
    )
    model = apply_lora(init_weights(config, seed=0), r=8, lora_alpha=32)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # away from zero, or half of the adapter's gradients would be
            torch.nn.init.normal_(p, std=0.02, generator=generator)
    return model


def make_batch(args) -> tuple[list[list[int]], list[list[list[int]]]]:
    generator = torch.Generator().manual_seed(2)

    def ids(length):
        return torch.randint(args.vocab_size, (length,), generator=generator).tolist()

    prompts = [ids(args.prompt) for _ in range(args.batch)]
    return prompts, [[ids(args.completion) for _ in range(1 + NUM_NEGATIVES)] for _ in prompts]


def usual_logps(model: Transformer, prompts, completions) -> torch.Tensor:
    """(B, 1 + K) from padded full sequences and full logits."""
    rows = [p + c for p, group in zip(prompts, completions, strict=True) for c in group]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    scored = torch.zeros(input_ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = len(prompts[i // (1 + NUM_NEGATIVES)])
        scored[i, start : len(row)] = True
    logits = model.logits(input_ids)[:, :-1]  # (B (1 + K), T - 1, V)
    token_logps = logits.log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2)
    return (token_logps * scored[:, 1:]).sum(1).view(len(prompts), -1)


def tree_logps(model: Transformer, prompts, completions) -> torch.Tensor:
    tree = build_tree(prompts, completions)
    return tree.sum_logps(model(tree)[0])


def step(logps, policy, reference_logps, batch) -> float:
    """Forward, loss, backward of one step; `reference_logps` is a tensor, or a function that runs the reference."""
    policy.zero_grad(set_to_none=True)
    reference = reference_logps() if callable(reference_logps) else reference_logps
    margins = torch.full((len(batch[0]), NUM_NEGATIVES), 6.0)
    losses, _ = recpo_loss(logps(policy, *batch), reference, margins, beta=1.0)
    losses.mean().backward()
    return losses.mean().item()


@torch.no_grad()
def no_grad_logps(logps, model, batch):
    return logps(model, *batch)


def peak_mib() -> float:
    """Peak resident memory of this process (VmHWM; getrusage would start from the parent's peak)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure_peak(kind: str, argv: list[str]) -> float:
    """Peak resident memory that one step adds to the loaded models, in a fresh process."""
    command = [sys.executable, __file__, *argv, "--peak_of", kind]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden_size": 384, "layers": 6, "vocab_size": 8000, "prompt": 400, "completion": 12, "batch": 1, "repeats": 7}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peak_of", choices=("usual", "tree"), help=argparse.SUPPRESS)
    args = parser.parse_args()

    policy, batch = make_model(args), make_batch(args)
    if args.peak_of:
        loaded = peak_mib()
        if args.peak_of == "usual":
            reference = make_model(args)  # a second model, counted as what the step adds
            step(usual_logps, policy, lambda: no_grad_logps(usual_logps, reference, batch), batch)
        else:
            step(tree_logps, policy, torch.zeros(args.batch, 1 + NUM_NEGATIVES), batch)
        print(peak_mib() - loaded)
        return

    reference = make_model(args)
    cached = no_grad_logps(tree_logps, reference, batch)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.01)  # a policy that has moved: the losses then compare more than zeros
    usual_loss = step(usual_logps, policy, lambda: no_grad_logps(usual_logps, reference, batch), batch)
    usual_grads = [p.grad.clone() for p in policy.parameters() if p.requires_grad]
    tree_loss = step(tree_logps, policy, cached, batch)
    tree_grads = [p.grad for p in policy.parameters() if p.requires_grad]
    gap = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(usual_grads, tree_grads, strict=True))

    ways = {
        "usual": lambda: step(usual_logps, policy, lambda: no_grad_logps(usual_logps, reference, batch), batch),
        "tree": lambda: step(tree_logps, policy, cached, batch),
        "reference pass": lambda: no_grad_logps(tree_logps, reference, batch),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    usual, tree, reference_pass = (statistics.median(times[name]) for name in ways)
    spread = tree + reference_pass / 3
    argv = sys.argv[1:]
    usual_peak, tree_peak = measure_peak("usual", argv), measure_peak("tree", argv)

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    print(f"One RecPO step, K = {NUM_NEGATIVES}: " + ", ".join(f"{k} {getattr(args, k)}" for k in sizes))
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit.stdout.strip()}")
    print(f"loss {usual_loss:.6f} against {tree_loss:.6f}; largest gradient difference {gap:.1e} (relative)\n")
    print("| step | median ms | times faster | peak memory added, MiB |\n|---|---|---|---|")
    print(f"| usual: {1 + NUM_NEGATIVES} full sequences, policy and reference | {1000 * usual:.0f} | 1.0 | {usual_peak:.0f} |")
    print(f"| tree, reference cached | {1000 * tree:.0f} | {usual / tree:.1f} | {tree_peak:.0f} |")
    print(f"| tree, reference pass spread over 3 epochs | {1000 * spread:.0f} | {usual / spread:.1f} | {tree_peak:.0f} |")


if __name__ == "__main__":
    main()
