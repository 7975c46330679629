"""Training a codec: reconstruction of clips of the procedural world, or of own videos."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tyro.conf import arg

from videoar.checkpoints.checkpoint import Checkpoint, fingerprints, save_checkpoint
from videoar.checks import Count, Finite, Options, Report
from videoar.data.batches import Batches
from videoar.data.containers import duration
from videoar.data.latents import LatentShards
from videoar.data.options import Prepare, TestShare
from videoar.data.prepare import HELD_OUT_FOLDER, run
from videoar.data.sources import Source, list_sources
from videoar.data.video import Frames
from videoar.data.world import FIRST_HELD_OUT, random_clip, scene_of
from videoar.encoders.codec import PatchCodec, PatchCodecConfig, Video, from_frames, to_frames
from videoar.encoders.tiny_codec import TinyCodec, TinyCodecConfig
from videoar.evaluation.metrics import edges, moving, psnr, ssim, xpsnr
from videoar.generation.progress import Paced
from videoar.training.loop import TrainConfig
from videoar.training.objectives import Named, Objective, own_weights
from videoar.training.run_folder import FOOTAGE, checkpoints, save_sample

Distance = Callable[[Video, Video], Tensor]
"""Makes a loss of the error and the video."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig(Options):
    """Train a codec on clips of the procedural world, rendered as they are needed."""

    codec: TinyCodecConfig
    """Shape of the codec."""
    init: Path | None = None
    """Checkpoint whose encoder is kept as it is, so that latents keep their meaning and a generator
    trained on them stays valid; its decoder is trained on, or anew if the widths differ."""
    num_frames: Count = 9
    """Pixel frames per clip, 1 + 4k."""
    num_clips: Count = 200_000
    """Clips in an epoch."""
    latent_noise: float = 0.1
    """Noise on the latents before decoding."""

    def check(self, config: TrainConfig) -> None:
        """Clips are rendered: none is missing."""

    def build(self, config: TrainConfig, report: Report) -> "ReconstructionTask":
        codec = initial_codec(self.init, self.codec)
        codec.encoder.requires_grad_(self.init is None)
        clips = WorldClips(self, seed=config.seed)
        objective = Reconstruction(codec, plain_distance, latent_noise=self.latent_noise)
        return ReconstructionTask(objective, clips, config)


