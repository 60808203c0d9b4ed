"""Time how long a checkpoint delays training, and how much its writer thread disturbs training.

    python -m benchmarks.checkpoint --model SiT-B/2 --dest exps --json checkpoint.json

`copy_s` is the copy to host memory, which training waits for. `write_s` is the rest, which the
writer thread does in the background. `longest_pause_s` is the longest interval during which a
Python loop in the training thread did not run: hashing and writing must release the interpreter
lock.
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measure import (
    add_result_flags,
    describe_machine,
    median_and_quartiles,
    report,
    synchronize,
)
from benchmarks.train_step import default_settings, synthetic_manifest
from checkpointing.storage import list_checkpoints
from common import cli
from models.sit import PRESETS
from training.alignment import make_cache_info, plan_alignments
from training.config import (
    build_network_config,
)
from training.resume import build_config_json
from training.setup import build_state
from training.state import CheckpointWriter, TrainState

POLL_SECONDS = 0.001  # interval of the loop that detects pauses


class SaveTimes(NamedTuple):
    """Seconds of one checkpoint; the fields are keys of the result."""

    copy_s: float
    write_s: float
    longest_pause_s: float


def build_trained_state(model: str, device: torch.device) -> tuple[TrainState, dict]:
    """Build a state with optimizer moments, and its config.json.

    Args:
        model: A key of PRESETS.
        device: Device of the state.
    """
    settings = default_settings(model)
    manifest = synthetic_manifest()
    network = build_network_config(settings.model, manifest)
    align = plan_alignments(settings.alignments, network, make_cache_info(manifest))
    state = build_state(network, align, settings.optimizer, settings.device, device)
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    state.optimizer.step()
    state.optimizer.zero_grad()
    return state, build_config_json(settings, network, align, manifest)


def time_save(writer: CheckpointWriter, state: TrainState, device: torch.device) -> SaveTimes:
    """Save a checkpoint and measure the times."""
    synchronize(device)
    started = time.perf_counter()
    writer.submit(state)
    copied = time.perf_counter()
    previous = copied
    longest_pause = 0.0
    while writer.thread is not None and writer.thread.is_alive():
        time.sleep(POLL_SECONDS)
        now = time.perf_counter()
        longest_pause = max(longest_pause, now - previous - POLL_SECONDS)
        previous = now
    return SaveTimes(copied - started, previous - copied, longest_pause)


def main() -> None:
    """Run the benchmark."""
    parser = cli.Parser(__doc__, "python -m benchmarks.checkpoint", "[--model NAME]")
    parser.add_argument(
        "--model",
        choices=PRESETS,
        default="SiT-XL/2",
        metavar="NAME",
        help="a preset of models/sit.py",
    )
    parser.add_argument(
        "--dest", type=Path, default=Path("exps"), help="folder on the disk to write to"
    )
    add_result_flags(parser, rounds=5)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state, config = build_trained_state(args.model, device)
    args.dest.mkdir(parents=True, exist_ok=True)
    run = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=args.dest))
    times = []
    try:
        with CheckpointWriter(run, config, keep_last=1) as writer:
            for state.step in range(args.rounds + 1):
                times.append(time_save(writer, state, device))
        num_bytes = sum(file.stat().st_size for file in list_checkpoints(run)[-1].iterdir())
    finally:
        shutil.rmtree(run)

    # The first save allocates the memory that the later ones reuse.
    columns = zip(SaveTimes._fields, zip(*times[1:]))
    results = {name: median_and_quartiles(list(values)) for name, values in columns}
    report(
        {
            "benchmark": "checkpoint",
            "machine": describe_machine(device),
            "model": args.model,
            "rounds": args.rounds,
            "bytes": num_bytes,
            "results": results,
            "write_bytes_per_s": num_bytes / results["write_s"]["median"],
        },
        args.json,
    )


if __name__ == "__main__":
    cli.run(main)
