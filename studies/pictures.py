"""Pictures of a report; they need matplotlib (an extra)."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from studies.methods import Method, same_seeds, sweep
from studies.probes import HOW, by_length
from studies.statistics import interval_of, resampled_means

SWEPT = {  # option -> label of the axis, title
    "margin_lambda": ("λ (0: S-DPO)", "λ (Figure 6)"),
    "num_negatives": ("K", "Rejected titles per prompt, K"),
    "decay": ("decay", "Decay of the preference score"),
}
PROBED = {  # title -> probe and its figure
    "takes the next liked title (4 a)": ("adherence", "hit_ratio@1"),
    "avoids the disliked title (4 b)": ("avoidance", "avoidance"),
    "takes the tempting disliked title (4 b)": ("temptation", "takes the disliked one"),
    "names the disliked title (4 c)": ("aversion", "hit_ratio@1"),
}
CURVES = {
    "loss": "loss",
    "rewards/margins": "reward gap, nats",
    "rewards/accuracies": "chosen beats all rejected",
    "logps/chosen": "log-prob of chosen",
    "logps/rejected": "log-prob of rejected",
    "margins/satisfied": "margins satisfied",
}


def panel(axis, methods: list[Method], figure: str, label: str, values=None, beside=()) -> None:
    """Draw means with 95 % intervals: a row per method, or a curve over an option's values.
    beside: (name, mean) of recommenders that are drawn as lines."""
    shown = [how for how in HOW if all(m.has(f"{figure}/{how}") for m in methods)]
    for number, how in enumerate(shown):
        per_user = [m.per_user(f"{figure}/{how}") for m in methods]
        means = np.array([users.mean() for users in per_user])
        ends = np.array([interval_of(resampled_means(users)) for users in per_user])
        errors = np.abs(ends.T - means)
        if values is None:
            places = np.arange(len(methods)) + 0.24 * number
            axis.errorbar(means, places, xerr=errors, fmt="o", capsize=3, label=HOW[how])
        else:
            axis.errorbar(values, means, errors, marker="o", capsize=3, label=HOW[how])
    for number, (name, mean) in enumerate(beside):
        axis.axvline(mean, color=f"C{2 + number}", linestyle=":", label=name)
    if values is None:
        axis.set_yticks(range(len(methods)), [m.name for m in methods])
        axis.set(xlim=(0, None), ylim=(len(methods) - 0.5, -0.5))
    else:
        axis.set(ylim=(0, None))
    axis.set(xlabel=label)
    axis.legend(fontsize=8)


def panels_of(methods: dict[str, Method], measured: dict[str, dict]) -> Iterator[tuple]:
    """Yield (file, title, arguments of each panel) of the pictures that are made of panels."""
    every, probes = list(methods.values()), []
    plain = [m for m in every if m.name == m.stage]
    if len(plain) > 1:
        beside = plain[0].results[0].metrics["baselines"].items()
        both = [(plain, "hit_ratio@1", "HR@1", None, beside), (plain, "valid_ratio", "ValidRatio")]
        yield "methods.png", "Methods, with the paper's objectives", both
    for option, (label, title) in SWEPT.items():
        points = sweep(methods, option)
        if len(points) > 2:
            values, swept = zip(*points, strict=True)
            swept = same_seeds(swept)
            both = [(swept, "hit_ratio@1", f"HR@1 over {label}", values)]
            both += [(swept, "valid_ratio", f"ValidRatio over {label}", values)]
            yield f"{option}.png", title, both
    inputs = [m for _, m in sweep(methods, "history_items", "ratings", stage="sft")]
    if len(inputs) > 1:
        yield "inputs.png", "Inputs (Figure 2)", [(inputs, "hit_ratio@1", "HR@1")]
    for title, (probe, key) in PROBED.items():
        if shown := [m for m in every if m.probed(probe, "ranked")]:
            references = measured[probe]["references"].items()
            beside = [(name, np.mean(row[key])) for name, row in references]
            probes.append((shown, f"{probe}/{key}", title, None, beside))
    if probes:
        yield "probes.png", "Probes (Figures 4 a to c)", probes


def figures(new, methods: dict[str, Method]) -> Iterator[tuple]:
    """Yield (file, title, figure) of every picture that the runs allow; new() makes a figure."""
    every = list(methods.values())
    measured = {name: c for m in every for r in m.results for name, c in r.measured.items()}
    for file, title, panels in panels_of(methods, measured):
        figure = new(figsize=(1 + 4 * len(panels), 1.8 + 0.45 * max(len(panels[0][0]), 5)))
        for number, arguments in enumerate(panels, 1):
            panel(figure.add_subplot(1, len(panels), number), *arguments)
        yield file, title, figure

    if logs := {m.name: steps for m in every if (steps := m.results[0].steps)}:
        figure = new(figsize=(13, 7))
        for number, (key, title) in enumerate(CURVES.items(), 1):
            axis = figure.add_subplot(2, 3, number, title=title, xlabel="step")
            for name, steps in logs.items():
                width = max(1, len(steps) // 15)
                smooth = np.convolve([s[key] for s in steps], np.ones(width) / width, "valid")
                axis.plot(smooth, label=name)
        axis.legend(fontsize=7)
        yield "curves.png", "Training curves of the preference stages, first seed", figure

    if shown := [m for m in every if m.probed("length", "ranked")]:
        figure = new(figsize=(8, 4))
        axis = figure.add_subplot(xlabel="interactions before the test item")
        content = measured["length"]
        rows = {name: [row] for name, row in content["references"].items()}
        for name, runs in (rows | {m.name: m.probed("length", "ranked") for m in shown}).items():
            bins = by_length(content["lengths"], runs)
            means = [b["mean"] for b in bins.values()]
            errors = [1.96 * b["variance"] ** 0.5 for b in bins.values()]
            style = "o:" if name in rows else "o-"
            axis.errorbar(list(bins), means, errors, fmt=style, capsize=3, label=name)
        axis.set(ylim=(0, None), ylabel="HR@1 ranked first")
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        yield "length.png", "HR@1 by history length (Figure 4 d)", figure


def draw_all(methods: dict[str, Method], folder: Path) -> dict[str, str]:
    """Draw the pictures into the folder, if matplotlib is installed; returns file -> title."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    drawn = {}
    for file, title, figure in figures(partial(Figure, layout="constrained"), methods):
        figure.savefig(folder / file, dpi=110)
        drawn[file] = title
    return drawn
