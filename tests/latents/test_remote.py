"""Test caches under a URL: copies, ranged requests, failures and their messages."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest
import torch

import train
from common.files import sha256
from dataset import TrainingStream
from latents.cache import CacheError, LatentCache
from latents.remote import files as remote_files
from latents.remote import http_files, local_copy
from latents.remote.array import RemoteArray
from latents.remote.local_copy import LocalCopy, resolve_local_cache
from latents.sources import RemoteSource, copy_moments
from preprocessing import verify
from tests.helpers import call_main, train_flags
from tests.latents.http_server import serve

INDEX = np.array([23, 0, 9, 10, 11, 0])


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    monkeypatch.setattr(remote_files, "FIRST_DELAY", 1e-5)
    monkeypatch.setattr(http_files, "CHUNK_BYTES", 512)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server(cache_copy):
    with serve(cache_copy) as server:
        yield server


def assert_same_rows(remote: LatentCache, root) -> None:
    for actual, expected in zip(remote.gather(INDEX), LatentCache(root).gather(INDEX)):
        assert torch.equal(actual, expected)


# Ranged requests


def test_rows_are_read_by_ranged_requests(server, cache):
    data = LatentCache(server.url)
    server.requests.clear()
    assert_same_rows(data, cache)
    row_bytes = data.manifest.moments_format.itemsize
    assert server.count_bytes() == len(INDEX) * row_bytes  # duplicates are requested again


def test_all_rows_of_a_batch_are_requested_at_once(server, monkeypatch):
    data = LatentCache(server.url)
    rows = []
    monkeypatch.setattr(RemoteArray, "prefetch", lambda array, row: rows.append(row))
    data.gather(INDEX)
    assert len(rows) == len(INDEX)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_remote_stream_equals_the_local_one(flipped_cache, num_workers):
    with serve(flipped_cache) as server:
        stream = TrainingStream(LatentCache(server.url), 0, 8)
        local = TrainingStream(LatentCache(flipped_cache), 0, 8)
        for step, batch in enumerate(stream.read_batches(0, 4, num_workers, pin_memory=False)):
            assert torch.equal(batch.moments, local[step].moments)
            assert torch.equal(batch.labels, local[step].labels)


def test_remote_cache_can_be_passed_to_a_spawned_process(server, cache):
    data = LatentCache(server.url)
    data.gather(INDEX)
    server.requests.clear()
    assert_same_rows(pickle.loads(pickle.dumps(data)), cache)
    assert len(server.requests) == len(INDEX)  # the files are not validated again


def test_cache_in_ram_is_filled_from_the_server(server, cache):
    data = LatentCache(server.url)
    data.load_into_ram()
    server.requests.clear()
    assert_same_rows(data, cache)
    assert not server.requests


def test_requests_are_repeated_after_transient_errors(server, cache):
    failures = {0: 503, 1: -100, 2: 429}
    server.fail = lambda path, requested, number: failures.get(number)
    assert_same_rows(LatentCache(server.url), cache)


def test_permanent_failure_ends_in_one_line(server):
    data = LatentCache(server.url)
    server.fail = lambda *_: 503
    message = rf"^{server.url}/moments/\d+\.npy cannot be read after 12 attempts \(HTTP status 503 "
    with pytest.raises(CacheError, match=message):
        data.gather(INDEX)
    server.fail = lambda *_: 403
    with pytest.raises(
        CacheError, match=r"HTTP status 403 Forbidden\); check the URL and the cred"
    ):
        data.gather(INDEX)


def test_server_without_ranges_is_reported_or_copied(server, cache, tmp_path):
    server.supports_ranges = False
    with pytest.raises(CacheError, match=r"does not support .* ranges of bytes; .*--local-cache"):
        LatentCache(server.url)
    assert_same_rows(LatentCache(server.url, local_cache=tmp_path / "local"), cache)


def test_file_that_changes_while_it_is_read_is_reported(server):
    data = LatentCache(server.url)
    path = server.folder / "moments/00000.npy"
    path.write_bytes(path.read_bytes() + b"0")
    message = r"00000\.npy has changed since it was first read; rerun"
    with pytest.raises(CacheError, match=message):
        data.gather(np.array([0]))
    os.truncate(path, 128)
    with pytest.raises(CacheError, match=message):
        data.gather(np.array([0]))


def test_wrong_range_is_reported(server):
    data = LatentCache(server.url)
    server.shift = 1
    with pytest.raises(CacheError, match=r"00000\.npy: the server answered .* 'bytes 129-"):
        data.gather(np.array([0]))


def test_damaged_and_missing_files_are_reported(server):
    path = server.folder / "labels/00001.npy"
    os.truncate(path, path.stat().st_size - 1)
    message = rf"{server.url}/labels/00001\.npy cannot be read \(the file is truncated\); check the"
    with pytest.raises(CacheError, match=message):
        LatentCache(server.url)
    path.write_bytes(b"")
    with pytest.raises(
        CacheError, match=r"labels/00001\.npy cannot be read \(No data left in file"
    ):
        LatentCache(server.url)
    path.unlink()
    with pytest.raises(CacheError, match=r"labels/00001\.npy cannot be read \(\[Errno 2\] No such"):
        LatentCache(server.url)
    (server.folder / "manifest.json").unlink()
    with pytest.raises(CacheError, match="is not a latent cache"):
        LatentCache(server.url)


def test_features_and_images_are_read(cache, tmp_path):
    root = shutil.copytree(cache, tmp_path / "data")
    add_images_and_features(root)
    local = LatentCache(root)
    with serve(root) as server:
        for local_cache in (None, tmp_path / "local"):
            data = LatentCache(server.url, local_cache=local_cache)
            assert data.read_feature_metadata() == local.read_feature_metadata() != {}
            for folder in ("images", "features/encoder"):
                assert torch.equal(data.read_input(folder, INDEX), local.read_input(folder, INDEX))
        assert len(list((tmp_path / "local").rglob("features/encoder/*.npy"))) == 3


def add_images_and_features(root) -> None:
    """Add random images and features with the format of `preprocessing.encode_features`."""
    rng = np.random.default_rng(0)
    manifest = json.loads((root / "manifest.json").read_text())
    plan = {"encoder": "e", "fingerprint": "f", "side": 32, "tokens_side": 2, "width": 8}
    plan |= {"dtype": "float16", "shards": []}
    for shard in manifest["shards"]:
        count, file = shard["count"], shard["file"]
        arrays = {
            "images": rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8),
            "features/encoder": rng.standard_normal((count, 4, 8)).astype(np.float16),
        }
        for folder, array in arrays.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            np.save(root / folder / file, array)
        shard["sha256"]["images"] = sha256(root / "images" / file)
        plan["shards"].append(
            {
                "file": file,
                "sha256": sha256(root / "features/encoder" / file),
                "images_sha256": shard["sha256"]["images"],
            }
        )
    (root / "features/encoder/features.json").write_text(json.dumps(plan))
    (root / "manifest.json").write_text(json.dumps(manifest | {"images": True}))


# Copies


def test_copy_is_made_once_and_is_a_valid_cache(server, cache, tmp_path, capsys, call):
    local = tmp_path / "local"
    assert_same_rows(LatentCache(server.url, local_cache=local), cache)
    assert f"copying moments and labels of {server.url} to {local}" in capsys.readouterr().out
    server.requests.clear()
    assert_same_rows(LatentCache(server.url, local_cache=local), cache)
    assert server.requests == [("/manifest.json", "")]
    (copy,) = local.iterdir()
    code, out = call(verify, copy)
    assert code == 0 and "is valid: 3 shards" in out


def test_interrupted_copy_is_continued(server, cache, tmp_path):
    def fail(path, requested, number):
        if path.startswith("/moments"):
            return 503 if requested or number else -3072
        return None

    local = tmp_path / "local"
    server.fail = fail
    with pytest.raises(CacheError, match=r"cannot be read after 12 attempts"):
        LatentCache(server.url, local_cache=local)
    sizes = [path.stat().st_size for path in local.rglob(".*.partial")]
    assert max(sizes) == 3072
    server.fail = lambda *_: None
    server.requests.clear()
    assert_same_rows(LatentCache(server.url, local_cache=local), cache)
    continued = [requested for _, requested in server.requests if requested]
    assert sorted(continued) == sorted(f"bytes={size - 1}-" for size in sizes if size > 1)
    assert not list(local.rglob(".*.partial"))


def test_connection_may_break_any_number_of_times_while_bytes_arrive(server, cache, tmp_path):
    server.fail = lambda path, *_: -1000 if path.startswith("/moments") else None
    assert_same_rows(LatentCache(server.url, local_cache=tmp_path / "local"), cache)


def test_damaged_partial_file_is_copied_again(server, cache, tmp_path):
    source = RemoteSource(server.url, tmp_path)
    folder = source._make_local_copy("moments", tmp_path).folder
    (folder / "moments").mkdir(parents=True)
    (folder / "moments/.00000.npy.partial").write_bytes(b"0" * 3000)
    (folder / "moments/.00001.npy.partial").write_bytes(b"0" * 10**6)  # longer than the file
    assert_same_rows(LatentCache(server.url, local_cache=tmp_path), cache)


def test_source_that_differs_from_its_manifest_is_reported(server, tmp_path):
    path = server.folder / "moments/00002.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    message = rf"^{server.url}/moments/00002\.npy does not have the sha256 that the manifest states"
    with pytest.raises(CacheError, match=message):
        LatentCache(server.url, local_cache=tmp_path / "local")


def test_copy_that_does_not_fit_is_replaced_by_ranged_requests(
    server, cache, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(local_copy, "RESERVED_BYTES", 1e18)
    assert_same_rows(LatentCache(server.url, local_cache=tmp_path / "local"), cache)
    out = capsys.readouterr().out
    assert "are read by ranged requests, because a copy needs 0.0 GB, but only 0.0 GB are" in out


def test_copied_moments_are_a_cache(server, cache, tmp_path):
    folder = copy_moments(server.url, tmp_path)
    assert folder.parent == tmp_path
    assert_same_rows(LatentCache(folder), cache)
    assert copy_moments(server.url, None) == server.url
    (folder / "manifest.json").unlink()  # the process was killed before it wrote this last file
    assert_same_rows(LatentCache(copy_moments(server.url, tmp_path)), cache)


def test_complete_copy_on_a_full_disk_is_used(server, tmp_path, monkeypatch):
    LatentCache(server.url, local_cache=tmp_path)
    monkeypatch.setattr(local_copy, "RESERVED_BYTES", 1e18)
    assert not LatentCache(server.url, local_cache=tmp_path).is_remote


def test_local_cache_that_is_a_file_is_reported(server, tmp_path):
    local = tmp_path / "file"
    local.touch()
    with pytest.raises(CacheError, match=r"cannot be written \(Not a directory\); .*--local-cache"):
        LatentCache(server.url, local_cache=local)


def test_full_disk_is_reported(server, tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(local_copy, "fsync", fail)
    message = r"cannot be written \(No space left on device\); .*--local-cache none"
    with pytest.raises(CacheError, match=message):
        LatentCache(server.url, local_cache=tmp_path / "local")


HOLD_LOCK = """
import fcntl, sys, time
file = open(sys.argv[1], "wb")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_process_waits_for_another_one_that_copies(server, tmp_path, monkeypatch):
    copy = LocalCopy(RemoteSource(server.url, None).files, tmp_path)
    command = [sys.executable, "-c", HOLD_LOCK, str(tmp_path / ".lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as holder:
        assert holder.stdout.readline() == b"locked\n"
        waits = []

        def wait_and_release(seconds):
            waits.append(seconds)
            holder.communicate()

        monkeypatch.setattr(local_copy.time, "sleep", wait_and_release)
        with copy.locked():
            assert len(waits) == 1


def test_an_interrupt_stops_the_copy(server, tmp_path, monkeypatch):
    def interrupt(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(remote_files, "FIRST_DELAY", 30.0)
    monkeypatch.setattr(local_copy, "as_completed", interrupt)
    source = RemoteSource(server.url, tmp_path / "local")
    # Each thread waits at least 15 seconds for its second attempt, which fails permanently.
    server.fail = lambda path, requested, number: 404 if number else 503
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        source.prepare(source.manifest.required_formats)
    assert time.monotonic() - start < 15


def test_default_folder_of_copies(monkeypatch, tmp_path):
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    monkeypatch.setattr(local_copy.tempfile, "gettempdir", lambda: str(tmp_path))
    assert resolve_local_cache("auto") == tmp_path / f"latents-{os.getuid()}"
    monkeypatch.setenv("SLURM_TMPDIR", "/scratch/1")
    assert str(resolve_local_cache("auto")) == "/scratch/1/latents"
    assert resolve_local_cache("none") is None


# Commands and other protocols


def test_fsspec_reads_other_protocols(cache, tmp_path):
    url = f"file://{cache}"
    assert_same_rows(LatentCache(url), cache)
    assert_same_rows(LatentCache(url, local_cache=tmp_path), cache)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("unknown://bucket", "unknown://bucket cannot be opened"),
        ("https://user@host/cache", r"the URL for host contains credentials, .*~/\.netrc"),
        ("ftp://user:secret@host/cache", "the URL for host contains credentials"),
        ("https://host/cache?token=secret", r"the URL for host contains \? or #"),
        ("http://user:secret@[::1/cache", "the URL is invalid"),
    ],
)
def test_urls_that_cannot_be_read_are_reported(url, message):
    with pytest.raises(CacheError, match=message) as error:
        LatentCache(url)
    assert "secret" not in str(error.value)


def test_missing_package_is_reported(monkeypatch):
    def fail(url):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    message = r"gs:// requires a further package; install it with pip install gcsfs"
    with pytest.raises(CacheError, match=message):
        LatentCache("gs://bucket/cache")


def test_training_continues_with_a_remote_cache(server, cache, tmp_path, call):
    exps = tmp_path / "exps"
    call_main(train, *train_flags(cache, exps, "run", "--max-train-steps", 1))
    for step, local_cache in ((2, tmp_path / "local"), (3, "none")):
        flags = train_flags(server.url, exps, "run", "--max-train-steps", step)
        code, out = call(train, *flags, "--local-cache", local_cache)
        assert code == 0 and f"finished at step {step}" in out, out
        is_slow = local_cache == "none"
        assert ("pass --num-workers 4 to read several batches ahead" in out) == is_slow


def test_commands_that_need_a_folder_refuse_urls(call):
    code, out = call(verify, "s3://bucket/cache")
    assert code == 2 and "looks like a URL, which only --data-dir and --eval-latents" in out
