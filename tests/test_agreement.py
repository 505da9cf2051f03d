"""Two evaluations of the same users, paired (studies/agreement.py)."""

import json

import numpy as np
import pytest
from launch import ROOT, run_script

from studies.agreement import agreement_text, logprob_changes


def record(user: int, logps: list[float], hit: bool, valid: bool = True) -> dict:
    """Three titles, of which the first is the target."""
    return {
        "user": str(user), "target": "a", "candidates": ["a", "b", "c"], "target_slot": 0,
        "logps": logps, "hit": hit, "valid": valid,
    }  # fmt: skip


BEFORE = [record(u, [-1.0, -2.0, -3.0], hit=True) for u in range(4)]
AFTER = [
    record(0, [-1.0, -2.0, -3.0], hit=True),
    record(1, [-1.5, -2.5, -3.5], hit=True),
    record(2, [-3.0, -2.0, -1.0], hit=False),  # the third title is first now
    record(3, [-1.0, -2.0, -3.0], hit=False, valid=False),
]


def write(folder, records: list[dict]):
    folder.mkdir()
    text = "".join(json.dumps(r) + "\n" for r in records)
    (folder / "predictions.jsonl").write_text(text)
    return folder


def test_two_folders_are_compared_user_by_user(tmp_path):
    folders = write(tmp_path / "first", BEFORE), write(tmp_path / "second", AFTER)
    done = run_script("studies.agreement", *map(str, folders), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "| HR@1 written | 1.000 | 0.500 | -0.500 [-1.000, +0.000] |" in done.stdout
    assert "| valid answers | 1.000 | 0.750 | -0.250 [-0.750, +0.000] |" in done.stdout
    assert "| HR@1 ranked first | 1.000 | 0.750 | -0.250 [-0.750, +0.000] |" in done.stdout
    # changes: 0; -.5 each; -2, 0, 2; 0. Up to 3 of 4 draws are the third user: 2 ** .5
    assert "root mean square 0.854 [0.000, 1.414]" in done.stdout
    assert "mean -0.125 [-0.375, +0.000]" in done.stdout
    assert "same title first in 0.750 [0.250, 1.000] of the lists" in done.stdout


def test_intervals_of_the_change_hold_what_is_true(monkeypatch):
    """Changes of known size: of 100 draws of 200 users the 95 % intervals hold it in most."""
    monkeypatch.setattr("studies.statistics.RESAMPLES", 1000)
    held = {"mean": 0, "rms": 0}
    truth = {"mean": 0.1, "rms": np.hypot(0.1, 0.3)}
    for seed in range(100):
        rng = np.random.default_rng(seed)
        first = rng.normal(size=(200, 5))
        found = logprob_changes(first, first + 0.1 + 0.3 * rng.normal(size=first.shape))
        for name in held:
            _, low, high = found[name]
            held[name] += low <= truth[name] <= high
    assert min(held.values()) >= 88 and max(held.values()) < 100


def test_other_users_or_titles_are_refused():
    others = [r | {"user": "x" + r["user"]} for r in BEFORE]
    with pytest.raises(ValueError, match="of different users"):
        agreement_text(BEFORE, others)
    with pytest.raises(ValueError, match="of different users"):
        agreement_text(BEFORE, BEFORE[:-1])
