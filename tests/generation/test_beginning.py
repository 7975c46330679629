"""From a picture or a video, through the public command: the kept part is what was given."""

import itertools
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SCHEMES, tiny_pipeline

from videoar.cli.main import main
from videoar.data import world
from videoar.data.video import Video, read_video
from videoar.generation.conditioning import fitted, read_image
from videoar.generation.pipeline import VideoPipeline

Run = Callable[..., tuple[int, str, str]]
SIZE = {"height": 64, "width": 64}


@pytest.fixture(scope="module")
def pipe() -> VideoPipeline:
    """Prompt to frames in milliseconds."""
    return tiny_pipeline()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same as a folder."""
    return str(tiny_pipeline().save_pretrained(tmp_path_factory.mktemp("checkpoints") / "tiny"))


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: str,
) -> Run:
    """Run `generate` in an empty folder: its exit code, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def generate(*words: str) -> tuple[int, str, str]:
        code = main(["generate", "a ball", "--model", checkpoint, *words])
        return code, *capsys.readouterr()

    return generate


def _clip() -> Video:
    scene = world.sample_scene(np.random.default_rng(3))
    return Video(frames=world.render(scene, num_frames=32), fps=16.0)


def _noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("units", [*SCHEMES, "full"])
def test_the_kept_frames_are_those_given(pipe: VideoPipeline, units: str) -> None:
    """For every kind of unit; and what follows depends on them."""
    clip = _clip().frames
    for given in ({"image": clip[0]}, {"video": clip[:9]}):
        kept = 1 if "image" in given else 9
        frames = pipe("a ball", num_frames=17, units=units, **given).frames
        assert np.array_equal(frames[:kept], clip[:kept])
        other = {key: 255 - value for key, value in given.items()}
        assert not np.array_equal(
            frames[kept:], pipe("a ball", num_frames=17, units=units, **other).frames[kept:]
        )


def test_a_stream_with_a_beginning_can_be_saved(pipe: VideoPipeline) -> None:
    """Between two given frames, too: the second part of the stream holds the rest of them."""
    clip = _clip().frames[:13]
    options = {"num_frames": 29, "seeds": [0], "units": "frame", "video": clip}
    whole = np.concatenate(list(pipe.generate(["a ball"], **options)), axis=1)
    assert np.array_equal(whole[0, :13], clip)
    for stop in (1, 2, 5):
        first, second = (pipe.generate(["a ball"], **options) for _ in range(2))
        parts = list(itertools.islice(first, stop))
        second.load_state_dict(first.state_dict())
        assert np.array_equal(np.concatenate([*parts, *second], axis=1), whole)


def test_each_video_of_a_batch_begins_with_its_own(pipe: VideoPipeline) -> None:
    """A batch of pictures is as many videos, each as if made alone but for rounding."""
    pictures = np.stack([_clip().frames[0], np.asarray(_noise(64, 64))])
    options = {"num_frames": 9, "units": "chunk:2"}
    parts = pipe.generate(["a", "b"], seeds=[1, 2], image=pictures, **options)
    both = np.concatenate(list(parts), axis=1)
    assert np.array_equal(both[:, 0], pictures)
    alone = pipe("b", seed=2, image=pictures[1], **options).frames
    assert np.abs(both[1].astype(int) - alone).max() <= 1


@pytest.mark.parametrize("fit", ["crop", "letterbox"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 100), (301, 97)])
def test_an_image_of_any_size_begins_the_video(run: Run, fit: str, height: int, width: int) -> None:
    """Its middle, or all of it between bars; one of the model's size goes through unchanged."""
    picture = _noise(height, width)
    picture.save("cat.png")
    words = ("--image", "cat.png", "--fit", fit, "--num-frames", "9", "--out", "a.mkv")
    code, _, error = run(*words)
    assert code == 0, error
    frames = read_video("a.mkv").frames
    assert len(frames) == 9
    pixels = np.asarray(picture)
    assert np.array_equal(frames[0], fitted(pixels[None], **SIZE, fit=fit)[0])
    if (height, width) == (64, 64):
        assert np.array_equal(frames[0], pixels)
    bars = frames[0][:2] if width > height else frames[0][:, :2]
    assert (bars.max() == 0) == (fit == "letterbox" and height != width)


