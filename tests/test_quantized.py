"""A base in 4 bits: logits of transformers + bitsandbytes, autograd's gradients, any ranks."""

import numpy as np
import pytest
import torch
from conftest import FAMILIES, change_tensors, max_diff, tiny_model, transformers_model
from families import make_base_model
from launch import ROOT, lines, losses, run_script, run_train, start_train, wait_for
from safetensors.torch import load_file

from data import build_tree
from hub.quantized import unquantized
from kernels.nf4 import Linear4bit, matrix, quantize_nf4
from loaders.frozen import DataConfig, prepare
from lora import apply_lora, load_adapter, lora_layers, merge_lora, save_adapter
from model import load_pretrained, save_pretrained
from train import TrainConfig

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # rows of whole blocks
UP = "model.layers.0.mlp.up_proj.weight"
INPUT_IDS = torch.arange(3, 37).view(2, 17)


def load_4bit(path, dtype=torch.float32):
    return load_pretrained(path, dtype, load_in_4bit=True)


@pytest.fixture
def wide(monkeypatch):
    """The tiny families with rows that are whole blocks."""
    for family, raw in FAMILIES.items():
        monkeypatch.setitem(FAMILIES, family, raw | WIDE)


def write_wide(path, dtype=torch.float32, family="llama3.1"):
    save_pretrained(tiny_model(family).to(dtype), path)
    return path


def adapted(model, **targets):
    """An adapter whose B are not zero."""
    for layer in lora_layers(apply_lora(model, 4, 8, **targets)).values():
        generator = torch.Generator().manual_seed(layer.out_features)
        layer.lora_B.weight.data.normal_(std=0.1, generator=generator)
    return model


def tree_of_two():
    return build_tree([[5, 6, 7, 9], [8, 4]], [[[8, 9, 2], [2]], [[7, 7, 2], [11, 2]]])


