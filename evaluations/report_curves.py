"""What metrics.jsonl of several runs says, as charts: losses, speed, and evaluations while training."""

import json
from typing import Any

from evaluations.report_charts import DASHES, SMOOTH_FROM, Series, chart, finite
from evaluations.report_metrics import differing, flat, said_once
from evaluations.report_page import Html, absent, el, number, swatch, table, text
from evaluations.runs import Run, column, methods

# column of metrics.jsonl -> title, whether the axis may be logarithmic, whether it begins at zero
PANELS = {
    "denoising": ("denoising loss", True, False),
    "align": ("alignment loss", True, False),
    "cosine": ("cosine to the target", False, False),
    "grad_norm": ("gradient norm before clipping", True, False),
    "images_per_s": ("images a second", False, True),
}
DIRECTION = {"FID": "lower is better", "sFID": "lower is better", "FD": "lower is better"}
LAST = ("denoising", "align", "cosine", "grad_norm", "images_per_s", "mfu", "peak_memory_gib")
NOT_MEASURED = ("step", "images", "evaluation")


def legend(runs: list[Run]) -> Html:
    """Which colour is which run."""
    return el(
        "ul",
        *(el("li", swatch(k), run.name) for k, run in enumerate(runs)),
        class_="legend sticky",
        aria_label="runs",
    )


def figure(title: str, lines: list[Series], log: bool, zero: bool, note: str = "") -> Html:
    caption = el("figcaption", title, el("small", f" {note}") if note else None)
    return el("figure", caption, chart(title, lines, log, zero))


def of_steps(runs: list[Run]) -> list[Html]:
    """A chart for each quantity that a run logged."""
    figures = []
    for key, (title, log, zero) in PANELS.items():
        lines = [
            Series(column(run.steps, "images"), column(run.steps, name), k, label, dash)
            for k, run in enumerate(runs)
            for dash, (name, label) in enumerate(methods(run, key).items())
        ]
        if any(finite(line).any() for line in lines):
            figures.append(figure(title, lines, log, zero))
    return figures


def setting(row: dict) -> dict[str, Any]:
    """All that an evaluation's numbers depend on besides the model: those that differ in it are other quantities."""
    return said_once(flat(row["evaluation"]))


def settings_of(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Every setting that a run was evaluated with, by its key, in order of appearance."""
    found = [setting(row) for run in runs for row in run.evaluations]
    return {json.dumps(fields, sort_keys=True): fields for fields in found}


def evaluated(runs: list[Run], metric: str, settings: dict[str, dict[str, Any]]) -> list[Series]:
    """One line for each run and setting: what was measured otherwise is never joined."""
    fields = differing(list(settings.values()))
    lines = []
    for k, run in enumerate(runs):
        for dash, (key, values) in enumerate(settings.items()):
            rows = [
                row for row in run.evaluations if json.dumps(setting(row), sort_keys=True) == key
            ]
            label = ", ".join(
                [run.name, *(f"{field} {text(values.get(field))}" for field in fields)]
            )
            lines.append(
                Series(column(rows, "images"), column(rows, metric), k, label, dash, dots=True)
            )
    return [line for line in lines if finite(line).any()]


def of_evaluations(runs: list[Run]) -> list[Html]:
    """The heading, what the settings are and which stroke is which, and a chart for each metric."""
    settings = settings_of(runs)
    if not settings:
        return [
            absent(
                "No evaluation while training: train.py --eval-every N --eval-reference PATH logs them."
            )
        ]
    fields = differing(list(settings.values()))
    common = next(iter(settings.values()))
    same = [f"{key} {shown_text(value)}" for key, value in common.items() if key not in fields]
    parts = [el("h3", "Evaluations while training"), el("p", " · ".join(same), class_="soft")]
    if fields:
        labels = [
            ", ".join(f"{key} {text(values.get(key))}" for key in fields)
            for values in settings.values()
        ]
        strokes = [
            el("li", swatch(None, DASHES[k % len(DASHES)]), label) for k, label in enumerate(labels)
        ]
        parts.append(
            el(
                "p",
                "Measured in several ways; points of different ones are not joined:",
                class_="soft",
            )
        )
        parts.append(el("ul", *strokes, class_="legend", aria_label="settings"))
    rows = [row for run in runs for row in run.evaluations]
    pairs = [(key, value) for row in rows for key, value in row.items() if key not in NOT_MEASURED]
    names = dict.fromkeys(key for key, value in pairs if not isinstance(value, (dict, list, str)))
    figures = []
    for name in names:
        lines = evaluated(runs, name, settings)
        if lines:
            note = DIRECTION.get(name.partition("-")[0], "")
            figures.append(
                figure(name.replace("_", " "), lines, log=bool(note), zero=False, note=note)
            )
    return [*parts, el("div", *figures, class_="charts")]


def shown_text(value: Any) -> str:
    """A setting in running text: hashes by their first twelve digits."""
    whole = text(value)
    return whole[:12] + "…" if len(whole) == 64 and " " not in whole else whole


def last_values(runs: list[Run]) -> Html:
    """The last line of each run as numbers, also for those who do not see the charts."""
    found = dict.fromkeys(name for key in LAST for run in runs for name in methods(run, key))
    keys = [key for key in found if any(run.steps[-1].get(key) is not None for run in runs)]
    body = []
    for k, run in enumerate(runs):
        last = run.steps[-1]
        skipped = sum(row.get("skipped") or 0 for row in run.steps)
        cells = [el("th", swatch(k), " ", run.name, scope="row")]
        cells += [
            el("td", f"{value:,}", class_="num")
            for value in (last["step"], last["images"], skipped)
        ]
        cells += [
            el("td", number(last[key]) if last.get(key) is not None else "—", class_="num")
            for key in keys
        ]
        body.append(cells)
    names = [name.replace("_", " ") for name in ("step", "images", "skipped", *keys)]
    head = ["run", *(el("th", name, scope="col", class_="num") for name in names)]
    return el("details", el("summary", "The last line of each run in numbers"), table(head, body))


def section(runs: list[Run]) -> Html:
    """Charts of training, then those of evaluation."""
    longest = max(len(run.steps) for run in runs)
    note = (
        f"Thin lines are as logged, of runs with {SMOOTH_FROM} lines and more; over them a running median of 2% of the run."
        if longest >= SMOOTH_FROM
        else "As logged, not smoothed; each point is the mean since the one before."
    )
    charts = el("div", *of_steps(runs), class_="charts")
    return el(
        "div",
        legend(runs),
        el("p", note, class_="soft"),
        charts,
        last_values(runs),
        *of_evaluations(runs),
    )
