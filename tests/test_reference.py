"""Reference log-probs: whose they are, what identifies their file, and sums of the same bits."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launch import ROOT, run_script
from safetensors.torch import load_file, save_file
from test_train import objective_and_optimizer, small_world  # noqa: F401  (a fixture)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from data import build_tree, tree_widths
from lora import save_adapter
from runtime.policy import stored_dtype
from runtime.stages import check_first_rewards, prepare_reference, tokens_key, weights_key
from train import Schedule

CPU = torch.device("cpu")


# ---------------------------------------------------------------------- sums over a title's tokens
def ragged_tree():
    """Titles of 1 to 9 tokens, in one example all of them of one token."""
    titles = [[[2], [3, 4, 5, 6, 7, 8, 9, 3, 2]], [[2], [2]], [[7, 2], [8, 8, 8, 2]]]
    return build_tree([[5, 6, 7], [8], [9, 4]], titles)


def index_add(tree, token_logps):
    """The plain form, whose order of additions a GPU does not fix."""
    sums = token_logps.new_zeros(len(tree.input_ids) * tree.num_completions)
    return sums.index_add(0, tree.sequence_ids, token_logps).view(-1, tree.num_completions)


@pytest.mark.parametrize("tree", [ragged_tree(), build_tree([[5]], [[[2]]])], ids=["ragged", "one"])
def test_sums_equal_those_of_index_add(tree):
    """Forward and gradient, in fp32 as exact as adding one after the other; compiled, too."""
    token_logps = torch.randn(len(tree.labels), requires_grad=True)
    weights = torch.randn(len(tree.input_ids), tree.num_completions)
    sums, plain = tree.sum_logps(token_logps), index_add(tree, token_logps)
    exact = index_add(tree, token_logps.double())
    assert sums.shape == plain.shape
    assert (sums - exact).abs().max() <= (plain - exact).abs().max() + 1e-6
    gradients = [torch.autograd.grad((s * weights).sum(), token_logps)[0] for s in (sums, plain)]
    assert torch.equal(*gradients)
    compiled = torch.compile(tree.sum_logps, backend="eager", fullgraph=True)
    assert torch.equal(compiled(token_logps), sums)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # a dry run holds no data
        assert tree.sum_logps(mode.from_tensor(token_logps)).shape == sums.shape


class NoAtomics(TorchDispatchMode):
    """Raises at operations whose CUDA kernels add to one place from several threads."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        adds = ("index_add", "scatter_add", "scatter_reduce", "bincount", "cumsum", "index_put")
        assert not any(word in str(function) for word in adds), str(function)
        return function(*args, **(kwargs or {}))


def test_sums_add_in_a_fixed_order():
    """Neither forward nor backward uses an atomic addition; index_add, which does, is caught."""
    tree = ragged_tree()
    token_logps = torch.randn(len(tree.labels), requires_grad=True)
    with NoAtomics():
        tree.sum_logps(token_logps).sum().backward()
        with pytest.raises(AssertionError, match="index_add"):
            index_add(tree, token_logps)


# ---------------------------------------------------------------------- the pass and its file
@pytest.fixture
def stage(small_world, tmp_path):  # noqa: F811
    """make(**options): a RecPO stage with those options, its reference filled in; its key."""
    config, encoded, _ = small_world

    def make(world_size=1, weights="w", tokens="t", stored=True, **options) -> SimpleNamespace:
        changed = replace(config, **{"batch_size": 5, "micro_batch_tokens": 500} | options)
        objective, _ = objective_and_optimizer(small_world, "recpo")
        widths = tree_widths(encoded, objective.slots)
        schedule = Schedule(changed, changed.epochs, widths, world_size)
        run = SimpleNamespace(config=changed, folder=tmp_path, rank=0)
        made_from, dtype = {"weights": weights, "token ids": tokens}, stored_dtype(changed, CPU)
        key = prepare_reference(run, made_from, dtype, objective, schedule) if stored else None
        return SimpleNamespace(objective=objective, schedule=schedule, key=key, folder=tmp_path)

    return make


@pytest.mark.parametrize("budget", [500, 100_000])
def test_every_row_is_its_own_examples(stage, budget):
    """Each log-prob is that of its title alone behind its prompt, however the pass is divided."""
    objective = stage(micro_batch_tokens=budget).objective
    encoded, logps = objective.encoded, torch.zeros(objective.slots.shape)
    with torch.no_grad():
        for e, prompt in enumerate(encoded.prompts):
            for n, ids in enumerate(encoded.slots(e, objective.slots[e])):
                logps[e, n] = objective.model(build_tree([prompt], [[ids]]))[0].sum()
    torch.testing.assert_close(objective.reference_logps, logps)


def test_examples_that_a_short_stage_never_sees_stay_unknown(stage):
    """With --max_steps 1 only the first step's examples are scored; the others are NaN, not 0."""
    made = stage(max_steps=1)
    known = made.objective.reference_logps.isfinite().all(1).nonzero().squeeze(1).tolist()
    assert known == sorted(made.schedule.examples(0))
    unknown = made.objective.reference_logps.isnan().any(1).sum()
    assert unknown == len(made.schedule.widths) - len(known)


def test_the_stored_file_is_read_whatever_the_division(stage, monkeypatch):
    """Process count, batches, micro-batches, seed and epochs do not matter, and no pass runs."""
    first = stage()
    monkeypatch.setattr("runtime.stages.reference_pass", None)  # calling it would be an error
    others = ({"world_size": 3}, {"batch_size": 4}, {"micro_batch_tokens": 9000}, {"seed": 7})
    for options in (*others, {"epochs": 1.0}):
        made = stage(**options)
        assert made.key == first.key
        assert torch.equal(made.objective.reference_logps, first.objective.reference_logps)


