"""Own videos: a folder of them becomes a folder of latents.

Every video is made into *parts* by one process: files below `LATENTS/.work`, named after the video,
complete as soon as they exist. When there are parts of all videos, they are put together in the
order of the names. So a run may be killed at any moment, and neither that nor the number of
processes or machines changes a byte of the result.
"""

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from videoar.checkpoints.checkpoint import load_codec, resolve, surroundings
from videoar.data.clips import begin, read_done, read_parts
from videoar.data.latents import EMPTY_TEXT, INDEX_NAME, INFO_NAME, LatentsInfo, ShardWriter
from videoar.data.options import Prepare
from videoar.data.sources import Listing, Source, list_sources
from videoar.data.video import Frames, contact_sheet
from videoar.data.workers import Event, Pool
from videoar.encoders.codec import Codec
from videoar.encoders.umt5 import UMT5PromptEncoder
from videoar.files import Json, write_json

WORK, HELD_OUT_FOLDER = ".work", "heldout"
ABOUT, REJECTED, STATISTICS = "prepare.json", "rejected.jsonl", "statistics.json"
SHEET = "contact-sheet.png"
OUTPUTS = (ABOUT, REJECTED, STATISTICS, SHEET, INDEX_NAME, EMPTY_TEXT)
# What may differ when a run goes on: where things are, and who does the work.
FREE_FIELDS = {"videos", "latents", "codec", "timeout", "workers", "device", "engine"}
SHEET_CLIPS, TEXTS_AT_A_TIME = 48, 128


@dataclass(frozen=True)
class Progress:
    """How far a preparation is."""

    share: float
    """Of the bytes of all videos."""
    clips: int
    rate: float
    """Clips per second in this run, which may have found some done."""
    left: float
    """Seconds; infinite as long as nothing tells."""

    def __str__(self) -> str:
        said = f"{self.share:.0%}  {self.clips} clips  {self.rate:.1f} clips/s"
        left = self.left < math.inf and timedelta(seconds=int(self.left))
        return f"{said}  {left} left" if left else said


def run(config: Prepare, show: Callable[[Progress], None] = lambda progress: None) -> Json:
    """Prepare a folder, or go on with it, and return its statistics.

    Raises:
        ValueError: something does not fit, or no video gives a clip.
    """
    folder, videos = config.latents, config.videos
    if not videos.is_dir():
        raise ValueError(f"there is no folder {videos}: name the folder of your videos")
    if folder.resolve().is_relative_to(videos.resolve()):
        raise ValueError(f"{folder} lies in {videos}, whose videos it is made of: name another one")
    config = replace(config, codec=str(resolve(config.codec).resolve()))
    codec = load_codec(Path(config.codec))
    _check_sizes(config, codec)
    listing = list_sources(videos, captions=config.captions)
    kept = {key: value for key, value in vars(config).items() if key not in FREE_FIELDS}
    about = {"codec": codec.fingerprint(), **json.loads(json.dumps(kept))}
    digest = hashlib.sha256("".join(source.key for source in listing.sources).encode()).hexdigest()
    sources = {"sources": digest[:16]}
    if (folder / INFO_NAME).exists():
        _claim(folder / ABOUT, about | sources)
        shutil.rmtree(folder / WORK, ignore_errors=True)
        return json.loads((folder / STATISTICS).read_text(encoding="utf-8"))
    work = folder / WORK
    if folder.exists() and any(folder.iterdir()) and not work.is_dir():
        raise ValueError(f"{folder} is not empty: choose a new folder for the latents")
    work.mkdir(parents=True, exist_ok=True)
    _claim(work / ABOUT, about)
    while todo := _not_made(config, listing.sources, work):
        _make_parts(config, listing.sources, todo, show)
    encoder = surroundings(Path(config.codec)).get("text")
    if isinstance(encoder, UMT5PromptEncoder):
        encoder.device = config.device
    else:
        encoder = None  # it is trained along
    info = LatentsInfo(
        codec=about["codec"],
        channels=codec.latent_channels,
        stride=codec.stride,
        fps=config.fps,
        text=None if encoder is None else encoder.fingerprint(),
    )
    statistics = _join(folder, listing, info=info, about=about | sources, encoder=encoder)
    shutil.rmtree(work)
    return statistics


