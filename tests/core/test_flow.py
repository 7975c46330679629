"""The conventions of flow matching, the schedules, and noise that depends on its unit alone."""

import itertools

import pytest
import torch

from videoar.core.flow import (
    Rows,
    add_noise,
    clean_of,
    euler_step,
    random_sigmas,
    renoise_step,
    shifted,
    sigma_steps,
    velocity_of,
)
from videoar.core.noise import unit_noise


def _clean_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 3, generator=rng), torch.randn(2, 5, 3, generator=rng)


def test_sigma_one_is_noise_and_sigma_zero_is_clean() -> None:
    """The direction of sigma is the one thing that every part must agree on."""
    clean, noise = _clean_and_noise()
    assert torch.equal(add_noise(clean, noise, 1.0), noise)
    assert torch.equal(add_noise(clean, noise, 0.0), clean)
    step = (add_noise(clean, noise, 0.6) - add_noise(clean, noise, 0.5)) / 0.1
    torch.testing.assert_close(step, velocity_of(clean, noise), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sigma", [1.0, 0.7, 0.1])
def test_the_clean_data_come_back_from_the_velocity(sigma: float) -> None:
    """The estimate of a perfect model is perfect at every level."""
    clean, noise = _clean_and_noise()
    x, velocity = add_noise(clean, noise, sigma), velocity_of(clean, noise)
    torch.testing.assert_close(clean_of(x, velocity, sigma), clean, atol=1e-6, rtol=1e-5)
    there, _ = euler_step(x, velocity, (sigma, sigma / 2), None, noise.clone)
    torch.testing.assert_close(there, add_noise(clean, noise, sigma / 2), atol=1e-6, rtol=1e-5)
    fresh = noise.flip(1)
    again, _ = renoise_step(x, velocity, (sigma, sigma / 2), None, fresh.clone)
    torch.testing.assert_close(again, add_noise(clean, fresh, sigma / 2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("shift", "timesteps"),
    [
        (1.0, [1000, 750, 500, 250]),
        (5.0, [1000, 937.5, 833.333, 625]),
        (8.0, [1000, 960, 888.889, 727.273]),
    ],
)
def test_four_steps_are_the_published_ones(shift: float, timesteps: list[float]) -> None:
    """Distilled models were trained at these four levels and know no others."""
    sigmas = sigma_steps(4, shift=shift)
    assert sigmas[-1] == 0
    torch.testing.assert_close(torch.tensor(sigmas[:-1]) * 1000, torch.tensor(timesteps).float())


def test_a_shift_undoes_its_inverse() -> None:
    """Shifts compose by multiplication, and the ends stay where they are."""
    grid = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shifted(shifted(grid, 3.0), 1 / 3.0), grid)
    torch.testing.assert_close(shifted(shifted(grid, 2.0), 3.0), shifted(grid, 6.0))
    assert shifted(grid, 3.0)[[0, -1]].tolist() == [0, 1]


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_one_step_is_refused(steps: int) -> None:
    """No steps would hand out noise as a video."""
    with pytest.raises(ValueError, match=f"num_inference_steps is {steps}"):
        sigma_steps(steps)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_shift_is_refused(shift: float) -> None:
    """It would turn all sigmas into the same number, or none."""
    with pytest.raises(ValueError, match="shift is"):
        sigma_steps(4, shift=shift)


def test_training_sigmas_are_uniform_before_the_shift() -> None:
    """The median of a uniform draw moves to `s / (1 + s)`; training and sampling share the map."""
    rng = torch.Generator().manual_seed(0)
    sigma = random_sigmas((20_000,), rng, shift=5.0)
    assert 0 <= sigma.min()
    assert sigma.max() <= 1
    assert abs(sigma.median() - 5 / 6) < 0.01


@pytest.mark.parametrize("lag", [0, 1, 2, 3])
def test_a_wave_starts_at_noise_and_ends_clean(lag: int) -> None:
    """Clip and stream follow one rule: a wave waits for its turn, steps in every row, and stops."""
    for wave in range(3):
        rows = Rows((sigma_steps(3),), lag, 3)
        done = [rows.done(row, wave) for row in range(2 * lag + 4)]
        assert done == [0] * (lag * wave) + [0, 1, 2, 3] + [3] * (lag * (2 - wave))


def test_noise_of_a_unit_depends_on_seed_unit_and_draw_alone() -> None:
    """So a stream equals a clip, and a batch equals its videos one by one, bit for bit."""
    both = unit_noise((3, 7), 5, (4, 2))
    assert torch.equal(both[1:], unit_noise((7,), 5, (4, 2)))
    torch.randn(9)  # the global state has no part in it
    assert torch.equal(both, unit_noise((3, 7), 5, (4, 2)))


def test_noise_of_close_seeds_and_units_is_unrelated() -> None:
    """Seeds 0, 1, 2 are what people type; neighbours must not share patterns."""
    rows = [
        unit_noise((seed,), unit, (4000, 1), draw=draw)[0, :, 0]
        for seed, unit, draw in itertools.product((0, 1, 2**63 - 1), (0, 1, 2), (0, 1))
    ]
    correlation = torch.corrcoef(torch.stack(rows))
    assert (correlation - torch.eye(len(rows))).abs().max() < 5 / 4000**0.5  # standard errors
    assert abs(torch.cat(rows).std() - 1) < 0.02
