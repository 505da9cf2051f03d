"""Sharded models: weights, answers, losses and adapters of one process, however divided."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import FAMILIES, write_checkpoint
from launch import TINY, TRAIN, losses, places, run_script, run_train
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from data import build_tree
from lora import apply_lora, save_adapter
from model import load_pretrained
from runtime.sharding import (
    load_checkpoint,
    reshard,
    save_checkpoint,
    shard,
    stored_parameters,
    trained,
)
from train import TrainConfig, train_step

# A worker of 2 or 4 ranks: load every checkpoint in every mode and compare with the plain way of
# loading it.
WORKER = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from runtime.processes import any_rank, setup_distributed
from data import build_tree
from lora import load_adapter, merge_lora
from model import generate, load_pretrained
from runtime.sharding import gathered
from train import TrainConfig, load_policy

rank, world_size, device = setup_distributed()
folder = Path(sys.argv[1])
prompts = [[5, 6, 7, 9], [8, 4], [9]]
tree = build_tree(prompts, [[[8, 9, 2], [2]], [[7, 7, 2], [11, 2]], [[4, 2], [5, 5, 2]]])
for path in sorted(folder.glob("*/config.json")):
    saved = folder / "adapters" / path.parent.name
    copies = {"none": world_size, "hybrid": world_size // 2, "full": 1}
    cases = [("full", None, 4), ("hybrid", saved, 4), ("full", saved, 0), ("none", None, 0)]
    for mode, adapter, r in cases:
        config = TrainConfig(shard=mode, shard_group_size=2, lora_r=r, seed=3)
        model, replicas = load_policy(config, "recpo", path.parent, adapter, device)
        assert replicas == copies[mode]
        assert not any(p.is_meta for p in model.parameters())
        plain = load_pretrained(path.parent)
        if adapter:
            load_adapter(plain, adapter)
            if r == 0:
                merge_lora(plain)
        model.eval()
        answers = generate(model, prompts, 6, {2}, any_rank)  # before any forward
        assert answers == generate(plain, prompts, 6, {2}), (path, mode)
        with torch.no_grad():
            torch.testing.assert_close(model(tree), plain(tree), rtol=1e-5, atol=1e-5)
        whole = dict(gathered(model.state_dict()))
        if rank == 0:
            for name, p in plain.state_dict().items():
                message = f"{path} {mode} {name}"
                torch.testing.assert_close(whole[name], p, rtol=1e-6, atol=1e-6, msg=message)
print("ALL GOOD", flush=True)
"""


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_family_loads_sharded_as_it_loads_whole(processes, tmp_path):
    """Weights, tied heads, biases, log-probs and `generate` before any forward;
    adapters kept, and merged for full training."""
    for family in FAMILIES:
        write_checkpoint(tmp_path / family, family, shard_bytes=20_000)
        model = apply_lora(load_pretrained(tmp_path / family), 4, 8, seed=5)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
        save_adapter(model, tmp_path / "adapters" / family)
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = run_script(script, tmp_path, processes=processes)
    assert done.stdout.count("ALL GOOD") == processes, done.stderr[-3000:]


def test_groups_must_divide_the_world(group, monkeypatch):
    """hybrid's group is a machine by default; one that does not divide the processes is refused."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for size, named in ((0, 3), (5, 5)):
        with pytest.raises(ValueError, match=f"shard_group_size {named} must divide the 8"):
            shard(None, "hybrid", size, "cpu")
    assert shard(None, "none", 0, "cpu") == shard(None, "hybrid", 1, "cpu") == 8  # replicas


# 21 steps a stage
LONG = ("--sft_epochs=7", "--epochs=7", "--micro_batch_tokens=1500", "--sft_lora_r=4")
# adapters that moved 10 times as far differ 10 times as much
LONG += ("--lora_dropout=0", "--sft_learning_rate=1e-3")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process: 20 prompts in steps of 8, so that every third step is a smaller one."""
    tmp_path = tmp_path_factory.mktemp("runs")
    return tmp_path, run_train(tmp_path, "alone", *LONG)[1]


