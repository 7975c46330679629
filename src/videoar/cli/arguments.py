"""Words of a command line become a dataclass of options, or one sentence. No torch."""

import contextlib
import dataclasses
import io
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from videoar import checks

(POSITIONAL,) = typing.get_args(tyro.conf.Positional[int])[1:]


def read(kind: type, words: Sequence[str], *, prog: str, default: Any = None) -> Any:
    """Read options into a dataclass; tyro's boxes become sentences."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            options, unknown = tyro.cli(
                kind,
                args=words,
                prog=prog,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.FlagCreatePairsOff,),
                return_unknown_args=True,
            )
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
        close = checks.hint(name.partition("=")[0].replace("_", "-"), _names(default or kind))
        raise ValueError(f"unknown option {name!r}{close} (see `{prog} --help`)")
    return options


def _names(options: Any, prefix: str = "--") -> Iterator[str]:
    """Yield the options of a dataclass, those of nested ones after a dot."""
    kind = options if isinstance(options, type) else type(options)
    marked = typing.get_type_hints(kind, include_extras=True)
    for field, hint in typing.get_type_hints(kind).items():
        about = getattr(marked[field], "__metadata__", ())
        name, value = prefix + field.replace("_", "-"), getattr(options, field, None)
        stated = [getattr(each, "name", None) for each in about]
        name = next((f"--{other}" for other in stated if other), name)
        if dataclasses.is_dataclass(value):
            yield from _names(value, f"{name}.")
        # What is given by its place has no option, nor a nested one that is None.
        elif not any(map(dataclasses.is_dataclass, typing.get_args(hint))):
            yield from [] if POSITIONAL in about else [name]
