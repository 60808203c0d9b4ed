import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from common.cli import UserError
from common.keyed_random import Purpose, normal
from experiments import feature_picture, features, representation
from experiments.feature_study import choose, judge, pooled, read, spread
from experiments.representation import cknna, fit_probe, neighbours, principal, wilson
from latents.cache import LatentCache
from models.sit import PRESETS, SiT, SiTConfig
from tests.helpers import make_vae


def random(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_cknna(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Kernel by kernel and entry by entry, from the definition."""
    n = len(a)
    spaces = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    kernels = [[[float(row @ other) for other in x] for row in x] for x in spaces]

    def near(kernel, i):
        return sorted((j for j in range(n) if j != i), key=lambda j: -kernel[i][j])[:k]

    def hsic(one, two):
        both = [[j in near(one, i) and j in near(two, i) for j in range(n)] for i in range(n)]
        left = np.array([[one[i][j] if both[i][j] else 0.0 for j in range(n)] for i in range(n)])
        right = np.array([[two[i][j] if both[i][j] else 0.0 for j in range(n)] for i in range(n)])
        ones, product = np.ones(n), left @ right
        independent = (ones @ left @ ones) * (ones @ right @ ones) / (n - 1) / (n - 2)
        return (
            (np.trace(product) + independent - 2 / (n - 2) * (ones @ product @ ones)) / n / (n - 3)
        )

    return hsic(*kernels) / math.sqrt(hsic(kernels[0], kernels[0]) * hsic(kernels[1], kernels[1]))


def test_cknna_is_its_definition(monkeypatch):
    a = random(40, 6)
    b = a @ random(6, 4, seed=1) + random(40, 4, seed=2)
    expected = naive_cknna(a.numpy(), b.numpy(), 5)
    assert 0.05 < expected < 0.95
    for rows in (2048, 16):  # more and fewer than there are
        monkeypatch.setattr(representation, "ROWS", rows)
        assert cknna(neighbours(a, 5), neighbours(b, 5)) == pytest.approx(expected, rel=1e-10)


def test_cknna_knows_the_same_space_however_it_lies_and_no_other():
    a, b = random(600, 12), random(600, 12, seed=1)
    turned = 7 * a @ torch.linalg.qr(random(12, 12, seed=2))[0]
    to = neighbours(b)
    assert cknna(neighbours(a), neighbours(a)) == pytest.approx(1, abs=1e-12)
    assert cknna(neighbours(a), neighbours(turned)) == pytest.approx(1, abs=1e-9)
    mixed = cknna(neighbours(a + b), to)
    assert cknna(
        neighbours((a + b) @ torch.linalg.qr(random(12, 12, seed=2))[0]), to
    ) == pytest.approx(mixed, abs=1e-9)
    assert abs(cknna(neighbours(a), to)) < 2 * 10 / 600 < 0.1 < mixed


def test_the_probe_is_at_the_minimum_of_what_it_says_it_minimises():
    x = torch.cat(
        (
            random(79, 3) * torch.tensor([1, 20, 0.1]) + 5,
            torch.full((79, 1), 1e6 / 3, dtype=torch.float64),
        ),
        1,
    )  # the last one never changes
    y = (x[:, 0] + random(79, seed=1) > 5).long() + (x[:, 1] > 25).long()
    probe = fit_probe(x, y, 4)  # nothing is of class 3
    scaled = (x[:, :3] - x[:, :3].mean(0)) / x[:, :3].std(0, correction=0)
    scores = scaled @ probe.weight[:, :3].T + probe.bias
    assert (
        torch.allclose(probe.logits(x), scores, atol=1e-9) and probe.weight[:, 3].abs().max() == 0
    )
    error = torch.softmax(scores, 1) - torch.eye(4, dtype=torch.float64)[y]
    assert error.mean(0).abs().max() < 1e-5
    assert (error.T @ scaled / 79 + probe.weight[:, :3] / 79).abs().max() < 1e-5
    assert (probe.logits(x).argmax(1) == y).float().mean() > 0.7


def test_wilson():
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(10, 10)[1] == 1


def test_colours_are_the_principal_components_and_keep_the_sign_asked_for():
    scores = random(50, 3) * torch.tensor([5.0, 2.0, 0.5])
    tokens = scores @ torch.linalg.qr(random(9, 3, seed=1))[0].T + 4
    basis = principal(tokens)
    assert basis.share == pytest.approx(1) and principal(random(50, 9)).share < 0.9
    found, colours = basis.scores(tokens), basis.colours(tokens)
    assert torch.linalg.svdvals(found).tolist() == pytest.approx(
        torch.linalg.svdvals(scores - scores.mean(0)).tolist()
    )
    assert torch.allclose(
        found.T @ found, torch.diag((found**2).sum(0)), atol=1e-9
    )  # along the axes of the variance
    assert colours.amin(0).tolist() == [0, 0, 0] and colours.amax(0).tolist() == pytest.approx(
        [1, 1, 1]
    )
    flipped = found * torch.tensor([-1.0, 1.0, -1.0])
    assert torch.allclose(principal(tokens, flipped).scores(tokens), flipped, atol=1e-9)
    assert (
        basis.colours(1e6 * tokens).amax() == 1 and basis.colours(-1e6 * tokens).amin() == 0
    )  # of what it was not made of
    assert principal(random(9, 2)).colours(random(1, 9, 2)).shape == (
        1,
        9,
        3,
    )  # fewer features than colours


def test_images_are_drawn_without_replacement_and_keep_their_noise(cache):
    stored = LatentCache(cache)
    all_of_them, some = read(stored, 24, seed=3), read(stored, 12, seed=3)
    assert sorted(all_of_them.index) == list(range(24)) and list(all_of_them.index) != list(
        range(24)
    )
    assert (some.index == all_of_them.index[:12]).all() and torch.equal(
        some.noise, all_of_them.noise[:12]
    )
    assert torch.equal(some.labels, torch.from_numpy(stored.labels[some.index].astype(np.int64)))
    assert (read(stored, 24, seed=4).index != all_of_them.index).any()
    own = normal(3, Purpose.NOISE, torch.from_numpy(some.index[5:6]), (4, 8, 8)).float()
    assert torch.equal(some.noise[5:6], own)  # whatever else is drawn
    half = all_of_them.at("linear", 0.25, slice(3, 5))
    assert torch.allclose(half, 0.75 * all_of_them.latents[3:5] + 0.25 * all_of_them.noise[3:5])
    shown = choose(all_of_them, 4)
    assert (shown >= 12).all() and len(set(shown.tolist())) == 4
    assert len(set(all_of_them.labels[shown[:3]].tolist())) == 3  # of three classes there are


def test_features_are_of_the_null_class_and_do_not_depend_on_the_batch(cache):
    torch.manual_seed(0)
    model = SiT(SiTConfig(**PRESETS["SiT-Ti/2"], latent_size=8, num_classes=3)).requires_grad_(
        False
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    data = read(LatentCache(cache), 24, 0)

    def run(size=24):
        return pooled(model, data, "linear", 0.4, [2, 5], size, tqdm(disable=True))

    whole = run()
    x_t, null = data.at("linear", 0.4), torch.full((24,), 3)
    expected = model(x_t, torch.full((24,), 0.4), null, return_blocks=(2, 5))[1]
    for k in (2, 5):
        assert torch.allclose(whole[k], expected[k].mean(1), atol=1e-5)
        assert torch.allclose(run(7)[k], whole[k], atol=1e-4)
    model.y_embedder.embedding_table.weight[:3] += 1
    assert torch.equal(run()[5], whole[5])
    model.y_embedder.embedding_table.weight[3] += 1
    assert not torch.allclose(run()[5], whole[5], atol=1e-2)


def test_a_probe_is_judged_by_the_half_it_has_not_seen(cache):
    data = read(LatentCache(cache), 24, 0)
    told = torch.nn.functional.one_hot(data.labels, 3).double() + 0.1 * random(24, 3)
    assert judge(told, data, 3, None)["accuracy"] == 1
    told[12:] = -told[12:]
    found = judge(told, data, 3, neighbours(told[12:]))
    assert found["accuracy"] < 0.5 and found["low"] <= found["accuracy"] <= found["high"]
    assert found["cknna"] == pytest.approx(1)


def test_blocks_are_spread_from_the_first_to_the_last():
    assert spread(6) == [1, 2, 3, 4, 5, 6] and spread(1) == [1]
    assert len(spread(28)) == 8 and spread(28)[0] == 1 and spread(28)[-1] == 28


def test_a_sheet_has_each_map_in_its_place():
    places = [(0.1, 1), (0.1, 4), (0.9, 1), (0.9, 4)]
    grey = {
        place: np.full((2, 2, 2, 3), value) for place, value in zip(places, (0.1, 0.2, 0.3, 0.4))
    }
    grey[0.9, 4][1, 1, 0] = 0.5  # a token
    seen = np.full((2, 4, 4, 3), 51, np.uint8)
    shown = feature_picture.Maps(
        seen, grey[0.1, 1], {0.1: seen, 0.9: seen}, {0.1: grey[0.1, 1], 0.9: grey[0.1, 1]}, grey
    )
    canvas, step = feature_picture.sheet(shown, 1), feature_picture.TILE + feature_picture.GAP
    assert canvas[0, 0, 0] == 0.2 and canvas[0, 2 * step, 0] == 1  # the image; no tokens at t = 0
    assert canvas[step, 3 * step, 0] == 0.2 and canvas[2 * step, 2 * step, 0] == 0.3
    assert (
        canvas[-1, -feature_picture.TILE, 0] == 0.5
        and canvas[-1, -1, 0] == canvas[2 * step, -1, 0] == 0.4
    )


def test_a_tile_enlarges_tokens_and_averages_pixels():
    tokens, pixels = np.random.default_rng(0).random((4, 4, 3)), np.zeros((200, 200, 3), np.uint8)
    pixels[:3, :3] = 255 * np.eye(3)[..., None]
    large = feature_picture.tile(tokens)
    assert (large == np.kron(tokens, np.ones((16, 16, 1)))).all()
    assert feature_picture.tile(pixels).shape == (64, 64, 3) and feature_picture.tile(pixels)[
        0, 0, 0
    ] == pytest.approx(1 / 3)


def test_a_checkpoint_becomes_a_picture_and_its_numbers(cache, trained, tmp_path, call):
    out = tmp_path / "made" / "features.png"
    text = "--times 0.8 0.2 --blocks 3 1 --images 2 --probe-images 24 --batch-size 10 --device cpu"
    flags = text.split()
    code, said = call(
        features, "--ckpt", trained, trained, "--data-dir", cache, "--out", out, *flags
    )
    assert code == 0, said
    assert Image.open(out).size[0] > 1000
    found = json.loads(out.with_suffix(".json").read_text())
    first, second = found["checkpoints"]
    assert first == second and first["step"] == 2 and len(first["ema_sha256"]) == 64
    assert [(row["t"], row["block"]) for row in first["results"]] == [
        (0.2, 1),
        (0.2, 3),
        (0.8, 1),
        (0.8, 3),
    ]
    assert (
        len(found["baselines"]) == 2 + 2
        and found["cknna"]["images"] == found["data"]["held_out"] == 12
    )
    data = read(LatentCache(cache), 24, 0)
    counts = torch.bincount(data.labels[12:])
    assert found["chance"] == pytest.approx(counts.max().item() / 12)
    expected = judge(data.at("linear", 0.8).flatten(1), data, 3, None)
    assert (
        found["baselines"][-1]["accuracy"] == expected["accuracy"]
        and found["baselines"][-1]["cknna"] is not None
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--blocks 2 7", "--blocks 7: --ckpt"),
        ("--times 0.5 1.5", "--times 1.5 is outside (0, 1]"),
        ("--times 0", "--times 0 is outside (0, 1]"),
        ("--probe-images 25", "--probe-images 25 is more than the 24 images"),
        ("--probe-images 22", "--probe-images 22 is too few"),
        ("--images 13", "--images 13 is more than the half"),
        ("--out x.jpg", "--out x.jpg must end in .png"),
        ("--vae nowhere/at/all", "--vae nowhere/at/all"),
        ("--origin sit", "--origin is for official .pt files"),
        ("--ckpt nowhere", "--ckpt: nowhere does not exist"),
        ("--data-dir nowhere", "--data-dir: nowhere does not exist"),
    ],
)
def test_mistakes_end_in_one_line(cache, trained, tmp_path, call, flags, message):
    given = [
        "--ckpt",
        trained,
        "--data-dir",
        cache,
        "--out",
        tmp_path / "x.png",
        "--probe-images",
        24,
        *flags.split(),
    ]
    code, said = call(features, *given)
    assert code == 2 and message in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_latents_of_another_vae_are_refused(cache, trained, tmp_path):
    shutil.copytree(cache, tmp_path / "other")
    manifest = json.loads((cache / "manifest.json").read_text())
    (tmp_path / "other" / "manifest.json").write_text(
        json.dumps(manifest | {"vae_fingerprint": "f" * 64, "vae": "other/vae"})
    )
    flags = [
        "--ckpt",
        trained,
        "--data-dir",
        tmp_path / "other",
        "--out",
        "x.png",
        "--probe-images",
        24,
    ]
    with pytest.raises(
        UserError, match=r"latents of another VAE .* than --data-dir holds \(other/vae\)"
    ):
        features.measure(features.parse_args(list(map(str, flags))))


def test_only_the_vae_of_the_cache_decodes(cache, tmp_path):
    fingerprint = LatentCache(cache).manifest.vae_fingerprint
    with pytest.raises(UserError, match="is not the VAE that made --data-dir"):
        features.load_vae(str(make_vae(tmp_path / "vae", seed=1)), fingerprint, "cpu")


def test_a_network_without_a_trained_null_class_is_pointed_out(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    path = next((tmp_path / "run" / "checkpoints").iterdir()) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cfg_prob": 0.0}))
    args = features.parse_args(
        ["--ckpt", str(path.parent), str(trained), "--data-dir", "x", "--out", "x.png"]
    )
    assert len(features.load_checkpoints(args)) == 2
    assert capsys.readouterr().err.count("without label dropout") == 1
