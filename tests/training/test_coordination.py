"""Test the time limits of collectives, and the exchange of objects."""

from datetime import timedelta

import pytest

from training.config import DeviceConfig
from training.coordination import (
    SLOW_TIMEOUT,
    broadcast_object,
    gather_objects,
    get_collective_timeout,
)


@pytest.mark.parametrize("minutes", [10.0, 300.0])
def test_limit_of_pytorch_exceeds_that_of_steps_that_compile(minutes):
    config = DeviceConfig(compile=True, collective_timeout=minutes)
    assert get_collective_timeout(config) > max(SLOW_TIMEOUT, timedelta(minutes=minutes))
    config = DeviceConfig(collective_timeout=minutes)
    assert timedelta(minutes=minutes) < get_collective_timeout(config) < timedelta(hours=6)


def test_one_process_exchanges_objects_with_itself():
    assert gather_objects("a") == ["a"]
    assert broadcast_object("a", "nothing") == "a"
