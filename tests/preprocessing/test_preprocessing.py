import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from latents.cache import LatentCache, read_manifest
from models.autoencoder import Autoencoder
from preprocessing import encode_latents
from preprocessing.images import center_crop, load_square, to_rgb
from preprocessing.sources import open_source
from tests.helpers import make_tree, make_vae


def flags(source, dest, vae, *more):
    return [
        "--source",
        source,
        "--dest",
        dest,
        "--resolution",
        32,
        "--vae",
        vae,
        "--batch-size",
        4,
        "--shard-size",
        10,
        *more,
    ]


def test_cache_holds_the_posteriors_to_float16(cache, tree, vae_folder):
    data, source, vae = LatentCache(cache), open_source(tree), Autoencoder(str(vae_folder))
    images = torch.from_numpy(np.stack([load_square(source, i, 32) for i in range(24)]))
    moments, labels = data.gather(np.arange(24))
    torch.testing.assert_close(moments.float(), vae.encode(images), rtol=2e-3, atol=1e-4)
    assert labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    latent = data.manifest
    mean, std = moments.double().chunk(2, 1)
    np.testing.assert_allclose(latent.mean, mean.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(
        latent.std,
        (mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))).sqrt(),
        rtol=1e-9,
    )
    assert (latent.class_names, latent.num_classes, latent.scale, latent.shift) == (
        ["class0", "class1", "class2"],
        3,
        0.7,
        0.25,
    )
    assert not (cache / "partial").exists()


def test_second_run_does_nothing_and_other_settings_are_refused(
    call, cache, tree, vae_folder, tmp_path
):
    before = (cache / "manifest.json").stat().st_mtime_ns
    code, out = call(encode_latents, *flags(tree, cache, vae_folder))
    assert (
        code == 0
        and "complete: 24 images" in out
        and (cache / "manifest.json").stat().st_mtime_ns == before
    )
    code, out = call(encode_latents, *flags(tree, cache, vae_folder), "--resolution", 64)
    assert code == 2 and "resolution was 32, is 64" in out
    code, out = call(encode_latents, *flags(tree, cache, vae_folder), "--limit", 10)
    assert code == 2 and "images was 24, is 10" in out
    other = make_vae(tmp_path / "vae", seed=1)
    code, out = call(encode_latents, *flags(tree, cache, other))
    assert code == 2 and "vae_fingerprint was" in out


def test_interrupted_encoding_goes_on_and_gives_the_same_bytes(
    call, cache, tree, vae_folder, tmp_path, monkeypatch
):
    dest, encode = tmp_path / "data", Autoencoder.encode
    calls = []

    def interrupted(self, images):
        if len(images) > 1:  # not for the preview
            calls.append(len(images))
        if len(calls) == 5:  # in the second shard
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(Autoencoder, "encode", interrupted)
    code, out = call(encode_latents, *flags(tree, dest, vae_folder))
    assert code == 130 and "run the same command again" in out
    assert not (dest / "manifest.json").exists() and sorted(
        p.name for p in dest.glob("moments/*")
    ) == ["00000.npy"]

    before = len(calls)
    code, out = call(encode_latents, *flags(tree, dest, vae_folder)[:-1], 11)
    assert code == 2 and "shard_size was 10, is 11" in out
    code, _ = call(encode_latents, *flags(tree, dest, vae_folder))
    assert (
        code == 0 and len(calls) == before + 4
    )  # the first shard's three batches were not done again
    whole = tmp_path / "whole"
    assert call(encode_latents, *flags(tree, whole, vae_folder))[0] == 0
    for file in (
        "manifest.json",
        "moments/00000.npy",
        "moments/00001.npy",
        "moments/00002.npy",
        "labels/00001.npy",
    ):
        assert (dest / file).read_bytes() == (whole / file).read_bytes()


