"""The model against transformers, stored numbers and its own plain form:
full sequences instead of a tree."""

import dataclasses
import json
from unittest.mock import patch

import pytest
import torch
from conftest import (
    EOS,
    FAMILIES,
    max_diff,
    randomize,
    tiny_config,
    tiny_model,
    transformers_model,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file

from data import PromptTree, build_tree
from model import (
    Block,
    RMSNorm,
    SwiGLU,
    Transformer,
    attend,
    generate,
    init_weights,
    inverse_frequencies,
    load_pretrained,
    save_pretrained,
)

# Spread out on purpose: attention depends on position differences only, so 9000, 9001, ...
# would show little.
LATE_POSITIONS = torch.tensor([[0, 1, 700, 701, 3000, 8191, 12000]])
GOLDEN_IDS = torch.tensor([[1, 17, 90, 4, 55, 120, 33]])


# ------------------------------------------------------------------------ parity
@torch.no_grad()
def assert_same_logits(theirs, ours, input_ids, position_ids) -> None:
    """With an explicit attention_mask, or transformers takes a jump in the positions for the start
    of a new sequence."""
    mask, position_ids = torch.ones_like(input_ids), position_ids.expand(2, 7)
    expected = theirs(input_ids, position_ids=position_ids, attention_mask=mask).logits
    actual = ours.logits(input_ids, position_ids)
    assert actual.dtype == torch.float32 and max_diff(actual, expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tmp_path):
    """A checkpoint written by transformers gives its logits here, also past position 8,192."""
    theirs = transformers_model(family, tmp_path)
    ours = load_pretrained(tmp_path)
    for position_ids in (torch.arange(7)[None], torch.arange(9000, 9007)[None], LATE_POSITIONS):
        assert_same_logits(theirs, ours, torch.randint(131, (2, 7)), position_ids)


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 20_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_checkpoint_loads_in_transformers(family, shard_bytes, tmp_path):
    """A directory written here, in one file or in shards, gives the same logits in transformers,
    no key left over."""
    transformers = pytest.importorskip("transformers")
    ours = tiny_model(family)
    save_pretrained(ours, tmp_path, shard_bytes=shard_bytes)
    auto = transformers.AutoModelForCausalLM
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


def test_llama3_inverse_frequencies_equal_stored_ones(config):
    """Llama-3.1-8B's rotary frequencies: theta 500,000, head size 128, factor 8."""
    inv_freq = inverse_frequencies(dataclasses.replace(config, head_dim=128)).double()
    golden = {
        0: 1.0, 1: 0.814617217, 16: 0.0376060307, 28: 0.00321144611, 29: 0.00216657063,
        32: 5.24846022e-4, 35: 9.55621217e-5, 36: 7.78465546e-5, 40: 3.42810235e-5,
        63: 3.06892588e-7,
    }  # fmt: skip
    assert inv_freq[list(golden)].tolist() == pytest.approx(list(golden.values()), rel=1e-6)
    assert inv_freq.sum().item() == pytest.approx(5.386058263449144, rel=1e-7)


def test_init_weights_is_a_function_of_the_seed(config):
    """Equal seeds give equal weights whatever was drawn before;
    norms start at one, residual projections smaller."""
    config = dataclasses.replace(config, hidden_size=64, intermediate_size=256)
    a = init_weights(config, seed=3)
    torch.rand(5)
    b, c = init_weights(config, seed=3), init_weights(config, seed=4)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert torch.equal(a.model.norm.weight, torch.ones(64))
    wide, residual = a.model.layers[0].mlp.up_proj.weight, a.model.layers[0].mlp.down_proj.weight
    assert wide.std().item() == pytest.approx(64**-0.5, rel=0.05)
    # sqrt(2 x 2 layers)
    assert residual.std().item() == pytest.approx(wide.std().item() / 2, rel=0.05)


# ------------------------------------------------------------------------ files
@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_checkpoint_loads_back(family, tmp_path):
    """Splitting into many files and an index changes no weight."""
    write_checkpoint(tmp_path / "one", family)
    write_checkpoint(tmp_path / "many", family, shard_bytes=20_000)
    assert (tmp_path / "one" / "model.safetensors").exists()
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    one, many = (load_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    for name, p in tiny_model(family).state_dict().items():
        assert torch.equal(one[name], p) and torch.equal(many[name], p), name


@pytest.mark.parametrize(
    "first, second", [(20_000, 10**9), (10**9, 20_000)], ids=["over-shards", "over-single"]
)
def test_saving_again_replaces_the_old_weights(first, second, tmp_path):
    """What is loaded, here and in transformers, is what was saved last,
    whichever way the files were split."""
    write_checkpoint(tmp_path, seed=0, shard_bytes=first)
    write_checkpoint(tmp_path, seed=1, shard_bytes=second)
    assert torch.equal(load_pretrained(tmp_path).lm_head.weight, tiny_model(seed=1).lm_head.weight)
    # transformers prefers model.safetensors to an index
    files = [tmp_path / f"model.safetensors{end}" for end in ("", ".index.json")]
    assert files[0].exists() != files[1].exists()


def test_tied_head_is_not_stored_and_tied_again(tmp_path):
    """A tied head is one tensor: absent from the file, shared after loading,
    and ignored if a file brings it along."""
    write_checkpoint(tmp_path, "llama3.2")
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    assert "lm_head.weight" not in weights
    embedding = weights["model.embed_tokens.weight"]
    extra = {"lm_head.weight": embedding.clone()}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights | extra, file, metadata={"format": "pt"})
    model = load_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, embedding)


