"""Annotations are checked under pytest: types by beartype, shapes by jaxtyping.

`install` instruments a package as jaxtyping's own import hook does, with one difference: what has
no shape in its annotations is left to beartype alone, and arguments and result are checked in one
pass. The hook of jaxtyping binds and checks every call twice: three quarters of the time of the
tests of the sampler.
"""

import ast
import functools
import importlib.abc
import importlib.machinery
import sys
import typing
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, jaxtyped

# PEP 484 says so, type checkers and users take it so; beartype's default would refuse `fps=16`.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function; axes of one name have one size within a call."""
    inner = checked(function)
    if not any(map(_has_shape, getattr(function, "__annotations__", {}).values())):
        return inner

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jaxtyped("context"):
            return inner(*args, **kwargs)

    return call


def _has_shape(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(map(_has_shape, typing.get_args(annotation)))


class _Decorate(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list.append(_expression("__import__('typecheck').shapes", node))
        self.generic_visit(node)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        of = "__import__('jaxtyping').jaxtyped(typechecker=__import__('typecheck').checked)"
        node.decorator_list.insert(0, _expression(of, node))  # fields of dataclasses
        self.generic_visit(node)
        return node


def _expression(text: str, near: ast.AST) -> ast.expr:
    expression = ast.parse(text, mode="eval").body
    for node in ast.walk(expression):
        ast.copy_location(node, near)
    return expression


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        """Compile anew: a cached file would be taken for that of the plain module."""
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)

    def source_to_code(self, data: Any, path: Any, **_: Any) -> Any:
        tree = _Decorate().visit(ast.parse(data, path))
        return compile(tree, path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.package and not name.startswith(f"{self.package}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install(package: str) -> None:
    """Check the modules of a package from now on."""
    assert package not in sys.modules, f"{package} was imported before it could be instrumented"
    sys.meta_path.insert(0, _Finder(package))
