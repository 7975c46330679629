"""Rules on the source that a machine can keep: who imports whom, who knows what, and how long."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

from videoar.core.flow import velocity_of
from videoar.core.units import token_mask

PACKAGE = Path(__file__).parents[1] / "src" / "videoar"
SOURCES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in SOURCES]
EACH = pytest.mark.parametrize("path", SOURCES, ids=NAMES)

# A room imports from those before it, never from those behind. Inside a room there is no circle.
ROOMS = (
    ("files", "machine", "checks"),
    ("weights",),
    ("core",),
    ("encoders",),
    ("checkpoints",),
    ("data",),
    ("generation",),
    ("evaluation",),
    ("training",),
    ("serve",),
    ("client",),
    ("cli",),
)
# Only the geometry and the choice of it name a scheme; everything else sees a partition.
SCHEMES = re.compile(r"\b(Blocks|KeyDetail|Pyramid|Mixed)\b")
KNOW_SCHEMES = {"core.schemes", "training.recipes"}
# Reading a device value makes the host wait for the device, at every token or step.
NO_ITEM = {"sampler", "cache", "transformer"}
# These start fast: help and completion must not wait for torch.
LIGHT = {"__init__", "__main__", "cli.main"}
MAX_FILE, MAX_FUNCTION = 400, 80
# What is new here, and all of it with the parts around: see docs/decisions/size.md.
MAX_CORE, MAX_TOTAL = 1250, 12800


def _module(path: Path) -> str:
    """Return the name of a module, without that of the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[1:] and parts[-1] == "__init__" else parts)


KNOWN = {_module(path): path for path in SOURCES}


def _imports(tree: ast.AST) -> Iterator[str]:
    """Yield the full names of what is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _modules_imported(tree: ast.AST) -> set[str]:
    """Return the modules of this package that are imported; a name of the package is `__init__`."""
    found = set()
    for name in _imports(tree):
        package, *rest = name.split(".")
        if package == "videoar":
            names = [".".join(rest[:k]) for k in range(len(rest), 0, -1)]
            found.add(next((name for name in names if name in KNOWN), "__init__"))
    return found


def _at_import_time(module: str) -> ast.Module:
    """Return the code of a module without its functions, whose imports come later."""
    body = ast.parse(KNOWN[module].read_text()).body
    late = ast.FunctionDef | ast.AsyncFunctionDef
    return ast.Module(body=[node for node in body if not isinstance(node, late)], type_ignores=[])


def _floor(module: str) -> int:
    """Return the place of a module's room; the package's own name lies lowest."""
    if module == "__init__":
        return -1
    floors = [k for k, rooms in enumerate(ROOMS) if module.split(".")[0] in rooms]
    assert len(floors) == 1, f"put {module} into a room of the table in {Path(__file__).name}"
    return floors[0]


@EACH
def test_imports_go_down(path: Path) -> None:
    """A room imports from rooms below; else a change below shakes above."""
    module = _module(path)
    for other in _modules_imported(ast.parse(path.read_text())) - {module}:
        if not module.startswith("__"):
            assert _floor(other) <= _floor(module), f"{module} must not import {other}"


def test_a_room_has_no_circle() -> None:
    """Neighbours have an order, so every module can be read alone."""
    trees = {module: ast.parse(path.read_text()) for module, path in KNOWN.items()}
    left = {module: _modules_imported(tree) - {module} for module, tree in trees.items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not left.keys() - {"__init__", "__main__"}, f"a circle among {sorted(left)}"


@EACH
def test_only_the_geometry_names_a_scheme(path: Path) -> None:
    """A scheme's name elsewhere would be the first branch on the kind of unit."""
    if _module(path) not in KNOW_SCHEMES:
        assert not SCHEMES.findall(path.read_text())


@pytest.mark.parametrize("module", sorted(NO_ITEM))
def test_the_inner_loops_do_not_wait_for_the_device(module: str) -> None:
    """`.item()` in the sampler, cache or model stalls a GPU at every call."""
    path = PACKAGE / "core" / f"{module}.py"
    tree = ast.parse(path.read_text())
    calls = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call)]
    lines = [f.lineno for f in calls if isinstance(f, ast.Attribute) and f.attr == "item"]
    assert not lines, f"{path.name} calls .item() in lines {lines}"


def test_the_command_line_starts_without_torch() -> None:
    """What is imported when the command starts reaches no module that imports torch."""
    seen, waiting = set(), LIGHT & KNOWN.keys()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        tree = _at_import_time(module)
        heavy = {name.split(".")[0] for name in _imports(tree)} & {"torch", "safetensors"}
        assert not heavy, f"starting the command imports {heavy} through {module}"
        waiting |= _modules_imported(tree) & KNOWN.keys() - seen


@EACH
def test_annotations_stay_checkable(path: Path) -> None:
    """Postponed annotations would switch off the check of shapes in every test."""
    assert "__future__.annotations" not in set(_imports(ast.parse(path.read_text())))


@EACH
def test_files_and_functions_stay_short(path: Path) -> None:
    """A file fits in one reading and a function on one screen."""
    text = path.read_text()
    lines = len(text.splitlines())
    assert lines <= MAX_FILE, f"{path.name} has {lines} lines of {MAX_FILE}: split it by meaning"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{node.name} has {length} lines of {MAX_FUNCTION}"


def _lines_of_code(text: str) -> int:
    """Count the lines that are neither blank nor comment nor docstring."""
    prose = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate((line.strip() for line in text.splitlines()), start=1)
    return sum(bool(line) and line[0] != "#" and k not in prose for k, line in lines)


def test_the_program_stays_small() -> None:
    """The idea can be read in a morning; what grows beyond the limits replaces something."""
    lines = {module: _lines_of_code(path.read_text()) for module, path in KNOWN.items()}
    assert sum(count for module, count in lines.items() if module.startswith("core.")) < MAX_CORE
    assert sum(lines.values()) < MAX_TOTAL


def test_shapes_are_checked_while_testing() -> None:
    """Annotations that nobody checks would lie sooner or later: of arguments, and of one size."""
    with pytest.raises(BeartypeCallHintViolation):
        velocity_of(torch.zeros(2), 3)
    same = torch.zeros(2, 2, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    with pytest.raises(BeartypeCallHintViolation):
        token_mask(*same, torch.zeros(2, 2, dtype=torch.long))
