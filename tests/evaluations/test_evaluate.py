import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import UserError
from evaluations import curves, evaluate, reference, reference_features
from evaluations.fashion import load_classifier
from evaluations.image_batches import NpzFile, NpzImages, open_images
from evaluations.inception import InceptionFeatures
from evaluations.metrics import compute_statistics, frechet_distance
from evaluations.moments import Moments
from evaluations.timm_networks import TimmFeatures, resize, resize_positions
from tests.helpers import ROOT, make_tree, run_ranks

IMAGES = ROOT / "assets/fashion-mnist/images.zip"


def write_samples(path, n=40, seed=0, labels=True, side=32):
    rng = np.random.default_rng(seed)
    arrays = {"arr_0": rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)}
    if labels:
        arrays["arr_1"] = np.arange(n) % 10
    np.savez(path, **arrays)
    return arrays["arr_0"]


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """The real graph with He-initialised weights: the default initialisation collapses and would hide faults."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    load = module.load_state_dict_from_url
    module.load_state_dict_from_url = lambda *args, **kwargs: (_ for _ in ()).throw(StopIteration)
    network = module.FeatureExtractorInceptionV3.__new__(module.FeatureExtractorInceptionV3)
    try:
        network.__init__("he", ["2048"])
    except (StopIteration, RuntimeError):
        pass
    finally:
        module.load_state_dict_from_url = load
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), path)
    return path


def test_inception_features_are_torch_fidelitys_with_adms_spatial_tap(inception_weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = torch.randint(
        0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pool, spatial, probabilities = InceptionFeatures(inception_weights)(images)
    oracle = FeatureExtractorInceptionV3(
        "oracle", ["2048", "logits_unbiased"], str(inception_weights)
    )
    kept = {}
    oracle.Mixed_6d.register_forward_pre_hook(lambda module, inputs: kept.update(x=inputs[0]))
    features, logits = oracle(images)
    torch.testing.assert_close(pool, features)
    torch.testing.assert_close(probabilities, torch.softmax(logits, 1))
    conv = oracle.Mixed_6d.branch1x1
    by_hand = torch.relu(conv.bn(conv.conv(kept["x"])))  # mixed_6/conv, 17 x 17 x 192
    expected = [
        by_hand[:, c, y, x] for y in range(17) for x in range(17) for c in range(7)
    ]  # NHWC: the channel runs fastest
    torch.testing.assert_close(spatial, torch.stack(expected, 1))
    assert spatial.count_nonzero() > 100


def test_inception_metrics_against_images_and_against_statistics(call, tmp_path, inception_weights):
    """The statistics are made here from the network's features, so equal numbers check the features of both sets too."""
    write_samples(tmp_path / "s.npz", 6)
    others = write_samples(tmp_path / "r.npz", 5, seed=1)
    flags = [tmp_path / "s.npz", "--inception-weights", inception_weights]
    code, out = call(
        evaluate, *flags, "--reference", tmp_path / "r.npz", "--out", tmp_path / "images.json"
    )
    assert code == 0 and "FID" in out and "FD-fashion" not in out
    numbers = json.loads((tmp_path / "images.json").read_text())["metrics"]
    assert numbers["inception_score"] >= 1 and 0 <= numbers["precision"] <= 1

    pool, spatial, _ = (
        x.numpy()
        for x in InceptionFeatures(inception_weights)(torch.from_numpy(others).permute(0, 3, 1, 2))
    )
    (mu, sigma), (mu_s, sigma_s) = compute_statistics(pool), compute_statistics(spatial)
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    assert (
        call(
            evaluate,
            *flags,
            "--reference",
            tmp_path / "stats.npz",
            "--out",
            tmp_path / "stats.json",
        )[0]
        == 0
    )
    again = json.loads((tmp_path / "stats.json").read_text())["metrics"]
    assert numbers["FID"] > 0 and again["FID"] == pytest.approx(numbers["FID"], rel=1e-4)
    assert numbers["sFID"] > 0 and again["sFID"] == pytest.approx(numbers["sFID"], rel=1e-4)
    assert again["precision"] is None and again["recall"] is None


