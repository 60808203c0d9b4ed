"""Makes small things of the real formats, and runs commands under torchrun."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent


def make_vae(
    folder: Path,
    seed: int = 0,
    latent_channels: int = 4,
    shift: float | None = 0.25,
    blocks: int = 3,
    **config,
) -> Path:
    """A random AutoencoderKL, f4 with three blocks, as save_pretrained writes it. config: what else it is made with."""
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
    """class/image.png, three classes."""
    rng = np.random.default_rng(0)
    for i in range(images):
        path = folder / f"class{i % 3}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return folder


def torchrun(processes: int, script: str, *flags) -> str:
    """The script under torchrun on this machine's CPU; raises if it fails."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        "--master_port",
        "0",
    ]
    command += [
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        script,
        *map(str, flags),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


LEAVE = """
import os, sys, traceback
from common import cli
def leave(main):  # a forked process: main, and its exit code
    code = 0
    try:
        cli.run(main)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    os._exit(code)
"""

RANKS = """
import importlib, socket, torch
count, name, *flags = sys.argv[1:]
module = importlib.import_module(name)
torch.set_num_threads(1)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
world = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
children = []
for rank in range(int(count)):
    children.append(os.fork())
    if not children[-1]:
        os.environ.update(world, RANK=str(rank), LOCAL_RANK=str(rank))
        sys.argv = [name, *flags]
        leave(module.main)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def run_ranks(processes: int, module: str, *flags) -> str:
    """The module's main on several processes, with torchrun's environment but in half its time: forked after the imports."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LEAVE + RANKS, str(processes), module, *map(str, flags)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def train_flags(cache: Path, exps: Path, name: str, *more) -> list[str]:
    """A run of the smallest model, without previews."""
    flags = f"--data-dir {cache} --output-dir {exps} --exp-name {name} --model SiT-Ti/2 --batch-size 8 --learning-rate 1e-3"
    rest = "--num-workers 0 --log-every 1 --sampling-steps 0 --ema-decay 0.9"
    head = [] if "none" in more else ["--projector-width", "64"]
    return [*flags.split(), *rest.split(), *head, *map(str, more)]


def read_metrics(run: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("images_per_s", "step_s", "data_s", "compute_s", "mfu")
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def have_equal_weights(a: Path, b: Path, step: str = "0000010") -> bool:
    """Whether two runs' weights, EMA and optimizer are the same to the bit."""
    for name in ("model", "ema", "optimizer"):
        ours, theirs = (
            load_file(run / "checkpoints" / step / f"{name}.safetensors") for run in (a, b)
        )
        if ours.keys() != theirs.keys() or not all(
            torch.equal(ours[key], theirs[key]) for key in ours
        ):
            return False
    return True


FORKS = """
import json, torch, train
torch.set_num_threads(1)
for line in sys.stdin:
    flags = json.loads(line)
    pid = os.fork()
    if not pid:
        os.setsid()
        sys.argv = ["train.py", *flags]
        leave(train.main)
    print("pid", pid, flush=True)
    print("exit", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class ForkServer:
    """Starts train.py in a fraction of a second: forked from a process that has done the imports and no more."""

    def __init__(self, log: Path):
        self.running = 0
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LEAVE + FORKS],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )

    def start(self, flags: list[str]) -> int:
        """train.py in a session of its own; returns its process id. One that an earlier test left running is killed."""
        if self.running:
            with suppress(ProcessLookupError):
                os.killpg(self.running, signal.SIGKILL)
            self.wait()
        self.process.stdin.write(json.dumps(flags) + "\n")
        self.process.stdin.flush()
        self.running = self._answer("pid")
        return self.running

    def wait(self) -> int:
        """Its exit code, or minus the signal that killed it."""
        code = self._answer("exit")
        self.running = 0
        return code

    def _answer(self, word: str) -> int:
        while True:
            line = self.process.stdout.readline()
            assert line, "the forking process died"
            if line.startswith(f"{word} "):
                return int(line.split()[1])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
