"""Plot the curves of runs over images seen, for evaluations.report and evaluations.curves."""

import io
import re
from html import escape
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.evenly_spaced import make_evenly_spaced_indices
from evaluations.metrics_files import (
    LOWER_IS_BETTER,
    compare_settings,
    drop_redundant_fields,
    flatten,
    format_value,
)
from evaluations.runs import JsonObject, Run, label_columns, read_column

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Line style of matplotlib -> `stroke-dasharray` of SVG, for legends in HTML.
DASHES = {"-": None, "--": "7 3", ":": "2 3", "-.": "11 3 2 3"}

# Colours that are replaced by CSS variables, which differ between light and dark mode. Matplotlib
# does not accept variables.
RUN_COLOURS = [f"#a0000{index}" for index in range(8)]
TEXT_COLOUR = "#a00010"
GRID_COLOUR = "#a00011"
BACKGROUND_COLOUR = "#a00012"
CSS_VARIABLES = {colour: f"var(--c{index})" for index, colour in enumerate(RUN_COLOURS)} | {
    TEXT_COLOUR: "var(--soft)",
    GRID_COLOUR: "var(--faint)",
    BACKGROUND_COLOUR: "var(--bg)",
}
SVG_STYLE = {
    "svg.fonttype": "none",
    "font.size": 13,
    "figure.figsize": (420 / 72, 240 / 72),  # 420 x 240 in the units of the SVG, 1/72 inch
    "axes.facecolor": "none",
    "axes.labelcolor": TEXT_COLOUR,
    "axes.labelsize": 13,
    "axes.spines.left": False,
    "axes.spines.bottom": False,
    "axes.ymargin": 0.06,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID_COLOUR,
    "grid.linewidth": 1,
    "lines.linewidth": 1.8,
    "lines.markersize": 13,
    "lines.markeredgecolor": BACKGROUND_COLOUR,
    "xtick.color": GRID_COLOUR,
    "xtick.labelcolor": TEXT_COLOUR,
    "ytick.labelcolor": TEXT_COLOUR,
    "ytick.major.size": 0,
    "savefig.facecolor": "none",
}
MAX_POINTS = 240  # maximum number of points of a line in the report
SMOOTHING_MIN_POINTS = 100  # minimum number of points of a line that is smoothed
LOG_SCALE_MIN_RATIO = 4  # minimum ratio of largest to smallest value for a logarithmic axis


class Series(NamedTuple):
    """One line of a plot.

    Attributes:
        x: Number of images seen, (n,), with NaN for missing values.
        y: Values, (n,), with NaN for missing values.
        run_index: Index of the run, which determines the colour.
        label: Name of the line in the legend.
        style_index: Index of the line style.
        has_markers: Whether to mark each point.
    """

    x: np.ndarray
    y: np.ndarray
    run_index: int
    label: str
    style_index: int = 0
    has_markers: bool = False

    @property
    def is_finite(self) -> np.ndarray:
        """Return a mask of the points that can be plotted, (n,) bool."""
        return np.isfinite(self.x) & np.isfinite(self.y)


class Panel(NamedTuple):
    """A plot of one quantity for all runs.

    Attributes:
        quantity: Name of the quantity in the log.
        title: Title of the plot.
        series: Lines of the plot.
        log_scale: Whether the vertical axis is logarithmic if the values permit it.
        starts_at_zero: Whether the vertical axis starts at 0 if the values permit it.
        note: Remark that follows the title.
    """

    quantity: str
    title: str
    series: list[Series]
    log_scale: bool = False
    starts_at_zero: bool = False
    note: str = ""


def make_training_panels(runs: list[Run]) -> list[Panel]:
    """Return a panel per training quantity. A panel has no series if no run logged the quantity."""
    panels = [
        Panel("denoising", "denoising loss", [], log_scale=True),
        Panel("align", "alignment loss", [], log_scale=True),
        Panel("cosine", "cosine similarity to the target", []),
        Panel("grad_norm", "gradient norm before clipping", [], log_scale=True),
        Panel("images_per_s", "images per second", [], starts_at_zero=True),
    ]
    for panel in panels:
        for run_index, run in enumerate(runs):
            x = read_column(run.steps, "images")
            for style_index, (key, label) in enumerate(label_columns(run, panel.quantity).items()):
                series = Series(x, read_column(run.steps, key), run_index, label, style_index)
                if series.is_finite.any():
                    panel.series.append(series)
    return panels


def collect_settings(runs: list[Run]) -> list[JsonObject]:
    """Return the distinct settings of the runs' evaluations, in order of appearance."""
    settings: list[JsonObject] = []
    for run in runs:
        for row in run.evaluations:
            setting = flatten_setting(row)
            if setting not in settings:
                settings.append(setting)
    return settings


def flatten_setting(row: JsonObject) -> JsonObject:
    """Return the settings of an evaluation during training as a flat object."""
    return drop_redundant_fields(flatten(row["evaluation"]))


def select_metrics(row: JsonObject) -> dict[str, float]:
    """Return the finite metrics of an evaluation by name."""
    return {
        key: value
        for key, value in row.items()
        if key not in ("schema", "step", "images")
        and isinstance(value, (int, float))
        and np.isfinite(value)
    }