def test_the_key_names_all_that_the_log_probs_depend_on(stage):
    """Other weights, tokens, dtype, or a base in 4 bits: another key."""
    others = ({}, {"weights": "v"}, {"tokens": "u"}, {"dtype": "bfloat16"}, {"load_in_4bit": True})
    assert len({stage(max_steps=1, **options).key for options in others}) == 5


def test_the_tokens_key_names_prompts_titles_and_their_order(stage):
    objective = stage(stored=False).objective
    encoded, slots = objective.encoded, objective.slots
    prompts, swapped = [p.copy() for p in encoded.prompts], slots.copy()
    prompts[3][0] += 1
    swapped[5] = swapped[5][::-1]
    item = int(encoded.examples.candidates[2, slots[2, 0]])
    changes = ({}, {"prompts": prompts}, {"completions": encoded.completions | {item: [9, 0]}})
    keys = [tokens_key(replace(encoded, **change), slots) for change in changes]
    assert len({*keys, tokens_key(encoded, swapped)}) == 4
    assert tokens_key(encoded, slots.copy()) == keys[0]


def test_the_weights_key_names_base_and_adapter(stage, tmp_path):
    """Another base, or an adapter of other weights or scaling, is another key; a path is none."""
    model = stage(stored=False).objective.model
    base = model.source
    shutil.copytree(base, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][-1, -1] += 1
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    changes = {"a": {}, "b": {}, "c": {"lora_alpha": 1.0}, "d": {"use_rslora": True}}
    for name, change in changes.items():
        model.lora_config |= change
        save_adapter(model, tmp_path / name)
        model.name_or_path = "elsewhere"
    for p in model.parameters():
        p.data += 1e-3
    save_adapter(model, tmp_path / "e")
    keys = [weights_key(base, path and tmp_path / path) for path in (None, "a", "b", "c", "d", "e")]
    keys.append(weights_key(tmp_path / "base", None))
    assert keys[1] == keys[2] and len(set(keys)) == 6


@pytest.mark.parametrize("how", ["flipped", "cut", "without hash"])
def test_a_damaged_file_is_computed_again(stage, how):
    """It is never used, and replaced by one with the bits that it had."""
    whole = stage().objective.reference_logps
    (file,) = stage().folder.glob("reference-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-10] ^= 4 * (how == "flipped")
    file.write_bytes(content[:-4] if how == "cut" else content)
    if how == "without hash":
        file.with_name(f"{file.name}.sha256").unlink()
    assert torch.equal(stage().objective.reference_logps, whole)
    assert torch.equal(load_file(file)["logps"], whole)


# ---------------------------------------------------------------------- the first step
def first_rewards(stage, change=lambda logps: logps, **options):
    """The objective after its first step; its reference was filled by micro-batches of 1 prompt."""
    stage()
    made = stage(**options)
    objective, schedule = made.objective, made.schedule
    objective.reference_logps = change(objective.reference_logps)
    with torch.no_grad():
        for batch in schedule.micro_batches(0, 0):
            objective(objective.prepare(batch, schedule.examples(0)))
    return objective


def test_first_rewards_are_zero_to_the_bit_or_to_rounding(stage, capsys):
    """Exactly zero with the micro-batches that filled the file, below 1e-3 nats with others; and
    they are for the first step alone: then, or after a checkpoint, nothing piles up."""
    check_first_rewards(first_rewards(stage), exact=True)
    assert "at most 0.0e+00 nats per title" in capsys.readouterr().out
    objective = first_rewards(stage, micro_batch_tokens=100_000)
    assert torch.cat(objective.first_rewards).abs().max().item() < 1e-4
    check_first_rewards(objective, exact=True)
    assert objective.first_rewards is None
    resumed = stage().objective
    resumed.load_state({})
    for later in (objective, resumed):
        with torch.no_grad():
            later(later.prepare([0, 1], np.arange(2)))
        assert later.first_rewards is None


def test_a_reference_of_other_rows_or_weights_stops_before_training(stage):
    """Shifted rows, or 0.01 nat off, are an error in fp32; bf16 lets 0.4 nat pass and 0.6 not."""
    check_first_rewards(first_rewards(stage, lambda logps: logps + 0.4), exact=False)
    changes = [(lambda logps: logps.roll(1, 0), True), (lambda logps: logps + 0.01, True)]
    for change, exact in (*changes, (lambda logps: logps + 0.6, False)):
        with pytest.raises(ValueError, match="differ before training"):
            check_first_rewards(first_rewards(stage, change), exact=exact)


# what two ranks say of rewards that are wrong on rank 1 alone
TWO_RANKS = f"""
import sys
from types import SimpleNamespace
sys.path.insert(0, {str(ROOT)!r})
import torch
from runtime.processes import setup_distributed
from runtime.stages import check_first_rewards

rank, *_ = setup_distributed()
rewards = [torch.full((2, 4), 0.01 * rank)]
try:
    config = SimpleNamespace(beta=1.0)
    check_first_rewards(SimpleNamespace(first_rewards=rewards, config=config), exact=True)
except ValueError as error:
    open(f"rank-{{rank}}", "w").write(str(error))
"""


def test_all_ranks_stop_if_the_rewards_of_one_are_wrong(tmp_path):
    """Otherwise the others would wait for it."""
    (tmp_path / "two.py").write_text(TWO_RANKS)
    done = run_script(tmp_path / "two.py", processes=2, cwd=tmp_path)
    for rank in (0, 1):
        error = (tmp_path / f"rank-{rank}").read_text()
        assert "differ before training" in error and "at most 1.0e-02 nats" in error, done.stderr
