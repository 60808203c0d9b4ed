"""Tests of the comparison with REPA's repository, and of the session on a GPU."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    encode,
    evaluation,
    gpu_session,
    repa,
    sampling,
    start,
    table_rows,
    train_step,
    vae,
)
from common.cli import UserError
from dataset import CachedBatch
from tests.helpers import write_files

# A repository with the interfaces that the benchmark uses, and tiny functions.
FILES = {
    "models/sit.py": """
import torch

class Network(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        assert options["input_size"] == 8 and options["z_dims"] == [768]
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t, y):
        return self.scale * x, [self.scale * torch.ones(len(x), 16, 768)]

SiT_models = {"SiT-XL/2": Network}
""",
    "loss.py": """
class SILoss:
    def __call__(self, model, images, model_kwargs, zs):
        output, projected = model(images, None, **model_kwargs)
        return output.square().flatten(1).mean(1), (projected[0] * zs[0]).flatten(1).mean(1)
""",
    "train.py": """
import a_package_that_does_not_exist

@torch.no_grad()
def sample_posterior(moments, latents_scale=1., latents_bias=0.):
    return moments.chunk(2, dim=1)[0] * latents_scale + latents_bias

def preprocess_raw_image(x, enc_type):
    return x

def update_ema(ema_model, model, decay=0.9999):
    for average, parameter in zip(ema_model.parameters(), model.parameters()):
        average.mul_(decay).add_(parameter.data, alpha=1 - decay)
        print("parameter", parameter.item())
""",
}


@pytest.fixture
def repository(tmp_path):
    return write_files(tmp_path / "REPA", FILES)


def test_step_of_repas_repository_trains_its_network(repository, capsys):
    batch = CachedBatch(
        torch.arange(4),
        torch.randn(4, 8, 8, 8),
        torch.zeros(4, dtype=torch.int64),
        {"images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)},
    )
    make = repa.make_repa_step
    step = make(repository, "SiT-XL/2", batch, torch.device("cpu"), with_encoder=False)
    step()
    step()
    values = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(values) == 2 and 1 > values[0] > values[1]
    with pytest.raises(UserError, match="--model SiT-Ti/2: REPA's repository has no such network"):
        make(repository, "SiT-Ti/2", batch, torch.device("cpu"), with_encoder=False)
    loop = repository / "train.py"
    loop.write_text(loop.read_text().replace("update_ema", "update_average"))
    with pytest.raises(UserError, match=r"train\.py does not contain update_ema"):
        make(repository, "SiT-XL/2", batch, torch.device("cpu"), with_encoder=False)
    (repository / "loss.py").unlink()
    with pytest.raises(UserError, match=r"--repa-repository: .*loss\.py does not exist; pass"):
        make(repository, "SiT-XL/2", batch, torch.device("cpu"), with_encoder=False)


def test_table_lists_the_step_of_repas_repository():
    """Its precision is not that of the run, and its share of the matmul rate is not computed."""
    ours = {"step_s": 0.1, "images_per_s": 40, "matmul_share": 0.5, "first_step_s": 3}
    theirs = {"step_s": 0.2, "images_per_s": 20, "first_step_s": 1}
    result = {
        "machine": {"device": "NVIDIA H200", "cuda": "13"},
        "model": "SiT-XL/2",
        "batch_size": 4,
        "precision": "bf16",
        "compile": True,
        "results": {"sra2": ours, "REPA's loop": theirs},
        "ratios": {"REPA's loop/sra2": 2.0},
    }
    assert list(table_rows.train_step_rows(result)) == [
        "NVIDIA H200 | SiT-XL/2, batch 4, bf16, compiled | sra2 | 0.1 | 40 | 50% | 3 | ",
        "NVIDIA H200 | SiT-XL/2, batch 4 | REPA's loop | 0.2 | 20 |  | 1 | 2.000 relative to sra2",
    ]


def run_session(monkeypatch, call, tmp_path, seconds_per_command, *flags):
    """Run the session with a simulated clock, and return the commands and the output."""
    now = 0.0
    commands = []

    def run(command, timeout, check):
        nonlocal now
        assert "--trial" in flags or now + timeout <= 600
        now += seconds_per_command
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(gpu_session, "time", SimpleNamespace(monotonic=lambda: now))
    code, out = call(gpu_session, "--dest", tmp_path / "a folder", *flags)
    assert code == 0
    return commands, out


def test_session_skips_measurements_for_which_no_time_is_left(monkeypatch, call, tmp_path):
    commands, out = run_session(monkeypatch, call, tmp_path, 100, "--minutes", 5)
    plan = gpu_session.plan_measurements(None, tmp_path / "a folder")
    # 100 s remain after two commands: enough for the third one, and not for the others.
    assert [str(tmp_path / f"a folder/{m.name}.json") for m in plan[:3]] == [
        c[-1] for c in commands
    ]
    assert out.count("skipped, 0 s remain") == len(plan) - 3


@pytest.mark.parametrize("flags", [(), ("--trial",)])
def test_commands_of_the_session_have_valid_flags(monkeypatch, call, tmp_path, flags):
    modules = {m.__name__: m for m in (train_step, sampling, encode, evaluation, vae, start)}
    commands, _ = run_session(monkeypatch, call, tmp_path, 0, "--repa-repository", tmp_path, *flags)
    assert len(commands) == len(gpu_session.plan_measurements(None, tmp_path))
    for command in commands:
        # All unknown flags are reported together, after the values of the others were checked.
        code, out = call(modules[command[2]], *command[3:], "--unknown")
        assert code == 2 and "unrecognized arguments: --unknown" in out, out
