"""Plot the training curves of one or several runs over the number of images seen.

python -m evaluations.curves exps/vanilla exps/sra2 --out curves.png
"""

from pathlib import Path

from common import cli
from common.cli import UserError
from evaluations import plots
from evaluations.runs import Run, name_folders, read_run

TRAINING_QUANTITIES = ("denoising", "align", "grad_norm")


def plot_curves(runs: list[Run], path: Path) -> None:
    """Write a figure with the curves of all runs, one colour per run.

    The figure has a panel per training quantity. If a run was evaluated during training, there is
    also a panel per Frechet distance and one for the held-out loss.
    """
    from matplotlib.figure import Figure

    panels = [
        panel for panel in plots.make_training_panels(runs) if panel.quantity in TRAINING_QUANTITIES
    ]
    for panel in plots.make_evaluation_panels(runs):
        if panel.quantity == "held_out":
            panels.append(panel._replace(title="denoising loss on held-out images"))
        elif panel.quantity.startswith(("FID", "FD-")):
            panels.append(panel)
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    colours = [f"C{index}" for index in range(len(runs))]
    for axes, panel in zip(figure.subplots(1, len(panels)), panels):
        plots.draw_panel(axes, panel, colours, log_scale=True)
        axes.set_title(panel.title)
        axes.grid(alpha=0.25)
        if len(panel.series) > 1:
            axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the command."""
    parser = cli.Parser(__doc__, "python -m evaluations.curves", "RUN [RUN ...]")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs (exps/NAME)")
    parser.add_argument(
        "--out", type=Path, help="image to write (default: curves.png in the first run)"
    )
    args = parser.parse_args()
    cli.require_package("matplotlib", "evaluations.curves")
    out = args.out or args.runs[0] / "curves.png"
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {out} must end in .png, .pdf or .svg")
    plot_curves([read_run(name, folder) for name, folder in name_folders(args.runs).items()], out)
    print(f"curves: {out}")


if __name__ == "__main__":
    cli.run(main)
