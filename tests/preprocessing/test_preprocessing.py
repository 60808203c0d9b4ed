"""encode_latents writes a valid cache, resumes, reports errors, and converts images."""

import io
import json
import zipfile

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageOps

from common import files
from latents.cache import LatentCache
from latents.manifest import read_manifest
from models.autoencoder import Autoencoder
from preprocessing import encode_latents
from preprocessing.images import EXIF_ORIENTATION, center_crop, convert_to_rgb
from preprocessing.sources import open_source
from tests.helpers import make_tree, make_vae
from tests.preprocessing.test_encoding import (
    interrupt_encode,
    load_images,
    make_encode_flags,
    read_files,
)


def test_cache_contains_the_moments_and_their_statistics(cache, tree, vae_folder):
    data = LatentCache(cache)
    moments, labels = data.gather(np.arange(24))
    expected = Autoencoder(str(vae_folder)).encode(load_images(tree))
    torch.testing.assert_close(moments.float(), expected, rtol=2e-3, atol=1e-4)
    assert labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8

    manifest = data.manifest
    mean, std = moments.double().chunk(2, 1)
    variance = mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))
    np.testing.assert_allclose(manifest.mean, mean.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(manifest.std, variance.sqrt(), rtol=1e-9)
    assert manifest.class_names == ["class0", "class1", "class2"]
    assert (manifest.num_classes, manifest.scale, manifest.shift) == (3, 0.7, 0.25)
    assert not (cache / "partial").exists()


def test_complete_cache_is_unchanged_and_other_settings_are_refused(
    call, cache, tree, vae_folder, tmp_path
):
    flags = make_encode_flags(tree, cache, vae_folder)
    time = (cache / "manifest.json").stat().st_mtime_ns
    code, out = call(encode_latents, *flags)
    assert code == 0 and "complete: 24 images" in out
    assert (cache / "manifest.json").stat().st_mtime_ns == time

    code, out = call(encode_latents, *flags, "--resolution", 64)
    assert code == 2 and "resolution was 32, is 64" in out
    code, out = call(encode_latents, *flags, "--limit", 10)
    assert code == 2 and "images was 24, is 10" in out
    code, out = call(encode_latents, *flags, "--vae", make_vae(tmp_path / "vae", seed=1))
    assert code == 2 and "vae_fingerprint was" in out


def test_interrupted_encoding_resumes_and_gives_the_same_bytes(
    call, tree, vae_folder, tmp_path, monkeypatch
):
    dest = tmp_path / "data"
    flags = make_encode_flags(tree, dest, vae_folder)
    with monkeypatch.context() as patch:
        # Encode three batches of the first shard and one batch of the second. Each image of the
        # preview is encoded separately.
        interrupt_encode(patch, num_calls=4, min_images=2)
        code, out = call(encode_latents, *flags)
    assert code == 130 and "rerun the same command" in out
    assert not (dest / "manifest.json").exists()
    assert sorted(path.name for path in dest.glob("moments/*")) == ["00000.npy"]

    code, out = call(encode_latents, *flags, "--shard-size", 11)
    assert code == 2 and "shard_size was 10, is 11" in out
    with monkeypatch.context() as patch:
        # Encode only the three batches of the second shard and the single batch of the third.
        calls = interrupt_encode(patch, num_calls=99, min_images=2)
        assert call(encode_latents, *flags)[0] == 0
        assert len(calls) == 4
    uninterrupted = tmp_path / "uninterrupted"
    assert call(encode_latents, *make_encode_flags(tree, uninterrupted, vae_folder))[0] == 0
    assert read_files(dest) == read_files(uninterrupted)


def test_bad_image_is_named_and_can_be_skipped(call, vae_folder, tmp_path):
    source = tmp_path / "tree"
    (source / "a").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (40, 33), (i, 0, 0)).save(source / f"a/{i}.png")
    bad = source / "a/1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    flags = make_encode_flags(source, tmp_path / "data", vae_folder)
    code, out = call(encode_latents, *flags)
    assert code == 2 and "a/1.png cannot be used" in out and "--skip-bad" in out
    assert not (tmp_path / "data/manifest.json").exists()

    flags.append("--skip-bad")
    code, out = call(encode_latents, *flags)
    manifest = read_manifest(tmp_path / "data")
    assert code == 0 and (manifest.count, manifest.skipped) == (2, 1)
    assert "is complete" in call(encode_latents, *flags)[1]
    lines = (tmp_path / "data/skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in lines] == ["a/1.png"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "contains no images"),
        (lambda path: (path / "a").mkdir(parents=True), "contains no images"),
        (
            lambda path: make_tree(path) and (path / "empty").mkdir(),
            "some classes have no images (empty)",
        ),
        (lambda path: path.write_bytes(b"PK"), "is not a folder, tar, parquet or readable zip"),
    ],
)
def test_invalid_source_gives_an_error_of_one_line(call, vae_folder, tmp_path, make, message):
    make(tmp_path / "source")
    flags = make_encode_flags(tmp_path / "source", tmp_path / "data", vae_folder)
    code, out = call(encode_latents, *flags)
    assert code == 2 and message in out and "--source" in out
    assert len(out.strip().splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_hidden_folder_is_not_a_class(tmp_path):
    make_tree(tmp_path / "tree", images=3)
    (tmp_path / "tree/.ipynb_checkpoints").mkdir()
    assert open_source(tmp_path / "tree").class_names == ["class0", "class1", "class2"]


def test_destination_below_a_file_is_refused(call, tree, vae_folder, tmp_path):
    (tmp_path / "file").write_text("")
    code, out = call(encode_latents, *make_encode_flags(tree, tmp_path / "file/data", vae_folder))
    assert code == 2 and "cannot be created (Not a directory)" in out
    assert "Traceback" not in out


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "choose cpu, cuda or"), ("cuda:99", "this machine has no cuda:99")],
)
def test_unknown_device_is_refused(call, tree, vae_folder, tmp_path, device, message):
    flags = make_encode_flags(tree, tmp_path / "data", vae_folder, "--device", device)
    code, out = call(encode_latents, *flags)
    assert code == 2 and message in out


