"""Beyond accuracy: does a method recommend ever the same popular items, and is it as sure as right?

    coverage        share of the catalogue that is ranked first for at least one test user
    top 1 %         share of first places that go to the 1 % of the items that training saw most
    popularity      mean percentile of the first place: the share of the catalogue that training
                    saw less often, equals counted half
    calibration     expected calibration error: the probability of the first place (softmax over
                    the 20 log-probs) against how often it is right, in ten bins of equal width,
                    their differences weighted by their users

Read from predictions.jsonl, averaged over the runs of a method. Intervals resample users. A
resample repeats users, so it covers fewer items and looks less calibrated than its original.
Therefore calibration's resamples are moved onto the value that was seen, and coverage is resampled
by what each user adds to it alone, as a jackknife does, whose spread is never too small on average
(Efron and Stein 1981). Changes from SFT to a
preference method resample the same users on both sides, and hold together (Holm, 95 %).

Left out: scores of counting recommenders are no log-probs and have no calibration; without the
prepared examples nobody knows what is popular, and calibration alone is left.
Legend: n users, R resamples, I items.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loaders.counting import item_counts
from loaders.frozen import Prepared, find_prepared
from studies.methods import Method, base_method, same_seeds
from studies.results import Result, read_records
from studies.statistics import Difference, interval_of, judge
from train import PREFERENCE_LOSSES

RESAMPLES = 2000
NUM_BINS = 10  # of probability
COUNTING = ("random", "popularity", "item-knn", "markov")
MEASURES = {
    "coverage": "coverage of the catalogue",
    "top": "first places to the top 1 %",
    "percentile": "mean popularity percentile",
    "calibration": "calibration error",
}


@dataclass
class FirstPlaces:
    """What one run ranked first for each test user."""

    items: np.ndarray  # (n,) item codes; empty where the catalogue is not at hand
    probabilities: np.ndarray  # (n,) of the first place; empty for counting scores
    hits: np.ndarray  # (n,) bool: it is the target


@dataclass
class Catalogue:
    """What is known about the items."""

    codes: dict[str, int]  # title -> item code
    percentile: np.ndarray  # (I,) share of the items that training saw less often
    top: np.ndarray  # (I,) bool: one of the 1 % that training saw most

    @staticmethod
    def of(prepared: Prepared) -> "Catalogue":
        counts = item_counts(prepared.interactions)
        ordered = np.sort(counts)
        below = np.searchsorted(ordered, counts)
        equal = np.searchsorted(ordered, counts, "right") - below
        top = np.zeros(len(counts), bool)
        most = np.argsort(-counts, kind="stable")  # of equally popular ones the lower code
        top[most[: max(1, len(counts) // 100)]] = True
        codes = {title: code for code, title in enumerate(prepared.interactions.titles)}
        return Catalogue(codes, (below + equal / 2) / len(counts), top)


def find_catalogue(results: list[Result]) -> Catalogue | None:
    """Of the prepared examples that the results were tested on, if they are at hand."""
    some = results[0]
    content = some.metrics.get("data_hash")
    folder = some.config.get("prepared_dir", "prepared")
    prepared = find_prepared(folder, content) if content else None
    return Catalogue.of(prepared) if prepared else None


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def first_places(result: Result, catalogue: Catalogue | None) -> FirstPlaces:
    file = result.folder / "eval" / "predictions.jsonl"
    records = read_records(file)
    scores = np.array([r["logps"] for r in records], float)
    slots = scores.argmax(1)  # candidates stand in random order: so does the first of equals
    targets = np.array([r["target_slot"] for r in records])
    items = np.zeros(0, np.int64)
    if catalogue:
        titles = [r["candidates"][slot] for r, slot in zip(records, slots, strict=True)]
        missing = [title for title in titles if title not in catalogue.codes]
        if missing:
            raise ValueError(f"{file}: {missing[0]!r} is no title of the prepared examples")
        items = np.array([catalogue.codes[title] for title in titles])
    probabilities = np.zeros(0)
    if result.stage not in COUNTING:
        probabilities = softmax(scores).max(1)
    return FirstPlaces(items, probabilities, slots == targets)


def covered(items: np.ndarray, draws: np.ndarray, num_items: int) -> np.ndarray:
    """(R,) share of the catalogue that the users of each draw, (R, n) indices, cover.

    Linear in the users: the share of all of them, and for every user who is drawn once more or not
    at all what the coverage loses without the user (an item that is nobody else's)."""
    _, codes, counts = np.unique(items, return_inverse=True, return_counts=True)
    alone = (counts[codes] == 1).astype(float)  # (n,)
    return (len(counts) + alone[draws].sum(1) - alone.sum()) / num_items


def bins_of(probabilities: np.ndarray) -> np.ndarray:
    """(n,) which of the bins of equal width; 1 belongs to the last."""
    return np.minimum((probabilities * NUM_BINS).astype(int), NUM_BINS - 1)


def calibration_errors(places: FirstPlaces, draws: np.ndarray) -> np.ndarray:
    """(R,) sum over bins of |right - expected| / n: their differences weighted by users."""
    gaps = places.hits - places.probabilities
    which = bins_of(places.probabilities)
    total = np.zeros(len(draws))
    for k in range(NUM_BINS):
        total += np.abs(np.where(which == k, gaps, 0.0)[draws].sum(1))
    return total / draws.shape[1]


def values_of(
    measure: str, places: FirstPlaces, catalogue: Catalogue | None, draws: np.ndarray
) -> np.ndarray:
    """(R,) the measure among the users of each draw, (R, n) indices."""
    if measure == "calibration":
        return calibration_errors(places, draws)
    if measure == "coverage":
        return covered(places.items, draws, len(catalogue.top))
    per_item = catalogue.top if measure == "top" else catalogue.percentile
    return per_item[places.items][draws].mean(1)


def resampled(
    measure: str, runs: list[FirstPlaces], catalogue: Catalogue | None
) -> tuple[float, np.ndarray]:
    """(value, (RESAMPLES,) of resampled users), averaged over runs; every call draws alike."""
    n = len(runs[0].hits)
    whole = np.arange(n)[None]
    value = np.mean([values_of(measure, r, catalogue, whole)[0] for r in runs])
    rng, drawn = np.random.default_rng(0), []
    for _ in range(RESAMPLES // 100):  # in portions: all draws at once would take gigabytes
        draws = rng.integers(n, size=(100, n))
        drawn.append(np.mean([values_of(measure, r, catalogue, draws) for r in runs], axis=0))
    means = np.concatenate(drawn)
    if measure == "calibration":
        means += value - means.mean()
    return float(value), means


def measurable(measure: str, runs: list[FirstPlaces]) -> bool:
    needed = "probabilities" if measure == "calibration" else "items"
    return all(len(getattr(r, needed)) for r in runs)


@dataclass
class Beyond:
    """The measures of every method, and the changes from SFT."""

    methods: dict[str, Method]
    catalogue: Catalogue | None
    runs: dict[Path, FirstPlaces]  # folder of a result -> its first places

    @staticmethod
    def of(methods: dict[str, Method]) -> "Beyond":
        results = [r for m in methods.values() for r in m.results]
        catalogue = find_catalogue(results)
        runs = {r.folder: first_places(r, catalogue) for r in results}
        return Beyond(methods, catalogue, runs)

    def places(self, method: Method) -> list[FirstPlaces]:
        return [self.runs[r.folder] for r in method.results]

    def rows(self) -> list[list[str]]:
        rows = []
        for name, method in self.methods.items():
            cells = []
            for measure in MEASURES:
                if not measurable(measure, self.places(method)):
                    cells.append("")
                    continue
                value, means = resampled(measure, self.places(method), self.catalogue)
                low, high = interval_of(means)
                cells.append(f"{value:.4f} [{max(0.0, low):.3f}, {high:.3f}]")
            rows.append([name, str(len(method.results)), *cells])
        return rows

    def difference(self, measure: str, a: Method, b: Method) -> Difference:
        """a - b over the same users and, where they share some, the same seeds."""
        a, b = same_seeds(a, b)
        (one, ones), (other, others) = (
            resampled(measure, self.places(m), self.catalogue) for m in (a, b)
        )
        runs = len(a.results), len(b.results)
        return Difference(one - other, ones - others, runs)

    def change_rows(self) -> list[list[str]]:
        """One row per preference method: each measure's change from SFT; Holm over the table."""
        start = base_method(self.methods, "sft")
        if start is None:
            return []
        changes = {}
        for name, method in self.methods.items():
            if method.stage not in PREFERENCE_LOSSES:
                continue
            for measure in MEASURES:
                if measurable(measure, self.places(method) + self.places(start)):
                    changes[name, measure] = self.difference(measure, method, start)
        judge(list(changes.values()))
        rows = []
        for name in dict.fromkeys(name for name, _ in changes):
            cells = []
            for measure in MEASURES:
                change = changes.get((name, measure))
                cells.append(f"{change}: {change.verdict}" if change else "")
            rows.append([f"{name} − {start.name}", *cells])
        return rows


def draw_reliability(plt, beyond: Beyond, file: Path) -> bool:
    """How often the first place is right over its probability; False if no method has any."""
    runs = {name: beyond.places(method) for name, method in beyond.methods.items()}
    runs = {name: r for name, r in runs.items() if measurable("calibration", r)}
    if not runs:
        return False
    columns = min(4, len(runs))
    lines = -(-len(runs) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.2 * columns, 3.4 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(runs) :]:
        axis.axis("off")
    for axis, (name, places) in zip(axes.flat, runs.items(), strict=False):
        probabilities = np.concatenate([p.probabilities for p in places])
        hits = np.concatenate([p.hits for p in places])
        which = bins_of(probabilities)
        counts = np.bincount(which, minlength=NUM_BINS)
        filled = counts > 0
        right = np.bincount(which, hits, NUM_BINS)[filled] / counts[filled]
        expected = np.bincount(which, probabilities, NUM_BINS)[filled] / counts[filled]
        centres = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
        axis.bar(centres, counts / counts.sum(), 1 / NUM_BINS, color="0.85", label="share of users")
        axis.plot([0, 1], [0, 1], ":", color="0.5")
        axis.plot(expected, right, marker="o", label="right")
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the first place")
        axis.set_title(name, fontsize=8)
    axes[0, 0].set_ylabel("how often it is right")
    axes[0, 0].legend(fontsize=7, loc="upper left")
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return True
