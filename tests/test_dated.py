"""The split in time: who is tested on what; nothing from after the date is seen before it."""

from dataclasses import replace

import numpy as np
import pytest
from test_loaders import log_of

from data import render_prompt
from demo.pretrain import known_titles
from loaders.counting import counting_baselines
from loaders.frozen import DataConfig, build_dated_examples, date_of, prepare
from studies.probes import ProbeConfig
from studies.sequential import BaselineConfig
from studies.sequential import train as train_sequential

DATE = 1_000_000
CONFIG = DataConfig(followers=3, min_history=4, train_size=0, split_date="1970-01-12T13:46:40")


RNG, ROWS = np.random.default_rng(0), []  # (user, item, rating, time); some wholly after the date
for user in range(40):
    length, begin = int(RNG.integers(15, 25)), DATE - int(RNG.integers(-2, 14)) * 10
    for step, item in enumerate(RNG.permutation(60)[:length].tolist()):
        ROWS.append((user, item, int(RNG.integers(1, 6)), begin + 10 * step))
# other items (some new), ratings and times after the date, users that exist only then
POISONED = [
    (u, 1000 + n % 70 if n % 2 else i, 6 - r, t + 7) if t >= DATE else (u, i, r, t)
    for n, (u, i, r, t) in enumerate(ROWS)
] + [(500 + u, item, 5, DATE + item) for u in range(5) for item in range(0, 60, 2)]
LOGS = log_of(ROWS), log_of(POISONED)


def facts(examples, e: int) -> tuple:
    """What an example is made of, without codes, which other logs number differently."""
    example, interactions = examples[e], examples.interactions
    shown = [interactions.item_ids[i] for i in interactions.item[list(examples.history_rows(e))]]
    order = examples.negative_order[e].tolist()
    return example.user, shown, order, *vars(example).values(), render_prompt(example)


@pytest.mark.parametrize("negatives", ["uniform", "popularity", "retrieved"])
@pytest.mark.parametrize("exclude", ["all", "seen"])
def test_what_comes_after_the_date_reaches_no_training_example(negatives, exclude):
    config = replace(CONFIG, negatives=negatives, exclude=exclude)
    one, other = (build_dated_examples(log, config)[1] for log in LOGS)
    for split in ("train", "val"):
        assert len(one[split]) == len(other[split]) > 5
        for e in range(len(one[split])):
            assert facts(one[split], e) == facts(other[split], e)
    assert not np.array_equal(one["test"].candidates, other["test"].candidates)


def test_counting_scores_see_nothing_from_after_the_date_and_no_validation_item():
    """To the last bit; another validation item leaves scores of the training lists as they were."""
    (log, one), (_, other) = (build_dated_examples(x, CONFIG) for x in LOGS)
    item = log.item.copy()
    item[one["val"].position] = 0
    swapped = one | {"train": replace(one["train"], interactions=replace(log, item=item))}
    for splits, split in ((other, "train"), (other, "val"), (swapped, "train")):
        expected = counting_baselines(one[split])
        for name, scores in counting_baselines(splits[split]).items():
            assert (scores == expected[name]).all(), name
    test = other["test"]
    new = np.array([int(i) >= 1000 for i in test.interactions.item_ids])
    for name, scores in counting_baselines(test).items():
        assert (scores[new[test.candidates]] == 0).all(), name


def test_who_is_tested_on_what():
    """By plain loops: first liked from the date on, last liked before it, followers before that."""
    log, splits = build_dated_examples(LOGS[0], CONFIG)
    expected, ends = {"val": set(), "test": set(), "train": set()}, log.training_end()
    for user in range(log.num_users):
        rows = list(range(log.start[user], log.start[user + 1]))
        past = [r for r in rows if log.timestamp[r] < DATE]
        liked = [r for r in rows if log.rating[r] >= 4 and r - rows[0] >= 4]
        known = [r for r in past if log.rating[r] >= 4][-1:]
        expected["val"] |= (last := set(known) & set(liked))
        expected["test"] |= set([r for r in rows if log.rating[r] >= 4 and r not in past][:1]) & set(liked)  # noqa: E501  # fmt: skip
        end = min(last, default=past[-1] + 1 if past else rows[0])
        expected["train"] |= {r for r in range(rows[0] + 4, end) if r + 3 <= end}
        assert ends[user] == end
    found = {split: set(examples.position.tolist()) for split, examples in splits.items()}
    assert found["val"] == expected["val"] and found["test"] == expected["test"]
    assert found["train"] and found["train"] <= expected["train"]
    assert (log.start[:-1] == ends).any()  # new users
    for examples in (splits["val"], splits["test"]):
        target = examples.candidates[np.arange(len(examples)), examples.target]
        assert (target == log.item[examples.position]).all()
    for e, user in enumerate(log.user[examples.position].tolist()):
        random = examples.candidates[e][examples.is_random[e]]
        assert not np.isin(log.item[log.start[user] : log.start[user + 1]], random).any()


def test_sequential_models_and_tiny_bases_train_before_the_date():
    interactions, splits = build_dated_examples(LOGS[1], CONFIG)
    assert not [t for t in known_titles(interactions) if int(t.split()[1]) >= 1000]
    options = {"hidden_size": 8, "num_layers": 1, "num_sampled": 0, "split_date": "10%"}
    trained, start = (
        train_sequential(BaselineConfig(**options, **more), interactions, splits["val"], report=len)
        for more in ({"epochs": 2}, {"epochs": 1, "learning_rate": 1e-12})
    )
    trained, start = (m.items.weight[1:].detach().numpy() for m, _ in (trained, start))
    new = np.array([int(i) >= 1000 for i in interactions.item_ids])
    moved = np.abs(trained - start).max(1)
    assert moved[new].max() < 1e-6 < moved[~new].max()


def test_prepared_examples_remember_where_training_ends(tmp_path):
    options = {"followers": 3, "min_history": 4, "prepared_dir": str(tmp_path)}
    config = DataConfig(planted_users=120, split_date="10%", **options)
    made, read = prepare(config), prepare(config)
    assert (read.interactions.training_end() == made.interactions.training_end()).all()
    times = [read.interactions.timestamp[read.splits[s].position] for s in ("val", "test")]
    assert times[1].min() > times[0].max()
    usual = prepare(replace(config, split_date=""))
    assert usual.interactions.train_end is None and usual.folder != made.folder


def test_dates():
    """One without a zone is UTC; one that divides nothing is refused."""
    share = (LOGS[0].timestamp >= date_of(LOGS[0], "10%").astype(int)).mean()
    assert 0.1 <= share < 0.13
    log = replace(LOGS[0], timestamp=LOGS[0].timestamp + 975_628_800 - DATE)
    assert date_of(log, "2000-12-01") == date_of(log, "2000-12-01T01:00+01:00")
    for date in ("1960-01-01", "2040-01-01", "tomorrow"):
        with pytest.raises(ValueError, match=f"--split_date {date}: expected 10%, or a date"):
            date_of(LOGS[0], date)


def test_what_tells_of_later_and_what_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="no train example.*--min_history"):
        build_dated_examples(LOGS[0], replace(CONFIG, history=90, min_history=80))
    for culprit, options in (
        ("--core", {"core": 5}),
        ("ranks", {"dataset": "csv", "data_dir": "x", "scale": "rank:all"}),
        ("--split_date does not go", {"dataset": "prepared", "data_dir": "x"}),
    ):
        with pytest.raises(ValueError, match=culprit):
            DataConfig(split_date="10%", **options)
    with pytest.raises(ValueError, match="length fits, and other lists"):
        ProbeConfig(run="x", probe="adherence", split_date="10%")
