"""Every recipe builds and takes a step at tiny size, and what it exports generates."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CODEC, MODEL, TEXT

from videoar.checkpoints.checkpoint import Checkpoint
from videoar.core.schemes import Cells, KeyDetail, Scheme, box
from videoar.data.video import Video
from videoar.data.world import held_out_prompts
from videoar.evaluation.labels import LABELS
from videoar.generation.config import GenerationConfig
from videoar.generation.pipeline import VideoPipeline
from videoar.training import recipes
from videoar.training.codec import FootageConfig, ReconstructionConfig
from videoar.training.distillation.task import StudentConfig
from videoar.training.loop import TrainConfig, train
from videoar.training.reader import JudgeConfig
from videoar.training.recipes import RECIPES, find
from videoar.training.router import RoutingConfig
from videoar.training.run_folder import read_log
from videoar.training.text_to_video import TextToVideoConfig, learned

# What is made once is made by one worker.
pytestmark = pytest.mark.xdist_group("recipes")

TOY_LATENTS = find("toy").task.latents
# Of real weights: `test_wan_training.py` takes its steps.
SMALL = [name for name in RECIPES if name != "wan-1.3b-dmd"]


def _tiny(config: TrainConfig, folder: Path) -> TrainConfig:
    """The same recipe with small parts, few videos and a few steps."""
    task = config.task
    if isinstance(task, ReconstructionConfig):
        codec, init = CODEC, None
        if task.init is not None:
            codec = replace(CODEC, decoder_channels=(6, 4, 4, 4))
            init = folder / task.init
        small = replace(task, codec=codec, init=init, num_frames=5, num_clips=4)
    elif isinstance(task, FootageConfig):
        videos = folder / task.videos
        videos.mkdir()
        for seed in range(3):
            pixels = np.random.default_rng(seed).integers(0, 255, (10, 32, 32, 3), np.uint8)
            Video(frames=pixels, fps=16).save(videos / f"{seed}.mkv")
        small = replace(task, videos=videos, codec=CODEC, size="32x32", num_frames=5)
    elif isinstance(task, JudgeConfig):
        footage, rows = folder / task.footage, []
        footage.mkdir()
        for seed in range(6):
            pixels = np.random.default_rng(seed).integers(0, 255, (10, 32, 32, 3), np.uint8)
            row = {"file_name": f"{seed}.mkv", "frames": 10, "color": ["red", "blue"][seed % 2]}
            Video(frames=pixels, fps=16).save(footage / row["file_name"])
            rows.append(json.dumps(row))
        (footage / LABELS).write_text("\n".join(rows))
        reader = replace(task.reader, size=16, num_frames=4, channels=(8,), width=8)
        small = replace(task, footage=footage, reader=reader, held_out=0.5)
    elif isinstance(task, RoutingConfig):
        toy = _tiny(find("toy"), folder)
        small = {"checkpoint": str(toy.out / "checkpoint"), "latents": toy.task.latents}
        small |= {"units": ("frame", "chunk:2"), "frames": 2, "draws": 2, "num_videos": 0}
        small = replace(task, **small)
    elif isinstance(task, TextToVideoConfig) and task.init:  # its sizes
        toy = _tiny(find("toy"), folder)
        small = replace(task, latents=toy.task.latents, init=toy.out / "checkpoint")
    elif isinstance(task, TextToVideoConfig):  # from nothing, one step a stage
        toy = find("toy").task
        small = replace(
            task,
            codec=folder / toy.codec,
            latents=folder / toy.latents,
            stages=tuple(replace(stage, steps=1) for stage in task.stages),
            size=None,
            model=replace(MODEL, prediction="clean") if task == toy else MODEL,
            text=replace(TEXT, max_tokens=96),  # few captions make a poor tokenizer
            num_videos=4,
            num_latents=8,
        )
    elif isinstance(task, StudentConfig):
        made = {str(RECIPES[name]().out / "checkpoint"): name for name in RECIPES}
        made["toy-base"] = "toy"
        where = {
            name: str(folder / RECIPES[made.get(name, name)]().out / "checkpoint")
            for name in (task.teacher, task.student)
        }
        small = replace(
            task,
            teacher=where[task.teacher],
            student=where[task.student],
            latents=folder / (TOY_LATENTS if task.latents == Path("latents") else task.latents),
            distillation=replace(task.distillation, critic_warmup=0, critic_steps=1),
            num_validation=2,
        )
    else:
        pytest.fail(f"{config.name} trains a {type(task).__name__}: shrink it here")
    steps = max(2, 1 + len(getattr(task, "stages", ())))  # of each stage one, and one more
    return replace(
        config, task=small, out=folder / config.out, steps=steps, batch_size=2, sample_every=2
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Train recipes at tiny size, each once: later ones use what earlier ones left."""
    folder = tmp_path_factory.mktemp("recipes")
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        for each in SMALL:  # in the order in which they build on each other
            if each not in done:
                done[each] = train(_tiny(find(each), folder))
            if each == name:
                break
        return done[name]

    return run


