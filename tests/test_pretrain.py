"""The base of the demo: it reads, it has no taste, and it is made again by its command."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from demo import pretrain, prompts
from demo.pretrain import BASE, PretrainConfig
from demo.prompts import Practice
from eval import evaluate
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, prepare
from loaders.planted import WORDS, World, planted_world
from model import ModelConfig, load_pretrained

KINDS = np.reshape(World().titles(), (World.num_genres, -1)).tolist()


def test_the_base_reads_lists_and_knows_no_taste(tmp_path):
    """On prompts of the planted world it writes listed titles, and ranks the target by
    chance, within the noise of 150 users."""
    config = DataConfig(planted_users=400, followers=3, min_history=4, prepared_dir=str(tmp_path))
    val = prepare(config).splits["val"].select(np.arange(150))
    model = load_pretrained(BASE)
    metrics, records = evaluate(model, Tokenizer(BASE), val, decode_rest=False)
    assert metrics["valid_ratio"] >= 0.95
    low, high = metrics["ranking/hit_ratio@1_ci95"]
    assert low <= 1 / 20 <= high
    masses = [np.exp(r["logps"]).sum() for r in records]
    assert np.mean(masses) > 0.65  # of all answers, on the 20 listed ones


def test_the_demos_base_practises_the_same_prompts(tmp_path):
    """Its tokens are the committed ones; the digest is of prompts and answers of each phase."""
    _, tokenizer = pretrain.new_base(PretrainConfig(), KINDS, WORDS, tmp_path)
    assert tokenizer.inner.get_vocab() == Tokenizer(BASE).inner.get_vocab()
    practice, digest = Practice(PretrainConfig(), KINDS, WORDS), hashlib.sha256()
    for size, step in ((3, 0), (12, 7), (20, 8), (20, 5999), (20, 6000)):
        practice.list_size = size
        for batch in practice.draw(step):
            tree = pretrain.answer_tree(batch, tokenizer, np.random.default_rng(step))
            digest.update(tree.input_ids.numpy().tobytes() + tree.labels.numpy().tobytes())
    assert digest.hexdigest()[:12] == "31d0699972cc"


def parts(prompt):
    """Listed titles, and the history's titles with their ratings (None where it shows none)."""
    lines = prompt.text.split("\n")[1:-1]
    question = next(n for n, line in enumerate(lines) if len(line.split(" | ")[0].split()) > 2)
    shown = [line.partition(" | Rating: ") for line in lines[:question]]
    return lines[question + 1 :], [(title, rating) for title, _, rating in shown]


@pytest.mark.parametrize("question", ["disliked", *prompts.QUESTIONS])
@pytest.mark.parametrize("right", [0, 2])
def test_a_question_has_the_listed_titles_of_the_kind_meant_as_answers(question, right):
    """Like the latest, the latest liked or disliked, or all; never a title of the history."""
    kinds, rng = KINDS, np.random.default_rng(0)
    kind_of = {title: n for n, kind in enumerate(kinds) for title in kind}
    for _ in range(50):
        prompt = prompts.kind_prompt(kinds, question, 20, right, ("stories", "read", "read"), rng)
        listed, history = parts(prompt)
        liked = [title for title, rating in history if rating in ("4", "5")]
        disliked = [title for title, rating in history if rating in ("1", "2")]
        meant = {
            "disliked": disliked[-1:],
            "alike": [title for title, _ in history],
            "last": [history[-1][0]],
            "liked": liked[-1:],
        }[question]
        (kind,) = {kind_of[title] for title in meant}
        assert len(set(listed)) == 20 and not {title for title, _ in history} & set(listed)
        of_the_kind = {title for title in listed if kind_of[title] == kind}
        assert len(of_the_kind) == right
        assert set(prompt.answers) == (of_the_kind or set(listed))


