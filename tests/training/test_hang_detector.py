"""A process that hangs or is lost is named by the others, which end with the right exit code."""

import queue

import pytest
import torch.distributed as dist

from common.cli import EXIT_STOPPED
from common.watchdog import Watchdog
from tests.helpers import run_ranks, run_until_rank_exits, train_flags
from training.hang_detector import HangDetector
from training.heartbeat import Cause, Heartbeat, HeartbeatExchange

LIMIT = 100.0
SLOW_LIMIT = 1000.0
PREPARE_LIMIT = 3000.0


class Clock:
    """A clock that tests advance."""

    def __init__(self):
        self.seconds = 0.0

    def read(self) -> float:
        return self.seconds


class Processes:
    """The first of several processes, and heartbeats of the others.

    Attributes:
        alive: Heartbeats of the other processes that are alive, by rank.
        ends: Messages and exit codes with which the detector would end this process.
    """

    def __init__(self, watchdog: Watchdog, alive: dict[int, Heartbeat], **options):
        self.watchdog = watchdog
        self.alive = alive
        self.clock = Clock()
        self.store = dist.HashStore()
        self.ends = queue.Queue()
        self.exchanges = [
            HeartbeatExchange(
                self.store, rank, len(alive) + 1, read, interval=0.0, clock=self.clock
            )
            for rank, read in enumerate([self.read_first, *self.make_readers()])
        ]
        for exchange in self.exchanges:
            exchange.has_written_cause.set()  # `announce` does not wait for the thread
            exchange.prepare()
        self.first_exchange = self.exchanges[0]
        self.detector = HangDetector(
            self.first_exchange,
            self.watchdog,
            LIMIT,
            slow_limit=SLOW_LIMIT,
            prepare_limit=PREPARE_LIMIT,
            end=lambda *args: self.ends.put(args),
            **options,
        )

    def read_first(self) -> Heartbeat:
        return Heartbeat(
            "node0", num_waits=self.watchdog.num_joint_waits, location="train.py:1 (step)"
        )

    def make_readers(self):
        return [lambda rank=rank: self.alive[rank] for rank in self.alive]

    def pass_seconds(self, seconds: int) -> None:
        """Let time pass until the detector ends the process."""
        for _ in range(seconds):
            self.clock.seconds += 1
            for exchange in self.exchanges:
                if exchange.rank == 0 or exchange.rank in self.alive:
                    exchange._exchange()
            self.detector.check()
            if not self.ends.empty():
                return


def test_process_without_a_heartbeat_is_named_after_the_limit(watchdog):
    others = {1: Heartbeat("node1", step=7), 2: Heartbeat("node2", step=8, num_waits=1)}
    processes = Processes(watchdog, others)
    with watchdog.watch("the gradients", is_joint=True):
        processes.pass_seconds(30)
        del processes.alive[1]
        processes.pass_seconds(200)
    message, code = processes.ends.get_nowait()
    assert processes.clock.seconds == LIMIT + 1  # the first check starts the wait
    assert code == EXIT_STOPPED == 75
    assert "waiting for the gradients: no heartbeat from rank 1 on node1 (step 7)" in message
    assert "gave up after 100 s" in message


def test_process_that_has_not_arrived_is_named(watchdog):
    others = {
        1: Heartbeat("node1", num_waits=1),
        2: Heartbeat("node2", 8, 0, "batches of --data-dir", "common/loader.py:77 (read)"),
    }
    processes = Processes(watchdog, others)
    with watchdog.watch("the gradients", is_joint=True):
        processes.pass_seconds(200)
    message, code = processes.ends.get_nowait()
    assert code == EXIT_STOPPED
    assert (
        "rank 2 on node2 (step 8, waiting for batches of --data-dir, at common/loader.py:77 "
        "(read)) did not arrive"
    ) in message
    assert "node1" not in message and "--collective-timeout" in message


def test_all_processes_are_listed_if_they_wait_for_the_same_collective(watchdog):
    processes = Processes(
        watchdog, {1: Heartbeat("node1", num_waits=1, location="train.py:1 (step)")}
    )
    with watchdog.watch("the gradients", is_joint=True):
        processes.pass_seconds(200)
    message, code = processes.ends.get_nowait()
    assert code == EXIT_STOPPED
    assert "all have arrived" in message and "node0" in message and "node1" in message


def test_first_process_is_named_if_the_store_does_not_answer(watchdog):
    processes = Processes(watchdog, {1: Heartbeat("node1", num_waits=1)})
    processes.first_exchange._exchange()
    with watchdog.watch("the gradients", is_joint=True):
        for _ in range(110):  # without an exchange
            processes.clock.seconds += 1
            processes.detector.check()
    message, code = processes.ends.get_nowait()
    assert code == EXIT_STOPPED
    assert "no answer from rank 0 on node0 (before the first step, at train.py:1 (step))" in message


@pytest.mark.parametrize(("step", "limit"), [(None, PREPARE_LIMIT), (7, SLOW_LIMIT)])
def test_slow_work_of_a_living_process_is_awaited_longer(watchdog, step, limit):
    processes = Processes(watchdog, {1: Heartbeat("node1")})
    watchdog.step = step
    with watchdog.watch("an evaluation", is_joint=True, is_slow=True):
        processes.pass_seconds(int(limit))
        assert processes.ends.empty()
        processes.pass_seconds(1)
    assert "rank 1" in processes.ends.get_nowait()[0]


