"""Probes: tests of a run's stages that go beyond its test split.

    python -m studies.probes --run runs/planted-1 --probe adherence

    adherence    HR@1 on a user's second-last item, with the last one, also liked, among the
                 candidates (training never sees these two)
    temptation   the same with a disliked last item: HR@1, and how often the disliked one is taken
    avoidance    users whose last item is disliked, among 19 random ones: the share of all answers
                 that name another listed title
    aversion     the same lists, but the prompt asks for the title that the user would rate lowest
    length       HR@1 of the test split in fifths of the users by the length of their history; how
                 much it differs between them beyond sampling (spread), and spread / mean (cv)
    uniform, popularity, retrieved    HR@1 of the test users among other candidates: random ones,
                 popular ones, or those that Markov retrieves for the history

A good predictor of the next item has a *low* avoidance: the disliked item did come next. So every
figure is shown with those of chance, counting and, in the planted world, the best possible
recommender (in aversion they rank in reverse). --output_dir gets STAGE/PROBE/metrics.json. Legend:
E examples; a choice (E, 20): the probability that each candidate is taken, all 0 if invalid."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common import arg, run_cli, table
from data import LOWEST, NUM_CANDIDATES, Examples, Interactions, draw_candidates, encode_examples
from eval import EvalConfig, predict, wilson
from loaders.counting import counting_baselines, markov_top
from loaders.frozen import DataConfig, prepare
from loaders.planted import bayes_scores, world_of
from runtime.policy import free_memory
from runtime.processes import setup_distributed
from runtime.sources import check_run_data, load_source, parse_source, sources_of
from runtime.stages import save_predictions
from studies.statistics import spread_of_bins

DISLIKED = 2.0  # highest rating of a disliked item
# name -> (are the last two interactions liked, None: either; how many are candidates; seed)
LAST_TWO = {
    "adherence": ((True, True), 2, 10),
    "temptation": ((True, False), 2, 11),
    "avoidance": ((None, False), 1, 12),
    "aversion": ((None, False), 1, 12),
}
KINDS = ("uniform", "popularity", "retrieved")  # of candidate lists, as --negatives draws them
TEST_SEED = 2  # build_examples' generator of the test split; the kind is added
PROBES = (*LAST_TWO, "length", *KINDS)
HOW = {"written": "written", "ranked": "ranked first"}  # which answer counts -> its name in tables
NUM_BINS = 5  # of history lengths, with equally many users except for ties


@dataclass(frozen=True)
class ProbeConfig(EvalConfig):
    """Measure a probe for the stages of a run, a Hugging Face directory or a PEFT adapter."""

    probe: str = arg("length", "which probe", group="probe", choices=PROBES)

    def __post_init__(self):
        super().__post_init__()
        if self.probe != "length" and self.dataset == "prepared":
            raise ValueError("--probe needs a log; prepared examples have their candidates already")
        if self.probe in LAST_TWO and self.split_date:
            what = "asks for the last two interactions, which --split_date may have trained on"
            raise ValueError(f"--probe {self.probe} {what}; length fits, and other lists")
        if self.split != "test" or self.show_prompts:
            raise ValueError("--split, --show_prompts are eval.py's: a probe has its own examples")


def probe_examples(interactions: Interactions, config: DataConfig, probe: str) -> Examples:
    """Examples of all users whose last two interactions fit a probe.
    The target is the first of them that is a candidate; random items fill the list up to 20."""
    (before_last, last), count, seed = LAST_TWO[probe]
    ends = interactions.start[1:] - 1  # row of each user's last interaction
    fits = ends - interactions.start[:-1] >= config.min_history + count - 1
    for rows, wanted in ((ends - 1, before_last), (ends, last)):
        rating = interactions.rating[np.maximum(rows, 0)]
        if wanted is not None:
            fits &= rating >= config.min_rating if wanted else rating <= DISLIKED
    rng = np.random.default_rng([config.data_seed, seed])
    rows = rng.permutation((ends - count + 1)[fits])[: config.test_size or None]
    if len(rows) == 0:
        raise ValueError(f"--probe {probe}: no user's last two interactions fit it")
    steps = np.arange(count)
    examples = draw_candidates(interactions, probe, rows, steps, config, rng, markov_top)
    if probe == "aversion":
        examples.template = np.full(len(rows), LOWEST, np.int32)
    return examples


def other_list(test: Examples, config: DataConfig, kind: str) -> Examples:
    """The test cases with candidates of this kind.
    They depend on --data_seed and the kind only, so that all methods get the same lists."""
    interactions = test.interactions
    rng = np.random.default_rng([config.data_seed, TEST_SEED, KINDS.index(kind)])
    own, step = replace(config, negatives=kind), np.arange(1)
    return draw_candidates(interactions, "test", test.position, step, own, rng, markov_top)


def choice_of_scores(scores: np.ndarray) -> np.ndarray:
    """The candidate with the best score; ties share the choice, as in ranking_metrics."""
    best = scores == scores.max(1, keepdims=True)
    return best / best.sum(1, keepdims=True)


def choice_of_answers(records: list[dict]) -> np.ndarray:
    """The candidate that was written, or none if the answer is not listed."""
    answers = np.array([r["answer"] if r["valid"] else "" for r in records])
    return (np.array([r["candidates"] for r in records]) == answers[:, None]).astype(float)


def outcomes(probe: str, examples: Examples, choice: np.ndarray) -> dict[str, list[float]]:
    """Map each figure to a value of every example, between 0 and 1."""
    rows = np.arange(len(examples))
    own = choice[rows, examples.target]
    if probe == "avoidance":
        return {"avoidance": (choice.sum(1) - own).tolist()}
    found = {"hit_ratio@1": own.tolist()}
    if probe in ("adherence", "temptation"):
        follows = ~examples.is_random
        follows[rows, examples.target] = False
        name = "takes the later one" if probe == "adherence" else "takes the disliked one"
        found[name] = (choice * follows).sum(1).tolist()
    return found


def references(probe: str, examples: Examples, config: DataConfig) -> dict[str, dict]:
    """Outcomes of chance, counting and, if it is known, the best possible recommender."""
    sign = -1 if probe == "aversion" else 1
    choices = {"chance": np.full(examples.candidates.shape, 1 / NUM_CANDIDATES)}
    for name, scores in counting_baselines(examples).items():
        choices[name] = choice_of_scores(sign * scores)
    if world := world_of(vars(config)):
        limits = (1.0, DISLIKED) if probe == "aversion" else (config.min_rating, 5.0)
        choices["Bayes-optimal"] = choice_of_scores(bayes_scores(world, examples, *limits))
    return {name: outcomes(probe, examples, choice) for name, choice in choices.items()}


def digest_of(records: list[dict]) -> str:
    """Hash of the users, candidates and targets."""
    facts = [[r["user"], r["candidates"], r["target"]] for r in records]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def measured(probe: str, examples: Examples, records: list[dict], beside: dict, data: str) -> dict:
    """The outcomes of one model, as written and as ranked first, and the references."""
    users = examples.interactions.user[examples.position]
    lengths = examples.position - examples.interactions.start[users]
    ranked = choice_of_scores(np.array([r["logps"] for r in records]))
    return {
        "probe": probe,
        "data_hash": data,
        "n": len(records),
        "cases": digest_of(records),
        "references": beside,
        "written": outcomes(probe, examples, choice_of_answers(records)),
        "ranked": outcomes(probe, examples, ranked),
        "lengths": lengths.tolist() if probe == "length" else [],
    }


def by_length(lengths: list[int], runs: list[dict]) -> dict[str, dict]:
    """HR@1 in quantile bins of history length: n, mean and its sampling variance.
    They are averaged over the outcomes of the runs, whose users are the same."""
    lengths, hits = np.array(lengths), np.array([run["hit_ratio@1"] for run in runs], float)
    cuts = np.quantile(lengths, np.arange(NUM_BINS) / NUM_BINS, method="lower")
    edges = np.append(np.unique(cuts), lengths.max() + 1)
    which = np.searchsorted(edges, lengths, "right") - 1  # (E,)
    counts = np.bincount(which)
    means = np.array([np.bincount(which, run) / counts for run in hits])  # (runs, bins)
    # one variance per user for all bins: a bin without a hit has no variance of its own
    within = ((hits - means[:, which]) ** 2).sum(1) / max(1, len(lengths) - len(counts))
    bins = {}
    for k, n in enumerate(counts.tolist()):
        figures = {"mean": float(means[:, k].mean()), "variance": float(within.mean() / n)}
        bins[f"{edges[k]}-{edges[k + 1] - 1}"] = {"n": n} | figures
    return bins


def probe_table(content: dict, rows: dict[str, list[dict]]) -> str:
    """A table of means with 95 % intervals; `rows`: name -> outcomes of its runs."""
    lines, columns = [], list(content["written"])
    for name, runs in rows.items():
        if content["lengths"]:
            bins = by_length(content["lengths"], runs)
            spread = spread_of_bins(bins)
            columns = [*(f"{b} (n = {bins[b]['n']})" for b in bins), "spread", "cv"]
            cells = [f"{b['mean']:.3f} ± {1.96 * b['variance'] ** 0.5:.3f}" for b in bins.values()]
            for key in ("spread", "cv"):
                cells.append("{:.3f} [{:.3f}, {:.3f}]".format(spread[key], *spread[f"{key}_ci95"]))
        else:
            cells = []
            for figure in columns:
                means = [float(np.mean(run[figure])) for run in runs]
                low, high = np.mean([wilson(mean, content["n"]) for mean in means], axis=0)
                interval = "" if name == "chance" else f" [{low:.3f}, {high:.3f}]"
                cells.append(f"{np.mean(means):.4f}{interval}")
        lines.append([name if len(runs) == 1 else f"{name} (mean of {len(runs)} runs)", *cells])
    return table(["", *columns], lines)


def predictions(config: EvalConfig, examples: Examples, device) -> Iterator[tuple]:
    """Yield (name, records) of every stage that the options name."""
    for name, source in sources_of(config).items():
        model, tokenizer = load_source(config, source, device)
        encoded = encode_examples(examples, tokenizer, config.max_length)
        how = {"decode": config.decode, "decode_rest": config.decode_rest}
        how |= {"micro_batch_tokens": config.micro_batch_tokens}
        records = predict(model, tokenizer, encoded, range(len(examples)), **how)
        del model
        free_memory()  # before the next one is loaded
        yield name, records


def main() -> None:
    config = parse_source(ProbeConfig)
    _, _, device = setup_distributed(divides=False)
    prepared, probe = prepare(config), config.probe
    check_run_data(config, sources_of(config), prepared.hash)
    examples = prepared.splits["test"]
    if probe in LAST_TWO:
        examples = probe_examples(prepared.interactions, config, probe)
    elif probe in KINDS:
        examples = other_list(examples, config, probe)
    beside = references(probe, examples, config)
    rows = {name: [found] for name, found in beside.items()}
    for name, records in predictions(config, examples, device):
        content = measured(probe, examples, records, beside, prepared.hash)
        rows |= {f"{name}; {shown}": [content[how]] for how, shown in HOW.items()}
        if config.output_dir:
            save_predictions(Path(config.output_dir) / name / probe, content, records)
    print(f"\n{config.dataset}, data {prepared.hash[:12]}, decode {config.decode}")
    print(f"{probe}: n = {len(examples):,} users; [95 % interval]\n{probe_table(content, rows)}")


if __name__ == "__main__":
    run_cli(main)
