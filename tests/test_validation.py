"""Validation while a stage trains:
its users, its curve, that it changes nothing, and the best step's weights."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, TINY, losses, run_train
from safetensors.torch import load_file

import train
from common import Stopped
from loaders.frozen import DataConfig, prepare
from runtime.checkpoint import save_checkpoint
from runtime.validation import SHOWN
from train import TrainConfig

# train.py in which the first validation is the best one
DECREE = """
import sys
sys.path.insert(0, {root!r})
import train
from runtime.validation import SHOWN

values = iter([0.9, 0.1])
train.validation_metrics = lambda run, model: dict.fromkeys(SHOWN, 0.0) | {{
    "n": 1, "hit_ratio@1": next(values)
}}
train.run_cli(train.main)
"""
# an adapter and dropout in SFT, so that random state matters
SHORT = ("--stages=sft", "--max_steps=4", "--sft_lora_r=4")


def val_lines(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [m for m in lines if m["phase"] == "val"]


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """A run that validates after every step, in one process."""
    tmp_path = tmp_path_factory.mktemp("validated")
    output, metrics = run_train(tmp_path, "often", *SHORT, "--eval_steps=1", "--keep=best")
    return tmp_path, output, metrics


def test_validation_changes_no_step(validated):
    """Losses with and without it are the same bits, dropout included; the curve has every step."""
    tmp_path, output, metrics = validated
    _, without = run_train(tmp_path, "never", *SHORT, "--val_size=0")
    assert losses(metrics, "sft").tolist() == losses(without, "sft").tolist()
    assert not val_lines(tmp_path / "never" / "sft")
    curve = val_lines(tmp_path / "often" / "sft")
    assert [m["step"] for m in curve] == [1, 2, 3, 4] and {m["val/n"] for m in curve} == {8}
    assert output.count("| val n 8 | written") == 4


def test_validation_on_two_sharded_ranks_is_that_of_one(validated):
    """Every rank answers its share; curves agree to rounding, and so does what is kept."""
    tmp_path, *_ = validated  # its prepared examples serve again; dropout is drawn per rank
    flags = (*SHORT, "--max_steps=2", "--lora_dropout=0", "--eval_steps=1", "--keep=best")
    for name, processes in (("one", 1), ("two", 2)):
        run_train(tmp_path, name, *flags, processes=processes)
    one, two = (val_lines(tmp_path / name / "sft") for name in ("one", "two"))
    assert [m["step"] for m in one] == [m["step"] for m in two]
    for key in ("val/hit_ratio@1", "val/valid_ratio", "val/ranking/mrr"):
        assert [m[key] for m in one] == pytest.approx([m[key] for m in two], abs=1e-6)
    adapters = [load_file(tmp_path / n / "sft/adapter_model.safetensors") for n in ("one", "two")]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, atol=1e-4, rtol=0)


def test_validation_users_are_a_sample_of_the_validation_split(tmp_path, monkeypatch):
    """Each example lies at its user's last interaction but one: no test answer is among them."""
    prepared = prepare(DataConfig(planted_users=60, followers=3, prepared_dir=str(tmp_path)))
    monkeypatch.setattr("runtime.validation.encode_examples", lambda examples, *rest: examples)
    sample, again, none = (
        train.encode_sample(prepared.splits["val"], None, TrainConfig(val_size=n))
        for n in (20, 20, 0)
    )
    interactions = sample.interactions
    assert len(sample.position) == 20 and np.array_equal(sample.position, again.position)
    assert (sample.position == interactions.start[interactions.user[sample.position] + 1] - 2).all()
    assert none is None


def test_a_run_validates_on_the_validation_split(in_process, tmp_path, monkeypatch):
    """What train.py hands to a stage are examples of the val split, and test is answered last."""
    answered = []
    inner = train.predict

    def spy(model, tokenizer, encoded, *rest, **options):
        interactions, position = encoded.examples.interactions, encoded.examples.position
        answered.append(set(interactions.start[interactions.user[position] + 1] - position))
        return inner(model, tokenizer, encoded, *rest, **options)

    monkeypatch.setattr(train, "predict", spy)
    flags = (*TINY, *SHORT, "--max_steps=2", f"--output_dir={tmp_path / 'run'}")
    in_process(train.main, *flags, f"--prepared_dir={tmp_path / 'p'}", "--eval_steps=1")
    assert answered == [{2}, {2}, {1}]


