"""Odd inputs, thousands of them, to commands, files and functions: `fuzz.py SEED COUNT`.

Prints what ended otherwise than it may, and how many were tried. It runs without the checks of
types that tests have, as users do: `tests/cli/test_fuzz.py` starts it in a process of its own.
"""

import contextlib
import dataclasses
import functools
import io
import json
import linecache
import math
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny import CODEC, MODEL, SCHEMES, TEXT, tiny_pipeline

from videoar import VideoPipeline
from videoar.checkpoints.checkpoint import Checkpoint
from videoar.cli.main import COMMANDS, main
from videoar.cli.progress import say
from videoar.core.flow import sigma_steps
from videoar.core.loss import FlowMatchingConfig
from videoar.core.schemes import parse
from videoar.core.units import Units, Visible
from videoar.data.latents import LatentShards, LatentsInfo, ShardWriter
from videoar.data.options import Prepare
from videoar.data.sources import list_sources
from videoar.data.video import Video, read_video
from videoar.generation.conditioning import read_clip, read_image
from videoar.generation.config import GenerationConfig
from videoar.training import recipes
from videoar.training.distillation.objectives import DistillationConfig
from videoar.weights import read_weights

SECONDS = 20
HUGE = "9" * 400
# On a command line. What is large and right takes long: none of these is.
WORDS = (
    *("", " ", "-1", "0", "1", "2", "3.5", "nan", "-inf", "1e400", "x", "None", "True", "null"),
    *(
        "\udcff\udc80",
        "\U0001f600",
        "é",
        "a\nb",
        "\t",
        "--",
        "-",
        "--help",
        "[]",
        "{}",
        "1,2",
    ),
    *(
        "frame",
        "chunk:2",
        "chunk:0",
        "cube:1x2x2/x",
        "multiscale:4,2,1",
        "a:B",
        "os:path",
        "=",
        "#",
    ),
    *("99999999999999999999", HUGE, "a" * 3000, "NO/SUCH", "toy", "tiny", "/dev/null", "."),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3.5, 1e300, math.nan, math.inf, -math.inf, 10**30, int(HUGE)),
    *(
        "",
        "x",
        "toy",
        "frame",
        "\udcff",
        "\x00",
        "a" * 3000,
        b"x",
        Path("x"),
        Path("tiny"),
        object(),
    ),
    *((), [], {}, (1, 2), [None], {"a": 1}, {1}, range(3), int, len, 1j, ...),
    *(
        np.int64(3),
        np.float32(0.5),
        np.array([1, 2]),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.bool_(1),
    ),
    *(torch.tensor(3), torch.zeros(2, 2), torch.float32, torch.float16, parse("frame")),
)
JSON = (None, True, 0, -1, 3, 1e300, math.nan, "", "x", "\ud800", [], {}, [1], {"a": 1}, 10**30)
DATA = ("tiny", "latents")
LARGE = {"num_frames", "seconds", "long_seconds", "uncached_seconds", "repeats", "num_prompts"}
LARGE |= {"steps", "seeds", "num_inference_steps", "long_prompts", "threads", "num_threads"}
"""Options whose large values are right, and take long."""
BYTES = {
    "empty": b"",
    "page": b"<!DOCTYPE html><html>sign in</html>",
    "gguf": b"GGUF\x03\0\0\0" + bytes(60),
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "pickle": b"\x80\x04cos\nsystem\n.",
    "zip": b"PK\x03\x04" + bytes(50),
    "header": (2**40).to_bytes(8, "little") + b"{}",
    "text": b"hello\n",
    "latin": b"caf\xe9\n",
    "array": b"[1, 2]",
    "deep": b"[" * 100_000,
    "object": b"{}",
    "null": b"null",
    "rows": b'{"file_name": 3, "text": []}\n[]\n{"file_name": "../a.mkv", "text": "x"}\n',
    "table": b"a;b\n1;2\n",
}
ENDINGS = ".safetensors .pt .pth .bin .json .jsonl .csv .mp4 .mkv .gif .webp .png .jpg".split()
ENDINGS += ".tar .txt .gguf".split()
GOOD = ("good.mkv", "good.mp4", "good.png", "good.gif", "good.tar")
GOOD += ("tiny/transformer/model.safetensors", "tiny/codec/model.safetensors")
TRAINING = "data.path task.units task.flow.shift optimizer.learning-rate seed task.init batch_size"
TRAINING += " accumulate device precision task.model"


