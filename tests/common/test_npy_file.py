"""Test reading rows of .npy files, and errors for files that are not as their header says."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from common.npy_file import NpyFile, read_npy


@pytest.fixture
def array() -> np.ndarray:
    return np.arange(60, dtype=np.float16).reshape(10, 2, 3)


@pytest.fixture
def path(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    return tmp_path / "a.npy"


def test_rows_equal_those_of_the_array(path, array):
    file = NpyFile(path)
    assert (len(file), file.shape, file.dtype, file.nbytes) == (10, (10, 2, 3), np.float16, 120)
    for rows in (slice(None), slice(3, 7), slice(8, 20), slice(5, 5)):
        np.testing.assert_array_equal(file[rows], array[rows])
    out = np.zeros((3, 2, 3), np.float16)
    file.prefetch(4)
    file.read_into(4, out[1:2])
    np.testing.assert_array_equal(out[1], array[4])
    assert not out[0].any() and not out[2].any()


def test_reads_that_return_only_part_of_the_rows_are_continued(path, array, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, at: preadv(fd, [memoryview(buffers[0]).cast("B")[:7]], at)
    )
    np.testing.assert_array_equal(NpyFile(path)[2:9], array[2:9])


def test_truncated_file_is_an_error(path):
    file = NpyFile(path)
    os.truncate(path, path.stat().st_size - 50)
    with pytest.raises(OSError, match="truncated after it was opened"):
        file[:]
    assert file.is_truncated() and len(file[:2]) == 2
    with pytest.raises(ValueError, match="the file is truncated"):
        NpyFile(path)


def test_array_inside_another_file_is_read(tmp_path, path, array):
    (tmp_path / "b").write_bytes(b"123" + path.read_bytes() + b"45")
    np.testing.assert_array_equal(NpyFile(tmp_path / "b", start=3)[:], array)


@pytest.mark.parametrize("dtype", [b"'<,2'", b"'<f2'," + b" " * 40])
def test_damaged_header_is_an_error(path, dtype):
    path.write_bytes(path.read_bytes().replace(b"'<f2'", dtype))
    with pytest.raises(ValueError, match="header"):
        NpyFile(path)


@pytest.mark.parametrize(
    "content", [np.asfortranarray(np.ones((3, 4))), np.array(5), np.array([{}], object)]
)
def test_other_layouts_are_refused(tmp_path, content):
    np.save(tmp_path / "b.npy", content)
    with pytest.raises(ValueError, match="no rows, is in Fortran order or contains objects"):
        NpyFile(tmp_path / "b.npy")


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24.0).reshape(2, 3, 4),
        np.asfortranarray(np.arange(24, dtype=np.float16).reshape(2, 3, 4)),
        np.arange(6, dtype=">f4"),
        np.array(3.0),
        np.zeros((0, 4), np.float32),
        np.array(["a"]),
    ],
)
def test_read_npy_equals_numpy(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    read = read_npy(tmp_path / "a.npy")
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, np.load(tmp_path / "a.npy"), strict=True)


def test_read_npy_rejects_objects_and_truncated_files(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="contains objects"):
        read_npy(path)
    np.save(path, np.zeros(100))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match="truncated"):
        read_npy(path)


def test_headers_are_parsed_by_one_thread_at_a_time(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.zeros(3))
    parse = np.lib.format.read_array_header_1_0
    num_active, most_active = 0, 0

    def parse_slowly(file):
        nonlocal num_active, most_active
        num_active += 1
        most_active = max(most_active, num_active)
        time.sleep(0.001)  # lets other threads run
        num_active -= 1
        return parse(file)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", parse_slowly)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read_npy, [tmp_path / "a.npy"] * 32))
    assert most_active == 1
