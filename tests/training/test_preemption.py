import signal

import pytest

from common.cli import UserError
from training.preemption import STOP_SIGNALS, stop_on_signal


@pytest.fixture(autouse=True)
def restore_handlers():
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_signals_are_recorded_and_then_handled_as_before():
    previous = signal.getsignal(signal.SIGTERM)
    with stop_on_signal() as request:
        signal.raise_signal(signal.SIGTERM)
    assert request.name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == previous


@pytest.mark.parametrize("error", [SystemExit(2), UserError("the run is locked")])
def test_signals_do_not_kill_a_process_that_is_about_to_exit_with_an_error(error):
    with pytest.raises(type(error)), stop_on_signal():
        raise error
    for number in STOP_SIGNALS:
        signal.raise_signal(number)