def test_fashion_against_a_tree_of_images(call, tmp_path):
    samples = write_samples(tmp_path / "s.npz")
    record = {"solver": "euler", "num_steps": 5, "cfg_scale": 1.5, "global_seed": 3}
    (tmp_path / "s.json").write_text(json.dumps(record | {"class_names": []}))
    reference = make_tree(tmp_path / "tree", images=30)
    code, out = call(
        evaluate, tmp_path / "s.npz", "--reference", reference, "--features", "fashion"
    )
    assert code == 0 and "FD-fashion" in out and "FID" not in out
    result = json.loads((tmp_path / "s.metrics.json").read_text())
    assert result["sampling"] == record
    assert (result["count"], len(result["reference_sha256"]), len(result["samples_sha256"])) == (
        40,
        64,
        64,
    )
    assert "FID" not in result["metrics"]
    scores = load_classifier()(torch.from_numpy(samples).permute(0, 3, 1, 2))[1].argmax(1)
    assert result["metrics"]["class_agreement"] == pytest.approx(
        (scores == torch.arange(40) % 10).float().mean().item()
    )


def test_samples_against_themselves(call, tmp_path, monkeypatch):
    write_samples(tmp_path / "s.npz", labels=False)
    assert (
        call(
            evaluate, tmp_path / "s.npz", "--reference", tmp_path / "s.npz", "--features", "fashion"
        )[0]
        == 0
    )
    metrics = json.loads((tmp_path / "s.metrics.json").read_text())["metrics"]
    assert metrics["FD-fashion"] == pytest.approx(0, abs=1e-4)
    monkeypatch.setattr(
        evaluate, "extract_all", None
    )  # the same samples and reference again: nothing is done twice
    assert (
        call(
            evaluate, tmp_path / "s.npz", "--reference", tmp_path / "s.npz", "--features", "fashion"
        )[0]
        == 0
    )
    assert (metrics["precision"], metrics["recall"], metrics["class_agreement"]) == (1, 1, None)


def metrics(path):
    return json.loads(path.read_text())["metrics"]


def test_a_reference_is_looked_at_once(call, tmp_path, monkeypatch):
    write_samples(tmp_path / "a.npz")
    write_samples(tmp_path / "b.npz", seed=1)
    write_samples(tmp_path / "r.npz", seed=2)
    flags = [
        "--reference",
        tmp_path / "r.npz",
        "--features",
        "fashion",
        "--cache-dir",
        tmp_path / "cache",
    ]
    assert call(evaluate, tmp_path / "a.npz", *flags)[0] == 0
    (kept,) = (tmp_path / "cache").iterdir()
    looked = []
    extract_all = reference_features.extract_all
    monkeypatch.setattr(
        reference_features, "extract_all", lambda *args: looked.append(1) or extract_all(*args)
    )
    assert call(evaluate, tmp_path / "b.npz", *flags)[0] == 0 and not looked
    fresh = ["--cache-dir", tmp_path / "other", "--out", tmp_path / "fresh.json"]
    assert call(evaluate, tmp_path / "b.npz", *flags, *fresh)[0] == 0 and len(looked) == 1
    assert metrics(tmp_path / "b.metrics.json") == metrics(tmp_path / "fresh.json")
    kept.write_bytes(kept.read_bytes()[:1000])  # half a file is no file
    (tmp_path / "b.metrics.json").unlink()
    assert call(evaluate, tmp_path / "b.npz", *flags)[0] == 0 and len(looked) == 2
    assert metrics(tmp_path / "b.metrics.json") == metrics(tmp_path / "fresh.json")
    write_samples(
        tmp_path / "r.npz", seed=3
    )  # other images under the same name are another reference
    assert (
        call(evaluate, tmp_path / "b.npz", *flags, "--out", tmp_path / "o.json")[0] == 0
        and len(looked) == 3
    )
    assert metrics(tmp_path / "o.json") != metrics(tmp_path / "fresh.json")


