"""A GPU is accepted by these tests: asserts are the verdicts.

    pytest -m gpu                                                 one GPU, about 2 minutes
    torchrun --nproc_per_node 8 -m pytest -m gpu tests/test_gpu.py -k ranks

Tests with device "cpu" run the same lines at toy sizes, in the ordinary suite. test_kernels.py and
test_nf4.py have 8B's shapes for a GPU, too. Speed: `python -m bench.gpu`."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CUDA
from launch import SAVING, TINY, TRAIN, places, wait_for

from bench.harness import Sizes, Step, make_batch, make_model
from bench.step import Usual, naive_model, usual_logps
from data import build_tree
from model import generate
from runtime.estimate import Workload, fake_step
from runtime.processes import setup_distributed
from runtime.sharding import shard

DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
NEEDS_GPU = pytest.mark.parametrize("device", [CUDA])
RANKS = int(os.environ.get("WORLD_SIZE", 1))


def sizes_on(device: str, dtype: str = "float32", **changes) -> Sizes:
    """Two blocks of an 8B model on a GPU, of a toy on a CPU."""
    shape = {"shape": "tiny", "prompts": 2, "prompt": 24}
    if device == "cuda":
        shape = {"shape": "llama-3.1-8b", "prompts": 4, "prompt": 400}
    return Sizes(**{"layers": 2, "device": device, "dtype": dtype} | shape | changes)


def rms(x) -> float:
    return x.double().square().mean().sqrt().item()


# ------------------------------------------------------------------------ a model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@DEVICES
def test_a_tree_scores_what_full_sequences_score(device, dtype):
    """Against the same model in fp32, it errs at most twice as much as full sequences do."""
    sizes = sizes_on(device, dtype)
    model, batch = make_model(sizes), make_batch(sizes)
    step = Step(model, batch)
    logps = step.tree.sum_logps(model(step.tree)[0])
    assert (logps - step.reference_logps).abs().max().item() < 1e-3
    with torch.no_grad():
        together = step.tree.sum_logps(model.eval()(step.tree)[0])
        apart = usual_logps(naive_model(model), *batch)
        exact = usual_logps(naive_model(copy.deepcopy(model).float()), *batch)
    assert rms(together - exact) <= 2 * rms(apart - exact) + 1e-4


@DEVICES
def test_a_step_has_the_loss_and_gradients_of_the_usual_way(device):
    """1 + K full sequences, full logits and naive adapters, in fp32."""
    sizes = sizes_on(device)
    model, batch = make_model(sizes), make_batch(sizes)
    usual = Usual(model, batch, peer=False, micro_batch=2)
    step = Step(model, batch)
    (loss, _), expected = step.compute(step.tree), usual.backward()
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    ours = {n.removesuffix(".weight"): p for n, p in model.named_parameters() if p.requires_grad}
    for name, p in usual.model.named_parameters():
        if p.requires_grad:
            gap = (ours[name].grad - p.grad).abs().max() / p.grad.abs().max()
            assert gap < 1e-3, name
    model.zero_grad(set_to_none=True)


@DEVICES
def test_generate_writes_what_one_pass_calls_the_greedy_answer(device):
    sizes = sizes_on(device, "bfloat16" if device == "cuda" else "float32", prompts=8)
    model, (prompts, _) = make_model(sizes).eval(), make_batch(sizes)
    written = generate(model, prompts, 12, [])
    tree = build_tree(prompts, [[ids] for ids in written]).to(device)
    with torch.no_grad():
        greedy = model(tree)[1]
    assert (greedy == tree.labels).float().mean().item() >= 0.98  # near-ties


@NEEDS_GPU
@pytest.mark.parametrize("four_bit", [False, True])
def test_the_memory_of_a_step_is_its_estimate(four_bit, device):
    """Weights, adapter, moments and activations, within a tenth; on a CPU: test_estimate.py."""
    sizes = sizes_on(device, "bfloat16")
    completions = [sizes.completion] * (1 + sizes.negatives)
    work = Workload(sizes.config, sizes.torch_dtype, 8, sizes.prompt, completions)
    work = replace(work, load_in_4bit=four_bit)
    expected = fake_step(work, sizes.prompts, gpu=True)
    make_model.cache_clear()
    model = make_model.__wrapped__(sizes, four_bit)
    torch.cuda.reset_peak_memory_stats()  # the layers that 4-bit ones replaced are gone
    step = Step(model, make_batch(sizes))
    step()
    step()
    total = expected.weights + expected.trained + expected.passing
    assert torch.cuda.max_memory_allocated() == pytest.approx(total, rel=0.1)


# ------------------------------------------------------------------------ a run
@NEEDS_GPU
def test_a_short_training_goes_on_after_kill_9(device, tmp_path):
    """In bf16; a base in 4 bits trains, too. On a CPU: test_checkpoint.py, test_quantized.py."""

    def start(name: str, *flags) -> subprocess.Popen:
        options = (*TINY, *places(tmp_path, name), "--dtype=bfloat16", *flags)
        return subprocess.Popen([sys.executable, str(TRAIN), *options], cwd=tmp_path)

    def metrics(name: str, *flags) -> dict[str, list[float]]:
        assert start(name, *flags).wait() == 0
        files = (tmp_path / name).glob("*/metrics.jsonl")
        rows = {f.parent.name: map(json.loads, f.read_text().splitlines()) for f in files}
        return {name: [m["loss"] for m in r if m["phase"] != "val"] for name, r in rows.items()}

    whole, killed = metrics("whole", *SAVING), start("killed", *SAVING)
    wait_for(lambda: any((tmp_path / "killed").glob("*/checkpoint-*")), killed)
    killed.kill()
    killed.wait()
    resumed = metrics("killed", *SAVING, "--resume=auto")
    for stage in ("sft", "recpo"):
        assert np.allclose(whole[stage], resumed[stage], rtol=2e-2)
    assert whole["sft"][-1] < whole["sft"][0]
    four = metrics("four", "--load_in_4bit", "--sft_lora_r=4", "--max_steps=3")
    assert np.isfinite(four["recpo"]).all()


# ------------------------------------------------------------------------ several GPUs
@pytest.mark.skipif(RANKS == 1, reason="start it by torchrun --nproc_per_node N -m pytest")
@DEVICES
def test_ranks_take_the_same_steps_sharded_and_whole(device):
    """Loss and gradient norm of three steps; each rank brings prompts of its own."""
    rank, world_size, device = setup_distributed()
    sizes = sizes_on(device.type, "bfloat16" if device.type == "cuda" else "float32")
    whole = make_batch(replace(sizes, prompts=sizes.prompts * world_size))
    mine = slice(rank * sizes.prompts, (rank + 1) * sizes.prompts)
    found = {}
    for mode in ("none", "full"):
        model = make_model.__wrapped__(sizes)
        replicas = shard(model, mode, 0, device)
        step = Step(model, tuple(part[mine] for part in whole), replicas=replicas)
        found[mode] = [step() for _ in range(3)]
    limit = 3e-2 if device.type == "cuda" else 1e-4
    for alone, sharded in zip(found["none"], found["full"], strict=True):
        for name in ("loss", "grad_norm"):
            assert sharded[name] == pytest.approx(alone[name], rel=limit), name
