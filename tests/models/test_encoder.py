"""Test the encoder of REPA: tokens, input size, token grid, errors, and the bundled weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

from evaluations.timm_networks import TimmFeatures
from experiments import efficientnet_weights
from models.autoencoder import LatentScale
from models.encoder import (
    Encoder,
    TokenGridError,
    describe_encoder,
    encoder_cost,
    patch_tokens,
    resample_tokens,
)
from models.encoder_settings import EncoderSettings, split_settings
from models.encoder_target import EncoderTokens
from models.errors import FieldError
from models.repa_encoders import ENCODER_ALIASES, REPA_ENCODERS
from models.sit import SiTConfig
from models.target import CacheInfo
from models.weights import (
    load_network,
    timm_name,
    weights_fingerprint,
)

NETWORK = SiTConfig(depth=2, width=32, heads=2, patch=2, latent_size=8)


def make_images(count: int, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def vit_weights(tmp_path_factory):
    """Return weights of timm's test_vit: patch size 16, 160-pixel inputs, one class token."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0)
    with torch.no_grad():
        # Randomize the position embeddings, because the initial embeddings are too small to affect
        # the tokens, and the norm, because applying the initial norm twice has no further effect.
        network.pos_embed.normal_()
        network.norm.weight.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("vit") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def test_tokens_equal_network_outputs_for_the_preprocessing_of_repa(vit_weights):
    model = Encoder("test_vit", 256, 16, vit_weights)
    assert (model.name, model.width, model.side) == ("test_vit", 64, 256)
    network = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
    network.load_state_dict(torch.load(vit_weights))
    positions = resample_abs_pos_embed(
        network.pos_embed.detach(), (16, 16), (10, 10), num_prefix_tokens=1
    )
    x = make_images(2, 256) / 127.5 - 1
    with torch.no_grad():
        x = network.patch_embed(x).flatten(1, 2) + positions[:, 1:]
        class_token = (network.cls_token + positions[:, :1]).expand(2, -1, -1)
        expected = network.norm(network.blocks(torch.cat((class_token, x), 1)))[:, 1:]
    torch.testing.assert_close(model(make_images(2, 256)), expected, rtol=1e-4, atol=1e-5)


def test_small_images_are_enlarged_bicubically(vit_weights):
    model = Encoder("test_vit", 32, 16, vit_weights, side=256)
    enlarged = F.interpolate(make_images(2, 32) / 127.5 - 1, 256, mode="bicubic")
    with torch.no_grad():
        expected = model.network.forward_features(enlarged)[:, 1:]
    torch.testing.assert_close(model(make_images(2, 32)), expected)


def test_images_are_normalized_with_mean_and_std_of_the_network():
    # lcnet_035 uses the mean and standard deviation of ImageNet, unlike test_vit.
    model = Encoder("lcnet_035", 32, 7, pretrained=False)
    mean = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
    std = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
    inputs = []
    model.network.conv_stem.register_forward_pre_hook(lambda module, x: inputs.append(x[0]))
    model(make_images(1, 224))
    torch.testing.assert_close(inputs[0], (make_images(1, 224) / 255 - mean) / std)


@pytest.mark.parametrize(
    ("name", "resolution", "side"),
    [
        ("dinov2-s", 256, 224),
        ("dinov2-s", 512, 448),
        ("dinov2-s", 32, 224),
        ("test_vit", 256, 256),
        ("test_vit", 32, 224),
        ("tf_efficientnet_lite0", 250, 256),
        ("mixer_s16_224", 512, 224),
    ],
)
def test_default_input_side_follows_repa_with_a_minimum_of_224(name, resolution, side):
    assert describe_encoder(name, resolution).side == side


def test_final_norm_is_omitted_where_repa_omits_it(monkeypatch, vit_weights):
    small = replace(REPA_ENCODERS["mae-vit-l"], timm_name="test_vit")
    monkeypatch.setitem(REPA_ENCODERS, "mae-vit-l", small)
    without_norm = Encoder("mae-vit-l", 224, 14, vit_weights)
    with_norm = Encoder("test_vit", 224, 14, vit_weights)
    images = make_images(1, 224)
    with torch.no_grad():
        expected = with_norm.network.norm(without_norm(images))
        torch.testing.assert_close(with_norm(images), expected)
    assert without_norm.fingerprint != with_norm.fingerprint


