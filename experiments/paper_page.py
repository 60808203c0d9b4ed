"""Write the tables and the figure of experiments/paper.py from its JSON result only."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evaluations.runs import JsonObject
from experiments.formatting import abbreviate, format_bounds, format_markdown_table
from experiments.plotting import add_grid, load_pyplot, save_png
from experiments.speedup import Bounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNKNOWN = "not known"
DEMO_STAMP = "DEMO: NO EVIDENCE"
DEMO_NOTE = (
    f"**{DEMO_STAMP}.** Networks of 2M parameters were trained on small greyscale images for at "
    "most 100 steps. The values show that every command runs. They are no evidence about the "
    "paper, and must not be compared with its values."
)
FORMATS = {"FID": ".2f", "sFID": ".2f", "inception_score": ".1f"}
METRIC_LABELS = {"inception_score": "IS"}


def format_tables(result: JsonObject) -> str:
    """Return the Markdown page of a result."""
    lines = ["# The paper's tables, and our values", ""]
    if not result["is_evidence"]:
        lines += [DEMO_NOTE, ""]
    for table in result["tables"]:
        lines += [f"## Table {table['number']}: {table['title']}", ""]
        lines += [*(format_cost_table if table["number"] == 5 else format_table)(table), ""]
    lines += format_epochs(result)
    lines += format_progress(result)
    lines += format_remarks(result)
    return "\n".join([*lines, "", "```bash", result["command"], "```", ""])


def format_table(table: JsonObject) -> list[str]:
    """Return the lines of a table of FIDs. Deviations that all rows share are listed below it."""
    measured_rows = [row for row in table["rows"] if row["run"] and row["ours"] is not None]
    common: list[str] = []
    if len(measured_rows) > 1:
        first, *others = [row["deviations"] for row in measured_rows]
        common = [text for text in first if all(text in other for other in others)]
    columns = ("row", "steps", "metric", "the paper", "ours", "95% interval", "difference")
    rows = [[*columns, "progress", "comparable"]]
    for row in table["rows"]:
        spec = FORMATS[row["metric"]]
        metric = METRIC_LABELS.get(row["metric"], row["metric"])
        cells = [
            row["label"],
            abbreviate(row["steps"]),
            metric,
            format_number(row["paper"], spec),
        ]
        if row["run"] is None:
            cells += ["reference only", "", "", "", row["note"]]
        else:
            measured = row["measured_metric"]
            ours = format_ours(row, spec)
            if row["ours"] is not None and measured != row["metric"]:
                ours += f" ({measured})"
            cells += [ours, format_interval(row, spec), format_difference(row["difference"], spec)]
            cells += [f"{row['progress']:.0%}", describe_comparability(row, common)]
        rows.append(cells)
    lines = format_markdown_table(rows)
    if common:
        lines += ["", f"Deviations of all measured rows: {'; '.join(common)}."]
    return lines


def format_cost_table(table: JsonObject) -> list[str]:
    """Return the lines of Table 5."""
    rows = [["quantity", "the paper", "ours", "difference", "comparable"]]
    for row in table["rows"]:
        spec = row["format"]
        cells = [row["label"], format_number(row["paper"], spec), format_ours(row, spec)]
        cells += [format_difference(row["difference"], spec), describe_comparability(row)]
        rows.append(cells)
    return format_markdown_table(rows)


def format_number(value: float | None, spec: str) -> str:
    """Format a value of the paper."""
    return UNKNOWN if value is None else f"{value:{spec}}"


def format_ours(row: JsonObject, spec: str) -> str:
    """Format our value, or state that there is none."""
    return "not measured" if row["ours"] is None else f"{row['ours']:{spec}}"


def format_interval(row: JsonObject, spec: str) -> str:
    """Format the interval of our value, and state whether it is over seeds or images."""
    if row["ours"] is None:
        return ""
    if row["interval"] is None:
        return "none (a single run)"
    low, high = row["interval"]
    over = f"{len(row['values'])} seeds" if row["interval_over"] == "seeds" else "images of one run"
    return f"{low:{spec}} to {high:{spec}} ({over})"


def format_difference(difference: float | None, spec: str) -> str:
    """Format the difference from the paper's value; return "" for None."""
    return "" if difference is None else f"{difference:+{spec}}"


def describe_comparability(row: JsonObject, common: Sequence[str] = ()) -> str:
    """Return whether our value is comparable with the paper's, with the deviations and the note.

    Args:
        row: The row of the result.
        common: Deviations that are stated elsewhere.
    """
    if row["ours"] is None:
        return "; ".join(text for text in (*row["deviations"], row["note"]) if text)
    text = "no" if row["deviations"] else "yes"
    deviations = [deviation for deviation in row["deviations"] if deviation not in common]
    if deviations:
        text += f": {'; '.join(deviations)}"
    if row["note"]:
        text += f" ({row['note']})"
    return text


def format_epochs(result: JsonObject) -> list[str]:
    """Return the section with the epochs at which given FIDs are reached."""
    entries = result["epochs_to_fid"]
    if not entries:
        return []
    metric = entries[0]["metric"]
    levels = [*entries[0]["reached"]]
    rows = [["run", "points", *(f"{metric} {level}" for level in levels)]]
    for entry in entries:
        cells = [entry["run"], str(len(entry["epochs"]))]
        for low, high in entry["reached"].values():
            cells.append(format_bounds(Bounds(low, math.inf if high is None else high)))
        rows.append(cells)
    title = f"## Epochs to reach a given {metric} (EP_FID@k)"
    return [title, "", *format_markdown_table(rows), ""]