def test_resolution_that_does_not_fit_the_vae_is_refused(call, tree, vae_folder, tmp_path):
    flags = make_encode_flags(tree, tmp_path / "data", vae_folder, "--resolution", 30)
    code, out = call(encode_latents, *flags)
    assert code == 2 and "--resolution 30 is not a multiple of 4" in out


@pytest.mark.parametrize(("resolution", "has_warning"), [(28, True), (32, False), (4, True)])
def test_resolution_that_most_models_cannot_use_gives_a_warning(
    call, tree, vae_folder, tmp_path, resolution, has_warning
):
    options = ("--resolution", resolution, "--limit", 1)
    code, out = call(
        encode_latents, *make_encode_flags(tree, tmp_path / "data", vae_folder, *options)
    )
    side = resolution // 4
    warning = (
        f"warning: --resolution {resolution} gives latents of {side}x{side}, which only models"
    )
    assert code == 0 and (warning in out) == has_warning
    assert ("choose a multiple of 8" in out) == has_warning


def test_full_disk_gives_an_error_of_one_line_and_leaves_no_files(
    call, tree, vae_folder, tmp_path, monkeypatch
):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    code, out = call(encode_latents, *make_encode_flags(tree, tmp_path / "data", vae_folder))
    assert code == 2 and "No space left" in out and "data/partial/plan.json" in out
    assert "Traceback" not in out
    assert list(read_files(tmp_path / "data")) == ["partial/lock.0"]


def test_edm_zip_and_folder_tree_give_the_same_cache(call, tree, vae_folder, tmp_path, cache):
    source = open_source(tree)
    labels = [[name, int(label)] for name, label in zip(source.names, source.labels)]
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in source.names:
            archive.write(tree / name, name)
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    flags = make_encode_flags(
        tmp_path / "set.zip", tmp_path / "data", vae_folder, "--batch-size", 64
    )
    assert call(encode_latents, *flags)[0] == 0
    from_zip = LatentCache(tmp_path / "data")
    from_tree = LatentCache(cache)
    for a, b in zip(from_zip.gather(np.arange(24)), from_tree.gather(np.arange(24))):
        torch.testing.assert_close(a, b)
    assert from_zip.manifest.class_names == ["0", "1", "2"]


