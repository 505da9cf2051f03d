"""A run's log and folder, its end by a signal or a full disk, what its stages start from."""

import gc
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import launch
import numpy as np
import pytest
import torch
from launch import SAVING, TINY, TRAIN, assert_same_results, lines, losses, places, run_train
from safetensors.torch import load_file, save_file

import train
from common import Stopped
from demo.pretrain import BASE
from eval import main as evaluate_run
from model import load_pretrained
from runtime.processes import Logger, StopRequest, open_run_folder
from runtime.sharding import newest
from runtime.stages import save_predictions
from studies.probes import main as probe_run


# ------------------------------------------------------------------------ the log
def test_a_printed_line_says_how_long_the_run_will_take(tmp_path, capsys, monkeypatch):
    """Steps of 2 seconds: after 3 of 100 there are 97 left, and as long as 40 in a later stage, of
    80 steps half as wide; the first two, which warm up, are not timed."""
    monkeypatch.setattr("runtime.processes.time.monotonic", iter([0.0, 5.0, 7.0, 9.0]).__next__)
    run = SimpleNamespace(config=SimpleNamespace(logging_steps=1))
    schedule = {"num_steps": 100, "steps_per_epoch": 10, "due": lambda every, steps: every == 1}
    later = SimpleNamespace(num_steps=80, step_tokens=5.0)
    log = Logger(run, "sft", tmp_path, SimpleNamespace(step_tokens=10.0, **schedule), [later])
    for step in range(4):
        metrics = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1}
        log(step, SimpleNamespace(read=lambda m=metrics: m))
    assert lines(tmp_path / "metrics.jsonl") == 3  # the last is read when the next has begun
    first, _, third = capsys.readouterr().out.splitlines()
    assert first.endswith("1/100 | loss 1 | grad_norm 1 | learning_rate 0.1")
    assert "3/100 | loss 1 |" in third and third.endswith(
        "2000 ms/step | 04:34 to the end of the run"
    )


# ------------------------------------------------------------------------ the folder
def test_a_process_killed_while_it_writes_predictions_leaves_the_ones_before(tmp_path, monkeypatch):
    """What is measured again is in place at once, or not at all."""

    def killed(*_):
        raise KeyboardInterrupt

    save_predictions(tmp_path, {"n": 1}, [{"user": "a", "ids": [1]}])
    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save_predictions(tmp_path, {"n": 2}, [{"user": "b"}, {"user": "c"}])
    assert (tmp_path / "predictions.jsonl").read_text() == '{"user": "a"}\n'
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"n": 1}


def test_run_folder_holds_what_the_readme_promises(one_process):
    """Config, PEFT adapter, HF model with tokenizer, metrics, predictions and the result table."""
    folder = one_process[0] / "one"
    files = "config.json results.md sft/model.safetensors sft/config.json sft/tokenizer.json "
    files += "recpo/adapter_model.safetensors recpo/adapter_config.json recpo/eval/metrics.json"
    assert all((folder / name).is_file() for name in files.split())
    records = [json.loads(line) for line in (folder / "recpo/eval/predictions.jsonl").open()]
    assert len(records) == 8
    assert all(len(r["logps"]) == 20 and r["target"] in r["candidates"] for r in records)
    table, rows = (folder / "results.md").read_text(), "chance popularity item-kNN Markov sft recpo"
    assert all(row in table for row in (*rows.split(), "Bayes-optimal"))


def test_finished_stages_are_not_run_again(one_process):
    """--resume auto skips them, starts an unfinished one anew, and adds stages to a run."""
    tmp_path, _, before = one_process
    (tmp_path / "one" / "sdpo.unfinished").mkdir()
    flags = ("--micro_batch_tokens=500", "--stages=sft,recpo,sdpo", "--resume=auto")
    output, after = run_train(tmp_path, "one", *flags)
    assert "sft: finished before" in output and "recpo: finished before" in output
    assert after["sft"] == before["sft"] and len(after["sdpo"]) == len(before["recpo"])
    # K = 3 at policy = reference
    assert after["sdpo"][0]["preference_loss"] == pytest.approx(np.log(4), abs=1e-6)


