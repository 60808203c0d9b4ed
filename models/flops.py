"""Count the FLOPs of matrix products in the networks, as PyTorch's FlopCounterMode does.

One multiply-accumulate counts as two FLOPs.
"""

from models.sit import SiTConfig


def backbone_flops(config: SiTConfig, last_block: int | None = None) -> int:
    """Return the forward FLOPs of a SiT per image, which are 2 x 118.6 G for SiT-XL/2.

    Args:
        config: Architecture of the backbone.
        last_block: Last block that is run, counted from 1. By default, all blocks and the output
            layer are run.
    """
    d = config.width
    tokens = config.grid_size**2
    patch = config.patch**2 * config.channels
    projections_and_mlp = tokens * (4 + 8) * d * d
    attention = 2 * tokens * tokens * d
    modulation = 6 * d * d
    block = projections_and_mlp + attention + modulation
    embedding = tokens * patch * d + (256 + d) * d  # patches and timestep
    if last_block is not None:
        return 2 * (embedding + last_block * block)
    output = tokens * patch * d + 2 * d * d  # modulation and patches
    return 2 * (embedding + config.depth * block + output)


def head_flops(config: SiTConfig, head: dict | None) -> int:
    """Return the forward FLOPs of an alignment head per image.

    Args:
        config: Architecture of the backbone that the head belongs to.
        head: Entry of the head in config.json. None means that there is no head.
    """
    if head is None:
        return 0
    tokens = config.grid_size**2
    if head.get("kind") == "conv":
        return 2 * tokens * head["kernel_size"] ** 2 * head["width"] * head["out"]
    sizes = [head["width"], *[head["hidden"]] * (head["layers"] - 1), head["out"]]
    return 2 * tokens * sum(a * b for a, b in zip(sizes, sizes[1:]))
