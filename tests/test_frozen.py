"""Examples prepared once: their hash, their cached tokens, and files that are damaged."""

from pathlib import Path

import numpy as np
import pytest
from test_data import SPLITS, all_equal, nasty_examples, own_rows

import data
from data import build_examples, encode_examples, render_prompt
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, encode_split, history_spans, prepare


def small_config(tmp_path: Path, **options) -> DataConfig:
    return DataConfig(
        **{
            "planted_users": 60,
            "train_size": 30,
            "followers": 4,
            "prepared_dir": str(tmp_path / "prepared"),
        }
        | options
    )


def test_prepared_examples_are_written_once_and_read_back(tmp_path, monkeypatch):
    """The second call reads equal arrays and titles without touching the raw data;
    nothing else is left in the folder."""
    first = prepare(small_config(tmp_path))
    monkeypatch.setattr("loaders.frozen.load_interactions", None)
    again = prepare(small_config(tmp_path))
    assert (first.hash, first.raw_counts, first.folder) == (
        again.hash,
        again.raw_counts,
        again.folder,
    )
    assert all_equal(first.splits, again.splits)
    built = build_examples(again.interactions, small_config(tmp_path))
    assert all_equal(built, again.splits)
    for split in SPLITS:
        for e in range(len(built[split])):
            assert built[split][e] == again.splits[split][e]
    assert first.raw_counts == {
        "users": 60,
        "items": again.interactions.num_items,
        "interactions": len(again.interactions.user),
    }
    assert list((tmp_path / "prepared").iterdir()) == [first.folder]


def test_the_hash_is_that_of_the_content(tmp_path):
    """Equal examples have equal hashes wherever they lie;
    whatever changes a prompt or a list changes the hash."""
    prepared = prepare(small_config(tmp_path))
    assert (
        prepare(small_config(tmp_path, prepared_dir=str(tmp_path / "elsewhere"))).hash
        == prepared.hash
    )
    changes = (
        {"data_seed": 1},
        {"train_size": 31},
        {"decay": 0.4},
        {"history": 6},
        {"followers": 9},
    )
    prepared_others = [prepare(small_config(tmp_path, **change)) for change in changes]
    assert len({prepared.hash, *(other.hash for other in prepared_others)}) == 1 + len(changes)
    assert len({prepared.folder, *(other.folder for other in prepared_others)}) == 1 + len(changes)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "name, damage",
    [
        ("log.item.npy", lambda file: file.write_bytes(file.read_bytes()[:-50])),
        ("log.item.npy", flip),
        ("train.scores.npy", Path.unlink),
        ("texts.json", lambda file: file.write_text(file.read_text().replace("a", "b", 1))),
        (
            "meta.json",
            lambda file: file.write_text(file.read_text().replace('ory": 20}', 'ory": 21}')),
        ),
    ],
    ids=["cut", "flipped", "missing", "other title", "other history"],
)
def test_damaged_prepared_examples_are_refused(name, damage, tmp_path):
    """A prepared folder that is not what was written is an error with its path,
    never other data."""
    config = small_config(tmp_path, history=20)
    folder = prepare(config).folder
    damage(folder / name)
    with pytest.raises(ValueError, match=f"{folder.name}"):
        prepare(config)


def test_failed_preparation_leaves_nothing_behind(tmp_path, monkeypatch):
    """If writing fails, no temporary folder is left over and a later call starts afresh."""
    config = small_config(tmp_path)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="prepared/planted.*no space left"),
    ):

        def full(*_):
            raise OSError("no space left on device")

        patch.setattr("loaders.frozen.np.save", full)
        prepare(config)
    assert list((tmp_path / "prepared").iterdir()) == []
    assert len(prepare(config).splits["train"]) == 30


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
    interactions = prepared[0].interactions
    for options, p in zip(inputs, prepared, strict=True):
        test = p.splits["test"]
        for name in ("position", "candidates", "target", "negative_order"):
            assert (getattr(test, name) == getattr(prepared[0].splits["test"], name)).all()
        for e in range(len(test)):
            at = int(test.position[e])
            rows = [
                r
                for r in own_rows(interactions, at)
                if r < at and (options["history_items"] == "all" or interactions.rating[r] >= 4)
            ][-20:]
            lines = render_prompt(test[e]).split("\n")
            form = "{} | Rating: {:g}" if options["ratings"] else "{}"
            shown = [
                form.format(interactions.titles[interactions.item[r]], interactions.rating[r])
                for r in rows
            ]
            assert any(lines[i : i + len(shown)] == shown for i in range(len(lines))), (
                options,
                lines,
            )
            if rows and not options["ratings"]:
                assert not any(word in "\n".join(lines) for word in ("rated", "ratings", "Rating"))


