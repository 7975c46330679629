"""Plots of a study, as SVG: they need matplotlib, of the extra `report`; without it are none."""

import io
import itertools
from collections import defaultdict

import numpy as np

from videoar.checks import Report, import_extra
from videoar.evaluation.metrics import bootstrap_interval
from videoar.evaluation.statistics import CHIEF, Found
from videoar.evaluation.tables import CODEC

MISSING = (
    "there are no plots, as matplotlib is missing ({}): pip install -e '.[report]' in the clone"
)
CURVES = (CHIEF, "brightness", "contrast", "sharpness")
Points = dict[str, list[tuple[float, ...]]]
"""Of lines by name: x, y, and the ends of its interval."""
STYLE = {"svg.hashsalt": "videoar", "svg.fonttype": "path", "font.size": 9}


def draw(found: Found, say: Report) -> dict[str, str]:
    """Return the plots of a study by name, as SVG."""
    try:
        matplotlib = import_extra("matplotlib", MISSING)
    except ValueError as error:
        say(str(error))
        return {}
    with matplotlib.rc_context(STYLE):
        plots = {"quality": _costs(found), "drift": _curves(found), "context": _context(found)}
        return {name: _figure(panels) for name, panels in plots.items() if panels}


def _figure(panels: dict[str, Points]) -> str:
    """Draw panels beside each other: curves with bands, or points with bars where they are few."""
    figure_of = import_extra("matplotlib.figure", MISSING).Figure
    figure = figure_of(figsize=(4 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, points in lines.items():
            x, y, low, high = np.array(sorted(points)).T
            if len(x) > 8:
                axis.plot(x, y, label=name)
                axis.fill_between(x, low, high, alpha=0.15)
            else:
                bars = np.abs([y - low, high - y])
                axis.errorbar(x, y, bars, label=name, marker="o", capsize=2, alpha=0.8)
        below, _, beside = title.partition(": ")
        axis.set(xlabel=below, ylabel=beside)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _of_all(found: Found, line: str, name: str = CHIEF, key: str = "scores") -> tuple[float, ...]:
    """Return a mean over prompts with its interval."""
    return tuple(vars(bootstrap_interval(found.sides(line, key)[name].mean(0))).values())


def _costs(found: Found) -> dict[str, Points]:
    """Return quality against passes and against seconds."""
    panels: dict[str, Points] = defaultdict(lambda: defaultdict(list))
    read = CHIEF in found.sides(CODEC)
    for line, name in itertools.product(found.lines if read else (), ("passes", "seconds")):
        kind, x = found.samples(line)[0]["settings"]["units"], np.median(found.cost(line, name))
        y = (100 * value for value in _of_all(found, line))
        panels[f"{name} per second of video: all right, %"][kind].append((float(x), *y))
    return panels


def _curves(found: Found) -> dict[str, Points]:
    """Return values over time with bands, of what has some."""
    panels: dict[str, Points] = defaultdict(dict)
    known = [name for name in CURVES if name in found.entries[CODEC]["videos"][0]["curves"]]
    for line, name in itertools.product((CODEC, *found.lines), known):
        settings = found.samples(line)[0]["settings"]
        videos = [video for sample in found.samples(line) for video in sample["videos"]]
        values = np.array([video["curves"][name] for video in videos])
        if values.shape[1] < 2:
            continue
        count = settings["num_prompts"]
        # Scenes differ more than anything that drifts: each video begins at nought.
        prompts = (values - values[:, :1]).reshape(-1, count, values.shape[1]).mean(0)
        wide = 1.96 * prompts.std(0, ddof=1) / np.sqrt(count)
        seconds = settings["num_frames"] / settings["fps"]
        times = (np.arange(len(wide)) + 0.5) * seconds / len(wide)
        mean = prompts.mean(0)
        points = zip(times, mean, mean - wide, mean + wide, strict=True)
        panels[f"seconds: change of {name}"][line] = [tuple(map(float, point)) for point in points]
    return panels


def _context(found: Found) -> dict[str, Points]:
    """Return quality, drift and cost against the window, if there are several."""
    settings = {line: found.samples(line)[0]["settings"] for line in found.lines}
    widths = {one["window_frames"] for one in settings.values()}
    if len(widths) < 2:
        return {}
    panels: dict[str, Points] = defaultdict(lambda: defaultdict(list))
    for line, own in settings.items():
        window = own["window_frames"] or 2 * max(width or 0 for width in widths)
        kind = f"{own['units']}, sink {own['sink_frames']}"
        values = {"all right": _of_all(found, line)} if CHIEF in found.sides(line) else {}
        if "contrast" in found.sides(line, "slopes"):
            values["contrast per second"] = _of_all(found, line, "contrast", "slopes")
        for panel, name in {"seconds per second": "seconds", "cache, bytes": "cache"}.items():
            cost = found.cost(line, name)
            values[panel] = float(np.median(cost)), min(cost), max(cost)
        for panel, each in values.items():
            panels[f"window, latent frames: {panel}"][kind].append((window, *each))
    return panels
