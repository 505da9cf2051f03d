"""Probes: the sooner liked item, disliked ones avoided or named when asked, and long histories.

    python -m studies.probes --run runs/planted-1 --probe adherence

    adherence    HR@1 on a user's last but one item, where the last one (liked too) is among the
                 candidates; leak-free, because training never sees the last two
    temptation   the same with a disliked last item among the candidates: HR@1, and how often the
                 disliked one is taken
    avoidance    users whose last item is disliked, among 19 random ones: share of all answers
                 that are listed and another title
    aversion     the same sets, asked for the title that the user would rate lowest: share of
                 answers that name it
    length       HR@1 of the test split in fifths of the users by the length of their whole
                 history, with n and an interval each; how much it differs between the fifths
                 beyond what sampling explains, with an interval, and that over the mean

A good predictor of the next item has a *low* avoidance: the disliked item came next, after all.
So chance, the counting recommenders and, in the planted world, the recommender with the highest
possible HR@1 stand beside every figure (for aversion the counting scores are turned round, and
the optimum asks for the likeliest disliked item).

Legend: E examples, 20 candidates; a choice (E, 20) holds the probability of each candidate to be
taken, none where an answer is invalid."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from common import arg, parse_config, run_cli
from data import (
    LOWEST,
    NUM_CANDIDATES,
    Encoded,
    Examples,
    Interactions,
    draw_candidates,
    encode_examples,
)
from eval import EvalConfig, predict, wilson
from loaders.counting import counting_baselines, markov_top
from loaders.frozen import DataConfig, prepare
from loaders.planted import bayes_scores, world_of
from runtime.policy import free_memory
from runtime.processes import setup_distributed
from runtime.sources import check_run_data, load_source, sources_of, with_run_options
from runtime.stages import save_predictions
from studies.statistics import spread_of_bins

DISLIKED = 2.0  # highest rating of a disliked item
# name -> (liked? of a user's last two interactions, None: any; how many are candidates)
PROBES = {
    "adherence": ((True, True), 2),
    "temptation": ((True, False), 2),
    "avoidance": ((None, False), 1),
    "aversion": ((None, False), 1),
}
PROBE_NAMES = (*PROBES, "length")
NUM_BINS = 5  # of history lengths: equally many users each, but for equal lengths


@dataclass(frozen=True)
class ProbeConfig(EvalConfig):
    """Measure a probe for the stages of a run, a Hugging Face directory or a PEFT adapter."""

    probe: str = arg("", ", ".join(PROBE_NAMES), group="probe", choices=PROBE_NAMES)

    def __post_init__(self):
        super().__post_init__()
        if self.probe != "length" and self.dataset == "prepared":
            raise ValueError("--probe needs a log; prepared examples have their candidates already")
        if self.probe != "length" and self.split_by == "time":
            raise ValueError(
                f"--probe {self.probe} asks for each user's last two interactions, which a run "
                "with --split_by time may have been trained on; only length fits it"
            )
        if self.split != "test":
            raise ValueError("--split belongs to eval.py; a probe has its own examples")


def probe_examples(interactions: Interactions, config: DataConfig, probe: str) -> Examples:
    """Frozen candidates of a probe, over all users that fit it; target: the first to come.

    adherence    the last two are liked; both are candidates, the sooner is the target
    temptation   the last but one is liked and the target, the last, a candidate too, disliked
    avoidance    the last one is disliked and is a candidate: what should not be chosen
    aversion     the same sets, but the prompt asks for the title that the user would rate lowest

    Random items fill up to 20. Disliked is a rating <= 2. Training never sees the last two."""
    (before_last, last), count = PROBES[probe]
    ends = interactions.start[1:] - 1  # row of each user's last interaction
    fits = ends - interactions.start[:-1] >= config.min_history + count - 1
    for rows, wanted in ((ends - 1, before_last), (ends, last)):
        rating = interactions.rating[np.maximum(rows, 0)]
        if wanted is True:
            fits &= rating >= config.min_rating
        if wanted is False:
            fits &= rating <= DISLIKED
    rows = (ends - count + 1)[fits]
    rng = np.random.default_rng([config.data_seed, 10 + (probe == "temptation") + 2 * (count == 1)])
    rows = rng.permutation(rows)
    rows = rows[: config.test_size] if config.test_size else rows
    if len(rows) == 0:
        raise ValueError(f"--probe {probe}: no user's last two interactions fit it")
    steps = np.arange(count)
    examples = draw_candidates(interactions, probe, rows, steps, config, rng, markov_top)
    if probe == "aversion":
        examples.template = np.full(len(rows), LOWEST, np.int32)
    return examples


def choice_of_scores(scores: np.ndarray) -> np.ndarray:
    """The best-scored candidate; equal ones share: the target's part is ranking_metrics' HR@1."""
    best = scores == scores.max(1, keepdims=True)
    return best / best.sum(1, keepdims=True)


def choice_of_answers(records: list[dict]) -> np.ndarray:
    """What was written: one candidate, or none where the answer is not listed."""
    choice = np.zeros((len(records), NUM_CANDIDATES))
    for row, record in zip(choice, records, strict=True):
        if record["valid"]:
            row[record["candidates"].index(record["answer"])] = 1
    return choice


def outcomes(probe: str, examples: Examples, choice: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> (E,) what the probe counts, between 0 and 1 per example."""
    own = np.take_along_axis(choice, examples.target[:, None], 1)[:, 0]
    if probe == "avoidance":
        return {"avoidance": choice.sum(1) - own}
    found = {"hit_ratio@1": own}
    if probe in ("adherence", "temptation"):
        follows = ~examples.is_random
        follows[np.arange(len(own)), examples.target] = False
        name = "takes the later one" if probe == "adherence" else "takes the disliked one"
        found[name] = (choice * follows).sum(1)
    return found


