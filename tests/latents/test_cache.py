"""Test reading, errors, joined caches, shared memory, and the limit on open files."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import train
from common.files import write_array, write_file
from common.npy_file import NpyFile
from latents import cache as cache_module
from latents.cache import CacheError, LatentCache
from latents.manifest import read_manifest
from latents.shard_reader import PREFETCH_BATCHES, PrefetchPolicy
from tests.helpers import ROOT, run_ranks, train_flags


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_gather_returns_rows_in_the_requested_order(cache):
    image_index = np.array([23, 0, 9, 10, 11, 0])
    moments, labels = LatentCache(cache).gather(image_index)
    for i, (shard, row) in enumerate(zip(*np.divmod(image_index, 10))):
        file = f"0000{shard}.npy"
        np.testing.assert_array_equal(moments[i], np.load(cache / "moments" / file)[row])
        assert labels[i] == np.load(cache / "labels" / file)[row]


def test_prefetching_does_not_change_the_moments(cache, monkeypatch):
    prefetched = []
    prefetch = NpyFile.prefetch

    def record_prefetch(file, row):
        prefetched.append((file.path.name, row))
        prefetch(file, row)

    monkeypatch.setattr(NpyFile, "prefetch", record_prefetch)
    data = LatentCache(cache)
    image_index = np.arange(24)[::-1]
    expected = data.gather(image_index)[0]
    (policy,) = data._prefetch_policies.values()
    prefetched.clear()
    policy.remaining_batches = 1
    assert torch.equal(data.gather(image_index)[0], expected)
    shards, rows = np.divmod(np.arange(24), 10)
    assert prefetched == [(f"0000{shard}.npy", row) for shard, row in zip(shards, rows)]


def test_prefetching_ends_a_few_batches_after_a_slow_batch():
    policy = PrefetchPolicy()
    policy.update(num_rows=100, row_bytes=10_000, seconds=1e-4)
    assert policy.remaining_batches == 0
    policy.update(num_rows=100, row_bytes=10_000, seconds=0.1)
    for _ in range(PREFETCH_BATCHES):
        assert policy.remaining_batches > 0
        policy.update(num_rows=100, row_bytes=10_000, seconds=1e-4)
    assert policy.remaining_batches == 0


def test_missing_manifest_is_reported(cache_copy):
    (cache_copy / "manifest.json").unlink()
    with pytest.raises(CacheError, match=r"no manifest\.json.*preprocessing\.encode_latents"):
        LatentCache(cache_copy)


def test_error_states_why_a_folder_is_not_a_cache(cache, cache_copy, tmp_path):
    with pytest.raises(CacheError, match="the same cache is listed twice"):
        LatentCache(cache, cache / ".." / cache.name)
    with pytest.raises(CacheError, match="nothing does not exist"):
        LatentCache(tmp_path / "nothing")
    (cache_copy / "manifest.json").unlink()
    (cache_copy / "partial").mkdir()
    with pytest.raises(CacheError, match="is incomplete; rerun the command that created it"):
        LatentCache(cache_copy)
    (tmp_path / "repa/vae-sd").mkdir(parents=True)
    with pytest.raises(CacheError, match=r"is in REPA's format; .*preprocessing\.import_repa"):
        LatentCache(tmp_path / "repa")


def test_shards_that_the_manifest_does_not_list_are_ignored(cache_copy):
    np.save(cache_copy / "moments/00003.npy", np.full((5, 8, 8, 8), np.nan, np.float16))
    assert len(LatentCache(cache_copy)) == 24


def test_latents_are_not_mistaken_for_moments(cache_copy):
    write_array(cache_copy / "moments/00001.npy", np.zeros((10, 4, 8, 8), np.float16))
    message = r"00001\.npy.*\(10, 4, 8, 8\).*4 channels indicate latents.*8 channels"
    with pytest.raises(CacheError, match=message):
        LatentCache(cache_copy)


def test_errors_name_the_damaged_file(cache_copy):
    write_array(cache_copy / "labels/00002.npy", np.array([0, 1, 2, 3], np.int64))
    with pytest.raises(CacheError, match=r"00002\.npy has labels outside 0\.\.2"):
        LatentCache(cache_copy)
    (cache_copy / "moments/00000.npy").write_bytes(b"")
    with pytest.raises(CacheError, match=r"00000\.npy cannot be read.*--repair"):
        LatentCache(cache_copy)
    damaged_header = b"\x93NUMPY\x01\x00\x10\x00{'descr': (\0\0\0\0\n"
    for data in (b"\x93NUMPY", damaged_header):
        (cache_copy / "moments/00000.npy").write_bytes(data)
        with pytest.raises(CacheError, match=r"00000\.npy.*cannot be read"):
            LatentCache(cache_copy)


def test_image_with_non_finite_moments_is_described(cache, cache_copy):
    path = cache_copy / "moments/00001.npy"
    moments = np.load(path)
    moments[0, 0, 0, 0] = np.inf
    write_array(path, moments)
    joined = LatentCache(cache, cache_copy)
    image_index = np.array([3, 34, 40])
    assert joined.describe_non_finite_moments(image_index[::2]) == ""
    assert joined.describe_non_finite_moments(image_index) == (
        f"the moments of image 34 (row 0 of {path}) are not finite; check the cache with "
        f"python -m preprocessing.verify {cache_copy}"
    )


def test_flipped_image_with_non_finite_moments_is_described(flipped_cache, tmp_path):
    root = shutil.copytree(flipped_cache, tmp_path / "data")
    path = root / "mirrored/00000.npy"
    moments = np.load(path)
    moments[2] = np.nan
    write_array(path, moments)
    flipped = LatentCache(root)
    image_index = np.array([2, 5])
    assert flipped.describe_non_finite_moments(image_index, np.array([False, True])) == ""
    description = flipped.describe_non_finite_moments(image_index, np.array([True, True]))
    assert f"image 2 (row 2 of {path})" in description


def test_invalid_manifest_is_reported(cache_copy):
    edit_manifest(cache_copy, format_version=99)
    with pytest.raises(CacheError, match="format version 99"):
        read_manifest(cache_copy)
    edit_manifest(cache_copy, format_version=1, count=25)
    with pytest.raises(CacheError, match="contain 24 images, but count is 25"):
        LatentCache(cache_copy)
    write_file(cache_copy / "manifest.json", b"{")
    with pytest.raises(CacheError, match="not a valid manifest"):
        LatentCache(cache_copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": 4},
        {"dtype": "float17"},
        {"latent_shape": [4, 8]},
        {"shards": [{"file": "00000.npy"}]},
        {"shards": ["00000.npy"]},
        {"shards": [{"file": "00000.npy", "count": 10, "sha256": "abc"}]},
        {"flips": "no"},
        {"encoding": None},
    ],
)
def test_manifest_with_invalid_values_is_reported(cache_copy, changes):
    edit_manifest(cache_copy, **changes)
    with pytest.raises(CacheError, match="not a valid manifest"):
        read_manifest(cache_copy)


def test_joined_caches_are_read_as_one(cache, cache_copy):
    # The second cache differs from the first in its second shard.
    path = cache_copy / "moments/00001.npy"
    write_array(path, (np.load(path) + 1).astype(np.float16))
    single = LatentCache(cache)
    joined = LatentCache(cache, cache_copy)
    assert len(joined) == 48 and joined.manifest.count == 48 and len(joined.manifest.shards) == 6
    image_index = np.array([47, 3, 24, 35, 11, 23])
    in_second = image_index >= 24
    for root, is_in_root in ((cache, ~in_second), (cache_copy, in_second)):
        expected = LatentCache(root).gather(image_index[is_in_root] % 24)
        for rows, expected_rows in zip(joined.gather(image_index), expected, strict=True):
            assert torch.equal(rows[is_in_root], expected_rows)
    np.testing.assert_allclose(joined.manifest.mean, single.manifest.mean)
    np.testing.assert_allclose(joined.manifest.std, single.manifest.std)


def compute_latent_statistics(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the standard deviation of latents per channel."""
    mean, std = moments.double().chunk(2, 1)
    center = mean.mean((0, 2, 3))
    return center, ((mean**2 + std**2).mean((0, 2, 3)) - center**2).sqrt()


