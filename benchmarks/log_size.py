"""Measure the size of the logs of a run without a terminal, and compute that of a long run.

    python -m benchmarks.log_size --data-dir data/fashion-mnist --dest exps --json log_size.json

The command trains a small model on several processes of this machine, and stops it after some time.
The long run is SiT-XL/2 on eight GPUs. It is assumed to process as many images per second and GPU
as `benchmarks.train_step` measured, which gives the largest number of lines, and to be restarted
every day.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.measure import make_parser, report, scratch_folder
from benchmarks.table import RESULTS
from common import cli
from common.metrics_log import read_rows
from training.log import format_line

ROOT = Path(__file__).resolve().parent.parent
SECONDS_PER_DAY = 86_400
NUM_STEPS = 1_000_000  # of the short run, which is stopped earlier
NUM_GPUS = 8
NUM_DAYS = 5
BATCH_SIZE = 256
LOG_EVERY = 100
CHECKPOINT_STEPS = 50_000
PREVIEW_STEPS = 10_000
STEP_TIME = RESULTS / "train-step-xl2-b64-h200.json"
MESSAGE_BYTES = 100  # upper bound of the line about a checkpoint or a preview

# Values with as many digits as those of a run.
LOSSES: dict[str, float | None] = {"loss": 1.0, "denoising": 0.5, "align/sra2": 0.5}


def train(data_dir: Path, folder: Path, processes: int, seconds: float, log_every: int) -> None:
    """Train without a terminal and stop after some time; the output is written to console.txt.

    Args:
        data_dir: The latent cache.
        folder: Output directory of the run `run`.
        processes: Number of processes.
        seconds: Seconds between the first line of metrics.jsonl and the signal.
        log_every: Steps between lines.

    Raises:
        UserError: The training failed.
    """
    flags = ["--data-dir", data_dir, "--output-dir", folder, "--exp-name", "run"]
    flags += ["--model", "SiT-Ti/2", "--batch-size", 16, "--max-train-steps", NUM_STEPS]
    flags += ["--sampling-steps", 0, "--num-workers", 0, "--log-every", log_every]
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        port = unused.getsockname()[1]
    world: dict[str, object] = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    world |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    running = []
    with (folder / "console.txt").open("ab") as console:
        for rank in range(processes):
            environment = world | {"RANK": rank, "LOCAL_RANK": rank}
            running.append(
                subprocess.Popen(
                    [sys.executable, str(ROOT / "train.py"), *map(str, flags)],
                    env=os.environ | {name: str(value) for name, value in environment.items()},
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                )
            )
    while running[0].poll() is None and not (folder / "run/metrics.jsonl").exists():
        time.sleep(0.1)
    time.sleep(seconds)
    running[0].send_signal(signal.SIGTERM)
    exit_codes = [process.wait() for process in running]
    if exit_codes != processes * [cli.EXIT_STOPPED]:
        output = (folder / "console.txt").read_text(errors="replace")
        raise cli.UserError(f"--data-dir {data_dir}: train.py failed; its output is {output!r}")


def count(lines: list[str]) -> dict[str, int]:
    """Return the number of lines and their number of bytes."""
    return {"lines": len(lines), "bytes": sum(len(line.encode()) + 1 for line in lines)}


def measure(folder: Path, processes: int) -> dict[str, dict[str, int]]:
    """Return the sizes of the logs of a run, and those of the progress in the console's output."""
    lines = (folder / "console.txt").read_text().splitlines()
    results = {
        "console": count(lines),
        "progress": count([line for line in lines if " remaining: " in line]),
    }
    for name in ["log.txt", *(f"rank-{rank}.log" for rank in range(1, processes))]:
        results[name] = count((folder / "run" / name).read_text().splitlines())
    return results


def compute_line_bytes(step: int, num_steps: int, images_per_s: float, seconds: float) -> int:
    """Return the size of a line about the progress, including its line break.

    Args:
        step: Number of updates so far.
        num_steps: Number of steps of the run.
        images_per_s: Images per second.
        seconds: Remaining time.
    """
    return len(format_line(step, num_steps, images_per_s, seconds, LOSSES).encode()) + 1


def compute_long_run(results: dict[str, dict[str, int]]) -> dict[str, float]:
    """Return the size of the logs of five days, given the sizes of a short run."""
    images_per_s = json.loads(STEP_TIME.read_text())["results"]["sra2"]["images_per_s"] * NUM_GPUS
    seconds = NUM_DAYS * SECONDS_PER_DAY
    steps = round(seconds * images_per_s / BATCH_SIZE)
    lines = steps // LOG_EVERY
    line_bytes = compute_line_bytes(steps, steps, images_per_s, seconds)
    message_bytes = (steps // CHECKPOINT_STEPS + steps // PREVIEW_STEPS) * MESSAGE_BYTES
    start_bytes = results["console"]["bytes"] - results["progress"]["bytes"]
    sizes = {
        "console": lines * line_bytes + NUM_DAYS * start_bytes + message_bytes,
        "log.txt": NUM_DAYS * results["log.txt"]["bytes"] + message_bytes,
        "rank logs": NUM_DAYS * (NUM_GPUS - 1) * results["rank-1.log"]["bytes"],
    }
    return {
        "gpus": NUM_GPUS,
        "days": NUM_DAYS,
        "images_per_s": images_per_s,
        "steps": steps,
        "log_every": LOG_EVERY,
        "lines": lines,
        "bytes_per_line": line_bytes,
        **{f"{name} bytes": size for name, size in sizes.items()},
        "total bytes": sum(sizes.values()),
    }


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, "log_size", dest=Path("exps"))
    parser.add_argument("--data-dir", type=Path, required=True, help="the latent cache to train on")
    parser.add_argument("--processes", type=cli.positive_int, default=2, help="number of processes")
    parser.add_argument("--seconds", type=float, default=120.0, help="duration of the training")
    parser.add_argument(
        "--log-every", type=cli.positive_int, default=10, help="steps between lines"
    )
    args = parser.parse_args()
    if args.processes < 2:
        raise cli.UserError("--processes 1 has no log of another process: use at least 2")
    with scratch_folder(args.dest / "benchmark-log-size") as folder:
        train(args.data_dir, folder, args.processes, args.seconds, args.log_every)
        results = measure(folder, args.processes)
        row = read_rows(folder / "run")[-1]
    seconds_left = (NUM_STEPS - row["step"]) * row["step_s"]
    line_bytes = compute_line_bytes(row["step"], NUM_STEPS, row["images_per_s"], seconds_left)
    report(
        args,
        torch.device("cpu"),
        ("processes", "seconds", "log_every"),
        steps=row["step"],
        results=results,
        computed_progress_bytes=row["step"] // args.log_every * line_bytes,
        long_run=compute_long_run(results),
    )


if __name__ == "__main__":
    cli.run(main)
