"""Reference log-probs: whose they are, what identifies their file, and sums of the same bits."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import change_tensors
from safetensors.torch import load_file
from test_train import objective_and_optimizer, small_world  # noqa: F401  (a fixture)
from torch.utils._python_dispatch import TorchDispatchMode

from data import build_tree, tree_widths
from lora import save_adapter
from runtime.policy import stored_dtype
from runtime.stages import check_first_rewards, prepare_reference, tokens_key, weights_key
from train import Schedule


class NoAtomics(TorchDispatchMode):
    """Raises at operations whose CUDA kernels add to one place from several threads."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        adds = ("index_add", "scatter_add", "scatter_reduce", "bincount", "cumsum", "index_put")
        assert not any(word in str(function) for word in adds), str(function)
        return function(*args, **(kwargs or {}))


RAGGED = [[[2], [3, 4, 5, 6, 7, 8, 9, 3, 2]], [[2], [2]], [[7, 2], [8, 8, 8, 2]]]


@pytest.mark.parametrize("titles", [RAGGED, [[[2]]]], ids=["ragged", "one token"])
def test_sums_equal_those_of_index_add_in_a_fixed_order(titles):
    """Forward and gradient; a GPU does not fix the order of index_add."""
    tree = build_tree([[5, 6, 7], [8], [9, 4]][: len(titles)], titles)
    token_logps = torch.randn(len(tree.labels), requires_grad=True)
    weights = torch.randn(len(tree.input_ids), tree.num_completions)

    with NoAtomics():
        sums = tree.sum_logps(token_logps)
        (gradient,) = torch.autograd.grad((sums * weights).sum(), token_logps)
        with pytest.raises(AssertionError, match="index_add"):
            torch.zeros(1).index_add(0, torch.zeros(1, dtype=torch.long), torch.ones(1))
    plain = torch.zeros(weights.numel()).index_add(0, tree.sequence_ids, token_logps)
    torch.testing.assert_close(sums, plain.view(weights.shape), rtol=0, atol=2e-6)
    assert torch.equal(gradient, weights.flatten()[tree.sequence_ids])


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
        dtype = stored_dtype(changed, torch.device("cpu"))
        made_from = {"weights": weights, "token ids": tokens}
        key = prepare_reference(run, made_from, dtype, objective, schedule) if stored else None
        return SimpleNamespace(objective=objective, schedule=schedule, key=key)

    return make


@pytest.mark.parametrize("budget", [500, 100_000])
def test_every_row_is_its_own_examples(stage, budget):
    """Each log-prob is that of its title alone behind its prompt, however the pass is divided; what
    --max_steps 1 never shows is NaN, not 0."""
    made = stage(micro_batch_tokens=budget, max_steps=1)
    objective, seen = made.objective, made.schedule.examples(0)
    encoded, logps = objective.encoded, torch.full(objective.slots.shape, torch.nan)
    with torch.no_grad():
        for e in seen:
            for n, ids in enumerate(encoded.title_ids(e, objective.slots[e])):
                tree = build_tree([encoded.prompts[e]], [[ids]])
                logps[e, n] = objective.model(tree)[0].sum()
    assert 0 < len(seen) < len(logps)
    torch.testing.assert_close(objective.reference_logps, logps, equal_nan=True)


def test_the_stored_file_is_read_whatever_the_division(stage, monkeypatch):
    """Process count, batches, micro-batches, seed and epochs do not matter, and no pass runs."""
    first = stage()
    monkeypatch.setattr("runtime.stages.reference_pass", None)  # calling it would be an error
    others = ({"world_size": 3}, {"batch_size": 4}, {"micro_batch_tokens": 9000}, {"seed": 7})
    for options in (*others, {"epochs": 1.0}):
        made = stage(**options)
        assert made.key == first.key
        assert torch.equal(made.objective.reference_logps, first.objective.reference_logps)


