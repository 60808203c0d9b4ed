"""Flow matching plus alignment: L = L_denoising + sum over methods of lambda L_align (SRA 2, arXiv:2601.17830).

Pure functions of tensors; all of it in float32 whatever the autocast, since a normalisation in half precision is a known
source of NaN. B batch, N tokens, D numbers a token.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from interpolant import Interpolant, interpolate, regression_target


class Alignment(NamedTuple):
    """How one method's tokens are compared with its target."""

    loss: str = "cosine"  # of ALIGN_LOSSES
    beta: float = 0.05  # smooth_l1's
    t_range: tuple[float, float] = (0.0, 1.0)


COSINE = Alignment()


class LossTerms(NamedTuple):
    """One number per sample and term, so that weighting and averaging stay with the caller. Dicts are by method."""

    denoising: Tensor  # (B,)
    align: dict[str, Tensor]  # (B,), zero outside the timestep window and for a method that is idle
    cosine: dict[
        str, Tensor
    ]  # (B,), between head output and target whatever the loss: a gauge, without gradient
    token_norm: dict[
        str, Tensor
    ]  # (B,), length of the aligned block's tokens: a gauge, without gradient


def denoising_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of velocity, x or eps: (B, ...), (B, ...) -> (B,)."""
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


def alignment_loss(pred: Tensor, target: Tensor, t: Tensor, how: Alignment = COSINE) -> Tensor:
    """Distance between projected tokens and target tokens, zero where t lies outside the window.

    (B, N, D), (B, N, D), (B,) -> (B,). No gradient flows into the target. A sample outside the window counts as zero
    rather than leaving the mean, so narrowing the window never raises the weight of the samples that stay.
    """
    assert pred.shape == target.shape, (pred.shape, target.shape)
    lo, hi = how.t_range
    distance = ALIGN_LOSSES[how.loss](pred, target.detach(), how.beta)
    return torch.where((t >= lo) & (t <= hi), distance, torch.zeros_like(distance))


def training_losses(
    model: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]],
    path: Interpolant,
    prediction: str,
    latent: Tensor,
    labels: Tensor,
    noise: Tensor,
    t: Tensor,
    targets: dict[str, Tensor] | None = None,
    align: dict[str, Alignment] | None = None,
) -> LossTerms:
    """All terms for one batch.

    model(x_t, t, labels) -> what it predicts (B, C, H, W), and by method projected tokens (B, N, D) and token norm (B,);
    latent and noise (B, C, H, W), labels and t (B,); targets (B, N, D) by method: one that has none is idle.
    """
    targets, align = targets or {}, align or {}
    x_t, _ = interpolate(path, latent, noise, t)
    pred, projected, token_norm = model(x_t, t, labels)
    denoising = denoising_loss(pred, regression_target(path, prediction, latent, noise, t))
    zero = torch.zeros_like(denoising)
    distance, cosine = (dict.fromkeys(align, zero) for _ in range(2))
    for name, target in targets.items():
        distance[name] = alignment_loss(projected[name], target, t, align[name])
        cosine[name] = 1 - cosine_distance(projected[name].detach(), target.detach())
    return LossTerms(denoising, distance, cosine, dict.fromkeys(align, zero) | token_norm)
