"""What the benchmarks share: sizes, random models and batches, a step, times and pages.

Each script answers one question. Its `figures(sizes)` maps the name of each figure to a function
that measures it and returns one line. `run` prints the lines, and keeps them in --page.

Weights and token ids are random, because speed does not depend on their values. A GPU takes
Llama-3.1-8B's shape in bf16, a CPU a tiny one in fp32, unless --shape and --dtype say otherwise.
"""

import gc
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.benchmark import Timer

from common import arg
from data import build_tree
from hub.quantized import to_4bit
from lora import apply_lora
from losses import recpo_loss
from model import ModelConfig, Transformer, inverse_frequencies
from train import TrainConfig, train_step

ROOT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()
MARGIN = 6.0  # λ φ_w / φ_l of every pair

SHAPES = {
    "tiny": ModelConfig("llama", 8000, 384, 1024, 6, 6, 2, 64),
    "llama-3.1-8b": ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128),
    "qwen2.5-7b": ModelConfig("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, attention_bias=True),
}


# ------------------------------------------------------------------------ sizes, models, batches
@dataclass(frozen=True)
class Sizes:
    """What is timed: the shape of a model with random weights, and of a batch of random ids."""

    shape: str = arg("llama-3.1-8b" if CUDA else "tiny", f"one of {', '.join(SHAPES)}")
    layers: int = arg(0, "blocks; 0: as many as the shape has")
    dtype: str = arg("bfloat16" if CUDA else "float32", "of weights and computation")
    device: str = arg("cuda" if CUDA else "cpu", "cuda or cpu")
    prompts: int = arg(8, "prompts of a step (B)")
    prompt: int = arg(400, "tokens of a prompt")
    completion: int = arg(12, "tokens of a completion, its EOS included")
    negatives: int = arg(3, "negatives of a prompt (K)")
    seconds: float = arg(3.0, "each way runs at least this long")
    page: str = arg("", "file that keeps the figures; what it holds is not measured again")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def config(self) -> ModelConfig:
        shape = SHAPES[self.shape]
        return replace(shape, num_hidden_layers=self.layers or shape.num_hidden_layers)


