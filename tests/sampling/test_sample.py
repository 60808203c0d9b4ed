import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import sample_ddp
from checkpointing import pretrained
from evaluations import evaluate
from models.sit import SiT
from tests.helpers import ROOT, make_vae, run_ranks


def flags(trained, folder, *more):
    return [
        "--ckpt",
        trained,
        "--sample-dir",
        folder,
        "--num-fid-samples",
        11,
        "--num-steps",
        3,
        "--per-proc-batch-size",
        4,
        *more,
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, trained):
    """A copy, woken up: two steps leave a model whose output is next to nothing, and noise would pass for a result."""
    from safetensors.torch import load_file, save_file

    run = shutil.copytree(trained, tmp_path_factory.mktemp("awake") / "trained")
    path = run / "checkpoints/0000002/ema.safetensors"
    generator = torch.Generator().manual_seed(0)
    state = load_file(path)
    save_file(
        {
            k: v + 0.1 * torch.randn(v.shape, generator=generator) if "pos" not in k else v
            for k, v in state.items()
        },
        path,
    )
    return run


def images(folder, name="s"):
    with np.load(folder / f"{name}.npz") as content:
        return content["arr_0"], content["arr_1"]


def test_adm_npz_grid_and_record(call, trained, tmp_path):
    code, out = call(
        sample_ddp, *flags(trained, tmp_path, "--labels", "balanced", "--cfg-scale", 2.0)
    )
    assert code == 0, out
    name = "trained-0000002-euler-maruyama3-cfg2-balanced-seed0"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{name}.json",
        f"{name}.npz",
        f"{name}.png",
    ]
    pixels, labels = images(tmp_path, name)
    assert pixels.shape == (11, 32, 32, 3) and pixels.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert (
        record["solver"],
        record["num_steps"],
        record["cfg_scale"],
        record["step"],
        record["images_seen"],
    ) == (
        "euler-maruyama",
        3,
        2.0,
        2,
        16,
    )
    assert Image.open(tmp_path / f"{name}.png").width > 4 * 64


MODES = [
    "--mode sde",
    "--mode ode",
    "--mode ode --heun",
    "--mode ode --dopri5",
    "--mode sde --state-dtype float64 --cfg-scale 3",
]


@pytest.mark.parametrize("mode", [mode.split() for mode in MODES])
def test_an_image_depends_on_seed_and_index_alone(call, trained, tmp_path, mode):
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "s", *mode))[0] == 0
    assert (
        call(sample_ddp, *flags(trained, tmp_path, "--name", "few", *mode), "--num-fid-samples", 6)[
            0
        ]
        == 0
    )
    assert (
        call(sample_ddp, *flags(trained, tmp_path, "--name", "other", *mode), "--global-seed", 1)[0]
        == 0
    )
    assert (
        call(
            sample_ddp,
            *flags(trained, tmp_path, "--name", "batch", *mode),
            "--per-proc-batch-size",
            7,
        )[0]
        == 0
    )
    whole, few, other, batch = (
        images(tmp_path, name)[0].astype(int) for name in ("s", "few", "other", "batch")
    )
    assert np.array_equal(whole[:6], few)
    assert np.abs(whole - batch).max() <= 1  # another batch size makes other kernels
    assert all((a != b).mean() > 0.5 for a, b in zip(whole, other))
    assert len({image.tobytes() for image in whole}) == 11


