r"""Compare the results of ADM's evaluator with those of this repository for the same features.

    python -m venv adm && adm/bin/pip install tensorflow-cpu scipy requests tqdm
    python -m benchmarks.adm_evaluator --evaluator guided-diffusion/evaluations/evaluator.py \
        --python adm/bin/python

The features are synthetic clusters with the dimension of Inception features, clipped at 0.
benchmarks/adm_original.py runs ADM's evaluator in a separate environment with TensorFlow. Inputs
and results are exchanged as .npz files.
"""

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from benchmarks.measure import describe_machine, write_result
from common import cli
from common.files import sha256
from evaluations.metrics import (
    ADM_TILE_SIZE,
    MANIFOLD_NEIGHBOURS,
    compute_statistics,
    frechet_distance,
    inception_score,
    manifold_radii,
    precision_recall,
)

# The squared distances of features that are multiplied by this factor overflow float16, so that
# ADM's evaluator uses float32. A product with a power of two is exact in float32.
OVERFLOW = 128

# Sets of features: name, scale, index of the first cluster, and index after the last cluster.
FEATURE_SETS = (
    ("reference", 0.5, 0, 48),
    ("samples", 0.4, 12, 64),
    ("few", 0.4, 12, 64),
    ("activations", 0.5, 0, 64),
)

# Quantities that have other names in the table than in the JSON file.
QUANTITY_LABELS = {"distance of few": "distance, few samples"} | {
    f"resize of image {size}": f"resize of a {size}-pixel image" for size in (32, 256, 512)
}


def draw_features(
    rng: np.random.Generator, count: int, scale: float, clusters: np.ndarray, width: int
) -> np.ndarray:
    """Draw features, (count, width) float32: cluster centres plus noise, clipped at 0.

    Args:
        rng: Random number generator.
        count: Number of images.
        scale: Standard deviation along a few directions. All clusters have the same directions.
        clusters: Indices of the clusters to draw from.
        width: Number of features per image.
    """
    directions = np.random.default_rng(1).standard_normal((12, width)) / 4
    centres = np.random.default_rng(2).standard_normal((64, width)) / 3
    values = 0.3 + centres[rng.choice(clusters, count)]
    values = values + scale * rng.standard_normal((count, 12)) @ directions
    return np.maximum(values + 0.03 * rng.standard_normal((count, width)), 0).astype(np.float32)


def make_inputs(
    counts: dict[str, int], width: int = 2048, classes: int = 1008
) -> dict[str, np.ndarray]:
    """Return the inputs of both evaluators, by name.

    Args:
        counts: Number of images in the sets reference, samples, few and activations.
        width: Number of features per image.
        classes: Number of classes for the Inception score.
    """
    rng = np.random.default_rng(0)
    arrays = {
        name: draw_features(rng, counts[name], scale, np.arange(first, end), width)
        for name, scale, first, end in FEATURE_SETS
    }
    weights = rng.standard_normal((width, classes)) * 4 / width**0.5
    arrays |= {"weights": weights.astype(np.float32), "overflow": np.array(OVERFLOW)}
    for size in (32, 256, 512):
        arrays[f"image {size}"] = rng.integers(0, 256, (1, size, size, 3), np.uint8)
    return arrays


