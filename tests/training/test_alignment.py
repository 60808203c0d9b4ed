"""Targets of the alignment methods against independent computations, and flags into settings."""

import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

import models.targets
import train
from checkpointing import export
from dataset import TrainingStream
from latents.cache import LatentCache
from loss import standardize_tokens
from models.encoder import Encoder
from models.projector import Projector
from models.target import Defaults, Plan, Target
from preprocessing import encode_features
from tests.helpers import ROOT, read_metrics, train_flags
from tests.training.steps import make_settings, make_step
from training import alignment_config
from training.alignment import (
    describe_alignment,
    make_cache_info,
    plan_alignments,
    required_cache_inputs,
)

CPU = torch.device("cpu")


class SpyTarget:
    """A target that records its inputs and outputs."""

    def __init__(self, target, calls):
        self.target = target
        self.calls = calls
        self.student_blocks = target.student_blocks
        self.cache_inputs = target.cache_inputs

    def __call__(self, inputs, student_tokens):
        tokens = self.target(inputs, student_tokens)
        self.calls.append((inputs, tokens))
        return tokens


@pytest.fixture
def make(cache):
    """Return a function of flags that builds a Step on the CPU and a batch of the cache.

    Its attribute `calls` lists the inputs and outputs of each method's target.
    """

    def build(*flags, data=cache):
        settings = make_settings(data, *flags)
        step = make_step(settings, CPU)
        for ema in step.state.emas:  # modulation is zero at initialization, and so are tokens
            for block in ema.blocks:
                torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
        build.calls = {name: [] for name in step.alignments}
        for name, alignment in step.alignments.items():
            alignment.target = SpyTarget(alignment.target, build.calls[name])
        inputs = required_cache_inputs(step.alignments)
        stream = TrainingStream(LatentCache(data), 0, settings.loop.batch_size, inputs=inputs)
        return step, stream[0]

    return build


def cut_patches(latents):
    """(B, C, H, W) -> (B, N, 2 * 2 * C) by loops: patches row by row, channels last within one."""
    patches = []
    for i in range(0, 8, 2):
        for j in range(0, 8, 2):
            pixels = [latents[:, :, i + a, j + b] for a in (0, 1) for b in (0, 1)]
            patches.append(torch.cat(pixels, 1))
    return torch.stack(patches, 1)


@pytest.mark.parametrize("normalize", ["none", "channel"])
@pytest.mark.parametrize("target", ["mean", "sample"])
def test_sra2_target_is_the_clean_latent_in_patches(make, cache, target, normalize):
    step, batch = make("--align-target", target, "--align-normalize", normalize)
    step(batch)
    [(inputs, tokens)] = make.calls["sra2"]
    manifest = LatentCache(cache).manifest
    mean = (batch.moments.float()[:, :4] - manifest.shift) * manifest.scale
    assert torch.equal(inputs.posterior_mean, mean)
    assert not torch.equal(inputs.posterior_mean, inputs.latents)
    latents = inputs.latents if target == "sample" else mean
    if normalize == "channel":
        unscaled = latents / manifest.scale + manifest.shift
        channels = [(unscaled[:, c] - manifest.mean[c]) / manifest.std[c] for c in range(4)]
        latents = torch.stack(channels, 1)
    torch.testing.assert_close(tokens, cut_patches(latents))


def test_channel_normalisation_is_over_the_whole_cache(make):
    step, batch = make(
        "--align-normalize", "channel", "--align-target", "sample", "--batch-size", "24"
    )
    step(batch)  # one epoch: every image of the cache once
    [(_, tokens)] = make.calls["sra2"]
    channels = tokens.reshape(-1, 4)
    torch.testing.assert_close(channels.mean(0), torch.zeros(4), atol=0.1, rtol=0)
    torch.testing.assert_close(channels.std(0), torch.ones(4), atol=0.1, rtol=0)


def repa_flags(with_images, *more):
    weights = str(with_images / "weights.safetensors")
    return ["--align", "repa", "--repa-encoder", "test_vit", "--encoder-weights", weights, *more]