def history_lengths(examples: Examples) -> np.ndarray:
    """(E,) interactions of the user before the predicted one, shown or not."""
    return (
        examples.position
        - examples.interactions.start[examples.interactions.user[examples.position]]
    )


def by_length(examples: Examples, hits: np.ndarray) -> dict:
    """HR@1 in quantile bins of history length, and how much it differs between them."""
    lengths, bins = history_lengths(examples), {}
    cuts = np.quantile(lengths, np.arange(NUM_BINS) / NUM_BINS, method="lower")
    edges = np.append(np.unique(cuts), lengths.max() + 1)
    which = np.searchsorted(edges, lengths, "right") - 1  # (E,)
    counts = np.bincount(which)
    means = np.bincount(which, hits) / counts
    # one variance per user for all bins: a bin without a hit has no variance of its own
    within = ((hits - means[which]) ** 2).sum() / max(1, len(hits) - len(counts))
    for k, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        bins[f"{low}-{high - 1}"] = {
            "n": int(counts[k]),
            "hit_ratio@1": float(means[k]),
            "hit_ratio@1_ci95": wilson(float(means[k]), int(counts[k])),
            "variance": float(within / counts[k]),  # of the bin's mean, by sampling alone
        }
    return {"bins": bins, **spread_of_bins(bins)}


def reference_choices(probe: str, examples: Examples, config: DataConfig) -> dict[str, np.ndarray]:
    """Choices of chance, counting and, where it is known, the optimal recommender."""
    sign = -1 if probe == "aversion" else 1
    choices = {"chance": np.full(examples.candidates.shape, 1 / NUM_CANDIDATES)}
    for name, scores in counting_baselines(examples).items():
        choices[name] = choice_of_scores(sign * scores)
    if world := world_of(vars(config)):
        limits = (1.0, DISLIKED) if probe == "aversion" else (config.min_rating, 5.0)
        choices["Bayes-optimal"] = choice_of_scores(bayes_scores(world, examples, *limits))
    return choices


