"""What a video shows, of files that say it in ways of their own."""

import itertools
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace
from PIL import Image

from videoar.data.decode import read
from videoar.data.sources import Source

WIDTH, HEIGHT = 96, 64


def picture(number: int = 0) -> np.ndarray:
    """Return a picture with its number as bars, one a bit, above a red block on the left."""
    pixels = np.full((HEIGHT, WIDTH, 3), (60, 120, 60), np.uint8)
    for bit in range(6):
        pixels[4:28, bit * 16 + 1 : bit * 16 + 15] = 235 if number >> bit & 1 else 20
    pixels[36:60, 4:36] = (235, 20, 20)
    return pixels


def write(
    path: Path,
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    frames: list[np.ndarray] | None = None,
    **options: str,
) -> Path:
    """Write numbered pictures, or those that are given."""
    options |= {"auto-alt-ref": "0"} if codec == "libvpx" else {}  # else it takes no alpha
    frames = frames or [picture(number) for number in range(40)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        for frame in frames:
            kind = "rgba" if frame.shape[2] == 4 else "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, kind)))
        container.mux(stream.encode(None))
    return path


def shown(
    path: Path,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    *,
    pictures: tuple[str, ...] = (),
    notes: list[str] | None = None,
) -> np.ndarray:
    """Return all frames as they are read."""
    about = {"name": path.name, "path": str(path), "size": path.stat().st_size}
    source = Source(captions=(), pictures=pictures, **about)
    frames = list(read(source, fps=16, sizes=[size], notes=notes))
    return np.stack([frame.picture for frame in frames])


def numbers(frames: np.ndarray) -> list[int]:
    """Return what is written on the frames."""
    bits = frames[:, 8:24, 8::16].mean((1, 3)) > 128
    return (bits @ (1 << np.arange(6))).tolist()


@pytest.mark.parametrize("name", ["a.avi", "a.mp4", "a.mkv", "a.ts"])
@pytest.mark.parametrize("late", ["0", "1"])
def test_frames_come_in_order_whatever_their_stamps(tmp_path: Path, name: str, late: str) -> None:
    """An AVI stamps packets as they lie in the file: B-frames shown by that would be lost."""
    path = write(tmp_path / name, bf="3", b_adapt=late)
    assert numbers(shown(path)) == list(range(40))


def test_stamps_of_a_copied_avi_are_put_in_order(tmp_path: Path) -> None:
    """Copied into another container, the wrong stamps go along."""
    path = write(tmp_path / "a.avi", bf="3", b_adapt="0")
    with av.open(str(path)) as old, av.open(str(tmp_path / "a.mkv"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    assert numbers(shown(tmp_path / "a.mkv")) == list(range(40))


def test_frames_with_wrong_stamps_are_counted_on_and_it_is_said(tmp_path: Path) -> None:
    """Each is there once, one step after the one before, and `prepare` lists why."""
    old, path, notes = write(tmp_path / "old.mkv", codec="mjpeg", pixels="yuvj420p"), "a.mkv", []
    with av.open(str(old)) as right, av.open(str(tmp_path / path), "w") as wrong:
        stream = wrong.add_stream_from_template(right.streams.video[0])
        for number, packet in enumerate(right.demux(video=0)):
            if packet.pts is not None:
                packet.stream, late = stream, 0 if number % 4 else 3
                packet.pts += late * round(1 / 16 / packet.time_base)
                wrong.mux(packet)
    assert numbers(shown(tmp_path / path, notes=notes)) == list(range(40))
    assert [note.split(":")[0] for note in notes] == [
        "time stamps that are missing or run backwards"
    ]


def test_interlaced_material_is_used_and_named(tmp_path: Path) -> None:
    """Whoever sees combs in the result finds the reason, once for a file, and the remedy."""
    path, notes = write(tmp_path / "a.mp4", **{"x264-params": "tff=1"}), []
    assert numbers(shown(path, notes=notes)) == list(range(40))
    assert len(notes) == 1
    assert notes[0].startswith("interlaced: ")


@pytest.mark.parametrize("matrix", [*itertools.product((1, -1), (1, -1), (False, True))])
def test_a_picture_is_turned_and_mirrored_as_its_file_says(tmp_path: Path, matrix: tuple) -> None:
    """All eight ways to lay a picture down, those of front cameras among them."""
    x, y, swap = matrix
    one, path = 1 << 16, write(tmp_path / "a.mp4", frames=[picture(5)] * 4, crf="4")
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    across, down = ((0, y), (x, 0)) if swap else ((x, 0), (0, y))
    rows = (*across, 0, *down, 0, 0)
    data[start : start + 36] = struct.pack(">9i", *(one * k for k in rows), 0, 1 << 30)
    path.write_bytes(data)
    # A point (p, q) is shown at p * across + q * down.
    expected = picture(5).transpose(1, 0, 2) if swap else picture(5)
    expected = expected[:: 1 if y > 0 else -1, :: 1 if x > 0 else -1]
    frame = shown(path, expected.shape[1::-1])[0]
    assert np.abs(frame.astype(int) - expected).mean() < 5


def _see_through() -> np.ndarray:
    pixels = np.concatenate([picture(5), np.full((HEIGHT, WIDTH, 1), 255, np.uint8)], -1)
    pixels[36:60, 60:92] = (255, 0, 255, 0)
    return pixels


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("png.mov", "png", "rgba"),
        ("raw.avi", "rawvideo", "bgra"),
        ("qtrle.mov", "qtrle", "argb"),
        ("prores.mov", "prores_ks", "yuva444p10le"),
        ("ffv1.mkv", "ffv1", "yuva444p"),
        ("vp9.webm", "libvpx-vp9", "yuva420p"),
        ("vp8.webm", "libvpx", "yuva420p"),
        ("a.gif", "gif", ""),
        ("a.webp", "webp", ""),
        ("pictures", "", ""),
    ],
)
def test_transparency_is_black_in_every_container(
    tmp_path: Path, name: str, codec: str, pixels: str
) -> None:
    """Neither white nor the purple that lies underneath, which is nothing that a viewer sees."""
    frames, path, pictures = [_see_through()] * 4, tmp_path / name, ()
    if pixels:
        write(path, codec=codec, pixels=pixels, frames=frames)
    else:
        images = [Image.fromarray(frame) for frame in frames]
        images[1].putpixel((1, 1), (9, 9, 9, 255))  # else the frames become one
        if not codec:
            path.mkdir()
            pictures = tuple(f"{number}.png" for number in range(4))
            for file, image in zip(pictures, images, strict=True):
                image.save(path / file)
        else:
            images[0].save(path, save_all=True, append_images=images[1:], duration=60)
    frame = shown(path, pictures=pictures)[-1].astype(int)
    assert frame[40:56, 64:88].max() <= 12
    assert np.abs(frame[40:56, 8:32] - (235, 20, 20)).max() <= 24


def test_an_unused_byte_of_an_avi_is_no_transparency(tmp_path: Path) -> None:
    """Screen recorders write 32 bits with zeros for the last eight: not a black video."""
    pixels = np.concatenate([picture(5), np.zeros((HEIGHT, WIDTH, 1), np.uint8)], -1)
    path = write(tmp_path / "a.avi", codec="rawvideo", pixels="bgra", frames=[pixels] * 4)
    assert np.abs(shown(path)[0].astype(int) - picture(5)).max() <= 2


def test_what_is_transparent_does_not_run_into_its_neighbours(tmp_path: Path) -> None:
    """Made smaller, the rim of a hole is half of what is beside it and half black."""
    pixels = np.full((HEIGHT, WIDTH, 4), (0, 200, 0, 255), np.uint8)
    pixels[:, ::2] = (255, 0, 255, 0)
    path = write(tmp_path / "a.mov", codec="png", pixels="rgba", frames=[pixels] * 2)
    frame = shown(path, (WIDTH // 2, HEIGHT // 2))[0].astype(int)
    assert np.abs(frame - (0, 100, 0)).max() <= 3


def _signal(colour: tuple[int, int, int], transfer: int) -> np.ndarray:
    """Return how a phone would record a colour of a plain screen, white being of 203 nits."""
    to_2020 = [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    shown = np.array(colour) / 255
    light = np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)
    nits = 203 * np.array(to_2020) @ light
    if transfer == 16:
        power = (nits / 10000) ** (1305 / 8192)
        return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** (2523 / 32)
    screen = nits / 1000
    scene = screen * (screen @ (0.2627, 0.6780, 0.0593)) ** (1 / 1.2 - 1)
    bright = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), bright)


@pytest.mark.parametrize("transfer", [16, 18])
@pytest.mark.parametrize(
    "colour", [(235, 20, 20), (20, 200, 40), (30, 40, 220), (128, 128, 128), (230, 230, 230)]
)
def test_high_dynamic_range_comes_back_as_the_colours_of_a_screen(
    tmp_path: Path, transfer: int, colour: tuple[int, int, int]
) -> None:
    """PQ and HLG as phones record them: a red that is read as it is stored would be brown."""
    codes = (_signal(colour, transfer) * 65535).round().astype(np.uint16)
    pixels = np.broadcast_to(codes, (HEIGHT, WIDTH, 3)).copy()
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        options = {"x265-params": "log-level=none", "crf": "4"}
        stream = container.add_stream("libx265", rate=16, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p10le"
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace = 9, transfer, 9
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb48le")
            frame = frame.reformat(
                format="yuv420p10le", dst_colorspace=Colorspace.BT2020, dst_color_range=1
            )
            frame.color_primaries, frame.color_trc = 9, transfer
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert np.abs(shown(tmp_path / "a.mp4").astype(int) - colour).max() <= 5
