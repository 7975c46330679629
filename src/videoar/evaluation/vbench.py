"""VBench (Huang et al. 2024, arXiv:2311.17982): its prompts, its scores, tables with intervals.

The package has old pins, so it is asked in an environment of its own; nothing of it is copied. A
run is a folder: `vbench.json` says how its `videos` were made, and `scores` has a file for each
dimension beside what VBench wrote.
"""

import json
import shutil
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from videoar.checks import Report, check, explained, hint
from videoar.evaluation.metrics import bootstrap_interval
from videoar.evaluation.options import Suite, VBench, VBenchScore, VBenchTable
from videoar.evaluation.tables import cells, markdown
from videoar.files import Json, write_json

PROTOCOL, VIDEOS, SCORES = "vbench.json", "videos", "scores"
FLICKER = "temporal_flickering"
PARTS: dict[str, dict[str, Json]] = json.loads(
    Path(__file__).with_suffix(".json").read_text("utf-8")
)
"""Of the sums, by `scripts/constant.py` of Vchitect/VBench at 7975661: the scores that count as 0
and as 1, the weight; and what VBench downloads for it."""
DIMENSIONS = PARTS["quality"] | PARTS["semantic"]
PROMPT_STRIDE = 100_000
"""From the seed of a prompt to that of the next, as the team made the videos of Wan: issue 163 of
Vchitect/VBench. Its `prompts/README.md` fixes no seeds, but wants them to be known."""

FIND = """from importlib import metadata, util
print(util.find_spec("vbench").submodule_search_locations[0], metadata.version("vbench"), sep="|")
"""
FILTER = "from vbench.cli.vbench import main; main()"
SCORE = """import sys, torch, vbench
device, info, out, videos, name = sys.argv[1:]
vbench.VBench(torch.device(device), info, out).evaluate(videos, name, dimension_list=[name])
"""


def suite(config: Suite) -> tuple[list[Json], Json]:
    """Return what `generate --prompts` takes, a row for each video, and the protocol so far.

    Names are `{prompt}-{index}.mp4`. Of prompts that differ in case alone or not at all the last
    one is made: with the team its videos overwrote those before (issue 58 of Vchitect/VBench).
    """
    entries, path = _listed(config)
    prompts, told = [entry["prompt_en"] for entry in entries], "as they are"
    if config.extended is not None:
        told = f"extended by {hash_of(config.extended)}"
        lines = config.extended.read_text("utf-8-sig").rstrip().split("\n")
        prompts = [line.strip() for line in lines]
        fits = len(prompts) == len(entries)
        check(f"lines of {config.extended}", len(prompts), fits, f"{len(entries)}, as of {path}")
    rows, counts = dict[str, list[Json]](), Counter[str]()
    for i, (entry, prompt) in enumerate(zip(entries, prompts, strict=True)):
        own = set(entry["dimension"]) & set(config.dimensions or DIMENSIONS)
        few = {name for name in own if config.limit is None or counts[name] < config.limit}
        counts.update(own)
        if few:
            first, files = config.seed + PROMPT_STRIDE * i, enumerate(_names(entry, FLICKER in few))
            made = [{"prompt": prompt, "name": file, "seed": first + j} for j, file in files]
            rows[entry["prompt_en"].casefold()] = made
    seeds = f"{PROMPT_STRIDE} * prompt + video + {config.seed}"
    about = {"list": hash_of(path), "prompts": told, "seeds": seeds}
    return [row for made in rows.values() for row in made], about


