"""The numbers against other people's code, and against what they are by definition."""

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from pytorch_fid.fid_score import calculate_frechet_distance
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from evaluations import metrics
from evaluations.metrics import (
    Statistics,
    compute_statistics,
    frechet_distance,
    frechet_interval,
    inception_score,
    influence,
    precision_recall,
)


def features(n, dims, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((n, dims)) @ rng.standard_normal((dims, dims)) / dims**0.5 + shift
    ).astype(np.float32)


@pytest.mark.parametrize("dims", [8, 64, 256])
def test_frechet_distance_is_torch_fidelitys_and_pytorch_fids(dims):
    a, b = (
        compute_statistics(features(1000, dims, 0)),
        compute_statistics(features(800, dims, 1, 0.3)),
    )
    oracle = fid_statistics_to_metric(a._asdict(), b._asdict(), verbose=False)[
        "frechet_inception_distance"
    ]
    assert frechet_distance(a, b) == pytest.approx(oracle, rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(calculate_frechet_distance(*a, *b), rel=1e-6)


def test_frechet_distance_of_known_gaussians():
    """Diagonal covariances commute: |mu|^2 + sum (s_a - s_b)^2."""
    a = Statistics(np.array([0.0, 1.0]), np.diag([4.0, 9.0]))
    b = Statistics(np.array([3.0, 1.0]), np.diag([1.0, 25.0]))
    assert frechet_distance(a, b) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 5) ** 2, rel=1e-12)


@pytest.mark.parametrize("n, m", [(30, 200), (200, 30), (30, 40), (70, 200), (200, 90)])
def test_frechet_distance_of_few_images_needs_no_square_root_at_all(n, m):
    """The trace of (S_a S_b)^(1/2) is the sum of the singular values of A B^T, with A^T A = S_a and B^T B = S_b: centred rows
    will do. Below 64 images the covariance of 64 features is singular."""
    a, b = features(n, 64, 0), features(m, 64, 1, 0.1)
    centred = [
        (x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a.astype(np.float64), b.astype(np.float64))
    ]
    trace = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    shift = a.astype(np.float64).mean(0) - b.astype(np.float64).mean(0)
    expected = shift @ shift + sum((x**2).sum() for x in centred) - 2 * trace
    assert frechet_distance(compute_statistics(a), compute_statistics(b)) == pytest.approx(
        expected, rel=1e-11
    )


def test_frechet_distance_to_itself_is_zero_even_when_singular():
    for x in (
        features(500, 32, 0),
        features(10, 32, 0),
    ):  # fewer images than dimensions: the covariance is singular
        s = compute_statistics(x)
        assert frechet_distance(s, s) == pytest.approx(0, abs=1e-12)
    nothing = Statistics(np.zeros(3), np.zeros((3, 3)))
    assert frechet_distance(nothing, nothing) == 0


def test_statistics_are_unbiased():
    x = features(50, 4, 0).astype(np.float64)
    centred = x - x.sum(0) / 50
    np.testing.assert_allclose(compute_statistics(x).sigma, centred.T @ centred / 49, rtol=1e-12)


def test_statistics_are_numpys_and_never_hold_all_features_twice():
    class Rows:
        """Features that cannot be had whole."""

        shape = property(lambda self: x.shape)

        def __getitem__(self, rows):
            assert rows.stop - rows.start <= metrics.ROWS
            return x[rows]

    x = features(
        2 * metrics.ROWS + 5, 6, 0, shift=50
    )  # far from 0, where one pass would lose digits
    mu, sigma = compute_statistics(Rows())
    np.testing.assert_allclose(mu, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), rtol=1e-12)


