"""From a prompt to frames: text encoder, sampler and codec behind one object."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from videoar.checkpoint import (
    Component,
    load_component,
    load_meta,
    resolve,
    save_checkpoint,
)
from videoar.codecs import Codec, PatchCodec, PatchCodecConfig, TinyCodec, TinyCodecConfig
from videoar.flow import sigma_steps
from videoar.model import ModelConfig, TextContext, VideoTransformer
from videoar.sampler import Guided, Sampler, SamplerConfig
from videoar.text import PromptEncoder, TextEncoder, TextEncoderConfig, Tokenizer
from videoar.tokens import Assembler
from videoar.units import Scheme, Units, Visible, parse
from videoar.video import Video

MAX_PROMPT_CHARACTERS = 2000
MAX_SEED = 2**63 - 1
CODECS = {"TinyCodec": (TinyCodec, TinyCodecConfig), "PatchCodec": (PatchCodec, PatchCodecConfig)}


def to_frames(
    video: Float[Tensor, "*batch 3 height width"],
) -> UInt8[np.ndarray, "*batch height width 3"]:
    """Turn floats in [-1, 1] into pixels."""
    pixels = ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(pixels, "... c h w -> ... h w c").cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to generate; a checkpoint carries its own defaults (`videoar.json`, `sampling`)."""

    units: str | Scheme = "cube:1x2x2"
    """Unit scheme, or its name: see `videoar.units.parse`."""
    num_inference_steps: int = 4
    """Denoising steps per unit."""
    shift: float = 5.0
    """Shift of the sigmas towards noise."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 runs no second, unconditional pass."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    window_frames: int | None = 8
    """Latent frames that a unit may read, its own and the sinks included; None: all before it."""
    sink_frames: int = 2
    """First latent frames that stay readable for ever: as many whole segments as fit."""
    lag: int | None = None
    """Rows between the starts of two waves: see `SamplerConfig`."""
    context_noise: float = 0.0
    """Noise level at which finished units enter the cache."""
    fps: int = 16
    """Frames per second of the model's videos."""

    def visible(self, units: Units) -> Visible:
        """Return the visibility over `units`: sink and window in whole units."""
        segment = units.segment_frames
        if self.sink_frames < 0:
            raise ValueError(f"sink_frames is {self.sink_frames}: use 0 or more.")
        if self.window_frames is None or units.count == units.units_per_segment:
            return Visible()
        if self.window_frames < segment:
            raise ValueError(
                f"A window of {self.window_frames} latent frames is smaller than one unit of "
                f"{self.units} with its {segment} latent frames: use a window of {segment} or more."
            )
        sink = min(self.sink_frames, self.window_frames - segment) // segment * segment
        window = (self.window_frames - sink) // segment * segment
        return Visible(window=units.units_of(window), sink=units.units_of(sink))


@dataclass
class Stats:
    """What a generation has cost so far; seconds are wall-clock."""

    passes: int = 0
    """Forward passes of the transformer."""
    units: int = 0
    """Finished units."""
    frames: int = 0
    """Finished pixel frames."""
    model_seconds: float = 0.0
    decode_seconds: float = 0.0
    cache_tokens: int = 0
    """Most tokens the cache held."""
    first_frame_seconds: float | None = None
    """From the start of the iteration to the first frames."""


