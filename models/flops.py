"""Count the FLOPs of the networks: matrix products only, as PyTorch's FlopCounterMode does.

One multiply-accumulate is two FLOPs.
"""

from models.sit import SiTConfig


def backbone_flops(config: SiTConfig, last: int | None = None) -> int:
    """Return the forward FLOPs of a SiT per image: 2 x 118.6 G for SiT-XL/2 at 256 pixels.

    Args:
        config: Architecture of the backbone.
        last: Stop after this block, counted from 1, instead of computing the velocity.
    """
    d = config.width
    tokens = config.grid_size**2
    patch = config.patch**2 * config.channels
    projections_and_mlp = tokens * (4 + 8) * d * d
    attention = 2 * tokens * tokens * d
    modulation = 6 * d * d
    block = projections_and_mlp + attention + modulation
    embedding = tokens * patch * d + (256 + d) * d  # patches and timestep
    if last is not None:
        return 2 * (embedding + last * block)
    output = tokens * patch * d + 2 * d * d  # modulation and patches
    return 2 * (embedding + config.depth * block + output)


def head_flops(config: SiTConfig, head: dict | None) -> int:
    """Return the forward FLOPs of an alignment head per image.

    Args:
        config: Architecture of the backbone that the head belongs to.
        head: Arguments of models.projector.Projector; None means no head and zero FLOPs.
    """
    if head is None:
        return 0
    tokens = config.grid_size**2
    sizes = [head["width"], *[head["hidden"]] * (head["layers"] - 1), head["out"]]
    return 2 * tokens * sum(a * b for a, b in zip(sizes, sizes[1:]))