def _check_sizes(config: Prepare, codec: Codec) -> None:
    time_stride, *sides = codec.stride
    for length in config.num_frames:
        if (length - 1) % time_stride:
            below = 1 + (length - 1) // time_stride * time_stride
            raise ValueError(
                f"num_frames is {length}, but latent frames end at 1 + {time_stride} * k: use"
                f" {below} or {below + time_stride}"
            )
    for size in config.pixels or ():
        # Transformers take patches of 2 x 2 latents.
        if size[0] % (2 * sides[1]) or size[1] % (2 * sides[0]):
            raise ValueError(
                f"a size is {size[0]}x{size[1]}, but width and height must be multiples of"
                f" {2 * sides[1]} and {2 * sides[0]}: change it"
            )


def _claim(path: Path, about: Json) -> None:
    """Write what a folder is made of and how, or raise if it is made otherwise."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else about
    for key, value in about.items():
        if old.get(key) != value:
            change = f"{key} was {old.get(key)}, but it is {value} now"
            if key == "sources":
                change = "the videos were others: some were added, removed or changed since"
            raise ValueError(
                f"{path} says that {change}: keep all as it was, or name a new folder for the"
                " latents"
            )
    write_json(path, about)


def _not_made(config: Prepare, sources: list[Source], work: Path) -> list[Source]:
    """Return the videos without parts; some are made again, with pixels, to be held out.

    Which those are is known when it is known which videos can be used.
    """
    made = {source: (work / f"{source.key}.json").exists() for source in sources}
    clips = {source: read_done(source, work)["clips"] if made[source] else 2 for source in made}
    for source in held_out(clips, share=config.held_out):
        if not (mark := work / f"{source.key}.heldout").exists():
            (work / f"{source.key}.json").unlink(missing_ok=True)
            mark.touch()
            made[source] = False
    return [source for source in sources if not made[source]]


def _make_parts(
    config: Prepare, sources: list[Source], todo: list[Source], show: Callable[[Progress], None]
) -> None:
    work = config.latents / WORK
    total = max(1, sum(source.size for source in sources))
    finished = before = total - sum(source.size for source in todo)
    clips = old = sum(read_done(source, work)["clips"] for source in set(sources) - set(todo))
    engine = _on_ray if config.engine == "ray" else _on_this_machine
    within, started = dict[Source, float](), time.perf_counter()
    # Long ones first: no process should begin the longest when the others are done.
    for event in engine(config, sorted(todo, key=lambda s: -s.size), work):
        source = event.job
        if event.kind == "beat":
            clips += 1
            within[source] = event.value * source.size
        else:
            within.pop(source, None)
            finished += source.size
        if event.kind == "lost":
            write_json(work / f"{source.key}.json", {"clips": 0, "note": event.value})
        done, seconds = finished + sum(within.values()), time.perf_counter() - started
        left = seconds * (total - done) / (done - before) if done > before else math.inf
        show(Progress(done / total, clips, (clips - old) / max(seconds, 1e-9), left))


def held_out(clips: dict[Source, int], *, share: float) -> set[Source]:
    """Choose whole videos to keep out of training, by a hash of their names.

    Of those with clips it is the share, or more if need be for two clips: an interval takes them.
    One video at least is left to train on.
    """
    used = [source for source, count in clips.items() if count]
    used.sort(key=lambda source: hashlib.sha256(source.name.encode()).digest())
    count = round(share * len(used))
    while share and count < len(used) - 1 and sum(clips[source] for source in used[:count]) < 2:
        count += 1
    return set(used[: min(count, len(used) - 1)])


def _pool(config: Prepare, work: Path, workers: int) -> Pool:
    start = partial(begin, config, work)
    return Pool(start, workers=workers, timeout=config.timeout, preload=__name__)


def _on_this_machine(config: Prepare, todo: list[Source], work: Path) -> Iterator[Event]:
    with _pool(config, work, min(config.workers or os.cpu_count() or 1, len(todo))) as pool:
        yield from pool.run(todo)


class _RayWorker:
    """An actor with a process of its own that may be given up."""

    def __init__(self, config: Prepare, work: Path) -> None:
        self.pool = _pool(config, work, 1)

    def __call__(self, batch: Json) -> Json:
        events = [list(self.pool.run([pickle.loads(job)])) for job in batch["job"]]
        return {"events": [pickle.dumps(each) for each in events]}


def _on_ray(config: Prepare, todo: list[Source], work: Path) -> Iterator[Event]:
    try:
        import ray.data
    except ImportError as error:
        message = "engine is ray, which is not installed: `pip install videoar[dist]`"
        raise ValueError(message) from error
    if not todo:
        return
    cores = int(ray.available_resources().get("CPU", 1)) if ray.is_initialized() else os.cpu_count()
    workers = min(config.workers or cores or 1, len(todo))
    jobs = [{"job": pickle.dumps(source)} for source in todo]
    events = ray.data.from_items(jobs, override_num_blocks=len(jobs)).map_batches(
        _RayWorker,
        batch_size=1,
        concurrency=workers,
        fn_constructor_args=(config, work.resolve()),
    )
    for row in events.iter_rows():
        yield from pickle.loads(row["events"])


def _rows(sources: list[Source], encoder: UMT5PromptEncoder | None) -> Iterator[Tensor | None]:
    """Encode the first caption of every video, some at a time: each takes 4 MB and more."""
    for start in range(0, len(sources), TEXTS_AT_A_TIME):
        captions = [source.captions[0] for source in sources[start : start + TEXTS_AT_A_TIME]]
        yield from [None] * len(captions) if encoder is None else encoder.encode(captions)


def _join(
    folder: Path,
    listing: Listing,
    *,
    info: LatentsInfo,
    about: Json,
    encoder: UMT5PromptEncoder | None,
) -> Json:
    """Put the parts of all videos together and return statistics; `latents.json` comes last."""
    work, apart = folder / WORK, folder / HELD_OUT_FOLDER
    for stale in (*folder.glob("shard-*"), *(folder / name for name in OUTPUTS)):
        stale.unlink(missing_ok=True)
    shutil.rmtree(apart, ignore_errors=True)
    done = {source: read_done(source, work) for source in listing.sources}
    used = [source for source, record in done.items() if record["clips"]]
    if not used:
        rejected = _write_rejected(folder / REJECTED, listing, done)
        raise ValueError(
            f"none of {len(rejected)} files gives a clip: {folder / REJECTED} says why"
        )
    clips = {source: record["clips"] for source, record in done.items()}
    out = held_out(clips, share=about["held_out"])
    shown, every = list[Frames](), -(-len(used) // SHEET_CLIPS)
    sizes, kept_sizes, num_frames = Counter[str](), Counter[str](), 0
    with ExitStack() as stack:
        writer = stack.enter_context(ShardWriter(folder, info=info))
        other = stack.enter_context(ShardWriter(apart, info=info)) if out else writer
        rejected = _write_rejected(folder / REJECTED, listing, done)
        if encoder is not None:
            (folder / EMPTY_TEXT).write_bytes(save({"rows": encoder.encode([""])[0]}))
        for number, (source, rows) in enumerate(zip(used, _rows(used, encoder), strict=True)):
            table, target = (kept_sizes, other) if source in out else (sizes, writer)
            for clip in read_parts(source, work):
                extra = {"file": source.name, "start": clip.start}
                if source in out:
                    extra["source"] = f"{table.total():06d}.mkv"
                    shutil.copyfile(clip.pixels, apart / extra["source"])
                target.add(clip.latents, captions=source.captions, extra=extra, text=rows)
                frames, _, height, width = clip.latents.shape
                length = 1 + (frames - 1) * info.stride[0]
                table[f"{length} of {width * info.stride[2]}x{height * info.stride[1]}"] += 1
                num_frames += length
                if clip.shown is not None and number % every == 0 and len(shown) < SHEET_CLIPS:
                    shown.append(clip.shown.numpy())
        sheet = contact_sheet(np.concatenate(shown), columns=9)
        Image.fromarray(sheet).save(folder / SHEET)
        reasons = Counter(re.split(r"[:(,]| after| at ", reason)[0] for reason in rejected.values())
        statistics = {
            "videos": len(done),
            "used": len(used),
            "rejected": dict(reasons.most_common()),
            "clips": sizes.total(),
            "held_out_clips": kept_sizes.total(),
            "seconds": num_frames / info.fps,
            "frames_of_sizes": dict(sorted((sizes + kept_sizes).items())),
        }
        write_json(folder / STATISTICS, statistics)
        write_json(folder / ABOUT, about)
    return statistics


def _write_rejected(path: Path, listing: Listing, done: dict[Source, Json]) -> dict[str, str]:
    """Write a line for all that is not used, and for what is used in part; return the reasons."""
    lines = {name: {"file": name, "reason": why} for name, why in listing.rejected.items()}
    for source, record in done.items():
        if record["note"]:
            before = {"clips_before": record["clips"]} if record["clips"] else {}
            lines[source.name] = {"file": source.name, "reason": record["note"], **before}
    lines = dict(sorted(lines.items()))
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines.values())
    path.write_text(text, encoding="utf-8")
    return {name: line["reason"] for name, line in lines.items()}
