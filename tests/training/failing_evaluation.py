"""Runs train.py, where the second batch of each evaluation fails on one process.

The first argument is the rank of this process, and the second one is "error" or "killed".
"""

import os
import signal
import sys

import torch

import train
from evaluations.fashion import GarmentClassifier
from training.evaluation import Evaluator


def main() -> None:
    """Run train.py with the remaining arguments."""
    failing_rank = sys.argv.pop(1)
    failure = sys.argv.pop(1)
    num_batches = 2  # batches of the reference do not fail
    measure, extract = Evaluator.measure, GarmentClassifier.extract

    def count_from_zero(*args):
        nonlocal num_batches
        num_batches = 0
        return measure(*args)

    def fail_in_second_batch(*args):
        nonlocal num_batches
        num_batches += 1
        if num_batches == 2 and os.environ["RANK"] == failing_rank:
            if failure == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise torch.OutOfMemoryError("in batch 1")
        return extract(*args)

    Evaluator.measure = count_from_zero
    GarmentClassifier.extract = fail_in_second_batch
    train.main()
