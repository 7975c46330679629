"""The search for partitions, against exhaustive search on data whose best partition is known."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from gaussian import gaussian_costs
from tiny import tiny_pipeline

from videoar.cli.main import main
from videoar.core.schemes import parse
from videoar.data.latents import LatentsInfo, ShardWriter
from videoar.evaluation.search import Segment, energy_score, pareto

FRAMES = 10


def sizes(parts: tuple[Segment, ...]) -> list[int]:
    """How many frames every segment has."""
    return [part.frames for part in parts]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_search_finds_what_trying_all_segmentations_finds(steps: int) -> None:
    """All 2^9 of them, for every number of units; with two shapes of 1 and 3 waves, all 3^9 too."""
    correlation = np.random.default_rng(0).uniform(0.2, 0.99, FRAMES).tolist()
    segments = gaussian_costs(correlation, steps)
    rng = np.random.default_rng(1)
    fine = [Segment(s.start, "fine", s.frames, 3, s.cost * rng.uniform(0.3, 1)) for s in segments]
    for menu in (segments, [s for s in (*segments, *fine) if s.frames > 1]):
        at = {}
        for segment in menu:
            at.setdefault((segment.start, segment.start + segment.frames), []).append(segment)
        cheapest: dict[int, float] = {}
        for count in range(FRAMES):
            for cuts in itertools.combinations(range(1, FRAMES), count):
                ends = itertools.pairwise((0, *cuts, FRAMES))
                choices = [at.get(pair, []) for pair in ends]
                for parts in itertools.product(*choices):
                    waves = sum(part.waves for part in parts)
                    cost = sum(part.cost for part in parts)
                    cheapest[waves] = min(cost, cheapest.get(waves, np.inf))
        expected, least = {}, np.inf
        for waves in sorted(cheapest):
            if cheapest[waves] < least - 1e-12:
                expected[waves] = least = cheapest[waves]
        found = {waves: cost for waves, cost, _ in pareto(menu, FRAMES)}
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_where_all_is_alike_the_segments_are(steps: int) -> None:
    """Nothing speaks for one place over another, and errors grow faster than sizes."""
    for waves, _, parts in pareto(gaussian_costs([0.9] * FRAMES, steps), FRAMES):
        assert max(sizes(parts)) - min(sizes(parts)) <= 1
        assert len(parts) == waves


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_calm_then_busy_is_cut_small_then_large(steps: int) -> None:
    """Frames that hang together are predictable from each other, noise is not: it stays whole.

    Before the first frame there is nothing, so it is a unit of its own.
    """
    half = FRAMES // 2
    curve = pareto(gaussian_costs([0.0] + [0.98] * (half - 1) + [0.1] * half, steps), FRAMES)
    parts = {waves: sizes(parts) for waves, _, parts in curve}
    for waves in (2, 3, 5):
        assert parts[waves] == sorted(parts[waves])
        assert parts[waves][0] == 1
        assert parts[waves][-1] > half


def test_the_score_is_least_for_the_law_itself() -> None:
    """Neither a wrong mean nor a wrong spread may win, as too little does with squared errors."""
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(4000, 1, 3, generator=rng)
    noise = torch.randn(4000, 4, 3, generator=rng)
    right, *wrong = (
        energy_score(x, real).mean() for x in (noise, 0.5 * noise, 1.5 * noise, noise + 0.4)
    )
    assert right < min(wrong) - 0.02


def test_the_command_searches_on_prepared_clips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for every number of passes, whose last word is a scheme of all frames."""
    pipe, folder = tiny_pipeline(), tmp_path / "latents"
    checkpoint, codec = str(pipe.save_pretrained(tmp_path / "tiny")), pipe.codec
    info = LatentsInfo(codec=codec.fingerprint(), channels=4, stride=codec.stride, fps=16.0)
    with ShardWriter(folder, info=info) as writer:
        for number in range(4):
            writer.add(torch.randn(2, 4, 4, 4), captions=[f"a ball {number}"])
    words = ["units", "frame", "chunk:2", "--frames", "2", "--draws", "2"]
    assert main([*words, "--search", checkpoint, str(folder)]) == 0
    *_, head, last = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "passes"
    assert parse(last.split()[-1]).frames == 2
    assert main([*words[:4], "9", "--search", checkpoint, str(folder)]) == 2
    assert "use 4 or more" in capsys.readouterr().err
