"""Load a checkpoint of this repository as the frozen network of an alignment target."""

from dataclasses import asdict
from pathlib import Path

import torch

from checkpointing.pretrained import load
from checkpointing.storage import CheckpointError
from latents.manifest import Manifest
from models.errors import FieldError
from models.sit import SiTConfig
from models.target import FrozenNetwork


def load_frozen_network(
    path: Path,
    needs_null_class: bool,
    network: SiTConfig,
    path_type: str,
    manifest: Manifest,
    device: torch.device,
) -> FrozenNetwork:
    """Load the EMA of a run, a checkpoint or an export, and check that it fits a run.

    Args:
        path: The run, checkpoint or export.
        needs_null_class: Whether the network is evaluated with the null class.
        network: Architecture of the run's backbone.
        path_type: Interpolant of the run.
        manifest: Manifest of the run's latent cache.
        device: Device of the run.

    Raises:
        FieldError: The checkpoint cannot be read, or does not fit the run; the field is
            "checkpoint".
    """
    try:
        if path.is_file() and path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is a file of another repository: pass a run of this one")
        pretrained = load(path)
    except CheckpointError as error:
        raise FieldError("checkpoint", str(error)) from None
    if pretrained.model.config != network:
        difference = (
            f"is {pretrained.identity['model']}, which differs from the network of this run "
            f"({_describe_difference(pretrained.model.config, network)})"
        )
    elif pretrained.vae_fingerprint != manifest.vae_fingerprint:
        difference = "was trained on the latents of another VAE"
    elif pretrained.path_type != path_type:
        difference = f"was trained with --path-type {pretrained.path_type}"
    elif needs_null_class and not pretrained.trained_labels.has_null_class:
        difference = (
            "was trained with --cfg-prob 0 and has no null class, which --selftrans-guidance needs"
        )
    else:
        model = pretrained.model.to(device)
        return FrozenNetwork(model, pretrained.identity["ema_sha256"])
    raise FieldError("checkpoint", f"{path} {difference}: pass another checkpoint")


def _describe_difference(frozen: SiTConfig, network: SiTConfig) -> str:
    """Return the fields in which two architectures differ, with both values."""
    return ", ".join(
        f"{key} {value} instead of {getattr(network, key)}"
        for key, value in asdict(frozen).items()
        if value != getattr(network, key)
    )
