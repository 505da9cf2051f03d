"""Examples against plain loops over the log; prompts, tokens, batches."""

import unicodedata
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_json
from families import NASTY, WORDS, spelling_bpe
from test_loaders import make_interactions

import data
from data import NUM_CANDIDATES, Interactions, build_examples, encode_examples, render_prompt
from hub.tokenizer import Tokenizer
from loaders.frozen import PROMPT_WORDS, DataConfig

SPLITS = ("train", "val", "test")


def random_rows(seed: int, num_users=40, num_items=70, shortest=4, longest=45) -> list[tuple]:
    """(user, item, rating, timestamp); nobody repeats an item, times differ, some are too short."""
    rng, rows = np.random.default_rng(seed), []
    for u in range(num_users):
        items = rng.permutation(num_items)[: rng.integers(shortest, longest + 1)].tolist()
        times = np.sort(rng.permutation(10_000)[: len(items)]).tolist()
        rows += [(f"u{u}", i, int(rng.integers(1, 6)), t) for i, t in zip(items, times)]
    return rows


def log_of(rows: list[tuple]) -> Interactions:
    titles = {row[1]: f"Title {row[1]}" for row in rows}
    return make_interactions(*zip(*rows, strict=True), titles, "movielens")


def all_equal(a: dict[str, data.Examples], b: dict[str, data.Examples]) -> bool:
    pairs = [(a[split], b[split], name) for split in SPLITS for name in data.Examples.ARRAYS]
    return all(np.array_equal(getattr(x, name), getattr(y, name)) for x, y, name in pairs)


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
    "seen, liked": ({"exclude": "seen", "history": 8, "history_items": "positive"}, (3.0, 10)),
    "popularity": ({"negatives": "popularity", "min_rating": 3.0, "decay": 1.0}, (2.0, 19)),
    # 4.5 / 3 = 1.5: where the best follower scores less there is no example
    "strong random": ({"min_rating": 1.0, "decay": 1.0}, (4.5, 2)),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", range(3))
def test_examples_equal_a_plain_loop(seed, name, monkeypatch):
    """Positions, history, candidates, chosen item, scores and flags."""
    options, (random_rating, random_steps) = CONFIGS[name]
    config = DataConfig(train_size=0, data_seed=seed, **options)
    monkeypatch.setattr(data, "RANDOM_RATING", random_rating)
    monkeypatch.setattr(data, "RANDOM_STEPS", random_steps)
    interactions = log_of(random_rows(seed))
    item, rating = interactions.item.tolist(), interactions.rating.tolist()
    splits = build_examples(interactions, config)
    expected = positions_by_loop(interactions, config)
    random_score, touched = random_rating / (1 + random_steps) ** config.decay, 0
    for split, examples in splits.items():
        assert sorted(examples.position.tolist()) == expected[split]
        num_follow = config.followers if split == "train" else 1
        for e, p in enumerate(examples.position.tolist()):
            user = interactions.user[p]
            rows = range(*interactions.start[user : user + 2].tolist())
            steps = {item[p + s]: s for s in range(num_follow)}
            candidates = examples.candidates[e].tolist()
            randoms = set(candidates) - steps.keys()
            assert len(set(candidates)) == NUM_CANDIDATES and steps.keys() <= set(candidates)
            least = config.min_rating if config.history_items == "positive" else 0
            read = [r for r in range(rows.start, p) if rating[r] >= least][-config.history :]
            shown = [item[r] for r in read]
            own = item[rows.start : rows.stop] if config.exclude == "all" else shown
            assert not randoms & set(own)
            touched += len(randoms & set(item[rows.start : rows.stop]))

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
            titles = [interactions.titles[i] for i in shown]
            ratings = [rating[r] for r in read]
            assert examples[e].history == list(zip(titles, ratings, strict=True))
            assert examples[e].user == interactions.user_ids[user]
    assert touched > 100 if config.exclude == "seen" else touched == 0


