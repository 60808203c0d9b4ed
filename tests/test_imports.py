"""Import rules between packages: a module may import only what its row of `ALLOWED` names."""

import ast
from pathlib import Path

import pytest

from tests.helpers import ROOT

# Package or top-level module -> packages and modules of this project that it may import, besides its own package.
ALLOWED = {
    "common": set(),
    "interpolant": set(),
    "loss": {"interpolant"},
    "samplers": {"interpolant"},
    "models": {"interpolant"},
    "latents": {"common"},
    "dataset": {"common", "latents"},
    "preprocessing": {"common", "latents", "models"},
    "checkpointing": {"common", "models"},
    "evaluations": {
        "common",
        "models.encoder",
        "models.errors",
        "preprocessing.images",
        "preprocessing.sources",
    },
    "sampling": {"common", "evaluations", "interpolant", "models", "samplers"},
    "assets": {"evaluations"},
}
LIBRARY = set(ALLOWED) - {"assets"}
ALLOWED["training"] = LIBRARY
ALLOWED["train"] = ALLOWED["sample_ddp"] = LIBRARY | {"training"}
ALLOWED["benchmarks"] = ALLOWED["experiments"] = {*ALLOWED, "benchmarks", "experiments"}

NO_COMMAND_LINE = {"models", "loss", "interpolant", "samplers", "dataset", "latents"}


def source_files() -> list[Path]:
    paths = (path.relative_to(ROOT) for path in sorted(ROOT.rglob("*.py")))
    return [path for path in paths if path.parts[0] not in (".venv", "tests")]


def imported_modules(path: Path) -> set[str]:
    """Return every module that a file imports, at its top or inside a function."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules |= {f"{node.module}.{name.name}" for name in node.names}
    return modules


def is_allowed(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("path", source_files(), ids=str)
def test_imports_follow_the_table(path):
    package = path.with_suffix("").parts[0]
    for module in imported_modules(path):
        if module.split(".")[0] in ALLOWED:
            assert is_allowed(module, ALLOWED[package] | {package}), (
                f"{path} may not import {module}"
            )


@pytest.mark.parametrize(
    "path",
    [path for path in source_files() if path.with_suffix("").parts[0] in NO_COMMAND_LINE],
    ids=str,
)
def test_method_and_models_do_not_parse_command_lines(path):
    assert "argparse" not in {module.split(".")[0] for module in imported_modules(path)}


def test_top_level_has_six_python_files():
    names = {path.name for path in ROOT.glob("*.py")}
    assert names == {
        "train.py",
        "sample_ddp.py",
        "loss.py",
        "interpolant.py",
        "samplers.py",
        "dataset.py",
    }


def test_tests_package_is_ours():
    """torch-fidelity's wheel installs a top-level package called tests, which must not shadow ours."""
    import tests

    assert Path(tests.__file__).parent == ROOT / "tests"
