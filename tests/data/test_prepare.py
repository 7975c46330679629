"""Own videos, through the public command, on files of many kinds that the tests write."""

import hashlib
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from benchmarks.prepare import main as benchmark
from PIL import Image
from tiny import MODEL, tiny_pipeline, tiny_transformer

from videoar.cli.main import main
from videoar.data.clips import make_parts
from videoar.data.latents import LatentShards
from videoar.data.options import Prepare
from videoar.data.prepare import held_out
from videoar.data.prepare import run as run_preparation
from videoar.data.sources import Source, list_sources
from videoar.data.video import read_video
from videoar.data.workers import perform
from videoar.encoders.codec import PatchCodec, PatchCodecConfig
from videoar.generation.pipeline import VideoPipeline

Run = Callable[..., tuple[int, str, str]]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
FPS = 16
NTSC = Fraction(24000, 1001)
# One worker: starting a process takes longer than the work here.
QUICK = ("--num-frames", "9", "--workers", "1", "--held-out", "0")


def grey_of(seconds: float) -> int:
    """The grey level that shows a moment: videos here tell their own time."""
    return min(255, round(20 + 100 * seconds))


def moments(frames: np.ndarray) -> np.ndarray:
    """Return the moments that frames show, read from their middles."""
    height, width = frames.shape[1:3]
    middle = frames[:, height // 4 : -height // 4, width // 4 : -width // 4]
    return (middle.mean((1, 2, 3)) - 20) / 100


def write(
    path: Path,
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    size: tuple[int, int] = (80, 64),
    rate: Fraction = Fraction(25),
    seconds: float = 1.5,
    times: Sequence[int] | None = None,
    aspect: Fraction | None = None,
    picture: np.ndarray | None = None,
    audio: bool = False,
) -> Path:
    """Write a video whose frames show their moments as grey; `times` are in milliseconds."""
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    shown = [k / rate for k in range(round(seconds * rate))]
    if times is not None:
        shown = [Fraction(at, 1000) for at in times]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, at in enumerate(shown):
            grey = np.full((size[1], size[0], 3), grey_of(float(at)), np.uint8)
            frame = av.VideoFrame.from_ndarray(grey if picture is None else picture, "rgb24")
            frame = frame.reformat(format=pixels)
            frame.time_base = 1 / rate if times is None else Fraction(1, 1000)
            frame.pts = number if times is None else times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> None:
    """Write a file with sound alone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        samples = np.zeros((1, 16000), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """Write a tar with these files."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def turn(path: Path) -> None:
    """Let a phone's MP4 say that it is to be shown turned by a quarter, clockwise."""
    data = bytearray(path.read_bytes())
    one = 1 << 16
    matrix = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    start = data.index(b"tkhd") + 4 + 40
    data[start : start + 36] = matrix
    path.write_bytes(bytes(data))


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose codec loses nothing, so that latents show what was read."""
    pipe = tiny_pipeline()
    pipe.codec = PatchCodec(PatchCodecConfig(stride=(4, 8, 8))).eval()
    channels = MODEL.__class__(**{**vars(MODEL), "latent_channels": pipe.codec.latent_channels})
    pipe.transformer = tiny_transformer(channels)
    return str(pipe.save_pretrained(tmp_path_factory.mktemp("exact") / "exact"))


@pytest.fixture
def prepare(capsys: pytest.CaptureFixture[str], exact: str) -> Run:
    """Run `prepare`: its exit code, and what it printed."""

    def run(*words: object, codec: str = exact, quick: Sequence[str] = QUICK):
        code = main(["prepare", *map(str, words), "--codec", codec, *quick])
        return code, *capsys.readouterr()

    return run


def clips_of(latents: Path) -> dict[str, list[np.ndarray]]:
    """Return the pixels of all clips, by file."""
    codec, shards, found = PatchCodec(PatchCodecConfig(stride=(4, 8, 8))), LatentShards(latents), {}
    for index, clip in enumerate(shards.clips):
        latent = shards.get([index], np.random.default_rng(0))["latents"]
        video = codec.decode(latent)[0].permute(0, 2, 3, 1)
        pixels = ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
        found.setdefault(clip["extra"]["file"], []).append(pixels)
    return found


def rejected(latents: Path) -> dict[str, str]:
    """Return the reasons, by file."""
    lines = (latents / "rejected.jsonl").read_text("utf-8").splitlines()
    return {line["file"]: line["reason"] for line in map(json.loads, lines)}


def digests(folder: Path) -> dict[str, str]:
    """Return a hash of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


# ---------------------------------------------------------------- what is read


def _write_gif(path: Path) -> None:
    frames = [Image.new("L", (80, 64), grey_of(k / 20)) for k in range(30)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)


def _write_pictures(path: Path) -> None:
    path.mkdir()
    for k in range(24):  # 2 comes before 10, whatever the alphabet says
        Image.new("RGB", (80, 64), (grey_of(k / 16),) * 3).save(path / f"frame {k}.png")


def _write_av1(path: Path) -> None:
    write(path, codec="libsvtav1", pixels="yuv420p10le")
    if hasattr(os, "sched_setscheduler"):  # root's encoder makes its caller a real-time process
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


KINDS: dict[str, Callable[[Path], Any]] = {
    "h264.mp4": lambda path: write(path),
    "hevc-10bit.mkv": lambda path: write(path, codec="libx265", pixels="yuv420p10le"),
    "vp9.webm": lambda path: write(path, codec="libvpx-vp9", rate=NTSC),
    "av1-10bit.mp4": lambda path: _write_av1(path),
    "mpeg4.avi": lambda path: write(path, codec="mpeg4", rate=Fraction(30000, 1001)),
    "prores-10bit.mov": lambda path: write(path, codec="prores_ks", pixels="yuv422p10le"),
    "ffv1-odd.mkv": lambda path: write(path, codec="ffv1", pixels="bgr0", size=(81, 63)),
    "mjpeg.mov": lambda path: write(path, codec="mjpeg", pixels="yuvj420p"),
    "h264-60.mp4": lambda path: write(path, rate=Fraction(60)),
    "h264-23.976.mkv": lambda path: write(path, rate=NTSC),
    "slow.gif": _write_gif,
    "slow.webp": _write_gif,
    "pictures": _write_pictures,
    "nested/deeper/UPPER.MP4": lambda path: write(path),
}


@pytest.fixture(scope="module")
def many(exact: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of a video of every kind, prepared in one run."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, make in KINDS.items():
        path = folder / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
    words = [str(folder / "videos"), str(folder / "latents"), "--captions", "none"]
    assert main(["prepare", *words, "--codec", exact, *QUICK]) == 0
    return folder / "latents"


@pytest.mark.parametrize("name", KINDS)
def test_every_container_and_codec_is_read_by_its_timestamps(many: Path, name: str) -> None:
    """At 16 frames per second, whatever the rate of the source, a frame shows its own moment."""
    clips = clips_of(many)[name]
    assert len(clips) == 2  # of 24 frames
    times = moments(np.concatenate(clips))
    assert np.abs(times - np.arange(18) / FPS).max() <= 1 / 20 + 0.025
    assert np.abs(np.mean(times - np.arange(18) / FPS)) <= 0.035


def test_the_folder_tells_what_is_in_it(many: Path) -> None:
    """Statistics, an index in the order of the names, and a sheet to look at."""
    statistics = json.loads((many / "statistics.json").read_text())
    assert statistics["videos"] == statistics["used"] == len(KINDS)
    assert statistics["clips"] == 2 * len(KINDS)
    assert statistics["seconds"] == pytest.approx(18 * len(KINDS) / FPS)
    assert statistics["frames_of_sizes"] == {"9 of 64x64": 2 * len(KINDS)}
    assert rejected(many) == {}
    names = [clip["extra"]["file"] for clip in LatentShards(many).clips]
    assert names == sorted(names)
    sheet = np.asarray(Image.open(many / "contact-sheet.png"))
    assert sheet.std() > 10
    assert not (many / ".work").exists()


def test_a_variable_frame_rate_keeps_its_moments(tmp_path: Path, prepare: Run) -> None:
    """Frames that stay long are repeated, those that come too fast are left out."""
    times = [0, 20, 40, 60, 80, 100, 500, 510, 520, 530, 1000, 1400, 1410, 1500]
    (tmp_path / "videos").mkdir()
    write(tmp_path / "videos" / "screen.mkv", times=times, rate=Fraction(100))
    assert prepare(tmp_path / "videos", tmp_path / "latents", "--captions", "none")[0] == 0
    frames = np.concatenate(clips_of(tmp_path / "latents")["screen.mkv"])
    assert len(frames) == 18
    moment = np.arange(18) / FPS
    expected = [max(t for t in times if t / 1000 <= at + 0.5 / FPS) / 1000 for at in moment]
    assert np.abs(moments(frames) - expected).max() < 0.025


def test_a_phone_s_video_stands_upright(tmp_path: Path, prepare: Run) -> None:
    """Recorded lying and marked as turned: what was left in the file is above on the screen."""
    lying = np.zeros((64, 96, 3), np.uint8)
    lying[:, :48] = 255
    (tmp_path / "videos").mkdir()
    turn(write(tmp_path / "videos" / "phone.mp4", size=(96, 64), picture=lying))
    words = (tmp_path / "videos", tmp_path / "latents", "--captions", "none")
    assert prepare(*words, "--sizes", "96x64", "64x96")[0] == 0
    frame = clips_of(tmp_path / "latents")["phone.mp4"][0][0]
    assert frame.shape == (96, 64, 3)
    assert frame[:44].mean() > 240
    assert frame[-44:].mean() < 15


def test_pixels_that_are_not_square_are_stretched(tmp_path: Path, prepare: Run) -> None:
    """Of 64 x 64 samples twice as wide as high the screen shows 128 x 64: its middle is kept."""
    bars = np.zeros((64, 64, 3), np.uint8)
    bars[:, 16:48] = 255  # all of the middle
    (tmp_path / "videos").mkdir()
    write(tmp_path / "videos" / "wide.mkv", size=(64, 64), aspect=Fraction(2), picture=bars)
    assert prepare(tmp_path / "videos", tmp_path / "latents", "--captions", "none")[0] == 0
    frame = clips_of(tmp_path / "latents")["wide.mkv"][0][0]
    assert frame[:, 3:-3].min() > 235


def test_videos_go_into_the_bucket_of_their_shape(tmp_path: Path, prepare: Run) -> None:
    """Wide, high and square ones, and what is left of a scene into a shorter clip."""
    (tmp_path / "videos").mkdir()
    for name, size in {"wide": (120, 80), "high": (80, 120), "square": (70, 72)}.items():
        write(tmp_path / "videos" / f"{name}.mkv", codec="ffv1", size=size)
    words = (tmp_path / "videos", tmp_path / "latents", "--captions", "none")
    quick = ("--num-frames", "17", "5", "--workers", "1", "--held-out", "0")
    assert prepare(*words, "--sizes", "64x64", "96x64", "64x96", quick=quick)[0] == 0
    shapes = {
        name: [clip.shape[:3] for clip in clips]
        for name, clips in clips_of(tmp_path / "latents").items()
    }
    sizes = {"high.mkv": (96, 64), "square.mkv": (64, 64), "wide.mkv": (64, 96)}
    assert shapes == {name: [(17, *size), (5, *size)] for name, size in sizes.items()}
    kinds = LatentShards(tmp_path / "latents").kinds
    assert len(set(kinds.tolist())) == 6


def test_scenes_are_cut_where_the_picture_changes(tmp_path: Path, prepare: Run) -> None:
    """No clip spans a cut, so no model learns that the world jumps."""
    (tmp_path / "videos").mkdir()
    with av.open(str(tmp_path / "videos" / "film.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "bgr0"
        for k in range(30):
            frame = np.full((64, 64, 3), 40 if k < 13 else 200, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    words = (tmp_path / "videos", tmp_path / "latents", "--captions", "none", "--scene-cut", "0.2")
    assert prepare(*words)[0] == 0
    clips = clips_of(tmp_path / "latents")["film.mkv"]
    assert [sorted(set(clip.mean((1, 2, 3)).round())) for clip in clips] == [[40], [200]]


# ---------------------------------------------------------------- captions


def test_captions_come_from_wherever_people_put_them(tmp_path: Path, prepare: Run) -> None:
    """Tables in any folder, a text beside the video, members of a tar; several for one video."""
    videos = tmp_path / "videos"
    (videos / "a").mkdir(parents=True)
    (videos / "b").mkdir()
    clip = write(tmp_path / "clip.mp4").read_bytes()
    for name in ("a/1.mp4", "a/2.mp4", "b/3.mp4", "4.mp4", "5.mp4"):
        (videos / name).write_bytes(clip)
    rows = [{"file_name": "1.mp4", "text": "one"}, {"file_name": "2.mp4", "text": ["two", "zwei"]}]
    (videos / "a" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (videos / "b" / "metadata.csv").write_text('file_name,text\n3.mp4,"three, with a comma"\n')
    (videos / "4.txt").write_text("\ufeff four \n")
    (videos / "4.mkv").write_bytes(clip)  # one text is of both
    (videos / "UPPER.MP4").write_bytes(clip)
    (videos / "UPPER.TXT").write_text("upper")
    seven = json.dumps({"caption": "seven"}).encode()
    members = {"./x/6.mp4": clip, "x/6.txt": b"six", "x/7.MP4": clip, "x/7.json": seven}
    write_tar(videos / "web.tar", members)
    assert prepare(videos, tmp_path / "latents")[0] == 0
    clips = LatentShards(tmp_path / "latents").clips
    found = {clip["extra"]["file"]: clip["captions"] for clip in clips}
    assert found == {
        "a/1.mp4": ["one"],
        "a/2.mp4": ["two", "zwei"],
        "b/3.mp4": ["three, with a comma"],
        "4.mp4": ["four"],
        "4.mkv": ["four"],
        "UPPER.MP4": ["upper"],
        "web.tar/x/6.mp4": ["six"],
        "web.tar/x/7.MP4": ["seven"],
    }
    assert rejected(tmp_path / "latents") == {
        "5.mp4": "no caption: add it to metadata.jsonl or a .txt of the same name"
    }


def test_a_key_that_comes_twice_in_a_tar_is_used_once(tmp_path: Path, prepare: Run) -> None:
    """With the caption that stands beside it; the second is listed, not mixed with the first."""
    videos = tmp_path / "videos"
    videos.mkdir()
    with tarfile.open(videos / "web.tar", "w") as tar:
        for name, grey in (("dark", 40), ("bright", 200)):
            picture = np.full((64, 80, 3), grey, np.uint8)
            clip = write(tmp_path / f"{name}.mp4", picture=picture).read_bytes()
            for entry, content in {"0.mp4": clip, "0.txt": name.encode(), "0.json": b"{}"}.items():
                member = tarfile.TarInfo(entry)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert prepare(videos, tmp_path / "latents")[0] == 0
    index = LatentShards(tmp_path / "latents").clips
    assert {tuple(clip["captions"]) for clip in index} == {("dark",)}
    assert clips_of(tmp_path / "latents")["web.tar/0.mp4"][0].mean() < 60
    again = rejected(tmp_path / "latents")
    assert list(again) == [f"web.tar/0.{kind}, time 2" for kind in ("json", "mp4", "txt")]
    assert all(reason.startswith("its key came before in the tar") for reason in again.values())


def test_captions_that_cannot_be_read_cost_themselves_only(tmp_path: Path, prepare: Run) -> None:
    """Other encodings, half characters, no table, no end: each is named and the rest is used."""
    videos = tmp_path / "videos"
    clip, deep = write(tmp_path / "clip.mp4").read_bytes(), b"[" * 100_000
    rows = [
        b'{"file_name": "a.mp4", "text": "good"}',
        rb'{"file_name": "b.mp4", "text": "half \ud800"}',
        rb'{"file_name": "c\ud800.mp4", "text": "good"}',
        deep,
        b'{"text": "of nothing"}',
        b"[1]",
        b'{"file_name": "none.mp4", "text": "of nothing"}\r\n',
    ]
    for name, content in {
        "a.mp4": clip,
        "metadata.jsonl": b"\n".join(rows),
        "latin/metadata.csv": "file_name,text\na.mp4,p\xe9p\xe9".encode("latin-1"),
        "points/metadata.csv": b"file_name;text\na.mp4;good",
        "wide/metadata.jsonl": rows[0].decode().encode("utf-16"),
        "latin.txt": b"p\xe9p\xe9",
    }.items():
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        (videos / name).write_bytes(content)
    names = ("good", "\udce9tude", "d\udce9r/a", "d\nr/a", ".hidden/a")
    members = {f"{name}.mp4": clip for name in names}
    write_tar(videos / "web.tar", members | {"good.txt": b"good", "deep.json": deep})
    code, _, error = prepare(videos, tmp_path / "latents")
    assert code == 0, error
    assert clips_of(tmp_path / "latents").keys() == {"a.mp4", "web.tar/good.mp4"}
    reasons = rejected(tmp_path / "latents")
    for name, reason in {
        "metadata.jsonl, row 2": "not JSON that can be read ('utf-8' codec can't encode",
        "metadata.jsonl, row 3": "not JSON that can be read ('utf-8' codec can't encode",
        "metadata.jsonl, row 4": "not JSON that can be read (maximum recursion depth",
        "metadata.jsonl, row 5": "no file_name",
        "metadata.jsonl, row 6": "no file_name",
        "none.mp4": "a caption of no video",
        "latin/metadata.csv": "not UTF-8: save it",
        "points/metadata.csv": "no column file_name, but file_name;text: put commas",
        "wide/metadata.jsonl": "not UTF-8: save it",
        "latin.txt": "not UTF-8: save it",
        "web.tar/\\xe9tude.mp4": "its name is not UTF-8",
        "web.tar/d\\xe9r/a.mp4": "its name is not UTF-8",
        "web.tar/d\\nr/a.mp4": "its name holds a line break",
        "web.tar/.hidden/a.mp4": "hidden",
        "web.tar/deep.json": "not JSON that can be read (maximum recursion depth",
    }.items():
        assert reasons.pop(name).startswith(reason), name
    assert not reasons


# ---------------------------------------------------------------- what is not used


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two good videos among everything that goes wrong."""
    folder = tmp_path_factory.mktemp("mixed")
    videos = folder / "videos"
    videos.mkdir()
    good = write(folder / "good.mp4", seconds=3).read_bytes()
    (videos / "good.mp4").write_bytes(good)
    (videos / "zgood.mp4").write_bytes(good)
    (videos / "empty.mp4").touch()
    (videos / "text.mp4").write_text("no video at all\n" * 100)
    (videos / "notes.pdf").write_text("%PDF")
    whole = write(folder / "whole.mkv", codec="ffv1", pixels="bgr0", seconds=3).read_bytes()
    (videos / "truncated.mkv").write_bytes(whole[: len(whole) // 2])
    (videos / "headless.mp4").write_bytes(good[: len(good) // 2])
    write_sound(videos / "sound.mp4")
    write(videos / "one.mp4", seconds=0.04)
    write(videos / "short.mp4", seconds=0.4)
    write(videos / "thin.mkv", codec="ffv1", pixels="bgr0", size=(8, 64))
    write(videos / "strip.mkv", codec="ffv1", pixels="bgr0", size=(640, 32))
    unknown = write(folder / "unknown.avi", codec="mpeg4").read_bytes()
    (videos / "unknown.avi").write_bytes(unknown.replace(b"FMP4", b"QQQQ"))
    (videos / "outside.mp4").symlink_to(folder / "good.mp4")
    (videos / "gone.mp4").symlink_to(videos / "nowhere.mp4")
    (videos / "two\nlines.mp4").write_bytes(good)
    (Path(os.fsdecode(os.fsencode(videos) + b"/latin-\xe9.mp4"))).write_bytes(good)
    (videos / ".hidden.mp4").write_bytes(good)
    (videos / "loop.mp4").symlink_to("loop.mp4")
    (videos / "broken.mp4").symlink_to("/nowhere.mp4")
    (videos / "bomb").mkdir()
    Image.new("RGB", (64, 64)).save(videos / "bomb" / "1.bmp")
    picture = (videos / "bomb" / "1.bmp").read_bytes()
    large = struct.pack("<2i", 30_000, 30_000)
    (videos / "bomb" / "1.bmp").write_bytes(picture[:18] + large + picture[26:])
    os.mkfifo(videos / "pipe.mp4")
    (videos / "pictures").mkdir()
    for number in range(9):
        (videos / "pictures" / f"{number}.bmp").write_bytes(picture)
    os.mkfifo(videos / "pictures" / "pipe.bmp")
    raw = write(folder / "raw.avi", codec="rawvideo", pixels="bgr24").read_bytes()
    shape, large = struct.pack("<2i", 80, -64), struct.pack("<2i", 12_000, -12_000)
    (videos / "huge.avi").write_bytes(raw.replace(shape, large))
    (videos / "orphan.txt").write_text("of nothing")
    (videos / "uncaptioned.mp4").write_bytes(good)
    for path in (*videos.glob("*.m*"), *videos.glob("*.avi"), videos / "bomb", videos / "pictures"):
        if "lines" not in path.name and path.name not in ("uncaptioned.mp4", "notes.pdf"):
            path.with_suffix(".txt").write_text("a grey that brightens")
    return videos


def test_what_is_not_used_is_listed_with_its_reason(
    mixed: Path, tmp_path: Path, prepare: Run
) -> None:
    """And never stops the rest: both good videos are there, and what was good of a broken one."""
    code, out, error = prepare(mixed, tmp_path / "latents")
    assert code == 0, error
    reasons = rejected(tmp_path / "latents")
    expected = {
        "empty.mp4": "0 bytes",
        "text.mp4": "not a video, or damaged",
        "notes.pdf": "not a video: its name ends in .pdf",
        "truncated.mkv": "cut short|damaged after",
        "headless.mp4": "not a video, or damaged",
        "sound.mp4": "audio only",
        "one.mp4": "a single frame",
        "short.mp4": "shorter than a clip",
        "thin.mkv": "absurd size: 8x64",
        "strip.mkv": "absurd size: 640x32",
        "unknown.avi": "its codec is not known|not a video, or damaged",
        "outside.mp4": "a symbolic link out of the folder",
        "gone.mp4": "a symbolic link whose target is missing",
        "broken.mp4": "a symbolic link whose target is missing",
        "loop.mp4": "a symbolic link whose target is missing",
        "bomb": "absurd size: above 67 million pixels",
        "huge.avi": "absurd size: 12000x12000",
        "pictures/pipe.bmp": "not a regular file",
        "two\\nlines.mp4": "line break",
        "latin-\\xe9.mp4": "not UTF-8",
        ".hidden.mp4": "hidden",
        "pipe.mp4": "not a regular file",
        "uncaptioned.mp4": "no caption",
    }
    for name, reason in expected.items():
        assert any(part in reasons[name] for part in reason.split("|")), (name, reasons[name])
    texts = {name for name in reasons if name.endswith(".txt")}
    assert {name: reasons[name] for name in texts} == {
        ".hidden.txt": "hidden",
        "latin-\\xe9.txt": "its name is not UTF-8: rename it",
        "orphan.txt": "a caption of no video",
    }
    assert reasons.keys() - texts == expected.keys()
    clips = clips_of(tmp_path / "latents")
    assert clips.keys() == {"good.mp4", "pictures", "zgood.mp4", "truncated.mkv"}
    assert len(clips["good.mp4"]) == len(clips["zgood.mp4"]) == 5
    assert 1 <= len(clips["truncated.mkv"]) < 5
    assert "x 0 bytes" in out
    assert "Traceback" not in error


def test_a_folder_without_a_usable_video_is_refused(tmp_path: Path, prepare: Run) -> None:
    """In one sentence that names the list of reasons; and the other slips of the keyboard."""
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "text.mp4").write_text("no")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    for words, message in (
        ((videos, tmp_path / "latents"), "gives a clip: "),
        ((tmp_path / "none", tmp_path / "latents"), "there is no folder"),
        ((tmp_path / "empty", tmp_path / "latents"), "empty holds no files: name a folder"),
        ((videos, videos / "latents"), "lies in"),
        ((videos, tmp_path / "full"), "is not empty"),
        ((videos, tmp_path / "new", "--sizes", "60x64"), "a size is 60x64: use multiples of 16"),
        ((videos, tmp_path / "new", "--fps", "nan"), "fps is nan"),
    ):
        code, _, error = prepare(*words)
        assert code == 2
        assert message in error
        assert error.count("\n") == 1
    quick = ("--num-frames", "10", "--workers", "1")
    code, _, error = prepare(videos, tmp_path / "new", quick=quick)
    assert code == 2
    assert "use 9 or 13" in error
    assert (tmp_path / "full" / "thesis.tex").read_text() == "precious"


def _sleepy() -> Callable[[Any, Callable[[Any], None]], Any]:
    def work(job: str, beat: Callable[[Any], None]) -> str:
        beat("begun")
        if job == "hang":
            time.sleep(600)
        if job == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return job.upper()

    return work


def test_what_hangs_or_kills_its_process_costs_itself_only() -> None:
    """A video that never ends to decode meets a limit; one that crashes the decoder, too."""
    jobs = ["hang", "a", "die", "b"]
    events = list(perform(jobs, _sleepy, workers=2, timeout=2.0, preload="json"))
    last = {event.job: event for event in events if event.kind != "beat"}
    assert (last["a"].value, last["b"].value) == ("A", "B")
    assert last["hang"].kind == last["die"].kind == "lost"
    assert "no progress in 2 s" in last["hang"].value
    assert "died twice" in last["die"].value


def test_a_video_that_hangs_is_given_up(tmp_path: Path, prepare: Run) -> None:
    """FFmpeg looks for a next frame in 256 GB of zeros; the other video does not wait for it."""
    videos = tmp_path / "videos"
    videos.mkdir()
    write(videos / "good.mp4")
    hang = write(videos / "hang.avi", codec="mpeg4")
    os.truncate(hang, hang.read_bytes().rindex(b"idx1"))
    os.truncate(hang, 1 << 38)
    words = (videos, tmp_path / "latents", "--captions", "none", "--timeout", "3")
    code, _, error = prepare(*words)
    assert code == 0, error
    assert rejected(tmp_path / "latents") == {"hang.avi": "no progress in 3 s"}
    assert clips_of(tmp_path / "latents").keys() == {"good.mp4"}


def test_the_encoder_s_time_is_progress(tmp_path: Path) -> None:
    """Every latent frame is a sign of life: else a large codec would look as if it hung."""
    (tmp_path / "videos").mkdir()
    write(tmp_path / "videos" / "a.mp4")
    codec, heard = PatchCodec(PatchCodecConfig(stride=(4, 8, 8))), list[Any]()
    latents = tmp_path / "latents"
    config = Prepare(videos=tmp_path / "videos", latents=latents, num_frames=(9,))
    (source,) = list_sources(config.videos, captions="none").sources
    make_parts(source, heard.append, config=config, codec=codec, work=tmp_path)
    assert [value is None for value in heard] == [True, True, True, False] * 2


def test_the_time_left_is_said_when_it_is_known(clips: Path, exact: str, tmp_path: Path) -> None:
    """At first nothing tells it; a number would be wrong by far."""
    lines = list[str]()
    config = Prepare(
        videos=clips, latents=tmp_path / "latents", codec=exact, num_frames=(9,), workers=1
    )
    run_preparation(config, lines.append)
    said = r"(\d+)%  (\d+) clips  \d+\.\d clips/s"
    lines = [line for line in lines if "%" in line]
    first, *_, last = lines
    assert re.fullmatch(said, first)
    assert re.fullmatch(rf"{said}  0:00:00 left", last)
    shares, counts = zip(*(map(int, re.match(said, line).groups()) for line in lines), strict=True)
    assert (shares[0], counts[0], shares[-1]) == (0, 1, 100)
    assert shares == tuple(sorted(shares))


# ---------------------------------------------------------------- what is held out


def _held_out(latents: Path) -> list[str]:
    return [clip["extra"]["file"] for clip in LatentShards(latents / "heldout").clips]


def test_only_videos_that_can_be_used_are_held_out(tmp_path: Path, prepare: Run) -> None:
    """Two that cannot come first by their hashes; what is held out has its pixels all the same."""
    videos, latents = tmp_path / "videos", tmp_path / "latents"
    videos.mkdir()
    names = [f"{number}.mp4" for number in range(6)]
    first = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    for name in first[2:]:
        write(videos / name)
    for name in first[:2]:
        (videos / name).write_text("no video")
    words = (videos, latents, "--captions", "none")
    code, out, _ = prepare(*words, quick=("--num-frames", "9", "--workers", "1"))
    assert code == 0
    assert "4 clips to train on and 4 held out" in out
    assert _held_out(latents) == sorted(first[2:4] * 2)
    assert read_video(latents / "heldout" / "000001.mkv").frames.shape == (9, 64, 64, 3)
    quick = ("--num-frames", "9", "--workers", "2")
    assert prepare(videos, tmp_path / "two", "--captions", "none", quick=quick)[0] == 0
    assert digests(tmp_path / "two") == digests(latents)
    (videos / "new.mp4").write_bytes((videos / first[2]).read_bytes())
    code, _, error = prepare(*words, quick=quick)
    assert code == 2
    assert "some were added, removed or changed since" in error


def test_two_clips_are_held_out_for_an_interval(tmp_path: Path, prepare: Run) -> None:
    """Of videos of one clip each it takes two, though the share is none; but one stays to train."""
    (tmp_path / "videos").mkdir()
    for number, apart in enumerate((0, 1, 2, 2)):
        write(tmp_path / "videos" / f"{number}.mp4", seconds=0.7)
        latents = tmp_path / f"latents-{number}"
        words = (tmp_path / "videos", latents, "--captions", "none", "--num-frames", "9")
        code, out, _ = prepare(*words, quick=("--workers", "1"))
        assert code == 0
        assert f"{number + 1 - apart} clips to train on and {apart} held out" in out
        mode = (latents / "index.jsonl").stat().st_mode
        assert {path.stat().st_mode for path in latents.rglob("*") if path.is_file()} == {mode}


def test_what_the_codec_was_trained_on_is_not_held_out() -> None:
    """Both are asked for the same videos, but of clips of other lengths they can use others."""
    how = {"path": "videos", "captions": (), "size": 1}
    sources = [Source(name=f"{number}.mp4", **how) for number in range(12)]
    short = held_out(dict.fromkeys(sources, 4), share=0.05, apart=())
    assert len(short) == 2
    one, other = short
    clips = {source: int(source is not other) for source in sources}  # too short for longer clips
    assert len(held_out(clips, share=0.05, apart=())) == 2
    assert held_out(clips, share=0.05, apart={one.name, other.name}) == {one}
    assert held_out(clips, share=0.0, apart={one.name}) == set()


# ---------------------------------------------------------------- the same, whatever happens


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos of different lengths."""
    videos = tmp_path_factory.mktemp("clips") / "videos"
    videos.mkdir()
    for number in range(8):
        write(videos / f"{number}.mp4", seconds=1.2 + 0.1 * number)
        (videos / f"{number}.txt").write_text(f"number {number}")
    return videos


@pytest.fixture(scope="module")
def uninterrupted(clips: Path, exact: str) -> dict[str, str]:
    """What one run with one process gives."""
    target = clips.parent / "whole"
    words = [str(clips), str(target), "--codec", exact, "--num-frames", "9", "--workers", "1"]
    assert main(["prepare", *words]) == 0
    return digests(target)


def test_two_processes_give_the_same_bytes(
    clips: Path, uninterrupted: dict[str, str], exact: str, tmp_path: Path
) -> None:
    """And so does a second run on the finished folder, which changes nothing."""
    words = [str(clips), str(tmp_path / "two"), "--codec", exact, "--num-frames", "9"]
    for _ in range(2):
        assert main(["prepare", *words, "--workers", "2"]) == 0
        assert digests(tmp_path / "two") == uninterrupted


def test_killed_and_begun_again_it_gives_the_same_bytes(
    clips: Path, uninterrupted: dict[str, str], exact: str, tmp_path: Path
) -> None:
    """Killed without warning: all processes early, the first one alone, all as shards appear."""
    target = tmp_path / "killed"
    words = [str(clips), str(target), "--codec", exact, "--num-frames", "9", "--workers", "1"]
    code = (
        "import os, signal, sys\n"
        "from videoar.cli import arguments\n"
        "from videoar.data import options, prepare\n"
        "def show(line):\n"
        "    if '%' in line and int(line.split()[1]) >= int(sys.argv[1]):\n"
        "        os.kill(int(sys.argv[2]) * os.getpid(), signal.SIGKILL)\n"
        "def joining(event, values):\n"
        "    if event == 'open' and 'shard-' in str(values[0]):\n"
        "        os.killpg(0, signal.SIGKILL)\n"
        "sys.addaudithook(joining)\n"
        "prepare.run(arguments.read(options.Prepare, sys.argv[3:], prog=''), show)\n"
    )
    for count, which in (("4", "-1"), ("8", "1"), ("99", "-1")):
        command = [sys.executable, "-c", code, count, which, *words]
        done = subprocess.run(command, env=ENVIRONMENT, start_new_session=True)
        assert done.returncode == -signal.SIGKILL
        assert list((target / ".work").iterdir())
        assert not (target / "latents.json").exists()
    assert (target / "rejected.jsonl").exists()
    assert main(["prepare", *words]) == 0
    assert digests(target) == uninterrupted


def test_going_on_with_other_settings_is_refused(
    clips: Path, uninterrupted: dict[str, str], prepare: Run
) -> None:
    """Clips of two kinds in one folder would be found out in training, if ever."""
    code, _, error = prepare(clips, clips.parent / "whole", "--fps", "8")
    assert code == 2
    assert "fps" in error
    assert digests(clips.parent / "whole") == uninterrupted


def test_a_folder_of_an_older_version_goes_on(
    clips: Path, uninterrupted: dict[str, str], prepare: Run
) -> None:
    """An option has come since, which is at its default; that is said."""
    folder = clips.parent / "whole"
    about, before = folder / "prepare.json", (folder / "prepare.json").read_text()
    about.write_text(json.dumps({k: v for k, v in json.loads(before).items() if k != "held_out"}))
    code, _, error = prepare(clips, folder, quick=("--num-frames", "9", "--workers", "1"))
    about.write_text(before)
    assert (code, "goes on with held_out = 0.05" in error) == (0, True), error
    assert digests(folder) == uninterrupted


def test_shares_of_two_machines_give_the_same_bytes(
    clips: Path, uninterrupted: dict[str, str], exact: str, tmp_path: Path, prepare: Run
) -> None:
    """Made one after the other or side by side, put together at the end; K beyond N is a slip."""
    target = tmp_path / "shared"
    words = [str(clips), str(target), "--codec", exact, "--num-frames", "9", "--workers", "1"]
    for share, made in (("2/2", 4), ("1/2", 8)):
        assert main(["prepare", *words, "--share", share]) == 0
        assert len({path.name[:24] for path in (target / ".work").glob("*.safetensors")}) == made
        assert not (target / "latents.json").exists()
    parts = {path: path.stat().st_mtime_ns for path in (target / ".work").glob("*.safetensors")}
    assert main(["prepare", *words, "--share", "1/2"]) == 0
    assert parts == {path: path.stat().st_mtime_ns for path in parts}
    assert main(["prepare", *words]) == 0
    assert digests(target) == uninterrupted
    for share in ("3/2", "0/2", "a/2", "2"):
        code, _, error = prepare(clips, target, "--share", share)
        assert code == 2
        assert f"share is {share}: use K/N with K up to N" in error


# ---------------------------------------------------------------- and then


def test_the_benchmark_reads_what_preparation_reads(
    clips: Path, exact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All videos, and as many clips; the shares are of the decoder alone."""
    words = ["--codec", exact, "--num-frames", "9", "--repeats", "1"]
    assert benchmark([str(clips), *words]) == 0
    out = capsys.readouterr().out
    size = sum(path.stat().st_size for path in clips.glob("*.mp4")) / 1e6
    assert f"8 videos, {size:.1f} MB" in out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    seconds, rates = [float(row[1]) for row in rows[2:]], [row[3] for row in rows[2:]]
    assert min(seconds) > 0
    assert rates[0] == ""
    clips_read = round(float(rates[1]) * seconds[1])
    expected = sum(round(16 * (1.2 + 0.1 * number)) // 9 for number in range(8))
    # Seconds are printed to a hundredth.
    assert clips_read == pytest.approx(expected, abs=2 + 0.005 * float(rates[1])), rows
    assert benchmark(["nowhere"]) == 2


def test_toy_goes_on_with_own_videos_and_generates(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare: Run
) -> None:
    """The commands of the documentation, one after the other."""
    monkeypatch.chdir(tmp_path)
    quick = ("--num-frames", "29", "13", "--workers", "1", "--stride", "4", "--held-out", "0.3")
    code, out, _ = prepare(clips, "latents", codec="toy", quick=quick)
    assert code == 0
    command = next(line for line in out.splitlines() if line.startswith("videoar train finetune"))
    words = ["--steps", "2", "--batch-size", "2", "--sample-every", "2", "--precision", "float32"]
    assert main([*command.split()[1:], *words]) == 0
    checkpoint = "runs/finetune/checkpoint"
    assert VideoPipeline.from_pretrained(checkpoint).sampling.fps == FPS
    assert main(["evaluate", "heldout", checkpoint, "--data", "latents", "--units", "frame"]) == 0
    words = ["--model", checkpoint, "--num-frames", "9", "--out", "a.mkv"]
    assert main(["generate", "number 3", *words]) == 0
    assert read_video("a.mkv").frames.shape == (9, 64, 64, 3)


@pytest.mark.parametrize("table", ["NFC", "NFD"])
def test_a_name_with_accents_is_found_however_it_is_written(tmp_path: Path, table: str) -> None:
    """MacOS takes letters apart, most others do not; both look alike to who writes a table."""
    disk = {"NFC": "NFD", "NFD": "NFC"}[table]
    for number, name in enumerate(("caf\u00e9.mp4", "\u00fcber.mp4")):
        (tmp_path / unicodedata.normalize(disk, name)).write_bytes(b"x")
        written = unicodedata.normalize(table, name)
        if number:
            (tmp_path / f"{written[:-4]}.txt").write_text("beside")
        else:
            row = {"file_name": written, "text": "in a table"}
            (tmp_path / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False))
    found = list_sources(tmp_path, captions="auto")
    assert not found.rejected
    assert sorted(source.captions for source in found.sources) == [("beside",), ("in a table",)]