@lru_cache(2)
def make_model(sizes: Sizes, four_bit: bool = False) -> Transformer:
    """A model with an adapter and random weights, made on the device it runs on.

    lora_B is not zero, or half of the gradients would be."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(sizes.config).to(sizes.torch_dtype)
    model = (to_4bit(model) if four_bit else model).to_empty(device=sizes.device)
    model.inv_freq = inverse_frequencies(model.config).to(sizes.device)
    apply_lora(model, r=8, lora_alpha=32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dtype == torch.uint8:
                p.random_(0, 256)
            elif p.ndim == 1 or name.endswith("absmax"):
                p.fill_(1.0 if p.ndim == 1 else 0.05)
            else:
                p.normal_(std=0.02)
    return model


def make_batch(sizes: Sizes, num_completions: int = 0) -> tuple[list, list]:
    """Prompts and their completions, of random ids; by default 1 + K completions."""
    generator = torch.Generator().manual_seed(2)

    def ids(length: int) -> list[int]:
        return torch.randint(sizes.config.vocab_size, (length,), generator=generator).tolist()

    N = num_completions or 1 + sizes.negatives
    prompts = [ids(sizes.prompt) for _ in range(sizes.prompts)]
    return prompts, [[ids(sizes.completion) for _ in range(N)] for _ in prompts]


class Step:
    """One optimizer step of RecPO by train.py, on the same tree at every call.

    The reference log-probs are computed once and kept. The switches of the model's blocks are set
    at every call, so that several steps can share a model."""

    def __init__(self, model, batch, checkpointing=False, compiled=False, replicas=0):
        if not dist.is_initialized():  # train_step expects a group, if torchrun has not made one
            backend = "cpu:gloo,cuda:nccl" if CUDA else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.model, self.replicas = model.train(), replicas
        self.tree = build_tree(*batch).to(model.inv_freq.device)
        self.num_prompts = len(batch[0]) * dist.get_world_size()
        self.tokens = self.tree.input_ids.numel()
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        self.blocks, self.checkpointing = list(model.model.layers), checkpointing
        for block in self.blocks * compiled:  # a CPU only traces: its C++ compiler takes minutes
            block.use_compiler("inductor" if CUDA else "aot_eager")
        self.compilers = [block.compiled if compiled else None for block in self.blocks]
        for block in self.blocks:
            block.checkpointing, block.compiled = checkpointing, None
        with torch.no_grad():
            self.reference_logps = self.tree.sum_logps(model(self.tree)[0])

    def compute(self, tree):
        """(loss, metrics) of the tree, in the form that train_step expects."""
        logps = tree.sum_logps(self.model(tree)[0])
        margins = torch.full_like(logps[:, 1:], MARGIN)
        losses, _ = recpo_loss(logps, self.reference_logps, margins, beta=1.0)
        loss = losses.sum() / self.num_prompts
        return loss, {"loss": (loss.detach(), 1.0)}

    def __call__(self) -> dict[str, float]:
        for block, compiler in zip(self.blocks, self.compilers, strict=True):
            block.checkpointing, block.compiled = self.checkpointing, compiler
        options, trees = TrainConfig(max_grad_norm=0.3), [self.tree]
        return train_step(
            self.model, self.optimizer, trees, self.compute, 1e-5, options, self.replicas
        ).read()

    def flops(self) -> float:
        """FLOP of forward and backward over frozen weights, without attention (about 1 %)."""
        c, rows = self.model.config, len(self.tree.labels)
        attention = 2 * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
        block = c.hidden_size * (attention + 3 * c.intermediate_size)
        weights = self.tokens * c.num_hidden_layers * block + rows * c.hidden_size * c.vocab_size
        return 4 * weights  # two FLOP of a weight forward, two for the gradient of its input


# ------------------------------------------------------------------------ measuring, printing
def medians(ways: dict, seconds: float, rounds: int = 3) -> dict[str, float]:
    """Median seconds per call of each way; they take turns, so a slow machine slows all."""
    times = {name: [] for name in ways}
    for way in ways.values():
        way()  # allocates, compiles
    for _ in range(rounds):
        for name, way in ways.items():
            timer = Timer("way()", globals={"way": way}, num_threads=torch.get_num_threads())
            shortest = max(seconds, 1e-9) / rounds
            times[name] += timer.blocked_autorange(min_run_time=shortest).times
    return {name: statistics.median(found) for name, found in times.items()}


def peak_gb(way: Callable) -> str:
    """GB that a call adds on the GPU; unknown on a CPU."""
    if not CUDA:
        return "? GB"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    return f"+{(torch.cuda.max_memory_allocated() - before) / 1e9:.1f} GB"


@lru_cache(1)
def matrix_rate(sizes: Sizes) -> float:
    """FLOP/s of one large GEMM, (4096, D) x (D, D'): what the machine can do."""
    c, like = sizes.config, {"device": sizes.device, "dtype": sizes.torch_dtype}
    a = torch.randn(4096, c.hidden_size, **like)
    b = torch.randn(c.hidden_size, c.intermediate_size, **like)
    return 2 * a.numel() * b.shape[1] / medians({"gemm": lambda: a @ b}, sizes.seconds)["gemm"]


def commit() -> str:
    """The checkout's commit, and whether anything was changed since."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"


def run(figures: Callable, title: str, sizes: Sizes) -> None:
    """Measure the figures that the page does not hold; exit code 1 if one failed.

    The page is written after every figure, so that a run can be stopped at any moment."""
    page = Path(sizes.page)
    page.parent.mkdir(parents=True, exist_ok=True)
    text = page.read_text() if page.is_file() else ""
    found = dict(re.findall(r"^\| (.*?) \| (?!failed: )(.*) \|$", text, re.MULTILINE))
    name = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    command = " ".join(["python -m", f"bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    where = f"`{command}`: {name}, torch {torch.__version__}, commit {commit()}"
    top = f"# {title}\n\n{where}.\n\n{sizes}.\n\n| figure | |\n|---|---|\n"
    print(top, end="")
    wanted = figures(sizes)
    for figure, measure in wanted.items():
        if figure not in found:
            try:
                found[figure] = measure()
            except Exception as error:  # the remaining figures are measured anyway
                found[figure] = f"failed: {type(error).__name__}: {str(error)[:200]!r}"
            gc.collect()  # frees what it held
        print(f"| {figure} | {found[figure]} |", flush=True)
        if sizes.page:
            rows = [f"| {name} | {found[name]} |" for name in wanted if name in found]
            unfinished = page.with_suffix(".unfinished")
            unfinished.write_text(top + "\n".join([*rows, ""]))
            unfinished.replace(page)
    if any(found[figure].startswith("failed: ") for figure in wanted):
        sys.exit(1)
