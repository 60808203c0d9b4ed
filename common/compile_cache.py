"""Store compiled graphs in a file, so that later processes on any machine need not compile them.

PyTorch stores compiled graphs in a local folder, /tmp by default, which is lost when a job gets
another machine. That folder cannot be moved to a network file system safely: compilation needs file
locks and fails on a full disk. Here, compilation still uses the local folder, and one file per
process holds a copy of the graphs. If the file is missing, damaged or unusable, the graphs are
compiled.
"""

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from common.files import write_file

FOLDER_NAME = ".compile-cache"
DIGEST_SIZE = hashlib.sha256().digest_size


class CompileCache:
    """The compiled graphs of a process, in a file that later processes load.

    PyTorch decides which of the loaded graphs it uses: its keys include the graph, the inputs and
    the versions. The name of the file only separates runs that compile different graphs. The graphs
    of a GPU depend on its index, so there is one file per local rank. The processes of the first
    machine write them.

    The file contains pickled objects. It is not loaded if it belongs to another user.

    Args:
        folder: Folder of the file, or None to load and save nothing.
        settings: Settings that determine the graphs, as JSON values.
        device: Device of the graphs.
        rank: Rank of this process among all processes.
        local_rank: Rank of this process among the processes on this machine.

    Attributes:
        path: The file, or None.
        num_graphs: Number of graphs that this process has used, as of the last call of `save`.
        num_loaded_graphs: Number of these graphs that the file contained.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: dict[str, Any],
        device: torch.device,
        rank: int,
        local_rank: int,
    ):
        self.path: Path | None = None
        if folder:
            identity = json.dumps([settings, _describe_software(device)], sort_keys=True)
            name = hashlib.sha256(identity.encode()).hexdigest()[:16]
            self.path = folder / f"{name}-{local_rank}"
        self.is_writer = rank == local_rank
        self.num_graphs = 0
        self.num_loaded_graphs = 0
        self._stored: dict[str, list[str]] = {}  # keys of the objects in the file, by type

    def load(self) -> None:
        """Make the graphs of the file available to the compiler. Problems are ignored."""
        if self.path is None:
            return
        with suppress(OSError):
            if self.path.stat().st_uid != os.getuid():
                return
            content = self.path.read_bytes()
            digest, artifacts = content[:DIGEST_SIZE], content[DIGEST_SIZE:]
            if hashlib.sha256(artifacts).digest() != digest:
                return
            info = torch.compiler.load_cache_artifacts(artifacts)
            if info is not None:
                self._stored = dict(info.artifacts)

    def save(self) -> str:
        """Write the file if this process has used graphs that it does not contain.

        Returns:
            The problem if the file could not be written, otherwise "".
        """
        if self.path is None:
            return ""
        result = torch.compiler.save_cache_artifacts()
        if result is None:  # nothing has been compiled, or PyTorch's caches are disabled
            return ""
        artifacts, info = result
        graphs = info.inductor_artifacts
        self.num_graphs = len(graphs)
        self.num_loaded_graphs = len(set(graphs) & set(self._stored.get("inductor", [])))
        is_complete = all(
            set(keys) <= set(self._stored.get(kind, [])) for kind, keys in info.artifacts.items()
        )
        if is_complete or not self.is_writer:
            return ""
        try:
            write_file(self.path, hashlib.sha256(artifacts).digest() + artifacts)
        except OSError as error:
            return f"{self.path}: {error.strerror}; the next start compiles again"
        self._stored = dict(info.artifacts)
        return ""


def choose_folder(output_folder: Path, is_compiled: bool) -> Path | None:
    """Return the folder for files of `CompileCache`, or None if there should be none.

    There are no files if the user has set TORCHINDUCTOR_CACHE_DIR.
    """
    if not is_compiled:
        return None
    local_folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    # PyTorch itself sets the variable to its default, which child processes inherit.
    if local_folder and not Path(local_folder).match(f"{tempfile.gettempdir()}/torchinductor_*"):
        return None
    return output_folder / FOLDER_NAME


def _describe_software(device: torch.device) -> list[str | None]:
    """Return the versions and the hardware for which graphs are compiled."""
    hardware = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    return [torch.__version__, torch.version.git_version, torch.version.cuda, hardware]
