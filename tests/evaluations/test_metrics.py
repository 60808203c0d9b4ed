"""Compare the metrics with other implementations and with their definitions."""

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
    frechet_influence,
    frechet_interval,
    inception_score,
    precision_recall,
)


def make_features(n, dims, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, dims)) @ rng.standard_normal((dims, dims)) / dims**0.5
    return (features + shift).astype(np.float32)


@pytest.mark.parametrize("dims", [8, 64, 256])
def test_frechet_distance_equals_torch_fidelity_and_pytorch_fid(dims):
    a = compute_statistics(make_features(1000, dims, 0))
    b = compute_statistics(make_features(800, dims, 1, 0.3))
    result = fid_statistics_to_metric(a._asdict(), b._asdict(), verbose=False)
    expected = result["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(calculate_frechet_distance(*a, *b), rel=1e-6)


def test_frechet_distance_of_gaussians_with_diagonal_covariances():
    """Diagonal covariances commute, so the distance is |mu|^2 + sum (s_a - s_b)^2."""
    a = Statistics(np.array([0.0, 1.0]), np.diag([4.0, 9.0]))
    b = Statistics(np.array([3.0, 1.0]), np.diag([1.0, 25.0]))
    assert frechet_distance(a, b) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 5) ** 2, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(30, 200), (200, 30), (30, 40), (70, 200), (200, 90)])
def test_frechet_distance_of_few_images_equals_a_formula_without_matrix_square_roots(n, m):
    """tr (S_a S_b)^(1/2) is the sum of the singular values of A B^T.

    A and B are the centred and scaled rows, so that A^T A = S_a and B^T B = S_b. The covariance of
    64 features is singular for up to 64 images.
    """
    a = make_features(n, 64, 0).astype(np.float64)
    b = make_features(m, 64, 1, 0.1).astype(np.float64)
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b)]
    trace = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    shift = a.mean(0) - b.mean(0)
    expected = shift @ shift + sum((x**2).sum() for x in centred) - 2 * trace
    a_statistics = compute_statistics(make_features(n, 64, 0))
    b_statistics = compute_statistics(make_features(m, 64, 1, 0.1))
    assert frechet_distance(a_statistics, b_statistics) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("n", [500, 10])
def test_frechet_distance_of_features_to_themselves_is_zero(n):
    """The covariance of 10 images is singular."""
    statistics = compute_statistics(make_features(n, 32, 0))
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_of_constant_features_is_zero():
    constant = Statistics(np.zeros(3), np.zeros((3, 3)))
    assert frechet_distance(constant, constant) == 0


def test_covariance_is_unbiased():
    x = make_features(50, 4, 0).astype(np.float64)
    centred = x - x.sum(0) / 50
    expected = centred.T @ centred / 49
    np.testing.assert_allclose(compute_statistics(x).sigma, expected, rtol=1e-12)


def test_statistics_equal_numpy_and_read_a_few_rows_at_a_time():
    # With a mean far from 0, a formula with a single pass would lose digits.
    x = make_features(2 * metrics.ROWS + 5, 6, 0, shift=50)

    class LimitedRows:
        """Features that can be read at most ROWS rows at a time."""

        shape = x.shape

        def __getitem__(self, rows):
            assert rows.stop - rows.start <= metrics.ROWS
            return x[rows]

    mu, sigma = compute_statistics(LimitedRows())
    np.testing.assert_allclose(mu, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), rtol=1e-12)


