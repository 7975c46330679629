"""Distillation: what a slow teacher knows, learned by a causal student of few steps.

Two stages, the same for every partition. First the student learns to jump along the teacher's path:
neighbours on it must agree (`consistency`, Song et al. 2023, arXiv:2303.01469). Then its own videos
are moved to where the teacher finds them more likely than a *critic* does, which is trained on them
all the while: distribution matching (`dmd`, Yin et al. 2024, arXiv:2311.18828).

The critic says what the student's videos look like, and `critic` says what it may read:

    full        everything: asymmetric DMD, as in CausVid and Self-Forcing
    causal      what is visible to the student
    symmetric   the mean of a pass that reads the past and one that reads the future, trained as one
                predictor: were each trained alone, the fixed point would be wrong

`docs/distillation.md` derives why. The student's video is made by the sampler without gradients.
Then the last step of its units is taken again, side by side, each reading the finished units from a
cache: gradients never enter the cache, and activations that are recomputed find it as it was.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tyro.conf import arg

from videoar.checks import Count, Finite, Limit, Natural, Options, Positive, check
from videoar.core.flow import add_noise, clean_of, random_sigmas, sigma_steps
from videoar.core.loss import on
from videoar.core.schemes import Scheme
from videoar.core.tokens import to_tokens
from videoar.core.units import Units
from videoar.training.distillation import scores
from videoar.training.distillation.rollout import Rollout, last_step, rollout
from videoar.training.objectives import Named, Objective, TextToVideo, seeded
from videoar.training.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(Options):
    """How a student is distilled; one configuration serves all stages."""

    stage: Literal["consistency", "dmd"] = "dmd"
    """What is learned: see `docs/distillation.md`."""
    num_inference_steps: Count = 4
    """Denoising steps of the student."""
    shift: Finite = 5.0
    """Shift of its sigmas towards noise."""
    clip_frames: Count = 8
    """Latent frames of the videos that are scored."""
    guidance_scale: Annotated[float, Limit(lambda scale: scale >= 0, "0 or more")] = 3.0
    """Guidance of the teacher; the student needs none."""
    path_steps: Count = 24
    """Steps of the teacher's path in the first stage, a multiple of the student's."""
    critic: scores.Critics = "symmetric"
    """What the critic reads."""
    critic_steps: Count = 5
    """Steps of the critic for each of the student."""
    critic_draws: Count = 4
    """Noisy copies of each of the student's videos that the critic learns from: they cost less than
    a new video."""
    critic_learning_rate: Annotated[
        Positive | None, arg(name="critic-learning-rate", prefix_name=False)
    ] = None
    """Step size of the critic; None: that of the student. Muon's scales alike."""
    critic_warmup: Natural = 200
    """Steps of the critic before the first of the student."""
    gradient_units: Count | None = None
    """Units of a video that carry gradients, drawn anew each time; None for all of them."""
    score_shift: Finite = 5.0
    """Shift of the sigmas at which videos are scored."""
    min_sigma: float = 0.02
    """Lowest of them."""
    max_sigma: float = 0.98
    """Highest of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rising, low = 0 < self.min_sigma < self.max_sigma < 1, self.max_sigma
        says = f"a number above 0 and below max_sigma {low}, which is below 1"
        check("min_sigma", self.min_sigma, rising, says)
        if self.stage != "dmd" and self.path_steps % self.num_inference_steps:
            raise ValueError(
                f"The student's {self.num_inference_steps} steps are not among the sigmas of a "
                f"path of {self.path_steps} steps: make path_steps a multiple of them."
            )

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The sigmas of the student."""
        return sigma_steps(self.num_inference_steps, shift=self.shift)


class Critic(nn.Module):
    """The network that follows the student's distribution."""

    def __init__(self, model: TextToVideo) -> None:
        super().__init__()
        self.model = model
        size = model.transformer.config.hidden_size
        self.direction = nn.Embedding(2, size)
        """Tells passes over the past and over the future apart."""
        nn.init.zeros_(self.direction.weight)


@dataclass(frozen=True)
class Clip:
    """What a step works on."""

    units: Units
    tokens: Float[Tensor, scores.FIELDS]
    words: Tensor
    unit: Int[Tensor, " tokens"]
    """On the device of the tokens."""


