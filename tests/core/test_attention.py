"""Rotary positions are relative, split as in Wan, and exact far away; `attend` is softmax."""

import contextlib
import importlib.util
from types import ModuleType, NoneType

import pytest
import torch
import torch.nn.functional as F
from reference import attention, turned
from tiny import SCHEMES
from torch import Tensor
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    list_flash_attention_impls,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.nn.attention.flex_attention import create_mask

from videoar.core import attention as seam
from videoar.core.attention import Spans, attend, attention_mask, rope_table, rotate
from videoar.core.schemes import parse
from videoar.core.units import Units, Visible, clean_copies, token_mask


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _places(tokens: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(3)
    return torch.randint(0, 9, (tokens, 4), generator=rng).float()


@pytest.mark.parametrize("head_dim", [6, 12, 48, 128])
def test_rotation_is_multiplication_by_unit_complex_numbers(head_dim: int) -> None:
    """Interleaved pairs turn as the published code turns them, so public weights mean the same."""
    x, coords = _random(2, 3, 5, head_dim), _places(5)
    ours = rotate(x, rope_table(coords, head_dim=head_dim, theta=10000.0))
    torch.testing.assert_close(ours, turned(x, coords, theta=10000.0), atol=1e-6, rtol=1e-5)


def test_the_axes_of_a_wan_head_get_22_21_and_21_pairs() -> None:
    """A pair turns with one axis only; another split would make public weights nonsense."""
    turns = []
    for axis in range(4):
        coords = torch.zeros(1, 4)
        coords[0, axis] = 1.0
        table = rope_table(coords, head_dim=128, theta=10000.0)
        turns.append(table[0].imag != 0)
    axis_of_pair = torch.stack(turns).float()
    assert axis_of_pair.sum(dim=1).tolist() == [22, 21, 21, 0]
    assert axis_of_pair.sum(dim=0).tolist() == [1.0] * 64
    # The first rates of an axis are 1 and theta ** (-2 / its channels).
    angle = rope_table(torch.tensor([[1.0, 0, 0, 0]]), head_dim=128, theta=10000.0)[0].imag.asin()
    torch.testing.assert_close(angle[:2], torch.tensor([1.0, 10000.0 ** (-2 / 44)]))


def test_attention_depends_on_differences_of_positions_only() -> None:
    """That is why keys may be cached after the rotation, at absolute positions."""
    q, k, v = (_random(1, 2, 6, 12, seed=seed) for seed in range(3))
    coords = _places(6)

    def read(offset: torch.Tensor) -> torch.Tensor:
        table = rope_table(coords + offset, head_dim=12, theta=100.0)
        return attend(rotate(q, table), rotate(k, table), v)

    here = read(torch.zeros(4))
    torch.testing.assert_close(read(torch.tensor([5.0, 3.0, 7.0, 1.0])), here, atol=1e-5, rtol=1e-5)
    moved = rope_table(coords * torch.tensor([2.0, 1, 1, 1]), head_dim=12, theta=100.0)
    assert not torch.allclose(attend(rotate(q, moved), rotate(k, moved), v), here, atol=1e-3)


def test_a_day_of_video_does_not_wear_out_the_positions() -> None:
    """Angles are formed in double precision; in single precision they blur after minutes."""
    q, k = _random(1, 1, 1, 128, seed=1), _random(1, 1, 1, 128, seed=2)

    def score(frame: float) -> torch.Tensor:
        tables = (
            rope_table(torch.tensor([[t, 0.0, 0.0, 0.0]]), head_dim=128, theta=10000.0)
            for t in (frame, frame - 3)
        )
        return (rotate(q, next(tables)) * rotate(k, next(tables))).sum()

    torch.testing.assert_close(score(24 * 3600 * 4.0), score(3.0), atol=1e-4, rtol=1e-5)


def test_rotations_compose() -> None:
    """Sinks are moved by one more rotation of keys that are rotated already."""
    x = _random(1, 1, 1, 12)

    def table(t: float) -> torch.Tensor:
        return rope_table(torch.tensor([[t, 2.0, 1.0, 0.0]]), head_dim=12, theta=100.0)

    shift = rope_table(torch.tensor([[5.0, 0.0, 0.0, 0.0]]), head_dim=12, theta=100.0)
    twice = rotate(rotate(x, table(4.0)), shift)
    torch.testing.assert_close(twice, rotate(x, table(9.0)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_attend_is_softmax_over_what_may_be_read(masked: bool) -> None:
    """One seam for every kernel: they must agree with the formula."""
    q, k, v = _random(2, 2, 5, 12), _random(2, 2, 7, 12, seed=1), _random(2, 2, 7, 12, seed=2)
    mask = torch.ones(5, 7, dtype=torch.bool)
    if masked:
        mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.5
        mask[:, 0] = True
    ours = attend(q, k, v, mask if masked else None)
    torch.testing.assert_close(ours, attention(q, k, v, mask), atol=1e-6, rtol=1e-5)


def test_what_is_masked_cannot_be_told_from_anything_else() -> None:
    """Not a bit of an output changes with a key that it must not read."""
    q, k, v = (_random(1, 2, 6, 12, seed=seed) for seed in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    before = attend(q, k, v, mask)
    k[:, :, 4:], v[:, :, 4:] = 1e3, -1e3
    assert torch.equal(attend(q, k, v, mask)[:, :, :4], before[:, :, :4])


def _unchecked() -> ModuleType:
    """The module without the type checks of these tests: they hide a function's arguments."""
    spec = importlib.util.spec_from_file_location("unchecked_attention", seam.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _clip(name: str, *, copies: bool = True) -> tuple[Tensor, Tensor]:
    """Who may read whom in a clip with a window and a sink, and the unit of every token."""
    units = Units(parse(name), 3, 3, 4)
    index = torch.arange(len(units.sizes))
    visible = Visible(window=4, sink=1).matrix(index, units.waves)
    if not copies:
        return visible, units.unit
    return clean_copies(visible), torch.cat([units.unit, units.unit + len(index)])


def test_the_block_mask_is_the_token_mask() -> None:
    """Both forms come from one rule; a model trained with one runs with the other."""
    visible, unit = _clip("cube:1x2x2/wavefront")
    rows = unit[7:]  # a student's last step asks for some of the queries alone
    mask = _unchecked().block_mask(visible, rows, unit, device="cpu")
    dense = create_mask(mask.mask_mod, 1, 1, len(rows), len(unit), device="cpu")
    assert torch.equal(dense[0, 0], token_mask(visible, rows, unit))


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_spans_are_the_token_mask(name: str, copies: bool) -> None:
    """Runs of queries over runs of keys give what a dense mask gives, and the same gradients.

    Keys in another order, as a cache keeps them, are other runs.
    """
    visible, unit = _clip(name, copies=copies)
    for read in (unit, unit[torch.randperm(len(unit), generator=torch.Generator())]):
        query = _random(2, 2, len(unit), 12, seed=0).requires_grad_()
        key, value = (_random(2, 2, len(unit), 12, seed=seed) for seed in (1, 2))
        dense = attend(query, key, value, token_mask(visible, unit, read))
        spans = attend(query, key, value, Spans.of(visible, unit, read))
        torch.testing.assert_close(spans, dense, atol=2e-6, rtol=1e-5)
        gradients = [torch.autograd.grad(out.square().sum(), query)[0] for out in (spans, dense)]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_the_form_of_a_mask_follows_its_units() -> None:
    """Large units are read by runs and small ones by a dense mask; what hides nothing is no mask.

    A dense mask of large units would cost as much as reading everything.
    """
    for name, form in (("chunk:2", Spans), ("cube:1x2x2", Tensor), ("full", NoneType)):
        units = Units(parse(name), 4, 8, 8)
        visible = Visible().matrix(torch.arange(len(units.sizes)), units.waves)
        mask = attention_mask(visible, units.unit, units.unit, device="cpu")
        assert isinstance(mask, form)


KERNELS = {
    "math": (SDPBackend.MATH, "cpu"),
    "flash of the processor": (SDPBackend.FLASH_ATTENTION, "cpu"),
    "flash": (SDPBackend.FLASH_ATTENTION, "cuda"),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, "cuda"),
    "cuDNN": (SDPBackend.CUDNN_ATTENTION, "cuda"),
    "FA3": (SDPBackend.FLASH_ATTENTION, "cuda"),
    "FA4": (SDPBackend.FLASH_ATTENTION, "cuda"),
    "flex": (None, "cuda"),
}
"""By which backend of SDPA a kernel comes, and where it runs."""


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_behind_the_seam_gives_the_same(name: str) -> None:
    """`attend` is the one seam: torch chooses among these, and a user among what is installed."""
    backend, device = KERNELS[name]
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{name} needs a CUDA device")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    query, key, value = (_random(1, 2, n, 64, seed=n).to(device, dtype) for n in (128, 256, 257))
    value = value[:, :, 1:]
    seen = torch.tensor([[True, True, False], [True, True, True]])
    reader = torch.arange(2).repeat_interleave(64)
    read = torch.arange(3).repeat_interleave(torch.tensor([64, 64, 128]))
    masks = {"none": None, "spans": Spans.of(seen, reader, read)}
    if backend is None:
        masks = {"blocks": seam.block_mask(seen, reader, read, device=device)}
    if name in list_flash_attention_impls():
        try:
            activate_flash_attention_impl(name)
        except ImportError as error:
            pytest.skip(f"{name} is not installed: {error}")
    try:
        for form, mask in masks.items():
            dense = None if form == "none" else token_mask(seen, reader, read).to(device)
            with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                found = attend(query, key, value, mask).float()
            with sdpa_kernel(SDPBackend.MATH):
                given = (x.float() for x in (query, key, value))
                expected = F.scaled_dot_product_attention(*given, attn_mask=dense)
            error = 1e-6 if device == "cpu" else 2e-2
            torch.testing.assert_close(found, expected, atol=error, rtol=error)
    finally:
        if name in list_flash_attention_impls():
            restore_flash_attention_impl()