def test_defaults_are_the_papers_and_places_tell_nothing():
    """The place in the list says nothing about the target, nor about the first negative."""
    assert (data.RANDOM_RATING, data.RANDOM_STEPS, DataConfig().decay) == (3.0, 10, 0.5)
    log = log_of(random_rows(2, num_users=400, num_items=100))
    for examples in build_examples(log, DataConfig(train_size=0)).values():
        for slots in (examples.target, examples.negatives(1)[:, 0]):
            counts, expected = np.bincount(slots, minlength=20), len(slots) / NUM_CANDIDATES
            # chi square, 19 degrees of freedom, p = 0.001
            assert ((counts - expected) ** 2 / expected).sum() < 43.8
    assert set(examples.template.tolist()) == set(range(len(data.TEMPLATES)))


def test_examples_are_a_function_of_the_seed_and_of_the_rows():
    """Not of their order. Sizes take a part that is spread over the log."""
    rows = random_rows(5, num_users=100)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    sizes = {"train_size": 60, "test_size": 15}
    one, other = (build_examples(log_of(rows), DataConfig(data_seed=n, **sizes)) for n in (1, 2))
    assert all_equal(one, build_examples(log_of(shuffled), DataConfig(data_seed=1, **sizes)))
    assert [len(one[split]) for split in SPLITS] == [60, 15, 15]
    for split, examples in one.items():
        for array in ("position", "candidates", "template"):
            assert not np.array_equal(*(getattr(made[split], array) for made in (one, other)))
        assert len(set(examples.position.tolist())) == len(examples)
        assert len(np.unique(examples.interactions.user[examples.position])) >= 15
    part = examples.select([3, 0, 5])
    assert [part[e] for e in range(3)] == [examples[e] for e in (3, 0, 5)]
    assert (part.negatives(4) == examples.negatives(4)[[3, 0, 5]]).all()


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_random_candidates_have_the_stated_distribution(kind):
    """Of what is not taken, and of what chance finds too slowly; distinct, and -1 where none is."""
    for counts, taken in (([30, 1, 2, 3, 4], [0]), ([60] * 198 + [1, 8], range(198))):
        log = SimpleNamespace(item=np.repeat(np.arange(len(counts)), counts))
        log.user, log.num_items = 0 * log.item, len(counts)
        seen, left = np.tile(taken, (400, 1)), np.array(counts)[len(taken) :]
        rng, share = np.random.default_rng(0), left if kind == "popularity" else 0 * left + 1
        one, every, more = (
            data._draw_unseen(log, np.zeros(400, int), n, seen, kind, rng)
            for n in (1, len(left), len(left) + 1)
        )
        found = np.bincount(one[:, 0], minlength=len(counts))[len(taken) :] / 400
        np.testing.assert_allclose(found, share / share.sum(), atol=0.08)
        assert (np.sort(every) == np.arange(len(taken), len(counts))).all() and (more == -1).all()


def test_a_log_without_an_example_or_candidates_is_refused():
    rows = random_rows(9, shortest=12, longest=16)
    with pytest.raises(ValueError, match="no train example.*--min_history.*--min_rating"):
        build_examples(log_of(rows), DataConfig())
    disliked = log_of(rows)
    disliked.rating[disliked.start[1:] - 2] = 3
    with pytest.raises(ValueError, match="no val example"):
        build_examples(disliked, DataConfig(followers=2))
    greedy = log_of(random_rows(8, num_items=60) + [("greedy", i, 5, i) for i in range(55)])
    with pytest.raises(ValueError, match="user greedy: of .* fewer than 10 .*--exclude seen"):
        build_examples(greedy, DataConfig(train_size=0))
    build_examples(greedy, DataConfig(train_size=0, exclude="seen"))


SOURCES = [("train", "random", 10), ("train", "follow", 9)]
SOURCES += [("train", "both", 19), ("test", "both", 19), ("test", "random", 19)]


