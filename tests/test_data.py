"""Examples against plain loops over the log, prompts and tokens with tokenizers of three families, batches, and the CLI."""

import json
import os
import subprocess
import sys
import threading
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_json
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer

import data
from data import (
    ITEMS,
    NUM_CANDIDATES,
    TEMPLATES,
    Example,
    Examples,
    Interactions,
    build_examples,
    encode_examples,
    make_interactions,
    micro_batches,
    prefetch,
    render_prompt,
    tree_widths,
)
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, encode_split, prepare, words_of
from loaders.movielens import WORDS as MOVIES

ROOT = Path(__file__).parents[1]
SPLITS = ("train", "val", "test")


def random_rows(
    seed: int, num_users: int = 40, num_items: int = 70, shortest: int = 4, longest: int = 45
) -> list[tuple]:
    """(user, item, rating, timestamp): nobody repeats an item, times differ, some users are too short for any example."""
    rng = np.random.default_rng(seed)
    rows = []
    for u in range(num_users):
        items = rng.permutation(num_items)[: rng.integers(shortest, longest + 1)]
        times = np.sort(rng.permutation(10_000)[: len(items)])
        rows += [
            (f"u{u}", int(i), int(rng.integers(1, 6)), int(t))
            for i, t in zip(items, times, strict=True)
        ]
    return rows


def log_of(rows: list[tuple]) -> Interactions:
    return make_interactions(
        *zip(*rows, strict=True), {row[1]: f"Title {row[1]}" for row in rows}, "movielens"
    )


def own_rows(log: Interactions, row: int) -> range:
    """All rows of the user who owns this one."""
    return range(int(log.start[log.user[row]]), int(log.start[log.user[row] + 1]))


def arrays_of(splits: dict[str, Examples]) -> list[np.ndarray]:
    return [getattr(splits[split], name) for split in SPLITS for name in Examples.ARRAYS]


def all_equal(a: dict[str, Examples], b: dict[str, Examples]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(arrays_of(a), arrays_of(b), strict=True))


# ------------------------------------------------------------------------------------------------ examples
def chosen_by_loop(ratings: list[float], config: DataConfig) -> int | None:
    """Index of the chosen one among followers with these ratings; None where there is no example."""
    if config.positive == "first":
        return next((s for s, rating in enumerate(ratings) if rating >= config.min_rating), None)
    scores = [rating / (1 + s) ** config.decay for s, rating in enumerate(ratings)]
    best = scores.index(max(scores))  # the earliest of equal ones
    random_score = config.neg_rating / (1 + config.neg_step) ** config.decay
    counts = ratings[best] >= config.min_rating and scores[best] > random_score
    return best if counts else None


def positions_by_loop(log: Interactions, config: DataConfig) -> dict[str, list[int]]:
    """All positions that make an example, per split."""
    found: dict[str, list[int]] = {split: [] for split in SPLITS}
    for start, end in zip(log.start[:-1].tolist(), log.start[1:].tolist(), strict=True):
        for p in range(start + config.min_history, end):
            ratings = log.rating[p : p + config.followers].tolist()
            if p + config.followers <= end - 2 and chosen_by_loop(ratings, config) is not None:
                found["train"].append(p)
            if p >= end - 2 and log.rating[p] >= config.min_rating:
                found["test" if p == end - 1 else "val"].append(p)
    return found


CONFIGS = [
    DataConfig(train_size=0),
    DataConfig(train_size=0, decay=0.0),  # many followers with equal scores
    DataConfig(train_size=0, positive="first", followers=4, min_history=1, history=3),
    DataConfig(train_size=0, exclude="seen", history=8),
    DataConfig(
        train_size=0, negatives="popularity", min_rating=3.0, decay=1.0, neg_rating=2.0, neg_step=19
    ),
    # random candidates of 4.5 / 3 = 1.5: where the best follower scores less there is no example
    DataConfig(train_size=0, min_rating=1.0, decay=1.0, neg_rating=4.5, neg_step=2),
]


@pytest.mark.parametrize(
    "config", CONFIGS, ids=["default", "ties", "first", "seen", "popularity", "strong random"]
)
@pytest.mark.parametrize("seed", range(3))
def test_examples_equal_a_plain_loop(seed, config):
    """Positions, candidates, chosen item, scores and flags of every example are what the definitions say."""
    log = log_of(random_rows(seed))
    splits = build_examples(log, replace(config, data_seed=seed))
    expected = positions_by_loop(log, config)
    random_score = np.float32(config.neg_rating / (1 + config.neg_step) ** config.decay)
    for split, examples in splits.items():
        assert sorted(examples.position.tolist()) == expected[split]
        num_follow = config.followers if split == "train" else 1
        for e, p in enumerate(examples.position.tolist()):
            rows = own_rows(log, p)
            follow = {int(log.item[p + s]): s for s in range(num_follow)}
            candidates = examples.candidates[e].tolist()
            assert len(set(candidates)) == NUM_CANDIDATES and follow.keys() <= set(candidates)
            randoms = set(candidates) - follow.keys()
            if config.exclude == "all":
                assert not randoms & set(log.item[rows.start : rows.stop].tolist())
            assert not randoms & set(log.item[max(rows.start, p - config.history) : p].tolist())
            chosen = (
                chosen_by_loop(log.rating[p : p + num_follow].tolist(), config)
                if split == "train"
                else 0
            )
            assert (
                candidates[examples.target[e]] == log.item[p + chosen]
                and log.rating[p + chosen] >= config.min_rating
            )
            for slot, item in enumerate(candidates):
                assert examples.is_random[e, slot] == (item in randoms)
                s = follow.get(item)
                score = random_score if s is None else log.rating[p + s] / (1 + s) ** config.decay
                assert examples.scores[e, slot] == pytest.approx(score, rel=1e-6)
            if config.positive == "argmax":
                assert (
                    examples.scores[e].max() == examples.scores[e, examples.target[e]]
                    or split != "train"
                )


