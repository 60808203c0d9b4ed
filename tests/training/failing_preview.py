"""Runs train.py, where the process whose rank is the first argument cannot decode previews."""

import os
import sys

import train
from models.autoencoder import Autoencoder
from training.preview import Preview


def main() -> None:
    """Run train.py with the remaining arguments."""
    failing_rank = sys.argv.pop(1)
    draw = Preview.draw

    def decode(*args):
        raise OSError("too many open files")

    def draw_and_fail(*args):
        if os.environ["RANK"] == failing_rank:
            Autoencoder.decode = decode
        return draw(*args)

    Preview.draw = draw_and_fail
    train.main()
