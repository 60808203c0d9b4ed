"""Run the scripts of docs/cluster with stand-ins for SLURM's commands and for train.py.

Two tests with real training processes are marked `long`.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from checkpointing.storage import list_checkpoints
from common.cli import EXIT_STOPPED
from tests.helpers import ONE_THREAD, ROOT, train_flags, wait_until
from training.config import parse_settings

PAGES = ROOT / "docs/cluster"
FLAGS = ["--exp-name", "two words"]

# Starts SLURM_NTASKS tasks, forwards SIGUSR1 to them and returns their largest exit code.
SRUN = """
import os, signal, subprocess, sys
assert sys.argv[1] == "--kill-on-bad-exit=1"
tasks = []
def forward(number, frame):
    for task in tasks:
        task.send_signal(number)
signal.signal(signal.SIGUSR1, forward)
for task in range(int(os.environ["SLURM_NTASKS"])):
    local = task % int(os.environ["SLURM_NTASKS_PER_NODE"])
    variables = {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(local)}
    tasks.append(subprocess.Popen(sys.argv[2:], env=os.environ | variables))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

SCONTROL = """
import os, sys
from pathlib import Path
if sys.argv[1:] == ["show", "hostnames", "node[1-2]"]:
    print(os.environ.get("FIRST_NODE", "node1"), "node2", sep="\\n")
else:
    Path(os.environ["RECORDS"], "scontrol").write_text(" ".join(sys.argv[1:]))
"""

# Stands in for python: records its environment, and ends with the code EXIT_CODE on rank 1, and
# with code 75 after a signal.
PYTHON = """
import json, os, signal, sys
from pathlib import Path
path = Path(os.environ["RECORDS"], "rank" + os.environ["RANK"])
def stop(number, frame):
    path.with_suffix(".signal").write_text(signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
path.with_suffix(".partial").write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
path.with_suffix(".partial").rename(path)
code = os.environ["EXIT_CODE"]
if code == "wait":
    signal.pause()
code = int(code) if os.environ["RANK"] == "1" else 0
if code > 128:
    os.kill(os.getpid(), code - 128)
sys.exit(code)
"""


class Cluster:
    """Starts the scripts with stand-ins for the programs that they call.

    Args:
        folder: Folder of the stand-ins and of what they record.
    """

    def __init__(self, folder: Path):
        self.records = folder / "records"
        self.programs = folder / "bin"
        self.scripts: list[subprocess.Popen] = []
        self.records.mkdir()
        self.programs.mkdir()
        self.write_program("srun", f"#!{sys.executable} -S\n{SRUN}")
        self.write_program("scontrol", f"#!{sys.executable} -S\n{SCONTROL}")
        self.write_program("python", f"#!{sys.executable} -S\n{PYTHON}")

    def write_program(self, name: str, text: str) -> None:
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)

    def start(self, script: str, *flags: str, **variables: str) -> subprocess.Popen:
        """Start a script of docs/cluster with additional environment variables."""
        variables["PATH"] = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        variables["RECORDS"] = str(self.records)
        process = subprocess.Popen(
            ["bash", PAGES / script, *flags],
            cwd=ROOT,
            env=os.environ | ONE_THREAD | variables,
            start_new_session=True,
        )
        self.scripts.append(process)
        return process

    def close(self) -> None:
        """Kill all processes that are still running after a failed test."""
        for process in self.scripts:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def start_job(self, exit_code: str, *flags: str, **variables: str) -> subprocess.Popen:
        """Start slurm.sh as sbatch does, with four tasks on two nodes by default."""
        slurm = {
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NTASKS": "4",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_CPUS_PER_TASK": "8",
        }
        return self.start("slurm.sh", *flags, EXIT_CODE=exit_code, **slurm | variables)

    def start_node(self, exit_code: str) -> subprocess.Popen:
        """Start launch_node.sh on the second of two nodes with two GPUs each."""
        variables = {"GPUS": "2", "NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node1"}
        return self.start("launch_node.sh", *FLAGS, EXIT_CODE=exit_code, **variables)

    def read_rank(self, rank: int) -> tuple[list[str], dict[str, str]]:
        """Return the arguments and the environment of a training process."""
        return json.loads((self.records / f"rank{rank}").read_text())

    def wait_for_ranks(self, ranks: range) -> None:
        paths = [self.records / f"rank{rank}" for rank in ranks]
        wait_until(lambda: all(path.exists() for path in paths), limit_seconds=60)

    def read_signals(self) -> list[str]:
        return [path.read_text() for path in sorted(self.records.glob("*.signal"))]

    def is_requeued(self) -> bool:
        path = self.records / "scontrol"
        return path.exists() and path.read_text() == "requeue 123456"


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def test_slurm_script_starts_one_process_per_gpu(cluster):
    assert cluster.start_job("0", *FLAGS).wait(timeout=60) == 0
    assert not cluster.is_requeued()
    for rank in range(4):
        arguments, environment = cluster.read_rank(rank)
        assert arguments == ["train.py", *FLAGS]
        assert environment["RANK"] == str(rank) and environment["WORLD_SIZE"] == "4"
        assert environment["LOCAL_RANK"] == str(rank % 2)
        assert environment["LOCAL_WORLD_SIZE"] == "2"
        assert environment["MASTER_ADDR"] == "node1" and environment["MASTER_PORT"] == "23456"


