"""Create the table and the figure of an ablation study from its JSON result alone."""

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.ablation_grid import BASELINE
from experiments.plotting import add_grid, load_pyplot, save_png
from experiments.results import Estimate, collect_final_values, compute_paired_difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_COLUMNS = 4  # maximum number of panels per row of the figure

Values = dict[str, dict[int, float]]  # values by the name of the run and the seed


def format_table(result: dict) -> str:
    """Return the table of each axis as Markdown, followed by its explanation.

    A row contains the mean over seeds, and the mean of the per-seed differences from vanilla SiT.
    """
    metric = result["metric"]
    finals = collect_final_values(result["runs"], metric)
    agreement = collect_final_values(result["runs"], "class_agreement")
    lines = []
    for panel in result["axes"]:
        title = panel["title"]
        lines += [
            f"| {title} | {metric} | difference from vanilla | class agreement "
            "| *the paper's FID* |",
            "|---|---|---|---|---|",
        ]
        vanilla = {"label": "vanilla", "run": BASELINE, "paper": panel["paper"]}
        lines += [format_row(value, finals, agreement) for value in (vanilla, *panel["values"])]
        lines.append("")
    seeds = " ".join(str(seed) for seed in sorted({run["seed"] for run in result["runs"]}))
    lines += [
        f"The tables show {result['model']} after {result['steps']:,} steps, with seeds {seeds}. "
        f"{metric} is the mean over seeds; lower is better.",
        "The difference from vanilla is the mean of the per-seed differences, with its 95% t "
        "interval.",
        "*The paper's FID* was measured with SiT-B/2 (12 blocks) on ImageNet after 400K steps. It "
        "is a different metric on",
        "different data, so only the ranking can be compared.",
        "",
        "```bash",
        result["command"],
        "```",
    ]
    return "\n".join(lines) + "\n"


def format_row(value: dict, finals: Values, agreement: Values) -> str:
    """Return the table row of one value of an axis."""
    name = value["run"]
    mean = "not run"
    difference = ""
    agreement_text = ""
    if name in finals:
        mean = f"{np.mean([*finals[name].values()]):.3f}"
        if name != BASELINE:
            difference = format_difference(
                compute_paired_difference(finals[name], finals[BASELINE])
            )
        if name in agreement:
            agreement_text = f"{np.mean([*agreement[name].values()]):.1%}"
    paper = "" if value["paper"] is None else f"*{value['paper']:.2f}*"
    return f"| {value['label']} | {mean} | {difference} | {agreement_text} | {paper} |"


def format_difference(difference: Estimate | None) -> str:
    """Format a difference, such as "-0.042 (-0.144 to +0.061)"; return "" for None."""
    if not difference:
        return ""
    text = f"{difference.mean:+.3f}"
    if not math.isnan(difference.low):
        text += f" ({difference.low:+.3f} to {difference.high:+.3f})"
    return text


def draw_figure(result: dict, path: Path) -> None:
    """Draw one panel per axis of the study.

    A panel shows one point per seed, the mean, and the interval of the paired difference from
    vanilla SiT. The interval is added to the mean of vanilla SiT, which the dashed line shows. The
    interval excludes this line if and only if the difference is significant.
    """
    plt = load_pyplot()
    finals = collect_final_values(result["runs"], result["metric"])
    count = len(result["axes"])
    columns = min(count, MAX_COLUMNS)
    rows = -(-count // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(max(5.8, 3.6 * columns + 0.6), 3.4 * rows + 0.5),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    grid[0, 0].set_ylim(find_limits(finals))
    for axes, panel in zip(grid.flat, result["axes"]):
        draw_panel(axes, panel, finals)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(result["metric"])

    # Lines without data appear only in the legend.
    line = partial(plt.Line2D, [], [])
    dot = {"marker": "o", "markersize": 4}
    bar = {"marker": "_", "markersize": 12, "markeredgewidth": 2.2}
    handles = [
        line(color="0.35", linestyle="--", label="vanilla: mean and range over seeds"),
        line(color="0.4", linestyle="", alpha=0.6, label="value of a seed", **dot),
        line(color="0.4", label="mean, 95% interval of the difference", **bar),
        line(color="C1", label="best value in the paper", **dot),
    ]
    legend_columns = 4 if columns > 2 else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=legend_columns, frameon=False)
    save_png(figure, path)


def find_limits(finals: Values) -> tuple[float, float]:
    """Return the limits of the vertical axis, which contains all values and interval ends."""
    baseline = finals[BASELINE]
    level = float(np.mean([*baseline.values()]))
    values = []
    for by_seed in finals.values():
        difference = compute_paired_difference(by_seed, baseline) or Estimate(0)
        values += [*by_seed.values(), level + difference.low, level + difference.high]
    low = np.nanmin(values)
    high = np.nanmax(values)
    margin = 0.05 * (high - low) or 0.1 * abs(level)
    return low - margin, high + margin


def draw_panel(axes: "Axes", panel: dict, finals: Values) -> None:
    """Draw the values of one axis of the study, and vanilla SiT as a dashed line."""
    baseline = finals[BASELINE]
    level = float(np.mean([*baseline.values()]))
    axes.axhspan(
        min(baseline.values()), max(baseline.values()), color="0.5", alpha=0.15, linewidth=0
    )
    axes.axhline(level, color="0.35", linestyle="--", linewidth=1.2)
    for x, value in enumerate(panel["values"]):
        color = "C1" if value["usual"] else "C0"
        by_seed = finals.get(value["run"], {})
        axes.plot(
            [x - 0.12] * len(by_seed),
            [*by_seed.values()],
            color,
            marker="o",
            markersize=4,
            alpha=0.5,
            linestyle="",
        )
        if difference := compute_paired_difference(by_seed, baseline):
            mean, *ends = level + np.array(difference)
            axes.plot(x + 0.08, mean, color, marker="_", markersize=15, markeredgewidth=2.2)
            axes.plot([x + 0.08] * 2, ends, color, linewidth=1.6)
    axes.set_xticks(range(len(panel["values"])), [value["label"] for value in panel["values"]])
    axes.set(title=panel["title"], xlim=(-0.6, len(panel["values"]) - 0.4))
    add_grid(axes, "y")