@dataclass(frozen=True, kw_only=True)
class FootageConfig(Options):
    """Train a codec on a folder of videos, which are decoded once."""

    videos: Annotated[Path, arg(name="data.path", prefix_name=False)]
    """Folder of videos, as `videoar prepare` reads it; captions are not needed."""
    codec: TinyCodecConfig = field(default_factory=TinyCodecConfig.wide)
    """Shape of the codec."""
    init: str | None = None
    """Checkpoint whose codec is trained on, encoder and decoder: a bundled name or a folder."""
    size: Annotated[str, arg(name="size", prefix_name=False)] = "96x96"
    """Width and height of clips, to which videos are scaled and cropped."""
    fps: float = 16.0
    """Frames per second of the clips."""
    num_frames: Count = 17
    """Pixel frames per clip, 1 + 4k."""
    held_out: TestShare = 0.05
    """Share of the videos that are kept out of training: those that `prepare` keeps out."""
    max_gigabytes: Finite = 8.0
    """About what decoded clips may take in the folder of the run; of more video, less of each is
    kept. While videos are read it is twice that."""
    latent_noise: float = 0.1
    """Noise on the latents before decoding."""

    def check(self, config: TrainConfig) -> None:
        if not (config.out / FOOTAGE).exists():  # else the videos are needed no more
            self._list()

    def build(self, config: TrainConfig, report: Report) -> "ReconstructionTask":
        codec = initial_codec(self.init, self.codec)
        lossless, clips = PatchCodec(PatchCodecConfig(stride=codec.stride)), config.out / FOOTAGE
        if not checkpoints(config.out):
            self._prepare(lossless, config, report)
        elif _made_of(clips)[5:] != [source.key for source in self._list()]:
            report(f"{self.videos} has changed; the clips in {clips} stay as they were decoded")
        footage = Footage(clips, lossless, init=self.init)
        report(f"{len(footage)} clips to train on, {len(footage.apart)} held out, are in {clips}")
        objective = Reconstruction(codec, footage_distance, latent_noise=self.latent_noise)
        return ReconstructionTask(objective, footage, config)

    def _list(self) -> list[Source]:
        return list_sources(self.videos, captions="none").sources

    def _prepare(self, codec: PatchCodec, config: TrainConfig, report: Report) -> None:
        """Decode the videos as `videoar prepare` does, with a codec that loses nothing."""
        folder, where = config.out / FOOTAGE, config.out / f"{FOOTAGE}.codec"
        prepare = Prepare(
            videos=self.videos,
            latents=folder,
            codec=str(where),
            captions="none",
            fps=self.fps,
            num_frames=(self.num_frames,),
            sizes=(self.size,),
            held_out=self.held_out,
            workers=config.num_threads,
        )
        sources = self._list()
        length = self.num_frames
        lengths = (max(self.fps * duration(*s.place), len(s.pictures)) for s in sources)
        after_first = sum(max(0, int(found) - length) for found in lengths)
        # Stored in 16 bits.
        numbers = 3 * int(np.prod(prepare.pixels))
        room = int(self.max_gigabytes * 1e9 / (2 * numbers * length))
        if room < len(sources):
            raise ValueError(
                f"max_gigabytes is {self.max_gigabytes:g}, which is less than a clip of each of"
                f" {len(sources)} videos takes: raise it, or lower num_frames or the size"
            )
        stride = max(length, after_first // max(1, room - len(sources)) + 1)
        asked = [self.size, length, self.fps, self.held_out, stride]
        asked += [source.key for source in sources]
        if _made_of(folder) != asked:
            shutil.rmtree(folder, ignore_errors=True)
            save_checkpoint(where, {"codec": codec}, {"footage": asked}, overwrite=True)
        now_and_then = Paced(lambda line: report(f"decoding videos: {line}"), every=10.0)
        found = run(replace(prepare, stride=stride), now_and_then.hear)
        if not found["held_out_clips"]:
            raise ValueError(
                f"{self.videos} has {found['used']} video with a clip of {length} frames,"
                " but one is trained on and another held out: add videos, or lower num_frames"
            )


def _made_of(footage: Path) -> list[Any]:
    """Return how clips were decoded, and the keys of their videos; nothing if there are none."""
    codec = footage.with_suffix(".codec")
    return Checkpoint.find(codec).meta["footage"] if codec.exists() else []


def initial_codec(init: str | Path | None, wanted: TinyCodecConfig) -> TinyCodec:
    """Return a new codec, or that of a checkpoint, with a new decoder if its widths are others."""
    if init is None:
        return TinyCodec(wanted)
    codec = Checkpoint.find(init).codec()
    free = ("decoder_channels", "latents_mean", "latents_std")
    changes = {name: getattr(wanted, name) for name in free}
    if not isinstance(codec, TinyCodec) or replace(codec.config, **changes) != wanted:
        raise ValueError(
            f"{init} has a codec of the shape {codec.config}, but the run asks for {wanted}:"
            " only decoder_channels may differ; name another checkpoint, or change the shape"
        )
    if codec.config.decoder_channels != wanted.decoder_channels:
        codec = codec.with_decoder(wanted.decoder_channels)
    own_weights(codec)
    return codec


def plain_distance(error: Video, video: Video) -> Float[Tensor, ""]:
    """Return how far off flat shapes are."""
    # Things are small: the absolute error alone long rests content with blurred ones. With it
    # the toy codec ended 1.2 dB lower, and one shape in five less was recognised.
    return error.abs().mean() + 4 * error.square().mean()


def footage_distance(error: Video, video: Video) -> Float[Tensor, ""]:
    """Return how far off own videos are, where what moves counts more, and edges count twice.

    The terms were compared on robots (`docs/log.md`): gradients raise SSIM, and the weights what
    moves by 0.7 dB, for 0.1 dB of all.
    """
    moved = F.pad(video.diff(dim=1).abs().mean(2, keepdim=True), (0, 0) * 3 + (1, 0))
    # The constant, of a range of 2, keeps the noise of a video in which nothing moves small.
    weights = 1 + 0.25 * moved / (moved.mean() + 0.02)
    pixels = (weights / weights.mean() * (error.abs() + 4 * error.square())).mean()
    return pixels + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


class Reconstruction(Objective):
    """Train a codec to give back its input.

    The latents are slightly noisy on the way, so that the decoder forgives what a generator gets
    wrong.
    """

    def __init__(self, codec: TinyCodec, distance: Distance, *, latent_noise: float):
        self.module, self.distance, self.latent_noise = codec, distance, latent_noise

    def loss(self, batch: Named, rng: torch.Generator, *, step: int = 0) -> Named:
        video = batch["video"]
        decoded, _ = self.module.reconstruct(video, noise_std=self.latent_noise, generator=rng)
        return {"loss": self.distance(decoded.float() - video, video)}


class WorldClips:
    """Clips of the procedural world: clip i is always the same."""

    def __init__(self, task: ReconstructionConfig, *, seed: int):
        self.task, self.seed, self.about = task, seed, {}

    def sources(self) -> dict[str, str]:
        return fingerprints(self.task.init)

    def __len__(self) -> int:
        return self.task.num_clips

    def get(self, indices: list[int], rng: np.random.Generator) -> dict[str, Any]:
        scenes = (scene_of(index, seed=self.seed) for index in indices)
        clips = [random_clip(*scene, num_frames=self.task.num_frames) for scene in scenes]
        return {"video": from_frames(np.stack(clips))}

    def held_out(self, count: int) -> Iterator[Video]:
        for index in range(FIRST_HELD_OUT, FIRST_HELD_OUT + count):
            yield self.get([index], np.random.default_rng(0))["video"]

    some = held_out  # all are as good


class Footage:
    """Clips of own videos, decoded before."""

    def __init__(self, folder: Path, lossless: PatchCodec, *, init: str | None = None) -> None:
        self.lossless, self.known, self.init = lossless, LatentShards(folder), init
        self.apart = LatentShards(folder / HELD_OUT_FOLDER)
        self.about = {"held_out": sorted({clip["extra"]["file"] for clip in self.apart.clips})}

    def sources(self) -> dict[str, str]:
        return {str(self.known.folder): self.known.fingerprint()} | fingerprints(self.init)

    def __len__(self) -> int:
        return len(self.known)

    def get(self, indices: list[int], rng: np.random.Generator) -> dict[str, Any]:
        return {"video": self.lossless.decode(self.known.get(indices, rng)["latents"])}

    def held_out(self, count: int) -> Iterator[Video]:
        """Yield so many clips, or all, from everywhere in the videos that are held out."""
        return self._spread(self.apart, count)

    def some(self, count: int) -> Iterator[Video]:
        """Yield so many clips, or all, from everywhere in those that are trained on."""
        return self._spread(self.known, count)

    def _spread(self, clips: LatentShards, count: int) -> Iterator[Video]:
        for index in np.linspace(0, len(clips) - 1, min(count, len(clips))).round().astype(int):
            found = clips.get([int(index)], np.random.default_rng(0))
            yield self.lossless.decode(found["latents"])


class ReconstructionTask:
    """A `Task`: what the loop needs to train a codec."""

    def __init__(self, objective: Reconstruction, clips: WorldClips | Footage, config: TrainConfig):
        self.objective, self.clips, self.out = objective, clips, config.out
        self.sources = clips.sources
        self.batches = Batches(clips, batch_size=config.batch_size, seed=config.seed)

    @torch.no_grad()
    def validate(self, module: TinyCodec, *, step: int) -> dict[str, float]:
        """Measure held-out clips, and keep a picture of some beside what became of them."""
        device, latents = next(module.parameters()).device, list[Tensor]()
        pairs = list[tuple[Frames, Frames]]()
        for video in self.clips.held_out(32):
            decoded, latent = module.reconstruct(video.to(device))
            pairs.append((to_frames(video[0]), to_frames(decoded[0])))
            latents.append(latent)
        middle = len(pairs[0][0]) // 2
        save_sample(self.out, step, np.stack([clip[middle] for pair in pairs for clip in pair]))
        where = [np.concatenate([find(clip) for clip, _ in pairs]) for find in (edges, moving)]
        original, decoded = (np.concatenate(clips) for clips in zip(*pairs, strict=True))
        perceived = [value for pair in pairs if (value := xpsnr(*pair)) is not None]
        return {
            "psnr": psnr(original, decoded),
            "psnr_edges": psnr(original, decoded, where=where[0]),
            "psnr_moving": psnr(original, decoded, where=where[1]),
            "ssim": ssim(original, decoded),
            "latent_std": float(torch.cat(latents).std()),
            **({"xpsnr": float(np.mean(perceived))} if perceived else {}),
        }

    @torch.no_grad()
    def export(self, folder: Path, module: TinyCodec, meta: dict[str, Any]) -> None:
        codec, trained = module, self.objective.module.encoder
        if any(parameter.requires_grad for parameter in trained.parameters()):
            device = next(module.parameters()).device
            latents = torch.cat([module.encode(x.to(device)) for x in self.clips.some(256)])
            codec = module.with_statistics(latents.mean((0, 1, 3, 4)), latents.std((0, 1, 3, 4)))
        save_checkpoint(folder, {"codec": codec}, meta | self.clips.about, overwrite=True)
