"""Compute the numbers in the tables of a convergence study from its JSON result alone.

The first entry of result["methods"] is the baseline. Methods are compared per seed, so in an
unfinished study they are compared on the seeds that both methods have.
"""

import math
from typing import NamedTuple

import numpy as np

from common.cli import UserError
from experiments.formatting import format_bounds
from experiments.results import Estimate, compute_t_interval, group_runs
from experiments.speedup import (
    SpeedUp,
    compute_bootstrap_interval,
    compute_detectable_difference,
    compute_speed_ups,
    interpolate_curves,
)

# Metrics besides the main metric, and their columns in the log.
METRIC_COLUMNS = {
    "agreement": "class_agreement",
    "held-out": "held_out",
    "precision": "precision",
    "recall": "recall",
}


class Curves(NamedTuple):
    """The curves of a metric, at the evaluations that all runs have in common.

    Attributes:
        images: Number of training images at each evaluation, (P,).
        by_method: Name of a method -> seed -> curve, (P,).
    """

    images: np.ndarray
    by_method: dict[str, dict[int, np.ndarray]]

    def pair(self, name: str, other: str) -> np.ndarray:
        """Return the curves of two methods for their n common seeds, (2, n, P)."""
        first = self.by_method.get(name, {})
        second = self.by_method.get(other, {})
        seeds = sorted(first.keys() & second.keys())
        curves = [first[seed] for seed in seeds] + [second[seed] for seed in seeds]
        return np.reshape(curves, (2, len(seeds), len(self.images)))

    def percent_differences(self, name: str, baseline: str) -> np.ndarray:
        """Return the differences from the baseline in percent of its mean curve, (n, P)."""
        values, baseline_values = self.pair(name, baseline)
        return 100 * (values - baseline_values) / baseline_values.mean(0)

    def compute_final_mean(self, name: str) -> float:
        """Return the mean of the last values of a method over all of its seeds."""
        return float(np.mean([curve[-1] for curve in self.by_method[name].values()]))


def collect_curves(result: dict, metric: str) -> Curves:
    """Return the curves of a metric.

    Raises:
        UserError: If a value is not finite, or the runs have no evaluation in common.
    """

    def read_points(run: dict) -> dict[int, float] | None:
        evaluations = zip(run["metrics"].get(metric, []), run["metrics"].get("images", []))
        points = {images: value for value, images in evaluations if value is not None}
        if not all(map(math.isfinite, points.values())):
            raise UserError(
                f"{metric} of {run['name']}, seed {run['seed']}, is not finite; remove this run"
            )
        return points or None

    by_method = group_runs(result["runs"], read_points)
    all_points = [points for by_seed in by_method.values() for points in by_seed.values()]
    images = sorted(set.intersection(*map(set, all_points))) if all_points else []
    if all_points and not images:
        raise UserError(
            f"the runs have no evaluation of {metric} after the same number of images, so they "
            "cannot be compared; rerun the study"
        )
    for by_seed in by_method.values():
        for seed, points in by_seed.items():
            by_seed[seed] = np.array([points[count] for count in images])
    return Curves(np.array(images), by_method)


def collect_main_curves(result: dict) -> Curves:
    """Return the curves of the study's main metric.

    Raises:
        UserError: If the baseline has no run, or for the reasons in `collect_curves`.
    """
    curves = collect_curves(result, result["metric"])
    baseline = result["methods"][0]
    if baseline["name"] not in curves.by_method:
        raise UserError(
            f"the result contains no finished run of {baseline['label']} ({baseline['name']}), the "
            "baseline of the comparison; rerun the study"
        )
    return curves


def list_held_out_times(result: dict) -> list[str]:
    """Return the times of the held-out losses, as written in the column names."""
    prefix = "held_out_"
    columns = [key for run in result["runs"] for key in run["metrics"]]
    times = [key.removeprefix(prefix) for key in columns if key.startswith(prefix)]
    return list(dict.fromkeys(times))


def list_seeds(result: dict) -> list[int]:
    """Return the seeds of all runs in ascending order."""
    return sorted({run["seed"] for run in result["runs"]})


def read_training_costs(method: dict) -> dict[str, float]:
    """Return the known training costs per image, in units of "FLOP" and "second"."""
    costs = {
        "FLOP": method.get("training_flops"),
        "second": (method.get("step_s") or {}).get("median"),
    }
    return {unit: cost for unit, cost in costs.items() if cost}


def collect_probes(result: dict) -> dict[str, list[dict[str, float]]]:
    """Return the accuracies of the linear probe by block, with one entry per method and seed.

    Only the seeds that all probed methods have in common are included.
    """
    probes = group_runs(result["runs"], lambda run: (run.get("probe") or {}).get("accuracy"))
    seeds = sorted(set.intersection(*map(set, probes.values()))) if probes else []
    return {name: [by_seed[seed] for seed in seeds] for name, by_seed in probes.items()}


def find_best_probe(accuracies: list[dict[str, float]]) -> tuple[str, float]:
    """Return the block with the highest mean accuracy over seeds, and its mean accuracy.

    Args:
        accuracies: Accuracies by block, one entry per seed. The entries must have a common block.
    """
    blocks = [block for block in accuracies[0] if all(block in entry for entry in accuracies)]
    means = [float(np.mean([entry[block] for entry in accuracies])) for block in blocks]
    return max(zip(blocks, means), key=lambda item: item[1])


def format_speed_up(speed_up: SpeedUp, cost: float = 1.0) -> str:
    """Format a speed-up as "1.12 (1.05 to 1.20)".

    If the value and both ends of the interval have the same bound, return only this bound.

    Args:
        speed_up: The speed-up in images.
        cost: Training cost per image relative to the baseline, in FLOPs or seconds, which converts
            the speed-up to this unit. It is assumed to be exact.
    """
    value, *ends = (format_bounds(bounds, cost) for bounds in (speed_up.value, *speed_up.interval))
    is_bound = speed_up.value.low < speed_up.value.high
    if not ends or (is_bound and {value} == {*ends}):
        return value
    return f"{value} ({' to '.join(ends)})"


