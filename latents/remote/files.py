"""Read files under a URL, whole or as byte ranges, and retry after transient errors."""

import errno
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from latents.manifest import CacheError

NUM_CONNECTIONS = 16  # concurrent requests of a process

MAX_ATTEMPTS = 12  # with the delays below, a server may be down for about two minutes
FIRST_DELAY = 0.5  # seconds before the second attempt; doubled for each further one
MAX_DELAY = 30.0


class TransientError(Exception):
    """A read failed, but may succeed if it is repeated."""


class ShortFileError(TransientError):
    """The requested range begins after the end of the file."""


@dataclass(frozen=True)
class Download:
    """A download in progress.

    Attributes:
        start: Position of the first byte.
        file_size: Size of the whole file, or None if the server does not state it.
        is_range: Whether these are the requested bytes; False if the server has ignored the range
            and sends the whole file.
        chunks: The bytes. Raises TransientError if the connection fails.
    """

    start: int
    file_size: int | None
    is_range: bool
    chunks: Iterator[bytes]


class Retries:
    """Waits between the attempts of a read.

    Args:
        url: The file, for the error message.
        max_attempts: Number of attempts.
        sleep: Function that waits for a number of seconds.
    """

    def __init__(
        self,
        url: str,
        max_attempts: int = MAX_ATTEMPTS,
        sleep: Callable[[float], Any] = time.sleep,
    ):
        self.url = url
        self.max_attempts = max_attempts
        self.sleep = sleep
        self.num_failures = 0

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Run the block, and wait before the next attempt if it raises TransientError.

        Raises:
            CacheError: This was the last attempt.
        """
        try:
            yield
        except TransientError as error:
            self._wait(error)

    def _wait(self, error: TransientError) -> None:
        self.num_failures += 1
        if self.num_failures == self.max_attempts:
            raise CacheError(
                f"{self.url} cannot be read after {self.num_failures} attempts ({error}); check "
                "the URL and the network, and rerun the same command"
            ) from None
        delay = min(MAX_DELAY, FIRST_DELAY * 2 ** (self.num_failures - 1))
        # The delay is random, so that many processes do not repeat their requests at once.
        self.sleep(delay * random.uniform(0.5, 1.0))

    def reset(self) -> None:
        """Restore the number of attempts after some progress."""
        self.num_failures = 0


class RemoteFiles(ABC):
    """The files under a URL. Objects can be pickled, and used after a fork.

    Args:
        url: URL of the folder.

    Attributes:
        url: URL of the folder, without a slash at the end.

    Raises:
        CacheError: The URL is invalid or contains a password.
    """

    def __init__(self, url: str):
        _check_url(url)
        self.url = url.rstrip("/")
        self._connections: tuple[int, ThreadPoolExecutor, Any] | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_connections": None}

    def format_url(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.url}/{name}"

    @abstractmethod
    def download(self, name: str, start: int = 0, stop: int | None = None) -> Download:
        """Request bytes start to stop - 1 of a file, by default until its end. Do not retry.

        Raises:
            TransientError: The request failed, but may succeed if it is repeated.
            FileNotFoundError: The file does not exist.
            CacheError: The file cannot be read, or has changed since it was first read.
        """

    @abstractmethod
    def list_folders(self, name: str) -> list[str]:
        """Return the names of the folders in a folder, or [] if they cannot be listed."""

    @abstractmethod
    def _connect(self) -> Any:
        """Return an object that this process uses for its requests."""

    def request(self, name: str, start: int, stop: int) -> "PendingRead":
        """Request a range of a file in the background."""
        pool, _ = self._get_connections()
        return PendingRead(self, name, start, stop, pool.submit(self._read_once, name, start, stop))

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> tuple[bytes, int]:
        """Read bytes start to stop - 1 of a file, by default until its end.

        Returns:
            The bytes, which are fewer if the file ends earlier, and the size of the file.

        Raises:
            FileNotFoundError: The file does not exist.
            CacheError: The file cannot be read.
        """
        retries = Retries(self.format_url(name), max_attempts)
        while True:
            with retries.attempt():
                return self._read_once(name, start, stop)

    def _read_once(self, name: str, start: int, stop: int | None) -> tuple[bytes, int]:
        try:
            download = self.download(name, start, stop)
        except ShortFileError:
            if start == 0:
                return b"", 0  # HTTP has no valid range in an empty file
            raise make_changed_error(self.format_url(name)) from None
        if stop is not None and not download.is_range:
            raise CacheError(
                f"{self.format_url(name)}: the server does not support requests for ranges of "
                "bytes; copy the cache by passing a folder with enough free space to --local-cache"
            )
        content = b"".join(download.chunks)
        file_size = start + len(content) if download.file_size is None else download.file_size
        num_expected = (file_size if stop is None else min(stop, file_size)) - start
        if len(content) != num_expected:
            raise TransientError(f"{len(content)} instead of {num_expected} bytes were received")
        return content, file_size

    def _get_connections(self) -> tuple[ThreadPoolExecutor, Any]:
        """Return the threads and the connections of this process, which a fork does not inherit."""
        if self._connections is None or self._connections[0] != os.getpid():
            pool = ThreadPoolExecutor(NUM_CONNECTIONS, "remote-read")
            self._connections = (os.getpid(), pool, self._connect())
        return self._connections[1:]

    def _make_missing_error(self, name: str) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, "No such file", self.format_url(name))


@dataclass(frozen=True)
class PendingRead:
    """A range of a file that was requested in the background."""

    files: RemoteFiles
    name: str
    start: int
    stop: int
    future: Future[tuple[bytes, int]]

    def wait(self) -> bytes:
        """Return the bytes. Further attempts are made here, so that Ctrl-C interrupts them.

        Raises:
            FileNotFoundError: The file does not exist.
            CacheError: The file cannot be read.
        """
        try:
            content, _ = self.future.result()
        except TransientError:
            content, _ = self.files.read(self.name, self.start, self.stop)
        return content


def _check_url(url: str) -> None:
    """Refuse URLs with secrets, because logs and args.json would record them, or with a query."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise CacheError(f"the URL is invalid ({error})") from None
    is_http = parts.scheme in ("http", "https")
    if parts.password is not None or (is_http and parts.username is not None):
        remedy = "write them to fsspec's configuration in ~/.config/fsspec"
        if is_http:
            remedy = "write them to ~/.netrc"
        raise CacheError(
            f"the URL for {parts.hostname} contains credentials, which logs would record; {remedy}"
        )
    if is_http and (parts.query or parts.fragment):
        raise CacheError(
            f"the URL for {parts.hostname} contains ? or #, but the names of files are appended to "
            "it; pass the URL of the folder alone"
        )


def make_changed_error(url: str) -> CacheError:
    """Return the error for a file that has changed while it was in use."""
    return CacheError(f"{url} has changed since it was first read; rerun the same command")
