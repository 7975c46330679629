"""Which files are videos goes by their content, and what is damaged in one costs itself alone."""

import io
import tarfile
import wave
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from videoar.data.containers import LOST, Unusable
from videoar.data.decode import Shown, read
from videoar.data.sources import Source, list_sources

WIDTH, HEIGHT, FRAMES = 96, 64, 40


def picture(number: int) -> np.ndarray:
    """Return a picture with its number as bars, one a bit."""
    pixels = np.full((HEIGHT, WIDTH, 3), 60, np.uint8)
    for bit in range(6):
        pixels[:, bit * 16 + 1 : bit * 16 + 15] = 235 if number >> bit & 1 else 20
    return pixels


def write(path: Path, codec: str, container: str, pixels: str = "yuv420p") -> Path:
    """Write numbered pictures, 25 a second: MPEG knows few rates."""
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(picture(number), "rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def frames_of(source: Source, notes: list[str] | None = None) -> list[Shown]:
    """Return all frames of a source."""
    return list(read(source, fps=25, sizes=[(WIDTH, HEIGHT)], notes=notes))


def numbers(frames: list[Shown]) -> list[int]:
    """Return what is written on the frames."""
    bits = np.stack([frame.picture for frame in frames])[:, 8:56, 8::16].mean((1, 3)) > 128
    return (bits @ (1 << np.arange(6))).tolist()


CONTAINERS = {
    ".3g2": ("libx264", "3g2"),
    ".asf": ("wmv2", "asf"),
    ".f4v": ("libx264", "f4v"),
    ".m1v": ("mpeg1video", "mpeg1video"),
    ".ogg": ("libvpx", "ogg"),
    ".rm": ("rv20", "rm"),
    ".swf": ("flv1", "swf"),
    ".vob": ("mpeg2video", "vob"),
    ".nut": ("mpeg4", "nut"),
    ".ivf": ("libvpx-vp9", "ivf"),
    ".h264": ("libx264", "h264"),
    ".y4m": ("wrapped_avframe", "yuv4mpegpipe"),
    ".mxf": ("mpeg2video", "mxf"),
}


@pytest.mark.parametrize("named", ["its name", "no name"])
@pytest.mark.parametrize("suffix", CONTAINERS)
def test_every_container_is_read_whatever_it_is_called(
    tmp_path: Path, suffix: str, named: str
) -> None:
    """Of 21 common containers 8 were refused by their names alone; also inside of tars."""
    videos = tmp_path / "videos"
    videos.mkdir()
    name = f"a{suffix}" if named == "its name" else "a.download"
    try:
        whole = write(videos / name, *CONTAINERS[suffix]).read_bytes()
    except (ValueError, av.FFmpegError) as error:
        pytest.skip(f"this FFmpeg does not write it: {error}")
    with tarfile.open(videos / "web.tar", "w") as tar:
        for member, content in ((name, whole), ("a.cls", b"5"), ("b.pdf", b"%PDF" + bytes(4000))):
            about = tarfile.TarInfo(member)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    found = list_sources(videos, captions="none")
    assert [source.name for source in found.sources] == [name, f"web.tar/{name}"]
    assert sorted(found.rejected) == ["web.tar/a.cls", "web.tar/b.pdf"]
    for source in found.sources:
        shown = numbers(frames_of(source))
        assert len(set(shown)) >= FRAMES - 2
        assert shown == sorted(shown)


def _sound(path: Path) -> None:
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))


def _music(path: Path) -> None:
    """Sound in a container of videos."""
    with av.open(str(path), "w", format="matroska") as out:
        stream = out.add_stream("flac", rate=8000)
        frame = av.AudioFrame(format="s16", layout="mono", samples=4000)
        frame.sample_rate, frame.pts = 8000, 0
        for packet in (*stream.encode(frame), *stream.encode(None)):
            out.mux(packet)


