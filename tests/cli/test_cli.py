"""The command line: what users type, what they read, what is refused, and the pictures it draws."""

import dataclasses
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SCHEMES, TEXT, tiny_pipeline
from torch import nn

from videoar.cli import options
from videoar.cli.generate import generate, loaded, make
from videoar.cli.main import COMMANDS, main, parse
from videoar.core import cache
from videoar.data.batches import Batches
from videoar.data.video import read_video
from videoar.encoders.text_encoder import TextEncoder, TinyPromptEncoder
from videoar.generation.progress import Paced, Progress, how_far
from videoar.generation.timing import Timing
from videoar.training.loop import TrainConfig
from videoar.training.objectives import Objective
from videoar.training.optimizer import OptimizerConfig
from videoar.training.recipes import RECIPES
from videoar.training.run_folder import Report

Run = Callable[..., tuple[int, str, str]]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

SAMPLING = (
    "base lora preset dtype units seconds num_frames model codec codec_dtype height width device "
    "offload graphs compile num_inference_steps first_steps shift guidance_scale negative_prompt "
    "window sink lag threads force share"
)
FROZEN = {
    "generate": f"{SAMPLING} prompt prompts num_videos_per_prompt prompt_at script recompute image "
    "video keep fit seed out save_state resume",
    "serve": "base lora preset dtype model host port sessions device graphs compile threads",
    "train": "recipe list export",
    "distill": "recipe list export",
    "convert": "base lora preset dtype source target format force",
    "info": "base lora preset dtype checkpoint seconds window",
    "units": "schemes frames height width model window sink steps first_steps schedule search "
    "clips draws",
    "prepare": "videos latents codec captions fps num_frames stride sizes scene_cut picture_fps "
    "held_out timeout workers device share",
    "bench": "checkpoint shape layers units prompt seconds num_inference_steps repeats threads out",
    "evaluate": "seed batch_size judge footage nearest out share checkpoint units num_prompts "
    "seconds num_inference_steps shift guidance_scale",
    "evaluate heldout": "checkpoints data units seed out",
    "study": "seed batch_size judge footage nearest out share design checkpoint quick units "
    "num_prompts seeds seconds",
    "vbench prompts": "python info dimensions extended limit seed",
    "vbench generate": f"python info dimensions extended limit seed {SAMPLING} folder",
    "vbench score": "python info dimensions folder device timeout static_filter",
    "vbench table": "folder against",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny checkpoint that takes prompts of 96 tokens."""
    pipe = tiny_pipeline()
    encoder = TextEncoder(dataclasses.replace(TEXT, max_tokens=96)).eval()
    pipe.prompt_encoder = TinyPromptEncoder(pipe.prompt_encoder.tokenizer, encoder)
    return str(pipe.save_pretrained(tmp_path_factory.mktemp("checkpoints") / "tiny"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder: its exit code, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run_command(*words: str) -> tuple[int, str, str]:
        code = main(words)
        return code, *capsys.readouterr()

    return run_command


# ---------------------------------------------------------------- what can be typed


def test_commands_and_options_are_frozen() -> None:
    """A name that users type does not change by accident; their scripts would break."""
    names = {
        name: " ".join(field.name for field in dataclasses.fields(kind))
        for name, (kind, _) in COMMANDS.items()
    }
    assert names == FROZEN


def test_help_comes_without_torch() -> None:
    """Help of every command needs neither torch nor numpy; else it would take seconds."""
    code = (
        "import sys; from videoar.cli.main import COMMANDS, main\n"
        "codes = [main([])] + [main([name, '--help']) for name in COMMANDS]\n"
        "assert not {'torch', 'numpy', 'av', 'PIL'} & sys.modules.keys()\n"
        "sys.exit(any(codes))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)
    assert "--num-inference-steps" in done.stdout


def test_every_option_is_explained() -> None:
    """Help without a word on an option makes the user read the source."""
    for kind, _ in COMMANDS.values():
        bases = [base for base in kind.__mro__ if dataclasses.is_dataclass(base)]
        lines = [line for base in bases for line in inspect.getsource(base).splitlines()]
        for name in (field.name for field in dataclasses.fields(kind)):
            (at,) = (k for k, line in enumerate(lines) if line.startswith(f"    {name}:"))
            assert lines[at + 1].startswith('    """'), f"{kind.__name__}.{name}"


def test_the_module_returns_the_exit_code() -> None:
    """`python -m videoar` tells the shell of a failure; else scripts would go on."""
    done = subprocess.run(
        [sys.executable, "-m", "videoar", "generatex", "x"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("videoar: error: unknown command 'generatex'")
    assert "did you mean generate?" in done.stderr
    assert done.stderr.count("\n") == 1


def test_who_stops_reading_gets_no_error() -> None:
    """`videoar train --list | head -1` ends quietly, as other commands do."""
    command = f"{shlex.quote(sys.executable)} -m videoar units {'frame ' * 400} | head -c 1"
    done = subprocess.run(command, shell=True, env=ENVIRONMENT, capture_output=True, text=True)
    assert len(done.stdout) == 1
    assert done.stderr == ""


def test_version(run: Run) -> None:
    """`--version` says which version runs, for reports of errors."""
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("videoar 0.")


# ---------------------------------------------------------------- generate


def test_generate_writes_what_it_reports(run: Run, checkpoint: str) -> None:
    """File, figures and summary tell of the same video; else the printed speed would be fiction."""
    words = [
        "generate", "a red ball", "--model", checkpoint, "--seconds", "1.5", "--units", "chunk:2",
        "--window", "4", "--sink", "2", "--out", "ball.mp4",
    ]  # fmt: skip
    (args,) = parse(words).args
    figures, scheme, _ = make(args)
    video = read_video("ball.mp4")
    assert figures.frames == len(video.frames) == 24
    assert video.fps == 16
    assert figures.video_seconds == 1.5
    assert figures.fps * figures.seconds == pytest.approx(24)
    parts = [figures.model_seconds, figures.decode_seconds, figures.write_seconds]
    assert min(parts) > 0
    assert sum(parts) <= figures.seconds * 1.001
    assert figures.first_frame_seconds < figures.seconds
    assert figures.peak_bytes > 2**24
    # 7 latent frames are 4 units of 2 steps; 2 sink and 2 window frames of 16 tokens are read.
    assert (figures.units, figures.passes, figures.cache_tokens) == (4, 8, 2 * 16)
    assert (scheme, figures.interrupted) == ("chunk:2", False)
    code, out, _ = run(*words, "--force")
    assert code == 0
    assert "24 frames, 1.5 s" in out
    assert "4 units of chunk:2 in 8 passes; up to 32 tokens in the cache" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("generate", "x", "--num-frames", "x"), "--num-frames is x: use a whole number or None"),
        (("train", "codec-toy", "--steps", "x"), "--steps is x: use a whole number"),
        (("train", "codec-toy", "--ema-decay", "x"), "--ema-decay is x: use a number"),
        (("generate", "x", "--dtype", "x"), "--dtype is x: use one of "),
        (("generate", "x", "--lora"), "--lora takes 1: give more"),
        (("prepare",), "nothing is given for VIDEOS, LATENTS"),
    ],
)
def test_what_the_parser_says_is_a_sentence(run: Run, words: tuple[str, ...], said: str) -> None:
    """Its own words were those of Python: invalid literal for int() with base 10."""
    code, _, error = run(*words)
    assert (code, error.startswith(f"videoar: error: {said}")) == (2, True), error
    assert "--help`)" in error


