"""Muon for weight matrices of the blocks, with AdamW for all other parameters.

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by
the nearest semi-orthogonal matrix, approximated by a Newton-Schulz iteration. Its updates are
scaled to the root mean square of AdamW's updates (arXiv:2502.16982, eq. 4), so both optimizers
share one learning rate.

`torch.optim.Muon` is the same algorithm. It is not used, because it cannot skip an update without
host-device synchronization, and because each process would orthogonalize all matrices.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.matrix_exchange import MatrixExchange
from training.sharding import gather_tensor

# Coefficients and number of iterations of Jordan et al. They maximize the slope at zero instead of
# converging: the singular values of the result are between about 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
RMS_OF_ADAMW = 0.2  # typical root mean square of an update of AdamW (arXiv:2502.16982)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximate the nearest semi-orthogonal matrices with a Newton-Schulz iteration in bf16.

    If U S V^T is the singular value decomposition of a matrix, the result is U S' V^T, where the
    singular values S' are close to 1.

    Args:
        matrices: Matrices, (B, rows, columns).

    Returns:
        The results in bf16, same shape.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.AdamW):
    """Updates some matrices with Muon, and all other parameters with fused AdamW.

    Like fused AdamW, it skips the update on the device if `found_inf` is 1.

    Args:
        matrices: Groups of matrices of the same shape, each with the number of matrices that are
            stacked along their rows. Stacked matrices are orthogonalized separately.
        others: Parameters that AdamW updates.
        momentum: Momentum of Muon.
        muon_weight_decay: Weight decay of the matrices.
        exchange: Divides the matrices over the processes.
        options: Options of AdamW.
    """

    def __init__(
        self,
        matrices: Iterable[tuple[list[nn.Parameter], int]],
        others: list[nn.Parameter],
        momentum: float,
        muon_weight_decay: float,
        exchange: MatrixExchange,
        **options: Any,
    ):
        groups: list[dict[str, Any]] = [
            {
                "params": parameters,
                "num_stacked": num_stacked,
                "momentum": momentum,
                "weight_decay": muon_weight_decay,
            }
            for parameters, num_stacked in matrices
        ]
        super().__init__([*groups, {"params": others}], **options, fused=True)
        self.exchange = exchange

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters, and set the gradients of the matrices to None."""
        assert closure is None, "compute the gradients before the update"
        assert getattr(self, "grad_scale", None) is None, "unscale the gradients before the update"
        for group in self.param_groups:
            if "momentum" in group:
                self._update_matrices(group)
        return super().step()  # AdamW ignores parameters without gradients

    def _update_matrices(self, group: dict[str, Any]) -> None:
        """Update the matrices of a group with Muon."""
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        found_inf = getattr(self, "found_inf", None)
        is_applied = 1.0 if found_inf is None else (gather_tensor(found_inf) == 0).float()

        # Update the momentum in float32, on the rows that this process holds.
        rows = torch.stack(
            [self._update_momentum(p, group["momentum"], is_applied) for p in parameters]
        )

        # Orthogonalize a share of the matrices, and return the rows of all of them.
        num_rows, num_columns = parameters[0].shape
        share = self.exchange.gather_share(rows, num_rows)
        separate_shape = (len(share) * group["num_stacked"], -1, num_columns)
        result = orthogonalize(share.reshape(separate_shape))
        updates = self.exchange.return_rows(result.reshape(share.shape), len(parameters))

        # Apply weight decay and the updates; a skipped update has learning rate 0.
        learning_rate = group["lr"] * is_applied
        longer_side = max(num_rows // group["num_stacked"], num_columns)
        scale = learning_rate * (RMS_OF_ADAMW * math.sqrt(longer_side))
        for parameter, update in zip(parameters, updates):
            local = get_local(parameter)
            local.mul_(1 - learning_rate * group["weight_decay"])
            local.sub_(update.float() * scale)
            parameter.grad = None

    def _update_momentum(
        self, parameter: nn.Parameter, momentum: float, is_applied: Tensor | float
    ) -> Tensor:
        """Update the momentum buffer of a matrix, and return Nesterov's momentum in bf16."""
        state = self.state[parameter]
        if not state:
            # AdamW expects the number of updates in the state of every parameter.
            state["step"] = torch.zeros((), device=parameter.device)
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = get_local(state["momentum_buffer"])
        assert parameter.grad is not None
        gradient = get_local(parameter.grad)
        if isinstance(is_applied, Tensor):  # in a skipped update, the buffer keeps its value
            gradient = torch.where(is_applied > 0, gradient, buffer)
        buffer.lerp_(gradient, 1 - momentum)
        state["step"] += is_applied
        return gradient.lerp(buffer, momentum).bfloat16()


def get_local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, which shares memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
