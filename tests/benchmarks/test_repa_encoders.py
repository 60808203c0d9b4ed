"""Tests of the comparison of encoders with REPA's code, which needs clones of repositories."""

import json

import torch

from benchmarks import repa_encoders
from benchmarks.repa_encoders import FILES, DepthLimit
from models.repa_encoders import REPA_ENCODERS
from tests.helpers import ROOT


def test_recorded_comparison_covers_the_encoders_and_their_tokens_are_equal():
    path = ROOT / "benchmarks/results/repa-encoders.json"
    result = json.loads(path.read_text())
    rows = result["encoders"]
    assert list(rows) == list(FILES)
    # REPA loads the other sizes of DINOv2 with the same code.
    others = {f"dinov2{kind}-vit-{size}" for kind in ("", "reg") for size in "slg"}
    assert set(REPA_ENCODERS) - others == set(rows)
    for name, row in rows.items():
        assert row["file"] == REPA_ENCODERS[name].file
        assert row["relative_difference"] <= result["tolerance"] == 1e-5
    largest = max(row["relative_difference"] for row in rows.values())
    text = (ROOT / "docs/method.md").read_text()
    assert f"largest difference is {largest:.0e}" in text


def test_networks_of_other_repositories_need_their_clones(call, tmp_path):
    flags = ("--repa-repository", tmp_path, "--encoders", "dinov1-vit-b")
    code, out = call(repa_encoders, *flags)
    assert code == 2 and "--encoders dinov1-vit-b needs --dino-repository" in out


def test_depth_limit_shortens_networks_and_records_their_depth():
    class Network(torch.nn.Module):
        def __init__(self, width, depth):
            super().__init__()
            self.sizes = (width, depth)

    limit = DepthLimit(2)
    with limit.patch(Network):
        assert Network(8, depth=12).sizes == (8, 2)
        assert Network(8, depth=1).sizes == (8, 1)
    assert limit.requested == {12, 1}
    assert Network(8, depth=12).sizes == (8, 12)
