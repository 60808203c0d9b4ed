"""Read metrics.jsonl, the log of a training run, written by this or by older code.

Each line is a JSON object with the step, the number of images seen, and either the means since the
previous line or the results of an evaluation, whose settings are under "evaluation".

Lines of schema 2 contain `"schema": 2` and the columns align/METHOD, cosine/METHOD and
token_norm/METHOD for each alignment method. Older lines have no schema. Their columns align, cosine
and token_norm belong to the first method, or are null without alignment, and those of further
methods are align_METHOD, cosine_METHOD and token_norm_METHOD. A run that newer code has resumed
contains lines of both kinds.
"""

import json
import re
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.files import read_json_if_valid

METRICS_SCHEMA = 2
UNKNOWN_METHOD = "unknown"  # args.json, which names the first method, is missing or damaged

_OLD_METHOD_COLUMN = re.compile(r"(align|cosine|token_norm)(?:_(.+))?")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a run's metrics.jsonl, with the columns of the current schema.

    A last line without a line break is ignored, because it is incomplete: its process was killed or
    is still writing it.

    Args:
        folder: The run's folder. A folder without metrics.jsonl has no lines.

    Raises:
        UserError: A line is damaged, or newer code wrote it.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    methods = _read_methods(folder)
    rows = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is damaged: remove it")
        if row.get("schema", 1) > METRICS_SCHEMA:
            raise UserError(f"{path}: line {number} has schema {row['schema']}: update this code")
        rows.append(upgrade_row(row, methods))
    return rows


def upgrade_row(row: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """Return a line with the columns of the current schema.

    Args:
        row: A line of any schema.
        methods: The run's alignment methods, in the order of --align.
    """
    if "schema" in row:
        return row
    upgraded: dict[str, Any] = {"schema": METRICS_SCHEMA}
    for key, value in row.items():
        match = _OLD_METHOD_COLUMN.fullmatch(key)
        if match is None:
            upgraded[key] = value
        elif methods or value is not None:
            column, method = match.groups()
            first_method = methods[0] if methods else UNKNOWN_METHOD
            upgraded[f"{column}/{method or first_method}"] = value
    return upgraded


def _read_methods(folder: Path) -> list[str]:
    """Return the alignment methods that args.json names; [] if it is missing or damaged."""
    methods = read_json_if_valid(folder / "args.json").get("align") or []
    if isinstance(methods, str):  # code that supported only one method wrote its name alone
        methods = [methods]
    return [name for name in methods if name != "none"]
