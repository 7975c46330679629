"""Benchmark: the arithmetic of its figures, and that what it compares is the same thing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from benchmarks import length
from benchmarks.cache import BenchCache, measure, with_cache, without_cache

from videoar.core.schemes import parse
from videoar.core.units import Visible
from videoar.evaluation import speed
from videoar.evaluation.options import Bench
from videoar.evaluation.speed import generate, speed_cells, tables
from videoar.files import Json
from videoar.generation.pipeline import VideoPipeline
from videoar.generation.timing import Timing
from videoar.machine import peak_bytes

PROMPT = "a red ball moves left"


@pytest.fixture(scope="module")
def pipe() -> VideoPipeline:
    """A tiny pipeline with few frames per second, so that a minute is short."""
    pipe = tiny.tiny_pipeline()
    pipe.sampling = replace(pipe.sampling, fps=2)
    return pipe


@pytest.fixture(scope="module")
def config(pipe: VideoPipeline, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One kind of unit, measured in every way."""
    folder = tmp_path_factory.mktemp("benchmark")
    return Bench(
        checkpoint=str(pipe.save_pretrained(folder / "tiny")),
        units=("cube:1x2x2",),
        prompt=PROMPT,
        seconds=5.0,
        num_inference_steps=2,
        repeats=2,
        threads=1,
        out=folder / "bench.json",
    )


@pytest.fixture(scope="module")
def rows(config: Bench) -> list[Json]:
    """One benchmark in real processes that several tests look at."""
    return speed.measure_all(config, lambda line: None)


def test_frames_per_second_are_end_to_end(rows: list[Json]) -> None:
    """Rate times wall time is the number of frames, and no part takes longer than the whole."""
    for run in rows[0]["runs"]:
        assert run.fps * run.seconds == pytest.approx(run.frames)
        assert run.frames == 10
        parts = run.model_seconds + run.decode_seconds + run.write_seconds
        assert 0 < parts <= run.seconds
        assert 0 < run.first_frame_seconds < run.seconds


def test_the_start_of_the_process_is_counted(rows: list[Json]) -> None:
    """Time to the first frame from the start includes loading and the wait for the first frame."""
    row, first = rows[0], rows[0]["runs"][0]
    assert first.start_seconds is not None
    assert first.start_seconds > row["load_seconds"] + first.first_frame_seconds


def test_memory_is_that_of_a_process(rows: list[Json]) -> None:
    """Peaks are positive, hold at least the interpreter, and never fall as a video grows."""
    row = rows[0]
    assert all(2**24 < run.peak_bytes < 2**34 for run in row["runs"])
    assert row["runs"][0].cache_bytes > 0
    assert peak_bytes() > 2**24


def test_a_long_video_is_timed_at_every_mark(config: Bench) -> None:
    """Costs are there for seconds 10, 20 and 30 of 30, and peaks never fall as a video grows."""
    flat = length.measure(config, 30.0)
    assert flat["seconds"] == [10, 20, 30]
    assert all(cost > 0 for cost in flat["cost"])
    assert 0 < flat["early_bytes"] <= flat["late_bytes"]


def test_the_file_reloads(rows: list[Json], config: Bench) -> None:
    """The JSON is what was returned; runs can be built from it again."""
    assert config.out is not None
    read = json.loads(config.out.read_text())
    assert read["benchmark"]["rows"] == json.loads(json.dumps(rows, default=vars))
    assert Timing(**read["benchmark"]["rows"][0]["runs"][0]) == rows[0]["runs"][0]


def test_the_table_has_all_parts(rows: list[Json], config: Bench) -> None:
    """A table of one line, and the words that say what is included."""
    text = tables(config, rows)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert "end to end" in text
    assert "1 threads" in text


@pytest.mark.parametrize("step", ["euler", "renoise"])
@pytest.mark.parametrize("scheme", [*tiny.SCHEMES, "full"])
def test_without_a_cache_comes_the_same_video(pipe: VideoPipeline, scheme: str, step: str) -> None:
    """Recomputing the prefix in every pass gives the tokens of the cache: a fair comparison.

    Distilled models leave a noise level with fresh noise, which must be the same in both.
    """
    how = {"units": scheme, "step": step, "guidance_scale": 2.0, "window_frames": None}
    samplers = [pipe.generate([PROMPT], num_frames=13, seeds=[3], **how).sampler for _ in range(2)]
    assert samplers[0].config.visible == Visible()
    torch.testing.assert_close(
        with_cache(samplers[0]), without_cache(samplers[1]), atol=1e-4, rtol=1e-4
    )


def test_the_comparison_is_of_equals(pipe: VideoPipeline, config: Bench) -> None:
    """Both times are positive and the difference of tokens is rounding."""
    options = BenchCache(checkpoint=config.checkpoint, prompt=PROMPT, seconds=4.0, repeats=1)
    found = measure(pipe, options, "cube:1x2x2")
    assert float(found["with cache (s)"]) >= 0
    assert float(found["prefix recomputed (s)"]) > 0
    assert float(found["largest difference"]) < 1e-4


