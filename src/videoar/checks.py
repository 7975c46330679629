"""One sentence for a wrong value. No torch."""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import math
import numbers
import operator
import re
import signal
import sys
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec, TypeVar

from videoar.files import to_json

P = ParamSpec("P")
T = TypeVar("T")
SENTENCE = "{} is {}: use {}."
"""Of a name, its value, and what is right."""
MAX_TOLD = 3
"""Of many differences, so many are told."""
Rule = tuple[str, bool, str]
"""The name of a field, whether it is right, and what is."""
Report = Callable[[str], None]
"""Is told how far something is, in lines."""


def hint(word: str, known: Iterable[str], says: str = "; did you mean {}?") -> str:
    """Return the known word that is closest, as the end of a sentence; nothing if none is close."""
    names, word = list(known), word.strip("-")
    parts = [name for name in names if word in re.split("[-_]+", name)]  # of steps, say
    close = parts or difflib.get_close_matches(word, names, n=1)
    return says.format(close[0]) if close else ""


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise for a keyword that is not known."""
    for name in set(given) - set(known):
        raise TypeError(f"there is no keyword {name!r}{hint(name, known)}")


def check(name: str, value: Any, right: bool, remedy: str) -> None:
    """Raise unless a value is right, in a sentence that ends in what is."""
    if not right:
        raise ValueError(SENTENCE.format(name, value, remedy))


@contextlib.contextmanager
def explained(says: str, *kinds: type[BaseException]) -> Iterator[None]:
    """Say in a sentence, as a `ValueError`, what is raised: its words come where `says` has {}.

    Where it has {first}, the first line of them comes.
    """
    kinds = kinds or (ValueError,)
    try:
        yield
    except kinds as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(says.replace("{}", str(error)).replace("{first}", first)) from error


@dataclasses.dataclass(frozen=True)
class Limit:
    """What a value has to be beside its type, said in the annotation of its field."""

    holds: Callable[[Any], bool]
    says: str


def one_of(known: Iterable[str]) -> Limit:
    """Return the limit of words."""
    return Limit(frozenset(known).__contains__, f"one of {', '.join(known)}")


Count = Annotated[int, Limit(lambda value: value >= 1, "1 or more")]
Natural = Annotated[int, Limit(lambda value: value >= 0, "0 or more")]
Positive = Annotated[float, Limit(lambda value: value > 0, "a number above 0")]
"""Infinity, too, where something else ends."""
Finite = Annotated[Positive, Limit(lambda value: value < math.inf, "a number above 0")]
Share = Annotated[float, Limit(lambda value: 0 <= value <= 1, "a share from 0 to 1")]


class Options:
    """A dataclass whose fields have the types and keep the limits of their annotations."""

    def __post_init__(self) -> None:
        check_types(self)


class _Beyond(ValueError):
    """A value is of its type, but beyond its limit."""


def check_types(options: Any) -> None:
    """Give the fields of a dataclass the types of their annotations, or raise: see `typed`."""
    for name, value in typed(type(options), vars(options)).items():
        object.__setattr__(options, name, value)


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Have a function take arguments of its types alone, and say in a sentence what is none."""
    known = inspect.signature(function)
    takes_all = any(each.kind is each.VAR_KEYWORD for each in known.parameters.values())

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        if not takes_all:
            check_names(options, known.parameters)
        bound = known.bind(*args, **options)
        bound.arguments.update(typed(function, bound.arguments))
        return function(*bound.args, **bound.kwargs)

    return call


