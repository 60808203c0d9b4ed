"""What the folder of a run says of it: for those who draw and compare runs."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.cli import UserError

OF_METHODS = ("align", "cosine", "token_norm")


class Run(NamedTuple):
    """A run as it lies on the disk; args and config are {} where their files are missing."""

    name: str
    folder: Path
    steps: list[dict]  # the lines of metrics.jsonl
    evaluations: list[dict]  # those of them that --eval-every wrote
    args: dict
    config: dict  # of its newest checkpoint

    @property
    def images(self) -> int:
        """Images seen at the last line."""
        return self.steps[-1]["images"]


def named(folders: list[Path]) -> dict[str, Path]:
    """Runs by their names, or by their whole paths where two have the same name."""
    names = [folder.name or folder.resolve().name for folder in folders]
    return {
        name if names.count(name) == 1 else str(folder): folder
        for name, folder in zip(names, folders)
    }


def read_log(folder: Path) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl of a run: its lines of steps, and those of evaluations. Half a line at the end is a write under way.
    Raises UserError.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        begun = (folder / "args.json").exists()
        why = (
            "has not logged yet (--log-every)"
            if begun
            else "is no run: name a folder like exps/NAME"
        )
        raise UserError(f"{folder} {why}")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if line.endswith("\n"):
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise UserError(f"{path}: line {number} is damaged: remove it") from None
    steps = [row for row in rows if "evaluation" not in row]
    if not steps:
        raise UserError(f"{path} is empty: the run has not logged yet (--log-every)")
    return steps, [row for row in rows if "evaluation" in row]


def read_json(path: Path) -> dict:
    """A file that holds one JSON object; {} where there is none. Raises UserError."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; remove it")
    return content


def read_run(name: str, folder: Path) -> Run:
    """Raises UserError if it is none, or has not logged."""
    steps, evaluations = read_log(folder)
    configs = sorted(
        folder.glob("checkpoints/[0-9]*/config.json"),
        key=lambda path: (len(path.parent.name), path),
    )
    config = read_json(configs[-1]) if configs else {}
    return Run(name, folder, steps, evaluations, read_json(folder / "args.json"), config)


def methods(run: Run, key: str) -> dict[str, str]:
    """Column -> whose it is, of a quantity that each method of alignment has: the first's has no name behind it. Of any other
    quantity, and with one method: its own name -> the run's.
    """
    first = run.args.get("align") or [""]
    more = [name for name in run.steps[-1] if key in OF_METHODS and name.startswith(f"{key}_")]
    if not more or not isinstance(first, list):
        return {key: run.name}
    return {name: f"{run.name}, {name[len(key) + 1 :] or first[0]}" for name in (key, *more)}


def column(rows: list[dict], key: str) -> np.ndarray:
    """One quantity of n lines, (n,) float64; NaN where it is missing or null."""
    return np.array([row.get(key) for row in rows], float)
