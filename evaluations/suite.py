"""Evaluate samples against a reference, and read and write metrics.json.

evaluations.evaluate and sample_ddp.py --evaluate use this module.
"""

import argparse
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from common import cli
from common.cli import UserError
from common.config import setting
from common.files import sha256, write_file
from common.processes import World
from evaluations.compare import (
    RESULT_KEYS,
    compute_distances_by_count,
    compute_metrics,
    frechet_name,
    list_metric_names,
    make_small_sample_warning,
)
from evaluations.extractors import EXTRACTOR_NAMES, load_extractor
from evaluations.features import NumpyFeatures
from evaluations.metrics import MANIFOLD_NEIGHBOURS, Device, frechet_interval
from evaluations.reference_features import (
    WELL_KNOWN_REFERENCES,
    ReferenceFeatures,
    ReferenceFile,
    load_reference_features,
)
from evaluations.runs import JsonObject, read_json
from evaluations.timm_networks import NON_TIMM_NETWORKS

# Keys of metrics.json that identify an evaluation, except those of the samples.
IDENTITY_KEYS = ("reference_sha256", "features", "fp16_distances", "normalisers")
# Display names of keys and references in printed results, by their names in metrics.json.
DISPLAY_NAMES = {
    "class_agreement": "class agreement",
    "inception_score": "Inception score",
    "Fashion-MNIST's 10,000 test images, as shipped": "the 10,000 test images of Fashion-MNIST",
}


def parse_normaliser(text: str) -> tuple[str, float]:
    """Parse NAME=FD. Used as an argparse type."""
    name, _, value = text.rpartition("=")
    with suppress(argparse.ArgumentTypeError):
        if name:
            return name, cli.positive_float(value)
    raise argparse.ArgumentTypeError(f"{text} is not of the form NAME=FD with FD above 0")


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of an evaluation, except the samples and the reference."""

    features: tuple[str, ...] = setting(
        ("inception",),
        help=f"feature networks, run in one pass over the images: {' '.join(EXTRACTOR_NAMES)} or "
        "any timm network; fashion is the bundled classifier",
        nargs="+",
        metavar="NAME",
    )
    inception_weights: Path | None = setting(
        None, help="file with the Inception weights (default: in the torch hub cache)"
    )
    encoder_weights: Path | None = setting(
        None, help="file with the weights of the timm network (default: download from the hub)"
    )
    fp16_distances: bool = setting(
        False, help="compute precision and recall from float16 distances, as ADM's evaluator does"
    )
    normalisers: tuple[tuple[str, float], ...] = setting(
        (),
        help="Frechet distance of real held-out images, per network; FDr is the mean over these "
        "networks of the distance of the samples divided by the normaliser",
        nargs="+",
        type=parse_normaliser,
        metavar="NAME=FD",
    )
    cache_dir: Path | None = setting(
        None,
        help="folder for cached features of references (default: $XDG_CACHE_HOME/sra2/references "
        "or ~/.cache/sra2/references)",
    )


class EvaluationSuite:
    """Compares samples with a reference in the feature spaces of one or several networks.

    All processes must construct the suite and call `load_reference`.

    Args:
        config: Settings of the evaluation.
        reference: File or folder that samples are compared with.
        size: Height and width of the samples.
        batch_size: Images per forward pass.
        device: Device that computes features and metrics.
        world: Processes that share the work.
        flag: Flag that selected the reference, for error messages.

    Attributes:
        networks: Feature networks by name.
        identity: Entries of metrics.json that identify the evaluation, without those of the
            samples.

    Raises:
        UserError: If settings contradict each other, or a file is missing.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        reference: Path,
        size: tuple[int, int],
        batch_size: int,
        device: Device,
        world: World,
        flag: str = "--reference",
    ):
        _check_config(config)
        if not reference.exists():
            raise UserError(f"{flag} {reference} does not exist")
        self.config = config
        self.batch_size = batch_size
        self.device = device
        self.world = world
        self.networks = {
            name: load_extractor(
                name,
                config.inception_weights,
                size,
                device,
                "the samples",
                encoder_weights=config.encoder_weights,
            )
            for name in config.features
        }
        digest = world.run_on_first_rank(lambda: sha256(reference))
        self.reference = ReferenceFile(reference, digest, size[0], flag)
        self.identity = {
            "reference": str(reference),
            "reference_sha256": digest,
            "reference_name": WELL_KNOWN_REFERENCES.get(digest),
            "features": {name: network.weights_sha256 for name, network in self.networks.items()},
            "fp16_distances": config.fp16_distances,
            "normalisers": dict(config.normalisers),
            "resolution": size[0],
            "feature_batch_size": batch_size,
            "versions": {name: version(name) for name in ("torch", "torch-fidelity", "timm")},
        }
        self.reference_features: dict[str, ReferenceFeatures] = {}

    def load_reference(self) -> None:
        """Load the features of the reference from the cache, or compute them.

        Raises:
            UserError: If the reference cannot be used with these networks.
        """
        self.reference_features = load_reference_features(
            self.reference,
            self.networks,
            self.batch_size,
            self.device,
            self.config.cache_dir,
            self.world,
        )

    def build_identity(self, samples: Path | None, sampling: JsonObject, count: int) -> JsonObject:
        """Return all entries of metrics.json except the results.

        Args:
            samples: The .npz of samples, or None if the samples are not kept.
            sampling: The content of the samples' NAME.json, or {} if the settings are unknown.
            count: Number of samples.
        """
        identity = {
            "samples": samples and str(samples),
            "samples_sha256": samples and sha256(samples),
            "count": count,
            **self.identity,
            "sampling": {
                key: sampling[key] for key in sampling if key not in ("class_names", "count")
            },
        }
        # Convert tuples to lists, so that the result equals the entries of a file.
        return json.loads(json.dumps(identity))

    def find_missing_results(self, result: JsonObject) -> list[str]:
        """Return the names of the results that a metrics.json of older code lacks."""
        names = [name for network in self.networks for name in list_metric_names(network)]
        if any(network in self.networks for network, _ in self.config.normalisers):
            names.append("FDr")
        missing = [name for name in names if name not in result["metrics"]]
        return missing + [key for key in ("intervals", "by_count") if key not in result]

    def write_results(
        self,
        path: Path,
        identity: JsonObject,
        samples: Mapping[str, NumpyFeatures],
        labels: np.ndarray | None,
        stored: JsonObject,
    ) -> JsonObject:
        """Compute the results and write metrics.json.

        Call this method on the first process only, after `load_reference`.

        Args:
            path: File to write.
            identity: The entries returned by `build_identity`.
            samples: Features of the samples by network name.
            labels: Classes of the samples, (n,), or None if they are unknown.
            stored: Content of an existing metrics.json with the same identity, whose results are
                kept, or {}.

        Returns:
            The content of metrics.json.
        """
        metrics: JsonObject = {}
        intervals = {}
        distances_by_count = {}
        for name, features in samples.items():
            reference = self.reference_features[name]
            metrics |= compute_metrics(
                features, labels, reference, name, self.device, self.config.fp16_distances
            )
            interval = frechet_interval(features.pool, reference.pool, device=self.device)
            if interval is not None:
                intervals[frechet_name(name)] = interval
            distances = compute_distances_by_count(features.pool, reference, self.device)
            if distances:
                distances_by_count[frechet_name(name)] = distances

        # FDr is the mean ratio of the distance of the samples to the distance of real images
        # (Yang et al. 2026, arXiv:2604.28190).
        normalisers = dict(self.config.normalisers)
        ratios = [
            metrics[frechet_name(name)] / normalisers[name]
            for name in samples
            if name in normalisers
        ]
        if ratios:
            metrics["FDr"] = float(np.mean(ratios))

        result: JsonObject = {
            "metrics": metrics | stored.get("metrics", {}),
            "intervals": intervals | stored.get("intervals", {}),
            "by_count": distances_by_count | stored.get("by_count", {}),
        }
        warning = make_small_sample_warning(identity["count"], samples)
        if warning:
            result["warning"] = warning
        result |= identity
        write_file(path, (json.dumps(result, indent=2) + "\n").encode())
        return result


