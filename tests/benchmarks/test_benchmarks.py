"""Test that the benchmarks run on a CPU and that the documentation agrees with their results."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

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
    log_size,
    resume,
    sampling,
    start,
    table,
    table_rows,
    train_step,
    vae,
)
from benchmarks.sampler import Sampler, make_config, make_random_source
from models.autoencoder import Autoencoder
from models.flops import backbone_flops
from models.sit import PRESETS, SiTConfig
from sample_ddp import PrecisionConfig
from sampling.recipe import SamplerConfig
from tests.helpers import ROOT
from train import Step


@pytest.fixture
def run_benchmark(call, tmp_path):
    """Return a function that runs a benchmark with flags and returns the JSON result."""

    def run(module, *flags) -> dict:
        path = tmp_path / "result.json"
        code, out = call(module, *flags, "--json", path)
        assert code == 0, out
        assert path.read_text() in out
        return json.loads(path.read_text())

    return run


def read_page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


def count_images_per_call(model, counts: list[int]):
    """Return a copy of a network that appends the number of images of each call to `counts`."""
    model = copy.deepcopy(model)
    model.register_forward_pre_hook(lambda module, inputs: counts.append(len(inputs[0])))
    return model


def test_train_step_compares_plain_vanilla_and_aligned_steps(run_benchmark):
    flags = "--model SiT-S/8 --batch-size 4 --plain --rounds 3 --warm-up 0"
    result = run_benchmark(train_step, *flags.split())
    assert list(result["results"]) == ["plain", "none", "sra2"]
    assert list(result["ratios"]) == ["sra2/none", "sra2/plain"]
    for values in result["results"].values():
        assert values["images_per_s"] * values["step_s"]["median"] == pytest.approx(4)
        assert 0 < values["matmul_share"] < 1.5
        assert values["peak_memory_gib"] > 0 and values["first_step_s"] > 0
    assert 0.05 < result["head_flops_share"] < 0.15
    assert result["machine"]["torch"]


def test_train_step_accepts_settings_of_training(call, run_benchmark, tmp_path, process_group):
    flags = "--model SiT-Ti/2 --latent-size 8 --batch-size 4 --align none --precision bf16"
    flags = [
        *flags.split(),
        "--rounds",
        1,
        "--warm-up",
        0,
        "--activation-checkpointing",
        "--shard",
        "full",
    ]
    flags += ["--gradient-accumulation-steps"]
    table = tmp_path / "kernels.txt"
    result = run_benchmark(train_step, *flags, 2, "--kernel-table", table)
    assert "aten::addmm" in table.read_text()
    assert list(result["results"]) == ["none", "none sharded"]
    assert result["shard"] == "full"
    assert result["precision"] == "bf16" and result["activation_checkpointing"]
    code, out = call(train_step, *flags, 3)
    assert code == 2 and "--batch-size 4 (global) is not a multiple" in out


def test_train_step_compares_recomputation_with_accumulation(call, run_benchmark, monkeypatch):
    parts = []  # (micro-batches, recomputed blocks) of the steps

    def record(step, batch):
        parts.append((step.accumulation, step.state.model.backbone.num_recomputed_blocks))

    monkeypatch.setattr(Step, "__call__", record)
    flags = "--model SiT-Ti/2 --latent-size 8 --batch-size 4 --align sra2 --rounds 2 --warm-up 0"
    flags += " --accumulated"
    recompute = ["--activation-checkpointing", "--recomputed-blocks", 3]
    result = run_benchmark(train_step, *flags.split(), 2, *recompute)
    assert parts == 3 * [(1, 3), (2, 0)]  # the first steps, and two rounds
    assert list(result["results"]) == ["sra2", "sra2 in 2 parts"]
    assert list(result["ratios"]) == ["sra2/sra2 in 2 parts"]
    code, out = call(train_step, *flags.split(), 3)
    assert code == 2 and "--batch-size 4 is not a multiple of --accumulated 3" in out


def test_start_runs_train_with_and_without_compiled_graphs(run_benchmark, monkeypatch, tmp_path):
    folders = []

    def run(command, env, check):
        folders.append(Path(env["TMPDIR"]).name)
        assert "TORCHINDUCTOR_CACHE_DIR" not in env
        metrics = tmp_path / "dest/start-benchmark/exps/start/metrics.jsonl"
        metrics.parent.mkdir(parents=True)
        metrics.write_text(json.dumps({"step_s": 2.5}) + "\n")
        assert "--compile" in command
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(start.subprocess, "run", run)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/graphs")
    result = run_benchmark(start, "--dest", tmp_path / "dest", "--model", "SiT-Ti/2")
    assert folders == ["machine-1", "machine-1", "machine-2"]
    assert list(result["results"]) == ["cold", "restart", "another machine"]
    assert [values["first_step_s"] for values in result["results"].values()] == 3 * [2.5]
    assert not list((tmp_path / "dest").iterdir())
    assert len(list(table_rows.start_rows(result))) == 3


def test_resume_reads_the_checkpoint_to_verify_it_and_to_restore_it(run_benchmark, tmp_path):
    result = run_benchmark(resume, "--model", "SiT-Ti/2", "--dest", tmp_path / "dest")
    num_bytes = result["checkpoint_bytes"]
    assert 2 * num_bytes <= result["total_read_bytes"] < 2.1 * num_bytes
    (process,) = result["processes"]
    assert process["seconds"] > 0 and process["read_bytes"] == result["total_read_bytes"]
    assert not list((tmp_path / "dest").iterdir())


def test_checkpoint_times_copy_write_and_pause(run_benchmark, tmp_path):
    flags = ["--model", "SiT-Ti/2", "--rounds", 2, "--dest", tmp_path / "dest"]
    result = run_benchmark(checkpoint, *flags)
    # A checkpoint contains weights, head, EMA and two moments per parameter, in float32.
    assert 30e6 < result["bytes"] < 45e6
    assert list(result["results"]) == ["copy_s", "write_s", "longest_pause_s"]
    assert all(value["median"] > 0 for value in result["results"].values())
    assert not list((tmp_path / "dest").iterdir())


def test_data_loading_compares_cache_and_files(run_benchmark, tmp_path):
    flags = "--images 60 --shards 5 --batch-size 8 --batches 2 --rounds 2 --num-workers 1"
    result = run_benchmark(data_loading, *flags.split(), "--dest", tmp_path / "dest")
    assert list(result["results"]) == [
        "npy",
        "cache",
        "memory",
        "npy, 1 workers",
        "cache, 1 workers",
        "copy",
        "npy, cold",
        "cache, cold",
    ]
    assert all(values["samples_per_s"] > 0 for values in result["results"].values())
    assert set(result["ratios"]) >= {"npy/cache", "npy, cold/cache, cold"}
    assert not list((tmp_path / "dest").iterdir())


def test_encode_reports_the_utilisation_of_the_vae(run_benchmark, vae_folder, tmp_path):
    flags = "--images 4 --resolution 32 --rounds 2 --num-workers 1"
    dest = tmp_path / "dest"
    result = run_benchmark(encode, *flags.split(), "--vae", vae_folder, "--dest", dest)
    assert list(result["results"]) == [
        "encode_latents",
        "VAE alone",
        "one at a time",
        "decoding alone",
    ]
    assert result["flops_per_image"] > 1e6
    assert 0 < result["ratios"]["VAE alone/encode_latents"]["median"] < 1.2
    assert not list(dest.iterdir())


def test_evaluation_compares_with_other_implementations(run_benchmark):
    flags = "--images 60 --width 8 --rounds 2 --warm-up 0"
    result = run_benchmark(evaluation, *flags.split())
    assert set(result["ratios"]) == {
        "sqrtm/frechet_distance",
        "numpy/statistics",
        "torch-fidelity/precision_recall",
    }
    assert all(values["call_s"]["median"] > 0 for values in result["results"].values())
    assert result["machine"]["scipy"]


def test_adm_comparison_computes_all_recorded_quantities():
    counts = {"reference": 50, "samples": 60, "few": 9, "activations": 30}
    arrays = adm_evaluator.make_inputs(counts, 24, 10)
    ours = adm_evaluator.compute_repository_results(arrays)
    recorded = json.loads((ROOT / "docs/adm_evaluator.json").read_text())
    assert list(ours) == list(recorded["quantities"])
    assert all(np.isfinite(value).all() for value in ours.values())
    # ADM's evaluator uses float32 only if squared distances overflow float16.
    scaled = arrays["samples"].astype(np.float64) * adm_evaluator.OVERFLOW
    assert (np.square(scaled).sum(1) > np.finfo(np.float16).max).any()


def test_evaluation_page_agrees_with_the_adm_comparison():
    result = json.loads((ROOT / "docs/adm_evaluator.json").read_text())
    text = read_page("evaluation")
    assert adm_evaluator.format_table(result) in text
    for package, version in result["versions"]["theirs"].items():
        assert f"{package} {version}" in text.replace("\n", " ")

    # The page explains these differences.
    explained = {
        "mean": 3e-6,
        "distance of few": 2e-6,
        "radii, float16": 4e-3,
        "recall, float16": 2e-3,
        "radii, float32": 2e-6,
    }
    for name, row in result["quantities"].items():
        assert row["difference"] <= explained.get(name, 5e-8), name
        is_array = name.startswith(("mean", "covariance", "radii", "resize"))
        if not is_array:  # the file stores only the means of arrays
            computed = adm_evaluator.compare_results(row["adm"], row["ours"])
            assert row["difference"] == computed["difference"]


def test_sampling_compares_both_methods_with_the_lower_bound(run_benchmark, vae_folder, tmp_path):
    flags = "--model SiT-Ti/2 --resolution 32 --images 5 --batch-size 2 --num-steps 2"
    flags = [*flags.split(), *["--rounds", "2", "--warm-up", "0", "--vae"], vae_folder]
    result = run_benchmark(sampling, *flags, "--dest", tmp_path / "dest")
    assert list(result["results"]) == [
        "plain",
        "sample_ddp, fp32",
        "network alone, fp32",
        "VAE alone, fp32",
    ]
    network = SiTConfig(**PRESETS["SiT-Ti/2"], latent_size=8)
    assert result["flops_per_image"]["network"] == 2 * 2 * backbone_flops(network)
    assert result["flops_per_image"]["VAE"] > 1e6
    assert set(result["ratios"]) == {"plain/sample_ddp, fp32", "alone/sample_ddp, fp32"}
    assert not list((tmp_path / "dest").iterdir())


@pytest.mark.parametrize("mode", ["ode", "sde"])
def test_sampling_methods_sample_all_images_with_the_same_evaluations(vae_folder, tmp_path, mode):
    vae = Autoencoder(str(vae_folder))
    source = make_random_source("SiT-Ti/2", vae, 32)
    sampler_config = SamplerConfig(mode=mode, num_steps=3, cfg_scale=1.5)
    config = make_config(sampler_config, 5, 2, PrecisionConfig())
    sampler = Sampler(config, source, vae)
    counts: dict[str, list[int]] = {"plain": [], "sample_ddp": [], "network alone": []}

    plain_model = count_images_per_call(source.model, counts["plain"])
    plain_file = sampling.sample_plain(plain_model, vae, config, tmp_path / "plain")
    sampler.model = count_images_per_call(source.model, counts["sample_ddp"])
    sampler_file = sampler(tmp_path / "sample_ddp")
    sampler.model = count_images_per_call(source.model, counts["network alone"])
    sampler.run_alone(sampler.evaluate_network)

    for file in (plain_file, sampler_file):
        images = np.load(file)["arr_0"]
        assert images.shape == (5, 32, 32, 3)
        assert len({image.tobytes() for image in images}) == 5
    assert counts == dict.fromkeys(counts, 9 * [4])


def test_batch_sizes_are_compared_with_the_first(run_benchmark, trained, tmp_path, monkeypatch):
    compare_images = batch_size.compare_images
    compared = []

    def record_and_compare(a, b):
        compared.append((a, b))
        return compare_images(a, b)

    monkeypatch.setattr(batch_size, "compare_images", record_and_compare)
    flags = "--images 5 --num-steps 2 --batch-sizes 4 4 3 --cfg-scale 2"
    flags = [*flags.split(), "--ckpt", trained, "--dest", tmp_path / "dest"]
    result = run_benchmark(batch_size, *flags)
    assert len(compared) == 4 and all(a is not b for a, b in compared)
    for same, other in result["results"].values():
        assert same == {"batch_size": 4, "largest": 0, "values": 0, "images": 0}
        assert other["batch_size"] == 3 and other["largest"] <= 1


def test_image_comparison_counts_values_and_images():
    a = np.zeros((4, 2, 2, 3), np.uint8)
    b = a.copy()
    b[1, 0, 0] = 1, 0, 255
    expected = {"largest": 255, "values": 2 / 48, "images": 1 / 4}
    assert batch_size.compare_images(a, b) == expected
    assert batch_size.compare_images(b, a) == expected


def test_pages_contain_the_tables_of_the_results():
    pages = {
        "imagenet": "data",
        "evaluation": "evaluation",
        "sampling": "sampling",
        "batch_size": "sampling",
        "rivals": "rivals",
    }
    for name, text in table.make_tables().items():
        page = "scale" if name.startswith("scaling") else pages.get(name, "performance")
        assert text in read_page(page), name


def test_sampling_page_agrees_with_the_batch_size_results():
    result = json.loads((ROOT / "benchmarks/results/batch_size.json").read_text())
    others = [other for solver in result["results"].values() for other in solver]
    same_size = [other for other in others if other["batch_size"] == result["batch_size"]]
    assert all(other["largest"] == 0 for other in same_size)
    assert max(other["largest"] for other in others) == 1
    assert "by one grey level" in read_page("sampling")


def test_data_page_agrees_with_the_encoding_results():
    text = read_page("data")
    result = json.loads((ROOT / "benchmarks/results/encode-256-cpu.json").read_text())
    assert f"{result['flops_per_image'] / 1e12:.2f} / R seconds" in text
    minutes = table_rows.NUM_IMAGENET_IMAGES * result["flops_per_image"] / (8 * 50e12) / 60
    assert 13.5 < minutes < 16.5 and "a quarter of an hour" in text
    assert 1400 < table_rows.NUM_IMAGENET_IMAGES / minutes / 60 < 1600
    rate = int(result["results"]["decoding alone"]["images_per_s"])
    assert (
        f"crops {rate} images per second, so decoding takes one core for every {rate} images"
        in text.replace("\n", " ")
    )


def test_cluster_page_agrees_with_the_log_sizes():
    result = json.loads((ROOT / "benchmarks/results/log-size.json").read_text())
    long_run, progress = result["long_run"], result["results"]["progress"]
    assert long_run == log_size.compute_long_run(result["results"])
    assert progress["bytes"] <= result["computed_progress_bytes"] < 1.05 * progress["bytes"]
    assert long_run["total bytes"] < 10e6
    text = read_page("cluster/logs").replace("\n", " ")
    for expected in (
        f"{long_run['steps'] / 1e6:.2f} million steps in five days",
        f"{long_run['lines']:,} lines of at most {long_run['bytes_per_line']} bytes",
        f"the rank logs take {long_run['total bytes'] / 1e6:.1f} MB",
        f"{progress['lines']} lines took {progress['bytes']:,} bytes",
        f"the same calculation gives {result['computed_progress_bytes']:,}",
    ):
        assert expected in text


@pytest.mark.long
def test_log_sizes_of_a_short_run_are_measured(run_benchmark, cache, tmp_path):
    flags = ["--dest", tmp_path, "--data-dir", cache, "--seconds", 1, "--log-every", 1]
    result = run_benchmark(log_size, *flags)
    sizes = result["results"]
    assert sizes["progress"]["lines"] == result["steps"] > 0
    assert sizes["console"]["bytes"] > sizes["progress"]["bytes"]
    assert sizes["rank-1.log"]["lines"] >= 3


def test_vae_benchmark_compares_precisions_with_float32(run_benchmark, tree, vae_folder, tmp_path):
    flags = ["--source", tree, "--vae", vae_folder, "--resolution", 32, "--images", 3]
    flags += ["--batch-size", 2, "--rounds", 1, "--warm-up", 0, "--device", "cpu"]
    result = run_benchmark(vae, *flags, "--dest", tmp_path)
    assert result["images"] == 3 and list(result["results"]) == list(vae.CPU_PRECISIONS)
    exact = result["results"]["fp32"]
    assert exact["moments_error"]["max"] == exact["grey_level_error"]["max"] == 0
    rounded = result["results"]["bf16"]["moments_error"]
    # bfloat16 has three significant bits less than float16.
    assert 1 < rounded["median"] <= rounded["percentile_99"] <= rounded["max"]
    assert exact["encode_images_per_s"]["median"] > 0 < exact["decode_images_per_s"]["median"]


def test_float16_spacing_equals_numpys():
    values = torch.tensor([1.0, 1.5, 1023.0, 1024.0, 0.1, -0.3, 3e-5, 0.0])
    expected = np.abs(np.spacing(values.numpy().astype(np.float16)))
    # Below the smallest normal number, the spacing is constant.
    assert vae.float16_spacing(values).tolist() == expected.astype(np.float32).tolist()