def test_statistics_of_joined_caches_include_all_images(cache, cache_copy):
    shifted_moments = (np.load(cache_copy / "moments/00001.npy") + 1).astype(np.float16)
    write_array(cache_copy / "moments/00001.npy", shifted_moments)
    parts = [LatentCache(root).gather(np.arange(24))[0] for root in (cache, cache_copy)]
    mean, std = compute_latent_statistics(parts[1])
    edit_manifest(cache_copy, mean=mean.tolist(), std=std.tolist())
    joined = LatentCache(cache, cache_copy).manifest
    mean, std = compute_latent_statistics(torch.cat(parts))
    np.testing.assert_allclose(joined.mean, mean)
    np.testing.assert_allclose(joined.std, std)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0.9}, "scale is 0.7 in one and 0.9 in the other"),
        (
            {"class_names": ["class0", "dog", "class2"]},
            "class_names is 'class1' for class 1 in one and 'dog' for class 1",
        ),
        (
            {"class_names": ["a", "b"], "num_classes": 2},
            "class_names is 3 classes in one and 2 classes",
        ),
        ({"vae_fingerprint": "x"}, "vae_fingerprint is"),
    ],
)
def test_caches_with_different_settings_cannot_be_joined(cache, cache_copy, changes, message):
    edit_manifest(cache_copy, **changes)
    with pytest.raises(CacheError, match=message):
        LatentCache(cache, cache_copy)


