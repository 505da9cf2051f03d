"""Two-stage figures: the retriever against few lines, lists against the known optimum."""

import json
import math
import shutil
import sys
from dataclasses import asdict

import numpy as np
import pytest
from launch import ROOT
from test_report import write, write_stage

from data import build_examples
from eval import ranking_metrics, summarise
from loaders.counting import Retriever, candidate_scores, counting_baselines, training_rows
from loaders.frozen import DataConfig, prepare
from loaders.planted import World, bayes_scores, planted_world
from runtime.stages import save_predictions
from studies import two_stage
from studies.methods import collect
from studies.report import report_text
from studies.sequential import records_of
from studies.two_stage import catalogue_tables, gains, ranked_places, retrieved, shown_lists
from train import TrainConfig

BASE = ROOT / "demo" / "base"


@pytest.fixture(scope="module")
def planted():
    """Test cases of a small planted world, and Markov fitted on training rows."""
    log = planted_world(World(num_users=300))
    config = DataConfig(planted_users=300, followers=4)
    test = build_examples(log, config)["test"].select(slice(120))
    return test, Retriever("markov", log, training_rows(log))


def places_by_markov(examples) -> list[int]:
    """By sorting (score, code) of counting.py's Markov, which counts training rows alone."""
    log, places = examples.interactions, []
    every = examples.select(slice(None))
    every.candidates = np.tile(np.arange(log.num_items), (len(examples), 1))
    for e, scores in enumerate(candidate_scores("markov", every)):
        p = int(examples.position[e])
        allowed = set(range(log.num_items)) - set(log.item[log.start[log.user[p]] : p].tolist())
        order = sorted(allowed, key=lambda c: (-round(scores[c], 9), c))
        places.append(1 + order.index(examples.candidates[e, examples.target[e]]))
    return places


def test_the_retriever_alone_by_few_independent_lines(planted):
    test, retriever = planted
    lists, places = retrieved(retriever, test)
    assert places.tolist() == places_by_markov(test)
    for e, place in enumerate(places.tolist()):  # lists go on from place to place
        found = np.flatnonzero(lists[e] == test.candidates[e, test.target[e]])
        assert found.tolist() == ([place - 1] if place <= 20 else [])


def test_gains_are_those_of_ranking_metrics():
    """Places of lists without ties: one definition of each measure."""
    scores = np.random.default_rng(0).permuted(np.tile(np.arange(30.0), (50, 1)), axis=1)
    target = np.arange(50) % 30
    known = ranking_metrics(scores, target)
    places = 1 + (scores > scores[np.arange(50), target][:, None]).sum(1)
    found = gains(places)
    for mine, other in (("HR@1", "hit_ratio@1"), ("HR@5", "hit_ratio@5"), ("MRR", "mrr")):
        assert (found[mine] == known[other]).all()
    assert (found["NDCG@10"][places <= 5] == known["ndcg@5"][places <= 5]).all()
    one = gains(np.array([3, 11]))
    assert one["NDCG@10"].tolist() == [1 / math.log2(4), 0] and one["HR@10"].tolist() == [1, 0]


def test_the_best_order_lies_between_retriever_and_ceiling(planted):
    """The optimum ranks each list; a target that was not retrieved keeps the retriever's place;
    scores that agree with the retriever change nothing, and differ from it by exactly 0."""
    test, retriever = planted
    lists, alone = retrieved(retriever, test)
    shown, orders = shown_lists(test, lists)
    assert (np.sort(shown.candidates, 1) == np.sort(lists, 1)).all()
    assert (shown.candidates != lists).any(1).all()  # a prompt does not tell the retriever's order
    scores = bayes_scores(World(num_users=300), shown)
    best = ranked_places(scores, orders, lists, test, alone)
    assert (best[alone > 20] == alone[alone > 20]).all() and (best[alone <= 20] <= 20).all()
    assert gains(best)["HR@10"].mean() > gains(alone)["HR@10"].mean()
    same = ranked_places(-orders.astype(float), orders, lists, test, alone)
    assert (same == alone).all()
    text = catalogue_tables({"retriever": alone}, {"+ model": gains(same)})
    assert text.count("+0.0000 [+0.000, +0.000]: not distinguishable") == len(two_stage.MEASURES)


