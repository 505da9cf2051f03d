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
from launch import ROOT, SAVING, TINY, losses, places, run_train, start_train, wait_for

import train
from lora import apply_lora
from runtime.sharding import load_checkpoint, newest, newest_checkpoint, save_checkpoint


def kill_and_resume(whole, name: str, seed: int, processes: int = 1) -> None:
    """Kill -9 a run at a random moment, every process of it; then go on until it is finished."""
    tmp_path, _, seconds = whole
    process = start_train(tmp_path, name, *SAVING, processes=processes)
    options = tmp_path / name / "config.json"
    wait_for(options.exists, process)  # before that there is nothing to lose
    time.sleep(random.Random(seed).uniform(0, 0.8 * seconds))
    process.kill()
    run_train(tmp_path, name, *SAVING, "--resume=auto", processes=processes)
    expected = launch.uninterrupted(tmp_path, processes)
    launch.assert_same_results(tmp_path / name, expected)
    for file in ("sft/metrics.jsonl", "recpo/metrics.jsonl"):
        assert (tmp_path / name / file).read_text() == (expected / file).read_text()
    assert not [*(tmp_path / name).glob("*.unfinished"), *(tmp_path / name).glob("*/checkpoint-*")]


@pytest.mark.parametrize("seed", [1])
def test_kill_9_at_a_random_moment_changes_no_bit(whole, seed):
    """`--resume auto` ends with the adapters, losses and curves of the uninterrupted run."""
    kill_and_resume(whole, f"killed-{seed}", seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_kill_9_grid(whole, seed):
    """20 random moments, saving included, with one process and with two."""
    kill_and_resume(whole, f"grid-{seed}", 100 + seed, processes=1 + seed % 2)


@pytest.mark.parametrize("processes", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_saved_on_two_ranks_resumes_on_another_number(whole, processes):
    """A checkpoint of 2 sharded processes, of all weights in SFT, goes on in 1 and in 4 with the
    losses of an uninterrupted run (no dropout)."""
    tmp_path, name = whole[0], f"two-to-{processes}"
    flags = ("--save_steps=2", "--micro_batch_tokens=1500", "--eval_steps=3", "--keep=best")
    if not (tmp_path / "all-weights").exists():
        run_train(tmp_path, "all-weights", *flags)
    process = start_train(tmp_path, name, *flags, processes=2)
    wait_for(lambda: newest(tmp_path / name / "sft.unfinished"), process)
    process.kill()
    output, metrics = run_train(tmp_path, name, *flags, "--resume=auto", processes=processes)
    assert "going on from" in output
    _, expected = run_train(tmp_path, "all-weights", *flags, "--resume=auto")
    for stage in ("sft", "recpo"):
        np.testing.assert_allclose(losses(metrics, stage), losses(expected, stage), atol=1e-4)
    launch.assert_same_results(tmp_path / name, tmp_path / "all-weights", atol=1e-4)


# ------------------------------------------------------------------------ inside a preference stage
# train.py whose every process dies, by kill -9, as soon as a certain checkpoint is in place
DYING = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train

save_checkpoint = train.save_checkpoint

def save_and_die(folder, step, *facts):
    save_checkpoint(folder, step, *facts)
    if folder.name == "recpo.unfinished" and step == 4:
        os.kill(os.getpid(), signal.SIGKILL)

train.save_checkpoint = save_and_die
train.run_cli(train.main)
"""


@pytest.fixture(scope="module")
def killed(whole):
    """The uninterrupted run's SFT stage, then RecPO on 2 sharded ranks, killed after step 4."""
    tmp_path, folder, script = whole[0], whole[0] / "killed-in-recpo", whole[0] / "dying.py"
    shutil.copytree(tmp_path / "whole", folder)
    shutil.rmtree(folder / "recpo")
    for file in folder.glob("reference-*"):
        file.unlink()
    script.write_text(DYING)
    flags = (*SAVING, "--resume=auto")
    run_train(tmp_path, folder.name, *flags, processes=2, expect=1, script=script)
    assert newest(folder / "recpo.unfinished")[0].name == "checkpoint-4"
    return whole, folder


@pytest.mark.parametrize(
    ("reference", "processes", "budget"),
    [("deleted", 2, 1500), ("kept", 1, 700)]
    + [pytest.param("deleted", n, 500, marks=pytest.mark.slow) for n in (1, 4)]
    + [pytest.param("kept", n, 100_000, marks=pytest.mark.slow) for n in (2, 4)],
)
def test_a_kill_inside_a_preference_stage_changes_no_loss(killed, reference, processes, budget):
    """The reference recomputed from the starting weights or read, whatever the processes and
    micro-batches: the losses of the uninterrupted run."""
    (tmp_path, metrics, _), folder = killed
    name = f"{reference}-{processes}-{budget}"
    shutil.copytree(folder, tmp_path / name)
    (file,) = (tmp_path / name).glob("reference-*.safetensors")
    if reference == "deleted":
        file.unlink()
    with open(tmp_path / name / "recpo.unfinished" / "metrics.jsonl", "a") as log:
        log.write('{"phase": "recpo", "step": 5, "loss": 9.0}\n{"pha')  # logged after it: cut off
    flags = (*SAVING, "--resume=auto", f"--micro_batch_tokens={budget}")
    output, resumed = run_train(tmp_path, name, *flags, processes=processes)
    assert "checkpoint-4, after step 4" in output and file.exists()
    expected = losses(metrics, "recpo")
    np.testing.assert_allclose(losses(resumed, "recpo"), expected, rtol=0, atol=1e-4)
    launch.assert_same_results(tmp_path / name, tmp_path / "whole", atol=1e-4)


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
    assert best.keys() == kept.keys() and all(torch.equal(best[n], t) for n, t in kept.items())
    for (name, p), q in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert not p.requires_grad or optimizer.state[p].keys() == {"exp_avg", "exp_avg_sq", "step"}
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, fresh_optimizer.state[q][key]), (name, key)
    assert {f.suffix for f in folder.iterdir()} == {".json", ".safetensors", ".sha256"}
    subprocess.run("sha256sum --check *.sha256", shell=True, cwd=folder, check=True)


def test_the_newest_are_kept(group, tmp_path):
    """--save_total_limit stay; what is unfinished is nothing, and goes when another is saved."""
    save(tmp_path, 4)[0].rename(tmp_path / "checkpoint-4.part")
    assert newest_checkpoint(tmp_path) is None
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert {f.name for f in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-3"}
    assert newest_checkpoint(tmp_path).name == "checkpoint-10"


DAMAGE = [(file, how) for file in ("model.safetensors", "state.json") for how in ("flipped", "cut")]
DAMAGE += [(file, how) for file, _ in DAMAGE[::2] for how in ("gone", "without hash")]


@pytest.mark.parametrize(("file", "how"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(group, tmp_path, file, how, capsys):
    """With its file, and the one before is taken. It takes no place of a new one, whatever the
    limit: the run saves the same or another step and goes on from it."""
    older, damaged = save(tmp_path, 4)[0], save(tmp_path, 8)[0]
    content = bytearray((damaged / file).read_bytes())
    content[len(content) // 2] ^= 4 * (how == "flipped")
    (damaged / file).write_bytes(content[:-5] if how == "cut" else content)
    if how in ("gone", "without hash"):
        (damaged / f"{file}{'.sha256' * (how == 'without hash')}").unlink()
    assert newest_checkpoint(tmp_path) == older
    assert re.search(f"{damaged} is damaged .*{file}", capsys.readouterr().out)
    for step, keep in ((6, 2), (8, 1)):
        saved = save(tmp_path, step, keep)[0]
        assert newest_checkpoint(tmp_path) == saved
        assert {f.name for f in tmp_path.iterdir()} == {saved.name, *[older.name][: keep - 1]}


def test_a_checkpoint_of_other_data_is_refused(group, tmp_path):
    """Other data, or something that it was not made from, is an error that names it."""
    folder, *_ = save(tmp_path, 4)
    for what, now in (("data", "xyz"), ("reference", "123")):
        with pytest.raises(ValueError, match=f"checkpoint-4.*other {what}.*another --output_dir"):
            load_checkpoint(folder, *model_and_optimizer(0), {what: now})


def test_a_failed_save_leaves_the_earlier_ones(group, tmp_path, monkeypatch):
    """When the disk is full, the error names the folder, and earlier checkpoints stay."""
    older, *_ = save(tmp_path, 4)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hub.files.save_tensors", full)
    with pytest.raises(ValueError, match="checkpoint-8.part.*No space left.*untouched"):
        save(tmp_path, 8)
    assert newest_checkpoint(tmp_path) == older


def test_another_tokenizer_is_refused_without_a_reference_too(in_process, tmp_path, monkeypatch):
    """tokenizer.json gives its tokens other ids after step 2: SFT does not go on."""
    base = tmp_path / "base"
    shutil.copytree(ROOT / "demo" / "base", base)
    flags = (*TINY, *SAVING, f"--model={base}", *places(tmp_path, "run"))

    def save_and_stop(*facts):
        save_checkpoint(*facts)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        in_process(train.main, *flags)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids |= {token: n % (len(ids) - 1) + 1 for token, n in ids.items() if n}  # all but EOS
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="checkpoint-2: made from other token ids"):
        in_process(train.main, *flags, "--resume=auto")


# ------------------------------------------------------------------------ guards
def test_a_loss_that_is_not_finite_names_step_and_rank(tmp_path):
    """Both ranks stop with one message."""
    flags = ("--sft_learning_rate=1e30", "--max_grad_norm=0", "--save_steps=1", "--sft_epochs=4")
    output, _ = run_train(tmp_path, "stops", *flags, processes=2, expect=1)
    message = r"error \(rank [01]\): sft, step \d+: the (loss of ranks \[[01, ]+\]|gradient alone) "
    assert re.search(message + "is not finite", output), output[-3000:]
    assert "Traceback (most recent" not in output.split("error (rank")[0]


def workers_of(agent: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text()
    return sorted(map(int, children.split()))


def test_a_rank_that_dies_ends_the_others(whole):
    """One of two workers is killed: torchrun ends the other and itself, names rank and signal."""
    tmp_path = whole[0]
    agent = launch.start_torchrun(
        tmp_path, "one-dies", "--nproc_per_node=2", flags=["--sft_epochs=500"]
    )
    folder = tmp_path / "one-dies" / "sft.unfinished"
    wait_for(lambda: newest(folder), agent)
    workers = workers_of(agent)
    os.kill(workers[1], signal.SIGKILL)
    assert agent.wait(60) != 0
    assert re.search(r"exitcode\s*: -9", (tmp_path / "one-dies.log").read_text())
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert newest_checkpoint(folder) == newest(folder)[0]


def test_torchrun_restarts_go_on_by_themselves(whole):
    """A worker is killed; with --max-restarts it starts again and goes on to the same bits."""
    tmp_path, name = whole[0], "restarted"
    agent = launch.start_torchrun(tmp_path, name, "--nproc_per_node=1", "--max-restarts=1")
    folder, log = tmp_path / name / "sft.unfinished", tmp_path / f"{name}.log"
    wait_for(lambda: len(newest(folder)) > 1, agent)
    for worker in workers_of(agent):
        os.kill(worker, signal.SIGKILL)
    assert agent.wait(200) == 0, log.read_text()[-3000:]
    assert "going on from" in log.read_text()
    launch.assert_same_results(tmp_path / name, tmp_path / "whole")
