"""Whole runs in processes of their own, compared step by step; a step that is not finite."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from families import small_world as make_world
from launch import ROOT, TRAIN, losses, run_script, run_train

from data import build_examples, encode_examples
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, load_interactions
from lora import lora_layers
from losses import target_margins
from runtime.stages import load_stage
from train import Objective, load_policy, train_step

STEP = ("loss", "grad_norm", "nll_loss", "mean_token_accuracy", "preference_loss")


def assert_same_losses(one: dict, other: dict, stages=("sft", "recpo"), atol: float = 1e-4) -> None:
    for stage in stages:
        np.testing.assert_allclose(losses(one, stage), losses(other, stage), atol=atol)


def assert_same_metrics(one: dict, other: dict) -> None:
    """All are means over the global batch."""
    assert_same_losses(one, other)
    for stage in ("sft", "recpo"):
        names = [n for n in one[stage][0] if n in STEP or "/" in n]
        assert len(names) == (4 if stage == "sft" else 13), names
        for name in names:
            pair = [[m[name] for m in run[stage]] for run in (one, other)]
            np.testing.assert_allclose(*pair, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("mode", ["full", "none"])
def test_two_ranks_match_one(one_process, mode):
    """2 processes x accumulation 2 are 1 process x accumulation 4 (fp32, no dropout)."""
    tmp_path, _, one = one_process
    flags = ("--micro_batch_tokens=500", f"--shard={mode}")
    _, two = run_train(tmp_path, f"two-{mode}", *flags, processes=2)
    assert_same_metrics(one, two)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize(
    "processes, flags",
    [(1, ()), (2, ("--shard=full", "--gradient_checkpointing"))],
)
def test_compiled_blocks_give_the_same_run(one_process, processes, flags):
    """The eager losses, over micro-batches of several sizes."""
    tmp_path, _, eager = one_process
    flags = ("--micro_batch_tokens=1500", "--compile", *flags)
    name = f"compiled-{processes}{len(flags)}"
    output, compiled = run_train(tmp_path, name, *flags, processes=processes)
    assert "recompile_limit" not in output and "Traceback" not in output
    assert_same_losses(compiled, eager)


MORE = ("ipo", "simpo", "cpo", "odpo", "kto")


def test_every_loss_trains_whatever_the_micro_batches(tmp_path):
    """Each from the same SFT result; one big micro-batch, or many small ones on two ranks."""
    flags = ("--sft_epochs=1", "--epochs=1.5", "--beta=0.2", f"--stages=sft,{','.join(MORE)}")
    flags += ("--test_size=2", "--no_decode_rest", "--val_size=0")
    parts = ("--micro_batch_tokens=500", "--shard=none")
    _, small = run_train(tmp_path, "small", *flags, *parts, processes=2)
    _, big = run_train(tmp_path, "big", *flags)
    assert_same_losses(small, big, MORE)
    for stage in MORE:
        assert len(big[stage]) == 5 and np.isfinite(losses(big, stage)).all()
    first = {stage: big[stage][0]["preference_loss"] for stage in ("ipo", "kto")}
    assert first == pytest.approx({"ipo": (1 / 0.4) ** 2, "kto": 0.5}, abs=1e-5)
    assert big["kto"][0]["kl"] == 0 and any(m["kl"] != 0 for m in big["kto"][1:])
    assert not list((tmp_path / "big").glob("simpo/reference*"))


def test_five_examples_on_four_ranks(tmp_path):
    """Ranks with fewer examples than others go along with weight 0, and nothing hangs."""
    flags = ("--train_size=5", "--batch_size=5", "--test_size=5", "--epochs=1", "--sft_epochs=1")
    _, four = run_train(tmp_path, "four", *flags, processes=4)
    _, one = run_train(tmp_path, "one", *flags)
    assert_same_metrics(four, one)


def test_preference_stage_starts_from_a_given_adapter(one_process, tmp_path):
    """Policy and reference are that adapter, and the first rewards zero to the last bit."""
    folder, output, metrics = one_process
    assert "before the first step: at most 0.0e+00 nats" in output
    assert metrics["recpo"][0]["rewards/margins"] == 0.0
    run = folder / "one"
    # the base is the one that the adapter names
    flags = (f"--adapter={run / 'recpo'}", "--stages=sdpo")
    output, metrics = run_train(tmp_path, "go-on", *flags)
    assert "before the first step: at most 0.0e+00 nats" in output
    assert metrics["sdpo"][0]["preference_loss"] == pytest.approx(np.log(4), abs=1e-6)
    flags = (f"--model={ROOT / 'demo' / 'base'}", *flags)
    output, _ = run_train(tmp_path, "refused", *flags, expect=1)
    assert "trained on another base" in output and "Traceback" not in output


def test_raw_tests_what_training_starts_from(one_process, tmp_path):
    """Here a finished stage, whose answers it gives; its row is in the table."""
    run = one_process[0] / "one"
    flags = (f"--adapter={run / 'recpo'}", "--stages=raw,dpo", "--max_steps=1")
    output, metrics = run_train(tmp_path, "raw", *flags)
    assert "nothing is trained" in output and "\n| raw |" in output and not metrics.get("raw")
    files = [f / "eval/predictions.jsonl" for f in (run / "recpo", tmp_path / "raw/raw")]
    before, after = ([json.loads(line) for line in f.read_text().splitlines()] for f in files)
    for a, b in zip(before, after, strict=True):
        assert a["answer"] == b["answer"] and np.allclose(a["logps"], b["logps"], atol=1e-4)
    assert load_stage(tmp_path / "raw/raw") == (run / "sft", run / "recpo")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--no_such_flag=1", "unknown option --no_such_flag"),
        ("--model=/no/such/model", "no such directory"),
        ("--dataset=movielens --model=demo/base", "needs --data_dir"),
        ("--data_dir=/no/ml-1m.zip", "--data_dir needs --dataset"),
        ("--dataset=movielens --model=titles --data_dir=/no/folder", "ratings.dat"),
        ("--output_dir=/proc/recpo", "cannot be written"),
    ],
)
def test_bad_input_is_one_clear_message(tmp_path, flags, message):
    places = (f"--output_dir={tmp_path / 'run'}", f"--prepared_dir={tmp_path / 'p'}")
    done = run_script(TRAIN, *places, *flags.split())
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """Options, encoded training examples and a base, in a process group of one."""
    config, prepared, base = make_world(tmp_path_factory.mktemp("world"))
    encoded = encode_examples(prepared.splits["train"], Tokenizer(base), 1024)
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield config, encoded, base
    dist.destroy_process_group()


def objective_and_optimizer(small_world, stage):
    config, encoded, base = small_world
    model, _ = load_policy(config, stage, base, None, torch.device("cpu"))
    objective = Objective(config, stage, model, encoded, torch.device("cpu"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return objective, torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def test_adapters_drop_out_in_sft_alone(small_world):
    """A preference stage compares with its reference, which nothing may shake."""
    config, _, base = small_world
    for stage, dropout in (("sft", 0.1), ("recpo", 0.0)):
        model, _ = load_policy(config, stage, base, None, torch.device("cpu"))
        assert {layer.dropout for layer in lora_layers(model).values()} == {dropout}


@pytest.mark.parametrize("culprit", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(small_world, culprit):
    """NaN leaves weights and moments as they are; reading that step's metrics is an error."""
    objective, optimizer = objective_and_optimizer(small_world, "recpo")
    model, config = objective.model, small_world[0]

    def step(compute):
        batches = [objective.prepare([0, 1], [0, 1])]
        return train_step(model, optimizer, batches, compute, 1e-3, config)

    def poisoned(batch):
        loss, sums = objective(batch)
        bad = {"loss": (sums["loss"][0] * torch.nan, 2.0)}
        return (loss, sums | bad) if culprit == "loss" else (loss * torch.inf, sums)

    def state():
        moments = [v for state in optimizer.state.values() for v in state.values()]
        return [t.clone() for t in (*model.parameters(), *moments)]

    step(objective).read()
    before, result = state(), step(poisoned)
    assert all(map(torch.equal, before, state()))
    with pytest.raises(ValueError, match="not finite; this update was skipped") as error:
        result.read()
    assert error.value.args[1] == ([0] if culprit == "loss" else [])
    step(objective).read()  # and the next one is whole again
    assert not all(map(torch.equal, before, state()))


def test_first_movielens_losses_are_the_derived_ones():
    """RecPO (ratio, λ = 2) starts at about 10.04, as the authors' log does at 10."""
    archive = Path(os.environ.get("RECPO_DATA", ROOT.parent / "shared" / "data")) / "ml-1m.zip"
    if not archive.exists():
        pytest.skip("MovieLens-1M is not at hand")
    config = DataConfig(dataset="movielens", data_dir=str(archive), train_size=10000)
    examples = build_examples(load_interactions(config), config)["train"]
    slots = np.concatenate([examples.target[:, None], examples.negatives(3)], 1)
    scores = torch.from_numpy(np.take_along_axis(examples.scores, slots, 1))
    margins = 2.0 * target_margins(scores[:, 0], scores[:, 1:], "ratio")
    first = torch.nn.functional.softplus(margins.logsumexp(1)).mean().item()
    assert first == pytest.approx(10.04, abs=0.1)
