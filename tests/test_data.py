"""Examples against plain loops over the log, prompts and tokens with tokenizers of three families,
batches, and the CLI."""

import unicodedata
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_json
from families import NASTY, WORDS
from launch import run_script
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers

import data
from data import (
    ALL_TEMPLATES,
    ITEMS,
    NUM_CANDIDATES,
    TEMPLATES,
    Example,
    Examples,
    Interactions,
    build_examples,
    build_tree,
    encode_examples,
    micro_batches,
    render_prompt,
    tree_widths,
)
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, prepare, words_of
from loaders.movielens import WORDS as MOVIES
from loaders.planted import DEFAULTS
from loaders.table import make_interactions

SPLITS = ("train", "val", "test")


def random_rows(
    seed: int, num_users: int = 40, num_items: int = 70, shortest: int = 4, longest: int = 45
) -> list[tuple]:
    """(user, item, rating, timestamp):
    nobody repeats an item, times differ, some users are too short for any example."""
    rng, rows = np.random.default_rng(seed), []
    for u in range(num_users):
        items = rng.permutation(num_items)[: rng.integers(shortest, longest + 1)].tolist()
        times = np.sort(rng.permutation(10_000)[: len(items)]).tolist()
        rows += [(f"u{u}", i, int(rng.integers(1, 6)), t) for i, t in zip(items, times)]
    return rows


def log_of(rows: list[tuple]) -> Interactions:
    titles = {row[1]: f"Title {row[1]}" for row in rows}
    return make_interactions(*zip(*rows, strict=True), titles, "movielens")


def own_rows(interactions: Interactions, row: int) -> range:
    """All rows of the user who owns this one."""
    user = interactions.user[row]
    return range(int(interactions.start[user]), int(interactions.start[user + 1]))


def arrays_of(splits: dict[str, Examples]) -> list[np.ndarray]:
    return [getattr(splits[split], name) for split in SPLITS for name in Examples.ARRAYS]


def all_equal(a: dict[str, Examples], b: dict[str, Examples]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(arrays_of(a), arrays_of(b), strict=True))


# ------------------------------------------------------------------------ examples
def chosen_by_loop(ratings: list[float], config: DataConfig) -> int | None:
    """Index of the chosen one among followers with these ratings; None: there is no example."""
    if config.positive == "first":
        return next((s for s, rating in enumerate(ratings) if rating >= config.min_rating), None)
    scores = [rating / (1 + s) ** config.decay for s, rating in enumerate(ratings)]
    best = scores.index(max(scores))  # the earliest of equal ones
    random_score = data.RANDOM_RATING / (1 + data.RANDOM_STEPS) ** config.decay
    counts = ratings[best] >= config.min_rating and scores[best] > random_score
    return best if counts else None


def positions_by_loop(interactions: Interactions, config: DataConfig) -> dict[str, list[int]]:
    """All positions that make an example, per split."""
    found: dict[str, list[int]] = {split: [] for split in SPLITS}
    bounds = interactions.start.tolist()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        for p in range(start + config.min_history, end):
            ratings = interactions.rating[p : p + config.followers].tolist()
            if p + config.followers <= end - 2 and chosen_by_loop(ratings, config) is not None:
                found["train"].append(p)
            if p >= end - 2 and interactions.rating[p] >= config.min_rating:
                found["test" if p == end - 1 else "val"].append(p)
    return found


