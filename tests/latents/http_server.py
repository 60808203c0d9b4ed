"""Serve a folder over HTTP with ranged requests, and inject failures."""

import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class FolderServer:
    """A server for a folder.

    Attributes:
        folder: The folder.
        supports_ranges: Whether ranged requests are answered with a range.
        shift: Distance of the answered range from the requested one.
        fail: Function of the path, the range, and the number of earlier equal requests. It returns
            None, an HTTP status to send instead of the file, or a negative number -N to close the
            connection after N bytes.
        requests: Path and range of each request so far.
        url: URL of the folder.
    """

    folder: Path
    supports_ranges: bool = True
    shift: int = 0
    fail: Callable[[str, str, int], int | None] = lambda *_: None
    requests: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def count_bytes(self) -> int:
        """Return the total size of the requested ranges."""
        total = 0
        for _, requested in self.requests:
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", requested)
            if match:
                total += int(match[2]) + 1 - int(match[1])
        return total


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open
    state: FolderServer

    def do_GET(self):
        state = self.state
        requested = self.headers.get("Range", "")
        number = state.requests.count((self.path, requested))
        state.requests.append((self.path, requested))
        failure = state.fail(self.path, requested, number)
        path = Path(self.translate_path(self.path))
        if failure is not None and failure > 0:
            self.send_error(failure)
        elif path.is_dir():
            super().do_GET()
        elif not path.exists():
            self.send_error(404)
        else:
            self.send_file(path.read_bytes(), requested, failure)

    def send_file(self, content: bytes, requested: str, failure: int | None) -> None:
        body = content
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", requested)
        if match and self.state.supports_ranges:
            start = int(match[1]) + self.state.shift
            if start >= len(content):
                self.send_error(416)
                return
            body = content[start : int(match[2]) + 1 if match[2] else None]
            self.send_response(206)
            end = start + len(body) - 1
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if failure is not None:
            body = body[:-failure]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def serve(folder: Path):
    """Yield a running FolderServer."""
    state = FolderServer(folder)

    class Handler(_Handler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

    Handler.state = state
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
