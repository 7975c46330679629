"""Own videos: a folder of them becomes a folder of latents.

Every video is made into *parts* by one process: files below `LATENTS/.work`, named after the video,
complete as soon as they exist. When there are parts of all videos, they are put together in the
order of the names; a run that makes a share of them leaves this to another. So a run may be killed
at any moment, and neither that nor the number of processes or machines changes a byte of the
result.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.torch import save
from torch import Tensor

from videoar.checkpoints.checkpoint import Checkpoint
from videoar.checks import Report, check, check_same
from videoar.data.clips import begin, read_done, read_parts
from videoar.data.latents import EMPTY_TEXT, INDEX_NAME, INFO_NAME, LatentsInfo, ShardWriter
from videoar.data.options import ALL, Prepare, turns
from videoar.data.sources import Listing, Source, list_sources
from videoar.data.video import Frames, save_sheet
from videoar.data.workers import perform
from videoar.encoders.codec import Codec
from videoar.encoders.text_encoder import PromptEncoder
from videoar.files import Json, first_written, write_json

WORK, HELD_OUT_FOLDER = ".work", "heldout"
ABOUT, REJECTED, STATISTICS = "prepare.json", "rejected.jsonl", "statistics.json"
SHEET = "contact-sheet.png"
OUTPUTS = (ABOUT, REJECTED, STATISTICS, SHEET, INDEX_NAME, EMPTY_TEXT)
# What may differ when a run goes on: where things are, and who does the work.
FREE_FIELDS = {"videos", "latents", "codec", "timeout", "workers", "device", "share"}
SHEET_CLIPS, TEXTS_AT_A_TIME = 48, 128
HeldOut = Callable[[dict[Source, int]], set[Source]]
"""Of the clips of videos, which videos are held out."""


def run(config: Prepare, show: Report = lambda line: None) -> Json:
    """Prepare a folder, or go on with it, and return its statistics; `show` hears how far it is.

    Of a share there are no statistics.

    Raises:
        ValueError: something does not fit, or no video gives a clip.
    """
    folder, videos = config.latents, config.videos
    if folder.resolve().is_relative_to(videos.resolve()):
        raise ValueError(f"{folder} lies in {videos}, whose videos it is made of: name another one")
    listing = list_sources(videos, captions=config.captions)
    if not (listing.sources or listing.rejected):
        raise ValueError(f"{videos} holds no files: name a folder of videos")
    checkpoint = Checkpoint.find(config.codec)
    config, codec = replace(config, codec=str(checkpoint.home.resolve())), checkpoint.codec()
    _check_sizes(config, codec)
    kept = {key: value for key, value in vars(config).items() if key not in FREE_FIELDS}
    about = {"codec": codec.fingerprint(), **json.loads(json.dumps(kept))}
    digest = hashlib.sha256("".join(source.key for source in listing.sources).encode()).hexdigest()
    encoder, text = checkpoint.parts().get("text"), None
    if encoder is None or encoder.trainable is not None:
        encoder = None  # it is trained along
    else:
        encoder.device, text = config.device, encoder.fingerprint()
    sources = {"sources": digest[:16], "text": text}
    if (folder / INFO_NAME).exists():
        _claim(folder / ABOUT, about | sources, config)
        shutil.rmtree(folder / WORK, ignore_errors=True)
        return json.loads((folder / STATISTICS).read_text(encoding="utf-8"))
    work = folder / WORK
    if folder.exists() and any(folder.iterdir()) and not work.is_dir():
        raise ValueError(f"{folder} is not empty: choose a new folder for the latents")
    work.mkdir(parents=True, exist_ok=True)
    _claim(work / ABOUT, about, config)
    choose = partial(held_out, share=config.held_out, apart=checkpoint.meta.get("held_out", ()))
    while todo := _not_made(config, listing.sources, work, choose):
        _make_parts(config, listing.sources[turns(config.share)], todo, show)
    if config.share != ALL:
        return {}
    info = LatentsInfo.of(codec, fps=config.fps, text=text, checkpoint=config.codec)
    statistics = _join(folder, listing, info, about | sources, encoder, choose, show)
    shutil.rmtree(work)
    return statistics


def _check_sizes(config: Prepare, codec: Codec) -> None:
    time_stride, *sides = codec.stride
    for length in config.num_frames:
        below = 1 + (length - 1) // time_stride * time_stride
        ends = f"{below} or {below + time_stride}: latent frames end at 1 + {time_stride} * k"
        check("num_frames", length, length == below, ends)
    high, wide = (2 * side for side in sides)  # transformers take patches of 2 x 2 latents
    for width, height in config.pixels:
        fits = not (width % wide or height % high)
        check("a size", f"{width}x{height}", fits, f"multiples of {wide} and {high}")


def _claim(path: Path, about: Json, config: Prepare) -> None:
    """Write what a folder is made of and how, or raise if it is made otherwise."""
    old = first_written(path, about)
    if old.get("sources") != about.get("sources"):
        raise ValueError(
            f"{path} is of other videos, of which some were added, removed or changed since: name"
            " a new folder for the latents"
        )
    now = {key: old[key] for key in about.keys() & old.keys()}
    how: Json = {"other": "folder for them", "free": FREE_FIELDS - {"codec"}, "options": config}
    check_same(now, about, held=f"{path} is of latents", **how)


def _not_made(config: Prepare, sources: list[Source], work: Path, choose: HeldOut) -> list[Source]:
    """Return the videos of the share without parts; some are made again, with pixels, to hold out.

    Which those are is known when it is known which of all videos can be used.
    """
    made = {source: work / f"{source.key}.json" for source in sources[turns(config.share)]}
    clips = dict.fromkeys(sources, 2)
    clips |= {s: read_done(s, work)["clips"] for s, path in made.items() if path.exists()}
    for source in choose(clips) & made.keys():
        if not (mark := work / f"{source.key}.heldout").exists():
            made[source].unlink(missing_ok=True)
            mark.touch()
    return [source for source, path in made.items() if not path.exists()]


def _make_parts(config: Prepare, sources: list[Source], todo: list[Source], show: Report) -> None:
    work = config.latents / WORK
    total = max(1, sum(source.size for source in sources))
    finished = before = total - sum(source.size for source in todo)
    clips = old = sum(read_done(source, work)["clips"] for source in set(sources) - set(todo))
    workers = min(config.workers or os.cpu_count() or 1, len(todo))
    within, started = dict[Source, float](), time.perf_counter()
    how: Json = {"workers": workers, "timeout": config.timeout, "preload": __name__}
    # Long ones first: no process should begin the longest when the others are done.
    longest = sorted(todo, key=lambda source: -source.size)
    for event in perform(longest, partial(begin, config, work), **how):
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
        said = f"{done / total:.0%}  {clips} clips  {(clips - old) / seconds:.1f} clips/s"
        if done > before:  # nothing else tells
            left = timedelta(seconds=int(seconds * (total - done) / (done - before)))
            said += f"  {left} left"
        show(said)


def held_out(clips: dict[Source, int], *, share: float, apart: Collection[str]) -> set[Source]:
    """Choose whole videos to keep out of training, by a hash of their names.

    Of those with clips it is the share, or more if need be for two videos, of four or more, and two
    clips: an interval takes them. One video at least is left to train on. What the codec was
    trained on is none, if it says what was not: those `apart`, where some of them have clips.
    """
    used = [source for source, count in clips.items() if count]
    used.sort(key=lambda source: hashlib.sha256(source.name.encode()).digest())
    unseen = [source for source in used if source.name in apart] or used
    least = max(round(share * len(used)), min(2, len(used) // 2))
    most = min(len(unseen), len(used) - 1)
    counts = (k for k in range(least, most) if sum(clips[source] for source in unseen[:k]) > 1)
    return set(unseen[: next(counts, most)]) if share else set()


def _rows(sources: list[Source], encoder: PromptEncoder | None) -> Iterator[Tensor | None]:
    """Encode the first caption of every video, some at a time: each takes 4 MB and more."""
    for start in range(0, len(sources), TEXTS_AT_A_TIME):
        captions = [source.captions[0] for source in sources[start : start + TEXTS_AT_A_TIME]]
        yield from [None] * len(captions) if encoder is None else encoder.encode(captions)


def _join(
    folder: Path,
    listing: Listing,
    info: LatentsInfo,
    about: Json,
    encoder: PromptEncoder | None,
    choose: HeldOut,
    show: Report,
) -> Json:
    """Put the parts of all videos together and return statistics; `latents.json` comes last."""
    work, apart = folder / WORK, folder / HELD_OUT_FOLDER
    for stale in (*folder.glob("shard-*"), *(folder / name for name in OUTPUTS)):
        stale.unlink(missing_ok=True)
    shutil.rmtree(apart, ignore_errors=True)
    done = {source: read_done(source, work) for source in listing.sources}
    clips = {source: record["clips"] for source, record in done.items() if record["clips"]}
    out = choose(clips)
    shown, every = list[Frames](), -(-len(clips) // SHEET_CLIPS)
    sizes, kept_sizes, num_frames = Counter[str](), Counter[str](), 0
    with ExitStack() as stack:
        writer = stack.enter_context(ShardWriter(folder, info=info))
        other = stack.enter_context(ShardWriter(apart, info=info)) if out else writer
        rejected = _write_rejected(folder / REJECTED, listing, done)
        if not clips:
            most = Counter(rejected.values()).most_common(1)[0][0]
            raise ValueError(
                f"none of {len(rejected)} files gives a clip: {most}; {folder / REJECTED} says why"
            )
        if encoder is not None:
            (folder / EMPTY_TEXT).write_bytes(save({"rows": encoder.encode([""])[0]}))
        texts = _rows(list(clips), encoder)
        for number, (source, rows) in enumerate(zip(clips, texts, strict=True)):
            show(f"{number}/{len(clips)} videos put together")
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
        save_sheet(np.concatenate(shown), folder / SHEET, columns=9)
        reasons = Counter(re.split(r"[:(,]| after| at ", reason)[0] for reason in rejected.values())
        statistics = {
            "videos": len(done),
            "used": len(clips),
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
