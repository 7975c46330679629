"""One sentence for a wrong value. No torch."""

import difflib
import importlib
import math
import numbers
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

Rule = tuple[str, bool, str]
"""The name of a field, whether it is right, and what is."""


def hint(word: str, known: Iterable[str], says: str = "; did you mean {}?") -> str:
    """Return the known word that is closest, as the end of a sentence; nothing if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return says.format(close[0]) if close else ""


def check(name: str, value: Any, right: bool, remedy: str) -> None:
    """Raise unless a value is right, in a sentence that ends in what is."""
    if not right:
        raise ValueError(f"{name} is {value}: use {remedy}.")


def check_options(options: Any, *rules: Rule, least: Mapping[str, float] = {}) -> None:
    """Raise for the first field whose rule does not hold, or that is below its `least` value.

    None, where a field may be that, is below nothing.
    """
    for name, right, remedy in rules:
        check(name, getattr(options, name), right, remedy)
    for name, low in least.items():
        value = getattr(options, name)
        check(name, value, value is None or value >= low, f"{low} or more")


def check_positive(options: Any, *names: str) -> None:
    """Raise for a field that is given and is no positive number."""
    for name in names:
        value = getattr(options, name)
        if value is not None:
            right = math.isfinite(value) and value > 0
            check(name, f"{value:g}", right, "a number above 0, such as 4")


def check_whole(name: str, value: Any) -> None:
    """Raise unless a value is a whole number, or None."""
    right = value is None or isinstance(value, numbers.Integral)
    check(name, repr(value), right, "a whole number")


def check_same(old: Any, new: Any, *, held: str, other: str, free: Collection[str] = ()) -> None:
    """Raise for the first setting, by name, that is another now, unless it is free.

    Args:
        old: as nested dictionaries, as is `new`.
        new: the settings that are asked for.
        held: what has the old ones, as `runs/toy holds a run`.
        other: what else can be named, as `folder`.
        free: names of settings that may differ.
    """
    before, after = _flatten(old), _flatten(new)
    for name in sorted((before.keys() | after.keys()) - set(free)):
        was, now = before.get(name, "absent"), after.get(name, "absent")
        if was != now:
            raise ValueError(
                f"{held} with {name} = {was}, but {now} is asked for: keep the old value, or name"
                f" another {other}"
            )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    parts = [_flatten(item, f"{prefix}.{key}".strip(".")) for key, item in value.items()]
    return {key: item for part in parts for key, item in part.items()}


def import_named(name: str) -> Any:
    """Import `package.module:name`; the current folder is looked in last, whatever the entry point.

    Raises:
        ImportError, AttributeError, ValueError: it is not there, or the name is none.
    """
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    return getattr(importlib.import_module(module), attribute)


def import_extra(module: str, says: str) -> Any:
    """Import what an extra of the package installs; without it, `says` says which.

    Raises:
        ValueError: in that sentence, with the reason at its braces.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(says.replace("{}", str(error))) from error
