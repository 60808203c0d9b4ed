"""Load items in worker processes. A worker that fails ends the command instead of blocking it.

torch's DataLoader alone would wait forever for an item that a worker could not send, for example
because /dev/shm was full, and for workers that ignore signals when the command exits.
"""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset, get_worker_info

from common.cli import UserError
from common.watchdog import waiting_for

Index = TypeVar("Index")
Item = TypeVar("Item")

# Seconds after a stop signal until a wait for an item ends the process.
STOP_SECONDS = 20.0


@dataclass(frozen=True)
class Loader(Generic[Index, Item]):
    """Loads items in order, in worker processes or in this process.

    Args:
        load: Function that returns the item of an index.
        description: Description of the items for messages, such as "images of --source".
        num_workers: Number of worker processes; 0 loads in this process.
        pin_memory: Whether to call the method `pin_memory` of the items in this process.
        worker_init: Function that each worker calls with its number.
    """

    load: Callable[[Index], Item]
    description: str
    num_workers: int = 0
    pin_memory: bool = False
    worker_init: Callable[[int], None] | None = None

    def iterate(self, indices: Sequence[Index]) -> Generator[Item, None, None]:
        """Yield the items of the indices. Close the generator to end the workers.

        Raises:
            UserError: `load` raised it, a worker was killed, or an item could not be sent.
        """
        loader: DataLoader[Any] = DataLoader(
            _Items(self.load, self.description),
            batch_size=None,
            sampler=indices,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=self.worker_init,
        )
        other_processes = set(multiprocessing.active_children())
        with _preserve_sigchld_handler():
            items = iter(loader)
        workers = set(multiprocessing.active_children()) - other_processes
        try:
            while (item := self._wait_for_item(items, workers)) is not None:
                yield item
        finally:
            if workers:
                _end_workers(items, workers)

    def _wait_for_item(self, items: Iterator[Any], workers: set[BaseProcess]) -> Any:
        """Return the next item, or None at the end."""
        try:
            with waiting_for(self.description, STOP_SECONDS):
                item = next(items, None)
                if isinstance(item, _PackedItem):
                    item = item.unpack()
        except (RuntimeError, OSError, EOFError):
            # A process that is ending closes its connections first.
            connection.wait([worker.sentinel for worker in workers], timeout=1)
            exit_codes = [worker.exitcode for worker in workers if worker.exitcode]
            if not exit_codes:
                raise
            reason = f"exit code {exit_codes[0]}"
            if exit_codes[0] < 0:
                reason = f"killed by {signal.Signals(-exit_codes[0]).name}"
            raise UserError(
                f"a worker process for {self.description} died ({reason}); rerun the same "
                "command with a smaller --num-workers to use less memory"
            ) from None
        if isinstance(item, UserError):
            raise item
        return item


@contextmanager
def _preserve_sigchld_handler() -> Iterator[None]:
    """Restore the handler of SIGCHLD, which the first DataLoader with workers replaces.

    The handler of the DataLoader raises an error for a killed worker at any point of the main
    thread, for example in a training step. The next wait for an item also detects killed workers.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)


@dataclass(frozen=True)
class _PackedItem:
    """A pickled item, which is sent to the main process. Its tensors are in shared memory.

    The DataLoader pickles items in a thread, and an item is lost if pickling fails. A packed item
    contains only bytes, for which pickling does not fail.
    """

    content: bytes

    @classmethod
    def pack(cls, item: Any) -> "_PackedItem":
        """Move the tensors to shared memory.

        Raises:
            OSError, RuntimeError: There is not enough memory, or too many files are open.
        """
        return cls(bytes(ForkingPickler.dumps(item)))

    def unpack(self) -> Any:
        """Return the item; call this once, in the main process, while the worker is running."""
        return ForkingPickler.loads(self.content)

    def pin_memory(self) -> Any:
        """Return the pinned item; called by the DataLoader in a thread of the main process."""
        return self.unpack().pin_memory()


class _Items(Dataset):
    """Loads items. Returns a UserError as an item, because the DataLoader would add a traceback."""

    def __init__(self, load: Callable[[Any], Any], description: str):
        self.load = load
        self.description = description

    def __getitem__(self, index: Any) -> Any:
        try:
            item = self.load(index)
        except UserError as error:
            return error
        if get_worker_info() is None:
            return item
        try:
            return _PackedItem.pack(item)
        except (OSError, RuntimeError) as error:
            return UserError(
                f"a worker process cannot send {self.description} ({error}); free space in "
                "/dev/shm, raise the limit on open files (ulimit -n), or pass --num-workers 0"
            )


def _end_workers(items: Iterator[Any], workers: set[BaseProcess]) -> None:
    """End the workers, even if they ignore signals or are blocked.

    Deleting the iterator would not end them while an exception refers to it, and the interpreter
    waits for all workers when it exits.
    """
    items._shutdown_workers()  # type: ignore[attr-defined]  # there is no public method
    for worker in workers:
        worker.kill()
