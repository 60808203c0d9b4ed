"""Encoding: right, the same to the byte however it is interrupted and spread, and with every option as it says."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latents.cache import LatentCache, read_manifest
from models.autoencoder import Autoencoder
from preprocessing import encode_latents
from preprocessing.images import load_square, random_crop
from preprocessing.sources import open_source
from tests.helpers import ROOT, make_tree, make_vae, torchrun

FASHION = ROOT / "assets/fashion-mnist"


def encode_flags(source, dest, vae, *more):
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


def file_contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_latents_are_diffusers_own_to_float16s_rounding(cache, tree, vae_folder):
    from diffusers import AutoencoderKL

    vae, source = AutoencoderKL.from_pretrained(vae_folder), open_source(tree)
    pixels = np.stack([np.asarray(Image.open(tree / name)) for name in source.names])
    with torch.no_grad():
        posterior = vae.encode(
            torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        ).latent_dist
    expected = torch.cat((posterior.mean, posterior.std), 1)
    stored, labels = LatentCache(cache).gather(np.arange(24))
    assert torch.equal(labels, torch.from_numpy(source.labels))
    ulp = torch.from_numpy(
        np.spacing(np.abs(expected.numpy()).astype(np.float16)).astype(np.float32)
    )
    assert (
        (stored.float() - expected).abs() <= 0.5 * ulp + 2e-6
    ).all()  # half a float16, and float32 kernels of another batch size


def start(processes: int, *given) -> subprocess.Popen:
    """The command under torchrun, not waited for."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        "--rdzv_backend",
        "c10d",
    ]
    command += [
        "--rdzv_endpoint",
        "localhost:0",
        "-m",
        "preprocessing.encode_latents",
        *map(str, given),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def kill_all(dest: Path) -> None:
    """kill -9 for every process whose command line names `dest`: launcher, encoding and decoding processes."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if str(dest).encode() in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)


def test_killed_on_two_and_on_three_processes_and_ended_by_one_the_cache_is_the_same_to_the_byte(
    call, tmp_path
):
    given = [
        "--resolution",
        32,
        "--vae",
        FASHION / "vae",
        "--limit",
        1500,
        "--shard-size",
        50,
        "--batch-size",
        16,
        "--flip",
    ]
    given = ["--source", FASHION / "images.zip", *given]
    code, out = call(encode_latents, *given, "--dest", tmp_path / "whole")
    assert code == 0, out
    dest, done, times = tmp_path / "killed", set(), {}
    for processes, wanted in ((2, 5), (3, 14)):
        process = start(processes, *given, "--dest", dest)
        while len(list(dest.glob("partial/*.npy.json"))) < wanted:
            time.sleep(0.01)
            assert process.poll() is None
        kill_all(dest)
        process.wait()
        done = {path.name.removesuffix(".json") for path in dest.glob("partial/*.npy.json")}
        assert wanted <= len(done) < 30 and not (dest / "manifest.json").exists()
        now = {file: (dest / "moments" / file).stat().st_mtime_ns for file in done}
        assert times.items() <= now.items()  # what was done is not done again
        times = now
        (dest / "moments" / ".00029.npy.1.partial").write_bytes(b"half of it")
    assert call(encode_latents, *given, "--dest", dest)[0] == 0
    assert file_contents(dest) == file_contents(tmp_path / "whole")
    assert times == {file: (dest / "moments" / file).stat().st_mtime_ns for file in done}


def test_two_commands_do_not_work_on_one_cache(call, tree, vae_folder, tmp_path):
    holder = "import fcntl, sys, time; f = open(sys.argv[1], 'wb'); fcntl.lockf(f, fcntl.LOCK_EX); print('has it', flush=True)"
    (tmp_path / "data/partial").mkdir(parents=True)
    other = subprocess.Popen(
        [sys.executable, "-c", f"{holder}; time.sleep(60)", str(tmp_path / "data/partial/lock.1")],
        stdout=subprocess.PIPE,
    )
    try:
        other.stdout.readline()
        code, out = call(encode_latents, *encode_flags(tree, tmp_path / "data", vae_folder))
        assert code == 2 and "another process is working on it" in out
    finally:
        other.kill()
        other.wait()


def test_mirror_images_are_encoded_not_mirrored_latents(call, tree, vae_folder, tmp_path):
    assert (
        call(encode_latents, *encode_flags(tree, tmp_path / "data", vae_folder, "--flip"))[0] == 0
    )
    data, vae, source = (
        LatentCache(tmp_path / "data"),
        Autoencoder(str(vae_folder)),
        open_source(tree),
    )
    images = torch.from_numpy(np.stack([load_square(source, i, 32) for i in range(24)]))
    side = np.arange(24) % 2 == 1
    expected = vae.encode(
        torch.where(torch.from_numpy(side)[:, None, None, None], images.flip(-1), images)
    )
    torch.testing.assert_close(
        data.gather(np.arange(24), side)[0].float(), expected, rtol=2e-3, atol=1e-4
    )
    both = torch.cat(
        [data.gather(np.arange(24), np.full(24, which))[0] for which in (False, True)]
    ).double()
    np.testing.assert_allclose(data.manifest.mean, both.chunk(2, 1)[0].mean((0, 2, 3)), rtol=1e-9)


@pytest.mark.parametrize(
    ("more", "tolerance"),
    [(("--dtype", "float32"), 1e-6), (("--precision", "bf16"), 3e-2), (("--num-workers", 0), 2e-3)],
)
def test_dtype_and_precision(call, tree, vae_folder, tmp_path, cache, more, tolerance):
    assert call(encode_latents, *encode_flags(tree, tmp_path / "data", vae_folder, *more))[0] == 0
    stored = LatentCache(tmp_path / "data").gather(np.arange(24))[0]
    assert stored.dtype == (torch.float32 if "float32" in more else torch.float16)
    vae, source = Autoencoder(str(vae_folder)), open_source(tree)
    exact = vae.encode(torch.from_numpy(np.stack([load_square(source, i, 32) for i in range(24)])))
    torch.testing.assert_close(stored.float(), exact, rtol=tolerance, atol=tolerance)
    if "bf16" in more:
        assert not torch.equal(stored, LatentCache(cache).gather(np.arange(24))[0])
        assert read_manifest(tmp_path / "data").encoding["precision"] == "bf16"


def test_random_crops_are_adms_and_decided_by_the_seed(call, vae_folder, tmp_path):
    source = make_tree(tmp_path / "tree", images=6, side=70)
    caches = {}
    for name, seed in (("a", 1), ("again", 1), ("b", 2)):
        more = ("--crop", "random-seeded", "--seed", seed, "--num-workers", 0 if name == "a" else 2)
        assert (
            call(encode_latents, *encode_flags(source, tmp_path / name, vae_folder, *more))[0] == 0
        )
        caches[name] = LatentCache(tmp_path / name).gather(np.arange(6))[0]
    assert torch.equal(caches["a"], caches["again"]) and not torch.equal(caches["a"], caches["b"])
    assert read_manifest(tmp_path / "a").crop == "random, seed 1"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8))
    for chance in ([0.0, 0.0, 0.0], [0.999, 0.999, 0.999], [0.5, 0.2, 0.7]):
        short = 32 + int(chance[0] * 9)  # 32 to 40 = 32 / 0.8, each as likely
        whole = image.resize((50, 40), Image.Resampling.BOX)
        whole = whole.resize((round(50 * short / 40), short), Image.Resampling.BICUBIC)
        top, left = int(chance[1] * (whole.height - 31)), int(chance[2] * (whole.width - 31))
        expected = np.asarray(whole)[top : top + 32, left : left + 32]
        np.testing.assert_array_equal(np.asarray(random_crop(image, 32, chance)), expected)


def test_background_limit_and_batch_size(call, vae_folder, tmp_path):
    source = tmp_path / "tree/a"
    source.mkdir(parents=True)
    for i in range(9):
        Image.new("RGBA", (32, 32), (200, 30, i, 0)).save(source / f"{i}.png")
    for name in ("white", "black"):
        given = encode_flags(
            source.parent, tmp_path / name, vae_folder, "--limit", 7, "--background"
        )
        assert call(encode_latents, *given, name)[0] == 0
        manifest = read_manifest(tmp_path / name)
        assert manifest.count == 7 and manifest.kinds == {
            "PNG RGBA": 7,
            f"transparent: over {name}": 7,
        }
        plain = torch.full((1, 3, 32, 32), 255 if name == "white" else 0, dtype=torch.uint8)
        stored = LatentCache(tmp_path / name).gather(np.array([3]))[0].float()
        torch.testing.assert_close(
            stored, Autoencoder(str(vae_folder)).encode(plain), rtol=2e-3, atol=1e-4
        )
    code, out = call(encode_latents, *given, "white")
    assert code == 2 and "background was black, is white" in out


def test_a_source_that_changed_under_an_unfinished_cache_is_refused(
    call, vae_folder, tmp_path, monkeypatch
):
    source = make_tree(tmp_path / "tree")
    encode = Autoencoder.encode
    calls = []

    def stops(self, images):
        calls.append(len(images))
        if len(calls) > 8 + 5:
            raise KeyboardInterrupt
        return encode(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Autoencoder, "encode", stops)
        assert call(encode_latents, *encode_flags(source, tmp_path / "data", vae_folder))[0] == 130
    (source / "class1/001.png").rename(source / "class1/000.png")
    code, out = call(encode_latents, *encode_flags(source, tmp_path / "data", vae_folder))
    assert code == 2 and "names_and_labels was" in out


def test_preview_shows_images_reconstructions_and_latents(call, vae_folder, tmp_path):
    given = ["--source", FASHION / "images.zip", "--resolution", 32, "--limit", 40]
    code, out = call(encode_latents, *given, "--vae", FASHION / "vae", "--dest", tmp_path / "right")
    assert code == 0 and "PSNR 3" in out and "poor" not in out
    picture = np.asarray(Image.open(tmp_path / "right/preview.png"))
    assert picture.shape[0] > 8 * 128 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 500
    code, out = call(encode_latents, *given, "--vae", vae_folder, "--dest", tmp_path / "wrong")
    assert code == 0 and f"poor; is {vae_folder} the VAE for these?" in out


def test_values_beyond_float16_are_refused_with_the_remedy(call, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Autoencoder, "encode", lambda self, images: torch.full((len(images), 8, 8, 8), 1e6)
    )
    vae = make_vae(tmp_path / "vae")
    code, out = call(encode_latents, *encode_flags(tree, tmp_path / "data", vae))
    assert code == 2 and "float16 cannot" in out and "--dtype float32" in out
    assert (
        call(encode_latents, *encode_flags(tree, tmp_path / "data", vae, "--dtype", "float32"))[0]
        == 0
    )


def test_a_worker_that_is_killed_ends_in_one_line(call, tree, vae_folder, tmp_path, monkeypatch):
    from preprocessing.images import SquareReader

    parent, read = os.getpid(), SquareReader.read

    def dies(self, source, i):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, source, i)

    monkeypatch.setattr(SquareReader, "read", dies)
    code, out = call(
        encode_latents, *encode_flags(tree, tmp_path / "data", vae_folder, "--num-workers", 1)
    )
    assert (
        code == 2
        and "a process that decodes images ended" in out
        and "--num-workers" in out
        and "Traceback" not in out
    )


def test_tf32_is_a_gpus(call, tree, vae_folder, tmp_path):
    code, out = call(
        encode_latents, *encode_flags(tree, tmp_path / "data", vae_folder, "--precision", "tf32")
    )
    assert code == 2 and "--precision tf32" in out


def test_skipped_images_are_told_with_their_shard(call, vae_folder, tmp_path):
    source = make_tree(tmp_path / "tree")
    for i in (3, 12, 15, 18, 21):
        (source / f"class0/{i:03d}.png").write_bytes(b"")
    given = encode_flags(source, tmp_path / "data", vae_folder, "--skip-bad", "--shard-size", 4)
    code, out = call(encode_latents, *given)
    assert code == 0 and "5 skipped" in out
    rows = [json.loads(line) for line in (tmp_path / "data/skipped.jsonl").read_text().splitlines()]
    assert [row["shard"] for row in rows] == ["00000.npy"] + 4 * [
        "00001.npy"
    ]  # the second shard is empty, and is no shard
    manifest = read_manifest(tmp_path / "data")
    assert [shard["file"] for shard in manifest.shards] == [
        "00000.npy",
        "00002.npy",
        "00003.npy",
        "00004.npy",
        "00005.npy",
    ]
    assert (
        len(LatentCache(tmp_path / "data")) == 19
        and "complete: 19" in call(encode_latents, *given)[1]
    )


def test_a_disk_that_fails_is_no_bad_image(call, tree, vae_folder, tmp_path, monkeypatch):
    """--skip-bad does not skip what could not be read this time."""
    from preprocessing.sources import ImageSource

    opened = ImageSource.open

    def fails(self, i):
        if i == 13:
            raise OSError(5, "Input/output error")
        return opened(self, i)

    given = encode_flags(tree, tmp_path / "data", vae_folder, "--skip-bad", "--num-workers", 1)
    with monkeypatch.context() as patch:
        patch.setattr(ImageSource, "open", fails)
        code, out = call(encode_latents, *given)
    assert (
        code == 2
        and "class1/016.png could not be read (Input/output error): when that is mended" in out
    )
    assert [path.name for path in (tmp_path / "data/partial").glob("*.npy.json")] == [
        "00000.npy.json"
    ]
    assert call(encode_latents, *given)[0] == 0 and read_manifest(tmp_path / "data").count == 24


def test_a_batch_that_memory_cannot_hold_is_one_line(call, tree, vae_folder, tmp_path, monkeypatch):
    encode = Autoencoder.encode

    def full(self, images):
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return encode(self, images)

    monkeypatch.setattr(Autoencoder, "encode", full)
    code, out = call(encode_latents, *encode_flags(tree, tmp_path / "data", vae_folder))
    assert (
        code == 2
        and "--batch-size 4 is more than cpu has memory for" in out
        and "Traceback" not in out
    )


def test_bits_do_not_depend_on_torchs_threads(call, tmp_path):
    """They would: a convolution or a norm adds up in another order on two threads."""
    given = [
        "--source",
        FASHION / "images.zip",
        "--resolution",
        32,
        "--vae",
        FASHION / "vae",
        "--limit",
        42,
        "--batch-size",
        7,
    ]
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert call(encode_latents, *given, "--dest", tmp_path / str(threads))[0] == 0
    finally:
        torch.set_num_threads(1)
    assert file_contents(tmp_path / "1") == file_contents(tmp_path / "2")


def test_a_bad_preview_is_drawn_anew_when_the_vae_is_changed(
    call, vae_folder, tmp_path, monkeypatch
):
    given = [
        "--source",
        FASHION / "images.zip",
        "--resolution",
        32,
        "--limit",
        40,
        "--dest",
        tmp_path / "data",
        "--vae",
    ]
    encode = Autoencoder.encode

    def stops(self, images):
        if len(images) > 1:
            raise KeyboardInterrupt
        return encode(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Autoencoder, "encode", stops)
        code, out = call(encode_latents, *given, vae_folder)
        assert code == 130 and "poor" in out
    before = (tmp_path / "data/preview.png").read_bytes()
    code, out = call(encode_latents, *given, FASHION / "vae")
    assert code == 0 and "PSNR 3" in out and (tmp_path / "data/preview.png").read_bytes() != before


def test_a_manifest_that_cannot_be_read_is_not_written_over(call, tree, vae_folder, tmp_path):
    given = encode_flags(tree, tmp_path / "data", vae_folder)
    assert call(encode_latents, *given)[0] == 0
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    for text in (json.dumps(manifest | {"format_version": 2}).encode(), b"\xff", b"{}"):
        (tmp_path / "data/manifest.json").write_bytes(text)
        code, out = call(encode_latents, *given)
        assert (
            code == 2
            and "holds a cache that this code cannot read" in out
            and "Traceback" not in out
        )
        assert (tmp_path / "data/manifest.json").read_bytes() == text


def test_pinning_a_batch_does_not_change_its_counts(monkeypatch):
    """torch pins what is in a named tuple by copying it, and a Counter by adding it to itself."""
    from collections import Counter

    from torch.utils.data._utils.pin_memory import pin_memory

    from preprocessing.encoding import DecodedBatch

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *device: self + 0)
    batch = DecodedBatch(0, 4, torch.ones(4), np.arange(4), [], Counter({"PNG RGB": 4}))
    pinned = pin_memory(batch)
    assert (
        pinned.kinds == Counter({"PNG RGB": 4})
        and pinned.pixels is not batch.pixels
        and pinned.labels is batch.labels
    )


def test_a_source_that_goes_away_is_no_bad_image(call, vae_folder, tmp_path, monkeypatch):
    from preprocessing.sources import ImageSource

    source, opened = make_tree(tmp_path / "tree"), ImageSource.open

    def goes(self, i):
        if i == 13:
            (tmp_path / "tree").rename(tmp_path / "elsewhere")
        return opened(self, i)

    monkeypatch.setattr(ImageSource, "open", goes)
    code, out = call(
        encode_latents,
        *encode_flags(source, tmp_path / "data", vae_folder, "--skip-bad", "--num-workers", 0),
    )
    assert code == 2 and "could not be read (No such file or directory)" in out


def test_a_record_without_its_files_is_done_again(call, tree, vae_folder, tmp_path):
    given, dest = encode_flags(tree, tmp_path / "data", vae_folder), tmp_path / "data"
    assert call(encode_latents, *given)[0] == 0
    whole, manifest = file_contents(dest), read_manifest(dest)
    (dest / "manifest.json").unlink()
    (dest / "partial").mkdir()
    (dest / "partial/plan.json").write_text(json.dumps(manifest.encoding["plan"]))
    for entry in manifest.shards:
        (dest / "partial" / f"{entry['file']}.json").write_text(json.dumps(entry))
    (dest / "moments/00001.npy").unlink()
    assert call(encode_latents, *given)[0] == 0 and file_contents(dest) == whole


def test_the_cache_is_not_made_inside_its_source(call, tree, vae_folder, tmp_path):
    code, out = call(encode_latents, *encode_flags(tree, tree / "cache", vae_folder))
    assert code == 2 and "lies in --source" in out and not (tree / "cache").exists()


DIFFERENT = """
import os, sys
from common import cli
from preprocessing import encode_latents
place = sys.argv.index("--source") + 1
sys.argv[place] += os.environ["RANK"]
cli.run(encode_latents.main)
"""


def test_processes_that_see_different_sources_stop(vae_folder, tmp_path):
    make_tree(tmp_path / "tree0"), make_tree(tmp_path / "tree1", images=23)
    (tmp_path / "different.py").write_text(DIFFERENT)
    given = encode_flags(tmp_path / "tree", tmp_path / "data", vae_folder)
    with pytest.raises(
        AssertionError, match=r"process 1 does not see what process 0 sees \(images was 24, is 23"
    ):
        torchrun(2, tmp_path / "different.py", *given)
    assert not (tmp_path / "data").exists()
