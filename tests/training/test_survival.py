"""Killed or stopped runs, and runs on a full disk, resume without losing or repeating a step."""

import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from checkpointing.storage import list_checkpoints
from common.cli import EXIT_STOPPED
from common.files import lock
from tests.helpers import (
    ONE_THREAD,
    ROOT,
    RUN_AND_EXIT,
    ForkServer,
    get_fork_server,
    have_equal_weights,
    list_children,
    read_metrics,
    run_ranks,
    train_flags,
    wait_until,
)

STEPS = 60
NUM_KILLS = 8
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def forks() -> ForkServer:
    return get_fork_server()


def run_flags(cache: Path, exps: Path, *extra_flags) -> list[str]:
    """Return the flags of the run exps/run, which saves a checkpoint after every 3 steps."""
    flags = ["--max-train-steps", STEPS, "--checkpointing-steps", 3, "--keep-last", 2]
    return train_flags(cache, exps, "run", *flags, "--log-every", 2, *extra_flags)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache, forks) -> Path:
    """The folder of a run that was not interrupted."""
    exps = tmp_path_factory.mktemp("uninterrupted")
    forks.start_train(run_flags(cache, exps))
    assert forks.wait() == 0
    return exps / "run"


def have_equal_results(run: Path, other: Path) -> bool:
    """Return whether two complete runs have bit-identical metrics and final weights."""
    have_equal_metrics = read_metrics(run) == read_metrics(other)
    return have_equal_metrics and have_equal_weights(run, other, f"{STEPS:07d}")


def contains(path: Path, text: str) -> bool:
    """Return whether a file exists and contains the given string."""
    return path.exists() and text in path.read_text()


