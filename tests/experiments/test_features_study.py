"""Test the study of representations: the measures, the images, the figure and the command."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import UserError
from common.keyed_random import Purpose, normal
from common.progress import ProgressBar
from experiments import feature_figure, features, representation
from experiments.feature_study import (
    choose_figure_images,
    draw_images,
    evaluate_features,
    pool_tokens,
    spread_blocks,
)
from experiments.representation import (
    compute_cknna,
    compute_wilson_interval,
    find_neighbours,
    fit_colours,
    fit_probe,
)
from latents.cache import LatentCache
from models.sit import PRESETS, SiT, SiTConfig
from tests.helpers import make_vae


def draw_normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def draw_rotation(d: int, seed: int) -> torch.Tensor:
    rotation, _ = torch.linalg.qr(draw_normal(d, d, seed=seed))
    return rotation


def compute_naive_cknna(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Compute CKNNA from its definition, entry by entry."""
    n = len(a)
    spaces = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    kernel_a, kernel_b = ([[float(row @ other) for other in x] for row in x] for x in spaces)

    def neighbours(kernel, i):
        others = [j for j in range(n) if j != i]
        return sorted(others, key=lambda j: -kernel[i][j])[:k]

    def hsic(one, two):
        left, right = np.zeros((n, n)), np.zeros((n, n))
        for i in range(n):
            for j in set(neighbours(one, i)) & set(neighbours(two, i)):
                left[i, j], right[i, j] = one[i][j], two[i][j]
        ones, product = np.ones(n), left @ right
        independent = (ones @ left @ ones) * (ones @ right @ ones) / (n - 1) / (n - 2)
        total = ones @ product @ ones
        return (np.trace(product) + independent - 2 / (n - 2) * total) / n / (n - 3)

    scale = hsic(kernel_a, kernel_a) * hsic(kernel_b, kernel_b)
    return hsic(kernel_a, kernel_b) / math.sqrt(scale)


@pytest.mark.parametrize("rows_per_chunk", [2048, 16])
def test_cknna_equals_its_definition(monkeypatch, rows_per_chunk):
    monkeypatch.setattr(representation, "ROWS_PER_CHUNK", rows_per_chunk)
    a = draw_normal(40, 6)
    b = a @ draw_normal(6, 4, seed=1) + draw_normal(40, 4, seed=2)
    expected = compute_naive_cknna(a.numpy(), b.numpy(), 5)
    assert 0.05 < expected < 0.95
    measured = compute_cknna(find_neighbours(a, 5), find_neighbours(b, 5))
    assert measured == pytest.approx(expected, rel=1e-10)


def test_cknna_ignores_rotation_and_scale_and_is_low_for_independent_spaces():
    a, b = draw_normal(600, 12), draw_normal(600, 12, seed=1)
    rotation = draw_rotation(12, seed=2)
    neighbours_of_a, neighbours_of_b = find_neighbours(a), find_neighbours(b)
    assert compute_cknna(neighbours_of_a, neighbours_of_a) == pytest.approx(1, abs=1e-12)
    rotated = find_neighbours(7 * a @ rotation)
    assert compute_cknna(neighbours_of_a, rotated) == pytest.approx(1, abs=1e-9)
    mixed = compute_cknna(find_neighbours(a + b), neighbours_of_b)
    rotated_mixed = compute_cknna(find_neighbours((a + b) @ rotation), neighbours_of_b)
    assert rotated_mixed == pytest.approx(mixed, abs=1e-9)
    assert abs(compute_cknna(neighbours_of_a, neighbours_of_b)) < 2 * 10 / 600 < 0.1 < mixed


