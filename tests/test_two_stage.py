"""Two-stage figures: the retriever against few lines, long lists against the known optimum."""

import json
import math
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from test_page import read
from test_recommend import BASE, OPTIONS, write_log
from test_report import write_stage

from data import NUM_CANDIDATES, build_examples
from eval import ranking_metrics, summarise
from loaders.counting import counting_baselines, fit, markov, training_rows
from loaders.frozen import DataConfig, Prepared, prepare
from loaders.planted import World, planted_world
from runtime.stages import save_predictions
from studies import two_stage
from studies.methods import grouped
from studies.page import page
from studies.ranking import ANCHORS, groups_of, on_one_scale, rank_long
from studies.results import collect
from studies.sections import catalogue_section
from studies.sequential import records_of
from studies.two_stage import (
    TwoStageConfig,
    evaluate_lists,
    figures,
    gains,
    optimum_scores,
    retrieved,
    tables,
    targets,
    touched_before,
)
from train import TrainConfig

USERS = 300


@pytest.fixture(scope="module")
def planted():
    """A small planted world as prepared examples, and the optimum's scores of all items."""
    config = DataConfig(planted_users=USERS, followers=4)
    interactions = planted_world(World(num_users=USERS))
    options = {"dataset": "planted", "history": 20, "planted_users": USERS, "data_seed": 0}
    options |= {"min_rating": 4.0}
    prepared = Prepared(interactions, build_examples(interactions, config), "", None, {}, options)
    test = prepared.splits["test"].select(slice(120))
    return test, optimum_scores(prepared, test)


@pytest.fixture(scope="module")
def retriever(planted):
    interactions = planted[0].interactions
    return fit("markov", interactions, training_rows(interactions))


class Scorer:
    """Stands for the model: log-probs of a list of at most 20, normalised over that list."""

    def __init__(self, values: np.ndarray, noise: float = 0.0, seed: int = 0):
        self.values, self.noise, self.asked = values, noise, 0
        self.rng = np.random.default_rng(seed)

    def __call__(self, asked):
        rows = []
        for e, items in asked:
            assert 2 <= len(items) <= NUM_CANDIDATES and len(set(items.tolist())) == len(items)
            row = self.values[e, items] + self.noise * self.rng.standard_normal(len(items))
            rows.append(row - np.log(np.exp(row).sum()))
            self.asked += 1
        return rows


class ListRankerOf:
    """A ranker that looks its lists up by title: evaluate_lists with any values."""

    def __init__(self, values: np.ndarray, examples):
        self.score = Scorer(values)
        self.code = {title: c for c, title in enumerate(examples.interactions.titles)}
        self.row = {examples[e].user: e for e in range(len(examples))}

    def logps(self, lists):
        codes = [np.array([self.code[t] for t in shown.candidates]) for shown in lists]
        users = [self.row[shown.user] for shown in lists]
        return self.score(list(zip(users, codes, strict=True)))


# ----------------------------------------------------------------------------------- the retriever
def test_the_retriever_alone_by_few_independent_lines(planted, retriever):
    """Every place by sorting (score, code) of counting.py's Markov over all items."""
    test, optimum = planted
    interactions, places = test.interactions, []
    every = test.select(slice(None))
    every.candidates = np.tile(np.arange(interactions.num_items), (len(test), 1))
    for e, scores in enumerate(markov(every)):
        seen = set(touched_before(test, e).tolist())
        order = sorted(
            set(range(interactions.num_items)) - seen, key=lambda c: (-round(scores[c], 9), c)
        )
        places.append(1 + order.index(test.candidates[e, test.target[e]]))
    found = retrieved(retriever, test, interactions.num_items)
    rows = evaluate_lists(test, found, ListRankerOf(optimum, test), [20], optimum)
    assert rows["retriever"].tolist() == places
    shown = figures(rows)["retriever"]
    assert shown["HR@5"]["mean"] == np.mean([p <= 5 for p in places]) > 0
    ndcg = np.mean([1 / math.log2(1 + p) if p <= 10 else 0 for p in places])
    assert shown["NDCG@10"]["mean"] == pytest.approx(ndcg)
    assert shown["MRR"]["mean"] == pytest.approx(np.mean([1 / p for p in places]))


