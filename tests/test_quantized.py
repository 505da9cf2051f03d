"""A base in 4 bits: logits of transformers + bitsandbytes, autograd's gradients, any ranks."""

import numpy as np
import pytest
import torch
from conftest import FAMILIES, change_tensors, max_diff, tiny_model, transformers_model
from families import randomize_adapter, small_world
from launch import losses, run_train

from data import build_tree
from hub.quantized import unquantized
from kernels.nf4 import Linear4bit, matrix, quantize_nf4
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


def write_wide(path, dtype=torch.float32):
    save_pretrained(tiny_model().to(dtype), path)
    return path


TREE = build_tree([[5, 6, 7, 9], [8, 4]], [[[8, 9, 2], [2]], [[7, 7, 2], [11, 2]]])


def adapted(model, **targets):
    return randomize_adapter(apply_lora(model, 4, 8, **targets))


def peer_in_4bit(path, double: bool):
    """transformers' model on bitsandbytes' layers, in fp32."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")  # transformers quantises by it
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    options |= {"load_in_4bit": True, "bnb_4bit_use_double_quant": double}
    quantization = transformers.BitsAndBytesConfig(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    ).eval()
    for module in model.modules():  # where the CPU can, its 4-bit layers compute in bf16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize(
    "family, double", [("llama3.1", False), ("qwen2.5", False), ("qwen2.5", True), ("qwen3", False)]
)
def test_logits_equal_transformers_and_bitsandbytes(family, double, wide, tmp_path):
    """From 16- or 32-bit weights, and from what bitsandbytes stored, plain and double quantised."""
    transformers_model(family, tmp_path / "whole")
    peer = peer_in_4bit(tmp_path / "whole", double)
    peer.save_pretrained(tmp_path / "stored")
    with torch.no_grad():
        expected = peer(INPUT_IDS).logits
        for folder in ["stored"] + ["whole"] * (not double):
            assert max_diff(load_4bit(tmp_path / folder).logits(INPUT_IDS), expected) < 1e-4


def test_a_quantised_checkpoint_needs_the_option(wide, tmp_path):
    """Read as 16 bits it is refused with the option to add; other quantisations by name."""

    def quantise(tensors):
        codes, absmax = quantize_nf4(tensors[UP])
        kind = torch.tensor(list(b'{"quant_type": "nf4", "blocksize": 64}'), dtype=torch.uint8)
        tensors |= {UP: codes[:, None], f"{UP}.quant_state.bitsandbytes__nf4": kind}
        tensors |= {f"{UP}.quant_map": torch.zeros(16), f"{UP}.absmax": absmax}

    change_tensors(write_wide(tmp_path) / "model.safetensors", quantise)
    with pytest.raises(ValueError, match="--load_in_4bit"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="up_proj.weight is quantised as"):
        load_4bit(tmp_path)


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
            results.append(model(TREE)[0].detach())
        held = {(tuple(t.shape), t.dtype) for t in kept if t.ndim == 2}
        assert any(dtype == torch.uint8 for _, dtype in held) and not held & values
    assert max_diff(*results) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapter_gradients_equal_autograds_through_dequantised_weights(
    checkpointing, wide, tmp_path
):
    four, whole = load_4bit(write_wide(tmp_path)), load_pretrained(tmp_path)
    for name, layer in four.named_modules():
        if isinstance(layer, Linear4bit):
            values = matrix(layer.weight, layer.absmax, torch.float32)
            whole.get_submodule(name).weight.data = values
    grads = []
    for model in (four, whole):
        for block in adapted(model).model.layers:
            block.checkpointing = checkpointing
        model.train()(TREE)[0].sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[1].items():
        assert grad.any() and max_diff(grads[0][name], grad) <= 1e-5 * grad.abs().max()


def test_what_is_saved_is_the_16_bit_base(wide, tmp_path):
    """With or without an adapter, not its rounded values, where the base is at hand."""
    base = write_wide(tmp_path / "base", torch.bfloat16)
    model = load_4bit(base, torch.bfloat16)
    with pytest.raises(ValueError, match="unquantized"):
        save_pretrained(model, tmp_path / "saved")
    save_pretrained(unquantized(model), tmp_path / "plain")
    model = adapted(load_4bit(base, torch.bfloat16), target_modules=["q_proj", "up_proj"])
    save_adapter(model, tmp_path / "adapter")
    save_pretrained(merge_lora(model), tmp_path / "merged")
    whole = load_pretrained(base, torch.bfloat16)
    expected = {"plain": {name: p.clone() for name, p in whole.state_dict().items()}}
    expected["merged"] = merge_lora(load_adapter(whole, tmp_path / "adapter")).state_dict()
    for folder, tensors in expected.items():
        saved = load_pretrained(tmp_path / folder, torch.bfloat16).state_dict()
        assert all(torch.equal(saved[name], p) for name, p in tensors.items())
    model = apply_lora(load_4bit(base), 4, 8)
    before, model.source = model.logits(INPUT_IDS), None
    assert max_diff(merge_lora(model).logits(INPUT_IDS), before) < 1e-5


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
@pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="torch 2.11 cannot shard bytes")
def test_two_ranks_match_one_in_4_bits(tmp_path):
    """SFT + RecPO, codes divided over the ranks."""
    flags = ["--load_in_4bit", "--sft_lora_r=4", "--lora_dropout=0", "--sft_epochs=1"]
    flags += ["--epochs=1", f"--model={small_world(tmp_path)[2]}"]
    _, one = run_train(tmp_path, "one", *flags)
    _, two = run_train(tmp_path, "two", *flags, processes=2)
    for stage in ("sft", "recpo"):
        np.testing.assert_allclose(losses(one, stage), losses(two, stage), atol=1e-4)