class Generation:
    """A video in the making: iterate to get newly finished frames, `batch frames height width 3`.

    Units are generated, committed and decoded as they come; nothing is kept but the cache and the
    decoder's memory, so an endless stream needs constant memory.
    """

    def __init__(self, sampler: Sampler, codec: Codec, *, num_frames: int | None):
        self.sampler, self.num_frames, self.stats = sampler, num_frames, Stats()
        self._assembler = Assembler(sampler.units, patch=sampler.network.config.patch)
        self._decoder = codec.stream_decoder()

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "batch frames height width 3"]]:
        stats, sampler = self.stats, self.sampler
        started = time.perf_counter()
        steps = iter(sampler)
        while True:
            before = time.perf_counter()
            with torch.inference_mode():
                finished = next(steps, None)
            stats.model_seconds += time.perf_counter() - before
            stats.passes = sampler.passes
            stats.cache_tokens = max(stats.cache_tokens, sampler.cache.tokens)
            if finished is None:
                return
            stats.units += 1
            before = time.perf_counter()
            with torch.inference_mode():
                latents = self._assembler.add(finished.unit, finished.tokens)
                frames = None if latents is None else to_frames(self._decoder(latents))
            stats.decode_seconds += time.perf_counter() - before
            if frames is None:
                continue
            if self.num_frames is not None:
                frames = frames[:, : self.num_frames - stats.frames]
            if stats.first_frame_seconds is None:
                stats.first_frame_seconds = time.perf_counter() - started
            stats.frames += frames.shape[1]
            yield frames

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that is needed to go on with the stream later."""
        parts = {"sampler": self.sampler.state_dict(), "decoder": self._decoder.state_dict()}
        parts["assembler"] = self._assembler.state_dict()
        state = {f"{part}.{key}": value for part, d in parts.items() for key, value in d.items()}
        return state | {"frames": torch.tensor(self.stats.frames)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for part, target in (
            ("sampler.", self.sampler),
            ("decoder.", self._decoder),
            ("assembler.", self._assembler),
        ):
            target.load_state_dict(
                {key.removeprefix(part): v for key, v in state.items() if key.startswith(part)}
            )
        self.stats.frames = int(state["frames"])


@dataclass
class VideoPipeline:
    """A generator with everything around it.

    pipe = VideoPipeline.from_pretrained("toy")
    pipe("a red ball bounces", num_frames=61).save("ball.mp4")
    """

    transformer: VideoTransformer
    prompt_encoder: PromptEncoder
    codec: Codec
    sampling: Sampling = field(default_factory=Sampling)
    height: int = 64
    """Pixels of a frame."""
    width: int = 64
    meta: dict[str, Any] = field(default_factory=dict)
    """What the checkpoint says of itself."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, device: str = "cpu") -> "VideoPipeline":
        """Load a bundled checkpoint by name, or one from a folder.

        Raises:
            ValueError: nothing of that name, or something is wrong with the files.
        """
        folder = resolve(name_or_path)
        meta = load_meta(folder)
        text = load_component(
            folder / "text", {"TextEncoder": (TextEncoder, TextEncoderConfig)}, device=device
        )
        tokenizer = Tokenizer.from_json((folder / "text" / "tokenizer.json").read_text("utf-8"))
        known = {f.name for f in fields(Sampling)}
        defaults = {key: v for key, v in meta.get("sampling", {}).items() if key in known}
        return cls(
            transformer=load_component(
                folder / "transformer",
                {"VideoTransformer": (VideoTransformer, ModelConfig)},
                device=device,
            ).eval(),
            prompt_encoder=PromptEncoder(tokenizer, text.eval()),
            codec=load_component(folder / "codec", CODECS, device=device).eval(),
            sampling=Sampling(**defaults),
            meta=meta,
        )

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write a checkpoint folder."""
        text = {"tokenizer.json": self.prompt_encoder.tokenizer.to_json()}
        encoder = self.prompt_encoder.encoder
        components = {
            "transformer": Component(module=self.transformer, config=self.transformer.config),
            "text": Component(module=encoder, config=encoder.config, texts=text),
            "codec": Component(module=self.codec, config=self.codec.config),
        }
        meta = {**self.meta, "sampling": vars(self.sampling)}
        return save_checkpoint(Path(folder), components, meta, overwrite=overwrite)

    def __call__(
        self, prompt: str, *, num_frames: int = 61, seed: int = 0, **sampling: Any
    ) -> Video:
        """Generate one video; further keywords override fields of `Sampling`."""
        frames = list(self.stream(prompt, num_frames=num_frames, seed=seed, **sampling))
        fps = sampling.get("fps", self.sampling.fps)
        return Video(frames=np.concatenate(frames), fps=float(fps))

    def stream(
        self, prompt: str, *, num_frames: int | None = None, seed: int = 0, **sampling: Any
    ) -> Iterator[UInt8[np.ndarray, "frames height width 3"]]:
        """Generate newly finished frames as they come; endless without `num_frames`."""
        generation = self.generate([prompt], num_frames=num_frames, seeds=[seed], **sampling)
        return (frames[0] for frames in generation)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        num_frames: int | None,
        seeds: Sequence[int],
        units: str | Scheme | None = None,
        **sampling: Any,
    ) -> Generation:
        """Begin to generate a batch of videos, one per prompt and seed.

        Args:
            prompts: one per video.
            num_frames: pixel frames; None for an endless stream.
            seeds: one per video.
            units: a name that `videoar.units.parse` knows, or a scheme of your own.
            sampling: further fields of `Sampling` to override.

        Raises:
            ValueError: an argument is outside its limits; nothing has been computed then.
        """
        if isinstance(units, str):
            sampling["units"] = units
        options = replace(self.sampling, **sampling)
        for prompt in (*prompts, options.negative_prompt):
            _check_prompt(prompt)
        if not any(prompt.strip() for prompt in prompts):
            raise ValueError("The prompt is empty: describe the video in a few words.")
        if num_frames is not None and num_frames < 1:
            raise ValueError(f"num_frames is {num_frames}: use 1 or more.")
        for seed in seeds:
            if not 0 <= seed <= MAX_SEED:
                raise ValueError(f"seed is {seed}: use 0 to {MAX_SEED}.")
        if not (math.isfinite(options.guidance_scale) and options.guidance_scale >= 0):
            raise ValueError(f"guidance_scale is {options.guidance_scale}: use 0 or more.")
        if len(prompts) != len(seeds):
            raise ValueError(
                f"There are {len(prompts)} prompts and {len(seeds)} seeds: give as many of both."
            )
        scheme = (
            units
            if isinstance(units, Scheme)
            else parse(options.units)
            if isinstance(options.units, str)
            else options.units
        )
        lattice = self.lattice(scheme, num_frames)
        config = SamplerConfig(
            sigmas=sigma_steps(options.num_inference_steps, shift=options.shift),
            lag=options.lag,
            visible=options.visible(lattice),
            context_noise=options.context_noise,
        )
        guided = options.guidance_scale != 1
        device = next(self.transformer.parameters()).device
        sampler = Sampler(
            Guided(self.transformer, options.guidance_scale) if guided else self.transformer,
            lattice,
            self.encode([*prompts, *([options.negative_prompt] * len(prompts) * guided)]),
            config,
            seeds=seeds,
            device=device,
            dtype=self.transformer.dtype,
        )
        return Generation(sampler, self.codec, num_frames=num_frames)

    def lattice(self, scheme: Scheme, num_frames: int | None) -> Units:
        """Lay a scheme over the latents of `num_frames` pixel frames."""
        time_stride, *stride = self.codec.stride
        patch = self.transformer.config.patch
        frames = None if num_frames is None else 1 + math.ceil((num_frames - 1) / time_stride)
        height, width = self.height // stride[0] // patch, self.width // stride[1] // patch
        return Units(scheme, frames, height, width)

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> TextContext:
        """Encode prompts to what every pass reads."""
        return self.transformer.encode_text(self.prompt_encoder.encode(prompts))


def _check_prompt(prompt: str) -> None:
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ValueError(
            f"The prompt has {len(prompt)} characters: shorten it to {MAX_PROMPT_CHARACTERS}."
        )
