"""Folders of latents: shards of clips with their captions, written and read.

No training loop, no codec and no text encoder lives here.
"""

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from videoar.checks import explained, typed
from videoar.encoders.codec import Codec
from videoar.encoders.text_encoder import PromptEncoder, StoredText, TextEncoder
from videoar.files import write_json
from videoar.weights import build_config, read_json, read_weights

FORMAT, MAX_SHARD_BYTES, MAX_SHARD_CLIPS = 1, 256 << 20, 1024
MAX_MEMORY_BYTES = 2 << 30  # larger folders are not read into memory, but stay mapped files
EMPTY_TEXT = "empty-text.safetensors"
"""The rows of the empty prompt, if rows are stored."""
Tokenize = Callable[[list[str]], Int[Tensor, "batch words"]]
INFO_NAME = "latents.json"
INDEX_NAME = "index.jsonl"


@dataclass(frozen=True, kw_only=True)
class LatentsInfo:
    """What one must know of a folder of latents to train on it and to decode what comes out."""

    codec: str
    """Fingerprint of the codec that encoded the clips."""
    channels: int
    """Channels of a latent frame."""
    stride: tuple[int, int, int]
    """Pixels per latent along time, height and width."""
    fps: float
    """Pixel frames per second."""
    mean: tuple[float, ...] = ()
    """Of each channel over the folder; filled in by the writer."""
    std: tuple[float, ...] = ()
    """Of each channel over the folder; filled in by the writer."""
    text: str | None = None
    """Fingerprint of the encoder of the rows of text, if there are any."""
    checkpoint: str | None = None
    """Where the codec was: a bundled name or an absolute path."""

    @classmethod
    def of(cls, codec: Codec, **about: Any) -> "LatentsInfo":
        """Return what is known before there are clips; `about` are fps and what may be None."""
        shape = {"channels": codec.latent_channels, "stride": codec.stride}
        return cls(codec=codec.fingerprint(), **shape, **about)


