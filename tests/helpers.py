"""Makes small things of the real formats, and runs commands under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def make_vae(folder: Path, seed: int = 0, latent_channels: int = 4, shift: float | None = 0.25) -> Path:
    """A random AutoencoderKL, f4, as save_pretrained writes it."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=latent_channels, sample_size=32,
        scaling_factor=0.7, shift_factor=shift,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return folder


def make_tree(folder: Path, images: int = 24, side: int = 32) -> Path:
    """class/image.png, three classes."""
    rng = np.random.default_rng(0)
    for i in range(images):
        path = folder / f"class{i % 3}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return folder


def torchrun(processes: int, script: str, *flags) -> str:
    """The script under torchrun on this machine's CPU; raises if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", script, *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def train_flags(cache: Path, exps: Path, name: str, *more) -> list[str]:
    """A run of the smallest model, without previews."""
    flags = f"--data-dir {cache} --output-dir {exps} --exp-name {name} --model SiT-Ti/2 --batch-size 8 --learning-rate 1e-3"
    rest = "--num-workers 0 --log-every 1 --sampling-steps 0 --ema-decay 0.9 --projector-width 64"
    return [*flags.split(), *rest.split(), *map(str, more)]
