"""GRU4Rec, Caser and SASRec: what they see, what they learn, and that test data stays out."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_counting import log_in_order

from data import build_examples
from eval import ranking_metrics
from loaders import planted
from loaders.frozen import DataConfig, prepare
from studies import sequential
from studies.sequential import MODELS, BaselineConfig, GRU4Rec, candidate_scores, step_loss, train

SMALL = {"hidden_size": 32, "max_items": 8, "num_sampled": 30, "batch_size": 32, "dropout": 0.1}


@pytest.fixture(scope="module")
def circle():
    """(log, splits): every user walks around a circle of items, from a place of his own."""
    starts = np.random.default_rng(0).integers((0, 10), (60, 25), (100, 2)).tolist()
    log = log_in_order([[(start + t) % 60 for t in range(length)] for start, length in starts])
    return log, build_examples(log, DataConfig(followers=2, min_history=2))


@pytest.mark.parametrize("size", [3, 8, 50])
def test_every_item_is_predicted_once_and_the_last_two_never(size):
    """Windows hold nothing of validation or test; a test case shows this user's last items."""
    rng = np.random.default_rng(size)
    log = log_in_order([rng.permutation(40)[: rng.integers(1, 30)].tolist() for _ in range(30)])
    windows, users = sequential.training_windows(log, size)
    for user in range(30):
        items = (log.item[log.start[user] : log.start[user + 1]] + 1).tolist()
        rows = windows[users == user].tolist()
        found = [pair for row in rows for pair in zip(row[:-1], row[1:], strict=True) if all(pair)]
        assert sorted(found) == sorted(zip(items[:-2], items[1:-2], strict=False))
        position = log.start[user + 1 : user + 2] - 1
        (shown,) = sequential.items_before(log, np.array([user]), position, size).tolist()
        assert shown == ([0] * size + items[:-1])[-size:]


@pytest.mark.parametrize("name", MODELS)
def test_states_do_not_see_later_items(name):
    """Changing items from position 5 on changes no state before it; states after it do change."""
    model = MODELS[name](BaselineConfig(**SMALL), 50, 3).eval()
    items, users = torch.randint(1, 51, (2, 8)), torch.tensor([0, 2])
    other = torch.cat([items[:, :5], items[:, 5:] % 50 + 1], 1)
    with torch.no_grad():
        a, b = model(items, users), model(other, users)
        assert model(torch.zeros(1, 8, dtype=torch.long), users[:1]).isfinite().all()
    assert torch.allclose(a[:, :5], b[:, :5], atol=1e-6)
    assert not torch.allclose(a[:, 5:], b[:, 5:], atol=1e-3)


def test_sasrec_refuses_an_odd_width():
    with pytest.raises(ValueError, match="--hidden_size 33: "):
        MODELS["sasrec"](BaselineConfig(hidden_size=33), 5, 5)


def test_sampled_softmax_leaves_the_target_out_of_the_samples(monkeypatch):
    model = GRU4Rec(BaselineConfig(**SMALL), 6, 1).eval()
    windows, users = torch.tensor([[0, 1, 2, 3, 6]]), torch.tensor([0])
    generator, pool = torch.Generator().manual_seed(0), torch.arange(1, 7)
    full = step_loss(model, windows, users, pool, 0, generator)
    states = model(windows[:, :-1], users)[0, 1:]
    expected = F.cross_entropy(states @ model.items.weight[1:].T, windows[0, 2:] - 1)
    torch.testing.assert_close(full, expected)
    drawn = torch.tensor([2, 2, 2])  # item 3, the target of one position
    monkeypatch.setattr("torch.randint", lambda *args, **kwargs: drawn.clone())
    sampled = step_loss(model, windows, users, pool, 3, generator)
    own = (states @ model.items.weight[[2, 3, 6]].T).diagonal()  # rows predict 2, 3, 6
    three = states @ model.items.weight[3]
    rivals = [torch.stack([own[n], *[three[n]] * (0 if n == 1 else 3)]) for n in range(3)]
    losses = [row.logsumexp(0) - own[n] for n, row in enumerate(rivals)]
    torch.testing.assert_close(sampled, torch.stack(losses).mean())


@pytest.mark.parametrize("name", MODELS)
def test_a_simple_rule_is_learnt(name, circle):
    """Each puts it first nearly always; SASRec as a retriever gives the same scores."""
    log, splits = circle
    config = BaselineConfig(method=name, epochs=25, learning_rate=1e-2, patience=3, **SMALL)
    model, history = train(config, log, splits["val"], report=lambda line: None)
    test = splits["test"]
    scores = candidate_scores(model, test, config.max_items)
    assert ranking_metrics(scores, test.target)["hit_ratio@1"].mean() > 0.9
    assert history[0]["val_hit_ratio@1"] < history[-1]["val_hit_ratio@1"]
    for e, p in enumerate(test.position if name == "sasrec" else ()):
        retriever = sequential.SASRecRetriever(model, config.max_items)
        found = retriever.scores(log.item[log.start[log.user[p]] : p])[test.candidates[e]]
        np.testing.assert_allclose(found, scores[e], rtol=1e-4, atol=1e-5)


def test_the_best_epoch_is_kept_and_patience_ends_training(circle, monkeypatch):
    log, val = circle[0], circle[1]["val"]
    script, seen = iter([0.2, 0.5, 0.4, 0.5, 0.3, 0.9]), []

    def scripted(scores, target):
        assert target is val.target
        seen.append(scores)
        return {"hit_ratio@1": np.array([next(script)])}

    monkeypatch.setattr("studies.sequential.ranking_metrics", scripted)
    config = BaselineConfig(method="gru4rec", epochs=20, patience=3, **SMALL)
    model, history = train(config, log, val, report=lambda line: None)
    assert [h["val_hit_ratio@1"] for h in history] == [0.2, 0.5, 0.4, 0.5, 0.3]
    assert (candidate_scores(model, val, config.max_items) == seen[1]).all()


def test_the_command_stops_by_validation_and_tests_once(tmp_path, monkeypatch):
    data = planted.DEFAULTS | {"planted_users": 100, "prepared_dir": str(tmp_path / "p")}
    data |= {"epochs": 3, "hidden_size": 16, "num_layers": 1, "dataset": "planted"}
    flags = [f"--{name}={value}" for name, value in data.items()]
    monkeypatch.setattr(sys, "argv", ["sequential", *flags, f"--output_dir={tmp_path / 'out'}"])
    sequential.main()
    config = BaselineConfig(**data)
    prepared = prepare(config)
    val, test = prepared.splits["val"], prepared.splits["test"]
    by_val, by_test = (train(config, prepared.interactions, s, report=id)[1] for s in (val, test))
    metrics = json.loads((tmp_path / "out/eval/metrics.json").read_text())
    assert metrics["history"] == by_val != by_test and metrics["n"] == len(test)
    assert {"hit_ratio@1_ci95", "valid_ratio", "ranking/ndcg@5", "baselines"} <= metrics.keys()
    for kind in ("popularity", "retrieved"):  # and on the other lists, for the report
        file = tmp_path / "out/probes/sasrec" / kind / "metrics.json"
        assert json.loads(file.read_text())["data_hash"] == metrics["data_hash"] == prepared.hash