def format_progress(result: JsonObject) -> list[str]:
    """Return the section with the progress and the remaining GPU-hours of each run."""
    rows = [["run", "seed", "steps", "images/s", "remaining GPU-hours"]]
    for run in result["progress"]:
        rate = "not measured"
        if run["images_per_s"] is not None:
            rate = f"{run['images_per_s']:.4g}"
            if run["rate_from"] != "log":
                rate += f" (estimated from {run['rate_from']})"
        hours = run["remaining_gpu_hours"]
        hours = "not known" if hours is None else f"{hours:,.3g}"
        steps = f"{run['steps_done']:,} of {run['steps']:,}"
        rows.append([run["run"], str(run["seed"]), steps, rate, hours])
    total = result["remaining_gpu_hours"]
    total = "an unknown number of" if total is None else f"{total:,.3g}"
    gpus = result["gpus_per_run"]
    return [
        "## Progress",
        "",
        *format_markdown_table(rows),
        "",
        f"Training still needs **{total} GPU-hours**, with {gpus} GPU{'s' if gpus > 1 else ''} per "
        "run (`--gpus`). This excludes sampling and evaluation.",
        "",
    ]


def format_remarks(result: JsonObject) -> list[str]:
    """Return the remarks below the tables."""
    scale, low, high = result["guidance"]["used"]
    seeds = " ".join(map(str, result["seeds"]))
    return [
        f"- The paper's values are those of {result['source']}; they were not measured with this "
        f'code. "{UNKNOWN}" marks values that we do not know.',
        f"- Seeds: {seeds}. With several seeds, the interval is the t interval of the mean over "
        "seeds. A single run has no interval over seeds; the interval over images shows only how "
        "the metric varies between sets of samples of the same network.",
        f"- Guidance in Table 3: scale {scale:g} for t from {low:g} to {high:g} (from "
        f"{result['guidance']['source']}). The paper's scale and interval are not known.",
        "- The epochs are interpolated linearly in log FID and log epochs between evaluated "
        "points. Values with < or > are bounds, because the crossing is outside of these points.",
    ]


def draw_figure(result: JsonObject, path: Path) -> None:
    """Draw the paper's values and ours next to each other, one pair of panels per table."""
    plt = load_pyplot()
    tables = [table for table in result["tables"] if table["number"] != 5]
    panels = [
        (table, metric)
        for table in tables
        for metric in dict.fromkeys(row["metric"] for row in table["rows"])
        if metric != "sFID"
    ]
    panel_rows = [
        [row for row in table["rows"] if row["metric"] == metric] for table, metric in panels
    ]
    heights = [len(rows) + 1.5 for rows in panel_rows] or [1]
    figure, grid = plt.subplots(
        max(1, len(panels)),
        2,
        figsize=(11, 0.27 * sum(heights) + 1.2),
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
        squeeze=False,
    )
    for index, (table, metric) in enumerate(panels):
        draw_panels(grid[index], table, metric, panel_rows[index], result["metrics"][metric])
    title = "The paper's values (left) and ours (right)"
    if not result["is_evidence"]:
        title += f"\n{DEMO_STAMP}"
        style = {"fontsize": 44, "color": "red", "alpha": 0.16, "rotation": 30}
        figure.text(0.5, 0.5, DEMO_STAMP, ha="center", va="center", **style)
    figure.suptitle(title)
    save_png(figure, path)


def draw_panels(
    pair: "list[Axes]", table: JsonObject, metric: str, rows: list[JsonObject], measured: str | None
) -> None:
    """Draw the paper's values of a metric on the left, and ours on the right."""
    left, right = pair
    positions = range(len(rows))
    name = METRIC_LABELS.get(metric, metric)
    for y, row in zip(positions, rows):
        if row["paper"] is None:
            mark_missing(left, y, UNKNOWN)
        else:
            left.plot(row["paper"], y, "D", color="0.3", fillstyle="none", markersize=6)
        if row["run"] is None:
            mark_missing(right, y, "reference only")
        elif row["ours"] is None:
            mark_missing(right, y, "not measured")
        else:
            color = "C1" if row["deviations"] else "C0"
            if row["interval"]:
                right.plot(row["interval"], [y, y], color=color, linewidth=2)
            right.plot(row["ours"], y, "o", color=color, markersize=5)
    labels = [f"{row['label']}, {abbreviate(row['steps'])}" for row in rows]
    left.set_yticks(positions, [shorten(label) for label in labels], fontsize=8)
    right.set_yticks(positions, [""] * len(rows))
    left.set_title(f"Table {table['number']}: {name}, the paper", fontsize=9)
    ours = METRIC_LABELS.get(measured or "", measured)
    text = f"{ours}, ours (orange: not comparable)" if measured else f"{name} is not measured here"
    right.set_title(text, fontsize=9)
    for axes in pair:
        axes.set_ylim(len(rows) - 0.5, -0.5)
        add_grid(axes)
    if measured == metric:
        limits = [*left.get_xlim(), *right.get_xlim()] if has_values(rows) else left.get_xlim()
        for axes in pair:
            axes.set_xlim(min(limits), max(limits))


def has_values(rows: list[JsonObject]) -> bool:
    """Return whether any of the rows has been measured."""
    return any(row.get("ours") is not None for row in rows)


def mark_missing(axes: "Axes", y: int, text: str) -> None:
    """Write a text in the place of a value that does not exist."""
    transform = axes.get_yaxis_transform()
    axes.text(0.02, y, text, color="0.5", fontsize=7, va="center", transform=transform)


def shorten(label: str, length: int = 44) -> str:
    """Shorten a label that is too long for the figure."""
    return label if len(label) <= length else f"{label[: length - 3]}..."
