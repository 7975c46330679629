"""What a checkpoint, a partition or a clip is, in words and tables."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import nn

from videoar import world
from videoar.checkpoint import load_component, load_meta
from videoar.pipeline import CODECS, VideoPipeline
from videoar.units import Units, Visible, parse

MIB = 2**20


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay rows of cells out in columns."""
    lines = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def checkpoint(folder: Path, *, seconds: float, window: int | None) -> str:
    """Say what a checkpoint is, how it was made, and what memory a video in this window needs."""
    meta, memory = load_meta(folder), ""
    if "transformer" in meta.get("components", ()):
        pipe = VideoPipeline.from_pretrained(folder)
        parts: dict[str, nn.Module] = {
            "transformer": pipe.transformer,
            "text": pipe.prompt_encoder.encoder,
            "codec": pipe.codec,
        }
        memory = _memory(pipe, list(parts.values()), seconds=seconds, window=window)
    else:
        parts = {"codec": load_component(folder / "codec", CODECS)}
    components = [
        {
            "component": name,
            "class": type(part).__name__,
            "parameters": f"{sum(parameter.numel() for parameter in part.parameters()):,}",
            "files": f"{sum(f.stat().st_size for f in (folder / name).iterdir()) / MIB:.2f} MiB",
        }
        for name, part in parts.items()
    ]
    return f"{folder}\n\n{table(components)}\n\n{_history(meta)}\n\n{memory}".rstrip()


def _history(meta: dict[str, Any]) -> str:
    """Say how a checkpoint was made, as far as it tells."""

    def pairs(name: str) -> str:
        return ", ".join(f"{key} {value}" for key, value in meta.get(name, {}).items())

    found = {
        "recipe": meta.get("config", {}).get("name"),
        "steps": meta.get("step"),
        "seed": meta.get("seed"),
        "hours": f"{meta['seconds'] / 3600:.2f}" if "seconds" in meta else None,
        "hardware": meta.get("hardware"),
        "commit": meta.get("git_commit"),
        "versions": pairs("versions"),
        "units": ", ".join(meta.get("units", ())),
        "sampling": pairs("sampling"),
    }
    if curve := meta.get("loss_curve"):
        found["loss"] = f"{curve[0][1]:.4g} at step {curve[0][0]}, {curve[-1][1]:.4g} at the end"
    return "\n".join(f"{name:<10}{v}" for name, v in found.items() if v not in (None, ""))


@torch.inference_mode()
def _memory(
    pipe: VideoPipeline, parts: list[nn.Module], *, seconds: float, window: int | None
) -> str:
    """Forecast the memory of a video, for the kinds of unit that the model was trained with."""
    config, sampling, codec = pipe.transformer.config, pipe.sampling, pipe.codec
    if window is not None:
        sampling = replace(sampling, window_frames=window)
    decoder = codec.stream_decoder()
    size = (pipe.height // codec.stride[1], pipe.width // codec.stride[2])
    decoder(torch.zeros(1, 1, codec.latent_channels, *size))
    memory = sum(tensor.nbytes for tensor in decoder.state_dict().values())
    weights = sum(tensor.nbytes for part in parts for tensor in part.parameters())
    token = 2 * config.num_layers * config.hidden_size * pipe.transformer.dtype.itemsize / MIB
    num_frames = max(1, round(seconds * sampling.fps))
    rows = []
    for name in pipe.meta.get("units") or [sampling.units]:
        units = pipe.lattice(parse(name), num_frames)
        cached = cached_tokens(units, replace(sampling, units=name).visible(units))
        row = {
            "units": name,
            "per latent frame": f"{sum(units.sizes) * token / (units.frames or 1):.3f} MiB",
            "in the window": f"{cached * token:.2f} MiB, {cached} tokens",
            "without a window": f"{cached_tokens(units, Visible()) * token:.2f} MiB",
        }
        rows.append(row)
    return (
        f"memory for {seconds:g} s of {pipe.width}x{pipe.height}, in a window of "
        f"{sampling.window_frames or 'all'} latent frames:\n"
        f"weights {weights / MIB:.2f} MiB, decoder {memory / MIB:.2f} MiB, and keys and values "
        f"(twice that with guidance)\n{table(rows)}"
    )


def cached_tokens(units: Units, visible: Visible) -> int:
    """Return the most tokens that the cache holds while wave after wave is generated."""
    count, waves = len(units.sizes), units.waves.tolist()
    # The last whole segment and what follows it: by then the cache is as full as it gets.
    last = range(max(0, count - 2 * units.units_per_segment), count)
    return max(
        sum(
            size
            for index, size in enumerate(units.sizes)
            if waves[index] < waves[reader] and not visible.expired(index, reader)
        )
        for reader in last
    )


def partition(name: str, units: Units, visible: Visible, *, steps: int) -> dict[str, Any]:
    """Return what a scheme makes of a lattice, as a row of a table."""
    waves = int(units.waves.max()) + 1
    return {
        "scheme": name,
        "units": len(units.sizes),
        "tokens per unit": ", ".join(map(str, sorted(set(units.sizes)))),
        "waves": waves,
        "passes": waves * steps,
        "cached tokens": cached_tokens(units, visible),
    }


def seen(clips: Iterable[UInt8[np.ndarray, "frames height width 3"]], *, fps: float) -> str:
    """Say what the judge of the procedural world sees in clips, the most frequent first."""
    counts: Counter[str] = Counter()
    for clip in clips:
        reading = world.read(clip, fps=round(fps))
        things = [
            f"{thing.size} {thing.color} {thing.shape or 'thing'} {thing.motion or 'going astray'}"
            for thing in reading.things
        ]
        ground = reading.background or "another colour"
        counts[f"{' and '.join(things) or 'nothing'} on {ground}"] += 1
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{count}x {text}" for text, count in counts.most_common(3))
