"""Tests of the comparison with the code of the authors, with a fake repository of REPA."""

import json
import subprocess

import pytest
import torch

import loss
from benchmarks import rivals
from benchmarks.authors_code import describe_files, replay_random_numbers
from benchmarks.rival_methods import REPA
from benchmarks.table_rows import list_differences
from tests.helpers import write_files

# A repository with the interface of REPA's. It uses our network, but computes the loss itself.
FILES = {
    "models/sit.py": """
import torch
from models.projector import Projector
from models.sit import SiT as Backbone
from models.sit import SiTConfig

class SiT(Backbone):
    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads,
                 num_classes, encoder_depth, z_dims, **_):
        super().__init__(SiTConfig(depth, hidden_size, num_heads, patch_size, input_size,
                                   in_channels, num_classes))
        self.encoder_depth = encoder_depth
        self.projectors = torch.nn.ModuleList(
            Projector(hidden_size, z_dim, 3, 2048) for z_dim in z_dims
        )

    def forward(self, x, t, y):
        y = torch.where(torch.rand(len(y)) < 0.1, self.config.num_classes, y)
        velocity, tokens = super().forward(x, t, y, return_blocks=[self.encoder_depth])
        return velocity, [head(tokens[self.encoder_depth]) for head in self.projectors]
""",
    "loss.py": """
import torch

class SILoss:
    def __call__(self, model, images, model_kwargs, zs):
        t = torch.rand((len(images), 1, 1, 1))
        noise = torch.randn_like(images)
        velocity, projected = model((1 - t) * images + t * noise, t.flatten(), **model_kwargs)
        error = (velocity - (noise - images)).pow(2).mean((1, 2, 3))
        cosines = [self.cosine(z, p) for z, p in zip(zs, projected)]
        return error, -torch.stack(cosines).mean()

    def cosine(self, a, b):
        return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
""",
}


@pytest.fixture
def repository(tmp_path):
    return write_files(tmp_path / "REPA", FILES)


@pytest.fixture
def compare(call, repository, tmp_path, monkeypatch):
    """Return a function that runs the command with a tiny network, and returns its output."""
    size = rivals.Size(width=24, latent_size=8)
    monkeypatch.setattr(rivals, "Size", lambda: size)
    file = tmp_path / "rivals.json"

    def run():
        code, output = call(rivals, "--repa-repository", repository, "--json", file)
        return code, output, json.loads(file.read_text())["results"]

    return run


def test_losses_and_gradients_agree_with_the_authors_code_and_the_formulas(compare):
    code, _, results = compare()
    assert code == 0
    assert list(results) == ["SRA 2, cosine", "SRA 2, smooth L1", "REPA", "REPA, two encoders"]
    for entry in results.values():
        assert max(list_differences(entry)) < 1e-5
        assert entry["gradient"]["parameters"] > 130
        assert entry["gradient"]["norm"] > 1
    repa = results["REPA"]
    assert repa["losses"]["alignment"]["expected_offset"] == 1
    assert repa["files"].keys() == {"loss.py", "models/sit.py"}


def compare_along_tokens(prediction, target, beta):
    return 1 - torch.nn.functional.cosine_similarity(prediction, target, dim=1).mean(-1)


def double_gradient(prediction, target, beta):
    distance = loss.cosine_distance(prediction, target)
    return 2 * distance - distance.detach()


@pytest.mark.parametrize("wrong_loss", [compare_along_tokens, double_gradient])
def test_wrong_loss_is_detected(compare, monkeypatch, wrong_loss):
    monkeypatch.setitem(loss.ALIGN_LOSSES, "cosine", wrong_loss)
    monkeypatch.setattr(rivals, "AUTHORS_METHODS", [REPA])
    code, output, results = compare()
    assert code == 2
    assert "SRA 2, cosine, REPA: a loss or gradient differs" in output
    assert max(list_differences(results["SRA 2, smooth L1"])) < 1e-5


def test_missing_clone_is_reported(call, tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "FORMULAS", [])
    code, output = call(rivals, "--sra-repository", tmp_path)
    assert code == 2
    assert "--sra-repository" in output and "pass a clone" in output


def test_all_random_numbers_must_be_drawn_in_their_shapes():
    numbers = torch.rand(2, 3)
    with replay_random_numbers(rand=[numbers], randn_like=[numbers]):
        assert torch.rand((2, 3)) is numbers
        assert torch.randn_like(torch.zeros(2, 3)) is numbers
    with pytest.raises(AssertionError), replay_random_numbers(rand=[numbers]):
        torch.rand(3, 2)
    with pytest.raises(AssertionError, match="not drawn"), replay_random_numbers(rand=[numbers]):
        pass


def test_commit_is_recorded_if_it_contains_the_files(repository):
    def git(*arguments):
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", repository, *author, *arguments], check=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "message")
    clone = describe_files(repository, ["loss.py"])
    assert len(clone["checked_out"]) == len(clone["files"]["loss.py"]) == 40
    (repository / "loss.py").write_text("changed")
    assert describe_files(repository, ["loss.py"])["checked_out"] is None
