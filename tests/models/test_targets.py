"""What each method aligns to, against a computation of its own, and how flags become methods."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

import models.targets
import train
from dataset import TrainingStream
from interpolant import INTERPOLANTS
from latents.cache import LatentCache
from preprocessing import encode_features, encode_latents
from tests.helpers import ROOT, have_equal_weights, read_metrics, train_flags
from training import alignment
from training.config import check_args, make_config, parse_args
from training.guard import NonFiniteGuard

CPU = torch.device("cpu")


class Spy:
    """A target that notes what it was asked, and what it said."""

    def __init__(self, target, seen):
        self.target, self.seen = target, seen

    def __call__(self, batch):
        self.seen.append((batch, self.target(batch)))
        return self.seen[-1][1]


@pytest.fixture
def make(cache):
    """make(*flags) -> a Step on the CPU and a batch of the cache; make.seen: what targets were asked for."""

    def build(*flags, data=cache):
        args = parse_args(
            "",
            [
                "--exp-name",
                "x",
                "--data-dir",
                str(data),
                "--model",
                "SiT-Ti/2",
                "--batch-size",
                "8",
                *flags,
            ],
        )
        check_args(args, 1)
        held = LatentCache(data)
        found = alignment.data_of(held.manifest, held.read_feature_metadata())
        config = make_config(args, held.manifest, found)
        state = train.build(args, config, CPU)
        for average in state.emas:  # they start at zero, and so would what they say
            for block in average.blocks:
                torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
        targets = alignment.load(args, config, found, state.emas[0], CPU, nullcontext)
        stream = TrainingStream(held, 0, 8, cache_input=alignment.extra(targets))
        build.seen = {name: [] for name in targets}
        for name, target in targets.items():
            targets[name] = Spy(target, build.seen[name])
        accelerator = SimpleNamespace(
            device=CPU,
            prepare=lambda *parts: parts,
            no_sync=lambda model: nullcontext(),
            clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
            backward=lambda loss: loss.backward(),
        )
        step = train.Step(
            args,
            accelerator,
            held.manifest,
            state,
            targets,
            NonFiniteGuard(state.optimizer, fp16=False),
        )
        return step, stream[0]

    return build


def patches(latent):
    """(B, C, H, W) -> (B, N, 2 * 2 * C) by loops, row by row of patches, channels last within one."""
    rows = [
        [latent[:, :, i + a, j + b] for a in (0, 1) for b in (0, 1)]
        for i in range(0, 8, 2)
        for j in range(0, 8, 2)
    ]
    return torch.stack([torch.cat(row, 1) for row in rows], 1)


@pytest.mark.parametrize("normalize", ["none", "channel"])
@pytest.mark.parametrize("target", ["mean", "sample"])
def test_sra2s_target_is_the_clean_latent_patch_by_patch(make, cache, target, normalize):
    step, batch = make("--align-target", target, "--align-normalize", normalize)
    step(batch)
    [(part, tokens)] = make.seen["sra2"]
    manifest = LatentCache(cache).manifest
    mean = batch[1].float()[:, :4]
    latent = part.latent if target == "sample" else (mean - manifest.shift) * manifest.scale
    assert torch.equal(part.mean, (mean - manifest.shift) * manifest.scale) and not torch.equal(
        part.mean, part.latent
    )
    if normalize == "channel":
        latent = torch.stack(
            [
                (latent[:, c] / manifest.scale + manifest.shift - manifest.mean[c])
                / manifest.std[c]
                for c in range(4)
            ],
            1,
        )
    torch.testing.assert_close(tokens, patches(latent))


def test_channels_are_normalised_over_the_whole_cache(make, cache):
    held = LatentCache(cache)
    step, _ = make("--align-normalize", "channel", "--align-target", "sample", "--batch-size", "24")
    step((torch.arange(24), *held.gather(torch.arange(24).numpy())))
    [(_, tokens)] = make.seen["sra2"]
    channels = tokens.reshape(-1, 4)
    torch.testing.assert_close(channels.mean(0), torch.zeros(4), atol=0.1, rtol=0)
    torch.testing.assert_close(channels.std(0), torch.ones(4), atol=0.1, rtol=0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, tree, vae_folder):
    """The cache with its images, and weights of an encoder, random ones in timm's form."""
    folder = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        flags = f"--source {tree} --dest {folder / 'data'} --resolution 32 --vae {vae_folder} --shard-size 10 --keep-images"
        patch.setattr("sys.argv", ["encode_latents", *flags.split()])
        encode_latents.main()
    torch.manual_seed(0)
    network = timm.create_model("test_vit", pretrained=False)
    torch.nn.init.normal_(network.pos_embed)
    save_file(network.state_dict(), folder / "weights.safetensors")
    return folder


