"""Read and compare records: the settings of samples, in NAME.json and sampling.json."""

import json
from contextlib import suppress
from pathlib import Path

from common.cli import UserError
from evaluations.runs import JsonObject, read_json

# Settings that may differ when samples are added to existing samples.
KEYS_ALLOWED_TO_CHANGE = ("count", "machine")
# Settings that may differ if the recorded hash of their content is equal.
IDENTIFYING_HASH = {
    "checkpoint": "ema_sha256",
    "vae": "vae_fingerprint",
    "labels": "labels_sha256",
}


def read_record(path: Path) -> JsonObject:
    """Return the settings in a record, or {} if the file is missing or not a JSON object."""
    with suppress(OSError, UserError):
        return read_json(path)
    return {}


def format_grid_title(record: JsonObject) -> str:
    """Return the title of the image grid: model, step, solver, seed and guidance."""
    title = record["model"]
    if record["step"] is not None:
        title += f" · step {record['step']:,}"
    title += f" · {record['solver']}"
    if record["solver"] != "dopri5":
        title += f" {record['num_steps']}"
    title += f" · seed {record['global_seed']}"
    if record["cfg_scale"] > 1:
        title += f" · guidance {record['cfg_scale']:g}"
        low = record["guidance_low"]
        high = record["guidance_high"]
        if (low, high) != (0, 1):
            title += f" for t from {low:g} to {high:g}"
    return title


def check_same_settings(path: Path, record: JsonObject, owner: Path) -> None:
    """Raise UserError if the settings in a file differ from those of the current samples.

    Args:
        path: The record of the existing samples.
        record: Settings of the current samples.
        owner: The files of the existing samples, for the error message.
    """
    old = read_record(path)
    new = json.loads(json.dumps(record))
    allowed = set(KEYS_ALLOWED_TO_CHANGE)
    for key, hash_key in IDENTIFYING_HASH.items():
        if new.get(hash_key) and old.get(hash_key) == new[hash_key]:
            allowed.add(key)
    changes = [
        f"{key} was {old.get(key)}, is {new.get(key)}"
        for key in {**new, **old}
        if key not in allowed and old.get(key) != new.get(key)
    ]
    if changes:
        raise UserError(
            f"{owner} was sampled with different settings: {'; '.join(changes)}; "
            "remove it or choose another --name"
        )
