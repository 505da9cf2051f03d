"""Intervals, paired tests, Holm's correction, and the spread between bins beyond sampling."""

import math
from dataclasses import dataclass

import numpy as np
import torch

RESAMPLES = 10_000


def resampled_means(values: np.ndarray) -> np.ndarray:
    """(RESAMPLES,) means of values (n,) over users drawn with replacement; every call draws the
    same users, so differences of two calls are paired."""
    rng, n, means = np.random.default_rng(0), len(values), []
    for _ in range(RESAMPLES // 100):  # in portions: all draws at once would take gigabytes
        draws = rng.integers(n, size=(100, n)) + n * np.arange(100)[:, None]
        times = np.bincount(draws.ravel(), minlength=100 * n).reshape(100, n)  # of each user
        means.append(times @ values / n)
    return np.concatenate(means)


def interval_of(means: np.ndarray, alpha: float = 0.05) -> tuple[float, float]:
    low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean over users, by resampling users."""
    return interval_of(resampled_means(values))


def with_interval(values: np.ndarray) -> str:
    """Mean of values (n,) and its interval, for a table."""
    low, high = bootstrap(values)
    return f"{values.mean():.4f} [{low:.3f}, {high:.3f}]"


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p-value: of the users whom only one of the two gets right, is either side
    as likely?"""
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


@dataclass
class Difference:
    """One question: is a above b? The answer's interval depends on how many questions are asked."""

    mean: float
    means: np.ndarray  # of resampled users
    runs: tuple[int, int] = (1, 1)  # training runs on either side
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


def paired(a: np.ndarray, b: np.ndarray, runs: tuple[int, int] = (1, 1)) -> Difference:
    """a - b of the same users (n,); holm() fills in interval and verdict."""
    return Difference(float((a - b).mean()), resampled_means(a - b), runs)


def holm(family: list[Difference], alpha: float = 0.05) -> None:
    """Judge m questions together: the k-th clearest at level alpha / (m - k + 1).

    After the first whose interval holds 0, all others are judged at its level, so that their
    intervals hold 0 too."""
    left = len(family)
    for difference in sorted(family, key=lambda d: d.p):
        low, high = difference.interval = interval_of(difference.means, alpha / left)
        if low <= 0 <= high:
            difference.verdict = "not distinguishable"
        else:
            difference.verdict = "higher" if low > 0 else "lower"
            left -= 1


def spread_of_bins(bins: dict[str, dict]) -> dict:
    """Standard deviation of HR@1 between bins beyond sampling, with its 95 % interval, and both
    divided by the mean.

    The moment estimate of DerSimonian and Laird (1986), with weights 1 / sampling variance, and
    Viechtbauer's Q profile (2007): every spread at which Q is a likely chi-square of B - 1 degrees.
    The interval begins at 0 where sampling alone explains the differences."""
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
        for p in (0.975, 0.025):
            wanted = chi2_quantile(p, degrees)
            interval.append(root(lambda between, wanted=wanted: wanted - q(between)))
    relative = [x / mean if mean else math.nan for x in (spread, *interval)]
    return {"spread": spread, "spread_ci95": interval, "cv": relative[0], "cv_ci95": relative[1:]}


def chi2_quantile(p: float, degrees: int) -> float:
    """Where the distribution function, the regularised incomplete gamma function, is p."""
    half = torch.tensor(degrees / 2, dtype=torch.float64)
    return root(lambda x: float(torch.special.gammainc(half, torch.tensor(x / 2).double())) - p)


def root(function, low: float = 0.0, high: float = 1000.0) -> float:
    """Where an increasing function crosses 0, by bisection; `low` if it is above 0 from there."""
    if function(low) >= 0:
        return low
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return high
