"""The one pass against free generation, the matching of answers, and the metrics."""

import json
from itertools import chain, cycle, islice, permutations, repeat

import numpy as np
import pytest
import torch
from families import make_base_model
from launch import ROOT
from test_loaders import make_interactions

import eval as evaluation
from data import build_examples, build_tree, encode_examples
from eval import evaluate, match_title, predict, ranking_metrics, results_table, summarise
from hub.tokenizer import Tokenizer
from loaders.counting import counting_baselines
from loaders.frozen import DataConfig, find_prepared, prepare
from loaders.planted import DEFAULTS
from loaders.published import WORDS
from model import load_pretrained
from runtime.sources import parse_source, with_run_options


@pytest.fixture(scope="module")
def half_trained(tmp_path_factory):
    """A small model that writes listed titles now and then, and its test set."""
    rng = np.random.default_rng(0)
    words = ["Red", "Sea", "Moon", "Fox", "Iron", "Day", "Sun", "Owl"]
    titles = [f"{a} {b}" for a in words for b in words if a != b]
    titles = [f"{t}." if i % 7 == 0 else t for i, t in enumerate(titles)]
    titles += words + [f"{t} 2" for t in titles[:4]]
    U, L = 330, 18
    item = np.argsort(rng.random((U, len(titles))), axis=1)[:, :L].ravel()
    user, time = np.repeat(np.arange(U), L), np.tile(np.arange(L), U) + 1
    ratings, names = rng.integers(3, 6, U * L), dict(enumerate(titles))
    interactions = make_interactions(user, item, ratings, time, names, "movielens")
    interactions.words = WORDS["movielens"]
    splits = build_examples(interactions, DataConfig(followers=3, history=5, train_size=400))
    folder = tmp_path_factory.mktemp("half-trained")
    make_base_model(folder, splits["train"], hidden_size=64, num_layers=2, vocab_size=400, seed=0)
    tokenizer, model = Tokenizer(folder), load_pretrained(folder)
    train, test = (encode_examples(splits[s], tokenizer, 512) for s in ("train", "test"))
    newlines = sorted(tokenizer.newline_ids())
    newline = next(i for i in newlines if tokenizer.inner.decode([i]) == "\n")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(80):
        batch = [(16 * step + i) % len(train.prompts) for i in range(16)]
        groups = [train.title_ids(e, [train.examples.target[e]]) for e in batch]
        # told by the first word
        groups = [[c[:-1] + [newline] if c[0] % 2 else c for c in group] for group in groups]
        loss = -model(build_tree([train.prompts[e] for e in batch], groups))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), tokenizer, test


def test_one_pass_and_generation_agree(half_trained):
    """Every single answer, but for counted near-ties."""
    model, tokenizer, test = half_trained
    indices = range(len(test.prompts))
    assert len(indices) >= 200
    one_pass = predict(model, tokenizer, test, indices)
    examples, options = test.examples, {"decode": "generate", "max_length": 512}
    compared, generated = evaluate(model.train(), tokenizer, examples, **options)
    assert model.training and not model.eval().training  # as it was
    answers = [[r["answer"] for r in records] for records in (one_pass, generated)]
    differ = sum(a != b for a, b in zip(*answers, strict=True))
    assert compared["one_pass_differs"] == compared["one_pass_near_ties"] >= differ
    # some listed titles and some others, some ended by a line break and some by EOS
    assert {r["how"] for r in one_pass} == {"verified", "generated"}
    endings = {bool(set(r["ids"]) & tokenizer.newline_ids()) for r in generated if r["valid"]}
    assert endings == {True, False} and not all(r["valid"] for r in generated)