def test_gains_are_those_of_ranking_metrics():
    """Places of lists without ties: one definition of each measure."""
    scores = np.random.default_rng(0).permuted(np.tile(np.arange(30.0), (50, 1)), axis=1)
    target = np.arange(50) % 30
    known = ranking_metrics(scores, target)
    places = 1 + (scores > scores[np.arange(50), target][:, None]).sum(1)
    found = gains(places)
    assert (found["HR@1"] == known["hit_ratio@1"]).all()
    assert (found["HR@5"] == known["hit_ratio@5"]).all()
    assert (found["MRR"] == known["mrr"]).all()
    within = places <= 5
    assert (found["NDCG@10"][within] == known["ndcg@5"][within]).all()


# -------------------------------------------------------------------------------------- long lists
@pytest.mark.parametrize("count", [2, 19, 20, 21, 36, 50, 100, 101])
def test_groups_hold_everything_once_and_the_anchors_always(count):
    groups = groups_of(count)
    assert set(np.concatenate(groups)) == set(range(count))
    for places in groups:
        assert len(set(places.tolist())) == len(places) == min(count, NUM_CANDIDATES)
        if count > NUM_CANDIDATES:
            assert places[:ANCHORS].tolist() == list(range(ANCHORS))
    assert len(groups) == max(1, math.ceil((count - ANCHORS) / (NUM_CANDIDATES - ANCHORS)))


def test_one_scale_undoes_every_shift_of_a_group():
    values, groups = np.random.default_rng(0).standard_normal(50), groups_of(50)
    rows = [values[places] + 7 * g for g, places in enumerate(groups)]
    found = on_one_scale(50, groups, rows)
    assert np.ptp(found - values) < 1e-12


@pytest.mark.parametrize("size", [20, 50, 100])
def test_the_optimum_in_lists_of_20_orders_long_lists_as_the_optimum(planted, retriever, size):
    """Its log-probs are known only up to a shift per list; the order of all N is still exact."""
    test, optimum = planted
    lists = [
        retriever.top(touched_before(test, e), touched_before(test, e), size)
        for e in range(len(test))
    ]
    score = Scorer(optimum)
    for e, order in enumerate(rank_long(lists, score)):
        assert sorted(order) == sorted(lists[e])
        assert (np.diff(optimum[e, order]) < 1e-9).all()
    per_user = 1 if size == 20 else len(groups_of(size)) + 1
    assert score.asked == per_user * len(test)


def test_a_noisy_scorer_does_as_well_in_groups_as_in_one_list(planted, retriever):
    """Noise of 0.5 nats per log-prob: HR@10 of N = 100, over three draws of the noise.

    Groups and a last list must not lose to one list of all 100 with the same noise, and must come
    near the optimum's order."""
    test, optimum = planted
    lists = [
        retriever.top(touched_before(test, e), touched_before(test, e), 100)
        for e in range(len(test))
    ]
    wanted, hits, direct, best = targets(test), [], [], []
    for seed in range(3):
        score = Scorer(optimum, noise=0.5, seed=seed)
        noise = 0.5 * np.random.default_rng(seed + 100).standard_normal(optimum.shape)
        for e, order in enumerate(rank_long(lists, score)):
            hits.append(wanted[e] in order[:10])
            no_ties = optimum[e] + 1e-6 * noise[e]  # stories of a genre: equal scores
            for values, found in ((optimum[e] + noise[e], direct), (no_ties, best)):
                found.append(wanted[e] in lists[e][np.argsort(-values[lists[e]])][:10])
    assert np.mean(hits) > np.mean(direct) - 0.01
    assert np.mean(best) > 0.5 and np.mean(hits) > np.mean(best) - 0.06