def limit_file_size(pid: int, num_bytes: int) -> tuple[int, int]:
    """Make writes beyond the given file size fail with EFBIG, as a quota does.

    Returns the previous limits.
    """
    return resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def start_torchrun(*options: str, flags: list[str]) -> subprocess.Popen:
    """Start train.py under torchrun in a new session."""
    return subprocess.Popen(
        [*TORCHRUN, *options, "train.py", *flags],
        cwd=ROOT,
        env=os.environ | ONE_THREAD,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def test_killed_run_resumes_without_loss(forks, cache, tmp_path, uninterrupted):
    rng = random.Random(0)
    run = tmp_path / "0" / "run"
    for attempt in range(NUM_KILLS):
        checkpoints = list_checkpoints(run)
        pid = forks.start_train(run_flags(cache, run.parent))

        def is_finished(run=run) -> bool:
            return contains(run / "log.txt", "finished")

        def has_saved(run=run, checkpoints=checkpoints) -> bool:
            return list_checkpoints(run) != checkpoints or is_finished(run)

        def is_saving(run=run) -> bool:
            return any((run / "checkpoints").glob(".*.partial")) or is_finished(run)

        # Let each attempt make progress. Then kill it at any moment, or in the middle of a save.
        wait_until(has_saved)
        if attempt % 2:
            time.sleep(rng.uniform(0, 0.12))
        else:
            wait_until(is_saving, poll_seconds=0.001)
            time.sleep(rng.uniform(0, 0.005))
        with suppress(ProcessLookupError):  # the run may have finished in the meantime
            os.killpg(pid, signal.SIGKILL)
        exit_code = forks.wait()
        assert exit_code in (0, -signal.SIGKILL), exit_code
        if exit_code == 0:  # kill a new run next
            assert have_equal_results(run, uninterrupted)
            run = tmp_path / str(attempt + 1) / "run"

    forks.start_train(run_flags(cache, run.parent))
    assert forks.wait() == 0
    assert have_equal_results(run, uninterrupted)
    remaining = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert remaining == [f"{STEPS - 3:07d}", f"{STEPS:07d}"]


@pytest.mark.parametrize(
    "signal_number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)]
)
def test_stop_signal_saves_and_exits_with_the_documented_code(
    forks, cache, tmp_path, uninterrupted, signal_number
):
    run = tmp_path / "run"
    flags = run_flags(cache, tmp_path, "--checkpointing-steps", 1000)
    pid = forks.start_train([*flags, "--num-workers", "2"])
    wait_until(lambda: contains(run / "metrics.jsonl", '"step": 4'))
    os.killpg(pid, signal_number)  # signals the DataLoader workers as well, as a scheduler does
    assert forks.wait() == EXIT_STOPPED == 75
    (checkpoint,) = list_checkpoints(run)
    step = int(checkpoint.name)
    assert 4 <= step < STEPS
    assert contains(run / "log.txt", f"stopped by {signal_number.name} at step {step}")
    forks.start_train(flags)
    assert forks.wait() == 0
    assert have_equal_results(run, uninterrupted)


def test_saves_and_metrics_that_a_full_disk_rejects_are_written_later(
    forks, cache, tmp_path, uninterrupted
):
    run = tmp_path / "run"
    metrics, log = run / "metrics.jsonl", run / "log.txt"
    pid = forks.start_train(run_flags(cache, tmp_path))
    wait_until(lambda: list_checkpoints(run) and contains(metrics, '"step": 8'))
    limits = limit_file_size(pid, metrics.stat().st_size + 50)  # enough for part of a line
    wait_until(lambda: contains(log, "its lines are buffered in memory"))
    num_messages = log.read_text().count("could not save step")
    limit_file_size(pid, 2_000_000)  # enough for the metrics and part of a checkpoint
    wait_until(lambda: log.read_text().count("could not save step") > num_messages)
    assert list_checkpoints(run)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    assert forks.wait() == 0
    # Regular saves are at multiples of 3, so any other step is a retry.
    pattern = r"(?:could not save step |saved .*/checkpoints/)(\d+)"
    steps = re.findall(pattern, log.read_text())
    assert any(int(step) % 3 for step in steps), steps
    assert have_equal_results(run, uninterrupted)


def test_locked_run_is_rejected_on_all_processes(forks, cache, tmp_path):
    # A POSIX lock belongs to a process: this process holds it, so the others do not get it.
    with lock(tmp_path / "run/.lock"):
        forks.start_train(run_flags(cache, tmp_path))
        assert forks.wait() == 2
        # The second process does not wait for the first one, which fails.
        with pytest.raises(AssertionError) as failure:
            run_ranks(2, "train", *run_flags(cache, tmp_path))
    output = str(failure.value)
    assert output.count("is being trained by another process") == 1
    assert "Traceback" not in output
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_run_on_a_permanently_full_disk_fails_and_keeps_the_last_checkpoint(forks, cache, tmp_path):
    run = tmp_path / "run"
    forks.start_train(run_flags(cache, tmp_path, "--max-train-steps", 3))
    assert forks.wait() == 0
    limits = limit_file_size(forks.process.pid, 2_000_000)  # the run inherits the limit
    forks.start_train(run_flags(cache, tmp_path, "--max-train-steps", 9))
    resource.prlimit(forks.process.pid, resource.RLIMIT_FSIZE, limits)
    assert forks.wait() == 2
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == "0000003"


@pytest.mark.long
def test_job_on_two_nodes_resumes_after_one_is_killed(cache, tmp_path, uninterrupted):
    # Two agents of torchrun on one machine stand in for the nodes.
    def start_job() -> list[subprocess.Popen]:
        with socket.socket() as unused:
            unused.bind(("localhost", 0))
            port = unused.getsockname()[1]
        options = ["--nnodes", "2", "--nproc_per_node", "1"]
        options += ["--master_addr", "localhost", "--master_port", str(port)]
        flags = run_flags(cache, tmp_path)
        return [
            start_torchrun(*options, "--node_rank", str(node), flags=flags) for node in range(2)
        ]

    agents = start_job()
    try:
        wait_until(lambda: list_checkpoints(tmp_path / "run"))
        workers = list_children(agents[1].pid)
        os.killpg(agents[1].pid, signal.SIGKILL)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        assert agents[0].wait(timeout=300) != 0
        agents = start_job()
        assert [agent.wait(timeout=300) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    rows = zip(read_metrics(tmp_path / "run"), read_metrics(uninterrupted), strict=True)
    for row, expected in rows:
        assert row == pytest.approx(expected, rel=1e-3)


# Runs train.py on two processes under the agent of torchrun. The process of rank 0 exits long after
# that of rank 1, as may happen on a busy machine.
RUN_UNDER_AGENT = """
import os, sys, time, torch, train
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
def main():
    try:
        train.main()
    finally:
        if os.environ["RANK"] == "0":
            time.sleep(2)
            print("rank 0 ends", flush=True)
def run_rank():
    torch.set_num_threads(1)
    cli.run(main)  # returns if the run finishes, because the agent waits for a result
rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
processes = {"nproc_per_node": 2, "start_method": "fork", "max_restarts": 0}
elastic_launch(LaunchConfig(1, 1, **rendezvous, **processes), run_rank)()
"""


def test_signal_to_one_process_stops_all_after_the_same_step(forks, cache, tmp_path, uninterrupted):
    run = tmp_path / "run"
    pid = forks.start(RUN_AND_EXIT + RUN_UNDER_AGENT, *run_flags(cache, tmp_path))
    wait_until(lambda: contains(run / "metrics.jsonl", '"step": 4'))
    _, rank_1 = sorted(list_children(pid))
    os.kill(rank_1, signal.SIGTERM)
    assert forks.wait() == 1
    output = forks.read_output()
    # No signal killed rank 0 while it was shutting down.
    assert "exitcode  : 75" in output and "rank 0 ends" in output, output
    step = int(list_checkpoints(run)[-1].name)
    assert contains(run / "log.txt", f"stopped by a signal to another process at step {step}")
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(2, step + 1, 2))
    for row, expected in zip(rows, read_metrics(uninterrupted)):
        assert row == pytest.approx(expected, rel=1e-3)
