"""An evaluation as a whole: the networks asked for, the reference, and metrics.json with all that identifies a number.

Shared by evaluations.evaluate and by sample_ddp.py --evaluate.
"""

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from common import cli
from common.cli import UserError
from common.files import sha256, write_file
from common.processes import World
from evaluations.compare import RESULT_KEYS, compute_metrics, frechet_name, spread, warning
from evaluations.extractors import EXTRACTOR_NAMES, Features, load_extractor
from evaluations.metrics import MANIFOLD_NEIGHBOURS
from evaluations.reference_features import (
    ReferenceFeatures,
    default_cache_dir,
    known_name,
    load_reference_features,
)

ASKED = (
    "reference_sha256",
    "features",
    "fp16_distances",
    "normalisers",
)  # what an evaluation is of, besides the samples
NAMES = {"class_agreement": "classifier agrees with class", "inception_score": "Inception score"}


def add_flags(add: Callable) -> None:
    """The flags of an evaluation, for an argument group's add_argument."""
    add(
        "--features",
        nargs="+",
        default=["inception"],
        metavar="NAME",
        help=f"networks, in one pass: {' '.join(EXTRACTOR_NAMES)} or any of timm's; fashion is the shipped classifier",
    )
    add("--inception-weights", type=Path, help="file (default: torch hub's folder)")
    add("--encoder-weights", type=Path, help="file for timm's network (default: the hub's)")
    add(
        "--fp16-distances",
        action="store_true",
        help="precision and recall by float16 distances, as ADM's evaluator has them",
    )
    add(
        "--normalisers",
        nargs="+",
        type=normaliser,
        default=[],
        metavar="NAME=FD",
        help="distance of real held-out images by each network; FDr is the mean of the ratios to them",
    )
    add(
        "--cache-dir",
        type=Path,
        default=default_cache_dir(),
        help="where features of references are kept for the next time",
    )


def normaliser(text: str) -> tuple[str, float]:
    """An argparse type: NAME=FD."""
    name, _, value = text.rpartition("=")
    try:
        if not name:
            raise argparse.ArgumentTypeError
        return name, cli.positive_float(value)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text} is not a network's name, =, and a distance above 0"
        ) from None


class EvaluationSuite:
    """Networks and reference for samples of one size. All processes of `world` make it, and call `look`, together."""

    def __init__(
        self,
        args: argparse.Namespace,
        path: Path,
        flag: str,
        size: tuple[int, int],
        what: str,
        batch_size: int,
        device: torch.device | str,
        world: World,
    ):
        """args: what add_flags gave. path: the reference, that `flag` named; `what`: the samples. Raises UserError."""
        if len(set(args.features)) < len(args.features):
            raise UserError(f"--features {' '.join(args.features)}: each only once")
        strangers = [name for name, _ in args.normalisers if name not in args.features]
        if strangers:
            raise UserError(
                f"--normalisers {strangers[0]}: there is no such distance without --features {strangers[0]}"
            )
        timms = [name for name in args.features if name not in ("inception", "fashion")]
        if args.encoder_weights and len(timms) != 1:
            raise UserError(
                f"--encoder-weights is one network's file; --features names {len(timms)} of timm's"
            )
        if not path.exists():
            raise UserError(f"{flag} {path} does not exist")
        self.args, self.path, self.flag, self.side, self.batch_size = (
            args,
            path,
            flag,
            size[0],
            batch_size,
        )
        self.device, self.world = device, world
        self.networks = {
            name: load_extractor(
                name,
                args.inception_weights,
                size,
                device,
                what,
                encoder_weights=args.encoder_weights,
            )
            for name in args.features
        }
        digest = world.run_on_first_rank(lambda: sha256(path))
        self.identity = {
            "reference": str(path),
            "reference_sha256": digest,
            "reference_name": known_name(digest),
            "features": {name: network.weights_sha256 for name, network in self.networks.items()},
            "fp16_distances": args.fp16_distances,
            "normalisers": dict(args.normalisers),
            "resolution": size[0],
            "feature_batch_size": batch_size,
            "versions": {name: version(name) for name in ("torch", "torch-fidelity", "timm")},
        }
        self.references: dict[str, ReferenceFeatures] | None = None

    def load_reference(self) -> None:
        """At the reference, unless its features are kept. Raises UserError."""
        self.references = load_reference_features(
            self.path,
            self.identity["reference_sha256"],
            self.networks,
            self.side,
            self.batch_size,
            self.device,
            self.flag,
            self.args.cache_dir,
            self.world,
        )

    def compute_results(self, samples: dict[str, Features], labels: np.ndarray | None) -> dict:
        """The results of metrics.json, on the first process, after `look`."""
        metrics, intervals, by_count, ratios = {}, {}, {}, []
        given = dict(self.args.normalisers)
        count = 0
        for name, features in samples.items():
            reference, count = self.references[name], len(features.pool)
            metrics |= compute_metrics(
                features, labels, reference, name, self.device, self.args.fp16_distances
            )
            sure = spread(features, reference, name, self.device)
            intervals |= sure["intervals"]
            by_count |= sure["by_count"]
            if name in given:
                ratios.append(metrics[frechet_name(name)] / given[name])
        if ratios:  # Yang et al. 2026, arXiv:2604.28190
            metrics["FDr"] = float(np.mean(ratios))
        result = {"metrics": metrics, "intervals": intervals, "by_count": by_count}
        said = warning(count, list(samples))
        return result | ({"warning": said} if said else {})


