"""Test the functions that set whether GPUs use TF32."""

import contextlib

import pytest
import torch

from common.tf32 import no_tf32, set_tf32

BACKENDS = (torch.backends.cuda.matmul, torch.backends.cudnn)


def read_flags():
    return [backend.allow_tf32 for backend in BACKENDS]


@pytest.fixture(autouse=True)
def restore_flags():
    before = read_flags()
    yield
    for backend, is_allowed in zip(BACKENDS, before):
        backend.allow_tf32 = is_allowed


def test_set_tf32_sets_matrix_products_and_convolutions():
    for is_allowed in (True, False):
        set_tf32(is_allowed)
        assert read_flags() == [is_allowed, is_allowed]


def test_no_tf32_restores_the_previous_settings_after_an_exception():
    for flags in ([True, True], [False, True]):
        for backend, is_allowed in zip(BACKENDS, flags):
            backend.allow_tf32 = is_allowed
        with contextlib.suppress(KeyError), no_tf32():
            assert read_flags() == [False, False]
            raise KeyError
        assert read_flags() == flags
