"""What the blocks of a SiT hold at each noise level: PCA maps, and features to probe and to compare.

Every checkpoint sees the same x_t: the latent is the posterior's mean, the noise depends on the seed and the image's number
alone. The label is the null class, else a probe would read off what the conditioning wrote into every token. Probe and CKNNA
see a block's tokens averaged over the grid, as REPA's (arXiv:2410.06940). Of the images drawn the first half trains the probe;
the other half is what its accuracy and CKNNA are of, and what is shown. (Both may have trained the SiT.)
n images of both halves, m of them shown, B of a batch, C h w a latent, N tokens, D width.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common.keyed_random import Purpose, normal, uniform
from experiments.feature_picture import Maps
from experiments.representation import Neighbours, cknna, fit_probe, neighbours, principal, wilson
from interpolant import INTERPOLANTS, interpolate
from latents.cache import LatentCache
from models.autoencoder import Autoencoder, LatentScale
from models.sit import SiT

MOST_BLOCKS = 8


def spread(depth: int) -> list[int]:
    """All blocks, or MOST_BLOCKS of them, the first and the last among them."""
    return sorted(
        {round(1 + i * (depth - 1) / (MOST_BLOCKS - 1)) for i in range(MOST_BLOCKS)}
        if depth > 1
        else {1}
    )


class Data(NamedTuple):
    """The images looked at: the first half trains the probe, the rest is held out."""

    index: np.ndarray  # (n,) their numbers in the cache
    latents: Tensor  # (n, C, h, w)
    noise: Tensor  # (n, C, h, w)
    labels: Tensor  # (n,)

    @property
    def half(self) -> int:
        return len(self.index) // 2

    def at(self, path_type: str, t: float, rows: slice | Tensor = slice(None)) -> Tensor:
        """x_t of some of the images."""
        x = self.latents[rows]
        return interpolate(INTERPOLANTS[path_type], x, self.noise[rows], torch.full((len(x),), t))[
            0
        ]


def read(cache: LatentCache, n: int, seed: int) -> Data:
    """n images, drawn without replacement in an order of the seed's."""
    order = uniform(seed, Purpose.NOISE, torch.arange(len(cache)), draw=1).argsort(stable=True)[:n]
    moments, labels = cache.gather(order.numpy())
    noise = normal(seed, Purpose.NOISE, order, tuple(cache.manifest.latent_shape)).float()
    scale = LatentScale(cache.manifest.scale, cache.manifest.shift)
    return Data(order.numpy(), scale.mean(moments), noise, labels)


def choose(data: Data, m: int) -> Tensor:
    """Rows (m,) of images to show: held out, each of a class not shown yet, as long as there is one."""
    seen: dict[int, int] = {}
    rank = []
    for label in data.labels[data.half :].tolist():
        rank.append(seen.get(label, 0))
        seen[label] = rank[-1] + 1
    return data.half + torch.tensor(rank).argsort(stable=True)[:m]


@torch.no_grad()
def pooled(
    model: SiT, data: Data, path_type: str, t: float, blocks: list[int], size: int, bar: tqdm
) -> dict[int, Tensor]:
    """The tokens after each block averaged over the grid: {k: (n, D)}, on the model's device. One pass for all blocks."""
    rows: dict[int, list[Tensor]] = {k: [] for k in blocks}
    for start in range(0, len(data.index), size):
        tokens = features(model, data.at(path_type, t, slice(start, start + size)), t, blocks)
        for k in blocks:
            rows[k].append(tokens[k].mean(1))
        bar.update(len(tokens[blocks[0]]))
    bar.set_postfix_str(f"probes at t = {t:g}")
    return {k: torch.cat(parts) for k, parts in rows.items()}


def features(model: SiT, x_t: Tensor, t: float, blocks: list[int]) -> dict[int, Tensor]:
    """{k: (B, N, D)} for the null class."""
    x_t = x_t.to(model.pos_embed.device)
    null = torch.full((len(x_t),), model.config.num_classes, device=x_t.device)
    return model.features(x_t, torch.full((len(x_t),), t, device=x_t.device), null, blocks)


def judge(
    space: Tensor, data: Data, num_classes: int, to: Neighbours | None
) -> dict[str, float | None]:
    """Features (n, D) -> accuracy of the probe on the half it has not seen, its interval, and CKNNA of that half."""
    labels, half = data.labels.to(space.device), data.half
    probe = fit_probe(space[:half], labels[:half], num_classes)
    hits = (probe.logits(space[half:]).argmax(1) == labels[half:]).sum().item()
    low, high = wilson(hits, len(space) - half)
    found = {"accuracy": hits / (len(space) - half), "low": low, "high": high}
    value = math.nan if to is None else cknna(neighbours(space[half:]), to)
    return {**found, "cknna": None if math.isnan(value) else value}


def baselines(
    data: Data, paths: list[str], times: list[float], judged: Callable[[Tensor], dict]
) -> Iterator[dict]:
    """What there is before any block: the latent, and x_t."""
    yield {"space": "latent, averaged", **judged(data.latents.mean((2, 3)))}
    yield {"space": "latent, flattened", **judged(data.latents.flatten(1))}
    for path in paths:
        for t in times:
            yield {
                "space": "x_t, flattened",
                "path_type": path,
                "t": t,
                **judged(data.at(path, t).flatten(1)),
            }


@torch.no_grad()
def maps(
    model: SiT,
    data: Data,
    path_type: str,
    rows: Tensor,
    blocks: list[int],
    times: list[float],
    vae: Autoencoder,
) -> tuple[Maps, dict[tuple[float, int], float]]:
    """The pictures of the shown images, and how much of the variance of each (t, block) their three components hold.

    Components, and the range of the colours, are of the tokens of all shown images at one block and t (SRA's pca-vis fits each
    image by itself), so that a colour means the same in all of them; x_t has those of the latents.
    """
    device, m = model.pos_embed.device, len(rows)
    pixels = data.latents[rows].movedim(1, -1)
    basis = principal(pixels.flatten(0, 2))
    found = Maps(
        vae.decode(data.latents[rows].to(device)).permute(0, 2, 3, 1).cpu().numpy(),
        basis.colours(pixels).numpy(),
        {},
        {},
        {},
    )
    side = model.config.latent_size // model.config.patch
    before = (
        F.adaptive_avg_pool2d(basis.scores(pixels).movedim(-1, 1), side)
        .movedim(1, -1)
        .reshape(-1, 3)
        .to(device)
    )
    share, signs = {}, {}
    for t in times:
        x_t = data.at(path_type, t, rows)
        found.noised[t] = vae.decode(x_t.to(device)).permute(0, 2, 3, 1).cpu().numpy()
        found.x_t[t] = basis.colours(x_t.movedim(1, -1)).numpy()
        for k, tokens in features(model, x_t, t, blocks).items():
            own = principal(tokens.flatten(0, 1), signs.get(k, before))
            before = signs[k] = own.scores(tokens).flatten(0, 1)
            found.blocks[t, k] = own.colours(tokens).reshape(m, side, side, 3).cpu().numpy()
            share[t, k] = own.share
    return found, share
