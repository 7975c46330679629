"""One sentence for a wrong value. No torch."""

import dataclasses
import difflib
import importlib
import json
import math
import numbers
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

USE, MUST_BE = "{} is {}: use {}.", "{} is {}, but must be {}: change it"
"""Sentences of a name, its value, and what is right."""
Rule = tuple[str, bool, str]
"""The name of a field, whether it is right, and what is."""


def hint(word: str, known: Iterable[str], says: str = "; did you mean {}?") -> str:
    """Return the known word that is closest, as the end of a sentence; nothing if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return says.format(close[0]) if close else ""


def check(name: str, value: Any, right: bool, remedy: str, says: str = USE) -> None:
    """Raise unless a value is right, in a sentence that ends in what is."""
    if not right:
        raise ValueError(says.format(name, value, remedy))


def check_options(
    options: Any, *rules: Rule, least: Mapping[str, float] = {}, says: str = USE
) -> None:
    """Raise for the first field whose rule does not hold, or that is below its `least` value.

    None, where a field may be that, is below nothing.
    """
    for name, right, remedy in rules:
        check(name, getattr(options, name), right, remedy, says)
    for name, low in least.items():
        value = getattr(options, name)
        check(name, value, value is None or value >= low, f"{low} or more", says)


def check_positive(options: Any, *names: str) -> None:
    """Raise for a field that is given and is no positive number."""
    for name in names:
        value = getattr(options, name)
        right = value is None or (math.isfinite(value) and value > 0)
        check(name, value, right, "a number above 0, such as 4", "{} is {:g}: use {}")


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


def build_named(text: str, base: type, says: str) -> Any:
    """Build an object of `package.module:Class/field=value`, a dataclass that derives from `base`.

    Raises:
        ValueError: in a sentence that begins with `says`, the text at its braces.
    """
    (name, *options), what = text.split("/"), says.format(text)
    try:
        kind = import_named(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{what} cannot be imported ({error}): install it, or start in its folder."
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, base)):
        noun = base.__name__
        raise ValueError(f"{what} are no {noun.lower()}: derive {kind!r} from {noun}.")
    known, values = [field.name for field in dataclasses.fields(kind)], {}
    for option in options:
        field, _, value = option.partition("=")
        if field not in known:
            raise ValueError(f"{name} has no field {field!r}: use one of {', '.join(known)}.")
        try:
            found = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{field} of {name} is {value}: write JSON, such as 2.") from error
        values[field] = tuple(found) if isinstance(found, list) else found
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{what} cannot be built ({error}): give its fields.") from error


def import_extra(module: str, says: str) -> Any:
    """Import what an extra of the package installs; without it, `says` says which.

    Raises:
        ValueError: in that sentence, with the reason at its braces.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(says.replace("{}", str(error))) from error
