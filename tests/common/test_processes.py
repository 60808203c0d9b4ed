"""Test the variables of launchers, and collectives of which one process exits early."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from common.cli import UserError
from common.processes import ProcessEnvironment, read_process_environment
from tests.helpers import ONE_THREAD, ROOT, torchrun

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def set_variables(monkeypatch):
    """Return a function that sets the given variables of launchers and no others."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def set_all(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='', which is not a valid number; unset WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0', which is not a valid number"),
        ({"RANK": "-1"}, "RANK='-1', which is not a valid number"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK='first', which is not a valid number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE='2', but not RANK, MASTER_ADDR, MASTER_PORT; unset"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": ""},
            "WORLD_SIZE='2', but not MASTER_PORT",
        ),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK='0', but not RANK, WORLD_SIZE, MASTER_ADDR"),
        ({"RANK": "1"}, "RANK='1', but the number of processes is 1"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "RANK='2', but the number of processes is 2",
        ),
    ],
)
def test_invalid_variables_of_a_launcher_are_reported(set_variables, variables, message):
    set_variables(**variables)
    with pytest.raises(UserError, match=re.escape(message)):
        read_process_environment()


def test_variables_of_a_cluster_do_not_start_several_processes(set_variables):
    set_variables(MASTER_ADDR="localhost", MASTER_PORT="29500", RANK="0", WORLD_SIZE="1")
    assert read_process_environment() == ProcessEnvironment(0, 1, 0, 1)


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": ""}, {"WORLD_SIZE": "2"}])
def test_command_with_an_incomplete_environment_ends_with_one_line(
    call, set_variables, cache, tmp_path, variables
):
    import train
    from preprocessing import verify
    from tests.helpers import train_flags

    set_variables(**variables)
    for module, flags in ((verify, [cache]), (train, train_flags(cache, tmp_path, "run"))):
        code, out = call(module, *flags)
        assert code == 2 and out.startswith("error: the environment sets WORLD_SIZE="), out
        assert out.count("\n") == 1


START_ALONE = """
import signal
from common import cli, watchdog
# A shell starts background jobs, such as a test suite, with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
watchdog._watchdog.report_seconds = 0.1
from common.processes import World
cli.run(World)
"""


def test_process_that_waits_alone_reports_it_and_can_be_interrupted():
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        port = unused.getsockname()[1]
    variables = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}
    process = subprocess.Popen(
        [sys.executable, "-c", START_ALONE],
        cwd=ROOT,
        env=os.environ | ONE_THREAD | variables | {"MASTER_PORT": str(port)},
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = threading.Timer(120, process.kill)
    limit.start()
    report = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, remaining = process.communicate()
    limit.cancel()
    expected = f"[rank 0] waiting for 2 processes to connect to localhost:{port} (to run one"
    assert report.startswith(expected), report
    assert process.returncode == 130 and "Traceback" not in remaining, remaining


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