def test_the_command_retrieves_by_training_rows_and_fills_the_report(tmp_path, monkeypatch):
    """Of a run whose only stage is the demo's base: Markov's places are those of a count of
    training rows, not of the whole log; the report has the model's figures."""
    run, kept = tmp_path / "runs" / "own", str(tmp_path / "prepared")
    data = {"dataset": "planted", "planted_users": 100, "followers": 3, "prepared_dir": kept}
    config = TrainConfig(**data, model=str(BASE), stages="sft", output_dir=str(run))
    prepared = prepare(config)
    shutil.copytree(BASE, run / "sft")
    write(run / "sft/base.json", {})
    write(run / "config.json", asdict(config))
    test = prepared.splits["test"]
    records = records_of(test, np.random.default_rng(0).random(test.candidates.shape))
    facts = summarise(records, counting_baselines(test)) | {"data_hash": prepared.hash}
    save_predictions(run / "sft/eval", facts, records)

    flags = [f"--run={run}", f"--prepared_dir={kept}", "--users=12"]
    monkeypatch.setattr(sys, "argv", ["two_stage", *flags])
    two_stage.main()
    places = json.loads((run / "two_stage/sft/markov.json").read_text())["places"]
    examples = test.select(slice(12))
    assert places["retriever"] == places_by_markov(examples)
    _, of_all_rows = retrieved(Retriever("markov", prepared.interactions), examples)
    assert places["retriever"] != of_all_rows.tolist()
    assert set(places) == {"retriever", "model", "optimum", "ceiling"}
    text = report_text(collect(tmp_path / "runs", {}))
    mean = gains(np.array(places["model"]))["MRR"].mean()
    assert f"| {mean:.4f} [" in text and "| + own/sft |" in text and "| retriever alone |" in text


def test_the_report_averages_runs_and_pairs_users(tmp_path):
    """HR@1 by hand: sft .25, the two runs of recpo .5 and 1; differences are to the retriever;
    places of other users are refused."""
    alone, runs = [30, 30, 2, 2] * 10, []
    models = ("sft", 0, [1, 2, 2, 2] * 10), ("recpo", 0, [1, 2] * 20), ("recpo", 1, [1] * 40)
    for stage, seed, model in models:
        run = write_stage(tmp_path, stage, [1, 0] * 20, seed=seed)
        runs.append({"name": run.name, "method": stage})
        places = {"retriever": alone, "model": model, "ceiling": [1] * 40}
        content = {"items": 100, "data_hash": "abc", "places": places}
        write(run / "two_stage" / stage / "markov.json", content)
    text = report_text(collect(tmp_path, {"runs": runs}))
    rows = [line[2:].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    figures = {row[0]: row[1] for row in reversed(rows) if len(row) == 6}
    for name, hits in {
        "retriever alone": "0.0000 [", "ceiling": "1.0000 [", "+ sft": "0.2500 [",
        "+ recpo (mean of 2 runs)": "0.7500 [",
    }.items():  # fmt: skip
        assert figures[name].startswith(hits), name
    changes = {row[0]: row[1:] for row in rows if len(row) == 6}["+ recpo (mean of 2 runs)"]
    assert changes[0].startswith("+0.7500 [")  # in the last table: differences
    assert changes[2].startswith("+0.5000 [+0.3")  # HR@10: half had their target at 30
    assert changes[2].endswith("]: higher")
    places["retriever"] = [3] * 40
    write(run / "two_stage" / stage / "markov.json", content)
    with pytest.raises(ValueError, match=r"different users or candidates \(two_stage/markov\)"):
        collect(tmp_path, {})
