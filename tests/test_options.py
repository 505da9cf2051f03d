"""Options: every committed configuration is accepted; what breaks or does nothing is refused by name."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from common import parse_config
from options import READ_BY, TrainConfig

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
        ({"label_smoothing": 2.0, "stages": "sft,dpo"}, "--label_smoothing must be < 0.5"),
        ({"lora_dropout": 1.0}, "--lora_dropout must be < 1"),
        ({"warmup_ratio": -1.0}, "--warmup_ratio must be >= 0"),
        ({"warmup_ratio": float("nan")}, "--warmup_ratio must be >= 0"),
        ({"neg_rating": 0.0}, "--neg_rating must be > 0"),
        ({"adam_beta2": 1.0}, "--adam_beta2 must be < 1"),
        ({"num_negatives": 20}, "--num_negatives must be <= 19"),
        ({"lora_alpha": 0.0}, "--lora_alpha must be > 0"),
        ({"sft_weight": -0.5}, "--sft_weight must be >= 0, or -1"),
        ({"followers": 20}, "--followers must be <= 19"),
        ({"num_templates": 6}, "--num_templates must be <= 5"),
        ({"margin": "square"}, "--margin must be one of ratio, log_diff, log_ratio, none"),
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
    "reference_free": True,
    "label_smoothing": 0.1,
    "ipo_average": True,
    "simpo_gamma": 1.0,
    "odpo_offset": "log_ratio",
    "odpo_alpha": 0.5,
    "kto_desirable": 2.0,
    "kto_undesirable": 2.0,
}
INERT = {
    "margin_lambda": "sdpo",
    "margin": "sdpo",
    "num_negatives": "dpo",
    "negative_source": "sft",
    "reference_free": "simpo",
    "label_smoothing": "recpo",
    "ipo_average": "dpo",
    "simpo_gamma": "recpo",
    "odpo_offset": "dpo",
    "odpo_alpha": "dpo",
    "kto_desirable": "dpo",
    "kto_undesirable": "dpo",
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
