"""Tables and pictures from run folders: measured values with intervals, the paper's figure beside, and which differences are real.

    python -m studies.report runs/planted-table --output_dir results/planted-table

Every finished stage and baseline under the folder is a result. Results are one method, its figures their mean, if their
whole configuration but seed and paths is equal, that of the stage they start from included; a method's name says what of its
objective is not the paper's, and every other option in which it differs from most of its kind. A seed counts once. All must
have been tested on the same users, candidates and targets; if not, the report refuses and names them.

Differences are paired over users and over the seeds that both methods have (seeds averaged first); intervals resample
users, so they say nothing of another seed: the number of training runs stands beside each. Where a table asks several
questions, Holm's correction holds for all of them together. An interval that holds 0 is "not distinguishable".

Writes report.md and, with matplotlib, curves.png, margins.png and, where there are runs for them, a picture of each swept option
(margin_lambda, num_negatives, decay), inputs.png and length.png.

References: the paper's Tables 1 and 2 (LLaMA3-8B rows; they are other candidates and another model: context, not a target).
"""

import argparse
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch

from baselines import ranking_metrics
from common import read_json, run_cli
from data import DataConfig, find_prepared
from losses import MARGINS, preference_score, target_margins
from objectives import PREFERENCE_LOSSES
from options import TrainConfig
from runs import FREE_TO_CHANGE
from studies.inspection import statistics
from studies.probes import SPREAD_COLUMNS, spread_cells, spread_of_bins
from studies.sequential import BaselineConfig

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

    stage: str  # or the baseline's method
    run: Path  # folder of the run
    config: dict
    folder: Path  # with metrics.jsonl and eval/
    settings: dict  # every option but seed and paths, and those of the stage it starts from
    values: dict[str, np.ndarray]  # measure -> (n,) per user
    candidates: dict[str, str]  # "test" or a probe -> hash of users, candidates and targets
    metrics: dict
    probes: dict[str, dict] = field(default_factory=dict)  # probe -> its metrics.json

    @property
    def seed(self) -> int:
        return self.config.get("seed", 0)


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


