"""Train with a process that hangs or fails.

The arguments are the failure, the rank of the process, and the flags of train.py.
"""

import os
import signal
import sys
import time

import torch.distributed as dist

import train
from dataset import TrainingStream
from models.sit import SiT


def stop() -> None:
    """Stop the process, like a machine that does not answer."""
    os.kill(os.getpid(), signal.SIGSTOP)


def kill() -> None:
    """Kill the process."""
    os.kill(os.getpid(), signal.SIGKILL)


def sleep() -> None:
    """Sleep longer than the test, like a file system that does not answer."""
    time.sleep(3600)


def fail() -> None:
    """Raise an error of a library."""
    raise RuntimeError("out of memory")


# How the process fails, in which function, and after how many calls of it.
FAILURES = {
    "stop": (stop, TrainingStream, "__getitem__", 2),
    "kill": (kill, TrainingStream, "__getitem__", 2),
    "sleep": (sleep, TrainingStream, "__getitem__", 2),
    "sleep in step": (sleep, SiT, "forward", 2),
    "stop before DDP": (stop, train, "wrap_with_ddp", 0),
    "stop before gather": (stop, dist, "gather", 0),
    "fail": (fail, TrainingStream, "__getitem__", 2),
}


def main() -> None:
    """Let the process with the given rank fail, and train."""
    _, failure, rank, *flags = sys.argv
    sys.argv = ["train.py", *flags]
    if os.environ["RANK"] == rank:
        fail_now, owner, name, num_complete_calls = FAILURES[failure]
        original = getattr(owner, name)
        num_calls = 0

        def fail_after_calls(*args, **kwargs):
            nonlocal num_calls
            num_calls += 1
            if num_calls > num_complete_calls:
                fail_now()
            return original(*args, **kwargs)

        setattr(owner, name, fail_after_calls)
    train.main()
