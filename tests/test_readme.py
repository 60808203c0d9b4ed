"""The README's commands, run as they are written, on a small ImageNet-like tree: flags are appended that make them short, and a
tiny VAE stands in the hub's place."""

import json
import re
import shlex

import numpy as np
import pytest
from PIL import Image

import sample_ddp
import train
from evaluations import evaluate, report, suite
from latents.cache import LatentCache
from preprocessing import encode_latents, import_repa, verify
from tests.helpers import ROOT
from tests.preprocessing.test_import_repa import make_repa_folder

README = (ROOT / "README.md").read_text()
NOT_OURS = (
    "--cpu",
    "--requeue",
    "--nnodes",
    "--rdzv_endpoint",
    "--rdzv",
    "--coarse-side",
)  # of launchers, of an example


def commands() -> list[list[str]]:
    """Every command in the README's bash blocks, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line and not line.startswith("#")]


def of(script: str) -> list[list[str]]:
    """The flags of every command that runs this script."""
    return [words[words.index(script) + 1 :] for words in commands() if script in words]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A folder with data/imagenet/train/n0.../*.JPEG of mixed sizes and modes."""
    root, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    modes = ("RGB", "L", "CMYK", "RGB", "RGB", "L")
    sizes = ((500, 375), (256, 300), (333, 517), (120, 90), (1100, 800), (64, 64))
    for i, (mode, size) in enumerate(zip(modes, sizes)):
        path = root / f"data/imagenet/train/n0{i % 2}/n0{i % 2}_{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size).convert(mode).save(path)
    return root


def test_imagenet_commands_run_as_written(call, imagenet, vae_folder, monkeypatch):
    monkeypatch.chdir(imagenet)
    short = {
        "--model": "SiT-S/8",
        "--max-train-steps": 2,
        "--batch-size": 8,
        "--sampling-steps": 0,
        "--log-every": 1,
        "--num-workers": 0,
    }
    short_training = [word for pair in short.items() for word in pair]
    (encode,), (evaluation,) = of("preprocessing.encode_latents"), of("evaluations.evaluate")
    trainings = [flags for flags in of("train.py") if "data/imagenet256" in flags]
    samplings = of("sample_ddp.py")
    evaluated = [flags for flags in trainings if "--eval-every" in flags]
    trainings = [flags for flags in trainings if "--eval-every" not in flags]
    assert len(trainings) == 2 and len(evaluated) == 1 and len(samplings) == 2
    code, out = call(encode_latents, *encode, "--vae", vae_folder)
    assert code == 0 and "6 images, 2 classes" in out, out
    assert (
        "is valid" in call(verify, "data/imagenet256")[1]
        and "preprocessing.verify data/imagenet256" in README
    )
    for i, flags in enumerate(trainings):
        code, out = call(train, *flags, *short_training, "--exp-name", f"xl2-sra2{'-again' * i}")
        assert code == 0, out
    for flags in samplings:
        code, out = call(
            sample_ddp, *flags, "--num-fid-samples", 5, "--num-steps", 2, "--per-proc-batch-size", 5
        )
        assert code == 0, out
    (report_flags,) = of("evaluations.report")
    assert call(report, *report_flags)[0] == 0 and (imagenet / "report.html").exists()
    name = evaluation[0].replace("4000000", "0000002").replace("maruyama250", "maruyama2")
    assert (imagenet / name).exists()
    np.savez(imagenet / evaluation[2], arr_0=np.zeros((5, 256, 256, 3), np.uint8))
    monkeypatch.setenv("TORCH_HOME", str(imagenet))
    for script, flags in (
        (evaluate, [name, *evaluation[1:]]),
        (train, [*evaluated[0], *short_training, "--exp-name", "e"]),
    ):
        code, out = call(script, *flags)
        assert code == 2 and "no Inception weights: fetch" in out


def test_repas_data_is_imported_as_written(call, vae_folder, tmp_path, monkeypatch):
    (flags,) = of("preprocessing.import_repa")
    monkeypatch.chdir(tmp_path)
    make_repa_folder(tmp_path / flags[0], vae_folder)
    code, out = call(import_repa, *flags, "--vae", vae_folder)
    assert code == 0 and len(LatentCache(flags[1])) == 12, out


def test_the_cache_is_read_from_other_code_as_written(cache, monkeypatch, tmp_path):
    """The five lines of docs/data.md, on a small cache in ImageNet's place."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.S)
    assert len([line for line in code.splitlines() if line]) == 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/imagenet256").symlink_to(cache)
    names: dict = {}
    exec(code, names)
    stored, labels = LatentCache("data/imagenet256").gather(np.arange(10))
    np.testing.assert_array_equal(names["labels"], labels)
    np.testing.assert_array_equal(
        np.concatenate((names["mean"], names["std"]), 1), stored.float().numpy()
    )
    assert names["latents"].shape == (10, 4, 8, 8)


def test_launchers_take_the_flags_given_to_them():
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    launched = 0
    for words in commands():
        if words[:2] == ["accelerate", "launch"]:
            parsed = launch_command_parser().parse_args(words[2:])
            launched += parsed.training_script == "train.py"
        elif words[0] == "torchrun":
            parsed = get_args_parser().parse_args(words[1:])
            launched += (
                parsed.training_script in ("sample_ddp.py", "evaluations.evaluate")
                and parsed.nproc_per_node == "8"
            )
    assert launched == 5


def test_a_step_number_in_a_file_name_has_seven_digits():
    """The README's samples/NAME follows from the README's --max-train-steps."""
    steps = {
        flags[flags.index("--max-train-steps") + 1]
        for flags in of("train.py")
        if "data/imagenet256" in flags
    }
    assert steps == {"4000000"} and "xl2-sra2-4000000-" in of("evaluations.evaluate")[0][0]


DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_documents_name_exists(call, document):
    """Files in links, flags, and `function` (file) pairs."""
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / document).parent.joinpath(target).exists(), target
    for names, file in re.findall(r"`([A-Za-z_.]+)(?:\([^`]*\))?` \(([a-z_/]+\.py)\)", text):
        assert all(
            re.search(rf"(def|class) {name}\b", (ROOT / file).read_text())
            for name in names.split(".")
        ), (names, file)
    scripts = (
        path
        for folder in (".", "models", "preprocessing", "evaluations", "benchmarks", "experiments")
        for path in (ROOT / folder).glob("*.py")
    )
    sources = "".join(path.read_text() for path in scripts)
    sources += re.sub(r"(--[a-z0-9-]+)", r'"\1"', call(sample_ddp, "--help")[1])
    for flag in re.findall(r"`(--[a-z0-9-]+)", text):
        assert f'"{flag}"' in sources or flag in (
            "--cpu",
            "--requeue",
            "--nnodes",
            "--rdzv_endpoint",
            "--rdzv",
            "--coarse-side",
        ), flag


def test_the_demos_figures_are_those_that_were_measured():
    """docs/demo.json is the metrics.json of the run whose picture stands in the README."""
    text, measured = (
        (ROOT / "README.md").read_text(),
        json.loads((ROOT / "docs/demo.json").read_text()),
    )
    assert suite.format_results(measured) in text
    assert measured["metrics"]["class_agreement"] >= 0.75
