"""Compute speed-ups in images, and intervals for differences between runs with the same seeds.

Shapes: n seeds, P evaluations per curve, R resamples of the seeds. Lower values of a curve are
better; replace an accuracy a by 1 - a.
"""

from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from experiments.results import TAILS, Estimate

NUM_RESAMPLES = 10_000
MILESTONES = (0.25, 0.5, 0.75, 1.0)  # fractions of the training at which speed-ups are computed
# Probability that the 95% interval of `compute_bootstrap_interval` contains the true mean, for n
# normal values. It was estimated from 20,000 simulated studies, with an error of at most 0.006.
COVERAGE = {2: 0.50, 3: 0.75, 4: 0.80, 5: 0.84, 6: 0.86, 8: 0.89, 10: 0.90}


def draw_resamples(count: int) -> np.ndarray:
    """Return the number of times that each of n seeds is drawn in each resample, (R, n).

    Seeds are drawn with replacement. The generator has a fixed seed, so every call returns the same
    resamples.
    """
    generator = np.random.default_rng(0)
    counts = generator.multinomial(count, [1 / count] * count, size=NUM_RESAMPLES)
    return counts.astype(float)


def compute_bootstrap_interval(values: np.ndarray) -> Estimate:
    """Return the mean of n values and its 95% percentile bootstrap interval.

    For few values the interval is too narrow: the standard deviation of the resampled means is too
    small by a factor of sqrt((n - 1) / n), and the interval does not account for the heavier tails
    of the t distribution. For five normal values, the 95% interval contains the true mean in 84% of
    cases (see `COVERAGE`). The tables therefore also contain the t interval, which is exact for
    normal values.
    """
    # Subtract the first value, so that the interval of equal values has a width of exactly zero.
    first = values[0]
    offsets = np.subtract(values, first)
    mean = float(first + offsets.mean())
    if len(values) < 2:
        return Estimate(mean)
    means = draw_resamples(len(values)) @ offsets / len(values)
    return Estimate(mean, *(first + np.quantile(means, TAILS)).tolist())


def compute_detectable_difference(differences: np.ndarray) -> float:
    """Return the mean difference that a paired t test detects with 80% power.

    The test is two-sided at the 5% level. The result is the delta for which P(|T| > t) = 0.8, where
    T has the noncentral t distribution with n - 1 degrees of freedom and noncentrality
    delta sqrt(n) / s. The result is as uncertain as the standard deviation s of the differences:
    with five seeds, 95% of studies measure between 0.35 and 1.67 times the true s.

    Args:
        differences: The differences of n > 1 pairs, from which s is estimated.
    """
    degrees_of_freedom = len(differences) - 1
    threshold = stats.t.ppf(TAILS[1], degrees_of_freedom)

    def excess_power(noncentrality: float) -> float:
        # The probability of a detection with the wrong sign. scipy returns NaN if it is zero.
        wrong_sign = np.nan_to_num(stats.nct.cdf(-threshold, degrees_of_freedom, noncentrality))
        return stats.nct.sf(threshold, degrees_of_freedom, noncentrality) + wrong_sign - 0.8

    # The noncentrality is 16.3 for two pairs and smaller for more pairs.
    return float(optimize.brentq(excess_power, 0, 22) * stats.sem(differences))


class Bounds(NamedTuple):
    """A lower and an upper bound of a number. They are equal if the number is known.

    If there is no lower bound, `low` is 0. If there is no upper bound, `high` is infinity.
    """

    low: float
    high: float


