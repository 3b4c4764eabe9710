"""Which values of a config are refused by the types of arguments, and in which words."""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from numbers import Number
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import pytest
import pytorch_lightning as pl
from torch import Tensor, nn

from losswatch.checks.arguments import check_arguments, check_call
from losswatch.config.errors import ConfigError


class Reduction(Enum):
    MEAN = "mean"


NESTED = {"_target_": "torch.nn.ReLU"}
FITS = [
    (bool, True), (int, 3), (float, 3), (float, 1e-3), (float, float("inf")), (str, "off"),
    (bool | None, None), (int | None, None), (int | float, 0.5), (Tensor | float, 0.5),
    (list[int], [1, 2]), (tuple[float, float], [0.9, 1]), (tuple, ["instance", {"affine": True}]),
    (Sequence[int], []), (Sequence[int] | int, 3), (str | tuple, ["prelu", {}]),
    (Literal["min", "max"], "min"), (Reduction | str, "mean"), (str | Path, "a/b"),
    (PathLike, Path("a")), (Number, 3), (Mapping[str, Any], {"a": [1]}), (dict[str, float], {}),
    (nn.Module, NESTED), (list[nn.Module], [NESTED]), (bool, NESTED), (Any, "off"),
    ("a name that nobody knows", "off"),
]  # fmt: skip
REFUSED = [
    (bool, "off", "true or false"),
    (bool, 1, "true or false"),
    (bool | None, "off", "true or false or null"),
    (int, True, "a whole number"),
    (int, 2.0, "a whole number"),
    (int, "3", "a whole number"),
    (float, "x", "a number"),
    (float, False, "a number"),
    (float, None, "a number"),
    (str, 3, "text"),
    (str, ["a"], "text"),
    (int | str | None, 0.5, "a whole number or text or null"),
    (list[int], 8, "a list"),
    (list[int], [8, 2.5], "a list, each a whole number"),
    (Sequence[int], "12", "a list"),
    (tuple[float, float], [0.5, 0.9, 0.3], "a shorter list"),
    (tuple[float, float], [0.5], "a longer list"),
    (Literal["min", "max"], "mix", "'min' or 'max'"),
    (dict[str, int], [1], "keys and values"),
    (Tensor | float, "x", "a number"),
    (nn.Module, "relu", "an object, made by a _target_"),
    (Callable | None, "relu", "an object, made by a _target_ or null"),
]


def function_of(kind):
    def function(x): ...

    function.__annotations__["x"] = kind
    return function


@pytest.mark.parametrize("kind, value", FITS, ids=str)
def test_a_value_that_fits(kind, value):
    check_arguments("part", function_of(kind), {"x": value, "y": "no argument"})


@pytest.mark.parametrize("kind, value, allowed", REFUSED, ids=str)
def test_a_value_that_does_not_fit(kind, value, allowed):
    with pytest.raises(ConfigError) as raised:
        check_arguments("part", function_of(kind), {"x": value})
    assert str(raised.value) == f"part.x must be {allowed}, got {value!r}"


def test_the_default_tells_the_type():
    def function(flag=False, rate=1, name="a", other=None, **rest): ...

    check_arguments("part", function, {"flag": True, "rate": 0.5, "other": "x", "more": 3})
    for name, value in {"flag": "off", "rate": True, "name": 3}.items():
        with pytest.raises(ConfigError, match=f"^part.{name} must be "):
            check_arguments("part", function, {name: value})


def test_arguments_of_a_class():
    check_arguments("trainer", pl.Trainer, {"max_steps": 3, "precision": "32-true", "devices": 2})
    with pytest.raises(ConfigError, match="^trainer.max_steps must be a whole number, got 'x'$"):
        check_arguments("trainer", pl.Trainer, {"max_steps": "x"})


def test_a_call_with_a_missing_or_unknown_argument():
    def function(a: int, b: int = 0): ...

    check_call("part", function, [1], {"b": 2})
    with pytest.raises(ConfigError, match="^part: missing a required argument: 'a'$"):
        check_call("part", function, [], {"b": 2})
    with pytest.raises(ConfigError, match="^part.b must be a whole number, got 'x'$"):
        check_call("part", function, [1], {"b": "x"})
