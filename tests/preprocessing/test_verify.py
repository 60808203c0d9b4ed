"""preprocessing.verify detects each type of damage, and --repair restores the original files."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from common.files import write_array
from common.npy_file import NpyFile
from common.processes import World
from latents.cache import LatentCache
from preprocessing import encode_latents, verify
from preprocessing.build import build_cache
from preprocessing.encoding import EncodingJob, EncodingSettings
from tests.helpers import make_tree, make_vae
from tests.preprocessing.test_encoding import read_files

REPAIR_FLAGS = ("--repair", "--num-workers", 0)


@pytest.fixture(scope="module")
def original_folder(tmp_path_factory):
    """A folder with images (tree), a VAE (vae), and a cache (data)."""
    root = tmp_path_factory.mktemp("original")
    settings = EncodingSettings(
        make_tree(root / "tree"),
        resolution=32,
        vae=str(make_vae(root / "vae")),
        shard_size=10,
        batch_size=4,
        flip=True,
        crop="random-seeded",
    )
    build_cache(root / "data", EncodingJob(settings, "cpu", 0, World()), World())
    return root


@pytest.fixture
def data(original_folder, tmp_path):
    return shutil.copytree(original_folder / "data", tmp_path / "data")


def change_array(root, name, index, value, update_sha256=False):
    """Change one value of a stored array and optionally its sha256 in the manifest."""
    array = np.load(root / name)
    array[index] = value
    digest = write_array(root / name, array)
    if update_sha256:
        manifest = json.loads((root / "manifest.json").read_text())
        folder, file = name.split("/")
        entry = next(entry for entry in manifest["shards"] if entry["file"] == file)
        entry["sha256"][folder] = digest
        (root / "manifest.json").write_text(json.dumps(manifest))


def test_intact_cache_is_valid(call, data):
    code, out = call(verify, data)
    assert code == 0 and "is valid: 3 shards, 24 images" in out


@pytest.mark.parametrize(
    ("name", "index", "value", "update_sha256", "message"),
    [
        ("moments/00001.npy", (3, 0, 0, 0), 9, False, "moments: sha256 does not match"),
        ("mirrored/00001.npy", (3, 0, 0, 0), 9, False, "mirrored: sha256 does not match"),
        ("moments/00001.npy", (3, 0, 0, 0), np.nan, True, "moments: contains values that are not"),
        ("moments/00001.npy", (3, 5, 0, 0), -1, True, "moments: contains negative standard dev"),
        ("moments/00001.npy", (3, 0, 0, 0), 9, True, "statistics: do not match the manifest"),
        ("labels/00001.npy", 2, 3, True, "labels: range from 1 to 3, should be from 0 to 2"),
    ],
)
def test_damaged_values_are_detected_and_repaired(
    call, original_folder, data, name, index, value, update_sha256, message
):
    change_array(data, name, index, value, update_sha256)
    code, out = call(verify, data)
    assert code == 2 and f"00001.npy: {message}" in out
    assert "1 of 3 shards are damaged; pass --repair" in out
    code, out = call(verify, data, *REPAIR_FLAGS)
    assert code == 0 and "rebuilt 1 of 3 shards" in out
    assert ("manifest.json has the new sha256" in out) == update_sha256
    assert call(verify, data)[0] == 0
    assert read_files(data) == read_files(original_folder / "data")


def test_missing_and_truncated_files_are_detected_and_repaired(call, original_folder, data):
    (data / "moments/00000.npy").unlink()
    (data / "mirrored/00000.npy").write_bytes(b"")
    (data / "labels/00002.npy").write_bytes((data / "labels/00002.npy").read_bytes()[:-8])
    write_array(data / "mirrored/00001.npy", np.zeros((10, 4, 8, 8), np.float16))
    code, out = call(verify, data)
    assert code == 2 and "00000.npy: moments: cannot be read" in out
    assert "00002.npy: labels: " in out
    assert "00000.npy: mirrored: cannot be read (No data left in file)" in out
    assert "00001.npy: mirrored: is float16 (10, 4, 8, 8), should be float16 (10, 8, 8, 8)" in out
    assert call(verify, data, *REPAIR_FLAGS)[0] == 0
    assert read_files(data) == read_files(original_folder / "data")


def test_repair_rejects_another_vae(call, data, tmp_path):
    (data / "moments/00001.npy").unlink()
    vae = make_vae(tmp_path / "other", seed=1)
    code, out = call(verify, data, "--repair", "--vae", vae)
    assert code == 2 and "vae_fingerprint was" in out
    assert not (data / "moments/00001.npy").exists()


def test_repair_accepts_moved_images_and_vae(call, original_folder, data, tmp_path):
    (data / "moments/00001.npy").unlink()
    source = shutil.copytree(original_folder / "tree", tmp_path / "elsewhere")
    vae = shutil.copytree(original_folder / "vae", tmp_path / "vae")
    # The recorded locations no longer exist.
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["encoding"] |= {name: str(tmp_path / "missing" / name) for name in ("source", "vae")}
    (data / "manifest.json").write_text(json.dumps(manifest))
    assert call(verify, data, "--repair", "--source", source, "--vae", vae)[0] == 0
    repaired, _ = LatentCache(data).gather(np.arange(24))
    expected, _ = LatentCache(original_folder / "data").gather(np.arange(24))
    assert torch.equal(repaired, expected)


def test_statistics_that_do_not_match_the_shards_are_detected(call, data):
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["mean"][0] += 0.01
    (data / "manifest.json").write_text(json.dumps(manifest))
    code, out = call(verify, data)
    assert code == 2 and "mean and std of manifest.json do not agree with its shards" in out


@pytest.mark.parametrize("value", [None, "x", [], [1.0]])
def test_damaged_statistics_of_the_manifest_are_detected(call, data, value):
    original = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(original | {"mean": value}))
    code, out = call(verify, data)
    assert code == 2 and "mean and std of manifest.json do not agree with its shards" in out
    original["shards"][1]["sum"] = value
    (data / "manifest.json").write_text(json.dumps(original))
    code, out = call(verify, data)
    assert code == 2 and "00001.npy: statistics: do not match the manifest" in out


def test_folder_without_a_cache_gives_an_error(call, tmp_path):
    code, out = call(verify, tmp_path)
    assert code == 2 and "no manifest.json" in out and "Traceback" not in out


def test_repair_updates_the_count_of_skipped_images(call, tmp_path):
    """A skipped image that has been fixed is counted, even if another shard remains empty."""
    source = make_tree(tmp_path / "tree")
    fixed_image = source / "class1/016.png"
    content = fixed_image.read_bytes()
    fixed_image.write_bytes(b"")
    for i in range(2, 24, 3):  # all images of the class are skipped, so its shard is empty
        (source / f"class2/{i:03d}.png").write_bytes(b"")
    data = tmp_path / "data"
    flags = f"--source {source} --dest {data} --vae {make_vae(tmp_path / 'vae')}"
    flags += " --resolution 32 --shard-size 8 --skip-bad --num-workers 0"
    assert call(encode_latents, *flags.split())[0] == 0

    fixed_image.write_bytes(content)
    (data / "labels/00001.npy").unlink()
    code, out = call(verify, data, *REPAIR_FLAGS)
    assert code == 0 and "00001.npy differs from the original" in out
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["count"] == 16 and manifest["skipped"] == 8
    assert manifest["kinds"] == {"PNG RGB": 16}
    lines = (data / "skipped.jsonl").read_text().splitlines()
    skipped = [json.loads(line)["file"] for line in lines]
    assert len(skipped) == 8 and "class1/016.png" not in skipped
    assert call(verify, data)[0] == 0


def test_file_truncated_while_it_is_verified_is_reported(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 8, 2, 2), np.float16))
    file = NpyFile(tmp_path / "a.npy")
    os.truncate(tmp_path / "a.npy", 150)
    problem = verify._describe_invalid_moments(file)
    assert problem.startswith("cannot be read (") and "truncated after it was opened" in problem
