"""Validation while a stage trains: its users, its curve, that it changes nothing, the best step."""

import signal

import pytest
import torch
from launch import ROOT, TINY, assert_same_results, log_of, losses, places, run_train
from safetensors.torch import load_file

import train
from common import Stopped
from runtime.stages import SHOWN

# an adapter and dropout in SFT, so that random state matters
SHORT = ("--stages=sft", "--max_steps=4", "--sft_lora_r=4", "--eval_steps=1", "--keep=best")


def test_validation_changes_no_step(tmp_path):
    """Losses with and without it are the same bits, dropout included; the curve has every step."""
    output, metrics = run_train(tmp_path, "often", *SHORT)
    _, without = run_train(tmp_path, "never", *SHORT[:3], "--val_size=0")
    assert losses(metrics, "sft").tolist() == losses(without, "sft").tolist()
    assert not log_of(tmp_path / "never/sft", validation=True)
    curve = log_of(tmp_path / "often/sft", validation=True)
    assert [m["step"] for m in curve] == [1, 2, 3, 4] and {m["val/n"] for m in curve} == {8}
    lines = (tmp_path / "often/sft/metrics.jsonl").read_text().splitlines()
    assert ["val/n" in line for line in lines] == [False, True] * 4  # each behind its step
    assert output.count("| val n 8 | written") == 4


def test_a_run_validates_on_the_validation_split(in_process, tmp_path, monkeypatch):
    """Always on the same --val_size users' last interaction but one; on test at the end."""
    answered, inner = [], train.predict

    def spy(model, tokenizer, encoded, *rest, **options):
        log, position = encoded.examples.interactions, encoded.examples.position
        answered.append((log.start[log.user[position] + 1] - position, position.tolist()))
        return inner(model, tokenizer, encoded, *rest, **options)

    monkeypatch.setattr(train, "predict", spy)
    flags = (*SHORT, "--max_steps=2", "--val_size=5")
    in_process(train.main, *TINY, *flags, *places(tmp_path, "run"))
    assert [set(to_the_end) for to_the_end, _ in answered] == [{2}, {2}, {1}]
    assert answered[0][1] == answered[1][1] and len(set(answered[0][1])) == 5


VALUES = (0.2, 0.5, 0.5, 0.1)


@pytest.fixture
def decreed(in_process, tmp_path, monkeypatch):
    """run(name, values, *flags): SFT whose validations have these hit ratios, in order.

    `die`: the step whose checkpoint, in place, ends the run. A SIGTERM comes before the step
    `stop_step` or in the validation `stop_val`."""
    train_step, save_checkpoint = train.train_step, train.save_checkpoint

    def run(name, values, *flags, die=0, stop_step=0, stop_val=0) -> None:
        validated, taken = [], []

        def count(calls: list, stop: int) -> None:
            calls.append(1)
            if len(calls) == stop:
                signal.raise_signal(signal.SIGTERM)

        def summary(run, model):
            count(validated, stop_val)
            hits = {"hit_ratio@1": values[len(validated) - 1]}
            return dict.fromkeys(("n", *SHOWN), 1.0) | hits

        def step(*args, **kwargs):
            count(taken, stop_step)
            return train_step(*args, **kwargs)

        def save(folder, step, *facts):
            save_checkpoint(folder, step, *facts)
            if step == die:
                raise KeyboardInterrupt

        monkeypatch.setattr(train, "validation_metrics", summary)
        monkeypatch.setattr(train, "train_step", step)
        monkeypatch.setattr(train, "save_checkpoint", save)
        in_process(train.main, *TINY, *SHORT, *places(tmp_path, name), *flags)
        assert len(validated) == len(taken) == len(values)

    return run


ENDS = [(when, n, False) for when in ("stop_step", "stop_val", "die") for n in (2, 4)]


@pytest.mark.parametrize("when, step, damaged", [*ENDS, ("die", 3, False), ("die", 3, True)])
def test_a_run_that_was_ended_keeps_the_best_step(decreed, tmp_path, when, step, damaged):
    """A signal comes before a step or in its validation, at a stage's last step, too; or the run
    is killed behind a checkpoint, which may be damaged. It goes on to the curve of an uninterrupted
    run, with each step once, and its adapter: step 2's, the earlier of the best two."""
    save_steps = f"--save_steps={int(when == 'die')}"
    with pytest.raises((Stopped, KeyboardInterrupt)):
        decreed("ended", VALUES, save_steps, **{when: step})
    checkpoint = tmp_path / f"ended/sft.unfinished/checkpoint-{step}"
    held = load_file(checkpoint / "model.safetensors")
    if damaged:
        (checkpoint / "state.json").write_text("{}")
    decreed("ended", VALUES[step - damaged :], save_steps, "--resume=auto")
    decreed("whole", VALUES, save_steps)
    first, second = (log_of(tmp_path / n / "sft", validation=True) for n in ("ended", "whole"))
    assert first == second and [m["step"] for m in first] == [1, 2, 3, 4]
    assert_same_results(tmp_path / "ended", tmp_path / "whole")
    for name, tensor in load_file(tmp_path / "whole/sft/adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.")
        assert torch.equal(held[f"best.{name}"], tensor)
        assert torch.equal(held[name], tensor) == (step == 2)


def test_a_stop_during_the_last_test_loses_no_step(decreed, monkeypatch):
    """Not even with --save_steps 0: the last step is saved before the test begins."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train, "finish_stage", lambda *_: signal.raise_signal(signal.SIGTERM))
        decreed("ended", VALUES, "--save_steps=0")
    decreed("ended", (), "--save_steps=0", "--resume=auto")


# train.py in which the first validation is the best one
DECREE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train

values, inner = iter([0.9, 0.1]), train.validation_metrics
train.validation_metrics = lambda *args: (inner(*args) or {{}}) | {{"hit_ratio@1": next(values)}}
train.run_cli(train.main)
"""


def test_two_sharded_ranks_have_the_curve_and_best_step_of_one(tmp_path):
    """Every rank answers its share; of all weights, each rank its rows, both save step 1, the best
    by decree."""
    script, flags = tmp_path / "decree.py", (*SHORT, "--sft_lora_r=0", "--max_steps=2")
    script.write_text(DECREE)
    for processes in (1, 2):
        run_train(tmp_path, str(processes), *flags, script=script, processes=processes)
    one, two = (log_of(tmp_path / name / "sft", validation=True) for name in "12")
    assert [m["step"] for m in one] == [m["step"] for m in two] == [1, 2]
    for key in ("val/valid_ratio", "val/ranking/hit_ratio@1", "val/ranking/mrr"):
        assert [m[key] for m in one] == pytest.approx([m[key] for m in two], abs=1e-6)
    assert_same_results(tmp_path / "1", tmp_path / "2", atol=1e-4)
    run_train(tmp_path, "last", *flags, "--keep=last", script=script)
    with pytest.raises(AssertionError):
        assert_same_results(tmp_path / "1", tmp_path / "last", atol=1e-4)
