"""Read files from object stores and other storage with fsspec.

fsspec needs a further package for most protocols, such as s3fs for s3:// and gcsfs for gs://.
"""

from collections.abc import Callable
from typing import Any

from common.cli import describe_read_error
from latents.manifest import CacheError
from latents.remote.files import Download, RemoteFiles, ShortFileError, TransientError

BLOCK_BYTES = 8 << 20  # a file is read in blocks of this size
# Protocol -> the package that fsspec needs for it.
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
# Errors after which a read is not repeated.
PERMANENT_ERRORS = (PermissionError, IsADirectoryError, NotImplementedError, ValueError, TypeError)


class FsspecFiles(RemoteFiles):
    """Files of any storage that fsspec supports.

    Raises:
        CacheError: The package for the protocol is not installed, or the protocol is unknown.
    """

    def __init__(self, url: str):
        super().__init__(url)
        self._sizes: dict[str, int] = {}
        self._get_connections()  # raises an error if the package is missing

    def _connect(self) -> tuple[Any, str]:
        import fsspec

        protocol = self.url.partition("://")[0]
        try:
            return fsspec.core.url_to_fs(self.url)
        except ImportError:
            package = PACKAGES.get(protocol, f"fsspec[{protocol}]")
            raise CacheError(
                f"{self.url}: {protocol}:// requires a further package; install it with "
                f"pip install {package}"
            ) from None
        except Exception as error:
            reason = describe_read_error(error)
            raise CacheError(f"{self.url} cannot be opened ({reason})") from None

    def download(self, name: str, start: int = 0, stop: int | None = None) -> Download:
        """Request a range of a file (see RemoteFiles)."""
        _, (file_system, root) = self._get_connections()
        path = f"{root}/{name}"
        if name not in self._sizes:
            self._sizes[name] = self._call(name, file_system.info, path)["size"]
        file_size = self._sizes[name]
        if start > file_size:
            raise ShortFileError(f"the file has only {file_size} bytes")
        end = file_size if stop is None else min(stop, file_size)
        chunks = (
            self._call(name, file_system.cat_file, path, begin, min(begin + BLOCK_BYTES, end))
            for begin in range(start, end, BLOCK_BYTES)
        )
        return Download(start, file_size, True, chunks)

    def list_folders(self, name: str) -> list[str]:
        """Return the names of the folders (see RemoteFiles)."""
        _, (file_system, root) = self._get_connections()
        try:
            entries = self._call(name, file_system.ls, f"{root}/{name}", detail=True)
        except (FileNotFoundError, TransientError):
            return []
        folders = [entry["name"] for entry in entries if entry["type"] == "directory"]
        return sorted(folder.rstrip("/").rpartition("/")[2] for folder in folders)

    def _call(self, name: str, function: Callable, *args: Any, **options: Any) -> Any:
        """Call a function of the file system, whose errors depend on the protocol."""
        try:
            return function(*args, **options)
        except FileNotFoundError:
            raise self._make_missing_error(name) from None
        except PERMANENT_ERRORS as error:
            raise CacheError(
                f"{self.format_url(name)} cannot be read ({describe_read_error(error)})"
            ) from None
        except Exception as error:
            raise TransientError(describe_read_error(error)) from None