def test_mixed_titles_change_the_words_behind_their_first():
    """Every first word and every ending is one of before, once; a title of one word keeps it."""
    titles, rng = ["Blue Sky", "Red Sea of Sand", "Emma", "Green Hill"], np.random.default_rng(0)
    firsts, ends = {"Blue", "Red", "Emma", "Green"}, {" Sky", " Sea of Sand", "", " Hill"}
    seen = set()
    for _ in range(50):
        parted = [title.partition(" ") for title in prompts.mixed(titles, rng)]
        assert {first for first, _, _ in parted} == firsts
        assert {gap + end for _, gap, end in parted} == ends
        seen |= {"".join(part) for part in parted}
    assert len(seen) == 16
    assert prompts.mixed(["Emma", "Emma"], rng) == ["Emma"]


@pytest.mark.parametrize("least", [5, 30, 400])
def test_crowded_titles_are_of_few_kinds(least):
    """Of as many more kinds as a list and a history need, of all if there are not enough."""
    kinds, rng = KINDS, np.random.default_rng(0)
    kind_of = {title: n for n, kind in enumerate(kinds) for title in kind}
    counts = set()
    for _ in range(50):
        titles = prompts.crowded(kinds, least, rng)
        assert len(set(titles)) == len(titles) > min(least, 319)
        counts.add(len({kind_of[title] for title in titles}))
    assert counts == ({20} if least == 400 else {2, 4, 10})


def test_the_last_steps_of_practice_ask_for_no_taste():
    """Once lists are of 20, a recommender's prompt may be answered by the kind of the latest
    disliked title; before that, in the last steps and in the first part by every listed title."""
    config = PretrainConfig()
    steps = config.steps
    practice = Practice(config, KINDS, WORDS)
    practice.list_size = 19
    assert [len(practice.draw(step)) for step in (0, steps - 1, steps)] == [2, 2, 2]
    practice.list_size, disliked = 20, 0
    for step in range(steps - 5, steps + 5):
        for part, batch in enumerate(practice.draw(step)):
            for prompt in batch:
                everything = set(prompt.answers) == set(parts(prompt)[0])
                recommends = " is like " not in prompt.text
                assert everything or part >= 1
                if step >= steps:
                    assert everything or not recommends
                disliked += recommends and not everything
    assert disliked > 20


@pytest.mark.parametrize("step", [0, 9])
def test_a_step_learns_from_all_its_parts(tmp_path, step):
    """Its mean NLL and shares are of four parts, and every weight moves."""
    config = PretrainConfig(steps=9, hidden_size=32, num_layers=1, batch_tokens=500)
    model, tokenizer = pretrain.new_base(config, KINDS, WORDS, tmp_path)
    practice, optimizer = Practice(config, KINDS, WORDS), pretrain.new_optimizer(model)
    practice.list_size = 20
    before = [p.detach().clone() for p in model.parameters()]
    results = pretrain.practise(model, optimizer, tokenizer, practice, step)
    assert np.shape(results) == (4, 3) and np.isfinite(results).all() and practice.list_size == 20
    assert (practice.begins, practice.continues) == (0.1 * results[0][2], 0.1 * results[1][1])
    pairs = zip(before, model.parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in pairs)


