"""Test sample_ddp.py with a small trained network."""

import errno
import fcntl
import json
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample_ddp
from checkpointing import pretrained
from common.compile_cache import CompileCache
from common.keyed_random import Purpose, normal
from evaluations import evaluate
from models.sit import SiT, SiTConfig
from sampling.recipe import Recipe, cast_matmul_weights
from tests.helpers import get_fork_server, make_vae, run_ranks, wait_until

EMA_WEIGHTS = "checkpoints/0000002/ema.safetensors"


def copy_with_weights(run, folder, transform):
    """Copy a run, and apply `transform` (key, tensor) -> tensor to the weights of the EMA."""
    copy = shutil.copytree(run, folder)
    path = copy / EMA_WEIGHTS
    save_file({key: transform(key, value) for key, value in load_file(path).items()}, path)
    path.with_name("progress.json").unlink(missing_ok=True)  # it contains the hash of the weights
    return copy


@pytest.fixture(scope="module")
def trained(tmp_path_factory, trained):
    """Return a copy of the trained run with perturbed weights.

    After two training steps the output of the network is close to zero, which would hide errors in
    sampling.
    """
    generator = torch.Generator().manual_seed(0)

    def perturb(key, value):
        if "pos" in key:
            return value
        return value + 0.1 * torch.randn(value.shape, generator=generator)

    return copy_with_weights(trained, tmp_path_factory.mktemp("perturbed") / "trained", perturb)


def sampling_flags(ckpt, folder, *flags):
    """Return flags of sample_ddp.py for 11 images, 3 steps and batches of 4 images."""
    defaults = ["--num-fid-samples", 11, "--num-steps", 3, "--per-proc-batch-size", 4]
    return ["--ckpt", ckpt, "--sample-dir", folder, *defaults, *flags]


@pytest.fixture
def sample(call, trained, tmp_path):
    """Return a function that runs sample_ddp.py with extra flags and returns its output.

    The keyword arguments of the function are the name of the samples, the checkpoint, the folder,
    and the expected exit code.
    """

    def run(*flags, name="s", ckpt=trained, folder=tmp_path, code=0):
        all_flags = sampling_flags(ckpt, folder, "--name", name, *flags)
        actual_code, output = call(sample_ddp, *all_flags)
        assert actual_code == code, output
        return output

    return run


def read_samples(folder, name="s"):
    """Return images and labels of NAME.npz."""
    with np.load(folder / f"{name}.npz") as content:
        return content["arr_0"], content["arr_1"]


def read_images(folder, name="s"):
    """Return the images of NAME.npz as integers, so that differences do not overflow."""
    return read_samples(folder, name)[0].astype(int)


def read_json(path):
    return json.loads(path.read_text())


def file_names(folder):
    return sorted(path.name for path in folder.iterdir())


# Files


def test_npz_grid_and_record_are_written(call, trained, tmp_path):
    flags = sampling_flags(trained, tmp_path, "--labels", "balanced", "--cfg-scale", 2.0)
    code, output = call(sample_ddp, *flags)
    assert code == 0, output
    name = "trained-0000002-euler-maruyama3-cfg2-balanced-seed0"
    assert file_names(tmp_path) == [f"{name}.json", f"{name}.npz", f"{name}.png"]
    pixels, labels = read_samples(tmp_path, name)
    assert pixels.shape == (11, 32, 32, 3)
    assert pixels.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    record = read_json(tmp_path / f"{name}.json")
    expected = {
        "solver": "euler-maruyama",
        "num_steps": 3,
        "cfg_scale": 2.0,
        "step": 2,
        "images_seen": 16,
    }
    assert expected.items() <= record.items()
    assert Image.open(tmp_path / f"{name}.png").width > 4 * 64


def test_samples_in_use_by_another_process_are_refused(sample, monkeypatch):
    def fail(file, operation):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(fcntl, "lockf", fail)
    output = sample(code=2)
    assert "s.parts is in use by another process; wait until it ends or choose" in output


def test_png_files_equal_the_images_of_the_npz(sample, tmp_path):
    sample("--png")
    pixels, _ = read_samples(tmp_path)
    names = [f"{index:06d}.png" for index in range(11)]
    assert sorted(path.name for path in (tmp_path / "s").glob("*.png")) == names
    # A missing PNG file is written from the stored images.
    (tmp_path / "s/000009.png").unlink()
    sample("--png")
    for name, image in zip(names, pixels):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "s" / name)), image)
    # PNG files of other samples are not overwritten.
    (tmp_path / "s.npz").unlink()
    assert "global_seed was 0, is 1" in sample("--png", "--global-seed", 1, code=2)
    assert "already contains 11 images" in sample("--png", "--num-fid-samples", 5, code=2)


