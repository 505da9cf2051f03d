"""Intervals, paired tests, Holm's correction, and the spread between bins beyond sampling."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

RESAMPLES = 10_000


def resampled_means(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Of values (n,) or (n, M) the means over users drawn with replacement, (RESAMPLES,) or
    (RESAMPLES, M); all columns see the same draws."""
    rng, n, means = np.random.default_rng(seed), len(values), []
    for _ in range(RESAMPLES // 100):  # in portions: all draws at once would take gigabytes
        draws = rng.integers(n, size=(100, n)) + n * np.arange(100)[:, None]
        times = np.bincount(draws.ravel(), minlength=100 * n).reshape(100, n)  # of each user
        means.append(times @ values / n)
    return np.concatenate(means)


def interval_of(means: np.ndarray, alpha: float = 0.05) -> tuple[float, float]:
    low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)


def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over users, by resampling users."""
    return interval_of(resampled_means(values, seed))


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p of so uneven a split of the users that only one of the two gets right."""
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


def judge(family: list[Difference], alpha: float = 0.05) -> None:
    """Holm: of m questions the k-th clearest is judged at alpha / (m - k + 1).

    Those behind the first that holds 0 are judged at its level, so that all their intervals hold
    0 too."""
    left = len(family)
    for difference in sorted(family, key=lambda d: d.p):
        low, high = difference.interval = interval_of(difference.means, alpha / left)
        if low <= 0 <= high:
            difference.verdict = "not distinguishable"
        else:
            difference.verdict = "higher" if low > 0 else "lower"
            left -= 1


def spread_of_bins(bins: dict[str, dict]) -> dict:
    """Standard deviation of HR@1 between bins beyond sampling, its 95 % interval, both over the
    mean too.

    Model: a bin's mean is mu + t + e, e of the sampling variance v, t of variance tau^2. With
    weights 1/v the moment estimate (DerSimonian and Laird 1986) is tau^2 = (Q - (B - 1)) / (sum w
    - sum w^2 / sum w), Q = sum w (mean - mu)^2, at least 0. The interval is Viechtbauer's Q
    profile (2007): every tau^2 for which Q, weighted by 1 / (v + tau^2), is no unlikely
    chi-square of B - 1 degrees. It begins at 0 where sampling alone explains the differences."""
    means = np.array([b["hit_ratio@1"] for b in bins.values()])
    variances = np.array([b["variance"] for b in bins.values()])
    mean, degrees = float(means.mean()), len(means) - 1
    if degrees == 0:
        spread, interval = math.nan, [math.nan, math.nan]
    elif not variances.all():  # no sampling error at all: what is seen is the spread
        spread = float(means.std(ddof=1))
        interval = [spread, spread]
    else:
        w = 1 / variances
        excess = weighted_q(means, variances, 0.0) - degrees
        spread = math.sqrt(max(0.0, excess / (w.sum() - (w**2).sum() / w.sum())))
        interval = [solve_q(means, variances, chi2_quantile(p, degrees)) for p in (0.975, 0.025)]
    relative = [x / mean if mean else math.nan for x in (spread, *interval)]
    return {"spread": spread, "spread_ci95": interval, "cv": relative[0], "cv_ci95": relative[1:]}


def weighted_q(means: np.ndarray, variances: np.ndarray, between: float) -> float:
    """Sum of w (mean - mu)^2 with w = 1 / (variance + between), mu their weighted mean."""
    w = 1 / (variances + between)
    return float((w * (means - (w * means).sum() / w.sum()) ** 2).sum())


def solve_q(means: np.ndarray, variances: np.ndarray, wanted: float) -> float:
    """The between-bin standard deviation at which Q is `wanted`; 0 if Q is lower from the start."""
    low, high = 0.0, 1.0
    if weighted_q(means, variances, 0.0) <= wanted:
        return 0.0
    while weighted_q(means, variances, high**2) > wanted:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        above = weighted_q(means, variances, middle**2) > wanted
        low, high = (middle, high) if above else (low, middle)
    return high


@lru_cache
def chi2_quantile(p: float, degrees: int) -> float:
    """By bisection of the distribution function, the regularised incomplete gamma function."""
    half = torch.tensor(degrees / 2, dtype=torch.float64)
    low, high = 0.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        below = torch.special.gammainc(half, torch.tensor(middle / 2, dtype=torch.float64)) < p
        low, high = (middle, high) if below else (low, middle)
    return high
