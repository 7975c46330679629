"""Muon beside AdamW: what turns gradients into steps."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

# A quintic whose iteration drives singular values towards 1, steep near 0 (Jordan 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon. PyTorch's own Muon takes matrices only;
    here a convolution is the matrix of its filters.

    Args:
        parameters: weights of two and more axes.
        lr: size of a step, relative to a matrix with singular values 1.
        momentum: decay of the momentum (Nesterov).
        weight_decay: decoupled decay.
        dtype: type of the Newton-Schulz products; bfloat16 where the machine is fast at it.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)
                # Wide and tall matrices get steps of the same size per output.
                scale = max(1.0, direction.shape[0] / direction.shape[1]) ** 0.5
                update = orthogonalise(direction.to(self.dtype)).to(parameter.dtype)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)


def orthogonalise(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Move all singular values close to 1 (0.7 to 1.2) by five Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
