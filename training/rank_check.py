"""Compare the processes of a run at start: code, packages, GPUs, flags and latent cache.

A process that differs from the others would train another network, or wait for them indefinitely.
The processes are therefore compared before they connect over NCCL or gloo. Each of them writes a
record to the key-value store at MASTER_ADDR:MASTER_PORT, which needs no GPU, and the first process
compares the records and reports a difference in one line.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.cli import UserError, first_line, format_value, print_warning
from common.logs import get_logger
from common.processes import ProcessEnvironment, connecting_processes
from common.watchdog import REPORT_SECONDS, waiting_for
from latents.cache import LatentCache
from training.config import Settings
from training.preemption import STOP_SIGNALS
from training.resume import build_args_json

logger = get_logger(__name__)

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("accelerate", "numpy", "timm", "diffusers", "safetensors")
# Flags that may differ between nodes: paths of local copies of the cache, whose contents are
# compared, and a number whose default depends on the number of cores.
LOCAL_FLAGS = ("data_dir", "local_cache", "num_workers")
# Packages and folders that train.py does not import.
UNUSED_CODE = ("assets", "benchmarks", "experiments", "tests")
# Fields of the manifest that determine what is trained on; `source` and `vae` may be local paths.
CACHE_FIELDS = (
    "count",
    "num_classes",
    "class_names",
    "resolution",
    "vae_fingerprint",
    "scale",
    "shift",
    "latent_shape",
    "dtype",
    "flips",
    "shards",
)
# Groups of values that must be equal on all processes, in the order of comparison, and what to do
# if they are not.
REMEDIES = {
    "code": "update the folder of train.py on all nodes",
    "packages": "install the same versions on all nodes",
    "devices": "use the same kind of nodes, and check the GPU drivers",
    "flags": "start all processes with the same command, and with an explicit "
    "--mixed-precision if their GPUs differ",
    "cache": "copy the same cache to all nodes",
}
MAX_LISTED = 3  # differences, ranges of ranks and hosts in a message
POLL_SECONDS = 0.05
# torchrun may keep the store when it restarts the processes.
KEY_PREFIX = f"sra2/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
RESULT_KEY = f"{KEY_PREFIX}/result"
ANSWERS_KEY = f"{KEY_PREFIX}/answers"
ANSWER_SECONDS = 5.0  # time for the other processes to read the result before the store closes


@dataclass(frozen=True)
class ProcessRecord:
    """The values that a process sends to the first process for comparison.

    Attributes:
        rank: Rank of the process.
        host: Name of its machine.
        groups: Values that must be equal on all processes, by group (see REMEDIES) and name.
        problem: What is wrong with this process, regardless of the others, or "".
        gpu_name: Name of its GPU, or "".
    """

    rank: int
    host: str
    groups: dict[str, dict[str, str]] = field(default_factory=dict)
    problem: str = ""
    gpu_name: str = ""


def check_processes(
    environment: ProcessEnvironment, settings: Settings, timeout: timedelta
) -> dist.Store | None:
    """Compare the processes of a run before they connect.

    Args:
        environment: Rank of this process and number of processes.
        settings: Settings of the run.
        timeout: Time in which all processes must have started.

    Returns:
        The store. It must exist until the processes have connected, because the first process
        serves it to the others. None with a single process.

    Raises:
        UserError: On the first process, if a process has not started or differs from it.
        SystemExit: On the other processes in this case, with code 2.
    """
    if environment.num_processes == 1:
        return None
    record = make_process_record(environment, settings)
    with connecting_processes(environment):
        store = _open_store(environment, timeout)
    try:
        problem = exchange_records(store, record, environment.num_processes, timeout)
    except dist.DistError as error:
        raise UserError(
            "the first process ended before it had compared the processes: see the output of "
            f"rank 0 ({first_line(error)})"
        ) from None
    if problem:
        # The launcher terminates the other processes as soon as one has exited, which must not
        # prevent the first process from printing the reason.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _wait_for_answers(store, environment)
        raise UserError(problem) if environment.rank == 0 else SystemExit(2)
    return store


def exchange_records(
    store: dist.Store, record: ProcessRecord, num_processes: int, timeout: timedelta
) -> str:
    """Send a record to the first process, which compares the records of all processes.

    Args:
        store: The store that the processes share.
        record: Record of this process.
        num_processes: Number of processes.
        timeout: Time in which all processes must have started.

    Returns:
        What is wrong with some of the processes, or ""; the same on all processes.
    """
    store.set(_record_key(record.rank), json.dumps(asdict(record)))
    if record.rank > 0:
        return _wait_for_result(store, timeout)
    problem = _compare_records(store, num_processes, timeout)
    store.set(RESULT_KEY, problem)
    return problem


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
    problem, gpu_name = "", ""
    if num_gpus > 0:
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
        "devices": {"the device": "cuda" if num_gpus else "cpu"},
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
    """Return what is wrong with some of the processes, and the remedy, or "".

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
            return (
                f"{format_processes(same)} {'differs' if len(same) == 1 else 'differ'} from "
                f"{format_processes([first])}: {_describe_values(values, expected)}; {remedy}"
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
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {_join(texts)}"


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


def _open_store(environment: ProcessEnvironment, timeout: timedelta) -> dist.Store:
    """Connect to the store, which torchrun's agent or the first process serves."""
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        environment.num_processes,
        is_master=environment.rank == 0 and not has_agent,
        timeout=timeout,
        wait_for_workers=False,  # so that the first process can name those that are missing
        multi_tenant=True,  # so that the process group uses the same server
    )