class ShardWriter(AbstractContextManager["ShardWriter"]):
    """Write clips of latents into a new folder: `with ShardWriter(...) as writer: writer.add(...)`.

    A shard stacks clips of one size into a tensor `latents`, `clips frames channels height width`,
    and into `text` the rows of their captions if an encoder of text is too large to train with.
    `latents.json` comes last: a folder without it is unfinished.
    """

    def __init__(
        self, folder: Path, *, info: LatentsInfo, dtype: torch.dtype = torch.float16
    ) -> None:
        if folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise ValueError(f"{folder} is not empty: choose a new folder for the latents")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.info, self.dtype = folder, info, dtype
        self._open: dict[torch.Size, list[tuple[dict[str, Tensor], dict[str, Any]]]] = {}
        self._index: list[dict[str, Any]] = []
        self._num_shards = 0
        self._sums = torch.zeros(3, info.channels, dtype=torch.float64)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the folder, unless an error ends the writing."""
        if kind is not None:
            return
        for shape in list(self._open):
            self._flush(shape)
        mean, square = self._sums[1:] / self._sums[0].clamp_min(1)
        std = (square - mean.square()).clamp_min(0).sqrt()
        info = asdict(self.info) | {"mean": mean.tolist(), "std": std.tolist()}
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in self._index)
        (self.folder / INDEX_NAME).write_text("".join(lines), encoding="utf-8")
        write_json(self.folder / INFO_NAME, {"format": FORMAT} | info)

    def add(
        self,
        latents: Float[Tensor, "frames channels height width"],
        *,
        captions: Sequence[str],
        extra: dict[str, Any] | None = None,
        text: Float[Tensor, "words text_channels"] | None = None,
    ) -> None:
        """Append one clip with its captions; `extra` is kept in the index as it is.

        `text` are the rows of the caption, as many for every clip of a folder.
        """
        assert latents.shape[1] == self.info.channels, "they are of another codec"
        stored = latents.detach().to("cpu", self.dtype)
        if not torch.isfinite(stored).all():
            number = len(self._index) + sum(map(len, self._open.values()))
            raise ValueError(
                f"clip {number} is not finite as {self.dtype}, largest magnitude"
                f" {latents.abs().max().item():g}: normalise the latents or store torch.bfloat16"
            )
        values = stored.double()
        self._sums += torch.stack([(values**power).sum((0, 2, 3)) for power in range(3)])
        frames, _, height, width = stored.shape
        line = {"captions": list(captions), "frames": frames, "height": height, "width": width}
        line |= {"extra": extra} if extra else {}
        tensors = {"latents": stored}
        if text is not None:
            tensors["text"] = text.to(self.dtype)
        clips = self._open.setdefault(stored.shape, [])
        clips.append((tensors, line))
        size = sum(tensor.nbytes for tensor in tensors.values())
        if len(clips) >= min(MAX_SHARD_CLIPS, max(1, MAX_SHARD_BYTES // size)):
            self._flush(stored.shape)

    def _flush(self, shape: torch.Size) -> None:
        clips = self._open.pop(shape)
        name = f"shard-{self._num_shards:05d}.safetensors"
        stacked = {key: torch.stack([tensors[key] for tensors, _ in clips]) for key in clips[0][0]}
        # `save_file` would let nobody else read it, whatever the umask.
        (self.folder / name).write_bytes(save(stacked))
        self._index += [{"shard": name, "row": row} | line for row, (_, line) in enumerate(clips)]
        self._num_shards += 1


class LatentShards:
    """A dataset of encoded clips, read from a folder that `ShardWriter` wrote.

    Args:
        folder: The folder.
        tokenize: Turns captions into token ids; without it batches hold the captions themselves.
    """

    def __init__(self, folder: Path, *, tokenize: Tokenize | None = None) -> None:
        self.folder, self.tokenize, self.info = folder, tokenize, read_info(folder)
        self.clips = _read_index(folder / INDEX_NAME)
        names = {clip["shard"] for clip in self.clips}
        # Both a tensor and a slice of a mapped file return one clip when indexed by a row.
        self._shards: dict[str, dict[str, Any]] = {n: _map_shard(folder / n) for n in names}
        for clip in self.clips:
            num_rows = self._shards[clip["shard"]]["latents"].get_shape()[0]
            if not 0 <= clip["row"] < num_rows:
                raise ValueError(
                    f"{folder / INDEX_NAME} names row {clip['row']} of {clip['shard']}, which has"
                    f" {num_rows} rows: prepare the latents again"
                )
        if sum((folder / name).stat().st_size for name in names) <= MAX_MEMORY_BYTES:
            for name, shard in self._shards.items():
                self._shards[name] = {key: rows[:] for key, rows in shard.items()}

    def __len__(self) -> int:
        return len(self.clips)

    def fingerprint(self) -> str:
        """Name the clips: their index with its captions, means and deviations, and all sizes."""
        shards = sorted((name, (self.folder / name).stat().st_size) for name in self._shards)
        digest = hashlib.sha256(repr(shards).encode())
        for name in (INFO_NAME, INDEX_NAME, EMPTY_TEXT):
            if (file := self.folder / name).exists():
                digest.update(file.read_bytes())
        return f"{len(self)} clips {digest.hexdigest()[:12]}"

    @property
    def kinds(self) -> Int[np.ndarray, " samples"]:
        """A number for each clip, the same for clips of the same size."""
        sizes = [[clip[side] for side in ("frames", "height", "width")] for clip in self.clips]
        _, kinds = np.unique(np.array(sizes), axis=0, return_inverse=True)
        return kinds.reshape(-1)

    @property
    def captions(self) -> list[str]:
        """All captions of all clips."""
        return [caption for clip in self.clips for caption in clip["captions"]]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of most clips, in latents."""
        return statistics.mode((clip["height"], clip["width"]) for clip in self.clips)

    def get(self, indices: list[int], rng: np.random.Generator) -> dict[str, Any]:
        """Return `latents` (float32) with `text`: the rows that are stored, else token ids.

        Without a tokenizer there are `captions` instead of ids. A clip with several captions shows
        one of them, drawn anew each time.
        """
        clips = [self.clips[index] for index in indices]
        places = [(self._shards[clip["shard"]], clip["row"]) for clip in clips]
        captions = [clip["captions"][rng.integers(len(clip["captions"]))] for clip in clips]
        # Of one size: Batches are told the `kinds` of the clips.
        latents = torch.stack([shard["latents"][row] for shard, row in places]).float()
        if "text" in places[0][0]:
            text = torch.stack([shard["text"][row] for shard, row in places]).float()
            return {"latents": latents, "text": text}
        if self.tokenize is None:
            return {"latents": latents, "captions": captions}
        return {"latents": latents, "text": self.tokenize(captions)}


