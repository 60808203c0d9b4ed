"""Run ADM's unmodified evaluator in an environment that has TensorFlow.

benchmarks/adm_evaluator.py starts this script as `adm_original.py EVALUATOR INPUTS OUTPUTS`. The
script computes metrics from features. It bypasses the constructor of Evaluator, which would load
the feature network, and sets the attributes that the methods of Evaluator use.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import scipy
import tensorflow
import tensorflow.compat.v1 as tf


def load_evaluator(path: Path) -> ModuleType:
    """Import ADM's evaluator.py."""
    if not hasattr(np, "bool"):  # the file uses np.bool, which numpy 1.24 to 1.26 lacks
        np.bool = np.bool_  # type: ignore[misc]  # the stubs describe numpy 2
    spec = importlib.util.spec_from_file_location("adm", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compute_results(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Compute ADM's results, by name.

    The names are those of benchmarks.adm_evaluator.compute_repository_results.

    Args:
        path: Path of ADM's evaluator.py.
        arrays: Inputs from benchmarks.adm_evaluator.make_inputs, by name.
    """
    tf.disable_eager_execution()
    adm = load_evaluator(path)
    session = tf.Session()
    evaluator = object.__new__(adm.Evaluator)  # the constructor would download the feature network
    evaluator.sess = session
    evaluator.softmax_batch_size = 512
    evaluator.manifold_estimator = adm.ManifoldEstimator(session)
    with session.graph.as_default():
        weights = tf.constant(arrays["weights"])
        evaluator.softmax_input = tf.placeholder(tf.float32, [None, len(arrays["weights"])])
        evaluator.softmax = tf.nn.softmax(tf.matmul(evaluator.softmax_input, weights))
        image = tf.placeholder(tf.float32, [None, None, None, 3])
        resized = tf.image.resize_bilinear(image, [299, 299], align_corners=False)

    reference, samples, few = (
        evaluator.compute_statistics(arrays[name]) for name in ("reference", "samples", "few")
    )
    results = {
        "mean": samples.mu,
        "covariance": samples.sigma,
        "distance": samples.frechet_distance(reference),
        "distance of few": few.frechet_distance(reference),
        "inception score": evaluator.compute_inception_score(arrays["activations"]),
    }
    # ADM computes distances in float16, and recomputes blocks in float32 if they overflow.
    for dtype, scale in (("float16", 1), ("float32", arrays["overflow"])):
        a, b = (arrays[name] * np.float32(scale) for name in ("reference", "samples"))
        radii = [evaluator.manifold_estimator.manifold_radii(x)[:, 0] for x in (a, b)]
        precision, recall = evaluator.compute_prec_recall(a, b)
        results[f"radii, {dtype}"] = np.concatenate(radii) / scale**2
        results[f"precision, {dtype}"] = precision
        results[f"recall, {dtype}"] = recall
    for name in [key for key in arrays if key.startswith("image")]:
        pixels = arrays[name].astype(np.float32)
        results[f"resize of {name}"] = session.run(resized, {image: pixels})
    return results


if __name__ == "__main__":
    evaluator_path, inputs, outputs = map(Path, sys.argv[1:])
    with np.load(inputs) as content:
        results = compute_results(evaluator_path, dict(content))
    versions = {module.__name__: module.__version__ for module in (tensorflow, np, scipy)}
    np.savez(outputs, versions=json.dumps(versions), **results)