def assert_same_run(tmp_path, name, expected) -> None:
    for stage in ("sft", "recpo"):
        lines = [json.loads(m) for m in (tmp_path / name / stage / "metrics.jsonl").open()]
        found = [m["loss"] for m in lines if m["phase"] != "val"]
        assert len(found) == 21
        np.testing.assert_allclose(found, losses(expected, stage), atol=1e-4)
        ours, theirs = (
            load_file(tmp_path / n / stage / "adapter_model.safetensors") for n in (name, "alone")
        )
        assert max((ours[key] - theirs[key]).abs().max().item() for key in theirs) < 1e-5


DIVISIONS = [
    pytest.param(n, mode, marks=pytest.mark.slow) for n in (2, 4) for mode in ("full", "none")
]


@pytest.mark.parametrize("processes, mode", [*DIVISIONS, (4, "hybrid")])
def test_any_division_gives_the_same_run(alone, processes, mode):
    """20 steps a stage: losses to 1e-4, final adapters to 1e-5."""
    tmp_path, expected = alone
    name, flags = f"{mode}-{processes}", (f"--shard={mode}", "--shard_group_size=2")
    run_train(tmp_path, name, *LONG, *flags, processes=processes)
    assert_same_run(tmp_path, name, expected)


@pytest.mark.slow
def test_two_agents_give_the_same_run(alone):
    """hybrid over two torchrun agents of two processes each, as on two machines:
    a group is a machine."""
    tmp_path, expected = alone
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:29517", "--rdzv_id=recpo"]
    command += [str(TRAIN), *TINY, *LONG, "--shard=hybrid", *places(tmp_path, "agents")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    agents = [subprocess.Popen(command, env=env, **quiet) for _ in range(2)]
    assert [agent.wait(300) for agent in agents] == [0, 0]
    assert_same_run(tmp_path, "agents", expected)


# ---------------------------------------------------------------------- the real parameters
@pytest.fixture
def sharded(group, tmp_path):
    """A sharded model with an adapter, in a group of one, and its optimizer after a step."""
    write_checkpoint(tmp_path / "base")
    model = apply_lora(load_pretrained(tmp_path / "base"), 4, 8, seed=5)
    shard(model, "full", 0, "cpu", torch.float32)  # a dtype: otherwise one rank needs no shards
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    (-model(build_tree([[5, 6]], [[[8, 2]]]))[0].sum()).backward()
    optimizer.step()
    return tmp_path, model, optimizer


def test_gathered_weights_are_never_taken_for_the_real_ones(sharded):
    """After a pass without backward every way to weights or moments raises, naming a parameter,
    until they are resharded; the optimizer must step what a checkpoint fills."""
    folder, model, optimizer = sharded
    save_checkpoint(folder, 3, model, optimizer, {}, {}, 2)
    with torch.no_grad():
        model(build_tree([[5, 6]], [[[8, 2]]]))
    ways = (
        lambda: stored_parameters(model),
        lambda: trained(model),
        lambda: save_checkpoint(folder, 4, model, optimizer, {}, {}, 2),
        lambda: load_checkpoint(folder / "checkpoint-3", model, optimizer, {}),
    )
    for way in ways:
        with pytest.raises(RuntimeError, match=r"(embed|lm_head|layers\.1).*gathered.*reshard"):
            way()
    reshard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    for way in ways:
        way()
    optimizer.param_groups[0]["params"].pop()
    with pytest.raises(AssertionError, match="moments"):
        ways[-1]()


@pytest.mark.parametrize("r", [0, 4])
def test_gradients_of_all_weights_are_reduced_after_every_micro_batch(group, tmp_path, r):
    """Between micro-batches full training holds its rows only; adapters are reduced once a step."""
    model = load_pretrained(write_checkpoint(tmp_path / "base"))
    if r:
        apply_lora(model, r, 8)
    shard(model, "full", 0, "cpu", torch.float32)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    reduced = []

    def compute(batch):
        reduced.append(all(p.grad is not None for p in parameters))
        loss = -model(build_tree([[5, 6]], [[[8, 2]]]))[0].sum()
        return loss, {"loss": (loss.detach(), 1.0)}

    train_step(model, optimizer, [0, 1], compute, 1e-3, TrainConfig())
    assert reduced == [False, r == 0]
