"""Lets the process of rank 1 fail while that of rank 0 waits for it.

The argument is "killed" or "error"; with "error of both", both fail.
"""

import os
import signal
import sys

import torch.distributed as dist

from common import processes
from common.processes import ending_with_the_others


def main() -> None:
    """Start two processes and wait."""
    failure = sys.argv[1]
    processes.ANSWER_SECONDS = 0.5
    dist.init_process_group("gloo")
    with ending_with_the_others(2):
        if failure == "killed" and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if failure == "error of both" or (failure == "error" and dist.get_rank() == 1):
            raise RuntimeError("a bug")
        dist.barrier()