def test_figures_lie_between_retriever_and_ceiling(planted, retriever):
    """The optimum as the model: its rows are the optimum's, below the ceiling and all items'."""
    test, optimum = planted
    found = retrieved(retriever, test, test.interactions.num_items)
    rows = evaluate_lists(test, found, ListRankerOf(optimum, test), [20, 50], optimum)
    result = figures(rows)
    for size in (20, 50):
        model, best = result[f"+ model, N = {size}"], result[f"+ optimum, N = {size}"]
        ceiling = result[f"ceiling, N = {size}"]
        for measure in ("HR@1", "HR@5", "HR@10", "NDCG@10", "MRR"):
            assert model[measure]["mean"] <= ceiling[measure]["mean"]
            assert abs(model[measure]["mean"] - best[measure]["mean"]) < 0.04  # ties within a genre
    last = result["+ model, N = 50"]["HR@10"]
    assert last["mean"] > result["retriever"]["HR@10"]["mean"] and last["verdict"] == "higher"
    every = result["optimum of all items"]  # ties as in the lists, so a longer list is no worse
    assert every["HR@10"]["mean"] >= result["+ optimum, N = 50"]["HR@10"]["mean"] - 0.03
    text = tables(result)
    assert text.count("\n") == len(rows) + 6 and "+ model, N = 50" in text


def test_a_model_that_changes_nothing_differs_by_exactly_0():
    """Equal columns of a product of matrices are rounded differently, all to one side at times."""
    alone = np.random.default_rng(0).integers(1, 60, 943)
    result = figures({"retriever": alone, "+ model, N = 20": alone})["+ model, N = 20"]
    for measure in two_stage.MEASURES:
        assert result[measure]["minus_retriever_interval"] == (0, 0), measure
        assert result[measure]["verdict"] == "not distinguishable"


def test_bad_options():
    with pytest.raises(ValueError, match="--run is needed"):
        TwoStageConfig()
    with pytest.raises(ValueError, match="--list_sizes: expected numbers >= 2, got '20,x'"):
        TwoStageConfig(run="r", list_sizes="20,x")
    assert TwoStageConfig(run="r", list_sizes=" 50,20, 50").sizes() == [20, 50]


# ---------------------------------------------------------------------------------- in the report
def run_of_the_base(folder: Path) -> Path:
    """A run with one finished stage, the demo's base itself, on a small log."""
    write_log(folder / "log.csv")
    paths = {"data_dir": str(folder / "log.csv"), "prepared_dir": str(folder / "prepared")}
    run = folder / "runs" / "own"
    config = TrainConfig(**OPTIONS, **paths, model=str(BASE), stages="sft", output_dir=str(run))
    prepared = prepare(config)
    shutil.copytree(BASE, run / "sft")
    (run / "sft/base.json").write_text("{}")
    (run / "config.json").write_text(json.dumps(asdict(config)))
    test = prepared.splits["test"]
    records = records_of(test, np.random.default_rng(0).random(test.candidates.shape))
    facts = summarise(records, counting_baselines(test)) | {"data_hash": prepared.hash}
    save_predictions(run / "sft/eval", facts, records)
    return run


def call(monkeypatch, run: Path, retriever: str) -> dict:
    """What studies.two_stage leaves in the run's folder."""
    flags = [f"--run={run}", f"--prepared_dir={run.parents[1] / 'prepared'}"]
    flags += [f"--retriever={retriever}", "--list_sizes=5,21", "--users=6"]
    monkeypatch.setattr(sys, "argv", ["two_stage", *flags])
    two_stage.main()
    return json.loads((run / "two_stage/sft" / f"{retriever}.json").read_text())