def test_patch_tokens_drop_prefix_tokens_and_accept_every_layout():
    class Network(torch.nn.Module):
        def __init__(self, features, **attributes):
            super().__init__()
            self.features = features
            self.__dict__.update(attributes)

        def forward_features(self, x):
            return self.features

    prefix_and_patches = torch.cat((torch.ones(1, 5, 8), torch.zeros(1, 9, 8)), 1)
    assert not patch_tokens(Network(prefix_and_patches, num_prefix_tokens=5), None).any()
    channels_last = torch.arange(9.0).view(1, 3, 3, 1).expand(1, 3, 3, 2)
    channels_first = channels_last.permute(0, 3, 1, 2)
    expected = torch.arange(9.0)[None, :, None].expand(1, 9, 2)
    assert torch.equal(patch_tokens(Network(channels_last, output_fmt="NHWC"), None), expected)
    assert torch.equal(patch_tokens(Network(channels_first), None), expected)
    for features in (prefix_and_patches, [channels_last], torch.zeros(1, 4)):
        with pytest.raises(TokenGridError):
            patch_tokens(Network(features), None)


def test_resampling_preserves_constants_rows_and_the_mean_of_a_ramp():
    ramp = torch.arange(14.0).expand(14, 14).reshape(1, 196, 1) * torch.tensor([1.0, 0.0, -2.0]) + 1
    assert resample_tokens(ramp, 14) is ramp
    for side in (4, 7, 16):
        resampled = resample_tokens(ramp, side)
        assert resampled.shape == (1, side**2, 3)
        torch.testing.assert_close(resampled.mean(1), ramp.mean(1))
        torch.testing.assert_close(resampled[..., 1], torch.ones(1, side**2))
        torch.testing.assert_close(resampled[0, :side, 0], resampled[0, -side:, 0])
        assert resampled[0, 1, 0] > resampled[0, 0, 0]


def test_every_token_contributes_to_a_smaller_grid():
    contributions = resample_tokens(torch.eye(196)[None], 4).sum(1)
    assert contributions.min() > 0.02 and contributions.max() < 0.2


def test_encoder_stays_frozen_in_eval_mode(vit_weights):
    model = Encoder("test_vit", 32, 4, vit_weights, side=64)
    parent = torch.nn.Sequential(model).train()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.enable_grad():
        tokens = parent.requires_grad_()(make_images(1, 32))
    assert not tokens.requires_grad


def test_dtype_is_independent_of_surrounding_autocast(vit_weights):
    images = make_images(1, 32)
    model = Encoder("test_vit", 32, 4, vit_weights, side=64)
    tokens = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(images), tokens)
    bfloat16_encoder = Encoder("test_vit", 32, 4, vit_weights, side=64, dtype=torch.bfloat16)
    bfloat16_tokens = bfloat16_encoder(images)
    convolutional = Encoder("lcnet_035", 32, 2, pretrained=False, side=64, dtype=torch.bfloat16)
    assert bfloat16_tokens.dtype == convolutional(images).dtype == torch.float32
    assert 0 < (bfloat16_tokens - tokens).abs().max() < 0.1


def test_images_must_be_uint8(vit_weights):
    with pytest.raises(AssertionError, match="float32"):
        Encoder("test_vit", 32, 4, vit_weights, side=64)(make_images(1, 32) / 255)


def test_fingerprint_depends_on_weights_and_settings(vit_weights):
    fingerprints = [
        Encoder("test_vit", 32, 4, vit_weights, side=64).fingerprint,
        Encoder("test_vit", 32, 2, vit_weights, side=64).fingerprint,
        Encoder("test_vit", 32, 4, pretrained=False, side=64).fingerprint,
    ]
    for side in (64, 96):
        torch.manual_seed(0)  # equal weights for both sides
        convolutional = Encoder("test_convnext", 32, 4, pretrained=False, side=side)
        fingerprints.append(convolutional.fingerprint)
    assert len(set(fingerprints)) == 5
    bfloat16_encoder = Encoder("test_vit", 32, 4, vit_weights, side=64, dtype=torch.bfloat16)
    assert bfloat16_encoder.fingerprint == fingerprints[0]
    assert Encoder("test_vit", 32, 4, vit_weights, side=64).fingerprint == fingerprints[0]


