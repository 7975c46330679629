"""Named schedules: in which rows of the matrix of sigmas the waves of units take their steps."""

from videoar.core.flow import Rows, Schedule

SCHEDULES: dict[str, Schedule] = {
    "autoregressive": lambda wave, waves, steps: (steps * wave, 1),
    "full": lambda wave, waves, steps: (0, 1),
    "pyramid": lambda wave, waves, steps: (wave, 1),
    "trapezoid": lambda wave, waves, steps: (min(wave, waves - wave), 1),
    "rolling": lambda wave, waves, steps: (wave, 1),
    "magi": lambda wave, waves, steps: (-(-steps // 4) * wave, 1),
    "step-first": lambda wave, waves, steps: (wave, waves),
}
"""`full`, `pyramid` and `trapezoid` are those of Diffusion Forcing (Chen et al. 2024,
arXiv:2407.01392), a pyramid of another slope is a number of rows; `rolling` is that of Rolling
Forcing (arXiv:2509.25161), `magi` has four waves in flight (MAGI-1, arXiv:2505.13211), `step-first`
moves every wave by one step before the next (HiAR, arXiv:2603.08703)."""
OF_CLIPS = ("full", "trapezoid", "step-first")
"""Those that an endless stream cannot have: all begin at once, or count from the end."""


def num_passes(rows: Rows) -> int:
    """Count the forward passes of a clip: rows in which some wave takes a step."""
    return len({row for wave in range(rows.waves or 0) for row in rows.steps(wave)})
