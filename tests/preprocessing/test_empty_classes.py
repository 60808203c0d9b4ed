"""Encoding reports classes without images."""

import json

import pytest

from latents.cache import LatentCache
from preprocessing import encode_latents
from tests.helpers import make_tree


def label_images(folder, labels):
    """Write a dataset.json that assigns labels to the images in order."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    (folder / "dataset.json").write_text(json.dumps({"labels": list(zip(names, labels))}))


def leave_out_class_0(folder):
    label_images(folder, [1, 1, 2, 2, 1, 2])


def number_classes_from_1(folder):
    label_images(folder, [1, 2, 3, 1, 2, 3])


def damage_class_1(folder):
    for path in (folder / "class1").iterdir():
        path.write_bytes(b"no image")


@pytest.mark.parametrize(
    ("change", "flags", "counts", "note"),
    [
        (leave_out_class_0, [], [0, 3, 3], "1 of 3 classes: 0;"),
        (number_classes_from_1, [], [0, 2, 2, 2], "1 of 4 classes: 0;"),
        (damage_class_1, ["--skip-bad"], [2, 0, 2], "1 of 3 classes: 1 (class1);"),
        (None, ["--limit", 2], [2, 0, 0], "2 of 3 classes: 1 (class1), 2 (class2);"),
        (None, [], [2, 2, 2], None),
    ],
)
def test_encoding_reports_classes_without_images(
    call, vae_folder, tmp_path, change, flags, counts, note
):
    source = make_tree(tmp_path / "tree", images=6)
    if change:
        change(source)
    options = ["--source", source, "--dest", tmp_path / "data", "--vae", vae_folder, *flags]
    for _ in range(2):  # a rerun of the complete command reports them as well
        code, out = call(encode_latents, *options, "--resolution", 32, "--num-workers", 0)
        assert code == 0, out
        if note:
            assert f"no images of {note}" in out
        else:
            assert "no images" not in out
    assert LatentCache(tmp_path / "data").images_per_class == counts