def test_killed_on_two_processes_and_continued_on_three_it_is_the_file_of_one(
    call, trained, tmp_path
):
    more = ["--name", "s", "--num-fid-samples", 62, "--num-steps", 12]
    torch.set_num_threads(2)
    assert call(sample_ddp, *flags(trained, tmp_path / "one", *more))[0] == 0
    assert (
        torch.get_num_threads() == 1
    )  # or the last bit would depend on how many processes share the cores
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--rdzv_backend",
        "c10d",
    ]
    command += [
        "--rdzv_endpoint",
        "localhost:0",
        "sample_ddp.py",
        *map(str, flags(trained, tmp_path, *more)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    parts = tmp_path / "s.parts"
    deadline = time.time() + 120
    while len(list(parts.glob("*.npy"))) < 3 and time.time() < deadline:
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    there = {path: path.stat().st_mtime_ns for path in parts.glob("[0-9]*.npy")}
    assert 3 <= len(there) < 16 and not (tmp_path / "s.npz").exists()
    run_ranks(3, "sample_ddp", *flags(trained, tmp_path, *more))
    assert (tmp_path / "s.npz").read_bytes() == (tmp_path / "one/s.npz").read_bytes()
    assert not parts.exists()


def test_more_samples_are_added_to_those_there(call, trained, tmp_path, monkeypatch):
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "s"))[0] == 0
    latents, made = sample_ddp.Recipe.sample_latents, []
    monkeypatch.setattr(
        sample_ddp.Recipe,
        "sample_latents",
        lambda *args: made.append(args[2].tolist()) or latents(*args),
    )
    assert (
        call(sample_ddp, *flags(trained, tmp_path, "--name", "s"), "--num-fid-samples", 18)[0] == 0
    )
    assert sorted(made) == [
        [8, 9, 10, 11],
        [12, 13, 14, 15],
        [16, 17, 18, 19],
    ]  # 8 to 10 were a part of a batch
    assert (
        call(sample_ddp, *flags(trained, tmp_path, "--name", "whole"), "--num-fid-samples", 18)[0]
        == 0
    )
    assert (tmp_path / "s.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert json.loads((tmp_path / "s.json").read_text())["count"] == 18
    code, out = call(sample_ddp, *flags(trained, tmp_path, "--name", "s"))
    assert code == 2 and "holds 18 images already, and --num-fid-samples asks for 11" in out


def test_evaluated_on_the_fly_or_afterwards_the_numbers_are_the_same(
    call, trained, tree, tmp_path, monkeypatch
):
    more = ["--labels", "balanced", "--evaluate", tree, "--features", "fashion"]
    code, out = call(sample_ddp, *flags(trained, tmp_path, "--name", "fly", *more, "--no-npz"))
    assert code == 0 and "FD-fashion" in out, out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fly.json",
        "fly.metrics.json",
        "fly.png",
    ]
    assert Image.open(tmp_path / "fly.png").width > 4 * 64
    monkeypatch.setattr(
        sample_ddp, "run_batches", lambda worker, mine, *args: mine and pytest.fail("made again")
    )
    code, out = call(sample_ddp, *flags(trained, tmp_path, "--name", "fly", *more, "--no-npz"))
    assert code == 0 and "FD-fashion" in out
    monkeypatch.undo()

    assert (
        call(sample_ddp, *flags(trained, tmp_path, "--name", "s", "--labels", "balanced"))[0] == 0
    )
    same = [
        tmp_path / "s.npz",
        "--reference",
        tree,
        "--features",
        "fashion",
        "--batch-size",
        4,
        "--out",
        tmp_path / "m.json",
    ]
    assert call(evaluate, *same)[0] == 0
    afterwards, fly = (
        json.loads((tmp_path / name).read_text()) for name in ("m.json", "fly.metrics.json")
    )
    assert afterwards["metrics"] == pytest.approx(fly["metrics"], rel=1e-5)
    kept = {
        key: value
        for key, value in fly.items()
        if key not in ("metrics", "samples", "samples_sha256")
    }
    assert kept == {key: afterwards[key] for key in kept}
    assert (
        call(sample_ddp, *flags(trained, tmp_path, "--name", "s", *more))[0] == 0
    )  # of images that are there
    assert json.loads((tmp_path / "s.metrics.json").read_text()) == afterwards


def test_pngs_are_the_images(call, trained, tmp_path):
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "s", "--png"))[0] == 0
    pixels, _ = images(tmp_path)
    assert sorted(path.name for path in (tmp_path / "s").glob("*.png")) == [
        f"{i:06d}.png" for i in range(11)
    ]
    (tmp_path / "s/000009.png").unlink()
    assert (
        call(sample_ddp, *flags(trained, tmp_path, "--name", "s", "--png"))[0] == 0
    )  # from what is there
    for i in range(11):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"s/{i:06d}.png")), pixels[i])
    (tmp_path / "s.npz").unlink()
    code, out = call(
        sample_ddp, *flags(trained, tmp_path, "--name", "s", "--png", "--global-seed", 1)
    )
    assert (
        code == 2 and "global_seed was 0, is 1" in out
    )  # pictures of other samples are not taken for these
    code, out = call(
        sample_ddp, *flags(trained, tmp_path, "--name", "s", "--png", "--num-fid-samples", 5)
    )
    assert code == 2 and "holds 11 images already" in out


