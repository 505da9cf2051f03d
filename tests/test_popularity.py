"""Coverage, popularity and calibration of first places, by worked examples."""

from types import SimpleNamespace

import numpy as np
import pytest

from loaders.table import make_interactions
from studies.popularity import beyond_accuracy, catalogue_of


def catalogue(counts: list[int]) -> dict:
    """Item i has counts[i] training interactions: each user's last two are of two more items."""
    rows = [(user, item, 5, item) for item, n in enumerate(counts) for user in range(n)]
    for user in range(max(counts)):
        rows += [(user, 1000, 5, 10**6), (user, 1001, 5, 10**6 + 1)]
    titles = {row[1]: f"t{row[1]}" for row in rows}
    log = make_interactions(*zip(*rows, strict=True), titles)
    return catalogue_of(SimpleNamespace(interactions=log))


def test_percentiles_count_equals_half_and_the_last_two_not_at_all():
    """Counts 1, 3, 3, 0, 0: the last two items occur only where training does not look."""
    percentiles, top = zip(*catalogue([1, 3, 3]).values(), strict=True)
    assert percentiles == pytest.approx([0.5, 0.8, 0.8, 0.2, 0.2])
    assert top == (False, True, False, False, False)
    _, top = zip(*catalogue([1] * 148 + [2, 3, 4]).values(), strict=True)
    assert np.flatnonzero(top).tolist() == [150]  # 1 % of 153


def test_concentration_and_calibration_of_a_worked_example():
    """Two of five items come first, three of four times the most popular one. Bins .9 to 1 (right
    once of twice) and .7 to .8: 2/4 |.5 - .95| + 2/4 |0 - .75|."""
    records = []
    for title, p, hit in (("t1", 0.95, 0), ("t1", 0.95, 1), ("t0", 0.75, 1), ("t1", 0.75, 1)):
        record = {"candidates": [title, "other"], "target_slot": hit}
        records.append(record | {"logps": [np.log(p), np.log(1 - p)]})
    result = SimpleNamespace(records=records)
    expected = {"coverage": 2 / 5, "top": 3 / 4, "percentile": (0.5 + 3 * 0.8) / 4}
    expected |= {"calibration": 0.5 * 0.45 + 0.5 * 0.75}
    assert beyond_accuracy(result, catalogue([1, 3, 3])) == pytest.approx(expected)
    assert list(beyond_accuracy(result, None)) == ["calibration"]
