"""Evaluation: what the model would answer, and how it ranks the candidates, from one forward pass.

All 20 candidates hang on one PromptTree. Greedy decoding would write candidate c, and then stop,
exactly if each of c's tokens is the argmax at its row and the argmax after the last one ends the
answer (a stop id, or spaces and a line break). So the answer, its validity, and the exact ranking
of the 20 come from one pass. Prompts where no candidate verifies are decoded for real, since
another spelling of a title is possible and the text is wanted.

    python eval.py --run runs/planted-1              every stage of a run, as train.py evaluates it
    python eval.py --model DIR --adapter DIR ...     a Hugging Face directory, a PEFT adapter

hit_ratio@1 counts exact title matches over *all* cases, valid_ratio the answers that are a
listed title; ranking/* are computed from the log-probabilities of all candidates (always
"valid"). Ties share their ranks.

Left out: tables over several runs. Legend: E examples, N = 20 candidates, M scored tokens.
"""

import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import (
    arg,
    parse_config,
    run_cli,
    setup_distributed,
)
from data import (
    NUM_CANDIDATES,
    Encoded,
    Examples,
    PromptTree,
    encode_examples,
    tree_widths,
)
from hub.tokenizer import Tokenizer
from loaders.frozen import Prepared, encode_split, prepare
from model import Transformer, generate
from runtime.passes import planned, prefetch, progress, rounds
from runtime.policy import free_memory
from runtime.sources import (
    SourceConfig,
    check_run_data,
    data_of_a_model,
    load_source,
    sources_of,
    with_run_options,
)
from runtime.stages import save_predictions


def ranking_metrics(
    scores: np.ndarray,  # (E, n), higher is better
    target: np.ndarray,  # (E,) slot of the chosen item
) -> dict[str, np.ndarray]:
    """hit_ratio@k, ndcg@5 and mrr, (E,) float64 each, of the target's rank among n candidates.

    Ties are shared: the target's rank is uniform over the candidates of equal score, and each
    metric is the mean over these ranks. So a recommender whose scores are all equal gets exactly
    what chance gets. ValueError on NaN, which compares as if it were neither better nor worse."""
    scores, target = np.asarray(scores), np.asarray(target)
    if np.isnan(scores).any():
        bad = np.flatnonzero(np.isnan(scores).any(1))
        raise ValueError(
            f"{len(bad)} of {len(scores)} examples have a score that is not a number, "
            f"first {bad[0]}"
        )
    own = np.take_along_axis(scores, target[:, None], 1)
    better = (scores > own).sum(1, keepdims=True)
    tied = (scores == own).sum(1, keepdims=True)  # at least 1: the target itself
    rank = np.arange(1, scores.shape[1] + 1)
    possible = (better < rank) & (rank <= better + tied)  # (E, n) over ranks
    gains = {f"hit_ratio@{k}": rank <= k for k in (1, 3, 5)}
    gains["ndcg@5"] = (rank <= 5) / np.log2(1 + rank)  # one relevant item: the ideal DCG is 1
    gains["mrr"] = 1 / rank
    return {name: (possible * gain).sum(1) / tied[:, 0] for name, gain in gains.items()}


NEAR_TIE = 1e-3  # logits closer than this may swap between two exact ways of computing them


@dataclass(frozen=True)
class EvalConfig(SourceConfig):
    """Evaluate a run folder, a Hugging Face directory or a PEFT adapter."""

    split: str = arg("test", "val or test", choices=("val", "test"))
    decode: str = arg(
        "greedy",
        "greedy (one pass), generate (the long way, compared with it), "
        "trie (always a listed title)",
        group="how",
        choices=("greedy", "generate", "trie"),
    )
    decode_rest: bool = arg(
        True, "generate an answer where no candidate verifies; off: count it invalid"
    )
    micro_batch_tokens: int = arg(8192, "padded tokens of one forward pass", at_least=1)
    show_prompts: int = arg(
        0, "print so many prompts as the model reads them, with their answers, and stop", at_least=0
    )
    output_dir: str = arg(
        "", "where metrics.json and predictions.jsonl of each stage go; empty = only print"
    )


