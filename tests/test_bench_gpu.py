"""Verdicts of the GPU acceptance run: what is bad is called fail, and ends with an error."""

import time

import pytest
import torch

from bench.gpu import accept, acceptance, options, verdict
from kernels.logps import label_logps

LATER = time.monotonic() + 1000


def test_a_value_beyond_its_goal_fails():
    """Goals include their limit; NaN reaches none."""
    assert [verdict.at_most("", v, 2.0).verdict for v in (1, 2, 3, float("nan"))] == [
        "pass", "pass", "fail", "fail",
    ]  # fmt: skip
    assert [verdict.at_least("", v, 2.0).verdict for v in (1, 2, 3, float("nan"))] == [
        "fail", "pass", "pass", "fail",
    ]  # fmt: skip


def test_a_section_that_raises_is_a_failed_row_and_a_late_one_is_skipped():
    """The sections behind it are run all the same."""

    def broken():
        raise RuntimeError("no kernel image\nfor this card")

    (row,) = verdict.run_section("head", broken, LATER)
    assert (row.verdict, row.figure) == ("fail", "RuntimeError: no kernel image")
    (row,) = verdict.run_section("head", broken, time.monotonic() - 1)
    assert row.verdict == "skipped" and "time" in row.figure


def test_only_failed_rows_count_as_failures_and_the_page_shows_them():
    sections = {
        "a": [verdict.figure("x", "3 ms"), verdict.skipped("Liger", "not installed")],
        "b": [verdict.at_most("y", 3.0, 2.0, " ms")],
    }
    assert verdict.failures(sections) == 1 and verdict.failures({"a": sections["a"]}) == 0
    text = verdict.page("Title", ["note"], sections)
    assert "0 pass, 1 fail, 1 figure, 1 skipped" in text
    assert "| y | **fail** | 3 ms | ≤ 2 ms |" in text


@pytest.fixture(scope="module")
def toy():
    return options(["--toy", "--device=cpu", "--dtype=float32", "--shape=tiny"])


def test_the_exit_code_tells_of_failures_and_the_page_is_written(toy, tmp_path):
    """A good section, then a bad one beside it."""
    toy.out = str(tmp_path)
    good = {"fine": lambda args: [verdict.at_most("x", 1.0, 2.0)]}
    assert accept(toy, good) == 0
    (file,) = tmp_path.glob("gpu-*.md")
    assert "1 pass, 0 fail" in file.read_text()
    assert accept(toy, good | {"bad": lambda args: [verdict.at_most("y", 3.0, 2.0)]}) == 1
    assert "**fail**" in file.read_text() and "## fine" in file.read_text()


def test_a_run_that_is_stopped_keeps_the_sections_before(toy, tmp_path):
    def stopped(args):
        raise KeyboardInterrupt

    toy.out = str(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        accept(toy, {"fine": lambda args: [verdict.at_most("x", 1.0, 2.0)], "slow": stopped})
    (file,) = tmp_path.glob("gpu-*.md")
    assert "1 pass, 0 fail" in file.read_text()


@pytest.mark.parametrize("spoilt, expected", [("nothing", "pass"), ("values", "fail")])
def test_a_wrong_kernel_fails(toy, monkeypatch, spoilt, expected):
    """Log-probs that are off by a hundredth of a nat."""

    def wrong(*args):
        logps, best = label_logps(*args)
        return logps + (0.01 if spoilt == "values" else 0.0), best

    monkeypatch.setattr("acceptance.label_logps", wrong)
    row = acceptance.head_row(toy, (5, 16, 50), torch.float32, "slabs")
    assert row.verdict == expected


def test_a_wrong_gradient_fails(toy, monkeypatch):
    """Log-probs right, their gradient doubled."""

    def wrong(hidden, weight, labels, impl):
        logps, best = label_logps(2 * hidden - hidden.detach(), weight, labels, impl)
        return logps, best

    monkeypatch.setattr("acceptance.label_logps", wrong)
    row = acceptance.head_row(toy, (5, 16, 50), torch.float32, "slabs")
    assert row.verdict == "fail" and "gradient" in row.name