@pytest.mark.parametrize("name", SMALL)
def test_every_recipe_trains(trained, name: str) -> None:
    """A recipe that nobody runs rots; all its parts must fit and its losses be finite."""
    checkpoint = trained(name)
    rows = [row for row in read_log(checkpoint.parent) if "loss" in row]
    assert rows
    assert all(np.isfinite(row["loss"]) for row in rows)
    # A share of the machine's rate is of what was counted, and of nothing else.
    counts = isinstance(find(name).task, TextToVideoConfig)
    assert all((row.get("share_of_peak", 0) > 0) == counts for row in rows)
    assert Checkpoint.find(checkpoint).meta
    pictures = not isinstance(find(name).task, JudgeConfig | RoutingConfig)
    assert any((checkpoint.parent / "samples").glob("step-*.png")) == pictures


@pytest.mark.parametrize("name", ["video", "few-step"])
def test_a_model_of_ones_own_hears_a_new_prompt(trained, name: str) -> None:
    """It reads it with the last frame alone, before and after distillation."""
    sampling = VideoPipeline.from_pretrained(trained(name)).sampling
    assert (sampling.units, sampling.recall_frames) == ("chunk:2", 1)


def test_the_toy_recipe_ends_in_a_pipeline_that_generates(trained) -> None:
    """Training and generation meet in the checkpoint: names, sizes, words, defaults."""
    pipe = VideoPipeline.from_pretrained(trained("toy"))
    assert pipe.sampling == find("toy").task.sampling
    for units in find("toy").task.units:
        prompt = " ".join(pipe.meta["words"][:4])  # a few captions have not all words
        video = pipe(prompt, num_frames=9, units=units, num_inference_steps=1)
        assert video.frames.shape == (9, 64, 64, 3)


