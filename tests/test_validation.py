"""Validation while a stage trains: its users, its curve, that it changes nothing, and the best step's weights."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_checkpoint import in_process  # noqa: F401  (a fixture)
from test_train import TINY, losses, run_train

import train
import validation
from data import DataConfig, prepare
from options import TrainConfig

# an adapter and dropout in SFT, so that random state matters
SHORT = ("--stages=sft", "--max_steps=4", "--sft_lora_r=4", "--copy_steps=0")


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
    assert output.count("| val n 8 | hit_ratio@1") == 4


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


def test_validation_users_are_a_sample_of_the_validation_split(tmp_path):
    """Each example lies at its user's last interaction but one: no test answer is among them."""
    prepared = prepare(DataConfig(planted_users=60, followers=3, prepared_dir=str(tmp_path)))
    seen = []

    class Spy:
        def select(self, rows):
            seen.extend(rows)
            return prepared.splits["val"].select(rows)

        def __len__(self):
            return len(prepared.splits["val"])

    encode = validation.encode_examples
    validation.encode_examples = lambda examples, tokenizer, length: examples
    try:
        sample = validation.encode_sample(Spy(), None, TrainConfig(val_size=20))
        again = validation.encode_sample(Spy(), None, TrainConfig(val_size=20))
    finally:
        validation.encode_examples = encode
    log = sample.log
    assert len(sample.position) == 20 and np.array_equal(sample.position, again.position)
    assert (sample.position == log.start[log.user[sample.position] + 1] - 2).all()
    assert validation.encode_sample(Spy(), None, TrainConfig(val_size=0)) is None


def test_a_run_validates_on_the_validation_split(in_process, tmp_path, monkeypatch):  # noqa: F811
    """What train.py hands to a stage are examples of the val split, and test is answered last."""
    answered = []
    inner = validation.predict

    def spy(model, tokenizer, encoded, *rest):
        log, position = encoded.examples.log, encoded.examples.position
        answered.append(set(log.start[log.user[position] + 1] - position))
        return inner(model, tokenizer, encoded, *rest)

    monkeypatch.setattr(validation, "predict", spy)
    flags = (*TINY, *SHORT, "--max_steps=2", f"--output_dir={tmp_path / 'run'}")
    in_process(train.main, *flags, f"--prepared_dir={tmp_path / 'p'}", "--eval_steps=1")
    assert answered == [{2}, {2}, {1}]


def test_the_best_step_is_kept_the_earlier_of_equal_ones(in_process, tmp_path, monkeypatch):  # noqa: F811
    """--keep best saves and tests the weights of step 2, where .5 is reached first."""
    values = iter([0.2, 0.5, 0.5, 0.1])

    def summary(records):
        return dict.fromkeys(validation.SHOWN, 0.0) | {"hit_ratio@1": next(values)}

    folder = tmp_path / "copy"
    monkeypatch.setattr(validation, "summarise", summary)
    monkeypatch.setattr(
        train, "finish_stage", lambda run, stage, model, f: shutil.copytree(f, folder)
    )
    monkeypatch.setattr(train, "results", lambda run, prepared: "")
    monkeypatch.setattr(train, "load_stage", lambda folder: (folder, None))
    flags = (*TINY, *SHORT, f"--output_dir={tmp_path / 'run'}", f"--prepared_dir={tmp_path / 'p'}")
    flags = (*flags, "--save_steps=1", "--save_total_limit=9", "--eval_steps=1", "--keep=best")
    in_process(train.main, *flags)
    saved = load_file(folder / "adapter_model.safetensors")
    for step, same in ((2, True), (4, False)):
        held = load_file(folder / f"checkpoint-{step}" / "rank-00000.safetensors")
        equal = [
            torch.equal(held[name.removeprefix("base_model.model.")], tensor)
            for name, tensor in saved.items()
        ]
        assert all(equal) == same
    assert [f.name for f in (folder / "best").iterdir()] == ["checkpoint-2"]


def test_a_resumed_run_forgets_steps_that_lie_ahead(tmp_path):
    """Resumed after step 15: the best of steps 5 and 10 counts, step 20's files go."""
    for step, value in ((5, 0.3), (10, 0.3), (20, 0.9)):
        folder = tmp_path / "best" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": step, "value": value}))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        optimizer = SimpleNamespace(param_groups=[])
        kept = validation.Validation(None, "sft", tmp_path, None, optimizer, {})
        kept.resume(15)
    finally:
        dist.destroy_process_group()
    assert kept.best == (0.3, 5)
    assert sorted(f.name for f in (tmp_path / "best").iterdir()) == [
        "checkpoint-10",
        "checkpoint-5",
    ]
    kept.forget_worse()
    assert [f.name for f in (tmp_path / "best").iterdir()] == ["checkpoint-5"]


def test_keeping_the_best_needs_validation():
    for options in ({"val_size": 0, "eval_steps": 5}, {}):
        with pytest.raises(ValueError, match="--keep best needs --eval_steps and --val_size"):
            TrainConfig(keep="best", **options)
