"""The options that name a model, and the weights that a stage starts from:
base, adapter or a fresh one, sharded, read, ready to train."""

import gc
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from common import arg, print0
from hub.quantized import to_4bit
from loaders.frozen import DataConfig
from lora import adapter_products, apply_lora, lora_layers, read_adapter
from model import Transformer, empty_model, materialize, read_weights
from runtime.sharding import fill, local, own_rows, shard, stored_parameters

THREE_WAYS = """Three ways:
  --model titles      a tiny base, made for the titles of this log and then trained: 2 CPU cores
                      and 2 GB; about 10 minutes for up to 1,000 titles, 25 for 4,000, and again
                      as long for the training
  --model NAME        a pretrained model, a directory or a hub name. HuggingFaceTB/SmolLM2-135M or
                      Qwen/Qwen3-0.6B: one GPU of 16 GB, minutes to an hour for 10,000 prompts
                      (on 2 cores 2 s a prompt). meta-llama/Llama-3.1-8B, the paper's: GPUs of
                      24 GB or more, hours; --dry_run says what it needs
  --model demo/base   to try the plumbing only, in minutes: it cannot read other titles than
                      the planted world's"""
INVALID = (
    "The figures of this stage say little about taste: the model does not read these lists. "
    "Look at its eval/predictions.jsonl. Usual causes: a base that cannot read these titles "
    "(demo/base reads the planted world's alone; --model titles makes one for yours), too few "
    "steps, or too high a learning rate."
)


@dataclass(frozen=True)
class ModelOptions(DataConfig):
    """Which model, and how it is loaded and asked."""

    model: str = arg(
        "",
        "Hugging Face directory or hub name; train.py: also titles, a tiny base made for the "
        "titles of this log; empty = the base of --adapter, or demo/base; "
        "beside --run the new place of a base that moved",
        group="model",
    )
    adapter: str = arg("", "PEFT adapter; without --model on the base that it names")
    dtype: str = arg(
        "auto",
        "float32 or bfloat16; auto = bfloat16 on a GPU, float32 on CPU (adapters are float32)",
        choices=("auto", "float32", "bfloat16"),
    )
    prompt_format: str = arg(
        "plain",
        "plain text, or chat: the user's turn of the model's own chat template",
        choices=("plain", "chat"),
    )
    load_in_4bit: bool = arg(
        False, "frozen linear layers in 4 bits (NF4): a quarter of the memory, slower; LoRA only"
    )
    max_length: int = arg(
        1024,
        "tokens of prompt and longest candidate; longer prompts lose their oldest history",
        at_least=1,
    )


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


def adapter_rank(config, stage: str) -> int:
    """LoRA rank of a stage; 0: all parameters are trained."""
    return config.sft_lora_r if stage == "sft" and config.sft_lora_r >= 0 else config.lora_r


def load_policy(
    config, stage: str, base: Path, adapter: Path | None, device
) -> tuple[Transformer, int]:
    """Load what a stage starts from, base and adapter or a fresh one, sharded.

    Returns the model, and how many ranks hold the same rows."""
    r, stored = adapter_rank(config, stage), stored_dtype(config, device)
    # full training keeps fp32 weights and computes in bf16
    full_bf16 = r == 0 and stored == torch.bfloat16
    model = empty_model(base, torch.float32 if full_bf16 else stored)
    if config.load_in_4bit:
        to_4bit(model)
    torch.compiler.reset()  # what the stage before compiled
    settings, tensors = {"r": r, "lora_alpha": config.lora_alpha}, {}
    if adapter:
        settings, tensors = read_adapter(model, adapter)
    products = adapter_products(settings, tensors) if adapter and r == 0 else {}
    if r > 0:
        dropout = config.lora_dropout if stage == "sft" else 0.0
        apply_lora(model, **settings | {"lora_dropout": dropout})
    if r > 0 and adapter:
        print0(
            f"going on with the adapter {adapter}: "
            "its own r, alpha and target modules hold, not the options'"
        )
    for block in model.model.layers:
        block.checkpointing = config.gradient_checkpointing
        # the arithmetic only: checkpointing and sharding stay outside
        if config.compile:
            block.use_compiler()
    compute_dtype = torch.bfloat16 if full_bf16 else None
    replicas = shard(model, config.shard, config.shard_group_size, device, compute_dtype)
    materialize(model, device)
    parameters = stored_parameters(model)
    read_weights(model, {n: (local(p), *own_rows(p)) for n, p in parameters.items()}, products)
    if r > 0 and not adapter:  # A is drawn whole on every rank, and then cut
        for name, layer in lora_layers(model).items():
            tensors[f"{name}.lora_A.weight"] = layer.draw_A(name, config.seed)
            tensors[f"{name}.lora_B.weight"] = torch.zeros(layer.lora_B.weight.shape)
    if r > 0:
        fill({name: parameters[name] for name in tensors}, tensors.get)
    return model, replicas
