"""Muon: steps of equal size in every direction, whatever the shape of the gradient."""

import pytest
import torch
from torch import nn

from videoar.training.optimizer import Muon, orthogonalise

# The iteration stops near 1, not at it.
LOW, HIGH = 0.6, 1.3


def _spread(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    """A matrix with singular values from 0.03 to 1."""
    rng = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, rank, generator=rng))[0]
    right = torch.linalg.qr(torch.randn(columns, rank, generator=rng))[0]
    return left @ torch.diag(torch.logspace(-1.5, 0, rank)) @ right.mT


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (1, 5), (5, 1)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_all_singular_values_come_close_to_one(shape: tuple[int, int], scale: float) -> None:
    """Directions that rarely get a gradient move as far as the others: that is all of Muon."""
    matrix = scale * _spread(*shape)
    result = orthogonalise(matrix)
    values = torch.linalg.svdvals(result)
    assert values.min() > LOW
    assert values.max() < HIGH
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    core = u.mT @ result @ v.mT  # the singular vectors stay
    torch.testing.assert_close(core, torch.diag(core.diagonal()), atol=1e-3, rtol=1e-3)
    assert (core.diagonal() > LOW).all()


@pytest.mark.parametrize("shape", [(6, 6), (6, 24), (24, 6), (12, 3, 2, 2), (4, 2, 3, 3)])
def test_the_first_step_goes_down_by_the_learning_rate(shape: tuple[int, ...]) -> None:
    """Against the gradient, by `lr` per singular direction; filters count as rows of a matrix."""
    gradient = _spread(shape[0], int(torch.tensor(shape[1:]).prod())).reshape(shape)
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = gradient.clone()
    Muon([weight], lr=0.1).step()
    step = weight.detach().flatten(1)
    scale = max(1.0, step.shape[0] / step.shape[1]) ** 0.5
    values = torch.linalg.svdvals(step) / (0.1 * scale)
    assert LOW < values.min()
    assert values.max() < HIGH
    u, _, v = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    assert ((u.mT @ step @ v.mT).diagonal() < 0).all()


def test_weights_without_gradient_stay() -> None:
    """A frozen or unused weight must not decay away."""
    used, unused = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    used.grad = torch.ones(3, 4)
    Muon([used, unused], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(unused, torch.ones(3, 4))
    assert not torch.equal(used, torch.ones(3, 4))


def test_a_zero_gradient_leaves_only_the_decay() -> None:
    """Dividing by its norm must not make it infinite."""
    weight = nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.zeros(3, 4)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((3, 4), 0.95))


def test_momentum_outlasts_a_gradient() -> None:
    """A step after the gradient has vanished still goes the way it went."""
    weight = nn.Parameter(torch.zeros(4, 4))
    optimizer = Muon([weight], lr=0.1)
    weight.grad = _spread(4, 4)
    optimizer.step()
    first = weight.detach().clone()
    weight.grad = torch.zeros(4, 4)
    optimizer.step()
    second = weight.detach() - first
    torch.testing.assert_close(second, first, atol=0.01, rtol=0.1)


def test_muon_solves_an_ill_conditioned_problem() -> None:
    """One direction is 100 times steeper than another; plain descent would crawl along it."""
    rng = torch.Generator().manual_seed(0)
    target = torch.randn(6, 6, generator=rng)
    stretch = torch.logspace(-0.5, 0.5, 6)
    weight = nn.Parameter(torch.zeros(6, 6))
    optimizer = Muon([weight], lr=0.2)
    for step in range(150):
        loss = ((weight - target) * stretch).square().sum()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * (1 - step / 150)
        optimizer.step()
    assert (weight - target).abs().max() < 0.3
