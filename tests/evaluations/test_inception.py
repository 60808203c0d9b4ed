"""Compare the Inception features with other ports, and the resize with TensorFlow 1's formula.

All ports have the same random weights. The preprocessing of pytorch-fid differs from ADM's:
pytorch-fid resizes around pixel centres (F.interpolate) and maps pixels to 2 x / 255 - 1. The
network of pytorch-fid therefore receives images that are resized by the formula of TensorFlow 1 and
mapped to (x - 128) / 128.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_fid import inception as pytorch_fid
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from common.cli import UserError
from common.files import sha256
from evaluations.inception import InceptionFeatures, find_weights


def resize_matrix(size: int, new_size: int = 299) -> np.ndarray:
    """Return the matrix of TensorFlow 1's bilinear resize along one axis, (new_size, size).

    align_corners and half_pixel_centers are False: pixel i of the result has the position
    i * size / new_size, in float32, and is interpolated from the pixels before and after this
    position.
    """
    position = np.arange(new_size, dtype=np.float32) * np.float32(size / new_size)
    before = np.floor(position).astype(int)
    after = np.minimum(before + 1, size - 1)
    weight = (position - before).astype(np.float64)
    matrix = np.zeros((new_size, size))
    np.add.at(matrix, (np.arange(new_size), before), 1 - weight)
    np.add.at(matrix, (np.arange(new_size), after), weight)
    return matrix


def resize_as_tensorflow(images: np.ndarray) -> np.ndarray:
    """Resize (B, 3, H, W) uint8 images to (B, 3, 299, 299)."""
    vertical = resize_matrix(images.shape[2])
    horizontal = resize_matrix(images.shape[3])
    return vertical @ images.astype(np.float64) @ horizontal.T


def initialize_network(network: torch.nn.Module, images: np.ndarray) -> None:
    """Draw weights with He's variance, and compute the BatchNorm statistics of the images.

    Without these statistics, different images would have similar activations.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            scale = (2 / parameter[0].numel()) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        else:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            module.bias.sub_(1)
    network.train()(torch.from_numpy(images))
    network.eval()


def capture_output(module: torch.nn.Module, function: Callable[[], Any]) -> tuple[Any, Tensor]:
    """Call a function. Return the result, and the output of `module` during the call."""
    captured = []
    hook = module.register_forward_hook(lambda module, inputs, output: captured.append(output))
    result = function()
    hook.remove()
    return result, captured[0]


@pytest.fixture(scope="module")
def images():
    """Return three different images with coarse and fine structure, (3, 3, 64, 64) uint8."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (3, 3, 8, 8)).repeat(8, 2).repeat(8, 3)
    return ((coarse + rng.integers(0, 256, (3, 3, 64, 64))) // 2).astype(np.uint8)


@pytest.fixture(scope="module")
def ports(tmp_path_factory, images):
    """Return our port and two other ports of Inception, all with the same weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *args, **kwargs: None)
        network = FeatureExtractorInceptionV3("source", ["2048"], "none")
    initialize_network(network, images)
    state = network.state_dict()
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    ours = InceptionFeatures(path)
    outputs = ["2048", "logits_unbiased", "logits"]
    torch_fidelity_port = FeatureExtractorInceptionV3("original", outputs, str(path))
    weights_sha256 = sha256(path)
    path.unlink()  # the file has 95 MB
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid, "load_state_dict_from_url", lambda url, progress: state)
        pytorch_fid_port = pytorch_fid.InceptionV3(
            [3], resize_input=False, normalize_input=False
        ).eval()
    return SimpleNamespace(
        ours=ours,
        torch_fidelity=torch_fidelity_port,
        pytorch_fid=pytorch_fid_port,
        state=state,
        weights_sha256=weights_sha256,
    )


@pytest.fixture(scope="module")
def features(ports, images):
    return ports.ours(torch.from_numpy(images))


def test_random_network_distinguishes_the_images(features):
    """With similar outputs for all images, the comparisons below would not detect errors."""
    assert features.pool.shape == (3, 2048)
    assert features.spatial.shape == (3, 2023)
    assert features.scores.shape == (3, 1008)
    for output in (features.pool, features.spatial):
        assert (output > 0).float().mean() > 0.3
        assert output.std(0).mean() > 0.05 * output.mean()
    assert features.scores.max(1).values.min() > 1e-3
    assert features.scores.max() < 0.9


def test_features_equal_torch_fidelity(ports, images, features):
    network = ports.torch_fidelity
    (pool, unbiased, biased), spatial = capture_output(
        network.Mixed_6d.branch1x1, lambda: network(torch.from_numpy(images))
    )
    torch.testing.assert_close(features.pool, pool, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features.scores, unbiased.softmax(1), rtol=1e-4, atol=1e-7)
    assert not torch.allclose(features.scores, biased.softmax(1), rtol=1e-2)
    channels_last = spatial.numpy().transpose(0, 2, 3, 1)[..., :7].reshape(3, -1)
    np.testing.assert_allclose(features.spatial.numpy(), channels_last, rtol=1e-5, atol=1e-6)


def test_features_equal_pytorch_fid(ports, images, features):
    """The network receives resized images, and the test computes the logits without biases.

    The tolerances allow for the rounding errors of 94 layers.
    """
    network = ports.pytorch_fid
    pixels = torch.from_numpy((resize_as_tensorflow(images) - 128) / 128).float()
    with torch.no_grad():
        (output,), branch = capture_output(network.blocks[2][6].branch1x1, lambda: network(pixels))
    pool = output[:, :, 0, 0]
    torch.testing.assert_close(features.pool, pool, rtol=1e-3, atol=1e-4)
    columns = [branch[:, c, y, x] for y in range(17) for x in range(17) for c in range(7)]
    torch.testing.assert_close(features.spatial, torch.stack(columns, 1), rtol=1e-3, atol=1e-4)
    assert features.spatial.min() == 0 < features.spatial.max()  # as after a ReLU
    logits = pool.double() @ ports.state["fc.weight"].double().T
    scores = features.scores.double()
    torch.testing.assert_close(scores, logits.softmax(1), rtol=5e-3, atol=1e-7)


def test_features_are_float32_under_autocast(ports, images, features):
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = ports.ours(torch.from_numpy(images)).as_dict()
    for name, expected in features.as_dict().items():
        assert under_autocast[name].dtype == torch.float32
        assert torch.equal(under_autocast[name], expected)


def test_weights_sha256_is_the_hash_of_the_file(ports):
    assert ports.ours.weights_sha256 == ports.weights_sha256
    assert len(ports.weights_sha256) == 64


@pytest.mark.parametrize("size", [32, 256, 299, 512])
def test_torch_fidelity_resizes_as_tensorflow_1(size):
    images = np.random.default_rng(size).integers(0, 256, (1, 3, size, size), np.uint8)
    pixels = torch.from_numpy(images).float()
    resized = interpolate_bilinear_2d_like_tensorflow1x(
        pixels, size=(299, 299), align_corners=False
    )
    np.testing.assert_allclose(resized.numpy(), resize_as_tensorflow(images), atol=2e-4)
    if size != 299:
        # A resize around pixel centres, as in pytorch-fid, gives different images.
        centred = torch.nn.functional.interpolate(pixels, (299, 299), mode="bilinear")
        assert (centred - resized).abs().mean() > 5


def test_error_for_missing_weights_contains_the_download_url(tmp_path):
    with pytest.raises(UserError, match="no Inception weights: fetch"):
        find_weights(tmp_path / "none.pth")