def compute_repository_results(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray | float]:
    """Compute the results of this repository, by name."""
    a = arrays["reference"]
    b = arrays["samples"]
    reference = compute_statistics(a)
    samples = compute_statistics(b)
    probabilities = torch.from_numpy(arrays["activations"] @ arrays["weights"]).softmax(1).numpy()
    results: dict[str, np.ndarray | float] = {
        "mean": samples.mu,
        "covariance": samples.sigma,
        "distance": frechet_distance(samples, reference),
        "distance of few": frechet_distance(compute_statistics(arrays["few"]), reference),
        "inception score": inception_score(probabilities),
    }
    for dtype, fp16 in (("float16", True), ("float32", False)):
        radii = [
            manifold_radii(torch.from_numpy(x), MANIFOLD_NEIGHBOURS, ADM_TILE_SIZE, fp16).numpy()
            for x in (a, b)
        ]
        precision, recall = precision_recall(a, b, fp16=fp16)
        results[f"radii, {dtype}"] = np.concatenate(radii)
        results[f"precision, {dtype}"] = precision
        results[f"recall, {dtype}"] = recall
    for name in [key for key in arrays if key.startswith("image")]:
        image = torch.from_numpy(arrays[name]).permute(0, 3, 1, 2).float()
        resized = interpolate_bilinear_2d_like_tensorflow1x(
            image, size=(299, 299), align_corners=False
        )
        results[f"resize of {name}"] = resized.permute(0, 2, 3, 1).numpy()
    return results


def compute_adm_results(
    evaluator: Path, python: Path, arrays: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Compute the results of ADM's evaluator.

    Args:
        evaluator: Path of ADM's evaluator.py.
        python: Python interpreter in an environment with TensorFlow.
        arrays: The inputs of both evaluators, by name.

    Returns:
        The results by name, and the versions of the libraries.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        outputs = Path(folder) / "outputs.npz"
        np.savez(inputs, **arrays)  # type: ignore[arg-type]  # the stub allows only allow_pickle
        script = Path(__file__).with_name("adm_original.py")
        subprocess.run([python, script, evaluator, inputs, outputs], check=True)
        with np.load(outputs) as content:
            results = dict(content)
    return results, json.loads(str(results.pop("versions")))


def compare_results(adm: np.ndarray | float, ours: np.ndarray | float) -> dict[str, float]:
    """Compare two results, which are numbers or arrays of the same shape.

    Returns:
        adm: Mean of ADM's result.
        ours: Mean of the result of this repository.
        difference: Largest absolute difference, relative to the largest absolute value of ADM.
    """
    adm = np.asarray(adm, np.float64)
    ours = np.asarray(ours, np.float64)
    return {
        "adm": adm.mean().item(),
        "ours": ours.mean().item(),
        "difference": (abs(adm - ours).max() / abs(adm).max()).item(),
    }


def format_table(result: dict) -> str:
    """Return the result as a Markdown table with one row per quantity."""
    lines = ["| quantity | ADM | this repository | relative difference |", "|---|---|---|---|"]
    for name, row in result["quantities"].items():
        difference = f"{row['difference']:.1e}" if row["difference"] else "0"
        label = QUANTITY_LABELS.get(name, name)
        lines.append(f"| {label} | {row['adm']:.10g} | {row['ours']:.10g} | {difference} |")
    return "\n".join(lines)


def main() -> None:
    """Run the comparison."""
    parser = cli.Parser(
        __doc__, "python -m benchmarks.adm_evaluator", "--evaluator FILE --python FILE"
    )
    parser.add_argument(
        "--evaluator",
        type=Path,
        required=True,
        help="evaluations/evaluator.py from openai/guided-diffusion",
    )
    parser.add_argument(
        "--python",
        type=Path,
        required=True,
        help="Python interpreter with tensorflow, scipy, requests and tqdm",
    )
    parser.add_argument("--out", type=Path, help="file for the result")
    args = parser.parse_args()

    counts = {"reference": 3000, "samples": 4000, "few": 500, "activations": 7000}
    arrays = make_inputs(counts)
    adm, adm_versions = compute_adm_results(args.evaluator, args.python, arrays)
    ours = compute_repository_results(arrays)
    write_result(
        {
            "benchmark": "adm_evaluator",
            "evaluator_sha256": sha256(args.evaluator),
            "machine": describe_machine(torch.device("cpu")),
            "versions": {
                "theirs": adm_versions,
                "ours": {"torch": torch.__version__, "numpy": np.__version__},
            },
            "counts": counts,
            "quantities": {name: compare_results(adm[name], ours[name]) for name in adm},
        },
        args.out,
    )


if __name__ == "__main__":
    cli.run(main)
