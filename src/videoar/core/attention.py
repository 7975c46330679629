"""The mask in the form a kernel wants, rotary positions, and `attend`: the one seam for kernels."""

import itertools
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from videoar.core.units import Keys, Queries, UnitMask, token_mask
from videoar.machine import sent


@cache
def _frequencies(head_dim: int, theta: float, device: torch.device) -> list[Tensor]:
    """Angular frequencies per axis; t takes what h and w leave (Wan: 44, 42, 42 of 128 dims)."""
    side = 2 * (head_dim // 6)
    dims = (head_dim - 2 * side, side, side)
    exponents = (torch.arange(0, d, 2, dtype=torch.float64) / d for d in dims)
    return [(theta**-exponent).to(device) for exponent in exponents]


def rope_table(
    coords: Float[Tensor, "*tokens 4"], *, head_dim: int, theta: float
) -> Complex[Tensor, "*tokens pairs"]:
    """Rotations for coordinates (t, h, w, level), as complex numbers; the level takes no part.

    Angles are formed in float64: positions have no upper limit, as a table would impose. (Su et
    al. 2021, arXiv:2104.09864, split over three axes.)
    """
    frequencies = _frequencies(head_dim, theta, coords.device)
    parts = [coords[..., axis, None].double() * f for axis, f in enumerate(frequencies)]
    angles = torch.cat(parts, dim=-1)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def rotate(
    x: Float[Tensor, "*batch head_dim"], table: Complex[Tensor, "*#tokens pairs"]
) -> Float[Tensor, "*batch head_dim"]:
    """Rotate interleaved pairs (2i, 2i+1). Rotations compose, so cached keys can be moved again."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).view(x.shape).type_as(x)


@dataclass(frozen=True)
class Spans:
    """A mask of few large units: runs of queries, and the runs of keys that each of them reads.

    Every run is one call of a kernel that sees no mask, so what is not read costs nothing.
    """

    queries: tuple[slice, ...]
    keys: tuple[tuple[slice, ...], ...]

    @classmethod
    def of(cls, visible: UnitMask, reader: Tensor, read: Tensor) -> "Spans":
        """Cut `token_mask(visible, reader, read)` into runs."""
        readers, queries = runs(reader)
        reads, keys = runs(read)
        spans = []
        for row in visible[readers][:, reads].tolist():
            pairs = itertools.groupby(zip(keys, row, strict=True), lambda pair: pair[1])
            joined = [[key for key, _ in group] for found, group in pairs if found]
            spans.append(tuple(slice(run[0].start, run[-1].stop) for run in joined))
        return cls(tuple(queries), tuple(spans))


Mask = Bool[Tensor, "queries keys"] | Spans | BlockMask
"""Who reads whom, in one of three forms: see `attention_mask`."""
SMALLEST_RUN = 32  # queries; with fewer, one call with a dense mask is as fast on a CPU
LARGEST_DENSE = 2**24  # entries; a clip of Wan and its clean copies have 4 * 10^9


def attention_mask(
    visible: UnitMask, reader: Queries, read: Keys, *, device: torch.device | str
) -> Mask | None:
    """Return `token_mask(visible, reader, read)` in the form that is fast; None if all is read.

    Spans for few large units (those of one pass of the sampler, and a clip on a CPU), a block mask
    for large masks on CUDA, else a dense one.
    """
    if visible.all():
        return None
    device = torch.device(device)
    num_runs = len(torch.unique_consecutive(reader))
    if len(reader) >= SMALLEST_RUN * num_runs and (num_runs <= 2 or device.type == "cpu"):
        return Spans.of(visible, reader, read)
    if len(reader) * len(read) > LARGEST_DENSE and device.type == "cuda":
        return block_mask(visible, reader, read, device=device)
    return sent(token_mask(visible, reader, read), device)


def runs(unit: Int[Tensor, " tokens"]) -> tuple[Int[Tensor, " runs"], list[slice]]:
    """Return the unit of every run of equal units, and where the run lies."""
    units, sizes = torch.unique_consecutive(unit, return_counts=True)
    ends = [0, *sizes.cumsum(0).tolist()]
    return units, [slice(*ends) for ends in itertools.pairwise(ends)]


def block_mask(
    visible: UnitMask, reader: Queries, read: Keys, *, device: torch.device | str
) -> BlockMask:
    """The block-sparse form of `token_mask(visible, reader, read)` for FlexAttention."""
    visible, reader, read = (sent(part, device) for part in (visible, reader, read))

    def mask_mod(batch, head, query, key):
        return visible[reader[query], read[key]]

    return create_block_mask(mask_mod, None, None, len(reader), len(read), device=device)


def attend(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    value: Float[Tensor, "batch heads keys head_dim"],
    mask: Mask | None = None,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Softmax attention.

    A dense mask and spans run on SDPA, a block mask on FlexAttention (CUDA), none on the fastest
    kernel that SDPA finds. There is no silent change of backend.
    """
    if isinstance(mask, BlockMask):
        return _compiled_flex()(query, key, value, block_mask=mask)
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # In training on a CPU the bfloat16 kernel's backward takes twice as long as the float32
        # one.
        with torch.autocast("cpu", enabled=False):
            return attend(query.float(), key.float(), value.float(), mask)
    if not isinstance(mask, Spans):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    each = zip(mask.queries, mask.keys, strict=True)
    return torch.cat([attend(query[:, :, q], _at(key, k), _at(value, k)) for q, k in each], dim=2)


def _at(x: Tensor, spans: tuple[slice, ...]) -> Tensor:
    """Return the tokens of some spans; those of one without a copy."""
    return x[:, :, spans[0]] if len(spans) == 1 else torch.cat([x[:, :, s] for s in spans], dim=2)


@cache
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=False)