def make_evaluation_panels(runs: list[Run]) -> list[Panel]:
    """Return a panel per metric of the evaluations during training.

    A run has a series per setting, because values of different settings are not comparable.
    """
    settings = collect_settings(runs)
    differing = compare_settings(settings).differing
    panels: dict[str, Panel] = {}
    for run_index, run in enumerate(runs):
        for style_index, setting in enumerate(settings):
            rows = [row for row in run.evaluations if flatten_setting(row) == setting]
            fields = [f"{key} {format_value(setting.get(key))}" for key in differing]
            label = ", ".join([run.name, *fields])
            for metric in dict.fromkeys(name for row in rows for name in select_metrics(row)):
                measured = [row for row in rows if metric in select_metrics(row)]
                x = read_column(measured, "images")
                y = read_column(measured, metric)
                note = "lower is better" if metric.startswith(LOWER_IS_BETTER) else ""
                new_panel = Panel(metric, metric.replace("_", " "), [], bool(note), note=note)
                series = Series(x, y, run_index, label, style_index, has_markers=True)
                panels.setdefault(metric, new_panel).series.append(series)
    return list(panels.values())


def smooth(
    x: np.ndarray, y: np.ndarray, max_points: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray]:
    """Return the running median of a line, at no more than `max_points` of its points.

    The window contains 2% of the points. It shrinks towards both ends of the line, which preserves
    a steep start. NaN values are excluded from the medians, and points without a value remain NaN.
    """
    centres = make_evenly_spaced_indices(len(y), max_points)
    y = np.where(np.isfinite(y), y, np.nan)
    radii = np.minimum(len(y) // 100, centres)
    medians = [
        np.nan if np.isnan(y[centre]) else np.nanmedian(y[centre - radius : centre + radius + 1])
        for centre, radius in zip(centres, radii)
    ]
    return x[centres], np.array(medians)


def reduce_points(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a line to the lowest and the highest point of each of MAX_POINTS / 2 sections.

    Spikes are preserved, and a section without a finite value remains a gap.
    """
    if len(x) <= MAX_POINTS:
        return x, y
    indices: list[int] = []
    for section in np.array_split(np.arange(len(x)), MAX_POINTS // 2):
        finite = section[np.isfinite(y[section])]
        if len(finite):
            indices += sorted({finite[y[finite].argmin()], finite[y[finite].argmax()]})
        else:
            indices.append(section[0])
    return x[indices], y[indices]


def select_line_style(index: int) -> str:
    """Return the matplotlib line style of a style index. The styles repeat cyclically."""
    return list(DASHES)[index % len(DASHES)]


def draw_panel(axes: "Axes", panel: Panel, colours: list[str], log_scale: bool) -> None:
    """Draw the lines of a panel over images seen, and format the axes.

    Args:
        axes: Matplotlib axes to draw on.
        panel: Panel to draw.
        colours: Colour of each run.
        log_scale: Whether the vertical axis is logarithmic.
    """
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    for series in panel.series:
        axes.plot(
            series.x,
            series.y,
            color=colours[series.run_index],
            linestyle=select_line_style(series.style_index),
            marker="." if series.has_markers else None,
            label=series.label,
        )
    if log_scale:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("images seen")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)


def render_svg(panel: Panel) -> str:
    """Render a panel as an SVG element for an HTML page.

    The colours are variables of the page's style sheet. Long lines are smoothed and drawn over a
    faint line of the logged values.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    values = np.concatenate([series.y[series.is_finite] for series in panel.series])
    log_scale = panel.log_scale and values.min() > 0
    log_scale = log_scale and values.max() > LOG_SCALE_MIN_RATIO * values.min()
    with rc_context(SVG_STYLE):
        figure = Figure(layout="constrained")
        axes = figure.subplots()
        displayed = []
        for series in panel.series:
            x, y = reduce_points(series.x, series.y)
            if is_smoothed(series):
                axes.plot(x, y, color=RUN_COLOURS[series.run_index], linewidth=1, alpha=0.3)
                x, y = smooth(series.x, series.y)
            displayed.append(series._replace(x=x, y=y))
        draw_panel(axes, panel._replace(series=displayed), RUN_COLOURS, log_scale)
        axes.set_xlim(0, max(series.x[series.is_finite].max() for series in panel.series) or 1)
        if panel.starts_at_zero and values.min() >= 0:
            axes.set_ylim(bottom=0)
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=metadata)

    ends = "; ".join(
        f"{series.label} ends at {series.y[series.is_finite][-1]:.4g}" for series in panel.series
    )
    return _convert_to_element(file.getvalue(), f"{panel.title} over images seen: {ends}")


def is_smoothed(series: Series) -> bool:
    """Return whether the report shows a line as a running median."""
    return len(series.x) >= SMOOTHING_MIN_POINTS and not series.has_markers


def _convert_to_element(svg: str, label: str) -> str:
    """Convert an SVG file written by matplotlib to an element of an HTML page.

    Ids, clip paths and styles are removed, because they would apply to the whole page.
    """
    svg = svg[svg.index("<svg") + len("<svg") :]
    svg = re.sub(r"<defs>\s*<(style|clipPath).*?</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (xmlns\S*|clip-path="\S*"|id="[\w.]+_\d+")|font-family: [^;]*; ', "", svg)
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, variable)
    return f'<svg class="chart" role="img" aria-label="{escape(label)}"{svg}'