def test_units_that_were_not_trained_are_named(run: Run, tmp_path: Path) -> None:
    """They are allowed: a line says that the model does not know them."""
    pipe = tiny_pipeline()
    pipe.meta = {"units": ["frame", "chunk:2"]}
    folder = str(pipe.save_pretrained(tmp_path / "two"))
    words = ("generate", "a red ball", "--model", folder, "--num-frames", "5", "--force")
    line = "the model is not trained on cube:1x2x2, but on frame, chunk:2\n"
    assert line in run(*words)[2]  # its own default, as a checkpoint may be written by hand
    assert "not trained" not in run(*words, "--units", "chunk:1")[2]


def test_guidance_of_a_distilled_model_is_said_to_be_of_no_use(run: Run, tmp_path: Path) -> None:
    """It is allowed, but such a model has nothing that guidance could lead away from."""
    pipe = tiny_pipeline()
    pipe.sampling = replace(pipe.sampling, step="renoise")
    folder = str(pipe.save_pretrained(tmp_path / "few"))
    words = ("generate", "a ball", "--model", folder, "--num-frames", "5", "--force")
    assert "distilled to sample without" in run(*words, "--guidance-scale", "2")[2]
    assert "distilled" not in run(*words, "--guidance-scale", "1")[2] + run(*words)[2]


