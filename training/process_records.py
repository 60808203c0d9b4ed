"""Describe the processes of a run for a comparison: code, packages, GPUs, flags and latent cache.

A process that differs from the others would train another network, or wait for them indefinitely.
"""

import hashlib
import importlib.metadata
import json
import platform
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.cli import UserError, format_value
from common.processes import ProcessEnvironment
from latents.cache import LatentCache
from latents.manifest import SHARED_FIELDS
from training.config import Settings
from training.resume import build_args_json

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("accelerate", "numpy", "timm", "diffusers", "safetensors")
# Flags that may differ between nodes: paths of local copies of the cache, whose contents are
# compared, and a number whose default depends on the number of cores.
LOCAL_FLAGS = ("data_dir", "local_cache", "num_workers")
# Packages and folders that train.py does not import.
UNUSED_CODE = ("assets", "benchmarks", "experiments", "tests")
# Fields of the manifest that determine what is trained on; `source` and `vae` may be local paths.
CACHE_FIELDS = ("count", "num_classes", *SHARED_FIELDS, "shards")
# Group of values that must be equal on all processes -> remedy if they differ. The groups are
# compared in this order.
REMEDIES = {
    "code": "update the folder of train.py on all nodes",
    "packages": "install the same versions on all nodes",
    "devices": "use the same kind of nodes, and check the GPU drivers",
    "flags": "start all processes with the same command, and with an explicit "
    "--mixed-precision if their GPUs differ",
    "cache": "copy the same cache to all nodes",
}
MAX_LISTED = 3  # maximum number of differences, ranges of ranks and hosts that a message lists


@dataclass(frozen=True)
class ProcessRecord:
    """The values that a process sends to the first process for comparison.

    Attributes:
        rank: Rank of the process.
        host: Name of its machine.
        groups: Values that must be equal on all processes, by group (see REMEDIES) and name.
        problem: Error of this process that does not depend on the others, or "".
        gpu_name: Name of its GPU, or "".
    """

    rank: int
    host: str
    groups: dict[str, dict[str, str]] = field(default_factory=dict)
    problem: str = ""
    gpu_name: str = ""


def check_records(records: Sequence[ProcessRecord], rank: int) -> None:
    """Compare records that all processes have gathered; every process must call this.

    Raises:
        UserError: On the first process, if a record differs from its own.
        SystemExit: On the other processes in this case, with code 2.
    """
    problem = describe_difference(records)
    if problem:
        raise UserError(problem) if rank == 0 else SystemExit(2)


def make_process_record(environment: ProcessEnvironment, settings: Settings) -> ProcessRecord:
    """Return the record of this process before it opens the cache."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    packages = {name: _find_version(name) for name in PACKAGES}
    packages["torch"] = str(torch.__version__)
    packages["Python"] = ".".join(platform.python_version_tuple()[:2])
    device = "cpu"
    problem = ""
    gpu_name = ""
    if num_gpus > 0:
        device = "cuda"
        packages["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        if environment.local_rank < num_gpus:
            gpu_name = torch.cuda.get_device_name(environment.local_rank)
        else:
            problem = (
                f"no GPU is left, because {environment.num_local_processes} processes share the "
                f"{num_gpus} that are visible: start one process per GPU (--nproc_per_node, "
                "--ntasks-per-node), and remove options such as --gpus-per-task, which hide GPUs"
            )
    flags = build_args_json(settings)
    groups = {
        "code": hash_code(ROOT),
        "packages": packages,
        "devices": {"the device": device},
        "flags": {
            f"--{name.replace('_', '-')}": format_value(value)
            for name, value in flags.items()
            if name not in LOCAL_FLAGS
        },
    }
    return ProcessRecord(environment.rank, socket.gethostname(), groups, problem, gpu_name)


def make_cache_record(rank: int, cache: LatentCache) -> ProcessRecord:
    """Return the record of the latent cache that a process has opened."""
    values = {name: getattr(cache.manifest, name) for name in CACHE_FIELDS}
    values["features"] = cache.read_feature_metadata()
    cache_values = {f"{name} of --data-dir": _shorten(value) for name, value in values.items()}
    return ProcessRecord(rank, socket.gethostname(), {"cache": cache_values})


def hash_code(root: Path) -> dict[str, str]:
    """Return a hash of each top-level module and package that train.py may import."""
    hashes = {}
    for path in sorted(root.iterdir()):
        if path.suffix == ".py":
            files = [path]
        elif path.name not in UNUSED_CODE and (path / "__init__.py").exists():
            files = sorted(path.rglob("*.py"))
        else:
            continue
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.relative_to(root)}\n".encode())
            digest.update(file.read_bytes())
        hashes[f"the code in {path.name}"] = f"sha256 {digest.hexdigest()[:8]}"
    return hashes


def describe_difference(records: Sequence[ProcessRecord]) -> str:
    """Describe an error of some processes and its remedy. Return "" if there is no error.

    Args:
        records: Records of all processes, ordered by rank.
    """
    first = records[0]
    with_problem = [record for record in records if record.problem]
    if with_problem:
        problem = with_problem[0].problem
        same = [record for record in with_problem if record.problem == problem]
        return f"{format_processes(same)}: {problem}"
    for group, remedy in REMEDIES.items():
        expected = first.groups.get(group)
        differing = [record for record in records if record.groups.get(group) != expected]
        if expected is not None and differing:
            values = differing[0].groups[group]
            same = [record for record in differing if record.groups[group] == values]
            verb = "differs" if len(same) == 1 else "differ"
            return (
                f"{format_processes(same)} {verb} from {format_processes([first])}: "
                f"{_describe_values(values, expected)}; {remedy}"
            )
    return ""


def describe_gpu_models(records: Sequence[ProcessRecord]) -> str:
    """Return a warning if the processes use several models of GPUs, or ""."""
    others = [record for record in records if record.gpu_name != records[0].gpu_name]
    if not others:
        return ""
    return (
        f"{format_processes(others)}: the GPU is {others[0].gpu_name}, but rank 0 uses "
        f"{records[0].gpu_name}; every step takes as long as on the slowest GPU"
    )


def format_processes(records: Sequence[ProcessRecord]) -> str:
    """Return the ranks and hosts of processes, as in "ranks 8-15 on node2"."""
    hosts = list(dict.fromkeys(record.host for record in records))
    return f"{format_ranks([record.rank for record in records])} on {_join(hosts)}"


def format_ranks(ranks: Sequence[int]) -> str:
    """Return ranks in ascending order as text, as in "rank 3" or "ranks 0-7, 9"."""
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and rank == ranges[-1][-1] + 1:
            ranges[-1].append(rank)
        else:
            ranges.append([rank])
    texts = [str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in ranges]
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {_join(texts)}"


def _describe_values(values: dict[str, str], expected: dict[str, str]) -> str:
    """Return the differences between values by name and the expected ones."""
    differences = []
    for name in dict.fromkeys([*expected, *values]):
        if values.get(name) != expected.get(name):
            value = values.get(name, "missing")
            differences.append(f"{name} is {value} instead of {expected.get(name, 'missing')}")
    return _join(differences)


def _join(texts: Sequence[str]) -> str:
    """Join texts with commas, and replace all but the first three by their number."""
    listed = ", ".join(texts[:MAX_LISTED])
    num_omitted = len(texts) - MAX_LISTED
    return f"{listed} and {num_omitted} more" if num_omitted > 0 else listed


def _shorten(value: Any) -> str:
    """Return a value as text, or its hash if the text is long."""
    text = json.dumps(value, sort_keys=True)
    if len(text) <= 40:
        return text
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _find_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
