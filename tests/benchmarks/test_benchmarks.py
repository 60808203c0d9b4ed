"""The benchmarks run on a CPU, and the pages say what they wrote."""

import copy
import json

import numpy as np
import pytest
import torch

from benchmarks import (
    adm_evaluator,
    batch_size,
    checkpoint,
    data_loading,
    encode,
    evaluation,
    sampling,
    table,
    train_step,
)
from common.processes import World
from models.autoencoder import Autoencoder
from models.sit import PRESETS, SiTConfig
from tests.helpers import ROOT
from training.throughput import backbone_flops


def counted(model, sizes: list[int]):
    """A copy of the network that notes how many images each call is for."""
    model = copy.deepcopy(model)
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    return model


def test_train_step_times_vanilla_aligned_and_plain_in_one_run(call, tmp_path):
    flags = [
        "--model",
        "SiT-S/8",
        "--batch-size",
        "4",
        "--plain",
        "--rounds",
        "3",
        "--warm-up",
        "0",
        "--json",
    ]
    code, out = call(train_step, *flags, tmp_path / "a.json")
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["results"]) == ["plain", "none", "sra2"] and list(result["ratios"]) == [
        "sra2/none",
        "sra2/plain",
    ]
    for figures in result["results"].values():
        assert figures["images_per_s"] * figures["step_s"]["median"] == pytest.approx(4)
        assert (
            0 < figures["mfu"] < 1.5
            and figures["peak_memory_gib"] > 0
            and figures["first_step_s"] > 0
        )
    assert 0.05 < result["head_flops_share"] < 0.15 and result["machine"]["torch"]
    assert (tmp_path / "a.json").read_text() in out


def test_train_step_takes_what_training_takes(call, tmp_path):
    flags = "--model SiT-S/8 --batch-size 4 --align none --precision bf16 --activation-checkpointing --rounds 1 --warm-up 0"
    code, out = call(
        train_step,
        *flags.split(),
        "--gradient-accumulation-steps",
        2,
        "--json",
        tmp_path / "a.json",
    )
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    assert (
        list(result["results"]) == ["none"]
        and result["precision"] == "bf16"
        and result["activation_checkpointing"]
    )
    code, out = call(train_step, *flags.split(), "--gradient-accumulation-steps", 3)
    assert code == 2 and "--batch-size 4 (global) is not a multiple" in out


def test_checkpoint_tells_copy_write_and_pause_apart(call, tmp_path):
    code, out = call(
        checkpoint,
        "--model",
        "SiT-Ti/2",
        "--rounds",
        2,
        "--dest",
        tmp_path / "d",
        "--json",
        tmp_path / "a.json",
    )
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    assert (
        30e6 < result["bytes"] < 45e6
    )  # weights and head, their average, two moments of each, in float32
    assert all(figure["median"] > 0 for figure in result["results"].values()) and not list(
        (tmp_path / "d").iterdir()
    )


def test_data_loading_compares_cache_and_files(call, tmp_path):
    flags = "--images 60 --shards 5 --batch-size 8 --batches 2 --rounds 2 --num-workers 1"
    code, out = call(
        data_loading, *flags.split(), "--dest", tmp_path / "d", "--json", tmp_path / "a.json"
    )
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    ways = [
        "npy",
        "cache",
        "memory",
        "npy, 1 workers",
        "cache, 1 workers",
        "copy",
        "npy, cold",
        "cache, cold",
    ]
    assert list(result["results"]) == ways and all(
        figures["samples_per_s"] > 0 for figures in result["results"].values()
    )
    assert set(result["ratios"]) >= {"npy/cache", "npy, cold/cache, cold"} and not list(
        (tmp_path / "d").iterdir()
    )


