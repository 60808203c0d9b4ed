"""Run the commands of the README and docs/training.md, and check names and numbers in the docs.

The commands run on a small tree in the layout of ImageNet, with appended flags that shorten them
and select a tiny VAE instead of a downloaded VAE.
"""

import argparse
import importlib
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
from tests.helpers import ROOT, make_vae
from tests.preprocessing.test_import_repa import make_repa_folder
from tests.test_coming_from_repa import THEIR_FLAGS, list_their_flags
from tests.test_imports import list_source_files

README = (ROOT / "README.md").read_text()
TRAINING = (ROOT / "docs/training.md").read_text()
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
SHORT_TRAINING = shlex.split(
    "--model SiT-Ti/2 --max-train-steps 2 --batch-size 4 --sampling-steps 0 --log-every 1 "
    "--num-workers 0"
)
SHORT_SAMPLING = shlex.split("--num-fid-samples 5 --num-steps 2 --per-proc-batch-size 5")
FLAGS_OF_OTHER_PROGRAMS = {
    "--cpu",  # accelerate launch
    "--num_processes",
    "--cpus-per-task",  # sbatch and srun
    "--dependency",
    "--gpu-bind",
    "--gpus-per-node",
    "--gpus-per-task",
    "--kill-on-bad-exit",
    "--ntasks-per-node",
    "--output",
    "--requeue",
    "--signal",
    "--max-restarts",  # torchrun
    "--nnodes",
    "--rdzv",
    "--rdzv_endpoint",
    "--coarse-side",  # a flag of the method that docs/extending.md adds
}


def read_commands() -> list[list[str]]:
    """Return every complete command in the bash blocks of both pages, split into words."""
    blocks = re.findall(r"```bash\n(.*?)```", README + TRAINING, re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line and not line.startswith("#")]
    return [words for words in commands if "NAME" not in words]


