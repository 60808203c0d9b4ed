"""Select whether GPUs use TF32 for float32 matrix products and convolutions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

BACKENDS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)


def set_tf32(is_allowed: bool) -> None:
    """Set whether matrix products and convolutions may use TF32."""
    for backend in BACKENDS:
        backend.allow_tf32 = is_allowed


@contextmanager
def no_tf32() -> Iterator[None]:
    """Disable TF32 for matrix products and convolutions in this context."""
    previous = [backend.allow_tf32 for backend in BACKENDS]
    try:
        set_tf32(False)
        yield
    finally:
        for backend, is_allowed in zip(BACKENDS, previous):
            backend.allow_tf32 = is_allowed
