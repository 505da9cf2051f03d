"""GRU4Rec, Caser and SASRec: what they see, what they learn, and that test data stays out."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from launch import run_script

from data import Interactions, build_examples
from loaders.frozen import DataConfig, prepare
from loaders.table import make_interactions
from studies.retrievers import sasrec_config
from studies.sequential import (
    NEURAL,
    BaselineConfig,
    Caser,
    GRU4Rec,
    SASRec,
    candidate_scores,
    hit_ratio,
    shown_items,
    step_loss,
    train,
    training_windows,
    weights_file,
)

MODELS = {"gru4rec": GRU4Rec, "caser": Caser, "sasrec": SASRec}
SMALL = {"hidden_size": 32, "max_items": 8, "num_sampled": 30, "batch_size": 32, "dropout": 0.1}


def log_of(sequences: list[list[int]]) -> Interactions:
    rows = [
        (user, item, 5.0, t) for user, items in enumerate(sequences) for t, item in enumerate(items)
    ]
    return make_interactions(*zip(*rows, strict=True), {i: f"item {i}" for i in range(1000)})


def cyclic_log(num_users: int = 150, num_items: int = 60) -> Interactions:
    """Every user walks around the circle of items, one step at a time, from a place of his own."""
    starts = np.random.default_rng(0).integers((0, 10), (num_items, 25), (num_users, 2)).tolist()
    return log_of([[(start + t) % num_items for t in range(length)] for start, length in starts])


@pytest.mark.parametrize("size", [3, 8, 50])
def test_every_item_is_predicted_once_and_the_last_two_never(size):
    """Windows cover all but a user's first item, each once, with what came before it,
    and nothing of validation or test."""
    rng = np.random.default_rng(size)
    sequences = [rng.permutation(40)[: rng.integers(1, 30)].tolist() for _ in range(30)]
    interactions = log_of(sequences)
    windows, users = training_windows(interactions, size)
    code = {int(interactions.item_ids[c]): c for c in range(interactions.num_items)}
    for user, items in enumerate(sequences):
        predicted = []
        for row in windows[users == user]:
            shown = [(int(a), int(b)) for a, b in zip(row[:-1], row[1:], strict=True) if a and b]
            predicted += shown
        expected = [
            (code[a] + 1, code[b] + 1) for a, b in zip(items[:-2], items[1:-2], strict=False)
        ]
        assert sorted(predicted) == sorted(expected)


def test_a_test_case_shows_what_lies_before_it():
    """The last items before the position, filled from the right, of this user alone."""
    interactions = log_of([list(range(30)), list(range(40, 65)), list(range(60, 80))])
    examples = build_examples(interactions, DataConfig(followers=2, min_history=2))["test"]
    items, users = shown_items(examples, 12)
    for e, p in enumerate(examples.position.tolist()):
        start = int(interactions.start[interactions.user[p]])
        expected = (interactions.item[max(start, p - 12) : p] + 1).tolist()
        assert (
            items[e].tolist() == [0] * (12 - len(expected)) + expected
            and users[e] == interactions.user[p]
        )


def test_a_model_can_see_exactly_what_a_prompt_shows():
    """--max_items 0 takes --history:
    a model then reads the items of the prompt, no more and no fewer."""
    interactions = log_of([list(range(30)), list(range(40, 65)), list(range(60, 68))])
    config = BaselineConfig(max_items=0, history=12, followers=2, min_history=2)
    examples = build_examples(interactions, config)["test"]
    items, _ = shown_items(examples, config.num_shown)
    for e in range(len(examples)):
        rows = examples.history_rows(e)
        assert items[e][items[e] > 0].tolist() == (interactions.item[list(rows)] + 1).tolist()
    assert SASRec(config, 50, 3).positions.num_embeddings == 12
    assert BaselineConfig().num_shown == 50
    with pytest.raises(ValueError, match="max_items must be >= 0"):
        BaselineConfig(max_items=-1)
    with pytest.raises(ValueError, match="history_items positive hides them"):
        BaselineConfig(max_items=0, history_items="positive")


@pytest.mark.parametrize("name", NEURAL)
def test_states_do_not_see_later_items(name):
    """Changing items from position 5 on changes no state before it; states after it do change."""
    model = MODELS[name](BaselineConfig(**SMALL), 50, 3).eval()
    items = torch.randint(1, 51, (2, 8))
    other = items.clone()
    other[:, 5:] = items[:, 5:] % 50 + 1
    users = torch.tensor([0, 2])
    with torch.no_grad():
        a, b = model(items, users), model(other, users)
    assert torch.allclose(a[:, :5], b[:, :5], atol=1e-6) and not torch.allclose(
        a[:, 5:], b[:, 5:], atol=1e-3
    )
    with torch.no_grad():
        assert model(torch.zeros(1, 8, dtype=torch.long), users[:1]).isfinite().all()


def test_sampled_softmax_leaves_the_target_out_of_the_samples(monkeypatch):
    """Without samples it is the full cross-entropy;
    a target drawn by chance does not compete with itself."""
    model = GRU4Rec(BaselineConfig(**SMALL), 6, 1).eval()
    windows, users, generator = (
        torch.tensor([[0, 1, 2, 3, 6]]),
        torch.tensor([0]),
        torch.Generator().manual_seed(0),
    )
    full = step_loss(model, windows, users, 0, generator)
    states = model(windows[:, :-1], users)[0, 1:]
    expected = torch.nn.functional.cross_entropy(
        states @ model.items.weight[1:].T, windows[0, 2:] - 1
    )
    torch.testing.assert_close(full, expected)
    targets = torch.tensor([3, 3, 3])  # the target of one position
    monkeypatch.setattr("torch.randint", lambda *args, **kwargs: targets.clone())
    sampled = step_loss(model, windows, users, 3, generator)
    logits = states @ model.items.weight[[2, 3, 6]].T  # rows predict 2, 3, 6
    own, three = logits.diagonal(), states @ model.items.weight[3]
    against = [
        torch.stack([own[n], *[three[n]] * (0 if n == 1 else 3)]).logsumexp(0) - own[n]
        for n in range(3)
    ]
    torch.testing.assert_close(sampled, torch.stack(against).mean())


@pytest.mark.parametrize("name", NEURAL)
def test_a_simple_rule_is_learnt(name):
    """On a log where the next item follows from the last one,
    each puts it first among 20 nearly always."""
    interactions = cyclic_log()
    splits = build_examples(interactions, DataConfig(followers=2, min_history=2))
    config = BaselineConfig(method=name, epochs=25, learning_rate=1e-2, patience=5, **SMALL)
    model, history = train(config, interactions, splits["val"], report=lambda line: None)
    assert (
        hit_ratio(candidate_scores(model, splits["test"], config.max_items), splits["test"]) > 0.9
    )
    assert history[0]["val_hit_ratio@1"] < history[-1]["val_hit_ratio@1"]


def test_the_best_epoch_is_kept_and_patience_ends_training(monkeypatch):
    """Validation alone decides: the weights are those of its best epoch,
    and `patience` worse ones end it."""
    interactions = cyclic_log(60)
    splits = build_examples(interactions, DataConfig(followers=2, min_history=2))
    script, seen = iter([0.2, 0.5, 0.4, 0.3, 0.3, 0.9]), []

    def scripted(scores, examples):
        assert examples is splits["val"]
        seen.append(scores)
        return next(script)

    monkeypatch.setattr("studies.sequential.hit_ratio", scripted)
    config = BaselineConfig(method="gru4rec", epochs=20, patience=3, **SMALL)
    model, history = train(config, interactions, splits["val"], report=lambda line: None)
    assert [h["val_hit_ratio@1"] for h in history] == [0.2, 0.5, 0.4, 0.3, 0.3]
    assert (candidate_scores(model, splits["val"], config.max_items) == seen[1]).all()


def test_the_retriever_reads_the_weights_of_the_command(tmp_path):
    """With the usual options, whatever was tested and wherever results went, for prompts of other
    kinds, too; not with other options, and not for another log or other validation lists."""
    data = {"dataset": "planted", "planted_users": 60, "followers": 3, "prepared_dir": tmp_path}
    config = sasrec_config(DataConfig(**data))
    made = prepare(config)
    usual = weights_file(config, made)
    command = BaselineConfig(method="sasrec", lists=True, output_dir="runs/sasrec", **data)
    assert weights_file(command, made) == usual
    assert weights_file(replace(command, epochs=3), made) != usual

    fewer = replace(config, train_size=20)  # prompts of training, which SASRec does not read
    assert prepare(fewer).hash != made.hash and weights_file(fewer, prepare(fewer)) == usual
    for other in (replace(config, planted_users=61), replace(config, data_seed=1)):
        assert weights_file(other, prepare(other)) != usual


@pytest.mark.parametrize("method", ["sasrec", "markov", "random"])
def test_the_command_writes_what_a_stage_writes(method, tmp_path):
    """metrics.json and predictions.jsonl with the keys of a trained stage,
    the same candidates and data hash."""
    flags = [
        "--planted_users=100",
        "--followers=3",
        "--epochs=2",
        f"--prepared_dir={tmp_path / 'p'}",
        f"--output_dir={tmp_path / 'out'}",
    ]
    done = run_script("studies.sequential", f"--method={method}", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((tmp_path / "out/eval/metrics.json").read_text())
    records = [
        json.loads(line)
        for line in (tmp_path / "out/eval/predictions.jsonl").read_text().splitlines()
    ]
    assert {
        "hit_ratio@1",
        "hit_ratio@1_ci95",
        "valid_ratio",
        "ranking/ndcg@5",
        "data_hash",
        "baselines",
    } <= metrics.keys()
    assert metrics["n"] == len(records) and all(
        len(r["logps"]) == len(r["candidates"]) == 20 for r in records
    )
    kept = list((tmp_path / "p").glob("sasrec-*.safetensors"))
    assert len(kept) == (method == "sasrec")  # for studies/retrievers.py
    if method == "markov":
        assert metrics["ranking/hit_ratio@1"] == pytest.approx(metrics["baselines"]["Markov"])