def test_files_of_other_samples_are_not_overwritten(sample, tree, tmp_path):
    # The existing file is not a record of samples.
    (tmp_path / "args.json").write_text("{}")
    assert "ema_sha256 was None" in sample(name="args", code=2)
    assert (tmp_path / "args.json").read_text() == "{}"
    assert file_names(tmp_path) == ["args.json"]
    # The existing metrics belong to images that were not kept.
    flags = ["--evaluate", tree, "--features", "fashion", "--no-npz"]
    sample(*flags)
    metrics = (tmp_path / "s.metrics.json").read_bytes()
    assert "global_seed was 0, is 1" in sample(*flags, "--global-seed", 1, code=2)
    assert "is for 11 images" in sample(*flags, "--num-fid-samples", 12, code=2)
    assert (tmp_path / "s.metrics.json").read_bytes() == metrics


def test_partial_file_of_a_killed_process_is_removed(sample, tmp_path):
    (tmp_path / ".s.npz.1.partial").write_bytes(b"half")
    sample()
    assert not (tmp_path / ".s.npz.1.partial").exists()


def test_samples_of_the_same_weights_under_another_path_are_complete(sample, trained, tmp_path):
    sample()
    (tmp_path / "link").symlink_to(trained)
    assert "is complete" in sample(ckpt=tmp_path / "link")


def test_samples_of_other_weights_under_the_same_path_are_rejected(sample, trained, tmp_path):
    run = copy_with_weights(trained, tmp_path / "run", lambda key, value: value)
    sample(ckpt=run)
    shutil.rmtree(run)
    copy_with_weights(trained, run, lambda key, value: value * 1.5)
    assert "ema_sha256 was" in sample(ckpt=run, code=2)


# Determinism and resuming


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--mode", "sde"], marks=pytest.mark.long),
        pytest.param(["--mode", "ode"], marks=pytest.mark.long),
        ["--mode", "ode", "--heun"],
        ["--mode", "ode", "--dopri5"],
        ["--mode", "sde", "--state-dtype", "float64", "--cfg-scale", 3],
    ],
)
def test_image_depends_only_on_seed_and_index(sample, tmp_path, flags):
    sample(*flags)
    sample(*flags, "--num-fid-samples", 6, name="few")
    sample(*flags, "--global-seed", 1, name="other")
    sample(*flags, "--per-proc-batch-size", 7, name="batch")
    images = read_images(tmp_path)
    assert np.array_equal(images[:6], read_images(tmp_path, "few"))
    # Another batch size may select other kernels, with other rounding errors.
    assert np.abs(images - read_images(tmp_path, "batch")).max() <= 1
    for image, other in zip(images, read_images(tmp_path, "other")):
        assert (image != other).mean() > 0.5
    assert len({image.tobytes() for image in images}) == 11


def test_run_killed_on_two_processes_and_resumed_on_three_writes_the_same_file(
    call, trained, tmp_path
):
    extra_flags = ["--name", "s", "--num-fid-samples", 62, "--num-steps", 12]
    torch.set_num_threads(2)
    assert call(sample_ddp, *sampling_flags(trained, tmp_path / "one", *extra_flags))[0] == 0
    # With more threads per operation, the last bit of a sum would depend on the number of threads.
    assert torch.get_num_threads() == 1

    flags = sampling_flags(trained, tmp_path, *extra_flags)
    server = get_fork_server()
    server.start_ranks(2, "sample_ddp", *flags)
    parts = tmp_path / "s.parts"
    wait_until(lambda: len(list(parts.glob("*.npy"))) >= 3)
    server.kill_ranks()
    assert 3 <= len(list(parts.glob("[0-9]*.npy"))) < 16
    assert not (tmp_path / "s.npz").exists()

    run_ranks(3, "sample_ddp", *flags)
    assert (tmp_path / "s.npz").read_bytes() == (tmp_path / "one/s.npz").read_bytes()
    assert not parts.exists()


