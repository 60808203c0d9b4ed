"""Test that the figures in docs/ are regenerated to the byte from their JSON files."""

import re
import shutil

import matplotlib
import pytest

from experiments import ablate, convergence, paper
from experiments.results import load_result
from tests.helpers import ROOT

COMMANDS = {"ablate": ablate, "convergence": convergence, "paper": paper}
RESULTS = {
    path: command
    for command in COMMANDS
    for path in sorted((ROOT / "docs").glob("*.json"))
    if f'"study": "{command}",' in path.read_text()
}
(PINNED_VERSION,) = re.findall(
    r"^matplotlib==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
)


def test_every_kind_of_result_is_documented():
    assert {*RESULTS.values()} == {*COMMANDS}


@pytest.mark.skipif(
    matplotlib.__version__ != PINNED_VERSION, reason="the bytes depend on the version"
)
@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_figure_is_regenerated_to_the_byte(call, tmp_path, path):
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    code, out = call(COMMANDS[RESULTS[path]], "--plot", copy)
    assert code == 0, out
    assert load_result(copy, RESULTS[path])["command"] in copy.with_suffix(".md").read_text()
    assert copy.with_suffix(".png").read_bytes() == path.with_suffix(".png").read_bytes()