# ------------------------------------------------------------------------------------------------ what makes a method
# Not part of a method: the seed, paths, and what a run may change when it goes on.
NOT_THE_METHOD = {"seed", "data_dir", "item_file", "download", *FREE_TO_CHANGE.split()}
PREFERENCE_OPTIONS = [
    "beta",
    "margin",
    "margin_lambda",
    "num_negatives",
    "negative_source",
    "reference_free",
    "label_smoothing",
    "ipo_average",
    "simpo_gamma",
    "odpo_offset",
    "odpo_alpha",
    "kto_desirable",
    "kto_undesirable",
    "sft_weight",
    "epochs",
    "learning_rate",
]
# What only the stage sees that a preference stage starts from.
START_OPTIONS = [
    "model",
    "adapter",
    "tiny_hidden_size",
    "tiny_layers",
    "tiny_vocab_size",
    "copy_steps",
    "copy_weight",
    "sft_lora_r",
    "sft_epochs",
    "sft_learning_rate",
    "lora_dropout",
]
# Options of the objective: always named where they are not the paper's; of some losses only.
SHOWN = {
    "margin": ("recpo",),
    "margin_lambda": ("recpo",),
    "num_negatives": ("recpo", "sdpo"),
    "beta": PREFERENCE_LOSSES,
    "sft_weight": PREFERENCE_LOSSES,
    "negative_source": PREFERENCE_LOSSES,
    "reference_free": PREFERENCE_LOSSES,
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


def defaults_of(config: dict) -> dict:
    """Every option of the script that wrote this configuration, at its default."""
    return asdict(BaselineConfig() if "method" in config else TrainConfig())


def origin_of(run: Path, config: dict) -> Path | None:
    """The stage of another run that this run starts from, wherever both have been moved together."""
    start = Path(config.get("adapter") or config.get("model", ""))
    for folder in (start, run.parent.joinpath(*start.parts[-2:])):
        file = folder.parent / "config.json"
        if folder.parent != run and file.exists() and "stages" in read_json(file):
            return folder
    return None


def settings_of(stage: str, run: Path, config: dict) -> dict:
    """Every option but seed and paths; what only an earlier stage has seen stands under its name."""
    complete = defaults_of(config) | config
    settings = {k: _number(v) for k, v in complete.items() if k not in NOT_THE_METHOD}
    if stage not in PREFERENCE_LOSSES:
        return settings
    origin = origin_of(run, config)
    if origin:
        earlier = origin.name
        start = settings_of(earlier, origin.parent, read_json(origin.parent / "config.json"))
    else:
        earlier = "sft" if "sft" in _stages(config) else "raw"
        start = settings
    if earlier not in PREFERENCE_LOSSES:
        start = {k: v for k, v in start.items() if k not in PREFERENCE_OPTIONS}
    own = {k: v for k, v in settings.items() if k not in START_OPTIONS}
    return own | {f"{earlier} {k}": v for k, v in start.items()}


def _number(value):
    """1 and 1.0 are one value."""
    return float(value) if type(value) is int else value


def _stages(config: dict) -> list[str]:
    return [s.strip() for s in config.get("stages", "").split(",")]


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
    """Options in a name: of the objective what is not the paper's, of the rest what is not usual."""
    defaults = asdict(TrainConfig())
    shown = {}
    for option, value in settings.items():
        expected = defaults[option] if stage in SHOWN.get(option, ()) else usual.get(option)
        if value != expected:
            shown[option] = value
    return dict(sorted(shown.items(), key=lambda pair: _place(pair[0])))


def _place(option: str) -> int:
    order = [o for o in SHOWN if o not in ("history_items", "ratings")]
    return order.index(option) if option in order else len(order)


def usual_values(group: list[Result]) -> dict:
    """Of each option the value that most results have; among equals the default, then the first."""
    defaults = defaults_of(group[0].config)
    usual = {}
    for option in {option: None for r in group for option in r.settings}:
        counts = Counter(json.dumps(r.settings.get(option)) for r in group)
        default = json.dumps(_number(defaults.get(option.split(" ")[-1])))
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
    first = trained[0].config
    return {
        k: v
        for k, v in first.items()
        if k in defaults
        and k not in NOT_THE_METHOD
        and v != defaults[k]
        and all(r.config.get(k) == v for r in trained)
    }


# ------------------------------------------------------------------------------------------------ collecting
def collect(folder: Path) -> list[Result]:
    """Every stage and baseline below the folder that has been tested, with its probes."""
    results = []
    for file in sorted(folder.glob("**/eval/metrics.json")):
        stage = file.parent.parent
        run = stage if _is_baseline(stage) else stage.parent
        if not (run / "config.json").exists():
            continue
        config = read_json(run / "config.json")
        name = config["method"] if run == stage else stage.name
        results.append(read_result(name, run, config, stage))
    if not results:
        raise ValueError(f"{folder}: no finished stage of a run (eval/metrics.json) below it")
    return results


def _is_baseline(folder: Path) -> bool:
    file = folder / "config.json"
    return file.exists() and "method" in read_json(file)


def read_result(stage: str, run: Path, config: dict, folder: Path) -> Result:
    """A tested stage: test split and probes, each with the hash of what it was tested on."""
    records = read_records(folder / "eval" / "predictions.jsonl")
    values = {
        "hit_ratio@1": np.array([r["hit"] for r in records], float),
        "valid_ratio": np.array([r["valid"] for r in records], float),
        "ranking/hit_ratio@1": ranked_first(records),
    }
    candidates = {"test": digest_of(records)}
    probes = {}
    for file in sorted((run / "probes" / stage).glob("*/metrics.json")):
        probe, probed = file.parent.name, read_records(file.parent / "predictions.jsonl")
        probes[probe] = read_probe(file)
        candidates[probe] = digest_of(probed)
        values |= probe_values(probe, probed)
    settings = settings_of(stage, run, config)
    metrics = read_json(folder / "eval" / "metrics.json")
    return Result(stage, run, config, folder, settings, values, candidates, metrics, probes)


def read_probe(file: Path) -> dict:
    content = read_json(file)
    if any("bins" in row and "spread" not in row for row in content["rows"].values()):
        raise ValueError(f"{file}: bins of an older version, without intervals; measure it again")
    return content


def read_records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def digest_of(records: list[dict]) -> str:
    facts = [[r["user"], r["candidates"], r["target"]] for r in records]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def ranked_first(records: list[dict]) -> np.ndarray:
    """(n,) 1 where the target has the best score; shared among equals."""
    scores = np.array([r["logps"] for r in records])
    targets = np.array([r["target_slot"] for r in records])
    return ranking_metrics(scores, targets)["hit_ratio@1"]


def probe_values(probe: str, records: list[dict]) -> dict[str, np.ndarray]:
    """What each user counts for in a probe, as written and as ranked first."""
    hits = np.array([r["hit"] for r in records], float)
    ranked = ranked_first(records)
    if probe == "avoidance":  # a listed answer that is another title
        hits = np.array([r["valid"] for r in records], float) - hits
        ranked = 1 - ranked
    return {f"{probe}/written": hits, f"{probe}/ranked": ranked}


def check_candidates(results: list[Result]) -> None:
    """The test split, and each probe, must be the same users and candidates everywhere."""
    for what in {name: None for r in results for name in r.candidates}:
        groups = defaultdict(list)
        for r in results:
            if what in r.candidates:
                groups[r.candidates[what]].append(str(r.folder))
        if len(groups) > 1:
            folders = "; ".join(f"{d[:12]}: {', '.join(f[:3])}" for d, f in groups.items())
            raise ValueError(
                f"these were tested on different users or candidates ({what}) "
                f"and cannot stand in one table: {folders}"
            )


# ------------------------------------------------------------------------------------------------ statistics
def resampled_means(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """(RESAMPLES,) means over users drawn with replacement."""
    rng, n, means = np.random.default_rng(seed), len(values), []
    for _ in range(RESAMPLES // 100):  # in portions: all draws at once would take gigabytes
        means.append(values[rng.integers(n, size=(100, n))].mean(1))
    return np.concatenate(means)


def interval_of(means: np.ndarray, alpha: float = 0.05) -> tuple[float, float]:
    low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)


def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over users, by resampling users."""
    return interval_of(resampled_means(values, seed))


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p of as uneven a split of the users that one gets right and the other does not."""
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(
        math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2))
        for i in range(k + 1)
    )
    return min(1.0, 2 * tail)


