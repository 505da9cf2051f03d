"""The head's log-probs against float64: at most twice the error of plain PyTorch.

Without a GPU the Triton kernels run in Triton's interpreter, on the CPU."""

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import CUDA
from launch import ROOT

from bench.head import exact_logps, rounded
from kernels import logps
from kernels.logps import HAS_TRITON, label_logps, mm_fp32

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# M, D, V; ragged ones included
SHAPES = [(64, 32, 1024), (1, 16, 1001), (37, 24, 1001), (37, 40, 32003)]
WIDE = [(5, 8, 128256), (5, 8, 151936), (5, 8, 152064)]  # vocabularies of Llama 3 and Qwen2.5


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


def reference(hidden, weight, labels):
    return label_logps(hidden, weight, labels, impl="reference")


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
    """Gradients of sum(upstream * logps) by hidden and weight, None where not asked for;
    `function` may be an impl's name."""
    hidden = hidden.detach().requires_grad_(hidden_grad)
    weight = weight.detach().requires_grad_(weight_grad)
    named = isinstance(function, str)
    result = (partial(label_logps, impl=function) if named else function)(hidden, weight, labels)
    result = result[0] if isinstance(result, tuple) else result
    (result * upstream.to(result.dtype)).sum().backward()
    return hidden.grad, weight.grad


def three_gradients(impl, hidden, weight, labels, upstream, **which):
    """(ours, plain PyTorch's, the exact one) by hidden and by weight, where they are asked for."""
    ours, naive = (
        gradients(way, hidden, weight, labels, upstream, **which) for way in (impl, "reference")
    )
    wide = (hidden.double(), weight.double(), labels, upstream)
    exact = gradients(exact_logps, *wide, **which)
    asked = [g is not None for g in exact]
    assert [g is not None for g in ours] == asked
    return [triple for triple, is_asked in zip(zip(ours, naive, exact), asked) if is_asked]