def test_repa_target_is_the_encoders_patch_tokens(make, with_images):
    step, batch = make(*repa_flags(with_images, "--repa-side", "64"), data=with_images / "data")
    step(batch)
    [(inputs, tokens)] = make.calls["repa"]

    # The images are those whose latents are trained on.
    moments = LatentCache(with_images / "data").gather(np.arange(24))[0]
    rows = [next(i for i in range(24) if torch.equal(moments[i], own)) for own in batch.moments]
    shards = [np.load(with_images / f"data/images/0000{k}.npy") for k in range(3)]
    images = torch.from_numpy(np.concatenate(shards))[rows]
    assert torch.equal(inputs.cache_inputs["images"], images)

    # The tokens are timm's, computed by hand.
    network = timm.create_model("test_vit", pretrained=False, img_size=64, num_classes=0).eval()
    state = load_file(with_images / "weights.safetensors")
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], (4, 4), num_prefix_tokens=network.num_prefix_tokens
    )
    network.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")})
    config = timm.data.resolve_data_config(model=network)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        resized = torch.nn.functional.interpolate((images / 255 - mean) / std, 64, mode="bicubic")
        expected = network.forward_features(resized)[:, network.num_prefix_tokens :]
    torch.testing.assert_close(tokens, expected)
    assert not tokens.requires_grad and tokens.shape == (8, 16, network.num_features)


def test_stored_features_train_like_the_images(call, with_images, tmp_path):
    data = shutil.copytree(with_images / "data", tmp_path / "data")
    weights = with_images / "weights.safetensors"
    # l2 depends on the norm of the tokens.
    options = repa_flags(with_images, "--max-train-steps", 3, "--align-loss", "l2")
    flags = train_flags(data, tmp_path, "images", *options)

    def run(name, *more):
        code, out = call(train, *flags, "--exp-name", name, *more)
        assert code == 0, out
        config = json.loads((tmp_path / name / "checkpoints/0000003/config.json").read_text())
        return read_metrics(tmp_path / name), config["align"][0]

    images, entry = run("images", "--repa-side", 64)
    encoder = ("--encoder", "test_vit", "--encoder-weights", weights, "--side", 64)
    assert call(encode_features, data, *encoder)[0] == 0
    # A run that started before there were features continues with the images.
    assert call(train, *flags, "--max-train-steps", 4)[0] == 0
    stored, other = run("stored")  # finds the features, and the side that they were computed with
    assert entry["from"] == "images"
    assert other == entry | {"from": "features/test_vit-64-4x4"}
    for a, b in zip(images, stored, strict=True):
        assert a == pytest.approx(b, rel=2e-3)  # features are stored in float16
    assert run("again", "--repa-from", "images", "--repa-side", 64)[0] == images

    torch.manual_seed(1)
    other_weights = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), other_weights)
    code, out = call(train, *flags, "--exp-name", "x", "--encoder-weights", other_weights)
    assert code == 2 and "differs from the weights of test_vit" in out
    assert "--repa-from images" in out
    code, out = call(train, *flags, "--exp-name", "x", "--repa-from", "features", "--repa-side", 80)
    assert code == 2 and "--repa-from features: the cache has no features of test_vit" in out
    assert "encode_features" in out


def test_other_encoder_weights_do_not_resume_a_run(call, with_images, tmp_path):
    options = repa_flags(with_images, "--repa-side", 64)
    flags = train_flags(with_images / "data", tmp_path, "run", *options)
    assert call(train, *flags, "--max-train-steps", 1)[0] == 0
    state = load_file(with_images / "weights.safetensors")
    other = tmp_path / "other.safetensors"
    save_file(state | {"cls_token": state["cls_token"] + 1}, other)
    code, out = call(train, *flags, "--max-train-steps", 2, "--encoder-weights", other)
    assert code == 2 and "another setting of --align repa: fingerprint was" in out
    assert call(train, *flags, "--max-train-steps", 2)[0] == 0


def two_encoder_flags(with_images, *more):
    files = f"{with_images / 'weights.safetensors'},{with_images / 'second.safetensors'}"
    encoders = ["--repa-encoder", "test_vit,test_vit2", "--encoder-weights", files]
    return ["--align", "repa", *encoders, *more]


