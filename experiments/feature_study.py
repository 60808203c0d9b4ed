"""Extract features and colour maps from the blocks of a SiT at each noise level.

All checkpoints receive the same x_t: the latent is the mean of the posterior, and the noise depends
only on the seed and the image index. The label is the null class, because otherwise the probe could
predict the class from the conditioning that is added to each token. The probe and CKNNA use the
tokens of a block averaged over the grid, as in REPA (arXiv:2410.06940). The probe is trained on the
first half of the images. The accuracy, CKNNA and the maps are computed on the second half. (The SiT
may have been trained on both halves.)

Shapes: n images in both halves, m images in the figure, B images per batch, latents with C
channels, height h and width w, N tokens per image, feature dimension D.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.keyed_random import Purpose, normal, uniform
from common.progress import ProgressBar
from experiments.feature_figure import ColourMaps
from experiments.representation import (
    Neighbours,
    compute_cknna,
    compute_wilson_interval,
    find_neighbours,
    fit_colours,
    fit_probe,
)
from interpolant import INTERPOLANTS, interpolate
from latents.cache import LatentCache
from models.autoencoder import Autoencoder, LatentScale
from models.sit import SiT

MAX_BLOCKS = 8


def spread_blocks(depth: int) -> list[int]:
    """Return up to `MAX_BLOCKS` evenly spaced block numbers from 1 to `depth`."""
    return np.unique(np.linspace(1, depth, MAX_BLOCKS).round().astype(int)).tolist()


class StudyImages(NamedTuple):
    """The images of a study. The first half trains the probe, and the second half is held out."""

    image_index: np.ndarray  # rows of the cache, (n,)
    latents: Tensor  # (n, C, h, w)
    noise: Tensor  # (n, C, h, w)
    labels: Tensor  # (n,)

    @property
    def half(self) -> int:
        """Number of images that train the probe."""
        return len(self.image_index) // 2

    def add_noise(self, path_type: str, t: float, rows: slice | Tensor = slice(None)) -> Tensor:
        """Return x_t for the images at the given positions."""
        latents = self.latents[rows]
        times = torch.full((len(latents),), t)
        x_t, _ = interpolate(INTERPOLANTS[path_type], latents, self.noise[rows], times)
        return x_t


def draw_images(cache: LatentCache, count: int, seed: int) -> StudyImages:
    """Draw images without replacement, in a random order that depends on the seed."""
    keys = uniform(seed, Purpose.NOISE, torch.arange(len(cache)), draw=1)
    index = keys.argsort(stable=True)[:count]
    moments, labels = cache.gather(index.numpy())
    noise = normal(seed, Purpose.NOISE, index, tuple(cache.manifest.latent_shape)).float()
    scale = LatentScale(cache.manifest.scale, cache.manifest.shift)
    return StudyImages(index.numpy(), scale.mean(moments), noise, labels)


def choose_figure_images(images: StudyImages, count: int) -> Tensor:
    """Return the positions (m,) of held-out images for the figure, alternating between classes."""
    labels = images.labels[images.half :]
    occurrences = F.one_hot(labels).cumsum(0).gather(1, labels[:, None]).flatten()
    return images.half + occurrences.argsort(stable=True)[:count]


@torch.no_grad()
def pool_tokens(
    model: SiT, x_t: Tensor, t: float, blocks: list[int], batch_size: int, bar: ProgressBar
) -> dict[int, Tensor]:
    """Return the tokens after each block, averaged over the grid, from one pass for all blocks.

    Args:
        model: The network.
        x_t: Noisy latents, (n, C, h, w).
        t: The time of x_t.
        blocks: Block numbers, counted from 1.
        batch_size: Images per forward pass.
        bar: Progress bar, which counts images.

    Returns:
        Features (n, D) by block, on the device of the model.
    """
    pooled: dict[int, list[Tensor]] = {block: [] for block in blocks}
    for batch in x_t.split(batch_size):
        for block, tokens in compute_tokens(model, batch, t, blocks).items():
            pooled[block].append(tokens.mean(1))
        bar.update(len(batch))
    bar.set_postfix_str(f"probes at t = {t:g}")
    return {block: torch.cat(parts) for block, parts in pooled.items()}


def compute_tokens(model: SiT, x_t: Tensor, t: float, blocks: list[int]) -> dict[int, Tensor]:
    """Return the tokens (B, N, D) after each block, with the null class as the label."""
    x_t = x_t.to(model.pos_embed.device)
    labels = torch.full((len(x_t),), model.config.num_classes, device=x_t.device)
    times = torch.full((len(x_t),), t, device=x_t.device)
    return model.compute_block_tokens(x_t, times, labels, blocks)


def evaluate_features(
    features: Tensor,
    images: StudyImages,
    num_classes: int,
    reference: Neighbours | None = None,
) -> dict[str, float | None]:
    """Evaluate features with a linear probe and CKNNA.

    Args:
        features: Features of all images, (n, D).
        images: The images.
        num_classes: Number of classes.
        reference: Neighbours of the held-out images in the reference space of CKNNA.

    Returns:
        The "accuracy" of the probe on the held-out images, the ends "low" and "high" of its
        confidence interval, and "cknna", which is None without a reference.
    """
    half = images.half
    labels = images.labels.to(features.device)
    held_out = features[half:]
    probe = fit_probe(features[:half], labels[:half], num_classes)
    num_correct = (probe.logits(held_out).argmax(1) == labels[half:]).sum().item()
    low, high = compute_wilson_interval(num_correct, len(held_out))
    alignment = (
        math.nan if reference is None else compute_cknna(find_neighbours(held_out), reference)
    )
    return {
        "accuracy": num_correct / len(held_out),
        "low": low,
        "high": high,
        "cknna": None if math.isnan(alignment) else alignment,
    }


def evaluate_inputs(
    images: StudyImages,
    path_types: list[str],
    times: list[float],
    evaluate: Callable[[Tensor], dict],
) -> Iterator[dict]:
    """Yield the results of `evaluate` for the inputs of the network: latents and x_t."""
    yield {"space": "latent, averaged", **evaluate(images.latents.mean((2, 3)))}
    yield {"space": "latent, flattened", **evaluate(images.latents.flatten(1))}
    for path_type in path_types:
        for t in times:
            result = evaluate(images.add_noise(path_type, t).flatten(1))
            yield {"space": "x_t, flattened", "path_type": path_type, "t": t, **result}


@torch.no_grad()
def make_colour_maps(
    model: SiT,
    images: StudyImages,
    rows: Tensor,
    path_type: str,
    times: list[float],
    blocks: list[int],
    vae: Autoencoder,
) -> tuple[ColourMaps, dict[tuple[float, int], float]]:
    """Return the colour maps of the images in the figure.

    The components and the colour range of a time and block are fitted to the tokens of all m
    images, so that equal colours mean equal tokens across images. (The pca-vis of SRA fits each
    image separately.) The maps of x_t use the components of the latents.

    Args:
        model: The network.
        images: All images.
        rows: Positions of the images in the figure, (m,).
        path_type: The path with which the network was trained.
        times: The times of x_t.
        blocks: Block numbers, counted from 1.
        vae: The decoder of the latents.

    Returns:
        The maps, and the fraction of the variance that the components explain, by (t, block).
    """
    device = model.pos_embed.device
    side = model.config.latent_size // model.config.patch

    # Map the data. The components of the first block have the signs of the latents' components,
    # which are averaged per token.
    pixels = images.latents[rows].movedim(1, -1)
    latent_basis = fit_colours(pixels.flatten(0, 2))
    scores = latent_basis.scores(pixels).movedim(-1, 1)
    reference_scores = F.adaptive_avg_pool2d(scores, side).movedim(1, -1).reshape(-1, 3).to(device)
    decoded = decode(vae, images.latents[rows].to(device))
    maps = [[decoded, latent_basis.colours(pixels).numpy()]]

    # Map x_t and the blocks. The signs are those of the same block at the previous time or, at the
    # first time, those of the previous map.
    share: dict[tuple[float, int], float] = {}
    block_scores: dict[int, Tensor] = {}
    for t in times:
        x_t = images.add_noise(path_type, t, rows)
        decoded = decode(vae, x_t.to(device))
        maps.append([decoded, latent_basis.colours(x_t.movedim(1, -1)).numpy()])
        for block, tokens in compute_tokens(model, x_t, t, blocks).items():
            basis = fit_colours(tokens.flatten(0, 1), block_scores.get(block, reference_scores))
            reference_scores = basis.scores(tokens).flatten(0, 1)
            block_scores[block] = reference_scores
            colours = basis.colours(tokens).reshape(len(rows), side, side, 3)
            maps[-1].append(colours.cpu().numpy())
            share[t, block] = basis.share
    return maps, share


def decode(vae: Autoencoder, latents: Tensor) -> np.ndarray:
    """Decode latents (m, C, h, w) to uint8 images (m, H, W, 3)."""
    return vae.decode(latents).permute(0, 2, 3, 1).cpu().numpy()
