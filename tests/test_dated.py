"""The split in time: who is tested on what, and that nothing from after the date is seen before
it."""

from dataclasses import replace

import numpy as np
import pytest
from test_loaders import log_of

from data import build_examples, render_prompt
from demo.pretrain import known_titles
from loaders.counting import counting_baselines, markov_top
from loaders.dated import LAST_TENTH, build_dated_examples, date_of
from loaders.frozen import DataConfig, prepare
from studies.probes import ProbeConfig
from studies.sequential import BaselineConfig, training_windows
from studies.sequential import train as train_sequential

DATE = 1_000_000
CONFIG = DataConfig(followers=3, min_history=4, train_size=0, split_date="1970-01-12T13:46:40")


def rows_around_the_date(seed: int = 0, users: int = 40, items: int = 60) -> list[tuple]:
    """(user, item, rating, time) of users whose times lie around the date, some wholly after it."""
    rng, rows = np.random.default_rng(seed), []
    for user in range(users):
        length = int(rng.integers(15, 25))
        begin = DATE - int(rng.integers(-2, 14)) * 10
        for step, item in enumerate(rng.permutation(items)[:length].tolist()):
            rows.append((user, item, int(rng.integers(1, 6)), begin + 10 * step))
    return rows


def poisoned(rows: list[tuple]) -> list[tuple]:
    """Other items (some new), ratings and times after the date, users that exist only then."""
    later = [
        (user, 1000 + i % 70 if i % 2 else item, 6 - rating, time + 7)
        for i, (user, item, rating, time) in enumerate(rows)
        if time >= DATE
    ]
    new = [(500 + u, item, 5, DATE + item) for u in range(5) for item in range(0, 60, 2)]
    return [row for row in rows if row[3] < DATE] + later + new


ROWS = rows_around_the_date()
LOGS = log_of(ROWS), log_of(poisoned(ROWS))


def facts(examples, e: int) -> tuple:
    """What an example is made of, without codes, which other logs number differently."""
    example, interactions = examples[e], examples.interactions
    shown = [interactions.item_ids[i] for i in interactions.item[list(examples.history_rows(e))]]
    order = examples.negative_order[e].tolist()
    return example.user, shown, order, *vars(example).values(), render_prompt(example)


@pytest.mark.parametrize("negatives", ["uniform", "popularity", "retrieved"])
@pytest.mark.parametrize("exclude", ["all", "seen"])
def test_what_comes_after_the_date_reaches_no_training_example(negatives, exclude):
    """Everything from the date on is another: prompts, lists, targets, templates stay the same."""
    config = replace(CONFIG, negatives=negatives, exclude=exclude)
    one, other = (build_dated_examples(log, config, markov_top)[1] for log in LOGS)
    for split in ("train", "val"):
        assert len(one[split]) == len(other[split]) > 5
        for e in range(len(one[split])):
            assert facts(one[split], e) == facts(other[split], e)
    assert not np.array_equal(one["test"].candidates, other["test"].candidates)


def test_counting_scores_see_nothing_from_after_the_date_and_no_validation_item():
    """Scores of training and validation lists are equal to the last bit under other later data;
    another validation item leaves those of the training lists as they were."""
    (log, one), (_, other) = (build_dated_examples(x, CONFIG) for x in LOGS)
    item = log.item.copy()
    item[one["val"].position] = 0
    swapped = replace(one["train"], interactions=replace(log, item=item))
    for found, expected in (
        (other["train"], one["train"]),
        (other["val"], one["val"]),
        (swapped, one["train"]),
    ):
        expected = counting_baselines(expected)
        for name, scores in counting_baselines(found).items():
            assert (scores == expected[name]).all(), name
    test = other["test"]
    new = np.array([int(i) >= 1000 for i in test.interactions.item_ids])
    for name, scores in counting_baselines(test).items():
        assert (scores[new[test.candidates]] == 0).all(), name


