"""Stored features are the encoder's own, of the right images, and made once. A small stand-in takes the encoder's place."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch

from common.files import write_file
from common.processes import World
from dataset import TrainingStream, to_image_index
from latents.cache import CacheError, LatentCache, read_manifest
from models.errors import FieldError
from preprocessing import encode_features, encoder_features, verify
from tests.preprocessing.test_encoding import file_contents


class Encoder(torch.nn.Module):
    """Means of each of three colours over the tokens' squares."""

    width, fingerprint, calls = 3, "f1", []

    def __init__(
        self, name, resolution, tokens_side, weights=None, pretrained=True, device="cpu", side=None
    ):
        super().__init__()
        if name == "unknown":
            raise FieldError("encoder", "unknown is no network")
        self.name, self.tokens_side, self.side = name, tokens_side, side or 224

    def forward(self, images):
        self.calls.append(len(images))
        if len(self.calls) == 5 and self.name == "tires":
            raise KeyboardInterrupt
        means = torch.nn.functional.adaptive_avg_pool2d(images.float(), self.tokens_side)
        return means.flatten(2).transpose(1, 2) * (1e9 if self.name == "large" else 1)


@pytest.fixture
def encoder(monkeypatch):
    module = types.ModuleType("models.encoder")
    module.Encoder = Encoder
    monkeypatch.setitem(sys.modules, "models.encoder", module)
    Encoder.calls.clear()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tree, vae_folder):
    from common.processes import World
    from preprocessing.build import build_cache
    from preprocessing.encoding import EncodingJob, EncodingSettings

    dest = tmp_path_factory.mktemp("features") / "data"
    settings = EncodingSettings(
        str(tree), resolution=32, vae=str(vae_folder), shard_size=10, batch_size=4, keep_images=True
    )
    build_cache(dest, EncodingJob(settings, "cpu", 0, World()), World())
    return dest


@pytest.fixture
def kept(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "data")


def test_they_are_the_encoders_of_the_kept_images(call, encoder, kept):
    code, out = call(encode_features, kept, "--encoder", "a/b:c", "--batch-size", 4)
    assert code == 0 and "features/a-b-c-224-4x4: 24 x 16 x 3 float16, 0.00 GB" in out
    data, index = LatentCache(kept), np.array([23, 0, 10, 9, 0])
    (slug,) = data.read_feature_metadata()
    assert data.read_feature_metadata()[slug] == {
        "encoder": "a/b:c",
        "fingerprint": "f1",
        "side": 224,
        "tokens_side": 4,
        "width": 3,
        "dtype": "float16",
    }
    images = (
        data.images(index).float().reshape(5, 3, 4, 8, 4, 8)
    )  # latents of side 8, cut by patch 2: 4 x 4 tokens
    expected = images.mean((3, 5)).flatten(2).transpose(1, 2)
    assert torch.equal(data.features(slug, index), expected.half())
    batch = TrainingStream(data, 5, 8, inputs=[f"features/{slug}"])[4]
    assert torch.equal(
        batch.inputs[f"features/{slug}"],
        data.features(slug, to_image_index(batch.stream_position.numpy(), 24, 5)),
    )
    assert torch.equal(batch.moments, TrainingStream(data, 5, 8)[4].moments)
    assert call(verify, kept)[0] == 0
    calls = len(Encoder.calls)
    assert (
        "is complete already" in call(encode_features, kept, "--encoder", "a/b:c")[1]
        and len(Encoder.calls) == calls
    )


def test_stopped_it_goes_on(call, encoder, kept, whole, tmp_path, monkeypatch):
    given = [kept, "--encoder", "tires", "--batch-size", 4, "--tokens-side", 2]
    assert call(encode_features, *given)[0] == 130
    dest = kept / "features/tires-224-2x2"
    assert sorted(path.name for path in dest.glob("*.npy")) == ["00000.npy"] and not list(
        dest.glob(".*.partial")
    )
    assert LatentCache(kept).read_feature_metadata() == {}
    Encoder.calls[:] = [0] * 5  # tired no more
    assert call(encode_features, *given)[0] == 0 and Encoder.calls[5:] == [4, 4, 2, 4]
    whole = shutil.copytree(whole, tmp_path / "whole")
    assert call(encode_features, whole, *given[1:])[0] == 0
    assert file_contents(dest) == file_contents(whole / "features/tires-224-2x2")


