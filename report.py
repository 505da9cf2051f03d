"""Tables and pictures from run folders: measured values with intervals, the paper's figure beside, and which differences are real.

    python report.py runs/planted-table --output_dir results/planted-table

Every finished stage and baseline under the folder is a method; runs that differ in --seed alone are one method, its figures
their mean. All must have been tested on the same users, candidates and targets; if not, the report refuses and names them.
Differences are paired over users: McNemar's exact test for one run against one run, and the 95 % bootstrap interval of
the mean difference over users (seeds averaged first) for all. Where the interval holds 0 the two are "not distinguishable".

Writes report.md and, with matplotlib, curves.png, margins.png and, where there are runs for them, a picture of each swept option
(margin_lambda, num_negatives, decay), inputs.png and length.png.

References: the paper's Tables 1 and 2 (LLaMA3-8B rows; they are other candidates and another model: context, not a target).
"""

import argparse
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common import read_json, run_cli
from data import DataConfig, find_prepared
from inspection import statistics
from losses import MARGINS, preference_score, target_margins

PAPER = {  # HR@1 and ValidRatio of Table 1, the LLaMA3-8B rows; margins from Table 2
    "movielens": {"gru4rec": (0.2664, 1), "caser": (0.2714, 1), "sasrec": (0.2671, 1), "raw": (0.0929, 0.7351), "sft": (0.2478, 0.9985), "dpo": (0.2809, 0.9970),
                  "simpo": (0.2974, 0.9725), "sdpo": (0.2902, 0.9983), "recpo": (0.3451, 0.9969), "recpo log_diff": (0.3160, None),
                  "recpo log_ratio": (0.3247, None)},
    "amazon_books": {"gru4rec": (0.1310, 1), "caser": (0.1538, 1), "sasrec": (0.1559, 1), "raw": (0.0654, 0.6165), "sft": (0.4447, 0.9974), "dpo": (0.5049, 0.9887),
                     "simpo": (0.5129, 0.9564), "sdpo": (0.5065, 0.9880), "recpo": (0.5802, 0.9851), "recpo log_diff": (0.5370, None),
                     "recpo log_ratio": (0.5455, None)},
    "beeradvocate": {"gru4rec": (0.3708, 1), "caser": (0.3757, 1), "sasrec": (0.3800, 1), "raw": (0.0686, 0.6617), "sft": (0.2645, 0.9936), "dpo": (0.4412, 0.9875),
                     "simpo": (0.4020, 0.9250), "sdpo": (0.4698, 0.9903), "recpo": (0.5771, 0.9887), "recpo log_diff": (0.5023, None),
                     "recpo log_ratio": (0.5257, None)},
    "steam": {"gru4rec": (0.4584, 1), "caser": (0.4394, 1), "sasrec": (0.4587, 1), "raw": (0.0852, 0.8672), "sft": (0.3122, 0.9990), "dpo": (0.3340, 0.9980),
              "simpo": (0.3401, 0.9766), "sdpo": (0.3588, 0.9990), "recpo": (0.4672, 0.9985), "recpo log_diff": (0.4284, None),
              "recpo log_ratio": (0.4517, None)},
    "lastfm": {"gru4rec": (0.6630, 1), "caser": (0.6716, 1), "sasrec": (0.6659, 1), "raw": (0.1264, 0.6147), "sft": (0.5076, 1), "dpo": (0.5719, 1),
               "simpo": (0.5759, 0.9419), "sdpo": (0.5719, 0.9990), "recpo": (0.6830, 0.9959), "recpo log_diff": (0.5912, None),
               "recpo log_ratio": (0.6388, None)},
}  # fmt: skip
RESAMPLES = 10_000
MEASURES = ("hit_ratio@1", "valid_ratio", "ranking/hit_ratio@1")


@dataclass
class Result:
    """One tested model: its values per user, and where it comes from."""

    method: str
    run: Path  # folder of the run
    config: dict
    folder: Path  # with metrics.jsonl and eval/
    values: dict[str, np.ndarray]  # measure -> (n,) per user
    candidates: str  # hash of users, candidates and targets
    metrics: dict


@dataclass
class Method:
    """Results of the same settings under different seeds."""

    name: str
    results: list[Result] = field(default_factory=list)

    def per_user(self, measure: str) -> np.ndarray:
        return np.mean([r.values[measure] for r in self.results], axis=0)

    def mean(self, measure: str) -> float:
        return float(self.per_user(measure).mean())


