"""The curves of one or several runs, over images seen, as one picture.

python -m evaluations.curves exps/vanilla exps/sra2 --out curves.png
"""

from pathlib import Path

import numpy as np

from common import cli
from common.cli import UserError
from evaluations.report_curves import evaluated, settings_of
from evaluations.runs import Run, column, methods, named, read_run

STROKES = ("-", "--", ":", "-.")
PANELS = {
    "denoising": "denoising loss",
    "align": "alignment loss",
    "grad_norm": "gradient norm before clipping",
}


def draw(runs: list[Run], out: Path) -> None:
    """One panel a quantity, one colour a run; one more panel for each Frechet distance that a run was evaluated by, and for
    the loss on images held out, with a line for each way of measuring it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = settings_of(runs)
    keys = [key for run in runs for row in run.evaluations for key in row]
    distances = [key for key in keys if key.startswith(("FID", "FD-")) or key == "held_out"]
    measured = {name: evaluated(runs, name, settings) for name in dict.fromkeys(distances)}
    panels = [*PANELS.values(), *measured]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 3.6), layout="constrained"
    )
    for i, run in enumerate(runs):
        for axis, key in zip(axes, PANELS):
            for dash, (name, label) in enumerate(methods(run, key).items()):
                values = column(run.steps, name)
                if np.any(values > 0):
                    x, style = column(run.steps, "images") / 1e3, STROKES[dash % 4]
                    axis.plot(x, values, f"C{i}", label=label, linewidth=1.6, linestyle=style)
    for axis, lines in zip(axes[len(PANELS) :], measured.values()):
        for line in lines:
            style = STROKES[line.dash % 4]
            axis.plot(
                line.x / 1e3,
                line.y,
                f"C{line.colour}",
                label=line.label,
                linestyle=style,
                marker=".",
            )
    for axis, title in zip(axes, panels):
        axis.set_title("denoising loss on images held out" if title == "held_out" else title)
        axis.set_xlabel("thousand images seen")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        low, high = axis.get_ylim()
        shown = "235" if high > 10 * low else "123456789"  # or the labels would lie over each other
        axis.yaxis.set_minor_formatter(
            lambda y, _, shown=shown: f"{y:g}" if f"{y:e}"[0] in shown else ""
        )
        axis.grid(True, which="both", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(axis.lines) > 1:
            axis.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = cli.Parser(__doc__, "python -m evaluations.curves", "RUN [RUN ...]")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs (exps/NAME)")
    parser.add_argument(
        "--out", type=Path, help="picture to write (default: curves.png in the first run)"
    )
    args = parser.parse_args()
    out = args.out or args.runs[0] / "curves.png"
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {out} must end in .png, .pdf or .svg")
    draw([read_run(name, folder) for name, folder in named(args.runs).items()], out)
    print(f"curves: {out}")


if __name__ == "__main__":
    cli.run(main)
