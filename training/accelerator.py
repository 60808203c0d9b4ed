"""Create the accelerator, and check that accelerate's environment does not contradict the flags."""

import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, DynamoBackend

from common.cli import UserError
from common.processes import connecting_processes, read_process_environment
from training.config import Settings
from training.coordination import get_collective_timeout
from training.trackers import resolve_trackers

# Variables that `accelerate launch` sets from its config file, and what they enable.
UNSUPPORTED_VARIABLES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
SUPPORTED_TYPES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def create_accelerator(settings: Settings) -> Accelerator:
    """Create the accelerator and connect the processes.

    Raises:
        UserError: The environment variables of a launcher are incomplete, or accelerate would not
            train as the flags specify.
    """
    environment = read_process_environment()
    for name, feature in UNSUPPORTED_VARIABLES.items():
        if os.environ.get(name, "").lower() in ("true", "1"):
            raise _make_error(f"enables {feature}, which train.py does not support")
    precision = settings.device.mixed_precision
    with connecting_processes(environment):
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=precision,
            log_with=resolve_trackers(settings.log.report_to) or None,
            project_dir=settings.run.folder,
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True, broadcast_buffers=False
                ),
                InitProcessGroupKwargs(timeout=get_collective_timeout(settings.device)),
            ],
        )
    check_accelerator(accelerator, precision, environment.num_processes)
    return accelerator


def check_accelerator(accelerator: Accelerator, precision: str, num_processes: int) -> None:
    """Check that the accelerator would train as the flags specify.

    Args:
        accelerator: The accelerator.
        precision: Mixed precision according to the flags: no, fp16 or bf16.
        num_processes: Number of processes that the launcher started.

    Raises:
        UserError: A setting of accelerate's environment or config file contradicts the flags.
    """
    if accelerator.distributed_type not in SUPPORTED_TYPES:
        kind = accelerator.distributed_type.value
        raise _make_error(f"selects {kind}, which train.py does not support")
    dynamo_backend = accelerator.state.dynamo_plugin.backend
    if dynamo_backend != DynamoBackend.NO:
        raise _make_error(f"selects the dynamo backend {dynamo_backend.value}; use --compile")
    accumulation = accelerator.gradient_accumulation_steps
    if accumulation != 1:
        raise _make_error(
            f"sets {accumulation} gradient accumulation steps, which would divide the gradients; "
            "use --gradient-accumulation-steps"
        )
    if accelerator.mixed_precision != precision:
        raise _make_error(
            f"selects the precision {accelerator.mixed_precision}, but --mixed-precision is "
            f"{precision}"
        )
    if accelerator.num_processes < num_processes:
        raise _make_error(
            f"results in {accelerator.num_processes} of {num_processes} processes (LOCAL_RANK "
            "may be missing)"
        )


def _make_error(problem: str) -> UserError:
    return UserError(
        f"accelerate's environment or config file {problem}: unset the ACCELERATE_* variables, or "
        "start train.py with torchrun"
    )
