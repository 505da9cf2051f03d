"""Examples prepared once: their hash, fewer users, what histories show."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_data import SPLITS, all_equal, nasty_examples
from test_loaders import rows_of

from data import build_examples, encode_examples, k_core, render_prompt
from loaders import frozen
from loaders.frozen import DataConfig, prepare


def small_config(tmp_path: Path, **options) -> DataConfig:
    usual = {"planted_users": 60, "train_size": 30, "followers": 4}
    return DataConfig(**usual | {"prepared_dir": str(tmp_path / "prepared")} | options)


def test_prepared_examples_are_written_once_and_read_back(tmp_path, monkeypatch):
    """The second call does not touch the raw data; nothing else is left in the folder."""
    first = prepare(small_config(tmp_path))
    monkeypatch.setattr("loaders.frozen.load_interactions", None)
    again = prepare(small_config(tmp_path))
    assert first.hash == again.hash and first.folder == again.folder
    built = build_examples(again.interactions, small_config(tmp_path))
    assert all_equal(first.splits, again.splits) and all_equal(built, again.splits)
    for split in SPLITS:
        assert all(built[split][e] == again.splits[split][e] for e in range(len(built[split])))
    assert list((tmp_path / "prepared").iterdir()) == [first.folder]


def test_the_hash_is_that_of_the_content(tmp_path):
    """Wherever it lies; whatever changes a prompt or a list changes the hash and the folder."""
    changes = [{"data_seed": 1}, {"train_size": 31}, {"decay": 0.4}, {"history": 6}, {"followers": 9}]  # noqa: E501  # fmt: skip
    found = [prepare(small_config(tmp_path, **change)) for change in ({}, *changes)]
    elsewhere = prepare(small_config(tmp_path, prepared_dir=str(tmp_path / "elsewhere")))
    assert elsewhere.hash == found[0].hash
    assert len({p.hash for p in found}) == len({p.folder for p in found}) == len(found)


def test_fewer_users_are_drawn_before_everything_else(tmp_path):
    """Whole logs of users that --data_seed draws, then the k-core and the splits; an own key."""
    config = small_config(tmp_path, planted_users=90, core=2, num_users=40)
    everyone, few = frozen.load_interactions(config), prepare(config)
    whole = prepare(replace(config, num_users=0))
    drawn, other = (prepare(replace(config, core=0, data_seed=s)).interactions for s in (0, 1))
    assert drawn.num_users == other.num_users == 40 and drawn.user_ids != other.user_ids
    kept = set(drawn.user_ids)
    assert rows_of(drawn) == [row for row in rows_of(everyone) if row[0] in kept]
    core = k_core(drawn, 2)
    assert few.interactions.user_ids == core.user_ids and few.interactions.titles == core.titles
    assert all_equal(few.splits, build_examples(core, config))
    assert few.folder != whole.folder
    assert [*few.interactions.notes.values()] == [len(everyone.user) - len(core.user)]
    with pytest.raises(ValueError, match="--num_users 90: the log has 90; give fewer"):
        prepare(replace(config, num_users=90))


def test_the_four_inputs_differ_in_what_a_history_shows(tmp_path):
    """All or liked items, with or without ratings: same candidates, another hash each."""
    inputs = [("all", True), ("all", False), ("positive", True), ("positive", False)]
    inputs = [{"history_items": items, "ratings": ratings} for items, ratings in inputs]
    prepared = [prepare(small_config(tmp_path, **options)) for options in inputs]
    assert len({p.hash for p in prepared}) == 4
    log, first = prepared[0].interactions, prepared[0].splits["test"]
    for options, p in zip(inputs, prepared, strict=True):
        test, liked = p.splits["test"], options["history_items"] == "positive"
        for name in ("position", "candidates", "target", "negative_order"):
            assert (getattr(test, name) == getattr(first, name)).all()
        form = "{} | Rating: {:g}" if options["ratings"] else "{}"
        for e, at in enumerate(test.position.tolist()):
            rows = range(log.start[log.user[at]], at)
            rows = [r for r in rows if not liked or log.rating[r] >= 4]
            shown = [form.format(log.titles[log.item[r]], log.rating[r]) for r in rows[-20:]]
            prompt = render_prompt(test[e])
            assert "\n".join(["", *shown, ""]) in prompt
            assert options["ratings"] or not rows or not re.search("rated|[Rr]ating", prompt)


# ------------------------------------------------------------------------ tokens
@pytest.mark.parametrize("options", [{}, {"ratings": False}])
def test_histories_are_found_among_a_prompts_tokens(tokenizer, options):
    """To the token, in every template, with ratings or without, shortened or whole."""
    examples = nasty_examples(**options)
    longest = max(len(ids) for ids in encode_examples(examples, tokenizer, 100_000).prompts)
    for limit in (100_000, longest - 4):
        encoded = encode_examples(examples, tokenizer, limit)
        for e, (first, end) in enumerate(frozen.history_spans(encoded, tokenizer).tolist()):
            found = tokenizer.decode(encoded.prompts[e][first:end].tolist())
            history, kept = examples[e].history, found.strip("\n ").split("\n")
            assert [line.strip() for line in kept] == [
                title if np.isnan(rating) else f"{title} | Rating: {rating:g}"
                for title, rating in history[-len(kept) :]
            ]
            assert limit < 100_000 or len(kept) == len(history)


def test_an_empty_history_has_an_empty_span(tokenizer, tmp_path):
    """No liked item before an example."""
    options = {"train_size": 300, "min_history": 1, "history_items": "positive"}
    prepared = prepare(small_config(tmp_path, planted_users=80, followers=3, **options))
    examples = prepared.splits["train"]
    spans = frozen.history_spans(encode_examples(examples, tokenizer, 1024), tokenizer)
    empty = np.array([len(examples.history_rows(e)) == 0 for e in range(len(examples))])
    assert empty.any() and np.array_equal(np.diff(spans)[:, 0] == 0, empty) and spans.min() >= 1
