"""Trains with a process that hangs or fails at its third batch.

The arguments are the failure, the rank of the process, and the flags of train.py.
"""

import os
import signal
import sys
import time

import train
from dataset import TrainingStream
from models.sit import SiT

NUM_BATCHES = 2  # complete batches before the failure


def stop() -> None:
    """Stop the process, as a machine that does not answer would."""
    os.kill(os.getpid(), signal.SIGSTOP)


def kill() -> None:
    """Kill the process."""
    os.kill(os.getpid(), signal.SIGKILL)


def sleep() -> None:
    """Sleep longer than the test, as a file system that does not answer would."""
    time.sleep(3600)


def fail() -> None:
    """Raise an error of a library."""
    raise RuntimeError("out of memory")


FAILURES = {"stop": stop, "kill": kill, "sleep": sleep, "sleep in step": sleep, "fail": fail}


def main() -> None:
    """Let the process with the given rank fail, and train."""
    _, failure, rank, *flags = sys.argv
    sys.argv = ["train.py", *flags]
    if os.environ["RANK"] == rank:
        cls, name = (SiT, "forward") if "step" in failure else (TrainingStream, "__getitem__")
        original = getattr(cls, name)
        num_calls = 0

        def fail_after_two_batches(*args, **kwargs):
            nonlocal num_calls
            num_calls += 1
            if num_calls > NUM_BATCHES:
                FAILURES[failure]()
            return original(*args, **kwargs)

        setattr(cls, name, fail_after_two_batches)
    train.main()