# ------------------------------------------------------------------------------------------------ collecting
def method_name(stage: str, config: dict) -> str:
    """The stage, and what of its settings is not the paper's: "recpo", "recpo λ=1", "recpo log_diff"."""
    name = stage
    if stage == "recpo":
        if config.get("margin", "ratio") != "ratio":
            name += f" {config['margin']}"
        if config.get("margin_lambda", 2.0) != 2.0:
            name += f" λ={config['margin_lambda']:g}"
    if stage in ("recpo", "sdpo") and config.get("num_negatives", 3) != 3:
        name += f" K={config['num_negatives']}"
    if config.get("decay", 0.5) != 0.5:
        name += f" decay={config['decay']:g}"
    if config.get("history_items", "all") != "all":
        name += ", liked items only"
    if not config.get("ratings", True):
        name += ", no ratings"
    return name


def collect(folder: Path) -> list[Result]:
    """Every stage and baseline below the folder that has been tested."""
    results = []
    for file in sorted(folder.glob("**/eval/metrics.json")):
        stage = file.parent.parent
        run = (
            stage
            if (stage / "config.json").exists() and "method" in read_json(stage / "config.json")
            else stage.parent
        )
        if not (run / "config.json").exists():
            continue
        config = read_json(run / "config.json")
        name = config["method"] if run == stage else method_name(stage.name, config)
        records = [
            json.loads(line)
            for line in (file.parent / "predictions.jsonl").read_text().splitlines()
        ]
        values = {
            "hit_ratio@1": [r["hit"] for r in records],
            "valid_ratio": [r["valid"] for r in records],
        }
        values["ranking/hit_ratio@1"] = [
            _share_of_best(r["logps"], r["target_slot"]) for r in records
        ]
        facts = [[r["user"], r["candidates"], r["target"]] for r in records]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        arrays = {key: np.array(v, float) for key, v in values.items()}
        results.append(Result(name, run, config, stage, arrays, digest, read_json(file)))
    if not results:
        raise ValueError(f"{folder}: no finished stage of a run (eval/metrics.json) below it")
    return results


def _share_of_best(scores: list[float], target: int) -> float:
    """1 if the target has the best score; shared among equals."""
    best = max(scores)
    return (scores[target] == best) / scores.count(best)


def check_candidates(results: list[Result]) -> None:
    groups = defaultdict(list)
    for r in results:
        groups[r.candidates].append(str(r.folder))
    if len(groups) > 1:
        what = "; ".join(
            f"{digest[:12]}: {', '.join(folders[:3])}" for digest, folders in groups.items()
        )
        raise ValueError(
            f"these were tested on different users or candidates and cannot stand in one table: {what}"
        )


def grouped(results: list[Result]) -> dict[str, Method]:
    methods: dict[str, Method] = {}
    for r in results:
        methods.setdefault(r.method, Method(r.method)).results.append(r)
    order = ["random", "popularity", "item-knn", "markov", "gru4rec", "caser", "sasrec", "raw", "sft", "dpo", "ipo", "simpo", "cpo",
             "odpo", "kto", "sdpo", "recpo"]  # fmt: skip
    rank = {name: i for i, name in enumerate(order)}
    return dict(
        sorted(
            methods.items(),
            key=lambda item: (rank.get(item[0].split(" ")[0].split(",")[0], 99), item[0]),
        )
    )


# ------------------------------------------------------------------------------------------------ statistics
def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over users, by resampling users."""
    rng, n, means = np.random.default_rng(seed), len(values), []
    for _ in range(RESAMPLES // 100):  # in portions: all draws at once would take gigabytes
        means.append(values[rng.integers(n, size=(100, n))].mean(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p of as uneven a split of the users that one gets right and the other does not."""
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(
        math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2))
        for i in range(k + 1)
    )
    return min(1.0, 2 * tail)


def same_seeds(a: Method, b: Method) -> tuple[Method, Method]:
    """Both without the runs whose seed the other one lacks, where they share some: a stage starts from its seed's SFT result."""
    seeds = [{r.config.get("seed", 0) for r in m.results} for m in (a, b)]
    shared = seeds[0] & seeds[1] or seeds[0] | seeds[1]
    return tuple(
        Method(m.name, [r for r in m.results if r.config.get("seed", 0) in shared]) for m in (a, b)
    )