@dataclass
class Difference:
    """One question: is a above b? The answer's interval depends on how many questions are asked."""

    mean: float
    means: np.ndarray  # of resampled users
    runs: tuple[int, int]  # training runs on either side
    interval: tuple[float, float] = (0.0, 0.0)
    verdict: str = ""  # "higher", "lower", "not distinguishable"

    @property
    def p(self) -> float:
        """Two-sided: how often the resampled mean lies on the other side of 0."""
        beyond = min((self.means <= 0).mean(), (self.means >= 0).mean())
        return min(1.0, 2 * float(beyond))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.mean:+.4f} [{low:+.3f}, {high:+.3f}]"


def same_seeds(a: Method, b: Method) -> tuple[Method, Method]:
    """Both without the runs whose seed the other one lacks, where they share some.

    A stage starts from its seed's SFT result, so runs of one seed belong together."""
    shared = set(a.seeds) & set(b.seeds)
    if not shared:
        return a, b
    return tuple(Method(m.name, [r for r in m.results if r.seed in shared]) for m in (a, b))


def difference_of(a: Method, b: Method, measure: str) -> Difference:
    """a - b over the same users, seeds averaged first; judge() gives the interval and the verdict."""
    a, b = (Method(m.name, [r for r in m.results if measure in r.values]) for m in (a, b))
    a, b = same_seeds(a, b)
    values = a.per_user(measure) - b.per_user(measure)
    runs = len(a.results), len(b.results)
    return Difference(float(values.mean()), resampled_means(values), runs)


