"""The head's log-probs against float64: at most twice the error of plain PyTorch.

Without a GPU the Triton kernels run in Triton's interpreter, on the CPU."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import CUDA

from bench.head import exact_logps, rounded
from kernels import logps
from kernels.logps import HAS_TRITON, label_logps, mm_fp32

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def interpreter_problem() -> str:
    """Why the Triton kernels cannot run on the CPU; empty if they can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if torch.cuda.is_available():
        return "Triton compiles for the GPU that is there"
    import triton

    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    if old and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"the interpreter of Triton {triton.__version__} needs numpy < 2.4"
    return ""


INTERPRETED = pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem() or "-")
# "slabs" and "triton" cut the vocabulary into slabs and form a frozen head's gradient in the
# forward pass, "fused" does neither
WALKS = [("slabs", "cpu"), pytest.param("triton", "cpu", marks=INTERPRETED)]
WALKS += [pytest.param(impl, "cuda", marks=CUDA.marks) for impl in ("slabs", "triton")]
PATHS = WALKS + [pytest.param("fused", "cpu", marks=INTERPRETED)]
PATHS += [pytest.param("fused", "cuda", marks=CUDA.marks)]
ON_PATHS = pytest.mark.parametrize("impl, device", PATHS)
FROZEN = pytest.mark.parametrize("weight_grad", [False, True], ids=["frozen", "trained"])


def assert_no_worse_than(actual, naive, exact, factor=2.0, atol=1e-6):
    """The kernel may err, but at most `factor` times what plain PyTorch errs in the same dtype."""
    error = (actual.double() - exact).abs().max().item()
    budget = factor * (naive.double() - exact).abs().max().item() + atol
    assert error <= budget, f"max error {error:.2e} > {budget:.2e} ({factor}x naive + {atol:.0e})"


def plain_logps(hidden, weight, labels):
    """Plain PyTorch on fp32 logits, which the device's own GEMM sums."""
    logits = mm_fp32(hidden, weight.T)
    return logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)


