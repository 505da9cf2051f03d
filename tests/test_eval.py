"""Evaluation: the one pass against free generation, the matching of answers, and the metrics."""

import json
from itertools import chain, cycle, islice, permutations, repeat

import numpy as np
import pytest
import torch
from families import make_base_model
from launch import ROOT

from data import build_examples, build_tree, encode_examples
from eval import (
    EvalConfig,
    compare_with_one_pass,
    evaluate,
    main,
    match_title,
    predict,
    ranking_metrics,
    results_table,
    summarise,
    trie_walk,
    verified_branch,
    wilson,
)
from hub.tokenizer import Tokenizer
from loaders.counting import counting_baselines
from loaders.frozen import DataConfig, find_prepared, prepare
from loaders.movielens import WORDS as MOVIES
from loaders.planted import DEFAULTS
from loaders.table import make_interactions
from model import load_pretrained
from runtime.sources import with_run_options


@pytest.fixture(scope="module")
def half_trained(tmp_path_factory):
    """A small model that writes listed titles now and then, ended by EOS or a line break, and its
    test set. Some titles end in a dot, some begin like others."""
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
    interactions.words = MOVIES
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
        groups = [train.slots(e, [train.examples.target[e]]) for e in batch]
        # told by the first word
        groups = [[c[:-1] + [newline] if c[0] % 2 else c for c in group] for group in groups]
        loss = -model(build_tree([train.prompts[e] for e in batch], groups))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), tokenizer, test


def test_one_pass_and_generation_agree(half_trained):
    """Every single answer of the one pass is what free greedy decoding writes,
    but for counted near-ties."""
    model, tokenizer, test = half_trained
    indices = range(len(test.prompts))
    assert len(indices) >= 200
    one_pass = predict(model, tokenizer, test, indices)
    generated = predict(model, tokenizer, test, indices, decode="generate")
    compared = compare_with_one_pass(model, tokenizer, test, generated)
    answers = [[r["answer"] for r in records] for records in (one_pass, generated)]
    differ = sum(a != b for a, b in zip(*answers, strict=True))
    assert compared["one_pass_differs"] == compared["one_pass_near_ties"] >= differ
    if not differ:
        for name in ("hit_ratio@1", "valid_ratio"):
            assert summarise(one_pass)[name] == summarise(generated)[name]
    # some listed titles and some others, some ended by a line break and some by EOS
    assert {r["how"] for r in one_pass} == {"verified", "generated"}
    endings = {bool(set(r["ids"]) & tokenizer.newline_ids()) for r in generated if r["valid"]}
    assert endings == {True, False} and not all(r["valid"] for r in generated)


def test_without_decoding_the_rest_counts_as_invalid(half_trained):
    """--no-decode_rest: an unverified prompt has no answer and no hit;
    verified ones stay as they are."""
    model, tokenizer, test = half_trained
    with_rest = predict(model, tokenizer, test, range(60))
    without = predict(model, tokenizer, test, range(60), decode_rest=False)
    for a, b in zip(with_rest, without, strict=True):
        if a["how"] == "verified":
            assert a == b
        else:
            assert b["answer"] is None and not b["valid"] and not b["hit"] and b["how"] == "none"


def test_rounds_for_other_ranks_leave_every_record_alone(half_trained):
    """A rank that is done goes on with dummy rounds;
    its records, example 0's too, stay as they were."""
    model, tokenizer, test = half_trained
    unverified = predict(model, tokenizer, test, range(60), decode_rest=False)
    first = next(i for i, r in enumerate(unverified) if r["how"] == "none")
    order = [first, *(e for e in range(60) if e != first)]  # example 0 is written out
    test = encode_examples(test.examples.select(order), tokenizer, 512)
    alone = predict(model, tokenizer, test, range(60))
    again = chain(islice(cycle([True, False]), 40), repeat(False))  # and then all are done
    others = predict(model, tokenizer, test, range(60), any_rank=lambda busy: busy or next(again))
    assert alone[0]["how"] == "generated"
    assert summarise(others)["answers_generated"] == summarise(alone)["answers_generated"]
    assert others == alone


