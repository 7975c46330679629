"""Video files: frames come back, interrupted files play, and nothing is overwritten by accident."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from jaxtyping import UInt8
from PIL import Image

from videoar.data.video import (
    GROUP,
    Video,
    VideoWriter,
    check_output,
    contact_sheet,
    decode_frames,
    read_video,
)


def _noise(num_frames: int, height: int, width: int) -> UInt8[np.ndarray, "frames height width 3"]:
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def _smooth(num_frames: int, height: int, width: int) -> UInt8[np.ndarray, "frames height width 3"]:
    """Return slow ramps in all colours, which lossy codecs hold well."""
    t, y, x = np.meshgrid(
        *(np.linspace(0, 1, n) for n in (num_frames, height, width)), indexing="ij"
    )
    return np.stack([200 * x, 200 * y, 55 + 200 * t], axis=-1).astype(np.uint8)


def _write_and_raise(
    writer: VideoWriter, frames: UInt8[np.ndarray, "frames height width 3"], error: BaseException
) -> None:
    with writer:
        writer.write(frames)
        assert not writer.path.exists()
        raise error


def test_mkv_gives_back_every_bit(tmp_path: Path) -> None:
    """Noise of an odd size survives the lossless format; otherwise tests could not rely on it."""
    frames = _noise(5, 7, 9)
    path = Video(frames=frames, fps=24).save(tmp_path / "a.mkv")
    video = read_video(path)
    assert np.array_equal(video.frames, frames)
    assert video.fps == 24


def test_mp4_keeps_colours_length_and_speed(tmp_path: Path) -> None:
    """Flat colours come back within 4 levels; a wrong matrix would shift them by 10 to 30."""
    colours = np.array(
        [[230, 20, 20], [20, 200, 20], [20, 40, 230], [240, 240, 240], [0, 0, 0], [128, 128, 128]],
        dtype=np.uint8,
    )
    frames = np.broadcast_to(colours[:, None, None], (6, 32, 48, 3)).repeat(3, axis=0)
    path = Video(frames=frames, fps=24000 / 1001).save(tmp_path / "a.mp4")
    video = read_video(path)
    assert video.frames.shape == frames.shape
    assert np.abs(video.frames.astype(int) - frames).max() <= 4
    assert Fraction(video.fps).limit_denominator(1001) == Fraction(24000, 1001)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.codec_context.colorspace == 1


def test_mp4_of_an_odd_size_repeats_the_edge(tmp_path: Path) -> None:
    """One row and column are added and the picture inside stays in place."""
    frames = _smooth(4, 33, 47)
    video = read_video(Video(frames=frames, fps=16).save(tmp_path / "a.mp4"))
    assert video.frames.shape == (4, 34, 48, 3)
    assert np.abs(video.frames[:, :33, :47].astype(int) - frames).mean() < 3
    assert np.abs(video.frames[:, 33].astype(int) - video.frames[:, 32]).mean() < 3


def test_a_stream_writes_what_one_call_writes(tmp_path: Path) -> None:
    """Frames that come in pieces make the same file as all at once."""
    frames = _smooth(12, 16, 16)
    with VideoWriter(tmp_path / "a.mp4", fps=8) as writer:
        for piece in np.split(frames, [1, 5]):
            writer.write(piece)
    Video(frames=frames, fps=8).save(tmp_path / "b.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError(), OSError("full")])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webp"])
def test_whatever_ends_it_what_was_finished_plays(
    tmp_path: Path, suffix: str, error: BaseException
) -> None:
    """Under the name that was asked for, with nothing beside it; the error is passed on."""
    path = tmp_path / f"ball{suffix}"
    with pytest.raises(type(error)):
        _write_and_raise(VideoWriter(path, fps=16), _smooth(GROUP + 9, 16, 16), error)
    if suffix != ".webp":
        assert len(read_video(path).frames) == GROUP + 9
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_file_plays_at_every_moment(tmp_path: Path, suffix: str) -> None:
    """A process may be killed at any of them: all but the last fragment can be seen."""
    frames = _smooth(3 * GROUP, 16, 16)
    with VideoWriter(tmp_path / f"a{suffix}", fps=16) as writer:
        for count in range(1, len(frames) + 1):
            writer.write(frames[count - 1 : count])
            whole = count // GROUP * GROUP
            if whole and count % 5 == 0:
                seen = read_video(writer.partial)
                assert (len(seen.frames), seen.fps) == (whole, 16)
                assert np.abs(seen.frames.astype(int) - frames[:whole]).mean() < 8


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("killed", [True, False])
def test_two_processes_write_the_file_of_one(tmp_path: Path, suffix: str, killed: bool) -> None:
    """To the bit: what came after the state is cut off and written again."""
    frames = _smooth(70, 16, 16)
    whole = Video(frames=frames, fps=16).save(tmp_path / f"whole{suffix}").read_bytes()
    path = tmp_path / f"a{suffix}"
    first = VideoWriter(path, fps=16)
    first.write(frames[:20])
    assert first.state_dict() is None
    first.write(frames[20:40])
    state = first.state_dict()
    first.write(frames[40:50])
    if killed:
        first._file.close()
    else:
        first.__exit__(KeyboardInterrupt)
        assert len(read_video(path).frames) == 50
    with VideoWriter(path, fps=16, state=state) as second:
        assert second.num_frames == 40
        second.write(frames[40:])
    assert path.read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 2


def test_another_file_is_not_gone_on_with(tmp_path: Path) -> None:
    """A video that has taken the name since is not cut and overwritten."""
    path = tmp_path / "a.mp4"
    with VideoWriter(path, fps=16) as writer:
        writer.write(_smooth(GROUP, 16, 16))
        state = writer.state_dict()
    Video(frames=_smooth(99, 16, 16)[20:], fps=16).save(path, overwrite=True)
    there = path.read_bytes()
    with pytest.raises(ValueError, match="is the video that the state goes on with: put it back"):
        VideoWriter(path, fps=16, state=state)
    assert path.read_bytes() == there


def test_what_a_killed_process_left_is_not_overwritten(tmp_path: Path) -> None:
    """It may be ten minutes of work; the sentence says what can be done."""
    path = tmp_path / "a.mp4"
    left = VideoWriter(path, fps=16)
    left.write(_smooth(GROUP, 16, 16))
    left._file.close()
    with pytest.raises(ValueError, match=r"it plays\): rename it, choose another name"):
        VideoWriter(path, fps=16)
    assert len(read_video(left.partial).frames) == GROUP
    Video(frames=_smooth(4, 16, 16), fps=16).save(path, overwrite=True)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_full_disk_leaves_what_was_finished(tmp_path: Path, suffix: str) -> None:
    """A real limit on the size of files: one error of the system, and a shorter video that plays.

    FFmpeg's own writing ended in a segmentation fault here.
    """
    program = (
        "import resource, sys, numpy as np\n"
        "from videoar.data.video import VideoWriter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "frames = np.random.default_rng(0).integers(0, 256, (80, 32, 32, 3), dtype=np.uint8)\n"
        "with VideoWriter(sys.argv[1], fps=16) as writer:\n"
        "    for start in range(0, 80, 4):\n"
        "        writer.write(frames[start:start + 4])\n"
    )
    path = tmp_path / f"a{suffix}"
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "OSError: [Errno 27] File too large"
    left = list(tmp_path.iterdir())
    assert left in ([path], [])  # FFV1 of noise has no room for a single fragment
    assert left == [] or len(read_video(path).frames) % GROUP == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError()])
def test_no_frame_means_no_file(tmp_path: Path, error: BaseException) -> None:
    """A run that fails before its first frame leaves nothing behind."""
    writer = VideoWriter(tmp_path / "ball.mp4", fps=16)
    with pytest.raises(type(error)):
        _write_and_raise(writer, _noise(0, 8, 8), error)
    assert list(tmp_path.iterdir()) == []


def test_frames_of_another_size_are_refused(tmp_path: Path) -> None:
    """The sentence gives both sizes."""
    with VideoWriter(tmp_path / "a.mkv", fps=16) as writer:
        writer.write(_noise(1, 8, 8))
        with pytest.raises(ValueError, match="8x6 does not fit into a video of 8x8"):
            writer.write(_noise(1, 6, 8))


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_animations_last_as_long_as_the_video(tmp_path: Path, suffix: str) -> None:
    """At 16 frames per second a frame is no whole number of units; the sum must be right still."""
    path = Video(frames=_noise(16, 16, 16), fps=16).save(tmp_path / f"a{suffix}")
    with Image.open(path) as picture:
        assert picture.n_frames == 16
        total = 0
        for k in range(16):
            picture.seek(k)
            picture.load()
            total += picture.info["duration"]
    assert total == 1000


def test_png_is_a_contact_sheet_from_first_to_last(tmp_path: Path) -> None:
    """Of a long clip 32 evenly spaced frames are shown, both ends included."""
    frames = np.broadcast_to(np.arange(100, dtype=np.uint8)[:, None, None, None], (100, 4, 4, 3))
    path = Video(frames=frames, fps=16).save(tmp_path / "a.png")
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (4 * 6 + 2, 8 * 6 + 2, 3)
    assert sheet[3, 3, 0] == 0
    assert sheet[-4, -4, 0] == 99


def test_an_existing_file_stays_until_force(tmp_path: Path) -> None:
    """A video is not overwritten without being asked, and the sentence says how to ask."""
    path = tmp_path / "a.mkv"
    old, new = _noise(1, 4, 4), _noise(2, 4, 4)
    Video(frames=old, fps=1).save(path)
    with pytest.raises(ValueError, match=r"exists already.*overwrite=True"):
        Video(frames=new, fps=1).save(path)
    assert np.array_equal(read_video(path).frames, old)
    Video(frames=new, fps=1).save(path, overwrite=True)
    assert np.array_equal(read_video(path).frames, new)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.avi", r"'\.avi'.*\.mp4, \.mkv"),
        ("a", "no suffix"),
        ("missing/a.mp4", "does not exist; create it"),
        ("folder.mp4", "is a folder"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_early(
    tmp_path: Path, name: str, words: str
) -> None:
    """Minutes of work are not lost to a path that was wrong from the start."""
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match=words):
        check_output(tmp_path / name, overwrite=True)


def test_a_file_that_is_no_video_says_so(tmp_path: Path) -> None:
    """Missing files, text and cut videos give a sentence with the path."""
    text = tmp_path / "a.mp4"
    with pytest.raises(ValueError, match="there is no file"):
        read_video(text)
    text.write_text("hello")
    with pytest.raises(ValueError, match="no video that FFmpeg knows"):
        read_video(text)
    whole = Video(frames=_noise(8, 16, 16), fps=8).save(tmp_path / "b.mp4").read_bytes()
    text.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.mp4"):
        read_video(text)


def test_a_long_video_is_refused_and_can_be_read_in_parts(tmp_path: Path) -> None:
    """A film does not fill the memory by accident; frame by frame it can be read."""
    frames = _noise(6, 4, 4)
    path = Video(frames=frames, fps=8).save(tmp_path / "a.mkv")
    assert len(read_video(path, max_frames=6).frames) == 6
    with pytest.raises(ValueError, match="more than 5 frames"):
        read_video(path, max_frames=5)
    assert np.array_equal(next(decode_frames(path)), frames[0])


def test_a_video_needs_frames_and_speed() -> None:
    """Empty videos and standing time are refused where they are made."""
    with pytest.raises(ValueError, match="0 frames"):
        Video(frames=np.zeros((0, 4, 4, 3), np.uint8), fps=8)
    with pytest.raises(ValueError, match="fps is 0"):
        Video(frames=np.zeros((1, 4, 4, 3), np.uint8), fps=0)


def test_a_contact_sheet_reads_from_left_to_right() -> None:
    """Frame k stands in row k // columns; unused places are blank."""
    frames = _noise(5, 4, 6) // 2
    sheet = contact_sheet(frames, columns=3, gap=1)
    assert sheet.shape == (11, 22, 3)
    for k in range(5):
        top, left = 1 + 5 * (k // 3), 1 + 7 * (k % 3)
        assert np.array_equal(sheet[top : top + 4, left : left + 6], frames[k])
    assert len(np.unique(sheet[6:, 15:])) == 1