def test_features_left_by_an_interrupted_call_count_only_for_the_same_networks_and_images(
    call, trained, tree, tmp_path
):
    """Twelve images in an .npz: 8 to 11 are read from it as a batch; of thirteen they are not all of their batch."""
    import timm

    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(
            timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / f"{seed}.pth"
        )

    def sample(count, seed, interrupted=False, size=4):
        more = [
            "--name",
            "s",
            "--num-fid-samples",
            count,
            "--per-proc-batch-size",
            size,
            "--evaluate",
            tree,
        ]
        more += [
            "--features",
            "test_vit",
            "--encoder-weights",
            tmp_path / f"{seed}.pth",
            "--cache-dir",
            tmp_path / "cache",
        ]
        with pytest.MonkeyPatch.context() as patch:
            if interrupted:
                patch.setattr(sample_ddp, "finish", lambda *args, **kwargs: sys.exit(9))
            code, out = call(sample_ddp, *flags(trained, tmp_path, *more))
        assert code == (9 if interrupted else 0), out

    def truth(seed):
        same = [
            "--encoder-weights",
            tmp_path / f"{seed}.pth",
            "--batch-size",
            4,
            "--out",
            tmp_path / f"{time.time()}.json",
        ]
        assert (
            call(
                evaluate, tmp_path / "s.npz", "--reference", tree, "--features", "test_vit", *same
            )[0]
            == 0
        )
        return json.loads(same[-1].read_text())["metrics"]

    def said():
        return json.loads((tmp_path / "s.metrics.json").read_text())["metrics"]

    sample(10, 0, interrupted=True)
    sample(10, 1)
    assert said() == pytest.approx(truth(1), rel=1e-5)
    (tmp_path / "s.metrics.json").unlink()
    sample(10, 0, interrupted=True)
    assert list((tmp_path / "s.parts").glob("*.safetensors"))
    sample(13, 0)
    assert said() == pytest.approx(truth(0), rel=1e-5)
    code, out = call(
        sample_ddp,
        *flags(
            trained,
            tmp_path,
            "--name",
            "s",
            "--num-fid-samples",
            13,
            "--evaluate",
            tree,
            "--features",
            "fashion",
        ),
    )
    assert code == 2 and "holds the numbers of another evaluation (features differ)" in out
    assert not (tmp_path / "s.parts").exists()


def test_nothing_of_others_is_written_over(call, trained, tree, tmp_path):
    """A record that is none of samples, numbers of images that were not kept, rubbish of a killed process."""
    (tmp_path / "args.json").write_text("{}")
    code, out = call(sample_ddp, *flags(trained, tmp_path, "--name", "args"))
    assert (
        code == 2 and "ema_sha256 was None" in out and (tmp_path / "args.json").read_text() == "{}"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["args.json"]
    more = ["--name", "s", "--evaluate", tree, "--features", "fashion", "--no-npz"]
    assert call(sample_ddp, *flags(trained, tmp_path, *more))[0] == 0
    before = (tmp_path / "s.metrics.json").read_bytes()
    for changed, message in (
        (["--global-seed", 1], "global_seed was 0, is 1"),
        (["--num-fid-samples", 12], "is of 11 images"),
    ):
        code, out = call(sample_ddp, *flags(trained, tmp_path, *more, *changed))
        assert code == 2 and message in out, out
    assert (tmp_path / "s.metrics.json").read_bytes() == before
    (tmp_path / ".k.npz.1.partial").write_bytes(b"half")
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "k"))[0] == 0
    assert not (tmp_path / ".k.npz.1.partial").exists()


def test_the_same_weights_elsewhere_are_the_same(call, trained, tmp_path):
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "s"))[0] == 0
    (tmp_path / "link").symlink_to(trained)
    code, out = call(sample_ddp, *flags(tmp_path / "link", tmp_path, "--name", "s"))
    assert code == 0 and "is complete" in out


