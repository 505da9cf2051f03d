"""Results grouped into methods, their names, and which of them can be compared.

Results are one method, its figures their mean, if their whole configuration but seed and paths is
equal, that of the stage they start from included. A name says what of the objective is not the
paper's, and every other option in which the method differs from most of its stage. A seed counts
once."""

import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field

import numpy as np

from studies.results import (
    NOT_THE_METHOD,
    PREFERENCE_OPTIONS,
    Result,
    comparable,
    defaults_of,
)
from studies.statistics import Difference, judge, resampled_means
from train import PREFERENCE_LOSSES, TrainConfig


@dataclass
class Method:
    """Results of the same settings under different seeds."""

    name: str
    results: list[Result] = field(default_factory=list)
    shown: dict = field(default_factory=dict)  # the options that the name shows
    repeats: list[Result] = field(default_factory=list)  # of seeds that are there already

    @property
    def stage(self) -> str:
        return self.results[0].stage

    @property
    def settings(self) -> dict:
        return self.results[0].settings

    @property
    def seeds(self) -> list[int]:
        return [r.seed for r in self.results]

    def per_user(self, measure: str) -> np.ndarray:
        return np.mean([r.values[measure] for r in self.results], axis=0)

    def mean(self, measure: str) -> float:
        return float(self.per_user(measure).mean())

    def measured(self, measure: str) -> bool:
        return any(measure in r.values for r in self.results)


# Options of the objective: always named where they are not the paper's; of some losses only.
SHOWN = {
    "margin": ("recpo",),
    "margin_lambda": ("recpo",),
    "num_negatives": ("recpo", "sdpo"),
    "beta": PREFERENCE_LOSSES,
    "sft_weight": PREFERENCE_LOSSES,
    "negative_source": PREFERENCE_LOSSES,
    "decay": ("sft", *PREFERENCE_LOSSES),
    "history_items": ("sft", *PREFERENCE_LOSSES),
    "ratings": ("sft", *PREFERENCE_LOSSES),
}

SIGNS = {"margin_lambda": "λ", "num_negatives": "K", "beta": "β"}

ORDER = [
    "random",
    "popularity",
    "item-knn",
    "markov",
    "gru4rec",
    "caser",
    "sasrec",
    "raw",
    "sft",
    "dpo",
    "ipo",
    "simpo",
    "cpo",
    "odpo",
    "kto",
    "sdpo",
    "recpo",
]

WORDS = {
    ("history_items", "positive"): ", liked items only",
    ("ratings", False): ", no ratings",
    ("sft_weight", 1.0): " + NLL",
}


def option_text(option: str, value) -> str:
    """How a name shows an option: " λ=4", " log_diff", ", no ratings", ", learning_rate=0.001"."""
    if (option, value) in WORDS:
        return WORDS[option, value]
    if option == "margin":
        return f" {value}"
    value = f"{value:g}" if isinstance(value, float) else value
    if option in SIGNS or option in SHOWN:
        return f" {SIGNS.get(option, option)}={value}"
    return f", {option}={value}"


def shown_options(settings: dict, stage: str, usual: dict) -> dict:
    """Options in a name: of the objective those not the paper's, of the rest those not usual."""
    defaults = asdict(TrainConfig())
    shown = {}
    for option, value in settings.items():
        expected = defaults[option] if stage in SHOWN.get(option, ()) else usual.get(option)
        if value != expected:
            shown[option] = value
    return dict(sorted(shown.items(), key=lambda pair: _place(pair[0])))


def _place(option: str) -> int:
    order = [o for o in SHOWN if o not in ("history_items", "ratings")]
    if option in order:
        return order.index(option)
    return len(order)


def usual_values(group: list[Result]) -> dict:
    """Of each option the value that most results have; among equals the default, then the first."""
    defaults = defaults_of(group[0].config)
    usual = {}
    for option in {option: None for r in group for option in r.settings}:
        counts = Counter(json.dumps(r.settings.get(option)) for r in group)
        default = json.dumps(comparable(defaults.get(option.split(" ")[-1])))
        usual[option] = json.loads(max(counts, key=lambda v: (counts[v], v == default)))
    return usual


def method_name(stage: str, shown: dict) -> str:
    return stage + "".join(option_text(option, value) for option, value in shown.items())


def grouped(results: list[Result]) -> dict[str, Method]:
    """Name -> method, in the order of the paper's tables; a seed that comes twice counts once."""
    stages = defaultdict(list)
    for r in results:
        stages[r.stage].append(r)
    methods: dict[str, Method] = {}
    for stage, group in stages.items():
        usual = usual_values(group)
        for r in group:
            shown = shown_options(r.settings, stage, usual)
            name = method_name(stage, shown)
            method = methods.setdefault(name, Method(name, shown=shown))
            if r.seed in method.seeds:
                method.repeats.append(r)
            else:
                method.results.append(r)
    rank = {name: i for i, name in enumerate(ORDER)}
    ordered = sorted(methods.values(), key=lambda m: (rank.get(m.stage, 99), len(m.shown), m.name))
    return {m.name: m for m in ordered}


