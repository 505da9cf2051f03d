"""Pictures of a report; all of them need matplotlib."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from losses import MARGINS, preference_score, target_margins
from studies.methods import ORDER, SWEPT, Method, input_methods, mean_bins, probe_rows, sweep
from studies.statistics import bootstrap


def pyplot():
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def smooth(values: Iterable[float], width: int) -> np.ndarray:
    values = np.asarray(list(values), float)
    width = max(1, min(width, len(values)))
    return np.convolve(values, np.ones(width) / width, "valid")


def preference_logs(methods: dict[str, Method]) -> dict[str, list[dict]]:
    """The steps of each preference stage, of the first seed."""
    logs = {}
    for name, method in methods.items():
        file = method.results[0].folder / "metrics.jsonl"
        if not file.exists():
            continue
        entries = [json.loads(line) for line in file.read_text().splitlines()]
        steps = [entry for entry in entries if "rewards/margins" in entry]
        if steps:
            logs[name] = steps
    return logs


def draw_methods(plt, methods: dict[str, Method], file: Path) -> None:
    """HR@1 written and ranked first with 95 % intervals, valid answers; counting rules as lines."""
    figure, axes = plt.subplots(
        1, 2, figsize=(9, 1.4 + 0.45 * len(methods)), sharey=True, width_ratios=(3, 1),
        layout="constrained",
    )  # fmt: skip
    places = np.arange(len(methods))
    panels = (
        (axes[0], "hit_ratio@1", "written", -0.12),
        (axes[0], "ranking/hit_ratio@1", "ranked first", 0.12),
        (axes[1], "valid_ratio", "valid answers", 0.0),
    )
    for axis, key, label, shift in panels:
        means = np.array([method.mean(key) for method in methods.values()])
        spans = [bootstrap(method.per_user(key)) for method in methods.values()]
        errors = np.abs(np.array(spans).T - means)
        axis.errorbar(means, places + shift, xerr=errors, fmt="o", capsize=3, label=label)
    baselines = next(iter(methods.values())).results[0].metrics.get("baselines", {})
    above, last, level = axes[0].get_xaxis_transform(), -1.0, 0
    for name, ranked in sorted(baselines.items(), key=lambda item: item[1]):
        axes[0].axvline(ranked, color="grey", linestyle=":")
        level = 1 - level if ranked - last < 0.05 else 0  # names side by side would overlap
        place = {"xytext": (0, 3 + 10 * level), "textcoords": "offset points", "ha": "center"}
        axes[0].annotate(name, (ranked, 1), xycoords=above, fontsize=8, **place)
        last = ranked
    axes[0].set_yticks(places, list(methods))
    axes[0].set_ylim(len(methods) - 0.5, -0.5)
    axes[0].set(xlabel="HR@1", xlim=(0, None))
    axes[1].set(xlabel="valid answers", xlim=(0, 1.02))
    axes[0].legend(fontsize=8, loc="best")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_curves(plt, methods: dict[str, Method], file: Path) -> None:
    """Loss, rewards, margins and log-probs of every preference stage."""
    panels = (
        ("loss", "loss"),
        ("rewards/margins", "reward gap, nats"),
        ("rewards/accuracies", "chosen beats all rejected"),
        ("logps/chosen", "log-prob of chosen"),
        ("logps/rejected", "log-prob of rejected"),
        ("margins/satisfied", "margins satisfied"),
    )
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for name, entries in preference_logs(methods).items():
        width = max(1, len(entries) // 15)
        for axis, (key, title) in zip(axes.flat, panels, strict=True):
            axis.plot(smooth((e[key] for e in entries), width), label=name)
            axis.set(title=title, xlabel="step")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_sweep(plt, sweep: list[tuple[float, Method]], label: str, file: Path) -> None:
    """HR@1 and ValidRatio over the values of one option, with 95 % intervals."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    values = [value for value, _ in sweep]
    panels = (
        (axes[0], "hit_ratio@1", "HR@1 written"),
        (axes[0], "ranking/hit_ratio@1", "HR@1 ranked first"),
        (axes[1], "valid_ratio", "ValidRatio"),
    )
    for axis, key, what in panels:
        means = [m.mean(key) for _, m in sweep]
        spans = [bootstrap(m.per_user(key)) for _, m in sweep]
        errors = np.abs(np.array(spans).T - means)
        axis.errorbar(values, means, errors, marker="o", capsize=3, label=what)
    if label == "λ" and values[0] == 0:
        label = "λ (0: S-DPO)"
    for axis in axes:
        axis.set(xlabel=label)
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.legend(loc="lower left")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_bars(plt, methods: dict[str, Method], file: Path) -> None:
    """HR@1 of the input configurations (Figure 2)."""
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    measures = (("hit_ratio@1", "written"), ("ranking/hit_ratio@1", "ranked first"))
    places = np.arange(len(methods))
    for j, (key, label) in enumerate(measures):
        means = np.array([method.mean(key) for method in methods.values()])
        spans = [bootstrap(method.per_user(key)) for method in methods.values()]
        errors = np.abs(np.array(spans).T - means)
        axis.bar(places + 0.4 * j - 0.2, means, 0.38, yerr=errors, capsize=3, label=label)
    names = [name.replace(", ", ",\n") for name in methods]
    axis.set_xticks(places, names, fontsize=8)
    axis.set(ylabel="HR@1")
    axis.margins(y=0.3)  # room for the legend
    axis.legend(ncols=2)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_length(plt, methods: dict[str, Method], file: Path) -> None:
    """HR@1 in each bin of history lengths, with 95 % intervals."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for name, group in probe_rows(methods, "length").items():
        if name.endswith("written"):
            continue
        bins = mean_bins(group)
        values = [b["hit_ratio@1"] for b in bins.values()]
        errors = [1.96 * b["variance"] ** 0.5 for b in bins.values()]
        line = "-" if ";" in name else ":"
        axis.errorbar(list(bins), values, errors, marker="o", capsize=3, label=name, linestyle=line)
    axis.set(xlabel="interactions before the test item", ylabel="HR@1", ylim=(0, None))
    axis.legend(fontsize=7)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_margins(plt, file: Path) -> None:
    """what each margin demands, and how hard it pulls, over the rejected's rating and delay."""
    ratings, steps = torch.arange(1.0, 5.01, 0.25), torch.arange(0.0, 10.0)
    scores = preference_score(ratings[:, None], steps[None, :])  # (R, S)
    chosen = preference_score(torch.tensor(5.0), torch.tensor(0.0))
    kinds = [kind for kind in MARGINS if kind != "none"]
    figure, axes = plt.subplots(2, len(kinds), figsize=(13, 7), layout="constrained")
    flat = scores.reshape(-1, 1)
    for column, kind in enumerate(kinds):
        margins = 2.0 * target_margins(chosen.expand(len(flat)), flat, kind).view(scores.shape)
        # -d loss / d (reward gap) of one pair that is 4 nats apart: sigma(margin - gap)
        weights = torch.sigmoid(margins - 4.0)
        for axis, values, title in (
            (axes[0, column], margins, "target margin, nats"),
            (axes[1, column], weights, "gradient weight at a gap of 4 nats"),
        ):
            image = axis.pcolormesh(steps, ratings, values, shading="nearest")
            figure.colorbar(image, ax=axis)
            axis.set(title=f"{kind}, λ = 2: {title}", ylabel="its rating")
            axis.set(xlabel="steps until the rejected item")
    figure.suptitle("Chosen item rated 5 and next; over rating and latency of the rejected one")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_all(methods: dict[str, Method], folder: Path) -> list[tuple[str, str]]:
    """Draw what these methods have data for: (file, title) of each; none without matplotlib."""
    plt = pyplot()
    if plt is None:
        return []
    drawn = []

    def draw(file: str, title: str, function, *data) -> None:
        function(plt, *data, folder / file)
        drawn.append((file, title))

    plain = {name: method for name, method in methods.items() if name in ORDER}
    if len(plain) > 1:
        draw("methods.png", "Methods, with the paper's objectives", draw_methods, plain)
    if preference_logs(methods):
        draw("curves.png", "Training curves of the preference stages", draw_curves, methods)
    for option, (label, title) in SWEPT.items():
        points = sweep(methods, option)
        if len(points) > 2:
            draw(f"{option}.png", title, draw_sweep, points, label)
    inputs = input_methods(methods)
    if len(inputs) > 1:
        draw("inputs.png", "Input configurations (Figure 2)", draw_bars, inputs)
    if probe_rows(methods, "length"):
        draw("length.png", "HR@1 by history length (Figure 4 d)", draw_length, methods)
    draw("margins.png", "What each margin demands, and how hard it pulls", draw_margins)
    return drawn
