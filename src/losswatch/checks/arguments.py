"""Checks that the values of a config have the types of the arguments that get them (pydantic).

The command line may give text where a truth value is meant, and Python counts the text `off` as
true. The annotations and defaults of a function's arguments reveal such a value before it is used.
"""

from __future__ import annotations

import functools
import inspect
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from losswatch.config.errors import ConfigError

# What is allowed, by the type of pydantic's error. The messages of other errors say it.
_WORDS = {
    "bool_type": "true or false", "int_type": "a whole number", "int_from_float": "a whole number",
    "float_type": "a number", "string_type": "text", "list_type": "a list",
    "tuple_type": "a list", "iterable_type": "a list", "dict_type": "keys and values",
    "too_long": "a shorter list", "missing": "a longer list",
}  # fmt: skip
# Errors about types whose values only a `_target_` can make.
_OBJECTS = ("needs_python_object", "callable_type")


def check_arguments(what: str, function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Compare values with the annotations of a function's arguments, or of a class's constructor.

    An argument without an annotation has the type of its default, if that is a truth value, a
    number or text. Names that the function does not have are left to the call itself.

    Args:
        what: the part of the config that holds the values.
        function: the function or class that will get them.
        values: by the name of the argument. An object that a `_target_` in them makes is not
            checked here.

    Raises:
        ConfigError: a value does not fit. The message names the first one, and what is allowed.

    >>> def scale(factor: float, exact: bool | None = None): ...
    >>> check_arguments("model", scale, {"factor": 2, "exact": "off"})
    Traceback (most recent call last):
    losswatch.config.errors.ConfigError: model.exact must be true or false or null, got 'off'
    """
    kinds = _kinds(function)
    for name, value in values.items():
        is_made_later = "_target_" in str(value)
        if not is_made_later and (allowed := _allowed(kinds.get(name, Any), value)):
            raise ConfigError(f"{what}.{name} must be {allowed}, got {value!r}")


def check_call(
    what: str, function: Callable[..., Any], args: Sequence[Any], values: Mapping[str, Any]
) -> None:
    """Check that a function can be called with these arguments, without calling it.

    Args:
        what, function, values: see `check_arguments`; the values are all that the function gets.
        args: arguments by position.

    Raises:
        ConfigError: a value does not fit, or the function does not take these arguments.

    >>> def scale(factor: float, exact: bool | None = None): ...
    >>> check_call("model", scale, [], {"factor": 2, "exakt": True})
    Traceback (most recent call last):
    losswatch.config.errors.ConfigError: model: got an unexpected keyword argument 'exakt'
    """
    check_arguments(what, function, values)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have no signature
        return
    try:
        signature.bind(*args, **values)
    except TypeError as error:
        raise ConfigError(f"{what}: {error}") from error


def _kinds(function: Callable[..., Any]) -> dict[str, Any]:
    """The type of each argument by its name; Any where it is not known."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions written in C have no signature
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


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))


def _allowed(kind: Any, value: Any) -> str | None:
    """The values that a type allows, in words; None if this value of a config is one of them."""
    try:
        adapter = _adapter(kind)
    except Exception:  # pydantic cannot check this type
        return None
    if not (errors := _errors(adapter, value)):
        return None
    words = [_describe(error) for error in errors if error["type"] not in _OBJECTS]
    words = words or ["an object, made by a _target_"]
    if not _errors(adapter, None):
        words.append("null")
    return " or ".join(dict.fromkeys(words))


def _errors(adapter: TypeAdapter[Any], value: Any) -> list[Any]:
    """The errors that pydantic finds in a value of a config; empty if the value fits.

    In JSON a list may stand for a tuple, and a whole number for a float. Values that JSON does not
    have, such as a path, and types that only `isinstance` knows, need Python's own value.
    """
    try:
        adapter.validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        try:
            adapter.validate_python(value, strict=True)
        except Exception:
            return error.errors()
    return []


def _describe(error: Mapping[str, Any]) -> str:
    word = _WORDS.get(error["type"]) or error["msg"].removeprefix("Input should be ")
    is_in_list = any(isinstance(part, int) for part in error["loc"])
    return f"a list, each {word}" if is_in_list and error["type"] != "missing" else word