def typed(kind: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values for fields or arguments as their annotations say, or raise for the first.

    What means the same is taken: a text for a path, a list for a tuple, a number of NumPy.
    """
    found, hints = dict[str, Any](), typing.get_type_hints(kind, include_extras=True)
    for name, value in values.items():
        try:
            found[name] = _as(value, hints.get(name, Any))
        except _Beyond as beyond:
            raise ValueError(SENTENCE.format(name, value, beyond)) from beyond
        except (TypeError, ValueError, OverflowError) as error:  # of int(nan), float(10**400)
            hint = typing.get_type_hints(kind)[name]
            if typing.get_origin(hint) is typing.Union:  # of a limit, or nothing: int | None
                hint = functools.reduce(operator.or_, typing.get_args(hint))
            plain = type(hint) is type
            needed = hint.__name__ if plain else re.sub(r"\b[a-z]+\.", "", str(hint))
            raise ValueError(SENTENCE.format(name, f"{value!r:.80}", needed)) from error
    return found


def _as(value: Any, hint: Any) -> Any:
    """Return a value as what an annotation says."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Annotated:
        return _within(_as(value, inner[0]), inner[1:])
    if origin in (typing.Union, types.UnionType):
        for choice in inner:
            with contextlib.suppress(TypeError):
                return _as(value, choice)
    elif origin is typing.Literal:
        if any(type(value) is type(each) and value == each for each in inner):
            return value
    elif origin in (list, tuple, dict) and isinstance(value, list | tuple | dict):
        return _items(value, origin, inner)
    elif origin in (int, float) and isinstance(value, numbers.Real):
        number: Any = value
        whole = origin is float or (number == int(number) and abs(number) < 2**63)
        if whole and type(value) is not bool:
            return origin(number)
    elif origin is Path and isinstance(value, str):
        return Path(value)
    elif hint is Any or isinstance(value, origin):
        return value
    raise TypeError


def _within(value: Any, said: tuple[Any, ...]) -> Any:
    """Return a value that keeps the limits of an annotation."""
    for limit in said:
        if isinstance(limit, Limit) and not limit.holds(value):
            raise _Beyond(limit.says)
    return value


def _items(value: Any, kind: type, inner: tuple[Any, ...]) -> Any:
    """Return what a collection holds as its annotation says."""
    if kind is dict and isinstance(value, dict):
        return {key: _as(item, inner[1] if inner else Any) for key, item in value.items()}
    if kind is list and isinstance(value, list):
        return [_as(item, *inner) for item in value]
    if kind is tuple and isinstance(value, list | tuple):
        each = inner[:1] * len(value) if inner[-1] is ... else inner
        if len(each) == len(value):
            return tuple(map(_as, value, each))
    raise TypeError


def check_options(options: Any, *rules: Rule, least: Mapping[str, float] = {}) -> None:
    """Raise for the first field whose rule does not hold, or that is below its `least` value.

    None, where a field may be that, is below nothing.
    """
    for name, right, remedy in rules:
        check(name, getattr(options, name), right, remedy)
    for name, low in least.items():
        value = getattr(options, name)
        check(name, value, value is None or value >= low, f"{low} or more")


def check_same(
    old: Any, new: Any, *, held: str, other: str, free: Collection[str] = (), options: Any = None
) -> None:
    """Raise for the first settings, by name, that are others now, unless they are free.

    What a record of an older version lacks was at its default; a `Note` says so.

    Args:
        old: as nested dictionaries, as is `new`.
        new: the settings that are asked for.
        held: what has the old ones, as `runs/toy holds a run`.
        other: what else can be named, as `folder`.
        free: names of settings that may differ.
        options: dataclasses, nested as the settings are, whose defaults count.
    """
    before, after = _flatten(old), _flatten(new)
    taken = {k: v for k, v in _defaults(options).items() if k in after.keys() - before.keys()}
    both = {name: (before | taken).get(name, "absent") for name in before | after}
    told = [
        f"{name} = {was}, but {now} is asked for"
        for name, was in sorted(both.items())
        if name not in free and was != (now := after.get(name, "absent"))
    ]
    if told:
        said = ", and ".join(told[:MAX_TOLD])
        raise ValueError(f"{held} with {said}: keep the old value, or name another {other}")
    if said := ", ".join(f"{name} = {taken[name]}" for name in sorted(taken.keys() - free)):
        warnings.warn(f"{held} of an older version, which goes on with {said}", Note, stacklevel=2)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return settings by names like `task.stages.0.steps`."""
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {prefix: value}
    parts = [_flatten(item, f"{prefix}.{key}".strip(".")) for key, item in value.items()]
    return {key: item for part in parts for key, item in part.items()}


def _defaults(options: Any, prefix: str = "") -> dict[str, Any]:
    """Return what fields of dataclasses are by default, by the same names."""
    if isinstance(options, list | tuple):
        options = dict(enumerate(options))
    known = dataclasses.is_dataclass(options)
    inner = vars(options) if known else options if isinstance(options, Mapping) else {}
    parts = [_defaults(value, f"{prefix}{key}.") for key, value in inner.items()]
    for field in dataclasses.fields(options) if known else ():
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        if default is not dataclasses.MISSING:
            parts.append(_flatten(to_json(default), prefix + field.name))
    return {key: item for part in parts for key, item in part.items()}


class Note(UserWarning):
    """What is read otherwise than it lies there, though rightly; commands print it as a line."""


def interrupt(number: int, frame: Any) -> NoReturn:
    """Handle a signal as Ctrl-C is, and let it be known which one it was."""
    raise KeyboardInterrupt(number)


def signal_of(stop: KeyboardInterrupt) -> int:
    """Return the number of the signal that stopped a command."""
    return next(iter(stop.args), signal.SIGINT)


def import_named(name: str) -> Any:
    """Import `package.module:name`; the current folder is looked in last, whatever the entry point.

    Raises:
        ImportError, AttributeError, ValueError: it is not there, or the name is none.
    """
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    return getattr(importlib.import_module(module), attribute)


def build_named(text: str, base: type, says: str) -> Any:
    """Build an object of `package.module:Class/field=value`, a dataclass that derives from `base`.

    Raises:
        ValueError: in a sentence that begins with `says`, the text at its braces.
    """
    (name, *options), what = text.split("/"), says.format(text)
    remedy = "install it, or start in its folder."
    with explained(f"{what} cannot be imported ({{}}): {remedy}", ImportError, AttributeError):
        kind = import_named(name)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        noun = base.__name__
        raise ValueError(f"{what} are no {noun.lower()}: derive {kind!r} from {noun}.")
    known, values = [field.name for field in dataclasses.fields(kind)], {}
    for option in options:
        field, _, value = option.partition("=")
        if field not in known:
            raise ValueError(f"{name} has no field {field!r}: use one of {', '.join(known)}.")
        with explained(f"{field} of {name} is {value}: write JSON, such as 2."):
            found = json.loads(value)
        values[field] = tuple(found) if isinstance(found, list) else found
    with explained(f"{what} cannot be built ({{}}): give its fields.", TypeError):
        return kind(**values)


def name_of(built: Any) -> str:
    """Return what `build_named` makes an object of again: `package.module:Class/field=value`."""
    kind, known = type(built), dataclasses.fields(built)
    if kind.__module__ == "__main__" or "<" in kind.__qualname__:
        raise ValueError(
            f"{kind.__qualname__} is defined where no other program finds it: put it into a"
            " module of its own, and import it from there."
        )
    held = [(field, getattr(built, field.name)) for field in known]
    values = [f"/{f.name}={json.dumps(value)}" for f, value in held if value != f.default]
    return f"{kind.__module__}:{kind.__qualname__}{''.join(values)}"


def import_extra(module: str, says: str) -> Any:
    """Import what an extra of the package installs; without it, `says` says which.

    Raises:
        ValueError: in that sentence, with the reason at its braces.
    """
    with explained(says, ImportError):
        return importlib.import_module(module)