def repa(pictures, *more):
    return [
        "--align",
        "repa",
        "--repa-encoder",
        "test_vit",
        "--encoder-weights",
        str(pictures / "weights.safetensors"),
        *more,
    ]


def test_repas_target_is_the_encoders_patch_tokens(make, pictures):
    step, batch = make(*repa(pictures, "--repa-side", "64"), data=pictures / "data")
    step(batch)
    [(part, tokens)] = make.seen["repa"]
    held = LatentCache(pictures / "data")
    moments = held.gather(np.arange(24))[0]
    own = [next(i for i in range(24) if torch.equal(moments[i], each)) for each in batch[1]]
    images = torch.from_numpy(
        np.concatenate([np.load(pictures / f"data/images/0000{k}.npy") for k in range(3)])
    )[own]
    assert torch.equal(part.extra, images)  # of the very images whose latents are trained on

    network = timm.create_model("test_vit", pretrained=False, img_size=64, num_classes=0).eval()
    state = load_file(pictures / "weights.safetensors")
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], (4, 4), num_prefix_tokens=network.num_prefix_tokens
    )
    network.load_state_dict(
        {key: value for key, value in state.items() if not key.startswith("head.")}
    )
    config = timm.data.resolve_data_config(model=network)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        seen = torch.nn.functional.interpolate((images / 255 - mean) / std, 64, mode="bicubic")
        expected = network.forward_features(seen)[:, network.num_prefix_tokens :]
    torch.testing.assert_close(tokens, expected)
    assert not tokens.requires_grad and tokens.shape == (8, 16, network.num_features)


def test_stored_features_are_trained_on_as_the_images_would_be(call, pictures, tmp_path):
    data = shutil.copytree(pictures / "data", tmp_path / "data")
    options = repa(pictures, "--max-train-steps", 3, "--align-loss", "l2")  # which knows lengths
    flags = train_flags(data, tmp_path, "images", *options)

    def run(name, *more):
        flags[flags.index("--exp-name") + 1] = name
        code, out = call(train, *flags, *more)
        assert code == 0, out
        config = json.loads((tmp_path / name / "checkpoints/0000003/config.json").read_text())
        return read_metrics(tmp_path / name), config["align"][0]

    images, entry = run("images", "--repa-side", 64)
    given = (
        "--encoder",
        "test_vit",
        "--encoder-weights",
        pictures / "weights.safetensors",
        "--side",
        64,
    )
    assert call(encode_features, data, *given)[0] == 0
    begun = (
        "--exp-name",
        "images",
        "--max-train-steps",
        4,
    )  # before there were features: it goes on as it began
    assert call(train, *flags, *begun)[0] == 0
    stored, other = run("stored")  # found by itself, and with the side they were made for
    assert entry["from"] == "images" and other == entry | {"from": "features/test_vit-64-4x4"}
    for a, b in zip(images, stored):
        assert a == pytest.approx(b, rel=2e-3)  # float16
    assert run("again", "--repa-from", "images", "--repa-side", 64)[0] == images
    torch.manual_seed(1)
    save_file(
        timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "other.safetensors"
    )
    code, out = call(
        train, *flags, "--exp-name", "x", "--encoder-weights", tmp_path / "other.safetensors"
    )
    assert (
        code == 2
        and "were made with other weights of test_vit" in out
        and "--repa-from images" in out
    )
    code, out = call(train, *flags, "--exp-name", "x", "--repa-from", "features", "--repa-side", 80)
    assert (
        code == 2
        and "--repa-from features: the cache holds none of test_vit" in out
        and "encode_features" in out
    )