def find_arguments(script: str) -> list[list[str]]:
    """Return the arguments of every command in both pages that runs a script or module."""
    return [words[words.index(script) + 1 :] for words in read_commands() if script in words]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Return a folder with data/imagenet/train/n0*/*.JPEG of mixed sizes and modes."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    modes = ("RGB", "L", "CMYK", "RGB", "RGB", "L")
    sizes = ((500, 375), (256, 300), (333, 517), (120, 90), (1100, 800), (64, 64))
    for i, (mode, size) in enumerate(zip(modes, sizes)):
        path = root / f"data/imagenet/train/n0{i % 2}/n0{i % 2}_{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size).convert(mode).save(path)
    return root


def test_imagenet_commands_run_as_written(call, imagenet, tmp_path, monkeypatch):
    monkeypatch.chdir(imagenet)
    vae = make_vae(tmp_path, blocks=6)  # its latents of 256-pixel images are small: 8x8
    training_commands = [
        words for words in find_arguments("train.py") if "data/imagenet256" in words
    ]
    evaluated_trainings = [words for words in training_commands if "--eval-every" in words]
    plain_trainings = [words for words in training_commands if "--eval-every" not in words]
    samplings = find_arguments("sample_ddp.py")
    (encoding,) = find_arguments("preprocessing.encode_latents")
    (evaluation,) = find_arguments("evaluations.evaluate")
    (reporting,) = find_arguments("evaluations.report")
    assert len(plain_trainings) == len(samplings) == 2 and len(evaluated_trainings) == 1

    # Encode and verify.
    code, out = call(encode_latents, *encoding, "--vae", vae)
    assert code == 0 and "6 images, 2 classes" in out, out
    (verification,) = re.findall(r"`python -m preprocessing.verify ([a-z0-9/]+)`", README)
    code, out = call(verify, verification)
    assert code == 0 and "is valid" in out, out

    # Train. The second command uses another name, because otherwise it would resume the first run.
    for words, name in zip(plain_trainings, ("xl2-sra2", "xl2-sra2-again")):
        code, out = call(train, *words, *SHORT_TRAINING, "--exp-name", name)
        assert code == 0, out

    # Sample and report.
    for words in samplings:
        code, out = call(sample_ddp, *words, *SHORT_SAMPLING)
        assert code == 0, out
    assert call(report, *reporting)[0] == 0 and (imagenet / "report.html").exists()
    samples = evaluation[0].replace("4000000", "0000002").replace("maruyama250", "maruyama2")
    assert (imagenet / samples).exists()

    # Evaluate. The Inception weights are missing, so the error messages name the file to download.
    np.savez(imagenet / evaluation[2], arr_0=np.zeros((5, 256, 256, 3), np.uint8))
    monkeypatch.setenv("TORCH_HOME", str(imagenet))
    code, out = call(evaluate, samples, *evaluation[1:])
    assert code == 2 and "no Inception weights: fetch" in out
    code, out = call(train, *evaluated_trainings[0], *SHORT_TRAINING, "--exp-name", "evaluated")
    assert code == 2 and "no Inception weights: fetch" in out


def test_import_of_repa_data_runs_as_written(call, vae_folder, tmp_path, monkeypatch):
    (words,) = find_arguments("preprocessing.import_repa")
    monkeypatch.chdir(tmp_path)
    make_repa_folder(tmp_path / words[0], vae_folder)
    code, out = call(import_repa, *words, "--vae", vae_folder)
    assert code == 0 and len(LatentCache(words[1])) == 12, out


def test_example_of_reading_a_cache_runs_as_written(cache, monkeypatch, tmp_path):
    """Run the five lines of docs/data.md on a small cache."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.S)
    assert len([line for line in code.splitlines() if line]) == 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/imagenet256").symlink_to(cache)
    names: dict = {}
    exec(code, names)
    moments, labels = LatentCache("data/imagenet256").gather(np.arange(10))
    read_moments = np.concatenate((names["mean"], names["std"]), 1)
    np.testing.assert_array_equal(read_moments, moments.float().numpy())
    np.testing.assert_array_equal(names["labels"], labels)
    assert names["latents"].shape == (10, 4, 8, 8)


def test_launchers_accept_the_flags_of_the_commands():
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    launched = []
    for words in read_commands():
        if words[:2] == ["accelerate", "launch"]:
            parsed = launch_command_parser().parse_args(words[2:])
            launched.append(parsed.training_script)
        elif words[0] == "torchrun":
            parsed = get_args_parser().parse_args(words[1:])
            assert parsed.nproc_per_node == "8"
            launched.append(parsed.training_script)
    expected = ["evaluations.evaluate", "sample_ddp.py", "sample_ddp.py", "train.py", "train.py"]
    assert sorted(launched) == expected


def test_name_of_the_sample_file_contains_the_number_of_steps():
    training_commands = [
        words for words in find_arguments("train.py") if "data/imagenet256" in words
    ]
    steps = {words[words.index("--max-train-steps") + 1] for words in training_commands}
    assert steps == {"4000000"}
    assert "xl2-sra2-4000000-" in find_arguments("evaluations.evaluate")[0][0]


def find_command_modules() -> list[str]:
    """Return the names of all modules that have a command line."""
    return [
        ".".join(path.with_suffix("").parts)
        for path in list_source_files()
        if "\ndef main(" in (ROOT / path).read_text()
    ]


@pytest.fixture(scope="module")
def known_flags():
    """Return the flags of all commands."""
    flags = set()

    def record(parser, *args, **kwargs):
        flags.update(parser._option_string_actions)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", record)
        for module in find_command_modules():
            with pytest.raises(SystemExit):
                importlib.import_module(module).main()
    return flags


@pytest.mark.parametrize("document", DOCUMENTS)
def test_linked_files_exist(document):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / document).read_text()):
        assert (ROOT / document).parent.joinpath(target).exists(), target


def find_anchors(text: str) -> set[str]:
    """Return the anchors that GitHub creates for the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_linked_headings_exist(document):
    page = ROOT / document
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text()):
        linked = page.parent / target if target else page
        assert anchor in find_anchors(linked.read_text()), (target, anchor)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_functions_exist(document):
    """Check pairs of the form `function` (file.py)."""
    text = (ROOT / document).read_text()
    for names, file in re.findall(r"`([A-Za-z_.]+)(?:\([^`]*\))?` \(([a-z_/]+\.py)\)", text):
        source = (ROOT / file).read_text()
        for name in names.split("."):
            assert re.search(rf"(def|class) {name}\b", source), (names, file)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_flags_exist(document, known_flags):
    flags = set(re.findall(r"`(--[a-z0-9_-]+)", (ROOT / document).read_text()))
    foreign_flags = set()
    if document == "docs/coming-from-repa.md":
        foreign_flags = {flag for program in THEIR_FLAGS for flag in list_their_flags(program)}
    assert flags <= known_flags | FLAGS_OF_OTHER_PROGRAMS | foreign_flags


def test_readme_shows_the_measured_results_of_the_demo():
    """Compare the README with docs/demo.json, the metrics.json of the run that it shows."""
    measured = json.loads((ROOT / "docs/demo.json").read_text())
    assert suite.format_results(measured) in README
    assert measured["metrics"]["class_agreement"] >= 0.75


def test_speed_and_cost_in_the_readme_are_those_of_the_benchmarks():
    results = ROOT / "benchmarks/results"
    counts = json.loads((results / "cost_xl2_counts.json").read_text())["results"]["sra2"]
    gpu = json.loads((results / "train-step-xl2-b64-h200.json").read_text())
    cpu = json.loads((results / "train-step-xl2-cpu.json").read_text())
    parameters = counts["parameters"]["heads"] / 1e6
    numbers = [
        f"{parameters:.1f}M (+{counts['more_parameters']:.1%}) parameters",
        f"+{counts['more_training_flops']:.1%} FLOPs",
        f"{gpu['results']['sra2']['images_per_s']:.0f} images/s",
    ]
    for result in (gpu, cpu):
        ratio = result["ratios"]["sra2/none"]
        low, high = ratio["quartiles"]
        numbers.append(f"{ratio['median']:.3f} ({low:.3f} to {high:.3f})")
    assert [number for number in numbers if number not in README] == []