def resize(array: np.ndarray, width: int, height: int, resampling: Image.Resampling) -> np.ndarray:
    """Resize an array with PIL in the order of Pillow before version 13: first the width."""
    image = Image.fromarray(array).resize((width, len(array)), resampling)
    return np.asarray(image.resize((width, height), resampling))


@pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) >= 13, reason="Pillow 13 resizes the height first"
)
def test_resizing_twice_equals_one_call_of_earlier_versions_of_pillow():
    array = np.random.default_rng(0).integers(0, 256, (200, 65, 3), dtype=np.uint8)
    for resampling in (Image.Resampling.BOX, Image.Resampling.BICUBIC):
        expected = np.asarray(Image.fromarray(array).resize((33, 99), resampling))
        np.testing.assert_array_equal(resize(array, 33, 99, resampling), expected)


def compute_adm_center_crop(array: np.ndarray, size: int) -> np.ndarray:
    """Compute the center crop of guided-diffusion on arrays, using PIL only for resizing."""
    while min(array.shape[:2]) >= 2 * size:
        height, width = array.shape[0] // 2, array.shape[1] // 2
        array = resize(array, width, height, Image.Resampling.BOX)
    scale = size / min(array.shape[:2])
    width, height = (round(length * scale) for length in (array.shape[1], array.shape[0]))
    array = resize(array, width, height, Image.Resampling.BICUBIC)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "shape",
    [(32, 32), (33, 47), (129, 64), (20, 31), (200, 65), (120, 35), (64, 64), (32, 35), (37, 32)],
)
def test_center_crop_equals_that_of_adm(shape):
    array = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    cropped = np.asarray(center_crop(Image.fromarray(array), 32))
    np.testing.assert_array_equal(cropped, compute_adm_center_crop(array, 32))


def test_box_halving_averages_two_by_two_pixels():
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = array.reshape(32, 2, 32, 2, 3).mean((1, 3))
    halved = np.asarray(center_crop(Image.fromarray(array), 32))
    assert np.abs(halved - expected).max() <= 1  # PIL rounds once per axis


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "LA", "I;16"])
def test_every_mode_is_converted_to_rgb(mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 51 * 257, np.uint16))
    else:
        image = Image.fromarray(np.full((4, 4), 51, np.uint8)).convert("RGB").convert(mode)
    pixels = np.asarray(convert_to_rgb(image, "white", []))
    assert pixels.shape == (4, 4, 3)
    if mode != "1":
        assert np.abs(pixels.astype(int) - 51).max() <= 1


def test_sixteen_bits_are_rounded_to_eight_over_the_full_range():
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = (levels / 257).round().astype(np.uint8)
    assert expected[0, 0] == 0 and expected[-1, -1] == 255
    rgb = convert_to_rgb(Image.fromarray(levels), "white", [])
    np.testing.assert_array_equal(np.asarray(rgb)[..., 0], expected)


def test_transparent_pixels_become_white():
    transparent = Image.new("RGBA", (2, 2), (9, 9, 9, 0))
    assert np.asarray(convert_to_rgb(transparent, "white", [])).min() == 255


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # rotated by 90 degrees
    buffer = io.BytesIO()
    Image.new("RGB", (6, 3)).save(buffer, "JPEG", exif=exif)
    assert convert_to_rgb(Image.open(buffer), "white", []).size == (3, 6)


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientations_equal_those_of_pil(orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    buffer = io.BytesIO()
    pixels = np.arange(6 * 3 * 3, dtype=np.uint8).reshape(6, 3, 3)
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(buffer))
    rgb = convert_to_rgb(Image.open(buffer), "white", [])
    np.testing.assert_array_equal(np.asarray(rgb), np.asarray(expected))