def test_another_encoders_weights_do_not_continue_a_run(call, pictures, tmp_path):
    flags = train_flags(pictures / "data", tmp_path, "run", *repa(pictures, "--repa-side", 64))
    assert call(train, *flags, "--max-train-steps", 1)[0] == 0
    state = load_file(pictures / "weights.safetensors")
    save_file(state | {"cls_token": state["cls_token"] + 1}, tmp_path / "other.safetensors")
    code, out = call(
        train, *flags, "--max-train-steps", 2, "--encoder-weights", tmp_path / "other.safetensors"
    )
    assert code == 2 and "was started with another repa to align to: fingerprint was" in out
    assert call(train, *flags, "--max-train-steps", 2)[0] == 0


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_sras_target_is_a_later_block_of_the_average_that_sees_less_noise(make, path):
    step, batch = make("--align", "sra", "--path-type", path, "--sra-t-max", "0.4")
    average = {key: value.clone() for key, value in step.state.emas[0].state_dict().items()}
    step(batch)
    [(part, tokens)] = make.seen["sra"]
    ema = step.state.emas[0]
    ema.load_state_dict(average)  # what it was when the target was made
    time = torch.stack([max(t - 0.4 * u, torch.tensor(0.0)) for t, u in zip(part.t, part.u)])
    assert (
        (time < part.t).all()
        and (part.u > 0).all()
        and len({*part.u.tolist(), *part.t.tolist()}) == 16
    )
    alpha, sigma = (
        ((1 - time), time)
        if path == "linear"
        else ((time * torch.pi / 2).cos(), (time * torch.pi / 2).sin())
    )
    x = alpha[:, None, None, None] * part.latent + sigma[:, None, None, None] * part.noise
    h, c = ema.x_embedder(x) + ema.pos_embed, ema.t_embedder(time) + ema.y_embedder(part.labels)
    for block in ema.blocks[:4]:
        h = block(h, c)
    torch.testing.assert_close(tokens, h)


def test_the_teacher_of_sra_sees_the_students_noise_and_dropped_labels(make, monkeypatch):
    step, batch = make("--align", "sra2", "sra", "--cfg-prob", "0.5", "--prediction", "eps")
    losses, seen = train.training_losses, []
    monkeypatch.setattr(
        train, "training_losses", lambda *given: seen.append(given) or losses(*given)
    )
    step(batch)
    [(part, _)], [(_, path, prediction, latent, labels, noise, t, *_)] = make.seen["sra"], seen
    assert path is INTERPOLANTS["linear"] and prediction == "eps"
    for ours, theirs in zip(
        (part.latent, part.labels, part.noise, part.t), (latent, labels, noise, t)
    ):
        assert torch.equal(ours, theirs)
    assert 0 < (labels == 3).sum() < 8


def test_gradients_reach_only_the_student(make):
    step, batch = make("--align", "sra2", "sra", "--align-loss", "l2", "smooth_l1")
    moments = batch[1].float().requires_grad_()  # x_t is made of them, and so may targets be
    step((batch[0], moments, batch[2]))
    assert all(p.grad is None and not p.requires_grad for p in step.state.emas[0].parameters())
    assert not any(tokens.requires_grad for seen in make.seen.values() for _, tokens in seen)
    assert len(step.state.optimizer.state) == sum(
        p.requires_grad for p in step.state.model.parameters()
    )


def test_a_head_of_weight_zero_has_no_gradient_that_processes_would_wait_for(make):
    step, batch = make("--align", "sra2", "sra", "--align-weight", "0", "1")
    step(batch)
    heads = step.state.model.heads
    assert not any(p.requires_grad for p in heads["sra2"].parameters())
    assert all(p.requires_grad for p in heads["sra"].parameters())