def test_who_is_tested_on_what():
    """By plain loops: first liked from the date on, last liked before it, followers before that."""
    interactions, splits = build_dated_examples(LOGS[0], CONFIG)
    time, rating, ends = interactions.timestamp, interactions.rating, interactions.training_end()
    expected = {"val": set(), "test": set(), "train": set()}
    for user in range(interactions.num_users):
        rows = list(range(interactions.start[user], interactions.start[user + 1]))
        past = [r for r in rows if time[r] < DATE]
        after = [r for r in rows if time[r] >= DATE and rating[r] >= 4]
        liked = [r for r in past if rating[r] >= 4]
        end = past[-1] + 1 if past else rows[0]
        if liked and liked[-1] - rows[0] >= 4:
            expected["val"].add(liked[-1])
            end = liked[-1]
        if after and after[0] - rows[0] >= 4:
            expected["test"].add(after[0])
        expected["train"] |= {r for r in range(rows[0] + 4, end) if r + 3 <= end}
        assert ends[user] == end
    found = {split: set(examples.position.tolist()) for split, examples in splits.items()}
    assert found["val"] == expected["val"] and found["test"] == expected["test"]
    assert found["train"] and found["train"] <= expected["train"]
    assert (interactions.start[:-1] == ends).any()  # new users
    for split in ("val", "test"):
        examples = splits[split]
        target = examples.candidates[np.arange(len(examples)), examples.target]
        assert (target == interactions.item[examples.position]).all()
    for e, user in enumerate(interactions.user[splits["test"].position].tolist()):
        touched = interactions.item[interactions.start[user] : interactions.start[user + 1]]
        random = splits["test"].candidates[e][splits["test"].is_random[e]]
        assert not set(touched.tolist()) & set(random.tolist())


def test_sequential_models_and_tiny_bases_train_before_the_date():
    """Windows end where training ends, sampled items and titles of a base were known by then."""
    interactions, splits = build_dated_examples(LOGS[1], CONFIG)
    assert not [t for t in known_titles(interactions) if int(t.split()[1]) >= 1000]
    windows, users = training_windows(interactions, 8)
    for user in range(interactions.num_users):
        known = interactions.item[interactions.start[user] : interactions.training_end()[user]] + 1
        assert set(windows[users == user].ravel().tolist()) <= {0, *known.tolist()}
    options = {"hidden_size": 8, "num_layers": 1, "num_sampled": 0, "split_date": LAST_TENTH}
    models = [
        train_sequential(BaselineConfig(**options, **more), interactions, splits["val"], report=len)
        for more in ({"epochs": 2}, {"epochs": 1, "learning_rate": 1e-12})
    ]
    trained, start = (model.items.weight[1:].detach().numpy() for model, _ in models)
    new = np.array([int(i) >= 1000 for i in interactions.item_ids])
    moved = np.abs(trained - start).max(1)
    assert moved[new].max() < 1e-6 < moved[~new].max()


def test_prepared_examples_remember_where_training_ends(tmp_path):
    """Read back from disk; the usual split has another folder, and no such end."""
    options = {"followers": 3, "min_history": 4, "prepared_dir": str(tmp_path)}
    config = DataConfig(planted_users=120, split_date=LAST_TENTH, **options)
    made, read = prepare(config), prepare(config)
    assert (read.interactions.training_end() == made.interactions.training_end()).all()
    times = [read.interactions.timestamp[read.splits[s].position] for s in ("val", "test")]
    assert times[1].min() > times[0].max()
    assert any("training does not see" in why for why in read.interactions.notes)
    usual = prepare(replace(config, split_date=""))
    assert usual.interactions.train_end is None and usual.folder != made.folder
    built = build_examples(usual.interactions, replace(config, split_date=""))["test"]
    assert (usual.splits["test"].candidates == built.candidates).all()


def test_the_date_that_is_not_given_leaves_the_last_tenth():
    share = (LOGS[0].timestamp >= date_of(LOGS[0], LAST_TENTH).astype(int)).mean()
    assert 0.1 <= share < 0.13
    log = replace(LOGS[0], timestamp=LOGS[0].timestamp + 975_628_800 - DATE)
    assert date_of(log, "2000-12-01") == date_of(log, "2000-12-01T01:00+01:00")


@pytest.mark.parametrize("date", ["1960-01-01", "2040-01-01", "tomorrow"])
def test_a_date_that_does_not_divide_the_log_is_refused(date):
    with pytest.raises(ValueError, match=f"--split_date {date}: expected .*first and last time"):
        date_of(LOGS[0], date)


def test_what_tells_of_later_and_what_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="no train example.*--min_history"):
        build_dated_examples(LOGS[0], replace(CONFIG, history=90, min_history=80))
    for options, culprit in (
        ({"core": 5}, "--core"),
        ({"dataset": "lastfm", "data_dir": "x"}, "lastfm"),
        ({"dataset": "csv", "data_dir": "x", "percentile": "all"}, "--percentile"),
        ({"dataset": "prepared", "data_dir": "x"}, "--split_date has no effect"),
    ):
        with pytest.raises(ValueError, match=culprit):
            DataConfig(**{"split_date": LAST_TENTH} | options)
    with pytest.raises(ValueError, match="only length fits it"):
        ProbeConfig(run="x", probe="adherence", split_date=LAST_TENTH)
