"""Unusual images are treated as docs/data.md documents, without affecting other images."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from latents.cache import LatentCache
from latents.manifest import read_manifest
from preprocessing import encode_latents
from tests.helpers import ROOT
from tests.preprocessing.unusual_images import BAD, GOOD, make_unusual_images

# Runs encode_latents, and prints the peak memory in MiB of this process and its workers.
MEASURE_MEMORY = """
import resource, sys
from common import cli
from preprocessing import encode_latents
try:
    cli.run(encode_latents.main)
finally:
    status = open("/proc/self/status").read().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print("peak", max(peak, workers) // 1024, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def unusual_folder(tmp_path_factory):
    """The folder of images, and the expected treatment by file name."""
    folder = tmp_path_factory.mktemp("unusual") / "tree"
    return folder, make_unusual_images(folder)


def make_flags(source, dest, vae, *more):
    options = ["--resolution", 32, "--batch-size", 4, *more]
    return ["--source", source, "--dest", dest, "--vae", vae, *options]


def test_images_are_treated_as_documented_in_little_memory(unusual_folder, vae_folder, tmp_path):
    folder, expected = unusual_folder
    options = ("--num-workers", 2, "--skip-bad")
    command = [sys.executable, "-c", MEASURE_MEMORY]
    command += map(str, make_flags(folder, tmp_path / "data", vae_folder, *options))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=200, check=False
    )
    out = result.stdout + result.stderr
    assert result.returncode == 0 and "Traceback" not in out, out

    good = {name: item.text for name, item in expected.items() if item.outcome == GOOD}
    bad = {name: item.text for name, item in expected.items() if item.outcome == BAD}
    assert len(expected) >= 30
    manifest = read_manifest(tmp_path / "data")
    assert (manifest.count, manifest.skipped) == (len(good), len(bad))
    assert LatentCache(tmp_path / "data").gather(np.arange(len(good)))[0].isfinite().all()

    lines = (tmp_path / "data/skipped.jsonl").read_text().splitlines()
    reasons = {row["file"].removeprefix("class/"): row["reason"] for row in map(json.loads, lines)}
    assert reasons.keys() == bad.keys()
    wrong = {name: reasons[name] for name in bad if bad[name].lower() not in reasons[name].lower()}
    assert not wrong

    kinds = list(good.values())
    for kind in set(kinds):
        # An image may be of several kinds, so more images than expected may be counted.
        count = sum(number for name, number in manifest.kinds.items() if name.endswith(kind))
        assert count >= kinds.count(kind), (kind, manifest.kinds)
        assert re.search(rf"\d .*{re.escape(kind)}", out)
    assert manifest.kinds["16 bits: rounded to 8"] == 2 and manifest.kinds["turned by EXIF"] == 1

    peak = int(re.search(r"peak (\d+)", result.stderr).group(1))
    assert peak < 1500, f"{peak} MiB"


def test_bad_image_stops_the_command_with_its_name(call, unusual_folder, vae_folder, tmp_path):
    folder, _ = unusual_folder
    options = ("--num-workers", 0)
    code, out = call(encode_latents, *make_flags(folder, tmp_path / "data", vae_folder, *options))
    assert code == 2
    reason = "more than 89,478,485 pixels"
    assert f"class/bomb.png cannot be used ({reason}); fix the file or pass --skip-bad" in out
    assert "Traceback" not in out
    assert not (tmp_path / "data/manifest.json").exists()


def test_documentation_lists_every_treatment(unusual_folder):
    _, expected = unusual_folder
    page = (ROOT / "docs/data.md").read_text()
    for outcome, text in expected.values():
        if outcome == GOOD and ":" in text:
            assert text.split(":")[0].replace("32", "N") in page, text
    assert all(word in page for word in ("89,478,485", "truncated", "hidden", "ignored"))