def count_images_needed(
    images: np.ndarray, values: np.ndarray, quality: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return bounds of the number of images after which curves first reach a quality.

    Between evaluations, log(value) is interpolated linearly in log(images), which is exact for
    power laws. The bounds are (0, images[0]) for a curve that is better than the quality at the
    first evaluation, and (images[-1], inf) for a curve that never reaches the quality.

    Args:
        images: Number of images at each evaluation, (P,).
        values: Curves of positive values, (..., P).
        quality: The positive value that each curve must reach, (...).

    Returns:
        The lower bounds and the upper bounds, each of shape (...).
    """
    if len(images) == 1:  # a curve of a single evaluation is constant
        images = np.repeat(images, 2)
        values = np.repeat(values, 2, -1)
    x = np.log(images)
    y = np.log(values)
    goal = np.log(quality)[..., None]

    # Find the first evaluation that reaches the quality and the one before it.
    reached = y <= goal
    after = np.maximum(reached.argmax(-1, keepdims=True), 1)
    y_before = np.take_along_axis(y, after - 1, -1)
    y_after = np.take_along_axis(y, after, -1)

    # Interpolate between them.
    drop = y_before - y_after
    fraction = np.divide(y_before - goal, drop, out=np.zeros_like(drop), where=drop > 0)
    crossing = np.exp(x[after - 1] + fraction * (x[after] - x[after - 1]))

    cases = [y[..., :1] < goal, reached.any(-1, keepdims=True)]
    low = np.select(cases, [0, crossing], images[-1])
    high = np.select(cases, [images[0], crossing], np.inf)
    return low[..., 0], high[..., 0]


def interpolate_curves(images: np.ndarray, values: np.ndarray, target: float) -> np.ndarray:
    """Return the values of curves after `target` images, by log-log interpolation, (n,).

    Args:
        images: Number of images at each evaluation, (P,).
        values: Curves of positive values, (n, P).
        target: Number of images, between the first and the last evaluation; other numbers are
            replaced by the nearest of these.
    """
    x = np.log(images)
    logs = [np.interp(np.log(target), x, curve) for curve in np.log(values)]
    return np.exp(logs)


class SpeedUp(NamedTuple):
    """The factor by which a method needs fewer images than the baseline to reach a quality.

    Attributes:
        images: Number of images after which the baseline reaches the quality.
        value: Images that the baseline needs, divided by images that the method needs.
        interval: Lower and upper end of the 95% interval; empty for a single seed.
    """

    images: int
    value: Bounds
    interval: tuple[Bounds, ...]


def select_milestones(images: np.ndarray) -> list[int]:
    """Return the indices of the evaluations nearest to the `MILESTONES`, without duplicates.

    The first evaluation is excluded unless it is the only evaluation, because the crossing of a
    method that is better at the first evaluation is unknown.
    """
    nearest = {int(np.abs(images - part * images[-1]).argmin()) for part in MILESTONES}
    return sorted(nearest - {0}) or [0]


def compute_speed_ups(
    images: np.ndarray, baseline: np.ndarray, method: np.ndarray
) -> list[SpeedUp]:
    """Return the speed-up of a method at each milestone of the baseline.

    The paper defines its speed-up of 7 in the same way (7M steps of SiT-XL compared with 1M). The
    curves are averaged over seeds before crossings are computed. The interval is a percentile
    bootstrap interval: both mean curves and the quality are recomputed for each resample. For
    crossings outside of the evaluated range, only `Bounds` are known; the ends of the interval are
    then quantiles of the lower and the upper bounds, which enclose the true quantile.

    Args:
        images: Number of images at each evaluation, (P,).
        baseline: Curves of the baseline, (n, P).
        method: Curves of the method, (n, P). Row i has the same seed as row i of `baseline`.
    """
    count = len(baseline)

    # Compute mean curves, (1 + R, P). The first row is the mean without resampling.
    weights = np.vstack([np.ones(count), draw_resamples(count)]) / count
    baseline_means = weights @ baseline
    method_means = weights @ method

    speed_ups = []
    for index in select_milestones(images):
        quality = baseline_means[:, index]
        baseline_low, baseline_high = count_images_needed(images, baseline_means, quality)
        method_low, method_high = count_images_needed(images, method_means, quality)
        with np.errstate(divide="ignore"):
            ratios = np.stack([baseline_low / method_high, baseline_high / method_low])
        quantiles = np.quantile(ratios[:, 1:], TAILS, axis=1, method="inverted_cdf")
        interval = tuple(Bounds(*ends) for ends in quantiles.tolist()) if count > 1 else ()
        speed_ups.append(SpeedUp(int(images[index]), Bounds(*ratios[:, 0].tolist()), interval))
    return speed_ups
