"""Lets the process of rank 1 fail while that of rank 0 waits for it.

The argument is "killed" or "error"; with "error of both", both fail.
"""

import os
import signal
import sys

import torch.distributed as dist

from common import processes
from training.config import DeviceConfig
from training.hang_detector import ending_with_the_others


def main() -> None:
    """Start two processes and wait."""
    failure = sys.argv[1]
    processes.ANSWER_SECONDS = 0.5
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with ending_with_the_others(DeviceConfig(collective_timeout=0.2), rank, 2):
        if failure == "killed" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if failure == "error of both" or (failure == "error" and rank == 1):
            raise RuntimeError("a bug")
        dist.barrier()