def verified_branch(tree: PromptTree, greedy_ids: Tensor, end_ids: Tensor) -> Tensor:
    """(B,) the completion that greedy decoding would write, or -1:
    all its tokens are argmaxes, and then it ends."""
    is_last = torch.ones_like(tree.sequence_ids, dtype=torch.bool)
    is_last[:-1] = tree.sequence_ids[1:] != tree.sequence_ids[:-1]
    agrees = torch.where(is_last, torch.isin(greedy_ids, end_ids), greedy_ids == tree.labels)
    misses = tree.sum_logps((~agrees).float())  # (B, N)
    return torch.where((misses == 0).any(1), (misses == 0).float().argmax(1), -1)


def trie_walk(completions: list[list[int]], token_logps: list[list[float]]) -> int:
    """Greedy decoding restricted to the candidates: at each node the likeliest listed token;
    the first of equals."""
    alive, depth = list(range(len(completions))), 0
    while len(alive) > 1:
        best = max(alive, key=lambda n: (token_logps[n][depth], -n))
        alive = [n for n in alive if completions[n][depth] == completions[best][depth]]
        depth += 1
    return alive[0]


def canonical(title: str) -> str:
    return unicodedata.normalize("NFC", " ".join(title.split()))


def match_title(answer: str, titles: list[str]) -> int:
    """Index of the title that the answer equals; only if none, once more without one final ".";
    -1 if still none."""
    titles = [canonical(t) for t in titles]
    for text in (canonical(answer), canonical(answer.removesuffix("."))):
        if text in titles:
            return titles.index(text)
    return -1


DUMMY = [0]  # the example that a rank without work runs; nothing is recorded of it


@torch.no_grad()
def predict(
    model: Transformer,
    tokenizer: Tokenizer,
    encoded: Encoded,
    indices,  # the examples of this rank
    decode: str = "greedy",
    decode_rest: bool = True,
    micro_batch_tokens: int = 8192,
    any_rank: Callable[[bool], bool] = bool,
    device="cpu",
    what: str = "evaluation",  # the name of its progress bar
) -> list[dict]:
    """One record per example: answer, hit, valid, how it was found, every candidate's log-prob."""
    all_slots = np.tile(np.arange(NUM_CANDIDATES), (len(encoded.prompts), 1))
    widths = tree_widths(encoded, all_slots)
    stop_ids = tokenizer.stop_ids | tokenizer.newline_ids()
    end_ids = torch.tensor(sorted(stop_ids), device=device)
    records: dict[int, dict] = {}
    batches = planned(widths, indices, micro_batch_tokens)
    trees = prefetch(lambda batch: encoded.tree(batch, all_slots).to(device), batches)
    for batch in progress(rounds(batches, any_rank), what, len(batches)):
        if batch:
            tree = next(trees)
        else:
            tree = encoded.tree(DUMMY, all_slots).to(device)
        token_logps, greedy_ids = model(tree)
        logps = tree.sum_logps(token_logps).cpu()
        verified = verified_branch(tree, greedy_ids, end_ids).cpu()
        per_token = iter(token_logps.tolist() if decode == "trie" else ())
        for b, e in enumerate(batch):
            slot, how = int(verified[b]), "verified"
            if decode == "trie":
                completions = encoded.slots(e, all_slots[e])
                branches = [list(islice(per_token, len(ids))) for ids in completions]
                slot, how = trie_walk(completions, branches), "trie"
            records[e] = _record(encoded.examples, e, slot, how, logps[b].tolist())

    rest = sorted(records)
    if decode != "generate":
        rest = [e for e in rest if decode_rest and records[e]["answer"] is None]
    longest = max(map(len, encoded.completions.values()))
    batches = planned(widths, rest, micro_batch_tokens)
    for batch in progress(rounds(batches, any_rank), f"{what}, written out", len(batches)):
        prompts = [encoded.prompts[e].tolist() for e in batch or DUMMY]
        # twice the longest title: another spelling takes more tokens than the usual one
        outputs = generate(model, prompts, 2 * longest, stop_ids, any_rank)
        for e, ids in zip(batch, outputs, strict=False):  # a dummy's output belongs to nobody
            answer = tokenizer.answer(ids)
            slot = match_title(answer, encoded.examples[e].candidates)
            logps, one_pass = records[e]["logps"], records[e]["answer"]
            record = _record(encoded.examples, e, slot, "generated", logps, answer)
            records[e] = record | {"one_pass": one_pass, "ids": ids}
    return [records[e] for e in sorted(records)]


