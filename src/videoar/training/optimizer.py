"""Muon beside AdamW, and their schedule: what turns gradients into steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from videoar.checks import MUST_BE, check_options, check_types

# A quintic whose iteration drives singular values towards 1, steep near 0 (Jordan 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Parameters with one of these in their name stay with AdamW: what comes first and last.
MUON_EXCLUDES = ("embed", "proj_out", "scale_shift_table", "position")
# Decay of its momentum.
MOMENTUM = 0.95


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or Muon and AdamW, with a warm-up, a plateau and a linear decay to zero."""

    learning_rate: float
    """Step size of AdamW on the plateau."""
    muon_learning_rate: float | None = None
    """Step size of Muon, for hidden matrices and convolutions; None leaves them to AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    weight_decay: float = 0.01
    """Decay of parameters of two and more axes; gains and biases are left alone."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly."""
    decay_fraction: float = 0.2
    """Last part of the run over which the learning rate falls linearly to zero."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""

    def __post_init__(self) -> None:
        check_types(self)
        check_options(
            self,
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("decay_fraction", 0 <= self.decay_fraction <= 1, "between 0 and 1"),
            ("clip_norm", self.clip_norm > 0, "above 0"),
            least={"warmup_steps": 0},
            says=MUST_BE,
        )


def learning_rate(
    config: OptimizerConfig, *, step: int, steps: int, moved: int | None = None
) -> float:
    """Return the learning rate of `step`, from 0, in a run of `steps`; neither end is at zero.

    `moved` counts the steps of who moves now, if not all have been: the rise is over those.
    """
    own = step if moved is None else moved
    rise = (own + 1) / config.warmup_steps if config.warmup_steps else 1.0
    decay_steps = config.decay_fraction * steps
    fall = (steps - step) / decay_steps if decay_steps else 1.0
    return config.learning_rate * max(0.0, min(1.0, rise, fall))


def ema_decay_at(decay: float, *, step: int) -> float:
    """Return the decay of `step`, from 0: small at first, so that the start is forgotten."""
    return min(decay, (1 + step) / (10 + step))


class ParameterGroup:
    """Parameters that move together, with the state of their optimizers.

    Args:
        config: the optimizer and its schedule.
        parameters: by name.
        precision: of the run; with bfloat16 Muon's products are that, too.
    """

    def __init__(
        self, config: OptimizerConfig, parameters: Mapping[str, nn.Parameter], precision: str
    ) -> None:
        self.config, self.parameters = config, dict(parameters)
        self.steps = 0
        """How often they moved."""
        muon, decay = config.muon_learning_rate, config.weight_decay
        vectors, outer, hidden = [], [], []
        for name, parameter in parameters.items():
            if parameter.ndim < 2:
                vectors.append(parameter)
            elif muon is None or any(part in name for part in MUON_EXCLUDES):
                outer.append(parameter)
            else:
                hidden.append(parameter)
        split = [{"params": outer, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(split, lr=config.learning_rate, betas=config.betas, fused=True)
        # What the first step would make, so that all checkpoints have the same tensors. They take
        # the memory layout of their parameter: fused AdamW walks both alike.
        for p in (*outer, *vectors):
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            adamw.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        self.optimizers: list[torch.optim.Optimizer] = [adamw]
        if muon is not None and hidden:
            dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
            self.optimizers.append(Muon(hidden, lr=muon, weight_decay=decay, dtype=dtype))

    @property
    def moments(self) -> dict[str, Tensor]:
        """The state of the optimizers, by name of the parameter and of what it is."""
        states = {p: state for each in self.optimizers for p, state in each.state.items()}
        named = self.parameters.items()
        return {f"{name}/{key}": v for name, p in named for key, v in states[p].items()}

    def move(self, rate: float) -> None:
        """Take a step of AdamW's learning rate `rate`; Muon's is scaled alike."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * rate / self.config.learning_rate
            optimizer.step()


class Muon(torch.optim.Optimizer):
    """Nesterov's momentum, orthogonalised by Newton-Schulz.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon. PyTorch's own Muon takes matrices only;
    here a convolution is the matrix of its filters.

    Args:
        parameters: weights of two and more axes.
        lr: size of a step, relative to a matrix with singular values 1.
        weight_decay: decoupled decay.
        dtype: type of the Newton-Schulz products; bfloat16 where the machine is fast at it.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype
        for parameter in parameters:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter]["momentum"]
                momentum.lerp_(parameter.grad, 1 - MOMENTUM)
                direction = parameter.grad.lerp(momentum, MOMENTUM).flatten(1)
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
