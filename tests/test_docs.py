"""What README, docs and examples show must run: code, commands, file names."""

import contextlib
import re
import runpy
import shlex
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.cache import BenchCache
from benchmarks.compare import Compare
from benchmarks.distill import BenchDistill
from benchmarks.gpu import BenchGpu
from benchmarks.length import BenchLength
from benchmarks.prepare import BenchPrepare
from examples.draw_units import DrawUnits
from tiny import TEXT, tiny_pipeline

from videoar.checkpoints.checkpoint import bundled
from videoar.checks import Note
from videoar.cli import arguments
from videoar.cli.main import parse
from videoar.encoders.text_encoder import TextEncoder, TinyPromptEncoder
from videoar.generation.pipeline import VideoPipeline

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAMS = {
    "benchmarks/cache.py": BenchCache,
    "benchmarks/compare.py": Compare,
    "benchmarks/distill.py": BenchDistill,
    "benchmarks/gpu.py": BenchGpu,
    "benchmarks/length.py": BenchLength,
    "benchmarks/prepare.py": BenchPrepare,
    "examples/draw_units.py": DrawUnits,
}


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page, each moved down to its lines there."""
    text = page.read_text("utf-8")
    found = [match for match in BLOCK.finditer(text) if match[1] == language]
    return ["\n" * text[: match.start(2)].count("\n") + match[2] for match in found]


def stand_in() -> VideoPipeline:
    """Return a tiny pipeline with room for the prompts of the pages."""
    pipeline = tiny_pipeline()
    encoder = TextEncoder(replace(TEXT, max_tokens=96)).eval()
    prompts = TinyPromptEncoder(pipeline.prompt_encoder.tokenizer, encoder)
    return replace(pipeline, prompt_encoder=prompts)


def commands(program: str) -> list[list[str]]:
    """Return the arguments of every command of a program, in blocks and in running text."""
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    shell = [line for page in PAGES for code in blocks(page, "sh") for line in code.splitlines()]
    inline = re.findall(rf"`({program} [^`]+)`", text)
    words = [shlex.split(line, comments=True) for line in dict.fromkeys((*shell, *inline))]
    return [line[1:] for line in words if line[:1] == [program]]


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python")],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in order; if not, a reader's first try ends in a traceback."""
    monkeypatch.chdir(tmp_path)
    if "toy" not in bundled():
        stand_in().save_pretrained("toy")  # a folder is found before a bundled name
    namespace = {"__name__": page.stem}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)  # of what the model never learned
        for code in blocks(page, "python"):
            exec(compile(code, str(page), "exec"), namespace)


def test_the_example_runs() -> None:
    """`examples/new_scheme.py` draws, checks and trains; if not, the way to extend is broken."""
    example = runpy.run_path(str(ROOT / "examples" / "new_scheme.py"))
    lines: list[str] = []
    example["main"](lines.append)
    assert lines[0].splitlines()[0].split() == "2 0 1 3 6 4 5 7".split()
    assert example["check"](example["Columns"]()) < 1e-5  # rounding, if the cache changes nothing
    losses = [float(line.split()[-1]) for line in lines if line.startswith("step")]
    assert losses[-1] < 0.7 * losses[0]


def test_the_tree_in_the_readme_is_complete() -> None:
    """The README names every room, and no other; a reader finds what a line promises."""
    tree = next(code for code in blocks(ROOT / "README.md", "text") if "src/videoar/" in code)
    listed = set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)) - {"assets"}
    rooms = {path.parent.name for path in (ROOT / "src" / "videoar").glob("*/__init__.py")}
    assert listed == rooms


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_exist(page: Path) -> None:
    """A page names files by room, as they are now; the log tells of files as they were."""
    if page.name != "log.md":
        names = re.findall(r"`(?:python )?([\w/]+\.py)\b", page.read_text("utf-8"))
        folders = (ROOT, ROOT / "src" / "videoar")
        assert not [name for name in names if not any((at / name).exists() for at in folders)]


@pytest.mark.parametrize("words", commands("python"), ids=" ".join)
def test_programs_parse(words: list[str]) -> None:
    """Programs take the options that a page gives them, and are where it says."""
    program, *rest = words
    assert (ROOT / program).exists()
    if program in PROGRAMS:
        arguments.read(PROGRAMS[program], rest, prog=program)


@pytest.mark.parametrize("words", commands("videoar"), ids=" ".join)
def test_commands_parse(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command in the text is one that the program takes; nothing is run."""
    readme = blocks(ROOT / "README.md", "python")[1].partition("\n\nassert")[0]
    (tmp_path / "columns.py").write_text(readme)  # the module that the pages speak of
    monkeypatch.syspath_prepend(tmp_path)
    with contextlib.suppress(SystemExit) if "--help" in words else contextlib.nullcontext():
        parse(words)
