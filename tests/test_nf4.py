"""4-bit weights equal bitsandbytes' bit for bit; projections autograd's through their values."""

import pytest
import torch
from conftest import max_diff

from kernels.logps import HAS_TRITON
from kernels.nf4 import CODE, dequantize_nf4, linear_4bit, quantize_nf4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# whole blocks; a ragged last block, of an odd number of values; less than a block; several pieces
SHAPES = [(128, 256), (129, 70), (7, 33), (1, 1), (2000, 640)]
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# what bitsandbytes 0.50.2 makes of `golden_weight`: checked without it
GOLDEN_CODES = (
    "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c17777777777777777"
    "777777777777777777777777777777777777777777777777e2af4c16e18e3b05d17e29f3b05d18e2"
    "af4c16d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17"
)
GOLDEN_ABSMAX = [0.78125, 0.0, 0.78125, 0.78125]


def golden_weight() -> torch.Tensor:
    """Exact in every dtype: three whole blocks, the second of zeros, and a ragged one."""
    weight = ((torch.arange(217) * 37) % 101 - 50) / 64
    weight[64:128] = 0
    return weight


def weight_of(shape, dtype) -> torch.Tensor:
    """Normal weights whose first block is zero where there is a second one."""
    weight = torch.randn(shape) * 0.02
    if weight.numel() > 64:
        weight.view(-1)[:64] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_absmax_equal_the_stored_ones(dtype):
    """Codes, absmax and zeros of a zero block are what bitsandbytes stores, in every dtype."""
    codes, absmax = quantize_nf4(golden_weight().to(dtype))
    assert bytes(codes.tolist()).hex() == GOLDEN_CODES
    assert absmax.tolist() == GOLDEN_ABSMAX and absmax.dtype == torch.float32
    values = dequantize_nf4(codes, absmax, (217,), torch.float32)
    assert not values[64:128].any()
    scale = absmax.repeat_interleave(64)[:217]
    # no code lies nearer than the chosen one
    distances = (golden_weight() - scale * torch.tensor(CODE)[:, None]).abs()
    torch.testing.assert_close((golden_weight() - values).abs(), distances.amin(0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_absmax_and_values_equal_bitsandbytes(dtype, shape):
    """Bit for bit, whatever the dtype of the weight and of the values."""
    peer = pytest.importorskip("bitsandbytes.functional")
    weight = weight_of(shape, dtype)
    expected, state = peer.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    codes, absmax = quantize_nf4(weight)
    assert torch.equal(codes, expected.view(-1)) and torch.equal(absmax, state.absmax)
    for out in DTYPES:
        state.dtype = out
        values = dequantize_nf4(codes, absmax, shape, out)
        assert values.dtype == out and torch.equal(values, peer.dequantize_4bit(expected, state))


@NEEDS_TRITON
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_triton_kernel_equals_the_plain_form(dtype, shape):
    """Bit for bit, ragged and odd shapes, other block sizes and views into buffers included."""
    for blocksize in (64, 128):
        codes, absmax = quantize_nf4(weight_of(shape, torch.float32).to(DEVICE), blocksize)
        amid = torch.cat([codes.new_full((3,), 255), codes, codes.new_full((3,), 255)])[3:-3]
        plain = dequantize_nf4(codes, absmax, shape, dtype, "reference", blocksize)
        for given in (codes, amid):
            assert torch.equal(
                plain, dequantize_nf4(given, absmax, shape, dtype, "triton", blocksize)
            )


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("at", [0, 100, 129])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad, at):
    """Its block would become NaN without a word."""
    weight = torch.randn(130)
    weight[at] = bad
    with pytest.raises(ValueError, match="layers.3.up_proj.weight holds inf or NaN"):
        quantize_nf4(weight, name="layers.3.up_proj.weight")


def test_wrong_sizes_and_words_are_refused():
    """Codes or absmax of another shape, an unknown impl, an odd block: a ValueError each."""
    codes, absmax = quantize_nf4(torch.randn(4, 64))
    with pytest.raises(ValueError, match="192 bytes of codes.*got 128"):
        dequantize_nf4(codes, absmax, (6, 64), torch.float32)
    with pytest.raises(ValueError, match="expected 4 fp32 absmax.*got 3"):
        dequantize_nf4(codes, absmax[:3], (4, 64), torch.float32)
    with pytest.raises(ValueError, match="'cuda'.*reference"):
        dequantize_nf4(codes, absmax, (4, 64), torch.float32, impl="cuda")
    with pytest.raises(ValueError, match="got 63"):
        quantize_nf4(torch.randn(4, 64), 63)


def test_a_projection_equals_autograd_through_the_values():
    """Output and gradient of the input are those of a plain layer with the dequantised weight."""
    codes, absmax = quantize_nf4(torch.randn(48, 128))
    codes, absmax = codes.view(48, 64), absmax.view(48, 2)
    weight = dequantize_nf4(codes, absmax, (48, 128), torch.float32)
    x, bias, upstream = torch.randn(2, 5, 128), torch.randn(48), torch.randn(2, 5, 48)
    grads = []
    for function in (
        lambda x: linear_4bit(x, codes, absmax, bias),
        lambda x: torch.nn.functional.linear(x, weight, bias),
    ):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.backward(upstream)
        grads.append((y.detach(), leaf.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert max_diff(grads[0][1], grads[1][1]) < 1e-5


def test_a_projection_keeps_nothing_but_its_codes():
    """Autograd holds the two stored tensors until backward, not the values or the input."""
    codes, absmax = quantize_nf4(torch.randn(48, 128))
    codes, absmax = codes.view(48, 64), absmax.view(48, 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_4bit(torch.randn(5, 128, requires_grad=True), codes, absmax)
    assert [t.data_ptr() for t in kept] == [codes.data_ptr(), absmax.data_ptr()]