def _record_key(rank: int) -> str:
    return f"{KEY_PREFIX}/record/{rank}"


def _compare_records(store: dist.Store, num_processes: int, timeout: timedelta) -> str:
    """Wait for the records of all processes and return what is wrong with them, or ""."""
    missing = _wait_for_records(store, num_processes, timeout)
    if missing:
        return (
            f"{format_ranks(missing)} did not start within {timeout.total_seconds() / 60:g} "
            "minutes: see the output of their nodes, and check that they can reach "
            f"{os.environ['MASTER_ADDR']}"
        )
    records = [
        ProcessRecord(**json.loads(store.get(_record_key(rank)))) for rank in range(num_processes)
    ]
    problem = describe_difference(records)
    if not problem:
        print_warning(describe_gpu_models(records))
    return problem


def _wait_for_records(store: dist.Store, num_processes: int, timeout: timedelta) -> list[int]:
    """Wait until all processes have written their records. Return the ranks that have not."""
    missing = list(range(num_processes))
    start = time.monotonic()
    next_report = start + REPORT_SECONDS

    def is_complete() -> bool:
        nonlocal missing, next_report
        missing = [rank for rank in missing if not store.check([_record_key(rank)])]
        now = time.monotonic()
        if missing and now >= next_report:
            next_report = now + REPORT_SECONDS
            logger.warning(
                "waiting for %s to start (%.0f s so far)", format_ranks(missing), now - start
            )
        return not missing

    _poll(is_complete, timeout.total_seconds())
    return missing


def _wait_for_result(store: dist.Store, timeout: timedelta) -> str:
    """Wait until the first process has compared the records, and return its result."""
    with waiting_for("the first process to compare the processes"):
        # The first process may have started later, and then waits as long for the others.
        if not _poll(lambda: store.check([RESULT_KEY]), 2 * timeout.total_seconds()):
            raise UserError("rank 0 did not start: see the output of its node")
    return store.get(RESULT_KEY).decode()


def _wait_for_answers(store: dist.Store, environment: ProcessEnvironment) -> None:
    """On the first process, wait until the others have read the result."""
    if environment.rank > 0:
        store.add(ANSWERS_KEY, 1)
        return
    num_others = environment.num_processes - 1
    _poll(lambda: store.add(ANSWERS_KEY, 0) >= num_others, ANSWER_SECONDS)


def _poll(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition holds, and return whether it does after the given time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True
