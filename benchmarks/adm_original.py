"""The side of benchmarks.adm_evaluator that runs ADM's evaluator, unchanged, in an environment that has TensorFlow.

It needs the feature graph for nothing that is computed from features, so the file of the graph is never opened: what the
Evaluator's methods use is put in place by hand.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import scipy
import tensorflow
import tensorflow.compat.v1 as tf


def load(path: Path):
    """ADM's evaluator.py as a module. Its np.bool left numpy in 1.24 and came back in 2.0."""
    if not hasattr(np, "bool"):
        np.bool = np.bool_
    spec = importlib.util.spec_from_file_location("adm", path)
    adm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(adm)
    return adm


def run(evaluator: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What ADM makes of the arrays, by the names of benchmarks.adm_evaluator.ours."""
    tf.disable_eager_execution()
    adm, session = load(evaluator), tf.Session()
    judge = object.__new__(adm.Evaluator)  # its constructor would fetch the graph
    judge.sess, judge.softmax_batch_size, judge.manifold_estimator = (
        session,
        512,
        adm.ManifoldEstimator(session),
    )
    with session.graph.as_default():
        judge.softmax_input = tf.placeholder(tf.float32, [None, arrays["weights"].shape[0]])
        judge.softmax = tf.nn.softmax(
            tf.matmul(judge.softmax_input, tf.constant(arrays["weights"]))
        )
        pixels = tf.placeholder(tf.float32, [None, None, None, 3])
        small = tf.image.resize_bilinear(pixels, [299, 299], align_corners=False)
    reference, samples, few = (
        judge.compute_statistics(arrays[name]) for name in ("reference", "samples", "few")
    )
    results = {
        "mean": samples.mu,
        "covariance": samples.sigma,
        "distance": samples.frechet_distance(reference),
        "distance of few": few.frechet_distance(reference),
        "inception score": judge.compute_inception_score(arrays["activations"]),
    }
    for kind, scale in (
        ("float16", 1),
        ("float32", arrays["overflow"]),
    ):  # a block that overflows is done in float32
        a, b = (arrays[name] * np.float32(scale) for name in ("reference", "samples"))
        estimator = judge.manifold_estimator
        results[f"radii, {kind}"] = (
            np.concatenate([estimator.manifold_radii(x)[:, 0] for x in (a, b)]) / scale**2
        )
        results[f"precision, {kind}"], results[f"recall, {kind}"] = judge.compute_prec_recall(a, b)
    for name in (name for name in arrays if name.startswith("image")):
        results[f"resize of {name}"] = session.run(small, {pixels: arrays[name].astype(np.float32)})
    return results


if __name__ == "__main__":
    with np.load(sys.argv[2]) as content:
        results = run(Path(sys.argv[1]), dict(content))
    versions = {module.__name__: module.__version__ for module in (tensorflow, np, scipy)}
    np.savez(sys.argv[3], versions=json.dumps(versions), **results)