def test_probe_minimizes_its_documented_objective():
    varying = draw_normal(79, 3) * torch.tensor([1, 20, 0.1]) + 5
    constant = torch.full((79, 1), 1e6 / 3, dtype=torch.float64)
    x = torch.cat((varying, constant), 1)
    y = (x[:, 0] + draw_normal(79, seed=1) > 5).long() + (x[:, 1] > 25).long()
    probe = fit_probe(x, y, num_classes=4)  # class 3 has no examples
    scaled = (varying - varying.mean(0)) / varying.std(0, correction=0)
    scores = scaled @ probe.weight[:, :3].T + probe.bias
    assert torch.allclose(probe.logits(x), scores, atol=1e-9)
    assert probe.weight[:, 3].abs().max() == 0
    error = torch.softmax(scores, 1) - torch.eye(4, dtype=torch.float64)[y]
    assert error.mean(0).abs().max() < 1e-5
    assert (error.T @ scaled / 79 + probe.weight[:, :3] / 79).abs().max() < 1e-5
    assert (probe.logits(x).argmax(1) == y).float().mean() > 0.7


def test_wilson_intervals_equal_published_values():
    assert compute_wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert compute_wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert compute_wilson_interval(10, 10)[1] == 1


def test_colours_are_principal_components_with_the_signs_of_the_reference():
    scores = draw_normal(50, 3) * torch.tensor([5.0, 2.0, 0.5])
    directions, _ = torch.linalg.qr(draw_normal(9, 3, seed=1))
    tokens = scores @ directions.T + 4
    basis = fit_colours(tokens)
    assert basis.share == pytest.approx(1) and fit_colours(draw_normal(50, 9)).share < 0.9

    # The scores have the variances of the components and are uncorrelated.
    measured, colours = basis.scores(tokens), basis.colours(tokens)
    expected = torch.linalg.svdvals(scores - scores.mean(0))
    assert torch.linalg.svdvals(measured).tolist() == pytest.approx(expected.tolist())
    variances = (measured**2).sum(0)
    assert torch.allclose(measured.T @ measured, torch.diag(variances), atol=1e-9)

    # Colours use the whole range, and tokens outside of the range are clipped.
    assert colours.amin(0).tolist() == [0, 0, 0]
    assert colours.amax(0).tolist() == pytest.approx([1, 1, 1])
    assert basis.colours(1e6 * tokens).amax() == 1 and basis.colours(-1e6 * tokens).amin() == 0

    flipped = measured * torch.tensor([-1.0, 1.0, -1.0])
    assert torch.allclose(fit_colours(tokens, flipped).scores(tokens), flipped, atol=1e-9)
    two_features = fit_colours(draw_normal(9, 2))
    assert two_features.colours(draw_normal(1, 9, 2)).shape == (1, 9, 3)


def test_images_are_drawn_without_replacement_and_keep_their_noise(cache):
    stored = LatentCache(cache)
    all_images, some_images = draw_images(stored, 24, seed=3), draw_images(stored, 12, seed=3)
    assert sorted(all_images.image_index) == list(range(24))
    assert list(all_images.image_index) != list(range(24))
    assert (some_images.image_index == all_images.image_index[:12]).all()
    assert torch.equal(some_images.noise, all_images.noise[:12])
    labels = torch.from_numpy(stored.labels[some_images.image_index].astype(np.int64))
    assert torch.equal(some_images.labels, labels)
    assert (draw_images(stored, 24, seed=4).image_index != all_images.image_index).any()

    # The noise depends only on the seed and the index of the image.
    index = torch.from_numpy(some_images.image_index[5:6])
    noise = normal(3, Purpose.NOISE, index, (4, 8, 8)).float()
    assert torch.equal(some_images.noise[5:6], noise)
    x_t = all_images.add_noise("linear", 0.25, slice(3, 5))
    assert torch.allclose(x_t, 0.75 * all_images.latents[3:5] + 0.25 * all_images.noise[3:5])


