"""Flow matching and alignment losses (SRA 2, arXiv:2601.17830): L = L_denoising + lambda L_align.

All losses are pure functions that return one value per sample. The training step weights and
averages these values. The losses are computed in float32 even under autocast, because normalization
in half precision can produce NaN. Shapes: B batch, N tokens, D token dimension.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def denoising_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of a predicted velocity, x or eps: 2 x (B, ...) -> (B,)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def cosine_distance(prediction: Tensor, target: Tensor, beta: float = 0.0) -> Tensor:
    """Return 1 - cosine similarity, averaged over tokens: 2 x (B, N, D) -> (B,)."""
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean(-1)


def smooth_l1(prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    """Return the mean smooth L1 distance, which is quadratic below beta and linear above.

    In table 1 of the paper, this loss with beta = 0.05 gives the best results.
    """
    distance = F.smooth_l1_loss(prediction.float(), target.float(), beta=beta, reduction="none")
    return distance.mean((1, 2))


def l1(prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    """Return the mean absolute error."""
    return (prediction.float() - target.float()).abs().mean((1, 2))


def l2(prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    """Return the mean squared error."""
    return (prediction.float() - target.float()).square().mean((1, 2))


ALIGN_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "cosine": cosine_distance,
    "smooth_l1": smooth_l1,
    "l1": l1,
    "l2": l2,
}


def alignment_loss(
    prediction: Tensor,
    target: Tensor,
    t: Tensor,
    loss: str = "cosine",
    beta: float = 0.05,
    t_range: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Return the distance between projected tokens and target tokens.

    The loss of samples outside `t_range` is zero. They stay in the batch mean, so that a narrower
    range does not increase the weight of the other samples. The target receives no gradient.

    Args:
        prediction: Projected tokens (B, N, D).
        target: Target tokens (B, N, D).
        t: Timesteps (B,).
        loss: A key of ALIGN_LOSSES.
        beta: Distance at which smooth_l1 changes from quadratic to linear.
        t_range: Lowest and highest timestep with a nonzero loss.

    Returns:
        One value per sample, (B,).
    """
    assert prediction.shape == target.shape, (prediction.shape, target.shape)
    low, high = t_range
    distance = ALIGN_LOSSES[loss](prediction, target.detach(), beta)
    return torch.where((t >= low) & (t <= high), distance, torch.zeros_like(distance))


def standardize_tokens(tokens: Tensor, alpha: float) -> Tensor:
    """Standardize each channel over the tokens of an image, as iREPA does with its targets.

    The result is (x - alpha mean(x)) / (std(x) + 1e-6), where the mean and the unbiased standard
    deviation are over the N tokens (arXiv:2512.10794, spatial_zscore in its code).

    Args:
        tokens: Target tokens (B, N, D).
        alpha: Fraction of the mean that is subtracted.
    """
    tokens = tokens.float()
    std, mean = torch.std_mean(tokens, dim=1, keepdim=True)
    return (tokens - alpha * mean) / (std + 1e-6)
