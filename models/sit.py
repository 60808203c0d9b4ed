"""SiT backbone (Ma et al. 2024, arXiv:2401.08740), a DiT (arXiv:2212.09748) that predicts velocity.

Parameter names, shapes and initialisation are those of the SiT and REPA repositories: checkpointing/official.py loads theirs.
B batch, C channels, H W latent side, p patch size, N = HW / p^2 tokens, D width, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class SiTConfig:
    """Everything needed to rebuild a backbone; written to a checkpoint's config.json."""

    depth: int
    width: int
    heads: int
    patch: int
    latent_size: int = 32
    channels: int = 4
    num_classes: int = 1000


_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PRESETS: dict[str, dict[str, int]] = {
    "SiT-Ti/2": {"depth": 6, "width": 128, "heads": 4, "patch": 2},
    **{
        f"SiT-{size}/{patch}": {"depth": depth, "width": width, "heads": heads, "patch": patch}
        for size, (depth, width, heads) in _SIZES.items()
        for patch in (1, 2, 4, 8)
    },
}
ALIGN_BLOCK = {
    "Ti": 2,
    "S": 2,
    "B": 2,
    "L": 8,
    "XL": 8,
}  # the paper's for B, L, XL; B's for the others


def default_align_block(model: str) -> int:
    """The block that `--align-depth auto` stands for: 'SiT-XL/2' -> 8."""
    return ALIGN_BLOCK[model.removeprefix("SiT-").split("/")[0]]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(B, N, D), (B, D), (B, D) -> (B, N, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weight and zero bias; for nn.Module.apply."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def sincos_position(width: int, side: int) -> Tensor:
    """Fixed 2-D sine-cosine embedding (MAE's): (side * side, width), the first half for the column, the second for the row."""
    omega = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat((angle.sin(), angle.cos()), 1)  # (side, width / 2)
    column, row = axis.repeat(side, 1), axis.repeat_interleave(side, 0)
    return torch.cat((column, row), 1).float()


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of t in [0, 1], then an MLP: (B,) -> (B, D)."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        half = frequencies // 2
        omega = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("omega", omega, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angle = t[:, None].float() * self.omega
        return self.mlp(torch.cat((angle.cos(), angle.sin()), -1))


class LabelEmbedder(nn.Module):
    """A table of K classes and, at index K, the null class: (B,) -> (B, D). Dropping labels is the training loop's business."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class SiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning: (B, N, D), (B, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(
            c
        ).chunk(6, -1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """(B, N, D), (B, D) -> (B, N, p * p * C)."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, -1)))


class SiT(nn.Module):
    """v(x_t, t, y). What it returns never depends on train or eval mode."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        if config.latent_size % config.patch:
            raise ValueError(
                f"--model with patch size {config.patch} cannot cut latents of side {config.latent_size}"
            )
        self.config = config
        self.x_embedder = PatchEmbed(
            config.latent_size, config.patch, config.channels, config.width
        )
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(config.num_classes, config.width)
        side = config.latent_size // config.patch
        self.pos_embed = nn.Parameter(
            sincos_position(config.width, side)[None], requires_grad=False
        )
        self.blocks = nn.ModuleList(
            SiTBlock(config.width, config.heads) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(config.width, config.patch**2 * config.channels)
        self.activation_checkpointing = False  # set to keep a block's input only, and compute the block again in the backward pass
        self.initialize()

    def initialize(self) -> None:
        """As the official code: Xavier everywhere, normal(0.02) embeddings, zero for every modulation and the output."""
        self.apply(init_linear)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for i in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[i].weight, std=0.02)
        for layer in (
            *(block.adaLN_modulation[1] for block in self.blocks),
            self.final_layer.adaLN_modulation[1],
            self.final_layer.linear,
        ):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(B, N, p * p * C) -> (B, C, H, W)."""
        p, c, side = self.config.patch, self.config.channels, self.config.latent_size
        grid = x.reshape(len(x), side // p, side // p, p, p, c)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(x), c, side, side)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, return_blocks: Sequence[int] = ()
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """x (B, C, H, W), t (B,) in [0, 1], y (B,) in 0..K with K the null class -> velocity (B, C, H, W).

        With return_blocks also the tokens (B, N, D) after each of those blocks, counted from 1, by their number.
        """
        tokens, c, kept = self._through(x, t, y, return_blocks, self.config.depth)
        velocity = self.unpatchify(self.final_layer(tokens, c))
        return (velocity, kept) if return_blocks else velocity

    def features(self, x: Tensor, t: Tensor, y: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
        """The tokens (B, N, D) after each of `blocks`, by their number, without what comes after the last of them."""
        return self._through(x, t, y, blocks, max(blocks))[2]

    def _through(
        self, x: Tensor, t: Tensor, y: Tensor, keep: Sequence[int], last: int
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Tokens after block `last`, conditioning, and the tokens after the blocks `keep`."""
        assert all(1 <= k <= self.config.depth for k in keep), (keep, self.config.depth)
        tokens, kept = self.x_embedder(x) + self.pos_embed, {}
        c = self.t_embedder(t) + self.y_embedder(y)
        for k, block in enumerate(self.blocks[:last], 1):
            tokens = (
                checkpoint(block, tokens, c, use_reentrant=False)
                if self.activation_checkpointing
                else block(tokens, c)
            )
            if k in keep:
                kept[k] = tokens
        return tokens, c, kept
