"""An ablation as the paper lays it out: a table and a picture, an axis a panel, from a result's JSON alone."""

import io
from pathlib import Path

import numpy as np

from common.files import write_file
from experiments.results import estimate, last, paired


def table(found: dict) -> str:
    """Markdown: of each value the mean over seeds, and its difference to vanilla seed by seed."""
    metric, at_end = found["metric"], last(found["runs"], found["metric"])
    agree, base = last(found["runs"], "class_agreement"), at_end["none"]
    lines = []
    for panel in found["axes"]:
        lines += [
            f"| {panel['title']} | {metric} | against vanilla | classes agree | *the paper's FID* |",
            "|---|---|---|---|---|",
        ]
        for value in (
            {"label": "vanilla", "run": "none", "paper": panel["paper"]},
            *panel["values"],
        ):
            name, cells = value["run"], ["not run", "", ""]
            if name in at_end:
                difference = paired(at_end[name], base) if name != "none" else None
                told = "" if difference is None else f"{difference.mean:+.3f}"
                if difference and difference.low is not None:
                    told += f" ({difference.low:+.3f} to {difference.high:+.3f})"
                agreement = f"{np.mean([*agree[name].values()]):.1%}" if name in agree else ""
                cells = [f"{estimate([*at_end[name].values()]).mean:.3f}", told, agreement]
            paper = "" if value["paper"] is None else f"*{value['paper']:.2f}*"
            lines.append(f"| {' | '.join([value['label'], *cells, paper])} |")
        lines.append("")
    seeds = " ".join(str(seed) for seed in sorted({run["seed"] for run in found["runs"]}))
    lines += [
        f"{found['model']}, {found['steps']:,} steps, seeds {seeds}. {metric}: mean over seeds, lower is better.",
        "Against vanilla: mean difference of runs with the same seed, and Student's 95% interval of it.",
        "*The paper's FID* is of SiT-B/2 with 12 blocks on ImageNet after 400K steps: another metric on other data, of which",
        "only the order can be compared.",
        "",
        "```bash",
        found["command"],
        "```",
    ]
    return "\n".join(lines) + "\n"


def draw(found: dict, out: Path) -> None:
    """A panel an axis: a point for each seed; the mean, and the interval of its difference to vanilla, seed by seed, put on
    vanilla's mean, so that it clears the dashed line where that difference is sure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    at_end, count = last(found["runs"], found["metric"]), len(found["axes"])
    base, columns = at_end["none"], min(count, 4)
    level, everything = (
        float(np.mean([*base.values()])),
        [v for each in at_end.values() for v in each.values()],
    )
    bars = [paired(each, base) for name, each in at_end.items() if name != "none"]
    everything += [
        level + end for bar in bars if bar and bar.low is not None for end in (bar.low, bar.high)
    ]
    margin = 0.05 * (max(everything) - min(everything)) or 0.1 * abs(level)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(5.8, 3.6 * columns + 0.6), 3.4 * rows + 0.5),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for panel, told in zip(axes.flat, found["axes"]):
        values = told["values"]
        panel.axhspan(min(base.values()), max(base.values()), color="0.5", alpha=0.15, linewidth=0)
        panel.axhline(level, color="0.35", linestyle="--", linewidth=1.2)
        for x, value in enumerate(values):
            color, ours = "C1" if value["usual"] else "C0", at_end.get(value["run"], {})
            panel.plot(
                [x - 0.12] * len(ours),
                [*ours.values()],
                color,
                marker="o",
                markersize=4,
                alpha=0.5,
                linestyle="",
            )
            difference = paired(ours, base)
            if difference:
                panel.plot(
                    x + 0.08,
                    level + difference.mean,
                    color,
                    marker="_",
                    markersize=15,
                    markeredgewidth=2.2,
                )
                if difference.low is not None:
                    panel.plot(
                        [x + 0.08] * 2,
                        [level + difference.low, level + difference.high],
                        color,
                        linewidth=1.6,
                    )
        panel.set_xticks(range(len(values)), [value["label"] for value in values])
        panel.set(
            title=told["title"],
            xlim=(-0.6, len(values) - 0.4),
            ylim=(min(everything) - margin, max(everything) + margin),
        )
        panel.grid(True, axis="y", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in [*axes.flat][count:]:
        panel.set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel(found["metric"])
    handles = [
        plt.Line2D([], [], color="0.35", linestyle="--", label="vanilla, and its seeds"),
        plt.Line2D(
            [], [], color="0.4", marker="o", markersize=4, linestyle="", alpha=0.6, label="a seed"
        ),
        plt.Line2D(
            [],
            [],
            color="0.4",
            marker="_",
            markersize=12,
            markeredgewidth=2.2,
            label="mean, and 95% against vanilla",
        ),
        plt.Line2D([], [], color="C1", marker="o", markersize=4, label="the paper's best"),
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=4 if columns > 2 else 2, frameon=False
    )
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    plt.close(figure)
    write_file(out, png.getvalue())
