"""Probes: does a model follow the sooner liked item, avoid disliked ones, know them when asked, and hold up on long histories?

    python eval.py --run runs/planted-1 --probe adherence

    adherence    HR@1 on a user's last but one item, where the last one (liked too) is among the candidates; leak-free, because
                 training never sees the last two
    temptation   the same with a disliked last item among the candidates: HR@1, and how often the disliked one is taken
    avoidance    users whose last item is disliked, among 19 random ones: share of all answers that are listed and another title
    aversion     the same sets, asked for the title that the user would rate lowest: share of answers that name it
    length       HR@1 of the test split by the length of the user's whole history (in fifths of the users where all lengths are
                 alike), its standard deviation over the bins, and that divided by the mean (coefficient of variation)

A good predictor of the next item has a *low* avoidance: the disliked item came next, after all. So chance, the counting
recommenders and, in the planted world, the recommender with the highest possible HR@1 stand beside every figure (for
aversion the counting scores are turned round, and the optimum asks for the likeliest disliked item).

Legend: E examples, 20 candidates; a choice (E, 20) holds the probability of each candidate to be taken, none where an answer is invalid.
"""

import numpy as np

from baselines import counting_baselines
from data import Encoded, encode_examples
from eval import predict, wilson
from examples import DISLIKED, NUM_CANDIDATES, PROBES, DataConfig, Examples, probe_examples
from planted import World, bayes_scores

LENGTH_BINS = (0, 10, 20, 50, 100, 10**9)  # interactions before the test item: 0 <= n < 10, ...


def choice_of_scores(scores: np.ndarray) -> np.ndarray:
    """The best-scored candidate; equal ones share."""
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
        found["takes the later one" if probe == "adherence" else "takes the disliked one"] = (
            choice * follows
        ).sum(1)
    return found


def history_lengths(examples: Examples) -> np.ndarray:
    """(E,) interactions of the user before the predicted one, shown or not."""
    return examples.position - examples.log.start[examples.log.user[examples.position]]


def by_length(examples: Examples, hits: np.ndarray) -> dict:
    """HR@1 in each bin of LENGTH_BINS that has users, and how much it varies over them."""
    lengths, bins = history_lengths(examples), {}
    edges = np.array(LENGTH_BINS)
    if (
        np.count_nonzero(np.histogram(lengths, edges)[0]) < 2
    ):  # all in one bin: fifths of the users instead
        edges = np.unique(
            np.append(
                np.quantile(lengths, [0, 0.2, 0.4, 0.6, 0.8], method="lower"), lengths.max() + 1
            )
        )
    for low, high in zip(edges.tolist(), edges.tolist()[1:], strict=False):
        inside = (lengths >= low) & (lengths < high)
        if inside.any():
            name = f"{low}-{high - 1}" if high < 10**9 else f"{low}+"
            bins[name] = {"n": int(inside.sum()), "hit_ratio@1": float(hits[inside].mean())}
    values = np.array([entry["hit_ratio@1"] for entry in bins.values()])
    return {
        "bins": bins,
        "std": float(values.std()),
        "cv": float(values.std() / values.mean()) if values.mean() else float("nan"),
    }


def reference_choices(probe: str, examples: Examples, config: DataConfig) -> dict[str, np.ndarray]:
    """Choices of chance, the counting recommenders and, where it is known, the recommender with the highest possible HR@1."""
    sign = -1 if probe == "aversion" else 1
    choices = {"chance": np.full(examples.candidates.shape, 1 / NUM_CANDIDATES)}
    choices |= {
        name: choice_of_scores(sign * scores)
        for name, scores in counting_baselines(examples).items()
    }
    if config.dataset == "planted" and config.history >= World.max_length - 1:
        world = World(num_users=config.planted_users, seed=config.data_seed)
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
    """(examples, rows of the table, records) of a probe; models: name -> function that gives (model, tokenizer).

    Every model has two rows: what it writes (greedy), and what it ranks first."""
    examples = (
        prepared.splits["test"]
        if probe == "length"
        else probe_examples(prepared.log, config, probe)
    )
    rows = {
        name: measure(probe, examples, choice)
        for name, choice in reference_choices(probe, examples, config).items()
    }
    records = {}
    for name, load in models.items():
        model, tokenizer = load()
        encoded: Encoded = encode_examples(examples, tokenizer, options["max_length"])
        records[name] = predict(
            model, tokenizer, encoded, range(len(examples)), options["decode"], options["decode_rest"],
            options["micro_batch_tokens"], device=device,
        )  # fmt: skip
        rows[f"{name}, written"] = measure(probe, examples, choice_of_answers(records[name]))
        ranked = choice_of_scores(np.array([r["logps"] for r in records[name]]))
        rows[f"{name}, ranked first"] = measure(probe, examples, ranked)
    return examples, rows, records


def probe_table(probe: str, examples: Examples, rows: dict[str, dict]) -> str:
    """Markdown."""
    some = next(iter(rows.values()))
    lines = [f"{probe}: n = {len(examples):,} users; [95 % interval]", ""]
    if probe == "length":
        names = list(some["bins"])
        lines.append(
            "| HR@1 by history length | "
            + " | ".join(f"{n} (n = {some['bins'][n]['n']})" for n in names)
            + " | std | std / mean |"
        )
        lines.append("|---" * (len(names) + 3) + "|")
        for name, row in rows.items():
            cells = [f"{row['bins'][n]['hit_ratio@1']:.3f}" for n in names] + [
                f"{row['std']:.3f}",
                f"{row['cv']:.3f}",
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)
    figures = [name for name in some if not name.endswith("_ci95")]
    lines += ["| | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for name, row in rows.items():
        cells = [
            f"{row[f]:.4f} [{row[f'{f}_ci95'][0]:.3f}, {row[f'{f}_ci95'][1]:.3f}]" for f in figures
        ]
        lines.append(
            f"| {name} | "
            + " | ".join(cells if name != "chance" else [f"{row[f]:.4f}" for f in figures])
            + " |"
        )
    return "\n".join(lines)


__all__ = ["PROBES", "by_length", "measure", "outcomes", "probe_table", "run_probe"]
