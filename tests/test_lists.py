"""Other lists of the same users, and K negatives side by side, in one report."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_report import write_stage

from common import parse_config
from data import build_examples
from loaders.counting import markov_top
from loaders.frozen import DataConfig
from loaders.lists import KINDS, other_lists
from loaders.planted import World, planted_world
from studies.lists import ListsConfig, list_rows
from studies.methods import grouped
from studies.negatives import COLUMNS, negative_rows
from studies.results import collect

ROOT = Path(__file__).parents[1]


def test_other_lists_keep_users_histories_and_targets():
    config = DataConfig(followers=3, min_history=4, train_size=50)
    interactions = planted_world(World(num_users=150))
    test = build_examples(interactions, config)["test"]
    lists = other_lists(test, config)
    assert list(lists) == ["popularity", "retrieved"]
    for kind, other in lists.items():
        assert (other.position == test.position).all()
        pairs = zip((test, other), (test.target, other.target), strict=True)
        one, two = (np.take_along_axis(e.candidates, t[:, None], 1) for e, t in pairs)
        assert (one == two).all() and (other.candidates != test.candidates).any(), kind
    again = other_lists(test, config)["popularity"]
    assert (again.candidates == lists["popularity"].candidates).all()
    retrieved = lists["retrieved"]
    wanted = np.sort(markov_top(interactions, test.position, 20, 19), 1)
    assert (np.sort(retrieved.candidates[retrieved.is_random].reshape(-1, 19), 1) == wanted).all()
    assert list(other_lists(test, replace(config, negatives="retrieved"))) == list(KINDS[:2])


def test_one_table_shows_all_lists(tmp_path):
    """Uniform from the run itself, the others from lists/, none where they were not measured."""
    write_stage(tmp_path, "sft", [1, 1, 0, 0])
    methods = grouped(collect(tmp_path))
    assert list_rows(methods) == []
    run = tmp_path / "sft-0"
    folder = run / "lists" / "sft" / "retrieved"
    folder.mkdir(parents=True)
    lines = (run / "sft/eval/predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) | {"target_slot": 3} for line in lines]
    for record in records:
        record["logps"] = [1.0 if n == 5 else 0.0 for n in range(20)]
    records[0]["logps"][3] = 2.0
    (folder / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    facts = {"baselines": {"chance": 0.05, "Markov": 0.01}}
    (folder / "metrics.json").write_text(json.dumps(facts))
    rows = {row[0]: row[1:] for row in list_rows(methods)}
    assert rows["Markov"] == ["0.3000", "", "0.0100"]
    uniform, popularity, retrieved = rows["sft"]
    assert (uniform[:6], popularity, retrieved[:6]) == ("0.5000", "", "0.2500")


def test_negatives_stand_side_by_side(tmp_path):
    """A row per K, last tenth of the steps, mean and range of the seeds;
    one K alone has no table."""
    write_stage(tmp_path, "recpo", [1, 0, 0, 0], seed=0)
    assert negative_rows(grouped(collect(tmp_path))) == []
    write_stage(tmp_path, "recpo", [1, 1, 0, 0], seed=1)
    for seed in (0, 1):
        write_stage(tmp_path, "recpo", [1, 1, 1, 0], name="k15-", seed=seed, num_negatives=15)
    write_stage(tmp_path, "recpo", [0, 0, 0, 0], name="beta-", num_negatives=7, beta=0.3)
    low, high = (
        dict(zip(COLUMNS, row, strict=True)) for row in negative_rows(grouped(collect(tmp_path)))
    )
    assert (low["K"], high["K"]) == ("3", "15")  # K = 7 has another beta
    assert low["HR@1 written"] == "0.375 (0.250 to 0.500)" and low["runs"] == "2"
    assert high["HR@1 written"] == "0.750 (0.750 to 0.750)"
    assert low["reward gap, nats"] == "28.000 (28.000 to 28.000)"  # steps 27, 28, 29 of 29


def test_the_report_goes_into_the_run_folder_as_markdown_and_html(tmp_path):
    """Without --output_dir: FOLDER/report, both files with the new sections."""
    write_stage(tmp_path, "sft", [1, 1, 0, 0] * 5)
    write_stage(tmp_path, "recpo", [1, 1, 1, 0] * 5, num_negatives=1)
    write_stage(tmp_path, "recpo", [1, 1, 1, 0] * 5, num_negatives=7, name="k7-")
    command = [sys.executable, "-m", "studies.report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report/report.md").read_text()
    document = (tmp_path / "report/report.html").read_text()
    for title in ("Beyond accuracy", "More negatives", "Methods (the paper"):
        assert f"## {title}" in text and f"<h2>{title}" in document
    assert "nothing is known of popularity" in text
    assert document.count("data:image/png;base64,") == text.count("](")


@pytest.mark.parametrize("option", ["split"])
def test_options_of_eval_that_lists_have_no_use_for_are_refused(option):
    with pytest.raises(ValueError, match=f"unknown option --{option};"):
        parse_config(ListsConfig, ["--run=r", f"--{option}=1"])


def test_lists_need_a_run_with_a_log():
    with pytest.raises(ValueError, match="give --run"):
        ListsConfig(model="m")
    with pytest.raises(ValueError, match="prepared examples have no log"):
        ListsConfig(run="r", dataset="prepared", data_dir="d")
