"""Measure how long train.py --compile takes until the first step is complete.

    python -m benchmarks.start --dest /tmp --json start.json

Each row of the result is one start of train.py, which trains for one step on random latents.
`cold` compiles all graphs. `restart` finds them in PyTorch's folder in the temporary folder.
`another machine` has an empty temporary folder, but the same output folder. The result contains the
seconds from the start of the command, those of the first step alone, and the CPU time of the whole
command, which depends less on other programs.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.data_loading import write_data
from benchmarks.measure import make_parser, report, scratch_folder
from common import cli
from common.cli import UserError

# Name of a start -> its temporary folder.
STARTS = {"cold": "machine-1", "restart": "machine-1", "another machine": "machine-2"}


def run_training(root: Path, temporary_folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Run train.py for one step, and return its seconds.

    Args:
        root: Folder with the latent cache and the runs.
        temporary_folder: Temporary folder of the command.
        args: The flags of the benchmark.

    Raises:
        UserError: The command failed.
    """
    temporary_folder.mkdir(exist_ok=True)
    command = [sys.executable]
    if args.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(args.processes)]
    command += ["train.py", "--compile", "--exp-name", "start", "--output-dir", str(root / "exps")]
    command += ["--data-dir", str(root / "cache"), "--model", args.model]
    command += ["--batch-size", str(args.batch_size), "--mixed-precision", args.precision]
    command += ["--max-train-steps", "1", "--log-every", "1", "--sampling-steps", "0"]
    environment = os.environ | {"TMPDIR": str(temporary_folder)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)

    started = time.time()
    cpu_s = read_cpu_seconds_of_children()
    if subprocess.run(command, env=environment, check=False).returncode:
        raise UserError(f"train.py failed: {' '.join(command)}")
    run = root / "exps/start"
    metrics = run / "metrics.jsonl"
    (row,) = [json.loads(line) for line in metrics.read_text().splitlines()]
    seconds = {
        "start_s": metrics.stat().st_mtime - started,
        "first_step_s": row["step_s"],
        "cpu_s": read_cpu_seconds_of_children() - cpu_s,
    }
    shutil.rmtree(run)
    return seconds


def read_cpu_seconds_of_children() -> float:
    """Return the CPU time of the commands that this process has run."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, "start", "dest", model="SiT-S/2", batch_size=8)
    parser.add_argument(
        "--precision",
        choices=("auto", "no", "fp16", "bf16"),
        default="auto",
        help="same as --mixed-precision of train.py",
    )
    parser.add_argument(
        "--processes", type=cli.positive_int, default=1, help="number of processes on this machine"
    )
    args = parser.parse_args()
    with scratch_folder(args.dest / "start-benchmark") as root:
        write_data(root / "npy", root / "cache", num_images=args.batch_size, num_shards=1)
        results = {name: run_training(root, root / path, args) for name, path in STARTS.items()}
    report(
        args,
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        ("model", "batch_size", "precision", "processes"),
        results=results,
    )


if __name__ == "__main__":
    cli.run(main)