def test_words_that_the_model_never_saw_are_named(run: Run, tmp_path: Path) -> None:
    """What it makes of them is chance, whatever it looks like."""
    pipe = tiny_pipeline()
    pipe.meta = {"words": ["a", "ball", "red"]}
    folder = str(pipe.save_pretrained(tmp_path / "few"))
    words = ("--model", folder, "--num-frames", "5", "--force")
    line = "in no caption of the model's training: dog, golden\n"
    assert line in run("generate", "a golden dog", *words)[2]
    assert line in run("generate", "A Red ball!", "--prompt-at", "0.1", "a golden dog", *words)[2]
    assert "in no caption" not in run("generate", "A Red ball!", *words)[2]


def test_a_seed_that_is_drawn_is_said(run: Run, checkpoint: str) -> None:
    """The same video can be made again."""
    line = ("generate", "ball", "--model", checkpoint, "--num-frames", "2", "--out")
    code, out, _ = run(*line, "x.mkv", "--seed", "None")
    (seed,) = re.findall(r"^seed (\d+)$", out, re.MULTILINE)
    assert (code, run(*line, "y.mkv", "--seed", seed)[0]) == (0, 0)
    assert Path("x.mkv").read_bytes() == Path("y.mkv").read_bytes()


def test_generate_repeats_with_the_seed_and_differs_without(run: Run, checkpoint: str) -> None:
    """The seed decides the pixels; a video that cannot be made again cannot be discussed."""
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        words = ("--model", checkpoint, "--num-frames", "9", "--seed", seed)
        assert run("generate", "a ball", *words, "--out", f"{name}.mkv")[0] == 0
    first, again, other = (read_video(f"{name}.mkv").frames for name in "abc")
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def _milliseconds(picture: Image.Image) -> int:
    """Return the length of an animation; equal pictures are stored as one that stays longer."""
    total = 0
    for index in range(picture.n_frames):
        picture.seek(index)
        picture.load()
        total += picture.info["duration"]
    return total


def test_a_second_thread_decodes_and_moves_no_bit(run: Run, checkpoint: str) -> None:
    """A small model leaves it half of the threads; the state is that of one thread, too."""
    words = ("generate", "a red ball", "--model", checkpoint, "--num-frames", "21")
    before = threading.active_count()
    for threads in ("1", "2"):
        code, *_ = run(*words, "--out", f"{threads}.mkv", "--threads", threads)
        assert code == 0
        assert torch.get_num_threads() == 1
    first, second = (read_video(Path(f"{threads}.mkv")) for threads in "12")
    assert np.array_equal(first.frames, second.frames)
    assert threading.active_count() == before


@pytest.mark.parametrize("suffix", ["webp", "gif", "png"])
def test_generate_writes_pictures(run: Run, checkpoint: str, suffix: str) -> None:
    """Formats that are written in one piece get every frame, too."""
    file = Path(f"ball.{suffix}")
    words = ("--model", checkpoint, "--num-frames", "5", "--out", str(file))
    assert run("generate", "a ball", *words)[0] == 0
    with Image.open(file) as picture:
        if suffix == "png":
            assert picture.width > 5 * 64
        else:
            assert _milliseconds(picture) == pytest.approx(5000 / 16, abs=10)


