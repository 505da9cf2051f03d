"""The model against transformers, stored numbers and full sequences instead of a tree."""

import dataclasses
import json
from unittest.mock import patch

import pytest
import torch
from conftest import (
    EOS,
    FAMILIES,
    change_tensors,
    max_diff,
    randomize,
    tiny_config,
    tiny_model,
    transformers_model,
    write_checkpoint,
)
from safetensors.torch import load_file

from data import build_tree
from model import (
    Block,
    RMSNorm,
    SwiGLU,
    Transformer,
    attend,
    generate,
    init_weights,
    load_pretrained,
    save_pretrained,
)

# Spread out on purpose: attention depends on position differences only, so 9000, 9001, ...
# would show little.
LATE_POSITIONS = torch.tensor([[0, 1, 700, 701, 3000, 8191, 12000]])
GOLDEN_IDS = torch.tensor([[1, 17, 90, 4, 55, 120, 33]])


# ------------------------------------------------------------------------ parity
# Without an attention_mask transformers takes a jump in the positions for a new sequence's start.
@torch.no_grad()
def assert_same_logits(theirs, ours, input_ids, position_ids) -> None:
    mask, position_ids = torch.ones_like(input_ids), position_ids.expand(2, 7)
    expected = theirs(input_ids, position_ids=position_ids, attention_mask=mask).logits
    actual = ours.logits(input_ids, position_ids)
    assert actual.dtype == torch.float32 and max_diff(actual, expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tmp_path):
    """A checkpoint written by transformers gives its logits here, also past position 8,192."""
    theirs = transformers_model(family, tmp_path)
    for position_ids in (torch.arange(7)[None], torch.arange(9000, 9007)[None], LATE_POSITIONS):
        input_ids = torch.randint(131, (2, 7))
        assert_same_logits(theirs, load_pretrained(tmp_path), input_ids, position_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_checkpoints_load_here_and_in_transformers(family, tmp_path):
    """In shards or in one file, over what was there before: the same weights, no key left over."""
    auto = pytest.importorskip("transformers").AutoModelForCausalLM
    for seed, shard_bytes in ((0, 20_000), (1, 10**9), (2, 20_000)):
        ours = tiny_model(family, seed)
        save_pretrained(ours, tmp_path, shard_bytes=shard_bytes)
        # transformers prefers model.safetensors to an index
        files = [tmp_path / f"model.safetensors{end}" for end in ("", ".index.json")]
        assert [file.exists() for file in files] == [seed == 1, seed != 1]
        read = load_pretrained(tmp_path).state_dict()
        assert all(torch.equal(read[name], p) for name, p in ours.state_dict().items())
    theirs, info = auto.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_logits(theirs, ours, torch.randint(131, (2, 7)), LATE_POSITIONS)


# Logits of ids 0, 7, 64, 130 behind the last of GOLDEN_IDS at LATE_POSITIONS,
# as transformers 5.23 computes them.
GOLDEN_LOGITS = {
    "llama2": [-0.612189, -0.208519, 0.483427, -0.604973],
    "llama3.1": [-3.468153, -1.954700, 3.231968, -3.278309],
    "llama3.2": [0.862107, 1.765096, -1.619258, 0.568526],
    "qwen2.5": [-5.734116, -5.536404, 6.813451, -4.976344],
    "qwen2.5-tied": [-0.009107, 1.168940, -0.740326, -0.234749],
    "qwen3": [1.478584, 1.256933, -1.648047, 1.316060],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_stored_ones(family):
    """Weights given by a formula lead to the logits that transformers computed from them."""
    model = Transformer(tiny_config(family))
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(model.named_parameters())):
            numbers = torch.arange(p.numel(), dtype=torch.float64)
            wave = torch.sin(numbers * (0.37 + 0.01 * i) + i).view(p.shape)
            p.copy_(1 + 0.3 * wave if name.endswith("norm.weight") else 0.3 * wave)
        logits = model.logits(GOLDEN_IDS, LATE_POSITIONS)[0, -1, [0, 7, 64, 130]]
    assert max_diff(logits, torch.tensor(GOLDEN_LOGITS[family])) < 1e-4


def test_init_weights_is_a_function_of_the_seed():
    """Norms start at one, residual projections smaller."""
    config = dataclasses.replace(tiny_config("llama3.1"), hidden_size=64, intermediate_size=256)
    a, b, c = (init_weights(config, seed) for seed in (3, 3, 4))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert torch.equal(a.model.norm.weight, torch.ones(64))
    wide, residual = a.model.layers[0].mlp.up_proj.weight, a.model.layers[0].mlp.down_proj.weight
    assert wide.std().item() == pytest.approx(64**-0.5, rel=0.05)
    # sqrt(2 x 2 layers)
    assert residual.std().item() == pytest.approx(wide.std().item() / 2, rel=0.05)


# ------------------------------------------------------------------------ files
def test_tied_head_is_not_stored_and_tied_again(tmp_path):
    """And ignored, like old rotary buffers, if a file brings it along."""
    write_checkpoint(tmp_path, "llama3.2")
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    extra = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    change_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.update(extra))
    model = load_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, extra["lm_head.weight"])