def judge(family: list[Difference], alpha: float = 0.05) -> None:
    """Holm: of m questions the k-th clearest is judged at alpha / (m - k + 1).

    Those behind the first that holds 0 are judged at its level, so that all their intervals hold 0 too."""
    left = len(family)
    for difference in sorted(family, key=lambda d: d.p):
        low, high = difference.interval = interval_of(difference.means, alpha / left)
        if low <= 0 <= high:
            difference.verdict = "not distinguishable"
        else:
            difference.verdict = "higher" if low > 0 else "lower"
            left -= 1


def compare(a: Method, b: Method, measure: str) -> Difference:
    """One question by itself: a - b with its 95 % interval."""
    difference = difference_of(a, b, measure)
    judge([difference])
    return difference


# ------------------------------------------------------------------------------------------------ tables
def cell(method: Method, measure: str) -> str:
    low, high = bootstrap(method.per_user(measure))
    text = f"{method.mean(measure):.4f} [{low:.3f}, {high:.3f}]"
    if len(method.results) > 1:
        seeds = [f"{r.values[measure].mean():.3f}" for r in method.results]
        text += f" (seeds {', '.join(seeds)})"
    return text


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def best_other(method: Method, methods: dict[str, Method], measure: str) -> Method | None:
    others = [m for m in methods.values() if m is not method]
    return max(others, key=lambda m: m.mean(measure), default=None)


def versus_best(methods: dict[str, Method], measure: str) -> dict[str, str]:
    """Name -> the paired comparison with the best other method; Holm over all of them."""
    pairs = {m.name: best_other(m, methods, measure) for m in methods.values()}
    differences = {
        name: difference_of(methods[name], best, measure) for name, best in pairs.items() if best
    }
    judge(list(differences.values()))
    texts = {}
    for name, difference in differences.items():
        best = pairs[name]
        texts[name] = f"{difference} to {best.name}: {difference.verdict}"
        one, other = same_seeds(methods[name], best)
        if len(one.results) == len(other.results) == 1:
            p = mcnemar(one.results[0].values[measure], other.results[0].values[measure])
            texts[name] += f" (McNemar p {f'{p:.3f}' if p >= 0.001 else '< 0.001'}, uncorrected)"
    return texts


def printed_in_paper(method: Method, paper: dict) -> str:
    """HR@1 and ValidRatio of the paper's method of that name."""
    if method.name not in paper:
        return ""
    hit_ratio, valid_ratio = paper[method.name]
    return f"{hit_ratio:.4f}" if valid_ratio is None else f"{hit_ratio:.4f}, {valid_ratio:.4f}"


def main_table(methods: dict[str, Method], dataset: str) -> str:
    """Table 1: every method, a paired comparison with the best other one, and the paper's figure."""
    some = next(iter(methods.values())).results[0]
    paper = PAPER.get(dataset, {})
    n = len(some.values["hit_ratio@1"])
    columns = ["method", "runs", "HR@1 written", "ValidRatio", "HR@1 ranked first"]
    columns += ["against the best other, ranked first"]
    columns += ["paper: HR@1, ValidRatio"] if paper else []
    rows = []
    for name, value in some.metrics["baselines"].items():
        rows.append([name, "", "", "", f"{value:.4f}", *[""] * (len(columns) - 5)])
    versus = versus_best(methods, MEASURES[-1])
    for name, method in methods.items():
        cells = [cell(method, measure) for measure in MEASURES]
        row = [name, str(len(method.results)), *cells, versus.get(name, "")]
        rows.append([*row, printed_in_paper(method, paper)] if paper else row)
    lines = [
        f"n = {n:,} test users, 20 candidates, the same for all (hash {some.candidates['test'][:12]}).",
        "Runs: training runs, one seed each. Intervals resample users, so they do not cover another seed; those of the",
        f"comparisons with the best other method hold for all {len(versus)} of them together (Holm, 95 %).",
        *shared_lines([r for m in methods.values() for r in m.results]),
        *repeat_lines(methods),
        "",
        table(columns, rows),
    ]
    return "\n".join(lines)


