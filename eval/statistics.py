"""Intervals and tests for success counts. Standard library only; every formula names its source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

from vla.types import problem


class Interval(NamedTuple):
    """An estimate and its confidence limits."""

    estimate: float
    low: float
    high: float


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion (Wilson 1927, equation 4 of Newcombe 1998a). No trials: (nan, 0, 1)."""
    if not 0 <= successes <= trials:
        raise problem(f"{successes} successes in {trials} trials", "0 <= successes <= trials", "count again")
    if trials == 0:
        return Interval(math.nan, 0.0, 1.0)
    z, p = _z(confidence), successes / trials
    centre = (successes + z * z / 2) / (trials + z * z)
    half = z / (trials + z * z) * math.sqrt(trials * p * (1 - p) + z * z / 4)
    low = 0.0 if successes == 0 else centre - half  # exact ends instead of rounding errors
    high = 1.0 if successes == trials else centre + half
    return Interval(p, low, high)


def difference(successes_a: int, trials_a: int, successes_b: int, trials_b: int, confidence: float = 0.95) -> Interval:
    """Interval of p_b - p_a for independent samples (Newcombe 1998b, method 10: hybrid score)."""
    a, b = wilson(successes_a, trials_a, confidence), wilson(successes_b, trials_b, confidence)
    d = b.estimate - a.estimate
    low = d - math.hypot(b.estimate - b.low, a.high - a.estimate)
    high = d + math.hypot(b.high - b.estimate, a.estimate - a.low)
    return Interval(d, low, high)


def paired_difference(a: Sequence[bool], b: Sequence[bool], confidence: float = 0.95) -> Interval:
    """Interval of p_b - p_a when a[i] and b[i] share their seed (Agresti & Min 2005: Wald, half added to each cell)."""
    gained, lost, n = _discordant(a, b)
    if n == 0:
        return Interval(math.nan, -1.0, 1.0)
    total = n + 2.0
    p_gained, p_lost = (gained + 0.5) / total, (lost + 0.5) / total
    centre = p_gained - p_lost
    half = _z(confidence) * math.sqrt((p_gained + p_lost - centre**2) / total)
    return Interval((gained - lost) / n, max(-1.0, centre - half), min(1.0, centre + half))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact two-sided p-value that a and b, paired by seed, succeed equally often (McNemar 1947, binomial form)."""
    gained, lost, _ = _discordant(a, b)
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    return min(1.0, 2.0 * tail)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of a mean, e.g. of one gain per training seed: says whether the gain excludes 0."""
    if len(values) < 2:
        raise problem(f"{len(values)} values", "at least 2", "run more seeds")
    mean, n = fmean(values), len(values)
    half = t_quantile(0.5 + confidence / 2, n - 1) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def t_quantile(probability: float, degrees: int) -> float:
    """x with P(T <= x) = probability > 0.5, by bisection of the closed form (Abramowitz & Stegun 26.7.3, 26.7.4)."""
    low, high = 0.0, 1.0
    while _t_central(high, degrees) < 2 * probability - 1:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if _t_central(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def percentile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics, q in [0, 100]; nan if there are no values."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    position = (len(ordered) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _t_central(t: float, degrees: int) -> float:
    """P(|T| <= t)."""
    theta = math.atan2(t, math.sqrt(degrees))
    cos2 = math.cos(theta) ** 2
    term = math.cos(theta) if degrees % 2 else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if degrees % 2 else 2, degrees, 2):
        term *= cos2 * (k - 1) / k
        total += term
    if degrees % 2:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total


def _discordant(a: Sequence[bool], b: Sequence[bool]) -> tuple[int, int, int]:
    """(only b succeeded, only a succeeded, pairs)."""
    if len(a) != len(b):
        raise problem(f"{len(a)} and {len(b)} outcomes", "one pair per seed", "pair the episodes by seed")
    pairs = list(zip(a, b, strict=True))
    return sum(y and not x for x, y in pairs), sum(x and not y for x, y in pairs), len(pairs)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)
