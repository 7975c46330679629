"""Fragments of an MP4: a video that plays wherever it is cut, and goes on where it was cut.

Every fragment comes from an encoder and a muxer of its own. So its bytes depend on its frames
alone: what was written by two processes is what one would have written. Behind the head, which all
have in common, any run of fragments is a file that plays.
"""

import io
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import Flags
from jaxtyping import UInt8

Frames = UInt8[np.ndarray, "frames height width 3"]

# Without B-frames the first moment of a fragment is its own; keys are where we begin.
CLOSED = {"g": "9999"}
# crf 16 shows no artefacts on flat colours. With one thread the bits are those of any machine.
H264 = {"crf": "16", "preset": "veryfast", "bf": "0", "sc_threshold": "0", "threads": "1"} | CLOSED


@dataclass(frozen=True)
class Fragment:
    """Some frames, encoded."""

    head: bytes
    """What a file or a stream begins with: the same for all fragments of a video."""
    body: bytes


def encode(frames: Frames, *, fps: float, first: int, index: int, lossless: bool) -> Fragment:
    """Encode the frames of a video from `first` on as its fragment `index`, in H.264 or FFV1.

    An odd row or column of a lossy video is repeated: halved chroma needs even sizes, and browsers
    and phones do not play 4:4:4.
    """
    rate = Fraction(fps).limit_denominator(1001)  # 23.976 is meant as 24000/1001
    buffer = io.BytesIO()
    flags = {"movflags": "empty_moov+default_base_moof+frag_keyframe+skip_trailer"}
    scale = {"use_editlist": "0", "video_track_timescale": str(rate.numerator)}
    with av.open(buffer, "w", format="mp4", options=flags | scale) as container:
        container.flags |= Flags.bitexact.value  # no date, no random name
        stream = container.add_stream(
            "ffv1" if lossless else "libx264", rate=rate, options=CLOSED if lossless else H264
        )
        stream.pix_fmt = "bgr0"
        if not lossless:
            odd = [(0, side % 2) for side in frames.shape[1:3]]
            frames = np.pad(frames, ((0, 0), *odd, (0, 0)), "edge")
            stream.pix_fmt = "yuv420p"
            # Untagged files are shown in one matrix by some players and in another by others.
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
            context.color_range = 1  # luma in 16..235
        stream.height, stream.width = frames.shape[1:3]
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if not lossless:
                picture = picture.reformat(
                    format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
                )
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    data = bytearray(buffer.getvalue())
    start = data.index(b"moof") - 4
    # A muxer counts from 0: the time of its first frame is moved to where it belongs.
    _write(data, data.index(b"mfhd", start) + 8, 4, index + 1)
    _write(data, data.index(b"tfdt", start) + 8, 8, first * rate.denominator)
    return Fragment(head=bytes(data[:start]), body=bytes(data[start:]))


def _write(data: bytearray, at: int, size: int, value: int) -> None:
    data[at : at + size] = value.to_bytes(size, "big")


def remux(source: Path, target: Path, container: str) -> None:
    """Copy what is in fragments into one piece: a `mp4` or `matroska`."""
    # Through a file of Python: FFmpeg's own ends in a segmentation fault on a full disk.
    with (
        av.open(str(source)) as read,
        target.open("wb") as file,
        av.open(file, "w", format=container) as written,
    ):
        written.flags |= Flags.bitexact.value
        track = read.streams.video[0]
        copy: Any = written.add_stream_from_template(track)
        copy.codec_context.framerate = track.average_rate
        for packet in read.demux(track):
            if packet.dts is not None:
                packet.stream = copy
                written.mux(packet)
