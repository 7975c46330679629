"""Distillation: who reads what, where gradients flow, who moves when, and what is refused."""

import copy
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import config as tiny_run
from distributed import prepare
from PIL import Image
from reference import Oracle
from tiny import MODEL, SCHEMES, TEXT, tiny_transformer
from torch import Tensor

from videoar.cli import arguments
from videoar.core.flow import renoise_step
from videoar.core.loss import layout
from videoar.core.sampler import Sampler, SamplerConfig
from videoar.core.schemes import parse
from videoar.core.tokens import to_tokens
from videoar.core.units import Units, Visible
from videoar.encoders.text_encoder import TextEncoder
from videoar.generation.pipeline import VideoPipeline
from videoar.training.distillation.objectives import (
    DistillationConfig,
    DistributionMatching,
    Initialisation,
)
from videoar.training.distillation.rollout import Rollout, last_step, rollout
from videoar.training.distillation.scores import Scorer, critic_loss, matching_loss, score
from videoar.training.loop import TrainConfig, train
from videoar.training.objectives import TextToVideo
from videoar.training.recipes import find
from videoar.training.run_folder import checkpoints, read_log

WORDS = torch.tensor([[1, 2, 3], [4, 0, 0]])


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _module(seed: int = 0) -> TextToVideo:
    torch.manual_seed(seed)
    return TextToVideo(tiny_transformer(seed=seed), TextEncoder(TEXT))


def _batch(frames: int = 4) -> dict[str, Tensor]:
    return {"latents": torch.randn(2, frames, 4, 6, 8, generator=_rng()), "text": WORDS}


def _objective(kind=DistributionMatching, *, context="full", schemes=("frame",), **config):
    networks = [_module(0)] if kind is Initialisation else [_module(0), _module(1)]
    defaults = {"clip_frames": 4, "num_inference_steps": 2, "path_steps": 4, "critic_draws": 1}
    return kind(
        *networks,
        teacher=_module(2),
        context=context,
        schemes=tuple(map(parse, schemes)),
        config=DistillationConfig(**defaults | config),
    )


# ---------------------------------------------------------------- who reads what


@pytest.mark.parametrize("name", SCHEMES)
def test_the_backward_mask_is_the_transpose(name: str) -> None:
    """A pass over the future reads exactly what is hidden from the past, and itself."""
    units = Units(parse(name), 4, 3, 4)
    past, future, every = (
        layout(units, Visible(), copies=False, reads=reads).visible
        for reads in ("past", "future", "all")
    )
    assert torch.equal(future, past.T)
    assert every.all()