OTHERS: dict[str, Callable[[Path], object]] = {
    "a.json": lambda path: path.write_text('{"a": 1}' * 1000),
    "a.srt": lambda path: path.write_text("1\n00:00:01,000 --> 00:00:02,000\nwords\n\n" * 99),
    "a.md": lambda path: path.write_text("# Words\n" * 999),
    "a.wav": _sound,
    "a.mka": _music,
    "a.m3u8": lambda path: path.write_text("#EXTM3U\n#EXTINF:9,\nhttp://localhost/a.ts\n" * 99),
    "a.ffconcat": lambda path: path.write_text("ffconcat version 1.0\nfile a.mp4\n" * 99),
    "a.npy": lambda path: np.save(path, np.zeros((64, 64))),
    "a.bin": lambda path: path.write_bytes(np.random.default_rng(0).bytes(99999)),
    "a.zero": lambda path: path.write_bytes(bytes(99999)),
    "none": lambda path: path.write_bytes(b""),
}


def test_what_is_no_video_is_listed_by_its_name(tmp_path: Path) -> None:
    """Texts, sound, playlists, which would open other files, and noise; none is ever decoded."""
    for name, make in OTHERS.items():
        make(tmp_path / name)
    found = list_sources(tmp_path, captions="none")
    assert not found.sources
    assert found.rejected.keys() == OTHERS.keys()
    assert all(why.startswith("not a video: its name ends in") for why in found.rejected.values())


def test_an_animation_is_one_by_its_content(tmp_path: Path) -> None:
    """FFmpeg does not read animated WebP; a video that is called so is still a video."""
    pages = [Image.fromarray(picture(number)) for number in range(4)]
    pages[0].save(tmp_path / "a.bin", "WEBP", save_all=True, append_images=pages[1:], duration=40)
    write(tmp_path / "b.webp", "libx264", "mp4")
    animation, video = list_sources(tmp_path, captions="none").sources
    assert set(numbers(frames_of(animation))) == set(range(4))
    assert numbers(frames_of(video)) == list(range(FRAMES))


def test_posters_beside_a_video_of_any_name_are_posters(tmp_path: Path) -> None:
    """A folder of pictures is a video, but not where they lie beside one."""
    write(tmp_path / "zz.rm", "rv20", "rm")
    Image.fromarray(picture(1)).save(tmp_path / "a.jpg")
    found = list_sources(tmp_path, captions="none")
    assert [source.name for source in found.sources] == ["zz.rm"]
    assert found.rejected.keys() == {"a.jpg"}


def _damaged(path: Path, *, packets: range) -> Source:
    """Overwrite some packets of a video in which every frame stands alone."""
    write(path, "png", "mov", "rgb24")
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for number in packets:
        start = content.index(b"\x89PNG", places[number][0])
        content[start : start + places[number][1] - 8] = b"\x00" * (places[number][1] - 8)
    path.write_bytes(content)
    return Source(name=path.name, path=str(path), size=len(content), captions=())


def test_a_damaged_packet_costs_itself_and_is_counted(tmp_path: Path) -> None:
    """The file goes on behind it, in a new scene: no clip shows the jump as a motion."""
    notes: list[str] = []
    frames = frames_of(_damaged(tmp_path / "a.mov", packets=range(10, 13)), notes)
    shown = numbers(frames)
    assert [number for number in range(FRAMES) if number not in shown] == [10, 11, 12]
    assert shown == sorted(shown)
    assert [number for number, frame in zip(shown, frames, strict=True) if frame.cut] == [0, 13]
    assert notes == [f"{LOST}: 3"]


def test_a_file_of_damaged_packets_has_no_frame(tmp_path: Path) -> None:
    """That is the reason, beside how many they are."""
    notes: list[str] = []
    with pytest.raises(Unusable, match=r"ends after 0\.0 of 1\.6 s"):
        frames_of(_damaged(tmp_path / "a.mov", packets=range(FRAMES)), notes)
    assert notes == [f"{LOST}: {FRAMES}"]


def test_what_lies_in_place_of_a_video_is_called_what_it_is(tmp_path: Path) -> None:
    """Pointers of git-LFS and pages of web sites are common where videos were to be downloaded."""
    texts = {
        "a.mp4": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-LFS"),
        "b.mp4": ("<!DOCTYPE html>\n<html></html>", "page of a web site"),
    }
    for name, (text, _) in texts.items():
        (tmp_path / name).write_text(text)
    for source in list_sources(tmp_path, captions="none").sources:
        with pytest.raises(Unusable, match=texts[source.name][1]):
            frames_of(source)