@pytest.mark.parametrize("how", ["flipped", "cut", "without hash"])
def test_a_damaged_file_is_computed_again(stage, tmp_path, how):
    """It is never used, and replaced by one with the bits that it had."""
    whole = stage().objective.reference_logps
    (file,) = tmp_path.glob("reference-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-10] ^= 4 * (how == "flipped")
    file.write_bytes(content[:-4] if how == "cut" else content)
    if how == "without hash":
        file.with_name(f"{file.name}.sha256").unlink()
    assert torch.equal(stage().objective.reference_logps, whole)
    assert torch.equal(load_file(file)["logps"], whole)


def test_the_key_names_all_that_the_log_probs_depend_on(stage):
    """Other weights, tokens, dtype, or a base in 4 bits: another key."""
    others = ({}, {"weights": "v"}, {"tokens": "u"}, {"dtype": "bfloat16"}, {"load_in_4bit": True})
    assert len({stage(max_steps=1, **options).key for options in others}) == 5


def test_the_tokens_key_names_prompts_titles_and_their_order(stage):
    objective = stage(stored=False).objective
    encoded, slots = objective.encoded, objective.slots
    item = int(encoded.examples.candidates[2, slots[2, 0]])
    prompts, titles = [p + 1 for p in encoded.prompts], encoded.completions | {item: [9, 0]}
    others = replace(encoded, prompts=prompts), replace(encoded, completions=titles), encoded
    keys = {tokens_key(other, slots.copy()) for other in others}
    assert tokens_key(encoded, slots) in keys
    assert len(keys | {tokens_key(encoded, slots[:, ::-1])}) == 4


def test_the_weights_key_names_base_and_adapter(stage, tmp_path):
    """Another base, or an adapter of other weights or scaling, is another key; a path is none."""
    model = stage(stored=False).objective.model
    base, other = model.source, shutil.copytree(model.source, tmp_path / "base")
    name = "model.layers.0.mlp.down_proj.weight"
    change_tensors(other / "model.safetensors", lambda tensors: tensors[name][-1, -1].add_(1))
    keys = [weights_key(base, None), weights_key(other, None)]
    changes = (0, {}), (0, {}), (0, {"lora_alpha": 1.0}), (0, {"use_rslora": True}), (1e-3, {})
    for n, (moved, change) in enumerate(changes):
        torch._foreach_add_([p.data for p in model.parameters()], moved)
        model.lora_config |= change
        save_adapter(model, tmp_path / str(n))
        model.name_or_path = "elsewhere"
        keys.append(weights_key(base, tmp_path / str(n)))
    assert keys[2] == keys[3] and len(set(keys)) == 6


def first_rewards(stage, change=0.0, **options):
    """The objective after its first step; its reference was filled by micro-batches of 1 prompt."""
    stage()
    made = stage(**options)
    objective, schedule, logps = made.objective, made.schedule, made.objective.reference_logps
    objective.reference_logps = logps.roll(1, 0) if change == "rows" else logps + change
    with torch.no_grad():
        for batch in schedule.micro_batches(0, 0):
            objective(objective.prepare(batch, schedule.examples(0)))
    return objective


def test_first_rewards_are_zero_to_the_bit_or_to_rounding(stage, capsys):
    """Exactly zero with the micro-batches that filled the file; for the first step alone."""
    check_first_rewards(first_rewards(stage), exact=True)
    assert "at most 0.0e+00 nats per title" in capsys.readouterr().out
    objective = first_rewards(stage, micro_batch_tokens=100_000)
    assert torch.cat(objective.first_rewards).abs().max().item() < 1e-4
    check_first_rewards(objective, exact=True)
    objective(objective.prepare([0, 1], np.arange(2)))
    assert objective.first_rewards is None


@pytest.mark.parametrize("change, exact", [("rows", True), (0.01, True), (0.6, False)])
def test_a_reference_of_other_rows_or_weights_stops_before_training(stage, change, exact):
    """Shifted rows, or 0.01 nat off, are an error in fp32; bf16 lets 0.4 nat pass and 0.6 not."""
    check_first_rewards(first_rewards(stage, 0.4), exact=False)
    with pytest.raises(ValueError, match="differ before training"):
        check_first_rewards(first_rewards(stage, change), exact=exact)


def test_all_ranks_stop_if_the_rewards_of_one_are_wrong(stage, monkeypatch):
    """Otherwise the others would wait for it."""

    def with_a_rank_that_is_wrong(tensor, op):
        assert op == dist.ReduceOp.MAX
        tensor.clamp_(min=0.01)

    objective = first_rewards(stage)
    monkeypatch.setattr("torch.distributed.all_reduce", with_a_rank_that_is_wrong)
    with pytest.raises(ValueError, match="differ before training.*at most 1.0e-02 nats"):
        check_first_rewards(objective, exact=True)
