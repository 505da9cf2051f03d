"""What the benchmarks share: random weights, real prompts, interleaved timing, peak memory, tables.

Shapes: `tiny` for a CPU in fp32, `llama-3.1-8b` and `qwen2.5-7b` for a GPU in bf16, with random
weights: speed does not depend on their values. Prompts are MovieLens-1M's training examples where
the archive is at hand (--data_dir, or ml-1m.zip in $RECPO_DATA), cut with a tokenizer made from the
same data; otherwise random ids of a fixed length.
"""

import argparse
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from data import build_tree  # noqa: E402
from demo.tiny import make_base_model  # noqa: E402
from hub.config import hf_config  # noqa: E402
from hub.tokenizer import Tokenizer  # noqa: E402
from loaders.frozen import DataConfig, encode_split, prepare  # noqa: E402
from lora import TARGET_MODULES, apply_lora  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402

LORA_RANK, LORA_ALPHA = 8, 32  # train.py's defaults

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = {
    "tiny": ModelConfig("llama", 8000, 384, 1024, 6, 6, 2, 64, max_position_embeddings=4096),
    "llama-3.1-8b": ModelConfig(
        "llama", 128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 5e5, LLAMA3_ROPE
    ),
    "qwen2.5-7b": ModelConfig(
        "qwen2", 152064, 3584, 18944, 28, 28, 4, 128, 1e-6, 1e6, attention_bias=True
    ),
}


def parser(description: str, **defaults) -> argparse.ArgumentParser:
    """The options of every benchmark; keyword arguments add integer options."""
    formatter = argparse.RawDescriptionHelpFormatter
    out = argparse.ArgumentParser(
        description=description, formatter_class=formatter, allow_abbrev=False
    )
    archive = Path(os.environ.get("RECPO_DATA", ROOT.parent / "shared" / "data")) / "ml-1m.zip"
    cuda = torch.cuda.is_available()
    out.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b" if cuda else "tiny")
    out.add_argument("--layers", type=int, default=0, help="blocks; 0 = all of the shape")
    out.add_argument("--device", default="cuda" if cuda else "cpu")
    out.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32"
    )
    out.add_argument(
        "--data_dir",
        default=str(archive) if archive.exists() else "",
        help="ml-1m.zip; empty = random ids",
    )
    out.add_argument("--prompt", type=int, default=400, help="prompt length of random ids")
    out.add_argument(
        "--completion", type=int, default=12, help="completion length of random ids, EOS included"
    )
    for name, default in defaults.items():
        out.add_argument(f"--{name}", type=int, default=default)
    return out


def dtype_of(args) -> torch.dtype:
    return getattr(torch, args.dtype)


def make_model(args, lora: bool = True) -> Transformer:
    """Random weights straight on the device, and an adapter away from its start.

    There half of its gradients are zero."""
    config = SHAPES[args.shape]
    if args.layers:
        config = ModelConfig(**vars(config) | {"num_hidden_layers": args.layers})
    torch.manual_seed(0)
    torch.set_default_dtype(dtype_of(args))
    with torch.device(args.device):
        model = Transformer(config)
    torch.set_default_dtype(torch.float32)
    model.inv_freq = model.inv_freq.to(args.device)
    if lora:
        apply_lora(model, LORA_RANK, LORA_ALPHA, target_modules=TARGET_MODULES)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.02)
    return model


def transformers_model(ours: Transformer):
    """The same base weights in transformers."""
    try:
        import transformers
    except ImportError:
        sys.exit(
            "this benchmark compares with transformers and peft: pip install transformers peft"
        )
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    raw = {k: v for k, v in hf_config(vars(ours.config)).items() if k != "architectures"}
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    dtype = ours.lm_head.weight.dtype
    with torch.device(ours.inv_freq.device):
        theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    base = {name: p for name, p in ours.state_dict().items() if ".lora_" not in name}
    theirs.load_state_dict(base)
    return theirs.eval()