def test_training_never_sees_the_last_two():
    """Histories and followers of training examples end before the user's last two interactions, whatever the options."""
    log = log_of(random_rows(0))
    for followers in (1, 10, 19):
        examples = build_examples(
            log, DataConfig(train_size=0, followers=followers, min_history=1)
        )["train"]
        ends = log.start[log.user[examples.position] + 1]
        assert (examples.position + followers).max() <= len(log.user) - 2
        assert (examples.position + followers <= ends - 2).all()
        assert (examples.position + followers == ends - 2).any()


def test_default_scores_are_those_of_the_paper():
    """rating / sqrt(1 + step); random items count as rated 3, ten steps away."""
    examples = build_examples(log_of(random_rows(1)), DataConfig())["train"]
    assert examples.scores[examples.is_random] == pytest.approx(3 / np.sqrt(11), rel=1e-6)
    known = {rating / np.sqrt(1 + step) for rating in range(1, 6) for step in range(10)}
    assert all(
        min(abs(score - k) for k in known) < 1e-6
        for score in np.unique(examples.scores[~examples.is_random])
    )


def test_chosen_and_rejected_slots_are_uniform():
    """The place in the list says nothing about the target, nor about the first negative."""
    splits = build_examples(
        log_of(random_rows(2, num_users=400, num_items=100)), DataConfig(train_size=0)
    )
    for slots in [
        slots
        for examples in splits.values()
        for slots in (examples.target, examples.negatives(1)[:, 0])
    ]:
        expected = len(slots) / NUM_CANDIDATES
        chi_square = (
            (np.bincount(slots, minlength=NUM_CANDIDATES) - expected) ** 2 / expected
        ).sum()
        assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_random_candidates_have_the_stated_distribution(kind):
    """Uniform over the items the user never touched, or in proportion to how often the log has them."""
    rng = np.random.default_rng(3)
    weights = 1 / (1 + np.arange(60.0))
    rows = []
    for u in range(150):
        items = rng.choice(60, size=rng.integers(30, 36), replace=False, p=weights / weights.sum())
        rows += [(u, int(i), 5, t) for t, i in enumerate(items)]
    rows += [
        (150, i, 5, i) for i in range(24)
    ]  # too short for 19 followers; makes the popular ones more popular
    log = log_of(rows)
    examples = build_examples(
        log, DataConfig(train_size=0, test_size=1, followers=19, negatives=kind)
    )["train"]
    popularity = (
        np.bincount(log.item, minlength=log.num_items)
        if kind == "popularity"
        else np.ones(log.num_items)
    )
    mean, variance = np.zeros(log.num_items), np.zeros(log.num_items)
    for p in examples.position.tolist():
        share = popularity.astype(float)
        share[log.item[own_rows(log, p)]] = 0
        share /= share.sum()
        mean, variance = mean + share, variance + share * (1 - share)
    drawn = np.bincount(examples.candidates[examples.is_random], minlength=log.num_items)
    assert drawn.sum() == len(examples) > 800  # one random candidate each
    assert np.abs((drawn - mean) / np.sqrt(variance + 1e-9)).max() < 4


def test_exclude_seen_admits_what_the_user_touched_elsewhere():
    """Under --exclude seen, items from before the shown history or from the future may be random candidates."""
    log = log_of(random_rows(4))
    touched = {"all": 0, "seen": 0}
    for exclude in touched:
        for examples in build_examples(log, DataConfig(exclude=exclude, history=6)).values():
            for e, p in enumerate(examples.position.tolist()):
                randoms = examples.candidates[e][examples.is_random[e]]
                touched[exclude] += len(
                    set(randoms.tolist()) & set(log.item[own_rows(log, p)].tolist())
                )
    assert touched["all"] == 0 and touched["seen"] > 100


def test_examples_are_a_function_of_the_seed():
    """The same seed draws the same examples, another one other candidates, orders and templates of other prefixes."""
    log = log_of(random_rows(5))
    one, again, other = (
        build_examples(log, DataConfig(train_size=50, data_seed=seed)) for seed in (1, 1, 2)
    )
    assert all_equal(one, again)
    for split in SPLITS:
        assert not np.array_equal(one[split].position, other[split].position)
        assert not np.array_equal(one[split].candidates, other[split].candidates)
        assert not np.array_equal(one[split].template, other[split].template)
    assert set(one["train"].position.tolist()) != set(other["train"].position.tolist())


def test_sizes_take_a_random_part():
    """--train_size and --test_size limit the splits; what is drawn is spread over the log and holds no example twice."""
    log = log_of(random_rows(6, num_users=100))
    splits = build_examples(log, DataConfig(train_size=60, test_size=15))
    assert [len(splits[split]) for split in SPLITS] == [60, 15, 15]
    for examples in splits.values():
        assert len(set(examples.position.tolist())) == len(examples)
        assert len(np.unique(log.user[examples.position])) >= 15


def test_the_order_of_input_rows_does_not_matter():
    """Where times differ, a shuffled file gives the same log and the same examples."""
    rows = random_rows(7)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert all_equal(build_examples(log_of(rows)), build_examples(log_of(shuffled)))


