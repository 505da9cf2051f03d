"""Evaluation: what the model would answer, and how it ranks the candidates, from one forward pass.

All 20 candidates branch off one PromptTree. Greedy decoding would write candidate c, and then stop,
exactly if each of c's tokens is the argmax at its row and the argmax after the last one ends the
answer (a stop id, or spaces and a line break). So the answer, its validity, and the exact ranking
of the 20 come from one pass. If no candidate verifies, the prompt is decoded: a title may be spelt
in other tokens. If prompts do not show the list, answers are decoded along its trie.

    python eval.py --run runs/planted-1              every stage of a run, as train.py evaluates it
    python eval.py --model DIR --adapter DIR ...     a Hugging Face directory, a PEFT adapter

Written: hit_ratio@1 is the share of *all* answers that equal the target's title, valid_ratio
the share that equal a listed title. Ranked first: ranking/*, by the log-probabilities of the 20.
Legend: E examples, N = 20 candidates.
"""

import math
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import arg, run_cli
from data import NUM_CANDIDATES, Encoded, Examples, PromptTree, encode_examples, tree_widths
from hub.tokenizer import Tokenizer
from loaders.counting import counting_baselines
from loaders.frozen import encode_split, prepare
from model import Transformer, generate
from runtime import sources
from runtime.policy import free_memory
from runtime.processes import planned, prefetch, progress, rounds, setup_distributed
from runtime.stages import save_predictions

ALL = range(NUM_CANDIDATES)  # slots
NEAR_TIE = 1e-3  # logits closer than this may swap between two exact ways of computing them


@dataclass(frozen=True)
class EvalConfig(sources.SourceConfig):
    """Evaluate a run folder, a Hugging Face directory or a PEFT adapter."""

    split: str = arg("test", "which examples", group="how", choices=("val", "test"))
    decode: str = arg(
        "greedy", "one pass, all generated, or listed only", choices=("greedy", "generate", "trie")
    )
    decode_rest: bool = arg(True, "generate if no candidate verifies; off: count it invalid")
    micro_batch_tokens: int = arg(8192, "padded tokens of one forward pass", at_least=1)
    show_prompts: int = arg(0, "only print this many prompts and their answers", at_least=0)
    output_dir: str = arg("", "for metrics.json and predictions.jsonl; empty = only print")


def verified_branch(tree: PromptTree, greedy_ids: Tensor, end_ids: Tensor) -> Tensor:
    """(B,) the completion whose tokens are all argmaxes and after which the answer ends, or -1."""
    is_last = tree.sequence_ids.diff(append=tree.sequence_ids.new_full((1,), -1)) != 0
    agrees = torch.where(is_last, torch.isin(greedy_ids, end_ids), greedy_ids == tree.labels)
    misses = tree.sum_logps((~agrees).float())  # (B, N)
    return torch.where((misses == 0).any(1), (misses == 0).float().argmax(1), -1)


def trie_walk(completions: list[list[int]], token_logps: Iterator[float]) -> int:
    """Decode greedily along the trie of candidates.
    At each node the likeliest token is taken, the first of equals."""
    logps = [list(islice(token_logps, len(ids))) for ids in completions]
    alive, depth = list(range(len(completions))), 0
    while len(alive) > 1:
        best = max(alive, key=lambda n: (logps[n][depth], -n))
        alive = [n for n in alive if completions[n][depth] == completions[best][depth]]
        depth += 1
    return alive[0]


def match_title(answer: str, titles: list[str]) -> int:
    """Index of the title that equals the answer, or the answer without one final "."; else -1.
    Letters are composed (NFC), and spaces are single."""
    texts = [*titles, answer, answer.removesuffix(".")]
    *titles, whole, cut = (unicodedata.normalize("NFC", " ".join(t.split())) for t in texts)
    return next((titles.index(text) for text in (whole, cut) if text in titles), -1)


def answered(example, slot: int, how: str, text: str | None = None) -> dict:
    """The answer's part of a record: the title of this slot, or the text if it is -1."""
    answer = example.candidates[slot] if slot >= 0 else text
    return {"answer": answer, "valid": slot >= 0, "hit": slot == example.target, "how": how}