def prepare() -> None:
    """Write into the current folder what is right, and can be spoiled."""
    pipe = tiny_pipeline()
    pipe.height = pipe.width = 32
    pipe.save_pretrained("tiny")
    frames = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
    for folder in ("videos", "nothing", "odd"):
        Path(folder).mkdir()
    for suffix in (".mkv", ".mp4", ".gif", ".png"):
        Video(frames=frames, fps=16).save(f"good{suffix}")
    Path("videos/metadata.jsonl").write_text('{"file_name": "a.mkv", "text": "a ball"}\n')
    with tarfile.open("good.tar", "w") as tar:
        tar.add("good.mkv", "a.mkv")
    info = LatentsInfo.of(pipe.codec, fps=16.0)
    with ShardWriter(Path("latents"), info=info) as writer:
        for number in range(4):
            writer.add(torch.randn(5, 4, 4, 4), captions=[f"a ball {number}"])
    for name, content in BYTES.items():
        Path(f"odd/{name}").write_bytes(content)


class Late(BaseException):
    """A call takes too long; no command may take it for an error of its own."""


class Fuzz:
    """Draws inputs, tries them, and keeps what failed."""

    def __init__(self, seed: int) -> None:
        self.rng, self.failed, self.tried = random.Random(seed), list[str](), dict[str, int]()
        self.pipe = VideoPipeline.from_pretrained("tiny")
        configs = (GenerationConfig, FlowMatchingConfig, DistillationConfig)
        ready = [kind() for kind in configs] + [MODEL, TEXT, CODEC, recipes.find("toy").optimizer]
        for recipe in recipes.RECIPES.values():
            ready += [recipe(), recipe().task]
        ready += [Prepare(videos=Path("videos"), latents=Path("x"))]
        self.configs: list[Any] = ready

    # ------------------------------------------------------------ files

    def file(self) -> Path:
        """Return a file that is odd in one way."""
        rng = self.rng
        name = rng.choice([*(f"odd/{name}" for name in BYTES), *GOOD])
        data = bytearray(Path(name).read_bytes())
        for _ in range(rng.randint(0, 3)):
            if data and rng.random() < 0.5:
                del data[rng.randrange(len(data)) :]
            elif data:
                data[rng.randrange(min(len(data), 300))] = rng.randrange(256)
        suffix = Path(name).suffix if rng.random() < 0.6 else ""
        target = Path(f"odd/file{rng.randrange(10**6)}{suffix or rng.choice(ENDINGS)}")
        target.write_bytes(data)
        return target

    def folder(self, source: str) -> Path:
        """Return a copy of a folder with something spoiled in it."""
        rng, target = self.rng, Path(f"odd/folder{self.rng.randrange(10**6)}")
        shutil.copytree(source, target)
        files = sorted(file for file in target.rglob("*") if file.is_file())
        file = rng.choice(files)
        how = rng.random()
        if how < 0.1:
            file.unlink()
        elif how < 0.2:
            file.write_bytes(self.file().read_bytes())
        elif how < 0.3:
            file.unlink()
            file.mkdir()
        elif file.suffix == ".safetensors":
            tensors = load_file(file)
            key = rng.choice(sorted(tensors))
            changes: list[Callable[[], Any]] = [
                lambda: tensors.pop(key),
                lambda: tensors.update({key: tensors[key].flatten()[:1].clone()}),
                lambda: tensors.update({key: tensors[key].to(torch.int8)}),
                lambda: tensors.update({key: tensors[key].to(torch.float64)}),
                lambda: tensors.update({key: tensors[key] * math.nan}),
                lambda: tensors.update({key: tensors[key][None].clone()}),
                lambda: tensors.update({"more": torch.zeros(1)}),
                lambda: tensors.update({k: x.to(torch.int8) for k, x in tensors.items()}),
                lambda: tensors.update({k: x.half() for k, x in tensors.items()}),
            ]
            rng.choice(changes)()
            save_file(tensors, file)
        else:
            lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
            with contextlib.suppress(ValueError):
                place = rng.randrange(len(lines))
                lines[place] = json.dumps(self.spoil(json.loads(lines[place])))
                file.write_text("\n".join(lines))
        return target

    def spoil(self, value: Any) -> Any:
        """Return JSON in which something is another thing."""
        rng = self.rng
        if isinstance(value, dict) and value and rng.random() < 0.85:
            key = rng.choice(sorted(value))
            if rng.random() < 0.1:
                return {k: v for k, v in value.items() if k != key}
            return value | {key: self.spoil(value[key])}
        if isinstance(value, list) and value and rng.random() < 0.6:
            place = rng.randrange(len(value))
            return [*value[:place], self.spoil(value[place]), *value[place + 1 :]]
        return rng.choice(JSON)

    # ------------------------------------------------------------ commands

    def command(self) -> tuple[str, list[str]]:
        """Return a command line that is nearly right."""
        rng = self.rng
        out = f"odd/out{rng.randrange(10**6)}"
        run = ["--data.path", "latents", "--out", out, "--export", "--task.units", "frame"]
        lines: dict[str, list[str]] = {
            "generate": ["a ball", "--model", "tiny", "--num-frames", "2", "--out", f"{out}.mkv"],
            "units": [rng.choice(SCHEMES), "--frames", "2"],
            "info": ["tiny"],
            "convert": ["tiny", out],
            "prepare": ["nothing", out, "--codec", "tiny"],
            "train": ["finetune", "--task.init", "tiny", *run],
            "distill": ["toy-dmd", "--task.teacher", "tiny", "--task.student", "tiny", *run],
            "evaluate": ["tiny", "--num-prompts", "0"],
            "evaluate heldout": ["tiny", "--data", "latents"],
            "study": ["checkpoints", "--checkpoint", "tiny", "--num-prompts", "0"],
            "bench": ["tiny", "--repeats", "0"],
        }
        weights = [6, 5, 4, 3, 4, 4, 2, 2, 2, 2, 1]
        (name,) = rng.choices(list(lines), weights)
        words = lines[name]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            options = [f.name for f in dataclasses.fields(COMMANDS[name][0]) if f.name not in LARGE]
            if name in ("train", "distill"):
                options += TRAINING.split()
            way = rng.random()
            if way < 0.55:
                words += [f"--{rng.choice(options).replace('_', '-')}", self.word()]
            elif way < 0.75 and words:
                words[rng.randrange(len(words))] = self.word()
            elif way < 0.85 and words:
                del words[rng.randrange(len(words))]
            else:
                words.insert(rng.randint(0, len(words)), self.word())
        return name, [*name.split(), *words]

    def word(self) -> str:
        rng = self.rng
        if rng.random() < 0.25:
            spoilt = self.file() if rng.random() < 0.5 else self.folder(rng.choice(DATA))
            return str(spoilt)
        return rng.choice(WORDS)

    def run_command(self) -> None:
        name, words = self.command()
        out, err = io.StringIO(), io.StringIO()

        def call() -> None:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(words)
            said = err.getvalue()
            lines = [line for line in said.splitlines() if line.startswith("videoar: error: ")]
            right = code == 0 or (code == 2 and len(lines) == 1) or (code == 1 and "finite" in said)
            if not right or "Traceback" in said:
                raise AssertionError(f"code {code}: {said[-300:]}")
            if os.environ.get("SHOW") and lines:
                say(lines[0][:240])

        self.attempt(f"command {name}", call, words, strict=False)

    # ------------------------------------------------------------ functions

    def value(self) -> Any:
        """Return something that few functions take."""
        return self.rng.choice(VALUES) if self.rng.random() < 0.9 else self.file()

    def odd(self, **known: Any) -> dict[str, Any]:
        """Return arguments, one or two of which are odd."""
        names = self.rng.sample(sorted(known), self.rng.choice((1, 1, 2)))
        return known | {name: self.value() for name in names}

    def functions(self) -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
        """Yield functions with odd arguments."""
        rng, pipe, odd, value, file = self.rng, self.pipe, self.odd, self.value, self.file
        sampling = {k: v for k, v in vars(pipe.sampling).items() if k != "num_inference_steps"}
        given = odd(prompt="a ball", seed=0, image=None, video=None, **sampling)
        small = {"num_inference_steps": 1, "num_frames": 2}
        yield "pipe", pipe, given | small
        numbers = (*(v for v in VALUES if not isinstance(v, int | float)), 0, -1, math.nan, 2.5)
        yield "length", pipe, {"prompt": "a ball", "num_frames": rng.choice(numbers)}
        given = odd(prompts=["a", "b"], seeds=[0, 1], latents=None)
        yield "generate", pipe.generate, given | small
        yield "parse", parse, {"text": value()}
        lattice = odd(scheme=parse(rng.choice(SCHEMES)), frames=2, height=2, width=2)
        yield "Units", lambda **given: Units(**given).coords, lattice
        yield "Visible", Visible, odd(window=3, sink=1)
        config = rng.choice(self.configs)
        given = odd(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
        yield "config", type(config), given
        name = rng.choice([file, value, lambda: self.folder("tiny")])()
        yield "fingerprint", lambda name: Checkpoint.find(name).fingerprint(), {"name": name}
        for reader in (read_weights, read_video, read_image):
            yield (
                reader.__name__,
                reader,
                {"_": rng.choice((file(), file(), Path("odd"), Path("NO")))},
            )
        clip = {"fps": 16, "seconds": None, "height": 32, "width": 32, "fit": "crop"}
        yield "read_clip", read_clip, {"path": file()} | clip
        given = odd(base=None, lora=None, codec=None, preset=None, dtype=None, device="cpu")
        yield "from_pretrained", VideoPipeline.from_pretrained, {"name_or_path": "tiny"} | given
        yield "checkpoint", self.generate, {"folder": self.folder("tiny")}
        yield "latents", self.read_latents, {"folder": self.folder("latents")}
        pixels = np.zeros((2, 8, 8, 3), np.uint8)
        yield "Video", Video, odd(frames=pixels, fps=16.0)
        yield "save", Video(frames=pixels, fps=1).save, {"path": value()}
        steps = rng.choice([v for v in VALUES if not isinstance(v, int) or v < 10])
        yield "sigmas", sigma_steps, {"num_inference_steps": steps, "shift": value()}
        yield "sources", self.read_sources, {}

    def generate(self, folder: Path) -> None:
        pipe = VideoPipeline.from_pretrained(folder)
        pipe("a ball", num_frames=1, num_inference_steps=1, units="frame")

    def read_latents(self, folder: Path) -> None:
        shards = LatentShards(folder)
        shards.get(list(range(len(shards)))[:1], np.random.default_rng(0))
        _ = shards.kinds, shards.size, shards.captions, shards.fingerprint()

    def read_sources(self) -> None:
        folder = Path(f"odd/sources{self.rng.randrange(10**6)}")
        folder.mkdir()
        for _ in range(3):
            file = self.file()
            names = (file.name, "metadata.jsonl", "metadata.csv", "a.txt", "a.tar", "a.mkv")
            shutil.copyfile(file, folder / self.rng.choice(names))
        list_sources(folder, captions="auto")

    # ------------------------------------------------------------ verdicts

    def attempt(self, kind: str, call: Callable[[], Any], about: Any, *, strict: bool) -> None:
        """Try a call, and keep it if it ends otherwise than with a result or a sentence."""
        self.tried[kind] = self.tried.get(kind, 0) + 1
        why = ""

        def late(*_: object) -> None:
            raise Late(f"takes longer than {SECONDS} s")

        signal.signal(signal.SIGPROF, late)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of computing: others may use the cores
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
        except (Exception, Late) as error:
            if not (strict and is_sentence(error)):
                place = traceback.extract_tb(error.__traceback__)[-4:]
                where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(place))
                why = f"{type(error).__name__}: {error!s:.200} [{where}]"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if why:
            self.failed.append(f"{kind}: {why}\n    {about!r:.300}")