def test_every_alias_names_a_network_with_weights():
    in_timm = [name for name, encoder in REPA_ENCODERS.items() if encoder.in_timm]
    for name in (*ENCODER_ALIASES, *in_timm):
        assert timm.is_model_pretrained(timm_name(name)), name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dinov2-vit-x", {}, "dinov2-vit-x is not a timm model; similar names: dinov2-vit-"),
        ("vit_base_patch14_dinov2.lvd", {}, "similar names: vit_base_patch14_dinov2.lvd142m"),
        ("mocov3-resnet-50", {}, "mocov3-resnet-50 is not a timm model; similar names: .*resnet"),
        ("volo_d1_224", {}, "square grid of patch tokens: an image yields an array of 197 x 384"),
        ("pit_ti_224", {}, "square grid of patch tokens: an image yields a single token"),
        ("test_vit", {"side": 0}, "test_vit requires inputs of at least 16 pixels, not 0"),
        ("test_vit", {"side": 100}, "an input side that is a multiple of 16 pixels, not 100"),
        ("mixer_s16_224", {"side": 240}, "requires inputs of exactly 224 pixels, not 240"),
    ],
)
def test_unusable_encoders_are_rejected_before_weights_are_loaded(name, options, message):
    with pytest.raises(FieldError, match=message) as error:
        describe_encoder(name, 256, **options)
    assert error.value.field == "encoder" and "\n" not in error.value.reason


def test_weights_of_another_network_are_rejected(vit_weights, tmp_path):
    torch.save({"a": print}, tmp_path / "code.pth")
    state = torch.load(vit_weights)
    for key in ("pos_embed", "norm.bias"):
        incomplete = {name: value for name, value in state.items() if name != key}
        torch.save(incomplete, tmp_path / f"{key}.pth")
    for name, path, message in (
        ("test_vit", tmp_path / "no.pth", "no.pth does not exist"),
        ("test_vit", tmp_path / "code.pth", "code.pth does not fit test_vit .*[Ww]eights"),
        (
            "test_vit2",
            vit_weights,
            "does not fit test_vit2 .*belongs to another network: .* is missing",
        ),
        ("test_vit", tmp_path / "pos_embed.pth", "does not fit test_vit .* pos_embed is missing"),
        ("test_vit", tmp_path / "norm.bias.pth", "does not fit test_vit .* norm.bias is missing"),
    ):
        with pytest.raises(FieldError, match=message) as error:
            load_network(name, path)
        assert error.value.field == "weights" and "\n" not in error.value.reason


def test_missing_weights_are_recorded_only_while_a_network_is_loaded(vit_weights):
    network = load_network("test_vit", vit_weights)
    assert not any(module._load_state_dict_post_hooks for module in network.modules())
    module = torch.nn.Sequential(torch.nn.Linear(1, 1))
    assert not module[0]._load_state_dict_post_hooks


def test_ambiguous_stored_features_are_rejected_only_if_they_would_be_used():
    features = {
        f"test_vit-{side}": {"encoder": "test_vit", "side": side, "tokens_side": 4}
        for side in (64, 96)
    }
    cache = CacheInfo(32, LatentScale(1.0, 0.0), [], [], has_images=True, features=features)

    def plan(**options):
        return EncoderTokens.plan(EncoderSettings("test_vit", **options), NETWORK, cache).record

    with pytest.raises(FieldError, match="features of test_vit for input sizes 64 96") as error:
        plan()
    assert error.value.field == "side"
    assert plan(side=96) == {"encoder": "test_vit", "side": 96, "from": "features/test_vit-96"}
    assert plan(source="images") == {"encoder": "test_vit", "side": 224, "from": "images"}


def test_settings_of_several_encoders_are_split():
    settings = EncoderSettings("test_vit,test_vit2", Path("auto,b.pth"), "64,96", "images")
    assert split_settings(settings) == [
        EncoderSettings("test_vit", None, 64, "images"),
        EncoderSettings("test_vit2", Path("b.pth"), 96, "images"),
    ]
    shared = split_settings(EncoderSettings("test_vit,test_vit2", side=64))
    assert [(one.side, one.weights, one.source) for one in shared] == [(64, None, "auto")] * 2
    single = EncoderSettings("test_vit", Path("a,b.pth"), 64)
    assert split_settings(single) == [single]


