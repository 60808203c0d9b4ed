import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from common import machine
from common.files import write_array, write_file
from common.keyed_random import Purpose, uniform
from dataset import CachedBatch, TrainingStream, to_image_index
from latents import cache as cache_module
from latents.cache import CacheError, LatentCache, read_manifest
from tests.helpers import ROOT, torchrun, train_flags


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 100, 1023, 1025, 10_000])
def test_every_epoch_is_a_permutation_of_its_own(size):
    epochs = [to_image_index(np.arange(size) + k * size, size, seed=3) for k in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(size))
    if size > 8:
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[0], to_image_index(np.arange(size), size, seed=4))


def test_shuffle_looks_uniform():
    """Chi-squared of where the first and the middle place send 1,000 epochs, and no correlation of neighbours."""
    size, epochs = 50, 5000
    for place in (0, 25):
        hits = np.bincount(
            to_image_index(np.arange(epochs) * size + place, size, seed=0), minlength=size
        )
        chi2 = ((hits - epochs / size) ** 2 / (epochs / size)).sum()
        assert chi2 < size - 1 + 4 * (2 * (size - 1)) ** 0.5
    order = to_image_index(np.arange(100_000), 100_000, seed=0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / 100_000**0.5


def test_shuffle_needs_no_permutation_in_memory():
    index = to_image_index(
        np.arange(10**9 - 128, 10**9 + 128), 10**9, seed=0
    )  # a billion images, across an epoch's end
    assert index.min() >= 0 and index.max() < 10**9 and len(np.unique(index)) > 250


def test_processes_share_one_global_batch(cache):
    data = LatentCache(cache)
    for step in (0, 2, 3, 11):  # 24 images in batches of 8: the epoch turns at 3, 6, 9
        whole = TrainingStream(data, 5, 8)[step]
        for processes in (2, 4):
            parts = [TrainingStream(data, 5, 8, rank, processes)[step] for rank in range(processes)]
            for name in ("stream_position", "moments", "labels"):
                joined = torch.cat([getattr(part, name) for part in parts])
                assert torch.equal(joined, getattr(whole, name))


def have_equal_tensors(a: CachedBatch, b: CachedBatch) -> bool:
    names = ("stream_position", "moments", "labels")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def test_an_epoch_shows_every_image_once(cache):
    data = LatentCache(cache)
    stream = TrainingStream(data, 5, 8)
    rows = torch.cat([stream[step].moments.flatten(1) for step in (3, 4, 5)])
    stored = data.gather(np.arange(24))[0].flatten(1)
    assert sorted(map(bytes, rows.numpy())) == sorted(map(bytes, stored.numpy()))


def test_gather_returns_rows_in_the_order_asked(cache):
    data = LatentCache(cache)
    index = np.array([23, 0, 9, 10, 11, 0])
    moments, labels = data.gather(index)
    for row, i in enumerate(index):
        shard, offset = divmod(i, 10)
        np.testing.assert_array_equal(
            moments[row], np.load(cache / f"moments/0000{shard}.npy")[offset]
        )
        assert labels[row] == np.load(cache / f"labels/0000{shard}.npy")[offset]


def test_loader_with_workers_is_the_stream(cache):
    stream = TrainingStream(LatentCache(cache), 0, 8)
    for step, batch in zip(
        range(2, 6), stream.read_batches(2, 6, num_workers=2, pin_memory=False), strict=True
    ):
        assert have_equal_tensors(batch, stream[step])


@pytest.fixture
def copied(cache, tmp_path):
    return shutil.copytree(cache, tmp_path / "data")


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_manifest_is_no_cache(copied):
    (copied / "manifest.json").unlink()
    with pytest.raises(CacheError, match=r"no manifest\.json.*preprocessing\.encode_latents"):
        LatentCache(copied)


def test_what_the_manifest_does_not_vouch_for_is_not_read(copied):
    np.save(copied / "moments/00003.npy", np.full((5, 8, 8, 8), np.nan, np.float16))
    assert len(LatentCache(copied)) == 24


def test_latents_are_not_mistaken_for_moments(copied):
    write_array(copied / "moments/00001.npy", np.zeros((10, 4, 8, 8), np.float16))
    with pytest.raises(
        CacheError, match=r"00001\.npy.*\(10, 4, 8, 8\).*4 channels are latents.*8 channels"
    ):
        LatentCache(copied)


def test_faults_are_named(copied):
    write_array(copied / "labels/00002.npy", np.array([0, 1, 2, 3], np.int64))
    with pytest.raises(CacheError, match=r"00002\.npy has labels outside 0\.\.2"):
        LatentCache(copied)
    (copied / "moments/00000.npy").write_bytes(b"")
    with pytest.raises(CacheError, match=r"00000\.npy cannot be read.*--repair"):
        LatentCache(copied)
    (copied / "moments/00000.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(CacheError, match=r"00000\.npy.*cannot be read"):
        LatentCache(copied)
    edit_manifest(copied, format_version=99)
    with pytest.raises(CacheError, match="format version 99"):
        read_manifest(copied)
    edit_manifest(copied, format_version=1, count=25)
    with pytest.raises(CacheError, match="hold 24 images, it says 25"):
        LatentCache(copied)
    write_file(copied / "manifest.json", b"{")
    with pytest.raises(CacheError, match="not a manifest"):
        LatentCache(copied)


@pytest.fixture(scope="module")
def flipped(tmp_path_factory, tree, vae_folder):
    """The cache with mirror images."""
    from common.processes import World
    from preprocessing.build import build_cache
    from preprocessing.encoding import EncodingJob, EncodingSettings

    dest = tmp_path_factory.mktemp("flipped") / "data"
    settings = EncodingSettings(
        str(tree), resolution=32, vae=str(vae_folder), shard_size=10, batch_size=8, flip=True
    )
    build_cache(dest, EncodingJob(settings, "cpu", 0, World()), World())
    return dest


def test_no_two_processes_get_one_image(cache):
    data = LatentCache(cache)
    for step in range(7):  # 24 images in batches of 8
        parts = [TrainingStream(data, 5, 8, rank, 4)[step] for rank in range(4)]
        numbers = torch.cat([part.stream_position for part in parts])
        assert torch.equal(numbers, torch.arange(8 * step, 8 * step + 8))
        if step % 3 == 2:  # an epoch is whole
            images = to_image_index(np.arange(8 * step - 16, 8 * step + 8), 24, 5)
            assert sorted(images) == list(range(24))


@pytest.mark.parametrize(("size", "rounds"), [(5, 1000), (50, 4000), (1000, 5000)])
def test_every_place_goes_everywhere(size, rounds):
    """Chi-squared of where three places go, over many epochs and over many seeds: neither too uneven nor too even."""
    places = np.array([0, size // 2, size - 1])
    by_epoch = [
        np.bincount(to_image_index(np.arange(rounds) * size + place, size, seed=7), minlength=size)
        for place in places
    ]
    by_seed = np.zeros((3, size))
    for seed in range(rounds):
        by_seed[range(3), to_image_index(places, size, seed)] += 1
    expected, freedom = rounds / size, size - 1
    chi2 = ((np.array([*by_epoch, *by_seed]) - expected) ** 2 / expected).sum(1)
    low, high = freedom - 4 * (2 * freedom) ** 0.5, freedom + 5 * (2 * freedom) ** 0.5
    assert (low < chi2).all() and (chi2 < high).all(), chi2


def test_neighbours_are_independent():
    """Where a place goes says nothing about where the next one goes: chi-squared over pairs of eighths."""
    size = 1 << 20
    order = to_image_index(np.arange(200_000), size, seed=11) * 8 // size
    pairs = np.bincount(order[:-1] * 8 + order[1:], minlength=64)
    expected = pairs.sum() / 64
    assert ((pairs - expected) ** 2 / expected).sum() < 63 + 5 * 126**0.5


def test_one_image_and_a_billion():
    assert to_image_index(np.arange(5), 1, 0).tolist() == 5 * [0]
    sample = to_image_index(
        np.arange(0, 10**9, 10**4), 10**9, seed=0
    )  # every ten-thousandth place of a billion
    assert len(np.unique(sample)) == len(sample) and abs(sample.mean() / 10**9 - 0.5) < 0.005


def test_the_stream_mirrors_by_the_seed(flipped):
    data = LatentCache(flipped)
    batch = TrainingStream(data, 5, 8)[4]
    moments = batch.moments
    index = to_image_index(batch.stream_position.numpy(), 24, 5)
    both = [data.gather(index, np.full(8, side))[0] for side in (False, True)]
    mirrored = [not torch.equal(moments[i], both[0][i]) for i in range(8)]
    assert (
        all(torch.equal(moments[i], both[mirrored[i]][i]) for i in range(8))
        and 0 < sum(mirrored) < 8
    )
    for rank in range(2):
        assert torch.equal(
            TrainingStream(data, 5, 8, rank, 2)[4].moments, moments[4 * rank : 4 * rank + 4]
        )
    seen = torch.cat([uniform(5, Purpose.FLIP, torch.arange(4000)) < 0.5])
    assert abs(seen.float().mean() - 0.5) < 0.04


def test_caches_are_joined(cache, copied):
    one, joined = LatentCache(cache), LatentCache(cache, copied)
    assert len(joined) == 48 and joined.manifest.count == 48 and len(joined.manifest.shards) == 6
    index = np.array([47, 3, 24, 30, 23])
    for ours, theirs in zip(joined.gather(index), one.gather(index % 24)):
        assert torch.equal(ours, theirs)
    np.testing.assert_allclose(joined.manifest.mean, one.manifest.mean)
    np.testing.assert_allclose(joined.manifest.std, one.manifest.std)


def test_statistics_of_joined_caches_are_those_of_all_images(cache, copied):
    def of(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = moments.double().chunk(2, 1)
        center = mean.mean((0, 2, 3))
        return center, ((mean**2 + std**2).mean((0, 2, 3)) - center**2).sqrt()

    moved = (np.load(copied / "moments/00001.npy") + 1).astype(np.float16)
    write_array(copied / "moments/00001.npy", moved)
    parts = [LatentCache(root).gather(np.arange(24))[0] for root in (cache, copied)]
    mean, std = of(parts[1])
    edit_manifest(copied, mean=mean.tolist(), std=std.tolist())
    joined, (mean, std) = LatentCache(cache, copied).manifest, of(torch.cat(parts))
    np.testing.assert_allclose(joined.mean, mean)
    np.testing.assert_allclose(joined.std, std)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0.9}, "scale is 0.7 in one, 0.9 in the other"),
        (
            {"class_names": ["class0", "dog", "class2"]},
            "class_names is 'class1' for class 1 in one, 'dog' for class 1",
        ),
        ({"class_names": ["a", "b"]}, "class_names is 3 classes in one, 2 classes"),
        ({"vae_fingerprint": "x"}, "vae_fingerprint is"),
    ],
)
def test_caches_that_do_not_go_together_are_refused(cache, copied, changes, message):
    edit_manifest(copied, **changes)
    with pytest.raises(CacheError, match=message):
        LatentCache(cache, copied)


def test_a_cache_in_memory_is_the_cache(cache, flipped):
    for root in (cache, flipped):
        on_disk, in_ram = LatentCache(root), LatentCache(root)
        in_ram.load_into_ram()
        for step in (0, 3):
            batches = TrainingStream(on_disk, 1, 8)[step], TrainingStream(in_ram, 1, 8)[step]
            assert have_equal_tensors(*batches)
        batches = TrainingStream(in_ram, 1, 8).read_batches(0, 2, num_workers=1, pin_memory=False)
        assert have_equal_tensors(next(iter(batches)), TrainingStream(on_disk, 1, 8)[0])


SHARING = """
import sys, os
import numpy as np
from latents.cache import LatentCache
from common.processes import World
world = World()
cache = LatentCache(sys.argv[1])
cache.load_into_ram(world.rank, world.all_gather)
own = hasattr(cache, "_memory")
sum = cache.gather(np.arange(24))[0].double().sum().item()
assert world.all_gather((own, sum)) == [(True, sum), (False, sum)], (own, sum)
if not own:  # it is one memory, not two
    assert "memfd:latents" in open("/proc/self/maps").read()
world.close()
print("shared", flush=True)
"""


def test_processes_share_one_memory(cache, tmp_path):
    (tmp_path / "sharing.py").write_text(SHARING)
    assert torchrun(2, tmp_path / "sharing.py", cache).count("shared") == 2


def test_a_cache_that_memory_cannot_hold_is_refused(cache, monkeypatch):
    monkeypatch.setattr(cache_module, "available_memory", lambda: 1000)
    with pytest.raises(
        CacheError, match=r"--cache-in-ram needs 0\.0 GB, 0\.0 GB of this machine's are free"
    ):
        LatentCache(cache).load_into_ram()


def test_few_shards_are_open_at_once(cache, monkeypatch):
    monkeypatch.setattr(cache_module, "MAX_OPEN_MAPS", 2)
    data, index = LatentCache(cache), np.array([23, 0, 11, 5, 22])
    assert (
        torch.equal(data.gather(index)[0], LatentCache(cache).gather(index)[0])
        and len(data.open_shards) == 2
    )


MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
import numpy as np
from dataset import TrainingStream
from latents.cache import LatentCache
cache = LatentCache(sys.argv[1])
loader = TrainingStream(cache, 0, 100).read_batches(0, 12, num_workers=1, pin_memory=False)
assert sum(float(batch.moments.double().sum()) for batch in loader) != 0
print("read")
"""


def test_more_shards_than_files_may_be_open(cache, copied, tmp_path):
    manifest = json.loads((copied / "manifest.json").read_text())
    moments = np.concatenate(
        [np.load(copied / "moments" / entry["file"]) for entry in manifest["shards"]]
    )
    entries = []
    for k in range(400):
        entries.append({"file": f"{k:05d}.npy", "count": 3})
        write_array(copied / "moments" / f"{k:05d}.npy", moments[:3])
        write_array(copied / "labels" / f"{k:05d}.npy", np.zeros(3, np.int64))
    edit_manifest(copied, shards=entries, count=1200)
    result = subprocess.run(
        [sys.executable, "-c", MANY, str(copied)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0 and "read" in result.stdout, result.stderr


def test_free_memory_heeds_a_jobs_own_limit(tmp_path, monkeypatch):
    group = tmp_path / "sys/fs/cgroup/job"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("5000000\n")
    (group / "memory.current").write_text("2000000\n")
    (group.parent / "memory.max").write_text("max\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8000000 kB\n")
    monkeypatch.setattr(machine, "Path", lambda path: Path(str(tmp_path) + str(path)))
    assert machine.available_memory() == 3_000_000


def test_joined_caches_in_another_order_are_another_run(call, cache, copied, tmp_path):
    edit_manifest(copied, mean=[0.1, 0.2, 0.3, 0.4])
    given = train_flags(cache, tmp_path, "run")
    for steps, order, outcome in (
        (1, (cache, copied), 0),
        (2, (copied, cache), 2),
        (2, (cache, copied), 0),
    ):
        code, out = call(train, "--data-dir", *order, *given[2:], "--max-train-steps", steps)
        assert code == outcome and ("joined differ" in out) == (outcome == 2), out


def test_what_is_no_cache_is_told_apart(cache, copied, tmp_path):
    with pytest.raises(CacheError, match="stands there twice"):
        LatentCache(cache, cache / ".." / cache.name)
    with pytest.raises(CacheError, match="nothing does not exist"):
        LatentCache(tmp_path / "nothing")
    (copied / "manifest.json").unlink()
    (copied / "partial").mkdir()
    with pytest.raises(CacheError, match="is not finished: run the command that makes it again"):
        LatentCache(copied)
    (tmp_path / "repa/vae-sd").mkdir(parents=True)
    with pytest.raises(CacheError, match=r"is REPA's: .*preprocessing\.import_repa"):
        LatentCache(tmp_path / "repa")