def test_encode_tells_how_busy_the_vae_is(call, vae_folder, tmp_path):
    flags = [
        "--images",
        4,
        "--resolution",
        32,
        "--rounds",
        2,
        "--vae",
        vae_folder,
        "--num-workers",
        1,
    ]
    code, out = call(encode, *flags, "--dest", tmp_path / "d", "--json", tmp_path / "a.json")
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["results"]) == [
        "encode_latents",
        "VAE alone",
        "one at a time",
        "decoding alone",
    ]
    assert (
        result["flops_per_image"] > 1e6
        and 0 < result["ratios"]["VAE alone/encode_latents"]["median"] < 1.2
    )
    assert not (tmp_path / "d/benchmark-encode").exists()


def test_evaluation_compares_with_the_code_of_others(call, tmp_path):
    flags = "--images 60 --width 8 --rounds 2 --warm-up 0"
    code, out = call(evaluation, *flags.split(), "--json", tmp_path / "a.json")
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    assert set(result["ratios"]) == {
        "sqrtm/frechet_distance",
        "numpy/statistics",
        "torch-fidelity/precision_recall",
    }
    assert (
        all(figures["call_s"]["median"] > 0 for figures in result["results"].values())
        and result["machine"]["scipy"]
    )


def test_adms_evaluator_is_asked_what_ours_answers():
    arrays = adm_evaluator.make_inputs(
        {"reference": 50, "samples": 60, "few": 9, "activations": 30}, 24, 10
    )
    ours = adm_evaluator.compute_ours(arrays)
    assert list(ours) == list(
        json.loads((ROOT / "docs/adm_evaluator.json").read_text())["quantities"]
    )
    assert all(np.isfinite(value).all() for value in ours.values())
    scaled = arrays["samples"].astype(np.float64) * adm_evaluator.OVERFLOW
    assert (
        np.square(scaled).sum(1) > np.finfo(np.float16).max
    ).any()  # or ADM would not fall back to float32


def test_the_page_about_evaluation_holds_what_adms_evaluator_said():
    result, page = (
        json.loads((ROOT / "docs/adm_evaluator.json").read_text()),
        (ROOT / "docs/evaluation.md").read_text(),
    )
    assert adm_evaluator.table(result) in page
    for package, version in result["versions"]["theirs"].items():
        assert f"{package} {version}" in page.replace("\n", " ")
    known = {
        "mean": 3e-6,
        "distance of few": 2e-6,
        "radii, float16": 4e-3,
        "recall, float16": 2e-3,
        "radii, float32": 2e-6,
    }
    for name, row in result["quantities"].items():
        assert row["difference"] <= known.get(name, 5e-8), (
            name
        )  # the page says where these come from
        if not name.startswith(
            ("mean", "covariance", "radii", "resize")
        ):  # arrays, of which the file keeps means
            assert (
                row["difference"]
                == adm_evaluator.compare_results(row["adm"], row["ours"])["difference"]
            )


def test_sampling_times_both_ways_and_the_floor(call, vae_folder, tmp_path):
    flags = "--model SiT-Ti/2 --resolution 32 --images 5 --batch-size 2 --num-steps 2 --rounds 2 --warm-up 0 --vae"
    code, out = call(
        sampling,
        *flags.split(),
        vae_folder,
        "--dest",
        tmp_path / "d",
        "--json",
        tmp_path / "a.json",
    )
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["results"]) == [
        "plain",
        "sample_ddp, fp32",
        "network alone, fp32",
        "VAE alone, fp32",
    ]
    assert result["flops_per_image"]["network"] == 2 * 2 * backbone_flops(
        SiTConfig(**PRESETS["SiT-Ti/2"], latent_size=8)
    )
    assert result["flops_per_image"]["VAE"] > 1e6 and set(result["ratios"]) == {
        "plain/sample_ddp, fp32",
        "alone/sample_ddp, fp32",
    }
    assert not (tmp_path / "d/benchmark-sampling").exists()