def test_a_folder_of_links_is_what_they_lead_to(call, tmp_path):
    """Its hash, by which features are kept, sees through links; two such folders are two references."""
    write_samples(tmp_path / "s.npz")
    numbers = []
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(write_samples(tmp_path / "r.npz", n=8, seed=seed)):
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
        (tmp_path / f"links-{name}").mkdir()
        (tmp_path / f"links-{name}" / "class").symlink_to(tmp_path / name)
        (tmp_path / name / "loop").symlink_to(tmp_path / name)
        out = tmp_path / f"{name}.json"
        flags = ["--reference", tmp_path / f"links-{name}", "--features", "fashion", "--out", out]
        assert call(evaluate, tmp_path / "s.npz", *flags)[0] == 0
        numbers.append(metrics(out)["FD-fashion"])
    assert numbers[0] != numbers[1]


def test_numbers_of_another_evaluation_are_not_written_over(call, tmp_path):
    write_samples(tmp_path / "s.npz")
    write_samples(tmp_path / "a.npz", seed=1)
    write_samples(tmp_path / "b.npz", seed=2)
    flags = [tmp_path / "s.npz", "--features", "fashion", "--reference"]
    assert call(evaluate, *flags, tmp_path / "a.npz")[0] == 0
    code, out = call(evaluate, *flags, tmp_path / "b.npz")
    assert code == 2 and "another evaluation (reference_sha256 differ)" in out
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    code, out = call(evaluate, *flags, tmp_path / "b.npz", "--out", tmp_path / "notes.json")
    assert (
        code == 2
        and "is no metrics.json" in out
        and "mine" in (tmp_path / "notes.json").read_text()
    )
    write_samples(tmp_path / "s.npz", seed=3)  # other samples in their place are measured anew
    assert call(evaluate, *flags, tmp_path / "a.npz")[0] == 0


def test_two_processes_measure_what_one_does(call, tmp_path):
    write_samples(tmp_path / "s.npz", n=300)
    write_samples(tmp_path / "r.npz", n=130, seed=1)
    flags = [
        tmp_path / "s.npz",
        "--reference",
        tmp_path / "r.npz",
        "--features",
        "fashion",
        "--batch-size",
        16,
    ]
    flags += ["--cache-dir", tmp_path / "none", "--out"]
    run_ranks(2, "evaluations.evaluate", *flags, tmp_path / "two.json")
    shutil.rmtree(tmp_path / "none")
    assert call(evaluate, *flags, tmp_path / "one.json")[0] == 0
    assert metrics(tmp_path / "one.json") == metrics(tmp_path / "two.json")
    result = json.loads((tmp_path / "one.json").read_text())
    low, high = result["intervals"]["FD-fashion"]
    assert low < result["metrics"]["FD-fashion"] < high
    assert list(result["by_count"]) == []  # of fewer than 500 there is none to tell
    assert result["reference_name"] is None and len(result["features"]["fashion"]) == 64


def test_a_packed_npz_is_read_like_a_plain_one(tmp_path):
    images = write_samples(tmp_path / "plain.npz", n=50)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images)
    plain, packed = (
        NpzFile(tmp_path / f"{name}.npz", "samples").open_images() for name in ("plain", "packed")
    )
    assert plain.map is not None and packed.map is None
    with ThreadPoolExecutor(4) as pool:  # as sample_ddp.py reads it
        parts = pool.map(
            lambda k: packed.read_rows(k, k + 1)[0], [i % 50 for i in range(0, 2000, 7)]
        )
        assert all(
            np.array_equal(part, images[i % 50]) for part, i in zip(parts, range(0, 2000, 7))
        )
    for start, stop in ((0, 8), (8, 16), (40, 56), (4, 9)):
        expected = images[start:stop].transpose(0, 3, 1, 2)
        assert np.array_equal(plain.read_batch(start, stop), expected) and np.array_equal(
            packed.read_batch(start, stop), expected
        )


