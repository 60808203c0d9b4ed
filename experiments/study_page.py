"""The tables and the figure of a convergence study, made from its JSON result alone."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.plotting import hide_frame, load_pyplot, save_png
from experiments.results import student_interval
from experiments.speedup import COVERAGE, SpeedUp, bootstrap_interval, compute_speed_ups
from experiments.study_numbers import (
    Curves,
    collect_curves,
    count_probes,
    format_numbers,
    held_out_times,
    list_seeds,
    main_curves,
    relative_costs,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, without yellow.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")
MARKERS = "osDP<>h"  # triangles that point up and down are reserved for bounds
FLOOR_LABEL = "the autoencoder's own"

Table = list[list[str]]  # rows of cells, the first one being the header
Styles = dict[str, dict[str, Any]]  # name of a method -> colour and marker


def format_tables(result: dict) -> str:
    """Return all tables of a study as Markdown, followed by their explanation.

    Raises:
        UserError: If the runs cannot be compared, as in `main_curves`.
    """
    numbers = format_numbers(result)
    tables = (
        quality_table(result, numbers),
        detail_table(result, numbers),
        held_out_table(result, numbers),
        cost_table(result, numbers),
    )
    lines = [line for table in tables if len(table) > 1 for line in to_markdown(table)]
    lines += [*explain(result), "", "```bash", result["command"], "```"]
    return "\n".join(lines) + "\n"


def to_markdown(table: Table) -> list[str]:
    """Return the lines of a table, without columns that are empty below the header."""
    used = [i for i in range(len(table[0])) if i == 0 or any(row[i] for row in table[1:])]
    header, *body = (f"| {' | '.join(row[i] for i in used)} |" for row in table)
    return [header, "|" + "---|" * len(used), *body, ""]


def is_measured(method: dict, result: dict, numbers: dict[str, str]) -> bool:
    """Return whether a method has a value of the main metric."""
    return f"{method['name']} {result['metric']}" in numbers


def label_with_seeds(method: dict, result: dict, numbers: dict[str, str]) -> str:
    """Return the label of a method, with the number of its seeds if some are missing."""
    count = int(numbers[f"{method['name']} seeds"])
    total = len(list_seeds(result))
    return f"{method['label']} ({count} of {total} seeds)" if count < total else method["label"]


def method_row(
    method: dict, result: dict, numbers: dict[str, str], quantities: list[str]
) -> list[str]:
    """Return the row of a method, with the given quantities of `format_numbers`."""
    cells = [numbers.get(f"{method['name']} {quantity}", "") for quantity in quantities]
    return [label_with_seeds(method, result, numbers), *cells]


def quality_table(result: dict, numbers: dict[str, str]) -> Table:
    """Return the table of the main metric, its differences and the speed-ups at the end."""
    metric = result["metric"]
    columns = {
        metric: metric,
        "difference": f"against {result['methods'][0]['label']}",
        "student": "Student's 95%",
        "detectable": "detectable",
        "speed-up": "speed-up in images",
        "speed-up per FLOP": "in FLOPs",
        "speed-up per second": "in seconds",
    }
    empty = [""] * (len(columns) - 1)
    table = [["", *columns.values()]]
    for method in result["methods"]:
        if is_measured(method, result, numbers):
            table.append(method_row(method, result, numbers, [*columns]))
        else:
            table.append([method["label"], "not run", *empty])
    floor = (result.get("floor") or {}).get(metric)
    if floor is not None:
        table.append([f"*{FLOOR_LABEL}*", f"*{floor:.3f}*", *empty])
    return table


def detail_table(result: dict, numbers: dict[str, str]) -> Table:
    """Return the table of the other metrics at the end."""
    against = f"against {result['methods'][0]['label']}"
    num_blocks, num_seeds = count_probes(result)
    seeds = "1 seed" if num_seeds == 1 else f"{num_seeds} seeds"
    columns = {
        "agreement": "classes agree",
        "agreement difference": f"{against}, points",
        "precision": "precision",
        "recall": "recall",
        "held-out": "held-out loss",
        "held-out difference": against,
        "probe": f"probe, best of {num_blocks} blocks ({seeds})",
    }
    table = [["", *columns.values()]]
    table += [
        method_row(method, result, numbers, [*columns])
        for method in result["methods"]
        if is_measured(method, result, numbers)
    ]
    floor = (result.get("floor") or {}).get("class_agreement")
    if floor is not None:
        table.append([f"*{FLOOR_LABEL}*", f"*{floor:.1%}*", *[""] * (len(columns) - 1)])
    return table


def held_out_table(result: dict, numbers: dict[str, str]) -> Table:
    """Return the table of the held-out losses per time."""
    baseline, *methods = result["methods"]
    times = held_out_times(result)
    table = [[f"held-out loss, % against {baseline['label']}", *(f"t = {t}" for t in times)]]
    for method in methods if times else ():
        name = method["name"]
        cells = [numbers.get(f"{name} held-out at {t}", "") for t in times]
        table.append([method["label"], *cells])
    return table


def cost_table(result: dict, numbers: dict[str, str]) -> Table:
    """Return the table of the costs and of the speed-ups during training."""
    baseline = result["methods"][0]["label"]
    marker = " speed-up at "
    milestones = sorted({int(key.rpartition(" ")[2]) for key in numbers if marker in key})
    at_milestones = [f"at {baseline}'s {abbreviate(images)}" for images in milestones]
    table = [["", "FLOPs per image", "seconds per step", *at_milestones]]
    costs = relative_costs(result)
    for method in result["methods"]:
        if is_measured(method, result, numbers):
            name = method["name"]
            cells = [f"x {cost[name]:.2f}" if name in cost else "" for cost in costs.values()]
            cells += [numbers.get(f"{name}{marker}{images}", "") for images in milestones]
            table.append([label_with_seeds(method, result, numbers), *cells])
    return table


def explain(result: dict) -> list[str]:
    """Return the text below the tables."""
    quality = main_curves(result)
    images = int(quality.images[-1])
    baseline, *methods = result["methods"]
    label = baseline["label"]
    metric = result["metric"]
    batch_size = result["batch_size"]
    seeds = list_seeds(result)
    plural = "s" if len(seeds) > 1 else ""
    steps = f"after {images // batch_size:,} steps of {batch_size} images ({abbreviate(images)})"

    # State how many runs are unfinished.
    planned_images = result["steps"] * batch_size
    num_short = sum(run["metrics"]["images"][-1] < planned_images for run in result["runs"])
    lines = []
    if num_short:
        lines = [
            f"**{num_short} of {len(result['runs'])} runs have not reached their end: all are "
            f"compared after {images:,} images, the last point that all have.**",
            "",
        ]

    # State how reliable the bootstrap intervals are.
    counts = {len(quality.pair(method["name"], baseline["name"])[0]) for method in methods}
    coverage = ", ".join(
        f"{COVERAGE[count]:.0%} with {count}" for count in sorted(counts) if count in COVERAGE
    )
    reliability = " A single seed has none. "
    if max(counts, default=0) > 1:
        about = f" (it covers about {coverage})" if coverage else ""
        reliability = f" That is too narrow for few seeds{about}: "

    return [
        *lines,
        f"{result['model']}, {steps}, seed{plural} {' '.join(map(str, seeds))}; means over seeds. "
        "Classes agree: the share of samples that",
        "the classifier puts into the class that was asked for. Precision and recall: "
        "Kynkaanniemi et al.'s, in its features.",
        f"{metric} and held-out loss: lower is better. Against {label}: mean difference of runs of "
        "one seed, of",
        f"seeds in common, and its 95% percentile bootstrap interval.{reliability}Student's is "
        "exact if differences scatter normally.",
        "Detectable: the mean difference that a paired t test (5%, two-sided) finds in 80% of such "
        "studies.",
        f"Speed-up: images that {label} needs for the quality it has then / images that the method "
        "needs for it; of",
        "mean curves, interpolated in logarithms. In FLOPs, seconds: divided by what an image "
        "costs, without REPA's encoder if",
        "its features are stored. < and >: beyond what is measured. Probe: of runs that ended, of "
        "seeds in common.",
    ]


def abbreviate(count: float) -> str:
    """Format a number with a suffix, such as 384000 as "384K"."""
    if count >= 1e6:
        return f"{count / 1e6:.3g}M"
    if count >= 1e3:
        return f"{count / 1e3:.3g}K"
    return f"{count:g}"


def draw_figure(result: dict, path: Path) -> None:
    """Draw the curves of the main metric, the speed-ups, and the differences from the baseline.

    Raises:
        UserError: If the runs cannot be compared, as in `main_curves`.
    """
    plt = load_pyplot()
    quality = main_curves(result)
    held_out = collect_curves(result, "held_out")
    styles = {
        method["name"]: {"color": COLOURS[i % 7], "marker": MARKERS[i % 7]}
        for i, method in enumerate(result["methods"])
    }
    figure, ((upper_left, upper_right), (lower_left, lower_right)) = plt.subplots(
        2, 2, figsize=(9.6, 8.4), layout="constrained"
    )
    draw_curves(upper_left, result, quality, styles)
    draw_speed_ups(upper_right, result, quality, styles)
    draw_differences(lower_left, result, quality, styles, result["metric"])
    if held_out.by_method:
        draw_differences(lower_right, result, held_out, styles, "held-out loss")
    else:
        lower_right.set_visible(False)
    for axes in figure.axes:
        axes.grid(True, axis="y", alpha=0.25)
        hide_frame(axes)

    methods = [
        plt.Line2D(
            [], [], **styles[method["name"]], markersize=5, linewidth=1.4, label=method["label"]
        )
        for method in result["methods"]
        if method["name"] in quality.by_method
    ]
    marks = [
        plt.Line2D([], [], color="0.4", label=label, **style)
        for label, style in (
            ("95% over seeds, bootstrap", {"linewidth": 2.6}),
            ("Student's 95%", {"linewidth": 0.8}),
            ("lowest to highest seed", {"linewidth": 8, "alpha": 0.25}),
            ("goes on beyond what is measured", {"linewidth": 0, "marker": "v"}),
        )
    ]
    layout = {"frameon": False, "columnspacing": 1.2, "handlelength": 1.6}
    columns = min(6, len(methods))
    figure.legend(handles=marks, loc="outside lower center", ncols=4, **layout)
    figure.legend(handles=methods, loc="outside upper center", ncols=columns, **layout)
    save_png(figure, path)


def draw_curves(axes: "Axes", result: dict, quality: Curves, styles: Styles) -> None:
    """Draw the mean curve of each method, and the range of its seeds."""
    from matplotlib.ticker import LogLocator

    for name, style in styles.items():
        if name not in quality.by_method:
            continue
        curves = np.array([*quality.by_method[name].values()])
        axes.plot(quality.images, curves.mean(0), **style, markersize=3.5, linewidth=1.4)
        band = {"color": style["color"], "alpha": 0.13, "linewidth": 0}
        axes.fill_between(quality.images, curves.min(0), curves.max(0), **band)

    # A line for the autoencoder far below the curves would compress them, so it becomes a text.
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


def draw_categories(axes: "Axes", images: list[int]) -> None:
    """Draw a tick for each number of images, with every second one shaded."""
    for k in range(0, len(images), 2):
        axes.axvspan(k - 0.5, k + 0.5, color="0.96", linewidth=0, zorder=0)
    axes.set_xticks(range(len(images)), [abbreviate(count) for count in images])
    axes.set_xlim(-0.5, len(images) - 0.5)


def category_offset(index: int, count: int) -> float:
    """Return the horizontal offset from the tick of one of `count` methods, in ticks."""
    return min(0.16, 0.8 / count) * (index - (count - 1) / 2)


def draw_speed_ups(axes: "Axes", result: dict, quality: Curves, styles: Styles) -> None:
    """Draw the speed-ups in images at the milestones of the baseline.

    An arrow replaces a value or the end of an interval of which only a bound is known.
    """
    baseline, *names = styles
    by_method: dict[str, list[SpeedUp]] = {}
    for name in names:
        values, baseline_values = quality.pair(name, baseline)
        if len(values):
            by_method[name] = compute_speed_ups(quality.images, baseline_values, values)

    limits = speed_up_limits([each for speed_ups in by_method.values() for each in speed_ups])
    for index, (name, speed_ups) in enumerate(by_method.items()):
        for k, speed_up in enumerate(speed_ups):
            x = k + category_offset(index, len(by_method))
            draw_speed_up(axes, x, speed_up, limits, styles[name])
    axes.axhline(1, color=styles[baseline]["color"], linewidth=1)
    if by_method:
        first = next(iter(by_method.values()))
        draw_categories(axes, [speed_up.images for speed_up in first])
    axes.set(ylim=limits, title="speed-up in images (above 1 is better)")
    label = result["methods"][0]["label"]
    axes.set_xlabel(f"at the quality that {label} has after so many images")


def speed_up_limits(speed_ups: list[SpeedUp]) -> tuple[float, float]:
    """Return the range of the vertical axis: 1, all known values and all known interval ends."""
    bounds = [
        bound
        for speed_up in speed_ups
        for bounds in (speed_up.value, speed_up.low, speed_up.high)
        for bound in bounds or ()
    ]
    known = [1.0, *(bound for bound in bounds if 0 < bound < math.inf)]
    return 0.97 * min(known), 1.03 * max(known)


def draw_speed_up(
    axes: "Axes",
    x: float,
    speed_up: SpeedUp,
    limits: tuple[float, float],
    style: dict[str, Any],
) -> None:
    """Draw one speed-up and its interval."""
    bottom, top = limits
    color = {"color": style["color"], "clip_on": False}
    value, low, high = speed_up.value, speed_up.low, speed_up.high
    if low is not None and high is not None:
        axes.plot([x, x], [max(bottom, low.low), min(top, high.high)], linewidth=2.6, **color)
        if low.low == 0:
            axes.plot(x, bottom, marker="v", **color)
        if high.high == math.inf:
            axes.plot(x, top, marker="^", **color)
    arrow = {"markersize": 7, "fillstyle": "none", **color}
    if value.low == value.high:
        axes.plot(x, value.low, **style, markersize=5)
    elif value.low > 0:
        axes.plot(x, value.low, marker="^", **arrow)
    elif value.high < math.inf:
        axes.plot(x, value.high, marker="v", **arrow)


def draw_differences(
    axes: "Axes", result: dict, curves: Curves, styles: Styles, title: str
) -> None:
    """Draw the paired differences from the baseline, in percent of the baseline's mean.

    The thick line is the bootstrap interval and the thin line is Student's.
    """
    baseline, *names = styles
    names = [name for name in names if name in curves.by_method]
    for index, name in enumerate(names):
        values, baseline_values = curves.pair(name, baseline)
        if not len(values):
            continue
        differences = 100 * (values - baseline_values) / baseline_values.mean(0)
        x = np.arange(len(curves.images)) + category_offset(index, len(names))
        if len(values) > 1:
            for interval, width in ((student_interval, 0.8), (bootstrap_interval, 2.6)):
                estimates = [interval(column) for column in differences.T.tolist()]
                lows = np.array([estimate.low for estimate in estimates])
                highs = np.array([estimate.high for estimate in estimates])
                axes.vlines(x, lows, highs, styles[name]["color"], linewidth=width)
        axes.plot(x, differences.mean(0), **styles[name], markersize=5, linewidth=0)
    axes.axhline(0, color=styles[baseline]["color"], linewidth=1)
    draw_categories(axes, curves.images.tolist())
    label = result["methods"][0]["label"]
    axes.set(xlabel="images seen", title=f"{title}: difference, % of {label}'s")
    axes.title.set_fontsize(11)
