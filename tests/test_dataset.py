import json
import shutil

import numpy as np
import pytest
import torch

from dataset import TrainingStream, shuffled
from files import write_array, write_file
from latent_cache import CacheError, LatentCache, read_manifest


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 100, 1023, 1025, 10_000])
def test_every_epoch_is_a_permutation_of_its_own(size):
    epochs = [shuffled(np.arange(size) + k * size, size, seed=3) for k in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(size))
    if size > 8:
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[0], shuffled(np.arange(size), size, seed=4))


def test_shuffle_looks_uniform():
    """Chi-squared of where the first and the middle place send 1,000 epochs, and no correlation of neighbours."""
    size, epochs = 50, 5000
    for place in (0, 25):
        hits = np.bincount(shuffled(np.arange(epochs) * size + place, size, seed=0), minlength=size)
        chi2 = ((hits - epochs / size) ** 2 / (epochs / size)).sum()
        assert chi2 < size - 1 + 4 * (2 * (size - 1)) ** 0.5
    order = shuffled(np.arange(100_000), 100_000, seed=0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / 100_000**0.5


def test_shuffle_needs_no_permutation_in_memory():
    index = shuffled(np.arange(10**9 - 128, 10**9 + 128), 10**9, seed=0)  # a billion images, across an epoch's end
    assert index.min() >= 0 and index.max() < 10**9 and len(np.unique(index)) > 250


def test_processes_share_one_global_batch(cache):
    data = LatentCache(cache)
    for step in (0, 2, 3, 11):  # 24 images in batches of 8: the epoch turns at 3, 6, 9
        whole = TrainingStream(data, 5, 8)[step]
        for processes in (2, 4):
            parts = [TrainingStream(data, 5, 8, rank, processes)[step] for rank in range(processes)]
            for joined, expected in zip(map(torch.cat, zip(*parts)), whole):
                assert torch.equal(joined, expected)


def test_an_epoch_shows_every_image_once(cache):
    data = LatentCache(cache)
    stream = TrainingStream(data, 5, 8)
    rows = torch.cat([stream[step][1].flatten(1) for step in (3, 4, 5)])
    stored = data.gather(np.arange(24))[0].flatten(1)
    assert sorted(map(bytes, rows.numpy())) == sorted(map(bytes, stored.numpy()))


def test_gather_returns_rows_in_the_order_asked(cache):
    data = LatentCache(cache)
    index = np.array([23, 0, 9, 10, 11, 0])
    moments, labels = data.gather(index)
    for row, i in enumerate(index):
        shard, offset = divmod(i, 10)
        np.testing.assert_array_equal(moments[row], np.load(cache / f"moments/0000{shard}.npy")[offset])
        assert labels[row] == np.load(cache / f"labels/0000{shard}.npy")[offset]


def test_loader_with_workers_is_the_stream(cache):
    stream = TrainingStream(LatentCache(cache), 0, 8)
    for step, batch in zip(range(2, 6), stream.loader(2, 6, num_workers=2, pin_memory=False), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, stream[step]))


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
    with pytest.raises(CacheError, match=r"00001\.npy.*\(10, 4, 8, 8\).*4 channels are latents.*8 channels"):
        LatentCache(copied)


def test_faults_are_named(copied):
    write_array(copied / "labels/00002.npy", np.array([0, 1, 2, 3], np.int64))
    with pytest.raises(CacheError, match=r"00002\.npy has labels outside 0\.\.2"):
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
