"""Coverage, popularity and calibration of first places:
worked examples, intervals, changes from SFT."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from loaders.table import make_interactions
from studies import popularity
from studies.methods import grouped
from studies.popularity import (
    Beyond,
    Catalogue,
    FirstPlaces,
    calibration_errors,
    covered,
    draw_reliability,
    first_places,
    resampled,
)
from studies.results import collect
from studies.statistics import interval_of

WHOLE = np.arange(4)[None]


def catalogue_of(counts: list[int]) -> Catalogue:
    """Item i has counts[i] training interactions: each user's last two are of item 0 and 1."""
    rows, time = [], 0
    for item, count in enumerate(counts):
        for user in range(count):
            rows.append((user, item, 5, time := time + 1))
    users = max(counts)
    for user in range(users):
        rows += [(user, 1000, 5, 10**6), (user, 1001, 5, 10**6 + 1)]
    titles = {row[1]: f"t{row[1]}" for row in rows}
    return Catalogue.of(
        SimpleNamespace(interactions=make_interactions(*zip(*rows, strict=True), titles))
    )


def test_percentiles_count_equals_half_and_the_last_two_not_at_all():
    """Counts 1, 3, 3, 0, 0: the last two items occur only where training does not look."""
    catalogue = catalogue_of([1, 3, 3])
    assert catalogue.percentile.tolist() == pytest.approx([0.5, 0.8, 0.8, 0.2, 0.2])
    assert catalogue.top.tolist() == [False, True, False, False, False]
    many = catalogue_of([1] * 148 + [2, 3, 4])
    assert np.flatnonzero(many.top).tolist() == [150]  # 1 % of 153


def test_coverage_counts_an_item_once():
    items = np.array([7, 7, 2, 9])
    assert covered(items, WHOLE, 10)[0] == pytest.approx(0.3)
    twice = np.array([[3, 3, 0, 1]])  # the last user, whose item is nobody else's; the third gone
    assert covered(items, twice, 10)[0] == pytest.approx(0.3)
    assert covered(items, np.array([[0, 1, 0, 1]]), 10)[0] == pytest.approx(0.1)


def test_calibration_error_of_a_worked_example():
    """Bins .9 to 1 (right once of twice) and .2 to .3: 2/4 |.5 - .95| + 2/4 |0 - .25|."""
    places = FirstPlaces(
        np.zeros(0, int), np.array([0.95, 0.95, 0.25, 0.25]), np.array([True, False, False, False])
    )
    assert calibration_errors(places, WHOLE)[0] == pytest.approx(0.5 * 0.45 + 0.5 * 0.25)
    sure = FirstPlaces(np.zeros(0, int), np.ones(4), np.ones(4, bool))
    assert calibration_errors(sure, WHOLE)[0] == 0


def test_intervals_of_coverage_hold_what_other_users_would_cover(monkeypatch):
    """Of 60 draws of 300 users the intervals hold the mean coverage of 300 users in 90 % or
    more."""
    monkeypatch.setattr(popularity, "RESAMPLES", 400)
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, 401)
    shares /= shares.sum()
    catalogue = SimpleNamespace(top=np.zeros(400, bool))
    draws = [rng.choice(400, size=300, p=shares) for _ in range(400)]
    truth = np.mean([len(np.unique(d)) / 400 for d in draws])
    held = 0
    for items in draws[:60]:
        places = FirstPlaces(items, np.zeros(0), np.zeros(300, bool))
        value, means = resampled("coverage", [places], catalogue)
        low, high = interval_of(means)
        assert low < value < high
        held += low <= truth <= high
    assert held >= 54


def write_run(folder, seed: int, stages: dict[str, np.ndarray], titles: list[str]) -> None:
    """Stages whose predictions rank titles[first[u]] first for user u, with log-prob lead 2."""
    run = folder / f"run{seed}"
    for stage, first in stages.items():
        (run / stage / "eval").mkdir(parents=True)
        records = []
        for user, item in enumerate(first.tolist()):
            others = np.random.default_rng(user).permutation(titles[3:])[:17]
            candidates = [*titles[:3], *others.tolist()]
            logps = np.where(np.arange(len(candidates)) == item, 2.0, 0.0)
            record = {"user": f"u{user}", "candidates": candidates, "target": titles[0]}
            record |= {"target_slot": 0, "hit": item == 0, "valid": True, "answer": "x"}
            records.append(record | {"logps": logps.tolist()})
        lines = "".join(json.dumps(r) + "\n" for r in records)
        (run / stage / "eval/predictions.jsonl").write_text(lines)
        facts = {"n": len(records), "data_hash": "abc", "baselines": {"chance": 0.05}}
        (run / stage / "eval/metrics.json").write_text(json.dumps(facts))
    config = {"dataset": "planted", "stages": ",".join(stages), "seed": seed}
    (run / "config.json").write_text(json.dumps(config))


@pytest.fixture
def beyond(tmp_path, monkeypatch) -> Beyond:
    """SFT spreads its first places over three titles, RecPO gives all to one."""
    monkeypatch.setattr(popularity, "RESAMPLES", 500)
    catalogue = catalogue_of([9] + [1] * 60)
    titles = list(catalogue.codes)
    monkeypatch.setattr(popularity, "find_catalogue", lambda results: catalogue)
    for seed in (0, 1):
        spread = np.random.default_rng(seed).integers(3, size=90)
        write_run(tmp_path, seed, {"sft": spread, "recpo": np.zeros(90, int)}, titles)
    return Beyond.of(grouped(collect(tmp_path)))


def test_concentration_is_found(beyond):
    """The rows of a method that recommends one popular item, and its change from SFT."""
    rows = {row[0]: row[1:] for row in beyond.rows()}
    assert rows["recpo"][0] == "2" and rows["recpo"][1].startswith(f"{1 / 63:.4f}")
    assert rows["recpo"][2] == "1.0000 [1.000, 1.000]"
    assert rows["sft"][1].startswith(f"{3 / 63:.4f}")
    lead = np.exp(2) / (np.exp(2) + 19)
    assert rows["recpo"][4].startswith(f"{1 - lead:.4f}")
    ((name, coverage, top, percentile, calibration),) = beyond.change_rows()
    assert name == "recpo − sft" and coverage.startswith(f"{-2 / 63:+.4f}")
    assert top.endswith(": higher") and percentile.endswith(": higher")
    assert calibration.endswith(": higher")  # from a third right to always right at .28


def test_nothing_is_said_of_popularity_without_the_catalogue(beyond, monkeypatch, tmp_path):
    monkeypatch.setattr(popularity, "find_catalogue", lambda results: None)
    bare = Beyond.of(beyond.methods)
    for row in bare.rows():
        assert row[2:5] == ["", "", ""] and row[5]
    result = next(iter(beyond.methods.values())).results[0]
    other = Catalogue({"another": 0}, np.zeros(1), np.ones(1, bool))
    with pytest.raises(ValueError, match="predictions.jsonl: .* is no title of the prepared"):
        first_places(result, other)


def test_the_reliability_picture_is_drawn(beyond, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    assert draw_reliability(plt, beyond, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
