"""Runs that are killed, told to stop, starved of disk, and started again: nothing is lost and nothing is done twice."""

import os
import random
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
from common.files import lock
from tests.helpers import ROOT, ForkServer, have_equal_weights, read_metrics, torchrun, train_flags
from training.preemption import EXIT_STOPPED

STEPS = 90


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    forks = ForkServer(tmp_path_factory.mktemp("forks") / "log.txt")
    yield forks
    forks.close()


def flags(cache, exps, *more) -> list[str]:
    small = [
        "--max-train-steps",
        STEPS,
        "--checkpointing-steps",
        3,
        "--log-every",
        2,
        "--keep-last",
        2,
    ]
    return train_flags(cache, exps, "run", *small, *more)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, cache, forks) -> Path:
    exps = tmp_path_factory.mktemp("unbroken")
    forks.start(flags(cache, exps))
    assert forks.wait() == 0
    return exps / "run"


def same(run: Path, other: Path) -> bool:
    return read_metrics(run) == read_metrics(other) and have_equal_weights(
        run, other, f"{STEPS:07d}"
    )


def until(condition, seconds=60.0, pause=0.01):
    """Waits for something that a run does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(pause)


def contains(path: Path, text: str) -> bool:
    return path.exists() and text in path.read_text()


def test_kill_9_at_random_moments_loses_nothing(forks, cache, tmp_path, unbroken):
    rng, kills, torn, part = random.Random(0), 0, 0, 0
    for kill in range(60):
        run = tmp_path / str(part) / "run"
        done = len(list_checkpoints(run))
        pid = forks.start(flags(cache, run.parent))
        until(
            lambda done=done, run=run: (
                len(list_checkpoints(run)) > min(done, 1) or contains(run / "log.txt", "finished")
            )
        )
        if kill % 2:  # any moment
            time.sleep(rng.uniform(0, 0.12))
        else:  # the middle of a save
            saving = run / "checkpoints"
            until(
                lambda saving=saving, run=run: (
                    [*saving.glob(".*.partial")] or contains(run / "log.txt", "finished")
                ),
                pause=0,
            )
            time.sleep(rng.uniform(0, 0.005))
        with suppress(ProcessLookupError):  # it may have finished by now
            os.killpg(pid, signal.SIGKILL)
        code = forks.wait()
        assert code in (0, -signal.SIGKILL), code
        kills += code != 0
        torn += bool(list((run / "checkpoints").glob(".*")))
        if code == 0:  # it was faster than its killer: another one
            assert same(run, unbroken)
            part += 1
        if kills >= 12 and torn >= 2:
            break
    assert kills >= 12 and torn >= 2, (kills, torn)
    run = tmp_path / str(part) / "run"
    forks.start(flags(cache, run.parent))
    assert forks.wait() == 0
    assert same(run, unbroken)
    assert [int(folder.name) for folder in sorted((run / "checkpoints").iterdir())] == [
        STEPS - 3,
        STEPS,
    ]  # no leftovers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_exits_with_the_documented_code(
    forks, cache, tmp_path, unbroken, number
):
    run = tmp_path / "run"
    pid = forks.start(flags(cache, tmp_path, "--checkpointing-steps", 1000, "--num-workers", 2))
    until(lambda: contains(run / "metrics.jsonl", '"step": 4'))
    os.killpg(pid, number)  # the whole job, loader processes too, as a scheduler does
    assert forks.wait() == EXIT_STOPPED == 75
    (saved,) = list_checkpoints(run)
    assert 4 <= int(saved.name) < STEPS and contains(
        run / "log.txt", f"stopped by {number.name} at step {int(saved.name)}"
    )
    forks.start(flags(cache, tmp_path, "--checkpointing-steps", 1000))
    assert forks.wait() == 0
    assert same(run, unbroken)


def test_a_full_disk_is_told_of_and_tried_again(forks, cache, tmp_path, unbroken):
    run = tmp_path / "run"
    pid = forks.start(flags(cache, tmp_path))
    until(lambda: list_checkpoints(run))
    whole = resource.prlimit(
        pid, resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY)
    )  # EFBIG, as a quota gives
    until(lambda: contains(run / "log.txt", "could not save step"))
    before = list_checkpoints(run)
    assert before
    resource.prlimit(pid, resource.RLIMIT_FSIZE, whole)
    assert forks.wait() == 0
    assert same(run, unbroken)


def test_lines_that_a_full_disk_refuses_are_written_later(forks, cache, tmp_path, unbroken):
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"
    pid = forks.start(flags(cache, tmp_path, "--num-workers", 0))
    until(lambda: contains(metrics, '"step": 8'))
    whole = resource.prlimit(
        pid, resource.RLIMIT_FSIZE, (metrics.stat().st_size + 50, resource.RLIM_INFINITY)
    )  # half a line
    until(lambda: contains(run / "log.txt", "its lines are buffered in memory"))
    resource.prlimit(pid, resource.RLIMIT_FSIZE, whole)
    assert forks.wait() == 0
    assert same(run, unbroken)


def test_a_run_belongs_to_one_process(forks, cache, tmp_path):
    """POSIX locks are a process's: this one holds it, the forked one is refused."""
    with lock(tmp_path / "run/.lock"):
        forks.start(flags(cache, tmp_path))
        assert forks.wait() == 2
        with pytest.raises(
            AssertionError
        ) as failed:  # the second process has made no mistake, and must not wait for the first
            torchrun(2, "train.py", *flags(cache, tmp_path))
    said = str(failed.value)
    assert (
        said.count("is being trained by another process") == 1
        and "exitcode  : 2" in said
        and "exitcode  : -" not in said
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_disk_that_stays_full_ends_in_one_line_with_the_old_checkpoint(forks, cache, tmp_path):
    run = tmp_path / "run"
    pid = forks.start(flags(cache, tmp_path))
    until(lambda: list_checkpoints(run))
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))
    assert forks.wait() == 2
    assert list_checkpoints(run) and not list((run / "checkpoints").glob(".*"))