def test_each_method_is_compared_in_its_own_way(make):
    flags = "--align sra2 sra --align-loss l2 smooth_l1 --align-beta 0.1 0.2 --align-t-range 0 1 0.2 0.5 --align-weight 3 4"
    step, _ = make(*flags.split())
    assert step.align == {"sra2": ("l2", 0.1, [0, 1]), "sra": ("smooth_l1", 0.2, [0.2, 0.5])}
    assert step.weight == {"sra2": 3, "sra": 4}


def test_accumulation_cuts_what_targets_see(make):
    step, batch = make("--align", "sra", "--gradient-accumulation-steps", "4")
    step(batch)
    parts = [part for part, _ in make.seen["sra"]]
    assert [len(part.latent) for part in parts] == [2, 2, 2, 2] and all(
        part.extra is None for part in parts
    )


def test_a_method_stops_at_its_step_and_the_other_goes_on(make):
    step, batch = make("--align", "sra2", "sra", "--align-stop-step", "1", "0")
    first, second = step(batch)[0], step(batch)[0]
    assert len(make.seen["sra2"]) == 1 and len(make.seen["sra"]) == 2
    names = dict(zip(train.Log.names(["sra2", "sra"]), range(9)))
    assert first[names["align"]] > 0 == second[names["align"]] and second[names["align_sra"]] > 0
    denoising, align = second[names["denoising"]], second[names["align_sra"]]
    torch.testing.assert_close(second[names["loss"]], denoising + 0.5 * align)
    head = step.state.model.heads["sra2"][0].weight
    assert not head.grad


def test_all_methods_together_resume_bit_for_bit(call, pictures, tmp_path):
    options = repa(
        pictures,
        "--repa-side",
        64,
        "--prediction",
        "x",
        "--weighting",
        "lognormal",
        "--path-type",
        "vp",
    )
    options[1:2] = ["sra2", "repa", "sra"]
    whole, parts = (
        train_flags(pictures / "data", tmp_path, name, *options) for name in ("whole", "parts")
    )
    assert call(train, *whole, "--max-train-steps", 4)[0] == 0
    assert call(train, *parts, "--max-train-steps", 2)[0] == 0
    assert call(train, *parts, "--max-train-steps", 4)[0] == 0
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "parts")
    assert have_equal_weights(tmp_path / "whole", tmp_path / "parts", "0000004")
    code, out = call(train, *parts, "--max-train-steps", 6, "--align-depth", 1)
    assert code == 2 and "--align-depth was" in out


def test_a_flag_of_a_methods_own_is_part_of_the_run(call, cache, tmp_path):
    flags = train_flags(cache, tmp_path, "run", "--max-train-steps", 1)
    assert call(train, *flags)[0] == 0
    assert (
        call(train, *flags, "--max-train-steps", 2, "--align-target", "mean")[0] == 0
    )  # what it was already
    code, out = call(train, *flags, "--max-train-steps", 3, "--align-target", "sample")
    assert code == 2 and "started with another sra2 to align to: target was mean, is sample" in out


def planned(*flags, model="SiT-XL/2"):
    args = parse_args("", ["--exp-name", "x", "--data-dir", ".", "--model", model, *flags])
    check_args(args, 1)
    return args


def test_auto_is_each_papers_choice():
    args = planned("--align", "sra2", "repa", "sra")
    assert (args.align_depth, args.align_weight) == ([8, 8, 8], [1.0, 0.5, 0.5])
    assert (args.projector_layers, args.projector_width) == ([5, 3, 2], [2304, 2048, 2304])
    assert planned("--align", "sra", "--align-loss", "smooth_l1").align_weight == [0.2]
    assert planned("--align", "sra2", "repa", "sra", model="SiT-B/2").align_depth == [2, 8, 3]
    assert planned("--align", "repa", model="SiT-Ti/2").align_depth == [4]


