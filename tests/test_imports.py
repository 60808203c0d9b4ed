"""Test the rules for imports. A module may import only the modules in its row of `ALLOWED`."""

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.helpers import ROOT

# Package or top-level module -> packages and modules of this project that it may import.
ALLOWED = {
    "common": set(),
    "interpolant": set(),
    "loss": set(),
    "samplers": {"interpolant"},
    "models": {"common.lfs"},
    "latents": {"common"},
    "dataset": {"common", "latents"},
    "preprocessing": {"common", "latents", "models"},
    "checkpointing": {"common", "models"},
    "evaluations": {
        "common",
        "models.errors",
        "models.weights",
        "preprocessing.image_source",
        "preprocessing.images",
        "preprocessing.sources",
    },
    "sampling": {"common", "evaluations", "interpolant", "models", "samplers"},
    "assets": {"common.progress", "evaluations"},
}
LIBRARY = set(ALLOWED) - {"assets"}
ALLOWED["training"] = LIBRARY
ALLOWED["train"] = LIBRARY | {"training"}
ALLOWED["sample_ddp"] = LIBRARY
ALLOWED["examples"] = {"interpolant", "loss", "models.projector"}
ALLOWED["benchmarks"] = ALLOWED["experiments"] = {*ALLOWED, "benchmarks", "experiments"}

TENSOR_CODE = {"models", "loss", "interpolant", "samplers", "dataset", "latents"}

# Third-party packages that only some commands require.
OPTIONAL = {"jinja2", "matplotlib", "pyarrow", "tensorboard", "torch_fidelity", "wandb"}


def list_source_files() -> list[Path]:
    """Return the paths of all source files outside tests, relative to the root."""
    # Search only in packages, because a virtual environment in the root has thousands of files.
    packages = {path.parent for path in ROOT.glob("*/__init__.py")} - {ROOT / "tests"}
    paths = [*ROOT.glob("*.py"), *(path for package in packages for path in package.rglob("*.py"))]
    return sorted(path.relative_to(ROOT) for path in paths)


def parse_file(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def find_imported_modules(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names of the modules that are imported by the nodes."""
    modules = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            modules |= {f"{node.module}.{name.name}" for name in node.names}
    return modules


def get_top_level_names(modules: Iterable[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def is_allowed(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("path", list_source_files(), ids=str)
def test_imports_follow_the_table(path):
    package = path.with_suffix("").parts[0]
    allowed = ALLOWED[package] | {package}
    for module in find_imported_modules(ast.walk(parse_file(path))):
        if module.split(".")[0] in ALLOWED:
            assert is_allowed(module, allowed), f"{path} may not import {module}"


def test_modules_of_tensor_code_do_not_import_argparse():
    for path in list_source_files():
        if path.with_suffix("").parts[0] in TENSOR_CODE:
            assert "argparse" not in find_imported_modules(ast.walk(parse_file(path))), path


def test_optional_packages_are_imported_inside_functions():
    for path in list_source_files():
        if path.parts[0] != "benchmarks":  # benchmarks use packages of requirements-dev.txt
            modules = find_imported_modules(parse_file(path).body)
            assert not get_top_level_names(modules) & OPTIONAL, path


def test_only_one_module_imports_tqdm():
    """The others use `ProgressBar`, which writes lines of text if there is no terminal."""
    paths = [path for path in list_source_files() if path != Path("common/progress.py")]
    for path in paths:
        modules = find_imported_modules(ast.walk(parse_file(path)))
        assert "tqdm" not in get_top_level_names(modules), path


def test_top_level_has_six_python_files():
    modules = {"train", "sample_ddp", "loss", "interpolant", "samplers", "dataset"}
    assert {path.stem for path in ROOT.glob("*.py")} == modules


def test_tests_package_is_not_shadowed():
    """The package torch-fidelity installs another top-level package named `tests`."""
    import tests

    assert Path(tests.__file__).parent == ROOT / "tests"
