"""Test keyed random numbers: known answers, independence of the batch, and distributions."""

import torch

from common.keyed_random import (
    MULTIPLIERS,
    KeyedRandom,
    Purpose,
    make_round_keys,
    normal,
    philox,
    uniform,
)


def test_philox_matches_known_answers():
    """The answers are kat_vectors of Random123 for philox4x32 with 10 rounds."""
    max_word = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((max_word,) * 4, (max_word, max_word), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    multipliers = torch.tensor(MULTIPLIERS[::-1])
    for counter, key, expected in cases:
        words = philox(torch.tensor(counter), make_round_keys(torch.tensor(key)), multipliers)
        assert tuple(words.tolist()) == expected


def test_one_draw_for_several_purposes_equals_separate_draws():
    shapes = {Purpose.NOISE: (4, 3, 3), Purpose.POSTERIOR: (5,)}
    random = KeyedRandom(3, "cpu", {Purpose.TIMESTEP: (), Purpose.CROP: (3,)}, shapes)
    position = torch.tensor([0, 7, 2**33 + 1])
    values = random.draw(position, draw=2)
    assert values.keys() == {Purpose.TIMESTEP, Purpose.CROP, *shapes}
    for purpose in (Purpose.TIMESTEP, Purpose.CROP):
        shape = values[purpose].shape[1:]
        assert torch.equal(values[purpose], uniform(3, purpose, position, shape, draw=2))
    for purpose, shape in shapes.items():
        assert torch.equal(values[purpose], normal(3, purpose, position, shape, draw=2))


def test_numbers_of_a_position_do_not_depend_on_the_batch():
    batch = normal(3, Purpose.NOISE, torch.arange(50), (4, 3, 3))
    for positions in ([7], [49, 0, 12]):
        part = normal(3, Purpose.NOISE, torch.tensor(positions), (4, 3, 3))
        assert torch.equal(part, batch[positions])


def test_numbers_depend_on_seed_purpose_position_and_draw():
    position = torch.tensor([5, 5 + 2**32])
    base = uniform(0, Purpose.TIMESTEP, position)
    assert base[0] != base[1]
    for other in (
        uniform(1, Purpose.TIMESTEP, position),
        uniform(0, Purpose.CLASS, position),
        uniform(0, Purpose.TIMESTEP, position, draw=1),
    ):
        assert not torch.isclose(base, other).any()


def test_sample_moments_match_the_distributions():
    x = normal(0, Purpose.INITIAL_NOISE, torch.arange(2000), (10, 10))
    n = x.numel()
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert abs((x[:, 0, 0] * x[:, 0, 1]).mean()) < 4 / 2000**0.5  # numbers of one Box-Muller pair
    u = uniform(0, Purpose.TIMESTEP, torch.arange(100_000))
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / 1e5) ** 0.5