def base_method(methods: dict[str, Method], stage: str) -> Method | None:
    """The method of a stage that departs least from the paper and the usual, with the most runs."""
    found = [m for m in methods.values() if m.stage == stage]
    return min(found, key=lambda m: (len(m.shown), -len(m.results)), default=None)


def shared_options(results: list[Result]) -> dict:
    """Options that all trained stages share and that are not the default."""
    trained = [r for r in results if "method" not in r.config]
    if not trained:
        return {}
    defaults = asdict(TrainConfig())
    shared = {}
    for option, value in trained[0].config.items():
        if option not in defaults or option in NOT_THE_METHOD or value == defaults[option]:
            continue
        if all(r.config.get(option) == value for r in trained):
            shared[option] = value
    return shared


def same_seeds(a: Method, b: Method) -> tuple[Method, Method]:
    """Both without the runs whose seed the other one lacks, where they share some.

    A stage starts from its seed's SFT result, so runs of one seed belong together."""
    shared = set(a.seeds) & set(b.seeds)
    if not shared:
        return a, b
    return tuple(Method(m.name, [r for r in m.results if r.seed in shared]) for m in (a, b))


def difference_of(a: Method, b: Method, measure: str) -> Difference:
    """a - b over the same users, seeds averaged first; judge() gives interval and verdict."""
    a, b = (Method(m.name, [r for r in m.results if measure in r.values]) for m in (a, b))
    a, b = same_seeds(a, b)
    values = a.per_user(measure) - b.per_user(measure)
    runs = len(a.results), len(b.results)
    return Difference(float(values.mean()), resampled_means(values), runs)


def compare(a: Method, b: Method, measure: str) -> Difference:
    """One question by itself: a - b with its 95 % interval."""
    difference = difference_of(a, b, measure)
    judge([difference])
    return difference


SWEPT = {  # option -> its sign on the axis, title of the picture
    "margin_lambda": ("λ", "λ (Figure 6)"),
    "num_negatives": ("K", "Rejected titles per prompt, K"),
    "decay": ("decay", "Decay of the preference score"),
}


def sweep(methods: dict[str, Method], option: str) -> list[tuple[float, Method]]:
    """(value, method) of RecPO with one option changed, in order of its value; runs of one seed."""
    base = base_method(methods, "recpo")
    if base is None:
        return []
    points = []
    for m in methods.values():
        if m.stage == "recpo" and differing(m.settings, base.settings) <= {option}:
            points.append((m.settings[option], m))
    plain = base_method(methods, "sdpo")
    if option == "margin_lambda" and plain:  # λ = 0, unless trained in another way besides
        others = set(PREFERENCE_OPTIONS) - {"margin", "margin_lambda"}
        if not differing(plain.settings, base.settings) & others:
            points.append((0.0, plain))
    seeds = [set(m.seeds) for _, m in points]
    shared = sorted(set.intersection(*seeds)) if seeds else []
    if not shared:
        return []
    ladder = []
    for value, m in sorted(points, key=lambda pair: pair[0]):
        runs = [r for r in m.results if r.seed == shared[0]]
        ladder.append((value, Method(m.name, runs, m.shown)))
    return ladder


def input_methods(methods: dict[str, Method]) -> dict[str, Method]:
    """SFT results that differ in what a prompt shows alone."""
    base = base_method(methods, "sft")
    found = [m for m in methods.values() if m.stage == "sft"]
    inputs = {"history_items", "ratings"}
    return {m.name: m for m in found if differing(m.settings, base.settings) <= inputs}


def differing(a: dict, b: dict) -> set[str]:
    return {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)}


def probe_rows(methods: dict[str, Method], probe: str) -> dict[str, list[dict]]:
    """Name -> that row of each run: recommenders that need no training first, then every method."""
    rows: dict[str, list[dict]] = {}
    for method in methods.values():
        contents = [r.probes[probe] for r in method.results if probe in r.probes]
        for content in contents:
            for name, row in content["rows"].items():
                if "," not in name:
                    rows.setdefault(name, [row])  # the same for every run
    for method in methods.values():
        contents = [r.probes[probe] for r in method.results if probe in r.probes]
        for how in ("written", "ranked first"):
            name = f"{method.stage}, {how}"
            found = [c["rows"][name] for c in contents if name in c["rows"]]
            if found:
                rows[f"{method.name}; {how}"] = found
    return rows


def mean_bins(group: list[dict]) -> dict[str, dict]:
    """Means over runs; the users are the same, so variances are averaged, not divided."""
    bins = {}
    for name, entry in group[0]["bins"].items():
        entries = [g["bins"][name] for g in group]
        bins[name] = {"n": entry["n"]}
        for key in ("hit_ratio@1", "variance"):
            bins[name][key] = float(np.mean([e[key] for e in entries]))
    return bins
