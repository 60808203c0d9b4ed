"""Tensors and ranges of rows are read from one or several .safetensors files."""

import json

import pytest
import torch

from checkpointing.storage import save_tensors
from checkpointing.tensor_file import (
    FIRST_ROWS,
    StoredTensors,
    TensorFile,
    find_parts,
    part_name,
)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8],
)
def test_tensors_and_rows_equal_those_that_were_saved(tmp_path, dtype):
    tensors = {
        "matrix": torch.arange(30).reshape(5, 2, 3).to(dtype),
        "scalar": torch.tensor(7).to(dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
    }
    save_tensors(tensors, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    assert set(file.entries) == set(tensors)
    for name, tensor in tensors.items():
        assert file.shape(name) == tensor.shape
        assert torch.equal(file.read(name), tensor)
    assert torch.equal(file.read("matrix", 1, 3), tensors["matrix"][1:4])


def save_parts(folder, tensor, starts):
    """Save the rows of a tensor in several files."""
    stops = [*starts[1:], len(tensor)]
    for index, (start, stop) in enumerate(zip(starts, stops)):
        metadata = {FIRST_ROWS: json.dumps({"x": start})}
        path = folder / part_name("model.safetensors", index, len(starts))
        save_tensors({"x": tensor[start:stop].clone()}, path, metadata)


@pytest.mark.parametrize("starts", [[0, 4], [0, 1, 6], [0]])
def test_rows_are_assembled_from_several_files(tmp_path, starts):
    tensor = torch.randn(7, 3)
    save_parts(tmp_path, tensor, starts)
    paths = sorted(find_parts(tmp_path, "model.safetensors"))
    for stored in (StoredTensors(paths), StoredTensors(paths[::-1])):  # the order does not matter
        assert stored.shape("x") == (7, 3)
        for first in range(7):
            for stop in range(first, 8):
                out = torch.empty(stop - first, 3)
                stored.copy_rows("x", first, out)
                assert torch.equal(out, tensor[first:stop])


def test_truncated_files_raise_errors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors({"x": torch.ones(1000)}, path)
    file = TensorFile(path)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(OSError, match="the file was truncated after it was opened"):
        file.read("x")
    path.write_bytes(content[:20])
    with pytest.raises(ValueError, match="the file is truncated"):
        TensorFile(path)


def test_a_single_file_takes_precedence_over_parts(tmp_path):
    save_parts(tmp_path, torch.ones(4, 1), [0, 2])
    assert len(find_parts(tmp_path, "model.safetensors")) == 2
    assert find_parts(tmp_path, "ema.safetensors") == [tmp_path / "ema.safetensors"]
    save_tensors({"x": torch.ones(4, 1)}, tmp_path / "model.safetensors")
    assert find_parts(tmp_path, "model.safetensors") == [tmp_path / "model.safetensors"]