def test_all_of_the_past_can_be_read(run: Run, checkpoint: str) -> None:
    """`--window all` lifts the checkpoint's window; a missing value must not stand for it."""
    cached = []
    for window in ((), ("--window", "all")):
        words = ("--model", checkpoint, "--num-frames", "41", "--units", "frame", *window)
        code, out, _ = run("generate", "a ball", *words, "--force")
        assert code == 0
        cached.append(int(re.search(r"up to (\d+) tokens", out)[1]))
    assert cached == [5 * 16, 10 * 16]


@pytest.mark.parametrize("kind", [options.Generate, options.Serve])
def test_what_changes_nothing_is_said(
    kind: type[Any], checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Graphs are of a card; whichever command asks for them elsewhere is told so."""
    given = {"prompt": "a ball"} if kind is options.Generate else {}
    pipe = loaded(kind(model=checkpoint, graphs=True, **given), "device", "graphs")
    assert pipe.graphs
    assert "--graphs changes nothing on cpu" in capsys.readouterr().out


def test_an_existing_file_is_replaced_only_by_force(run: Run, checkpoint: str) -> None:
    """A video that took an hour is not lost to a second start of the same command."""
    Path("ball.mp4").write_text("precious")
    words = ("generate", "a ball", "--model", checkpoint, "--num-frames", "5", "--out", "ball.mp4")
    code, _, error = run(*words)
    assert (code, Path("ball.mp4").read_text()) == (2, "precious")
    assert "--force" in error
    assert run(*words, "--force")[0] == 0
    assert len(read_video("ball.mp4").frames) == 5


def test_ctrl_c_leaves_a_playable_file(checkpoint: str, tmp_path: Path) -> None:
    """Whoever stops a long generation keeps what was finished, and reads so."""
    file = tmp_path / "long.mp4"
    words = ["generate", "a ball", "--model", checkpoint, "--seconds", "100000", "--out", str(file)]
    process = subprocess.Popen(
        [sys.executable, "-m", "videoar", *words],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    partial = file.with_name(".long.mp4.partial.mp4")
    deadline = time.monotonic() + 90
    while not partial.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert "holds what was finished" in error
    assert "Traceback" not in error
    assert f"{len(read_video(file, max_frames=10**6).frames)} frames" in out
    assert not partial.exists()


def test_progress_tells_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    """A long generation says how long it will take, in plain lines when no terminal reads them."""
    line = how_far(80, 8, total=160, fps=16)
    assert "5.0 of 10.0 s, 5.0 frames/s, 16 s left" in how_far(80, 8, total=160, fps=16, resumed=40)
    assert Timing(frames=80, resumed=40, seconds=8.0).fps == 5.0
    lines = list[str]()
    paced = Paced(lines.append, every=0.2)
    paced.hear("at once")
    time.sleep(0.3)
    paced.say("due")
    paced.hear("too soon")
    assert lines == ["due"]  # what else was said is no silence
    with Progress(sys.stderr, every=0.2) as show:
        show(line)
        assert capsys.readouterr().err == ""
        time.sleep(0.3)
        show(line)
    assert capsys.readouterr().err == "5.0 of 10.0 s, 10.0 frames/s, 8 s left\n"


# ---------------------------------------------------------------- bad input

OUT = ("--out", "x.mp4")
BAD = [
    (("generate", "ball", "--seconds", "0"), "seconds is 0"),
    (("generate", "ball", "--seconds", "-3"), "seconds is -3"),
    (("generate", "ball", "--seconds", "nan"), "seconds is nan"),
    (("generate", "ball", "--seconds", "inf"), "seconds is inf"),
    (("generate", "ball", "--seconds", "x"), "--seconds"),
    (("generate", "ball", "--seconds", "1", "--num-frames", "9"), "leave out num-frames"),
    (("generate", "ball", "--num-frames", "0"), "num_frames is 0"),
    (("generate", "ball", "--seed", "-1"), "seed is -1"),
    (("generate", "ball", "--num-inference-steps", "0"), "num_inference_steps is 0"),
    (("generate", "ball", "--shift", "0"), "shift is 0"),
    (("generate", "ball", "--guidance-scale", "nan"), "guidance_scale is nan"),
    (("generate", "ball", "--lag", "9"), "lag is 9"),
    (("generate", "ball", "--threads", "0"), "threads is 0"),
    (("generate", "ball", "--window", "1", "--units", "chunk:2"), "smaller than one unit"),
    (("generate", "ball", "--sink", "-1"), "sink_frames is -1"),
    (("generate", "ball", "--sink", "100", "--window", "4"), "use fewer sinks"),
    (("generate", "ball", "--fit", "crop"), "--fit is of --image or --video: name one too"),
    (("generate", "ball", "--negative-prompt", "red"), "guidance_scale is 1"),
    (("generate", ""), "prompt is empty"),
    (("generate", "ball " * 2000), "10000 characters"),
    (("generate", "ball " * 100), "tokens"),
    (("generate", "ball", "--units", "cbe:1x2x2"), "Did you mean cube:1x2x2?"),
    (("generate", "ball", "--units", "cube:1x0x2"), "0"),
    (("generate", "ball", "--out", "missing/x.mp4"), "missing does not exist"),
    (("generate", "ball", "--out", "x.avi"), ".avi"),
    (("generate", "ball", "--out", "x.webp", "--num-frames", "4000"), "held in memory"),
    (("generate", "ball", "--report", "x.json"), "unknown option '--report'"),
    (("generate", "ball", "--secnds", "3"), "did you mean --seconds?"),
    (("generate", "caf\udce9"), "is not UTF-8"),
    (("generate",), "no PROMPT"),
    (("generate", "ball", "--resume", "x"), "leave out model, prompt"),
    (
        ("generate", "ball", "--prompt-at", "0", "square"),
        "two prompts hold from 0 s on",
    ),
    (("generate", "--prompt-at", "2", "square", "--script", "/dev/null"), "hold from 2 s on"),
    (("generate", "ball", "--script", "missing"), "No such file"),
    (("generate", "ball", "--prompt-at", "a square", "2"), "--prompt-at begins with 'a square'"),
    (("generate", "ball", "--steps", "2"), "did you mean --num-inference-steps?"),
    (("generate", "ball", "--save-state", "s", "--out", "x.webp"), "has no state: write .mp4"),
    (("serve", "--port", "99999"), "port is 99999: use 0 to 65535"),
    (("serve", "--sessions", "0"), "sessions is 0"),
    (("units", "chunk:0"), "Units 'chunk:0': frames is 0: use 1 or more"),
    (("units", "chnk:2"), "Did you mean chunk:3?"),
    (("units",), "no scheme"),
    (("units", "frame", "--frames", "0"), "frames is 0: use 1 or more"),
    (("units", "frame", "--frames", "99999999999"), "tokens of 4194304"),
    (("units", "frame", "--height", "99999", "--width", "99999"), "tokens of 1048576"),
    (("units", "frame", "--steps", "0"), "steps is 0"),
    (("units", "frame", "--window", "0"), "smaller than one unit"),
    (("train", "tyo"), "Did you mean toy?"),
    (("train", "nowhere.at.all:recipe"), "cannot be imported"),
    (("train", "toy", "--stepz", "3"), "did you mean --steps?"),
    (("train", "finetune", "--data.pth", "3"), "did you mean --data.path?"),
    (("train", "codec", "--siz", "96x96"), "did you mean --size?"),
    (("train", "toy", "--optimizer.learning-rat", "3"), "--optimizer.learning-rate?"),
    (("train", "finetune", "--task.model.num-layer", "3"), "did you mean --task.num-latents?"),
    (("train", "os:path"), "returns module: return a TrainConfig"),
    (("train", "os:remove"), "cannot be imported"),
    (("train", "toy", "--steps", "0"), "steps is 0"),
    (("train", "toy", "frame"), "unknown option 'frame'"),
    (("train", "toy", "--device", "abacus"), "abacus"),
    (("train", "toy", "--export", "--out", "missing"), "no checkpoint"),
    (("info", "missing"), "missing"),
    (("info", "CHECKPOINT", "--seconds", "nan"), "seconds is nan"),
    (("info", "CHECKPOINT", "--seconds", "1e15"), "tokens of 4194304"),
    (("evaluate", "CHECKPOINT", "--seconds", "nan"), "seconds is nan"),
    (("evaluate", "CHECKPOINT", "--data", "latents"), "videoar evaluate heldout"),
    (("evaluate", "heldout", "CHECKPOINT"), "--data"),
    (("evaluate", "heldout", "CHECKPOINT", "--data", "x", "--shift", "2"), "option '--shift'"),
    (("bench", "CHECKPOINT", "--num-inference-steps", "0"), "num_inference_steps is 0"),
    (("bench", "--shape", "wan-2b"), "--shape is wan-2b"),
    (("bench", "--layers", "4"), "use it with --shape"),
]


INSTANT = (
    "seconds is", "num_frames is", "num_inference_steps is", "shift is", "threads is", "steps is",
    "missing does not exist", ".avi", "did you mean --seconds?", "PROMPT",
    "no scheme", "no PROMPT", "leave out",
)  # fmt: skip


def test_what_needs_no_model_is_refused_without_torch(tmp_path: Path) -> None:
    """A slip of the keyboard is told at once, not after the seconds that torch takes to start."""
    slow = ("train", "bench", "evaluate")
    lines = [words for words, part in BAD if part.startswith(INSTANT) and words[0] not in slow]
    code = (
        "import json, sys; from videoar.cli.main import main\n"
        "codes = [main(words) for words in json.loads(sys.argv[1])]\n"
        "assert set(codes) == {2} and 'torch' not in sys.modules, codes"
    )
    command = [sys.executable, "-c", code, json.dumps(lines)]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("videoar: error:") == len(lines) > 15


@pytest.mark.parametrize(("words", "part"), BAD, ids=[" ".join(w)[:50] for w, _ in BAD])
def test_bad_input_gets_one_sentence(
    run: Run, checkpoint: str, words: tuple[str, ...], part: str
) -> None:
    """What cannot be done is refused in a sentence with exit code 2, and nothing is written."""
    words = tuple(checkpoint if word == "CHECKPOINT" else word for word in words)
    extra = ("--model", checkpoint) if words[0] == "generate" else ()
    code, _, error = run(*words, *extra)
    assert code == 2
    assert error.startswith("videoar: error: ")
    assert error.count("\n") == 1
    assert part in error
    assert not list(Path().iterdir())


def test_an_unwritable_folder_is_refused_first(
    run: Run, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing rights show before the work, not after it."""
    Path("locked").mkdir()
    # Root may write everywhere, so the answer of the system is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")
    code, _, error = run("generate", "ball", "--out", "locked/x.mp4")
    assert (code, error.count("\n")) == (2, 1)
    assert "locked is not writable" in error


def _truncate(folder: Path) -> None:
    file = folder / "transformer" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _change(name: str, field: str, value: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))

    return change


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (_truncate, "truncated"),
        (_change("videoar.json", "format", 99), "format 99"),
        (_change("transformer/config.json", "ffn_dim", 32), "shape"),
        (_change("text/config.json", "new_field", 1), "new_field"),
        (lambda folder: (folder / "codec" / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "text" / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "videoar.json").unlink(), "videoar.json"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "info"])
