"""Stored features equal the output of the encoder for the same images and are computed once."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch

from common.files import write_array, write_file
from common.processes import World
from dataset import TrainingStream, to_image_index
from latents.cache import CacheError, LatentCache
from latents.manifest import read_manifest
from models.errors import FieldError
from preprocessing import encode_features, verify
from preprocessing.build import build_cache
from preprocessing.encoder_features import build_features
from preprocessing.encoding import EncodingJob, EncodingSettings
from tests.preprocessing.test_encoding import read_files


class Encoder(torch.nn.Module):
    """Replaces models.encoder.Encoder. A token is the mean color of its square."""

    width = 3
    fingerprint = "f1"
    batch_sizes: list[int] = []  # noqa: RUF012  shared by all instances and cleared by the fixture
    interrupt_at: int | None = None

    def __init__(
        self, name, resolution, tokens_side, weights=None, pretrained=True, device="cpu", side=None
    ):
        super().__init__()
        if name == "unknown":
            raise FieldError("encoder", "unknown is no network")
        self.name = name
        self.tokens_side = tokens_side
        self.side = side or 224

    def forward(self, images):
        self.batch_sizes.append(len(images))
        if len(self.batch_sizes) == self.interrupt_at:
            raise KeyboardInterrupt
        means = torch.nn.functional.adaptive_avg_pool2d(images.float(), self.tokens_side)
        scale = 1e9 if self.name == "overflow" else 1
        return means.flatten(2).transpose(1, 2) * scale


@pytest.fixture
def encoder(monkeypatch):
    module = types.ModuleType("models.encoder")
    module.Encoder = Encoder
    monkeypatch.setitem(sys.modules, "models.encoder", module)
    Encoder.batch_sizes.clear()


@pytest.fixture(scope="module")
def original_cache(tmp_path_factory, tree, vae_folder):
    """A cache with images and without features."""
    dest = tmp_path_factory.mktemp("features") / "data"
    settings = EncodingSettings(
        tree, resolution=32, vae=str(vae_folder), shard_size=10, batch_size=4, keep_images=True
    )
    build_cache(dest, EncodingJob(settings, "cpu", 0, World()), World())
    return dest


@pytest.fixture
def data(original_cache, tmp_path):
    return shutil.copytree(original_cache, tmp_path / "data")


def test_stored_features_equal_the_output_of_the_encoder(call, encoder, data):
    code, out = call(encode_features, data, "--encoder", "a/b:c", "--batch-size", 4)
    assert code == 0 and "features/a-b-c-224-4x4: 24 x 16 x 3 float16, 0.00 GB" in out
    cache = LatentCache(data)
    assert cache.read_feature_metadata() == {
        "a-b-c-224-4x4": {
            "encoder": "a/b:c",
            "fingerprint": "f1",
            "side": 224,
            "tokens_side": 4,
            "width": 3,
            "dtype": "float16",
        }
    }
    # With patch size 2, latents of 8 x 8 have 4 x 4 tokens.
    image_index = np.array([23, 0, 10, 9, 0])
    squares = cache.read_input("images", image_index).float().reshape(5, 3, 4, 8, 4, 8)
    expected = squares.mean((3, 5)).flatten(2).transpose(1, 2)
    assert torch.equal(cache.read_input("features/a-b-c-224-4x4", image_index), expected.half())
    assert call(verify, data)[0] == 0


def test_training_stream_reads_features_of_its_images(call, encoder, data):
    call(encode_features, data, "--encoder", "e")
    cache = LatentCache(data)
    name = "features/e-224-4x4"
    batch = TrainingStream(cache, 5, 8, inputs=[name])[4]
    image_index = to_image_index(batch.stream_position.numpy(), 24, 5)
    assert torch.equal(batch.inputs[name], cache.read_input("features/e-224-4x4", image_index))
    assert torch.equal(batch.moments, TrainingStream(cache, 5, 8)[4].moments)


def test_complete_features_are_not_computed_again(call, encoder, data):
    call(encode_features, data, "--encoder", "e")
    Encoder.batch_sizes.clear()
    code, out = call(encode_features, data, "--encoder", "e")
    assert code == 0 and "is already complete" in out and not Encoder.batch_sizes


def test_interrupted_command_resumes(call, encoder, data, original_cache, tmp_path, monkeypatch):
    flags = ["--encoder", "e", "--batch-size", 4, "--tokens-side", 2]
    monkeypatch.setattr(Encoder, "interrupt_at", 5)  # in the second shard
    assert call(encode_features, data, *flags)[0] == 130
    dest = data / "features/e-224-2x2"
    assert [path.name for path in dest.glob("*.npy")] == ["00000.npy"]
    assert not list(dest.glob(".*.partial"))
    assert LatentCache(data).read_feature_metadata() == {}

    monkeypatch.setattr(Encoder, "interrupt_at", None)
    Encoder.batch_sizes.clear()
    assert call(encode_features, data, *flags)[0] == 0
    assert Encoder.batch_sizes == [4, 4, 2, 4]
    uninterrupted = shutil.copytree(original_cache, tmp_path / "uninterrupted")
    assert call(encode_features, uninterrupted, *flags)[0] == 0
    assert read_files(dest) == read_files(uninterrupted / "features/e-224-2x2")


def test_joined_caches_return_the_features_of_both_caches(call, encoder, data, tmp_path):
    call(encode_features, data, "--encoder", "e")
    copy = shutil.copytree(data, tmp_path / "copy")
    path = copy / "features/e-224-4x4/00000.npy"
    write_array(path, -np.load(path))
    cache = LatentCache(data, copy)
    first = cache.read_input("features/e-224-4x4", np.array([3]))
    second = cache.read_input("features/e-224-4x4", np.array([24 + 3]))
    assert first.any() and torch.equal(second, -first)


def test_features_of_another_encoder_are_not_overwritten(call, encoder, data, monkeypatch):
    call(encode_features, data, "--encoder", "e")
    monkeypatch.setattr(Encoder, "fingerprint", "f2")
    code, out = call(encode_features, data, "--encoder", "e")
    assert code == 2
    assert "features with other settings (fingerprint was f1, is f2); remove it" in out


def test_features_of_changed_images_are_not_read(call, encoder, data, tmp_path):
    call(encode_features, data, "--encoder", "e")
    copy = shutil.copytree(data, tmp_path / "copy")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["shards"][1]["sha256"]["images"] = "changed"
    (data / "manifest.json").write_text(json.dumps(manifest))
    cache = LatentCache(data)
    assert cache.read_feature_metadata() == {}
    assert LatentCache(data, copy).read_feature_metadata() == {}
    with pytest.raises(CacheError, match=r"no features named e-224-4x4.*none.*preprocessing"):
        TrainingStream(cache, 0, 8, inputs=["features/e-224-4x4"])
    code, out = call(encode_features, data, "--encoder", "e")
    assert code == 2 and "features of images that have changed; remove it" in out


def test_damaged_metadata_gives_an_error(call, encoder, data):
    call(encode_features, data, "--encoder", "e")
    (data / "features/e-224-4x4/features.json").write_text("{")
    with pytest.raises(CacheError, match=r"features\.json cannot be read.*remove"):
        LatentCache(data).read_feature_metadata()


def test_damaged_features_give_an_error_before_training(call, encoder, data):
    call(encode_features, data, "--encoder", "e")
    (data / "features/e-224-4x4/00002.npy").write_bytes(b"")
    message = r"00002\.npy cannot be read .*remove .*e-224-4x4 and .*encode_features"
    with pytest.raises(CacheError, match=message):
        TrainingStream(LatentCache(data), 0, 8, inputs=["features/e-224-4x4"])


def test_invalid_input_gives_an_error_without_traceback(call, encoder, data, cache, tmp_path):
    manifest = json.loads((data / "manifest.json").read_text())
    write_file(tmp_path / "flipped/manifest.json", json.dumps(manifest | {"flips": True}).encode())
    for flags, message in (
        ((cache, "--encoder", "e"), "was created without --keep-images"),
        ((tmp_path / "flipped", "--encoder", "e"), "features of flipped images is not supported"),
        ((data, "--encoder", "unknown"), "unknown is no network"),
        ((data, "--encoder", "a,b"), "pass one encoder, and run this command once per encoder"),
        ((data, "--encoder", "e", "--tokens-side", 0), "--tokens-side: 0 is not a"),
        ((data, "--encoder", "e", "--tokens-side", 33), "--tokens-side 33 is larger than"),
        ((data, "--encoder", "overflow"), "overflow produces features of"),
        ((tmp_path, "--encoder", "e"), "no manifest.json"),
    ):
        code, out = call(encode_features, *flags)
        assert code == 2 and message in out and "Traceback" not in out, out
    assert not list(data.glob("features/*/*.npy")) and not list(data.glob("features/*/.*.partial"))


class SecondProcess(World):
    """The second of two simulated processes; it runs before the first and records its results."""

    def __init__(self):
        super().__init__()
        self.rank = 1
        self.num_processes = 2
        self.results = []

    def broadcast(self, value):
        return value

    def run_on_first_rank(self, compute):
        self.results.append(compute())
        return self.results[-1]

    def all_gather(self, value):
        return [value]

    def barrier(self):
        pass


class FirstProcess(SecondProcess):
    """The first of two simulated processes; it uses the results that the second recorded."""

    def __init__(self, results):
        super().__init__()
        self.rank = 0
        self.results = results

    def run_on_first_rank(self, compute):
        return self.results.pop(0)


def test_shards_are_distributed_over_processes(encoder, data, original_cache, tmp_path):
    def build(root, world):
        plan = {"encoder": "e", "tokens_side": 2, "width": 3}
        dest = root / "features/e"
        manifest = read_manifest(root)
        assert build_features(root, manifest, dest, plan, Encoder("e", 32, 2), 4, world)
        return sorted(path.name for path in dest.glob("*.npy"))

    second = SecondProcess()
    assert build(data, second) == ["00001.npy"]
    first = FirstProcess(second.results)
    assert build(data, first) == ["00000.npy", "00001.npy", "00002.npy"]
    single = shutil.copytree(original_cache, tmp_path / "single")
    build(single, World())
    assert read_files(data) == read_files(single)
