"""Tests of the statistics of a convergence study, and of its tables and its figure."""

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
    bootstrap_interval,
    compute_speed_ups,
    detectable_difference,
    draw_resamples,
    images_needed,
    select_milestones,
)
from experiments.study_numbers import best_probe, collect_curves, format_numbers
from experiments.study_page import draw_figure, format_tables

IMAGES = np.array([1, 2, 4, 8, 16, 32, 64]) * 1000.0


def falling(count: int, points: int = 8, seed: int = 0) -> np.ndarray:
    """(n, P) curves of no particular form, each falling at each step."""
    return np.exp(
        -np.cumsum(np.random.default_rng(seed).uniform(0.1, 0.5, (count, points)), axis=1)
    )


def test_crossing_of_a_power_law_is_exact():
    images = np.array([3.0, 7.0, 40.0, 41.0, 900.0])
    for needed in (3.0, 5.0, 7.0, 39.0, 40.5, 500.0, 900.0):
        low, high = images_needed(images, 20 * images**-0.7, 20 * needed**-0.7)
        assert low == high == pytest.approx(needed, rel=1e-12)


def test_crossing_scales_with_images_and_not_with_the_unit_of_quality():
    curve = falling(3, len(IMAGES))
    goal = np.sqrt(curve[:, 2] * curve[:, 4])
    needed, _ = images_needed(IMAGES, curve, goal)
    assert np.all((IMAGES[2] < needed) & (needed < IMAGES[4]))
    needed_scaled, _ = images_needed(7 * IMAGES, curve, goal)
    assert np.allclose(needed_scaled, 7 * needed, rtol=1e-12)
    needed_other_unit, _ = images_needed(IMAGES, 7 * curve, 7 * goal)
    assert np.allclose(needed_other_unit, needed, rtol=1e-12)


def test_first_crossing_counts():
    assert images_needed(IMAGES[:5], [5, 2, 3, 1, 4], 2.0) == pytest.approx((2000, 2000), rel=1e-12)


def test_crossing_outside_of_the_evaluations_has_a_bound():
    assert images_needed(IMAGES[:3], [3, 2, 1], 0.5) == (4000, math.inf)
    assert images_needed(IMAGES[:3], [3, 2, 1], 3.5) == (0, 1000)
    assert images_needed(IMAGES[:3], [3, 2, 1], 3.0) == pytest.approx((1000, 1000), rel=1e-12)
    assert images_needed(IMAGES[:3], [3, 2, 1], 1.0) == pytest.approx((4000, 4000), rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_curve_ahead_by_a_factor_has_this_speed_up_with_an_empty_interval(count):
    curve = falling(count)
    ahead, behind = curve[:, 1:], curve[:, :-1]
    found = compute_speed_ups(IMAGES, behind, ahead)
    assert [each.images for each in found] == [16000, 32000, 64000]
    for each in found:
        assert [*each.value] == pytest.approx([2, 2], rel=1e-12)
        assert (
            (each.low, each.high) == (None, None)
            if count == 1
            else np.allclose([each.low, each.high], 2, rtol=1e-12)
        )
    assert all(
        np.allclose(each.value, 1, rtol=1e-12) for each in compute_speed_ups(IMAGES, ahead, ahead)
    )


def test_curves_are_averaged_before_crossing_and_resampled_as_pairs():
    sizes = np.array([[1.0], [2.0], [4.0]])
    base, method = sizes * IMAGES**-0.5, sizes * (3 * IMAGES) ** -0.5
    together, apart = (
        compute_speed_ups(IMAGES, base, method)[-1],
        compute_speed_ups(IMAGES, base, method[::-1])[-1],
    )
    assert np.allclose(together[2:], 3, rtol=1e-9)
    assert apart.value == pytest.approx(together.value) and apart.low.low < 2 < 4 < apart.high.low
    assert together.quality == pytest.approx(sizes.mean() * IMAGES[-1] ** -0.5)


def test_speed_up_of_a_curve_without_a_crossing_is_a_bound():
    curve = falling(4, len(IMAGES))
    for each in compute_speed_ups(IMAGES, curve, 1e3 * curve):
        assert np.allclose([each.value, each.low, each.high], (0, each.images / 64000))
    for each in compute_speed_ups(IMAGES, curve, 1e-3 * curve):
        assert np.allclose([each.value, each.low, each.high], (each.images / 1000, math.inf))
    rising = falling(4, len(IMAGES))[:, ::-1]  # so that neither crossing is known
    assert compute_speed_ups(IMAGES, rising, 0.9 * rising)[-1].value == (0, math.inf)


def test_end_of_an_interval_is_a_bound_if_resamples_have_no_crossing():
    base = np.tile(IMAGES**-0.5, (4, 1))
    method = base * np.array([[0.8], [0.8], [0.8], [1.5]])
    found = compute_speed_ups(IMAGES, base, method)[-1]
    assert found.value.low == found.value.high > 1 and found.high.low == found.high.high > 1
    assert found.low == Bounds(0, pytest.approx(1))


def test_speed_up_per_cost_is_divided_by_the_cost():
    found = compute_speed_ups(IMAGES, falling(3, 7), 0.9 * falling(3, 7))[-1]
    assert (
        np.allclose(found.per_cost(1.5)[2:], np.array(found[2:]) / 1.5)
        and found.per_cost(1.5)[:2] == found[:2]
    )
    single = compute_speed_ups(IMAGES, falling(1, 7), falling(1, 7))[-1]
    assert single.per_cost(2.0).low is None


def test_milestones_are_the_evaluations_nearest_to_quarters():
    assert select_milestones(np.arange(1, 9)) == [1, 3, 5, 7] and select_milestones(
        np.array([9])
    ) == [0]
    assert select_milestones(np.arange(1, 5)) == [1, 2, 3], (
        "at the first point there are bounds alone"
    )


def test_bootstrap_interval_approximates_that_of_all_resamples():
    values = [1.0, 2.0, 4.0, 8.0]
    means = sorted(np.mean(drawn) for drawn in itertools.product(values, repeat=4))
    found = bootstrap_interval(values, 0.8)
    assert found.mean == 3.75 and found.count == 4
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.1, 0.9]), abs=0.02)


