"""Whether the values of a config fit the arguments that they are for, by type.

The command line may give text where a truth value is meant, and Python counts the text `off` as
true. The annotations and defaults of a function's arguments reveal such a value before it is used.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from os import PathLike
from typing import Any

from losswatch.config.errors import ConfigError


def check_arguments(what: str, function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Compare values with the annotations of a function's arguments, or of a class's constructor.

    An argument without an annotation has the type of its default, if that is a truth value, a
    number or text. Names that the function does not have are left to the call itself.

    Args:
        what: the part of the config that holds the values.
        function: the function or class that will get them.
        values: by the name of the argument.

    Raises:
        ConfigError: naming the first value that does not fit, and what is allowed.

    >>> def scale(factor: float, exact: bool | None = None): ...
    >>> check_arguments("model", scale, {"factor": 2, "exact": "off"})
    Traceback (most recent call last):
    losswatch.config.schema.ConfigError: model.exact must be true or false or null, got 'off'
    """
    kinds = _kinds(function)
    for name, value in values.items():
        kind = kinds.get(name, Any)
        if not _fits(value, kind):
            raise ConfigError(f"{what}.{name} must be {_describe(kind)}, got {value!r}")


def check_call(
    what: str, function: Callable[..., Any], args: Sequence[Any], values: Mapping[str, Any]
) -> None:
    """See that a function can be called with these arguments, without calling it.

    Args:
        what, function, values: as of `check_arguments`, with all that the function will get.
        args: arguments by position.

    Raises:
        ConfigError: a value does not fit, or the function does not take these arguments.

    >>> def scale(factor: float, exact: bool | None = None): ...
    >>> check_call("model", scale, [], {"factor": 2, "exakt": True})
    Traceback (most recent call last):
    losswatch.config.schema.ConfigError: model: got an unexpected keyword argument 'exakt'
    """
    check_arguments(what, function, values)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some functions written in C
        return
    try:
        signature.bind(*args, **values)
    except TypeError as error:
        raise ConfigError(f"{what}: {error}") from error


def _kinds(function: Callable[..., Any]) -> dict[str, Any]:
    """The type of each argument by its name; Any where it is not known."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of some functions written in C
        return {}
    try:
        called = function.__init__ if inspect.isclass(function) else function  # type: ignore[misc]
        hints = typing.get_type_hints(called)
    except Exception:  # an annotation may use a name that is imported for type checkers only
        hints = {}
    return {
        name: hints.get(name, _kind_of_default(parameter.default))
        for name, parameter in parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def _kind_of_default(value: Any) -> Any:
    if isinstance(value, bool | str):
        return type(value)
    return float if isinstance(value, int | float) else Any


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of a config may be passed as an argument of this type."""
    if kind is Any:
        return True
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in inner)
    if origin is typing.Annotated:
        return _fits(value, inner[0])
    if origin is typing.Literal:
        return any(value == allowed and type(value) is type(allowed) for allowed in inner)
    if kind is None or kind is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    container = origin or kind
    if not inspect.isclass(container):
        return True  # a type variable
    if isinstance(value, dict):
        return True  # a nested object, which is checked where it is made
    if isinstance(value, list | tuple):
        if not issubclass(container, Iterable) and container is not object:
            return False
        if container is tuple and inner and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(_fits, value, inner))
        return not inner or all(_fits(item, inner[0]) for item in value)
    if isinstance(value, str) and issubclass(container, Enum | PathLike):
        return True
    return isinstance(value, container)


def _describe(kind: Any) -> str:
    """The values that `_fits` allows, in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        plain = [member for member in inner if not _is_object(member)]
        return " or ".join(dict.fromkeys(map(_describe, plain or inner)))
    if origin is typing.Literal:
        return " or ".join(map(str, inner))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text",
             type(None): "null"}  # fmt: skip
    if kind in names:
        return names[kind]
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)}, each {_describe(inner[0])}"
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Iterable):
        return f"a list, each {_describe(inner[0])}" if inner else "a list"
    return f"of the type {getattr(kind, '__name__', kind)}"


def _is_object(kind: Any) -> bool:
    """Whether a config can only name a value of this type by the `_target_` that makes it."""
    return inspect.isclass(kind) and kind not in (bool, int, float, str, list, tuple, type(None))
