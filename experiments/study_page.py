"""Tables and a figure of what a study of convergence found, from its JSON alone."""

import io
import math
from pathlib import Path

import numpy as np

from common.files import write_file
from experiments.results import estimate
from experiments.speedup import COVERAGE, bootstrap, speed_up
from experiments.study_numbers import (
    Curves,
    all_seeds,
    costs,
    curves,
    figures,
    held_out_times,
    main_curves,
    probed_blocks,
)

COLOURS = (
    "#000000",
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
)  # Okabe and Ito, without yellow
MARKERS = "osDP<>h"  # those that point up and down are for bounds


def markdown(rows: list[list[str]]) -> list[str]:
    """The first is the head. A column that holds nothing is left out."""
    keep = [i for i in range(len(rows[0])) if i == 0 or any(row[i] for row in rows[1:])]
    rows = [[row[i] for i in keep] for row in rows]
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|" + "---|" * len(rows[0]), *body, ""]


def table(found: dict) -> str:
    """Markdown: quality and speed-up at the end; what else was measured there, and at which times; speed-up on the way. Raises
    UserError.
    """
    metric, told, quality = found["metric"], figures(found), main_curves(found)
    base, floor, seeds = found["methods"][0], found.get("floor") or {}, all_seeds(found)
    ends = [
        "difference",
        "student",
        "detectable",
        "speed-up",
        "speed-up per FLOP",
        "speed-up per second",
    ]
    rest = [
        "agreement",
        "agreement difference",
        "precision",
        "recall",
        "held-out",
        "held-out difference",
        "probe",
    ]
    against = f"against {base['label']}"
    first = [
        [
            "",
            metric,
            against,
            "Student's 95%",
            "detectable",
            "speed-up in images",
            "in FLOPs",
            "in seconds",
        ]
    ]
    blocks, probes = probed_blocks(found)
    probed = f"probe, best of {blocks} blocks ({probes} seed{'s' * (probes != 1)})"
    second = [
        [
            "",
            "classes agree",
            f"{against}, points",
            "precision",
            "recall",
            "held-out loss",
            against,
            probed,
        ]
    ]
    at = sorted({int(key.rpartition(" ")[2]) for key in told if " speed-up at " in key})
    third = [
        [
            "",
            "FLOPs per image",
            "seconds per step",
            *(f"at {base['label']}'s {thousands(images)}" for images in at),
        ]
    ]
    cost = costs(found)
    for method in found["methods"]:
        name, label = method["name"], method["label"]
        if f"{name} {metric}" not in told:
            first.append([label, "not run", *[""] * len(ends)])
            continue
        count = int(told[f"{name} seeds"])
        label += f" ({count} of {len(seeds)} seeds)" * (count < len(seeds))
        first.append([label, *(told.get(f"{name} {key}", "") for key in (metric, *ends))])
        second.append([label, *(told.get(f"{name} {key}", "") for key in rest)])
        relative = [f"x {of[name]:.2f}" if name in of else "" for of in cost.values()]
        third.append(
            [label, *relative, *(told.get(f"{name} speed-up at {images}", "") for images in at)]
        )
    if metric in floor:
        first.append(["*the autoencoder's own*", f"*{floor[metric]:.3f}*", *[""] * len(ends)])
    if "class_agreement" in floor:
        second.append(
            [
                "*the autoencoder's own*",
                f"*{floor['class_agreement']:.1%}*",
                *[""] * (len(rest) - 1),
            ]
        )
    times = held_out_times(found)
    fourth = [[f"held-out loss, % {against}", *(f"t = {t}" for t in times)]]
    for method in found["methods"][1:] if times else ():
        fourth.append(
            [method["label"], *(told.get(f"{method['name']} held-out at {t}", "") for t in times)]
        )
    tables = [
        line for rows in (first, second, fourth, third) if len(rows) > 1 for line in markdown(rows)
    ]
    return (
        "\n".join([*tables, *legend(found, quality), "", "```bash", found["command"], "```"]) + "\n"
    )