def compare(a: Method, b: Method, measure: str) -> tuple[str, float, tuple[float, float]]:
    """ "higher", "lower" or "not distinguishable", the mean difference a - b, and its 95 % interval over users."""
    a, b = same_seeds(a, b)
    difference = a.per_user(measure) - b.per_user(measure)
    low, high = bootstrap(difference)
    verdict = "higher" if low > 0 else "lower" if high < 0 else "not distinguishable"
    return verdict, float(difference.mean()), (low, high)


# ------------------------------------------------------------------------------------------------ tables
def cell(method: Method, measure: str) -> str:
    low, high = bootstrap(method.per_user(measure))
    seeds = [f"{r.values[measure].mean():.3f}" for r in method.results]
    return f"{method.mean(measure):.4f} [{low:.3f}, {high:.3f}]" + (
        f" (seeds {', '.join(seeds)})" if len(seeds) > 1 else ""
    )


def main_table(methods: dict[str, Method], dataset: str) -> str:
    """Table 1: every method, a paired comparison with the best other one, and the paper's figure."""
    some = next(iter(methods.values())).results[0]
    paper = PAPER.get(dataset, {})
    lines = [
        f"n = {len(some.values['hit_ratio@1']):,} test users, 20 candidates, the same for all (hash {some.candidates[:12]}).",
        "",
    ]
    columns = [
        "method",
        "HR@1 written",
        "ValidRatio",
        "HR@1 ranked first",
        "against the best other, ranked first",
    ]
    columns += ["paper: HR@1, ValidRatio"] if paper else []
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, value in some.metrics["baselines"].items():
        lines.append(f"| {name} | | | {value:.4f} |" + " |" * (len(columns) - 4))
    key = "ranking/hit_ratio@1"
    for name, method in methods.items():
        others = [m for m in methods.values() if m is not method]
        versus = ""
        if others:
            best = max(others, key=lambda m: m.mean(key))
            verdict, difference, (low, high) = compare(method, best, key)
            versus = f"{difference:+.4f} [{low:+.3f}, {high:+.3f}] to {best.name}: {verdict}"
            one, other = same_seeds(method, best)
            if len(one.results) == len(other.results) == 1:
                p = mcnemar(one.results[0].values[key], other.results[0].values[key])
                versus += f" (McNemar p {f'{p:.3f}' if p >= 0.001 else '< 0.001'})"
        theirs = paper.get(name)
        printed = (
            ""
            if theirs is None
            else f"{theirs[0]:.4f}" + ("" if theirs[1] is None else f", {theirs[1]:.4f}")
        )
        cells = [cell(method, measure) for measure in MEASURES]
        lines.append(f"| {' | '.join([name, *cells, versus, *([printed] if paper else [])])} |")
    return "\n".join(lines)


def data_table(config: dict, data_hash: str) -> str:
    """Table 3: sizes of the data set here and in the paper; only a line if its prepared examples are not at hand."""
    prepared = data_hash and find_prepared(config.get("prepared_dir", "prepared"), data_hash)
    if not prepared:
        return f"The prepared examples {data_hash} are not at hand; `python data.py` prints their statistics."
    known = {f.name for f in fields(DataConfig)}
    lines = statistics(
        DataConfig(**{k: v for k, v in config.items() if k in known}), prepared
    ).splitlines()
    return "\n".join(
        f"- {line.strip()}" if line and not line.startswith("|") else line for line in lines
    )


