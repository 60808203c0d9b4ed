"""Test evaluations.evaluate, evaluations.reference and evaluations.curves."""

import errno
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from common.cli import UserError
from common.metrics_log import read_rows
from evaluations import curves, evaluate, reference, reference_features
from evaluations.compare import compute_metrics, list_metric_names
from evaluations.extractors import iterate_batches
from evaluations.fashion import load_classifier
from evaluations.features import Features
from evaluations.image_batches import NpzFile, NpzImages, open_images
from evaluations.inception import InceptionFeatures
from evaluations.metrics import compute_statistics, frechet_distance
from evaluations.moments import RunningMoments
from evaluations.reference_features import ReferenceFeatures
from evaluations.timm_networks import TimmFeatures, resize_bicubic, resize_position_embedding
from tests.helpers import ROOT, make_tree, run_ranks


def write_samples(path, count=40, seed=0, has_labels=True, side=32):
    """Write random samples in ADM's format and return the images, (count, side, side, 3)."""
    rng = np.random.default_rng(seed)
    arrays = {"arr_0": rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)}
    if has_labels:
        arrays["arr_1"] = np.arange(count) % 10
    np.savez(path, **arrays)
    return arrays["arr_0"]


def to_nchw(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def read_result(path):
    return json.loads(path.read_text())


def read_metrics(path):
    return read_result(path)["metrics"]


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Return a file with He-initialized weights of the Inception network.

    With the default initialization, the activations would vanish, which would hide errors.
    """
    from torch_fidelity import feature_extractor_inceptionv3 as module

    def fail_to_load(*args, **kwargs):
        raise StopIteration

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    network = module.FeatureExtractorInceptionV3.__new__(module.FeatureExtractorInceptionV3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", fail_to_load)
        # The constructor has built all layers when it fails to load weights.
        with pytest.raises((StopIteration, RuntimeError)):
            network.__init__("he", ["2048"])
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), path)
    return path


def test_inception_features_equal_torch_fidelity_and_adms_spatial_features(inception_weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=generator)
    features = InceptionFeatures(inception_weights)(images)
    outputs = ["2048", "logits_unbiased"]
    original = FeatureExtractorInceptionV3("original", outputs, str(inception_weights))
    captured = {}
    original.Mixed_6d.register_forward_pre_hook(lambda module, inputs: captured.update(x=inputs[0]))
    pool, logits = original(images)
    torch.testing.assert_close(features.pool, pool)
    torch.testing.assert_close(features.scores, torch.softmax(logits, 1))
    convolution = original.Mixed_6d.branch1x1
    # This is mixed_6/conv of the graph, (2, 192, 17, 17).
    expected = torch.relu(convolution.bn(convolution.conv(captured["x"])))
    columns = [expected[:, c, y, x] for y in range(17) for x in range(17) for c in range(7)]
    torch.testing.assert_close(features.spatial, torch.stack(columns, 1))
    assert features.spatial.count_nonzero() > 100


def test_inception_metrics_against_images_equal_those_against_their_statistics(
    call, tmp_path, inception_weights
):
    """Equality also checks the features, because the test computes the statistics."""
    write_samples(tmp_path / "s.npz", 6)
    images = write_samples(tmp_path / "r.npz", 5, seed=1)
    flags = [tmp_path / "s.npz", "--inception-weights", inception_weights]
    out = tmp_path / "images.json"
    code, text = call(evaluate, *flags, "--reference", tmp_path / "r.npz", "--out", out)
    assert code == 0
    assert "FID" in text
    assert "FD-fashion" not in text
    image_metrics = read_metrics(out)
    assert image_metrics["inception_score"] >= 1
    assert 0 <= image_metrics["precision"] <= 1

    features = InceptionFeatures(inception_weights)(to_nchw(images))
    mu, sigma = compute_statistics(features.pool.numpy())
    mu_s, sigma_s = compute_statistics(features.spatial.numpy())
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    out = tmp_path / "stats.json"
    assert call(evaluate, *flags, "--reference", tmp_path / "stats.npz", "--out", out)[0] == 0
    statistics_metrics = read_metrics(out)
    for name in ("FID", "sFID"):
        assert image_metrics[name] > 0
        assert statistics_metrics[name] == pytest.approx(image_metrics[name], rel=1e-4)
    assert statistics_metrics["precision"] is None
    assert statistics_metrics["recall"] is None


def test_fashion_metrics_against_a_tree_of_images(call, tmp_path):
    samples = write_samples(tmp_path / "s.npz")
    record = {"solver": "euler", "num_steps": 5, "cfg_scale": 1.5, "global_seed": 3}
    (tmp_path / "s.json").write_text(json.dumps(record | {"class_names": []}))
    tree = make_tree(tmp_path / "tree", images=30)
    code, text = call(evaluate, tmp_path / "s.npz", "--reference", tree, "--features", "fashion")
    assert code == 0
    assert "FD-fashion" in text
    assert "FID" not in text
    result = read_result(tmp_path / "s.metrics.json")
    assert result["sampling"] == record
    assert result["count"] == 40
    assert len(result["reference_sha256"]) == 64
    assert len(result["samples_sha256"]) == 64
    assert "FID" not in result["metrics"]
    classes = load_classifier()(to_nchw(samples)).scores.argmax(1)
    expected = (classes == torch.arange(40) % 10).float().mean().item()
    assert result["metrics"]["class_agreement"] == pytest.approx(expected)


def test_samples_against_themselves_have_perfect_metrics_and_are_evaluated_once(
    call, tmp_path, monkeypatch
):
    samples = tmp_path / "s.npz"
    write_samples(samples, has_labels=False)
    flags = [samples, "--reference", samples, "--features", "fashion"]
    assert call(evaluate, *flags)[0] == 0
    metrics = read_metrics(tmp_path / "s.metrics.json")
    assert metrics["FD-fashion"] == pytest.approx(0, abs=1e-4)
    assert (metrics["precision"], metrics["recall"], metrics["class_agreement"]) == (1, 1, None)
    # The second call reads the stored result and extracts no features.
    monkeypatch.setattr(evaluate, "extract_features", None)
    assert call(evaluate, *flags)[0] == 0


@pytest.mark.parametrize("missing", ["recall", "class_agreement", "FDr", "intervals"])
def test_result_that_a_stored_file_lacks_is_added(call, tmp_path, missing):
    samples = tmp_path / "s.npz"
    write_samples(samples)
    flags = [samples, "--reference", samples, "--features", "fashion"]
    flags += ["--normalisers", "fashion=2"]
    assert call(evaluate, *flags)[0] == 0
    path = tmp_path / "s.metrics.json"
    complete = read_result(path)
    old = json.loads(json.dumps(complete))
    del (old if missing == "intervals" else old["metrics"])[missing]
    old["metrics"]["precision"] = 0.25  # stored values are kept
    path.write_text(json.dumps(old))
    code, text = call(evaluate, *flags)
    assert code == 0 and "precision                      0.250" in text
    expected = complete | {"metrics": complete["metrics"] | {"precision": 0.25}}
    assert read_result(path) == expected


@pytest.mark.parametrize("network", ["inception", "fashion", "dinov2-l", "resnet18"])
def test_names_of_metrics_are_those_that_are_computed(network):
    rng = np.random.default_rng(0)
    features = Features(*rng.random((3, 8, 4), dtype=np.float32))
    statistics = compute_statistics(features.pool)
    reference = ReferenceFeatures(statistics, statistics, features.pool)
    metrics = compute_metrics(features, np.arange(8), reference, network, "cpu")
    assert sorted(metrics) == sorted(list_metric_names(network))


def test_reference_features_are_cached_by_the_content_of_the_reference(call, tmp_path, monkeypatch):
    write_samples(tmp_path / "a.npz")
    write_samples(tmp_path / "b.npz", seed=1)
    write_samples(tmp_path / "r.npz", seed=2)
    samples = tmp_path / "b.npz"
    flags = ["--reference", tmp_path / "r.npz", "--features", "fashion"]
    flags += ["--cache-dir", tmp_path / "cache"]
    assert call(evaluate, tmp_path / "a.npz", *flags)[0] == 0
    (cache_file,) = (tmp_path / "cache").iterdir()

    extractions = []
    extract_features = reference_features.extract_features

    def count_extractions(*args):
        extractions.append(args)
        return extract_features(*args)

    monkeypatch.setattr(reference_features, "extract_features", count_extractions)
    assert call(evaluate, samples, *flags)[0] == 0
    assert len(extractions) == 0

    # The metrics are the same with an empty cache.
    out = tmp_path / "fresh.json"
    assert call(evaluate, samples, *flags, "--cache-dir", tmp_path / "empty", "--out", out)[0] == 0
    assert len(extractions) == 1
    expected = read_metrics(out)
    assert read_metrics(tmp_path / "b.metrics.json") == expected

    # A truncated file is ignored.
    cache_file.write_bytes(cache_file.read_bytes()[:1000])
    (tmp_path / "b.metrics.json").unlink()
    assert call(evaluate, samples, *flags)[0] == 0
    assert len(extractions) == 2
    assert read_metrics(tmp_path / "b.metrics.json") == expected

    # A file with the same name but other images is a different reference.
    write_samples(tmp_path / "r.npz", seed=3)
    out = tmp_path / "other.json"
    assert call(evaluate, samples, *flags, "--out", out)[0] == 0
    assert len(extractions) == 3
    assert read_metrics(out) != expected


def test_references_of_symbolic_links_are_identified_by_the_linked_images(call, tmp_path):
    write_samples(tmp_path / "s.npz")
    distances = []
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(write_samples(tmp_path / "r.npz", count=8, seed=seed)):
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
        links = tmp_path / f"links-{name}"
        links.mkdir()
        (links / "class").symlink_to(tmp_path / name)
        (tmp_path / name / "loop").symlink_to(tmp_path / name)
        out = tmp_path / f"{name}.json"
        flags = ["--reference", links, "--features", "fashion", "--out", out]
        assert call(evaluate, tmp_path / "s.npz", *flags)[0] == 0
        distances.append(read_metrics(out)["FD-fashion"])
    assert distances[0] != distances[1]


def test_results_of_another_evaluation_are_not_overwritten(call, tmp_path):
    write_samples(tmp_path / "s.npz")
    write_samples(tmp_path / "a.npz", seed=1)
    write_samples(tmp_path / "b.npz", seed=2)
    notes = tmp_path / "notes.json"
    flags = [tmp_path / "s.npz", "--features", "fashion", "--reference"]
    assert call(evaluate, *flags, tmp_path / "a.npz")[0] == 0
    code, text = call(evaluate, *flags, tmp_path / "b.npz")
    assert code == 2
    assert "another evaluation (reference_sha256 differ)" in text
    notes.write_text('{"mine": 1}')
    code, text = call(evaluate, *flags, tmp_path / "b.npz", "--out", notes)
    assert code == 2
    assert "is not a metrics.json" in text
    assert "mine" in notes.read_text()
    # If the samples change, they are evaluated, and the new result replaces the old result.
    write_samples(tmp_path / "s.npz", seed=3)
    assert call(evaluate, *flags, tmp_path / "a.npz")[0] == 0


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file/metrics.json", "error: Not a directory (file); choose another path"),
        ("new.json", "error: Read-only file system (new.json); choose another path"),
    ],
)
def test_unwritable_output_is_reported_before_the_evaluation(
    call, tmp_path, monkeypatch, out, message
):
    def fail_to_create(path, *args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate.EvaluationSuite, "load_reference", None)  # must not be called
    (tmp_path / "file").touch()
    write_samples(tmp_path / "s.npz")
    monkeypatch.setattr(Path, "touch", fail_to_create)
    flags = ["s.npz", "--features", "fashion", "--reference", "s.npz"]
    code, printed = call(evaluate, *flags, "--out", out)
    assert code == 2 and message in printed and len(printed.splitlines()) == 1
    code, printed = call(reference, "--images", "s.npz", "--resolution", 32, "--out", "r.npz")
    assert code == 2 and "error: Read-only file system (r.npz)" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "s.npz"]


def test_samples_in_other_formats_are_converted_as_documented(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = write_samples(tmp_path / "expected.npz", count=5)
    np.save("samples.npy", images)
    (tmp_path / "samples").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(f"samples/{i:06d}.png")
    shutil.make_archive("samples", "zip", "samples")
    snippet = re.search(
        r"```python\n(.*?)```", (ROOT / "docs/evaluation.md").read_text(), re.DOTALL
    )
    for name in ("samples", "samples.npy", "samples.zip"):
        code, out = call(evaluate, name, "--reference", "expected.npz")
        assert code == 2 and f"error: {name} is not an .npz in ADM's format: convert it" in out
    for name in ("samples", "samples.npy"):
        exec(snippet[1].replace('"samples"', f'"{name}"'))
        converted = NpzImages(tmp_path / "samples.npz", "samples")
        np.testing.assert_array_equal(converted.read_rows(0, 5), images)
        (tmp_path / "samples.npz").unlink()


def test_two_processes_compute_the_same_result_as_one(call, tmp_path):
    write_samples(tmp_path / "s.npz", count=300)
    write_samples(tmp_path / "r.npz", count=130, seed=1)
    cache = tmp_path / "cache"
    flags = [tmp_path / "s.npz", "--reference", tmp_path / "r.npz", "--features", "fashion"]
    flags += ["--batch-size", 16, "--cache-dir", cache, "--out"]
    run_ranks(2, "evaluations.evaluate", *flags, tmp_path / "two.json")
    shutil.rmtree(cache)
    assert call(evaluate, *flags, tmp_path / "one.json")[0] == 0
    result = read_result(tmp_path / "one.json")
    assert result["metrics"] == read_metrics(tmp_path / "two.json")
    low, high = result["intervals"]["FD-fashion"]
    assert low < result["metrics"]["FD-fashion"] < high
    assert result["by_count"] == {}  # the smallest subset has 500 samples
    assert result["reference_name"] is None
    assert len(result["features"]["fashion"]) == 64


def test_compressed_and_uncompressed_npz_give_the_same_images(tmp_path):
    images = write_samples(tmp_path / "plain.npz", count=50)
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=images)
    plain = NpzImages(tmp_path / "plain.npz", "samples")
    compressed = NpzImages(tmp_path / "compressed.npz", "samples")
    assert plain.file is not None
    assert compressed.file is None
    # Several threads read images in any order, as in sample_ddp.py.
    indices = [i % 50 for i in range(0, 2000, 7)]
    with ThreadPoolExecutor(4) as pool:
        rows = pool.map(lambda i: compressed.read_rows(i, i + 1)[0], indices)
        assert all(np.array_equal(row, images[i]) for row, i in zip(rows, indices))
    for start, stop in ((0, 8), (8, 16), (40, 56), (4, 9)):
        expected = images[start:stop].transpose(0, 3, 1, 2)
        assert np.array_equal(plain.read_batch(start, stop), expected)
        assert np.array_equal(compressed.read_batch(start, stop), expected)


def test_npz_truncated_while_it_is_read_is_reported(tmp_path):
    write_samples(tmp_path / "s.npz", count=50)
    images = NpzImages(tmp_path / "s.npz", "samples")
    os.truncate(tmp_path / "s.npz", 40_000)
    images.read_rows(0, 8)
    with pytest.raises(UserError, match=r"s\.npz is damaged .*truncated after it was opened"):
        images.read_rows(8, 16)


def test_encrypted_npz_is_reported(tmp_path):
    write_samples(tmp_path / "s.npz", count=5)
    content = bytearray((tmp_path / "s.npz").read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1  # flag of encrypted members
    (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"s\.npz is damaged .*encrypted"):
        NpzImages(tmp_path / "s.npz", "samples")


def test_reference_command_writes_statistics_of_all_images_and_a_subset_of_images(
    call, tmp_path, inception_weights
):
    make_tree(tmp_path / "tree", images=9, side=40)
    flags = ["--images", tmp_path / "tree", "--resolution", 32, "--out", tmp_path / "r.npz"]
    flags += ["--keep-images", 5, "--inception-weights", inception_weights, "--batch-size", 4]
    code, text = call(reference, *flags)
    assert code == 0, text
    assert "statistics of 9 images, 5 of them stored" in text
    source = open_images(tmp_path / "tree", 32, "--images")
    features = InceptionFeatures(inception_weights)(torch.from_numpy(source.read_batch(0, 9)))
    with np.load(tmp_path / "r.npz") as content:
        for suffix, output in (("", features.pool), ("_s", features.spatial)):
            mu = output.numpy().mean(0)
            sigma = np.cov(output.numpy(), rowvar=False)
            np.testing.assert_allclose(content[f"mu{suffix}"], mu, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(content[f"sigma{suffix}"], sigma, rtol=1e-2, atol=1e-5)
        stored = [source.read_batch(i, i + 1) for i in (0, 2, 4, 6, 8)]
        expected = np.concatenate(stored).transpose(0, 2, 3, 1)
        assert np.array_equal(content["arr_0"], expected)
    assert call(reference, *flags)[0] == 2  # an existing file is not overwritten


def test_reference_command_rejects_too_few_images_to_store(call, tmp_path):
    flags = ["--images", tmp_path, "--resolution", 32, "--out", tmp_path / "r.npz"]
    code, text = call(reference, *flags, "--keep-images", 2)
    assert code == 2
    assert "precision and recall need more than 3; pass 0 to store no images" in text


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (np.zeros(128), np.eye(128), "finite statistics of 2048 features; their shapes are"),
        (np.full(2048, np.nan), np.eye(2048), "some values are not finite"),
    ],
)
def test_statistics_with_wrong_shapes_or_values_are_rejected(tmp_path, mu, sigma, message):
    np.savez(tmp_path / "s.npz", mu=mu, sigma=sigma)
    with pytest.raises(UserError, match=message):
        reference_features.read_statistics(NpzFile(tmp_path / "s.npz", "--reference"), "", 2048)


def make_covariance(change=0.0):
    """Return a covariance of 8 features, and add `change` to the element (0, 7)."""
    sigma = np.cov(np.random.default_rng(0).normal(size=(20, 8)), rowvar=False)
    sigma[0, 7] += change
    return sigma


def read_small_statistics(path, **arrays):
    """Write statistics of 8 features to an .npz, and read them."""
    np.savez(path, **arrays)
    return reference_features.read_statistics(NpzFile(path, "--reference"), "", 8)


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (np.zeros(8), -np.eye(8), "sigma is not positive semi-definite"),
        (np.zeros(8), np.diag([1.0] * 7 + [-0.01]), "sigma is not positive semi-definite"),
        (np.zeros(8), np.triu(make_covariance()), "sigma is not symmetric"),
        (np.zeros(8), make_covariance(change=0.01), "sigma is not symmetric"),
        (np.zeros(8), make_covariance() + 1j, "data types are float64 and complex128"),
        (np.zeros(8), np.eye(8, dtype=bool), "data types are float64 and bool"),
        (np.full(8, "1.0"), np.eye(8), "data types are <U3 and float64"),
        (np.zeros(8), None, "contains only one of mu and sigma"),
        (None, np.eye(8), "contains only one of mu and sigma"),
    ],
)
def test_matrices_that_are_no_covariance_are_rejected(tmp_path, mu, sigma, message):
    arrays = {"mu": mu, "sigma": sigma}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(UserError, match=message):
        read_small_statistics(tmp_path / "s.npz", **arrays)


@pytest.mark.parametrize(
    "sigma",
    [
        make_covariance(),
        make_covariance().astype(np.float32),
        make_covariance(change=1e-7),
        np.ones((8, 8)),
        np.zeros((8, 8)),
        np.eye(8, dtype=int),
        np.cov(np.random.default_rng(0).normal(size=(3, 8)), rowvar=False).astype(np.float32),
    ],
)
def test_covariances_with_rounding_errors_are_accepted(tmp_path, sigma):
    statistics = read_small_statistics(tmp_path / "s.npz", mu=np.zeros(8), sigma=sigma)
    np.testing.assert_array_equal(statistics.sigma, sigma)
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-6)


def test_merged_moments_equal_the_moments_of_all_features():
    rng = np.random.default_rng(0)
    # With a mean of 1000, a formula with sums of squares would lose six digits.
    features = (rng.normal(size=(100, 7)) + 1000).astype(np.float32)
    sequential = RunningMoments()
    merged = RunningMoments()
    other = RunningMoments()
    empty = RunningMoments()  # the moments of a process that has read no batch
    for i, batch in enumerate(np.split(features, [1, 20, 64])):
        sequential.add(torch.from_numpy(batch))
        (merged, other)[i % 2].add(torch.from_numpy(batch))
    merged.merge(other)
    merged.merge(empty)
    x = features.astype(float)
    for moments in (sequential, merged):
        mu, sigma = moments.compute_statistics()
        np.testing.assert_allclose(mu, x.mean(0), rtol=1e-14)
        np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), rtol=1e-11, atol=1e-12)


def test_several_networks_are_evaluated_in_one_pass_over_the_images(call, tmp_path, monkeypatch):
    torch.manual_seed(0)
    weights = tmp_path / "w.pth"
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    write_samples(tmp_path / "s.npz", 8)
    write_samples(tmp_path / "r.npz", 9, seed=1)
    reads = []
    read_batch = NpzImages.read_batch

    def count_reads(*args):
        reads.append(args)
        return read_batch(*args)

    monkeypatch.setattr(NpzImages, "read_batch", count_reads)
    flags = [tmp_path / "s.npz", "--reference", tmp_path / "r.npz", "--encoder-weights", weights]
    flags += ["--features", "fashion", "test_vit"]
    flags += ["--normalisers", "test_vit=0.5", "fashion=2"]
    code, text = call(evaluate, *flags)
    assert code == 0, text
    assert len(reads) == 2  # samples and reference, one batch each
    metrics = read_metrics(tmp_path / "s.metrics.json")
    expected = (metrics["FD-test_vit"] / 0.5 + metrics["FD-fashion"] / 2) / 2
    assert metrics["FDr"] == pytest.approx(expected)
    assert 0 <= metrics["precision-test_vit"] <= 1

    network = TimmFeatures("test_vit", weights)
    statistics = []
    for name in ("s", "r"):
        with np.load(tmp_path / f"{name}.npz") as content:
            features = network(to_nchw(content["arr_0"])).pool
        statistics.append(compute_statistics(features.numpy()))
    assert metrics["FD-test_vit"] == pytest.approx(frechet_distance(*statistics))


@pytest.mark.parametrize("side", [64, 112])
def test_resize_equals_pil_within_one_grey_level(side):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 90, 70), dtype=torch.uint8, generator=generator)
    pil_image = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    # First the width: Pillow 13 would resize the height of this image first.
    expected = pil_image.resize((side, 90), Image.Resampling.BICUBIC)
    expected = expected.resize((side, side), Image.Resampling.BICUBIC)
    resized = resize_bicubic(image, side)[0].permute(1, 2, 0).numpy()
    difference = np.abs(resized - np.asarray(expected, float))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_resize_leaves_images_of_the_right_size_unchanged():
    image = torch.randint(0, 256, (1, 3, 70, 70), dtype=torch.uint8)
    assert torch.equal(resize_bicubic(image, 70), image.float())


def test_dinov2_position_embedding_is_scaled_by_the_published_factor():
    """Bicubic interpolation keeps a linear ramp almost linear, which reveals the sampled positions.

    The output at patch i of 16 is its position among the 37 patches, to within 0.05 because of
    torch's kernel. With a factor of 16 / 37, the last positions would deviate by 0.2.
    """
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, depth=1)
    ramp = torch.arange(37.0).repeat(37)
    with torch.no_grad():
        network.pos_embed[0, 0] = 7
        network.pos_embed[0, 1:, 0] = ramp
    resize_position_embedding(network, 224)
    assert network.pos_embed.shape == (1, 257, 384)
    assert network.pos_embed[0, 0, 0] == 7
    expected = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    positions = network.pos_embed[0, 1:17, 0]
    torch.testing.assert_close(positions[1:-1], expected[1:-1], atol=0.06, rtol=0)
    assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 384)


def flip_bit(path, array):
    """Flip a bit in the middle of an array of an uncompressed .npz."""
    member = NpzFile(path, "").members[array]
    content = bytearray(path.read_bytes())
    content[member.header_offset + member.file_size // 2 + 128] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def unusable_inputs(tmp_path_factory):
    """Return a folder with valid samples, s.npz, and with files that cannot be evaluated."""
    folder = tmp_path_factory.mktemp("unusable")
    uint8_images = np.zeros((5, 32, 32, 3), np.uint8)
    write_samples(folder / "s.npz")
    write_samples(folder / "large.npz", side=64)
    write_samples(folder / "few.npz", count=3)
    np.savez(folder / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(folder / "float.npz", arr_0=np.zeros((9, 32, 32, 3)))
    np.savez(folder / "onehot.npz", arr_0=uint8_images, arr_1=np.zeros((5, 10)))
    np.savez(folder / "fortran.npz", arr_0=np.asfortranarray(uint8_images))
    np.savez(folder / "named.npz", images=uint8_images)
    np.savez(folder / "other.npz", x=np.zeros(3))
    (folder / "broken.npz").write_bytes(b"PK")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (50, 32, 32, 3), np.uint8)
    np.savez_compressed(folder / "damaged.npz", arr_0=noise)
    content = bytearray((folder / "damaged.npz").read_bytes())
    content[5000:5100] = bytes(100)
    (folder / "damaged.npz").write_bytes(content)
    for name, labels in (
        ("strings", np.full(40, "7")),
        ("nan", np.where(np.arange(40) == 3, np.nan, 1.0)),
        ("fractions", np.arange(40) % 10 + 0.5),
        ("from_one", np.arange(40) % 10 + 1),
        ("negative", np.arange(40) % 10 - 1),
    ):
        np.savez(folder / f"{name}.npz", arr_0=noise[:40], arr_1=labels)
    write_samples(folder / "flipped_bit.npz")
    flip_bit(folder / "flipped_bit.npz", "arr_0")
    write_samples(folder / "flipped_label.npz")
    flip_bit(folder / "flipped_label.npz", "arr_1")
    torch.save({"a": print}, folder / "pickle.pth")
    torch.save({"a": torch.zeros(1)}, folder / "other.pth")
    make_tree(folder / "tree", images=6)
    (folder / "tree/class1/001.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "s.npz --reference s.npz",
            r"no Inception weights: fetch https://.*save it as .*hub/checkpoints/",
        ),
        (
            "s.npz --reference s.npz --inception-weights pickle.pth",
            "is not a file of plain tensors",
        ),
        (
            "s.npz --reference s.npz --inception-weights other.pth",
            r"other\.pth is not weights-inception",
        ),
        (
            "s.npz --features fashion --reference large.npz",
            "contains 40 images of 64x64: use more than 3 images of 32x32",
        ),
        (
            "onehot.npz --features fashion --reference s.npz",
            "arr_1 must contain the classes of 5 images",
        ),
        ("fortran.npz --features fashion --reference s.npz", "in Fortran order"),
        ("damaged.npz --features fashion --reference s.npz", r"damaged\.npz is damaged"),
        ("flipped_bit.npz --features fashion --reference s.npz", "Bad CRC-32 for file 'arr_0.npy'"),
        ("s.npz --features fashion --reference flipped_bit.npz", "Bad CRC-32 for file 'arr_0.npy'"),
        (
            "flipped_label.npz --features fashion --reference s.npz",
            "Bad CRC-32 for file 'arr_1.npy'",
        ),
        (
            "strings.npz --features fashion --reference s.npz",
            "arr_1 must contain the classes of 40 images, but it contains <U1 values",
        ),
        ("nan.npz --features fashion --reference s.npz", "float64 values that are not integers"),
        ("fractions.npz --features fashion --reference s.npz", "values that are not integers"),
        ("from_one.npz --features fashion --reference s.npz", "arr_1 has labels from 1 to 10"),
        ("negative.npz --features fashion --reference s.npz", "arr_1 has labels from -1 to 8"),
        ("named.npz --reference s.npz", "contains no array arr_0; it contains images"),
        ("stats.npz --features fashion --reference s.npz", "contains no array arr_0"),
        ("float.npz --features fashion --reference s.npz", "must be uint8"),
        ("broken.npz --features fashion --reference s.npz", r"damaged or is not an \.npz"),
        ("none.npz --reference s.npz", "none.npz does not exist"),
        (
            "s.npz --features fashion --reference none.npz",
            "--reference none.npz does not exist",
        ),
        ("s.npz --features fashion --reference other.npz", "contains neither images"),
        ("s.npz --features fashion --reference stats.npz", "contains Inception statistics"),
        (
            "large.npz --features fashion --reference s.npz",
            "needs 32x32 images, found 64x64 in the samples",
        ),
        ("s.npz --features fashion --reference few.npz", "--reference few.npz contains 3 images"),
        (
            "s.npz --features fashion --reference tree",
            r"--reference tree: class1/001\.png ",
        ),
        (
            "s.npz --features dinov2-x --reference s.npz",
            r"--features dinov2-x .*dinov2-[bgls]",
        ),
        (
            "s.npz --features test_vit --reference s.npz",
            "--features .*test_vit .*hf download",
        ),
        ("s.npz --features fashion fashion --reference s.npz", "pass each name only once"),
        (
            "s.npz --features fashion --normalisers x=1 --reference s.npz",
            "--normalisers x requires the network x",
        ),
        ("s.npz --normalisers x=0 --reference s.npz", "x=0 is not of the form NAME=FD"),
        (
            "s.npz --features fashion --encoder-weights s.npz --reference s.npz",
            "--features contains 0: pass exactly one timm network",
        ),
    ],
)
def test_user_errors_are_one_line(call, unusable_inputs, monkeypatch, flags, message):
    monkeypatch.setenv("TORCH_HOME", str(unusable_inputs / "hub"))
    monkeypatch.chdir(unusable_inputs)
    code, text = call(evaluate, *flags.split())
    assert code == 2
    assert re.search(message, text), text
    assert "Traceback" not in text
    assert not list(unusable_inputs.glob("*metrics.json"))


def test_damaged_images_are_an_error_when_one_process_reads_them(unusable_inputs):
    images = NpzImages(unusable_inputs / "flipped_bit.npz", "--eval-reference")
    with pytest.raises(UserError, match="Bad CRC-32 for file 'arr_0"):
        next(iterate_batches(images, 8, "reference"))


def test_curves_of_several_runs_are_plotted(call, trained, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def record_and_save(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record_and_save)
    other = shutil.copytree(trained, tmp_path / "other")
    code, text = call(curves, trained, other, "--out", tmp_path / "c.png")
    assert code == 0, text
    assert (tmp_path / "c.png").stat().st_size > 10_000
    (figure,) = figures
    rows = read_rows(trained)
    for axes, key in zip(figure.axes, ("denoising", "align/sra2", "grad_norm"), strict=True):
        assert [line.get_label() for line in axes.lines] == ["trained", "other"]
        for line in axes.lines:
            assert list(line.get_xdata()) == [row["images"] for row in rows]
            assert list(line.get_ydata()) == [row[key] for row in rows]


def test_curves_of_evaluations_add_a_panel(call, trained, tmp_path):
    evaluated_run = shutil.copytree(trained, tmp_path / "evaluated")
    with (evaluated_run / "metrics.jsonl").open("a") as file:
        for images, distance in ((8, 5.0), (16, 4.0)):
            # Rows have the format of --eval-every.
            row = {"step": 1, "images": images, "FD-fashion": distance}
            file.write(json.dumps(row | {"evaluation": {"ema_decay": 0.9}}) + "\n")
    assert call(curves, trained, trained, "--out", tmp_path / "c.png")[0] == 0
    assert call(curves, trained, evaluated_run, "--out", tmp_path / "e.png")[0] == 0
    width = Image.open(tmp_path / "c.png").width
    assert Image.open(tmp_path / "e.png").width > 1.3 * width
