"""Thirty-odd images as people have them: each comes out as docs/data.md says, and none takes anything else with it."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from latents.cache import LatentCache, read_manifest
from preprocessing import encode_latents
from tests.helpers import ROOT
from tests.preprocessing.unusual_images import BAD, IGNORED, make_hostile

MEASURED = """
import resource, sys
from common import cli
from preprocessing import encode_latents
try:
    cli.run(encode_latents.main)
finally:
    own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("peak", max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) // 1024, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The folder, and what is expected of each file."""
    folder = tmp_path_factory.mktemp("hostile") / "tree"
    return folder, make_hostile(folder)


def encode(source, dest, vae, *more):
    """The command in a process of its own; its exit code, output, and the peak memory of it or a worker, in MB."""
    flags = [
        "--source",
        source,
        "--dest",
        dest,
        "--resolution",
        32,
        "--vae",
        vae,
        "--batch-size",
        4,
        "--num-workers",
        2,
        *more,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, flags)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )
    peak = int(re.search(r"peak (\d+)", result.stderr).group(1))
    return result.returncode, result.stdout + result.stderr, peak


def test_each_comes_out_as_documented(hostile, vae_folder, tmp_path):
    folder, expected = hostile
    assert len(expected) >= 30
    code, out, peak = encode(folder, tmp_path / "data", vae_folder, "--skip-bad")
    assert code == 0 and "Traceback" not in out, out
    manifest = read_manifest(tmp_path / "data")
    bad = {name for name, (outcome, _) in expected.items() if outcome == BAD}
    good = {name for name, (outcome, _) in expected.items() if outcome == ""}
    assert (manifest.count, manifest.skipped) == (len(good), len(bad))
    for row in map(json.loads, (tmp_path / "data/skipped.jsonl").read_text().splitlines()):
        name = row["file"].split("/", 1)[1]
        bad.remove(name)
        assert expected[name][1] in row["reason"], row
    assert not bad
    for what in {
        expected[name][1] for name in good
    }:  # as many of each kind as are expected, and it is told
        count = sum(number for kind, number in manifest.kinds.items() if kind.endswith(what))
        assert count >= sum(expected[name][1] == what for name in good), (what, manifest.kinds)
        assert re.search(rf"\d .*{re.escape(what)}", out)
    assert manifest.kinds["16 bits: rounded to 8"] == 2 and manifest.kinds["turned by EXIF"] == 1
    assert LatentCache(tmp_path / "data").gather(np.arange(manifest.count))[0].isfinite().all()
    assert peak < 1500, f"{peak} MB"


def test_a_bad_one_stops_it_by_name(call, hostile, vae_folder, tmp_path):
    given = [
        "--source",
        hostile[0],
        "--dest",
        tmp_path / "data",
        "--resolution",
        32,
        "--vae",
        vae_folder,
        "--num-workers",
        0,
    ]
    code, out = call(encode_latents, *given)
    assert (
        code == 2
        and "class/bomb.png cannot be used (more than 89,478,485 pixels); mend it or pass --skip-bad"
        in out
    )
    assert "Traceback" not in out and not (tmp_path / "data/manifest.json").exists()


def test_the_page_about_data_names_every_outcome(hostile):
    page = (ROOT / "docs/data.md").read_text()
    for outcome, what in hostile[1].values():
        if outcome == "" and ":" in what:
            assert what.split(":")[0].replace("32", "N") in page.replace("**", ""), what
    assert all(word in page for word in ("89,478,485", "truncated", "hidden", IGNORED))