def probe_tables(folder: Path) -> str:
    """The probes' rows, averaged over runs; counting and optimal recommenders are the same for all."""
    found: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    sizes: dict[str, int] = {}
    for file in sorted(folder.glob("**/probes/*/*/metrics.json")):
        content = read_json(file)
        probe, stage = content["probe"], file.parent.parent.name
        sizes[probe] = content["n"]
        for name, row in content["rows"].items():
            if name.split(",")[0] == stage or "," not in name:
                found[probe][name].append(row)
    lines = []
    for probe, rows in found.items():
        first = next(iter(rows.values()))[0]
        lines += ["", f"**{probe}** (n = {sizes[probe]:,})", ""]
        if probe == "length":
            names = list(first["bins"])
            lines += [
                "| HR@1 by history length | " + " | ".join(names) + " | std | std / mean |",
                "|---" * (len(names) + 3) + "|",
            ]
            for name, group in rows.items():
                cells = [np.mean([g["bins"][b]["hit_ratio@1"] for g in group]) for b in names]
                cells += [np.mean([g["std"] for g in group]), np.mean([g["cv"] for g in group])]
                lines.append(f"| {name} | " + " | ".join(f"{c:.3f}" for c in cells) + " |")
            continue
        figures = [key for key in first if not key.endswith("_ci95")]
        lines += ["| | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
        for name, group in rows.items():
            seeds = len(group) if "," in name else 1
            cells = []
            for key in figures:
                mean = np.mean([g[key] for g in group])
                width = np.mean([g[f"{key}_ci95"][1] - g[f"{key}_ci95"][0] for g in group]) / 2
                cells.append(f"{mean:.4f} ± {width:.3f}" if name != "chance" else f"{mean:.4f}")
            lines.append(
                f"| {name}{f' (mean of {seeds} seeds)' if seeds > 1 else ''} | "
                + " | ".join(cells)
                + " |"
            )
    return "\n".join(lines)


def claims(methods: dict[str, Method], folder: Path) -> str:
    """The paper's claims, each held, not held or not distinguishable here."""
    said = {"higher": "held", "lower": "not held", "not distinguishable": "not distinguishable"}
    lines = ["| claim of the paper | written | ranked first |", "|---|---|---|"]
    for better, worse in (
        ("recpo", "sdpo"),
        ("sdpo", "sft"),
        ("recpo", "sft"),
        ("recpo", "dpo"),
        ("recpo", "simpo"),
    ):
        if better in methods and worse in methods:
            cells = []
            for measure in ("hit_ratio@1", "ranking/hit_ratio@1"):
                verdict, difference, (low, high) = compare(methods[better], methods[worse], measure)
                cells.append(f"{said[verdict]}: {difference:+.4f} [{low:+.3f}, {high:+.3f}]")
            lines.append(f"| HR@1 of {better} above {worse} | {' | '.join(cells)} |")
    ladder = sweep(methods, "margin_lambda")
    if len(ladder) > 2:
        low, high = ladder[0][1], ladder[-1][1]
        cells = []
        for measure in ("hit_ratio@1", "ranking/hit_ratio@1"):
            verdict, difference, (a, b) = compare(high, low, measure)
            cells.append(f"{said[verdict]}: {difference:+.4f} [{a:+.3f}, {b:+.3f}]")
        lines.append(
            f"| λ raises HR@1 ({ladder[0][0]:g} to {ladder[-1][0]:g}) | {' | '.join(cells)} |"
        )
        verdict, difference, (a, b) = compare(low, high, "valid_ratio")
        lines.append(
            f"| λ lowers ValidRatio ({ladder[0][0]:g} to {ladder[-1][0]:g}) | {said[verdict]}: {-difference:+.4f} [{-b:+.3f}, {-a:+.3f}] | |"
        )
    for probe, figure in (("adherence", "hit_ratio@1"), ("avoidance", "avoidance")):
        per_user = {stage: probe_values(folder, stage, probe) for stage in ("recpo", "sdpo", "sft")}
        for worse in ("sdpo", "sft"):
            if per_user["recpo"] and per_user[worse]:
                cells = []
                for how in ("written", "ranked"):
                    difference = np.mean([v[how] for v in per_user["recpo"]], 0) - np.mean(
                        [v[how] for v in per_user[worse]], 0
                    )
                    low, high = bootstrap(difference)
                    verdict = (
                        "held" if low > 0 else "not held" if high < 0 else "not distinguishable"
                    )
                    cells.append(f"{verdict}: {difference.mean():+.4f} [{low:+.3f}, {high:+.3f}]")
                lines.append(f"| {probe} ({figure}) of recpo above {worse} | {' | '.join(cells)} |")
    return "\n".join(lines)


def probe_values(folder: Path, stage: str, probe: str) -> list[dict[str, np.ndarray]]:
    """Per run: what each user counts for in a probe, as written and as ranked first."""
    out = []
    for file in sorted(folder.glob(f"**/probes/{stage}/{probe}/predictions.jsonl")):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        written = [
            (r["valid"] and not r["hit"]) if probe == "avoidance" else r["hit"] for r in records
        ]
        ranked = [_share_of_best(r["logps"], r["target_slot"]) for r in records]
        ranked = np.array(ranked) if probe != "avoidance" else 1 - np.array(ranked)
        out.append({"written": np.array(written, float), "ranked": ranked})
    return out


SWEPT = {"margin_lambda": "λ", "num_negatives": "K", "decay": "decay"}


def sweep(methods: dict[str, Method], option: str) -> list[tuple[float, Method]]:
    """(value, method) of RecPO with one option changed, in order of its value; from one SFT result: the first seed each."""
    start = f"recpo {SWEPT[option]}="
    found = [
        (m.results[0].config[option], m)
        for name, m in methods.items()
        if name == "recpo" or (name.startswith(start) and name.count(" ") == 1)
    ]
    if option == "margin_lambda" and "sdpo" in methods:
        found.append((0.0, methods["sdpo"]))
    return sorted(
        ((value, Method(m.name, m.results[:1])) for value, m in found), key=lambda pair: pair[0]
    )


# ------------------------------------------------------------------------------------------------ pictures
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
    logs = {name: method.results[0].folder / "metrics.jsonl" for name, method in methods.items()}
    entries = {
        name: [json.loads(line) for line in log.read_text().splitlines()]
        for name, log in logs.items()
        if log.exists()
    }
    return {
        name: steps
        for name, lines in entries.items()
        if (steps := [e for e in lines if "rewards/margins" in e])
    }


def draw_curves(plt, methods: dict[str, Method], file: Path) -> None:
    """Loss, rewards, margins and log-probs of every preference stage."""
    panels = (("loss", "loss"), ("rewards/margins", "reward gap, nats"), ("rewards/accuracies", "chosen beats all rejected"),
              ("logps/chosen", "log-prob of chosen"), ("logps/rejected", "log-prob of rejected"), ("margins/satisfied", "margins satisfied"))  # fmt: skip
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
    for axis, keys in (
        (axes[0], ("hit_ratio@1", "ranking/hit_ratio@1")),
        (axes[1], ("valid_ratio",)),
    ):
        for key in keys:
            means = [m.mean(key) for _, m in sweep]
            spans = [bootstrap(m.per_user(key)) for _, m in sweep]
            errors = np.abs(np.array(spans).T - means)
            what = {"hit_ratio@1": "HR@1 written", "ranking/hit_ratio@1": "HR@1 ranked first"}.get(
                key, "ValidRatio"
            )
            axis.errorbar(values, means, errors, marker="o", capsize=3, label=what)
        axis.set(xlabel=f"{label}{' (0: S-DPO)' if label == 'λ' else ''}", ylim=(0, None))
        axis.legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_bars(plt, methods: dict[str, Method], file: Path) -> None:
    """HR@1 of the input configurations (Figure 2)."""
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for i, method in enumerate(methods.values()):
        for j, key in enumerate(("hit_ratio@1", "ranking/hit_ratio@1")):
            low, high = bootstrap(method.per_user(key))
            mean = method.mean(key)
            name = ("written", "ranked first")[j] if i == 0 else None
            axis.bar(
                i + 0.4 * j - 0.2,
                mean,
                0.38,
                yerr=[[mean - low], [high - mean]],
                capsize=3,
                color=f"C{j}",
                label=name,
            )
    axis.set_xticks(
        range(len(methods)), [name.replace(", ", ",\n") for name in methods], fontsize=8
    )
    axis.set(ylabel="HR@1")
    axis.legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_length(plt, folder: Path, file: Path) -> bool:
    rows: dict[str, list[dict]] = defaultdict(list)
    for metrics in sorted(folder.glob("**/probes/*/length/metrics.json")):
        for name, row in read_json(metrics)["rows"].items():
            if name.split(",")[0] == metrics.parent.parent.name or "," not in name:
                rows[name].append(row)
    if not rows:
        return False
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    bins = list(next(iter(rows.values()))[0]["bins"])
    for name, group in rows.items():
        if name.endswith("written"):
            continue
        values = [np.mean([g["bins"][b]["hit_ratio@1"] for g in group]) for b in bins]
        axis.plot(bins, values, marker="o", label=name, linestyle="-" if "," in name else ":")
    axis.set(xlabel="interactions before the test item", ylabel="HR@1", ylim=(0, None))
    axis.legend(fontsize=7)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return True


def draw_margins(plt, file: Path) -> None:
    """The margin explorer: what each margin demands, and how hard it pulls, over the rejected item's rating and latency."""
    ratings, steps = torch.arange(1.0, 5.01, 0.25), torch.arange(0.0, 10.0)
    scores = preference_score(ratings[:, None], steps[None, :])  # (R, S)
    chosen = preference_score(torch.tensor(5.0), torch.tensor(0.0))
    kinds = [kind for kind in MARGINS if kind != "none"]
    figure, axes = plt.subplots(2, len(kinds), figsize=(13, 7), layout="constrained")
    for column, kind in enumerate(kinds):
        margins = 2.0 * target_margins(
            chosen.expand(scores.numel()), scores.reshape(-1, 1), kind
        ).view(scores.shape)
        # -d loss / d (reward gap) of one pair that is 4 nats apart: sigma(margin - gap)
        weights = torch.sigmoid(margins - 4.0)
        for axis, values, title in (
            (axes[0, column], margins, "target margin, nats"),
            (axes[1, column], weights, "gradient weight at a gap of 4 nats"),
        ):
            image = axis.pcolormesh(steps, ratings, values, shading="nearest")
            figure.colorbar(image, ax=axis)
            axis.set(
                title=f"{kind}, λ = 2: {title}",
                xlabel="steps until the rejected item",
                ylabel="its rating",
            )
    figure.suptitle("Chosen item rated 5 and next; over rating and latency of the rejected one")
    figure.savefig(file, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------ the report
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="folder of run folders, as tables.py leaves it")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--note", default="", help="a line for the top: command, machine, commit")
    args = parser.parse_args()
    results = collect(args.folder)
    check_candidates(results)
    methods = grouped(results)
    config = results[0].config
    name = {"amazon": "amazon_books"}.get(config["dataset"], config["dataset"])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    hashes = sorted({r.metrics["data_hash"][:12] for r in results if "data_hash" in r.metrics})
    parts = [f"# {config['dataset']}: methods compared", ""]
    parts += [args.note, ""] if args.note else []
    parts += [f"{len(results)} tested models in {len({r.run for r in results})} runs, data hash {', '.join(hashes)}.", "",
              "## Methods (the paper's Tables 1 and 2)", "", main_table(methods, name)]  # fmt: skip
    parts += [
        "",
        "## Data (the paper's Table 3)",
        "",
        data_table(config, hashes[0] if hashes else ""),
    ]
    if probes := probe_tables(args.folder):
        parts += ["", "## Probes", probes]
    verdicts = claims(methods, args.folder)
    if verdicts.count("\n") > 1:
        parts += [
            "",
            "## Claims",
            "",
            "Paired over the same users, 95 % bootstrap interval of the difference.",
            "",
            verdicts,
        ]
    plt, pictures = pyplot(), []
    if plt:
        inputs = {n: m for n, m in methods.items() if n.split(",")[0] == "sft"}
        drawn = []
        if preference_logs(methods):
            drawn.append(
                (
                    "curves.png",
                    "Training curves of the preference stages",
                    lambda f: draw_curves(plt, methods, f),
                )
            )
        titles = ("λ (Figure 6)", "Rejected titles per prompt, K", "Decay of the preference score")
        for (option, label), title in zip(SWEPT.items(), titles, strict=True):
            if len(points := sweep(methods, option)) > 2:
                drawn.append((f"{option}.png", title, partial(draw_sweep, plt, points, label)))
        if len(inputs) > 1:
            drawn.append(
                (
                    "inputs.png",
                    "Input configurations (Figure 2)",
                    lambda f: draw_bars(plt, inputs, f),
                )
            )
        if list(args.folder.glob("**/probes/*/length/metrics.json")):
            drawn.append(
                (
                    "length.png",
                    "HR@1 by history length (Figure 4 d)",
                    lambda f: draw_length(plt, args.folder, f),
                )
            )
        drawn.append(
            (
                "margins.png",
                "What each margin demands, and how hard it pulls",
                lambda f: draw_margins(plt, f),
            )
        )
        for file, title, make in drawn:
            make(args.output_dir / file)
            pictures += ["", f"### {title}", "", f"![{title}]({file})"]
        parts += ["", "## Pictures", *pictures]
    else:
        parts += ["", "No pictures: matplotlib is not installed."]
    (args.output_dir / "report.md").write_text("\n".join(parts) + "\n")
    print("\n".join(parts[: parts.index("## Pictures")] if "## Pictures" in parts else parts))
    print(f"\nwritten to {args.output_dir / 'report.md'}")


if __name__ == "__main__":
    run_cli(main)
