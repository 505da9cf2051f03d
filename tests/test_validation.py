"""Validation while a stage trains: its users, its curve, that it changes nothing, the best step."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, TINY, losses, places, run_train
from safetensors.torch import load_file

import train
from common import Stopped
from loaders.frozen import DataConfig, prepare
from runtime.stages import SHOWN, encode_sample
from train import TrainConfig

# an adapter and dropout in SFT, so that random state matters
SHORT = ("--stages=sft", "--max_steps=4", "--sft_lora_r=4", "--eval_steps=1", "--keep=best")


def val_lines(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [m for m in lines if m["phase"] == "val"]


def assert_same_weights(a: Path, b: Path, atol: float = 0.0) -> None:
    (file,) = (f.name for f in a.glob("*model.safetensors"))
    ours, theirs = load_file(a / file), load_file(b / file)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=atol, rtol=0)


def test_validation_changes_no_step(tmp_path):
    """Losses with and without it are the same bits, dropout included; the curve has every step."""
    output, metrics = run_train(tmp_path, "often", *SHORT)
    _, without = run_train(tmp_path, "never", *SHORT[:3], "--val_size=0")
    assert losses(metrics, "sft").tolist() == losses(without, "sft").tolist()
    assert not val_lines(tmp_path / "never" / "sft")
    curve = val_lines(tmp_path / "often" / "sft")
    assert [m["step"] for m in curve] == [1, 2, 3, 4] and {m["val/n"] for m in curve} == {8}
    assert output.count("| val n 8 | written") == 4


def test_validation_on_two_sharded_ranks_is_that_of_one(tmp_path):
    """Every rank answers its share; curves agree to rounding, and so does what is kept."""
    flags = (*SHORT, "--max_steps=2", "--lora_dropout=0")
    for name, processes in (("one", 1), ("two", 2)):
        run_train(tmp_path, name, *flags, processes=processes)
    one, two = (val_lines(tmp_path / name / "sft") for name in ("one", "two"))
    assert [m["step"] for m in one] == [m["step"] for m in two] == [1, 2]
    for key in ("val/hit_ratio@1", "val/valid_ratio", "val/ranking/mrr"):
        assert [m[key] for m in one] == pytest.approx([m[key] for m in two], abs=1e-6)
    assert_same_weights(tmp_path / "one/sft", tmp_path / "two/sft", atol=1e-4)


def test_validation_users_are_a_sample_of_the_validation_split(tmp_path, monkeypatch):
    """Each example lies at its user's last interaction but one: no test answer is among them."""
    prepared = prepare(DataConfig(planted_users=60, followers=3, prepared_dir=str(tmp_path)))
    monkeypatch.setattr("runtime.stages.encode_examples", lambda examples, *rest: examples)
    val = prepared.splits["val"]
    sample, again, none = (encode_sample(val, None, TrainConfig(val_size=n)) for n in (20, 20, 0))
    interactions = sample.interactions
    assert len(sample.position) == 20 and np.array_equal(sample.position, again.position)
    assert (sample.position == interactions.start[interactions.user[sample.position] + 1] - 2).all()
    assert none is None


def test_a_run_validates_on_the_validation_split(in_process, tmp_path, monkeypatch):
    """What a stage answers are examples of the val split, and test is answered last."""
    answered, inner = [], train.predict

    def spy(model, tokenizer, encoded, *rest, **options):
        interactions, position = encoded.examples.interactions, encoded.examples.position
        answered.append(set(interactions.start[interactions.user[position] + 1] - position))
        return inner(model, tokenizer, encoded, *rest, **options)

    monkeypatch.setattr(train, "predict", spy)
    in_process(train.main, *TINY, *SHORT, "--max_steps=2", *places(tmp_path, "run"))
    assert answered == [{2}, {2}, {1}]


