"""Find the metrics.json files of runs, and determine which of their values may be compared."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from common.cli import UserError
from evaluations.compare import RESULT_KEYS
from evaluations.runs import JsonObject, Run, read_json

# Fields that identify the model, which may differ between files that are compared.
MODEL_FIELDS = {
    "samples",
    "samples_sha256",
    "sampling.checkpoint",
    "sampling.ema_sha256",
    "sampling.step",
    "sampling.images_seen",
}
# Prefixes of fields that affect only rounding errors.
ROUNDING_FIELDS = (
    "versions.",
    "feature_batch_size",
    "sampling.machine.",
    "sampling.per_proc_batch_size",
    "sampling.compile",
)
# Field that may differ between copies of the same content -> field that identifies the content.
IDENTIFYING_FIELD = {
    "reference": "reference_sha256",
    "sampling.vae": "sampling.vae_fingerprint",
    "sampling.count": "count",
}
HIGHER_IS_BETTER = {"inception_score", "precision", "recall", "class_agreement"}
LOWER_IS_BETTER = ("FID", "sFID", "FD")  # prefixes of metric names


class MetricsFile(NamedTuple):
    """A metrics.json file.

    Attributes:
        path: Path of the file.
        content: Content of the file.
        run: Run that generated the samples, or None if it is not one of the runs in the report.
        run_index: Index of this run in the report, or None.
    """

    path: Path
    content: JsonObject
    run: Run | None = None
    run_index: int | None = None

    @property
    def name(self) -> str:
        """Return the name of the run, or "other samples"."""
        return self.run.name if self.run else "other samples"

    @property
    def stem(self) -> str:
        """Return the name of the file without the suffix .metrics.json."""
        return self.path.name.removesuffix(".metrics.json")

    @property
    def samples(self) -> Path | None:
        """Return the recorded path of the evaluated .npz, or None if no path is recorded.

        If the recorded path does not exist, return the path of an .npz with the same name in the
        folder of the metrics file.
        """
        name = self.content.get("samples")
        if not isinstance(name, str):
            return None
        return Path(name) if Path(name).exists() else self.path.parent / Path(name).name

    @property
    def sampling(self) -> JsonObject:
        """Return the sampling settings, or {} if they are unknown."""
        return self.content.get("sampling") or {}

    @property
    def images(self) -> int:
        """Return the number of images that the model had seen, or 0 if the number is unknown."""
        return self.sampling.get("images_seen") or 0

    def interval(self, metric: str) -> list[float] | None:
        """Return the 95% confidence interval of a metric, or None if it is not available."""
        return (self.content.get("intervals") or {}).get(metric)


class Comparison(NamedTuple):
    """The differing and the agreeing fields of several settings, in order of occurrence.

    Attributes:
        differing: Distinct values of each field that differs.
        agreeing: Common value of each field that agrees.
    """

    differing: dict[str, list[Any]]
    agreeing: JsonObject


def flatten(content: JsonObject, prefix: str = "") -> JsonObject:
    """Return nested objects as one flat object with dotted keys."""
    flat: JsonObject = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def format_value(value: Any) -> str:
    """Format the value of a setting as one line of text."""
    if isinstance(value, str):
        return value
    return "—" if value is None else json.dumps(value, ensure_ascii=False)


def drop_redundant_fields(fields: JsonObject) -> JsonObject:
    """Drop fields whose content another field identifies, such as the path of a file with a hash.

    Otherwise, copies of a file in different folders would count as different files.
    """
    return {
        key: value
        for key, value in fields.items()
        if not fields.get(IDENTIFYING_FIELD.get(key, ""))
    }


def select_identity(content: JsonObject) -> JsonObject:
    """Return the fields of a metrics.json that must agree if its values are to be compared."""
    fields = flatten({key: value for key, value in content.items() if key not in RESULT_KEYS})
    return {
        key: value
        for key, value in drop_redundant_fields(fields).items()
        if key not in MODEL_FIELDS and not key.startswith(ROUNDING_FIELDS)
    }


def has_unknown_sampling(fields: JsonObject) -> bool:
    """Return whether an identity has no field about how the samples were generated."""
    return not any(key.startswith("sampling.") for key in fields)


def compare_settings(settings: list[JsonObject]) -> Comparison:
    """Split the fields of several settings into those that differ and those that agree.

    Sampling fields are compared only among settings that have any.
    """
    differing: dict[str, list[Any]] = {}
    agreeing: JsonObject = {}
    known = [fields for fields in settings if not has_unknown_sampling(fields)]
    for key in dict.fromkeys(key for fields in settings for key in fields):
        comparable = known if key.startswith("sampling.") else settings
        # Values that are formatted identically count as one value.
        distinct = {format_value(fields.get(key)): fields.get(key) for fields in comparable}
        values = list(distinct.values())
        if len(values) > 1:
            differing[key] = values
        else:
            agreeing[key] = values[0]
    return Comparison(differing, agreeing)


def find_metrics_files(
    runs: list[Run], extra_paths: list[Path], sample_dir: Path
) -> list[MetricsFile]:
    """Read the metrics files in the folders of the runs, in `extra_paths`, and in `sample_dir`.

    Args:
        runs: The runs that are compared.
        extra_paths: Further files, whose samples may come from other models.
        sample_dir: Folder of samples. Its files are included if their samples come from a
            checkpoint of one of the runs.

    Returns:
        The files in the order of the runs, sorted within each run by the number of images seen.
        Files of other samples are last.

    Raises:
        UserError: A file in a run or in `extra_paths` is not a metrics.json.
    """
    files_by_path: dict[Path, MetricsFile] = {}
    for run_index, run in enumerate(runs):
        for path in sorted({*run.folder.glob("metrics.json"), *run.folder.glob("*.metrics.json")}):
            files_by_path.setdefault(path.resolve(), MetricsFile(path, _read(path), run, run_index))
    for path in extra_paths:
        if not path.exists():
            raise UserError(f"--metrics {path} does not exist: create it with evaluations.evaluate")
        files_by_path.setdefault(path.resolve(), _read_and_assign(path, runs))
    for path in sorted(sample_dir.glob("*.metrics.json")):
        # The folder may contain files of other runs or of other programs.
        with suppress(UserError):
            file = _read_and_assign(path, runs)
            if file.run:
                files_by_path.setdefault(path.resolve(), file)

    return sorted(
        files_by_path.values(),
        key=lambda file: (file.run is None, file.run_index or 0, file.images, str(file.path)),
    )


def _read(path: Path) -> JsonObject:
    """Return the content of a metrics.json, or raise UserError if the file is of another kind."""
    content = read_json(path)
    has_metrics = isinstance(content.get("metrics"), dict)
    if not has_metrics or not isinstance(content.get("sampling", {}), dict):
        raise UserError(f"{path} is not a metrics.json: use a file written by evaluations.evaluate")
    return content


def _read_and_assign(path: Path, runs: list[Run]) -> MetricsFile:
    """Read a metrics.json, and assign it to the run whose checkpoint generated the samples."""
    file = MetricsFile(path, _read(path))
    checkpoint = file.sampling.get("checkpoint")
    if checkpoint:
        for run_index, run in enumerate(runs):
            if Path(checkpoint).resolve().is_relative_to(run.folder.resolve()):
                return file._replace(run=run, run_index=run_index)
    return file


def find_best(files: list[MetricsFile], metric: str) -> set[int]:
    """Return the indices of the files with the best value of a metric.

    Only files with the same identity are compared with each other. A file is the best only if its
    confidence interval does not overlap the interval of any other file.
    """
    if metric in HIGHER_IS_BETTER:
        sign = 1
    elif metric.startswith(LOWER_IS_BETTER):
        sign = -1
    else:
        return set()

    # Group the files by identity. An entry is the value, both ends of the interval, and the index
    # of the file. The value and the ends are negated if lower values are better.
    groups: dict[str, list[tuple[float, float, float, int]]] = {}
    for index, file in enumerate(files):
        value = file.content["metrics"].get(metric)
        if value is not None and math.isfinite(value):
            ends = [sign * end for end in file.interval(metric) or [value]]
            key = json.dumps(select_identity(file.content), sort_keys=True)
            groups.setdefault(key, []).append((sign * value, min(ends), max(ends), index))

    best = set()
    for group in groups.values():
        *others, (_, low, _, index) = sorted(group)
        if others and low > max(high for _, _, high, _ in others):
            best.add(index)
    return best
