"""REPA's encoder: whose tokens, of what pixels, on which grid; its mistakes; the weights that a package brings."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

from evaluations.timm_networks import TimmFeatures
from experiments import efficientnet_weights
from models import encoder
from models.encoder import (
    Encoder,
    EncoderError,
    describe_encoder,
    load_network,
    patch_tokens,
    resample,
    timm_name,
)


def images(count: int, side: int) -> torch.Tensor:
    return torch.randint(
        0,
        256,
        (count, 3, side, side),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A file of weights for timm's test_vit: patch 16, made for 160 pixels, one class token, mean and deviation 0.5."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0)
    with torch.no_grad():
        network.pos_embed.normal_()  # of 0.02 nobody would notice which is where
        network.norm.weight.uniform_(0.5, 2)  # twice the same norm would be once
    path = tmp_path_factory.mktemp("vit") / "w.pth"
    torch.save(network.state_dict(), path)
    return path


def test_tokens_are_those_of_the_network_after_repas_preprocessing(vit):
    ours = Encoder("test_vit", 256, 16, vit)
    assert (ours.name, ours.width, ours.side) == (
        "test_vit",
        64,
        256,
    ) and ours.fingerprint == ours.fingerprint
    plain = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
    plain.load_state_dict(torch.load(vit))
    positions = resample_abs_pos_embed(
        plain.pos_embed.detach(), (16, 16), (10, 10), num_prefix_tokens=1
    )
    x = images(2, 256) / 127.5 - 1
    with torch.no_grad():
        x = plain.patch_embed(x).flatten(1, 2) + positions[:, 1:]
        x = torch.cat(((plain.cls_token + positions[:, :1]).expand(2, -1, -1), x), 1)
        expected = plain.norm(plain.blocks(x))[:, 1:]
    torch.testing.assert_close(ours(images(2, 256)), expected, rtol=1e-4, atol=1e-5)
    small = Encoder("test_vit", 32, 16, vit, side=256)
    enlarged = F.interpolate(images(2, 32) / 127.5 - 1, 256, mode="bicubic")
    with torch.no_grad():
        expected = small.network.forward_features(enlarged)[:, 1:]
    torch.testing.assert_close(small(images(2, 32)), expected)


def test_colours_are_normalised_as_the_network_was_trained():
    ours = Encoder(
        "lcnet_035", 32, 7, pretrained=False
    )  # ImageNet's mean and deviation, unlike test_vit's
    mean, std = (
        torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    seen = []
    ours.network.conv_stem.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    ours(images(1, 224))
    torch.testing.assert_close(seen[0], (images(1, 224) / 255 - mean) / std)


@pytest.mark.parametrize(
    ("name", "resolution", "side"),
    [
        *(
            ("dinov2-s", 256, 224),
            ("dinov2-s", 512, 448),
            ("dinov2-s", 32, 224),
            ("test_vit", 256, 256),
        ),
        *(("test_vit", 32, 224), ("tf_efficientnet_lite0", 250, 256), ("mixer_s16_224", 512, 224)),
    ],
)
def test_a_token_of_patch_14_sees_16_pixels_and_others_the_image_as_it_is(name, resolution, side):
    assert describe_encoder(name, resolution)[1] == side


def test_the_last_norm_is_left_out_where_repa_leaves_it_out(monkeypatch, vit):
    monkeypatch.setitem(encoder.REPA, "mae-vit-l", "test_vit")
    before, after = Encoder("mae-vit-l", 224, 14, vit), Encoder("test_vit", 224, 14, vit)
    with torch.no_grad():
        torch.testing.assert_close(
            after.network.norm(before(images(1, 224))), after(images(1, 224))
        )
    assert before.fingerprint != after.fingerprint


def test_tokens_that_stand_for_no_place_are_dropped():
    """A network that returns what stands where: 0 for a place, 1 for none; channel last, channel first, or in one row."""

    class Network(torch.nn.Module):
        def __init__(self, features, **attributes):
            super().__init__()
            self.features = features
            self.__dict__.update(attributes)

        def forward_features(self, x):
            return self.features

    row = torch.cat((torch.ones(1, 5, 8), torch.zeros(1, 9, 8)), 1)
    assert not patch_tokens(Network(row, num_prefix_tokens=5), None).any()
    grid = torch.arange(9.0).view(1, 3, 3, 1).expand(1, 3, 3, 2)
    rows = torch.arange(9.0)[None, :, None].expand(1, 9, 2)
    assert torch.equal(patch_tokens(Network(grid, output_fmt="NHWC"), None), rows)
    assert torch.equal(patch_tokens(Network(grid.permute(0, 3, 1, 2)), None), rows)
    for features in (row, [grid], torch.zeros(1, 4)):
        with pytest.raises(encoder.NotSquare):
            patch_tokens(Network(features), None)


def test_another_grid_keeps_what_is_constant_and_the_mean_of_a_ramp():
    ramp = torch.arange(14.0).expand(14, 14).reshape(1, 196, 1) * torch.tensor([1.0, 0.0, -2.0]) + 1
    assert resample(ramp, 14) is ramp
    for side in (4, 7, 16):
        small = resample(ramp, side)
        assert small.shape == (1, side**2, 3)
        torch.testing.assert_close(small.mean(1), ramp.mean(1))
        torch.testing.assert_close(small[..., 1], torch.ones(1, side**2))
        torch.testing.assert_close(small[0, :side, 0], small[0, -side:, 0])  # rows stay rows
        assert small[0, 1, 0] > small[0, 0, 0]
    shares = resample(torch.eye(196)[None], 4).sum(1)  # what each token gives away
    assert shares.min() > 0.02 and shares.max() < 0.2


def test_it_is_frozen_in_eval_mode_and_lets_no_gradient_through(vit):
    ours = Encoder("test_vit", 32, 4, vit, side=64)
    holder = torch.nn.Sequential(ours).train()
    assert not any(module.training for module in ours.modules())
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    with torch.enable_grad():
        tokens = holder.requires_grad_()(images(1, 32))
    assert not tokens.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        inside = ours(images(1, 32))
    assert torch.equal(inside, tokens)
    half = Encoder("test_vit", 32, 4, vit, side=64, dtype=torch.bfloat16)(images(1, 32))
    convolutional = Encoder("lcnet_035", 32, 2, pretrained=False, side=64, dtype=torch.bfloat16)
    assert half.dtype == convolutional(images(1, 32)).dtype == torch.float32
    assert 0 < (half - tokens).abs().max() < 0.1
    with pytest.raises(AssertionError, match="float32"):
        ours(images(1, 32) / 255)


def test_the_fingerprint_knows_weights_and_settings(vit):
    prints = [Encoder("test_vit", 32, grid, vit, side=64).fingerprint for grid in (4, 2)]
    prints.append(Encoder("test_vit", 32, 4, pretrained=False, side=64).fingerprint)
    for side in (64, 96):  # the same weights, whatever the side
        torch.manual_seed(0)
        prints.append(Encoder("test_convnext", 32, 4, pretrained=False, side=side).fingerprint)
    assert len(set(prints)) == 5
    assert Encoder("test_vit", 32, 4, vit, side=64, dtype=torch.bfloat16).fingerprint == prints[0]


def test_repas_spellings_are_networks_with_weights():
    for name in (*encoder.ENCODER_ALIASES, *encoder.REPA):
        assert timm.is_model_pretrained(timm_name(name)), name


def test_mistakes(vit, tmp_path):
    torch.save({"a": print}, tmp_path / "evil.pth")
    torch.save(
        {key: value for key, value in torch.load(vit).items() if key != "pos_embed"},
        tmp_path / "few.pth",
    )
    cases = [
        (
            lambda: describe_encoder("dinov2-vit-x", 256),
            "dinov2-vit-x is no network that timm knows; near it: dinov2-vit-",
        ),
        (
            lambda: describe_encoder("vit_base_patch14_dinov2.lvd", 256),
            "near it: vit_base_patch14_dinov2.lvd142m",
        ),
        (
            lambda: describe_encoder("mocov3-vit-b", 256),
            "timm has no MoCo v3 weights; of REPA's encoders it has .*dinov2-vit-b",
        ),
        (
            lambda: describe_encoder("volo_d1_224", 256),
            "no square of patch tokens: an image becomes an array of 197 x 384",
        ),
        (
            lambda: describe_encoder("pit_ti_224", 256),
            "no square of patch tokens: an image becomes a single token",
        ),
        (
            lambda: describe_encoder("test_vit", 256, side=0),
            "takes images of 16 pixels and more, not of 0",
        ),
        (
            lambda: describe_encoder("test_vit", 256, side=100),
            "test_vit takes images of a multiple of 16 pixels, not of 100",
        ),
        (
            lambda: describe_encoder("mixer_s16_224", 256, side=240),
            "takes images of 224 pixels only, not of 240",
        ),
        (
            lambda: load_network("test_vit", tmp_path / "no.pth"),
            "test_vit: --encoder-weights .*no.pth does not exist",
        ),
        (
            lambda: load_network("test_vit", tmp_path / "evil.pth"),
            "--encoder-weights .*evil.pth does not fit test_vit .*[Ww]eights",
        ),
        (
            lambda: Encoder("test_vit2", 32, 4, vit),
            "--encoder-weights .* does not fit test_vit2 .*of another network, .* is missing",
        ),
        (
            lambda: Encoder("test_vit", 32, 4, tmp_path / "few.pth"),
            "few.pth does not fit test_vit .*, pos_embed is missing",
        ),
    ]
    for call, message in cases:
        with pytest.raises(EncoderError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_features_of_evaluations_come_from_the_same_network(vit):
    assert encoder.weights_fingerprint(
        TimmFeatures("test_vit", vit).network
    ) == encoder.weights_fingerprint(load_network("test_vit", vit))


def test_the_packages_weights_are_timms(call, tmp_path):
    """Every tensor finds its place, and a picture's statistics are those that batch normalisation remembers: with tensors of
    the same shape exchanged they are 1.6 of its deviations away, not 0.3. (The package's own network agrees to the bit.)"""
    code, out = call(efficientnet_weights, "--out", tmp_path / "w.safetensors")
    assert code == 0, out
    timm.create_model("tf_efficientnet_lite0").load_state_dict(
        load_file(tmp_path / "w.safetensors")
    )
    ours = Encoder("tf_efficientnet_lite0", 64, 7, tmp_path / "w.safetensors")
    away = []

    def compare(module, x):
        away.append(
            ((x[0].mean((0, 2, 3)) - module.running_mean) / (module.running_var + 1e-3).sqrt())
            .abs()
            .mean()
        )

    for module in ours.network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(compare)
    smooth = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)).cumsum(2).cumsum(
        3
    ) + torch.zeros(2, 3, 1, 1)
    smooth = (smooth - smooth.mean()) / smooth.std() * 60 + 115
    assert ours(smooth.clamp(0, 255).to(torch.uint8)).shape == (2, 49, 1280)
    assert torch.stack(away).median() < 0.8, away
    assert "must end in .safetensors" in call(efficientnet_weights, "--out", tmp_path / "w.pth")[1]
