"""Git LFS pointers are reported as such by every reader of files that may be stored in Git LFS."""

import shutil
import zipfile
from pathlib import Path

import pytest

from common.cli import UserError
from common.lfs import describe_lfs_pointer
from evaluations.image_batches import NpzImages
from evaluations.inception import find_weights
from latents.cache import LatentCache
from models.weights import load_network
from preprocessing import verify
from preprocessing.image_source import ImageSource
from preprocessing.images import BadImage, load_square
from preprocessing.labels import read_label_file
from preprocessing.sources import open_source
from sampling.recipe import load_labels
from tests.helpers import LFS_POINTER
from tests.preprocessing.test_sources import make_png, write_tree, write_zip


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("images.zip", open_source),
        ("images.tar", open_source),
        ("images.parquet", open_source),
        ("samples.npz", lambda path: NpzImages(path, "samples")),
        ("inception.pth", find_weights),
        ("vit.safetensors", lambda path: load_network("vit_tiny_patch16_224", path)),
        ("labels.csv", read_label_file),
        ("labels.json", read_label_file),
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


@pytest.mark.parametrize("name", ["dataset.json", "metadata.csv", "cat/1.cls", "cat/1.json"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_pointer_instead_of_labels_is_reported(tmp_path, kind, name):
    files = {"cat/1.png": make_png(0), name: LFS_POINTER.encode()}
    if kind == "zip":
        source = write_zip(tmp_path / "images.zip", files)
    else:
        source = write_tree(tmp_path / "tree", files)
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer.*'git lfs pull'"):
        open_source(source)


@pytest.mark.parametrize("name", ["manifest.json", "moments/00001.npy", "labels/00000.npy"])
def test_pointer_in_a_cache_is_reported(call, cache, tmp_path, name):
    folder = shutil.copytree(cache, tmp_path / "data")
    (folder / name).write_text(LFS_POINTER)
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer") as error:
        LatentCache(folder)
    assert "--repair" not in str(error.value)
    code, out = call(verify, folder)
    assert code == 2 and f"{name} is a Git LFS pointer" in out
    assert "sha256" not in out


def test_image_that_is_a_pointer_is_bad(tmp_path):
    (tmp_path / "a.png").write_text(LFS_POINTER)
    source = ImageSource(tmp_path, ["a.png"], [0], ["a"])
    with pytest.raises(BadImage, match="Git LFS pointer: run 'git lfs pull'"):
        load_square(source, 0, 32)


def test_other_files_are_no_pointers(tmp_path):
    assert describe_lfs_pointer(tmp_path) == describe_lfs_pointer(Path("/missing")) == ""
    for content in ("", "version 2"):
        (tmp_path / "x").write_text(content)
        assert describe_lfs_pointer(tmp_path / "x") == ""
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as archive:
        archive.writestr("pointer", LFS_POINTER)
    assert describe_lfs_pointer(tmp_path / "y.zip") == ""