def test_influence_is_the_derivative_with_respect_to_row_weights():
    """Compare with autograd through the Frechet distance of weighted rows."""
    x = make_features(60, 5, 0)
    reference = compute_statistics(make_features(90, 5, 1, 0.4))
    rows, mu_r, sigma_r = (torch.tensor(v, dtype=torch.float64) for v in (x, *reference))
    weights = torch.full((60,), 1 / 60, dtype=torch.float64, requires_grad=True)
    shares = weights / weights.sum()
    mu = shares @ rows
    sigma = (shares[:, None] * (rows - mu)).T @ (rows - mu) * 60 / 59
    root = torch.linalg.cholesky(sigma_r)
    trace = torch.linalg.eigvalsh(root.T @ sigma @ root).sqrt().sum()
    distance = (mu - mu_r).square().sum() + sigma.trace() + sigma_r.trace() - 2 * trace
    statistics = compute_statistics(x)
    assert distance.item() == pytest.approx(frechet_distance(statistics, reference), rel=1e-12)
    distance.backward()
    influence = frechet_influence(x, statistics, reference)
    np.testing.assert_allclose(influence, weights.grad.numpy(), rtol=1e-9, atol=1e-12)


def test_distances_and_intervals_are_never_negative():
    """The distance of equal statistics is a difference of equal sums with rounding errors."""
    for seed in range(20):
        x = make_features(400, 16, seed) * 100
        statistics = compute_statistics(x)
        distance = frechet_distance(statistics, statistics)
        assert distance == pytest.approx(0, abs=1e-6)
        assert not f"{distance:.3f}".startswith("-")
        assert not any(f"{end:.3f}".startswith("-") for end in frechet_interval(x, statistics))


def test_interval_width_equals_the_spread_of_resampled_and_of_new_samples():
    """Only widths are compared, because resampling adds the bias of finitely many images again."""
    n, draws = 1500, 300
    x = make_features(n, 4, 0)
    reference = compute_statistics(make_features(5000, 4, 1, 0.4))
    low, high = frechet_interval(x, reference, replicates=2000)
    assert low < frechet_distance(compute_statistics(x), reference) < high

    rng = np.random.default_rng(5)
    matrix_rng = np.random.default_rng(0)
    matrix_rng.standard_normal((n, 4))
    matrix = matrix_rng.standard_normal((4, 4)) / 2  # as in make_features(n, 4, 0)
    resampled = [x[rng.integers(n, size=n)] for _ in range(draws)]
    new_samples = [rng.standard_normal((n, 4)) @ matrix for _ in range(draws)]
    for sets in (resampled, new_samples):
        distances = [frechet_distance(compute_statistics(s), reference) for s in sets]
        assert (high - low) / (2 * 1.96) == pytest.approx(np.std(distances), rel=0.15)
    narrow = frechet_interval(x, reference, level=0.5, replicates=2000)
    assert (narrow[1] - narrow[0]) / (high - low) == pytest.approx(0.6745 / 1.96, rel=0.1)


def test_interval_is_none_unless_there_are_more_images_than_features():
    reference = compute_statistics(make_features(50, 16, 1))
    assert frechet_interval(make_features(16, 16, 0), reference) is None
    assert frechet_interval(make_features(17, 16, 0), reference) is not None


def test_interval_of_linearly_dependent_features_contains_the_distance():
    """Features that repeat others, or are constant, make the covariance singular for any n."""
    reference = compute_statistics(make_features(50, 16, 1))
    x = np.tile(make_features(200, 8, 0), 2)
    low, high = frechet_interval(x, reference)
    assert low < frechet_distance(compute_statistics(x), reference) < high < 2 * low


@pytest.mark.parametrize("dims", [2, 16])
def test_precision_and_recall_equal_prdc_and_torch_fidelity(dims):
    a = make_features(300, dims, 0)
    b = make_features(400, dims, 1, 0.8)
    expected = compute_prdc(a, b, nearest_k=3)
    # If the values were near 0 or 1, wrong implementations could agree.
    assert all(0.03 < expected[key] < 0.97 for key in ("precision", "recall"))
    assert precision_recall(a, b, tile_size=64) == (expected["precision"], expected["recall"])
    other = prc_features_to_metric(torch.from_numpy(b), torch.from_numpy(a), verbose=False)
    # torch-fidelity computes the fractions in float32.
    assert precision_recall(a, b).precision == pytest.approx(other["precision"], abs=1e-6)
    assert precision_recall(a, b).recall == pytest.approx(other["recall"], abs=1e-6)


