"""Test the statistics, the tables and the figure of a convergence study."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from common.cli import UserError
from experiments import results
from experiments.speedup import (
    COVERAGE,
    Bounds,
    SpeedUp,
    compute_bootstrap_interval,
    compute_detectable_difference,
    compute_speed_ups,
    count_images_needed,
    draw_resamples,
    select_milestones,
)
from experiments.study_numbers import (
    collect_curves,
    collect_probes,
    find_best_probe,
    format_numbers,
    format_speed_up,
)
from experiments.study_page import draw_figure, format_tables

IMAGES = np.array([1, 2, 4, 8, 16, 32, 64]) * 1000.0


def make_falling_curves(count: int, points: int = 8) -> np.ndarray:
    """Return arbitrary strictly decreasing curves, (n, P)."""
    steps = np.random.default_rng(0).uniform(0.1, 0.5, (count, points))
    return np.exp(-np.cumsum(steps, axis=1))


def test_crossing_of_a_power_law_is_exact():
    images = np.array([3.0, 7.0, 40.0, 41.0, 900.0])
    for needed in (3.0, 5.0, 7.0, 39.0, 40.5, 500.0, 900.0):
        low, high = count_images_needed(images, 20 * images**-0.7, 20 * needed**-0.7)
        assert low == high == pytest.approx(needed, rel=1e-12)


def test_crossing_scales_with_images_and_not_with_the_unit_of_quality():
    curve = make_falling_curves(3, len(IMAGES))
    goal = np.sqrt(curve[:, 2] * curve[:, 4])
    needed, _ = count_images_needed(IMAGES, curve, goal)
    assert np.all((IMAGES[2] < needed) & (needed < IMAGES[4]))
    needed_scaled, _ = count_images_needed(7 * IMAGES, curve, goal)
    assert np.allclose(needed_scaled, 7 * needed, rtol=1e-12)
    needed_other_unit, _ = count_images_needed(IMAGES, 7 * curve, 7 * goal)
    assert np.allclose(needed_other_unit, needed, rtol=1e-12)


def test_first_of_several_crossings_is_used():
    assert count_images_needed(IMAGES[:5], [5, 2, 3, 1, 4], 2.0) == pytest.approx(
        (2000, 2000), rel=1e-12
    )


def test_crossing_outside_of_the_evaluations_has_a_bound():
    assert count_images_needed(IMAGES[:3], [3, 2, 1], 0.5) == (4000, math.inf)
    assert count_images_needed(IMAGES[:3], [3, 2, 1], 3.5) == (0, 1000)
    assert count_images_needed(IMAGES[:3], [3, 2, 1], 3.0) == pytest.approx((1000, 1000), rel=1e-12)
    assert count_images_needed(IMAGES[:3], [3, 2, 1], 1.0) == pytest.approx((4000, 4000), rel=1e-12)


def test_crossing_of_a_single_evaluation_is_a_bound():
    for quality, bounds in ((5.0, (8.0, np.inf)), (20.0, (0.0, 8.0)), (10.0, (8.0, 8.0))):
        crossing = count_images_needed(np.array([8]), np.array([10.0]), np.array(quality))
        assert crossing == pytest.approx(bounds)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_curve_ahead_by_a_factor_has_this_speed_up_with_an_empty_interval(count):
    curve = make_falling_curves(count)
    ahead, behind = curve[:, 1:], curve[:, :-1]
    speed_ups = compute_speed_ups(IMAGES, behind, ahead)
    assert [speed_up.images for speed_up in speed_ups] == [16000, 32000, 64000]
    for speed_up in speed_ups:
        assert np.allclose(speed_up.value, 2, rtol=1e-12)
        assert len(speed_up.interval) == (0 if count == 1 else 2)
        assert np.allclose(speed_up.interval, 2, rtol=1e-12)
    for speed_up in compute_speed_ups(IMAGES, ahead, ahead):
        assert np.allclose(speed_up.value, 1, rtol=1e-12)


def test_curves_are_averaged_before_crossing_and_resampled_as_pairs():
    sizes = np.array([[1.0], [2.0], [4.0]])
    baseline, method = sizes * IMAGES**-0.5, sizes * (3 * IMAGES) ** -0.5
    paired = compute_speed_ups(IMAGES, baseline, method)[-1]
    unpaired = compute_speed_ups(IMAGES, baseline, method[::-1])[-1]
    assert np.allclose([paired.value, *paired.interval], 3, rtol=1e-9)
    assert unpaired.value == pytest.approx(paired.value)
    low, high = unpaired.interval
    assert low.low < 2 < 4 < high.low


def test_speed_up_of_a_curve_without_a_crossing_is_a_bound():
    curve = make_falling_curves(4, len(IMAGES))
    for speed_up in compute_speed_ups(IMAGES, curve, 1e3 * curve):
        assert np.allclose([speed_up.value, *speed_up.interval], (0, speed_up.images / 64000))
    for speed_up in compute_speed_ups(IMAGES, curve, 1e-3 * curve):
        assert np.allclose([speed_up.value, *speed_up.interval], (speed_up.images / 1000, math.inf))
    rising = make_falling_curves(4, len(IMAGES))[:, ::-1]  # has no known crossing
    assert compute_speed_ups(IMAGES, rising, 0.9 * rising)[-1].value == (0, math.inf)


def test_end_of_an_interval_is_a_bound_if_resamples_have_no_crossing():
    base = np.tile(IMAGES**-0.5, (4, 1))
    method = base * np.array([[0.8], [0.8], [0.8], [1.5]])
    speed_up = compute_speed_ups(IMAGES, base, method)[-1]
    low, high = speed_up.interval
    assert speed_up.value.low == speed_up.value.high > 1 and high.low == high.high > 1
    assert low == Bounds(0, pytest.approx(1))


def test_speed_up_is_divided_by_the_cost():
    speed_up = SpeedUp(1000, Bounds(3, 3), (Bounds(0, 1.5), Bounds(4.5, math.inf)))
    assert format_speed_up(speed_up) == "3.00 (< 1.50 to > 4.50)"
    assert format_speed_up(speed_up, 1.5) == "2.00 (< 1.00 to > 3.00)"
    assert format_speed_up(SpeedUp(1000, Bounds(3, 3), ()), 2.0) == "1.50"


def test_milestones_are_the_evaluations_nearest_to_quarters_of_training():
    assert select_milestones(np.arange(1, 9)) == [1, 3, 5, 7]


def test_first_evaluation_is_a_milestone_only_if_there_is_no_other():
    assert select_milestones(np.arange(1, 5)) == [1, 2, 3]
    assert select_milestones(np.array([9])) == [0]


def test_bootstrap_interval_approximates_the_interval_of_all_resamples():
    values = [1.0, 2.0, 4.0, 8.0]
    means = sorted(np.mean(resample) for resample in itertools.product(values, repeat=4))
    estimate = compute_bootstrap_interval(values)
    assert estimate.mean == 3.75
    expected = np.quantile(means, [0.025, 0.975])
    assert (estimate.low, estimate.high) == pytest.approx(expected, abs=0.02)


def test_resamples_are_reproducible():
    resamples = draw_resamples(4)
    assert np.array_equal(draw_resamples(4), resamples) and np.all(resamples.sum(1) == 4)


def test_bootstrap_interval_follows_shifts_and_scales_of_the_values():
    values = np.random.default_rng(0).normal(size=5)
    mean, low, high = compute_bootstrap_interval(values)
    shifted = compute_bootstrap_interval(values - 7)
    assert shifted == pytest.approx((mean - 7, low - 7, high - 7))
    negated = compute_bootstrap_interval(-2 * values)
    assert negated == pytest.approx((-2 * mean, -2 * high, -2 * low), abs=0.05)


def test_bootstrap_interval_of_equal_values_is_empty():
    # The means of six values of 0.1 have rounding errors, unlike those of five.
    assert compute_bootstrap_interval([0.1] * 6) == (0.1, 0.1, 0.1)
    assert compute_bootstrap_interval([0.3]) == pytest.approx(
        (0.3, math.nan, math.nan), nan_ok=True
    )


def test_bootstrap_interval_has_the_documented_coverage():
    samples = np.random.default_rng(0).normal(size=(600, 5))
    estimates = [compute_bootstrap_interval(values) for values in samples]
    coverage = np.mean([estimate.low <= 0 <= estimate.high for estimate in estimates])
    # The tolerance is 2.7 standard errors, and excludes the nominal 95%.
    assert coverage == pytest.approx(COVERAGE[5], abs=0.04)


@pytest.mark.parametrize("count", [2, 3, 6, 20])
def test_detectable_difference_is_detected_in_80_percent_of_studies(count):
    rng = np.random.default_rng(count)
    differences = rng.normal(size=count)
    least = compute_detectable_difference(differences)
    studies = rng.normal(least, differences.std(ddof=1), size=(20_000, count))
    t = studies.mean(1) / stats.sem(studies, axis=1)
    assert np.mean(abs(t) > stats.t.ppf(0.975, count - 1)) == pytest.approx(0.8, abs=0.01)
    assert compute_detectable_difference(-3 * differences + 5) == pytest.approx(3 * least)


# The name, the label, and the final metric relative to vanilla SiT.
METHODS = [
    ("vanilla", "vanilla SiT", 1.0),
    ("sra2", "SRA 2, cosine", 0.95),
    ("repa", "REPA", 0.9),
]


def make_result(seeds=(1, 2, 3), without=(), minimal=False) -> dict:
    """Return a result with synthetic curves.

    Args:
        seeds: The seeds of the runs.
        without: Pairs (method, seed) of missing runs.
        minimal: Whether to omit all entries that a result may lack.
    """
    generator = np.random.default_rng(0)
    runs = []
    for (name, _, factor), seed in itertools.product(METHODS, seeds):
        fd = factor * 99 * IMAGES**-0.5 * generator.uniform(1, 1.1, 7)
        agreement, loss = generator.uniform(0.6, 0.7, (2, 7))
        metrics = {"images": IMAGES.tolist(), "FD-fashion": fd.tolist()}
        run = {"name": name, "seed": seed, "metrics": metrics}
        if not minimal:
            metrics["class_agreement"] = agreement.tolist()
            metrics["held_out"] = loss.tolist()
            metrics["held_out_0.5"] = loss.tolist()
            run["probe"] = {"t": 0.5, "accuracy": {"3": 0.6, "6": 0.7 + 0.01 * seed, "9": 0.5}}
        if (name, seed) not in without:
            runs.append(run)
    result = {
        "model": "SiT-S/2",
        "batch_size": 100,
        "steps": 640,
        "metric": "FD-fashion",
        "methods": [
            {
                "name": name,
                "label": label,
                "training_flops": 1e9 / factor,
                "step_s": None if minimal else {"median": 0.01 / factor**2},
            }
            for name, label, factor in METHODS
        ],
        "command": "python",
        "runs": runs,
    }
    if not minimal:
        result["floor"] = {"FD-fashion": 0.31, "class_agreement": 0.9}
    return result


def collect_final_values(result: dict, name: str, metric: str = "FD-fashion") -> dict[int, float]:
    return results.collect_final_values(result["runs"], metric)[name]


def test_numbers_agree_with_the_runs():
    result = make_result()
    numbers = format_numbers(result)
    repa, vanilla = collect_final_values(result, "repa"), collect_final_values(result, "vanilla")
    differences = [repa[seed] - vanilla[seed] for seed in vanilla]
    mean, low, high = compute_bootstrap_interval(differences)
    student = results.compute_paired_difference(repa, vanilla)
    assert numbers["repa FD-fashion"] == f"{np.mean([*repa.values()]):.4f}"
    assert numbers["repa FD-fashion difference"] == f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
    assert numbers["repa student"] == f"{student.low:+.4f} to {student.high:+.4f}"
    assert numbers["repa detectable"] == f"{compute_detectable_difference(differences):.4f}"
    assert numbers["repa probe"] == "72.0% (block 6)"
    for key, metric, spec, unit in (
        ("agreement", "class_agreement", "+.1f", 100),
        ("held-out", "held_out", "+.4f", 1),
    ):
        difference = results.compute_paired_difference(
            collect_final_values(result, "repa", metric),
            collect_final_values(result, "vanilla", metric),
        )
        assert numbers[f"repa {key} difference"].startswith(f"{unit * difference.mean:{spec}} (")
    in_images, in_flops, in_seconds = (
        float(numbers[f"repa speed-up{unit}"].split()[0])
        for unit in ("", " per FLOP", " per second")
    )
    assert (in_flops, in_seconds) == pytest.approx((in_images * 0.9, in_images * 0.81), abs=0.011)
    assert numbers["repa speed-up"] == numbers["repa speed-up at 64000"]


def test_held_out_differences_are_in_percent_of_the_baseline():
    result = make_result()
    for run in result["runs"]:
        quarter = run["seed"] / 4
        factors = {"vanilla": 1, "sra2": 1.25 - quarter, "repa": 1 + quarter}
        factor = factors[run["name"]]
        run["metrics"]["held_out_0.5"] = [0.8 * factor] * 7
        run["metrics"]["FD-fashion"] = [factor] * 7
    numbers = format_numbers(result)
    assert numbers["sra2 held-out at 0.5"] == "-25.0 (-50.0 to +0.0)"
    assert numbers["repa held-out at 0.5"].startswith("+50.0 (")


@pytest.mark.parametrize(
    "result", [make_result(), make_result((4,), minimal=True)], ids=["full", "minimal"]
)
def test_tables_contain_every_method_and_number(result, tmp_path):
    results.save_result(tmp_path / "made-up.json", "convergence", result, result["runs"])
    result = results.load_result(tmp_path / "made-up.json", "convergence")
    lines = format_tables(result).splitlines()
    cells = {cell.strip() for line in lines for cell in line.split("|")}
    assert {method["label"] for method in result["methods"]} <= cells
    for key, text in format_numbers(result).items():
        assert text in cells or key.endswith(" seeds")
    assert ("*0.310*" in cells) == ("floor" in result)
    rows = [line for line in lines if line.startswith("|")]
    for _, table in itertools.groupby(rows, lambda row: row.count("|")):
        assert len(list(table)) >= 4
    assert all(len(line) <= 250 for line in lines)


def test_only_common_seeds_are_compared_and_their_number_is_shown():
    missing = {("vanilla", 1), ("repa", 3), ("sra2", 1), ("sra2", 2), ("sra2", 3)}
    result = make_result(without=missing)
    numbers, text = format_numbers(result), format_tables(result)
    difference = (
        collect_final_values(result, "repa")[2] - collect_final_values(result, "vanilla")[2]
    )
    assert numbers["repa FD-fashion difference"] == f"{difference:+.4f}"
    assert numbers["repa seeds"] == "1" and "repa student" not in numbers
    assert "| vanilla SiT (2 of 3 seeds) |" in text
    assert "| REPA (1 of 3 seeds) |" in text
    assert "| SRA 2, cosine | not run |" in text


def test_methods_without_common_seeds_have_means_but_no_differences():
    result = make_result(without={("vanilla", 1), ("repa", 2), ("repa", 3)})
    mean = collect_final_values(result, "repa")[1]
    assert f"| REPA (0 of 3 seeds) | {mean:.4f} |  |" in format_tables(result)
    for key in format_numbers(result):
        assert "repa" not in key or not ("difference" in key or "speed" in key)


def test_incomparable_runs_are_rejected():
    with pytest.raises(UserError, match="no finished run of vanilla SiT"):
        format_tables(make_result(without={("vanilla", seed) for seed in (1, 2, 3)}))
    result = make_result()
    result["runs"][-1]["metrics"]["FD-fashion"][2] = math.nan
    with pytest.raises(UserError, match="FD-fashion of repa, seed 3, is not finite"):
        format_tables(result)


def test_curves_contain_the_evaluations_that_all_runs_have():
    result = make_result()
    first, second, *_ = (run["metrics"] for run in result["runs"])
    first["FD-fashion"][1] = None
    for key in second:
        second[key] = second[key][2:]
    curves = collect_curves(result, "FD-fashion")
    assert curves.images.tolist() == IMAGES[2:].tolist()
    assert curves.by_method["vanilla"][2].tolist() == second["FD-fashion"]


def test_best_probe_ignores_blocks_that_some_runs_lack():
    result = make_result()
    del result["runs"][1]["probe"]["accuracy"]["6"]
    assert find_best_probe(collect_probes(result)["vanilla"]) == ("3", pytest.approx(0.6))


def test_bounds_are_formatted_as_inequalities():
    result = make_result()
    factors = {"vanilla": 1.0, "sra2": 9.0, "repa": 0.01}
    for run in result["runs"]:
        values = run["metrics"]["FD-fashion"]
        run["metrics"]["FD-fashion"] = [factors[run["name"]] * value for value in values]
    numbers = format_numbers(result)
    assert numbers["sra2 speed-up"] == "< 1.00"
    assert numbers["sra2 speed-up at 16000"] == "< 0.25"
    assert numbers["repa speed-up at 32000"].startswith("> 32.00")
    assert numbers["repa speed-up per FLOP"] == "> 57.60"


@pytest.mark.parametrize(
    "result",
    [make_result(without={("repa", 2)}), make_result((4,), {("sra2", 4)}, minimal=True)],
    ids=["full", "minimal with missing runs"],
)
def test_figure_shows_means_and_paired_differences(result, tmp_path, monkeypatch):
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    draw_figure(result, tmp_path / "made-up.png")
    monkeypatch.undo()
    pyplot.close("all")
    assert (tmp_path / "made-up.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    curves = collect_curves(result, "FD-fashion")
    methods = [method for method in result["methods"] if method["name"] in curves.by_method]
    legends = [[text.get_text() for text in legend.texts] for legend in figure.legends]
    assert [method["label"] for method in methods] in legends

    quality, _, difference, loss = figure.axes
    means = [np.mean([*by_seed.values()], axis=0) for by_seed in curves.by_method.values()]
    assert len(quality.lines) >= len(means)
    for line, mean in zip(quality.lines, means):
        assert np.array_equal(line.get_ydata(), mean)
    repa, vanilla = curves.pair("repa", "vanilla")
    marker_lines = [line for line in difference.lines if len(line.get_xdata()) == len(IMAGES)]
    assert len(marker_lines) == len(methods) - 1
    assert np.allclose(marker_lines[-1].get_ydata(), 100 * (repa.mean(0) / vanilla.mean(0) - 1))
    assert loss.get_visible() == ("probe" in result["runs"][0])
