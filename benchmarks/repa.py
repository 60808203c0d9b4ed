"""Run the training step of REPA's own repository, next to ours.

The network, the loss, and the functions of the training loop are loaded from a clone of
https://github.com/sihyun-yu/REPA. This module only repeats the order of the calls in the loop of
REPA's train.py: fp16 autocast with a gradient scaler, as accelerate configures them, clipping,
AdamW with PyTorch's defaults, the EMA, and three metrics that are read on the host in each step.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.authors_code import load_functions, load_module
from benchmarks.measure import Action
from benchmarks.variants import StepConfig, make_random_batch
from common.cli import UserError
from dataset import CachedBatch
from latents.manifest import Manifest

ENCODER = "vit_base_patch14_dinov2"  # timm's name of DINOv2-B, REPA's default encoder
ENCODER_WIDTH = 768
ENCODER_SIDE = 224
FLAG = "--repa-repository"

# Name of each step -> whether it runs the encoder.
REPA_STEPS = {"REPA's loop": True, "REPA's loop without encoder": False}


def load_train_functions(repository: Path) -> SimpleNamespace:
    """Load functions of REPA's train.py.

    The file cannot be imported, because its package `models` has the same name as ours.

    Raises:
        UserError: The file or one of the functions does not exist.
    """
    from timm import data
    from torchvision.transforms import Normalize

    variables = {
        "torch": torch,
        "OrderedDict": OrderedDict,
        "Normalize": Normalize,
        "IMAGENET_DEFAULT_MEAN": data.IMAGENET_DEFAULT_MEAN,
        "IMAGENET_DEFAULT_STD": data.IMAGENET_DEFAULT_STD,
        "CLIP_DEFAULT_MEAN": data.OPENAI_CLIP_MEAN,
        "CLIP_DEFAULT_STD": data.OPENAI_CLIP_STD,
    }
    names = ("sample_posterior", "update_ema", "preprocess_raw_image")
    return load_functions(repository / "train.py", FLAG, names, variables)


def make_repa_steps(
    repository: Path, config: StepConfig, manifest: Manifest, device: torch.device
) -> dict[str, Action]:
    """Return REPA's training step with its encoder and with fixed targets, by name."""
    batch = make_random_batch(manifest, config.batch_size)
    if device.type == "cuda":
        batch = batch.pin_memory()
    return {
        name: make_repa_step(repository, config.model, batch, device, with_encoder)
        for name, with_encoder in REPA_STEPS.items()
    }


def make_repa_step(
    repository: Path,
    model_name: str,
    batch: CachedBatch,
    device: torch.device,
    with_encoder: bool,
) -> Action:
    """Return REPA's training step on a fixed batch.

    Args:
        repository: A clone of REPA's repository.
        model_name: Name of the network, such as "SiT-XL/2".
        batch: Moments, labels and images (in `inputs["images"]`), on the host.
        device: Device of the step.
        with_encoder: Whether to run the encoder, with random weights, or to use fixed targets.

    Raises:
        UserError: The folder is not a clone of REPA's repository, or REPA has no such network.
    """
    networks = load_module(repository / "models" / "sit.py", FLAG).SiT_models
    compute_loss = load_module(repository / "loss.py", FLAG).SILoss()
    functions = load_train_functions(repository)
    if model_name not in networks:
        raise UserError(f"--model {model_name}: REPA's repository has no such network")
    latent_side = batch.moments.shape[-1]
    model = networks[model_name](
        input_size=latent_side,
        num_classes=1000,
        use_cfg=True,
        z_dims=[ENCODER_WIDTH],
        encoder_depth=8,
        fused_attn=True,
        qk_norm=False,
    ).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    has_fp16 = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=has_fp16)
    encode = make_encoder(device) if with_encoder else None
    num_tokens = (latent_side // 2) ** 2
    fixed_target = torch.randn(len(batch.labels), num_tokens, ENCODER_WIDTH, device=device)

    def step() -> None:
        images = batch.inputs["images"].to(device)
        moments = batch.moments.float().to(device)
        labels = batch.labels.to(device)
        autocast = torch.autocast(device.type, torch.float16, enabled=has_fp16)
        with torch.no_grad():
            latents = functions.sample_posterior(moments, latents_scale=0.18215, latents_bias=0.0)
            target = fixed_target
            if encode:
                with autocast:
                    inputs = functions.preprocess_raw_image(images, "dinov2")
                    target = encode(inputs)[:, 1:]
        with autocast:
            loss, projection_loss = compute_loss(model, latents, {"y": labels}, zs=[target])
        loss, projection_loss = loss.mean(), projection_loss.mean()
        scaler.scale(loss + 0.5 * projection_loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        functions.update_ema(ema, model)
        for value in (loss, projection_loss, norm):
            value.item()

    return step


def make_encoder(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the forward pass of DINOv2-B with random weights, which do not affect the speed."""
    import timm

    encoder = timm.create_model(ENCODER, pretrained=False, num_classes=0, img_size=ENCODER_SIDE)
    encoder.eval().requires_grad_(False).to(device)
    return partial(_forward_features, encoder)


def _forward_features(encoder: Any, images: Tensor) -> Tensor:
    return encoder.forward_features(images)
