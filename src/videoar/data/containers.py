"""Containers of videos: which files are some, and their frames in the order they are shown in.

Nothing here knows of rates and sizes that are wanted.
"""

import contextlib
import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import av

# Playlists name other files and addresses, and a text may pass for a film: neither is opened.
DEMUXERS = (
    "mov,matroska,avi,gif,mpegts,mpeg,mpegvideo,flv,asf,ogg,rm,swf,mxf,dv,nut,ivf,wtv,yuv4mpegpipe,"
    "h264,hevc,obu,apng"
)
MIN_SIDE, MAX_PIXELS = 16, 2**26
LOST = "damaged packets or frames left out"
UNREADABLE = av.FFmpegError, OSError
LEAST = 128  # bytes of a video; labels in tars have fewer


class Unusable(ValueError):
    """Why a source, or what is left of it, cannot be used; never a fault of the program."""


class AbsurdSize(Unusable):
    """It is readable, but too small or too large a picture."""


def check_size(width: int, height: int) -> None:
    """Raise if a picture is too small to show anything or too large to be read."""
    if not (min(width, height) >= MIN_SIDE and width * height <= MAX_PIXELS):
        raise AbsurdSize(
            f"absurd size: {width}x{height}, but sides of {MIN_SIDE} or more and at most"
            f" {MAX_PIXELS / 1e6:.0f} million pixels are read"
        )


def open_container(path: str, offset: int, size: int) -> Any:
    """Open a file, or the bytes of a tar that begin at `offset`."""
    name = f"subfile,,start,{offset},end,{offset + size},,:{path}" if offset else path
    return av.open(name, options={"format_whitelist": DEMUXERS})


def is_video(path: str, offset: int, size: int) -> bool:
    """Say by its content, whatever its name is, whether a file shows something that moves."""
    if size < LEAST or is_webp(path, offset):
        return size >= LEAST
    with contextlib.suppress(*UNREADABLE), open_container(path, offset, size) as container:
        return bool(_shown(container))
    return False


def is_webp(path: str, offset: int) -> bool:
    """Say whether a file is a picture or an animation that FFmpeg does not read."""
    head = first_bytes(path, offset)
    return head.startswith(b"RIFF") and head[8:12] == b"WEBP"


def first_bytes(path: str, offset: int) -> bytes:
    """Read what shows of which kind a file is; nothing where it cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(offset)
        return file.read(64)
    return b""


def _shown(container: Any) -> list[Any]:
    cover = av.stream.Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & cover]


def frames_of(stream: Any, notes: list[str]) -> Iterator[tuple[av.VideoFrame, bool]]:
    """Yield the frames of a stream in the order in which they are shown, with their moments.

    Beside each it says whether something was lost right before it: packets and frames that are
    damaged are left out, as FFmpeg does it, and counted in `notes`.

    Where packets are stamped as they lie in the file though frames change places, as in AVI, the
    stamps are of the frames in their order; elsewhere that comes to the same.
    """
    decoder = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1":  # which FFmpeg's own decoders leave out
        name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(decoder.name, decoder.name)
        decoder = av.CodecContext.create(name, "r")
        decoder.thread_count = 1
    waiting, latest, rising = deque[int](), -math.inf, True
    begun = broken = False
    lost = 0
    for packet in stream.container.demux(stream):
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is not None:
            if not packet.size:
                continue  # the frame before is shown on, as Theora says it
            rising = rising and stamp > latest
            latest = stamp
            waiting.append(stamp)
        try:
            frames = decoder.decode(packet)
        except av.FFmpegError:
            frames, broken, lost = [], True, lost + 1
            if stamp is not None:
                waiting.pop()
        for frame in frames:
            while waiting and frame.key_frame and waiting[0] < (frame.pts or 0):
                waiting.popleft()  # of packets that gave no frame
            due = waiting.popleft() if waiting else None
            if rising and due is not None and decoder.has_b_frames:
                frame.pts = due
            if frame.is_corrupt:  # a recording may begin between two key frames
                broken, lost = True, lost + begun
                continue
            yield frame, broken
            begun, broken = True, False
        if lost:
            notes[:] = [note for note in notes if not note.startswith(LOST)]
            notes.append(f"{LOST}: {lost}")


def pictured(container: Any) -> Any:
    """Return the stream of pictures, ready to be decoded."""
    streams = _shown(container)
    if not streams:
        raise Unusable("audio only" if container.streams.audio else "not a video")
    if streams[0].codec_context is None:
        raise Unusable("its codec is not known")
    check_size(streams[0].codec_context.width, streams[0].codec_context.height)
    streams[0].codec_context.thread_count = 1  # one process per core decodes
    return streams[0]


def duration(path: str, offset: int, size: int) -> float:
    """Return the seconds that a header promises; 0 if it does not say."""
    with contextlib.suppress(*UNREADABLE), open_container(path, offset, size) as container:
        return (container.duration or 0) / av.time_base
    return 0.0
