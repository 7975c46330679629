"""Words of a command line become a dataclass of options, or one sentence. No torch."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any

import tyro

from videoar import checks


def read(kind: type, words: Sequence[str], *, prog: str, default: Any = None) -> Any:
    """Read options into a dataclass; tyro's boxes become sentences."""
    box = io.StringIO()
    how: dict[str, Any] = {"prog": prog, "config": (tyro.conf.FlagCreatePairsOff,)}
    how["default"] = tyro.MISSING_NONPROP if default is None else default
    try:
        with contextlib.redirect_stderr(box):
            options, unknown = tyro.cli(kind, args=words, return_unknown_args=True, **how)
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = (line.strip(" │|") for line in box.getvalue().splitlines()[1:-1])
        # Where the terminal is not UTF-8, boxes are of hyphens.
        text = " ".join(filter(None, lines)).lstrip("-─ ")
        text = re.split(r" ?(?:[─-]{3,}|Got errors:)", text)[0].rstrip(".")
        text = re.sub(r"^Error parsing \w+: ", "", text)
        raise ValueError(f"{text} (see `{prog} --help`)") from stop
    if unknown:
        name = next((word for word in unknown if word.startswith("-")), unknown[0])
        with contextlib.redirect_stdout(box), contextlib.suppress(SystemExit):
            tyro.cli(kind, args=["--help"], **how)
        known = re.findall(r"--[a-z][\w.-]*", box.getvalue())
        close = checks.hint(name.partition("=")[0].replace("_", "-"), known)
        raise ValueError(f"unknown option {name!r}{close} (see `{prog} --help`)")
    return options
