"""The report of a study: sentences by rule, tables, plots and videos, as one page and as Markdown.

Nothing is claimed without an interval; where nothing was found, it is said what would have been.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from videoar.core.units import Units
from videoar.evaluation import plots, tables
from videoar.evaluation.judge import WINDOW_SECONDS
from videoar.evaluation.metrics import bootstrap_interval
from videoar.evaluation.statistics import CHIEF, LEVEL, Difference, Found, difference, holm
from videoar.evaluation.tables import CLEAN, CODEC, spread
from videoar.files import Json, written_whole

ABOUT = """95 % bootstrap intervals over prompts, and over trainings where there are several. \
Differences are of the same prompts and noise; Holm's correction is for all those of a table. \
"none" is what it does not let pass as a difference; the number behind it is the smallest true one \
that would have been found in 8 of 10 such studies; too few: not even the largest. Scores are in \
points of 100."""
COST = """What it costs: one video at a time, medians of repeats [lowest, highest]; processes that \
share a machine share its speed"""
SEAMS = """Seams: how much more the luma changes across borders of units than elsewhere, beside \
real clips through the codec at the same places; 0 is no seam"""
DRIFT = "Drift: slopes per second, times 1000, beside those of real clips through the codec"
ENDS = f"The last {WINDOW_SECONDS:g} s of the same videos minus the first, in points"
UNREAD = "No judge read these videos: nothing here says whether they show what was asked for."
NEAREST = f"""Nearest training clips: distance in features, in deviations of the training clips; \
what is remembered is nearer than real clips are, of which {tables.FEW} % are as near as the last \
column asks for"""
NOTE = "\n\n"
DRIFTING = {CHIEF, "brightness", "contrast", "sharpness", "colourfulness"}
Rows = list[dict[str, str]]
Tables = dict[str, Rows]
"""Rows by title; the first column names lines."""
Compared = dict[tuple[str, str], Difference]
LATTICE_FRAMES = 16  # of a long video, those that are drawn


def member(name: str, k: int) -> str:
    """Name the entry of the k-th training of a line."""
    return f"{name} #{k + 1}"


def video_of(name: str, index: int) -> str:
    """Return where in the folder of a study a video is kept."""
    return "videos/" + re.sub(r"[^\w.-]+", "-", f"{name}-{index}.mp4")


def lattice(units: Units) -> Json:
    """Return what a page needs to fill a lattice: (t, h, w, level, unit) of tokens, and waves."""
    size = [min(units.frames or 1, LATTICE_FRAMES), units.height, units.width]
    tokens = [(*cell, unit.index) for unit in units.clip for cell in unit.cells]
    shown = [token for token in tokens if token[0] < size[0]]
    return {"size": size, "tokens": shown, "waves": units.waves.tolist()}


def write(folder: Path, found: Found, about: Json, say: Callable[[str], None]) -> str:
    """Write the report as `report.html` and `report.md`, and return what it says in sentences."""
    shown, pairs, drifts, ends = Tables(), dict[str, Compared](), Compared(), Compared()
    read = CHIEF in found.sides(CLEAN)
    for title, names in about["groups"].items():
        both = itertools.combinations(names, 2) if read else ()
        pairs[title] = {(a, b): found.minus(a, b, CHIEF) for b, a in both}
        shown |= _compared(found, title, names, pairs[title])
    for line in found.lines:
        slopes = [name for name in found.sides(line, "slopes") if name in DRIFTING]
        drifts |= {(line, name): found.minus(line, CODEC, name, "slopes") for name in slopes}
        first, last = (found.sides(line, end) for end in ("first", "last"))
        both = tables.columns_of(first).items() if CHIEF in slopes else ()
        ends |= {(line, column): difference(last[key], first[key]) for key, column in both}
    shown |= {COST: _cost(found), SEAMS: _seams(found)}
    shown |= _grid(DRIFT, "videos of", drifts, 1000, math.inf) | _grid(ENDS, "videos of", ends)
    real = found.entries[CODEC]
    if "nearest" in real["videos"][0]:
        each = {line: tables.nearest(found.samples(line), real) for line in (CODEC, *found.lines)}
        shown[NEAREST] = [{"videos of": line} | row for line, row in each.items()]
    shown = {title: rows for title, rows in shown.items() if rows}
    who = f"{_scores(found, about['judge'])}{_who(pairs)}" if read else UNREAD
    text = [_what(found, about), who, _price(found, drifts), *about["doubts"], ABOUT]
    drawn, title = plots.draw(found, say), about["design"].about or "A study"
    told = [f"# {title}", *text]
    for name, rows in shown.items():
        told += [f"## {name.replace(': ', NOTE, 1)}", tables.markdown(tables.cells(rows))]
    files = {"report.md": "\n\n".join([*told, *(f"![{name}](plot-{name}.svg)" for name in drawn)])}
    data = {"title": title, "text": text, "tables": shown, "plots": list(drawn.values())}
    data |= {"lattices": about["lattices"], "videos": _videos(folder, found)}
    page = Path(__file__).with_suffix(".html").read_text("utf-8")
    # No text can end the script that holds it.
    files["report.html"] = page.replace("{DATA}", json.dumps(data).replace("<", "\\u003c"))
    files |= {f"plot-{name}.svg": svg for name, svg in drawn.items()}
    for name, content in files.items():
        with written_whole(folder / name) as partial:
            partial.write_text(f"{content}\n", encoding="utf-8")
    where = f"{folder / 'report.html'} has the tables and the videos; report.md is the same as text"
    return "\n\n".join([title, *text[:-1], f"{where}\n"])