def test_users_who_touched_almost_everything_are_named():
    """If fewer random candidates exist than a list needs, the error says for whom."""
    rows = random_rows(8, num_items=60) + [("greedy", i, 5, i) for i in range(55)]
    with pytest.raises(ValueError, match="user greedy: fewer than 10 items"):
        build_examples(log_of(rows), DataConfig(train_size=0))


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_just_enough_random_candidates_are_found(kind):
    """A user who left exactly as many items as a list needs gets all of them, however rarely one is drawn by chance."""
    rows = [("greedy", i, 5, i) for i in range(281)] + [("other", i, 5, i) for i in range(270, 300)]
    splits = build_examples(
        log_of(rows), DataConfig(followers=1, test_size=0, train_size=20, negatives=kind)
    )
    log = splits["test"].log
    (e,) = [e for e in range(len(splits["test"])) if splits["test"][e].user == "greedy"]
    left = {f"Title {i}" for i in range(281, 300)}
    assert log.num_items == 300 and set(splits["test"][e].candidates) == left | {"Title 280"}


def test_no_example_is_an_error_that_names_the_split():
    """A log too short for the options is refused, not turned into an empty split."""
    rows = random_rows(9, shortest=12, longest=16)
    with pytest.raises(ValueError, match="no train example.*--min_history"):
        build_examples(log_of(rows))
    last_two = {
        row
        for user in {row[0] for row in rows}
        for row in [row for row in rows if row[0] == user][-2:]
    }
    rows = [(u, i, 3 if (u, i, r, t) in last_two else r, t) for u, i, r, t in rows]
    with pytest.raises(ValueError, match="no val example"):
        build_examples(log_of(rows), DataConfig(followers=2))


def test_negatives_respect_their_source_and_are_nested():
    """They are distinct, never the target, random or following as asked; K negatives are the first of K + 1."""
    splits = build_examples(log_of(random_rows(10)))
    for split, source, most in (("train", "both", 19), ("train", "random", 10), ("train", "follow", 9), ("test", "both", 19), ("test", "random", 19)):  # fmt: skip
        examples = splits[split]
        whole = examples.negatives(most, source)
        assert whole.shape == (len(examples), most)
        for row, target, is_random in zip(whole, examples.target, examples.is_random, strict=True):
            assert len(set(row.tolist())) == most and target not in row
            assert source == "both" or (is_random[row] == (source == "random")).all()
        for K in range(1, most):
            assert (examples.negatives(K, source) == whole[:, :K]).all()
        with pytest.raises(
            ValueError, match=f"--num_negatives {most + 1}: an example has only {most}"
        ):
            examples.negatives(most + 1, source)
    share = (
        splits["train"]
        .is_random[np.arange(len(splits["train"]))[:, None], splits["train"].negatives(3)]
        .mean()
    )
    assert share == pytest.approx(10 / 19, abs=0.05)  # drawn from both alike


def test_select_keeps_rows_together():
    """A part of a split shows the same prompts, candidates and negatives as the whole."""
    examples = build_examples(log_of(random_rows(11)))["val"]
    part = examples.select([3, 0, 5])
    assert [part[e] for e in range(3)] == [examples[e] for e in (3, 0, 5)]
    assert (part.negatives(4) == examples.negatives(4)[[3, 0, 5]]).all()


@pytest.mark.parametrize(
    "options, culprit",
    [
        ({"dataset": "movies"}, "--dataset .*'movies'"),
        ({"positive": "last"}, "--positive"),
        ({"exclude": "none"}, "--exclude"),
        ({"negatives": "hard"}, "--negatives"),
        ({"followers": 20}, "--followers .* 19, got 20"),
        ({"followers": 0}, "--followers"),
        ({"min_history": 0}, "--min_history"),
        ({"history": 4}, "--min_history"),
        ({"core": -1}, "--core"),
        ({"train_size": -1}, "--train_size"),
        ({"num_templates": len(TEMPLATES) + 1}, f"--num_templates.*{len(TEMPLATES)}"),
    ],
)
def test_senseless_options_are_refused_by_name(options, culprit):
    """An option outside its range is one message that names it."""
    with pytest.raises(ValueError, match=culprit):
        DataConfig(**options)


# ------------------------------------------------------------------------------------------------ prepared once
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
    """The second call reads equal arrays and titles without touching the raw data; nothing else is left in the folder."""
    first = prepare(small_config(tmp_path))
    monkeypatch.setattr("loaders.frozen.load_log", None)
    again = prepare(small_config(tmp_path))
    assert (first.hash, first.raw_counts, first.folder) == (
        again.hash,
        again.raw_counts,
        again.folder,
    )
    assert all_equal(first.splits, again.splits)
    built = build_examples(again.log, small_config(tmp_path))
    assert all_equal(built, again.splits)
    assert [built[s][e] for s in SPLITS for e in range(len(built[s]))] == [again.splits[s][e] for s in SPLITS for e in range(len(built[s]))]  # fmt: skip
    assert first.raw_counts == {
        "users": 60,
        "items": again.log.num_items,
        "interactions": len(again.log.user),
    }
    assert list((tmp_path / "prepared").iterdir()) == [first.folder]


