"""Options: every committed configuration is accepted; what breaks or does nothing is refused."""

import json
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import write_json
from launch import TINY

import train
from common import parse_config, read_json
from demo.pretrain import BASE
from eval import summarise
from runtime.stages import save_predictions
from studies.tables import command_of
from train import TrainConfig

ROOT = Path(__file__).parents[1]


def test_committed_configurations_and_tables_are_accepted():
    """What studies.tables hands to train.py; data and model where the table leaves them open."""
    for file in ROOT.glob("configs/*.json"):
        assert parse_config(TrainConfig, ["--config", str(file)]).stage_list
    for file in ROOT.glob("configs/tables/*.json"):
        table = json.loads(file.read_text())
        table["common"] = {"dataset": "planted"} | table["common"]
        table["training"] = {"model": "demo/base"} | table["training"]
        for run in (run for run in table["runs"] if "script" not in run):
            own = {name: value for name, value in run.items() if name != "after"}
            config = parse_config(TrainConfig, command_of(table, own, Path("runs"), 1)[2:])
            assert config.stages == run["stages"]


REFUSED = [  # options, what the message says
    ({"lora_dropout": 1.0}, "--lora_dropout must be >= 0, < 1, got 1.0"),
    ({"warmup_ratio": float("nan")}, "--warmup_ratio must be a finite number, got nan"),
    ({"sft_weight": -0.5}, "--sft_weight must be >= 0 or -1"),
    ({"margin": "square"}, "--margin must be one of ratio, log_diff, log_ratio, none"),
    ({"margin": "none", "margin_lambda": 1.0}, "--margin_lambda has no effect"),
    ({"history": 4}, "--min_history 5 .*--history 4"),
    ({"stages": "recpo,sft"}, "--stages: raw and sft first"),
    ({"stages": "sft,dpo,dpo"}, "--stages: .*each once"),
    ({"dataset": "movielens"}, "--dataset movielens needs a --model"),
    ({"model": "titles", "adapter": "a"}, "a new base: no --adapter"),
    ({"model": "titles", "prompt_format": "chat"}, "a new base: .*no chat"),
    ({"dataset": "prepared", "model": "m", "ratings": False}, "--ratings does not go with"),
    ({"keep": "best"}, "--keep best needs --eval_steps"),
]
FILES = [  # content of a --config file, what the message says
    ('{"learning_rte": 1e-3}', "c.json: unknown option --learning_rte; .*--learning_rate"),
    ('{"batch_size": 1.5}', "c.json: argument --batch_size: invalid int value"),
    ('{"beta": true}', "c.json: argument --beta: expected one argument"),
    ('["beta"]', "c.json: expected a JSON object, got list"),
    ("", "c.json: not valid JSON"),
    ('{"margin": "square"}', "--margin must be one of"),
]
FLAGS = [
    ("--learning_rte=1", "unknown option --learning_rte; did you mean --learning_rate?"),
    ("--beta=x", "argument --beta: invalid float value: 'x'"),
]


def test_bad_options_are_refused_by_name(tmp_path):
    """Bounds stand beside the option; flags and --config files meet the same ones."""
    file = tmp_path / "c.json"
    for options, message in REFUSED:
        with pytest.raises(ValueError, match=message):
            TrainConfig(**options)
    for content, message in FILES:
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            parse_config(TrainConfig, ["--config", str(file)])
    for flag, message in FLAGS:
        with pytest.raises(ValueError, match=re.escape(message)):
            parse_config(TrainConfig, [flag])


def test_flags_go_over_a_config_file(tmp_path):
    file = tmp_path / "c.json"
    file.write_text('{"beta": 1e-05, "compile": true, "decode_rest": true, "model": "-m"}')
    config = parse_config(TrainConfig, ["--config", str(file), "--no_decode_rest"])
    assert (config.beta, config.compile, config.decode_rest) == (1e-05, True, False)
    assert config.model == "-m"