def _check_config(config: EvaluationConfig) -> None:
    """Raise UserError if settings contradict each other."""
    if len(set(config.features)) < len(config.features):
        raise UserError(f"--features {' '.join(config.features)}: pass each name only once")
    unknown = [name for name, _ in config.normalisers if name not in config.features]
    if unknown:
        raise UserError(
            f"--normalisers {unknown[0]} requires the network {unknown[0]}: add it to --features"
        )
    timm_networks = [name for name in config.features if name not in NON_TIMM_NETWORKS]
    if config.encoder_weights and len(timm_networks) != 1:
        raise UserError(
            "--encoder-weights applies to a single timm network, but --features contains "
            f"{len(timm_networks)}: pass exactly one timm network"
        )


def check_sample_count(count: int, source: str) -> None:
    """Raise UserError if there are too few samples for the metrics.

    Args:
        count: Number of samples.
        source: Flag or file that determines the number, for the error message.
    """
    if count <= MANIFOLD_NEIGHBOURS:
        raise UserError(
            f"{source}: {count} images are too few for the metrics: "
            f"use more than {MANIFOLD_NEIGHBOURS}"
        )


def read_json_object(path: Path, required_key: str, description: str) -> JsonObject:
    """Return the JSON object in a file of a known kind, or {} if the file does not exist.

    Args:
        path: Path of the file.
        required_key: A key that all files of this kind contain.
        description: Name of this kind of file, for the error message.

    Raises:
        UserError: If the file is of another kind and must not be overwritten.
    """
    if not path.exists():
        return {}
    with suppress(OSError, UserError):
        content = read_json(path)
        if required_key in content:
            return content
    raise UserError(f"{path} exists but is not a {description}: rename it or choose another file")


def read_result(path: Path, identity: JsonObject) -> JsonObject:
    """Return the stored result of an evaluation, or {} if these samples have not been evaluated.

    Args:
        path: Path of metrics.json.
        identity: The entries that identify the samples and the evaluation.

    Raises:
        UserError: If the file belongs to another evaluation and must not be overwritten.
    """
    existing = read_json_object(path, "metrics", "metrics.json")
    changed = [key for key in IDENTITY_KEYS if existing and existing.get(key) != identity[key]]
    if changed:
        raise UserError(
            f"{path} contains the results of another evaluation ({', '.join(changed)} differ): "
            "rename it, or pass --out to evaluations.evaluate"
        )
    existing_identity = {key: value for key, value in existing.items() if key not in RESULT_KEYS}
    return existing if existing_identity == identity else {}


def format_results(result: JsonObject) -> str:
    """Format the content of a metrics.json as text, with one line per metric."""
    reference = result.get("reference_name") or result["reference"]
    intervals = result.get("intervals", {})
    lines = [f"{result['count']:,} samples against {DISPLAY_NAMES.get(reference, reference)}"]
    for key, value in result["metrics"].items():
        if value is None:
            continue
        text = f"{value:.1%}" if key == "class_agreement" else f"{value:.3f}"
        if key in intervals:
            low, high = intervals[key]
            text += f"   (95%: {low:.3f} to {high:.3f})"
        lines.append(f"  {DISPLAY_NAMES.get(key, key):<30} {text}")
    if result.get("warning"):
        lines.append(f"  {result['warning']}")
    return "\n".join(lines)
