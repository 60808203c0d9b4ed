"""Profile a few training steps with torch.profiler."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from checkpointing.storage import format_error

SKIPPED_STEPS = 10  # first steps, which include compilation
WARM_UP_STEPS = 2  # profiled, but discarded, because starting the profiler slows them down
NUM_TABLE_ROWS = 60


def make_profiler(device: torch.device, **options: Any) -> profile:
    """Return a profiler of the host, and of the device if it is a GPU."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities, acc_events=True, **options)


def make_table(profiler: profile, device: torch.device) -> str:
    """Return a table of the operations that take the most time on the device."""
    sort_key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=sort_key, row_limit=NUM_TABLE_ROWS)


class StepProfiler:
    """Profiles `num_steps` training steps after the first ones, on one process.

    Writes profile/trace.json, which Perfetto shows, and profile/kernels.txt, a table of the
    operations and the time that they take on the device.

    Args:
        num_steps: Number of steps to profile; 0 disables the profiler.
        folder: The run folder.
        device: Device of the steps.
        report: Writes a message to the log.
    """

    def __init__(
        self, num_steps: int, folder: Path, device: torch.device, report: Callable[[str], None]
    ):
        self.folder = folder / "profile"
        self.device = device
        self.report = report
        self.profiler: profile | None = None
        self.remaining_steps = num_steps and SKIPPED_STEPS + WARM_UP_STEPS + num_steps
        if num_steps:
            self.profiler = make_profiler(
                device,
                schedule=schedule(
                    wait=SKIPPED_STEPS, warmup=WARM_UP_STEPS, active=num_steps, repeat=1
                ),
                on_trace_ready=self._write,
            )

    def __enter__(self) -> "StepProfiler":
        if self.profiler:
            self.profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.profiler:
            self.profiler.stop()
            missing = f"{self.remaining_steps} steps before the profile was complete"
            self.report(f"--profile: the run ended {missing}")

    def advance(self) -> None:
        """Tell the profiler that a step is complete."""
        if self.profiler is None:
            return
        self.profiler.step()
        self.remaining_steps -= 1
        if not self.remaining_steps:
            self.profiler.stop()
            self.profiler = None

    def _write(self, profiler: profile) -> None:
        table = make_table(profiler, self.device)
        try:
            self.folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(self.folder / "trace.json"))
            (self.folder / "kernels.txt").write_text(table)
        except OSError as error:
            self.report(f"could not save the profile: {format_error(error)}; training continues")
        else:
            self.report(f"saved {self.folder}/trace.json and kernels.txt")
