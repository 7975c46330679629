"""Muon beside AdamW, and their schedule: what turns gradients into steps."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from videoar.checks import Natural, Options, Positive, Share

# Parameters with one of these in their name stay with AdamW: what comes first and last.
MUON_EXCLUDES = ("embed", "proj_out", "scale_shift_table", "position")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Options):
    """AdamW, or Muon and AdamW, with a warm-up, a plateau and a linear decay to zero."""

    learning_rate: Positive
    """Step size of AdamW on the plateau."""
    muon_learning_rate: Positive | None = None
    """Step size of Muon (Jordan et al. 2024), for hidden matrices; None leaves them to AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    weight_decay: float = 0.01
    """Decay of parameters of two and more axes; gains and biases are left alone."""
    warmup_steps: Natural = 100
    """Steps over which the learning rate rises linearly."""
    decay_fraction: Share = 0.2
    """Last part of the run over which the learning rate falls linearly to zero."""
    clip_norm: Positive = 1.0
    """Largest norm of the gradient."""


def learning_rate(config: OptimizerConfig, *, step: int, steps: int, moved: int) -> float:
    """Return the learning rate of `step`, from 0, in a run of `steps`; neither end is at zero.

    `moved` counts the steps of who moves now, which not all have been: the rise is over those.
    """
    rise = (moved + 1) / config.warmup_steps if config.warmup_steps else 1.0
    decay_steps = config.decay_fraction * steps
    fall = (steps - step) / decay_steps if decay_steps else 1.0
    return config.learning_rate * max(0.0, min(1.0, rise, fall))


def ema_decay_at(decay: float, *, step: int) -> float:
    """Return the decay of `step`, from 0: small at first, so that the start is forgotten."""
    return min(decay, (1 + step) / (10 + step))


class StackedMuon(torch.optim.Muon):
    """Muon that takes matrices of one shape as one stack.

    The steps are the same: with small matrices a card waited a third of the time for the launch of
    the kernels of each (`docs/log.md`).
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            stacks: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if (gradient := parameter.grad) is not None:
                    momentum = self.state[parameter]["momentum_buffer"]
                    momentum.lerp_(gradient, 1 - group["momentum"])
                    pair = parameter, gradient.lerp(momentum, group["momentum"])
                    stacks.setdefault(parameter.shape, []).append(pair)
            for (rows, columns), pairs in stacks.items():
                parameters, moved = zip(*pairs, strict=True)
                turned = orthogonal(torch.stack(moved), group["ns_coefficients"], group["ns_steps"])
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                for parameter, update in zip(parameters, turned, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-rate)


def orthogonal(
    x: Float[Tensor, "stack rows columns"], coefficients: tuple[float, float, float], steps: int
) -> Float[Tensor, "stack rows columns"]:
    """Bring singular values near 1, by Newton and Schulz in bfloat16 (Jordan et al. 2024)."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    x = x.bfloat16().mT if tall else x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class ParameterGroup:
    """Parameters that move together, with the state of their optimizers.

    Args:
        config: the optimizer and its schedule.
        parameters: by name.
    """

    def __init__(self, config: OptimizerConfig, parameters: dict[str, nn.Parameter]) -> None:
        self.config, self.parameters = config, parameters
        self.steps = 0
        """How often they moved."""
        muon, decay = config.muon_learning_rate, config.weight_decay
        vectors, outer, hidden = [], [], []
        for name, parameter in parameters.items():
            if parameter.ndim < 2:
                vectors.append(parameter)
            elif muon is None or parameter.ndim > 2 or any(part in name for part in MUON_EXCLUDES):
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
        if muon is not None and not hidden:
            raise ValueError(
                f"muon_learning_rate is {muon}, but Muon moves matrices, and what is trained has"
                " none: set --optimizer.muon-learning-rate None"
            )
        if muon is not None:
            self.optimizers.append(StackedMuon(hidden, lr=muon, weight_decay=decay))
            self.optimizers[-1].state |= {
                p: {"momentum_buffer": torch.zeros_like(p)} for p in hidden
            }

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
