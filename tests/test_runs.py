"""A run's log and folder, its end by a signal or a full disk, what its stages start from."""

import gc
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import weakref

import launch
import numpy as np
import pytest
from launch import SAVING, TINY, TRAIN, assert_same_results, lines, losses, places, run_train
from safetensors.torch import load_file, save_file

import train
from common import Stopped
from demo.pretrain import BASE
from eval import main as evaluate_run
from runtime.policy import load_policy
from runtime.processes import open_run_folder, prefetch
from runtime.sharding import newest


def test_prefetch_keeps_the_order_and_runs_one_ahead():
    """While one item is used the next is being made, without being asked for, and no more."""
    started, seen, second = [], [], threading.Event()

    def make(item):
        started.append(item)
        if item == 1:
            second.set()
        return item

    for value in prefetch(make, range(4)):
        assert value or second.wait(10)
        assert max(started) <= value + 1
        seen.append(value)
    assert seen == [0, 1, 2, 3]


def test_finished_stages_are_not_run_again(one_process):
    """--resume auto skips them, starts an unfinished one anew, and adds stages to a run."""
    tmp_path, _, before = one_process
    (tmp_path / "one" / "sdpo.unfinished").mkdir()
    flags = ("--micro_batch_tokens=500", "--stages=sft,recpo,sdpo", "--resume=auto")
    output, after = run_train(tmp_path, "one", *flags)
    assert "sft: finished before" in output and "recpo: finished before" in output
    assert after["sft"] == before["sft"] and len(after["sdpo"]) == len(before["recpo"])


def test_a_run_folder_in_use_is_not_overwritten(one_process):
    """Without --resume a used folder is an error, with other options too; nothing in it changes."""
    tmp_path = one_process[0]
    before = {f: f.read_bytes() for f in (tmp_path / "one").rglob("*.json*")}
    for flags, message in (
        ((), "already holds a run: resume it by --resume auto"),
        (("--resume=auto", "--beta=0.5", "--seed=3"), "with other beta, seed: "),
        (("--resume=auto", "--stages=raw,sdpo"), "has an sft: add sft to --stages"),
    ):
        output, _ = run_train(tmp_path, "one", *flags, expect=1)
        assert message in output and "another --output_dir" in output and "Traceback" not in output
    assert before == {f: f.read_bytes() for f in (tmp_path / "one").rglob("*.json*")}


@pytest.mark.parametrize("before", ["nothing", "folder", "run"])
def test_a_start_that_fails_leaves_no_folder(group, tmp_path, before):
    """What it made goes again, unless something was saved; what was there before stays."""
    folder = tmp_path / "run"
    if before == "folder":
        folder.mkdir()
    config = train.TrainConfig(output_dir=str(folder))
    with pytest.raises(KeyboardInterrupt), open_run_folder(config):
        (folder / "sft.unfinished").mkdir()
        (folder / "sft.unfinished" / "metrics.jsonl").write_text("a step" * (before == "run"))
        raise KeyboardInterrupt
    assert folder.exists() == (before != "nothing")


def test_a_full_disk_is_one_message_and_loses_nothing(whole, tmp_path):
    """A disk with room for two checkpoints and the best step fills up; with more room
    --resume auto goes on to the same bits."""
    probe = ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs none {tmp_path}"]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("a disk of its own needs unshare and a user namespace")
    runs, disk = whole[0], tmp_path / "disk"
    adapter = (runs / "whole" / "sft" / "adapter_model.safetensors").stat().st_size
    disk.mkdir()
    flags = [*TINY, *SAVING, f"--output_dir={disk}/run", f"--prepared_dir={runs / 'prepared'}"]
    train_it = f"OMP_NUM_THREADS=1 {sys.executable} {TRAIN} {' '.join(flags)}"
    size = int(adapter * (4 * 2.5 + 1)) // 1024  # two checkpoints, moments, best weights; not three
    script = f"mount -t tmpfs -o size={size}k none {disk} || exit 99; {train_it}; code=$?; "
    script += f"mount -o remount,size=100m {disk} && {train_it} --resume=auto && "
    script += f"cp -r {disk}/run {disk}-after; exit $code"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-3000:]
    message = r"error: .*disk/run/sft.unfinished\S* cannot be written .*No space left.*untouched"
    assert re.match(message, done.stderr.strip().splitlines()[0]), done.stderr
    assert "Traceback" not in done.stderr and "resuming from" in done.stdout
    assert_same_results(tmp_path / "disk-after", runs / "whole")