def test_the_hash_is_that_of_the_content(tmp_path):
    """Equal examples have equal hashes wherever they lie; whatever changes a prompt or a list changes the hash."""
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
        {"num_templates": 1},
    )
    prepared_others = [prepare(small_config(tmp_path, **change)) for change in changes]
    assert len({prepared.hash, *(other.hash for other in prepared_others)}) == 1 + len(changes)
    assert len({prepared.folder, *(other.folder for other in prepared_others)}) == 1 + len(changes)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "name, damage",
    [
        ("examples.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-50])),
        ("examples.safetensors", lambda file: file.write_bytes(b"")),
        ("examples.safetensors", flip),
        ("examples.safetensors", Path.unlink),
        ("meta.json", lambda file: file.write_text(file.read_text()[:-50])),
        (
            "meta.json",
            lambda file: file.write_text(
                file.read_text().replace('"history": 20', '"history": 21')
            ),
        ),
        ("meta.json", lambda file: file.write_text("{}")),
    ],
    ids=["cut", "empty", "flipped", "missing", "meta cut", "other history", "meta empty"],
)
def test_damaged_prepared_examples_are_refused(name, damage, tmp_path):
    """A prepared folder that is not what was written is an error with its path, never other data."""
    config = small_config(tmp_path)
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

        patch.setattr("loaders.frozen.save_file", full)
        prepare(config)
    assert list((tmp_path / "prepared").iterdir()) == []
    assert len(prepare(config).splits["train"]) == 30


# ------------------------------------------------------------------------------------------------ prompts
def test_prompt_shows_history_then_candidates():
    """History lines are "Title | Rating: 4", oldest first, half stars kept; then the candidates; "Answer:" ends it."""
    history, candidates = (
        [("Alien: {0}", 4.0), ("M", 3.5), ("{history}", 5.0)],
        ["Élite", "% s", "12 Monkeys"],
    )
    for template in range(len(TEMPLATES)):
        lines = render_prompt(Example(MOVIES, "u", history, candidates, 0, [], template)).split(
            "\n"
        )
        at = lines.index("Alien: {0} | Rating: 4")
        assert lines[at : at + 3] == [
            "Alien: {0} | Rating: 4",
            "M | Rating: 3.5",
            "{history} | Rating: 5",
        ]
        assert lines[-4:] == [*candidates, "Answer:"]
        assert "movies" in "\n".join(lines) and "{" not in "".join(lines[:at])


def test_the_four_inputs_differ_in_what_a_history_shows(tmp_path):
    """All or liked items, with or without ratings: same candidates and targets, another hash each, the words to match."""
    inputs = [
        {"history_items": items, "ratings": ratings}
        for items in ("all", "positive")
        for ratings in (True, False)
    ]
    prepared = [prepare(small_config(tmp_path, **options)) for options in inputs]
    assert len({p.hash for p in prepared}) == 4
    log = prepared[0].log
    for options, p in zip(inputs, prepared, strict=True):
        test = p.splits["test"]
        for name in ("position", "candidates", "target", "others"):
            assert (getattr(test, name) == getattr(prepared[0].splits["test"], name)).all()
        for e in range(len(test)):
            at = int(test.position[e])
            rows = [
                r
                for r in own_rows(log, at)
                if r < at and (options["history_items"] == "all" or log.rating[r] >= 4)
            ][-20:]
            lines = render_prompt(test[e]).split("\n")
            form = "{} | Rating: {:g}" if options["ratings"] else "{}"
            shown = [form.format(log.titles[log.item[r]], log.rating[r]) for r in rows]
            assert any(lines[i : i + len(shown)] == shown for i in range(len(lines))), (
                options,
                lines,
            )
            if rows and not options["ratings"]:
                assert not any(word in "\n".join(lines) for word in ("rated", "ratings", "Rating"))


def test_prompt_rows_are_those_before_the_position():
    """The shown history is the user's latest interactions before the predicted one, in order, and nobody else's."""
    log = log_of(random_rows(12))
    for examples in build_examples(log, DataConfig(train_size=100, history=7)).values():
        for e, p in enumerate(examples.position.tolist()):
            rows = list(own_rows(log, p))
            shown = rows[: rows.index(p)][-7:]
            assert examples[e].history == [
                (log.titles[log.item[r]], float(log.rating[r])) for r in shown
            ]
            assert examples[e].user == log.user_ids[log.user[p]]


def test_templates_differ_and_words_follow_the_data_set():
    """All templates are distinct and in use; each names what is recommended by the data set's word."""
    prompts = {
        (words, t): render_prompt(Example(words, "u", [("A", 4.0)], ["B", "C"], 0, [], t))
        for words in (MOVIES, words_of("planted"), ITEMS)
        for t in range(len(TEMPLATES))
    }
    assert len(set(prompts.values())) == len(prompts)
    log = log_of(random_rows(13))
    assert set(build_examples(log)["train"].template.tolist()) == set(range(len(TEMPLATES)))
    assert set(build_examples(log, DataConfig(num_templates=2))["train"].template.tolist()) == {
        0,
        1,
    }


# ------------------------------------------------------------------------------------------------ tokenizers
SPECIAL = {
    "llama3": "<|end_of_text|>",
    "qwen": "<|endoftext|>",
    "llama2": "</s>",
}  # of each family, the EOS
NASTY = [
    "...And Justice for All", "(500) Days of Summer", "Élite", "'burbs", "12 Monkeys", "Alien", "Alien 3", "1984", "M",
    "2001: A Space Odyssey", "Star Wars: Episode IV", "Airplane II:", "Mr. & Mrs.", "E.T.", "What?", "$9.99", "Title  two spaces",
    "日本", "<|end_of_text|>", "Say <|endoftext|> twice <|endoftext|>", "a </s> b", "<s>", "Answer: no", "| Rating: 5", "Ünïted 93 ½",
]  # fmt: skip
WORDS = [
    "the",
    "of",
    "and",
    "Alien",
    "Matrix",
    "Space",
    "Wars",
    "Rating",
    "Answer",
    "movies",
    "user",
    "watched",
    "these",
    "next",
    "following",
    "oldest",
    "first",
]
TEXTS = [
    render_prompt(Example(MOVIES, "u", [(t, 4.0) for t in NASTY], NASTY, 0, [], n))
    for n in range(5)
]
TEXTS += [f" {a} {b}: {a}\n\n{b} 19{n}\n  \n" for n, a in enumerate(WORDS) for b in WORDS]


