import json
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from tests.helpers import have_equal_weights, make_vae, read_metrics, run_ranks, train_flags

# two methods, one of which stops on the way
ALIGNED = ("--align", "sra2", "sra", "--align-stop-step", 6, 0, "--log-every", 2)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, cache):
    """Ten steps at once, logged every four steps, so that a checkpoint at five falls between two lines."""
    exps = tmp_path_factory.mktemp("unbroken")
    before = sys.argv
    sys.argv = ["train.py", *train_flags(cache, exps, "run", "--max-train-steps", 10, *ALIGNED)]
    try:
        train.main()
    finally:
        sys.argv = before
    return exps / "run"


def test_ten_steps_equal_five_and_five_bit_for_bit(call, cache, tmp_path, unbroken):
    flags = train_flags(cache, tmp_path, "run", *ALIGNED)
    assert call(train, *flags, "--max-train-steps", 5)[0] == 0
    with open(
        tmp_path / "run/metrics.jsonl", "a"
    ) as file:  # as a run that was killed after its last checkpoint leaves it
        file.write('{"step": 6, "loss": 0}\n{"step": 7, "lo')
    code, out = call(train, *flags, "--max-train-steps", 10)
    assert code == 0 and "continuing from" in out
    assert read_metrics(tmp_path / "run") == read_metrics(unbroken)
    assert have_equal_weights(tmp_path / "run", unbroken)
    code, out = call(train, *flags, "--max-train-steps", 10)
    assert code == 0 and "has finished its 10 steps" in out


def test_the_ema_follows_the_weights_of_every_step(call, cache, tmp_path):
    flags = train_flags(cache, tmp_path, "run", "--max-train-steps", 3, "--checkpointing-steps", 1)
    assert call(train, *flags)[0] == 0
    folders = [tmp_path / f"run/checkpoints/000000{k}" for k in (1, 2, 3)]
    weights, averages = (
        [load_file(folder / f"{name}.safetensors") for folder in folders]
        for name in ("model", "ema")
    )
    for before, after, now in zip(averages, averages[1:], weights[1:]):
        for key in after:
            torch.testing.assert_close(after[key], 0.9 * before[key] + 0.1 * now[f"backbone.{key}"])
    assert not torch.equal(
        averages[0]["blocks.0.attn.qkv.weight"], averages[2]["blocks.0.attn.qkv.weight"]
    )