def movielens(args, count: int):
    """(encoded training examples, tokenizer) of the first `count` drawn.

    The tokenizer has 8,000 tokens made from the data."""
    scratch = Path(tempfile.gettempdir()) / "recpo-bench"
    source = {"dataset": "movielens", "data_dir": args.data_dir}
    prepared = prepare(DataConfig(**source, train_size=3000, prepared_dir=str(scratch)))
    base = scratch / "tokenizer"
    if not (base / "tokenizer.json").exists():
        sizes = {"hidden_size": 64, "num_layers": 1, "vocab_size": 8000}
        make_base_model(base, prepared.splits["train"], **sizes, seed=0)
    tokenizer = Tokenizer(base)
    prepared.splits["train"] = prepared.splits["train"].select(np.arange(count))
    prepared.hash = f"{prepared.hash}-{count}"
    return encode_split(prepared, "train", tokenizer, 1024), tokenizer


def examples(
    args, count: int, num_completions: int
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts and completions, chosen first: MovieLens-1M's, or random ids."""
    if args.data_dir:
        encoded, _ = movielens(args, count)
        chosen = encoded.examples.target[:, None]
        rejected = encoded.examples.negatives(num_completions - 1)
        slots = np.concatenate([chosen, rejected], 1)
        prompts = [p.tolist() for p in encoded.prompts]
        return prompts, [encoded.slots(e, slots[e]) for e in range(count)]
    generator = torch.Generator().manual_seed(2)

    def ids(length):
        return torch.randint(SHAPES[args.shape].vocab_size, (length,), generator=generator).tolist()

    prompts = [ids(args.prompt) for _ in range(count)]
    return prompts, [[ids(args.completion) for _ in range(num_completions)] for _ in prompts]


def tree_of(args, prompts, completions):
    return build_tree(prompts, completions).to(args.device)


def one_process() -> None:
    """The process group that train_step expects."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


# ---------------------------------------------------------------------------------------- measuring
def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(ways: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each way, run in turn in one process.

    What slows the machine down slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # warm up: allocations, compilation
    for _ in range(repeats):
        for name, way in ways.items():
            synchronize()
            start = time.perf_counter()
            way()
            synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_mib(way: Callable) -> float:
    """MiB that `way` adds at its peak.

    On a CPU this is the process's high-water mark: one call per process."""
    gc.collect()
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # the high-water mark starts again from what is held now
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    way()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    """A line of /proc/self/status in MiB (getrusage would start from the parent's peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(key))
    return int(line.split()[1]) / 1024


def in_fresh_process(argv: list[str], launcher: list[str] | None = None) -> float:
    """The last number that this script prints when it is started again with these arguments."""
    command = [*(launcher or [sys.executable]), *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def matrix_rate(args, M: int, repeats: int = 20) -> float:
    """FLOP/s of a GEMM (M, D) x (D, F), the largest projection of the shape; on a CPU in fp32.

    What the machine can do."""
    config = SHAPES[args.shape]
    dtype = dtype_of(args) if args.device == "cuda" else torch.float32
    a = torch.randn(M, config.hidden_size, device=args.device, dtype=dtype)
    b = torch.randn(config.hidden_size, config.intermediate_size, device=args.device, dtype=dtype)
    seconds = interleaved({"gemm": lambda: a @ b}, repeats)["gemm"]
    return 2 * M * config.hidden_size * config.intermediate_size / seconds


# ----------------------------------------------------------------------------------------- printing
def commit() -> str:
    """The checkout's commit, and whether anything was changed since."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    status = [*git, "status", "--porcelain", "-uno"]
    changed = subprocess.run(status, capture_output=True, text=True).stdout.strip()
    return name.stdout.strip() + (" + changes" if changed else "")


def header(title: str, args, note: str = "") -> None:
    """What was measured, where, and at which commit."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        machine = torch.cuda.get_device_name()
    script = Path(sys.argv[0])
    command = f"python {script.parent.name}/{script.name} {' '.join(sys.argv[1:])}".rstrip()
    print(f"# {title}\n\n`{command}`\n")
    print(f"{machine}, torch {torch.__version__}, commit {commit()}. {note}\n")


def table(columns: list[str], rows: list[list]) -> None:
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)
    print(flush=True)
