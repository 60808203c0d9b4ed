"""Test that settings of accelerate that contradict the flags are refused."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType, DynamoBackend

import train
from common.cli import UserError
from tests.helpers import train_flags
from training.accelerator import check_accelerator


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "sets 4 gradient accumulation steps, which would divide the gradients; use --gradient",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, "enables FSDP, which train.py does not support"),
        ({"ACCELERATE_USE_DEEPSPEED": "True"}, "enables DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "enables Megatron-LM"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "selects the dynamo backend INDUCTOR"),
    ],
)
def test_settings_of_accelerate_that_contradict_the_flags_are_refused(
    call, cache, tmp_path, monkeypatch, variables, message
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, out = call(train, *train_flags(cache, tmp_path, "run"))
    assert code == 2 and f"error: accelerate's environment or config file {message}" in out, out
    assert out.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_precision_of_the_flags_replaces_that_of_accelerate(call, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    flags = train_flags(cache, tmp_path, "run", "--max-train-steps", 1)
    code, out = call(train, *flags, "--mixed-precision", "no")
    assert code == 0 and "precision no" in out


def test_state_of_accelerate_is_compared_with_the_flags():
    class State:
        dynamo_plugin = type("Plugin", (), {"backend": DynamoBackend.NO})

    accelerator = SimpleNamespace(
        distributed_type=DistributedType.MULTI_GPU,
        state=State,
        gradient_accumulation_steps=1,
        mixed_precision="bf16",
        num_processes=2,
    )
    check_accelerator(accelerator, "bf16", 2)
    for changes, message in (
        ({"distributed_type": DistributedType.FSDP}, "selects FSDP"),
        ({"mixed_precision": "no"}, "precision no, but --mixed-precision is bf16"),
        ({"num_processes": 1}, "results in 1 of 2 processes"),
    ):
        changed = SimpleNamespace(**vars(accelerator) | changes)
        with pytest.raises(UserError, match=message):
            check_accelerator(changed, "bf16", 2)