def test_several_encoders_have_separate_heads_and_the_mean_loss(make, with_images):
    flags = two_encoder_flags(with_images, "--repa-side", "64,96")
    step, batch = make(*flags, data=with_images / "data")
    step(batch)
    [(inputs, tokens)] = make.calls["repa"]
    assert list(inputs.cache_inputs) == ["images"]
    files = {"test_vit": "weights.safetensors", "test_vit2": "second.safetensors"}
    for i, (name, file) in enumerate(files.items()):
        encoder = Encoder(name, 32, 4, with_images / file, side=(64, 96)[i])
        assert torch.equal(tokens[str(i)], encoder(inputs.cache_inputs["images"]))

    assert list(step.state.model.heads) == ["repa-0", "repa-1"]
    _, scalars = step.compute_losses(inputs)
    output = step.model(*_noisy(step, inputs))
    similarities = [
        torch.nn.functional.cosine_similarity(output.projected[f"repa-{i}"], tokens[i], dim=-1)
        for i in tokens
    ]
    expected = 1 - (similarities[0].mean(1) + similarities[1].mean(1)) / 2
    torch.testing.assert_close(scalars["align/repa"], expected)


def test_several_encoders_mix_stored_features_and_images(call, with_images, tmp_path):
    data = shutil.copytree(with_images / "data", tmp_path / "data")
    encoder = ("--encoder", "test_vit", "--encoder-weights", with_images / "weights.safetensors")
    assert call(encode_features, data, *encoder, "--side", 64)[0] == 0
    flags = train_flags(data, tmp_path, "run", *two_encoder_flags(with_images))
    code, out = call(train, *flags, "--max-train-steps", 1)
    assert code == 0, out
    line = "repa: encoder test_vit test_vit2, side 64 224, from features/test_vit-64-4x4 images"
    assert line in out
    config = json.loads((tmp_path / "run/checkpoints/0000001/config.json").read_text())
    [entry] = config["align"]
    assert entry["from"] == ["features/test_vit-64-4x4", "images"]
    assert list(entry["heads"]) == ["0", "1"] and len(set(entry["fingerprint"])) == 2

    # A resumed run does not use features that were stored later.
    second = ("--encoder", "test_vit2", "--encoder-weights", with_images / "second.safetensors")
    assert call(encode_features, data, *second)[0] == 0
    code, out = call(train, *flags, "--max-train-steps", 2)
    assert code == 0, out
    config = json.loads((tmp_path / "run/checkpoints/0000002/config.json").read_text())
    assert config["align"] == [entry]
    assert read_metrics(tmp_path / "run")[-1]["align/repa"] > 0
    flags = train_flags(data, tmp_path, "run", *repa_flags(with_images, "--max-train-steps", 3))
    code, out = call(train, *flags)
    assert code == 2 and "encoder was" in out, out


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_sra_target_is_a_later_block_of_the_ema_at_a_smaller_timestep(make, path_type):
    step, batch = make("--align", "sra", "--path-type", path_type, "--sra-t-max", "0.4")
    ema = step.state.emas[0]
    weights = {key: value.clone() for key, value in ema.state_dict().items()}
    step(batch)
    [(inputs, tokens)] = make.calls["sra"]
    ema.load_state_dict(weights)  # those with which the target was computed
    u = inputs.target_uniform
    t = (inputs.t - 0.4 * u).clamp(min=0)
    assert (t < inputs.t).all() and (u > 0).all()
    assert len({*u.tolist(), *inputs.t.tolist()}) == 16
    alpha, sigma = 1 - t, t
    if path_type == "cosine":
        alpha, sigma = (t * torch.pi / 2).cos(), (t * torch.pi / 2).sin()
    axes = (slice(None), None, None, None)
    x_t = alpha[axes] * inputs.latents + sigma[axes] * inputs.noise
    h = ema.x_embedder(x_t) + ema.pos_embed
    condition = ema.t_embedder(t) + ema.y_embedder(inputs.labels)
    for block in ema.blocks[:4]:
        h = block(h, condition)
    torch.testing.assert_close(tokens, h)


