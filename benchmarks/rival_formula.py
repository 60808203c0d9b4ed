"""The losses of SRA 2, computed from the formulas of docs/method.md with explicit loops.

The authors have not released code. The computation uses only the weights and the blocks of the
backbone from the training step. The noisy latents, the velocity, the head, the latent patches and
the losses are written out for each sample and each token.
"""

import torch
from torch import Tensor

from benchmarks.rival_reference import (
    Losses,
    Reference,
    get_alignment,
    randomize,
    read_gradients,
)
from models.target import TrainingInputs
from train import Step


class SRA2:
    """SRA 2 (arXiv:2601.17830) with the cosine loss."""

    title = "SRA 2, cosine"
    flags = "--align sra2"
    offset = 0.0
    weight = 1.0
    latent_size = None

    def compute_reference(self, step: Step, inputs: TrainingInputs) -> Reference:
        """Randomize the weights of our step, and compute its losses from the formulas."""
        model = step.state.model
        randomize(model, seed=1)
        block = get_alignment(step).config.block

        # Denoising loss: x_t = (1 - t) x + t eps, v = eps - x.
        samples = zip(inputs.latents, inputs.noise, inputs.t)
        x_t = torch.stack([(1 - t) * x + t * noise for x, noise, t in samples])
        prediction, tokens = model.backbone(x_t, inputs.t, inputs.labels, return_blocks=[block])
        squared_errors = [
            (v - (noise - x)).square().mean()
            for v, x, noise in zip(prediction, inputs.latents, inputs.noise)
        ]
        denoising = torch.stack(squared_errors).mean()

        # Alignment loss: the distance of each projected token from its latent patch.
        projected = self.project_tokens(step, tokens[block])
        patch = model.backbone.config.patch
        columns = model.backbone.config.grid_size
        distances = []
        for image_tokens, latent in zip(projected, inputs.posterior_mean):
            for index, token in enumerate(image_tokens):
                row, column = divmod(index, columns)
                rows = slice(row * patch, (row + 1) * patch)
                cells = latent[:, rows, column * patch : (column + 1) * patch]
                # The channels of a pixel are adjacent, as in the output layer.
                target = torch.einsum("chw->hwc", cells).reshape(-1)
                distances.append(self.compute_distance(token, target))
        alignment = torch.stack(distances).mean()

        total = denoising + self.weight * alignment
        total.backward()
        gradients = read_gradients(model)
        model.zero_grad(set_to_none=True)
        return Reference(Losses(denoising, alignment, total), gradients, measurements={})

    def project_tokens(self, step: Step, tokens: Tensor) -> Tensor:
        """Apply the head: five linear layers with SiLU, x sigmoid(x), between them."""
        weights = dict(step.state.model.heads["sra2"].named_parameters())
        for layer in range(5):
            if layer:
                tokens = tokens * torch.sigmoid(tokens)
            weight, bias = weights[f"{2 * layer}.weight"], weights[f"{2 * layer}.bias"]
            tokens = torch.einsum("bnd,ed->bne", tokens, weight) + bias
        return tokens

    def compute_distance(self, token: Tensor, target: Tensor) -> Tensor:
        """Compute 1 - cos(token, target)."""
        dot_product = torch.einsum("d,d->", token, target)
        norms = torch.einsum("d,d->", token, token) * torch.einsum("d,d->", target, target)
        return 1 - dot_product / norms.sqrt()


class SRA2SmoothL1(SRA2):
    """SRA 2 with the smooth L1 loss and beta = 0.05, which is the best loss in the paper."""

    title = "SRA 2, smooth L1"
    flags = "--align sra2 --align-loss smooth_l1"

    def compute_distance(self, token: Tensor, target: Tensor) -> Tensor:
        """Compute the mean of d^2 / (2 beta) for |d| < beta and of |d| - beta / 2 otherwise."""
        beta = 0.05
        difference = (token - target).abs()
        small = difference.square() / (2 * beta)
        large = difference - beta / 2
        return torch.where(difference < beta, small, large).mean()


FORMULAS: tuple[type[SRA2], ...] = (SRA2, SRA2SmoothL1)
