"""The Gaussian gate: which critics lead to the data, where everything is known.

The experiment is `examples/critics.py`, on the functions of `videoar.training.distillation.scores`.
"""

import runpy
from pathlib import Path

import pytest
import torch

from videoar.core.loss import Reads

example = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "critics.py"))


@pytest.mark.parametrize(
    ("critic", "reads"), [("full", "all"), ("symmetric", "all"), ("causal", "past")]
)
def test_an_unbiased_critic_leads_to_the_data(critic: str, reads: Reads) -> None:
    """With the mean trained as one predictor, or the teacher's own mask, the data is the end."""
    assert example["distil"](critic, teacher_reads=reads) < 1e-3


@pytest.mark.parametrize("critic", ["causal", "separate"])
def test_a_biased_critic_leads_away(critic: str) -> None:
    """A critic that knows less than the teacher moves even a perfect student off the data."""
    assert example["distil"](critic) > 1


@pytest.mark.parametrize("critic", ["full", "symmetric", "causal", "separate"])
def test_bias_shows_at_the_data_itself(critic: str) -> None:
    """One step away from a perfect student: the gradient vanishes for unbiased critics alone."""
    perfect = torch.linalg.cholesky(example["DATA"])
    moved = example["distil"](critic, steps=1, rate=1.0, start=perfect)
    assert (moved < 1e-6) == (critic in ("full", "symmetric"))