def test_a_damaged_checkpoint_gets_one_sentence(
    run: Run, command: str, damage: Callable[[Path], None], part: str
) -> None:
    """A checkpoint that was cut, mixed up or written by a newer version is named as such."""
    folder = tiny_pipeline().save_pretrained("damaged")
    damage(folder)
    words = ("ball", "--model", "damaged") if command == "generate" else ("damaged",)
    code, _, error = run(command, *words)
    assert (code, error.count("\n")) == (2, 1)
    assert part in error
    assert not Path("video.mp4").exists()


# ---------------------------------------------------------------- train


@dataclass(frozen=True, kw_only=True)
class LineTask:
    """Fit a line; with `poisoned`, the loss is not a number."""

    poisoned: bool = False
    """Whether the loss is not a number."""

    def check(self, config: TrainConfig) -> None:
        """Nothing can be missing."""

    def build(self, config: TrainConfig, report: Report) -> "Line":
        """Build the task."""
        return Line(self, config)


class Line(Objective):
    """The task, the objective and the data of a line."""

    def __init__(self, task: LineTask, config: TrainConfig) -> None:
        self.task, self.module, self.objective = task, nn.Linear(1, 1), self
        self.batches = Batches(self, batch_size=config.batch_size, seed=config.seed)

    def __len__(self) -> int:
        return 8

    def get(self, indices: list[int], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor(indices).float()[:, None]}

    def loss(self, batch: dict[str, torch.Tensor], rng: torch.Generator, *, step: int) -> dict:
        loss = (self.module(batch["x"]) - 2 * batch["x"]).square().mean()
        return {"loss": loss * float("nan") if self.task.poisoned else loss}

    def sources(self) -> dict[str, str]:
        return {}

    def validate(self, module: nn.Module, *, step: int) -> dict[str, float]:
        return {}

    def export(self, folder: Path, module: nn.Module, meta: dict) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "meta.json").write_text(json.dumps(meta))