def byte_level(family: str) -> HFTokenizer:
    """Llama-3's or Qwen's pipeline as published, with a vocabulary of 900."""
    numbers = r"\p{N}{1,3}" if family == "llama3" else r"\p{N}"
    pattern = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}"
    pattern += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = HFTokenizer(models.BPE(ignore_merges=family == "llama3"))
    tokenizer.normalizer = normalizers.NFC() if family == "qwen" else None
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    if family == "llama3":
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if family == "llama3":
        bos = processors.TemplateProcessing(
            "<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
        )
        tokenizer.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=False), bos]
        )
    return tokenizer


def llama2_style() -> HFTokenizer:
    """Llama-2's pipeline as published: "▁" in front and for spaces, merges without pre-tokenizer, bytes for the rest."""
    tokenizer = HFTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex("▁+|[:|.\n]"), "merged_with_next"
    )  # in training only
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    special = ["<unk>", "<s>", "</s>", *byte_tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, limit_alphabet=80, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    content = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] not in byte_tokens
    ]
    return HFTokenizer.from_str(json.dumps(content))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model folder per family, with tokenizer.json and the EOS in config.json."""
    found = {}
    for family in SPECIAL:
        found[family] = tmp_path_factory.mktemp(family)
        inner = llama2_style() if family == "llama2" else byte_level(family)
        inner.save(str(found[family] / "tokenizer.json"))
        write_json(
            found[family] / "config.json", {"eos_token_id": inner.token_to_id(SPECIAL[family])}
        )
    return found


@pytest.fixture(params=SPECIAL)
def family(request) -> str:
    return request.param


@pytest.fixture
def tokenizer(family, folders) -> Tokenizer:
    return Tokenizer(folders[family])


def plain(folder: Path) -> HFTokenizer:
    """The file itself, with none of our policy around it."""
    return HFTokenizer.from_file(str(folder / "tokenizer.json"))


def test_bos_is_the_tokenizers_own(family, tokenizer, folders):
    """Llama prompts begin with one BOS, Qwen's with none: the same ids as the tokenizer's default for harmless text."""
    inner = plain(folders[family])
    bos = {"llama3": "<|begin_of_text|>", "qwen": None, "llama2": "<s>"}[family]
    assert tokenizer.bos_ids == ([inner.token_to_id(bos)] if bos else [])
    prompt = "A user watched Alien 3 | Rating: 4\nAnswer:"
    (ids,) = tokenizer.encode_prompts([prompt])
    assert ids == inner.encode(prompt).ids
    assert sum(ids.count(i) for i in range(3)) == (
        1 if bos else 0
    )  # ids 0 to 2 are the special tokens


@pytest.mark.parametrize("title", NASTY)
def test_prompt_and_completion_make_the_joint_encoding(title, tokenizer):
    """Prompt ids + completion ids are what the tokenizer makes of the whole text, and the completion ends in EOS."""
    prompt = render_prompt(Example(MOVIES, "u", [(title, 4.0)], [title, "Alien 3"], 0, [], 0))
    (prompt_ids,), (joint,) = (
        tokenizer.encode_prompts([prompt]),
        tokenizer.encode_prompts([f"{prompt} {title}"]),
    )
    (completion,) = tokenizer.encode_completions([title])
    assert prompt_ids + completion[:-1] == joint
    assert (
        completion[-1] == tokenizer.eos_id and tokenizer.eos_id not in prompt_ids + completion[:-1]
    )


def test_joint_encoding_is_that_of_the_file(family, tokenizer, folders):
    """For titles without special tokens, prompt ids + completion ids equal the plain tokenizer's default encoding."""
    inner = plain(folders[family])
    for title in NASTY:
        if "<" not in title:
            (prompt,), (completion,) = (
                tokenizer.encode_prompts(["Alien\nAnswer:"]),
                tokenizer.encode_completions([title]),
            )
            assert prompt + completion[:-1] == inner.encode(f"Alien\nAnswer: {title}").ids, title


def test_special_tokens_in_titles_stay_text(family, tokenizer, folders):
    """A title that spells a control token is spelled out, so that it neither ends an answer nor starts a text."""
    inner = plain(folders[family])
    specials = [token["content"] for token in json.loads(inner.to_str())["added_tokens"]]
    assert SPECIAL[family] in specials
    for special in specials:
        title = f"Say {special} twice"
        ids = (
            tokenizer.encode_completions([title])[0][:-1]
            + tokenizer.encode_prompts([title])[0][len(tokenizer.bos_ids) :]
        )
        assert not {inner.token_to_id(s) for s in specials} & set(ids)
        assert tokenizer.answer(tokenizer.encode_completions([title])[0]) == title


def test_answers_read_back_as_titles(tokenizer):
    """What a completion's ids spell, up to EOS, is the title."""
    for title, ids in zip(NASTY, tokenizer.encode_completions(NASTY), strict=True):
        assert tokenizer.answer(ids) == title


def test_saved_truncation_and_padding_are_ignored(family, folders, tokenizer, tmp_path):
    """A tokenizer.json saved with truncation and padding switched on encodes as without."""
    inner = plain(folders[family])
    inner.enable_truncation(8)
    inner.enable_padding(length=64)
    inner.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "config.json", {"eos_token_id": 2})
    texts = ["Alien", "a long text " * 30]
    assert Tokenizer(tmp_path).encode_prompts(texts) == tokenizer.encode_prompts(texts)
    assert Tokenizer(tmp_path).bos_ids == tokenizer.bos_ids


