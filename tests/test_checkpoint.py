"""Checkpoints: whole or not there, bitwise resuming after any death, other numbers of processes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
from conftest import tiny_model
from launch import SAVING, TINY, losses, places, run_train, start_train, wait_for

import train
from lora import apply_lora
from runtime.sharding import hash_of, load_checkpoint, newest, newest_checkpoint, save_checkpoint

GRID = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(100, 120)]


@pytest.mark.parametrize("seed", [1, *GRID])
def test_kill_9_at_a_random_moment_changes_no_bit(whole, seed):
    """Of every process, saving included: `--resume auto` ends with the adapters, losses and curves
    of the uninterrupted run."""
    tmp_path, _, seconds = whole
    name, processes = f"killed-{seed}", 1 if seed == 1 else 1 + seed % 2
    process = start_train(tmp_path, name, *SAVING, processes=processes)
    wait_for((tmp_path / name / "config.json").exists, process)  # nothing to lose before that
    time.sleep(random.Random(seed).uniform(0, 0.8 * seconds))
    process.kill()
    run_train(tmp_path, name, *SAVING, "--resume=auto", processes=processes)
    expected = launch.uninterrupted(tmp_path, processes)
    launch.assert_same_results(tmp_path / name, expected)
    for file in ("sft/metrics.jsonl", "recpo/metrics.jsonl"):
        assert (tmp_path / name / file).read_text() == (expected / file).read_text()
    assert not [*(tmp_path / name).glob("*.unfinished"), *(tmp_path / name).glob("*/checkpoint-*")]


@pytest.mark.parametrize("processes", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_saved_on_two_ranks_resumes_on_another_number(whole, processes):
    """A checkpoint of 2 sharded processes, of all weights in SFT, goes on in 1 and in 4 with the
    losses of an uninterrupted run (no dropout)."""
    tmp_path, name = whole[0], f"two-to-{processes}"
    flags = ("--save_steps=2", "--micro_batch_tokens=1500", "--eval_steps=3", "--keep=best")
    _, expected = run_train(tmp_path, f"all-weights-{processes}", *flags)
    process = start_train(tmp_path, name, *flags, processes=2)
    wait_for(lambda: newest(tmp_path / name / "sft.unfinished"), process)
    process.kill()
    output, metrics = run_train(tmp_path, name, *flags, "--resume=auto", processes=processes)
    assert "resuming from" in output
    for stage in ("sft", "recpo"):
        np.testing.assert_allclose(losses(metrics, stage), losses(expected, stage), atol=1e-4)
    launch.assert_same_results(tmp_path / name, tmp_path / f"all-weights-{processes}", atol=1e-4)


def test_torchrun_restarts_go_on_by_themselves(whole):
    """A worker is killed; with --max-restarts it starts again and goes on to the same bits."""
    tmp_path, name = whole[0], "restarted"
    options = ("--standalone", "--nproc_per_node=1", "--max-restarts=1")
    agent = launch.start_torchrun(tmp_path, name, *options)
    folder, log = tmp_path / name / "sft.unfinished", tmp_path / f"{name}.log"
    wait_for(lambda: len(newest(folder)) > 1, agent)
    for worker in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        os.kill(int(worker), signal.SIGKILL)
    assert agent.wait(200) == 0, log.read_text()[-3000:]
    assert "resuming from" in log.read_text()
    launch.assert_same_results(tmp_path / name, tmp_path / "whole")


def test_a_loss_that_is_not_finite_names_step_and_rank(tmp_path):
    """Both ranks stop with one message."""
    flags = ("--sft_learning_rate=1e30", "--max_grad_norm=0", "--save_steps=1", "--sft_epochs=4")
    output, _ = run_train(tmp_path, "stops", *flags, processes=2, expect=1)
    message = r"error \(rank [01]\): sft, step \d+: the (loss of ranks \[[01, ]+\]|gradient alone) "
    assert re.search(message + "is not finite", output), output[-3000:]
    assert "Traceback (most recent" not in output.split("error (rank")[0]


# ------------------------------------------------------------------------ inside a preference stage
@pytest.fixture(scope="module")
def killed(whole):
    """copy(name): the uninterrupted run's SFT stage, then RecPO on 2 ranks, killed after step 4."""
    tmp_path, folder = whole[0], whole[0] / "killed"
    ignored = shutil.ignore_patterns("recpo", "reference-*")
    shutil.copytree(tmp_path / "whole", folder, ignore=ignored)
    process = start_train(tmp_path, folder.name, *SAVING, "--resume=auto", processes=2)
    wait_for((folder / "recpo.unfinished" / "checkpoint-4").exists, process)
    process.kill()
    shutil.rmtree(folder / "recpo.unfinished" / "checkpoint-6", ignore_errors=True)
    return lambda name: Path(shutil.copytree(folder, tmp_path / name))