def test_resamples_are_reproducible():
    before = draw_resamples(4)
    draw_resamples.cache_clear()
    assert np.array_equal(draw_resamples(4), before) and np.all(before.sum(1) == 4)


def test_bootstrap_interval_follows_shifts_and_scales_of_the_values():
    assert bootstrap_interval([0.1] * 5) == (0.1, 0.1, 0.1, 5) and bootstrap_interval([0.3]) == (
        0.3,
        None,
        None,
        1,
    )
    values = np.random.default_rng(0).normal(size=5)
    assert bootstrap_interval(values - 7)[:3] == pytest.approx(
        np.array(bootstrap_interval(values)[:3]) - 7
    )
    assert bootstrap_interval(-2 * values)[:3] == pytest.approx(
        -2 * np.array(bootstrap_interval(values)[:3])[[0, 2, 1]], abs=0.05
    )


def test_bootstrap_interval_has_the_documented_coverage():
    drawn = np.random.default_rng(0).normal(size=(600, 5))
    covered = np.mean([found.low <= 0 <= found.high for found in map(bootstrap_interval, drawn)])
    assert covered == pytest.approx(
        COVERAGE[5], abs=0.04
    )  # 2.7 standard errors; 95% lie far outside


@pytest.mark.parametrize("count", [2, 3, 6, 20])
def test_detectable_difference_is_detected_in_80_percent_of_studies(count):
    rng = np.random.default_rng(count)
    differences = rng.normal(size=count)
    least = detectable_difference(differences, power=0.8)
    studies = rng.normal(least, differences.std(ddof=1), size=(20_000, count))
    t = studies.mean(1) / stats.sem(studies, axis=1)
    assert np.mean(abs(t) > stats.t.ppf(0.975, count - 1)) == pytest.approx(0.8, abs=0.01)
    assert detectable_difference(-3 * differences + 5) == pytest.approx(3 * least)
    assert (
        detectable_difference(differences, power=0.9) > least
        and detectable_difference(differences[:1]) is None
    )


