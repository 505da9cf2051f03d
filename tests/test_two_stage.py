"""Two-stage figures: the retriever against few lines, lists against the known optimum."""

import json
import shutil
import sys
from dataclasses import asdict

import numpy as np
import pytest
from launch import ROOT
from test_report import write

import eval as evaluation
from eval import summarise
from loaders.counting import Retriever, counting_baselines, training_rows
from loaders.frozen import prepare
from loaders.planted import bayes_scores, world_of
from runtime.stages import save_predictions
from studies import probes, two_stage
from studies.methods import collect
from studies.report import report_text
from studies.sequential import records_of
from studies.two_stage import gains, ranked_places, retrieved, shown_lists
from train import TrainConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(configuration, prepared examples) of a run whose only stage is the demo's base."""
    folder = tmp_path_factory.mktemp("two_stage")
    data = {"dataset": "planted", "planted_users": 200, "followers": 4, "stages": "sft"}
    data |= {"prepared_dir": str(folder / "prepared"), "output_dir": str(folder / "runs/own")}
    config = TrainConfig(**data, model=str(ROOT / "demo/base"))
    return config, prepare(config)


@pytest.mark.parametrize("program", [evaluation, probes])
def test_a_program_that_divides_nothing_refuses_torchrun(monkeypatch, program):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["script", "--model=demo/base"])
    with pytest.raises(ValueError, match="start it without torchrun"):
        program.main()


def places_by_markov(examples) -> list[int]:
    """By sorting (score, code) of counting.py's Markov, which counts training rows alone."""
    log, places = examples.interactions, []
    every = examples.select(slice(None))
    every.candidates = np.tile(np.arange(log.num_items), (len(examples), 1))
    for e, scores in enumerate(counting_baselines(every)["Markov"]):
        p = int(examples.position[e])
        allowed = set(range(log.num_items)) - set(log.item[log.start[log.user[p]] : p].tolist())
        order = sorted(allowed, key=lambda c: (-round(scores[c], 9), c))
        places.append(1 + order.index(examples.candidates[e, examples.target[e]]))
    return places


def test_the_best_order_lies_between_retriever_and_ceiling(run):
    """A target that was not retrieved keeps the retriever's place; scores that agree with the
    retriever change nothing."""
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
    test = test.select(slice(12))
    _, of_all_rows = retrieved(Retriever("markov", prepared.interactions), test)
    assert places["retriever"] == places_by_markov(test) != of_all_rows.tolist()
    assert set(places) == {"retriever", "model", "optimum", "ceiling"}
    text = report_text(collect(folder.parent, {}))
    mean = gains(np.array(places["model"]))["MRR"].mean()
    assert f"| {mean:.4f} [" in text and "| + own/sft |" in text and "| retriever alone |" in text
    assert "- 200 users, 320 items" in text  # the prepared examples are at hand
