"""The curves of one or several runs, over images seen, as one picture.

python -m evaluations.curves exps/vanilla exps/sra2 --out curves.png"""

import json
from pathlib import Path

import numpy as np

import cli
from cli import UserError

PANELS = {"velocity": "velocity loss", "align": "alignment loss", "grad_norm": "gradient norm before clipping"}


def read_metrics(run: Path) -> dict[str, np.ndarray]:
    """metrics.jsonl of a run, column by column. Raises UserError."""
    path = run / "metrics.jsonl"
    if not path.exists():
        why = "has not logged yet (--log-every)" if (run / "args.json").exists() else "is no run: name a folder like exps/NAME"
        raise UserError(f"{run} {why}")
    rows = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if not rows:
        raise UserError(f"{path} is empty: the run has not logged yet (--log-every)")
    return {key: np.array([row[key] for row in rows], float) for key in ("images", *PANELS)}


def draw(runs: dict[str, dict[str, np.ndarray]], out: Path) -> None:
    """One panel a quantity, one colour a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(5 * len(PANELS), 3.6), layout="constrained")
    for axis, (key, title) in zip(axes, PANELS.items()):
        for i, (name, columns) in enumerate(runs.items()):
            if np.any(columns[key] > 0):
                axis.plot(columns["images"] / 1e3, columns[key], f"C{i}", label=name, linewidth=1.6)
        axis.set_title(title)
        axis.set_xlabel("thousand images seen")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(True, which="both", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines and len(runs) > 1:
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
    names = [run.name for run in args.runs]
    runs = {run.name if names.count(run.name) == 1 else str(run): read_metrics(run) for run in args.runs}
    draw(runs, out)
    print(f"curves: {out}")


if __name__ == "__main__":
    cli.run(main)
