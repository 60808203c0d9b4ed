"""Compute the numbers of a convergence study's tables from its JSON result alone.

The first entry of result["methods"] is the baseline. Methods are compared per seed, so an
unfinished study is compared on the seeds that both methods have.
"""

import math
from typing import NamedTuple

import numpy as np

from common.cli import UserError
from experiments.results import Estimate, student_interval
from experiments.speedup import (
    Bounds,
    SpeedUp,
    bootstrap_interval,
    compute_speed_ups,
    detectable_difference,
)

METRIC_COLUMNS = {
    "agreement": "class_agreement",
    "held-out": "held_out",
    "precision": "precision",
    "recall": "recall",
}  # metrics besides the main one -> columns of the log
COMPARED_METRICS = ("agreement", "held-out")  # those with a difference from the baseline


class Curves(NamedTuple):
    """A metric of all runs at the evaluations that all of them have.

    Attributes:
        images: Training images at each evaluation, (P,).
        by_method: Name of a method -> seed -> curve, (P,).
    """

    images: np.ndarray
    by_method: dict[str, dict[int, np.ndarray]]

    def pair(self, name: str, other: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the curves of two methods with their n common seeds, (n, P) each."""
        first = self.by_method.get(name, {})
        second = self.by_method.get(other, {})
        seeds = sorted(first.keys() & second.keys())
        shape = (len(seeds), len(self.images))
        return (
            np.array([first[seed] for seed in seeds]).reshape(shape),
            np.array([second[seed] for seed in seeds]).reshape(shape),
        )

    def final_mean(self, name: str) -> float:
        """Return the mean of a method's last values over all of its seeds."""
        return float(np.mean([curve[-1] for curve in self.by_method[name].values()]))


def collect_curves(result: dict, metric: str) -> Curves:
    """Return the curves of a metric.

    Raises:
        UserError: If a value is not finite, or the runs have no evaluation in common.
    """
    points: dict[tuple[str, int], dict[int, float]] = {}
    for run in result["runs"]:
        evaluations = zip(run["metrics"].get("images", []), run["metrics"].get(metric, []))
        values = {images: value for images, value in evaluations if value is not None}
        if not all(math.isfinite(value) for value in values.values()):
            raise UserError(
                f"{metric} of {run['name']}, seed {run['seed']}, is not finite; remove the run"
            )
        if values:
            points[run["name"], run["seed"]] = values
    common = set.intersection(*(set(values) for values in points.values())) if points else set()
    if points and not common:
        raise UserError(
            f"{metric} was evaluated after different numbers of images in each run, so nothing can "
            "be compared; rerun the study"
        )
    images = sorted(common)
    by_method: dict[str, dict[int, np.ndarray]] = {}
    for (name, seed), values in points.items():
        by_method.setdefault(name, {})[seed] = np.array([values[count] for count in images])
    return Curves(np.array(images), by_method)


def main_curves(result: dict) -> Curves:
    """Return the curves of the study's main metric.

    Raises:
        UserError: If there is no run of the baseline, or as in `collect_curves`.
    """
    curves = collect_curves(result, result["metric"])
    baseline = result["methods"][0]
    if baseline["name"] not in curves.by_method:
        raise UserError(
            f"the result contains no finished run of {baseline['label']} ({baseline['name']}), the "
            "baseline of the comparison; rerun the study"
        )
    return curves


def held_out_times(result: dict) -> list[str]:
    """Return the times of the held-out losses, as in the names of their columns."""
    prefix = "held_out_"
    columns = [key for run in result["runs"] for key in run["metrics"] if key.startswith(prefix)]
    return [column.removeprefix(prefix) for column in dict.fromkeys(columns)]


def list_seeds(result: dict) -> list[int]:
    """Return the seeds of all runs in ascending order."""
    return sorted({run["seed"] for run in result["runs"]})


def relative_costs(result: dict) -> dict[str, dict[str, float]]:
    """Return the cost of training on an image relative to the baseline: unit -> method -> factor.

    Costs that were not measured are missing.
    """
    baseline = result["methods"][0]["name"]
    flops = {}
    seconds = {}
    for method in result["methods"]:
        flops[method["name"]] = method.get("training_flops")
        seconds[method["name"]] = (method.get("step_s") or {}).get("median")
    return {
        unit: {
            name: cost / costs[baseline] for name, cost in costs.items() if cost and costs[baseline]
        }
        for unit, costs in (("FLOP", flops), ("second", seconds))
    }


def probed_seeds(result: dict) -> set[int]:
    """Return the seeds with which all probed methods were probed."""
    seeds: dict[str, set[int]] = {}
    for run in result["runs"]:
        if run.get("probe"):
            seeds.setdefault(run["name"], set()).add(run["seed"])
    return set.intersection(*seeds.values()) if seeds else set()


def count_probes(result: dict) -> tuple[int, int]:
    """Return the number of probed blocks and the number of seeds."""
    blocks = [len(run["probe"]["accuracy"]) for run in result["runs"] if run.get("probe")]
    return max(blocks, default=0), len(probed_seeds(result))


def best_probe(result: dict, name: str) -> tuple[str, float] | None:
    """Return the block with the highest accuracy of the linear probe, and the accuracy.

    Accuracies are means over `probed_seeds`. Returns None for methods that were not probed.
    """
    seeds = probed_seeds(result)
    accuracies = [
        run["probe"]["accuracy"]
        for run in result["runs"]
        if run["name"] == name and run["seed"] in seeds and run.get("probe")
    ]
    if not accuracies:
        return None
    means = {
        block: float(np.mean([by_block[block] for by_block in accuracies]))
        for block in accuracies[0]
        if all(block in by_block for by_block in accuracies)
    }
    return max(means.items(), key=lambda item: item[1]) if means else None


def format_bounds(bounds: Bounds) -> str:
    """Format a known number as "1.12", and others as "> 1.12", "< 1.12" or "unknown"."""
    if bounds.low == bounds.high:
        return f"{bounds.low:.2f}"
    parts = []
    if bounds.low > 0:
        parts.append(f"> {bounds.low:.2f}")
    if bounds.high < math.inf:
        parts.append(f"< {bounds.high:.2f}")
    return " and ".join(parts) or "unknown"


def format_speed_up(speed_up: SpeedUp) -> str:
    """Format a speed-up as "1.12 (1.05 to 1.20)".

    Returns only the bound if neither the value nor the ends of its interval are known better.
    """
    value = format_bounds(speed_up.value)
    if speed_up.low is None or speed_up.high is None:
        return value
    low = format_bounds(speed_up.low)
    high = format_bounds(speed_up.high)
    if speed_up.value.low < speed_up.value.high and value == low == high:
        return value
    return f"{value} ({low} to {high})"


def format_ends(estimate: Estimate, spec: str) -> str:
    """Format an interval as "-0.164 to -0.022"."""
    return f"{estimate.low:{spec}} to {estimate.high:{spec}}"


def format_estimate(estimate: Estimate, spec: str) -> str:
    """Format an estimate as "-0.093 (-0.164 to -0.022)"."""
    if estimate.low is None:
        return f"{estimate.mean:{spec}}"
    return f"{estimate.mean:{spec}} ({format_ends(estimate, spec)})"


def count_decimals(mean: float) -> int:
    """Return the number of decimals with which a mean has four significant digits."""
    return max(0, 3 - math.floor(math.log10(abs(mean)))) if mean else 3


def format_numbers(result: dict) -> dict[str, str]:
    """Return the numbers of a study as its tables contain them, under keys "METHOD QUANTITY".

    Quantities of each method: "seeds" (in common with the baseline), the main metric (such as
    "FD-fashion"), "agreement", "precision", "recall", "held-out" and "probe".

    Quantities of each method but the baseline, relative to the baseline: "difference" (with its
    bootstrap interval), "student" (Student's interval), "better" (number of seeds), "detectable",
    "agreement difference", "held-out difference", "held-out at T" in percent, "speed-up at IMAGES"
    at the quality that the baseline has then, and "speed-up", "speed-up per FLOP" and "speed-up per
    second" at the baseline's final quality.

    Quantities that were not measured are missing.

    Raises:
        UserError: As in `main_curves`.
    """
    baseline = result["methods"][0]["name"]
    quality = main_curves(result)
    decimals = count_decimals(quality.final_mean(baseline))
    metrics = {key: collect_curves(result, column) for key, column in METRIC_COLUMNS.items()}
    by_time = {t: collect_curves(result, f"held_out_{t}") for t in held_out_times(result)}
    costs = relative_costs(result)
    numbers: dict[str, str] = {}
    for name in (method["name"] for method in result["methods"]):
        quantities = {}
        if name in quality.by_method:
            quantities["seeds"] = str(len(quality.pair(name, baseline)[0]))
            quantities[result["metric"]] = f"{quality.final_mean(name):.{decimals}f}"
        for metric, curves in metrics.items():
            if name in curves.by_method:
                quantities |= format_metric(metric, curves, name, baseline)
        if probe := best_probe(result, name):
            block, accuracy = probe
            quantities["probe"] = f"{accuracy:.1%} (block {block})"
        if name != baseline and len(quality.pair(name, baseline)[0]):
            quantities |= format_comparison(quality, name, baseline, decimals)
            quantities |= format_held_out(by_time, name, baseline)
            quantities |= format_speed_ups(quality, name, baseline, costs)
        numbers |= {f"{name} {quantity}": text for quantity, text in quantities.items()}
    return numbers


def format_metric(metric: str, curves: Curves, name: str, baseline: str) -> dict[str, str]:
    """Return the final value of a metric, and for some metrics its difference from the baseline."""
    is_percentage = metric == "agreement"
    final = curves.final_mean(name)
    if is_percentage:
        decimals = 1
        numbers = {metric: f"{final:.1%}"}
    else:
        reference = baseline if baseline in curves.by_method else name
        decimals = count_decimals(curves.final_mean(reference))
        numbers = {metric: f"{final:.{decimals}f}"}
    values, baseline_values = curves.pair(name, baseline)
    if metric in COMPARED_METRICS and name != baseline and len(values):
        differences = (values - baseline_values)[:, -1] * (100 if is_percentage else 1)
        estimate = bootstrap_interval(differences.tolist())
        numbers[f"{metric} difference"] = format_estimate(estimate, f"+.{decimals}f")
    return numbers


def format_comparison(quality: Curves, name: str, baseline: str, decimals: int) -> dict[str, str]:
    """Return the final differences of the main metric from the baseline."""
    values, baseline_values = quality.pair(name, baseline)
    differences = (values - baseline_values)[:, -1].tolist()
    num_better = sum(difference < 0 for difference in differences)
    signed = f"+.{decimals}f"
    numbers = {
        "better": f"{num_better} of {len(differences)}",
        "difference": format_estimate(bootstrap_interval(differences), signed),
    }
    if len(differences) > 1:
        numbers["student"] = format_ends(student_interval(differences), signed)
        numbers["detectable"] = f"{detectable_difference(differences):.{decimals}f}"
    return numbers


def format_held_out(by_time: dict[str, Curves], name: str, baseline: str) -> dict[str, str]:
    """Return the differences of the final held-out losses, in percent of the baseline's."""
    numbers: dict[str, str] = {}
    for t, curves in by_time.items():
        values, baseline_values = curves.pair(name, baseline)
        differences = 100 * (values - baseline_values)[:, -1] / baseline_values[:, -1].mean()
        estimate = bootstrap_interval(differences.tolist())
        numbers[f"held-out at {t}"] = format_estimate(estimate, "+.1f")
    return numbers


def format_speed_ups(
    quality: Curves, name: str, baseline: str, costs: dict[str, dict[str, float]]
) -> dict[str, str]:
    """Return the speed-ups in images at all milestones, and the final ones in other units."""
    values, baseline_values = quality.pair(name, baseline)
    speed_ups = compute_speed_ups(quality.images, baseline_values, values)
    final = speed_ups[-1]
    numbers = {
        f"speed-up at {speed_up.images}": format_speed_up(speed_up) for speed_up in speed_ups
    }
    numbers["speed-up"] = format_speed_up(final)
    for unit, factors in costs.items():
        if name in factors:
            numbers[f"speed-up per {unit}"] = format_speed_up(final.per_cost(factors[name]))
    return numbers
