"""Test that settings of accelerate that contradict the flags are refused.

The environment variables are those of accelerate's own launcher, for its flags and config file.
"""

import os
from types import SimpleNamespace

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

import train
from common.cli import UserError
from tests.helpers import train_flags
from training.launcher import check_accelerator, check_launcher


def launcher_environment(*flags: str) -> dict[str, str]:
    """Return the variables that `accelerate launch` sets for a script on two GPUs."""
    launch_flags = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "29501"]
    args = launch_command_parser().parse_args([*launch_flags, *flags, "train.py"])
    args, _, _ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""  # launch_command sets it later
        environment = prepare_deepspeed_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args)
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}


def write_config(folder, *lines: str) -> str:
    """Write a config file of accelerate, and return its path."""
    path = folder / "accelerate.yaml"
    shared = "compute_environment: LOCAL_MACHINE\nnum_machines: 1\nnum_processes: 2\n"
    path.write_text(shared + "\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("flags", "problem", "remedy"),
    [
        (["--use_fsdp"], "enables its FSDP", "--shard full"),
        (["--use_deepspeed"], "enables DeepSpeed", "--shard full"),
        (["--use_megatron_lm"], "enables Megatron-LM", "--shard full"),
        (
            ["--multi_gpu", "--dynamo_backend", "inductor"],
            "selects the dynamo backend inductor",
            "--compile",
        ),
        (
            ["--multi_gpu", "--mixed_precision", "fp16"],
            "selects the precision fp16",
            "--mixed-precision",
        ),
    ],
)
def test_flags_of_the_launcher_are_refused(flags, problem, remedy):
    with pytest.raises(UserError) as error:
        check_launcher("bf16", launcher_environment(*flags))
    assert f"accelerate's launcher or config file {problem}" in str(error.value)
    assert f"pass {remedy} to train.py instead" in str(error.value)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["distributed_type: FSDP", "fsdp_config:", "  fsdp_version: 2"], "enables its FSDP"),
        (["distributed_type: DEEPSPEED", "deepspeed_config:", "  zero_stage: 2"], "DeepSpeed"),
        (["distributed_type: MULTI_GPU", "mixed_precision: fp16"], "the precision fp16"),
        (
            ["distributed_type: MULTI_GPU", "dynamo_config:", "  dynamo_backend: INDUCTOR"],
            "the dynamo backend inductor",
        ),
    ],
)
def test_config_files_of_accelerate_are_refused(tmp_path, lines, problem):
    environment = launcher_environment("--config_file", write_config(tmp_path, *lines))
    with pytest.raises(UserError, match=problem):
        check_launcher("bf16", environment)


def test_parallelism_config_is_refused():
    """The launcher accepts it only together with FSDP, but the variable may be set directly."""
    with pytest.raises(UserError, match=r"enables a parallelism config, .* pass --shard hybrid"):
        check_launcher("bf16", {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"})


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_launcher_without_further_settings_is_accepted(precision):
    # check_launcher returns nothing; it raises an error for settings that it refuses.
    check_launcher(precision, launcher_environment("--multi_gpu"))
    check_launcher(precision, launcher_environment("--multi_gpu", "--mixed_precision", precision))


def test_gradient_accumulation_of_accelerate_is_refused_before_the_run_folder_is_created(
    call, cache, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    code, out = call(train, *train_flags(cache, tmp_path, "run"))
    assert code == 2 and "pass --gradient-accumulation-steps 4 to train.py" in out, out
    assert out.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distributed_type": DistributedType.MULTI_XPU}, "selects MULTI_XPU"),
        ({"num_processes": 1}, "uses 1 of 2 processes"),
    ],
)
def test_devices_and_processes_of_accelerate_are_checked(changes, message):
    expected = {"distributed_type": DistributedType.MULTI_GPU, "num_processes": 2}
    check_accelerator(SimpleNamespace(**expected), 2)
    with pytest.raises(UserError, match=message):
        check_accelerator(SimpleNamespace(**expected | changes), 2)