def test_loading_casts_to_the_given_dtype(tmp_path):
    """But for rotary frequencies, which stay fp32; saving records it."""
    model = load_pretrained(write_checkpoint(tmp_path), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.inv_freq.dtype == torch.float32
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


# ------------------------------------------------------------------------ the tree
def random_ids(count: int) -> list[int]:
    return torch.randint(3, 131, (count,)).tolist()


def random_batch(num_completions: int, longest: int) -> tuple[list, list]:
    """Three ragged prompts; completions of up to `longest` ids before EOS, prefixes of others."""
    prompts, groups = [random_ids(n) for n in (5, 1, 9)], []
    for _ in prompts:
        group = [random_ids(int(torch.randint(longest + 1, ()))) for _ in range(num_completions)]
        if num_completions > 2:
            group[:3] = [group[0][:1], group[0][:1] + random_ids(longest), []]
        groups.append([ids + [EOS] for ids in group])
    return prompts, groups


def full_sequence_logps(model, prompts, groups) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: each completion behind a prompt of its own; (M,) log-probs and argmaxes."""
    logps, best = [], []
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            ids = torch.tensor([prompt + completion[:-1]])
            logits = model.logits(ids)[0, len(prompt) - 1 :]
            logps.append(logits.log_softmax(-1)[torch.arange(len(completion)), completion])
            best.append(logits.argmax(-1))
    return torch.cat(logps), torch.cat(best)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


@pytest.mark.parametrize("frozen_head, checkpointing", [(0, 0), (1, 0), (0, 1)])
@pytest.mark.parametrize("family", ["llama3.1", "llama3.2", "qwen2.5", "qwen3"])
def test_a_tree_is_its_separate_sequences(family, frozen_head, checkpointing, monkeypatch):
    """Log-probs, argmaxes, sums and every parameter's gradient, EOS-only completions included."""
    model, runs, compute = tiny_model(family), [], Block.compute
    model.lm_head.weight.requires_grad_(not frozen_head)
    monkeypatch.setattr(Block, "compute", lambda *args: runs.append(1) or compute(*args))
    monkeypatch.setattr(Block, "checkpointing", bool(checkpointing))
    for N, longest in ((20, 6), (4, 5), (2, 1), (1, 0)):
        prompts, groups = random_batch(N, longest)
        tree = build_tree(prompts, groups)
        logps, best = model(tree)
        weights = torch.randn(len(logps))
        runs.clear()
        actual = gradients(model, (weights * logps).sum())
        assert len(runs) == 2 * checkpointing  # both blocks are run again in backward, or none
        expected, expected_best = full_sequence_logps(model, prompts, groups)
        assert logps.dtype == torch.float32 and max_diff(logps, expected) < 1e-4
        assert torch.equal(best, expected_best)
        sums = torch.stack([p.sum() for p in expected.split([len(c) for g in groups for c in g])])
        assert max_diff(tree.sum_logps(logps), sums.view(3, N)) < 1e-3
        expected = gradients(model, (weights * expected).sum())
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            # one-token prompts of one completion leave queries and keys without gradient
            if gradient.abs().max() > 0:
                assert max_diff(actual[name], gradient) <= 1e-4 * gradient.abs().max().item(), name


def test_padding_changes_nothing():
    """Its ids and positions leave log-probs and gradients bitwise alone; it gets no gradient."""
    model = tiny_model()
    prompts, groups = random_batch(4, 5)
    tree = build_tree(prompts, groups)
    padding = tree.branch_ids == -1
    assert padding[:, : tree.prompt_width].any() and padding[:, tree.prompt_width :].any()
    ids, places = (torch.randint(high, padding.shape) for high in (131, 10_000))
    poisoned = dataclasses.replace(
        tree,
        input_ids=torch.where(padding, ids, tree.input_ids),
        position_ids=torch.where(padding, places, tree.position_ids),
    )
    logps, best = model(tree)
    poisoned_logps, poisoned_best = model(poisoned)
    assert torch.equal(logps, poisoned_logps) and torch.equal(best, poisoned_best)
    plain = gradients(model, logps.sum())
    poison = gradients(model, poisoned_logps.sum())
    assert all(torch.equal(plain[name], poison[name]) for name in plain)
    assert not plain["model.embed_tokens.weight"][0].any()  # the ids are 3 to 130; padding is 0


def test_tree_of_one_prompt_spelled_out():
    """Positions go on from the prompt, EOS is no input, its last token predicts every branch."""
    tree = build_tree([[10, 11, 12], [13]], [[[20, 21, EOS], [EOS]], [[30, EOS], [31, EOS]]])
    assert (tree.prompt_width, tree.num_completions) == (3, 2)
    assert tree.input_ids.tolist() == [[10, 11, 12, 20, 21], [13, 0, 0, 30, 31]]
    assert tree.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 1]]
    assert tree.branch_ids.tolist() == [[0, 0, 0, 1, 1], [0, -1, -1, 1, 2]]
    assert tree.rows.tolist() == [2, 3, 4, 2, 5, 8, 5, 9]
    assert tree.labels.tolist() == [20, 21, EOS, EOS, 30, EOS, 31, EOS]
    assert tree.sequence_ids.tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
    assert tree.sum_logps(torch.arange(8.0)).tolist() == [[3, 3], [9, 13]]