def test_slow_work_of_a_process_without_heartbeats_is_not_awaited(watchdog):
    processes = Processes(watchdog, {1: Heartbeat("node1")})
    del processes.alive[1]
    with watchdog.watch("an evaluation", is_joint=True, is_slow=True):
        processes.pass_seconds(int(LIMIT) + 1)
    assert "rank 1" in processes.ends.get_nowait()[0]


def test_first_steps_may_take_longer_if_they_compile(watchdog):
    processes = Processes(watchdog, {1: Heartbeat("node1")}, num_slow_steps=1)
    watchdog.num_steps = 1
    with watchdog.watch("the gradients", is_joint=True):
        processes.pass_seconds(500)
        assert processes.ends.empty()
        watchdog.num_steps = 2
        processes.pass_seconds(1)
    assert not processes.ends.empty()


def test_work_of_this_process_and_waits_for_data_have_no_limit(watchdog):
    processes = Processes(watchdog, {1: Heartbeat("node1", num_waits=5)})
    with watchdog.watch("batches of --data-dir"):
        processes.pass_seconds(2000)
    assert processes.ends.empty()


def test_each_wait_has_its_own_limit(watchdog):
    processes = Processes(watchdog, {1: Heartbeat("node1")})
    for _ in range(4):
        with watchdog.watch("the gradients", is_joint=True):
            processes.pass_seconds(60)
    assert processes.ends.empty()


def test_step_that_continues_on_this_process_is_not_a_wait(watchdog):
    """Within one wait, this process executes a new line every 60 seconds."""
    processes = Processes(watchdog, {1: Heartbeat("node1")})
    lines = iter(range(1000))
    with watchdog.watch("all processes to run the step", is_joint=True):
        for _ in range(4):
            line = next(lines)
            processes.first_exchange.read = lambda line=line: Heartbeat(
                "node0", location=f"sit.py:{line}"
            )
            processes.pass_seconds(60)
    assert processes.ends.empty()


def test_process_ends_with_the_code_of_the_first_one_that_failed(watchdog):
    processes = Processes(watchdog, {1: Heartbeat("node1"), 2: Heartbeat("node2")})
    for rank in (2, 1):
        processes.exchanges[rank].announce(Cause(2, f"rank {rank} failed: out of memory"))
        processes.exchanges[rank]._exchange()
    with watchdog.watch("the gradients", is_joint=True):
        processes.pass_seconds(20)
    assert processes.ends.get_nowait() == ("rank 2 failed: out of memory", 2)


def test_lost_process_is_named_and_those_that_end_with_it_are_not(watchdog):
    others = {1: Heartbeat("node1", step=3), 2: Heartbeat("node2"), 3: Heartbeat("node3")}
    processes = Processes(watchdog, others)
    processes.exchanges[2].is_ending = True
    processes.exchanges[2]._exchange()

    # Rank 3 sends heartbeats, while rank 1 was killed and rank 2 has ended for this reason.
    read = processes.first_exchange.read

    def read_after_rank_3():
        processes.exchanges[3]._exchange()
        return read()

    processes.first_exchange.read = read_after_rank_3
    processes.first_exchange.interval = 0.01
    processes.first_exchange.start()
    cause = processes.detector.find_cause_of_loss()
    processes.first_exchange.close()
    assert cause.code == EXIT_STOPPED
    assert "rank 1 on node1 (step 3) ended before" in cause.message


@pytest.mark.parametrize(
    ("failure", "line", "code", "num_tracebacks"),
    [
        ("killed", "[rank 0] rank 1 on ", EXIT_STOPPED, 0),
        ("error", "[rank 0] rank 1 failed: RuntimeError: a bug (", 2, 1),
    ],
)
def test_process_ends_without_a_traceback_after_another_one(failure, line, code, num_tracebacks):
    printed = run_until_rank_exits(0, 2, "tests.training.ending_process", failure)
    assert printed.count(line) == 1, printed
    assert f"exit code {code}" in printed
    assert printed.count("Traceback") == num_tracebacks, printed


def test_error_of_both_processes_is_not_a_lost_process():
    with pytest.raises(AssertionError) as ended:
        run_ranks(2, "tests.training.ending_process", "error of both")
    printed = str(ended.value)
    assert printed.count("Traceback") == 2 and "rerun the same command" not in printed, printed


@pytest.mark.parametrize(
    ("failure", "rank", "reason"),
    [
        ("stop", 1, "no heartbeat from"),
        pytest.param("stop", 0, "no answer from", marks=pytest.mark.long),
        pytest.param("sleep", 1, "did not arrive", marks=pytest.mark.long),
        pytest.param("sleep", 0, "did not arrive", marks=pytest.mark.long),
        pytest.param("sleep in step", 1, "did not arrive", marks=pytest.mark.long),
        pytest.param("stop before DDP", 1, "no heartbeat from", marks=pytest.mark.long),
        pytest.param("stop before gather", 1, "no heartbeat from", marks=pytest.mark.long),
    ],
)
def test_hanging_process_is_named_and_the_run_ends(cache, tmp_path, failure, rank, reason):
    flags = train_flags(cache, tmp_path, "run", "--collective-timeout", 0.02)
    if "gather" in failure:
        flags += ["--sampling-steps", "2"]
    printed = run_until_rank_exits(1 - rank, 2, "tests.training.hanging_run", failure, rank, *flags)
    assert f"exit code {EXIT_STOPPED}" in printed, printed
    line = next(line for line in printed.splitlines() if f"[rank {1 - rank}] gave up" in line)
    assert f" rank {rank} on " in line and "step" in line, line
    assert reason in line and "rerun the same command" in line, line