def score(config: VBenchScore, report: Report) -> str:
    """Have VBench score every dimension that it can, and return the table.

    What is scored already is kept, unless its videos are others by now.
    """
    folder = config.folder.expanduser().absolute()
    (_, version), (entries, info) = _package(config.python), _listed(config)
    (folder / SCORES).mkdir(exist_ok=True)
    for name in config.dimensions or DIMENSIONS:
        still = config.static_filter and name == FLICKER
        own = {entry["prompt_en"]: entry for entry in entries if name in entry["dimension"]}
        files = [folder / VIDEOS / file for one in own.values() for file in _names(one, still)]
        sizes = {file.name: file.stat().st_size for file in files if file.is_file()}
        about: Json = {"sizes": sizes, "prompts": len(own), "still": still}
        target = folder / SCORES / f"{name}.json"
        if target.is_file() and about.items() <= json.loads(target.read_text("utf-8")).items():
            report(f"{name} is scored already")
        elif not sizes:
            report(f"{name} is not scored: there is none of its videos in {folder / VIDEOS}")
        else:
            report(f"{name}: {len(sizes)} of {len(files)} videos are there")
            try:
                found = _score(config, folder, info.absolute(), name, still=still)
                write_json(target, about | found | {"by": f"vbench {version} on {config.device}"})
            except ValueError as error:
                report(f"{name} is not scored: {error}")
    return table(VBenchTable(folder=config.folder))


def _score(config: VBenchScore, folder: Path, info: Path, name: str, *, still: bool) -> Json:
    """Run VBench on a dimension: its score, and those of the videos.

    Raises:
        ValueError: there is none; why, in a sentence.
    """
    out, videos = folder / SCORES, folder / VIDEOS
    log, apart, runs = out / f"{name}.log", out / "still", list[list[Any]]()
    if still:
        shutil.rmtree(apart, ignore_errors=True)
        runs = [[FILTER, "static_filter", "--videos_path", videos, "--result_path", apart]]
        videos = apart / "filtered_videos"
    for words in (*runs, [SCORE, config.device, info, out, videos, name]):
        command = list(map(str, [config.python, "-c", *words]))
        late = f"{config.timeout:g} s were too few, raise --timeout"
        try:
            with explained(late, subprocess.TimeoutExpired), log.open("wb") as file:
                how: Any = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
                subprocess.run(command, timeout=config.timeout, check=True, **how)
        except subprocess.CalledProcessError as error:
            last = log.read_text("utf-8", "replace").strip().rpartition("\n")[-1].strip()
            needs = f"it needs the weights {DIMENSIONS[name]['files']}"
            raise ValueError(f"{last}; {needs}; all that was said is in {log}") from error
    value, videos = json.loads((out / f"{name}_eval_results.json").read_text("utf-8"))[name]
    scores = [(Path(video["video_path"]).name, float(video["video_results"])) for video in videos]
    if not scores:
        raise ValueError(f"VBench could read none of the videos, see {log}")
    return {"value": value, "scores": scores}


def table(config: VBenchTable) -> str:
    """Return scores in %, with 95 % bootstrap intervals over prompts, and the protocol.

    Dimensions are as VBench gives them. In quality, semantic and total each is brought to 0 to 1
    and weighted as in `scripts/cal_final_score.py` of Vchitect/VBench at 5ebbf0b; they are there
    only if all their dimensions are.
    """
    folders = [config.folder, *([] if config.against is None else [config.against])]
    runs = {str(folder): _read(folder.expanduser()) for folder in folders}
    columns = {run: scores for run, (scores, _) in runs.items()}
    if len(columns) == 2:
        first, second = columns.values()
        both = [name for name in first if name in second]
        minus = {name: _sum((1, 0, first[name]), (-1, 0, second[name])) for name in both}
        columns["difference"] = minus  # in pairs, as far as their prompts are the same
    rows = [
        {"in %": name.replace("_", " ")} | {run: s.get(name, "-") for run, s in columns.items()}
        for name in (*DIMENSIONS, *PARTS)
        if any(name in scores for scores in columns.values())
    ]
    lines = [
        {"protocol": key} | {run: about.get(key, "not known") for run, (_, about) in runs.items()}
        for key in dict.fromkeys(key for _, about in runs.values() for key in about)
    ]
    text = [markdown(cells(rows)), markdown(cells(lines))]
    for run, (scores, _) in runs.items():
        left = [name.replace("_", " ") for name in DIMENSIONS if name not in scores]
        text += [f"{run} has no total without {', '.join(left)}."] if left else []
    return "\n\n".join(text)


