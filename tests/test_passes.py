"""What runs the forward passes: the next one made ahead, and what it prints meanwhile."""

import threading

import pytest

from runtime.passes import prefetch, progress


def test_prefetch_keeps_the_order_and_runs_one_ahead():
    """Items come in order; while one is used the next is being made, and no more;
    an error reaches the user."""
    started, made_next = [], threading.Event()

    def make(item):
        started.append(item)
        if item == 1:
            made_next.set()
        if item == 4:
            raise ValueError("item 4")
        return item * 10

    seen = []
    with pytest.raises(ValueError, match="item 4"):
        for value in prefetch(make, range(6)):
            if value == 0:
                # the first is in use, the second is made without being asked for
                assert made_next.wait(10)
            assert max(started) <= value // 10 + 1
            seen.append(value)
    assert seen == [0, 10, 20, 30]
    assert list(prefetch(make, [])) == []


def test_progress_prints_a_line_a_minute(capsys, monkeypatch):
    """Without a terminal: what is done and left; what is over within a minute prints nothing."""
    assert list(progress(range(3), "short", 3)) == [0, 1, 2] and not capsys.readouterr().err
    seconds = iter(range(0, 10**6, 40))
    monkeypatch.setattr("tqdm.std.time", lambda: next(seconds))
    assert list(progress(range(4), "evaluation", 4)) == [0, 1, 2, 3]
    assert "evaluation" in capsys.readouterr().err