def test_sample_on_the_boundary_of_a_ball_is_inside():
    """ADM compares with <=. The sample at 6 is on the boundary of the ball around 3."""
    reference = np.array([[0.0], [1.0], [2.0], [3.0]])  # radii 3, 2, 2, 3
    samples = np.array([[6.0], [20.0], [40.0], [60.0]])
    assert precision_recall(reference, samples).precision == 0.25


def test_precision_and_recall_of_a_set_with_itself_are_one():
    assert precision_recall(make_features(50, 4, 0), make_features(50, 4, 0)) == (1.0, 1.0)


def test_precision_and_recall_need_more_than_three_features():
    with pytest.raises(ValueError, match="3 and 50 features are too few for 3 nearest neighbours"):
        precision_recall(make_features(3, 4, 0), make_features(50, 4, 0))


def compute_fp16_distances(a, b):
    """Compute ADM's formula in NumPy, with every intermediate result rounded to float16."""
    a, b = a.astype(np.float16), b.astype(np.float16)
    norms = [np.square(x).astype(np.float32).sum(1).astype(np.float16) for x in (a, b)]
    products = (a.astype(np.float32) @ b.astype(np.float32).T).astype(np.float16)
    distances = norms[0][:, None] - np.float16(2) * products + norms[1]
    return np.maximum(distances, np.float16(0)).astype(np.float32)


@pytest.fixture
def coarse_features():
    """Return two sets of features far from 0, where float16 is coarse."""
    return make_features(120, 16, 0, 5), make_features(150, 16, 1, 5.4)


def test_fp16_rounds_every_distance_to_float16(coarse_features):
    a, b = coarse_features
    radii = [np.sort(compute_fp16_distances(x, x), 1)[:, 3] for x in (a, b)]
    distances = compute_fp16_distances(a, b)
    precision = (distances <= radii[0][:, None]).any(0).mean()
    recall = (distances <= radii[1]).any(1).mean()
    assert precision_recall(a, b, fp16=True) == (precision, recall)
    assert precision_recall(a, b) != (precision, recall)


def test_fp16_falls_back_to_float32_for_a_tile_that_overflows(coarse_features):
    a, b = coarse_features
    # In this case, every tile overflows.
    assert precision_recall(100 * a, 100 * b, fp16=True) == precision_recall(100 * a, 100 * b)
    # In this case, only the last row overflows. It is the only row of the last tile of 150 rows.
    far = np.concatenate([b, np.full((1, 16), 300, np.float32)])
    small_tiles = precision_recall(a, far, fp16=True, tile_size=150)
    without_far = precision_recall(a, b, fp16=True)
    assert small_tiles.precision == pytest.approx(without_far.precision * 150 / 151)
    assert precision_recall(a, far, fp16=True).recall != small_tiles.recall


def test_tile_size_does_not_change_precision_and_recall():
    a, b = make_features(97, 8, 0), make_features(130, 8, 1, 0.8)
    assert len({precision_recall(a, b, tile_size=size) for size in (2, 7, 97, None)}) == 1


@pytest.mark.parametrize("n", [5000, 10_000])
def test_inception_score_equals_torch_fidelity_without_shuffling(n):
    logits = torch.from_numpy(make_features(n, 20, 0) * 2)
    result = isc_features_to_metric(logits, splits=n // 5000, shuffle=False)
    expected = result["inception_score_mean"]
    assert inception_score(logits.softmax(1).numpy()) == pytest.approx(expected, rel=1e-5)


def test_inception_score_weights_all_splits_equally_including_a_partial_one():
    p = torch.from_numpy(make_features(700, 20, 0) * 2).softmax(1).numpy()
    expected = (inception_score(p[:500]) + inception_score(p[500:])) / 2
    assert inception_score(p, 500) == pytest.approx(expected, rel=1e-12)


def test_inception_score_of_one_hot_balanced_predictions_is_number_of_classes():
    assert inception_score(np.eye(10, dtype=np.float32)) == pytest.approx(10, rel=1e-12)