def test_a_run_folder_in_use_is_not_overwritten(one_process):
    """Without --resume a used folder is an error, with other options too; nothing in it changes."""
    tmp_path = one_process[0]
    before = {f: f.read_bytes() for f in (tmp_path / "one").rglob("*.json*")}
    for flags, message in (
        ((), "holds a run already: --resume auto"),
        (("--resume=auto", "--beta=0.5", "--seed=3"), "other values of beta, seed: "),
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


def test_restarts_need_a_folder_to_go_on_in(monkeypatch):
    """Without --output_dir a restarted run would begin again in the next free folder."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with pytest.raises(ValueError, match="--max-restarts needs --output_dir"):
        train.read_options([])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.read_options(["--output_dir=r"]).resume == "auto"


DISK = """
mount -t tmpfs -o size={size}k none {disk} || exit 99
{train}
code=$?
mount -o remount,size=100m {disk} && {train} --resume=auto && cp -r {disk}/run {disk}-after
exit $code
"""


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
    # two checkpoints with their moments and best weights, not three
    script = DISK.format(size=int(adapter * (4 * 2.5 + 1)) // 1024, disk=disk, train=train_it)
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-3000:]
    message = r"error: .*disk/run/sft.unfinished\S* cannot be written .*No space left.*untouched"
    assert re.match(message, done.stderr.strip().splitlines()[0]), done.stderr
    assert "Traceback" not in done.stderr and "going on from" in done.stdout
    assert_same_results(tmp_path / "disk-after", runs / "whole")


# ------------------------------------------------------------------------ the signal
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
    assert re.search(r"stopped after step \d+, which is saved", log)
    python, script, *argv = shlex.split(log.splitlines()[-1])
    assert (python, script) == ("python", str(TRAIN)) and argv[-2:] == ["--resume", "auto"]
    (saved,) = newest(file.parent)
    last = json.loads(file.read_text().splitlines()[-1])
    assert last["step"] == json.loads((saved / "state.json").read_text())["step"]
    for cache in (tmp_path / name).glob("reference-*"):
        cache.unlink()
    output, resumed = run_train(tmp_path, name, *flags, "--resume=auto", processes=processes)
    assert f"going on from {saved}" in output
    assert_same_results(tmp_path / name, launch.uninterrupted(tmp_path, processes))
    assert [m["step"] for m in resumed[stage]] == [m["step"] for m in metrics[stage]]
    if processes == 1:
        np.testing.assert_array_equal(losses(resumed, stage), losses(metrics, stage))


def test_a_signal_before_the_first_step_leaves_no_folder(in_process, tmp_path, monkeypatch):
    """Ctrl-C while the data is read: nothing is to be saved, and the command says how to go on."""

    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "prepare", interrupted)
    with pytest.raises(Stopped, match="nothing is to be saved(?s:.*)--resume auto") as stop:
        in_process(train.main, *TINY, f"--output_dir={tmp_path / 'a run'}")
    assert stop.value.args[1] == 130 and f"'--output_dir={tmp_path}/a run'" in str(stop.value)
    assert not (tmp_path / "a run").exists()


def test_the_command_that_goes_on_is_complete(monkeypatch):
    """It names the run folder and --resume auto once, and quotes."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    wanted = "python train.py --data_dir 'my log.csv' --output_dir runs/csv-1 --resume auto"
    for given in (["train.py", "--data_dir", "my log.csv"], shlex.split(wanted)[1:]):
        monkeypatch.setattr("sys.argv", given)
        with pytest.raises(Stopped) as stop:
            StopRequest(Path("runs/csv-1")).stop("here")
        assert str(stop.value.args[0]).splitlines()[-1] == wanted


@pytest.mark.parametrize(
    ("flag", "message"), [("--beta=x", "invalid float value"), ("--data_dir=no", "no such path")]
)
def test_torchrun_ends_with_the_error_of_one_rank(tmp_path, flag, message):
    """Found by both ranks, or by rank 0 while the other waits: said once, at the very end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(TRAIN), "--dataset=csv", f"--model={BASE}", flag]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    printed = done.stdout + done.stderr
    assert done.returncode == 1 and printed.count(message) == 1
    assert message in printed.rstrip().splitlines()[-2]  # before the last border
    assert printed.count("Traceback (most recent call last)") == 1  # torchrun's own
    assert not list(tmp_path.glob("runs/*"))


def test_torchrun_hands_ctrl_c_on(whole):
    """Its workers save, and say how to go on under torchrun; it exits with 1."""
    tmp_path = whole[0]
    agent = launch.start_torchrun(
        tmp_path, "interrupted", "--nproc_per_node=2", flags=["--sft_epochs=99"]
    )
    folder = tmp_path / "interrupted" / "sft.unfinished"
    launch.wait_for(lambda: lines(folder / "metrics.jsonl") > 1, agent)
    agent.send_signal(signal.SIGINT)
    assert agent.wait(60) == 1
    log = (tmp_path / "interrupted.log").read_text()
    (command,) = re.findall(r"which is saved\. This goes on:\n(.*)", log)
    assert command.startswith("python -m torch.distributed.run --standalone --nproc_per_node=2 ")
    assert command.endswith(" --resume auto") and newest(folder)


# ------------------------------------------------------------------------ the stages
def write_log(file: Path, users: int) -> Path:
    """A log of one's own in which every user saw 12 of 40 films."""
    items = [(u, n, (7 * u + 3 * n) % 40) for u in range(users) for n in range(12)]
    rows = [f"{u},{i},{1 + (u + n) % 5},{1_500_000_000 + n},Film {i}" for u, n, i in items]
    file.write_text("\n".join(["user_id,item_id,rating,timestamp,title", *rows]) + "\n")
    return file


def test_a_run_over_data_that_grew_is_refused(in_process, tmp_path):
    """Finished stages hold for their data: train.py and eval.py name both hashes, write nothing."""
    log = write_log(tmp_path / "log.csv", 40)
    flags = (*TINY, *places(tmp_path, "run"), "--dataset=csv", f"--model={BASE}")
    flags += (f"--data_dir={log}", "--max_steps=1", "--core=2", "--followers=3", "--min_history=4")
    in_process(train.main, *flags, "--stages=sft")
    evaluation = (f"--run={tmp_path / 'run'}", f"--prepared_dir={tmp_path / 'prepared'}")
    in_process(evaluate_run, *evaluation)
    before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    before.pop(tmp_path / "run" / "config.json")  # the stages that were asked for

    write_log(log, 50)
    message = "sft was finished on data [0-9a-f]{12}, now it is [0-9a-f]{12}: .*"
    with pytest.raises(ValueError, match=message + "another --output_dir"):
        in_process(train.main, *flags, "--stages=sft,recpo", "--resume=auto")
    with pytest.raises(ValueError, match=message + "by --model"):
        in_process(evaluate_run, *evaluation)
    assert all(f.read_bytes() == content for f, content in before.items())
    assert not (tmp_path / "run" / "recpo.unfinished").exists()


def test_a_finished_stage_of_other_weights_is_refused(whole, in_process, tmp_path):
    """A base or adapter that changed under a finished stage, or one that nothing is known of."""
    folder = tmp_path / "run"
    shutil.copytree(whole[0] / "whole", folder)
    flags = (*TINY, *SAVING, *places(tmp_path, "run"), f"--prepared_dir={whole[0] / 'prepared'}")
    file, stamp = folder / "sft" / "adapter_model.safetensors", folder / "recpo" / "base.json"
    tensors = {name: tensor + 1e-3 for name, tensor in load_file(file).items()}
    for before in (json.loads(stamp.read_text()), {"base": "somewhere"}):
        save_file(tensors, file)
        stamp.write_text(json.dumps(before))
        key = before.get("starting_weights", "None")[:12]
        message = rf"recpo was finished on weights {key}, now it is \w+.*another --output_dir"
        with pytest.raises(ValueError, match=message):
            in_process(train.main, *flags, "--resume=auto")


def test_models_and_optimizers_go_with_their_stage(whole, in_process, monkeypatch):
    """When the next model is loaded none before it lives, in training, evaluation and probes."""
    tmp_path = whole[0]
    folder = tmp_path / "stage-after-stage"
    shutil.copytree(tmp_path / "whole", folder)
    shutil.rmtree(folder / "recpo")
    made, optimizers = [], []

    def watched(make, kept):
        def wrapper(*args, **kwargs):
            assert kept is optimizers or all(reference() is None for reference in made)
            result = make(*args, **kwargs)
            kept.append(weakref.ref(result[0] if isinstance(result, tuple) else result))
            return result

        return wrapper

    monkeypatch.setattr("train.load_policy", watched(train.load_policy, made))
    monkeypatch.setattr("runtime.sources.load_pretrained", watched(load_pretrained, made))
    monkeypatch.setattr("torch.optim.AdamW", watched(torch.optim.AdamW, optimizers))
    gc.disable()  # it might come by at the right moment by chance
    try:
        flags = (*TINY, *SAVING, *places(tmp_path, folder.name), "--resume=auto")
        in_process(train.main, *flags, "--stages=sft,recpo,sdpo")
        assert len(made) == 2 and all(reference() is None for reference in made + optimizers)
        read = (f"--run={folder}", f"--prepared_dir={tmp_path / 'prepared'}")
        in_process(evaluate_run, *read)
        assert len(made) == 5 and made[-1]() is None
        in_process(probe_run, *read, "--probe=length")
        assert len(made) == 8 and made[-1]() is None
    finally:
        gc.enable()