def test_larger_count_extends_existing_samples(sample, tmp_path, monkeypatch):
    sample()
    sample_latents = Recipe.sample_latents
    sampled_indices = []

    def record_indices(recipe, model, indices, *args):
        sampled_indices.append(indices.tolist())
        return sample_latents(recipe, model, indices, *args)

    monkeypatch.setattr(Recipe, "sample_latents", record_indices)
    sample("--num-fid-samples", 18)
    # Images 8 to 10 were part of a padded batch, which is sampled again.
    assert sorted(sampled_indices) == [[8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]
    sample("--num-fid-samples", 18, name="at_once")
    assert (tmp_path / "s.npz").read_bytes() == (tmp_path / "at_once.npz").read_bytes()
    assert read_json(tmp_path / "s.json")["count"] == 18
    assert "already contains 18 images, but --num-fid-samples is 11" in sample(code=2)


def test_damaged_images_are_not_copied_or_evaluated(sample, tree, tmp_path):
    sample()
    content = bytearray((tmp_path / "s.npz").read_bytes())
    content[5000] ^= 1
    (tmp_path / "s.npz").write_bytes(content)
    for flags in (["--num-fid-samples", 18], ["--evaluate", tree, "--features", "fashion"]):
        output = sample(*flags, code=2)
        assert "s.npz is damaged" in output and "Bad CRC-32" in output
    assert (tmp_path / "s.npz").read_bytes() == content


def test_interrupted_sampling_resumes_and_rejects_other_settings(sample, tmp_path, monkeypatch):
    monkeypatch.setattr("common.processes.count_available_cores", lambda: 1)  # one batch at a time
    sample_latents = Recipe.sample_latents
    num_calls = 0

    def interrupt_third_call(*args):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise KeyboardInterrupt
        return sample_latents(*args)

    monkeypatch.setattr(Recipe, "sample_latents", interrupt_third_call)
    sample(code=130)
    assert "num_steps was 3, is 4" in sample("--num-steps", 4, code=2)
    sample()
    assert num_calls == 4  # two batches once and the interrupted batch twice
    assert "is complete" in sample()
    assert num_calls == 4

    # The error message suggests removing the file.
    (tmp_path / "s.npz").unlink()
    sample("--num-steps", 4)
    (tmp_path / "s.npz").unlink()
    sample()
    sample(name="at_once")
    assert np.array_equal(read_images(tmp_path), read_images(tmp_path, "at_once"))


# Evaluation


@pytest.mark.parametrize("no_npz", [False, True])
def test_metric_that_a_stored_file_lacks_is_computed_without_sampling(
    sample, tree, tmp_path, monkeypatch, no_npz
):
    flags = ["--evaluate", tree, "--features", "fashion", *no_npz * ["--no-npz"]]
    sample(*flags)
    path = tmp_path / "s.metrics.json"
    complete = path.read_text()
    old = read_json(path)
    del old["metrics"]["recall"]
    path.write_text(json.dumps(old))
    monkeypatch.setattr(Recipe, "sample_latents", None)
    output = sample(*flags)
    if no_npz:
        assert f"{path} lacks recall, and the images were discarded: remove the file" in output
        assert read_json(path) == old
    else:
        assert read_json(path) == json.loads(complete)


def test_metrics_computed_while_sampling_equal_metrics_of_the_npz(
    sample, call, tree, tmp_path, monkeypatch
):
    flags = ["--labels", "balanced", "--evaluate", tree, "--features", "fashion"]
    assert "FD-fashion" in sample(*flags, "--no-npz", name="discarded")
    files = ["discarded.json", "discarded.metrics.json", "discarded.png"]
    assert file_names(tmp_path) == files
    assert Image.open(tmp_path / "discarded.png").width > 4 * 64
    # Rerunning the same command samples no images.
    with monkeypatch.context() as patch:
        patch.setattr(sample_ddp, "run_batches", fail_if_any_batch)
        assert "FD-fashion" in sample(*flags, "--no-npz", name="discarded")

    sample("--labels", "balanced")
    evaluation = ["--reference", tree, "--features", "fashion", "--batch-size", 4]
    path = tmp_path / "m.json"
    assert call(evaluate, tmp_path / "s.npz", *evaluation, "--out", path)[0] == 0
    expected = read_json(path)
    actual = read_json(tmp_path / "discarded.metrics.json")
    assert expected["metrics"] == pytest.approx(actual["metrics"], rel=1e-5)
    for key, value in actual.items():
        if key not in ("metrics", "samples", "samples_sha256"):
            assert expected[key] == value, key
    # Existing samples are evaluated and not sampled again.
    sample(*flags)
    assert read_json(tmp_path / "s.metrics.json") == expected


def fail_if_any_batch(worker, batches, *args):
    assert not batches


def test_interrupted_features_are_used_only_for_the_same_networks_and_images(
    sample, call, tree, tmp_path
):
    """The last batch of an .npz of 10 images has two images, but 13 images need all four."""
    import timm

    for seed in (0, 1):
        torch.manual_seed(seed)
        weights = timm.create_model("test_vit", num_classes=0).state_dict()
        torch.save(weights, tmp_path / f"{seed}.pth")

    def network_flags(seed):
        return ["--features", "test_vit", "--encoder-weights", tmp_path / f"{seed}.pth"]

    def sample_and_evaluate(count, seed, is_interrupted=False):
        flags = ["--num-fid-samples", count, "--evaluate", tree, *network_flags(seed)]
        flags += ["--cache-dir", tmp_path / "cache"]
        with pytest.MonkeyPatch.context() as patch:
            if is_interrupted:
                patch.setattr(sample_ddp.SampleStore, "finalize", lambda *args: sys.exit(9))
            sample(*flags, code=9 if is_interrupted else 0)

    def compute_expected_metrics(seed):
        path = tmp_path / f"{time.time()}.json"
        flags = ["--reference", tree, *network_flags(seed), "--batch-size", 4, "--out", path]
        assert call(evaluate, tmp_path / "s.npz", *flags)[0] == 0
        return pytest.approx(read_json(path)["metrics"], rel=1e-5)

    def read_metrics():
        return read_json(tmp_path / "s.metrics.json")["metrics"]

    sample_and_evaluate(10, 0, is_interrupted=True)
    sample_and_evaluate(10, 1)
    assert read_metrics() == compute_expected_metrics(1)
    (tmp_path / "s.metrics.json").unlink()
    sample_and_evaluate(10, 0, is_interrupted=True)
    assert list((tmp_path / "s.parts").glob("*.safetensors"))
    sample_and_evaluate(13, 0)
    assert read_metrics() == compute_expected_metrics(0)
    output = sample("--num-fid-samples", 13, "--evaluate", tree, "--features", "fashion", code=2)
    assert "(features differ)" in output
    assert not (tmp_path / "s.parts").exists()


# Networks and labels


def test_labels_are_read_from_a_file_or_are_a_single_class(sample, call, trained, tmp_path):
    labels = [2, 0, 1, 1, 0, 2, 2, 2, 0, 1, 0]
    (tmp_path / "l.txt").write_text("\n".join(map(str, labels)))
    (tmp_path / "l.json").write_text(json.dumps(labels))
    np.save(tmp_path / "l.npy", labels)
    for suffix in ("txt", "json", "npy"):
        sample("--mode", "ode", "--labels", tmp_path / f"l.{suffix}", name=suffix)
    images, stored_labels = read_samples(tmp_path, "txt")
    assert stored_labels.tolist() == labels
    for name in ("json", "npy"):
        assert np.array_equal(read_samples(tmp_path, name)[0], images)

    sample("--mode", "ode", "--labels", tmp_path / "txt.npz", name="npz")
    assert np.array_equal(read_samples(tmp_path, "npz")[0], images)
    assert read_json(tmp_path / "npz.json")["labels_sha256"]

    flags = sampling_flags(trained, tmp_path, "--mode", "ode", "--labels", 2)
    assert call(sample_ddp, *flags)[0] == 0
    one_class, stored_labels = read_samples(tmp_path, "trained-0000002-euler3-class2-seed0")
    assert stored_labels.tolist() == [2] * 11
    are_equal = [np.array_equal(a, b) for a, b in zip(one_class, images)]
    assert are_equal == [label == 2 for label in labels]


def test_bf16_and_compile_are_applied_to_the_network(sample, tmp_path, monkeypatch):
    """bf16 changes the images slightly, and all six blocks are compiled."""
    compiled_blocks = []

    def record_compilation(block, dynamic):
        assert not dynamic
        compiled_blocks.append(block)

    graph_files = []
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(CompileCache, "load", lambda cache: graph_files.append(cache.path))
    monkeypatch.setattr(CompileCache, "save", lambda cache: graph_files.append(cache.path))
    monkeypatch.setattr(sample_ddp.SiTBlock, "compile", record_compilation)
    flags = ["--mode", "ode", "--labels", "balanced"]
    sample(*flags, "--compile", name="fp32")
    assert len(compiled_blocks) == 6
    assert [path.parent.name for path in graph_files] == [".compile-cache"] * 2  # loaded, saved
    sample(*flags, "--mixed-precision", "bf16", name="bf16")
    difference = np.abs(read_images(tmp_path, "fp32") - read_images(tmp_path, "bf16"))
    assert 0 < difference.mean() < 2


@pytest.mark.parametrize(
    ("flags", "networks", "expected"),
    [([], {}, 2), ([], {"inception": None}, 1), (["--no-allow-tf32"], {"inception": None}, 2)],
)
def test_features_do_not_change_the_precision_of_batches_on_other_threads(
    monkeypatch, flags, networks, expected
):
    """TF32 is a setting of the process, and features disable it."""
    threads = []
    monkeypatch.setattr(
        sample_ddp,
        "run_batches",
        lambda worker, batches, num_threads, *others: threads.append(num_threads),
    )
    worker = SimpleNamespace(
        device=torch.device("cuda"),
        model=SimpleNamespace(config=SiTConfig(2, 8, 2, 2)),
        networks=networks,
        store=SimpleNamespace(batch_size=4, count=4),
    )
    world = SimpleNamespace(rank=0, num_processes=1, local_rank=0, num_local_processes=1, cores=8)
    sample_ddp.sample_batches(worker, [], sample_ddp.parse_args(["--ckpt", "x", *flags]), world)
    assert threads == [expected]


def test_each_batch_is_sampled_by_one_process(monkeypatch):
    shares = []
    monkeypatch.setattr(
        sample_ddp, "run_batches", lambda worker, batches, *others: shares.append(batches)
    )
    worker = SimpleNamespace(
        device=torch.device("cpu"),
        model=SimpleNamespace(config=SiTConfig(2, 8, 2, 2)),
        store=SimpleNamespace(batch_size=4, count=28),
    )
    config = sample_ddp.parse_args(["--ckpt", "x"])
    for rank in range(3):
        world = SimpleNamespace(
            rank=rank, num_processes=3, local_rank=rank, num_local_processes=3, cores=8
        )
        sample_ddp.sample_batches(worker, [0, 2, 3, 4, 6], config, world)
    assert shares == [[0, 4], [2, 6], [3]]


def test_guidance_interval_compiles_one_graph_per_batch_size(trained, graph_counter):
    model = pretrained.load(trained).model
    recipe = Recipe(num_steps=6, cfg_scale=2.0, guidance_low=0.3, guidance_high=0.6)
    batches = [torch.arange(3), torch.arange(3, 6)]
    expected = [recipe.sample_latents(model, indices) for indices in batches]
    sample_ddp.prepare_model(model, sample_ddp.PrecisionConfig(compile=True), torch.device("cpu"))
    for indices, latents in zip(batches, expected):
        assert torch.equal(recipe.sample_latents(model, indices), latents)
    assert graph_counter.frame_count == 2
    recipe.sample_latents(model, torch.arange(5))  # a graph with a symbolic batch size would fit
    assert graph_counter.frame_count > 2


def test_cast_weights_give_the_same_latents_as_autocast(trained):
    model = pretrained.load(trained).model
    indices = torch.arange(3)
    recipe = Recipe(mode="ode", num_steps=3)
    expected = recipe.sample_latents(model, indices, torch.bfloat16)
    cast_matmul_weights(model, torch.bfloat16)
    assert torch.equal(recipe.sample_latents(model, indices, torch.bfloat16), expected)


def test_images_equal_those_of_a_plain_loop(sample, trained, tmp_path):
    """The loop takes two Euler steps of the ODE. Only the first step is guided."""
    from diffusers import AutoencoderKL

    flags = ["--mode", "ode", "--labels", "balanced", "--num-steps", 2]
    sample(*flags, "--cfg-scale", 2, "--guidance-low", 0.6)

    config = read_json(trained / "checkpoints/0000002/config.json")
    model = SiT(SiTConfig(**config["model"]))
    model.load_state_dict(load_file(trained / EMA_WEIGHTS))
    vae = AutoencoderKL.from_pretrained(config["data"]["vae"])
    x = normal(0, Purpose.INITIAL_NOISE, torch.arange(3), (4, 8, 8)).float()
    with torch.no_grad():
        for t in (1.0, 0.5):
            times = torch.full((3,), t)
            v = model(x, times, torch.arange(3))
            if t == 1:
                v = 2 * v - model(x, times, torch.full((3,), 3))
            x = x - 0.5 * v
        decoded = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
    expected = (decoded * 127.5 + 127.5).clamp(0, 255).permute(0, 2, 3, 1)
    assert np.abs(read_samples(tmp_path)[0][:3] - expected.numpy()).max() <= 0.51


def test_nan_weights_are_reported(sample, trained, tmp_path):
    run = copy_with_weights(trained, tmp_path / "run", lambda key, value: value * torch.nan)
    output = sample(ckpt=run, code=2)
    assert "the latents of batch" in output
    assert "not finite" in output
    assert "Traceback" not in output


# Flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ckpt", "/nonexistent"], "--ckpt /nonexistent: /nonexistent does not exist"),
        (["--cfg-scale", 0.5], "--cfg-scale 0.5 is below 1"),
        (
            ["--guidance-low", 0.7, "--guidance-high", 0.3],
            "--guidance-low 0.7 exceeds guidance_high, 0.3",
        ),
        (["--cfg-scale", "nan"], "--cfg-scale: nan is not a non-negative number"),
        (["--heun"], "--heun is an ODE solver; set the mode to ode"),
        (["--num-steps", 1], "--num-steps 1 is too few"),
        (["--vae", "/nonexistent/vae"], "--vae /nonexistent/vae does not exist"),
        (["--num-step", 3], "unrecognized arguments: --num-step 3; did you mean --num-steps?"),
        (["--dopri5"], "--dopri5 is an ODE solver; set the mode to ode"),
        (["--mode", "ode", "--dopri5", "--heun"], "--heun cannot be combined with dopri5"),
        (
            ["--labels", "sandals"],
            "--labels sandals does not exist; choose random, balanced, a class index",
        ),
        (["--labels", "3"], "--labels 3: 3 is not a class; choose classes from 0 to 2"),
        (["--labels", __file__], "cannot be read as one class per image"),
        (
            ["--no-npz"],
            "--no-npz would discard the samples without evaluating them; add --evaluate PATH",
        ),
        (["--evaluate", "/nonexistent"], "--evaluate /nonexistent does not exist"),
        (["--model", "SiT-XL/2"], "--model SiT-XL/2 is for official .pt files"),
        (["--resolution", 256], "--resolution 256: "),
        (["--num-classes", 1000], "has 3 classes; remove the flag"),
        (["--qk-norm"], "has no QK normalization; remove the flag"),
    ],
)
def test_invalid_flags_end_with_a_one_line_error_before_sampling(sample, tmp_path, flags, message):
    output = sample(*flags, folder=tmp_path / "out", code=2)
    assert message in output
    assert len(output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_too_short_label_file_is_rejected(sample, tmp_path):
    (tmp_path / "l.txt").write_text("0 1 2")
    output = sample("--labels", tmp_path / "l.txt", code=2)
    assert "l.txt contains 3 labels, but 11 are needed" in output


def test_vae_that_did_not_encode_the_training_data_is_rejected(sample, tmp_path):
    other = make_vae(tmp_path / "vae", seed=1)
    output = sample("--vae", other, code=2)
    assert "has different weights from the VAE that encoded the training data" in output


def test_print_config_prints_all_settings_and_samples_nothing(sample, tmp_path):
    output = sample("--print-config", "--cfg-scale", 1.5, folder=tmp_path / "out")
    assert "--cfg-scale 1.5" in output
    assert "--num-fid-samples 11" in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "is_ignored"),
    [
        ({"guidance_low": 0.3}, True),
        ({"guidance_high": 0.7}, True),
        ({"guidance_high": 0.7, "cfg_scale": 1.5}, False),
        ({"cfg_scale": 1.5}, False),
        ({}, False),
    ],
)
def test_guidance_interval_without_guidance_gives_a_warning(settings, is_ignored):
    warning = Recipe(**settings).describe_ignored_settings()
    assert ("have no effect without guidance: pass --cfg-scale" in warning) == is_ignored
    assert bool(warning) == is_ignored


def test_warnings_are_printed(sample, tmp_path):
    flags = ["--guidance-low", 0.3, "--evaluate", "/nonexistent"]
    output = sample(*flags, folder=tmp_path / "out", code=2)
    assert output.startswith("warning: --guidance-low and --guidance-high have no effect")


def test_recipe_is_built_without_a_command_line():
    recipe = Recipe(mode="ode", heun=True, labels="balanced")
    recipe.validate()
    assert recipe.solver == "heun"
    assert recipe.compute_labels(torch.arange(4), num_classes=3).tolist() == [0, 1, 2, 0]
