"""Runs of whole scripts, without the seconds that importing torch takes.

A server process (this file run as a script) has imported what the scripts import, and forks a child
for every run, with its own directory, environment, arguments, output and `__main__`. With
`processes` > 1 there is a child per rank, as torchrun would start it."""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

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
# A run whose random state matters (an adapter and dropout in SFT, which all weights would not
# have), and which keeps all that a run can
SAVING = ("--save_steps=2", "--sft_lora_r=4", "--lora_dropout=0.1", "--micro_batch_tokens=1500")
SAVING += ("--history_weight=0.1", "--eval_steps=1", "--keep=best")
SCRIPTS = ("train", "eval", "recommend", "loaders")
SCRIPTS += ("studies.report", "studies.probes", "studies.sequential")


# ------------------------------------------------------------------------ the server
def serve() -> None:
    """Fork a run per request {script, argv, cwd, env, stdout, stderr}; {poll: pid}: its end."""
    for name in (*SCRIPTS, "torch._dynamo"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what was imported is no child's garbage
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            become(request)
        print(json.dumps(answer), flush=True)


def become(request: dict) -> None:
    """Run the script in this process, which ends with it."""
    for number, file in enumerate(("/dev/null", request["stdout"], request["stderr"])):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY
        os.dup2(os.open(file, flags), number)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    script, code = request["script"], 1
    sys.argv = [script, *request["argv"]]
    try:
        if script.endswith(".py"):
            sys.path[0] = str(Path(script).parent)
            runpy.run_path(script, run_name="__main__")
        else:
            sys.path[0] = request["cwd"]
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@functools.cache
def server() -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, __file__], env=env, **pipes)
    atexit.register(lambda: (process.stdin.close(), process.wait()))
    return process


def ask(request: dict):
    """The server's answer to one request."""
    print(json.dumps(request), file=server().stdin, flush=True)
    return json.loads(server().stdout.readline())


# ------------------------------------------------------------------------ runs
class Script:
    """A started script: a process per rank, in the environment that torchrun gives it."""

    def __init__(self, script, argv, processes: int, cwd, env: dict, stdout, stderr):
        request = {"script": str(script), "argv": [str(a) for a in argv], "cwd": str(cwd)}
        request |= {"stdout": str(stdout), "stderr": str(stderr)}
        env, ranks = os.environ | {"OMP_NUM_THREADS": "1"} | env, [{}]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            env |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            ranks = [{"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)]
        self.pids = [ask(request | {"env": env | rank}) for rank in ranks]
        self.codes: list[int | None] = [None] * len(self.pids)

    def poll(self) -> int | None:
        """None while a process lives; then 0, or the code of the first that failed (-9: killed)."""
        for n, pid in enumerate(self.pids):
            if self.codes[n] is None:
                self.codes[n] = ask({"poll": pid})
        return None if None in self.codes else next((code for code in self.codes if code), 0)

    def wait(self, seconds: float = 300) -> int:
        """The exit code; when one process fails the others are ended, as torchrun does."""
        end = time.time() + seconds
        while (code := self.poll()) is None:
            if any(self.codes):
                time.sleep(0.2)  # they may have the same to say
                self.kill()
            if time.time() > end:
                self.kill()
                raise TimeoutError(f"processes {self.pids} did not end in {seconds} s")
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        """To every process that has not been seen to end."""
        self.poll()
        for pid, code in zip(self.pids, self.codes, strict=True):
            if code is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def kill(self) -> None:
        """kill -9, and wait until all are gone."""
        self.send_signal(signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.01)


def run_script(
    script, *argv, processes: int = 1, cwd=ROOT, seconds: float = 300, **env: str
) -> subprocess.CompletedProcess:
    """Run a file (….py) or a module (studies.report) to its end."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "out", Path(folder) / "err"
        code = Script(script, argv, processes, cwd, env, *files).wait(seconds)
        texts = [f.read_text() if f.exists() else "" for f in files]
    return subprocess.CompletedProcess([str(script), *argv], code, *texts)


def run_train(tmp_path: Path, name: str, *flags, processes: int = 1, expect: int = 0, script=TRAIN):
    """One run of train.py in tmp_path/name; returns (output, metrics by stage).

    `expect` 0: it must end well; otherwise it must not."""
    flags = (*TINY, *places(tmp_path, name), *flags)
    done = run_script(script, *flags, processes=processes, cwd=tmp_path)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == (expect == 0), output[-3000:]
    metrics = {}
    for file in (tmp_path / name).glob("*/metrics.jsonl"):
        steps = [json.loads(line) for line in file.read_text().splitlines()]
        metrics[file.parent.name] = [m for m in steps if m["phase"] != "val"]
    return output, metrics


def start_train(tmp_path: Path, name: str, *flags, processes: int = 1, script=TRAIN) -> Script:
    """A run that goes on beside the test; what it prints goes to tmp_path/name.log."""
    log, flags = tmp_path / f"{name}.log", (*TINY, *places(tmp_path, name), *flags)
    return Script(script, flags, processes, tmp_path, {}, log, log)


def start_torchrun(tmp_path: Path, name: str, *options, flags=()) -> subprocess.Popen:
    """train.py by torchrun itself, from tmp_path; what it prints goes to tmp_path/name.log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, str(TRAIN)]
    command += [*TINY, *SAVING, *places(tmp_path, name), *flags]
    log, env = open(tmp_path / f"{name}.log", "w"), os.environ | {"OMP_NUM_THREADS": "1"}
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
def losses(metrics: dict, stage: str) -> np.ndarray:
    return np.array([m["loss"] for m in metrics[stage]])


def lines(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def assert_same_results(a: Path, b: Path, atol: float = 0.0) -> None:
    """What the stages have trained, adapters or all weights, is equal, or as close as that."""
    first, second = (
        {
            f"{f.parent.name}/{n}": t
            for f in run.glob("*/*model.safetensors")
            for n, t in load_file(f).items()
        }
        for run in (a, b)
    )
    assert first and first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=atol, rtol=0, msg=name)


def uninterrupted(tmp_path: Path, processes: int) -> Path:
    """The run to compare with: sums over ranks round differently, so one of as many processes."""
    reference = tmp_path / ("whole" if processes == 1 else f"whole-{processes}")
    if not reference.exists():
        run_train(tmp_path, reference.name, *SAVING, processes=processes)
    return reference


if __name__ == "__main__":
    serve()
