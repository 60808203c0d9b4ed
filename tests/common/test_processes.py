"""Test collectives between the processes of a command, of which one exits early."""

from tests.helpers import torchrun

EXIT_EARLY = """
import os, sys, time
from common import cli
from common.processes import World
def main():
    world = World()
    assert world.run_on_first_rank(lambda: world.rank) == 0
    assert world.all_gather(world.rank) == [0, 1]
    assert world.gather(world.rank) == ([0, 1] if world.rank == 0 else None)
    if world.rank == 1:
        os._exit(0)
    try:
        world.barrier()
    except SystemExit as stop:
        print("exit", stop.code, flush=True)
cli.run(main)
"""


def test_process_exits_with_code_2_after_another_has_exited(tmp_path):
    (tmp_path / "exit_early.py").write_text(EXIT_EARLY)
    printed = torchrun(2, tmp_path / "exit_early.py")
    assert "exit 2" in printed
    assert "another process ended before the work was done; rerun the same command" in printed
    assert "Traceback" not in printed
