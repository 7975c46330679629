"""A scheme is an ordered partition of a lattice, and masks follow from it alone."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import to_latents
from tiny import SCHEMES

from videoar.core.schemes import (
    ORDERS,
    Blocks,
    Cells,
    KeyDetail,
    Pyramid,
    Scheme,
    box,
    parse,
)
from videoar.core.tokens import to_tokens
from videoar.core.units import Units, Visible, clean_copies, token_mask
from videoar.generation.latents import Assembler

SIZES = st.integers(1, 4)
# Plain data: a scheme is built inside the test, where its types are checked.
ANY_SCHEME = st.one_of(
    st.tuples(
        st.just(Blocks),
        SIZES,
        st.none() | SIZES,
        st.none() | SIZES,
        st.sampled_from(list(ORDERS)),
    ),
    st.tuples(st.just(Blocks), st.none()),
    st.tuples(st.just(KeyDetail), st.integers(2, 5)),
    st.tuples(
        st.just(Pyramid),
        SIZES,
        st.sampled_from([(1,), (2, 1), (4, 1), (4, 2, 1), (8, 4, 2, 1)]),
    ),
    st.tuples(
        st.just(parse),
        st.sampled_from(
            ["frame+chunk:3", "cube:1x2x2/spiral+key-detail:2", "frame+multiscale:2,1"]
        ),
    ),
)
LATTICE = st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(1, 6))
FEW = settings(max_examples=40, deadline=None)


def _lay(scheme: tuple, lattice: tuple[int, int, int]) -> Units:
    kind, *arguments = scheme
    return Units(kind(*arguments), *lattice)


@given(ANY_SCHEME, LATTICE)
@FEW
def test_every_cell_stands_in_exactly_one_unit(scheme, lattice) -> None:
    """A cell in no unit would stay noise, one in two would be generated twice."""
    units = _lay(scheme, lattice)
    finest = [cell[:3] for unit in units for cell in unit.cells if cell[3] == 0]
    lattice = itertools.product(range(units.frames), range(units.height), range(units.width))
    assert sorted(finest) == list(lattice)


@given(ANY_SCHEME, LATTICE)
@FEW
def test_latents_come_back_from_tokens_exactly(scheme, lattice) -> None:
    """Storing tokens in unit order loses nothing, at borders that do not divide either."""
    units = _lay(scheme, lattice)
    shape = (2, units.frames, 3, units.height * 2, units.width * 2)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_latents(to_tokens(latents, units), units), latents)


@given(ANY_SCHEME, LATTICE)
@FEW
def test_complete_frames_are_those_whose_cells_are_all_generated(scheme, lattice) -> None:
    """A frame shown too early would hold noise; one shown too late delays a stream."""
    units = _lay(scheme, lattice)
    missing = {
        t: set(itertools.product(range(units.height), range(units.width)))
        for t in range(units.frames)
    }
    for unit in units:
        for t, h, w, level in unit.cells:
            if level == 0:
                missing[t].discard((h, w))
        complete = itertools.takewhile(lambda t: not missing[t], range(units.frames))
        assert unit.complete_frames == len(list(complete))
    complete = [unit.complete_frames for unit in units.clip]
    assert complete == sorted(complete)
    assert complete[-1] == units.frames


@given(ANY_SCHEME, LATTICE)
@FEW
def test_waves_follow_each_other_without_gaps(scheme, lattice) -> None:
    """The sampler starts wave after wave: a gap would stall it, a fall would break causality."""
    units = _lay(scheme, lattice)
    waves = units.waves.tolist()
    assert waves[0] == 0
    assert all(after - before in (0, 1) for before, after in itertools.pairwise(waves))


@given(ANY_SCHEME, LATTICE)
@FEW
def test_what_a_clip_says_of_all_tokens_is_what_its_units_say(scheme, lattice) -> None:
    """Training reads the tables, generation the units one by one: they are one geometry."""
    units = _lay(scheme, lattice)
    assert len(units.sizes) == units.count
    assert torch.equal(units.coords, torch.cat([unit.coords for unit in units]))
    owners = [unit.index for unit in units for _ in unit.cells]
    assert units.unit.tolist() == owners
    for unit in units:
        assert unit.frame_start == units.start_of(unit.index) == min(c[0] for c in unit.cells)
        assert unit.wave == units.wave_of(unit.index) == units.waves[unit.index]
    with pytest.raises(IndexError):
        units.at(units.count)


@given(ANY_SCHEME.filter(lambda scheme: scheme[1] is not None), LATTICE)
@FEW
def test_an_endless_stream_begins_like_a_clip_of_whole_segments(scheme, lattice) -> None:
    """Generation may go on for ever, so a unit must not depend on where the clip will end."""
    units = _lay(scheme, lattice)
    endless = Units(units.scheme, None, units.height, units.width)
    whole = units.frames // units.scheme.frames * units.units_per_segment
    for unit, same in zip(itertools.islice(units, whole), endless, strict=False):
        assert (unit.index, unit.wave, unit.cells) == (same.index, same.wave, same.cells)
        assert torch.equal(unit.coords, same.coords)
        assert unit.complete_frames == same.complete_frames


@given(ANY_SCHEME, LATTICE)
@FEW
def test_coarse_tokens_stand_at_the_centre_of_what_they_cover(scheme, lattice) -> None:
    """Positions of scales agree, so that attention finds the coarse token above a fine one."""
    units = _lay(scheme, lattice)
    for unit in units:
        for (t, h, w, level), place in zip(unit.cells, unit.coords.tolist(), strict=True):
            rows = [r for r in range(units.height) if r >> level == h]
            columns = [c for c in range(units.width) if c >> level == w]
            centre = [sum(rows) / len(rows), sum(columns) / len(columns)]
            assert place == [t, *centre, level]


@given(ANY_SCHEME, LATTICE)
@FEW
def test_the_assembler_hands_out_each_frame_once_and_in_order(scheme, lattice) -> None:
    """Streaming shows the same latents as putting the whole clip together at the end."""
    units = _lay(scheme, lattice)
    shape = (1, units.frames, 2, units.height * 2, units.width * 2)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assembler, parts, done = Assembler(units), [], 0
    for unit, tokens in zip(units, to_tokens(latents, units).split(units.sizes, 1), strict=True):
        part = assembler.add(unit, tokens)
        done += 0 if part is None else part.shape[1]
        assert done == unit.complete_frames
        parts += [] if part is None else [part]
        later = Assembler(units)
        later.load_state_dict(assembler.state_dict())
        assembler = later  # saved and loaded after every unit
    assert torch.equal(torch.cat(parts, dim=1), latents)


def test_pyramid_tokens_are_the_pooled_latents() -> None:
    """Every scale says what the finest would look like from afar: the mean of what it covers."""
    latents = torch.randn(1, 2, 3, 8, 8)
    units = Units(Pyramid(factors=(2, 1), frames=2), 2, 4, 4)
    coarse = to_tokens(latents, units)[:, : units.sizes[0]]
    pooled = latents.unflatten(4, (4, 2)).unflatten(3, (4, 2)).mean(dim=(4, 6))
    expected = to_tokens(pooled, Units(Blocks(2), 2, 2, 2))
    torch.testing.assert_close(coarse, expected)


def test_the_order_of_cubes_is_the_one_that_is_named() -> None:
    """Raster reads lines, snake turns at their ends, a wavefront runs along the diagonals."""

    def corners(name: str) -> list[list[tuple[int, int]]]:
        units = Units(parse(name), 1, 4, 6)
        waves = [[] for _ in range(int(units.waves[-1]) + 1)]
        for unit in units:
            waves[unit.wave].append((unit.cells[0][1] // 2, unit.cells[0][2] // 2))
        return waves

    raster = [[(h, w)] for h in range(2) for w in range(3)]
    assert corners("cube:1x2x2") == corners("cube:1x2x2/raster") == raster
    assert corners("cube:1x2x2/snake") == raster[:3] + raster[:2:-1]
    diagonals = [[(0, 0)], [(0, 1), (1, 0)], [(0, 2), (1, 1)], [(1, 2)]]
    assert corners("cube:1x2x2/wavefront") == diagonals
    middle = corners("cube:1x2x2/spiral")[:2]
    assert {*middle[0], *middle[1]} == {(0, 1), (1, 1)}
    assert corners("cube:1x2x2/1,3,2,5,4,0") == [raster[k] for k in (5, 0, 2, 1, 4, 3)]
    assert corners("cube:1x2x2/0,1,2,1,2,3") == diagonals
    drawn = corners("cube:1x2x2/random")
    assert sorted(drawn) == raster != drawn == corners("cube:1x2x2/random")


def test_far_blocks_come_first() -> None:
    """On 4x4 blocks the first four of `far-first` are the corners."""
    waves = Blocks(1, 1, 1, "far-first").segment(1, 4, 4)
    assert {(h, w) for wave in waves[:4] for ((_, h, w, _),) in wave} == {
        *((h, w) for h in (0, 3) for w in (0, 3))
    }


def test_a_written_order_is_of_all_blocks() -> None:
    """One of another lattice is refused where it is laid."""
    with pytest.raises(ValueError, match="order is"):
        Blocks(1, 2, 2, "0,x")
    with pytest.raises(ValueError, match="Turns of 1,0"):
        Blocks(1, 2, 2, "1,0").segment(1, 4, 6)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("frame", Blocks(1)),
        ("chunk:3", Blocks(3)),
        (" full ", Blocks(None)),
        ("key-detail:4", KeyDetail(4)),
        ("multiscale:4,2,1", Pyramid(factors=(4, 2, 1), frames=2)),
        ("multiscale:2,1/frames=4", Pyramid(factors=(2, 1), frames=4)),
        ("cube:1x2x3", Blocks(1, 2, 3)),
        ("cube:2x2x2/wavefront", Blocks(2, 2, 2, "wavefront")),
        ("cube:1x2x2/far-first", Blocks(1, 2, 2, "far-first")),
        ("cube:1x2x2/2,0,1", Blocks(1, 2, 2, "2,0,1")),
    ],
)
def test_a_name_means_its_scheme(name: str, scheme: Scheme) -> None:
    """Names stand in checkpoints and commands: their meaning must not move."""
    assert parse(name) == scheme


@pytest.mark.parametrize(
    "name",
    [
        "",
        "frames",
        "frame:2",
        "chunk",
        "chunk:",
        "chunk:0",
        "chunk:-1",
        "chunk:1.5",
        "chunk:2/snake",
        "key-detail:1",
        "multiscale:4,2",
        "multiscale:1,2",
        "multiscale:3,1",
        "multiscale:64,1",
        "multiscale:2,1/frames=0",
        "multiscale:2,1/raster",
        "cube:2x2",
        "cube:0x1x1",
        "cube:1x2x2/diagonal",
        "cube:1x2x2/snake/snake",
        "x" * 10_000,
    ],
)
def test_a_wrong_name_is_refused_in_one_sentence(name: str) -> None:
    """Users type these; the message is short and says what to do."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        parse(name)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "right"), [("cubes:1x2x2", "cube"), ("key-details", "key-detail")]
)
def test_a_near_miss_gets_a_suggestion(wrong: str, right: str) -> None:
    """A typing error costs one more try, not a search."""
    with pytest.raises(ValueError, match=f"Did you mean {right}"):
        parse(wrong)


