"""Options: every committed configuration is accepted;
what breaks or does nothing is refused by name."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from launch import TINY

import train
from common import parse_config
from train import READ_BY, TrainConfig

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/*.json")), ids=lambda f: f.name)
def test_committed_configurations_are_accepted(file):
    """Each file of configs/ makes a TrainConfig."""
    parse_config(TrainConfig, ["--config", str(file)])


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/tables/*.json")), ids=lambda f: f.name)
def test_every_training_run_of_a_committed_table_is_accepted(file):
    """Shared options and a run's own make a TrainConfig together."""
    table = json.loads(file.read_text())
    known = {f.name for f in fields(TrainConfig)}
    runs = [run for run in table["runs"] if run.get("script", "train.py") == "train.py"]
    for run in runs:
        options = table["common"] | table.get("training", {}) | run
        TrainConfig(**{name: value for name, value in options.items() if name in known})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 1.0}, "--lora_dropout must be < 1"),
        ({"warmup_ratio": -1.0}, "--warmup_ratio must be >= 0"),
        ({"warmup_ratio": float("nan")}, "--warmup_ratio must be >= 0"),
        ({"beta": float("inf")}, "--beta must be a finite number, got inf"),
        ({"adam_beta2": 1.0}, "--adam_beta2 must be < 1"),
        ({"num_negatives": 20}, "--num_negatives must be <= 19"),
        ({"lora_alpha": 0.0}, "--lora_alpha must be > 0"),
        ({"sft_weight": -0.5}, "--sft_weight must be >= 0, or -1"),
        ({"followers": 20}, "--followers must be <= 19"),
        ({"margin": "square"}, "--margin must be one of ratio, log_diff, log_ratio, none"),
        (
            {"margin": "none", "margin_lambda": 1.0},
            "--margin_lambda has no effect with --margin none",
        ),
        ({"shard": "half"}, "--shard must be one of full, none, hybrid"),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(options, message):
    """Bounds stand beside the option; flags and --config files meet the same ones."""
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_a_config_file_is_held_to_the_bounds(tmp_path):
    file = tmp_path / "c.json"
    file.write_text('{"lora_dropout": 1.0}')
    with pytest.raises(ValueError, match="--lora_dropout must be < 1"):
        parse_config(TrainConfig, ["--config", str(file)])


OTHER = {  # a value of each option of a loss that is not its default
    "margin_lambda": 1.0,
    "margin": "log_diff",
    "num_negatives": 2,
    "negative_source": "random",
    "simpo_gamma": 1.0,
}
INERT = {
    "margin_lambda": "sdpo",
    "margin": "sdpo",
    "num_negatives": "dpo",
    "negative_source": "sft",
    "simpo_gamma": "recpo",
}


@pytest.mark.parametrize("name", READ_BY)
def test_an_option_that_no_stage_reads_is_refused(name):
    """One message names the option, who reads it, and the stages; with a reader it is accepted."""
    with pytest.raises(ValueError, match=f"--{name} is read by .* leave it out"):
        TrainConfig(stages=INERT[name], **{name: OTHER[name]})
    reader = sorted(READ_BY[name])[0]
    assert getattr(TrainConfig(stages=reader, **{name: OTHER[name]}), name) == OTHER[name]


def test_help_shows_choices_and_bounds(capsys):
    """What an option may be stands in --help."""
    with pytest.raises(SystemExit):
        parse_config(TrainConfig, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 3, >= 1, <= 19)" in text
    assert "ratio, log_diff, log_ratio, none" in text


# ------------------------------------------------------------------------ from options to steps
SHORT = ("--val_size=0", "--test_size=2", "--no_decode_rest")


@pytest.fixture
def steps(in_process, tmp_path, monkeypatch):
    """call(*flags): what run_stage hands to each step of a whole run, and the KL it brought."""
    taken, inner = [], train.train_step

    def spy(model, optimizer, batches, objective, lr, config, replicas):
        (group,) = optimizer.param_groups
        step = {"objective": objective, "lr": lr, "kl": getattr(objective, "kl", None)}
        step |= {name: group[name] for name in ("betas",)}
        result = inner(model, optimizer, batches, objective, lr, config, replicas)
        taken.append(step | {"new_kl": result.on_device.get("kl")})
        return result

    def call(*flags) -> list[dict]:
        monkeypatch.setattr(train, "train_step", spy)
        folders = (f"--output_dir={tmp_path / 'run'}", f"--prepared_dir={tmp_path / 'p'}")
        in_process(train.main, *TINY, *SHORT, *folders, *flags)
        return taken

    return call


def test_options_of_the_step_reach_every_step_of_their_stage(steps):
    """20 prompts in steps of 8: 2 epochs of SFT are 6 steps, one of KTO is 3, each with its peak.

    Warm-up takes half of them, rounded up, then a half cosine; KTO's baseline is the last KL."""
    taken = steps(
        *("--stages=sft,kto", "--beta=0.1", "--sft_epochs=2", "--epochs=1", "--warmup_ratio=0.5"),
        *("--sft_learning_rate=3e-3", "--learning_rate=1e-3"),
        "--adam_beta2=0.9",
    )
    kto = [step for step in taken if step["new_kl"] is not None]
    sft = [step for step in taken if step["new_kl"] is None]
    assert taken == sft + kto
    assert [step["lr"] for step in sft] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3, 2.25e-3, 0.75e-3])
    assert [step["lr"] for step in kto] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert {step["betas"] for step in taken} == {(0.9, 0.9)}

    assert kto[0]["kl"] == 0 and kto[0]["new_kl"] == 0  # the policy is its reference
    assert kto[2]["kl"] != 0
    for before, after in zip(kto, kto[1:], strict=False):
        assert after["kl"] == before["new_kl"].float()


def test_the_start_of_a_run_does_not_load_the_compiler():
    """torch.compile's machinery costs a second a process;
    only --compile and 4-bit layers load it."""
    code = "import sys, train; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
