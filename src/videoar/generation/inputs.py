"""What a call of the pipeline is given and gives: keywords, seeds, callbacks, output."""

import itertools
import math
import numbers
import secrets
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from videoar.checks import Note, check, check_names, hint, signal_of
from videoar.core.sampler import Sampler
from videoar.core.schemes import Scheme, parse
from videoar.core.tokens import Known, to_tokens
from videoar.core.transformer import Network
from videoar.core.units import Units
from videoar.data.video import Video, VideoWriter
from videoar.encoders.codec import from_frames
from videoar.generation.config import AUTO, GenerationConfig, Plan, trained_flow
from videoar.generation.graphs import Recorded
from videoar.generation.guidance import Guided
from videoar.generation.latents import known_tokens
from videoar.generation.stream import Generation
from videoar.generation.timing import Timing
from videoar.machine import peak_bytes

MAX_PROMPT_CHARACTERS = 2000
MAX_SEED = 2**63 - 1
OUTPUTS: dict[str, Callable[[Any, float, int], Any]] = {
    "video": lambda frames, fps, seed: Video(frames=frames, fps=fps, seed=seed),
    "np": lambda frames, *_: frames.astype("float32") / 255,
    "pil": lambda frames, *_: [Image.fromarray(frame) for frame in frames],
    "pt": lambda frames, *_: torch.from_numpy(frames).movedim(-1, 1).float() / 255,
    "latent": lambda latents, *_: latents,
}
"""What `output_type` makes of frames (or latents), their rate and seed."""
Show = Callable[[int, float], None]
"""Is told how many frames there are after how many seconds."""
OnStepEnd = Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any] | None]
"""(pipe, step, timestep, {"latents": ..., "unit": ...}) -> {"latents": ...}, or None."""


def seeds_of(seed: Any, generator: Any, count: int) -> list[Any]:
    """Return the seeds of videos: as given, counted from the first, or drawn."""
    if generator is not None and seed:
        raise ValueError("seed and generator both say which noise it is: give one of them.")
    if generator is not None:
        draws = generator if isinstance(generator, Sequence) else [generator] * count
        return [int(torch.randint(MAX_SEED, (), generator=g, device=g.device)) for g in draws]
    if seed is None:  # not by torch's own generator, which begins alike in every process
        return [secrets.randbelow(MAX_SEED) for _ in range(count)]
    if isinstance(seed, numbers.Integral):
        return [int(seed) + number for number in range(count)]
    return list(seed) if isinstance(seed, Sequence) else [seed]


def hearing(
    pipe: Any, generation: Generation, callback: OnStepEnd | None, show: Callable[[object], None]
) -> Callable[[int, int, Tensor], Tensor]:
    """Return what a sampler calls after a step of a unit: it says how far it is, and asks."""
    sampler, done = generation.sampler, 0
    total = _steps(sampler)

    def on_step(unit: int, step: int, tokens: Tensor) -> Tensor:
        nonlocal sampler, done, total
        if generation.sampler is not sampler:  # the units are others from here on
            total = done + _steps(sampler := generation.sampler)
        done, seconds = done + 1, time.perf_counter() - generation.started
        show(f"{done} of {total} steps, {seconds * (total / done - 1):.0f} s left")
        values: Any = {"latents": tokens, "unit": unit}
        sigma = sampler.rows.of(sampler.units.wave_of(unit))[step]
        changed = callback(pipe, step, 1000 * sigma, values) if callback else None
        return (changed or values).get("latents", tokens)

    return on_step


def warned(generation: Generation) -> Generation:
    """Warn of what is asked of a model that its training did not know, and return the same."""
    for line in doubts_of(generation):
        warnings.warn(line, Note, stacklevel=3)
    return generation


def doubts_of(generation: Generation) -> list[str]:
    """Return `doubts` about what follows in a stream."""
    pipe, plan = generation.pipe, generation.wanted or generation.plan
    later = (changes.get("prompts", ()) for _, changes in generation.script)
    prompts = [*plan.prompts, *itertools.chain.from_iterable(later)]
    options = plan.options.replaced(units=AUTO) if plan.routed else plan.options
    found = doubts(pipe, [options], prompts)
    own = [pipe.meta.get(side) for side in ("height", "width")]
    if None not in own and own != [pipe.height, pipe.width]:
        asked = f"{pipe.width}x{pipe.height}"
        found.append(f"the model's own videos have {own[1]}x{own[0]} pixels, not {asked}")
    return found