def test_loading_casts_to_the_given_dtype(tmp_path):
    """Every parameter takes the dtype asked for, rotary frequencies stay fp32,
    and saving records the dtype."""
    model = load_pretrained(write_checkpoint(tmp_path / "a"), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.inv_freq.dtype == torch.float32
    save_pretrained(model, tmp_path / "b")
    raw = json.loads((tmp_path / "b" / "config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"
    assert load_file(tmp_path / "b" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


# ------------------------------------------------------------------------ the tree
def random_ids(count: int) -> list[int]:
    return torch.randint(3, 131, (count,)).tolist()


def random_batch(num_completions: int, longest: int) -> tuple[list, list]:
    """Three ragged prompts; completions of up to `longest` ids before EOS, none among them,
    and prefixes of others."""
    prompts = [random_ids(n) for n in (5, 1, 9)]
    groups = []
    for _ in prompts:
        group = [random_ids(int(torch.randint(longest + 1, ()))) for _ in range(num_completions)]
        group[0] = group[0][:1] if num_completions > 2 else group[0]
        group[1:2] = [group[0] + random_ids(longest)] if num_completions > 2 else group[1:2]
        group[2:3] = [[]] if num_completions > 2 else group[2:3]
        groups.append([ids + [EOS] for ids in group])
    return prompts, groups


BATCHES = [(N, longest) for N in (1, 2, 4, 20) for longest in (0, 1, 6)]


def full_sequence_logps(model, prompts, groups) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: each completion behind its own copy of the prompt;
    (M,) log-probs and argmaxes, in tree order."""
    logps, best = [], []
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            ids = torch.tensor([prompt + completion[:-1]])
            logits = model.logits(ids)[0, len(prompt) - 1 :]
            logps.append(logits.log_softmax(-1)[torch.arange(len(completion)), completion])
            best.append(logits.argmax(-1))
    return torch.cat(logps), torch.cat(best)


@pytest.mark.parametrize("num_completions, longest", BATCHES)
@pytest.mark.parametrize("family", ["llama3.1", "qwen2.5", "qwen3"])
@torch.no_grad()
def test_tree_equals_separate_sequences(family, num_completions, longest):
    """One pass over the tree gives the log-probs and argmaxes of all its full sequences,
    EOS-only ones included."""
    model = tiny_model(family)
    prompts, groups = random_batch(num_completions, longest)
    tree = build_tree(prompts, groups)
    logps, best = model(tree)
    expected, expected_best = full_sequence_logps(model, prompts, groups)
    assert logps.dtype == torch.float32
    assert max_diff(logps, expected) < 1e-4
    assert torch.equal(best, expected_best)
    lengths = [len(completion) for group in groups for completion in group]
    sums = torch.stack([part.sum() for part in expected.split(lengths)]).view(3, num_completions)
    assert max_diff(tree.sum_logps(logps), sums) < 1e-3


def gradients(model, loss) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("family", ["llama3.1", "llama3.2", "qwen2.5", "qwen3"])
def test_tree_gradients_equal_separate_sequences(family, frozen_head, checkpointing, monkeypatch):
    """Every parameter gets the gradient of the full sequences,
    with and without activation checkpointing."""
    model = tiny_model(family)
    model.lm_head.weight.requires_grad_(not frozen_head)
    runs = []
    compute = Block.compute
    monkeypatch.setattr(Block, "compute", lambda *args: runs.append(1) or compute(*args))
    monkeypatch.setattr(Block, "checkpointing", checkpointing)
    for num_completions, longest in ((4, 5), (1, 0)):
        prompts, groups = random_batch(num_completions, longest)
        logps, _ = model(build_tree(prompts, groups))
        weights = torch.randn(len(logps))
        runs.clear()
        actual = gradients(model, (weights * logps).sum())
        assert len(runs) == 2 * checkpointing  # both blocks are run again in backward, or none
        expected, _ = full_sequence_logps(model, prompts, groups)
        expected = gradients(model, (weights * expected).sum())
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            # one-token prompts of one completion leave queries and keys without gradient
            if gradient.abs().max() > 0:
                assert max_diff(actual[name], gradient) <= 1e-4 * gradient.abs().max().item(), name


def test_padding_changes_nothing():
    """Other ids and positions in the padding leave log-probs and gradients bitwise alone;
    padding gets no gradient."""
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
    """Positions go on from the prompt, EOS is a label but no input,
    and the last prompt token predicts every branch."""
    tree = build_tree([[10, 11, 12], [13]], [[[20, 21, EOS], [EOS]], [[30, EOS], [31, EOS]]])
    assert isinstance(tree, PromptTree) and (tree.prompt_width, tree.num_completions) == (3, 2)
    assert tree.input_ids.tolist() == [[10, 11, 12, 20, 21], [13, 0, 0, 30, 31]]
    assert tree.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 1]]
    assert tree.branch_ids.tolist() == [[0, 0, 0, 1, 1], [0, -1, -1, 1, 2]]
    assert tree.rows.tolist() == [2, 3, 4, 2, 5, 8, 5, 9]
    assert tree.labels.tolist() == [20, 21, EOS, EOS, 30, EOS, 31, EOS]
    assert tree.sequence_ids.tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
    assert tree.sum_logps(torch.arange(8.0)).tolist() == [[3, 3], [9, 13]]


NO_TREES = [
    ([], [], "prompt"),
    ([[5]], [], "0 for 1 prompts"),
    ([[5], [6]], [[[EOS], [EOS]], [[EOS]]], "same number"),
    ([[5]], [[]], "at least 1"),
    ([[]], [[[EOS]]], "empty prompt"),
    ([[5]], [[[EOS], []]], "empty"),
]


@pytest.mark.parametrize("prompts, completions, message", NO_TREES)
def test_build_tree_refuses_what_is_no_tree(prompts, completions, message):
    """Empty or uneven input is a ValueError that says what was expected."""
    with pytest.raises(ValueError, match=message):
        build_tree(prompts, completions)


# ------------------------------------------------------------------------ building blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swiglu_equals_its_formula_and_keeps_two_tensors(dtype):
    """silu(gate) * up and its gradients as autograd has them,
    with only gate and up kept for backward."""
    gate, up = (torch.randn(6, 40).to(dtype).requires_grad_() for _ in range(2))
    upstream, kept = torch.randn(6, 40).to(dtype), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        actual = SwiGLU.apply(gate, up)
    assert [t.shape for t in kept] == [gate.shape, up.shape]
    expected = torch.nn.functional.silu(gate) * up
    assert torch.equal(actual, expected)
    exact_inputs = [t.detach().double().requires_grad_() for t in (gate, up)]
    exact = torch.nn.functional.silu(exact_inputs[0]) * exact_inputs[1]
    truth = torch.autograd.grad(exact, exact_inputs, upstream.double())
    naive = torch.autograd.grad(expected, (gate, up), upstream)
    ours = torch.autograd.grad(actual, (gate, up), upstream)
    for a, n, e in zip(ours, naive, truth, strict=True):
        assert max_diff(a, e) <= 2 * max_diff(n, e) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_rounds_where_the_published_models_do(dtype):
    """x / rms(x) in fp32, rounded to the input's dtype, then times the weight: bit for bit."""
    norm = randomize(RMSNorm(48, 1e-5)).to(dtype)
    x = (5 * torch.randn(7, 48)).to(dtype)
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    expected = norm.weight * scaled.to(dtype)
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize(
    "how", [{"is_causal": True}, {"attn_mask": torch.ones(5, 5).bool().tril()}]
)
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
def test_generate_equals_the_naive_loop(family):
    """Batched decoding of ragged prompts with a cache writes what full logits write,
    token for token."""
    model = tiny_model(family)
    prompts = [random_ids(n) for n in (4, 1, 11, 7)]
    expected = [naive_greedy(model, prompt, 12, ()) for prompt in prompts]
    assert len({tuple(ids) for ids in expected}) > 2
    assert generate(model, prompts, 12, ()) == expected
    assert generate(model, prompts[1:2], 12, ()) == expected[1:2]
    assert generate(model, prompts, 1, ()) == [ids[:1] for ids in expected]


@torch.no_grad()
def test_generate_stops_at_stop_ids():
    """Each prompt ends with its first stop id, included;
    the others go on, and a waiting rank changes nothing."""
    model = tiny_model()
    prompts = [random_ids(n) for n in (4, 1, 11)]
    free = [naive_greedy(model, prompt, 12, ()) for prompt in prompts]
    stop_ids = {free[0][3], free[2][0]}
    expected = [naive_greedy(model, prompt, 12, stop_ids) for prompt in prompts]
    assert expected[2] == free[2][:1] and len(expected[0]) <= 4
    assert generate(model, prompts, 12, stop_ids) == expected
    assert generate(model, prompts, 12, stop_ids, any_rank=lambda flag: True) == expected


def test_generate_makes_no_more_passes_than_needed(monkeypatch):
    """Once every prompt has stopped, no further forward pass is made."""
    model = tiny_model()
    prompts = [random_ids(5), random_ids(2)]
    everything, steps, inner = range(131), [], Transformer.decode_step
    monkeypatch.setattr(Transformer, "decode_step", lambda *a: steps.append(1) or inner(*a))
    assert [len(ids) for ids in generate(model, prompts, 12, everything)] == [1, 1]
    assert len(steps) == 1


@pytest.mark.parametrize("prompts", [[], [[5], []]])
def test_generate_refuses_empty_prompts(prompts, config):
    """There is no row that could predict the first token of an empty prompt."""
    with pytest.raises(ValueError, match="prompt"):
        generate(init_weights(config, seed=0), prompts, 4, {EOS})
