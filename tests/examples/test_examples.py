"""Run the training loops in examples/, and check the text of docs/use-elsewhere.md."""

import os
import re
import shutil
import statistics
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel

from examples import diffusers_transformer, plain_pytorch
from models.projector import latent_tokens
from tests.helpers import ROOT
from tests.test_imports import ALLOWED, find_imported_modules, get_top_level_names, parse_file

COPIED_FILES = ("loss.py", "interpolant.py", "models/projector.py")
PAGE = ROOT / "docs/use-elsewhere.md"


def assert_alignment_loss_falls(losses) -> None:
    alignment = [loss.alignment for loss in losses]
    assert 0.9 < alignment[0] < 1.1
    assert statistics.mean(alignment[-10:]) < 0.7


def test_plain_loop_aligns_a_network_and_saves_it_without_the_head(tmp_path):
    losses = plain_pytorch.train(40, tmp_path / "model.pt")
    assert_alignment_loss_falls(losses)
    saved = torch.load(tmp_path / "model.pt")
    assert saved.keys() == plain_pytorch.Transformer().state_dict().keys()


@pytest.mark.parametrize(
    ("kind", "network_class"), [("dit", DiTTransformer2DModel), ("sd3", SD3Transformer2DModel)]
)
def test_diffusers_loop_aligns_a_network_and_saves_it_without_the_head(
    kind, network_class, tmp_path
):
    AcceleratorState._reset_state(reset_partial_state=True)
    losses = diffusers_transformer.train(kind, 40, tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert_alignment_loss_falls(losses)
    loaded, report = network_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.num_layers == 4


def test_token_order_of_another_transformer_is_checked():
    latents = torch.zeros(1, 4, 8, 8)
    diffusers_transformer.check_token_order(lambda x: latent_tokens(x, 2), latents, 2)
    with pytest.raises(ValueError, match=r"the tokens \[0, 4, 8, 12, 1, "):
        diffusers_transformer.check_token_order(lambda x: latent_tokens(x.mT, 2), latents, 2)


def test_three_copied_files_are_enough(tmp_path):
    for name in (*COPIED_FILES, "examples/plain_pytorch.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.move(tmp_path / "examples/plain_pytorch.py", tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # nothing else of this repository can be imported
    subprocess.run(
        [sys.executable, "plain_pytorch.py", "--steps", "1", "--out", "model.pt"],
        cwd=tmp_path,
        env=environment,
        timeout=240,
        check=True,
    )
    assert (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("name", COPIED_FILES)
def test_copied_files_may_be_moved_because_they_do_not_import_each_other(name):
    modules = find_imported_modules(list(parse_file(name).body))
    assert not get_top_level_names(modules) & set(ALLOWED)


def test_page_shows_the_lines_of_the_examples():
    def strip_lines(text):
        return "\n".join(line.strip() for line in text.splitlines())

    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    sources = [strip_lines(path.read_text()) for path in (ROOT / "examples").glob("*.py")]
    assert len(blocks) >= 4
    for block in blocks:
        assert any(strip_lines(block) in source for source in sources), block