def test_one_unit_cannot_span_an_endless_stream() -> None:
    """It would never be finished."""
    with pytest.raises(ValueError, match="endless"):
        Units(parse("full"), None, 2, 2)


@dataclass(frozen=True)
class _Broken(Scheme):
    """Leaves out the last column, or takes it twice."""

    frames: int = 1
    columns: tuple[int, ...] = ()

    def segment(self, frames: int, height: int, width: int) -> list[list[Cells]]:
        return [[box(range(frames), range(height), range(c, c + 1))] for c in self.columns]


@pytest.mark.parametrize("columns", [(0, 1), (0, 1, 2, 2), (0, 1, 2, 3)])
def test_a_scheme_that_is_no_partition_is_caught(columns: tuple[int, ...]) -> None:
    """A mistake in a new scheme shows at once, not as noise in a corner."""
    with pytest.raises(ValueError, match="not a partition"):
        Units(_Broken(columns=columns), 1, 2, 3).at(0)


# ---------------------------------------------------------------- visibility


def _visible(units: Units, visible: Visible) -> torch.Tensor:
    return visible.matrix(torch.arange(len(units.sizes)), units.waves)


def _tokens(units: Units, visible: Visible) -> torch.Tensor:
    return token_mask(_visible(units, visible), units.unit, units.unit)