def test_figure_images_are_held_out_and_of_different_classes(cache):
    images = draw_images(LatentCache(cache), 24, seed=3)
    figure_images = choose_figure_images(images, 4)
    assert (figure_images >= 12).all() and len(set(figure_images.tolist())) == 4
    assert len(set(images.labels[figure_images[:3]].tolist())) == 3  # of the three classes


def test_tokens_use_the_null_class_and_do_not_depend_on_the_batch(cache):
    torch.manual_seed(0)
    config = SiTConfig(**PRESETS["SiT-Ti/2"], latent_size=8, num_classes=3)
    model = SiT(config).requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images = draw_images(LatentCache(cache), 24, 0)
    x_t = images.add_noise("linear", 0.4)

    def pool(batch_size: int = 24) -> dict[int, torch.Tensor]:
        return pool_tokens(model, x_t, 0.4, [2, 5], batch_size, ProgressBar(disable=True))

    pooled = pool()
    null_labels = torch.full((24,), 3)
    _, tokens = model(x_t, torch.full((24,), 0.4), null_labels, return_blocks=(2, 5))
    for block in (2, 5):
        assert torch.allclose(pooled[block], tokens[block].mean(1), atol=1e-5)
        assert torch.allclose(pool(7)[block], pooled[block], atol=1e-4)
    embedding = model.y_embedder.embedding_table.weight
    embedding[:3] += 1
    assert torch.equal(pool()[5], pooled[5])
    embedding[3] += 1
    assert not torch.allclose(pool()[5], pooled[5], atol=1e-2)


def test_accuracy_is_measured_on_the_held_out_half(cache):
    images = draw_images(LatentCache(cache), 24, 0)
    one_hot = torch.nn.functional.one_hot(images.labels, 3).double()
    separable = one_hot + 0.1 * draw_normal(24, 3)
    assert evaluate_features(separable, images, 3)["accuracy"] == 1
    separable[12:] = -separable[12:]
    result = evaluate_features(separable, images, 3, find_neighbours(separable[12:]))
    assert result["accuracy"] < 0.5 and result["low"] <= result["accuracy"] <= result["high"]
    assert result["cknna"] == pytest.approx(1)


def test_blocks_are_spread_from_the_first_to_the_last():
    assert spread_blocks(6) == [1, 2, 3, 4, 5, 6] and spread_blocks(1) == [1]
    blocks = spread_blocks(28)
    assert len(blocks) == 8 and blocks[0] == 1 and blocks[-1] == 28


def test_sheet_arranges_maps_by_time_and_block():
    block_maps = [np.full((2, 2, 2, 3), value) for value in (0.1, 0.2, 0.3, 0.4)]
    block_maps[3][1, 1, 0] = 0.5  # one token
    pixels = np.full((2, 4, 4, 3), 51, np.uint8)
    latents = block_maps[1]
    inputs = [pixels, latents]
    maps = [inputs, [*inputs, *block_maps[:2]], [*inputs, *block_maps[2:]]]
    sheet = feature_figure.make_sheet(maps, 1)
    size = feature_figure.TILE_SIZE
    step = size + feature_figure.TILE_GAP
    assert sheet[0, 0, 0] == 0.2  # the image
    assert sheet[0, 2 * step, 0] == 1  # there are no tokens at t = 0
    assert sheet[step, 3 * step, 0] == 0.2 and sheet[2 * step, 2 * step, 0] == 0.3
    assert sheet[-1, -size, 0] == 0.5
    assert sheet[-1, -1, 0] == sheet[2 * step, -1, 0] == 0.4


def test_tiles_enlarge_tokens_and_average_pixels():
    tokens = np.random.default_rng(0).random((4, 4, 3))
    enlarged = feature_figure.resize_to_tile(tokens)
    assert (enlarged == np.kron(tokens, np.ones((16, 16, 1)))).all()
    pixels = np.zeros((200, 200, 3), np.uint8)
    pixels[:3, :3] = 255 * np.eye(3)[..., None]
    reduced = feature_figure.resize_to_tile(pixels)
    assert reduced.shape == (64, 64, 3) and reduced[0, 0, 0] == pytest.approx(1 / 3)


