import os
from pathlib import Path

import pytest

import train
from common import machine
from evaluations import evaluate


def test_available_memory_respects_the_control_group_limit(tmp_path, monkeypatch):
    group = tmp_path / "sys/fs/cgroup/job"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("5000000\n")
    (group / "memory.current").write_text("2000000\n")
    (group.parent / "memory.max").write_text("max\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8000000 kB\n")
    monkeypatch.setattr(machine, "Path", lambda path: Path(str(tmp_path) + str(path)))
    assert machine.get_available_memory() == 3_000_000


@pytest.mark.parametrize(
    ("busy_cores", "num_threads", "omp_num_threads", "expected"),
    [
        (3, 4, None, "other programs use about 3 of the 4 cores"),
        (4, 4, None, "set OMP_NUM_THREADS, for example to 1"),
        (1, 4, None, "set OMP_NUM_THREADS, for example to 3"),
        (0, 4, None, ""),
        (3, 1, None, ""),
        (3, 4, "4", ""),
    ],
)
def test_warning_about_cores_that_other_programs_use(
    monkeypatch, busy_cores, num_threads, omp_num_threads, expected
):
    """In the second of the measurement, 4 available cores and 4 others become busy."""
    ticks = os.sysconf("SC_CLK_TCK")

    def read_stat(path):
        lines = ["cpu 9 9 9 9 9", "intr 3 4"]
        for core in range(8):
            is_busy = seconds and (core < busy_cores or core >= 4)
            lines.append(f"cpu{core} 100 7 {100 + ticks * is_busy} {500} 60")
        return lines

    seconds = 0

    def sleep(interval):
        nonlocal seconds
        seconds += interval

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp_num_threads:
        monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads)
    monkeypatch.setattr(machine, "_read_lines", read_stat)
    monkeypatch.setattr(machine.time, "sleep", sleep)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: num_threads)
    warning = machine.describe_busy_cores(interval=1)
    assert expected in warning and bool(expected) == bool(warning)


def test_no_warning_about_busy_cores_without_proc(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "_read_lines", lambda path: [])
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 4)
    assert machine.describe_busy_cores(interval=0.001) == ""


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (train, ["--exp-name", "x", "--data-dir", "/missing"]),
        (evaluate, ["/missing.npz", "--reference", "/missing.npz"]),
    ],
)
def test_commands_print_the_warning_about_busy_cores(call, monkeypatch, command, flags):
    monkeypatch.setattr(command, "describe_busy_cores", lambda: "all cores are in use")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out = call(command, *flags)
    assert code == 2 and out.startswith("warning: all cores are in use\nerror: ")
