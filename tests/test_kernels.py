"""The head's log-probs against float64, with plain PyTorch as the yardstick: no worse than twice its error."""

import pytest
import torch

from kernels import logps
from kernels.logps import fp32_logits, label_logps

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 32, 1024), (1, 16, 1001), (37, 24, 1001), (37, 16, 32003), (5, 8, 151936)]  # M, D, V


def assert_no_worse_than(actual, naive, exact, factor=2.0, atol=1e-6):
    """The kernel may err, but at most `factor` times what plain PyTorch errs in the same dtype."""
    error = (actual.double() - exact).abs().max().item()
    budget = factor * (naive.double() - exact).abs().max().item() + atol
    assert error <= budget, f"max error {error:.2e} > {budget:.2e} ({factor}x naive + {atol:.0e})"


def exact_logps(hidden, weight, labels):
    """Log-probs in float64: the truth."""
    logits = hidden.double() @ weight.double().T
    return logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)


def inputs(M, D, V, dtype=torch.float32, device="cpu", scale=3.0):
    """Hidden rows and head whose logits have a standard deviation of `scale` nats, and labels among the likely ids."""
    hidden = (torch.randn(M, D) * scale).to(device, dtype)
    weight = (torch.randn(V, D) * D**-0.5).to(device, dtype)
    labels = fp32_logits(hidden, weight).topk(20).indices[:, 7]
    labels[M // 2 :] = torch.randint(V, (M - M // 2,), device=device)
    return hidden, weight, labels


def slabs_of(monkeypatch, rows: int | None):
    """Force slabs of that many head rows; None leaves the constants alone."""
    if rows is not None:
        monkeypatch.setattr(logps, "SLAB_BYTES", 0)
        monkeypatch.setattr(logps, "MIN_SLAB", rows)


def gradients(function, hidden, weight, labels, upstream, hidden_grad=True, weight_grad=True):
    """Gradients of sum(upstream * logps) by hidden and weight, None where not asked for."""
    hidden, weight = hidden.detach().requires_grad_(hidden_grad), weight.detach().requires_grad_(weight_grad)
    result = function(hidden, weight, labels)
    result = result[0] if isinstance(result, tuple) else result
    (result * upstream.to(result.dtype)).sum().backward()
    return hidden.grad, weight.grad


def reference(hidden, weight, labels):
    return label_logps(hidden, weight, labels, impl="reference")


@pytest.mark.parametrize("slab", [None, 333])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_logps_and_argmax_equal_float64(device, dtype, shape, slab, monkeypatch):
    """Log-probs err at most twice as much as fp32 PyTorch on the same numbers; the argmax is the full logits'."""
    hidden, weight, labels = inputs(*shape, dtype, device)
    slabs_of(monkeypatch, slab and max(slab, shape[2] // 50))
    actual, best = label_logps(hidden, weight, labels)
    naive, naive_best = reference(hidden, weight, labels)
    assert actual.dtype == torch.float32 and best.dtype == torch.int64
    assert_no_worse_than(actual, naive, exact_logps(hidden, weight, labels))
    logits = hidden.double() @ weight.double().T
    chosen = logits.gather(1, torch.stack([best, naive_best], 1))
    assert (logits.amax(1, keepdim=True) - chosen).max().item() < 1e-4
    if dtype != torch.float32:  # exact products: no two logits are so close that the order of sums decides
        assert (best == naive_best).float().mean().item() > 0.9


def test_the_slabs_cover_the_vocabulary_once(monkeypatch):
    """Slabs follow one another without gap or overlap and stay within their budget of bytes."""
    monkeypatch.setattr(logps, "SLAB_BYTES", 4 * 64 * 100)
    monkeypatch.setattr(logps, "MIN_SLAB", 10)
    for num_rows, expected in ((64, 100), (1, 6400), (0, 6400), (10**6, 10)):
        slabs = logps._slabs(num_rows, 1001)
        assert [v for start, stop in slabs for v in range(start, stop)] == list(range(1001))
        assert max(stop - start for start, stop in slabs) == min(expected, 1001)


@pytest.mark.parametrize("slab", [None, 333])
@pytest.mark.parametrize("trained", ["hidden", "hidden and weight", "weight"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_equal_float64(device, dtype, shape, trained, slab, monkeypatch):
    """Gradients of a frozen head, of a trained one and of the head alone are as close to float64 as autograd's."""
    hidden, weight, labels = inputs(*shape, dtype, device)
    upstream = torch.randn(shape[0], device=device)
    upstream[::5] = 0
    slabs_of(monkeypatch, slab and max(slab, shape[2] // 50))
    which = {"hidden_grad": "hidden" in trained, "weight_grad": "weight" in trained}
    exact = gradients(exact_logps, hidden.double(), weight.double(), labels, upstream, **which)
    naive = gradients(reference, hidden, weight, labels, upstream, **which)
    actual = gradients(label_logps, hidden, weight, labels, upstream, **which)
    # A frozen head keeps its row gradients in the dtype of `hidden` and rounds again after multiplying: up to three
    # half-steps of that dtype where autograd makes one.
    factors = (2.0 if dtype == torch.float32 or "weight" in trained else 3.0, 2.0)
    for a, n, e, factor in zip(actual, naive, exact, factors, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            assert a.dtype == dtype and a.shape == e.shape
            assert_no_worse_than(a, n, e, factor)


def test_rows_without_upstream_gradient_get_none():
    """A row that the loss ignores has a gradient of exactly 0."""
    hidden, weight, labels = inputs(8, 16, 101)
    upstream = torch.tensor([1.0, 0, 2, 0, 0, -1, 0, 3])
    for weight_grad in (False, True):
        grad, _ = gradients(label_logps, hidden, weight, labels, upstream, weight_grad=weight_grad)
        assert not grad[upstream == 0].any() and grad[upstream != 0].any(dim=1).all()


@pytest.mark.parametrize("weight_grad", [False, True], ids=["frozen", "trained"])
def test_gradient_equals_finite_differences(weight_grad):
    """The slope along random directions equals the central difference of the float64 definition."""
    hidden, weight, labels = inputs(6, 16, 301)
    upstream = torch.randn(6)
    grads = gradients(label_logps, hidden, weight, labels, upstream, weight_grad=weight_grad)

    def value(h, w):
        return (exact_logps(h, w, labels) * upstream).sum()

    for _ in range(3):
        dh, dw = torch.randn(6, 16).double(), torch.randn(301, 16).double() * weight_grad
        step = 1e-5
        h, w = hidden.double(), weight.double()
        slope = (value(h + step * dh, w + step * dw) - value(h - step * dh, w - step * dw)) / (2 * step)
        along = (grads[0].double() * dh).sum() + ((grads[1].double() * dw).sum() if weight_grad else 0)
        assert along.item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-4)


# Integer logits times a power of two are exact in fp32, so that all error is the kernel's own.
def row_of_logits(*values: float):
    """One hidden row and a head whose logits are exactly these values."""
    weight = torch.tensor(values)[:, None] * torch.tensor([[1.0, 0, 0, 0]])
    weight[:, 1:] = torch.randint(-4, 5, (len(values), 3))
    return torch.tensor([[1.0, 0, 0, 0]]), weight


@pytest.mark.parametrize("slab", [None, 2])
@pytest.mark.parametrize("label", range(5))
@pytest.mark.parametrize("weight_grad", [False, True], ids=["frozen", "trained"])
def test_huge_logits_keep_logps_and_gradients(weight_grad, label, slab, monkeypatch):
    """Logits of 10,000 and -10,000 side by side neither overflow nor drown the difference of two large ones."""
    slabs_of(monkeypatch, slab)
    hidden, weight = row_of_logits(-1e4, 9999.0, 1e4, 0.0, 9998.0)
    labels = torch.tensor([label])
    actual, best = label_logps(hidden, weight, labels)
    naive = reference(hidden, weight, labels)[0]
    exact = exact_logps(hidden, weight, labels)
    assert actual.isfinite().all() and best.item() == 2
    assert_no_worse_than(actual, naive, exact)
    upstream = torch.ones(1)
    grads = gradients(label_logps, hidden, weight, labels, upstream, weight_grad=weight_grad)
    naive_grads = gradients(reference, hidden, weight, labels, upstream, weight_grad=weight_grad)
    exact_grads = gradients(exact_logps, hidden.double(), weight.double(), labels, upstream, weight_grad=weight_grad)
    for a, n, e in zip(grads, naive_grads, exact_grads, strict=True):
        if e is not None:
            assert a.isfinite().all()
            assert_no_worse_than(a, n, e)


@pytest.mark.parametrize("offset", [0.0, 1024.0])
@pytest.mark.parametrize("gap", [8.0, 14.0, 20.0])
@pytest.mark.parametrize("slab", [None, 2])
@pytest.mark.parametrize("weight_grad", [False, True], ids=["frozen", "trained"])
def test_certain_labels_keep_precise_gradients(weight_grad, slab, gap, offset, monkeypatch):
    """Where the label's probability is 1 - 1e-4 to 1 - 1e-8, what is left of the gradient is right to 1 %."""
    slabs_of(monkeypatch, slab)
    hidden, weight = row_of_logits(offset, offset - 1, offset + gap, offset - 3, offset)
    labels = torch.tensor([2])
    upstream = torch.ones(1)
    grads = gradients(label_logps, hidden, weight, labels, upstream, weight_grad=weight_grad)
    exact = gradients(exact_logps, hidden.double(), weight.double(), labels, upstream, weight_grad=weight_grad)
    for a, e in zip(grads, exact, strict=True):
        if e is not None:
            assert (a.double() - e).abs().max().item() <= 1e-2 * e.abs().max().item()


def test_ties_go_to_the_lowest_id(monkeypatch):
    """Equal largest logits give the lowest id, within a slab, across slabs, and in the reference."""
    hidden, weight = row_of_logits(1.0, 5.0, 5.0, 2.0, 5.0, 5.0, 0.0)
    labels = torch.tensor([0])
    assert reference(hidden, weight, labels)[1].item() == 1
    for rows in (None, 1, 2, 3, 4):
        slabs_of(monkeypatch, rows)
        assert label_logps(hidden, weight, labels)[1].item() == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_grad", [False, True], ids=["frozen", "trained"])
def test_results_are_deterministic(weight_grad, device, monkeypatch):
    """The same call twice is bitwise the same, forward and backward."""
    slabs_of(monkeypatch, 100)
    hidden, weight, labels = inputs(37, 24, 1001, torch.bfloat16, device)
    labels[:10] = labels[0]  # repeated labels must not race
    upstream = torch.randn(37, device=device)
    runs = [gradients(label_logps, hidden, weight, labels, upstream, weight_grad=weight_grad) for _ in range(2)]
    logps = [label_logps(hidden, weight, labels)[0] for _ in range(2)]
    assert torch.equal(*logps) and torch.equal(runs[0][0], runs[1][0])
    assert not weight_grad or torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("weight_grad", [False, True], ids=["frozen", "trained"])
def test_non_contiguous_inputs_are_read_right(weight_grad, monkeypatch):
    """Transposed, strided and expanded inputs give what their contiguous copies give."""
    slabs_of(monkeypatch, 100)
    hidden, weight = torch.randn(24, 37).T, torch.randn(1001, 48)[:, ::2]
    labels, upstream = torch.randint(1001, (74,))[::2], torch.ones(1).expand(37)
    assert not (hidden.is_contiguous() or weight.is_contiguous() or labels.is_contiguous())
    actual = gradients(label_logps, hidden, weight, labels, upstream, weight_grad=weight_grad)
    copies = (t.contiguous() for t in (hidden, weight, labels, upstream))
    expected = gradients(label_logps, *copies, weight_grad=weight_grad)
    torch.testing.assert_close(actual, expected)


def test_nothing_is_differentiated_that_needs_no_gradient():
    """The argmax carries no gradient; without a parameter that wants one there is no graph; inputs are left alone."""
    hidden, weight, labels = inputs(5, 8, 101)
    before = hidden.clone(), weight.clone(), labels.clone()
    assert not label_logps(hidden, weight, labels)[0].requires_grad
    result, best = label_logps(hidden.requires_grad_(), weight, labels)
    assert result.requires_grad and not best.requires_grad
    result.sum().backward()
    assert weight.grad is None
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, weight, labels), strict=True))


def test_impl_chooses_the_path(monkeypatch):
    """`reference` and `slabs` are the two paths, `auto` the slabs; any other word is refused."""
    hidden, weight, labels = inputs(5, 8, 101)
    slabs_of(monkeypatch, 7)
    for impl in ("auto", "slabs", "reference"):
        result, best = label_logps(hidden, weight, labels, impl=impl)
        torch.testing.assert_close(result, exact_logps(hidden, weight, labels).float(), rtol=0, atol=1e-5)
        assert torch.equal(best, (hidden @ weight.T).argmax(1))
    with pytest.raises(ValueError, match="'triton'.*slabs"):
        label_logps(hidden, weight, labels, impl="triton")


@pytest.mark.parametrize(
    "hidden, weight, labels, message",
    [
        ((2, 3, 8), (11, 8), (6,), r"\(2, 3, 8\)"),
        ((6, 8), (11, 9), (6,), r"\(6, 8\) and \(11, 9\)"),
        ((6, 8), (11,), (6,), r"\(11,\)"),
        ((6, 8), (11, 8), (5,), r"\(6,\), got \(5,\)"),
        ((6, 8), (11, 8), (6, 1), r"\(6,\), got \(6, 1\)"),
    ],
)
def test_wrong_shapes_are_refused(hidden, weight, labels, message):
    """Shapes that do not belong together are a ValueError that holds them."""
    with pytest.raises(ValueError, match=message):
        label_logps(torch.zeros(hidden), torch.zeros(weight), torch.zeros(labels, dtype=torch.int64))