@pytest.fixture
def decreed(in_process, tmp_path, monkeypatch):
    """run(name, values, *flags): SFT whose validations have these hit ratios, in order.

    `signal_at`, a validation's number, gets a SIGTERM before it returns; `die`, a step's, ends the
    run when its checkpoint is in place. Returns lines of the curve and the adapter."""

    def run(name, values, *flags, signal_at=0, die=0):
        left = list(values)

        def summary(run, model):
            if len(values) - len(left) + 1 == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return dict.fromkeys(SHOWN, 0.0) | {"n": 1, "hit_ratio@1": left.pop(0)}

        def save(folder, step, *args, **facts):
            saved = save_checkpoint(folder, step, *args, **facts)
            if step == die:
                raise KeyboardInterrupt
            return saved

        monkeypatch.setattr(train, "validation_metrics", summary)
        monkeypatch.setattr(train.stages, "save_checkpoint", save)
        folder = tmp_path / name
        options = (*TINY, *SHORT, f"--output_dir={folder}", f"--prepared_dir={tmp_path / 'p'}")
        options += ("--save_steps=1", "--eval_steps=1", "--keep=best", *flags)
        in_process(train.main, *options)
        assert not left
        return val_lines(folder / "sft"), load_file(folder / "sft" / "adapter_model.safetensors")

    return run


def assert_same(first, second) -> None:
    """The same curve, with each step once, and the same adapter to the bit."""
    assert first[0] == second[0] and [m["step"] for m in first[0]] == [1, 2, 3, 4]
    assert all(torch.equal(tensor, second[1][name]) for name, tensor in first[1].items())


VALUES = (0.2, 0.5, 0.5, 0.1)


def test_the_best_step_is_kept_the_earlier_of_equal_ones(decreed, tmp_path, capsys):
    """--keep best saves the weights of step 2, where .5 is reached first."""
    with pytest.raises(KeyboardInterrupt):
        decreed("stopped", VALUES, die=2)
    _, adapter = decreed("whole", VALUES)
    assert "sft: keeping step 2 of 4, val/hit_ratio@1 0.5000" in capsys.readouterr().out
    held = load_file(tmp_path / "stopped/sft.unfinished/checkpoint-2/rank-00000.safetensors")
    for name, tensor in adapter.items():
        assert torch.equal(held[name.removeprefix("base_model.model.")], tensor)


@pytest.mark.parametrize("die", [2, 3])
def test_a_killed_run_keeps_the_best_step_of_before(decreed, die):
    """Its own, if the checkpoint is that of the best step, or an earlier one."""
    with pytest.raises(KeyboardInterrupt):
        decreed("killed", VALUES, die=die)
    assert_same(decreed("killed", VALUES[die:], "--resume=auto"), decreed("whole", VALUES))


def test_a_run_falls_back_to_the_best_step_of_an_older_checkpoint(decreed, tmp_path):
    """checkpoint-3 is damaged: checkpoint-2 knows the best step and its weights, too."""
    with pytest.raises(KeyboardInterrupt):
        decreed("killed", VALUES, die=3)
    (tmp_path / "killed/sft.unfinished/checkpoint-3/state.json").write_text("{}")
    assert_same(decreed("killed", VALUES[2:], "--resume=auto"), decreed("whole", VALUES))


@pytest.mark.parametrize("signal_at", [2, 4])
def test_sigterm_during_a_validation_loses_neither_it_nor_the_step(decreed, tmp_path, signal_at):
    """The run saves and stops, after the last validation of a stage, too; the best step stays."""
    with pytest.raises(Stopped):
        decreed("stopped", VALUES, "--save_steps=0", signal_at=signal_at)
    assert not (tmp_path / "stopped/sft").exists()
    resumed = decreed("stopped", VALUES[signal_at:], "--save_steps=0", "--resume=auto")
    assert_same(resumed, decreed("whole", VALUES))


def test_the_best_step_of_full_training_on_two_sharded_ranks(tmp_path):
    """All weights, each rank its rows: step 1, the best by decree, is what both divisions save."""
    script = tmp_path / "decree.py"
    script.write_text(DECREE.format(root=str(ROOT)))
    flags = (*SHORT, "--sft_lora_r=0", "--max_steps=2", "--eval_steps=1", "--keep=best")
    saved = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        output, _ = run_train(tmp_path, folder.name, *flags, processes=processes, script=script)
        assert "keeping step 1 of 2" in output
        saved[processes] = load_file(folder / "sft" / "model.safetensors")
    for name, tensor in saved[1].items():
        torch.testing.assert_close(saved[2][name], tensor, atol=1e-4, rtol=0)


def test_keeping_the_best_needs_validation():
    for options in ({"val_size": 0, "eval_steps": 5}, {}):
        with pytest.raises(ValueError, match="--keep best needs --eval_steps and --val_size"):
            TrainConfig(keep="best", **options)
