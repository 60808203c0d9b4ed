"""SiT backbone (Ma et al. 2024, arXiv:2401.08740): a DiT (arXiv:2212.09748) that predicts velocity.

Parameter names, shapes and initialization match the SiT and REPA repositories, so that
checkpointing/official.py can load checkpoints of these repositories.
Shapes: B batch, C channels, H and W latent height and width, p patch size, N = HW / p^2 tokens,
D width, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from timm.layers import GELUTanh
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.errors import FieldError


@dataclass(frozen=True)
class SiTConfig:
    """Architecture of a backbone, stored in the config.json of a checkpoint."""

    depth: int
    width: int
    heads: int
    patch: int
    latent_size: int = 32
    channels: int = 4
    num_classes: int = 1000
    qk_norm: bool = False  # whether attention normalizes queries and keys

    @property
    def grid_size(self) -> int:
        """Number of tokens along each side of the latent."""
        return self.latent_size // self.patch

    def to_json(self) -> dict:
        """Return the fields for config.json, without those that older versions do not know.

        `qk_norm` is left out if it is False, so that older versions can read such networks.
        """
        fields = asdict(self)
        if not self.qk_norm:
            del fields["qk_norm"]
        return fields


# Depth, width and heads. S, B, L and XL are those of DiT (arXiv:2212.09748, Table 1). 1B and 3B
# follow the rule of Stable Diffusion 3 (arXiv:2403.03206): depth d, width 64 d and d heads. 1B has
# the size of LightningDiT-1p0B (github.com/hustvl/LightningDiT).
_SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "1B": (24, 1536, 24),
    "3B": (34, 2176, 34),
}
PRESETS: dict[str, dict[str, int]] = {
    "SiT-Ti/2": {"depth": 6, "width": 128, "heads": 4, "patch": 2},
    **{
        f"SiT-{size}/{patch}": {"depth": depth, "width": width, "heads": heads, "patch": patch}
        for size, (depth, width, heads) in _SIZES.items()
        for patch in (1, 2, 4, 8)
    },
}

# The SRA 2 paper specifies the blocks of B, L and XL. The smaller models use the same block as B,
# and the larger models the same block as L and XL. Neither has been tuned.
_DEFAULT_ALIGN_BLOCKS = {"Ti": 2, "S": 2, "B": 2, "L": 8, "XL": 8, "1B": 8, "3B": 8}


def default_align_block(model: str) -> int:
    """Return the block that SRA 2 aligns by default in a preset, for example 8 for SiT-XL/2."""
    size = model.removeprefix("SiT-").split("/")[0]
    return _DEFAULT_ALIGN_BLOCKS[size]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift tokens (B, N, D) with one vector (B, D) per sample."""
    return x * (1 + scale[:, None]) + shift[:, None]


