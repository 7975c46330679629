"""From a prompt to frames: text encoder, sampler and codec behind one object."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from videoar import weights
from videoar.checkpoints.checkpoint import Checkpoint, save_checkpoint
from videoar.checks import Count, Options, check, checked, one_of
from videoar.core.sampler import Sampler, SamplerConfig
from videoar.core.schemes import Scheme, names
from videoar.core.tokens import Known
from videoar.core.transformer import TextContext, VideoTransformer
from videoar.core.units import Units
from videoar.data.decode import Fit
from videoar.encoders.codec import Codec
from videoar.encoders.text_encoder import PromptEncoder, words_of
from videoar.generation import inputs
from videoar.generation.conditioning import beginning
from videoar.generation.config import AUTO, GenerationConfig, Plan
from videoar.generation.progress import Progress
from videoar.generation.router import Router
from videoar.generation.session import Session, resumed
from videoar.generation.state import State
from videoar.generation.stream import Generation
from videoar.machine import check_device
from videoar.weights import Device


@dataclass
class VideoPipeline(Options):
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
    router: Router | None = None
    """Chooses units, if they are `auto`."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What the checkpoint says of itself."""
    graphs: bool = False
    """Whether a pass that comes again is recorded: see `graphs.Recorded`."""
    compiled: bool = False
    """Whether the blocks of the transformer are: see `compiled.compile_blocks`."""
    ahead: bool = False
    """Whether a thread computes what follows while frames are decoded: see `stream.Generation`."""
    progress: bool = True
    """Whether a call shows on stderr how far it is: see `set_progress_bar_config`."""

    @classmethod
    @checked
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        base: str | Path | None = None,
        lora: str | Path | Sequence[str | Path] | None = None,
        codec: str | Path | None = None,
        preset: str | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        codec_dtype: str | torch.dtype | None = None,
        device: str = "cpu",
        offload: bool = False,
        graphs: bool = False,
        compile: bool = False,
    ) -> "VideoPipeline":
        """Load a bundled checkpoint, a folder, a file of weights, or a Hugging Face repository.

        Args:
            name_or_path: any format of `docs/wan.md`; `FILE#ENTRY` picks an entry of a file.
            base: where codec and text encoder are, if not there.
            lora: file of low-rank updates to merge, or several; `FILE=0.8` scales one.
            codec: another codec: a checkpoint, or a file such as `taew2_1.pth`.
            preset: how to sample, by the name of a family in `wan.PRESETS`.
            dtype: of transformer and text encoder; None: as they are stored.
            torch_dtype: the same, under the name that diffusers gives it.
            codec_dtype: of the codec; bfloat16 takes half the memory, and less time where the
                processor has it, and changes a third of the pixels by a few levels.
            device: where to compute.
            offload: keep text encoder and transformer on the host, but for the layer that computes.
            graphs: record the passes that come again as CUDA graphs, once the window is full.
            compile: compile the transformer's blocks by `torch.compile`; pixels may move a little.

        Raises:
            ValueError: nothing of that name, or something is wrong with the files.
        """
        checkpoint = Checkpoint.find(name_or_path, base=base, lora=lora)
        check("torch_dtype", torch_dtype, None in (dtype, torch_dtype), "it or dtype, not both")
        defaults = checkpoint.sampling(preset)
        own = {side: defaults.pop(side) for side in ("height", "width")}
        own |= {"graphs": graphs, "compiled": compile}
        check_device(device)
        alone = not (offload and (graphs or compile))
        check("offload", offload, alone, "it, or graphs and compile")
        wanted, host = weights.as_dtype(dtype or torch_dtype), "cpu" if offload else device
        decoding = checkpoint if codec is None else Checkpoint.find(codec)
        found = checkpoint.transformer()
        checkpoint.check_preset(found, preset)
        prompts = checkpoint.text_encoder(dtype=wanted, device=host)
        transformer = found.build(dtype=weights.as_dtype(wanted or found.dtype), device=host)
        if offload:
            weights.offload(transformer, transformer.blocks, device)
        if compile:
            from videoar.generation.compiled import compile_blocks  # takes seconds

            compile_blocks(transformer, device)
        part = checkpoint.source / "router"
        router = weights.load_component(part, Router, device=device) if part.is_dir() else None
        return cls(
            transformer=transformer.eval(),
            prompt_encoder=prompts,
            codec=decoding.codec(dtype=weights.as_dtype(codec_dtype), device=device),
            router=router,
            sampling=weights.build_config(GenerationConfig, defaults, file=checkpoint.source),
            meta=checkpoint.meta,
            **own,
        )

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write a checkpoint folder."""
        units = self.sampling.units
        sampling = vars(self.sampling) | {"units": units if isinstance(units, str) else units.name}
        parts = {"transformer": self.transformer, "text": self.prompt_encoder, "codec": self.codec}
        parts |= {} if self.router is None else {"router": self.router}
        size = {"height": self.height, "width": self.width}
        meta = {**self.meta, **size, "sampling": sampling}
        return save_checkpoint(Path(folder), parts, meta, overwrite=overwrite)

    def to(self, device: Device | torch.dtype | None = None, dtype: Any = None) -> "VideoPipeline":
        """Move it to a device, or transformer and text encoder to a precision, or both."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if device is not None:
            check_device(str(device))
            self.codec.to(device)
            _ = self.router and self.router.to(device)
        self.transformer.to(device, weights.as_dtype(dtype))
        self.prompt_encoder.to(device, weights.as_dtype(dtype))
        return self

    def set_progress_bar_config(self, *, disable: bool) -> None:
        """Show no progress, or show it again."""
        self.progress = not disable

    def __repr__(self) -> str:
        names = ("transformer", "prompt_encoder", "codec")
        about = {name: type(getattr(self, name)).__name__ for name in names}
        about |= {"size": f"{self.width}x{self.height} pixels", "device": self.device}
        lines = [f"  {name:<20} {value}" for name, value in (about | vars(self.sampling)).items()]
        return "\n".join(["VideoPipeline", *lines])

    @property
    def device(self) -> torch.device:
        """Where videos are computed."""
        return self.transformer.proj_out.weight.device

    @checked
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: Any = None,
        video: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: Count = 61,
        units: str | Scheme | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        num_videos_per_prompt: Count = 1,
        seed: int | Sequence[int] | None = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: Annotated[str, one_of(inputs.OUTPUTS)] = "video",
        callback_on_step_end: inputs.OnStepEnd | None = None,
        **options: Any,
    ) -> Any:
        """Generate a video, or several side by side.

        Args:
            prompt: what to show; a list of prompts gives a list of videos.
            image: the first frame: see `generate`.
            video: or the first frames.
            height: rows of pixels; this and the next, and others that are None: the checkpoint's.
            width: columns of pixels.
            num_frames: pixel frames, those of `image` or `video` included.
            units: scheme, or its name: what is generated next.
            num_inference_steps: denoising steps per unit.
            guidance_scale: of classifier-free guidance; 1 for none, which is twice as fast.
            negative_prompt: what guidance leads away from.
            num_videos_per_prompt: with noise of their own; more than 1 gives a list.
            seed: of the noise of the first video, the next has the next; or one for each; None
                draws them. The same seed gives the same video, whose `seed` it is.
            generator: draws the seeds instead, as does one for each video.
            output_type: "video": a `Video`, uint8; "np": float32 in [0, 1], frames x height x
                width x 3; "pt": the same as a tensor, frames x 3 x height x width; "pil": a list of
                pictures; "latent": frames x channels x height x width, not decoded.
            callback_on_step_end: called after every step of a unit, with the pipeline, the step,
                the sigma before it times 1000, and a dict: `latents`, the tokens of the unit, and
                `unit`, its number. `latents` of a dict that it returns take their place.
            options: further keywords of `generate`, and fields of `GenerationConfig`.

        Returns:
            One for one prompt, else a list: all videos of the first prompt, then of the next.

        Raises:
            ValueError: an argument is outside its limits; nothing has been computed then.
            TypeError: there is no such keyword.
        """
        given = {"units": units, "num_inference_steps": num_inference_steps}
        given |= {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt}
        options |= {name: value for name, value in given.items() if value is not None}
        options |= {"image": image, "video": video, "height": height, "width": width}
        prompts = [prompt] if isinstance(prompt, str) else prompt
        prompts = [text for text in prompts for _ in range(num_videos_per_prompt)]
        seeds = inputs.seeds_of(seed, generator, len(prompts))
        options |= {"num_frames": num_frames, "seeds": seeds}
        begun = inputs.warned(self.generate(prompts, **options))
        with Progress(sys.stderr, every=5.0, disable=not self.progress) as show:
            begun.sampler.on_step = inputs.hearing(self, begun, callback_on_step_end, show)
            latent = output_type == "latent"
            made = begun.latents() if latent else np.concatenate(list(begun), axis=1)
        fps = float(options.get("fps", self.sampling.fps))
        kind = inputs.OUTPUTS[output_type]
        found = [kind(x, fps, seed) for x, seed in zip(made, seeds, strict=True)]
        return found[0] if isinstance(prompt, str) and num_videos_per_prompt == 1 else found

    def stream(
        self, prompt: str, *, num_frames: int | None = None, seed: int | None = 0, **options: Any
    ) -> Iterator[UInt8[np.ndarray, "frames height width 3"]]:
        """Generate newly finished frames as they come; endless without `num_frames`."""
        options |= {"num_frames": num_frames, "seeds": inputs.seeds_of(seed, None, 1)}
        return (frames[0] for frames in inputs.warned(self.generate([prompt], **options)))

    def session(
        self, prompt: str, *, num_frames: int | None = None, seed: int | None = 0, **options: Any
    ) -> Session:
        """Begin a stream that can be changed while it comes; keywords are those of `generate`."""
        options |= {"num_frames": num_frames, "seeds": inputs.seeds_of(seed, None, 1)}
        return Session(inputs.warned(self.generate([prompt], **options)))

    def resume(self, source: State | str | Path) -> Session:
        """Go on with a session that was saved, as if it had never stopped.

        Raises:
            ValueError: it is none, or one of another model.
        """
        return resumed(self, source)

    @checked
    def generate(
        self,
        prompts: Sequence[str],
        *,
        num_frames: Count | None,
        seeds: Sequence[int],
        height: int | None = None,
        width: int | None = None,
        image: Any = None,
        video: Any = None,
        fit: Fit | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Float[Tensor, "videos words channels"] | None = None,
        **sampling: Any,
    ) -> Generation:
        """Begin to generate a batch of videos, one per prompt and seed.

        Args:
            prompts: one per video.
            num_frames: pixel frames, conditioning included; None for an endless stream. A clip is
                the beginning of its stream: its last unit is made whole, and cut.
            seeds: one per video.
            height: rows of pixels; None: the checkpoint's own, as for the width.
            width: columns of pixels.
            image: the first frame, as a picture or an array: see `conditioning.beginning`.
            video: or the first frames, at the model's rate. What does not fill a latent frame is
                dropped: `kept_frames` of the result says how many are left.
            fit: how they are brought to the model's size, by cropping (None, too) or between bars.
            latents: the noise to begin with, batch x frames x channels x height x width; by default
                it is drawn from the seeds.
            prompt_embeds: rows of the prompts, if they are encoded already.
            sampling: fields of `GenerationConfig` to override, such as `units`.

        Raises:
            ValueError: an argument is outside its limits; nothing has been computed then.
            TypeError: there is no such keyword.
        """
        started, batch = time.perf_counter(), len(prompts)
        encoded = {"encoded": prompt_embeds is not None}
        options = inputs.options_of(self, sampling)
        first, *others = inputs.menu_of(self, options.units)
        own = {"options": options.replaced(units=first), "routed": bool(others)}
        plan = Plan(prompts=tuple(prompts), seeds=tuple(seeds), **own)
        inputs.check_inputs(plan, negative=sampling.get("negative_prompt"), **encoded)
        plan = replace(plan, seeds=tuple(map(int, seeds)))  # those of NumPy are no JSON
        given = {"height": height, "width": width}
        pipe = replace(self, **{side: n for side, n in given.items() if n is not None})
        lattice = pipe.lattice(first, num_frames)
        if plan.routed:
            pipe.check(plan, **encoded)
            check("latents", "given", latents is None, f"none with the units {AUTO}")
        size = {"height": pipe.height, "width": pipe.width, "stride": self.codec.stride[0]}
        conditioning = beginning(image, video, batch=batch, fit=fit, **size)
        kept = 0 if conditioning is None else conditioning.shape[1]
        says = f"more than the {kept} that are given: make it longer or keep less"
        check("num_frames", num_frames, num_frames is None or num_frames > kept, says)
        begun = {
            "known": inputs.known_of(self, conditioning, batch, lattice),
            "noise": None if latents is None else inputs.noise_of(self, latents, lattice, batch),
            "text": None if prompt_embeds is None else self.text(plan, before=prompt_embeds),
        }
        sampler = pipe.sampler(plan, lattice.frames, **begun)
        how = {"num_frames": num_frames, "conditioning": conditioning, "started": started}
        return Generation(pipe, plan, sampler, **how)

    def sampler(
        self,
        plan: Plan,
        frames: int | None,
        *,
        known: Mapping[int, Known] = {},
        noise: Tensor | None = None,
        text: TextContext | None = None,
    ) -> Sampler:
        """Return the sampler of a plan over so many latent frames, or of an endless stream."""
        lattice, config = self.settings(plan.options, frames)
        network = inputs.network_of(self, plan.options.guidance_scale)
        how = {"seeds": plan.noise_seeds, "known": known, "noise": noise, "device": self.device}
        return Sampler(network, lattice, text or self.text(plan), config, **how)

    check = inputs.check_plan

    def settings(self, how: GenerationConfig, frames: int | None) -> tuple[Units, SamplerConfig]:
        """Return the units over so many latent frames, or of an endless stream; how to sample."""
        num_frames = None if frames is None else 1 + self.codec.stride[0] * (frames - 1)
        config = how.sampler(lattice := self.lattice(how.units, num_frames))
        config.rows(lattice.count)  # what an endless stream cannot is said now
        return lattice, config

    @torch.inference_mode()
    def text(self, plan: Plan, *, before: Tensor | None = None) -> TextContext:
        """Return what the passes of a plan read; `before` are rows of its prompts."""
        guided = plan.options.guidance_scale != 1
        negative = [plan.options.negative_prompt] * len(plan.prompts) if guided else []
        if before is None and plan.left:
            both = ([*texts, *negative] for texts in (plan.prompts, plan.before))
            now, then = map(self.prompt_encoder.encode, both)
            return self.encode([], before=torch.lerp(now, then, plan.left / plan.over))
        prompts = [*plan.prompts, *negative] if before is None else negative
        return self.encode(prompts, before=before)

    @torch.inference_mode()
    def encode(self, prompts: list[str], *, before: Tensor | None = None) -> TextContext:
        """Encode prompts, behind those of which there are rows, to what every pass reads."""
        rows = [] if before is None else [before]
        rows += [self.prompt_encoder.encode(prompts)] if prompts else []
        return self.transformer.encode_text(torch.cat(rows).to(self.transformer.proj_out.bias))

    def untrained(self, units: Iterable[str | Scheme]) -> str:
        """Say which units a checkpoint that states its own never learned; nothing if none is."""
        known = self.meta.get("units", ())
        asked = names(scheme for each in units for scheme in inputs.menu_of(self, each))
        new = [name for name in asked if known and name not in known]
        return f"not trained on {', '.join(new)}, but on {', '.join(known)}" if new else ""

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt in no caption of a model that states those of its own."""
        known = self.meta.get("words")
        return [] if known is None else sorted(words_of([prompt]) - set(known))

    lattice = inputs.lattice_of