def legend(found: dict, quality: Curves) -> list[str]:
    """What the tables' numbers are."""
    base, metric, seeds = found["methods"][0], found["metric"], all_seeds(found)
    counts = {len(quality.pair(method["name"], base["name"])[0]) for method in found["methods"][1:]}
    cover = [f"{COVERAGE[count]:.0%} with {count}" for count in sorted(counts) if count in COVERAGE]
    about = f" (it covers about {', '.join(cover)})" if cover else ""
    narrow = f" That is too narrow for few seeds{about}: "
    few = narrow if max(counts, default=0) > 1 else " A single seed has none. "
    planned = found["steps"] * found["batch_size"]
    short = sum(run["metrics"]["images"][-1] < planned for run in found["runs"])
    cut = (
        f"{short} of {len(found['runs'])} runs have not reached their end: all are compared after "
    )
    return [
        *(
            [f"**{cut}{quality.images[-1]:,} images, the last point that all have.**", ""]
            if short
            else []
        ),
        f"{found['model']}, after {quality.images[-1] // found['batch_size']:,} steps of {found['batch_size']} images "
        f"({thousands(quality.images[-1])}), seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}; means over seeds. "
        "Classes agree: the share of samples that",
        "the classifier puts into the class that was asked for. Precision and recall: Kynkaanniemi et al.'s, in its features.",
        f"{metric} and held-out loss: lower is better. Against {base['label']}: mean difference of runs of one seed, of",
        f"seeds in common, and its 95% percentile bootstrap interval.{few}Student's is exact if differences scatter normally.",
        "Detectable: the mean difference that a paired t test (5%, two-sided) finds in 80% of such studies.",
        f"Speed-up: images that {base['label']} needs for the quality it has then / images that the method needs for it; of",
        "mean curves, interpolated in logarithms. In FLOPs, seconds: divided by what an image costs, without REPA's encoder if",
        "its features are stored. < and >: beyond what is measured. Probe: of runs that ended, of seeds in common.",
    ]


def thousands(images: float) -> str:
    """384000 -> 384K."""
    return (
        f"{images / 1e6:.3g}M"
        if images >= 1e6
        else f"{images / 1e3:.3g}K"
        if images >= 1e3
        else f"{images:g}"
    )


def shift(i: int, count: int) -> float:
    """Of the i-th of `count` methods beside a tick, in ticks."""
    return min(0.16, 0.8 / count) * (i - (count - 1) / 2)


