import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations import curves, evaluate
from evaluations.fashion import load_classifier
from evaluations.inception import InceptionFeatures
from evaluations.metrics import statistics
from tests.helpers import ROOT, make_tree

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

    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pool, spatial, probabilities = InceptionFeatures(inception_weights)(images)
    oracle = FeatureExtractorInceptionV3("oracle", ["2048", "logits_unbiased"], str(inception_weights))
    kept = {}
    oracle.Mixed_6d.register_forward_pre_hook(lambda module, inputs: kept.update(x=inputs[0]))
    features, logits = oracle(images)
    torch.testing.assert_close(pool, features)
    torch.testing.assert_close(probabilities, torch.softmax(logits, 1))
    conv = oracle.Mixed_6d.branch1x1
    by_hand = torch.relu(conv.bn(conv.conv(kept["x"])))  # mixed_6/conv, 17 x 17 x 192
    expected = [by_hand[:, c, y, x] for y in range(17) for x in range(17) for c in range(7)]  # NHWC: the channel runs fastest
    torch.testing.assert_close(spatial, torch.stack(expected, 1))
    assert spatial.count_nonzero() > 100


def test_inception_metrics_against_images_and_against_statistics(call, tmp_path, inception_weights):
    """The statistics are made here from the network's features, so equal numbers check the features of both sets too."""
    write_samples(tmp_path / "s.npz", 6)
    others = write_samples(tmp_path / "r.npz", 5, seed=1)
    flags = [tmp_path / "s.npz", "--inception-weights", inception_weights]
    code, out = call(evaluate, *flags, "--reference", tmp_path / "r.npz", "--out", tmp_path / "images.json")
    assert code == 0 and "FID" in out and "FD-fashion" not in out
    numbers = json.loads((tmp_path / "images.json").read_text())["metrics"]
    assert numbers["inception_score"] >= 1 and 0 <= numbers["precision"] <= 1

    pool, spatial, _ = (x.numpy() for x in InceptionFeatures(inception_weights)(torch.from_numpy(others).permute(0, 3, 1, 2)))
    (mu, sigma), (mu_s, sigma_s) = statistics(pool), statistics(spatial)
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    assert call(evaluate, *flags, "--reference", tmp_path / "stats.npz", "--out", tmp_path / "stats.json")[0] == 0
    again = json.loads((tmp_path / "stats.json").read_text())["metrics"]
    assert numbers["FID"] > 0 and again["FID"] == pytest.approx(numbers["FID"], rel=1e-4)
    assert numbers["sFID"] > 0 and again["sFID"] == pytest.approx(numbers["sFID"], rel=1e-4)
    assert again["precision"] is None and again["recall"] is None


def test_fashion_against_a_tree_of_images(call, tmp_path):
    samples = write_samples(tmp_path / "s.npz")
    record = {"solver": "euler", "num_steps": 5, "cfg_scale": 1.5, "global_seed": 3}
    (tmp_path / "s.json").write_text(json.dumps(record | {"class_names": []}))
    reference = make_tree(tmp_path / "tree", images=30)
    code, out = call(evaluate, tmp_path / "s.npz", "--reference", reference, "--features", "fashion")
    assert code == 0 and "FD-fashion" in out and "FID" not in out
    result = json.loads((tmp_path / "s.metrics.json").read_text())
    assert result["sampling"] == record
    assert (result["count"], len(result["reference_sha256"]), len(result["samples_sha256"])) == (40, 64, 64)
    assert "FID" not in result["metrics"]
    scores = load_classifier()(torch.from_numpy(samples).permute(0, 3, 1, 2))[1].argmax(1)
    assert result["metrics"]["class_agreement"] == pytest.approx((scores == torch.arange(40) % 10).float().mean().item())


def test_samples_against_themselves(call, tmp_path, monkeypatch):
    write_samples(tmp_path / "s.npz", labels=False)
    assert call(evaluate, tmp_path / "s.npz", "--reference", tmp_path / "s.npz", "--features", "fashion")[0] == 0
    metrics = json.loads((tmp_path / "s.metrics.json").read_text())["metrics"]
    assert metrics["FD-fashion"] == pytest.approx(0, abs=1e-4)
    monkeypatch.setattr(evaluate, "evaluate", None)  # the same samples and reference again: nothing is done twice
    assert call(evaluate, tmp_path / "s.npz", "--reference", tmp_path / "s.npz", "--features", "fashion")[0] == 0
    assert (metrics["precision"], metrics["recall"], metrics["class_agreement"]) == (1, 1, None)


def test_mistakes_end_in_one_line(call, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    write_samples(tmp_path / "s.npz")
    write_samples(tmp_path / "large.npz", side=64)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((9, 32, 32, 3)))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    (tmp_path / "broken.npz").write_bytes(b"PK")
    torch.save({"a": print}, tmp_path / "evil.pth")
    write_samples(tmp_path / "few.npz", n=3)
    make_tree(tmp_path / "bad", images=3)
    (tmp_path / "bad/class1/001.png").write_bytes(b"no image")
    cases = [
        (
            ["s.npz", "--reference", "s.npz"],
            r"no Inception weights: fetch https://.*put it at .*hub/checkpoints/",
        ),
        (["s.npz", "--reference", "s.npz", "--inception-weights", "evil.pth"], "is no file of plain tensors"),
        (["s.npz", "--reference", "none.npz", "--features", "fashion"], "--reference .*none.npz does not exist"),
        (["s.npz", "--reference", "other.npz", "--features", "fashion"], "holds neither images"),
        (["s.npz", "--reference", "stats.npz", "--features", "fashion"], "holds Inception statistics"),
        (["large.npz", "--reference", "s.npz", "--features", "fashion"], "needs 32x32 images, .* holds 64x64"),
        (["float.npz", "--reference", "s.npz", "--features", "fashion"], "must be uint8"),
        (["broken.npz", "--reference", "s.npz", "--features", "fashion"], r"cannot be read as \.npz"),
        (["stats.npz", "--reference", "s.npz", "--features", "fashion"], "nothing to compare"),
        (["none.npz", "--reference", "s.npz"], "none.npz does not exist"),
        (["s.npz", "--reference", "few.npz", "--features", "fashion"], "--reference few.npz holds 3 images"),
        (["s.npz", "--reference", "bad", "--features", "fashion"], r"--reference bad: class1/001\.png cannot be used"),
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
            row = {"step": 1, "images": images, "FD-fashion": distance, "evaluation": {"ema_decay": 0.9}}
            file.write(json.dumps(row) + "\n")
    columns, distances = curves.read_metrics(evaluated)
    assert len(columns["velocity"]) == 2 and distances["FD-fashion", 0.9].tolist() == [[8, 5], [16, 4]]
    assert call(curves, trained, evaluated, "--out", tmp_path / "e.png")[0] == 0
    assert Image.open(tmp_path / "e.png").width > 1.3 * Image.open(tmp_path / "c.png").width  # one panel more
    code, out = call(curves, tmp_path)
    assert code == 2 and "is no run" in out
    code, out = call(curves, trained, "--out", tmp_path / "c.txt")
    assert code == 2 and "must end in .png" in out