@pytest.mark.parametrize("split, source, most", SOURCES)
def test_negatives_are_the_first_of_the_order(split, source, most):
    """The first K of negative_order that are random, or follow, as asked."""
    examples = build_examples(log_of(random_rows(10)))[split]
    for K in (1, 3, most):
        for e, found in enumerate(examples.negatives(K, source).tolist()):
            order = examples.negative_order[e].tolist()
            asked = {"both": (True, False), "random": (True,), "follow": (False,)}[source]
            assert found == [s for s in order if examples.is_random[e, s] in asked][:K]
    with pytest.raises(ValueError, match=f"--num_negatives {most + 1}.* {source} has only {most}"):
        examples.negatives(most + 1, source)
    if (split, source) == ("train", "both"):
        share = np.take_along_axis(examples.is_random, examples.negatives(3), 1).mean()
        assert share == pytest.approx(10 / 19, abs=0.05)


# ------------------------------------------------------------------------ prompts
NONE = float("nan")  # a rating that is not shown


@pytest.mark.parametrize("template", range(len(data.ALL_TEMPLATES)))
def test_prompt_shows_history_then_candidates(template):
    """ "Title | Rating: 4" or the title alone, oldest first; the candidates; then "Answer:"."""
    titles, candidates = ["Alien: {0}", "M [a|b]", "{history}"], ["Élite", "% s", "12 Monkeys"]
    rated = [4.0, 3.5, 5.0], [" | Rating: 4", " | Rating: 3.5", " | Rating: 5"]
    for ratings, shown in (rated, ([NONE] * 3, [""] * 3)):
        history = list(zip(titles, ratings, strict=True))
        example = data.Example(PROMPT_WORDS["movielens"], "u", history, candidates, 0, [], template)
        heading, *lines, question = render_prompt(example).split("\n")[:5]
        assert lines == [title + text for title, text in zip(titles, shown, strict=True)]
        assert render_prompt(example).split("\n")[5:] == [*candidates, "Answer:"]
        assert render_prompt(example, 2).split("\n")[:3] == [heading, lines[2], question]
        assert ("rating" in heading.lower() or "rated" in heading) == (ratings[0] == 4.0)
        assert "watch" in heading + question and not set("{}[]|") & set(heading + question)


def test_templates_differ_and_words_follow_the_data_set():
    example = data.Example(data.ITEMS, "u", [("A", 4.0)], ["B", "C"], 0, [], 0)
    ways = product({*PROMPT_WORDS.values(), data.ITEMS}, range(len(data.TEMPLATES)))
    prompts = {render_prompt(replace(example, words=w, template=t)) for w, t in ways}
    assert len(prompts) == 8 * len(data.TEMPLATES)


# ------------------------------------------------------------------------ encoding
def nasty_examples(rows=None, titles=None, **options) -> data.Examples:
    """Test examples whose titles are NASTY and more."""
    rows = rows or random_rows(14, num_users=15, num_items=50, shortest=8, longest=25)
    titles = titles or [*NASTY, *(f"{word} {n}" for n in range(3) for word in WORDS)]
    interactions = make_interactions(*zip(*rows, strict=True), dict(enumerate(titles)), "movielens")
    config = DataConfig(followers=2, min_rating=1, min_history=3, history=9, **options)
    return build_examples(interactions, config)["test"]


def test_prompts_lose_their_oldest_history_only_where_they_must(tokenizer):
    """Every candidate continues its prompt's text, and stays. What is lost is counted; the widths
    that micro-batches are planned with are those of the row that the model gets."""
    examples = nasty_examples()
    whole = encode_examples(examples, tokenizer, 100_000)
    every = range(NUM_CANDIDATES)
    longest = [max(map(len, whole.title_ids(e, every))) for e in range(len(examples))]
    needed = [len(ids) + n for ids, n in zip(whole.prompts, longest, strict=True)]
    limit, slots, dropped = int(np.percentile(needed, 30)), examples.negatives(4), []
    encoded = encode_examples(examples, tokenizer, limit)
    widths = data.tree_widths(encoded, slots).tolist()
    for e, example in enumerate(examples[e] for e in range(len(examples))):
        texts = [render_prompt(example, skip) for skip in range(len(example.history))]
        ids = tokenizer.encode_prompts(texts)
        assert list(whole.prompts[e]) == ids[0]
        skip = next(n for n in range(len(ids)) if len(ids[n]) + longest[e] <= limit)
        dropped.append(skip)
        assert list(encoded.prompts[e]) == ids[skip]
        titles = whole.title_ids(e, range(NUM_CANDIDATES))
        for title, answer in zip(example.candidates, titles, strict=True):
            (joint,) = tokenizer.encode_prompts([f"{texts[0]} {title}"])
            assert [*ids[0], *answer] == [*joint, tokenizer.eos_id]
        tree = encoded.tree([e], slots)
        assert widths[e] == [tree.prompt_width, tree.input_ids.shape[1] - tree.prompt_width]
    assert len(examples) / 2 < encoded.num_shortened == np.count_nonzero(dropped) < sum(dropped)
    assert encode_examples(examples, tokenizer, max(needed)).num_shortened == 0
    assert encode_examples(examples, tokenizer, max(needed) - 1).num_shortened >= 1
    with pytest.raises(ValueError, match=r"user u\d+: .*; raise --max_length 60"):
        encode_examples(examples, tokenizer, 60)