def study(seeds=(1, 2, 3), without=(), plain=False) -> dict:
    """A result of made-up curves; of `without` (name, seed) there are no runs, and if `plain` nothing that may be absent."""
    methods = [
        ("vanilla", "vanilla SiT", 1.0),
        ("sra2", "SRA 2, cosine", 0.95),
        ("repa", "REPA", 0.9),
    ]
    noise, runs = np.random.default_rng(0), []
    for (name, _, factor), seed in itertools.product(methods, seeds):
        fd, agree, loss = (
            factor * 99 * IMAGES**-0.5 * noise.uniform(1, 1.1, 7),
            *noise.uniform(0.6, 0.7, (2, 7)),
        )
        more = {} if plain else {"class_agreement": agree.tolist(), "held_out": loss.tolist()}
        more |= (
            {}
            if plain
            else {"held_out_0.5": (loss * (1 if name == "vanilla" else 1.25 - seed / 4)).tolist()}
        )
        run = {
            "name": name,
            "seed": seed,
            "metrics": {"images": IMAGES.tolist(), "FD-fashion": fd.tolist(), **more},
        }
        if not plain:
            run["probe"] = {"t": 0.5, "accuracy": {"3": 0.6, "6": 0.7 + 0.01 * seed, "9": 0.5}}
        if (name, seed) not in without:
            runs.append(run)
    told = [
        {
            "name": name,
            "label": label,
            "training_flops": 1e9 / factor,
            "step_s": {"median": 0.01 / factor**2},
        }
        for name, label, factor in methods
    ]
    about = {
        "model": "SiT-S/2",
        "batch_size": 100,
        "steps": 640,
        "metric": "FD-fashion",
        "methods": told,
        "command": "python",
    }
    if plain:
        about["methods"] = [method | {"step_s": None} for method in told]
    else:
        about["floor"] = {"FD-fashion": 0.31, "class_agreement": 0.9}
    return about | {"runs": runs}


def ends(found: dict, name: str, metric: str = "FD-fashion") -> dict[int, float]:
    return results.final_values(found["runs"], metric)[name]


def test_numbers_equal_those_computed_from_the_runs():
    found = study()
    told, base = format_numbers(found), ends(found, "vanilla")
    apart = [ends(found, "repa")[seed] - base[seed] for seed in base]
    few = bootstrap_interval(apart)
    student = results.paired_difference(ends(found, "repa"), base)
    assert told["repa FD-fashion"] == f"{np.mean([*ends(found, 'repa').values()]):.4f}"
    assert told["repa difference"] == f"{few.mean:+.4f} ({few.low:+.4f} to {few.high:+.4f})"
    assert told["repa student"] == f"{student.low:+.4f} to {student.high:+.4f}"
    assert told["repa detectable"] == f"{detectable_difference(apart):.4f}"
    assert told["repa probe"] == "72.0% (block 6)"
    for what, metric, form, unit in (
        ("agreement", "class_agreement", "+.1f", 100),
        ("held-out", "held_out", "+.4f", 1),
    ):
        mean = (
            unit
            * results.paired_difference(
                ends(found, "repa", metric), ends(found, "vanilla", metric)
            ).mean
        )
        assert told[f"repa {what} difference"].startswith(f"{mean:{form}} (")
    in_images, in_flops, in_seconds = (
        float(told[f"repa speed-up{unit}"].split()[0]) for unit in ("", " per FLOP", " per second")
    )
    assert (in_flops, in_seconds) == pytest.approx((in_images * 0.9, in_images * 0.81), abs=0.011)
    assert told["repa speed-up"] == told["repa speed-up at 64000"]


def test_held_out_differences_are_in_percent_of_the_baseline():
    found = study()
    for run in found["runs"]:
        factor = {"vanilla": 1, "sra2": 1.25 - run["seed"] / 4, "repa": 1 + run["seed"] / 4}[
            run["name"]
        ]
        run["metrics"]["held_out_0.5"] = [
            0.8 * factor
        ] * 7  # of sra2 with seed 1 as much, then a quarter less each
        run["metrics"]["FD-fashion"] = [factor] * 7
    told = format_numbers(found)
    assert told["sra2 held-out at 0.5"] == "-25.0 (-50.0 to +0.0)" and told[
        "repa held-out at 0.5"
    ].startswith("+50.0 (")
    assert (told["sra2 better"], told["repa better"]) == ("2 of 3", "0 of 3")


@pytest.mark.parametrize(
    "found", [study(), study((4,), plain=True)], ids=["full", "one plain seed"]
)
def test_tables_contain_every_method_and_number(found, tmp_path):
    results.save_result(tmp_path / "made-up.json", "convergence", found, found["runs"])
    found = results.load_result(tmp_path / "made-up.json", "convergence")
    text, told = format_tables(found), format_numbers(found)
    cells = {cell.strip() for line in text.splitlines() for cell in line.split("|")}
    assert {method["label"] for method in found["methods"]} <= cells
    assert {
        value for key, value in told.items() if not key.endswith((" seeds", " better"))
    } <= cells
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = [
        (len(list(group)), width)
        for width, group in itertools.groupby(rows, lambda row: row.count("|"))
    ]
    assert all(height >= 4 for height, _ in widths) and ("*0.310*" in cells) == ("floor" in found)
    assert all(len(line) <= 250 for line in text.splitlines())


