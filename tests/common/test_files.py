"""Test atomic writes, arrays that are written in parts, and log files on a full disk."""

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest

from common.cli import DiskFullSafeStream
from common.files import LineWriter, NpyWriter, write_array, write_file, write_npz


class FileOnFullDisk:
    """Wraps a binary file on a disk that has space for `free` more bytes.

    As in Python, an unbuffered file writes the bytes that fit and returns their number, and a
    buffered file raises an error.
    """

    def __init__(self, file, free):
        self.file = file
        self.free = free

    def write(self, data):
        part = bytes(data[: self.free])
        self.free -= len(part)
        written = self.file.write(part)
        is_buffered = isinstance(self.file, io.BufferedWriter)
        if len(part) < len(data) and (is_buffered or not part):
            raise OSError(28, "No space left on device")
        return written

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def limit_disk(patch, free):
    """Limit every file that is opened from now on to `free` more bytes."""
    open_unlimited = Path.open
    patch.setattr(
        Path, "open", lambda *args, **kwargs: FileOnFullDisk(open_unlimited(*args, **kwargs), free)
    )


def compute_sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_lines_are_complete_and_not_repeated_after_a_full_disk(tmp_path, monkeypatch):
    lines = LineWriter(tmp_path / "log")
    assert lines.append("first\n", sync=True)
    for free in (3, 0, 9):
        with monkeypatch.context() as patch:
            limit_disk(patch, free)
            assert not lines.append(f"with space for {free}\n")
    assert lines.append("last\n")
    expected = ["first", "with space for 3", "with space for 0", "with space for 9", "last"]
    assert (tmp_path / "log").read_text().splitlines() == expected
    assert lines.pending == ""


def test_lines_are_written_once_after_a_failed_fsync(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    lines = LineWriter(tmp_path / "log")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert not lines.append("first\n", sync=True)
    assert lines.append("second\n", sync=True)
    assert (tmp_path / "log").read_text() == "first\nsecond\n"


def test_printing_to_a_full_disk_raises_no_error():
    class FullStream(io.StringIO):
        def write(self, text=""):
            raise OSError(28, "No space left on device")

        flush = write

    stream = DiskFullSafeStream(FullStream())
    assert stream.write("text") == 4
    stream.flush()
    print("more", file=stream, flush=True)
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("encoding", "text", "expected"),
    [
        ("ascii", "saved exps/λόγος", rb"saved exps/\u03bb\u03cc\u03b3\u03bf\u03c2"),
        ("cp1252", "é λ", rb"\xe9 \u03bb"),
        ("utf-8", "λ", "λ".encode()),
        ("utf-8", os.fsdecode(b"name-\xff"), rb"name-\udcff"),  # not valid UTF-8
    ],
)
def test_characters_that_a_stream_cannot_represent_are_escaped(encoding, text, expected):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print(text, file=DiskFullSafeStream(stream), flush=True)
    assert stream.buffer.getvalue() == expected + b"\n"


def test_closed_stream_is_replaced():
    stream = DiskFullSafeStream(None)
    print("text", file=stream, flush=True)
    assert stream.stream.name == os.devnull


def test_line_with_a_file_name_that_is_not_utf8_is_written(tmp_path):
    lines = LineWriter(tmp_path / "log")
    assert lines.append("saved " + os.fsdecode(b"name-\xff") + "\n")
    assert (tmp_path / "log").read_bytes() == b"saved name-\\udcff\n"


def test_write_file_replaces_the_file_atomically(tmp_path, monkeypatch):
    """An open reader still reads the old contents, and a full disk leaves the file unchanged."""
    path = tmp_path / "file.json"
    write_file(path, b"old" * 1000)
    with path.open("rb") as reader:
        write_file(path, memoryview(b"new" * 500))
        assert reader.read() == b"old" * 1000
    assert path.read_bytes() == b"new" * 500
    with monkeypatch.context() as patch:
        limit_disk(patch, 5)
        with pytest.raises(OSError, match=r"No space left on device.*file\.json"):
            write_file(path, b"thirdtime")
    assert path.read_bytes() == b"new" * 500
    assert list(tmp_path.iterdir()) == [path]


def test_write_array_writes_the_same_bytes_as_numpy(tmp_path):
    for array in (
        np.arange(24, dtype=np.float16).reshape(2, 3, 4),
        np.arange(6).reshape(2, 3).T,
        np.empty((0, 4), np.float32),
    ):
        digest = write_array(tmp_path / "written.npy", array)
        np.save(tmp_path / "numpy.npy", np.ascontiguousarray(array))
        assert (tmp_path / "written.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()
        assert digest == compute_sha256(tmp_path / "written.npy")


def test_npz_without_blocks_contains_only_the_additional_arrays(tmp_path):
    write_npz(tmp_path / "s.npz", None, (0, 4, 4, 3), mu=np.arange(3))
    with np.load(tmp_path / "s.npz") as content:
        assert content.files == ["mu"] and content["mu"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(0, 3, 2), (7, 3, 2), (12345, 1)])
def test_npy_writer_writes_the_same_bytes_as_numpy(tmp_path, shape):
    dtype = np.uint8 if len(shape) == 3 else np.int64
    array = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    np.save(tmp_path / "numpy.npy", array)
    writer = NpyWriter(tmp_path / "written.npy", dtype, shape[1:])
    for part in np.array_split(array, 3):
        writer.append(part)
    assert not (tmp_path / "written.npy").exists()
    digest = writer.finish()
    assert (tmp_path / "written.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    assert digest == compute_sha256(tmp_path / "written.npy")


def test_discarded_npy_writer_leaves_no_file(tmp_path):
    writer = NpyWriter(tmp_path / "array.npy", np.int64, (3,))
    writer.append(np.zeros((2, 3), np.int64))
    writer.discard()
    assert list(tmp_path.iterdir()) == []
