"""Checkpoints: whole or not there, bitwise resuming after any death, other numbers of processes, and the run folder's guards."""

import fcntl
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from test_train import TINY, losses, run_train

import train
from eval import main as evaluate_run
from lora import apply_lora
from model import load_pretrained
from runtime.checkpoint import (
    checkpoints,
    damage,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from studies.probes import main as probe_run

ROOT = Path(__file__).parents[1]
# an adapter and dropout in SFT, so that random state matters; without --sft_lora_r it trains all weights, without dropout
SAVING = ("--save_steps=2", "--sft_lora_r=4", "--lora_dropout=0.1", "--micro_batch_tokens=1500")


def results_of(folder: Path) -> dict[str, torch.Tensor]:
    """What both stages have trained: adapters, or all weights."""
    files = [
        folder / "sft" / "model.safetensors",
        *(folder / s / "adapter_model.safetensors" for s in ("sft", "recpo")),
    ]
    return {f"{f.parent.name}/{n}": t for f in files if f.exists() for n, t in load_file(f).items()}


def assert_same_results(a: Path, b: Path, atol: float = 0.0) -> None:
    first, second = results_of(a), results_of(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor - second[name]).abs().max().item() <= atol, name


def start_train(tmp_path, name, *flags, processes=1) -> subprocess.Popen:
    """A run in a process group of its own, which can be killed as a whole."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ]
    command = [*(launcher if processes > 1 else [sys.executable]), str(ROOT / "train.py"), *TINY]
    command += [
        f"--output_dir={tmp_path / name}",
        f"--prepared_dir={tmp_path / 'prepared'}",
        *flags,
    ]
    log = open(tmp_path / f"{name}.log", "a")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=log, stderr=log, cwd=tmp_path, env=env, start_new_session=True
    )


def kill_all(process: subprocess.Popen, folder: Path) -> None:
    """kill -9 for every process of the run in this folder: torchrun puts its workers into sessions of their own."""
    for status in Path("/proc").glob("[0-9]*"):
        try:
            if f"--output_dir={folder}".encode() in (status / "cmdline").read_bytes().split(b"\0"):
                os.kill(int(status.name), signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue
    process.wait()


def wait_for(condition, process, seconds=120) -> None:
    """Until the condition holds or the process has ended."""
    end = time.time() + seconds
    while time.time() < end and process.poll() is None and not condition():
        time.sleep(0.02)


def lines(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted, in one process, and the seconds it took."""
    tmp_path = tmp_path_factory.mktemp("runs")
    started = time.time()
    _, metrics = run_train(tmp_path, "whole", *SAVING)
    return tmp_path, metrics, time.time() - started


def uninterrupted(tmp_path: Path, processes: int) -> Path:
    """The run to compare with: sums over ranks round differently, so one of as many processes."""
    if processes == 1:
        return tmp_path / "whole"
    reference = tmp_path / f"whole-{processes}"
    if not reference.exists():
        run_train(tmp_path, reference.name, *SAVING, processes=processes)
    return reference


def kill_and_resume(whole, name: str, seed: int, processes: int = 1) -> None:
    """Kill -9 a run at a random moment, of every process or of a worker alone; then go on until it is finished."""
    tmp_path, metrics, seconds = whole
    rng = random.Random(seed)
    shutil.rmtree(tmp_path / name, ignore_errors=True)
    process = start_train(tmp_path, name, *SAVING, processes=processes)
    base = tmp_path / name / "base" / "config.json"
    wait_for(base.exists, process)  # before that there is nothing to lose
    time.sleep(rng.uniform(0, 0.8 * seconds))
    kill_all(process, tmp_path / name)
    _, resumed = run_train(tmp_path, name, *SAVING, "--resume=auto", processes=processes)
    assert_same_results(tmp_path / name, uninterrupted(tmp_path, processes))
    for stage in ("sft", "recpo"):
        assert [m["step"] for m in resumed[stage]] == [m["step"] for m in metrics[stage]]
    assert not list((tmp_path / name).glob("*.unfinished"))


@pytest.mark.parametrize("seed", [1])
def test_kill_9_at_a_random_moment_changes_no_bit(whole, seed):
    """After kill -9 `--resume auto` goes on, and the final adapters are bitwise those of the uninterrupted run."""
    kill_and_resume(whole, f"killed-{seed}", seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_kill_9_grid(whole, seed):
    """20 random moments, saving included, with one process and with two."""
    kill_and_resume(whole, f"grid-{seed}", 100 + seed, processes=1 + seed % 2)


@pytest.mark.parametrize(
    "stage, processes",
    [
        pytest.param("sft", 1, marks=pytest.mark.slow),
        ("recpo", 1),
        pytest.param("sft", 2, marks=pytest.mark.slow),
    ],
)
def test_sigterm_loses_no_step(whole, stage, processes):
    """SIGTERM saves at the next step and exits with 0; resuming gives the same bits, the deleted reference cache too."""
    tmp_path, metrics, _ = whole
    name = f"stopped-{stage}-{processes}"
    flags = (*SAVING[1:], "--save_steps=0")  # the signal alone saves
    process = start_train(tmp_path, name, *flags, processes=processes)
    file = tmp_path / name / f"{stage}.unfinished" / "metrics.jsonl"
    wait_for(lambda: lines(file) >= (4 if stage == "sft" else 1), process)
    process.send_signal(signal.SIGTERM)
    code = process.wait(60)
    log = (tmp_path / f"{name}.log").read_text()
    if (tmp_path / name / "recpo").exists():
        pytest.skip("the run was over before the signal came")
    if processes == 1:  # torchrun hands the signal on, and then reports it as its own failure
        assert code == 0 and "Traceback" not in log
    assert "stopped by SIGTERM after step" in log
    (saved,) = checkpoints(file.parent)
    steps = [json.loads(line) for line in file.read_text().splitlines()]
    assert steps[-1]["step"] == json.loads((saved / "state.json").read_text())["step"]
    for cache in (tmp_path / name).glob("reference-*"):
        cache.unlink()
    output, resumed = run_train(tmp_path, name, *flags, "--resume=auto", processes=processes)
    assert f"going on from {saved}" in output
    assert_same_results(tmp_path / name, uninterrupted(tmp_path, processes))
    assert [m["step"] for m in resumed[stage]] == [m["step"] for m in metrics[stage]]
    if processes == 1:
        np.testing.assert_array_equal(losses(resumed, stage), losses(metrics, stage))


@pytest.mark.parametrize("processes", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_saved_on_two_ranks_resumes_on_another_number(whole, processes):
    """A checkpoint of 2 sharded processes goes on in 1 and in 4 with the losses of an uninterrupted run (no dropout)."""
    tmp_path, name = whole[0], f"two-to-{processes}"
    flags = ("--save_steps=2", "--micro_batch_tokens=1500")  # SFT trains all weights
    if not (tmp_path / "all-weights").exists():
        run_train(tmp_path, "all-weights", *flags)
    process = start_train(tmp_path, name, *flags, processes=2)
    folder = tmp_path / name / "sft.unfinished"
    wait_for(
        lambda: len(checkpoints(folder)) > 0 and checkpoints(folder)[0].name != "checkpoint-0",
        process,
    )
    kill_all(process, tmp_path / name)
    output, metrics = run_train(tmp_path, name, *flags, "--resume=auto", processes=processes)
    assert "made by 2 processes" in output
    _, expected = run_train(tmp_path, "all-weights", *flags, "--resume=auto")
    for stage in ("sft", "recpo"):
        np.testing.assert_allclose(losses(metrics, stage), losses(expected, stage), atol=1e-4)
    assert_same_results(tmp_path / name, tmp_path / "all-weights", atol=1e-4)


# ------------------------------------------------------------------------------------------------ inside a preference stage
# train.py whose every process dies, by kill -9, as soon as a certain checkpoint is in place
DYING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train

save_checkpoint = train.save_checkpoint

def save_and_die(folder, step, *args):
    save_checkpoint(folder, step, *args)
    if folder.name == "recpo.unfinished" and step == 4:
        os.kill(os.getpid(), signal.SIGKILL)

train.save_checkpoint = save_and_die
train.run_cli(train.main)
"""


@pytest.fixture(scope="module")
def killed(whole):
    """The uninterrupted run's SFT stage, then RecPO on 2 sharded ranks, killed when 4 of its 6 steps are saved."""
    tmp_path, folder = whole[0], whole[0] / "killed-in-recpo"
    shutil.copytree(tmp_path / "whole", folder)
    shutil.rmtree(folder / "recpo")
    for file in folder.glob("reference-*"):
        file.unlink()

    script = tmp_path / "dying.py"
    script.write_text(DYING.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(script), *TINY, *SAVING, "--resume=auto"]
    command += [f"--output_dir={folder}", f"--prepared_dir={tmp_path / 'prepared'}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)

    assert done.returncode != 0
    assert [f.name for f in checkpoints(folder / "recpo.unfinished")][0] == "checkpoint-4"
    return whole, folder


def go_on(killed, reference: str, processes: int, budget: int) -> None:
    """Resume a copy of the killed run, its reference file kept or deleted; compare with the uninterrupted run."""
    (tmp_path, metrics, _), folder = killed
    name = f"{reference}-{processes}-{budget}"
    shutil.copytree(folder, tmp_path / name)
    (cache,) = (tmp_path / name).glob("reference-*")
    if reference == "deleted":
        cache.unlink()

    flags = (*SAVING, "--resume=auto", f"--micro_batch_tokens={budget}")
    output, resumed = run_train(tmp_path, name, *flags, processes=processes)

    assert "checkpoint-4, after step 4" in output
    assert cache.exists()
    expected = losses(metrics, "recpo")
    np.testing.assert_allclose(losses(resumed, "recpo"), expected, rtol=0, atol=1e-4)
    assert_same_results(tmp_path / name, tmp_path / "whole", atol=1e-4)


@pytest.mark.parametrize(
    ("reference", "processes", "budget"), [("deleted", 2, 1500), ("kept", 1, 700)]
)
def test_a_kill_inside_a_preference_stage_changes_no_loss(killed, reference, processes, budget):
    """Recomputed from the starting weights or read, however divided: the losses of the uninterrupted run."""
    go_on(killed, reference, processes, budget)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [500, 1500, 100_000])
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("reference", ["deleted", "kept"])
def test_a_kill_inside_a_preference_stage_grid(killed, reference, processes, budget):
    """The same for every number of processes, and micro-batches of one prompt up to a whole step."""
    go_on(killed, reference, processes, budget)


# ------------------------------------------------------------------------------------------------ one checkpoint
@pytest.fixture
def group():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model_and_optimizer(steps: int = 1):
    model = apply_lora(tiny_model(), r=4, lora_alpha=8)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True
    )
    for _ in range(steps):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return model, optimizer


def save(folder: Path, step: int, keep: int = 2, **facts):
    model, optimizer = model_and_optimizer()
    state = {"stage": "sft", "data": "abc", "optimizer_steps": 1} | facts
    return (
        save_checkpoint(folder, step, model, optimizer, state, replicas=1, keep=keep),
        model,
        optimizer,
    )


def test_a_checkpoint_gives_back_every_bit(group, tmp_path):
    """Adapter, both moments, step count and random state come back as they were; no file is a pickle."""
    folder, model, optimizer = save(tmp_path, 7)
    expected_random = torch.rand(3)
    fresh, fresh_optimizer = model_and_optimizer(steps=0)
    state = load_checkpoint(folder, fresh, fresh_optimizer, {"data": "abc"})
    assert state["step"] == 7 and torch.equal(torch.rand(3), expected_random)
    pairs = zip(model.named_parameters(), fresh.named_parameters(), strict=True)
    for (name, p), (_, q) in pairs:
        assert torch.equal(p, q), name
        if p.requires_grad:
            for key, value in optimizer.state[p].items():
                assert torch.equal(value, fresh_optimizer.state[q][key]), (name, key)
    assert {f.suffix for f in folder.iterdir()} == {".json", ".safetensors"}


def test_only_the_newest_are_kept(group, tmp_path):
    """--save_total_limit older checkpoints stay, the rest go after the new one is in place."""
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert [f.name for f in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-3"]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "extra"])
def test_damaged_files_are_found_and_passed_over(group, tmp_path, file, how, capsys):
    """A flipped bit, a cut tail, a missing or an unknown file: named, and the checkpoint before is taken."""
    older, newest = save(tmp_path, 4)[0], save(tmp_path, 8)[0]
    target = newest / file
    content = bytearray(target.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 4
        target.write_bytes(content)
    elif how == "cut":
        target.write_bytes(content[:-5])
    elif how == "gone":
        target.unlink()
    else:
        (newest / "more.safetensors").write_bytes(content)
    assert damage(newest)
    assert newest_checkpoint(tmp_path) == older
    assert str(newest) in capsys.readouterr().out


def test_half_written_checkpoints_do_not_count(group, tmp_path):
    """A folder still named .part is nothing; without any whole checkpoint there is none."""
    save(tmp_path, 4)[0].rename(tmp_path / "checkpoint-4.part")
    assert newest_checkpoint(tmp_path) is None


def test_a_checkpoint_of_other_data_is_refused(group, tmp_path):
    """Other data, or another stage, is an error that names the checkpoint and what differs."""
    folder, *_ = save(tmp_path, 4)
    for key, value in (("data", "xyz"), ("stage", "recpo"), ("reference", "123")):
        with pytest.raises(ValueError, match=f"checkpoint-4.*another {key}"):
            load_checkpoint(folder, *model_and_optimizer(0), {key: value})


def test_a_failed_save_leaves_the_earlier_ones(group, tmp_path, monkeypatch):
    """When the disk is full, the error names the file, and earlier checkpoints are as they were."""
    older, *_ = save(tmp_path, 4)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runtime.checkpoint.save_file", full)
    with pytest.raises(ValueError, match="checkpoint-8.part/rank-00000.*No space left.*untouched"):
        save(tmp_path, 8)
    assert newest_checkpoint(tmp_path) == older


# ------------------------------------------------------------------------------------------------ guards
def test_a_loss_that_is_not_finite_names_step_rank_and_examples(tmp_path):
    """Both ranks stop with one message; --max_skipped_steps leaves so many steps out first, and says so."""
    flags = (
        "--sft_learning_rate=1e30",
        "--max_grad_norm=0",
        "--save_steps=1",
        "--sft_epochs=4",
    )
    output, _ = run_train(tmp_path, "stops", *flags, processes=2, expect=1)
    message = r"error \(rank [01]\): sft, step \d+, (rank [01, ]+|the gradient only), examples \d+ \(user .*not finite.*checkpoint-1"
    assert re.search(message, output), output[-3000:]
    assert "Traceback (most recent" not in output.split("error (rank")[0]
    output, _ = run_train(tmp_path, "skips", *flags, "--max_skipped_steps=2", expect=1)
    assert output.count("note: sft, step") == 2 and output.count("error: sft, step") == 1


DISK = """
mount -t tmpfs -o size={size}k none {disk} || exit 99
{train}
code=$?
test -n "{then}" && mount -o remount,{then} {disk} && {train} --resume=auto && cp -r {disk}/run {disk}-after
exit $code
"""


def needs_mount(tmp_path) -> None:
    probe = ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs none {tmp_path}"]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("a disk of its own needs unshare and a user namespace")


def test_a_full_disk_is_one_message_and_loses_nothing(whole, tmp_path):
    """A disk with room for two checkpoints fills up; with more room --resume auto goes on to the same bits."""
    needs_mount(tmp_path)
    runs, disk = whole[0], tmp_path / "disk"
    adapter = (runs / "whole" / "sft" / "adapter_model.safetensors").stat().st_size
    disk.mkdir()
    flags = [*TINY, *SAVING, f"--output_dir={disk}/run", f"--prepared_dir={runs / 'prepared'}"]
    script = DISK.format(
        size=int(3 * adapter * 2.5) // 1024,  # two checkpoints with their moments, not three
        disk=disk,
        train=f"OMP_NUM_THREADS=1 {sys.executable} {ROOT / 'train.py'} {' '.join(flags)}",
        then="size=100m",
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-3000:]
    message = done.stderr.strip().splitlines()[0]
    assert re.match(
        r"error: .*disk/run/sft.unfinished\S* cannot be written .*No space left.*untouched", message
    ), message
    assert "Traceback" not in done.stderr and "going on from" in done.stdout
    for stage in ("sft", "recpo"):
        ours, theirs = (
            load_file(f / stage / "adapter_model.safetensors")
            for f in (tmp_path / "disk-after", runs / "whole")
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_folder_that_vanishes_is_one_message(whole):
    """Somebody removes the run folder while it trains: the next write says so and names it."""
    tmp_path = whole[0]
    process = start_train(tmp_path, "vanishing", *SAVING, "--sft_epochs=500")
    folder = tmp_path / "vanishing"
    wait_for(lambda: len(checkpoints(folder / "sft.unfinished")) > 0, process)
    folder.rename(tmp_path / "elsewhere")
    assert process.wait(60) == 2
    log = (tmp_path / "vanishing.log").read_text()
    assert re.search(
        r"error: .*vanishing/sft.unfinished\S* cannot be written .*No such file", log
    ), log[-2000:]
    assert "Traceback" not in log
    assert not damage_alone(checkpoints(tmp_path / "elsewhere" / "sft.unfinished")[0])


def damage_alone(checkpoint: Path) -> str:
    """`damage` outside a run."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return damage(checkpoint)
    finally:
        dist.destroy_process_group()


def test_a_rank_that_dies_ends_the_others(whole):
    """One of two workers is killed: the launcher ends the other one and itself, and names the rank and the signal."""
    tmp_path = whole[0]
    process = start_train(tmp_path, "one-dies", *SAVING, "--sft_epochs=500", processes=2)
    folder = tmp_path / "one-dies" / "sft.unfinished"
    wait_for(lambda: len(checkpoints(folder)) > 0, process)
    workers = sorted(
        map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    )
    os.kill(workers[1], signal.SIGKILL)
    assert process.wait(60) != 0
    log = (tmp_path / "one-dies.log").read_text()
    assert re.search(r"exitcode\s*: -9", log) and not any(
        Path(f"/proc/{worker}").exists() for worker in workers
    )
    assert not damage_alone(checkpoints(folder)[0])


def test_torchrun_restarts_go_on_by_themselves(whole):
    """A worker is killed; with --max-restarts torchrun starts it again, which goes on, and the bits are the same."""
    tmp_path, name = whole[0], "restarted"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=1",
        "--max-restarts=1",
    ]
    command = [*launcher, str(ROOT / "train.py"), *TINY, *SAVING, f"--output_dir={tmp_path / name}"]
    log = open(tmp_path / f"{name}.log", "w")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command.append(f"--prepared_dir={tmp_path / 'prepared'}")
    agent = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=env)
    folder = tmp_path / name / "sft.unfinished"
    wait_for(lambda: len(checkpoints(folder)) > 1, agent)
    for worker in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        os.kill(int(worker), signal.SIGKILL)
    assert agent.wait(200) == 0, (tmp_path / f"{name}.log").read_text()[-3000:]
    assert "going on from" in (tmp_path / f"{name}.log").read_text()
    assert_same_results(tmp_path / name, tmp_path / "whole")


def test_two_runs_in_one_folder_are_refused(whole):
    """A second process is told so at once; when the first has been killed, the folder is free."""
    tmp_path = whole[0]
    long = (*SAVING, "--sft_epochs=500")
    first = start_train(tmp_path, "locked", *long)
    wait_for((tmp_path / "locked" / "base").exists, first)
    output, _ = run_train(tmp_path, "locked", *long, "--resume=auto", expect=1)
    assert "another process is running in this folder" in output and "Traceback" not in output
    kill_all(first, tmp_path / "locked")
    with open(tmp_path / "locked" / "lock") as lock:
        fcntl.flock(
            lock, fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # BlockingIOError if a dead process still held it


@pytest.mark.slow
def test_a_named_checkpoint_that_is_damaged_or_elsewhere_is_refused(whole, tmp_path):
    """--resume PATH never falls back: another stage's folder, or a damaged file, is one clear message."""
    runs, name = whole[0], "named"
    process = start_train(runs, name, *SAVING)
    folder = runs / name / "recpo.unfinished"
    wait_for(lambda: bool(checkpoints(folder)), process)
    kill_all(process, runs / name)
    if not checkpoints(folder):
        pytest.skip("the run was over before it could be killed")
    target = checkpoints(folder)[0]
    output, _ = run_train(runs, name, *SAVING, f"--resume={tmp_path}", expect=1)
    assert "not a checkpoint of the stage that comes next" in output
    state = (target / "state.json").read_bytes()
    (target / "state.json").write_bytes(state[:-3])
    output, _ = run_train(runs, name, *SAVING, f"--resume={target}", expect=1)
    assert "damaged (state.json" in output and "Traceback" not in output
    (target / "state.json").write_bytes(state)
    run_train(runs, name, *SAVING, f"--resume={target}")
    assert_same_results(runs / name, runs / "whole")


# ---------------------------------------------------------------------- several stages of one run
@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """call(main, *flags): a script's main() in this process, in a process group that is its own."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)

    def call(main, *flags) -> None:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
        try:
            main()
        finally:
            dist.destroy_process_group()

    yield call
    signal.signal(signal.SIGTERM, handler)


def write_log(file: Path, users: int) -> Path:
    """A log of one's own in which every user saw 12 of 40 films."""
    rows = ["user_id,item_id,rating,timestamp,title"]
    for user in range(users):
        for n in range(12):
            item = (7 * user + 3 * n) % 40
            rows.append(f"{user},{item},{1 + (user + n) % 5},{1_500_000_000 + n},Film {item}")
    file.write_text("\n".join(rows) + "\n")
    return file


def test_a_run_over_data_that_grew_is_refused(in_process, tmp_path):
    """Finished stages hold for their data: train.py and eval.py name both hashes, write nothing."""
    log = write_log(tmp_path / "log.csv", 40)
    flags = (*TINY, "--dataset=csv", f"--data_dir={log}", "--max_steps=1", "--core=2")
    flags = (*flags, f"--output_dir={tmp_path / 'run'}", f"--prepared_dir={tmp_path / 'prepared'}")
    in_process(train.main, *flags, "--stages=sft")
    evaluation = (f"--run={tmp_path / 'run'}", f"--prepared_dir={tmp_path / 'prepared'}")
    in_process(evaluate_run, *evaluation)
    before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    before.pop(tmp_path / "run" / "config.json")  # the stages that were asked for

    write_log(log, 50)
    message = (
        r"sft was finished on data [0-9a-f]{12}, now it is [0-9a-f]{12}: .*another --output_dir"
    )
    with pytest.raises(ValueError, match=message):
        in_process(train.main, *flags, "--stages=sft,recpo", "--resume=auto")
    with pytest.raises(ValueError, match=r"sft was finished on data \w+, now it is .*by --model"):
        in_process(evaluate_run, *evaluation)
    assert all(f.read_bytes() == content for f, content in before.items())
    assert not (tmp_path / "run" / "recpo.unfinished").exists()


def test_a_finished_stage_of_other_weights_is_refused(whole, in_process):
    """A base or adapter that changed under a finished stage: both hashes, and what to do."""
    tmp_path = whole[0]
    folder = tmp_path / "other-weights"
    shutil.copytree(tmp_path / "whole", folder)
    file = folder / "sft" / "adapter_model.safetensors"
    tensors = {name: tensor + 1e-3 for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    flags = (*TINY, *SAVING, f"--output_dir={folder}", f"--prepared_dir={tmp_path / 'prepared'}")
    with pytest.raises(ValueError, match=r"recpo was finished from weights \w+, now they are \w+"):
        in_process(train.main, *flags, "--resume=auto")


def test_models_and_optimizers_go_with_their_stage(whole, in_process, monkeypatch):
    """When the next model is loaded none before it lives, in training, evaluation and probes."""
    tmp_path = whole[0]
    folder = tmp_path / "stage-after-stage"
    shutil.copytree(tmp_path / "whole", folder)
    shutil.rmtree(folder / "recpo")
    made = []

    def watched(make):
        def wrapper(*args, **kwargs):
            assert all(reference() is None for reference in made)
            result = make(*args, **kwargs)
            made.append(weakref.ref(result[0] if isinstance(result, tuple) else result))
            return result

        return wrapper

    AdamW = torch.optim.AdamW

    def watched_optimizer(*args, **kwargs):
        optimizer = AdamW(*args, **kwargs)
        optimizers.append(weakref.ref(optimizer))
        return optimizer

    optimizers = []
    monkeypatch.setattr("train.load_policy", watched(train.load_policy))
    monkeypatch.setattr("eval.load_pretrained", watched(load_pretrained))
    monkeypatch.setattr("torch.optim.AdamW", watched_optimizer)
    gc.disable()  # it might come by at the right moment by chance
    try:
        prepared = f"--prepared_dir={tmp_path / 'prepared'}"
        flags = (*TINY, *SAVING, f"--output_dir={folder}", prepared, "--resume=auto")
        in_process(train.main, *flags, "--stages=sft,recpo,sdpo")
        assert len(made) == 2 and all(reference() is None for reference in made + optimizers)
        in_process(evaluate_run, f"--run={folder}", prepared)
        assert len(made) == 5 and made[-1]() is None
        in_process(probe_run, f"--run={folder}", prepared, "--probe=length")
        assert len(made) == 8 and made[-1]() is None
    finally:
        gc.enable()
