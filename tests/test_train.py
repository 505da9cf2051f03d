"""Training as a user runs it: whole runs in processes of their own, compared step by step."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from families import make_base_model
from launch import ROOT, TRAIN, losses, run_script, run_train
from torch.utils._python_dispatch import TorchDispatchMode

from data import build_examples
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, encode_split, load_interactions, prepare
from lora import lora_layers
from losses import target_margins
from runtime.stages import load_stage
from train import Objective, Schedule, TrainConfig, load_policy, train_step


def assert_same_losses(one: dict, other: dict, stages=("sft", "recpo"), atol: float = 1e-4) -> None:
    for stage in stages:
        np.testing.assert_allclose(losses(one, stage), losses(other, stage), atol=atol)


@pytest.mark.parametrize("mode", ["full", "none"])
def test_two_ranks_match_one(one_process, mode):
    """2 processes x accumulation 2 give the loss curves of 1 process x accumulation 4 (fp32,
    dropout 0: full SFT)."""
    tmp_path, _, one = one_process
    flags = ("--micro_batch_tokens=500", f"--shard={mode}")
    _, two = run_train(tmp_path, f"two-{mode}", *flags, processes=2)
    assert_same_losses(one, two)
    for stage in ("sft", "recpo"):
        norms = [[m["grad_norm"] for m in run[stage]] for run in (one, two)]
        np.testing.assert_allclose(*norms, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler on a CPU")
@pytest.mark.parametrize(
    "processes, flags",
    [(1, ()), (2, ("--shard=full", "--gradient_checkpointing")), (2, ("--shard=none",))],
)
def test_compiled_blocks_give_the_same_run(one_process, processes, flags):
    """--compile, with checkpointing and shards too:
    the eager losses, over micro-batches of several sizes."""
    tmp_path, _, eager = one_process
    name = f"compiled-{processes}{len(flags)}"
    output, compiled = run_train(
        tmp_path, name, "--micro_batch_tokens=1500", "--compile", *flags, processes=processes
    )
    assert "recompile_limit" not in output and "Traceback" not in output
    assert_same_losses(compiled, eager)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler on a CPU")
def test_compiled_checkpointing_draws_the_same_dropout(tmp_path):
    """What checkpointing runs again in a compiled block drops the same elements as the first
    time."""
    flags = ("--compile", "--sft_lora_r=4", "--lora_dropout=0.3", "--stages=sft")
    kept = run_train(tmp_path, "kept", *flags)[1]
    again = run_train(tmp_path, "again", *flags, "--gradient_checkpointing")[1]
    assert_same_losses(kept, again, ["sft"], atol=1e-5)


MORE = ("ipo", "simpo", "cpo", "odpo", "kto")


def test_every_loss_trains_whatever_the_micro_batches(tmp_path):
    """Each from the same SFT result;
    one big micro-batch and many small ones, on two ranks, give the same losses."""
    flags = ("--sft_epochs=1", "--epochs=1.5", "--beta=0.2", f"--stages=sft,{','.join(MORE)}")
    _, small = run_train(
        tmp_path, "small", *flags, "--micro_batch_tokens=500", "--shard=none", processes=2
    )
    _, big = run_train(tmp_path, "big", *flags)
    assert_same_losses(small, big, MORE)
    for stage in MORE:
        assert len(big[stage]) == 5 and np.isfinite(losses(big, stage)).all()
    first = {stage: big[stage][0]["preference_loss"] for stage in ("ipo", "kto")}
    assert first == pytest.approx({"ipo": (1 / 0.4) ** 2, "kto": 0.5}, abs=1e-5)
    assert big["kto"][0]["kl"] == 0 and any(m["kl"] != 0 for m in big["kto"][1:])
    assert not list((tmp_path / "big").glob("simpo/reference*"))


def test_one_big_batch_matches_accumulation(one_process):
    """Micro-batches only cost memory: one forward pass per step gives the losses of four."""
    tmp_path, _, accumulated = one_process
    _, big = run_train(tmp_path, "big", "--micro_batch_tokens=100000")
    assert_same_losses(big, accumulated)


def test_rewards_before_the_first_step_are_exactly_zero(one_process):
    """Reference and policy run the same micro-batches,
    so the first rewards are zero to the last bit in fp32."""
    _, output, metrics = one_process
    assert "before the first step: at most 0.0e+00 nats" in output
    assert metrics["recpo"][0]["rewards/margins"] == 0.0


def test_five_examples_on_four_ranks(tmp_path):
    """Ranks without examples of their own go along with weight 0:
    nothing hangs, in training nor in decoding."""
    flags = ("--train_size=5", "--batch_size=5", "--test_size=5", "--epochs=1", "--sft_epochs=1")
    _, four = run_train(tmp_path, "four", *flags, processes=4)
    _, one = run_train(tmp_path, "one", *flags)
    assert_same_losses(four, one)


def test_preference_stage_starts_from_a_given_adapter(one_process, tmp_path):
    """--stages recpo --adapter DIR: policy and reference are that adapter;
    an adapter of another base is refused."""
    run = one_process[0] / "one"
    # the base is the one that the adapter names
    flags = (f"--adapter={run / 'recpo'}", "--stages=sdpo")
    output, metrics = run_train(tmp_path, "go-on", *flags)
    assert "before the first step: at most 0.0e+00 nats" in output
    assert metrics["sdpo"][0]["preference_loss"] == pytest.approx(np.log(4), abs=1e-6)
    output, _ = run_train(
        tmp_path, "refused", f"--model={ROOT / 'demo' / 'base'}", *flags, expect=1
    )
    assert "trained on another base" in output and "Traceback" not in output


def test_raw_tests_what_training_starts_from(one_process, tmp_path):
    """--stages raw: the start's own answers, here those of a finished stage;
    its row is in the table, and eval.py finds it."""
    run = one_process[0] / "one"
    output, metrics = run_train(
        tmp_path, "raw", f"--adapter={run / 'recpo'}", "--stages=raw,dpo", "--max_steps=1"
    )
    assert "nothing is trained" in output and "\n| raw |" in output and not metrics.get("raw")
    files = [f / "eval/predictions.jsonl" for f in (run / "recpo", tmp_path / "raw/raw")]
    before, after = ([json.loads(line) for line in f.read_text().splitlines()] for f in files)
    for a, b in zip(before, after, strict=True):
        assert a["answer"] == b["answer"] and np.allclose(a["logps"], b["logps"], atol=1e-4)
    assert load_stage(tmp_path / "raw/raw") == (run / "sft", run / "recpo")


BAD = [
    ("--num_negatives=0", "--num_negatives must be >= 1"),
    ("--no_such_flag=1", "unknown option --no_such_flag"),
    ("--stages=recpo,sft", "--stages"),
    ("--stages=sft,raw", "--stages: raw and sft first"),
    ("--model=/no/such/model", "no such directory"),
    ("--dataset=movielens --data_dir=ml-1m.zip", "--dataset movielens needs a --model"),
    ("--dataset=movielens --model=demo/base", "needs --data_dir"),
    ("--dataset=movielens --model=titles --data_dir=/no/folder", "ratings.dat"),
    ("--model=titles --adapter=a", "a new base, which no --adapter fits"),
    ("--output_dir=/proc/recpo", "cannot be written"),
    ("--config=/no/such.json", "no such file"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_input_is_one_clear_message(tmp_path, flags, message):
    """What a user can get wrong ends in one line that names it, and a non-zero exit."""
    places = (f"--output_dir={tmp_path / 'run'}", f"--prepared_dir={tmp_path / 'p'}")
    done = run_script(TRAIN, *places, *flags.split())
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]


class Reads(TorchDispatchMode):
    """Raises at what makes the host wait for a GPU:
    reading a value, or a result whose size depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")
    INDEXING = ("aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indexed = str(function) in self.INDEXING
        by_mask = indexed and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or any(name in str(function) for name in self.NAMES):
            raise AssertionError(f"{function} waits for the GPU")
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """Options, encoded training examples and a base model of the planted world,
    in a process group of one."""
    folder = tmp_path_factory.mktemp("world")
    data = {"planted_users": 100, "followers": 3, "train_size": 12}
    config = TrainConfig(**data, prepared_dir=str(folder / "p"))
    prepared = prepare(config)
    sizes = {"hidden_size": 64, "num_layers": 2, "vocab_size": 400}
    make_base_model(folder / "base", prepared.splits["train"], **sizes, seed=0)
    encoded = encode_split(prepared, "train", Tokenizer(folder / "base"), 1024)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield config, encoded, folder / "base"
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


@pytest.mark.parametrize("stage", ["sft", "recpo"])
def test_a_step_never_waits_for_the_gpu(small_world, stage):
    """Between its first forward and its update a step reads no value;
    its metrics are read afterwards."""
    objective, optimizer = objective_and_optimizer(small_world, stage)
    batches = [objective.prepare(batch, range(4)) for batch in ([0, 1], [2, 3], [])]
    # gloo copies on the host, and the CPU's fused AdamW reads its flag there;
    # on a GPU both stay on the device
    with (
        patch("torch.distributed.all_reduce"),
        patch.object(optimizer, "step") as step,
        Reads(),
        no_reading_methods(),
    ):
        result = train_step(objective.model, optimizer, batches, objective, 1e-3, small_world[0])
    assert step.called and optimizer.found_inf.item() == 0
    metrics = result.read()
    assert np.isfinite(list(metrics.values())).all() and metrics["learning_rate"] == 1e-3


READING_METHODS = ("item", "tolist", "cpu", "numpy")
READING_METHODS += ("__bool__", "__int__", "__float__", "__index__")


@contextlib.contextmanager
def no_reading_methods():
    """Methods of a CPU tensor that dispatch nothing, but would wait for a GPU."""

    def refuse(*args, **kwargs):
        raise AssertionError("reading a tensor waits for the GPU")

    with contextlib.ExitStack() as stack:
        for name in READING_METHODS:
            stack.enter_context(patch.object(torch.Tensor, name, refuse))
        yield


READS = ("x.sum().item()", "x.tolist()", "x.cpu()", "bool(x[0] > 0)", "x[x > 0]", "float(x[0])")


@pytest.mark.parametrize("read", (*READS, "torch.nonzero(x)"))
def test_the_guard_against_waiting_works(read):
    """Each way of reading a value is caught."""
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="waits"), Reads(), no_reading_methods():
        eval(read, {"x": x, "torch": torch})