@pytest.mark.parametrize(
    "files, eos_id, stop_ids",
    [
        ({"config.json": '{"eos_token_id": 1}'}, 1, {1}),
        ({"config.json": '{"eos_token_id": [1, 2]}'}, 1, {1, 2}),
        (
            {
                "config.json": '{"eos_token_id": 1}',
                "generation_config.json": '{"eos_token_id": [2, 1, 300]}',
            },
            1,
            {1, 2, 300},
        ),
        (
            {
                "config.json": '{"eos_token_id": 2}',
                "generation_config.json": '{"eos_token_id": 1,}',
            },
            2,
            {2},
        ),
        (
            {
                "config.json": '{"eos_token_id": null}',
                "generation_config.json": '{"eos_token_id": 2}',
            },
            2,
            {2},
        ),
        ({"config.json": "{}", "tokenizer_config.json": '{"eos_token": "<|eot_id|>"}'}, 2, {2}),
        (
            {
                "tokenizer_config.json": '{"eos_token": {"content": "<|end_of_text|>", "lstrip": false}}'
            },
            1,
            {1},
        ),
        (
            {
                "config.json": '{"eos_token_id": 1}',
                "tokenizer_config.json": '{"eos_token": "<|eot_id|>"}',
            },
            2,
            {1, 2},
        ),
        ({"config.json": '{"eos_token_id": 0}'}, 0, {0}),
    ],
)
def test_eos_and_stop_ids_come_from_the_configs(files, eos_id, stop_ids, folders, tmp_path):
    """What all sources hold is trained on, else generation_config's, tokenizer's, config's; others stop."""
    (tmp_path / "tokenizer.json").write_bytes((folders["llama3"] / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (eos_id, stop_ids)
    assert all(type(i) is int for i in tokenizer.stop_ids)


@pytest.mark.parametrize(
    "files", [{}, {"tokenizer_config.json": '{"eos_token": "<nowhere>"}'}, {"config.json": "{}"}]
)
def test_no_eos_is_an_error(files, folders, tmp_path):
    """Without any EOS the folder is refused, and the message says where one was looked for."""
    (tmp_path / "tokenizer.json").write_bytes((folders["llama3"] / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="no eos_token_id in config.json.*tokenizer_config.json"):
        Tokenizer(tmp_path)


def test_unreadable_tokenizers_are_named(tmp_path):
    """A folder without tokenizer.json, and one that does not parse, are one message each."""
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable tokenizer"):
        Tokenizer(tmp_path)


def test_newline_ids_are_spaces_and_a_line_break(tokenizer):
    """Exactly the tokens that spell optional spaces and then a line break, the byte itself among them."""
    found = tokenizer.newline_ids()
    assert {tokenizer.encode(["a\nb"])[0][-2], tokenizer.encode(["a\rb"])[0][-2]} <= found
    texts = {
        i: tokenizer.inner.decode(tokenizer.encode(["a"])[0] + [i])[1:]
        for i in range(tokenizer.inner.get_vocab_size())
    }
    assert found == {i for i, text in texts.items() if text.lstrip(" ")[:1] in ("\n", "\r")}
    assert not found & tokenizer.stop_ids


def test_an_answer_ends_at_the_first_stop_or_line_break(tokenizer):
    """Nothing behind a stop id or a line-break token changes the answer, nor is it part of it."""
    (ids,) = tokenizer.encode_completions(["Alien 3"])
    (more,) = tokenizer.encode_completions(["Space: 1999"])
    for end in sorted(tokenizer.stop_ids | tokenizer.newline_ids()):
        assert tokenizer.answer(ids[:-1] + [end]) == "Alien 3", end
        assert tokenizer.answer(ids[:-1] + [end] + more) == "Alien 3", end
        assert tokenizer.answer([end] + more) == "", end
    assert tokenizer.answer(ids[:-1]) == "Alien 3" and tokenizer.answer([]) == ""


# ------------------------------------------------------------------------------------------------ encoding
def nasty_examples(rows=None, titles=None, **options) -> Examples:
    """Test examples whose titles are NASTY and more."""
    rows = rows or random_rows(14, num_users=15, num_items=50, shortest=8, longest=25)
    titles = titles or [*NASTY, *(f"{word} {n}" for n in range(3) for word in WORDS)]
    log = make_interactions(*zip(*rows, strict=True), dict(enumerate(titles)), "movielens")
    return build_examples(
        log, DataConfig(followers=2, min_rating=1, min_history=3, history=9, **options)
    )["test"]


def test_encoded_examples_equal_their_text(tokenizer):
    """With room enough, prompts are encoded whole, and every candidate's completion continues its prompt's text."""
    examples = nasty_examples()
    encoded = encode_examples(examples, tokenizer, 100_000)
    assert (encoded.num_shortened, encoded.num_dropped) == (0, 0) and len(encoded.prompts) == len(
        examples
    ) > 10
    for e in range(len(examples)):
        prompt = render_prompt(examples[e])
        for title, ids in zip(
            examples[e].candidates, encoded.slots(e, range(NUM_CANDIDATES)), strict=True
        ):
            assert [*encoded.prompts[e], *ids] == tokenizer.encode_prompts([f"{prompt} {title}"])[
                0
            ] + [tokenizer.eos_id]


def test_long_prompts_lose_their_oldest_history_only(tokenizer):
    """As few of the oldest history items go as make prompt and longest completion fit; they are counted."""
    examples = nasty_examples()
    whole = encode_examples(examples, tokenizer, 100_000)
    longest = [max(map(len, whole.slots(e, range(NUM_CANDIDATES)))) for e in range(len(examples))]
    needed = [len(ids) + n for ids, n in zip(whole.prompts, longest, strict=True)]
    limit = int(np.percentile(needed, 30))
    encoded = encode_examples(examples, tokenizer, limit)
    dropped = []
    for e in range(len(examples)):
        texts = [render_prompt(examples[e], skip) for skip in range(len(examples[e].history))]
        fits = [
            skip
            for skip, ids in enumerate(tokenizer.encode_prompts(texts))
            if len(ids) + longest[e] <= limit
        ]
        dropped.append(fits[0])
        assert list(encoded.prompts[e]) == tokenizer.encode_prompts(texts)[fits[0]]
        assert f"\n{examples[e].history[-1][0]} | Rating: " in texts[fits[0]]
        assert texts[fits[0]].endswith("\n".join([*examples[e].candidates, "Answer:"]))
    assert (encoded.num_shortened, encoded.num_dropped) == (
        sum(d > 0 for d in dropped),
        sum(dropped),
    )
    assert len(examples) / 2 < encoded.num_shortened < encoded.num_dropped
    assert encode_examples(examples, tokenizer, max(needed)).num_shortened == 0
    assert encode_examples(examples, tokenizer, max(needed) - 1).num_shortened >= 1


def test_a_prompt_that_never_fits_is_an_error(tokenizer):
    """If not even one history item fits, the user and the option are named; candidates are never cut."""
    examples = nasty_examples()
    with pytest.raises(
        ValueError, match=r"user u\d+: .* do not fit --max_length 60 .*raise --max_length"
    ):
        encode_examples(examples, tokenizer, 60)


def test_candidates_with_equal_tokens_are_refused(folders):
    """Two spellings of one name that a normaliser makes equal could not be told apart: the user and title are named."""
    titles = ["Élite", unicodedata.normalize("NFD", "Élite"), *(f"Title {n}" for n in range(38))]
    examples = nasty_examples(
        [(u, i, 5, i) for u in range(4) for i in range(10 * u, 10 * u + 10)], titles
    )
    candidates = examples.candidates.copy()
    candidates[:] = np.arange(20, 40)
    candidates[-1] = np.arange(20)
    examples = replace(examples, candidates=candidates)
    encode_examples(examples, Tokenizer(folders["llama3"]), 10_000)
    with pytest.raises(
        ValueError,
        match=f"user {examples[len(examples) - 1].user}: two candidates have the same tokens",
    ):
        encode_examples(examples, Tokenizer(folders["qwen"]), 10_000)


def hand_made(tmp_path: Path, words: list[str]) -> Tokenizer:
    """A byte-level BPE without pre-tokenizer whose merges spell these words, one after the other, from the left."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for word in words:
        pieces = [word[0]]
        for letter in word[1:]:
            merges.append(("".join(pieces), letter))
            pieces.append(letter)
    merges = list(dict.fromkeys(merges))
    vocab = {
        token: i
        for i, token in enumerate(
            ["</s>", *letters, *dict.fromkeys("".join(merge) for merge in merges)]
        )
    }
    inner = HFTokenizer(models.BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "config.json", {"eos_token_id": 0})
    return Tokenizer(tmp_path)


def test_a_title_that_merges_with_the_prompt_is_refused(tmp_path):
    """A tokenizer with a token ":" + space would move the boundary; the title is named."""
    tokenizer = hand_made(tmp_path, [":Ġ"])
    with pytest.raises(ValueError, match="title 'Alien 3': .*merges"):
        tokenizer.encode_completions(["Alien 3"])
    with pytest.raises(ValueError, match="merges"):
        encode_examples(nasty_examples(), tokenizer, 100_000)


def test_a_boundary_that_moves_only_inside_a_prompt_is_refused(tmp_path):
    """Even if "Answer:" alone keeps its boundary, a merge of the line break before it may not shift it unnoticed."""
    tokenizer = hand_made(tmp_path, ["Answer", "ĊA", "Answer:", ":Ġ"])
    tokenizer.encode_completions(["Alien 3"])
    encode_examples(nasty_examples(), tokenizer, 100_000)  # "ĊA" comes too late to matter
    tokenizer = hand_made(tmp_path, ["ĊA", "Answer", "Answer:", ":Ġ"])
    tokenizer.encode_completions(["Alien 3"])
    with pytest.raises(ValueError, match="prompt and completion tokenise differently together"):
        encode_examples(nasty_examples(), tokenizer, 100_000)


# ------------------------------------------------------------------------------------------------ batches
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 7])
@pytest.mark.parametrize("num_examples", [1, 5, 64, 129])
@pytest.mark.parametrize("budget", [1, 900, 5000])
def test_micro_batches_divide_the_batch(num_ranks, num_examples, budget):
    """Every example is in one micro-batch of one rank, ranks have equally many, and the padded batch stays in the budget."""
    rng = np.random.default_rng([num_ranks, num_examples, budget])
    widths = rng.integers((90, 10), (500, 200), size=(200, 2))
    indices = rng.permutation(200)[:num_examples]
    plan = micro_batches(widths, indices, num_ranks, budget)
    assert len(plan) == num_ranks and len({len(batches) for batches in plan}) == 1
    flat = [i for batches in plan for batch in batches for i in batch]
    assert sorted(flat) == sorted(indices.tolist()) and all(type(i) is int for i in flat)
    for batches in plan:
        assert all(
            len(batch) * widths[batch].max(0).sum() <= budget for batch in batches if len(batch) > 1
        )
        order = [widths[i].sum() for batch in batches for i in batch]
        assert order == sorted(order, reverse=True)
        sizes = [len(batch) for batch in batches]
        assert 0 not in sizes[: len(sizes) - sizes.count(0)]  # the empty ones come last
    loads = [sum(widths[i].sum() for batch in batches for i in batch) for batches in plan]
    assert max(loads) - min(loads) <= widths.sum(1).max()
    assert micro_batches(widths, indices[::-1], num_ranks, budget) == plan  # a function of the set


def test_five_examples_on_four_ranks():
    """One rank has two examples, the others take part in its second forward pass with an empty list."""
    widths = [(8, 2), (16, 4), (24, 6), (32, 8), (40, 10)]
    assert micro_batches(widths, range(5), 4, 60) == [[[4], [0]], [[3], []], [[2], []], [[1], []]]
    assert micro_batches(widths, range(5), 4, 100) == [[[4, 0]], [[3]], [[2]], [[1]]]
    assert micro_batches(widths[:2], [1], 4, 60) == [[[1]], [[]], [[]], [[]]]


def test_a_long_prompt_and_long_completions_do_not_share_a_batch_beyond_the_budget():
    """The padded row is the longest prompt plus the longest completions, of whichever examples."""
    assert micro_batches([(90, 10), (10, 90)], range(2), 1, 200) == [[[0], [1]]]
    assert micro_batches([(90, 10), (10, 90)], range(2), 1, 360) == [[[0, 1]]]


def test_tree_widths_are_those_of_the_tree(tokenizer):
    """The widths that micro-batches are planned with are those of the row the model gets."""
    encoded = encode_examples(nasty_examples(), tokenizer, 100_000)
    slots = encoded.examples.negatives(4)
    widths = tree_widths(encoded, slots)
    for e in range(len(slots)):
        tree = encoded.tree([e], slots)
        assert widths[e].tolist() == [
            tree.prompt_width,
            tree.input_ids.shape[1] - tree.prompt_width,
        ]


def test_prefetch_keeps_the_order_and_runs_one_ahead():
    """Items come in order; while one is used the next is being made, and no more; an error reaches the user."""
    started, made_next = [], threading.Event()

    def make(item):
        started.append(item)
        if item == 1:
            made_next.set()
        if item == 4:
            raise ValueError("item 4")
        return item * 10

    seen = []
    with pytest.raises(ValueError, match="item 4"):
        for value in prefetch(make, range(6)):
            if value == 0:
                assert made_next.wait(
                    10
                )  # the first is in use, the second is made without being asked for
            assert max(started) <= value // 10 + 1
            seen.append(value)
    assert seen == [0, 10, 20, 30]
    assert list(prefetch(make, [])) == []


# ------------------------------------------------------------------------------------------------ cached tokens
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
    assert len(list(prepared.folder.glob("tokens-*.safetensors"))) == 4


def test_damaged_tokens_are_named(tokenizer, tmp_path):
    """A cut-off file is an error that names it and says what to do; a read-only folder only costs the cache."""
    prepared = prepare(
        DataConfig(planted_users=80, followers=3, train_size=20, prepared_dir=str(tmp_path))
    )
    encode_split(prepared, "train", tokenizer, 1024)
    (file,) = prepared.folder.glob("tokens-*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{file}.*delete"):
        encode_split(prepared, "train", tokenizer, 1024)
    prepared.folder = tmp_path / "gone"
    assert len(encode_split(prepared, "train", tokenizer, 1024).prompts) == 20


# ------------------------------------------------------------------------------------------------ command line
def run_data(*flags, cwd: Path) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "RECPO_TRACEBACK"}
    command = [sys.executable, str(ROOT / "data.py"), *flags]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment
    )


def test_data_py_prints_statistics_and_an_example(folders, tmp_path):
    """`python data.py` prepares the planted world and shows the table, the splits, one prompt and its token boundary."""
    done = run_data(
        "--planted_users=80",
        "--train_size=40",
        "--followers=4",
        "--show=7",
        f"--tokenizer={folders['llama3']}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "prepared").iterdir()
    prepared = prepare(
        DataConfig(
            planted_users=80, train_size=40, followers=4, prepared_dir=str(tmp_path / "prepared")
        )
    )
    example, counts = prepared.splits["train"][7], prepared.raw_counts
    assert f"prepared in prepared/{folder.name}, hash {prepared.hash[:16]}" in done.stdout
    row = f"| {counts['users']:,} | {counts['items']:,} | {counts['interactions']:,} |"
    assert f"| read {row}\n| after --core 0 {row}" in done.stdout
    assert render_prompt(example) in done.stdout
    assert f"chosen:   {example.candidates[example.target]!r}" in done.stdout
    kinds = Counter(
        line.split()[-4].strip("(),")
        for line in done.stdout.splitlines()
        if line.startswith("rejected: ")
    )
    assert sum(kinds.values()) == 9 and kinds.keys() <= {"random", "follows"}
    boundary, *_ = [line for line in done.stdout.splitlines() if line.startswith("boundary: ")]
    left, right = boundary.split(" || ")
    assert left.endswith("':'") and right.split("   ")[0].endswith("'<|end_of_text|>'")
    assert "40 examples" in done.stdout and not done.stderr


def test_unknown_flags_are_refused(tmp_path):
    """A misspelt flag ends the program with a message that names it."""
    done = run_data("--planted_user=80", cwd=tmp_path)
    assert (
        done.returncode != 0
        and "--planted_user=80" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_movielens_without_data_dir_is_one_line(tmp_path):
    """What the user forgot is one clear line without a traceback."""
    done = run_data("--dataset=movielens", cwd=tmp_path)
    assert done.returncode != 0 and not done.stdout
    assert done.stderr.strip().splitlines() == [done.stderr.strip()] and "--data_dir" in done.stderr