DOCUMENTED = (ValueError, TypeError, OSError, FloatingPointError)


def is_sentence(error: BaseException) -> bool:
    """Say whether an error is of a documented kind, and was raised on purpose, with a remedy."""
    if not isinstance(error, DOCUMENTED) or isinstance(error, UnicodeError) or not str(error):
        return False
    if isinstance(error, OSError) and error.filename is not None:
        return True
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    ours = "/videoar/" in frame.filename and line.startswith("raise")
    said = ("argument", "expected str, bytes or os.PathLike")  # Python says so itself
    called = isinstance(error, TypeError) and any(part in str(error) for part in said)
    return ours or called


def fuzz(seed: int, count: int) -> Fuzz:
    """Try so many inputs in the current folder."""
    prepare()
    run = Fuzz(seed)
    while sum(run.tried.values()) < count:
        for kind, function, given in run.functions():
            call = functools.partial(function, **given)
            run.attempt(kind, call, given, strict=True)
        for _ in range(8):
            run.run_command()
    return run


if __name__ == "__main__":
    torch.set_num_threads(1)
    seed, count = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        os.environ["HOME"], os.environ["HF_HUB_OFFLINE"] = scratch, "1"
        done = fuzz(seed, count)
    for line in done.failed:
        say(line)
    say(f"{len(done.failed)} of {sum(done.tried.values())} failed: {done.tried}")
    sys.exit(bool(done.failed))