@pytest.mark.parametrize(
    ("settings", "field", "message"),
    [
        ({"encoder": "dinov2-b,dinov2-vit-b"}, "encoder", "dinov2-vit-b is repeated"),
        ({"encoder": "test_vit,,test_vit2"}, "encoder", "separated by single commas"),
        ({"weights": Path("a.pth")}, "weights", "a.pth: pass 2 files .* of test_vit,test_vit2, no"),
        ({"side": "64,96,128"}, "side", "64,96,128: pass one number of pixels for all .* or 2 num"),
        ({"side": "64,x"}, "side", "64,x: pass one number of pixels for all encoders, or 2 num"),
        (
            {"encoder": "test_vit", "side": "64,96"},
            "side",
            "64,96: pass one number of pixels for t",
        ),
    ],
)
def test_contradictory_settings_of_several_encoders_are_rejected(settings, field, message):
    settings = EncoderSettings(**{"encoder": "test_vit,test_vit2"} | settings)
    with pytest.raises(FieldError, match=message) as error:
        EncoderTokens.plan(settings, NETWORK, CacheInfo(32, LatentScale(1.0, 0.0), [], [], True))
    assert error.value.field == field and "\n" not in error.value.reason


def test_resumed_run_keeps_the_sources_of_several_encoders():
    features = {
        f"{name}-224": {"encoder": name, "side": 224, "tokens_side": 4}
        for name in ("test_vit", "test_vit2")
    }
    cache = CacheInfo(32, LatentScale(1.0, 0.0), [], [], has_images=True, features=features)
    settings = EncoderSettings("test_vit,test_vit2")
    plan = EncoderTokens.plan(settings, NETWORK, cache)
    assert plan.record["from"] == ["features/test_vit-224", "features/test_vit2-224"]
    assert plan.token_dim == {"0": 64, "1": 64}
    record = plan.record | {"from": ["images", "features/test_vit2-224"]}
    restored = EncoderTokens.restore(settings, record)
    assert EncoderTokens.plan(restored, NETWORK, cache).record == record
    other = EncoderSettings("test_vit")  # the number of encoders has changed
    assert EncoderTokens.restore(other, record) == other


def test_cost_of_several_encoders_is_that_of_the_encoders_in_every_step():
    cache = CacheInfo(32, LatentScale(1.0, 0.0), [], [], has_images=True)
    record = {"encoder": ["test_vit", "test_vit2", "lcnet_035"], "side": [64, 96, 64]}
    record["from"] = ["images", "images", "features/lcnet_035"]
    first = encoder_cost("test_vit", 32, 64)
    second = encoder_cost("test_vit2", 32, 96)
    expected = (first[0] + second[0], first[1] + second[1])
    assert EncoderTokens.cost(record, NETWORK, cache) == expected


def test_evaluation_features_come_from_the_same_network(vit_weights):
    features = TimmFeatures("test_vit", vit_weights)
    network = load_network("test_vit", vit_weights)
    assert weights_fingerprint(features.network) == weights_fingerprint(network)


def test_bundled_efficientnet_weights_are_those_of_timm(call, tmp_path):
    """Check that all tensors are assigned and that activations match the batch norm statistics.

    The median deviation is 0.3 standard deviations. It would be 1.6 if tensors of equal shape were
    swapped. The outputs are bit-identical to the outputs of the network in the package.
    """
    path = tmp_path / "weights.safetensors"
    code, out = call(efficientnet_weights, "--out", path)
    assert code == 0, out
    timm.create_model("tf_efficientnet_lite0").load_state_dict(load_file(path))
    model = Encoder("tf_efficientnet_lite0", 64, 7, path)
    deviations = []

    def record_deviation(module, inputs):
        std = (module.running_var + 1e-3).sqrt()
        deviation = (inputs[0].mean((0, 2, 3)) - module.running_mean) / std
        deviations.append(deviation.abs().mean())

    for module in model.network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(record_deviation)
    noise = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    smooth = noise.cumsum(2).cumsum(3).expand(2, 3, 64, 64)
    smooth = (smooth - smooth.mean()) / smooth.std() * 60 + 115
    assert model(smooth.clamp(0, 255).to(torch.uint8)).shape == (2, 49, 1280)
    assert torch.stack(deviations).median() < 0.8, deviations


def test_bundled_weights_are_written_as_safetensors_only(call, tmp_path):
    code, out = call(efficientnet_weights, "--out", tmp_path / "weights.pth")
    assert code == 2 and "must end in .safetensors" in out


@pytest.mark.parametrize("name", ["test_vit", "lcnet_035"])
def test_compiled_encoder_has_one_graph(graph_counter, name):
    """The blocks of lcnet_035 are different stages, so the network is compiled as a whole."""
    model = Encoder(name, 32, 2, pretrained=False, side=64)
    images = make_images(2, 32)
    expected = model(images)
    model.compile_blocks()
    assert torch.equal(model(images), expected)
    assert graph_counter.frame_count == 1