def test_a_network_of_nan_is_named(call, trained, tmp_path):
    from safetensors.torch import load_file, save_file

    run = shutil.copytree(trained, tmp_path / "run")
    path = run / "checkpoints/0000002/ema.safetensors"
    save_file({key: value * torch.nan for key, value in load_file(path).items()}, path)
    code, out = call(sample_ddp, *flags(run, tmp_path, "--name", "s"))
    assert (
        code == 2 and "latents of batch" in out and "not finite" in out and "Traceback" not in out
    )


def test_labels_of_a_file_and_of_one_class(call, trained, tmp_path):
    given = [2, 0, 1, 1, 0, 2, 2, 2, 0, 1, 0]
    (tmp_path / "l.txt").write_text("\n".join(map(str, given)))
    (tmp_path / "l.json").write_text(json.dumps(given))
    np.save(tmp_path / "l.npy", given)
    common = ["--mode", "ode"]
    for suffix in ("txt", "json", "npy"):
        assert (
            call(
                sample_ddp,
                *flags(
                    trained,
                    tmp_path,
                    "--labels",
                    tmp_path / f"l.{suffix}",
                    *common,
                    "--name",
                    suffix,
                ),
            )[0]
            == 0
        )
    assert call(sample_ddp, *flags(trained, tmp_path, "--labels", 2, *common))[0] == 0
    pixels, labels = images(tmp_path, "txt")
    assert labels.tolist() == given
    for name in ("json", "npy"):
        assert np.array_equal(images(tmp_path, name)[0], pixels)
    alone, twos = images(tmp_path, "trained-0000002-euler3-class2-seed0")
    assert twos.tolist() == [2] * 11
    same = [np.array_equal(a, b) for a, b in zip(alone, pixels)]
    assert same == [label == 2 for label in given]
    assert (
        call(
            sample_ddp,
            *flags(trained, tmp_path, "--labels", tmp_path / "txt.npz", *common, "--name", "npz"),
        )[0]
        == 0
    )
    assert np.array_equal(images(tmp_path, "npz")[0], pixels)
    assert json.loads((tmp_path / "npz.json").read_text())["labels_sha256"]


def test_bf16_and_compile_reach_the_network(call, trained, tmp_path, monkeypatch):
    """bf16 moves images, but not far; compiled blocks are those of the network that samples."""
    compiled = []
    monkeypatch.setattr(sample_ddp.SiTBlock, "compile", lambda block: compiled.append(block))
    common = ["--mode", "ode", "--labels", "balanced"]
    assert call(sample_ddp, *flags(trained, tmp_path, *common, "--name", "a", "--compile"))[0] == 0
    assert len(compiled) == 6
    assert (
        call(
            sample_ddp,
            *flags(trained, tmp_path, *common, "--name", "b", "--mixed-precision", "bf16"),
        )[0]
        == 0
    )
    a, b = (images(tmp_path, name)[0].astype(int) for name in "ab")
    assert 0 < np.abs(a - b).mean() < 2

    model = pretrained.load(trained).model
    index, recipe = torch.arange(3), sample_ddp.Recipe(mode="ode", num_steps=3)
    as_autocast = recipe.sample_latents(model, index, torch.bfloat16)
    sample_ddp.cast_matmul_weights(model, torch.bfloat16)
    assert torch.equal(recipe.sample_latents(model, index, torch.bfloat16), as_autocast)


def test_interrupted_sampling_goes_on_and_leftovers_are_refused(
    call, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr("common.processes.cores", lambda: 1)  # one batch at a time
    latents, done = sample_ddp.Recipe.sample_latents, []

    def interrupted(*args):
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return latents(*args)

    monkeypatch.setattr(sample_ddp.Recipe, "sample_latents", interrupted)
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "s"))[0] == 130
    code, out = call(sample_ddp, *flags(trained, tmp_path, "--name", "s"), "--num-steps", 4)
    assert code == 2 and "num_steps was 3, is 4" in out
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "s"))[0] == 0
    assert len(done) == 4  # two before, the interrupted one again
    code, out = call(sample_ddp, *flags(trained, tmp_path, "--name", "s"))
    assert code == 0 and "is complete" in out and len(done) == 4
    (tmp_path / "s.npz").unlink()  # the remedy that the message names works
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "s"), "--num-steps", 4)[0] == 0
    (tmp_path / "s.npz").unlink()
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "s"))[0] == 0
    assert call(sample_ddp, *flags(trained, tmp_path, "--name", "whole"))[0] == 0
    assert np.array_equal(images(tmp_path)[0], images(tmp_path, "whole")[0])


