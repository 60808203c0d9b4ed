"""An evaluation as a whole: the networks asked for, the reference, and metrics.json with all that identifies a number.

Shared by evaluations.evaluate and by sample_ddp.py --evaluate."""

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import cli
from cli import UserError
from evaluations.compare import RESULTS, compare, frechet_name, spread, warning
from evaluations.features import EXTRACTORS, Features, load_extractor
from evaluations.metrics import NEIGHBOURS
from evaluations.references import cache_folder, known_name, load_references
from files import sha256, write_file
from world import World

NAMES = {"class_agreement": "classifier agrees with class", "inception_score": "Inception score"}


def add_flags(add: Callable, features: str = "inception") -> None:
    """The flags of an evaluation, for an argument group's add_argument."""
    add("--features", nargs="+", default=[features], metavar="NAME",
        help=f"networks, in one pass: {' '.join(EXTRACTORS)} or any of timm's; fashion is the shipped classifier")  # fmt: skip
    add("--inception-weights", type=Path, help="file (default: torch hub's folder)")
    add("--encoder-weights", type=Path, help="file for timm's network (default: the hub's)")
    add("--fp16-distances", action="store_true", help="precision and recall by float16 distances, as ADM's evaluator has them")
    add("--normalisers", nargs="+", type=normaliser, default=[], metavar="NAME=FD",
        help="distance of real held-out images by each network; FDr is the mean of the ratios to them")  # fmt: skip
    add("--cache-dir", type=Path, default=cache_folder(), help="where features of references are kept for the next time")


def normaliser(text: str) -> tuple[str, float]:
    """An argparse type: NAME=FD."""
    name, _, value = text.rpartition("=")
    try:
        if not name:
            raise argparse.ArgumentTypeError
        return name, cli.above_zero(value)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text} is not a network's name, =, and a distance above 0") from None


class Suite:
    """Networks and reference for samples of one size. Made and called by all processes of `world` together."""

    def __init__(self, args: argparse.Namespace, path: Path, flag: str, size: tuple[int, int], what: str, batch_size: int,
                 device: torch.device | str, world: World):  # fmt: skip
        """args: what add_flags gave. path: the reference, that `flag` named; `what`: the samples. Raises UserError."""
        if len(set(args.features)) < len(args.features):
            raise UserError(f"--features {' '.join(args.features)}: each only once")
        strangers = [name for name, _ in args.normalisers if name not in args.features]
        if strangers:
            raise UserError(f"--normalisers {strangers[0]}: there is no such distance without --features {strangers[0]}")
        timms = [name for name in args.features if name not in ("inception", "fashion")]
        if args.encoder_weights and len(timms) != 1:
            raise UserError(f"--encoder-weights is one network's file; --features names {len(timms)} of timm's")
        if not path.exists():
            raise UserError(f"{flag} {path} does not exist")
        self.args, self.device = args, device
        self.networks = {
            name: load_extractor(name, args.inception_weights, size, device, what, encoder_weights=args.encoder_weights)
            for name in args.features
        }
        digest = world.first(lambda: sha256(path))
        self.identity = {
            "reference": str(path), "reference_sha256": digest, "reference_name": known_name(digest),
            "features": {name: network.weights_sha256 for name, network in self.networks.items()},
            "fp16_distances": args.fp16_distances, "normalisers": dict(args.normalisers), "allow_tf32": False,
            "feature_batch_size": batch_size, "versions": {name: version(name) for name in ("torch", "torch-fidelity", "timm")},
        }  # fmt: skip
        self.references = load_references(path, digest, self.networks, size[0], batch_size, device, flag, args.cache_dir, world)

    def judge(self, samples: dict[str, Features], labels: np.ndarray | None) -> dict:
        """The results of metrics.json, on the first process."""
        metrics, intervals, by_count, ratios = {}, {}, {}, []
        given = dict(self.args.normalisers)
        count = 0
        for name, features in samples.items():
            reference, count = self.references[name], len(features.pool)
            metrics |= compare(features, labels, reference, name, self.device, self.args.fp16_distances)
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


def enough(count: int, what: str) -> None:
    """Raises UserError if there are too few samples for anything."""
    if count <= NEIGHBOURS:
        raise UserError(f"{what} holds no arr_0 with more than {NEIGHBOURS} images: there is nothing to compare")


def read_result(path: Path) -> dict:
    """A metrics.json that is there already; {} if none. Raises UserError if it is something else."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        raise UserError(f"--out {path} is there already, and is no metrics.json") from None


def identity_of(result: dict) -> dict:
    """All of a metrics.json but its results."""
    return {key: value for key, value in result.items() if key not in RESULTS}


def write_result(path: Path, result: dict) -> None:
    write_file(path, (json.dumps(result, indent=2) + "\n").encode())


def table(result: dict) -> str:
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
