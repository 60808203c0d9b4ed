"""Refuse settings of accelerate's launcher or config file that contradict the flags of train.py.

`accelerate launch` passes its settings to the training processes as environment variables. They
are checked before `Accelerator` reads them, because it imports DeepSpeed, for example, as soon as
a variable selects it.
"""

import os
from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.utils import DistributedType

from common.cli import UserError

# Variable of `accelerate launch` -> what it enables, and what to pass to train.py instead.
UNSUPPORTED_VARIABLES = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "--shard full"),
    "ACCELERATE_USE_FSDP": ("its FSDP", "--shard full"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "--shard full"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism config", "--shard hybrid"),
}
SUPPORTED_TYPES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
# Values of a dynamo backend or a precision that contradict no flag. `accelerate launch` also sets
# the precision "no" if the user has not selected one.
UNSET_VALUES = ("", "no")


def check_launcher(precision: str, environment: Mapping[str, str] = os.environ) -> None:
    """Check the environment variables of accelerate's launcher.

    Args:
        precision: Mixed precision according to the flags: no, fp16 or bf16.
        environment: The environment variables.

    Raises:
        UserError: A variable enables something that train.py does not support, or contradicts a
            flag.
    """
    for name, (feature, flag) in UNSUPPORTED_VARIABLES.items():
        if environment.get(name, "").lower() in ("true", "1"):
            raise _make_launcher_error(f"enables {feature}, which train.py does not use", flag)
    dynamo_backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "").lower()
    if dynamo_backend not in UNSET_VALUES:
        raise _make_launcher_error(f"selects the dynamo backend {dynamo_backend}", "--compile")
    accumulation = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise _make_launcher_error(
            f"sets {accumulation} gradient accumulation steps, which would divide the gradients",
            f"--gradient-accumulation-steps {accumulation}",
        )
    launcher_precision = environment.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if launcher_precision not in (*UNSET_VALUES, precision):
        raise _make_launcher_error(
            f"selects the precision {launcher_precision}, but --mixed-precision is {precision} "
            "(auto is bf16 on GPUs that support it, otherwise no)",
            "--mixed-precision",
        )


def check_accelerator(accelerator: Accelerator, num_processes: int) -> None:
    """Check that accelerate has selected the devices and processes that train.py expects.

    Args:
        accelerator: The accelerator.
        num_processes: Number of processes that the launcher started.

    Raises:
        UserError: Accelerate has selected something else.
    """
    if accelerator.distributed_type not in SUPPORTED_TYPES:
        raise UserError(
            f"accelerate selects {accelerator.distributed_type.value}, but train.py trains on CUDA "
            "GPUs or CPUs: unset the ACCELERATE_* variables, or start train.py with torchrun"
        )
    if accelerator.num_processes < num_processes:
        raise UserError(
            f"accelerate uses {accelerator.num_processes} of {num_processes} processes: set "
            "LOCAL_RANK, as torchrun and accelerate launch do"
        )


def _make_launcher_error(problem: str, flag: str) -> UserError:
    """Return the error for a setting of accelerate.

    Args:
        problem: What the setting does.
        flag: Flag of train.py to use instead.
    """
    return UserError(
        f"accelerate's launcher or config file {problem}: pass {flag} to train.py instead, and "
        "remove the setting from accelerate (or start train.py with torchrun)"
    )