@pytest.mark.parametrize(
    "number, stage, processes",
    [
        pytest.param(signal.SIGTERM, "sft", 1, marks=pytest.mark.slow),
        (signal.SIGTERM, "recpo", 1),
        (signal.SIGINT, "sft", 1),
        pytest.param(signal.SIGTERM, "sft", 2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_loses_no_step(whole, number, stage, processes):
    """It saves at the next step and exits with 0, or 130 for Ctrl-C; the last line goes on
    with the same bits, the deleted reference cache too."""
    tmp_path, metrics, _ = whole
    name = f"{number.name}-{stage}-{processes}"
    flags = (*SAVING[1:], "--save_steps=0")  # the signal alone saves
    process = launch.start_train(tmp_path, name, *flags, processes=processes)
    file = tmp_path / name / f"{stage}.unfinished" / "metrics.jsonl"
    launch.wait_for(lambda: lines(file) >= (4 if stage == "sft" else 1), process)
    process.send_signal(number)
    code = process.wait(60)
    log = (tmp_path / f"{name}.log").read_text()
    if (tmp_path / name / "recpo").exists():
        pytest.skip("the run was over before the signal came")
    assert code == (130 if number == signal.SIGINT else 0) and "Traceback" not in log
    step = int(re.search(r"stopped after step (\d+), which is saved", log)[1])
    assert shlex.split(log.splitlines()[-1])[-2:] == ["--resume", "auto"]
    (saved,) = newest(file.parent)
    assert step == json.loads((saved / "state.json").read_text())["step"]
    assert step == json.loads(file.read_text().splitlines()[-1])["step"]
    for cache in (tmp_path / name).glob("reference-*"):
        cache.unlink()
    output, resumed = run_train(tmp_path, name, *flags, "--resume=auto", processes=processes)
    assert f"resuming from {saved}" in output
    assert_same_results(tmp_path / name, launch.uninterrupted(tmp_path, processes))
    assert [m["step"] for m in resumed[stage]] == [m["step"] for m in metrics[stage]]
    if processes == 1:
        np.testing.assert_array_equal(losses(resumed, stage), losses(metrics, stage))


def test_a_signal_before_the_first_step_leaves_no_folder(in_process, tmp_path, monkeypatch):
    """Ctrl-C while the data is read: nothing is saved, and the command says how to resume."""
    monkeypatch.setattr(train, "prepare", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Stopped, match="there is nothing to save") as stop:
        in_process(train.main, "--beta=2", f"--output_dir={tmp_path / 'a run'}")
    command = f"python script --beta=2 '--output_dir={tmp_path}/a run' --resume auto"
    assert stop.value.args[0].splitlines()[-1] == command and stop.value.args[1] == 130
    assert not (tmp_path / "a run").exists()


def test_torchrun_hands_ctrl_c_on(whole):
    """Its workers save, and say how to go on under torchrun; it exits with 1."""
    tmp_path, options = whole[0], ("--standalone", "--nproc_per_node=2")
    agent = launch.start_torchrun(tmp_path, "ctrl-c", *options, flags=["--sft_epochs=99"])
    folder = tmp_path / "ctrl-c" / "sft.unfinished"
    launch.wait_for(lambda: lines(folder / "metrics.jsonl") > 1, agent)
    agent.send_signal(signal.SIGINT)
    assert agent.wait(60) == 1 and newest(folder)
    log = (tmp_path / "ctrl-c.log").read_text()
    (command,) = re.findall(r"which is saved\. To resume:\n(.*)", log)
    assert command.startswith("python -m torch.distributed.run --standalone --nproc_per_node=2 ")
    assert command.endswith(" --resume auto")


@pytest.mark.parametrize(
    ("flag", "message"), [("--beta=x", "invalid float value"), ("--data_dir=no", "no such path")]
)
def test_torchrun_ends_with_the_error_of_one_rank(tmp_path, flag, message):
    """Found by both ranks, or by rank 0 while the other waits: said once, at the very end."""
    options, flags = ("--standalone", "--nproc_per_node=2"), ("--dataset=csv", f"--model={BASE}")
    agent = launch.start_torchrun(tmp_path, "run", *options, flags=(*flags, flag))
    assert agent.wait(200) == 1
    printed = (tmp_path / "run.log").read_text()
    assert printed.count(message) == 1
    assert message in printed.rstrip().splitlines()[-2]  # before the last border
    assert printed.count("Traceback (most recent call last)") == 1  # torchrun's own
    assert not (tmp_path / "run").exists()


def test_finished_stages_hold_for_their_data_and_weights(whole, in_process, tmp_path):
    """Other data, or an adapter that changed under a later stage: train.py and eval.py name both
    hashes and write nothing."""
    folder = shutil.copytree(whole[0] / "whole", tmp_path / "run")
    prepared, found = f"--prepared_dir={whole[0] / 'prepared'}", "now it is [0-9a-f]{12}: .*"
    flags = (*TINY, *SAVING, f"--output_dir={folder}", prepared, "--resume=auto")
    file = folder / "sft" / "adapter_model.safetensors"
    save_file({name: tensor + 1e-3 for name, tensor in load_file(file).items()}, file)
    key = json.loads((folder / "recpo" / "base.json").read_text())["starting_weights"][:12]
    with pytest.raises(ValueError, match=f"recpo was finished on weights {key}, {found}another"):
        in_process(train.main, *flags)
    measured = folder / "sft" / "eval" / "metrics.json"
    measured.write_text(measured.read_text().replace('"data_hash": "', '"data_hash": "before-'))
    before = {f: f.read_bytes() for f in folder.glob("*/**/*") if f.is_file()}
    message = f"sft was finished on data before-[0-9a-f]{{5}}, {found}"
    with pytest.raises(ValueError, match=message + "another --output_dir"):
        in_process(train.main, *flags, "--stages=sft,recpo,sdpo")
    with pytest.raises(ValueError, match=message + "give --model"):
        in_process(evaluate_run, f"--run={folder}", prepared)
    assert before == {f: f.read_bytes() for f in folder.glob("*/**/*") if f.is_file()}


def test_models_go_with_their_stage(in_process, tmp_path, monkeypatch):
    """When the next model is loaded none before it lives."""
    made = []

    def watched(*args):
        assert all(reference() is None for reference in made)
        model, replicas = load_policy(*args)
        made.append(weakref.ref(model))
        return model, replicas

    monkeypatch.setattr(train, "load_policy", watched)
    gc.disable()  # it might come by at the right moment by chance
    try:
        in_process(train.main, *TINY, *places(tmp_path, "run"), "--max_steps=1")
        assert len(made) == 2 and made[-1]() is None
    finally:
        gc.enable()


def test_a_folder_in_which_another_process_trains_is_refused(group, tmp_path):
    config = train.TrainConfig(output_dir=str(tmp_path / "run"))
    with open_run_folder(config), pytest.raises(ValueError, match="another process trains"):
        open_run_folder(config).__enter__()
