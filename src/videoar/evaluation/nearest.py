"""Memory or skill: which clips of the training videos are nearest to, and how near those are."""

from pathlib import Path

import numpy as np

from videoar.checks import Report
from videoar.data.latents import LatentShards
from videoar.data.video import VideoWriter
from videoar.encoders.codec import Codec, to_frames
from videoar.evaluation.entries import features
from videoar.evaluation.judge import Clips
from videoar.files import Json, load, save

PIECE = 32
"""Training clips that are described, some seconds each or less, before they are written."""


def find_nearest(
    entries: Json, training: LatentShards, codec: Codec, folder: Path, *, keep: int, say: Report
) -> None:
    """Note beside each video of a study the training clip whose features are nearest.

    The clips are taken as their codec gives them back: who learned from them saw no others.
    Their features are kept in the folder; distances are in deviations of these. Beside the first
    `keep` videos of every entry the clip is written, too.
    """

    def frames(clip: int) -> Clips:
        latents = training.get([clip], np.random.default_rng(0))["latents"]
        return to_frames(codec.decode(latents))

    path = folder / f"training-{training.fingerprint().split()[-1]}.json"
    described, count = load(path, "features", kind="features of clips"), len(training)
    for clip in range(len(described), count):
        described[str(clip)] = features(frames(clip))[0].round(5).tolist()
        if (clip + 1) % PIECE == 0 or clip + 1 == count:  # no more than these are lost by a kill
            save(path, {"features": described})
        say(f"{clip + 1} of {count} training clips are described")
    known = np.array(list(described.values()))
    scale = known.std(axis=0) + 1e-6
    for entry in entries.values():
        for index, video in enumerate(entry["videos"]):
            apart = np.linalg.norm((known - video["features"]) / scale, axis=1)
            video["nearest"] = {"distance": float(apart.min())}
            if index < keep:
                video["nearest"]["file"] = file = f"videos/training-{apart.argmin()}.mp4"
                fps = round(training.info.fps)
                with VideoWriter(folder / file, fps=fps, overwrite=True) as writer:
                    writer.write(frames(int(apart.argmin()))[0])
