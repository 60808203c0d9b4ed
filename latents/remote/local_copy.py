"""Copy files from a URL to a local folder, once per machine. An interrupted copy is continued.

FILE             a complete file, whose sha256 has been checked
.FILE.partial    the first bytes of a file
.lock            locked by the process that copies
"""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError
from common.files import fsync, lock, sha256
from common.progress import ProgressBar
from common.watchdog import waiting_for
from latents.manifest import CacheError
from latents.remote.files import Download, RemoteFiles, Retries, ShortFileError, TransientError

NUM_THREADS = 8  # files that are copied at a time
RESERVED_BYTES = 1e9  # free space that a copy leaves on the disk
STOP_SECONDS = 5.0  # after a stop signal; the copy is continued when the command is rerun
LOCK_SECONDS = 0.2  # interval at which a process checks whether another one has copied the files


def resolve_local_cache(text: str) -> Path | None:
    """Return the folder that --local-cache selects, or None to make no copies.

    Args:
        text: A folder, "none", or "auto" for a folder on the disk of this machine.

    Raises:
        UserError: The default folder belongs to another user.
    """
    if text == "none":
        return None
    if text != "auto":
        return Path(text)
    if scratch := os.environ.get("SLURM_TMPDIR"):
        return Path(scratch) / "latents"
    folder = Path(tempfile.gettempdir()) / f"latents-{os.getuid()}"
    with naming_folder(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user; pass another folder to --local-cache")
    return folder


@contextmanager
def naming_folder(folder: Path) -> Iterator[None]:
    """Raise a CacheError that names --local-cache if the block cannot write to a folder.

    Raises:
        CacheError: The block has raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"{folder} cannot be written ({error.strerror}); free some space, pass another "
            "folder to --local-cache, or pass --local-cache none to make no copy"
        ) from None


@dataclass(frozen=True)
class RemoteFile:
    """A file to copy.

    Attributes:
        name: Path of the file relative to the URL.
        num_bytes: Its size; an estimate is sufficient.
        sha256: Its hash, or None if it is unknown.
    """

    name: str
    num_bytes: int
    sha256: str | None


class LocalCopy:
    """A local folder with copies of the files under a URL.

    Args:
        files: The files under the URL.
        folder: The local folder.
    """

    def __init__(self, files: RemoteFiles, folder: Path):
        self.files = files
        self.folder = folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the folder, after waiting for a process that copies files to it."""
        description = f"another process to copy {self.files.url} to {self.folder}"
        with ExitStack() as stack:
            with waiting_for(description, STOP_SECONDS):
                while not self._try_lock(stack):
                    time.sleep(LOCK_SECONDS)
            yield

    def _try_lock(self, stack: ExitStack) -> bool:
        with naming_folder(self.folder):
            try:
                stack.enter_context(lock(self.folder / ".lock"))
            except BlockingIOError:
                return False
        return True

    def list_missing(self, remote_files: list[RemoteFile]) -> list[RemoteFile]:
        """Return the files that have not been copied completely."""
        return [file for file in remote_files if not (self.folder / file.name).exists()]

    def count_missing_bytes(self, remote_files: list[RemoteFile]) -> int:
        """Return the number of bytes that a copy of the files still needs."""
        num_bytes = 0
        for file in self.list_missing(remote_files):
            num_bytes += max(0, file.num_bytes - _get_size(self._get_partial_path(file.name)))
        return num_bytes

    def get_free_bytes(self) -> float:
        """Return the number of bytes that copies may use."""
        return max(0.0, shutil.disk_usage(self.folder).free - RESERVED_BYTES)

    def copy(self, remote_files: list[RemoteFile]) -> None:
        """Copy the missing files, and check their sha256. Call this with the lock.

        Raises:
            CacheError: A file cannot be read or written, or its sha256 is wrong.
        """
        missing = self.list_missing(remote_files)
        num_present = sum(_get_size(self._get_partial_path(file.name)) for file in missing)
        progress = ProgressBar(
            total=num_present + self.count_missing_bytes(missing),
            initial=num_present,
            unit="B",
            unit_scale=True,
            desc=f"copying {self.files.url}",
        )
        transfer = _Transfer(self.files, progress, threading.Event())
        with progress, waiting_for(f"the copy of {self.files.url}", STOP_SECONDS):
            pool = ThreadPoolExecutor(NUM_THREADS, "copy")
            futures = [pool.submit(self._copy_file, file, transfer) for file in missing]
            try:
                for future in as_completed(futures):
                    future.result()
            finally:
                # After an error or Ctrl-C, the other threads end within a chunk.
                transfer.stop.set()
                pool.shutdown(cancel_futures=True)

    def _copy_file(self, file: RemoteFile, transfer: "_Transfer") -> None:
        path = self.folder / file.name
        partial = self._get_partial_path(file.name)
        with naming_folder(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            is_valid = False
            while not is_valid:
                was_continued = partial.exists()
                transfer.download(file.name, partial)
                is_valid = file.sha256 in (None, sha256(partial))
                if not is_valid:
                    partial.unlink()
                if not is_valid and not was_continued:
                    raise CacheError(
                        f"{self.files.format_url(file.name)} does not have the sha256 that the "
                        "manifest states: it is damaged, or has changed; check the original with "
                        "python -m preprocessing.verify, and rerun the same command"
                    )
            fsync(partial)
            partial.replace(path)

    def _get_partial_path(self, name: str) -> Path:
        path = self.folder / name
        return path.with_name(f".{path.name}.partial")


class _StoppedError(Exception):
    """The copy was interrupted."""


@dataclass(frozen=True)
class _Transfer:
    """Downloads files in several threads.

    Attributes:
        files: The files under the URL.
        progress: The progress bar, in bytes.
        stop: Makes all threads stop.
    """

    files: RemoteFiles
    progress: ProgressBar
    stop: threading.Event

    def download(self, name: str, partial: Path) -> None:
        """Download a file, or the rest of a partial file, and retry after transient errors."""
        retries = Retries(self.files.format_url(name), sleep=self.stop.wait)
        is_complete = False
        while not is_complete:
            with retries.attempt():
                self._continue(name, partial, retries)
                is_complete = True

    def _continue(self, name: str, partial: Path, retries: Retries) -> None:
        """Append the missing bytes to a partial file in one request."""
        # Request the last byte again, because a range that starts at the end of a file is invalid.
        size = _get_size(partial)
        download = self._request(name, partial, max(0, size - 1))
        with partial.open("r+b" if partial.exists() else "wb") as file:
            file.truncate(download.start)  # to 0 if the server does not support ranges
            file.seek(download.start)
            self.progress.update(download.start - size)
            for chunk in download.chunks:
                if self.stop.is_set():
                    raise _StoppedError
                file.write(chunk)
                self.progress.update(len(chunk))
                retries.reset()
            if download.file_size not in (None, file.tell()):
                raise TransientError(f"the connection ended after {file.tell()} bytes")

    def _request(self, name: str, partial: Path, start: int) -> Download:
        if self.stop.is_set():
            raise _StoppedError
        try:
            return self.files.download(name, start)
        except ShortFileError:
            partial.unlink()  # it is part of a longer file, which has been replaced
            raise
        except FileNotFoundError:
            raise CacheError(
                f"{self.files.format_url(name)} does not exist, but the manifest lists it; upload "
                "the cache again"
            ) from None


def _get_size(path: Path) -> int:
    """Return the size of a file, or 0 if it does not exist."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
