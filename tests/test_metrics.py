import numpy as np
import pytest
from prdc import compute_prdc
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from evaluations.metrics import Statistics, frechet_distance, inception_score, precision_recall, statistics


def features(n, dims, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, dims)) @ rng.standard_normal((dims, dims)) / dims**0.5 + shift).astype(np.float32)


@pytest.mark.parametrize("dims", [8, 64, 256])
def test_frechet_distance_is_torch_fidelitys(dims):
    a, b = statistics(features(1000, dims, 0)), statistics(features(800, dims, 1, 0.3))
    oracle = fid_statistics_to_metric(a._asdict(), b._asdict(), verbose=False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(oracle, rel=1e-6)


def test_frechet_distance_of_known_gaussians():
    """Diagonal covariances commute: |mu|^2 + sum (s_a - s_b)^2."""
    a = Statistics(np.array([0.0, 1.0]), np.diag([4.0, 9.0]))
    b = Statistics(np.array([3.0, 1.0]), np.diag([1.0, 25.0]))
    assert frechet_distance(a, b) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 5) ** 2, rel=1e-12)


def test_frechet_distance_to_itself_is_zero_even_when_singular():
    for x in (features(500, 32, 0), features(10, 32, 0)):  # fewer images than dimensions: the covariance is singular
        s = statistics(x)
        assert frechet_distance(s, s) == pytest.approx(0, abs=1e-5)
    few, many = statistics(features(10, 32, 0)), statistics(features(500, 32, 1))
    assert frechet_distance(few, many) == pytest.approx(frechet_distance(many, few), rel=1e-6)


def test_statistics_are_unbiased():
    x = features(50, 4, 0).astype(np.float64)
    centred = x - x.sum(0) / 50
    np.testing.assert_allclose(statistics(x).sigma, centred.T @ centred / 49, rtol=1e-12)


@pytest.mark.parametrize("dims", [2, 16])
def test_precision_and_recall_are_prdcs(dims):
    a, b = features(300, dims, 0), features(400, dims, 1, 0.8)
    oracle = compute_prdc(a, b, nearest_k=3)
    assert precision_recall(a, b, block=64) == pytest.approx((oracle["precision"], oracle["recall"]), abs=1e-6)
    assert 0.05 < oracle["precision"] < 0.999  # a case that can tell


def test_a_sample_on_the_boundary_is_inside():
    """ADM compares with <=: the fourth point at distance 1 from the third is covered by the ball of radius 1."""
    reference = np.array([[0.0], [1.0], [2.0], [3.0]])  # radii 3, 2, 2, 3
    samples = np.array([[6.0], [20.0], [40.0], [60.0]])  # 6 lies on the ball of 3, the others outside all
    assert precision_recall(reference, samples)[0] == 0.25


def test_precision_recall_of_a_set_with_itself():
    assert precision_recall(features(50, 4, 0), features(50, 4, 0)) == (1.0, 1.0)


@pytest.mark.parametrize("n", [5000, 10_000])
def test_inception_score_is_torch_fidelitys_over_the_same_chunks(n):
    import torch

    logits = torch.from_numpy(features(n, 20, 0) * 2)
    oracle = isc_features_to_metric(logits, splits=n // 5000, shuffle=False)["inception_score_mean"]
    assert inception_score(logits.softmax(1).numpy()) == pytest.approx(oracle, rel=1e-5)