# ------------------------------------------------------------------------ cached tokens
def same_encoding(a, b) -> bool:
    prompts = all(
        np.array_equal(p, q) and p.dtype == q.dtype
        for p, q in zip(a.prompts, b.prompts, strict=True)
    )
    return (
        prompts
        and a.completions == b.completions
        and (a.num_shortened, a.num_dropped) == (b.num_shortened, b.num_dropped)
    )


def test_tokens_are_made_once_and_read_back(tokenizer, folders, tmp_path, monkeypatch):
    """The second time nothing is tokenised; another tokenizer, length or split has its own file."""
    prepared = prepare(
        DataConfig(planted_users=80, followers=3, train_size=40, prepared_dir=str(tmp_path))
    )
    whole = encode_split(prepared, "train", tokenizer, 10_000)
    limit = max(map(len, whole.prompts))
    first = encode_split(prepared, "train", tokenizer, limit)
    assert first.num_shortened > 0  # a length that bites
    with monkeypatch.context() as patched:
        patched.setattr(data, "encode_examples", None)
        again = encode_split(prepared, "train", tokenizer, limit)
    assert same_encoding(first, again)
    assert same_encoding(first, encode_examples(prepared.splits["train"], tokenizer, limit))
    encode_split(prepared, "test", tokenizer, 10_000)
    other = next(
        Tokenizer(f) for f in folders.values() if Tokenizer(f).fingerprint != tokenizer.fingerprint
    )
    encode_split(prepared, "train", other, 10_000)
    assert len(list(prepared.folder.glob("tokens-*"))) == 4


@pytest.mark.parametrize("options", [{}, {"ratings": False}])
def test_histories_are_found_among_a_prompts_tokens(tokenizer, options):
    """To the token, in every template, with ratings or without, shortened or whole."""
    examples = nasty_examples(**options)
    longest = max(len(ids) for ids in encode_examples(examples, tokenizer, 100_000).prompts)
    for limit in (100_000, longest - 4):
        encoded = encode_examples(examples, tokenizer, limit)
        spans = history_spans(encoded, tokenizer)
        for e, (first, end) in enumerate(spans.tolist()):
            found = tokenizer.decode(encoded.prompts[e][first:end].tolist())
            example, kept = examples[e], found.strip("\n ").split("\n")
            shown = example.history[-len(kept) :]
            assert [line.strip() for line in kept] == [
                title if np.isnan(rating) else f"{title} | Rating: {rating:g}"
                for title, rating in shown
            ]
            assert limit < 100_000 or len(shown) == len(example.history)


def test_an_empty_history_has_an_empty_span(tokenizer, tmp_path):
    """Where no item before an example was liked; what is kept is read back."""
    options = {"planted_users": 200, "followers": 3, "train_size": 300, "min_history": 1}
    config = DataConfig(**options, history_items="positive", prepared_dir=str(tmp_path))
    prepared = prepare(config)
    made = encode_split(prepared, "train", tokenizer, 1024, histories=True)
    read = encode_split(prepared, "train", tokenizer, 1024, histories=True)
    examples = prepared.splits["train"]
    empty = np.array([len(examples.history_rows(e)) == 0 for e in range(len(examples))])
    assert empty.any() and np.array_equal(np.diff(read.histories)[:, 0] == 0, empty)
    assert np.array_equal(made.histories, read.histories) and read.histories.min() >= 1


def test_where_histories_stand_is_kept_with_the_tokens(tokenizer, tmp_path):
    """Asked for, it has a folder of its own."""
    options = {"planted_users": 80, "followers": 3, "train_size": 20}
    prepared = prepare(DataConfig(**options, prepared_dir=str(tmp_path)))
    assert encode_split(prepared, "train", tokenizer, 1024).histories is None
    made = encode_split(prepared, "train", tokenizer, 1024, histories=True)
    read = encode_split(prepared, "train", tokenizer, 1024, histories=True)
    assert same_encoding(made, read) and np.array_equal(made.histories, read.histories)


def test_damaged_tokens_are_named(tokenizer, tmp_path):
    """A cut-off file is an error that names it and says what to do;
    a read-only folder only costs the cache."""
    prepared = prepare(
        DataConfig(planted_users=80, followers=3, train_size=20, prepared_dir=str(tmp_path))
    )
    encode_split(prepared, "train", tokenizer, 1024)
    (folder,) = prepared.folder.glob("tokens-*")
    file = folder / "prompts.npy"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{folder}.*delete"):
        encode_split(prepared, "train", tokenizer, 1024)
    prepared.folder = tmp_path / "gone"
    assert len(encode_split(prepared, "train", tokenizer, 1024).prompts) == 20