def _sure(compared: Compared) -> list[tuple[tuple[str, str], Difference, float]]:
    """Return differences with probabilities corrected for how many there are."""
    corrected = holm([one.p for one in compared.values()])
    return [(key, one, p) for (key, one), p in zip(compared.items(), corrected, strict=True)]


def _grid(
    title: str, head: str, compared: Compared, scale: float = 100, most: float = 100
) -> Tables:
    """Return the table of differences, the first names of their keys below each other.

    None is larger than `most`.
    """
    rows: dict[str, dict[str, str]] = {a: {head: a} for a, _ in compared}
    for row, name in itertools.product(rows.values(), dict.fromkeys(b for _, b in compared)):
        row[name] = ""
    for (a, b), one, p in _sure(compared):
        least, change = scale * one.least(len(compared)), one.change.times(scale).within(most)
        verdict = "more" if change.mean > 0 else "less"
        if p >= LEVEL:
            known = f"{least:.1f}" if least < most else "too few"
            verdict = f"none, {known if one.error else 'no spread'}"
        rows[a][b] = f"{change:.1f} {verdict}, p {p:.2g}"
    return {title: list(rows.values())}


def _compared(found: Found, title: str, names: Sequence[str], pairs: Compared) -> Tables:
    """Return the tables of entries that are compared with each other."""
    scores, real = tables.columns_of(found.sides(CLEAN)), found.entries[CLEAN]
    quality, shares = Rows(), Rows()
    best = {key: side.mean() for key, side in found.sides(CODEC).items() if side.any()}
    for name in (CLEAN, CODEC, *names):
        samples, row, share = found.samples(name), {"videos of": name}, {"videos of": name}
        for key, column in scores.items():
            mean = bootstrap_interval(tables.by_prompt(samples)[key])
            row[column] = str(mean)
            share |= {column: str(mean.times(1 / best[key]))} if key in best else {}
        row["Fréchet"] = tables.distance(samples, real)
        row["diversity"] = tables.diversity(samples)
        quality.append(row | tables.looks(samples, real))
        shares.append(share)
    first, *others = names
    minus = {(a, scores[key]): found.minus(a, first, key) for a in others for key in scores}
    shown = {f"Quality, {title}": quality}
    shown |= {f"In % of the scores of {CODEC}, {title}": shares} if best else {}
    shown |= _grid(f"Differences, {title}", f"minus {first}", minus)
    if pairs and len(names) > 2:
        shown |= _grid(f"Every pair, {scores[CHIEF]}, {title}", "row minus column", pairs)
    return shown


def _cost(found: Found) -> Rows:
    rows = []
    for line in found.lines:
        settings = found.samples(line)[0]["settings"]
        cost = {key: found.cost(line, key) for key in ("passes", "seconds", "first_frame", "cache")}
        rows.append({"videos of": line, "steps": str(settings["num_inference_steps"])})
        rows[-1] |= {
            "passes per second of video": f"{np.median(cost['passes']):.1f}",
            "seconds per second of video": spread(cost["seconds"]),
            "frames/s": spread([settings["fps"] / seconds for seconds in cost["seconds"]]),
            "first frame (s)": spread(cost["first_frame"]),
            "cache (MiB)": f"{max(cost['cache']) / 2**20:.2f}",
        }
    return rows


