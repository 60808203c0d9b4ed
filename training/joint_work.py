"""Stop work that all processes share if it fails or is stopped on one of them.

If only one process stopped, the others would wait for it in the next collective. The processes
therefore exchange their status before each collective of the work, and at its end.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from checkpointing.storage import format_error
from common.watchdog import waiting_for_processes
from training.coordination import gather_objects


class Stopped(Exception):  # noqa: N818 (a stop signal is not an error)
    """A stop signal arrived during the work."""


class JointWorkError(Exception):
    """The work failed on one of the processes. The message states the reason."""


def exchange_status(reason: str = "", is_stopped: bool = False) -> None:
    """Exchange whether a process failed or was stopped. All processes must call this.

    Args:
        reason: Why the work failed on this process, if it did.
        is_stopped: Whether a stop signal arrived on this process.

    Raises:
        JointWorkError: The work failed on any process; raised on all of them.
        Stopped: A stop signal arrived on any process; raised on all of them.
    """
    statuses = gather_objects(
        (reason, is_stopped), "the other processes to do their share of a preview or evaluation"
    )
    reasons = {rank: reason for rank, (reason, _) in enumerate(statuses) if reason}
    if reasons and len(statuses) > 1:
        raise JointWorkError("; ".join(f"process {rank}: {reasons[rank]}" for rank in reasons))
    if reasons:
        raise JointWorkError(reasons[0])
    if any(is_stopped for _, is_stopped in statuses):
        raise Stopped


def gather_on_first(tensor: Tensor) -> Tensor:
    """Concatenate a tensor of every process on the first one, in the order of the ranks.

    All processes must call this with tensors of the same shape. The others return no rows.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    tensor = tensor.contiguous()
    parts = None
    if dist.get_rank() == 0:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    with waiting_for_processes("the images or features of the other processes"):
        dist.gather(tensor, parts, dst=0)
        if tensor.is_cuda:  # otherwise, the process waits later, when it uses the result
            torch.cuda.synchronize(tensor.device)
    return torch.cat(parts) if parts else tensor[:0]


@contextmanager
def fail_jointly() -> Iterator[None]:
    """Raise a JointWorkError on all processes if the block fails on one of them.

    Within the block, all processes must call `exchange_status` before each collective.
    """
    reason = ""
    try:
        yield
    except (Stopped, JointWorkError):  # raised on all processes
        raise
    except Exception as error:  # any package may fail, for example if memory is exhausted
        reason = format_error(error)
    exchange_status(reason)
