"""What a step of distillation costs, part by part; teacher, critic and student are one network."""

import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from cache import without_cache
from tyro.conf import Positional

from videoar import machine
from videoar.checks import check_options
from videoar.cli import arguments
from videoar.cli.main import exit_code
from videoar.cli.progress import say
from videoar.core.flow import renoise_step
from videoar.core.sampler import Sampler, SamplerConfig
from videoar.core.schemes import parse
from videoar.encoders.text_encoder import TinyPromptEncoder
from videoar.evaluation.options import Checkpoint
from videoar.evaluation.tables import markdown
from videoar.generation.pipeline import VideoPipeline
from videoar.training.distillation.objectives import Clip, DistillationConfig, DistributionMatching
from videoar.training.distillation.rollout import last_step
from videoar.training.distillation.scores import Critics
from videoar.training.objectives import TextToVideo
from videoar.training.optimizer import OptimizerConfig, ParameterGroup


@dataclass(frozen=True, kw_only=True)
class BenchDistill:
    """Measure what the parts of a step of distillation cost."""

    checkpoint: Positional[Checkpoint] = "toy"
    """Network that plays teacher, critic and student."""
    units: str = "cube:1x2x2"
    """Kind of unit."""
    batch_size: int = 16
    """Videos per batch."""
    latent_frames: int = 8
    """Their length."""
    size: int = 64
    """Their height and width in pixels."""
    repeats: int = 5
    """How often each part is timed."""
    threads: int | None = None
    """CPU threads."""

    def __post_init__(self) -> None:
        names = ("batch_size", "latent_frames", "size", "repeats")
        check_options(self, *((name, getattr(self, name) >= 1, "1 or more") for name in names))


CRITICS: tuple[Critics, ...] = ("full", "causal", "symmetric")
FORWARDS = {
    "last step, with gradients": 4.0,
    "teacher, guided": 2.0,
    "critic, full": 3.0,
    "critic, causal": 3.0,
    "critic, symmetric": 6.0,
}
"""The operations of a part, in those of one pass; a backward counts for two."""
INCLUDED = (
    "{batch} videos of {frames} latent frames, {tokens} tokens each, {units}, {steps} steps;"
    " medians of {repeats}, bfloat16, {hardware}. Rollouts go to the last step; the time of a"
    " critic is forward and backward. symmetric / full critic: {pair:.2f}; rollout without / with"
    " a cache: {cache:.2f}."
)


def objectives(pipe: VideoPipeline, config: BenchDistill) -> dict[str, DistributionMatching]:
    """Build distribution matching with each critic from copies of one network."""
    prompts = pipe.prompt_encoder
    assert isinstance(prompts, TinyPromptEncoder)
    module = TextToVideo(pipe.transformer, prompts.encoder).requires_grad_(True)
    return {
        critic: DistributionMatching(
            copy.deepcopy(module),
            copy.deepcopy(module),
            teacher=copy.deepcopy(module),
            context="full",
            schemes=(parse(config.units),),
            config=DistillationConfig(
                critic=critic, critic_draws=1, clip_frames=config.latent_frames
            ),
        )
        for critic in CRITICS
    }


def parts(
    matching: dict[str, DistributionMatching], clip: Clip, rng: torch.Generator
) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    full, words = matching["full"], clip.words
    student, sigmas = full.module.student, full.config.sigmas
    made = full.made(clip, sigmas, rng)
    x, sigma, _ = full.noised(made.clean, clip, rng)
    chosen = torch.ones(len(clip.units.sizes), dtype=torch.bool)

    def again() -> None:
        text = student.context(words)
        last_step(student.transformer, clip.units, text, made, chosen=chosen).sum().backward()

    @torch.no_grad()
    def uncached() -> None:
        config, seeds = SamplerConfig(sigmas=sigmas, step=renoise_step), range(len(words))
        text = student.context(words)
        without_cache(Sampler(student.transformer, clip.units, text, config, seeds=seeds))

    def learn(of: DistributionMatching) -> Callable[[], object]:
        return lambda: of.learn(clip, made.clean, rng).backward()

    again()  # the update needs gradients
    group = ParameterGroup(OptimizerConfig(learning_rate=1e-9), dict(student.named_parameters()))
    return {
        "rollout": lambda: full.made(clip, sigmas, rng),
        "rollout without a cache": uncached,
        "last step, with gradients": again,
        "teacher, guided": torch.no_grad()(lambda: full.teach(clip, made.clean)(x, sigma)),
        **{f"critic, {critic}": learn(of) for critic, of in matching.items()},
        "update": lambda: group.move(1e-9),
    }


def run(config: BenchDistill, report: Callable[[str], None]) -> str:
    """Measure each part, and return a table."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    pipe = VideoPipeline.from_pretrained(config.checkpoint)
    matching, stride = objectives(pipe, config), pipe.codec.stride
    how, rng = matching["full"].config, torch.Generator().manual_seed(0)
    cell = stride[1] * pipe.transformer.config.patch
    if config.size % cell:
        raise ValueError(f"size is {config.size}: use a multiple of {cell}, the side of a token")
    side = config.size // stride[1]
    shape = (config.batch_size, how.clip_frames, pipe.codec.latent_channels, side, side)
    prompts = pipe.prompt_encoder
    assert isinstance(prompts, TinyPromptEncoder)
    words = prompts.tokenize(["a large red ball moves left"] * config.batch_size)
    batch = {"latents": torch.randn(shape, generator=rng), "text": words}
    clip = matching["full"].clip(batch, rng)
    tokens = len(clip.unit)
    peak, seconds = machine.measure_matmul_rate("cpu", precision="bfloat16"), {}
    for name, part in parts(matching, clip, rng).items():
        seconds[name] = _median(part, repeats=config.repeats)
        report(f"{name}: {seconds[name]:.3f} s")
    least = pipe.transformer.flops(tokens, keys=tokens) * config.batch_size / peak
    rows = [["part", "seconds", "tokens/s", "share of peak"]]
    for name, value in seconds.items():
        share = f"{FORWARDS[name] * least / value:.0%}" if name in FORWARDS else ""
        rows.append([name, f"{value:.3f}", f"{tokens * config.batch_size / value:,.0f}", share])
    rows[-1][2] = ""  # an update has no tokens
    about = INCLUDED.format(
        batch=config.batch_size,
        frames=how.clip_frames,
        tokens=tokens,
        units=config.units,
        steps=how.num_inference_steps,
        repeats=config.repeats,
        hardware=machine.hardware("cpu"),
        pair=seconds["critic, symmetric"] / seconds["critic, full"],
        cache=seconds["rollout without a cache"] / seconds["rollout"],
    )
    return f"{markdown(rows)}\n\n{about}"


def _median(part: Callable[[], object], *, repeats: int) -> float:
    """Time a part; the first call, which warms up, does not count."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            part()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main(words: Sequence[str]) -> int:
    """Print the tables; bad input is one sentence."""
    prog = "python benchmarks/distill.py"
    return exit_code(lambda: say(run(arguments.read(BenchDistill, words, prog=prog), say)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