@pytest.mark.parametrize(("suffix", "mode"), [("jpg", "L"), ("webp", "RGB"), ("png", "RGBA")])
def test_pictures_of_many_kinds_are_read(tmp_path: Path, suffix: str, mode: str) -> None:
    """Grey, transparent (shown on black), turned by its camera: as a viewer would show it."""
    file = tmp_path / f"cat.{suffix}"
    picture = _noise(40, 30).convert(mode)
    if mode == "RGBA":
        picture.putalpha(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn to the right
    picture.save(file, exif=exif)
    found = read_image(file)
    assert found.shape == (30, 40, 3)
    assert (found.max() == 0) == (mode == "RGBA")


def test_a_video_goes_on_after_what_is_kept(run: Run) -> None:
    """`--keep 1.0` keeps the first second: 13 of its 16 frames, as latent frames cover four."""
    clip = _clip()
    clip.save("clip.mkv")
    words = ("--video", "clip.mkv", "--keep", "1.0", "--seconds", "2", "--out", "a.mkv")
    code, out, error = run(*words)
    assert code == 0, error
    assert "first 13 of 16 frames are kept" in out
    frames = read_video("a.mkv").frames
    assert len(frames) == 32
    assert np.array_equal(frames[:13], clip.frames[:13])
    assert not np.array_equal(frames[13:], clip.frames[13:])


def test_a_video_of_another_rate_and_shape_is_kept_in_time(run: Run) -> None:
    """At 24 frames per second and 96 x 64 pixels: the model's rate is 16, its frames square."""
    frames = np.stack([np.full((64, 96, 3), 5 * k, np.uint8) for k in range(48)])
    Video(frames=frames, fps=24.0).save("clip.mkv")
    assert run("--video", "clip.mkv", "--seconds", "3", "--out", "a.mkv")[0] == 0
    found = read_video("a.mkv").frames[:29].astype(int).mean((1, 2, 3)) / 5
    assert np.abs(found - 1.5 * np.arange(29)).max() <= 1.01


def test_a_folder_of_pictures_is_a_video(run: Run) -> None:
    """One picture per frame of the model, in the order of their numbers, as in preparation."""
    clip = _clip()
    Path("clip").mkdir()
    for number, frame in enumerate(clip.frames[:13]):
        Image.fromarray(frame).save(f"clip/{number}.png")
    assert run("--video", "clip", "--num-frames", "17", "--out", "a.mkv")[0] == 0
    assert np.array_equal(read_video("a.mkv").frames[:13], clip.frames[:13])


def test_without_a_length_four_seconds_are_added(run: Run) -> None:
    """A continuation of the default length, whatever is kept."""
    _clip().save("clip.mkv")
    assert run("--video", "clip.mkv", "--keep", "0.5", "--out", "a.mkv")[0] == 0
    assert len(read_video("a.mkv").frames) == 72


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--image", "none.png"), "no file none.png"),
        (("--image", "text.png"), "text.png cannot be used: no picture: convert it"),
        (
            ("--image", "thin.png"),
            "thin.png cannot be used: absurd size: 8x64, but sides of 16 or more",
        ),
        (("--image", "bomb.bmp"), "bomb.bmp cannot be used: absurd size: above 67 million"),
        (("--image", "cat.png", "--video", "clip.mkv"), "leave out video"),
        (("--image", "cat.png", "--fit", "stretch"), "fit"),
        (("--image", "cat.png", "--keep", "1"), "is of --video: name one too"),
        (("--image", "cat.png", "--num-frames", "1"), "make it longer"),
        (("--video", "none.mp4"), "no file none.mp4"),
        (("--video", "text.png"), "text.png cannot be used"),
        (("--video", "clip.mkv", "--keep", "0"), "keep is 0"),
        (("--video", "clip.mkv", "--keep", "nan"), "keep is nan"),
        (("--video", "clip.mkv", "--keep", "9"), "lasts 2.00 s: keep less"),
        (("--video", "clip.mkv", "--seconds", "1"), "make it longer or keep less"),
        (
            (
                "--video",
                "cut.mkv",
            ),
            "cut.mkv cannot be used",
        ),
    ],
    ids=str,
)
def test_what_cannot_begin_a_video_is_said(run: Run, words: tuple[str, ...], message: str) -> None:
    """In one sentence with the exit code 2, and no file is written."""
    _noise(64, 64).save("cat.png")
    _noise(64, 8).save("thin.png")
    _noise(64, 64).save("bomb.bmp")
    bomb, large = Path("bomb.bmp").read_bytes(), struct.pack("<2i", 30_000, 30_000)
    Path("bomb.bmp").write_bytes(bomb[:18] + large + bomb[26:])
    Path("text.png").write_text("no picture")
    _clip().save("clip.mkv")
    Path("cut.mkv").write_bytes(Path("clip.mkv").read_bytes()[:300])
    code, _, error = run(*words, "--out", "a.mkv")
    assert code == 2
    assert message in error
    assert error.startswith("videoar: error: ")
    assert error.count("\n") == 1
    assert not Path("a.mkv").exists()


@pytest.mark.parametrize(
    "given",
    [
        {"fit": "letterbox"},
        {"image": np.zeros((64, 64, 3), np.float32)},
        {"image": np.zeros((64, 64), np.uint8)},
        {"image": torch.zeros(64, 64, 3)},
        {"video": np.zeros((0, 64, 64, 3), np.uint8)},
        {"video": np.zeros((2, 5, 64, 64, 3), np.uint8)},
        {"image": np.zeros((64, 64, 3), np.uint8), "video": np.zeros((5, 64, 64, 3), np.uint8)},
    ],
)
def test_arrays_that_do_not_fit_are_refused(pipe: VideoPipeline, given: dict) -> None:
    """Floats would be taken for pixels, a batch for frames."""
    with pytest.raises(ValueError, match="give"):
        pipe("a ball", num_frames=17, **given)


def test_pictures_and_videos_are_arrays(pipe: VideoPipeline) -> None:
    """What the field hands round, PIL's pictures, one or a list, and what a call has given."""
    first = pipe("a ball", num_frames=5)
    pictures = list(map(Image.fromarray, first.frames))
    how = {"num_frames": 9, "seed": 3}
    expected = pipe("a ball", video=first.frames, **how).frames
    for video in (first, pictures):
        assert np.array_equal(pipe("a ball", video=video, **how).frames, expected)
    clear = pictures[0].convert("RGBA")
    assert np.array_equal(pipe("a ball", image=clear, **how).frames[0], first.frames[0])