def test_the_influence_is_the_derivative_by_the_weights():
    """By autograd, through the Frechet distance of weighted rows written out."""
    x, reference = features(60, 5, 0), compute_statistics(features(90, 5, 1, 0.4))
    rows, mu_r, sigma_r = (torch.tensor(v, dtype=torch.float64) for v in (x, *reference))
    weights = torch.full((60,), 1 / 60, dtype=torch.float64, requires_grad=True)
    shares = weights / weights.sum()
    mu = shares @ rows
    sigma = (shares[:, None] * (rows - mu)).T @ (rows - mu) * 60 / 59
    root = torch.linalg.cholesky(sigma_r)
    trace = torch.linalg.eigvalsh(root.T @ sigma @ root).sqrt().sum()
    distance = (mu - mu_r).square().sum() + sigma.trace() + sigma_r.trace() - 2 * trace
    assert distance.item() == pytest.approx(
        frechet_distance(compute_statistics(x), reference), rel=1e-12
    )
    distance.backward()
    np.testing.assert_allclose(
        influence(x, compute_statistics(x), reference), weights.grad.numpy(), rtol=1e-9, atol=1e-12
    )


def test_the_interval_is_as_wide_as_resampling_itself_and_as_fresh_draws():
    """Widths and not places: a resampled distance is too large once more."""
    n, draws = 1500, 300
    x, reference = features(n, 4, 0), compute_statistics(features(5000, 4, 1, 0.4))
    low, high = frechet_interval(x, reference, replicates=2000)
    assert low < frechet_distance(compute_statistics(x), reference) < high
    rng, mix = np.random.default_rng(5), np.random.default_rng(0)
    mix.standard_normal((n, 4))
    mix = mix.standard_normal((4, 4)) / 2  # what features(n, 4, 0) multiplies by
    resampled = [
        frechet_distance(compute_statistics(x[rng.integers(n, size=n)]), reference)
        for _ in range(draws)
    ]
    fresh = [
        frechet_distance(compute_statistics(rng.standard_normal((n, 4)) @ mix), reference)
        for _ in range(draws)
    ]
    for distances in (resampled, fresh):
        assert (high - low) / (2 * 1.96) == pytest.approx(np.std(distances), rel=0.15)
    narrow = frechet_interval(x, reference, level=0.5, replicates=2000)
    assert (narrow[1] - narrow[0]) / (high - low) == pytest.approx(0.6745 / 1.96, rel=0.1)
    assert frechet_interval(x, reference, seed=3) == frechet_interval(
        x, reference, seed=3, own=compute_statistics(x)
    )


def test_there_is_no_interval_where_the_covariance_is_singular():
    reference = compute_statistics(features(50, 16, 1))
    assert frechet_interval(features(16, 16, 0), reference) is None
    assert frechet_interval(features(17, 16, 0), reference) is not None
    twice = np.tile(
        features(200, 8, 0), 2
    )  # features that repeat others, or never fire, make it singular at any n
    low, high = frechet_interval(twice, reference)
    assert low < frechet_distance(compute_statistics(twice), reference) < high < 2 * low


@pytest.mark.parametrize("dims", [2, 16])
def test_precision_and_recall_are_prdcs_and_torch_fidelitys(dims):
    a, b = features(300, dims, 0), features(400, dims, 1, 0.8)
    oracle = compute_prdc(a, b, nearest_k=3)
    assert precision_recall(a, b, tile_size=64) == (oracle["precision"], oracle["recall"])
    other = prc_features_to_metric(torch.from_numpy(b), torch.from_numpy(a), verbose=False)
    assert precision_recall(a, b) == pytest.approx(
        (other["precision"], other["recall"]), abs=1e-6
    )  # its means are float32
    assert all(0.03 < oracle[key] < 0.97 for key in ("precision", "recall"))  # a case that can tell


def test_a_sample_on_the_boundary_is_inside():
    """ADM compares with <=: the fourth point at distance 1 from the third is covered by the ball of radius 1."""
    reference = np.array([[0.0], [1.0], [2.0], [3.0]])  # radii 3, 2, 2, 3
    samples = np.array(
        [[6.0], [20.0], [40.0], [60.0]]
    )  # 6 lies on the ball of 3, the others outside all
    assert precision_recall(reference, samples)[0] == 0.25


