"""encode_latents --keep-images: what was encoded is kept beside the moments, now or later, and changes nothing else."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from common.files import NpyWriter, write_array
from dataset import TrainingStream
from latents.cache import CacheError, LatentCache
from preprocessing import encode_latents, import_repa, verify
from preprocessing.images import load_square
from preprocessing.sources import open_source
from tests.helpers import make_tree
from tests.preprocessing.test_encoding import encode_flags, file_contents
from tests.preprocessing.test_import_repa import make_repa_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, tree, vae_folder):
    """made(keep_images=..., flip=...) -> a cache, built once."""
    from common.processes import World
    from preprocessing.build import build_cache
    from preprocessing.encoding import EncodingJob, EncodingSettings

    root = tmp_path_factory.mktemp("kept")

    def make(keep_images=False, flip=False):
        dest = root / f"{keep_images}-{flip}"
        if not dest.exists():
            settings = EncodingSettings(
                str(tree),
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
    source = open_source(tree)
    return torch.from_numpy(np.stack([load_square(source, i, 32) for i in range(24)]))


def test_images_are_what_was_encoded_and_nothing_else_is_another(made, pixels):
    plain, kept = file_contents(made()), file_contents(made(keep_images=True))
    images = {f"images/{k:05d}.npy" for k in range(3)}
    assert kept.keys() == plain.keys() | images
    assert all(kept[name] == plain[name] for name in plain if name != "manifest.json")
    index = np.array([23, 0, 10, 9, 0])
    assert torch.equal(LatentCache(made(keep_images=True)).images(index), pixels[index])


def test_they_are_added_to_a_whole_cache_without_encoding(
    call, tree, vae_folder, made, tmp_path, monkeypatch
):
    dest, given = (
        tmp_path / "data",
        encode_flags(tree, tmp_path / "data", vae_folder, "--num-workers", 0, "--keep-images"),
    )
    shutil.copytree(made(), dest)
    before = {path: path.stat().st_mtime_ns for path in dest.rglob("*.npy")}
    finish, finished = NpyWriter.finish, []

    def stops(self):
        if finished:
            raise KeyboardInterrupt
        finished.append(self.path)
        return finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(NpyWriter, "finish", stops)
        assert call(encode_latents, *given)[0] == 130
    assert not LatentCache(dest).manifest.images and not list(
        dest.glob("*/.*.partial")
    )  # as whole as it was
    first = finished[0].stat().st_mtime_ns
    code, out = call(encode_latents, *given)
    assert code == 0 and "the images too" in out
    assert (
        file_contents(dest) == file_contents(made(keep_images=True))
        and first == finished[0].stat().st_mtime_ns
    )
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert "is complete: 24 images" in call(encode_latents, *given)[1]
    assert (
        "is complete: 24 images" in call(encode_latents, *given[:-1])[1]
    )  # a cache with images is one without, too


def test_images_of_another_source_are_not_added(call, vae_folder, tmp_path):
    source, given = (
        make_tree(tmp_path / "tree"),
        encode_flags(tmp_path / "tree", tmp_path / "data", vae_folder, "--num-workers", 0),
    )
    (source / "class0/003.png").write_bytes(b"")
    assert call(encode_latents, *given, "--skip-bad")[0] == 0
    whole = file_contents(tmp_path / "data")
    Image.new("RGB", (32, 32), (9, 9, 9)).save(
        source / "class0/003.png"
    )  # mended: it is in no shard
    code, out = call(encode_latents, *given, "--skip-bad", "--keep-images")
    assert code == 2 and "what the source holds now is not what shard 00000.npy was made of" in out
    (source / "class0/003.png").write_bytes(b"")
    for i in (0, 3, 6, 9):
        (source / f"class0/{i:03d}.png").write_bytes(
            (source / "class1/001.png").read_bytes() if i != 3 else b""
        )
    assert (
        "is not what shard 00000.npy was made of"
        in call(encode_latents, *given, "--skip-bad", "--keep-images")[1]
    )
    code, out = call(encode_latents, *given, "--skip-bad", "--keep-images", "--shard-size", 12)
    assert code == 2 and "was made with --shard-size 10: add the images with that" in out
    assert {
        name: data
        for name, data in file_contents(tmp_path / "data").items()
        if "partial" not in name
    } == whole


def test_an_unfinished_cache_is_finished_as_it_was_begun(
    call, tree, vae_folder, tmp_path, monkeypatch
):
    given = encode_flags(tree, tmp_path / "data", vae_folder, "--num-workers", 0)
    monkeypatch.setattr(
        NpyWriter, "finish", lambda self: 1 / 0 if "00001" in self.path.name else ""
    )
    with pytest.raises(ZeroDivisionError):
        call(encode_latents, *given, "--keep-images")
    code, out = call(encode_latents, *given)
    assert code == 2 and "keep_images was True, is False" in out


def test_verify_finds_and_mends_them_alone(call, made, tmp_path):
    data = shutil.copytree(made(keep_images=True), tmp_path / "data")
    (data / "images/00000.npy").unlink()
    write_array(data / "images/00002.npy", np.zeros((4, 3, 16, 16), np.uint8))
    array = np.load(data / "images/00001.npy")
    array[3, 0, 0, 0] ^= 1
    write_array(data / "images/00001.npy", array)
    code, out = call(verify, data)
    assert (
        code == 2
        and "00000.npy: images: cannot be read" in out
        and "00001.npy: images: sha256 does not match" in out
    )
    assert "00002.npy: images: is uint8 (4, 3, 16, 16), should be uint8 (4, 3, 32, 32)" in out
    (data / "moments/00002.npy").unlink()
    before = {path: path.stat().st_mtime_ns for path in data.glob("moments/0000[01].npy")}
    code, out = call(verify, data, "--repair", "--num-workers", 0)
    assert (
        code == 0 and "rebuilt 3 of 3 shards" in out and "manifest.json has the new" not in out
    )
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert (
        file_contents(data) == file_contents(made(keep_images=True)) and call(verify, data)[0] == 0
    )


def test_a_cache_without_them_says_what_to_do(made, tmp_path):
    both = LatentCache(made(keep_images=True), made())
    assert len(both.gather(np.array([47, 0]))[0]) == 2
    with pytest.raises(
        CacheError,
        match=rf"{made()} holds no images: it was made without --keep-images; give the command",
    ):
        both.images(np.array([0]))
    with pytest.raises(CacheError, match="holds no images"):
        TrainingStream(LatentCache(made()), 0, 8, inputs=["images"])
    data = shutil.copytree(made(keep_images=True), tmp_path / "data")
    twice = LatentCache(made(keep_images=True), data)
    assert torch.equal(twice.images(np.array([5])), twice.images(np.array([29])))
    (data / "images/00001.npy").unlink()
    assert len(LatentCache(data)) == 24  # nothing else needs them
    with pytest.raises(CacheError, match=r"images/00001\.npy cannot be read.*--repair"):
        TrainingStream(LatentCache(data), 0, 8, inputs=["images"])


def test_the_stream_gives_the_images_of_its_moments(made, pixels):
    from dataset import to_image_index

    data = LatentCache(made(keep_images=True, flip=True))
    stream, plain = TrainingStream(data, 5, 8, inputs=["images"]), TrainingStream(data, 5, 8)
    for step in (4, 5):
        batch = stream[step]
        for name in ("stream_position", "moments", "labels"):
            assert torch.equal(getattr(batch, name), getattr(plain[step], name))
        index = to_image_index(batch.stream_position.numpy(), 24, 5)
        straight = data.gather(index)[0]
        mirrored = torch.tensor([not torch.equal(a, b) for a, b in zip(batch.moments, straight)])
        assert 0 < mirrored.sum() < 8
        expected = torch.where(mirrored[:, None, None, None], pixels[index].flip(-1), pixels[index])
        assert torch.equal(batch.inputs["images"], expected)
        streams = [TrainingStream(data, 5, 8, rank, 2, ["images"]) for rank in range(2)]
        parts = [stream[step].inputs["images"] for stream in streams]
        assert torch.equal(torch.cat(parts), expected)


def test_few_files_are_open_at_once(made, monkeypatch):
    from latents import cache as cache_module

    monkeypatch.setattr(cache_module, "MAX_OPEN_MAPS", 2)
    data, index = LatentCache(made(keep_images=True)), np.array([23, 0, 11, 5, 22])
    assert torch.equal(data.images(index), LatentCache(made(keep_images=True)).images(index))
    data.gather(index)
    assert len(data.open_shards) == 2


def test_repas_images_are_imported_with_their_moments(call, vae_folder, tmp_path):
    root, dest = tmp_path / "repa", tmp_path / "data"
    make_repa_folder(root, vae_folder)
    given = [root, dest, "--vae", vae_folder, "--shard-size", 5]
    assert call(import_repa, *given)[0] == 0
    (root / "images/00001/img00000007.png").rename(tmp_path / "7.png")
    code, out = call(import_repa, *given, "--keep-images")
    assert code == 2 and "img-mean-std-00000007.npy cannot be used (its image is not in" in out
    (tmp_path / "7.png").rename(root / "images/00001/img00000007.png")
    assert call(import_repa, *given, "--keep-images")[0] == 0
    images = LatentCache(dest).images(np.arange(12))
    for i in range(12):
        stored = np.asarray(Image.open(root / f"images/{i // 5:05d}/img{i:08d}.png")).transpose(
            2, 0, 1
        )
        np.testing.assert_array_equal(images[i], stored)
    assert call(verify, dest)[0] == 0
