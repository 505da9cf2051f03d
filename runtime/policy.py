"""The weights that a stage starts from:
base, adapter or a fresh one, sharded, read, ready to train."""

import gc
from functools import cache
from pathlib import Path

import torch

from common import print0
from hub.quantized import to_4bit
from lora import adapter_products, apply_lora, read_adapter
from model import Transformer, empty_model, materialize, read_weights
from runtime.sharding import fill_adapter, init_adapter, own_parts, shard


def stored_dtype(config, device) -> torch.dtype:
    """--dtype of the frozen weights; auto is bfloat16 on a GPU."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.dtype)


@cache  # once a process, however many models it loads
def say_what_4_bits_cost(device_type: str) -> None:
    """Of a CPU, as docs/kernel.md has it; a GPU's cost is bench/gpu.py's to measure."""
    if device_type == "cpu":
        print0(
            "note: --load_in_4bit on a CPU saves memory and costs time: where it was measured, "
            "weights took 0.37 of the memory of 16 bits, loading 15.1 times and a training step "
            "2.9 times as long (docs/kernel.md, Weights in 4 bits)"
        )


def free_memory() -> None:
    """Give back what models that nobody uses any more held: hooks tie them into cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_policy(
    config, stage: str, base: Path, adapter: Path | None, device
) -> tuple[Transformer, int]:
    """The stage's starting weights, sharded, and the number of replicas:
    base, plus the adapter it goes on from or a fresh one."""
    r = config.sft_lora_r if stage == "sft" and config.sft_lora_r >= 0 else config.lora_r
    stored = stored_dtype(config, device)
    # full training keeps fp32 weights and computes in bf16
    full_bf16 = r == 0 and stored == torch.bfloat16
    model = empty_model(base, torch.float32 if full_bf16 else stored)
    if config.load_in_4bit:
        to_4bit(model)
    torch.compiler.reset()  # what the stage before compiled
    dropout = config.lora_dropout if stage == "sft" else 0.0
    products, tensors = {}, {}
    if adapter:
        settings, tensors = read_adapter(model, adapter)
        if r > 0:
            apply_lora(model, **settings | {"lora_dropout": dropout})
            print0(
                f"going on with the adapter {adapter}: "
                "its own r, alpha and target modules hold, not the options'"
            )
        else:
            products = adapter_products(settings, tensors)
    elif r > 0:
        targets = [t.strip() for t in config.lora_target_modules.split(",")]
        apply_lora(model, r, config.lora_alpha, dropout, targets, config.use_rslora)
    for block in model.model.layers:
        block.checkpointing = config.gradient_checkpointing
        # the arithmetic only: checkpointing and sharding stay outside
        if config.compile:
            block.use_compiler()
    compute_dtype = torch.bfloat16 if full_bf16 else None
    replicas = shard(model, config.shard, config.shard_group_size, device, compute_dtype)
    materialize(model, device)
    read_weights(model, own_parts(model), products)
    if r > 0 and adapter:
        fill_adapter(model, tensors)
    elif r > 0:
        init_adapter(model, config.seed)
    return model, replicas