# ------------------------------------------------------------------------ all examples
@torch.no_grad()
def predict(
    model: Transformer,
    tokenizer: Tokenizer,
    encoded: Encoded,
    indices,  # the examples of this rank
    decode: str = "greedy",
    decode_rest: bool = True,
    micro_batch_tokens: int = 8192,
    any_rank: Callable[[bool], bool] = bool,  # sharded: is it true on any rank? (see rounds)
) -> list[dict]:
    """One record per example: answer, hit, valid, how it was found, every candidate's log-prob."""
    device, records, nobody = model.inv_freq.device, {}, [0]  # a rank without work runs example 0
    slots = np.tile(ALL, (len(encoded.prompts), 1))
    widths = tree_widths(encoded, slots)
    if decode == "greedy" and not encoded.examples.list_in_prompt:
        decode = "trie"
    stop_ids = tokenizer.stop_ids | tokenizer.newline_ids()
    end_ids = torch.tensor(sorted(stop_ids), device=device)
    batches = planned(widths, indices, micro_batch_tokens)
    trees = prefetch(lambda batch: encoded.tree(batch, slots).to(device), batches)
    for batch in progress(rounds(batches, any_rank), "evaluation", len(batches)):
        tree = next(trees) if batch else encoded.tree(nobody, slots).to(device)
        token_logps, greedy_ids = model(tree)
        logps = tree.sum_logps(token_logps).tolist()
        free = verified_branch(tree, greedy_ids, end_ids).tolist()
        written, how = free, "verified"
        if decode == "trie":
            per_token, how = iter(token_logps.tolist()), "trie"
            written = [trie_walk(encoded.title_ids(e, ALL), per_token) for e in batch]
        for b, e in enumerate(batch):
            example, slot = encoded.examples[e], written[b]
            records[e] = {"example": e, "user": example.user, "logps": logps[b]}
            records[e] |= {"target": example.candidates[example.target]}
            records[e] |= {"target_slot": example.target, "candidates": example.candidates}
            records[e] |= answered(example, slot, how if slot >= 0 else "none")
            records[e] |= {"free": free[b]} if decode == "trie" else {}

    open_ones = [e for e in sorted(records) if records[e]["answer"] is None]
    rest = sorted(records) if decode == "generate" else (open_ones if decode_rest else [])
    batches = planned(widths, rest, micro_batch_tokens)
    for batch in progress(rounds(batches, any_rank), "answers written out", len(batches)):
        prompts = [encoded.prompts[e].tolist() for e in batch or nobody]
        longest = max(map(len, encoded.completions.values()))  # other spellings take more tokens
        outputs = generate(model, prompts, 2 * longest, stop_ids, any_rank)
        for e, ids in zip(batch, outputs, strict=False):
            example, text = encoded.examples[e], tokenizer.answer(ids)
            records[e] |= {"one_pass": records[e]["answer"], "ids": ids}
            slot = match_title(text, example.candidates)
            records[e] |= answered(example, slot, "generated", text)
    return [records[e] for e in sorted(records)]


@torch.no_grad()
def compare_with_one_pass(model, tokenizer, encoded: Encoded, records: list[dict]) -> dict:
    """Count how often generation writes another candidate than the one pass, and the near-ties.
    A near-tie: somewhere in the answer the two best logits are closer than NEAR_TIE."""
    differing, near_ties, stop_ids = 0, 0, tokenizer.stop_ids | tokenizer.newline_ids()
    for record in records:
        *ids, last = record["ids"]
        spelt = [title[:-1] for title in encoded.title_ids(record["example"], ALL)]
        listed = last in stop_ids and ids in spelt
        if record["one_pass"] == (record["candidates"][spelt.index(ids)] if listed else None):
            continue
        differing += 1
        prompt = encoded.prompts[record["example"]].tolist()
        sequence = torch.tensor([prompt + ids], device=model.inv_freq.device)
        best = model.logits(sequence)[0, len(prompt) - 1 :].topk(2, dim=-1).values
        near_ties += bool((best[:, 0] - best[:, 1]).min() < NEAR_TIE)
    return {"one_pass_differs": differing, "one_pass_near_ties": near_ties}


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: Examples | Encoded,
    decode: str = "greedy",
    decode_rest: bool = True,
    max_length: int = 1024,
    micro_batch_tokens: int = 8192,
    baselines: dict[str, np.ndarray] | None = None,  # name -> scores (E, N)
) -> tuple[dict, list[dict]]:
    """Evaluate examples in this process (train.py divides them): (metrics, predictions)."""
    encoded, training = examples, model.training
    if not isinstance(examples, Encoded):
        encoded = encode_examples(examples, tokenizer, max_length)
    indices = range(len(encoded.prompts))
    records = predict(
        model.eval(), tokenizer, encoded, indices, decode, decode_rest, micro_batch_tokens
    )
    model.train(training)
    metrics = summarise(records, baselines)
    if decode == "generate":
        metrics |= compare_with_one_pass(model, tokenizer, encoded, records)
    return metrics, records


