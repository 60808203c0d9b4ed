"""Create the tables and the figure of a convergence study from its JSON result alone."""

import math
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.formatting import abbreviate, format_markdown_table
from experiments.plotting import add_grid, load_pyplot, save_png
from experiments.results import compute_t_interval
from experiments.speedup import (
    COVERAGE,
    SpeedUp,
    compute_bootstrap_interval,
    compute_speed_ups,
    select_milestones,
)
from experiments.study_numbers import (
    Curves,
    collect_curves,
    collect_main_curves,
    collect_probes,
    format_numbers,
    list_held_out_times,
    list_seeds,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, without yellow, followed by four others.
COLOURS = (
    *("#000000", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"),
    *("#8C564B", "#7F7F7F", "#6A3D9A", "#B2DF8A"),
)
MARKERS = "osDP<>hXp*d"  # without the triangles that point up or down, which mark bounds
FLOOR_LABEL = "autoencoder reconstructions"

# The colour, marker and label of each measured method, by the name of the method.
Styles = dict[str, dict[str, Any]]


def format_tables(result: dict) -> str:
    """Return all tables of a study as Markdown, followed by their explanation.

    Raises:
        UserError: If the runs cannot be compared (see `collect_main_curves`).
    """
    numbers = format_numbers(result)
    metric = result["metric"]
    labels = {method["name"]: method["label"] for method in result["methods"]}
    baseline, *other_methods = labels
    baseline_header = f"difference from {labels[baseline]}"

    # Label the measured methods, and add the number of seeds if some are missing.
    total = len(list_seeds(result))
    measured_labels = {name: label for name, label in labels.items() if f"{name} seeds" in numbers}
    for name, label in measured_labels.items():
        count = numbers[f"{name} seeds"]
        if int(count) < total:
            measured_labels[name] = f"{label} ({count} of {total} seeds)"

    # Add the floor as a last row with italic numbers.
    floor = result.get("floor") or {}
    floor_rows = {}
    for quantity, column, spec in (
        (metric, metric, ".3f"),
        ("agreement", "class_agreement", ".1%"),
    ):
        if floor.get(column) is not None:
            numbers[f"floor {quantity}"] = f"*{floor[column]:{spec}}*"
            floor_rows[quantity] = {"floor": f"*{FLOOR_LABEL}*"}

    quality_columns = {
        metric: metric,
        f"{metric} difference": baseline_header,
        "student": "95% t interval",
        "detectable": "detectable difference",
        "equal FLOPs": "difference at equal FLOPs",
        "speed-up": "speed-up in images",
        "speed-up per FLOP": "speed-up in FLOPs",
        "speed-up per second": "speed-up in seconds",
    }
    detail_columns = {
        "agreement": "class agreement",
        "agreement difference": f"{baseline_header}, percentage points",
        "precision": "precision",
        "recall": "recall",
        "held-out": "held-out loss",
        "held-out difference": baseline_header,
        "probe": describe_probes(result),
    }
    held_out_columns = {f"held-out at {t}": f"t = {t}" for t in list_held_out_times(result)}
    cost_columns = {"FLOP": "FLOPs per image", "second": "seconds per step"}
    speed_up_prefix = "speed-up at "
    for images in sorted(
        {int(key.partition(speed_up_prefix)[2]) for key in numbers if speed_up_prefix in key}
    ):
        header = f"speed-up at the quality of {labels[baseline]} after {abbreviate(images)} images"
        cost_columns[f"{speed_up_prefix}{images}"] = header

    # The first table also lists the methods that were not run.
    not_run_placeholders = {f"{name} {metric}": "not run" for name in labels}
    quality_rows = labels | measured_labels | floor_rows.get(metric, {})
    detail_rows = measured_labels | floor_rows.get("agreement", {})
    lines = make_table(quality_rows, quality_columns, not_run_placeholders | numbers)
    lines += make_table(detail_rows, detail_columns, numbers)
    if held_out_columns and other_methods:
        held_out_rows = {name: labels[name] for name in other_methods}
        corner = f"held-out loss, % {baseline_header}"
        lines += make_table(held_out_rows, held_out_columns, numbers, corner)
    lines += make_table(measured_labels, cost_columns, numbers)
    return "\n".join([*lines, *explain_tables(result), "", "```bash", result["command"], "```", ""])


def describe_probes(result: dict) -> str:
    """Return the header of the column with the accuracies of the linear probe."""
    # All probed methods have the same seeds and blocks.
    accuracies = next(iter(collect_probes(result).values()), [])
    if not accuracies:
        return "probe"
    seeds = "1 seed" if len(accuracies) == 1 else f"{len(accuracies)} seeds"
    return f"probe, best of {len(accuracies[0])} blocks ({seeds})"


def make_table(
    labels: dict[str, str], columns: dict[str, str], numbers: dict[str, str], corner: str = ""
) -> list[str]:
    """Return the lines of a Markdown table, without columns that contain no numbers.

    Args:
        labels: The labels of the rows, by the name of the method.
        columns: The headers of the columns, by the quantity in `numbers`.
        numbers: The numbers of the study, from `format_numbers`.
        corner: The header of the first column, which contains the labels.
    """
    rows = [[corner, *columns.values()]]
    for name, label in labels.items():
        rows.append([label, *(numbers.get(f"{name} {quantity}", "") for quantity in columns)])
    used_columns = [column for column in zip(*rows) if any(column[1:])]
    return [*format_markdown_table([*zip(*used_columns)]), ""]


def explain_tables(result: dict) -> list[str]:
    """Return the lines of the explanation below the tables."""
    quality = collect_main_curves(result)
    images = int(quality.images[-1])
    baseline, *methods = result["methods"]
    label = baseline["label"]
    metric = result["metric"]
    batch_size = result["batch_size"]
    seeds = list_seeds(result)
    plural = "s" if len(seeds) > 1 else ""
    steps = f"{images // batch_size:,} steps of {batch_size} images ({abbreviate(images)} in total)"

    # State how many runs are unfinished.
    planned_images = result["steps"] * batch_size
    num_unfinished = sum(run["metrics"]["images"][-1] < planned_images for run in result["runs"])
    note = []
    if num_unfinished:
        note = [
            f"**{num_unfinished} of {len(result['runs'])} runs are unfinished; all runs are "
            f"compared at {images:,} images, the last point that every run has reached.**",
            "",
        ]

    # State how reliable the bootstrap intervals are.
    counts = {len(quality.pair(method["name"], baseline["name"])[0]) for method in methods}
    coverage = ", ".join(
        f"{COVERAGE[count]:.0%} for {count} seeds" for count in sorted(counts) if count in COVERAGE
    )
    reliability = "With a single seed there is no interval."
    if max(counts, default=0) > 1:
        coverage_note = f" (its coverage is about {coverage})" if coverage else ""
        reliability = f"With few seeds this interval is too narrow{coverage_note}."

    return [
        *note,
        f"The tables show {result['model']} after {steps}. Values are means over "
        f"seed{plural} {' '.join(map(str, seeds))}.",
        "",
        f"- {metric} and held-out loss: lower is better.",
        "- Class agreement is the fraction of samples that the classifier assigns to the requested "
        "class.",
        "- Precision and recall follow Kynkäänniemi et al. and use the classifier's features.",
        f"- The difference from {label} is the mean of the per-seed differences, over the seeds "
        "that both methods were run with,",
        f"  with a 95% percentile bootstrap interval. {reliability}",
        "- The t interval is exact if the differences are normally distributed.",
        f"- The difference at equal FLOPs compares the method at the FLOPs that {label} needs for "
        f"{abbreviate(images)} images; the",
        "  value of the method is read from its curve by log-log interpolation.",
        "- The detectable difference is the mean difference that a paired two-sided t test at the "
        "5% level detects with 80% power.",
        f"- The speed-up in images is the number of images at which {label} reaches a quality, "
        "divided by the number at which",
        "  the method reaches it. Both numbers are read from the mean curves by log-log "
        "interpolation.",
        "- The speed-up in FLOPs or seconds is the same ratio, with each number multiplied by the "
        "cost per image. This cost",
        "  excludes REPA's encoder if its features are precomputed.",
        "- A speed-up with < or > is a bound, because the exact value is outside the measured "
        "range.",
        "- The probe accuracy is averaged over the seeds for which every probed method has a "
        "finished run.",
    ]


def draw_figure(result: dict, path: Path) -> None:
    """Draw the curves of the main metric, the speed-ups, and the differences from the baseline.

    Raises:
        UserError: If the runs cannot be compared (see `collect_main_curves`).
    """
    plt = load_pyplot()
    quality = collect_main_curves(result)
    held_out = collect_curves(result, "held_out")
    styles = {
        method["name"]: {"color": color, "marker": marker, "label": method["label"]}
        for method, color, marker in zip(result["methods"], cycle(COLOURS), cycle(MARKERS))
        if method["name"] in quality.by_method
    }
    figure, ((upper_left, upper_right), (lower_left, lower_right)) = plt.subplots(
        2, 2, figsize=(9.6, 8.4), layout="constrained"
    )
    draw_curves(upper_left, result, quality, styles)
    draw_speed_ups(upper_right, quality, styles)
    draw_differences(lower_left, quality, styles, result["metric"])
    if held_out.by_method:
        draw_differences(lower_right, held_out, styles, "held-out loss")
    else:
        lower_right.set_visible(False)
    for axes in figure.axes:
        add_grid(axes, "y")

    # Lines without data appear only in the legends.
    line = partial(plt.Line2D, [], [])
    make_grey_line = partial(line, color="0.4")
    methods = [line(**style, markersize=5, linewidth=1.4) for style in styles.values()]
    marks = [
        make_grey_line(label="95% bootstrap interval", linewidth=2.6),
        make_grey_line(label="95% t interval", linewidth=0.8),
        make_grey_line(label="range over seeds", linewidth=8, alpha=0.25),
        make_grey_line(label="bound (outside the measured range)", linewidth=0, marker="v"),
    ]
    legend = partial(figure.legend, frameon=False, columnspacing=1.2, handlelength=1.6)
    legend(handles=marks, loc="outside lower center", ncols=4)
    num_columns = len(methods) if len(methods) <= 6 else math.ceil(len(methods) / 2)
    legend(handles=methods, loc="outside upper center", ncols=num_columns)
    save_png(figure, path)


def draw_curves(axes: "Axes", result: dict, quality: Curves, styles: Styles) -> None:
    """Draw the mean curve of each method and the range over its seeds."""
    from matplotlib.ticker import LogLocator

    for name, style in styles.items():
        curves = np.array([*quality.by_method[name].values()])
        axes.plot(quality.images, curves.mean(0), **style, markersize=3.5, linewidth=1.4)
        band = {"color": style["color"], "alpha": 0.13, "linewidth": 0}
        axes.fill_between(quality.images, curves.min(0), curves.max(0), **band)

    # If the value of the autoencoder is far below the curves, a line would compress the curves.
    # Therefore, draw only a text label in that case.
    floor = (result.get("floor") or {}).get(result["metric"])
    if floor and floor > axes.get_ylim()[0] / 3:
        axes.axhline(floor, color="0.35", linestyle="--", linewidth=1.2)
        transform = axes.get_yaxis_transform()
        axes.text(0.02, floor, FLOOR_LABEL, color="0.35", va="bottom", transform=transform)
    elif floor:
        text = f"{FLOOR_LABEL}: {floor:.3f}"
        axes.text(0.02, 0.02, text, color="0.35", transform=axes.transAxes)

    title = f"{result['metric']} (lower is better)"
    axes.set(xscale="log", yscale="log", xlabel="images seen", title=title)
    axes.xaxis.set_major_formatter(lambda images, _: abbreviate(images))
    axes.yaxis.set_major_formatter("{x:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axis.set_minor_formatter("")


def draw_categories(axes: "Axes", images: np.ndarray) -> None:
    """Draw a tick for each number of images, and a grey background behind every second tick."""
    for k in range(0, len(images), 2):
        axes.axvspan(k - 0.5, k + 0.5, color="0.96", linewidth=0, zorder=0)
    axes.set_xticks(range(len(images)), [abbreviate(count) for count in images])
    axes.set_xlim(-0.5, len(images) - 0.5)


def compute_category_offset(index: int, count: int) -> float:
    """Return the horizontal offset of a method from the tick that `count` methods share."""
    return min(0.16, 0.8 / count) * (index - (count - 1) / 2)


def draw_speed_ups(axes: "Axes", quality: Curves, styles: Styles) -> None:
    """Draw the speed-ups in images at the milestones of the baseline.

    If only a bound is known for a value or an interval endpoint, an arrow is drawn at the bound.
    """
    baseline, *names = styles
    by_method: dict[str, list[SpeedUp]] = {}
    for name in names:
        values, baseline_values = quality.pair(name, baseline)
        if len(values):
            by_method[name] = compute_speed_ups(quality.images, baseline_values, values)

    # Extend the vertical axis to include 1, all known values and all known interval endpoints.
    bounds = np.array(
        [
            bound
            for speed_ups in by_method.values()
            for speed_up in speed_ups
            for bound in (speed_up.value, *speed_up.interval)
        ]
    )
    known_bounds = bounds[(bounds > 0) & (bounds < math.inf)]
    axes.set_ylim(0.97 * min([1, *known_bounds]), 1.03 * max([1, *known_bounds]))

    for index, (name, speed_ups) in enumerate(by_method.items()):
        for k, speed_up in enumerate(speed_ups):
            x = k + compute_category_offset(index, len(by_method))
            draw_speed_up(axes, x, speed_up, styles[name])
    if by_method:
        draw_categories(axes, quality.images[select_milestones(quality.images)])
    axes.axhline(1, color=styles[baseline]["color"], linewidth=1)
    axes.set_title("speed-up in images (above 1 is better)")
    axes.set_xlabel(f"images after which {styles[baseline]['label']} has the same quality")


def draw_speed_up(axes: "Axes", x: float, speed_up: SpeedUp, style: dict[str, Any]) -> None:
    """Draw one speed-up and its interval."""
    bottom, top = axes.get_ylim()
    draw = partial(axes.plot, x, color=style["color"], clip_on=False)
    value = speed_up.value
    if speed_up.interval:
        low, high = speed_up.interval
        ends = np.clip([low.low, high.high], bottom, top)
        axes.plot([x, x], ends, linewidth=2.6, color=style["color"], clip_on=False)
        if low.low == 0:
            draw(bottom, marker="v")
        if high.high == math.inf:
            draw(top, marker="^")
    if value.low == value.high:
        axes.plot(x, value.low, **style, markersize=5)
    elif value.low > 0:
        draw(value.low, marker="^", markersize=7, fillstyle="none")
    elif value.high < math.inf:
        draw(value.high, marker="v", markersize=7, fillstyle="none")


def draw_differences(axes: "Axes", curves: Curves, styles: Styles, title: str) -> None:
    """Draw the paired differences from the baseline, as a percentage of the baseline's mean.

    The thick line is the bootstrap interval and the thin line is the t interval.
    """
    baseline, *names = styles
    names = [name for name in names if name in curves.by_method]
    for index, name in enumerate(names):
        if not len(curves.pair(name, baseline)[0]):
            continue
        differences = curves.percent_differences(name, baseline)
        x = np.arange(len(curves.images)) + compute_category_offset(index, len(names))
        for interval, width in ((compute_t_interval, 0.8), (compute_bootstrap_interval, 2.6)):
            estimates = np.array([interval(column) for column in differences.T])
            _, lows, highs = estimates.T
            axes.vlines(x, lows, highs, styles[name]["color"], linewidth=width)
        axes.plot(x, differences.mean(0), **styles[name], markersize=5, linewidth=0)
    axes.axhline(0, color=styles[baseline]["color"], linewidth=1)
    draw_categories(axes, curves.images)
    label = styles[baseline]["label"]
    axes.set_xlabel("images seen")
    axes.set_title(f"{title}: difference from {label}, %", fontsize=11)