def shared_lines(results: list[Result]) -> list[str]:
    shared = shared_options(results)
    text = ", ".join(f"{k} {v}" for k, v in shared.items())
    return [f"Options of all trained stages that are not the defaults: {text}."] if shared else []


def repeat_lines(methods: dict[str, Method]) -> list[str]:
    repeats = [f"{r.folder} ({m.name}, seed {r.seed})" for m in methods.values() for r in m.repeats]
    return (
        [f"Not counted, because that seed is there already: {'; '.join(repeats)}."]
        if repeats
        else []
    )


def data_table(config: dict, data_hash: str) -> str:
    """Table 3: sizes of the data set here and in the paper; only a line if its prepared examples are not at hand."""
    prepared = data_hash and find_prepared(config.get("prepared_dir", "prepared"), data_hash)
    if not prepared:
        return f"The prepared examples {data_hash} are not at hand; `python data.py` prints their statistics."
    known = {f.name for f in fields(DataConfig)}
    options = DataConfig(**{k: v for k, v in config.items() if k in known})
    lines = statistics(options, prepared).splitlines()
    return "\n".join(
        f"- {line.strip()}" if line and not line.startswith("|") else line for line in lines
    )


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
            found = [
                c["rows"][f"{method.stage}, {how}"]
                for c in contents
                if f"{method.stage}, {how}" in c["rows"]
            ]
            if found:
                rows[f"{method.name}; {how}"] = found
    return rows


def probe_tables(methods: dict[str, Method]) -> str:
    """The probes' rows, averaged over the runs of a method."""
    sizes = {
        probe: content["n"]
        for m in methods.values()
        for r in m.results
        for probe, content in r.probes.items()
    }
    lines = []
    for probe, n in sorted(sizes.items()):
        rows = probe_rows(methods, probe)
        text = length_table(rows) if probe == "length" else figures_table(rows)
        lines += ["", f"**{probe}** (n = {n:,})", "", text]
    return "\n".join(lines)


def row_name(name: str, group: list[dict]) -> str:
    return name if len(group) == 1 else f"{name} (mean of {len(group)} runs)"


def figures_table(rows: dict[str, list[dict]]) -> str:
    first = next(iter(rows.values()))[0]
    figures = [key for key in first if not key.endswith("_ci95")]
    lines = []
    for name, group in rows.items():
        cells = []
        for key in figures:
            mean = np.mean([g[key] for g in group])
            width = np.mean([g[f"{key}_ci95"][1] - g[f"{key}_ci95"][0] for g in group]) / 2
            cells.append(f"{mean:.4f}" if name == "chance" else f"{mean:.4f} ± {width:.3f}")
        lines.append([row_name(name, group), *cells])
    return table(["", *figures], lines)


def mean_bins(group: list[dict]) -> dict[str, dict]:
    """One run's bins, with the means over runs; users are the same, so variances are averaged, not divided."""
    bins = {}
    for name, entry in group[0]["bins"].items():
        entries = [g["bins"][name] for g in group]
        means = {
            key: float(np.mean([e[key] for e in entries])) for key in ("hit_ratio@1", "variance")
        }
        bins[name] = {"n": entry["n"], **means}
    return bins


def length_table(rows: dict[str, list[dict]]) -> str:
    some = next(iter(rows.values()))[0]
    columns = ["HR@1 by history length"]
    columns += [f"{name} (n = {entry['n']})" for name, entry in some["bins"].items()]
    columns += SPREAD_COLUMNS
    lines = []
    for name, group in rows.items():
        bins = mean_bins(group)
        spread = spread_of_bins(bins)
        cells = [
            f"{b['hit_ratio@1']:.3f} ± {1.96 * b['variance'] ** 0.5:.3f}" for b in bins.values()
        ]
        lines.append([row_name(name, group), *cells, *spread_cells(spread)])
    return table(columns, lines)


