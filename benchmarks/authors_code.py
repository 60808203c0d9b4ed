"""Load code from clones of other repositories, and replay random numbers in it.

The modules of several repositories have the same names as ours. They are loaded by their path, and
are removed from sys.modules afterwards.
"""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from common.cli import UserError

# Functions of torch that draw random numbers in the losses and in the label dropout.
RANDOM_FUNCTIONS = ("rand", "rand_like", "randn_like")


def load_module(
    path: Path,
    flag: str,
    imports: Mapping[str, Any] | None = None,
    unavailable: Sequence[str] = (),
) -> ModuleType:
    """Load a Python file, or a package if the file is an __init__.py.

    Args:
        path: The file.
        flag: Flag with the repository of the file, for error messages.
        imports: Modules that the file imports by these names.
        unavailable: Names of packages that the file imports, but whose functions are not called.
            They need not be installed.

    Raises:
        UserError: The file does not exist.
    """
    # Import timm before sys.modules is patched below, because modules that are imported inside the
    # patch are removed afterwards, and torchvision, which timm imports, cannot be imported twice.
    import timm  # noqa: F401 - see above

    _check_exists(path, flag)
    is_package = path.name == "__init__.py"
    name = f"_authors_{path.parent.name if is_package else path.stem}"
    folders = [str(path.parent)] if is_package else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    empty_packages = {package: _make_empty_package(package) for package in unavailable}
    with patch.dict(sys.modules, {**(imports or {}), **empty_packages, name: module}):
        spec.loader.exec_module(module)
    return module


def load_functions(
    path: Path, flag: str, names: Sequence[str], variables: Mapping[str, Any]
) -> SimpleNamespace:
    """Load functions of a Python file without its imports and its other code.

    Args:
        path: The file.
        flag: Flag with the repository of the file, for error messages.
        names: Names of the functions.
        variables: Global variables that the functions use.

    Raises:
        UserError: The file or one of the functions does not exist.
    """
    _check_exists(path, flag)
    tree = ast.parse(path.read_text())
    tree.body = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    namespace = dict(variables)
    exec(compile(tree, str(path), "exec"), namespace)
    missing = sorted(set(names) - namespace.keys())
    if missing:
        raise UserError(
            f"{flag}: {path} does not contain {', '.join(missing)}; pass a clone of the authors' "
            "repository"
        )
    return SimpleNamespace(**{name: namespace[name] for name in names})


def _check_exists(path: Path, flag: str) -> None:
    if not path.is_file():
        raise UserError(f"{flag}: {path} does not exist; pass a clone of the authors' repository")


def _make_empty_package(name: str) -> ModuleType:
    """Return a module in which every name is None."""
    module = ModuleType(name)
    module.__getattr__ = lambda attribute: None  # type: ignore[method-assign]  # see PEP 562
    return module


@contextmanager
def replay_random_numbers(**draws: Sequence[Tensor]) -> Iterator[None]:
    """Replace the results of torch's random functions by given tensors.

    Args:
        draws: Name of the function -> results of its calls in their order. Functions without an
            entry must not be called.
    """
    pending = {name: list(draws.get(name, ())) for name in RANDOM_FUNCTIONS}

    def make_replay(name: str) -> Callable[..., Tensor]:
        def replay(*size: Any, **options: Any) -> Tensor:
            if name.endswith("_like"):
                shape = size[0].shape
            else:
                shape = torch.Size(size if isinstance(size[0], int) else size[0])
            value = pending[name].pop(0)
            assert value.shape == shape, (name, value.shape, shape)
            return value

        return replay

    with ExitStack() as stack:
        for name in RANDOM_FUNCTIONS:
            stack.enter_context(patch.object(torch, name, make_replay(name)))
        yield
    assert not any(pending.values()), f"numbers that were not drawn: {pending}"


def describe_files(root: Path, paths: Sequence[str]) -> dict:
    """Return the commit that is checked out in a clone, and the git object names of files in it.

    The commit is None if the folder is not a clone, or if one of the files is not part of the
    commit.
    """
    objects = {path: _run_git(root, "hash-object", path) for path in paths}
    commit = _run_git(root, "rev-parse", "HEAD")
    if any(_run_git(root, "rev-parse", f"HEAD:./{path}") != objects[path] for path in paths):
        commit = None
    return {"checked_out": commit, "files": objects}


def _run_git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None