def test_a_run_cannot_resume_with_joined_caches_in_another_order(call, cache, cache_copy, tmp_path):
    edit_manifest(cache_copy, mean=[0.1, 0.2, 0.3, 0.4])
    _, _, *flags = train_flags(cache, tmp_path, "run")
    for steps, order, expected_code in (
        (1, (cache, cache_copy), 0),
        (2, (cache_copy, cache), 2),
        (2, (cache, cache_copy), 0),
    ):
        code, out = call(train, "--data-dir", *order, *flags, "--max-train-steps", steps)
        assert code == expected_code and ("joined differ" in out) == (expected_code == 2), out


def test_processes_of_a_machine_share_one_copy(cache):
    assert run_ranks(2, "tests.latents.sharing", cache).count("shared") == 2


def test_a_cache_larger_than_the_memory_is_refused(cache, monkeypatch):
    monkeypatch.setattr(cache_module, "get_available_memory", lambda: 1000)
    message = r"--cache-in-ram needs 0\.0 GB of memory, but this machine has only 0\.0 GB available"
    with pytest.raises(CacheError, match=message):
        LatentCache(cache).load_into_ram()


def test_number_of_open_shards_is_limited(cache, monkeypatch):
    monkeypatch.setattr(cache_module, "MAX_OPEN_FILES", 2)
    data = LatentCache(cache)
    image_index = np.array([23, 0, 11, 5, 22])
    moments, _ = data.gather(image_index)
    assert len(data.open_shards) == 2
    monkeypatch.undo()
    assert torch.equal(moments, LatentCache(cache).gather(image_index)[0])


READ_WITH_FEW_FILES = """
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


def test_cache_may_have_more_shards_than_the_open_file_limit(cache_copy):
    moments = np.load(cache_copy / "moments/00000.npy")[:3]
    shards = []
    for k in range(400):
        file = f"{k:05d}.npy"
        shards.append({"file": file, "count": 3})
        np.save(cache_copy / "moments" / file, moments)
        np.save(cache_copy / "labels" / file, np.zeros(3, np.int64))
    edit_manifest(cache_copy, shards=shards, count=1200)
    result = subprocess.run(
        [sys.executable, "-c", READ_WITH_FEW_FILES, str(cache_copy)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0 and "read" in result.stdout, result.stderr


@pytest.mark.parametrize("folder", ["moments", "labels"])
def test_shard_truncated_before_it_is_opened_is_reported(cache_copy, folder):
    path = cache_copy / folder / "00001.npy"
    os.truncate(path, path.stat().st_size - 1)
    message = rf"{folder}/00001\.npy cannot be read \(the file is truncated\); .*--repair"
    with pytest.raises(CacheError, match=message):
        LatentCache(cache_copy)


def test_shard_truncated_while_it_is_open_is_reported(cache_copy):
    data = LatentCache(cache_copy)
    image_index = np.arange(24)
    data.gather(image_index)
    os.truncate(cache_copy / "moments/00001.npy", 5000)
    message = r"moments/00001\.npy cannot be read .*truncated after it was opened.*--repair"
    with pytest.raises(CacheError, match=message):
        data.gather(image_index)
    with pytest.raises(CacheError, match="truncated"):
        data.load_into_ram()
    data.gather(image_index[:10])  # other shards can still be read


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shard_truncated_during_training_ends_the_run_in_one_line(
    call, cache_copy, tmp_path, monkeypatch, num_workers
):
    gather = LatentCache.gather

    def truncate_and_gather(self, *args):
        gather(self, *args)  # opens the shards
        for path in (cache_copy / "moments").iterdir():
            os.truncate(path, 200)
        return gather(self, *args)

    monkeypatch.setattr(LatentCache, "gather", truncate_and_gather)
    flags = train_flags(cache_copy, tmp_path, "run", "--num-workers", num_workers)
    code, out = call(train, *flags)
    assert code == 2 and "error: " in out.splitlines()[-1] and "cannot be read" in out, out
    assert "Bus error" not in out and "CacheError" not in out and "Traceback" not in out
