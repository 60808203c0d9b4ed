"""How sure a difference between runs of the same seeds is, and how many times fewer images one of them needed.

n seeds, P measured points of a curve, R resamples of the seeds. Curves are those of which lower is better: of a fraction that
should be high, take what is missing to 1.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from experiments.results import Estimate

RESAMPLES = 10_000
PARTS = (0.25, 0.5, 0.75, 1.0)  # of the budget: the qualities at which speed-ups are told
# How often `bootstrap`'s 95% hold the mean of n numbers that scatter normally: 20,000 simulated studies, -+ 0.006
COVERAGE = {2: 0.50, 3: 0.75, 4: 0.80, 5: 0.84, 6: 0.86, 8: 0.89, 10: 0.90}


@lru_cache
def resamples(count: int) -> np.ndarray:
    """(R, n): how often each of n seeds was drawn, of n drawn with replacement. The same at each call."""
    return (
        np.random.default_rng(0)
        .multinomial(count, [1 / count] * count, size=RESAMPLES)
        .astype(float)
    )


def bootstrap(values: list[float], level: float = 0.95) -> Estimate:
    """The mean of n values, and the interval that holds this share of the means of their resamples (the percentile bootstrap).
    Without an interval if n = 1.

    Of few values it is too narrow, because resamples of n scatter by sqrt((n - 1) / n) of what they should, and because it
    knows no t distribution: of 5 normal ones its 95% hold the mean 84 times in 100 (COVERAGE). Tables therefore show
    Student's interval, which is exact for those, beside it.
    """
    first, count = values[0], len(values)
    above = (
        np.asarray(values) - first
    )  # so that equal values have an interval of width zero, to the last bit
    mean = float(first + above.mean())
    if count < 2:
        return Estimate(mean, None, None, count)
    low, high = first + np.quantile(
        resamples(count) @ above / count, [(1 - level) / 2, (1 + level) / 2]
    )
    return Estimate(mean, float(low), float(high), count)


def detectable(differences: list[float], power: float = 0.8, level: float = 0.05) -> float | None:
    """The smallest mean difference that a two-sided paired t test at this level finds with this power, when differences
    scatter as these do: delta with P(|T| > t) = power, T of the noncentral t distribution with n - 1 degrees of freedom and
    noncentrality delta sqrt(n) / s. None of a single one. It is as uncertain as the scatter s: with five seeds 95% of the
    studies find between 0.35 and 1.67 times the true s.
    """
    count = len(differences)
    if count < 2:
        return None
    free, root = count - 1, np.sqrt(count)
    least = stats.t.ppf(1 - level / 2, free)

    def missing(noncentral: float) -> float:
        wrong = np.nan_to_num(
            stats.nct.cdf(-least, free, noncentral)
        )  # of the wrong sign; scipy's nan where that is nothing
        return stats.nct.sf(least, free, noncentral) + wrong - power

    share = np.sqrt(
        power
    )  # of two events that are enough together: a small scatter, and a noise that is not too negative
    most = least * np.sqrt(stats.chi2.ppf(share, free) / free) + stats.norm.ppf(share)
    return float(optimize.brentq(missing, 0, most) * np.std(differences, ddof=1) / root)


class Span(NamedTuple):
    """Where a number lies. Known ones have low == high; one without a lower bound has low = 0, without an upper high = inf."""

    low: float
    high: float


def images_needed(images: np.ndarray, values: np.ndarray, quality: float | np.ndarray) -> Span:
    """Where curves first come down to a quality: images (P,), values (..., P), quality (...) -> a Span of (...).

    Between neighbouring points it is interpolated linearly in log(images) and log(value), which is exact for power laws. A
    curve that is below it at its first point needs (0, images[0]), one that never gets there (images[-1], inf).
    """
    values, quality = np.asarray(values, float), np.asarray(quality, float)
    assert values.min() > 0 and quality.min() > 0, (
        f"curves have logarithms: {values.min()}, {quality.min()}"
    )
    x, y, goal = np.log(np.asarray(images, float)), np.log(values), np.log(quality)
    there = y <= goal[..., None]
    at = np.maximum(there.argmax(-1), 1)[..., None]
    before, after = (np.take_along_axis(y, i, -1)[..., 0] for i in (at - 1, at))
    reached, at_once = there.any(-1), y[..., 0] < goal
    between = np.divide(
        before - goal, before - after, out=np.zeros_like(before), where=before > after
    )
    known = np.exp(x[at - 1][..., 0] + between * (x[at] - x[at - 1])[..., 0])
    low = np.where(at_once, 0, np.where(reached, known, images[-1]))
    return Span(low, np.where(at_once, images[0], np.where(reached, known, np.inf)))


class SpeedUp(NamedTuple):
    """At the quality that the baseline has after `images`: images it needs / images the method needs. `low` and `high` are
    the ends of the interval; None with a single seed.
    """

    images: int
    quality: float
    value: Span
    low: Span | None
    high: Span | None

    def per(self, cost: float) -> "SpeedUp":
        """In FLOPs or seconds instead of images, when an image costs the method `cost` times as much. The cost is taken as
        exact.
        """
        spans = (span and Span(span.low / cost, span.high / cost) for span in self[2:])
        return SpeedUp(*self[:2], *spans)


def milestones(images: np.ndarray) -> list[int]:
    """The measured points that are nearest to PARTS of the budget, each once; not the first one, at whose quality a method that
    is ahead has no known point, unless there is no other.
    """
    nearest = {int(np.argmin(np.abs(np.asarray(images) - part * images[-1]))) for part in PARTS}
    return sorted(nearest - {0} if len(images) > 1 else nearest)


def speed_up(
    images: np.ndarray, baseline: np.ndarray, method: np.ndarray, level: float = 0.95
) -> list[SpeedUp]:
    """At each of the milestones, how many times fewer images the method needs than the baseline for the quality that the
    baseline has there; as the paper's 7x is meant (SiT-XL's 7M steps against 1M). images (P,), curves (n, P), of which row i is
    of the same seed in both.

    Curves are averaged over seeds before they are crossed. The interval is the percentile bootstrap's: each resample of the
    seeds gives both averages, and so the quality. Where a crossing lies outside of what was measured, a Span says on
    which side; ends of the interval are the quantiles of the lower and of the upper bounds, which enclose the true ones.
    """
    baseline, method, count = np.asarray(baseline, float), np.asarray(method, float), len(baseline)
    drawn = np.vstack([np.ones(count), resamples(count)]) / count  # first the seeds as they are
    base, ours = drawn @ baseline, drawn @ method
    found = []
    for k in milestones(images):
        needs, instead = (images_needed(images, curves, base[:, k]) for curves in (base, ours))
        with np.errstate(divide="ignore"):
            bounds = needs.low / instead.high, needs.high / instead.low
        value = Span(*(float(bound[0]) for bound in bounds))
        ends = [
            Span(*(float(np.quantile(bound[1:], share, method="inverted_cdf")) for bound in bounds))
            for share in ((1 - level) / 2, (1 + level) / 2)
        ]
        found.append(
            SpeedUp(
                int(images[k]), float(base[0, k]), value, *(ends if count > 1 else (None, None))
            )
        )
    return found