def test_micro_batches_do_not_change_predictions(half_trained):
    """Batch composition changes log-probs by rounding only."""
    model, tokenizer, test = half_trained
    one = predict(model, tokenizer, test, range(40), decode_rest=False, micro_batch_tokens=1)
    many = predict(model, tokenizer, test, range(40), decode_rest=False, micro_batch_tokens=4000)
    np.testing.assert_allclose([r["logps"] for r in one], [r["logps"] for r in many], atol=1e-4)


def test_trie_always_names_a_listed_title(half_trained):
    """Decoding along the trie of candidates equals a step-by-step walk with full logits,
    and is always valid."""
    model, tokenizer, test = half_trained
    records = predict(model, tokenizer, test, range(12), decode="trie")
    assert all(r["valid"] for r in records)
    for r in records:
        e = r["example"]
        alive, written = test.slots(e, range(20)), []
        while len(alive) > 1 or len(written) < len(alive[0]):
            logits = model.logits(torch.tensor([test.prompts[e].tolist() + written]))[0, -1]
            allowed = sorted({c[len(written)] for c in alive})
            best = max(allowed, key=lambda token: logits[token].item())
            written.append(best)
            alive = [c for c in alive if c[: len(written)] == written]
        slot = test.slots(e, range(20)).index(alive[0])
        assert r["answer"] == r["candidates"][slot]


def test_verified_branch_needs_every_token_and_an_end():
    """A candidate verifies only if all its tokens are argmaxes and the argmax behind the last one
    ends the answer."""
    eos, newline = 9, 8
    tree = build_tree([[1, 2]] * 4, [[[3, eos], [3, 4, eos]]] * 4)
    # rows per example: candidate 0 (3, end), candidate 1 (3, 4, end)
    greedy = [[3, eos, 3, eos, eos], [3, 4, 3, 4, newline], [3, 4, 3, 4, 5], [7, eos, 7, 4, eos]]
    greedy = torch.tensor(greedy).flatten()
    assert verified_branch(tree, greedy, torch.tensor([newline, eos])).tolist() == [0, 1, -1, -1]


def test_trie_walk_takes_the_first_of_equals():
    """Ties go to the candidate that is listed first; a title that is a prefix of another is told
    apart by its end."""
    logps = iter([-1.0, -1.0, -1.0, -1.0, -0.5, -1.0, 0.0])
    assert trie_walk([[1, 2, 9], [1, 9], [3, 9]], logps) == 1
    assert trie_walk([[3, 9], [4, 9]], iter([-1.0, 0.0, -1.0, 0.0])) == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Alien", 0),
        ("Alien 3", 1),
        ("Alien.", 0),  # one final dot is dropped if nothing matches exactly
        ("Adieu.", 2),  # exact match first
        ("Adieu", 3),
        ("Bye", -1),
        ("Alien..", -1),
        ("alien", -1),
        ("Alien 3 ", 1),
        ("", -1),
        ("E\u0301lite", 5),  # the same letters, composed differently
    ],
)
def test_answers_match_titles_exactly(answer, expected):
    """An exact title; only if there is none, one final dot less; nothing else."""
    titles = ["Alien", "Alien 3", "Adieu.", "Adieu", "Bye.", "\u00c9lite"]
    assert match_title(answer, titles) == expected


def test_metrics_divide_by_all_cases():
    """Hit ratio and valid ratio are over all records, with Wilson intervals."""
    record = {"logps": [0.0, -1.0, -2.0], "target_slot": 0, "how": "verified"}
    records = [record | {"hit": i < 3, "valid": i < 6} for i in range(10)]
    metrics = summarise(records)
    names = ("hit_ratio@1", "valid_ratio", "hit_ratio@1|valid")
    assert [metrics[name] for name in names] == [0.3, 0.6, 0.5]
    assert metrics["ranking/hit_ratio@1"] == 1.0
    low, high = metrics["hit_ratio@1_ci95"]
    assert (round(low, 4), round(high, 4)) == (0.1078, 0.6032)  # Wilson, 3 of 10
    assert wilson(0.0, 50)[0] == 0.0 and 0 < wilson(0.0, 50)[1] < 0.1


def test_evaluate_scores_the_given_examples(half_trained):
    """The public call: metrics with baselines on the same candidates, one prediction per example,
    model mode kept."""
    model, tokenizer, test = half_trained
    some = test.examples.select(np.arange(30))
    metrics, predictions = evaluate(model, tokenizer, some, baselines=counting_baselines(some))
    assert metrics["n"] == len(predictions) == 30
    assert set(metrics["baselines"]) == {"chance", "popularity", "item-kNN", "Markov"}
    assert not model.training


