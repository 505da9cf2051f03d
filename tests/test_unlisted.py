"""Prompts without the list: the candidates are branches of the tree, and nowhere else."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import recommend
import train
from data import ALL_TEMPLATES, Example, encode_examples, render_prompt
from demo.pretrain import titles_base
from eval import evaluate
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, prepare
from model import load_pretrained
from studies import two_stage
from studies.two_stage import title_scores

CONFIG = DataConfig(planted_users=80, followers=3, min_history=4, list_in_prompt=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Prepared examples, and a fresh base with a token for each title, drawn at random."""
    folder = tmp_path_factory.mktemp("unlisted")
    prepared = prepare(replace(CONFIG, prepared_dir=str(folder)))
    base = titles_base(prepared.interactions, folder, practised=False, dry_run=False)
    return prepared, base


@pytest.mark.parametrize("template", range(len(ALL_TEMPLATES)))
@pytest.mark.parametrize("rating", [4.0, float("nan")])
def test_no_candidate_and_no_word_of_a_list_stands_in_the_prompt(template, rating):
    listed = ["Emma", "Hamlet"]
    example = Example(
        ("books", "read", "read"), "u", [("Ulysses", rating)], listed, 0, [], template
    )
    text = render_prompt(replace(example, list_in_prompt=False))
    assert "Ulysses" in text and text.endswith("\nAnswer:")
    assert not any(word in text for word in [*listed, "following", "list", "candidates", "<", "|>"])
    assert render_prompt(example).replace("Emma\nHamlet\n", "").count("\n") == text.count("\n")


def test_the_examples_are_those_of_the_form_with_the_list(world):
    """One hash, so runs of both forms stand in one table; their tokens are kept apart."""
    prepared, base = world
    other = prepare(replace(CONFIG, prepared_dir=str(prepared.folder.parent), list_in_prompt=True))
    assert other.hash == prepared.hash and other.folder == prepared.folder
    lengths = [
        len(encode_examples(p.splits["test"], Tokenizer(base), 512).prompts[0])
        for p in (prepared, other)
    ]
    assert lengths[1] > lengths[0] + 20


def test_answers_are_decoded_along_the_candidates(world):
    """The best token of a listed title is the answer; what would be written freely is counted."""
    prepared, base = world
    metrics, records = evaluate(load_pretrained(base), Tokenizer(base), prepared.splits["test"])
    assert metrics["valid_ratio"] == 1.0 and metrics["hit_ratio@1"] > 0
    free = [r["free"] == r["target_slot"] for r in records]
    assert metrics["free/hit_ratio@1"] == np.mean(free)
    _, generated = evaluate(
        load_pretrained(base), Tokenizer(base), prepared.splits["test"], decode="generate"
    )
    written = [r["hit"] for r in generated]
    assert written == free


def test_the_whole_catalogue_is_ranked_by_one_position(world):
    """By the log-probs that a tree gives each title; a spelled title's are summed."""
    prepared, base = world
    model, tokenizer = load_pretrained(base), Tokenizer(base)
    encoded = encode_examples(prepared.splits["test"], tokenizer, 512)
    titles = [*prepared.interactions.titles[:30], "No Such Title"]
    completions = tokenizer.encode_completions(titles)
    found = title_scores(model, completions, encoded.prompts[:3])
    for prompt, scores in zip(encoded.prompts[:3], found, strict=True):
        whole = [[*prompt.tolist(), *ids][:-1] for ids in completions]
        for ids, title, score in zip(whole, completions, scores, strict=True):
            logps = model.logits(torch.tensor([ids]))[0, len(prompt) - 1 :].log_softmax(1)
            counted = title if len(title) > 2 else title[:1]
            expected = sum(logps[n, token].item() for n, token in enumerate(counted))
            assert score == pytest.approx(expected, abs=1e-4)
    spelled = tokenizer.encode_completions([f"No Such Title {n}" for n in range(101)])
    with pytest.raises(ValueError, match="a token for each title"):
        next(title_scores(model, spelled, encoded.prompts[:1]))


def test_a_run_without_the_list_ranks_and_recommends_from_the_catalogue(tmp_path, in_process):
    """train.py, two-stage figures by the model alone, and lists for all users."""
    run, kept = tmp_path / "run", f"--prepared_dir={tmp_path / 'prepared'}"
    data = ("--planted_users=80", "--train_size=64", "--test_size=40", kept)
    steps = ("--max_steps=2", "--batch_size=8", "--keep=last", f"--output_dir={run}")
    in_process(train.main, "--model=titles", *data, *steps, "--stages=sft,recpo")
    assert "HR@1 trie" in (run / "results.md").read_text()
    stage = (f"--run={run}", "--stage=sft", kept, "--retriever=model")
    assert not train.defaults({"model": str(run / "sft")})["list_in_prompt"]  # kept
    in_process(two_stage.main, *stage)
    places = json.loads((run / "two_stage" / "sft" / "model.json").read_text())["places"]
    options = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(options | {"list_in_prompt": True}))
    with pytest.raises(ValueError, match="a model trained with --no_list_in_prompt"):
        in_process(two_stage.main, *stage)  # a list would give the target away
    (run / "config.json").write_text(json.dumps(options))
    far = np.array(places["retriever"]) > 20  # its own 20 best are only ordered anew
    np.testing.assert_array_equal(np.array(places["model"]) > 20, far)
    output = tmp_path / "lists.jsonl"
    in_process(recommend.main, *stage, "--users=all", f"--output={output}", "--top_k=20")
    lists = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lists) == 80
    for made in lists:
        assert {item["retrieved"] for item in made["items"]} == {*range(1, 21)}
