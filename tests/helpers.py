"""Create small inputs in the formats of real data, and run commands on one or more processes."""

import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
# What a clone contains instead of a file that Git LFS did not fetch.
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def make_vae(
    folder: Path,
    seed: int = 0,
    latent_channels: int = 4,
    shift: float | None = 0.25,
    blocks: int = 3,
    **config,
) -> Path:
    """Save a randomly initialized AutoencoderKL. With three blocks, its downsampling factor is 4.

    `config` contains additional arguments of AutoencoderKL.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    config = {"scaling_factor": 0.7, "shift_factor": shift} | config
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=32,
        **config,
    )
    vae.save_pretrained(folder)
    return folder


def make_tree(folder: Path, images: int = 24, side: int = 32) -> Path:
    """Save random images of three classes as class/image.png."""
    rng = np.random.default_rng(0)
    for i in range(images):
        path = folder / f"class{i % 3}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return folder


def write_files(folder: Path, files: dict[str, str]) -> Path:
    """Write text files, by their path in the folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def call_main(module: ModuleType, *flags) -> None:
    """Call the main function of a command in this process."""
    from accelerate.state import AcceleratorState

    # accelerate keeps its state for the whole process, in which tests run several commands.
    AcceleratorState._reset_state(reset_partial_state=True)
    with mock.patch.object(sys, "argv", [module.__name__, *map(str, flags)]):
        module.main()


def run_command(command: list[str]) -> str:
    """Run a command from the root of the repository with one thread and return its output."""
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def torchrun(processes: int, script: str | Path, *flags) -> str:
    """Run a script under torchrun on the CPU and return its output."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nproc_per_node", processes, "--master_port", 0]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    return run_command([*map(str, command), str(script), *map(str, flags)])


def wait_until(
    condition: Callable[[], object], poll_seconds: float = 0.01, limit_seconds: int = 300
) -> None:
    """Wait until a condition holds. The time limit only stops tests that hang."""
    end = time.monotonic() + limit_seconds
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {limit_seconds} seconds"
        time.sleep(poll_seconds)


def list_children(pid: int) -> list[int]:
    """Return the ids of the processes that a process has started."""
    command = ["pgrep", "-P", str(pid)]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return [int(child) for child in output.split()]


CALL_AND_EXIT = """
import os, sys, traceback
def call_and_exit(function, *args):  # in a forked process
    code = 0
    try:
        function(*args)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)  # skips the slow finalization of the imported modules
"""

RUN_AND_EXIT = f"""{CALL_AND_EXIT}
from common import cli
def run_and_exit(main):
    call_and_exit(cli.run, main)
"""

START_RANKS = """
import importlib, socket, torch
count, name, *flags = sys.argv[1:]
module = importlib.import_module(name)
torch.set_num_threads(1)
with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))
    port = unused.getsockname()[1]
world = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": os.environ.get("LOCAL_WORLD_SIZE", count)}
world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
children = []
for rank in range(int(count)):
    children.append(os.fork())
    if not children[-1]:
        os.environ.update(world, RANK=str(rank), LOCAL_RANK=str(rank))
        sys.argv = [name, *(flag.replace("{rank}", str(rank)) for flag in flags)]
        run_and_exit(module.main)
"""

FORK_RANKS = f"""{START_RANKS}
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def run_ranks(processes: int, module: str, *flags) -> str:
    """Run a module's main function on several processes with torchrun's environment.

    In the flags, {rank} is replaced by the rank of the process.
    """
    return run_forked(RUN_AND_EXIT + FORK_RANKS, processes, module, *flags)


def make_ranks_command(processes: int, module: str, *flags) -> list[str]:
    """Return the command of `run_ranks`, to start it in a new interpreter."""
    code = RUN_AND_EXIT + FORK_RANKS
    return [sys.executable, "-c", code, str(processes), module, *map(str, flags)]


WAIT_FOR_ONE_RANK = f"""{START_RANKS}
import signal
waited = children.pop(int(os.environ["WAITED_RANK"]))
code = os.waitstatus_to_exitcode(os.waitpid(waited, 0)[1])
for child in children:  # they may be stopped
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
print("exit code", code)
"""


def run_until_rank_exits(rank: int, processes: int, module: str, *flags) -> str:
    """Like `run_ranks`, but kill the other processes when the given one has exited.

    The output contains "exit code CODE".
    """
    code = RUN_AND_EXIT + WAIT_FOR_ONE_RANK
    with mock.patch.dict(os.environ, WAITED_RANK=str(rank)):
        return run_forked(code, processes, module, *flags)


