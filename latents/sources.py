"""Open the files of a latent cache in a local folder, or under a URL."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path

import numpy as np

from common.cli import get_rank_prefix, is_url
from common.files import write_file
from common.npy_file import NpyLayout
from latents.manifest import (
    CacheError,
    Manifest,
    format_features_remedy,
    format_repair_remedy,
    parse_feature_metadata,
    parse_manifest,
    read_feature_metadata,
    read_manifest,
)
from latents.remote.array import RemoteArray, read_remote_layout
from latents.remote.files import RemoteFiles
from latents.remote.local_copy import LocalCopy, RemoteFile, naming_folder
from latents.shard_reader import ShardReader

NPY_HEADER_BYTES = 128  # usual size of the header of a .npy file
MANIFEST_ATTEMPTS = 4  # so that a wrong URL is reported after a few seconds


class CacheSource(ABC):
    """The place where a latent cache is stored.

    Attributes:
        root: The local folder or the URL, as in the command line.
        manifest: The manifest of the cache.
    """

    root: Path | str
    manifest: Manifest

    @abstractmethod
    def get_identity(self) -> str:
        """Return a key that is equal for the same place."""

    @abstractmethod
    def read_feature_metadata(self) -> dict[str, dict]:
        """Return the FEATURE_FIELDS of the stored features, by slug."""

    @abstractmethod
    def prepare(self, row_formats: dict[str, np.dtype]) -> None:
        """Prepare for reading some folders of the cache.

        Args:
            row_formats: Shape and data type of the rows, by folder.

        Raises:
            CacheError: The folders cannot be copied to this machine.
        """

    @abstractmethod
    def is_remote(self, folder: str) -> bool:
        """Return whether the rows of a folder are read from a URL."""

    @abstractmethod
    def open_shard(self, shard: dict, folder: str, row_format: np.dtype) -> ShardReader:
        """Validate and open a shard file.

        Args:
            shard: The entry of the shard in the manifest.
            folder: Folder of the file.
            row_format: Shape and data type of the rows.

        Raises:
            CacheError: The file is missing or damaged.
        """


class LocalSource(CacheSource):
    """A cache in a local folder."""

    def __init__(self, root: Path):
        self.root: Path = root
        self.manifest = read_manifest(root)

    def get_identity(self) -> str:
        """Return the absolute path."""
        return str(self.root.resolve())

    def read_feature_metadata(self) -> dict[str, dict]:
        """Return the metadata of the features (see CacheSource)."""
        return read_feature_metadata(self.root, self.manifest)

    def prepare(self, row_formats: dict[str, np.dtype]) -> None:
        """Do nothing."""

    def is_remote(self, folder: str) -> bool:
        """Return False."""
        return False

    def open_shard(self, shard: dict, folder: str, row_format: np.dtype) -> ShardReader:
        """Open a shard file (see CacheSource)."""
        if folder.startswith("features/"):
            remedy = format_features_remedy(self.root / folder)
        else:
            remedy = format_repair_remedy(self.root)
        path = self.root / folder / shard["file"]
        return ShardReader(path, shard["count"], row_format, remedy)


class RemoteSource(CacheSource):
    """A cache under a URL, which is copied to a local folder if there is enough space.

    The folder of the copy is named after the contents of the manifest, which contains the sha256 of
    all files. Several runs, and several URLs of the same cache, therefore share a copy.

    Args:
        url: URL of the cache.
        local_cache: Parent folder of the copies; None reads all rows by ranged requests.

    Attributes:
        files: The files under the URL.
        copied_folders: Folders of the cache that have been copied.

    Raises:
        CacheError: The manifest cannot be read, or the URL cannot be opened.
    """

    def __init__(self, url: str, local_cache: Path | None):
        self.root: str = url
        self.files = _open_remote_files(url)
        try:
            self._manifest_text, _ = self.files.read(
                "manifest.json", max_attempts=MANIFEST_ATTEMPTS
            )
        except FileNotFoundError:
            raise CacheError(
                f"{url} is not a latent cache (no manifest.json); pass the URL of the folder that "
                "contains manifest.json"
            ) from None
        self.manifest = parse_manifest(self._manifest_text, self.files.format_url("manifest.json"))
        self.copied_folders: set[str] = set()
        self._local_cache = local_cache
        self._layouts: dict[str, NpyLayout] = {}  # by file, so that workers do not read them again
        self._feature_texts: dict[str, bytes] | None = None  # features.json by slug

    def get_identity(self) -> str:
        """Return the URL."""
        return self.files.url

    def read_feature_metadata(self) -> dict[str, dict]:
        """Return the metadata of the features (see CacheSource)."""
        metadata_by_slug = {}
        for slug, text in self._read_feature_texts().items():
            url = self.files.format_url(f"features/{slug}/features.json")
            metadata = parse_feature_metadata(text, url, self.manifest, f"upload {url} again")
            if metadata is not None:
                metadata_by_slug[slug] = metadata
        return metadata_by_slug

    def _read_feature_texts(self) -> dict[str, bytes]:
        if self._feature_texts is None:
            self._feature_texts = {}
            for slug in self.files.list_folders("features"):
                with suppress(FileNotFoundError):  # the features are incomplete
                    self._feature_texts[slug], _ = self.files.read(f"features/{slug}/features.json")
        return self._feature_texts

    def prepare(self, row_formats: dict[str, np.dtype]) -> None:
        """Copy some folders, unless there is not enough space (see CacheSource)."""
        folders = " and ".join(row_formats)
        description = f"{folders} of {self.root}"
        if self._local_cache is None:
            _print_once(f"{description} are read by ranged requests")
            return
        remote_files = []
        for folder, row_format in row_formats.items():
            remote_files += self._list_files(folder, row_format)
        copy = self._make_local_copy(next(iter(row_formats)), self._local_cache)
        with copy.locked():
            num_bytes = copy.count_missing_bytes(remote_files)
            free_bytes = copy.get_free_bytes()
            if num_bytes > free_bytes:
                _print_once(
                    f"{description} are read by ranged requests, because a copy needs "
                    f"{num_bytes / 1e9:.1f} GB, but only {free_bytes / 1e9:.1f} GB are "
                    f"available in {self._local_cache} (--local-cache)"
                )
                return
            if copy.list_missing(remote_files):
                print(f"{get_rank_prefix()}copying {description} to {copy.folder}", flush=True)
                copy.copy(remote_files)
            manifest = copy.folder / "manifest.json"
            if "moments" in row_formats and not manifest.exists():
                with naming_folder(copy.folder):
                    write_file(manifest, self._manifest_text)
        _print_once(f"{description} are read from {copy.folder}")
        self.copied_folders |= row_formats.keys()

    def _make_local_copy(self, folder: str, local_cache: Path) -> LocalCopy:
        """Return the copy that contains a folder. Stored features have a separate copy."""
        name = self.files.url.rpartition("/")[2]
        text = self._manifest_text
        if folder.startswith("features/"):
            slug = folder.removeprefix("features/")
            name = f"{name}-{slug}"
            text = self._read_feature_texts()[slug]
        digest = hashlib.sha256(text).hexdigest()
        return LocalCopy(self.files, local_cache / f"{name}-{digest[:16]}")

    def _list_files(self, folder: str, row_format: np.dtype) -> list[RemoteFile]:
        """Return the shard files of a folder."""
        if folder.startswith("features/"):
            content = json.loads(self._read_feature_texts()[folder.removeprefix("features/")])
            hashes = {shard["file"]: shard.get("sha256") for shard in content["shards"]}
        else:
            hashes = {
                shard["file"]: shard.get("sha256", {}).get(folder) for shard in self.manifest.shards
            }
        return [
            RemoteFile(
                f"{folder}/{shard['file']}",
                shard["count"] * row_format.itemsize + NPY_HEADER_BYTES,
                hashes[shard["file"]],
            )
            for shard in self.manifest.shards
        ]

    def get_copied_root(self) -> Path | None:
        """Return the folder of the copy of the moments and labels, or None if there is no copy."""
        if self._local_cache is None or self.is_remote("moments"):
            return None
        return self._make_local_copy("moments", self._local_cache).folder

    def is_remote(self, folder: str) -> bool:
        """Return whether a folder has not been copied."""
        return folder not in self.copied_folders

    def open_shard(self, shard: dict, folder: str, row_format: np.dtype) -> ShardReader:
        """Open a shard file (see CacheSource)."""
        name = f"{folder}/{shard['file']}"
        if not self.is_remote(folder):
            assert self._local_cache is not None
            path = self._make_local_copy(folder, self._local_cache).folder / name
            remedy = f"remove {path} and rerun the same command to copy it again"
            return ShardReader(path, shard["count"], row_format, remedy)
        remedy = "check the original with python -m preprocessing.verify, and upload it again"
        url = self.files.format_url(name)
        return ShardReader(url, shard["count"], row_format, remedy, lambda: self._open(name))

    def _open(self, name: str) -> RemoteArray:
        if name not in self._layouts:
            self._layouts[name] = read_remote_layout(self.files, name)
        return RemoteArray(self.files, name, self._layouts[name])


def _open_remote_files(url: str) -> RemoteFiles:
    # Importing the libraries takes a fifth of a second, which local caches do not need.
    if url.startswith(("http://", "https://")):
        from latents.remote.http_files import HttpFiles

        return HttpFiles(url)
    from latents.remote.fsspec_files import FsspecFiles

    return FsspecFiles(url)


def _print_once(message: str) -> None:
    """Print a message on the first process of each machine; the logger shows only rank 0's."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{get_rank_prefix()}{message}", flush=True)


def open_source(root: Path | str, local_cache: Path | None = None) -> CacheSource:
    """Open a latent cache.

    Args:
        root: A local folder or a URL.
        local_cache: Parent folder for copies of remote caches; None makes no copies.

    Raises:
        CacheError: The manifest is missing or damaged, or the URL cannot be read.
    """
    if isinstance(root, str) and is_url(root):
        return RemoteSource(root, local_cache)
    return LocalSource(Path(root))


def copy_moments(url: str, local_cache: Path | None) -> Path | str:
    """Copy the moments and labels of a remote cache, unless there is not enough space.

    Args:
        url: URL of the cache.
        local_cache: Parent folder of the copy, or None to make no copy.

    Returns:
        Folder of the copy, which is a latent cache, or the URL.

    Raises:
        CacheError: The cache cannot be read.
    """
    source = RemoteSource(url, local_cache)
    source.prepare(source.manifest.required_formats)
    return source.get_copied_root() or url