@given(ANY_SCHEME, LATTICE, st.none() | st.integers(1, 9), st.integers(0, 5))
@example((Blocks, 1, 1, 1, "wavefront"), (2, 3, 3), None, 0)
@example((Blocks, 2, 1, 2, "wavefront"), (3, 3, 4), 4, 2)
@FEW
def test_visibility_is_causal_windowed_and_keeps_sinks(scheme, lattice, window, sink) -> None:
    """The rule, cell by cell; and what has expired is what no later unit reads."""
    units = _lay(scheme, lattice)
    visible = Visible(window=window, sink=sink)
    matrix, waves = _visible(units, visible).tolist(), units.waves.tolist()
    count = len(waves)
    for i, j in itertools.product(range(count), repeat=2):
        near = window is None or i - j < window or j < sink
        assert matrix[i][j] == (i == j or (waves[j] < waves[i] and near))
    for j in range(count):
        readers = [i for i in range(count) if matrix[i][j]]
        gone = [newest for newest in range(j + 1, count) if visible.expired(j, newest)]
        assert not gone or max(readers) < min(gone)


def test_multiscale_is_the_mask_of_var() -> None:
    """VAR (arXiv:2404.02905): a token reads all tokens of its own and of coarser scales."""
    sides = (1, 2, 4)
    scale = torch.cat([torch.full((side * side,), k) for k, side in enumerate(sides)])
    var = scale[:, None] >= scale[None, :]
    assert torch.equal(_tokens(Units(parse("multiscale:4,2,1/frames=1"), 1, 4, 4), Visible()), var)