def format_ends(estimate: Estimate, spec: str) -> str:
    """Format an interval as "-0.164 to -0.022"."""
    return f"{estimate.low:{spec}} to {estimate.high:{spec}}"


def format_estimate(values: np.ndarray, spec: str) -> str:
    """Format a mean and its bootstrap interval as "-0.093 (-0.164 to -0.022)"."""
    estimate = compute_bootstrap_interval(values)
    if math.isnan(estimate.low):
        return f"{estimate.mean:{spec}}"
    return f"{estimate.mean:{spec}} ({format_ends(estimate, spec)})"


def count_decimals(mean: float) -> int:
    """Return the number of decimal places for four significant digits of a mean."""
    return max(0, 3 - math.floor(math.log10(abs(mean)))) if mean else 3


def format_numbers(result: dict) -> dict[str, str]:
    """Return the formatted numbers of the tables, with keys of the form "METHOD QUANTITY".

    Quantities of each method: "seeds" (number of seeds in common with the baseline), the main
    metric (such as "FD-fashion"), "agreement", "precision", "recall", "held-out", "probe", and the
    costs "FLOP" and "second" relative to the baseline.

    Quantities of each method except the baseline, relative to the baseline: "METRIC difference"
    with a bootstrap interval (for the main metric, "agreement" and "held-out"), "equal FLOPs" (the
    difference of the main metric at the FLOPs of the baseline), "student" (the t interval) and
    "detectable" for the main metric, "held-out at T" in percent, "speed-up at IMAGES" at the
    quality that the baseline reaches after this number of images, and "speed-up", "speed-up per
    FLOP" and "speed-up per second" at the final quality of the baseline.

    Quantities that were not measured are omitted.

    Raises:
        UserError: For the reasons in `collect_main_curves`.
    """
    baseline = result["methods"][0]["name"]
    quality = collect_main_curves(result)
    decimals = count_decimals(quality.compute_final_mean(baseline))
    metrics = {result["metric"]: quality}
    metrics |= {key: collect_curves(result, column) for key, column in METRIC_COLUMNS.items()}
    by_time = {t: collect_curves(result, f"held_out_{t}") for t in list_held_out_times(result)}
    probes = collect_probes(result)
    baseline_costs = read_training_costs(result["methods"][0])
    numbers: dict[str, str] = {}
    for method in result["methods"]:
        name = method["name"]
        costs = {
            unit: cost / baseline_costs[unit]
            for unit, cost in read_training_costs(method).items()
            if unit in baseline_costs
        }
        quantities = {unit: f"x {cost:.2f}" for unit, cost in costs.items()}
        for metric, curves in metrics.items():
            if name in curves.by_method:
                quantities |= format_metric(metric, curves, name, baseline)
        if probes.get(name):
            block, accuracy = find_best_probe(probes[name])
            quantities["probe"] = f"{accuracy:.1%} (block {block})"
        values, baseline_values = quality.pair(name, baseline)
        if name in quality.by_method:
            quantities["seeds"] = str(len(values))
        if name != baseline and len(values):
            if len(values) > 1:
                differences = (values - baseline_values)[:, -1]
                quantities["student"] = format_ends(
                    compute_t_interval(differences), f"+.{decimals}f"
                )
                quantities["detectable"] = (
                    f"{compute_detectable_difference(differences):.{decimals}f}"
                )
            if "FLOP" in costs:
                at_equal_flops = interpolate_curves(
                    quality.images, values, quality.images[-1] / costs["FLOP"]
                )
                differences = at_equal_flops - baseline_values[:, -1]
                quantities["equal FLOPs"] = format_estimate(differences, f"+.{decimals}f")
            speed_ups = compute_speed_ups(quality.images, baseline_values, values)
            quantities |= format_speed_ups(speed_ups, costs)
            for t, curves in by_time.items():
                final = curves.percent_differences(name, baseline)[:, -1]
                quantities[f"held-out at {t}"] = format_estimate(final, "+.1f")
        numbers |= {f"{name} {quantity}": text for quantity, text in quantities.items()}
    return numbers


def format_metric(metric: str, curves: Curves, name: str, baseline: str) -> dict[str, str]:
    """Format the final value of a metric and, usually, its difference from the baseline."""
    final = curves.compute_final_mean(name)
    reference = baseline if baseline in curves.by_method else name
    decimals = count_decimals(curves.compute_final_mean(reference))
    numbers = {metric: f"{final:.{decimals}f}"}
    unit = 1
    if metric == "agreement":
        unit = 100
        decimals = 1
        numbers[metric] = f"{final:.1%}"
    values, baseline_values = curves.pair(name, baseline)
    if metric not in ("precision", "recall") and name != baseline and len(values):
        differences = unit * (values - baseline_values)[:, -1]
        numbers[f"{metric} difference"] = format_estimate(differences, f"+.{decimals}f")
    return numbers


def format_speed_ups(speed_ups: list[SpeedUp], costs: dict[str, float]) -> dict[str, str]:
    """Format the speed-ups in images at all milestones, and the final speed-up in other units."""
    numbers = {
        f"speed-up at {speed_up.images}": format_speed_up(speed_up) for speed_up in speed_ups
    }
    final = speed_ups[-1]
    numbers["speed-up"] = format_speed_up(final)
    for unit, cost in costs.items():
        numbers[f"speed-up per {unit}"] = format_speed_up(final, cost)
    return numbers