def train_flags(
    cache: Path, exps: Path, name: str, *extra_flags, projector_width: int | None = 64
) -> list[str]:
    """Return the flags of a short training run of the smallest model without previews.

    Pass `projector_width=None` for methods that do not have an MLP head.
    """
    flags = ["--data-dir", cache, "--output-dir", exps, "--exp-name", name]
    flags += ["--model", "SiT-Ti/2", "--batch-size", 8, "--learning-rate", "1e-3"]
    flags += ["--num-workers", 0, "--log-every", 1, "--sampling-steps", 0, "--ema-decay", 0.9]
    if "--epochs" not in extra_flags:  # a test that expects an error must not train for hours
        flags += ["--max-train-steps", 3]
    if projector_width and "none" not in extra_flags:  # --align none has no projection head
        flags += ["--projector-width", projector_width]
    return [*map(str, flags), *map(str, extra_flags)]


def read_metrics(run: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without timings."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if key not in ("images_per_s", "matmul_share", "mfu") and not key.endswith("_s")
        }
        for line in lines
    ]


def have_equal_weights(a: Path, b: Path, step: str = "0000010") -> bool:
    """Return whether the weights, EMA and optimizer states of two runs are bit-identical."""
    for name in ("model", "ema", "optimizer"):
        file = Path("checkpoints") / step / f"{name}.safetensors"
        tensors_a = load_file(a / file)
        tensors_b = load_file(b / file)
        if tensors_a.keys() != tensors_b.keys():
            return False
        if not all(torch.equal(tensors_a[key], tensors_b[key]) for key in tensors_a):
            return False
    return True


# The libraries are those that train.py and other commands import when they are first used.
SERVE_FORKS = f"""{CALL_AND_EXIT}
import gc, json
import accelerate, diffusers, torchvision, torch._dynamo
from diffusers import AutoencoderKL
import train, sample_ddp
from preprocessing import encode_latents
from training import setup
setup.measure_matmul_rate = lambda device, dtype: 1e11  # the measurement takes 0.2 s per run
gc.freeze()  # otherwise, garbage collection would copy the memory of the imported modules
for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if not pid:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = ["-c", *request["arguments"]]
        call_and_exit(exec, request["code"], {{"__name__": "__main__"}})
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

RUN_TRAIN = """
import sys, torch, train
torch.set_num_threads(1)
run_and_exit(train.main)
"""


class ForkServer:
    """Runs Python code in forks of a process that has finished the imports of the commands.

    A new interpreter would need several seconds for them.
    """

    def __init__(self):
        self.running_pid = 0
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (stays open)
        fcntl.fcntl(self.output, fcntl.F_SETFL, os.O_APPEND)  # all processes share the file
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE_FORKS],
            cwd=ROOT,
            env=os.environ | ONE_THREAD,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.output,
            text=True,
        )

    def start(self, code: str, *arguments) -> int:
        """Run code like `python -c CODE ARGUMENTS` in a new session and return the process id.

        If the code of an earlier test is still running, it is killed first.
        """
        if self.running_pid:
            with suppress(ProcessLookupError):
                os.killpg(self.running_pid, signal.SIGKILL)
            self.wait()
        self.output.truncate(0)
        environment = dict(os.environ | ONE_THREAD)
        request = {"code": code, "arguments": [*map(str, arguments)], "environment": environment}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        self.running_pid = self._read_answer()
        return self.running_pid

    def start_ranks(self, processes: int, module: str, *flags) -> int:
        """Start what `run_ranks` runs."""
        return self.start(RUN_AND_EXIT + FORK_RANKS, processes, module, *flags)

    def start_train(self, flags: list[str]) -> int:
        """Start train.py in a new session and return its process id."""
        return self.start(RUN_AND_EXIT + RUN_TRAIN, *flags)

    def kill_ranks(self) -> None:
        """Kill the processes of `start_ranks` and wait until they have ended."""
        pid = self.running_pid
        for child in list_children(pid):
            os.kill(child, signal.SIGKILL)
        self.wait()
        with suppress(ProcessLookupError):  # workers of DataLoaders
            os.killpg(pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for the code and return its exit code, which is negative if a signal killed it."""
        code = self._read_answer()
        self.running_pid = 0
        return code

    def read_output(self) -> str:
        """Return what the code has written to stdout and stderr."""
        self.output.seek(0)
        return self.output.read()

    def _read_answer(self) -> int:
        line = self.process.stdout.readline()
        assert line, f"the fork server has died: {self.read_output()}"
        return int(line)


@functools.cache
def get_fork_server() -> ForkServer:
    """Return the fork server of this process. It exits when this process has ended."""
    return ForkServer()


def run_forked(code: str, *arguments) -> str:
    """Run code like `python -c CODE ARGUMENTS` in the fork server and return its output."""
    server = get_fork_server()
    limit = threading.Timer(240, os.killpg, (server.start(code, *arguments), signal.SIGKILL))
    limit.start()
    exit_code = server.wait()
    limit.cancel()
    output = server.read_output()
    assert exit_code == 0, output
    return output
