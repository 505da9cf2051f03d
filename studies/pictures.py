"""Pictures of a report; they need matplotlib (an extra)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from losses import preference_score, target_margins
from studies.methods import Method, of_one_seed, sweep
from studies.popularity import NUM_BINS, reliability
from studies.probes import mean_bins
from studies.statistics import bootstrap

HIT_RATIOS = {"hit_ratio@1": "written", "ranking/hit_ratio@1": "ranked first"}
VALID = {"valid_ratio": "valid answers"}
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


def panel(axis, methods: list[Method], measures: dict, label: str, values=None, lines=()) -> None:
    """Means with 95 % intervals: a row for each method, or over these values of an option; lines:
    (name, figure) of recommenders that stand beside."""
    rows = np.arange(len(methods))
    for number, (measure, name) in enumerate(measures.items()):
        means = np.array([m.mean(measure) for m in methods])
        errors = np.abs(np.array([bootstrap(m.per_user(measure)) for m in methods]).T - means)
        places = rows + 0.24 * number - 0.12 * (len(measures) - 1)
        if values is None:
            axis.errorbar(means, places, xerr=errors, fmt="o", capsize=3, label=name)
        else:
            axis.errorbar(values, means, errors, marker="o", capsize=3, label=name)
    labels: list[tuple[float, str]] = []
    for name, figure in sorted(lines, key=lambda line: line[1]):
        axis.axvline(figure, color="grey", linestyle=":")
        if labels and figure - labels[-1][0] < 0.04 * axis.get_xlim()[1]:
            figure, name = labels[-1][0], f"{labels.pop()[1]}, {name}"  # too near for two names
        labels.append((figure, name))
    for figure, name in labels:
        axis.text(figure, -0.55, name, fontsize=8, rotation=60, ha="left", va="bottom")
    axis.set(xlabel=label)
    if values is None:
        axis.set_yticks(rows, [m.name for m in methods])
        axis.set(xlim=(0, 1.04 * axis.get_xlim()[1]), ylim=(len(methods) - 0.5, -0.5))
    else:
        axis.set(ylim=(0, 1.1 * axis.get_ylim()[1]))
    axis.legend(fontsize=8, loc="best")


def panels_of(methods: dict[str, Method], measured: dict[str, dict]) -> dict[str, tuple]:
    """File -> (title, arguments of each panel) of the pictures made of panels."""
    every, pictures = list(methods.values()), {}
    plain = [m for m in every if m.name == m.stage]
    if len(plain) > 1:
        beside = plain[0].results[0].metrics["baselines"].items()
        panels = [(plain, HIT_RATIOS, "HR@1", None, beside), (plain, VALID, "valid answers")]
        pictures["methods.png"] = "Methods, with the paper's objectives", panels
    for option, (label, title) in SWEPT.items():
        points = of_one_seed(sweep(methods, option))
        if len(points) > 2:
            values, swept = zip(*points, strict=True)
            panels = [(swept, shown, label, values) for shown in (HIT_RATIOS, VALID)]
            pictures[f"{option}.png"] = title, panels
    inputs = [m for _, m in sweep(methods, "history_items", "ratings", stage="sft")]
    if len(inputs) > 1:
        panels = [(inputs, HIT_RATIOS, "HR@1")]
        pictures["inputs.png"] = "Input configurations (Figure 2)", panels
    panels = []
    for title, (probe, key) in PROBED.items() if measured else ():
        if shown := [m for m in every if m.probed(probe, "ranked")]:
            references = measured[probe]["references"].items()
            beside = [(name, np.mean(row[key])) for name, row in references]
            names = {f"{probe}/{key}/written": "written", f"{probe}/{key}/ranked": "ranked first"}
            panels.append((shown, names, title, None, beside))
    if panels:
        pictures["probes.png"] = "Probes (Figures 4 a to c)", panels
    return pictures


def figures(subplots, methods: dict[str, Method]) -> Iterator[tuple]:
    """(file, title, figure) of every picture that there are runs for."""
    every = list(methods.values())
    measured = {name: c for m in every for r in m.results for name, c in r.measured.items()}
    for file, (title, panels) in panels_of(methods, measured).items():
        rows = 5 if len(panels[0]) == 4 else max(len(shown) for shown, *_ in panels)
        figure, axes = subplots(1, len(panels), (1 + 4 * len(panels), 1.8 + 0.45 * rows))
        for axis, arguments in zip(axes[0], panels, strict=True):
            panel(axis, *arguments)
        yield file, title, figure

    if logs := {m.name: steps for m in every if (steps := m.results[0].steps)}:
        figure, axes = subplots(2, 3, (13, 7))
        for axis, (key, title) in zip(axes.flat, CURVES.items(), strict=True):
            for name, steps in logs.items():
                width = max(1, len(steps) // 15)
                smooth = np.convolve([s[key] for s in steps], np.ones(width) / width, "valid")
                axis.plot(smooth, label=name)
            axis.set(title=title, xlabel="step")
        axes[0, 0].legend(fontsize=7)
        yield "curves.png", "Training curves of the preference stages, first seed", figure

    if "length" in measured:
        figure, axes = subplots(1, 1, (8, 4))
        rows = {name: [row] for name, row in measured["length"]["references"].items()}
        beside = set(rows)
        rows |= {m.name: runs for m in every if (runs := m.probed("length", "ranked"))}
        for name, runs in rows.items():
            bins = mean_bins(measured["length"]["lengths"], runs)
            means = [b["mean"] for b in bins.values()]
            errors = [1.96 * b["variance"] ** 0.5 for b in bins.values()]
            style = {"linestyle": ":" if name in beside else "-", "marker": "o", "capsize": 3}
            axes[0, 0].errorbar(list(bins), means, errors, label=name, **style)
        axes[0, 0].set(xlabel="interactions before the test item", ylabel="HR@1 ranked first")
        axes[0, 0].set_ylim(0, None)
        axes[0, 0].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        yield "length.png", "HR@1 by history length (Figure 4 d)", figure

    figure, axes = subplots(2, 3, (13, 7))
    ratings, steps = torch.arange(1.0, 5.01, 0.25), torch.arange(0.0, 10.0)
    scores = preference_score(ratings[:, None], steps[None, :])  # (R, S)
    chosen = preference_score(torch.tensor(5.0), torch.tensor(0.0)).expand(scores.numel())
    for column, kind in enumerate(("ratio", "log_diff", "log_ratio")):
        demanded = 2.0 * target_margins(chosen, scores.reshape(-1, 1), kind).view(scores.shape)
        # -d loss / d (reward gap) of one pair that is 4 nats apart: sigma(margin - gap)
        pull = torch.sigmoid(demanded - 4.0)
        shown = {"target margin, nats": demanded, "gradient weight at a gap of 4 nats": pull}
        for axis, (title, values) in zip(axes[:, column], shown.items(), strict=True):
            figure.colorbar(axis.pcolormesh(steps, ratings, values, shading="nearest"), ax=axis)
            axis.set(title=f"{kind}, λ = 2: {title}", ylabel="its rating")
            axis.set(xlabel="steps until the rejected item")
    figure.suptitle("Chosen item rated 5 and next; over rating and delay of the rejected one")
    yield "margins.png", "What each margin demands, and how hard it pulls", figure

    lines = -(-len(every) // 4)
    figure, axes = subplots(lines, min(4, len(every)), (13, 3.4 * lines))
    for axis in axes.flat[len(every) :]:
        axis.axis("off")
    for axis, m in zip(axes.flat, every, strict=False):
        counts, expected, right = reliability(m.results)
        bars = (np.minimum((expected * NUM_BINS).astype(int), NUM_BINS - 1) + 0.5) / NUM_BINS
        axis.bar(bars, counts / counts.sum(), 1 / NUM_BINS, color="0.85", label="share of users")
        axis.plot([0, 1], [0, 1], ":", color="0.5")
        axis.plot(expected, right, marker="o", label="how often it is right")
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the first place", title=m.name)
    axes[0, 0].legend(fontsize=7, loc="upper left")
    yield "calibration.png", "How often the first place is right", figure


def draw_all(methods: dict[str, Method], folder: Path) -> dict[str, str]:
    """File -> title of the pictures drawn into the folder; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return {}
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def subplots(rows: int, columns: int, size: tuple, **options):
        kept = {"figsize": size, "layout": "constrained", "squeeze": False}
        return pyplot.subplots(rows, columns, **kept, **options)

    drawn = {}
    for file, title, figure in figures(subplots, methods):
        figure.savefig(folder / file, dpi=110)
        pyplot.close(figure)
        drawn[file] = title
    return drawn
