"""The options that name a model, and loading the sharded weights that a stage starts from."""

import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from common import arg
from hub.quantized import to_4bit
from loaders.frozen import DataConfig
from lora import adapter_products, apply_lora, lora_layers, read_adapter
from model import empty_model, materialize, read_weights
from runtime.sharding import fill, local, own_rows, shard, stored_parameters

THREE_WAYS = """Three ways:
  --model titles     a small model for this log's titles only: 2 cores, 2 GB, 5 to 15 minutes
  --model NAME       a directory or hub name; SmolLM2-135M, Qwen3-0.6B: a GPU of 16 GB, an hour;
                     Llama-3.1-8B, the paper's: GPUs of 24 GB or more, hours (--dry_run)
  --model demo/base  minutes, to try the commands: it reads the planted world's titles only"""
INVALID = "It cannot read these lists: give it more steps, or a base that can (--model titles)."
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class ModelOptions(DataConfig):
    """Which model is used, and how it is loaded and prompted."""

    model: str = arg("", "directory, hub name or (train.py) titles: a new base", group="model")
    adapter: str = arg("", "PEFT adapter; without --model on the base that it names")
    dtype: str = arg("auto", "of the base; auto: bfloat16 on a GPU, float32 on CPU", choices=DTYPES)
    prompt_format: str = arg("plain", "chat: in the chat template", choices=("plain", "chat"))
    load_in_4bit: bool = arg(False, "frozen layers in 4 bits (NF4): less memory, slower; LoRA only")
    max_length: int = arg(1024, "most tokens of prompt and title; cuts old history", at_least=1)


def stored_dtype(config, device) -> torch.dtype:
    """--dtype of the frozen weights; auto is bfloat16 on a GPU."""
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    return usual if config.dtype == "auto" else getattr(torch, config.dtype)


def free_memory() -> None:
    """Free the memory of models no longer used: hooks keep them in reference cycles."""
    gc.collect()
    torch.cuda.empty_cache()


def adapter_rank(config, stage: str) -> int:
    """LoRA rank of a stage; 0: all parameters are trained."""
    return config.sft_lora_r if stage == "sft" and config.sft_lora_r >= 0 else config.lora_r


def load_policy(config, stage: str, base: Path, adapter: Path | None, device):
    """Load and shard the model that a stage starts from: (model, ranks that hold the same rows)."""
    r, stored = adapter_rank(config, stage), stored_dtype(config, device)
    # full training keeps fp32 weights and computes in bf16
    full_bf16 = r == 0 and stored == torch.bfloat16
    model = empty_model(base, torch.float32 if full_bf16 else stored)
    if config.load_in_4bit:
        to_4bit(model)
    torch.compiler.reset()  # drops what the stage before compiled
    settings, tensors, products = {"r": r, "lora_alpha": config.lora_alpha}, {}, {}
    if adapter:
        settings, tensors = read_adapter(model, adapter)
    if r > 0:
        dropout = config.lora_dropout if stage == "sft" else 0.0
        apply_lora(model, **settings | {"lora_dropout": dropout})
    elif adapter:
        products, tensors = adapter_products(settings, tensors), {}
    for block in model.model.layers:
        block.checkpointing = config.gradient_checkpointing
        if config.compile:  # the arithmetic only: checkpointing and sharding stay outside
            block.use_compiler()
    compute_dtype = torch.bfloat16 if full_bf16 else None
    replicas = shard(model, config.shard, config.shard_group_size, device, compute_dtype)
    materialize(model, device)
    parameters = stored_parameters(model)
    read_weights(model, {n: (local(p), *own_rows(p)) for n, p in parameters.items()}, products)
    if not adapter:  # A is drawn whole on every rank, then sliced
        for name, layer in lora_layers(model).items():
            tensors[f"{name}.lora_A.weight"] = layer.draw_A(name, config.seed)
            tensors[f"{name}.lora_B.weight"] = torch.zeros(layer.lora_B.weight.shape)
    fill({name: parameters[name] for name in tensors}, tensors.get)
    return model, replicas
