"""Runs encode_latents, and blocks each process after it has renamed a number of files.

The first argument is a folder, in which a blocked process creates a file that is named after its
rank. The second one lists the numbers of files of the processes.
"""

import os
import sys
import threading
from pathlib import Path

from preprocessing import encode_latents


def main() -> None:
    """Run encode_latents with the remaining arguments."""
    blocked = Path(sys.argv.pop(1))
    max_renames = sys.argv.pop(1).split(",")
    rank = os.environ["RANK"]
    remaining = int(max_renames[int(rank)])
    replace = Path.replace

    def replace_or_block(self, target):
        nonlocal remaining
        if remaining == 0:
            (blocked / rank).touch()
            threading.Event().wait()
        remaining -= 1
        return replace(self, target)

    Path.replace = replace_or_block
    encode_latents.main()
