"""A video in the making: units are sampled, decoded and written as they come."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from videoar.core.sampler import Sampler, part_of
from videoar.core.tokens import Assembler
from videoar.data.video import VideoWriter
from videoar.encoders.codec import Codec, to_frames
from videoar.generation.timing import Timing
from videoar.machine import peak_bytes, process_seconds


class Generation:
    """A video in the making: iterate to get newly finished frames, `batch frames height width 3`.

    Units are generated, committed and decoded as they come; nothing is kept but the cache and the
    decoder's memory, so an endless stream needs constant memory.
    """

    def __init__(
        self,
        sampler: Sampler,
        codec: Codec,
        *,
        num_frames: int | None,
        conditioning: UInt8[np.ndarray, "videos frames height width 3"] | None,
        started: float,
    ):
        self.sampler, self.num_frames, self.stats = sampler, num_frames, Timing()
        self.started = started
        """When the work began, on the clock `time.perf_counter`."""
        self.conditioning = conditioning
        """First frames; they come out as they are, not as the codec gives them back."""
        self._assembler = Assembler(sampler.units, patch=sampler.network.config.patch)
        self._codec, self._decoder = codec, codec.stream_decoder()
        parts = {"sampler": sampler, "decoder": self._decoder, "assembler": self._assembler}
        self._parts: dict[str, Any] = parts

    @property
    def kept_frames(self) -> int:
        """Number of first frames that condition the rest, and are not generated."""
        return 0 if self.conditioning is None else self.conditioning.shape[1]

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "batch frames height width 3"]]:
        sampler, stats, before = self.sampler, self.stats, time.perf_counter()
        steps = iter(sampler)
        while self.num_frames is None or stats.frames < self.num_frames:
            with torch.inference_mode():
                finished = next(steps, None)
            computed = time.perf_counter()
            stats.passes, stats.cache_bytes = sampler.passes, sampler.cache.num_bytes
            stats.cache_tokens = max(stats.cache_tokens, sampler.cache.tokens)
            stats.model_seconds += computed - before
            if finished is None:
                return
            stats.units += 1
            with torch.inference_mode():
                latents = self._assembler.add(finished.unit, finished.tokens)
                if latents is not None and not latents.isfinite().all():
                    raise FloatingPointError(
                        f"latents of unit {finished.unit.index} are not finite: the weights are"
                        " damaged, or the dtype is too narrow; try float32, or another copy"
                    )
                frames = None if latents is None else to_frames(self._decoder(latents))
            before, shown = time.perf_counter(), stats.frames
            stats.decode_seconds += before - computed
            if frames is None:
                continue
            if self.num_frames is not None:
                frames = frames[:, : self.num_frames - shown]
            if self.conditioning is not None:
                kept = self.conditioning[:, shown : shown + frames.shape[1]]
                frames[:, : kept.shape[1]] = kept
            if not stats.first_frame_seconds:
                stats.first_frame_seconds = before - self.started
                stats.start_seconds = process_seconds()
            stats.frames += frames.shape[1]
            yield frames
            before = time.perf_counter()

    @torch.inference_mode()
    def latents(self) -> Float[Tensor, "batch frames channels height width"]:
        """Generate a clip to its end, and return what would be decoded to its frames."""
        parts = (self._assembler.add(each.unit, each.tokens) for each in self.sampler)
        latents = torch.cat([part for part in parts if part is not None], dim=1)
        assert self.num_frames is not None, "an endless stream has no end"
        return latents[:, : 1 + math.ceil((self.num_frames - 1) / self._codec.stride[0])]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that is needed to go on with the stream later."""
        state = {"frames": torch.tensor(self.stats.frames)}
        for name, part in self._parts.items():
            state |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where a generation with the same arguments stood, on whatever device that was."""
        for name, part in self._parts.items():
            part.load_state_dict(part_of(state, name, device=self.sampler.device))
        self.stats.frames = int(state["frames"])


def write(
    generation: Generation,
    writer: VideoWriter,
    *,
    fps: float,
    show: Callable[[int, float], None],
) -> Timing:
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
    except KeyboardInterrupt:
        stats.interrupted = True
    stats.frames = writer.num_frames  # fewer than were generated, if it was stopped in a write
    stats.video_seconds = writer.num_frames / fps
    stats.seconds = time.perf_counter() - generation.started
    stats.peak_bytes = peak_bytes()
    return stats