# ------------------------------------------------------------------------ metrics
def ranking_metrics(scores: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    """hit_ratio@k, ndcg@5 and mrr, (E,) float64 each, by scores (E, n) of target slots (E,).

    Ties are shared: the target's rank is uniform over the candidates of equal score, and each
    metric is the mean over these ranks. ValueError on NaN."""
    scores, target = np.asarray(scores), np.asarray(target)
    if np.isnan(scores).any():
        bad = np.flatnonzero(np.isnan(scores).any(1))
        raise ValueError(f"{len(bad)} of {len(scores)} examples have a NaN score, first {bad[0]}")
    own = np.take_along_axis(scores, target[:, None], 1)
    better = (scores > own).sum(1, keepdims=True)
    tied = (scores == own).sum(1, keepdims=True)  # at least 1: the target itself
    rank = np.arange(1, scores.shape[1] + 1)
    possible = (better < rank) & (rank <= better + tied)  # (E, n) over ranks
    gains = {f"hit_ratio@{k}": rank <= k for k in (1, 3, 5)}
    gains["ndcg@5"] = (rank <= 5) / np.log2(1 + rank)  # one relevant item: the ideal DCG is 1
    gains["mrr"] = 1 / rank
    return {name: (possible * gain).sum(1) / tied[:, 0] for name, gain in gains.items()}


def wilson(mean: float, n: int) -> list[float]:
    """95 % interval of a share of n cases (Wilson's score interval)."""
    z = 1.96
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def summarise(records: list[dict], baselines: dict[str, np.ndarray] | None = None) -> dict:
    """Metrics of all records, with 95 % intervals as `<name>_ci95`; baselines: name -> (E, N)."""
    metrics: dict = {"n": (n := len(records))}

    def put(name: str, values) -> None:
        values = np.asarray(values, float)
        mean, half = values.mean(), 1.96 * values.std() / math.sqrt(n)
        is_share = ((values == 0) | (values == 1)).all()
        metrics[name] = float(mean)
        metrics[f"{name}_ci95"] = wilson(mean, n) if is_share else [mean - half, mean + half]

    put("hit_ratio@1", [r["hit"] for r in records])
    put("valid_ratio", [r["valid"] for r in records])
    if "free" in records[0]:
        put("free/hit_ratio@1", [r["free"] == r["target_slot"] for r in records])
    valid = [r["hit"] for r in records if r["valid"]]
    metrics["hit_ratio@1|valid"] = float(np.mean(valid)) if valid else 0.0
    logps, targets = (np.array([r[name] for r in records]) for name in ("logps", "target_slot"))
    for name, values in ranking_metrics(logps, targets).items():
        put(f"ranking/{name}", values)
    written = (r["how"] == "generated" and r.get("one_pass") is None for r in records)
    metrics["answers_generated"] = sum(written)
    metrics["baselines"] = {"chance": 1 / NUM_CANDIDATES}
    for name, scores in (baselines or {}).items():
        metrics["baselines"][name] = float(ranking_metrics(scores, targets)["hit_ratio@1"].mean())
    return metrics


def results_table(rows: dict[str, dict], bounds: dict[str, float] | None = None) -> str:
    """Markdown table of chance, counting baselines, the rows (name -> metrics) and upper bounds."""
    some = next(iter(rows.values()))
    written, meaning, key = "written", "the answer is the exact title", "answers_generated"
    counted = "answers written out, because no candidate verified in the one pass"
    if "free/hit_ratio@1" in some:
        written, meaning, key = "trie", "decoded along the 20 titles", "free/hit_ratio@1"
        counted = "HR@1 of answers that are decoded freely"
    lines = [
        f"n = {some['n']} users, one correct title among {NUM_CANDIDATES}; {written} = {meaning}, "
        "ranked first = best log-probability of the 20; [95 % interval]\n",
        f"| method | HR@1 {written} | ValidRatio | HR@1 ranked first | NDCG@5 | MRR |",
        "|---|---|---|---|---|---|",
    ]

    def share(value: float, interval: list[float]) -> str:
        return f"{value:.4f} [{interval[0]:.3f}, {interval[1]:.3f}]"

    for name, value in some["baselines"].items():
        ranked = f"{value:.4f}" if name == "chance" else share(value, wilson(value, some["n"]))
        lines.append(f"| {name} | | | {ranked} | | |")
    for name, m in rows.items():
        first = share(m["hit_ratio@1"], m["hit_ratio@1_ci95"])
        ranked = share(m["ranking/hit_ratio@1"], m["ranking/hit_ratio@1_ci95"])
        rest = f"{m['ranking/ndcg@5']:.4f} | {m['ranking/mrr']:.4f}"
        lines.append(f"| {name} | {first} | {m['valid_ratio']:.4f} | {ranked} | {rest} |")
    lines += [f"| {name} | | | {value:.4f} | | |" for name, value in (bounds or {}).items()]
    lines += [f"\n{counted}: " + ", ".join(f"{name} {m[key]:.4g}" for name, m in rows.items())]
    return "\n".join(lines)


# ------------------------------------------------------------------------ the command
def main() -> None:
    config = sources.parse_source(EvalConfig)
    _, _, device = setup_distributed(divides=False)
    asked, prepared = sources.sources_of(config), prepare(config)
    sources.check_run_data(config, asked, prepared.hash)
    if config.show_prompts:  # as text of the ids that the model reads
        tokenizer = Tokenizer(list(asked.values())[-1][0], config.prompt_format)
        examples = prepared.splits[config.split].select(slice(config.show_prompts))
        encoded = encode_examples(examples, tokenizer, config.max_length)
        for e, prompt in enumerate(encoded.prompts):
            ids = (prompt, encoded.title_ids(e, [examples.target[e]])[0])
            text, end = (tokenizer.inner.decode(i, skip_special_tokens=False) for i in ids)
            print(f"--- user {examples[e].user}, {len(prompt)} tokens\n{text}\n--- answer\n{end}\n")
        return
    rows, baselines = {}, counting_baselines(prepared.splits[config.split])
    for name, source in asked.items():
        model, tokenizer = sources.load_source(config, source, device)
        metrics, records = evaluate(
            model,
            tokenizer,
            encode_split(prepared, config.split, tokenizer, config.max_length),
            decode=config.decode,
            decode_rest=config.decode_rest,
            micro_batch_tokens=config.micro_batch_tokens,
            baselines=baselines,
        )
        del model
        free_memory()  # before the next one is loaded
        decode = "trie" if "free/hit_ratio@1" in metrics else config.decode
        facts = {"data_hash": prepared.hash, "decode": decode, "split": config.split}
        rows[name] = metrics = metrics | facts
        if config.output_dir:
            save_predictions(Path(config.output_dir) / name, metrics, records)
        if config.decode == "generate":
            counts = "{one_pass_differs} answers, {one_pass_near_ties} of them near-ties"
            print(f"{name}: the one pass differs on {counts.format_map(metrics)}")
    facts = f"{config.split} split, data {prepared.hash[:12]}, decode {decode}"
    print(f"\n{config.dataset}, {facts}\n\n{results_table(rows)}")


if __name__ == "__main__":
    run_cli(main)