def test_features_of_other_images_or_another_encoder_are_not_read(call, encoder, kept, monkeypatch):
    given = [kept, "--encoder", "e"]
    assert call(encode_features, *given)[0] == 0
    both = LatentCache(kept, shutil.copytree(kept, kept.parent / "again"))
    assert torch.equal(
        both.features("e-224-4x4", np.array([3])), both.features("e-224-4x4", np.array([27]))
    )
    monkeypatch.setattr(Encoder, "fingerprint", "f2")
    code, out = call(encode_features, *given)
    assert (
        code == 2 and "holds features made otherwise (fingerprint was f1, is f2): remove it" in out
    )
    monkeypatch.setattr(Encoder, "fingerprint", "f1")
    manifest = json.loads((kept / "manifest.json").read_text())
    manifest["shards"][1]["sha256"]["images"] = "others"
    (kept / "manifest.json").write_text(json.dumps(manifest))
    data = LatentCache(kept)
    assert data.read_feature_metadata() == {}
    with pytest.raises(
        CacheError,
        match=r"no features e-224-4x4 \(available: none\); create them with python -m preproc",
    ):
        TrainingStream(data, 0, 8, inputs=["features/e-224-4x4"])
    assert (
        "features of images that have changed since: remove it" in call(encode_features, *given)[1]
    )
    assert LatentCache(kept, kept.parent / "again").read_feature_metadata() == {}
    (kept / "features/e-224-4x4/features.json").write_text("{")
    with pytest.raises(CacheError, match=r"features\.json cannot be read.*remove"):
        LatentCache(kept).read_feature_metadata()


def test_damaged_features_are_named_before_training(call, encoder, kept):
    assert call(encode_features, kept, "--encoder", "e")[0] == 0
    (kept / "features/e-224-4x4/00002.npy").write_bytes(b"")
    with pytest.raises(
        CacheError, match=r"00002\.npy cannot be read .*remove .*e-224-4x4 and run .* again"
    ):
        TrainingStream(LatentCache(kept), 0, 8, inputs=["features/e-224-4x4"])


def test_mistakes_are_one_line(call, encoder, kept, cache, tmp_path):
    manifest = json.loads((kept / "manifest.json").read_text())
    write_file(tmp_path / "flipped/manifest.json", json.dumps(manifest | {"flips": True}).encode())
    for given, message in (
        ((cache, "--encoder", "e"), "was made without --keep-images"),
        ((tmp_path / "flipped", "--encoder", "e"), "features of mirror images are not kept"),
        ((kept, "--encoder", "unknown"), "unknown is no network"),
        ((kept, "--encoder", "e", "--tokens-side", 0), "--tokens-side: 0 is not a whole number"),
        ((kept, "--encoder", "large"), "large makes values of"),
        ((tmp_path, "--encoder", "e"), "no manifest.json"),
    ):
        code, out = call(encode_features, *given)
        assert code == 2 and message in out and "Traceback" not in out, out
    assert not list(kept.glob("features/*/*.npy")) and not list(kept.glob("features/*/.*.partial"))


class Second(World):
    """The second of two processes, before the first: alone it finds out what is to be done, and the first hears of it."""

    def __init__(self):
        super().__init__()
        self.rank, self.num_processes, self.said = 1, 2, []

    def broadcast(self, value):
        return value

    def run_on_first_rank(self, compute):
        self.said.append(compute())
        return self.said[-1]

    def all_gather(self, value):
        return [value]

    def barrier(self):
        pass


class First(Second):
    """The first, after it."""

    def __init__(self, said):
        super().__init__()
        self.rank, self.said = 0, said

    def run_on_first_rank(self, compute):
        return self.said.pop(0)


def test_processes_share_the_shards(call, encoder, kept, whole, tmp_path):
    plan, dest = {"encoder": "e", "tokens_side": 2, "width": 3}, kept / "features/e"
    second = Second()
    for world, made in (
        (second, ["00001.npy"]),
        (First(second.said), ["00000.npy", "00001.npy", "00002.npy"]),
    ):
        assert encoder_features.make(
            kept, read_manifest(kept), dest, plan, Encoder("e", 32, 2), 4, world
        )
        assert sorted(path.name for path in dest.glob("*.npy")) == made
    whole = shutil.copytree(whole, tmp_path / "whole")
    encoder_features.make(
        whole, read_manifest(whole), whole / "features/e", plan, Encoder("e", 32, 2), 4, World()
    )
    assert file_contents(kept) == file_contents(whole)
