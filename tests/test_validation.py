"""Validation while a stage trains:
its users, its curve, that it changes nothing, and the best step's weights."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launch import ROOT, TINY, losses, run_train
from safetensors.torch import load_file

import train
from loaders.frozen import DataConfig, prepare
from runtime.checkpoint import save_checkpoint, sha256
from runtime.validation import SHOWN, Validation
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

    encode = train.encode_examples
    train.encode_examples = lambda examples, tokenizer, length: examples
    try:
        sample = train.encode_sample(Spy(), None, TrainConfig(val_size=20))
        again = train.encode_sample(Spy(), None, TrainConfig(val_size=20))
    finally:
        train.encode_examples = encode
    interactions = sample.interactions
    assert len(sample.position) == 20 and np.array_equal(sample.position, again.position)
    assert (sample.position == interactions.start[interactions.user[sample.position] + 1] - 2).all()
    assert train.encode_sample(Spy(), None, TrainConfig(val_size=0)) is None


def test_a_run_validates_on_the_validation_split(in_process, tmp_path, monkeypatch):
    """What train.py hands to a stage are examples of the val split, and test is answered last."""
    answered = []
    inner = train.predict

    def spy(model, tokenizer, encoded, *rest):
        interactions, position = encoded.examples.interactions, encoded.examples.position
        answered.append(set(interactions.start[interactions.user[position] + 1] - position))
        return inner(model, tokenizer, encoded, *rest)

    monkeypatch.setattr(train, "predict", spy)
    flags = (*TINY, *SHORT, "--max_steps=2", f"--output_dir={tmp_path / 'run'}")
    in_process(train.main, *flags, f"--prepared_dir={tmp_path / 'p'}", "--eval_steps=1")
    assert answered == [{2}, {2}, {1}]


def test_the_best_step_is_kept_the_earlier_of_equal_ones(in_process, tmp_path, monkeypatch):
    """--keep best saves and tests the weights of step 2, where .5 is reached first."""
    values = iter([0.2, 0.5, 0.5, 0.1])

    def summary(run, model):
        return dict.fromkeys(("n", *SHOWN), 0.0) | {"hit_ratio@1": next(values)}

    folder = tmp_path / "copy"
    monkeypatch.setattr(train, "validation_metrics", summary)
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
    assert names(folder / "best") == {"checkpoint-1", "checkpoint-2"}  # checkpoint-1 names its own


def write_kept(folder: Path, **state) -> Path:
    """A whole checkpoint that holds no weights."""
    folder.mkdir(parents=True)
    file = folder / "state.json"
    file.write_text(json.dumps(state))
    manifest = {"state.json": [file.stat().st_size, sha256(file)]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def kept(tmp_path):
    """The validation of a stage that kept steps 5, 10 and 20, and its folder."""
    for step, value in ((5, 0.3), (10, 0.3), (20, 0.9)):
        write_kept(tmp_path / "best" / f"checkpoint-{step}", step=step, value=value)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    optimizer = SimpleNamespace(param_groups=[])
    yield Validation(None, "sft", tmp_path, None, optimizer, {}, None), tmp_path
    dist.destroy_process_group()


def names(folder: Path) -> set[str]:
    return {f.name for f in folder.iterdir()}


def test_a_resumed_run_forgets_steps_that_lie_ahead(kept):
    """Resumed after step 15: the best of steps 5 and 10 counts, step 20's files go."""
    kept, folder = kept
    kept.resume(15)
    assert kept.best == (0.3, 5) and kept.state() == {"best_step": 5}
    assert names(folder / "best") == {"checkpoint-5", "checkpoint-10"}
    kept.forget_worse()
    assert names(folder / "best") == {"checkpoint-5"}


def test_a_checkpoint_to_fall_back_to_finds_its_own_best_step(kept):
    """What checkpoint-15 named as its best is kept beside the newer best,
    until that one is gone."""
    kept, folder = kept
    older = write_kept(folder / "checkpoint-15", step=15, best_step=5)
    kept.best = (0.9, 20)
    kept.forget_worse()
    assert names(folder / "best") == {"checkpoint-5", "checkpoint-20"}
    shutil.rmtree(older)
    kept.forget_worse()
    assert names(folder / "best") == {"checkpoint-20"}


def test_damaged_weights_of_a_kept_step_are_named_and_passed_over(kept, capsys):
    """A flipped byte in best/ is no result: the next best step counts."""
    kept, folder = kept
    file = folder / "best" / "checkpoint-20" / "state.json"
    file.write_text(file.read_text().replace("0.9", "0.8"))
    kept.resume(30)
    assert "checkpoint-20 is damaged (state.json has another SHA-256)" in capsys.readouterr().out
    assert kept.best == (0.3, 5) and names(folder / "best") == {"checkpoint-5", "checkpoint-10"}


def test_a_killed_run_keeps_the_best_step_of_before(in_process, tmp_path, monkeypatch):
    """Stopped after step 3 of 4, resumed: step 2's weights, no val line twice."""
    values = {1: 0.2, 2: 0.5, 3: 0.1, 4: 0.3}

    def run(name, *flags, die=0):
        seen = []

        def summary(run, model):
            seen.append(1)
            step = len(seen) + (3 if "--resume=auto" in flags else 0)
            return dict.fromkeys(("n", *SHOWN), 0.0) | {"hit_ratio@1": values[step]}

        def save(folder, step, *args, **kwargs):
            out = save_checkpoint(folder, step, *args, **kwargs)
            if die and step == die and folder.name.endswith("unfinished"):
                raise KeyboardInterrupt
            return out

        monkeypatch.setattr(train, "validation_metrics", summary)
        monkeypatch.setattr(train, "save_checkpoint", save)
        folder = tmp_path / name
        options = (*TINY, *SHORT, f"--output_dir={folder}", f"--prepared_dir={tmp_path / 'p'}")
        options += ("--save_steps=1", "--eval_steps=1", "--keep=best", *flags)
        in_process(train.main, *options)
        return val_lines(folder / "sft"), load_file(folder / "sft" / "adapter_model.safetensors")

    whole_lines, whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", die=3)
    lines, resumed = run("killed", "--resume=auto")
    assert lines == whole_lines and [m["step"] for m in lines] == [1, 2, 3, 4]
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


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
        assert not (folder / "sft" / "best").exists()
    for name, tensor in saved[1].items():
        torch.testing.assert_close(saved[2][name], tensor, atol=1e-4, rtol=0)


def test_keeping_the_best_needs_validation():
    for options in ({"val_size": 0, "eval_steps": 5}, {}):
        with pytest.raises(ValueError, match="--keep best needs --eval_steps and --val_size"):
            TrainConfig(keep="best", **options)
