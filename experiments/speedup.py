"""Uncertainty of differences between runs with the same seeds, and speed-ups in images.

Shapes: n seeds, P evaluations of a curve, R resamples of the seeds. Lower values of a curve are
better; replace an accuracy a, for which higher is better, by 1 - a.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from experiments.results import Estimate

NUM_RESAMPLES = 10_000
MILESTONES = (0.25, 0.5, 0.75, 1.0)  # fractions of the training images at which speed-ups are given
# Coverage of the 95% interval of `bootstrap_interval` for n normal values, from 20,000 simulated
# studies; accurate to +-0.006.
COVERAGE = {2: 0.50, 3: 0.75, 4: 0.80, 5: 0.84, 6: 0.86, 8: 0.89, 10: 0.90}


@lru_cache
def draw_resamples(count: int) -> np.ndarray:
    """Return how often each of n seeds is drawn in each resample with replacement, (R, n).

    The generator has a fixed seed, so every call returns the same resamples.
    """
    generator = np.random.default_rng(0)
    counts = generator.multinomial(count, [1 / count] * count, size=NUM_RESAMPLES)
    return counts.astype(float)


def bootstrap_interval(values: list[float], level: float = 0.95) -> Estimate:
    """Return the mean of n values and its percentile bootstrap interval.

    For few values the interval is too narrow: the standard deviation of the resampled means is
    smaller than it should be by a factor of sqrt((n - 1) / n), and the interval has no counterpart
    of the heavier tails of the t distribution. For five normal values, the 95% interval contains
    the true mean in 84% of cases (see `COVERAGE`). The tables therefore also contain Student's
    interval, which is exact for normal values.

    Args:
        values: The n values.
        level: The confidence level.

    Returns:
        The estimate, without an interval if n = 1.
    """
    count = len(values)
    # Relative to the first value, so that the interval of equal values has a width of exactly zero.
    first = values[0]
    offsets = np.asarray(values) - first
    mean = float(first + offsets.mean())
    if count < 2:
        return Estimate(mean, None, None, count)
    means = draw_resamples(count) @ offsets / count
    low, high = first + np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high), count)


def detectable_difference(
    differences: list[float], power: float = 0.8, level: float = 0.05
) -> float | None:
    """Return the smallest mean difference that a two-sided paired t test detects.

    It is the delta with P(|T| > t) = power, where T has the noncentral t distribution with n - 1
    degrees of freedom and noncentrality delta sqrt(n) / s. The result is as uncertain as the
    standard deviation s of the differences: for five seeds, 95% of studies measure between 0.35 and
    1.67 times the true s.

    Args:
        differences: The n differences, which determine s.
        power: Probability of detection.
        level: Significance level of the test.

    Returns:
        The difference, or None if n = 1.
    """
    count = len(differences)
    if count < 2:
        return None
    freedom = count - 1
    threshold = stats.t.ppf(1 - level / 2, freedom)

    def excess_power(noncentrality: float) -> float:
        # The probability of a detection with the wrong sign. scipy returns nan where it vanishes.
        wrong_sign = np.nan_to_num(stats.nct.cdf(-threshold, freedom, noncentrality))
        return stats.nct.sf(threshold, freedom, noncentrality) + wrong_sign - power

    # Upper bound: two independent events of probability sqrt(power) are sufficient for a detection,
    # a small standard deviation and a mean that is not much lower than expected.
    probability = np.sqrt(power)
    small_std = np.sqrt(stats.chi2.ppf(probability, freedom) / freedom)
    bound = threshold * small_std + stats.norm.ppf(probability)
    noncentrality = optimize.brentq(excess_power, 0, bound)
    return float(noncentrality * np.std(differences, ddof=1) / np.sqrt(count))


class Bounds(NamedTuple):
    """Lower and upper bound of a number, equal if it is known.

    An unknown lower bound is 0 and an unknown upper bound is infinity.
    """

    low: float
    high: float

    def divide(self, divisor: float) -> "Bounds":
        """Return the bounds of the number divided by a positive divisor."""
        return Bounds(self.low / divisor, self.high / divisor)


def images_needed(
    images: np.ndarray, values: np.ndarray, quality: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return bounds of the number of images after which curves first reach a quality.

    Between evaluations log(value) is interpolated linearly in log(images), which is exact for power
    laws. A curve that is better than the quality at its first evaluation has the bounds
    (0, images[0]), and a curve that never reaches it (images[-1], inf).

    Args:
        images: Images at each evaluation, (P,).
        values: Curves, (..., P).
        quality: Quality to reach per curve, (...).

    Returns:
        The lower and the upper bounds, (...) each.
    """
    values = np.asarray(values, float)
    quality = np.asarray(quality, float)
    assert values.min() > 0 and quality.min() > 0, f"{values.min()=}, {quality.min()=}"
    x = np.log(np.asarray(images, float))
    y = np.log(values)
    goal = np.log(quality)

    # Find the first evaluation that reaches the quality and the one before it.
    reached = y <= goal[..., None]
    after = np.maximum(reached.argmax(-1), 1)[..., None]
    before = after - 1
    y_before = np.take_along_axis(y, before, -1)[..., 0]
    y_after = np.take_along_axis(y, after, -1)[..., 0]
    x_before = x[before][..., 0]
    x_after = x[after][..., 0]

    # Interpolate between them.
    fraction = np.divide(
        y_before - goal,
        y_before - y_after,
        out=np.zeros_like(y_before),
        where=y_before > y_after,
    )
    crossing = np.exp(x_before + fraction * (x_after - x_before))

    is_reached = reached.any(-1)
    is_better_at_first = y[..., 0] < goal
    low = np.where(is_better_at_first, 0, np.where(is_reached, crossing, images[-1]))
    high = np.where(is_better_at_first, images[0], np.where(is_reached, crossing, np.inf))
    return low, high