def test_checkpoints_are_measured_and_drawn(cache, trained, tmp_path, call):
    out = tmp_path / "made" / "features.png"
    flags = "--times 0.8 0.2 --blocks 3 1 --images 2 --probe-images 24 --batch-size 10 --device cpu"
    paths = ["--ckpt", trained, trained, "--data-dir", cache, "--out", out]
    code, printed = call(features, *paths, *flags.split())
    assert code == 0, printed
    assert Image.open(out).size[0] > 1000
    result = json.loads(out.with_suffix(".json").read_text())
    first, second = result["checkpoints"]
    assert first == second and first["step"] == 2 and len(first["ema_sha256"]) == 64
    positions = [(row["t"], row["block"]) for row in first["results"]]
    assert positions == [(0.2, 1), (0.2, 3), (0.8, 1), (0.8, 3)]
    assert len(result["baselines"]) == 2 + 2
    assert result["cknna"]["images"] == result["data"]["held_out"] == 12

    images = draw_images(LatentCache(cache), 24, 0)
    counts = torch.bincount(images.labels[12:])
    assert result["chance"] == pytest.approx(counts.max().item() / 12)
    expected = evaluate_features(images.add_noise("linear", 0.8).flatten(1), images, 3)
    assert result["baselines"][-1]["accuracy"] == expected["accuracy"]
    assert result["baselines"][-1]["cknna"] is not None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--blocks 2 7", "--blocks 7: --ckpt"),
        ("--times 0.5 1.5", "--times 1.5 is outside (0, 1]"),
        ("--times 0", "--times 0 is outside (0, 1]"),
        ("--probe-images 25", "--probe-images 25 is more than the 24 images"),
        ("--probe-images 22", "--probe-images 22 is too few"),
        ("--images 13", "--images 13 is more than the held-out half"),
        ("--out x.jpg", "--out x.jpg must end in .png"),
        ("--vae nowhere/at/all", "--vae nowhere/at/all"),
        ("--origin sit", "--origin sit is for official .pt files"),
        ("--ckpt nowhere", "--ckpt: nowhere does not exist"),
        ("--data-dir nowhere", "--data-dir: nowhere does not exist"),
    ],
)
def test_user_errors_are_one_line(cache, trained, tmp_path, call, flags, message):
    paths = ["--ckpt", trained, "--data-dir", cache, "--out", tmp_path / "x.png"]
    code, printed = call(features, *paths, "--probe-images", 24, *flags.split())
    assert code == 2 and message in printed and printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_latents_of_another_vae_are_rejected(cache, trained, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(cache, other)
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest |= {"vae_fingerprint": "f" * 64, "vae": "other/vae"}
    (other / "manifest.json").write_text(json.dumps(manifest))
    flags = ["--ckpt", trained, "--data-dir", other, "--out", "x.png", "--probe-images", 24]
    args = features.parse_args([str(flag) for flag in flags])
    with pytest.raises(UserError, match=r"of a different VAE .* of --data-dir \(other/vae\)"):
        features.measure(args)


def test_decoder_must_be_the_vae_of_the_cache(cache, tmp_path):
    fingerprint = LatentCache(cache).manifest.vae_fingerprint
    with pytest.raises(UserError, match="is not the VAE of --data-dir"):
        features.load_vae(str(make_vae(tmp_path / "vae", seed=1)), fingerprint, "cpu")


def test_checkpoint_with_an_untrained_null_class_is_reported(trained, tmp_path, caplog):
    shutil.copytree(trained, tmp_path / "run")
    config = next((tmp_path / "run" / "checkpoints").iterdir()) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cfg_prob": 0.0}))
    assert len(features.load_checkpoints([config.parent, trained], None, {})) == 2
    assert caplog.text.count("without label dropout") == 1