CLAIMS = (
    ("recpo", "sdpo"),
    ("sdpo", "sft"),
    ("recpo", "sft"),
    ("recpo", "dpo"),
    ("recpo", "simpo"),
)
PROBE_CLAIMS = (("adherence", "hit_ratio@1"), ("avoidance", "avoidance"))
HIT_RATIOS = ("hit_ratio@1", "ranking/hit_ratio@1")  # written, ranked first


def asked(methods: dict[str, Method]) -> list[tuple[str, Method, Method, tuple[str, ...]]]:
    """The paper's claims that these methods can answer: (text, better, worse, measures)."""
    base = {m.stage: base_method(methods, m.stage) for m in methods.values()}
    questions = []
    for better, worse in CLAIMS:
        if better in base and worse in base:
            a, b = base[better], base[worse]
            questions.append((f"HR@1 of {a.name} above {b.name}", a, b, HIT_RATIOS))
    ladder = sweep(methods, "margin_lambda")
    if len(ladder) > 2:
        (lowest, low), (highest, high) = ladder[0], ladder[-1]
        span = f"({lowest:g} to {highest:g})"
        questions.append((f"λ raises HR@1 {span}", high, low, HIT_RATIOS))
        questions.append((f"λ lowers ValidRatio {span}", low, high, ("valid_ratio",)))
    for probe, figure in PROBE_CLAIMS:
        measures = (f"{probe}/written", f"{probe}/ranked")
        for worse in ("sdpo", "sft"):
            a, b = base.get("recpo"), base.get(worse)
            if a and b and a.measured(measures[0]) and b.measured(measures[0]):
                questions.append((f"{probe} ({figure}) of {a.name} above {b.name}", a, b, measures))
    return questions


def claims(methods: dict[str, Method]) -> str:
    """The paper's claims, each held, not held or not distinguishable here; Holm over the whole table."""
    said = {"higher": "held", "lower": "not held", "not distinguishable": "not distinguishable"}
    answers = [
        (text, [difference_of(a, b, measure) for measure in measures])
        for text, a, b, measures in asked(methods)
    ]
    family = [difference for _, differences in answers for difference in differences]
    judge(family)
    rows = []
    for text, differences in answers:
        cells = [f"{said[d.verdict]}: {d}" for d in differences]
        runs = " against ".join(str(n) for n in differences[0].runs)
        rows.append([text, runs, *cells, *[""] * (2 - len(cells))])
    if not rows:
        return ""
    return (
        "Paired over the same users. Training runs: those that stand behind each side (of the seeds that both have). "
        "Bootstrap intervals over users;\n"
        f"they do not cover another training run, and hold for all {len(family)} comparisons of this table together (Holm, 95 %).\n\n"
    ) + table(["claim of the paper", "training runs", "written", "ranked first"], rows)


SWEPT = {"margin_lambda": "λ", "num_negatives": "K", "decay": "decay"}


def sweep(methods: dict[str, Method], option: str) -> list[tuple[float, Method]]:
    """(value, method) of RecPO with one option changed, in order of its value; runs of one seed."""
    base = base_method(methods, "recpo")
    if base is None:
        return []
    found = [
        m
        for m in methods.values()
        if m.stage == "recpo" and differing(m.settings, base.settings) <= {option}
    ]
    points = [(m.settings[option], m) for m in found]
    plain = base_method(methods, "sdpo")
    if option == "margin_lambda" and plain:
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
    return {
        m.name: m
        for m in methods.values()
        if m.stage == "sft" and differing(m.settings, base.settings) <= {"history_items", "ratings"}
    }


def differing(a: dict, b: dict) -> set[str]:
    return {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)}


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
    parser.add_argument(
        "folder", type=Path, help="folder of run folders, as studies.tables leaves it"
    )
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
    if probes := probe_tables(methods):
        parts += ["", "## Probes", probes]
    if verdicts := claims(methods):
        parts += ["", "## Claims", "", verdicts]
    plt, pictures = pyplot(), []
    if plt:
        inputs = input_methods(methods)
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
        if probe_rows(methods, "length"):
            drawn.append(
                (
                    "length.png",
                    "HR@1 by history length (Figure 4 d)",
                    lambda f: draw_length(plt, methods, f),
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