@dataclass(frozen=True)
class Score:
    """A score, or a sum of scores, and how far each prompt pulls it; the pulls sum to 0."""

    value: float
    pulls: dict[str, float]
    of: str = ""

    def __str__(self) -> str:
        count = len(self.pulls)
        if count < 2:
            return f"{100 * self.value:z.2f}{self.of}"
        # The mean of these is the score; drawing them draws a prompt in all parts of the sum.
        found = bootstrap_interval([self.value + count * pull for pull in self.pulls.values()])
        return f"{found.times(100):.2f}{self.of}"


def _sum(*parts: tuple[float, float, Score]) -> Score:
    """Return the sum of weights times what scores are above a floor, with the pulls of prompts."""
    value, pulls = 0.0, defaultdict[str, float](float)
    for weight, low, score in parts:
        value += weight * (score.value - low)
        for prompt, pull in score.pulls.items():
            pulls[prompt] += weight * pull
    spread = all(len(score.pulls) > 1 for *_, score in parts)
    return Score(value, pulls if spread else {})


def _read(folder: Path) -> tuple[dict[str, Score], Json]:
    """Read a run: scores and their sums, and the protocol."""
    files = {name: folder / SCORES / f"{name}.json" for name in DIMENSIONS}
    held = {k: json.loads(file.read_text("utf-8")) for k, file in files.items() if file.is_file()}
    if not held:
        raise ValueError(f"{folder} holds no scores of VBench: `videoar vbench score` makes them")
    scores = dict[str, Score]()
    for name, one in held.items():
        values = defaultdict[str, list[float]](list)
        for video, value in one["scores"]:
            # VBench gives the quality of the pictures of a video in hundredths.
            values[video.rpartition("-")[0]] += [value / (100 if name == "imaging_quality" else 1)]
        count, whole = sum(map(len, values.values())), sum(map(sum, values.values()))
        pulls = {k: (sum(own) - whole / count * len(own)) / count for k, own in values.items()}
        of = f" ({count} videos, {len(values)} of {one['prompts']} prompts)"
        scores[name] = Score(one["value"], pulls, of)
    for whole, parts in PARTS.items():
        if parts.keys() <= scores.keys():
            weights = sum(part["weight"] for part in parts.values())
            shares = [p["weight"] / weights / (p["high"] - p["low"]) for p in parts.values()]
            lows = [part["low"] for part in parts.values()]
            own = [scores[name] for name in parts]
            scores[whole] = _sum(*zip(shares, lows, own, strict=True))
    about = json.loads(path.read_text("utf-8")) if (path := folder / PROTOCOL).is_file() else {}
    about["scored by"] = ", ".join({one["by"]: None for one in held.values()})
    if FLICKER in held:  # published scores are of still videos
        about["static filter"] = "yes" if held[FLICKER]["still"] else "no"
    return scores, about


def _listed(config: VBench) -> tuple[list[Json], Path]:
    """Read VBench's list of prompts, and say which file it is."""
    for name in config.dimensions:
        right = f"{', '.join(DIMENSIONS)}{hint(name, DIMENSIONS)}"
        check("a dimension", name, name in DIMENSIONS, right)
    path = config.info or Path(_package(config.python)[0], "VBench_full_info.json")
    says = f"{path} holds no prompts of VBench: name its full info"
    with explained(says, ValueError, KeyError, TypeError, AssertionError):
        entries = json.loads(path.read_text("utf-8"))
        assert all(isinstance(entry["prompt_en"], str) and entry["dimension"] for entry in entries)
    return entries, path


def _package(python: Path) -> list[str]:
    """Find the folder and the version of VBench in an environment, without importing it."""
    done = subprocess.run([python, "-c", FIND], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"{python} has no vbench: `pip install vbench` into an environment of Python 3.10 or"
            " 3.11, and name its interpreter by --python"
        )
    return done.stdout.strip().split("|")


def _names(entry: Json, flickering: bool) -> list[str]:
    """Return the names of the videos of a prompt."""
    return [f"{entry['prompt_en']}-{j}.mp4" for j in range(25 if flickering else 5)]


def hash_of(path: Path) -> str:
    """Return the name of a file, and a hash of what is in it."""
    return f"{path.name} {sha256(path.read_bytes()).hexdigest()[:16]}"
