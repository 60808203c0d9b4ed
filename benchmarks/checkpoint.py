"""Measure how long saving a checkpoint delays training.

    python -m benchmarks.checkpoint --model SiT-B/2 --dest exps --json checkpoint.json

`copy_s` is the time of the copy to host memory, which blocks training. `write_s` is the time of the
writer thread, which runs in the background. `longest_pause_s` is the longest interval in which the
training thread could not run Python code, because the writer thread held the global interpreter
lock.
"""

import time
from pathlib import Path

import torch

from benchmarks.measure import (
    make_parser,
    median_and_quartiles,
    report,
    scratch_folder,
    synchronize,
)
from benchmarks.variants import StepConfig, make_plan
from checkpointing.storage import list_checkpoints
from common import cli
from training.checkpoints import CheckpointWriter
from training.resume import build_config_json
from training.state import TrainState, build_state

POLL_SECONDS = 0.001  # interval of the loop that detects pauses


def build_trained_state(model: str, device: torch.device) -> tuple[TrainState, dict]:
    """Build a training state with optimizer moments, and the content of the run's config.json.

    Args:
        model: A key of PRESETS.
        device: Device of the state.
    """
    plan = make_plan(StepConfig(model=model), ["sra2"])
    settings = plan.settings
    state = build_state(
        plan.network,
        plan.align,
        settings.optimizer,
        settings.device,
        settings.run.seed,
        device,
    )
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    state.optimizer.step()
    state.optimizer.zero_grad()
    return state, build_config_json(settings, plan.network, plan.align, plan.manifest)


def time_save(
    writer: CheckpointWriter, state: TrainState, device: torch.device
) -> dict[str, float]:
    """Save a checkpoint, and return the three times in seconds by name."""
    synchronize(device)
    start_time = time.perf_counter()
    writer.submit(state)
    copy_end_time = time.perf_counter()
    previous_time = copy_end_time
    longest_pause = 0.0
    while writer.thread is not None and writer.thread.is_alive():
        time.sleep(POLL_SECONDS)
        now = time.perf_counter()
        longest_pause = max(longest_pause, now - previous_time - POLL_SECONDS)
        previous_time = now
    return {
        "copy_s": copy_end_time - start_time,
        "write_s": previous_time - copy_end_time,
        "longest_pause_s": longest_pause,
    }


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, "checkpoint", model="SiT-XL/2", dest=Path("exps"), rounds=5)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state, config = build_trained_state(args.model, device)
    times = []
    with scratch_folder(args.dest / "benchmark-checkpoint") as run:
        with CheckpointWriter(run, config, keep_last=1) as writer:
            for state.step in range(args.rounds + 1):
                times.append(time_save(writer, state, device))
        num_bytes = sum(file.stat().st_size for file in list_checkpoints(run)[-1].iterdir())

    # Exclude the first save, which allocates the memory that later saves reuse.
    results = {key: median_and_quartiles([save[key] for save in times[1:]]) for key in times[0]}
    report(
        args,
        device,
        ("model", "rounds"),
        bytes=num_bytes,
        results=results,
        write_bytes_per_s=num_bytes / results["write_s"]["median"],
    )


if __name__ == "__main__":
    cli.run(main)
