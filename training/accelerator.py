"""Create the accelerator, which connects the processes."""

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration

from common.processes import connecting_processes, read_process_environment
from training.config import Settings
from training.coordination import SLOW_TIMEOUT, get_collective_timeout
from training.launcher import check_accelerator, check_launcher
from training.rank_check import check_processes
from training.trackers import resolve_trackers


def create_accelerator(settings: Settings) -> Accelerator:
    """Create the accelerator and connect the processes.

    Raises:
        UserError: The environment variables of a launcher are incomplete, accelerate would not
            train as the flags specify, or the processes differ from each other.
    """
    environment = read_process_environment()
    precision = settings.device.mixed_precision
    check_launcher(precision)
    # The store is kept until the processes have connected, because the first process serves it.
    store = check_processes(environment, settings, SLOW_TIMEOUT)
    with connecting_processes(environment):
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=precision,
            log_with=resolve_trackers(settings.log.report_to) or None,
            project_config=ProjectConfiguration(
                project_dir=str(settings.run.folder), logging_dir=str(settings.tracker_folder)
            ),
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True, broadcast_buffers=False
                ),
                InitProcessGroupKwargs(timeout=get_collective_timeout(settings.device)),
            ],
        )
    del store
    check_accelerator(accelerator, environment.num_processes)
    return accelerator
