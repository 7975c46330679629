"""`videoar info` and `videoar convert`: what a checkpoint is, in words and tables."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from videoar.checkpoints import convert as conversion
from videoar.checkpoints.checkpoint import Checkpoint
from videoar.checkpoints.wan import TransformerWeights
from videoar.cli import options
from videoar.cli.progress import say
from videoar.core.cache import cached_tokens
from videoar.core.schemes import parse
from videoar.core.units import Units
from videoar.encoders.codec import Codec
from videoar.evaluation.tables import columns
from videoar.files import Json, check_folder
from videoar.generation.config import GenerationConfig
from videoar.machine import LiveBytes, peak_bytes
from videoar.weights import as_dtype, build_config

MIB = 2**20
KERNELS = 55 * MIB  # of libraries, that are not in memory before something is computed


def convert(args: options.Convert) -> None:
    """Convert a checkpoint."""
    check_folder(args.target)
    checkpoint = Checkpoint.find(args.source, base=args.base, lora=args.lora)
    how = {"format": args.format, "preset": args.preset, "dtype": args.dtype}
    for line in conversion.convert(checkpoint, args.target, **how, overwrite=args.force):
        say(line)


def info(args: options.Info) -> None:
    """Say what a checkpoint is, how it was made, and what memory a video in this window needs."""
    checkpoint = Checkpoint.find(args.checkpoint, base=args.base, lora=args.lora)
    meta, parts, about, memory = checkpoint.meta, checkpoint.parts(), "videoar", ""
    kinds: dict[str, tuple[str, list[Tensor]]] = {}
    for name, part in parts.items():
        tensors = part.parameters() if isinstance(part, Codec) else part.tensors()
        kinds[name] = type(part).__name__, list(tensors)
    if "transformer" in meta.get("components", ["transformer"]):
        found, sampling = checkpoint.transformer(), checkpoint.sampling(args.preset)
        kinds["transformer"] = "VideoTransformer", list(found.weights.values())
        meta = meta | {"sampling": sampling}
        about, memory = found.format, _memory(args, found, parts.get("codec"), meta)
    rows = [["component", "class", "parameters", "dtype", "size"]]
    for name, (kind, part) in sorted(kinds.items()):
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in part})
        rows.append([name, kind, f"{sum(tensor.numel() for tensor in part):,}", ", ".join(dtypes)])
        rows[-1] += [f"{sum(tensor.nbytes for tensor in part) / MIB:.2f} MiB"]
    about = f"{checkpoint.source}\n\n{columns(rows)}\n\nformat    {about}\n{_history(meta)}"
    say(f"{about}\n\n{memory}".rstrip())


def _history(meta: Json) -> str:
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
    if prompts := meta.get("prompts"):
        found["prompts"] = f"such as {prompts[0]!r}"
    if curve := meta.get("loss_curve"):
        found["loss"] = f"{curve[0][1]:.4g} at step {curve[0][0]}, {curve[-1][1]:.4g} at the end"
    return "\n".join(f"{name:<10}{v}" for name, v in found.items() if v not in (None, ""))


@torch.inference_mode()
def _memory(args: options.Info, found: TransformerWeights, codec: Codec | None, meta: Json) -> str:
    """Forecast the memory of a video, for the kinds of unit that the model was trained with."""
    config, dtype, stated = found.config, as_dtype(args.dtype), dict(meta["sampling"])
    height, width = stated.pop("height"), stated.pop("width")
    sampling = build_config(GenerationConfig, stated, file=found.file)
    if args.window is not None:
        sampling = replace(sampling, window_frames=args.window)
    weights = sum(t.numel() * (dtype or t.dtype).itemsize for t in found.weights.values())
    stride, decoding, live, most = (4, 8, 8), "a decoder", LiveBytes(), 0.0
    decoder_weights, started = 0, peak_bytes()  # before what only a forecast needs
    if codec is not None:
        # On the meta device: nothing is computed, however large the frames are.
        stride, decoder = codec.stride, codec.to("meta").stream_decoder()
        latents = (codec.latent_channels, height // stride[1], width // stride[2])
        with live:
            decoder(torch.zeros(1, 2, *latents, device="meta"))  # the first leaves less behind
        bytes_ = sum(tensor.nbytes for tensor in decoder.state_dict().values())
        decoder_weights = sum(parameter.nbytes for parameter in codec.parameters())
        decoding = f"decoder {decoder_weights / MIB:.2f} MiB and its memory {bytes_ / MIB:.2f} MiB"
    itemsize = (dtype or found.dtype).itemsize
    token = 2 * config.num_layers * config.hidden_size * itemsize / MIB
    frames = 1 + math.ceil((max(1, round(args.seconds * sampling.fps)) - 1) / stride[0])
    rows = [["units", "per latent frame", "in the window", "without a window"]]
    for name in meta.get("units") or [str(sampling.units)]:
        lattice = (height // stride[1] // config.patch, width // stride[2] // config.patch)
        try:
            units = Units(parse(name), frames, *lattice)
        except ValueError as error:  # of one's own, on another machine
            rows.append([name, "", "", str(error)])
            continue
        visible = replace(sampling, units=name).visible(units)
        cached = cached_tokens(units, visible)
        rows.append([name, f"{sum(units.sizes) * token / frames:.3f} MiB"])
        held = cached_tokens(units, visible, in_flight=2)
        rows[-1] += [f"{held * token:.2f} MiB, {cached} tokens and {held - cached} of a pass"]
        rows[-1] += [f"{sum(units.sizes) * token:.2f} MiB"]
        wide = 2 * config.ffn_dim + 6 * config.hidden_size  # of a pass, the most at one time
        most = max(most, held * token + (held - cached) * wide * itemsize / MIB)
    whole = most + (weights + decoder_weights + live.peak + started + KERNELS) / MIB
    return (
        f"memory for {args.seconds:g} s of {width}x{height}, in a window of "
        f"{sampling.window_frames or 'all'} latent frames:\n"
        f"weights {weights / MIB:.2f} MiB, {decoding}; keys and values, "
        f"twice as many with guidance:\n{columns(rows)}\n\n"
        f"peak of the process on a CPU, when prompts are encoded: {whole:.0f} MiB\n"
    )