def read_info(folder: Path) -> LatentsInfo:
    """Return what a folder of latents says of itself."""
    path = folder / INFO_NAME
    if not path.is_file():
        what = f"prepare {folder} LATENTS" if folder.is_dir() else f"prepare VIDEOS {folder}"
        raise ValueError(
            f"there is no folder {folder} with {INFO_NAME}: make latents of your videos, with"
            f" `videoar {what}`, or name another one (data.path)"
        )
    values = read_json(path)
    version = values.pop("format", None)
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}, but {FORMAT} is read: prepare it again")
    return build_config(LatentsInfo, values, file=path)


class _Clip(TypedDict):
    """What a line of the index says at least."""

    shard: str
    row: int
    captions: list[str]
    frames: int
    height: int
    width: int


def _read_index(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: prepare the latents again")
    clips, kinds = [], (ValueError, KeyError, IndexError, TypeError, RecursionError)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            says = f"line {number} of {path} does not describe a clip with shard, row and captions"
            with explained(f"{says}: prepare the latents again", *kinds):
                clips.append(json.loads(line))
                typed(_Clip, {name: clips[-1][name] for name in _Clip.__annotations__})
                _ = clips[-1]["captions"][0]
    return clips


def _map_shard(path: Path) -> dict[str, Any]:
    says = f"{path} is missing, cut short or not a shard of latents ({{}}): prepare it again"
    with explained(says, OSError, ValueError, SafetensorError):
        shard = safe_open(path, framework="pt")
        return {key: shard.get_slice(key) for key in {"latents", *shard.keys()}}


def check_codec(latents: Path, info: LatentsInfo, codec: Codec, *, checkpoint: str | Path) -> None:
    """Raise if a folder of latents, which says this of itself, is of another codec."""
    theirs, ours = info.codec, codec.fingerprint()
    if theirs != ours:
        raise ValueError(
            f"{latents} was encoded with the codec {theirs}, but {checkpoint} has {ours}: prepare"
            f" the videos with {checkpoint} as codec, or name a checkpoint with the codec {theirs}"
        )


def text_module(prompts: PromptEncoder, latents: Path) -> TextEncoder | StoredText:
    """Return what makes rows of the captions of a folder: of token ids, or of stored rows.

    Raises:
        ValueError: a frozen encoder, and a folder without its rows.
    """
    if prompts.trainable is not None:
        return prompts.trainable
    stored, wanted = read_info(latents).text, prompts.fingerprint()
    if stored != wanted:
        raise ValueError(
            f"{latents} has captions encoded by {stored or 'nothing'}, but the checkpoint's"
            f" text encoder is {wanted}: prepare the videos again, with that checkpoint as codec"
        )
    return StoredText(read_weights(latents / EMPTY_TEXT)["rows"])


def read_held_out(latents: Path, tokenize: Tokenize | None) -> Iterator[dict[str, Tensor]]:
    """Yield the first 32 clips that a folder holds out, if it does, in batches of one size."""
    if not (latents / "heldout").is_dir():
        return
    shards, rng = LatentShards(latents / "heldout", tokenize=tokenize), np.random.default_rng(0)
    first = shards.kinds[:32]
    for kind in np.unique(first):
        yield shards.get(np.nonzero(first == kind)[0].tolist(), rng)
