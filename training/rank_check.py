"""Compare the processes of a run before they connect over NCCL or gloo.

Each process writes a record (process_records.py) to the key-value store at MASTER_ADDR:MASTER_PORT,
which needs no GPU. The first process compares the records and reports a difference in one line.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from common.cli import UserError, first_line, print_warning
from common.logs import get_logger
from common.processes import ProcessEnvironment, connecting_processes
from common.watchdog import REPORT_SECONDS, waiting_for
from training.config import Settings
from training.preemption import STOP_SIGNALS
from training.process_records import (
    ProcessRecord,
    describe_difference,
    describe_gpu_models,
    format_ranks,
    make_process_record,
)

logger = get_logger(__name__)

POLL_SECONDS = 0.05
# torchrun may keep the store when it restarts the processes.
KEY_PREFIX = f"sra2/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
RESULT_KEY = f"{KEY_PREFIX}/result"
ANSWERS_KEY = f"{KEY_PREFIX}/answers"
RESULT_SECONDS = 5.0  # time for the other processes to read the result before the store closes


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
    """Report that this process has read the result; the first process waits for the others."""
    if environment.rank > 0:
        store.add(ANSWERS_KEY, 1)
        return
    num_others = environment.num_processes - 1
    _poll(lambda: store.add(ANSWERS_KEY, 0) >= num_others, RESULT_SECONDS)


def _poll(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition holds, and return whether it does after the given time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True
