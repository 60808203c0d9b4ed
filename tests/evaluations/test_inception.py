"""Inception against the two other ports of the graph, all three with the same random weights, and the resize of TensorFlow 1.

pytorch-fid's own pipeline differs from ADM's in what precedes the network: it resizes around pixel centres (F.interpolate) and
maps pixels to 2 x / 255 - 1. Here its network is given images resized by the formula below and mapped to (x - 128) / 128."""

import numpy as np
import pytest
import torch
from pytorch_fid import inception as pytorch_fid
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from common.files import sha256
from evaluations.inception import InceptionFeatures, find_weights


def resize_matrix(size: int, to: int = 299) -> np.ndarray:
    """TensorFlow 1's bilinear resize with align_corners and half_pixel_centers False, of one axis: (to, size).

    Pixel i of the result lies at i * size / to, in float32, and takes from the pixel before and, within the image, after."""
    position = np.arange(to, dtype=np.float32) * np.float32(size / to)
    before = np.floor(position).astype(int)
    after, share = np.minimum(before + 1, size - 1), (position - before).astype(np.float64)
    matrix = np.zeros((to, size))
    np.add.at(matrix, (np.arange(to), before), 1 - share)
    np.add.at(matrix, (np.arange(to), after), share)
    return matrix


def resized(images: np.ndarray) -> np.ndarray:
    """(B, 3, H, W) uint8 -> (B, 3, 299, 299)."""
    return (
        resize_matrix(images.shape[2])
        @ images.astype(np.float64)
        @ resize_matrix(images.shape[3]).T
    )


def enliven(network: torch.nn.Module, images: np.ndarray) -> None:
    """He's random weights, and BatchNorm that has seen the images: without, they all come to look alike on the way."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator)
                * (2 / parameter[0].numel()) ** 0.5
            )
        else:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            module.bias.sub_(1)
    network.train()(torch.from_numpy(images))
    network.eval()


@pytest.fixture(scope="module")
def ports(tmp_path_factory, images):
    """Ours, torch-fidelity's with every output there is, pytorch-fid's; the weights, and the sha256 of their file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *args, **kwargs: None)
        network = FeatureExtractorInceptionV3("source", ["2048"], "none")
    enliven(network, images)
    state, path = network.state_dict(), tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    ours, digest = InceptionFeatures(path), sha256(path)
    fidelity = FeatureExtractorInceptionV3(
        "oracle", ["2048", "logits_unbiased", "logits"], str(path)
    )
    path.unlink()  # 95 MB
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid, "load_state_dict_from_url", lambda url, progress: state)
        fid = pytorch_fid.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    return ours, fidelity, fid, state, digest


@pytest.fixture(scope="module")
def images():
    """Three that differ, coarse and fine: (3, 3, 64, 64) uint8."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (3, 3, 8, 8)).repeat(8, 2).repeat(8, 3)
    return ((coarse + rng.integers(0, 256, (3, 3, 64, 64))) // 2).astype(np.uint8)


@pytest.fixture(scope="module")
def outputs(ports, images):
    return ports[0](torch.from_numpy(images))


def test_the_random_network_is_alive(outputs):
    """Or the comparisons below would see no fault in it."""
    pool, spatial, probabilities = outputs
    assert (
        pool.shape == (3, 2048) and spatial.shape == (3, 2023) and probabilities.shape == (3, 1008)
    )
    for features in (pool, spatial):
        assert (features > 0).float().mean() > 0.3 and features.std(
            0
        ).mean() > 0.05 * features.mean()
    assert probabilities.max(1).values.min() > 1e-3 and probabilities.max() < 0.9


def test_features_are_torch_fidelitys(ports, images, outputs):
    fidelity = ports[1]
    kept = []
    hook = fidelity.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, inputs, output: kept.append(output)
    )
    pool, unbiased, biased = fidelity(torch.from_numpy(images))
    hook.remove()
    torch.testing.assert_close(outputs[0], pool, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs[2], unbiased.softmax(1), rtol=1e-4, atol=1e-7)
    assert not torch.allclose(outputs[2], biased.softmax(1), rtol=1e-2)
    channel_last = np.ascontiguousarray(kept[0].numpy().transpose(0, 2, 3, 1)[..., :7]).reshape(
        3, -1
    )
    np.testing.assert_allclose(outputs[1].numpy(), channel_last, rtol=1e-5, atol=1e-6)


def test_features_are_pytorch_fids(ports, images, outputs):
    """Another port, our formula of the resize, the product with the classes written out; up to the rounding of 94 layers."""
    *_, fid, state, _ = ports
    kept = []
    hook = fid.blocks[2][6].branch1x1.register_forward_hook(
        lambda module, inputs, output: kept.append(output)
    )
    with torch.no_grad():
        pool = fid(torch.from_numpy((resized(images) - 128) / 128).float())[0][:, :, 0, 0]
    hook.remove()
    torch.testing.assert_close(outputs[0], pool, rtol=1e-3, atol=1e-4)
    spatial = torch.stack(
        [kept[0][:, c, y, x] for y in range(17) for x in range(17) for c in range(7)], 1
    )
    torch.testing.assert_close(outputs[1], spatial, rtol=1e-3, atol=1e-4)
    assert outputs[1].min() == 0 < outputs[1].max()  # what a ReLU leaves
    logits = pool.double() @ state["fc.weight"].double().T
    torch.testing.assert_close(outputs[2].double(), logits.softmax(1), rtol=5e-3, atol=1e-7)


def test_the_network_works_in_float32_whatever_surrounds_it(ports, images, outputs):
    with torch.autocast("cpu", torch.bfloat16):
        again = ports[0](torch.from_numpy(images))
    for a, b in zip(again, outputs):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_the_features_know_their_weights(ports):
    assert ports[0].weights_sha256 == ports[4] and len(ports[4]) == 64


@pytest.mark.parametrize("size", [32, 256, 299, 512])
def test_torch_fidelity_resizes_as_tensorflow_1(size):
    images = np.random.default_rng(size).integers(0, 256, (1, 3, size, size), np.uint8)
    theirs = interpolate_bilinear_2d_like_tensorflow1x(
        torch.from_numpy(images).float(), size=(299, 299), align_corners=False
    )
    np.testing.assert_allclose(theirs.numpy(), resized(images), atol=2e-4)
    centres = torch.nn.functional.interpolate(
        torch.from_numpy(images).float(), (299, 299), mode="bilinear"
    )
    assert (
        size == 299 or (centres - theirs).abs().mean() > 5
    )  # what it would be around pixel centres, as pytorch-fid has it


def test_missing_weights_are_named(tmp_path):
    from common.cli import UserError

    with pytest.raises(UserError, match="no Inception weights: fetch"):
        find_weights(tmp_path / "none.pth")
