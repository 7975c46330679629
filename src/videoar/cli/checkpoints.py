"""`videoar info` and `videoar convert`: what a checkpoint is, in words and tables."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from videoar.checkpoints import convert as conversion
from videoar.checkpoints.checkpoint import Checkpoint
from videoar.checkpoints.wan import TransformerWeights
from videoar.cli import options
from videoar.cli.progress import say
from videoar.core.cache import cached_tokens
from videoar.core.schemes import parse
from videoar.core.units import Units, Visible
from videoar.encoders.codec import Codec
from videoar.evaluation.tables import cells, columns
from videoar.files import check_folder
from videoar.generation.config import GenerationConfig
from videoar.weights import as_dtype


def convert(args: options.Convert) -> None:
    """Convert a checkpoint."""
    check_folder(args.target)
    checkpoint = Checkpoint.find(args.source, base=args.base, lora=args.lora)
    how = {"format": args.format, "preset": args.preset, "dtype": args.dtype}
    for line in conversion.convert(checkpoint, args.target, **how, overwrite=args.force):
        say(line)


def info(args: options.Info) -> None:
    """Describe a checkpoint and forecast its memory."""
    checkpoint = Checkpoint.find(args.checkpoint, base=args.base, lora=args.lora)
    asked = {name: getattr(args, name) for name in ("seconds", "window", "preset", "dtype")}
    say(describe(checkpoint, **asked))


MIB = 2**20


def describe(
    checkpoint: Checkpoint,
    *,
    seconds: float,
    window: int | None,
    preset: str | None = None,
    dtype: str | torch.dtype | None = None,
) -> str:
    """Say what a checkpoint is, how it was made, and what memory a video in this window needs."""
    meta, parts, memory = checkpoint.meta, checkpoint.parts(), ""
    kinds = {name: type(part).__name__ for name, part in parts.items()}
    tensors: dict[str, list[Tensor]] = {
        name: list(part.parameters() if isinstance(part, Codec) else part.tensors())
        for name, part in parts.items()
    }
    about, stated = "format    videoar", None
    if "transformer" in meta.get("components", ["transformer"]):
        found, stated = checkpoint.transformer(), checkpoint.sampling(preset)
        kinds["transformer"] = "VideoTransformer"
        tensors["transformer"] = list(found.weights.values())
        about = f"format    {found.format}"
        how = {"window_frames": window} if window is not None else {}
        trained, dtype = meta.get("units"), as_dtype(dtype)
        memory = _memory(
            found, parts.get("codec"), trained, stated | how, seconds=seconds, dtype=dtype
        )
    components = [
        {
            "component": name,
            "class": kinds[name],
            "parameters": f"{sum(tensor.numel() for tensor in part):,}",
            "dtype": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in part})),
            "size": f"{sum(tensor.nbytes for tensor in part) / MIB:.2f} MiB",
        }
        for name, part in sorted(tensors.items())
    ]
    history = _history(meta | ({} if stated is None else {"sampling": stated}))
    table = columns(cells(components))
    return f"{checkpoint.source}\n\n{table}\n\n{about}\n{history}\n\n{memory}".rstrip()


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
    found: TransformerWeights,
    codec: Codec | None,
    trained: list[str] | None,
    stated: dict[str, Any],
    *,
    seconds: float,
    dtype: torch.dtype | None,
) -> str:
    """Forecast the memory of a video, for the kinds of unit that the model was trained with."""
    height, width, config = stated.pop("height"), stated.pop("width"), found.config
    sampling = GenerationConfig(**stated)
    weights = sum(t.numel() * (dtype or t.dtype).itemsize for t in found.weights.values())
    stride, decoding = (4, 8, 8), "a decoder"
    if codec is not None:
        # On the meta device: nothing is computed, however large the frames are.
        stride, decoder = codec.stride, codec.to("meta").stream_decoder()
        size = (height // stride[1], width // stride[2])
        decoder(torch.zeros(1, 1, codec.latent_channels, *size, device="meta"))
        bytes_ = sum(tensor.nbytes for tensor in decoder.state_dict().values())
        own = sum(parameter.nbytes for parameter in codec.parameters())
        decoding = f"decoder {own / MIB:.2f} MiB and its memory {bytes_ / MIB:.2f} MiB"
    itemsize = (dtype or found.dtype).itemsize
    token = 2 * config.num_layers * config.hidden_size * itemsize / MIB
    frames = 1 + math.ceil((max(1, round(seconds * sampling.fps)) - 1) / stride[0])
    rows = []
    for name in trained or [str(sampling.units)]:
        lattice = (height // stride[1] // config.patch, width // stride[2] // config.patch)
        units = Units(parse(name), frames, *lattice)
        cached = cached_tokens(units, replace(sampling, units=name).visible(units))
        rows.append(
            {
                "units": name,
                "per latent frame": f"{sum(units.sizes) * token / frames:.3f} MiB",
                "in the window": f"{cached * token:.2f} MiB, {cached} tokens",
                "without a window": f"{cached_tokens(units, Visible()) * token:.2f} MiB",
            }
        )
    return (
        f"memory for {seconds:g} s of {width}x{height}, in a window of "
        f"{sampling.window_frames or 'all'} latent frames:\n"
        f"weights {weights / MIB:.2f} MiB, {decoding}; keys and values, "
        f"twice as many with guidance:\n{columns(cells(rows))}"
    )