class SpeedUp(NamedTuple):
    """How many times fewer images a method needs than the baseline.

    Attributes:
        images: Number of images after which the baseline has the quality.
        quality: The quality.
        value: Images that the baseline needs, divided by images that the method needs.
        low: Lower end of the interval; None for a single seed.
        high: Upper end of the interval; None for a single seed.
    """

    images: int
    quality: float
    value: Bounds
    low: Bounds | None
    high: Bounds | None

    def per_cost(self, cost: float) -> "SpeedUp":
        """Convert the speed-up to FLOPs or seconds.

        Args:
            cost: Cost of training on an image relative to the baseline; assumed to be exact.
        """
        return self._replace(
            value=self.value.divide(cost),
            low=self.low and self.low.divide(cost),
            high=self.high and self.high.divide(cost),
        )


def select_milestones(images: np.ndarray) -> list[int]:
    """Return the indices of the evaluations nearest to the `MILESTONES`, without duplicates.

    The first evaluation is excluded unless it is the only one: a method that is better there has no
    known crossing.
    """
    distances = [np.abs(np.asarray(images) - part * images[-1]) for part in MILESTONES]
    nearest = {int(np.argmin(distance)) for distance in distances}
    if len(images) > 1:
        nearest.discard(0)
    return sorted(nearest)


def compute_speed_ups(
    images: np.ndarray, baseline: np.ndarray, method: np.ndarray, level: float = 0.95
) -> list[SpeedUp]:
    """Return the speed-up of a method at each milestone of the baseline.

    The paper's factor of 7 is defined in the same way (7M steps of SiT-XL against 1M). Curves are
    averaged over seeds before crossings are computed. The interval is a percentile bootstrap: each
    resample of the seeds yields both mean curves and the quality. For crossings outside of the
    evaluated range, `Bounds` contain what is known; the ends of the interval are then quantiles of
    the lower and the upper bounds, which enclose the true quantile.

    Args:
        images: Images at each evaluation, (P,).
        baseline: Curves of the baseline, (n, P).
        method: Curves of the method, (n, P). Row i has the same seed as row i of `baseline`.
        level: The confidence level.
    """
    baseline = np.asarray(baseline, float)
    method = np.asarray(method, float)
    count = len(baseline)

    # Mean curves, (1 + R, P). The first row contains the seeds without resampling.
    weights = np.vstack([np.ones(count), draw_resamples(count)]) / count
    baseline_means = weights @ baseline
    method_means = weights @ method

    speed_ups = []
    for index in select_milestones(images):
        quality = baseline_means[:, index]
        baseline_low, baseline_high = images_needed(images, baseline_means, quality)
        method_low, method_high = images_needed(images, method_means, quality)
        with np.errstate(divide="ignore"):
            lows = baseline_low / method_high
            highs = baseline_high / method_low
        value = Bounds(float(lows[0]), float(highs[0]))
        low = high = None
        if count > 1:
            low = bounds_quantile(lows[1:], highs[1:], (1 - level) / 2)
            high = bounds_quantile(lows[1:], highs[1:], (1 + level) / 2)
        speed_ups.append(SpeedUp(int(images[index]), float(quality[0]), value, low, high))
    return speed_ups


def bounds_quantile(lows: np.ndarray, highs: np.ndarray, fraction: float) -> Bounds:
    """Return the quantile of the lower bounds and that of the upper bounds."""
    low = np.quantile(lows, fraction, method="inverted_cdf")
    high = np.quantile(highs, fraction, method="inverted_cdf")
    return Bounds(float(low), float(high))