@pytest.mark.parametrize(
    ("code", "min_seconds", "is_requeued"),
    [
        (2, "0", False),
        (75, "600", True),
        (137, "600", False),  # a process was killed soon after the start
        (137, "0", True),
    ],
)
def test_slurm_script_requeues_interrupted_jobs_only(cluster, code, min_seconds, is_requeued):
    job = cluster.start_job(str(code), MIN_SECONDS=min_seconds, SLURM_NTASKS="2")
    assert job.wait(timeout=60) == (0 if is_requeued else code)
    assert cluster.is_requeued() == is_requeued


def test_slurm_script_forwards_the_signal_before_the_time_limit(cluster):
    job = cluster.start_job("wait")
    cluster.wait_for_ranks(range(4))
    job.send_signal(signal.SIGUSR1)  # to the script only, as --signal=B:USR1@120 does
    assert job.wait(timeout=60) == 0
    assert cluster.read_signals() == ["SIGUSR1"] * 4
    assert cluster.is_requeued()


@pytest.mark.parametrize("code", [0, 2, 137])
def test_node_script_returns_the_largest_exit_code(cluster, code):
    # EXIT_CODE is that of rank 1, so start the first node.
    variables = {"GPUS": "2", "NODES": "1", "EXIT_CODE": str(code)}
    assert cluster.start("launch_node.sh", *FLAGS, **variables).wait(timeout=60) == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_node_script_numbers_the_processes_and_forwards_signals(cluster, number):
    node = cluster.start_node("wait")
    cluster.wait_for_ranks(range(2, 4))
    node.send_signal(number)
    assert node.wait(timeout=60) == EXIT_STOPPED
    assert cluster.read_signals() == [number.name] * 2
    for rank in (2, 3):
        arguments, environment = cluster.read_rank(rank)
        assert arguments == ["train.py", *FLAGS]
        assert environment["LOCAL_RANK"] == str(rank - 2) and environment["WORLD_SIZE"] == "4"
        assert environment["MASTER_ADDR"] == "node1" and environment["MASTER_PORT"] == "29500"


def test_node_without_a_gpu_does_not_count_as_trained(cluster):
    cluster.write_program("nvidia-smi", "#!/bin/sh\necho 'No devices were found' >&2\nexit 6\n")
    assert cluster.start("launch_node.sh", *FLAGS).wait(timeout=60) == 2


@pytest.mark.long
@pytest.mark.parametrize("script", ["slurm.sh", "launch_node.sh"])
def test_scripts_stop_and_resume_training(cluster, cache, tmp_path, script):
    cluster.write_program("python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    flags = train_flags(cache, tmp_path, "run", "--max-train-steps", 400)
    run = tmp_path / "run"
    signal_number = signal.SIGTERM
    variables = {"GPUS": "2"}
    if script == "slurm.sh":
        signal_number = signal.SIGUSR1
        variables = {"SLURM_NTASKS": "2", "FIRST_NODE": "127.0.0.1"}

    def start() -> subprocess.Popen:
        if script == "slurm.sh":
            return cluster.start_job("", *flags, **variables)
        return cluster.start(script, *flags, **variables)

    job = start()
    wait_until((run / "metrics.jsonl").exists)
    job.send_signal(signal_number)
    assert job.wait(timeout=300) == (0 if script == "slurm.sh" else EXIT_STOPPED)
    assert cluster.is_requeued() == (script == "slurm.sh")
    (checkpoint,) = list_checkpoints(run)
    assert f"at step {int(checkpoint.name)}" in (run / "log.txt").read_text()

    # A STOP file ends the job, and the exit code does not requeue it.
    (cluster.records / "scontrol").unlink(missing_ok=True)
    (run / "STOP").touch()
    assert start().wait(timeout=300) == 0
    assert not cluster.is_requeued()
    assert f"stopped by {run}/STOP" in (run / "log.txt").read_text()


def test_kubernetes_job_agrees_with_its_environment():
    service, job = yaml.safe_load_all((PAGES / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(variables["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["GPUS"])
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    subdomain = job["spec"]["template"]["spec"]["subdomain"]
    assert subdomain == service["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{name}-0.{subdomain}"
    assert (ROOT / container["command"][1]).exists()
    parse_settings(container["args"])
    failed, ignored = (
        rule["onExitCodes"]["values"]
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    )
    assert failed == [2] and ignored == [EXIT_STOPPED]


def test_launchers_accept_the_commands_of_the_pages():
    pages = [ROOT / "docs/cluster.md", *sorted(PAGES.glob("*.md"))]
    text = "".join(page.read_text() for page in pages)
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
    commands = [shlex.split(line) for line in blocks.splitlines() if "train.py" in line]
    parsed = []
    for words in commands:
        if words[:2] == ["accelerate", "launch"]:
            parsed.append(launch_command_parser().parse_args(words[2:]))
        elif words[0] == "torchrun":
            parsed.append(get_args_parser().parse_args(words[1:]))
    assert len(parsed) == 5
    for args in parsed:
        assert args.training_script == "train.py"
        parse_settings(args.training_script_args)
