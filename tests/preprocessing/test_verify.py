"""preprocessing.verify finds every fault that is planted, and mends it."""

import json
import shutil

import numpy as np
import pytest
import torch

from common.files import write_array
from latents.cache import LatentCache
from preprocessing import encode_latents, verify
from tests.helpers import make_tree, make_vae


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a cache that is sound, and what it was made of."""
    from common.processes import World
    from preprocessing.build import build_cache
    from preprocessing.encoding import EncodingJob, EncodingSettings

    root = tmp_path_factory.mktemp("made")
    make_tree(root / "tree"), make_vae(root / "vae")
    settings = EncodingSettings(
        str(root / "tree"),
        resolution=32,
        vae=str(root / "vae"),
        shard_size=10,
        batch_size=4,
        flip=True,
        crop="random-seeded",
    )
    build_cache(root / "data", EncodingJob(settings, "cpu", 0, World()), World())
    return root


@pytest.fixture
def data(made, tmp_path):
    return shutil.copytree(made / "data", tmp_path / "data")


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def change(folder, name, edit, vouched=False):
    """Changes one array, and, if vouched, the sha256 and sums in the manifest with it."""
    array = np.load(folder / name)
    edit(array)
    digest = write_array(folder / name, array)
    if vouched:
        manifest = json.loads((folder / "manifest.json").read_text())
        room, file = name.split("/")
        entry = next(entry for entry in manifest["shards"] if entry["file"] == file)
        entry["sha256"][room] = digest
        (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_sound_cache_is_sound(call, data):
    code, out = call(verify, data)
    assert code == 0 and "is sound: 3 shards, 24 images" in out


@pytest.mark.parametrize(
    ("name", "edit", "vouched", "message"),
    [
        (
            "moments/00001.npy",
            lambda a: a.__setitem__((3, 0, 0, 0), 9),
            False,
            "moments: not the bytes that were written",
        ),
        (
            "mirrored/00001.npy",
            lambda a: a.__setitem__((3, 0, 0, 0), 9),
            False,
            "mirrored: not the bytes",
        ),
        (
            "moments/00001.npy",
            lambda a: a.__setitem__((3, 0, 0, 0), np.nan),
            True,
            "moments: values that are not finite",
        ),
        (
            "moments/00001.npy",
            lambda a: a.__setitem__((3, 5, 0, 0), -1),
            True,
            "moments: standard deviations below 0",
        ),
        (
            "moments/00001.npy",
            lambda a: a.__setitem__((3, 0, 0, 0), 9),
            True,
            "statistics: not what the manifest says",
        ),
        (
            "labels/00001.npy",
            lambda a: a.__setitem__(2, 3),
            True,
            "labels: from 1 to 3, should be from 0 to 2",
        ),
    ],
)
def test_faults_are_found_and_mended(call, made, data, name, edit, vouched, message):
    change(data, name, edit, vouched)
    code, out = call(verify, data)
    assert (
        code == 2
        and f"00001.npy: {message}" in out
        and "1 of 3 shards are not sound: --repair" in out
    )
    code, out = call(verify, data, "--repair", "--num-workers", 0)
    assert (
        code == 0
        and "made 1 of 3 shards again" in out
        and ("manifest.json has the new sha256" in out) == vouched
    )
    assert call(verify, data)[0] == 0
    assert files(data) == files(made / "data")


def test_missing_and_cut_off_files_are_mended(call, made, data):
    (data / "moments/00000.npy").unlink()
    (data / "mirrored/00000.npy").write_bytes(b"")
    (data / "labels/00002.npy").write_bytes((data / "labels/00002.npy").read_bytes()[:-8])
    write_array(data / "mirrored/00001.npy", np.zeros((10, 4, 8, 8), np.float16))
    code, out = call(verify, data)
    assert (
        code == 2 and "00000.npy: moments: cannot be read" in out and "00002.npy: labels: " in out
    )
    assert "00000.npy: mirrored: cannot be read (No data left in file)" in out
    assert "00001.npy: mirrored: is float16 (10, 4, 8, 8), should be float16 (10, 8, 8, 8)" in out
    assert call(verify, data, "--repair", "--num-workers", 0)[0] == 0
    assert files(data) == files(made / "data")


def test_repair_takes_moved_sources_and_refuses_others(call, made, data, tmp_path):
    (data / "moments/00001.npy").unlink()
    shutil.copytree(made / "tree", tmp_path / "elsewhere")
    shutil.copytree(made / "vae", tmp_path / "vae")
    other = make_vae(tmp_path / "other", seed=1)
    code, out = call(verify, data, "--repair", "--vae", other)
    assert code == 2 and "vae_fingerprint was" in out
    assert not (data / "moments/00001.npy").exists()
    assert (
        call(
            verify, data, "--repair", "--source", tmp_path / "elsewhere", "--vae", tmp_path / "vae"
        )[0]
        == 0
    )
    assert torch.equal(
        LatentCache(data).gather(np.arange(24))[0],
        LatentCache(made / "data").gather(np.arange(24))[0],
    )


def test_statistics_of_the_whole(call, data):
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["mean"][0] += 0.01
    (data / "manifest.json").write_text(json.dumps(manifest))
    code, out = call(verify, data)
    assert code == 2 and "mean and std of manifest.json are not those of its shards" in out


def test_no_cache_is_one_line(call, tmp_path):
    code, out = call(verify, tmp_path)
    assert code == 2 and "no manifest.json" in out and "Traceback" not in out


def test_repair_counts_anew(call, tmp_path):
    """An image that was bad and has been mended is no longer skipped, nor one of none of the kinds."""
    source, vae = make_tree(tmp_path / "tree"), make_vae(tmp_path / "vae")
    good = (source / "class1/016.png").read_bytes()
    (source / "class1/016.png").write_bytes(b"")
    for i in (2, 5, 8, 11, 14, 17, 20, 23):  # all of a class, which is a shard that is empty
        (source / f"class2/{i:03d}.png").write_bytes(b"")
    flags = [
        "--source",
        source,
        "--dest",
        tmp_path / "data",
        "--vae",
        vae,
        "--resolution",
        32,
        "--shard-size",
        8,
        "--skip-bad",
    ]
    assert call(encode_latents, *flags, "--num-workers", 0)[0] == 0
    (source / "class1/016.png").write_bytes(good)
    (tmp_path / "data/labels/00001.npy").unlink()
    code, out = call(verify, tmp_path / "data", "--repair", "--num-workers", 0)
    assert code == 0 and "00001.npy is not to the byte what it was" in out
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    assert (manifest["count"], manifest["skipped"], manifest["kinds"]) == (16, 8, {"PNG RGB": 16})
    skipped = [
        json.loads(line)["file"]
        for line in (tmp_path / "data/skipped.jsonl").read_text().splitlines()
    ]
    assert (
        len(skipped) == 8
        and "class1/016.png" not in skipped
        and call(verify, tmp_path / "data")[0] == 0
    )