def check_sample_count(count: int, what: str) -> None:
    """Raises UserError if there are too few samples for anything."""
    if count <= MANIFOLD_NEIGHBOURS:
        raise UserError(
            f"{what} holds {count} images: more than {MANIFOLD_NEIGHBOURS} are needed to compare anything"
        )


def read_object(path: Path, key: str, what: str) -> dict:
    """A JSON object that is there already, with this key; {} if there is no file. Raises UserError if it is something else."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or key not in content:
        raise UserError(
            f"{path} is there already, and is no {what}: move it away, or name another file"
        )
    return content


def read_result(path: Path, identity: dict) -> dict:
    """A metrics.json that is there already, if its numbers are of the same reference and networks, or {}. Raises UserError if
    it is something else, which is not to be lost.
    """
    old = read_object(path, "metrics", "metrics.json")
    changed = [key for key in ASKED if old and old.get(key) != identity[key]]
    if changed:
        raise UserError(
            f"{path} holds the numbers of another evaluation ({', '.join(changed)} differ): move it away, or give --out to "
            "evaluations.evaluate"
        )
    return old


def build_identity(
    suite: EvaluationSuite, samples: Path | None, sampling: dict, count: int
) -> dict:
    """All of a metrics.json but its results. samples: None where they are not kept; sampling: what their NAME.json says."""
    said = {key: value for key, value in sampling.items() if key not in ("class_names", "count")}
    file = {"samples": None, "samples_sha256": None}
    if samples:
        file = {"samples": str(samples), "samples_sha256": sha256(samples)}
    return json.loads(json.dumps({**file, "count": count, **suite.identity, "sampling": said}))


def drop_results(result: dict) -> dict:
    """All of a metrics.json but its results."""
    return {key: value for key, value in result.items() if key not in RESULT_KEYS}


def write_result(path: Path, result: dict) -> None:
    write_file(path, (json.dumps(result, indent=2) + "\n").encode())


def format_results(result: dict) -> str:
    """A metrics.json for the screen."""
    lines = []
    for key, value in result["metrics"].items():
        if value is None:
            continue
        text = f"{value:.1%}" if key == "class_agreement" else f"{value:.3f}"
        if key in result.get("intervals", {}):
            text += "   (95%: {:.3f} to {:.3f})".format(*result["intervals"][key])
        lines.append(f"  {NAMES.get(key, key):<30} {text}")
    reference = result.get("reference_name") or result["reference"]
    lines += [f"  {result['warning']}"] if result.get("warning") else []
    return "\n".join([f"{result['count']:,} samples against {reference}", *lines])