def measure(probe: str, examples: Examples, choice: np.ndarray) -> dict:
    """Every figure of the probe with its 95 % interval; for length the bins."""
    if probe == "length":
        return by_length(examples, np.take_along_axis(choice, examples.target[:, None], 1)[:, 0])
    figures = {}
    for name, values in outcomes(probe, examples, choice).items():
        figures[name] = float(values.mean())
        figures[f"{name}_ci95"] = wilson(figures[name], len(values))
    return figures


def run_probe(
    probe: str, config: DataConfig, prepared, models: dict, options: dict, device
) -> tuple[Examples, dict, dict]:
    """(examples, rows of the table, records) of a probe; models: name -> function that gives
    (model, tokenizer).

    Every model has two rows: what it writes (greedy), and what it ranks first."""
    if probe == "length":
        examples = prepared.splits["test"]
    else:
        examples = probe_examples(prepared.interactions, config, probe)
    references = reference_choices(probe, examples, config)
    rows = {name: measure(probe, examples, choice) for name, choice in references.items()}
    records = {}
    for name, load in models.items():
        model, tokenizer = load()
        encoded: Encoded = encode_examples(examples, tokenizer, options["max_length"])
        how = [options[key] for key in ("decode", "decode_rest", "micro_batch_tokens")]
        indices = range(len(examples))
        records[name] = predict(model, tokenizer, encoded, indices, *how)
        del model
        free_memory()  # before the next one is loaded
        rows[f"{name}, written"] = measure(probe, examples, choice_of_answers(records[name]))
        ranked = choice_of_scores(np.array([r["logps"] for r in records[name]]))
        rows[f"{name}, ranked first"] = measure(probe, examples, ranked)
    return examples, rows, records


def length_table(rows: dict[str, dict]) -> str:
    some = next(iter(rows.values()))
    names = [f"{name} (n = {entry['n']})" for name, entry in some["bins"].items()]
    columns = ["HR@1 by history length", *names, *SPREAD_COLUMNS]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, row in rows.items():
        cells = [
            with_interval(b["hit_ratio@1"], b["hit_ratio@1_ci95"]) for b in row["bins"].values()
        ]
        lines.append(f"| {' | '.join([name, *cells, *spread_cells(row)])} |")
    return "\n".join(lines)


SPREAD_COLUMNS = ("spread beyond sampling", "spread / mean")


def spread_cells(spread: dict) -> list[str]:
    return [with_interval(spread[key], spread[f"{key}_ci95"]) for key in ("spread", "cv")]


def with_interval(value: float, interval: list[float]) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def probe_table(probe: str, examples: Examples, rows: dict[str, dict]) -> str:
    """Markdown."""
    some = next(iter(rows.values()))
    lines = [f"{probe}: n = {len(examples):,} users; [95 % interval]", ""]
    if probe == "length":
        return "\n".join([*lines, length_table(rows)])
    figures = [name for name in some if not name.endswith("_ci95")]
    lines += ["| | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for name, row in rows.items():
        cells = []
        for figure in figures:
            low, high = row[f"{figure}_ci95"]
            interval = "" if name == "chance" else f" [{low:.3f}, {high:.3f}]"
            cells.append(f"{row[figure]:.4f}{interval}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    config = with_run_options(parse_config(ProbeConfig))
    _, _, device = setup_distributed()
    sources = sources_of(config)
    prepared = prepare(config)
    check_run_data(config, sources, prepared.hash)
    models = {}
    for name, source in sources.items():
        models[name] = partial(load_source, config, source, device)
    options = vars(config)
    examples, rows, records = run_probe(config.probe, config, prepared, models, options, device)
    facts = {"probe": config.probe, "n": len(examples), "data_hash": prepared.hash, "rows": rows}
    for name in sources if config.output_dir else ():
        save_predictions(Path(config.output_dir) / name / config.probe, facts, records[name])
    print(f"\n{config.dataset}, data {prepared.hash[:12]}, decode {config.decode}\n")
    print(probe_table(config.probe, examples, rows))


if __name__ == "__main__":
    run_cli(main)