def line() -> TrainConfig:
    """A recipe outside of the package."""
    return TrainConfig(
        name="line",
        task=LineTask(),
        out=Path("runs/line"),
        steps=3,
        batch_size=2,
        optimizer=OptimizerConfig(learning_rate=0.01),
    )


def test_overrides_reach_the_run(run: Run) -> None:
    """Options on the command line change the recipe, nested fields too, and end in its record."""
    words = ("--steps", "2", "--optimizer.learning-rate", "0.5", "--out", "short", "--seed", "5")
    code, out, _ = run("train", "test_cli:line", *words)
    assert code == 0
    assert "short/checkpoint" in out
    config = json.loads(Path("short/checkpoint/meta.json").read_text())["config"]
    assert (config["steps"], config["seed"]) == (2, 5)
    assert config["optimizer"]["learning_rate"] == 0.5
    assert config["batch_size"] == 2


def test_export_takes_the_newest_checkpoint(run: Run) -> None:
    """`--export` writes a result without a further step; a long run can be looked at early."""
    assert run("train", "test_cli:line", "--out", "r")[0] == 0
    Path("r/checkpoint/meta.json").unlink()
    assert run("train", "test_cli:line", "--out", "r", "--steps", "9", "--export")[0] == 0
    assert json.loads(Path("r/checkpoint/meta.json").read_text())["step"] == 3


