"""4-bit weights equal bitsandbytes' bit for bit; projections autograd's through their values."""

import pytest
import torch
import torch.nn.functional as F
from conftest import CUDA, max_diff

from kernels.logps import HAS_TRITON
from kernels.nf4 import CODE, dequantize_nf4, linear_4bit, matrix, quantize_nf4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(128, 256), (1, 64), (7, 192), (2000, 640)]  # the last in several pieces
OF_8B = pytest.param((14336, 4096), marks=CUDA.marks)  # a projection, on a GPU alone
DEVICES = ["cpu"] if HAS_TRITON and not torch.cuda.is_available() else []  # the interpreter
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# what bitsandbytes 0.50.2 makes of `golden_weight`: checked without it
GOLDEN_CODES = (
    "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c17777777777777777"
    "777777777777777777777777777777777777777777777777e2af4c16e18e3b05d17e29f3b05d18e2"
    "af4c16d18e3b04c17e29f3b05d17e2af"
)
GOLDEN_ABSMAX = [0.78125, 0.0, 0.78125]


def golden_weight() -> torch.Tensor:
    """Exact in every dtype: three blocks, the second of zeros."""
    weight = ((torch.arange(192) * 37) % 101 - 50) / 64
    weight[64:128] = 0
    return weight


def weight_of(shape, dtype) -> torch.Tensor:
    """Normal weights whose first block is zero where there is a second one."""
    weight = torch.randn(shape) * 0.02
    if weight.numel() > 64:
        weight.view(-1)[:64] = 0
    return weight.to(dtype)


@ALL_DTYPES
def test_codes_and_absmax_equal_the_stored_ones(dtype):
    """And no code lies nearer than the chosen one."""
    codes, absmax = quantize_nf4(golden_weight().to(dtype))
    assert bytes(codes.tolist()).hex() == GOLDEN_CODES
    assert absmax.tolist() == GOLDEN_ABSMAX and absmax.dtype == torch.float32
    values = dequantize_nf4(codes, absmax, (192,), torch.float32)
    assert not values[64:128].any()
    choices = absmax.repeat_interleave(64) * torch.tensor(CODE)[:, None]
    distances = (golden_weight() - choices).abs()
    torch.testing.assert_close((golden_weight() - values).abs(), distances.amin(0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@ALL_DTYPES
def test_codes_absmax_and_values_equal_bitsandbytes(dtype, shape):
    """Whatever the dtype of the weight and of the values."""
    peer = pytest.importorskip("bitsandbytes.functional")
    weight = weight_of(shape, dtype)
    expected, state = peer.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    codes, absmax = quantize_nf4(weight)
    assert torch.equal(codes, expected.view(-1)) and torch.equal(absmax, state.absmax)
    for out in DTYPES:
        state.dtype = out
        values = dequantize_nf4(codes, absmax, shape, out)
        assert values.dtype == out and torch.equal(values, peer.dequantize_4bit(expected, state))


@pytest.mark.parametrize("shape", [*SHAPES, OF_8B], ids=str)
@ALL_DTYPES
@pytest.mark.parametrize("device", [*DEVICES, CUDA])
def test_the_triton_kernel_equals_the_plain_form(device, dtype, shape):
    """Bit for bit, views into buffers included."""
    codes, absmax = quantize_nf4(weight_of(shape, torch.float32).to(device))
    amid = torch.cat([codes.new_full((3,), 255), codes, codes.new_full((3,), 255)])[3:-3]
    plain = dequantize_nf4(codes, absmax, shape, dtype, "reference")
    for given in (codes, amid):
        assert torch.equal(plain, dequantize_nf4(given, absmax, shape, dtype, "triton"))


def test_what_is_not_finite_is_refused():
    """Else a block would become NaN without a word."""
    for bad in (float("inf"), -float("inf"), float("nan")):
        weight = torch.randn(128)
        weight[100] = bad
        with pytest.raises(ValueError, match="layers.3.up_proj.weight holds inf or NaN"):
            quantize_nf4(weight, name="layers.3.up_proj.weight")


def test_a_projection_equals_autograd_and_keeps_nothing_but_its_codes():
    """Output and gradient are those of a plain layer with the dequantised weight."""
    codes, absmax = quantize_nf4(torch.randn(48, 128))
    codes, absmax, bias = codes.view(48, 64), absmax.view(48, 2), torch.randn(48)
    ours, plain = (torch.randn(2, 5, 128).requires_grad_() for _ in range(2))
    plain.data.copy_(ours.data)
    expected, kept = F.linear(plain, matrix(codes, absmax, torch.float32), bias), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear_4bit(ours, codes, absmax, bias)
    assert [t.data_ptr() for t in kept] == [codes.data_ptr(), absmax.data_ptr()]
    upstream = torch.randn(2, 5, 48)
    for output in (y, expected):
        output.backward(upstream)
    assert torch.equal(y, expected) and max_diff(ours.grad, plain.grad) < 1e-5