def test_build_tree_refuses_empty_and_uneven_input():
    groups = [[[EOS], [EOS]], [[EOS]]]
    refused = [([], []), ([[5], [6]], groups), ([[5]], [[]]), ([[]], [[[EOS]]])]
    for prompts, completions in [*refused, ([[5]], [[[EOS], []]])]:
        with pytest.raises(ValueError, match="same number of completions.*nothing may be empty"):
            build_tree(prompts, completions)


# ------------------------------------------------------------------------ building blocks
def test_swiglu_equals_its_formula_and_keeps_two_tensors():
    gate, up = (torch.randn(6, 40, dtype=torch.float64, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        actual = SwiGLU.apply(gate, up)
    assert [t.shape for t in kept] == [gate.shape, up.shape]
    torch.testing.assert_close(actual, torch.nn.functional.silu(gate) * up)
    assert torch.autograd.gradcheck(SwiGLU.apply, (gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_rounds_where_the_published_models_do(dtype):
    """x / rms(x) in fp32, rounded to the input's dtype, then times the weight: bit for bit."""
    norm = randomize(RMSNorm(48, 1e-5)).to(dtype)
    x = (5 * torch.randn(7, 48)).to(dtype)
    scaled = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), norm.weight * scaled.to(dtype))


@pytest.mark.parametrize("how", [{"is_causal": True}, {"attn_mask": torch.ones(5, 5).tril() > 0}])
def test_repeated_heads_are_grouped_heads(how):
    """On CUDA, with a mask or in fp32, K and V are repeated for their query heads."""
    q, (k, v) = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 2, 5, 8)
    grouped = attend(q, k, v, **how)
    with patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True)):
        assert max_diff(attend(q, k, v, **how), grouped) < 1e-6


# ------------------------------------------------------------------------ generation
def naive_greedy(model, prompt, max_new_tokens, stop_ids) -> list[int]:
    """The definition: the whole sequence again for every token."""
    new = []
    while len(new) < max_new_tokens and not (new and new[-1] in stop_ids):
        new.append(int(model.logits(torch.tensor([prompt + new]))[0, -1].argmax()))
    return new


@pytest.mark.parametrize("family", ["llama3.1", "qwen2.5", "qwen3"])
@torch.no_grad()
def test_generate_equals_the_naive_loop(family, monkeypatch):
    """For ragged prompts, token for token, until each has met its first stop id; a rank that waits
    for others changes nothing, and no pass is made in vain."""
    model, steps, inner = tiny_model(family), [], Transformer.decode_step
    prompts = [random_ids(n) for n in (4, 1, 11, 7)]
    free = [naive_greedy(model, prompt, 12, ()) for prompt in prompts]
    assert len({tuple(ids) for ids in free}) > 2
    for stop_ids in ((), {free[0][3], free[2][0]}):
        expected = [naive_greedy(model, prompt, 12, stop_ids) for prompt in prompts]
        assert generate(model, prompts, 12, stop_ids) == expected
        assert generate(model, prompts, 12, stop_ids, any_rank=lambda flag: True) == expected
    assert generate(model, prompts[1:2], 12, ()) == free[1:2]
    monkeypatch.setattr(Transformer, "decode_step", lambda *a: steps.append(1) or inner(*a))
    assert [len(ids) for ids in generate(model, prompts, 12, range(131))] == [1, 1, 1, 1]
    assert len(steps) == 1
    for empty in ([], [[5], []]):
        with pytest.raises(ValueError, match="prompt"):
            generate(model, empty, 4, {EOS})