def _record(
    examples: Examples, e: int, slot: int, how: str, logps: list[float], answer: str | None = None
) -> dict:
    example = examples[e]
    titles, target = example.candidates, example.target
    return {
        "example": e,
        "user": example.user,
        "target": titles[target],
        "answer": titles[slot] if slot >= 0 else answer,
        "valid": slot >= 0,
        "hit": slot == target,
        "how": how if slot >= 0 or answer is not None else "none",
        "logps": logps,
        "candidates": titles,
        "target_slot": target,
    }


def wilson(mean: float, n: int) -> list[float]:
    """95 % interval of a share of n cases (Wilson's score interval)."""
    z = 1.96
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def summarise(records: list[dict], baselines: dict[str, np.ndarray] | None = None) -> dict:
    """Metrics over all records, each with its 95 % interval under `<name>_ci95`;
    baselines: name -> scores (E, N)."""
    n = len(records)
    metrics: dict = {"n": n}

    def put(name: str, values) -> None:
        values = np.asarray(values, float)
        metrics[name] = float(values.mean())
        is_share = ((values == 0) | (values == 1)).all()
        half = 1.96 * values.std() / math.sqrt(n)
        interval = [values.mean() - half, values.mean() + half]
        metrics[f"{name}_ci95"] = wilson(values.mean(), n) if is_share else interval

    put("hit_ratio@1", [r["hit"] for r in records])
    put("valid_ratio", [r["valid"] for r in records])
    valid = [r["hit"] for r in records if r["valid"]]
    metrics["hit_ratio@1|valid"] = float(np.mean(valid)) if valid else 0.0
    targets = np.array([r["target_slot"] for r in records])
    logps = np.array([r["logps"] for r in records])
    for name, values in ranking_metrics(logps, targets).items():
        put(f"ranking/{name}", values)
    written = [r["how"] == "generated" and r.get("one_pass") is None for r in records]
    metrics["answers_generated"] = sum(written)
    metrics["baselines"] = {"chance": 1 / NUM_CANDIDATES}
    for name, scores in (baselines or {}).items():
        metrics["baselines"][name] = float(ranking_metrics(scores, targets)["hit_ratio@1"].mean())
    return metrics


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: Examples,
    decode: str = "greedy",
    decode_rest: bool = True,
    max_length: int = 1024,
    micro_batch_tokens: int = 8192,
    encoded: Encoded | None = None,  # the examples' tokens, where they are at hand
    baselines: dict[str, np.ndarray] | None = None,  # name -> scores (E, N), to stand beside
) -> tuple[dict, list[dict]]:
    """Score the given examples in this process: (metrics, predictions).

    train.py splits them over ranks instead."""
    encoded = encoded or encode_examples(examples, tokenizer, max_length)
    training = model.training
    model.eval()
    device = model.inv_freq.device
    indices = range(len(examples))
    options = (decode, decode_rest, micro_batch_tokens)
    records = predict(model, tokenizer, encoded, indices, *options, device=device)
    model.train(training)
    metrics = summarise(records, baselines)
    if decode == "generate":
        stop_ids = tokenizer.stop_ids | tokenizer.newline_ids()
        metrics |= compare_with_one_pass(model, encoded, records, stop_ids)
    return metrics, records


@torch.no_grad()
def compare_with_one_pass(
    model: Transformer, encoded: Encoded, records: list[dict], stop_ids
) -> dict:
    """How often free generation and the one pass differ, and how many of those are near-ties.

    They differ in the title, or where generation spelt a candidate that the one pass did not
    verify. A near-tie: somewhere along the answer the two best logits are closer than NEAR_TIE."""

    def differs(r: dict) -> bool:
        if r["one_pass"] is not None:
            return r["one_pass"] != r["answer"]
        ended = len(r["ids"]) > 1 and r["ids"][-1] in stop_ids
        spellings = [c[:-1] for c in encoded.slots(r["example"], range(NUM_CANDIDATES))]
        return ended and r["ids"][:-1] in spellings

    differing = [r for r in records if differs(r)]
    near = 0
    for r in differing:
        prompt = encoded.prompts[r["example"]].tolist()
        sequence = torch.tensor([prompt + r["ids"][:-1]], device=model.inv_freq.device)
        logits = model.logits(sequence)[0, len(prompt) - 1 :]
        best = logits.topk(2, dim=-1).values
        near += bool((best[:, 0] - best[:, 1]).min() < NEAR_TIE)
    return {"one_pass_differs": len(differing), "one_pass_near_ties": near}


