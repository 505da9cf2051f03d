"""Tiny models of every supported family, their files, and runs that tests share."""

import json
import os
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launch import SAVING, run_train
from safetensors.torch import load_file, save_file
from torch import nn

if not torch.cuda.is_available():
    # Triton kernels run on the CPU; they read it when they are imported
    os.environ["TRITON_INTERPRET"] = "1"

from families import END_OF_TEXT, byte_level, llama2_style

from data import Examples, Interactions
from hub.files import note_once
from hub.tokenizer import Tokenizer
from model import ModelConfig, Transformer, save_pretrained

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])  # tests of `pytest -m gpu`

torch.set_num_threads(1)  # tensors this small cost more to divide than to compute

# config.json as published by transformers 4, but small. Head size 8 gives rotary wavelengths of 6
# to 118,000 positions: kept, in between and slowed down by the llama3 scaling.
EOS = 2
COMMON = {
    "vocab_size": 131, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
    "max_position_embeddings": 131072, "bos_token_id": 1, "eos_token_id": EOS,
    "initializer_range": 0.02,
}  # fmt: skip
LLAMA = COMMON | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
LLAMA |= {"rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False}
QWEN2 = COMMON | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN2 |= {"rms_norm_eps": 1e-6, "rope_theta": 1e6}
QWEN2 |= {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 2}
QWEN3 = QWEN2 | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
QWEN3 |= {"attention_bias": False, "head_dim": 16}  # 16, not 32 / 4
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LLAMA3 = LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
FAMILIES = {
    "llama2": LLAMA | UNTIED | {"num_key_value_heads": 4},
    "llama3.1": LLAMA3 | UNTIED,
    "llama3.2": LLAMA3 | TIED | {"rope_scaling": LLAMA3_ROPE | {"factor": 32.0}, "head_dim": 8},
    "qwen2.5": QWEN2 | UNTIED,
    "qwen2.5-tied": QWEN2 | TIED,
    "qwen3": QWEN3 | TIED,
}


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, and no note has been printed."""
    torch.manual_seed(0)
    note_once.cache_clear()


@pytest.fixture(scope="session")
def one_process(tmp_path_factory):
    """A finished SFT + RecPO run in one process, in micro-batches of one prompt."""
    tmp_path = tmp_path_factory.mktemp("runs")
    return tmp_path, *run_train(tmp_path, "one", "--micro_batch_tokens=500")


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run that nothing interrupted, in one process, and the seconds it took."""
    tmp_path, started = tmp_path_factory.mktemp("runs"), time.time()
    _, metrics = run_train(tmp_path, "whole", *SAVING)
    return tmp_path, metrics, time.time() - started


@pytest.fixture
def group():
    """A process group of one; a script's main() that ran before may have left its own."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """call(main, *flags): a script's main() in this process, in a process group of its own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.chdir(tmp_path)

    def call(main, *flags) -> None:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
        try:
            main()
        finally:
            dist.destroy_process_group()

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def examples_at(
    interactions: Interactions, positions: list[int], candidates: np.ndarray, history: int = 20
) -> Examples:
    E, n = candidates.shape
    facts = {"target": np.zeros(E, np.int32), "template": np.zeros(E, np.int32)}
    facts |= {"scores": np.zeros((E, n), np.float32), "is_random": np.ones((E, n), bool)}
    facts["negative_order"] = np.tile(np.arange(1, n, dtype=np.int32), (E, 1))
    taken = {"position": np.array(positions), "candidates": candidates.astype(np.int32)}
    return Examples(interactions, "test", history, **taken, **facts)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model folder per family, with tokenizer.json and the EOS in config.json."""
    found = {family: tmp_path_factory.mktemp(family) for family in END_OF_TEXT}
    for family, folder in found.items():
        inner = llama2_style() if family == "llama2" else byte_level(family)
        inner.save(str(folder / "tokenizer.json"))
        write_json(folder / "config.json", {"eos_token_id": inner.token_to_id(END_OF_TEXT[family])})
    return found


@pytest.fixture(params=END_OF_TEXT)
def family(request) -> str:
    return request.param


@pytest.fixture
def tokenizer(family, folders) -> Tokenizer:
    return Tokenizer(folders[family])


def tiny_config(family: str) -> ModelConfig:
    raw = FAMILIES[family]
    known = {f.name: raw[f.name] for f in fields(ModelConfig) if f.name in raw}
    known.setdefault("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
    return ModelConfig(**known | {"attention_bias": raw["model_type"] == "qwen2"})


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw norms around 1, biases far from 0, projections that keep the scale of their input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            drawn = torch.randn(p.shape, generator=generator)
            if p.ndim == 2:
                p.copy_(drawn * (0.2 if "embed" in name else p.shape[1] ** -0.5))
            else:
                p.copy_(drawn / 2 if name.endswith("bias") else 1 + 0.3 * drawn)
    return model


def tiny_model(family: str = "llama3.1", seed: int = 0) -> Transformer:
    return randomize(Transformer(tiny_config(family)), seed)


def write_checkpoint(path: Path, family: str = "llama3.1", seed: int = 0, **kwargs) -> Path:
    save_pretrained(tiny_model(family, seed), path, **kwargs)
    return path


def change_tensors(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def write_json(file: Path, content) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def transformers_model(family: str, path: Path, seed: int = 0):
    """A random model, saved at `path`, that transformers makes of the published config.json."""
    transformers = pytest.importorskip("transformers")
    write_json(path / "config.json", FAMILIES[family])
    config = transformers.AutoConfig.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model.float().eval(), seed).save_pretrained(path)
    return model


def max_diff(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()
