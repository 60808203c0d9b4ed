"""How much arithmetic the networks need: matrix products alone, as PyTorch's FlopCounterMode counts them, which agrees.

One multiply-accumulate is two FLOPs.
"""

from models.sit import SiTConfig


def backbone_flops(config: SiTConfig, last: int | None = None) -> int:
    """Forward FLOPs of a SiT for one image (SiT-XL/2 at 256 pixels: 2 x 118.6 G); with `last`, of the tokens after it."""
    d, tokens, patch = (
        config.width,
        (config.latent_size // config.patch) ** 2,
        config.patch**2 * config.channels,
    )
    block = (
        tokens * (4 + 8) * d * d + 2 * tokens * tokens * d + 6 * d * d
    )  # projections and MLP; attention; modulation
    begin, end = (
        tokens * patch * d + (256 + d) * d,
        tokens * patch * d + 2 * d * d,
    )  # patches in, timestep; modulation, out
    return 2 * (config.depth * block + begin + end if last is None else last * block + begin)


def head_flops(config: SiTConfig, head: dict | None) -> int:
    """Forward FLOPs of an alignment head (models.projector.Projector's arguments) for one image; 0 without one."""
    if head is None:
        return 0
    tokens = (config.latent_size // config.patch) ** 2
    sizes = [head["width"], *[head["hidden"]] * (head["layers"] - 1), head["out"]]
    return 2 * tokens * sum(a * b for a, b in zip(sizes, sizes[1:]))