def test_a_reference_in_adms_format_is_of_all_images(call, tmp_path, inception_weights):
    make_tree(tmp_path / "tree", images=9, side=40)
    common = ["--inception-weights", inception_weights, "--batch-size", 4]
    made = [
        "--images",
        tmp_path / "tree",
        "--resolution",
        32,
        "--out",
        tmp_path / "r.npz",
        "--keep-images",
        5,
        *common,
    ]
    code, out = call(reference, *made)
    assert code == 0 and "statistics of 9 images, 5 of them kept" in out, out
    source = open_images(tmp_path / "tree", 32, "--images")
    pool, spatial, _ = (
        x.numpy()
        for x in InceptionFeatures(inception_weights)(torch.from_numpy(source.read_batch(0, 9)))
    )
    with np.load(tmp_path / "r.npz") as content:
        for key, features in (("", pool), ("_s", spatial)):
            np.testing.assert_allclose(content[f"mu{key}"], features.mean(0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(
                content[f"sigma{key}"], np.cov(features, rowvar=False), rtol=1e-2, atol=1e-5
            )
        kept = np.concatenate([source.read_batch(i, i + 1) for i in (0, 2, 4, 6, 8)]).transpose(
            0, 2, 3, 1
        )
        assert np.array_equal(content["arr_0"], kept)
    assert call(reference, *made)[0] == 2  # nothing is overwritten
    code, out = call(reference, *made, "--out", tmp_path / "few.npz", "--keep-images", 2)
    assert code == 2 and "precision and recall need more than 3; 0 keeps none" in out


def test_statistics_that_cannot_be_inceptions_are_refused(tmp_path):
    cases = [
        ({"mu": np.zeros(128), "sigma": np.eye(128)}, "of 2048 features; they are"),
        ({"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "some are not"),
    ]
    for arrays, message in cases:
        np.savez(tmp_path / "s.npz", **arrays)
        with pytest.raises(UserError, match=message):
            reference_features._adms(NpzFile(tmp_path / "s.npz", "--reference"))


def test_moments_are_those_of_all_batches():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(100, 7)) + 1000).astype(
        np.float32
    )  # sums of squares would lose six digits
    whole, parts = Moments(), [Moments(), Moments(), Moments()]
    for i, batch in enumerate(np.split(features, [1, 20, 64])):
        whole.add(torch.from_numpy(batch))
        parts[i % 2].add(torch.from_numpy(batch))
    for part in parts[1:]:  # the last has seen nothing, as on the last of many processes
        parts[0].merge(part)
    for moments in (whole, parts[0]):
        mu, sigma = moments.statistics()
        np.testing.assert_allclose(mu, features.astype(float).mean(0), rtol=1e-14)
        np.testing.assert_allclose(
            sigma, np.cov(features.astype(float), rowvar=False), rtol=1e-11, atol=1e-12
        )


def test_networks_of_timm_have_their_own_distance_over_one_reading(call, tmp_path, monkeypatch):
    import timm

    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    write_samples(tmp_path / "s.npz", 8)
    write_samples(tmp_path / "r.npz", 9, seed=1)
    flags = [
        tmp_path / "s.npz",
        "--reference",
        tmp_path / "r.npz",
        "--encoder-weights",
        tmp_path / "w.pth",
    ]
    read = []
    batch = NpzImages.read_batch
    monkeypatch.setattr(NpzImages, "read_batch", lambda *args: read.append(args[1]) or batch(*args))
    more = ["--features", "fashion", "test_vit", "--normalisers", "test_vit=0.5", "fashion=2"]
    code, out = call(evaluate, *flags, *more)
    assert code == 0, out
    assert len(read) == 2  # samples and reference, once each
    numbers = metrics(tmp_path / "s.metrics.json")
    assert numbers["FDr"] == pytest.approx(
        (numbers["FD-test_vit"] / 0.5 + numbers["FD-fashion"] / 2) / 2
    )
    assert 0 <= numbers["precision-test_vit"] <= 1
    encoder = TimmFeatures("test_vit", tmp_path / "w.pth")
    features = []
    for name in ("s", "r"):
        with np.load(tmp_path / f"{name}.npz") as content:
            features.append(
                encoder(torch.from_numpy(content["arr_0"]).permute(0, 3, 1, 2))[0].numpy()
            )
    assert numbers["FD-test_vit"] == pytest.approx(
        frechet_distance(*map(compute_statistics, features))
    )


def test_images_are_resized_for_an_encoder_as_pil_does():
    image = torch.randint(
        0, 256, (1, 3, 90, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for side in (64, 112):
        expected = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        ours = resize(image, side)[0].permute(1, 2, 0).numpy()
        difference = np.abs(ours - np.asarray(expected, float))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    assert torch.equal(resize(image[..., :70, :], 70), image[..., :70, :].float())


def test_dinov2_positions_are_stretched_by_its_own_factor():
    """Bicubic interpolation leaves a straight line almost straight: where patch i of 16 lies among 37 can be read off it, to
    0.05 (torch's kernel), where a factor of 16 / 37 would be 0.2 away at the end."""
    import timm

    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, depth=1)
    column = torch.arange(37.0).repeat(37)
    with torch.no_grad():
        network.pos_embed[0, 0], network.pos_embed[0, 1:, 0] = 7, column
    resize_positions(network, 224)
    assert network.pos_embed.shape == (1, 257, 384) and network.pos_embed[0, 0, 0] == 7
    expected = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    torch.testing.assert_close(
        network.pos_embed[0, 1:17, 0][1:-1], expected[1:-1], atol=0.06, rtol=0
    )
    assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 384)


def test_mistakes_end_in_one_line(call, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    write_samples(tmp_path / "s.npz")
    write_samples(tmp_path / "large.npz", side=64)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((9, 32, 32, 3)))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    (tmp_path / "broken.npz").write_bytes(b"PK")
    torch.save({"a": print}, tmp_path / "evil.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    write_samples(tmp_path / "few.npz", n=3)
    make_tree(tmp_path / "bad", images=6)
    np.savez(
        tmp_path / "onehot.npz", arr_0=np.zeros((5, 32, 32, 3), np.uint8), arr_1=np.zeros((5, 10))
    )
    np.savez(tmp_path / "fortran.npz", arr_0=np.asfortranarray(np.zeros((5, 32, 32, 3), np.uint8)))
    np.savez(tmp_path / "named.npz", images=np.zeros((5, 32, 32, 3), np.uint8))
    np.savez_compressed(
        tmp_path / "damaged.npz",
        arr_0=np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8),
    )
    content = bytearray((tmp_path / "damaged.npz").read_bytes())
    content[5000:5100] = bytes(100)
    (tmp_path / "damaged.npz").write_bytes(content)
    (tmp_path / "bad/class1/001.png").write_bytes(b"no image")
    cases = [
        (
            ["s.npz", "--reference", "s.npz"],
            r"no Inception weights: fetch https://.*put it at .*hub/checkpoints/",
        ),
        (
            ["s.npz", "--reference", "s.npz", "--inception-weights", "evil.pth"],
            "is no file of plain tensors",
        ),
        (
            ["s.npz", "--reference", "s.npz", "--inception-weights", "other.pth"],
            r"other\.pth is not weights-inception",
        ),
        (
            ["s.npz", "--reference", "large.npz", "--features", "fashion"],
            "holds images of 64x64, the samples are 32x32",
        ),
        (
            ["onehot.npz", "--reference", "s.npz", "--features", "fashion"],
            r"arr_1 must be the classes of 5 images",
        ),
        (["fortran.npz", "--reference", "s.npz", "--features", "fashion"], "in Fortran order"),
        (
            ["damaged.npz", "--reference", "s.npz", "--features", "fashion"],
            r"damaged\.npz is damaged",
        ),
        (["named.npz", "--reference", "s.npz"], "holds no images under arr_0; it holds images"),
        (
            ["s.npz", "--reference", "none.npz", "--features", "fashion"],
            "--reference .*none.npz does not exist",
        ),
        (["s.npz", "--reference", "other.npz", "--features", "fashion"], "holds neither images"),
        (
            ["s.npz", "--reference", "stats.npz", "--features", "fashion"],
            "holds Inception statistics",
        ),
        (
            ["large.npz", "--reference", "s.npz", "--features", "fashion"],
            "needs 32x32 images, .* holds 64x64",
        ),
        (["float.npz", "--reference", "s.npz", "--features", "fashion"], "must be uint8"),
        (
            ["broken.npz", "--reference", "s.npz", "--features", "fashion"],
            r"cannot be read as \.npz",
        ),
        (
            ["stats.npz", "--reference", "s.npz", "--features", "fashion"],
            "holds no images under arr_0",
        ),
        (["none.npz", "--reference", "s.npz"], "none.npz does not exist"),
        (
            ["s.npz", "--reference", "few.npz", "--features", "fashion"],
            "--reference few.npz holds 3 images",
        ),
        (
            ["s.npz", "--reference", "bad", "--features", "fashion"],
            r"--reference bad: class1/001\.png cannot be used",
        ),
        (
            ["s.npz", "--reference", "s.npz", "--features", "dinov2-x"],
            "dinov2-x is not a timm model; similar names: dinov2-",
        ),
        (
            ["s.npz", "--reference", "s.npz", "--features", "test_vit"],
            "timm cannot load test_vit .*hf download",
        ),
        (["s.npz", "--reference", "s.npz", "--features", "fashion", "fashion"], "each only once"),
        (
            ["s.npz", "--reference", "s.npz", "--features", "fashion", "--normalisers", "x=1"],
            "--normalisers x: there is no",
        ),
        (["s.npz", "--reference", "s.npz", "--normalisers", "x=0"], "x=0 is not a network's name"),
        (
            [
                "s.npz",
                "--reference",
                "s.npz",
                "--features",
                "fashion",
                "--encoder-weights",
                "s.npz",
            ],
            "names 0 of timm's",
        ),
    ]
    monkeypatch.chdir(tmp_path)
    import re

    for flags, message in cases:
        code, out = call(evaluate, *flags)
        assert code == 2 and re.search(message, out) and "Traceback" not in out, (flags, out)
    assert not list(tmp_path.glob("*metrics.json"))


def test_curves_draw_several_runs(call, trained, tmp_path):
    code, out = call(curves, trained, trained, "--out", tmp_path / "c.png")
    assert code == 0 and (tmp_path / "c.png").stat().st_size > 10_000, out
    evaluated = shutil.copytree(trained, tmp_path / "evaluated")
    with open(evaluated / "metrics.jsonl", "a") as file:  # as --eval-every writes them
        for images, distance in ((8, 5.0), (16, 4.0)):
            row = {
                "step": 1,
                "images": images,
                "FD-fashion": distance,
                "evaluation": {"ema_decay": 0.9},
            }
            file.write(json.dumps(row) + "\n")
    assert call(curves, trained, evaluated, "--out", tmp_path / "e.png")[0] == 0
    assert (
        Image.open(tmp_path / "e.png").width > 1.3 * Image.open(tmp_path / "c.png").width
    )  # one panel more
    code, out = call(curves, tmp_path)
    assert code == 2 and "is no run" in out
    code, out = call(curves, trained, "--out", tmp_path / "c.txt")
    assert code == 2 and "must end in .png" in out