@pytest.mark.parametrize("reads", ["past", "future"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_scorer_is_blind_in_one_direction(name: str, reads: str) -> None:
    """The gradient from a unit to those on the other side of it is exactly zero."""
    model, units = tiny_transformer(), Units(parse(name), 4, 3, 4)
    text = model.encode_text(torch.randn(1, 3, MODEL.text_dim, generator=_rng()))
    x = torch.randn(1, len(units.unit), MODEL.token_dim, generator=_rng()).requires_grad_()
    scorer = Scorer(model, text, units, direction=torch.randn(2, 24, generator=_rng(1)))
    output = scorer(x, torch.rand(1, units.count, generator=_rng()), reads)
    for reader in {0, units.count // 2, units.count - 1}:
        own = units.unit == reader
        (gradient,) = torch.autograd.grad(output[:, own].square().sum(), x, retain_graph=True)
        reached = gradient.abs().sum(dim=(0, 2)) > 0
        wave, mine = units.waves[units.unit], units.waves[reader]
        assert torch.equal(reached, own | (wave < mine if reads == "past" else wave > mine))


def test_with_one_unit_a_pair_is_the_full_critic() -> None:
    """There is no past and no future then; only the direction tells the passes apart."""
    model, units = tiny_transformer(), Units(parse("full"), 3, 3, 4)
    text = model.encode_text(torch.randn(1, 3, MODEL.text_dim, generator=_rng()))
    x = torch.randn(1, len(units.unit), MODEL.token_dim, generator=_rng())
    sigma = torch.full((1, 1), 0.7)
    scorer = Scorer(model, text, units, direction=torch.zeros(2, 24))
    full = score(scorer, x, sigma, critic="full")
    assert torch.equal(score(scorer, x, sigma, critic="symmetric"), full)
    velocity = torch.randn(x.shape, generator=_rng(1))
    losses = [
        critic_loss(scorer, x, velocity, sigma, critic=critic)
        for critic in ("full", "causal", "symmetric")
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])


def test_direction_tells_the_two_passes_apart() -> None:
    """It begins at zero and gets a gradient; else one network could not play both parts."""
    objective = _objective(schemes=("cube:1x2x2",))
    objective.loss(_batch(), _rng(), step=0)["loss"].backward()
    direction = objective.module.critic.direction.weight
    assert not direction.any()
    assert (direction.grad.abs().sum(1) > 0).all()
    assert not torch.equal(*direction.grad)


# ---------------------------------------------------------------- gradients


def test_the_gradient_is_the_closed_form() -> None:
    """(fake - real) over the mean distance per unit, divided by the number of elements."""
    unit = torch.tensor([0, 0, 1])
    clean, fake, real = (torch.randn(2, 3, 4, generator=_rng(k)) for k in range(3))
    clean.requires_grad_()
    matching_loss(clean, fake, real, unit).backward()
    expected = torch.empty(2, 3, 4)
    for sample, group in itertools.product(range(2), ([0, 1], [2])):
        distance = (clean[sample, group] - real[sample, group]).abs().mean()
        expected[sample, group] = (fake - real)[sample, group] / distance / clean.numel()
    torch.testing.assert_close(clean.grad, expected.detach())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_last_step_again_gives_the_same_video(name: str, steps: int) -> None:
    """Side by side beside a cache, or one by one: else gradients are of another video."""
    model, units = tiny_transformer(), Units(parse(name), 4, 3, 4)
    text = model.encode_text(torch.randn(2, 3, MODEL.text_dim, generator=_rng()))
    sigmas = (*(1.0, 0.8, 0.6)[:steps], 0.0)
    made = rollout(model, units, text, sigmas=sigmas, rng=_rng())
    chosen = torch.ones(units.count, dtype=torch.bool)
    again = last_step(model, units, text, made, chosen=chosen)
    assert made.sigma == sigmas[-2]
    torch.testing.assert_close(again, made.clean, atol=5e-5, rtol=1e-4)


class _LastLevel:
    """A network that records gradients in the passes of one noise level alone."""

    def __init__(self, model, sigma: float):
        self.model, self.sigma, self.config = model, sigma, model.config

    def __call__(self, *args, sigma: Tensor, **inputs):
        with torch.set_grad_enabled(bool((sigma - self.sigma).abs().min() < 1e-6)):
            return self.model(*args, sigma=sigma, **inputs)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_last_step_again_has_the_gradients_of_self_forcing(name: str) -> None:
    """They are those of unit by unit, the last step with gradients and the cache detached.

    Huang et al. 2025, arXiv:2506.08009, algorithm 1.
    """
    model, units = tiny_transformer(), Units(parse(name), 4, 3, 4)
    text = model.encode_text(torch.randn(2, 3, MODEL.text_dim, generator=_rng()))
    text = [(key.detach(), value.detach()) for key, value in text]
    sigmas, config = (1.0, 0.8, 0.0), {"step": renoise_step, "sigmas": (1.0, 0.8, 0.0)}
    made = rollout(model, units, text, sigmas=sigmas, rng=_rng())
    seeds = torch.randint(2**62, (2,), generator=_rng()).tolist()
    network = _LastLevel(model, sigmas[-2])
    sampler = Sampler(network, units, text, SamplerConfig(**config), seeds=seeds)
    literal = torch.cat([unit.tokens for unit in sampler], dim=1)
    again = last_step(model, units, text, made, chosen=torch.ones(units.count, dtype=torch.bool))
    torch.testing.assert_close(again, literal, atol=5e-5, rtol=1e-4)
    weight, parameters = torch.randn(literal.shape, generator=_rng(5)), list(model.parameters())
    gradients = [
        torch.autograd.grad((clean * weight).sum(), parameters, allow_unused=True)
        for clean in (again, literal)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_only_chosen_units_carry_gradients() -> None:
    """Memory follows their number; the others are context, as they were made."""
    model, units = tiny_transformer(), Units(parse("cube:1x2x2"), 4, 3, 4)
    text = model.encode_text(torch.randn(2, 3, MODEL.text_dim, generator=_rng()))
    made = rollout(model, units, text, sigmas=(1.0, 0.0), rng=_rng())
    chosen = torch.arange(units.count) % 3 == 1
    clean = last_step(model, units, text, made, chosen=chosen)
    own = chosen[units.unit]
    assert torch.equal(clean[:, ~own], made.clean[:, ~own])
    torch.testing.assert_close(clean, made.clean, atol=5e-5, rtol=1e-4)
    gradient = torch.autograd.grad(clean[:, ~own].sum(), model.proj_out.bias, retain_graph=True)[0]
    assert not gradient.any()
    assert torch.autograd.grad(clean[:, own].sum(), model.proj_out.bias)[0].all()


def test_each_player_gets_its_own_gradients() -> None:
    """A step of the critic leaves the student alone, and the teacher never learns."""
    objective = _objective(critic_warmup=1, critic_steps=1)
    assert [objective.group_of(step) for step in range(5)] == [
        *("critic", "critic", "student", "critic", "student"),
    ]
    for step, moves in ((0, "critic"), (2, "student")):
        objective.module.zero_grad(set_to_none=True)
        terms = objective.loss(_batch(), _rng(), step=step)
        terms["loss"].backward()
        assert f"{moves}_loss" in terms
        grads = {n: p.grad for n, p in objective.module.named_parameters() if p.grad is not None}
        assert all(name.startswith(moves) for name in grads)
        assert any(grad.abs().sum() > 0 for name, grad in grads.items() if name.startswith(moves))
    assert all(p.grad is None for p in objective.teacher.parameters())


def test_the_critic_has_a_learning_rate_of_its_own() -> None:
    """`--critic-learning-rate` reaches its optimizer, Muon's alike; the student's stays."""
    default = find("toy-same")
    words = ["--critic-learning-rate", "0.02", "--optimizer.muon-learning-rate", "0.3"]
    run = arguments.read(TrainConfig, words, prog="", default=default)
    rate = run.task.distillation.critic_learning_rate
    optimizers = _objective(critic_learning_rate=rate).optimizers(run.optimizer)
    assert optimizers["student"] == run.optimizer
    critic = optimizers["critic"]
    assert critic.learning_rate == 0.02
    assert critic.muon_learning_rate == pytest.approx(0.3 * 0.02 / run.optimizer.learning_rate)
    assert _objective().optimizers(run.optimizer)["critic"] == run.optimizer


def test_exits_follow_the_seed_and_come_equally_often() -> None:
    """Runs with other seeds are other runs; and every step of the student is trained."""

    def exits(seed: int) -> list[int]:
        objective = _objective(num_inference_steps=4)
        objective.seed, made = seed, []
        objective.made = lambda clip, sigmas, rng: (
            made.append(len(sigmas)) or Rollout(clip.tokens, clip.tokens, sigmas[-2])
        )
        objective.learn = lambda clip, clean, rng: clean.sum()
        for step in range(400):
            objective.loss(_batch(), _rng(), step=step * 6)
        return made

    first, again, second = exits(0), exits(0), exits(1)
    assert first == again
    assert first != second
    counts = torch.bincount(torch.tensor(first + second))[2:]
    assert len(counts) == 4
    assert counts.min() > 150


def test_the_gradient_of_few_units_is_as_long_as_that_of_all() -> None:
    """Else the number of units that carry gradients would change the rate of learning."""
    lengths = {}
    for chosen in (None, 1):
        squares = []
        for step in range(1, 13, 2):
            objective = _objective(critic_warmup=0, critic_steps=1, gradient_units=chosen)
            objective.loss(_batch(), _rng(), step=step)["loss"].backward()
            grads = [p.grad for p in objective.module.student.parameters() if p.grad is not None]
            squares.append(sum(float(grad.square().sum()) for grad in grads))
        lengths[chosen] = (sum(squares) / len(squares)) ** 0.5
    assert 0.8 < lengths[1] / lengths[None] < 4  # one unit of four: the quarter it was is too short


def test_recomputed_activations_give_the_same_gradients() -> None:
    """The cache that a block reads again in the backward pass is the one it read."""
    from videoar.training.distributed import recompute_activations

    plain = _objective(critic_warmup=0, critic_steps=1, schemes=("cube:1x2x2",))
    again = copy.deepcopy(plain)
    recompute_activations(again.module.student.transformer)
    for objective in (plain, again):
        objective.loss(_batch(), _rng(), step=1)["loss"].backward()
    for ours, theirs in zip(
        again.module.student.parameters(), plain.module.student.parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-4)


# ---------------------------------------------------------------- the first stage


@pytest.mark.parametrize("context", ["full", "clean", "noisy"])
def test_a_student_who_knows_has_nothing_to_learn(context: str) -> None:
    """With the oracle as teacher and student every path ends in the clip, and the loss is 0."""
    batch, scheme = _batch(), parse("cube:1x2x2")
    units = Units(scheme, 4, 3, 4)
    how = {"stage": "consistency", "schemes": ("cube:1x2x2",), "guidance_scale": 1.0}
    objective = _objective(Initialisation, context=context, **how)
    oracle = Oracle(to_tokens(batch["latents"], units), units.coords, channels=4)
    objective.student.transformer = objective.teacher.transformer = oracle
    assert objective.loss(batch, _rng(), step=0)["loss"] < 1e-6
    oracle.offset.data.fill_(0.3)
    assert objective.loss(batch, _rng(), step=0)["loss"] > 1e-4


def test_the_first_stage_trains_the_student_alone() -> None:
    """Targets carry no gradient, neither the teacher's nor the student's own."""
    objective = _objective(Initialisation, stage="consistency")
    objective.loss(_batch(), _rng(), step=0)["loss"].backward()
    assert any(p.grad is not None and p.grad.any() for p in objective.module.parameters())
    assert all(p.grad is None for p in objective.teacher.parameters())


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that reads everything, a student, and latents."""
    return prepare(tmp_path_factory.mktemp("distillation"))


def test_an_interrupted_run_goes_on_exactly(root: Path, tmp_path: Path) -> None:
    """Student, critic, average, moments, turns and randomness: all of it is in the checkpoint."""
    small = {"accumulate": 1, "steps": 8, "sample_every": 0}
    straight = tiny_run(root, tmp_path / "straight", **small)
    train(straight)
    broken = tiny_run(root, tmp_path / "broken", **small)

    def stop(line: str) -> None:
        if line.startswith("step 4/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, report=stop)
    train(broken)
    losses = [
        [row["loss"] for row in read_log(run.out) if "loss" in row] for run in (straight, broken)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


def test_what_is_exported_generates_in_the_steps_it_was_distilled_to(root: Path, tmp_path) -> None:
    """Few steps, fresh noise between them, and no guidance."""
    folder = train(tiny_run(root, tmp_path / "run", accumulate=1, steps=4))
    pipe = VideoPipeline.from_pretrained(folder)
    sampling = pipe.sampling
    assert (sampling.num_inference_steps, sampling.step, sampling.guidance_scale) == (
        *(2, "renoise", 1.0),
    )
    assert sampling.units == "cube:1x2x2"  # that of the student, as it was distilled, too
    assert len(pipe("a ball", num_frames=5).frames) == 5
    before = VideoPipeline.from_pretrained(root / "student").transformer.state_dict()
    after = pipe.transformer.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_low_rank_updates_are_merged(root: Path, tmp_path: Path) -> None:
    """The export has the names of a plain checkpoint, and other weights where updates were."""
    whole = tiny_run(root, tmp_path / "run", accumulate=1, steps=4)
    task = dataclasses.replace(whole.task, lora_rank=2)
    folder = train(dataclasses.replace(whole, task=task))
    before = VideoPipeline.from_pretrained(root / "student").transformer.state_dict()
    after = VideoPipeline.from_pretrained(folder).transformer.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith(".weight") and ("attn" in name or "ffn" in name) for name in changed)


def _train_changed(run: TrainConfig, root: Path, changes: dict) -> None:
    task = run.task
    for key, value in changes.items():
        if key.startswith("distillation."):
            field = {key.removeprefix("distillation."): value}
            changed = {"distillation": dataclasses.replace(task.distillation, **field)}
        elif key in ("lora_rank", "num_validation"):
            changed = {key: value}
        else:
            changed = {key: root / value if key == "latents" else str(root / value)}
        task = dataclasses.replace(task, **changed)
    train(dataclasses.replace(run, task=task))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "student"}, "student was not trained on cube:1x2x2, but on frame: use one"),
        ({"teacher": "nobody"}, "the teacher: .*nobody"),
        ({"critic": "other"}, "the critic has the codec .*name checkpoints that share it"),
        ({"latents": "nothing"}, "there is no folder .*nothing"),
        ({"latents": "foreign"}, "was encoded with the codec"),
        ({"distillation.clip_frames": 9}, "clips of 3 latent frames, but clip_frames is 9"),
        ({"distillation.critic_warmup": -1}, "critic_warmup is -1: use 0 or more"),
        ({"distillation.score_shift": 0.0}, "score_shift is 0.0: use a number above 0"),
        ({"latents": "wide"}, "clips of 4x6 latents, but .*makes videos of 4x4: .*32x32"),
        ({"teacher": "short"}, "clip_frames is 3, but .*short was trained on clips of 2"),
        ({"lora_rank": 0}, "lora_rank is 0: use 1 or more"),
        ({"num_validation": 0}, "num_validation is 0: use 1 or more"),
        ({"distillation.gradient_units": 0}, "gradient_units is 0"),
        (
            {"distillation.min_sigma": 0.99},
            "min_sigma is 0.99: use a number .* below max_sigma 0.98",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(root, tmp_path, changes, message) -> None:
    """One sentence with both values and the remedy; a run of hours must not end in it."""
    with pytest.raises(ValueError, match=message):
        _train_changed(tiny_run(root, tmp_path / "run"), root, changes)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_path_has_the_steps_of_the_student() -> None:
    """The first stage keeps points of the teacher's path; distribution matching has no path."""
    steps = {"num_inference_steps": 2, "path_steps": 5}
    assert DistillationConfig(stage="dmd", **steps)
    with pytest.raises(ValueError, match="2 steps are not among the sigmas of a path of 5"):
        DistillationConfig(stage="consistency", **steps)


def test_a_teacher_that_is_not_finite_stops_the_run_before_the_step(root, tmp_path) -> None:
    """Weights that took such a step are lost, and a checkpoint of them is worthless."""
    pipe = VideoPipeline.from_pretrained(root / "teacher")
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "nan")
    run = tiny_run(root, tmp_path / "run", accumulate=1, steps=6, save_every=1)
    task = dataclasses.replace(run.task, teacher=str(tmp_path / "nan"), critic=run.task.teacher)
    with pytest.raises(FloatingPointError, match=r"step 4 of .* was not taken"):
        train(dataclasses.replace(run, task=task))
    assert [folder.name for folder in checkpoints(run.out)] == ["step-3"]


def test_validation_shows_videos_of_any_data(root: Path, tmp_path: Path) -> None:
    """Without the judge of the world there are prompts of the folder, a sheet, and two figures."""
    run = tiny_run(root, tmp_path / "run", accumulate=1, steps=2, sample_every=2)
    train(run)
    (row,) = [row for row in read_log(run.out) if "loss" not in row]
    for name in run.task.units:
        assert row[f"validation/contrast/{name}"] > 0
        assert row[f"validation/change/{name}"] > 0
    sheet = np.asarray(Image.open(run.out / "samples" / "step-2.png"))
    assert sheet.std() > 0


def test_kinds_of_unit_share_the_videos_of_a_validation(root: Path, tmp_path: Path) -> None:
    """It takes as long whatever their number is; of a run that goes on, it may be another."""
    run = tiny_run(root, tmp_path / "run")
    for most, each in ((1, 1), (4, 2)):
        task = dataclasses.replace(run.task, num_validation=most, units=("cube:1x2x2",) * 2)
        assert len(task.build(run, report=lambda line: None)._prompts(most)) == each


def test_a_folder_of_another_run_is_refused(root: Path, tmp_path: Path) -> None:
    """Going on with another critic would be neither run."""
    whole = tiny_run(root, tmp_path / "run", accumulate=1, steps=2)
    train(whole)
    distillation = dataclasses.replace(whole.task.distillation, critic="full")
    task = dataclasses.replace(whole.task, distillation=distillation)
    with pytest.raises(ValueError, match="critic = symmetric, but full is asked for"):
        train(dataclasses.replace(whole, task=task))


def test_a_teacher_of_clean_contexts_needs_a_causal_critic() -> None:
    """Its scores are of one unit given finished ones: another critic's are of something else."""
    assert _objective(context="clean", critic="causal")
    for context, critic in itertools.product(("clean", "noisy"), ("full", "symmetric")):
        with pytest.raises(ValueError, match="use a causal critic"):
            _objective(context=context, critic=critic)


def test_a_causal_teacher_and_critic_score_the_units_of_a_clip_at_one_sigma() -> None:
    """Clips have sigmas of their own; the loss is finite and reaches the student."""
    objective = _objective(context="clean", critic="causal", critic_warmup=0, critic_steps=1)
    clip = objective.clip(_batch(), _rng())
    _, sigma, _ = objective.noised(clip.tokens, clip, _rng())
    assert torch.equal(sigma, sigma[:, :1].expand_as(sigma))
    assert len(sigma.unique()) == len(sigma)
    loss = objective.loss(_batch(), _rng(), step=1)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
