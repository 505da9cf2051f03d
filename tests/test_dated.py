"""The split in time: who is tested on what, and that nothing from after the date is seen before
it."""

from dataclasses import replace

import numpy as np
import pytest

from data import Interactions, build_examples, render_prompt
from demo.tiny import known_titles, make_base_model
from loaders.counting import BASELINES, markov_top
from loaders.dated import LAST_TENTH, build_dated_examples, date_of, parse_date
from loaders.frozen import DataConfig, prepare
from loaders.table import make_interactions
from studies.probes import ProbeConfig
from studies.sequential import BaselineConfig, training_windows
from studies.sequential import train as train_sequential

DATE = 1_000_000
CONFIG = DataConfig(followers=3, min_history=4, train_size=0, split_date="1970-01-12T13:46:40")


def columns(seed: int = 0, users: int = 40, items: int = 60) -> list[tuple]:
    """(user, item, rating, time) of users whose times lie around the date, some wholly after it."""
    rng, rows = np.random.default_rng(seed), []
    for user in range(users):
        length = int(rng.integers(15, 25))
        begin = DATE - int(rng.integers(-2, 14)) * 10
        for step, item in enumerate(rng.permutation(items)[:length].tolist()):
            rows.append((user, item, int(rng.integers(1, 6)), begin + 10 * step))
    return rows


def log_of(rows: list[tuple]) -> Interactions:
    titles = {row[1]: f"title {row[1]}" for row in rows}
    return make_interactions(*zip(*rows, strict=True), titles)


def poisoned(rows: list[tuple]) -> list[tuple]:
    """Other items (some new), ratings and times after the date, users that exist only then."""
    later = [
        (user, 1000 + i % 70 if i % 2 else item, 6 - rating, time + 7)
        for i, (user, item, rating, time) in enumerate(rows)
        if time >= DATE
    ]
    new = [(500 + u, item, 5, DATE + item) for u in range(5) for item in range(0, 60, 2)]
    return [row for row in rows if row[3] < DATE] + later + new


def facts(examples, e: int) -> tuple:
    """What an example is made of, without codes, which other logs number differently."""
    example = examples[e]
    shown = [
        examples.interactions.item_ids[examples.interactions.item[r]]
        for r in examples.history_rows(e)
    ]
    return (
        *(example.user, tuple(shown), tuple(example.candidates), example.target),
        *(tuple(example.scores), render_prompt(example)),
        tuple(examples.negative_order[e].tolist()),
    )


@pytest.mark.parametrize("negatives", ["uniform", "popularity", "retrieved"])
@pytest.mark.parametrize("exclude", ["all", "seen"])
def test_what_comes_after_the_date_reaches_no_training_example(negatives, exclude):
    """Everything from the date on is another: prompts, lists, targets, templates stay the same."""
    config = replace(CONFIG, negatives=negatives, exclude=exclude)
    rows = columns()
    logs = log_of(rows), log_of(poisoned(rows))
    (_, one), (_, other) = (
        build_dated_examples(interactions, config, markov_top) for interactions in logs
    )
    for split in ("train", "val"):
        assert len(one[split]) == len(other[split]) > 5
        for e in range(len(one[split])):
            assert facts(one[split], e) == facts(other[split], e)
    assert (
        one["test"].candidates.shape != other["test"].candidates.shape
        or (one["test"].candidates != other["test"].candidates).any()
    )


def test_counting_scores_see_nothing_from_after_the_date():
    """Scores of training and validation lists are equal to the last bit under other later data."""
    rows = columns()
    one = build_dated_examples(log_of(rows), CONFIG)[1]
    other = build_dated_examples(log_of(poisoned(rows)), CONFIG)[1]
    for split in ("train", "val"):
        for name, scores in BASELINES.items():
            assert (scores(one[split]) == scores(other[split])).all(), (split, name)
    test = other["test"]
    new = np.array([int(i) >= 1000 for i in test.interactions.item_ids])
    for name, scores in BASELINES.items():
        assert (scores(test)[new[test.candidates]] == 0).all(), name


def test_validation_items_are_not_fitted():
    """Another validation item leaves every counting score of the training lists as it was."""
    interactions, splits = build_dated_examples(log_of(columns()), CONFIG)
    swapped = interactions.item.copy()
    swapped[splits["val"].position] = 0
    train = splits["train"]
    for name, scores in BASELINES.items():
        other = replace(train, interactions=replace(interactions, item=swapped))
        assert (scores(train) == scores(other)).all(), name