# ------------------------------------------------------------------------ the best step
@pytest.fixture
def decreed(in_process, tmp_path, monkeypatch):
    """run(name, values, *flags): SFT whose validations have these hit ratios, in order.

    `die`, a step's number, ends the run when its checkpoint is in place; a SIGTERM comes before the
    step `stop_step` or in the validation `stop_val`."""
    train_step, save_checkpoint = train.train_step, train.save_checkpoint

    def run(name, values, *flags, die=0, stop_step=0, stop_val=0) -> None:
        left, taken = list(values), []

        def summary(run, model):
            if len(values) - len(left) + 1 == stop_val:
                signal.raise_signal(signal.SIGTERM)
            return dict.fromkeys(("n", *SHOWN), 1.0) | {"hit_ratio@1": left.pop(0)}

        def step(*args, **kwargs):
            taken.append(1)
            if len(taken) == stop_step:
                signal.raise_signal(signal.SIGTERM)
            return train_step(*args, **kwargs)

        def save(folder, step, *facts):
            save_checkpoint(folder, step, *facts)
            if step == die:
                raise KeyboardInterrupt

        monkeypatch.setattr(train, "validation_metrics", summary)
        monkeypatch.setattr(train, "train_step", step)
        monkeypatch.setattr(train, "save_checkpoint", save)
        in_process(train.main, *TINY, *SHORT, *places(tmp_path, name), "--save_steps=1", *flags)
        assert not left and len(taken) == len(values)

    return run


def assert_as_if_whole(decreed, tmp_path, name: str) -> None:
    """The curve of an uninterrupted run, with each step once, and its adapter to the bit."""
    decreed("whole", VALUES)
    first, second = (val_lines(tmp_path / n / "sft") for n in (name, "whole"))
    assert first == second and [m["step"] for m in first] == [1, 2, 3, 4]
    assert_same_weights(tmp_path / name / "sft", tmp_path / "whole/sft")


VALUES = (0.2, 0.5, 0.5, 0.1)


def test_the_best_step_is_kept_the_earlier_of_equal_ones(decreed, tmp_path):
    """--keep best saves the weights of step 2, where .5 is reached first."""
    with pytest.raises(KeyboardInterrupt):
        decreed("stopped", VALUES, die=2)
    decreed("whole", VALUES)
    held = load_file(tmp_path / "stopped/sft.unfinished/checkpoint-2/model.safetensors")
    for name, tensor in load_file(tmp_path / "whole/sft/adapter_model.safetensors").items():
        assert torch.equal(held[name.removeprefix("base_model.model.")], tensor)


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("die", [2, 3])
def test_a_killed_run_keeps_the_best_step_of_before(decreed, tmp_path, die, damaged):
    """Its own, if the checkpoint is that of the best step, or an earlier one; if the checkpoint is
    damaged, a run from the one before comes to the same."""
    with pytest.raises(KeyboardInterrupt):
        decreed("killed", VALUES, die=die)
    if damaged:
        (tmp_path / f"killed/sft.unfinished/checkpoint-{die}/state.json").write_text("{}")
    decreed("killed", VALUES[die - damaged :], "--resume=auto")
    assert_as_if_whole(decreed, tmp_path, "killed")


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("when", ["stop_step", "stop_val"])
def test_a_signal_loses_neither_the_step_nor_its_validation(decreed, tmp_path, when, number):
    """A step that is due to be validated, or its validation, the last of a stage, too: the run
    saves and stops; one that goes on has every validation once, and keeps the same step."""
    with pytest.raises(Stopped, match=f"after step {number}, which is saved"):
        decreed("stopped", VALUES, "--save_steps=0", **{when: number})
    assert not (tmp_path / "stopped/sft").exists()
    decreed("stopped", VALUES[number:], "--save_steps=0", "--resume=auto")
    assert_as_if_whole(decreed, tmp_path, "stopped")


# train.py in which the first validation is the best one
DECREE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
from runtime.stages import SHOWN

values = iter([0.9, 0.1])
facts = dict.fromkeys(("n", *SHOWN), 1.0)
train.validation_metrics = lambda run, model: facts | {{"hit_ratio@1": next(values)}}
train.run_cli(train.main)
"""


def test_the_best_step_of_full_training_on_two_sharded_ranks(tmp_path):
    """All weights, each rank its rows: step 1, the best by decree, is what both divisions save."""
    script, flags = tmp_path / "decree.py", (*SHORT, "--sft_lora_r=0")
    script.write_text(DECREE)
    run_train(tmp_path, "1", *flags, "--max_steps=2", script=script)
    run_train(tmp_path, "2", *flags, "--max_steps=2", script=script, processes=2)
    assert_same_weights(tmp_path / "1/sft", tmp_path / "2/sft", atol=1e-4)
    last, _ = run_train(tmp_path, "last", *flags, "--max_steps=2", "--keep=last", script=script)
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "1/sft", tmp_path / "last/sft", atol=1e-4)


def test_keeping_the_best_needs_validation():
    for options in ({"val_size": 0, "eval_steps": 5}, {}):
        with pytest.raises(ValueError, match="--keep best needs --eval_steps and --val_size"):
            TrainConfig(keep="best", **options)