# ------------------------------------------------------------------------ against float64
@pytest.mark.parametrize(
    "shape, slab", [*((s, 333) for s in SHAPES), (SHAPES[3], None), *((s, None) for s in WIDE)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ON_PATHS
def test_logps_and_argmax_equal_float64(impl, device, dtype, shape, slab, monkeypatch):
    """No worse than plain PyTorch on the same products; the argmax is the full logits'."""
    hidden, weight, labels = inputs(*shape, dtype, device)
    slabs_of(monkeypatch, slab and max(slab, shape[2] // 5))
    actual, best = label_logps(hidden, weight, labels, impl=impl)
    assert actual.dtype == torch.float32 and best.dtype == torch.int64
    exact = exact_logps(hidden, weight, labels)
    assert_no_worse_than(actual, plain_logps(hidden, weight, labels), exact)
    logits = hidden.double() @ weight.double().T
    chosen = logits.gather(1, best[:, None]).squeeze(1)
    assert (logits.amax(1) - chosen).max().item() < 1e-4


@pytest.mark.parametrize(
    "shape, slab, trained",
    [
        *((shape, 333, "hidden") for shape in SHAPES),
        *((shape, None, "hidden") for shape in WIDE[:2]),
        (SHAPES[3], 333, "hidden and weight"),
        (SHAPES[0], None, "hidden and weight"),
        (SHAPES[2], 333, "weight"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ON_PATHS
def test_gradients_equal_float64(impl, device, dtype, shape, trained, slab, monkeypatch):
    """Of a frozen head, of a trained one and of the head alone: as close as autograd's."""
    hidden, weight, labels = inputs(*shape, dtype, device)
    upstream = torch.randn(shape[0], device=device)
    upstream[::5] = 0
    slabs_of(monkeypatch, slab and max(slab, shape[2] // 5))
    which = {"hidden_grad": "hidden" in trained, "weight_grad": "weight" in trained}
    # the interpreter cuts a bf16 number off instead of rounding it
    cut = dtype == torch.bfloat16 and impl == "triton" and device == "cpu" and trained == "hidden"
    # the yardstick multiplies upcast numbers;
    # a trained head's gradient takes GEMMs in the head's own dtype on a GPU
    rounded = "weight" in trained and dtype != torch.float32 and logps._gemm_dtype(hidden) == dtype
    for ours, naive, exact in three_gradients(impl, hidden, weight, labels, upstream, **which):
        assert ours.dtype == dtype and ours.shape == exact.shape
        assert_no_worse_than(ours, naive, exact, factor=4.0 if cut or rounded else 2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trained", ["hidden", "hidden and weight"])
def test_gradients_through_half_precision_gemms_equal_float64(trained, dtype, monkeypatch):
    """As on a GPU, where the weights of the second GEMM are rounded to the head's dtype."""
    monkeypatch.setattr(logps, "_gemm_dtype", lambda hidden: hidden.dtype)
    test_gradients_equal_float64("slabs", "cpu", dtype, SHAPES[3], trained, 333, monkeypatch)


@ON_PATHS
def test_bf16_inputs_cost_little_and_bf16_logits_1e_2(impl, device):
    """Per token, at |logit| <= 20: bf16 inputs err by 2e-6 nats on a CPU, whose bound is 5e-6; on a
    GPU by what its own sums of bf16 products err. Logits rounded to bf16 err by more than 1e-2."""
    hidden, weight, labels = inputs(48, 256, 32000, torch.bfloat16, device, scale=3.9)
    assert 17 < (hidden.double() @ weight.double().T).abs().max().item() <= 20
    exact = exact_logps(hidden, weight, labels)
    actual = label_logps(hidden, weight, labels, impl=impl)[0]
    if device == "cpu":
        assert (actual - exact).abs().max().item() <= 5e-6
    assert_no_worse_than(actual, plain_logps(hidden, weight, labels), exact)
    assert (rounded(hidden, weight, labels) - exact).abs().max().item() > 1e-2


# ------------------------------------------------------------------------ slabs and paths
def test_the_slabs_cover_the_vocabulary_once(monkeypatch):
    """No gap, no overlap, and logits and exponentials within their budget of bytes."""
    assert len(logps._slabs(650, 128256, 2)) == 1  # a dozen prompts of an 8B model
    monkeypatch.setattr(logps, "SLAB_BYTES", 6 * 64 * 107)
    monkeypatch.setattr(logps, "MIN_SLAB", 10)
    for num_rows, expected in ((64, 100), (1, 6840), (0, 6840), (10**6, 10)):
        slabs = logps._slabs(num_rows, 1001, element_size=2)
        assert [v for start, stop in slabs for v in range(start, stop)] == list(range(1001))
        assert max(stop - start for start, stop in slabs) == min(expected, 1001)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=INTERPRETED), CUDA])
def test_a_slab_leaves_labels_of_other_slabs_alone(device):
    """Columns that pad a slab's last tile bear the next slab's ids; a label there is not theirs.

    So slabs may be walked in any order: here from the last one down."""
    from kernels import logps_triton

    hidden, weight, labels = inputs(6, 8, 3000, device=device)
    labels[:3] = torch.tensor([1500, 1024, 2999])
    logits = mm_fp32(hidden, weight.T)
    label_logits = torch.full((6,), torch.nan, device=device)
    running_max = torch.full((6,), -torch.inf, device=device)
    for start in (2048, 1024, 0):
        slab, before = logits[:, start : start + 1024].contiguous(), label_logits.clone()
        tiles, _, _ = logps_triton.slab_statistics(
            slab, labels, label_logits, start, running_max, None
        )
        ids = torch.arange(start, start + slab.shape[1], device=device)
        outside = ~torch.isin(labels, ids)
        assert torch.equal(label_logits[outside].nan_to_num(), before[outside].nan_to_num())
        others = (slab - tiles[0]).exp() * (ids != labels[:, None])
        torch.testing.assert_close(tiles[1].sum(1), others.sum(1))
    assert torch.equal(label_logits, logits.gather(1, labels[:, None]).squeeze(1))


@pytest.mark.parametrize("impl, device", WALKS)
def test_without_gradients_there_is_one_gemm_per_slab(impl, device, monkeypatch):
    """Under no_grad, and where nobody asks for a gradient, the second GEMM is not run."""
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


def test_impl_chooses_the_path(monkeypatch):
    """On a CPU `auto` is the slabs; any word but the five is refused, as are wrong shapes."""
    hidden, weight, labels = inputs(5, 8, 101)
    slabs_of(monkeypatch, 7)
    called, real = [], logps._slab_statistics
    monkeypatch.setattr(logps, "_slab_statistics", lambda *args: called.append(1) or real(*args))
    for impl, slabs in (("auto", 15), ("slabs", 15), ("reference", 0)):
        called.clear()
        label_logps(hidden, weight, labels, impl=impl)
        assert len(called) == slabs
    with pytest.raises(AssertionError, match="'cuda'.*slabs"):
        label_logps(hidden, weight, labels, impl="cuda")
    for wrong in (hidden[None], hidden[:, :7], hidden[:4], hidden.bfloat16()):
        with pytest.raises(AssertionError, match="hidden"):
            label_logps(wrong, weight, labels)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_triton_on_a_cpu_says_what_to_do():
    """Outside the interpreter and without a GPU it names the two ways out."""
    code = "import torch; from kernels.logps import label_logps as f; "
    code += "f(torch.ones(2, 4), torch.ones(9, 4), torch.tensor([1, 2]), 'triton')"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert "impl='slabs'" in done.stderr and "TRITON_INTERPRET=1" in done.stderr


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
def test_huge_logits_keep_logps_and_gradients(impl, device, weight_grad, slab, monkeypatch):
    """10,000 and -10,000 neither overflow nor drown the difference of two large logits."""
    slabs_of(monkeypatch, slab)
    hidden, weight = row_of_logits(-1e4, 9999.0, 1e4, 0.0, 9998.0, device=device)
    for label in range(5):
        labels, upstream = torch.tensor([label], device=device), torch.ones(1, device=device)
        actual, best = label_logps(hidden, weight, labels, impl=impl)
        naive, exact = (f(hidden, weight, labels) for f in (plain_logps, exact_logps))
        assert actual.isfinite().all() and best.item() == 2
        assert_no_worse_than(actual, naive, exact)
        batch = (hidden, weight, labels, upstream)
        for triple in three_gradients(impl, *batch, weight_grad=weight_grad):
            assert_no_worse_than(*triple)


@pytest.mark.parametrize("slab", [None, 2])
@FROZEN
@ON_PATHS
def test_certain_labels_keep_precise_gradients(impl, device, weight_grad, slab, monkeypatch):
    """Where the label's probability is 1 - 1e-4 to 1 - 1e-8 the gradient is right to 1 %."""
    slabs_of(monkeypatch, slab)
    labels, upstream = torch.tensor([2], device=device), torch.ones(1, device=device)
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
    assert reference(hidden, weight, labels)[1].item() == 1
    for rows in (None, 1, 2, 3, 4):
        slabs_of(monkeypatch, rows)
        assert label_logps(hidden, weight, labels, impl=impl)[1].item() == 1


# ------------------------------------------------------------------------ invariants
@FROZEN
@ON_PATHS
def test_results_are_deterministic(impl, device, weight_grad, monkeypatch):
    """The same call twice is bitwise the same, forward and backward."""
    slabs_of(monkeypatch, 100)
    hidden, weight, labels = inputs(37, 24, 1001, torch.bfloat16, device)
    labels[:10] = labels[0]  # repeated labels must not race
    batch = (hidden, weight, labels, torch.randn(37, device=device))
    first, second = (gradients(impl, *batch, weight_grad=weight_grad) for _ in range(2))
    logps = [label_logps(hidden, weight, labels, impl=impl)[0] for _ in range(2)]
    assert torch.equal(*logps) and torch.equal(first[0], second[0])
    assert not weight_grad or torch.equal(first[1], second[1])


@FROZEN
@ON_PATHS
def test_views_into_poisoned_buffers_are_read_right(impl, device, weight_grad, monkeypatch):
    """Transposed, strided, expanded inputs, amid NaN, give what contiguous copies give."""
    slabs_of(monkeypatch, 333)
    poisoned = torch.full((1010, 64), torch.nan, device=device)
    poisoned[3:-6, 8:-8:2] = torch.randn(1001, 24, device=device)
    hidden, weight = torch.randn(24, 37, device=device).T, poisoned[3:-6, 8:-8:2]
    labels = torch.randint(1001, (74,), device=device)[::2]
    views = [hidden, weight, labels, torch.ones(1, device=device).expand(37)]
    results = []
    for given in (views, [t.contiguous() for t in views]):
        grads = gradients(impl, *given, weight_grad=weight_grad)
        results.append((*grads, *label_logps(*given[:3], impl)))
    torch.testing.assert_close(*results)


def test_rows_without_upstream_gradient_get_none():
    """A row that the loss ignores has a gradient of exactly 0."""
    hidden, weight, labels = inputs(8, 16, 101)
    upstream = torch.tensor([1.0, 0, 2, 0, 0, -1, 0, 3])
    for weight_grad in (False, True):
        grad, _ = gradients(label_logps, hidden, weight, labels, upstream, weight_grad=weight_grad)
        assert not grad[upstream == 0].any() and grad[upstream != 0].any(dim=1).all()


def test_nothing_is_differentiated_that_needs_no_gradient():
    """Neither the argmax nor, without a parameter that wants one, anything; inputs stay alone."""
    hidden, weight, labels = inputs(5, 8, 101)
    before = hidden.clone(), weight.clone(), labels.clone()
    assert not label_logps(hidden, weight, labels)[0].requires_grad
    result, best = label_logps(hidden.requires_grad_(), weight, labels)
    assert result.requires_grad and not best.requires_grad
    result.sum().backward()
    assert weight.grad is None
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, weight, labels), strict=True))