def test_the_table_names_how_answers_were_found():
    """Written, or along the trie; a row for each method, those that are known first and last."""
    record = {"logps": [0.0, -1.0, -2.0], "target_slot": 0, "how": "verified"}
    records = [record | {"hit": i < 3, "valid": i < 6} for i in range(10)]
    scores = np.array([[1.0, 0.0, 0.0]] * 5 + [[0.0, 1.0, 0.0]] * 5)
    rows = {"sft": summarise(records, {"Markov": scores})}
    lines = results_table(rows, {"optimum": 0.75}).splitlines()
    assert lines[2] == "| method | HR@1 written | ValidRatio | HR@1 ranked first | NDCG@5 | MRR |"
    assert lines[4] == "| chance | | | 0.0500 | | |"
    assert lines[5] == "| Markov | | | 0.5000 [0.237, 0.763] | | |"
    assert lines[7] == "| optimum | | | 0.7500 | | |"
    assert lines[6].startswith("| sft | 0.3000 [0.108, 0.603] | 0.6000 | 1.0000 [0.722, 1.000] |")
    rows["sft"]["free/hit_ratio@1"] = 0.2
    assert "HR@1 trie" in results_table(rows) and "written |" not in results_table(rows)


def baseline_rows(prepared, split: str) -> list[str]:
    """How the rows of the counting recommenders begin in a table of this split."""
    target = prepared.splits[split].target
    return [
        f"| {name} | | | {ranking_metrics(scores, target)['hit_ratio@1'].mean():.4f} ["
        for name, scores in prepared.baselines(split).items()
    ]


def test_baselines_are_those_of_the_split(in_process, tmp_path, capsys):
    """eval.py prints validation's beside validation, and the test's beside the test."""
    options = DEFAULTS | {"planted_users": 150, "test_size": 9, "prepared_dir": str(tmp_path / "p")}
    flags = [f"--{name}={value}" for name, value in options.items()]
    prepared = prepare(DataConfig(**options))
    assert baseline_rows(prepared, "val") != baseline_rows(prepared, "test")
    for split in ("val", "test"):
        model = f"--model={ROOT / 'demo' / 'base'}"
        in_process(main, model, "--no_decode_rest", f"--split={split}", *flags)
        printed = capsys.readouterr().out
        assert f"{split} split" in printed
        assert all(row in printed for row in baseline_rows(prepared, split))


def test_a_runs_table_has_the_baselines_of_the_test(one_process):
    folder, *_ = one_process
    table = (folder / "one" / "results.md").read_text()
    (meta,) = (folder / "prepared").glob("*/meta.json")
    prepared = find_prepared(folder / "prepared", json.loads(meta.read_text())["hash"])
    assert all(row in table for row in baseline_rows(prepared, "test"))
    assert not all(row in table for row in baseline_rows(prepared, "val"))


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


def test_equal_scores_give_chance():
    """A recommender that knows nothing is credited with 1/n, not with 0 or 1."""
    metrics = ranking_metrics(np.zeros((3, 20), np.float32), np.array([0, 7, 19]))
    assert metrics["hit_ratio@1"].tolist() == [1 / 20] * 3
    assert metrics["hit_ratio@5"].tolist() == [5 / 20] * 3


def test_nan_scores_are_refused():
    """A diverged model must not be ranked: NaN is never greater, so its target would come first."""
    with pytest.raises(ValueError, match="1 of 2 examples .* first 1"):
        ranking_metrics(np.array([[0.0, 1.0], [np.nan, 0.0]]), np.array([0, 0]))


def test_an_option_beside_run_that_says_otherwise_is_refused(tmp_path):
    """A run is evaluated on its own examples: what was given and would be replaced is named."""
    saved = {"dataset": "planted", "test_size": 60, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    taken = with_run_options(EvalConfig(run=str(tmp_path), test_size=60))
    assert (taken.test_size, taken.dtype) == (60, "float32")
    with pytest.raises(ValueError, match="--test_size 7 has no effect beside --run.* 60 .*leave"):
        with_run_options(EvalConfig(run=str(tmp_path), test_size=7))