INERT = [  # flags, and what must be added for them to have an effect
    *((f"--stages=recpo --{flag}", "--stages=sft") for flag in (
        "history_weight=0.1", "sft_epochs=2", "lora_dropout=0", "sft_lora_r=4",
        "sft_learning_rate=1e-3",
    )),
    *((f"--stages=sft --{flag}", "--stages=sft,dpo") for flag in (
        "beta=1.0", "sft_weight=1", "epochs=2", "learning_rate=1e-3", "negative_source=random",
    )),
    ("--stages=sft,sdpo --margin_lambda=1", "--stages=recpo"),
    ("--stages=sft,sdpo --margin=log_diff", "--stages=recpo"),
    ("--stages=sft,dpo --num_negatives=2", "--stages=sdpo"),
    ("--shard_group_size=2", "--shard=hybrid"),
    ("--val_size=0 --eval_steps=5", "--val_size=9"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "more"), INERT)
def test_a_typed_option_that_nothing_reads_is_refused(tmp_path, flags, more):
    """Not in a configuration that several runs share, and not beside what reads it."""
    *others, inert = flags.split()
    name, value = inert.removeprefix("--").split("=")
    with pytest.raises(ValueError, match=f"--{name} is read by .* leave it out"):
        parse_config(TrainConfig, flags.split())
    parse_config(TrainConfig, [*others, inert, more])
    parse_config(TrainConfig, ["--shared", *others, inert])
    file = tmp_path / "c.json"
    file.write_text(json.dumps({name: value}))
    parse_config(TrainConfig, [f"--config={file}", *others])


# ------------------------------------------------------------------------ from options to steps
def test_options_of_the_step_reach_every_step_of_their_stage(in_process, tmp_path, monkeypatch):
    """20 prompts in steps of 8: 2 epochs of SFT are 6 steps, one of KTO 3, each with its peak."""
    taken, inner = [], train.train_step

    def spy(model, optimizer, batches, objective, lr, config, replicas):
        betas, kl = optimizer.param_groups[0]["betas"], getattr(objective, "kl", None)
        result = inner(model, optimizer, batches, objective, lr, config, replicas)
        taken.append((lr, betas, kl, result.on_device.get("kl")))
        return result

    monkeypatch.setattr(train, "train_step", spy)
    flags = ["--stages=sft,kto", "--beta=0.1", "--sft_epochs=2", "--epochs=1", "--warmup_ratio=0.5"]
    flags += ["--sft_learning_rate=3e-3", "--learning_rate=1e-3", "--adam_beta2=0.9"]
    flags += ["--val_size=0", "--test_size=2", "--no_decode_rest"]
    flags += [f"--output_dir={tmp_path / 'run'}", f"--prepared_dir={tmp_path / 'p'}"]
    in_process(train.main, *TINY, *flags)
    rates, betas, used, brought = zip(*taken, strict=True)
    assert rates[:6] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3, 2.25e-3, 0.75e-3])
    assert rates[6:] == pytest.approx([5e-4, 1e-3, 1e-3]) and set(betas) == {(0.9, 0.9)}
    assert brought[:6] == (None,) * 6 and used[6] == brought[6] == 0  # the policy is its reference
    assert used[7] == brought[6].float() and used[8] == brought[7].float() != 0


def test_defaults_suit_the_model(tmp_path, capsys):
    """Below 50 million parameters, for titles of one's own, above; which holds is said."""
    large = read_json(BASE / "config.json") | {"hidden_size": 1024, "vocab_size": 64000}
    write_json(tmp_path / "config.json", large)
    for model, file in ((BASE, "small.json"), ("titles", "titles.json"), (tmp_path, None)):
        found = train.defaults({"model": str(model), "dataset": "csv"})
        assert found == (read_json(ROOT / "configs" / file) if file else {})
        assert (f"configs/{file}" if file else "the paper's") in capsys.readouterr().out


def test_a_trained_stage_whose_answers_are_mostly_invalid_is_warned_of(tmp_path, capsys):
    """On the screen and in results.md; the raw model is not."""
    record = {"logps": [0.0, -1.0], "target_slot": 0, "how": "verified", "hit": False}
    for stage, valid in (("raw", 4), ("sft", 4), ("recpo", 5)):
        metrics = summarise([record | {"valid": n < valid} for n in range(10)])
        save_predictions(tmp_path / stage / "eval", metrics, [])
    config = TrainConfig(stages="raw,sft,recpo", history=9)  # the optimum is not known
    train.write_results(Mock(folder=tmp_path, config=config, data_hash="0" * 64))
    for text in (capsys.readouterr().out, (tmp_path / "results.md").read_text()):
        assert text.count("WARNING") == text.count("WARNING: sft: only 40.0%") == 1
