"""Read files from a web server. The connections stay open between requests."""

import re
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

import requests
from requests.adapters import HTTPAdapter

from common.cli import describe_read_error
from latents.manifest import CacheError
from latents.remote.files import (
    NUM_CONNECTIONS,
    Download,
    RemoteFiles,
    ShortFileError,
    TransientError,
    make_changed_error,
)

CHUNK_BYTES = 1 << 16  # bytes that are received at a time; fewer are lost with the connection
CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0  # longest time without receiving any bytes
TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)


class HttpFiles(RemoteFiles):
    """Files of a web server. Folders are found in the HTML pages that list the files.

    Credentials are read from ~/.netrc, and proxies from the environment.
    """

    def __init__(self, url: str):
        super().__init__(url)
        # Sizes and ETags of the files when they were first read.
        self._sizes: dict[str, int] = {}
        self._etags: dict[str, str] = {}

    def _connect(self) -> requests.Session:
        session = requests.Session()
        adapter = HTTPAdapter(pool_maxsize=NUM_CONNECTIONS)
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        return session

    def download(self, name: str, start: int = 0, stop: int | None = None) -> Download:
        """Request a range of a file (see RemoteFiles)."""
        # In compressed content, the bytes would have other positions.
        headers = {"Accept-Encoding": "identity"}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        response = self._get(name, headers)
        file_size = None
        is_range = response.status_code == requests.codes.partial_content
        if is_range:
            content_range = response.headers.get("Content-Range", "")
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", content_range)
            if not match or int(match[1]) != start:
                raise CacheError(
                    f"{self.format_url(name)}: the server answered a request for the bytes from "
                    f"{start} on with Content-Range {content_range!r}"
                )
            file_size = int(match[2])
        elif "Content-Length" in response.headers:
            file_size = int(response.headers["Content-Length"])
        etag = response.headers.get("ETag")
        if file_size is not None and self._sizes.setdefault(name, file_size) != file_size:
            raise make_changed_error(self.format_url(name))
        if etag is not None and self._etags.setdefault(name, etag) != etag:
            raise make_changed_error(self.format_url(name))
        return Download(start if is_range else 0, file_size, is_range, _iterate_chunks(response))

    def _get(self, name: str, headers: dict[str, str]) -> requests.Response:
        _, session = self._get_connections()
        url = self.format_url(name)
        try:
            response = session.get(
                url, headers=headers, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)
            )
        except (requests.ConnectionError, requests.Timeout) as error:
            raise TransientError(_describe_connection_error(error)) from None
        except requests.RequestException as error:
            raise CacheError(f"{url} cannot be read ({describe_read_error(error)})") from None
        status = response.status_code
        if status in (requests.codes.ok, requests.codes.partial_content):
            return response
        response.close()
        reason = f"HTTP status {status} {response.reason}".rstrip()
        if status == requests.codes.requested_range_not_satisfiable:
            raise ShortFileError(reason)
        if status in TRANSIENT_STATUSES:
            raise TransientError(reason)
        if status == requests.codes.not_found:
            raise self._make_missing_error(name)
        raise CacheError(f"{url} cannot be read ({reason}); check the URL and the credentials")

    def list_folders(self, name: str) -> list[str]:
        """Return the names of the folders (see RemoteFiles)."""
        try:
            page, _ = self.read(f"{name}/")
        except (FileNotFoundError, CacheError):
            return []
        links = re.findall(r'href="([^"?#]+)/"', page.decode(errors="replace"))
        base_path = urlsplit(self.format_url(name)).path
        names = {unquote(link).removeprefix(f"{base_path}/").removeprefix("./") for link in links}
        return sorted(name for name in names if name and "/" not in name and name != "..")


def _iterate_chunks(response: requests.Response) -> Iterator[bytes]:
    try:
        with response:
            yield from response.iter_content(CHUNK_BYTES)
    except requests.RequestException as error:
        raise TransientError(_describe_connection_error(error)) from None


def _describe_connection_error(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return "the server did not answer in time"
    # requests nests exceptions of urllib3, whose messages contain the addresses of objects.
    reason: object = error
    while isinstance(reason, Exception) and (hasattr(reason, "reason") or reason.args):
        reason = getattr(reason, "reason", None) or reason.args[0]
    return describe_read_error(Exception(re.sub(r"<[^>]*>:? ?", "", str(reason))))