def test_a_loss_that_is_not_a_number_ends_with_one(run: Run) -> None:
    """A run that diverges says so in one sentence, apart from bad input: exit code 1."""
    code, _, error = run("train", "test_cli:line", "--task.poisoned", "--out", "bad")
    assert (code, error.count("\n")) == (1, 1)
    assert "nan" in error


def test_train_lists_recipes(run: Run) -> None:
    """Without a recipe the user sees which there are."""
    for words in ((), ("--list",)):
        code, out, _ = run("train", *words)
        assert code == 0
        assert [text.split()[0] for text in out.splitlines()] == list(RECIPES)


def test_the_help_of_a_recipe_shows_its_fields(run: Run) -> None:
    """Every field can be found without reading the source."""
    code, out, _ = run("train", "toy", "--help")
    assert code == 0
    assert "--task.flow.clip-frames" in out
    assert "--size" in out


# ---------------------------------------------------------------- info and units


@pytest.mark.parametrize("units", [*SCHEMES, "full"])
@pytest.mark.parametrize("window", [None, 4])
def test_the_forecast_of_the_cache_is_what_a_generation_needs(
    units: str, window: int | None
) -> None:
    """`info` and `units` promise the memory that a generation then takes."""
    pipe = tiny_pipeline()
    generation = pipe.generate(
        ["a ball"],
        num_frames=33,
        seeds=[0],
        units=units,
        num_inference_steps=1,
        window_frames=window,
        sink_frames=2,
    )
    visible = generation.sampler.config.visible
    forecast = cache.cached_tokens(generation.sampler.units, visible)
    for _ in generation:
        pass
    assert forecast == generation.stats.cache_tokens
    held = cache.cached_tokens(generation.sampler.units, visible, in_flight=2)
    assert held * 2 * 2 * 24 * 4 == generation.stats.cache_bytes