def test_precision_recall_of_a_set_with_itself():
    assert precision_recall(features(50, 4, 0), features(50, 4, 0)) == (1.0, 1.0)


def test_precision_recall_wants_neighbours():
    with pytest.raises(ValueError, match="3 and 50 features have no 3 neighbours"):
        precision_recall(features(3, 4, 0), features(50, 4, 0))


def half_distances(a, b):
    """ADM's formula by numpy: every intermediate result rounded to float16."""
    a, b = a.astype(np.float16), b.astype(np.float16)
    norms = [np.square(x).astype(np.float32).sum(1).astype(np.float16) for x in (a, b)]
    products = (a.astype(np.float32) @ b.astype(np.float32).T).astype(np.float16)
    return np.maximum(
        norms[0][:, None] - np.float16(2) * products + norms[1], np.float16(0)
    ).astype(np.float32)


def test_half_rounds_every_distance_to_float16():
    a, b = features(120, 16, 0, 5), features(150, 16, 1, 5.4)  # far from 0, where float16 is coarse
    radii = [np.sort(half_distances(x, x), 1)[:, 3] for x in (a, b)]
    distances = half_distances(a, b)
    expected = (distances <= radii[0][:, None]).any(0).mean(), (distances <= radii[1]).any(1).mean()
    assert precision_recall(a, b, fp16=True) == expected
    assert expected != precision_recall(a, b)


def test_half_falls_back_to_float32_for_a_block_that_overflows():
    a, b = features(120, 16, 0, 5), features(150, 16, 1, 5.4)  # far from 0, where float16 is coarse
    assert precision_recall(100 * a, 100 * b, fp16=True) == precision_recall(
        100 * a, 100 * b
    )  # every block of this
    far = np.concatenate([b, np.full((1, 16), 300, np.float32)])  # the last row overflows, alone
    share = 150 / 151  # of the samples: it is in a block by itself
    assert precision_recall(a, far, fp16=True, tile_size=150)[0] == pytest.approx(
        precision_recall(a, b, fp16=True)[0] * share
    )
    assert (
        precision_recall(a, far, fp16=True)[1]
        != precision_recall(a, far, fp16=True, tile_size=150)[1]
    )


def test_blocks_change_nothing():
    a, b = features(97, 8, 0), features(130, 8, 1, 0.8)
    assert len({precision_recall(a, b, tile_size=block) for block in (2, 7, 97, None)}) == 1


@pytest.mark.parametrize("n", [5000, 10_000])
def test_inception_score_is_torch_fidelitys_over_the_same_chunks(n):
    logits = torch.from_numpy(features(n, 20, 0) * 2)
    oracle = isc_features_to_metric(logits, splits=n // 5000, shuffle=False)["inception_score_mean"]
    assert inception_score(logits.softmax(1).numpy()) == pytest.approx(oracle, rel=1e-5)


def test_a_last_chunk_that_is_not_full_counts_like_the_others():
    p = torch.from_numpy(features(700, 20, 0) * 2).softmax(1).numpy()
    assert inception_score(p, 500) == pytest.approx(
        (inception_score(p[:500]) + inception_score(p[500:])) / 2, rel=1e-12
    )


def test_certain_and_balanced_classes_score_their_number():
    assert inception_score(np.eye(10, dtype=np.float32)) == pytest.approx(10, rel=1e-12)


def test_no_tf32_holds_for_the_time_being():
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = True
        with pytest.raises(RuntimeError), metrics.no_tf32():
            assert [switch.allow_tf32 for switch in switches] == [False, False]
            raise RuntimeError
        assert [switch.allow_tf32 for switch in switches] == [True, True]
    finally:
        for switch, allowed in zip(switches, before):
            switch.allow_tf32 = allowed
