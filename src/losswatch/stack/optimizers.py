"""The rules of torch's optimisers as pure functions, which can be mapped over stacked runs.

A rule and the gradient are compiled separately. So the gradient, which takes long to compile, is
the same for all optimisers, and later runs find it in the compiler's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from losswatch.stack.flat_parameters import State
from losswatch.stack.refusal import NotStackable

# (parameters [P], their gradient [P], moments, number of finished steps, numbers)
# -> (parameters, moments)
Update = Callable[[Tensor, Tensor, tuple[Tensor, ...], Tensor, State], tuple[Tensor, tuple]]


class Rule(NamedTuple):
    """An optimiser as a pure function."""

    update: Update
    numbers: dict[str, float]  # its settings, which may differ between the runs of a stack
    moments: list[str]  # names in its state_dict of the tensors that it keeps for each parameter


def _adam(p: Tensor, g: Tensor, moments: tuple[Tensor, ...], t: Tensor, n: State) -> Any:
    """torch.optim.Adam and AdamW; Kingma and Ba 2015, Loshchilov and Hutter 2019."""
    g = g + n["weight_decay"] * (1 - n["decoupled"]) * p
    p = p * (1 - n["lr"] * n["weight_decay"] * n["decoupled"])
    m = moments[0] + (1 - n["beta1"]) * (g - moments[0])
    v = n["beta2"] * moments[1] + (1 - n["beta2"]) * g * g
    # In float64, because at small t the difference 1 - 0.999^t loses most digits of float32.
    correction1 = 1 - n["beta1"].double() ** (t + 1)
    correction2 = 1 - n["beta2"].double() ** (t + 1)
    size = (n["lr"] / correction1).float()
    return p - size * m / (v.sqrt() / correction2.sqrt().float() + n["eps"]), (m, v)


def _sgd(p: Tensor, g: Tensor, moments: tuple[Tensor, ...], t: Tensor, n: State) -> Any:
    """torch.optim.SGD, with momentum, also Nesterov's."""
    g = g + n["weight_decay"] * p
    m = torch.where(t > 0, n["momentum"] * moments[0] + g, g)
    g = torch.where(n["nesterov"] > 0, g + n["momentum"] * m, m)
    return p - n["lr"] * g, (m,)


def _adam_numbers(group: Mapping[str, Any], decoupled: float) -> dict[str, float]:
    if group["amsgrad"] or group["maximize"]:
        raise NotStackable("amsgrad and maximize are not written out for stacked runs")
    beta1, beta2 = group["betas"]
    return {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"],
            "weight_decay": group["weight_decay"], "decoupled": decoupled}  # fmt: skip


def _sgd_numbers(group: Mapping[str, Any]) -> dict[str, float]:
    if group["dampening"] or group["maximize"]:
        raise NotStackable("dampening and maximize are not written out for stacked runs")
    numbers = {key: float(group[key]) for key in ("momentum", "nesterov", "weight_decay")}
    return {"lr": group["lr"], **numbers}


def optimizer_rule(optimizer: torch.optim.Optimizer) -> Rule:
    """The rule of a torch optimiser.

    Raises:
        NotStackable: this file has no rule for the optimiser or for one of its settings.
    """
    group = optimizer.param_groups[0]
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        decoupled = group.get("decoupled_weight_decay", type(optimizer) is torch.optim.AdamW)
        return Rule(_adam, _adam_numbers(group, float(decoupled)), ["exp_avg", "exp_avg_sq"])
    if type(optimizer) is torch.optim.SGD:
        return Rule(_sgd, _sgd_numbers(group), ["momentum_buffer"])
    raise NotStackable(f"{type(optimizer).__name__} is not written out for stacked runs")