def test_a_bad_image_is_named_and_can_be_skipped(call, vae_folder, tmp_path):
    source = tmp_path / "tree"
    for i in range(3):
        (source / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 33), (i, 0, 0)).save(source / "a" / f"{i}.png")
    (source / "a" / "1.png").write_bytes((source / "a" / "1.png").read_bytes()[:60])
    code, out = call(encode_latents, *flags(source, tmp_path / "data", vae_folder))
    assert code == 2 and "a/1.png cannot be used" in out and "--skip-bad" in out
    assert not (tmp_path / "data" / "manifest.json").exists()
    code, out = call(
        encode_latents, *flags(source, tmp_path / "data", vae_folder, "--skip-bad")
    )  # as the message advises
    manifest = read_manifest(tmp_path / "data")
    assert code == 0 and (manifest.count, manifest.skipped) == (2, 1)
    assert (
        "is complete"
        in call(encode_latents, *flags(source, tmp_path / "data", vae_folder, "--skip-bad"))[1]
    )
    assert [
        json.loads(line)["file"]
        for line in (tmp_path / "data/skipped.jsonl").read_text().splitlines()
    ] == ["a/1.png"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "contains no images"),
        (lambda p: (p / "a").mkdir(parents=True), "contains no images"),
        (lambda p: make_tree(p) and (p / "empty").mkdir(), "some classes have no images (empty)"),
        (lambda p: p.write_bytes(b"PK"), "is not a folder, tar, parquet or readable zip"),
    ],
)
def test_bad_sources_end_in_one_line(call, vae_folder, tmp_path, make, message):
    make(tmp_path / "source")
    code, out = call(encode_latents, *flags(tmp_path / "source", tmp_path / "data", vae_folder))
    assert code == 2 and message in out and "--source" in out and len(out.strip().splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_hidden_folders_are_no_classes(tmp_path):
    make_tree(tmp_path / "tree", images=3)
    (tmp_path / "tree/.ipynb_checkpoints").mkdir()
    assert open_source(tmp_path / "tree").class_names == ["class0", "class1", "class2"]


def test_a_place_that_cannot_be_written_is_named(call, tree, vae_folder, tmp_path):
    (tmp_path / "file").write_text("")
    code, out = call(encode_latents, *flags(tree, tmp_path / "file" / "data", vae_folder))
    assert code == 2 and "Not a directory" in out and "Traceback" not in out


@pytest.mark.parametrize(
    ("device", "message"), [("gpu", "none of cpu, cuda"), ("cuda:99", "there is no cuda:99 here")]
)
def test_devices_are_checked(call, tree, vae_folder, tmp_path, device, message):
    code, out = call(
        encode_latents, *flags(tree, tmp_path / "data", vae_folder), "--device", device
    )
    assert code == 2 and message in out


def test_resolution_must_fit_the_vae(call, tree, vae_folder, tmp_path):
    code, out = call(
        encode_latents,
        "--source",
        tree,
        "--dest",
        tmp_path / "d",
        "--resolution",
        30,
        "--vae",
        vae_folder,
    )
    assert code == 2 and "--resolution 30 is no multiple of 4" in out


def test_a_full_disk_ends_in_one_line_and_leaves_nothing_to_trust(
    call, tree, vae_folder, tmp_path, monkeypatch
):
    from common import files

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    code, out = call(encode_latents, *flags(tree, tmp_path / "data", vae_folder))
    assert (
        code == 2
        and "No space left" in out
        and "data/partial/plan.json" in out
        and "Traceback" not in out
    )
    assert [p.name for p in (tmp_path / "data").rglob("*") if p.is_file()] == ["lock.0"]


def test_edm_zip_and_tree_give_the_same_cache(call, tree, vae_folder, tmp_path, cache):
    source = open_source(tree)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in source.names:
            archive.write(tree / name, name)
        archive.writestr(
            "dataset.json",
            json.dumps(
                {"labels": [[name, int(label)] for name, label in zip(source.names, source.labels)]}
            ),
        )
    assert (
        call(
            encode_latents,
            *flags(tmp_path / "set.zip", tmp_path / "data", vae_folder, "--batch-size", 64),
        )[0]
        == 0
    )
    ours, theirs = LatentCache(tmp_path / "data"), LatentCache(cache)
    for a, b in zip(ours.gather(np.arange(24)), theirs.gather(np.arange(24))):
        torch.testing.assert_close(a, b)
    assert ours.manifest.class_names == ["0", "1", "2"]


def adm_center_crop(array: np.ndarray, size: int) -> np.ndarray:
    """guided-diffusion's formula, step by step on arrays of even halvings, with PIL only for the bicubic step."""
    while min(array.shape[:2]) >= 2 * size:
        h, w = array.shape[0] // 2, array.shape[1] // 2
        array = np.asarray(Image.fromarray(array).resize((w, h), Image.BOX))
    scale = size / min(array.shape[:2])
    new = tuple(round(x * scale) for x in (array.shape[1], array.shape[0]))
    array = np.asarray(Image.fromarray(array).resize(new, Image.BICUBIC))
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize("shape", [(32, 32), (33, 47), (129, 64), (20, 31), (200, 65), (64, 64)])
def test_center_crop_is_adms(shape):
    array = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        np.asarray(center_crop(Image.fromarray(array), 32)), adm_center_crop(array, 32)
    )


def test_box_halving_averages_two_by_two():
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = array.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert (
        np.abs(np.asarray(center_crop(Image.fromarray(array), 32)) - expected).max() <= 1
    )  # PIL rounds once an axis


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "LA", "I;16"])
def test_every_mode_becomes_rgb(mode):
    array = np.full((4, 4), 51, np.uint8)
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 51 * 257, np.uint16))
    else:
        image = Image.fromarray(array).convert("RGB").convert(mode)
    pixels = np.asarray(to_rgb(image))
    assert pixels.shape == (4, 4, 3)
    if mode != "1":
        assert np.abs(pixels.astype(int) - 51).max() <= 1


def test_sixteen_bits_cover_the_whole_range():
    """0 stays 0 and 65535 becomes 255: eight bits are sixteen over 257, rounded."""
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = (levels / 257).round().astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(levels)))[..., 0], expected)
    assert expected[0, 0] == 0 and expected[-1, -1] == 255


def test_transparent_is_white_and_exif_is_upright():
    assert np.asarray(to_rgb(Image.new("RGBA", (2, 2), (9, 9, 9, 0)))).min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    buffer = io.BytesIO()
    Image.new("RGB", (6, 3)).save(buffer, "JPEG", exif=exif)
    assert to_rgb(Image.open(buffer)).size == (3, 6)