@pytest.mark.parametrize(("name", "block_frames"), [("frame", 1), ("chunk:3", 3)])
def test_chunks_are_the_block_causal_mask_of_self_forcing(name: str, block_frames: int) -> None:
    """Self-Forcing (arXiv:2506.08009): a token reads up to the end of its own block of frames."""
    tokens, frames = 6, 9
    block = block_frames * tokens
    ends = torch.tensor([(q // block + 1) * block for q in range(frames * tokens)])
    published = torch.arange(frames * tokens)[None, :] < ends[:, None]
    assert torch.equal(_tokens(Units(parse(name), frames, 2, 3), Visible()), published)


def test_clean_copies_are_the_teacher_forcing_mask_of_self_forcing() -> None:
    """Clean reads clean up to its block; noisy reads clean before its block, and its block."""
    tokens, frames, block_frames = 4, 6, 2
    units = Units(Blocks(block_frames), frames, 2, 2)
    half, block = frames * tokens, block_frames * tokens
    published = torch.zeros(2 * half, 2 * half, dtype=torch.bool)
    for q in range(2 * half):
        start = q % half // block * block
        if q < half:
            published[q, : start + block] = True
        else:
            published[q, :start] = True
            published[q, half + start : half + start + block] = True
    unit = torch.cat([units.unit, units.unit + units.count])
    doubled = clean_copies(_visible(units, Visible()))
    assert torch.equal(token_mask(doubled, unit, unit), published)


@dataclass(frozen=True)
class _FirstAlone(Scheme):
    """One frame, then chunks: the layout of image-to-video models."""

    frames: None = None
    chunk: int = 2

    def segment(self, frames: int, height: int, width: int) -> list[list[Cells]]:
        starts = [0, *range(1, frames, self.chunk)]
        return [
            [box(range(a, b), range(height), range(width))]
            for a, b in itertools.pairwise([*starts, frames])
        ]


def test_a_first_frame_of_its_own_is_the_mask_of_1_and_n_and_n() -> None:
    """Image-to-video models make blocks of 1, n, n, ... frames: a scheme, not a branch."""
    frames, tokens, n = 7, 4, 2
    block = [0 if f == 0 else 1 + (f - 1) // n for f in range(frames)]
    published = torch.tensor(
        [[block[k // tokens] <= block[q // tokens] for k in range(28)] for q in range(28)]
    )
    assert torch.equal(_tokens(Units(_FirstAlone(chunk=n), frames, 2, 2), Visible()), published)


@pytest.mark.parametrize(("window", "sink"), [(1, 0), (3, 0), (3, 1), (2, 3)])
def test_window_and_sinks_are_those_of_streaming_llm(window: int, sink: int) -> None:
    """StreamingLLM (arXiv:2309.17453): the first tokens and the most recent ones."""
    frames, tokens = 8, 4
    published = torch.zeros(32, 32, dtype=torch.bool)
    for q in range(frames):
        for k in range(q + 1):
            if k < sink or k > q - window:
                published[q * tokens : (q + 1) * tokens, k * tokens : (k + 1) * tokens] = True
    units = Units(parse("frame"), frames, 2, 2)
    assert torch.equal(_tokens(units, Visible(window=window, sink=sink)), published)


@pytest.mark.parametrize("name", SCHEMES)
def test_units_of_counts_whole_segments(name: str) -> None:
    """Windows are given in frames and kept in units; they must span at least those frames."""
    units = Units(parse(name), None, 3, 4)
    for frames in range(1, 8):
        count = units.units_of(frames)
        assert count % units.units_per_segment == 0
        spanned = {cell[0] for index in range(count) for cell in units.at(index).cells}
        segment = units.segment_frames
        assert spanned == set(range(math.ceil(frames / segment) * segment))


def test_a_segment_is_no_longer_than_its_clip() -> None:
    """A chunk of a million frames must not be laid out for a clip of five; endless, it is refused.

    It took a minute and gigabytes before anything was said.
    """
    units = Units(parse("chunk:1000000"), 5, 3, 4)
    assert units.sizes == (5 * 3 * 4,)
    assert units.segment_frames == 5
    assert units.units_of(2) == units.units_per_segment == 1
    with pytest.raises(ValueError, match="12000000 tokens of 1048576: use smaller units"):
        Units(parse("chunk:1000000"), None, 3, 4)


@pytest.mark.parametrize("name", SCHEMES)
def test_sinks_leave_a_window_room_for_a_segment(name: str) -> None:
    """Training and generation cut sinks by this rule; a window of sinks alone would see nothing."""
    segment = parse(name).frames
    for window, frames in itertools.product(range(1, 3 * segment + 2), range(3 * segment)):
        sink = Units(parse(name), None, 3, 4).whole_segments(frames, window=window)
        fits = [n for n in range(0, frames + 1, segment) if n + segment <= window]
        assert sink == max(fits, default=0)