def zero_parameters(module: nn.Module) -> None:
    """Set all parameters of a module to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def init_linear(module: nn.Module) -> None:
    """Initialize a linear layer with Xavier-uniform weights and zero bias, for `Module.apply`."""
    if isinstance(module, nn.Linear):
        zero_parameters(module)
        nn.init.xavier_uniform_(module.weight)


def sincos_position_embedding(width: int, side: int) -> Tensor:
    """Return the fixed two-dimensional sine-cosine embedding of MAE, (side * side, width).

    The first half of the channels encodes the column, and the second half encodes the row.
    """
    omega = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat((angle.sin(), angle.cos()), 1)  # (side, width / 2)
    column = axis.repeat(side, 1)
    row = axis.repeat_interleave(side, 0)
    return torch.cat((column, row), 1).float()


class TimestepEmbedder(nn.Module):
    """Embeds timesteps in [0, 1] with sinusoidal features and an MLP: (B,) -> (B, D)."""

    omega: Tensor

    def __init__(self, width: int, num_features: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(num_features, width), nn.SiLU(), nn.Linear(width, width))
        half = num_features // 2
        # The buffer exists even if the network is built on the meta device.
        index = torch.arange(half, dtype=torch.float32, device="cpu")
        omega = torch.exp(-math.log(10000) * index / half)
        self.register_buffer("omega", omega, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """Embed timesteps: (B,) -> (B, D)."""
        angle = t[:, None].float() * self.omega
        return self.mlp(torch.cat((angle.cos(), angle.sin()), -1))


class LabelEmbedder(nn.Module):
    """Embeds class labels: (B,) -> (B, D). Label K is the null class.

    The training step replaces dropped labels by K.
    """

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        """Embed labels: (B,) -> (B, D)."""
        return self.embedding_table(y)


class SiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning.

    With `qk_norm`, attention applies a LayerNorm with weights to the queries and keys of each head.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        # The LayerNorm of SiT and REPA, which was timm's default, has an epsilon of 1e-5.
        self.attn = Attention(
            width, num_heads=heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm
        )
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Transform tokens (B, N, D), conditioned on c (B, D)."""
        modulation = self.adaLN_modulation(c).chunk(6, -1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Output layer with adaLN conditioning."""

    def __init__(self, width: int, output_dim: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, output_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens (B, N, D), conditioned on c (B, D), to patches (B, N, p * p * C)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """Velocity network v(x_t, t, y). The output does not depend on train or eval mode.

    For the first `num_recomputed_blocks` blocks, the forward pass stores only their inputs, and the
    backward pass recomputes them. The backward pass reaches these blocks last, when the activations
    of the other blocks have been freed.

    Raises:
        FieldError: If the latent cannot be divided into patches.
    """

    def __init__(self, config: SiTConfig):
        super().__init__()
        if config.latent_size % config.patch:
            raise FieldError(
                "patch",
                f"the latent side {config.latent_size} is not a multiple of the patch size "
                f"{config.patch}",
            )
        self.config = config
        self.num_recomputed_blocks = 0
        self.x_embedder = PatchEmbed(
            config.latent_size, config.patch, config.channels, config.width
        )
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(config.num_classes, config.width)
        position = sincos_position_embedding(config.width, config.grid_size)
        self.pos_embed = nn.Parameter(position[None], requires_grad=False)
        self.blocks = nn.ModuleList(
            SiTBlock(config.width, config.heads, config.qk_norm) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(config.width, config.patch**2 * config.channels)
        self.initialize()

    def initialize(self) -> None:
        """Initialize all weights as the SiT repository does.

        The weights of linear layers and the patch embedding are Xavier-uniform. The weights of the
        label and timestep embeddings are normal with standard deviation 0.02. Modulations and the
        output layer are zero.
        """
        self.apply(init_linear)
        zero_parameters(self.x_embedder)  # the bias stays zero
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in self.t_embedder.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, (SiTBlock, FinalLayer)):
                zero_parameters(module.adaLN_modulation)
        zero_parameters(self.final_layer.linear)

    def compile_blocks(self) -> None:
        """Compile one block. All blocks use the compiled code."""
        for block in self.blocks:
            block.compile(dynamic=False)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Assemble patches (B, N, p * p * C) into latents (B, C, H, W)."""
        grid = self.config.grid_size
        patch = self.config.patch
        patches = x.reshape(len(x), grid, grid, patch, patch, self.config.channels)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, return_blocks: Sequence[int] = ()
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """Predict the velocity.

        Args:
            x: Noisy latents, (B, C, H, W).
            t: Timesteps in [0, 1], (B,).
            y: Labels from 0 to K, where K is the null class, (B,).
            return_blocks: Blocks, counted from 1, whose output tokens are also returned.

        Returns:
            The velocity (B, C, H, W). If `return_blocks` is not empty, a pair of the velocity and
            the output tokens (B, N, D) of these blocks, keyed by block.
        """
        tokens, c, block_tokens = self._run_blocks(x, t, y, self.config.depth, return_blocks)
        velocity = self.unpatchify(self.final_layer(tokens, c))
        return (velocity, block_tokens) if return_blocks else velocity

    def compute_block_tokens(
        self, x: Tensor, t: Tensor, y: Tensor, blocks: Sequence[int]
    ) -> dict[int, Tensor]:
        """Return the output tokens (B, N, D) of `blocks` by block, without running later blocks."""
        _, _, block_tokens = self._run_blocks(x, t, y, max(blocks), blocks)
        return block_tokens

    def _run_blocks(
        self, x: Tensor, t: Tensor, y: Tensor, depth: int, return_blocks: Sequence[int]
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Run the first `depth` blocks.

        Returns:
            The final tokens, the conditioning vector, and the output tokens of `return_blocks`.
        """
        assert all(1 <= block <= self.config.depth for block in return_blocks), return_blocks
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        block_tokens = {}
        for block_index, block in enumerate(self.blocks[:depth], 1):
            if block_index <= self.num_recomputed_blocks:
                tokens = checkpoint(block, tokens, c, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, c)
            if block_index in return_blocks:
                block_tokens[block_index] = tokens
        return tokens, c, block_tokens
