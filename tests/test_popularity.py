"""Coverage, popularity and calibration of first places, by worked examples."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from loaders.table import make_interactions
from studies.methods import Result
from studies.popularity import beyond_accuracy, catalogue_of, reliability


def made(counts: list[int]) -> dict:
    """Item i has counts[i] training interactions: each user's last two are of item 0 and 1."""
    rows = [(user, item, 5, item) for item, n in enumerate(counts) for user in range(n)]
    for user in range(max(counts)):
        rows += [(user, 1000, 5, 10**6), (user, 1001, 5, 10**6 + 1)]
    titles = {row[1]: f"t{row[1]}" for row in rows}
    interactions = make_interactions(*zip(*rows, strict=True), titles)
    return catalogue_of(SimpleNamespace(interactions=interactions))


def result_of(firsts: list[str], probabilities: list[float], hits: list[bool]) -> Result:
    """Lists of two titles, of which the first has this probability."""
    records = []
    for title, p, hit in zip(firsts, probabilities, hits, strict=True):
        slots = {"candidates": [title, "other"], "target_slot": 0 if hit else 1}
        records.append(slots | {"logps": [np.log(p), np.log(1 - p)]})
    return Result("a", "sft", 0, Path(), {}, {}, records, [], {}, {})


def test_percentiles_count_equals_half_and_the_last_two_not_at_all():
    """Counts 1, 3, 3, 0, 0: the last two items occur only where training does not look."""
    percentiles, top = zip(*made([1, 3, 3]).values(), strict=True)
    assert percentiles == pytest.approx([0.5, 0.8, 0.8, 0.2, 0.2])
    assert top == (False, True, False, False, False)
    _, top = zip(*made([1] * 148 + [2, 3, 4]).values(), strict=True)
    assert np.flatnonzero(top).tolist() == [150]  # 1 % of 153


def test_concentration_and_calibration_of_a_worked_example():
    """Two of five items come first, three of four times the most popular one. Bins .9 to 1 (right
    once of twice) and .7 to .8: 2/4 |.5 - .95| + 2/4 |0 - .75|."""
    firsts, sure = ["t1", "t1", "t0", "t1"], [0.95, 0.95, 0.75, 0.75]
    result = result_of(firsts, sure, [True, False, False, False])
    found = beyond_accuracy(result, made([1, 3, 3]))
    expected = {"coverage": 2 / 5, "top": 3 / 4, "percentile": (0.5 + 3 * 0.8) / 4}
    assert found == pytest.approx(expected | {"calibration": 0.5 * 0.45 + 0.5 * 0.75})
    assert list(beyond_accuracy(result, None)) == ["calibration"]
    counts, expected, right = reliability([result, result])
    assert counts.tolist() == [4, 4] and right.tolist() == [0, 0.5]
    assert expected.tolist() == pytest.approx([0.75, 0.95])
