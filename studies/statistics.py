"""Intervals, paired tests, Holm's correction, and the spread between bins beyond sampling."""

import math
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
# degrees of freedom -> the 2.5 and 97.5 % quantiles of the chi-square distribution
CHI_SQUARE = {1: (0.000982069117, 5.02388619), 2: (0.0506356160, 7.37775891)}
CHI_SQUARE |= {3: (0.215795283, 9.34840360), 4: (0.484418557, 11.1432868)}


def resampled_means(values: np.ndarray) -> np.ndarray:
    """(RESAMPLES,) means of values (n,) over users drawn with replacement.
    Every call draws the same users, so differences of two calls are paired."""
    rng, n, means = np.random.default_rng(0), len(values), []
    for _ in range(RESAMPLES // 100):  # in portions: all draws at once would take gigabytes
        draws = rng.integers(n, size=(100, n)) + n * np.arange(100)[:, None]
        times = np.bincount(draws.ravel(), minlength=100 * n).reshape(100, n)  # of each user
        means.append(times @ values / n)
    return np.concatenate(means)


def interval_of(means: np.ndarray, alpha: float = 0.05) -> tuple[float, float]:
    low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)


def with_interval(values: np.ndarray) -> str:
    """Mean of values (n,) over users and its 95 % interval, for a table."""
    low, high = interval_of(resampled_means(values))
    return f"{values.mean():.4f} [{low:.3f}, {high:.3f}]"


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p-value of McNemar's test.
    It asks: among users whom only one of the two gets right, are both equally likely?"""
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    n = only_a + only_b
    tail, ways = 0, 1  # ways: n over i
    for i in range(min(only_a, only_b) + 1):
        tail, ways = tail + ways, ways * (n - i) // (i + 1)
    return min(1.0, 2 * tail / 2**n)


@dataclass
class Difference:
    """One question: is a above b? The answer's interval depends on how many questions are asked."""

    mean: float
    means: np.ndarray  # of resampled users
    runs: tuple[int, int] = (1, 1)  # training runs on either side
    interval: tuple[float, float] = (0.0, 0.0)
    verdict: str = ""  # "higher", "lower", "not distinguishable"

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.mean:+.4f} [{low:+.3f}, {high:+.3f}]"


def paired(a: np.ndarray, b: np.ndarray, runs: tuple[int, int] = (1, 1)) -> Difference:
    """a - b of the same users (n,); holm() fills in interval and verdict."""
    return Difference(float((a - b).mean()), resampled_means(a - b), runs)


def holm(family: list[Difference]) -> None:
    """Judge m questions together: the k-th clearest at level 0.05 / (m - k + 1).

    A difference is clear if its resampled means seldom lie on the other side of 0. After the first
    whose interval contains 0, the rest is judged at the same level, so theirs contain 0 too."""
    left = len(family)
    clearest = sorted(family, key=lambda d: min((d.means <= 0).mean(), (d.means >= 0).mean()))
    for difference in clearest:
        low, high = difference.interval = interval_of(difference.means, 0.05 / left)
        if low <= 0 <= high:
            difference.verdict = "not distinguishable"
        else:
            difference.verdict = "higher" if low > 0 else "lower"
            left -= 1


def spread_of_bins(bins: dict[str, dict]) -> dict:
    """Standard deviation of HR@1 between up to five bins, beyond sampling error.
    It comes with its 95 % interval, and both also divided by the mean (cv).

    The moment estimate of DerSimonian and Laird (1986), with weights 1 / sampling variance, and
    Viechtbauer's Q profile (2007): every spread at which Q is a likely chi-square of B - 1 degrees.
    The interval begins at 0 if sampling alone explains the differences."""
    means = np.array([b["mean"] for b in bins.values()])
    variances = np.array([b["variance"] for b in bins.values()])
    mean, degrees = float(means.mean()), len(means) - 1

    def q(between: float) -> float:
        w = 1 / (variances + between**2)
        return float((w * (means - (w * means).sum() / w.sum()) ** 2).sum())

    if degrees == 0:
        spread, interval = math.nan, [math.nan, math.nan]
    elif not variances.all():  # no sampling error at all: what is seen is the spread
        spread = float(means.std(ddof=1))
        interval = [spread, spread]
    else:
        w = 1 / variances
        excess = (q(0.0) - degrees) / (w.sum() - (w**2).sum() / w.sum())
        spread, interval = math.sqrt(max(0.0, excess)), []
        for wanted in reversed(CHI_SQUARE[degrees]):
            low, high = 0.0, (1000.0 if q(0.0) > wanted else 0.0)
            for _ in range(80):  # q falls: where it crosses `wanted`, by bisection
                middle = (low + high) / 2
                low, high = (middle, high) if q(middle) > wanted else (low, middle)
            interval.append(high)
    relative = [x / mean if mean else math.nan for x in (spread, *interval)]
    return {"spread": spread, "spread_ci95": interval, "cv": relative[0], "cv_ci95": relative[1:]}