def test_the_command_fills_the_report_with_markov_and_sasrec(tmp_path, monkeypatch):
    """Both retrievers of one run, by their own command, side by side in the report and its page."""
    run = run_of_the_base(tmp_path)
    found = {name: call(monkeypatch, run, name) for name in ("markov", "sasrec")}
    text = "\n\n".join(catalogue_section(grouped(collect(tmp_path / "runs"))))
    cells = read(page(f"# own\n\n{text}\n", tmp_path)).cells
    for retriever, facts in found.items():
        for name, shown in (("retriever", f"{retriever} alone"), ("+ model, N = 21", None)):
            row = facts["rows"][name]["MRR"]
            low, high = row["ci95"]
            assert f"{row['mean']:.4f} [{low:.3f}, {high:.3f}]" in cells
            assert shown is None or shown in cells
    assert cells.count("+ sft, N = 5") == 4  # a row of figures and one of differences, twice
    assert found["markov"]["places"] != found["sasrec"]["places"]


def write_places(folder: Path, stage: str, **places: list[int]) -> Path:
    file = folder / stage / "two_stage" / stage.split("-")[0] / "markov.json"
    file.parent.mkdir(parents=True)
    names = {"model": "+ model, N = 20", "ceiling": "ceiling, N = 20"}
    rows = {names.get(name, name): values for name, values in places.items()}
    file.write_text(json.dumps({"items": 100, "places": rows}))
    return file


def test_the_report_averages_runs_and_pairs_users(tmp_path):
    """HR@1 by hand: sft .25, the two runs of recpo .5 and 1; differences are to the retriever."""
    alone = [30, 30, 2, 2] * 10
    for stage, seed in (("sft", 0), ("recpo", 0), ("recpo", 1)):
        write_stage(tmp_path, stage, [1, 0] * 20, seed=seed)
    write_places(tmp_path, "sft-0", retriever=alone, model=[1, 2, 2, 2] * 10)
    write_places(tmp_path, "recpo-0", retriever=alone, model=[1, 2] * 20, ceiling=[1] * 40)
    write_places(tmp_path, "recpo-1", retriever=alone, model=[1] * 40)
    text = catalogue_section(grouped(collect(tmp_path)))
    rows = [[c.strip() for c in line.split("|")[1:-1]] for t in text for line in t.splitlines()]
    figures = {row[0]: row[1:] for row in reversed(rows) if row}
    expected = {"markov alone": ("0.0000", ""), "ceiling, N = 20": ("1.0000", "")}
    expected |= {"+ sft, N = 20": ("0.2500", "1"), "+ recpo, N = 20": ("0.7500", "2")}
    for name, (hits, runs) in expected.items():
        assert figures[name][0].startswith(f"{hits} [") and figures[name][-1] == runs, name
    order = [row[0] for row in rows if row]
    first, second, last = "markov alone", "+ sft, N = 20", "ceiling, N = 20"
    assert order.index(first) < order.index(second) < order.index(last)
    changes = {row[0]: row[1:] for row in rows if row}  # the last table: differences
    assert changes["+ recpo, N = 20"][0].startswith("+0.7500 [")
    assert changes["+ recpo, N = 20"][0].endswith("]: higher")
    hits = changes["+ sft, N = 20"][2]  # HR@10: half of the users had their target at 30
    assert hits.startswith("+0.5000 [+0.3") and hits.endswith("]: higher")


def test_figures_of_other_users_are_refused(tmp_path):
    write_stage(tmp_path, "sft", [1, 0])
    write_stage(tmp_path, "recpo", [1, 0])
    write_places(tmp_path, "sft-0", retriever=[3, 4], model=[1, 1])
    other = write_places(tmp_path, "recpo-0", retriever=[3, 5], model=[1, 1])
    with pytest.raises(ValueError, match="other users, or another order of the retriever") as error:
        catalogue_section(grouped(collect(tmp_path)))
    assert "recpo-0" in str(error.value) and "sft-0" in str(error.value)
    for bad in ({"retriever": [3, 4], "model": [1]}, {"retriever": [0, 4]}, {"model": [1, 1]}):
        other.write_text(json.dumps({"items": 100, "places": bad}))
        with pytest.raises(ValueError, match="recpo-0.*markov.json: its content is not"):
            catalogue_section(grouped(collect(tmp_path)))
