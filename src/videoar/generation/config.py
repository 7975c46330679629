"""How to generate: the options that a checkpoint carries and a user may override."""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from tyro.conf import arg

from videoar.checks import check, check_options, check_whole
from videoar.core.schemes import Scheme, names, parse
from videoar.core.units import Units, Visible


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to generate; a checkpoint carries its own defaults (`videoar.json`, `sampling`)."""

    units: Annotated[str | Scheme, arg(constructor=str)] = "cube:1x2x2"
    """Unit scheme, or its name: see `videoar.core.schemes.parse`."""
    num_inference_steps: int = 4
    """Denoising steps per unit."""
    unit_steps: Mapping[str, int] = field(default_factory=dict)
    """The same for kinds of unit, by name, that need others by default."""
    shift: float = 5.0
    """Shift of the sigmas towards noise."""
    sigmas: tuple[float, ...] | None = None
    """The sigmas themselves, from 1 to 0; None: those of the two fields above."""
    step: Literal["euler", "renoise"] = "euler"
    """How a sigma is left: along the flow, or, by distilled models, with fresh noise."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 runs no second, unconditional pass."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    window_frames: int | None = 8
    """Latent frames that a unit may read, its own and the sinks included; None: all before it."""
    sink_frames: int = 2
    """First latent frames that stay readable for ever: as many whole segments as fit."""
    moving_sinks: bool = True
    """Whether they follow the window; else their positions are those of the first frames."""
    lag: int | None = None
    """Rows between the starts of two waves: see `SamplerConfig`."""
    context_noise: float = 0.0
    """Sigma at which finished units enter the cache."""
    fps: int = 16
    """Frames per second of the model's videos."""

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "window_frames", "sink_frames", "lag"):
            check_whole(name, getattr(self, name))
        for name, steps in self.unit_steps.items():
            check_whole(f"unit_steps of {name}", steps)
            check(f"unit_steps of {name}", steps, steps >= 1, "1 or more")
        for name in ("shift", "guidance_scale", "context_noise", "fps"):
            value = getattr(self, name)
            check(name, repr(value), isinstance(value, numbers.Real), "a number")
        check("fps", self.fps, 0 < self.fps < math.inf, "a number above 0, such as 16")

    def replaced(self, **changes: Any) -> "GenerationConfig":
        """Return it with other fields; sigmas go with the steps or the shift that they replace.

        Where no steps are named, they are those of the kind of unit.
        """
        if {"num_inference_steps", "shift"} & changes.keys():
            changes = {"sigmas": None} | changes
        if "num_inference_steps" in changes:
            return replace(self, **{"unit_steps": {}} | changes)
        changed = replace(self, **changes)
        (kind,) = names([changed.units])
        steps = changed.unit_steps.get(kind, changed.num_inference_steps)
        return replace(changed, num_inference_steps=steps)

    def trained(self, units: tuple[str, ...], *, window: int, **changes: Any) -> "GenerationConfig":
        """Return how to sample after a training on `units`: by its own, if that is among them.

        The window is that of the training, or one unit of what is longer.
        """
        (own,) = names([self.units])
        chosen = own if own in units else units[0]
        window = max(window, parse(chosen).frames or 0)
        return self.replaced(units=chosen, window_frames=window, **changes)

    def visible(self, units: Units) -> Visible:
        """Return the visibility over `units`: sink and window in whole units."""
        segment = units.segment_frames
        check_options(self, least={"sink_frames": 0})
        if self.window_frames is None or units.count == units.units_per_segment:
            return Visible()
        if self.window_frames < segment:
            raise ValueError(
                f"A window of {self.window_frames} latent frames is smaller than one unit of "
                f"{self.units} with its {segment} latent frames: use a window of {segment} or more."
            )
        sink = units.whole_segments(self.sink_frames, window=self.window_frames)
        window = (self.window_frames - sink) // segment * segment
        return Visible(window=units.units_of(window), sink=units.units_of(sink))
