"""Who is moved by Muon, and who by AdamW."""

import pytest
import torch
from torch import nn

from videoar.training.optimizer import OptimizerConfig, ParameterGroup, StackedMuon

CONFIG = OptimizerConfig(learning_rate=0.01, muon_learning_rate=0.1, weight_decay=0.0)


def _parameters() -> dict[str, nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    shapes = {"hidden": (6, 4), "conv": (4, 2, 3, 3), "bias": (4,), "embedding": (6, 4)}
    return {name: nn.Parameter(torch.randn(s, generator=rng)) for name, s in shapes.items()}


def test_muon_moves_hidden_matrices_alone() -> None:
    """All singular values of such a step are about the learning rate; AdamW has all else."""
    parameters = _parameters()
    group = ParameterGroup(CONFIG, parameters)
    moved = {name.partition("/")[0] for name in group.moments if "momentum" in name}
    assert moved == {"hidden"}
    before = parameters["hidden"].detach().clone()
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    group.move(CONFIG.learning_rate)
    values = torch.linalg.svdvals(parameters["hidden"].detach() - before)
    scale = 0.1 * (6 / 4) ** 0.5  # tall matrices get steps of the same size per output
    assert values.min() > 0.6 * scale
    assert values.max() < 1.3 * scale


def test_a_stack_of_matrices_moves_as_each_alone() -> None:
    """Tall, wide, of several sizes, and one without a gradient: all as torch's own moves them."""
    shapes, found = [(6, 4), (6, 4), (4, 8), (5, 5), (5, 5), (6, 4)], []
    for kind in (torch.optim.Muon, StackedMuon):
        rng = torch.Generator().manual_seed(0)
        matrices = [nn.Parameter(torch.randn(shape, generator=rng)) for shape in shapes]
        optimizer = kind(matrices, lr=0.1, weight_decay=0.1)
        optimizer.state |= {p: {"momentum_buffer": torch.zeros_like(p)} for p in matrices}
        for _ in range(3):
            for matrix in matrices[:-1]:
                matrix.grad = torch.randn(matrix.shape, generator=rng)
            optimizer.step()
        found.append([matrix.detach() for matrix in matrices])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)  # bfloat16, in another order
    assert not torch.equal(found[0][0], found[0][1])


def test_moments_are_there_before_the_first_step() -> None:
    """All checkpoints of a run have the same tensors; else the first could not be gone on with."""
    parameters = _parameters()
    group = ParameterGroup(CONFIG, parameters)
    before = {name: tensor.shape for name, tensor in group.moments.items()}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    group.move(CONFIG.learning_rate)
    assert {name: tensor.shape for name, tensor in group.moments.items()} == before


def test_muon_without_a_matrix_is_refused() -> None:
    """A codec has convolutions alone: the learning rate would be of nothing."""
    parameters = {name: p for name, p in _parameters().items() if name != "hidden"}
    with pytest.raises(ValueError, match="what is trained has none: set"):
        ParameterGroup(CONFIG, parameters)
