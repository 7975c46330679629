"""How to generate: the options that a checkpoint carries and a user may override."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from tyro.conf import arg

from videoar.checks import Count, Limit, Natural, Options, check, typed
from videoar.core.flow import renoise_step, sigma_steps
from videoar.core.loss import FlowMatchingConfig
from videoar.core.noise import mixed
from videoar.core.sampler import SamplerConfig
from videoar.core.schemes import Scheme, names, parse
from videoar.core.units import Units, Visible
from videoar.files import Json, to_json
from videoar.generation.schedules import OF_CLIPS, SCHEDULES
from videoar.generation.unipc import GRIDS, grid, timestep, unipc_step

AUTO = "auto"
"""The name of units that a router chooses, segment by segment."""
# Of `SamplerConfig`; others are Euler steps, on one grid or another.
STEPS: dict[str, dict[str, Any]] = {
    "renoise": {"step": renoise_step},
    "unipc": {"step": unipc_step, "told": timestep},
}


def scheme_of(units: str | Scheme) -> Scheme | None:
    """Return a scheme, or that of a name; None if it is yet to be chosen."""
    return (None if units == AUTO else parse(units)) if isinstance(units, str) else units


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(Options):
    """How to generate; a checkpoint carries its own defaults (`videoar.json`, `sampling`)."""

    units: Annotated[str | Scheme, arg(constructor=str)] = "cube:1x2x2"
    """Unit scheme, or its name: see `videoar.core.schemes.parse`; or `auto`."""
    num_inference_steps: int = 4
    """Denoising steps per unit."""
    unit_steps: Mapping[str, int] = field(default_factory=dict)
    """The same for kinds of unit, by name, that need others by default."""
    first_steps: tuple[int, ...] = ()
    """Steps of the first units, where nothing is read yet, if more: 4 for one, 4 3 for two, ..."""
    shift: float = 5.0
    """Shift of the sigmas towards noise."""
    sigmas: tuple[float, ...] | None = None
    """The sigmas themselves, from 1 to 0; None: those of the two fields above."""
    step: Literal["euler", "renoise", "flow-match-euler", "unipc"] = "euler"
    """How a sigma is left: along the flow, or, by distilled models, with fresh noise; or as
    schedulers of diffusers do it, on their grids: FlowMatchEulerDiscrete, UniPCMultistep."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 runs no second, unconditional pass."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    window_frames: int | None = 8
    """Latent frames that a unit may read, its own and the sinks included; None: all before it."""
    sink_frames: Natural = 2
    """First latent frames that stay readable for ever: as many whole segments as fit."""
    moving_sinks: bool = True
    """Whether they follow the window; else their positions are those of the first frames."""
    recall_frames: Count | None = None
    """Latent frames that are read with a new prompt, and none before them: the past says what was
    told before. None: all of the window, and no key is computed anew unasked."""
    lag: int | float | str | None = None
    """Rows between the starts of two waves, or one of `schedules.SCHEDULES`."""
    context_noise: float = 0.0
    """Sigma at which finished units enter the cache."""
    fps: Annotated[int, Limit(lambda fps: 0 < fps <= 1000, "1 to 1000, such as 16")] = 16
    """Frames per second of the model's videos."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, steps in self.unit_steps.items():
            check(f"unit_steps of {name}", steps, steps >= 1, "1 or more")
        named = not isinstance(self.lag, str) or self.lag in SCHEDULES
        check("lag", self.lag, named, f"a number of rows, or one of {', '.join(SCHEDULES)}")

    @property
    def schedule(self) -> tuple[float, ...]:
        """The sigmas of a unit."""
        return self.sigmas or self._sigmas(self.steps)

    def _sigmas(self, steps: int) -> tuple[float, ...]:
        even = sigma_steps(steps, shift=self.shift)
        return grid(self.step, steps, shift=self.shift) if self.step in GRIDS else even

    @property
    def steps(self) -> int:
        """Denoising steps of the kind of unit."""
        stated = {scheme_of(name): steps for name, steps in self.unit_steps.items()}
        return stated.get(scheme_of(self.units), self.num_inference_steps)

    def replaced(self, **changes: Any) -> "GenerationConfig":
        """Return it with other fields; sigmas go with the steps or the shift that they replace.

        Steps that are named are those of all kinds of unit, and of the first ones.
        """
        if {"num_inference_steps", "shift"} & changes.keys():
            changes = {"sigmas": None} | changes
        if "num_inference_steps" in changes:
            return replace(self, **{"unit_steps": {}, "first_steps": ()} | changes)
        return replace(self, **changes)

    def trained(self, units: tuple[str, ...], *, window: int, **changes: Any) -> "GenerationConfig":
        """Return how to sample after a training on `units`: by its own, if that is among them.

        The window is that of the training, or one unit of what is longer.
        """
        (own,) = names([self.units])
        chosen = own if own in units else units[0]
        window = max(window, parse(chosen).frames or 0)
        return self.replaced(units=chosen, window_frames=window, **changes)

    def read_again(
        self, units: Units, past: list[int], whole: int, *, told: bool, begun: bool
    ) -> list[int]:
        """Return what a new sampler reads of latent frames: whole segments of sinks and window.

        With words that are `told`, only what is recalled; a segment that is `begun` stays where it
        is, behind whole ones.
        """
        first, last = 0, whole
        if self.window_frames is not None:
            first = units.whole_segments(self.sink_frames, window=self.window_frames)
            last = (self.window_frames - first) // units.segment_frames - 1
            last *= units.segment_frames
        kept = [t for t in past if t < whole and (t < first or t >= whole - last)]
        kept = kept[len(kept) % units.segment_frames :]
        if told and self.recall_frames is not None:
            length = units.segment_frames if begun else 1
            kept = kept[-math.ceil(self.recall_frames / length) * length :]
        return kept

    def sampler(self, units: Units) -> SamplerConfig:
        """Return the same for the core, over `units`.

        Raises:
            ValueError: a value is outside its limits, or `units` cannot be sampled so.
        """
        *first, steps = *self.first_steps, len(self.schedule) - 1
        falling = sorted((*first, steps), reverse=True) == [*first, steps]
        check("first_steps", self.first_steps, falling, f"falling numbers of {steps} or more")
        endless = units.count is None and self.lag in OF_CLIPS
        check("lag", self.lag, not endless, "another for an endless stream, or a number of frames")
        return SamplerConfig(
            sigmas=self.schedule,
            first_sigmas=tuple(map(self._sigmas, first)),
            lag=SCHEDULES[self.lag] if isinstance(self.lag, str) else self.lag,
            visible=self.visible(units),
            context_noise=self.context_noise,
            moving_sinks=self.moving_sinks,
            **STEPS.get(self.step, {}),
        )

    def visible(self, units: Units) -> Visible:
        """Return the visibility over `units`: sink and window in whole units."""
        segment = units.segment_frames
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


def trained_flow(meta: Mapping[str, Any], sampling: GenerationConfig) -> FlowMatchingConfig:
    """Return the objective that a checkpoint was trained by, as far as it says it itself."""
    task = meta.get("config", {}).get("task", {})
    known = [field.name for field in fields(FlowMatchingConfig)]
    stated = {name: value for name, value in task.get("flow", {}).items() if name in known}
    units = meta.get("units") or task.get("units") or names([sampling.units])
    flow, whole = FlowMatchingConfig(**stated), all(parse(name).frames is None for name in units)
    return replace(flow, context="full") if whole else flow


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked of a generation, from the next unit on."""

    prompts: tuple[str, ...]
    """One per video, as are the seeds."""
    seeds: tuple[int, ...]
    options: GenerationConfig
    routed: bool = False
    """Whether a router changes the units of the options with every segment."""
    stretch: int = 0
    """How often it has begun anew from its own last frames."""
    before: tuple[str, ...] = ()
    """Prompts that are blended out."""
    over: int = 1
    """Units that this takes."""
    left: int = 0
    """Those of them that are not yet begun."""

    @property
    def units(self) -> str:
        """The name of the units that are asked for."""
        return AUTO if self.routed else names([self.options.units])[0]

    def replaced(self, **changes: Any) -> "Plan":
        """Return it with other options; units to be chosen begin as those of now."""
        routed = changes.get("units", AUTO if self.routed else "") == AUTO
        if changes.get("units") == AUTO:
            changes["units"] = self.options.units
        return replace(self, options=self.options.replaced(**changes), routed=routed)

    @property
    def noise_seeds(self) -> tuple[int, ...]:
        """Seeds of the noise: units are counted anew in a stretch, and must not repeat theirs."""
        stretch = self.stretch
        return tuple(mixed(seed, stretch) if stretch else seed for seed in self.seeds)

    def to_json(self) -> Json:
        options = vars(self.options) | {"units": names([self.options.units])[0]}
        return to_json(vars(self) | {"options": options})

    @classmethod
    def from_json(cls, values: Json) -> "Plan":
        options = GenerationConfig(**typed(GenerationConfig, values["options"]))
        return cls(**typed(cls, values | {"options": options}))