def test_too_few_titles_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 titles are too few .* needs 40"):
        pretrain.pretrain(PretrainConfig(), [["Emma", "Hamlet"]], WORDS, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_title_may_be_one_token_wherever_it_stands(tmp_path):
    """In history, list and answer, with the line break before it; what is no such token is spelled.

    The longest title is taken."""
    titles = ["Jaws", "Jaws 2", "Go", "Alien³", "It's a Mad World"]
    titles += [f"Tale {n}" for n in range(30)]
    tokenizer = pretrain.write_tokenizer(tmp_path, [f" {title}" for title in titles], titles)
    completions = dict(zip(titles, tokenizer.encode_completions(titles), strict=True))
    assert {title for title, ids in completions.items() if len(ids) == 2} == {*titles} - {"Alien³"}
    assert all(tokenizer.answer(ids) == title for title, ids in completions.items())
    listed = [title for title in titles if title != "Alien³"]
    text = "Past:\nJaws 2 | Rating: 4\n" + "\n".join(listed) + "\nAnswer:"
    (ids,) = tokenizer.encode_prompts([text])
    own = {ids[0]: title for title, ids in completions.items() if title != "Alien³"}
    assert [own[i] for i in ids if i in own] == ["Jaws 2", *listed]


def test_the_base_is_small_and_encodes_any_text():
    """16-bit weights of at most 6 MB; byte-level tokens, so other data sets' titles go through."""
    assert sum(f.stat().st_size for f in BASE.iterdir()) <= 6 * 10**6
    assert {t.dtype for t in load_file(BASE / "model.safetensors").values()} == {torch.float16}
    tokenizer = Tokenizer(BASE)
    for title in ("Amélie 2001", "東京物語", "Se7en | Rating: 4", "🎬"):
        (ids,) = tokenizer.encode_completions([title])
        assert tokenizer.answer(ids) == title


SMALL = {"hidden_size": 32, "num_layers": 1, "batch_tokens": 500, "steps": 5, "settle_steps": 4}


@pytest.mark.parametrize("made", [3, 7])
def test_a_killed_pretraining_goes_on_to_the_same_weights(tmp_path, monkeypatch, made):
    """A checkpoint after every step; stopped in its 5 steps or in the 4 last ones, the same call
    ends with the same bits. What stood in the directory stays until then."""
    kinds, config = [[f"Tale {n} of {n * n}" for n in range(200)]], PretrainConfig(**SMALL)
    monkeypatch.setattr(pretrain, "SAVE_STEPS", 1)
    pretrain.pretrain(config, kinds, WORDS, tmp_path / "whole")
    practise, again, taken, fresh = pretrain.practise, tmp_path / "again", [], []
    again.mkdir()
    (again / "config.json").write_text("before")

    def killed(model, optimizer, tokenizer, practice, step):
        taken.append(step)
        if step == made and taken.count(made) == 1:
            raise OSError("killed")
        fresh.extend([] if optimizer.state else [step])
        return practise(model, optimizer, tokenizer, practice, step)

    monkeypatch.setattr(pretrain, "practise", killed)
    with pytest.raises(OSError, match="killed"):
        pretrain.pretrain(config, kinds, WORDS, again)
    assert (again / "config.json").read_text() == "before"
    pretrain.pretrain(config, kinds, WORDS, again)
    assert taken == [*range(made + 1), *range(made, 9)] and fresh == [0, 5]
    ends = [load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", again)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert {file.name for file in again.iterdir()} == {file.name for file in BASE.iterdir()}
    assert not (tmp_path / "again.part").exists()


def test_a_base_goes_on_only_from_its_own_checkpoint(tmp_path, monkeypatch):
    """Another seed, size or title begins anew, where a base was begun in the same place."""
    config, steps = PretrainConfig(**SMALL), []

    def killed(model, optimizer, tokenizer, practice, step):
        steps.append((step, practice.list_size))
        practice.list_size += 4
        if step == 1:
            raise OSError("killed")
        return [(1.0, 1.0, 1.0)]

    monkeypatch.setattr(pretrain, "SAVE_STEPS", 1)
    monkeypatch.setattr(pretrain, "practise", killed)
    seed, layers = replace(config, seed=1), replace(config, num_layers=2)
    runs = [(config, KINDS), (seed, KINDS), (layers, KINDS), (config, KINDS[1:]), (config, KINDS)]
    for options, kinds in runs:
        with pytest.raises(OSError, match="killed"):
            pretrain.pretrain(options, kinds, WORDS, tmp_path / "base")
    assert steps == [(0, 3), (1, 7)] * 4 + [(1, 7)]


def test_the_base_of_a_log_is_made_once(tmp_path, monkeypatch, capsys):
    """Kept under a hash of titles, log and options; a dry run makes none; other titles, and a list
    in the prompt, have another."""
    monkeypatch.setattr(pretrain, "PRACTISED", SMALL)
    log = planted_world(World(num_users=60))

    def base(log=log, practised=False, dry_run=False):
        return pretrain.titles_base(log, tmp_path, practised, dry_run)

    for practised in (False, True):
        dry = base(practised=practised, dry_run=True)
        assert ("made in 9 steps" in capsys.readouterr().out) == practised
        assert len(list(tmp_path.glob("titles-*"))) == practised
        first = base(practised=practised)
        assert load_pretrained(first).config == ModelConfig.from_pretrained(dry)
        capsys.readouterr()
        assert base(practised=practised) == base(practised=practised, dry_run=True) == first
        assert capsys.readouterr().out == ""
    renamed = replace(log, titles=[f"{t}!" for t in log.titles])
    others = [renamed, planted_world(World(num_users=61))]
    assert len({base(), base(practised=True), *map(base, others)}) == 4


def test_titles_that_are_read_together_begin_near_each_other():
    """Stories of one genre have near directions, and near rows in a new base; others have not.

    What training may not see does not count."""
    world = World(num_users=1500)
    log = planted_world(world)
    points = pretrain.directions(log, 32)
    genres = np.arange(log.num_items) // world.stories_per_genre
    same = genres[:, None] == genres[None]
    assert (points @ points.T)[same].mean() > 0.5 and abs((points @ points.T)[~same].mean()) < 0.1
    ends = log.training_end()
    late = np.arange(len(log.item)) >= ends[log.user]
    other = replace(log, item=np.where(late, 0, log.item))
    np.testing.assert_allclose(pretrain.directions(other, 32), points)


def test_similar_titles_begin_with_similar_rows(tmp_path):
    """Half of a row is its item's direction, whose length is that of the random row it mixes with;
    an item that nobody chose, and every other token, keeps its row."""
    log = planted_world(World(num_users=60))
    config = PretrainConfig(title_tokens=True, hidden_size=64, num_layers=1)
    begun = [config, [log.titles], WORDS, tmp_path]
    before = pretrain.new_base(*begun)[0].model.embed_tokens.weight.detach()
    model, tokenizer = pretrain.new_base(*begun, log)
    after = model.model.embed_tokens.weight.detach()
    expected = pretrain.directions(log, 32)
    chosen = np.linalg.norm(expected, axis=1) > 0.5
    titles = [title for title, known in zip(log.titles, chosen, strict=True) if known]
    ids = [ids[0] for ids in tokenizer.encode_completions(titles)]
    others = np.setdiff1d(np.arange(len(after)), ids)
    assert torch.equal(after[others], before[others])
    moved = torch.nn.functional.normalize(2**0.5 * after[ids] - before[ids], dim=1)
    cosines = expected[chosen] @ expected[chosen].T
    np.testing.assert_allclose(moved @ moved.T, cosines, atol=1e-4)


@pytest.mark.parametrize("listed", [True, False])
def test_model_titles_goes_from_a_log_to_every_stage(tmp_path, in_process, monkeypatch, listed):
    """train.py makes the base and trains both stages on it; a title is one token, and the end."""
    monkeypatch.setattr(pretrain, "PRACTISED", SMALL)
    data = ("--planted_users=60", "--train_size=64", f"--prepared_dir={tmp_path / 'prepared'}")
    steps = ("--max_steps=2", "--batch_size=8", "--val_size=4", f"--output_dir={tmp_path / 'run'}")
    in_process(train.main, "--model=titles", *data, *steps, *["--list_in_prompt"] * listed)
    (base,) = (tmp_path / "prepared").glob("titles-*")
    titles = pretrain.known_titles(planted_world(World(num_users=60)))
    assert {len(ids) for ids in Tokenizer(base).encode_completions(titles)} == {2}
    for stage in ("sft", "recpo"):
        facts = json.loads((tmp_path / "run" / stage / "base.json").read_text())
        assert facts["base"] in (str(base.resolve()), "../sft")
        file = tmp_path / "run" / stage / "eval" / "predictions.jsonl"
        for record in map(json.loads, file.read_text().splitlines()):
            assert len(record["logps"]) == 20 and np.isfinite(record["logps"]).all()
            assert ("free" in record) == (not listed)