def test_a_checkpoint_trained_anew_in_the_same_place_is_another(call, trained, tmp_path):
    from safetensors.torch import load_file, save_file

    run = shutil.copytree(trained, tmp_path / "run")
    assert call(sample_ddp, *flags(run, tmp_path, "--name", "s"))[0] == 0
    path = run / "checkpoints/0000002/ema.safetensors"
    save_file({key: value * 1.5 for key, value in load_file(path).items()}, path)
    code, out = call(sample_ddp, *flags(run, tmp_path, "--name", "s"))
    assert code == 2 and "ema_sha256 was" in out


def test_samples_are_those_of_a_plain_loop(call, trained, tmp_path):
    """The shortest way from checkpoint to picture, written out: ODE, two Euler steps, of which the first is guided."""
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file

    from common.keyed_random import Purpose, normal
    from models.sit import SiTConfig

    more = [
        "--name",
        "s",
        "--mode",
        "ode",
        "--labels",
        "balanced",
        "--num-steps",
        2,
        "--cfg-scale",
        2,
        "--guidance-low",
        0.6,
    ]
    assert call(sample_ddp, *flags(trained, tmp_path, *more))[0] == 0
    config = json.loads((trained / "checkpoints/0000002/config.json").read_text())
    model = SiT(SiTConfig(**config["model"]))
    model.load_state_dict(load_file(trained / "checkpoints/0000002/ema.safetensors"))
    vae = AutoencoderKL.from_pretrained(config["data"]["vae"])
    x = normal(0, Purpose.INITIAL_NOISE, torch.arange(3), (4, 8, 8)).float()
    with torch.no_grad():
        for t in (1.0, 0.5):
            v = model(x, torch.full((3,), t), torch.arange(3))
            null = model(x, torch.full((3,), t), torch.full((3,), 3))
            x = x - 0.5 * (2 * v - null if t == 1 else v)
        decoded = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
    expected = (decoded * 127.5 + 127.5).clamp(0, 255).permute(0, 2, 3, 1)
    assert np.abs(images(tmp_path)[0][:3] - expected.numpy()).max() <= 0.51


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ckpt", "/nonexistent"], "--ckpt /nonexistent: /nonexistent does not exist"),
        (["--cfg-scale", 0.5], "--cfg-scale 0.5 is below 1"),
        (["--guidance-low", 0.7, "--guidance-high", 0.3], "--guidance-low 0.7 lies above"),
        (["--cfg-scale", "nan"], "nan is not a number of at least 0"),
        (["--heun"], "add --mode ode"),
        (["--num-steps", 1], "--num-steps 1 is too few"),
        (["--vae", "/nonexistent/vae"], "--vae /nonexistent/vae: there is no such folder"),
        (["--num-step", 3], "unrecognized arguments: --num-step 3; did you mean --num-steps?"),
        (["--dopri5"], "--dopri5 is an ODE solver: add --mode ode"),
        (["--mode", "ode", "--dopri5", "--heun"], "--heun and --dopri5 are two solvers"),
        (
            ["--labels", "sandals"],
            "--labels sandals is neither random, balanced, a class nor a file",
        ),
        (["--labels", "3"], "--labels 3: 3 is no class; the model has 0 to 2"),
        (["--labels", __file__], "cannot be read as a class for each image"),
        (["--no-npz"], "--no-npz keeps nothing of the samples: add --evaluate PATH"),
        (["--evaluate", "/nonexistent"], "--evaluate /nonexistent does not exist"),
        (["--model", "SiT-XL/2"], "--model is for official .pt files"),
    ],
)
def test_mistakes_end_in_one_line_before_any_work(call, trained, tmp_path, more, message):
    code, out = call(sample_ddp, *flags(trained, tmp_path / "out"), *more)
    assert code == 2 and message in out and len(out.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_another_vae_than_the_training_latents_is_refused(call, trained, tmp_path):
    other = make_vae(tmp_path / "vae", seed=1)
    code, out = call(sample_ddp, *flags(trained, tmp_path / "out", "--vae", other))
    assert code == 2 and "not the one that made the training latents" in out