def test_sra_teacher_gets_the_students_noise_and_dropped_labels(make, monkeypatch):
    step, batch = make("--align", "sra2", "sra", "--cfg-prob", "0.5", "--prediction", "eps")
    students = []
    losses = step.compute_losses
    monkeypatch.setattr(
        step, "compute_losses", lambda micro: students.append(micro) or losses(micro)
    )
    step(batch)
    [(teacher, _)], [student] = make.calls["sra"], students
    for name in ("latents", "labels", "noise", "t"):
        assert torch.equal(getattr(teacher, name), getattr(student, name))
    assert 0 < (student.labels == 3).sum() < 8


def test_head_of_weight_zero_has_no_gradient(make):
    step, batch = make("--align", "sra2", "sra", "--align-weight", "0", "1")
    step(batch)
    heads = step.state.model.heads
    assert not any(p.requires_grad for p in heads["sra2"].parameters())
    assert all(p.requires_grad for p in heads["sra"].parameters())


def test_methods_have_separate_settings(make):
    flags = (
        "--align sra2 sra --align-loss l2 smooth_l1 --align-beta 0.1 0.2 "
        "--align-t-range 0 1 0.2 0.5 --align-weight 3 4"
    )
    step, _ = make(*flags.split())
    sra2, sra = (alignment.config for alignment in step.alignments.values())
    assert (sra2.loss, sra2.beta, sra2.t_range, sra2.weight) == ("l2", 0.1, (0, 1), 3)
    assert (sra.loss, sra.beta, sra.t_range, sra.weight) == ("smooth_l1", 0.2, (0.2, 0.5), 4)


def test_targets_receive_micro_batches(make):
    step, batch = make("--align", "sra", "--gradient-accumulation-steps", "4")
    step(batch)
    assert [len(inputs.latents) for inputs, _ in make.calls["sra"]] == [2, 2, 2, 2]


def test_target_tokens_are_standardized(make):
    step, batch = make("--target-norm", "zscore", "--zscore-alpha", 0.3)
    targets = step.alignments["sra2"].compute_targets(step.sample_inputs(batch))
    [(_, tokens)] = make.calls["sra2"]
    assert torch.equal(targets["sra2"], standardize_tokens(tokens, 0.3))


def test_method_stops_at_its_step_while_the_other_continues(make):
    step, batch = make("--align", "sra2", "sra", "--align-stop-step", "1", "0")
    first, second = step(batch)[0], step(batch)[0]
    assert len(make.calls["sra2"]) == 1 and len(make.calls["sra"]) == 2
    assert first["align/sra2"] > 0 == second["align/sra2"] and second["align/sra"] > 0
    expected = second["denoising"] + 0.5 * second["align/sra"]
    torch.testing.assert_close(second["loss"], expected)
    assert not step.state.model.heads["sra2"][0].weight.grad


@dataclass(frozen=True)
class PairSettings:
    shift: float = 1.0
    negate: bool = False


class Pair(Target):
    """Has two targets with a head each; the second one is the first plus a constant."""

    name, title, paper = "pair", "Pair", "a test"
    Settings = PairSettings

    @staticmethod
    def defaults(model, depth, width, loss):
        return Defaults(block=3, weight=1.0, layers=2, hidden=32)

    @staticmethod
    def plan(settings, network, cache):
        return Plan({"a": 5, "b": 7}, {"shift": settings.shift, "negate": settings.negate})

    def __call__(self, inputs, student_tokens):
        mean = inputs.posterior_mean.mean((1, 2, 3))[:, None, None]
        ones = torch.ones(len(mean), 16, 7)
        return {"a": mean * ones[..., :5], "b": mean * ones + self.record["shift"]}


@pytest.fixture
def pair_method(monkeypatch):
    monkeypatch.setitem(models.targets.TARGETS, "pair", Pair)


