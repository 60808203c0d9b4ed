"""The benchmarks run on a CPU, and the pages say what they wrote."""

import json

import numpy as np
import pytest

from benchmarks import adm_evaluator, checkpoint, data_loading, encode, evaluation, table, train_step
from tests.helpers import ROOT


def test_train_step_times_vanilla_aligned_and_plain_in_one_run(call, tmp_path):
    flags = ["--model", "SiT-S/8", "--batch-size", "4", "--plain", "--rounds", "3", "--warm-up", "0", "--json"]
    code, out = call(train_step, *flags, tmp_path / "a.json")
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["results"]) == ["plain", "none", "sra2"] and list(result["ratios"]) == ["sra2/none", "sra2/plain"]
    for figures in result["results"].values():
        assert figures["images_per_s"] * figures["step_s"]["median"] == pytest.approx(4)
        assert 0 < figures["mfu"] < 1.5 and figures["peak_memory_gib"] > 0 and figures["first_step_s"] > 0
    assert 0.05 < result["head_flops_share"] < 0.15 and result["machine"]["torch"]
    assert (tmp_path / "a.json").read_text() in out


def test_train_step_takes_what_training_takes(call, tmp_path):
    flags = "--model SiT-S/8 --batch-size 4 --align none --precision bf16 --activation-checkpointing --rounds 1 --warm-up 0"
    code, out = call(train_step, *flags.split(), "--gradient-accumulation-steps", 2, "--json", tmp_path / "a.json")
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["results"]) == ["none"] and result["precision"] == "bf16" and result["activation_checkpointing"]
    code, out = call(train_step, *flags.split(), "--gradient-accumulation-steps", 3)
    assert code == 2 and "--batch-size 4 (global) is not a multiple" in out


def test_checkpoint_tells_copy_write_and_pause_apart(call, tmp_path):
    code, out = call(checkpoint, "--model", "SiT-Ti/2", "--rounds", 2, "--dest", tmp_path / "d", "--json", tmp_path / "a.json")
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    assert 30e6 < result["bytes"] < 45e6  # weights and head, their average, two moments of each, in float32
    assert all(figure["median"] > 0 for figure in result["results"].values()) and not list((tmp_path / "d").iterdir())


def test_data_loading_compares_cache_and_files(call, tmp_path):
    flags = "--images 60 --shards 5 --batch-size 8 --batches 2 --rounds 2 --num-workers 1"
    code, out = call(data_loading, *flags.split(), "--dest", tmp_path / "d", "--json", tmp_path / "a.json")
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    ways = ["npy", "cache", "memory", "npy, 1 workers", "cache, 1 workers", "copy", "npy, cold", "cache, cold"]
    assert list(result["results"]) == ways and all(figures["samples_per_s"] > 0 for figures in result["results"].values())
    assert set(result["ratios"]) >= {"npy/cache", "npy, cold/cache, cold"} and not list((tmp_path / "d").iterdir())


def test_encode_tells_how_busy_the_vae_is(call, vae_folder, tmp_path):
    flags = ["--images", 4, "--resolution", 32, "--rounds", 2, "--vae", vae_folder, "--num-workers", 1]
    code, out = call(encode, *flags, "--dest", tmp_path / "d", "--json", tmp_path / "a.json")
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["results"]) == ["encode_latents", "VAE alone", "one at a time", "decoding alone"]
    assert result["flops_per_image"] > 1e6 and 0 < result["ratios"]["VAE alone/encode_latents"]["median"] < 1.2
    assert not (tmp_path / "d/benchmark-encode").exists()


def test_evaluation_compares_with_the_code_of_others(call, tmp_path):
    flags = "--images 60 --width 8 --rounds 2 --warm-up 0"
    code, out = call(evaluation, *flags.split(), "--json", tmp_path / "a.json")
    assert code == 0, out
    result = json.loads((tmp_path / "a.json").read_text())
    assert set(result["ratios"]) == {"sqrtm/frechet_distance", "numpy/statistics", "torch-fidelity/precision_recall"}
    assert all(figures["call_s"]["median"] > 0 for figures in result["results"].values()) and result["machine"]["scipy"]


def test_adms_evaluator_is_asked_what_ours_answers():
    arrays = adm_evaluator.inputs({"reference": 50, "samples": 60, "few": 9, "activations": 30}, 24, 10)
    ours = adm_evaluator.ours(arrays)
    assert list(ours) == list(json.loads((ROOT / "docs/adm_evaluator.json").read_text())["quantities"])
    assert all(np.isfinite(value).all() for value in ours.values())
    scaled = arrays["samples"].astype(np.float64) * adm_evaluator.OVERFLOW
    assert (np.square(scaled).sum(1) > np.finfo(np.float16).max).any()  # or ADM would not fall back to float32


def test_the_page_about_evaluation_holds_what_adms_evaluator_said():
    result, page = (json.loads((ROOT / "docs/adm_evaluator.json").read_text()), (ROOT / "docs/evaluation.md").read_text())
    assert adm_evaluator.table(result) in page
    for package, version in result["versions"]["theirs"].items():
        assert f"{package} {version}" in page.replace("\n", " ")
    known = {"mean": 3e-6, "distance of few": 2e-6, "radii, float16": 4e-3, "recall, float16": 2e-3, "radii, float32": 2e-6}
    for name, row in result["quantities"].items():
        assert row["difference"] <= known.get(name, 5e-8), name  # the page says where these come from
        if not name.startswith(("mean", "covariance", "radii", "resize")):  # arrays, of which the file keeps means
            assert row["difference"] == adm_evaluator.compared(row["adm"], row["ours"])["difference"]


def test_the_pages_hold_the_tables_of_the_results():
    page = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("performance", "data", "evaluation")}
    for name, text in table.tables().items():
        assert text in page[{"imagenet": "data", "evaluation": "evaluation"}.get(name, "performance")]


def test_the_page_about_data_computes_from_the_results():
    """What its prose says of ImageNet."""
    page = (ROOT / "docs/data.md").read_text()
    result = json.loads((ROOT / "benchmarks/results/encode-256-cpu.json").read_text())
    assert f"{result['flops_per_image'] / 1e12:.2f} / R seconds" in page
    minutes = table.IMAGENET * result["flops_per_image"] / (8 * 50e12) / 60
    assert 13.5 < minutes < 16.5 and "a quarter of an hour" in page and 1400 < table.IMAGENET / minutes / 60 < 1600
    decoded = int(result["results"]["decoding alone"]["images_per_s"])
    assert f"crops {decoded} images a second here, so that takes a core for every {decoded}" in page.replace("\n", " ")
