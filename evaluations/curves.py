"""The curves of one or several runs, over images seen, as one picture.

python -m evaluations.curves exps/vanilla exps/sra2 --out curves.png"""

from pathlib import Path

import numpy as np

import cli
from cli import UserError
from evaluations.runs import column, named, read_log

PANELS = {"velocity": "velocity loss", "align": "alignment loss", "grad_norm": "gradient norm before clipping"}


DISTANCES = ("FID", "FD-fashion")  # of evaluations while training


def read_metrics(run: Path) -> tuple[dict[str, np.ndarray], dict[tuple[str, float], np.ndarray]]:
    """metrics.jsonl of a run: its steps column by column, and (n, 2) images and distance for each distance and EMA decay.
    Raises UserError."""
    steps, evaluations = read_log(run)
    distances: dict[tuple[str, float], list] = {}
    for row in evaluations:
        for name in DISTANCES:
            if name in row:
                distances.setdefault((name, row["evaluation"]["ema_decay"]), []).append((row["images"], row[name]))
    columns = {key: column(steps, key) for key in ("images", *PANELS)}
    return columns, {key: np.array(pairs) for key, pairs in distances.items()}


def draw(runs: dict[str, tuple[dict[str, np.ndarray], dict[tuple[str, float], np.ndarray]]], out: Path) -> None:
    """One panel a quantity, one colour a run; one more panel for each distance that a run was evaluated by."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = [name for name in DISTANCES if any(name == key for _, distances in runs.values() for key, _ in distances)]
    panels = [*PANELS.values(), *measured]
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), layout="constrained")
    for i, (run, (columns, distances)) in enumerate(runs.items()):
        for axis, key in zip(axes, PANELS):
            if np.any(columns[key] > 0):
                axis.plot(columns["images"] / 1e3, columns[key], f"C{i}", label=run, linewidth=1.6)
        for k, ((name, decay), pairs) in enumerate(distances.items()):
            axis = axes[panels.index(name)]
            style = ("-", "--", ":", "-.")[k % 4]
            axis.plot(pairs[:, 0] / 1e3, pairs[:, 1], f"C{i}", label=f"{run}, EMA {decay:g}", linestyle=style, marker=".")
    for axis, title in zip(axes, panels):
        axis.set_title(title)
        axis.set_xlabel("thousand images seen")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
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
    parser.add_argument("--out", type=Path, help="picture to write (default: curves.png in the first run)")
    args = parser.parse_args()
    out = args.out or args.runs[0] / "curves.png"
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {out} must end in .png, .pdf or .svg")
    runs = {name: read_metrics(folder) for name, folder in named(args.runs).items()}
    draw(runs, out)
    print(f"curves: {out}")


if __name__ == "__main__":
    cli.run(main)