def test_layersync_compares_two_blocks_of_one_forward_pass_without_a_head(make):
    step, batch = make("--align", "layersync", "--layersync-target-block", 4)
    model = step.state.model
    for block in model.backbone.blocks:
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
    assert not list(model.heads.parameters()) and step.alignments["layersync"].config.weight == 0.2
    inputs = step.sample_inputs(batch)
    total, scalars = step.compute_losses(inputs)
    tokens = model.backbone.compute_block_tokens(*_noisy(step, inputs), (2, 4))
    products = (tokens[2] * tokens[4]).sum(-1)
    cosines = products / (tokens[2].norm(dim=-1) * tokens[4].norm(dim=-1))
    expected = 1 - cosines.mean(1)
    assert (expected > 1e-5).all()
    torch.testing.assert_close(scalars["align/layersync"], expected)
    torch.testing.assert_close(total, scalars["denoising"] + 0.2 * expected)


def test_method_with_two_targets_has_two_heads_and_the_mean_loss(make, pair_method):
    step, batch = make("--align", "pair", "--align-loss", "l1")
    heads = step.state.model.heads
    assert sorted(heads) == ["pair-a", "pair-b"]
    assert all(isinstance(head, Projector) for head in heads.values())
    inputs = step.sample_inputs(batch)
    _, scalars = step.compute_losses(inputs)
    output = step.model(*_noisy(step, inputs))
    targets = step.alignments["pair"].target(inputs, {})
    losses = [
        (output.projected[f"pair-{name}"] - targets[name]).abs().mean((1, 2)) for name in "ab"
    ]
    torch.testing.assert_close(scalars["align/pair"], (losses[0] + losses[1]) / 2)


def _noisy(step, inputs):
    alpha, sigma, _, _ = step.interpolant.coefficients(inputs.t[:, None, None, None])
    return alpha * inputs.latents + sigma * inputs.noise, inputs.t, inputs.labels


def test_new_methods_train_and_resume_from_the_command_line(call, pair_method, cache, tmp_path):
    flags = train_flags(cache, tmp_path, "run", "--align", "sra2", "layersync", "pair")
    flags += ["--pair-shift", "2", "--pair-negate"]
    for steps in (1, 2):
        code, out = call(train, *flags, "--max-train-steps", steps)
        assert code == 0, out
    checkpoint = tmp_path / "run/checkpoints/0000002"
    assert load_file(checkpoint / "optimizer.safetensors")["0.step"] == 2
    config = json.loads((checkpoint / "config.json").read_text())
    layersync, pair = config["align"][1:]
    assert layersync["head"] is None
    assert (pair["shift"], pair["negate"]) == (2.0, True) and pair["heads"]["b"]["out"] == 7
    assert read_metrics(tmp_path / "run")[-1]["align/pair"] > 0
    code, out = call(export, tmp_path / "run", "--to", tmp_path / "export")
    assert code == 0, out
    card = (tmp_path / "export/README.md").read_text()
    assert "LayerSync (arXiv:2510.12581) on block 2, no head" in card
    assert "Pair (a test) on block 3, 2 layers in the head" in card


def test_example_method_of_the_docs_trains(call, cache, tmp_path, monkeypatch):
    example = (ROOT / "docs/extending.md").read_text().split("```python\n")[1].split("```")[0]
    namespace = dict(vars(models.targets))
    exec(example, namespace)
    monkeypatch.setitem(models.targets.TARGETS, "coarse", namespace["Coarse"])
    options = "--align sra2 coarse --align-depth 2 6 --align-loss smooth_l1 cosine --coarse-side 4"
    flags = train_flags(cache, tmp_path, "run", *options.split(), projector_width=None)
    code, out = call(train, *flags, "--max-train-steps", 2)
    assert code == 0 and "coarse: side 4, block 6, cosine, weight 1; head" in out, out
    assert read_metrics(tmp_path / "run")[-1]["align/coarse"] > 0
    code, out = call(train, *flags, "--max-train-steps", 3, "--coarse-side", 2)
    assert code == 2 and "--align coarse: side was 4, now 2" in out
    code, out = call(train, *flags, "--exp-name", "other", "--coarse-side", 3)
    assert code == 2 and "--coarse-side 3 does not divide the latent size, 8" in out
    plain = train_flags(cache, tmp_path, "other")
    code, out = call(train, *plain, "--coarse-side", 4)
    assert code == 2 and "--coarse-side needs --align coarse, but --align is sra2" in out


