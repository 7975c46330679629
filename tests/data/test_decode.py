"""What a video shows, of files that say it in ways of their own."""

import itertools
import struct
from pathlib import Path

import av
import numpy as np
import pytest

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
    frames = frames or [picture(number) for number in range(40)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        for frame in frames:
            kind = "rgba" if frame.shape[2] == 4 else "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, kind)))
        container.mux(stream.encode(None))
    return path


def shown(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    """Return all frames as they are read."""
    about = {"name": path.name, "path": str(path), "size": path.stat().st_size}
    source = Source(captions=(), **about)
    return np.stack([frame.picture for frame in read(source, fps=16, sizes=[size])])


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