def test_rounds_of_other_ranks_and_micro_batches_change_no_record(half_trained):
    """A rank that is done goes on with dummy rounds."""
    model, tokenizer, test = half_trained
    without = predict(model, tokenizer, test, range(60), decode_rest=False)
    first = next(i for i, r in enumerate(without) if r["how"] == "none")
    order = [first, *(e for e in range(60) if e != first)]  # example 0 is written out
    test = encode_examples(test.examples.select(order), tokenizer, 512)
    alone = predict(model, tokenizer, test, range(60))
    again = chain(islice(cycle([True, False]), 40), repeat(False))  # and then all are done
    others = predict(model, tokenizer, test, range(60), any_rank=lambda busy: busy or next(again))
    assert alone[0]["how"] == "generated" and others == alone
    without = predict(model, tokenizer, test, range(60), decode_rest=False, micro_batch_tokens=1)
    for a, b in zip(alone, without, strict=True):
        np.testing.assert_allclose(a["logps"], b["logps"], atol=1e-4)
        names = ("answer", "valid", "hit", "how")
        written = a["how"] == "verified"
        assert [b[n] for n in names] == ([a[n] for n in names] if written else UNWRITTEN)


UNWRITTEN = [None, False, False, "none"]


def test_trie_always_names_a_listed_title(half_trained):
    """Decoding along the trie of candidates equals a step-by-step walk with full logits."""
    model, tokenizer, test = half_trained
    records = predict(model, tokenizer, test, range(12), decode="trie")
    assert all(r["valid"] for r in records)
    for r in records:
        e = r["example"]
        alive, written = test.title_ids(e, range(20)), []
        while len(alive) > 1 or len(written) < len(alive[0]):
            logits = model.logits(torch.tensor([test.prompts[e].tolist() + written]))[0, -1]
            allowed = sorted({c[len(written)] for c in alive})
            best = max(allowed, key=lambda token: logits[token].item())
            written.append(best)
            alive = [c for c in alive if c[: len(written)] == written]
        slot = test.title_ids(e, range(20)).index(alive[0])
        assert r["answer"] == r["candidates"][slot]
    # the first of equals; a title that is a prefix of another is told apart by its end
    logps = iter([-1.0, -1.0, -1.0, -1.0, -0.5, -1.0, 0.0])
    assert evaluation.trie_walk([[1, 2, 9], [1, 9], [3, 9]], logps) == 1
    assert evaluation.trie_walk([[3, 9], [4, 9]], iter([-1.0, 0.0, -1.0, 0.0])) == 0


def test_verified_branch_needs_every_token_and_an_end():
    """All its tokens are argmaxes, and the argmax behind the last one ends the answer."""
    eos, newline = 9, 8
    tree = build_tree([[1, 2]] * 4, [[[3, eos], [3, 4, eos]]] * 4)
    # rows per example: candidate 0 (3, end), candidate 1 (3, 4, end)
    greedy = [[3, eos, 3, eos, eos], [3, 4, 3, 4, newline], [3, 4, 3, 4, 5], [7, eos, 7, 4, eos]]
    greedy = torch.tensor(greedy).flatten()
    found = evaluation.verified_branch(tree, greedy, torch.tensor([newline, eos]))
    assert found.tolist() == [0, 1, -1, -1]


def test_answers_match_titles_exactly():
    """An exact title; only if there is none, one final dot less; nothing else."""
    titles = ["Alien", "Alien 3", "Adieu.", "Adieu", "Bye.", "\u00c9lite"]
    exact = {"Alien": 0, "Alien 3 ": 1, "Adieu.": 2, "Adieu": 3, "E\u0301lite": 5}
    for answer in ("Bye", "Alien..", "alien", ""):
        assert match_title(answer, titles) == -1
    for answer, expected in (exact | {"Alien.": 0}).items():
        assert match_title(answer, titles) == expected


def test_metrics_and_their_table():
    """Over all records, with Wilson intervals; how answers were found; what is known beside it."""
    record = {"logps": [0.0, -1.0, -2.0], "target_slot": 0, "how": "verified"}
    records = [record | {"hit": i < 3, "valid": i < 6} for i in range(10)]
    scores = np.array([[1.0, 0.0, 0.0]] * 5 + [[0.0, 1.0, 0.0]] * 5)
    metrics = summarise(records, {"Markov": scores})
    names = ("hit_ratio@1", "valid_ratio", "hit_ratio@1|valid", "ranking/hit_ratio@1")
    assert [metrics[name] for name in names] == [0.3, 0.6, 0.5, 1.0]
    assert evaluation.wilson(0.0, 50)[0] == 0.0 and 0 < evaluation.wilson(0.0, 50)[1] < 0.1
    lines = results_table({"sft": metrics}, {"optimum": 0.75}).splitlines()
    assert lines[2] == "| method | HR@1 written | ValidRatio | HR@1 ranked first | NDCG@5 | MRR |"
    assert lines[4] == "| chance | | | 0.0500 | | |"
    assert lines[5] == "| Markov | | | 0.5000 [0.237, 0.763] | | |"
    assert lines[6].startswith("| sft | 0.3000 [0.108, 0.603] | 0.6000 | 1.0000 [0.722, 1.000] |")
    assert lines[7] == "| optimum | | | 0.7500 | | |"
    assert "HR@1 trie" in results_table({"sft": metrics | {"free/hit_ratio@1": 0.2}})


