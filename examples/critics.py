"""Where distribution matching ends with each critic: `python examples/critics.py`.

Everything is known here, as data is a Gaussian process.

Data is an autoregressive process of six units, student and critics are linear, and expectations are
exact: a design of points with mean 0 and covariance 1 stands for the noise. A critic is refitted
before every step of the student, so what is left at the end is the bias of the method alone.
"""

import math

import torch
from torch import Tensor

from videoar.core.flow import add_noise, clean_of
from videoar.core.loss import Reads
from videoar.training.distillation.scores import (
    PASSES,
    Critics,
    critic_loss,
    matching_loss,
    score,
)

UNITS, CORRELATION = 6, 0.9
SIGMAS = torch.tensor([0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95], dtype=torch.float64)
TIME = torch.arange(UNITS, dtype=torch.float64)
DATA = CORRELATION ** (TIME[:, None] - TIME).abs()
UNIT = torch.arange(UNITS)
# Of the 2 * UNITS directions of sample and noise, both ends: mean 0 and covariance 1, exactly.
POINTS = torch.cat([torch.eye(2 * UNITS), -torch.eye(2 * UNITS)]).double() * math.sqrt(2 * UNITS)
MASKS: dict[Reads, Tensor] = {
    "all": torch.ones(UNITS, UNITS).double(),
    "past": torch.ones(UNITS, UNITS).double().tril(),
    "future": torch.ones(UNITS, UNITS).double().triu(),
}


class LinearCritic:
    """Per noise level and pass a matrix, whose masked entries are zero."""

    def __init__(self) -> None:
        shape = (len(MASKS), len(SIGMAS), UNITS, UNITS)
        self.weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)

    def __call__(self, x: Tensor, sigma: Tensor, reads: Reads) -> Tensor:
        masked = self.weight[list(MASKS).index(reads)] * MASKS[reads]
        level = torch.searchsorted(SIGMAS, sigma[:, 0])
        return torch.einsum("bij,bjf->bif", masked[level], x)

    def fit(
        self, x: Tensor, velocity: Tensor, sigma: Tensor, *, critic: Critics, alone: bool
    ) -> None:
        """Minimise the loss, which is quadratic: one Newton step by conjugate gradients."""
        optimizer = torch.optim.LBFGS(
            [self.weight], max_iter=60, line_search_fn="strong_wolfe", tolerance_change=1e-12
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            if alone:  # each pass by itself, which is the naive reading
                passes = torch.stack([self(x, sigma, reads) for reads in PASSES[critic]])
                loss = (passes - velocity).square().mean()
            else:
                loss = critic_loss(self, x, velocity, sigma, critic=critic)
            loss.backward()
            return loss

        optimizer.step(closure)


def teacher(x: Tensor, sigma: Tensor, reads: Reads) -> Tensor:
    """The exact velocity of the data's path, given what is read."""
    level, mask = sigma[:, :1, None], MASKS[reads]
    noisy = (1 - SIGMAS[:, None, None]) ** 2 * DATA + SIGMAS[:, None, None] ** 2 * torch.eye(UNITS)
    maps = torch.zeros(len(SIGMAS), UNITS, UNITS, dtype=torch.float64)
    for i in range(UNITS):
        seen = mask[i].bool()
        inverse = torch.linalg.inv(noisy[:, seen][:, :, seen])
        maps[:, i, seen] = torch.einsum(
            "sj,sjk->sk", (1 - SIGMAS)[:, None] * DATA[i, seen], inverse
        )
    clean = torch.einsum("bij,bjf->bif", maps[torch.searchsorted(SIGMAS, sigma[:, 0])], x)
    return (x - clean) / level


def divergence(student: Tensor) -> float:
    """KL(student || data)."""
    ratio = torch.linalg.solve(DATA, student @ student.T)
    return float(0.5 * (ratio.trace() - UNITS - torch.logdet(ratio)))


def distil(
    name: str,
    *,
    teacher_reads: Reads = "all",
    steps: int = 100,
    rate: float = 2.0,
    start: Tensor | None = None,
) -> float:
    """Train a causal student, which begins with white noise; return its divergence at the end.

    The critic is one of the package, or `separate`: symmetric, but each pass trained alone.
    """
    alone = name == "separate"
    critic: Critics = "symmetric" if alone else name
    student = torch.eye(UNITS, dtype=torch.float64) if start is None else start.clone()
    student.requires_grad_()
    network = LinearCritic()
    sample, noise = (part.repeat(len(SIGMAS), 1) for part in POINTS.split(UNITS, dim=1))
    sigma = SIGMAS.repeat_interleave(len(POINTS))[:, None].expand(-1, UNITS)
    for _ in range(steps):
        clean = (sample @ student.tril().T)[:, :, None]
        x = add_noise(clean.detach(), noise[:, :, None], sigma[:, :, None])
        network.fit(x, noise[:, :, None] - clean.detach(), sigma, critic=critic, alone=alone)
        with torch.no_grad():
            fake = clean_of(x, score(network, x, sigma, critic=critic), sigma[:, :, None])
            real = clean_of(x, teacher(x, sigma, teacher_reads), sigma[:, :, None])
        loss = matching_loss(clean, fake, real, UNIT, normalise=False) * UNITS
        (gradient,) = torch.autograd.grad(loss, student)
        with torch.no_grad():
            student -= rate * gradient
    return divergence(student.detach().tril())


if __name__ == "__main__":
    cases = (("full", "all"), ("symmetric", "all"), ("causal", "past"), ("causal", "all"))
    print("critic      teacher reads  KL(student || data)")
    for name, read in (*cases, ("separate", "all")):
        print(f"{name:<12}{read:<15}{distil(name, teacher_reads=read):.4f}")