def _steps(sampler: Sampler) -> int:
    """Return how many steps there are to take, of all units but those that are known."""
    units, rows = sampler.units, sampler.rows
    usual, waves = len(rows.sigmas[-1]) - 1, map(units.wave_of, range(units.count or 0))
    first = itertools.takewhile(lambda wave: wave < len(rows.sigmas) - 1, waves)  # not a day's
    known = map(units.wave_of, sampler.known_units)
    more = sum(len(rows.of(wave)) - 1 - usual for wave in first)
    return more + (units.count or 0) * usual - sum(len(rows.of(wave)) - 1 for wave in known)


def write(generation: Generation, writer: VideoWriter, show: Show) -> Timing:
    """Write the frames of one video as they come, until the end or Ctrl-C.

    After every write `show` gets the frames, and the seconds since the work began.
    """
    stats = generation.stats
    try:
        with writer:
            for batch in generation:
                before = time.perf_counter()
                writer.write(batch[0])
                after = time.perf_counter()
                stats.write_seconds += after - before
                show(stats.frames, after - generation.started)
            before = time.perf_counter()
        stats.write_seconds += time.perf_counter() - before
    except KeyboardInterrupt as stop:
        stats.interrupted = signal_of(stop)
    stats.frames = writer.num_frames  # fewer than were generated, if it was stopped in a write
    stats.video_seconds = writer.num_frames / writer.fps
    stats.seconds = time.perf_counter() - generation.started
    stats.peak_bytes = peak_bytes()
    return stats


def menu_of(pipe: Any, units: str | Scheme) -> tuple[str | Scheme, ...]:
    """Return the schemes that a video may be made of: of `auto` those that a router chooses from.

    Raises:
        ValueError: there is no router.
    """
    if units == AUTO and pipe.router is None:
        raise ValueError(
            f"the units {AUTO} are chosen by a router, and the checkpoint has none: name units,"
            " such as cube:1x2x2, or train one with `videoar train router`"
        )
    return pipe.router.config.menu if units == AUTO else (units,)


def check_inputs(plan: Plan, *, encoded: bool, negative: str | None = None) -> None:
    """Raise unless a video can be made of what is asked for, and of a negative prompt."""
    prompts, seeds = plan.prompts, plan.seeds
    for prompt in (*prompts, plan.options.negative_prompt):
        check("A prompt", repr(prompt), isinstance(prompt, str), "a text")
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"The prompt has {len(prompt)} characters: shorten it to {MAX_PROMPT_CHARACTERS}."
            )
    if not encoded and not any(prompt.strip() for prompt in prompts):
        raise ValueError("The prompt is empty: describe the video in a few words.")
    for seed in seeds:
        check("seed", repr(seed), isinstance(seed, numbers.Integral | None), "a whole number")
        right = seed is not None and 0 <= seed <= MAX_SEED
        check("seed", seed, right, f"0 to {MAX_SEED}")
    scale = plan.options.guidance_scale
    check("guidance_scale", scale, 0 <= scale < math.inf, "0 or more")
    if len(prompts) != len(seeds):
        raise ValueError(f"There are {len(prompts)} prompts and {len(seeds)} seeds: give as many.")
    if negative and scale == 1:
        raise ValueError(
            "negative_prompt is what guidance leads away from, but guidance_scale is 1, which"
            " is none: raise it, or leave the negative prompt out."
        )


def check_plan(pipe: Any, plan: Plan, *, encoded: bool = False) -> None:
    """Raise a ValueError unless a stream can go on so."""
    check_inputs(plan, encoded=encoded)
    alone = not plan.routed or len(plan.prompts) == 1
    check("the number of videos", len(plan.prompts), alone, f"1 at a time with units {AUTO}")
    for units in menu_of(pipe, plan.units):
        pipe.settings(plan.options.replaced(units=units), None)


