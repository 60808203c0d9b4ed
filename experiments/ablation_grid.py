"""List the runs of the ablations: Table 1 of the paper, and further axes and values.

Each run differs from the paper's best run in the value of one axis.
"""

import re
from typing import NamedTuple

from models.sit import PRESETS, default_align_block

BASELINE = "none"  # name of the runs without alignment
PAPER_VANILLA_FID = 33.02
AXIS_TITLES = {
    "depth": "aligned block",
    "t-range": "timesteps aligned",
    "loss": "loss",
    "weight": "weight of the loss",
    "layers": "linear layers of the head",
    "target": "target",
    "schedule": "steps aligned",
}
PAPER_AXES = ("depth", "t-range", "loss", "weight", "layers")  # the axes of table 1


class AxisValue(NamedTuple):
    """A value of an axis: flags of train.py, and the FID that the paper reports for SiT-B/2."""

    flags: str
    paper_fid: float | None = None


def list_axis_values(model: str, steps: int, demo: bool) -> dict[str, dict[str, AxisValue]]:
    """Return the values of each axis, by label.

    Args:
        model: A preset of models/sit.py. The paper's FIDs per aligned block apply only to
            models with 12 blocks.
        steps: Number of training steps.
        demo: Whether to include weights that the paper does not report.
    """
    depth = PRESETS[model]["depth"]
    paper_blocks = {round(depth * block / 12) for block in (2, 3, 6, 8)}
    blocks = {default_align_block(model), *paper_blocks}
    if depth <= 8:
        blocks = set(range(1, depth + 1))
    fid_of_block = {2: 28.89, 6: 32.44, 8: 36.20} if depth == 12 else {}
    fid_of_weight = {1.0: 28.89, 0.1: 30.10}
    weights = (0.1, 0.3, 1.0, 3.0) if demo else (1.0, 0.1)
    return {
        "depth": {
            str(block): AxisValue(f"--align-depth {block}", fid_of_block.get(block))
            for block in sorted(blocks)
        },
        "t-range": {
            "[0, 1]": AxisValue("--align-t-range 0 1", 28.89),
            "[0, 0.5]": AxisValue("--align-t-range 0 0.5", 30.04),
            "[0.5, 1]": AxisValue("--align-t-range 0.5 1"),
        },
        "loss": {
            "smooth_l1": AxisValue("--align-loss smooth_l1 --align-beta 0.05", 28.89),
            "cosine": AxisValue("--align-loss cosine", 29.30),
            "l2": AxisValue("--align-loss l2", 29.40),
            "l1": AxisValue("--align-loss l1", 29.50),
        },
        "weight": {
            f"{weight:g}": AxisValue(f"--align-weight {weight}", fid_of_weight.get(weight))
            for weight in weights
        },
        "layers": {
            "5": AxisValue("--projector-layers 5", 28.89),
            "2": AxisValue("--projector-layers 2", 31.32),
        },
        "target": {
            "mean": AxisValue("--align-target mean"),
            "sample": AxisValue("--align-target sample"),
            "mean, normalised": AxisValue("--align-target mean --align-normalize channel"),
        },
        "schedule": {
            "all": AxisValue("--align-stop-step 0"),
            "first half": AxisValue(f"--align-stop-step {max(1, steps // 2)}"),
            "first quarter": AxisValue(f"--align-stop-step {max(1, steps // 4)}"),
        },
    }


def list_best_labels(model: str) -> dict[str, str]:
    """Return the label of the paper's best value on each axis."""
    return {
        "depth": str(default_align_block(model)),
        "t-range": "[0, 1]",
        "loss": "smooth_l1",
        "weight": "1",
        "layers": "5",
        "target": "mean",
        "schedule": "all",
    }


def build_grid(
    axes: list[str], model: str, steps: int, demo: bool
) -> tuple[dict[str, str], list[dict]]:
    """Return the runs of a study.

    Args:
        axes: The axes to vary, keys of `AXIS_TITLES`.
        model: A preset of models/sit.py.
        steps: Number of training steps.
        demo: Whether to include values that the paper does not report.

    Returns:
        The alignment flags by the name of the run (a run that several axes share occurs once), and
        the "axes" entry of the result.
    """
    best = list_best_labels(model)
    values = list_axis_values(model, steps, demo)
    runs = {BASELINE: "--align none"}
    panels = []
    for axis in axes:
        entries = []
        for label, value in values[axis].items():
            is_best = label == best[axis]
            slug = re.sub("[^0-9a-z._]+", "-", label).strip("-")
            name = "sra2" if is_best else f"{axis}-{slug}"
            # For axes that the paper does not vary, the best values are the defaults of train.py.
            flags = [
                values[axis_name][selected_label].flags
                for axis_name, selected_label in (best | {axis: label}).items()
                if axis_name in PAPER_AXES or selected_label != best[axis_name]
            ]
            runs[name] = " ".join(["--align sra2", *flags])
            entries.append(
                {"label": label, "run": name, "usual": is_best, "paper": value.paper_fid}
            )
        paper_vanilla = PAPER_VANILLA_FID if axis in PAPER_AXES else None
        panels.append(
            {"name": axis, "title": AXIS_TITLES[axis], "paper": paper_vanilla, "values": entries}
        )
    return runs, panels