CONFIGS = {  # options; rating and steps of random candidates
    "default": ({}, (3.0, 10)),
    "ties": ({"decay": 0.0}, (3.0, 10)),  # many followers with equal scores
    "first": ({"positive": "first", "followers": 4, "min_history": 1, "history": 3}, (3.0, 10)),
    "seen": ({"exclude": "seen", "history": 8}, (3.0, 10)),
    "popularity": ({"negatives": "popularity", "min_rating": 3.0, "decay": 1.0}, (2.0, 19)),
    # 4.5 / 3 = 1.5: where the best follower scores less there is no example
    "strong random": ({"min_rating": 1.0, "decay": 1.0}, (4.5, 2)),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", range(3))
def test_examples_equal_a_plain_loop(seed, name, monkeypatch):
    """Positions, candidates, chosen item, scores and flags are what the definitions say."""
    options, (random_rating, random_steps) = CONFIGS[name]
    config = DataConfig(train_size=0, data_seed=seed, **options)
    monkeypatch.setattr(data, "RANDOM_RATING", random_rating)
    monkeypatch.setattr(data, "RANDOM_STEPS", random_steps)
    interactions = log_of(random_rows(seed))
    item, rating = interactions.item.tolist(), interactions.rating.tolist()
    splits = build_examples(interactions, config)
    expected = positions_by_loop(interactions, config)
    random_score = data.RANDOM_RATING / (1 + data.RANDOM_STEPS) ** config.decay
    for split, examples in splits.items():
        assert sorted(examples.position.tolist()) == expected[split]
        num_follow = config.followers if split == "train" else 1
        for e, p in enumerate(examples.position.tolist()):
            rows = own_rows(interactions, p)
            steps = {item[p + s]: s for s in range(num_follow)}
            candidates = examples.candidates[e].tolist()
            randoms = set(candidates) - steps.keys()
            assert len(set(candidates)) == NUM_CANDIDATES and steps.keys() <= set(candidates)
            shown = item[max(rows.start, p - config.history) : p]
            own = item[rows.start : rows.stop] if config.exclude == "all" else shown
            assert not randoms & set(own)

            chosen = 0
            if split == "train":
                chosen = chosen_by_loop(rating[p : p + num_follow], config)
            assert candidates[examples.target[e]] == item[p + chosen]
            assert rating[p + chosen] >= config.min_rating
            assert examples.is_random[e].tolist() == [c in randoms for c in candidates]
            by_item = {i: rating[p + s] / (1 + s) ** config.decay for i, s in steps.items()}
            scores = [by_item.get(c, random_score) for c in candidates]
            assert examples.scores[e].tolist() == pytest.approx(scores, rel=1e-6)
            others = set(range(NUM_CANDIDATES)) - {int(examples.target[e])}
            assert set(examples.negative_order[e].tolist()) == others


@pytest.mark.parametrize("followers", [1, 10, 19])
def test_training_never_sees_the_last_two(followers):
    """Followers of training examples end before the user's last two interactions."""
    interactions = log_of(random_rows(0))
    config = DataConfig(train_size=0, followers=followers, min_history=1)
    examples = build_examples(interactions, config)["train"]
    ends = interactions.start[interactions.user[examples.position] + 1]
    assert (ends - examples.position - followers).min() == 2


def test_default_scores_are_those_of_the_paper():
    """rating / sqrt(1 + step); random items count as rated 3, ten steps away."""
    assert (data.RANDOM_RATING, data.RANDOM_STEPS, DataConfig().decay) == (3.0, 10, 0.5)
    examples = build_examples(log_of(random_rows(1)), DataConfig())["train"]
    assert examples.scores[examples.is_random] == pytest.approx(3 / np.sqrt(11), rel=1e-6)


def test_chosen_and_rejected_slots_are_uniform():
    """The place in the list says nothing about the target, nor about the first negative."""
    log = log_of(random_rows(2, num_users=400, num_items=100))
    for examples in build_examples(log, DataConfig(train_size=0)).values():
        for slots in (examples.target, examples.negatives(1)[:, 0]):
            counts, expected = np.bincount(slots, minlength=20), len(slots) / NUM_CANDIDATES
            # chi square, 19 degrees of freedom, p = 0.001
            assert ((counts - expected) ** 2 / expected).sum() < 43.8


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_random_candidates_have_the_stated_distribution(kind):
    """Uniform over the items the user never touched,
    or in proportion to how often the log has them."""
    rng = np.random.default_rng(3)
    weights = 1 / (1 + np.arange(60.0))
    rows = []
    for u in range(150):
        items = rng.choice(60, size=rng.integers(30, 36), replace=False, p=weights / weights.sum())
        rows += [(u, int(i), 5, t) for t, i in enumerate(items)]
    # too short for 19 followers; makes the popular ones more popular
    rows += [(150, i, 5, i) for i in range(24)]
    interactions = log_of(rows)
    config = DataConfig(train_size=0, test_size=1, followers=19, negatives=kind)
    examples = build_examples(interactions, config)["train"]
    counts = np.bincount(interactions.item, minlength=interactions.num_items)
    popularity = counts if kind == "popularity" else np.ones(interactions.num_items)
    mean, variance = np.zeros(interactions.num_items), np.zeros(interactions.num_items)
    for p in examples.position.tolist():
        share = popularity.astype(float)
        share[interactions.item[own_rows(interactions, p)]] = 0
        share /= share.sum()
        mean, variance = mean + share, variance + share * (1 - share)
    drawn = np.bincount(examples.candidates[examples.is_random], minlength=interactions.num_items)
    assert drawn.sum() == len(examples) > 800  # one random candidate each
    assert np.abs((drawn - mean) / np.sqrt(variance + 1e-9)).max() < 4


@pytest.mark.parametrize("exclude", ["all", "seen"])
def test_exclude_seen_admits_what_the_user_touched_elsewhere(exclude):
    """Items from before the shown history, or from the future, may then be random candidates."""
    interactions, touched = log_of(random_rows(4)), 0
    for examples in build_examples(interactions, DataConfig(exclude=exclude, history=6)).values():
        for e, p in enumerate(examples.position.tolist()):
            own = interactions.item[own_rows(interactions, p)]
            touched += np.isin(examples.candidates[e][examples.is_random[e]], own).sum()
    assert touched > 100 if exclude == "seen" else touched == 0


def test_examples_are_a_function_of_the_seed():
    """The same seed draws the same examples, another one other candidates,
    orders and templates of other prefixes."""
    interactions = log_of(random_rows(5))
    configs = [DataConfig(train_size=50, data_seed=seed) for seed in (1, 1, 2)]
    one, again, other = (build_examples(interactions, config) for config in configs)
    assert all_equal(one, again)
    for split in SPLITS:
        for array in ("position", "candidates", "template"):
            assert not np.array_equal(*(getattr(made[split], array) for made in (one, other)))
    assert set(one["train"].position.tolist()) != set(other["train"].position.tolist())


def test_sizes_take_a_random_part():
    """--train_size and --test_size limit the splits;
    what is drawn is spread over the log and holds no example twice."""
    interactions = log_of(random_rows(6, num_users=100))
    splits = build_examples(interactions, DataConfig(train_size=60, test_size=15))
    assert [len(splits[split]) for split in SPLITS] == [60, 15, 15]
    for examples in splits.values():
        assert len(set(examples.position.tolist())) == len(examples)
        assert len(np.unique(interactions.user[examples.position])) >= 15


def test_the_order_of_input_rows_does_not_matter():
    """Where times differ, a shuffled file gives the same log and the same examples."""
    rows = random_rows(7)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert all_equal(build_examples(log_of(rows)), build_examples(log_of(shuffled)))


def test_users_who_touched_almost_everything_are_named():
    """If fewer random candidates exist than a list needs, the error says for whom; it can be made
    from the log all the same."""
    rows = random_rows(8, num_items=60) + [("greedy", i, 5, i) for i in range(55)]
    with pytest.raises(ValueError, match="user greedy: fewer than 10 items.*--exclude seen"):
        build_examples(log_of(rows), DataConfig(train_size=0))
    build_examples(log_of(rows), DataConfig(train_size=0, exclude="seen"))


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_just_enough_random_candidates_are_found(kind):
    """A user who left exactly as many items as a list needs gets all of them,
    however rarely one is drawn by chance."""
    rows = [("greedy", i, 5, i) for i in range(281)] + [("other", i, 5, i) for i in range(270, 300)]
    config = DataConfig(followers=1, test_size=0, train_size=20, negatives=kind)
    test = build_examples(log_of(rows), config)["test"]
    (greedy,) = [example for example in test if example.user == "greedy"]
    assert test.interactions.num_items == 300
    assert set(greedy.candidates) == {f"Title {i}" for i in range(280, 300)}


def test_rare_items_that_are_left_are_drawn_by_popularity_too():
    """Chance finds them too slowly, so they are drawn apart: 10 of 5,010 interactions."""
    items = np.repeat(np.arange(4), [5000, 1, 1, 8])
    log = SimpleNamespace(item=items, user=0 * items, num_items=4, start=np.array([0, 5010]))
    seen, rng = np.zeros((300, 1), int), np.random.default_rng(0)
    drawn = data._draw_unseen(log, np.zeros(300, int), 1, seen, "popularity", rng)
    assert (drawn == 3).mean() == pytest.approx(0.8, abs=0.08) and (drawn > 0).all()


def test_no_example_is_an_error_that_names_the_split():
    """A log too short for the options, or without liked items, is refused with the way out."""
    rows = random_rows(9, shortest=12, longest=16)
    for options in ({}, {"followers": 2, "min_rating": 5.5}):
        with pytest.raises(ValueError, match="no train example.*--min_history.*--min_rating"):
            build_examples(log_of(rows), DataConfig(**options))
    users = [[row for row in rows if row[0] == user] for user in {row[0] for row in rows}]
    last_two = {row for own in users for row in own[-2:]}  # of every user, now disliked
    rows = [(*row[:2], 3 if row in last_two else row[2], row[3]) for row in rows]
    with pytest.raises(ValueError, match="no val example"):
        build_examples(log_of(rows), DataConfig(followers=2))


@pytest.mark.parametrize(
    "split, source, most",
    [
        ("train", "both", 19),
        ("train", "random", 10),
        ("train", "follow", 9),
        ("test", "both", 19),
        ("test", "random", 19),
    ],
)
def test_negatives_are_the_first_of_the_order(split, source, most):
    """K negatives are the first K of negative_order that are random, or follow, as asked; too many
    are refused."""
    examples = build_examples(log_of(random_rows(10)))[split]
    for K in (1, 3, most):
        for e, found in enumerate(examples.negatives(K, source).tolist()):
            order = examples.negative_order[e].tolist()
            asked = {"both": (True, False), "random": (True,), "follow": (False,)}[source]
            assert found == [s for s in order if examples.is_random[e, s] in asked][:K]
            assert examples.target[e] not in found and len(set(found)) == K
    with pytest.raises(ValueError, match=f"--num_negatives {most + 1}.* only {most} .{source}"):
        examples.negatives(most + 1, source)


def test_negatives_are_drawn_from_random_and_following_items_alike():
    train = build_examples(log_of(random_rows(10)))["train"]
    share = np.take_along_axis(train.is_random, train.negatives(3), 1).mean()
    assert share == pytest.approx(10 / 19, abs=0.05)


def test_select_keeps_rows_together():
    """A part of a split shows the same prompts, candidates and negatives as the whole."""
    examples = build_examples(log_of(random_rows(11)))["val"]
    part = examples.select([3, 0, 5])
    assert [part[e] for e in range(3)] == [examples[e] for e in (3, 0, 5)]
    assert (part.negatives(4) == examples.negatives(4)[[3, 0, 5]]).all()


# ------------------------------------------------------------------------ prompts
NONE = float("nan")  # a rating that is not shown


@pytest.mark.parametrize("template", range(len(ALL_TEMPLATES)))
def test_prompt_shows_history_then_candidates(template):
    """ "Title | Rating: 4" or the title alone, oldest first; the candidates; then "Answer:". What a
    title holds is no markup, and what is not shown is not spoken of."""
    titles, candidates = ["Alien: {0}", "M [a|b]", "{history}"], ["Élite", "% s", "12 Monkeys"]
    rated = [4.0, 3.5, 5.0], [" | Rating: 4", " | Rating: 3.5", " | Rating: 5"]
    for ratings, shown in (rated, ([NONE] * 3, [""] * 3)):
        history = list(zip(titles, ratings, strict=True))
        example = Example(MOVIES, "u", history, candidates, 0, [], template)
        heading, *lines, question = render_prompt(example).split("\n")[:5]
        assert lines == [title + text for title, text in zip(titles, shown, strict=True)]
        assert render_prompt(example).split("\n")[5:] == [*candidates, "Answer:"]
        assert render_prompt(example, 2).split("\n")[:3] == [heading, lines[2], question]
        assert ("rating" in heading.lower() or "rated" in heading) == (ratings[0] == 4.0)
        assert "watch" in heading + question and not set("{}[]|") & set(heading + question)


def test_prompt_rows_are_those_before_the_position():
    """The user's latest interactions before the predicted one, in order, and nobody else's."""
    interactions = log_of(random_rows(12))
    for examples in build_examples(interactions, DataConfig(train_size=100, history=7)).values():
        for e, p in enumerate(examples.position.tolist()):
            rows = list(own_rows(interactions, p))
            shown = rows[: rows.index(p)][-7:]
            titles = [interactions.titles[interactions.item[r]] for r in shown]
            ratings = interactions.rating[shown].tolist()
            assert examples[e].history == list(zip(titles, ratings, strict=True))
            assert examples[e].user == interactions.user_ids[interactions.user[p]]


def test_templates_differ_and_words_follow_the_data_set():
    """All templates are distinct and in use;
    each names what is recommended by the data set's word."""
    prompts = {
        (words, t): render_prompt(Example(words, "u", [("A", 4.0)], ["B", "C"], 0, [], t))
        for words in (MOVIES, words_of("planted"), ITEMS)
        for t in range(len(TEMPLATES))
    }
    assert len(set(prompts.values())) == len(prompts)
    drawn = build_examples(log_of(random_rows(13)))["train"].template
    assert set(drawn.tolist()) == set(range(len(TEMPLATES)))


# ------------------------------------------------------------------------ encoding
def nasty_examples(rows=None, titles=None, **options) -> Examples:
    """Test examples whose titles are NASTY and more."""
    rows = rows or random_rows(14, num_users=15, num_items=50, shortest=8, longest=25)
    titles = titles or [*NASTY, *(f"{word} {n}" for n in range(3) for word in WORDS)]
    interactions = make_interactions(*zip(*rows, strict=True), dict(enumerate(titles)), "movielens")
    config = DataConfig(followers=2, min_rating=1, min_history=3, history=9, **options)
    return build_examples(interactions, config)["test"]


def test_encoded_examples_equal_their_text(tokenizer):
    """With room enough, prompts are encoded whole,
    and every candidate's completion continues its prompt's text."""
    examples = nasty_examples()
    encoded = encode_examples(examples, tokenizer, 100_000)
    assert (encoded.num_shortened, encoded.num_dropped) == (0, 0)
    assert len(encoded.prompts) == len(examples) > 10
    for e in range(len(examples)):
        prompt = render_prompt(examples[e])
        completions = encoded.slots(e, range(NUM_CANDIDATES))
        for title, ids in zip(examples[e].candidates, completions, strict=True):
            (whole,) = tokenizer.encode_prompts([f"{prompt} {title}"])
            assert [*encoded.prompts[e], *ids] == [*whole, tokenizer.eos_id]


def test_prompt_tokens_are_predicted_by_the_ones_before_them():
    """Rows and labels of the spans come behind those of the completions, which stay, as do sums."""
    prompts = [[5, 6, 7, 8], [9, 10]]
    tree = build_tree(prompts, [[[1, 2]], [[3, 4]]])
    scored = tree.with_prompt_labels(np.array([[1, 3], [1, 2]]))
    assert torch.equal(scored.sequence_ids, tree.sequence_ids)
    assert torch.equal(scored.rows[:4], tree.rows) and torch.equal(scored.labels[:4], tree.labels)
    assert scored.labels[4:].tolist() == [6, 7, 10]
    assert tree.input_ids.flatten()[scored.rows[4:]].tolist() == [5, 6, 9]
    token_logps = torch.arange(7.0, requires_grad=True)
    sums = scored.sum_logps(token_logps)
    assert torch.equal(sums, tree.sum_logps(token_logps[:4]))
    sums.sum().backward()
    assert token_logps.grad.tolist() == [1, 1, 1, 1, 0, 0, 0]


def test_long_prompts_lose_their_oldest_history_only(tokenizer):
    """As few of the oldest history items go as make prompt and longest completion fit;
    they are counted."""
    examples = nasty_examples()
    whole = encode_examples(examples, tokenizer, 100_000)
    longest = [max(map(len, whole.slots(e, range(NUM_CANDIDATES)))) for e in range(len(examples))]
    needed = [len(ids) + n for ids, n in zip(whole.prompts, longest, strict=True)]
    limit = int(np.percentile(needed, 30))
    encoded = encode_examples(examples, tokenizer, limit)
    dropped = []
    for e in range(len(examples)):
        texts = [render_prompt(examples[e], skip) for skip in range(len(examples[e].history))]
        ids = tokenizer.encode_prompts(texts)
        skip = next(n for n in range(len(ids)) if len(ids[n]) + longest[e] <= limit)
        dropped.append(skip)
        assert list(encoded.prompts[e]) == ids[skip]
        assert f"\n{examples[e].history[-1][0]} | Rating: " in texts[skip]
        assert texts[skip].endswith("\n".join([*examples[e].candidates, "Answer:"]))
    assert encoded.num_shortened == sum(d > 0 for d in dropped)
    assert encoded.num_dropped == sum(dropped)
    assert len(examples) / 2 < encoded.num_shortened < encoded.num_dropped
    assert encode_examples(examples, tokenizer, max(needed)).num_shortened == 0
    assert encode_examples(examples, tokenizer, max(needed) - 1).num_shortened >= 1


def test_a_prompt_that_never_fits_is_an_error(tokenizer):
    """If not even one history item fits; candidates are never cut."""
    with pytest.raises(ValueError, match=r"user u\d+: .* --max_length 60 .*raise --max_length"):
        encode_examples(nasty_examples(), tokenizer, 60)


def test_candidates_with_equal_tokens_are_refused(folders):
    """Two spellings of one name that a normaliser makes equal could not be told apart:
    the user and title are named."""
    titles = ["Élite", unicodedata.normalize("NFD", "Élite"), *(f"Title {n}" for n in range(38))]
    rows = [(u, i, 5, i) for u in range(4) for i in range(10 * u, 10 * u + 10)]
    examples = nasty_examples(rows, titles)
    candidates = np.tile(np.arange(20, 40), (len(examples), 1))
    candidates[-1] = np.arange(20)
    examples = replace(examples, candidates=candidates)
    encode_examples(examples, Tokenizer(folders["llama3"]), 10_000)
    user = examples[len(examples) - 1].user
    with pytest.raises(ValueError, match=f"user {user}: two candidates have the same tokens"):
        encode_examples(examples, Tokenizer(folders["qwen"]), 10_000)


def hand_made(tmp_path, words: list[str]) -> Tokenizer:
    """A byte-level BPE without pre-tokenizer whose merges spell these words, one after the other,
    from the left."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(word[:n], word[n]) for word in words for n in range(1, len(word))]
    merges = list(dict.fromkeys(merges))
    tokens = ["</s>", *letters, *dict.fromkeys(map("".join, merges))]
    vocab = {token: i for i, token in enumerate(tokens)}
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
    """Even if "Answer:" alone keeps its boundary,
    a merge of the line break before it may not shift it unnoticed."""
    tokenizer = hand_made(tmp_path, ["Answer", "ĊA", "Answer:", ":Ġ"])
    tokenizer.encode_completions(["Alien 3"])
    encode_examples(nasty_examples(), tokenizer, 100_000)  # "ĊA" comes too late to matter
    tokenizer = hand_made(tmp_path, ["ĊA", "Answer", "Answer:", ":Ġ"])
    tokenizer.encode_completions(["Alien 3"])
    with pytest.raises(ValueError, match="prompt and completion tokenise differently together"):
        encode_examples(nasty_examples(), tokenizer, 100_000)


# ------------------------------------------------------------------------ batches
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 7])
@pytest.mark.parametrize("num_examples", [1, 5, 64, 129])
@pytest.mark.parametrize("budget", [1, 900, 5000])
def test_micro_batches_divide_the_batch(num_ranks, num_examples, budget):
    """Every example is in one micro-batch of one rank, ranks have equally many,
    and the padded batch stays in the budget."""
    rng = np.random.default_rng([num_ranks, num_examples, budget])
    widths = rng.integers((90, 10), (500, 200), size=(200, 2))
    indices = rng.permutation(200)[:num_examples]
    plan = micro_batches(widths, indices, num_ranks, budget)
    assert len(plan) == num_ranks and len({len(batches) for batches in plan}) == 1
    flat = [i for batches in plan for batch in batches for i in batch]
    assert sorted(flat) == sorted(indices.tolist()) and all(type(i) is int for i in flat)
    for batches in plan:
        several = [batch for batch in batches if len(batch) > 1]
        assert all(len(batch) * widths[batch].max(0).sum() <= budget for batch in several)
        order = [widths[i].sum() for batch in batches for i in batch]
        assert order == sorted(order, reverse=True)
        sizes = [len(batch) for batch in batches]
        assert 0 not in sizes[: len(sizes) - sizes.count(0)]  # the empty ones come last
    loads = [sum(widths[i].sum() for batch in batches for i in batch) for batches in plan]
    assert max(loads) - min(loads) <= widths.sum(1).max()
    assert micro_batches(widths, indices[::-1], num_ranks, budget) == plan  # a function of the set


def test_five_examples_on_four_ranks():
    """One rank has two examples, the others take part in its second forward pass with an empty
    list."""
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
        P = tree.prompt_width
        assert widths[e].tolist() == [P, tree.input_ids.shape[1] - P]


# ------------------------------------------------------------------------ command line
def test_loaders_prints_statistics_and_an_example(folders, tmp_path):
    """`python -m loaders` prepares the planted world and shows the table, the splits,
    one prompt and its token boundary."""
    options = {"train_size": 40, "followers": 4, "planted_users": 80}
    flags = [f"--{name}={value}" for name, value in options.items()]
    flags += ["--show=7", f"--tokenizer={folders['llama3']}"]
    done = run_script("loaders", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "prepared").iterdir()
    made = DataConfig(**DEFAULTS | options, prepared_dir=str(tmp_path / "prepared"))
    prepared = prepare(made)
    example, counts = prepared.splits["train"][7], prepared.raw_counts
    assert f"prepared in prepared/{folder.name}, hash {prepared.hash[:16]}" in done.stdout
    row = f"| {counts['users']:,} | {counts['items']:,} | {counts['interactions']:,} |"
    assert f"| read {row}\n| after --core 0 {row}" in done.stdout
    assert render_prompt(example) in done.stdout
    assert f"chosen:   {example.candidates[example.target]!r}" in done.stdout
    rejected = [line for line in done.stdout.splitlines() if line.startswith("rejected: ")]
    kinds = [line.split()[-4].strip("(),") for line in rejected]
    assert len(kinds) == 3 and set(kinds) <= {"random", "follows"}
    boundary, *_ = [line for line in done.stdout.splitlines() if line.startswith("boundary: ")]
    left, right = boundary.split(" || ")
    assert left.endswith("':'") and right.split("   ")[0].endswith("'<|end_of_text|>'")
    assert "40 examples" in done.stdout and not done.stderr


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--planted_user=80", "--planted_user; did you mean --planted_users?"),
        ("--dataset=movielens", "--data_dir"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(tmp_path, flag, message):
    done = run_script("loaders", flag, cwd=tmp_path)
    assert done.returncode != 0 and not done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert message in line
