"""Test that --keep-images stores the images, also in an existing cache, without other changes."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from common.files import NpyWriter, write_array
from common.processes import World
from dataset import TrainingStream, to_image_index
from latents import cache as cache_module
from latents.cache import CacheError, LatentCache
from preprocessing import encode_latents, import_repa, verify
from preprocessing.build import build_cache
from preprocessing.encoding import EncodingJob, EncodingSettings
from tests.helpers import make_tree
from tests.preprocessing.test_encoding import load_images, make_encode_flags, read_files
from tests.preprocessing.test_import_repa import make_repa_folder


@pytest.fixture(scope="module")
def make_cache(tmp_path_factory, tree, vae_folder):
    """Return a function that returns a cache, which is created on first use."""
    root = tmp_path_factory.mktemp("kept")

    def make(keep_images=False, flip=False):
        dest = root / f"{keep_images}-{flip}"
        if not dest.exists():
            settings = EncodingSettings(
                tree,
                resolution=32,
                vae=str(vae_folder),
                shard_size=10,
                batch_size=4,
                flip=flip,
                keep_images=keep_images,
            )
            build_cache(dest, EncodingJob(settings, "cpu", 0, World()), World())
        return dest

    return make


@pytest.fixture(scope="module")
def pixels(tree):
    return load_images(tree)


def read_modification_times(paths):
    return {path: path.stat().st_mtime_ns for path in paths}


def test_images_are_stored_and_other_files_are_unchanged(make_cache, pixels):
    without_images = read_files(make_cache())
    with_images = read_files(make_cache(keep_images=True))
    image_files = {f"images/{k:05d}.npy" for k in range(3)}
    assert with_images.keys() == without_images.keys() | image_files
    unchanged = without_images.keys() - {"manifest.json"}
    assert all(with_images[name] == without_images[name] for name in unchanged)
    index = np.array([23, 0, 10, 9, 0])
    cache = LatentCache(make_cache(keep_images=True))
    assert torch.equal(cache.read_input("images", index), pixels[index])


def test_images_are_added_to_a_complete_cache_without_encoding_again(
    call, tree, vae_folder, make_cache, tmp_path, monkeypatch
):
    dest = shutil.copytree(make_cache(), tmp_path / "data")
    flags = make_encode_flags(tree, dest, vae_folder, "--num-workers", 0)
    times = read_modification_times(dest.rglob("*.npy"))
    finish = NpyWriter.finish
    finished_files = []

    def finish_first_or_interrupt(self):
        if finished_files:
            raise KeyboardInterrupt
        finished_files.append(self.path)
        return finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(NpyWriter, "finish", finish_first_or_interrupt)
        assert call(encode_latents, *flags, "--keep-images")[0] == 130
    assert not LatentCache(dest).manifest.images  # The cache is still valid.
    assert not list(dest.glob("*/.*.partial"))

    finished_times = read_modification_times(finished_files)
    code, out = call(encode_latents, *flags, "--keep-images")
    assert code == 0 and "with the encoded images" in out
    assert read_files(dest) == read_files(make_cache(keep_images=True))
    assert finished_times == read_modification_times(finished_files)
    assert times == read_modification_times(times)
    assert "is complete: 24 images" in call(encode_latents, *flags, "--keep-images")[1]
    # A cache with images is also a complete cache for the command without the flag.
    assert "is complete: 24 images" in call(encode_latents, *flags)[1]


def test_images_of_another_source_are_refused(call, vae_folder, tmp_path):
    source = make_tree(tmp_path / "tree")
    dest = tmp_path / "data"
    flags = make_encode_flags(source, dest, vae_folder, "--num-workers", 0, "--skip-bad")
    (source / "class0/003.png").write_bytes(b"")
    assert call(encode_latents, *flags)[0] == 0
    contents = read_files(dest)
    message = "the source no longer contains the images of shard 00000.npy"

    # A skipped image has become usable.
    Image.new("RGB", (32, 32), (9, 9, 9)).save(source / "class0/003.png")
    code, out = call(encode_latents, *flags, "--keep-images")
    assert code == 2 and message in out

    # Images have been replaced.
    (source / "class0/003.png").write_bytes(b"")
    for i in (0, 6, 9):
        shutil.copyfile(source / "class1/001.png", source / f"class0/{i:03d}.png")
    code, out = call(encode_latents, *flags, "--keep-images")
    assert code == 2 and message in out

    code, out = call(encode_latents, *flags, "--keep-images", "--shard-size", 12)
    assert code == 2 and "was created with --shard-size 10; pass the same value" in out
    new_contents = read_files(dest)
    complete = {name: data for name, data in new_contents.items() if "partial" not in name}
    assert complete == contents


def test_source_with_other_unusable_images_is_refused(call, vae_folder, tmp_path):
    """The labels and the first batch are equal, so only the list of skipped images differs."""
    source = make_tree(tmp_path / "tree")
    options = ("--num-workers", 0, "--skip-bad", "--batch-size", 4)
    flags = make_encode_flags(source, tmp_path / "data", vae_folder, *options)
    image = (source / "class0/015.png").read_bytes()
    (source / "class0/012.png").write_bytes(b"")
    assert call(encode_latents, *flags)[0] == 0
    (source / "class0/012.png").write_bytes(image)
    (source / "class0/015.png").write_bytes(b"")
    code, out = call(encode_latents, *flags, "--keep-images")
    assert code == 2 and "no longer contains the images of shard 00000.npy" in out


def test_unfinished_cache_must_be_completed_with_the_same_flag(
    call, tree, vae_folder, tmp_path, monkeypatch
):
    def fail_in_second_shard(self):
        return 1 / 0 if "00001" in self.path.name else ""

    flags = make_encode_flags(tree, tmp_path / "data", vae_folder, "--num-workers", 0)
    monkeypatch.setattr(NpyWriter, "finish", fail_in_second_shard)
    with pytest.raises(ZeroDivisionError):
        call(encode_latents, *flags, "--keep-images")
    code, out = call(encode_latents, *flags)
    assert code == 2 and "keep_images was True, is False" in out


def test_verify_repairs_images_without_encoding_again(call, make_cache, tmp_path):
    data = shutil.copytree(make_cache(keep_images=True), tmp_path / "data")
    (data / "images/00000.npy").unlink()
    array = np.load(data / "images/00001.npy")
    array[3, 0, 0, 0] ^= 1
    write_array(data / "images/00001.npy", array)
    write_array(data / "images/00002.npy", np.zeros((4, 3, 16, 16), np.uint8))
    code, out = call(verify, data)
    assert code == 2
    assert "00000.npy: images: cannot be read" in out
    assert "00001.npy: images: sha256 does not match" in out
    assert "00002.npy: images: is uint8 (4, 3, 16, 16), should be uint8 (4, 3, 32, 32)" in out

    (data / "moments/00002.npy").unlink()
    times = read_modification_times(data.glob("moments/0000[01].npy"))
    code, out = call(verify, data, "--repair", "--num-workers", 0)
    assert code == 0 and "rebuilt 3 of 3 shards" in out
    assert "manifest.json has the new" not in out
    assert times == read_modification_times(times)
    assert read_files(data) == read_files(make_cache(keep_images=True))
    assert call(verify, data)[0] == 0


def test_images_are_not_added_to_a_damaged_cache(call, tree, vae_folder, make_cache, tmp_path):
    dest = shutil.copytree(make_cache(), tmp_path / "data")
    path = dest / "moments/00001.npy"
    path.write_bytes(path.read_bytes()[:-8])
    flags = make_encode_flags(tree, dest, vae_folder, "--num-workers", 0, "--keep-images")
    code, out = call(encode_latents, *flags)
    assert code == 2 and f"{path} cannot be read" in out and f"verify --repair {dest}" in out


def test_missing_images_give_an_error_with_a_remedy(make_cache, tmp_path):
    root = make_cache(keep_images=True)
    joined_cache = LatentCache(root, make_cache())
    assert len(joined_cache.gather(np.array([47, 0]))[0]) == 2
    with pytest.raises(CacheError, match=rf"{make_cache()} holds no images.*--keep-images"):
        joined_cache.read_input("images", np.array([0]))
    with pytest.raises(CacheError, match="holds no images"):
        TrainingStream(LatentCache(make_cache()), 0, 8, inputs=["images"])

    copy = shutil.copytree(root, tmp_path / "data")
    duplicated_cache = LatentCache(root, copy)
    first, second = duplicated_cache.read_input("images", np.array([5, 29]))
    assert torch.equal(first, second)
    (copy / "images/00001.npy").unlink()
    assert len(LatentCache(copy)) == 24  # Only reading images requires the file.
    with pytest.raises(CacheError, match=r"images/00001\.npy cannot be read.*--repair"):
        TrainingStream(LatentCache(copy), 0, 8, inputs=["images"])


def test_training_stream_flips_images_like_moments(make_cache, pixels):
    data = LatentCache(make_cache(keep_images=True, flip=True))
    stream = TrainingStream(data, 5, 8, inputs=["images"])
    stream_without_images = TrainingStream(data, 5, 8)
    for step in (4, 5):
        batch = stream[step]
        for name in ("stream_position", "moments", "labels"):
            assert torch.equal(getattr(batch, name), getattr(stream_without_images[step], name))
        index = to_image_index(batch.stream_position.numpy(), 24, 5)
        unflipped = data.gather(index)[0]
        is_flipped = torch.tensor([not torch.equal(a, b) for a, b in zip(batch.moments, unflipped)])
        assert 0 < is_flipped.sum() < 8
        images = pixels[index]
        images[is_flipped] = images[is_flipped].flip(-1)
        assert torch.equal(batch.inputs["images"], images)
        shares = [TrainingStream(data, 5, 8, rank, 2, ["images"]) for rank in range(2)]
        parts = [share[step].inputs["images"] for share in shares]
        assert torch.equal(torch.cat(parts), images)


def test_number_of_open_files_is_limited(make_cache, monkeypatch):
    root = make_cache(keep_images=True)
    index = np.array([23, 0, 11, 5, 22])
    monkeypatch.setattr(cache_module, "MAX_OPEN_FILES", 2)
    data = LatentCache(root)
    expected = LatentCache(root).read_input("images", index)
    assert torch.equal(data.read_input("images", index), expected)
    data.gather(index)
    assert len(data.open_shards) == 2


def test_images_of_repa_are_imported_with_their_moments(call, vae_folder, tmp_path):
    root = tmp_path / "repa"
    dest = tmp_path / "data"
    make_repa_folder(root, vae_folder)
    flags = [root, dest, "--vae", vae_folder, "--shard-size", 5]
    assert call(import_repa, *flags)[0] == 0
    png = root / "images/00001/img00000007.png"
    png.rename(tmp_path / "7.png")
    code, out = call(import_repa, *flags, "--keep-images")
    assert code == 2 and "img-mean-std-00000007.npy cannot be used (its image is not in" in out
    (tmp_path / "7.png").rename(png)
    assert call(import_repa, *flags, "--keep-images")[0] == 0
    images = LatentCache(dest).read_input("images", np.arange(12))
    for i in range(12):
        expected = np.asarray(Image.open(root / f"images/{i // 5:05d}/img{i:08d}.png"))
        np.testing.assert_array_equal(images[i], expected.transpose(2, 0, 1))
    assert call(verify, dest)[0] == 0
