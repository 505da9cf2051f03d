"""Sharded models: weights, answers, losses and adapters of one process, however divided."""

import numpy as np
import pytest
import torch
from conftest import FAMILIES, write_checkpoint
from launch import assert_same_results, losses, run_script, run_train

from data import build_tree
from lora import apply_lora, save_adapter
from model import load_pretrained
from runtime.sharding import load_checkpoint, reshard, save_checkpoint, shard, trained

# A worker of 2 or 4 ranks: every checkpoint in every mode against the plain way of loading it
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
prompts = [[5, 6, 7, 9], [8, 4], [9]]
tree = build_tree(prompts, [[[8, 9, 2], [2]], [[7, 7, 2], [11, 2]], [[4, 2], [5, 5, 2]]])
copies = {"none": world_size, "hybrid": world_size // 2, "full": 1}
for adapter in Path(sys.argv[1]).glob("*/adapter"):
    cases = [("full", None, 4), ("hybrid", adapter, 4), ("full", adapter, 0), ("none", None, 0)]
    for mode, saved, r in cases:
        config = TrainConfig(shard=mode, shard_group_size=2, lora_r=r, seed=3)
        model, replicas = load_policy(config, "recpo", adapter.parent, saved, device)
        assert replicas == copies[mode]
        assert not any(p.is_meta for p in model.parameters())
        plain = load_pretrained(adapter.parent)
        if saved:
            load_adapter(plain, saved)
            if r == 0:
                merge_lora(plain)
        answers = generate(model.eval(), prompts, 6, {2}, any_rank)  # before any forward
        assert answers == generate(plain, prompts, 6, {2}), (adapter, mode)
        with torch.no_grad():
            torch.testing.assert_close(model(tree), plain(tree), rtol=1e-5, atol=1e-5)
        whole = dict(gathered(model.state_dict()))
        if rank == 0:
            whole = {name: whole[name] for name in plain.state_dict()}
            torch.testing.assert_close(whole, dict(plain.state_dict()), rtol=1e-6, atol=1e-6)
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
        save_adapter(model, tmp_path / family / "adapter")
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


# 21 steps a stage, every third of them smaller
LONG = ("--sft_epochs=7", "--epochs=7", "--micro_batch_tokens=1500", "--sft_lora_r=4")
# adapters that moved 10 times as far differ 10 times as much
LONG += ("--lora_dropout=0", "--sft_learning_rate=1e-3")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("runs")
    return tmp_path, run_train(tmp_path, "alone", *LONG)[1]


DIVISIONS = [
    pytest.param(n, mode, marks=pytest.mark.slow) for n in (2, 4) for mode in ("full", "none")
]


@pytest.mark.parametrize("processes, mode", [*DIVISIONS, (4, "hybrid")])
def test_any_division_gives_the_same_run(alone, processes, mode):
    """Losses to 1e-4, final adapters to 1e-5."""
    tmp_path, expected = alone
    name, flags = f"{mode}-{processes}", (f"--shard={mode}", "--shard_group_size=2")
    _, found = run_train(tmp_path, name, *LONG, *flags, processes=processes)
    for stage in ("sft", "recpo"):
        np.testing.assert_allclose(losses(found, stage), losses(expected, stage), atol=1e-4)
    assert_same_results(tmp_path / name, tmp_path / "alone", atol=1e-5)


def test_gathered_weights_are_never_taken_for_the_real_ones(group, tmp_path):
    """After a pass without backward every way to weights or moments raises, naming a parameter,
    until they are resharded; the optimizer must step what a checkpoint fills."""
    tree = build_tree([[5, 6]], [[[8, 2]]])
    model = apply_lora(load_pretrained(write_checkpoint(tmp_path / "base")), 4, 8)
    shard(model, "full", 0, "cpu", torch.float32)  # a dtype: otherwise one rank needs no shards
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    (-model(tree)[0].sum()).backward()
    optimizer.step()
    save_checkpoint(tmp_path, 3, model, optimizer, {}, {}, 2)
    with torch.no_grad():
        model(tree)
    ways = (
        lambda: trained(model),
        lambda: save_checkpoint(tmp_path, 4, model, optimizer, {}, {}, 2),
        lambda: load_checkpoint(tmp_path / "checkpoint-3", model, optimizer, {}),
    )
    for way in ways:
        with pytest.raises(RuntimeError, match=r"(embed|lm_head|layers\.1).*gathered.*reshard"):
            way()
    reshard(model)
    for way in ways:
        way()
    optimizer.param_groups[0]["params"].pop()
    with pytest.raises(AssertionError, match="moments"):
        ways[-1]()
