"""Examples prepared once: their hash, damaged files, fewer users, what histories show."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_data import SPLITS, all_equal, nasty_examples, own_rows

from data import build_examples, encode_examples, k_core, render_prompt
from loaders.counting import BASELINES
from loaders.frozen import (
    DataConfig,
    draw_users,
    encode_split,
    history_spans,
    load_interactions,
    prepare,
)


def small_config(tmp_path: Path, **options) -> DataConfig:
    usual = {"planted_users": 60, "train_size": 30, "followers": 4}
    return DataConfig(**usual | {"prepared_dir": str(tmp_path / "prepared")} | options)


def test_prepared_examples_are_written_once_and_read_back(tmp_path, monkeypatch):
    """The second call reads equal arrays and titles without touching the raw data;
    nothing else is left in the folder."""
    first = prepare(small_config(tmp_path))
    monkeypatch.setattr("loaders.frozen.load_interactions", None)
    again = prepare(small_config(tmp_path))
    assert (first.hash, first.raw_counts, first.folder) == (
        again.hash, again.raw_counts, again.folder,
    )  # fmt: skip
    log, built = again.interactions, build_examples(again.interactions, small_config(tmp_path))
    assert all_equal(first.splits, again.splits) and all_equal(built, again.splits)
    for split in SPLITS:
        assert all(built[split][e] == again.splits[split][e] for e in range(len(built[split])))
    sizes = {"users": 60, "items": log.num_items, "interactions": len(log.user)}
    assert first.raw_counts == sizes
    assert list((tmp_path / "prepared").iterdir()) == [first.folder]
    scores = [first.baselines("test") for _ in range(2)]  # counted, then read
    assert all((scores[0][name] == scores[1][name]).all() for name in BASELINES)
    first.folder = Path("/dev/null")  # a folder that cannot be written costs the time again
    assert first.baselines("test").keys() == scores[0].keys()


def test_the_hash_is_that_of_the_content(tmp_path):
    """Equal examples have equal hashes wherever they lie;
    whatever changes a prompt or a list changes the hash and the folder."""
    changes = [{"data_seed": 1}, {"train_size": 31}, {"decay": 0.4}, {"history": 6}, {"followers": 9}]  # noqa: E501  # fmt: skip
    found = [prepare(small_config(tmp_path, **change)) for change in ({}, *changes)]
    elsewhere = prepare(small_config(tmp_path, prepared_dir=str(tmp_path / "elsewhere")))
    assert elsewhere.hash == found[0].hash
    assert len({p.hash for p in found}) == len({p.folder for p in found}) == len(found)


@pytest.mark.parametrize("name", ["log.item.npy", "meta.json"])
def test_damaged_prepared_examples_are_refused(name, tmp_path):
    """Examples that are not what was written are an error with their path, never other data."""
    file = prepare(small_config(tmp_path)).folder / name
    content = bytearray(file.read_bytes())
    at = content.index(b"Bo") if name == "meta.json" else -1  # a title
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.parent.name}: .*delete it"):
        prepare(small_config(tmp_path))


@pytest.mark.parametrize("core", [0, 2])
def test_fewer_users_are_drawn_before_everything_else(core, tmp_path):
    """Whole logs of users that --data_seed draws, then the k-core and the splits; an own key."""
    config = small_config(tmp_path, planted_users=90, core=core, num_users=40)
    everyone, few = load_interactions(config), prepare(config)
    whole = prepare(replace(config, num_users=0))
    drawn, other = (draw_users(everyone, replace(config, data_seed=seed)) for seed in (0, 1))
    assert drawn.num_users == other.num_users == 40 and drawn.user_ids != other.user_ids

    def history(log, user: str) -> list:
        rows = own_rows(log, log.start[log.user_ids.index(user)])
        return [(log.titles[log.item[r]], log.rating[r], log.timestamp[r]) for r in rows]

    assert all(history(drawn, user) == history(everyone, user) for user in drawn.user_ids)
    kept = k_core(drawn, core)
    assert few.interactions.user_ids == kept.user_ids and few.interactions.titles == kept.titles
    assert all_equal(few.splits, build_examples(kept, config))
    assert few.raw_counts == whole.raw_counts and few.raw_counts["users"] == 90
    assert few.folder != whole.folder and few.interactions.notes
    with pytest.raises(ValueError, match="--num_users 90 has no effect: .* 90 users"):
        prepare(replace(config, num_users=90))
    with pytest.raises(ValueError, match="--num_users does not go with --dataset prepared"):
        DataConfig(dataset="prepared", data_dir="x", num_users=3)


def test_failed_preparation_leaves_nothing_behind(tmp_path, monkeypatch):
    """If writing fails, no temporary folder is left over and a later call starts afresh."""

    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("loaders.frozen.np.save", full)
        with pytest.raises(ValueError, match="prepared/planted.*no space left"):
            prepare(small_config(tmp_path))
    assert list((tmp_path / "prepared").iterdir()) == []
    assert len(prepare(small_config(tmp_path)).splits["train"]) == 30


def test_the_four_inputs_differ_in_what_a_history_shows(tmp_path):
    """All or liked items, with or without ratings:
    same candidates and targets, another hash each, the words to match."""
    inputs = [
        {"history_items": items, "ratings": ratings}
        for items in ("all", "positive")
        for ratings in (True, False)
    ]
    prepared = [prepare(small_config(tmp_path, **options)) for options in inputs]
    assert len({p.hash for p in prepared}) == 4
    log, first = prepared[0].interactions, prepared[0].splits["test"]
    for options, p in zip(inputs, prepared, strict=True):
        test, liked = p.splits["test"], options["history_items"] == "positive"
        for name in ("position", "candidates", "target", "negative_order"):
            assert (getattr(test, name) == getattr(first, name)).all()
        form = "{} | Rating: {:g}" if options["ratings"] else "{}"
        for e, at in enumerate(test.position.tolist()):
            rows = [r for r in own_rows(log, at) if r < at and (not liked or log.rating[r] >= 4)]
            shown = [form.format(log.titles[log.item[r]], log.rating[r]) for r in rows[-20:]]
            prompt = render_prompt(test[e])
            assert "\n".join(["", *shown, ""]) in prompt
            if rows and not options["ratings"]:
                assert not any(word in prompt for word in ("rated", "ratings", "Rating"))


# ------------------------------------------------------------------------ tokens
@pytest.mark.parametrize("options", [{}, {"ratings": False}])
def test_histories_are_found_among_a_prompts_tokens(tokenizer, options):
    """To the token, in every template, with ratings or without, shortened or whole."""
    examples = nasty_examples(**options)
    longest = max(len(ids) for ids in encode_examples(examples, tokenizer, 100_000).prompts)
    for limit in (100_000, longest - 4):
        encoded = encode_examples(examples, tokenizer, limit)
        for e, (first, end) in enumerate(history_spans(encoded, tokenizer).tolist()):
            found = tokenizer.decode(encoded.prompts[e][first:end].tolist())
            history, kept = examples[e].history, found.strip("\n ").split("\n")
            assert [line.strip() for line in kept] == [
                title if np.isnan(rating) else f"{title} | Rating: {rating:g}"
                for title, rating in history[-len(kept) :]
            ]
            assert limit < 100_000 or len(kept) == len(history)


def test_where_histories_stand_is_known_where_it_is_asked_for(tokenizer, tmp_path):
    """No liked item before an example: an empty span."""
    options = {"train_size": 300, "min_history": 1, "history_items": "positive"}
    prepared = prepare(small_config(tmp_path, planted_users=80, followers=3, **options))
    assert encode_split(prepared, "train", tokenizer, 1024).histories is None
    spans = encode_split(prepared, "train", tokenizer, 1024, histories=True).histories
    examples = prepared.splits["train"]
    empty = np.array([len(examples.history_rows(e)) == 0 for e in range(len(examples))])
    assert empty.any() and np.array_equal(np.diff(spans)[:, 0] == 0, empty) and spans.min() >= 1