class TeacherObjective(Objective):
    """What all stages share: a teacher, and what it says."""

    def __init__(
        self,
        *,
        teacher: TextToVideo,
        context: scores.Context,
        schemes: tuple[Scheme, ...],
        config: DistillationConfig,
        seed: int = 0,
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.frozen = (self.teacher,)
        self.context, self.schemes, self.config, self.seed = context, schemes, config, seed

    def clip(self, batch: dict[str, Tensor], drawn: torch.Generator) -> Clip:
        """Cut the first frames of a batch by a scheme that is drawn for the whole step."""
        scheme = self.schemes[int(torch.randint(len(self.schemes), (), generator=drawn))]
        latents, patch = batch["latents"], self.teacher.transformer.config.patch
        latents = latents[:, : self.config.clip_frames]
        lattice = (side // patch for side in latents.shape[3:])
        units = Units(scheme, latents.shape[1], *lattice)
        tokens = to_tokens(latents, units, patch=patch)
        return Clip(units, tokens, batch["text"], units.unit.to(tokens.device))

    def copies(self, clean: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
        """Return clean copies as context, with their sigmas."""
        return clean.detach(), clean.new_zeros(len(clean), len(clip.units.sizes))

    def teach(self, clip: Clip, clean: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return what gives the teacher's guided velocity of noisy tokens."""
        words, scale = clip.words, self.config.guidance_scale
        if scale != 1:
            every = torch.ones(len(words), dtype=torch.bool, device=words.device)
            words = torch.cat([words, self.teacher.without(words, every)])
        with torch.no_grad():
            text = self.teacher.context(words)
        copies = self.copies(clean, clip) if self.context == "clean" else None
        scorer = scores.Scorer(self.teacher.transformer, text, clip.units, scale, copies)
        return partial(scorer, reads="all" if self.context == "full" else "past")


class Initialisation(TeacherObjective):
    """Teach a causal student to jump along the path of a teacher.

    The teacher may read everything or be causal itself. Then it reads clean copies of the data, and
    so does the student: noise and context decide the end of the path (Causal Forcing,
    arXiv:2602.02214).

    Args:
        student: what is trained.
        taught: teacher, context, schemes and config of `TeacherObjective`.
    """

    def __init__(self, student: TextToVideo, **taught: Any) -> None:
        super().__init__(**taught)
        self.module = self.student = student

    def loss(self, batch: Named, rng: torch.Generator, *, step: int = 0) -> Named:
        clip = self.clip(batch, seeded(self.seed, step))
        config, (size, *_), count = self.config, clip.tokens.shape, len(clip.units.sizes)
        path = torch.tensor(sigma_steps(config.path_steps, shift=config.shift), device=rng.device)
        drawn = 1 if self.context == "full" else count
        index = torch.randint(config.path_steps, (size, drawn), **on(rng)).expand(size, count)
        sigma, after = (path[index + k].to(clip.tokens) for k in (0, 1))
        noise = torch.randn(clip.tokens.shape, **on(rng)).to(clip.tokens)
        x = add_noise(clip.tokens, noise, sigma[:, clip.unit, None])
        with torch.no_grad():
            velocity = self.teach(clip, clip.tokens)(x, sigma).float()
            closer = x + (after - sigma)[:, clip.unit, None] * velocity
            # The student itself is the target, without an average of its weights (Song and
            # Dhariwal 2023, arXiv:2310.14189): at sigma 0 what it is given.
            target = self.student_clean(clip, closer, after)
        found = self.student_clean(clip, x, sigma)
        return {"loss": (found - target).square().mean()}

    def student_clean(self, clip: Clip, x: Tensor, sigma: Tensor) -> Tensor:
        """Return what the student takes noisy tokens for, reading clean copies."""
        text = self.student.context(clip.words)
        copies = self.copies(clip.tokens, clip)
        scorer = scores.Scorer(self.student.transformer, text, clip.units, copies=copies)
        return clean_of(x, scorer(x, sigma, "past").float(), sigma[:, clip.unit, None])


class DistributionMatching(TeacherObjective):
    """Train a student on its own videos, and a critic that follows them.

    Steps take turns: `critic_steps` of the critic, then one of the student. They are optimizer
    steps, whatever the accumulation.

    Args:
        student: a causal generator; `Initialisation` makes one.
        critic: a copy of the teacher, or of the student where the teacher is causal.
        taught: teacher, context, schemes and config of `TeacherObjective`.
    """

    def __init__(self, student: TextToVideo, critic: TextToVideo, **taught: Any) -> None:
        super().__init__(**taught)
        self.module = nn.ModuleDict({"student": student, "critic": Critic(critic)})
        if self.context != "full" and self.config.critic != "causal":
            raise ValueError(
                f"critic is {self.config.critic}, but the teacher reads the past alone (context "
                f"{self.context}): use a causal critic, or a teacher that reads everything."
            )

    @property
    def result(self) -> nn.Module:
        return self.module.student

    def optimizers(self, config: OptimizerConfig) -> dict[str, OptimizerConfig]:
        critic, rate, muon = config, self.config.critic_learning_rate, config.muon_learning_rate
        if rate is not None:
            muon = muon and muon * rate / config.learning_rate
            critic = replace(config, learning_rate=rate, muon_learning_rate=muon)
        return {"student": config, "critic": critic}

    def group_of(self, step: int) -> str:
        late = step - self.config.critic_warmup
        period = self.config.critic_steps + 1
        return "student" if late >= 0 and late % period == period - 1 else "critic"

    def loss(self, batch: Named, rng: torch.Generator, *, step: int = 0) -> Named:
        drawn = seeded(self.seed, step)  # shared by all batches of a step, on every rank
        clip = self.clip(batch, drawn)
        last = int(torch.randint(self.config.num_inference_steps, (), generator=drawn))
        sigmas = (*self.config.sigmas[: last + 1], 0.0)
        if self.group_of(step) == "critic":
            loss = self.learn(clip, self.made(clip, sigmas, rng).clean, rng)
            return {"loss": loss, "critic_loss": loss}
        return self._student_loss(clip, sigmas, rng, drawn)

    def made(self, clip: Clip, sigmas: tuple[float, ...], rng: torch.Generator) -> Rollout:
        """Let the student make a video of its own."""
        student = self.module.student
        with torch.no_grad():
            text = student.context(clip.words)
        return rollout(student.transformer, clip.units, text, sigmas=sigmas, rng=rng)

    def noised(
        self, clean: Tensor, clip: Clip, rng: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return noisy tokens, their sigmas by unit, one for each clip, and the noise."""
        config, count = self.config, len(clip.units.sizes)
        sigma = random_sigmas((len(clean), 1), rng, shift=config.score_shift)
        sigma = sigma.clamp(config.min_sigma, config.max_sigma).to(clean).expand(-1, count)
        noise = torch.randn(clean.shape, **on(rng)).to(clean)
        return add_noise(clean, noise, sigma[:, clip.unit, None]), sigma, noise

    def follow(self, clip: Clip, clean: Tensor) -> scores.Scorer:
        """Return the critic's predictions."""
        critic = self.module.critic
        text = critic.model.context(clip.words)
        copies = self.copies(clean, clip) if self.context == "clean" else None
        both = torch.arange(2, device=clean.device)
        direction = critic.direction(both) if len(scores.PASSES[self.config.critic]) > 1 else None
        network = critic.model.transformer
        return scores.Scorer(network, text, clip.units, copies=copies, direction=direction)

    def learn(self, clip: Clip, clean: Tensor, rng: torch.Generator) -> Tensor:
        """Return the critic's loss on videos of the student."""
        config, draws = self.config, self.config.critic_draws
        clean = clean.repeat(draws, 1, 1)
        x, sigma, noise = self.noised(clean, clip, rng)
        follow = self.follow(clip, clean)
        text = [(key.repeat(draws, 1, 1, 1), v.repeat(draws, 1, 1, 1)) for key, v in follow.text]
        follow = replace(follow, text=text)
        return scores.critic_loss(follow, x, noise - clean, sigma, critic=config.critic)

    def _student_loss(
        self, clip: Clip, sigmas: tuple[float, ...], rng: torch.Generator, drawn: torch.Generator
    ) -> dict[str, Tensor]:
        config, student, count = self.config, self.module.student, len(clip.units.sizes)
        made = self.made(clip, sigmas, rng)
        chosen = torch.randperm(count, generator=drawn) < (config.gradient_units or count)
        text = student.context(clip.words)
        clean = last_step(student.transformer, clip.units, text, made, chosen=chosen)
        x, sigma, _ = self.noised(clean.detach(), clip, rng)
        per_token = sigma[:, clip.unit, None]
        with torch.no_grad():
            follow, teach = self.follow(clip, clean), self.teach(clip, clean)
            fake = clean_of(x, scores.score(follow, x, sigma, critic=config.critic), per_token)
            real = clean_of(x, teach(x, sigma).float(), per_token)
        loss = scores.matching_loss(clean, fake, real, clip.unit)
        # The mean over what can move.
        loss = loss / chosen[clip.units.unit].float().mean()
        difference = (fake - real).square().mean()
        return {"loss": loss, "student_loss": loss, "critic_minus_teacher": difference}
