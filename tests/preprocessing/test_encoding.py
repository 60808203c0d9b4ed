"""Encoding stores moments of the VAE, and interruptions and processes do not change the bytes."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latents.cache import LatentCache
from latents.manifest import read_manifest
from models.autoencoder import Autoencoder
from preprocessing import encode_latents
from preprocessing.cache_job import Batch
from preprocessing.image_source import ImageSource
from preprocessing.images import SquareReader, load_square, random_crop
from preprocessing.sources import open_source
from tests.helpers import (
    ROOT,
    get_fork_server,
    make_tree,
    make_vae,
    run_ranks,
    wait_until,
)

FASHION_MNIST = ROOT / "assets/fashion-mnist"
FASHION_FLAGS = ["--source", FASHION_MNIST / "images.zip", "--resolution", 32]


def make_encode_flags(source, dest, vae, *more):
    flags = ["--source", source, "--dest", dest, "--vae", vae, *more]
    return ["--resolution", 32, "--batch-size", 4, "--shard-size", 10, *flags]


def read_files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def load_images(tree: Path) -> torch.Tensor:
    source = open_source(tree)
    return torch.from_numpy(np.stack([load_square(source, i, 32) for i in range(len(source))]))


def test_moments_equal_those_of_diffusers_up_to_float16_rounding(cache, tree, vae_folder):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(vae_folder)
    source = open_source(tree)
    pixels = np.stack([np.asarray(Image.open(tree / name)) for name in source.names])
    normalized = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(normalized).latent_dist
    expected = torch.cat((posterior.mean, posterior.std), 1)

    stored, labels = LatentCache(cache).gather(np.arange(24))
    assert torch.equal(labels, torch.from_numpy(source.labels))
    spacing = np.spacing(np.abs(expected.numpy()).astype(np.float16)).astype(np.float32)
    # The second term allows for different float32 kernels for other batch sizes.
    tolerance = 0.5 * torch.from_numpy(spacing) + 2e-6
    assert ((stored.float() - expected).abs() <= tolerance).all()


def encode_until_killed(blocked: Path, dest: Path, max_renames: list[int], flags: list) -> None:
    """Encode on one process per item of `max_renames`, and kill all when all are blocked."""
    blocked.mkdir()
    server = get_fork_server()
    counts = ",".join(map(str, max_renames))
    options = (blocked, counts, *flags, "--dest", dest)
    server.start_ranks(len(max_renames), "tests.preprocessing.blocking_encoder", *options)
    wait_until(lambda: len(list(blocked.iterdir())) == len(max_renames))
    server.kill_ranks()


def test_cache_is_identical_after_kills_on_two_and_three_processes(call, tmp_path):
    flags = [*FASHION_FLAGS, "--vae", FASHION_MNIST / "vae", "--limit", 300, "--flip"]
    flags += ["--shard-size", 10, "--batch-size", 4]
    code, out = call(encode_latents, *flags, "--dest", tmp_path / "uninterrupted")
    assert code == 0, out

    # A shard takes four renames: moments, mirrored, labels, and its record. Process 0 of the first
    # run also renames the plan and the preview. The kills therefore cover all stages of a shard.
    dest = tmp_path / "killed"
    written_times = {}
    for max_renames, num_complete in ([23, 26], 5 + 6), ([9, 11, 4], 5 + 6 + 2 + 2 + 1):
        encode_until_killed(tmp_path / f"blocked-{num_complete}", dest, max_renames, flags)
        records = sorted(path.name for path in dest.glob("partial/*.npy.json"))
        assert len(records) == num_complete
        assert not (dest / "manifest.json").exists()
        times = {}
        for record in records:
            moments = dest / "moments" / record.removesuffix(".json")
            times[moments] = moments.stat().st_mtime_ns
        assert written_times.items() <= times.items()  # complete shards are not encoded again
        written_times = times
    (dest / "moments/.00029.npy.1.partial").write_bytes(b"incomplete")

    code, out = call(encode_latents, *flags, "--dest", dest)
    assert code == 0, out
    assert read_files(dest) == read_files(tmp_path / "uninterrupted")
    assert written_times == {path: path.stat().st_mtime_ns for path in written_times}


# Locks a file until its standard input is closed.
LOCK_HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "wb")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_cache_in_use_is_refused(call, tree, vae_folder, tmp_path):
    """The first process of the other command has exited, but the second one is still running."""
    path = tmp_path / "data/partial/lock.1"
    path.parent.mkdir(parents=True)
    command = [sys.executable, "-c", LOCK_HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"locked\n"
        code, out = call(encode_latents, *make_encode_flags(tree, tmp_path / "data", vae_folder))
        assert code == 2 and "is in use by another process" in out


def test_flip_encodes_flipped_images(call, tree, vae_folder, tmp_path):
    flags = make_encode_flags(tree, tmp_path / "data", vae_folder, "--flip")
    assert call(encode_latents, *flags)[0] == 0
    data = LatentCache(tmp_path / "data")
    images = load_images(tree)
    is_flipped = np.arange(24) % 2 == 1
    images[is_flipped] = images[is_flipped].flip(-1)
    expected = Autoencoder(str(vae_folder)).encode(images)
    moments = data.gather(np.arange(24), is_flipped)[0].float()
    torch.testing.assert_close(moments, expected, rtol=2e-3, atol=1e-4)

    versions = [data.gather(np.arange(24), np.full(24, value))[0] for value in (False, True)]
    mean = torch.cat(versions).double().chunk(2, 1)[0].mean((0, 2, 3))
    np.testing.assert_allclose(data.manifest.mean, mean, rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [(("--dtype", "float32"), 1e-6), (("--precision", "bf16"), 3e-2), (("--num-workers", 0), 2e-3)],
)
def test_dtype_precision_and_workers_are_used(
    call, tree, vae_folder, tmp_path, cache, options, tolerance
):
    code, out = call(
        encode_latents, *make_encode_flags(tree, tmp_path / "data", vae_folder, *options)
    )
    assert code == 0, out
    stored = LatentCache(tmp_path / "data").gather(np.arange(24))[0]
    assert stored.dtype == (torch.float32 if "float32" in options else torch.float16)
    exact = Autoencoder(str(vae_folder)).encode(load_images(tree))
    torch.testing.assert_close(stored.float(), exact, rtol=tolerance, atol=tolerance)
    if "bf16" in options:
        assert not torch.equal(stored, LatentCache(cache).gather(np.arange(24))[0])
        assert read_manifest(tmp_path / "data").encoding["precision"] == "bf16"


def test_random_crops_equal_those_of_adm_and_depend_on_the_seed(call, vae_folder, tmp_path):
    source = make_tree(tmp_path / "tree", images=6, side=70)
    moments = {}
    for name, seed, workers in (("a", 1, 0), ("again", 1, 2), ("b", 2, 2)):
        options = ("--crop", "random-seeded", "--seed", seed, "--num-workers", workers)
        flags = make_encode_flags(source, tmp_path / name, vae_folder, *options)
        assert call(encode_latents, *flags)[0] == 0
        moments[name] = LatentCache(tmp_path / name).gather(np.arange(6))[0]
    assert torch.equal(moments["a"], moments["again"])
    assert not torch.equal(moments["a"], moments["b"])
    assert read_manifest(tmp_path / "a").crop == "random, seed 1"

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8))
    for uniforms in ([0.0, 0.0, 0.0], [0.999, 0.999, 0.999], [0.5, 0.2, 0.7]):
        shorter_side = 32 + int(uniforms[0] * 9)  # uniform in 32 ... 40 = 32 / 0.8
        resized = image.resize((50, 40), Image.Resampling.BOX)
        resized = resized.resize(
            (round(50 * shorter_side / 40), shorter_side), Image.Resampling.BICUBIC
        )
        top = int(uniforms[1] * (resized.height - 31))
        left = int(uniforms[2] * (resized.width - 31))
        expected = np.asarray(resized)[top : top + 32, left : left + 32]
        np.testing.assert_array_equal(np.asarray(random_crop(image, 32, uniforms)), expected)


def test_background_and_limit_are_used(call, vae_folder, tmp_path):
    source = tmp_path / "tree/a"
    source.mkdir(parents=True)
    for i in range(9):
        Image.new("RGBA", (32, 32), (200, 30, i, 0)).save(source / f"{i}.png")
    vae = Autoencoder(str(vae_folder))
    for background, value in (("white", 255), ("black", 0)):
        dest = tmp_path / background
        flags = make_encode_flags(source.parent, dest, vae_folder, "--limit", 7, "--background")
        assert call(encode_latents, *flags, background)[0] == 0
        manifest = read_manifest(dest)
        assert manifest.count == 7
        assert manifest.kinds == {"PNG RGBA": 7, f"transparent: over {background}": 7}
        expected = vae.encode(torch.full((1, 3, 32, 32), value, dtype=torch.uint8))
        stored = LatentCache(dest).gather(np.array([3]))[0].float()
        torch.testing.assert_close(stored, expected, rtol=2e-3, atol=1e-4)
    code, out = call(encode_latents, *flags, "white")
    assert code == 2 and "background was black, is white" in out


def interrupt_encode(patch, num_calls, min_images=1):
    """Raise KeyboardInterrupt after `num_calls` calls of Autoencoder.encode with enough images.

    Returns a list to which each call appends the number of images.
    """
    encode = Autoencoder.encode
    calls = []

    def encode_or_interrupt(self, images):
        if len(images) >= min_images:
            calls.append(len(images))
        if len(calls) > num_calls:
            raise KeyboardInterrupt
        return encode(self, images)

    patch.setattr(Autoencoder, "encode", encode_or_interrupt)
    return calls


def test_changed_source_of_an_unfinished_cache_is_refused(call, vae_folder, tmp_path, monkeypatch):
    source = make_tree(tmp_path / "tree")
    flags = make_encode_flags(source, tmp_path / "data", vae_folder)
    with monkeypatch.context() as patch:
        interrupt_encode(patch, num_calls=8 + 5)  # the preview, the first shard, and two batches
        assert call(encode_latents, *flags)[0] == 130
    (source / "class1/001.png").rename(source / "class1/000.png")
    code, out = call(encode_latents, *flags)
    assert code == 2 and "names_and_labels was" in out


def test_preview_shows_images_reconstructions_and_latents(call, vae_folder, tmp_path):
    flags = [*FASHION_FLAGS, "--limit", 40, "--vae"]
    code, out = call(encode_latents, *flags, FASHION_MNIST / "vae", "--dest", tmp_path / "right")
    assert code == 0 and "PSNR 3" in out and "poor" not in out
    preview = np.asarray(Image.open(tmp_path / "right/preview.png"))
    assert preview.shape[0] > 8 * 128
    assert len(np.unique(preview.reshape(-1, 3), axis=0)) > 500
    code, out = call(encode_latents, *flags, vae_folder, "--dest", tmp_path / "wrong")
    assert code == 0
    assert f"poor reconstructions: check that --vae {vae_folder} fits these images" in out


def test_preview_is_redrawn_after_the_vae_is_changed(call, vae_folder, tmp_path, monkeypatch):
    flags = [*FASHION_FLAGS, "--limit", 40, "--dest", tmp_path / "data", "--vae"]
    with monkeypatch.context() as patch:
        interrupt_encode(patch, num_calls=0, min_images=2)  # after the preview
        code, out = call(encode_latents, *flags, vae_folder)
        assert code == 130 and "poor" in out
    old_preview = (tmp_path / "data/preview.png").read_bytes()
    code, out = call(encode_latents, *flags, FASHION_MNIST / "vae")
    assert code == 0 and "PSNR 3" in out
    assert (tmp_path / "data/preview.png").read_bytes() != old_preview


def test_moments_beyond_float16_are_refused_with_a_remedy(call, tree, tmp_path, monkeypatch):
    def encode(self, images):
        return torch.full((len(images), 8, 8, 8), 1e6)

    monkeypatch.setattr(Autoencoder, "encode", encode)
    flags = make_encode_flags(tree, tmp_path / "data", make_vae(tmp_path / "vae"))
    code, out = call(encode_latents, *flags)
    assert code == 2 and "float16 cannot represent" in out and "--dtype float32" in out
    assert call(encode_latents, *flags, "--dtype", "float32")[0] == 0


def test_killed_worker_gives_an_error_of_one_line(
    call, tree, vae_folder, tmp_path, monkeypatch, frequent_worker_checks
):
    parent = os.getpid()
    read = SquareReader.read

    def read_or_die(self, source, image_index):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, source, image_index)

    monkeypatch.setattr(SquareReader, "read", read_or_die)
    flags = make_encode_flags(tree, tmp_path / "data", vae_folder, "--num-workers", 1)
    code, out = call(encode_latents, *flags)
    assert (
        code == 2
        and "a worker process for images of --source died" in out
        and "--num-workers" in out
    )
    assert "Traceback" not in out


def test_exception_in_a_worker_is_not_reported_as_a_killed_worker(
    call, tree, vae_folder, tmp_path, monkeypatch
):
    parent = os.getpid()
    read = SquareReader.read

    def read_or_fail(self, source, image_index):
        if os.getpid() != parent:
            raise RuntimeError("bug")
        return read(self, source, image_index)

    monkeypatch.setattr(SquareReader, "read", read_or_fail)
    flags = make_encode_flags(tree, tmp_path / "data", vae_folder, "--num-workers", 1)
    with pytest.raises(RuntimeError, match="bug"):
        call(encode_latents, *flags)


def test_tf32_requires_a_gpu(call, tree, vae_folder, tmp_path):
    flags = make_encode_flags(tree, tmp_path / "data", vae_folder, "--precision", "tf32")
    code, out = call(encode_latents, *flags)
    assert code == 2 and "--precision tf32" in out


def test_skipped_images_are_recorded_with_their_shard(call, vae_folder, tmp_path):
    source = make_tree(tmp_path / "tree")
    for i in (3, 12, 15, 18, 21):
        (source / f"class0/{i:03d}.png").write_bytes(b"")
    flags = make_encode_flags(
        source, tmp_path / "data", vae_folder, "--skip-bad", "--shard-size", 4
    )
    code, out = call(encode_latents, *flags)
    assert code == 0 and "5 skipped" in out
    lines = (tmp_path / "data/skipped.jsonl").read_text().splitlines()
    shards = [json.loads(line)["shard"] for line in lines]
    assert shards == ["00000.npy", *4 * ["00001.npy"]]

    # The second shard has no images, so it has no files and no entry.
    manifest = read_manifest(tmp_path / "data")
    listed = [shard["file"] for shard in manifest.shards]
    assert listed == [f"{k:05d}.npy" for k in (0, 2, 3, 4, 5)]
    assert len(LatentCache(tmp_path / "data")) == 19
    assert "complete: 19" in call(encode_latents, *flags)[1]


def test_disk_error_is_not_skipped_as_a_bad_image(call, tree, vae_folder, tmp_path, monkeypatch):
    open_image = ImageSource.open

    def open_or_fail(self, image_index):
        if image_index == 13:
            raise OSError(5, "Input/output error")
        return open_image(self, image_index)

    flags = make_encode_flags(tree, tmp_path / "data", vae_folder, "--skip-bad", "--num-workers", 1)
    with monkeypatch.context() as patch:
        patch.setattr(ImageSource, "open", open_or_fail)
        code, out = call(encode_latents, *flags)
    assert code == 2
    assert "class1/016.png could not be read (Input/output error); fix the problem" in out
    records = [path.name for path in (tmp_path / "data/partial").glob("*.npy.json")]
    assert records == ["00000.npy.json"]
    assert call(encode_latents, *flags)[0] == 0
    assert read_manifest(tmp_path / "data").count == 24


def test_removed_source_is_not_skipped_as_bad_images(call, vae_folder, tmp_path, monkeypatch):
    source = make_tree(tmp_path / "tree")
    open_image = ImageSource.open

    def remove_and_open(self, image_index):
        if image_index == 13:
            source.rename(tmp_path / "elsewhere")
        return open_image(self, image_index)

    monkeypatch.setattr(ImageSource, "open", remove_and_open)
    flags = make_encode_flags(
        source, tmp_path / "data", vae_folder, "--skip-bad", "--num-workers", 0
    )
    code, out = call(encode_latents, *flags)
    assert code == 2 and "could not be read (No such file or directory)" in out


def test_out_of_memory_gives_an_error_of_one_line(call, tree, vae_folder, tmp_path, monkeypatch):
    encode = Autoencoder.encode

    def encode_or_fail(self, images):
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return encode(self, images)

    monkeypatch.setattr(Autoencoder, "encode", encode_or_fail)
    code, out = call(encode_latents, *make_encode_flags(tree, tmp_path / "data", vae_folder))
    assert code == 2 and "--batch-size 4 exceeds the memory of cpu" in out
    assert "Traceback" not in out


def test_bytes_do_not_depend_on_the_number_of_torch_threads(call, tmp_path):
    """With two threads, convolutions and norms would change the order of summation."""
    flags = [*FASHION_FLAGS, "--vae", FASHION_MNIST / "vae", "--limit", 42, "--batch-size", 7]
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert call(encode_latents, *flags, "--dest", tmp_path / str(threads))[0] == 0
    finally:
        torch.set_num_threads(1)
    assert read_files(tmp_path / "1") == read_files(tmp_path / "2")


def test_unreadable_manifest_is_not_overwritten(call, tree, vae_folder, tmp_path):
    flags = make_encode_flags(tree, tmp_path / "data", vae_folder)
    assert call(encode_latents, *flags)[0] == 0
    path = tmp_path / "data/manifest.json"
    manifest = json.loads(path.read_text())
    for content in (json.dumps(manifest | {"format_version": 2}).encode(), b"\xff", b"{}"):
        path.write_bytes(content)
        code, out = call(encode_latents, *flags)
        assert code == 2 and "contains a cache that cannot be read" in out
        assert "Traceback" not in out
        assert path.read_bytes() == content


def test_pinning_a_batch_keeps_its_counts(monkeypatch):
    """The default implementation of the DataLoader would double the counts of a Counter."""
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *device: self + 0)
    batch = Batch(range(4), torch.ones(4), kinds=Counter({"PNG RGB": 4}))
    pinned = pin_memory(batch)
    assert pinned.kinds == Counter({"PNG RGB": 4})
    assert pinned.pixels is not batch.pixels


def test_recorded_shard_without_its_files_is_encoded_again(call, tree, vae_folder, tmp_path):
    dest = tmp_path / "data"
    flags = make_encode_flags(tree, dest, vae_folder)
    assert call(encode_latents, *flags)[0] == 0
    complete = read_files(dest)
    manifest = read_manifest(dest)
    (dest / "manifest.json").unlink()
    (dest / "partial").mkdir()
    (dest / "partial/plan.json").write_text(json.dumps(manifest.encoding["plan"]))
    for entry in manifest.shards:
        (dest / "partial" / f"{entry['file']}.json").write_text(json.dumps(entry))
    (dest / "moments/00001.npy").unlink()
    assert call(encode_latents, *flags)[0] == 0
    assert read_files(dest) == complete


def test_cache_inside_its_source_is_refused(call, tree, vae_folder, tmp_path):
    code, out = call(encode_latents, *make_encode_flags(tree, tree / "cache", vae_folder))
    assert code == 2 and "is inside --source" in out
    assert not (tree / "cache").exists()


def test_different_sources_per_process_are_refused(vae_folder, tmp_path):
    make_tree(tmp_path / "tree0")
    make_tree(tmp_path / "tree1", images=23)
    flags = make_encode_flags(tmp_path / "tree{rank}", tmp_path / "data", vae_folder)
    message = r"process 1 has different settings from process 0 \(images was 24, is 23"
    with pytest.raises(AssertionError, match=message):
        run_ranks(2, "preprocessing.encode_latents", *flags)
    assert not (tmp_path / "data").exists()