def test_who_is_tested_on_what():
    """By plain loops: first liked from the date on, last liked before it, followers before that."""
    interactions, splits = build_dated_examples(log_of(columns()), CONFIG)
    expected = {"val": set(), "test": set(), "train": set()}
    for user in range(interactions.num_users):
        rows = list(range(interactions.start[user], interactions.start[user + 1]))
        past = [r for r in rows if interactions.timestamp[r] < DATE]
        after = [
            r for r in rows if interactions.timestamp[r] >= DATE and interactions.rating[r] >= 4
        ]
        liked = [r for r in past if interactions.rating[r] >= 4]
        end = past[-1] + 1 if past else rows[0]
        if liked and liked[-1] - rows[0] >= 4:
            expected["val"].add(liked[-1])
            end = liked[-1]
        if after and after[0] - rows[0] >= 4:
            expected["test"].add(after[0])
        expected["train"] |= {r for r in range(rows[0] + 4, end) if r + 3 <= end}
        assert interactions.training_end()[user] == end
    assert set(splits["val"].position.tolist()) == expected["val"]
    assert set(splits["test"].position.tolist()) == expected["test"]
    train = set(splits["train"].position.tolist())
    assert train and train <= expected["train"]
    assert any(
        interactions.start[u] == interactions.training_end()[u]
        for u in range(interactions.num_users)
    )  # new users
    for examples in splits.values():
        users = interactions.user[examples.position]
        target = examples.candidates[np.arange(len(examples)), examples.target]
        if examples.split != "train":
            assert (target == interactions.item[examples.position]).all()
        for e, user in enumerate(users.tolist()):
            touched = set(
                interactions.item[interactions.start[user] : interactions.start[user + 1]].tolist()
            )
            random = set(examples.candidates[e][examples.is_random[e]].tolist())
            assert examples.split != "test" or not touched & random


def test_the_tiny_tokenizer_reads_no_later_title(tmp_path):
    """Its titles are those of training; the whole file is the same under other later data."""
    rows = columns()
    files = []
    for number, table in enumerate((rows, poisoned(rows))):
        interactions, splits = build_dated_examples(log_of(table), CONFIG)
        assert not [t for t in known_titles(interactions) if int(t.split()[1]) >= 1000]
        options = {"hidden_size": 32, "num_layers": 1, "vocab_size": 400, "seed": 0}
        make_base_model(tmp_path / str(number), splits["train"], **options)
        files.append((tmp_path / str(number) / "tokenizer.json").read_bytes())
    assert files[0] == files[1]


def test_sequential_models_train_before_the_date():
    """Windows end where training ends, and sampled items are items that were known by then."""
    rows = columns()
    interactions, splits = build_dated_examples(log_of(poisoned(rows)), CONFIG)
    windows, users = training_windows(interactions, 8)
    for user in range(interactions.num_users):
        known = interactions.item[interactions.start[user] : interactions.training_end()[user]] + 1
        assert set(windows[users == user].ravel().tolist()) <= {0, *known.tolist()}
    options = {"hidden_size": 8, "num_layers": 1, "epochs": 2, "num_sampled": 0}
    config = BaselineConfig(**options, split_date=LAST_TENTH)
    model, _ = train_sequential(config, interactions, splits["val"], report=lambda text: None)
    new = np.array([int(i) >= 1000 for i in interactions.item_ids])
    frozen = BaselineConfig(
        **options | {"epochs": 1, "learning_rate": 1e-12}, split_date=LAST_TENTH
    )
    start, _ = train_sequential(frozen, interactions, splits["val"], report=lambda text: None)
    moved = (model.items.weight - start.items.weight).abs().amax(1)[1:].detach().numpy()
    assert moved[new].max() < 1e-6 < moved[~new].max()


def test_prepared_examples_remember_where_training_ends(tmp_path):
    """Read back from disk; another date is another folder;
    the usual split's folder is as before."""
    config = DataConfig(
        planted_users=120,
        followers=3,
        min_history=4,
        split_date=LAST_TENTH,
        prepared_dir=str(tmp_path),
    )
    made, read = prepare(config), prepare(config)
    assert (read.interactions.training_end() == made.interactions.training_end()).all()
    late = read.interactions.timestamp[read.splits["test"].position]
    assert late.min() > read.interactions.timestamp[read.splits["val"].position].max()
    assert any("training does not see" in why for why in read.interactions.notes)
    usual = prepare(replace(config, split_date=""))
    assert usual.interactions.train_end is None and usual.folder != made.folder
    assert usual.splits["test"].candidates.tolist() == (
        build_examples(usual.interactions, replace(config, split_date=""))[
            "test"
        ].candidates.tolist()
    )


def test_the_date_that_is_not_given_leaves_the_last_tenth():
    interactions = log_of(columns())
    share = (interactions.timestamp >= date_of(interactions, LAST_TENTH)).mean()
    assert 0.1 <= share < 0.13
    assert parse_date("2000-12-01") == 975628800
    assert parse_date("2000-12-01T01:00+01:00") == 975628800


def test_bad_dates_and_options_that_tell_of_later_are_refused():
    interactions = log_of(columns())
    for date in ("1960-01-01", "2040-01-01"):
        with pytest.raises(ValueError, match="does not divide the log, whose times go from"):
            date_of(interactions, date)
    with pytest.raises(ValueError, match="no train example: --split_date divides at"):
        build_dated_examples(interactions, replace(CONFIG, history=90, min_history=80))
    for options, message in (
        ({"split_date": "tomorrow"}, "expected a date such as 2000-12-01"),
        ({"core": 5}, "--core counts what comes after the date"),
        ({"dataset": "lastfm", "data_dir": "x"}, "needs ratings"),
        ({"dataset": "csv", "data_dir": "x", "percentile": "all"}, "needs ratings"),
        ({"dataset": "prepared", "data_dir": "x"}, "the splits are fixed"),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig(**{"split_date": LAST_TENTH} | options)
    with pytest.raises(ValueError, match="only length fits it"):
        ProbeConfig(run="x", probe="adherence", split_date=LAST_TENTH)
