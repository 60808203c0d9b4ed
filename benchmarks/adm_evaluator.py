"""ADM's own evaluator and ours on the same features: every number of both, and how far they are apart.

    python -m venv adm && adm/bin/pip install tensorflow-cpu scipy requests tqdm
    python -m benchmarks.adm_evaluator --evaluator guided-diffusion/evaluations/evaluator.py --python adm/bin/python

The features are synthetic: clusters, cut off below 0, of Inception's width. TensorFlow lives in an environment of its own, in
which benchmarks/adm_original.py runs; arrays travel as .npz.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from benchmarks.measure import describe_machine, report
from common import cli
from common.files import sha256
from evaluations.metrics import (
    MANIFOLD_NEIGHBOURS,
    compute_statistics,
    frechet_distance,
    inception_score,
    manifold_radii,
    precision_recall,
)

OVERFLOW = 128  # times this, squared distances of the features leave float16; a power of two changes no digit in float32


def parse() -> argparse.Namespace:
    parser = cli.Parser(
        __doc__, "python -m benchmarks.adm_evaluator", "--evaluator FILE --python FILE"
    )
    parser.add_argument(
        "--evaluator",
        type=Path,
        required=True,
        help="evaluations/evaluator.py of openai/guided-diffusion",
    )
    parser.add_argument(
        "--python",
        type=Path,
        required=True,
        help="interpreter that has tensorflow, scipy, requests and tqdm",
    )
    parser.add_argument("--out", type=Path, help="file for the result")
    return parser.parse_args()


def features(
    rng: np.random.Generator, count: int, spread: float, clusters: np.ndarray, width: int
) -> np.ndarray:
    """(count, width) float32: a cluster's centre, a few directions of `spread` that all share, and noise, cut off below 0."""
    directions = np.random.default_rng(1).standard_normal((12, width)) / 4
    centres = np.random.default_rng(2).standard_normal((64, width)) / 3
    values = (
        0.3
        + centres[rng.choice(clusters, count)]
        + spread * rng.standard_normal((count, 12)) @ directions
    )
    return np.maximum(values + 0.03 * rng.standard_normal((count, width)), 0).astype(np.float32)


def make_inputs(
    counts: dict[str, int], width: int = 2048, classes: int = 1008
) -> dict[str, np.ndarray]:
    """What both are given."""
    rng = np.random.default_rng(0)
    arrays = {
        "reference": features(rng, counts["reference"], 0.5, np.arange(48), width),
        "samples": features(rng, counts["samples"], 0.4, np.arange(12, 64), width),
        "few": features(rng, counts["few"], 0.4, np.arange(12, 64), width),
        "activations": features(rng, counts["activations"], 0.5, np.arange(64), width),
        "weights": (rng.standard_normal((width, classes)) * 4 / width**0.5).astype(np.float32),
        "overflow": np.int64(OVERFLOW),
    }
    return arrays | {
        f"image {size}": rng.integers(0, 256, (1, size, size, 3), np.uint8)
        for size in (32, 256, 512)
    }


def compute_ours(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same by this repository's code."""
    a, b = arrays["reference"], arrays["samples"]
    reference, samples = compute_statistics(a), compute_statistics(b)
    probabilities = torch.from_numpy(arrays["activations"] @ arrays["weights"]).softmax(1).numpy()
    results = {
        "mean": samples.mu,
        "covariance": samples.sigma,
        "distance": frechet_distance(samples, reference),
        "distance of few": frechet_distance(compute_statistics(arrays["few"]), reference),
        "inception score": inception_score(probabilities),
    }
    for kind, half in (("float16", True), ("float32", False)):
        radii = [
            manifold_radii(torch.from_numpy(x), MANIFOLD_NEIGHBOURS, 10_000, half).numpy()
            for x in (a, b)
        ]
        results[f"radii, {kind}"] = np.concatenate(radii)
        results[f"precision, {kind}"], results[f"recall, {kind}"] = precision_recall(
            a, b, fp16=half
        )
    for name in (name for name in arrays if name.startswith("image")):
        image = torch.from_numpy(arrays[name]).permute(0, 3, 1, 2).float()
        small = interpolate_bilinear_2d_like_tensorflow1x(
            image, size=(299, 299), align_corners=False
        )
        results[f"resize of {name}"] = small.permute(0, 2, 3, 1).numpy()
    return results


def compute_adm(
    evaluator: Path, python: Path, arrays: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """By ADM's, and the versions of what it ran on."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "given.npz", Path(folder) / "result.npz"
        np.savez(given, **arrays)
        script = Path(__file__).with_name("adm_original.py")
        subprocess.run([python, script, evaluator, given, result], check=True)
        with np.load(result) as content:
            results = dict(content)
    return results, json.loads(str(results.pop("versions")))


def compare_results(adm: np.ndarray, our: np.ndarray) -> dict[str, float]:
    """Two results, or the means of two arrays, and the largest difference in units of the largest value."""
    adm, our = np.asarray(adm, np.float64), np.asarray(our, np.float64)
    return {
        "adm": adm.mean().item(),
        "ours": our.mean().item(),
        "difference": (abs(adm - our).max() / abs(adm).max()).item(),
    }


def table(result: dict) -> str:
    """Markdown, a row a quantity."""
    rows = [
        f"| {name} | {row['adm']:.10g} | {row['ours']:.10g} | {format(row['difference'], '.1e') if row['difference'] else 0} |"
        for name, row in result["quantities"].items()
    ]
    return "\n".join(
        ["| quantity | ADM | here | relative difference |", "|---|---|---|---|", *rows]
    )


def main() -> None:
    args = parse()
    counts = {"reference": 3000, "samples": 4000, "few": 500, "activations": 7000}
    arrays = make_inputs(counts)
    adm, versions = compute_adm(args.evaluator, args.python, arrays)
    our = compute_ours(arrays)
    report(
        {
            "benchmark": "adm_evaluator",
            "evaluator_sha256": sha256(args.evaluator),
            "machine": describe_machine(torch.device("cpu")),
            "versions": {
                "theirs": versions,
                "ours": {"torch": torch.__version__, "numpy": np.__version__},
            },
            "counts": counts,
            "quantities": {name: compare_results(adm[name], our[name]) for name in adm},
        },
        args.out,
    )


if __name__ == "__main__":
    cli.run(main)
