"""Checks the settings of a loss when it is made, and makes them read-only."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torch import nn


class Frozen(nn.Module):
    """A module whose settings, the arguments of its constructor, cannot change.

    A `LossSet` has decided by these settings which sums it computes.

    Raises:
        AttributeError: a setting is assigned after construction.
    """

    _settings: frozenset[str] = frozenset()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._settings:
            raise AttributeError(
                f"{name} cannot change after construction; make a new {type(self).__name__}"
            )
        super().__setattr__(name, value)

    def freeze(self, constructor: Any) -> None:
        """Make the attributes named like an argument of the constructor read-only."""
        names = inspect.signature(constructor).parameters
        self.__dict__["_settings"] = frozenset(names) - {"self"}

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor by name."""
        return {name: getattr(self, name) for name in self._settings}


def parse_choice(name: str, value: Any, *allowed: str) -> Any:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed are {', '.join(allowed)}")
    return value


def parse_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):  # "off" and "no" would count as true
        raise ValueError(f"{name}={value!r}: allowed are true and false")
    return value


def parse_index(name: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise ValueError(f"{name}={value!r}: allowed is a whole number, or None")
    return None if value is None else int(value)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def parse_number(name: str, value: Any, high: float = math.inf) -> float:
    if not is_number(value) or not 0 <= value <= high or math.isinf(value):
        limit = "at least 0" if math.isinf(high) else f"from 0 to {high:g}"
        raise ValueError(f"{name}={value!r}: allowed is a number {limit}")
    return float(value)


def parse_per_class(name: str, value: Any) -> tuple[float, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"{name}={value!r}: allowed is one number per class")
    return tuple(parse_number(f"{name}[{c}]", v) for c, v in enumerate(value))


def parse_numbers(name: str, value: Any) -> float | tuple[float, ...]:
    """One number, or one per class."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return parse_per_class(name, value)
    return parse_number(name, value)