@pytest.mark.parametrize(
    ("reference", "processes", "budget"),
    [("deleted", 2, 1500), ("kept", 1, 700)]
    + [pytest.param("deleted", n, 500, marks=pytest.mark.slow) for n in (1, 4)]
    + [pytest.param("kept", n, 100_000, marks=pytest.mark.slow) for n in (2, 4)],
)
def test_a_kill_inside_a_preference_stage_changes_no_loss(
    whole, killed, reference, processes, budget
):
    """The reference recomputed from the starting weights or read, whatever the processes and
    micro-batches: the losses of the uninterrupted run."""
    tmp_path, metrics, _ = whole
    folder = killed(f"{reference}-{processes}-{budget}")
    (file,) = folder.glob("reference-*.safetensors")
    if reference == "deleted":
        file.unlink()
    with open(folder / "recpo.unfinished" / "metrics.jsonl", "a") as log:
        log.write('{"phase": "recpo", "step": 5, "loss": 9.0}\n{"pha')  # logged after it: cut off
    flags = (*SAVING, "--resume=auto", f"--micro_batch_tokens={budget}")
    output, resumed = run_train(tmp_path, folder.name, *flags, processes=processes)
    assert "checkpoint-4, after step 4" in output and file.exists()
    expected = losses(metrics, "recpo")
    np.testing.assert_allclose(losses(resumed, "recpo"), expected, rtol=0, atol=1e-4)
    launch.assert_same_results(folder, tmp_path / "whole", atol=1e-4)


def test_a_checkpoint_made_from_something_else_is_refused(whole, killed, in_process):
    """Other data, starting weights, token ids or reference log-probs."""
    folder = killed("other")
    state = folder / "recpo.unfinished" / "checkpoint-4" / "state.json"
    other = dict.fromkeys(("data", "weights", "token ids", "reference"), "other")
    state.write_text(json.dumps(json.loads(state.read_text()) | other))
    Path(f"{state}.sha256").write_text(hash_of(state))
    message = f"checkpoint-4.*other {', '.join(other)}; .*another --output_dir"
    with pytest.raises(ValueError, match=message):
        in_process(train.main, *TINY, *SAVING, *places(whole[0], "other"), "--resume=auto")


# ------------------------------------------------------------------------ one checkpoint
def model_and_optimizer(steps: int = 1):
    model = apply_lora(tiny_model(), r=4, lora_alpha=8)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
    for _ in range(steps):
        for p in trained:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return model, optimizer


def save(folder: Path, step: int, keep: int = 2, best=()):
    model, optimizer = model_and_optimizer()
    save_checkpoint(folder, step, model, optimizer, dict(best), {"data": "abc"}, keep)
    return folder / f"checkpoint-{step}", model, optimizer


def test_a_checkpoint_gives_back_every_bit(group, tmp_path):
    """Adapter, both moments, step count, best weights and random state come back as they were; no
    file is a pickle, and the hashes are those of sha256sum."""
    other, _ = model_and_optimizer()
    kept = {name: p.detach() for name, p in other.named_parameters() if p.requires_grad}
    folder, model, optimizer = save(tmp_path, 7, best=kept)
    expected_random = torch.rand(3)
    fresh, fresh_optimizer = model_and_optimizer(steps=0)
    state, best = load_checkpoint(folder, fresh, fresh_optimizer, {"data": "abc"})
    assert state["step"] == 7 and torch.equal(torch.rand(3), expected_random)
    exact = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(best, kept, **exact)
    torch.testing.assert_close(fresh.state_dict(), model.state_dict(), **exact)
    moments = [o.state_dict()["state"] for o in (optimizer, fresh_optimizer)]
    torch.testing.assert_close(*moments, **exact)
    assert moments[0][0].keys() == {"exp_avg", "exp_avg_sq", "step"}
    assert {f.suffix for f in folder.iterdir()} == {".json", ".safetensors", ".sha256"}
    subprocess.run("sha256sum --check *.sha256", shell=True, cwd=folder, check=True)


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "without hash"])
@pytest.mark.parametrize("file", ["model.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_passed_over(group, tmp_path, file, how, capsys):
    """With its file, and the one before is taken; like an unfinished one it takes no place of
    --save_total_limit: the run saves the same or another step and goes on from it."""
    save(tmp_path, 2)[0].rename(tmp_path / "checkpoint-2.part")
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path, 3)
    older, damaged = save(tmp_path, 4)[0], save(tmp_path, 10)[0]
    assert {f.name for f in tmp_path.iterdir()} == {older.name, damaged.name}
    content = bytearray((damaged / file).read_bytes())
    content[len(content) // 2] ^= 4 * (how == "flipped")
    (damaged / file).write_bytes(content[:-5] if how == "cut" else content)
    if how in ("gone", "without hash"):
        (damaged / f"{file}{'.sha256' * (how == 'without hash')}").unlink()
    assert newest_checkpoint(tmp_path) == older
    assert re.search(f"{damaged} is damaged .*{file}", capsys.readouterr().out)
    for step, keep in ((6, 2), (10, 1)):
        saved = save(tmp_path, step, keep)[0]
        assert newest_checkpoint(tmp_path) == saved
        assert {f.name for f in tmp_path.iterdir()} == {saved.name, *[older.name][: keep - 1]}
