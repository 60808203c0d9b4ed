"""Lines on a disk that is full now and then; the screen likewise."""

import hashlib
import io
import os

import numpy as np
import pytest

from common import files
from common.cli import DiskFullSafeStream
from common.files import LineWriter, write_array, write_file, write_npz


class Full:
    """A raw file on a disk with room for so many bytes more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        part = bytes(data[: self.room])
        self.room -= len(part)
        return self.file.write(part)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_lines_that_do_not_fit_wait_and_are_neither_torn_nor_doubled(tmp_path, monkeypatch):
    lines = LineWriter(tmp_path / "log")
    assert lines.append("first\n", sync=True)
    for room in (3, 0, 9):
        with monkeypatch.context() as patch:
            full = lambda *args, room=room, **more: Full(open(*args, **more), room)  # noqa: E731, SIM115
            patch.setattr(files, "open", full, raising=False)
            assert not lines.append(f"with room for {room}\n")
    assert lines.append("last\n")
    expected = ["first", "with room for 3", "with room for 0", "with room for 9", "last"]
    assert (tmp_path / "log").read_text().splitlines() == expected and lines.pending == ""


def test_lines_whose_fsync_fails_come_once(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    lines = LineWriter(tmp_path / "log")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert not lines.append("first\n", sync=True)
    assert lines.append("second\n", sync=True)
    assert (tmp_path / "log").read_text() == "first\nsecond\n"


def test_a_screen_that_is_full_ends_nothing():
    class FullDisk(io.StringIO):
        def write(self, text=""):
            raise OSError(28, "No space left on device")

        flush = write

    screen = DiskFullSafeStream(FullDisk())
    assert screen.write("text") == 4 and screen.flush() is None
    print("more", file=screen, flush=True)
    assert screen.getvalue() == ""


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    """Who has it open goes on reading the old one; a disk that fills up leaves it alone."""
    path = tmp_path / "file.json"
    write_file(path, b"old" * 1000)
    with path.open("rb") as reader:
        write_file(path, b"new" * 500, memoryview(b"est"))
        assert reader.read() == b"old" * 1000
    assert path.read_bytes() == b"new" * 500 + b"est"
    full = lambda *args, **more: Full(open(*args, **more), 5)  # noqa: E731, SIM115
    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"third", b"time")
    assert path.read_bytes() == b"new" * 500 + b"est" and os.listdir(tmp_path) == ["file.json"]


def test_arrays_are_numpys_files(tmp_path):
    for array in (
        np.arange(24, dtype=np.float16).reshape(2, 3, 4),
        np.arange(6).reshape(2, 3).T,
        np.empty((0, 4), np.float32),
    ):
        digest = write_array(tmp_path / "ours.npy", array)
        np.save(tmp_path / "numpys.npy", np.ascontiguousarray(array))
        assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpys.npy").read_bytes()
        assert digest == hashlib.sha256((tmp_path / "ours.npy").read_bytes()).hexdigest()


def test_an_npz_of_statistics_alone_holds_no_images(tmp_path):
    write_npz(tmp_path / "s.npz", None, (0, 4, 4, 3), mu=np.arange(3))
    with np.load(tmp_path / "s.npz") as content:
        assert content.files == ["mu"] and content["mu"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(0, 3, 2), (7, 3, 2), (12345, 1)])
def test_an_array_that_grows_is_numpys_file_and_appears_when_it_is_finished(tmp_path, shape):
    array = np.arange(np.prod(shape), dtype=np.uint8 if len(shape) == 3 else np.int64).reshape(
        shape
    )
    np.save(tmp_path / "numpys.npy", array)
    growing = files.NpyWriter(tmp_path / "ours.npy", array.dtype, shape[1:])
    for part in np.array_split(array, 3):
        growing.append(part)
    assert not (tmp_path / "ours.npy").exists()
    digest = growing.finish()
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpys.npy").read_bytes()
    assert digest == hashlib.sha256((tmp_path / "ours.npy").read_bytes()).hexdigest()
    other = files.NpyWriter(tmp_path / "other.npy", array.dtype, shape[1:])
    other.append(array)
    other.discard()
    assert sorted(os.listdir(tmp_path)) == ["numpys.npy", "ours.npy"]
