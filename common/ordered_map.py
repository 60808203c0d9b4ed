"""Apply a function to items in a pool of threads, and return the results in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from common.cli import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    max_pending: int,
) -> Iterator[Result]:
    """Apply a function to items in a pool of threads, and yield the results in order.

    If `items` raises UserError, the results of all earlier items are yielded first.

    Args:
        pool: Threads that call the function.
        function: Function of one item.
        items: Items; consumed in the thread of the caller.
        max_pending: Maximum number of submitted items whose results have not been yielded.
    """

    def submit_all() -> Iterator[Future[Result]]:
        try:
            for item in items:
                yield pool.submit(function, item)
        except UserError as error:
            failed_future: Future[Result] = Future()
            failed_future.set_exception(error)
            yield failed_future

    pending: deque[Future[Result]] = deque()
    for future in submit_all():
        pending.append(future)
        if len(pending) > max_pending:
            yield pending.popleft().result()
    for future in pending:
        yield future.result()