@pytest.mark.parametrize("scheme", ["frame", "chunk:2", "cube:1x2x2"])
def test_tokens_are_counted_with_their_commits(
    pipe: VideoPipeline, config: Bench, scheme: str
) -> None:
    """A unit goes through once per step and once to be cached, the last one never to be cached."""
    clock: list[int] = []
    one = replace(config, units=(scheme,))
    run, counted = generate(pipe, one, seconds=8.5, show=lambda frames, _: clock.append(frames))
    sizes = pipe.lattice(parse(scheme), 17).sizes
    assert counted["tokens"] == 2 * sum(sizes) + sum(sizes[:-1])
    assert run.passes == 2 * len(sizes)
    assert run.units == len(sizes)
    assert clock[-1] == run.frames == 17


def test_flops_grow_with_guidance(pipe: VideoPipeline, config: Bench) -> None:
    """Guidance runs every pass on two conditions, so it costs twice as much."""
    _, once = generate(pipe, config, seconds=5.0)
    guided = replace(pipe, sampling=replace(pipe.sampling, guidance_scale=3.0))
    _, twice = generate(guided, config, seconds=5.0)
    assert twice["flops"] == pytest.approx(2 * once["flops"])


def test_cost_of_a_second_is_the_slope_of_the_clock() -> None:
    """A clock that slows down after second 10 shows it at 20, however frames are grouped."""
    frames = [1, 5, 17, 40, 80, 160, 200, 320]
    times = [min(f, 160) * 0.01 + max(f - 160, 0) * 0.02 for f in frames]
    assert length.cost_at(10, fps=16, frames=frames, times=times) == pytest.approx(0.16)
    assert length.cost_at(20, fps=16, frames=frames, times=times) == pytest.approx(0.32)


def _made_up() -> Json:
    run = Timing(
        frames=100,
        seconds=2.0,
        model_seconds=1.0,
        decode_seconds=0.5,
        write_seconds=0.25,
        first_frame_seconds=0.1,
        start_seconds=3.0,
        passes=50,
        units=10,
        cache_tokens=64,
        cache_bytes=2**20,
        peak_bytes=2**28,
    )
    return {
        "name": "frame",
        "runs": [run, replace(run, seconds=1.0), replace(run, seconds=4.0)],
        "steps": 4,
        "tokens": 200,
        "flops": 4e9,
        "load_seconds": 1.0,
        "window_frames": None,
        "matmul_rate": 1.6e10,
        "hardware": "abacus",
    }


def test_cells_follow_from_the_measurements() -> None:
    """Median and range of the runs, time per pass, share of the machine, ratios."""
    row = _made_up()
    cells = speed_cells(row)
    assert cells["frames/s"] == "50 [25, 100]"
    assert cells["ms/pass"] == "20.00"
    assert cells["tokens/pass"] == "4.0"
    assert cells["of a matmul"] == "25%"
    assert (cells["from start (s)"], cells["peak memory"]) == ("3.00", "256 MiB")
    unknown = row | {"runs": [replace(row["runs"][0], start_seconds=None)]}
    assert speed_cells(unknown)["from start (s)"] == "unknown"
    flat = {"seconds": [10, 20], "cost": [0.2, 0.3], "early_bytes": 2**28, "late_bytes": 2**29}
    assert length.row("frame", flat)["last / first"] == "1.500"
    assert length.row("frame", flat)["end / 20 s"] == "2.000"


def test_bad_requests_are_one_sentence(config: Bench, tmp_path: Path) -> None:
    """Wrong numbers, names and files are refused before a process starts."""
    for field, value in (("seconds", 0.0), ("seconds", float("nan"))):
        with pytest.raises(ValueError, match=f"{field} is"):
            replace(config, **{field: value})
    with pytest.raises(ValueError, match="seconds is 12"):
        length.BenchLength(seconds=12.0)
    with pytest.raises(ValueError, match="Unknown units"):
        speed.measure_all(replace(config, units=("cubes",)), lambda line: None)
    with pytest.raises(ValueError, match="no checkpoint is called"):
        speed.measure_all(replace(config, checkpoint="nowhere"), lambda line: None)
    foreign = tmp_path / "notes.json"
    foreign.write_text("my notes")
    with pytest.raises(ValueError, match="holds no benchmark"):
        speed.measure_all(replace(config, out=foreign), lambda line: None)
    assert foreign.read_text() == "my notes"


def test_errors_come_back_from_the_process(config: Bench) -> None:
    """What only the pipeline can refuse arrives as the same sentence, not as a traceback."""
    with pytest.raises(ValueError, match="The prompt has 5000 characters"):
        speed.measure_all(replace(config, prompt="a" * 5000, out=None), lambda line: None)
