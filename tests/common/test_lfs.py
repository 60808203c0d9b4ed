"""Git LFS pointers are reported as such by every reader of files that may be stored in Git LFS."""

import shutil
import zipfile
from pathlib import Path

import pytest

from common.lfs import MAX_POINTER_BYTES, describe_lfs_pointer
from evaluations.image_batches import NpzImages
from evaluations.inception import find_weights
from latents.cache import LatentCache
from models.weights import load_network
from preprocessing.image_source import ImageSource
from preprocessing.images import BadImage, load_square
from preprocessing.sources import open_source
from sampling.recipe import load_labels
from tests.helpers import LFS_POINTER


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("images.zip", open_source),
        ("images.tar", open_source),
        ("images.parquet", open_source),
        ("samples.npz", lambda path: NpzImages(path, "samples")),
        ("inception.pth", find_weights),
        ("vit.safetensors", lambda path: load_network("vit_tiny_patch16_224", path)),
        ("labels.npy", load_labels),
        ("labels.txt", load_labels),
    ],
)
def test_pointer_is_reported_with_the_remedy(tmp_path, name, read):
    path = tmp_path / name
    path.write_text(LFS_POINTER)
    with pytest.raises(ValueError, match=f"{path} is a Git LFS pointer.*'git lfs pull'") as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["manifest.json", "moments/00001.npy", "labels/00000.npy"])
def test_pointer_in_a_cache_is_not_repaired(cache, tmp_path, name):
    folder = shutil.copytree(cache, tmp_path / "data")
    (folder / name).write_text(LFS_POINTER)
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer") as error:
        LatentCache(folder)
    assert "--repair" not in str(error.value)


def test_image_that_is_a_pointer_is_bad(tmp_path):
    (tmp_path / "a.png").write_text(LFS_POINTER)
    source = ImageSource(tmp_path, ["a.png"], [0], ["a"])
    with pytest.raises(BadImage, match="Git LFS pointer: run 'git lfs pull'"):
        load_square(source, 0, 32)


def test_other_files_are_no_pointers(tmp_path):
    assert describe_lfs_pointer(tmp_path) == describe_lfs_pointer(Path("/missing")) == ""
    for content in ("", "version 2", LFS_POINTER + " " * MAX_POINTER_BYTES):
        (tmp_path / "x").write_text(content)
        assert describe_lfs_pointer(tmp_path / "x") == ""
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as archive:
        archive.writestr("pointer", LFS_POINTER)
    assert describe_lfs_pointer(tmp_path / "y.zip") == ""
