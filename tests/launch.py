"""Runs of whole scripts, without the seconds that importing torch takes.

A server process has imported what the scripts import, and forks a child for every run; with
`processes` > 1 one per rank, as torchrun would start it."""

import contextlib
import gc
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "train.py"
# a run of 6 + 6 steps on the demo's base, all weights in SFT
TINY = [
    "--shared",  # stages that a test leaves out do not read all of them
    "--planted_users=150", "--train_size=20", "--test_size=8", "--batch_size=8",
    "--sft_epochs=2", "--epochs=2", "--logging_steps=1", "--lora_r=4", "--shard=full",
    "--stages=sft,recpo", "--sft_lora_r=0",
]  # fmt: skip
# A run whose random state matters (an adapter and dropout in SFT), and which keeps all it can
SAVING = ("--save_steps=2", "--sft_lora_r=4", "--lora_dropout=0.1", "--micro_batch_tokens=1500")
SAVING += ("--history_weight=0.1", "--eval_steps=1", "--keep=best")
SCRIPTS = ("train", "eval", "recommend", "loaders")
SCRIPTS += ("studies.report", "studies.probes", "studies.sequential")


# ------------------------------------------------------------------------ runs
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*SCRIPTS, "torch._dynamo"])


def become(script: str, argv: list[str], cwd, env: dict, outputs: tuple) -> None:
    """Run a file (….py) or a module (studies.report) in this process, which ends with it."""
    gc.freeze()  # what the server imported is no child's garbage
    for number, file in enumerate(outputs, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.path[0] = [script, *argv], str(cwd)
    if script.endswith(".py"):
        sys.path[0] = str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


class Script:
    """A started script: a process per rank, in the environment that torchrun gives it."""

    def __init__(self, script, argv, processes: int, cwd, outputs: tuple):
        env, ranks = os.environ | {"OMP_NUM_THREADS": "1"}, [{}]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            env |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            ranks = [{"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)]
        command = str(script), [str(a) for a in argv], cwd
        calls = [(*command, env | rank, outputs) for rank in ranks]
        self.ranks = [FORKS.Process(target=become, args=call) for call in calls]
        with patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)):  # the server's
            for rank in self.ranks:
                rank.start()

    def poll(self) -> int | None:
        """None while a process lives; then 0, or the code of the first that failed (-9: killed)."""
        codes = [rank.exitcode for rank in self.ranks]
        return None if None in codes else next((code for code in codes if code), 0)

    def wait(self, seconds: float = 300) -> int:
        """The exit code; when one process fails the others are killed, as torchrun does."""
        end = time.time() + seconds
        while (code := self.poll()) is None:
            if time.time() > end or any(rank.exitcode for rank in self.ranks):
                time.sleep(0.2)  # they may have the same to say
                self.kill()
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        """To every process that has not been seen to end."""
        for rank in self.ranks:
            if rank.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, number)

    def kill(self) -> None:
        """kill -9, and wait until all are gone."""
        self.send_signal(signal.SIGKILL)
        for rank in self.ranks:
            rank.join()


def run_script(script, *argv, processes: int = 1, cwd=ROOT) -> subprocess.CompletedProcess:
    """Run a script to its end."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "out", Path(folder) / "err"
        code = Script(script, argv, processes, cwd, files).wait()
        texts = [f.read_text() if f.exists() else "" for f in files]
    return subprocess.CompletedProcess([str(script), *argv], code, *texts)


def run_train(tmp_path: Path, name: str, *flags, processes: int = 1, expect: int = 0, script=TRAIN):
    """A run in tmp_path/name that ends well, unless `expect`; its output, metrics by stage."""
    flags = (*TINY, *places(tmp_path, name), *flags)
    done = run_script(script, *flags, processes=processes, cwd=tmp_path)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == (expect == 0), output[-3000:]
    return output, {f.parent.name: log_of(f.parent) for f in (tmp_path / name).glob("*/*.jsonl")}


def start_train(tmp_path: Path, name: str, *flags, processes: int = 1) -> Script:
    """A run that goes on beside the test; what it prints goes to tmp_path/name.log."""
    log, flags = tmp_path / f"{name}.log", (*TINY, *places(tmp_path, name), *flags)
    return Script(TRAIN, flags, processes, tmp_path, (log, log))


def start_torchrun(tmp_path: Path, name: str, *options, flags=SAVING) -> subprocess.Popen:
    """train.py by torchrun itself, from tmp_path; what it prints goes to tmp_path/name.log."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(TRAIN), *TINY, *flags]
    log, env = open(tmp_path / f"{name}.log", "w"), os.environ | {"OMP_NUM_THREADS": "1"}
    command += places(tmp_path, name)
    return subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=env)


def places(tmp_path: Path, name: str) -> tuple[str, str]:
    """Its run folder, and the prepared examples that all runs of tmp_path share."""
    return f"--output_dir={tmp_path / name}", f"--prepared_dir={tmp_path / 'prepared'}"


def wait_for(condition, process, seconds: float = 120) -> None:
    """Until the condition holds or the process has ended."""
    end = time.time() + seconds
    while time.time() < end and process.poll() is None and not condition():
        time.sleep(0.02)


# ------------------------------------------------------------------------ what they leave
def log_of(stage: Path, validation: bool = False) -> list[dict]:
    """Metrics of the steps that metrics.jsonl has, or of the validations."""
    steps = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [m for m in steps if (m["phase"] == "val") == validation]


def losses(metrics: dict, stage: str) -> np.ndarray:
    return np.array([m["loss"] for m in metrics[stage]])


def lines(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def assert_same_results(a: Path, b: Path, atol: float = 0.0) -> None:
    """What the stages have trained, adapters or all weights, is equal, or as close as that."""
    first, second = (
        {f.parent.name: load_file(f) for f in run.glob("*/*model.safetensors")} for run in (a, b)
    )
    assert first
    torch.testing.assert_close(first, second, atol=atol, rtol=0)


def uninterrupted(tmp_path: Path, processes: int) -> Path:
    """The run to compare with: sums over ranks round differently, so one of as many processes."""
    reference = tmp_path / ("whole" if processes == 1 else f"whole-{processes}")
    if not reference.exists():
        run_train(tmp_path, reference.name, *SAVING, processes=processes)
    return reference