def table_rows(name: str, metrics: dict) -> str:
    low, high = metrics["hit_ratio@1_ci95"]
    ranked_low, ranked_high = metrics["ranking/hit_ratio@1_ci95"]
    return (
        f"| {name} | {metrics['hit_ratio@1']:.4f} [{low:.3f}, {high:.3f}] "
        f"| {metrics['valid_ratio']:.4f} "
        f"| {metrics['ranking/hit_ratio@1']:.4f} [{ranked_low:.3f}, {ranked_high:.3f}] "
        f"| {metrics['ranking/ndcg@5']:.4f} | {metrics['ranking/mrr']:.4f} |"
    )


def results_table(rows: dict[str, dict], bounds: dict[str, float] | None = None) -> str:
    """Markdown: chance and counting baselines, the given rows (name -> metrics),
    then known upper bounds."""
    some = next(iter(rows.values()))
    lines = [
        f"n = {some['n']} users, one correct title among {NUM_CANDIDATES}; "
        "greedy = exact title written, ranking = best log-probability of the 20; [95 % interval]",
        "",
        "| method | HR@1 greedy | ValidRatio | HR@1 ranking | NDCG@5 | MRR |",
        "|---|---|---|---|---|---|",
    ]
    for name, value in some["baselines"].items():
        low, high = wilson(value, some["n"])
        interval = "" if name == "chance" else f" [{low:.3f}, {high:.3f}]"
        lines.append(f"| {name} | | | {value:.4f}{interval} | | |")
    lines += [table_rows(name, metrics) for name, metrics in rows.items()]
    lines += [f"| {name} | | | {value:.4f} | | |" for name, value in (bounds or {}).items()]
    written = ", ".join(f"{name} {metrics['answers_generated']}" for name, metrics in rows.items())
    lines += [
        "",
        "answers written out token by token, because no candidate verified in the one pass: "
        f"{written}",
    ]
    return "\n".join(lines)


def show_prompts(config: EvalConfig, prepared: Prepared, base: Path) -> None:
    """The first prompts of the split and their answers, as text of the ids that the model reads."""
    tokenizer = Tokenizer(base, config.prompt_format)
    examples = prepared.splits[config.split].select(slice(config.show_prompts))
    encoded = encode_examples(examples, tokenizer, config.max_length)
    for e, prompt in enumerate(encoded.prompts):
        (answer,) = encoded.slots(e, [examples.target[e]])
        text, title = (
            tokenizer.inner.decode(i, skip_special_tokens=False) for i in (prompt, answer)
        )
        print(f"--- user {examples[e].user}, {len(prompt)} tokens\n{text}\n--- answer\n{title}\n")


def main() -> None:
    config = with_run_options(parse_config(EvalConfig, beneath=data_of_a_model))
    _, _, device = setup_distributed()
    sources, prepared = sources_of(config), prepare(config)
    check_run_data(config, sources, prepared.hash)
    if config.show_prompts:
        show_prompts(config, prepared, list(sources.values())[-1][0])
        return
    rows = {}
    for name, source in sources.items():
        model, tokenizer = load_source(config, source, device)
        options = (config.decode, config.decode_rest, config.max_length, config.micro_batch_tokens)
        encoded = encode_split(prepared, config.split, tokenizer, config.max_length)
        known = (encoded, prepared.baselines(config.split))
        metrics, records = evaluate(model, tokenizer, encoded.examples, *options, *known)
        del model
        free_memory()  # before the next one is loaded
        metrics |= {"data_hash": prepared.hash, "decode": config.decode, "split": config.split}
        rows[name] = metrics
        if config.output_dir:
            save_predictions(Path(config.output_dir) / name, metrics, records)
        if config.decode == "generate":
            print(
                f"{name}: one pass and generation differ on {metrics['one_pass_differs']} "
                f"of {metrics['n']} answers, {metrics['one_pass_near_ties']} of them near-ties "
                f"(two best logits within {NEAR_TIE})"
            )
    print(
        f"\n{config.dataset}, {config.split} split, "
        f"data {prepared.hash[:12]}, decode {config.decode}\n"
    )
    print(results_table(rows))


if __name__ == "__main__":
    run_cli(main)
