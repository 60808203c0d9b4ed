"""Send metrics and images to experiment trackers, such as Weights & Biases, through accelerate."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image

from common.cli import UserError, first_line
from common.files import write_file

TRACKER_NAMES = sorted(LOGGER_TYPE_TO_CLASS)
REPEATED_STEPS = "wandb_repeated_steps"  # file of a run with one range of steps per line


def resolve_trackers(report_to: tuple[str, ...]) -> list[str]:
    """Return the names of the trackers to use.

    Raises:
        UserError: A tracker's package is not installed.
    """
    installed = [str(tracker) for tracker in get_available_trackers()]
    if "all" in report_to:
        return installed
    names = [name for name in report_to if name != "none"]
    for name in names:
        if name not in installed:
            raise UserError(f"--report-to {name} needs {name}: pip install {name}")
    return names


@dataclass
class Trackers:
    """The trackers of a run. A tracker that fails is disabled, and training continues.

    Args:
        accelerator: An accelerator whose `log_with` names the trackers, and whose `logging_dir` is
            the folder of their files.
        info: Writes a message to the log.
    """

    accelerator: Accelerator
    info: Callable[[str], None]

    def start(
        self, project: str, folder: Path, config: dict, step: int = 0, last_logged_step: int = 0
    ) -> None:
        """Start the trackers; Weights & Biases resumes the run with the id stored in `folder`.

        After a crash, the steps since the checkpoint are repeated. TensorBoard then hides the
        values of the interrupted session. Weights & Biases keeps them and ignores the new ones, so
        the repeated steps are listed in the config of its run. If there is no checkpoint, the run
        starts again with a new id.

        Args:
            project: Name of the project.
            folder: The run folder; the run in the tracker has the same name.
            config: Settings to record.
            step: Step at which the run is resumed.
            last_logged_step: Last step in metrics.jsonl.

        Raises:
            UserError: A tracker cannot start.
        """
        accelerator = self.accelerator
        if not accelerator.log_with or not accelerator.is_main_process:
            return
        names = list(map(str, accelerator.log_with))
        Path(accelerator.logging_dir).mkdir(parents=True, exist_ok=True)
        options: dict[str, dict[str, Any]] = {}
        has_repeated_steps = last_logged_step > step
        if "tensorboard" in names and has_repeated_steps:
            options["tensorboard"] = {"purge_step": step + 1}
        if "wandb" in names:
            id_file = folder / "wandb_id"
            if not id_file.exists() or (has_repeated_steps and not step):
                write_file(id_file, uuid.uuid4().hex[:8].encode())
            elif has_repeated_steps:
                self._record_repeated_steps(folder, step + 1, last_logged_step)
            if repeated := _read_repeated_steps(folder):
                config = config | {"repeated_steps": repeated}
            options["wandb"] = {
                "name": folder.name,
                "id": id_file.read_text(),
                "dir": accelerator.logging_dir,
                "resume": "allow",
                "config": config,
            }
        try:
            accelerator.init_trackers(project, init_kwargs=options)
            for tracker in accelerator.trackers:
                if tracker.name != "wandb":
                    tracker.store_init_configuration(_flatten(config))
        except Exception as error:  # any package may fail: no API key, no network, ...
            raise UserError(
                f"--report-to {' '.join(names)} cannot start ({first_line(error)}): log in (for "
                "wandb, run wandb login or set WANDB_MODE=offline), or pass --report-to none"
            ) from None

    def _record_repeated_steps(self, folder: Path, first: int, last: int) -> None:
        """Report that Weights & Biases keeps the values of an interrupted session."""
        repeated = [*_read_repeated_steps(folder), f"{first}-{last}"]
        write_file(folder / REPEATED_STEPS, "\n".join(repeated).encode())
        self.info(
            f"steps {first:,} to {last:,} are repeated: wandb keeps the values of the interrupted "
            "session for them and lists them as repeated_steps in its config; metrics.jsonl has "
            "the new values"
        )

    def log(self, values: dict[str, Any], step: int) -> None:
        """Record numbers."""
        numbers = {key: value for key, value in values.items() if value is not None}
        self._call_each(lambda tracker: tracker.log(numbers, step=step))

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Record an image with those trackers that can show images."""

        def record(tracker: Any) -> None:
            if not hasattr(tracker, "log_images"):
                return
            if tracker.name == "tensorboard":
                pixels = np.asarray(Image.open(path).convert("RGB"))
                tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [str(path)]}, step=step)
            else:
                tracker.log_images({name: [Image.open(path)]}, step=step)

        self._call_each(record)

    def close(self) -> None:
        """Wait until the trackers have sent everything."""
        self._call_each(lambda tracker: tracker.finish())
        self.accelerator.trackers = []

    def _call_each(self, function: Callable[[Any], None]) -> None:
        for tracker in list(self.accelerator.trackers):
            try:
                function(tracker)
            except Exception as error:  # noqa: PERF203 (a remote service may raise anything)
                self.accelerator.trackers.remove(tracker)
                self.info(
                    f"--report-to {tracker.name} failed ({first_line(error)}) and is disabled; "
                    "training continues and metrics.jsonl still records everything"
                )


def _read_repeated_steps(folder: Path) -> list[str]:
    """Return the ranges of steps for which Weights & Biases has values of an older session."""
    path = folder / REPEATED_STEPS
    return path.read_text().splitlines() if path.exists() else []


def _flatten(config: dict) -> dict[str, Any]:
    """Convert lists and dicts to text, because most trackers do not accept them."""
    plain = (bool, int, float, str)
    return {key: value if isinstance(value, plain) else str(value) for key, value in config.items()}
