"""Two-stage figures: the retriever against few lines, lists against the known optimum."""

import json
import math
import shutil
import sys
from dataclasses import asdict

import numpy as np
import pytest
from launch import ROOT
from test_report import write

from eval import ranking_metrics, summarise
from loaders.counting import Retriever, candidate_scores, counting_baselines, training_rows
from loaders.frozen import prepare
from loaders.planted import bayes_scores, world_of
from runtime.stages import save_predictions
from studies import two_stage
from studies.methods import collect
from studies.report import report_text
from studies.sequential import records_of
from studies.two_stage import catalogue_tables, gains, ranked_places, retrieved, shown_lists
from train import TrainConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(configuration, prepared examples) of a run whose only stage is the demo's base."""
    folder, base = tmp_path_factory.mktemp("two_stage"), str(ROOT / "demo/base")
    data = {"dataset": "planted", "planted_users": 200, "followers": 4, "stages": "sft"}
    data |= {"prepared_dir": str(folder / "prepared"), "output_dir": str(folder / "runs/own")}
    config = TrainConfig(**data, model=base)
    return config, prepare(config)


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


def test_gains_are_those_of_ranking_metrics():
    """Places of lists without ties: one definition of each measure; by hand where a list of 20 has
    no such figure, and in the table against the retriever alone."""
    scores = np.random.default_rng(0).permuted(np.tile(np.arange(30.0), (50, 1)), axis=1)
    target = np.arange(50) % 30
    known = ranking_metrics(scores, target)
    found = gains(1 + (scores > scores[np.arange(50), target][:, None]).sum(1))
    for mine, other in (("HR@1", "hit_ratio@1"), ("HR@5", "hit_ratio@5"), ("MRR", "mrr")):
        assert (found[mine] == known[other]).all()
    one = gains(np.array([3, 11]))
    assert one["NDCG@10"].tolist() == [1 / math.log2(4), 0] and one["HR@10"].tolist() == [1, 0]
    model = gains(np.array([1, 2] * 20))
    rows = catalogue_tables({"retriever": [30, 30, 2, 2] * 10}, {"+ model": model}).splitlines()
    figures, differences = (row.split(" | ") for row in rows if row.startswith("| + model"))
    assert figures[1].startswith("0.5000 [") and differences[1].endswith("]: higher")
    assert differences[3].startswith("+0.5000 [+0.3")  # HR@10: half had their target at 30


def test_the_best_order_lies_between_retriever_and_ceiling(run):
    """The retriever's places and lists by few independent lines; the optimum ranks each list; a
    target that was not retrieved keeps the retriever's place; scores that agree with the retriever
    change nothing."""
    config, prepared = run
    log, test = prepared.interactions, prepared.splits["test"].select(slice(100))
    lists, alone = retrieved(Retriever("markov", log, training_rows(log)), test)
    assert alone.tolist() == places_by_markov(test)
    for e, place in enumerate(alone.tolist()):  # lists go on from place to place
        found = np.flatnonzero(lists[e] == test.candidates[e, test.target[e]])
        assert found.tolist() == ([place - 1] if place <= 20 else [])
    shown, orders = shown_lists(test, lists)
    assert (np.sort(shown.candidates, 1) == np.sort(lists, 1)).all()
    assert (shown.candidates != lists).any(1).all()  # a prompt does not tell the retriever's order
    scores = bayes_scores(world_of(vars(config)), shown)
    best = ranked_places(scores, orders, lists, test, alone)
    assert (best[alone > 20] == alone[alone > 20]).all() and (best[alone <= 20] <= 20).all()
    assert gains(best)["HR@10"].mean() > gains(alone)["HR@10"].mean()
    assert (ranked_places(-orders.astype(float), orders, lists, test, alone) == alone).all()


def test_the_command_retrieves_by_training_rows_and_fills_the_report(run, monkeypatch):
    """Markov's places are those of a count of training rows, not of the whole log; the report has
    the model's figures."""
    config, prepared = run
    folder, test = ROOT / config.output_dir, prepared.splits["test"]
    shutil.copytree(config.model, folder / "sft")
    write(folder / "sft/base.json", {})
    write(folder / "config.json", asdict(config))
    records = records_of(test, np.random.default_rng(0).random(test.candidates.shape))
    facts = summarise(records, counting_baselines(test)) | {"data_hash": prepared.hash}
    save_predictions(folder / "sft/eval", facts, records)

    flags = [f"--run={folder}", f"--prepared_dir={config.prepared_dir}", "--users=12"]
    monkeypatch.setattr(sys, "argv", ["two_stage", *flags])
    two_stage.main()
    places = json.loads((folder / "two_stage/sft/markov.json").read_text())["places"]
    assert places["retriever"] == places_by_markov(test.select(slice(12)))
    markov = Retriever("markov", prepared.interactions)
    _, of_all_rows = retrieved(markov, test.select(slice(12)))
    assert places["retriever"] != of_all_rows.tolist()
    assert set(places) == {"retriever", "model", "optimum", "ceiling"}
    text = report_text(collect(folder.parent, {}))
    mean = gains(np.array(places["model"]))["MRR"].mean()
    assert f"| {mean:.4f} [" in text and "| + own/sft |" in text and "| retriever alone |" in text
    assert "| after --core 0 | 200 |" in text  # the prepared examples are at hand
