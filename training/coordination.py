"""Wait for slow work of single processes, with a longer limit than that of training.

Setting up a run, saving, previews and evaluations may keep one process busy for longer than
--collective-timeout. The others then wait in the collectives below, which have a long limit and do
not occupy the GPU, before they continue with collectives of training.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from common.cli import UserError
from common.processes import create_gloo_group
from common.watchdog import waiting_for_processes
from training.config import DeviceConfig

# Limit of the wait for the slow work of another process.
SLOW_TIMEOUT = timedelta(hours=2)
# Limit of such waits before the first step, when a node may copy a remote cache.
PREPARE_TIMEOUT = timedelta(hours=12)
# The timeouts of PyTorch end a process without naming the cause, so they are longer than these.
TIMEOUT_MARGIN = timedelta(minutes=5)
# Limit of groups whose collectives the hang detector watches as well.
GROUP_TIMEOUT = PREPARE_TIMEOUT + TIMEOUT_MARGIN


def get_collective_timeout(config: DeviceConfig) -> timedelta:
    """Return PyTorch's limit for the collectives of training."""
    limit = timedelta(minutes=config.collective_timeout)
    if config.compile:  # one process may compile longer than another in the first steps
        limit = max(limit, SLOW_TIMEOUT)
    return limit + TIMEOUT_MARGIN


def gather_objects(
    value: Any, description: str = "the other processes to prepare the run"
) -> list[Any]:
    """Return the values of all processes, ordered by rank, on every process.

    Args:
        value: Value of this process.
        description: What the others wait for if a process is slow, as in "waiting for DESCRIPTION".
    """
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    with waiting_for_processes(description, is_slow=True):
        dist.all_gather_object(values, value, group=_get_group())
    return values


def broadcast_object(value: Any, description: str) -> Any:
    """Return the value of the first process on every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    with waiting_for_processes(description, is_slow=True):
        dist.broadcast_object_list(values, group=_get_group())
    return values[0]


def wait_for_all(description: str) -> None:
    """Wait until every process has called this."""
    gather_objects(None, description)


@contextmanager
def fail_together() -> Iterator[None]:
    """End all processes if the block fails on one of them.

    If it may fail on only some processes, the block must contain no collective.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as setup_error:
        error = setup_error
    if any(gather_objects(error is not None)):
        raise error or SystemExit(2)  # the process that failed prints the reason


def _get_group() -> dist.ProcessGroup:
    return _create_group(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _create_group(default_group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Create the group when it is used for the first time, which all processes do together."""
    return create_gloo_group(GROUP_TIMEOUT)