def test_setting_of_a_method_is_part_of_the_run(call, cache, tmp_path):
    flags = train_flags(cache, tmp_path, "run", "--max-train-steps", 1)
    assert call(train, *flags)[0] == 0
    # The default, spelled out.
    assert call(train, *flags, "--max-train-steps", 2, "--align-target", "mean")[0] == 0
    code, out = call(train, *flags, "--max-train-steps", 3, "--align-target", "sample")
    assert code == 2
    assert "another setting of --align sra2: target was mean, now sample" in out


def resolve(*flags, model="SiT-XL/2"):
    settings = make_settings(".", "--model", model, *flags)
    return settings.alignments


def values(alignments, name):
    return [getattr(alignment, name) for alignment in alignments]


def test_defaults_are_those_of_each_paper():
    methods = ("--align", "sra2", "repa", "sra", "layersync", "selftrans")
    alignments = resolve(*methods)
    assert values(alignments, "block") == [8, 8, 8, 8, 14]
    assert values(alignments, "weight") == [1.0, 0.5, 0.5, 0.2, 0.5]
    assert values(alignments, "projector_type") == ["mlp", "mlp", "mlp", "none", "mlp"]
    assert values(alignments[:3], "projector_layers") == [5, 3, 2]
    assert values(alignments[:3], "projector_width") == [2304, 2048, 2304]
    assert values(alignments, "loss") == [*["cosine"] * 4, "l2"]
    assert values(alignments, "t_range") == [*[(0, 1)] * 4, (0.4, 0.7)]
    smooth_l1 = resolve("--align", "sra", "--align-loss", "smooth_l1")
    assert values(smooth_l1, "weight") == [0.2]
    base = resolve(*methods, model="SiT-B/2")
    assert values(base, "block") == [2, 4, 3, 3, 6]
    assert values(resolve("--align", "repa", model="SiT-Ti/2"), "block") == [2]


def test_one_value_is_for_all_methods_and_several_are_one_per_method():
    flags = "--align sra2 repa --align-weight 0.1 --align-depth auto 4 --align-t-range 0 1 0 0.5"
    alignments = resolve(*flags.split())
    assert values(alignments, "weight") == [0.1, 0.1]
    assert values(alignments, "block") == [8, 4]
    assert values(alignments, "t_range") == [(0, 1), (0, 0.5)]
    shared = resolve("--align", "sra2", "repa", "--align-t-range", "0.2", "0.5")
    assert values(shared, "t_range") == [(0.2, 0.5)] * 2


def test_description_states_the_costs_and_the_stop_step(cache, trained):
    flags = (
        "--align sra2 sra layersync selftrans --align-weight 0.5 0 0.2 0.5 --align-stop-step 4000 "
        "0 0 0 --projector-type conv mlp none mlp --target-norm zscore none none none "
        f"--selftrans-checkpoint {trained}"
    )
    settings = make_settings(cache, *flags.split())
    step = make_step(settings, CPU)
    manifest = LatentCache(cache).manifest
    network = step.state.model.backbone.config
    cache_info = make_cache_info(manifest)
    entries = plan_alignments(settings.alignments, network, cache_info)
    sra2, sra, layersync, selftrans = [
        describe_alignment(entry, step.state.model, cache_info) for entry in entries
    ]
    assert sra2.startswith("sra2: target norm zscore, zscore alpha 0.6, target mean, normalize ")
    assert "weight 0.5 until step 4,000; head: " in sra2 and "FLOPs forward and backward" in sra2
    assert sra.endswith("weight 0; not computed")
    assert layersync == "layersync: target block 3, block 2, cosine, weight 0.2; no head"
    assert selftrans.startswith("selftrans: teacher block 4, guidance 30.0, block 3, l2, weight ")
    assert "; target: 1.2M parameters, +" in selftrans and selftrans.endswith("% FLOPs forward")


def test_settings_are_built_without_argparse():
    config = alignment_config.default_alignment("sra2", "SiT-B/2", loss="smooth_l1")
    assert (config.block, config.weight, config.settings.target) == (2, 1.0, "mean")
    assert config.loss == "smooth_l1" and replace(config, block=3).block == 3


