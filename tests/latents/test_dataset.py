"""Test the training stream: shuffling, shares of processes, flips, and DataLoader workers."""

import numpy as np
import pytest
import torch

from common.keyed_random import Purpose, uniform
from dataset import CachedBatch, TrainingStream, to_image_index
from latents.cache import LatentCache


def have_equal_tensors(a: CachedBatch, b: CachedBatch) -> bool:
    names = ("stream_position", "moments", "labels")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 100, 1023, 1025, 10_000])
def test_every_epoch_is_a_different_permutation(size):
    epochs = [to_image_index(np.arange(size) + k * size, size, seed=3) for k in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(size))
    if size > 8:
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[0], to_image_index(np.arange(size), size, seed=4))


def test_shuffle_is_uniform_over_epochs():
    """Test the image at two positions with chi-squared, and the correlation of neighbours."""
    size, epochs = 50, 5000
    for position in (0, 25):
        image_index = to_image_index(np.arange(epochs) * size + position, size, seed=0)
        counts = np.bincount(image_index, minlength=size)
        chi_squared = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
        assert chi_squared < size - 1 + 4 * (2 * (size - 1)) ** 0.5
    order = to_image_index(np.arange(100_000), 100_000, seed=0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / 100_000**0.5


@pytest.mark.parametrize(
    ("size", "rounds"),
    [(5, 1000), (50, 4000), pytest.param(1000, 5000, marks=pytest.mark.long)],
)
def test_shuffle_is_uniform_over_epochs_and_seeds(size, rounds):
    """Test that chi-squared of the image at three positions is neither too large nor too small."""
    positions = np.array([0, size // 2, size - 1])
    by_epoch = []
    for position in positions:
        image_index = to_image_index(np.arange(rounds) * size + position, size, seed=7)
        by_epoch.append(np.bincount(image_index, minlength=size))
    by_seed = np.zeros((3, size))
    for seed in range(rounds):
        by_seed[range(3), to_image_index(positions, size, seed)] += 1
    expected = rounds / size
    degrees_of_freedom = size - 1
    chi_squared = ((np.array([*by_epoch, *by_seed]) - expected) ** 2 / expected).sum(1)
    low = degrees_of_freedom - 4 * (2 * degrees_of_freedom) ** 0.5
    high = degrees_of_freedom + 5 * (2 * degrees_of_freedom) ** 0.5
    assert (low < chi_squared).all() and (chi_squared < high).all(), chi_squared


def test_images_at_neighbouring_positions_are_independent():
    """Test pairs of neighbours with chi-squared, with the images divided into eight groups."""
    size = 1 << 20
    group = to_image_index(np.arange(200_000), size, seed=11) * 8 // size
    pairs = np.bincount(group[:-1] * 8 + group[1:], minlength=64)
    expected = pairs.sum() / 64
    assert ((pairs - expected) ** 2 / expected).sum() < 63 + 5 * 126**0.5


def test_a_billion_images_can_be_shuffled():
    across_an_epoch_end = np.arange(10**9 - 128, 10**9 + 128)
    image_index = to_image_index(across_an_epoch_end, 10**9, seed=0)
    assert image_index.min() >= 0 and image_index.max() < 10**9
    assert len(np.unique(image_index)) > 250

    sample = to_image_index(np.arange(0, 10**9, 10**4), 10**9, seed=0)
    assert len(np.unique(sample)) == len(sample)
    assert abs(sample.mean() / 10**9 - 0.5) < 0.005


def test_shuffle_of_one_image():
    assert to_image_index(np.arange(5), 1, 0).tolist() == 5 * [0]


def test_shares_of_processes_make_up_the_global_batch(cache):
    data = LatentCache(cache)
    for step in (0, 2, 3, 11):  # 24 images in batches of 8: epochs begin at steps 3, 6, 9
        global_batch = TrainingStream(data, 5, 8)[step]
        for processes in (2, 4):
            parts = [TrainingStream(data, 5, 8, rank, processes)[step] for rank in range(processes)]
            for name in ("stream_position", "moments", "labels"):
                joined = torch.cat([getattr(part, name) for part in parts])
                assert torch.equal(joined, getattr(global_batch, name))


def test_no_two_processes_read_the_same_image(cache):
    data = LatentCache(cache)
    for step in range(7):  # 24 images in batches of 8
        parts = [TrainingStream(data, 5, 8, rank, 4)[step] for rank in range(4)]
        positions = torch.cat([part.stream_position for part in parts])
        assert torch.equal(positions, torch.arange(8 * step, 8 * step + 8))
        if step % 3 == 2:  # the last step of an epoch
            images = to_image_index(np.arange(8 * step - 16, 8 * step + 8), 24, 5)
            assert sorted(images) == list(range(24))


def test_an_epoch_contains_every_image_once(cache):
    data = LatentCache(cache)
    stream = TrainingStream(data, 5, 8)
    rows = torch.cat([stream[step].moments.flatten(1) for step in (3, 4, 5)])
    stored_rows = data.gather(np.arange(24))[0].flatten(1)
    assert sorted(map(bytes, rows.numpy())) == sorted(map(bytes, stored_rows.numpy()))


def test_loader_processes_yield_the_stream_in_order(cache):
    stream = TrainingStream(LatentCache(cache), 0, 8)
    loader = stream.read_batches(2, 6, num_workers=2, pin_memory=False)
    for step, batch in zip(range(2, 6), loader, strict=True):
        assert have_equal_tensors(batch, stream[step])


def test_flips_depend_on_the_seed_and_the_position(flipped_cache):
    data = LatentCache(flipped_cache)
    batch = TrainingStream(data, 5, 8)[4]
    image_index = to_image_index(batch.stream_position.numpy(), 24, 5)
    plain, mirrored = (data.gather(image_index, np.full(8, flip))[0] for flip in (False, True))
    is_flipped = uniform(5, Purpose.FLIP, batch.stream_position) < 0.5
    assert 0 < is_flipped.sum() < 8
    assert torch.equal(batch.moments, torch.where(is_flipped[:, None, None, None], mirrored, plain))
    for rank in range(2):
        share = TrainingStream(data, 5, 8, rank, 2)[4]
        assert torch.equal(share.moments, batch.moments[4 * rank : 4 * rank + 4])
    many_flips = uniform(5, Purpose.FLIP, torch.arange(4000)) < 0.5
    assert abs(many_flips.float().mean() - 0.5) < 0.04


def test_a_cache_in_memory_yields_the_same_stream(cache, flipped_cache):
    for root in (cache, flipped_cache):
        on_disk = TrainingStream(LatentCache(root), 1, 8)
        data = LatentCache(root)
        data.load_into_ram()
        in_ram = TrainingStream(data, 1, 8)
        for step in (0, 3):
            assert have_equal_tensors(on_disk[step], in_ram[step])
        first = next(iter(in_ram.read_batches(0, 2, num_workers=1, pin_memory=False)))
        assert have_equal_tensors(first, on_disk[0])