def assert_baselines(prepared, split: str, table: str) -> None:
    """The rows of the counting recommenders are those of this split, and not of the other."""
    for each in ("val", "test"):
        rows = []
        for name, scores in counting_baselines(prepared.splits[each]).items():
            hits = ranking_metrics(scores, prepared.splits[each].target)["hit_ratio@1"]
            rows.append(f"| {name} | | | {hits.mean():.4f} [" in table)
        assert all(rows) == (each == split) and rows


def test_baselines_are_those_of_the_split(in_process, one_process, tmp_path, capsys):
    """eval.py's, and a run's of the test."""
    options = DEFAULTS | {"planted_users": 150, "test_size": 9, "prepared_dir": str(tmp_path / "p")}
    flags = [f"--{name}={value}" for name, value in options.items()]
    prepared = prepare(DataConfig(**options))
    for split in ("val", "test"):
        model = f"--model={ROOT / 'demo' / 'base'}"
        in_process(evaluation.main, model, "--no_decode_rest", f"--split={split}", *flags)
        assert_baselines(prepared, split, capsys.readouterr().out)
    folder = one_process[0]
    (meta,) = (folder / "prepared").glob("*/prepared.json")
    prepared = find_prepared(folder / "prepared", json.loads(meta.read_text())["hash"])
    assert_baselines(prepared, "test", (folder / "one" / "results.md").read_text())


# ------------------------------------------------------------------------ ranking metrics
def test_tied_ranks_are_averaged_over_all_orders():
    """Each metric is its mean over all ways to order the candidates that respect the scores."""
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 3, (12, 7)).astype(float)
    scores[0], scores[1] = 0.0, np.arange(7)
    target = rng.integers(0, 7, 12)
    found = ranking_metrics(scores, target)
    orders = np.array(list(permutations(range(7))))
    for e in range(12):
        sorted_orders = orders[(np.diff(scores[e][orders], axis=1) <= 0).all(1)]
        rank = 1 + (sorted_orders == target[e]).argmax(1)
        gains = {f"hit_ratio@{k}": rank <= k for k in (1, 3, 5)}
        gains |= {"ndcg@5": np.where(rank <= 5, 1 / np.log2(rank + 1), 0), "mrr": 1 / rank}
        assert found.keys() == gains.keys()
        for name, gain in gains.items():
            assert found[name][e] == pytest.approx(gain.mean(), abs=1e-12), (e, name)


def test_nan_scores_are_refused():
    """NaN is never greater, so a diverged model's target would come first."""
    with pytest.raises(ValueError, match="1 of 2 examples .* first 1"):
        ranking_metrics(np.array([[0.0, 1.0], [np.nan, 0.0]]), np.array([0, 0]))


def test_an_option_beside_run_that_says_otherwise_is_refused(tmp_path, monkeypatch):
    saved = {"dataset": "planted", "test_size": 60, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    taken = with_run_options(evaluation.EvalConfig(run=str(tmp_path), test_size=60))
    assert (taken.test_size, taken.dtype) == (60, "float32")
    with pytest.raises(ValueError, match="leave out --test_size 7.* 60 .*config.json"):
        with_run_options(evaluation.EvalConfig(run=str(tmp_path), test_size=7))
    default = f"--test_size={evaluation.EvalConfig.test_size}"
    monkeypatch.setattr("sys.argv", ["eval.py", f"--run={tmp_path}", default])
    with pytest.raises(ValueError, match="leave out --test_size"):
        parse_source(evaluation.EvalConfig)