def doubts(pipe: Any, asked: Sequence[GenerationConfig], prompts: Sequence[str]) -> list[str]:
    """Return what is asked of a model that its training, as it tells it, did not know."""
    found = list[str]()
    # A scheme that is no name is the user's own, perhaps of a program that has none for it.
    if new := pipe.untrained([one.units for one in asked if isinstance(one.units, str)]):
        found.append(f"the model is {new}")
    noisy = [str(one.lag) for one in asked if one.lag not in (None, "autoregressive", one.steps)]
    told = noisy and pipe.meta.get("config")
    if told and trained_flow(pipe.meta, pipe.sampling).context == "clean":
        what = "the model was trained on clean context, and reads noisy units with lag"
        found.append(f"{what} {', '.join(dict.fromkeys(noisy))}")
    if unknown := pipe.unknown_words(" ".join(prompts)):
        words = [word + hint(word, pipe.meta["words"], " (did you mean {}?)") for word in unknown]
        found.append(f"in no caption of the model's training: {', '.join(words)}")
    if any(options.step == "renoise" and options.guidance_scale != 1 for options in asked):
        found.append("the model is distilled to sample without guidance, which takes a second pass")
    return found


def options_of(pipe: Any, sampling: Mapping[str, Any]) -> GenerationConfig:
    """Return how to generate: what is asked for by fields of `GenerationConfig`, or the default.

    Raises:
        TypeError: there is no such keyword.
    """
    calls = [*signature(pipe.generate).parameters, *signature(pipe.__call__).parameters]
    check_names(sampling, [*vars(pipe.sampling), *calls])
    return pipe.sampling.replaced(**sampling)


def network_of(pipe: Any, guidance_scale: float) -> Network:
    """Return what a sampler calls: the transformer of a pipeline, in what is to be around it."""
    network = pipe.transformer
    if pipe.compiled:
        from videoar.generation.compiled import Compiled

        network = Compiled(network)
    network = network if guidance_scale == 1 else Guided(network, guidance_scale)
    return Recorded(network) if pipe.graphs else network


def lattice_of(pipe: Any, units: str | Scheme, num_frames: int | None) -> Units:
    """Lay a scheme, or the one of a name, over the latents of `num_frames` pixel frames."""
    scheme = parse(units) if isinstance(units, str) else units
    time_stride, *strides = pipe.codec.stride
    frames = None if num_frames is None else 1 + math.ceil((num_frames - 1) / time_stride)
    if frames is not None and scheme.frames is not None:
        frames = math.ceil(frames / scheme.frames) * scheme.frames
    lengths = []
    for name, stride in zip(("height", "width"), strides, strict=True):
        size, side = getattr(pipe, name), stride * pipe.transformer.config.patch
        covers, fits = f"{size} pixels, but a token covers {side}", size >= side and not size % side
        check(name, covers, fits, f"a multiple of {side}")
        lengths.append(size // side)
    return Units(scheme, frames, *lengths)


def known_of(pipe: Any, conditioning: Any, batch: int, lattice: Units) -> dict[int, Known]:
    """Encode what a video begins with, by unit."""
    if conditioning is None:
        return {}
    pixels = from_frames(conditioning).to(pipe.device)
    encoded = pipe.codec.encode(pixels)
    encoded = encoded.expand(batch, *encoded.shape[1:])
    return known_tokens(encoded, lattice, patch=pipe.transformer.config.patch)


def noise_of(pipe: Any, latents: Tensor, units: Units, batch: int) -> Tensor:
    """Return starting noise as tokens; levels of a pyramid would have to share it."""
    patch, channels = pipe.transformer.config.patch, pipe.codec.latent_channels
    shape = (batch, units.frames, channels, units.height * patch, units.width * patch)
    if units.frames is None or tuple(latents.shape) != shape or units.coords[:, 3].any():
        raise ValueError(
            f"latents of shape {tuple(latents.shape)} cannot be the noise of this video: give "
            f"{shape} to a clip of units without levels."
        )
    return to_tokens(latents, units, patch=patch)
