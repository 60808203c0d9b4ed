"""Read metrics.jsonl, the log of a training run, in the current or an older schema.

Each line is a JSON object with the step, the number of images seen, and either the means since the
previous line or the results of an evaluation. The settings of an evaluation are in the entry
"evaluation".

Lines of schema 3 contain `"schema": 3` and the keys align/METHOD, cosine/METHOD and
token_norm/METHOD for each alignment method. In schema 2, `matmul_share` was called `mfu`. Older
lines have no schema. Their keys align, cosine and token_norm belong to the first method, or are
null without alignment. The keys of additional methods are align_METHOD, cosine_METHOD and
token_norm_METHOD. A run that newer code has resumed contains lines of several schemas.
"""

import json
import re
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.files import read_json_if_valid

METRICS_SCHEMA = 3
UNKNOWN_METHOD = "unknown"  # used if args.json, which lists the methods, is missing or damaged

_OLD_METHOD_KEY = re.compile(r"(align|cosine|token_norm)(?:_(.+))?")


def split_lines(content: bytes) -> list[bytes]:
    """Return the complete lines of a log, including their line breaks.

    A last line without a line break is ignored, because it is incomplete: the process was killed or
    is still writing it.
    """
    return [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


def is_zeroed(line: bytes) -> bool:
    """Return whether a line contains NUL bytes.

    After a power failure, blocks that were not flushed to the disk may consist of NUL bytes.
    """
    return b"\0" in line


def read_rows(folder: Path, ignore_zeroed: bool = False) -> list[dict[str, Any]]:
    """Return the complete lines of a run's metrics.jsonl, with the keys of the current schema.

    Args:
        folder: The run's folder. A folder without metrics.jsonl has no lines.
        ignore_zeroed: Whether to ignore lines with NUL bytes.

    Raises:
        UserError: A line is damaged or was written by newer code.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    methods = _read_methods(folder)
    rows = []
    for number, line in enumerate(split_lines(path.read_bytes()), 1):
        if ignore_zeroed and is_zeroed(line):
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not _is_row(row):
            raise UserError(f"{path}: line {number} is damaged: remove it")
        if row.get("schema", 1) > METRICS_SCHEMA:
            raise UserError(f"{path}: line {number} has schema {row['schema']}: update this code")
        rows.append(upgrade_row(row, methods))
    return rows


def _is_row(content: Any) -> bool:
    """Return whether the content of a line has the step and the schema that all lines have."""
    if not isinstance(content, dict):
        return False
    return isinstance(content.get("step"), int) and isinstance(content.get("schema", 1), int)


def upgrade_row(row: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """Return a line with the keys of the current schema.

    Args:
        row: A line of any schema.
        methods: The run's alignment methods, in the order of --align.
    """
    schema = row.get("schema", 1)
    if schema == METRICS_SCHEMA:
        return row
    upgraded: dict[str, Any] = {}
    for key, value in row.items():
        match = _OLD_METHOD_KEY.fullmatch(key) if schema == 1 else None
        if key == "mfu":
            upgraded["matmul_share"] = value
        elif match is None:
            upgraded[key] = value
        elif methods or value is not None:
            column, method = match.groups()
            first_method = methods[0] if methods else UNKNOWN_METHOD
            upgraded[f"{column}/{method or first_method}"] = value
    return upgraded | {"schema": METRICS_SCHEMA}


def _read_methods(folder: Path) -> list[str]:
    """Return the alignment methods listed in args.json, or [] if it is missing or damaged."""
    methods = read_json_if_valid(folder / "args.json").get("align") or []
    if isinstance(methods, str):  # older code stored a single method as a string
        methods = [methods]
    return [name for name in methods if name != "none"]