def test_settings_of_a_method_may_be_zero():
    (sra,) = resolve("--align", "sra", "--sra-t-max", "0", "--align-weight", "0")
    assert (sra.settings.t_max, sra.weight) == (0, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--align", "none", "sra2"],
            "--align none sra2: none cannot be combined with other methods; remove it",
        ),
        (["--align", "sra", "sra"], "--align sra sra repeats a method"),
        (["--align", "sra", "--align-target", "mean"], "--align-target needs --align sra2"),
        (["--sra-t-max", 0.1], "--sra-t-max needs --align sra, but --align is sra2"),
        (["--repa-encoder", "dinov2-b"], "--repa-encoder (--enc-type) needs --align repa"),
        (
            ["--align", "none", "--align-weight", 1],
            "--align-weight has no effect with --align none",
        ),
        (
            ["--align", "sra2", "sra", "--align-weight", 1, 2, 3],
            "--align-weight 1.0 2.0 3.0: pass 1 value for all methods, or 2 for --align sra2 sra",
        ),
        (["--align-t-range", 0.5], "--align-t-range 0.5: pass 2 values, not 1"),
        (["--align", "sra", "--sra-teacher-block", 7], "--sra-teacher-block 7: the model has"),
        (["--align", "sra", "--sra-t-max", 2], "--sra-t-max 2.0 is not a number in [0, 1]"),
        (
            ["--layersync-target-block", 4],
            "--layersync-target-block (--gt-encoder-depth) needs --align layersync, but --align",
        ),
        (
            ["--align", "layersync", "--projector-width", 64],
            "--projector-width has no effect without --projector-type mlp",
        ),
        (
            ["--projector-type", "conv", "--projector-layers", 2],
            "--projector-layers has no effect without --projector-type mlp",
        ),
        (
            ["--projector-kernel", 3],
            "--projector-kernel has no effect without --projector-type conv: pass both",
        ),
        (["--projector-kernel", 2], "2 is even; pass an odd number"),
        (["--zscore-alpha", 0.5], "--zscore-alpha has no effect without --target-norm zscore"),
        (
            ["--projector-type", "none"],
            "--projector-type none: the target tokens of sra2 have 16 channels and those of the "
            "blocks 128; choose another head",
        ),
        (["--align", "selftrans"], "--selftrans-checkpoint is required by --align selftrans"),
        (["--align", "repa"], "--align repa needs images, but the cache has none"),
        (["--align", "repa", "--repa-encoder", "dinov2-c"], "--repa-encoder dinov2-c"),
        (
            ["--align", "repa", "--repa-encoder", "mixer_b16_224", "--repa-side", 64],
            "--repa-encoder mixer_b16_224",
        ),
    ],
)
def test_contradictions_end_in_one_line_before_any_work(call, cache, tmp_path, flags, message):
    run_flags = train_flags(cache, tmp_path, "run", projector_width=None)
    code, out = call(train, *run_flags, *flags)
    assert code == 2 and message in out and len(out.strip().splitlines()) == 1, out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--align", "layersync", "--align-depth", 3],
            "--align-depth 3: --align layersync uses this block as its target",
        ),
        (
            ["--align", "selftrans", "--selftrans-checkpoint", "/none"],
            "--selftrans-checkpoint /none does not exist",
        ),
        (
            ["--align", "selftrans", "--selftrans-checkpoint", "/x", "--selftrans-guidance", "nan"],
            "--selftrans-guidance nan is not finite; pass a number",
        ),
        (
            ["--model", "SiT-S/8", "--target-norm", "zscore"],  # the latents are 8 x 8
            "--target-norm zscore needs several tokens per image",
        ),
    ],
)
def test_targets_that_cannot_be_built_end_in_one_line(call, cache, tmp_path, flags, message):
    code, out = call(train, *train_flags(cache, tmp_path, "run", *flags, projector_width=None))
    assert code == 2 and message in out and len(out.strip().splitlines()) == 1, out
    assert not (tmp_path / "run").exists()