def test_info_tells_size_and_history(run: Run, checkpoint: str) -> None:
    """A stranger's checkpoint explains itself."""
    pipe = tiny_pipeline()
    pipe.meta = {"config": {"name": "tiny"}, "step": 7, "seconds": 7200.0, "units": ["frame"]}
    pipe.save_pretrained("known")
    code, out, _ = run("info", "known", "--seconds", "10", "--window", "4")
    assert code == 0
    assert f"{pipe.transformer.num_parameters:,}" in out
    for words in (["recipe", "tiny"], ["steps", "7"], ["hours", "2.00"]):
        assert words in [text.split() for text in out.splitlines()]
    # 3 frames of 16 tokens are read, and 2 in a pass; 2 layers of 24 channels in float32.
    token = 2 * 2 * 24 * 4 / 2**20
    assert f"{5 * 16 * token:.2f} MiB, 48 tokens and 32 of a pass" in out


def test_units_prints_the_partition(run: Run) -> None:
    """The table says what a scheme costs before anything is generated."""
    code, out, _ = run("units", "multiscale:4,2,1", "cube:1x2x2/wavefront", "--steps", "3")
    assert code == 0
    cells = [text.split() for text in out.splitlines()]
    assert ["multiscale:4,2,1", "12", "2,", "8,", "32", "12", "3", "36", "136"] in cells
    # Two cubes of each frame share a wave.
    assert ["cube:1x2x2/wavefront", "32", "4", "24", "3", "72", "124"] in cells


def test_units_counts_the_steps_of_a_checkpoint(run: Run, checkpoint: str) -> None:
    """Steps, window and sinks are its own, but for what is said."""
    code, out, _ = run("units", "frame", "--model", checkpoint)
    assert code == 0
    assert ["frame", "8", "16", "8", "2", "16", "80"] in [line.split() for line in out.splitlines()]


# ---------------------------------------------------------------- measurements


def test_bench_and_evaluate_print_their_tables(run: Run, checkpoint: str, tmp_path: Path) -> None:
    """The commands beside the tables of `docs/results.md` make such tables."""
    words = ("--units", "frame", "--seconds", "2")
    where = ("--out", str(tmp_path / "evaluation"))
    code, out, _ = run("evaluate", checkpoint, *words, "--num-prompts", "2", *where)
    assert code == 0
    assert "evaluation/report.html has the tables and the videos" in out
    assert "| videos of | colour | shape |" in (tmp_path / "evaluation" / "report.md").read_text()
    words = (*words, "--repeats", "1")
    code, out, _ = run("bench", checkpoint, *words)
    assert code == 0
    assert "| units | frames/s |" in out
    assert "| units | dtype |" in out


def test_the_default_units_of_a_recipe_are_an_option() -> None:
    """They may be a name or a scheme; a name is what can be typed."""
    command = parse(["train", "toy", "--task.sampling.units", "frame"])
    assert command.keywords["config"].task.sampling.units == "frame"


def test_words_become_options() -> None:
    """`parse` runs nothing, so that documents can be checked against it."""
    command = parse(["generate", "a ball", "--seconds", "60", "--window", "all"])
    (given,) = command.args
    assert command.func is generate
    assert (given.prompt, given.seconds, given.window) == ("a ball", 60.0, "all")
