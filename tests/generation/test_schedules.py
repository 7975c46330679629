"""The schedules of the field are rows of one matrix: each as its authors write it, in loops."""

import itertools
from collections.abc import Callable

import pytest
import torch
from reference import Plan, recomputed
from tiny import MODEL, tiny_pipeline, tiny_transformer

from videoar.cli.main import main
from videoar.core.flow import renoise_step, sigma_steps
from videoar.core.sampler import Sampler
from videoar.core.schemes import parse
from videoar.core.units import Units
from videoar.generation.config import GenerationConfig
from videoar.generation.schedules import SCHEDULES, num_passes

Table = list[list[int]]
"""Steps that every wave has taken, before every row and at the end."""


def noise_levels(start: Callable[[int], int], waves: int, steps: int) -> Table:
    """Diffusion forcing: a matrix of levels of noise, clipped, one row further down per step."""
    table = []
    for m in itertools.count():
        levels = [min(max(steps + start(t) - m, 0), steps) for t in range(waves)]
        table.append([steps - level for level in levels])
        if not any(levels):
            return table


def pyramid(waves: int, steps: int, scale: float = 1.0) -> Table:
    """Later frames are noisier: `steps + int(t * scale) - m`."""
    return noise_levels(lambda t: int(t * scale), waves, steps)


def trapezoid(waves: int, steps: int) -> Table:
    """The same from both ends: columns t and -t have one level. Theirs is of odd lengths."""
    starts = [0] * waves
    for t in range((waves + 1) // 2):
        starts[t] = starts[-t] = t
    return noise_levels(starts.__getitem__, waves, steps)


def of_events(waves: int, rows: list[list[int]]) -> Table:
    """A table of the waves that take a step in each row."""
    table = [[0] * waves]
    for moving in rows:
        table.append([done + (wave in moving) for wave, done in enumerate(table[-1])])
    return table


def rolling(waves: int, steps: int) -> Table:
    """Rolling Forcing: a window of as many blocks as steps, moved on by a block."""
    rows = [
        list(range(max(0, window - steps + 1), min(window, waves - 1) + 1))
        for window in range(waves + steps - 1)
    ]
    return of_events(waves, rows)


def magi(waves: int, steps: int) -> Table:
    """MAGI-1: the next chunk begins once the one before is through a quarter, so four overlap."""
    done, rows = [0] * waves, []
    while done[-1] < steps:
        begun = [k for k in range(waves) if k == 0 or done[k - 1] >= -(-steps // 4)]
        rows.append([k for k in begun if done[k] < steps])
        for k in rows[-1]:
            done[k] += 1
    return of_events(waves, rows)


def step_first(waves: int, steps: int) -> Table:
    """HiAR: every block takes a step before any takes the next."""
    return of_events(waves, [[block] for _ in range(steps) for block in range(waves)])


def block_first(waves: int, steps: int, first: tuple[int, ...] = ()) -> Table:
    """One block after the other; the first may take more steps (Diagonal Distillation)."""
    counts = [*first, *[steps] * waves]
    return of_events(waves, [[block] for block in range(waves) for _ in range(counts[block])])


LITERAL: dict[str, Callable[[int, int], Table]] = {
    "autoregressive": block_first,
    "full": lambda waves, steps: pyramid(waves, steps, 0.0),
    "pyramid": pyramid,
    "trapezoid": trapezoid,
    "rolling": rolling,
    "magi": magi,
    "step-first": step_first,
}
CASES = [({"lag": name}, table) for name, table in LITERAL.items()]
CASES += [
    ({"lag": 0.5}, lambda waves, steps: pyramid(waves, steps, 0.5)),
    ({"first_steps": (5, 4)}, lambda waves, steps: block_first(waves, steps, (5, 4))),
]


def test_every_schedule_is_derived_again() -> None:
    """A new name needs its own loops here."""
    assert LITERAL.keys() == SCHEDULES.keys()


@pytest.mark.parametrize(("options", "table"), CASES)
def test_a_schedule_is_what_its_authors_write(options: dict, table) -> None:
    """Row by row and wave by wave, for short and long clips, few and many steps."""
    for waves, steps in ((1, 1), (5, 3), (3, 4), (9, 4), (7, 2)):
        expected = table(waves, steps)
        options = options | {"window_frames": None, "num_inference_steps": steps}
        lattice = Units(parse("frame"), waves, 2, 2)
        config = GenerationConfig(**({"units": "frame"} | options))
        rows = config.sampler(lattice).rows(waves)
        found = [[rows.done(row, wave) for wave in range(waves)] for row in range(len(expected))]
        assert found == expected
        assert num_passes(rows) == len(expected) - 1


@pytest.mark.parametrize("renoise", [False, True])
@pytest.mark.parametrize(("options", "table"), CASES)
@torch.inference_mode()
def test_every_schedule_is_sampled_as_without_a_cache(options: dict, table, renoise: bool) -> None:
    """What moves reads all before it at the level of the matrix, clean, noisy or not yet begun."""
    model, seeds, steps = tiny_transformer(), (1, 2), 3
    units = Units(parse("cube:1x2x2/wavefront" if renoise else "frame"), 5 - 2 * renoise, 3, 4)
    words = torch.randn(2, 5, MODEL.text_dim, generator=torch.Generator().manual_seed(5))
    text, waves = model.encode_text(words), int(units.waves[-1]) + 1
    step = {"step": "renoise"} if renoise else {}
    options = {"num_inference_steps": steps, "shift": 3.0, "context_noise": 0.1} | options | step
    config = GenerationConfig(window_frames=None, units=units.scheme, **options).sampler(units)
    assert config.step is renoise_step or not renoise
    sampler = Sampler(model, units, text, config, seeds=seeds)
    found = torch.cat([part.tokens for part in sampler], dim=1)
    plan = Plan(
        sigmas=sigma_steps(steps, shift=3.0),
        lag=0,
        context_noise=0.1,
        renoise=renoise,
        first=tuple(sigma_steps(n, shift=3.0) for n in options.get("first_steps", ())),
        table=tuple(map(tuple, table(waves, steps))),
    )
    expected = recomputed(model, units, text, plan, seeds=seeds)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)
    assert sampler.passes == len(plan.table) - 1


def test_streams_refuse_what_only_a_clip_can_have() -> None:
    """All would begin at once, or at an end that is not there."""
    pipe = tiny_pipeline()
    for lag in ("trapezoid", "step-first", "full"):
        with pytest.raises(ValueError, match=f"lag is {lag}: use another for an endless stream"):
            pipe.stream("a red ball", lag=lag)
    with pytest.raises(ValueError, match="lag is roling: use a number of rows, or one of"):
        pipe.stream("a red ball", lag="roling")
    with pytest.raises(ValueError, match=r"first_steps is \(1,\): use falling numbers of 2"):
        pipe.stream("a red ball", first_steps=(1,))


def test_units_draws_the_matrix_and_counts_its_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """What a schedule costs and shows is read before anything is generated."""
    words = ["units", "frame", "--frames", "3", "--steps", "2"]
    assert main([*words, "--first-steps", "3", "--schedule", "1"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["frame", "3", "16", "3", "3,", "2", "5", "32"] in lines
    assert lines[-7:] == [
        ["row", "0", "1", "2"],
        ["0", "1", "1", "1"],
        ["1", "0.91", "1", "1"],
        ["2", "0.71", "1", "1"],
        ["3", "0", "0.83", "1"],
        ["4", "0", "0", "0.83"],
        ["5", "0", "0", "0"],
    ]