def draw(found: dict, out: Path) -> None:
    """Curves over images; and as points beside the same numbers of images what each method differs by, and its speed-up.
    Raises UserError.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    quality, held_out, methods = main_curves(found), curves(found, "held_out"), found["methods"]
    looks = {
        method["name"]: {"color": COLOURS[i % 7], "marker": MARKERS[i % 7]}
        for i, method in enumerate(methods)
    }
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 8.4), layout="constrained")
    draw_curves(axes[0, 0], found, quality, looks)
    draw_speed_ups(axes[0, 1], found, quality, looks)
    draw_differences(axes[1, 0], found, quality, looks, found["metric"])
    if held_out.of:
        draw_differences(axes[1, 1], found, held_out, looks, "held-out loss")
    else:
        axes[1, 1].set_visible(False)
    for axis in axes.flat:
        axis.grid(True, axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [
        plt.Line2D(
            [], [], **looks[method["name"]], markersize=5, linewidth=1.4, label=method["label"]
        )
        for method in methods
        if method["name"] in quality.of
    ]
    kinds = [
        plt.Line2D([], [], color="0.4", linewidth=2.6, label="95% over seeds, bootstrap"),
        plt.Line2D([], [], color="0.4", linewidth=0.8, label="Student's 95%"),
        plt.Line2D([], [], color="0.4", linewidth=8, alpha=0.25, label="lowest to highest seed"),
        plt.Line2D(
            [], [], color="0.4", linewidth=0, marker="v", label="goes on beyond what is measured"
        ),
    ]
    layout = {"frameon": False, "columnspacing": 1.2, "handlelength": 1.6}
    figure.legend(handles=kinds, loc="outside lower center", ncols=4, **layout)
    figure.legend(handles=handles, loc="outside upper center", ncols=min(6, len(handles)), **layout)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    plt.close(figure)
    write_file(out, png.getvalue())


def draw_curves(axis, found: dict, quality: Curves, looks: dict) -> None:
    """Means over seeds, and from the smallest to the largest seed."""
    from matplotlib.ticker import LogLocator

    for name, look in looks.items():
        if name in quality.of:
            each = np.array([*quality.of[name].values()])
            axis.plot(quality.images, each.mean(0), **look, markersize=3.5, linewidth=1.4)
            axis.fill_between(
                quality.images,
                each.min(0),
                each.max(0),
                color=look["color"],
                alpha=0.13,
                linewidth=0,
            )
    floor, least = (found.get("floor") or {}).get(found["metric"]), axis.get_ylim()[0]
    if floor and floor > least / 3:
        axis.axhline(floor, color="0.35", linestyle="--", linewidth=1.2)
        axis.text(
            0.02,
            floor,
            "the autoencoder's own",
            color="0.35",
            va="bottom",
            transform=axis.get_yaxis_transform(),
        )
    elif floor:  # its line would press the curves flat
        axis.text(
            0.02,
            0.02,
            f"the autoencoder's own: {floor:.3f}",
            color="0.35",
            transform=axis.transAxes,
        )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="images seen",
        title=f"{found['metric']} (lower is better)",
    )
    for side, form in ((axis.xaxis, lambda x, _: thousands(x)), (axis.yaxis, "{x:g}")):
        side.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        side.set_major_formatter(form)
        side.set_minor_formatter("")


def beside(axis, images: list[int]) -> None:
    """A stripe and a tick for each number of images, beside which the methods stand."""
    for k in range(0, len(images), 2):
        axis.axvspan(k - 0.5, k + 0.5, color="0.96", linewidth=0, zorder=0)
    axis.set_xticks(range(len(images)), [thousands(each) for each in images])
    axis.set_xlim(-0.5, len(images) - 0.5)


def draw_speed_ups(axis, found: dict, quality: Curves, looks: dict) -> None:
    """In images, where the baseline has measured points; an arrow stands for an end of an interval that is unknown."""
    base, *names = looks
    pairs = {name: quality.pair(name, base) for name in names}
    speeds = {
        name: speed_up(quality.images, theirs, ours)
        for name, (ours, theirs) in pairs.items()
        if len(ours)
    }
    spans = [span for each in speeds.values() for speed in each for span in speed[2:] if span]
    known = [bound for span in spans for bound in span if 0 < bound < math.inf] + [1.0]
    low, high = 0.97 * min(known), 1.03 * max(known)
    for i, (name, each) in enumerate(speeds.items()):
        for k, (_, _, value, least, most) in enumerate(each):
            x, look = k + shift(i, len(speeds)), {"color": looks[name]["color"], "clip_on": False}
            if least is not None:
                axis.plot(
                    [x, x], [max(low, least.low), min(high, most.high)], linewidth=2.6, **look
                )
                for there, marker, missing in (
                    (low, "v", least.low == 0),
                    (high, "^", most.high == math.inf),
                ):
                    if missing:
                        axis.plot(x, there, marker=marker, **look)
            if value.low == value.high:
                axis.plot(x, value.low, **looks[name], markersize=5)
            elif value != (0, math.inf):
                bound, marker = (value.high, "v") if value.low == 0 else (value.low, "^")
                axis.plot(x, bound, marker=marker, markersize=7, fillstyle="none", **look)
    axis.axhline(1, color=looks[base]["color"], linewidth=1)
    points = next(iter(speeds.values()), [])
    if points:
        beside(axis, [speed.images for speed in points])
    axis.set(ylim=(low, high), title="speed-up in images (above 1 is better)")
    axis.set_xlabel(f"at the quality that {found['methods'][0]['label']} has after so many images")


def draw_differences(axis, found: dict, measured: Curves, looks: dict, title: str) -> None:
    """Of runs of one seed, in percent of the baseline's mean: thick the bootstrap's interval, thin Student's."""
    base, *names = looks
    names = [name for name in names if name in measured.of]
    for i, name in enumerate(names):
        ours, theirs = measured.pair(name, base)
        if not len(ours):
            continue
        apart, x = (
            100 * (ours - theirs) / theirs.mean(0),
            np.arange(len(measured.images)) + shift(i, len(names)),
        )
        for interval, width in ((estimate, 0.8), (bootstrap, 2.6)):
            if len(ours) > 1:
                _, low, high, _ = zip(*(interval(column) for column in apart.T.tolist()))
                axis.vlines(x, low, high, looks[name]["color"], linewidth=width)
        axis.plot(x, apart.mean(0), **looks[name], markersize=5, linewidth=0)
    axis.axhline(0, color=looks[base]["color"], linewidth=1)
    beside(axis, measured.images)
    label = found["methods"][0]["label"]
    axis.set(xlabel="images seen", title=f"{title}: difference, % of {label}'s")
    axis.title.set_fontsize(11)
