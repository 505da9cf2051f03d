"""What runs the forward passes: the next one made ahead, and what it prints meanwhile."""

import threading

import pytest

from runtime.processes import prefetch, progress


def test_prefetch_keeps_the_order_and_runs_one_ahead():
    """While one item is used the next is being made, and no more; an error reaches the user."""
    started, made_next = [], threading.Event()

    def make(item):
        started.append(item)
        if item == 1:
            made_next.set()
        return 10 * item if item < 4 else int("four")

    seen = []
    with pytest.raises(ValueError, match="four"):
        for value in prefetch(make, range(6)):
            assert value or made_next.wait(10)  # the second is made without being asked for
            assert max(started) <= value // 10 + 1
            seen.append(value)
    assert seen == [0, 10, 20, 30] and not list(prefetch(make, []))


def test_progress_prints_a_line_a_minute(capsys, monkeypatch):
    """Without a terminal; what is over within a minute prints nothing."""
    assert list(progress(range(3), "short", 3)) == [0, 1, 2] and not capsys.readouterr().err
    seconds = iter(range(0, 10**6, 40))
    monkeypatch.setattr("tqdm.std.time", lambda: next(seconds))
    assert list(progress(range(4), "evaluation", 4)) == [0, 1, 2, 3]
    assert "evaluation" in capsys.readouterr().err