def inputs(M, D, V, dtype=torch.float32, device="cpu", scale=3.0):
    """Hidden rows and head whose logits deviate by `scale` nats, and labels among likely ids."""
    hidden = (torch.randn(M, D) * scale).to(device, dtype)
    weight = (torch.randn(V, D) * D**-0.5).to(device, dtype)
    labels = mm_fp32(hidden, weight.T).topk(20).indices[:, 7]
    labels[M // 2 :] = torch.randint(V, (M - M // 2,), device=device)
    return hidden, weight, labels


def slabs_of(monkeypatch, rows: int | None):
    """Force slabs of that many head rows; None leaves the constants alone."""
    if rows is not None:
        monkeypatch.setattr(logps, "SLAB_BYTES", 0)
        monkeypatch.setattr(logps, "MIN_SLAB", rows)


def gradients(function, hidden, weight, labels, upstream, hidden_grad=True, weight_grad=True):
    """Gradients of sum(upstream * function(...)) by hidden and weight, None where not asked for."""
    hidden = hidden.detach().requires_grad_(hidden_grad)
    weight = weight.detach().requires_grad_(weight_grad)
    result = function(hidden, weight, labels)
    result = result[0] if isinstance(result, tuple) else result
    (result * upstream.to(result.dtype)).sum().backward()
    return hidden.grad, weight.grad


def three_gradients(impl, hidden, weight, labels, upstream, **which):
    """(ours, plain PyTorch's, the exact one) by hidden and by weight, where they are asked for."""
    ways = [partial(label_logps, impl=name) for name in (impl, "reference")]
    found = [gradients(way, hidden, weight, labels, upstream, **which) for way in ways]
    found.append(
        gradients(exact_logps, hidden.double(), weight.double(), labels, upstream, **which)
    )
    triples = [triple for triple in zip(*found) if triple[2] is not None]
    assert sum(g is not None for g in found[0]) == len(triples)
    return triples


# ------------------------------------------------------------------------ against float64
ROWS = [  # M, D, V, ragged ones included; rows of a slab, None: as many as usual; what is trained
    *((shape, 333, "hidden") for shape in ((64, 32, 1024), (1, 16, 1001), (37, 40, 8003))),
    ((5, 8, 152064), None, "hidden"),  # Qwen2.5's vocabulary
    ((64, 32, 1024), None, "hidden and weight"),
    ((37, 24, 1001), 333, "hidden and weight"),
    ((37, 24, 1001), 333, "weight"),
]
OF_8B = [((512, 4096, 128256), None, "hidden"), ((37, 4090, 32003), None, "hidden")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ON_PATHS
def test_logps_argmax_and_gradients_equal_float64(impl, device, dtype, monkeypatch):
    """No worse than plain PyTorch on the same products; an ignored row has a gradient of 0."""
    for shape, slab, trained in ROWS + OF_8B * (device == "cuda"):
        hidden, weight, labels = inputs(*shape, dtype, device)
        upstream = torch.randn(shape[0], device=device)
        upstream[1::5] = 0
        monkeypatch.undo()
        slabs_of(monkeypatch, slab and max(slab, shape[2] // 5))
        actual, best = label_logps(hidden, weight, labels, impl=impl)
        assert actual.dtype == torch.float32 and best.dtype == torch.int64
        exact = exact_logps(hidden, weight, labels)
        atol = 1e-5 if shape[1] > 4000 else 1e-6
        assert_no_worse_than(actual, plain_logps(hidden, weight, labels), exact, atol=atol)
        if dtype == torch.bfloat16 and shape[0] > 1:  # what fp32 logits are there for
            assert (rounded(hidden, weight, labels) - exact).abs().max() > 1e-2
        logits = hidden.double() @ weight.double().T
        assert (logits.amax(1) - logits.gather(1, best[:, None])[:, 0]).max().item() < 1e-4
        del logits
        # the interpreter cuts a bf16 number off; a GPU's second GEMM rounds to the head's dtype
        cut = (impl, device, dtype, trained) == ("triton", "cpu", torch.bfloat16, "hidden")
        large = trained != "hidden" or shape[1] > 4000
        loose = cut or large and device == "cuda" and dtype != torch.float32
        which = {"hidden_grad": "hidden" in trained, "weight_grad": "weight" in trained}
        for triple in three_gradients(impl, hidden, weight, labels, upstream, **which):
            assert triple[0].dtype == dtype and triple[0].shape == triple[2].shape
            assert_no_worse_than(*triple, factor=4.0 if loose else 2.0)
            assert len(triple[0]) != shape[0] or not triple[0][upstream == 0].any()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("weight_grad", [False, True])
def test_gradients_through_half_precision_gemms_equal_float64(weight_grad, dtype, monkeypatch):
    """As on a GPU, where the weights of the second GEMM are rounded to the head's dtype."""
    monkeypatch.setattr(logps, "_gemm_dtype", lambda hidden: hidden.dtype)
    slabs_of(monkeypatch, 6400)
    batch = (*inputs(37, 40, 32003, dtype), torch.randn(37))
    for triple in three_gradients("slabs", *batch, weight_grad=weight_grad):
        assert_no_worse_than(*triple, factor=4.0 if weight_grad else 2.0)


# ------------------------------------------------------------------------ slabs and paths
@pytest.mark.parametrize("impl, device", WALKS)
def test_without_gradients_there_is_one_gemm_per_slab(impl, device, monkeypatch):
    hidden, weight, labels = inputs(5, 8, 1001, device=device)
    slabs_of(monkeypatch, 500)
    calls = []
    monkeypatch.setattr(logps, "mm_fp32", lambda a, b: calls.append(1) or mm_fp32(a, b))
    label_logps(hidden, weight, labels, impl=impl)
    with torch.no_grad():
        label_logps(hidden.requires_grad_(), weight, labels, impl=impl)
    assert len(calls) == 2 * 3
    label_logps(hidden, weight, labels, impl=impl)
    assert len(calls) == 2 * 3 + 2 * 3


# ------------------------------------------------------------------------ hard numbers
# Integer logits times a power of two are exact in fp32, so that all error is the kernel's own.
def row_of_logits(*values: float, device="cpu"):
    """One hidden row and a head whose logits are exactly these values."""
    weight = torch.tensor(values)[:, None] * torch.tensor([[1.0, 0, 0, 0]])
    weight[:, 1:] = torch.randint(-4, 5, (len(values), 3))
    return torch.tensor([[1.0, 0, 0, 0]], device=device), weight.to(device)


@pytest.mark.parametrize("slab", [None, 2])
@FROZEN
@ON_PATHS
def test_extreme_logits_keep_logps_and_gradients(impl, device, weight_grad, slab, monkeypatch):
    """10,000 and -10,000 neither overflow nor drown the difference of two large logits."""
    slabs_of(monkeypatch, slab)
    upstream = torch.ones(1, device=device)
    hidden, weight = row_of_logits(-1e4, 9999.0, 1e4, 0.0, 9998.0, device=device)
    for label in range(5):
        labels = torch.tensor([label], device=device)
        actual, best = label_logps(hidden, weight, labels, impl=impl)
        naive, exact = (f(hidden, weight, labels) for f in (plain_logps, exact_logps))
        assert actual.isfinite().all() and best.item() == 2
        assert_no_worse_than(actual, naive, exact)
        batch = (hidden, weight, labels, upstream)
        for triple in three_gradients(impl, *batch, weight_grad=weight_grad):
            assert_no_worse_than(*triple)
    labels = torch.tensor([2], device=device)
    for offset, gap in ((0.0, 8.0), (0.0, 14.0), (0.0, 20.0), (1024.0, 14.0)):
        logits = (offset, offset - 1, offset + gap, offset - 3, offset)
        batch = (*row_of_logits(*logits, device=device), labels, upstream)
        for ours, _, exact in three_gradients(impl, *batch, weight_grad=weight_grad):
            assert (ours.double() - exact).abs().max() <= 1e-2 * exact.abs().max()


@ON_PATHS
def test_ties_go_to_the_lowest_id(impl, device, monkeypatch):
    """Within a slab, across slabs, and in the reference."""
    hidden, weight = row_of_logits(1.0, 5.0, 5.0, 2.0, 5.0, 5.0, 0.0, device=device)
    labels = torch.tensor([0], device=device)
    assert label_logps(hidden, weight, labels, impl="reference")[1].item() == 1
    for rows in (None, 1, 2, 3, 4):
        slabs_of(monkeypatch, rows)
        assert label_logps(hidden, weight, labels, impl=impl)[1].item() == 1


@FROZEN
@ON_PATHS
def test_views_into_poisoned_buffers_give_the_same_bits_twice(
    impl, device, weight_grad, monkeypatch
):
    """Transposed, strided, expanded inputs, amid NaN, give what contiguous copies give."""
    slabs_of(monkeypatch, 333)
    poisoned = torch.full((1010, 64), torch.nan, device=device)
    poisoned[3:-6, 8:-8:2] = torch.randn(1001, 24, device=device)
    hidden, weight = torch.randn(24, 37, device=device).T, poisoned[3:-6, 8:-8:2]
    labels = torch.randint(1001, (74,), device=device)[::2]
    labels[:10] = labels[0]  # they must not race
    views = [hidden, weight, labels, torch.ones(1, device=device).expand(37)]
    results, way = [], partial(label_logps, impl=impl)
    for given in (views, views, [t.contiguous() for t in views]):
        results.append((*gradients(way, *given, weight_grad=weight_grad), *way(*given[:3])))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[2])
