"""Benchmark: the arithmetic of its figures, and that what it compares is the same thing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from benchmarks import length
from benchmarks.cache import BenchCache, measure, with_cache, without_cache

from videoar.core.units import Visible
from videoar.evaluation import speed
from videoar.evaluation.beside import alone, in_turn, plain_loop
from videoar.evaluation.options import Bench
from videoar.evaluation.speed import begin, generate, measure_shape, pass_cells, speed_cells, tables
from videoar.files import Json
from videoar.generation.pipeline import VideoPipeline
from videoar.generation.timing import Timing
from videoar.machine import peak_bytes

# What is made once is made by one worker.
pytestmark = pytest.mark.xdist_group("speed")

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
    """Time to the first frame from the start includes imports and the wait for the first frame."""
    first = rows[0]["runs"][0]
    assert first.start_seconds is not None
    assert first.start_seconds > first.first_frame_seconds + 0.1


def test_memory_is_that_of_a_process(rows: list[Json]) -> None:
    """Peaks are positive, hold at least the interpreter, and never fall as a video grows."""
    row = rows[0]
    assert all(2**24 < run.peak_bytes < 2**34 for run in row["runs"])
    assert row["runs"][0].cache_bytes > 0
    assert peak_bytes() > 2**24


def test_a_long_video_is_timed_at_every_mark(config: Bench) -> None:
    """Six costs, from second 10 to the end, and peaks never fall as a video grows."""
    flat = length.measure(config, 30.0)
    assert flat["seconds"] == [10, 14, 18, 22, 26, 30]
    assert len(flat["cost"]) == 6
    assert min(flat["cost"]) > 0
    assert 0 < flat["early_bytes"] <= flat["late_bytes"]


def test_the_file_reloads(rows: list[Json], config: Bench) -> None:
    """The JSON is what was returned; runs can be built from it again."""
    assert config.out is not None
    read = json.loads(config.out.read_text())
    assert read["benchmark"]["rows"] == json.loads(json.dumps(rows, default=vars))
    assert Timing(**read["benchmark"]["rows"][0]["runs"][0]) == rows[0]["runs"][0]


def test_the_table_has_all_parts(rows: list[Json], config: Bench) -> None:
    """Two tables of one line, and the words that say what is included."""
    text = tables(config, rows)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 6
    for said in (
        "end to end",
        "writing the file",
        "commits it to the cache",
        "1 threads",
        "float32",
    ):
        assert said in text


def test_passes_are_timed_beside_what_computes_the_same(rows: list[Json]) -> None:
    """A ratio of speeds says nothing if one side computes something else."""
    row = rows[0]
    assert {"ours", "plain", "matmul"} <= row["seconds"].keys()
    assert all(len(turns) == 2 and min(turns) > 0 for turns in row["seconds"].values())
    assert (row["tokens"], row["steps"]) == (4, 2)
    assert all(difference < 1e-4 for difference in row["difference"])


@torch.inference_mode()
@pytest.mark.parametrize("scheme", tiny.SCHEMES)
def test_a_plain_loop_gives_the_tokens_of_the_sampler(pipe: VideoPipeline, scheme: str) -> None:
    """The textbook, with guidance, fresh noise, a window and sinks: what the sampler has to be."""
    pipe.transformer.requires_grad_(requires_grad=False)
    how = {"units": scheme, "step": "renoise", "guidance_scale": 2.0, "moving_sinks": False}
    samplers = [pipe.generate([PROMPT], num_frames=29, seeds=[3], **how).sampler for _ in range(2)]
    expected = torch.cat([tokens for _, tokens, _ in plain_loop(samplers[0])], dim=1)
    torch.testing.assert_close(with_cache(samplers[1]), expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_diffusers_computes_a_unit_alone(pipe: VideoPipeline) -> None:
    """Its transformer has our weights, for units that are a block of the lattice."""
    pytest.importorskip("diffusers")
    words = torch.randn(1, 5, pipe.transformer.config.text_dim)
    cube = pipe.lattice("cube:1x2x2", None).at(1)
    ours, theirs = (call() for call in alone(pipe.transformer, cube, words).values())
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    coarse = pipe.lattice("multiscale:2,1", None).at(0)
    assert alone(pipe.transformer, coarse, words) == {}


def test_sides_take_turns() -> None:
    """All are called in every turn, whole groups at a time."""
    called: list[str] = []
    sides = {name: (lambda name=name: called.append(name), 2) for name in ("a", "b")}
    found = in_turn(sides, whole=3, repeats=2)
    assert {name: len(turns) for name, turns in found.items()} == {"a": 2, "b": 2}
    assert called[:7] == ["a"] * 3 + ["b"] * 3 + ["a"]
    assert called.count("a") % 3 == 0


def test_operations_are_those_of_the_keys_that_are_read(
    pipe: VideoPipeline, config: Bench, rows: list[Json]
) -> None:
    """In a full window a cube of 4 tokens reads that, and the sinks."""
    sampler, model = begin(pipe, config, None).sampler, pipe.transformer
    visible, words = sampler.config.visible, sampler.text[0][0].shape[2]
    assert visible.window is not None
    keys = 4 * (visible.window + visible.sink)
    assert rows[0]["flops"] == model.flops(4, keys=keys, words=words)


def test_a_shape_is_timed_without_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights give the table of passes and no other."""
    monkeypatch.setattr(speed, "ModelConfig", lambda num_layers: replace(tiny.MODEL, num_layers=2))
    monkeypatch.setattr(speed, "LATTICE", (4, 4))
    options = Bench(shape="wan-1.3b", units=("chunk:3",), num_inference_steps=1, repeats=1)
    row = {"name": "chunk:3", **measure_shape(options, "bfloat16")}
    assert speed_cells(row) == {}
    assert (pass_cells(row)["dtype"], pass_cells(row)["tokens"]) == ("bfloat16", "48")
    assert "frames/s" not in tables(options, [row])


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
def test_passes_are_counted_with_their_commits(
    pipe: VideoPipeline, config: Bench, scheme: str
) -> None:
    """A commit shares its pass with a step of the next unit; the clock ends with the last frame."""
    clock: list[int] = []
    one = replace(config, units=(scheme,))
    run = generate(pipe, one, seconds=8.5, show=lambda frames, _: clock.append(frames))
    sizes = begin(pipe, one, 17).sampler.units.sizes
    assert run.passes == 2 * len(sizes)
    assert run.units == len(sizes)
    assert clock[-1] == run.frames == 17


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
    seconds = {"ours": [0.02, 0.01, 0.04], "plain": [0.04, 0.02, 0.04], "matmul": [0.1, 0.1, 0.1]}
    return {
        "name": "frame",
        "dtype": "float32",
        "runs": [run, replace(run, seconds=1.0), replace(run, seconds=4.0)],
        "seconds": seconds,
        "steps": 4,
        "tokens": 4,
        "flops": 1e9,
        "matmul_flops": 2e10,
        "difference": [1e-6],
        "window_frames": None,
        "hardware": "abacus",
    }


def test_cells_follow_from_the_measurements() -> None:
    """Median and range of the runs, time per pass, share of the machine, ratios."""
    row = _made_up()
    cells = speed_cells(row)
    assert cells["frames/s"] == "50 [25, 100]"
    assert cells["ms/pass"] == "20.00"
    assert (cells["from start (s)"], cells["peak memory"]) == ("3.00", "256 MiB")
    passes = pass_cells(row)
    assert passes["ms/unit pass"] == "20 [10, 40]"
    assert passes["of a matmul"] == "25%"
    assert passes["plain / ours"] == "2 [1, 2]"
    assert passes["diffusers / ours"] == "-"
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
    with pytest.raises(ValueError, match="layers is 3: use it with --shape"):
        Bench(layers=3)
    with pytest.raises(ValueError, match="use it without --shape"):
        Bench(shape="wan-1.3b", seconds=2.0)
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