def test_only_common_seeds_are_compared_and_their_number_is_shown():
    found = study(without={("vanilla", 1), ("repa", 3), ("sra2", 1), ("sra2", 2), ("sra2", 3)})
    told, text = format_numbers(found), format_tables(found)
    assert told["repa difference"].startswith(
        f"{ends(found, 'repa')[2] - ends(found, 'vanilla')[2]:+.4f}"
    )
    assert (
        told["repa seeds"] == "1"
        and "repa student" not in told
        and "(" not in told["repa difference"]
    )
    for row in (
        "| vanilla SiT (2 of 3 seeds) |",
        "| REPA (1 of 3 seeds) |",
        "| SRA 2, cosine | not run |",
    ):
        assert row in text


def test_methods_without_common_seeds_have_only_a_mean():
    found = study(without={("vanilla", 1), ("repa", 2), ("repa", 3)})
    assert f"| REPA (0 of 3 seeds) | {ends(found, 'repa')[1]:.4f} |  |" in format_tables(found)
    assert {
        key
        for key in format_numbers(found)
        if "repa" in key and ("difference" in key or "speed" in key)
    } == set()


def test_incomparable_runs_are_refused():
    with pytest.raises(UserError, match="no finished run of vanilla SiT"):
        format_tables(study(without={("vanilla", seed) for seed in (1, 2, 3)}))
    found = study()
    found["runs"][-1]["metrics"]["FD-fashion"][2] = math.nan
    with pytest.raises(UserError, match="FD-fashion of repa, seed 3, is not finite"):
        format_tables(found)


def test_curves_contain_the_evaluations_that_all_runs_have():
    found = study()
    found["runs"][0]["metrics"]["FD-fashion"][1] = None
    found["runs"][1]["metrics"] = {
        key: values[2:] for key, values in found["runs"][1]["metrics"].items()
    }
    measured = collect_curves(found, "FD-fashion")
    assert measured.images.tolist() == IMAGES[2:].tolist()
    assert measured.by_method["vanilla"][2].tolist() == found["runs"][1]["metrics"]["FD-fashion"]


def test_best_probe_ignores_blocks_that_some_runs_lack():
    found = study()
    del found["runs"][1]["probe"]["accuracy"]["6"]
    assert best_probe(found, "vanilla") == ("3", pytest.approx(0.6))


def test_bounds_are_formatted_as_inequalities():
    found = study()
    for run in found["runs"]:
        factor = {"sra2": 9.0, "repa": 0.01}.get(run["name"], 1.0)
        run["metrics"]["FD-fashion"] = [factor * value for value in run["metrics"]["FD-fashion"]]
    told = format_numbers(found)
    assert told["sra2 speed-up"] == "< 1.00" and told["sra2 speed-up at 16000"] == "< 0.25"
    assert (
        told["repa speed-up at 32000"].startswith("> 32.00")
        and told["repa speed-up per FLOP"] == "> 57.60"
    )


@pytest.mark.parametrize(
    "found",
    [study(without={("repa", 2)}), study((4,), {("sra2", 4)}, plain=True)],
    ids=["rich", "plain with runs missing"],
)
def test_figure_shows_means_and_paired_differences(found, tmp_path, monkeypatch):
    from matplotlib import pyplot

    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    draw_figure(found, tmp_path / "made-up.png")
    monkeypatch.undo()
    pyplot.close("all")
    assert (tmp_path / "made-up.png").read_bytes().startswith(b"\x89PNG")
    measured = collect_curves(found, "FD-fashion")
    there = [method["label"] for method in found["methods"] if method["name"] in measured.by_method]
    assert there in [[text.get_text() for text in legend.texts] for legend in kept[0].legends]
    quality, _, difference, loss = kept[0].axes
    means = [np.mean([*of.values()], axis=0).tolist() for of in measured.by_method.values()]
    assert [[*line.get_ydata()] for line in quality.lines][: len(means)] == means
    ours, theirs = measured.pair("repa", "vanilla")
    told = [line.get_ydata() for line in difference.lines if len(line.get_xdata()) == len(IMAGES)]
    assert len(told) == len(there) - 1 and np.allclose(
        told[-1], 100 * (ours.mean(0) / theirs.mean(0) - 1)
    )
    assert loss.get_visible() == ("probe" in found["runs"][0])
