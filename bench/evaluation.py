"""Evaluation from one forward pass, and the ways that take more: milliseconds per prompt.

    python -m bench.evaluation

one pass       the 20 candidates on one tree: the ranking, and the greedy answer if it is listed
20 sequences   a full sequence per candidate, scored rows only: the ranking alone
generate       our greedy decoding with a KV cache, as many tokens as a title has: the answer alone
transformers   its generate on the same weights, if installed: 128 tokens, as the authors run it

Weights and ids are random, so that answers mean nothing; that the ways agree is tested
(tests/test_eval.py, tests/test_gpu.py).
"""

from collections.abc import Callable
from functools import partial

import torch

from bench.harness import Sizes, make_batch, make_model, medians, run
from bench.step import PEER, transformers_model
from common import parse_config
from data import NUM_CANDIDATES, build_tree
from model import generate


@torch.no_grad()
def one_pass(model, prompts: list, candidates: list) -> torch.Tensor:
    """(B, N) log-probs of the candidates."""
    tree = build_tree(prompts, candidates).to(model.inv_freq.device)
    return tree.sum_logps(model(tree)[0]).cpu()


def sequences(model, prompts: list, candidates: list) -> torch.Tensor:
    """The same, with each candidate after its own copy of the prompt."""
    rows = []
    for prompt, titles in zip(prompts, candidates, strict=True):
        rows.append(one_pass(model, [prompt] * len(titles), [[title] for title in titles])[:, 0])
    return torch.stack(rows)


def all_ways(sizes: Sizes, model) -> dict[str, Callable]:
    """Map the name of each way to a function that answers all prompts."""
    batch = make_batch(sizes, NUM_CANDIDATES)
    ways = {"one pass": partial(one_pass, model.eval(), *batch)}
    ways["20 sequences"] = partial(sequences, model, *batch)
    ways["generate"] = partial(generate, model, batch[0], sizes.completion, [])
    if PEER:
        ids = torch.tensor(batch[0], device=sizes.device)
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        decode = partial(transformers_model(model).eval().generate, ids, **settings)
        ways["transformers"] = partial(
            decode, attention_mask=torch.ones_like(ids), max_new_tokens=128
        )
    return ways


def measure(sizes: Sizes) -> str:
    seconds = medians(all_ways(sizes, make_model(sizes)), sizes.seconds)
    each = {name: 1000 * s / sizes.prompts for name, s in seconds.items()}
    return "; ".join(f"{name} {ms:.1f} ms a prompt" for name, ms in each.items())


def figures(sizes: Sizes) -> dict[str, Callable[[], str]]:
    return {"evaluation": partial(measure, sizes)}


if __name__ == "__main__":
    run(figures, "Evaluation", parse_config(Sizes))
