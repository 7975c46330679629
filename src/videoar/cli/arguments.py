"""Words of a command line become a dataclass of options, or one sentence. No torch."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any

import tyro

from videoar import checks

KINDS = {"int|INT": "a whole number", "float|FLOAT": "a number", "{None}": "None", "{all}": "all"}
KINDS |= {"STR PATH": "a name and a path"}
"""What the words of the parser ask for, and what it is."""
NAME, VALUE, RIGHT = r"(?:argument )?(?P<name>\S+)", r"(?P<value>\[?'.*)", "(?P<right>.*?)"
SAYS = {
    f"Error parsing {NAME}: {RIGHT}{VALUE}": "{name} is {value}: use {kinds}",
    f"invalid choice {VALUE} for {NAME}[.] Expected {RIGHT}": "{name} is {value}: use {right}",
    f"Missing value for {NAME}[.] Expected {RIGHT} values": "{name} takes {right}: give more",
}
"""Sentences of the parser, and those that take their place."""


def _sentence(said: str) -> str:
    """Return what the parser says as a sentence with the option, its value, and what is right."""
    for pattern, says in SAYS.items():
        if found := re.fullmatch(pattern, said):
            parts = {name: re.sub(r"[]'[()]", "", text) for name, text in found.groupdict().items()}
            kinds = [words for known, words in KINDS.items() if re.search(known, parts["right"])]
            return says.format(**parts, kinds=" or ".join(kinds) or "what its help says")
    if said.startswith("Missing from"):
        names = re.findall(r"(?:^[^:]*: |[(]required[)] )(\S+)", said)
        return f"nothing is given for {', '.join(names)}"
    return re.sub(r"^Error parsing \w+: ", "", said)


def read(kind: type, words: Sequence[str], *, prog: str, default: Any = None) -> Any:
    """Read options into a dataclass; tyro's boxes become sentences."""
    box = io.StringIO()
    how: dict[str, Any] = {"prog": prog, "config": (tyro.conf.FlagCreatePairsOff,)}
    how["default"] = tyro.MISSING_NONPROP if default is None else default
    options, said, strange = None, "", list[str]()
    try:
        with contextlib.redirect_stderr(box):
            options, strange = tyro.cli(kind, args=words, return_unknown_args=True, **how)
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = (line.strip(" │|") for line in box.getvalue().splitlines()[1:-1])
        # Where the terminal is not UTF-8, boxes are of hyphens.
        text = " ".join(filter(None, lines)).lstrip("-─ ")
        said = _sentence(re.split(r" ?(?:[─-]{3,}|Got errors:)", text)[0].rstrip("."))
    # The parser names what is missing before what it does not know.
    doubtful = strange or [word for word in words if said and word.startswith("--")]
    if doubtful:
        page = io.StringIO()
        with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
            tyro.cli(kind, args=["--help"], **how)
        known = re.findall(r"--[a-z][\w.-]*", page.getvalue())
        new = [word for word in doubtful if word.startswith("-") and _name(word) not in known]
        if name := next(iter([*new, *strange]), ""):
            said = f"unknown option {name!r}{checks.hint(_name(name), known)}"
    if said:
        raise ValueError(f"{said} (see `{prog} --help`)")
    return options


def _name(word: str) -> str:
    """Return the name of an option as its help has it."""
    return word.partition("=")[0].replace("_", "-")