def test_one_value_is_for_all_methods_and_several_are_for_each_in_their_order():
    flags = "--align sra2 repa --align-weight 0.1 --align-depth auto 4 --align-t-range 0 1 0 0.5"
    args = planned(*flags.split())
    assert (args.align_weight, args.align_depth, args.align_t_range) == (
        [0.1, 0.1],
        [8, 4],
        [[0, 1], [0, 0.5]],
    )
    assert (
        planned("--align", "sra2", "repa", "--align-t-range", "0.2", "0.5").align_t_range
        == [[0.2, 0.5]] * 2
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--align", "none", "sra2"], "--align none sra2: none goes with no other"),
        (["--align", "sra", "sra"], "--align sra sra: each only once"),
        (
            ["--align", "sra", "--align-target", "mean"],
            "--align-target goes with --align sra2, and --align is sra",
        ),
        (["--sra-t-max", 0.1], "--sra-t-max goes with --align sra, and --align is sra2"),
        (
            ["--repa-encoder", "dinov2-b"],
            "--repa-encoder goes with --align repa, and --align is sra2",
        ),
        (
            ["--align", "none", "--align-weight", 1],
            "--align-weight says how to align, and --align none does not",
        ),
        (
            ["--align", "sra2", "sra", "--align-weight", 1, 2, 3],
            "--align-weight 1.0 2.0 3.0: 3 given, it takes 1 value for all methods, or 2 for each",
        ),
        (["--align-t-range", 0.5], "--align-t-range 0.5: 1 given, it takes 2 values"),
        (
            ["--align", "sra", "--sra-teacher-block", 7],
            "--sra-teacher-block 7: SiT-Ti/2 has blocks 1 to 6",
        ),
        (["--align", "sra", "--sra-t-max", 2], "--sra-t-max 2.0 is not a number from 0 to 1"),
        (["--align", "repa"], "--align repa needs images and the cache keeps none"),
        (
            ["--align", "repa", "--repa-encoder", "dinov2-c"],
            "dinov2-c is not a timm model; similar names: dinov2-",
        ),
        (
            ["--align", "repa", "--repa-encoder", "mixer_b16_224", "--repa-side", 64],
            "--repa-encoder mixer_b16_224 requires inputs of exactly 224 pixels, not 64",
        ),
    ],
)
def test_contradictions_end_in_one_line_before_any_work(call, cache, tmp_path, flags, message):
    given = [
        flag
        for flag in train_flags(cache, tmp_path, "run")
        if flag not in ("--projector-width", "64")
    ]
    code, out = call(train, *given, *flags)
    assert code == 2 and message in out and len(out.strip().splitlines()) == 1, out
    assert not (tmp_path / "run").exists()


def test_the_method_of_the_docs_is_one_class_and_trains(call, cache, tmp_path, monkeypatch):
    source = (ROOT / "docs/extending.md").read_text().split("```python\n")[1].split("```")[0]
    names = dict(vars(models.targets))
    exec(source, names)
    monkeypatch.setitem(models.targets.TARGETS, "coarse", names["Coarse"])
    flags = [
        flag
        for flag in train_flags(cache, tmp_path, "run")
        if flag not in ("--projector-width", "64")
    ]
    options = "--align sra2 coarse --align-loss smooth_l1 cosine --align-depth 2 6 --coarse-side 4 --max-train-steps 2"
    options = options.split()
    code, out = call(train, *flags, *options)
    assert code == 0 and "coarse: side 4, block 6, cosine, weight 1, a head" in out, out
    assert read_metrics(tmp_path / "run")[-1]["align_coarse"] > 0
    code, out = call(train, *flags, *options, "--max-train-steps", 3, "--coarse-side", 2)
    assert code == 2 and "side was 4, is 2" in out
    code, out = call(
        train, *train_flags(cache, tmp_path, "other"), "--align", "coarse", "--coarse-side", 3
    )
    assert code == 2 and "--coarse-side 3 does not divide latents of side 8" in out
    code, out = call(train, *train_flags(cache, tmp_path, "other"), "--coarse-side", 4)
    assert code == 2 and "--coarse-side goes with --align coarse, and --align is sra2" in out
