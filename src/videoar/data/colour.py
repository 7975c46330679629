"""Colours as a plain screen shows them: over black, and of no more range than it has."""

import functools

import av
import numpy as np
from jaxtyping import Float, UInt16

from videoar.data.video import Picture

PQ, HLG, BT709 = 16, 18, 1  # FFmpeg's numbers of transfers, and of primaries
WHITE = 203  # nits of white on paper, by ITU-R BT.2408
HLG_PEAK = 1000  # nits of the screen that HLG is shown on
TO_709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)  # of BT.2020
KNEE = 0.85  # of white; what is brighter is brought below white, the less the darker


def has_alpha(frame: av.VideoFrame) -> bool:
    """Return whether parts of a frame may be transparent."""
    kind = frame.format
    return kind.has_palette or any(component.is_alpha for component in kind.components)


def without_unused(frame: av.VideoFrame) -> av.VideoFrame:
    """Return a frame of an AVI without its fourth byte, if that is zero and so means nothing."""
    if has_alpha(frame) and not frame.to_ndarray(format="rgba")[..., 3].any():
        return frame.reformat(format="rgb24")
    return frame


def over_black(frame: av.VideoFrame) -> av.VideoFrame:
    """Return a frame in `rgba` as it looks on black."""
    pixels = frame.to_ndarray().astype(np.uint16)
    shown = (pixels[..., :3] * pixels[..., 3:] + 127) // 255
    return av.VideoFrame.from_ndarray(shown.astype(np.uint8), "rgb24")


def tone_map(picture: UInt16[np.ndarray, "rows columns 3"], frame: av.VideoFrame) -> Picture:
    """Bring the colours of a frame of high dynamic range to those of a plain screen."""
    light = _light(frame.color_trc)[picture]
    if frame.color_trc == HLG:
        light *= HLG_PEAK / WHITE * (light @ LUMINANCE)[..., None] ** 0.2
    if frame.color_primaries != BT709:
        light = light @ TO_709.T
    peak = light.max(-1, keepdims=True).clip(KNEE)
    rolled = 1 - (1 - KNEE) * np.exp((KNEE - peak) / (1 - KNEE))
    light = (light * (rolled / peak)).clip(0, 1)
    shown = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (255 * shown).round().astype(np.uint8)


@functools.cache
def _light(transfer: int) -> Float[np.ndarray, "65536"]:
    """Return the light of each signal: of PQ in units of white, of HLG as the camera saw it."""
    signal = np.linspace(0, 1, 65536)
    if transfer == HLG:
        bright = (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
        return np.where(signal <= 0.5, signal**2 / 3, bright).astype(np.float32)
    power = signal ** (32 / 2523)
    share = np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)
    return (10000 / WHITE * share ** (8192 / 1305)).astype(np.float32)