def test_a_second_decoder_leaves_the_latents_alone(trained) -> None:
    """Latents encoded with the first codec stay valid: only the decoder is trained on."""
    names = ("codec-toy", "codec-toy-decoder")
    first, second = (Checkpoint.find(trained(name)).codec() for name in names)
    video = torch.rand(1, 5, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(first.encode(video), second.encode(video))
    latents = first.encode(video)
    assert not torch.equal(first.decode(latents), second.decode(latents))


def test_recipes_agree_on_the_window_that_is_trained_and_used() -> None:
    """What a unit reads while generating is what it read in training: as many frames and sinks."""
    for name in RECIPES:
        task = find(name).task
        if isinstance(task, TextToVideoConfig) and task.sampling is not None:
            assert task.sampling.window_frames == task.flow.clip_frames
            assert task.sampling.sink_frames == task.flow.sink_frames
            assert task.sampling.shift == task.flow.shift
            assert task.sampling.lag is None or task.flow.context == "noisy"
            assert task.sampling.units in task.units


@dataclass(frozen=True)
class Columns(Scheme):
    """A scheme of one's own: columns from left to right."""

    frames: int = 1

    def segment(self, frames: int, height: int, width: int) -> list[list[Cells]]:
        rows = range(height)
        return [[box(range(frames), rows, range(w, w + 1))] for w in range(width)]


@pytest.mark.parametrize(
    ("units", "context", "default"),
    [
        (("frame", Columns(2)), "clean", "frame"),
        ((Columns(2), KeyDetail(4)), "noisy", "test_recipes:Columns/frames=2"),
        (("chunk:2", "cube:1x2x2"), "clean", "cube:1x2x2"),  # that of `init`
        (("full", "full"), "full", "full"),
    ],
)
def test_a_checkpoint_samples_as_it_was_trained(
    trained, tmp_path: Path, units, context: str, default: str
) -> None:
    """Units, window, sinks and shift of the training are its defaults; the rest is of `init`."""
    config = _tiny(find("finetune"), trained("toy").parents[2])
    flow = replace(config.task.flow, context=context, clip_frames=4, sink_frames=1, shift=3.0)
    task = replace(config.task, units=units, flow=flow)
    assert replace(task, units=task.units) == task  # names, as a run stores them
    config = replace(config, task=task, out=tmp_path / "run", steps=1, sample_every=0)
    before = VideoPipeline.from_pretrained(task.init)
    before.sampling = replace(before.sampling, lag=2, sigmas=(1.0, 0.5, 0.0))
    before.save_pretrained(tmp_path / "init")
    config = replace(config, task=replace(task, init=tmp_path / "init"))
    pipe = VideoPipeline.from_pretrained(train(config, report=lambda line: None))
    assert pipe.sampling == before.sampling.replaced(
        units=default,
        window_frames=4,
        sink_frames=1,
        shift=3.0,
        lag=2 if context == "noisy" else None,
    )
    assert pipe.meta["units"] == list(dict.fromkeys(task.units))
    words = " ".join(pipe.meta["words"][:3])
    assert pipe(words, num_frames=21, num_inference_steps=2).frames.shape[0] == 21
    assert not pipe.untrained(units)
    assert pipe.untrained(["multiscale:2,1"]).startswith("not trained on multiscale:2,1, but on")


def test_a_student_may_be_given_schemes_themselves() -> None:
    """Names are what is stored, and compared when a run goes on."""
    task = replace(find("toy-start").task, units=(Columns(2), "frame"))
    assert task.units == ("test_recipes:Columns/frames=2", "frame")


def test_a_window_takes_one_unit_at_least() -> None:
    """Units longer than the clips of the training would else not be sampled at all."""
    assert GenerationConfig().trained(("key-detail:4",), window=2).window_frames == 4


def test_a_checkpoint_knows_the_words_of_its_captions(trained, tmp_path: Path) -> None:
    """Those of the checkpoint it began with, too, and of one that does not say them: no list."""
    toy, student = (VideoPipeline.from_pretrained(trained(name)) for name in ("toy", "toy-start"))
    assert {"a", "on"} & set(toy.meta["words"])
    assert student.meta["words"] == toy.meta["words"]
    assert toy.unknown_words("A golden Retriever") == ["golden", "retriever"]
    assert learned(("frame",), ["A cat"], ["dog"]) == {
        "units": ["frame"],
        "prompts": ["A cat"],
        "words": ["a", "cat", "dog"],
    }
    assert learned(("frame",), ["A cat"], None) == {"units": ["frame"], "prompts": ["A cat"]}
    many = [f"word{number}" for number in range(10_001)]
    assert "words" not in learned(("frame",), many, ())


def test_a_checkpoint_knows_some_prompts_of_all_its_captions() -> None:
    """Few of many, from the first to the last, none twice, and none that is empty."""
    captions = ["", *(f"clip {number // 2}" for number in range(200)), ""]
    prompts = learned(("frame",), captions, ())["prompts"]
    assert len(prompts) == 12 == len(set(prompts))
    assert prompts[0] == "clip 0"
    assert int(prompts[-1].split()[1]) > 90
    assert learned(("frame",), ["", ""], ())["prompts"] == []


@pytest.mark.parametrize("name", ["toy", "toy-base"])
def test_the_bundled_checkpoints_know_the_words_of_the_world(name: str) -> None:
    """A prompt of the world names none; one of something else is told so."""
    pipe = VideoPipeline.from_pretrained(name)
    for asked in held_out_prompts(300, seed=1):
        assert not pipe.unknown_words(asked["prompt"])
    assert pipe.unknown_words("a golden retriever runs left") == ["golden", "retriever", "runs"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toys", "Unknown recipe 'toys'.*Did you mean toy"),
        ("", "Unknown recipe"),
        ("nowhere:toy", "cannot be imported.*check both names"),
        ("videoar.recipes:nothing", "cannot be imported.*check both names"),
        ("videoar:__doc__.strip", "cannot be imported|returns str"),
        ("videoar.checkpoints.checkpoint:bundled", "returns list: return a TrainConfig"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_sentence(name: str, message: str) -> None:
    """Users type these names."""
    with pytest.raises(ValueError, match=message) as caught:
        find(name)
    assert "\n" not in str(caught.value)


def test_what_is_not_said_needs_a_checkpoint_that_says_it(tmp_path: Path) -> None:
    """Sizes and codec are those of `init`; a recipe from nothing can begin with a checkpoint."""
    replace(find("video").task, init=tmp_path)
    with pytest.raises(ValueError, match=r"but the run has init, too: leave one of the two out"):
        TextToVideoConfig(latents=tmp_path, units=("frame",), size="small", init=tmp_path)
    task = replace(find("finetune").task, latents=tmp_path / "none")
    run = replace(find("finetune"), task=task, out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"there is no folder .*make latents of your videos"):
        train(run)


def test_a_recipe_of_ones_own_is_found_by_its_path() -> None:
    """Nothing has to be registered."""
    assert find("videoar.training.recipes:toy") == recipes.toy()


@pytest.mark.golden
@pytest.mark.parametrize("name", SMALL)
def test_every_recipe_has_the_stored_losses(trained, golden, name: str) -> None:
    """A refactoring leaves every loss as it was; where one moves, the commit says why."""
    rows = read_log(trained(name).parent)
    golden(f"losses-{name}", [row["loss"] for row in rows if "loss" in row])