def _seams(found: Found) -> Rows:
    rows = []
    for line in found.lines:
        sample = found.samples(line)[0]
        kind = sample["settings"]["units"]
        rows.append({"videos of": line, "space": "", "time": ""})
        for side in ("space", "time") if kind in sample["videos"][0]["seams"] else ():
            minus = found.minus(line, CODEC, side, "seams", kind).change
            rows[-1][side] = "" if math.isnan(minus.mean) else f"{minus:.2f}"
    return rows


def _what(found: Found, about: Json) -> str:
    entries = [sample for line in found.lines for sample in found.samples(line)]
    videos, settings = sum(len(entry["videos"]) for entry in entries), entries[0]["settings"]
    commit = f"; commit {about['commit']}" if about["commit"] else ""
    made = f"{', '.join(about['design'].checkpoints)} in {len(found.lines)} ways"
    return (
        f"{videos} videos of {settings['num_frames'] / settings['fps']:.1f} s were made by {made},"
        f" of the same {settings['num_prompts']} prompts, {settings['seeds']} of each, and measured"
        f" ({about['hardware']}{commit})."
    )


def _scores(found: Found, judge: str) -> str:
    """Say how many videos are all right, and whose judge says so."""
    ways = {name: tables.by_prompt(found.samples(name))[CHIEF] for name in (*found.lines, CODEC)}
    said = (f"{name} {bootstrap_interval(scores)}" for name, scores in ways.items())
    return f"{CHIEF} right, of 100, as the judge of {judge} reads: {', '.join(said)}. "


def _who(pairs: Mapping[str, Compared]) -> str:
    """Say who is ahead in each group, or what would have been found."""
    parts = []
    for title, compared in pairs.items():
        sure = [(a, b, one) for (a, b), one, p in _sure(compared) if p < LEVEL]
        text = f"{title}: {len(sure)} of {len(compared)} pairs differ in {CHIEF} right, "
        if sure:
            a, b, one = max(sure, key=lambda each: abs(each[2].change.mean))
            parts.append(f"{text}most of all {a} from {b}, by {one.change} points")
        else:
            least = [100 * one.least(len(compared)) for one in compared.values() if one.error]
            known = "nothing"
            if least and min(least) < 100:
                known = f"{min(least):.1f} to {min(max(least), 100):.1f} points, by pair,"
            parts.append(f"{text}where {known} would have been found in 8 of 10 such studies")
    return f"{'; '.join(parts) or 'nothing is compared'}."


def _price(found: Found, drifts: Compared) -> str:
    """Say what is fastest and slowest, and what drifts most, if anything does."""
    cost = {line: found.cost(line, "seconds") for line in found.lines}
    order = sorted(cost, key=lambda line: float(np.median(cost[line])))
    least, most = (f"{spread(cost[line])} s ({line})" for line in (order[0], order[-1]))
    drift = "no slope differs from that of real clips"
    if sure := [each for each in _sure(drifts) if each[2] < LEVEL]:
        (line, name), one, _ = min(sure, key=lambda each: each[1].p)
        drift = f"{len(sure)} of {len(drifts)} slopes differ from those of real clips, most surely"
        drift += f" {name} of {line}, by {one.change.times(1000):.1f} thousandths per second"
    return f"A second of video took {least} at least and {most} at most; {drift}."


def _videos(folder: Path, found: Found) -> list[Json]:
    """Return the videos that are kept: of each prompt, those of every line."""
    lines, kept = {CLEAN: [CLEAN], CODEC: [CODEC]} | dict(found.lines), list[Json]()
    while all((folder / video_of(names[0], len(kept))).exists() for names in lines.values()):
        row, index = Json(), len(kept)
        prompt = found.entries[CLEAN]["videos"][index]["prompt"]
        for line, (name, *_) in lines.items():
            entry, file = found.entries[name], video_of(name, index)
            video = entry["videos"][index]
            row[line] = {key: video[key] for key in ("scores", "nearest") if key in video}
            row[line]["file"] = file
            row[line] |= {"units": entry["settings"]["units"]} if line in found.lines else {}
        kept.append({"prompt": prompt, "lines": row})
    return kept