def test_two_nodes_of_which_one_is_killed(cache, tmp_path, unbroken):
    """Two torchrun agents on one machine; the second is killed with its process and the job started again."""

    def job() -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "2",
            "--nproc_per_node",
            "1",
        ]
        command += ["--master_addr", "localhost", "--master_port", str(port)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return [
            subprocess.Popen(
                [*command, "--node_rank", str(node), "train.py", *flags(cache, tmp_path)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            for node in range(2)
        ]

    agents = job()
    try:
        until(lambda: list_checkpoints(tmp_path / "run"), seconds=120)
        workers = subprocess.run(
            ["pgrep", "-P", str(agents[1].pid)], capture_output=True, text=True
        ).stdout.split()
        os.killpg(agents[1].pid, signal.SIGKILL)
        for worker in workers:
            os.kill(int(worker), signal.SIGKILL)
        assert agents[0].wait(timeout=120) != 0
        agents = job()
        assert [agent.wait(timeout=120) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    for ours, theirs in zip(read_metrics(tmp_path / "run"), read_metrics(unbroken), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_signal_to_one_process_stops_all_after_the_same_step(cache, tmp_path, unbroken):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
    ]
    command += [
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        "train.py",
        *flags(cache, tmp_path),
    ]
    slow = "import atexit, os, time\nif os.environ.get('RANK') == '0':\n    atexit.register(time.sleep, 2)\n"
    (tmp_path / "sitecustomize.py").write_text(
        slow
    )  # the first leaves long after the second, as happens on a busy machine
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
    }
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until(lambda: contains(tmp_path / "run/metrics.jsonl", '"step": 4'), seconds=120)
    workers = subprocess.run(
        ["pgrep", "-P", str(job.pid)], capture_output=True, text=True
    ).stdout.split()
    (second,) = [
        pid for pid in workers if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
    ]
    os.kill(int(second), signal.SIGTERM)
    out = job.communicate(timeout=120)[0]
    assert "exitcode  : 75" in out and "Signal" not in out, (
        out
    )  # the first was not killed while it closed
    newest = list_checkpoints(tmp_path / "run")[-1]
    assert contains(
        tmp_path / "run/log.txt",
        f"stopped by a signal to another process at step {int(newest.name)}",
    )
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(
        range(2, int(newest.name) + 1, 2)
    )
    for ours, theirs in zip(read_metrics(tmp_path / "run"), read_metrics(unbroken)):
        assert ours == pytest.approx(theirs, rel=1e-3)
