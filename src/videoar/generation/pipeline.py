"""From a prompt to frames: text encoder, sampler and codec behind one object."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from videoar import weights
from videoar.checkpoints.checkpoint import Checkpoint, save_checkpoint
from videoar.checks import check, check_whole
from videoar.core.flow import STEPS, sigma_steps
from videoar.core.sampler import Guided, Sampler, SamplerConfig
from videoar.core.schemes import Scheme, names, parse
from videoar.core.tokens import known_tokens, to_tokens
from videoar.core.transformer import TextContext, VideoTransformer
from videoar.core.units import Units
from videoar.data.decode import Fit
from videoar.data.video import Video
from videoar.encoders.codec import Codec, from_frames
from videoar.encoders.text_encoder import PromptEncoder, words_of
from videoar.generation.conditioning import beginning
from videoar.generation.config import GenerationConfig
from videoar.generation.stream import Generation
from videoar.machine import check_device

MAX_PROMPT_CHARACTERS = 2000
MAX_SEED = 2**63 - 1


@dataclass
class VideoPipeline:
    """A generator with everything around it.

    pipe = VideoPipeline.from_pretrained("toy")
    pipe("a red ball bounces", num_frames=61).save("ball.mp4")
    """

    transformer: VideoTransformer
    prompt_encoder: PromptEncoder
    codec: Codec
    sampling: GenerationConfig = field(default_factory=GenerationConfig)
    height: int = 64
    """Pixels of a frame."""
    width: int = 64
    meta: dict[str, Any] = field(default_factory=dict)
    """What the checkpoint says of itself."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        base: str | Path | None = None,
        lora: str | Path | Sequence[str | Path] | None = None,
        codec: str | Path | None = None,
        preset: str | None = None,
        dtype: str | torch.dtype | None = None,
        codec_dtype: str | torch.dtype | None = None,
        device: str = "cpu",
        offload: bool = False,
    ) -> "VideoPipeline":
        """Load a bundled checkpoint, a folder, a file of weights, or a Hugging Face repository.

        Args:
            name_or_path: any format of `docs/wan.md`; `FILE#ENTRY` picks an entry of a file.
            base: where codec and text encoder are, if not there.
            lora: file of low-rank updates to merge, or several; `FILE=0.8` scales one.
            codec: another codec: a checkpoint, or a file such as `taew2_1.pth`.
            preset: how to sample, by the name of a family in `wan.PRESETS`.
            dtype: of transformer and text encoder; None: as they are stored.
            codec_dtype: of the codec; bfloat16 takes half the time and memory where the processor
                has it, and changes a third of the pixels by one level.
            device: where to compute.
            offload: keep the transformer on the host, but for the layer that computes, and run the
                text encoder there.

        Raises:
            ValueError: nothing of that name, or something is wrong with the files.
        """
        checkpoint = Checkpoint.find(name_or_path, base=base, lora=lora)
        defaults = checkpoint.sampling(preset)
        size = {side: defaults.pop(side) for side in ("height", "width")}
        check_device(device)
        wanted, host = weights.as_dtype(dtype), "cpu" if offload else device
        decoding = checkpoint if codec is None else Checkpoint.find(codec)
        found = checkpoint.transformer()
        checkpoint.check_preset(found, preset)
        prompts = checkpoint.text_encoder(dtype=wanted, device=host)
        transformer = found.build(dtype=weights.as_dtype(wanted or found.dtype), device=host)
        if offload:
            weights.offload(transformer, transformer.blocks, device)
        return cls(
            transformer=transformer.eval(),
            prompt_encoder=prompts,
            codec=decoding.codec(dtype=weights.as_dtype(codec_dtype), device=device),
            sampling=GenerationConfig(**defaults),
            meta=checkpoint.meta,
            **size,
        )

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write a checkpoint folder."""
        units = self.sampling.units
        sampling = vars(self.sampling) | {"units": units if isinstance(units, str) else units.name}
        parts = {"transformer": self.transformer, "text": self.prompt_encoder, "codec": self.codec}
        size = {"height": self.height, "width": self.width}
        meta = {**self.meta, **size, "sampling": sampling}
        return save_checkpoint(Path(folder), parts, meta, overwrite=overwrite)

    def __call__(
        self, prompt: str, *, num_frames: int = 61, seed: int = 0, **sampling: Any
    ) -> Video:
        """Generate one video; further keywords override fields of `GenerationConfig`."""
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
        image: Any = None,
        video: Any = None,
        fit: Fit = "crop",
        latents: Tensor | None = None,
        **sampling: Any,
    ) -> Generation:
        """Begin to generate a batch of videos, one per prompt and seed.

        Args:
            prompts: one per video.
            num_frames: pixel frames, conditioning included; None for an endless stream.
            seeds: one per video.
            image: the first frame, as an array: see `conditioning.beginning`.
            video: or the first frames, at the model's rate. What does not fill a latent frame is
                dropped: `kept_frames` of the result says how many are left.
            fit: how they are brought to the model's size, by cropping or between bars.
            latents: the noise to begin with, batch x frames x channels x height x width; by default
                it is drawn from the seeds.
            sampling: fields of `GenerationConfig` to override, such as `units`.

        Raises:
            ValueError: an argument is outside its limits; nothing has been computed then.
        """
        started = time.perf_counter()
        options, batch = self.sampling.replaced(**sampling), len(prompts)
        _check(prompts, seeds, num_frames, options)
        if sampling.get("negative_prompt") and options.guidance_scale == 1:
            raise ValueError(
                "negative_prompt is what guidance leads away from, but guidance_scale is 1, which"
                " is none: raise it, or leave the negative prompt out."
            )
        lattice = self.lattice(options.units, num_frames)
        size = {"height": self.height, "width": self.width, "stride": self.codec.stride[0]}
        conditioning = beginning(image, video, batch=batch, fit=fit, **size)
        device, known = self.transformer.patch_embedding.weight.device, {}
        if conditioning is not None:
            if num_frames is not None and conditioning.shape[1] >= num_frames:
                raise ValueError(
                    f"{conditioning.shape[1]} frames are given of a video of {num_frames}:"
                    " make it longer or keep less."
                )
            encoded = self.codec.encode(from_frames(conditioning).to(device))
            encoded = encoded.expand(batch, *encoded.shape[1:])
            known = known_tokens(encoded, lattice, patch=self.transformer.config.patch)
        config = SamplerConfig(
            sigmas=options.sigmas or sigma_steps(options.num_inference_steps, shift=options.shift),
            step=STEPS[options.step],
            lag=options.lag,
            visible=options.visible(lattice),
            context_noise=options.context_noise,
            moving_sinks=options.moving_sinks,
        )
        network, texts = self.transformer, list(prompts)
        if options.guidance_scale != 1:
            network = Guided(self.transformer, options.guidance_scale)
            texts += [options.negative_prompt] * batch
        sampler = Sampler(
            network,
            lattice,
            self.encode(texts),
            config,
            seeds=seeds,
            known=known,
            noise=None if latents is None else self._noise(latents, lattice, batch),
            device=device,
        )
        how = {"num_frames": num_frames, "conditioning": conditioning, "started": started}
        return Generation(sampler, self.codec, **how)

    def _noise(self, latents: Tensor, units: Units, batch: int) -> Tensor:
        """Return starting noise as tokens; levels of a pyramid would have to share it."""
        patch, channels = self.transformer.config.patch, self.codec.latent_channels
        shape = (batch, units.frames, channels, units.height * patch, units.width * patch)
        if units.frames is None or tuple(latents.shape) != shape or units.coords[:, 3].any():
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} cannot be the noise of this video: give "
                f"{shape} to a clip of units without levels."
            )
        return to_tokens(latents, units, patch=patch)

    def untrained(self, units: Iterable[str | Scheme]) -> str:
        """Say which units a checkpoint that states its own never learned; nothing if none is."""
        known = self.meta.get("units", ())
        new = [name for name in names(units) if known and name not in known]
        return f"not trained on {', '.join(new)}, but on {', '.join(known)}" if new else ""

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt in no caption of a model that states those of its own."""
        known = self.meta.get("words")
        return [] if known is None else sorted(words_of([prompt]) - set(known))

    def lattice(self, units: str | Scheme, num_frames: int | None) -> Units:
        """Lay a scheme, or the one of a name, over the latents of `num_frames` pixel frames."""
        scheme = parse(units) if isinstance(units, str) else units
        time_stride, *strides = self.codec.stride
        frames = None if num_frames is None else 1 + math.ceil((num_frames - 1) / time_stride)
        lengths = []
        for name, stride in zip(("height", "width"), strides, strict=True):
            size, side = getattr(self, name), stride * self.transformer.config.patch
            if size < side or size % side:
                raise ValueError(
                    f"{name} is {size} pixels, but a token covers {side}: use a multiple of {side}."
                )
            lengths.append(size // side)
        return Units(scheme, frames, *lengths)

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> TextContext:
        """Encode prompts to what every pass reads."""
        rows = self.prompt_encoder.encode(prompts)
        return self.transformer.encode_text(rows.to(self.transformer.patch_embedding.bias))


def _check(
    prompts: Sequence[str], seeds: Sequence[int], num_frames: int | None, options: GenerationConfig
) -> None:
    """Raise unless a video can be made of these arguments."""
    for prompt in (*prompts, options.negative_prompt):
        if not isinstance(prompt, str):
            raise ValueError(f"A prompt is {prompt!r}: use a text.")
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"The prompt has {len(prompt)} characters: shorten it to {MAX_PROMPT_CHARACTERS}."
            )
    if not any(prompt.strip() for prompt in prompts):
        raise ValueError("The prompt is empty: describe the video in a few words.")
    check_whole("num_frames", num_frames)
    check("num_frames", num_frames, num_frames is None or num_frames >= 1, "1 or more")
    for seed in seeds:
        check_whole("seed", seed)
        check("seed", seed, 0 <= seed <= MAX_SEED, f"0 to {MAX_SEED}")
    scale = options.guidance_scale
    check("guidance_scale", scale, 0 <= scale < math.inf, "0 or more")
    if len(prompts) != len(seeds):
        raise ValueError(
            f"There are {len(prompts)} prompts and {len(seeds)} seeds: give as many of both."
        )