def test_candidates_with_equal_tokens_are_refused(folders):
    """Two spellings of one name that a normaliser makes equal could not be told apart."""
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


def test_a_boundary_that_moves_is_refused(tmp_path):
    """By a token ":" + space, even if "Answer:" alone keeps its boundary."""
    write_json(tmp_path / "config.json", {"eos_token_id": 0})
    spelling_bpe(["</s>"], ["ĊA", "Answer", "Answer:", ":Ġ"]).save(str(tmp_path / "tokenizer.json"))
    Tokenizer(tmp_path).encode_completions(["Alien 3"])
    with pytest.raises(ValueError, match="tokenised differently as one text"):
        encode_examples(nasty_examples(), Tokenizer(tmp_path), 100_000)


# ------------------------------------------------------------------------ batches
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 7])
@pytest.mark.parametrize("num_examples", [1, 5, 129])
@pytest.mark.parametrize("budget", [1, 900, 5000])
def test_micro_batches_divide_the_batch(num_ranks, num_examples, budget):
    """Every example once, ranks have equally many batches, which stay in the budget, padded."""
    rng = np.random.default_rng([num_ranks, num_examples, budget])
    widths = rng.integers((90, 10), (500, 200), size=(200, 2))
    indices = rng.permutation(200)[:num_examples]
    plan = data.micro_batches(widths, indices, num_ranks, budget)
    assert len(plan) == num_ranks and len({len(batches) for batches in plan}) == 1
    flat = [i for batches in plan for batch in batches for i in batch]
    assert sorted(flat) == sorted(indices.tolist()) and all(type(i) is int for i in flat)
    for batches in plan:
        for batch in (batch for batch in batches if len(batch) > 1):
            assert len(batch) * widths[batch].max(0).sum() <= budget
        order = [widths[i].sum() for batch in batches for i in batch]
        assert order == sorted(order, reverse=True)
        sizes = [len(batch) for batch in batches]
        assert 0 not in sizes[: len(sizes) - sizes.count(0)]  # the empty ones come last
    loads = [sum(widths[i].sum() for batch in batches for i in batch) for batches in plan]
    assert max(loads) - min(loads) <= widths.sum(1).max()
    again = data.micro_batches(widths, indices[::-1], num_ranks, budget)
    assert again == plan  # a function of the set


def test_micro_batches_by_hand():
    """Ranks that have fewer get empty ones."""
    widths = [(8, 2), (16, 4), (24, 6), (32, 8), (40, 10)]
    two_rounds = [[[4], [0]], [[3], []], [[2], []], [[1], []]]
    assert data.micro_batches(widths, range(5), 4, 60) == two_rounds
    assert data.micro_batches(widths, range(5), 4, 100) == [[[4, 0]], [[3]], [[2]], [[1]]]
    assert data.micro_batches(widths[:2], [1], 4, 60) == [[[1]], [[]], [[]], [[]]]
    assert data.micro_batches([(90, 10), (10, 90)], range(2), 1, 200) == [[[0], [1]]]
    assert data.micro_batches([(90, 10), (10, 90)], range(2), 1, 360) == [[[0, 1]]]
