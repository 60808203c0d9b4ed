"""What a block is aligned to. SRA 2: the latents that the frozen VAE has already made.
B batch, C channels, H W latent side, p patch size, N = HW / p^2 tokens."""

from torch import Tensor


def latent_tokens(latent: Tensor, patch: int) -> Tensor:
    """Cuts a latent into the backbone's patches: (B, C, H, W) -> (B, N, p * p * C), in the order SiT's output layer has."""
    b, c, h, w = latent.shape
    grid = latent.reshape(b, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)