@pytest.mark.parametrize("culprit", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(small_world, culprit):
    """NaN in loss or gradient leaves weights and moments as they are;
    reading that step's metrics is an error."""
    objective, optimizer = objective_and_optimizer(small_world, "recpo")
    model, config = objective.model, small_world[0]

    def step(compute):
        batches = [objective.prepare([0, 1], [0, 1])]
        return train_step(model, optimizer, batches, compute, 1e-3, config)

    def poisoned(batch):
        loss, sums = objective(batch)
        if culprit == "loss":
            return loss, sums | {"loss": (sums["loss"][0] * torch.nan, 2.0)}
        return loss * torch.inf, sums

    def state():
        moments = [v for state in optimizer.state.values() for v in state.values()]
        return [t.clone() for t in (*model.parameters(), *moments)]

    step(objective).read()
    before = state()
    result = step(poisoned)
    assert all(map(torch.equal, before, state()))
    with pytest.raises(ValueError, match="not finite; this update was left out") as error:
        result.read()
    assert error.value.args[1] == ([0] if culprit == "loss" else [])
    step(objective).read()  # and the next one is whole again
    assert not all(map(torch.equal, before, state()))


def test_every_step_covers_each_example_once_per_epoch():
    """Batches are a function of (seed, epoch, step);
    an epoch is a permutation, whatever the number of ranks."""
    config = TrainConfig(batch_size=8, micro_batch_tokens=100)
    widths = np.random.default_rng(0).integers(5, 30, size=(37, 2))
    one, three = Schedule(config, 2, widths, 1), Schedule(config, 2, widths, 3)
    assert one.num_steps == 10
    for epoch in range(2):
        steps = range(5 * epoch, 5 * epoch + 5)
        assert sorted(np.concatenate([one.examples(s) for s in steps])) == list(range(37))
        for s in steps:
            taken = sorted(
                i for rank in range(3) for batch in three.micro_batches(s, rank) for i in batch
            )
            assert taken == sorted(one.examples(s))
    assert list(one.examples(0)) != list(one.examples(5))


def test_first_movielens_losses_are_the_derived_ones():
    """At policy = reference: S-DPO log 4 = 1.386;
    RecPO (ratio, lambda 2) about 10.04, as the authors' log starts at 10."""
    archive = Path(os.environ.get("RECPO_DATA", ROOT.parent / "shared" / "data")) / "ml-1m.zip"
    if not archive.exists():
        pytest.skip("MovieLens-1M is not at hand")
    config = DataConfig(dataset="movielens", data_dir=str(archive), train_size=10000)
    examples = build_examples(load_interactions(config), config)["train"]
    slots = np.concatenate([examples.target[:, None], examples.negatives(3)], 1)
    scores = torch.from_numpy(np.take_along_axis(examples.scores, slots, 1))
    margins = 2.0 * target_margins(scores[:, 0], scores[:, 1:], "ratio")
    assert torch.nn.functional.softplus(margins.logsumexp(1)).mean().item() == pytest.approx(
        10.04, abs=0.1
    )