def test_accumulation_is_the_same_run(call, cache, tmp_path, unbroken):
    flags = train_flags(cache, tmp_path, "run", *ALIGNED, "--max-train-steps", 10)
    assert call(train, *flags, "--gradient-accumulation-steps", 4)[0] == 0
    for ours, theirs in zip(read_metrics(tmp_path / "run"), read_metrics(unbroken), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_two_processes_give_the_losses_of_one(cache, tmp_path, unbroken):
    given = (*ALIGNED, "--max-train-steps", 10, "--cache-in-ram")  # one memory for both
    run_ranks(2, "train", *train_flags(cache, tmp_path, "run", *given))
    for ours, theirs in zip(read_metrics(tmp_path / "run"), read_metrics(unbroken), strict=True):
        assert ours["step"] == theirs["step"]
        keys = ("loss", "denoising", "align", "align_sra")
        assert [ours[k] for k in keys] == pytest.approx([theirs[k] for k in keys], abs=1e-5)
    assert theirs["align"] == 0 < theirs["align_sra"]


def test_a_run_goes_from_one_process_to_two_and_back(call, cache, tmp_path, unbroken):
    flags = train_flags(cache, tmp_path, "run", *ALIGNED)
    assert call(train, *flags, "--max-train-steps", 3)[0] == 0
    run_ranks(2, "train", *flags, "--max-train-steps", 7, "--gradient-accumulation-steps", 2)
    assert call(train, *flags, "--max-train-steps", 10, "--gradient-accumulation-steps", 4)[0] == 0
    for ours, theirs in zip(read_metrics(tmp_path / "run"), read_metrics(unbroken), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_joined_caches_train_and_memory_may_be_chosen_later(call, cache, tmp_path, unbroken):
    copied = shutil.copytree(cache, tmp_path / "copied")
    flags = train_flags(cache, tmp_path, "run")
    flags[2:2] = [str(copied)]
    assert flags[:3] == ["--data-dir", str(cache), str(copied)]
    assert call(train, *flags, "--max-train-steps", 3)[0] == 0
    code, out = call(train, *flags, "--max-train-steps", 6, "--cache-in-ram")
    assert code == 0 and "48 images an epoch" in out, out
    lines = read_metrics(tmp_path / "run")
    assert (
        len(lines) == 6 and lines[0]["denoising"] != read_metrics(unbroken)[0]["denoising"]
    )  # other images come first
    code, out = call(train, *train_flags(cache, tmp_path, "run", "--max-train-steps", 9))
    assert code == 2 and "is not the cache that" in out and "count" in out
    (copied / "moments/00001.npy").unlink()
    code, out = call(train, *flags, "--max-train-steps", 9)
    assert (
        code == 2
        and "00001.npy cannot be read" in out
        and f"preprocessing.verify --repair {copied}" in out
    )


def test_bf16_trains_close_to_float32(call, cache, tmp_path, unbroken):
    flags = train_flags(cache, tmp_path, "run", *ALIGNED, "--max-train-steps", 10)
    assert call(train, *flags, "--mixed-precision", "bf16")[0] == 0
    ours, theirs = read_metrics(tmp_path / "run")[-1], read_metrics(unbroken)[-1]
    assert ours["denoising"] != theirs["denoising"] and ours["denoising"] == pytest.approx(
        theirs["denoising"], rel=0.05
    )
    weights = load_file(tmp_path / "run/checkpoints/0000010/ema.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_time_spent_waiting_for_data_is_told_apart(call, cache, tmp_path, monkeypatch):
    gather = train.LatentCache.gather
    monkeypatch.setattr(
        train.LatentCache, "gather", lambda *args: (time.sleep(0.05), gather(*args))[1]
    )
    assert call(train, *train_flags(cache, tmp_path, "run", "--max-train-steps", 3))[0] == 0
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["data_s"] >= 0.05 and row["step_s"] == pytest.approx(
            row["data_s"] + row["compute_s"]
        )


@pytest.mark.parametrize("method", ["sra2", "sra"])
def test_vanilla_and_weight_zero_are_the_same_network_to_the_bit(call, cache, tmp_path, method):
    clipped = ("--max-train-steps", 4, "--max-grad-norm", 0.5)
    assert call(train, *train_flags(cache, tmp_path, "none", "--align", "none", *clipped))[0] == 0
    assert (
        call(
            train,
            *train_flags(cache, tmp_path, "zero", "--align", method, "--align-weight", 0, *clipped),
        )[0]
        == 0
    )
    none, zero = (
        load_file(tmp_path / run / "checkpoints/0000004/ema.safetensors")
        for run in ("none", "zero")
    )
    assert none.keys() == zero.keys() and all(torch.equal(none[key], zero[key]) for key in none)
    ours, theirs = (
        [row["grad_norm"] for row in read_metrics(tmp_path / run)] for run in ("none", "zero")
    )
    assert ours == theirs and min(ours) > 0.5
    assert all(
        row[key] is None
        for row in read_metrics(tmp_path / "none")
        for key in ("align", "cosine", "token_norm")
    )


def test_alignment_changes_the_run_and_every_option_trains(call, cache, tmp_path):
    options = {
        "cosine": [],
        "smooth_l1": ["--align-loss", "smooth_l1", "--align-target", "sample"],
        "window": [
            "--align-t-range",
            0,
            0.5,
            "--path-type",
            "cosine",
            "--align-depth",
            3,
            "--projector-layers",
            2,
        ],
    }
    losses = {}
    for name, flags in options.items():
        code, out = call(train, *train_flags(cache, tmp_path, name, "--max-train-steps", 2, *flags))
        assert code == 0, out
        losses[name] = read_metrics(tmp_path / name)[-1]["align"]
    assert len(set(losses.values())) == 3 and all(value > 0 for value in losses.values())


def test_previews_are_drawn_from_the_ema_with_fixed_noise(call, cache, tmp_path, monkeypatch):
    drawn = []
    draw = train.Preview.draw

    def spy(self, ema, step, name):
        assert not ema.training and not any(p.requires_grad for p in ema.parameters())
        drawn.append(
            (
                self.start.clone(),
                self.labels.clone(),
                {key: value.clone() for key, value in ema.state_dict().items()},
            )
        )
        return draw(self, ema, step, name)

    monkeypatch.setattr(train.Preview, "draw", spy)
    monkeypatch.setattr(train.Preview, "num_steps", 2)
    code, out = call(
        train, *train_flags(cache, tmp_path, "run", "--max-train-steps", 3), "--sampling-steps", 2
    )
    assert code == 0, out
    assert sorted(p.name for p in (tmp_path / "run/samples").iterdir()) == [
        "0000002.png",
        "0000003.png",
    ]
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    saved = load_file(tmp_path / "run/checkpoints/0000003/ema.safetensors")
    assert all(torch.equal(drawn[1][2][key], saved[key]) for key in saved)
    plain = call(train, *train_flags(cache, tmp_path, "plain", "--max-train-steps", 3))[0]
    assert plain == 0 and read_metrics(tmp_path / "plain") == read_metrics(
        tmp_path / "run"
    )  # looking changes nothing


def test_other_flags_on_a_started_run_are_listed(call, trained, cache):
    flags = train_flags(cache, trained.parent, trained.name, "--max-train-steps", 4)
    code, out = call(train, *flags, "--learning-rate", 5e-4, "--align-loss", "l2")
    assert (
        code == 2
        and "--learning-rate was 0.001, is 0.0005" in out
        and "--align-loss was cosine, is l2" in out
    )
    assert len(read_metrics(trained)) == 2


def test_another_cache_on_a_started_run_is_refused(call, trained, cache, tmp_path):
    other = shutil.copytree(cache, tmp_path / "data")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"vae_fingerprint": "0" * 64}))
    code, out = call(
        train, *train_flags(other, trained.parent, trained.name, "--max-train-steps", 4)
    )
    assert code == 2 and "not the cache" in out and "vae_fingerprint" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--align-depth", 7], "--align-depth 7: SiT-Ti/2 has blocks 1 to 6"),
        (["--align-depth", 0], "--align-depth/--encoder-depth: 0 is not"),
        (["--align-depth", "two"], "--encoder-depth: two is not"),
        (["--align-t-range", 0.5, 0.4], "--align-t-range 0.5 0.4: LO lies above HI"),
        (
            ["--gradient-accumulation-steps", 3],
            "--batch-size 8 (global) is not a multiple of 1 (processes) x",
        ),
        (["--model", "SiT-S/8", "--resolution", 64], "--resolution 64"),
        (["--num-classes", 1000], "--num-classes 1000"),
        (["--data-dir", "/nonexistent"], "--data-dir: /nonexistent does not exist"),
        (["--exp-name", "a/b"], "--exp-name 'a/b'"),
        (["--exp-name", ""], "--exp-name ''"),
        (["--learning-rate", -1], "argument --learning-rate: -1 is not a number above 0"),
        (["--max-grad-norm", 0], "argument --max-grad-norm: 0 is not a number above 0"),
        (["--align-weight", "nan"], "argument --align-weight/--proj-coeff: nan is not a number"),
        (["--adam-beta1", 1], "argument --adam-beta1"),
        (["--mixed-precision", "fp16"], "--mixed-precision fp16 needs a GPU"),
        (["--align-loss", "huber"], "invalid choice: 'huber'"),
        (["--batch-size", 0], "0 is not a whole number of at least 1"),
        (
            ["--sampling-steps", 2, "--vae", "/nonexistent/vae"],
            "--vae /nonexistent/vae: there is no such folder",
        ),
    ],
)
def test_mistakes_end_in_one_line_before_any_work(call, cache, tmp_path, flags, message):
    code, out = call(train, *train_flags(cache, tmp_path, "run"), *flags)
    assert code == 2 and message in out and len(out.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_vae_that_did_not_make_the_cache_is_refused(call, cache, tmp_path):
    other = make_vae(tmp_path / "vae", seed=1)
    code, out = call(
        train, *train_flags(cache, tmp_path, "run"), "--sampling-steps", 2, "--vae", other
    )
    assert code == 2 and "is not the VAE that made the cache" in out


def test_patches_must_fit_the_latents(call, cache, tmp_path):
    code, _ = call(
        train, *train_flags(cache, tmp_path, "ok", "--model", "SiT-S/8", "--max-train-steps", 1)
    )
    assert code == 0  # 8x8 latents are one patch of 8
    other = shutil.copytree(cache, tmp_path / "data")
    manifest = json.loads((other / "manifest.json").read_text())
    for shard in manifest["shards"]:
        np.save(
            other / "moments" / shard["file"],
            np.load(other / "moments" / shard["file"])[:, :, :6, :6],
        )
    (other / "manifest.json").write_text(json.dumps(manifest | {"latent_shape": [4, 6, 6]}))
    code, out = call(train, *train_flags(other, tmp_path, "run", "--model", "SiT-S/4"))
    assert code == 2 and "cannot cut the latents" in out


@pytest.mark.parametrize("target", ["mean", "sample"])
def test_a_sample_is_aligned_to_its_own_latent(monkeypatch, call, cache, tmp_path, target):
    from latents.cache import LatentCache
    from models.autoencoder import LatentScale
    from models.targets import latent_tokens

    losses, seen = train.training_losses, []

    def spy(model, path, prediction, latent, labels, noise, t, targets, align):
        seen.append((latent, targets["sra2"]))
        return losses(model, path, prediction, latent, labels, noise, t, targets, align)

    monkeypatch.setattr(train, "training_losses", spy)
    assert (
        call(
            train,
            *train_flags(cache, tmp_path, "run", "--max-train-steps", 3, "--align-target", target),
        )[0]
        == 0
    )
    latent, tokens = (torch.cat(parts) for parts in zip(*seen))  # one epoch: every image once
    if target == "sample":
        assert torch.equal(tokens, latent_tokens(latent, 2))
        return
    data = LatentCache(cache)
    moments = data.gather(np.arange(24))[0]
    scale = LatentScale(data.manifest.scale, data.manifest.shift)
    means, stds = scale.mean(moments), moments.float().chunk(2, 1)[1] * scale.scale
    for x, z in zip(latent, tokens):
        own = [i for i in range(24) if torch.equal(latent_tokens(means[i : i + 1], 2)[0], z)]
        assert len(own) == 1 and ((x - means[own[0]]).abs() < 6 * stds[own[0]]).all()


def test_label_dropout_is_cfg_prob(monkeypatch, call, cache, tmp_path):
    seen = []
    losses = train.training_losses

    def spy(model, path, prediction, latent, labels, *rest):
        seen.append(labels.clone())
        return losses(model, path, prediction, latent, labels, *rest)

    monkeypatch.setattr(train, "training_losses", spy)
    for probability, low, high in ((0.0, 0, 0), (1.0, 1, 1), (0.3, 0.1, 0.55)):
        seen.clear()
        name = f"p{probability}"
        assert (
            call(
                train,
                *train_flags(
                    cache, tmp_path, name, "--max-train-steps", 6, "--cfg-prob", probability
                ),
            )[0]
            == 0
        )
        share = (
            (torch.cat(seen) == 3).float().mean().item()
        )  # the null class of three classes, not 1000
        assert low <= share <= high
