"""One sentence for a wrong value. No torch."""

import difflib
import math
from collections.abc import Iterable
from typing import Any


def hint(word: str, known: Iterable[str]) -> str:
    """Return the known word that is closest, as the end of a sentence; nothing if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def check_options(options: Any, *rules: tuple[str, bool, str]) -> None:
    """Raise for the first field whose rule does not hold; a rule ends in what to use instead."""
    for name, right, remedy in rules:
        if not right:
            raise ValueError(f"{name} is {getattr(options, name)}: use {remedy}.")


def check_positive(args: Any, *names: str) -> None:
    """Raise for a field that is given and is no positive number."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value:g}: use a number above 0, such as 4")
