"""A GPU is accepted by these tests: asserts are the verdicts.

    pytest -m gpu                                                 one GPU, about 2 minutes
    torchrun --nproc_per_node 8 -m pytest -m gpu tests/test_gpu.py -k ranks

Each test runs the same lines on a CPU at toy sizes, in the ordinary suite. The kernels' own tests
(test_kernels.py, test_nf4.py) have parameters for a GPU, too. Speed: `python -m bench.gpu`."""

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
from launch import SAVING, TINY, TRAIN, places, run_train, start_train, wait_for
from test_kernels import assert_no_worse_than, plain_logps, three_gradients

from bench.harness import Sizes, Step, make_batch, make_model
from bench.head import exact_logps, rounded
from bench.step import Usual, naive_model, usual_logps
from data import build_tree
from kernels.logps import HAS_TRITON, label_logps
from model import generate
from runtime.estimate import LiveBytes, Workload, fake_step
from runtime.processes import setup_distributed
from runtime.sharding import shard

DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
RANKS = int(os.environ.get("WORLD_SIZE", 1))


def sizes_on(device: str, dtype: str = "float32", **changes) -> Sizes:
    """Two blocks of an 8B model on a GPU, of a toy on a CPU."""
    shape = {"shape": "tiny", "prompts": 2, "prompt": 24}
    if device == "cuda":
        shape = {"shape": "llama-3.1-8b", "prompts": 4, "prompt": 400}
    return Sizes(**{"layers": 2, "device": device, "dtype": dtype} | shape | changes)


def rms(x) -> float:
    return x.double().square().mean().sqrt().item()


# ------------------------------------------------------------------------ kernels
@pytest.mark.parametrize("impl", ["slabs", "triton", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@DEVICES
def test_the_head_errs_no_more_than_plain_pytorch(device, dtype, impl):
    """Log-probs and gradient of 8B's head and of a ragged one, against float64."""
    if impl != "slabs" and (device == "cpu" or not HAS_TRITON):
        pytest.skip("test_kernels.py runs it in Triton's interpreter")
    shapes = [(37, 40, 1001)]
    if device == "cuda":
        shapes = [(512, 4096, 128256), (37, 4090, 32003)]
    for M, D, V in shapes:
        hidden = (3.5 * torch.randn(M, D, device=device)).to(dtype)
        weight = (torch.randn(V, D, device=device) * D**-0.5).to(dtype)
        labels, upstream = torch.randint(V, (M,), device=device), torch.randn(M, device=device)
        exact = exact_logps(hidden, weight, labels)
        actual = label_logps(hidden, weight, labels, impl)[0]
        assert_no_worse_than(actual, plain_logps(hidden, weight, labels), exact, atol=1e-5)
        if dtype == torch.bfloat16:  # what fp32 logits are there for
            assert rms(rounded(hidden, weight, labels) - exact) > 20 * rms(actual - exact)
        batch = (hidden, weight, labels, upstream)
        (triple,) = three_gradients(impl, *batch, weight_grad=False)
        # the weights of the second GEMM are rounded to the head's dtype
        assert_no_worse_than(*triple, factor=2.0 if dtype == torch.float32 else 4.0)


# ------------------------------------------------------------------------ a model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@DEVICES
def test_a_tree_scores_what_full_sequences_score(device, dtype):
    """Against the same model in fp32, it errs at most twice as much as full sequences do."""
    sizes = sizes_on(device, dtype)
    model, batch = make_model(sizes), make_batch(sizes)
    tree = build_tree(*batch).to(device)
    with torch.no_grad():
        together = tree.sum_logps(model.eval()(tree)[0])
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@DEVICES
def test_the_first_rewards_are_zero(device, dtype):
    """The policy is its own reference: with gradients it computes what it did without."""
    sizes = sizes_on(device, dtype)
    step = Step(make_model(sizes), make_batch(sizes))
    logps = step.tree.sum_logps(step.model(step.tree)[0])
    assert (logps - step.reference_logps).abs().max().item() < 1e-3


@DEVICES
def test_generate_writes_what_one_pass_calls_the_greedy_answer(device):
    sizes = sizes_on(device, "bfloat16" if device == "cuda" else "float32", prompts=8)
    model, (prompts, _) = make_model(sizes).eval(), make_batch(sizes)
    written = generate(model, prompts, 12, [])
    tree = build_tree(prompts, [[ids] for ids in written]).to(device)
    with torch.no_grad():
        greedy = model(tree)[1]
    assert (greedy == tree.labels).float().mean().item() >= 0.98  # near-ties


@pytest.mark.parametrize("four_bit", [False, True])
@DEVICES
def test_the_memory_of_a_step_is_its_estimate(device, four_bit):
    """Weights, adapter, moments and activations, within a tenth."""
    sizes = sizes_on(device, "bfloat16" if device == "cuda" else "float32", prompt=400)
    work = Workload(
        config=sizes.config,
        dtype=sizes.torch_dtype,
        r=8,
        prompt=sizes.prompt,
        completions=[sizes.completion] * (1 + sizes.negatives),
        load_in_4bit=four_bit,
    )
    expected = fake_step(work, sizes.prompts, gpu=device == "cuda")
    make_model.cache_clear()
    alive = LiveBytes()
    with alive if device == "cpu" else torch.enable_grad():
        model = make_model.__wrapped__(sizes, four_bit)
        alive.peak = alive.live  # the layers that 4-bit ones replaced are gone
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step = Step(model, make_batch(sizes))
        step()
        step()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else alive.peak
    total = expected.weights + expected.trained + expected.passing
    assert peak == pytest.approx(total, rel=0.1)


# ------------------------------------------------------------------------ a run
def train(device: str, folder, name: str, *flags) -> dict[str, list[dict]]:
    """Metrics of a run by stage; on a GPU in bf16, by `python train.py`."""
    if device == "cpu":
        return run_train(folder, name, *flags)[1]
    done = subprocess.run(command(folder, name, *flags), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    files = (folder / name).glob("*/metrics.jsonl")
    return {f.parent.name: [json.loads(row) for row in f.read_text().splitlines()] for f in files}


def command(folder, name: str, *flags) -> list[str]:
    options = (*TINY, *places(folder, name), "--dtype=bfloat16", *flags)
    return [sys.executable, str(TRAIN), *options]


@DEVICES
def test_a_short_training_goes_on_after_kill_9(device, tmp_path):
    """SFT and RecPO; the losses of a run that was killed and resumed are the whole run's."""
    whole = train(device, tmp_path, "whole", *SAVING)
    if device == "cpu":
        started = start_train(tmp_path, "killed", *SAVING)
    else:
        started = subprocess.Popen(command(tmp_path, "killed", *SAVING), cwd=tmp_path)
    saved = (tmp_path / "killed").glob
    wait_for(lambda: any(saved("*/checkpoint-*")), started)
    started.kill()
    if device == "cuda":
        started.wait()
    resumed = train(device, tmp_path, "killed", *SAVING, "--resume=auto")
    for stage in ("sft", "recpo"):
        losses = [np.array([m["loss"] for m in run[stage]]) for run in (whole, resumed)]
        assert np.allclose(*losses, rtol=1e-6 if device == "cpu" else 2e-2)
    assert whole["sft"][-1]["loss"] < whole["sft"][0]["loss"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_base_in_4_bits_trains(tmp_path):
    """test_quantized.py runs it on a CPU."""
    metrics = train("cuda", tmp_path, "four", "--load_in_4bit", "--sft_lora_r=4", "--max_steps=3")
    assert all(np.isfinite(m["loss"]) for m in metrics["recpo"])


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