def peer_in_4bit(path, double: bool):
    """transformers' model on bitsandbytes' layers, in fp32."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")  # transformers quantises by it
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_use_double_quant=double, **options
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    ).eval()
    for module in model.modules():  # where the CPU can, its 4-bit layers compute in bf16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("family", ["llama3.1", "qwen2.5", "qwen3"])
def test_logits_equal_transformers_and_bitsandbytes(family, double, wide, tmp_path):
    """From 16- or 32-bit weights, and from what bitsandbytes stored, plain and double quantised."""
    pytest.importorskip("bitsandbytes")
    transformers_model(family, tmp_path / "whole")
    peer = peer_in_4bit(tmp_path / "whole", double)
    peer.save_pretrained(tmp_path / "stored")
    with torch.no_grad():
        expected = peer(INPUT_IDS).logits
        for folder in ["stored"] + ["whole"] * (not double):
            assert max_diff(load_4bit(tmp_path / folder).logits(INPUT_IDS), expected) < 1e-4


def test_a_quantised_checkpoint_needs_the_option(wide, tmp_path):
    """Read as 16 bits it is refused with the option to add; other quantisations by name."""
    state = b'{"quant_type": "nf4", "blocksize": 64}'

    def quantise(tensors):
        codes, absmax = quantize_nf4(tensors[UP])
        other_code = {f"{UP}.quant_map": torch.zeros(16), f"{UP}.absmax": absmax}
        kind = torch.tensor(list(state), dtype=torch.uint8)
        tensors |= {UP: codes[:, None], f"{UP}.quant_state.bitsandbytes__nf4": kind} | other_code

    change_tensors(write_wide(tmp_path) / "model.safetensors", quantise)
    with pytest.raises(ValueError, match="--load_in_4bit"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="up_proj.weight is quantised as"):
        load_4bit(tmp_path)


def test_head_embedding_norms_and_biases_stay_as_they_are(wide, tmp_path):
    """Only linear layers of the blocks are quantised, each to the values of its own weight."""
    whole = load_pretrained(write_wide(tmp_path, torch.bfloat16, "qwen2.5"))
    model = load_4bit(tmp_path)
    for name, p in whole.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, Linear4bit) and name.endswith("weight"):
            codes, absmax = quantize_nf4(p)
            assert torch.equal(layer.weight.view(-1), codes)
            assert torch.equal(layer.absmax.view(-1), absmax)
        else:
            assert torch.equal(model.get_parameter(name), p)
    count = sum(isinstance(m, Linear4bit) for m in model.modules())
    assert count == 7 * model.config.num_hidden_layers


@pytest.mark.slow
def test_compiled_blocks_keep_codes_and_no_values(wide, tmp_path):
    """torch.compile changes neither log-probs nor what is held until backward."""
    model = apply_lora(load_4bit(write_wide(tmp_path)), 4, 8).train()
    values = {((m.out_features, m.in_features), torch.float32) for m in lora_layers(model).values()}
    results, kept = [], []
    for compiled in (False, True):
        for block in model.model.layers if compiled else ():
            block.use_compiler()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            results.append(model(tree_of_two())[0].detach())
        held = {(tuple(t.shape), t.dtype) for t in kept if t.ndim == 2}
        assert any(dtype == torch.uint8 for _, dtype in held) and not held & values
    assert max_diff(*results) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapter_gradients_equal_autograds_through_dequantised_weights(
    checkpointing, wide, tmp_path
):
    """Within 1e-5 of the largest, for every A and B, with and without activation checkpointing."""
    four, whole = load_4bit(write_wide(tmp_path)), load_pretrained(tmp_path)
    for name, layer in four.named_modules():
        if isinstance(layer, Linear4bit):
            values = matrix(layer.weight, layer.absmax, torch.float32)
            whole.get_submodule(name).weight.data = values
    grads = []
    for model in (four, whole):
        for block in adapted(model).model.layers:
            block.checkpointing = checkpointing
        model.train()(tree_of_two())[0].sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[1].items():
        assert grad.any() and max_diff(grads[0][name], grad) <= 1e-5 * grad.abs().max()


def test_an_adapter_on_4_bits_merges_into_the_original_weights(wide, tmp_path):
    """What is saved is 16-bit base + adapter, not the rounded base, where the base is at hand."""
    base = write_wide(tmp_path / "base", torch.bfloat16)
    model = adapted(load_4bit(base, torch.bfloat16), target_modules=["q_proj", "up_proj"])
    save_adapter(model, tmp_path / "adapter")
    expected = merge_lora(load_adapter(load_pretrained(base, torch.bfloat16), tmp_path / "adapter"))
    save_pretrained(merge_lora(model), tmp_path / "merged")
    merged = load_pretrained(tmp_path / "merged", torch.bfloat16)
    for name, p in expected.named_parameters():
        assert torch.equal(merged.get_parameter(name), p), name


def test_without_the_original_weights_merging_dequantises(wide, tmp_path):
    """A model whose source is gone keeps the values that it computed with."""
    model = apply_lora(load_4bit(write_wide(tmp_path)), 4, 8)
    before = model.logits(INPUT_IDS)
    model.source = None
    assert max_diff(merge_lora(model).logits(INPUT_IDS), before) < 1e-5


def test_what_is_saved_has_16_bits(wide, tmp_path):
    """Codes are refused by save_pretrained; given back their bits they are the original weights."""
    model = load_4bit(write_wide(tmp_path / "base", torch.bfloat16), torch.bfloat16)
    with pytest.raises(ValueError, match="unquantized"):
        save_pretrained(model, tmp_path / "saved")
    save_pretrained(unquantized(model), tmp_path / "saved")
    expected = load_file(tmp_path / "base" / "model.safetensors")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


def test_what_cannot_be_quantised_is_refused_by_name(monkeypatch, tmp_path):
    """Rows that are no whole blocks; weights that are not finite; a base that nothing trains."""
    save_pretrained(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj has 32 inputs.*64"):
        load_4bit(tmp_path)
    monkeypatch.setitem(FAMILIES, "llama3.1", FAMILIES["llama3.1"] | WIDE)
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan
    save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="model.safetensors.*layers.1.mlp.down_proj.weight"):
        load_4bit(tmp_path)
    with pytest.raises(ValueError, match="no --sft_lora_r 0"):
        TrainConfig(load_in_4bit=True, sft_lora_r=0)


# ------------------------------------------------------------------------ whole runs
@pytest.fixture(scope="module")
def in_4_bits(tmp_path_factory):
    """SFT + RecPO on a base in 4 bits, in one process: (folder, flags, metrics, output)."""
    tmp_path = tmp_path_factory.mktemp("runs")
    data = {"planted_users": 100, "train_size": 12, "followers": 3}
    train = prepare(DataConfig(**data, prepared_dir=str(tmp_path / "titles"))).splits["train"]
    sizes = {"hidden_size": 64, "num_layers": 2, "vocab_size": 400}  # rows of whole blocks
    make_base_model(tmp_path / "base", train, **sizes, seed=0)
    flags = ["--load_in_4bit", "--sft_lora_r=4", "--lora_dropout=0", "--sft_epochs=1"]
    flags += ["--epochs=1", f"--model={tmp_path / 'base'}"]
    output, metrics = run_train(tmp_path, "one", *flags)
    return tmp_path, flags, metrics, output


def test_a_run_in_4_bits_is_evaluated_as_it_was(in_4_bits):
    """eval.py reads from the run that its base is in 4 bits."""
    tmp_path = in_4_bits[0]
    flags = (f"--run={tmp_path / 'one'}", f"--prepared_dir={tmp_path / 'prepared'}")
    evaluated = run_script(ROOT / "eval.py", *flags, "--output_dir=again", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    for stage in ("sft", "recpo"):
        files = (tmp_path / "one" / stage / "eval", tmp_path / "again" / stage)
        answers = [(file / "predictions.jsonl").read_text() for file in files]
        assert answers[0] == answers[1]


def assert_same_losses(a: dict, b: dict) -> None:
    for stage in ("sft", "recpo"):
        np.testing.assert_allclose(losses(a, stage), losses(b, stage), atol=1e-4)


SLOW, OLD = pytest.mark.slow, torch.__version__.split(".")[:2] == ["2", "11"]
needs_newer = pytest.mark.skipif(OLD, reason="torch 2.11 cannot shard bytes")


@pytest.mark.parametrize(
    "processes, mode",
    [
        pytest.param(2, ["--shard=full"], marks=needs_newer),
        pytest.param(2, ["--shard=none"], marks=SLOW),
        pytest.param(4, ["--shard=hybrid", "--shard_group_size=2"], marks=[needs_newer, SLOW]),
    ],
)
def test_several_ranks_match_one_in_4_bits(in_4_bits, processes, mode):
    """Codes divided over 2 ranks, replicated, or divided and kept twice over 4."""
    tmp_path, flags, one, _ = in_4_bits
    name = mode[0].removeprefix("--shard=")
    _, several = run_train(tmp_path, name, *flags, *mode, processes=processes)
    assert_same_losses(one, several)


@needs_newer
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_4_bit_run_goes_on_as_if_nothing_had_happened(in_4_bits, processes):
    """Killed on 2 ranks amid a preference stage, resumed on 1 or 2: the losses of the whole run."""
    tmp_path, flags, one, _ = in_4_bits
    name = f"killed-{processes}"
    flags = [*flags, "--save_steps=1", "--gradient_checkpointing"]
    process = start_train(tmp_path, name, *flags, processes=2)
    file = tmp_path / name / "recpo.unfinished" / "metrics.jsonl"
    wait_for(lambda: lines(file) >= 1, process)
    process.kill()
    _, resumed = run_train(tmp_path, name, *flags, "--resume=auto", processes=processes)
    assert_same_losses(one, resumed)