@pytest.mark.parametrize("mode", ["ode", "sde"])
def test_both_ways_of_sampling_write_all_images(vae_folder, tmp_path, mode, monkeypatch):
    """And sample_ddp's forward passes are as many, and as large, as those of the floor."""
    flags = f"--model SiT-Ti/2 --images 5 --batch-size 2 --num-steps 3 --mode {mode} --dest ."
    monkeypatch.setattr("sys.argv", ["sampling", *flags.split()])
    args, source = (
        sampling.parse(),
        sampling.make_random_source("SiT-Ti/2", vae := Autoencoder(str(vae_folder)), 32),
    )
    ours = sampling.Sampler(sampling.sampling_flags(args), source, vae, World())
    seen: dict[str, list[int]] = {"theirs": [], "ours": [], "floor": []}
    theirs = sampling.sample_plain(
        counted(source.model, seen["theirs"]), vae, args, torch.device("cpu"), tmp_path / "theirs"
    )
    ours.model = counted(source.model, seen["ours"])
    files = theirs, ours(tmp_path / "ours")
    ours.model = counted(source.model, seen["floor"])
    ours.alone(ours.evaluate)
    for file in files:
        images = np.load(file)["arr_0"]
        assert images.shape == (5, 32, 32, 3) and len({image.tobytes() for image in images}) == 5
    assert seen["theirs"] == seen["ours"] == seen["floor"] == 9 * [4]


def test_the_batch_size_is_compared_with_the_first(call, trained, tmp_path):
    flags = [
        "--ckpt",
        trained,
        "--images",
        5,
        "--num-steps",
        2,
        "--batch-sizes",
        4,
        4,
        3,
        "--cfg-scale",
        2,
        "--dest",
        tmp_path,
    ]
    code, out = call(batch_size, *flags, "--json", tmp_path / "a.json")
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    for same, other in result["results"].values():
        assert (same["batch_size"], same["largest"], same["values"], same["images"]) == (4, 0, 0, 0)
        assert other["batch_size"] == 3 and other["largest"] <= 1
    a = np.zeros((4, 2, 2, 3), np.uint8)
    b = a.copy()
    b[1, 0, 0] = 1, 0, 255
    assert (
        batch_size.compare_images(a, b)
        == batch_size.compare_images(b, a)
        == {"largest": 255, "values": 2 / 48, "images": 1 / 4}
    )


def test_the_pages_hold_the_tables_of_the_results():
    pages = {
        "imagenet": "data",
        "evaluation": "evaluation",
        "sampling": "sampling",
        "batch_size": "sampling",
    }
    for name, text in table.make_tables().items():
        assert text in (ROOT / "docs" / f"{pages.get(name, 'performance')}.md").read_text()


def test_the_page_about_sampling_says_what_the_results_say():
    """Its prose on other batch sizes."""
    result = json.loads((ROOT / "benchmarks/results/batch_size.json").read_text())
    others = [other for solver in result["results"].values() for other in solver]
    assert all(
        other["largest"] == 0 for other in others if other["batch_size"] == result["batch_size"]
    )
    assert (
        max(other["largest"] for other in others) == 1
        and "by one grey level" in (ROOT / "docs/sampling.md").read_text()
    )


def test_the_page_about_data_computes_from_the_results():
    """What its prose says of ImageNet."""
    page = (ROOT / "docs/data.md").read_text()
    result = json.loads((ROOT / "benchmarks/results/encode-256-cpu.json").read_text())
    assert f"{result['flops_per_image'] / 1e12:.2f} / R seconds" in page
    minutes = table.NUM_IMAGENET_IMAGES * result["flops_per_image"] / (8 * 50e12) / 60
    assert (
        13.5 < minutes < 16.5
        and "a quarter of an hour" in page
        and 1400 < table.NUM_IMAGENET_IMAGES / minutes / 60 < 1600
    )
    decoded = int(result["results"]["decoding alone"]["images_per_s"])
    assert (
        f"crops {decoded} images per second here, which means one core for every {decoded} images"
        in page.replace("\n", " ")
    )
