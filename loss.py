"""Flow matching plus alignment: L = L_velocity + lambda L_align (SRA 2, arXiv:2601.17830).

Pure functions of tensors; all of it in float32 whatever the autocast, since a normalisation in half precision is a known
source of NaN. B batch, N tokens, D numbers a token."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from interpolant import Path, interpolate


class LossTerms(NamedTuple):
    """One number per sample and term, so that weighting and averaging stay with the caller."""

    velocity: Tensor  # (B,)
    align: Tensor  # (B,), zero outside the timestep window and without alignment
    cosine: Tensor  # (B,), between head output and target whatever the loss: a gauge, without gradient
    token_norm: Tensor  # (B,), length of the aligned block's tokens: a gauge, without gradient


def velocity_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error: (B, ...), (B, ...) -> (B,)."""
    return (pred.float() - target.float()).square().flatten(1).mean(1)


def cosine_distance(pred: Tensor, target: Tensor, beta: float = 0.0) -> Tensor:
    """1 - cosine over a token's D numbers (dim=-1), averaged over tokens: (B, N, D), (B, N, D) -> (B,)."""
    return 1 - F.cosine_similarity(pred.float(), target.float(), dim=-1).mean(-1)


def smooth_l1(pred: Tensor, target: Tensor, beta: float) -> Tensor:
    """Quadratic below beta, linear above, averaged over all numbers; the paper's best with beta = 0.05."""
    return F.smooth_l1_loss(pred.float(), target.float(), beta=beta, reduction="none").mean((1, 2))


def l1(pred: Tensor, target: Tensor, beta: float) -> Tensor:
    """Mean absolute error."""
    return (pred.float() - target.float()).abs().mean((1, 2))


def l2(pred: Tensor, target: Tensor, beta: float) -> Tensor:
    """Mean squared error."""
    return (pred.float() - target.float()).square().mean((1, 2))


ALIGN_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "cosine": cosine_distance,
    "smooth_l1": smooth_l1,
    "l1": l1,
    "l2": l2,
}


def alignment_loss(
    pred: Tensor, target: Tensor, t: Tensor, kind: str = "cosine", beta: float = 0.05, t_range: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Distance between projected tokens and target tokens, zero where t lies outside [lo, hi].

    (B, N, D), (B, N, D), (B,) -> (B,). No gradient flows into the target. A sample outside the window counts as zero
    rather than leaving the mean, so narrowing the window never raises the weight of the samples that stay."""
    assert pred.shape == target.shape, (pred.shape, target.shape)
    lo, hi = t_range
    distance = ALIGN_LOSSES[kind](pred, target.detach(), beta)
    return torch.where((t >= lo) & (t <= hi), distance, torch.zeros_like(distance))


def training_losses(
    model: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None, Tensor | None]],
    path: Path,
    latent: Tensor,
    labels: Tensor,
    noise: Tensor,
    t: Tensor,
    target: Tensor | None = None,
    **align,
) -> LossTerms:
    """Both terms for one batch.

    model(x_t, t, labels) -> velocity (B, C, H, W), projected tokens (B, N, D) and token norm (B,), both None without a head;
    latent and noise (B, C, H, W), labels and t (B,), target (B, N, D); align goes to alignment_loss."""
    x_t, v = interpolate(path, latent, noise, t)
    pred, projected, token_norm = model(x_t, t, labels)
    velocity = velocity_loss(pred, v)
    if projected is None:
        return LossTerms(velocity, *torch.zeros_like(velocity).expand(3, -1))
    cosine = 1 - cosine_distance(projected.detach(), target.detach())
    return LossTerms(velocity, alignment_loss(projected, target, t, **align), cosine, token_norm)
