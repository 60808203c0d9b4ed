"""Times a checkpoint: how long training waits for it, and what the thread that writes it takes away from training.

    python -m benchmarks.checkpoint --model SiT-B/2 --dest exps --json checkpoint.json

`copy_s` is what training waits for, the copy to host memory. `write_s` is what happens beside it. `longest_pause_s` is the
longest that a Python loop in the training thread stood still meanwhile: hashing and writing must not hold the interpreter.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import describe_machine, median_and_quartiles, report, synchronize
from benchmarks.train_step import parse_training_flags, synthetic_manifest
from checkpointing.storage import list_checkpoints
from common import cli
from models.sit import PRESETS
from train import build
from training.config import make_config
from training.state import Writer

NAP = 0.001  # seconds, so that the loop that notices pauses is not itself what the writer waits for


def parse() -> argparse.Namespace:
    parser = cli.Parser(__doc__, "python -m benchmarks.checkpoint", "[--model NAME]")
    parser.add_argument(
        "--model",
        choices=PRESETS,
        default="SiT-XL/2",
        metavar="NAME",
        help="a preset of models/sit.py",
    )
    parser.add_argument(
        "--dest", type=Path, default=Path("exps"), help="a folder on the disk to write to"
    )
    parser.add_argument(
        "--rounds", type=cli.positive_int, default=5, help="checkpoints, of which the median counts"
    )
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser.parse_args()


def main() -> None:
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flags = parse_training_flags(["--model", args.model])
    config = make_config(flags, synthetic_manifest())
    state = build(flags, config, device)
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    state.optimizer.step()
    state.optimizer.zero_grad()
    args.dest.mkdir(parents=True, exist_ok=True)
    run = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=args.dest))
    figures: dict[str, list[float]] = {"copy_s": [], "write_s": [], "longest_pause_s": []}
    try:
        with Writer(run, config, keep_last=1) as writer:
            for state.step in range(args.rounds + 1):
                synchronize(device)
                started = time.perf_counter()
                writer.submit(state)
                copied = last = time.perf_counter()
                pause = 0.0
                while writer.thread.is_alive():
                    time.sleep(NAP)
                    now = time.perf_counter()
                    pause, last = max(pause, now - last - NAP), now
                if state.step:  # the first makes the pages that the others use again
                    for values, value in zip(
                        figures.values(), (copied - started, last - copied, pause)
                    ):
                        values.append(value)
            writer.wait()
        size = sum(file.stat().st_size for file in list_checkpoints(run)[-1].iterdir())
    finally:
        shutil.rmtree(run)
    results = {name: median_and_quartiles(values) for name, values in figures.items()}
    report(
        {
            "benchmark": "checkpoint",
            "machine": describe_machine(device),
            "model": args.model,
            "rounds": args.rounds,
            "bytes": size,
            "results": results,
            "write_bytes_per_s": size / results["write_s"]["median"],
        },
        args.json,
    )


if __name__ == "__main__":
    cli.run(main)
